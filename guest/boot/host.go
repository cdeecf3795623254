// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"strings"
	"sync"
	"time"
)

// Events of HostApi.Notify (vmm.md §9.1) that the guest sends.
const (
	eventProgress = "boot.progress"
	eventError    = "boot.error"
	eventShutdown = "shutdown.progress"
	eventInstance = "instance.info"
	// eventTimings is ours: the milliseconds of each phase as a JSON array.
	eventTimings = "boot.timings"
	// eventLease is ours: what became of the KMS's lease.
	eventLease = "kms.lease"
	// eventGateway is ours: why there is no tunnel to gateways.
	eventGateway = "gateway"
)

// maxNotification is the largest payload a host keeps; longer ones vanish whole.
const maxNotification = 4096

// notifyLimit bounds one call: a host that does not answer must not hold up the
// boot, nor may a slow one reorder what it is told.
const notifyLimit = 5 * time.Second

// host tells the host what happens, in order, in the background. The host is not
// trusted and nothing depends on its answers.
type host struct {
	send func(ctx context.Context, event, payload string) error

	mu      sync.Mutex
	queue   []notification
	working bool          // a goroutine drains the queue
	idle    chan struct{} // closed when nothing is queued or under way
}

type notification struct{ event, payload string }

// maxQueue bounds what waits for a host that does not listen.
const maxQueue = 64

func newHost(send func(ctx context.Context, event, payload string) error) *host {
	idle := make(chan struct{})
	close(idle)
	return &host{send: send, idle: idle}
}

// Notify queues a notification; payloads are cut to what a host keeps.
func (h *host) Notify(event, payload string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.queue) == maxQueue {
		// Progress is worthless when late; errors come last and are kept.
		h.queue = h.queue[1:]
	}
	h.queue = append(h.queue, notification{event, truncate(payload, maxNotification)})
	if !h.working {
		h.working, h.idle = true, make(chan struct{})
		go h.drain()
	}
}

func (h *host) drain() {
	for {
		h.mu.Lock()
		if len(h.queue) == 0 {
			h.working = false
			close(h.idle)
			h.mu.Unlock()
			return
		}
		next := h.queue[0]
		h.queue = h.queue[1:]
		h.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), notifyLimit)
		_ = h.send(ctx, next.event, next.payload)
		cancel()
	}
}

// Flush waits, at most limit, until everything queued was sent or given up.
func (h *host) Flush(limit time.Duration) {
	h.mu.Lock()
	idle := h.idle
	h.mu.Unlock()
	select {
	case <-idle:
	case <-time.After(limit):
	}
}

// truncate cuts text to max bytes at a character boundary.
func truncate(text string, max int) string {
	if len(text) <= max {
		return text
	}
	const mark = "…"
	return strings.ToValidUTF8(text[:max-len(mark)], "") + mark
}
