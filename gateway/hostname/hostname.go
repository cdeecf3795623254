// SPDX-License-Identifier: Apache-2.0

// Package hostname is what the name in a ClientHello asks the gateway for: an app or
// one instance of it, at a port, ended here or passed through; the gateway itself; or a
// custom domain, whose owner says in a TXT record where it leads.
//
// Guarantees: pure; a [Name] is lower case, without a trailing dot, at most 253 bytes in
// labels of 1 to 63, and never an IP address; parsing a name twice gives the same result.
//
// What upstream takes and this package refuses: port 0 and ports with a sign; names that
// are IP addresses; characters that no host name has; TXT values that lead to a reserved
// id (the owner of any domain could have reached the gateway's loopback), to an id with a
// hyphen or a dot, or with anything after the port. `localhost.<base>` is refused unless
// the gateway allows it. What it takes and upstream does not: upper case and a trailing dot.
//
// Attacker-controlled: every name and every TXT value. Trusted: the list of bases, which is
// the gateway's configuration and not the certificates it has loaded, so that a certificate
// that ran out does not turn the base's names into custom domains.
//
// Implements spec/gateway.md §2.2 and §2.4.
package hostname

import (
	"encoding/hex"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of RFC 1035 §2.3.4, less the length bytes.
const (
	MaxName  = 253
	MaxLabel = 63
)

// Name is a host name in normal form. The zero value is no name.
type Name string

// ParseName brings a host name into normal form: lower case, one trailing dot removed.
// Codes host_malformed, host_address (an IP address, or a name that ends in a number, which
// some readers take for one).
func ParseName(s string) (Name, error) {
	if strings.ContainsAny(s, ":[") {
		return "", fault.New("host_address", "a host name is wanted, not an IP address")
	}
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > MaxName {
		return "", fault.New("host_malformed", "the host name has %d bytes, not 1 to %d", len(s), MaxName)
	}
	upper, label, number := false, 0, true
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '.':
			if label == 0 {
				return "", fault.New("host_malformed", "the host name has an empty label")
			}
			label, number = 0, true
			continue
		case c >= '0' && c <= '9':
		case c >= 'A' && c <= 'Z':
			upper, number = true, false
		case c >= 'a' && c <= 'z', c == '-', c == '_':
			number = false
		default:
			return "", fault.New("host_malformed", "the host name has the byte 0x%02x", c)
		}
		if label++; label > MaxLabel {
			return "", fault.New("host_malformed", "the host name has a label longer than %d bytes", MaxLabel)
		}
	}
	if label == 0 {
		return "", fault.New("host_malformed", "the host name has an empty label")
	}
	if number {
		return "", fault.New("host_address", "a host name is wanted, not an IP address")
	}
	if upper {
		s = strings.ToLower(s)
	}
	return Name(s), nil
}

// Split cuts a name at its first dot. parent is empty for a name of one label.
func (n Name) Split() (label string, parent Name) {
	label, rest, _ := strings.Cut(string(n), ".")
	return label, Name(rest)
}

// ParseBase brings a base domain of the configuration into normal form, as upstream does:
// surrounding space, one trailing dot and one leading "*." are removed; labels are letters,
// digits and inner hyphens. Code host_base.
func ParseBase(s string) (Name, error) {
	s = strings.TrimPrefix(strings.TrimSuffix(strings.TrimSpace(s), "."), "*.")
	n, err := ParseName(s)
	if err != nil {
		return "", fault.Wrap(err, "host_base", "the base domain %q", s)
	}
	for label := range strings.SplitSeq(string(n), ".") {
		if strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-") || strings.Contains(label, "_") {
			return "", fault.New("host_base", "the base domain %q has a label that begins or ends with a hyphen, or an underscore", s)
		}
	}
	return n, nil
}

// Mode is who ends the TLS connection.
type Mode uint8

const (
	Terminate   Mode = iota // the gateway, without ALPN: HTTP/1.1
	TerminateH2             // the gateway, with ALPN h2 alone
	Passthrough             // the app
)

func (m Mode) String() string {
	switch m {
	case Terminate:
		return "terminate"
	case TerminateH2:
		return "terminate-h2"
	case Passthrough:
		return "passthrough"
	}
	return "unknown"
}

// ID is the text that names an app or an instance: one label without a hyphen, lower case.
type ID string

// Bytes returns the 20 bytes of an app id or instance id; ok is false for any other text.
func (id ID) Bytes() (b [dstack.AppIDSize]byte, ok bool) {
	if len(id) != 2*len(b) {
		return b, false
	}
	_, err := hex.Decode(b[:], []byte(id))
	return b, err == nil
}

// Label is the meaning of the first label of a name on a base domain.
type Label struct {
	ID   ID
	Port uint16
	Mode Mode
}

// ParseLabel reads `<id>[-[<port>][s|g]]`: `s` passes through (port 443 unless named), `g`
// ends at the gateway as HTTP/2, neither ends there as HTTP/1.1 (port 80 unless named). The
// label is one of a [Name]. Codes host_label, host_port.
func ParseLabel(label string) (Label, error) {
	id, rest, _ := strings.Cut(label, "-")
	l := Label{ID: ID(id), Port: 80}
	switch {
	case id == "":
		return Label{}, fault.New("host_label", "the host name %q names no app", clip(label))
	case strings.Contains(rest, "-"):
		return Label{}, fault.New("host_label", "the host name %q has more than one hyphen", clip(label)).WithFix("write <app>-<port>, with s or g behind it")
	}
	rest, h2 := strings.CutSuffix(rest, "g")
	rest, pass := strings.CutSuffix(rest, "s")
	switch {
	case h2 && pass:
		return Label{}, fault.New("host_label", "the host name %q asks for both s and g", clip(label))
	case h2:
		l.Mode = TerminateH2
	case pass:
		l.Mode, l.Port = Passthrough, 443
	}
	if rest == "" {
		return l, nil
	}
	var err error
	if l.Port, err = parsePort(rest); err != nil {
		return Label{}, err
	}
	return l, nil
}

// parsePort reads a decimal port; leading zeros are upstream's to allow.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16) // takes no sign, no space
	if err != nil || n == 0 {
		return 0, fault.New("host_port", "%q is no port from 1 to 65535", clip(s))
	}
	return uint16(n), nil
}

// Kind is what a name leads to.
type Kind uint8

const (
	None     Kind = iota // the zero Destination leads nowhere
	App                  // an app or an instance, by its id
	Gateway              // the gateway's own pages
	Health               // the gateway's health, under upstream's older name
	Loopback             // the gateway's own loopback, in development
	Custom               // a domain of an app's owner: ask TXT
)

func (k Kind) String() string {
	if names := [...]string{"none", "app", "gateway", "health", "loopback", "custom"}; int(k) < len(names) {
		return names[k]
	}
	return "unknown"
}

// Destination is the meaning of a whole name.
type Destination struct {
	Kind Kind
	Name Name
	Base Name // the base domain; empty for Custom
	Label
}

// Reserved ids of a base domain.
const (
	idGateway  = "gateway"
	idHealth   = "health"
	idLoopback = "localhost"
)

func reserved(id ID) bool { return id == idGateway || id == idHealth || id == idLoopback }

// Rules are the gateway's configuration. The zero value takes every name for a custom domain.
type Rules struct {
	Bases    []Name // as ParseBase returns them
	Loopback bool   // localhost.<base> leads to 127.0.0.1: development only
}

// Resolve returns what a name leads to. Codes of [ParseLabel], and host_single_label,
// host_reserved (the gateway's own names in another form than the plain one), host_loopback.
func (r Rules) Resolve(name Name) (Destination, error) {
	label, parent := name.Split()
	if parent == "" {
		return Destination{}, fault.New("host_single_label", "the host name %q lies in no domain", clip(string(name)))
	}
	d := Destination{Kind: Custom, Name: name}
	for _, base := range r.Bases {
		if base == parent {
			d.Kind, d.Base = App, base
		}
	}
	if d.Kind == Custom {
		// The port is the TXT record's to say; the mode is always this.
		d.Mode = Passthrough
		return d, nil
	}
	var err error
	if d.Label, err = ParseLabel(label); err != nil {
		return Destination{}, err
	}
	switch d.ID {
	case idLoopback:
		if !r.Loopback {
			return Destination{}, fault.New("host_loopback", "this gateway leads nobody to its loopback")
		}
		d.Kind = Loopback
	case idGateway, idHealth:
		if d.Mode == Passthrough || d.Port != 80 {
			return Destination{}, fault.New("host_reserved", "the gateway's own pages have no form %q", clip(label)).WithFix("use https://%s.<base>", d.ID)
		}
		d.Kind = Gateway
		if d.ID == idHealth {
			d.Kind = Health
		}
	}
	return d, nil
}

// clip bounds what of a stranger's text goes into a message.
func clip(s string) string {
	if len(s) > MaxLabel+1 {
		return s[:MaxLabel] + "…"
	}
	return s
}
