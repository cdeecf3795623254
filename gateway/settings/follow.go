// SPDX-License-Identifier: Apache-2.0

package settings

import (
	"context"
	"sync"
	"time"
)

// Follow gives apply all records, at first and after each change, until ctx ends. Changes
// that come close together are one. A look that fails is told to failed and tried again;
// what was applied before stays.
func Follow(ctx context.Context, s Store, apply func(*Snapshot), failed func(error)) {
	signal := make(chan struct{}, 1)
	changed := func() {
		select {
		case signal <- struct{}{}:
		default: // whoever looks next sees it
		}
	}
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() { s.Watch(ctx, prefix, changed) })
	for {
		select {
		case <-ctx.Done():
			return
		case <-signal:
		}
		snapshot, err := Load(ctx, s)
		switch {
		case err == nil:
			apply(snapshot)
		case ctx.Err() == nil:
			failed(err)
			time.AfterFunc(time.Second, changed)
		}
	}
}
