// SPDX-License-Identifier: Apache-2.0

// Package lograte bounds what strangers can make a program write to its log: each message
// (the constant text, not its attributes) has a rate of its own, so that a flood of one
// leaves the others readable. What was left out is counted in the next record of that
// message that is let through (attribute suppressed).
//
// Trusted: that messages are constants of the program. Attacker-controlled: how often, and
// the attributes.
//
// Implements threats.md K08 (log bombs).
package lograte

import (
	"context"
	"log/slog"
	"sync"

	"golang.org/x/time/rate"
)

// maxMessages is how many messages have a rate of their own; all others share one.
const maxMessages = 256

// New returns a handler that passes perSecond records of a message on, and at first burst.
func New(next slog.Handler, perSecond, burst int) slog.Handler {
	return &handler{Handler: next, limits: &limits{rate: rate.Limit(perSecond), burst: burst, each: map[string]*limit{}}}
}

type handler struct {
	slog.Handler
	limits *limits
}

type limits struct {
	rate  rate.Limit
	burst int
	mu    sync.Mutex
	each  map[string]*limit
}

type limit struct {
	*rate.Limiter
	suppressed uint64
}

// take admits a record, and returns how many before it were not.
func (l *limits) take(r *slog.Record) (suppressed uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := r.Message
	if l.each[key] == nil && len(l.each) >= maxMessages {
		key = ""
	}
	m := l.each[key]
	if m == nil {
		m = &limit{Limiter: rate.NewLimiter(l.rate, l.burst)}
		l.each[key] = m
	}
	if !m.AllowN(r.Time, 1) {
		m.suppressed++
		return 0, false
	}
	suppressed, m.suppressed = m.suppressed, 0
	return suppressed, true
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	suppressed, ok := h.limits.take(&r)
	if !ok {
		return nil
	}
	if suppressed > 0 {
		r = r.Clone()
		r.Add("suppressed", suppressed)
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(a []slog.Attr) slog.Handler {
	return &handler{h.Handler.WithAttrs(a), h.limits}
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	return &handler{h.Handler.WithGroup(name), h.limits}
}
