// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Policy is what a relying party accepts. The zero value denies everything. Its
// JSON is what `dstack verify --policy` reads (TOML has the same keys); see
// docs/policy.md.
type Policy struct {
	// Scope is workload when empty. A policy of scope signature judges signature,
	// chain and collateral alone.
	Scope string `json:"scope,omitempty"`

	// TEEs are the kinds accepted; empty accepts every kind.
	TEEs []dstack.TEE `json:"tees,omitempty"`

	TCB        TCBPolicy      `json:"tcb,omitzero"`
	Advisories AdvisoryPolicy `json:"advisories,omitzero"`

	// Devices, when not empty, are the only machines accepted (A01), by the device id
	// that a verdict's platform shows.
	Devices []dstack.DeviceID `json:"devices,omitempty"`

	// Registers are values to expect of registers by the vendors' names, as the
	// claims spell them (measurement, rim, mrtd, pcr4 …): each must have one of its
	// values. Where they pin everything that a TEE measures of a launch, they anchor
	// the OS image.
	Registers map[string][]collateral.Hex `json:"registers,omitempty"`

	TDX      TDXPolicy      `json:"tdx,omitzero"`
	SNP      SNPPolicy      `json:"snp,omitzero"`
	CCA      CCAPolicy      `json:"cca,omitzero"`
	GCP      GCPPolicy      `json:"gcp,omitzero"`
	GPU      GPUPolicy      `json:"gpu,omitzero"`
	Image    ImagePolicy    `json:"image,omitzero"`
	Workload WorkloadPolicy `json:"workload,omitzero"`
	Evidence EvidencePolicy `json:"evidence,omitzero"`
	Gateway  GatewayPolicy  `json:"gateway,omitzero"`

	Governance GovernancePolicy `json:"governance,omitzero"`

	// AllowDebug accepts a VM whose memory the host can read.
	AllowDebug bool `json:"allow_debug,omitempty"`

	// AllowMissingCRL accepts certificates of SEV-SNP and TPM whose revocation could
	// not be checked because there was no list (B02).
	AllowMissingCRL bool `json:"allow_missing_crl,omitempty"`

	// Floor is the highest TCBEvaluation that the caller has seen of this very
	// product (B03); evidence of a lower one is refused. No file can say it.
	Floor uint32 `json:"-"`

	// DevRoots lets roots of development trust count. Evidence under them proves
	// nothing about hardware. No file can say it: only the caller who adds such roots.
	DevRoots bool `json:"-"`
}

// TCBPolicy judges how current a platform is.
type TCBPolicy struct {
	// Accept are the statuses that are good enough, in Intel's words, such as
	// UpToDate. Empty denies all. Platforms that tell none have NotReported, which
	// counts only by name (B18).
	Accept []string `json:"accept,omitempty"`

	// GraceDays accepts OutOfDate, SWHardeningNeeded and the configuration statuses
	// too, for so many days after the publication date of the platform's TCB level.
	GraceDays int `json:"grace_days,omitempty"`

	// MinEvaluation is the least evaluation data number of TDX collateral: a floor
	// against older, still unexpired statements (B03).
	MinEvaluation uint32 `json:"min_evaluation,omitempty"`
}

// AdvisoryPolicy judges the advisories that apply to a platform.
type AdvisoryPolicy struct {
	// Deny refuses a platform to which one of them applies.
	Deny []string `json:"deny,omitempty"`
	// Accept, when not empty, are the only advisories that may apply.
	Accept []string `json:"accept,omitempty"`
}

// TDXPolicy is about Intel TDX.
type TDXPolicy struct {
	// DenyFMSPC refuses processor families, AllowFMSPC, when not empty, accepts no
	// others: 12 lowercase hexadecimal digits each (A02).
	DenyFMSPC  []string `json:"deny_fmspc,omitempty"`
	AllowFMSPC []string `json:"allow_fmspc,omitempty"`
	// Attributes are TD attributes accepted beside SEPT_VE_DISABLE: pks, kl, perfmon (A06).
	Attributes []string `json:"attributes,omitempty"`
	// MinModuleSVN is the least security version of the TDX module (A06).
	MinModuleSVN uint8 `json:"min_module_svn,omitempty"`
}

// SNPPolicy is about AMD SEV-SNP.
type SNPPolicy struct {
	// Products are those accepted. Empty means Genoa and Turin: keys of Milan were
	// extracted by software alone, so its reports prove nothing about firmware (A04).
	Products []string `json:"products,omitempty"`
	// MinTCB is the least certified TCB, by product (A05).
	MinTCB map[string]attest.SNPParts `json:"min_tcb,omitempty"`
	// AllowNoAliasCheck accepts a platform that did not check its memory for aliases
	// at boot (A03).
	AllowNoAliasCheck bool `json:"allow_no_alias_check,omitempty"`
	// AllowVLEK accepts reports signed by a key that a cloud provider, not the chip,
	// holds.
	AllowVLEK bool `json:"allow_vlek,omitempty"`
	// RequireSMTOff and RequireCiphertextHiding demand what the guest's policy
	// otherwise leaves to the host (A05, A08).
	RequireSMTOff           bool `json:"require_smt_off,omitempty"`
	RequireCiphertextHiding bool `json:"require_ciphertext_hiding,omitempty"`
	// AllowMigration accepts a guest policy that admits a migration agent.
	AllowMigration bool `json:"allow_migration,omitempty"`
}

// CCAPolicy is about Arm CCA.
type CCAPolicy struct {
	// Implementations, when not empty, are the only implementation ids accepted.
	Implementations []collateral.Hex `json:"implementations,omitempty"`
	// Components, when not empty, are the only measurements of platform firmware
	// accepted; every component must be among them.
	Components []collateral.Hex `json:"components,omitempty"`
}

// GCPPolicy is about TDX on Google Cloud, where a vTPM measures the boot. The zero
// value accepts no image.
type GCPPolicy struct {
	// Firmware are the values of PCR 0 accepted, 32 bytes each.
	Firmware []collateral.Hex `json:"firmware,omitempty"`
	// PartitionTables are the digests accepted of the boot disk's partition table.
	// AnyPartitionTable accepts any: a loader measured in its place may then have
	// changed the image after it was measured.
	PartitionTables   []collateral.Hex `json:"partition_tables,omitempty"`
	AnyPartitionTable bool             `json:"any_partition_table,omitempty"`
}

// GPUPolicy is about NVIDIA GPUs that the guest attested at boot. The zero value
// judges none.
type GPUPolicy struct {
	// Devices is how many there must be, no more and no fewer; 0 judges none.
	Devices int `json:"devices,omitempty"`
	// UEIDs, when not empty, are the only GPUs accepted.
	UEIDs []string `json:"ueids,omitempty"`
	// Nonce is what the GPUs must have signed, 32 bytes; BootNonce accepts one that
	// the guest chose.
	Nonce     collateral.Hex `json:"nonce,omitempty"`
	BootNonce bool           `json:"boot_nonce,omitempty"`

	AllowDevTools     bool `json:"allow_devtools,omitempty"`
	AllowDebug        bool `json:"allow_debug,omitempty"`
	AllowInsecureBoot bool `json:"allow_insecure_boot,omitempty"`
}

// ImagePolicy is about the OS image.
type ImagePolicy struct {
	// AllowDev accepts a development image under production roots (D12).
	AllowDev bool `json:"allow_dev,omitempty"`
	// AllowUnanchored accepts an image that only the guest itself vouches for (B10).
	AllowUnanchored bool `json:"allow_unanchored,omitempty"`
	// AllowLite accepts a launch whose ACPI tables are as the event log says (D01):
	// upstream's lite form, and VM shapes for which no tables can be computed.
	AllowLite bool `json:"allow_lite,omitempty"`
	// MinEpoch is the least security epoch of the image (D11).
	MinEpoch int `json:"min_epoch,omitempty"`
}

// WorkloadPolicy is about the app; it adds to what the caller's references say.
type WorkloadPolicy struct {
	ComposeHashes []dstack.ComposeHash `json:"compose_hashes,omitempty"` // any one of these
	AppID         *dstack.AppID        `json:"app_id,omitempty"`
	InstanceID    *dstack.InstanceID   `json:"instance_id,omitempty"`
	ImageHashes   []dstack.ImageHash   `json:"os_image_hashes,omitempty"` // any one of these
	// AllowUnpinnedImages accepts a manifest without image_policy "digest", whose tags
	// may stand for other images tomorrow (J01).
	AllowUnpinnedImages bool `json:"allow_unpinned_images,omitempty"`
	// AllowMutable accepts a compose file whose containers could change what runs after
	// it was measured: by the engine's socket, privileges, or the guest's own files (J02).
	AllowMutable bool `json:"allow_mutable,omitempty"`
	// AllowUncommitted accepts a launch that committed to no configuration (MRCONFIGID
	// or PCR 8 all zero), as older upstream hosts start guests (B11).
	AllowUncommitted bool `json:"allow_uncommitted,omitempty"`
}

// GatewayPolicy is about a gateway at which TLS ends (C05). What it does not say, the
// rest of the policy says of app and gateway alike.
type GatewayPolicy struct {
	// AllowTermination accepts that a gateway ends TLS, which then sees and could change
	// all that is said. It must show evidence of itself and be an expected one all the same.
	AllowTermination bool `json:"allow_termination,omitempty"`
	// Workload, Registers and Devices are as those of the app.
	Workload  WorkloadPolicy              `json:"workload,omitzero"`
	Registers map[string][]collateral.Hex `json:"registers,omitempty"`
	Devices   []dstack.DeviceID           `json:"devices,omitempty"`
	// Floor is as that of the policy, of the gateway's product.
	Floor uint32 `json:"-"`
}

// EvidencePolicy is about age and freshness.
type EvidencePolicy struct {
	// RequireFresh refuses evidence that does not answer the caller's own nonce or
	// report data.
	RequireFresh bool `json:"require_fresh,omitempty"`
	// MaxAgeSeconds refuses evidence older than that where it tells its time (Nitro
	// documents, RA-TLS certificates), and evidence that neither tells its time nor is
	// fresh. Zero sets no limit but Nitro's own, one hour.
	MaxAgeSeconds int64 `json:"max_age_seconds,omitempty"`
}

// DefaultPolicy is what `dstack verify` applies without --policy: only current
// platforms, and nothing loosened.
func DefaultPolicy() Policy {
	return Policy{TCB: TCBPolicy{Accept: []string{"UpToDate"}}}
}

// SignaturePolicy judges signature, chain and collateral alone.
func SignaturePolicy() Policy { return Policy{Scope: ScopeSignature} }

// maxPolicy bounds a policy document in bytes.
const maxPolicy = 1 << 20

// ParsePolicy reads a policy in JSON, strictly: unknown keys, hashes of other
// lengths and statuses that do not exist are errors, code policy_malformed.
func ParsePolicy(data []byte) (*Policy, error) {
	var p Policy
	if err := strictjson.Decode(data, &p, strictjson.Limits{Size: maxPolicy, Depth: 6}); err != nil {
		return nil, fault.Wrap(err, "policy_malformed", "the policy does not parse").WithFix("docs/policy.md lists the keys")
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	return &p, nil
}

func (p *Policy) check() error {
	bad := func(format string, args ...any) error {
		return fault.New("policy_malformed", "the policy: "+format, args...).WithFix("docs/policy.md lists the keys and values")
	}
	oneOf := func(values, known []string) string {
		for _, v := range values {
			found := false
			for _, k := range known {
				found = found || v == k
			}
			if !found {
				return v
			}
		}
		return ""
	}
	if bad1 := oneOf([]string{p.Scope}, []string{"", ScopeWorkload, ScopeSignature}); bad1 != "" {
		return bad("scope %q", bad1)
	}
	for _, t := range p.TEEs {
		if _, ok := tees[t]; !ok {
			return bad("tees: %q", t)
		}
	}
	if v := oneOf(p.TCB.Accept, tcbStatuses); v != "" {
		return bad("tcb.accept: %q is no status that can be accepted", v)
	}
	if v := oneOf(p.SNP.Products, snpProducts); v != "" {
		return bad("snp.products: %q", v)
	}
	for product := range p.SNP.MinTCB {
		if v := oneOf([]string{product}, snpProducts); v != "" {
			return bad("snp.min_tcb: %q", v)
		}
	}
	for _, a := range p.TDX.Attributes {
		if tdxAttributes[a] == 0 {
			return bad("tdx.attributes: %q", a)
		}
	}
	for _, f := range append(append([]string{}, p.TDX.AllowFMSPC...), p.TDX.DenyFMSPC...) {
		if !isLowerHex(f, 12) {
			return bad("an FMSPC must be 12 lowercase hexadecimal digits, not %q", f)
		}
	}
	if p.TCB.GraceDays < 0 || p.TCB.GraceDays > 3650 || p.Image.MinEpoch < 0 || p.Evidence.MaxAgeSeconds < 0 || p.Governance.MinNoticeSeconds < 0 || p.Governance.MinNoticeSeconds > 1<<31 {
		return bad("a number is negative or too large")
	}
	return nil
}

func isLowerHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// tcbStatuses are those that a policy may accept; Revoked and Unsupported are not
// among them.
var tcbStatuses = []string{
	"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
	"OutOfDate", "OutOfDateConfigurationNeeded", "TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded",
	attest.NotReported,
}

var snpProducts = []string{"Milan", "Genoa", "Turin"}

// accepts reports whether a TCB status passes, and whether only by the grace window.
func (t TCBPolicy) accepts(status string, published, at time.Time) (ok, grace bool) {
	for _, s := range t.Accept {
		if s == status {
			return true, false
		}
	}
	if t.GraceDays > 0 && status != attest.NotReported && !published.IsZero() &&
		!at.After(published.AddDate(0, 0, t.GraceDays)) {
		for _, s := range tcbStatuses {
			if s == status {
				return true, true
			}
		}
	}
	return false, false
}
