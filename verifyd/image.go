// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"context"
	"encoding/hex"
	"slices"
	"sync"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/measure/acpi"
)

// imageCheck is what the check of an OS image establishes: that what the hardware
// measured at launch is what the image of that hash measures as. Whose word the hash
// is, it does not say (threats.md B10).
type imageCheck struct {
	hash    dstack.ImageHash
	vm      measure.VMConfig
	dev     *bool   // from the image's metadata, where the image was at hand
	version *string // likewise

	want   *measure.TDX         // of TDX: what the image gives; set on a mismatch, too
	acpi   *acpi.Tables         // computed
	listed []dstack.Measurement // the ACPI digests that the log has
}

// checkImage does step 3 of verifier.md §3. Texts of errors are upstream's where
// clients match on them. On an error the result holds what is known for debugging.
func (s *Service) checkImage(ctx context.Context, ev *attest.Evidence, c *attest.Claims, vm measure.VMConfig, download bool) (*imageCheck, error) {
	r := &imageCheck{vm: vm}
	hash, err := dstack.ParseImageHash(vm.OSImageHash)
	if err != nil {
		return r, fault.Wrap(err, "image_hash_malformed", "os_image_hash of the configuration")
	}
	r.hash = hash
	switch {
	case c.TDX != nil && c.TPM != nil:
		return r, r.gcp(ev, c)
	case c.TDX != nil && vm.Lite():
		return r, r.lite(ev, c)
	case c.TDX != nil && (vm.TDXVariant == "" || vm.TDXVariant == "legacy"):
		if !download {
			return r, fault.New("image_not_checked", "the image of this VM would have to be downloaded, which this check does not do")
		}
		return r, s.legacy(ctx, r, ev, c)
	case c.TDX != nil:
		return r, fault.New("vm_config_malformed", "tdx_attestation_variant %.32q is neither legacy nor lite", vm.TDXVariant)
	case c.SNP != nil:
		return r, r.snp(c)
	case c.TEE == dstack.Nitro:
		return r, r.enclave(c)
	case c.TEE == dstack.NitroTPM:
		return r, r.nitroTPM(c)
	}
	return r, fault.New("tee_unsupported", "images of %s cannot be checked", c.TEE)
}

// lite takes the registers from the measurement document that the evidence carries
// and the ACPI digests from its log. A VM of the older form never comes here, nor
// does this form ever fall back to a download.
func (r *imageCheck) lite(ev *attest.Evidence, c *attest.Claims) error {
	split := r.vm.TDXMeasurement
	if split == nil {
		return fault.New("measurement_missing", "tdx_measurement is required for the lite variant")
	}
	if err := split.Bind(r.hash, measure.TDXDocumentName); err != nil {
		return err
	}
	doc, err := measure.ParseTDXDocument(split.Measurement)
	if err != nil {
		return err
	}
	// ParseTDXDocument knows one layout of firmware events.
	if v := r.vm.OVMFVariant; v != "" && v != "pre202505" {
		return fault.New("ovmf_variant", "the configuration has ovmf_variant %.32q, the document pre202505", v)
	}
	twoPass, err := r.vm.TwoPass()
	if err != nil {
		return err
	}
	if r.want, err = doc.TDX(r.vm.MemorySize, twoPass); err != nil {
		return err
	}
	names := []string{}
	for _, e := range ev.EventLog {
		if !e.IsACPI() {
			continue
		}
		if len(e.Digest) != dstack.MeasurementSize {
			return fault.New("acpi_events", "an ACPI event has a digest of %d bytes, want %d", len(e.Digest), dstack.MeasurementSize)
		}
		names, r.listed = append(names, e.Name), append(r.listed, dstack.Measurement(e.Digest))
	}
	if !slices.Equal(names, []string{measure.ACPILoader, measure.ACPIRSDP, measure.ACPITables}) {
		return fault.New("acpi_events", "the event log has the ACPI events %.100q, want acpi-loader, acpi-rsdp and acpi-tables, once each", names)
	}
	return r.compare(c.TDX)
}

// legacy recomputes the registers from the image's own files and the shape of the VM.
func (s *Service) legacy(ctx context.Context, r *imageCheck, ev *attest.Evidence, c *attest.Claims) error {
	if r.vm.QEMUVersion == "" {
		r.vm.QEMUVersion = "9.1.0" // upstream's reading of its absence
	}
	twoPass, err := r.vm.TwoPass()
	if err != nil {
		return err
	}
	m, err := s.measured(ctx, measureKey{r.hash, r.vm.MemorySize, twoPass})
	if err != nil {
		return err
	}
	r.dev, r.version = &m.dev, &m.version
	want := *m.tdx
	want.RTMR0 = slices.Clone(want.RTMR0)
	r.want = &want
	shape, err := r.vm.Shape()
	if err == nil {
		if r.acpi, err = acpi.Build(shape); err == nil {
			err = want.SetACPI(shape)
		}
	}
	if err != nil {
		r.acpi = nil
		if !s.config.AllowUnknownACPITables {
			return fault.Wrap(err, fault.Code(err), "the ACPI tables of this VM cannot be computed, so that RTMR0 is not known").
				WithFix("set allow_unknown_acpi_tables, if you accept the host's own")
		}
		for _, e := range ev.EventLog {
			if e.IsACPI() && len(e.Digest) == dstack.MeasurementSize {
				r.listed = append(r.listed, dstack.Measurement(e.Digest))
			}
		}
	}
	return r.compare(c.TDX)
}

// compare holds the quote's launch registers against those expected, in upstream's
// order.
func (r *imageCheck) compare(t *attest.TDX) error {
	rtmr0, err := r.want.ReplayRTMR0(r.listed)
	if err != nil {
		return err
	}
	for _, x := range []struct {
		name       string
		want, have dstack.Measurement
	}{{"MRTD", r.want.MRTD, t.MRTD}, {"RTMR0", rtmr0, t.RTMR[0]}, {"RTMR1", r.want.RTMR1, t.RTMR[1]}, {"RTMR2", r.want.RTMR2, t.RTMR[2]}} {
		if x.want != x.have {
			return fault.New("measurement_mismatch", "%s mismatch: expected=%s, actual=%s", x.name, x.want, x.have)
		}
	}
	return nil
}

func (r *imageCheck) snp(c *attest.Claims) error {
	if r.vm.SNPMeasurement == "" {
		return fault.New("measurement_missing", "sev_snp_measurement is required")
	}
	split, err := measure.ParseSNPSplit([]byte(r.vm.SNPMeasurement))
	if err != nil {
		return err
	}
	want, _, err := split.Compute(r.hash)
	if err != nil {
		return err
	}
	if want != c.SNP.Measurement {
		return fault.New("measurement_mismatch", "amd sev-snp measurement mismatch: expected=%s, actual=%s", want, c.SNP.Measurement)
	}
	return nil
}

func (r *imageCheck) gcp(ev *attest.Evidence, c *attest.Claims) error {
	split := r.vm.GCPMeasurement
	if split == nil {
		return fault.New("measurement_missing", "gcp_measurement is required")
	}
	if err := split.Bind(r.hash, measure.GCPDocumentName); err != nil {
		return err
	}
	doc, err := measure.ParseGCPDocument(split.Measurement)
	if err != nil {
		return err
	}
	firmware, err := hex.DecodeString(tpm.GCPFirmwareV2)
	if err != nil {
		return err
	}
	// Upstream accepts one firmware and looks at no partition table.
	return tpm.CheckGCPImage(c, ev.TPMQuote.EventLog, tpm.GCPReference{Firmware: [][]byte{firmware}, AnyGPT: true, UKI: doc.UKI})
}

func (r *imageCheck) enclave(c *attest.Claims) error {
	got, err := nitro.ImageHash(c.PCRs())
	if err != nil {
		return err
	}
	if got != r.hash {
		return fault.New("image_hash_mismatch", "os_image_hash mismatch: expected=%s, actual=%s", r.hash, got)
	}
	return nil
}

func (r *imageCheck) nitroTPM(c *attest.Claims) error {
	split := r.vm.AWSMeasurement
	if split == nil {
		return fault.New("measurement_missing", "aws_measurement is required")
	}
	if err := split.Bind(r.hash, measure.AWSDocumentName); err != nil {
		return err
	}
	doc, err := measure.ParseAWSDocument(split.Measurement)
	if err != nil {
		return err
	}
	got, err := nitro.BootPCRDigest(c.PCRs())
	if err != nil {
		return err
	}
	if got != doc.BootPCRs {
		return fault.New("measurement_mismatch", "boot_pcr_digest mismatch: expected=%x, actual=%x", doc.BootPCRs, got)
	}
	return nil
}

// measureKey is all that the registers of an image depend on but the ACPI tables.
type measureKey struct {
	image   dstack.ImageHash
	memory  uint64
	twoPass bool
}

type measurement struct {
	tdx     *measure.TDX // ACPI events open; not to be changed
	dev     bool
	version string
}

// maxMeasurements bounds those kept: an image has a few shapes in use.
const maxMeasurements = 256

// measurements keeps what was computed. Nothing on disk is trusted for it.
type measurements struct {
	mu   sync.Mutex
	kept map[measureKey]*measurement
	used []measureKey // oldest use first
}

func (m *measurements) get(k measureKey) *measurement {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.kept[k]
	if v != nil {
		m.touch(k)
	}
	return v
}

func (m *measurements) put(k measureKey, v *measurement) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kept == nil {
		m.kept = map[measureKey]*measurement{}
	}
	m.kept[k] = v
	m.touch(k)
	if len(m.used) > maxMeasurements {
		delete(m.kept, m.used[0])
		m.used = m.used[1:]
	}
}

func (m *measurements) touch(k measureKey) {
	m.used = append(slices.DeleteFunc(m.used, func(o measureKey) bool { return o == k }), k)
}

// measured returns what an image measures as, computing it once.
func (s *Service) measured(ctx context.Context, k measureKey) (*measurement, error) {
	if m := s.known.get(k); m != nil {
		return m, nil
	}
	img, err := s.images.Get(ctx, k.image)
	if err != nil {
		return nil, err
	}
	t, err := measure.ComputeTDX(measure.Launch{
		Firmware: img.Firmware, Kernel: img.Kernel, Initrd: img.Initrd, Cmdline: img.Metadata.Cmdline,
		MemoryBytes: k.memory, TwoPassAddPages: k.twoPass,
	})
	if err != nil {
		return nil, err
	}
	m := &measurement{tdx: t, dev: img.Metadata.IsDev, version: img.Metadata.Version}
	s.known.put(k, m)
	return m, nil
}
