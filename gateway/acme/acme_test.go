// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/miekg/dns"

	"github.com/dstack-go/dstack/gateway/acme/acmetest"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

const (
	base = "gw.test"
	app  = "0123456789abcdef0123456789abcdef01234567"
)

// lines is a log that goroutines share.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func credential(t *testing.T, d *acmetest.DNS, key string) *Credential {
	t.Helper()
	c, err := NewCredential("rfc2136", map[string]string{"server": d.Addr, "key_name": acmetest.KeyName, "key_alg": acmetest.KeyAlg, "key": key})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func caOf(name string, c *acmetest.CA) CA {
	return CA{Name: name, Directory: c.Directory, Roots: c.APIRoots}
}

// open starts a manager of base on a directory.
func open(t *testing.T, dir string, d *acmetest.DNS, cas ...CA) (*Manager, *lines) {
	t.Helper()
	return openWith(t, dir, d, func(*Config) {}, cas...)
}

func openWith(t *testing.T, dir string, d *acmetest.DNS, edit func(*Config), cas ...CA) (*Manager, *lines) {
	t.Helper()
	log := &lines{}
	cfg := Config{
		Storage: &certmagic.FileStorage{Path: dir}, CAs: cas, Resolvers: []string{d.Addr},
		Log: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Attest: func(_ context.Context, data [64]byte) (string, string, error) {
			return "quote " + hex.EncodeToString(data[:]), "attestation", nil
		},
	}
	edit(&cfg)
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	if err := m.SetDomains(t.Context(), []Domain{{Name: base, Credential: credential(t, d, acmetest.Key), Propagation: -1}}); err != nil {
		t.Fatal(err)
	}
	return m, log
}

// ready waits for both certificates of the base domain.
func ready(t *testing.T, m *Manager, log *lines) {
	t.Helper()
	for end := time.Now().Add(40 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		n := 0
		for _, s := range m.Status() {
			if !s.NotAfter.IsZero() {
				n++
			}
		}
		if n == 2 {
			return
		}
	}
	t.Fatalf("no certificates: %+v\n%s", m.Status(), log)
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Fatalf("got %v with code %q, want %q", err, fault.Code(err), code)
	}
}

func csr(t *testing.T, key *ecdsa.PrivateKey, names ...string) *x509.CertificateRequest {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{}, DNSNames: names}, key)
	if err != nil {
		t.Fatal(err)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestWildcardByDNS(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	d.Add(t, "_acme-challenge."+base+`. 60 IN TXT "of somebody else"`)
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := open(t, t.TempDir(), d, caOf("pebble", ca))
	ready(t, m, log)
	cert, err := m.GetCertificate(&tls.ClientHelloInfo{ServerName: app + "-8080." + base})
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	for _, der := range cert.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		pool.AddCert(c)
	}
	if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: ca.Roots, Intermediates: pool, DNSName: app + "-8080." + base}); err != nil {
		t.Fatal(err)
	}
	if left := d.Records("_acme-challenge."+base, dns.TypeTXT); len(left) != 1 || !strings.Contains(left[0].String(), "somebody else") {
		t.Errorf("records left: %v", left)
	}
	if _, err := m.GetCertificate(&tls.ClientHelloInfo{ServerName: "elsewhere.test"}); fault.Code(err) != "cert_none" {
		t.Errorf("a name of nobody: %v", err)
	}
	info, err := m.AcmeInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := AccountReportData(info.AccountUri)
	if info.AccountUri == "" || info.AccountQuote != "quote "+hex.EncodeToString(want[:]) {
		t.Errorf("account %q with quote %q", info.AccountUri, info.AccountQuote)
	}
	if len(info.QuotedHistKeys) != 2 {
		t.Errorf("%d keys in the log", len(info.QuotedHistKeys))
	}
}

func TestSignForAKeyElsewhere(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := open(t, t.TempDir(), d, caOf("pebble", ca))
	ready(t, m, log)
	key, name := newKey(t), hostname.Name(app+"-443."+base)
	before := ca.Orders()
	var chain []byte
	for range 3 {
		got, notAfter, renewAt, err := m.Sign(t.Context(), csr(t, key, string(name)), []hostname.Name{name})
		if err != nil {
			t.Fatalf("%v\n%s", err, log)
		}
		if chain != nil && !bytes.Equal(chain, got) {
			t.Error("the same key and name gave another chain")
		}
		chain = got
		if time.Until(renewAt) <= 0 || !renewAt.Before(notAfter) {
			t.Errorf("to be renewed at %s", renewAt)
		}
	}
	if n := ca.Orders() - before; n != 1 {
		t.Errorf("%d orders for one certificate", n)
	}
	certs, err := parseChain(chain)
	if err != nil || !key.PublicKey.Equal(certs[0].PublicKey) {
		t.Errorf("certificate of another key: %v", err)
	}

	other := hostname.Name(app + "-444." + base)
	_, _, _, err = m.Sign(t.Context(), csr(t, key, string(name), string(other)), []hostname.Name{name})
	wantCode(t, err, "csr_names")
	_, _, _, err = m.Sign(t.Context(), csr(t, key, app+".elsewhere.test"), []hostname.Name{app + ".elsewhere.test"})
	wantCode(t, err, "acme_name")
	broken := csr(t, key, string(name))
	broken.Signature[len(broken.Signature)-1] ^= 1
	_, _, _, err = m.Sign(t.Context(), broken, []hostname.Name{name})
	wantCode(t, err, "csr_signature")
	_, _, _, err = m.Sign(t.Context(), &x509.CertificateRequest{Raw: make([]byte, MaxCSR+1)}, []hostname.Name{name})
	wantCode(t, err, "csr_size")
}

func TestThreat_K11_TheNextCAIsUsed(t *testing.T) {
	for _, status := range []int{429, 500} {
		d := acmetest.NewDNS(t, base)
		a, b := acmetest.NewCA(t, d, 1, 1), acmetest.NewCA(t, d, 1, 1)
		a.Fail(status)
		m, log := open(t, t.TempDir(), d, caOf("a", a), caOf("b", b))
		ready(t, m, log)
		if b.Orders() == 0 || a.Orders() != 0 {
			t.Errorf("status %d: %d orders at a, %d at b", status, a.Orders(), b.Orders())
		}
		// The CA that is down is left alone, and says so.
		wantCode(t, m.issuers[0].rest(), "acme_ca_down")
	}
}

func TestTwoManagersOnOneStorageOrderOnce(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	ca := acmetest.NewCA(t, d, 1, 1)
	dir := t.TempDir()
	m1, log1 := open(t, dir, d, caOf("pebble", ca))
	m2, log2 := open(t, dir, d, caOf("pebble", ca))
	ready(t, m1, log1)
	ready(t, m2, log2)
	if n := ca.Orders(); n != 2 {
		t.Errorf("%d orders for the wildcard and the base", n)
	}
}

func TestThreat_K10_TheTokenOfDNSStaysInside(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	ca := acmetest.NewCA(t, d, 1, 1)
	dir := t.TempDir()
	m, log := open(t, dir, d, caOf("pebble", ca))
	ready(t, m, log)
	m.log.Error("an error that quotes "+acmetest.Key, "and", acmetest.Key)
	if strings.Contains(log.String(), acmetest.Key) {
		t.Error("the log has the key")
	}
	//lint:ignore SA9005 that nothing comes out is what is tested
	if text, _ := json.Marshal(credential(t, d, acmetest.Key)); bytes.Contains(text, []byte(acmetest.Key)) {
		t.Error("a printed credential has the key")
	}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(acmetest.Key)) {
			t.Errorf("%s has the key", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestThreat_K02_NoConfigurationIsNoProductionCA(t *testing.T) {
	_, err := New(Config{Storage: &certmagic.FileStorage{Path: t.TempDir()}})
	wantCode(t, err, "acme_config")
	_, err = New(Config{})
	wantCode(t, err, "acme_config")
	_, err = New(Config{Storage: &certmagic.FileStorage{Path: t.TempDir()}, CAs: []CA{{Name: "x", Directory: "http://ca.test/dir"}}})
	wantCode(t, err, "acme_ca")
}

func TestThreat_K02_ABrokenAccountIsNoNewAccount(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := open(t, t.TempDir(), d, caOf("pebble", ca))
	ready(t, m, log)
	key := m.issuers[0].accountKey()
	if err := m.cfg.Storage.Store(t.Context(), key, []byte(`{"version":1`)); err != nil {
		t.Fatal(err)
	}
	name := hostname.Name(app + "-443." + base)
	_, _, _, err := m.Sign(t.Context(), csr(t, newKey(t), string(name)), []hostname.Name{name})
	if err == nil || !strings.Contains(err.Error(), "does not parse") {
		t.Fatalf("got %v", err)
	}
	if data, _ := m.cfg.Storage.Load(t.Context(), key); string(data) != `{"version":1` {
		t.Error("the record was replaced")
	}
}

// The report data are upstream's (vectors/gateway/report_data.json).
func TestReportData(t *testing.T) {
	if got := AccountReportData("https://acme-v02.api.letsencrypt.org/acme/acct/1234567890"); hex.EncodeToString(got[:]) != "444f5d955a6cbe13aecf875fd80c83510f13d2671497f062be2d2e4c138220892f0f7f871815b9aeed9ab00990c21452240144b02b6885ea6528e4fc47b4cf32" {
		t.Errorf("account: %x", got)
	}
	spki, err := hex.DecodeString("3059301306072a8648ce3d020106082a8648ce3d03010703420004000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f")
	if err != nil {
		t.Fatal(err)
	}
	if got := CertReportData(spki); hex.EncodeToString(got[:]) != "dfdef5ccb90d8b46fecaa6ce1dcdeedd5cf9308fdf71b4d3da29277366f5f196b6ba0f6dcfc8baa9b1050e86b5974b5c78b2d9e9283799619e1656dde3cd8fb5" {
		t.Errorf("key: %x", got)
	}
}

func TestChallengeDelegatedByCNAME(t *testing.T) {
	d := acmetest.NewDNS(t, base, "challenges.test")
	d.Add(t, "_acme-challenge."+base+". 60 IN CNAME gw.challenges.test.")
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := open(t, t.TempDir(), d, caOf("pebble", ca))
	ready(t, m, log)
	removed := d.Removed()
	for _, rr := range removed {
		if rr.Header().Name != "gw.challenges.test." {
			t.Errorf("a record was made at %s", rr.Header().Name)
		}
	}
	if left := d.Records("gw.challenges.test", dns.TypeTXT); len(removed) != 2 || len(left) != 0 {
		t.Errorf("%d records removed, left %v", len(removed), left)
	}
}

// A custom domain that is allowed gets its certificate at the first handshake, by either
// challenge that needs no DNS credential; one that is not allowed gets none.
func TestCustomDomainOnDemand(t *testing.T) {
	for _, method := range []Method{TLSALPN01, HTTP01} {
		t.Run(string(method), func(t *testing.T) {
			var m *Manager
			d := acmetest.NewDNS(t, "custom.test", "refused.test")
			for _, name := range []string{"custom.test", "refused.test"} {
				d.Add(t, name+". 60 IN A 127.0.0.1")
			}
			front, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
				NextProtos:     []string{"http/1.1", "acme-tls/1"},
				GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return m.GetCertificate(h) },
			})
			if err != nil {
				t.Fatal(err)
			}
			plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				m.HTTPChallenge(http.NotFoundHandler()).ServeHTTP(w, r)
			}))
			t.Cleanup(plain.Close)
			t.Cleanup(func() { front.Close() })
			ca := acmetest.NewCA(t, d, plain.Listener.Addr().(*net.TCPAddr).Port, front.Addr().(*net.TCPAddr).Port)
			m, err = New(Config{
				Storage: &certmagic.FileStorage{Path: t.TempDir()}, CAs: []CA{caOf("pebble", ca)}, Methods: []Method{method},
				Allowed: func(_ context.Context, name hostname.Name) error {
					if name != "custom.test" {
						return errors.New("not this one")
					}
					return nil
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { m.Close() })
			go func() {
				for {
					c, err := front.Accept()
					if err != nil {
						return
					}
					go func() { c.(*tls.Conn).Handshake(); c.Close() }()
				}
			}()
			dial := func(name string) error {
				c, err := tls.DialWithDialer(&net.Dialer{Timeout: 20 * time.Second}, "tcp", front.Addr().String(), &tls.Config{ServerName: name, RootCAs: ca.Roots})
				if err == nil {
					c.Close()
				}
				return err
			}
			if err := dial("custom.test"); err != nil {
				t.Error(err)
			}
			orders := ca.Orders()
			if err := dial("refused.test"); err == nil || ca.Orders() != orders {
				t.Errorf("a domain that is not allowed: %v, %d orders", err, ca.Orders()-orders)
			}
		})
	}
}

func FuzzStoredRecords(f *testing.F) {
	f.Add([]byte(`{"version":1,"ca":"a","directory":"https://ca.test/","uri":"https://ca.test/1","key_pkcs8":"AA==","at":1,"old":[],"quote":"","attestation":""}`))
	f.Add([]byte(`{"version":1,"spki":"AA==","names":["a"],"at":1,"until":2,"quote":"","attestation":""}`))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var a accountRecord
		if parseRecord(data, &a) == nil {
			if key, err := a.check(); err == nil && key == nil {
				t.Error("an account without a key")
			}
		}
		var k keyRecord
		if parseRecord(data, &k) == nil && k.check("") == nil {
			t.Error("a key's record under no name")
		}
		if chain, err := parseChain(data); err == nil && len(chain) == 0 {
			t.Error("an empty chain")
		}
	})
}
