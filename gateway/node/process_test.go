// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/channel/appraiser"
	"github.com/dstack-go/dstack/channel/self"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/gateway/cluster"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/tunnel"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/gwclient"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// Gateways and guests of the tests of a cluster are processes in network namespaces of
// their own: this test's program again, told by its environment what to be.
const (
	asGateway = "DSTACK_TEST_GATEWAY"
	asGuest   = "DSTACK_TEST_GUEST"
)

func TestMain(m *testing.M) {
	var err error
	switch {
	case os.Getenv(asGateway) != "":
		err = gatewayProcess(os.Getenv(asGateway))
	case os.Getenv(asGuest) != "":
		err = guestProcess(os.Getenv(asGuest))
	default:
		flag.Parse()
		if err := flag.Set("test.parallel", "4"); err != nil { // the tests in labs mostly wait
			panic(err)
		}
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// gatewayOrder is what a gateway's process is told.
type gatewayOrder struct {
	Config  string // file
	Control string // socket
}

// gatewayProcess is a gateway, with a socket at which the test asks what no user can.
func gatewayProcess(order string) error {
	var o gatewayOrder
	if err := json.Unmarshal([]byte(order), &o); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	useDevRoots = applicant.UseDevRoots
	cfg, err := LoadConfig(o.Config, nil)
	if err != nil {
		return err
	}
	n, err := Open(ctx, cfg, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	var now struct {
		sync.Mutex
		c *cluster.Cluster
		t *route.Table
	}
	n.opened = func(c *cluster.Cluster, t *route.Table) {
		now.Lock()
		defer now.Unlock()
		now.c, now.t = c, t
	}
	mux := http.NewServeMux()
	handle := func(name string, f func(ctx context.Context, c *cluster.Cluster, t *route.Table, r *http.Request, body []byte) (any, error)) {
		mux.HandleFunc("/"+name, func(w http.ResponseWriter, r *http.Request) {
			now.Lock()
			c, t := now.c, now.t
			now.Unlock()
			if c == nil {
				http.Error(w, "starting", http.StatusServiceUnavailable)
				return
			}
			body, _ := io.ReadAll(r.Body)
			out, err := f(r.Context(), c, t, r, body)
			if err != nil {
				w.Header().Set("X-Error-Code", fault.Code(err))
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			json.NewEncoder(w).Encode(out)
		})
	}
	handle("invite", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, _ *http.Request, _ []byte) (any, error) {
		token, _, err := c.Invite(ctx)
		return token, err
	})
	handle("join", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, r *http.Request, _ []byte) (any, error) {
		return nil, c.Join(ctx, r.FormValue("addr"), r.FormValue("token"))
	})
	handle("members", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, _ *http.Request, _ []byte) (any, error) {
		m, quorum, _ := c.Members(ctx) // who was removed knows none
		return status{Members: m, Quorum: quorum, Removed: c.Removed(), Own: c.Node()}, nil
	})
	handle("remove", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, r *http.Request, _ []byte) (any, error) {
		return nil, c.Remove(ctx, r.FormValue("uuid"))
	})
	handle("put", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, r *http.Request, body []byte) (any, error) {
		at, err := strconv.ParseInt(r.FormValue("at"), 10, 64)
		if err != nil {
			return nil, err
		}
		return nil, c.Put(ctx, r.FormValue("key"), body, at)
	})
	handle("get", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, r *http.Request, _ []byte) (any, error) {
		e, err := c.Get(ctx, r.FormValue("key"))
		return string(e.Value), err
	})
	handle("delete", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, r *http.Request, _ []byte) (any, error) {
		return nil, c.Delete(ctx, r.FormValue("key"), -1)
	})
	handle("lock", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, r *http.Request, _ []byte) (any, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return nil, c.Files().Lock(ctx, r.FormValue("name"))
	})
	handle("unlock", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, r *http.Request, _ []byte) (any, error) {
		return nil, c.Files().Unlock(ctx, r.FormValue("name"))
	})
	handle("routes", func(_ context.Context, _ *cluster.Cluster, t *route.Table, _ *http.Request, _ []byte) (any, error) {
		out := map[string]time.Time{}
		for _, r := range t.Records() {
			out[r.Instance.String()] = r.Attested
		}
		return out, nil
	})
	handle("dump", func(_ context.Context, _ *cluster.Cluster, t *route.Table, _ *http.Request, _ []byte) (any, error) {
		text, err := t.Dump()
		return string(text), err
	})
	handle("unroute", func(_ context.Context, _ *cluster.Cluster, t *route.Table, r *http.Request, _ []byte) (any, error) {
		id, err := dstack.ParseInstanceID(r.FormValue("instance"))
		if err == nil {
			t.Remove(id)
		}
		return nil, err
	})
	handle("call", func(ctx context.Context, c *cluster.Cluster, _ *route.Table, r *http.Request, body []byte) (any, error) {
		out, err := c.Call(ctx, r.FormValue("uuid"), r.FormValue("name"), body)
		return string(out), err
	})
	handle("quarantine", func(_ context.Context, _ *cluster.Cluster, t *route.Table, _ *http.Request, _ []byte) (any, error) {
		bad, _ := t.Quarantine()
		var out []string
		for _, b := range bad {
			out = append(out, fault.Code(b.Err))
		}
		return out, nil
	})
	l, err := net.Listen("unix", o.Control)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	defer srv.Close()
	return n.Run(ctx, nil)
}

// status is what a gateway says of its cluster.
type status struct {
	Members []cluster.Member
	Quorum  bool
	Removed bool
	Own     cluster.Node
}

// guestOrder is what a guest's process is told.
type guestOrder struct {
	Agent    string // socket of what makes its evidence
	Gateways []string
	DNS      string // server that names are asked of, ip:port; empty: the machine's
	App      string // the gateways' app, hexadecimal
	Compose  string // and manifest
	Key      []byte // the channel key, PEM
	DevRoots string // file
	Manifest []byte
	Says     string
	TLS      []byte // certificate and key of port 443, PEM
}

// words says a word at /, the same slowly, a letter every 50 ms, at /slow?letters=N, and at
// /echo what it hears, as a WebSocket does.
func words(says string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, says) })
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.FormValue("letters"))
		w.Header().Set("Content-Length", strconv.Itoa(n))
		for range n {
			io.WriteString(w, "x")
			http.NewResponseController(w).Flush()
			time.Sleep(50 * time.Millisecond)
		}
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, _ *http.Request) {
		c, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		io.Copy(c, buf)
	})
	return mux
}

// guestProcess is an instance with an app at port 80, and with TLS of its own at 443,
// behind WireGuard.
func guestProcess(order string) error {
	var o guestOrder
	if err := json.Unmarshal([]byte(order), &o); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if o.DNS != "" {
		net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, o.DNS)
		}}
	}
	agent, err := self.Open(ctx, o.Agent)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(o.DevRoots)
	if err != nil {
		return err
	}
	dev, err := collateral.ParseDevRoots(text)
	if err != nil {
		return err
	}
	roots, err := verifier.DevelopmentRoots(dev)
	if err != nil {
		return err
	}
	app, err := dstack.ParseAppID(o.App)
	if err != nil {
		return err
	}
	compose, err := dstack.ParseComposeHash(o.Compose)
	if err != nil {
		return err
	}
	pol := verifier.Policy{TCB: verifier.TCBPolicy{Accept: []string{"UpToDate"}}, Workload: verifier.WorkloadPolicy{AppID: &app, ComposeHashes: []dstack.ComposeHash{compose}}}
	pol.Image.AllowUnanchored, pol.DevRoots = true, true
	block, _ := pem.Decode(o.Key)
	signer, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return err
	}
	key, err := channel.KeyOf(signer)
	if err != nil {
		return err
	}
	m := &machine{key: wgconfig.GeneratePrivateKey(), up: make(chan struct{})}
	client, err := gwclient.New(gwclient.Config{
		URLs: o.Gateways, Appraiser: &appraiser.Appraiser{Roots: []attest.Roots(roots), Collateral: collateral.Static{Bundle: dev.Bundle()}, Policy: pol},
		Intended: channel.Intended{AppID: app}, Attester: agent, Key: key, Signer: (*ecdsa.PrivateKey)(signer),
		App: agent.ID, Instance: *agent.Instance, AppCompose: o.Manifest, Tunnel: m.tunnel, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	own, err := tls.X509KeyPair(o.TLS, o.TLS)
	if err != nil {
		return err
	}
	for _, port := range []int{80, 443} {
		go func() {
			<-m.up
			l, err := m.stack.ListenTCP(&net.TCPAddr{Port: port})
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return
			}
			var in net.Listener = l
			if port == 443 {
				in = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{own}})
			}
			http.Serve(in, words(o.Says))
		}()
	}
	client.Run(ctx)
	return nil
}

// machine is a guest's init: WireGuard and TCP in the process.
type machine struct {
	dev   *device.Device
	stack *netstack.Net
	key   wgconfig.PrivateKey

	mu    sync.Mutex
	addrs string
	up    chan struct{}
}

func (m *machine) tunnel(_ context.Context, c initrpc.TunnelChange) (initrpc.TunnelStatus, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := m.key.Public().Bytes()
	out := initrpc.TunnelStatus{Key: k[:]}
	if m.dev != nil {
		if text, err := m.dev.IpcGet(); err == nil {
			out.Handshakes = handshakes([]byte(text))
		}
	}
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
		m.stack, m.dev, m.addrs = stack, device.NewDevice(link, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, "")), fmt.Sprint(c.Addresses)
		raw := m.key.Bytes()
		if err := m.dev.IpcSet(fmt.Sprintf("private_key=%x\nlisten_port=9182\n", raw)); err != nil {
			return out, err
		}
		if err := m.dev.Up(); err != nil {
			return out, err
		}
		close(m.up)
	}
	if len(c.Addresses) > 0 && fmt.Sprint(c.Addresses) != m.addrs {
		return out, fmt.Errorf("the gateways disagree on this guest's address: %v, and %s before", c.Addresses, m.addrs)
	}
	for _, p := range c.Peers {
		if err := m.dev.IpcSet(fmt.Sprintf("public_key=%x\nendpoint=%s\nreplace_allowed_ips=true\nallowed_ip=%s/32\npersistent_keepalive_interval=5\n", p.Key, p.Endpoint, p.Address)); err != nil {
			return out, err
		}
	}
	return out, nil
}

// handshakes reads the keys and times of wireguard-go's status.
func handshakes(text []byte) (out []initrpc.TunnelHandshake) {
	for line := range bytes.Lines(text) {
		name, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte("="))
		switch string(name) {
		case "public_key":
			key := make([]byte, 32)
			fmt.Sscanf(string(value), "%x", &key)
			out = append(out, initrpc.TunnelHandshake{Key: key})
		case "last_handshake_time_sec":
			out[len(out)-1].At, _ = strconv.ParseInt(string(value), 10, 64)
		}
	}
	return out
}
