// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"log/slog"

	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/internal/lograte"
)

// Records of one message a second, and at first. Strangers can cause some of them without
// end; the access log, which is asked for, has more.
const (
	logRate, logBurst       = 20, 200
	accessRate, accessBurst = 1000, 2000
)

// limited is a log that a flood does not fill.
func limited(log *slog.Logger) *slog.Logger {
	return slog.New(lograte.New(log.Handler(), logRate, logBurst))
}

// accessLog tells of connections that are over, if that is asked for; log is not limited.
func (c *ProxyConfig) accessLog(log *slog.Logger) func(edge.Ended) {
	if !c.AccessLog {
		return nil
	}
	log = slog.New(lograte.New(log.Handler(), accessRate, accessBurst))
	return func(e edge.Ended) {
		attrs := []slog.Attr{slog.Duration("took", e.Took)}
		if c.AccessLogClients {
			attrs = append(attrs, slog.String("client", e.Client.String()))
		}
		if e.Code != "" {
			attrs = append(attrs, slog.String("refused", e.Code))
		} else {
			attrs = append(attrs, slog.String("app", e.App.String()), slog.String("instance", e.Instance.String()), slog.Int("port", int(e.Port)),
				slog.String("mode", e.Mode.String()), slog.Uint64("up", e.Up), slog.Uint64("down", e.Down), slog.String("end", e.How))
		}
		log.LogAttrs(context.Background(), slog.LevelInfo, "access", attrs...)
	}
}
