// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"encoding/hex"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/measure"
)

// vtpm joins the claims of the vTPM's quote that stands beside a TDX quote on
// Google Cloud. Both must be under roots of one kind of trust, and the TPM must
// have quoted over this very TDX quote.
func (a *appraisal) vtpm(in attest.Input, c *attest.Claims) bool {
	in.Evidence = a.ev
	t, err := tpm.Verify(in)
	if err != nil {
		a.fail(err, "container.tpm_quote", "tpm_malformed")
		return false
	}
	if err := tpm.CheckGCP(t, a.ev.Quote); err != nil {
		a.fail(err, "container.tpm_quote", "gcp_quote_binding")
		return false
	}
	if t.Trust != c.Trust {
		a.add(Error, "trust_mixed", "container.tpm_quote", "", "the TDX quote is of %s trust, the vTPM's of %s", c.Trust, t.Trust)
		return false
	}
	c.TPM, c.Root = t.TPM, c.Root+"; vTPM: "+t.Root
	c.Unchecked = append(c.Unchecked, t.Unchecked...)
	if !t.Expires.IsZero() && t.Expires.Before(c.Expires) {
		c.Expires = t.Expires
	}
	a.add(Warning, "vtpm_unbound", "container.tpm_quote", "", "the TDX quote does not name the vTPM: that both are of one VM is the cloud provider's word")
	return true
}

// split takes a measurement document that the evidence carries and the image hash
// that names it. ok is false when there is none, or it is not the image's.
func (a *appraisal) split(s *measure.Split, name string) (h dstack.ImageHash, ok bool) {
	if s == nil {
		return h, false
	}
	h, err := dstack.ParseImageHash(a.cfg.vm.OSImageHash)
	if err != nil {
		return h, false // reported
	}
	if err := s.Bind(h, name); err != nil {
		a.fail(err, "container.config", "measurement_malformed")
		return h, false
	}
	return h, true
}

// measured records that the launch is that of the image, on the word of whoever
// expects it, or on the evidence's own.
func (a *appraisal) measured(what, value string, h dstack.ImageHash, matched map[dstack.ImageHash]string) {
	if origin, ok := matched[h]; ok && !a.v.Has(Error, "image_hash_mismatch") {
		a.anchorImage(h, origin)
		a.anchor(what, value, "the measurement document named by the OS image hash")
		return
	}
	a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{what, value, "the evidence's own measurement document"})
}

// gcpImage compares the boot that Google's vTPM measured with the image.
func (a *appraisal) gcpImage(matched map[dstack.ImageHash]string) {
	h, ok := a.split(a.cfg.vm.GCPMeasurement, measure.GCPDocumentName)
	if !ok {
		return
	}
	doc, err := measure.ParseGCPDocument(a.cfg.vm.GCPMeasurement.Measurement)
	if err != nil {
		a.fail(err, "container.config.gcp_measurement", "measurement_malformed")
		return
	}
	p := a.pol.GCP
	want := tpm.GCPReference{Firmware: raw(p.Firmware), GPT: raw(p.PartitionTables), AnyGPT: p.AnyPartitionTable, UKI: doc.UKI}
	if err := tpm.CheckGCPImage(a.claims, a.ev.TPMQuote.EventLog, want); err != nil {
		a.fail(err, "container.tpm_quote", "measurement_mismatch")
		return
	}
	a.measured("boot registers", "PCR 0 and 2, image "+hex.EncodeToString(doc.UKI[:]), h, matched)
}

// nitroTPMImage compares the boot that a NitroTPM measured with the image.
func (a *appraisal) nitroTPMImage(matched map[dstack.ImageHash]string) {
	h, ok := a.split(a.cfg.vm.AWSMeasurement, measure.AWSDocumentName)
	if !ok {
		return
	}
	doc, err := measure.ParseAWSDocument(a.cfg.vm.AWSMeasurement.Measurement)
	if err != nil {
		a.fail(err, "container.config.aws_measurement", "measurement_malformed")
		return
	}
	got, err := nitro.BootPCRDigest(a.claims.PCRs())
	switch {
	case err != nil:
		a.fail(err, "claims.pcrs", "nitro_pcr_missing")
	case got != doc.BootPCRs:
		a.add(Error, "measurement_mismatch", "claims.pcrs", "", "PCR 4, 7 and 12 have digest %s, the image %s boots to %s", clipHex(got[:]), short(h), clipHex(doc.BootPCRs[:]))
	default:
		a.measured("boot registers", "PCR 4, 7 and 12: "+hex.EncodeToString(got[:]), h, matched)
	}
}

// nitroTPMCommitment checks PCR 8, which the guest extends once by the second form
// of MRCONFIGID.
func (a *appraisal) nitroTPMCommitment() {
	pcr8 := a.claims.PCRs()[8]
	if len(pcr8) == 0 || len(bytes.Trim(pcr8, "\x00")) == 0 {
		a.add(lenient(a.pol.Workload.AllowUncommitted), "mr_config_missing", "claims.pcrs.8", "run a guest that commits to its configuration", "the guest committed to no configuration (PCR 8 is zero)")
		return
	}
	kind, kpID, err := parseKeyProvider(a.id.KeyProvider)
	var id []byte
	if err == nil {
		id, err = decodeHex(kpID)
	}
	var want dstack.MRConfigID
	if err == nil {
		want, err = mrconfig.IDv2(a.id.ComposeHash, a.id.AppID, kind, id)
	}
	if commitment := nitro.ConfigPCR8(want); err != nil || !bytes.Equal(pcr8, commitment[:]) {
		a.add(Error, "mr_config_mismatch", "claims.pcrs.8", "", "the guest committed to another app, manifest or key provider than its log says")
		return
	}
	a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{"configuration commitment", "PCR 8 equals what runs", "the guest, at boot"})
}

func raw(list []collateral.Hex) [][]byte {
	var out [][]byte
	for _, h := range list {
		out = append(out, h)
	}
	return out
}
