// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/channel/appraiser"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/privateca"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/verifier"
)

// Pebble has no end, and who keeps a lock of CertMagic's files fresh sees its end late.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/letsencrypt/pebble/v2/va.VAImpl.processTasks"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"))
}

const base = "apps.example"

var (
	gatewayApp  = dstack.AppID{0x9a}
	gatewayHash = dstack.ComposeHash{0x9a, 1}
	image       = dstack.ImageHash{0x1a}
	network     = netip.MustParsePrefix("100.96.0.0/11")
)

// peers is a tunnel that only remembers.
type peers struct {
	mu   sync.Mutex
	list map[wgconfig.PublicKey]wgconfig.Peer
	sets int
	fail error
}

func (p *peers) Set(x wgconfig.Peer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail != nil {
		return p.fail
	}
	p.list[x.Key] = x
	p.sets++
	return nil
}

func (p *peers) Remove(k wgconfig.PublicKey) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.list, k)
	return nil
}

func (p *peers) Peers() ([]wgconfig.Status, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []wgconfig.Status
	for _, x := range p.list {
		at, _ := x.Endpoint.Addr()
		out = append(out, wgconfig.Status{Key: x.Key, Endpoint: at, Allowed: []netip.Prefix{netip.PrefixFrom(x.Address, 32)}})
	}
	return out, nil
}

// world is a gateway with real channels and evidence whose form and signatures are those
// of real hardware.
type world struct {
	t        testing.TB
	platform *tdxtest.Platform
	self     *tdxtest.Guest
	table    *route.Table
	tunnel   gateway.Tunnel
	peers    *peers // tunnel, unless another was given
	ca       *privateca.CA
	caFile   string
	service  *gateway.Service
	key      wgconfig.PrivateKey
	addr     string
	manifest []byte
	now      func() time.Time
	passed   atomic.Int64
}

func (w *world) pass(d time.Duration) { w.passed.Add(int64(d)) }

func newWorld(t testing.TB, edit func(*world, *gateway.Config)) *world {
	t.Helper()
	w := &world{t: t, platform: tdxtest.New(t), peers: &peers{list: map[wgconfig.PublicKey]wgconfig.Peer{}}, key: wgconfig.GeneratePrivateKey()}
	w.tunnel = w.peers
	w.now = func() time.Time { return tdxtest.At.Add(time.Duration(w.passed.Load())) }
	w.self = &tdxtest.Guest{Platform: w.platform, AppID: gatewayApp, InstanceID: dstack.InstanceID{9}, ComposeHash: gatewayHash, Config: `{"os_image_hash":"` + image.String() + `"}`}
	own := netip.MustParseAddr("100.96.0.1")
	w.table = route.New(route.Config{Now: w.now, Key: w.key.Public(), Address: own, Network: network})
	var err error
	dir := t.TempDir()
	w.caFile = filepath.Join(dir, privateca.CertFile)
	if w.ca, err = privateca.Open(dir, []hostname.Name{base}, func() time.Time { return w.now() }); err != nil {
		t.Fatal(err)
	}
	w.manifest, err = manifest.Build(manifest.Draft{Name: "shop", DockerComposeFile: "services: {}\n", GatewayEnabled: true,
		PortPolicy: &manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 8080, TLS: manifest.TLSApp}, {Port: 80, TLS: manifest.TLSApp}}}})
	if err != nil {
		t.Fatal(err)
	}
	cfg := gateway.Config{
		Judge: &applicant.Judge{Roots: []attest.Roots{w.platform.Roots()}, Development: true, Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: w.platform.Collateral()}}, Now: w.now},
		Self:  w.self, Admission: gateway.AnyAttested{}, Routes: w.table, Tunnel: w.tunnel, Certificates: w.ca, Certificate: w.ca.GetCertificate,
		Domains: func() []gateway.Domain { return []gateway.Domain{{Name: base, Port: 443}} },
		Node:    gateway.Node{ID: 1, URL: "https://gateway.example:8000", Key: w.key.Public(), Address: netip.PrefixFrom(own, network.Bits()), Endpoint: "gateway.example:51820"},
		Now:     w.now, Version: "test",
	}
	if edit != nil {
		edit(w, &cfg)
	}
	if w.service, err = gateway.New(cfg); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.service.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

// instance is a guest with a channel key that its init committed to.
type instance struct {
	w      *world
	guest  *tdxtest.Guest
	signer crypto.Signer
	key    *channel.Key
	wg     wgconfig.PrivateKey
	timed  bool // judges at the time of the platform's collateral
}

func (w *world) instance(app, n byte) *instance {
	w.t.Helper()
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	key, err := channel.KeyOf(signer)
	if err != nil {
		w.t.Fatal(err)
	}
	m, err := manifest.Parse(w.manifest)
	if err != nil {
		w.t.Fatal(err)
	}
	return &instance{w: w, signer: signer, key: key, wg: wgconfig.GeneratePrivateKey(), guest: &tdxtest.Guest{
		Platform: w.platform, AppID: dstack.AppID{app}, InstanceID: dstack.InstanceID{app, n}, ComposeHash: m.Hash(),
		ChannelSPKI: key.SPKI(), Config: `{"os_image_hash":"` + image.String() + `"}`,
	}}
}

// appraiser is how a guest knows the gateway.
func (w *world) appraiser() *appraiser.Appraiser {
	app := gatewayApp
	pol := verifier.Policy{TCB: verifier.TCBPolicy{Accept: []string{"UpToDate"}}, Workload: verifier.WorkloadPolicy{AppID: &app, ComposeHashes: []dstack.ComposeHash{gatewayHash}}}
	pol.Image.AllowUnanchored, pol.DevRoots = true, true
	return &appraiser.Appraiser{Roots: []attest.Roots{w.platform.Roots()}, Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: w.platform.Collateral()}}, Policy: pol}
}

func (i *instance) config() *channel.Config {
	return &channel.Config{Appraiser: i.w.appraiser(), Intended: channel.Intended{AppID: gatewayApp}, Attester: i.guest, Key: i.key, AppEvidence: true, Now: i.w.now}
}

// call asks the gateway over an attested channel.
func (i *instance) call(method string, req, resp any) error {
	i.w.t.Helper()
	cfg := i.config()
	if i.timed {
		cfg.Appraiser = timed{cfg.Appraiser}
	}
	tr := cfg.Transport()
	defer tr.CloseIdleConnections()
	c := &prpc.Client{BaseURL: "https://" + i.w.addr + "/prpc", HTTP: &http.Client{Transport: tr}}
	switch r := req.(type) {
	case *api.RegisterCvmRequest:
		return c.Call(i.w.t.Context(), method, r, resp.(*api.RegisterCvmResponse))
	default:
		return c.Call(i.w.t.Context(), method, req.(*api.GetCertificateRequest), resp.(*api.GetCertificateResponse))
	}
}

func (i *instance) request() *api.RegisterCvmRequest {
	k := i.wg.Public().Bytes()
	return &api.RegisterCvmRequest{ClientPublicKey: base64.StdEncoding.EncodeToString(k[:]), AppCompose: bytes.Clone(i.w.manifest)}
}

func (i *instance) register(edit func(*api.RegisterCvmRequest)) (*api.RegisterCvmResponse, error) {
	r := i.request()
	if edit != nil {
		edit(r)
	}
	out := new(api.RegisterCvmResponse)
	return out, i.call("RegisterCvm", r, out)
}

func (i *instance) csr(signer crypto.Signer, names ...string) []byte {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: names}, signer)
	if err != nil {
		i.w.t.Fatal(err)
	}
	return der
}

// stranger is a client of plain TLS.
func (w *world) stranger(certs ...tls.Certificate) *prpc.Client {
	roots := x509.NewCertPool()
	cert, err := w.ca.GetCertificate(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	roots.AddCert(cert.Leaf)
	tr := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "gateway." + base, Certificates: certs, Time: w.now}}
	return &prpc.Client{BaseURL: "https://" + w.addr + "/prpc", HTTP: &http.Client{Transport: tr}}
}

func endpointOf(t *testing.T, text string) wgconfig.Endpoint {
	t.Helper()
	e, err := wgconfig.ParseEndpoint(text)
	if err != nil {
		t.Fatal(err)
	}
	return e
}
