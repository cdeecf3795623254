// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	agentpb "github.com/dstack-go/dstack/api/agent"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/derive"
)

func parsePEM(t testing.TB, text string) *x509.Certificate {
	t.Helper()
	block, rest := pem.Decode([]byte(text))
	if block == nil || len(rest) > 0 {
		t.Fatalf("no certificate, or more than one: %q", text)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func tlsKey(t testing.TB, g *guest, req *agentpb.GetTlsKeyArgs) (*x509.Certificate, *agentpb.GetTlsKeyResponse) {
	t.Helper()
	var got agentpb.GetTlsKeyResponse
	if err := g.dstack(t).Call(context.Background(), "GetTlsKey", req, &got); err != nil {
		t.Fatal(err)
	}
	if _, err := tls.X509KeyPair([]byte(got.CertificateChain[0]), []byte(got.Key)); err != nil {
		t.Fatal(err)
	}
	return parsePEM(t, got.CertificateChain[0]), &got
}

func TestGetTlsKeyCertifiesWhatWasAskedFor(t *testing.T) {
	g := newGuest(t)
	from, to := uint64(1_800_000_000), uint64(1_900_000_000)
	leaf, got := tlsKey(t, g, &agentpb.GetTlsKeyArgs{
		Subject: "mein Dienst", AltNames: []string{"a.example", "127.0.0.1", "::1", "xn--strae-oqa.example"}, UsageRaTls: true, UsageServerAuth: true, UsageClientAuth: true,
		NotBefore: &from, NotAfter: &to, WithAppInfo: true,
	})
	ca := parsePEM(t, got.CertificateChain[1])
	if err := leaf.CheckSignatureFrom(ca); err != nil || len(got.CertificateChain) != 2 {
		t.Errorf("chain of %d: %v", len(got.CertificateChain), err)
	}
	if leaf.Subject.CommonName != "mein Dienst" || len(leaf.Subject.Names) != 1 || !cmp.Equal(leaf.DNSNames, []string{"a.example", "xn--strae-oqa.example"}) ||
		len(leaf.IPAddresses) != 2 || leaf.NotBefore.Unix() != int64(from) || leaf.NotAfter.Unix() != int64(to) ||
		leaf.KeyUsage != x509.KeyUsageDigitalSignature || !cmp.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) ||
		leaf.SignatureAlgorithm != x509.ECDSAWithSHA256 || leaf.BasicConstraintsValid || leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() > 159 {
		t.Errorf("leaf %+v", leaf)
	}
	var order []string
	for _, e := range leaf.Extensions[2:] { // the first two name the keys, which upstream leaves out
		order = append(order, e.Id.String())
		if critical := e.Id.String() == "2.5.29.15"; e.Critical != critical {
			t.Errorf("%s critical: %v", e.Id, e.Critical)
		}
	}
	if want := []string{"2.5.29.17", "2.5.29.15", "2.5.29.37", ratls.OID(9).String(), ratls.OID(4).String(), ratls.OID(8).String()}; !cmp.Equal(order, want) {
		t.Errorf("extensions %v, want %v", order, want)
	}

	claims, err := ratls.IssuerClaims(leaf)
	if err != nil || claims.AppID != nil || claims.Usage != "app:custom" {
		t.Fatalf("claims %+v, %v", claims, err)
	}
	info := g.info().app
	if i := claims.Info; i.AppID != testApp || !bytes.Equal(i.InstanceID, testInstance[:]) || !bytes.Equal(i.ComposeHash[:], info.ComposeHash) ||
		!bytes.Equal(i.MRAggregated[:], info.MrAggregated) || string(i.KeyProvider) != info.KeyProviderInfo || i.MRSystem == [32]byte{} || i.InitScriptHashes != nil {
		t.Errorf("app info %+v", i)
	}
	at, err := ratls.FromCertificate(leaf)
	if err != nil {
		t.Fatal(err)
	}
	if at.ReportData != ratls.ReportData(leaf.RawSubjectPublicKeyInfo) || reportData(t, at.Evidence.Quote) != at.ReportData {
		t.Error("the evidence is about another key")
	}
	if mr, err := eventlog.Replay(at.Evidence.EventLog, 3); err != nil || mr != g.init.rtmr3 {
		t.Errorf("the log in the certificate replays to %s, %v", mr, err)
	}
	if id, err := eventlog.Boundary(at.Evidence.EventLog); err != nil || id.AppID != testApp {
		t.Errorf("identity in the certificate %+v, %v", id, err)
	}
	if n := len(at.Evidence.EventLog); n != 1+len(eventlog.Runtime(g.state.Load().events)) {
		t.Errorf("%d events in the certificate: %+v", n, at.Evidence.EventLog)
	}
}

func TestGetTlsKeyByDefault(t *testing.T) {
	g := newGuest(t)
	quotes := g.init.quotes.Load()
	leaf, got := tlsKey(t, g, &agentpb.GetTlsKeyArgs{})
	// An empty name is there all the same, as UTF8String.
	if want := []byte{0x30, 0x0b, 0x31, 0x09, 0x30, 0x07, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x00}; !bytes.Equal(leaf.RawSubject, want) {
		t.Errorf("subject %x", leaf.RawSubject)
	}
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage)+len(leaf.DNSNames)+len(leaf.IPAddresses) != 0 || len(leaf.Extensions) != 4 {
		t.Errorf("extensions %v", leaf.Extensions)
	}
	if d := time.Until(leaf.NotAfter); d < 3649*24*time.Hour || d > 3651*24*time.Hour || time.Since(leaf.NotBefore) > 25*time.Hour {
		t.Errorf("valid from %s to %s", leaf.NotBefore, leaf.NotAfter)
	}
	block, _ := pem.Decode([]byte(got.Key))
	if len(block.Bytes) != 138 || block.Type != "PRIVATE KEY" {
		t.Errorf("key of %d bytes, %s", len(block.Bytes), block.Type)
	}
	other, _ := tlsKey(t, g, &agentpb.GetTlsKeyArgs{})
	if bytes.Equal(other.RawSubjectPublicKeyInfo, leaf.RawSubjectPublicKeyInfo) || other.SerialNumber.Cmp(leaf.SerialNumber) == 0 {
		t.Error("two calls share a key or a serial number")
	}
	if n := g.init.quotes.Load() - quotes; n != 0 {
		t.Errorf("certificates without evidence took %d quotes", n)
	}
}

func TestCertificatesThatNobodyGets(t *testing.T) {
	g := newGuest(t)
	at := func(n uint64) *uint64 { return &n }
	for _, c := range []struct {
		name, code, text string
		req              *agentpb.GetTlsKeyArgs
	}{
		{"an end before the beginning", "certificate_validity", "not_before must be earlier than not_after", &agentpb.GetTlsKeyArgs{NotBefore: at(2), NotAfter: at(2)}},
		{"an end before today", "certificate_validity", "not_before must be earlier than not_after", &agentpb.GetTlsKeyArgs{NotAfter: at(1000)}},
		{"a beginning after the CA's end", "certificate_validity", "", &agentpb.GetTlsKeyArgs{NotBefore: at(1<<64 - 1)}},
		{"a name that is not ASCII", "certificate_name", "", &agentpb.GetTlsKeyArgs{AltNames: []string{"straße.example"}}},
		{"a name with a zero", "certificate_name", "", &agentpb.GetTlsKeyArgs{AltNames: []string{"a.example\x00.b.example"}}},
		{"an empty name", "certificate_name", "", &agentpb.GetTlsKeyArgs{AltNames: []string{""}}},
		{"too many names", "certificate_name", "", &agentpb.GetTlsKeyArgs{AltNames: slices.Repeat([]string{"a"}, 257)}},
		{"a long subject", "certificate_name", "", &agentpb.GetTlsKeyArgs{Subject: strings.Repeat("x", maxSubject+1)}},
	} {
		err := g.dstack(t).Call(context.Background(), "GetTlsKey", c.req, nil)
		if fault.Code(err) != c.code || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want code %s", c.name, err, c.code)
		}
	}
	// Nobody outlives the CA.
	leaf, got := tlsKey(t, g, &agentpb.GetTlsKeyArgs{NotAfter: at(1<<64 - 1)})
	if ca := parsePEM(t, got.CertificateChain[1]); !leaf.NotAfter.Equal(ca.NotAfter) {
		t.Errorf("leaf ends %s, CA %s", leaf.NotAfter, ca.NotAfter)
	}
}

func TestTappdDerivesUpstreamsKeys(t *testing.T) {
	g := fixture(t)
	for _, v := range vectors(t).TappdDeriveKey {
		var got agentpb.GetTlsKeyResponse
		if err := g.tappd(t).Call(context.Background(), "Tappd.DeriveKey", &agentpb.DeriveKeyArgs{Path: v.Path, Subject: v.Path, UsageRaTls: true}, &got); err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode([]byte(got.Key))
		if got.Key != v.PEM || hex.EncodeToString(block.Bytes) != v.DER || hex.EncodeToString(block.Bytes[36:68]) != v.Scalar {
			t.Errorf("%q: %s", v.Path, got.Key)
		}
		leaf := parsePEM(t, got.CertificateChain[0])
		if leaf.Subject.CommonName != v.Path {
			t.Errorf("subject %q", leaf.Subject)
		}
		if _, err := ratls.FromCertificate(leaf); err != nil {
			t.Errorf("%q: %v", v.Path, err)
		}
	}
	seen := map[string]bool{}
	for range 3 {
		var got agentpb.GetTlsKeyResponse
		if err := g.tappd(t).Call(context.Background(), "DeriveKey", &agentpb.DeriveKeyArgs{RandomSeed: true}, &got); err != nil || seen[got.Key] {
			t.Errorf("a random seed: %v, seen before: %v", err, seen[got.Key])
		}
		seen[got.Key] = true
	}
}

// What Info shows: upstream's "demo cert", with evidence of this instance.
func TestInfoShowsTheAppsCertificate(t *testing.T) {
	g := newGuest(t)
	text := g.info().app.AppCert
	first, second, ok := strings.Cut(text, "-----END CERTIFICATE-----\n\n")
	if !ok {
		t.Fatalf("the chain is not joined by an empty line: %q", text)
	}
	leaf, ca := parsePEM(t, first+"-----END CERTIFICATE-----\n"), parsePEM(t, second)
	if leaf.CheckSignatureFrom(ca) != nil || leaf.Subject.CommonName != "demo-cert" || !cmp.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) {
		t.Errorf("leaf %+v", leaf)
	}
	if _, err := ratls.FromCertificate(leaf); err != nil {
		t.Error(err)
	}
	if g.info().public.AppCert != text {
		t.Error("strangers do not see it")
	}
}

// A KMS that does not answer at the start is asked again, and a certificate is
// renewed before it ends.
func TestTheAppsCertificateIsRenewed(t *testing.T) {
	cfg, init := config(t, testManifest)
	g := serve(t, cfg, init, Options{})
	before := *g.appCert.Load()
	due, err := g.renewAppCert(context.Background())
	if err != nil || due != appCertLatest {
		t.Errorf("due in %s, %v", due, err)
	}
	if after := g.info().app.AppCert; after == strings.Join(before, "\n") {
		t.Error("Info shows the old certificate")
	}
	g.issuer = failingIssuer{}
	if _, err := g.renewAppCert(context.Background()); err == nil || g.info().app.AppCert == "" {
		t.Errorf("a failure: %v, certificate %q", err, g.info().app.AppCert)
	}
}

type failingIssuer struct{}

func (failingIssuer) issue(context.Context, *ecdsa.PrivateKey, csr.Config) ([]string, error) {
	return nil, fault.New("kms_sign_failed", "no")
}

// testKMS signs as a KMS does, and checks what it is asked.
type testKMS struct {
	t       *testing.T
	server  *httptest.Server
	roots   string // PEM
	temp    *certificate.Authority
	tempPEM []byte
	app     *certificate.Authority
	root    *x509.Certificate
	chain   func([]string) []string // changes the answer
	calls   atomic.Int32
	refuse  atomic.Bool
}

// newAuthority makes a CA and returns its key, PEM, too.
func newAuthority(t *testing.T, name string, parent *certificate.Authority) (*certificate.Authority, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var ca *certificate.Authority
	if parent == nil {
		ca, err = certificate.Self(key, certificate.Subject{Name: name, Path: 1}, ratls.Issued{}, nil, time.Now())
	} else {
		ca, err = parent.Authority(key, certificate.Subject{Name: name}, ratls.Issued{}, time.Now())
	}
	if err != nil {
		t.Fatal(err)
	}
	text, err := derive.PEM(key)
	if err != nil {
		t.Fatal(err)
	}
	return ca, text
}

func newTestKMS(t *testing.T) *testKMS {
	k := &testKMS{t: t, chain: func(c []string) []string { return c }}
	root, _ := newAuthority(t, "KMS root", nil)
	k.root, k.roots = root.Certificate, root.PEM()
	k.app, _ = newAuthority(t, "app CA", root)
	k.temp, k.tempPEM = newAuthority(t, "temp CA", nil)
	rpc, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := root.Issue(certificate.Leaf{Config: csr.Config{Subject: "kms", Names: []string{"127.0.0.1"}, ServerAuth: true}, Public: &rpc.PublicKey, Issued: ratls.Issued{Usage: ratls.UsageKMS}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	k.server = httptest.NewUnstartedServer(http.HandlerFunc(k.serve))
	clients := x509.NewCertPool()
	clients.AddCert(k.temp.Certificate)
	k.server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: rpc}}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients}
	k.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	k.server.StartTLS()
	t.Cleanup(k.server.Close)
	return k
}

func (k *testKMS) serve(w http.ResponseWriter, r *http.Request) {
	k.calls.Add(1)
	if k.refuse.Load() {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"error":"app is not allowed"}`)
		return
	}
	client := r.TLS.PeerCertificates[0]
	if _, err := ratls.FromCertificate(client); err != nil || client.Subject.CommonName != "RA-TLS TEMP Cert" {
		k.t.Errorf("client certificate %s: %v", client.Subject, err)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		k.t.Error(err)
		return
	}
	var req kmsapi.SignCertRequest
	if err := proto.Unmarshal(body, &req); err != nil || req.ApiVersion != 2 || req.VmConfig != testVMConfig || r.URL.String() != "/prpc/SignCert" {
		k.t.Errorf("%s: %+v, %v", r.URL, &req, err)
	}
	asked, err := csr.Open(2, req.Csr, req.Signature)
	if err != nil {
		k.t.Error(err)
		return
	}
	ev, err := container.Decode(asked.Evidence)
	if err != nil || ev.ReportData != ratls.ReportData(asked.SPKI) || reportData(k.t, ev.Quote) != ev.ReportData {
		k.t.Errorf("the evidence in the request: %v", err)
	}
	public, err := x509.ParsePKIXPublicKey(asked.SPKI)
	if err != nil {
		k.t.Error(err)
		return
	}
	leaf, err := k.app.Issue(certificate.Leaf{
		Config: csr.Config{Subject: "from the kms", ClientAuth: true}, Public: public.(*ecdsa.PublicKey), Issued: ratls.Issued{AppID: &testApp, Usage: ratls.UsageApp},
	}, time.Now())
	if err != nil {
		k.t.Error(err)
		return
	}
	reply, err := proto.Marshal(&kmsapi.SignCertResponse{CertificateChain: k.chain([]string{certificate.Encode(leaf), k.app.PEM(), k.roots})})
	if err != nil {
		k.t.Error(err)
	}
	w.Write(reply)
}

// guest is an agent whose keys are from the KMS.
func (k *testKMS) guest(url string) (*initrpc.Config, *fakeInit) {
	cfg, init := config(k.t, testManifest)
	appKeys := testKeys(k.t)
	appKeys.CACert, appKeys.AppSignature = k.roots, bytes.Repeat([]byte{1}, 65)
	appKeys.Provider = keys.Provider{Kind: keys.KMS, URL: url, SPKI: k.root.RawSubjectPublicKeyInfo, TempCAKey: k.tempPEM, TempCACert: k.temp.PEM()}
	var err error
	if cfg.AppKeys, err = appKeys.Encode(); err != nil {
		k.t.Fatal(err)
	}
	return cfg, init
}

func TestAKMSSignsCertificates(t *testing.T) {
	k := newTestKMS(t)
	cfg, init := k.guest(k.server.URL + "/prpc")
	g := serve(t, cfg, init, Options{})
	leaf, got := tlsKey(t, g, &agentpb.GetTlsKeyArgs{Subject: "x", UsageServerAuth: true})
	if len(got.CertificateChain) != 3 || leaf.Subject.CommonName != "from the kms" {
		t.Errorf("chain %v", got.CertificateChain)
	}
	claims, err := ratls.IssuerClaims(leaf)
	if err != nil || *claims.AppID != testApp {
		t.Errorf("claims %+v, %v", claims, err)
	}
	if !strings.Contains(g.info().app.AppCert, "BEGIN CERTIFICATE") || k.calls.Load() != 2 {
		t.Errorf("Info has %q after %d calls", g.info().app.AppCert, k.calls.Load())
	}
	k.refuse.Store(true)
	if err := g.dstack(t).Call(context.Background(), "GetTlsKey", &agentpb.GetTlsKeyArgs{}, nil); fault.Code(err) != "kms_sign_failed" || !strings.Contains(err.Error(), "app is not allowed") {
		t.Errorf("a KMS that refuses: %v", err)
	}
	// Keys need no KMS.
	if err := g.dstack(t).Call(context.Background(), "GetKey", &agentpb.GetKeyArgs{}, nil); err != nil {
		t.Error(err)
	}
}

func TestAKMSThatIsNotTheOneIsNotAsked(t *testing.T) {
	k, other := newTestKMS(t), newTestKMS(t)
	for name, url := range map[string]string{"another root": other.server.URL + "/prpc", "nobody": "https://127.0.0.1:1/prpc", "another name": strings.Replace(k.server.URL, "127.0.0.1", "localhost", 1) + "/prpc"} {
		cfg, init := k.guest(url)
		g := serve(t, cfg, init, Options{}) // it starts all the same
		if g.info().app.AppCert != "" {
			t.Errorf("%s: there is a certificate", name)
		}
		if err := g.dstack(t).Call(context.Background(), "GetTlsKey", &agentpb.GetTlsKeyArgs{}, nil); fault.Code(err) != "kms_sign_failed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if other.calls.Load() != 0 {
		t.Error("a server with another root was asked")
	}
}

func TestChainsThatAKMSShouldNotReturn(t *testing.T) {
	k := newTestKMS(t)
	cfg, init := k.guest(k.server.URL + "/prpc")
	g := serve(t, cfg, init, Options{})
	foreign, _ := newAuthority(t, "foreign", nil)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := k.app.Issue(certificate.Leaf{Public: &key.PublicKey}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func([]string) []string{
		"no certificate":            func([]string) []string { return nil },
		"the leaf alone":            func(c []string) []string { return c[:1] },
		"no app CA":                 func(c []string) []string { return []string{c[0], c[2]} },
		"a foreign app CA":          func(c []string) []string { return []string{c[0], foreign.PEM(), c[2]} },
		"a leaf of another key":     func(c []string) []string { return append([]string{certificate.Encode(stranger)}, c[1:]...) },
		"no PEM":                    func(c []string) []string { return []string{"x", c[1]} },
		"a malformed certificate":   func(c []string) []string { return []string{certificate.Encode([]byte("x")), c[1]} },
		"more certificates than is": func(c []string) []string { return slices.Repeat(c, 3) },
	} {
		k.chain = change
		if err := g.dstack(t).Call(context.Background(), "GetTlsKey", &agentpb.GetTlsKeyArgs{}, nil); fault.Code(err) != "kms_chain" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestKeysThatDoNotBelongTogetherStopTheAgent(t *testing.T) {
	k := newTestKMS(t)
	other, otherPEM := newAuthority(t, "other", nil)
	for name, change := range map[string]func(*keys.AppKeys){
		"the CA's key is another":  func(a *keys.AppKeys) { a.Provider.CAKey = otherPEM },
		"the CA is another":        func(a *keys.AppKeys) { a.CACert = other.PEM() },
		"the CA is no certificate": func(a *keys.AppKeys) { a.CACert = "x" },
		"the KMS has no https": func(a *keys.AppKeys) {
			a.CACert = k.roots
			a.Provider = keys.Provider{Kind: keys.KMS, URL: "http://kms/prpc", TempCAKey: k.tempPEM, TempCACert: k.temp.PEM()}
		},
		"the KMS's root is none": func(a *keys.AppKeys) {
			a.CACert = "x"
			a.Provider = keys.Provider{Kind: keys.KMS, URL: "https://kms/prpc", TempCAKey: k.tempPEM, TempCACert: k.temp.PEM()}
		},
	} {
		cfg, init := config(t, testManifest)
		appKeys := testKeys(t)
		change(appKeys)
		var err error
		if cfg.AppKeys, err = appKeys.Encode(); err != nil {
			t.Fatal(err)
		}
		if _, err := New(context.Background(), cfg, init, Options{}); fault.Code(err) != "app_keys_malformed" {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(cfg.AppKeys, make([]byte, len(cfg.AppKeys))) {
			t.Errorf("%s: the keys were not wiped", name)
		}
	}
	cfg, init := config(t, testManifest)
	cfg.AppKeys = nil
	if _, err := New(context.Background(), cfg, init, Options{}); fault.Code(err) != "app_keys_malformed" {
		t.Errorf("no keys: %v", err)
	}
}

func TestAppInfoNeedsTDX(t *testing.T) {
	cfg, init := config(t, testManifest)
	cfg.TEE = dstack.SEVSNP
	g := serve(t, cfg, init, Options{})
	if err := g.dstack(t).Call(context.Background(), "GetTlsKey", &agentpb.GetTlsKeyArgs{WithAppInfo: true}, nil); fault.Code(err) != "app_info_unavailable" {
		t.Errorf("%v", err)
	}
}

// The three boot events of ACPI tables stay, for verifiers that recompute RTMR0 from
// them; V2 events leave with what upstream's verifier demands.
func TestTheLogInCertificates(t *testing.T) {
	v2, err := eventlog.RuntimeV2("e", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	bare := v2
	bare.Digest, bare.Preimage = nil, nil
	v1, err := eventlog.RuntimeV1("f", nil)
	if err != nil {
		t.Fatal(err)
	}
	stripped := v1
	stripped.Digest = nil
	acpi := eventlog.Event{IMR: 0, EventType: 10, Digest: make([]byte, 48), Payload: []byte("ACPI DATA")}
	got := certLog([]eventlog.Event{{IMR: 0, EventType: 1}, acpi, {IMR: 1, EventType: 10, Payload: []byte("ACPI DATA")}, {IMR: 2}, bare, v1})
	if d := cmp.Diff([]eventlog.Event{acpi, v2, stripped}, got); d != "" {
		t.Error(d)
	}
}
