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
// undecided when the only errors are inputs that are missing (no collateral, or a
// kind of TEE that this version does not verify). Otherwise it is refused. The
// zero [Policy] refuses everything (B04), and without an expected workload
// nothing is accepted: an app id alone does not say what runs (B12).
//
// Implements design.md §4, attestation.md §4 to §7, measurement.md §3 to §5 and
// threats.md §2.
package verifier

import (
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
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
}

// Anchor is a value and whose word it is.
type Anchor struct {
	What   string `json:"what"`
	Value  string `json:"value"`
	Origin string `json:"origin"`
}

// Policy is what a relying party accepts. The zero value denies everything.
type Policy struct {
	// AcceptedTCB are the TCB statuses that are good enough, in Intel's words,
	// such as UpToDate. Empty denies all.
	AcceptedTCB []string

	// DevRoots lets roots of development trust count. Evidence under them proves
	// nothing about hardware.
	DevRoots bool

	// AllowDebug accepts a TD whose memory the host can read.
	AllowDebug bool

	// AllowDevImage accepts a development image under production roots.
	AllowDevImage bool

	// AllowNoMRConfig accepts a launch that committed to no configuration
	// (MRCONFIGID all zero), as older upstream hosts start guests (B11).
	AllowNoMRConfig bool

	// AllowUnanchoredImage accepts an OS image that only the guest itself vouches
	// for (B10).
	AllowUnanchoredImage bool

	// AllowUnpinnedImages accepts a manifest without image_policy "digest", whose
	// tags may stand for other images tomorrow (J01).
	AllowUnpinnedImages bool

	// RequireFresh refuses evidence that does not answer the caller's own nonce
	// or report data.
	RequireFresh bool

	// MinTCBEvaluation is the least evaluation data number of the collateral: a
	// floor against older, still unexpired statements (B03).
	MinTCBEvaluation uint32

	// DeniedAdvisories refuse a platform to which one of them applies.
	DeniedAdvisories []string

	// DeniedFMSPC refuses processor families: 12 lowercase hexadecimal digits (A02).
	DeniedFMSPC []string

	// Devices, when not empty, are the only machines accepted (A01).
	Devices []dstack.DeviceID
}

// Freshness is what ties evidence to this caller, now.
type Freshness struct {
	// Nonce is what the caller asked with, at least 16 bytes; nil when it did not
	// ask, as with a saved file.
	Nonce []byte

	// ConnectionSPKI is the DER SubjectPublicKeyInfo of the TLS connection that the
	// evidence came over; nil for plain HTTP or a file.
	ConnectionSPKI []byte

	// ReportData, when set, is demanded exactly, in place of the nonce's envelope.
	ReportData *dstack.ReportData
}

// How evidence is tied to the caller, and to a connection.
const (
	FreshNonce      = "nonce"       // answers the caller's nonce
	FreshReportData = "report_data" // carries the caller's report data
	FreshNone       = "none"        // may be old

	ChannelTLS  = "tls"  // the key of the caller's own connection
	ChannelNone = "none" // nothing: what is said over the connection may be another's
)

// Workload is what runs, as the measured event log says. It is present only when
// the log replays to the registers of a verified quote.
type Workload struct {
	Name        string             `json:"name,omitempty"` // of the manifest
	AppID       dstack.AppID       `json:"app_id"`
	ComposeHash dstack.ComposeHash `json:"compose_hash"`
	InstanceID  string             `json:"instance_id"` // 40 hexadecimal digits, or empty
	KeyProvider string             `json:"key_provider"`
	OSImageHash string             `json:"os_image_hash,omitempty"` // as asserted; see Anchored
	RunsScripts bool               `json:"runs_scripts"`
	PublicLogs  bool               `json:"public_logs"`
	ChannelKey  string             `json:"channel_key,omitempty"` // SHA-256 of the committed SPKI
}

// Verdict is the result. Its JSON is stable: fields are added, never changed.
type Verdict struct {
	Version   int    `json:"version"` // 1
	Accepted  bool   `json:"accepted"`
	Undecided bool   `json:"undecided"`
	Reason    string `json:"reason,omitempty"` // why it is undecided

	// Trust is production or development: the kind of root that vouches, or, where
	// none did, the weakest kind that the caller allowed.
	Trust dstack.Trust `json:"trust"`
	At    time.Time    `json:"at"`

	Findings []Finding `json:"findings"`

	// Anchored are values that someone other than the guest vouches for, by name.
	Anchored []Anchor `json:"anchored"`
	// SelfConsistent are values that only the evidence itself vouches for.
	SelfConsistent []Anchor `json:"self_consistent"`
	// Assumptions are what the verdict leaves to trust.
	Assumptions []string `json:"assumptions"`

	Freshness string         `json:"freshness"`
	Channel   string         `json:"channel"`
	Workload  *Workload      `json:"workload,omitempty"`
	Claims    *attest.Claims `json:"claims,omitempty"` // nil unless the quote verified
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
