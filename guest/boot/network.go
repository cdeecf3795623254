// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"

	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
)

// dhcpLimit bounds the wait for an address.
const dhcpLimit = 20 * time.Second

// resolvConf is what /etc/resolv.conf of the image links to.
const resolvConf = "/run/resolv.conf"

// lease is an address from whatever source.
type lease struct {
	address netip.Prefix
	gateway netip.Addr
	dns     []netip.Addr
	source  string
}

// bringUp raises loopback and the first physical interface and gives it the
// address of the host's blob, or else one from DHCP. All of it is the host's
// word and may be a lie: that costs the guest its connection and nothing else.
// Without any interface the guest has no network, which a VM may well choose.
func bringUp(ctx context.Context, sys string, want *hostshare.Network) (string, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return "", fault.Wrap(err, "network_failed", "find the loopback interface")
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return "", fault.Wrap(err, "network_failed", "raise the loopback interface")
	}
	name, err := physical(sys)
	if err != nil {
		return "", fault.Wrap(err, "network_failed", "list network interfaces")
	}
	if name == "" {
		return "no interface", writeResolv(nil)
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return "", fault.Wrap(err, "network_failed", "find interface %s", name)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return "", fault.Wrap(err, "network_failed", "raise interface %s", name)
	}
	var l lease
	if want != nil {
		l = lease{want.Address, want.Gateway, want.DNS, "static"}
	} else if l, err = dhcp(ctx, name); err != nil {
		return "", fault.Wrap(err, "network_no_address", "interface %s got no address by DHCP", name).
			WithFix("let the VMM put the address into .sys-config.json, or provide DHCP")
	}
	if err := configure(link, l); err != nil {
		return "", fault.Wrap(err, "network_failed", "configure interface %s", name)
	}
	return fmt.Sprintf("%s %s %s", name, l.source, l.address), writeResolv(l.dns)
}

// physical returns the first interface that belongs to a device.
func physical(sys string) (string, error) {
	entries, err := os.ReadDir(filepath.Join(sys, "class/net"))
	if err != nil {
		return "", err
	}
	var names []string
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join(sys, "class/net", e.Name(), "device")); err == nil {
			names = append(names, e.Name())
		}
	}
	if len(names) == 0 {
		return "", nil
	}
	return slices.Min(names), nil
}

func configure(link netlink.Link, l lease) error {
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP: l.address.Addr().AsSlice(), Mask: net.CIDRMask(l.address.Bits(), l.address.Addr().BitLen()),
	}}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("add address %s: %w", l.address, err)
	}
	if !l.gateway.IsValid() {
		return nil
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: l.gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("add the default route by %s: %w", l.gateway, err)
	}
	return nil
}

// dhcp asks for a lease. Its client uses a packet socket, below the firewall,
// which stays closed.
func dhcp(ctx context.Context, name string) (lease, error) {
	ctx, cancel := context.WithTimeout(ctx, dhcpLimit)
	defer cancel()
	client, err := nclient4.New(name, nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(5))
	if err != nil {
		return lease{}, err
	}
	defer client.Close()
	got, err := client.Request(ctx)
	if err != nil {
		return lease{}, err
	}
	ack := got.ACK
	ip, ok := netip.AddrFromSlice(ack.YourIPAddr.To4())
	if !ok || !ip.IsGlobalUnicast() {
		return lease{}, fmt.Errorf("the server offers the address %s", ack.YourIPAddr)
	}
	ones, bits := ack.SubnetMask().Size()
	if bits != 32 || ones == 0 {
		return lease{}, fmt.Errorf("the server offers the mask %s", ack.SubnetMask())
	}
	l := lease{address: netip.PrefixFrom(ip, ones), source: "dhcp"}
	for _, r := range ack.Router() {
		if gw, ok := netip.AddrFromSlice(r.To4()); ok && l.address.Contains(gw) {
			l.gateway = gw
			break
		}
	}
	for _, d := range ack.DNS() {
		if a, ok := netip.AddrFromSlice(d.To4()); ok && a.IsGlobalUnicast() && len(l.dns) < 3 {
			l.dns = append(l.dns, a)
		}
	}
	return l, nil
}

func writeResolv(dns []netip.Addr) error {
	var b strings.Builder
	for _, a := range dns {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	return os.WriteFile(resolvConf, []byte(b.String()), 0o644)
}
