// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/privateca"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/gateway/settings/settingstest"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

func TestAdministratorsShowWhoTheyAre(t *testing.T) {
	const token = "0123456789abcdef"
	const on = "[core.admin]\nenabled = true\n"
	weak := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(weak, []byte("alice:plain\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		text    string
		environ []string
		code    string
	}{
		"off":                        {"", nil, ""},
		"on, with nothing":           {on, nil, "admin_no_credential"},
		"an empty token":             {on + "auth_token = \"\"\n", nil, "admin_no_credential"},
		"an empty variable":          {on, []string{"ADMIN_API_TOKEN="}, "admin_no_credential"},
		"a short token":              {on + "auth_token = \"short\"\n", nil, "admin_token"},
		"a token":                    {on + "auth_token = \"" + token + "\"\n", nil, ""},
		"its other name":             {on + "admin_token = \"" + token + "\"\n", nil, ""},
		"both names":                 {on + "auth_token = \"" + token + "\"\nadmin_token = \"" + token + "\"\n", nil, "gateway_config"},
		"a variable":                 {on, []string{"DSTACK_GATEWAY_ADMIN_TOKEN=" + token}, ""},
		"upstream's variable":        {on, []string{"DSTACK_GATEWAY_ADMIN_TOKEN=", "ADMIN_API_TOKEN=" + token}, ""},
		"a short variable":           {on, []string{"ADMIN_API_TOKEN=short"}, "admin_token"},
		"passwords that are no hash": {on + "htpasswd_file = " + fmt.Sprintf("%q", weak) + "\n", nil, "admin_htpasswd"},
		"said to be open":            {on + "insecure_no_auth = true\n", nil, ""},
		"a relative socket":          {on + "insecure_no_auth = true\naddress = \"unix:admin.sock\"\n", nil, "gateway_config"},
	} {
		c2, err := load(t, good+c.text, c.environ...)
		if fault.Code(err) != c.code || err != nil && strings.Contains(err.Error(), token) {
			t.Errorf("%s: %v, want %q", name, err, c.code)
		}
		if strings.Contains(fmt.Sprintf("%+v", c2), token) {
			t.Errorf("%s: the configuration prints the token", name)
		}
	}
	if c, err := load(t, good, "DSTACK_GATEWAY_ADMIN_TOKEN=first-0123456789abcdef", "ADMIN_API_TOKEN="+token); err != nil || c.Core.Admin.AuthToken.Reveal() != "first-0123456789abcdef" {
		t.Errorf("which variable counts: %v", err)
	}
}

// settled is a node without a network, and what operators decide of it.
func settled(t *testing.T) (*live, *settingstest.Memory) {
	t.Helper()
	n := &Node{log: slog.New(slog.DiscardHandler), domains: []gateway.Domain{{Name: "fixed.example", Port: 443}}}
	var err error
	if n.ca, err = privateca.Open(t.TempDir(), []hostname.Name{"fixed.example"}, nil); err != nil {
		t.Fatal(err)
	}
	table := route.New(route.Config{Key: wgconfig.GeneratePrivateKey().Public(), Address: netip.MustParseAddr("100.96.0.1"), Network: netip.MustParsePrefix("100.96.0.0/11")})
	s := new(settingstest.Memory)
	return n.liveOf(s, 1, func() []gateway.Node { return nil }, table, nil), s
}

func (l *live) register(t *testing.T, n byte) route.Record {
	t.Helper()
	now := time.Now()
	open := portpolicy.Open()
	rec := route.Record{
		App: dstack.AppID{0xa}, Instance: dstack.InstanceID{0xb, n}, Compose: dstack.ComposeHash{1}, Key: wgconfig.GeneratePrivateKey().Public(),
		Address: netip.AddrFrom4([4]byte{100, 97, 0, n}), Policy: &open, Attested: now, Until: now.Add(10 * time.Minute),
	}
	if _, err := l.table.Register(rec); err != nil {
		t.Fatal(err)
	}
	return rec
}

func check(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestSettingsCountAtOnce(t *testing.T) {
	l, s := settled(t)
	ctx := t.Context()
	one, two := l.register(t, 1), l.register(t, 2)
	policy, err := portpolicy.New(manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 80}}})
	check(t, err)
	check(t,
		settings.Put(ctx, s, settings.DomainKey("eu.fixed.example"), settings.Domain{Port: 444, Priority: 2}, 0),
		settings.Put(ctx, s, settings.DomainKey("us.fixed.example"), settings.Domain{Port: 445}, 0),
		settings.Put(ctx, s, settings.DomainKey("theirs.fixed.example"), settings.Domain{Port: 446, Priority: 9, Node: 2}, 0),
		settings.Put(ctx, s, settings.DomainKey("fixed.example"), settings.Domain{Port: 1}, 0),
		settings.Put(ctx, s, settings.DomainKey("other.example"), settings.Domain{Port: 447}, 0),
		settings.Put(ctx, s, settings.NodeStatusKey(2), settings.NodeStatus{Down: true}, 0),
		settings.Put(ctx, s, settings.NodeURLKey(1), settings.NodeURL{URL: "https://new.example"}, 0),
		settings.Put(ctx, s, settings.PolicyKey(one.Instance), settings.Policy{Ports: policy}, 0),
		settings.Put(ctx, s, settings.DrainedKey(one.Instance), settings.Drained{}, 0),
		settings.Put(ctx, s, settings.RemovedKey(two.Instance), settings.Removed{At: time.Now()}, 0),
	)
	applied := 0
	l.applied = func() { applied++ }
	check(t, l.begin(ctx))
	var got []string
	for _, d := range l.Domains() {
		got = append(got, fmt.Sprintf("%s:%d", d.Name, d.Port))
	}
	if want := []string{"eu.fixed.example:444", "fixed.example:443", "other.example:447", "us.fixed.example:445", "theirs.fixed.example:446"}; !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
	if d, err := l.rules().Resolve("x.us.fixed.example"); err != nil || d.Kind != hostname.App {
		t.Errorf("%+v, %v", d, err)
	}
	cert, err := l.n.ca.GetCertificate(nil)
	if err != nil || cert.Leaf.VerifyHostname("x.eu.fixed.example") != nil || cert.Leaf.VerifyHostname("x.other.example") == nil {
		t.Errorf("%v, %v", cert.Leaf.DNSNames, err)
	}
	if own, told := l.told(gateway.Node{ID: 1, URL: "https://old.example"}); own.URL != "https://new.example" || !told {
		t.Errorf("%+v, %t", own, told)
	}
	if _, told := l.told(gateway.Node{ID: 2}); told || l.closed() != nil {
		t.Error("the gateway that is down")
	}
	if _, err := portpolicy.Decide(one.Policy, l.operator(one.Instance), portpolicy.Request{Port: 81}); fault.Code(err) != "port_denied_operator" {
		t.Errorf("%v", err)
	}
	if l.operator(two.Instance) != nil {
		t.Error("a policy of an instance that has none")
	}
	if rt, ok := l.table.Instance(one.Instance); !ok || !rt.Draining() || applied != 1 || l.table.Len() != 1 {
		t.Errorf("%t, %d", ok, applied)
	}
	// The override is the instance's, whatever it registers: it is no part of its record.
	again := l.register(t, 3)
	again.Instance = one.Instance
	if l.operator(again.Instance) == nil {
		t.Error("a registration took the operator's policy away")
	}

	// A deletion ends the routing of a domain, and of its certificate.
	check(t, settings.Delete(ctx, s, settings.DomainKey("us.fixed.example"), settings.Any),
		settings.Put(ctx, s, settings.NodeStatusKey(1), settings.NodeStatus{Down: true}, 0), l.begin(ctx))
	if d, err := l.rules().Resolve("x.us.fixed.example"); err != nil || d.Kind != hostname.Custom {
		t.Errorf("%+v, %v", d, err)
	}
	if cert, err := l.n.ca.GetCertificate(nil); err != nil || cert.Leaf.VerifyHostname("x.us.fixed.example") == nil {
		t.Errorf("%v", err)
	}
	if err := l.closed(); fault.Code(err) != "register_node_down" || err.Error() != "this gateway node is marked as down and cannot accept new registrations" {
		t.Errorf("%v", err)
	}
}

// K02: whatever one record of the settings becomes, the gateway goes on as it was; what
// operators closed stays closed.
func TestThreat_K02_ASettingThatRotsEndsNothing(t *testing.T) {
	l, s := settled(t)
	ctx := t.Context()
	one := l.register(t, 1)
	check(t,
		settings.Put(ctx, s, settings.DomainKey("eu.fixed.example"), settings.Domain{Port: 444}, 0),
		settings.Put(ctx, s, settings.NodeStatusKey(1), settings.NodeStatus{Down: true}, 0),
		settings.Put(ctx, s, settings.PolicyKey(one.Instance), settings.Policy{Ports: portpolicy.Open()}, 0),
		l.begin(ctx))
	for _, value := range []string{"", "{", `{"version":18446744073709551615}`, strings.Repeat("[", 1000)} {
		entries, err := s.List(ctx, "")
		check(t, err)
		for _, e := range entries {
			check(t, s.Put(ctx, e.Key, []byte(value), settings.Any))
		}
		// From the future: an end of a route that nobody could undo.
		check(t, settings.Put(ctx, s, settings.RemovedKey(one.Instance), settings.Removed{At: time.Now().Add(24 * time.Hour)}, settings.Any), l.begin(ctx))
		if d, err := l.rules().Resolve("x.eu.fixed.example"); err != nil || d.Kind != hostname.App || len(l.Domains()) != 2 {
			t.Errorf("%q: %+v, %v", value, d, err)
		}
		if l.closed() == nil || l.table.Len() != 1 {
			t.Errorf("%q: %v, %d routes", value, l.closed(), l.table.Len())
		}
		if _, err := portpolicy.Decide(one.Policy, l.operator(one.Instance), portpolicy.Request{Port: 80}); fault.Code(err) != "port_denied_operator" {
			t.Errorf("%q: %v", value, err)
		}
	}
}

func TestRemovalsAreForgottenWhenNoEvidenceIsAsOld(t *testing.T) {
	l, s := settled(t)
	ctx := t.Context()
	old, late := dstack.InstanceID{1}, dstack.InstanceID{2}
	now := time.Now()
	l.now = func() time.Time { return now }
	check(t,
		settings.Put(ctx, s, settings.RemovedKey(old), settings.Removed{At: now.Add(-4 * time.Hour)}, 0),
		settings.Put(ctx, s, settings.RemovedKey(late), settings.Removed{At: now.Add(-2 * time.Hour)}, 0),
		l.begin(ctx))
	l.prune(ctx)
	all, err := settings.Load(ctx, s)
	check(t, err)
	if len(all.Removed) != 1 || all.Removed[late].IsZero() {
		t.Errorf("%v", all.Removed)
	}
	// One that came after it was looked at stays.
	now = now.Add(5 * time.Hour)
	check(t, settings.Put(ctx, s, settings.RemovedKey(late), settings.Removed{At: now}, settings.Any))
	l.prune(ctx)
	if all, err := settings.Load(ctx, s); err != nil || len(all.Removed) != 1 {
		t.Errorf("%v, %v", all.Removed, err)
	}
}

// orders that are asked for, by domain.
type asked struct {
	at    map[hostname.Name]time.Time
	names []hostname.Name
}

func (a *asked) Renew(_ context.Context, base hostname.Name, _ bool) (bool, time.Time, error) {
	a.names = append(a.names, base)
	return true, time.Time{}, nil
}

func (a *asked) ends(base hostname.Name) time.Time { return a.at[base] }

func TestOperatorsTimesOfRenewal(t *testing.T) {
	l, _ := settled(t)
	now := time.Now()
	l.now = func() time.Time { return now }
	set := func(c *settings.Certbot) {
		l.state.Store(l.of(&settings.Snapshot{Certbot: c, Domains: map[hostname.Name]settings.Domain{"late.example": {Port: 1}, "none.example": {Port: 1}}}))
	}
	a := &asked{at: map[hostname.Name]time.Time{"fixed.example": now.Add(5 * 24 * time.Hour), "late.example": now.Add(50 * 24 * time.Hour)}}
	forced := map[hostname.Name]time.Time{}
	set(nil)
	if l.renew(t.Context(), time.Time{}, forced, a); len(a.names) != 0 {
		t.Errorf("nobody asked: %v", a.names)
	}
	set(&settings.Certbot{RenewInterval: time.Hour, RenewBefore: 10 * 24 * time.Hour})
	last := l.renew(t.Context(), time.Time{}, forced, a)
	if !slices.Equal(a.names, []hostname.Name{"fixed.example"}) {
		t.Errorf("%v", a.names)
	}
	now = now.Add(30 * time.Minute)
	last = l.renew(t.Context(), last, forced, a)
	now = now.Add(time.Hour) // a certificate that is as short again is no reason for one an hour
	last = l.renew(t.Context(), last, forced, a)
	if len(a.names) != 1 {
		t.Errorf("%v", a.names)
	}
	now = now.Add(24 * time.Hour)
	if l.renew(t.Context(), last, forced, a); len(a.names) != 2 {
		t.Errorf("%v", a.names)
	}
}

func TestTheGateClosesAndOpens(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	table := route.New(route.Config{})
	e, err := edge.New(edge.Config{Routes: table, Dial: func(context.Context, netip.AddrPort) (net.Conn, error) { return nil, io.EOF }})
	check(t, err)
	g := newGate(e, l)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.serve(ctx) }()
	dial := func() (net.Conn, error) { return net.DialTimeout("tcp", g.addr, time.Second) }
	first, err := dial()
	check(t, err)
	defer first.Close()
	for range 3 {
		check(t, g.Drain(true), g.Drain(true))
		deadline := time.Now().Add(5 * time.Second)
		for {
			c, err := dial()
			if err != nil {
				break
			}
			c.Close()
			if time.Now().After(deadline) {
				t.Fatal("it is open")
			}
		}
		if !g.Draining() {
			t.Error("it does not say so")
		}
		check(t, g.Drain(false), g.Drain(false))
		c, err := dial()
		check(t, err)
		c.Close()
	}
	// Closed before it was opened.
	check(t, g.Drain(true), g.Drain(false), g.Drain(true))
	cancel()
	check(t, <-done)
	end, stop := context.WithTimeout(t.Context(), 0)
	defer stop()
	_ = e.Shutdown(end)
}

// call calls a gateway's administrators' socket.
func (h *host) call(method string, req, resp proto.Message) error {
	c := prpc.NewClient("http://gateway/prpc", func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", h.control+"a")
	})
	defer c.HTTP.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(h.l.t.Context(), 20*time.Second)
	defer cancel()
	return c.Call(ctx, method, req, resp)
}

// What an administrator does at one gateway of a cluster counts at the others: members,
// domains, ports, removals, which gateways there are; and after a restart with an old disk.
func TestAdministratorsDecideForTheCluster(t *testing.T) {
	l := newLab(t)
	g := []*host{l.gateway(nil), l.gateway(nil)}
	for _, h := range g {
		h.configure(fmt.Sprintf("[core.admin]\nenabled = true\naddress = \"unix:%sa\"\ninsecure_no_auth = true\n", h.control))
		h.alone()
	}
	var invitation api.InviteMemberResponse
	l.must(g[0].call("InviteMember", nil, &invitation))
	wantCode(t, g[1].call("JoinCluster", &api.JoinClusterRequest{Url: invitation.Address, Token: invitation.Token + "x"}, nil), "cluster_uninvited")
	l.must(g[1].call("JoinCluster", &api.JoinClusterRequest{Url: "https://" + invitation.Address, Token: invitation.Token}, nil))
	members := func(h *host) *api.ListMembersResponse {
		out := new(api.ListMembersResponse)
		_ = h.call("ListMembers", nil, out) // one that does not answer has none
		return out
	}
	l.eventually("both are members", func() bool {
		for _, h := range g {
			m := members(h)
			if len(m.Members) != 2 || !m.Quorum || m.Members[0].Learner || m.Members[1].Learner || !m.Members[0].Reachable || !m.Members[1].Reachable {
				return false
			}
		}
		return true
	})
	shop, stays := l.instance(1, 1, "shop", g[0], g[1]), l.instance(2, 1, "stays", g[0], g[1])
	for _, h := range g {
		l.reached(h, shop, "shop")
		l.reached(h, stays, "stays")
	}
	app := shop.guest.AppID.String()

	// A base domain that is added at one leads to apps at the other, and is gone when deleted.
	l.must(g[0].call("AddZtDomain", &api.ZtDomainConfig{Domain: "eu." + labDomain, Port: 443}, nil))
	wantCode(t, g[0].call("AddZtDomain", &api.ZtDomainConfig{Domain: "other.example", Port: 443}, nil), "private_ca_domains")
	l.reachedAs(g[1], app+".eu", "shop")
	l.must(g[1].call("DeleteZtDomain", &api.DeleteZtDomainRequest{Domain: "eu." + labDomain}, nil))
	l.eventually("the domain leads nowhere", func() bool { _, err := l.visit(g[0], app+".eu"); return err != nil })

	// Ports: closed at both; the guest registers again and again meanwhile.
	instance := shop.guest.InstanceID.String()
	l.must(g[0].call("SetInstancePortPolicy", &api.SetInstancePortPolicyRequest{InstanceId: instance, Policy: &api.PortPolicy{RestrictMode: true}}, nil))
	for _, h := range g {
		l.eventually("the port is closed", func() bool { _, err := l.visit(h, app); return err != nil })
	}
	l.reached(g[1], stays, "stays")
	var policy api.GetInstancePortPolicyResponse
	l.must(g[1].call("GetInstancePortPolicy", &api.GetInstancePortPolicyRequest{InstanceId: instance}, &policy))
	if policy.Source != "admin" || !policy.Effective.RestrictMode {
		t.Errorf("%v", &policy)
	}
	l.must(g[1].call("ClearInstancePortPolicy", &api.ClearInstancePortPolicyRequest{InstanceId: instance}, nil))
	l.reached(g[0], shop, "shop")

	// Draining of a gateway: nobody is let in, and then everybody again.
	l.must(g[0].call("Drain", &api.DrainRequest{On: true}, nil))
	l.eventually("the gateway drains", func() bool { _, err := l.visit(g[0], app); return err != nil })
	l.reached(g[1], shop, "shop")
	l.must(g[0].call("Drain", &api.DrainRequest{}, nil))
	l.reached(g[0], shop, "shop")

	// A gateway that is down takes no new instance.
	var status api.StatusResponse
	l.must(g[1].call("Status", nil, &status))
	l.must(g[0].call("SetNodeStatus", &api.SetNodeStatusRequest{Id: status.Id, Status: "down"}, nil))
	late := l.instance(3, 1, "late", g[1])
	time.Sleep(2 * time.Second)
	if _, ok := g[1].routes()[late.guest.InstanceID.String()]; ok {
		t.Error("a gateway that is down took an instance")
	}
	l.must(g[0].call("SetNodeStatus", &api.SetNodeStatusRequest{Id: status.Id, Status: "up"}, nil))

	// A removal counts everywhere, and at a gateway that was away with its routes on disk.
	time.Sleep(2500 * time.Millisecond) // the routes are on its disk by then
	shop.kill()
	g[1].kill()
	old, err := os.ReadFile(filepath.Join(g[1].dir, routesFile))
	l.must(err)
	if !strings.Contains(string(old), instance) {
		t.Error("the route is not on the disk")
	}
	g[1].start()
	l.eventually("it is back", func() bool { return members(g[0]).Quorum && len(g[1].routes()) > 0 })
	l.eventually("all agree on the removal", func() bool { return g[0].call("RemoveRoutes", &api.RemoveRoutesRequest{AppId: app}, nil) == nil })
	for _, h := range g {
		l.eventually("the route is gone", func() bool { _, ok := h.routes()[instance]; return !ok })
	}
	g[1].kill()
	l.must(os.WriteFile(filepath.Join(g[1].dir, routesFile), old, 0o600))
	g[1].start()
	l.reached(g[1], stays, "stays")
	// What it had not known to be agreed when it was killed it hears from the other.
	l.eventually("the restored route is gone", func() bool { r := g[1].routes(); _, ok := r[instance]; return len(r) > 0 && !ok })
	time.Sleep(time.Second)
	for _, h := range g {
		if _, ok := h.routes()[instance]; ok {
			t.Errorf("%s has the removed route again", h.ip)
		}
	}

	// Last, the second gateway is taken out, and the first is ended.
	second := memberOf(g[1])
	l.eventually("a member is removed", func() bool { return g[0].call("RemoveMember", &api.RemoveMemberRequest{Id: second}, nil) == nil })
	l.eventually("it is out", func() bool { return len(members(g[0]).Members) == 1 })
	l.must(g[0].call("Exit", &api.ExitRequest{Force: true}, nil))
	select {
	case <-g[0].ended:
	case <-time.After(10 * time.Second):
		t.Error("the gateway did not end")
	}
}

func memberOf(h *host) string {
	for _, m := range h.status().Members {
		if m.Self {
			return m.UUID
		}
	}
	return ""
}
