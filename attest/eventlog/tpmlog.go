// SPDX-License-Identifier: Apache-2.0

package eventlog

import (
	"crypto/sha256"
	"crypto/sha512"

	"github.com/dstack-go/dstack/internal/fault"
)

// Bank is a hash algorithm of PCRs as TPM evidence spells it.
type Bank string

// The banks that a log can be replayed for. SHA-1 is none of them.
const (
	BankSHA256 Bank = "sha256"
	BankSHA384 Bank = "sha384"
)

// Sum returns the bank's digest of data, or nil for a bank that is not known.
func (b Bank) Sum(data []byte) []byte {
	switch b {
	case BankSHA256:
		d := sha256.Sum256(data)
		return d[:]
	case BankSHA384:
		d := sha512.Sum384(data)
		return d[:]
	}
	return nil
}

// Size returns the bytes of one register of the bank: 32, 48, or 0 for a bank that
// is not known.
func (b Bank) Size() int { return map[Bank]int{BankSHA256: 32, BankSHA384: 48}[b] }

// algorithm is the bank's number in the TCG Algorithm Registry.
func (b Bank) algorithm() uint16 { return map[Bank]uint16{BankSHA256: 0xB, BankSHA384: tcgSHA384}[b] }

const (
	evNoAction     = 3 // EV_NO_ACTION: informs, extends nothing
	specIDHeader   = "Spec ID Event03\x00"
	localityHeader = "StartupLocality\x00"
	maxPCR         = 23
)

// TPMLog is a firmware event log for a TPM.
type TPMLog struct {
	// PlatformClass is 0 for a client, 1 for a server.
	PlatformClass uint32
	// StartupLocality is the last byte of PCR 0 at power on: 0, 3 or 4.
	StartupLocality uint8
	Events          []TPMEvent
}

// TPMEvent is one entry of such a log. Only its digests have been extended; the
// type and the data are what firmware says about them.
type TPMEvent struct {
	PCR  uint32
	Type uint32
	Data []byte

	digests []tcgDigest
}

// Digest returns what the event extended into its PCR of a bank, or nil when the
// log does not tell.
func (e TPMEvent) Digest(b Bank) []byte {
	for _, d := range e.digests {
		if d.algorithm == b.algorithm() {
			return d.value
		}
	}
	return nil
}

// ParseTPMLog reads a log of the crypto agile form, as Linux has it in
// /sys/kernel/security/tpm0/binary_bios_measurements (TCG PC Client Platform
// Firmware Profile §10, little-endian; attestation.md §3.2). It ends with the file.
// Every record has a digest of every algorithm that the log's head declares.
// Events of type EV_NO_ACTION are left out. Codes: log_too_large,
// log_malformed.
func ParseTPMLog(data []byte) (*TPMLog, error) {
	if len(data) > MaxCCEL {
		return nil, fault.New("log_too_large", "TPM event log of %d bytes exceeds %d", len(data), MaxCCEL)
	}
	r := reader{data: data}
	pcr, typ := r.u32(), r.u32()
	r.take(20)
	head := r.take(int64(r.u32()))
	if r.err != nil {
		return nil, r.err
	}
	if pcr != 0 || typ != evNoAction {
		return nil, fault.New("log_malformed", "TPM event log begins with an event of type %#x in PCR %d, not with its specification", typ, pcr)
	}
	log := &TPMLog{}
	algorithms, err := log.parseSpecID(head)
	if err != nil {
		return nil, err
	}
	for n := 0; r.off < int64(len(data)); n++ {
		if n == MaxEvents {
			return nil, fault.New("log_too_large", "TPM event log has more than %d events", MaxEvents)
		}
		rec := r.record(r.u32(), n, algorithms)
		if r.err != nil {
			return nil, r.err
		}
		if err := log.add(rec, n); err != nil {
			return nil, err
		}
	}
	return log, nil
}

// parseSpecID reads a TCG_EfiSpecIDEvent: signature, platform class u32, four bytes
// of version, count u32, {algorithm u16, size u16}…, vendor length u8, vendor data.
func (l *TPMLog) parseSpecID(head []byte) (algorithms []uint16, err error) {
	r := reader{data: head}
	if signature := r.take(16); r.err != nil || string(signature) != specIDHeader {
		return nil, fault.New("log_malformed", "TPM event log is not of the crypto agile form")
	}
	l.PlatformClass = r.u32()
	r.take(4)
	count := r.u32()
	if r.err == nil && (count == 0 || count > maxDigests) {
		return nil, fault.New("log_malformed", "TPM event log declares %d algorithms, want 1 to %d", count, maxDigests)
	}
	for i := uint32(0); i < count && r.err == nil; i++ {
		algorithm, size := r.u16(), r.u16()
		if want, ok := tcgDigestSize[algorithm]; r.err == nil && (!ok || want != int(size)) {
			return nil, fault.New("log_malformed", "TPM event log declares algorithm %#x with digests of %d bytes", algorithm, size)
		}
		algorithms = append(algorithms, algorithm)
	}
	vendor := r.take(1)
	if r.err == nil {
		r.take(int64(vendor[0]))
	}
	return algorithms, r.err
}

// add appends a record that extended a PCR, or heeds one that only informs.
func (l *TPMLog) add(rec tcgRecord, n int) error {
	if rec.typ == evNoAction {
		// TCG_EfiStartupLocalityEvent, which stands before anything extends PCR 0.
		if rec.register == 0 && len(rec.data) == len(localityHeader)+1 && string(rec.data[:16]) == localityHeader && len(l.Events) == 0 {
			l.StartupLocality = rec.data[16]
		}
		return nil
	}
	if rec.register > maxPCR {
		return fault.New("log_malformed", "firmware event %d extends register %d", n, rec.register)
	}
	l.Events = append(l.Events, TPMEvent{PCR: rec.register, Type: rec.typ, Data: rec.data, digests: rec.digests})
	return nil
}

// Replay returns the value that a PCR has after the log's events. The code is
// log_bank when the log has no digests of that bank.
func (l *TPMLog) Replay(b Bank, pcr uint32) ([]byte, error) {
	register := make([]byte, b.Size())
	if pcr == 0 && len(register) > 0 {
		register[len(register)-1] = l.StartupLocality
	}
	for i, e := range l.Events {
		if e.PCR != pcr {
			continue
		}
		digest := e.Digest(b)
		if digest == nil {
			return nil, fault.New("log_bank", "event %d of the TPM event log has no digest of bank %.16q", i, string(b))
		}
		register = b.Sum(append(register, digest...))
	}
	if len(register) == 0 {
		return nil, fault.New("log_bank", "%.16q is not a bank that can be replayed", string(b))
	}
	return register, nil
}
