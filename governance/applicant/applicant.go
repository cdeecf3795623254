// SPDX-License-Identifier: Apache-2.0

// Package applicant turns the evidence of a machine that asks a KMS for something into
// the question that an authority answers.
//
// [Judge.Judge] verifies: the hardware's signatures and collateral, that the evidence
// is over the data that this exchange demands, that the event log replays to what the
// hardware signed and is of one boot, that no debugger can look in. What remains is a
// matter of policy — which app, manifest, image, machine and TCB status — and is in
// [Applicant.Request] for a governance.Authority, each value either vouched for by the
// hardware or marked as the guest's own word.
//
// Trusted: the roots given. Attacker-controlled: every byte of evidence and of
// vm_config; the time of RA-TLS evidence.
//
// Implements spec/kms.md §3.3 and §3.4, spec/governance.md §2; threats.md A01, B08,
// B09, D12.
package applicant

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"math"
	"slices"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/identity"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/floor"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/verifier"
)

// Evidence is what a machine showed, and what it must have been made over.
type Evidence struct {
	Container  []byte // V0 or V1 (attestation.md §7); hostile
	VMConfig   string // of the request, in place of the container's; empty: that of the container
	ReportData dstack.ReportData
	Session    bool // made for this connection, not for a key
	// BootTime counts only what was measured before the guest had keys: for requests
	// that a running app makes in the name of what booted (SignCert).
	BootTime bool
}

// Applicant is a machine whose evidence holds.
type Applicant struct {
	// Request has no Role and no Purpose yet.
	Request  governance.Request
	Info     ratls.AppInfo
	Evidence *attest.Evidence
	Claims   *attest.Claims
	Digest   [sha256.Size]byte // of the container as it came
	// Booting says that no app has run yet in the guest; Running, that one may have. Of a
	// TEE that signs no log neither is known.
	Booting, Running bool
	// ChannelKey is the SHA-256 of the SPKI that the guest's init committed to; nil: none.
	ChannelKey []byte
}

// Judge verifies evidence. It must not be changed once in use; the zero value has no
// roots and accepts nobody.
type Judge struct {
	Roots []attest.Roots
	// Development lets roots of development trust count.
	Development bool
	// Collateral is where the vendors' statements come from; required.
	Collateral collateral.Source
	// Provider is the key provider that this KMS is to its guests: root CA's key, DER
	// SubjectPublicKeyInfo. A guest whose launch committed to another has the code
	// mr_config_mismatch. Nil: no guest boots by this KMS.
	Provider []byte
	// Floor, if any, remembers the newest statements that verified, by processor family:
	// evidence that rests on older ones is refused (threats.md B03).
	Floor *floor.Store
	// Now is the clock; nil means time.Now.
	Now func() time.Time

	memo attest.Memo
}

// platform is what no authority may wave through is refused here, and what it may
// judge otherwise is let pass: it sees the values.
func (j *Judge) platform() verifier.Policy {
	p := verifier.Policy{
		TCB: verifier.TCBPolicy{Accept: []string{
			"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate",
			"OutOfDateConfigurationNeeded", "TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded", attest.NotReported,
		}},
		DevRoots: j.Development,
	}
	p.Image.AllowDev, p.Image.AllowUnanchored, p.Image.AllowLite = true, true, true
	// A manifest's form is its owner's affair; that of its hash is the authority's.
	p.Workload.AllowUncommitted, p.Workload.AllowUnpinnedImages, p.Workload.AllowMutable = true, true, true
	return p
}

// Judge verifies one piece of evidence. Codes: collateral_unavailable when the vendor's
// statements cannot be had, those of package container, those of the verifier's
// findings, and those of package identity.
func (j *Judge) Judge(ctx context.Context, e Evidence) (*Applicant, error) {
	ev, err := container.Decode(e.Container)
	if err != nil {
		return nil, err
	}
	if e.VMConfig != "" {
		ev.Config = e.VMConfig
	}
	now := time.Now
	if j.Now != nil {
		now = j.Now
	}
	src := verifier.Source{Version: 1, Evidence: ev}
	req := verifier.Request{
		Source: src, Roots: j.Roots, Policy: j.platform(), At: now(), Memo: &j.memo, Launching: true,
		Freshness: verifier.Freshness{ReportData: e.ReportData[:]},
	}
	if j.Provider != nil {
		payload, err := keys.Provider{Kind: keys.KMS, SPKI: j.Provider}.Event()
		if err != nil {
			return nil, err
		}
		req.Provider = string(payload)
	}
	if want, ok, err := verifier.CollateralFor(&src); err != nil {
		return nil, err
	} else if ok {
		if j.Collateral == nil {
			return nil, fault.New("collateral_unavailable", "there is no source of collateral")
		}
		if req.Collateral, err = j.Collateral.Collateral(ctx, want); err != nil {
			return nil, fault.Wrap(err, "collateral_unavailable", "get the collateral of the evidence").WithFix("see whether the provisioning certification service can be reached")
		}
		if j.Floor != nil && want.FMSPC+want.Product != "" {
			least, err := j.Floor.Floor(want.FMSPC + want.Product)
			if err != nil {
				return nil, fault.Wrap(err, "collateral_unavailable", "the newest collateral seen")
			}
			req.Policy.Floor = uint32(min(least, math.MaxUint32))
		}
	}
	// What runs is the authority's to judge: the reference is what the evidence says, so
	// that the verifier looks whether the rest agrees with it.
	vm, err := src.VMConfig()
	if err != nil {
		return nil, err
	}
	var imageHash []byte
	if vm.OSImageHash != "" {
		h, err := dstack.ParseImageHash(vm.OSImageHash)
		if err != nil {
			return nil, fault.Wrap(err, "vm_config_malformed", "os_image_hash")
		}
		imageHash = h[:]
		req.Reference.AddImageHash(h, authority)
	}
	if err := j.expect(&req, ev); err != nil {
		return nil, err
	}
	v := verifier.Appraise(req)
	if !v.Accepted {
		return nil, v.Refusal()
	}
	if j.Floor != nil && v.Trust == dstack.TrustProduction && v.Platform.TCBEvaluation != 0 {
		if err := j.Floor.Raise(ctx, v.Platform.Product, uint64(v.Platform.TCBEvaluation)); err != nil {
			return nil, fault.Wrap(err, "collateral_unavailable", "remember the newest collateral")
		}
	}

	out := &Applicant{Evidence: ev, Claims: v.Claims, Digest: sha256.Sum256(e.Container)}
	if v.Workload.ChannelKey != "" {
		if out.ChannelKey, err = hex.DecodeString(v.Workload.ChannelKey); err != nil {
			return nil, err
		}
	}
	ready := slices.ContainsFunc(eventlog.Runtime(ev.EventLog), func(e eventlog.Event) bool { return e.Name == eventlog.SystemReady })
	out.Running = ready && v.Workload.BoundBy != boundByDocument
	out.Booting = !ready && v.Workload.BoundBy != boundByDocument
	mode := identity.BootTime
	if !e.BootTime && (ready || v.Workload.BoundBy == boundByDocument) {
		mode = identity.Final
	}
	info, err := identity.Of(identity.Input{Claims: v.Claims, Evidence: ev, Document: vm.MRConfig, Image: imageHash, Mode: mode})
	if err != nil {
		return nil, err
	}
	if v.Claims.DeviceScheme != "" {
		info.DeviceID = v.Claims.DeviceID
	}
	out.Info = *info
	out.Request = governance.Request{
		Boot: governance.BootInfo{
			TEEVariant: Variant(v.Claims), MRAggregated: info.MRAggregated, OSImageHash: imageHash, MRSystem: info.MRSystem,
			AppID: info.AppID, ComposeHash: info.ComposeHash, InstanceID: info.InstanceID, DeviceID: info.DeviceID,
			KeyProviderInfo: info.KeyProvider, TCBStatus: v.Claims.TCBStatus, AdvisoryIDs: v.Claims.Advisories,
		},
		Trust: v.Claims.Trust, Launch: map[string][]byte{}, Session: e.Session, At: v.At,
		// Tables of ACPI that nobody could compare are code of the host's (D01).
		ImageBound: slices.ContainsFunc(v.Anchors, func(a verifier.Anchor) bool { return a.What == "os_image_hash" }) &&
			(v.Trust == dstack.TrustDevelopment || !v.Has(verifier.Warning, "acpi_not_checked")),
	}
	for _, r := range v.Claims.Registers() {
		out.Request.Launch[r.Name] = r.Value
	}
	if v.Claims.TEE == dstack.Nitro {
		out.Request.Boot.TCBStatus = "" // as upstream sends it
	}
	return out, nil
}

// Appraisal is what an attested channel holds against its connection, with a as its
// Detail.
func (a *Applicant) Appraisal() *channel.Appraisal {
	out := &channel.Appraisal{
		Identity: channel.Identity{AppID: a.Info.AppID, ComposeHash: a.Info.ComposeHash, ChannelKey: a.ChannelKey},
		Trust:    a.Request.Trust, Claims: a.Claims, Booting: a.Booting, Detail: a,
	}
	if len(a.Claims.ReportData) == dstack.ReportDataSize {
		out.ReportData = dstack.ReportData(a.Claims.ReportData)
	}
	if len(a.Info.InstanceID) == dstack.InstanceIDSize {
		out.Identity.InstanceID = (*dstack.InstanceID)(a.Info.InstanceID)
	}
	return out
}

// authority is the origin of expectations that an authority is asked about next.
const authority = "the authority"

// boundByDocument is how a verdict names SEV-SNP's binding.
const boundByDocument = "host_data"

// expect makes the workload that the evidence names the one expected.
func (j *Judge) expect(req *verifier.Request, ev *attest.Evidence) error {
	claims, err := j.claims(*req)
	if err != nil {
		return err
	}
	mode := identity.BootTime
	vm, err := req.Source.VMConfig()
	if err != nil {
		return err
	}
	info, err := identity.Of(identity.Input{Claims: claims, Evidence: ev, Document: vm.MRConfig, Image: make([]byte, dstack.ImageHashSize), Mode: mode})
	if err != nil {
		return err
	}
	req.Reference.AddComposeHash(info.ComposeHash, authority)
	req.Reference.AddAppID(info.AppID, authority)
	return nil
}

// claims verifies signatures and collateral alone.
func (j *Judge) claims(req verifier.Request) (*attest.Claims, error) {
	req.Policy = verifier.SignaturePolicy()
	req.Policy.DevRoots = j.Development
	v := verifier.Appraise(req)
	if !v.Accepted {
		return nil, v.Refusal()
	}
	return v.Claims, nil
}

// Variant is upstream's name of a platform.
func Variant(c *attest.Claims) string {
	switch {
	case c.TDX != nil && c.TPM != nil:
		return "dstack-gcp-tdx"
	case c.TDX != nil:
		return "dstack-tdx"
	case c.SNP != nil:
		return "dstack-amd-sev-snp"
	case c.TEE == dstack.Nitro:
		return "dstack-nitro-enclave"
	case c.TEE == dstack.NitroTPM:
		return "dstack-aws-nitro-tpm"
	}
	return "dstack-" + string(c.TEE)
}
