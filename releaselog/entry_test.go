// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bytes"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/dstack-go/dstack"
)

const golden = `{"time":"2026-11-28T20:07:46.123Z","kind":"refusal","purpose":"app-key","role":"app","app_id":"0100000000000000000000000000000000000000","tcb_status":"OutOfDate","trust":"development","session":true,"code":"compose_not_allowed","reason":"no \u003cscript\u003e","lease_until":"2026-11-28T21:07:46Z","epoch":7}`

func TestEntryHasOneSpelling(t *testing.T) {
	e := Entry{
		Time: time.Date(2026, 11, 28, 21, 7, 46, 123_456_789, time.FixedZone("", 3600)), Kind: Refusal, Purpose: "app-key", Role: "app",
		AppID: dstack.AppID{1}, TCBStatus: "OutOfDate", Trust: dstack.TrustDevelopment, Session: true, Code: "compose_not_allowed", Reason: "no <script>",
		LeaseUntil: time.Date(2026, 11, 28, 21, 7, 46, 999, time.UTC), Epoch: 7,
	}
	data, err := e.encode()
	if err != nil || string(data) != golden {
		t.Fatalf("%s, %v\nwant %s", data, err, golden)
	}
	back, err := ParseEntry(data)
	must(t, err)
	if again, err := back.encode(); err != nil || !bytes.Equal(again, data) {
		t.Fatalf("%s, %v", again, err)
	}
}

func TestParseEntryRefuses(t *testing.T) {
	swap := func(old, new string) string {
		s := strings.Replace(golden, old, new, 1)
		if s == golden {
			t.Fatalf("%s is not in the entry", old)
		}
		return s
	}
	for name, text := range map[string]string{
		"nothing":               "",
		"null":                  "null",
		"an array":              "[]",
		"two":                   golden + golden,
		"a newline":             golden + "\n",
		"a space":               swap(`,"kind"`, `, "kind"`),
		"an unknown field":      swap(`"epoch":7`, `"epoch":7,"x":1`),
		"a field twice":         swap(`"epoch":7`, `"epoch":6,"epoch":7`),
		"another case":          swap(`"kind"`, `"Kind"`),
		"another order":         `{"kind":"grant","time":"2026-11-28T20:07:46Z"}`,
		"a zero field":          swap(`"epoch":7`, `"epoch":0`),
		"no time":               `{"kind":"grant"}`,
		"no kind":               `{"time":"2026-11-28T20:07:46Z","kind":""}`,
		"microseconds":          swap("46.123Z", "46.123456Z"),
		"another zone":          swap("46.123Z", "46.123+01:00"),
		"an offset of none":     swap("46.123Z", "46.123+00:00"),
		"before the epoch":      swap("2026-11-28T20", "1926-11-28T20"),
		"a short id":            swap(`"01000000`, `"010000`),
		"capital digits":        swap(`"01000000`, `"0A000000`),
		"a kind of two words":   swap("refusal", "re fusal"),
		"a code of a line":      swap("compose_not_allowed", `a\nb`),
		"a long word":           swap("OutOfDate", strings.Repeat("O", 65)),
		"a negative epoch":      swap(`"epoch":7`, `"epoch":-7`),
		"broken UTF-8":          swap("no ", "no \xff"),
		"an unescaped bracket":  swap(`\u003c`, "<"),
		"a text beyond bounds":  swap("no ", strings.Repeat("n", maxText+1)),
		"a bomb":                strings.Repeat("[", MaxEntry),
		"more than is allowed":  swap("no ", strings.Repeat("n", MaxEntry)),
		"a short evidence hash": swap(`"lease_until"`, `"evidence":"00","lease_until"`),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseEntry([]byte(text))
			wantCode(t, err, "release_log_entry")
		})
	}
}

// A refusal gets logged whatever its reason quotes.
func TestTextsOfAttackersAreBounded(t *testing.T) {
	for name, text := range map[string]string{
		"invalid UTF-8":        strings.Repeat("\xff\xfe", 5000),
		"control characters":   strings.Repeat("\x00\x1b", 5000),
		"long runes":           "x" + strings.Repeat("😀", 5000),
		"newlines":             "a\n{\"kind\":\"grant\"}\n",
		"separators":           strings.Repeat("\u2028", 5000),
		"half a rune":          strings.Repeat("a", maxText-1) + "é",
		"just what is allowed": strings.Repeat("a", maxText),
	} {
		t.Run(name, func(t *testing.T) {
			e := testEntry(1)
			e.Kind, e.Reason, e.By, e.Note = Refusal, text, text, text
			data, err := e.encode()
			must(t, err)
			if len(data) > MaxEntry || !utf8.Valid(data) || bytes.IndexByte(data, '\n') >= 0 {
				t.Fatalf("%d bytes: %.200q", len(data), data)
			}
			back, err := ParseEntry(data)
			must(t, err)
			if len(text) <= maxText && utf8.ValidString(text) && back.Reason != text {
				t.Fatalf("%q became %q", text, back.Reason)
			}
		})
	}
}

func FuzzParseEntry(f *testing.F) {
	for _, seed := range []string{golden, "", "{}", "null", `{"time":"2026-11-28T20:07:46Z","kind":"start"}`, `{"time":"2026-11-28T20:07:46Z","kind":"start","evidence":"zz"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := ParseEntry(data)
		if err != nil {
			wantCode(t, err, "release_log_entry")
			return
		}
		if again, err := e.encode(); err != nil || !bytes.Equal(again, data) {
			t.Fatalf("%s is read and written as %s (%v)", data, again, err)
		}
	})
}
