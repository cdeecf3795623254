// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/cluster"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/internal/fault"
)

// Times of what is done about settings by and by.
const (
	// removedFor is how long a removal is told: evidence from before it gives no lease then.
	removedFor = 3 * time.Hour
	pruneEvery = 10 * time.Minute
	// forcedEvery is the least time between renewals of a domain that operators' times ask
	// for: with certificates shorter than those there would be no end of them.
	forcedEvery = 24 * time.Hour
)

// live is what operators decided, as this gateway applies it: domains beside those of the
// configuration file, gateways that are down, ports, drained and removed instances.
type live struct {
	n       *Node
	id      uint32 // of this gateway
	peers   func() []gateway.Node
	store   settings.Store
	table   *route.Table
	manager *acme.Manager // nil: the private CA certifies
	applied func()        // the tunnel follows the table
	now     func() time.Time
	state   atomic.Pointer[liveState]
}

type liveState struct {
	*settings.Snapshot
	domains []gateway.Domain // the preferred first
	rules   hostname.Rules
}

func (n *Node) newLive(agreed *cluster.Cluster, table *route.Table, manager *acme.Manager) *live {
	return n.liveOf(agreed, agreed.Node().ID, func() []gateway.Node { return n.others(agreed) }, table, manager)
}

func (n *Node) liveOf(store settings.Store, id uint32, peers func() []gateway.Node, table *route.Table, manager *acme.Manager) *live {
	l := &live{n: n, id: id, peers: peers, store: store, table: table, manager: manager, applied: func() {}, now: time.Now}
	l.state.Store(l.of(&settings.Snapshot{}))
	return l
}

// of makes the state of a snapshot. A domain that operators gave a priority above 0 goes
// before those of the file, unless another gateway is the one to prefer it.
func (l *live) of(s *settings.Snapshot) *liveState {
	st := &liveState{Snapshot: s}
	fixed := func(name hostname.Name) bool {
		return slices.ContainsFunc(l.n.domains, func(d gateway.Domain) bool { return d.Name == name })
	}
	var later []gateway.Domain
	for _, name := range s.Names(l.id) {
		d := s.Domains[name]
		switch {
		case fixed(name): // the file has the word
		case d.Priority > 0 && (d.Node == 0 || d.Node == l.id):
			st.domains = append(st.domains, gateway.Domain{Name: name, Port: d.Port})
		default:
			later = append(later, gateway.Domain{Name: name, Port: d.Port})
		}
	}
	st.domains = append(append(st.domains, l.n.domains...), later...)
	for _, d := range st.domains {
		st.rules.Bases = append(st.rules.Bases, d.Name)
	}
	return st
}

// Domains, rules, operator, told and closed are asked by the parts that serve.
func (l *live) Domains() []gateway.Domain { return l.state.Load().domains }

func (l *live) rules() hostname.Rules { return l.state.Load().rules }

func (l *live) operator(id dstack.InstanceID) *portpolicy.Policy { return l.state.Load().Policies[id] }

func (l *live) told(n gateway.Node) (gateway.Node, bool) {
	s := l.state.Load()
	if url := s.URLs[n.ID]; url != "" {
		n.URL = url
	}
	return n, !s.Down[n.ID]
}

// closed is upstream's refusal. Code register_node_down.
func (l *live) closed() error {
	if !l.state.Load().Down[l.id] {
		return nil
	}
	return fault.New("register_node_down", "this gateway node is marked as down and cannot accept new registrations").
		WithFix("register at another gateway; an operator takes it up again with `dstack gateway node up`")
}

// begin applies what there is, before anything is served.
func (l *live) begin(ctx context.Context) error {
	s, err := settings.Load(ctx, l.store)
	if err != nil {
		return err
	}
	return l.apply(ctx, s)
}

// apply makes a snapshot what counts. What fails of it is the error, and the rest counts.
func (l *live) apply(ctx context.Context, s *settings.Snapshot) error {
	before := l.state.Load()
	s.Keep(before.Snapshot)
	for _, b := range s.Bad {
		if !slices.ContainsFunc(before.Bad, func(x settings.Bad) bool { return x.Key == b.Key && string(x.Value) == string(b.Value) }) {
			l.n.log.Error("setting put aside", "key", b.Key, "code", fault.Code(b.Err), "error", b.Err)
		}
	}
	st := l.of(s)
	l.state.Store(st)
	l.table.DrainOnly(s.Drained)
	ended := false
	for id, at := range s.Removed {
		switch rec, ok, err := l.table.End(id, at); {
		case err != nil:
			l.n.log.Error("removal put aside", "instance", id.String(), "code", fault.Code(err), "error", err)
		case ok:
			ended = true
			l.n.log.Info("route removed", "app", rec.App.String(), "instance", id.String())
		}
	}
	if ended {
		l.applied()
	}
	var certified []hostname.Name
	for _, d := range st.domains {
		if l.n.ca.Admits(d.Name) == nil {
			certified = append(certified, d.Name)
		} else if l.manager == nil {
			l.n.log.Warn("the private CA cannot certify a base domain", "domain", d.Name)
		}
	}
	if err := l.n.ca.SetDomains(certified); err != nil {
		return err
	}
	if l.manager == nil {
		return nil
	}
	return l.n.manage(ctx, l.manager, l.managed(st))
}

// managed are the base domains of operators, for the manager.
func (l *live) managed(st *liveState) (out []acme.Domain) {
	for _, d := range st.domains {
		rec, ok := st.Snapshot.Domains[d.Name]
		if !ok || slices.ContainsFunc(l.n.domains, func(f gateway.Domain) bool { return f.Name == d.Name }) {
			continue
		}
		c, ok := st.Credential(rec)
		if !ok {
			l.n.log.Error("no certificate for a base domain: its DNS credential is gone", "domain", d.Name)
			continue
		}
		credential, err := acme.NewCredential(c.Provider, c.Params)
		if err != nil {
			l.n.log.Error("no certificate for a base domain", "domain", d.Name, "code", fault.Code(err), "error", err)
			continue
		}
		out = append(out, acme.Domain{Name: d.Name, Credential: credential, TTL: c.TTL, Propagation: c.Wait})
	}
	return out
}

// run follows the settings until ctx ends.
func (l *live) run(ctx context.Context) error {
	var chores sync.WaitGroup
	defer chores.Wait()
	chores.Go(func() {
		tick := time.NewTicker(pruneEvery)
		defer tick.Stop()
		var last time.Time
		forced := map[hostname.Name]time.Time{}
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			l.prune(ctx)
			if l.manager != nil && l.first() {
				last = l.renew(ctx, last, forced, certificates{l.manager})
			}
		}
	})
	settings.Follow(ctx, l.store, func(s *settings.Snapshot) {
		if err := l.apply(ctx, s); err != nil {
			l.n.log.Error("settings", "code", fault.Code(err), "error", err)
		}
	}, func(err error) { l.n.log.Warn("settings", "code", fault.Code(err), "error", err) })
	return nil
}

// prune forgets removals from before which no evidence gives a lease.
func (l *live) prune(ctx context.Context) {
	for id, at := range l.state.Load().Removed {
		if l.now().Sub(at) < removedFor {
			continue
		}
		// Only the removal that was seen: another may have come.
		v, revision, err := settings.Get(ctx, l.store, settings.RemovedKey(id))
		if err == nil && v.At.Equal(at) {
			err = settings.Delete(ctx, l.store, settings.RemovedKey(id), revision)
		}
		if err != nil && !settings.Absent(err) && fault.Code(err) != "state_conflict" {
			l.n.log.Warn("settings", "code", fault.Code(err), "error", err)
			return
		}
	}
}

// first reports whether this is the gateway that does what one of them should.
func (l *live) first() bool {
	return !slices.ContainsFunc(l.peers(), func(n gateway.Node) bool { return n.ID < l.id })
}

// renewer is what renew needs of certificates.
type renewer interface {
	Renew(ctx context.Context, base hostname.Name, force bool) (bool, time.Time, error)
	ends(base hostname.Name) time.Time
}

// renew renews, at the times that operators set, what ends within the time that they set.
// Without them certificates are renewed all the same, when their authority says (ARI).
func (l *live) renew(ctx context.Context, last time.Time, forced map[hostname.Name]time.Time, c renewer) time.Time {
	st, now := l.state.Load(), l.now()
	if st.Certbot == nil || st.Certbot.RenewInterval == 0 || st.Certbot.RenewBefore == 0 || now.Sub(last) < st.Certbot.RenewInterval {
		return last
	}
	for _, d := range st.domains {
		ends := c.ends(d.Name)
		if ends.IsZero() || ends.Sub(now) > st.Certbot.RenewBefore || now.Sub(forced[d.Name]) < forcedEvery {
			continue
		}
		forced[d.Name] = now
		limit := st.Certbot.RenewTimeout
		if limit == 0 {
			limit = orderTime
		}
		one, cancel := context.WithTimeout(ctx, limit)
		_, _, err := c.Renew(one, d.Name, true)
		cancel()
		if err != nil {
			l.n.log.Warn("renewal", "domain", d.Name, "code", fault.Code(err), "error", err)
		}
	}
	return now
}
