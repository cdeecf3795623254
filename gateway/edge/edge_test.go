// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/proxyproto"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const base = "apps.example"

// lab is an edge, its routes, and what answers behind it.
type lab struct {
	t     *testing.T
	edge  *Edge
	table *route.Table
	addr  string
	roots *x509.CertPool

	mu       sync.Mutex
	backends map[netip.AddrPort]string // what an instance's port really is
	dials    []netip.AddrPort
}

func certificate(t *testing.T, names ...string) (tls.Certificate, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, cert
}

func newLab(t *testing.T, edit func(*Config)) *lab {
	t.Helper()
	l := &lab{t: t, backends: map[netip.AddrPort]string{}, roots: x509.NewCertPool()}
	l.table = route.New(route.Config{Key: wgconfig.GeneratePrivateKey().Public(), Address: netip.MustParseAddr("100.96.0.1"), Network: netip.MustParsePrefix("100.96.0.0/11")})
	own, cert := certificate(t, "*."+base, base)
	l.roots.AddCert(cert)
	cfg := Config{
		Rules:  func() hostname.Rules { return hostname.Rules{Bases: []hostname.Name{base}} },
		Routes: l.table,
		Dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			l.mu.Lock()
			at := l.backends[to]
			l.dials = append(l.dials, to)
			l.mu.Unlock()
			if at == "" {
				return nil, errors.New("connection refused")
			}
			return new(net.Dialer).DialContext(ctx, "tcp", at)
		},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &own, nil },
		Pages:          http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "page "+r.URL.Path) }),
	}
	if edit != nil {
		edit(&cfg)
	}
	var err error
	if l.edge, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.edge.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		end, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer stop()
		l.edge.Shutdown(end)
	})
	return l
}

// instance registers one.
func (l *lab) instance(app, n byte, ports ...manifest.Port) route.Record {
	l.t.Helper()
	p, err := portpolicy.New(manifest.PortPolicy{Ports: ports, RestrictMode: true})
	if err != nil {
		l.t.Fatal(err)
	}
	rec := route.Record{App: dstack.AppID{app}, Instance: dstack.InstanceID{app, n}, Compose: dstack.ComposeHash{app}, Key: wgconfig.GeneratePrivateKey().Public(),
		Address: netip.AddrFrom4([4]byte{100, 96, app, n}), Policy: &p, Attested: time.Now(), Until: time.Now().Add(30 * time.Minute)}
	if _, err := l.table.Register(rec); err != nil {
		l.t.Fatal(err)
	}
	l.table.Observe([]wgconfig.Status{{Key: rec.Key, Handshake: time.Now()}})
	return rec
}

// listen makes an instance's port.
func (l *lab) listen(at netip.AddrPort, serve func(net.Conn)) {
	l.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		l.t.Fatal(err)
	}
	l.mu.Lock()
	l.backends[at] = ln.Addr().String()
	l.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				stop := context.AfterFunc(l.t.Context(), func() { c.Close() })
				defer stop()
				serve(c)
			})
		}
	})
	l.t.Cleanup(func() { ln.Close(); wg.Wait() })
}

func (l *lab) dial() net.Conn {
	l.t.Helper()
	c, err := net.Dial("tcp", l.addr)
	if err != nil {
		l.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// tls connects for a name.
func (l *lab) tls(name string, protos ...string) (*tls.Conn, error) {
	c := tls.Client(l.dial(), &tls.Config{ServerName: name, RootCAs: l.roots, NextProtos: protos})
	if err := c.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func echo(c net.Conn) { io.Copy(c, c); c.(*net.TCPConn).CloseWrite() }

func host(rec route.Record, rest string) string { return rec.App.String() + rest + "." + base }

// say sends text, ends its half and returns what comes back.
func say(t *testing.T, c net.Conn, text string) string {
	t.Helper()
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// secure is an app that ends TLS itself.
func (l *lab) secure(at netip.AddrPort, names ...string) {
	cert, leaf := certificate(l.t, names...)
	l.roots.AddCert(leaf)
	l.listen(at, func(c net.Conn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})
		io.Copy(s, s)
		s.CloseWrite()
	})
}

func TestForms(t *testing.T) {
	l := newLab(t, nil)
	rec := l.instance(1, 1, manifest.Port{Port: 80}, manifest.Port{Port: 8080}, manifest.Port{Port: 443}, manifest.Port{Port: 50051})
	for _, port := range []uint16{80, 8080, 50051} {
		l.listen(netip.AddrPortFrom(rec.Address, port), echo)
	}
	l.secure(netip.AddrPortFrom(rec.Address, 443), host(rec, "-s"), rec.Instance.String()+"-443s."+base)
	for name, c := range map[string]struct {
		host  string
		alpn  []string
		proto string
	}{
		"port 80":           {host: host(rec, "")},
		"another port":      {host: host(rec, "-8080")},
		"upper case":        {host: strings.ToUpper(host(rec, "-8080"))},
		"an instance":       {host: rec.Instance.String() + "-8080." + base},
		"HTTP/2":            {host: host(rec, "-50051g"), alpn: []string{"h2"}, proto: "h2"},
		"ALPN is ignored":   {host: host(rec, "-8080"), alpn: []string{"h2", "http/1.1"}},
		"passed through":    {host: host(rec, "-s")},
		"an instance, thro": {host: rec.Instance.String() + "-443s." + base},
	} {
		conn, err := l.tls(c.host, c.alpn...)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := conn.ConnectionState().NegotiatedProtocol; got != c.proto {
			t.Errorf("%s: ALPN %q, want %q", name, got, c.proto)
		}
		if got := say(t, conn, "hello "+name); got != "hello "+name {
			t.Errorf("%s: %q", name, got)
		}
	}
	conn, err := l.tls("gateway." + base)
	if err != nil {
		t.Fatal(err)
	}
	if got := say(t, conn, "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); !strings.HasSuffix(got, "page /health") {
		t.Errorf("the gateway's page: %q", got)
	}
}

// refusals are told by an alert, and counted by code.
func TestRefusals(t *testing.T) {
	l := newLab(t, nil)
	rec := l.instance(1, 1, manifest.Port{Port: 80}, manifest.Port{Port: 81})
	for name, c := range map[string]struct {
		host, code string
		alert      uint8
	}{
		"an app nobody registered": {strings.Repeat("ab", 20) + "." + base, "route_unknown", 112},
		"no id":                    {"www." + base, "host_unknown", 112},
		"a port not listed":        {host(rec, "-82"), "port_denied", 80},
		"no such form":             {host(rec, "-80x"), "host_port", 112},
		"nobody listens":           {host(rec, "-81"), "edge_unreachable", 80},
		"another domain":           {"www.example.org", "host_unknown", 112},
		"no name":                  {"", "edge_no_name", 112},
	} {
		before := l.edge.Stats().Refused[c.code]
		conn := tls.Client(l.dial(), &tls.Config{ServerName: c.host, InsecureSkipVerify: true})
		err := conn.Handshake()
		conn.Close()
		if err == nil || !strings.HasSuffix(err.Error(), map[uint8]string{112: "unrecognized name", 80: "internal error"}[c.alert]) {
			t.Errorf("%s: %v, want alert %d", name, err, c.alert)
		}
		for deadline := time.Now().Add(5 * time.Second); l.edge.Stats().Refused[c.code] != before+1; {
			if time.Now().After(deadline) {
				t.Errorf("%s: not counted as %s: %v", name, c.code, l.edge.Stats().Refused)
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	plain := l.dial()
	if got := say(t, plain, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 400 ") || !strings.HasSuffix(got, "use https here.") {
		t.Errorf("plain HTTP: %q", got)
	}
}

// A port that the app keeps to itself is never ended here, whatever the name asks.
func TestThreat_K04_ThePolicyDecidesWhoEndsTLS(t *testing.T) {
	l := newLab(t, nil)
	rec := l.instance(1, 1, manifest.Port{Port: 8080, TLS: manifest.TLSApp}, manifest.Port{Port: 8081, TLS: manifest.TLSGateway}, manifest.Port{Port: 8082, PP: true})
	got := make(chan []byte, 4)
	l.listen(netip.AddrPortFrom(rec.Address, manifest.TLSPort), func(c net.Conn) {
		b := make([]byte, 4096)
		n, _ := io.ReadAtLeast(c, b, 40)
		got <- b[:n]
	})
	for _, port := range []uint16{8080, 8081, 8082} {
		l.listen(netip.AddrPortFrom(rec.Address, port), func(c net.Conn) {
			b := make([]byte, 4096)
			n, _ := c.Read(b)
			got <- b[:n]
		})
	}
	// Terminated by form: goes to the guest's agent, as TLS, behind a PROXY header.
	conn := tls.Client(l.dial(), &tls.Config{ServerName: host(rec, "-8080"), InsecureSkipVerify: true})
	if err := conn.Handshake(); err == nil {
		t.Error("the gateway ended TLS for a port that is the app's")
	}
	conn.Close()
	h, err := proxyproto.Read(bytes.NewReader(<-got))
	if err != nil || h.Source.Addr() != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("%+v, %v", h, err)
	}
	// Passed through by form: the port itself, without a header.
	conn = tls.Client(l.dial(), &tls.Config{ServerName: host(rec, "-8080s"), InsecureSkipVerify: true})
	conn.Handshake()
	conn.Close()
	if b := <-got; len(b) == 0 || b[0] != 22 {
		t.Errorf("the port itself got %x", b)
	}
	// Passed through by form, but the policy ends it at the gateway.
	end, err := l.tls(host(rec, "-8081s"))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(end, "plain")
	if b := <-got; string(b) != "plain" {
		t.Errorf("%q", b)
	}
	end.Close()
	// pp is the policy's, and no form of a name asks for it.
	end, err = l.tls(host(rec, "-8082"))
	if err != nil {
		t.Fatal(err)
	}
	defer end.Close()
	if h, err := proxyproto.Read(bytes.NewReader(<-got)); err != nil || h.Source.String() != end.LocalAddr().String() {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestBalancersAreBelievedAndOthersAreNot(t *testing.T) {
	for _, trusted := range []bool{true, false} {
		l := newLab(t, func(c *Config) {
			if trusted {
				c.Balancers = proxyproto.Sources{netip.MustParsePrefix("127.0.0.0/8")}
			}
		})
		rec := l.instance(1, 1, manifest.Port{Port: 80, PP: true})
		got := make(chan proxyproto.Header, 1)
		l.listen(netip.AddrPortFrom(rec.Address, 80), func(c net.Conn) {
			h, _ := proxyproto.Read(c)
			got <- h
		})
		c := l.dial()
		head, err := proxyproto.Header{Version: 1, Source: netip.MustParseAddrPort("192.0.2.7:1234"), Destination: netip.MustParseAddrPort("192.0.2.1:443")}.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		c.Write(head)
		s := tls.Client(c, &tls.Config{ServerName: host(rec, ""), RootCAs: l.roots})
		err = s.Handshake()
		if trusted {
			if err != nil {
				t.Fatal(err)
			}
			if h := <-got; h.Source != netip.MustParseAddrPort("192.0.2.7:1234") {
				t.Errorf("%+v", h)
			}
		} else if err == nil {
			t.Error("a stranger's PROXY header was taken")
		}
		s.Close()
	}
}

// Sizes and halves: nothing is cut off, in either mode and direction, also in the kernel.
func TestBytesArriveWhole(t *testing.T) {
	l := newLab(t, nil)
	rec := l.instance(1, 1, manifest.Port{Port: 80}, manifest.Port{Port: 443})
	l.listen(netip.AddrPortFrom(rec.Address, 80), echo)
	l.listen(netip.AddrPortFrom(rec.Address, 443), echo) // whatever passes through comes back
	var wg sync.WaitGroup
	for i, size := range []int{0, 1, 1 << 10, 100_000, 1 << 20, 16 << 20} {
		text := make([]byte, size)
		rand.Read(text)
		want := sha256.Sum256(text)
		wg.Go(func() {
			c, err := l.tls(host(rec, ""))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			go func() { c.Write(text); c.CloseWrite() }()
			h := sha256.New()
			if _, err := io.Copy(h, c); err != nil || !bytes.Equal(h.Sum(nil), want[:]) {
				t.Errorf("%d: terminated, %d bytes: %v", i, size, err)
			}
		})
		wg.Go(func() {
			c := l.dial().(*net.TCPConn)
			defer c.Close()
			hello := record(t, host(rec, "-s"))
			go func() { c.Write(append(bytes.Clone(hello), text...)); c.CloseWrite() }()
			h := sha256.New()
			back := make([]byte, len(hello))
			if _, err := io.ReadFull(c, back); err != nil || !bytes.Equal(back, hello) {
				t.Errorf("%d: the hello: %v", i, err)
				return
			}
			if _, err := io.Copy(h, c); err != nil || !bytes.Equal(h.Sum(nil), want[:]) {
				t.Errorf("%d: passed through, %d bytes: %v", i, size, err)
			}
		})
	}
	wg.Wait()
}

// record is the first flight of a client for a name.
func record(t *testing.T, name string) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go tls.Client(a, &tls.Config{ServerName: name}).Handshake()
	buf := make([]byte, 16<<10)
	n, err := b.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// An instance that does not answer costs its clients nothing but time, while another does.
func TestAnotherInstanceIsTried(t *testing.T) {
	l := newLab(t, nil)
	// Of two the one heard of last is tried first.
	alive := l.instance(1, 2, manifest.Port{Port: 80})
	dead := l.instance(1, 1, manifest.Port{Port: 80})
	l.listen(netip.AddrPortFrom(alive.Address, 80), echo)
	for range 20 {
		c, err := l.tls(host(dead, ""))
		if err != nil {
			t.Fatal(err)
		}
		if got := say(t, c, "x"); got != "x" {
			t.Fatalf("%q", got)
		}
	}
	l.mu.Lock()
	tried := 0
	for _, d := range l.dials {
		if d.Addr() == dead.Address {
			tried++
		}
	}
	l.mu.Unlock()
	if tried == 0 {
		t.Error("the dead instance was never tried: the test shows nothing")
	}
	for _, r := range []route.Record{dead, alive} {
		rt, _ := l.table.Instance(r.Instance)
		for deadline := time.Now().Add(5 * time.Second); rt.Connections() != 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d connections are counted still", rt.Connections())
			}
		}
	}
}

// Threat G05: a route that ends takes its connections with it, and gets no new ones.
func TestThreat_G05_ConnectionsEndWithTheirRoute(t *testing.T) {
	l := newLab(t, nil)
	rec := l.instance(1, 1, manifest.Port{Port: 80}, manifest.Port{Port: 443})
	l.listen(netip.AddrPortFrom(rec.Address, 80), echo)
	l.secure(netip.AddrPortFrom(rec.Address, 443), host(rec, "-s"))
	var open []*tls.Conn
	for _, form := range []string{"", "-s"} {
		c, err := l.tls(host(rec, form))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "x")
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	l.table.RemoveApp(rec.App)
	for _, c := range open {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		var timeout net.Error
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("a connection outlives its route: %d, %v", n, err)
		}
	}
	if c, err := l.tls(host(rec, "")); err == nil {
		c.Close()
		t.Error("a removed app is reached")
	}
}

func TestIdleConnectionsEnd(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Idle = 300 * time.Millisecond })
	rec := l.instance(1, 1, manifest.Port{Port: 80}, manifest.Port{Port: 81})
	l.listen(netip.AddrPortFrom(rec.Address, 80), echo)
	l.listen(netip.AddrPortFrom(rec.Address, 81), func(c net.Conn) { // reads nothing, so that it is full
		<-t.Context().Done()
	})
	c, err := l.tls(host(rec, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 8 { // in use, it lives longer than the limit
		time.Sleep(100 * time.Millisecond)
		io.WriteString(c, "x")
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("an idle connection gave data")
	}
	full, err := l.tls(host(rec, "-81"))
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for {
		if _, err := full.Write(make([]byte, 1<<20)); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Error("a connection to an app that reads nothing stays")
			}
			break
		}
	}
	deadline := time.Now().Add(5 * time.Second)
	for l.edge.Stats().Refused["edge_idle"] < 2 {
		if time.Now().After(deadline) {
			t.Fatalf("%v", l.edge.Stats().Refused)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Threat K08: hellos that do not come, sources that take too much, and what one of them
// does leave another's connections alone.
func TestThreat_K08_SourcesAreBounded(t *testing.T) {
	l := newLab(t, func(c *Config) {
		c.Handshake, c.PerSource, c.Rate = 300*time.Millisecond, 8, 1000
		c.Balancers = proxyproto.Sources{netip.MustParsePrefix("127.0.0.1/32")}
	})
	rec := l.instance(1, 1, manifest.Port{Port: 80})
	l.listen(netip.AddrPortFrom(rec.Address, 80), echo)
	from := func(ip string) net.Conn {
		c := l.dial()
		head, err := proxyproto.Header{Source: netip.MustParseAddrPort(ip + ":1"), Destination: netip.MustParseAddrPort("192.0.2.1:443")}.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		c.Write(head)
		return c
	}
	start := time.Now()
	var slow []net.Conn
	for range 40 {
		c := from("198.51.100.1")
		c.Write([]byte{22, 3, 1}) // and nothing more
		slow = append(slow, c)
	}
	good := tls.Client(from("198.51.100.2"), &tls.Config{ServerName: host(rec, ""), RootCAs: l.roots})
	if got := say(t, good, "x"); got != "x" {
		t.Errorf("%q", got)
	}
	for _, c := range slow {
		io.Copy(io.Discard, c)
		c.Close()
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("slow hellos were kept %s", took)
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		r := l.edge.Stats().Refused
		if r["edge_source_full"] == 32 && r["hello_read"] == 8 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v", r)
		}
		time.Sleep(5 * time.Millisecond)
	}
	s := newSources(10, 2)
	now := time.Now()
	for i := range 5 {
		_, err := s.enter(netip.MustParseAddr("2001:db8::"+fmt.Sprint(i+1)), now)
		if want := map[bool]string{true: "edge_source_rate"}[i == 4]; fault.Code(err) != want {
			t.Errorf("connection %d of one network: %v", i, err)
		}
	}
	if _, err := s.enter(netip.MustParseAddr("2001:db8:0:1::1"), now); err != nil {
		t.Error(err)
	}
	if _, err := s.enter(netip.MustParseAddr("2001:db8::1"), now.Add(time.Second)); err != nil {
		t.Error(err)
	}
}

func TestThreat_K08_ConnectionsAreBounded(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Connections = 2 })
	a, b := l.dial(), l.dial()
	defer a.Close()
	defer b.Close()
	deadline := time.Now().Add(5 * time.Second)
	for l.edge.Stats().Total < 2 {
		if time.Now().After(deadline) {
			t.Fatal("not taken")
		}
		time.Sleep(time.Millisecond)
	}
	c := l.dial()
	defer c.Close()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error("a connection more than the most was taken")
	}
	if l.edge.Stats().Refused["edge_full"] != 1 {
		t.Errorf("%v", l.edge.Stats().Refused)
	}
}

func TestDrainLetsConnectionsFinish(t *testing.T) {
	l := newLab(t, nil)
	rec := l.instance(1, 1, manifest.Port{Port: 80})
	l.listen(netip.AddrPortFrom(rec.Address, 80), echo)
	c, err := l.tls(host(rec, ""))
	if err != nil {
		t.Fatal(err)
	}
	l.edge.Drain()
	last := l.dial() // the one that was being accepted
	last.Close()
	if got := say(t, c, "still here"); got != "still here" {
		t.Errorf("%q", got)
	}
}

func TestCustomDomains(t *testing.T) {
	records := map[string][]string{}
	var mu sync.Mutex
	asked := map[string]int{}
	l := newLab(t, func(c *Config) {
		c.TXTCompat = true
		c.Lookup = func(_ context.Context, name string) ([]string, error) {
			mu.Lock()
			defer mu.Unlock()
			asked[name]++
			if r, ok := records[name]; ok {
				return r, nil
			}
			return nil, &net.DNSError{IsNotFound: true}
		}
	})
	rec := l.instance(1, 1, manifest.Port{Port: 443})
	l.secure(netip.AddrPortFrom(rec.Address, 443), "www.shop.example", "old.shop.example", "any.wild.example")
	records["_dstack-app-address.www.shop.example"] = []string{rec.App.String() + ":443"}
	records["_tapp-address.old.shop.example"] = []string{rec.App.String() + ":443"}
	records["_dstack-app-address-wildcard.wild.example"] = []string{rec.App.String() + ":443"}
	records["_dstack-app-address.bad.shop.example"] = []string{"gateway:80"}
	for _, name := range []string{"www.shop.example", "old.shop.example", "any.wild.example", "www.shop.example"} {
		c, err := l.tls(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := say(t, c, name); got != name {
			t.Errorf("%q", got)
		}
	}
	for name, code := range map[string]string{"none.shop.example": "host_unknown", "bad.shop.example": "host_txt"} {
		for range 3 {
			if c, err := l.tls(name); err == nil {
				c.Close()
				t.Errorf("%s leads somewhere", name)
			}
		}
		deadline := time.Now().Add(5 * time.Second)
		for l.edge.Stats().Refused[code] != 3 {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %v", name, l.edge.Stats().Refused)
			}
			time.Sleep(time.Millisecond)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	for name, n := range asked {
		if n != 1 {
			t.Errorf("%s was asked %d times", name, n)
		}
	}
}

func TestEvidenceOfWhatEndsHere(t *testing.T) {
	var seen []byte
	l := newLab(t, func(c *Config) {
		c.Evidence = func(w http.ResponseWriter, r *http.Request, at netip.Addr, spki []byte) {
			b, _ := io.ReadAll(r.Body)
			seen = spki
			fmt.Fprintf(w, "%s %s", at, b)
		}
	})
	rec := l.instance(1, 1, manifest.Port{Port: 80})
	l.listen(netip.AddrPortFrom(rec.Address, 80), echo)
	c, err := l.tls(host(rec, ""))
	if err != nil {
		t.Fatal(err)
	}
	leaf := c.ConnectionState().PeerCertificates[0]
	got := say(t, c, "POST /.well-known/dstack/attest HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
	if !strings.HasSuffix(got, rec.Address.String()+" {}") || !bytes.Equal(seen, leaf.RawSubjectPublicKeyInfo) {
		t.Errorf("%q", got)
	}
	for _, text := range []string{"P", "POST /.well-known/dstack/attestation HTTP/1.1\r\n\r\n", "GET /.well-known/dstack/attest HTTP/1.1\r\n\r\n", "\x00\x01"} {
		c, err := l.tls(host(rec, ""))
		if err != nil {
			t.Fatal(err)
		}
		if got := say(t, c, text); got != text {
			t.Errorf("%q became %q", text, got)
		}
	}
}

func TestRedirect(t *testing.T) {
	l := newLab(t, nil)
	h := l.edge.Redirect(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, "/.well-known/acme-challenge/") {
				io.WriteString(w, "token")
				return
			}
			next.ServeHTTP(w, r)
		})
	}, 8443)
	for _, c := range []struct {
		host, path string
		status     int
		to         string
	}{
		{strings.Repeat("ab", 20) + "." + base, "/a?b=c", 308, "https://" + strings.Repeat("ab", 20) + "." + base + ":8443/a?b=c"},
		{"gateway." + base + ":80", "/", 308, "https://gateway." + base + ":8443/"},
		{"elsewhere.example", "/", 421, ""},
		{"127.0.0.1", "/", 421, ""},
		{"elsewhere.example", "/.well-known/acme-challenge/x", 200, ""},
	} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "http://x"+c.path, nil)
		r.Host = c.host
		h.ServeHTTP(w, r)
		if w.Code != c.status || w.Header().Get("Location") != c.to {
			t.Errorf("%s%s: %d %s", c.host, c.path, w.Code, w.Header().Get("Location"))
		}
	}
}

func TestTheZeroConfigServesNothing(t *testing.T) {
	if _, err := New(Config{}); fault.Code(err) != "edge_config" {
		t.Error(err)
	}
}
