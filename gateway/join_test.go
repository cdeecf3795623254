// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"

	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/tunnel"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/gwclient"
	"github.com/dstack-go/dstack/guest/terminator"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func udpPort(t *testing.T) uint16 {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// public is a gateway with its tunnel and its public listener.
type public struct {
	*world
	edge *edge.Edge
	at   string // of the public listener
	url  string // where guests register
}

func newPublic(t *testing.T, first *public, address string, edit ...func(*public, *gateway.Config, *edge.Config)) *public {
	t.Helper()
	p := new(public)
	port := udpPort(t)
	var tn *tunnel.Tunnel
	public := edge.Config{Rules: func() hostname.Rules { return hostname.Rules{Bases: []hostname.Name{base}} }}
	p.world = newWorld(t, func(w *world, c *gateway.Config) {
		w.now = time.Now  // WireGuard knows no other clock
		if first != nil { // gateways of one domain have one CA
			platform := first.platform
			w.platform, w.self.Platform, w.ca, w.caFile = platform, platform, first.ca, first.caFile
			c.Certificates, c.Certificate = w.ca, w.ca.GetCertificate
			c.Judge.Collateral = collateral.Static{Bundle: &collateral.Bundle{TDX: platform.Collateral()}}
		}
		c.Node.Address = netip.PrefixFrom(netip.MustParseAddr(address), network.Bits())
		c.Judge.Roots[0], c.Judge.Now, c.Now = w.platform.Roots(), w.at, w.now
		w.table = route.New(route.Config{Key: w.key.Public(), Address: c.Node.Address.Addr(), Network: network})
		c.Routes = w.table
		var err error
		tn, err = tunnel.Open(t.Context(), tunnel.Config{Key: w.key, Listen: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port),
			Address: c.Node.Address.Addr(), Network: network, Mode: tunnel.Netstack})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tn.Close() })
		c.Tunnel = tn
		c.Node.Endpoint = fmt.Sprintf("127.0.0.1:%d", port)
		p.world, public.Routes, public.Dial, public.GetCertificate = w, w.table, tn.Dial, w.ca.GetCertificate
		c.Leads = func(ctx context.Context, name hostname.Name) (hostname.Answer, error) { return p.edge.Leads(ctx, name) }
		for _, e := range edit {
			e(p, c, &public)
		}
	})
	p.url = "https://" + p.addr
	e, err := edge.New(public)
	if err != nil {
		t.Fatal(err)
	}
	p.edge = e
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.at = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { e.Serve(ctx, l) })
	work.Go(func() { p.service.Keep(ctx, "") })
	t.Cleanup(func() {
		cancel()
		end, stop := context.WithTimeout(context.Background(), time.Second)
		defer stop()
		e.Shutdown(end)
		work.Wait()
	})
	return p
}

// at is the time of the platform's collateral.
func (w *world) at() time.Time { return tdxtest.At }

// machine is a guest's init: WireGuard and TCP in this process.
type machine struct {
	t     *testing.T
	dev   *device.Device
	stack *netstack.Net
	key   wgconfig.PrivateKey

	mu  sync.Mutex
	now initrpc.TunnelChange
	up  chan struct{}
}

func (m *machine) tunnel(_ context.Context, c initrpc.TunnelChange) (initrpc.TunnelStatus, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := m.key.Public().Bytes()
	out := initrpc.TunnelStatus{Key: k[:]}
	if !c.Set {
		return out, nil
	}
	if err := c.Check(); err != nil {
		return out, err
	}
	if m.dev == nil && len(c.Addresses) > 0 {
		link, stack, err := netstack.CreateNetTUN(c.Addresses, nil, tunnel.MTU)
		if err != nil {
			return out, err
		}
		m.stack, m.dev = stack, device.NewDevice(link, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
		m.t.Cleanup(m.dev.Close)
		raw := m.key.Bytes()
		if err := m.dev.IpcSet(fmt.Sprintf("private_key=%x\nlisten_port=0\n", raw)); err != nil {
			return out, err
		}
		if err := m.dev.Up(); err != nil {
			return out, err
		}
		close(m.up)
	}
	for _, p := range c.Peers {
		if err := m.dev.IpcSet(fmt.Sprintf("public_key=%x\nendpoint=%s\nreplace_allowed_ips=true\nallowed_ip=%s/32\npersistent_keepalive_interval=25\n", p.Key, p.Endpoint, p.Address)); err != nil {
			return out, err
		}
	}
	m.now = c
	return out, nil
}

// join runs an instance with an app at port 8080, whose TLS ends in the guest.
func join(t *testing.T, i *instance, app string, gateways ...*public) {
	t.Helper()
	m := &machine{t: t, key: i.wg, up: make(chan struct{})}
	var urls []string
	for _, g := range gateways {
		urls = append(urls, g.url)
	}
	a := i.w.appraiser()
	parsed, err := manifest.Parse(i.w.manifest)
	if err != nil {
		t.Fatal(err)
	}
	domains := map[string]uint16{}
	for _, d := range parsed.CustomDomains {
		domains[d.Domain] = d.Port
	}
	client, err := gwclient.New(gwclient.Config{
		Domains: domains, URLs: urls, Appraiser: timed{a}, Intended: channel.Intended{AppID: gatewayApp}, Attester: i.guest, Key: i.key, Signer: i.signer,
		App: i.guest.AppID, Instance: i.guest.InstanceID, AppCompose: i.w.manifest, Ports: []uint16{8080, 80}, Tunnel: m.tunnel, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	inside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, app+" "+r.URL.Path) })}
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { srv.Serve(inside) })
	work.Go(func() { client.Run(ctx) })
	work.Go(func() {
		select {
		case <-m.up:
		case <-ctx.Done():
			return
		}
		l, err := m.stack.ListenTCP(&net.TCPAddr{Port: manifest.TLSPort})
		if err != nil {
			t.Error(err)
			return
		}
		term := &terminator.Terminator{Certificate: client.Certificate,
			Evidence: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "evidence %t", r.TLS != nil) }),
			Dial: func(ctx context.Context, addr string) (net.Conn, error) {
				if !strings.HasSuffix(addr, ":8080") && !strings.HasSuffix(addr, ":80") {
					return nil, fmt.Errorf("port of %s", addr)
				}
				return net.Dial("tcp", inside.Addr().String())
			}}
		term.Serve(ctx, l)
	})
	t.Cleanup(func() { cancel(); srv.Close(); work.Wait() })
}

// timed judges at the time of the platform's collateral.
type timed struct{ channel.Appraiser }

func (a timed) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	c.At = tdxtest.At
	return a.Appraiser.Appraise(ctx, c)
}

// browser is a client that trusts the gateway's CA and connects to its public listener.
func (p *public) browser(t *testing.T) *http.Client {
	text, err := os.ReadFile(p.caFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	tr := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", p.at)
		}}
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

// get asks until there is an answer.
func get(t *testing.T, c *http.Client, url string) (string, *tls.ConnectionState) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		resp, err := c.Get(url)
		if err == nil {
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			return string(b), resp.TLS
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// Threat C05: by its ordinary public name the app is reached over a key that is in the
// guest and nowhere else, at every gateway that the guest knows.
func TestThreat_C05_ThePublicNameLeadsToAKeyInTheGuest(t *testing.T) {
	one := newPublic(t, nil, "100.96.0.1")
	two := newPublic(t, one, "100.96.0.2")
	i := one.instance(1, 1)
	join(t, i, "shop", one, two)
	for _, g := range []*public{one, two} {
		c := g.browser(t)
		for _, host := range []string{i.guest.AppID.String() + "-8080", i.guest.InstanceID.String() + "-8080", i.guest.AppID.String()} {
			body, state := get(t, c, "https://"+host+"."+base+"/cart")
			if body != "shop /cart" || !bytes.Equal(state.PeerCertificates[0].RawSubjectPublicKeyInfo, i.key.SPKI()) {
				t.Errorf("%s: %q", host, body)
			}
		}
		resp, err := c.Post("https://"+i.guest.AppID.String()+"-8080."+base+"/.well-known/dstack/attest", "application/json", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(b) != "evidence true" {
			t.Errorf("evidence: %q", b)
		}
	}
	// One gateway that dies takes nothing from the other.
	if _, ok := two.table.Instance(i.guest.InstanceID); !ok {
		t.Error("the second gateway has no route")
	}
}

// A gateway that is none gets nothing, and holds up nobody.
func TestAGatewayThatIsAnotherIsNotBelieved(t *testing.T) {
	good := newPublic(t, nil, "100.96.0.1")
	liar := newPublic(t, good, "100.96.0.2")
	liar.self.ComposeHash[0] ^= 1
	stranger := httptest.NewTLSServer(http.NotFoundHandler())
	defer stranger.Close()
	i := good.instance(1, 1)
	join(t, i, "shop", liar, good, &public{url: stranger.URL})
	if body, _ := get(t, good.browser(t), "https://"+i.guest.AppID.String()+"-8080."+base+"/"); body != "shop /" {
		t.Errorf("%q", body)
	}
	if _, ok := liar.table.Instance(i.guest.InstanceID); ok {
		t.Error("a gateway that runs something else has a route")
	}
	if _, err := gwclient.New(gwclient.Config{URLs: []string{"http://plain.example"}}); fault.Code(err) != "gateway_url" {
		t.Errorf("%v", err)
	}
}
