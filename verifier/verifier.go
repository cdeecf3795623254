// SPDX-License-Identifier: Apache-2.0

// Package verifier decides whether evidence shows the workload that a relying
// party expects: [Appraise] takes evidence, reference values, a policy and a
// time, and returns a [Verdict] with every reason.
//
// It is pure: no clock, network, file or environment; it compiles to js/wasm and
// the page that runs it decides exactly as `dstack verify` does. The same inputs
// give the same verdict.
//
// Everything in a [Source] is attacker-controlled, including the manifest, the
// configuration, and the collateral that it may carry. Nothing of it is used as a
// fact before it is bound to something that is: the quote by the vendor's
// signatures, the event log by the registers in the quote, the manifest by the
// measured compose hash, the configuration document by MRCONFIGID. What the guest
// says about itself and nobody else vouches for is listed as self-consistent,
// never as anchored, and by itself accepts nothing (threats.md B10).
//
// A verdict has three outcomes. It is accepted when no finding is an error. It is
// undecided when the only errors are inputs that are missing (no collateral, no
// event log). Otherwise it is refused. The
// zero [Policy] refuses everything (B04), and without an expected workload
// nothing is accepted: an app id alone does not say what runs (B12). A policy of
// scope signature judges signature, chain and collateral alone, and its verdict
// says so first.
//
// Implements design.md §4, attestation.md §4 to §7, measurement.md §3 to §5 and
// threats.md §2.
package verifier

import (
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
)

// Level says what a finding does to the verdict.
type Level = string

// An error refuses; a warning and an info do not.
const (
	Error   Level = "error"
	Warning Level = "warning"
	Info    Level = "info"
)

// Finding is one reason.
type Finding struct {
	Level    Level  `json:"level"`
	Code     string `json:"code"`
	Message  string `json:"message"`
	Evidence string `json:"evidence,omitempty"` // where in the evidence, such as quote.rtmr[1]
	Fix      string `json:"fix,omitempty"`
	Hop      string `json:"hop,omitempty"` // gateway: it concerns the gateway's evidence
}

// Anchor is a value and whose word it is.
type Anchor struct {
	What   string `json:"what"`
	Value  string `json:"value"`
	Origin string `json:"origin"`
}

// Freshness is what ties evidence to this caller, now.
type Freshness struct {
	// Nonce is what the caller asked with, at least 16 bytes; nil when it did not
	// ask, as with a saved file.
	Nonce []byte

	// ConnectionSPKI is the DER SubjectPublicKeyInfo of the TLS connection that the
	// evidence came over; nil for plain HTTP or a file.
	ConnectionSPKI []byte

	// ReportData, when set, is demanded exactly, in place of the nonce's envelope: 64
	// bytes but for TPM and Nitro, which allow other lengths.
	ReportData []byte
}

// How evidence is tied to the caller, and to a connection.
const (
	FreshNonce      = "nonce"       // answers the caller's nonce
	FreshReportData = "report_data" // carries the caller's report data
	FreshNone       = "none"        // may be old

	ChannelTLS     = "tls"     // the key of the caller's own connection
	ChannelGateway = "gateway" // the key of the caller's own connection, which a measured gateway ends
	ChannelNone    = "none"    // nothing: what is said over the connection may be another's
)

// Roles of a hop.
const (
	HopGateway = "gateway"
	HopApp     = "app"
)

// Hop is one of those that what the caller says passes, in that order, and in which it is
// plaintext. A verdict has hops when TLS ends at a gateway (threats.md C05).
type Hop struct {
	Role     string `json:"role"`
	Accepted bool   `json:"accepted"` // by itself: its evidence shows what was expected of it

	Trust     dstack.Trust `json:"trust"`
	TEE       dstack.TEE   `json:"tee,omitempty"`
	TCBStatus string       `json:"tcb_status,omitempty"`
	Workload  *Workload    `json:"workload,omitempty"`

	Anchors        []Anchor `json:"anchors"`
	SelfConsistent []Anchor `json:"self_consistent"`
}

// Workload is what runs, as the measured event log says, or, on a TEE without a
// runtime register, the configuration document that the host committed to before
// launch. It is present only when the one or the other is bound by a verified
// quote.
type Workload struct {
	Name        string             `json:"name,omitempty"` // of the manifest
	AppID       dstack.AppID       `json:"app_id"`
	ComposeHash dstack.ComposeHash `json:"compose_hash"`
	InstanceID  string             `json:"instance_id"` // 40 hexadecimal digits, or empty
	KeyProvider string             `json:"key_provider"`
	OSImageHash string             `json:"os_image_hash,omitempty"` // as asserted; see Anchors
	RunsScripts bool               `json:"runs_scripts"`
	PublicLogs  bool               `json:"public_logs"`
	ChannelKey  string             `json:"channel_key,omitempty"` // SHA-256 of the committed SPKI
	BoundBy     string             `json:"bound_by"`              // register that vouches: rtmr3, rem3, pcr14, host_data, rpv
}

// Platform is what is known of the machine and its vendor's word for it.
type Platform struct {
	Root           string           `json:"root"`
	Product        string           `json:"product,omitempty"`
	DeviceID       dstack.DeviceID  `json:"device_id"`
	DeviceScheme   string           `json:"device_scheme"` // ids of different schemes cannot be compared
	PlatformStatus string           `json:"platform_status,omitempty"`
	ModuleStatus   string           `json:"module_status,omitempty"`
	QEStatus       string           `json:"qe_status,omitempty"`
	TCBDate        time.Time        `json:"tcb_date,omitzero"`
	TCBEvaluation  uint32           `json:"tcb_evaluation,omitempty"`
	CertifiedTCB   *attest.SNPParts `json:"certified_tcb,omitempty"`
	Debug          bool             `json:"debug"`
	Made           time.Time        `json:"made,omitzero"`    // when the hardware signed, where it says so
	Expires        time.Time        `json:"expires,omitzero"` // when the first thing relied upon ends

	// Bound names what the hardware vouches for, NotBound what came with the
	// evidence and nothing vouches for; Unchecked what verification left out.
	Bound     []string `json:"bound"`
	NotBound  []string `json:"not_bound"`
	Unchecked []string `json:"unchecked"`
}

// Scopes of a verdict.
const (
	ScopeWorkload  = "workload"  // what runs, where, and that it is what the caller expects
	ScopeSignature = "signature" // signature, certificate chain and collateral alone
)

// What a verdict says of the signatures.
const (
	SignatureValid   = "valid"
	SignatureInvalid = "invalid"
)

// Verdict is the result. Its JSON is stable: fields are added, never changed.
type Verdict struct {
	Version   int    `json:"version"` // 1
	Accepted  bool   `json:"accepted"`
	Undecided bool   `json:"undecided"`
	Reason    string `json:"reason,omitempty"` // why it is undecided
	Scope     string `json:"scope"`

	// Trust is production, development or caller: the kind of root that vouches, or,
	// where none did, the weakest kind that the caller allowed.
	Trust dstack.Trust `json:"trust"`
	TEE   dstack.TEE   `json:"tee,omitempty"`
	At    time.Time    `json:"at"`

	// Signature is valid when signatures, certificate chains and collateral hold,
	// whatever else is wrong.
	Signature  string   `json:"signature"`
	TCBStatus  string   `json:"tcb_status,omitempty"`
	Advisories []string `json:"advisories"`

	Findings []Finding `json:"findings"`

	// Anchors are values that someone other than the guest vouches for, by name.
	Anchors []Anchor `json:"anchors"`
	// SelfConsistent are values that only the evidence itself vouches for.
	SelfConsistent []Anchor `json:"self_consistent"`
	// Assumptions are what the verdict leaves to trust.
	Assumptions []string `json:"assumptions"`

	// Hops are the gateway and the app, when TLS ends at a gateway. All else of the
	// verdict is of the app, but for the findings, which say what they concern.
	Hops []Hop `json:"hops,omitempty"`

	Freshness string    `json:"freshness"`
	Channel   string    `json:"channel"`
	Workload  *Workload `json:"workload,omitempty"`
	Platform  *Platform `json:"platform,omitempty"`
	// Governance is what contracts say, where they were asked.
	Governance *Governance    `json:"governance,omitempty"`
	Claims     *attest.Claims `json:"claims,omitempty"` // nil unless Signature is valid
}

// Has reports whether the verdict has a finding of the level and code.
func (v *Verdict) Has(level Level, code string) bool {
	for _, f := range v.Findings {
		if f.Level == level && f.Code == code {
			return true
		}
	}
	return false
}

// Request is all that a verdict depends on.
type Request struct {
	Source Source

	// Roots are the trust anchors, of any TEE; those of development trust count only
	// if the policy says so. VendorRoots has those of the vendors.
	Roots []attest.Roots

	// Collateral is the caller's, or nil to use what the evidence carries. Where
	// there is any of the caller's it decides alone.
	Collateral *collateral.Bundle
	// GatewayCollateral is the caller's for the gateway's evidence, where there is any;
	// nil: that of the app, since two platforms can need the same.
	GatewayCollateral *collateral.Bundle

	Reference Reference
	// Gateway is what is expected of a gateway at which TLS ends. It adds to what the
	// policy and the app's own manifest (gateway_policy) say.
	Gateway   Reference
	Policy    Policy
	Freshness Freshness
	At        time.Time

	// Governance is what the contracts of a chain say of the workload; nil: nobody asked.
	Governance *Governance

	// Launching accepts the log of a guest that has not got its keys yet and ends after
	// boot-mr-done: what a KMS is shown. Relying parties of what runs leave it false.
	Launching bool
	// Provider is, with Launching, the key provider that such a guest would have if it
	// took the caller's keys, as the event key-provider spells it: what the launch
	// committed to is held against it. Empty: that is left open.
	Provider string

	// Memo, when not nil, remembers what verifying collateral gave, for callers that
	// judge many. It changes no verdict.
	Memo *attest.Memo
}
