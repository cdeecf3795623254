// SPDX-License-Identifier: Apache-2.0

package kmsclient

import (
	"context"
	"net"
	"net/url"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
)

// Threat K07: whoever answers the guest's questions of names leads it to an attested KMS
// of his own. The guest asks that for nothing, pinned by key or by what it runs; when the
// name leads to its KMS again, it has its keys.
func TestThreat_K07_AKMSIsNotKnownByItsName(t *testing.T) {
	w := newWorld(t)
	right := start(t, kmstest.Options{Attester: w.kms, Names: []string{"kms.test"}})
	u, err := url.Parse(right.URL)
	if err != nil {
		t.Fatal(err)
	}
	start(t, kmstest.Options{
		Addr: "127.0.0.2:" + u.Port(), Names: []string{"kms.test"}, // a name has one port
		Attester: &tdxtest.Guest{Platform: w.platform, AppID: dstack.AppID{0xbb}, InstanceID: dstack.InstanceID{8}, ComposeHash: dstack.ComposeHash{0xbc}},
	})

	var answer atomic.Value
	answer.Store("127.0.0.2")
	poison(t, &answer)
	at := "https://kms.test:" + u.Port()
	for name, c := range map[string]struct {
		cfg  Config
		code string
	}{
		"pinned by its root":        {Config{URLs: []string{at}, Root: right.SPKI(), Attester: w.app}, "channel_issuer"},
		"known by what it runs":     {Config{URLs: []string{at}, Policy: policy(t, w.demand(t)), Attester: w.app}, "kms_not_appraised"},
		"by its root and what runs": {Config{URLs: []string{at}, Root: right.SPKI(), Policy: policy(t, w.demand(t)), Attester: w.app}, "kms_not_appraised"},
	} {
		answer.Store("127.0.0.2")
		_, err := keys(t, newClient(t, c.cfg))
		wantCode(t, err, c.code)
		answer.Store("127.0.0.1")
		if _, err := keys(t, newClient(t, c.cfg)); err != nil {
			t.Errorf("%s: its own KMS gives none: %v", name, err)
		}
	}
}

// poison has this process ask a server of the test's for names.
func poison(t *testing.T, answer *atomic.Value) {
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &dns.Server{PacketConn: packets, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		if q := r.Question[0]; q.Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(answer.Load().(string))}}
		}
		_ = w.WriteMsg(m)
	})}
	done := make(chan error, 1)
	go func() { done <- server.ActivateAndServe() }()
	was := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, packets.LocalAddr().String())
	}}
	t.Cleanup(func() {
		net.DefaultResolver = was
		server.Shutdown()
		<-done
	})
}
