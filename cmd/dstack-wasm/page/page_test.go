// SPDX-License-Identifier: Apache-2.0

package page_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/cmd/dstack-wasm/page"
	"github.com/dstack-go/dstack/cmd/dstack-wasm/page/pagetest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/verifier"
	"github.com/dstack-go/dstack/verifier/verifiertest"
)

func TestCases(t *testing.T) {
	for _, c := range pagetest.Cases(t) {
		t.Run(c.Name, func(t *testing.T) { c.Check(t, c.Native()) })
	}
}

// The page decides as a caller of the verifier does who has the same in hand.
func TestThePageDecidesAsTheVerifier(t *testing.T) {
	i := verifiertest.New(t, "hello")
	src, err := i.Answer(pagetest.Nonce, true)
	if err != nil {
		t.Fatal(err)
	}
	evidence, err := json.Marshal(src)
	if err != nil {
		t.Fatal(err)
	}
	options := map[string]any{
		"at": verifiertest.At, "nonce": hex.EncodeToString(pagetest.Nonce), "asked": true,
		"compose_hash": i.ComposeHash(), "app_id": i.AppID, "instance_id": i.InstanceID, "os_image_hash": i.ImageHash,
		"lock": string(i.Lock()), "dev_roots": string(i.DevRoots()),
	}
	raw, err := json.Marshal(options)
	if err != nil {
		t.Fatal(err)
	}
	got := page.Verify(evidence, raw, time.Now())

	req := verifier.Request{Source: src, At: verifiertest.At, Collateral: i.Collateral(), Policy: verifier.DefaultPolicy()}
	req.Roots = append(verifier.VendorRoots(), i.Platform.Roots())
	req.Policy.DevRoots, req.Policy.Evidence.RequireFresh = true, true
	req.Freshness.Nonce = pagetest.Nonce
	l, err := lock.Parse(i.Lock())
	if err != nil {
		t.Fatal(err)
	}
	req.Reference.AddLock(l, "the lock file")
	req.Reference.AddComposeHash(i.ComposeHash(), "the expected compose hash")
	req.Reference.AddAppID(i.AppID, "the expected app id")
	req.Reference.AddInstanceID(i.InstanceID, "the expected instance id")
	req.Reference.AddImageHash(i.ImageHash, "the expected OS image hash")
	want, err := json.Marshal(verifier.Appraise(req))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the page says\n%s\nthe verifier\n%s", got, want)
	}
}

// Threat C06: a browser shows no page the key of a connection, and the verdict
// says that nothing ties the evidence to one.
func TestThreat_C06_TheVerdictSaysThatTheConnectionIsUnknown(t *testing.T) {
	for _, c := range pagetest.Cases(t)[:1] {
		var v verifier.Verdict
		var loose struct {
			Accepted bool
			Channel  string
			Findings []verifier.Finding
		}
		if err := json.Unmarshal(c.Native(), &loose); err != nil {
			t.Fatal(err)
		}
		v.Findings = loose.Findings
		if !loose.Accepted || loose.Channel != verifier.ChannelNone || !v.Has(verifier.Warning, "channel_unbound") {
			t.Errorf("%s: %+v", c.Name, loose)
		}
	}
}

// Threat F03: a browser whose clock is set back does not bring old collateral back
// to life when somebody else vouches for a later time; a stated time is obeyed.
func TestThreat_F03_TheLaterOfClockAndVouchedTimeCounts(t *testing.T) {
	at := func(now, options string) string {
		clock, err := time.Parse(time.RFC3339, now)
		if err != nil {
			t.Fatal(err)
		}
		var v struct{ At string }
		if err := json.Unmarshal(page.Verify([]byte("x"), []byte(options), clock), &v); err != nil {
			t.Fatal(err)
		}
		return v.At
	}
	for _, c := range []struct{ name, now, options, want string }{
		{"the clock alone", "2026-01-02T00:00:00Z", ``, "2026-01-02T00:00:00Z"},
		{"a clock that is behind", "2020-01-01T00:00:00Z", `{"not_before":"2026-01-01T00:00:00Z"}`, "2026-01-01T00:00:00Z"},
		{"a clock that is ahead", "2026-01-02T00:00:00Z", `{"not_before":"2026-01-01T00:00:00Z"}`, "2026-01-02T00:00:00Z"},
		{"a stated time", "2026-01-02T00:00:00Z", `{"not_before":"2026-01-01T00:00:00Z","at":"2025-06-01T02:00:00+02:00"}`, "2025-06-01T00:00:00Z"},
	} {
		if got := at(c.now, c.options); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	// And so it decides: the same evidence, a clock set back into the collateral's time.
	i := verifiertest.New(t, "hello")
	src, err := i.Answer(pagetest.Nonce, true)
	if err != nil {
		t.Fatal(err)
	}
	evidence, _ := json.Marshal(src)
	verdict := func(notBefore string) pagetest.Answer {
		options, _ := json.Marshal(map[string]any{"dev_roots": string(i.DevRoots()), "lock": string(i.Lock()), "not_before": notBefore})
		var a pagetest.Answer
		if err := json.Unmarshal(page.Verify(evidence, options, verifiertest.At), &a); err != nil {
			t.Fatal(err)
		}
		return a
	}
	if a := verdict(""); !a.Accepted {
		t.Errorf("at its time: %+v", a)
	}
	if a := verdict("2027-01-01T00:00:00Z"); a.Accepted {
		t.Errorf("a year later: %+v", a)
	}
}

// Threat M05: the empty question accepts nothing.
func TestThreat_M05_NoOptionsAcceptNothing(t *testing.T) {
	i := verifiertest.New(t, "hello")
	src, err := i.Answer(pagetest.Nonce, true)
	if err != nil {
		t.Fatal(err)
	}
	evidence, _ := json.Marshal(src)
	for _, options := range []string{"", "{}"} {
		var a pagetest.Answer
		if err := json.Unmarshal(page.Verify(evidence, []byte(options), verifiertest.At), &a); err != nil || a.Accepted {
			t.Errorf("options %q: %+v, %v", options, a, err)
		}
	}
}

func TestWants(t *testing.T) {
	if quote, _, ok := pagetest.RealQuote(t); ok {
		want := `{"tee":"tdx","fmspc":"b0c06f000000","ca":"platform"}`
		if got := page.Wants(quote, ""); string(got) != want {
			t.Errorf("TDX: %s, want %s", got, want)
		}
	}
	if got := page.Wants([]byte("?"), ""); !strings.Contains(string(got), `"code":"evidence_unknown"`) {
		t.Errorf("no evidence: %s", got)
	}
	if got := page.Wants(nil, "abacus"); !strings.Contains(string(got), `"code":"tee_unknown"`) {
		t.Errorf("no kind: %s", got)
	}
}

func TestWantsNamesWhatASEVSNPReportNeeds(t *testing.T) {
	var request struct{ Attestation string }
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/sev-snp/verifier-sev-snp-attestation.json"), &request); err != nil {
		t.Fatal(err)
	}
	var w struct {
		TEE, Product, TCB string
		ChipID            collateral.Hex `json:"chip_id"`
		VLEK              *bool
	}
	if err := json.Unmarshal(page.Wants([]byte(request.Attestation), ""), &w); err != nil {
		t.Fatal(err)
	}
	if w.TEE != "sev-snp" || w.Product == "" || len(w.ChipID) != 64 || len(w.TCB) != 16 || w.VLEK == nil {
		t.Errorf("%+v", w)
	}
}

// FuzzVerify holds that no evidence and no options make the verifier panic, answer
// anything but one JSON document, or accept without a workload.
func FuzzVerify(f *testing.F) {
	for _, c := range pagetest.Cases(f) {
		f.Add(c.Input, []byte(c.Options))
	}
	f.Fuzz(func(t *testing.T, input, options []byte) {
		out := page.Verify(input, options, time.Unix(1e9, 0))
		var a struct {
			Error    *string
			Version  int
			Accepted bool
		}
		if err := json.Unmarshal(out, &a); err != nil || (a.Error == nil) == (a.Version == 0) || a.Error != nil && a.Accepted {
			t.Fatalf("answer %s, %v", out, err)
		}
	})
}

func BenchmarkVerifyRealQuote(b *testing.B) {
	quote, col, ok := pagetest.RealQuote(b)
	if !ok {
		b.Skip("no vectors")
	}
	options, err := json.Marshal(map[string]any{"policy": "signature-only", "at": pagetest.VectorAt, "collateral": json.RawMessage(col)})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if out := page.Verify(quote, options, time.Time{}); !bytes.Contains(out, []byte(`"accepted":true`)) {
			b.Fatalf("%s", out)
		}
	}
}
