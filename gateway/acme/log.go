// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"go.uber.org/zap/zapcore"

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

// zapCore passes what CertMagic logs on to slog.
type zapCore struct{ slog.Handler }

var zapLevels = map[zapcore.Level]slog.Level{
	zapcore.DebugLevel: slog.LevelDebug,
	// What CertMagic does step by step is detail to the gateway's operator.
	zapcore.InfoLevel: slog.LevelDebug,
	zapcore.WarnLevel: slog.LevelWarn,
}

func levelOf(l zapcore.Level) slog.Level {
	if level, ok := zapLevels[l]; ok {
		return level
	}
	return slog.LevelError
}

func (c zapCore) Enabled(l zapcore.Level) bool {
	return c.Handler.Enabled(context.Background(), levelOf(l))
}

func (c zapCore) With(fields []zapcore.Field) zapcore.Core {
	return zapCore{c.WithAttrs(attrsOf(fields))}
}

func (c zapCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c zapCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	r := slog.NewRecord(e.Time, levelOf(e.Level), e.Message, 0)
	r.AddAttrs(attrsOf(fields)...)
	return c.Handle(context.Background(), r)
}

func (zapCore) Sync() error { return nil }

func attrsOf(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	var attrs []slog.Attr
	for _, f := range fields {
		f.AddTo(enc)
	}
	for key, value := range enc.Fields {
		attrs = append(attrs, slog.Any(key, value))
	}
	return attrs
}
