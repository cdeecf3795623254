// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/releaselog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a KMS with real keys, log, policy, TLS and channels, and guests on a
// platform whose quotes have the form and the signatures of real ones.
type world struct {
	t        testing.TB
	platform *tdxtest.Platform
	self     *tdxtest.Guest // the KMS as an app
	roots    *custody.Roots
	owner    ed25519.PrivateKey // of the policy
	policy   *policy.Authority
	doc      *policy.Document
	log      *releaselog.Log
	logDir   string
	service  *Service
	addr     string
	asked    *asked

	mu  sync.Mutex
	now time.Time
}

// asked counts what the authority is asked.
type asked struct {
	governance.Authority
	mu sync.Mutex
	n  map[governance.Purpose]int
}

func (a *asked) Decide(ctx context.Context, r governance.Request) (governance.Decision, error) {
	a.mu.Lock()
	a.n[r.Purpose]++
	a.mu.Unlock()
	return a.Authority.Decide(ctx, r)
}

func (a *asked) times(p governance.Purpose) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.n[p]
}

var (
	appA    = dstack.AppID{0xa}
	appB    = dstack.AppID{0xb}
	kmsApp  = dstack.AppID{0xcc}
	good    = dstack.ComposeHash{0xc0}
	evil    = dstack.ComposeHash{0xee}
	image   = dstack.ImageHash{0x1a}
	kmsHash = dstack.ComposeHash{0xc5}

	kmsImage = dstack.ImageHash{0x2b}
)

func (w *world) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

// guest is an instance of an app, that boots.
func (w *world) guest(app dstack.AppID, hash dstack.ComposeHash) *tdxtest.Guest {
	return &tdxtest.Guest{
		Platform: w.platform, AppID: app, InstanceID: dstack.InstanceID{1}, ComposeHash: hash, Booting: true,
		Config: `{"os_image_hash":"` + image.String() + `"}`,
	}
}

// newWorld starts a KMS whose policy edit has the last word on.
func newWorld(t testing.TB, edit func(*policy.Document), options ...func(*Config)) *world {
	t.Helper()
	roots, err := custody.Generate(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return newWorldOf(t, roots, edit, options...)
}

// newWorldOf starts a KMS of known roots.
func newWorldOf(t testing.TB, roots *custody.Roots, edit func(*policy.Document), options ...func(*Config)) *world {
	t.Helper()
	w := &world{t: t, platform: tdxtest.New(t), now: tdxtest.At}
	w.self = w.guest(kmsApp, kmsHash)
	w.self.Booting = false
	w.self.Config = `{"os_image_hash":"` + kmsImage.String() + `"}`
	var err error
	w.roots = roots
	t.Cleanup(w.roots.Wipe)
	w.logDir = filepath.Join(t.TempDir(), "log")
	w.log, err = releaselog.Create(t.Context(), w.logDir, w.roots.Identity().CA, func(ctx context.Context, d []byte) ([]byte, error) {
		return w.roots.Attest(ctx, custody.PurposeReleaseLog, d)
	})
	w.check(err)
	t.Cleanup(func() { w.log.Close() })

	_, w.owner, err = ed25519.GenerateKey(rand.Reader)
	w.check(err)
	w.policy, err = policy.OpenAuthority(filepath.Join(t.TempDir(), "policy.json"),
		policy.Keys{Keys: []ed25519.PublicKey{w.owner.Public().(ed25519.PublicKey)}, Threshold: 1}, w.clock)
	w.check(err)
	w.doc = w.basePolicy()
	if edit != nil {
		edit(w.doc)
	}
	w.submit()
	w.asked = &asked{Authority: w.policy, n: map[governance.Purpose]int{}}

	temp, tempKey, err := NewTempCA(nil, w.clock())
	w.check(err)
	c := Config{
		Custodian: w.roots, Exporter: w.roots, Eraser: w.roots, Authority: w.asked, Policies: w.policy, Judge: w.judge(), Log: w.log, TempCA: temp, TempCAKey: tempKey,
		Names: []string{"kms.test", "127.0.0.1"}, Self: w.self, Development: true, Now: w.clock, Limits: Limits{PeerRate: 1e6, AppRate: 1e6},
	}
	for _, o := range options {
		o(&c)
	}
	w.service, err = New(c)
	w.check(err)
	w.addr = w.serve(w.service)
	return w
}

func (w *world) judge() *applicant.Judge {
	return &applicant.Judge{
		Roots: []attest.Roots{w.platform.Roots()}, Development: true, Now: w.clock,
		Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: w.platform.Collateral()}},
	}
}

// serve runs a service until the test ends.
func (w *world) serve(s *Service) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.check(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	return l.Addr().String()
}

// basePolicy allows app A with the good manifest, and the KMS itself, on the platform.
func (w *world) basePolicy() *policy.Document {
	a := w.applicant(w.self)
	d := policy.New(dstack.TrustDevelopment, w.clock(), 24*time.Hour)
	launch := map[string]policy.Register{}
	for _, r := range []string{"mrtd", "rtmr0", "rtmr1", "rtmr2"} {
		launch[r] = policy.Register(a.Request.Launch[r])
	}
	d.OSImages = []policy.Image{
		{Hash: image, Dev: true, Epoch: 1, Launch: []map[string]policy.Register{launch}},
		{Hash: kmsImage, Dev: true, Epoch: 9, Launch: []map[string]policy.Register{maps.Clone(launch)}},
	}
	d.Devices = policy.Devices{IDs: []dstack.DeviceID{a.Request.Boot.DeviceID}}
	d.TCB = policy.TCB{Accept: []string{"UpToDate"}}
	app, hash, img := kmsApp, kmsHash, kmsImage
	d.KMS = policy.KMS{Allow: []policy.Member{{AppID: &app, ComposeHash: &hash, OSImageHash: &img}}, Devices: d.Devices.IDs}
	d.Apps = []policy.App{{AppID: appA, ComposeHashes: []policy.Compose{{Hash: good}}, Names: []string{"*.apps.test"}}}
	return d
}

// applicant is what the KMS makes of a guest.
func (w *world) applicant(g *tdxtest.Guest) *applicant.Applicant {
	w.t.Helper()
	raw, err := g.Attest(context.Background(), dstack.ReportData{})
	w.check(err)
	a, err := w.judge().Judge(context.Background(), applicant.Evidence{Container: raw})
	w.check(err)
	return a
}

// submit signs the document and puts it in force.
func (w *world) submit() {
	w.t.Helper()
	w.check(w.policy.Update(w.signed()))
}

func (w *world) signed() []byte {
	w.t.Helper()
	text, err := w.doc.Encode()
	w.check(err)
	out, err := policy.Sign(text, w.owner)
	w.check(err)
	return out
}

// change edits the document in force.
func (w *world) change(edit func(*policy.Document)) {
	w.t.Helper()
	w.doc.Sequence++
	edit(w.doc)
	w.submit()
}

// ratls is a client of the KMS as upstream's guests are: evidence of g in a
// certificate, and the KMS known by its root key.
func (w *world) ratls(g *tdxtest.Guest) *prpc.Client {
	return w.client(w.clientCert(g))
}

func (w *world) clientCert(g *tdxtest.Guest) *tls.Certificate {
	w.t.Helper()
	key, evidence := w.keyEvidence(g)
	return w.certOf(key, certificate.Leaf{Config: csr.Config{Subject: "RA-TLS TEMP Cert", ClientAuth: true}, Public: &key.PublicKey, Evidence: evidence})
}

// keyEvidence makes a key, and evidence of g over it.
func (w *world) keyEvidence(g *tdxtest.Guest) (*ecdsa.PrivateKey, []byte) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	w.check(err)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	w.check(err)
	evidence, err := g.Attest(context.Background(), ratls.ReportData(spki))
	w.check(err)
	return key, evidence
}

// certOf has the temporary CA, as anybody can, issue a certificate.
func (w *world) certOf(key *ecdsa.PrivateKey, l certificate.Leaf) *tls.Certificate {
	w.t.Helper()
	ca, err := certificate.Open([]byte(w.service.cfg.TempCA.PEM()), w.service.cfg.TempCAKey)
	w.check(err)
	der, err := ca.Issue(l, w.clock())
	w.check(err)
	return &tls.Certificate{Certificate: [][]byte{der, ca.Certificate.Raw}, PrivateKey: key}
}

// client makes a client that shows a certificate, or none.
func (w *world) client(cert *tls.Certificate) *prpc.Client {
	w.t.Helper()
	cfg, err := channel.Issued{Issuer: w.roots.Identity().CA, Usage: ratls.UsageKMS, Certificate: cert, Now: w.clock}.Config("kms.test")
	w.check(err)
	transport := &http.Transport{TLSClientConfig: cfg, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, w.addr)
	}}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &prpc.Client{BaseURL: "https://kms.test/prpc", HTTP: &http.Client{Transport: transport, Timeout: 30 * time.Second}}
}

// session is a client over an attested channel.
func (w *world) session(g *tdxtest.Guest) *prpc.Client {
	w.t.Helper()
	c := &channel.Config{
		Appraiser: kmsAppraiser{w}, Intended: channel.Intended{AppID: kmsApp}, Attester: g, AppEvidence: true, Now: w.clock, Timeout: 20 * time.Second,
	}
	transport := c.Transport()
	transport.DialTLSContext = w.dialler(transport.DialTLSContext)
	w.t.Cleanup(transport.CloseIdleConnections)
	return &prpc.Client{BaseURL: "https://kms.test/prpc", HTTP: &http.Client{Transport: transport, Timeout: 30 * time.Second}}
}

// dialler leads every address to the KMS.
func (w *world) dialler(dial func(context.Context, string, string) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) { return dial(ctx, network, w.addr) }
}

// bareCert is a certificate of the temporary CA without evidence.
func (w *world) bareCert() *tls.Certificate {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	w.check(err)
	return w.certOf(key, certificate.Leaf{Config: csr.Config{Subject: "x", ClientAuth: true}, Public: &key.PublicKey})
}

// shortCert is clientCert with an end.
func (w *world) shortCert(g *tdxtest.Guest, life time.Duration) *tls.Certificate {
	w.t.Helper()
	key, evidence := w.keyEvidence(g)
	return w.certOf(key, certificate.Leaf{
		Config: csr.Config{Subject: "RA-TLS TEMP Cert", ClientAuth: true}, Public: &key.PublicKey, Evidence: evidence, MaxLifetime: life,
	})
}

// transplant puts the evidence of one certificate into one of another's key.
func (w *world) transplant(from, to *tls.Certificate) [][]byte {
	w.t.Helper()
	leaf, err := x509.ParseCertificate(from.Certificate[0])
	w.check(err)
	e, err := ratls.FromCertificate(leaf)
	w.check(err)
	key := to.PrivateKey.(*ecdsa.PrivateKey)
	return w.certOf(key, certificate.Leaf{Config: csr.Config{Subject: "x", ClientAuth: true}, Public: &key.PublicKey, Evidence: e.Container}).Certificate
}

type kmsAppraiser struct{ w *world }

func (k kmsAppraiser) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	a, err := k.w.judge().Judge(ctx, applicant.Evidence{Container: c.Container, ReportData: c.ReportData, Session: true})
	if err != nil {
		return nil, err
	}
	return a.Appraisal(), nil
}

func call[T any, P interface {
	*T
	proto.Message
}](t testing.TB, c *prpc.Client, method string, req proto.Message) (P, error) {
	t.Helper()
	out := P(new(T))
	err := c.Call(context.Background(), method, req, out)
	return out, err
}

func wantCode(t testing.TB, err error, code string) {
	t.Helper()
	if err == nil || fault.Code(err) != code {
		t.Errorf("want %s, got %q: %v", code, fault.Code(err), err)
	}
}

// entries are those of the release log.
func (w *world) entries() []releaselog.Entry {
	w.t.Helper()
	raw, _, err := w.log.Entries(0, 1000)
	w.check(err)
	var out []releaselog.Entry
	for _, r := range raw {
		e, err := releaselog.ParseEntry(r)
		w.check(err)
		out = append(out, e)
	}
	return out
}

func get(t testing.TB, w *world, path string) string {
	t.Helper()
	c := w.client(nil)
	resp, err := c.HTTP.Get("https://kms.test" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
