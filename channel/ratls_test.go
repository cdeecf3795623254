// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
)

func (v *vendor) ratls() *RATLS {
	return &RATLS{Appraiser: &judge{vendor: v}, Intended: Intended{AppID: appA}, Timeout: 20 * time.Second}
}

func (m *machine) certifier(t testing.TB) *Certifier {
	t.Helper()
	c, err := NewCertifier(t.Context(), CertifierConfig{Attester: m, Key: m.key, Names: []string{"app.test", "127.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// serveRATLS echoes for clients, or for anyone.
func serveRATLS(t testing.TB, m *machine, clients *RATLS) (addr string) {
	t.Helper()
	addr, _ = serveRATLSLogged(t, m, clients)
	return addr
}

func serveRATLSLogged(t testing.TB, m *machine, clients *RATLS) (addr string, refused chan error) {
	t.Helper()
	refused = make(chan error, 16)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := ListenRATLS(inner, m.certifier(t), clients, func(_ net.Addr, err error) { refused <- err })
	if err != nil {
		t.Fatal(err)
	}
	go echo(l)
	t.Cleanup(func() { l.Close() })
	return l.Addr().String(), refused
}

func TestRATLSServerIsAppraisedByItsCertificate(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	addr := serveRATLS(t, m, nil)
	for _, committed := range []bool{false, true} {
		c := v.ratls()
		c.CommittedKey = committed
		conn, err := DialRATLS(t.Context(), "tcp", addr, c)
		if err != nil {
			t.Fatal(err)
		}
		mustEcho(t, conn)
		if p := conn.Peer(); p.Binding != BindingKey || p.Identity.AppID != appA || !bytes.Equal(p.SPKI, m.key.SPKI()) {
			t.Errorf("peer %+v", p)
		}
		conn.Close()
	}
	if n := m.quotes.Load(); n != 1 {
		t.Errorf("%d quotes for two connections", n)
	}
}

func TestRATLSBothWays(t *testing.T) {
	v := newVendor(t)
	s, c := v.boot(t, appA, inst1, newKey(t)), v.boot(t, appB, inst2, newKey(t))
	clients := v.ratls()
	clients.Intended = Intended{}
	addr, refused := serveRATLSLogged(t, s, clients)
	cfg := v.ratls()
	cfg.Certifier = c.certifier(t)
	conn, err := DialRATLS(t.Context(), "tcp", addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	mustEcho(t, conn)
	conn.Close()

	// A client without a certificate learns of its refusal with its first read.
	conn, err = DialRATLS(t.Context(), "tcp", addr, v.ratls())
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
	}
	if err == nil {
		t.Error("a client without evidence was let in")
	}
	waitRefused(t, refused, "channel_handshake")
}

// selfSigned makes a certificate of key with container as its evidence.
func selfSigned(t *testing.T, key *Key, from, to time.Time, container []byte, more ...pkix.Extension) *tls.Certificate {
	t.Helper()
	ext, err := ratls.Extensions(ratls.Issued{}, container)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "x"}, DNSNames: []string{"x"},
		NotBefore: from, NotAfter: to, ExtraExtensions: append(ext, more...),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.signer().Public(), key.signer())
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key.signer()}
}

// present serves one certificate.
func present(t *testing.T, cert *tls.Certificate) string {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*cert}})
	if err != nil {
		t.Fatal(err)
	}
	go echo(ln)
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}

func TestRATLSCertificatesThatAreNotAccepted(t *testing.T) {
	v := newVendor(t)
	m, other := v.boot(t, appA, inst1, newKey(t)), v.boot(t, appB, inst1, newKey(t))
	own := func(m *machine, key *Key) []byte { return must(m.Attest(t.Context(), ratls.ReportData(key.SPKI()))) }
	now := time.Now()
	young := func(key *Key, c []byte) *tls.Certificate {
		return selfSigned(t, key, now.Add(-time.Minute), now.Add(time.Hour), c)
	}
	appKey := newKey(t)
	for _, c := range []struct {
		name, code string
		cert       *tls.Certificate
		edit       func(*RATLS)
	}{
		{"as it should be", "", young(m.key, own(m, m.key)), nil},
		{"no evidence", "ratls_no_evidence", young(m.key, nil), nil},
		{"evidence of another key", "ratls_report_data_mismatch", young(newKey(t), own(m, m.key)), nil},
		{"another app", "channel_wrong_app", young(other.key, own(other, other.key)), nil},
		{"a key of an app's own", "", young(appKey, own(m, appKey)), nil},
		{"a key of an app's own where the system's is demanded", "channel_key_mismatch", young(appKey, own(m, appKey)), func(r *RATLS) { r.CommittedKey = true }},
		{"expired", "channel_certificate_time", selfSigned(t, m.key, now.Add(-2*time.Hour), now.Add(-time.Hour), own(m, m.key)), nil},
		{"not valid yet", "channel_certificate_time", selfSigned(t, m.key, now.Add(time.Hour), now.Add(2*time.Hour), own(m, m.key)), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := v.ratls()
			if c.edit != nil {
				c.edit(cfg)
			}
			conn, err := DialRATLS(t.Context(), "tcp", present(t, c.cert), cfg)
			if c.code == "" {
				if err != nil {
					t.Fatal(err)
				}
				mustEcho(t, conn)
				conn.Close()
				return
			}
			wantRefusal(t, conn, err, c.code)
		})
	}
}

// The pair of quote and event log that upstream's older programs wrote.
func TestRATLSLegacyCertificateIsAppraised(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	e, err := container.Decode(must(m.Attest(t.Context(), ratls.ReportData(m.key.SPKI()))))
	if err != nil {
		t.Fatal(err)
	}
	wrap := func(ext int, payload []byte) pkix.Extension {
		return pkix.Extension{Id: ratls.OID(ext), Value: must(asn1.Marshal(payload))}
	}
	now := time.Now()
	for name, key := range map[string]*Key{"of its key": m.key, "of another key": newKey(t)} {
		t.Run(name, func(t *testing.T) {
			cert := selfSigned(t, key, now, now.Add(time.Hour), nil, wrap(ratls.ExtQuote, e.Quote), wrap(ratls.ExtEventLog, must(eventlog.MarshalJSON(e.EventLog))))
			conn, err := DialRATLS(t.Context(), "tcp", present(t, cert), v.ratls())
			if key != m.key {
				wantRefusal(t, conn, err, "channel_report_data")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			mustEcho(t, conn)
			conn.Close()
		})
	}
}

// A container may claim what it likes: what the hardware signed decides.
func TestRATLSEvidenceWhoseClaimIsALie(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	thief := newKey(t)
	real := must(m.Attest(t.Context(), ratls.ReportData(m.key.SPKI())))
	a, b := ratls.ReportData(m.key.SPKI()), ratls.ReportData(thief.SPKI())
	forged := relabel(t, real, a, b)
	now := time.Now()
	addr := present(t, selfSigned(t, thief, now.Add(-time.Minute), now.Add(time.Hour), forged))
	conn, err := DialRATLS(t.Context(), "tcp", addr, v.ratls())
	wantRefusal(t, conn, err, "channel_report_data")
}

// Threat B08: RA-TLS evidence carries no nonce; its age is limited instead.
func TestThreat_B08_AnOldRATLSCertificateIsRefused(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	now := time.Now()
	old := selfSigned(t, m.key, now.Add(-25*time.Hour), now.Add(24*365*time.Hour), must(m.Attest(t.Context(), ratls.ReportData(m.key.SPKI()))))
	addr := present(t, old)
	conn, err := DialRATLS(t.Context(), "tcp", addr, v.ratls())
	wantRefusal(t, conn, err, "channel_certificate_age")
	c := v.ratls()
	c.MaxAge = AnyAge
	if conn, err = DialRATLS(t.Context(), "tcp", addr, c); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	c.MaxAge = 25 * time.Hour
	conn, err = DialRATLS(t.Context(), "tcp", addr, c)
	wantRefusal(t, conn, err, "channel_config")
}

// Threats B08, C01: what RA-TLS cannot do, and says it cannot. Who has a copy of
// key and evidence passes; an attested channel to the same thief fails (see
// TestThreat_B08_ReplayedEvidenceIsRefused).
func TestRATLSAdmitsAThiefOfTheKeyAndSaysSo(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	stolen := must(m.Attest(t.Context(), ratls.ReportData(m.key.SPKI())))
	now := time.Now()
	conn, err := DialRATLS(t.Context(), "tcp", present(t, selfSigned(t, m.key, now, now.Add(time.Hour), stolen)), v.ratls())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if conn.Peer().Binding != BindingKey {
		t.Error("RA-TLS passes for a session's binding")
	}
}

func TestHTTPOverRATLS(t *testing.T) {
	v := newVendor(t)
	s, c := v.boot(t, appA, inst1, newKey(t)), v.boot(t, appB, inst2, newKey(t))
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	clients := v.ratls()
	clients.Intended.AppID = appB
	l, err := ListenRATLS(inner, s.certifier(t), clients, nil)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ConnContext: ConnContext, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := PeerOf(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		io.WriteString(w, p.Identity.AppID.String())
	})}
	go server.Serve(l)
	defer server.Close()
	cfg := v.ratls()
	cfg.Certifier = c.certifier(t)
	transport := cfg.Transport()
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get("https://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || string(body) != appB.String() {
		t.Errorf("%q, %v", body, err)
	}
}

func TestRATLSConfigurationsThatCannotBeSafe(t *testing.T) {
	v := newVendor(t)
	j := &judge{vendor: v}
	for name, c := range map[string]*RATLS{
		"none": nil, "empty": {}, "nobody meant": {Appraiser: j}, "nobody judges": {Intended: Intended{AppID: appA}},
		"too old": {Appraiser: j, Intended: Intended{AppID: appA}, MaxAge: MaxCertificateAge + 1}, "negative": {Appraiser: j, Intended: Intended{AppID: appA}, MaxAge: -2},
	} {
		conn, err := DialRATLS(t.Context(), "tcp", "127.0.0.1:1", c)
		if conn != nil || fault.Code(err) != "channel_config" {
			t.Errorf("%s: %v", name, err)
		}
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, err = ListenRATLS(inner, nil, &RATLS{}, nil)
	wantCode(t, err, "channel_config")
	m := v.boot(t, appA, inst1, nil)
	for name, c := range map[string]CertifierConfig{
		"no attester": {Names: []string{"x"}}, "no name": {Attester: m},
		"too long a life": {Attester: m, Names: []string{"x"}, Life: 25 * time.Hour}, "a negative life": {Attester: m, Names: []string{"x"}, Life: -1},
	} {
		if _, err := NewCertifier(t.Context(), c); fault.Code(err) != "channel_config" {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = NewCertifier(t.Context(), CertifierConfig{Attester: broken{}, Names: []string{"x"}})
	wantCode(t, err, "channel_attest")
}

// flaky fails when told to.
type flaky struct {
	*machine
	fail atomic.Bool
}

func (f *flaky) Attest(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	if f.fail.Load() {
		return nil, errors.New("the TEE is busy")
	}
	return f.machine.Attest(ctx, data)
}

func TestCertificatesAreRenewedAtHalfTheirLife(t *testing.T) {
	v := newVendor(t)
	tee := &flaky{machine: v.boot(t, appA, inst1, nil)}
	start := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	var now atomic.Int64
	at := func(d time.Duration) { now.Store(int64(d)) }
	c, err := NewCertifier(t.Context(), CertifierConfig{
		Attester: tee, Names: []string{"app.test", "10.0.0.1"}, Life: 2 * time.Hour,
		Now: func() time.Time { return start.Add(time.Duration(now.Load())) },
	})
	if err != nil {
		t.Fatal(err)
	}
	get := func() *tls.Certificate { return must(c.Certificate(t.Context())) }
	first := get()
	if err := ratls.CheckStandalone(first.Leaf, start); err != nil {
		t.Error(err)
	}
	if life := first.Leaf.NotAfter.Sub(start); life != 2*time.Hour || len(first.Leaf.IPAddresses) != 1 || len(first.Leaf.DNSNames) != 1 {
		t.Errorf("a certificate of %s for %v %v", life, first.Leaf.DNSNames, first.Leaf.IPAddresses)
	}
	if at(59 * time.Minute); get() != first {
		t.Error("renewed too early")
	}
	at(61 * time.Minute)
	tee.fail.Store(true)
	if get() != first {
		t.Error("a failed renewal does not leave the old certificate")
	}
	at(121 * time.Minute)
	if _, err := c.Certificate(t.Context()); fault.Code(err) != "channel_attest" {
		t.Errorf("an expired certificate is served: %v", err)
	}
	tee.fail.Store(false)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() { get() })
	}
	group.Wait()
	second := get()
	if n := tee.quotes.Load(); n != 2 || second == first {
		t.Errorf("%d quotes for two certificates", n)
	}
	if bytes.Equal(second.Leaf.RawSubjectPublicKeyInfo, first.Leaf.RawSubjectPublicKeyInfo) {
		t.Error("a new certificate has the old ephemeral key")
	}
	a, err := ratls.FromCertificate(second.Leaf)
	if err != nil || a.ReportData != ratls.ReportData(second.Leaf.RawSubjectPublicKeyInfo) {
		t.Errorf("evidence of the new certificate: %v", err)
	}
}

func TestFetchedCertificatesComeWithTheirKey(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	der, spki, err := FetchCertificate(t.Context(), serveRATLS(t, m, nil))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil || !bytes.Equal(cert.RawSubjectPublicKeyInfo, spki) || !bytes.Equal(spki, m.key.SPKI()) {
		t.Errorf("certificate %v, key %x", err, spki)
	}
	if _, err := ratls.FromCertificate(cert); err != nil {
		t.Error(err)
	}
	// Whoever answers, an ordinary server too; the localhost name is loopback.
	plain := httptest.NewTLSServer(http.NotFoundHandler())
	defer plain.Close()
	_, port, _ := net.SplitHostPort(plain.Listener.Addr().String())
	if der, _, err = FetchCertificate(t.Context(), "app.localhost:"+port); err != nil || !bytes.Equal(der, plain.Certificate().Raw) {
		t.Errorf("%v", err)
	}
	for addr, code := range map[string]string{"127.0.0.1:1": "channel_unreachable", "nonsense": "channel_unreachable"} {
		der, spki, err := FetchCertificate(t.Context(), addr)
		if der != nil || spki != nil {
			t.Error("bytes beside an error")
		}
		wantCode(t, err, code)
	}
	plain.TLS.MaxVersion = tls.VersionTLS12
	_, _, err = FetchCertificate(t.Context(), plain.Listener.Addr().String())
	wantCode(t, err, "channel_handshake")
}
