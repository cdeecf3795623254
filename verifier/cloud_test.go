// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/cca"
	"github.com/dstack-go/dstack/attest/cca/ccatest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/nitro/nitrotest"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/attest/tpm/tpmtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/measure"
)

// image makes the checksum file of an image that has one measurement document.
func image(name string, doc []byte) (dstack.ImageHash, *measure.Split) {
	sum := sha256.Sum256(doc)
	sums := []byte(hex.EncodeToString(sum[:]) + "  " + name + "\n")
	return sha256.Sum256(sums), &measure.Split{ChecksumFile: sums, Measurement: doc}
}

func (g *guest) text(vm measure.VMConfig) string {
	b, err := json.Marshal(vm)
	g.check(err)
	return string(b)
}

func anchored(v *Verdict, what string) bool {
	return slices.ContainsFunc(v.Anchors, func(a Anchor) bool { return a.What == what })
}

// gcp is a guest on Google Cloud: TDX, and a vTPM that measured the boot.
type gcp struct {
	*guest
	tpm    *tpmtest.Machine
	config string
	hash   dstack.ImageHash
	quoted func(tdxQuote []byte) []byte // what the vTPM signs over
}

// gcpPartitionTable is the digest of the reference log's partition table.
const gcpPartitionTable = "00b8a357e652623798d1bbd16c375ec90fbed802b4269affa3e78e6eb19386cf"

func newGCP(t *testing.T) *gcp {
	g := &gcp{guest: newGuest(t), tpm: tpmtest.New(t)}
	log, err := eventlog.ParseTPMLog(testkit.Vectors(t, "attestation/gcp/tpm_eventlog.bin"))
	g.check(err)
	events, err := tpm.Events(log, eventlog.BankSHA256, tpm.GCPFirmwarePCR, tpm.GCPImagePCR)
	g.check(err)
	for _, e := range events {
		g.tpm.Extend(e.Index, e.Digest)
	}
	for _, e := range g.runtime() {
		sum := sha256.Sum256(eventlog.PreimageOf(e))
		g.tpm.Extend(tpm.GCPRuntimePCR, sum[:])
	}
	uki, err := hex.DecodeString("9ab14a46f858662a89adc102d2a57a13f52f75c1769d65a4c34edbbfc8855f0f")
	g.check(err)
	doc, err := (&measure.GCPDocument{UKI: [32]byte(uki)}).Marshal()
	g.check(err)
	hash, split := image(measure.GCPDocumentName, doc)
	g.hash = hash
	g.config = g.text(measure.VMConfig{OSImageHash: hash.String(), NumNICs: 1, GCPMeasurement: split, MRConfig: string(g.document.Bytes())})
	g.quoted = func(q []byte) []byte { sum := sha256.Sum256(q); return sum[:] }
	g.edit.evidence = func(e *attest.Evidence) {
		e.EventLog, e.Config = eventlog.Runtime(e.EventLog), g.config
		e.TPMQuote = g.tpm.Quote(g.quoted(e.Quote), tpm.GCPFirmwarePCR, tpm.GCPImagePCR, tpm.GCPRuntimePCR)
		e.TPMQuote.Platform = 1
	}
	return g
}

func (g *gcp) request() *request {
	r := g.guest.request()
	r.roots = append(r.roots, g.tpm.Roots())
	r.col.Add(g.tpm.Collateral())
	r.ref = Reference{}
	r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
	r.ref.AddImageHash(g.hash, "--os-image-hash")
	firmware, _ := hex.DecodeString(tpm.GCPFirmwareV2)
	gpt, _ := hex.DecodeString(gcpPartitionTable)
	r.pol.GCP = GCPPolicy{Firmware: []collateral.Hex{firmware}, PartitionTables: []collateral.Hex{gpt}}
	return r
}

func TestGoogleCloudGuest(t *testing.T) {
	g := newGCP(t)
	v := g.request().appraise(g.evidence())
	if !v.Accepted || !anchored(v, "boot registers") || !anchored(v, "os_image_hash") || !v.Has(Warning, "vtpm_unbound") {
		t.Fatal(show(v))
	}
	for _, c := range []struct {
		name, code string
		run        func(g *gcp, r *request)
	}{
		{"a vTPM that quoted over another quote", "gcp_quote_binding", func(g *gcp, _ *request) { g.quoted = func([]byte) []byte { return make([]byte, 32) } }},
		{"a vTPM under another root", "unknown_root", func(g *gcp, r *request) { r.roots[len(r.roots)-1] = tpmtest.New(t).Roots() }},
		{"a vTPM of another kind of trust", "trust_mixed", func(_ *gcp, r *request) { r.roots[len(r.roots)-1].Trust = dstack.TrustProduction }},
		{"no revocation lists of the vTPM's", "crl_missing", func(g *gcp, r *request) { r.col = &collateral.Bundle{TDX: r.col.TDX, Certificates: r.col.Certificates} }},
		{"events that PCR 14 has not", "log_replay_mismatch", func(g *gcp, _ *request) { g.tpm.Measure(tpm.GCPRuntimePCR, "more") }},
		{"firmware that nobody accepted", "gcp_firmware_unspecified", func(_ *gcp, r *request) { r.pol.GCP.Firmware = nil }},
		{"a partition table that nobody accepted", "gcp_gpt_unspecified", func(_ *gcp, r *request) { r.pol.GCP.PartitionTables = nil }},
		{"another partition table", "gcp_gpt", func(_ *gcp, r *request) { r.pol.GCP.PartitionTables = []collateral.Hex{make([]byte, 32)} }},
		{"another image", "image_hash_mismatch", func(_ *gcp, r *request) { r.ref.AddImageHash(dstack.ImageHash{9}, "--os-image-hash") }},
		{"a document that is not the image's", "image_hash_mismatch", func(g *gcp, _ *request) {
			_, other := image(measure.GCPDocumentName, []byte("other"))
			g.config = g.text(measure.VMConfig{OSImageHash: g.hash.String(), NumNICs: 1, GCPMeasurement: other, MRConfig: string(g.document.Bytes())})
		}},
		{"a document that does not parse", "measurement_malformed", func(g *gcp, r *request) {
			hash, other := image(measure.GCPDocumentName, []byte("other"))
			r.ref = Reference{}
			r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
			r.pol.Image.AllowUnanchored = true
			g.config = g.text(measure.VMConfig{OSImageHash: hash.String(), NumNICs: 1, GCPMeasurement: other, MRConfig: string(g.document.Bytes())})
		}},
		{"no document", "image_unanchored", func(g *gcp, _ *request) {
			g.config = g.text(measure.VMConfig{OSImageHash: g.hash.String(), NumNICs: 1, MRConfig: string(g.document.Bytes())})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGCP(t)
			r := g.request()
			c.run(g, r)
			v := r.appraise(g.evidence())
			refusedFor(t, v, c.code)
			// The boot registers vouch for the image whatever the log of the running system says.
			if c.code != "log_replay_mismatch" && anchored(v, "os_image_hash") {
				t.Errorf("the image is shown as anchored%s", show(v))
			}
		})
	}
}

// nitroTPM is an instance with a NitroTPM.
type nitroTPM struct {
	*guest
	module *nitrotest.Module
	config string
	hash   dstack.ImageHash
	log    []eventlog.Event
}

func newNitroTPM(t *testing.T) *nitroTPM {
	g := &nitroTPM{guest: newGuest(t), module: nitrotest.NewTPM(t)}
	g.log = g.runtime()
	pcr14, err := eventlog.ReplayRuntime(g.log, "sha-384")
	g.check(err)
	pcrs := g.module.Doc["nitrotpm_pcrs"].(map[any]any)
	pcrs[14] = pcr14
	id, err := mrconfig.IDv2(g.composeHash(), g.app, "none", nil)
	g.check(err)
	pcr8 := nitro.ConfigPCR8(id)
	pcrs[8] = pcr8[:]
	h := sha256.New()
	for _, i := range []int{4, 7, 12} {
		h.Write(pcrs[i].([]byte))
	}
	doc, err := (&measure.AWSDocument{BootPCRs: [32]byte(h.Sum(nil))}).Marshal()
	g.check(err)
	hash, split := image(measure.AWSDocumentName, doc)
	g.hash, g.config = hash, g.text(measure.VMConfig{OSImageHash: hash.String(), NumNICs: 1, AWSMeasurement: split})
	return g
}

func (g *nitroTPM) evidence() Source {
	e := g.module.Evidence()
	e.EventLog, e.Config = g.log, g.config
	return Source{Version: 1, Evidence: e, Manifest: string(g.manifest)}
}

func (g *nitroTPM) request() *request {
	r := &request{roots: g.module.Roots(), at: nitrotest.At, pol: Policy{TCB: TCBPolicy{Accept: []string{attest.NotReported}}, DevRoots: true}}
	r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
	r.ref.AddImageHash(g.hash, "--os-image-hash")
	return r
}

func TestNitroTPMGuest(t *testing.T) {
	g := newNitroTPM(t)
	v := g.request().appraise(g.evidence())
	if !v.Accepted || v.TEE != dstack.NitroTPM || v.Workload.BoundBy != "pcr14" || !anchored(v, "boot registers") {
		t.Fatal(show(v))
	}
	for _, c := range []struct {
		name, code string
		run        func(g *nitroTPM, r *request)
	}{
		{"B18: the default policy", "tcb_status", func(_ *nitroTPM, r *request) { r.pol.TCB.Accept = []string{"UpToDate"} }},
		{"a commitment to another app", "mr_config_mismatch", func(g *nitroTPM, _ *request) {
			other := nitro.ConfigPCR8(dstack.MRConfigID{2})
			g.module.Doc["nitrotpm_pcrs"].(map[any]any)[8] = other[:]
		}},
		{"no commitment", "mr_config_missing", func(g *nitroTPM, _ *request) {
			g.module.Doc["nitrotpm_pcrs"].(map[any]any)[8] = make([]byte, 48)
		}},
		{"an event taken out of the log", "log_replay_mismatch", func(g *nitroTPM, _ *request) { g.log = g.log[1:] }},
		{"no log", "event_log_missing", func(g *nitroTPM, _ *request) { g.log = nil }},
		{"a register that is not quoted", "nitro_pcr_missing", func(g *nitroTPM, _ *request) {
			delete(g.module.Doc["nitrotpm_pcrs"].(map[any]any), 7)
		}},
		{"another kernel", "measurement_mismatch", func(g *nitroTPM, _ *request) {
			g.module.Doc["nitrotpm_pcrs"].(map[any]any)[4] = make([]byte, 48)
		}},
		{"a document that does not parse", "measurement_malformed", func(g *nitroTPM, r *request) {
			hash, other := image(measure.AWSDocumentName, []byte("other"))
			r.ref = Reference{}
			r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
			g.config = g.text(measure.VMConfig{OSImageHash: hash.String(), NumNICs: 1, AWSMeasurement: other})
		}},
		{"a document that is not the image's", "image_hash_mismatch", func(g *nitroTPM, _ *request) {
			_, other := image(measure.AWSDocumentName, []byte("other"))
			g.config = g.text(measure.VMConfig{OSImageHash: g.hash.String(), NumNICs: 1, AWSMeasurement: other})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newNitroTPM(t)
			r := g.request()
			c.run(g, r)
			v := r.appraise(g.evidence())
			if v.Accepted || !v.Has(Error, c.code) {
				t.Errorf("want %s%s", c.code, show(v))
			}
		})
	}
}

// realm is a guest of Arm CCA: REM3 holds its events, RPV the digest of the document.
type realm struct {
	*guest
	platform *ccatest.Platform
	log      []eventlog.Event
	document string
}

func newRealm(t *testing.T) *realm {
	g := &realm{guest: newGuest(t), platform: ccatest.New(t)}
	g.guest.document.InstanceID = (*dstack.InstanceID)(g.instance)
	g.log, g.document = g.runtime(), string(g.guest.document.Bytes())
	rem3, err := eventlog.ReplayRuntime(g.log, "sha-256")
	g.check(err)
	g.platform.Realm[cca.ClaimREM].([]any)[3] = rem3
	id := mrconfig.IDv3([]byte(g.document))
	g.platform.Realm[cca.ClaimRPV] = append(slices.Clone(id[1:33]), make([]byte, 32)...)
	challenge := binding.Envelope(g.nonce, nil, g.app, g.instance)
	g.platform.Realm[cca.ClaimChallenge] = challenge[:]
	return g
}

func (g *realm) evidence() Source {
	e := g.platform.Evidence()
	e.EventLog, e.MRConfig = g.log, g.document
	return Source{Version: 1, Evidence: e, Manifest: string(g.manifest), Nonce: g.nonce}
}

func (g *realm) request() *request {
	r := &request{
		roots: g.platform.Roots(), at: ccatest.At, fresh: Freshness{Nonce: g.nonce},
		pol: Policy{TCB: TCBPolicy{Accept: []string{attest.NotReported}}, DevRoots: true},
	}
	r.pol.Registers = map[string][]collateral.Hex{"rim": {g.platform.Realm[cca.ClaimRIM].([]byte)}}
	r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
	return r
}

func TestArmCCAGuest(t *testing.T) {
	g := newRealm(t)
	r := g.request()
	src := g.evidence()
	v := r.appraise(src)
	if !v.Accepted || v.TEE != dstack.CCA || v.Workload.BoundBy != "rem3" || v.Freshness != FreshNonce || !v.Has(Warning, "cca_components_not_checked") {
		t.Fatal(show(v))
	}
	for _, c := range v.Claims.CCA.Components {
		r.pol.CCA.Components = append(r.pol.CCA.Components, c.Measurement)
	}
	r.pol.CCA.Implementations = []collateral.Hex{v.Claims.CCA.ImplementationID[:]}
	if v := r.appraise(src); !v.Accepted || v.Has(Warning, "cca_components_not_checked") {
		t.Error(show(v))
	}
	for _, c := range []struct {
		name, code string
		run        func(g *realm, r *request)
	}{
		{"an event taken out of the log", "log_replay_mismatch", func(g *realm, _ *request) { g.log = g.log[1:] }},
		{"another document than committed to", "mr_config_mismatch", func(g *realm, _ *request) { g.document = `{"version":3}` }},
		{"no document", "mr_config_document_missing", func(g *realm, _ *request) { g.document = "" }},
		{"no commitment", "mr_config_missing", func(g *realm, _ *request) { g.platform.Realm[cca.ClaimRPV] = make([]byte, 64) }},
		{"a document that says another app than the log", "mr_config_mismatch", func(g *realm, _ *request) {
			other := g.guest.document
			other.AppID = &dstack.AppID{9}
			g.document = string(other.Bytes())
			id := mrconfig.IDv3([]byte(g.document))
			g.platform.Realm[cca.ClaimRPV] = append(slices.Clone(id[1:33]), make([]byte, 32)...)
		}},
		{"another initial measurement", "register_mismatch", func(_ *realm, r *request) { r.pol.Registers["rim"] = []collateral.Hex{make([]byte, 32)} }},
		{"an initial measurement that nobody vouches for", "image_unanchored", func(_ *realm, r *request) { r.pol.Registers = nil }},
		{"firmware that is not accepted", "cca_component_unknown", func(_ *realm, r *request) { r.pol.CCA.Components = []collateral.Hex{{1}} }},
		{"a platform that is not accepted", "platform_denied", func(_ *realm, r *request) { r.pol.CCA.Implementations = []collateral.Hex{{1}} }},
		{"another platform's key", "unknown_root", func(_ *realm, r *request) { r.roots = ccatest.New(t).Roots() }},
		{"the default policy", "tcb_status", func(_ *realm, r *request) { r.pol.TCB.Accept = []string{"UpToDate"} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRealm(t)
			r := g.request()
			c.run(g, r)
			refusedFor(t, r.appraise(g.evidence()), c.code)
		})
	}
}

// What cannot happen with evidence that ReadEvidence made.
func TestRequestsThatNoReaderMakes(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	r.pol.Scope = "all"
	refusedFor(t, r.appraise(g.evidence()), "policy_malformed")
	r = g.request()
	refusedFor(t, r.appraise(Source{Version: 1, Evidence: &attest.Evidence{TEE: "sgx"}}), "tee_unsupported")
}
