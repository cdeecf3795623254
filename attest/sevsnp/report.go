// SPDX-License-Identifier: Apache-2.0

// Package sevsnp reads and verifies AMD SEV-SNP attestation reports.
//
// [ParseReport] turns hostile bytes into a typed report; it proves nothing.
// [Verify] establishes at a stated time who signed it: the report's signature, the
// chain from the chip's key (VCEK) or the cloud provider's (VLEK) over AMD's
// intermediate to a root that the caller trusts, AMD's revocation list, and that
// the certificate was issued for this very chip and this very TCB. Then it judges
// the guest's policy against the platform. Every refusal has its own code. Report,
// certificates and collateral are attacker-controlled; a root certificate among
// them is never trusted. It opens no socket, reads no clock, and uses the standard
// library only, so that the same code runs in a browser.
//
// Two things it does not say. A consistent report of old firmware is UpToDate:
// only a policy on Claims.SNP.Parts, which AMD certified, sets a floor. And SEV-SNP
// has no runtime register: nothing that happened after launch is proved
// (threats.md B19).
//
// Specification: attestation.md §8.1 and Field notes; AMD 56860 "SEV Secure Nested
// Paging Firmware ABI" (report, policy), AMD 57230 "VCEK Certificate and KDS
// Interface" (certificates), AMD 56421 "GHCB" (certificate table); threats.md A03,
// A04, A05, B01, B02, B07.
package sevsnp

import (
	"bytes"
	"encoding/binary"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// ReportSize is the size of an attestation report in bytes.
const ReportSize = 1184

// Layout of the report (AMD 56860, table ATTESTATION_REPORT); numbers are
// little-endian.
const (
	signedSize    = 0x2a0 // what the signature covers
	offSignature  = 0x2a0
	scalarSize    = 72 // r and s, little-endian, zero-extended
	algorithmP384 = 1  // ECDSA P-384 with SHA-384
)

// Bits of the guest policy, which the host states at launch and the firmware
// enforces from then on.
const (
	PolicySMT              uint64 = 1 << 16 // may run where SMT is on
	PolicyReservedOne      uint64 = 1 << 17 // must be one
	PolicyMigrateMA        uint64 = 1 << 18 // a migration agent may be bound
	PolicyDebug            uint64 = 1 << 19 // the host may read the memory
	PolicySingleSocket     uint64 = 1 << 20
	PolicyCXLAllow         uint64 = 1 << 21 // may have CXL memory and devices
	PolicyMemAES256XTS     uint64 = 1 << 22 // memory encryption must be AES-256-XTS
	PolicyRAPLDisabled     uint64 = 1 << 23 // power metering (RAPL) must be off
	PolicyCiphertextHiding uint64 = 1 << 24 // of DRAM, must be on
	PolicyPageSwapDisable  uint64 = 1 << 25 // the host may not move or swap pages

	policyABI   = 0xffff // least firmware ABI version: minor in bits 7:0, major in 15:8
	policyKnown = 1<<26 - 1
)

// Bits of PLATFORM_INFO. Firmware defines new ones without a new report version,
// so unknown bits are no error.
const (
	PlatformSMT              uint64 = 1 << 0
	PlatformTSME             uint64 = 1 << 1
	PlatformECC              uint64 = 1 << 2
	PlatformRAPLDisabled     uint64 = 1 << 3
	PlatformCiphertextHiding uint64 = 1 << 4
	PlatformAliasChecked     uint64 = 1 << 5 // memory aliasing looked for since reset, none found (threats.md A03)
	PlatformTIO              uint64 = 1 << 7
)

// Bits of KEY_INFO, and values of the signing key in its bits 4:2.
const (
	keyAuthor = 1 << 0
	keyKnown  = 1<<5 - 1 // bit 1: MASK_CHIP_KEY, on which nothing here depends

	signerVCEK = 0
	signerVLEK = 1
	signerNone = 7
)

// Firmware is a version of the SEV firmware.
type Firmware struct {
	Build, Minor, Major uint8
}

// Report is a parsed, unverified attestation report. Byte arrays are in memory
// order; TCB versions are the report's 64 bits read little-endian, see [Parts].
type Report struct {
	Version         uint32 // 2 to 5
	GuestSVN        uint32
	Policy          uint64
	FamilyID        [16]byte
	ImageID         [16]byte
	VMPL            uint32
	Algorithm       uint32 // 1: ECDSA P-384 with SHA-384
	CurrentTCB      uint64
	PlatformInfo    uint64
	KeyInfo         uint32
	ReportData      dstack.ReportData
	Measurement     dstack.Measurement
	HostData        [32]byte
	IDKeyDigest     [48]byte
	AuthorKeyDigest [48]byte
	ReportID        [32]byte
	ReportIDMA      [32]byte
	ReportedTCB     uint64
	CPUID           [3]byte // family, model, stepping; zero in version 2
	ChipID          [64]byte
	CommittedTCB    uint64
	Current         Firmware
	Committed       Firmware
	LaunchTCB       uint64
	LaunchMitVector uint64 // version 4 and later
	MitVector       uint64 // version 4 and later
	R, S            [scalarSize]byte
}

// parts lists the fields in order, with the reserved bytes between them.
func (r *Report) parts(field func(any), reserved func(n int)) {
	for _, f := range []any{
		&r.Version, &r.GuestSVN, &r.Policy, &r.FamilyID, &r.ImageID, &r.VMPL, &r.Algorithm,
		&r.CurrentTCB, &r.PlatformInfo, &r.KeyInfo,
	} {
		field(f)
	}
	reserved(4)
	for _, f := range []any{
		&r.ReportData, &r.Measurement, &r.HostData, &r.IDKeyDigest, &r.AuthorKeyDigest,
		&r.ReportID, &r.ReportIDMA, &r.ReportedTCB, &r.CPUID,
	} {
		field(f)
	}
	reserved(21)
	field(&r.ChipID)
	field(&r.CommittedTCB)
	field(&r.Current)
	reserved(1)
	field(&r.Committed)
	reserved(1)
	for _, f := range []any{&r.LaunchTCB, &r.LaunchMitVector, &r.MitVector} {
		field(f)
	}
	reserved(offSignature - 0x208)
	field(&r.R)
	field(&r.S)
	reserved(ReportSize - offSignature - 2*scalarSize)
}

// Marshal returns the report's bytes.
func (r *Report) Marshal() []byte {
	b := make([]byte, 0, ReportSize)
	r.parts(func(f any) {
		b, _ = binary.Append(b, binary.LittleEndian, f) // sizes are fixed: cannot fail
	}, func(n int) { b = append(b, make([]byte, n)...) })
	return b
}

// ParseReport reads a report of exactly [ReportSize] bytes. Codes: report_size,
// report_version, report_reserved (a reserved byte or bit is not zero),
// report_algorithm, snp_policy_reserved (bit 17 of the policy is not one).
func ParseReport(data []byte) (*Report, error) {
	if len(data) != ReportSize {
		return nil, fault.New("report_size", "SEV-SNP report has %d bytes, want %d", len(data), ReportSize)
	}
	r := &Report{}
	at, bad := 0, -1
	r.parts(func(f any) {
		n, _ := binary.Decode(data[at:], binary.LittleEndian, f) // sizes are fixed and sum to ReportSize
		at += n
	}, func(n int) {
		at += n
		if rest := bytes.TrimLeft(data[at-n:at], "\x00"); len(rest) > 0 && bad < 0 {
			bad = at - len(rest)
		}
	})
	switch {
	case r.Version < 2 || r.Version > 5:
		return nil, fault.New("report_version", "SEV-SNP report has version %d, want 2 to 5", r.Version)
	case bad >= 0:
		return nil, fault.New("report_reserved", "SEV-SNP report: reserved byte %#x is not zero", bad)
	case r.Version == 2 && r.CPUID != [3]byte{}:
		return nil, fault.New("report_reserved", "SEV-SNP report of version 2 has a CPUID %x, which came with version 3", r.CPUID)
	case r.Version < 4 && r.LaunchMitVector|r.MitVector != 0:
		return nil, fault.New("report_reserved", "SEV-SNP report of version %d has mitigation vectors, which came with version 4", r.Version)
	case r.KeyInfo&^keyKnown != 0:
		return nil, fault.New("report_reserved", "SEV-SNP report: reserved bits of KEY_INFO %#x are not zero", r.KeyInfo)
	case r.Algorithm != algorithmP384:
		return nil, fault.New("report_algorithm", "SEV-SNP report has signature algorithm %d, want %d (ECDSA P-384 with SHA-384)", r.Algorithm, algorithmP384)
	case r.Policy&PolicyReservedOne == 0:
		return nil, fault.New("snp_policy_reserved", "guest policy %#x: bit 17 must be one", r.Policy)
	}
	return r, nil
}

func (r *Report) signer() uint32 { return r.KeyInfo >> 2 & 7 }
