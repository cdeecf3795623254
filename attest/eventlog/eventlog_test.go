// SPDX-License-Identifier: Apache-2.0

package eventlog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

type vectorEvent struct {
	Name, Payload string
	Version       int
	Preimage      string `json:"preimage_hex"`
	SHA384        string
	SHA256        string
}

func (v vectorEvent) event(t testing.TB) Event {
	t.Helper()
	payload, err := hex.DecodeString(v.Payload)
	if err != nil {
		t.Fatal(err)
	}
	e := Event{IMR: RuntimeIMR, EventType: RuntimeEventType, Name: v.Name, Payload: payload}
	if v.Version == 2 {
		e.Version = 2
	}
	return e
}

func computed(t testing.TB, v any) {
	t.Helper()
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/computed_vectors.json"), v); err != nil {
		t.Fatal(err)
	}
}

func TestRuntimeDigestsMatchTheVectors(t *testing.T) {
	var v struct {
		Events []vectorEvent `json:"runtime_event_digests"`
	}
	computed(t, &v)
	if len(v.Events) < 10 {
		t.Fatalf("%d vectors", len(v.Events))
	}
	for _, c := range v.Events {
		e := c.event(t)
		if got := hex.EncodeToString(PreimageOf(e)); got != c.Preimage {
			t.Errorf("%q V%d: preimage %s, want %s", c.Name, c.Version, got, c.Preimage)
		}
		if got := Digest(e).String(); got != c.SHA384 {
			t.Errorf("%q V%d: digest %s, want %s", c.Name, c.Version, got, c.SHA384)
		}
	}
}

func TestMixedVersionsReplayToTheVector(t *testing.T) {
	var v struct {
		Replay struct {
			Events []vectorEvent
			RTMR   string `json:"rtmr_sha384"`
			PCR    string `json:"pcr_sha256"`
		} `json:"mixed_replay"`
	}
	computed(t, &v)
	var events []Event
	for _, e := range v.Replay.Events {
		events = append(events, e.event(t))
	}
	if got, err := Replay(events, RuntimeIMR); err != nil || got.String() != v.Replay.RTMR {
		t.Errorf("RTMR %s (%v), want %s", got, err, v.Replay.RTMR)
	}
	if got, err := ReplayRuntime(events, "sha-256"); err != nil || hex.EncodeToString(got) != v.Replay.PCR {
		t.Errorf("PCR %x (%v), want %s", got, err, v.Replay.PCR)
	}
}

// quoteLog reads a vector that holds quote and log, and returns the four
// registers of the quote.
func quoteLog(t testing.TB, name string) (events []Event, rtmr [4]string) {
	t.Helper()
	var v struct {
		Quote    string
		EventLog string `json:"event_log"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/tdx/"+name), &v); err != nil {
		t.Fatal(err)
	}
	events, err := ParseJSON([]byte(v.EventLog))
	if err != nil {
		t.Fatal(err)
	}
	for i := range rtmr {
		off := 2 * (376 + 48*i)
		rtmr[i] = v.Quote[off : off+96]
	}
	return events, rtmr
}

func TestLogsOfRealQuotesReplayToTheirRegisters(t *testing.T) {
	for _, name := range []string{"quote-report.json", "tdx-lite-getquote.json"} {
		events, rtmr := quoteLog(t, name)
		for i, want := range rtmr {
			if got, err := Replay(events, uint32(i)); err != nil || got.String() != want {
				t.Errorf("%s: RTMR%d %s (%v), want %s", name, i, got, err, want)
			}
		}
		// And again without any supplied digest of a runtime event.
		for i := range events {
			if events[i].IsRuntime() {
				events[i].Digest = nil
			}
		}
		if got, err := Replay(events, 3); err != nil || got.String() != rtmr[3] {
			t.Errorf("%s stripped: RTMR3 %s (%v)", name, got, err)
		}
	}
}

func TestIdentityOfARealLog(t *testing.T) {
	var v struct {
		Cases []struct {
			File         string
			AppID        string `json:"app_id"`
			ComposeHash  string `json:"compose_hash"`
			InstanceID   string `json:"instance_id"`
			AtBootMRDone string `json:"rtmr3_at_boot_mr_done"`
		} `json:"tdx_cases"`
	}
	computed(t, &v)
	checked := 0
	for _, c := range v.Cases {
		name := map[string]string{"tdx/quote-report.json": "quote-report.json", "tdx/tdx-lite-attestation.json": "tdx-lite-getquote.json"}[c.File]
		if name == "" {
			continue
		}
		checked++
		events, _ := quoteLog(t, name)
		id, err := Boundary(events)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if id.AppID.String() != c.AppID || id.ComposeHash.String() != c.ComposeHash || hex.EncodeToString(id.InstanceID) != c.InstanceID || !id.SystemReady {
			t.Errorf("%s: identity %+v", name, id)
		}
		i := slices.IndexFunc(events, func(e Event) bool { return e.Name == BootMRDone })
		launch := Runtime(events[:i+1])
		if got, err := Replay(launch, RuntimeIMR); err != nil || got.String() != c.AtBootMRDone {
			t.Errorf("%s: RTMR3 at boot-mr-done %s (%v), want %s", name, got, err, c.AtBootMRDone)
		}
		if id, err := LaunchIdentity(launch); err != nil || id.AppID.String() != c.AppID || id.SystemReady {
			t.Errorf("%s: launch identity %+v, %v", name, id, err)
		}
	}
	if checked != 2 {
		t.Errorf("%d cases checked", checked)
	}
}

func TestCCELParsesToTheExpectedEvents(t *testing.T) {
	snap := testkit.Vectors(t, "attestation/event-logs/ccel.expected.json.snap")
	parts := bytes.SplitN(snap, []byte("---\n"), 3)
	want, err := ParseJSON(bytes.TrimSpace(parts[2]))
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseCCEL(testkit.Vectors(t, "attestation/event-logs/ccel.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if len(got) == 0 || len(got) != len(want) {
		t.Fatalf("%d events, want %d", len(got), len(want))
	}
	acpi := 0
	for i := range got {
		if fmt.Sprint(got[i]) != fmt.Sprint(want[i]) {
			t.Errorf("event %d: %+v, want %+v", i, got[i], want[i])
		}
		if got[i].IsACPI() {
			acpi++
		}
	}
	if acpi != 3 {
		t.Errorf("%d ACPI events, want 3", acpi)
	}
}

func TestJSONKeepsItsExactForm(t *testing.T) {
	v2, err := RuntimeV2("x<y&z", []byte{1})
	if err != nil {
		t.Fatal(err)
	}
	v1, err := RuntimeV1("storage-fs", []byte("ext4"))
	if err != nil {
		t.Fatal(err)
	}
	events := []Event{{IMR: 0, EventType: 4, Digest: make([]byte, 48)}, v1, v2}
	raw, err := MarshalJSON(events)
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"imr":0,"event_type":4,"digest":"` + strings.Repeat("0", 96) + `","event":"","event_payload":""},` +
		`{"imr":3,"event_type":134217729,"digest":"` + hex.EncodeToString(v1.Digest) + `","event":"storage-fs","event_payload":"65787434"},` +
		`{"imr":3,"event_type":134217729,"digest":"` + hex.EncodeToString(v2.Digest) + `","event":"x<y&z","event_payload":"01","version":2,"preimage":"` + hex.EncodeToString(v2.Preimage) + `"}]`
	if string(raw) != want {
		t.Errorf("got  %s\nwant %s", raw, want)
	}
	back, err := ParseJSON(raw)
	if err != nil || fmt.Sprint(back) != fmt.Sprint(events) {
		t.Errorf("read back %v (%v)", back, err)
	}
	if one, err := ParseJSON([]byte(`[{"imr":3,"event_type":134217729,"event":"a","event_payload":"","version":1}]`)); err != nil || one[0].Version != 0 || one[0].Digest != nil {
		t.Errorf("version 1 read as %v (%v)", one, err)
	}
}

func TestLogsAreRefusedForTheirOwnReason(t *testing.T) {
	one := func(fields string) string { return `[{"imr":3,"event_type":134217729` + fields + `}]` }
	for _, c := range []struct{ name, in, code string }{
		{"not JSON", `[{`, "log_malformed"},
		{"an object", `{}`, "log_malformed"},
		{"two values", `[] []`, "log_malformed"},
		{"a register missing", `[{"event_type":1}]`, "log_malformed"},
		{"a negative register", `[{"imr":-1,"event_type":1}]`, "log_malformed"},
		{"a digest of 47 bytes", one(`,"digest":"` + strings.Repeat("0", 94) + `"`), "log_malformed"},
		{"a digest that is not hex", one(`,"digest":"zz"`), "log_malformed"},
		{"a key twice", one(`,"event":"app-id","event":"x"`), "log_malformed"},
		{"a key twice in another case", one(`,"event":"app-id","Event":"x"`), "log_malformed"},
		{"a name that is not UTF-8", one(`,"event":"` + "\xff" + `"`), "log_malformed"},
		{"version 3", one(`,"version":3`), "log_event_version"},
		{"version 0", one(`,"version":0`), "log_event_version"},
		{"version 2 on a boot event", `[{"imr":0,"event_type":4,"version":2}]`, "log_event_version"},
		{"a preimage on a version 1 event", one(`,"preimage":"00"`), "log_preimage_mismatch"},
		{"an event name of 2 KiB", one(`,"event":"` + strings.Repeat("a", 2048) + `"`), "log_too_large"},
		{"a payload of 100 KiB", one(`,"event_payload":"` + strings.Repeat("a", 200<<10) + `"`), "log_too_large"},
		{"more than 1 MiB", strings.Repeat(" ", MaxJSON) + "[]", "log_too_large"},
		{"10001 events", "[" + strings.Repeat(`{"imr":0,"event_type":1},`, MaxEvents) + `{"imr":0,"event_type":1}]`, "log_too_large"},
		{"deep nesting", `[{"imr":0,"event_type":1,"x":` + strings.Repeat("[", 10000) + strings.Repeat("]", 10000) + `}]`, "log_malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := ParseJSON([]byte(c.in)); fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}

// bootLog is the log of a complete boot, with one application event after it.
func bootLog(t testing.TB) []Event {
	t.Helper()
	var log []Event
	for _, e := range []struct {
		name    string
		payload int // bytes
	}{
		{SystemPreparing, 0}, {AppIDEvent, 20}, {ComposeHashEvent, 32}, {InitScriptHash, 32}, {InitScriptHash, 32},
		{GPUPolicyHash, 32}, {InstanceIDEvent, 20}, {BootMRDone, 0}, {OSImageHash, 32}, {KeyProvider, 23}, {StorageFS, 4},
		{StorageNew, 0}, {EnvVersion, 8}, {SystemChannelKey, 32}, {SystemReady, 0}, {"my-app", 3},
	} {
		log = append(log, ev(t, e.name, bytes.Repeat([]byte{7}, e.payload)))
	}
	return log
}

func ev(t testing.TB, name string, payload []byte) Event {
	t.Helper()
	e, err := RuntimeV1(name, payload)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func index(log []Event, name string) int {
	return slices.IndexFunc(log, func(e Event) bool { return e.Name == name })
}

func TestBoundaryReadsACompleteBoot(t *testing.T) {
	id, err := Boundary(bootLog(t))
	if err != nil {
		t.Fatal(err)
	}
	if id.AppID != (dstack.AppID(bytes.Repeat([]byte{7}, 20))) || len(id.InstanceID) != 20 || len(id.OSImageHash) != 32 || len(id.ChannelKey) != 32 ||
		len(id.InitScriptHashes) != 2 || len(id.GPUPolicyHash) != 32 || len(id.KeyProvider) != 23 || len(id.StorageFS) != 4 || !id.StorageNew || id.EnvVersion == 0 || !id.SystemReady {
		t.Errorf("identity %+v", id)
	}
	// An app without instance ids, on a guest older than the optional events.
	old := []Event{ev(t, AppIDEvent, make([]byte, 20)), ev(t, ComposeHashEvent, make([]byte, 32)), ev(t, InstanceIDEvent, nil),
		ev(t, BootMRDone, nil), ev(t, "rootfs-hash", make([]byte, 32)), ev(t, SystemReady, nil)}
	if id, err := Boundary(old); err != nil || len(id.InstanceID) != 0 || id.ChannelKey != nil || id.OSImageHash != nil {
		t.Errorf("old log: %+v, %v", id, err)
	}
}

// B09: forged logs, each refused for its own reason.
func TestThreat_B09_ForgedLogs(t *testing.T) {
	insert := func(log []Event, at int, e ...Event) []Event { return slices.Insert(slices.Clone(log), at, e...) }
	without := func(log []Event, name string) []Event {
		return slices.DeleteFunc(slices.Clone(log), func(e Event) bool { return e.Name == name })
	}
	log := bootLog(t)
	compose := ev(t, ComposeHashEvent, bytes.Repeat([]byte{9}, 32))
	set := func(i int, change func(*Event)) []Event {
		out := slices.Clone(log)
		change(&out[i])
		return out
	}
	swap := func(a, b string) []Event {
		out := slices.Clone(log)
		i, j := index(log, a), index(log, b)
		out[i], out[j] = out[j], out[i]
		return out
	}
	for _, c := range []struct {
		name string
		log  []Event
		code string
	}{
		{"a second compose-hash after system-ready", append(slices.Clone(log), compose), "log_reserved_after_ready"},
		{"a second compose-hash before it", insert(log, index(log, ComposeHashEvent)+1, compose), "log_duplicate_event"},
		{"a second compose-hash between the boundaries", insert(log, index(log, BootMRDone)+1, compose), "log_duplicate_event"},
		{"a compose-hash hidden after system-ready by a colon", append(slices.Clone(log), Event{IMR: 3, EventType: RuntimeEventType, Name: "compose-hash:x"}), "log_reserved_after_ready"},
		{"an unknown system event after system-ready", append(slices.Clone(log), ev(t, "system-halt", nil)), "log_reserved_after_ready"},
		{"a channel key after system-ready", append(without(log, SystemChannelKey), ev(t, SystemChannelKey, make([]byte, 32))), "log_reserved_after_ready"},
		{"no system-ready", without(log, SystemReady), "log_boundary_missing"},
		{"no boot-mr-done", without(log, BootMRDone), "log_boundary_missing"},
		{"an empty log", nil, "log_boundary_missing"},
		{"system-ready twice", append(slices.Clone(log), ev(t, SystemReady, nil)), "log_boundary_duplicate"},
		{"boot-mr-done twice", insert(log, index(log, BootMRDone), ev(t, BootMRDone, nil)), "log_boundary_duplicate"},
		{"boot-mr-done again after system-ready", append(slices.Clone(log), ev(t, BootMRDone, nil)), "log_boundary_duplicate"},
		{"app-id and compose-hash exchanged", swap(AppIDEvent, ComposeHashEvent), "log_order"},
		{"instance-id after boot-mr-done", swap(InstanceIDEvent, BootMRDone), "log_order"},
		{"the boundaries exchanged", swap(BootMRDone, SystemReady), "log_reserved_after_ready"},
		{"no app-id", without(log, AppIDEvent), "log_identity_missing"},
		{"no compose-hash", without(log, ComposeHashEvent), "log_identity_missing"},
		{"no instance-id", without(log, InstanceIDEvent), "log_identity_missing"},
		{"six init scripts", insert(log, index(log, InitScriptHash), log[3], log[3], log[3], log[3]), "log_duplicate_event"},
		{"an unknown reserved name", insert(log, 1, ev(t, "dstack-debug", nil)), "log_reserved_unknown"},
		{"a colon in a name before system-ready", insert(log, 1, Event{IMR: 3, EventType: RuntimeEventType, Name: "a:b"}), "log_name_ambiguous"},
		{"B17: a compose hash of 31 bytes", insert(without(log, ComposeHashEvent), 2, ev(t, ComposeHashEvent, make([]byte, 31))), "log_payload_length"},
		{"B16: an app id of 21 bytes", insert(without(log, AppIDEvent), 1, ev(t, AppIDEvent, make([]byte, 21))), "log_payload_length"},
		{"an instance id of one byte", insert(without(log, InstanceIDEvent), 6, ev(t, InstanceIDEvent, make([]byte, 1))), "log_payload_length"},
		{"a boundary with a payload", insert(without(log, SystemReady), 12, ev(t, SystemReady, []byte{1})), "log_payload_length"},
		{"a supplied digest that is another event's", set(1, func(e *Event) { e.Digest = log[2].Digest }), "log_digest_mismatch"},
		{"a payload that the supplied digest does not cover", set(2, func(e *Event) { e.Payload = bytes.Repeat([]byte{8}, 32) }), "log_digest_mismatch"},
		{"a runtime event in another register", set(1, func(e *Event) { e.IMR = 0 }), "log_register"},
		{"a boot event in the runtime register", set(1, func(e *Event) { e.EventType = 4 }), "log_register"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Boundary(c.log); fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}

func TestReplayNeverTrustsASuppliedDigest(t *testing.T) {
	log := bootLog(t)
	want, err := Replay(log, RuntimeIMR)
	if err != nil {
		t.Fatal(err)
	}
	v2, err := RuntimeV2("app", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		e    Event
		code string
	}{
		{"a foreign digest", Event{IMR: 3, EventType: RuntimeEventType, Name: "x", Digest: make([]byte, 48)}, "log_digest_mismatch"},
		{"a runtime event of another register", Event{IMR: 1, EventType: RuntimeEventType, Name: "x"}, "log_register"},
		{"a boot event in the runtime register", Event{IMR: 3, EventType: 4, Digest: make([]byte, 48)}, "log_register"},
		{"a preimage of another event", Event{IMR: 3, EventType: RuntimeEventType, Name: "y", Version: 2, Preimage: v2.Preimage}, "log_preimage_mismatch"},
		{"an unknown version", Event{IMR: 3, EventType: RuntimeEventType, Version: 7}, "log_event_version"},
	} {
		if got, err := Replay(append(slices.Clone(log), c.e), RuntimeIMR); fault.Code(err) != c.code {
			t.Errorf("%s: %s, %v, want %s", c.name, got, err, c.code)
		}
	}
	if got, err := Replay(append(slices.Clone(log), v2), RuntimeIMR); err != nil || got == want {
		t.Errorf("a further event leaves the register at %s (%v)", got, err)
	}
	if _, err := Replay([]Event{{IMR: 0, EventType: 4}}, 0); fault.Code(err) != "log_malformed" {
		t.Errorf("a boot event without digest: %v", err)
	}
	if _, err := Replay(make([]Event, MaxEvents+1), 0); fault.Code(err) != "log_too_large" {
		t.Errorf("too many events: %v", err)
	}
	if _, err := ReplayRuntime(make([]Event, MaxEvents+1), "sha-256"); fault.Code(err) != "log_too_large" {
		t.Errorf("too many events for a PCR: %v", err)
	}
	if _, err := ReplayRuntime([]Event{{IMR: 3, EventType: RuntimeEventType, Name: "x", Digest: make([]byte, 48)}}, "sha-256"); fault.Code(err) != "log_digest_mismatch" {
		t.Errorf("a foreign digest in a PCR: %v", err)
	}
}

func TestNamesWithAColonCannotBeMade(t *testing.T) {
	if _, err := RuntimeV1("a:b", []byte("c")); fault.Code(err) != "log_name_ambiguous" {
		t.Errorf("err = %v", err)
	}
	// The reason: in the first form both have one digest.
	a, b := Event{Name: "a:b", Payload: []byte("c")}, Event{Name: "a", Payload: []byte("b:c")}
	if Digest(a) != Digest(b) {
		t.Error("the first form is not ambiguous after all")
	}
	a.Version, b.Version = 2, 2
	if Digest(a) == Digest(b) {
		t.Error("the second form is ambiguous")
	}
}

func TestNamesMustBeUTF8(t *testing.T) {
	if _, err := RuntimeV2("\xff", nil); fault.Code(err) != "log_malformed" {
		t.Errorf("err = %v", err)
	}
}

func TestReservedNames(t *testing.T) {
	for name, want := range map[string]bool{"compose-hash": true, "compose-hash:x": true, "system-anything": true, "dstack-x": true, "app": false, "systems": false, "": false} {
		if Reserved(name) != want {
			t.Errorf("Reserved(%q) = %v", name, !want)
		}
	}
}

func TestCCELIsRefusedForItsOwnReason(t *testing.T) {
	good := testkit.Vectors(t, "attestation/event-logs/ccel.bin")
	// The first record ends at the first event; find it by its known digest.
	digest, _ := hex.DecodeString("2b630fa1d8fa9b6e8c6507d2256803ed227888f7d1f62ca5cfbddfe495338b1c6a0fc339ea64700f0835c0897a662789")
	at := bytes.Index(good, digest) - 14 // imr, type, count, algorithm
	change := func(off int, b ...byte) []byte {
		out := bytes.Clone(good)
		copy(out[at+off:], b)
		return out
	}
	// log returns a header and then records of one register, all of one shape.
	record := func(register uint32, algorithm uint16, digests, size int) []byte {
		b := binary.LittleEndian.AppendUint32(nil, register)
		b = binary.LittleEndian.AppendUint32(b, 4)
		b = binary.LittleEndian.AppendUint32(b, uint32(digests))
		for range digests {
			b = append(binary.LittleEndian.AppendUint16(b, algorithm), make([]byte, size)...)
		}
		return binary.LittleEndian.AppendUint32(b, 0)
	}
	log := func(records int, one []byte) []byte {
		return slices.Concat(make([]byte, 32), bytes.Repeat(one, records), []byte{0xff, 0xff, 0xff, 0xff})
	}
	if events, err := ParseCCEL(slices.Concat(log(3, record(0, 0xb, 16, 32))[:32+3*(16*34+16)], log(2, record(1, 0xc, 1, 48))[32:])); err != nil || len(events) != 2 {
		t.Errorf("records of register 0 are not dropped: %d events, %v", len(events), err)
	}
	for _, c := range []struct {
		name string
		in   []byte
		code string
	}{
		{"10001 events", log(MaxEvents+1, record(1, 0xc, 1, 48)), "log_too_large"},
		{"17 digests in register 0", log(1, record(0, 0xc, 17, 48)), "log_malformed"},
		{"an unknown algorithm in register 0", log(1, record(0, 0x99, 1, 0)), "log_malformed"},
		{"empty", nil, "log_malformed"},
		{"cut in the first event", good[:at+20], "log_malformed"},
		{"without the terminator", bytes.TrimRight(good, "\xff"), "log_malformed"},
		{"larger than the limit", make([]byte, MaxCCEL+1), "log_too_large"},
		{"a spec id event beyond the end", append(make([]byte, 28), 0xff, 0xff, 0xff, 0x7f), "log_malformed"},
		{"an unknown algorithm", change(12, 0x99), "log_malformed"},
		{"SHA-256 only", change(12, 0x0b), "log_malformed"},
		{"no digest", change(8, 0), "log_malformed"},
		{"two digests", change(8, 2), "log_malformed"},
		{"four billion digests", change(8, 0xff, 0xff, 0xff, 0xff), "log_malformed"},
		{"a payload of 4 GiB", change(14+48, 0xff, 0xff, 0xff, 0xff), "log_too_large"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := ParseCCEL(c.in); fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}

func FuzzParseJSON(f *testing.F) {
	for _, name := range []string{"quote-report.json", "tdx-lite-getquote.json"} {
		events, _ := quoteLog(f, name)
		raw, err := MarshalJSON(events)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`[{"imr":3,"event_type":134217729,"event":"a","event_payload":"","version":2,"preimage":"00"}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		events, err := ParseJSON(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		raw, err := MarshalJSON(events)
		if err != nil {
			t.Fatal(err)
		}
		if len(raw) <= MaxJSON {
			if again, err := ParseJSON(raw); err != nil || fmt.Sprint(again) != fmt.Sprint(events) {
				t.Fatalf("read, written and read again differs: %v", err)
			}
		}
		_, _ = Replay(events, 0)
		_, _ = Replay(events, RuntimeIMR)
		_, _ = Boundary(events)
	})
}

func FuzzParseCCEL(f *testing.F) {
	good := testkit.Vectors(f, "attestation/event-logs/ccel.bin")
	f.Add(bytes.TrimRight(good, "\xff"))
	f.Add(append(bytes.TrimRight(good, "\xff"), 0xff, 0xff, 0xff, 0xff))
	f.Fuzz(func(t *testing.T, data []byte) {
		events, err := ParseCCEL(data)
		if err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
		for _, e := range events {
			if len(e.Digest) != 48 {
				t.Fatalf("event with a digest of %d bytes", len(e.Digest))
			}
		}
	})
}
