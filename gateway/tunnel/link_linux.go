// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-go/dstack/gateway/wgconfig"
)

type syscallConn = syscall.RawConn

// removeLink removes a WireGuard or TUN interface that was left behind.
func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for the interface %s: %w", name, err)
	}
	switch link.Type() {
	case "tuntap", "tun", "wireguard":
	default:
		return fmt.Errorf("the interface %s is a %s and not ours", name, link.Type())
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("remove the interface %s that was left behind: %w", name, err)
	}
	return nil
}

// configureLink closes the interface to what did not begin here, and only then brings
// it up with its address. end takes the filter away again.
func configureLink(cfg Config) (end func() error, err error) {
	link, err := netlink.LinkByName(cfg.Name)
	if err != nil {
		return nil, fmt.Errorf("find the interface %s: %w", cfg.Name, err)
	}
	end, err = isolate(cfg.Name)
	if err != nil {
		return nil, err
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: cfg.Address.AsSlice(), Mask: net.CIDRMask(cfg.Network.Bits(), 32)}}
	if err = netlink.AddrReplace(link, addr); err != nil {
		err = fmt.Errorf("give %s its address %s: %w", cfg.Name, cfg.Address, err)
	} else if err = netlink.LinkSetUp(link); err != nil {
		err = fmt.Errorf("bring %s up: %w", cfg.Name, err)
	}
	if err != nil {
		end()
		return nil, err
	}
	return end, nil
}

// isolate loads the table that drops what comes over the interface and is no answer,
// and all that would be forwarded from it or to it.
func isolate(name string) (end func() error, err error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open netlink for nftables: %w", err)
	}
	// Adding the table first makes the deletion valid when there is none yet.
	table := &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	iface := func(key expr.MetaKey) []expr.Any {
		b := make([]byte, unix.IFNAMSIZ)
		copy(b, name)
		return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: b}}
	}
	answers := []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binary.NativeEndian.AppendUint32(nil, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
	verdict := func(match []expr.Any, kind expr.VerdictKind) []expr.Any {
		return append(match, &expr.Verdict{Kind: kind})
	}
	for _, c := range []struct {
		name  string
		hook  *nftables.ChainHook
		rules [][]expr.Any
	}{
		{"input", nftables.ChainHookInput, [][]expr.Any{
			verdict(append(iface(expr.MetaKeyIIFNAME), answers...), expr.VerdictAccept),
			verdict(iface(expr.MetaKeyIIFNAME), expr.VerdictDrop),
		}},
		{"forward", nftables.ChainHookForward, [][]expr.Any{
			verdict(iface(expr.MetaKeyIIFNAME), expr.VerdictDrop),
			verdict(iface(expr.MetaKeyOIFNAME), expr.VerdictDrop),
		}},
	} {
		policy := nftables.ChainPolicyAccept
		chain := conn.AddChain(&nftables.Chain{Name: c.name, Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: c.hook, Priority: nftables.ChainPriorityRef(-10), Policy: &policy})
		for _, exprs := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
		}
	}
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("load the packet filter of %s: %w", name, err)
	}
	return func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.DelTable(table)
		return conn.Flush()
	}, nil
}

// kernel is the kernel's WireGuard.
type kernel struct {
	name string
	ctl  *wgctrl.Client
	out  net.Dialer
	end  func() error
}

func openKernel(_ context.Context, cfg Config) (backend, error) {
	if !cfg.Listen.Addr().IsUnspecified() {
		return nil, fmt.Errorf("the kernel's WireGuard listens at all addresses, and not at %s alone", cfg.Listen.Addr())
	}
	if err := removeLink(cfg.Name); err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = cfg.Name, MTU
	if err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("make a WireGuard interface: %w", err)
	}
	k := &kernel{name: cfg.Name, out: net.Dialer{Control: boundTo(cfg.Name)}}
	err := func() (err error) {
		if k.ctl, err = wgctrl.New(); err != nil {
			return err
		}
		key, port := wgtypes.Key(cfg.Key.Bytes()), int(cfg.Listen.Port())
		defer clear(key[:])
		if err := k.ctl.ConfigureDevice(cfg.Name, wgtypes.Config{PrivateKey: &key, ListenPort: &port, ReplacePeers: true}); err != nil {
			return err
		}
		k.end, err = configureLink(cfg)
		return err
	}()
	if err != nil {
		k.close()
		return nil, fmt.Errorf("configure the WireGuard interface: %w", err)
	}
	return k, nil
}

func (k *kernel) set(p wgconfig.Peer) error {
	keepalive := p.Keepalive
	peer := wgtypes.PeerConfig{PublicKey: p.Key.Bytes(), ReplaceAllowedIPs: true, PersistentKeepaliveInterval: &keepalive,
		AllowedIPs: []net.IPNet{{IP: p.Address.AsSlice(), Mask: net.CIDRMask(p.Address.BitLen(), p.Address.BitLen())}}}
	if at, ok := p.Endpoint.Addr(); ok {
		peer.Endpoint = net.UDPAddrFromAddrPort(at)
	}
	return k.ctl.ConfigureDevice(k.name, wgtypes.Config{Peers: []wgtypes.PeerConfig{peer}})
}

func (k *kernel) remove(key wgconfig.PublicKey) error {
	return k.ctl.ConfigureDevice(k.name, wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key.Bytes(), Remove: true}}})
}

func (k *kernel) peers() ([]wgconfig.Status, error) {
	dev, err := k.ctl.Device(k.name)
	if err != nil {
		return nil, err
	}
	clear(dev.PrivateKey[:])
	var out []wgconfig.Status
	for _, p := range dev.Peers {
		key, err := wgconfig.NewPublicKey(p.PublicKey[:])
		if err != nil {
			return nil, err
		}
		s := wgconfig.Status{Key: key, Received: uint64(p.ReceiveBytes), Sent: uint64(p.TransmitBytes)}
		if p.LastHandshakeTime.Unix() > 0 { // the kernel's never is 1970
			s.Handshake = p.LastHandshakeTime
		}
		if p.Endpoint != nil {
			s.Endpoint = p.Endpoint.AddrPort()
		}
		for _, a := range p.AllowedIPs {
			ip, _ := netip.AddrFromSlice(a.IP)
			bits, _ := a.Mask.Size()
			s.Allowed = append(s.Allowed, netip.PrefixFrom(ip.Unmap(), bits))
		}
		out = append(out, s)
	}
	return out, nil
}

func (k *kernel) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return k.out.DialContext(ctx, "tcp", to.String())
}

func (k *kernel) close() error {
	var errs []error
	if k.ctl != nil {
		errs = append(errs, k.ctl.Close())
	}
	errs = append(errs, removeLink(k.name))
	if k.end != nil {
		errs = append(errs, k.end())
	}
	return errors.Join(errs...)
}
