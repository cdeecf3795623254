// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Restore takes the routes that Keep wrote, by the same rules as a registration, and
// makes their peers: the data path of a gateway that was restarted is back before any
// guest calls. A file that cannot be read is no reason not to start.
func (s *Service) Restore(file string) error {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.Wrap(err, "gateway_routes", "read the routes that were kept")
	}
	applied, bad := s.cfg.Routes.Merge(file, text)
	s.log.Info("routes", "restored", applied, "quarantined", bad)
	return s.reconcile()
}

// Keep holds the tunnel to the table, ends leases, and writes the routes to file ("" for
// none) until ctx ends.
func (s *Service) Keep(ctx context.Context, file string) error {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	var written []byte
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := s.reconcile(); err != nil {
			s.log.Warn("tunnel", "code", fault.Code(err), "error", err)
		}
		text, err := s.cfg.Routes.Dump()
		if err != nil || file == "" || bytes.Equal(text, written) {
			continue
		}
		if err := durable.WriteFile(file, text, 0o600); err != nil {
			s.log.Warn("keep the routes", "error", err)
			continue
		}
		written = text
	}
}

// reconcile makes the tunnel's peers those of the routes whose lease holds.
func (s *Service) reconcile() error {
	for _, rec := range s.cfg.Routes.Sweep() {
		s.log.Info("route ended", "app", rec.App.String(), "instance", rec.Instance.String())
	}
	peers, err := s.cfg.Tunnel.Peers()
	if err != nil {
		return err // an empty answer would end every route's health
	}
	var errs []error
	for _, key := range s.cfg.Routes.Observe(peers) {
		errs = append(errs, s.cfg.Tunnel.Remove(key))
	}
	have := make(map[wgconfig.PublicKey]bool, len(peers))
	for _, p := range peers {
		have[p.Key] = true
	}
	for _, rec := range s.cfg.Routes.Records() {
		if !have[rec.Key] {
			errs = append(errs, s.cfg.Tunnel.Set(wgconfig.Peer{Key: rec.Key, Address: rec.Address}))
		}
	}
	return errors.Join(errs...)
}
