// SPDX-License-Identifier: Apache-2.0

// Package portpolicy decides what the gateway does with a connection to a port of an app:
// whether it goes there, who ends its TLS, and whether a PROXY header precedes it.
//
// The app's measured policy decides, and the host name only where that is silent: a client
// that writes another suffix gets what the app's manifest says (threats.md K04). The order:
//
//  1. An instance whose policy is not known gets nothing.
//  2. Under restrict_mode, ports that are not listed get nothing. An operator's own policy
//     can take ports away, and never opens one or changes what follows.
//  3. `tls: app` passes through whatever the form of the host name, `tls: gateway` ends TLS
//     here whatever the form; a port without `tls` follows the form, as upstream.
//  4. The PROXY header is sent where the measured policy says `pp`, and nowhere else.
//
// The guest agent's port is always open, as the guest's own firewall has it: it is where
// evidence comes from (design.md §4).
//
// Where upstream lets an operator's override replace the app's policy, ours only narrows it.
//
// Attacker-controlled: the request. Trusted: the policy, as far as whoever made it verified
// the manifest that it is from. Pure.
//
// Implements spec/gateway.md §2.6 and the measured policy of design.md §2.
package portpolicy

import (
	"slices"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// AgentPort is the guest agent's external port.
const AgentPort = 8090

// MaxPorts is the most ports of a policy.
const MaxPorts = 4096

// TLS is who ends TLS on a port.
type TLS uint8

const (
	AsAsked TLS = iota // the form of the host name decides
	AtApp
	AtGateway
)

// Port is a listed port.
type Port struct {
	Number uint16
	PROXY  bool
	TLS    TLS
}

// Policy is an app's policy. The zero value admits nothing; see [New] and [Open].
type Policy struct {
	any   bool   // unlisted ports are open
	ports []Port // sorted by number, each once
}

// Open returns the policy of an app without one: every port, as the host name asks.
func Open() Policy { return Policy{any: true} }

// New returns the policy that a manifest has. Code port_policy: port 0, one port twice with
// different meanings, too many ports, or an unknown word.
func New(m manifest.PortPolicy) (Policy, error) {
	if len(m.Ports) > MaxPorts {
		return Policy{}, fault.New("port_policy", "the port policy has %d ports, more than %d", len(m.Ports), MaxPorts)
	}
	p := Policy{any: !m.RestrictMode, ports: make([]Port, 0, len(m.Ports))}
	for _, e := range m.Ports {
		port := Port{Number: e.Port, PROXY: e.PP}
		switch e.TLS {
		case "":
		case manifest.TLSApp:
			port.TLS = AtApp
		case manifest.TLSGateway:
			port.TLS = AtGateway
		default:
			return Policy{}, fault.New("port_policy", "the port policy has tls %q, which is neither app nor gateway", e.TLS)
		}
		if e.Port == 0 {
			return Policy{}, fault.New("port_policy", "the port policy has port 0")
		}
		i, found := p.find(e.Port)
		switch {
		case !found:
			p.ports = slices.Insert(p.ports, i, port)
		case p.ports[i] != port:
			return Policy{}, fault.New("port_policy", "the port policy says two things about port %d", e.Port)
		}
	}
	return p, nil
}

func (p Policy) find(number uint16) (int, bool) {
	return slices.BinarySearchFunc(p.ports, number, func(q Port, n uint16) int { return int(q.Number) - int(n) })
}

// Ports returns the listed ports in order, and whether others are open too.
func (p Policy) Ports() (listed []Port, others bool) { return slices.Clone(p.ports), p.any }

// Manifest returns the policy as a manifest has it.
func (p Policy) Manifest() manifest.PortPolicy {
	m := manifest.PortPolicy{RestrictMode: !p.any}
	for _, port := range p.ports {
		m.Ports = append(m.Ports, manifest.Port{Port: port.Number, PP: port.PROXY, TLS: [...]string{AsAsked: "", AtApp: manifest.TLSApp, AtGateway: manifest.TLSGateway}[port.TLS]})
	}
	return m
}

// Narrowed returns what is left of a policy under an operator's: the ports that both admit,
// with what p says of them.
func (p Policy) Narrowed(operator Policy) Policy {
	if operator.any {
		return p
	}
	out := Policy{}
	for _, port := range operator.ports {
		if i, ok := p.find(port.Number); ok {
			out.ports = append(out.ports, p.ports[i])
		} else if p.any {
			out.ports = append(out.ports, Port{Number: port.Number})
		}
	}
	return out
}

// Equal reports whether two policies are the same.
func (p Policy) Equal(q Policy) bool { return p.any == q.any && slices.Equal(p.ports, q.ports) }

// Request is what a client asks for.
type Request struct {
	Port uint16
	Form hostname.Mode // of the host name; Passthrough for a custom domain
}

// Reason says what a decision rests on.
type Reason string

const (
	ByApp      Reason = "measured policy: tls app"
	ByGateway  Reason = "measured policy: tls gateway"
	ByHostName Reason = "form of the host name"
	ByAgent    Reason = "guest agent"
)

// Decision is what happens to an admitted connection.
type Decision struct {
	Mode  hostname.Mode
	PROXY bool // a PROXY header goes first
	// Reason says what Mode rests on.
	Reason Reason
	// Overruled says that the host name asked for another mode.
	Overruled bool
}

// Decide judges a request by the measured policy, nil when it is not known, and the
// operator's, nil when there is none. A refusal is an error: port_policy_unknown (to be
// fetched), port_denied, port_denied_operator.
func Decide(measured, operator *Policy, r Request) (Decision, error) {
	if r.Port == 0 || r.Form > hostname.Passthrough {
		return Decision{}, fault.New("port_denied", "no port, or an unknown form of the host name")
	}
	if measured == nil {
		return Decision{}, fault.New("port_policy_unknown", "the port policy of the instance is not known")
	}
	if r.Port == manifest.TLSPort {
		// Whoever speaks to it is believed to be a gateway: a client whose TLS ended here
		// could write the PROXY header himself (threats.md K04).
		return Decision{}, fault.New("port_denied", "port %d is where the guest's agent ends TLS, for ports with tls app", r.Port).
			WithFix("use the name of the port that is meant, and publish the app at another one")
	}
	if r.Port == AgentPort {
		return Decision{Mode: r.Form, Reason: ByAgent}, nil
	}
	i, listed := measured.find(r.Port)
	if !listed && !measured.any {
		return Decision{}, fault.New("port_denied", "the app's port policy does not list port %d", r.Port).
			WithFix("list it in port_policy.ports of the manifest")
	}
	if operator != nil && !operator.any {
		if _, ok := operator.find(r.Port); !ok {
			return Decision{}, fault.New("port_denied_operator", "the operator of the gateway has closed port %d of the instance", r.Port)
		}
	}
	d := Decision{Mode: r.Form, Reason: ByHostName}
	if !listed {
		return d, nil
	}
	port := measured.ports[i]
	d.PROXY = port.PROXY
	switch port.TLS {
	case AtApp:
		d.Mode, d.Reason = hostname.Passthrough, ByApp
	case AtGateway:
		d.Reason = ByGateway
		if d.Mode == hostname.Passthrough {
			d.Mode = hostname.Terminate
		}
	}
	d.Overruled = d.Mode != r.Form
	return d, nil
}
