// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/sevsnp"
	"github.com/dstack-go/dstack/attest/sevsnp/sevsnptest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/testkit"
)

// snpGuest is a guest of SEV-SNP: it has no runtime register, so what runs is what
// its host committed to in HOST_DATA.
type snpGuest struct {
	*guest
	snp    *sevsnptest.Platform
	report func(*sevsnp.Report)
	edit   func(*attest.Evidence)
}

func newSNPGuest(t *testing.T, product string) *snpGuest {
	g := &snpGuest{guest: newGuest(t), snp: sevsnptest.New(t, product)}
	g.document.InstanceID = (*dstack.InstanceID)(g.instance)
	return g
}

func (g *snpGuest) evidence() Source {
	doc := g.document.Bytes()
	id := mrconfig.IDv3(doc)
	r := g.snp.Report()
	copy(r.HostData[:], id[1:33])
	r.ReportData = binding.Envelope(g.nonce, nil, g.app, g.instance)
	if g.report != nil {
		g.report(r)
	}
	ev := g.snp.Evidence(r)
	ev.MRConfig, ev.ReportData, ev.Config = string(doc), r.ReportData, "{}"
	if g.edit != nil {
		g.edit(ev)
	}
	raw, err := container.EncodeV1(ev)
	g.check(err)
	return Source{Version: 1, Container: raw, Manifest: string(g.manifest), Nonce: g.nonce}
}

// request is that of a caller who expects exactly this guest and its measurement.
func (g *snpGuest) request() *request {
	r := &request{
		roots: []attest.Roots{g.snp.Roots(), sevsnp.VendorRoots()}, col: g.snp.Collateral(), at: testTime,
		pol:   Policy{TCB: TCBPolicy{Accept: []string{"UpToDate"}}, DevRoots: true},
		fresh: Freshness{Nonce: g.nonce},
	}
	m := g.snp.Report().Measurement
	r.pol.Registers = map[string][]collateral.Hex{"measurement": {m[:]}}
	r.pol.SNP.Products = []string{g.snp.Product}
	r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
	r.ref.AddAppID(g.app, "--app-id")
	return r
}

func TestSEVSNPGuestIsAccepted(t *testing.T) {
	for _, product := range []string{"Milan", "Genoa", "Turin"} {
		t.Run(product, func(t *testing.T) {
			g := newSNPGuest(t, product)
			v := g.request().appraise(g.evidence())
			if !v.Accepted || v.TEE != dstack.SEVSNP || v.Signature != SignatureValid || v.Freshness != FreshNonce || v.Workload.BoundBy != "host_data" {
				t.Fatal(show(v))
			}
			if (product == "Milan") != v.Has(Warning, "product_weak") {
				t.Error(show(v))
			}
			if slices.Contains(v.Platform.Bound, "runtime event log") || !slices.Contains(v.Platform.NotBound, "runtime event log") {
				t.Errorf("bound %q, not bound %q", v.Platform.Bound, v.Platform.NotBound)
			}
		})
	}
}

func TestSEVSNPMutationsAreRefused(t *testing.T) {
	other := [32]byte{9}
	for _, m := range []struct {
		name, code string
		run        func(g *snpGuest, r *request)
	}{
		{"no commitment to a configuration", "mr_config_missing", func(g *snpGuest, r *request) { g.report = func(x *sevsnp.Report) { x.HostData = [32]byte{} } }},
		{"a document that is not the one committed to", "mr_config_mismatch", func(g *snpGuest, r *request) { g.report = func(x *sevsnp.Report) { x.HostData = other } }},
		{"no document", "mr_config_document_missing", func(g *snpGuest, r *request) { g.edit = func(e *attest.Evidence) { e.MRConfig = "" } }},
		{"a document without the app", "mr_config_mismatch", func(g *snpGuest, r *request) { g.document.AppID = nil }},
		{"a document for another manifest", "manifest_hash_mismatch", func(g *snpGuest, r *request) { g.document.ComposeHash = other }},
		{"another manifest than expected", "compose_hash_mismatch", func(g *snpGuest, r *request) { r.ref.AddComposeHash(other, "--compose-hash") }},
		{"another measurement than the policy's", "register_mismatch", func(g *snpGuest, r *request) {
			r.pol.Registers["measurement"] = []collateral.Hex{make([]byte, 48)}
		}},
		{"a measurement that nobody vouches for", "image_unanchored", func(g *snpGuest, r *request) { r.pol.Registers = nil }},
		{"a VLEK", "snp_vlek", func(g *snpGuest, r *request) { g.snp.UseVLEK(); r.col = g.snp.Collateral() }},
		{"multithreading that the policy forbids", "snp_smt", func(g *snpGuest, r *request) { r.pol.SNP.RequireSMTOff = true }},
		{"no ciphertext hiding", "snp_ciphertext_hiding", func(g *snpGuest, r *request) {
			g.report = func(x *sevsnp.Report) {
				x.PlatformInfo &^= sevsnp.PlatformCiphertextHiding
				x.Policy &^= sevsnp.PolicyCiphertextHiding
			}
			r.pol.SNP.RequireCiphertextHiding = true
		}},
		{"debugging", "snp_debug", func(g *snpGuest, r *request) { g.report = func(x *sevsnp.Report) { x.Policy |= sevsnp.PolicyDebug } }},
		{"another nonce", "nonce_mismatch", func(g *snpGuest, r *request) { r.fresh.Nonce = make([]byte, 32) }},
		{"no revocation list", "crl_missing", func(g *snpGuest, r *request) { r.col = &collateral.Bundle{Certificates: r.col.Certificates} }},
		{"a chip that is masked, where machines are listed", "device_not_allowed", func(g *snpGuest, r *request) {
			g.report = func(x *sevsnp.Report) { x.ChipID = [64]byte{} }
			r.pol.Devices = []dstack.DeviceID{{}}
		}},
		{"a measurement document that is none", "measurement_malformed", func(g *snpGuest, _ *request) {
			g.edit = func(e *attest.Evidence) {
				e.Config = `{"os_image_hash":"` + strings.Repeat("11", 32) + `","sev_snp_measurement":"x"}`
			}
		}},
		{"a measurement document that the image hash does not name", "image_hash_mismatch", func(g *snpGuest, _ *request) {
			g.edit = func(e *attest.Evidence) {
				e.Config = `{"os_image_hash":"` + strings.Repeat("11", 32) + `","sev_snp_measurement":"{\"checksum_file\":\"AA==\",\"measurement\":\"AA==\",\"vcpus\":1,\"vcpu_type\":\"EPYC-v4\",\"guest_features\":1}"}`
			}
		}},
		{"the vendor's roots alone", "unknown_root", func(g *snpGuest, r *request) { r.pol.DevRoots = false }},
	} {
		t.Run(m.name, func(t *testing.T) {
			g := newSNPGuest(t, "Genoa")
			r := g.request()
			m.run(g, r)
			refusedFor(t, r.appraise(g.evidence()), m.code)
		})
	}
}

// A03: a platform that has not checked its memory for aliases.
func TestThreat_A03_AliasCheckIsDemanded(t *testing.T) {
	g := newSNPGuest(t, "Genoa")
	g.report = func(x *sevsnp.Report) { x.PlatformInfo &^= snpPlatformAliasCheck }
	r := g.request()
	refusedFor(t, r.appraise(g.evidence()), "snp_alias_check")
	r.pol.SNP.AllowNoAliasCheck = true
	if v := r.appraise(g.evidence()); !v.Accepted || !v.Has(Warning, "snp_alias_check") {
		t.Error(show(v))
	}
}

// A04: Milan's keys can be had by software alone.
func TestThreat_A04_MilanOnlyByName(t *testing.T) {
	g := newSNPGuest(t, "Milan")
	r := g.request()
	r.pol.SNP.Products = nil
	refusedFor(t, r.appraise(g.evidence()), "product_denied")
	r.pol.SNP.Products = []string{"Milan"}
	if v := r.appraise(g.evidence()); !v.Accepted || !v.Has(Warning, "product_weak") {
		t.Error(show(v))
	}
}

// A05, B07: the least TCB is compared with what is certified, part by part.
func TestThreat_A05_LeastCertifiedTCB(t *testing.T) {
	g := newSNPGuest(t, "Turin")
	r := g.request()
	v := r.appraise(g.evidence())
	if !v.Accepted || v.Platform.CertifiedTCB == nil {
		t.Fatal(show(v))
	}
	have := *v.Platform.CertifiedTCB
	least := func(p attest.SNPParts) *Verdict {
		r.pol.SNP.MinTCB = map[string]attest.SNPParts{"Turin": p}
		return r.appraise(g.evidence())
	}
	if v := least(have); !v.Accepted {
		t.Error(show(v))
	}
	for _, raise := range []func(*attest.SNPParts){
		func(p *attest.SNPParts) { p.FMC++ }, func(p *attest.SNPParts) { p.Bootloader++ }, func(p *attest.SNPParts) { p.TEE++ },
		func(p *attest.SNPParts) { p.SNP++ }, func(p *attest.SNPParts) { p.Microcode++ },
	} {
		p := have
		raise(&p)
		refusedFor(t, least(p), "snp_tcb_low")
	}
}

// B19: SEV-SNP has no register that vouches for an event log: a log beside the
// report is dropped, whatever it says.
func TestThreat_B19_EventsOfAnotherTEEAreNotClaims(t *testing.T) {
	g := newSNPGuest(t, "Genoa")
	g.edit = func(e *attest.Evidence) {
		e.Unbound = []eventlog.Event{
			event(t, eventlog.ComposeHashEvent, make([]byte, 32)), event(t, eventlog.GPUAttestation, []byte(`{"cc_mode":"on"}`)),
			event(t, eventlog.SystemReady, nil),
		}
	}
	v := g.request().appraise(g.evidence())
	if !v.Accepted || !v.Has(Warning, "log_unbound") || v.Workload.ComposeHash != g.composeHash() {
		t.Error(show(v))
	}
	if text, _ := json.Marshal(v); strings.Contains(string(text), "cc_mode") {
		t.Error("the dropped log shows in the verdict")
	}
	// The same log under the name of TDX needs a TDX quote.
	raw, err := container.EncodeV1(&attest.Evidence{TEE: dstack.TDX, Quote: make([]byte, 1184), EventLog: g.runtime(), Config: "{}"})
	g.check(err)
	if v := g.request().appraise(Source{Version: 1, Container: raw}); v.Accepted || v.Undecided || v.Workload != nil {
		t.Error(show(v))
	}
}

// The fixture of upstream's verifier: a real Milan report with its chain, and no
// revocation list.
func TestUpstreamSEVSNPEvidence(t *testing.T) {
	src, err := ReadEvidence(testkit.Vectors(t, "attestation/sev-snp/verifier-sev-snp-attestation.json"), "")
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)
	req := Request{Source: *src, Roots: VendorRoots(), Policy: SignaturePolicy(), At: at}
	v := Appraise(req)
	if !v.Accepted || v.Scope != ScopeSignature || v.TCBStatus != "OutOfDate" || v.Trust != dstack.TrustProduction || !v.Has(Warning, "not_checked") {
		t.Error(show(v))
	}
	req.Policy = DefaultPolicy()
	if v := Appraise(req); v.Accepted || !v.Has(Error, "crl_missing") {
		t.Error(show(v))
	}
	req.Policy.AllowMissingCRL = true
	req.Policy.SNP.Products = []string{"Milan"}
	req.Policy.TCB.Accept = append(req.Policy.TCB.Accept, "OutOfDate")
	v = Appraise(req)
	if v.Accepted || v.Workload == nil || !v.Has(Error, "workload_not_specified") || !v.Has(Error, "image_unanchored") {
		t.Fatal(show(v))
	}
	if !slices.ContainsFunc(v.SelfConsistent, func(a Anchor) bool { return a.What == "measurement" }) {
		t.Error(show(v))
	}

	// Who expects this workload and this image has all that it rests on anchored.
	image, err := dstack.ParseImageHash(v.Workload.OSImageHash)
	if err != nil || !strings.HasPrefix(v.Workload.OSImageHash, "f69c8e50") {
		t.Fatal(v.Workload.OSImageHash, err)
	}
	req.Reference.AddComposeHash(v.Workload.ComposeHash, "the test")
	req.Reference.AddImageHash(image, "the test")
	req.Policy.SNP.AllowNoAliasCheck = true
	v = Appraise(req)
	if !v.Accepted || !slices.ContainsFunc(v.Anchors, func(a Anchor) bool { return a.What == "measurement" }) {
		t.Error(show(v))
	}
	// The same with one bit of the shape changed does not give the signed digest.
	was := bytes.Clone(src.Container)
	if src.Container = bytes.Replace(was, []byte(`\"vcpus\":2`), []byte(`\"vcpus\":3`), 1); bytes.Equal(was, src.Container) {
		t.Fatal("nothing was changed")
	}
	req.Source = *src
	refusedFor(t, Appraise(req), "measurement_mismatch")
}
