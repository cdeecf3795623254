// SPDX-License-Identifier: Apache-2.0

package governance

import (
	"net/netip"
	"strings"
)

// NameAllowed reports whether a certificate may have a DNS name or an IP address, by
// a list as Decision.Names has it. A nil list allows any, an empty one none. Names are
// compared in the form that certificates have, IDNA in lowercase ASCII: a name in
// another form is not allowed. "*.example.org" stands for exactly one label below
// example.org, and for the wildcard itself. An IP address must be listed literally.
func NameAllowed(names []string, name string) bool {
	if names == nil {
		return true
	}
	address, isAddress := parseAddress(name)
	if !isAddress && !isPattern(name) {
		return false
	}
	for _, n := range names {
		if isAddress {
			if a, ok := parseAddress(n); ok && a == address {
				return true
			}
			continue
		}
		if !isPattern(n) {
			continue
		}
		if n == name {
			return true
		}
		if parent, wild := strings.CutPrefix(n, "*."); wild {
			if _, rest, ok := strings.Cut(name, "."); ok && rest == parent {
				return true
			}
		}
	}
	return false
}

// NameWellFormed reports whether n can stand in a list of names: a DNS name, a
// wildcard for one label, or an IP address.
func NameWellFormed(n string) bool {
	_, isAddress := parseAddress(n)
	return isAddress || isPattern(n)
}

// parseAddress takes no zone, which means something on one machine only, and no IPv4
// address in IPv6's clothes, which another reader would take for the address itself.
func parseAddress(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	return a, err == nil && a.Zone() == "" && !a.Is4In6()
}

// isPattern reports whether s is a name, or a wildcard over one.
func isPattern(s string) bool {
	name, wild := strings.CutPrefix(s, "*.")
	limit := 253
	if wild {
		limit -= 2
	}
	if name == "" || len(name) > limit {
		return false
	}
	labels := strings.Split(name, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for i := range len(l) {
			if c := l[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return false
			}
		}
	}
	// A last label of digits makes a URL's host an IPv4 address, in forms that
	// ParseAddr does not know (WHATWG URL, "ends in a number").
	last := labels[len(labels)-1]
	return strings.Trim(last, "0123456789") != "" && !strings.HasPrefix(last, "0x")
}
