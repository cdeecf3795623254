// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/dstack-go/dstack/internal/fault"
)

// maxBuckets bounds what a limiter remembers. When it is full, the buckets that are
// full again are forgotten; if none is, newcomers wait.
const maxBuckets = 1 << 16

// strangerRate is how many refusals a second of evidence that does not hold are logged.
const strangerRate = 5

// buckets is a token bucket for each key.
type buckets struct {
	rate  rate.Limit
	burst int

	mu  sync.Mutex
	all map[string]*rate.Limiter
}

func (b *buckets) allow(key string, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	l, ok := b.all[key]
	if !ok {
		if len(b.all) >= maxBuckets {
			for k, l := range b.all {
				if l.TokensAt(now) >= float64(b.burst) {
					delete(b.all, k)
				}
			}
			if len(b.all) >= maxBuckets {
				return false
			}
		}
		l = rate.NewLimiter(b.rate, b.burst)
		b.all[key] = l
	}
	return l.AllowN(now, 1)
}

// limiter is what one address, and one app, may ask.
type limiter struct {
	now                      func() time.Time
	peers, connections, apps buckets
	strangers                buckets // all whose evidence does not hold
}

func (l *limiter) init(n Limits, now func() time.Time) {
	l.now = now
	set := func(b *buckets, r float64) {
		b.rate, b.burst, b.all = rate.Limit(r), max(1, int(2*r)), map[string]*rate.Limiter{}
	}
	set(&l.peers, n.PeerRate)
	set(&l.connections, n.PeerRate)
	set(&l.apps, n.AppRate)
	set(&l.strangers, strangerRate)
}

// peer, connection and app return an error with code rate_limited when there was too
// much.
func (l *limiter) connection(host string) error {
	return l.check(&l.connections, host, "this address")
}
func (l *limiter) peer(host string) error { return l.check(&l.peers, host, "this address") }
func (l *limiter) app(id string) error    { return l.check(&l.apps, id, "this app") }

func (l *limiter) check(b *buckets, key, who string) error {
	if b.allow(key, l.now()) {
		return nil
	}
	return fault.New("rate_limited", "too many requests of %s", who).WithFix("wait, and ask less often")
}
