// SPDX-License-Identifier: Apache-2.0

package portpolicy

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

const (
	plain = hostname.Terminate
	h2    = hostname.TerminateH2
	pass  = hostname.Passthrough
)

func policy(t testing.TB, m manifest.PortPolicy) *Policy {
	t.Helper()
	p, err := New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &p
}

// The whole matrix of who ends TLS: policy against host form.
func TestThePolicyWinsOverTheHostName(t *testing.T) {
	p := policy(t, manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{
		{Port: 1}, {Port: 2, TLS: "app"}, {Port: 3, TLS: "gateway"}, {Port: 4, PP: true}, {Port: 5, TLS: "app", PP: true},
	}})
	for _, c := range []struct {
		name string
		port uint16
		form hostname.Mode
		want Decision
	}{
		{"silent, plain", 1, plain, Decision{plain, false, ByHostName, false}},
		{"silent, h2", 1, h2, Decision{h2, false, ByHostName, false}},
		{"silent, passed through", 1, pass, Decision{pass, false, ByHostName, false}},
		{"app, plain", 2, plain, Decision{pass, false, ByApp, true}},
		{"app, h2", 2, h2, Decision{pass, false, ByApp, true}},
		{"app, passed through", 2, pass, Decision{pass, false, ByApp, false}},
		{"gateway, plain", 3, plain, Decision{plain, false, ByGateway, false}},
		{"gateway, h2", 3, h2, Decision{h2, false, ByGateway, false}},
		{"gateway, passed through", 3, pass, Decision{plain, false, ByGateway, true}},
		{"a PROXY header", 4, plain, Decision{plain, true, ByHostName, false}},
		{"a PROXY header to the app", 5, plain, Decision{pass, true, ByApp, true}},
		{"the agent, unlisted", AgentPort, pass, Decision{pass, false, ByAgent, false}},
		{"the agent's pages", AgentPort, plain, Decision{plain, false, ByAgent, false}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Decide(p, nil, Request{c.port, c.form})
			if err != nil || got != c.want {
				t.Errorf("%+v, %v, want %+v", got, err, c.want)
			}
		})
	}
}

func TestAdmission(t *testing.T) {
	listed := []manifest.Port{{Port: 80}, {Port: 443, TLS: "app"}}
	restricted, free := policy(t, manifest.PortPolicy{RestrictMode: true, Ports: listed}), policy(t, manifest.PortPolicy{Ports: listed})
	lockdown, open := policy(t, manifest.PortPolicy{RestrictMode: true}), Open()
	only443 := policy(t, manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 443, PP: true, TLS: "gateway"}, {Port: 22}}})
	for _, c := range []struct {
		name               string
		measured, operator *Policy
		port               uint16
		code               string
	}{
		{"listed", restricted, nil, 80, ""},
		{"unlisted", restricted, nil, 81, "port_denied"},
		{"unlisted, not restricted", free, nil, 81, ""},
		{"lockdown", lockdown, nil, 80, "port_denied"},
		{"lockdown leaves the agent", lockdown, nil, AgentPort, ""},
		{"no policy in the manifest", &open, nil, 9999, ""},
		{"the zero policy", &Policy{}, nil, 80, "port_denied"},
		{"unknown", nil, nil, 80, "port_policy_unknown"},
		{"unknown, whatever the operator says", nil, &open, 80, "port_policy_unknown"},
		{"unknown, at the agent's port", nil, nil, AgentPort, "port_policy_unknown"},
		{"port 0", &open, nil, 0, "port_denied"},
		{"the operator closes a port", restricted, only443, 80, "port_denied_operator"},
		{"the operator leaves a port", restricted, only443, 443, ""},
		{"the operator cannot open a port", restricted, only443, 22, "port_denied"},
		{"the operator cannot open all ports", restricted, &open, 22, "port_denied"},
		{"where the agent ends TLS", &open, nil, manifest.TLSPort, "port_denied"},
		{"the operator cannot hide the agent", restricted, &Policy{}, AgentPort, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := Decide(c.measured, c.operator, Request{c.port, pass})
			if fault.Code(err) != c.code {
				t.Errorf("code %q (%v), want %q", fault.Code(err), err, c.code)
			}
			if err != nil && d != (Decision{}) {
				t.Errorf("a refusal with %+v", d)
			}
		})
	}
	if _, err := Decide(&open, nil, Request{80, pass + 1}); fault.Code(err) != "port_denied" {
		t.Errorf("an unknown form: %v", err)
	}
	if d, err := Decide(restricted, only443, Request{443, plain}); err != nil || d.PROXY || d.Mode != pass {
		t.Errorf("the operator's flags count: %+v, %v", d, err)
	}
}

func TestPoliciesThatAreNone(t *testing.T) {
	var most []manifest.Port
	for n := range MaxPorts {
		most = append(most, manifest.Port{Port: uint16(MaxPorts - n)})
	}
	for _, c := range []struct {
		name  string
		ports []manifest.Port
		code  string
	}{
		{"port 0", []manifest.Port{{Port: 0}}, "port_policy"},
		{"a port twice, alike", []manifest.Port{{Port: 80, PP: true}, {Port: 80, PP: true}}, ""},
		{"a port twice, with and without a header", []manifest.Port{{Port: 80, PP: true}, {Port: 80}}, "port_policy"},
		{"a port twice, with and without TLS", []manifest.Port{{Port: 80, TLS: "app"}, {Port: 1}, {Port: 80}}, "port_policy"},
		{"an unknown word", []manifest.Port{{Port: 80, TLS: "none"}}, "port_policy"},
		{"the most ports", most, ""},
		{"too many", append(most, manifest.Port{Port: MaxPorts + 1}), "port_policy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := New(manifest.PortPolicy{Ports: c.ports})
			if fault.Code(err) != c.code {
				t.Errorf("code %q (%v), want %q", fault.Code(err), err, c.code)
			}
			if err != nil && !p.Equal(Policy{}) {
				t.Errorf("%+v beside an error", p)
			}
		})
	}
}

func TestEqual(t *testing.T) {
	a := policy(t, manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 2}, {Port: 1}}})
	b := policy(t, manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 1}, {Port: 2}}})
	c := policy(t, manifest.PortPolicy{Ports: []manifest.Port{{Port: 1}, {Port: 2}}})
	if !a.Equal(*b) || a.Equal(*c) || a.Equal(Open()) {
		t.Error("policies compare by their meaning")
	}
	listed, others := a.Ports()
	listed[0].PROXY = true
	if again, _ := a.Ports(); others || again[0] != (Port{Number: 1}) {
		t.Errorf("%+v", again)
	}
}

// K04: no form of the host name changes who ends TLS, or whether a header is sent, where
// the measured policy speaks.
func TestThreat_K04_TheClientChoosesNoRoutingFlag(t *testing.T) {
	p := policy(t, manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 443, TLS: "app"}, {Port: 444, TLS: "app", PP: true}}})
	rules := hostname.Rules{Bases: []hostname.Name{"app.example.com"}}
	for _, host := range []string{"a-443", "a-443s", "a-443g", "a-s", "A-0443G"} {
		name, err := hostname.ParseName(host + ".app.example.com")
		if err != nil {
			t.Fatal(err)
		}
		dst, err := rules.Resolve(name)
		if err != nil {
			t.Fatal(err)
		}
		for port, proxy := range map[uint16]bool{443: false, 444: true} {
			d, err := Decide(p, nil, Request{port, dst.Mode})
			if err != nil || d.Mode != pass || d.PROXY != proxy {
				t.Errorf("%s at %d: %+v, %v", host, port, d, err)
			}
		}
	}
	if _, err := rules.Resolve("a-443p.app.example.com"); fault.Code(err) != "host_port" {
		t.Errorf("a suffix that asks for a PROXY header: %v", err)
	}
}

// Whatever the operator writes, what is admitted was admitted without it, and in the same way.
func TestPropertyTheOperatorOnlyNarrows(t *testing.T) {
	draw := func(t *rapid.T, name string) *Policy {
		m := manifest.PortPolicy{RestrictMode: rapid.Bool().Draw(t, name)}
		for _, n := range rapid.SliceOfNDistinct(rapid.Uint16Range(1, 12), 0, 8, rapid.ID).Draw(t, name+" ports") {
			m.Ports = append(m.Ports, manifest.Port{Port: n, PP: rapid.Bool().Draw(t, "pp"), TLS: rapid.SampledFrom([]string{"", "app", "gateway"}).Draw(t, "tls")})
		}
		p, err := New(m)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.IsSortedFunc(p.ports, func(a, b Port) int { return int(a.Number) - int(b.Number) }) {
			t.Fatalf("%+v", p)
		}
		if again, err := New(p.Manifest()); err != nil || !again.Equal(p) {
			t.Fatalf("%+v becomes %+v, %v", p, again, err)
		}
		return &p
	}
	rapid.Check(t, func(t *rapid.T) {
		measured, operator := draw(t, "measured"), draw(t, "operator")
		r := Request{rapid.Uint16Range(0, 13).Draw(t, "port"), hostname.Mode(rapid.IntRange(0, 2).Draw(t, "form"))}
		with, err := Decide(measured, operator, r)
		without, before := Decide(measured, nil, r)
		if err == nil && (before != nil || with != without) {
			t.Fatalf("%+v without the operator %+v, %v", with, without, before)
		}
		if measured != nil && operator != nil && r.Port != AgentPort && r.Port != 0 {
			left := measured.Narrowed(*operator)
			if d, told := Decide(&left, nil, r); (told == nil) != (err == nil) || err == nil && d != with {
				t.Fatalf("narrowed %+v, %v; decided %+v, %v", d, told, with, err)
			}
		}
	})
}
