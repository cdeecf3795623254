// SPDX-License-Identifier: Apache-2.0

package strictjson

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestDecode(t *testing.T) {
	type inner struct{ B []int }
	type target struct {
		A int
		S string
		I inner
	}
	limits := Limits{Size: 1000, Depth: 3, Unknown: true}
	for _, c := range []struct{ name, in, want string }{
		{"a plain object", `{"A":1,"S":"x","I":{"B":[1,2]}}`, ""},
		{"white space after it", "{\"A\":1} \r\n\t", ""},
		{"an unknown field", `{"Z":1}`, ""},
		{"equal keys in different objects", `{"A":1,"I":{"A":2}}`, ""},
		{"string values equal to keys", `{"S":"A","A":1}`, ""},
		{"nothing", ``, "unexpected EOF"},
		{"an open object", `{"A":1`, "unexpected EOF"},
		{"a wrong bracket", `{"A":[1}`, "malformed JSON"},
		{"a key twice", `{"A":1,"A":2}`, `"A" occurs twice`},
		{"a key twice by case", `{"A":1,"a":2}`, `"a" occurs twice`},
		{"a key twice by escape", `{"A":1,"\u0041":2}`, `"A" occurs twice`},
		{"a key that folds to ASCII", `{"ſ":1}`, "not ASCII"},
		{"a second value", `{"A":1}{"A":2}`, "follow the JSON value"},
		{"text after it", `{"A":1} x`, "follow the JSON value"},
		{"broken UTF-8", "{\"S\":\"\xff\"}", "UTF-8"},
		{"depth 4", `{"x":[[[1]]]}`, "deeper than 3"},
		{"too large", strings.Repeat(" ", 1001), "exceed the limit"},
		{"a wrong type", `{"A":"x"}`, "cannot unmarshal"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var v target
			err := Decode([]byte(c.in), &v, limits)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("err = %v, want %q", err, c.want)
			}
		})
	}
	var v target
	if err := Decode([]byte(`{"Z":1}`), &v, Limits{Size: 100, Depth: 3}); err == nil || !strings.Contains(err.Error(), "unknown field") {
		t.Errorf("strict: %v", err)
	}
	if err := Decode([]byte(`1`), &v, Limits{}); err == nil {
		t.Error("the zero limits admit a document")
	}
}

// What Decode accepts, encoding/json accepts too, and to the same value.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"a":[1,{"b":null}],"c":"d"}`))
	f.Add([]byte(`[{"a":1},{"a":2}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var ours, theirs any
		if Decode(data, &ours, Limits{Size: 1 << 16, Depth: 16, Unknown: true}) != nil {
			return
		}
		if err := json.Unmarshal(data, &theirs); err != nil {
			t.Fatalf("encoding/json refuses %q: %v", data, err)
		}
		a, _ := json.Marshal(ours)
		b, _ := json.Marshal(theirs)
		if string(a) != string(b) {
			t.Fatalf("%q is read as %s and as %s", data, a, b)
		}
	})
}
