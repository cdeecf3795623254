// SPDX-License-Identifier: Apache-2.0

package sevsnp

import (
	"crypto/x509/pkix"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/internal/fault"
)

// judge says why a genuine report is not acceptable nonetheless: the guest is open
// to the host, or what the guest's policy demands of the platform, or the firmware
// of itself, does not hold (threats.md A05, B01). Single socket, CXL, AES-256-XTS
// and page swapping have no counterpart in PLATFORM_INFO: the firmware enforces
// them, and the caller's policy reads them from the claims.
func judge(r *Report, opt attest.Options) error {
	demands := func(policy, platform uint64) bool {
		return r.Policy&policy != 0 && r.PlatformInfo&platform == 0
	}
	abi := uint16(r.Policy & policyABI)
	switch current := uint16(r.Current.Major)<<8 | uint16(r.Current.Minor); {
	case r.Policy&PolicyDebug != 0 && !opt.AllowDebug:
		return fault.New("snp_debug", "the guest policy allows debugging: the host can read its memory")
	case r.Policy&PolicyMigrateMA != 0 && !opt.SNPAllowMigration:
		return fault.New("snp_migration", "the guest policy allows a migration agent, which may copy the VM elsewhere")
	case r.VMPL != 0:
		return fault.New("snp_vmpl", "the report was asked for at VMPL %d, want 0: less privileged software speaks for the VM", r.VMPL)
	case r.Policy&^policyKnown != 0:
		return fault.New("snp_policy_unknown", "the guest policy %#x has bits that are not known here", r.Policy)
	case abi > current:
		return fault.New("snp_abi_version", "the guest policy demands firmware ABI %d.%d, the platform has %d.%d", abi>>8, abi&0xff, r.Current.Major, r.Current.Minor)
	case r.Policy&PolicySMT == 0 && r.PlatformInfo&PlatformSMT != 0:
		return fault.New("snp_smt", "the guest policy forbids SMT, the platform has it on")
	case demands(PolicyRAPLDisabled, PlatformRAPLDisabled):
		return fault.New("snp_rapl", "the guest policy demands that power metering (RAPL) is off, the platform has it on")
	case demands(PolicyCiphertextHiding, PlatformCiphertextHiding):
		return fault.New("snp_ciphertext_hiding", "the guest policy demands ciphertext hiding, the platform has it off")
	case (r.KeyInfo&keyAuthor != 0) != (r.AuthorKeyDigest != [48]byte{}):
		return fault.New("snp_author_key", "KEY_INFO %#x and the author key digest disagree on whether there is an author key", r.KeyInfo)
	case r.KeyInfo&keyAuthor != 0 && r.IDKeyDigest == [48]byte{}:
		return fault.New("snp_id_key", "there is an author key, but no ID key that it could have signed")
	case !noneAbove(r.CommittedTCB, r.CurrentTCB):
		return fault.New("snp_tcb_committed", "committed TCB %#016x is above the current %#016x", r.CommittedTCB, r.CurrentTCB)
	case !noneAbove(r.ReportedTCB, r.CurrentTCB):
		return fault.New("snp_tcb_reported", "reported TCB %#016x is above the current %#016x", r.ReportedTCB, r.CurrentTCB)
	case r.Committed.number() > r.Current.number():
		return fault.New("snp_version_committed", "committed firmware %v is newer than the current %v", r.Committed, r.Current)
	}
	return nil
}

// number orders firmware versions.
func (f Firmware) number() uint32 {
	return uint32(f.Major)<<16 | uint32(f.Minor)<<8 | uint32(f.Build)
}

func isCritical(e pkix.Extension) bool { return e.Critical }
