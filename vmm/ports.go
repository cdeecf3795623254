// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/fault"
)

const maxPorts = 64

// parsePorts checks requested port mappings against the configuration.
//
// Codes: port_mapping_disabled, port_invalid, port_not_allowed.
func (c *Config) parsePorts(in []*vmmpb.PortMapping) ([]PortMap, error) {
	out := []PortMap{}
	p := c.CVM.PortMapping
	if len(in) > 0 && (!p.Enabled || c.CVM.Networking.Mode != "user") {
		return nil, fault.New("port_mapping_disabled", "port mapping is disabled").
			WithFix("set cvm.port_mapping.enabled and networking mode user in the VMM's configuration")
	}
	if len(in) > maxPorts {
		return nil, fault.New("port_invalid", "%d port mappings, more than %d", len(in), maxPorts)
	}
	for _, m := range in {
		if m.Protocol != "tcp" && m.Protocol != "udp" {
			return nil, fault.New("port_invalid", "protocol %.20q of a port mapping is neither tcp nor udp", m.Protocol)
		}
		for _, n := range []uint32{m.HostPort, m.VmPort} {
			if n == 0 || n > 65535 {
				return nil, fault.New("port_invalid", "port %d is not in 1 to 65535", n)
			}
		}
		text := m.HostAddress
		if text == "" {
			text = p.Address
		}
		addr, err := netip.ParseAddr(text)
		if err != nil || !addr.Is4() {
			return nil, fault.New("port_invalid", "host address %.60q of a port mapping is not an IPv4 address", text)
		}
		if !addr.IsLoopback() && !p.Expose {
			return nil, fault.New("port_not_allowed", "port mapping is not allowed on %s, which others can reach", addr).
				WithFix("use 127.0.0.1, or set cvm.port_mapping.expose in the VMM's configuration")
		}
		allowed := false
		for _, r := range p.Range {
			allowed = allowed || r.Protocol == m.Protocol && uint32(r.From) <= m.HostPort && m.HostPort <= uint32(r.To)
		}
		if !allowed {
			return nil, fault.New("port_not_allowed", "port mapping is not allowed for %s:%d", m.Protocol, m.HostPort).
				WithFix("choose a port in cvm.port_mapping.range, or extend it in the VMM's configuration")
		}
		out = append(out, PortMap{addr, m.Protocol, uint16(m.HostPort), uint16(m.VmPort)})
	}
	for i := range out {
		if q, ok := overlap(out[i], out[:i]); ok {
			return nil, fault.New("port_busy", "host port %s is given twice (%s)", out[i], q).WithFix("map each host port once")
		}
	}
	return out, nil
}

// overlap finds a mapping that takes the same host port.
func overlap(p PortMap, others []PortMap) (PortMap, bool) {
	for _, q := range others {
		if p.Protocol == q.Protocol && p.From == q.From &&
			(p.Address == q.Address || p.Address.IsUnspecified() || q.Address.IsUnspecified()) {
			return q, true
		}
	}
	return PortMap{}, false
}

// tryPorts binds each port for an instant.
//
// Codes: port_busy, port_denied, port_invalid.
func tryPorts(ctx context.Context, ports []PortMap) error {
	var lc net.ListenConfig
	for _, p := range ports {
		addr := netip.AddrPortFrom(p.Address, p.From).String()
		var err error
		if p.Protocol == "tcp" {
			var l net.Listener
			if l, err = lc.Listen(ctx, "tcp4", addr); err == nil {
				err = l.Close()
			}
		} else {
			var l net.PacketConn
			if l, err = lc.ListenPacket(ctx, "udp4", addr); err == nil {
				err = l.Close()
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, syscall.EADDRINUSE):
			return portBusy(p)
		case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
			return fault.New("port_denied", "host port %s may not be used by this user", p).
				WithFix("choose a host port from 1024 up")
		case errors.Is(err, syscall.EADDRNOTAVAIL):
			return fault.New("port_invalid", "%s is not an address of this machine", p.Address).WithFix("use 127.0.0.1")
		default:
			return fmt.Errorf("try host port %s: %w", p, err)
		}
	}
	return nil
}

func portBusy(p PortMap) error {
	flag := "-ltnp"
	if p.Protocol == "udp" {
		flag = "-lunp"
	}
	return fault.New("port_busy", "host port %s is in use", p).
		WithFix("stop the program that uses it (ss %s 'sport = :%d' shows it), or choose another host port", flag, p.From)
}
