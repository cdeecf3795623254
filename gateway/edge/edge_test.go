// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
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

func TestMain(m *testing.M) {
	if order := os.Getenv(asStrangers); order != "" {
		if err := strangers(order); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const base = "app.example.com"

// certificate is one for *.app.example.com and what else is asked.
var certificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"*." + base, "shop.example.org"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
})

func roots() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(certificate().Leaf)
	return p
}

// rig is an edge on loopback before a network that a table stands for: an address in the
// tunnel is a listener on loopback.
type rig struct {
	t     testing.TB
	edge  *Edge
	addr  string
	table *route.Table

	mu    sync.Mutex
	where map[netip.AddrPort]string
	dials []netip.AddrPort
}

func newRig(t testing.TB, change func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, where: map[netip.AddrPort]string{}}
	r.table = route.New(route.Config{})
	cert := certificate()
	cfg := Config{
		Rules:          func() hostname.Rules { return hostname.Rules{Bases: []hostname.Name{base}} },
		Routes:         r.table,
		Dial:           r.dial,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil },
		Limits:         Limits{Rate: -1},
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if r.edge, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ls, err := Listen(t.Context(), "127.0.0.1:0", 2)
	if err != nil {
		t.Fatal(err)
	}
	r.addr = ls[0].Addr().String()
	var wg sync.WaitGroup
	for _, l := range ls {
		wg.Go(func() {
			if err := r.edge.Serve(context.Background(), l); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		r.edge.Shutdown(ctx)
		wg.Wait()
		if n := r.edge.Stats().Open; n != 0 {
			t.Errorf("%d connections are open after the end", n)
		}
	})
	return r
}

func (r *rig) dial(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
	r.mu.Lock()
	r.dials = append(r.dials, a)
	to, ok := r.where[a]
	r.mu.Unlock()
	switch {
	case !ok:
		return nil, errors.New("connection refused")
	case to == "":
		<-ctx.Done()
		return nil, ctx.Err()
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", to)
}

func (r *rig) dialled() []netip.AddrPort {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.dials)
}

func address(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}) }

func appID(a int) dstack.AppID { return dstack.AppID{0xa, byte(a >> 8), byte(a)} }

// instance registers instance n of app a.
func (r *rig) instance(a, n int, ports ...manifest.Port) dstack.InstanceID {
	r.t.Helper()
	p := portpolicy.Open()
	if ports != nil {
		var err error
		if p, err = portpolicy.New(manifest.PortPolicy{RestrictMode: true, Ports: ports}); err != nil {
			r.t.Fatal(err)
		}
	}
	sk, err := wgconfig.NewPrivateKey(append(make([]byte, wgconfig.KeySize-4), 1, byte(n>>8), byte(n), 0x40))
	if err != nil {
		r.t.Fatal(err)
	}
	now := time.Now()
	rec := route.Record{
		App: appID(a), Instance: dstack.InstanceID{0xb, byte(n >> 8), byte(n)}, Compose: dstack.ComposeHash{1}, Key: sk.Public(),
		Address: address(n), Policy: &p, Attested: now, Until: now.Add(10 * time.Minute),
	}
	if _, err := r.table.Register(rec); err != nil {
		r.t.Fatal(err)
	}
	r.table.Observe([]wgconfig.Status{{Key: rec.Key, Handshake: now}})
	return rec.Instance
}

// serve answers at a port of instance n.
func (r *rig) serve(n int, port uint16, handle func(net.Conn)) {
	r.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.t.Cleanup(func() { c.Close() })
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	})
	r.t.Cleanup(func() { l.Close() })
	r.mu.Lock()
	defer r.mu.Unlock()
	r.where[netip.AddrPortFrom(address(n), port)] = l.Addr().String()
}

func echo(c net.Conn) {
	io.Copy(c, c)
	c.(closeWriter).CloseWrite()
}

// tlsEcho ends TLS as an app does.
func tlsEcho(c net.Conn) {
	t := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{certificate()}, NextProtos: []string{"h2", "http/1.1"}})
	if _, err := io.Copy(t, t); err == nil {
		t.CloseWrite()
	}
}

func host(id fmt.Stringer, rest string) string { return id.String() + rest + "." + base }

func (r *rig) tcp() *net.TCPConn {
	r.t.Helper()
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

func (r *rig) tls(name string, alpn ...string) (*tls.Conn, error) {
	return r.handshake(r.tcp(), &tls.Config{ServerName: name, RootCAs: roots(), NextProtos: alpn})
}

func (r *rig) handshake(c net.Conn, cfg *tls.Config) (*tls.Conn, error) {
	t := tls.Client(c, cfg)
	return t, t.Handshake()
}

// echoes sends data, an end, and wants the same back and an end.
func echoes(t testing.TB, c interface {
	io.ReadWriter
	closeWriter
}, size int) {
	t.Helper()
	data := make([]byte, size)
	rand.Read(data)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Write(data); err != nil {
			t.Error(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	got, err := io.ReadAll(c)
	wg.Wait()
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back (%v), want the %d that were sent", len(got), err, size)
	}
}

func (r *rig) wantRefused(code string, n uint64) {
	r.t.Helper()
	r.eventually(func() bool { return r.edge.Stats().Refused[code] == n }, func() string {
		return fmt.Sprintf("refusals %v, want %d %s", r.edge.Stats().Refused, n, code)
	})
}

func (r *rig) eventually(ok func() bool, say func() string) {
	r.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatal(say())
		}
	}
}

func wantAlert(t testing.TB, err error, alert uint8) {
	t.Helper()
	var got tls.AlertError
	var op *net.OpError
	if errors.As(err, &got) && uint8(got) == alert || errors.As(err, &op) && op.Op == "remote error" && op.Err.Error() == tls.AlertError(alert).Error() {
		return
	}
	t.Errorf("error %v, want alert %d", err, alert)
}

func TestEveryFormOfAHostName(t *testing.T) {
	r := newRig(t, nil)
	id := r.instance(1, 1)
	for _, port := range []uint16{80, 8080, 50051} {
		r.serve(1, port, echo)
	}
	for _, port := range []uint16{443, 8443} {
		r.serve(1, port, tlsEcho)
	}
	for _, c := range []struct {
		name string
		port uint16
		alpn string
	}{
		{host(appID(1), ""), 80, ""},
		{host(id, ""), 80, ""},
		{strings.ToUpper(host(id, "-8080")), 8080, ""},
		{host(appID(1), "-s"), 443, "h2"},
		{host(appID(1), "-8443s"), 8443, "h2"},
		{host(id, "-g"), 80, "h2"},
		{host(id, "-50051g"), 50051, "h2"},
	} {
		conn, err := r.tls(c.name, "h2", "http/1.1")
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		st := conn.ConnectionState()
		if st.NegotiatedProtocol != c.alpn {
			t.Errorf("%s: ALPN %q, want %q", c.name, st.NegotiatedProtocol, c.alpn)
		}
		if st.CurveID != tls.X25519MLKEM768 {
			t.Errorf("%s: key exchange %s is not post-quantum", c.name, st.CurveID)
		}
		echoes(t, conn, 1000)
		if d := r.dialled(); d[len(d)-1] != netip.AddrPortFrom(address(1), c.port) {
			t.Errorf("%s: went to %s, want port %d", c.name, d[len(d)-1], c.port)
		}
	}
	if s := r.edge.Stats(); s.Joined != [3]uint64{3, 2, 2} || len(s.Refused) != 0 || s.Dial.Count != 7 {
		t.Errorf("stats %+v", s)
	}
}

func TestRefusals(t *testing.T) {
	var narrowed dstack.InstanceID
	r := newRig(t, func(c *Config) {
		c.Operator = func(id dstack.InstanceID) *portpolicy.Policy {
			if id != narrowed {
				return nil
			}
			p, _ := portpolicy.New(manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 80}}})
			return &p
		}
		c.Timeouts.Connect = 200 * time.Millisecond
	})
	narrowed = r.instance(1, 1, manifest.Port{Port: 80}, manifest.Port{Port: 81})
	r.instance(3, 3, manifest.Port{Port: 80})
	for _, c := range []struct {
		why, name, code string
		alert           uint8
	}{
		{"a port that the app does not list", host(appID(3), "-82s"), "port_denied", 80},
		{"a port that the operator closed", host(appID(1), "-81s"), "port_denied_operator", 80},
		{"an instance that cannot be reached", host(appID(1), "-80s"), "edge_dial", 80},
		{"an unknown app", host(appID(2), ""), "route_unknown", 112},
		{"an id that is none", "shop." + base, "edge_unknown_id", 112},
		{"two hyphens", "a-b-c." + base, "host_label", 112},
		{"port 0", host(appID(1), "-0"), "host_port", 112},
		{"the gateway's loopback", "localhost." + base, "host_loopback", 112},
		{"the gateway at a port", "gateway-8080." + base, "host_reserved", 112},
		{"a custom domain without a resolver", "shop.example.org", "edge_no_txt", 112},
		{"one label", "shop", "host_single_label", 112},
		{"the gateway's pages where there are none", "gateway." + base, "edge_no_pages", 80},
	} {
		before := r.edge.Stats().Refused[c.code]
		_, err := r.tls(c.name)
		t.Run(c.why, func(t *testing.T) { wantAlert(t, err, c.alert) })
		r.wantRefused(c.code, before+1)
	}
	_, err := r.handshake(r.tcp(), &tls.Config{ServerName: "127.0.0.1", RootCAs: roots()})
	wantAlert(t, err, 112)
	r.wantRefused("edge_no_name", 1)
}

func TestPlainHTTPOnTheTLSPort(t *testing.T) {
	r := newRig(t, nil)
	for _, c := range []struct{ request, want, location string }{
		{"GET /a?b=c HTTP/1.1\r\nHost: " + host(appID(1), "") + "\r\n\r\n", "308", "https://" + host(appID(1), "") + "/a?b=c"},
		{"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "400", ""},
		{"GET / HTTP/1.1\r\nHo", "400", ""},
	} {
		conn := r.tcp()
		io.WriteString(conn, c.request)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || !strings.HasPrefix(res.Status, c.want) || res.Header.Get("Location") != c.location {
			t.Errorf("%q: %v %+v", c.request, err, res)
		}
	}
	r.wantRefused("hello_http", 3)
}

func TestHalfClosesOfEverySizeLoseNothing(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	r.serve(1, 80, echo)
	r.serve(1, 443, tlsEcho)
	var wg sync.WaitGroup
	for _, form := range []string{"", "-s", "-g"} {
		for _, size := range []int{0, 1, 1 << 10, 16<<10 - 1, 100_000, 1 << 20, 5 << 20} {
			wg.Go(func() {
				conn, err := r.tls(host(appID(1), form))
				if err != nil {
					t.Error(err)
					return
				}
				echoes(t, conn, size)
				conn.Close()
			})
		}
	}
	wg.Wait()
	r.eventually(func() bool { return r.edge.Stats().Open == 0 }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
}

func TestTheAppEndsFirst(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	data := make([]byte, 3<<20)
	rand.Read(data)
	rest := make(chan []byte, 1)
	r.serve(1, 80, func(c net.Conn) {
		c.Write(data)
		c.(closeWriter).CloseWrite()
		b, _ := io.ReadAll(c)
		rest <- b
	})
	conn, err := r.tls(host(appID(1), ""))
	if err != nil {
		t.Fatal(err)
	}
	// crypto/tls returns EOF without an error only for close_notify or an end between records.
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes and %v", len(got), err)
	}
	if _, err := conn.Write([]byte("afterwards")); err != nil {
		t.Fatal(err)
	}
	conn.CloseWrite()
	if got := <-rest; string(got) != "afterwards" {
		t.Errorf("the app got %q after its own end", got)
	}
}

func TestThreat_K09_AFailureOfTheAppIsNoEnd(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	r.serve(1, 80, func(c net.Conn) {
		io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nhalf of")
		time.Sleep(50 * time.Millisecond)
		c.(*net.TCPConn).SetLinger(0)
	})
	conn, err := r.tls(host(appID(1), ""))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err == nil {
		t.Errorf("%q came as if it were the whole", got)
	}
}

func TestThreat_K09_BytesAreOpaque(t *testing.T) {
	// Two lengths, a bare LF and what a front end might take for a second request: whatever
	// it means, the app gets it as it was sent, and one connection is one connection.
	const smuggle = "POST / HTTP/1.1\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /.well-known/dstack/attest HTTP/1.1\r\nHost: gateway.app.example.com\r\n\r\n\x00\xff"
	r := newRig(t, func(c *Config) {
		c.Pages = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("an app's bytes reached the gateway's pages") })
	})
	r.instance(1, 1)
	r.serve(1, 80, echo)
	for _, form := range []string{"", "-g"} {
		conn, err := r.tls(host(appID(1), form))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, smuggle)
		conn.CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != smuggle {
			t.Errorf("%q %v", got, err)
		}
	}
	if n := len(r.dialled()); n != 2 {
		t.Errorf("%d dials for two connections", n)
	}
}

func TestThreat_K04_TheNameChoosesNeitherPROXYNorTLS(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1, manifest.Port{Port: 80}, manifest.Port{Port: 81, PP: true}, manifest.Port{Port: 443, TLS: manifest.TLSApp}, manifest.Port{Port: 444, TLS: manifest.TLSGateway})
	type arrival struct {
		head proxyproto.Header
		err  error
	}
	arrivals := make(chan arrival, 1)
	withHeader := func(next func(net.Conn)) func(net.Conn) {
		return func(c net.Conn) {
			h, err := proxyproto.Read(c)
			arrivals <- arrival{h, err}
			next(c)
		}
	}
	r.serve(1, 80, echo)
	r.serve(1, 81, withHeader(echo))
	r.serve(1, 443, tlsEcho)
	r.serve(1, 444, echo)
	r.serve(1, manifest.TLSPort, withHeader(tlsEcho))
	for _, c := range []struct {
		form  string
		port  uint16
		proxy bool
		alpn  string // h2 where the app ended TLS, or the form is g
	}{
		{"", 80, false, ""},
		{"-81", 81, true, ""},
		{"-443s", 443, false, "h2"},
		{"-443", manifest.TLSPort, true, "h2"},
		{"-443g", manifest.TLSPort, true, "h2"},
		{"-444s", 444, false, ""},
	} {
		conn, err := r.tls(host(appID(1), c.form), "h2")
		if err != nil {
			t.Errorf("%s: %v", c.form, err)
			continue
		}
		if c.proxy {
			a := <-arrivals
			if a.err != nil || a.head.Version != 2 || a.head.Source.String() != conn.LocalAddr().String() || a.head.Destination.String() != r.addr {
				t.Errorf("%s: PROXY header %+v", c.form, a)
			}
		}
		if got := conn.ConnectionState().NegotiatedProtocol; got != c.alpn {
			t.Errorf("%s: ALPN %q, want %q", c.form, got, c.alpn)
		}
		echoes(t, conn, 100)
		if d := r.dialled(); d[len(d)-1].Port() != c.port {
			t.Errorf("%s: went to %s", c.form, d[len(d)-1])
		}
	}
	// An upstream form that the client would choose itself has no meaning.
	_, err := r.tls(host(appID(1), "-80p"))
	wantAlert(t, err, 112)
	r.wantRefused("host_port", 1)
}

func TestThreat_K04_PROXYOfAStrangerIsNotBelieved(t *testing.T) {
	r := newRig(t, nil)
	conn := r.tcp()
	io.WriteString(conn, "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
	if b, err := io.ReadAll(conn); len(b) != 0 {
		t.Errorf("%q %v", b, err)
	}
	r.wantRefused("hello_not_tls", 1)
}

func TestPROXYOfABalancer(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Balancers = proxyproto.Sources{netip.MustParsePrefix("127.0.0.0/8")} })
	r.instance(1, 1, manifest.Port{Port: 80, PP: true})
	heads := make(chan proxyproto.Header, 1)
	r.serve(1, 80, func(c net.Conn) {
		h, err := proxyproto.Read(c)
		if err != nil {
			t.Error(err)
		}
		heads <- h
		echo(c)
	})
	for version := 1; version <= 2; version++ {
		in := proxyproto.Header{Version: version, Source: netip.MustParseAddrPort("[2001:db8::1]:7"), Destination: netip.MustParseAddrPort("[2001:db8::2]:443")}
		b, _ := in.Bytes()
		conn := r.tcp()
		conn.Write(b)
		s, err := r.handshake(conn, &tls.Config{ServerName: host(appID(1), ""), RootCAs: roots()})
		if err != nil {
			t.Fatal(err)
		}
		if got := <-heads; got.Source != in.Source || got.Destination != in.Destination || got.Version != 2 {
			t.Errorf("the app was told %+v", got)
		}
		echoes(t, s, 10)
	}
	if _, err := r.tls(host(appID(1), "")); err == nil {
		t.Error("a balancer without a header was served")
	}
	r.wantRefused("proxy_missing", 1)
}

// pieces writes in pieces of n bytes.
type pieces struct {
	net.Conn
	n int
}

func (p pieces) Write(b []byte) (int, error) {
	for i := 0; i < len(b); i += p.n {
		if _, err := p.Conn.Write(b[i:min(i+p.n, len(b))]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

func TestAHelloInPieces(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	r.serve(1, 443, tlsEcho)
	r.serve(1, 80, echo)
	for _, form := range []string{"", "-s"} {
		conn, err := r.handshake(pieces{r.tcp(), 7}, &tls.Config{ServerName: host(appID(1), form), RootCAs: roots()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
}

func TestHTTP2AndWebSocketPass(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	protocols.SetHTTP1(true)
	srv := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Upgrade") == "websocket" {
			c, buf, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			io.Copy(c, buf)
			return
		}
		// As gRPC does: a stream in both directions, and a trailer.
		w.Header().Set("Trailer", "Grpc-Status")
		http.NewResponseController(w).EnableFullDuplex()
		io.Copy(w, req.Body)
		w.Header().Set("Grpc-Status", "0")
	})}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(l) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	r.where[netip.AddrPortFrom(address(1), 80)] = l.Addr().String()

	tr := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots()}, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", r.addr)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	for _, c := range []struct {
		form  string
		major int
	}{{"-g", 2}, {"", 1}} {
		res, err := tr.RoundTrip(must(http.NewRequest("POST", "https://"+host(appID(1), c.form)+"/", strings.NewReader(strings.Repeat("z", 200_000)))))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || len(b) != 200_000 || res.ProtoMajor != c.major || res.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("%s: %v, %d bytes, HTTP/%d, trailer %v", c.form, err, len(b), res.ProtoMajor, res.Trailer)
		}
	}
	conn, err := r.tls(host(appID(1), ""))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	br := bufio.NewReader(conn)
	if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != 101 {
		t.Fatal(err, res)
	}
	io.WriteString(conn, "frame")
	if _, err := io.ReadFull(br, make([]byte, 5)); err != nil {
		t.Error(err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestTheGatewaysPages(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Pages = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Host) })
	})
	for _, name := range []string{"gateway." + base, "health." + base} {
		conn, err := r.tls(name)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+name+"\r\nConnection: close\r\n\r\n")
		if b, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(b), name) {
			t.Errorf("%q %v", b, err)
		}
	}
}

func TestSessionsResumeAtAnotherGateway(t *testing.T) {
	keys := [][32]byte{{1}}
	change := func(c *Config) { c.TicketKeys = func() [][32]byte { return keys } }
	cache := tls.NewLRUClientSessionCache(1)
	for i := range 2 {
		r := newRig(t, change)
		r.instance(1, 1)
		r.serve(1, 80, echo)
		conn, err := r.handshake(r.tcp(), &tls.Config{ServerName: host(appID(1), ""), RootCAs: roots(), ClientSessionCache: cache})
		if err != nil {
			t.Fatal(err)
		}
		echoes(t, conn, 10)
		if got := conn.ConnectionState().DidResume; got != (i == 1) {
			t.Errorf("gateway %d: resumed %v", i, got)
		}
	}
}

func TestIdleConnectionsEnd(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Timeouts.Idle = 200 * time.Millisecond })
	r.instance(1, 1)
	r.serve(1, 80, echo)
	r.serve(1, 443, tlsEcho)
	r.serve(1, 81, func(c net.Conn) {
		b := make([]byte, 1<<16)
		for { // to a client that does not read
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	for _, form := range []string{"", "-s", "-81"} {
		conn, err := r.tls(host(appID(1), form))
		if err != nil {
			t.Fatal(err)
		}
		if form == "" {
			conn.CloseWrite() // idle after a half-close by the app too
		}
	}
	r.eventually(func() bool { return r.edge.Stats().Open == 0 }, func() string { return "idle connections are still open" })
	if n := r.edge.Stats().Reaped; n < 2 {
		t.Errorf("%d were reaped", n)
	}
}

// What is adjusted counts at once, and ends nobody's connection by itself.
func TestLimitsAreAdjustedWhileItRuns(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	r.serve(1, 80, echo)
	open := func() (*tls.Conn, error) { return r.tls(host(appID(1), "")) }
	ask := func(c *tls.Conn) error {
		if _, err := io.WriteString(c, "q"); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		return err
	}
	first := must(open())
	for code, l := range map[string]Limits{
		"edge_full":        {Connections: 1},
		"edge_source_full": {PerSource: 1},
		"edge_source_rate": {Rate: 1},
	} {
		r.edge.Adjust(Adjustable{Limits: l})
		for range 3 {
			if c, err := open(); err == nil {
				c.Close()
			}
		}
		r.eventually(func() bool { return r.edge.Stats().Refused[code] > 0 }, func() string { return code })
		if err := ask(first); err != nil {
			t.Errorf("%s: %v", code, err)
		}
	}
	r.edge.Adjust(Adjustable{Limits: Limits{Rate: -1}, Balancers: proxyproto.Sources{netip.MustParsePrefix("127.0.0.0/8")}})
	if _, err := open(); err == nil {
		t.Error("a balancer without a header")
	}
	r.edge.Adjust(Adjustable{Limits: Limits{Rate: -1}})
	c, err := open()
	if err != nil || ask(c) != nil || ask(first) != nil {
		t.Error(err)
	}
	r.edge.Adjust(Adjustable{Limits: Limits{Rate: -1}, Timeouts: Timeouts{Idle: 50 * time.Millisecond}})
	begun := time.Now()
	if _, err := first.Read(make([]byte, 1)); err == nil || time.Since(begun) > 5*time.Second {
		t.Errorf("idle for %s: %v", time.Since(begun), err)
	}
}

func TestARouteThatEndsTakesItsConnectionsWithIt(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	r.serve(1, 443, tlsEcho)
	conn, err := r.tls(host(appID(1), "-s"))
	if err != nil {
		t.Fatal(err)
	}
	r.table.RemoveApp(appID(1))
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("the connection of a revoked app ended in peace")
	}
	if n := r.edge.Stats().Reaped; n != 1 {
		t.Errorf("%d reaped", n)
	}
	_, err = r.tls(host(appID(1), "-s"))
	wantAlert(t, err, 112)
}

func TestNoRequestFailsWhenAnInstanceDies(t *testing.T) {
	r := newRig(t, nil)
	for n := 1; n <= 2; n++ {
		r.instance(1, n)
		r.serve(n, 80, echo)
	}
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 40 {
				if w == 0 && i == 10 {
					r.mu.Lock()
					delete(r.where, netip.AddrPortFrom(address(1), 80)) // refuses
					r.mu.Unlock()
				}
				conn, err := r.tls(host(appID(1), ""))
				if err != nil {
					t.Error(err)
					return
				}
				echoes(t, conn, 100)
				conn.Close()
			}
		})
	}
	wg.Wait()
	s := r.edge.Stats()
	if len(s.Refused) != 0 || s.DialFailed == 0 {
		t.Errorf("%+v", s)
	}
}

func TestAnInstanceThatDoesNotAnswerIsOvertaken(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	r.instance(1, 2)
	r.where[netip.AddrPortFrom(address(1), 80)] = "" // swallows
	r.serve(2, 80, echo)
	for range 6 {
		conn, err := r.tls(host(appID(1), ""))
		if err != nil {
			t.Fatal(err)
		}
		echoes(t, conn, 10)
	}
	if route, _ := r.table.Instance(dstack.InstanceID{0xb, 0, 1}); route.Connections() != 0 {
		t.Errorf("%d connections are counted at the instance that took none", route.Connections())
	}
}

func TestShutdownLetsConnectionsFinish(t *testing.T) {
	r := newRig(t, nil)
	r.instance(1, 1)
	r.serve(1, 443, tlsEcho)
	conn, err := r.tls(host(appID(1), "-s"))
	if err != nil {
		t.Fatal(err)
	}
	r.edge.Drain()
	r.eventually(func() bool {
		c, err := net.Dial("tcp", r.addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	}, func() string { return "new connections are taken while draining" })
	done := make(chan error, 1)
	go func() { done <- r.edge.Shutdown(t.Context()) }()
	echoes(t, conn, 1<<20)
	conn.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Who is answered when the gateway is told to stop gets the answer whole, and is told that
// it is the last: Connection: close, or GOAWAY.
func TestShutdownLetsThePagesFinish(t *testing.T) {
	for form, major := range map[string]int{"": 1, "-g": 2} {
		asked, answer := make(chan struct{}), make(chan struct{})
		r := newRig(t, func(c *Config) {
			c.Pages = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/slow" {
					close(asked)
					<-answer
				}
				io.WriteString(w, "page")
			})
		})
		dials := 0
		tr := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots()}, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			dials++
			return new(net.Dialer).DialContext(ctx, "tcp", r.addr)
		}}
		t.Cleanup(tr.CloseIdleConnections)
		get := func(path string) (*http.Response, string, error) {
			res, err := tr.RoundTrip(must(http.NewRequest("GET", "https://gateway"+form+"."+base+path, nil)))
			if err != nil {
				return nil, "", err
			}
			defer res.Body.Close()
			b, err := io.ReadAll(res.Body)
			return res, string(b), err
		}
		if res, body, err := get("/"); err != nil || body != "page" || res.ProtoMajor != major || res.Close {
			t.Fatalf("%q: %q, %v", form, body, err)
		}
		done := make(chan error, 1)
		go func() {
			<-asked
			time.AfterFunc(50*time.Millisecond, func() { close(answer) })
			done <- r.edge.Shutdown(t.Context())
		}()
		res, body, err := get("/slow")
		if err != nil || body != "page" || major == 1 && !res.Close {
			t.Errorf("%q: %q, %v", form, body, err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if dials != 1 {
			t.Errorf("%q: %d connections", form, dials)
		}
		if _, _, err := get("/"); err == nil || dials != 2 {
			t.Errorf("%q: the client was not told that the connection had ended: %v", form, err)
		}
	}
}

// A client that keeps its connection alive is parted with between two requests, and one
// that waits for an answer is not.
func TestShutdownPartsInAPause(t *testing.T) {
	for _, form := range []string{"", "-s"} {
		r := newRig(t, nil)
		r.instance(1, 1)
		slow := func(c io.ReadWriter) {
			b := make([]byte, 1)
			for {
				if _, err := c.Read(b); err != nil {
					return
				}
				if b[0] == 's' {
					time.Sleep(900 * time.Millisecond)
				}
				c.Write(b)
			}
		}
		r.serve(1, 80, func(c net.Conn) { slow(c) })
		r.serve(1, 443, func(c net.Conn) {
			slow(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{certificate()}}))
		})
		open := func() *tls.Conn {
			conn, err := r.tls(host(appID(1), form))
			if err != nil {
				t.Fatal(err)
			}
			return conn
		}
		ask := func(c *tls.Conn, what string) error {
			if _, err := io.WriteString(c, what); err != nil {
				return err
			}
			_, err := io.ReadFull(c, make([]byte, 1))
			return err
		}
		busy, waits, rests := open(), open(), open()
		for _, c := range []*tls.Conn{busy, waits, rests} {
			if err := ask(c, "q"); err != nil {
				t.Fatal(err)
			}
		}
		const limit = time.Second
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		begun := time.Now()
		done := make(chan error, 1)
		go func() { done <- r.edge.Shutdown(ctx) }()
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := ask(waits, "s"); err != nil {
				t.Errorf("%q: who waits for an answer: %v", form, err)
			}
			waits.Close()
		})
		wg.Go(func() {
			_, err := rests.Read(make([]byte, 1))
			if took := time.Since(begun); err == nil || err == io.EOF || took < limit/2 || took > limit*9/10 {
				t.Errorf("%q: who rests: %v after %s", form, err, took)
			}
		})
		for {
			if err := ask(busy, "q"); err != nil {
				t.Errorf("%q: who asks again and again, after %s: %v", form, time.Since(begun), err)
				break
			}
			// The next is asked when this one has not ended in a pause of a tenth of the time.
			busy.SetReadDeadline(time.Now().Add(limit / 10))
			if _, err := busy.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			busy.SetReadDeadline(time.Now().Add(limit))
		}
		wg.Wait()
		if err := <-done; err != nil {
			t.Errorf("%q: %v", form, err)
		}
	}
}

// zone is a TXT that counts.
type zone struct {
	mu      sync.Mutex
	asked   map[hostname.Name]int
	records map[hostname.Name]string
}

func (z *zone) TXT(_ context.Context, n hostname.Name) (string, time.Duration, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.asked == nil {
		z.asked = map[hostname.Name]int{}
	}
	z.asked[n]++
	return z.records[n], time.Minute, nil
}

func TestCustomDomains(t *testing.T) {
	z := &zone{records: map[hostname.Name]string{
		"_dstack-app-address.shop.example.org":       appID(1).String() + ":443",
		"_dstack-app-address.closed.example.org":     appID(1).String() + ":444",
		"_dstack-app-address.bad.example.org":        "localhost:22",
		"_dstack-app-address-wildcard.w.example.org": appID(1).String() + ":443",
	}}
	r := newRig(t, func(c *Config) { c.TXT, c.TXTCompat = z, true })
	r.instance(1, 1, manifest.Port{Port: 443, TLS: manifest.TLSApp})
	r.serve(1, 443, tlsEcho)
	for range 3 {
		conn, err := r.tls("shop.example.org")
		if err != nil {
			t.Fatal(err)
		}
		echoes(t, conn, 10)
	}
	if n := z.asked["_dstack-app-address.shop.example.org"]; n != 1 {
		t.Errorf("asked %d times", n)
	}
	for name, alert := range map[string]uint8{"closed.example.org": 80, "bad.example.org": 112, "none.example.org": 112} {
		_, err := r.tls(name)
		wantAlert(t, err, alert)
	}
	r.wantRefused("port_denied", 1)
	r.wantRefused("host_txt", 1)
	r.wantRefused("edge_no_txt", 1)
}

func TestThreat_K08_RandomNamesDoNotFloodDNS(t *testing.T) {
	z := &zone{}
	r := newRig(t, func(c *Config) {
		c.TXT = z
		c.Limits.LookupsPerSource = 2
	})
	for i := range 20 {
		if _, err := r.tls(fmt.Sprintf("n%d.example.org", i)); err == nil {
			t.Fatal("a name that leads nowhere was served")
		}
	}
	s := r.edge.Stats()
	if s.Lookups > 10 || s.Refused["edge_dns_source_budget"] < 10 {
		t.Errorf("%+v", s)
	}
	few := &Adjustable{Limits: Limits{Lookups: 1}, Timeouts: Timeouts{DNS: time.Second}}
	e := &resolver{cfg: &Config{TXT: z}, adjusted: func() *Adjustable { return few }, stats: &counters{}, now: time.Now, cache: map[hostname.Name]found{}, ctx: t.Context()}
	var code string
	for i := range 4 {
		_, err := e.lookup(t.Context(), nil, hostname.Name(fmt.Sprintf("m%d.example.org", i)))
		code = fault.Code(err)
	}
	if code != "edge_dns_budget" {
		t.Errorf("code %q after more look-ups than the gateway makes", code)
	}
}

func TestRedirect(t *testing.T) {
	r := newRig(t, nil)
	h := r.edge.Redirect(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(299) }))
	for _, c := range []struct {
		url, location string
		status        int
	}{
		{"http://" + host(appID(1), "") + "/x?y", "https://" + host(appID(1), "") + "/x?y", 308},
		{"http://" + host(appID(1), "") + ":80/", "https://" + host(appID(1), "") + "/", 308},
		{"http://any.example/.well-known/acme-challenge/token", "", 299},
		{"http://evil.example/", "", 404},
		{"http://a-b-c." + base + "/", "", 404},
	} {
		w := newRecorder()
		h.ServeHTTP(w, must(http.NewRequest("GET", c.url, nil)))
		if w.status != c.status || w.header.Get("Location") != c.location {
			t.Errorf("%s: %d %s", c.url, w.status, w.header.Get("Location"))
		}
	}
}

type recorder struct {
	header http.Header
	status int
}

func newRecorder() *recorder                    { return &recorder{header: http.Header{}} }
func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) Write(b []byte) (int, error) { return len(b), nil }
func (r *recorder) WriteHeader(status int)      { r.status = status }
