// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/dstack-go/dstack/cli"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/testkit"
)

// verdict is what scripts rely on.
type verdict struct {
	Accepted   *bool             `json:"accepted"`
	Undecided  bool              `json:"undecided"`
	Scope      string            `json:"scope"`
	Trust      string            `json:"trust"`
	TEE        string            `json:"tee"`
	Signature  string            `json:"signature"`
	TCBStatus  string            `json:"tcb_status"`
	Advisories []string          `json:"advisories"`
	Claims     map[string]any    `json:"claims"`
	Findings   []map[string]any  `json:"findings"`
	Anchors    []json.RawMessage `json:"anchors"`
	Self       []json.RawMessage `json:"self_consistent"`
	Assume     []string          `json:"assumptions"`
	At         string            `json:"at"`
	Freshness  string            `json:"freshness"`
	Channel    string            `json:"channel"`
	Hops       []json.RawMessage `json:"hops"`
}

func (v *verdict) codes() []string {
	var out []string
	for _, f := range v.Findings {
		if f["level"] == "error" {
			out = append(out, f["code"].(string))
		}
	}
	return out
}

// run runs `dstack --json verify …` in a home of its own.
func run(t *testing.T, in []byte, args ...string) (*verdict, int) {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("XDG_CACHE_HOME", "")
	var out, errOut bytes.Buffer
	code := cli.Main(append([]string{"--state", filepath.Join(home, "state"), "verify", "--json"}, args...), bytes.NewReader(in), &out, &errOut)
	var v verdict
	if err := json.Unmarshal(out.Bytes(), &v); err != nil {
		t.Fatalf("%v\n%s%s", err, out.String(), errOut.String())
	}
	return &v, code
}

const (
	v4At  = "2025-06-20T00:00:00Z"
	snpAt = "2026-07-01T00:00:00Z"
)

// The command over evidence of real machines: every encoding, detected or named,
// from file and standard input.
func TestVerifyTakesEvidenceInAnyForm(t *testing.T) {
	vector := func(name string) string { return testkit.VectorPath(t, "attestation/"+name) }
	for _, c := range []struct {
		name, tee string
		args      []string
		registers []string // that the claims must show
	}{
		{"tdx/dcap-qvl-tdx_quote_v4.bin", "tdx", []string{"--collateral", vector("tdx/dcap-qvl-tdx_quote_v4_collateral.json"), "--at", v4At}, []string{"mrtd", "rtmr0", "rtmr3", "report_data", "td_attributes"}},
		{"sev-snp/report.bin", "sev-snp", []string{"--collateral", vector("sev-snp"), "--at", snpAt}, []string{"measurement", "host_data", "chip_id", "reported_tcb", "report_data"}},
		{"cca/veraison-cca-good.cbor", "cca", []string{"--collateral", vector("cca"), "--at", snpAt}, []string{"rim", "rem0", "rem3", "challenge"}},
		{"nitro/versioned_nitro_attestation.bin", "nitro", []string{"--at", "2025-12-25T16:04:19Z"}, []string{"pcrs"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			raw, err := os.ReadFile(vector(c.name))
			if err != nil {
				t.Fatal(err)
			}
			kind := c.tee
			if strings.Contains(c.name, "versioned") {
				kind = "dstack"
			}
			for form, data := range map[string][]byte{
				"binary": raw, "hex": []byte(hex.EncodeToString(raw) + "\n"), "0x": []byte("0x" + strings.ToUpper(hex.EncodeToString(raw))),
				"base64": []byte(base64.StdEncoding.EncodeToString(raw)), "base64url": []byte(base64.RawURLEncoding.EncodeToString(raw)),
			} {
				for _, tee := range []string{"", kind} {
					args := append([]string{"-", "--policy", "signature-only", "--offline"}, c.args...)
					if tee != "" {
						args = append(args, "--tee", tee)
					}
					v, code := run(t, data, args...)
					if code != 0 || !*v.Accepted || v.Scope != "signature" || v.TEE != c.tee || v.Signature != "valid" || v.Advisories == nil || v.Anchors == nil || v.Self == nil || len(v.Assume) == 0 || v.At == "" {
						t.Errorf("%s, --tee %q: exit %d, %+v", form, tee, code, v)
					}
					for _, r := range c.registers {
						if v.Claims[r] == nil {
							t.Errorf("%s: no claim %s", form, r)
						}
					}
				}
			}
			// Under the default policy the same evidence is refused: nobody said what to
			// expect.
			v, code := run(t, nil, append([]string{vector(c.name), "--offline"}, c.args...)...)
			if code == 0 || *v.Accepted || v.Scope != "workload" {
				t.Errorf("default policy: exit %d, %+v", code, v)
			}
		})
	}
}

func TestVerifyBundleIsCompleteOffline(t *testing.T) {
	quote := testkit.VectorPath(t, "attestation/tdx/dcap-qvl-tdx_quote_v4.bin")
	col := testkit.VectorPath(t, "attestation/tdx/dcap-qvl-tdx_quote_v4_collateral.json")
	bundle := filepath.Join(t.TempDir(), "bundle.json")
	if _, code := run(t, nil, quote, "--collateral", col, "--at", v4At, "--policy", "signature-only", "--save-bundle", bundle); code != 0 {
		t.Fatalf("exit %d", code)
	}
	for name, args := range map[string][]string{
		"by itself":                  {bundle},
		"as collateral of the quote": {quote, "--collateral", bundle},
	} {
		v, code := run(t, nil, append(args, "--offline", "--at", v4At, "--policy", "signature-only")...)
		if code != 0 || !*v.Accepted {
			t.Errorf("%s: exit %d, %v", name, code, v.codes())
		}
	}
	// At a time when the collateral has ended it is no good, in either direction.
	for at, want := range map[string]string{"2026-01-01T00:00:00Z": "crl_expired", "2025-01-01T00:00:00Z": "crl_not_yet_valid"} {
		if v, code := run(t, nil, bundle, "--offline", "--at", at, "--policy", "signature-only"); code != 1 || !slices.Contains(v.codes(), want) {
			t.Errorf("at %s: exit %d, %v", at, code, v.codes())
		}
	}
}

func TestVerifyPolicyFiles(t *testing.T) {
	report := testkit.VectorPath(t, "attestation/sev-snp/verifier-sev-snp-attestation.json")
	const compose = "86e59625be93207bc2351c4d1bba20037cec8e168da6b18f559af5af657b7a23"
	const image = "f69c8e5031ec2b269bbc08839ce02cb98ee255d695626f941f4b37b95946d352"
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := `allow_missing_crl = true
[tcb]
accept = ["OutOfDate"]
[snp]
products = ["Milan"]
allow_no_alias_check = true
[workload]
compose_hashes = ["` + compose + `"]
os_image_hashes = ["` + image + `"]
`
	if v, code := run(t, nil, report, "--at", snpAt, "--offline", "--policy", write("good.toml", good)); code != 0 || !*v.Accepted || v.Trust != "production" {
		t.Errorf("exit %d, %v", code, v.codes())
	}
	for name, c := range map[string]struct{ text, code string }{
		"milan":   {strings.Replace(good, `["Milan"]`, `["Genoa"]`, 1), "product_denied"},
		"tcb":     {strings.Replace(good, `["OutOfDate"]`, `["UpToDate"]`, 1), "tcb_status"},
		"crl":     {strings.Replace(good, "allow_missing_crl = true", "", 1), "crl_missing"},
		"compose": {strings.Replace(good, compose, strings.Repeat("0", 64), 1), "compose_hash_mismatch"},
		"image":   {strings.Replace(good, image, strings.Repeat("0", 64), 1), "image_hash_mismatch"},
		"zero":    {"", "policy_zero"},
	} {
		v, code := run(t, nil, report, "--at", snpAt, "--offline", "--policy", write(name+".toml", c.text))
		if code != 1 || !slices.Contains(v.codes(), c.code) {
			t.Errorf("%s: exit %d, %v, want %s", name, code, v.codes(), c.code)
		}
	}
	for name, text := range map[string]string{"unknown.toml": good + "sap = 1\n", "short.json": `{"workload":{"compose_hashes":["00"]}}`, "broken.toml": "[tcb"} {
		var out, errOut bytes.Buffer
		if code := cli.Main([]string{"verify", report, "--json", "--policy", write(name, text)}, nil, &out, &errOut); code != 1 || !strings.Contains(out.String(), "policy_malformed") {
			t.Errorf("%s: exit %d, %s", name, code, out.String())
		}
	}
}

// What is no evidence gets a verdict too, not only an error text.
func TestVerifyRefusesWhatIsNoEvidence(t *testing.T) {
	for name, c := range map[string]struct{ text, code string }{
		"nothing":         {"", "evidence_malformed"},
		"prose":           {"hello, world", "evidence_unknown"},
		"other JSON":      {`{"a":1}`, "evidence_unknown"},
		"a broken quote":  {"040002008100000000", "quote_malformed"},
		"info only":       {`{"app_id":"x","tcb_info":"{}"}`, "info_without_quote"},
		"an empty report": {strings.Repeat("00", 1184), "container_malformed"},
	} {
		v, code := run(t, []byte(c.text), "-", "--offline")
		if code != 1 || v.Accepted == nil || *v.Accepted || !slices.Contains(v.codes(), c.code) {
			t.Errorf("%s: exit %d, %v, want %s", name, code, v.codes(), c.code)
		}
	}
}

// Collateral is fetched from a service; --offline asks nobody.
func TestVerifyFetchesCollateral(t *testing.T) {
	quote := testkit.VectorPath(t, "attestation/tdx/dcap-qvl-tdx_quote_v4.bin")
	col, err := collateral.ParseTDX(testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_v4_collateral.json"))
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	answer := func(header, chain string, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			asked.Add(1)
			if header != "" {
				w.Header().Set(header, url.PathEscape(chain))
			}
			io.WriteString(w, body)
		}
	}
	signed := func(member, document string, signature []byte) string {
		return `{"` + member + `":` + document + `,"signature":"` + hex.EncodeToString(signature) + `"}`
	}
	mux := http.NewServeMux()
	mux.Handle("/sgx/certification/v4/pckcrl", answer("SGX-PCK-CRL-Issuer-Chain", col.PCKCRLIssuerChain, string(col.PCKCRL)))
	mux.Handle("/sgx/certification/v4/rootcacrl", answer("", "", hex.EncodeToString(col.RootCACRL)))
	mux.Handle("/tdx/certification/v4/tcb", answer("TCB-Info-Issuer-Chain", col.TCBInfoIssuerChain, signed("tcbInfo", col.TCBInfo, col.TCBInfoSignature)))
	mux.Handle("/tdx/certification/v4/qe/identity", answer("SGX-Enclave-Identity-Issuer-Chain", col.QEIdentityIssuerChain, signed("enclaveIdentity", col.QEIdentity, col.QEIdentitySignature)))
	srv := httptest.NewServer(mux)
	defer srv.Close()

	args := []string{quote, "--at", v4At, "--policy", "signature-only"}
	if v, code := run(t, nil, append(args, "--offline", "--pccs", srv.URL)...); code != 3 || !v.Undecided || asked.Load() != 0 {
		t.Errorf("offline: exit %d, %v, %d requests", code, v.codes(), asked.Load())
	}
	if v, code := run(t, nil, append(args, "--pccs", srv.URL)...); code != 0 || asked.Load() != 4 {
		t.Errorf("exit %d, %v, %d requests", code, v.codes(), asked.Load())
	}
	srv.Close()
	if v, code := run(t, nil, append(args, "--pccs", srv.URL)...); code != 3 || !v.Undecided {
		t.Errorf("service gone, another home: exit %d, %v", code, v.codes())
	}
}
