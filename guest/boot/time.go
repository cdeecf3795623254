// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	"github.com/dstack-go/dstack/guest/clock"
	"github.com/dstack-go/dstack/guest/firewall"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// Places in the image.
const (
	authorities = "/etc/ssl/certs/ca-certificates.crt"
	osRelease   = "/etc/os-release"
)

// time decides whose clock counts: that of several authenticated servers, before
// anything depends on it, or the host's, which the verdict then says.
func (m *Machine) time(ctx context.Context) error {
	if !m.manifest.WantsSecureTime() {
		m.console.Log("time: host")
		return nil
	}
	servers, err := timeServers(m.manifest)
	if err != nil {
		return err
	}
	built, err := buildTime(osRelease)
	if err != nil {
		return err
	}
	c, err := clock.New(clock.Config{
		Sources: clock.Sources(servers, clock.Linux{}), System: clock.Linux{}, Bounds: []clock.LowerBound{built},
		OnGap: func(g clock.Gap) {
			m.console.Log(fmt.Sprintf("the machine stood still for %s: %s", g.Length.Round(time.Second), g.Why))
		},
		Log: m.console.Log,
	})
	if err != nil {
		return err
	}
	var proof clock.Proof
	err = outbound(func() error {
		proof, err = c.Prove(ctx)
		return err
	})
	if err != nil {
		return err
	}
	m.console.Log("time: nts: " + proof.String())
	m.clock = c
	return nil
}

// keepTime asks for the time again and again once the firewall is open.
func (m *Machine) keepTime() {
	if m.clock != nil {
		go m.clock.Keep(context.Background())
	}
}

// outbound lets this process ask the outside world while f runs, and closes the
// firewall again.
func outbound(f func() error) (err error) {
	if err := firewall.Outbound(); err != nil {
		return fault.Wrap(err, "firewall_failed", "let the boot ask")
	}
	defer func() {
		if closed := firewall.Closed(); closed != nil && err == nil {
			err = fault.Wrap(closed, "firewall_failed", "close the firewall again")
		}
	}()
	return f()
}

// buildTime is when the image was built: the date of a file of its measured root.
func buildTime(path string) (clock.LowerBound, error) {
	info, err := os.Stat(path)
	if err != nil {
		return clock.LowerBound{}, fault.Wrap(err, "time_unproven", "find out when the image was built")
	}
	return clock.LowerBound{Time: info.ModTime(), Why: "the build of the image"}, nil
}

// timeServers returns the manifest's servers, or those of the image.
func timeServers(m *manifest.Manifest) ([]clock.Server, error) {
	var image *x509.CertPool
	imageRoots := func() (err error) {
		if image == nil {
			image, err = clock.ReadRoots(authorities)
		}
		return err
	}
	if len(m.TimeServers) == 0 {
		if err := imageRoots(); err != nil {
			return nil, err
		}
		return clock.DefaultServers(image), nil
	}
	var servers []clock.Server
	for _, s := range m.TimeServers {
		var roots *x509.CertPool
		var err error
		if s.CACert != "" {
			roots, err = clock.ParseRoots([]byte(s.CACert))
		} else {
			err = imageRoots()
			roots = image
		}
		if err != nil {
			return nil, fmt.Errorf("time server %s: %w", s.Host, err)
		}
		servers = append(servers, clock.Server{Host: s.Host, Roots: roots})
	}
	return servers, nil
}

// timeLimit bounds the phase: the proof's own limit and what the firewall takes.
const timeLimit = clock.DefaultLimit + 15*time.Second
