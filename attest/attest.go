// SPDX-License-Identifier: Apache-2.0

// Package attest holds the nouns of attestation that every kind of TEE shares:
// [Evidence], what a machine handed over; [Roots], whom the caller trusts; and
// [Claims], what verification established.
//
// Each TEE has one package below this one with one pure function of the type
// [Verify]: no clock, network or file, the same code on a server and in a
// browser. Evidence is attacker-controlled in every field. Claims are made only by
// those functions, from bytes that chain to a root the caller trusts; no field of
// Claims is ever copied from Evidence unverified. Specification: attestation.md.
package attest

import (
	"crypto"
	"crypto/x509"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/collateral"
)

// MaxQuote bounds raw hardware evidence in bytes (threats.md B15).
const MaxQuote = 128 << 10

// Evidence is what one machine produced; typed, unverified.
type Evidence struct {
	TEE        dstack.TEE
	Quote      []byte            // raw hardware evidence: TDX quote, SNP report, CCA token, COSE_Sign1; empty for TPM
	EventLog   []eventlog.Event  // boot events (imr 0..2, may be empty) followed by runtime events (imr 3)
	Config     string            // vm_config JSON, or a sys-config that nests it (hostile)
	ReportData dstack.ReportData // as claimed; meaningless without ReportDataClaimed

	// ReportDataClaimed says that the evidence came with a claim of its report data
	// (containers do, raw quotes do not).
	ReportDataClaimed bool

	// ReportDataPayload is the text that ReportData commits to as app data
	// (container kind dstack-pod), or nil.
	ReportDataPayload *string
	// Unbound are runtime events of a TEE without a runtime register. Nothing
	// vouches for them; they are kept for display only (threats.md B19).
	Unbound   []eventlog.Event
	CertChain [][]byte  // SEV-SNP: certificates beside the report (DER or PEM each, or one GHCB table)
	MRConfig  string    // SEV-SNP, CCA: the config document whose hash is HOST_DATA or RPV
	TPMQuote  *TPMQuote // TPM, and the vTPM's quote beside a TDX quote on Google Cloud; nil elsewhere
}

// TPMQuote is TPM 2.0 evidence; unverified.
type TPMQuote struct {
	Message   []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
	PCRs      []PCR
	AKCert    []byte // DER
	Platform  uint8  // index of attestation.md §1.1
	EventLog  []PCREvent
}

// PCR is one quoted register.
type PCR struct {
	Index     uint32
	Algorithm string // sha1, sha256, sha384, sha512
	Value     []byte
}

// PCREvent is one digest extended into a PCR.
type PCREvent struct {
	Index  uint32
	Digest []byte
}

// Roots are trust anchors of one kind of TEE that stand for one kind of trust. The
// whole of one verification must lead to a single one of them, so that
// development collateral never grades production evidence.
type Roots struct {
	TEE   dstack.TEE
	Trust dstack.Trust
	CA    []*x509.Certificate
	Keys  []RootKey // Arm CCA: platform attestation keys, which no public authority certifies
}

// RootKey is a bare public key that the caller trusts.
type RootKey struct {
	Name string // for people: where it came from
	Key  crypto.PublicKey
}

// Input is all that verification depends on.
type Input struct {
	Evidence   *Evidence
	Collateral *collateral.Bundle // nil means none
	Roots      []Roots            // of any TEE; those of another are ignored
	At         time.Time
	Options    Options

	// Memo, when not nil, remembers what verifying the collateral gave.
	Memo *Memo
}

// Options widen what verification accepts, on the caller's responsibility. The
// zero value is the strictest.
type Options struct {
	// AllowDebug accepts a VM whose memory the host can read; Claims.Debug is then
	// set. Never for secrets.
	AllowDebug bool
	// TDXAttributes are TD attributes accepted beside SEPT_VE_DISABLE, out of PKS,
	// KL and PERFMON; others are ignored.
	TDXAttributes uint64
	// SNPAllowMigration accepts a guest policy that admits a migration agent.
	SNPAllowMigration bool
	// AllowMissingCRL accepts evidence of SEV-SNP and TPM although the collateral
	// holds no revocation list for its chain; Claims.Unchecked then says so, and the
	// verdict carries a finding. A list that is there is judged all the same.
	AllowMissingCRL bool
}

// Verify establishes what evidence proves at a stated time.
//
// It returns claims exactly when signatures, certificate chains and collateral all
// hold. An error beside them says why the platform or the VM is not acceptable
// nonetheless (debug mode, a revoked or unknown TCB level): claims then are for
// display, and nothing may rest on them. Every error carries a stable code
// (internal/fault). A TCB status other than Revoked is no error but a grade for the
// caller's policy.
//
// Missing collateral has the code collateral_missing, evidence that leads to none
// of the roots unknown_root, no roots at all no_roots.
type Verify func(Input) (*Claims, error)
