// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
)

// outOfDate makes the guest's TDX module one that was superseded.
func (g *guest) outOfDate(r *request) {
	g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, tdx.OutOfDate, "INTEL-SA-00001"))})
	r.col = &collateral.Bundle{TDX: g.platform.Collateral()}
}

func refusedFor(t *testing.T, v *Verdict, code string) {
	t.Helper()
	if v.Accepted || v.Undecided || !v.Has(Error, code) {
		t.Errorf("want a refusal for %s%s", code, show(v))
	}
}

// A01: a quote that is valid in every respect, of a machine that is not listed.
func TestThreat_A01_ValidQuoteOfAnUnlistedDevice(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	v := r.appraise(g.evidence())
	if !v.Accepted {
		t.Fatal(show(v))
	}
	r.pol.Devices = []dstack.DeviceID{v.Platform.DeviceID}
	if v := r.appraise(g.evidence()); !v.Accepted {
		t.Error(show(v))
	}
	r.pol.Devices = []dstack.DeviceID{{1}, {2}}
	refusedFor(t, r.appraise(g.evidence()), "device_not_allowed")
}

// A02: a processor family known to be broken.
func TestThreat_A02_DeniedFamilyIsRefused(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	r.pol.TDX.DenyFMSPC = []string{"90c06f000000"}
	refusedFor(t, r.appraise(g.evidence()), "platform_denied")
	r.pol.TDX = TDXPolicy{AllowFMSPC: []string{"90c06f000000"}}
	if v := r.appraise(g.evidence()); !v.Accepted {
		t.Error(show(v))
	}
	r.pol.TDX.AllowFMSPC = []string{"b0c06f000000"}
	refusedFor(t, r.appraise(g.evidence()), "platform_denied")
}

// B03: of two signed statements, both unexpired, the older is refused once the
// newer was seen.
func TestThreat_B03_OlderCollateralBelowTheFloor(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	r.pol.TCB.MinEvaluation = 18
	if v := r.appraise(g.evidence()); !v.Accepted || v.Platform.TCBEvaluation != 18 {
		t.Fatal(show(v))
	}
	for _, which := range []struct {
		name string
		doc  *tdxtest.JSON
	}{{"TCB info", &g.platform.TCBInfo}, {"QE identity", &g.platform.QEIdentity}} {
		whole := *which.doc
		*which.doc = tdxtest.Edit(whole, "tcbEvaluationDataNumber", 17)
		r.col = &collateral.Bundle{TDX: g.platform.Collateral()}
		*which.doc = whole
		refusedFor(t, r.appraise(g.evidence()), "tcb_evaluation_low")
	}
}

// B03 as the command keeps it: the highest number seen of a product is a floor in
// every scope, but not for development roots, whose numbers mean nothing.
func TestThreat_B03_HighestNumberSeenIsAFloor(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	roots := g.platform.Roots()
	roots.Trust = dstack.TrustProduction
	r.roots, r.pol.Image.AllowLite = []attest.Roots{roots}, true
	for floor, ok := range map[uint32]bool{0: true, 18: true, 19: false} {
		for _, scope := range []string{ScopeWorkload, ScopeSignature} {
			r.pol.Floor, r.pol.Scope = floor, scope
			if v := r.appraise(g.evidence()); v.Accepted != ok || !ok && !v.Has(Error, "collateral_rollback") {
				t.Errorf("floor %d, scope %s%s", floor, scope, show(v))
			}
		}
	}
	r = g.request()
	r.pol.Floor = 19
	if v := r.appraise(g.evidence()); !v.Accepted {
		t.Error(show(v))
	}
}

// B04: status × policy × age. The zero policy denies, and only what a policy names
// passes.
func TestThreat_B04_OnlyNamedStatusesPass(t *testing.T) {
	published := time.Date(2025, 5, 14, 0, 0, 0, 0, time.UTC)
	for _, status := range append(slices.Clone(tcbStatuses), tdx.Revoked, tdx.Unsupported, "", "uptodate") {
		for _, named := range tcbStatuses {
			p := TCBPolicy{Accept: []string{named}}
			if ok, grace := p.accepts(status, published, published); ok != (status == named) || grace {
				t.Errorf("status %q under accept %q: %v", status, named, ok)
			}
		}
		if ok, _ := (TCBPolicy{}).accepts(status, published, published); ok {
			t.Errorf("the zero policy accepts %q", status)
		}
		grace := TCBPolicy{Accept: []string{"UpToDate"}, GraceDays: 30}
		current := slices.Contains(tcbStatuses, status) && status != attest.NotReported
		for days, within := range map[int]bool{0: true, 30: true, 31: false} {
			ok, _ := grace.accepts(status, published, published.AddDate(0, 0, days))
			if want := status == "UpToDate" || current && within; ok != want {
				t.Errorf("status %q, %d days old, 30 of grace: %v", status, days, ok)
			}
		}
		if ok, _ := grace.accepts(status, time.Time{}, published); ok != (status == "UpToDate") {
			t.Errorf("status %q of unknown date has grace", status)
		}
	}
	g := newGuest(t)
	r := g.request()
	g.outOfDate(r)
	refusedFor(t, r.appraise(g.evidence()), "tcb_status")
	r.pol = Policy{DevRoots: true}
	refusedFor(t, r.appraise(g.evidence()), "policy_zero")
}

// B17: every hash of a policy has exactly its length.
func TestThreat_B17_PolicyHashesHaveOneLength(t *testing.T) {
	for key, size := range map[string]int{
		`{"workload":{"compose_hashes":["%s"]}}`: 32, `{"workload":{"app_id":"%s"}}`: 20, `{"workload":{"instance_id":"%s"}}`: 20,
		`{"workload":{"os_image_hashes":["%s"]}}`: 32, `{"devices":["%s"]}`: 32,
	} {
		for _, n := range []int{0, 1, size - 1, size, size + 1, 64} {
			_, err := ParsePolicy(fmt.Appendf(nil, key, strings.Repeat("ab", n)))
			if n == size && err != nil || n != size && fault.Code(err) != "policy_malformed" {
				t.Errorf("%s with %d bytes: %v", key, n, err)
			}
		}
	}
}

// D01: tables of the host's own making, whose code the guest's kernel would run,
// are seen in RTMR0, whatever the log says of them.
func TestThreat_D01_ForeignACPITablesAreSeen(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	g.tables = &dstack.Measurement{0xba, 0xda}
	refusedFor(t, r.appraise(g.evidence()), "acpi_mismatch")
	// A log that says otherwise does not lead to RTMR0.
	vm := g.vm()
	genuine, err := vm.ACPIDigests()
	g.check(err)
	g.edit.evidence = func(e *attest.Evidence) {
		i := 0
		for j := range e.EventLog {
			if e.EventLog[j].IsACPI() {
				e.EventLog[j].Digest = genuine[i][:]
				i++
			}
		}
	}
	refusedFor(t, r.appraise(g.evidence()), "rtmr0_mismatch")
	g.edit.evidence = nil
	// Where the shape is not stated nobody can tell, and production refuses.
	roots := g.platform.Roots()
	roots.Trust = dstack.TrustProduction
	r.roots = []attest.Roots{roots}
	g.edit.vm = unknownShape
	refusedFor(t, r.appraise(g.evidence()), "acpi_not_checked")
}

// D13: registers follow from the shape of the VM, so nobody need loosen a check for
// another number of processors, memory or devices; a shape that is not the VM's
// does not give its registers.
func TestThreat_D13_ShapesGiveTheirOwnRegisters(t *testing.T) {
	for _, vcpus := range []int{1, 4, 16} {
		for _, memory := range []uint64{2 << 30, 8 << 30} {
			g := newGuest(t)
			g.launch.VCPUs, g.launch.MemoryBytes = vcpus, memory
			if v := g.request().appraise(g.evidence()); !v.Accepted || v.Has(Warning, "acpi_not_checked") {
				t.Errorf("%d processors, %d bytes: %s", vcpus, memory, show(v))
			}
		}
	}
	for name, lie := range map[string]func(*measure.VMConfig){
		"processors":      func(c *measure.VMConfig) { c.CPUCount++ },
		"devices":         func(c *measure.VMConfig) { c.Endpoints++ },
		"the version":     func(c *measure.VMConfig) { c.QEMUVersion = "8.2.2" },
		"hot plug":        func(c *measure.VMConfig) { c.HotplugOff = true },
		"the 64-bit hole": func(c *measure.VMConfig) { c.PCIHole64Size = 1 << 40 },
	} {
		g := newGuest(t)
		r := g.request()
		g.edit.vm = lie
		if v := r.appraise(g.evidence()); v.Accepted || !v.Has(Error, "acpi_mismatch") {
			t.Errorf("a lie about %s: %s", name, show(v))
		}
	}
}

// D11: an image that is older than the least epoch.
func TestThreat_D11_OlderImageIsRefused(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	three := 3
	r.ref.OSEpoch, r.pol.Image.MinEpoch = &three, 3
	if v := r.appraise(g.evidence()); !v.Accepted {
		t.Error(show(v))
	}
	r.pol.Image.MinEpoch = 4
	refusedFor(t, r.appraise(g.evidence()), "os_epoch_low")
	r.ref.OSEpoch = nil
	refusedFor(t, r.appraise(g.evidence()), "os_epoch_unknown")
}

// D12: a development image that is expected by name, under production roots.
func TestThreat_D12_DevelopmentImageUnderProductionRoots(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	roots := g.platform.Roots()
	roots.Trust = dstack.TrustProduction
	dev := true
	r.roots, r.ref.DevImage, r.pol.Image.AllowLite = []attest.Roots{roots}, &dev, true
	refusedFor(t, r.appraise(g.evidence()), "dev_image")
	dev = false
	if v := r.appraise(g.evidence()); !v.Accepted || v.Trust != dstack.TrustProduction {
		t.Error(show(v))
	}
}

// B14 the other way round: a production quote is not accepted under development
// roots alone, nor graded by development collateral.
func TestThreat_B14_RealEvidenceUnderDevelopmentRoots(t *testing.T) {
	g := newGuest(t)
	other := newGuest(t)
	r := g.request()
	r.roots = []attest.Roots{other.platform.Roots()}
	refusedFor(t, r.appraise(g.evidence()), "unknown_root")
	r = g.request()
	r.roots = append(r.roots, other.platform.Roots())
	r.col = &collateral.Bundle{TDX: other.platform.Collateral()}
	if v := r.appraise(g.evidence()); v.Accepted || v.Claims != nil || v.Signature != SignatureInvalid {
		t.Error(show(v))
	}
}

// A verdict of scope signature judges the signature alone, and says so.
func TestSignatureScope(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	r.pol = SignaturePolicy()
	r.pol.DevRoots = true
	r.ref, r.fresh = Reference{}, Freshness{}
	g.outOfDate(r)
	g.edit.body = func(b *tdx.ReportBody) { b.TDAttributes[0] |= 1 }
	v := r.appraise(g.evidence())
	if !v.Accepted || v.Scope != ScopeSignature || v.Signature != SignatureValid || v.TCBStatus != tdx.OutOfDate || v.Workload != nil || !v.Has(Warning, "td_debug") {
		t.Error(show(v))
	}
	if !strings.HasPrefix(v.String(), "scope: signature") {
		t.Error(v.String())
	}
	// What is wrong with signature, chain or collateral refuses all the same.
	r.col = &collateral.Bundle{TDX: newGuest(t).platform.Collateral()}
	if v := r.appraise(g.evidence()); v.Accepted || v.Signature != SignatureInvalid || v.Claims != nil {
		t.Error(show(v))
	}
	r.col = nil
	if v := r.appraise(g.evidence()); v.Accepted || !v.Undecided || !v.Has(Error, "collateral_missing") {
		t.Error(show(v))
	}
	// Report data that the caller demands are still compared.
	r = g.request()
	r.pol = Policy{Scope: ScopeSignature, DevRoots: true}
	r.fresh = Freshness{ReportData: make([]byte, 64)}
	g.platform.TCBInfo = tdxtest.New(t).TCBInfo
	refusedFor(t, r.appraise(g.evidence()), "report_data_mismatch")
}

func TestPolicyDocuments(t *testing.T) {
	full := `{"scope":"workload","tees":["tdx"],"tcb":{"accept":["UpToDate","NotReported"],"grace_days":30,"min_evaluation":17},
		"advisories":{"deny":["INTEL-SA-00289"],"accept":["INTEL-SA-00828"]},"registers":{"mrtd":["00"]},
		"tdx":{"deny_fmspc":["00806f050000"],"attributes":["pks"],"min_module_svn":5},"workload":{"allow_uncommitted":true},
		"snp":{"products":["Genoa"],"min_tcb":{"Genoa":{"snp":14,"microcode":70}},"allow_vlek":true},
		"image":{"min_epoch":2},"evidence":{"require_fresh":true,"max_age_seconds":600},"allow_debug":false}`
	p, err := ParsePolicy([]byte(full))
	if err != nil {
		t.Fatal(err)
	}
	again, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if back, err := ParsePolicy(again); err != nil || back.SNP.MinTCB["Genoa"].Microcode != 70 {
		t.Errorf("%+v, %v", back, err)
	}
	for name, text := range map[string]string{
		"an unknown key":                  `{"tbc":{}}`,
		"an unknown key below":            `{"tcb":{"acept":["UpToDate"]}}`,
		"a key twice":                     `{"allow_debug":false,"allow_debug":true}`,
		"a status that does not exist":    `{"tcb":{"accept":["Fine"]}}`,
		"a status that is never accepted": `{"tcb":{"accept":["Revoked"]}}`,
		"an unknown scope":                `{"scope":"all"}`,
		"an unknown TEE":                  `{"tees":["sgx"]}`,
		"an unknown product":              `{"snp":{"products":["Rome"]}}`,
		"a least TCB of no product":       `{"snp":{"min_tcb":{"Rome":{}}}}`,
		"an SVN beyond a byte":            `{"snp":{"min_tcb":{"Genoa":{"snp":256}}}}`,
		"an attribute that is none":       `{"tdx":{"attributes":["debug"]}}`,
		"an FMSPC in capitals":            `{"tdx":{"deny_fmspc":["00806F050000"]}}`,
		"a negative grace":                `{"tcb":{"grace_days":-1}}`,
		"a negative age":                  `{"evidence":{"max_age_seconds":-1}}`,
		"development roots by a file":     `{"dev_roots":true}`,
		"no object":                       `[]`,
		"nothing":                         ``,
	} {
		if _, err := ParsePolicy([]byte(text)); fault.Code(err) != "policy_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte(`{"tcb":{"accept":["UpToDate"]},"devices":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := ParsePolicy(data); err != nil && fault.Code(err) != "policy_malformed" {
			t.Fatalf("an error without its code: %v", err)
		}
	})
}

// mutableService has the engine's socket, and is privileged by a merged mapping.
const mutableService = "services:\n  helper:\n    image: hello:1\n    <<: {privileged: true}\n    volumes: ['/var/run/docker.sock:/s']\n"

// A relying party reads in the verdict which containers could replace what runs, and
// why; an app without any has no such finding.
func TestThreat_J02_VerdictNamesWhatCouldChange(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	if v := r.appraise(g.evidence()); slices.ContainsFunc(v.Findings, func(f Finding) bool { return f.Code == "mutable" }) {
		t.Errorf("a plain app is called mutable%s", show(v))
	}
	d := draft()
	d.DockerComposeFile = mutableService
	remanifest(g, r, d)
	v := r.appraise(g.evidence())
	i := slices.IndexFunc(v.Findings, func(f Finding) bool { return f.Code == "mutable" })
	if i < 0 || v.Accepted || v.Findings[i].Level != Error {
		t.Fatalf("not refused%s", show(v))
	}
	for _, want := range []string{"helper: mounts the engine's socket (/run/docker.sock)", "helper: is privileged"} {
		if !strings.Contains(v.Findings[i].Message, want) {
			t.Errorf("%q lacks %q", v.Findings[i].Message, want)
		}
	}
}
