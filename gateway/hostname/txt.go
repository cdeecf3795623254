// SPDX-License-Identifier: Apache-2.0

package hostname

import (
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// Prefixes of the names at which a custom domain's owner says where it leads.
const (
	TXTPrefix = "_dstack-app-address"
	// compatPrefix is the name of older releases of upstream.
	compatPrefix = "_tapp-address"
	wildcard     = "-wildcard"
)

// MaxTXT is the longest TXT value that is one, in bytes.
const MaxTXT = MaxLabel + 1 + 5

// Queries are the names to ask for TXT records.
type Queries struct {
	// Exact are asked at once; the first of them that has an answer counts, and if that
	// is malformed there is no other.
	Exact []Name
	// Wildcard is asked when none of Exact has an answer. It is empty where the parent of
	// the name is a top-level domain, for nobody but its registry could answer there.
	Wildcard Name
}

// TXTNames returns the TXT names of a custom domain. prefix is the gateway's
// app_address_ns_prefix, or "" for upstream's default; compat also asks the older name.
// A query that would exceed the length of names is left out; code host_malformed when none
// is left.
func TXTNames(name Name, prefix string, compat bool) (Queries, error) {
	if prefix == "" {
		prefix = TXTPrefix
	}
	var q Queries
	add := func(p string) {
		if n, err := ParseName(p + "." + string(name)); err == nil {
			q.Exact = append(q.Exact, n)
		}
	}
	add(prefix)
	if compat && prefix != compatPrefix {
		add(compatPrefix)
	}
	if _, parent := name.Split(); strings.Contains(string(parent), ".") {
		q.Wildcard, _ = ParseName(prefix + wildcard + "." + string(parent))
	}
	if len(q.Exact) == 0 && q.Wildcard == "" {
		return Queries{}, fault.New("host_malformed", "the host name %q is too long to have a TXT record", clip(string(name)))
	}
	return q, nil
}

// Answer is where a custom domain leads.
type Answer struct {
	ID   ID
	Port uint16
}

// ParseTXT reads `<id>:<port>`, the first character string of the first TXT answer. Codes
// host_txt, host_port.
func ParseTXT(value string) (Answer, error) {
	if len(value) > MaxTXT {
		return Answer{}, fault.New("host_txt", "the TXT record has %d bytes, more than %d", len(value), MaxTXT)
	}
	text, port, ok := strings.Cut(value, ":")
	if !ok {
		return Answer{}, fault.New("host_txt", "the TXT record %q is not <app id>:<port>", value)
	}
	// An id is a label of a base domain, so it follows the rules of one; the name before
	// the dot keeps ParseName from taking an id of digits for an address.
	n, err := ParseName(text + ".x")
	id, _ := n.Split()
	switch {
	case err != nil || strings.ContainsAny(text, "-.") || len(id) != len(text):
		return Answer{}, fault.New("host_txt", "the TXT record %q names no app", value)
	case reserved(ID(id)):
		return Answer{}, fault.New("host_txt", "the TXT record %q leads to the gateway itself", value)
	}
	p, err := parsePort(port)
	if err != nil {
		return Answer{}, err
	}
	return Answer{ID: ID(id), Port: p}, nil
}
