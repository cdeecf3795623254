// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxApps is how many apps are counted each by itself; the others are counted together, so
// that who registers many does not fill the memory of whoever collects the counts.
const MaxApps = 256

// appRest is how long an app without a connection keeps its counters when others want them.
const appRest = time.Hour

// AppStats are the counters of an app since it was first counted.
type AppStats struct {
	App      dstack.AppID // zero: all that have none of their own
	Joined   [3]uint64    // connections, by [hostname.Mode]
	Relaying [3]int64     // now
	Up, Down [3]uint64    // bytes, without PROXY headers
}

type appCounters struct {
	joined   [3]atomic.Uint64
	relaying [3]atomic.Int64
	up, down [3]atomic.Uint64
	last     time.Time // when a connection of it last ended or began; guarded by apps.mu
}

func (c *appCounters) open() (n int64) {
	for m := range c.relaying {
		n += c.relaying[m].Load()
	}
	return n
}

type apps struct {
	mu    sync.Mutex
	each  map[dstack.AppID]*appCounters
	other appCounters
}

func (a *apps) begin(id dstack.AppID, mode hostname.Mode, now time.Time) *appCounters {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.each[id]
	if c == nil && id != (dstack.AppID{}) && (len(a.each) < MaxApps || a.forget(now)) {
		if a.each == nil {
			a.each = map[dstack.AppID]*appCounters{}
		}
		c = &appCounters{}
		a.each[id] = c
	}
	if c == nil {
		c = &a.other
	}
	c.last = now
	c.joined[mode].Add(1)
	c.relaying[mode].Add(1)
	return c
}

// forget makes room by the app that rests the longest.
func (a *apps) forget(now time.Time) bool {
	var oldest dstack.AppID
	var found *appCounters
	for id, c := range a.each {
		if c.open() == 0 && now.Sub(c.last) >= appRest && (found == nil || c.last.Before(found.last)) {
			oldest, found = id, c
		}
	}
	delete(a.each, oldest)
	return found != nil
}

func (a *apps) end(c *appCounters, mode hostname.Mode, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c.relaying[mode].Add(-1)
	c.last = now
}

// Apps returns the counters of apps, those of all others under the zero id.
func (e *Edge) Apps() []AppStats {
	a := &e.apps
	a.mu.Lock()
	defer a.mu.Unlock()
	out := []AppStats{a.other.stats(dstack.AppID{})}
	for id, c := range a.each {
		out = append(out, c.stats(id))
	}
	return out
}

func (c *appCounters) stats(id dstack.AppID) AppStats {
	s := AppStats{App: id}
	for m := range s.Joined {
		s.Joined[m], s.Relaying[m], s.Up[m], s.Down[m] = c.joined[m].Load(), c.relaying[m].Load(), c.up[m].Load(), c.down[m].Load()
	}
	return s
}

// Ended is a connection that is over, as an access log tells of it.
type Ended struct {
	Client   netip.AddrPort
	Begun    time.Time
	Took     time.Duration
	Code     string            // why it was refused; the rest is zero then
	App      dstack.AppID      // zero for the loopback of development
	Instance dstack.InstanceID // of App
	Port     uint16            // at the instance
	Mode     hostname.Mode
	Up, Down uint64 // bytes, without PROXY headers
	How      string // end (of both directions), failed, idle, total, route, drained or stopped
}

// accessed is what the access log needs of a connection beside its relay.
type accessed struct {
	client netip.AddrPort
	begun  time.Time
}

// begin counts a relay for its app, before it runs.
func (e *Edge) begin(o *opening, r *relay) {
	var id dstack.AppID
	if r.target.route != nil {
		id = r.target.route.Record().App
	}
	r.of = id
	r.counted = e.apps.begin(id, r.mode, time.Now())
	if r.mode == hostname.Passthrough {
		r.tally(len(o.raw), false) // the hello and what came with it were sent on already
	}
	if e.cfg.Ended != nil {
		r.access = &accessed{client: o.client, begun: o.start}
	}
}

// tally counts bytes of one direction; each is one loop's.
func (r *relay) tally(n int, down bool) {
	if down {
		r.down += uint64(n)
		r.counted.down[r.mode].Add(uint64(n))
		return
	}
	r.up += uint64(n)
	r.counted.up[r.mode].Add(uint64(n))
}

// told ends what begin began, and tells the access log.
func (e *Edge) told(r *relay) {
	now := time.Now()
	e.apps.end(r.counted, r.mode, now)
	if r.access == nil {
		return
	}
	how, _ := r.how.Load().(string)
	if how == "" {
		how = "end"
	}
	e.cfg.Ended(Ended{
		Client: r.access.client, Begun: r.access.begun, Took: now.Sub(r.access.begun), App: r.of, Instance: r.target.id,
		Port: r.target.addr.Port(), Mode: r.mode, Up: r.up, Down: r.down, How: how,
	})
}

// toldRefused tells the access log of a connection that reached no app.
func (e *Edge) toldRefused(o *opening, err error) {
	if e.cfg.Ended != nil {
		e.cfg.Ended(Ended{Client: o.client, Begun: o.start, Took: time.Since(o.start), Code: codeOf(err)})
	}
}

func codeOf(err error) string {
	if code := fault.Code(err); code != "" {
		return code
	}
	return "edge_internal"
}
