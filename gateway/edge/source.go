// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"container/list"
	"net/netip"
	"sync"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// maxIdleSources is how many sources without a connection are remembered; who has more
// addresses than that is a matter of the limits in total.
const maxIdleSources = 16384

// bucket is a token bucket of rate tokens a second, holding burst.
type bucket struct {
	tokens float64
	last   time.Time
}

// take takes a token; a negative rate gives any number.
func (b *bucket) take(now time.Time, rate, burst int) bool {
	if rate < 0 {
		return true
	}
	if b.last.IsZero() {
		b.tokens = float64(burst)
	} else {
		b.tokens = min(float64(burst), b.tokens+now.Sub(b.last).Seconds()*float64(rate))
	}
	b.last = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// source is who connects: an IPv4 address or an IPv6 /64. Guarded by sources.mu.
type source struct {
	prefix  netip.Prefix
	open    int
	pending int
	rate    bucket
	lookups bucket
	idle    *list.Element // in sources.idle while open is 0
}

// sources counts by source.
type sources struct {
	limits Limits
	mu     sync.Mutex
	all    map[netip.Prefix]*source
	idle   list.List // the longest idle first
}

func (s *sources) adjust(l Limits) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits = l
}

func prefixOf(a netip.Addr) netip.Prefix {
	a = a.WithZone("").Unmap()
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits) // the zero prefix for the zero address
	return p
}

// begin admits a connection. Codes edge_source_rate, edge_source_full.
func (s *sources) begin(a netip.Addr, now time.Time) (*source, error) {
	p := prefixOf(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.all[p]
	if src == nil {
		if s.all == nil {
			s.all = map[netip.Prefix]*source{}
		}
		src = &source{prefix: p}
		s.all[p] = src
	}
	full := func(n, limit int) bool { return limit >= 0 && n >= limit }
	var err error
	switch l := s.limits; {
	case full(src.open, l.PerSource), full(src.pending, l.PendingPerSource):
		err = fault.New("edge_source_full", "the source %s has %d connections, %d of them not yet joined", p, src.open, src.pending)
	case !src.rate.take(now, l.Rate, 2*l.Rate):
		err = fault.New("edge_source_rate", "the source %s connects more than %d times a second", p, l.Rate)
	default:
		src.open++
		src.pending++
	}
	s.place(src)
	if err != nil {
		return nil, err
	}
	return src, nil
}

// place keeps the list of idle sources, and forgets the longest idle of too many.
func (s *sources) place(src *source) {
	switch {
	case src.open > 0 && src.idle != nil:
		s.idle.Remove(src.idle)
		src.idle = nil
	case src.open > 0:
	case src.idle != nil:
		s.idle.MoveToBack(src.idle)
	default:
		src.idle = s.idle.PushBack(src)
		if s.idle.Len() > maxIdleSources {
			oldest := s.idle.Remove(s.idle.Front()).(*source)
			oldest.idle = nil
			delete(s.all, oldest.prefix)
		}
	}
}

func (s *sources) settled(src *source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src.pending--
}

func (s *sources) end(src *source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src.open--
	s.place(src)
}

// lookup admits a look-up by a source that has a connection. Code edge_dns_source_budget.
func (s *sources) lookup(src *source, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.limits.LookupsPerSource; !src.lookups.take(now, n, 2*n) {
		return fault.New("edge_dns_source_budget", "the source %s asks for more than %d unknown domains a second", src.prefix, n)
	}
	return nil
}
