// SPDX-License-Identifier: Apache-2.0

// Package tunnel is the guest's end of the WireGuard network to its gateways: one
// interface of the kernel's, one peer for each gateway.
//
// Guarantees: the private key is made here and never leaves; a change touches what
// differs and nothing else, so that one gateway's coming or going does not disturb
// another's connections; only a gateway's own address in the tunnel is routed into it.
//
// Trusted: the kernel. What a change holds was checked (initrpc.TunnelChange.Check) and
// is a gateway's word on where it is; who it is, the guest's agent appraised.
//
// Implements spec/gateway.md §3.2.
package tunnel

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-go/dstack/guest/agent/initrpc"
)

// The interface, as upstream's guests have it.
const (
	Name      = "dstack-wg0"
	Port      = 9182 // UDP
	mtu       = 1420
	keepalive = 25 * time.Second
)

// Tunnel is the interface. It is safe for concurrent use.
type Tunnel struct {
	mu     sync.Mutex
	ctl    *wgctrl.Client
	public []byte
	now    initrpc.TunnelChange
}

// Open makes the interface, without addresses and peers, and its key.
func Open() (*Tunnel, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = Name, mtu
	if err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("make the WireGuard interface: %w", err)
	}
	ctl, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("speak to WireGuard: %w", err)
	}
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	raw := wgtypes.Key(key.Bytes())
	defer clear(raw[:])
	port := Port
	if err := ctl.ConfigureDevice(Name, wgtypes.Config{PrivateKey: &raw, ListenPort: &port, ReplacePeers: true}); err != nil {
		return nil, fmt.Errorf("configure the WireGuard interface: %w", err)
	}
	link, err := netlink.LinkByName(Name)
	if err != nil {
		return nil, err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring the WireGuard interface up: %w", err)
	}
	return &Tunnel{ctl: ctl, public: key.PublicKey().Bytes()}, nil
}

// Set makes the tunnel what change says. After an error it may be in between; calling
// it again goes on.
func (t *Tunnel) Set(change initrpc.TunnelChange) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	link, err := netlink.LinkByName(Name)
	if err != nil {
		return err
	}
	host := func(a netip.Addr) *net.IPNet { return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)} }
	var errs []error
	for _, a := range change.Addresses {
		if !slices.Contains(t.now.Addresses, a) {
			errs = append(errs, netlink.AddrReplace(link, &netlink.Addr{IPNet: host(a)}))
		}
	}
	var peers []wgtypes.PeerConfig
	for _, p := range change.Peers {
		if slices.ContainsFunc(t.now.Peers, func(o initrpc.TunnelPeer) bool { return same(o, p) }) {
			continue
		}
		every := keepalive
		peers = append(peers, wgtypes.PeerConfig{
			PublicKey: wgtypes.Key(p.Key), Endpoint: net.UDPAddrFromAddrPort(p.Endpoint), ReplaceAllowedIPs: true,
			AllowedIPs: []net.IPNet{*host(p.Address)}, PersistentKeepaliveInterval: &every,
		})
		errs = append(errs, netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(p.Address), Scope: netlink.SCOPE_LINK}))
	}
	for _, o := range t.now.Peers {
		if !slices.ContainsFunc(change.Peers, func(p initrpc.TunnelPeer) bool { return bytes.Equal(p.Key, o.Key) }) {
			peers = append(peers, wgtypes.PeerConfig{PublicKey: wgtypes.Key(o.Key), Remove: true})
		}
		if !slices.ContainsFunc(change.Peers, func(p initrpc.TunnelPeer) bool { return p.Address == o.Address }) {
			errs = append(errs, gone(netlink.RouteDel(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(o.Address), Scope: netlink.SCOPE_LINK})))
		}
	}
	if len(peers) > 0 {
		errs = append(errs, t.ctl.ConfigureDevice(Name, wgtypes.Config{Peers: peers}))
	}
	for _, a := range t.now.Addresses {
		if !slices.Contains(change.Addresses, a) {
			errs = append(errs, gone(netlink.AddrDel(link, &netlink.Addr{IPNet: host(a)})))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("change the tunnel: %w", err)
	}
	t.now = change
	return nil
}

func same(a, b initrpc.TunnelPeer) bool {
	return bytes.Equal(a.Key, b.Key) && a.Address == b.Address && a.Endpoint == b.Endpoint
}

// gone is for removing what may not be there.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return nil
	}
	return err
}

// Status tells the public key, and when each gateway was heard of.
func (t *Tunnel) Status() (initrpc.TunnelStatus, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := initrpc.TunnelStatus{Key: t.public}
	dev, err := t.ctl.Device(Name)
	if err != nil {
		return out, fmt.Errorf("ask WireGuard: %w", err)
	}
	clear(dev.PrivateKey[:])
	for _, p := range dev.Peers {
		out.Handshakes = append(out.Handshakes, initrpc.TunnelHandshake{Key: p.PublicKey[:], At: max(p.LastHandshakeTime.Unix(), 0)})
	}
	return out, nil
}
