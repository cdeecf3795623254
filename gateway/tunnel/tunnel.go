// SPDX-License-Identifier: Apache-2.0

// Package tunnel is the gateway's end of the WireGuard network to its instances.
//
// There are three ways to the same guarantees. The kernel's WireGuard is the fastest.
// WireGuard in this process over a TUN device needs NET_ADMIN and no kernel module;
// connections are the kernel's, so that they can be spliced. With a network stack in
// this process too, nothing needs a privilege, and the data is copied.
//
// Guarantees: peers are typed values, one key with one address (threats.md K01); who
// has no registered key gets no answer at all (K05). Connections begin at the gateway:
// a packet of a peer that belongs to none is dropped, so that instances reach neither
// the gateway's own ports nor each other. Dial leaves through the tunnel or not at all.
//
// Attacker-controlled: every packet of the network, and of peers. Trusted: the kernel,
// and whoever calls Set, to have taken key and address from a registration.
//
// Implements spec/gateway.md §3.1.
package tunnel

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/tun/netstack"

	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
)

// Mode is how packets reach the instances.
type Mode string

const (
	Auto     Mode = ""         // the first of the following that works
	Kernel   Mode = "kernel"   // the kernel's WireGuard
	TUN      Mode = "tun"      // WireGuard in this process, over a TUN device
	Netstack Mode = "netstack" // WireGuard and TCP in this process
)

// MTU is that of the tunnel in bytes: what is left of an Ethernet frame under IPv6 and
// WireGuard's header.
const MTU = 1420

// Config says what the tunnel is.
type Config struct {
	Key     wgconfig.PrivateKey
	Listen  netip.AddrPort // UDP; an unspecified address is all of them
	Address netip.Addr     // the gateway's own in the tunnel, IPv4
	Network netip.Prefix   // where instances' addresses lie
	Mode    Mode
	Name    string // of the interface, for Kernel and TUN; "dstack-gw0"
	Log     *slog.Logger
}

// backend is one of the ways.
type backend interface {
	set(wgconfig.Peer) error
	remove(wgconfig.PublicKey) error
	peers() ([]wgconfig.Status, error)
	dial(context.Context, netip.AddrPort) (net.Conn, error)
	close() error
}

// Tunnel is an open tunnel. It is safe for concurrent use.
type Tunnel struct {
	cfg  Config
	mode Mode
	back backend

	mu     sync.Mutex
	closed bool
}

// Open makes the interface, without peers. It replaces one of the same name that a
// gateway left behind, so that a new configuration counts. Codes: tunnel_config,
// tunnel_unavailable (with the reason of each mode), tunnel_port (busy).
func Open(ctx context.Context, cfg Config) (*Tunnel, error) {
	if cfg.Name == "" {
		cfg.Name = "dstack-gw0"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case cfg.Key.IsZero() || cfg.Listen.Port() == 0 || !cfg.Listen.Addr().IsValid():
		return nil, fault.New("tunnel_config", "a tunnel needs a key, and an address and port to listen at")
	case !cfg.Address.Is4() || !cfg.Network.IsValid() || !wgconfig.Inside(cfg.Network, cfg.Address):
		return nil, fault.New("tunnel_config", "the gateway's address %s is no host of the network %s", cfg.Address, cfg.Network)
	case len(cfg.Name) >= unix.IFNAMSIZ:
		return nil, fault.New("tunnel_config", "the interface's name %q has more than %d bytes", cfg.Name, unix.IFNAMSIZ-1)
	}
	// A port that another process has is the same in all modes, and no mode's fault.
	probe, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(cfg.Listen))
	if err != nil {
		return nil, fault.Wrap(err, "tunnel_port", "listen for WireGuard at %s/udp", cfg.Listen).
			WithFix("set another port for WireGuard, or stop who has this one")
	}
	probe.Close()

	open := map[Mode]func(context.Context, Config) (backend, error){Kernel: openKernel, TUN: openTUN, Netstack: openNetstack}
	modes := []Mode{Kernel, TUN, Netstack}
	if cfg.Mode != Auto {
		if open[cfg.Mode] == nil {
			return nil, fault.New("tunnel_config", "there is no tunnel mode %q", cfg.Mode).WithFix("use kernel, tun or netstack")
		}
		modes = []Mode{cfg.Mode}
	} else if !cfg.Listen.Addr().IsUnspecified() {
		modes = modes[1:] // the kernel's WireGuard listens at all addresses
	}
	var why []any
	for _, m := range modes {
		b, err := open[m](ctx, cfg)
		if err == nil {
			return &Tunnel{cfg: cfg, mode: m, back: b}, nil
		}
		cfg.Log.Info("tunnel", "mode", m, "unavailable", err)
		why = append(why, fmt.Sprintf("%s: %v", m, err))
	}
	return nil, fault.New("tunnel_unavailable", "no way to a tunnel works: %v", why).
		WithFix("run as root or with NET_ADMIN for kernel and tun; netstack needs neither")
}

// Mode returns the way that was taken.
func (t *Tunnel) Mode() Mode { return t.mode }

// Set adds a peer, or changes it. Codes: tunnel_address (none of the network's, or the
// gateway's own), tunnel_closed, those of wgconfig.
func (t *Tunnel) Set(p wgconfig.Peer) error {
	if p.Address == t.cfg.Address || !wgconfig.Inside(t.cfg.Network, p.Address) {
		return fault.New("tunnel_address", "%s is no instance's address in %s", p.Address, t.cfg.Network)
	}
	if p.Key.IsZero() || p.Key == t.cfg.Key.Public() {
		return fault.New("wg_key_own", "a peer has no key, or the gateway's own")
	}
	return t.locked(func() error { return t.back.set(p) })
}

// Remove removes a peer, if there is one: its connections stall at once.
func (t *Tunnel) Remove(k wgconfig.PublicKey) error {
	return t.locked(func() error { return t.back.remove(k) })
}

// locked keeps changes in order.
func (t *Tunnel) locked(change func() error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return fault.New("tunnel_closed", "the tunnel is closed")
	}
	return change()
}

// Peers returns what is known of the peers: all of them, or an error.
func (t *Tunnel) Peers() (peers []wgconfig.Status, err error) {
	err = t.locked(func() error { peers, err = t.back.peers(); return err })
	return peers, err
}

// Dial connects to a TCP port of an instance. Codes: tunnel_address, tunnel_dial.
func (t *Tunnel) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	if to.Addr() == t.cfg.Address || !wgconfig.Inside(t.cfg.Network, to.Addr()) {
		return nil, fault.New("tunnel_address", "%s is no instance's address in %s", to.Addr(), t.cfg.Network)
	}
	c, err := t.back.dial(ctx, to)
	if err != nil {
		return nil, fault.Wrap(err, "tunnel_dial", "connect to %s", to)
	}
	return c, nil
}

// Close ends the tunnel and removes its interface.
func (t *Tunnel) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	return t.back.close()
}

// user is WireGuard in this process.
type user struct {
	dev *device.Device
	net *netstack.Net // nil over a TUN device
	out net.Dialer    // over a TUN device
	end func() error  // of the firewall
}

func openUser(cfg Config, link tun.Device) (*user, error) {
	quiet := &device.Logger{Verbosef: device.DiscardLogf, Errorf: func(format string, args ...any) {
		cfg.Log.Warn("wireguard", "error", fmt.Sprintf(format, args...))
	}}
	u := &user{dev: device.NewDevice(link, newBind(cfg.Listen.Addr()), quiet)}
	text, err := (&wgconfig.Interface{Key: cfg.Key, Port: cfg.Listen.Port(), Address: cfg.Address, Network: cfg.Network}).UAPI()
	if err == nil {
		err = u.dev.IpcSetOperation(bytes.NewReader(text))
		clear(text)
	}
	if err == nil {
		err = u.dev.Up()
	}
	if err != nil {
		u.dev.Close()
		return nil, fmt.Errorf("start WireGuard: %w", err)
	}
	return u, nil
}

func openNetstack(_ context.Context, cfg Config) (backend, error) {
	link, stack, err := netstack.CreateNetTUN([]netip.Addr{cfg.Address}, nil, MTU)
	if err != nil {
		return nil, err
	}
	u, err := openUser(cfg, link)
	if err != nil {
		return nil, err
	}
	u.net = stack
	return u, nil
}

func openTUN(_ context.Context, cfg Config) (backend, error) {
	if err := removeLink(cfg.Name); err != nil {
		return nil, err
	}
	link, err := tun.CreateTUN(cfg.Name, MTU)
	if err != nil {
		return nil, err
	}
	u, err := openUser(cfg, link)
	if err != nil {
		return nil, err
	}
	u.out.Control = boundTo(cfg.Name)
	if u.end, err = configureLink(cfg); err != nil {
		u.dev.Close()
		return nil, err
	}
	return u, nil
}

func (u *user) set(p wgconfig.Peer) error {
	text, err := p.Set()
	if err != nil {
		return err
	}
	return u.dev.IpcSetOperation(bytes.NewReader(text))
}

func (u *user) remove(k wgconfig.PublicKey) error {
	return u.dev.IpcSetOperation(bytes.NewReader(wgconfig.Remove(k)))
}

func (u *user) peers() ([]wgconfig.Status, error) {
	var b bytes.Buffer // has the private key
	defer func() { clear(b.Bytes()[:b.Cap()]) }()
	if err := u.dev.IpcGetOperation(&b); err != nil {
		return nil, err
	}
	b.WriteString("errno=0\n\n") // which only the socket's side adds
	return wgconfig.ParseUAPI(bytes.NewReader(b.Bytes()))
}

func (u *user) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	if u.net != nil {
		return u.net.DialContextTCPAddrPort(ctx, to)
	}
	return u.out.DialContext(ctx, "tcp", to.String())
}

func (u *user) close() error {
	u.dev.Close() // and the link with it
	if u.end != nil {
		return u.end()
	}
	return nil
}

// boundTo ties a socket to an interface, so that nothing leaves another way.
func boundTo(name string) func(string, string, syscallConn) error {
	return func(_, _ string, c syscallConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = os.NewSyscallError("setsockopt", unix.BindToDevice(int(fd), name)) }); e != nil {
			return e
		}
		return err
	}
}
