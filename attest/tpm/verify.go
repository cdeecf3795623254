// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"bytes"
	"crypto/sha256"
	"slices"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// Verify establishes what a TPM quote proves at a stated time; it is an
// [attest.Verify]. The quote is Evidence.TPMQuote: of bare TPM evidence, or beside
// a TDX quote, with which it has nothing to do until [CheckGCP].
//
// The claims' ReportData is the qualifying data, of any length up to 66 bytes.
// DeviceID, of scheme "ak", is the SHA-256 of the attestation key's
// SubjectPublicKeyInfo in DER, as its certificate has it: quotes do not carry the
// TPMT_PUBLIC whose hash upstream's guest uses. A TPM has no TCB status to report:
// TCBStatus is [attest.NotReported]. Of a key outside the endorsement and platform
// hierarchies the TPM disguises reset count, restart count and firmware version.
func Verify(in attest.Input) (*attest.Claims, error) {
	if in.Evidence == nil || in.Evidence.TPMQuote == nil {
		return nil, fault.New("tpm_missing", "the evidence holds no TPM quote")
	}
	if t := in.Evidence.TEE; t != dstack.TPM && t != dstack.TDX {
		return nil, fault.New("tpm_tee", "evidence of kind %q cannot hold a TPM quote", t)
	}
	q := in.Evidence.TPMQuote
	a, err := ParseAttest(q.Message)
	if err != nil {
		return nil, err
	}
	sig, err := ParseSignature(q.Signature)
	if err != nil {
		return nil, err
	}
	c, err := verifyChain(q.AKCert, in)
	if err != nil {
		return nil, err
	}
	if err := sig.check(c.leaf().PublicKey, q.Message); err != nil {
		return nil, err
	}
	if err := checkPCRs(q.PCRs, a, sig); err != nil {
		return nil, err
	}
	if _, _, err := Replay(q); err != nil {
		return nil, err
	}
	return &attest.Claims{
		TEE: dstack.TPM, Trust: c.trust, Root: attest.DescribeRoot(c.root(), c.trust),
		TPM: &attest.TPM{
			PCRs: clonePCRs(q.PCRs), PCRDigest: bytes.Clone(a.PCRDigest),
			Clock: a.Clock, ResetCount: a.ResetCount, RestartCount: a.RestartCount, Safe: a.Safe,
			FirmwareVersion: a.FirmwareVersion, AKSubject: c.leaf().Subject.String(),
		},
		ReportData: bytes.Clone(a.ExtraData),
		TCBStatus:  attest.NotReported,
		Advisories: []string{},
		DeviceID:   sha256.Sum256(c.leaf().RawSubjectPublicKeyInfo), DeviceScheme: "ak",
		Unchecked: c.unchecked,
		At:        in.At, Expires: c.expires,
	}, nil
}

// bankOf returns the bank with a number of the TCG registry. SHA-1 is no bank to
// rest on.
func bankOf(hash uint16) (eventlog.Bank, error) {
	switch hash {
	case AlgSHA256:
		return eventlog.BankSHA256, nil
	case AlgSHA384:
		return eventlog.BankSHA384, nil
	case AlgSHA1:
		return "", fault.New("tpm_bank_weak", "the quote is of the SHA-1 bank, whose registers can be forged")
	}
	return "", fault.New("tpm_bank", "the quote is of bank %#x, want SHA-256 or SHA-384", hash)
}

// checkPCRs demands that the values given are those that the quote selects, in its
// order, and that its digest is over them.
func checkPCRs(given []attest.PCR, a *Attest, sig *Signature) error {
	if len(a.Banks) != 1 {
		return fault.New("tpm_bank_count", "the quote is of %d banks, want one", len(a.Banks))
	}
	bank, err := bankOf(a.Banks[0].Hash)
	if err != nil {
		return err
	}
	selected := a.Banks[0].PCRs
	if len(selected) == 0 {
		return fault.New("tpm_pcr_none", "the quote selects no register")
	}
	if !slices.EqualFunc(given, selected, func(p attest.PCR, i uint32) bool { return p.Index == i }) {
		return fault.New("tpm_pcr_selection", "the quote selects registers %d, the %d values given are not those in that order", selected, len(given))
	}
	h := sig.Hash.New()
	for _, p := range given {
		if p.Algorithm != string(bank) {
			return fault.New("tpm_pcr_algorithm", "PCR %d is said to be of bank %.16q, the quote is of %s", p.Index, p.Algorithm, bank)
		}
		if len(p.Value) != bank.Size() {
			return fault.New("tpm_pcr_length", "PCR %d has %d bytes, want %d", p.Index, len(p.Value), bank.Size())
		}
		h.Write(p.Value)
	}
	if !bytes.Equal(h.Sum(nil), a.PCRDigest) {
		return fault.New("tpm_pcr_digest", "the quote's digest is not that of the register values given")
	}
	return nil
}

// Replay compares a quote's event log with its register values: each register that
// has events must hold what they extend, from zero. It returns the registers that
// the log explains and those without any event, ascending as quoted; of the latter,
// nothing says how they came to their values. It verifies no signature. Codes:
// tpm_log_size for more than 10000 events; tpm_log_pcr for an event of a register
// that is not quoted, which nothing could contradict; tpm_log_digest for a digest
// that is not of the register's length; tpm_log_mismatch.
func Replay(q *attest.TPMQuote) (explained, unexplained []uint32, err error) {
	if len(q.EventLog) > eventlog.MaxEvents {
		return nil, nil, fault.New("tpm_log_size", "%d events in the TPM's log, more than %d", len(q.EventLog), eventlog.MaxEvents)
	}
	replayed := map[uint32][]byte{}
	for _, p := range q.PCRs {
		replayed[p.Index] = nil
	}
	for i, e := range q.EventLog {
		register, quoted := replayed[e.Index]
		at := slices.IndexFunc(q.PCRs, func(p attest.PCR) bool { return p.Index == e.Index })
		if !quoted {
			return nil, nil, fault.New("tpm_log_pcr", "event %d of the TPM's log is of PCR %d, which the quote does not cover", i, e.Index)
		}
		bank := eventlog.Bank(q.PCRs[at].Algorithm)
		if bank.Size() == 0 || len(e.Digest) != bank.Size() {
			return nil, nil, fault.New("tpm_log_digest", "event %d of the TPM's log has a digest of %d bytes, PCR %d is of bank %.16q", i, len(e.Digest), e.Index, string(bank))
		}
		if register == nil {
			register = make([]byte, bank.Size())
		}
		replayed[e.Index] = bank.Sum(append(register, e.Digest...))
	}
	for _, p := range q.PCRs {
		switch value := replayed[p.Index]; {
		case value == nil:
			unexplained = append(unexplained, p.Index)
		case !bytes.Equal(value, p.Value):
			return nil, nil, fault.New("tpm_log_mismatch", "the log's events of PCR %d lead to %x, the quote says %x", p.Index, value, p.Value)
		default:
			explained = append(explained, p.Index)
		}
	}
	return explained, unexplained, nil
}

// Events returns the digests of a firmware's log that were extended into the given
// registers of one bank, in the form that goes with a quote. The code is log_bank
// when an event has no digest of the bank.
func Events(log *eventlog.TPMLog, bank eventlog.Bank, pcrs ...uint32) ([]attest.PCREvent, error) {
	var out []attest.PCREvent
	for i, e := range log.Events {
		if !slices.Contains(pcrs, e.PCR) {
			continue
		}
		digest := e.Digest(bank)
		if digest == nil {
			return nil, fault.New("log_bank", "event %d of the TPM event log has no digest of bank %.16q", i, string(bank))
		}
		out = append(out, attest.PCREvent{Index: e.PCR, Digest: digest})
	}
	return out, nil
}

func clonePCRs(pcrs []attest.PCR) []attest.PCR {
	out := make([]attest.PCR, len(pcrs))
	for i, p := range pcrs {
		out[i] = attest.PCR{Index: p.Index, Algorithm: p.Algorithm, Value: bytes.Clone(p.Value)}
	}
	return out
}
