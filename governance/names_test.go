// SPDX-License-Identifier: Apache-2.0

package governance

import (
	"strings"
	"testing"
)

func TestNameAllowed(t *testing.T) {
	list := []string{"app.example.org", "*.example.org", "10.0.0.1", "2001:db8::1", "*.xn--bcher-kva.example"}
	for _, c := range []struct {
		what  string
		names []string
		name  string
		want  bool
	}{
		{"no list allows any", nil, "whatever.example", true},
		{"an empty list allows none", []string{}, "app.example.org", false},
		{"an empty list allows no address", []string{}, "10.0.0.1", false},
		{"an exact name", list, "app.example.org", true},
		{"an exact name alone is no parent", []string{"example.org"}, "a.example.org", false},
		{"one label", list, "other.example.org", true},
		{"two labels", list, "a.b.example.org", false},
		{"no label", list, "example.org", false},
		{"a name that only ends alike", list, "evil-example.org", false},
		{"the wildcard itself", list, "*.example.org", true},
		{"a wildcard below", list, "*.a.example.org", false},
		{"a wildcard above", list, "*.org", false},
		{"a wildcard is no label of a wider one", []string{"*.org"}, "*.example.org", false},
		{"upper case", list, "APP.example.org", false},
		{"a trailing dot", list, "app.example.org.", false},
		{"an empty name", list, "", false},
		{"an empty label", list, ".example.org", false},
		{"a label of 64", list, strings.Repeat("a", 64) + ".example.org", false},
		{"a label of 63", list, strings.Repeat("a", 63) + ".example.org", true},
		{"an underscore", list, "a_b.example.org", false},
		{"a hyphen in front", list, "-a.example.org", false},
		{"a hyphen behind", list, "a-.example.org", false},
		{"a name outside ASCII", list, "bücher.example.org", false},
		{"its IDNA form", list, "a.xn--bcher-kva.example", true},
		{"a NUL", list, "a\x00.example.org", false},
		{"a listed address", list, "10.0.0.1", true},
		{"another address", list, "10.0.0.2", false},
		{"an IPv6 address in another spelling", list, "2001:DB8:0::1", true},
		{"an address with a zone", []string{"fe80::1"}, "fe80::1%eth0", false},
		{"IPv4 in IPv6", list, "::ffff:10.0.0.1", false},
		{"a wildcard over an address", []string{"*.0.0.1"}, "10.0.0.1", false},
		{"a number", []string{"*.1", "127.1"}, "127.1", false},
		{"a number in hexadecimal", []string{"*.0x1"}, "127.0x1", false},
		{"a malformed entry", []string{"*", "*.", "a.*.org", "EXAMPLE.org"}, "example.org", false},
		{"a malformed entry that is the name", []string{"a.*.org"}, "a.*.org", false},
	} {
		if got := NameAllowed(c.names, c.name); got != c.want {
			t.Errorf("%s: %q in %q: %v", c.what, c.name, c.names, got)
		}
	}
	for name, want := range map[string]bool{
		"a.example": true, "*.a.example": true, "::1": true, "a": true, "::ffff:10.0.0.1": false, "fe80::1%eth0": false,
		"*": false, "*.*.a": false, "": false, "a..b": false, strings.Repeat("a.", 126) + "b": true, strings.Repeat("a.", 127) + "b": false,
	} {
		if NameWellFormed(name) != want {
			t.Errorf("%q: want %v", name, want)
		}
	}
}

func FuzzNameAllowed(f *testing.F) {
	f.Add("a.example.org", "*.example.org")
	f.Add("::ffff:1.2.3.4", "1.2.3.4")
	f.Add("*.example.org", "*.org")
	f.Fuzz(func(t *testing.T, name, pattern string) {
		if NameAllowed([]string{}, name) {
			t.Fatal("an empty list allowed a name")
		}
		if NameAllowed([]string{pattern}, name) && (!NameWellFormed(name) || !NameWellFormed(pattern)) {
			t.Fatalf("%q was allowed by %q", name, pattern)
		}
	})
}
