// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/admin"
	"github.com/dstack-go/dstack/gateway/cluster"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/admintoken"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// AdminConfig is the administrators' listener (package gateway/admin). Keys are upstream's.
type AdminConfig struct {
	Enabled bool `toml:"enabled"`
	// Address is an IP address or unix:/path, a socket of this user alone; Port is the
	// address's. Beyond loopback TLS is required, whose certificate is the private CA's.
	Address string `toml:"address"`
	Port    uint16 `toml:"port"`
	TLS     bool   `toml:"tls"`
	// AuthToken has at least 16 characters; AdminToken is its other name, and the variables
	// DSTACK_GATEWAY_ADMIN_TOKEN and ADMIN_API_TOKEN are it too.
	AuthToken  config.Secret `toml:"auth_token"`
	AdminToken config.Secret `toml:"admin_token"`
	// HtpasswdFile has names and bcrypt hashes.
	HtpasswdFile string `toml:"htpasswd_file"`
	// InsecureNoAuth lets everyone in who reaches the listener.
	InsecureNoAuth bool `toml:"insecure_no_auth"`
}

// adminTokens are upstream's variables for the token, if the file has none.
var adminTokens = []string{"DSTACK_GATEWAY_ADMIN_TOKEN", "ADMIN_API_TOKEN"}

// check takes the token of the environment, and refuses a listener that nobody or
// everybody could use. Codes gateway_config, those of admintoken.New.
func (c *AdminConfig) check(environ []string) error {
	if c.AuthToken.Reveal() != "" && c.AdminToken.Reveal() != "" {
		return bad("core.admin.auth_token and admin_token are both set")
	}
	if c.AuthToken.Reveal() == "" {
		c.AuthToken = c.AdminToken
	}
	if c.AuthToken.Reveal() == "" {
		c.AuthToken = admintoken.FromEnv(environ, adminTokens...)
	}
	if !c.Enabled {
		return nil
	}
	if file, ok := strings.CutPrefix(c.Address, "unix:"); ok && !filepath.IsAbs(file) {
		return bad("core.admin.address: %q is no absolute path", file)
	}
	_, err := c.guard()
	return err
}

func (c *AdminConfig) guard() (*admintoken.Guard, error) {
	return admintoken.New(admintoken.Config{Realm: "dstack-gateway admin", Token: c.AuthToken, Htpasswd: c.HtpasswdFile, Open: c.InsecureNoAuth, Query: true})
}

// errExit ends a run that an administrator ended.
var errExit = errors.New("an administrator ended the gateway")

// administration is the administrators' part of a run.
type administration struct {
	service *admin.Service
	l       net.Listener
	ended   chan struct{}
	once    sync.Once
	forced  atomic.Bool
}

// administer opens the administrators' listener; nil: there is none.
func (n *Node) administer(agreed *cluster.Cluster, l *live, proxy *gate, tunnel string, applied func(), watch watching) (*administration, error) {
	c := &n.cfg.Core.Admin
	if !c.Enabled {
		return nil, nil
	}
	guard, err := c.guard()
	if err != nil {
		return nil, err
	}
	local := strings.HasPrefix(c.Address, "unix:")
	if c.InsecureNoAuth && !local {
		n.log.Warn("whoever reaches the administrators' listener is one (core.admin.insecure_no_auth)", "address", c.Address)
	}
	a := &administration{ended: make(chan struct{})}
	trust := "production"
	if n.judge.Development {
		trust = "development"
	}
	cfg := admin.Config{
		Store: agreed, Routes: l.table, Fixed: n.domains, Domains: l.Domains,
		Node: func() gateway.Node {
			own, _ := l.told(gatewayNode(agreed.Node()))
			return own
		},
		Peers: func() []gateway.Node {
			var out []gateway.Node
			for _, p := range n.others(agreed) {
				p, _ = l.told(p)
				out = append(out, p)
			}
			return out
		},
		CheckDNS: func(provider string, params map[string]string) error {
			_, err := acme.NewCredential(provider, params)
			return err
		},
		Directories: list(n.cfg.Core.ACME.Directories), Cluster: membership{agreed}, Public: proxy, Applied: applied,
		Exit: a.exit,
		CT:   watch.logs, Unready: watch.metrics.Unready, Pages: watch.pages,
		Guard: guard, Trust: trust, Tunnel: tunnel, Version: n.Version, Log: n.log,
	}
	if l.manager != nil {
		cfg.Certificates, cfg.Accounts = certificates{l.manager}, accounts{n, l.manager}
	} else {
		cfg.CheckDomain, cfg.Private = n.ca.Admits, n.privateStatus
	}
	if a.service, err = admin.New(cfg); err != nil {
		return nil, err
	}
	var secure *tls.Config
	if c.TLS && !local {
		secure = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: n.ca.GetCertificate}
	}
	a.l, err = admin.Listen(c.Address, c.Port, secure)
	return a, err
}

func (a *administration) exit(force bool) {
	if force {
		a.forced.Store(true)
	}
	a.once.Do(func() { close(a.ended) })
}

// run serves administrators until ctx ends; errExit when one of them ended the gateway.
func (a *administration) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- a.service.Serve(ctx, a.l) }()
	select {
	case err := <-done:
		return err
	case <-a.ended:
	}
	cancel()
	return errors.Join(errExit, <-done)
}

// grace is how long connections may go on: as long as is usual, unless an administrator
// was in a hurry.
func (a *administration) grace(usual time.Duration) time.Duration {
	if a != nil && a.forced.Load() {
		return 0
	}
	return usual
}

// gate opens and closes the public listener. While it is closed, a balancer in front sees
// that nobody answers, and connections that there are go on.
type gate struct {
	edge *edge.Edge
	addr string

	mu       sync.Mutex
	shut     context.CancelFunc // ends the listener that is open; nil: none is
	draining bool
	next     chan net.Listener
}

func newGate(e *edge.Edge, l net.Listener) *gate {
	g := &gate{edge: e, addr: l.Addr().String(), next: make(chan net.Listener, 1)}
	g.next <- l
	return g
}

// serve serves the listeners, one after the other, until ctx ends.
func (g *gate) serve(ctx context.Context) error {
	for {
		var l net.Listener
		select {
		case <-ctx.Done():
			g.discard()
			return nil
		case l = <-g.next:
		}
		one, cancel := context.WithCancel(ctx)
		g.mu.Lock()
		g.shut = cancel
		if g.draining {
			cancel()
		}
		g.mu.Unlock()
		err := g.edge.Serve(one, l)
		cancel()
		if err != nil {
			return err
		}
	}
}

// Drain implements admin.Public. Code gateway_listen.
func (g *gate) Drain(on bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if on == g.draining {
		return nil
	}
	if on {
		g.draining = true
		if g.shut != nil {
			g.shut()
		}
		g.discard()
		return nil
	}
	var l net.Listener
	var err error
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		// The one that was shut may not be closed yet.
		if l, err = net.Listen("tcp", g.addr); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return fault.Wrap(err, "gateway_listen", "listen at %s again", g.addr)
	}
	g.draining, g.shut = false, nil
	g.next <- l
	return nil
}

// discard closes a listener that nobody serves yet.
func (g *gate) discard() {
	select {
	case l := <-g.next:
		l.Close()
	default:
	}
}

// Draining implements admin.Public.
func (g *gate) Draining() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.draining
}

// Connections implements admin.Public.
func (g *gate) Connections() uint64 { return uint64(max(g.edge.Stats().Open, 0)) }

// membership is the cluster as administrators see it.
type membership struct{ c *cluster.Cluster }

// heardWithin is how long ago a member that is reached was last heard.
const heardWithin = 15 * time.Second

func (m membership) Members(ctx context.Context) (*api.ListMembersResponse, error) {
	members, quorum, err := m.c.Members(ctx)
	if err != nil {
		return nil, err
	}
	out := &api.ListMembersResponse{Quorum: quorum}
	for _, x := range members {
		out.Members = append(out.Members, &api.Member{
			Id: x.UUID, Name: "gateway " + strconv.FormatUint(uint64(x.ID), 10), Url: x.URL, Leader: x.Leader, Learner: x.Learner, Reachable: time.Since(x.Heard) < heardWithin,
		})
	}
	return out, nil
}

func (m membership) Invite(ctx context.Context) (*api.InviteMemberResponse, error) {
	token, until, err := m.c.Invite(ctx)
	if err != nil {
		return nil, err
	}
	return &api.InviteMemberResponse{Token: token, Address: m.c.Node().Peer, Until: uint64(until.Unix())}, nil
}

func (m membership) Join(ctx context.Context, addr, token string) error {
	return m.c.Join(ctx, addr, token)
}

func (m membership) Remove(ctx context.Context, id string) error { return m.c.Remove(ctx, id) }

func (m membership) ReleaseLock(ctx context.Context, base hostname.Name) error {
	for _, name := range names(base) {
		if err := m.c.ReleaseLock(ctx, "issue_cert_"+name); err != nil { // CertMagic's name
			return err
		}
	}
	return nil
}

// names are those of a base domain's certificates.
func names(base hostname.Name) []string { return []string{"*." + string(base), string(base)} }

// certificates are the manager's as administrators see them.
type certificates struct{ m *acme.Manager }

// ends is when the first of a base domain's certificates ends; zero: one is missing.
func (c certificates) ends(base hostname.Name) (first time.Time) {
	all := c.each(base)
	for _, name := range names(base) {
		switch at := all[name]; {
		case at.IsZero():
			return time.Time{}
		case first.IsZero() || at.Before(first):
			first = at
		}
	}
	return first
}

// each are when a base domain's certificates end, by name.
func (c certificates) each(base hostname.Name) map[string]time.Time {
	out := map[string]time.Time{}
	for _, s := range c.m.Status() {
		if slices.Contains(names(base), s.Name) {
			out[s.Name] = s.NotAfter
		}
	}
	return out
}

// Renew implements admin.Certificates: whether one was renewed is whether one ends at
// another time now.
func (c certificates) Renew(ctx context.Context, base hostname.Name, force bool) (bool, time.Time, error) {
	before := c.each(base)
	if err := c.m.Renew(ctx, base, force); err != nil {
		return false, time.Time{}, err
	}
	renewed := force
	for name, at := range c.each(base) {
		renewed = renewed || !at.Equal(before[name])
	}
	return renewed, c.ends(base), nil
}

// Status implements admin.Certificates.
func (c certificates) Status(base hostname.Name) admin.CertificateStatus {
	out := admin.CertificateStatus{NotAfter: c.ends(base)}
	out.Served = !out.NotAfter.IsZero()
	for _, s := range c.m.Status() {
		if slices.Contains(names(base), s.Name) && s.Err != "" {
			out.Err = s.Err
		}
	}
	for _, s := range c.m.CAA() {
		if s.Domain == base && s.Err != nil && out.Err == "" {
			out.Err = s.Err.Error()
		}
	}
	return out
}

// Reload implements admin.Certificates.
func (c certificates) Reload(ctx context.Context, base hostname.Name) error {
	return c.m.Reload(ctx, base)
}

// Attested implements admin.Certificates.
func (c certificates) Attested(ctx context.Context, base hostname.Name, limit int) ([]admin.AttestedKey, error) {
	keys, _, err := c.m.Keys(ctx, names(base)[0], 0, limit)
	if err != nil {
		return nil, err
	}
	var out []admin.AttestedKey
	for _, k := range keys {
		out = append(out, admin.AttestedKey{SPKI: k.SPKI, Quote: k.Quote, At: k.At})
	}
	return out, nil
}

// accounts are the manager's as administrators see them.
type accounts struct {
	n *Node
	m *acme.Manager
}

// SetCAA implements admin.Accounts.
func (a accounts) SetCAA(ctx context.Context) error { return a.m.SetCAA(ctx) }

// RotateAccount implements admin.Accounts: the account is that at the preferred authority.
func (a accounts) RotateAccount(ctx context.Context) (uri string, domains int, err error) {
	all, err := a.m.RotateAccount(ctx)
	if err != nil || len(all) == 0 {
		return "", 0, err
	}
	if a.n.cfg.Core.ACME.CAA != acme.CAAOff {
		domains = len(a.n.live.Domains())
	}
	return all[0].URI, domains, nil
}
