// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

func TestNotificationsArriveInOrderAndCut(t *testing.T) {
	var mu sync.Mutex
	var got []string
	h := newHost(func(_ context.Context, event, payload string) error {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, event+"="+payload)
		return errors.New("the answer does not matter")
	})
	for round := range 3 {
		for i := range 20 {
			h.Notify("e", fmt.Sprint(round, i))
		}
		h.Flush(5 * time.Second)
	}
	h.Notify("long", strings.Repeat("é", 4000))
	h.Flush(5 * time.Second)
	mu.Lock()
	defer mu.Unlock()
	if len(got) != 61 || got[0] != "e=0 0" || got[59] != "e=2 19" {
		t.Fatalf("%d notifications: %q", len(got), got)
	}
	long := strings.TrimPrefix(got[60], "long=")
	if len(long) > maxNotification || !strings.HasSuffix(long, "…") || !utf8.ValidString(long) {
		t.Fatalf("long payload has %d bytes", len(long))
	}
}

func TestAHostThatHangsHoldsNothingUp(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	h := newHost(func(ctx context.Context, _, _ string) error {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return nil
	})
	begin := time.Now()
	for range 1000 {
		h.Notify(eventProgress, "x")
	}
	h.Notify(eventError, "the reason")
	h.Flush(50 * time.Millisecond)
	if took := time.Since(begin); took > time.Second {
		t.Errorf("took %s", took)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.queue); n > maxQueue || h.queue[n-1].payload != "the reason" {
		t.Errorf("%d queued, last %+v", n, h.queue[n-1])
	}
}
