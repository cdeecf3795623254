// SPDX-License-Identifier: Apache-2.0

package agent

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
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstack-go/dstack"
	agentpb "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
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
	for _, e := range leaf.Extensions[1:] { // the first names the CA's key, which upstream leaves out
		order = append(order, e.Id.String())
		if critical := e.Id.Equal(oidKeyUsage); e.Critical != critical {
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
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage)+len(leaf.DNSNames)+len(leaf.IPAddresses) != 0 || len(leaf.Extensions) != 3 {
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
		{"a beginning after the CA's end", "certificate_validity", "", &agentpb.GetTlsKeyArgs{NotBefore: at(maxUnix - 1)}},
		{"a year of five digits", "certificate_validity", "", &agentpb.GetTlsKeyArgs{NotAfter: at(maxUnix + 1)}},
		{"the largest number", "certificate_validity", "", &agentpb.GetTlsKeyArgs{NotBefore: at(1<<64 - 1)}},
		{"a name that is not ASCII", "certificate_name", "", &agentpb.GetTlsKeyArgs{AltNames: []string{"straße.example"}}},
		{"a name with a zero", "certificate_name", "", &agentpb.GetTlsKeyArgs{AltNames: []string{"a.example\x00.b.example"}}},
		{"an empty name", "certificate_name", "", &agentpb.GetTlsKeyArgs{AltNames: []string{""}}},
		{"too many names", "certificate_name", "", &agentpb.GetTlsKeyArgs{AltNames: slices.Repeat([]string{"a"}, maxAltNames+1)}},
		{"a long subject", "certificate_name", "", &agentpb.GetTlsKeyArgs{Subject: strings.Repeat("x", maxNames+1)}},
	} {
		err := g.dstack(t).Call(context.Background(), "GetTlsKey", c.req, nil)
		if fault.Code(err) != c.code || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want code %s", c.name, err, c.code)
		}
	}
	// Nobody outlives the CA.
	leaf, got := tlsKey(t, g, &agentpb.GetTlsKeyArgs{NotAfter: at(maxUnix)})
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

func (failingIssuer) issue(context.Context, *ecdsa.PrivateKey, certRequest) ([]string, error) {
	return nil, fault.New("kms_sign_failed", "no")
}

func TestSigningRequestsAreUpstreams(t *testing.T) {
	var v struct {
		Cases []struct {
			Confirm   string
			PubkeyHex string   `json:"pubkey_hex"`
			Subject   string   `json:"subject"`
			AltNames  []string `json:"subject_alt_names"`
			Server    bool     `json:"usage_server_auth"`
			Client    bool     `json:"usage_client_auth"`
			Quote     bool     `json:"ext_quote"`
			AppInfo   bool     `json:"ext_app_info"`
			NotBefore *uint64  `json:"not_before"`
			NotAfter  *uint64  `json:"not_after"`
			ScaleHex  string   `json:"scale_hex"`
		}
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/csr-v2.json"), &v); err != nil {
		t.Fatal(err)
	}
	for i, c := range v.Cases {
		r := certRequest{subject: c.Subject, altNames: c.AltNames, serverAuth: c.Server, clientAuth: c.Client, raTLS: c.Quote, appInfo: c.AppInfo, notBefore: c.NotBefore, notAfter: c.NotAfter}
		want := unhex(t, c.ScaleHex)
		head := signingRequest(unhex(t, c.PubkeyHex), r, nil)
		if c.Confirm != csrWord || !bytes.HasPrefix(want, head) {
			t.Fatalf("case %d: %x\nwant %x", i, head, want)
		}
		// The rest is the evidence, whole.
		ev, err := container.Decode(want[len(head):])
		if err != nil {
			t.Fatalf("case %d: %v", i, err)
		}
		again, err := container.EncodeV0(ev)
		if err != nil || !bytes.Equal(signingRequest(unhex(t, c.PubkeyHex), r, again), want) {
			t.Errorf("case %d: other bytes, %v", i, err)
		}
	}
	if len(v.Cases) != 2 {
		t.Errorf("%d cases", len(v.Cases))
	}
	for n, want := range map[uint64]string{0: "00", 63: "fc", 64: "0101", 16383: "fdff", 16384: "02000100", 1<<30 - 1: "feffffff"} {
		if got := hex.EncodeToString(appendCompact(nil, n)); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
	from, to := uint64(1), uint64(1<<40)
	got := signingRequest(nil, certRequest{altNames: []string{"a", "bc"}, clientAuth: true, appInfo: true, notBefore: &from, notAfter: &to}, []byte{9})
	if want := hex.EncodeToString(append(appendCompact(nil, 17), csrWord...)) + "00" + "00" + "00" + "08" + "0461" + "086263" + "00" + "01" + "00" + "01" + "010100000000000000" + "010000000000010000" + "09"; hex.EncodeToString(got) != want {
		t.Errorf("%x\nwant %s", got, want)
	}
}

// testKMS signs as a KMS does, and checks what it is asked.
type testKMS struct {
	t       *testing.T
	server  *httptest.Server
	roots   string // PEM
	temp    *authority
	tempPEM []byte
	app     *authority
	root    *x509.Certificate
	chain   func([]string) []string // changes the answer
	calls   atomic.Int32
	refuse  atomic.Bool
}

func newAuthority(t *testing.T, name string, parent *authority) (*authority, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	signer, by := key, template
	if parent != nil {
		signer, by = parent.key.(*ecdsa.PrivateKey), parent.cert
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

func newTestKMS(t *testing.T) *testKMS {
	k := &testKMS{t: t, chain: func(c []string) []string { return c }}
	root, _ := newAuthority(t, "KMS root", nil)
	k.root, k.roots = root.cert, certPEM(root.cert.Raw)
	k.app, _ = newAuthority(t, "app CA", root)
	k.temp, k.tempPEM = newAuthority(t, "temp CA", nil)
	rpc, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := root.sign(&rpc.PublicKey, certRequest{subject: "kms", altNames: []string{"127.0.0.1"}, serverAuth: true}, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	k.server = httptest.NewUnstartedServer(http.HandlerFunc(k.serve))
	clients := x509.NewCertPool()
	clients.AddCert(k.temp.cert)
	k.server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: rpc}}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients}
	k.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	k.server.StartTLS()
	t.Cleanup(k.server.Close)
	return k
}

func (k *testKMS) serve(w http.ResponseWriter, r *http.Request) {
	k.calls.Add(1)
	if k.refuse.Load() {
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"error":"app is not allowed"}`)
		return
	}
	client := r.TLS.PeerCertificates[0]
	if _, err := ratls.FromCertificate(client); err != nil || client.Subject.CommonName != "RA-TLS TEMP Cert" {
		k.t.Errorf("client certificate %s: %v", client.Subject, err)
	}
	var req struct {
		Version   int    `json:"api_version"`
		CSR       string `json:"csr"`
		Signature string `json:"signature"`
		VMConfig  string `json:"vm_config"`
	}
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Version != 2 || req.VMConfig != testVMConfig || r.URL.String() != "/prpc/SignCert?json" {
		k.t.Errorf("%s: %+v, %v", r.URL, req, err)
	}
	csr, signature := unhex(k.t, req.CSR), unhex(k.t, req.Signature)
	// Word (1+17 bytes), then the key with a length of two bytes.
	spki := csr[18+2 : 18+2+int(csr[18]>>2|csr[19]<<6)]
	public, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		k.t.Error(err)
		return
	}
	sum := sha256.Sum256(csr)
	if !ecdsa.VerifyASN1(public.(*ecdsa.PublicKey), sum[:], signature) {
		k.t.Error("the request is not signed by the key that it names")
	}
	custom, _ := ratls.Extensions(ratls.Issued{AppID: &testApp, Usage: ratls.UsageApp}, nil)
	leaf, err := k.app.sign(public.(*ecdsa.PublicKey), certRequest{subject: "from the kms", clientAuth: true}, custom, time.Now())
	if err != nil {
		k.t.Error(err)
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"certificate_chain": k.chain([]string{certPEM(leaf), certPEM(k.app.cert.Raw), k.roots})})
}

// guest is an agent whose keys are from the KMS.
func (k *testKMS) guest(url string) (*initrpc.Config, *fakeInit) {
	cfg, init := config(k.t, testManifest)
	appKeys := testKeys(k.t)
	appKeys.CACert, appKeys.AppSignature = k.roots, bytes.Repeat([]byte{1}, 65)
	appKeys.Provider = keys.Provider{Kind: keys.KMS, URL: url, SPKI: k.root.RawSubjectPublicKeyInfo, TempCAKey: k.tempPEM, TempCACert: certPEM(k.temp.cert.Raw)}
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
	stranger, err := k.app.sign(&key.PublicKey, certRequest{}, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func([]string) []string{
		"no certificate":            func([]string) []string { return nil },
		"the leaf alone":            func(c []string) []string { return c[:1] },
		"no app CA":                 func(c []string) []string { return []string{c[0], c[2]} },
		"a foreign app CA":          func(c []string) []string { return []string{c[0], certPEM(foreign.cert.Raw), c[2]} },
		"a leaf of another key":     func(c []string) []string { return append([]string{certPEM(stranger)}, c[1:]...) },
		"no PEM":                    func(c []string) []string { return []string{"x", c[1]} },
		"a malformed certificate":   func(c []string) []string { return []string{certPEM([]byte("x")), c[1]} },
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
		"the CA is another":        func(a *keys.AppKeys) { a.CACert = certPEM(other.cert.Raw) },
		"the CA is no certificate": func(a *keys.AppKeys) { a.CACert = "x" },
		"the KMS has no https": func(a *keys.AppKeys) {
			a.CACert = k.roots
			a.Provider = keys.Provider{Kind: keys.KMS, URL: "http://kms/prpc", TempCAKey: k.tempPEM, TempCACert: certPEM(k.temp.cert.Raw)}
		},
		"the KMS's root is none": func(a *keys.AppKeys) {
			a.CACert = "x"
			a.Provider = keys.Provider{Kind: keys.KMS, URL: "https://kms/prpc", TempCAKey: k.tempPEM, TempCACert: certPEM(k.temp.cert.Raw)}
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
