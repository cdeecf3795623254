// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/dstack-go/dstack/gateway/hostname"
)

// Stats are counts since the start, but for Open.
type Stats struct {
	Open     map[string]int64  // connections being carried now, by mode
	Total    uint64            // connections taken
	Refused  map[string]uint64 // by code
	Received uint64            // bytes from clients that were carried
	Sent     uint64            // bytes to clients
}

type stats struct {
	connections    [3]atomic.Int64 // by hostname.Mode
	total          atomic.Uint64
	received, sent atomic.Uint64

	mu    sync.Mutex
	codes map[string]uint64
}

// refused counts a connection that ended with a code; codes are the program's own words
// and few.
func (s *stats) refused(code string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.codes == nil {
		s.codes = map[string]uint64{}
	}
	s.codes[code]++
}

// Stats returns the counts.
func (e *Edge) Stats() Stats {
	out := Stats{Open: map[string]int64{}, Total: e.stats.total.Load(), Received: e.stats.received.Load(), Sent: e.stats.sent.Load()}
	for _, m := range []hostname.Mode{hostname.Terminate, hostname.TerminateH2, hostname.Passthrough} {
		out.Open[m.String()] = e.stats.connections[m].Load()
	}
	e.stats.mu.Lock()
	defer e.stats.mu.Unlock()
	out.Refused = maps.Clone(e.stats.codes)
	return out
}
