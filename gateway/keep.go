// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
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
	if text, err := os.ReadFile(file + endpointsSuffix); err == nil {
		s.endpoints = parseEndpoints(text)
	}
	return s.reconcile()
}

// endpointsSuffix names the file of where peers were last heard of, beside the routes: a
// gateway that knows calls them, and need not wait to be called.
const endpointsSuffix = ".endpoints"

// parseEndpoints reads lines of a key and an address:port. What is malformed is left out:
// that peer calls by itself.
func parseEndpoints(text []byte) map[wgconfig.PublicKey]netip.AddrPort {
	out := map[wgconfig.PublicKey]netip.AddrPort{}
	for line := range strings.Lines(string(text)) {
		key, at, _ := strings.Cut(strings.TrimSpace(line), " ")
		k, err := wgconfig.ParsePublicKey(key)
		if err != nil {
			continue
		}
		if ap, err := netip.ParseAddrPort(at); err == nil && ap.Port() != 0 && len(out) < wgconfig.MaxPeers {
			out[k] = ap
		}
	}
	return out
}

func (s *Service) endpointLines() []byte {
	var lines []string
	for k, at := range s.endpoints {
		lines = append(lines, k.String()+" "+at.String()+"\n")
	}
	slices.Sort(lines)
	return []byte(strings.Join(lines, ""))
}

// Times between looks at the tunnel: each is twice the one before, up to the usual.
const (
	firstTick = 50 * time.Millisecond
	usualTick = 2 * time.Second
)

// Keep holds the tunnel to the table, ends leases, and writes the routes to file ("" for
// none) until ctx ends.
func (s *Service) Keep(ctx context.Context, file string) error {
	// At first often: instances of restored routes are reachable again within a round trip,
	// and nobody is sent to one whose handshake was not seen.
	every := firstTick
	tick := time.NewTicker(every)
	defer tick.Stop()
	written := map[string][]byte{}
	write := func(name string, text []byte) {
		if bytes.Equal(text, written[name]) {
			return
		}
		if err := durable.WriteFile(name, text, 0o600); err != nil {
			s.log.Warn("keep the routes", "error", err)
			return
		}
		written[name] = text
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if every < usualTick {
				every = min(2*every, usualTick)
				tick.Reset(every)
			}
		case <-s.applied:
		}
		if err := s.reconcile(); err != nil {
			s.log.Warn("tunnel", "code", fault.Code(err), "error", err)
		}
		text, err := s.cfg.Routes.Dump()
		if err != nil || file == "" {
			continue
		}
		write(file, text)
		write(file+endpointsSuffix, s.endpointLines())
	}
}

// Applied makes Keep look at once: the table has routes that another gateway appraised.
func (s *Service) Applied() {
	select {
	case s.applied <- struct{}{}:
	default:
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
	have := make(map[wgconfig.PublicKey]wgconfig.Status, len(peers))
	for _, p := range peers {
		have[p.Key] = p
	}
	known := make(map[wgconfig.PublicKey]netip.AddrPort, len(peers))
	for _, rec := range s.cfg.Routes.Records() {
		peer, ok := have[rec.Key]
		at := peer.Endpoint
		// A peer with another address is one of an older route, such as another gateway's:
		// what that address gets and sends is not this instance's any more.
		if !ok || !slices.Equal(peer.Allowed, []netip.Prefix{netip.PrefixFrom(rec.Address, 32)}) {
			if !ok {
				at = s.endpoints[rec.Key]
			}
			p := wgconfig.Peer{Key: rec.Key, Address: rec.Address}
			if !ok && at.IsValid() {
				// With a keepalive the handshake is made now, by which the instance is known
				// to be reachable: nobody would ask for it otherwise.
				p.Endpoint, p.Keepalive = wgconfig.EndpointOf(at), wgconfig.Keepalive
			}
			errs = append(errs, s.cfg.Tunnel.Set(p))
		}
		if at.IsValid() {
			known[rec.Key] = at
		}
	}
	s.endpoints = known
	return errors.Join(errs...)
}
