// SPDX-License-Identifier: Apache-2.0

package gpu

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/manifest"
)

// h100 is nvattest's output for one real H100, with the nonce 11…11.
func h100(t testing.TB) []byte {
	return testkit.Vectors(t, "attestation/gpu/gpu_attestation_h100.json")
}

const h100UEID = "457723480349051719100670602112458195243836813799"

type object = map[string]any

// doc is an output to be changed before it is hashed and logged.
type doc struct {
	output object
	event  object
	policy Policy
	hash   bool // event has the hash of what output becomes
	raw    []byte
}

func (d *doc) device(i int) object { return d.output["claims"].([]any)[i].(object) }

// clone adds a GPU with an identity of its own.
func (d *doc) addDevice(ueid string) {
	more := maps.Clone(d.device(0))
	more["ueid"] = ueid
	d.output["claims"] = append(d.output["claims"].([]any), any(more))
}

func newDoc(t testing.TB) *doc {
	d := &doc{hash: true, policy: Policy{Devices: 1, Nonce: bytes.Repeat([]byte{0x11}, 32)}}
	if err := json.Unmarshal(h100(t), &d.output); err != nil {
		t.Fatal(err)
	}
	d.event = object{"version": 3, "provider": "nvidia", "devices": 1, "cc_mode": "on", "devtools": false, "dbgstat": "disabled", "secboot": true}
	return d
}

func (d *doc) appraise(t testing.TB) (*Claims, error) {
	raw := d.raw
	if raw == nil {
		raw = marshal(t, d.output)
	}
	if d.hash {
		sum := sha256.Sum256(raw)
		d.event["evidence_sha256"] = hex.EncodeToString(sum[:])
	}
	return Appraise(raw, marshal(t, d.event), d.policy)
}

func marshal(t testing.TB, v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// eventOf writes an event as upstream's guest does.
func eventOf(version int, evidence []byte) []byte {
	more := ""
	if version == 3 {
		more = `"dbgstat":"disabled","secboot":true,`
	}
	return fmt.Appendf(nil, `{"version":%d,"provider":"nvidia","devices":1,"cc_mode":"on","devtools":false,%s"evidence_sha256":"%x"}`, version, more, sha256.Sum256(evidence))
}

func TestARealH100IsAccepted(t *testing.T) {
	for version := 1; version <= 3; version++ {
		for name, p := range map[string]Policy{
			"of a nonce":            {Devices: 1, Nonce: bytes.Repeat([]byte{0x11}, 32)},
			"of the guest's choice": {Devices: 1, BootNonce: true},
			"that names the GPU":    {Devices: 1, BootNonce: true, UEIDs: []string{"1", h100UEID}},
		} {
			c, err := Appraise(h100(t), eventOf(version, h100(t)), p)
			if err != nil {
				t.Errorf("event version %d, a policy %s: %v", version, name, err)
				continue
			}
			d := c.Devices[0]
			if len(c.Devices) != 1 || d.UEID != h100UEID || d.Model != "GH100 A01 GSP BROM" || d.DriverVersion != "580.159.03" || d.VBIOSVersion != "96.00.D9.00.01" || !d.SecureBoot || d.Debug != "disabled" {
				t.Errorf("claims = %+v", c)
			}
			if c.Nonce != [32]byte(bytes.Repeat([]byte{0x11}, 32)) || c.Evidence != sha256.Sum256(h100(t)) || c.DevTools || len(c.Assumptions) != 2 {
				t.Errorf("claims = %+v", c)
			}
		}
	}
}

// TestNothingInTheOutputIsSigned holds the package comment to the vector: if a later
// nvattest signs its output, there is more to verify.
func TestNothingInTheOutputIsSigned(t *testing.T) {
	var out struct {
		EAT []json.RawMessage `json:"detached_eat"`
	}
	var jwt [2]string
	if err := json.Unmarshal(h100(t), &out); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out.EAT[0], &jwt); err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(jwt[1], ".")
	header, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil || string(header) != `{"alg":"none"}` || len(parts) != 3 || parts[2] != "" {
		t.Errorf("header %s, signature %q, %v", header, parts[2], err)
	}
}

func TestThreat_A10_EveryUnacceptableGPUIsRefusedForItsOwnReason(t *testing.T) {
	claim := func(name string, value any) func(*doc) { return func(d *doc) { d.device(0)[name] = value } }
	inEvent := func(name string, value any) func(*doc) {
		return func(d *doc) {
			d.event[name] = value
			if value == nil {
				delete(d.event, name)
			}
		}
	}
	chain := func(name, key string, value any) func(*doc) {
		return func(d *doc) {
			c := maps.Clone(d.device(0)[name].(object))
			c[key] = value
			d.device(0)[name] = c
		}
	}
	for _, c := range []struct {
		name, code string
		edit       func(*doc)
	}{
		// The policy.
		{"a policy of nothing", "gpu_policy_empty", func(d *doc) { d.policy = Policy{} }},
		{"a policy without a number of GPUs", "gpu_policy_empty", func(d *doc) { d.policy.Devices = 0 }},
		{"a policy without a nonce", "gpu_nonce_unspecified", func(d *doc) { d.policy.Nonce = nil }},
		{"a policy with a nonce of 31 bytes", "gpu_nonce_length", func(d *doc) { d.policy.Nonce = d.policy.Nonce[:31] }},
		{"a policy with a nonce of no bytes", "gpu_nonce_length", func(d *doc) { d.policy.Nonce, d.policy.BootNonce = []byte{}, true }},

		// The log's event.
		{"an event that is not JSON", "gpu_event_malformed", func(d *doc) { d.event["x"] = 1 }},
		{"an event without a hash", "gpu_event_malformed", func(d *doc) { d.hash = false }},
		{"an event with a hash of 31 bytes", "gpu_event_malformed", func(d *doc) { d.hash, d.event["evidence_sha256"] = false, strings.Repeat("00", 31) }},
		{"an event with a hash of 33 bytes", "gpu_event_malformed", func(d *doc) { d.hash, d.event["evidence_sha256"] = false, strings.Repeat("00", 33) }},
		{"an event without a count", "gpu_event_malformed", inEvent("devices", nil)},
		{"an event with half a GPU", "gpu_event_malformed", inEvent("devices", 1.5)},
		{"an event of version 3 without secboot", "gpu_event_malformed", inEvent("secboot", nil)},
		{"an event of version 2 with dbgstat", "gpu_event_malformed", inEvent("version", 2)},
		{"B15: an event beyond the limit", "gpu_event_malformed", inEvent("cc_mode", strings.Repeat("x", MaxEvent))},
		{"an event of version 4", "gpu_event_version", inEvent("version", 4)},
		{"an event of version 0", "gpu_event_version", inEvent("version", 0)},
		{"another vendor's event", "gpu_provider", inEvent("provider", "amd")},
		{"CC mode off", "gpu_cc_mode", inEvent("cc_mode", "off")},
		{"DevTools on", "gpu_devtools", inEvent("devtools", true)},
		{"two GPUs where one is expected", "gpu_devices", inEvent("devices", 2)},
		{"no GPU where one is expected", "gpu_devices", inEvent("devices", 0)},
		{"one GPU where two are expected", "gpu_devices", func(d *doc) { d.policy.Devices = 2 }},
		{"evidence for fewer GPUs than there are", "gpu_devices", func(d *doc) { d.policy.Devices, d.event["devices"] = 2, 2 }},
		{"evidence for more GPUs than there are", "gpu_devices", func(d *doc) { d.addDevice("7") }},
		{"evidence for no GPU", "gpu_devices", func(d *doc) { d.output["claims"] = []any{} }},

		// The binding.
		{"the evidence of another boot", "gpu_evidence_hash", func(d *doc) { d.hash, d.event["evidence_sha256"] = false, strings.Repeat("00", 32) }},
		{"the same evidence with a space", "gpu_evidence_hash", func(d *doc) {
			raw := marshal(t, d.output)
			sum := sha256.Sum256(raw)
			d.hash, d.event["evidence_sha256"], d.raw = false, hex.EncodeToString(sum[:]), append(raw, ' ')
		}},

		// The output.
		{"an output that is not JSON", "gpu_evidence_malformed", func(d *doc) { d.raw = []byte("{") }},
		{"an output that ends early", "gpu_evidence_malformed", func(d *doc) { d.raw = marshal(t, d.output)[:100] }},
		{"two outputs", "gpu_evidence_malformed", func(d *doc) { d.raw = append(marshal(t, d.output), "{}"...) }},
		{"a claim twice", "gpu_evidence_malformed", func(d *doc) {
			d.raw = bytes.Replace(marshal(t, d.output), []byte(`"secboot":true`), []byte(`"secboot":true,"secboot":true`), 1)
		}},
		{"B15: an output beyond the limit", "gpu_evidence_malformed", func(d *doc) { d.raw = append(marshal(t, d.output), bytes.Repeat([]byte{' '}, MaxEvidence)...) }},
		{"B15: an output nested 100000 times", "gpu_evidence_malformed", func(d *doc) { d.raw = bytes.Repeat([]byte{'['}, 100000) }},
		{"B15: 65 GPUs", "gpu_evidence_malformed", func(d *doc) { d.output["claims"] = slices.Repeat(d.output["claims"].([]any), MaxDevices+1) }},
		{"B15: a model of 257 bytes", "gpu_evidence_malformed", claim("hwmodel", strings.Repeat("x", 257))},
		{"no result", "gpu_evidence_malformed", func(d *doc) { delete(d.output, "result_code") }},
		{"secboot as a text", "gpu_evidence_malformed", claim("secboot", "true")},
		{"B17: a nonce of 31 bytes", "gpu_evidence_malformed", claim("eat_nonce", strings.Repeat("11", 31))},
		{"B17: a nonce of 33 bytes", "gpu_evidence_malformed", claim("eat_nonce", strings.Repeat("11", 33))},
		{"nvattest's own refusal", "gpu_result", func(d *doc) { d.output["result_code"] = 3 }},
		{"an unspoken secboot", "gpu_claim_missing", claim("secboot", nil)},
		{"no dbgstat", "gpu_claim_missing", func(d *doc) { delete(d.device(0), "dbgstat") }},
		{"no verdict on the signature", "gpu_claim_missing", func(d *doc) { delete(d.device(0), "x-nvidia-gpu-attestation-report-signature-verified") }},
		{"a switch", "gpu_device_type", claim("x-nvidia-device-type", "nvswitch")},
		{"a GPU that the policy does not name", "gpu_unknown_device", func(d *doc) { d.policy.UEIDs = []string{"1"} }},
		{"a policy that names no GPU", "gpu_unknown_device", func(d *doc) { d.policy.UEIDs = []string{} }},
		{"one GPU for two", "gpu_duplicate_device", func(d *doc) {
			d.policy.Devices, d.event["devices"] = 2, 2
			d.addDevice(h100UEID)
		}},
		{"B08: a stale nonce", "gpu_nonce_stale", func(d *doc) { d.policy.Nonce = bytes.Repeat([]byte{0x22}, 32) }},
		{"GPUs of two times", "gpu_nonce_mixed", func(d *doc) {
			d.policy.Nonce, d.policy.BootNonce = nil, true
			d.policy.Devices, d.event["devices"] = 2, 2
			d.addDevice("7")
			d.device(1)["eat_nonce"] = strings.Repeat("22", 32)
		}},
		{"a report for another nonce", "gpu_nonce_mismatch", claim("x-nvidia-gpu-attestation-report-nonce-match", false)},
		{"a report that is not signed", "gpu_report_signature", claim("x-nvidia-gpu-attestation-report-signature-verified", false)},
		{"other firmware", "gpu_measurements", claim("measres", "fail")},
		{"measurements that were not compared", "gpu_measurements", claim("measres", "not-run")},
		{"records of differences", "gpu_measurements", claim("x-nvidia-mismatch-measurement-records", []any{object{"index": 1}})},
		{"secure boot off", "gpu_secboot", claim("secboot", false)},
		{"debugging enabled", "gpu_debug", claim("dbgstat", "enabled")},
		{"a debug state that nobody knows", "gpu_debug", claim("dbgstat", "")},
		{"a revoked certificate of the GPU", "gpu_certificate", chain("x-nvidia-gpu-attestation-report-cert-chain", "x-nvidia-cert-ocsp-status", "revoked")},
		{"an expired certificate of the driver's reference values", "gpu_certificate", chain("x-nvidia-gpu-driver-rim-cert-chain", "x-nvidia-cert-status", "expired")},
		{"no verdict on a chain", "gpu_certificate", claim("x-nvidia-gpu-vbios-rim-cert-chain", nil)},
		{"a firmware id that is not the certificate's", "gpu_verdict", claim("x-nvidia-gpu-attestation-report-cert-chain-fwid-match", false)},
		{"reference values that are not signed", "gpu_verdict", claim("x-nvidia-gpu-driver-rim-signature-verified", false)},
		{"a verdict that was not reached", "gpu_verdict", claim("x-nvidia-gpu-arch-check", nil)},
		{"a verdict that later versions add", "gpu_verdict", claim("x-nvidia-gpu-something-new", false)},
		{"an event that denies debugging", "gpu_event_contradiction", func(d *doc) {
			d.policy.AllowDebug = true
			d.device(0)["dbgstat"] = "enabled"
		}},
		{"an event that denies secure boot", "gpu_event_contradiction", inEvent("secboot", false)},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDoc(t)
			c.edit(d)
			claims, err := d.appraise(t)
			if fault.Code(err) != c.code || claims != nil {
				t.Errorf("claims %v, err = %v (code %q), want %q", claims != nil, err, fault.Code(err), c.code)
			}
		})
	}
	if _, err := newDoc(t).appraise(t); err != nil {
		t.Errorf("the document that these are made of: %v", err)
	}
}

func TestWhatAPolicyAllowsIsAccepted(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*doc)
	}{
		{"DevTools", func(d *doc) { d.policy.AllowDevTools, d.event["devtools"] = true, true }},
		{"debugging", func(d *doc) {
			d.policy.AllowDebug = true
			d.device(0)["dbgstat"], d.event["dbgstat"] = "enabled", "enabled"
		}},
		{"insecure boot", func(d *doc) {
			d.policy.AllowInsecureBoot = true
			d.device(0)["secboot"], d.event["secboot"] = false, false
		}},
		{"two GPUs", func(d *doc) {
			d.policy.Devices, d.event["devices"] = 2, 2
			d.addDevice("7")
		}},
		{"an OCSP answer from a cache", func(d *doc) {
			c := maps.Clone(d.device(0)["x-nvidia-gpu-vbios-rim-cert-chain"].(object))
			c["x-nvidia-cert-ocsp-nonce-matches"] = false
			d.device(0)["x-nvidia-gpu-vbios-rim-cert-chain"] = c
		}},
		{"an empty list of differences", func(d *doc) { d.device(0)["x-nvidia-mismatch-measurement-records"] = []any{} }},
		{"claims that nobody knows yet", func(d *doc) { d.device(0)["x-nvidia-else"], d.output["more"] = false, 1 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDoc(t)
			c.edit(d)
			claims, err := d.appraise(t)
			if err != nil {
				t.Fatal(err)
			}
			if claims.DevTools != (c.name == "DevTools") || len(claims.Devices) != d.policy.Devices {
				t.Errorf("claims = %+v", claims)
			}
		})
	}
}

func TestPolicyHashIsTheManifests(t *testing.T) {
	for _, policy := range []string{
		"", `{}`, `null`,
		`{"attest_gpu":true}`,
		` { "rego" : "package policy\nnv_match { input[_][\"secboot\"] } # \u00e9 < > & \u2028" , "allow_devtools":false}`,
		`{"allow_insecure_boot":true,"allow_debug":true,"allow_devtools":true,"attest_gpu":false}`,
	} {
		member := policy
		if policy != "" {
			member = `"gpu_policy":` + policy
		}
		m, err := manifest.Parse([]byte(`{"manifest_version":"3","name":"x","runner":"docker-compose","docker_compose_file":"services: {}","requirements":{` + member + `}}`))
		if err != nil {
			t.Fatalf("%s: %v", policy, err)
		}
		got, err := PolicyHash([]byte(policy))
		if want := m.GPUPolicyHash(); err != nil || got != want {
			t.Errorf("%s: %x, %v; the manifest's is %x", policy, got, err, want)
		}
	}
	// guest-os.md: the hash of {}.
	got, err := PolicyHash(nil)
	if err != nil || hex.EncodeToString(got[:]) != "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a" {
		t.Errorf("hash of nothing = %x, %v", got, err)
	}
}

func TestCanonicalJSON(t *testing.T) {
	for in, want := range map[string]string{
		`{"b":[1,{"y":null,"x":false}],"a":"\u20ac\u000f\nA'B\"\\\"/"}`:   `{"a":"€\u000f\nA'B\"\\\"/","b":[1,{"x":false,"y":null}]}`,
		`{"n":[-0, 0.0, 1e0, 100, 4.50, 2e-3, 1E30, 333333333.33333329]}`: `{"n":[0,0,1,100,4.5,0.002,1e+30,333333333.3333333]}`,
		`{"s":"\b\f\t\r\u007f\u2028\ud83d\ude00<>&"}`:                     "{\"s\":\"\\b\\f\\t\\r\u007f\u2028\U0001f600<>&\"}",
		`{"10":1,"1":2,"":3}`: `{"":3,"1":2,"10":1}`,
	} {
		got, err := PolicyHash([]byte(in))
		if err != nil || got != sha256.Sum256([]byte(want)) {
			var v any
			_ = json.Unmarshal([]byte(in), &v)
			b, _ := appendJCS(nil, v)
			t.Errorf("%s: %v\n got %s\nwant %s", in, err, b, want)
		}
	}
	for _, in := range []string{`[]`, `1`, `"x"`, `{"a":1,"a":2}`, `{"a":1e999}`, `{"a":"\ud800"}`, `{"é":1}`, `{"a":1}x`, `{`, `{"a":` + strings.Repeat("[", 9) + strings.Repeat("]", 9) + `}`, `{"a":"` + strings.Repeat("x", MaxPolicy) + `"}`} {
		if h, err := PolicyHash([]byte(in)); fault.Code(err) != "gpu_policy_malformed" || h != [32]byte{} {
			t.Errorf("%.40s: %x, %v", in, h, err)
		}
	}
}

// TestCanonicalNumbers runs RFC 8785, appendix B.
func TestCanonicalNumbers(t *testing.T) {
	for bits, want := range map[uint64]string{
		0x0000000000000000: "0", 0x8000000000000000: "0",
		0x0000000000000001: "5e-324", 0x8000000000000001: "-5e-324",
		0x7fefffffffffffff: "1.7976931348623157e+308", 0xffefffffffffffff: "-1.7976931348623157e+308",
		0x4340000000000000: "9007199254740992", 0xc340000000000000: "-9007199254740992",
		0x4430000000000000: "295147905179352830000",
		0x44b52d02c7e14af5: "9.999999999999997e+22", 0x44b52d02c7e14af6: "1e+23", 0x44b52d02c7e14af7: "1.0000000000000001e+23",
		0x444b1ae4d6e2ef4e: "999999999999999700000", 0x444b1ae4d6e2ef4f: "999999999999999900000", 0x444b1ae4d6e2ef50: "1e+21",
		0x3eb0c6f7a0b5ed8c: "9.999999999999997e-7", 0x3eb0c6f7a0b5ed8d: "0.000001",
		0x41b3de4355555553: "333333333.3333332", 0x41b3de4355555554: "333333333.33333325", 0x41b3de4355555555: "333333333.3333333",
		0x41b3de4355555556: "333333333.3333334", 0x41b3de4355555557: "333333333.33333343",
		0xbecbf647612f3696: "-0.0000033333333333333333", 0x43143ff3c1cb0959: "1424953923781206.2",
	} {
		if got := string(appendNumber(nil, math.Float64frombits(bits))); got != want {
			t.Errorf("%016x: %s, want %s", bits, got, want)
		}
	}
}

func FuzzAppraise(f *testing.F) {
	f.Add(h100(f), eventOf(3, h100(f)))
	f.Add(h100(f), eventOf(1, h100(f)))
	f.Fuzz(func(t *testing.T, evidence, event []byte) {
		out, err := Parse(evidence)
		if err != nil && (fault.Code(err) == "" || out != nil) {
			t.Fatalf("evidence %v, an error without a code: %v", out, err)
		}
		if ev, err := ParseEvent(event); err != nil && (fault.Code(err) == "" || ev != nil) {
			t.Fatalf("event %v, an error without a code: %v", ev, err)
		}
		for _, e := range [][]byte{event, eventOf(1, evidence)} {
			claims, err := Appraise(evidence, e, Policy{Devices: 1, BootNonce: true})
			if (err == nil) != (claims != nil) || err != nil && fault.Code(err) == "" {
				t.Fatalf("claims %v, err = %v", claims, err)
			}
			if claims != nil && (!claims.Devices[0].SecureBoot || claims.Devices[0].Debug != "disabled" || claims.DevTools) {
				t.Fatalf("claims = %+v", claims)
			}
		}
	})
}

func FuzzPolicyHash(f *testing.F) {
	f.Add([]byte(`{"rego":"x\u0001","attest_gpu":false,"n":[1.5,-0,1e21]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := PolicyHash(data)
		if err != nil {
			if fault.Code(err) != "gpu_policy_malformed" {
				t.Fatalf("err = %v", err)
			}
			return
		}
		var v any
		if len(bytes.TrimSpace(data)) == 0 || string(bytes.TrimSpace(data)) == "null" {
			return
		}
		if err := json.Unmarshal(data, &v); err != nil {
			t.Fatal(err)
		}
		canonical, err := appendJCS(nil, v)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := PolicyHash(canonical); err != nil || again != h {
			t.Fatalf("the canonical form %s has another hash: %v", canonical, err)
		}
	})
}

func BenchmarkAppraise(b *testing.B) {
	evidence := h100(b)
	event := eventOf(3, evidence)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Appraise(evidence, event, Policy{Devices: 1, BootNonce: true}); err != nil {
			b.Fatal(err)
		}
	}
}
