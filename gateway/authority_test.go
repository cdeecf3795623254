// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/governance/authority"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/webhook"
	"github.com/dstack-go/dstack/internal/fault"
)

// governed is a world in which a signed policy says who gets a route.
type governed struct {
	*world
	owner     ed25519.PrivateKey
	doc       *policy.Document
	documents *policy.Authority
}

// newGoverned makes one, whose policy allows app 1; by, if not nil, is asked in place of
// the policy itself.
func newGoverned(t *testing.T, by func(governance.Authority) governance.Authority) *governed {
	t.Helper()
	g := &governed{}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	_, g.owner, err = ed25519.GenerateKey(rand.Reader)
	check(err)
	g.documents, err = policy.OpenAuthority(filepath.Join(t.TempDir(), "policy.json"), policy.Keys{Keys: []ed25519.PublicKey{g.owner.Public().(ed25519.PublicKey)}, Threshold: 1}, func() time.Time { return g.world.now() })
	check(err)
	g.world = newWorld(t, func(w *world, c *gateway.Config) {
		g.world = w
		a := governance.Authority(g.documents)
		if by != nil {
			a = by(a)
		}
		c.Admission = gateway.ByAuthority{Authority: a}
	})
	one := g.instance(1, 1)
	raw, err := one.guest.Attest(t.Context(), dstack.ReportData{})
	check(err)
	judge := applicant.Judge{Roots: []attest.Roots{g.platform.Roots()}, Development: true, Now: g.now, Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: g.platform.Collateral()}}}
	who, err := judge.Judge(t.Context(), applicant.Evidence{Container: raw})
	check(err)
	launch := map[string]policy.Register{}
	for _, r := range []string{"mrtd", "rtmr0", "rtmr1", "rtmr2"} {
		launch[r] = policy.Register(who.Request.Launch[r])
	}
	g.doc = policy.New(dstack.TrustDevelopment, g.now(), 24*time.Hour)
	g.doc.OSImages = []policy.Image{{Hash: image, Dev: true, Epoch: 1, Launch: []map[string]policy.Register{launch}}}
	g.doc.Devices = policy.Devices{Any: true}
	g.doc.TCB = policy.TCB{Accept: []string{"UpToDate"}}
	g.doc.Apps = []policy.App{{AppID: one.guest.AppID, ComposeHashes: []policy.Compose{{Hash: one.guest.ComposeHash}}}}
	g.doc.LeaseSeconds = 600
	g.submit()
	return g
}

func (g *governed) submit() {
	g.t.Helper()
	g.doc.Sequence++
	text, err := g.doc.Encode()
	if err == nil {
		if text, err = policy.Sign(text, g.owner); err == nil {
			err = g.documents.Update(text)
		}
	}
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *governed) routed(i *instance) bool {
	_, ok := g.table.Instance(i.guest.InstanceID)
	g.peers.mu.Lock()
	defer g.peers.mu.Unlock()
	if _, peer := g.peers.list[i.wg.Public()]; peer != ok {
		g.t.Errorf("a route %v and a peer %v", ok, peer)
	}
	return ok
}

func (g *governed) want(i *instance, code string) *api.RegisterCvmResponse {
	g.t.Helper()
	out, err := i.register(nil)
	if fault.Code(err) != code {
		g.t.Errorf("%v, want %q", err, code)
	}
	return out
}

func TestThreat_G05_APolicyGivesAndTakesRoutes(t *testing.T) {
	g := newGoverned(t, nil)
	a, stranger := g.instance(1, 1), g.instance(2, 1)
	if out := g.want(a, ""); out.LeaseUntil != uint64(g.now().Add(10*time.Minute).Unix()) {
		t.Errorf("until %d", out.LeaseUntil)
	}
	if !g.routed(a) {
		t.Fatal("no route")
	}
	g.want(stranger, "app_unknown")
	if g.routed(stranger) {
		t.Error("a route of an app that the policy does not name")
	}
	// Who only says the id of an instance, and is denied, ends nobody's route.
	other := g.instance(2, 1)
	other.guest.InstanceID = a.guest.InstanceID
	g.want(other, "app_unknown")
	if !g.routed(a) {
		t.Fatal("another app's denial ended the route")
	}
	newKey := *a
	newKey.wg = wgconfig.GeneratePrivateKey()

	g.doc.Apps[0].ComposeHashes = []policy.Compose{{Hash: dstack.ComposeHash{7}}}
	g.submit()
	g.want(&newKey, "compose_hash_not_allowed")
	if !g.routed(a) {
		t.Error("who does not have the tunnel's key ended the route")
	}
	g.want(a, "compose_hash_not_allowed")
	if g.routed(a) {
		t.Error("a route of what the policy allows no more")
	}
}

func TestAWebhookGivesRoutes(t *testing.T) {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var g *governed
	handler := &webhook.Handler{Key: key, Now: func() time.Time { return g.now() }}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(w, r) }))
	defer srv.Close()
	pinned := public
	g = newGoverned(t, func(a governance.Authority) governance.Authority {
		handler.Authority = a
		return &webhook.Authority{URL: srv.URL, Key: pinned}
	})
	a := g.instance(1, 1)
	g.want(a, "")
	if !g.routed(a) {
		t.Fatal("no route")
	}
	// No answer is no denial: the route that there is ends with its lease.
	srv.Close()
	g.want(a, "webhook_unreachable")
	g.want(g.instance(1, 2), "webhook_unreachable")
	if !g.routed(a) {
		t.Error("a webhook that is away ended a route")
	}
	g.pass(11 * time.Minute)
	g.table.Sweep()
	if _, ok := g.table.Instance(a.guest.InstanceID); ok {
		t.Error("the route outlives its lease")
	}
}

// A webhook whose answers another key signs decides nothing.
func TestAWebhookOfAnotherKeyGivesNone(t *testing.T) {
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	other, _, _ := ed25519.GenerateKey(rand.Reader)
	var g *governed
	handler := &webhook.Handler{Key: key, Now: func() time.Time { return g.now() }}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(w, r) }))
	defer srv.Close()
	g = newGoverned(t, func(a governance.Authority) governance.Authority {
		handler.Authority = a
		return &webhook.Authority{URL: srv.URL, Key: other}
	})
	g.want(g.instance(1, 1), "webhook_signature")
}

// A chain that cannot be read gives no answer, and no route.
func TestAChainThatIsAwayGivesNoRoute(t *testing.T) {
	away := httptest.NewServer(http.NotFoundHandler())
	url := away.URL
	away.Close()
	a, _, err := authority.Open(authority.Config{Type: authority.TypeChain, Chain: authority.Chain{RPC: url, Threshold: 1, ChainID: 1, Registry: "0x00000000000000000000000000000000000000aa"}}, authority.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	g := newGoverned(t, func(governance.Authority) governance.Authority { return a })
	g.want(g.instance(1, 1), "chain_no_agreement")
}

// A peer of a known key with another address, as an older route left it, is set right.
func TestKeepCorrectsAPeersAddress(t *testing.T) {
	w := newWorld(t, nil)
	a := w.instance(1, 1)
	if _, err := a.register(nil); err != nil {
		t.Fatal(err)
	}
	rt, _ := w.table.Instance(a.guest.InstanceID)
	right := rt.Record().Address
	w.peers.mu.Lock()
	p := w.peers.list[a.wg.Public()]
	p.Address = netip.MustParseAddr("100.127.0.9")
	w.peers.list[p.Key] = p
	w.peers.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.service.Keep(ctx, "") }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	w.service.Applied()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		w.peers.mu.Lock()
		at, sets := w.peers.list[p.Key].Address, w.peers.sets
		w.peers.mu.Unlock()
		if at == right && sets == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the peer has %s, the route %s, after %d settings", at, right, sets)
		}
	}
	// What is right is left alone.
	w.service.Applied()
	time.Sleep(50 * time.Millisecond)
	w.peers.mu.Lock()
	defer w.peers.mu.Unlock()
	if w.peers.sets != 2 {
		t.Errorf("%d settings of the peer", w.peers.sets)
	}
}
