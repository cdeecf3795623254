// SPDX-License-Identifier: Apache-2.0

package terminator

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	lib "github.com/pires/go-proxyproto"
	"go.uber.org/goleak"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lab is a terminator, and the app behind it, which says on what port it was asked and
// sends back what it got.
type lab struct {
	t     *testing.T
	addr  string
	roots *x509.CertPool

	greets atomic.Bool // the app speaks first

	mu    sync.Mutex
	dials []string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"a.example", "b.example"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, roots: x509.NewCertPool()}
	l.roots.AddCert(leaf)
	cert := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.addr = ln.Addr().String()
	term := &Terminator{
		Certificate: func(host string, from netip.Addr) (*tls.Certificate, uint16, error) {
			if from != netip.MustParseAddr("127.0.0.1") {
				t.Errorf("the gateway is %s", from)
			}
			port, ok := map[string]uint16{"a.example": 8080, "b.example": 8081}[host]
			if !ok {
				return nil, 0, fault.New("gateway_name", "%s", host)
			}
			return cert, port, nil
		},
		PROXY: map[uint16]bool{8081: true},
		Evidence: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%t %s", r.TLS != nil, b)
		}),
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			l.mu.Lock()
			l.dials = append(l.dials, addr)
			l.mu.Unlock()
			return new(net.Dialer).DialContext(ctx, "tcp", app.Addr().String())
		},
	}
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := app.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer c.Close()
				if l.greets.Load() {
					io.WriteString(c, "220 ready")
				}
				io.Copy(c, c)
				c.(*net.TCPConn).CloseWrite()
			})
		}
	})
	work.Go(func() { term.Serve(ctx, ln) })
	t.Cleanup(func() { cancel(); app.Close(); work.Wait() })
	return l
}

func (l *lab) raw(head []byte) net.Conn {
	l.t.Helper()
	c, err := net.Dial("tcp", l.addr)
	if err != nil {
		l.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	c.Write(head)
	return c
}

func header(t *testing.T, version byte) []byte {
	t.Helper()
	b, err := lib.HeaderProxyFromAddrs(version, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 1234}, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 443}).Format()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (l *lab) dial(host string) (*tls.Conn, error) {
	c := tls.Client(l.raw(header(l.t, 2)), &tls.Config{ServerName: host, RootCAs: l.roots})
	if err := c.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func say(t *testing.T, c *tls.Conn, text string) string {
	t.Helper()
	defer c.Close()
	io.WriteString(c, text)
	c.CloseWrite()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestANameLeadsToItsPort(t *testing.T) {
	l := newLab(t)
	large := strings.Repeat("0123456789abcdef", 1<<16)
	for _, text := range []string{"x", "P", "POST /.well-known/dstack/attestation HTTP/1.1\r\n\r\n", "GET /.well-known/dstack/attest HTTP/1.1\r\n\r\n", large} {
		c, err := l.dial("a.example")
		if err != nil {
			t.Fatal(err)
		}
		if got := say(t, c, text); got != text {
			t.Errorf("%.40q became %.40q, %d bytes", text, got, len(got))
		}
	}
	c, err := l.dial("b.example")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := say(t, c, "x"), string(header(t, 2))+"x"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, d := range l.dials {
		want := ":8080"
		if i == len(l.dials)-1 {
			want = ":8081"
		}
		if !strings.HasSuffix(d, want) {
			t.Errorf("dialled %s", d)
		}
	}
}

func TestEvidenceOverTheVeryConnection(t *testing.T) {
	l := newLab(t)
	c, err := l.dial("a.example")
	if err != nil {
		t.Fatal(err)
	}
	if got := say(t, c, "POST /.well-known/dstack/attest HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"); !strings.HasSuffix(got, "true {}") {
		t.Errorf("%q", got)
	}
	if len(l.dials) != 0 {
		t.Errorf("the app was asked: %v", l.dials)
	}
}

func TestWhoIsRefusedReachesNothing(t *testing.T) {
	l := newLab(t)
	for name, head := range map[string][]byte{"no header": nil, "version 1": header(t, 1), "garbage": []byte("GET / HTTP/1.1\r\n\r\n")} {
		c := tls.Client(l.raw(head), &tls.Config{ServerName: "a.example", RootCAs: l.roots})
		if err := c.Handshake(); err == nil {
			t.Errorf("%s is taken", name)
		}
		c.Close()
	}
	for _, host := range []string{"c.example", ""} {
		if c, err := l.dial(host); err == nil {
			c.Close()
			t.Errorf("%q leads somewhere", host)
		}
	}
	if len(l.dials) != 0 {
		t.Errorf("the app was dialled: %v", l.dials)
	}
}

// Clients of apps that speak first wait for them, and some say nothing ever.
func TestAppsMaySpeakFirst(t *testing.T) {
	l := newLab(t)
	l.greets.Store(true)
	for name, says := range map[string]string{"nothing": "", "a part of what verifiers say": "POST /.well-"} {
		c, err := l.dial("a.example")
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, says)
		want := "220 ready" + says
		b := make([]byte, len(want))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		if got := say(t, c, "x"); got != "x" {
			t.Errorf("%s: then %q", name, got)
		}
	}
	c, err := l.dial("a.example")
	if err != nil {
		t.Fatal(err)
	}
	if got := say(t, c, ""); got != "220 ready" {
		t.Errorf("a client that ends at once got %q", got)
	}
}
