// SPDX-License-Identifier: Apache-2.0

// Package node is a gateway as a program: its configuration, its data directory, its
// listeners, and how they begin and end.
//
// Listeners open before anything is asked of the network: nothing waits for a CA, another
// gateway or a guest. What was routed before a restart is routed after it at once.
//
// Development trust — evidence under roots that no vendor stands for — exists only in
// builds with the tag dstack_sim (threats.md G08).
//
// Implements spec/gateway.md §0.
package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	gatewayapi "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/channel/self"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/cluster"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/privateca"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/tunnel"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Files of the data directory beside those of package privateca.
const (
	keyFile    = "wg.key"
	uuidFile   = "node_uuid"
	routesFile = "routes"
)

// drainTime is the default of core.proxy.timeouts.drain.
const drainTime = 9 * time.Second

// Node is one gateway.
type Node struct {
	cfg     Config
	log     *slog.Logger
	Version string // what replies say in X-App-Version
	// Level, if there is one, is that of the log, which the configuration may set.
	Level *slog.LevelVar

	self    *self.App
	judge   *applicant.Judge
	ca      *privateca.CA
	domains []gateway.Domain
	key     wgconfig.PrivateKey
	uuid    [16]byte
	live    *live                                // of the run
	ended   func(edge.Ended)                     // nil without an access log
	opened  func(*cluster.Cluster, *route.Table) // of tests

	reloading reloading
}

// Open reads what is in the data directory, making it at the first start, and asks the
// guest agent who this is.
func Open(ctx context.Context, c Config, log *slog.Logger) (*Node, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	n := &Node{cfg: c, log: limited(log), ended: c.Core.Proxy.accessLog(log), reloading: reloading{cfg: c}}
	log = n.log
	dir := c.Core.DataDir
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.Wrap(err, "gateway_config", "make core.data_dir")
	}
	var err error
	if n.domains, err = c.domains(); err != nil {
		return nil, err
	}
	a := c.Core.Attestation
	n.judge, err = applicant.Trust{
		PCCS: a.PCCS, KDS: a.KDS, DevRoots: a.DevRoots, Development: useDevRoots, Dir: dir,
		Warn: func(err error) { log.Warn("collateral", "error", err) },
	}.Judge()
	if err != nil {
		return nil, err
	}
	if n.judge.Development {
		log.Warn("evidence under development roots counts: this gateway's trust is development")
	}
	if n.self, err = self.Open(ctx, c.Core.Guest.Socket); err != nil {
		return nil, err
	}
	var names []hostname.Name
	for _, d := range n.domains {
		names = append(names, d.Name)
	}
	if n.ca, err = privateca.Open(dir, names, nil); err != nil {
		return nil, err
	}
	if n.key, err = openKey(filepath.Join(dir, keyFile)); err != nil {
		return nil, err
	}
	n.uuid, err = openUUID(filepath.Join(dir, uuidFile))
	return n, err
}

// openKey returns the WireGuard key, made at the first start: guests know the gateway's
// end of the tunnel by it. Code gateway_key.
func openKey(path string) (wgconfig.PrivateKey, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		k := wgconfig.GeneratePrivateKey()
		b := k.Bytes()
		defer clear(b[:])
		text := base64.StdEncoding.AppendEncode(nil, b[:])
		defer clear(text)
		return k, durable.WriteFile(path, text, 0o600)
	}
	if err != nil {
		return wgconfig.PrivateKey{}, fault.Wrap(err, "gateway_key", "read the WireGuard key")
	}
	defer clear(text)
	b := make([]byte, 64)
	defer clear(b)
	m, err := base64.StdEncoding.Decode(b, bytes.TrimSpace(text[:min(len(text), 64)]))
	if err == nil {
		var k wgconfig.PrivateKey
		if k, err = wgconfig.NewPrivateKey(b[:m]); err == nil {
			return k, nil
		}
	}
	return wgconfig.PrivateKey{}, fault.Wrap(err, "gateway_key", "%s is no WireGuard key", path).WithFix("remove it: one is made anew, and guests register again")
}

func openUUID(path string) (id [16]byte, err error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		rand.Read(id[:])
		return id, durable.WriteFile(path, []byte(hex.EncodeToString(id[:])), 0o600)
	}
	if err == nil {
		var b []byte
		if b, err = hex.DecodeString(string(bytes.TrimSpace(text))); err == nil && len(b) == len(id) {
			return [16]byte(b), nil
		}
	}
	return id, fault.New("gateway_config", "%s is no id of 32 hexadecimal digits", path).WithFix("remove it: one is made anew")
}

// Listening says where a gateway answers.
type Listening struct{ RPC, Proxy, HTTP, Cluster, Admin net.Addr }

// Run serves until ctx ends, and then lets connections finish for a while. ready, if not
// nil, is told once everything listens; again after the gateway has joined a cluster, where
// it has another address in the tunnel.
func (n *Node) Run(ctx context.Context, ready func(Listening)) error {
	n.reloading.begin(n.Level)
	for {
		err := n.run(ctx, ready)
		if errors.Is(err, errExit) {
			return nil
		}
		if !errors.Is(err, errJoined) {
			return err
		}
		n.log.Info("the gateway has joined a cluster, and begins anew")
	}
}

func (n *Node) run(ctx context.Context, ready func(Listening)) error {
	c := &n.cfg.Core
	agreed, err := n.openCluster()
	if err != nil {
		return err
	}
	defer agreed.Close()
	own := agreed.Node()
	table := route.New(route.Config{
		Key: n.key.Public(), Address: own.Address.Addr(), Network: own.Address.Masked(), Lease: c.Auth.Lease.Duration,
	})
	if n.opened != nil {
		n.opened(agreed, table)
	}
	tn, err := tunnel.Open(ctx, tunnel.Config{
		Key: n.key, Listen: c.WG.listen, Address: own.Address.Addr(), Network: own.Address.Masked(), Mode: tunnel.Mode(c.WG.Mode), Name: c.WG.Interface, Log: n.log,
	})
	if err != nil {
		return err
	}
	defer tn.Close()
	// What certifies: public authorities, or the private CA.
	certificate, sign, acmeInfo, challenge := n.ca.GetCertificate, gateway.Certificates(n.ca), (func(context.Context) (*gatewayapi.AcmeInfoResponse, error))(nil), http.Handler(nil)
	manager, err := n.authorities(agreed.Files())
	if err != nil {
		return err
	}
	if manager != nil {
		defer manager.Close()
		certificate, sign, acmeInfo = manager.GetCertificate, &orders{m: manager}, manager.AcmeInfo
		challenge = manager.HTTPChallenge(http.NotFoundHandler())
	}
	upstream, forUpstream, err := n.upstream(tn)
	if err != nil {
		return err
	}
	watcher, err := n.watch(manager)
	if err != nil {
		return err
	}
	n.live = n.newLive(agreed, table, manager)
	var public *edge.Edge
	leads := func(ctx context.Context, name hostname.Name) (hostname.Answer, error) { return public.Leads(ctx, name) }
	service, err := n.service(agreed, gateway.Config{Routes: table, Tunnel: tn, Certificates: sign, AcmeInfo: acmeInfo, Leads: leads, Upstream: upstream})
	if err != nil {
		return err
	}
	n.live.applied = service.Applied
	routes := filepath.Join(c.DataDir, routesFile)
	if err := service.Restore(routes); err != nil {
		return err
	}
	// What the store knows to be removed is not served again, however old the routes on
	// the disk; what it has yet to hear from the others ends with their word.
	if err := n.live.begin(ctx); err != nil {
		return err
	}
	common := n.newShared(agreed)
	if public, err = n.edge(table, tn, certificate, common.tickets, manager); err != nil {
		return err
	}
	n.reloading.ran(parts{public, table, manager, n.live.Domains})

	var at Listening
	var open []net.Listener
	defer func() {
		for _, l := range open {
			l.Close()
		}
	}()
	listen := func(network, addr string, is *net.Addr) (net.Listener, error) {
		l, err := net.Listen(network, addr)
		if err != nil {
			return nil, fault.Wrap(err, "gateway_listen", "listen at %s", addr).WithFix("set another port, or stop who has this one")
		}
		open, *is = append(open, l), l.Addr()
		return l, nil
	}
	port := func(addr string, p uint16) string { return net.JoinHostPort(addr, strconv.Itoa(int(p))) }
	proxy, err := listen("tcp", port(c.Proxy.ListenAddr, c.Proxy.ListenPort), &at.Proxy)
	if err != nil {
		return err
	}
	rpc, err := listen("tcp", port(n.cfg.Address, n.cfg.Port), &at.RPC)
	if err != nil {
		return err
	}
	var plain net.Listener
	if c.Proxy.HTTPPort != 0 {
		if plain, err = listen("tcp", port(c.Proxy.ListenAddr, c.Proxy.HTTPPort), &at.HTTP); err != nil {
			return err
		}
	}
	var members net.Listener
	if c.Cluster.Listen != "" {
		if members, err = listen("tcp", c.Cluster.Listen, &at.Cluster); err != nil {
			return err
		}
	}
	apps := newGate(public, proxy)
	administrators, err := n.administer(agreed, n.live, apps, string(tn.Mode()), service.Applied, n.watching(agreed, apps, tn, service, watcher))
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return apps.serve(ctx) })
	group.Go(func() error { return n.live.run(ctx) })
	group.Go(func() error { return common.run(ctx) })
	if administrators != nil {
		at.Admin = administrators.l.Addr()
		group.Go(func() error { return administrators.run(ctx) })
	}
	group.Go(func() error { return service.Serve(ctx, rpc) })
	group.Go(func() error { return service.Keep(ctx, routes) })
	group.Go(func() error { return n.together(ctx, agreed, members, table, service.Applied) })
	if forUpstream != nil {
		group.Go(func() error { return forUpstream.keep(ctx) })
	}
	if watcher != nil {
		group.Go(func() error { watcher.Run(ctx); return nil })
	}
	if plain != nil {
		group.Go(func() error { return serve(ctx, plain, public.Redirect(challenge)) })
	}
	n.log.Info("the gateway serves", "rpc", at.RPC.String(), "proxy", at.Proxy.String(), "tunnel", tn.Mode(), "wireguard", n.key.Public().String(), "app", n.self.ID.String())
	if ready != nil {
		ready(at)
	}
	// What is asked of the gateway itself ends at once, beside the connections to apps: who
	// stops it waits no longer than for those.
	group.Go(func() error {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.Background(), administrators.grace(n.reloading.config().Core.Proxy.Timeouts.drain()))
		defer cancel()
		if public.Shutdown(end) != nil {
			n.log.Info("connections were left when the time to finish them was over")
		}
		return nil
	})
	return group.Wait()
}

// service makes the service of a configuration that has what is made at its start.
func (n *Node) service(agreed *cluster.Cluster, cfg gateway.Config) (*gateway.Service, error) {
	c := &n.cfg.Core
	admission, err := n.admission()
	if err != nil {
		return nil, err
	}
	cfg.Judge, cfg.Self, cfg.Admission = n.judge, n.self, admission
	cfg.Custom, _ = cfg.Certificates.(gateway.CustomCertificates) // the private CA makes none
	cfg.Certificate = n.ca.GetCertificate
	cfg.Domains, cfg.Told, cfg.Closed = n.live.Domains, n.live.told, n.closed(agreed)
	cfg.Node = gatewayNode(agreed.Node())
	cfg.Peers = func() []gateway.Node { return n.others(agreed) }
	cfg.TXTPrefix, cfg.Lease, cfg.Version, cfg.Log = c.Proxy.AppAddressNSPrefix, c.Auth.Lease.Duration, n.Version, n.log
	return gateway.New(cfg)
}

func (n *Node) edge(table *route.Table, tn *tunnel.Tunnel, certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), tickets func() [][32]byte, manager *acme.Manager) (*edge.Edge, error) {
	p := &n.cfg.Core.Proxy
	pages := http.NewServeMux()
	pages.HandleFunc("GET /health", func(http.ResponseWriter, *http.Request) {})
	pages.HandleFunc("GET /{$}", func(http.ResponseWriter, *http.Request) {})
	cfg := edge.Config{
		Rules: n.live.rules, Operator: n.live.operator, Routes: table, GetCertificate: certificate, TicketKeys: tickets, Pages: pages, Evidence: n.witness(tn).Answer,
		Dial:      func(ctx context.Context, to netip.AddrPort) (net.Conn, error) { return tn.Dial(ctx, to) },
		TXTPrefix: p.AppAddressNSPrefix, TXTCompat: p.AppAddressNSCompat, Log: n.log,
		Ended: n.ended,
	}
	if manager != nil {
		cfg.Challenge = manager.Challenged
	}
	if p.CustomDomains {
		dns, err := edge.SystemDNS()
		if err != nil {
			return nil, err
		}
		cfg.TXT = dns
	}
	return edge.New(cfg)
}

// serve serves plain HTTP until ctx ends.
func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 30 * time.Second,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(slog.NewTextHandler(io.Discard, nil), slog.LevelDebug)}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
