// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/internal/fault"
)

// dnsServer answers on UDP and TCP of one port.
func dnsServer(t *testing.T, h dns.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := net.ListenPacket("udp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{Listener: l, Handler: h}, {PacketConn: p, Handler: h}} {
		started, done := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() {
			defer close(done)
			s.ActivateAndServe()
		}()
		<-started
		t.Cleanup(func() {
			s.Shutdown()
			<-done
		})
	}
	return l.Addr().String()
}

func TestDNS(t *testing.T) {
	h := func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		_, udp := w.LocalAddr().(*net.UDPAddr)
		switch name := q.Question[0].Name; {
		case strings.HasPrefix(name, "none."):
			m.Rcode = dns.RcodeNameError
		case strings.HasPrefix(name, "broken."):
			m.Rcode = dns.RcodeServerFailure
		case strings.HasPrefix(name, "large.") && udp:
			m.Truncated = true
		case strings.HasPrefix(name, "empty."):
		default:
			m.Answer = []dns.RR{
				&dns.CNAME{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 7}, Target: "x."},
				&dns.TXT{Hdr: dns.RR_Header{Name: "x.", Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}, Txt: []string{"first", "second"}},
			}
		}
		w.WriteMsg(m)
	}
	server := dnsServer(t, h)
	d := DNS{Servers: []string{"127.0.0.1:1", server}} // the first one is dead
	for name, want := range map[string]string{"a.example": "first", "large.example": "first", "none.example": "", "empty.example": ""} {
		got, ttl, err := d.TXT(t.Context(), hostname.Name(name))
		if err != nil || got != want || want != "" && ttl != 7*time.Second {
			t.Errorf("%s: %q for %s, %v", name, got, ttl, err)
		}
	}
	if _, _, err := d.TXT(t.Context(), "broken.example"); err == nil {
		t.Error("a server's failure was taken for no record")
	}
	r := newRig(t, func(c *Config) { c.TXT = d })
	_, err := r.tls("broken.shop.example")
	wantAlert(t, err, 112) // _dstack-app-address.broken… leads to "first", which is no record of ours
	r.wantRefused("host_txt", 1)
	r = newRig(t, func(c *Config) { c.TXT = DNS{} })
	_, err = r.tls("a.shop.example")
	wantAlert(t, err, 80)
	r.wantRefused("edge_dns", 1)
}

func TestAnEdgeNeedsItsParts(t *testing.T) {
	if _, err := New(Config{Routes: route.New(route.Config{})}); fault.Code(err) != "edge_config" {
		t.Error(err)
	}
	r := newRig(t, func(c *Config) { c.GetCertificate = nil })
	r.instance(1, 1)
	_, err := r.tls(host(appID(1), ""))
	wantAlert(t, err, 80)
	r.wantRefused("edge_no_certificate", 1)
}
