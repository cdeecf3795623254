// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	agentapi "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway/privateca"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit/netlab"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

const labDomain = "apps.example"

var (
	labApp   = dstack.AppID{0x9a}
	labHash  = dstack.ComposeHash{0x9a, 1}
	labImage = dstack.ImageHash{0x1a}
)

// lab is hosts in network namespaces of their own around a bridge: gateways, guests, and
// who visits them.
type lab struct {
	t        *testing.T
	dir      string
	platform *tdxtest.Platform
	roots    string // file
	hub      netns.NsHandle
	visitor  netns.NsHandle
	hosts    int
	gateways []*host
	mu       sync.Mutex // what guests are
	own      []byte     // what apps show that end TLS themselves, and its key; PEM
}

// host is a gateway's or guest's machine and its process.
type host struct {
	l       *lab
	n       int
	ip      string
	ns      netns.NsHandle
	guest   *tdxtest.Guest
	agent   string
	dir     string // data
	order   []string
	program []string // nil: this test's own
	control string
	cmd     *exec.Cmd
	ended   chan struct{}
	said    *os.File
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// newLab lets its test run beside others: they mostly wait.
func newLab(t *testing.T) *lab {
	t.Helper()
	t.Parallel()
	dir, err := os.MkdirTemp("", "lab") // sockets' paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &lab{t: t, dir: dir, platform: tdxtest.New(t)}
	until := time.Now().Add(30 * 24 * time.Hour).UTC()
	for _, doc := range []tdxtest.JSON{l.platform.TCBInfo, l.platform.QEIdentity} {
		doc["nextUpdate"] = until.Format(time.RFC3339)
	}
	l.platform.RootCRL.NextUpdate, l.platform.PCKCRL.NextUpdate = until, until
	text, err := json.Marshal(l.platform.DevRoots())
	l.must(err)
	l.roots = filepath.Join(dir, "roots.json")
	l.must(os.WriteFile(l.roots, text, 0o600))
	l.own = l.certificate()
	l.hub = netlab.New(l.t)
	l.must(netlab.In(l.hub, func() error {
		a := netlink.NewLinkAttrs()
		a.Name = "hub"
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: a}); err != nil {
			return err
		}
		return netlab.Up("hub")
	}))
	l.visitor, _ = l.attach()
	return l
}

// certificate is one for all names of apps, and its key.
func (l *lab) certificate() []byte {
	l.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	l.must(err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"*." + labDomain}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	l.must(err)
	text, err := x509.MarshalECPrivateKey(key)
	l.must(err)
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: text})...)
}

// attach makes a namespace with an address at the hub.
func (l *lab) attach() (netns.NsHandle, string) {
	l.t.Helper()
	l.hosts++
	n, ns := l.hosts, netlab.New(l.t)
	ip := fmt.Sprintf("10.77.0.%d", n)
	l.must(netlab.In(l.hub, func() error {
		hub, err := netlink.LinkByName("hub")
		if err != nil {
			return err
		}
		a := netlink.NewLinkAttrs()
		a.Name, a.MasterIndex = fmt.Sprintf("port%d", n), hub.Attrs().Index
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}); err != nil {
			return err
		}
		return netlab.Up(a.Name)
	}))
	l.must(netlab.In(ns, func() error {
		return netlab.Up("eth0", ip+"/24")
	}))
	return ns, ip
}

// serveAgent is the guest agent of a machine.
func (l *lab) serveAgent(g *tdxtest.Guest, path string) {
	l.t.Helper()
	now := func() *tdxtest.Guest { // as it is, since it may be upgraded
		l.mu.Lock()
		defer l.mu.Unlock()
		c := *g
		return &c
	}
	s := prpc.Server(prpc.NewMux(nil,
		prpc.Unary("Info", func(context.Context, *emptypb.Empty) (*agentapi.AppInfo, error) {
			g := now()
			return &agentapi.AppInfo{AppId: g.AppID[:], InstanceId: g.InstanceID[:], ComposeHash: g.ComposeHash[:], VmConfig: g.Config}, nil
		}),
		prpc.Unary("Attest", func(ctx context.Context, r *agentapi.RawQuoteArgs) (*agentapi.AttestResponse, error) {
			if len(r.ReportData) != dstack.ReportDataSize {
				return nil, fmt.Errorf("report data of %d bytes", len(r.ReportData))
			}
			raw, err := now().Attest(ctx, dstack.ReportData(r.ReportData))
			return &agentapi.AttestResponse{Attestation: raw}, err
		}),
	))
	ln, err := net.Listen("unix", path)
	l.must(err)
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(ln) }()
	l.t.Cleanup(func() { s.Close(); <-done })
}

func (l *lab) host(g *tdxtest.Guest) *host {
	l.t.Helper()
	h := &host{l: l, guest: g}
	h.ns, h.ip = l.attach()
	h.n = l.hosts
	g.Platform, g.Config = l.platform, `{"os_image_hash":"`+labImage.String()+`"}`
	h.agent = filepath.Join(l.dir, fmt.Sprintf("a%d", h.n))
	h.control = filepath.Join(l.dir, fmt.Sprintf("c%d", h.n))
	h.dir = filepath.Join(l.dir, fmt.Sprintf("d%d", h.n))
	var err error
	h.said, err = os.Create(filepath.Join(l.dir, fmt.Sprintf("log%d", h.n)))
	l.must(err)
	l.t.Cleanup(func() {
		h.kill()
		h.said.Close()
		if l.t.Failed() {
			text, _ := os.ReadFile(h.said.Name())
			l.t.Logf("%s (instance %s):\n%s", h.ip, g.InstanceID, text[max(0, len(text)-6000):])
		}
	})
	return h
}

// gateway is a gateway that has not been started.
func (l *lab) gateway(edit func(*tdxtest.Guest)) *host {
	l.t.Helper()
	g := &tdxtest.Guest{AppID: labApp, InstanceID: dstack.InstanceID{9, byte(len(l.gateways) + 1)}, ComposeHash: labHash}
	if edit != nil {
		edit(g)
	}
	h := l.host(g)
	l.gateways = append(l.gateways, h)
	l.serveAgent(g, h.agent)
	h.configure("")
	return h
}

// file is a gateway's configuration.
func (h *host) file() string { return filepath.Join(h.l.dir, fmt.Sprintf("g%d.toml", h.n)) }

func (h *host) configure(more string) {
	h.l.t.Helper()
	h.l.must(os.WriteFile(h.file(), fmt.Appendf(nil, `
address = %[1]q
port = 8000
[core]
data_dir = %[2]q
my_url = "https://%[1]s:8000"
domains = %[3]q
[core.wg]
listen = "%[1]s:51820"
endpoint = "%[1]s:51820"
mode = "netstack"
[core.proxy]
listen_addr = %[1]q
listen_port = 443
[core.guest]
socket = %[4]q
[core.attestation]
dev_roots = %[5]q
[core.auth]
type = "attested"
[core.cluster]
listen = "%[1]s:8003"
address = "%[1]s:8003"
%[6]s`, h.ip, h.dir, labDomain, h.agent, h.l.roots, more), 0o600))
	order, err := json.Marshal(gatewayOrder{Config: h.file(), Control: h.control})
	h.l.must(err)
	h.order = []string{asGateway + "=" + string(order)}
}

// instance starts an instance that registers at gateways.
func (l *lab) instance(app, n byte, says string, gateways ...*host) *host {
	l.t.Helper()
	var o guestOrder
	for _, g := range gateways {
		o.Gateways = append(o.Gateways, "https://"+g.ip+":8000")
	}
	return l.ordered(app, n, says, o)
}

// ordered starts an instance that is told more than whose it is and what it says.
func (l *lab) ordered(app, n byte, says string, o guestOrder) *host {
	l.t.Helper()
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	l.must(err)
	key, err := channel.KeyOf(signer)
	l.must(err)
	der, err := x509.MarshalECPrivateKey(signer)
	l.must(err)
	text, err := manifest.Build(manifest.Draft{Name: "shop", DockerComposeFile: "services: {}\n", GatewayEnabled: true})
	l.must(err)
	m, err := manifest.Parse(text)
	l.must(err)
	h := l.host(&tdxtest.Guest{AppID: dstack.AppID{app}, InstanceID: dstack.InstanceID{app, n}, ComposeHash: m.Hash(), ChannelSPKI: key.SPKI()})
	l.serveAgent(h.guest, h.agent)
	o.Agent, o.App, o.Compose, o.DevRoots, o.Manifest, o.Says = h.agent, labApp.String(), labHash.String(), l.roots, text, says
	o.TLS = l.own
	o.Key = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	order, err := json.Marshal(o)
	l.must(err)
	h.order = []string{asGuest + "=" + string(order)}
	h.start()
	return h
}

// start starts the process in the host's namespace.
func (h *host) start() {
	h.l.t.Helper()
	os.Remove(h.control)
	program := h.program
	if program == nil {
		program = os.Args[:1]
	}
	cmd := exec.Command(program[0], program[1:]...)
	cmd.Env = append(os.Environ(), h.order...)
	cmd.Stdout, cmd.Stderr = h.said, h.said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	h.l.must(netlab.In(h.ns, cmd.Start))
	h.cmd, h.ended = cmd, make(chan struct{})
	go func(ended chan struct{}) { defer close(ended); cmd.Wait() }(h.ended)
}

// upgrade gives a machine another manifest.
func (h *host) upgrade(to dstack.ComposeHash) {
	h.l.mu.Lock()
	defer h.l.mu.Unlock()
	h.guest.ComposeHash = to
}

// supervise starts a process again that has ended by itself.
func (h *host) supervise() {
	select {
	case <-h.ended:
		h.start()
	default:
	}
}

// kill ends the process with no chance to tidy.
func (h *host) kill() {
	if h.cmd == nil {
		return
	}
	syscall.Kill(-h.cmd.Process.Pid, syscall.SIGKILL)
	<-h.ended
	h.cmd = nil
}

// ask asks a gateway's process what no user can.
func (h *host) ask(what string, q url.Values, body []byte, out any) error {
	c := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", h.control)
	}}}
	r, err := c.Post("http://control/"+what+"?"+q.Encode(), "", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	if r.StatusCode != http.StatusOK {
		return fault.New(r.Header.Get("X-Error-Code"), "%s", bytes.TrimSpace(text))
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(text, out)
}

func (h *host) status() (s status) {
	_ = h.ask("members", nil, nil, &s) // a gateway that does not answer has no quorum
	return s
}

// eventually waits for something that takes a while.
func (l *lab) eventually(what string, ok func() bool) {
	l.t.Helper()
	for end := time.Now().Add(60 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("it did not happen: %s", what)
		}
	}
}

// alone starts a gateway that is a cluster of one.
func (h *host) alone() {
	h.l.t.Helper()
	h.start()
	h.l.eventually("a gateway alone has a quorum", func() bool { return h.status().Quorum })
}

// joinTo makes h a voting member of g's cluster.
func (h *host) joinTo(g *host) {
	h.l.t.Helper()
	var token string
	h.l.must(g.ask("invite", nil, nil, &token))
	h.l.must(h.ask("join", url.Values{"addr": {g.ip + ":8003"}, "token": {token}}, nil, nil))
	h.l.eventually("the gateway votes", func() bool {
		s := h.status()
		for _, m := range s.Members {
			if m.Self {
				return len(s.Members) > 1 && s.Quorum && !m.Learner
			}
		}
		return false
	})
}

// cluster is so many gateways in one cluster.
func (l *lab) cluster(n int) []*host {
	l.t.Helper()
	var out []*host
	for range n {
		out = append(out, l.gateway(nil))
	}
	for i, h := range out {
		h.alone()
		if i > 0 {
			h.joinTo(out[0])
		}
	}
	l.eventually("all know all", func() bool {
		for _, h := range out {
			if len(h.status().Members) != n {
				return false
			}
		}
		return true
	})
	return out
}

// cut lets no packet pass between hosts, until the function that it returns is called.
func (l *lab) cut(from *host, others ...*host) (mend func()) {
	l.t.Helper()
	var undo []func()
	for _, o := range others {
		for _, pair := range [][2]*host{{from, o}, {o, from}} {
			_, dst, err := net.ParseCIDR(pair[1].ip + "/32")
			l.must(err)
			r := &netlink.Route{Dst: dst, Type: syscall.RTN_BLACKHOLE}
			l.must(netlab.In(pair[0].ns, func() error { return netlink.RouteAdd(r) }))
			undo = append(undo, func() { l.must(netlab.In(pair[0].ns, func() error { return netlink.RouteDel(r) })) })
		}
	}
	return sync.OnceFunc(func() {
		for _, f := range undo {
			f()
		}
	})
}

// trusts are who certifies for gateways, and for apps that end TLS themselves.
func (l *lab) trusts(gateways ...*host) (*x509.CertPool, error) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(l.own)
	for _, g := range gateways {
		text, err := os.ReadFile(filepath.Join(g.dir, privateca.CertFile))
		if err != nil {
			return nil, err
		}
		roots.AppendCertsFromPEM(text)
	}
	return roots, nil
}

// dial is a visitor's connection to a gateway.
func (l *lab) dial(ctx context.Context, g *host) (c net.Conn, err error) {
	e := netlab.In(l.visitor, func() error {
		c, err = (&net.Dialer{Timeout: 3 * time.Second}).DialContext(ctx, "tcp", g.ip+":443")
		return nil
	})
	return c, errors.Join(err, e)
}

// visit asks a gateway for an app by its public name.
func (l *lab) visit(g *host, name string) (string, error) {
	roots, err := l.trusts(g)
	if err != nil {
		return "", err
	}
	tr := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots}, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return l.dial(ctx, g)
	}}
	r, err := (&http.Client{Transport: tr, Timeout: 5 * time.Second}).Get("https://" + name + "." + labDomain + "/")
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

// reached waits until an app answers through a gateway.
func (l *lab) reached(g *host, app *host, says string) {
	l.t.Helper()
	l.reachedAs(g, app.guest.AppID.String(), says)
}

func (l *lab) reachedAs(g *host, name, says string) {
	l.t.Helper()
	l.eventually(fmt.Sprintf("%s through %s", says, g.ip), func() bool {
		body, err := l.visit(g, name)
		return err == nil && body == says
	})
}

// routes are the instances that a gateway has, and when each gave its evidence.
func (h *host) routes() (out map[string]time.Time) {
	_ = h.ask("routes", nil, nil, &out)
	return out
}

func wantCode(t testing.TB, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("want %s, got %q: %v", code, fault.Code(err), err)
	}
}
