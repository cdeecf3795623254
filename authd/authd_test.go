// SPDX-License-Identifier: Apache-2.0

package authd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/authority"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/webhook"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var owner = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))

// policyOf signs a policy that allows the app of the vectors on its machine.
func policyOf(t *testing.T, edit func(*policy.Document)) []byte {
	t.Helper()
	d := policy.New(dstack.TrustProduction, time.Now(), 24*time.Hour)
	d.Sequence = 1
	fill := func(b byte, out []byte) {
		for i := range out {
			out[i] = b
		}
	}
	var app policy.App
	fill(0x11, app.AppID[:])
	app.Name, app.AnyName, app.ComposeHashes = "web", true, make([]policy.Compose, 1)
	fill(0x22, app.ComposeHashes[0].Hash[:])
	var device dstack.DeviceID
	fill(0x44, device[:])
	image := policy.Image{Name: "dstack"}
	fill(0x77, image.Hash[:])
	d.Apps, d.Devices.IDs, d.OSImages, d.TCB.Accept = []policy.App{app}, []dstack.DeviceID{device}, []policy.Image{image}, []string{"UpToDate"}
	if edit != nil {
		edit(d)
	}
	text, err := d.Encode()
	if err == nil {
		text, err = policy.Sign(text, owner)
	}
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// sample is of a service of both kinds of nodes on a free port of loopback.
func sample(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	c := DefaultConfig()
	c.DataDir, c.KeyFile = filepath.Join(dir, "data"), filepath.Join(dir, "key")
	c.Listen.Port = 0
	c.Upstream.Enabled, c.Upstream.ImageVerified = true, true
	c.Auth.Policy = authority.Policy{Keys: hex.EncodeToString(owner.Public().(ed25519.PublicKey)), Threshold: 1, File: filepath.Join(dir, "policy.json")}
	write(t, c.Auth.Policy.File, policyOf(t, nil))
	if _, err := NewKey(c.KeyFile); err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t *testing.T, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

var quiet = slog.New(slog.DiscardHandler)

// start runs a service and returns where; it ends with the test, in good order.
func start(t *testing.T, c Config) (*Service, net.Addr) {
	t.Helper()
	s, err := Open(c, quiet, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ready, done := make(chan net.Addr, 1), make(chan error, 1)
	go func() { done <- s.Run(ctx, func(a net.Addr) { ready <- a }) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("it ended with %v", err)
		}
		s.Close()
	})
	select {
	case a := <-ready:
		return s, a
	case err := <-done:
		done <- err
		t.Fatal(err)
		return nil, nil
	}
}

func vector(t *testing.T) []byte {
	t.Helper()
	var v struct {
		Request json.RawMessage `json:"bootAuth_request"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/webhook.json"), &v); err != nil {
		t.Fatal(err)
	}
	return v.Request
}

func request(t *testing.T) governance.Request {
	t.Helper()
	r, err := (&webhook.Upstream{Trust: dstack.TrustProduction, ImageBound: true}).ParseUpstream(governance.App, vector(t))
	if err != nil {
		t.Fatal(err)
	}
	r.At = time.Now()
	return r
}

func public(t *testing.T, c Config) ed25519.PublicKey {
	t.Helper()
	key, err := ReadKey(c.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	return key.Public().(ed25519.PublicKey)
}

func ask(t *testing.T, client *http.Client, url string, body []byte) (int, map[string]any) {
	t.Helper()
	method := http.MethodPost
	if body == nil {
		method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	var out map[string]any
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatalf("%d %s", resp.StatusCode, text)
	}
	return resp.StatusCode, out
}

func TestBothKindsOfNodesAreAnswered(t *testing.T) {
	c := sample(t)
	s, at := start(t, c)
	base := "http://" + at.String()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if code, out := ask(t, client, base+"/bootAuth/app", vector(t)); code != 200 || out["isAllowed"] != true || len(out) != 3 {
		t.Errorf("%d %v", code, out)
	}
	if code, out := ask(t, client, base+"/bootAuth/kms", vector(t)); code != 200 || out["isAllowed"] != false || out["reason"] == "" {
		t.Errorf("%d %v", code, out)
	}
	if code, out := ask(t, client, base+"/health", nil); code != 200 || out["status"] != "ok" {
		t.Errorf("%d %v", code, out)
	}
	if code, out := ask(t, client, base+"/", nil); code != 200 || out["status"] != "ok" {
		t.Errorf("%d %v", code, out)
	}
	ours := &webhook.Authority{URL: base, Key: public(t, c)}
	if d, err := ours.Decide(t.Context(), request(t)); err != nil || !d.Allowed {
		t.Errorf("%+v %v", d, err)
	}
	other := request(t)
	other.Boot.ComposeHash[0]++
	if d, err := ours.Decide(t.Context(), other); err != nil || d.Allowed || d.Code != "compose_hash_not_allowed" {
		t.Errorf("%+v %v", d, err)
	}
	// Another key's answers are not taken.
	ours.Key = owner.Public().(ed25519.PublicKey)
	if d, err := ours.Decide(t.Context(), request(t)); fault.Code(err) != "webhook_signature" || d.Allowed {
		t.Errorf("%+v %v", d, err)
	}

	// A newer policy, an older one, and none.
	ours.Key = public(t, c)
	write(t, c.Auth.Policy.File, policyOf(t, func(d *policy.Document) {
		d.Sequence = 2
		d.Apps[0].ComposeHashes[0].Revoked = &policy.Revocation{Reason: "leaks", At: d.Issued}
	}))
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	if d, err := ours.Decide(t.Context(), request(t)); err != nil || d.Code != "compose_hash_revoked" {
		t.Errorf("%+v %v", d, err)
	}
	write(t, c.Auth.Policy.File, policyOf(t, nil))
	if err := s.Reload(); err == nil {
		t.Error("an older policy was taken")
	}
	os.Remove(c.Auth.Policy.File)
	if err := s.Reload(); fault.Code(err) != "authority_policy" {
		t.Error(err)
	}
	if d, err := ours.Decide(t.Context(), request(t)); err != nil || d.Code != "compose_hash_revoked" {
		t.Errorf("%+v %v", d, err)
	}
	// One process at a time.
	if _, err := Open(c, quiet, nil); fault.Code(err) != "auth_data" {
		t.Error(err)
	}
}

func TestWithoutUpstreamOnlySignedAnswersAreGiven(t *testing.T) {
	c := sample(t)
	c.Upstream.Enabled = false
	_, at := start(t, c)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if code, out := ask(t, client, "http://"+at.String()+"/bootAuth/app", vector(t)); code != 400 || out["isAllowed"] != false {
		t.Errorf("%d %v", code, out)
	}
}

func TestItStartsAgainWithTheNewestPolicy(t *testing.T) {
	c := sample(t)
	write(t, c.Auth.Policy.File, policyOf(t, func(d *policy.Document) { d.Sequence, d.Apps = 5, nil }))
	s, err := Open(c, quiet, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	write(t, c.Auth.Policy.File, policyOf(t, nil)) // sequence 1, which allows
	if s, err = Open(c, quiet, nil); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	d, err := s.authority.Decide(t.Context(), request(t))
	if err != nil || d.Allowed || d.Code != "app_unknown" {
		t.Errorf("%+v %v", d, err)
	}
}

func TestASocketIsItsOwners(t *testing.T) {
	c := sample(t)
	c.Listen.Socket = filepath.Join(t.TempDir(), "auth.sock")
	if l, err := net.Listen("unix", c.Listen.Socket); err == nil { // left by one that was killed
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
	}
	start(t, c)
	if fi, err := os.Stat(c.Listen.Socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi, err)
	}
	a := &webhook.Authority{URL: "unix://" + c.Listen.Socket, Key: public(t, c)}
	if d, err := a.Decide(t.Context(), request(t)); err != nil || !d.Allowed {
		t.Errorf("%+v %v", d, err)
	}
}

func TestTLSAndClientCertificates(t *testing.T) {
	c, dir := sample(t), t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "auth"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, &x509.Certificate{Subject: pkix.Name{CommonName: "auth"}}, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	c.Listen.Cert, c.Listen.Key, c.Listen.ClientCA = filepath.Join(dir, "cert"), filepath.Join(dir, "key"), filepath.Join(dir, "cert")
	write(t, c.Listen.Cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, c.Listen.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	_, at := start(t, c)
	roots := x509.NewCertPool()
	cert, _ := x509.ParseCertificate(der)
	roots.AddCert(cert)
	for _, with := range []bool{true, false} {
		conf := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}
		if with {
			conf.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
		}
		a := &webhook.Authority{URL: "https://" + at.String(), Key: public(t, c), HTTP: &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}}}
		d, err := a.Decide(t.Context(), request(t))
		if with != (err == nil && d.Allowed) {
			t.Errorf("with a certificate %v: %+v %v", with, d, err)
		}
	}
	c.Listen.ClientCA = c.Listen.Key
	c.DataDir = t.TempDir()
	if _, err := Open(c, quiet, nil); fault.Code(err) != "auth_config" {
		t.Error(err)
	}
}

// Threat G04: what would let somebody between alter answers is no default, and does not
// start unsaid.
func TestThreat_G04_PlainHTTPToOthersMustBeSaid(t *testing.T) {
	good := sample(t)
	for name, c := range map[string]struct {
		edit func(*Config)
		code string
	}{
		"as it is":                  {func(*Config) {}, ""},
		"every address":             {func(c *Config) { c.Listen.Address = "0.0.0.0" }, "auth_plain_http"},
		"every address of IPv6":     {func(c *Config) { c.Listen.Address = "::" }, "auth_plain_http"},
		"another machine's network": {func(c *Config) { c.Listen.Address = "10.0.2.2" }, "auth_plain_http"},
		"said":                      {func(c *Config) { c.Listen.Address, c.Listen.InsecureHTTP = "0.0.0.0", true }, ""},
		"with TLS":                  {func(c *Config) { c.Listen.Address, c.Listen.Cert, c.Listen.Key = "0.0.0.0", "/c", "/k" }, ""},
		"a name":                    {func(c *Config) { c.Listen.Address = "localhost" }, "auth_config"},
		"half of TLS":               {func(c *Config) { c.Listen.Cert = "/c" }, "auth_config"},
		"clients without TLS":       {func(c *Config) { c.Listen.ClientCA = "/c" }, "auth_config"},
		"TLS on a socket":           {func(c *Config) { c.Listen.Socket, c.Listen.Cert, c.Listen.Key = "/s", "/c", "/k" }, "auth_config"},
		"a relative socket":         {func(c *Config) { c.Listen.Socket = "s" }, "auth_config"},
		"a relative directory":      {func(c *Config) { c.DataDir = "d" }, "auth_config"},
		"nobody to answer":          {func(c *Config) { c.KeyFile, c.Upstream.Enabled = "", false }, "auth_config"},
		"upstream alone":            {func(c *Config) { c.KeyFile = "" }, ""},
		"trust that is none":        {func(c *Config) { c.Upstream.Trust = "" }, "auth_config"},
		"no authority":              {func(c *Config) { c.Auth.Type = "" }, "auth_config"},
		"one that allows all":       {func(c *Config) { c.Auth.Type = "dev" }, "auth_config"},
		"a policy of nobody":        {func(c *Config) { c.Auth.Policy.Keys = "" }, "auth_config"},
		"a policy without a file":   {func(c *Config) { c.Auth.Policy.File = "" }, "auth_config"},
		"a chain of nothing":        {func(c *Config) { c.Auth.Type = "chain" }, "auth_config"},
		"a chain": {func(c *Config) {
			c.Auth.Type, c.Auth.Chain = "chain", authority.Chain{RPC: "http://127.0.0.1:1", Threshold: 1, ChainID: 1, Registry: "0x" + strings.Repeat("aa", 20)}
		}, ""},
	} {
		conf := good
		c.edit(&conf)
		if err := conf.Check(); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %q", name, err, c.code)
		}
	}
	file := filepath.Join(t.TempDir(), "auth.toml")
	write(t, file, []byte("[listen]\nadress = \"127.0.0.1\"\n"))
	if _, err := LoadConfig(file, nil); fault.Code(err) != "config_unknown_key" {
		t.Error(err)
	}
	write(t, file, []byte("[upstream]\nenabled = true\n[auth]\ntype = \"policy\"\n[auth.policy]\nfile = \"/p\"\nthreshold = 1\n"))
	if c, err := LoadConfig(file, []string{"DSTACK_AUTH_AUTH__POLICY__KEYS=" + good.Auth.Policy.Keys}); err != nil || c.Listen.Address != "127.0.0.1" {
		t.Error(c, err)
	}
}

// A chain that cannot be asked denies, and the service says so.
func TestAChainThatIsAwayDenies(t *testing.T) {
	c := sample(t)
	c.Auth.Type, c.Auth.Chain = "chain", authority.Chain{RPC: "http://127.0.0.1:1/secret", Threshold: 1, ChainID: 1, Registry: "0x" + strings.Repeat("aa", 20)}
	_, at := start(t, c)
	base, client := "http://"+at.String(), &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if code, out := ask(t, client, base+"/bootAuth/app", vector(t)); code != 200 || out["isAllowed"] != false || out["reason"] != "authorization backend unavailable" {
		t.Errorf("%d %v", code, out)
	}
	if d, err := (&webhook.Authority{URL: base, Key: public(t, c)}).Decide(t.Context(), request(t)); err != nil || d.Allowed || d.Code != "chain_no_agreement" {
		t.Errorf("%+v %v", d, err)
	}
	if code, out := ask(t, client, base+"/health", nil); code != 503 || out["code"] != "chain_no_agreement" {
		t.Errorf("%d %v", code, out)
	}
	if code, out := ask(t, client, base+"/", nil); code != 500 || out["message"] != "authorization backend unavailable" {
		t.Errorf("%d %v", code, out)
	}
}

func TestKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	made, err := NewKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if key, err := ReadKey(path); err != nil || !made.Equal(key.Public()) {
		t.Error(err)
	}
	if _, err := NewKey(path); fault.Code(err) != "auth_key" {
		t.Errorf("a key was replaced: %v", err)
	}
	os.Chmod(path, 0o644)
	if _, err := ReadKey(path); fault.Code(err) != "auth_key" {
		t.Errorf("others may read it: %v", err)
	}
	write(t, path+"2", []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	for _, p := range []string{path + "2", path + "3", t.TempDir()} {
		if _, err := ReadKey(p); fault.Code(err) != "auth_key" {
			t.Errorf("%s: %v", p, err)
		}
	}
}
