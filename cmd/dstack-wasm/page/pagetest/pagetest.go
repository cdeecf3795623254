// SPDX-License-Identifier: Apache-2.0

// Package pagetest holds what is asked of the page's verifier in tests: the same
// cases for the native code, for the module under Node and for the module in a
// browser, whose answers must be the same to the byte.
package pagetest

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/cmd/dstack-wasm/page"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/verifier/verifiertest"
)

// Case is one question and its answer. Options name the time, so that the answer
// depends on nothing else.
type Case struct {
	Name    string // a sentence
	Input   []byte
	Text    bool // Input is given as a string
	Options string

	Accepted, Undecided bool
	Codes               []string // of the findings that are errors, at least
	Error               string   // code of the error in place of a verdict
}

// VectorAt is a time at which the collateral of the real TDX quote of version 4 is current.
const VectorAt = "2025-06-19T10:32:27Z"

// RealQuote returns a real TDX quote of version 4 and its collateral; ok is false
// when the shared vectors do not lie beside the checkout.
func RealQuote(t testing.TB) (quote, collateral []byte, ok bool) {
	t.Helper()
	dir := testkit.Root() + "/../shared/vectors/attestation/tdx/dcap-qvl-tdx_quote_v4"
	quote, err := os.ReadFile(dir + ".bin")
	if err != nil {
		t.Logf("SKIP: no case of a real quote: the shared vectors are not beside the checkout (%v)", err)
		return nil, nil, false
	}
	collateral, err = os.ReadFile(dir + "_collateral.json")
	if err != nil {
		t.Fatal(err)
	}
	return quote, collateral, true
}

// Nonce is what the evidence of the cases answers.
var Nonce = bytes.Repeat([]byte{7}, 32)

// Cases returns the cases, for an instance made anew.
func Cases(t testing.TB) []Case {
	t.Helper()
	i := verifiertest.New(t, "hello")
	src, err := i.Answer(Nonce, true)
	if err != nil {
		t.Fatal(err)
	}
	evidence, err := json.Marshal(src)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := json.Marshal(i.Collateral())
	if err != nil {
		t.Fatal(err)
	}
	silent, err := json.Marshal(map[string]string{"attestation": hex.EncodeToString(src.Container)}) // as upstream's, without a nonce
	if err != nil {
		t.Fatal(err)
	}
	at := verifiertest.At.Format(time.RFC3339)
	options := func(edit func(o map[string]any)) string {
		o := map[string]any{
			"at": at, "nonce": hex.EncodeToString(Nonce), "asked": true, "dev_roots": json.RawMessage(i.DevRoots()),
			"compose_hash": i.ComposeHash().String(), "app_id": i.AppID.String(), "lock": json.RawMessage(i.Lock()),
			"policy": map[string]any{"tcb": map[string]any{"accept": []string{"UpToDate"}}},
		}
		edit(o)
		raw, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	same := func(map[string]any) {}
	set := func(name string, value any) func(map[string]any) {
		return func(o map[string]any) { o[name] = value }
	}
	without := func(names ...string) func(map[string]any) {
		return func(o map[string]any) {
			for _, n := range names {
				delete(o, n)
			}
		}
	}
	cases := []Case{
		{Name: "what was expected is accepted", Input: evidence, Options: options(same), Accepted: true},
		{Name: "documents may be strings", Input: evidence, Options: options(func(o map[string]any) {
			o["lock"], o["dev_roots"] = string(i.Lock()), string(i.DevRoots())
		}), Accepted: true},
		{Name: "collateral may be a bundle", Input: evidence, Options: options(func(o map[string]any) {
			o["collateral"] = json.RawMessage(bundle)
		}), Accepted: true},
		{Name: "collateral may be files", Input: evidence, Options: options(func(o map[string]any) {
			o["collateral_files"] = map[string][]byte{"bundle.json": bundle}
		}), Accepted: true},
		{Name: "the manifest says what is expected", Input: evidence, Options: options(func(o map[string]any) {
			delete(o, "compose_hash")
			o["manifest"] = string(i.Manifest)
		}), Accepted: true},
		{Name: "hexadecimal is read", Input: []byte(hex.EncodeToString(evidence)), Text: true, Options: options(same), Accepted: true},
		{Name: "another manifest is refused", Input: evidence, Options: options(set("manifest", string(i.Manifest)+" ")), Codes: []string{"compose_hash_mismatch"}},
		{Name: "another compose hash is refused", Input: evidence, Options: options(set("compose_hash", hex.EncodeToString(make([]byte, 32)))), Codes: []string{"compose_hash_mismatch"}},
		{Name: "another app id is refused", Input: evidence, Options: options(set("app_id", hex.EncodeToString(make([]byte, 20)))), Codes: []string{"app_id_mismatch"}},
		{Name: "another instance is refused", Input: evidence, Options: options(set("instance_id", hex.EncodeToString(make([]byte, 20)))), Codes: []string{"instance_id_mismatch"}},
		{Name: "another image is refused", Input: evidence, Options: options(set("os_image_hash", hex.EncodeToString(make([]byte, 32)))), Codes: []string{"image_hash_mismatch"}},
		{Name: "an answer to another nonce is refused", Input: evidence, Options: options(set("nonce", hex.EncodeToString(make([]byte, 32)))), Codes: []string{"nonce_mismatch"}},
		{Name: "an answer to no nonce is refused when one was sent", Input: silent, Options: options(set("manifest", string(i.Manifest))), Codes: []string{"freshness_none"}},
		{Name: "a saved answer to no nonce is accepted", Input: silent, Options: options(func(o map[string]any) {
			delete(o, "asked")
			delete(o, "nonce")
			o["policy"] = map[string]any{"tcb": map[string]any{"accept": []string{"UpToDate"}}, "workload": map[string]any{"allow_unpinned_images": true}}
		}), Accepted: true},
		{Name: "other report data are refused", Input: evidence, Options: options(set("report_data", hex.EncodeToString(make([]byte, 64)))), Codes: []string{"report_data_mismatch"}},
		{Name: "without development roots nothing vouches", Input: evidence, Options: options(without("dev_roots")), Codes: []string{"unknown_root"}},
		{Name: "without an expected workload nothing is accepted", Input: evidence, Options: options(without("compose_hash", "app_id", "lock")), Codes: []string{"workload_not_specified"}},
		{Name: "a zero policy refuses", Input: evidence, Options: options(set("policy", map[string]any{})), Codes: []string{"policy_zero"}},
		{Name: "collateral that has ended is refused", Input: evidence, Options: options(set("at", "2027-01-01T00:00:00Z")), Codes: []string{"crl_expired"}},
		{Name: "a signature alone can be judged", Input: evidence, Options: options(set("policy", "signature-only")), Accepted: true},
		{Name: "GPU evidence that is too large is refused", Input: evidence, Options: options(set("gpu_evidence", strings.Repeat("0", 2<<20))), Codes: []string{"evidence_too_large"}},
		{Name: "an event log for evidence that has one is refused", Input: evidence, Options: options(set("event_log", "[]")), Codes: []string{"event_log_twice"}},
		{Name: "bytes that are no evidence are refused", Input: []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, Options: options(same), Codes: []string{"evidence_unknown"}},
		{Name: "no bytes at all are refused", Options: options(same), Codes: []string{"evidence_malformed"}},
		{Name: "half of the evidence is refused", Input: evidence[:len(evidence)/2], Options: options(same), Codes: []string{"evidence_malformed"}},
		{Name: "an option that does not exist", Input: evidence, Options: options(set("compose-hash", "00")), Error: "options_malformed"},
		{Name: "an option given twice", Input: evidence, Options: `{"at":"` + at + `","at":"` + at + `"}`, Error: "options_malformed"},
		{Name: "options that are no JSON", Input: evidence, Options: `{`, Error: "options_malformed"},
		{Name: "a compose hash of another length", Input: evidence, Options: options(set("compose_hash", "00")), Error: "options_malformed"},
		{Name: "an app id that is no hexadecimal", Input: evidence, Options: options(set("app_id", "x")), Error: "options_malformed"},
		{Name: "an instance id of another length", Input: evidence, Options: options(set("instance_id", "00")), Error: "options_malformed"},
		{Name: "an image hash of another length", Input: evidence, Options: options(set("os_image_hash", "00")), Error: "options_malformed"},
		{Name: "report data that are too long", Input: evidence, Options: options(set("report_data", hex.EncodeToString(make([]byte, 65)))), Error: "options_malformed"},
		{Name: "a nonce that is too short", Input: evidence, Options: options(set("nonce", "00")), Error: "options_malformed"},
		{Name: "a question without its nonce", Input: evidence, Options: options(without("nonce")), Error: "options_malformed"},
		{Name: "a time that is none", Input: evidence, Options: options(set("at", "yesterday")), Error: "options_malformed"},
		{Name: "a policy with an unknown key", Input: evidence, Options: options(set("policy", map[string]any{"accept_all": true})), Error: "policy_malformed"},
		{Name: "a policy in TOML", Input: evidence, Options: options(set("policy", "[tcb]\naccept = [\"UpToDate\"]\n")), Error: "policy_malformed"},
		{Name: "a lock that is none", Input: evidence, Options: options(set("lock", "{}")), Error: "lock_malformed"},
		{Name: "development roots without a root", Input: evidence, Options: options(set("dev_roots", `{"version":1,"name":"x","tdx_collateral":{}}`)), Error: "dev_roots_malformed"},
		{Name: "collateral that is none", Input: evidence, Options: options(set("collateral_files", map[string][]byte{"x": []byte("?")})), Error: "directory_unknown_file"},
		{Name: "a trust anchor without a key", Input: evidence, Options: options(set("trust_anchors", map[string]string{"x": i.Platform.Chain(i.Platform.Root)})), Error: "trust_anchor"},
	}
	if quote, collateral, ok := RealQuote(t); ok {
		signature := func(o map[string]any) string {
			o["at"], o["policy"] = VectorAt, "signature-only"
			raw, err := json.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			return string(raw)
		}
		cases = append(cases,
			Case{Name: "the signature of a real quote holds", Input: quote, Options: signature(map[string]any{"collateral": json.RawMessage(collateral)}), Accepted: true},
			Case{Name: "a real quote without collateral is undecided", Input: quote, Options: signature(map[string]any{}), Undecided: true, Codes: []string{"collateral_missing"}},
			Case{Name: "a real quote of which one bit is changed is refused", Input: flip(quote, 200), Options: signature(map[string]any{"collateral": json.RawMessage(collateral)}), Codes: []string{"quote_signature"}},
		)
	}
	return cases
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

// Answer is what the page reads of a verdict or an error.
type Answer struct {
	Accepted  bool
	Undecided bool
	Findings  []struct{ Level, Code, Message string }
	Channel   string
	Code      string // of an error
	Fix       string
}

// Check compares an answer with what the case says.
func (c Case) Check(t testing.TB, answer []byte) {
	t.Helper()
	var a Answer
	if err := json.Unmarshal(answer, &a); err != nil {
		t.Fatalf("%s: %v in %.200s", c.Name, err, answer)
	}
	if a.Accepted != c.Accepted || a.Undecided != c.Undecided || a.Code != c.Error {
		t.Errorf("%s: accepted %v, undecided %v, error %q, want %v, %v, %q in\n%s", c.Name, a.Accepted, a.Undecided, a.Code, c.Accepted, c.Undecided, c.Error, answer)
	}
	for _, want := range c.Codes {
		found := false
		for _, f := range a.Findings {
			found = found || f.Level == "error" && f.Code == want
		}
		if !found {
			t.Errorf("%s: no error %s in\n%s", c.Name, want, answer)
		}
	}
	if c.Error == "" && a.Channel != "none" {
		t.Errorf("%s: channel %q, which a browser cannot know", c.Name, a.Channel)
	}
}

// Native returns the answer of the native code.
func (c Case) Native() []byte { return page.Verify(c.Input, []byte(c.Options), time.Unix(0, 0)) }
