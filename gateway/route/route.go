// SPDX-License-Identifier: Apache-2.0

// Package route is the gateway's table of routes: which instances there are, until when,
// and which of them gets the next connection.
//
// A route is soft state. It comes with evidence that was appraised at a moment, and ends
// with its lease unless newer evidence renews it; no message can make it live longer than
// that evidence allows (threats.md K03). The table needs no quorum and no disk: [Table.Dump]
// and [Table.Merge] carry it over a restart and to other gateways, and what they bring
// obeys the same rules as a registration.
//
// Guarantees:
//   - an instance belongs to one app for as long as it is in the table; a key and an address
//     belong to one instance, and never to the gateway (K01);
//   - no id is an app's and an instance's at once, so that nobody registers an instance that
//     catches an app's name;
//   - of two records of an instance the one with the later evidence stays, and once a route
//     has ended only evidence later than its own brings it back, whatever lease an older
//     record claims;
//   - records that are malformed, dated in the future or without a lease are put aside with
//     their reason and never applied; the others beside them are (K02);
//   - an ended lease counts at once, before any sweep.
//
// Safe for concurrent use. Time enters by [Config.Now].
//
// Trusted: whoever calls Register, to have appraised the evidence and taken app, instance,
// compose hash and policy from it alone; the clock. Attacker-controlled: the bytes that
// Merge reads, and the values of a registration that are not from evidence (key, address).
//
// Implements spec/gateway.md §2.5, §5.5 A, B and E, and the lease of design.md §7.
package route

import (
	"bytes"
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// Config is the table's. Zero durations and numbers stand for the defaults.
type Config struct {
	Now     func() time.Time   // time.Now if nil
	Key     wgconfig.PublicKey // the gateway's own
	Address netip.Addr         // the gateway's own in the tunnel
	Network netip.Prefix       // where instances' addresses lie; any if zero

	Lease     time.Duration // the longest lease; 1 h
	Fresh     time.Duration // how old the evidence of a registration may be; 5 min
	Skew      time.Duration // how far another clock may be ahead; 1 min
	Stale     time.Duration // from which age of the handshake an instance is unreachable; 30 min
	Instances int           // the most routes; 65536
	PerApp    int           // the most connections of an app; 0 for no limit
}

// sample is how many instances of an app are compared for a connection; among so many,
// taken at random, the least loaded is nearly that of all.
const sample = 16

// MaxSelect is the most candidates of one selection.
const MaxSelect = 8

// Record is a registration.
type Record struct {
	App      dstack.AppID
	Instance dstack.InstanceID
	Compose  dstack.ComposeHash
	Key      wgconfig.PublicKey
	Address  netip.Addr // in the tunnel
	// Policy is the measured one; nil when it is not known.
	Policy *portpolicy.Policy
	// Domains are the measured custom domains of which TLS ends in the guest.
	Domains []Domain
	// Attested is when the evidence was appraised whose nonce was the appraiser's.
	Attested time.Time
	// Until is when the lease ends.
	Until time.Time
	// CertificateOnly says that a KMS's certificate made the record, and no evidence of the
	// moment: Attested is when it was shown. It replaces no record of evidence.
	CertificateOnly bool
}

// Domain is a custom domain and the port that it leads to.
type Domain struct {
	Name hostname.Name
	Port uint16
}

// MaxDomains is the most custom domains of a record.
const MaxDomains = manifest.MaxCustomDomains

// Leads reports whether a custom domain may lead to a port as the instance's own: its
// guest ends TLS for it.
func (r *Record) Leads(d Domain) bool { return slices.Contains(r.Domains, d) }

func (r *Record) equal(o *Record) bool {
	if (r.Policy == nil) != (o.Policy == nil) || r.Policy != nil && !r.Policy.Equal(*o.Policy) {
		return false
	}
	return r.scalars() == o.scalars() && slices.Equal(r.Domains, o.Domains) && r.Attested.Equal(o.Attested) && r.Until.Equal(o.Until)
}

// scalars is what can be compared of a record.
func (r *Record) scalars() any {
	return struct {
		app      dstack.AppID
		instance dstack.InstanceID
		compose  dstack.ComposeHash
		key      wgconfig.PublicKey
		address  netip.Addr
	}{r.App, r.Instance, r.Compose, r.Key, r.Address}
}

// Route is an instance in the table.
type Route struct {
	t         *Table
	app       *app
	index     int // in app.routes
	record    atomic.Pointer[Record]
	handshake atomic.Int64 // Unix nanoseconds; 0 for none
	conns     atomic.Int64
	draining  atomic.Bool
	gone      chan struct{}
}

type app struct {
	routes []*Route
	conns  atomic.Int64
}

// Record returns the current registration.
func (r *Route) Record() Record { return *r.record.Load() }

// Gone is closed when the route ends: by its lease at the next sweep, or by removal.
func (r *Route) Gone() <-chan struct{} { return r.gone }

// Connections returns how many connections were begun and not ended.
func (r *Route) Connections() int64 { return r.conns.Load() }

// Handshake returns the last one seen, or the zero time.
func (r *Route) Handshake() time.Time {
	if n := r.handshake.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}

// Draining reports whether the instance gets no new connections of its app.
func (r *Route) Draining() bool { return r.draining.Load() }

// Begin counts a connection; End must follow, once. Codes route_ended, route_app_full.
func (r *Route) Begin() error {
	if r.ended(r.t.cfg.Now()) {
		return errEnded(r.record.Load())
	}
	if n, most := r.app.conns.Add(1), r.t.perApp.Load(); most > 0 && n > most {
		r.app.conns.Add(-1)
		return fault.New("route_app_full", "app %s has %d connections, its most", r.record.Load().App, most)
	}
	r.conns.Add(1)
	return nil
}

// End ends what Begin began.
func (r *Route) End() {
	r.conns.Add(-1)
	r.app.conns.Add(-1)
}

func (r *Route) ended(now time.Time) bool { return !now.Before(r.record.Load().Until) }

func errEnded(rec *Record) error {
	return fault.New("route_ended", "the lease of instance %s has ended", rec.Instance).
		WithFix("the instance registers again with fresh evidence")
}

// Table is the table. Make it with [New].
type Table struct {
	cfg Config

	mu        sync.RWMutex
	instances map[dstack.InstanceID]*Route
	apps      map[dstack.AppID]*app
	keys      map[wgconfig.PublicKey]*Route
	addresses map[netip.Addr]*Route
	// spent has, for each instance that left the table, the moment up to which its
	// evidence counts no more.
	spent map[dstack.InstanceID]time.Time
	// drained are those of DrainOnly, also such as are not in the table.
	drained map[dstack.InstanceID]bool

	quarantine quarantine
	version    atomic.Uint64
	perApp     atomic.Int64
}

// Len is how many routes there are.
func (t *Table) Len() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.instances)
}

// Version grows with each change of a record.
func (t *Table) Version() uint64 { return t.version.Load() }

// New returns an empty table.
func New(cfg Config) *Table {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Lease = cmp.Or(cfg.Lease, time.Hour)
	cfg.Fresh = cmp.Or(cfg.Fresh, 5*time.Minute)
	cfg.Skew = cmp.Or(cfg.Skew, time.Minute)
	cfg.Stale = cmp.Or(cfg.Stale, 30*time.Minute)
	cfg.Instances = cmp.Or(cfg.Instances, wgconfig.MaxPeers)
	t := &Table{
		cfg: cfg, instances: map[dstack.InstanceID]*Route{}, apps: map[dstack.AppID]*app{},
		keys: map[wgconfig.PublicKey]*Route{}, addresses: map[netip.Addr]*Route{}, spent: map[dstack.InstanceID]time.Time{},
	}
	t.LimitPerApp(cfg.PerApp)
	return t
}

// LimitPerApp sets Config.PerApp anew; connections that there are go on.
func (t *Table) LimitPerApp(n int) { t.perApp.Store(int64(n)) }

// Register adds an instance or renews it. Its evidence must be fresh: code
// route_evidence_stale. A lease longer than the table's is refused and not cut, so that
// both sides know when it ends.
//
// Codes, also of a record that Merge quarantines: route_identity, route_key, route_key_own,
// route_address, route_evidence (none), route_future, route_lease (none, or too long),
// route_ended, route_removed, route_replayed (older evidence than the table's),
// route_conflict (other values with the same evidence), route_downgrade, route_instance_taken,
// route_key_taken, route_address_taken, route_id_collision, route_full.
func (t *Table) Register(rec Record) (*Route, error) {
	now := t.cfg.Now()
	if err := t.check(&rec, now); err != nil {
		return nil, err
	}
	if now.Sub(rec.Attested) > t.cfg.Fresh {
		return nil, fault.New("route_evidence_stale", "the evidence of instance %s is from %s ago", rec.Instance, now.Sub(rec.Attested).Round(time.Second)).
			WithFix("attest again with the gateway's nonce")
	}
	return t.put(&rec, now)
}

// check judges a record by itself, and brings it into normal form: times in whole
// milliseconds, as they are stored, and IPv4 as such.
func (t *Table) check(rec *Record, now time.Time) error {
	rec.Attested, rec.Until, rec.Address = rec.Attested.Truncate(time.Millisecond), rec.Until.Truncate(time.Millisecond), rec.Address.Unmap()
	switch {
	case rec.App.IsZero() || rec.Instance.IsZero() || rec.Compose.IsZero():
		return fault.New("route_identity", "a registration without app, instance or compose hash")
	case dstack.AppID(rec.Instance) == rec.App:
		return fault.New("route_id_collision", "the instance %s has its app's id", rec.Instance)
	case rec.Key.IsZero():
		return fault.New("route_key", "the registration of instance %s has no key", rec.Instance)
	case rec.Key == t.cfg.Key:
		return fault.New("route_key_own", "the instance %s gives the gateway's own key", rec.Instance)
	}
	a, err := wgconfig.ParseAddress(rec.Address.String())
	if err != nil || a == t.cfg.Address.Unmap() || t.cfg.Network.IsValid() && !wgconfig.Inside(t.cfg.Network, a) {
		return fault.New("route_address", "the instance %s cannot have the address %s", rec.Instance, rec.Address)
	}
	switch {
	case rec.Attested.Unix() <= 0:
		return fault.New("route_evidence", "the registration of instance %s has no evidence", rec.Instance)
	case rec.Attested.After(now.Add(t.cfg.Skew)):
		return fault.New("route_future", "the evidence of instance %s is from the future: %s", rec.Instance, rec.Attested.Format(time.RFC3339))
	case !rec.Until.After(rec.Attested) || rec.Until.Sub(rec.Attested) > t.cfg.Lease:
		return fault.New("route_lease", "the lease of instance %s is not of up to %s from its evidence", rec.Instance, t.cfg.Lease)
	case !now.Before(rec.Until):
		return errEnded(rec)
	}
	return nil
}

// put applies a record that check let pass.
func (t *Table) put(rec *Record, now time.Time) (*Route, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if at, ok := t.spent[rec.Instance]; ok && !rec.Attested.After(at) {
		return nil, fault.New("route_removed", "the route of instance %s has ended since its evidence", rec.Instance).
			WithFix("attest again")
	}
	r := t.instances[rec.Instance]
	if r != nil {
		switch old := r.record.Load(); {
		case old.App != rec.App:
			return nil, fault.New("route_instance_taken", "the instance %s belongs to app %s", rec.Instance, old.App)
		case rec.CertificateOnly && !old.CertificateOnly && !r.ended(now):
			return nil, fault.New("route_downgrade", "the instance %s has shown fresh evidence, which a certificate does not replace", rec.Instance)
		case old.CertificateOnly && !rec.CertificateOnly: // when it was shown is no measure of evidence
		case rec.Attested.Before(old.Attested):
			return nil, fault.New("route_replayed", "the evidence of instance %s is older than what is known of it", rec.Instance)
		case rec.Attested.Equal(old.Attested):
			if !rec.equal(old) {
				return nil, fault.New("route_conflict", "two registrations of instance %s with one evidence differ", rec.Instance)
			}
			return r, nil
		}
	}
	if _, ok := t.apps[dstack.AppID(rec.Instance)]; ok {
		return nil, fault.New("route_id_collision", "the instance id %s is an app's", rec.Instance)
	}
	if other := t.instances[dstack.InstanceID(rec.App)]; other != nil {
		return nil, fault.New("route_id_collision", "the app id %s is an instance's", rec.App)
	}
	if !t.free(t.keys[rec.Key], r, now) {
		return nil, fault.New("route_key_taken", "the key of instance %s is another instance's", rec.Instance)
	}
	if !t.free(t.addresses[rec.Address], r, now) {
		return nil, fault.New("route_address_taken", "the address %s of instance %s is another instance's", rec.Address, rec.Instance)
	}
	if r == nil {
		if len(t.instances) >= t.cfg.Instances {
			return nil, fault.New("route_full", "the gateway has %d routes, its most", len(t.instances))
		}
		a := t.apps[rec.App]
		if a == nil {
			a = &app{}
			t.apps[rec.App] = a
		}
		r = &Route{t: t, app: a, index: len(a.routes), gone: make(chan struct{})}
		r.draining.Store(t.drained[rec.Instance])
		a.routes = append(a.routes, r)
		t.instances[rec.Instance] = r
	} else {
		old := r.record.Load()
		delete(t.keys, old.Key)
		delete(t.addresses, old.Address)
		if old.Key != rec.Key {
			r.handshake.Store(0) // it was of the other key
		}
	}
	r.record.Store(rec)
	t.keys[rec.Key], t.addresses[rec.Address] = r, r
	t.version.Add(1)
	return r, nil
}

// free reports whether what holder has is r's to take. A holder whose lease has ended
// holds nothing, and goes.
func (t *Table) free(holder, r *Route, now time.Time) bool {
	if holder == nil || holder == r {
		return true
	}
	if !holder.ended(now) {
		return false
	}
	t.drop(holder)
	return true
}

// drop takes a route out of the table, under the lock.
func (t *Table) drop(r *Route) Record {
	rec := r.record.Load()
	delete(t.instances, rec.Instance)
	delete(t.keys, rec.Key)
	delete(t.addresses, rec.Address)
	last := len(r.app.routes) - 1
	r.app.routes[r.index] = r.app.routes[last]
	r.app.routes[r.index].index = r.index
	r.app.routes[last] = nil
	t.spend(rec.Instance, rec.Attested)
	r.app.routes = r.app.routes[:last]
	if last == 0 {
		delete(t.apps, rec.App)
	}
	close(r.gone)
	t.version.Add(1)
	return *rec
}

// Remove ends a route now, and lets no evidence from before now bring it back, here or from
// another gateway. It also works for instances that are not in the table.
func (t *Table) Remove(id dstack.InstanceID) (Record, bool) {
	now := t.cfg.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.instances[id]
	t.spend(id, now)
	if r == nil {
		return Record{}, false
	}
	return t.drop(r), true
}

// End ends the route of an instance unless its evidence is later than at, and lets no
// evidence up to then bring it back: another gateway's Remove. A moment in the future is
// refused, since it would keep out evidence that does not exist yet. Code route_future.
func (t *Table) End(id dstack.InstanceID, at time.Time) (Record, bool, error) {
	if at.After(t.cfg.Now().Add(t.cfg.Skew)) {
		return Record{}, false, fault.New("route_future", "the removal of instance %s is from the future: %s", id, at.Format(time.RFC3339))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.spend(id, at)
	r := t.instances[id]
	if r == nil || r.record.Load().Attested.After(at) {
		return Record{}, false, nil
	}
	return t.drop(r), true, nil
}

// spend lets no evidence of an instance up to at count again.
func (t *Table) spend(id dstack.InstanceID, at time.Time) {
	if at.After(t.spent[id]) {
		t.spent[id] = at
	}
}

// RemoveApp removes all instances of an app, as when it is revoked.
func (t *Table) RemoveApp(id dstack.AppID) []Record {
	now := t.cfg.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.apps[id]
	if a == nil {
		return nil
	}
	var out []Record
	for _, r := range slices.Clone(a.routes) {
		t.spend(r.record.Load().Instance, now)
		out = append(out, t.drop(r))
	}
	return out
}

// Sweep removes the routes whose lease has ended and returns them, for whoever removes
// their peers.
func (t *Table) Sweep() []Record {
	now := t.cfg.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []Record
	for _, r := range t.instances {
		if r.ended(now) {
			out = append(out, t.drop(r))
		}
	}
	// Evidence from before has no lease left by then.
	for id, at := range t.spent {
		if now.Sub(at) > t.cfg.Lease+t.cfg.Skew {
			delete(t.spent, id)
		}
	}
	sortRecords(out)
	return out
}

func sortRecords(rs []Record) {
	slices.SortFunc(rs, func(a, b Record) int { return bytes.Compare(a.Instance[:], b.Instance[:]) })
}

// Drain stops or resumes new connections of its app to an instance; those by its own id
// still reach it. It outlasts renewals. Code route_unknown.
func (t *Table) Drain(id dstack.InstanceID, on bool) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	r := t.instances[id]
	if r == nil {
		return fault.New("route_unknown", "no instance %s is registered", id)
	}
	r.draining.Store(on)
	return nil
}

// DrainOnly drains these instances, also those that register later, and resumes all others.
// The table keeps the map.
func (t *Table) DrainOnly(ids map[dstack.InstanceID]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drained = ids
	for id, r := range t.instances {
		r.draining.Store(ids[id])
	}
}

// Observe takes what WireGuard tells of its peers. Handshakes from the future and those
// older than what is known are left; peers without a route are returned, to be removed.
func (t *Table) Observe(peers []wgconfig.Status) (strangers []wgconfig.PublicKey) {
	latest := t.cfg.Now().Add(t.cfg.Skew)
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, p := range peers {
		r := t.keys[p.Key]
		switch {
		case r == nil:
			strangers = append(strangers, p.Key)
		case p.Handshake.IsZero() || p.Handshake.After(latest) || p.Handshake.Unix() <= 0:
		case p.Handshake.UnixNano() > r.handshake.Load():
			r.handshake.Store(p.Handshake.UnixNano())
		}
	}
	return strangers
}

// Select appends to dst the candidates for a connection to an app or an instance, best
// first, at most n and [MaxSelect]. An instance's own id leads to it alone, whatever its
// health. Of an app, those with a lease and a recent handshake that are not draining are
// candidates; the fewest connections go first, then the latest handshake.
//
// Codes route_unknown, route_ended, route_none (no instance can be reached now).
func (t *Table) Select(dst []*Route, id [dstack.AppIDSize]byte, n int) ([]*Route, error) {
	now := t.cfg.Now()
	t.mu.RLock()
	defer t.mu.RUnlock()
	if r := t.instances[id]; r != nil {
		if r.ended(now) {
			return dst, errEnded(r.record.Load())
		}
		return append(dst, r), nil
	}
	a := t.apps[id]
	if a == nil {
		return dst, fault.New("route_unknown", "no app or instance %s is registered", dstack.AppID(id))
	}
	n = max(1, min(n, MaxSelect))
	oldest, first, total := now.Add(-t.cfg.Stale).UnixNano(), len(dst), len(a.routes)
	start := 0
	if total > sample {
		start = rand.IntN(total)
	}
	for i := range total {
		if i >= sample && len(dst)-first >= n {
			break
		}
		r := a.routes[(start+i)%total]
		if r.draining.Load() || r.handshake.Load() <= oldest || r.ended(now) {
			continue
		}
		at := len(dst)
		for at > first && better(r, dst[at-1]) {
			at--
		}
		if at-first < n {
			dst = slices.Insert(dst, at, r)[:min(len(dst)+1, first+n)]
		}
	}
	if len(dst) == first {
		return dst, fault.New("route_none", "no instance of app %s can be reached now", dstack.AppID(id))
	}
	return dst, nil
}

// better reports whether a goes before b.
func better(a, b *Route) bool {
	if x, y := a.conns.Load(), b.conns.Load(); x != y {
		return x < y
	}
	return a.handshake.Load() > b.handshake.Load()
}

// Instance returns the route of an instance whose lease holds.
func (t *Table) Instance(id dstack.InstanceID) (*Route, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	r := t.instances[id]
	if r == nil || r.ended(t.cfg.Now()) {
		return nil, false
	}
	return r, true
}

// Records returns all registrations whose lease holds, by instance.
func (t *Table) Records() []Record {
	now := t.cfg.Now()
	t.mu.RLock()
	out := make([]Record, 0, len(t.instances))
	for _, r := range t.instances {
		if !r.ended(now) {
			out = append(out, *r.record.Load())
		}
	}
	t.mu.RUnlock()
	sortRecords(out)
	return out
}
