// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/dstack-go/dstack/internal/redact"
)

// secrets are the values that may leave in no text. A credential that is no longer in use
// stays known: its text may still come back in an answer.
type secrets struct {
	mu    sync.RWMutex
	known map[string]string
	r     *redact.Redactor
}

func (s *secrets) add(c *Credential) {
	for param, value := range c.params {
		if kinds[c.kind].secret(param) {
			s.addValue(c.kind+" "+param, value)
		}
	}
}

func (s *secrets) addValue(name, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = map[string]string{}
	}
	for _, known := range s.known {
		if known == value {
			return
		}
	}
	s.known[fmt.Sprintf("%s %d", name, len(s.known))] = value
	s.r = redact.New(s.known)
}

func (s *secrets) text(text string) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.r.Text(text)
}

// error flattens an error whose text holds a secret, so that no part of its chain can tell.
func (s *secrets) error(err error) error {
	if err == nil {
		return nil
	}
	if text := s.text(err.Error()); text != err.Error() {
		return errors.New(text)
	}
	return err
}

// redacting is a log handler that takes secrets out.
type redacting struct {
	slog.Handler
	secrets *secrets
}

func (h redacting) Handle(ctx context.Context, r slog.Record) error {
	clean := slog.NewRecord(r.Time, r.Level, h.secrets.text(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		clean.AddAttrs(h.attr(a))
		return true
	})
	return h.Handler.Handle(ctx, clean)
}

func (h redacting) attr(a slog.Attr) slog.Attr {
	switch v := a.Value.Resolve(); v.Kind() {
	case slog.KindBool, slog.KindDuration, slog.KindFloat64, slog.KindInt64, slog.KindTime, slog.KindUint64:
		return a
	default:
		return slog.String(a.Key, h.secrets.text(v.String()))
	}
}

func (h redacting) WithAttrs(attrs []slog.Attr) slog.Handler {
	clean := make([]slog.Attr, len(attrs))
	for i, a := range attrs {
		clean[i] = h.attr(a)
	}
	return redacting{h.Handler.WithAttrs(clean), h.secrets}
}

func (h redacting) WithGroup(name string) slog.Handler {
	return redacting{h.Handler.WithGroup(name), h.secrets}
}
