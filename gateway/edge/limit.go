// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"net/netip"
	"sync"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// maxSources bounds how many sources are remembered. When there are more, those without
// an open connection are forgotten, and with them what they did.
const maxSources = 1 << 16

// sources count what each address does: its connections, and how fast it makes them.
type sources struct {
	open, rate int

	mu sync.Mutex
	by map[netip.Prefix]*source
}

type source struct {
	open   int
	tokens float64
	at     time.Time
}

func newSources(open, rate int) *sources {
	return &sources{open: open, rate: rate, by: map[netip.Prefix]*source{}}
}

// enter counts a connection until leave is called. Codes edge_source_full, edge_source_rate.
func (s *sources) enter(addr netip.Addr, now time.Time) (leave func(), err error) {
	bits := 32
	if addr.Is6() {
		bits = 64 // what one customer has
	}
	key, _ := addr.Prefix(bits)
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.by[key]
	if c == nil {
		if len(s.by) >= maxSources {
			for k, o := range s.by {
				if o.open == 0 {
					delete(s.by, k)
				}
			}
			if len(s.by) >= maxSources {
				return nil, fault.New("edge_source_full", "%d sources have connections open", maxSources)
			}
		}
		c = &source{tokens: float64(2 * s.rate), at: now}
		s.by[key] = c
	}
	c.tokens = min(c.tokens+now.Sub(c.at).Seconds()*float64(s.rate), float64(2*s.rate))
	c.at = now
	switch {
	case c.open >= s.open:
		return nil, fault.New("edge_source_full", "%s has %d connections open, its most", key, s.open)
	case c.tokens < 1:
		return nil, fault.New("edge_source_rate", "%s makes more than %d connections per second", key, s.rate)
	}
	c.tokens--
	c.open++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		c.open--
	}, nil
}
