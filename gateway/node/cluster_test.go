// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/gateway/exchange"
	"github.com/dstack-go/dstack/gateway/privateca"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/testkit/netlab"
)

// Contract A and B of spec/gateway.md §5.5: what is routed stays so with all others dead,
// with no quorum, and after a cold restart alone; and an instance that registers at a
// gateway that is left is routed there.
func TestClusterContract_A_B_ServesAndRegistersAlone(t *testing.T) {
	l := newLab(t)
	g := l.cluster(3)
	shop := l.instance(1, 1, "shop", g[0])
	for _, h := range g {
		l.reached(h, shop, "shop")
	}
	g[1].kill()
	g[2].kill()
	l.eventually("the quorum is lost", func() bool { return !g[0].status().Quorum })
	l.reached(g[0], shop, "shop")
	g[0].kill()
	g[0].start()
	l.reached(g[0], shop, "shop")
	if g[0].status().Quorum {
		t.Error("there is a quorum of one in three")
	}
	bar := l.instance(2, 1, "bar", g[0])
	l.reached(g[0], bar, "bar")
	// The others are back, and know who came meanwhile.
	g[1].start()
	g[2].start()
	for _, h := range g {
		l.reached(h, bar, "bar")
	}
	l.eventually("the quorum is back", func() bool { return g[0].status().Quorum })
}

// Contract C: what registers at one gateway is reached through all connected ones within
// two seconds, whether the guest registers at each itself or knows one only.
func TestClusterContract_C_ARegistrationIsKnownEverywhere(t *testing.T) {
	l := newLab(t)
	g := l.cluster(3)
	// Of several, since this machine does other things too; each is measured from its
	// registration at the first gateway.
	best := time.Hour
	for n := range byte(3) {
		app := l.instance(1, n+1, "shop", g[0])
		id := app.guest.InstanceID.String()
		l.eventually("it registers at the first", func() bool { return g[0].routes()[id] != (time.Time{}) })
		begin := time.Now()
		l.eventually("the others know it", func() bool {
			return g[1].routes()[id] != (time.Time{}) && g[2].routes()[id] != (time.Time{})
		})
		best = min(best, time.Since(begin))
		for _, h := range g {
			l.reachedAs(h, id, "shop")
		}
	}
	t.Logf("a registration was known at the other gateways after %s", best)
	if best > 2*time.Second {
		t.Errorf("a registration took %s to be known", best)
	}
}

// Contract D: changes are linearizable: of two that begin with the same state one is made,
// a lock has one holder, and without a quorum there are none, while reading goes on.
func TestClusterContract_D_ChangesAreAgreed(t *testing.T) {
	l := newLab(t)
	g := l.cluster(3)
	for i := range 10 {
		key := fmt.Sprintf("domain/%d", i)
		results := make(chan error, len(g))
		for _, h := range g {
			go func() { results <- h.ask("put", url.Values{"key": {key}, "at": {"0"}}, []byte(h.ip), nil) }()
		}
		made := 0
		for range g {
			if err := <-results; err == nil {
				made++
			} else {
				wantCode(t, err, "state_conflict")
			}
		}
		if made != 1 {
			t.Errorf("%s was made %d times", key, made)
		}
		var first string
		l.must(g[0].ask("get", url.Values{"key": {key}}, nil, &first))
		l.eventually("all read the same", func() bool {
			for _, h := range g {
				var text string
				if h.ask("get", url.Values{"key": {key}}, nil, &text) != nil || text != first {
					return false
				}
			}
			return true
		})
	}
	order := url.Values{"name": {"order"}}
	l.must(g[0].ask("lock", order, nil, nil))
	wantCode(t, g[1].ask("lock", order, nil, nil), "state_quorum")
	l.must(g[0].ask("unlock", order, nil, nil))
	l.must(g[1].ask("lock", order, nil, nil))
	l.must(g[1].ask("unlock", order, nil, nil))

	g[1].kill()
	g[2].kill()
	l.eventually("the quorum is lost", func() bool { return !g[0].status().Quorum })
	wantCode(t, g[0].ask("put", url.Values{"key": {"domain/late"}, "at": {"0"}}, nil, nil), "state_quorum")
	wantCode(t, g[0].ask("lock", order, nil, nil), "state_quorum")
	var text string
	l.must(g[0].ask("get", url.Values{"key": {"domain/0"}}, nil, &text))
	if text == "" {
		t.Error("a member alone does not read")
	}
}

// Contract E: deletions reach all; a member that comes back with an old disk gets the
// present and brings back nothing; and what a member passes on that breaks the rules is
// put aside, the rest beside it is not (threats.md K02, K01).
func TestClusterContract_E_DeletionsStay(t *testing.T) {
	l := newLab(t)
	g := l.cluster(3)
	shop, gone := l.instance(1, 1, "shop", g[0]), l.instance(2, 1, "gone", g[0])
	for _, h := range g {
		l.reached(h, shop, "shop")
		l.reached(h, gone, "gone")
	}
	l.must(g[0].ask("put", url.Values{"key": {"domain/old"}, "at": {"0"}}, []byte("1"), nil))
	l.eventually("all have it", func() bool { return g[2].ask("get", url.Values{"key": {"domain/old"}}, nil, nil) == nil })

	// The third gateway's disk as it is now comes back after the deletion.
	time.Sleep(2500 * time.Millisecond) // its routes are on its disk by then
	g[2].kill()
	old := g[2].dir + ".old"
	l.must(os.RemoveAll(filepath.Join(g[2].dir, clusterDir, "peers"))) // sockets, which are made at each start
	l.must(os.CopyFS(old, os.DirFS(g[2].dir)))
	g[2].start()
	l.eventually("it is back", func() bool { return g[2].status().Quorum })
	gone.kill()
	id := gone.guest.InstanceID.String()
	for _, h := range g {
		l.must(h.ask("unroute", url.Values{"instance": {id}}, nil, nil))
	}
	l.must(g[0].ask("delete", url.Values{"key": {"domain/old"}}, nil, nil))
	l.eventually("all have forgotten", func() bool { return g[2].ask("get", url.Values{"key": {"domain/old"}}, nil, nil) != nil })
	g[2].kill()
	l.must(os.RemoveAll(g[2].dir))
	l.must(os.Rename(old, g[2].dir))
	g[2].start()
	l.eventually("it has the present", func() bool {
		g[2].supervise()
		return g[2].status().Quorum && g[2].ask("get", url.Values{"key": {"domain/old"}}, nil, nil) != nil
	})
	l.reached(g[2], shop, "shop")
	time.Sleep(3 * time.Second) // it has told the others by then what it has
	for _, h := range g[:2] {
		if _, ok := h.routes()[id]; ok {
			t.Errorf("%s has the removed route again", h.ip)
		}
	}
}

// Threat K02: a member whose store is truncated anywhere is back with all that was agreed,
// from its own disk where that is enough and else from the others.
func TestThreat_K02_ATruncatedStoreRecovers(t *testing.T) {
	l := newLab(t)
	g := l.cluster(3)
	for i := range 20 {
		l.must(g[0].ask("put", url.Values{"key": {fmt.Sprintf("k/%d", i)}, "at": {"0"}}, []byte(strings.Repeat("x", 100)), nil))
	}
	for _, part := range []float64{0.999, 0.5, 0.02, 0} {
		g[2].kill()
		logs, err := filepath.Glob(filepath.Join(g[2].dir, clusterDir, "etcd/member/wal/*.wal"))
		if err != nil || len(logs) == 0 {
			t.Fatalf("no log: %v", err)
		}
		text, err := os.ReadFile(logs[0])
		l.must(err)
		used := len(bytes.TrimRight(text, "\x00"))
		l.must(os.Truncate(logs[0], int64(part*float64(used))))
		g[2].start()
		l.eventually(fmt.Sprintf("it is back with %g of its log", part), func() bool {
			g[2].supervise()
			return g[2].status().Quorum && g[2].ask("get", url.Values{"key": {"k/19"}}, nil, nil) == nil
		})
	}
}

// Threats K01 and K02: a member that is broken, or lies, cannot take a route over, end the
// others' service, or live from the future.
func TestThreat_K02_ABrokenMembersRecordsArePutAside(t *testing.T) {
	l := newLab(t)
	g := l.cluster(2)
	shop := l.instance(1, 1, "shop", g[0])
	l.reached(g[0], shop, "shop")
	l.reached(g[1], shop, "shop")
	var dump string
	l.must(g[0].ask("dump", nil, nil, &dump))
	var line map[string]any
	l.must(json.Unmarshal([]byte(strings.SplitN(dump, " ", 2)[1]), &line))
	own := g[0].status().Own
	now := time.Now()
	edited := func(edit func(map[string]any)) string {
		x := map[string]any{}
		for k, v := range line {
			x[k] = v
		}
		x["instance_id"] = strings.Repeat("77", 20)
		x["key"] = wgconfig.GeneratePrivateKey().Public().String()
		x["address"] = "100.97.7.7"
		x["attested"], x["until"] = now.UnixMilli(), now.Add(time.Minute).UnixMilli()
		edit(x)
		text, err := json.Marshal(x)
		l.must(err)
		return fmt.Sprintf("%08x %s", crc32.Checksum(text, crc32.MakeTable(crc32.Castagnoli)), text)
	}
	bad := []struct{ code, line string }{
		{"route_record", "{"},
		{"route_record", strings.Repeat("x", 1<<16)},
		{"route_future", edited(func(x map[string]any) {
			x["attested"], x["until"] = now.Add(time.Hour).UnixMilli(), now.Add(2*time.Hour).UnixMilli()
		})},
		{"route_record", edited(func(x map[string]any) { x["attested"] = uint64(1<<64 - 1) })},
		{"route_lease", edited(func(x map[string]any) { x["until"] = now.Add(48 * time.Hour).UnixMilli() })},
		{"route_key_own", edited(func(x map[string]any) { x["key"] = own.Key })},
		{"route_key_taken", edited(func(x map[string]any) { x["key"] = line["key"] })},
		{"route_address", edited(func(x map[string]any) { x["address"] = own.Address.Addr().String() })},
		{"route_address_taken", edited(func(x map[string]any) { x["address"] = line["address"] })},
		{"route_instance_taken", edited(func(x map[string]any) { x["instance_id"], x["app_id"] = line["instance_id"], strings.Repeat("66", 20) })},
		{"route_record", edited(func(x map[string]any) { x["key"] = fmt.Sprint(x["key"]) + "\nEndpoint=192.0.2.1:1" })},
	}
	var body strings.Builder
	for _, b := range bad {
		body.WriteString(b.line + "\n")
	}
	body.WriteString(edited(func(map[string]any) {}) + "\n") // a good one, last
	l.must(g[1].ask("call", url.Values{"uuid": {own.UUID}, "name": {exchange.Call}}, []byte(body.String()), nil))
	var codes []string
	l.must(g[0].ask("quarantine", nil, nil, &codes))
	for i, b := range bad {
		if i >= len(codes) || codes[i] != b.code {
			t.Errorf("record %d: want %s, got %v", i, b.code, codes)
			break
		}
	}
	if _, ok := g[0].routes()[strings.Repeat("77", 20)]; !ok {
		t.Error("the good record beside them does not count")
	}
	l.reached(g[0], shop, "shop")
}

// Contract F: who is no member gets nowhere, whatever it proves to be; an invitation is one
// gateway's; and who is removed is out.
func TestClusterContract_F_MembersOnly(t *testing.T) {
	l := newLab(t)
	g := l.cluster(3)
	other := l.gateway(func(g *tdxtest.Guest) { g.AppID = dstack.AppID{0x55} })
	changed := l.gateway(func(g *tdxtest.Guest) { g.ComposeHash = dstack.ComposeHash{0x66} })
	late := l.gateway(nil)
	for _, h := range []*host{other, changed, late} {
		h.alone()
	}
	join := func(h *host, token string) error {
		return h.ask("join", url.Values{"addr": {g[0].ip + ":8003"}, "token": {token}}, nil, nil)
	}
	var token string
	l.must(g[0].ask("invite", nil, nil, &token))
	// They refuse the member before it has a chance to refuse them.
	wantCode(t, join(other, token), "channel_wrong_app")
	wantCode(t, join(changed, token), "channel_wrong_workload")
	wantCode(t, join(late, "no invitation"), "cluster_uninvited")
	wantCode(t, join(late, strings.Repeat("A", 43)), "cluster_uninvited")

	// One that shows the right evidence and is no member gets no word in.
	l.must(late.ask("join", url.Values{"addr": {g[0].ip + ":8003"}, "token": {token}}, nil, nil))
	l.eventually("it votes", func() bool { return len(late.status().Members) == 4 && late.status().Quorum })
	again := l.gateway(nil)
	again.alone()
	wantCode(t, join(again, token), "cluster_uninvited")
	wantCode(t, join(late, token), "cluster_member")

	uuid := g[2].status().Own.UUID
	l.must(g[0].ask("remove", url.Values{"uuid": {uuid}}, nil, nil))
	l.eventually("the others forget it", func() bool { return len(g[1].status().Members) == 3 })
	l.eventually("it knows", func() bool { return g[2].status().Removed })
	first := g[0].status().Own.UUID
	wantCode(t, g[2].ask("call", url.Values{"uuid": {first}, "name": {exchange.Call}}, nil, nil), "cluster_stranger")
	// One that was told of it at its own join has forgotten it too.
	wantCode(t, g[2].ask("call", url.Values{"uuid": {late.status().Own.UUID}, "name": {exchange.Call}}, nil, nil), "cluster_stranger")
	g[2].kill()
	g[2].start()
	time.Sleep(2 * time.Second)
	if s := g[2].status(); s.Quorum {
		t.Error("who was removed is back after a restart")
	}
	if len(g[1].status().Members) != 3 {
		t.Error("who was removed is a member again")
	}
	wantCode(t, g[0].ask("remove", url.Values{"uuid": {uuid}}, nil, nil), "cluster_stranger")
}

// Contract G: one, two and three gateways; an upgrade changes the manifest of one after the
// other, while all serve.
func TestClusterContract_G_GrowsAndIsUpgraded(t *testing.T) {
	l := newLab(t)
	g := []*host{l.gateway(nil), l.gateway(nil), l.gateway(nil)}
	g[0].alone()
	next := dstack.ComposeHash{0x9a, 2}
	for i, h := range g[1:] {
		h.alone()
		h.joinTo(g[0])
		l.must(h.ask("put", url.Values{"key": {fmt.Sprintf("step/%d", i)}, "at": {"0"}}, []byte("x"), nil))
	}
	shop := l.instance(1, 1, "shop", g[0])
	for _, h := range g {
		l.reached(h, shop, "shop")
	}
	// First all admit the next manifest beside the present one, then each becomes it.
	for _, h := range g {
		h.kill()
		h.configure(fmt.Sprintf("compose_hashes = %q\n", labHash.String()+","+next.String()))
		h.start()
		l.eventually("it is back", func() bool { return h.status().Quorum })
		l.reached(h, shop, "shop")
	}
	for _, h := range g {
		h.kill()
		h.upgrade(next)
		h.start()
		l.eventually("it is back with the next manifest", func() bool { return h.status().Quorum })
	}
	l.must(g[1].ask("put", url.Values{"key": {"step/last"}, "at": {"0"}}, []byte("x"), nil))
	l.eventually("all agree", func() bool {
		for _, h := range g {
			if h.ask("get", url.Values{"key": {"step/last"}}, nil, nil) != nil {
				return false
			}
		}
		return true
	})
}

// Three hosts of which one is cut off: both sides serve and register, one changes what is
// agreed, and all is one again afterwards.
func TestThreeHostsWithAPartition(t *testing.T) {
	l := newLab(t)
	g := l.cluster(3)
	shop := l.instance(1, 1, "shop", g[0])
	for _, h := range g {
		l.reached(h, shop, "shop")
	}
	mend := l.cut(g[2], g[0], g[1])
	l.eventually("the cut-off gateway has no quorum", func() bool { return !g[2].status().Quorum })
	l.eventually("the others have", func() bool { return g[0].status().Quorum && g[1].status().Quorum })
	for _, h := range g {
		l.reached(h, shop, "shop")
	}
	l.must(g[0].ask("put", url.Values{"key": {"domain/new"}, "at": {"0"}}, []byte("x"), nil))
	wantCode(t, g[2].ask("put", url.Values{"key": {"domain/other"}, "at": {"0"}}, nil, nil), "state_quorum")
	here, there := l.instance(2, 1, "here", g[0]), l.instance(3, 1, "there", g[2])
	l.reached(g[1], here, "here")
	l.reached(g[2], there, "there")
	mend()
	l.eventually("the cut-off gateway catches up", func() bool {
		return g[2].status().Quorum && g[2].ask("get", url.Values{"key": {"domain/new"}}, nil, nil) == nil
	})
	for _, h := range g {
		l.reached(h, here, "here")
		l.reached(h, there, "there")
	}
}

// Gateways of a cluster are one to their clients: a session of one resumes at another, and
// one private CA certifies at all.
func TestClientsSeeOneGateway(t *testing.T) {
	l := newLab(t)
	g := l.cluster(2)
	shop := l.instance(1, 1, "shop", g[0])
	l.reached(g[0], shop, "shop")
	l.reached(g[1], shop, "shop")
	roots := x509.NewCertPool()
	text, err := os.ReadFile(filepath.Join(g[0].dir, privateca.CertFile))
	l.must(err)
	roots.AppendCertsFromPEM(text)
	cache := tls.NewLRUClientSessionCache(4)
	resumed := func(h *host) (ok bool, err error) {
		err = netlab.In(l.visitor, func() error {
			raw, err := net.DialTimeout("tcp", h.ip+":443", 3*time.Second)
			if err != nil {
				return err
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(5 * time.Second))
			name := shop.guest.AppID.String() + "." + labDomain
			c := tls.Client(raw, &tls.Config{RootCAs: roots, ServerName: name, ClientSessionCache: cache})
			fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", name)
			_, err = io.ReadAll(c) // tickets come with the answer
			ok = c.ConnectionState().DidResume
			return err
		})
		return ok, err
	}
	l.eventually("a session of one resumes at the other", func() bool {
		if _, err := resumed(g[0]); err != nil {
			return false
		}
		ok, err := resumed(g[1])
		return err == nil && ok
	})
}
