// SPDX-License-Identifier: Apache-2.0

// Package attest holds the two nouns of attestation: [Evidence], what a machine
// handed over, and [Claims], what verification established.
//
// Evidence is attacker-controlled in every field. Claims are made only by the
// verifying packages below this one (attest/tdx and its siblings), from bytes
// that chain to a root the caller trusts. No field of Claims is ever copied from
// Evidence unverified. Specification: attestation.md.
package attest

import (
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
)

// MaxQuote bounds raw hardware evidence in bytes (threats.md B15).
const MaxQuote = 128 << 10

// Evidence is what one machine produced; typed, unverified.
type Evidence struct {
	TEE        dstack.TEE
	Quote      []byte            // raw hardware evidence: TDX quote, SNP report, COSE_Sign1
	EventLog   []eventlog.Event  // boot events (imr 0..2, may be empty) followed by runtime events (imr 3)
	Config     string            // vm_config JSON, or a sys-config that nests it (hostile)
	ReportData dstack.ReportData // as claimed

	// ReportDataPayload is the text that ReportData commits to as app data
	// (container kind dstack-pod), or nil.
	ReportDataPayload *string
	// Unbound are runtime events of a TEE without a runtime register. Nothing
	// vouches for them; they are kept for display only (threats.md B19).
	Unbound   []eventlog.Event
	CertChain [][]byte  // SEV-SNP: certificates beside the report
	MRConfig  string    // SEV-SNP: the config document whose hash is HOST_DATA
	TPMQuote  *TPMQuote // Google Cloud TDX: the vTPM's quote, nil elsewhere
}

// TPMQuote is the vTPM evidence beside a TDX quote on Google Cloud; unverified.
type TPMQuote struct {
	Message   []byte // TPMS_ATTEST
	Signature []byte
	PCRs      []PCR
	AKCert    []byte // DER
	Platform  uint8  // index of attestation.md §1.1
	EventLog  []PCREvent
}

// PCR is one quoted register.
type PCR struct {
	Index     uint32
	Algorithm string
	Value     []byte
}

// PCREvent is one digest extended into a PCR.
type PCREvent struct {
	Index  uint32
	Digest []byte
}

// Claims is what verification established about one piece of evidence at one
// time. The strings of TCB statuses are Intel's (UpToDate, OutOfDate, …).
type Claims struct {
	TEE   dstack.TEE   `json:"tee"`
	Trust dstack.Trust `json:"trust"`
	Root  string       `json:"root"` // subject and SHA-256 fingerprint of the root that vouches

	MRTD          dstack.Measurement    `json:"mrtd"`
	RTMR          [4]dstack.Measurement `json:"rtmr"`
	MRConfigID    dstack.MRConfigID     `json:"mr_config_id"`
	MROwner       dstack.Measurement    `json:"mr_owner"`
	MROwnerConfig dstack.Measurement    `json:"mr_owner_config"`
	MRSEAM        dstack.Measurement    `json:"mr_seam"`
	ReportData    dstack.ReportData     `json:"report_data"`
	TDAttributes  string                `json:"td_attributes"` // 8 bytes, hex in memory order
	XFAM          string                `json:"xfam"`          // 8 bytes, hex in memory order
	TEETCBSVN     string                `json:"tee_tcb_svn"`   // 16 bytes, hex
	Debug         bool                  `json:"debug"`         // the host can read the TD's memory

	TCBStatus      string    `json:"tcb_status"`      // worst of the three below
	PlatformStatus string    `json:"platform_status"` // of the matching TCB level
	ModuleStatus   string    `json:"module_status"`   // of the TDX module, empty when it has no identity of its own
	QEStatus       string    `json:"qe_status"`       // of the quoting enclave
	Advisories     []string  `json:"advisories"`      // sorted, without duplicates
	TCBDate        time.Time `json:"tcb_date"`        // the oldest date among the matching levels
	// TCBEvaluation is the lower of the evaluation data numbers of TCB info and
	// QE identity; a floor on it detects replayed collateral (threats.md B03).
	TCBEvaluation uint32          `json:"tcb_evaluation"`
	FMSPC         string          `json:"fmspc"`     // 6 bytes, lowercase hex: the processor family and platform
	DeviceID      dstack.DeviceID `json:"device_id"` // SHA-256 of the PPID
	At            time.Time       `json:"at"`        // when this was verified
	Expires       time.Time       `json:"expires"`   // when the first part of the collateral ends
}
