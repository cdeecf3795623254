// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/nitro/nitrotest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/attest/tpm/tpmtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/verifier"
	"github.com/dstack-go/dstack/verifyd/imagecache/imagetest"
)

// nitroMade is when the real documents were made (verifier.md §6).
const nitroMade = "2025-12-25T16:04:19.346Z"

// Every row of verifier.md §6, with the vendors' roots, offline.
func TestFixturesWithTheVendorsRoots(t *testing.T) {
	s := setup(t, nil, func(c *Config, o *Options) {
		o.Now = func() time.Time { return time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC) }
	})
	bin := func(name string) *Request {
		return &Request{Attestation: ptr(hex.EncodeToString(testkit.Vectors(t, "attestation/"+name)))}
	}
	t.Run("SEV-SNP is valid offline", func(t *testing.T) {
		r := realRequest(t, "sev-snp/verifier-sev-snp-attestation.json")
		out := s.Verify(t.Context(), r)
		valid(t, out)
		d := out.Details
		if *d.TCBStatus != "OutOfDate" || d.ACPITablesVerified || d.EventLogVerified || *d.TEEVariant != "dstack-amd-sev-snp" || len(d.AdvisoryIDs) != 0 ||
			hex.EncodeToString(d.BootInfo.OSImageHash) != "f69c8e5031ec2b269bbc08839ce02cb98ee255d695626f941f4b37b95946d352" {
			t.Error(show(out))
		}
		if hex.EncodeToString(d.AppInfo.MRSystem) != "ebf2076a74c394bd8c68ac10f341dd24e0d80f0411bbeb43f062e2b658309054" ||
			hex.EncodeToString(d.AppInfo.DeviceID) != "310f86e9970d2b625f8a1024f05ea59d540743de63e9017c8c4c0f50a14a10a6" {
			t.Error(show(out))
		}
		// What else is in the request must not count.
		r.Quote, r.EventLog, r.VMConfig = ptr("00"), ptr("nonsense"), ptr(`{"os_image_hash":"00"}`)
		again := s.Verify(t.Context(), r)
		valid(t, again)
		if !bytes.Equal(again.Details.BootInfo.OSImageHash, d.BootInfo.OSImageHash) {
			t.Error(show(again))
		}
	})
	for _, name := range []string{"tdx/tdx-lite-attestation.json", "tdx/tdx-lite-getquote.json", "tdx/quote-report.json"} {
		t.Run(name+" needs live collateral", func(t *testing.T) {
			out := s.Verify(t.Context(), realRequest(t, name))
			invalid(t, out, prefixQuote, "the network is off")
			if !out.Verdict.Undecided {
				t.Error(show(out))
			}
		})
	}
	t.Run("an enclave is valid when its document is fresh", func(t *testing.T) {
		r := bin("nitro/versioned_nitro_attestation.bin")
		r.At = ptr(nitroMade)
		out := s.Verify(t.Context(), r)
		valid(t, out)
		const image = "1894b0b29e94a9db16e88a2914f0923e52bb16c08bf3bb484df786a147e2eb79"
		if *out.Details.TEEVariant != "dstack-nitro-enclave" || hex.EncodeToString(out.Details.AppInfo.ComposeHash) != image || out.Details.TCBStatus != nil || out.Details.BootInfo.TCBStatus != "" {
			t.Error(show(out))
		}
		r.At = ptr("2025-12-25T17:05:00Z")
		invalid(t, s.Verify(t.Context(), r), prefixQuote, "older than 1h0m0s")
		r.At = nil
		invalid(t, s.Verify(t.Context(), r), prefixQuote, "")
	})
	t.Run("an enclave that names another image", func(t *testing.T) {
		ev, err := container.Decode(testkit.Vectors(t, "attestation/nitro/versioned_nitro_attestation.bin"))
		check(t, err)
		ev.Config = `{"os_image_hash":"` + strings.Repeat("11", 32) + `"}`
		r := contain(t, ev)
		r.At = ptr(nitroMade)
		invalid(t, s.Verify(t.Context(), r), prefixImage, "os_image_hash mismatch")
	})
	t.Run("an enclave in debug mode fails the check of its image", func(t *testing.T) {
		r := bin("nitro/versioned_nitro_attestation_dbg.bin")
		ev, err := container.Decode(testkit.Vectors(t, "attestation/nitro/versioned_nitro_attestation_dbg.bin"))
		check(t, err)
		doc, err := nitro.ParseDocument(ev.Quote)
		check(t, err)
		r.At = ptr(doc.Made.Format(time.RFC3339))
		out := s.Verify(t.Context(), r)
		if !out.Details.QuoteVerified {
			t.Error(show(out))
		}
		invalid(t, out, prefixImage, "debug mode")
	})
}

// The same rows with the report signed again by a simulated platform: all checks but
// the vendor's signature are of real evidence.
func TestFixturesSignedAgain(t *testing.T) {
	p := tdxtest.New(t)
	s := setup(t, p.DevRoots(), func(c *Config, o *Options) { c.ImageDownloadURL = "http://127.0.0.1:1/{OS_IMAGE_HASH}" })
	t.Run("lite, in a container", func(t *testing.T) {
		raw, err := hex.DecodeString(*realRequest(t, "tdx/tdx-lite-attestation.json").Attestation)
		check(t, err)
		ev, err := container.Decode(raw)
		check(t, err)
		resigned(t, p, ev)
		out := s.Verify(t.Context(), contain(t, ev))
		valid(t, out)
		d := out.Details
		if d.ACPITablesVerified || !d.EventLogVerified || *d.TEEVariant != "dstack-tdx" || d.OSImageIsDev != nil || d.OSImageVersion != nil ||
			hex.EncodeToString(d.AppInfo.MRSystem) != "118f754a080ecb8527df65656ee4e7e97b891cf488ad6a38886ff0dbca0c8f70" {
			t.Error(show(out))
		}
		// The log names another image than the configuration: is_valid does not ask,
		// the verdict does.
		if !hasError(out.Verdict, "image_hash_inconsistent") {
			t.Error(show(out))
		}
	})
	rawCase := func(t *testing.T, name string) *Request {
		r := realRequest(t, name)
		quote, err := hex.DecodeString(*r.Quote)
		check(t, err)
		ev := &attest.Evidence{Quote: quote}
		resigned(t, p, ev)
		r.Quote = ptr(hex.EncodeToString(ev.Quote))
		return r
	}
	t.Run("lite, as GetQuote replies", func(t *testing.T) {
		out := s.Verify(t.Context(), rawCase(t, "tdx/tdx-lite-getquote.json"))
		valid(t, out)
	})
	t.Run("the older form, whose image cannot be had", func(t *testing.T) {
		out := s.Verify(t.Context(), rawCase(t, "tdx/quote-report.json"))
		invalid(t, out, prefixImage, "download the image")
		if !out.Details.QuoteVerified || out.Details.OSImageHashVerified || out.Details.AppInfo != nil {
			t.Error(show(out))
		}
	})
}

func TestLiteGuestIsValid(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, g.roots(), nil)
	for name, r := range map[string]*Request{"container": g.attestation(), "raw": g.raw()} {
		t.Run(name, func(t *testing.T) {
			r.ReturnCollateral = true
			out := s.Verify(t.Context(), r)
			valid(t, out)
			d := out.Details
			if d.ACPITablesVerified || !d.EventLogVerified || *d.TCBStatus != "UpToDate" || d.KeyProvider == nil || d.KeyProvider.Name != "kms" {
				t.Error(show(out))
			}
			if out.Verdict.Accepted || out.Verdict.Trust != dstack.TrustDevelopment || !hasError(out.Verdict, "workload_not_specified") {
				t.Error("a verdict without an expected workload must deny", show(out))
			}
			// The same request with what decided, offline, gives the same.
			r.Collateral, r.At = out.Collateral, ptr(out.Verdict.At.Format(time.RFC3339))
			again := s.Verify(t.Context(), r)
			valid(t, again)
		})
	}
}

func TestLegacyGuestIsValid(t *testing.T) {
	release := imagetest.New(t, "0.5.9", true)
	g := newGuest(t, release, false)
	url, asked := imageServer(t, release)
	s := setup(t, g.roots(), func(c *Config, o *Options) { c.ImageDownloadURL = url })
	r := g.raw()
	r.Debug = true
	out := s.Verify(t.Context(), r)
	valid(t, out)
	d := out.Details
	if !d.ACPITablesVerified || !*d.OSImageIsDev || *d.OSImageVersion != "0.5.9" || d.ACPITables == nil || len(d.ACPITables.Tables) == 0 || d.RTMRDebug != nil {
		t.Error(show(out))
	}
	r.Debug = false
	out = s.Verify(t.Context(), r)
	valid(t, out)
	if out.Details.ACPITables != nil || asked.Load() != 1 {
		t.Errorf("asked %d times%s", asked.Load(), show(out))
	}
	// A policy that names image and workload anchors them; a development image needs
	// its leave.
	compose := sha256.Sum256([]byte("compose"))
	pol := verifier.DefaultPolicy()
	pol.Workload = verifier.WorkloadPolicy{ComposeHashes: []dstack.ComposeHash{compose}, ImageHashes: []dstack.ImageHash{release.Hash}, AllowUncommitted: true}
	text, err := json.Marshal(pol)
	check(t, err)
	r.Policy = text
	out = s.Verify(t.Context(), r)
	valid(t, out)
	if !out.Verdict.Accepted {
		t.Error(show(out))
	}
	r.Policy = []byte(`{"tcb":{"accept":["UpToDate"]},"workload":{"compose_hashes":["` + strings.Repeat("00", 32) + `"],"allow_uncommitted":true}}`)
	if out = s.Verify(t.Context(), r); out.Verdict.Accepted || !hasError(out.Verdict, "compose_hash_mismatch") || !out.IsValid {
		t.Error(show(out))
	}
}

// A shape of VM whose ACPI tables are not computed: upstream would refuse what it
// cannot recompute, and so do we, unless the operator says otherwise.
func TestUnknownACPITablesNeedTheOperatorsLeave(t *testing.T) {
	release := imagetest.New(t, "0.5.9", false)
	g := newGuest(t, release, false)
	g.vm.SWTPM = true
	url, _ := imageServer(t, release)
	for _, allow := range []bool{false, true} {
		s := setup(t, g.roots(), func(c *Config, o *Options) { c.ImageDownloadURL, c.AllowUnknownACPITables = url, allow })
		out := s.Verify(t.Context(), g.raw())
		if !allow {
			invalid(t, out, prefixImage, "ACPI tables of this VM cannot be computed")
			continue
		}
		valid(t, out)
		if out.Details.ACPITablesVerified {
			t.Error(show(out))
		}
	}
}

// Each refusal has upstream's prefix and, where clients match on one, its words.
func TestReasonsAreUpstreams(t *testing.T) {
	lite := imagetest.New(t, "0.6.0", false)
	legacy := imagetest.New(t, "0.5.9", false)
	base, legacyBase := newGuest(t, lite, true), newGuest(t, legacy, false)
	roots := base.roots()
	legacyBase.platform = base.platform
	url, _ := imageServer(t, legacy)
	s := setup(t, roots, func(c *Config, o *Options) { c.ImageDownloadURL = url })
	zeros := strings.Repeat("0", 64)
	for _, c := range []struct {
		name, prefix, text string
		legacy             bool
		guest              func(*guest)
		evidence           func(*attest.Evidence)
		request            func(*Request)
	}{
		{name: "nothing at all", prefix: prefixInternal, text: "Quote is required", request: func(r *Request) { *r = Request{} }},
		{name: "a quote without a log", prefix: prefixInternal, text: "Event log is required", request: func(r *Request) { *r = Request{Quote: ptr("00")} }},
		{name: "a container that is text", prefix: prefixInternal, text: "Unknown attestation wire format", request: func(r *Request) { r.Attestation = ptr("68656c6c6f") }},
		{name: "a container that is no hexadecimal", prefix: prefixInternal, text: "attestation", request: func(r *Request) { r.Attestation = ptr("xyz") }},
		{name: "an empty container", prefix: prefixInternal, text: "attestation", request: func(r *Request) { r.Attestation = ptr("") }},
		{name: "a time that is none", prefix: prefixInternal, text: "at is not a time", request: func(r *Request) { r.At = ptr("yesterday") }},
		{name: "a policy that is none", prefix: prefixInternal, text: "policy", request: func(r *Request) { r.Policy = []byte(`{"accept_all":true}`) }},
		{name: "report data of 63 bytes", prefix: prefixInternal, text: "expected_report_data", request: func(r *Request) { r.ExpectedReportData = ptr(strings.Repeat("00", 63)) }},
		{name: "an altered signature", prefix: prefixQuote, evidence: func(e *attest.Evidence) { e.Quote[700] ^= 1 }},
		{name: "an altered report", prefix: prefixQuote, evidence: func(e *attest.Evidence) { e.Quote[200] ^= 1 }},
		{name: "a TD in debug mode", prefix: prefixQuote, text: "Debug mode is not allowed", guest: func(g *guest) { g.body.TDAttributes[0] |= 1 }},
		{name: "a module not signed by Intel", prefix: prefixQuote, text: "Invalid mr signer seam", guest: func(g *guest) { g.body.MRSignerSEAM[0] = 1 }},
		{name: "other report data than claimed", prefix: prefixQuote, text: "tdx report_data mismatch", evidence: func(e *attest.Evidence) { e.ReportData[0] ^= 1 }},
		{name: "other report data than expected", prefix: prefixQuote, text: "tdx report_data mismatch", request: func(r *Request) { r.ExpectedReportData = ptr(strings.Repeat("ab", 64)) }},
		{name: "an altered log", prefix: prefixQuote, text: "RTMR3 mismatch, quoted: ", evidence: func(e *attest.Evidence) {
			e.EventLog[len(e.EventLog)-1].Payload, e.EventLog[len(e.EventLog)-1].Digest = []byte("y"), nil
		}},
		{name: "no runtime log", prefix: prefixQuote, text: "no log of runtime events", evidence: func(e *attest.Evidence) {
			e.EventLog = e.EventLog[:len(e.EventLog)-len(runtimeLog(t))]
		}},
		{name: "no image hash", prefix: prefixImage, guest: func(g *guest) { g.vm.OSImageHash = "" }},
		{name: "an image hash of 31 bytes", prefix: prefixImage, guest: func(g *guest) { g.vm.OSImageHash = zeros[2:] }},
		{name: "another image hash", prefix: prefixImage, text: "checksum file", guest: func(g *guest) { g.vm.OSImageHash = zeros }},
		{name: "lite without a document", prefix: prefixImage, text: "tdx_measurement is required", guest: func(g *guest) { g.vm.TDXMeasurement = nil }},
		{name: "a firmware layout that is not the document's", prefix: prefixImage, text: "ovmf_variant", guest: func(g *guest) { g.vm.OVMFVariant = "edk2-202505" }},
		{name: "a variant that nobody knows", prefix: prefixImage, text: "neither legacy nor lite", guest: func(g *guest) { g.vm.TDXVariant = "trustme" }},
		{name: "another firmware", prefix: prefixImage, text: "MRTD mismatch: expected=", guest: func(g *guest) { g.body.MRTD[0] ^= 1 }},
		{name: "more memory than stated", prefix: prefixImage, text: "RTMR0 mismatch: expected=", guest: func(g *guest) { g.vm.MemorySize = 4 << 30 }},
		{name: "memory for which nothing is known", prefix: prefixImage, text: "", guest: func(g *guest) { g.vm.MemorySize = 1 << 30 }},
		{name: "ACPI events without names", prefix: prefixImage, text: "acpi-loader, acpi-rsdp and acpi-tables", evidence: func(e *attest.Evidence) {
			for i := range e.EventLog {
				if e.EventLog[i].IsACPI() {
					e.EventLog[i].Name = ""
				}
			}
		}},
		{name: "a fourth ACPI event", prefix: prefixQuote, text: "boot events of register 0", evidence: func(e *attest.Evidence) {
			for _, x := range e.EventLog {
				if x.IsACPI() {
					e.EventLog = append([]eventlog.Event{x}, e.EventLog...)
					break
				}
			}
		}},
		{name: "a fourth ACPI event in a stripped log", prefix: prefixImage, text: "once each", evidence: func(e *attest.Evidence) {
			var out []eventlog.Event
			for _, x := range e.EventLog {
				if x.IsACPI() || x.IsRuntime() {
					out = append(out, x)
				}
				if x.IsACPI() && x.Name == measure.ACPITables {
					out = append(out, x)
				}
			}
			e.EventLog = out
		}},
		{name: "a configuration that is no JSON", prefix: prefixImage, evidence: func(e *attest.Evidence) { e.Config = "{" }},
		{name: "a second app id, measured", prefix: prefixLog, text: "app-id", guest: func(g *guest) {
			log := runtimeLog(t)
			log = append(log[:3:3], append([]eventlog.Event{log[1]}, log[3:]...)...)
			reboot(g, log)
		}},
		{name: "a boot that is not over", prefix: prefixLog, text: "system-ready", guest: func(g *guest) { reboot(g, runtimeLog(t)[:7]) }},
		{name: "a firmware event without a digest", prefix: prefixLog, text: "digest", evidence: func(e *attest.Evidence) { e.EventLog[0].Digest = nil }},
		{name: "no instance id", prefix: prefixLog, text: "instance-id", guest: func(g *guest) {
			log := runtimeLog(t)
			reboot(g, append(log[:3:3], log[4:]...))
		}},
		{name: "another kernel", legacy: true, prefix: prefixImage, text: "RTMR1 mismatch: expected=", guest: func(g *guest) { g.body.RTMR[1][0] ^= 1 }, evidence: unlogged},
		{name: "another command line", legacy: true, prefix: prefixImage, text: "RTMR2 mismatch: expected=", guest: func(g *guest) { g.body.RTMR[2][0] ^= 1 }, evidence: unlogged},
		{name: "other ACPI tables", legacy: true, prefix: prefixImage, text: "RTMR0 mismatch: expected=", guest: func(g *guest) { g.body.RTMR[0][0] ^= 1 }, evidence: unlogged},
		{name: "more processors than stated", legacy: true, prefix: prefixImage, text: "RTMR0 mismatch: expected=", guest: func(g *guest) { g.vm.CPUCount = 2 }},
		{name: "an image that nobody has", legacy: true, prefix: prefixImage, text: "has not got this image", guest: func(g *guest) { g.vm.OSImageHash = zeros }},
		{name: "a document in place of the image", legacy: true, prefix: prefixImage, text: "has not got this image", guest: func(g *guest) {
			g.vm.OSImageHash = zeros
			g.vm.TDXMeasurement = &measure.Split{ChecksumFile: lite.Sums, Measurement: lite.TDX}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := *base
			if c.legacy {
				g = *legacyBase
			}
			valid(t, s.Verify(t.Context(), g.attestation()))
			if c.guest != nil {
				c.guest(&g)
			}
			ev := g.evidence()
			ev.EventLog = append([]eventlog.Event{}, ev.EventLog...)
			if c.evidence != nil {
				c.evidence(ev)
			}
			r := contain(t, ev)
			if c.request != nil {
				c.request(r)
			}
			invalid(t, s.Verify(t.Context(), r), c.prefix, c.text)
		})
	}
}

// As GetQuote replies, whose report_data are a claim, and whose log says registers.
func TestClaimsOfARawRequestAreCompared(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, g.roots(), nil)
	for _, c := range []struct {
		name, prefix, text string
		edit               func(*Request)
	}{
		{"other report data", prefixQuote, "tdx report_data mismatch", func(r *Request) { r.ReportData = ptr(strings.Repeat("ab", 64)) }},
		{"report data of 32 bytes", prefixInternal, "report_data", func(r *Request) { r.ReportData = ptr(strings.Repeat("ab", 32)) }},
		{"a runtime event of another register", prefixLog, "belong to register 3", func(r *Request) {
			r.EventLog = ptr(strings.Replace(*r.EventLog, `"imr":3`, `"imr":2`, 1))
		}},
		{"a log that is no list", prefixInternal, "", func(r *Request) { r.EventLog = ptr(`{}`) }},
		{"no configuration", prefixImage, "os_image_hash", func(r *Request) { r.VMConfig = nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := g.raw()
			valid(t, s.Verify(t.Context(), r))
			c.edit(r)
			invalid(t, s.Verify(t.Context(), r), c.prefix, c.text)
		})
	}
	// What is claimed does not make evidence fresh; what is expected does.
	r := g.raw()
	if out := s.Verify(t.Context(), r); out.Verdict.Freshness != verifier.FreshNone {
		t.Error(show(out))
	}
	r.ExpectedReportData = r.ReportData
	if out := s.Verify(t.Context(), r); out.Verdict.Freshness != verifier.FreshReportData {
		t.Error(show(out))
	}
	// A sys-config that nests the configuration is read as well.
	nested, err := json.Marshal(map[string]any{"vm_config": *r.VMConfig, "docker_registry": "x"})
	check(t, err)
	r.VMConfig = ptr(string(nested))
	valid(t, s.Verify(t.Context(), r))
}

// unlogged leaves the firmware's events out, as stripped logs do.
func unlogged(e *attest.Evidence) { e.EventLog = eventlog.Runtime(e.EventLog) }

// reboot gives a guest another runtime log, measured.
func reboot(g *guest, runtime []eventlog.Event) {
	g.log = append(append([]eventlog.Event{}, g.log[:len(g.log)-len(eventlog.Runtime(g.log))]...), runtime...)
	r, err := eventlog.Replay(g.log, 3)
	check(g.t, err)
	g.body.RTMR[3] = r
}

func TestMismatchesAreExplainedOnRequest(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, g.roots(), nil)
	other := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	l := other.release.Launch
	l.Cmdline += " evil"
	shape, err := g.vm.Shape()
	check(t, err)
	l.ACPI = &shape
	m, err := measure.ComputeTDX(l)
	check(t, err)
	g.boot(m, runtimeLog(t))
	r := g.attestation()
	r.Debug = true
	out := s.Verify(t.Context(), r)
	invalid(t, out, prefixImage, "RTMR2 mismatch")
	if len(out.Details.RTMRDebug) != 1 {
		t.Fatal(show(out))
	}
	d := out.Details.RTMRDebug[0]
	if d.RTMR != "RTMR2" || len(d.Events) != 2 || d.Events[0].Status != "mismatch" || d.Events[1].Status != "match" || d.Expected == d.Actual || d.Actual != g.body.RTMR[2].String() {
		t.Errorf("%+v", d)
	}
	// A stripped log: what is expected is missing.
	ev := g.evidence()
	var short []eventlog.Event
	for _, e := range ev.EventLog {
		if e.IsACPI() || e.IsRuntime() {
			short = append(short, e)
		}
	}
	ev.EventLog = short
	r = contain(t, ev)
	r.Debug = true
	out = s.Verify(t.Context(), r)
	if d := out.Details.RTMRDebug; len(d) != 1 || len(d[0].Events) != 2 || d[0].Events[0].Status != "missing" || len(d[0].MissingExpected) != 2 {
		t.Error(show(out))
	}
	r.Debug = false
	if out = s.Verify(t.Context(), r); out.Details.RTMRDebug != nil {
		t.Error(show(out))
	}
}

// B10: an image hash minted by the evidence itself. Upstream's member is true, since
// the evidence is consistent with itself; the verdict says that this is all it is.
func TestThreat_B10_MintedImageHashIsSelfConsistentOnly(t *testing.T) {
	r := imagetest.New(t, "0.6.0", false)
	r.Sums = append(r.Sums, []byte(strings.Repeat("ab", 32)+"  evil.bin\n")...)
	r.Hash = sha256.Sum256(r.Sums)
	g := newGuest(t, r, true)
	s := setup(t, g.roots(), nil)
	compose := sha256.Sum256([]byte("compose"))
	q := g.attestation()
	q.Policy = []byte(`{"tcb":{"accept":["UpToDate"]},"workload":{"compose_hashes":["` + hex.EncodeToString(compose[:]) + `"],"allow_uncommitted":true}}`)
	out := s.Verify(t.Context(), q)
	valid(t, out)
	v := out.Verdict
	if v.Accepted || !hasError(v, "image_unanchored") {
		t.Error(show(out))
	}
	for _, a := range v.Anchors {
		if a.What == "os_image_hash" {
			t.Errorf("the hash is anchored: %+v", a)
		}
	}
	found := false
	for _, a := range v.SelfConsistent {
		found = found || a.What == "os_image_hash" && a.Value == r.Hash.String()
	}
	if !found {
		t.Error("the hash is not listed as self-consistent", show(out))
	}
}

// B04: a platform that is out of date is valid, as upstream has it, and is refused by
// the verdict under the default policy.
func TestThreat_B04_OutOfDateIsValidAndNotAccepted(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, tdx.OutOfDate, "INTEL-SA-00001"))})
	s := setup(t, g.roots(), nil)
	out := s.Verify(t.Context(), g.attestation())
	valid(t, out)
	if *out.Details.TCBStatus != "OutOfDate" || len(out.Details.AdvisoryIDs) != 1 || out.Details.BootInfo.TCBStatus != "OutOfDate" {
		t.Error(show(out))
	}
	if out.Verdict.Accepted || !hasError(out.Verdict, "tcb_status") {
		t.Error(show(out))
	}
	// Revoked is not even valid.
	g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, "Revoked"))})
	s = setup(t, g.roots(), nil)
	invalid(t, s.Verify(t.Context(), g.attestation()), prefixQuote, "")
}

// B03: of a product under production roots the service remembers the newest
// statement, and its verdict refuses an older one that is signed and has not expired.
func TestThreat_B03_TheServiceRemembersTheNewestCollateral(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, g.roots(), nil)
	roots := g.platform.Roots()
	roots.Trust = dstack.TrustProduction
	s.roots, s.dev = []attest.Roots{roots}, nil
	ask := func(number int, at *string) *Response {
		g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tcbEvaluationDataNumber", number)
		r := g.attestation()
		r.Collateral, r.At = &collateral.Bundle{TDX: g.platform.Collateral()}, at
		return s.Verify(t.Context(), r)
	}
	g.platform.QEIdentity = tdxtest.Edit(g.platform.QEIdentity, "tcbEvaluationDataNumber", 99)
	for _, c := range []struct {
		number int
		at     *string
		old    bool
	}{{18, nil, false}, {17, nil, true}, {18, nil, false}, {17, ptr(tdxtest.At.Format(time.RFC3339)), false}, {19, nil, false}, {18, nil, true}} {
		out := ask(c.number, c.at)
		if out.Verdict.Signature != verifier.SignatureValid || hasError(out.Verdict, "collateral_rollback") != c.old {
			t.Errorf("number %d, time stated %v: %s", c.number, c.at != nil, show(out))
		}
	}
}

// awsGuest is an instance with a NitroTPM that booted what its document says.
func awsGuest(t *testing.T) (*nitrotest.Module, *attest.Evidence) {
	t.Helper()
	log := runtimeLog(t)
	pcr14, err := eventlog.ReplayRuntime(log, "sha-384")
	check(t, err)
	m := nitrotest.NewTPM(t)
	pcrs := m.Doc["nitrotpm_pcrs"].(map[any]any)
	pcrs[14] = pcr14
	h := sha256.New()
	for _, i := range []int{4, 7, 12} {
		h.Write(pcrs[i].([]byte))
	}
	doc, err := (&measure.AWSDocument{BootPCRs: [32]byte(h.Sum(nil))}).Marshal()
	check(t, err)
	sums := []byte(hex.EncodeToString(sum(doc)) + "  " + measure.AWSDocumentName + "\n")
	vm := measure.VMConfig{OSImageHash: hex.EncodeToString(sum(sums)), NumNICs: 1, AWSMeasurement: &measure.Split{ChecksumFile: sums, Measurement: doc}}
	config, err := json.Marshal(vm)
	check(t, err)
	ev := m.Evidence()
	ev.EventLog, ev.Config, ev.ReportDataClaimed = log, string(config), true
	copy(ev.ReportData[:], bytes.Repeat([]byte{0xda}, 64))
	return m, ev
}

func sum(b []byte) []byte { s := sha256.Sum256(b); return s[:] }

// B18: upstream makes a status up for NitroTPM.
func TestThreat_B18_NitroTPMIsNotCalledUpToDate(t *testing.T) {
	m, ev := awsGuest(t)
	s := setup(t, m.DevRoots(), func(c *Config, o *Options) { o.Now = func() time.Time { return nitrotest.At } })
	out := s.Verify(t.Context(), contain(t, ev))
	valid(t, out)
	if *out.Details.TEEVariant != "dstack-aws-nitro-tpm" || *out.Details.TCBStatus != "NotReported" || out.Details.BootInfo.TCBStatus != "NotReported" || !out.Details.EventLogVerified {
		t.Error(show(out))
	}
	if out.Verdict.Accepted || !hasError(out.Verdict, "tcb_status") {
		t.Error(show(out))
	}
	for _, c := range []struct {
		name, prefix, text string
		edit               func(*attest.Evidence)
	}{
		{"other report data than claimed", prefixQuote, "NSM user_data does not match report_data", func(e *attest.Evidence) { e.ReportData[0] ^= 1 }},
		{"an altered log", prefixQuote, "PCR14 mismatch, quoted: ", func(e *attest.Evidence) { e.EventLog = e.EventLog[:len(e.EventLog)-1] }},
		{"another document", prefixImage, "boot_pcr_digest mismatch", func(e *attest.Evidence) {
			doc, err := (&measure.AWSDocument{BootPCRs: [32]byte{1}}).Marshal()
			check(t, err)
			sums := []byte(hex.EncodeToString(sum(doc)) + "  " + measure.AWSDocumentName + "\n")
			text, err := json.Marshal(measure.VMConfig{OSImageHash: hex.EncodeToString(sum(sums)), NumNICs: 1, AWSMeasurement: &measure.Split{ChecksumFile: sums, Measurement: doc}})
			check(t, err)
			e.Config = string(text)
		}},
		{"no document", prefixImage, "aws_measurement is required", func(e *attest.Evidence) {
			e.Config = `{"os_image_hash":"` + strings.Repeat("0", 64) + `"}`
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := *ev
			c.edit(&e)
			invalid(t, s.Verify(t.Context(), contain(t, &e)), c.prefix, c.text)
		})
	}
}

// gcpGuest is a VM on Google Cloud: a TD that booted through the firmware and image of
// a real one's log, and its vTPM.
func gcpGuest(t *testing.T) (*guest, *collateral.DevRoots, *attest.Evidence, *tpmtest.Machine) {
	t.Helper()
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	log, err := eventlog.ParseTPMLog(testkit.Vectors(t, "attestation/gcp/tpm_eventlog.bin"))
	check(t, err)
	events, err := tpm.Events(log, eventlog.BankSHA256, tpm.GCPFirmwarePCR, tpm.GCPImagePCR)
	check(t, err)
	m := tpmtest.New(t)
	for _, e := range events {
		m.Extend(e.Index, e.Digest)
	}
	for _, e := range runtimeLog(t) {
		m.Extend(tpm.GCPRuntimePCR, sum(eventlog.PreimageOf(e)))
	}
	uki, err := hex.DecodeString("9ab14a46f858662a89adc102d2a57a13f52f75c1769d65a4c34edbbfc8855f0f")
	check(t, err)
	doc, err := (&measure.GCPDocument{UKI: [32]byte(uki)}).Marshal()
	check(t, err)
	sums := []byte(hex.EncodeToString(sum(doc)) + "  " + measure.GCPDocumentName + "\n")
	g.vm = measure.VMConfig{OSImageHash: hex.EncodeToString(sum(sums)), NumNICs: 1, GCPMeasurement: &measure.Split{ChecksumFile: sums, Measurement: doc}}
	ev := g.evidence()
	ev.EventLog = eventlog.Runtime(ev.EventLog)
	ev.TPMQuote = m.Quote(sum(ev.Quote), tpm.GCPFirmwarePCR, tpm.GCPImagePCR, tpm.GCPRuntimePCR)
	ev.TPMQuote.Platform = 1
	dev, vtpm := g.roots(), m.DevRoots()
	dev.TPMRootPEM, dev.Certificates, dev.CRLs = vtpm.TPMRootPEM, vtpm.Certificates, vtpm.CRLs
	return g, dev, ev, m
}

func TestGoogleCloudGuestIsValid(t *testing.T) {
	_, dev, ev, m := gcpGuest(t)
	s := setup(t, dev, nil)
	out := s.Verify(t.Context(), contain(t, ev))
	valid(t, out)
	if *out.Details.TEEVariant != "dstack-gcp-tdx" || *out.Details.TCBStatus != "UpToDate" {
		t.Error(show(out))
	}
	good := *ev
	ev.TPMQuote = m.Quote(sum([]byte("another quote")), 0, 2, 14)
	ev.TPMQuote.Platform = 1
	invalid(t, s.Verify(t.Context(), contain(t, ev)), prefixQuote, "tpm qualified_data mismatch")
	none := good
	none.Config = `{"os_image_hash":"` + strings.Repeat("0", 64) + `"}`
	invalid(t, s.Verify(t.Context(), contain(t, &none)), prefixImage, "gcp_measurement is required")
	m.Measure(tpm.GCPFirmwarePCR, "another firmware")
	other := good
	other.TPMQuote = m.Quote(sum(other.Quote), 0, 2, 14)
	other.TPMQuote.Platform = 1
	invalid(t, s.Verify(t.Context(), contain(t, &other)), prefixImage, "PCR 0")
}

func TestSEVSNPReasonsAreUpstreams(t *testing.T) {
	s := setup(t, nil, func(c *Config, o *Options) {
		o.Now = func() time.Time { return time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC) }
	})
	for _, c := range []struct {
		name, prefix, text string
		edit               func(*attest.Evidence)
	}{
		{"an altered report", prefixQuote, "", func(e *attest.Evidence) { e.Quote[0x90] ^= 1 }},
		{"other report data than claimed", prefixQuote, "amd sev-snp report_data mismatch", func(e *attest.Evidence) { e.ReportData[0] ^= 1 }},
		{"another document", prefixQuote, "amd sev-snp HOST_DATA mismatch, quoted: 783f0057", func(e *attest.Evidence) { e.MRConfig += " " }},
		{"no measurement document", prefixImage, "sev_snp_measurement is required", func(e *attest.Evidence) {
			e.Config = `{"os_image_hash":"` + strings.Repeat("0", 64) + `"}`
		}},
		{"another shape of VM", prefixImage, "amd sev-snp measurement mismatch", func(e *attest.Evidence) {
			e.Config = strings.Replace(e.Config, `\"vcpus\":`, `\"vcpus\":1`, 1)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			raw, err := hex.DecodeString(*realRequest(t, "sev-snp/verifier-sev-snp-attestation.json").Attestation)
			check(t, err)
			ev, err := container.Decode(raw)
			check(t, err)
			valid(t, s.Verify(t.Context(), contain(t, ev)))
			before := ev.Config
			c.edit(ev)
			if c.name == "another shape of VM" && before == ev.Config {
				t.Fatal("the edit did nothing")
			}
			invalid(t, s.Verify(t.Context(), contain(t, ev)), c.prefix, c.text)
		})
	}
}

// A SEV-SNP request whose chain is complete is answered although the revocation list
// cannot be had, and the verdict says what is missing.
func TestMissingRevocationListsAreTheVerdictsAffair(t *testing.T) {
	s := setup(t, nil, func(c *Config, o *Options) {
		o.Now = func() time.Time { return time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC) }
	})
	out := s.Verify(t.Context(), realRequest(t, "sev-snp/verifier-sev-snp-attestation.json"))
	valid(t, out)
	if out.Verdict.Accepted || !hasError(out.Verdict, "crl_missing") {
		t.Error(show(out))
	}
}

func TestCollateralOfTheRequestDecidesAlone(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, g.roots(), nil)
	r := g.attestation()
	r.Collateral = &collateral.Bundle{}
	invalid(t, s.Verify(t.Context(), r), prefixQuote, "collateral")
	if n := s.source.(*unreachable).asked.Load(); n != 0 {
		t.Errorf("the network was asked %d times", n)
	}
	// At another time the same collateral has run out.
	r.Collateral, r.At = s.dev, ptr("2026-03-01T00:00:00Z")
	invalid(t, s.Verify(t.Context(), r), prefixQuote, "")
}

// Without the permission, a development guest is nobody's.
func TestDevelopmentEvidenceIsNothingToAProductionService(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, nil, nil)
	r := g.attestation()
	r.Collateral = g.roots().Bundle()
	invalid(t, s.Verify(t.Context(), r), prefixQuote, "")
	r.Policy = []byte(`{"tcb":{"accept":["UpToDate"]}}`)
	invalid(t, s.Verify(t.Context(), r), prefixQuote, "")
}

func TestConfiguredRootsReplaceTheVendors(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, nil, func(c *Config, o *Options) {
		known(t, c, g)
		o.Collateral = collateral.Static{Bundle: g.roots().Bundle()}
	})
	out := s.Verify(t.Context(), g.attestation())
	valid(t, out)
	if out.Verdict.Trust != dstack.TrustDevelopment {
		t.Error(show(out))
	}
	for _, r := range s.roots {
		if r.TEE == dstack.TDX && r.Trust == dstack.TrustProduction && len(r.CA) > 0 {
			t.Error("the vendor's root still counts")
		}
		if r.TEE == dstack.SEVSNP && len(r.CA) != 3 {
			t.Error("roots of another TEE were removed")
		}
	}
	leaf := filepath.Join(t.TempDir(), "leaf.der")
	check(t, os.WriteFile(leaf, g.platform.PCK.Cert.Raw, 0o600))
	c := DefaultConfig()
	c.ImageCacheDir = t.TempDir()
	c.Attestation.InsecureAllowExternalTrustAnchors, c.Attestation.RootCA.TDX = true, leaf
	if _, err := New(c, Options{}); fault.Code(err) != "trust_anchor" {
		t.Errorf("a root that is no authority: %v", err)
	}
}
