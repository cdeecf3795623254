// SPDX-License-Identifier: Apache-2.0

// Package governance holds the nouns of authority: what is asked about a machine
// that wants keys ([Request]), what is answered ([Decision]) and who answers
// ([Authority]). Implementations are a signed policy document (governance/policy), a
// signed webhook (governance/webhook) and, later, a chain.
//
// Everything fails closed: the zero Decision denies, an error denies, and an
// authority that cannot be asked has not allowed anything. A decision is never kept
// for the next request.
//
// Trusted: the keys that an implementation is given, in measured configuration.
// A Request is made of evidence that the caller has verified; what of it no hardware
// vouches for its fields say.
//
// Implements spec/governance.md §2, design.md §7; threats.md G04, G08, J07, A01.
package governance

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/dstack-go/dstack"
)

// Role is what a machine wants to be.
type Role string

const (
	App Role = "app" // wants keys of its app
	KMS Role = "kms" // is, or wants to be, a holder of the root keys
)

// BootInfo is what booted, in upstream's terms: the body of its webhook's request.
type BootInfo struct {
	TEEVariant      string // dstack-tdx, dstack-gcp-tdx, dstack-amd-sev-snp, dstack-nitro-enclave, dstack-aws-nitro-tpm
	MRAggregated    [32]byte
	OSImageHash     []byte // 32 bytes, or empty when unknown
	MRSystem        [32]byte
	AppID           dstack.AppID
	ComposeHash     dstack.ComposeHash
	InstanceID      []byte // 20 bytes, or empty
	DeviceID        dstack.DeviceID
	KeyProviderInfo []byte // payload of the event key-provider, or empty
	TCBStatus       string
	AdvisoryIDs     []string
}

// MarshalJSON writes upstream's form: names and order of spec/governance.md §2, bytes
// in lowercase hexadecimal without 0x.
func (b BootInfo) MarshalJSON() ([]byte, error) {
	advisories := b.AdvisoryIDs
	if advisories == nil {
		advisories = []string{}
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	err := enc.Encode(struct {
		TEEVariant      string   `json:"teeVariant"`
		MRAggregated    string   `json:"mrAggregated"`
		OSImageHash     string   `json:"osImageHash"`
		MRSystem        string   `json:"mrSystem"`
		AppID           string   `json:"appId"`
		ComposeHash     string   `json:"composeHash"`
		InstanceID      string   `json:"instanceId"`
		DeviceID        string   `json:"deviceId"`
		KeyProviderInfo string   `json:"keyProviderInfo"`
		TCBStatus       string   `json:"tcbStatus"`
		AdvisoryIDs     []string `json:"advisoryIds"`
	}{
		b.TEEVariant, hex.EncodeToString(b.MRAggregated[:]), hex.EncodeToString(b.OSImageHash), hex.EncodeToString(b.MRSystem[:]),
		hex.EncodeToString(b.AppID[:]), hex.EncodeToString(b.ComposeHash[:]), hex.EncodeToString(b.InstanceID),
		hex.EncodeToString(b.DeviceID[:]), hex.EncodeToString(b.KeyProviderInfo), b.TCBStatus, advisories,
	})
	return bytes.TrimSpace(out.Bytes()), err
}

// Purpose says what would be given if the answer is yes.
type Purpose string

const (
	Keys        Purpose = "keys"        // an app's keys
	Certificate Purpose = "certificate" // a certificate of an app
	Renewal     Purpose = "renewal"     // a lease of a running instance
	Replication Purpose = "replication" // the root keys, to another KMS
	Service     Purpose = "service"     // this KMS itself may go on
	Source      Purpose = "source"      // that KMS may be taken root keys from
)

// Request asks whether a machine may have what it wants.
type Request struct {
	Role    Role
	Purpose Purpose
	Boot    BootInfo

	// Trust is the kind of root that vouches for the evidence.
	Trust dstack.Trust
	// Launch are the launch registers as the hardware signed them, by the vendors'
	// names (mrtd, rtmr0, rtmr1, rtmr2; measurement).
	Launch map[string][]byte
	// ImageBound says that the launch registers were derived from the image's own
	// measurement document, which Boot.OSImageHash commits to: the image is the one of
	// that name. Without it, the hash is the guest's word, and an authority must know
	// the registers.
	ImageBound bool
	// DevImage and OSEpoch are the image's own word where that is bound; nil: unknown.
	DevImage *bool
	OSEpoch  *int
	// Session says that the evidence was made for this very connection, and not for a
	// key that may have been copied (threats.md B08, C01); of a certificate, that the
	// system of the guest that is to have it asks over such a connection (B20).
	Session bool
	At      time.Time
}

// Decision is an answer; the zero value denies.
type Decision struct {
	Allowed bool
	// Code is the stable name of the reason for a denial, such as device_not_allowed;
	// Reason says it for people.
	Code, Reason string
	// By names what decided: such as "policy v3 sha256:…". It goes into the log.
	By string

	// GatewayAppID is which gateways the app's guests trust: as keys.AppKeys has it.
	GatewayAppID string
	// Lease is how long the machine may go on before it must ask again; zero: the KMS's
	// own limit.
	Lease time.Duration
	// Names, when not nil, are the DNS names that certificates of the app may have: exact,
	// or "*.example.org" for any one label below. Nil: any.
	Names []string
	// Epoch is the key epoch in force, and OldestEpoch the oldest that is still given;
	// zero: native keys are not in use.
	Epoch, OldestEpoch uint64
}

// Deny makes a Decision of a reason.
func Deny(by, code, reason string) Decision { return Decision{Code: code, Reason: reason, By: by} }

// About is what an authority tells of itself: the fields of the KMS's GetMeta.
type About struct {
	Dev            bool // it allows everything, or serves development trust
	GatewayAppID   string
	Contract       string // 0x-prefixed address, or empty
	ChainID        uint64
	Implementation string // of the app contract, or empty
	By             string // as in Decision
}

// Authority decides who may have keys.
type Authority interface {
	// Decide answers one request. An error means that there is no answer, which denies;
	// it has a code.
	Decide(ctx context.Context, r Request) (Decision, error)
	// About fails when the authority cannot be asked.
	About(ctx context.Context) (About, error)
}
