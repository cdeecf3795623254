// SPDX-License-Identifier: Apache-2.0

// Package gwclient keeps an instance registered at the gateways of its app, and its
// certificates with them.
//
// Each gateway has a loop of its own: it is dialled over an attached attested channel,
// appraised by the manifest's gateway_policy, told this instance's WireGuard key, and
// asked again before the route's lease ends, or at once when the tunnel to it has gone
// silent. One that is away holds up nobody else. What gateways say of further ones leads
// to more loops, under the same judgement.
//
// Guarantees: nothing that a gateway says reaches the tunnel before it is a typed value
// within limits, and a gateway is believed on itself only; certificates count only for
// the channel key, and names that were asked for.
//
// Trusted: the policy, which is measured. Attacker-controlled: the addresses, the
// network, and every byte of a gateway, even one that was accepted.
//
// Implements spec/gateway.md §1.1 and §3.2; threats.md K01, K03, C05.
package gwclient

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

// Times of a gateway's loop.
const (
	Refresh  = 5 * time.Minute  // between registrations that hold
	Silence  = 75 * time.Second // without a handshake or packet, beyond which the gateway is asked again
	look     = 5 * time.Second
	first    = time.Second // after a failure, doubling up to most
	most     = 30 * time.Second
	attempt  = 60 * time.Second
	maxReply = 64 << 10 // bytes
	maxNames = 64
)

// Config says who registers where.
type Config struct {
	URLs       []string // https
	Appraiser  channel.Appraiser
	Intended   channel.Intended
	Attester   channel.Attester // of this guest
	Key        *channel.Key     // the system channel key
	Signer     crypto.Signer    // the same key, for certificate requests
	App        dstack.AppID
	Instance   dstack.InstanceID
	AppCompose []byte // the measured manifest

	// Ports are those of which TLS ends in this guest.
	Ports []uint16
	// Domains are the app's own, and the port of Ports that each leads to.
	Domains map[string]uint16
	// Lease returns the KMS's lease, if there is one.
	Lease func() (document, signature []byte)
	// Tunnel changes the tunnel to the gateways.
	Tunnel func(context.Context, initrpc.TunnelChange) (initrpc.TunnelStatus, error)

	Log *slog.Logger
}

// Client keeps an instance registered. Make it with New.
type Client struct {
	cfg Config

	applying sync.Mutex // held while the tunnel changes
	applied  string     // what it was made of

	mu       sync.Mutex
	gateways map[string]*gateway
	more     chan struct{} // there is a new one
}

// gateway is one gateway.
type gateway struct {
	url     string
	addr    string // host:port
	now     *registered
	certs   map[string]*due // by custom domain, "" for the names under the gateway's
	failure string
	poke    chan struct{}
}

// registered is what a gateway answered.
type registered struct {
	address netip.Addr // of this guest
	peer    initrpc.TunnelPeer
	until   time.Time
	domain  string
}

// due is a certificate, of no other gateway's word, and when it is asked for again.
type due struct {
	have     *served // nil: none yet
	at       time.Time
	attempts int
}

// served is a certificate, and where its names lead.
type served struct {
	cert  *tls.Certificate
	ports map[string]uint16
	until time.Time
}

// New returns a client. Code gateway_url.
func New(cfg Config) (*Client, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Lease == nil {
		cfg.Lease = func() ([]byte, []byte) { return nil, nil }
	}
	c := &Client{cfg: cfg, gateways: map[string]*gateway{}, more: make(chan struct{}, 1)}
	for _, u := range cfg.URLs {
		if err := c.add(u); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// add lists a gateway, once and up to the most.
func (c *Client) add(text string) error {
	u, err := url.Parse(text)
	if err != nil || len(text) > 2048 || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fault.New("gateway_url", "%.100q is not the https URL of a gateway", text)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	addr := net.JoinHostPort(u.Hostname(), port)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gateways[addr] == nil && len(c.gateways) < initrpc.MaxPeers {
		c.gateways[addr] = &gateway{url: text, addr: addr, certs: map[string]*due{}, poke: make(chan struct{}, 1)}
		select {
		case c.more <- struct{}{}:
		default:
		}
	}
	return nil
}

// Run registers until ctx ends.
func (c *Client) Run(ctx context.Context) {
	var loops sync.WaitGroup
	started := map[string]bool{}
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		c.mu.Lock()
		for addr, g := range c.gateways {
			if !started[addr] {
				started[addr] = true
				loops.Go(func() { c.keep(ctx, g) })
			}
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			loops.Wait()
			return
		case <-c.more:
		case <-tick.C:
			c.listen(ctx)
		}
	}
}

// listen asks a gateway again that the tunnel has not heard for long.
func (c *Client) listen(ctx context.Context) {
	status, err := c.cfg.Tunnel(ctx, initrpc.TunnelChange{})
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, g := range c.gateways {
		if g.now == nil {
			continue
		}
		for _, h := range status.Handshakes {
			// WireGuard makes a new session every two minutes at most while there is traffic,
			// and keepalives are traffic.
			if bytes.Equal(h.Key, g.now.peer.Key) && h.At != 0 && time.Since(time.Unix(h.At, 0)) > 2*time.Minute+Silence {
				select {
				case g.poke <- struct{}{}:
				default:
				}
			}
		}
	}
}

// keep is the loop of one gateway.
func (c *Client) keep(ctx context.Context, g *gateway) {
	wait := time.Duration(0)
	failed := 0
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-g.poke:
			timer.Stop()
		}
		err := c.once(ctx, g)
		if ctx.Err() != nil {
			return
		}
		c.mu.Lock()
		was := g.failure
		if err != nil {
			g.failure = err.Error()
			wait = min(first<<min(failed, 10), most)
			failed++
		} else {
			g.failure, failed = "", 0
			wait = min(Refresh, time.Until(g.now.until)/2)
			for _, d := range g.certs {
				wait = min(wait, max(time.Until(d.at), first))
			}
		}
		g.mayForget()
		c.mu.Unlock()
		// Gateways that start together are not to be asked together.
		wait = max(wait-time.Duration(mrand.Float64()*0.2*float64(wait)), 100*time.Millisecond)
		if err != nil && was != err.Error() {
			c.cfg.Log.Warn("gateway", "url", g.url, "code", fault.Code(err), "error", err)
		}
		if err := c.apply(ctx); err != nil {
			c.cfg.Log.Warn("gateway: tunnel", "code", fault.Code(err), "error", err)
		}
	}
}

// mayForget drops a gateway's answer when its route has ended.
func (g *gateway) mayForget() {
	if g.now != nil && time.Now().After(g.now.until) {
		g.now = nil
	}
}

// once registers at a gateway over one connection, and gets a certificate when one is due.
func (c *Client) once(ctx context.Context, g *gateway) error {
	ctx, cancel := context.WithTimeout(ctx, attempt)
	defer cancel()
	status, err := c.cfg.Tunnel(ctx, initrpc.TunnelChange{})
	if err != nil {
		return err
	}
	conn, err := channel.Dial(ctx, "tcp", g.addr, &channel.Config{
		Appraiser: c.cfg.Appraiser, Intended: c.cfg.Intended, Attester: c.cfg.Attester, Key: c.cfg.Key,
		AppEvidence: true, // a gateway is an app, which gateway_policy knows by its workload
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	client, done := over(conn)
	defer done()
	req := &api.RegisterCvmRequest{ClientPublicKey: base64.StdEncoding.EncodeToString(status.Key), AppCompose: c.cfg.AppCompose}
	req.LeaseDocument, req.LeaseSignature = c.cfg.Lease()
	var resp api.RegisterCvmResponse
	if err := client.Call(ctx, "RegisterCvm", req, &resp); err != nil {
		return err
	}
	now, err := parse(ctx, &resp)
	if err != nil {
		return err
	}
	c.mu.Lock()
	if old := g.now; old == nil || old.domain != now.domain {
		c.cfg.Log.Info("registered", "gateway", g.url, "address", now.address.String(), "domain", now.domain, "until", now.until)
	}
	g.now = now
	c.mu.Unlock()
	for _, other := range resp.Gateways[min(1, len(resp.Gateways)):] {
		if len(other.Url) > 0 {
			_ = c.add(other.Url) // what is no URL leads nowhere
		}
	}
	// The route must be there before a CA, or a user, comes by it.
	if err := c.apply(ctx); err != nil {
		return err
	}
	if err := c.certify(ctx, client, g, "", c.names(now.domain)); err != nil {
		return err
	}
	for domain, port := range c.cfg.Domains {
		if err := c.certify(ctx, client, g, domain, map[string]uint16{domain: port}); err != nil {
			return err
		}
	}
	return nil
}

// over returns a client that speaks over one connection and no other.
func over(conn *channel.Conn) (*prpc.Client, func()) {
	used := false
	t := &http.Transport{MaxConnsPerHost: 1, DisableCompression: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		if used {
			return nil, fault.New("gateway_broken", "the gateway closed the connection on which it was verified")
		}
		used = true
		return conn, nil
	}}
	return &prpc.Client{BaseURL: "http://gateway/prpc", HTTP: &http.Client{Transport: t}}, t.CloseIdleConnections
}

// domainForm is what a base domain looks like.
var domainForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)

// parse makes typed values of a registration's answer: what the gateway says of itself,
// which is its first server. Code gateway_reply.
func parse(ctx context.Context, r *api.RegisterCvmResponse) (*registered, error) {
	bad := func(format string, args ...any) (*registered, error) {
		return nil, fault.New("gateway_reply", "the gateway's answer: "+format, args...)
	}
	if r.Wg == nil || r.Agent == nil || len(r.Wg.Servers) == 0 || len(r.Gateways) > 64 || len(r.Wg.Servers) > 64 {
		return bad("it lacks parts, or has too many")
	}
	own := r.Wg.Servers[0]
	key, err := base64.StdEncoding.Strict().DecodeString(own.Pk)
	if err != nil || len(key) != 32 {
		return bad("its WireGuard key is not base64 of 32 bytes")
	}
	out := &registered{peer: initrpc.TunnelPeer{Key: key}, domain: strings.ToLower(r.Agent.Domain), until: time.Unix(int64(min(r.LeaseUntil, 1<<40)), 0)}
	if out.address, err = netip.ParseAddr(r.Wg.ClientIp); err != nil {
		return bad("client_ip is no address")
	}
	text, _, _ := strings.Cut(own.Ip, "/") // upstream's has the network's length
	if out.peer.Address, err = netip.ParseAddr(text); err != nil {
		return bad("its address in the tunnel is none")
	}
	if out.peer.Endpoint, err = endpoint(ctx, own.Endpoint); err != nil {
		return bad("its endpoint: %v", err)
	}
	if out.domain != "" && (len(out.domain) > 200 || !domainForm.MatchString(out.domain)) {
		return bad("its domain is none")
	}
	switch now := time.Now(); {
	case r.LeaseUntil == 0: // upstream's gateways give none
		out.until = now.Add(2 * Refresh)
	case out.until.Before(now) || out.until.After(now.Add(25*time.Hour)):
		return bad("its lease ends at %s", out.until)
	}
	change := initrpc.TunnelChange{Addresses: []netip.Addr{out.address}, Peers: []initrpc.TunnelPeer{out.peer}}
	return out, change.Check()
}

// endpoint resolves host:port.
func endpoint(ctx context.Context, text string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil || len(text) > 300 {
		return netip.AddrPort{}, fmt.Errorf("%.100q is not host:port", text)
	}
	n, err := net.DefaultResolver.LookupPort(ctx, "udp", port)
	if err != nil {
		return netip.AddrPort{}, err
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		list, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return netip.AddrPort{}, err
		}
		a = list[0]
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), nil
}

// apply makes the tunnel that of all gateways that answered.
func (c *Client) apply(ctx context.Context) error {
	c.applying.Lock()
	defer c.applying.Unlock()
	change := c.wanted()
	text := fmt.Sprint(change)
	if text == c.applied {
		return nil
	}
	if _, err := c.cfg.Tunnel(ctx, change); err != nil {
		return err
	}
	c.applied = text
	return nil
}

// wanted is the tunnel to all gateways that answered.
func (c *Client) wanted() initrpc.TunnelChange {
	c.mu.Lock()
	defer c.mu.Unlock()
	change := initrpc.TunnelChange{Set: true}
	for _, addr := range slices.Sorted(maps.Keys(c.gateways)) {
		now := c.gateways[addr].now
		if now == nil || slices.ContainsFunc(change.Peers, func(p initrpc.TunnelPeer) bool {
			return bytes.Equal(p.Key, now.peer.Key) || p.Address == now.peer.Address
		}) {
			continue // another address of the same gateway
		}
		change.Peers = append(change.Peers, now.peer)
		if !slices.Contains(change.Addresses, now.address) {
			change.Addresses = append(change.Addresses, now.address)
		}
	}
	return change
}

// names are the hosts under a domain that lead to ports of which TLS ends here.
func (c *Client) names(domain string) map[string]uint16 {
	out := map[string]uint16{}
	if domain == "" {
		return out
	}
	for _, port := range c.cfg.Ports {
		for _, id := range []string{c.cfg.App.String(), c.cfg.Instance.String()} {
			forms := []string{fmt.Sprintf("%s-%d", id, port)}
			if port == 80 {
				forms = append(forms, id)
			}
			for _, f := range forms {
				if len(out) < maxNames {
					out[f+"."+domain] = port
				}
			}
		}
	}
	return out
}

// certify gets a certificate for names that lead here, if one is due: of a custom domain,
// or ("") those under a gateway's. That there is none is no error: the route holds.
func (c *Client) certify(ctx context.Context, client *prpc.Client, g *gateway, domain string, names map[string]uint16) error {
	c.mu.Lock()
	if len(names) == 0 {
		delete(g.certs, domain)
		c.mu.Unlock()
		return nil
	}
	d := g.certs[domain]
	if d == nil || d.have != nil && !maps.Equal(d.have.ports, names) {
		d = &due{}
		g.certs[domain] = d
	}
	wait := time.Until(d.at)
	c.mu.Unlock()
	if wait > 0 {
		return nil
	}
	template := &x509.CertificateRequest{}
	for n := range names {
		template.DNSNames = append(template.DNSNames, n)
	}
	slices.Sort(template.DNSNames)
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, c.cfg.Signer)
	if err != nil {
		return err
	}
	var resp api.GetCertificateResponse
	err = client.Call(ctx, "GetCertificate", &api.GetCertificateRequest{Csr: csr}, &resp)
	var s *served
	if err == nil {
		s, err = c.take(&resp, names)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		// It is asked for again, less and less often.
		d.at = time.Now().Add(min(first<<min(d.attempts+2, 12), 10*time.Minute))
		d.attempts++
		c.cfg.Log.Warn("certificate", "gateway", g.url, "domain", domain, "code", fault.Code(err), "error", err)
		return nil
	}
	d.attempts, d.at = 0, time.Unix(int64(min(resp.RenewAt, 1<<40)), 0)
	if !d.at.Before(s.until) || d.at.Before(time.Now()) {
		d.at = time.Now().Add(time.Until(s.until) / 2)
	}
	if d.have == nil || !bytes.Equal(d.have.cert.Certificate[0], s.cert.Certificate[0]) {
		c.cfg.Log.Info("certificate", "gateway", g.url, "domain", domain, "names", len(names), "until", s.until)
	}
	d.have = s
	return nil
}

// take checks a certificate: of the channel key, and for the names that were asked for.
func (c *Client) take(r *api.GetCertificateResponse, names map[string]uint16) (*served, error) {
	bad := func(format string, args ...any) (*served, error) {
		return nil, fault.New("gateway_certificate", "the gateway's certificate: "+format, args...)
	}
	if len(r.Chain) > maxReply {
		return bad("%d bytes", len(r.Chain))
	}
	cert := &tls.Certificate{PrivateKey: c.cfg.Signer}
	for rest := []byte(r.Chain); len(cert.Certificate) < 8; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert.Certificate = append(cert.Certificate, block.Bytes)
	}
	if len(cert.Certificate) == 0 {
		return bad("there is none")
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return bad("%v", err)
	}
	if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, c.cfg.Key.SPKI()) {
		return bad("it is for another key")
	}
	for n := range names {
		if err := leaf.VerifyHostname(n); err != nil {
			return bad("%v", err)
		}
	}
	if time.Now().After(leaf.NotAfter) {
		return bad("it ended at %s", leaf.NotAfter)
	}
	cert.Leaf = leaf
	return &served{cert: cert, ports: names, until: leaf.NotAfter}, nil
}

// Certificate returns the certificate for a host that a gateway, by its address in the
// tunnel, leads here, and the port that it leads to. Code gateway_name.
func (c *Client) Certificate(host string, from netip.Addr) (*tls.Certificate, uint16, error) {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, g := range c.gateways {
		if g.now == nil || g.now.peer.Address != from {
			continue
		}
		for _, d := range g.certs {
			if d.have != nil && d.have.ports[host] != 0 && time.Now().Before(d.have.until) {
				return d.have.cert, d.have.ports[host], nil
			}
		}
	}
	return nil, 0, fault.New("gateway_name", "%.100q is no name of this instance with a certificate at the gateway %s", host, from)
}

// Ready returns nil once some gateway has a route to this instance.
func (c *Client) Ready() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, g := range c.gateways {
		if g.now != nil {
			return nil
		}
		if g.failure != "" {
			errs = append(errs, fmt.Errorf("%s: %s", g.url, g.failure))
		}
	}
	return errors.Join(append(errs, errors.New("no gateway has a route to this instance"))...)
}
