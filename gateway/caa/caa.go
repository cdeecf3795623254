// SPDX-License-Identifier: Apache-2.0

// Package caa pins certification authorities: CAA records that let none but our accounts,
// by the methods that we use, have certificates for a domain; and it tells when what DNS
// says is something else.
//
// Guarantees: no record is built without an account; setting adds what is missing, sees
// that it is there, and only then removes what lets others issue, so that at no moment,
// and after no crash, may anyone issue who might not before, or we not; records that say
// nothing about issuance stay.
//
// Attacker-controlled: what DNS answers, and values that others wrote. DNS is as
// trustworthy as the way to the resolver: whoever forges it can hide a drift, and a CA
// that sees forged records can be misled, for which there is DNSSEC.
//
// Implements spec/gateway.md §4.4 (RFC 8659, RFC 8657), threat C07.
package caa

import (
	"net/url"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// The properties that say who may issue.
const (
	Issue     = "issue"
	IssueWild = "issuewild"
)

// critical is the flag of RFC 8659 §4.1: who does not know the property may not issue.
const critical = 128

// Limits of a value.
const (
	maxValue   = 1024
	maxMethods = 8
)

// Pin is an account that may have certificates.
type Pin struct {
	Issuer  string   // the CA as CAA calls it, such as letsencrypt.org
	Account string   // the account's URI
	Methods []string // of validation, such as dns-01; at least one
}

// Record is a CAA record without its name.
type Record struct {
	Flags uint8
	Tag   string
	Value string
}

func (r Record) String() string { return strings.ToLower(r.Tag) + " " + clip(r.Value) }

// issuance reports whether the record says who may issue server certificates.
func (r Record) issuance() bool {
	return strings.EqualFold(r.Tag, Issue) || strings.EqualFold(r.Tag, IssueWild)
}

// Value is the value of both properties for a pin. Codes caa_account (missing, or not to be
// written in a value), caa_issuer, caa_methods.
func (p Pin) Value() (string, error) {
	if p.Account == "" {
		return "", fault.New("caa_account", "a CAA record without an account would let anyone with an account at %s have certificates", clip(p.Issuer)).
			WithFix("register the account first")
	}
	if u, err := url.Parse(p.Account); err != nil || u.Scheme == "" || !plain(p.Account) {
		return "", fault.New("caa_account", "the account %q is no URI that a CAA record can hold", clip(p.Account))
	}
	if !domain(p.Issuer) {
		return "", fault.New("caa_issuer", "%q is not how CAA calls an authority", clip(p.Issuer)).WithFix("use the name of the directory's caaIdentities, such as letsencrypt.org")
	}
	if len(p.Methods) == 0 || len(p.Methods) > maxMethods {
		return "", fault.New("caa_methods", "a CAA record names 1 to %d methods of validation", maxMethods)
	}
	for _, m := range p.Methods {
		if m == "" || strings.Trim(m, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return "", fault.New("caa_methods", "%q is no method of validation", clip(m))
		}
	}
	v := strings.ToLower(p.Issuer) + ";validationmethods=" + strings.Join(p.Methods, ",") + ";accounturi=" + p.Account
	if len(v) > maxValue {
		return "", fault.New("caa_account", "the CAA record would have %d bytes, more than %d", len(v), maxValue)
	}
	return v, nil
}

// plain reports whether a text is a value of a parameter (RFC 8659 §4.2).
func plain(s string) bool {
	return len(s) <= maxValue && !strings.ContainsFunc(s, func(r rune) bool { return r < 0x21 || r > 0x7e || r == ';' })
}

func domain(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' || strings.ContainsFunc(label, func(r rune) bool {
			return (r|0x20 < 'a' || r|0x20 > 'z') && (r < '0' || r > '9') && r != '-'
		}) {
			return false
		}
	}
	return true
}

// Build returns the records that let the pins alone issue, names and wildcards. Codes of
// [Pin.Value]; caa_pins: without a pin nobody could issue.
func Build(pins []Pin) ([]Record, error) {
	if len(pins) == 0 {
		return nil, fault.New("caa_pins", "there is no account to be named by CAA, so that nobody could issue")
	}
	var out []Record
	for _, p := range pins {
		v, err := p.Value()
		if err != nil {
			return nil, err
		}
		for _, tag := range []string{Issue, IssueWild} {
			if r := (Record{0, tag, v}); !slices.Contains(out, r) {
				out = append(out, r)
			}
		}
	}
	return out, nil
}

// Property is the meaning of an issue or issuewild record. The zero value lets nobody issue.
type Property struct {
	Issuer   string
	Accounts []string // of accounturi; more than one lets nobody issue (RFC 8657 §3)
	Methods  []string // of validationmethods
	limited  bool     // validationmethods was given
}

// Parse reads the value of an issue or issuewild record (RFC 8659 §4.2). Code
// caa_malformed; such a record lets nobody issue.
func Parse(value string) (Property, error) {
	bad := fault.New("caa_malformed", "the CAA value %q is malformed", clip(value))
	if len(value) > maxValue {
		return Property{}, bad
	}
	issuer, rest, more := strings.Cut(value, ";")
	p := Property{Issuer: strings.ToLower(strings.Trim(issuer, " \t"))}
	if p.Issuer != "" && !domain(p.Issuer) {
		return Property{}, bad
	}
	if rest = strings.Trim(rest, " \t"); !more || rest == "" {
		return p, nil
	}
	for param := range strings.SplitSeq(rest, ";") {
		tag, v, ok := strings.Cut(param, "=")
		tag, v = strings.ToLower(strings.Trim(tag, " \t")), strings.Trim(v, " \t")
		if !ok || tag == "" || strings.Trim(tag, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || !plain(v) {
			return Property{}, bad
		}
		switch tag {
		case "accounturi":
			p.Accounts = append(p.Accounts, v)
		case "validationmethods":
			p.limited = true
			for m := range strings.SplitSeq(v, ",") {
				p.Methods = append(p.Methods, strings.ToLower(m))
			}
		}
	}
	return p, nil
}

// Request is a certificate that an account asks a CA for.
type Request struct {
	Issuer, Account, Method string
	Wildcard                bool
}

// others are properties that do not limit server certificates.
var others = []string{"iodef", "issuemail", "issuevmc", "contactemail", "contactphone"}

// Permits reports whether a CA that goes by the records of a domain may issue.
func Permits(set []Record, q Request) bool {
	use := func(tag string) (list []Record) {
		for _, r := range set {
			if strings.EqualFold(r.Tag, tag) {
				list = append(list, r)
			}
		}
		return list
	}
	for _, r := range set {
		if r.Flags&critical != 0 && !r.issuance() && !slices.Contains(others, strings.ToLower(r.Tag)) {
			return false
		}
	}
	list := use(Issue)
	if wild := use(IssueWild); q.Wildcard && len(wild) > 0 {
		list = wild
	}
	if len(list) == 0 {
		return true
	}
	return slices.ContainsFunc(list, func(r Record) bool {
		p, err := Parse(r.Value)
		return err == nil && p.permits(q)
	})
}

func (p Property) permits(q Request) bool {
	if p.Issuer == "" || p.Issuer != strings.ToLower(q.Issuer) || len(p.Accounts) > 1 {
		return false
	}
	if len(p.Accounts) == 1 && p.Accounts[0] != q.Account {
		return false
	}
	return !p.limited || slices.Contains(p.Methods, q.Method)
}

// clip bounds what of a stranger's text goes into a message.
func clip(s string) string {
	if len(s) > 200 {
		return strings.ToValidUTF8(s[:200], "") + "…"
	}
	return s
}
