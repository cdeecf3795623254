// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bytes"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/internal/testkit/netlab"
)

// Threat K07: whoever answers a guest's questions of names leads it to a gateway of his
// own, which is attested, but is another app. The guest gives that nothing: it says why,
// and is routed when the name leads to its gateway again. Meanwhile it only was not there.
func TestThreat_K07_AGatewayIsNotKnownByItsName(t *testing.T) {
	l := newLab(t)
	real := l.gateway(nil)
	evil := l.gateway(func(g *tdxtest.Guest) { g.AppID = dstack.AppID{0xee} })
	real.alone()
	evil.alone()

	var answer atomic.Value
	answer.Store(evil.ip)
	var asked atomic.Int32
	ip := real.ip
	var packets net.PacketConn
	l.must(netlab.In(real.ns, func() (err error) {
		packets, err = net.ListenPacket("udp", ip+":53")
		return err
	}))
	server := &dns.Server{PacketConn: packets, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		if q := r.Question[0]; q.Qtype == dns.TypeA {
			asked.Add(1)
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(answer.Load().(string))}}
		}
		_ = w.WriteMsg(m)
	})}
	done := make(chan error, 1)
	go func() { done <- server.ActivateAndServe() }()
	t.Cleanup(func() { server.Shutdown(); <-done })

	shop := l.ordered(1, 1, "shop", guestOrder{Gateways: []string{"https://gateway.test:8000"}, DNS: ip + ":53"})
	id := shop.guest.InstanceID.String()
	said := func(what string) bool {
		text, err := os.ReadFile(shop.said.Name())
		l.must(err)
		return bytes.Contains(text, []byte(what))
	}
	l.eventually("the guest was led astray", func() bool { return asked.Load() > 0 })
	l.eventually("the guest refuses", func() bool { return said("app_id_mismatch") })
	if r := evil.routes(); len(r) != 0 || len(real.routes()) != 0 {
		t.Errorf("routes %v", r)
	}
	answer.Store(real.ip)
	l.reached(real, shop, "shop")

	// Once it has its route, a lie about the name takes nothing away.
	answer.Store(evil.ip)
	time.Sleep(2 * time.Second)
	l.reached(real, shop, "shop")
	if r := evil.routes(); len(r) != 0 {
		t.Errorf("%s is routed by another app's gateway: %v", id, r)
	}
}
