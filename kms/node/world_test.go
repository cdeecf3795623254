// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	agentapi "github.com/dstack-go/dstack/api/agent"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/governance/authority"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/kms/onboard"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/releaselog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a platform with an authority, on which KMSs run as apps: each asks a guest
// agent at a socket of its own, as in a CVM.
type world struct {
	t        testing.TB
	platform *tdxtest.Platform
	owner    ed25519.PrivateKey
	doc      *policy.Document

	mu  sync.Mutex
	now time.Time
}

var (
	kmsApp   = dstack.AppID{0xcc}
	kmsHash  = dstack.ComposeHash{0xc5}
	kmsImage = dstack.ImageHash{0x2b}
	app      = dstack.AppID{0xa}
	good     = dstack.ComposeHash{0xc0}
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

func wantCode(t testing.TB, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("want %s, got %q: %v", code, fault.Code(err), err)
	}
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, platform: tdxtest.New(t), now: tdxtest.At}
	var err error
	_, w.owner, err = ed25519.GenerateKey(rand.Reader)
	w.check(err)
	raw, err := w.guest(1).Attest(context.Background(), dstack.ReportData{})
	w.check(err)
	a, err := w.judge().Judge(context.Background(), applicant.Evidence{Container: raw})
	w.check(err)
	launch := map[string]policy.Register{}
	for _, r := range []string{"mrtd", "rtmr0", "rtmr1", "rtmr2"} {
		launch[r] = policy.Register(a.Request.Launch[r])
	}
	d := policy.New(dstack.TrustDevelopment, w.clock(), 24*time.Hour)
	d.OSImages = []policy.Image{{Hash: kmsImage, Dev: true, Epoch: 1, Launch: []map[string]policy.Register{launch}}}
	d.Devices = policy.Devices{IDs: []dstack.DeviceID{a.Request.Boot.DeviceID}}
	d.TCB = policy.TCB{Accept: []string{"UpToDate"}}
	d.KMS = policy.KMS{Allow: []policy.Member{{AppID: &kmsApp, ComposeHash: &kmsHash, OSImageHash: &kmsImage}}, Devices: d.Devices.IDs}
	d.Apps = []policy.App{{AppID: app, ComposeHashes: []policy.Compose{{Hash: good}}}}
	w.doc = d
	return w
}

func (w *world) judge() *applicant.Judge {
	return &applicant.Judge{
		Roots: []attest.Roots{w.platform.Roots()}, Development: true, Now: w.clock,
		Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: w.platform.Collateral()}},
	}
}

// guest is a KMS as an app; instances have different numbers.
func (w *world) guest(instance byte) *tdxtest.Guest {
	return &tdxtest.Guest{
		Platform: w.platform, AppID: kmsApp, InstanceID: dstack.InstanceID{instance}, ComposeHash: kmsHash,
		Config: `{"os_image_hash":"` + kmsImage.String() + `"}`,
	}
}

func (w *world) signed() []byte {
	w.t.Helper()
	text, err := w.doc.Encode()
	w.check(err)
	out, err := policy.Sign(text, w.owner)
	w.check(err)
	return out
}

// agent is a guest agent of g; it returns its socket.
func (w *world) agent(g *tdxtest.Guest) string {
	dir, err := os.MkdirTemp("", "agent") // sockets' paths are short
	w.check(err)
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	w.check(err)
	s := prpc.Server(prpc.NewMux(nil,
		prpc.Unary("Info", func(context.Context, *emptypb.Empty) (*agentapi.AppInfo, error) {
			return &agentapi.AppInfo{AppId: g.AppID[:], VmConfig: g.Config}, nil
		}),
		prpc.Unary("Attest", func(ctx context.Context, r *agentapi.RawQuoteArgs) (*agentapi.AttestResponse, error) {
			if len(r.ReportData) != dstack.ReportDataSize {
				return nil, fmt.Errorf("report data of %d bytes", len(r.ReportData))
			}
			raw, err := g.Attest(ctx, dstack.ReportData(r.ReportData))
			return &agentapi.AttestResponse{Attestation: raw}, err
		}),
	))
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	w.t.Cleanup(func() { s.Close(); <-done; os.RemoveAll(dir) })
	return path
}

func freePort(t testing.TB) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// config is that of a KMS which makes its own keys.
func (w *world) config(g *tdxtest.Guest) Config {
	w.t.Helper()
	c := DefaultConfig()
	c.RPC = RPCConfig{Address: "127.0.0.1", Port: freePort(w.t)}
	c.Core.DataDir = filepath.Join(w.t.TempDir(), "data")
	c.Core.Names = "127.0.0.1"
	c.Core.Replication = true
	c.Core.Guest.Socket = w.agent(g)
	c.Core.Onboard.AutoBootstrapDomain = "kms.test"
	c.Core.Onboard.Address = "127.0.0.1"
	c.Core.Limits = LimitsConfig{PeerRate: 1e6, AppRate: 1e6}
	c.Core.AuthAPI.Policy = authority.Policy{Keys: fmt.Sprintf("%x", w.owner.Public()), Threshold: 1, File: string(w.signed())}
	w.check(c.check())
	return c
}

// running is a KMS's process.
type running struct {
	w     *world
	cfg   Config
	node  *Node
	stop  context.CancelFunc
	done  chan error
	ready chan net.Addr
	out   *console
}

// console keeps what a KMS prints.
type console struct {
	mu   sync.Mutex
	text strings.Builder
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// token waits for the setup token.
func (r *running) token() string {
	r.w.t.Helper()
	for range 200 {
		if _, rest, ok := strings.Cut(r.out.String(), "setup token: "); ok {
			return strings.TrimSpace(rest)
		}
		time.Sleep(20 * time.Millisecond)
	}
	r.w.t.Fatal("no token was printed")
	return ""
}

// run starts a KMS, which ends with the test.
func (w *world) run(c Config) (*running, error) {
	w.t.Helper()
	out := &console{}
	n, err := open(context.Background(), c, slog.New(slog.NewTextHandler(out, nil)), w.clock, w.judge())
	if err != nil {
		return nil, err
	}
	n.Console, n.Version = out, "v0 (test)"
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{w: w, cfg: c, node: n, stop: cancel, done: make(chan error, 1), ready: make(chan net.Addr, 1), out: out}
	go func() { r.done <- n.Run(ctx, func(a net.Addr) { r.ready <- a }) }()
	w.t.Cleanup(func() { r.end() })
	return r, nil
}

// start is run of what must come up.
func (w *world) start(c Config) *running {
	w.t.Helper()
	r, err := w.run(c)
	w.check(err)
	r.serving()
	return r
}

func (r *running) serving() {
	r.w.t.Helper()
	select {
	case <-r.ready:
	case err := <-r.done:
		r.done <- err
		r.w.t.Fatalf("it ended: %v\n%s", err, r.out)
	case <-time.After(30 * time.Second):
		r.w.t.Fatalf("it does not serve:\n%s", r.out)
	}
}

// end stops it and returns what Run returned.
func (r *running) end() error {
	r.stop()
	err := <-r.done
	r.done <- err
	return err
}

func (r *running) addr() string { return r.cfg.RPC.listen() }
func (r *running) url() string  { return "https://" + r.addr() }

// client is one that believes anybody: what it hears it compares itself.
func (r *running) client() *prpc.Client { return r.w.clientOf(r.addr()) }

func (w *world) clientOf(addr string) *prpc.Client {
	w.t.Helper()
	cfg, err := channel.Issued{FirstContact: true, Usage: ratls.UsageKMS, Now: w.clock}.Config("kms.test")
	w.check(err)
	tr := &http.Transport{TLSClientConfig: cfg, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &prpc.Client{BaseURL: "https://kms.test/prpc", HTTP: &http.Client{Transport: tr, Timeout: 30 * time.Second}}
}

func call[T any, P interface {
	*T
	proto.Message
}](c *prpc.Client, method string, req proto.Message) (P, error) {
	out := P(new(T))
	return out, c.Call(context.Background(), method, req, out)
}

func (r *running) meta() *kmsapi.GetMetaResponse {
	r.w.t.Helper()
	m, err := call[kmsapi.GetMetaResponse](r.client(), "GetMeta", nil)
	r.w.check(err)
	return m
}

// root is the key of the root CA that a KMS says it has.
func (r *running) root() string {
	r.w.t.Helper()
	cert, err := certificate.Parse([]byte(r.meta().CaCert))
	r.w.check(err)
	return string(cert.RawSubjectPublicKeyInfo)
}

func (r *running) envKey() string {
	r.w.t.Helper()
	k, err := call[kmsapi.PublicKeyResponse](r.client(), "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: app[:]})
	r.w.check(err)
	return string(k.PublicKey)
}

// entries are those of a KMS's log, by its own word.
func (r *running) entries() []releaselog.Entry {
	r.w.t.Helper()
	out, err := call[kmsapi.LogEntriesResponse](r.client(), "GetLogEntries", &kmsapi.LogEntriesRequest{Count: 1000})
	r.w.check(err)
	var all []releaselog.Entry
	for _, raw := range out.Entries {
		e, err := releaselog.ParseEntry(raw)
		r.w.check(err)
		all = append(all, e)
	}
	return all
}

// noRoot checks that a directory has no root keys.
func noRoot(t testing.TB, dir string) {
	t.Helper()
	if roots, err := custody.Open(onboard.RootFile(dir)); fault.Code(err) != "root_missing" {
		if err == nil {
			roots.Wipe()
		}
		t.Errorf("there is a root: %v", err)
	}
}

func httpDo(t testing.TB, method, url string, header map[string]string, body string) (int, string, http.Header) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), resp.Header
}

func itoa(port uint16) string { return fmt.Sprint(port) }

func onboardRoots() (*custody.Roots, error) { return custody.Generate(rand.Reader) }

// ephemeral makes a key, and a genuine KMS's evidence about it.
func ephemeral(w *world) (*ecdsa.PrivateKey, []byte) { return ephemeralOf(w, w.guest(1)) }

func ephemeralOf(w *world, g *tdxtest.Guest) (*ecdsa.PrivateKey, []byte) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	w.check(err)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	w.check(err)
	evidence, err := g.Attest(context.Background(), ratls.ReportData(spki))
	w.check(err)
	return key, evidence
}

// privatise gives a copied data directory the modes that it had.
func privatise(t testing.TB, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// listing is the names and contents below a directory.
func listing(t testing.TB, dir string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		fmt.Fprintf(&out, "%s %x\n", path, sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}
