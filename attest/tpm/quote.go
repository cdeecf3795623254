// SPDX-License-Identifier: Apache-2.0

// Package tpm verifies TPM 2.0 quotes: that a TPM whose attestation key a trusted
// authority certifies signed these register values and this qualifying data.
//
// [Verify] is pure: it opens no URL, least of all one that a certificate names; all
// certificates and revocation lists come from the collateral. Everything in
// [attest.TPMQuote] is attacker-controlled, and so is the collateral; only what the
// signature covers and what agrees with it gets into the claims.
//
// What a quote proves depends on who certified the key. The authority vouches that
// the key is restricted, that is, signs nothing but what the TPM made; nothing in
// the quote shows it. A quote alone does not say on which machine, or inside which
// VM, the TPM is: for Google Cloud see [CheckGCP] and what it leaves open.
//
// Formats: TCG TPM 2.0 Library, Part 2 (structures, all integers big-endian).
// Specification: attestation.md §8.2.
package tpm

import (
	"encoding/binary"
	"math/bits"

	"github.com/dstack-go/dstack/internal/fault"
)

// Numbers of the TCG Algorithm Registry.
const (
	AlgSHA1   uint16 = 0x0004
	AlgSHA256 uint16 = 0x000B
	AlgSHA384 uint16 = 0x000C
	AlgRSASSA uint16 = 0x0014
	AlgRSAPSS uint16 = 0x0016
	AlgECDSA  uint16 = 0x0018
)

const (
	magicGenerated = 0xff544347 // TPM_GENERATED_VALUE
	tagQuote       = 0x8018     // TPM_ST_ATTEST_QUOTE
)

// Limits in bytes (threats.md B15), and counts.
const (
	MaxMessage   = 1 << 10
	MaxSignature = 1 << 10
	maxName      = 2 + 64 // TPM2B_NAME: algorithm and SHA-512
	maxExtraData = 2 + 64 // TPM2B_DATA: sizeof(TPMT_HA)
	maxDigest    = 64
	maxBanks     = 8
	maxSelect    = 4 // bytes of one PCR bitmap; TPMs have 24 PCRs, 3 bytes
)

// Attest is a TPMS_ATTEST structure of type TPM_ST_ATTEST_QUOTE: what a TPM signs.
type Attest struct {
	// QualifiedSigner is the qualified name of the key: nameAlg (2 bytes) and a hash
	// over the key's public area and those of its parents.
	QualifiedSigner []byte
	ExtraData       []byte // qualifying data of the caller, at most 66 bytes
	Clock           uint64 // milliseconds
	ResetCount      uint32
	RestartCount    uint32
	Safe            bool // the clock has not gone backwards
	FirmwareVersion uint64
	Banks           []Selection
	PCRDigest       []byte // over the selected values, with the hash of the signature
}

// Selection is a TPMS_PCR_SELECTION: registers of one bank, ascending.
type Selection struct {
	Hash uint16 // such as AlgSHA256
	PCRs []uint32
}

// ParseAttest reads a TPMS_ATTEST of at most 1 KiB that holds a quote; nothing may
// follow it. Codes: tpm_message_malformed; tpm_magic for something that no TPM
// made; tpm_type for another attestation, such as of a key or of the time.
func ParseAttest(message []byte) (*Attest, error) {
	if len(message) > MaxMessage {
		return nil, fault.New("tpm_message_malformed", "TPM message of %d bytes exceeds %d", len(message), MaxMessage)
	}
	r := reader{what: "TPM message", code: "tpm_message_malformed", data: message}
	if magic := r.u32(); r.err == nil && magic != magicGenerated {
		return nil, fault.New("tpm_magic", "TPM message begins with %08x, not with %08x: a TPM did not make it", magic, uint32(magicGenerated))
	}
	if tag := r.u16(); r.err == nil && tag != tagQuote {
		return nil, fault.New("tpm_type", "TPM message is an attestation of type %#x, want a quote (%#x)", tag, tagQuote)
	}
	a := &Attest{
		QualifiedSigner: r.sized("qualified signer", maxName),
		ExtraData:       r.sized("extra data", maxExtraData),
		Clock:           r.u64(),
		ResetCount:      r.u32(),
		RestartCount:    r.u32(),
	}
	safe := r.u8()
	if r.err == nil && safe > 1 {
		r.fail("TPMI_YES_NO is %d", safe)
	}
	a.Safe = safe == 1
	a.FirmwareVersion = r.u64()
	count := r.u32()
	if r.err == nil && count > maxBanks {
		r.fail("%d PCR selections, more than %d", count, maxBanks)
	}
	for i := uint32(0); i < count && r.err == nil; i++ {
		a.Banks = append(a.Banks, r.selection())
	}
	a.PCRDigest = r.sized("PCR digest", maxDigest)
	if err := r.end(); err != nil {
		return nil, err
	}
	return a, nil
}

// selection reads hash u16, size u8 and a bitmap, lowest register in the lowest bit
// of the first byte.
func (r *reader) selection() Selection {
	s := Selection{Hash: r.u16()}
	size := r.u8()
	if r.err == nil && size > maxSelect {
		r.fail("a PCR bitmap of %d bytes, more than %d", size, maxSelect)
	}
	for i, b := range r.take(int(size)) {
		for ; b != 0; b &= b - 1 {
			s.PCRs = append(s.PCRs, uint32(8*i+bits.TrailingZeros8(b)))
		}
	}
	return s
}

// reader consumes big-endian fields; after a failure it returns zeros and keeps the
// first error.
type reader struct {
	what, code string
	data       []byte
	err        error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fault.New(r.code, r.what+": "+format, args...)
	}
}

func (r *reader) take(n int) []byte {
	if n > len(r.data) {
		r.fail("ends %d bytes early", n-len(r.data))
	}
	if r.err != nil {
		return nil
	}
	b := r.data[:n:n]
	r.data = r.data[n:]
	return b
}

// sized reads a TPM2B: length u16 and that many bytes, at most max.
func (r *reader) sized(name string, max int) []byte {
	n := int(r.u16())
	if r.err == nil && n > max {
		r.fail("%s of %d bytes, more than %d", name, n, max)
	}
	return r.take(n)
}

func (r *reader) u8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// end returns the first error; bytes that are left are one.
func (r *reader) end() error {
	if r.err == nil && len(r.data) > 0 {
		r.fail("%d bytes follow it", len(r.data))
	}
	return r.err
}
