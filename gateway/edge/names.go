// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

const (
	maxNames   = 4096             // remembered
	keepAnswer = 30 * time.Second // the system's resolver tells no time to live
	keepNone   = 10 * time.Second
	maxLookups = 64 // at a time
)

// names finds where custom domains lead, by TXT records. Random names cost one lookup
// each and no more than maxLookups at a time.
type names struct {
	lookup  func(context.Context, string) ([]string, error)
	prefix  string
	compat  bool
	timeout time.Duration
	slots   chan struct{}

	mu    sync.Mutex
	known map[hostname.Name]*found
}

// found is an answer, or one under way.
type found struct {
	done  chan struct{}
	a     hostname.Answer
	err   error
	until time.Time
}

func newNames(cfg Config) *names {
	return &names{lookup: cfg.Lookup, prefix: cfg.TXTPrefix, compat: cfg.TXTCompat, timeout: cfg.Resolve,
		slots: make(chan struct{}, maxLookups), known: map[hostname.Name]*found{}}
}

// find returns where a domain leads. Codes host_unknown (no record), host_lookup (DNS
// does not answer, or too many ask), those of hostname.ParseTXT.
func (n *names) find(ctx context.Context, name hostname.Name) (hostname.Answer, error) {
	if n.lookup == nil {
		return hostname.Answer{}, fault.New("host_unknown", "%s is on none of the gateway's base domains", name)
	}
	now := time.Now()
	n.mu.Lock()
	f := n.known[name]
	if f != nil && (f.until.IsZero() || now.Before(f.until)) {
		n.mu.Unlock()
		select {
		case <-f.done:
			return f.a, f.err
		case <-ctx.Done():
			return hostname.Answer{}, fault.Wrap(ctx.Err(), "host_lookup", "look for the TXT record of %s", name)
		}
	}
	select {
	case n.slots <- struct{}{}:
	default:
		n.mu.Unlock()
		return hostname.Answer{}, fault.New("host_lookup", "too many unknown names are asked for at a time")
	}
	if len(n.known) >= maxNames {
		for k, o := range n.known {
			if !o.until.IsZero() && now.After(o.until) {
				delete(n.known, k)
			}
		}
		for k, o := range n.known {
			if len(n.known) < maxNames {
				break
			}
			if !o.until.IsZero() {
				delete(n.known, k)
			}
		}
	}
	f = &found{done: make(chan struct{})}
	n.known[name] = f
	n.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, n.timeout)
	defer cancel()
	f.a, f.err = n.ask(ctx, name)
	keep := keepAnswer
	if f.err != nil {
		keep = keepNone
	}
	n.mu.Lock()
	f.until = time.Now().Add(keep)
	n.mu.Unlock()
	<-n.slots
	close(f.done)
	return f.a, f.err
}

func (n *names) ask(ctx context.Context, name hostname.Name) (hostname.Answer, error) {
	q, err := hostname.TXTNames(name, n.prefix, n.compat)
	if err != nil {
		return hostname.Answer{}, err
	}
	texts := make([][]string, len(q.Exact))
	var wg sync.WaitGroup
	for i, at := range q.Exact {
		wg.Go(func() { texts[i], _ = n.lookup(ctx, string(at)) })
	}
	wg.Wait()
	for _, t := range texts {
		if len(t) > 0 {
			return hostname.ParseTXT(t[0])
		}
	}
	if q.Wildcard != "" {
		t, err := n.lookup(ctx, string(q.Wildcard))
		var missing *net.DNSError
		if err != nil && !(errors.As(err, &missing) && missing.IsNotFound) {
			return hostname.Answer{}, fault.Wrap(err, "host_lookup", "look for the TXT record of %s", name)
		}
		if len(t) > 0 {
			return hostname.ParseTXT(t[0])
		}
	}
	return hostname.Answer{}, fault.New("host_unknown", "no TXT record says where %s leads", name)
}
