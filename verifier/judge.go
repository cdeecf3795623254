// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/manifest"
)

// policy applies what the relying party accepts to what was established.
func (a *appraisal) policy() {
	c, p := a.claims, a.pol
	a.tcb()
	switch {
	case len(p.Devices) == 0:
	case c.DeviceScheme == "":
		a.add(Error, "device_not_allowed", "platform.device_id", "", "the evidence does not say which machine it is of, and only some are accepted")
	case !slices.Contains(p.Devices, c.DeviceID):
		a.add(Error, "device_not_allowed", "platform.device_id", "", "the machine %s is not among those accepted", c.DeviceID)
	}
	if c.TDX != nil {
		a.tdxPolicy()
	}
	if c.SNP != nil {
		a.snpPolicy(c.SNP)
	}
	if c.CCA != nil {
		a.ccaPolicy(c.CCA)
	}
	a.age()
	if c.Debug {
		// The quote verifier refuses it unless the policy allows it.
		a.add(Warning, "td_debug", "claims", "", "the VM runs in debug mode: the host can read its memory")
	}
	dev := c.Trust == dstack.TrustDevelopment
	switch {
	case dev:
		a.add(Warning, "dev_image", "", "", "only development images run in a development TEE")
	case a.ref.DevImage != nil && *a.ref.DevImage:
		a.add(lenient(p.Image.AllowDev), "dev_image", "", "run a production image", "the expected OS image is one for development")
	}
	if least := p.Image.MinEpoch; least > 0 {
		switch epoch := a.ref.OSEpoch; {
		case epoch == nil:
			a.add(Error, "os_epoch_unknown", "", "give --image DIR or a lock, which say it", "the security epoch of the OS image is not known; the least accepted is %d", least)
		case *epoch < least:
			a.add(Error, "os_epoch_low", "", "run a newer OS image", "the OS image has security epoch %d, the least accepted is %d: it is one that must no longer be trusted", *epoch, least)
		}
	}
	if dev || strings.HasPrefix(a.ref.Firmware, "debian") {
		a.add(Warning, "firmware_distribution", "claims", "", "the firmware is a distribution's build, which nobody has reproduced")
	}
}

// tcb judges how current the platform is.
func (a *appraisal) tcb() {
	c, p := a.claims, a.pol
	advisories := ""
	if len(c.Advisories) > 0 {
		advisories = " (" + strings.Join(c.Advisories, ", ") + ")"
	}
	switch ok, grace := p.TCB.accepts(c.TCBStatus, c.TCBDate, a.at); {
	case grace:
		a.add(Warning, "tcb_grace", "tcb_status", "have the host's firmware and microcode updated", "the platform's TCB is %s%s, accepted for %d days after %s", c.TCBStatus, advisories, p.TCB.GraceDays, c.TCBDate.Format(time.DateOnly))
	case ok && c.TCBStatus != "UpToDate":
		a.add(Warning, "tcb_accepted", "tcb_status", "", "the platform's TCB is %s%s, which the policy accepts", c.TCBStatus, advisories)
	case ok:
	case c.TCBStatus == attest.NotReported && len(p.TCB.Accept) > 0:
		a.add(Error, "tcb_status", "tcb_status", "accept NotReported in the policy's tcb.accept, if you trust whoever operates the platform", "the platform tells no TCB status, so that it is current is only its operator's word; accepted: %s", strings.Join(p.TCB.Accept, ", "))
	case len(p.TCB.Accept) > 0:
		a.add(Error, "tcb_status", "tcb_status", "have the host's firmware and microcode updated", "the platform's TCB is %s%s; accepted: %s", c.TCBStatus, advisories, strings.Join(p.TCB.Accept, ", "))
	}
	for _, advisory := range c.Advisories {
		switch {
		case slices.Contains(p.Advisories.Deny, advisory):
			a.add(Error, "advisory_denied", "advisories", "", "%s applies to the platform", advisory)
		case len(p.Advisories.Accept) > 0 && !slices.Contains(p.Advisories.Accept, advisory):
			a.add(Error, "advisory_not_accepted", "advisories", "", "%s applies to the platform and is not among the advisories accepted", advisory)
		}
	}
	if c.TDX != nil && c.TCBEvaluation < p.TCB.MinEvaluation {
		a.add(Error, "tcb_evaluation_low", "platform.tcb_evaluation", "fetch current collateral", "the collateral has evaluation number %d, the least accepted is %d: it is old", c.TCBEvaluation, p.TCB.MinEvaluation)
	}
}

func (a *appraisal) tdxPolicy() {
	c, p := a.claims, a.pol.TDX
	if slices.Contains(p.DenyFMSPC, c.Product) || len(p.AllowFMSPC) > 0 && !slices.Contains(p.AllowFMSPC, c.Product) {
		a.add(Error, "platform_denied", "platform.product", "", "platforms of FMSPC %s are not accepted", c.Product)
	}
	if got := c.TDX.TEETCBSVN[0]; got < p.MinModuleSVN {
		a.add(Error, "module_svn_low", "claims.tee_tcb_svn", "have the host's TDX module updated", "the TDX module has security version %d, the least accepted is %d", got, p.MinModuleSVN)
	}
}

// Bits of PLATFORM_INFO and POLICY (SEV-SNP ABI specification, ATTESTATION_REPORT
// and GUEST_POLICY).
const (
	snpPlatformSMT              = 1 << 0
	snpPlatformCiphertextHiding = 1 << 4
	snpPlatformAliasCheck       = 1 << 5
)

func (a *appraisal) snpPolicy(s *attest.SNP) {
	p := a.pol.SNP
	products := p.Products
	if len(products) == 0 {
		products = []string{"Genoa", "Turin"}
	}
	switch {
	case !slices.Contains(products, s.Product):
		a.add(Error, "product_denied", "platform.product", "name it in the policy's snp.products, if you accept what is known of it", "processors of %s are not accepted, only %s", s.Product, strings.Join(products, ", "))
	case s.Product == "Milan":
		a.add(Warning, "product_weak", "platform.product", "", "keys of %s were extracted from chips by software alone: whoever has done so can sign any report", s.Product)
	}
	if s.SigningKey == "VLEK" {
		a.add(lenient(p.AllowVLEK), "snp_vlek", "claims", "accept it by the policy's snp.allow_vlek, if you trust the provider", "the report is signed with a key that the cloud provider %q holds for its machines, not with this chip's", s.CSPID)
	}
	if s.PlatformInfo&snpPlatformAliasCheck == 0 {
		a.add(lenient(p.AllowNoAliasCheck), "snp_alias_check", "claims.platform_info", "have the host's firmware updated, or accept it by snp.allow_no_alias_check", "the platform has not checked its memory for aliases (ALIAS_CHECK_COMPLETE), which forged SPD data can make")
	}
	if least, ok := p.MinTCB[s.Product]; ok {
		for _, f := range []struct {
			name        string
			have, least uint8
		}{
			{"fmc", s.Parts.FMC, least.FMC}, {"bootloader", s.Parts.Bootloader, least.Bootloader}, {"tee", s.Parts.TEE, least.TEE},
			{"snp", s.Parts.SNP, least.SNP}, {"microcode", s.Parts.Microcode, least.Microcode},
		} {
			if f.have < f.least {
				a.add(Error, "snp_tcb_low", "platform.certified_tcb", "have the host's firmware and microcode updated", "the certified security version of %s is %d, the least accepted for %s is %d", f.name, f.have, s.Product, f.least)
			}
		}
	}
	if p.RequireSMTOff && s.PlatformInfo&snpPlatformSMT != 0 {
		a.add(Error, "snp_smt", "claims.platform_info", "", "simultaneous multithreading is on")
	}
	if p.RequireCiphertextHiding && s.PlatformInfo&snpPlatformCiphertextHiding == 0 {
		a.add(Error, "snp_ciphertext_hiding", "claims.platform_info", "", "ciphertext hiding is off: the host can watch encrypted memory change")
	}
}

func (a *appraisal) ccaPolicy(c *attest.CCA) {
	p := a.pol.CCA
	among := func(list []collateral.Hex, v []byte) bool {
		return slices.ContainsFunc(list, func(h collateral.Hex) bool { return bytes.Equal(h, v) })
	}
	if len(p.Implementations) > 0 && !among(p.Implementations, c.ImplementationID[:]) {
		a.add(Error, "platform_denied", "claims.implementation_id", "", "platforms of implementation id %x are not accepted", c.ImplementationID)
	}
	for _, component := range c.Components {
		if len(p.Components) > 0 && !among(p.Components, component.Measurement) {
			a.add(Error, "cca_component_unknown", "claims", "", "firmware component %q %q with measurement %x is not accepted", component.Type, component.Version, component.Measurement)
		}
	}
	if len(p.Components) == 0 {
		a.add(Warning, "cca_components_not_checked", "claims", "list their measurements in the policy's cca.components", "the platform's %d firmware components were not compared with expected ones", len(c.Components))
	}
}

// nitroAge is how old a Nitro document may be without a policy of its own (the
// hypervisor makes one in milliseconds; attestation.md §8.3).
const nitroAge = time.Hour

// age judges when evidence was made, where it or its certificate says so.
func (a *appraisal) age() {
	limit := time.Duration(a.pol.Evidence.MaxAgeSeconds) * time.Second
	made, what := a.claims.Made, "evidence"
	if !made.IsZero() && limit == 0 {
		limit = nitroAge
	}
	if made.IsZero() {
		made, what = a.src.Issued, "RA-TLS certificate"
	}
	fresh := a.v.Freshness == FreshNonce
	switch {
	case limit == 0 || fresh:
	case made.IsZero():
		a.add(Error, "evidence_age_unknown", "source", "ask the running instance, by its URL", "nothing says when the evidence was made, and the policy accepts none older than %s", limit)
	case a.at.Sub(made) > limit:
		a.add(Error, "evidence_too_old", "source", "ask for new evidence, or state the time at which to verify with --at", "the %s is of %s, older than %s at %s", what, made.UTC().Format(time.RFC3339), limit, a.v.At.Format(time.RFC3339))
	}
}

// conclude draws the outcome from the findings.
func (a *appraisal) conclude() {
	v := a.v
	errs, absent := 0, 0
	for _, f := range v.Findings {
		if f.Level == Error {
			errs++
			if missing[f.Code] {
				absent++
				v.Reason = f.Message
			}
		}
	}
	established := a.v.Scope == ScopeSignature || a.id != nil && a.ref.expectsWorkload()
	if a.gateway != nil {
		established = established && a.gateway.v.Accepted
	}
	switch {
	case errs == 0 && a.claims != nil && established:
		v.Accepted = true
	case errs == absent && errs > 0:
		v.Undecided = true
	}
	if !v.Undecided {
		v.Reason = ""
	}
	a.assume()
}

// assume lists what remains to be trusted.
func (a *appraisal) assume() {
	say := func(s string) { a.v.Assumptions = append(a.v.Assumptions, s) }
	switch a.v.Trust {
	case dstack.TrustDevelopment:
		say("development TEE: nothing about hardware is shown; whoever runs the host can read and change everything in the guest")
	case dstack.TrustCaller:
		say("that the key given as trust anchor is the vendor's, which nobody else vouches for")
		fallthrough
	default:
		say("the TEE's vendor, its signing keys, and that nobody has physical access to the machine's memory bus")
	}
	if a.v.Scope == ScopeSignature {
		say("everything but the signature: what runs, whether it is debugged, how current the platform is, and whether the evidence is fresh were not judged")
		return
	}
	if a.v.Has(Warning, "firmware_distribution") {
		say("the distribution that built the firmware")
	}
	if a.v.Has(Warning, "acpi_not_checked") {
		say("the guest kernel: ACPI tables of the host cannot make it read or write private memory")
	}
	if a.v.Has(Warning, "time_host") || a.man == nil {
		say("the host for the guest's clock")
	} else {
		say("for the guest's clock, that fewer than half lie of " + timeServers(a.man) + ", and who certifies them")
	}
	for _, text := range a.gpuAssumptions {
		say(text)
	}
	say("the host for availability: it can stop or slow the guest, drop its traffic, and start it from an older disk")
	if a.man != nil && a.man.KeyProviderKind() == manifest.KeyProviderKMS {
		say("the key management service that gives the guest its keys, which this verdict does not cover")
	}
	switch {
	case a.gateway != nil:
		say("the gateway: that what its measurements stand for passes on what is said, and to this app")
	case a.man != nil && a.man.GatewayWanted():
		say("the gateway in front of the guest, where TLS ends there, which this verdict does not cover")
	}
	if a.man != nil && a.man.KeyProviderKind() == manifest.KeyProviderNone {
		say("no key management, gateway or governance took part: keys end with this boot, and nothing binds a next version")
	}
	if a.governed {
		say(fmt.Sprintf("that not %d endpoints of the chain together show a block that is none of it; and the owners of the contracts, within the notice that they give", a.gov.Threshold))
	}
	say("that you, or someone you trust, has read what the expected values stand for: manifest, container images, OS image")
}

func decodeHex(s string) ([]byte, error) {
	var h collateral.Hex
	err := h.UnmarshalText([]byte(s))
	return h, err
}
