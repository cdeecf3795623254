// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

func TestCallersOfAKeyShareOneRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group[string, int]
		var runs, shared atomic.Int32
		release := make(chan struct{})
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				v, s, err := g.Do(t.Context(), t.Context(), "k", func(context.Context) (int, error) {
					runs.Add(1)
					<-release
					return 7, nil
				})
				if s {
					shared.Add(1)
				}
				if v != 7 || err != nil {
					t.Errorf("%d, %v", v, err)
				}
			})
		}
		synctest.Wait()
		if v, s, _ := g.Do(t.Context(), t.Context(), "other", func(context.Context) (int, error) { return 8, nil }); v != 8 || s {
			t.Errorf("another key: %d, shared %v", v, s)
		}
		close(release)
		wg.Wait()
		if runs.Load() != 1 || shared.Load() != 9 {
			t.Errorf("%d runs, %d shared", runs.Load(), shared.Load())
		}
		if len(g.runs) != 0 {
			t.Errorf("%d runs are remembered", len(g.runs))
		}
	})
}

func TestTheLastToLeaveStopsTheWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group[string, int]
		stopped := make(chan struct{})
		work := func(ctx context.Context) (int, error) {
			<-ctx.Done()
			close(stopped)
			return 0, ctx.Err()
		}
		first, leaveFirst := context.WithCancel(t.Context())
		second, leaveSecond := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, ctx := range []context.Context{first, second} {
			wg.Go(func() {
				if _, _, err := g.Do(ctx, t.Context(), "k", work); !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		leaveFirst()
		synctest.Wait()
		select {
		case <-stopped:
			t.Fatal("the work stopped while somebody waited")
		default:
		}
		leaveSecond()
		<-stopped
		wg.Wait()
		// Whoever comes now must not get what was given up.
		if v, s, err := g.Do(t.Context(), t.Context(), "k", func(context.Context) (int, error) { return 1, nil }); v != 1 || s || err != nil {
			t.Errorf("after it was given up: %d, %v, %v", v, s, err)
		}
		g.Wait()
	})
}

func TestTheBaseEndsTheWork(t *testing.T) {
	base, end := context.WithCancel(context.Background())
	var g Group[int, int]
	end()
	if _, _, err := g.Do(context.Background(), base, 1, func(ctx context.Context) (int, error) { <-ctx.Done(); return 0, ctx.Err() }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
