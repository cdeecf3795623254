// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"

	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/acme/acmetest"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// shopfront is a gateway of which an app may have certificates of its own domains: Pebble
// finds the gateway, and TXT records the app, by an own DNS server.
type shopfront struct {
	*public
	dns     *acmetest.DNS
	ca      *acmetest.CA
	manager *acme.Manager
}

func newShopfront(t *testing.T, method acme.Method, limits acme.Limits, domains ...string) *shopfront {
	t.Helper()
	s := &shopfront{dns: acmetest.NewDNS(t, "custom.test")}
	s.public = newPublic(t, nil, "100.96.0.1", func(p *public, c *gateway.Config, e *edge.Config) {
		d := manifest.Draft{Name: "shop", DockerComposeFile: "services: {}\n", GatewayEnabled: true,
			PortPolicy: &manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 8080, TLS: manifest.TLSApp}, {Port: 80, TLS: manifest.TLSApp}}}}
		for _, name := range domains {
			d.CustomDomains = append(d.CustomDomains, manifest.CustomDomain{Domain: name, Port: 8080})
		}
		var err error
		if p.manifest, err = manifest.Build(d); err != nil {
			t.Fatal(err)
		}
		c.Custom = s
		e.TXT = edge.DNS{Servers: []string{s.dns.Addr}}
		e.Challenge = func(ctx context.Context, name hostname.Name) bool { return s.manager.Challenged(ctx, name) }
		e.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if strings.HasSuffix(h.ServerName, ".custom.test") {
				return s.manager.GetCertificate(h)
			}
			return p.ca.GetCertificate(h)
		}
	})
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	front := &http.Server{Handler: s.edge.Redirect(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.manager.HTTPChallenge(http.NotFoundHandler()).ServeHTTP(w, r)
	}))}
	done := make(chan struct{})
	go func() { defer close(done); front.Serve(plain) }()
	t.Cleanup(func() { front.Close(); <-done })
	at, err := netip.ParseAddrPort(s.at)
	if err != nil {
		t.Fatal(err)
	}
	s.ca = acmetest.NewCA(t, s.dns, plain.Addr().(*net.TCPAddr).Port, int(at.Port()))
	s.manager, err = acme.New(acme.Config{
		Storage: &certmagic.FileStorage{Path: t.TempDir()}, CAs: []acme.CA{{Name: "pebble", Directory: s.ca.Directory, Roots: s.ca.APIRoots}},
		Methods: []acme.Method{method}, Limits: limits, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.manager.Close() })
	return s
}

// SignCustom is the manager's, which is there only later.
func (s *shopfront) SignCustom(ctx context.Context, csr *x509.CertificateRequest, name hostname.Name, owner string) ([]byte, time.Time, time.Time, error) {
	return s.manager.SignCustom(ctx, csr, name, owner)
}

// leads makes a domain lead to the gateway, and its TXT record to an app.
func (s *shopfront) leads(t *testing.T, name, to string) {
	t.Helper()
	s.dns.Add(t, name+". 1 IN A 127.0.0.1")
	if to != "" {
		s.dns.Add(t, hostname.TXTPrefix+"."+name+`. 1 IN TXT "`+to+`"`)
	}
}

func (s *shopfront) certificate(i *instance, names ...string) error {
	return i.call("GetCertificate", &api.GetCertificateRequest{Csr: i.csr(i.signer, names...)}, new(api.GetCertificateResponse))
}

// A domain of the app's owner leads to the app, with a certificate of a public authority for
// the key that evidence names, and no credential of anyone's zone.
func TestThreat_C05_ACustomDomainLeadsToAKeyInTheGuest(t *testing.T) {
	for _, method := range []acme.Method{acme.TLSALPN01, acme.HTTP01} {
		t.Run(string(method), func(t *testing.T) {
			s := newShopfront(t, method, acme.Limits{}, "shop.custom.test")
			i := s.instance(1, 1)
			s.leads(t, "shop.custom.test", i.guest.AppID.String()+":8080")
			join(t, i, "shop", s.public)
			tr := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: s.ca.Roots},
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "tcp", s.at)
				}}
			c := &http.Client{Transport: tr, Timeout: 10 * time.Second}
			body, state := get(t, c, "https://shop.custom.test/cart")
			if body != "shop /cart" || !bytes.Equal(state.PeerCertificates[0].RawSubjectPublicKeyInfo, i.key.SPKI()) {
				t.Errorf("%q", body)
			}
			resp, err := c.Post("https://shop.custom.test/.well-known/dstack/attest", "application/json", strings.NewReader("{}"))
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if string(b) != "evidence true" {
				t.Errorf("evidence: %q", b)
			}
			if known, err := s.manager.KnownKey(t.Context(), sha256.Sum256(i.key.SPKI())); err != nil || !known {
				t.Errorf("the key is not in the log of keys: %v", err)
			}
			if n := s.ca.Orders(); n != 1 {
				t.Errorf("%d orders", n)
			}
		})
	}
}

func TestThreat_C07_CustomDomainsAreForTheirAppAlone(t *testing.T) {
	s := newShopfront(t, acme.TLSALPN01, acme.Limits{PerApp: 2}, "a.custom.test", "b.custom.test", "c.custom.test", "moved.custom.test", "port.custom.test", "none.custom.test", "nobody.custom.test")
	i := s.instance(1, 1)
	i.timed = true
	app := i.guest.AppID.String()
	for _, name := range []string{"a.custom.test", "b.custom.test", "c.custom.test", "unlisted.custom.test"} {
		s.leads(t, name, app+":8080")
	}
	s.leads(t, "moved.custom.test", strings.Repeat("ab", 20)+":8080")
	s.leads(t, "port.custom.test", app+":80")
	s.leads(t, "none.custom.test", "")
	s.leads(t, "nobody.custom.test", "gateway:8080")
	if err := s.certificate(i, "a.custom.test"); fault.Code(err) != "certificate_route" {
		t.Errorf("before it registered: %v", err)
	}
	if _, err := i.register(nil); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		names []string
		code  string
	}{
		"not in the measured list":        {[]string{"unlisted.custom.test"}, "certificate_domain"},
		"TXT leads to another app":        {[]string{"moved.custom.test"}, "certificate_txt"},
		"TXT leads to another port":       {[]string{"port.custom.test"}, "certificate_txt"},
		"no TXT":                          {[]string{"none.custom.test"}, "edge_no_txt"},
		"TXT leads to the gateway itself": {[]string{"nobody.custom.test"}, "host_txt"},
		"two domains at once":             {[]string{"a.custom.test", "b.custom.test"}, "certificate_name"},
		"with a name of the gateway's":    {[]string{"a.custom.test", app + "." + base}, "certificate_name"},
		"a wildcard":                      {[]string{"*.custom.test"}, "certificate_name"},
		"a name of one label":             {[]string{"localhost"}, "certificate_name"},
	} {
		if err := s.certificate(i, c.names...); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	if n := s.ca.Orders(); n != 0 {
		t.Errorf("refusals cost %d orders", n)
	}
	// Another app, with a domain of this one's.
	thief := s.instance(2, 1)
	thief.timed = true
	if _, err := thief.register(nil); err != nil {
		t.Fatal(err)
	}
	if err := s.certificate(thief, "a.custom.test"); fault.Code(err) != "certificate_txt" {
		t.Errorf("another app: %v", err)
	}
	for _, name := range []string{"a.custom.test", "a.custom.test", "b.custom.test"} {
		if err := s.certificate(i, name); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.certificate(i, "c.custom.test"); fault.Code(err) != "acme_rate" {
		t.Errorf("a third within a day: %v", err)
	}
	if names := s.manager.CustomNames(t.Context()); len(names) != 2 || names[0] != "a.custom.test" || names[1] != "b.custom.test" {
		t.Errorf("certified: %v", names)
	}
	if n := s.ca.Orders(); n != 2 {
		t.Errorf("%d orders", n)
	}
}
