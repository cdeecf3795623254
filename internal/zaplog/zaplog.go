// SPDX-License-Identifier: Apache-2.0

// Package zaplog lets libraries that log with zap write to slog.
package zaplog

import (
	"context"
	"log/slog"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// New returns a logger whose records go to h.
func New(h slog.Handler) *zap.Logger { return zap.New(core{h}) }

type core struct{ slog.Handler }

var levels = map[zapcore.Level]slog.Level{
	zapcore.DebugLevel: slog.LevelDebug,
	// What a library does step by step is detail to an operator.
	zapcore.InfoLevel: slog.LevelDebug,
	zapcore.WarnLevel: slog.LevelWarn,
}

func levelOf(l zapcore.Level) slog.Level {
	if level, ok := levels[l]; ok {
		return level
	}
	return slog.LevelError
}

func (c core) Enabled(l zapcore.Level) bool {
	return c.Handler.Enabled(context.Background(), levelOf(l))
}

func (c core) With(fields []zapcore.Field) zapcore.Core { return core{c.WithAttrs(attrsOf(fields))} }

func (c core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	r := slog.NewRecord(e.Time, levelOf(e.Level), e.Message, 0)
	r.AddAttrs(attrsOf(fields)...)
	return c.Handle(context.Background(), r)
}

func (core) Sync() error { return nil }

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
