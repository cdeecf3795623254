// SPDX-License-Identifier: Apache-2.0

package strictcbor_test

import (
	"bytes"
	"encoding/hex"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/dstack-go/dstack/attest/cose/strictcbor"
	"github.com/dstack-go/dstack/internal/fault"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Each reader accepts its own type and refuses what a lenient reader would convert.
func TestAnItemIsReadAsItsOwnTypeOnly(t *testing.T) {
	read := map[string]func(strictcbor.Item) error{
		"bytes": func(i strictcbor.Item) error { _, err := i.Bytes(0, 4); return err },
		"text":  func(i strictcbor.Item) error { _, err := i.Text(0, 4); return err },
		"int":   func(i strictcbor.Item) error { _, err := i.Int(); return err },
		"uint":  func(i strictcbor.Item) error { _, err := i.Uint(1000); return err },
		"array": func(i strictcbor.Item) error { _, err := i.Array(0, 4); return err },
		"map":   func(i strictcbor.Item) error { _, err := i.Map(); return err },
	}
	for _, c := range []struct {
		name, hex string
		want      map[string]string // code by reader; cbor_type where nothing is said
	}{
		{"a byte string", "43 010203", map[string]string{"bytes": ""}},
		{"a byte string that is too long", "45 0102030405", map[string]string{"bytes": "cbor_size"}},
		{"an array of numbers", "83 010203", map[string]string{"array": ""}},
		{"an array that is too long", "85 0102030405", map[string]string{"array": "cbor_size"}},
		{"a text string", "63 616263", map[string]string{"text": ""}},
		{"a text string that is too long", "65 6161616161", map[string]string{"text": "cbor_size"}},
		{"text that is not UTF-8", "62 c328", map[string]string{"text": "cbor_malformed"}},
		{"a number", "19 03e8", map[string]string{"int": "", "uint": ""}},
		{"a number that is too large", "19 03e9", map[string]string{"int": "", "uint": "cbor_size"}},
		{"a negative number", "38 22", map[string]string{"int": "", "uint": "cbor_size"}},
		{"a number of 64 bits", "1b ffffffffffffffff", map[string]string{"int": "cbor_malformed", "uint": "cbor_malformed"}},
		{"a negative number of 64 bits", "3b ffffffffffffffff", map[string]string{"int": "cbor_malformed", "uint": "cbor_malformed"}},
		{"an empty map", "a0", map[string]string{"map": ""}},
		{"a map of numbers and text", "a2 01 f6 6161 00", map[string]string{"map": ""}},
		{"a map with equal keys", "a2 01 00 01 00", map[string]string{"map": "cbor_malformed"}},
		{"a map with equal keys of different length", "a2 01 00 1801 00", map[string]string{"map": "cbor_malformed"}},
		{"a map with equal text keys", "a2 6161 00 6161 00", map[string]string{"map": "cbor_malformed"}},
		{"a map with a byte string for key", "a1 4161 00", map[string]string{"map": ""}},
		{"a map with a truth value for key", "a1 f5 00", map[string]string{"map": ""}},
		{"a map with a fraction for key", "a1 f93c00 00", map[string]string{"map": ""}},
		{"null", "f6", nil},
		{"undefined", "f7", nil},
		{"a truth value", "f5", nil},
		{"a fraction", "f93c00", nil},
	} {
		if strings.Contains(c.name, "for key") {
			c.want["map"] = "cbor_type"
		}
		item, err := strictcbor.Decode(unhex(t, c.hex))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if item.IsNull() != (c.name == "null") {
			t.Errorf("%s: null %v", c.name, item.IsNull())
		}
		if item.IsText() != strings.HasPrefix(strings.TrimPrefix(c.name, "a "), "text") {
			t.Errorf("%s: text %v", c.name, item.IsText())
		}
		for name, f := range read {
			want, said := c.want[name]
			if !said {
				want = "cbor_type"
			}
			err := f(item)
			if (err == nil) != (want == "") || fault.Code(err) != want {
				t.Errorf("%s read as %s: %v, want code %q", c.name, name, err, want)
			}
		}
	}
}

func TestWhatIsNotOnePlainItemIsRefused(t *testing.T) {
	for name, data := range map[string][]byte{
		"nothing":                          {},
		"a byte after the item":            unhex(t, "0000"),
		"a string cut short":               unhex(t, "43 0102"),
		"an array cut short":               unhex(t, "82 01"),
		"a map cut short":                  unhex(t, "a1 01"),
		"a head cut short":                 unhex(t, "59 01"),
		"a string of indefinite length":    unhex(t, "5f 4101 ff"),
		"an array of indefinite length":    unhex(t, "9f 01 ff"),
		"a map of indefinite length":       unhex(t, "bf 01 01 ff"),
		"a break alone":                    unhex(t, "ff"),
		"a reserved length":                unhex(t, "1c"),
		"a tag":                            unhex(t, "c1 00"),
		"a tag inside":                     unhex(t, "81 c1 00"),
		"an array of 65 elements":          append([]byte{0x98, 65}, make([]byte, 65)...),
		"a map of 65 members":              append([]byte{0xb8, 65}, make([]byte, 130)...),
		"arrays nested nine deep":          append(bytes.Repeat([]byte{0x81}, 9), 0),
		"a string of 2^63 bytes":           unhex(t, "5b 8000000000000000"),
		"a string of 2^64-1 bytes":         unhex(t, "5b ffffffffffffffff"),
		"an array of 2^64-1 elements":      unhex(t, "9b ffffffffffffffff"),
		"a map of 2^63-1 members":          unhex(t, "bb 7fffffffffffffff"),
		"a simple value in two bytes < 32": unhex(t, "f8 16"),
	} {
		if _, err := strictcbor.Decode(data); fault.Code(err) != "cbor_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, data := range map[string][]byte{
		"64 elements":      append([]byte{0x98, 64}, make([]byte, 64)...),
		"eight deep":       append(bytes.Repeat([]byte{0x81}, 8), 0),
		"a long form of 1": unhex(t, "1b 0000000000000001"),
	} {
		if _, err := strictcbor.Decode(data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOneTagIsTakenOff(t *testing.T) {
	for _, c := range []struct {
		name, hex string
		number    uint64
		content   string
		ok        bool
		code      string
	}{
		{"no tag", "8101", 0, "8101", false, ""},
		{"nothing", "", 0, "", false, ""},
		{"tag 18", "d2 8101", 18, "8101", true, ""},
		{"tag 399", "d9018f 8101", 399, "8101", true, ""},
		{"tag 18 in two bytes", "d812 8101", 18, "8101", true, ""},
		{"a tag in a tag", "d2 d2 00", 18, "d200", true, ""},
		{"a tag of nothing", "d2", 0, "", false, "cbor_malformed"},
		{"a tag and a byte after it", "d2 00 00", 0, "", false, "cbor_malformed"},
	} {
		number, content, ok, err := strictcbor.Untag(unhex(t, c.hex))
		if fault.Code(err) != c.code || number != c.number || ok != c.ok || !bytes.Equal(content, unhex(t, c.content)) {
			t.Errorf("%s: %d %x %v %v", c.name, number, content, ok, err)
		}
	}
	if _, err := strictcbor.Decode(unhex(t, "d200")); err == nil {
		t.Error("a second tag is accepted")
	}
}

func TestAMapOfIndefiniteLengthIsClosed(t *testing.T) {
	for _, c := range []struct{ name, hex, want string }{
		{"members", "bf 01 02 6161 820304 ff", "b802 01 02 6161 820304"},
		{"no members", "bf ff", "b800"},
		{"a definite map", "a1 01 02", "a1 01 02"},
		{"what is no map", "00", "00"},
		{"nothing", "", ""},
		{"an open map in it", "bf 01 bf ff ff", ""},
		{"an open string in it", "bf 01 5f 4101 ff ff", ""},
		{"a tag in it", "bf 01 c1 00 ff", ""},
		{"a key without value", "bf 01 02 03 ff", ""},
		{"no end", "bf 01 02", ""},
		{"a byte after the end", "bf 01 02 ff 00", ""},
		{"an item cut short", "bf 01 43 01 ff", ""},
		{"65 members", "bf" + strings.Repeat("0000", 65) + "ff", ""},
	} {
		got, err := strictcbor.Definite(unhex(t, c.hex))
		if c.want == "" && c.hex != "" {
			if fault.Code(err) != "cbor_malformed" {
				t.Errorf("%s: %x, %v", c.name, got, err)
			}
			continue
		}
		if err != nil || !bytes.Equal(got, unhex(t, c.want)) {
			t.Errorf("%s: %x, %v", c.name, got, err)
		}
	}
	got, err := strictcbor.Definite(unhex(t, "bf 01 00 01 00 ff"))
	if err != nil {
		t.Fatal(err)
	}
	item, err := strictcbor.Decode(got)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := item.Map(); fault.Code(err) != "cbor_malformed" {
		t.Error("equal keys in a map of indefinite length:", err)
	}
}

func TestTheFirstItemIsCutOut(t *testing.T) {
	got, err := strictcbor.First(unhex(t, "82 01 02 ffff"))
	if err != nil || !bytes.Equal(got, unhex(t, "820102")) {
		t.Errorf("%x %v", got, err)
	}
	if _, err := strictcbor.First(unhex(t, "82 01")); fault.Code(err) != "cbor_malformed" {
		t.Error(err)
	}
}

func TestMembersAreFoundByKey(t *testing.T) {
	item, err := strictcbor.Decode(unhex(t, "a3 01 02 20 03 6161 04"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := item.Map()
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[any]int64{1: 2, -1: 3, "a": 4} {
		v, err := m.Need(key)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := v.Int(); n != want || err != nil {
			t.Errorf("%v: %d %v", key, n, err)
		}
	}
	if _, err := m.Need(2); fault.Code(err) != "cbor_missing" {
		t.Error(err)
	}
	if _, ok := m.Get("b"); ok {
		t.Error("found what is not there")
	}
}

// Bombs end fast and small.
func TestThreat_B15_CBORBombsAreCheap(t *testing.T) {
	for name, bomb := range map[string][]byte{
		"1e5 nested arrays":    append(bytes.Repeat([]byte{0x81}, 100_000), 0),
		"1e5 nested maps":      append(bytes.Repeat([]byte{0xa1, 0x01}, 100_000), 0),
		"1e5 nested tags":      append(bytes.Repeat([]byte{0xc1}, 100_000), 0),
		"a string of 2^40":     append(unhex(t, "5b 0000010000000000"), make([]byte, 1000)...),
		"an array of 2^32 - 1": append(unhex(t, "9a ffffffff"), make([]byte, 100_000)...),
		"1e5 nested open maps": bytes.Repeat([]byte{0xbf, 0x01}, 100_000),
		"an open map of 1e5":   append([]byte{0xbf}, make([]byte, 100_000)...),
		"a map of 2^32 - 1":    append(unhex(t, "ba ffffffff"), make([]byte, 100_000)...),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		_, err1 := strictcbor.Decode(bomb)
		_, _, _, err2 := strictcbor.Untag(bomb)
		_, err3 := strictcbor.First(bomb)
		_, err4 := strictcbor.Definite(bomb)
		took := time.Since(start)
		runtime.ReadMemStats(&after)
		if fault.Code(err1) != "cbor_malformed" || err2 != nil && fault.Code(err2) != "cbor_malformed" || fault.Code(err3) != "cbor_malformed" ||
			err4 != nil && fault.Code(err4) != "cbor_malformed" {
			t.Errorf("%s: %v, %v, %v, %v", name, err1, err2, err3, err4)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 1<<20 || took > 100*time.Millisecond {
			t.Errorf("%s: %d bytes allocated in %s", name, used, took)
		}
	}
}

// FuzzItem compares with the library in its default mode: what is accepted here
// is accepted there with the same value. The library accepts more (indefinite
// lengths, tags, deeper and larger items), never less.
func FuzzItem(f *testing.F) {
	for _, s := range []string{"a3 01 02 20 03 6161 04", "84 43a10126 a0 41aa 42bbcc", "8743010203 6161 f6 20 1903e8 a0 80", "d9018f a0", "5f4101ff", "a201000100"} {
		f.Add(unhex(f, s))
	}
	f.Add(unhex(f, "bf 01 02 6161 820304 ff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		definite, err := strictcbor.Definite(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		item, err := strictcbor.Decode(definite)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		compare(t, item, data, 0)
	})
}

func compare(t *testing.T, item strictcbor.Item, data []byte, depth int) {
	if depth > strictcbor.MaxDepth {
		t.Fatal("deeper than the limit")
	}
	agree := func(ours any, err error, theirs any) {
		if err == nil {
			if e := cbor.Unmarshal(data, theirs); e != nil {
				t.Fatalf("%x: ours %v, the library says %v", data, ours, e)
			}
		}
	}
	b, err := item.Bytes(0, len(data))
	var theirBytes []byte
	if agree(b, err, &theirBytes); err == nil && !bytes.Equal(b, theirBytes) {
		t.Fatalf("%x: %x, %x", data, b, theirBytes)
	}
	s, err := item.Text(0, len(data))
	var theirText string
	if agree(s, err, &theirText); s != theirText && err == nil {
		t.Fatalf("%x: %q, %q", data, s, theirText)
	}
	n, err := item.Int()
	var theirInt int64
	if agree(n, err, &theirInt); n != theirInt && err == nil {
		t.Fatalf("%x: %d, %d", data, n, theirInt)
	}
	list, err := item.Array(0, strictcbor.MaxItems)
	var theirList []cbor.RawMessage
	if agree(list, err, &theirList); err == nil {
		if len(list) != len(theirList) {
			t.Fatalf("%x: %d elements, %d", data, len(list), len(theirList))
		}
		for i := range list {
			compare(t, list[i], theirList[i], depth+1)
		}
	}
	m, err := item.Map()
	var theirMap map[any]cbor.RawMessage
	if agree(m, err, &theirMap); err == nil {
		if len(m) != len(theirMap) {
			t.Fatalf("%x: %d members, %d", data, len(m), len(theirMap))
		}
		for key, value := range theirMap {
			if n, ok := key.(uint64); ok {
				key = int64(n)
			}
			ours, ok := m[key]
			if !ok {
				t.Fatalf("%x: no member %v", data, key)
			}
			compare(t, ours, value, depth+1)
		}
	}
}
