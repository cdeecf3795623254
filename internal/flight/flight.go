// SPDX-License-Identifier: Apache-2.0

// Package flight lets those who want the same thing at the same time share one run
// of the work that makes it. Unlike x/sync/singleflight it heeds contexts: whoever
// leaves no longer waits, and when the last has left, the work is told to stop.
package flight

import (
	"context"
	"sync"
)

// Group shares runs by key. The zero value is ready.
type Group[K comparable, V any] struct {
	mu   sync.Mutex
	runs map[K]*run[V]
	work sync.WaitGroup
}

type run[V any] struct {
	waiters int // guarded by Group.mu
	cancel  context.CancelFunc
	done    chan struct{} // closed when the rest is set
	value   V
	err     error
}

// Do returns what work returns, run once for all callers that have the same key
// meanwhile; shared tells all but the first of them. The work's context is base,
// cancelled when the last caller has left. A caller leaves when ctx ends, with the
// error of ctx. A run that was left is forgotten: the next caller begins anew.
func (g *Group[K, V]) Do(ctx, base context.Context, key K, work func(context.Context) (V, error)) (value V, shared bool, err error) {
	g.mu.Lock()
	r, shared := g.runs[key]
	if !shared {
		r = g.start(base, key, work)
	}
	r.waiters++
	g.mu.Unlock()
	select {
	case <-r.done:
		return r.value, shared, r.err
	case <-ctx.Done():
		g.mu.Lock()
		defer g.mu.Unlock()
		if r.waiters--; r.waiters == 0 {
			g.forget(key, r)
			r.cancel()
		}
		return value, shared, ctx.Err()
	}
}

func (g *Group[K, V]) start(base context.Context, key K, work func(context.Context) (V, error)) *run[V] {
	ctx, cancel := context.WithCancel(base)
	r := &run[V]{cancel: cancel, done: make(chan struct{})}
	if g.runs == nil {
		g.runs = map[K]*run[V]{}
	}
	g.runs[key] = r
	g.work.Go(func() {
		defer cancel()
		r.value, r.err = work(ctx)
		g.mu.Lock()
		g.forget(key, r)
		g.mu.Unlock()
		close(r.done)
	})
	return r
}

// forget removes a run, unless another has taken its place.
func (g *Group[K, V]) forget(key K, r *run[V]) {
	if g.runs[key] == r {
		delete(g.runs, key)
	}
}

// Wait waits for the runs under way; it does not keep new ones from starting.
func (g *Group[K, V]) Wait() { g.work.Wait() }
