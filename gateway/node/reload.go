// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// certificatesTime is how long the certificates of one domain may take to be read again.
const certificatesTime = 10 * time.Second

// adjust makes c what now is, but for what a running gateway takes anew.
func (c *Config) adjust(now *Config) {
	c.LogLevel = now.LogLevel
	p, q := &c.Core.Proxy, &now.Core.Proxy
	p.MaxConnections, p.MaxConnectionsPerApp = q.MaxConnections, q.MaxConnectionsPerApp
	p.MaxConnectionsPerPeer, p.ConnectionRatePerPeer = q.MaxConnectionsPerPeer, q.ConnectionRatePerPeer
	p.InboundPPSources, p.sources = q.InboundPPSources, q.sources
	p.Timeouts = q.Timeouts
	c.Core.Auth.Policy.File = now.Core.Auth.Policy.File
}

func (p *ProxyConfig) adjustable() edge.Adjustable {
	t := p.Timeouts
	return edge.Adjustable{
		Limits: edge.Limits{Connections: p.MaxConnections, PerSource: p.MaxConnectionsPerPeer, Rate: p.ConnectionRatePerPeer},
		Timeouts: edge.Timeouts{
			Connect: t.Connect.Duration, Handshake: t.Handshake.Duration, DNS: t.DNSResolve.Duration,
			PROXY: t.PPHeader.Duration, Idle: t.Idle.Duration, Total: t.Total.Duration,
		},
		Balancers: p.sources,
	}
}

// parts are those of a run that take something anew.
type parts struct {
	public  *edge.Edge
	table   *route.Table
	manager *acme.Manager // nil: the private CA certifies
	domains func() []gateway.Domain
}

// reloading is what is in force of what can change, and where.
type reloading struct {
	mu        sync.Mutex
	cfg       Config
	level     *slog.LevelVar
	usual     slog.Level // of a configuration that says nothing
	parts     parts
	documents *policy.Authority // nil when no policy document decides who gets a route
}

func (r *reloading) begin(level *slog.LevelVar) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.level = level; level != nil {
		r.usual = r.level.Level()
	}
	r.apply()
}

func (r *reloading) config() Config {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cfg
}

// ran takes the parts of a run.
func (r *reloading) ran(p parts) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.parts = p
	r.apply()
}

func (r *reloading) decides(a *policy.Authority) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.documents = a
}

// apply gives the parts that there are what is in force.
func (r *reloading) apply() {
	if r.level != nil {
		level := r.usual
		if r.cfg.LogLevel != "" {
			_ = level.UnmarshalText([]byte(r.cfg.LogLevel)) // check has seen it
		}
		r.level.Set(level)
	}
	if r.parts.public != nil {
		r.parts.public.Adjust(r.cfg.Core.Proxy.adjustable())
		r.parts.table.LimitPerApp(r.cfg.Core.Proxy.MaxConnectionsPerApp)
	}
}

// Reload takes from a configuration what a running gateway can: the level of the log,
// limits and times of connections, balancers, the policy's file. Public certificates are
// read again from where the gateways keep them. No connection ends by it. Codes
// gateway_restart, which names the other keys that changed, of which nothing is taken;
// authority_policy and those of policy.Authority.Update; those of acme.Manager.Reload. With
// an error the rest counts.
func (n *Node) Reload(ctx context.Context, c Config) error {
	r := &n.reloading
	r.mu.Lock()
	r.cfg.adjust(&c)
	keys := config.Changed(&r.cfg, &c)
	r.apply()
	p, documents, file := r.parts, r.documents, r.cfg.Core.Auth.Policy
	r.mu.Unlock()
	var errs []error
	if len(keys) > 0 {
		errs = append(errs, fault.New("gateway_restart", "what changed in %s counts after a restart only", strings.Join(keys, ", ")).
			WithFix("restart the gateway: the others serve meanwhile, and connections have time to finish"))
	}
	if documents != nil {
		errs = append(errs, file.Update(documents))
	}
	if p.manager != nil {
		for _, d := range p.domains() {
			one, cancel := context.WithTimeout(ctx, certificatesTime)
			errs = append(errs, p.manager.Reload(one, d.Name))
			cancel()
		}
	}
	return errors.Join(errs...)
}

// ReloadAt loads the configuration at each signal, and takes of it what Reload does, until
// ctx ends. One that cannot be loaded changes nothing.
func (n *Node) ReloadAt(ctx context.Context, signals <-chan os.Signal, load func() (Config, error)) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
		}
		c, err := load()
		if err != nil {
			n.log.Error("the configuration is not taken", "code", fault.Code(err), "error", err)
			continue
		}
		if err := n.Reload(ctx, c); err != nil {
			for _, err := range joined(err) {
				n.log.Warn("not all of the configuration is taken", "code", fault.Code(err), "error", err)
			}
		}
		n.log.Info("the configuration was read again")
	}
}

// joined are the errors that were joined to one.
func joined(err error) []error {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		return many.Unwrap()
	}
	return []error{err}
}
