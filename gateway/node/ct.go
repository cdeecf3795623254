// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"path/filepath"
	"time"

	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/ctwatch"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// CTConfig is the watch of certificate transparency logs.
type CTConfig struct {
	// Logs are "<url> <public key in base64>", separated by commas; static+https:// for
	// tiled ones. Empty: none are watched.
	Logs     string          `toml:"logs"`
	Interval config.Duration `toml:"interval"` // between looks; 30 s
	// Webhook (https) is told each alarm, as JSON.
	Webhook config.Secret `toml:"webhook"`
}

func (c *CTConfig) check() error {
	logs, err := ctwatch.ParseLogs(c.Logs)
	switch {
	case err != nil:
		return fault.Wrap(err, "gateway_config", "core.ct.logs")
	case len(logs) == 0 && c.Webhook.Reveal() != "":
		return bad("core.ct.webhook without core.ct.logs").WithFix("name the logs that are watched")
	case c.Interval.Duration != 0 && (c.Interval.Duration < time.Second || c.Interval.Duration > time.Hour):
		return bad("core.ct.interval is %s, not from a second to an hour", c.Interval.Duration)
	}
	return nil
}

// watch opens the watch of certificate logs; nil: none is configured. What is not certified
// by the manager, which may be nil, has no business in a public log.
func (n *Node) watch(m *acme.Manager, edit ...func(*ctwatch.Config)) (*ctwatch.Watcher, error) {
	c := &n.cfg.Core.CT
	logs, err := ctwatch.ParseLogs(c.Logs)
	if err != nil || len(logs) == 0 {
		return nil, err
	}
	cfg := ctwatch.Config{
		Logs: logs, Every: c.Interval.Duration, Webhook: c.Webhook.Reveal(), Dir: filepath.Join(n.cfg.Core.DataDir, "ct"), Log: n.log,
		Names: func(ctx context.Context) ctwatch.Names {
			var names ctwatch.Names
			for _, d := range n.live.Domains() {
				names.Bases = append(names.Bases, d.Name)
			}
			if m != nil {
				names.Exact = m.CustomNames(ctx)
			}
			return names
		},
		Known: func(context.Context, [32]byte) (bool, error) { return false, nil },
	}
	if m != nil {
		cfg.Known = m.KnownKey
	}
	for _, e := range edit { // of tests
		e(&cfg)
	}
	return ctwatch.New(cfg)
}
