// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack/gateway/hostname"
)

// Buckets are the upper bounds of [Latency.Buckets]; the last counts all beyond.
var Buckets = [...]time.Duration{time.Millisecond, 5 * time.Millisecond, 25 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second}

// Stats are the counters since the start.
type Stats struct {
	Accepted   uint64            // connections
	Open       int64             // connections now, of any kind
	Joined     [3]uint64         // by [hostname.Mode]
	Relaying   [3]int64          // now, by [hostname.Mode]
	BytesUp    uint64            // from clients to apps, without PROXY headers
	BytesDown  uint64            // from apps to clients
	Refused    map[string]uint64 // by code
	Reaped     uint64            // ended by idle or total time, or with their route
	NoName     uint64            // names that lead nowhere, and hellos without one
	Lookups    uint64            // custom domains asked of DNS
	LookupHits uint64            // answered from memory
	DialFailed uint64
	Dial       Latency // of dials that succeeded
	Handshake  Latency // of TLS handshakes that ended here well
	Pipes      int64   // in being
}

// Latency is how long things took.
type Latency struct {
	Count   uint64
	Sum     time.Duration
	Buckets [len(Buckets) + 1]uint64
}

type counters struct {
	accepted, noName, lookups, lookupHits, dialFailed atomic.Uint64
	open                                              atomic.Int64
	joined                                            [3]atomic.Uint64
	relaying                                          [3]atomic.Int64
	up, down                                          atomic.Uint64
	reaped                                            atomic.Uint64
	dial, handshake                                   latency

	mu    sync.Mutex
	codes map[string]uint64
}

type latency struct {
	sum     atomic.Int64
	buckets [len(Buckets) + 1]atomic.Uint64
}

func (l *latency) observe(d time.Duration) {
	l.sum.Add(int64(d))
	i := 0
	for i < len(Buckets) && d > Buckets[i] {
		i++
	}
	l.buckets[i].Add(1)
}

func (l *latency) load() Latency {
	out := Latency{Sum: time.Duration(l.sum.Load())}
	for i := range out.Buckets {
		out.Buckets[i] = l.buckets[i].Load()
		out.Count += out.Buckets[i]
	}
	return out
}

// refused counts by code; there are as many as the source has.
func (c *counters) refused(code string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.codes == nil {
		c.codes = map[string]uint64{}
	}
	c.codes[code]++
}

// Stats returns the counters.
func (e *Edge) Stats() Stats {
	c := &e.stats
	s := Stats{
		Accepted: c.accepted.Load(), Open: c.open.Load(), BytesUp: c.up.Load(), BytesDown: c.down.Load(), Reaped: c.reaped.Load(),
		NoName: c.noName.Load(), Lookups: c.lookups.Load(), LookupHits: c.lookupHits.Load(),
		DialFailed: c.dialFailed.Load(), Dial: c.dial.load(), Handshake: c.handshake.load(), Pipes: e.pool.made.Load(),
	}
	for m := range hostname.Passthrough + 1 {
		s.Joined[m], s.Relaying[m] = c.joined[m].Load(), c.relaying[m].Load()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Refused = maps.Clone(c.codes)
	return s
}
