// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
)

// workload compares what runs with what is expected.
func (a *appraisal) workload() {
	if !a.ref.expectsWorkload() && a.role == HopGateway {
		fix := "give the gateway's lock with --gateway-lock FILE, or the hash of its manifest with --gateway-compose-hash"
		if a.id != nil {
			fix = fmt.Sprintf("look at what it measured, and if it is what you expect, say so: --gateway-compose-hash %s --gateway-app-id %s", a.id.ComposeHash, a.id.AppID)
		}
		a.add(Error, "gateway_not_specified", "", fix, "TLS ends at a gateway, and which one that may be was not said; an app id alone does not say what it runs")
	} else if !a.ref.expectsWorkload() {
		fix := "say what is expected: --lock dstack.lock.json, --compose app-compose.json or --compose-hash HEX"
		if a.id != nil {
			fix = fmt.Sprintf("look at the manifest, and if it is what you expect, say so: --compose-hash %s --app-id %s", a.id.ComposeHash, a.id.AppID)
		}
		a.add(Error, "workload_not_specified", "", fix, "no workload is expected, so none can be accepted; an app id alone does not say what runs")
	}
	if a.id == nil {
		return
	}
	composeBy, appBy, instanceBy := "", "", ""
	for _, e := range a.ref.all() {
		if len(e.compose) > 0 && !slices.Contains(e.compose, a.id.ComposeHash) {
			a.add(Error, "compose_hash_mismatch", "event_log.compose-hash", "", "the guest runs the manifest %s; %s expects %s", a.id.ComposeHash, e.origin, list(e.compose))
		} else if len(e.compose) > 0 {
			composeBy = e.origin
		}
		if e.instance != nil && !bytes.Equal(e.instance[:], a.id.InstanceID) {
			a.add(Error, "instance_id_mismatch", "event_log.instance-id", "", "the guest is the instance %q; %s expects %s", hexString(a.id.InstanceID), e.origin, *e.instance)
		} else if e.instance != nil {
			instanceBy = e.origin
		}
		if e.app != nil && *e.app != a.id.AppID {
			a.add(Error, "app_id_mismatch", "event_log.app-id", "", "the guest is the app %s; %s expects %s", a.id.AppID, e.origin, *e.app)
		} else if e.app != nil {
			appBy = e.origin
		}
	}
	if a.v.Has(Error, "compose_hash_mismatch") {
		composeBy = ""
	}
	if a.v.Has(Error, "app_id_mismatch") {
		appBy = ""
	}
	a.vouch("compose_hash", a.id.ComposeHash.String(), composeBy)
	a.vouch("app_id", a.id.AppID.String(), appBy)
	if len(a.id.InstanceID) > 0 {
		a.vouch("instance_id", hexString(a.id.InstanceID), instanceBy)
	}
}

func (a *appraisal) anchor(what, value, origin string) {
	a.v.Anchors = append(a.v.Anchors, Anchor{what, value, origin})
}

// vouch lists a measured value under the one who expected it, or as the guest's own.
func (a *appraisal) vouch(what, value, origin string) {
	if origin != "" {
		a.anchor(what, value, origin)
		return
	}
	a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{what, value, "the guest"})
}

func list[T fmt.Stringer](values []T) string {
	var out []string
	for _, v := range values {
		out = append(out, v.String())
	}
	return strings.Join(out, " or ")
}

// image compares the launch registers and the image's name with what is expected.
func (a *appraisal) image() {
	a.assertedImages()
	matched := map[dstack.ImageHash]string{} // expected and asserted, and by whom expected
	for _, e := range a.ref.all() {
		if len(e.images) == 0 {
			continue
		}
		for _, h := range a.asserted {
			if slices.Contains(e.images, h) {
				matched[h] = e.origin
				continue
			}
			a.add(Error, "image_hash_mismatch", "container.config.os_image_hash", "", "the guest runs the OS image %s; %s expects %s", h, e.origin, list(e.images))
		}
	}
	a.pinned()
	switch {
	case a.claims.TDX != nil && a.claims.TPM != nil:
		a.gcpImage(matched)
	case a.claims.TDX != nil:
		a.tdxImage(matched)
	case a.claims.SNP != nil:
		a.snpImage(matched)
	case a.claims.TEE == dstack.Nitro && a.id != nil:
		a.enclaveImage(matched)
	case a.claims.TEE == dstack.NitroTPM:
		a.nitroTPMImage(matched)
	}
	if a.imageAnchored {
		return
	}
	for _, h := range a.asserted {
		a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{"os_image_hash", h.String(), "the guest"})
	}
	if slices.ContainsFunc(imageCodes, func(c string) bool { return a.v.Has(Error, c) }) {
		return // says more
	}
	a.add(lenient(a.pol.Image.AllowUnanchored), "image_unanchored", "claims", "give --lock dstack.lock.json, the release directory with --image DIR, or the registers in the policy",
		"that the guest runs this OS image is only its own word: no expected registers were given, or nothing ties them to it")
}

// imageCodes are the errors that say more than that an image is unanchored.
var imageCodes = []string{"event_log_missing", "image_hash_mismatch", "mrtd_mismatch", "rtmr0_mismatch", "rtmr1_mismatch", "rtmr2_mismatch", "acpi_mismatch", "measurement_mismatch", "register_mismatch", "enclave_debug"}

// anchorImage records who vouches for the image.
func (a *appraisal) anchorImage(h dstack.ImageHash, origin string) {
	a.imageAnchored = true
	a.anchor("os_image_hash", h.String(), origin)
	if a.v.Workload != nil {
		a.v.Workload.OSImageHash = h.String()
	}
}

// launchRegisters are those that, together, are all that a TEE measures of a launch.
var launchRegisters = map[dstack.TEE][]string{
	dstack.TDX: {"mrtd", "rtmr0", "rtmr1", "rtmr2"}, dstack.SEVSNP: {"measurement"}, dstack.CCA: {"rim"},
	dstack.Nitro: {"pcr0", "pcr1", "pcr2"}, dstack.NitroTPM: {"pcr4", "pcr7", "pcr12"},
}

// pinned compares the registers that the policy names.
func (a *appraisal) pinned() {
	have := map[string][]byte{}
	for _, r := range a.claims.Registers() {
		have[r.Name] = r.Value
	}
	for i, v := range a.claims.PCRs() {
		have[fmt.Sprintf("pcr%d", i)] = v
	}
	good := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(a.pol.Registers)) {
		want := a.pol.Registers[name]
		value, ok := have[name]
		switch {
		case !ok:
			a.add(Error, "register_mismatch", "claims."+name, "", "the evidence has no register %q, which the policy names", name)
		case !slices.ContainsFunc(want, func(w collateral.Hex) bool { return bytes.Equal(w, value) }):
			a.add(Error, "register_mismatch", "claims."+name, "", "%s is %s, the policy expects %s", name, clipHex(value), clipHexes(want))
		default:
			good[name] = true
			a.anchor(name, hexString(value), "the policy")
		}
	}
	all := launchRegisters[a.claims.TEE]
	if len(all) > 0 && !slices.ContainsFunc(all, func(n string) bool { return !good[n] }) {
		a.imageAnchored = true
		a.anchor("launch registers", strings.Join(all, ", "), "the policy")
	}
}

func clipHexes(list []collateral.Hex) string {
	var out []string
	for _, h := range list {
		out = append(out, clipHex(h))
	}
	return strings.Join(out, " or ")
}

// tdxImage compares MRTD and RTMR0 to 2 with those of the expected image.
func (a *appraisal) tdxImage(matched map[dstack.ImageHash]string) {
	direct := false
	for _, e := range a.ref.all() {
		if e.tdx == nil {
			continue
		}
		direct = true
		if !a.registers(e.tdx, e.origin) {
			continue
		}
		a.anchor("launch registers", "MRTD "+short(a.claims.TDX.MRTD)+", RTMR0 to RTMR2", e.origin)
		a.imageAnchored = true
		if len(e.images) == 1 {
			a.anchorImage(e.images[0], e.origin)
			delete(matched, e.images[0])
		}
	}
	if !direct {
		a.ownDocument(matched)
	}
}

// snpImage computes the launch digest from the measurement document that the
// evidence carries, and compares it with the one that the hardware signed. As with
// TDX the document is the image's only when the expected image hash names it.
func (a *appraisal) snpImage(matched map[dstack.ImageHash]string) {
	text := a.cfg.vm.SNPMeasurement
	if text == "" {
		return
	}
	h, err := dstack.ParseImageHash(a.cfg.vm.OSImageHash)
	if err != nil {
		return // reported
	}
	split, err := measure.ParseSNPSplit([]byte(text))
	if err != nil {
		a.fail(err, "container.config.sev_snp_measurement", "measurement_malformed")
		return
	}
	want, _, err := split.Compute(h)
	if err != nil {
		a.fail(err, "container.config.sev_snp_measurement", "measurement_malformed")
		return
	}
	if got := a.claims.SNP.Measurement; got != want {
		a.add(Error, "measurement_mismatch", "claims.measurement", "", "the hardware measured %s at launch; the image %s on this shape of VM gives %s", short(got), short(h), short(want))
		return
	}
	a.measured("measurement", want.String(), h, matched)
}

// enclaveImage compares the hash that names an enclave's image, which is that of
// its three launch registers, with what is asserted and expected. It is also what
// an enclave has for a compose hash.
func (a *appraisal) enclaveImage(matched map[dstack.ImageHash]string) {
	h := dstack.ImageHash(a.id.ComposeHash)
	for _, claimed := range a.asserted {
		if claimed != h {
			a.add(Error, "image_hash_mismatch", "claims.pcrs", "", "the evidence names the image %s, its PCR 0 to 2 are those of %s", claimed, h)
			return
		}
	}
	if origin, ok := matched[h]; ok {
		a.anchorImage(h, origin)
		return
	}
	for _, e := range a.ref.all() {
		if slices.Contains(e.images, h) || slices.Contains(e.compose, a.id.ComposeHash) {
			a.anchorImage(h, e.origin)
			return
		}
	}
}

// assertedImages collects the names that the evidence gives its OS image.
func (a *appraisal) assertedImages() {
	if a.id != nil && a.id.OSImageHash != nil {
		a.asserted = append(a.asserted, dstack.ImageHash(a.id.OSImageHash))
	}
	if text := a.cfg.vm.OSImageHash; text != "" {
		h, err := dstack.ParseImageHash(text)
		if err != nil {
			a.add(Error, "image_hash_malformed", "container.config.os_image_hash", "", "%v", err)
		} else if !slices.Contains(a.asserted, h) {
			if len(a.asserted) > 0 {
				a.add(Error, "image_hash_inconsistent", "container.config.os_image_hash", "", "the configuration names the OS image %s, the event log %s", h, a.asserted[0])
			}
			a.asserted = append(a.asserted, h)
		}
	}
	if w := a.v.Workload; w != nil && len(a.asserted) > 0 {
		w.OSImageHash = a.asserted[0].String()
	}
}

// ownDocument takes the registers from the measurement document that the evidence
// itself carries. They are the image's only when the checksum file that names the
// document is what the expected image hash is the hash of; otherwise whoever made
// the evidence made up both (threats.md B10).
func (a *appraisal) ownDocument(expected map[dstack.ImageHash]string) {
	split := a.cfg.vm.TDXMeasurement
	if split == nil {
		return
	}
	h, err := dstack.ParseImageHash(a.cfg.vm.OSImageHash)
	if err != nil {
		return // reported
	}
	if err := split.Bind(h, measure.TDXDocumentName); err != nil {
		a.fail(err, "container.config.tdx_measurement", "measurement_malformed")
		return
	}
	doc, err := measure.ParseTDXDocument(split.Measurement)
	if err != nil {
		a.fail(err, "container.config.tdx_measurement", "measurement_malformed")
		return
	}
	twoPass, err := a.cfg.vm.TwoPass()
	if err != nil {
		a.fail(err, "container.config", "vm_config_malformed")
		return
	}
	want, err := doc.TDX(a.cfg.vm.MemorySize, twoPass)
	if err != nil {
		a.add(Info, fault.Code(err), "container.config.memory_size", fault.Fix(err), "%v", err)
		return
	}
	origin, anchored := expected[h]
	if !anchored {
		origin = "the evidence's own measurement document"
	}
	if !a.registers(want, origin) {
		return
	}
	if anchored {
		a.imageAnchored = true
		a.anchor("os_image_hash", h.String(), origin)
		a.anchor("launch registers", "MRTD "+short(a.claims.TDX.MRTD)+", RTMR0 to RTMR2", "the measurement document named by the OS image hash")
		return
	}
	a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{"launch registers", "MRTD " + short(a.claims.TDX.MRTD) + ", RTMR0 to RTMR2", origin})
}

// acpi returns the digests of the three ACPI events. The log tells them, and they
// must be those of tables that QEMU makes for the shape of VM that the evidence
// claims; that the VM has them, RTMR0 shows. Where such tables cannot be computed
// they are the host's own, and its code in them nobody has seen (D01).
func (a *appraisal) acpi() []dstack.Measurement {
	var logged []dstack.Measurement
	for _, e := range a.ev.EventLog {
		if e.IsACPI() && len(e.Digest) == dstack.MeasurementSize {
			logged = append(logged, dstack.Measurement(e.Digest))
		}
	}
	computed, err := a.cfg.vm.ACPIDigests()
	if err != nil {
		allowed := a.pol.Image.AllowLite || a.claims.Trust == dstack.TrustDevelopment
		a.add(lenient(allowed), "acpi_not_checked", "event_log", "run a VM shape whose tables can be computed, or accept it by the policy's image.allow_lite",
			"the ACPI tables that the host gave the guest are as the event log says, and were not compared with expected ones: %v", err)
		return logged
	}
	if len(logged) != len(computed) {
		return computed[:]
	}
	if err := a.cfg.vm.MatchACPI([3]dstack.Measurement(logged)); err != nil {
		a.fail(err, "event_log", "acpi_mismatch")
	}
	return logged
}

// registers compares the launch registers of the quote with expected ones.
func (a *appraisal) registers(want *measure.TDX, origin string) bool {
	ok := true
	compare := func(code, evidence, what string, got, want dstack.Measurement) {
		if got != want {
			a.add(Error, code, evidence, "", "%s is %s; %s expects %s", what, short(got), origin, short(want))
			ok = false
		}
	}
	compare("mrtd_mismatch", "claims.mrtd", "the firmware (MRTD)", a.claims.TDX.MRTD, want.MRTD)

	// Without a log nothing explains RTMR0; that it is missing says more.
	if a.v.Has(Error, "event_log_missing") {
		ok = false
	} else {
		var acpi []dstack.Measurement
		if slices.ContainsFunc(want.RTMR0, func(e measure.RTMR0Event) bool { return e.Digest == nil }) {
			acpi = a.acpi()
			ok = ok && !a.v.Has(Error, "acpi_mismatch")
		}
		if rtmr0, err := want.ReplayRTMR0(acpi); err != nil {
			a.add(Error, "rtmr0_mismatch", "event_log", "", "the event log has not the ACPI events that RTMR0 needs: %v", err)
			ok = false
		} else {
			compare("rtmr0_mismatch", "claims.rtmr0", "the firmware's configuration and the VM's shape (RTMR0)", a.claims.TDX.RTMR[0], rtmr0)
		}
	}
	compare("rtmr1_mismatch", "claims.rtmr1", "the kernel (RTMR1)", a.claims.TDX.RTMR[1], want.RTMR1)
	compare("rtmr2_mismatch", "claims.rtmr2", "the command line and initramfs (RTMR2)", a.claims.TDX.RTMR[2], want.RTMR2)
	return ok
}
