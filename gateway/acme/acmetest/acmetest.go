// SPDX-License-Identifier: Apache-2.0

// Package acmetest is a CA and a DNS server for tests: Pebble in this process, which asks an
// authoritative server on loopback that takes signed updates (RFC 2136). Nothing of it leaves
// loopback. For tests alone; nothing it signs is to be trusted.
package acmetest

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"
)

// The key of updates (RFC 8945).
const (
	KeyName = "update."
	KeyAlg  = dns.HmacSHA256
)

// Key is the secret of updates in base64.
var Key = base64.StdEncoding.EncodeToString([]byte("canary-of-the-tsig-key-0123456789"))

// DNS is an authoritative server of every zone it was given.
type DNS struct {
	Addr string

	mu      sync.Mutex
	zones   []string
	records []dns.RR
	removed []dns.RR
}

// NewDNS starts a server of the given zones.
func NewDNS(t testing.TB, zones ...string) *DNS {
	t.Helper()
	d := &DNS{}
	for _, z := range zones {
		d.zones = append(d.zones, dns.CanonicalName(z))
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.Addr = tcp.Addr().String()
	udp, err := net.ListenPacket("udp", d.Addr)
	if err != nil {
		t.Fatal(err)
	}
	secrets := map[string]string{KeyName: Key}
	accept := func(h dns.Header) dns.MsgAcceptAction {
		if int(h.Bits>>11)&0xf == dns.OpcodeUpdate {
			return dns.MsgAccept
		}
		return dns.DefaultMsgAcceptFunc(h)
	}
	for _, s := range []*dns.Server{
		{Listener: tcp, Handler: d, TsigSecret: secrets, MsgAcceptFunc: accept},
		{PacketConn: udp, Handler: d, TsigSecret: secrets, MsgAcceptFunc: accept},
	} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		done := make(chan struct{})
		go func() { defer close(done); s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { s.Shutdown(); <-done })
	}
	return d
}

// Add adds a record in the form of a zone file.
func (d *DNS) Add(t testing.TB, record string) {
	t.Helper()
	rr, err := dns.NewRR(record)
	if err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.records = append(d.records, rr)
}

// Records returns the records of a type at a name.
func (d *DNS) Records(name string, kind uint16) []dns.RR {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.find(name, kind)
}

// Removed returns the records that updates have removed.
func (d *DNS) Removed() []dns.RR {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.removed)
}

func (d *DNS) find(name string, kind uint16) (found []dns.RR) {
	for _, rr := range d.records {
		if h := rr.Header(); strings.EqualFold(h.Name, dns.Fqdn(name)) && h.Rrtype == kind {
			found = append(found, rr)
		}
	}
	return found
}

func (d *DNS) zone(name string) string {
	best := ""
	for _, z := range d.zones {
		if dns.IsSubDomain(z, dns.CanonicalName(name)) && len(z) > len(best) {
			best = z
		}
	}
	return best
}

// ServeDNS answers a query, or makes an update that is signed.
func (d *DNS) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := new(dns.Msg).SetReply(r)
	m.Authoritative = true
	switch {
	case len(r.Question) != 1:
		m.Rcode = dns.RcodeFormatError
	case r.Question[0].Qtype == dns.TypeAXFR:
		if r.IsTsig() == nil || w.TsigStatus() != nil {
			m.Rcode = dns.RcodeNotAuth
			break
		}
		d.transfer(m)
		m.SetTsig(KeyName, KeyAlg, 300, int64(r.IsTsig().TimeSigned))
	case r.Opcode == dns.OpcodeUpdate:
		if r.IsTsig() == nil || w.TsigStatus() != nil {
			m.Rcode = dns.RcodeNotAuth
			break
		}
		for _, rr := range r.Ns {
			d.update(rr)
		}
		m.SetTsig(KeyName, KeyAlg, 300, int64(r.IsTsig().TimeSigned))
	default:
		d.answer(m, r.Question[0])
	}
	w.WriteMsg(m)
}

func (d *DNS) update(rr dns.RR) {
	if rr.Header().Class == dns.ClassINET {
		d.records = append(d.records, rr)
		return
	}
	was := dns.Copy(rr)
	was.Header().Class = dns.ClassINET
	for i, have := range d.records {
		if dns.IsDuplicate(have, was) {
			d.removed = append(d.removed, have)
			d.records = append(d.records[:i:i], d.records[i+1:]...)
			return
		}
	}
}

func soaOf(zone string) *dns.SOA {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 1},
		Ns:  "ns." + zone, Mbox: "hostmaster." + zone, Serial: 1, Refresh: 1, Retry: 1, Expire: 1, Minttl: 1,
	}
}

// transfer answers with a whole zone (RFC 5936).
func (d *DNS) transfer(m *dns.Msg) {
	zone := dns.CanonicalName(m.Question[0].Name)
	if !slices.Contains(d.zones, zone) {
		m.Rcode = dns.RcodeNotAuth
		return
	}
	m.Answer = append(m.Answer, soaOf(zone))
	for _, rr := range d.records {
		if d.zone(rr.Header().Name) == zone {
			m.Answer = append(m.Answer, rr)
		}
	}
	m.Answer = append(m.Answer, soaOf(zone))
}

func (d *DNS) answer(m *dns.Msg, q dns.Question) {
	zone := d.zone(q.Name)
	if zone == "" {
		m.Rcode = dns.RcodeRefused
		return
	}
	soa := soaOf(zone)
	if q.Qtype == dns.TypeSOA && strings.EqualFold(q.Name, zone) {
		m.Answer = []dns.RR{soa}
		return
	}
	for name := q.Name; ; {
		if found := d.find(name, q.Qtype); len(found) > 0 {
			m.Answer = append(m.Answer, found...)
			return
		}
		alias := d.find(name, dns.TypeCNAME)
		if len(alias) == 0 || len(m.Answer) > 8 {
			break
		}
		m.Answer = append(m.Answer, alias[0])
		name = alias[0].(*dns.CNAME).Target
	}
	if len(m.Answer) == 0 {
		m.Ns = []dns.RR{soa}
		m.Rcode = dns.RcodeNameError
	}
}

// CA is a Pebble.
type CA struct {
	Directory string
	APIRoots  *x509.CertPool // of its API
	Roots     *x509.CertPool // of what it signs

	// Check, when set before the first order, is asked before anything is signed, as a CA
	// asks CAA, which Pebble does not.
	Check func(account string, csr *x509.CertificateRequest) error

	mu     sync.Mutex
	fail   int
	orders int
	manage http.Handler
}

// Identity is what CAA calls the CA.
const Identity = "pebble.test"

// NewCA starts a Pebble that asks the DNS server, and looks for HTTP-01 and TLS-ALPN-01 at
// the given ports of loopback. Pebble has no end to its goroutines; leak checks ignore them.
// Accounts must be bound to one of eab, pairs of a key id and a MAC key, if there are any.
func NewCA(t *testing.T, d *DNS, httpPort, tlsPort int, eab ...[2]string) *CA {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	t.Setenv("PEBBLE_WFE_NONCEREJECT", "0")
	quiet := log.New(io.Discard, "", 0)
	store := db.NewMemoryStore()
	for _, e := range eab {
		if err := store.AddExternalAccountKeyByID(e[0], e[1]); err != nil {
			t.Fatal(err)
		}
	}
	authority := ca.New(quiet, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "default"}})
	front := wfe.New(quiet, store, va.New(quiet, httpPort, tlsPort, false, d.Addr, store), authority, []string{Identity}, false, len(eab) > 0, 1, 1)
	c := &CA{Roots: x509.NewCertPool()}
	h := front.Handler()
	c.manage = front.ManagementHandler()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		fail := c.fail
		if r.URL.Path == "/order-plz" {
			c.orders++
		}
		c.mu.Unlock()
		if fail != 0 {
			http.Error(w, "no", fail)
			return
		}
		if c.Check != nil && strings.HasPrefix(r.URL.Path, "/finalize-order/") {
			account, csr := finalize(t, r)
			if err := c.Check(account, csr); err != nil {
				w.Header().Set("Content-Type", "application/problem+json")
				w.WriteHeader(http.StatusForbidden)
				json.NewEncoder(w).Encode(map[string]any{"type": "urn:ietf:params:acme:error:caa", "detail": err.Error(), "status": http.StatusForbidden})
				return
			}
		}
		if strings.Contains(r.URL.Path, "renewalInfo") {
			// Pebble has itself asked again in six hours.
			w = sooner{w}
		}
		h.ServeHTTP(w, r)
	}))
	s.Config.ErrorLog = quiet
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	s.StartTLS()
	t.Cleanup(s.Close)
	c.Directory = s.URL + wfe.DirectoryPath
	c.APIRoots = x509.NewCertPool()
	c.APIRoots.AddCert(s.Certificate())
	c.Roots.AppendCertsFromPEM(authority.GetRootCert(0).PEM())
	return c
}

// Fail lets the CA answer everything with a status; 0 ends it.
func (c *CA) Fail(status int) {
	c.mu.Lock()
	c.fail = status
	c.mu.Unlock()
}

// Orders returns how many orders were asked for.
func (c *CA) Orders() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.orders
}

// sooner has the CA asked again in a second.
type sooner struct{ http.ResponseWriter }

func (s sooner) Write(b []byte) (int, error) {
	s.Header().Set("Retry-After", "1")
	return s.ResponseWriter.Write(b)
}

func (s sooner) WriteHeader(code int) {
	s.Header().Set("Retry-After", "1")
	s.ResponseWriter.WriteHeader(code)
}

// SetRenewal says when a certificate (PEM) is to be renewed (RFC 9773).
func (c *CA) SetRenewal(t testing.TB, certificate string, start, end time.Time) {
	t.Helper()
	window := `{"suggestedWindow":{"start":"` + start.UTC().Format(time.RFC3339) + `","end":"` + end.UTC().Format(time.RFC3339) + `"}}`
	body, err := json.Marshal(map[string]string{"Certificate": certificate, "ARIResponse": window})
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/set-renewal-info/", bytes.NewReader(body))
	r.Header.Set("User-Agent", "acmetest")
	w := httptest.NewRecorder()
	c.manage.ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		t.Fatalf("Pebble does not take the window: %d %s", w.Code, w.Body)
	}
}

// finalize reads who asks for what, and leaves the request as it was.
func finalize(t testing.TB, r *http.Request) (account string, csr *x509.CertificateRequest) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Error(err)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	var jws struct{ Protected, Payload string }
	var head struct{ Kid string }
	var order struct{ CSR string }
	parts := func(text string, into any) {
		data, err := base64.RawURLEncoding.DecodeString(text)
		if err == nil {
			err = json.Unmarshal(data, into)
		}
		if err != nil {
			t.Error(err)
		}
	}
	if err := json.Unmarshal(body, &jws); err != nil {
		t.Error(err)
	}
	parts(jws.Protected, &head)
	parts(jws.Payload, &order)
	der, err := base64.RawURLEncoding.DecodeString(order.CSR)
	if err == nil {
		csr, err = x509.ParseCertificateRequest(der)
	}
	if err != nil {
		t.Error(err)
		return head.Kid, &x509.CertificateRequest{}
	}
	return head.Kid, csr
}
