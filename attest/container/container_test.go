// SPDX-License-Identifier: Apache-2.0

package container

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vmihailenco/msgpack/v5"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// fixture returns the V0 container of a vector file, out of JSON where it is
// part of a request.
func fixture(t testing.TB, name string) []byte {
	t.Helper()
	data := testkit.Vectors(t, "attestation/"+name)
	if !strings.HasSuffix(name, ".json") {
		return data
	}
	var req struct{ Attestation string }
	if err := json.Unmarshal(data, &req); err != nil {
		t.Fatal(err)
	}
	raw, err := hex.DecodeString(req.Attestation)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

var fixtures = []struct {
	name    string
	tee     dstack.TEE
	runtime int // runtime events, bound or not
}{
	{"simulator/attestation.bin", dstack.TDX, 9},
	{"tdx/tdx-lite-attestation.json", dstack.TDX, 9},
	{"sev-snp/sev_snp_attestation.bin", dstack.SEVSNP, 9},
	{"sev-snp/verifier-sev-snp-attestation.json", dstack.SEVSNP, 9},
	{"nitro/versioned_nitro_attestation.bin", dstack.Nitro, 1},
	{"nitro/versioned_nitro_attestation_dbg.bin", dstack.Nitro, 0},
}

func TestFixturesDecodeAndEncodeToTheSameBytes(t *testing.T) {
	for _, f := range fixtures {
		t.Run(f.name, func(t *testing.T) {
			raw := fixture(t, f.name)
			e, err := Decode(raw)
			if err != nil {
				t.Fatal(err)
			}
			bound, unbound := len(eventlog.Runtime(e.EventLog)), len(e.Unbound)
			t.Logf("%s: quote %d, %d events, %d unbound, config %d", e.TEE, len(e.Quote), len(e.EventLog), unbound, len(e.Config))
			if e.TEE != f.tee || bound+unbound != f.runtime || (unbound > 0) == (f.tee == dstack.TDX) && f.runtime > 0 {
				t.Errorf("TEE %s with %d bound and %d unbound events", e.TEE, bound, unbound)
			}
			again, err := Encode(e)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(raw, again) {
				t.Errorf("encoding again gives other bytes")
			}
			v1, err := EncodeV1(e)
			if err != nil {
				t.Fatal(err)
			}
			e1, err := Decode(v1)
			if err != nil {
				t.Fatal(err)
			}
			if back, err := EncodeV0(e1); err != nil || !bytes.Equal(back, raw) {
				t.Errorf("V0 → V1 → V0 gives other bytes (%v)", err)
			}
		})
	}
}

// sample is evidence that uses every feature of V1.
func sample(t testing.TB) *attest.Evidence {
	t.Helper()
	v1, err := eventlog.RuntimeV1("app-id", bytes.Repeat([]byte{1}, 20))
	if err != nil {
		t.Fatal(err)
	}
	v2, err := eventlog.RuntimeV2("compose-hash", bytes.Repeat([]byte{0xff}, 32))
	if err != nil {
		t.Fatal(err)
	}
	payload := "hello"
	return &attest.Evidence{
		TEE: dstack.TDX, Quote: []byte{0, 1, 127, 128, 255}, Config: `{"a":1}`,
		EventLog:   []eventlog.Event{{IMR: 0, EventType: 10, Digest: make([]byte, 48), Payload: []byte("ACPI DATA")}, v1, v2},
		ReportData: binding.ReportData("app-data", []byte(payload)), ReportDataPayload: &payload,
		TPMQuote: &attest.TPMQuote{
			Message: []byte{1}, Signature: []byte{2}, AKCert: []byte{3}, Platform: 1,
			PCRs:     []attest.PCR{{Index: 14, Algorithm: "sha256", Value: make([]byte, 32)}},
			EventLog: []attest.PCREvent{{Index: 2, Digest: make([]byte, 32)}},
		},
	}
}

func TestV1IsMessagePackAsAnotherLibraryReadsIt(t *testing.T) {
	raw, err := EncodeV1(sample(t))
	if err != nil {
		t.Fatal(err)
	}
	var tree map[string]any
	if err := msgpack.Unmarshal(raw, &tree); err != nil {
		t.Fatal(err)
	}
	platform := tree["platform"].(map[string]any)
	data := platform["data"].(map[string]any)
	if platform["kind"] != "gcp-tdx" || len(data["quote"].([]any)) != 5 {
		t.Errorf("platform = %v", platform)
	}
	event := data["event_log"].([]any)[2].(map[string]any)
	if _, ok := event["event_payload"].([]byte); !ok || event["version"] != int8(2) || event["preimage"] == nil {
		t.Errorf("event = %#v", event)
	}
	if stack := tree["stack"].(map[string]any); stack["kind"] != "dstack-pod" || len(stack["data"].(map[string]any)["report_data"].([]any)) != 64 {
		t.Errorf("stack = %v", stack)
	}

	// And the other way: what that library writes, with bin for every byte field
	// and fields we do not know, is read to the same evidence.
	var clean func(v any) any
	clean = func(v any) any {
		switch v := v.(type) {
		case map[string]any:
			for k := range v {
				v[k] = clean(v[k])
			}
		case []any:
			all := len(v) > 0
			b := []byte{}
			for i := range v {
				v[i] = clean(v[i])
				n, ok := toInt(v[i])
				all = all && ok
				b = append(b, byte(n))
			}
			if all {
				return b
			}
		}
		return v
	}
	clean(tree)
	platform["data"].(map[string]any)["event_log"].([]any)[0].(map[string]any)["later"] = []any{1, "x", nil, 1.5, []byte("b")}
	var buf bytes.Buffer
	enc := msgpack.NewEncoder(&buf)
	// kind must come before data; sorted keys give data first, so write by hand.
	put := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	put(enc.EncodeMapLen(3))
	put(enc.EncodeString("version"))
	put(enc.EncodeUint64(1))
	for _, part := range []string{"platform", "stack"} {
		put(enc.EncodeString(part))
		put(enc.EncodeMapLen(2))
		for _, key := range []string{"kind", "data"} {
			put(enc.EncodeString(key))
			put(enc.Encode(tree[part].(map[string]any)[key]))
		}
	}
	e, err := Decode(buf.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	again, err := EncodeV1(e)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(raw, again) {
		t.Error("reading the other library's form and writing it gives other bytes")
	}
}

func toInt(v any) (int64, bool) {
	switch v := v.(type) {
	case int8:
		return int64(v), true
	case uint8:
		return int64(v), true
	}
	return 0, false
}

func TestArmCCATravelsInV1WithItsLog(t *testing.T) {
	e := sample(t)
	e.TEE, e.TPMQuote, e.ReportDataPayload, e.MRConfig, e.ReportDataClaimed = dstack.CCA, nil, nil, "{}", true
	raw, err := Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	back, err := Decode(raw)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(e, back); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if _, err := EncodeV0(e); fault.Code(err) != "container_needs_v1" {
		t.Errorf("V0 holds an Arm CCA token: %v", err)
	}
}

func TestV0RefusesWhatOnlyV1CanHold(t *testing.T) {
	if _, err := EncodeV0(sample(t)); fault.Code(err) != "container_needs_v1" {
		t.Errorf("err = %v", err)
	}
	raw, err := Encode(sample(t))
	if err != nil || raw[0] != 0x83 {
		t.Errorf("Encode did not choose V1: %v", err)
	}
}

// splice replaces old by new, once.
func splice(t testing.TB, raw, old, new []byte) []byte {
	t.Helper()
	i := bytes.Index(raw, old)
	if i < 0 {
		t.Fatalf("%q is not in the container", old)
	}
	return slices.Concat(raw[:i], new, raw[i+len(old):])
}

func TestContainersAreRefusedForTheirOwnReason(t *testing.T) {
	v0 := fixture(t, "simulator/attestation.bin")
	v1, err := EncodeV1(sample(t))
	if err != nil {
		t.Fatal(err)
	}
	plain := sample(t)
	plain.ReportDataPayload = nil
	plain.TPMQuote = nil
	plainV1, err := EncodeV1(plain)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(with func(*attest.Evidence) ([]byte, error), e *attest.Evidence) []byte {
		raw, err := with(e)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	nitro := &attest.Evidence{TEE: dstack.Nitro, Quote: []byte{1, 2, 3, 4, 5}}
	digest47 := &attest.Evidence{TEE: dstack.TDX, EventLog: []eventlog.Event{{Digest: make([]byte, 47)}}}
	platform9 := &attest.Evidence{TEE: dstack.TDX, TPMQuote: &attest.TPMQuote{Platform: 9}}
	if _, err := EncodeV1(platform9); fault.Code(err) != "container_malformed" {
		t.Errorf("an unknown platform is encoded: %v", err)
	}
	for _, with := range []func(*attest.Evidence) ([]byte, error){EncodeV0, EncodeV1} {
		if _, err := with(&attest.Evidence{TEE: dstack.TDX, Config: strings.Repeat("a", MaxSize)}); fault.Code(err) != "container_too_large" {
			t.Errorf("a container beyond the limit is encoded: %v", err)
		}
		if _, err := with(&attest.Evidence{TEE: dstack.TPM}); fault.Code(err) != "container_tee" {
			t.Errorf("evidence of a TEE without a form is encoded: %v", err)
		}
	}
	cases := []struct {
		name string
		raw  []byte
		code string
	}{
		{"empty", nil, "container_malformed"},
		{"larger than the limit", make([]byte, MaxSize+1), "container_too_large"},
		{"an unknown first byte", []byte{1, 2, 3}, "container_version"},
		{"an unknown quote variant", []byte{0, 9}, "container_tee"},
		{"a trailing byte in V0", append(bytes.Clone(v0), 0), "container_malformed"},
		{"a trailing byte in V1", append(bytes.Clone(v1), 0), "container_malformed"},
		{"V0 cut short", slices.Clip(bytes.Clone(v0[:len(v0)-1])), "container_malformed"},
		{"V1 cut short", slices.Clip(bytes.Clone(v1[:len(v1)-1])), "container_malformed"},
		{"a V0 length of 2^30 or more", []byte{0, 0, 0x03, 0xff, 0xff, 0xff, 0xff}, "container_too_large"},
		{"a V0 length beyond the quote limit", []byte{0, 0, 0xfe, 0xff, 0xff, 0xff}, "container_too_large"},
		{"a V0 length in a longer form than needed", splice(t, encode(EncodeV0, nitro), []byte("\x00\x02\x14"), []byte("\x00\x02\x15\x00")), "container_malformed"},
		{"a V0 event count of 2^30-1", []byte{0, 0, 0, 0xfe, 0xff, 0xff, 0xff}, "container_too_large"},
		{"a V0 runtime event that the log's copy contradicts", splice(t, v0, []byte("\x18app-id\x50\x5b"), []byte("\x18app-id\x50\x5c")), "container_log_mismatch"},
		{"a V0 event name that is not UTF-8", splice(t, v0, []byte("app-id"), []byte("app-\xffd")), "container_malformed"},
		{"V1 of version 2", splice(t, v1, []byte("\xa7version\x01"), []byte("\xa7version\x02")), "container_version"},
		{"V1 with an unknown platform", splice(t, v1, []byte("gcp-tdx"), []byte("gcp-tdy")), "container_tee"},
		{"V1 with an unknown stack", splice(t, v1, []byte("dstack-pod"), []byte("dstack-pud")), "container_stack"},
		{"V1 without a stack", splice(t, v1, []byte("\xa5stack"), []byte("\xa5stuck")), "container_malformed"},
		{"V1 with a key twice", append(splice(t, plainV1, []byte("\xa4data\x83\xabreport_data"), []byte("\xa4data\x84\xabreport_data")), "\xa6config\xa1x"...), "container_malformed"},
		{"a V0 event digest of 47 bytes", encode(EncodeV0, digest47), "container_malformed"},
		{"a V1 event digest of 47 bytes", encode(EncodeV1, digest47), "container_malformed"},
		{"a V0 TPM quote of an unknown platform", encode(EncodeV0, platform9), "container_malformed"},
		{"a V1 TPM quote of an unknown platform", splice(t, v1, []byte("\xa8platform\xa3gcp"), []byte("\xa8platform\xa3gcq")), "container_malformed"},
		{"V1 with a negative version", splice(t, v1, []byte("\xa7version\x01"), []byte("\xa7version\xd0\xff")), "container_malformed"},
		{"V1 with an event name that is not UTF-8", splice(t, plainV1, []byte("app-id"), []byte("app-\xffd")), "container_malformed"},
		{"V1 with report data of 63 bytes", splice(t, encode(EncodeV1, nitro),
			append([]byte("\xabreport_data\xdc\x00\x40"), make([]byte, 64)...), append([]byte("\xabreport_data\xdc\x00\x3f"), make([]byte, 63)...)), "container_malformed"},
		{"V1 with data before kind", splice(t, plainV1, []byte("\xa4kind\xa3tdx\xa4data"), []byte("\xa4data\xa3tdx\xa4kind")), "container_malformed"},
		{"V1 with an event of version 3", splice(t, plainV1, []byte("\xa7version\x02"), []byte("\xa7version\x03")), "log_event_version"},
		{"V1 whose payload is not the one committed to", splice(t, v1, []byte("\xa5hello"), []byte("\xa5hellp")), "container_payload_mismatch"},
		{"V1 with an array of 2^32-1 for a quote", append([]byte("\x83\xa7version\x01\xa8platform\x82\xa4kind\xa3tdx\xa4data\x82\xa5quote\xdd"), 0xff, 0xff, 0xff, 0xff), "container_too_large"},
		{"V1 with an array larger than what is left", append([]byte("\x83\xa7version\x01\xa8platform\x82\xa4kind\xa3tdx\xa4data\x82\xa5quote\xdd"), 0, 1, 0xff, 0xff), "container_malformed"},
		{"V1 with a map of 2^32-1 entries", []byte{0xdf, 0xff, 0xff, 0xff, 0xff}, "container_too_large"},
		{"V1 nested 100000 deep in an unknown field", append([]byte("\x81\xa1x"), bytes.Repeat([]byte{0x91}, 100000)...), "container_too_large"},
		{"V1 with an integer of 256 in bytes", append([]byte("\x83\xa7version\x01\xa8platform\x82\xa4kind\xa3tdx\xa4data\x82\xa5quote\x91\xcd"), 1, 0), "container_too_large"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := Decode(c.raw)
			if fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want code %q", err, fault.Code(err), c.code)
			}
		})
	}
}

// B19: a log that nothing vouches for must not look like one that a register does.
func TestThreat_B19_EventsOfATEEWithoutARegisterAreUnbound(t *testing.T) {
	e, err := Decode(fixture(t, "sev-snp/sev_snp_attestation.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if len(e.EventLog) != 0 || len(e.Unbound) == 0 {
		t.Errorf("%d bound events, %d unbound", len(e.EventLog), len(e.Unbound))
	}
}

// B15: bombs must not allocate in proportion to what they declare.
func TestThreat_B15_BombsStaySmall(t *testing.T) {
	many := []byte{0, 0, 0} // TDX, empty quote, then as many empty events as allowed
	many = binary.LittleEndian.AppendUint32(many, eventlog.MaxEvents<<2|2)
	for range eventlog.MaxEvents {
		many = append(many, make([]byte, 11)...)
	}
	for name, bomb := range map[string][]byte{
		"ten thousand events": many,
		"nested arrays":       append([]byte("\x81\xa1x"), bytes.Repeat([]byte{0x91}, 1<<20)...),
		"nested maps":         append([]byte("\x81\xa1x"), bytes.Repeat([]byte{0x81, 0xa0}, 1<<20)...),
		"huge array of nils":  append([]byte("\x81\xa1x\xdd\x00\x80\x00\x00"), bytes.Repeat([]byte{0xc0}, 8<<20)...),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _ = Decode(bomb)
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > 32<<20 {
			t.Errorf("%s: %d MiB allocated", name, used>>20)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, name := range fixtures {
		f.Add(fixture(f, name.name))
	}
	v1, err := EncodeV1(sample(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(v1)
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := Decode(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		again, err := EncodeV1(e)
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		if _, err := Decode(again); err != nil {
			t.Fatalf("what was encoded cannot be decoded: %v", err)
		}
	})
}

// What the containers hold is what their quotes measure.
func TestFixturesReplayToTheirQuotes(t *testing.T) {
	var v struct {
		Cases []struct {
			File       string
			MRTD       dstack.Measurement
			RTMR0      dstack.Measurement
			RTMR1      dstack.Measurement
			RTMR2      dstack.Measurement
			RTMR3      dstack.Measurement
			Replayed   dstack.Measurement `json:"replayed_rtmr3"`
			MRConfigID dstack.MRConfigID
			ReportData dstack.ReportData  `json:"report_data"`
			AppID      dstack.AppID       `json:"app_id"`
			Compose    dstack.ComposeHash `json:"compose_hash"`
			Instance   dstack.InstanceID  `json:"instance_id"`
			TDAttr     string             `json:"td_attr"`
			XFAM       string             `json:"xfam"`
			SVN        string             `json:"tee_tcb_svn"`
		} `json:"tdx_cases"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/computed_vectors.json"), &v); err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, c := range v.Cases {
		if c.File == "tdx/quote-report.json" {
			continue // not a container; eventlog tests replay it
		}
		checked++
		e, err := Decode(fixture(t, c.File))
		if err != nil {
			t.Fatal(err)
		}
		q, err := tdx.ParseQuote(e.Quote)
		if err != nil {
			t.Fatal(err)
		}
		b := q.Body()
		if b.MRTD != c.MRTD || b.RTMR != [4]dstack.Measurement{c.RTMR0, c.RTMR1, c.RTMR2, c.RTMR3} || b.MRConfigID != c.MRConfigID ||
			b.ReportData != c.ReportData || e.ReportData != c.ReportData || hex.EncodeToString(b.TDAttributes[:]) != c.TDAttr ||
			hex.EncodeToString(b.XFAM[:]) != c.XFAM || hex.EncodeToString(b.TEETCBSVN[:]) != c.SVN {
			t.Errorf("%s: body %+v", c.File, b)
		}
		if got, err := eventlog.Replay(e.EventLog, eventlog.RuntimeIMR); err != nil || got != c.Replayed || got != b.RTMR[3] {
			t.Errorf("%s: RTMR3 replays to %s (%v)", c.File, got, err)
		}
		id, err := eventlog.Boundary(e.EventLog)
		if err != nil || id.AppID != c.AppID || id.ComposeHash != c.Compose || !bytes.Equal(id.InstanceID, c.Instance[:]) {
			t.Errorf("%s: identity %+v (%v)", c.File, id, err)
		}
		if mrconfig.IDv1(id.ComposeHash) != b.MRConfigID {
			t.Errorf("%s: MRCONFIGID %s does not commit to compose hash %s", c.File, b.MRConfigID, id.ComposeHash)
		}
	}
	if checked != 2 {
		t.Errorf("%d containers checked", checked)
	}
}
