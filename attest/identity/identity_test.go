// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// evidenceOf reads a vector of TDX, whatever its form.
func evidenceOf(t testing.TB, name string) *attest.Evidence {
	t.Helper()
	data := testkit.Vectors(t, "attestation/"+name)
	if !strings.HasSuffix(name, ".json") {
		ev, err := container.Decode(data)
		if err != nil {
			t.Fatal(err)
		}
		return ev
	}
	var j struct {
		Attestation, Quote string
		EventLog           string `json:"event_log"`
	}
	if err := json.Unmarshal(data, &j); err != nil {
		t.Fatal(err)
	}
	if j.Attestation != "" {
		ev, err := container.Decode(unhex(t, j.Attestation))
		if err != nil {
			t.Fatal(err)
		}
		return ev
	}
	log, err := eventlog.ParseJSON([]byte(j.EventLog))
	if err != nil {
		t.Fatal(err)
	}
	return &attest.Evidence{TEE: dstack.TDX, Quote: unhex(t, j.Quote), EventLog: log}
}

// claimsOf takes a quote's word. These tests are of the formulas; there is no
// collateral for these quotes.
func claimsOf(t testing.TB, quote []byte) *attest.Claims {
	t.Helper()
	q, err := tdx.ParseQuote(quote)
	if err != nil {
		t.Fatal(err)
	}
	b := q.Body()
	return &attest.Claims{TEE: dstack.TDX, TDX: &attest.TDX{
		MRTD: b.MRTD, RTMR: b.RTMR, MRConfigID: b.MRConfigID, MROwner: b.MROwner, MROwnerConfig: b.MROwnerConfig,
	}}
}

type vector struct {
	File         string
	ComposeHash  string `json:"compose_hash"`
	AppID        string `json:"app_id"`
	InstanceID   string `json:"instance_id"`
	MRSystem     string `json:"mr_system"`
	MRAggregated string `json:"mr_aggregated_full"`
	MRSystemBoot string `json:"mr_system_boottime"`
	MRAggrBoot   string `json:"mr_aggregated_boottime"`
	// of snp_case
	Measurement string `json:"measurement"`
	HostData    string `json:"host_data"`
	MRAggrSNP   string `json:"mr_aggregated"`
	DeviceID    string `json:"device_id"`
}

func vectors(t testing.TB) (tdxCases []vector, snp vector) {
	t.Helper()
	var v struct {
		TDX []vector `json:"tdx_cases"`
		SNP vector   `json:"snp_case"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/computed_vectors.json"), &v); err != nil {
		t.Fatal(err)
	}
	return v.TDX, v.SNP
}

func TestTDXIdentitiesAreThoseOfTheVectors(t *testing.T) {
	cases, _ := vectors(t)
	if len(cases) < 3 {
		t.Fatalf("%d cases", len(cases))
	}
	for _, c := range cases {
		t.Run(c.File, func(t *testing.T) {
			ev := evidenceOf(t, c.File)
			in := Input{Claims: claimsOf(t, ev.Quote), Evidence: ev}
			got, err := Of(in)
			if err != nil {
				t.Fatal(err)
			}
			equal(t, "app_id", got.AppID[:], c.AppID)
			equal(t, "compose_hash", got.ComposeHash[:], c.ComposeHash)
			equal(t, "instance_id", got.InstanceID, c.InstanceID)
			equal(t, "mr_system", got.MRSystem[:], c.MRSystem)
			equal(t, "mr_aggregated", got.MRAggregated[:], c.MRAggregated)
			if len(got.KeyProvider) == 0 {
				t.Error("no key provider")
			}
			in.Mode = BootTime
			boot, err := Of(in)
			if err != nil {
				t.Fatal(err)
			}
			equal(t, "mr_system at boot", boot.MRSystem[:], c.MRSystemBoot)
			equal(t, "mr_aggregated at boot", boot.MRAggregated[:], c.MRAggrBoot)
			if len(boot.KeyProvider) != 0 {
				t.Error("a key provider before there is one")
			}
		})
	}
}

func equal(t testing.TB, what string, got []byte, want string) {
	t.Helper()
	if hex.EncodeToString(got) != want {
		t.Errorf("%s is %x, want %s", what, got, want)
	}
}

func TestSNPIdentityIsThatOfTheVector(t *testing.T) {
	_, c := vectors(t)
	ev := evidenceOf(t, c.File)
	snp := &attest.SNP{Measurement: dstack.Measurement(unhex(t, c.Measurement)), HostData: [32]byte(unhex(t, c.HostData))}
	copy(snp.ChipID[:], ev.Quote[0x1a0:])
	in := Input{Claims: &attest.Claims{TEE: dstack.SEVSNP, SNP: snp}, Evidence: ev}
	got, err := Of(in)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "mr_system", got.MRSystem[:], c.MRSystem)
	equal(t, "mr_aggregated", got.MRAggregated[:], c.MRAggrSNP)
	equal(t, "device_id", got.DeviceID[:], c.DeviceID)
	if got.AppID.IsZero() || got.ComposeHash.IsZero() {
		t.Errorf("no app in the document: %+v", got)
	}
	// The document may stand in the configuration instead.
	moved := *ev
	moved.MRConfig, in.Document = "", ev.MRConfig
	in.Evidence = &moved
	if again, err := Of(in); err != nil || again.ComposeHash != got.ComposeHash {
		t.Error(err)
	}
}

func TestEnclaveIdentityIsThatOfTheSnapshot(t *testing.T) {
	ev := evidenceOf(t, "nitro/versioned_nitro_attestation.bin")
	doc, err := nitro.ParseDocument(ev.Quote)
	if err != nil {
		t.Fatal(err)
	}
	claims := &attest.Claims{TEE: dstack.Nitro, Nitro: &attest.Nitro{PCRs: doc.PCRs, ModuleID: doc.ModuleID}}
	got, err := Of(Input{Claims: claims, Evidence: ev, Image: unhex(t, "1894b0b29e94a9db16e88a2914f0923e52bb16c08bf3bb484df786a147e2eb79")})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(testkit.VectorPath(t, "attestation/nitro/nitro_verify__app_info.snap"))
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := strings.Cut(strings.TrimPrefix(string(text), "---"), "---\n")
	var want map[string]any
	if err := json.Unmarshal([]byte(body), &want); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string][]byte{
		"app_id": got.AppID[:], "compose_hash": got.ComposeHash[:], "instance_id": got.InstanceID, "mr_system": got.MRSystem[:],
		"mr_aggregated": got.MRAggregated[:], "os_image_hash": got.OSImageHash, "key_provider_info": got.KeyProvider,
	} {
		equal(t, name, value, want[name].(string))
	}
	if got.InitScriptHashes == nil || len(got.InitScriptHashes) != 0 {
		t.Errorf("init_script_hashes %v, the snapshot has []", got.InitScriptHashes)
	}
	// The snapshot's device id is of evidence before verification (SHA-256 of
	// nothing); verified, it is of the module id up to its first hyphen.
	if want := sha256.Sum256([]byte("i")); got.DeviceID != want {
		t.Errorf("device_id %s", got.DeviceID)
	}
}

// Google Cloud and NitroTPM have no vector; the formulas are spelled out a second
// time here, over registers that the log replays to.
func TestCloudIdentitiesFollowTheFormulas(t *testing.T) {
	ev := evidenceOf(t, "tdx/quote-report.json")
	replay := func(name string) []byte {
		v, err := eventlog.ReplayRuntime(ev.EventLog, name)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	image := bytes.Repeat([]byte{0x42}, 32)
	id, err := eventlog.Boundary(ev.EventLog)
	if err != nil {
		t.Fatal(err)
	}
	mkp := sha256.Sum256([]byte(id.KeyProvider))
	sum := func(parts ...[]byte) [32]byte { return sha256.Sum256(bytes.Join(parts, nil)) }

	pcr := func(i uint32, v []byte) attest.PCR { return attest.PCR{Index: i, Algorithm: "sha256", Value: v} }
	p0, p2 := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	gcp := claimsOf(t, ev.Quote)
	gcp.TPM = &attest.TPM{PCRs: []attest.PCR{pcr(0, p0), pcr(2, p2), pcr(14, replay("sha-256"))}}
	got, err := Of(Input{Claims: gcp, Evidence: ev, Image: image})
	if err != nil || got.MRSystem != sum(image, mkp[:]) || got.MRAggregated != sum(p0, p2, replay("sha-256")) {
		t.Errorf("Google Cloud: %+v %v", got, err)
	}
	if _, err := Of(Input{Claims: gcp, Evidence: ev}); fault.Code(err) != "identity_image" {
		t.Errorf("without an image: %v", err)
	}
	gcp.TPM.PCRs = gcp.TPM.PCRs[1:]
	if _, err := Of(Input{Claims: gcp, Evidence: ev, Image: image}); fault.Code(err) != "identity_register" {
		t.Errorf("without PCR 0: %v", err)
	}

	regs := map[uint32][]byte{4: bytes.Repeat([]byte{4}, 48), 7: bytes.Repeat([]byte{7}, 48), 12: bytes.Repeat([]byte{12}, 48), 14: replay("sha-384")}
	aws := &attest.Claims{TEE: dstack.NitroTPM, Nitro: &attest.Nitro{PCRs: regs, ModuleID: "i-0a-tpm0"}}
	got, err = Of(Input{Claims: aws, Evidence: ev})
	if err != nil || got.MRSystem != sum(regs[4], regs[7], regs[12], mkp[:]) || got.MRAggregated != sum(regs[4], regs[7], regs[12], regs[14]) || got.DeviceID != sha256.Sum256([]byte("i-0a-tpm0")) {
		t.Errorf("NitroTPM: %+v %v", got, err)
	}
}

// Nothing is derived from what the claims do not bind.
func TestAlteredEvidenceHasNoIdentity(t *testing.T) {
	base := func(t *testing.T) Input {
		ev := evidenceOf(t, "tdx/quote-report.json")
		return Input{Claims: claimsOf(t, ev.Quote), Evidence: ev}
	}
	snp := func(t *testing.T) Input {
		_, c := vectors(t)
		ev := evidenceOf(t, c.File)
		return Input{Claims: &attest.Claims{TEE: dstack.SEVSNP, SNP: &attest.SNP{HostData: [32]byte(unhex(t, c.HostData))}}, Evidence: ev}
	}
	runtime := func(in *Input, edit func([]eventlog.Event) []eventlog.Event) {
		in.Evidence.EventLog = edit(eventlog.Runtime(in.Evidence.EventLog))
		reg, err := eventlog.ReplayRuntime(in.Evidence.EventLog, "sha-384")
		if err == nil {
			in.Claims.TDX.RTMR[3] = dstack.Measurement(reg)
		}
	}
	for _, c := range []struct {
		name, code string
		from       func(*testing.T) Input
		edit       func(*Input)
	}{
		{"no claims", "identity_tee", base, func(in *Input) { in.Claims = nil }},
		{"another compose hash in the log", "log_replay_mismatch", base, func(in *Input) {
			for i, e := range in.Evidence.EventLog {
				if e.Name == eventlog.ComposeHashEvent {
					in.Evidence.EventLog[i].Payload, in.Evidence.EventLog[i].Digest = bytes.Repeat([]byte{1}, 32), nil
				}
			}
		}},
		{"a log without its end", "log_replay_mismatch", base, func(in *Input) { in.Evidence.EventLog = in.Evidence.EventLog[:len(in.Evidence.EventLog)-1] }},
		{"a second app id, measured", "log_duplicate_event", base, func(in *Input) {
			runtime(in, func(l []eventlog.Event) []eventlog.Event {
				return append(append(append([]eventlog.Event{}, l[:2]...), l[1]), l[2:]...)
			})
		}},
		{"a boot that is not over", "log_boundary_missing", base, func(in *Input) {
			runtime(in, func(l []eventlog.Event) []eventlog.Event {
				for i, e := range l {
					if e.Name == eventlog.SystemReady {
						return l[:i]
					}
				}
				return l
			})
		}},
		{"a TPM alone", "identity_tee", base, func(in *Input) { in.Claims = &attest.Claims{TEE: dstack.TPM, TPM: &attest.TPM{}} }},
		{"another document", "mr_config_mismatch", snp, func(in *Input) { in.Evidence.MRConfig += " " }},
		{"no document", "mr_config_document_missing", snp, func(in *Input) { in.Evidence.MRConfig = "" }},
		{"an enclave in debug mode", "nitro_debug", base, func(in *Input) {
			zero := make([]byte, 48)
			in.Claims = &attest.Claims{TEE: dstack.Nitro, Nitro: &attest.Nitro{PCRs: map[uint32][]byte{0: zero, 1: zero, 2: zero}}}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := c.from(t)
			if _, err := Of(in); err != nil {
				t.Fatalf("the twin: %v", err)
			}
			c.edit(&in)
			if got, err := Of(in); got != nil && err == nil || fault.Code(err) != c.code {
				t.Errorf("err = %v (%q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}

// The record fits the extension that certificates carry it in.
func TestIdentityGoesThroughACertificate(t *testing.T) {
	ev := evidenceOf(t, "simulator/attestation.bin")
	got, err := Of(Input{Claims: claimsOf(t, ev.Quote), Evidence: ev})
	if err != nil {
		t.Fatal(err)
	}
	back, err := ratls.ParseAppInfo(got.Marshal())
	if err != nil || back.MRAggregated != got.MRAggregated || back.AppID != got.AppID {
		t.Errorf("%+v %v", back, err)
	}
}

func BenchmarkOf(b *testing.B) {
	ev := evidenceOf(b, "simulator/attestation.bin")
	in := Input{Claims: claimsOf(b, ev.Quote), Evidence: ev}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Of(in); err != nil {
			b.Fatal(err)
		}
	}
}
