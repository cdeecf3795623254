// SPDX-License-Identifier: Apache-2.0

package initrpc

import (
	"net/netip"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

// Threat K01: what the agent says of gateways are keys and addresses, each once.
func TestThreat_K01_ChangesOfTheTunnelAreTyped(t *testing.T) {
	peer := func(n byte) TunnelPeer {
		return TunnelPeer{Key: append(make([]byte, 31), n), Address: netip.AddrFrom4([4]byte{100, 96, 0, n}), Endpoint: netip.MustParseAddrPort("192.0.2.1:51820")}
	}
	good := TunnelChange{Set: true, Addresses: []netip.Addr{netip.MustParseAddr("100.96.0.9")}, Peers: []TunnelPeer{peer(1), peer(2)}}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*TunnelChange){
		"a short key":              func(c *TunnelChange) { c.Peers[0].Key = c.Peers[0].Key[:31] },
		"a key twice":              func(c *TunnelChange) { c.Peers[1].Key = c.Peers[0].Key },
		"an address twice":         func(c *TunnelChange) { c.Peers[1].Address = c.Peers[0].Address },
		"the guest's own address":  func(c *TunnelChange) { c.Peers[1].Address = c.Addresses[0] },
		"own addresses twice":      func(c *TunnelChange) { c.Addresses = append(c.Addresses, c.Addresses[0]) },
		"loopback":                 func(c *TunnelChange) { c.Addresses[0] = netip.MustParseAddr("127.0.0.1") },
		"multicast":                func(c *TunnelChange) { c.Peers[0].Address = netip.MustParseAddr("224.0.0.1") },
		"link-local":               func(c *TunnelChange) { c.Peers[0].Address = netip.MustParseAddr("169.254.169.254") },
		"IPv6":                     func(c *TunnelChange) { c.Peers[0].Address = netip.MustParseAddr("2001:db8::1") },
		"no address":               func(c *TunnelChange) { c.Peers[0].Address = netip.Addr{} },
		"no endpoint":              func(c *TunnelChange) { c.Peers[0].Endpoint = netip.AddrPort{} },
		"an endpoint without port": func(c *TunnelChange) { c.Peers[0].Endpoint = netip.MustParseAddrPort("192.0.2.1:0") },
		"nobody's endpoint":        func(c *TunnelChange) { c.Peers[0].Endpoint = netip.MustParseAddrPort("0.0.0.0:1") },
		"many peers": func(c *TunnelChange) {
			for n := byte(20); len(c.Peers) <= MaxPeers; n++ {
				c.Peers = append(c.Peers, peer(n))
			}
		},
	} {
		c := TunnelChange{Set: true, Addresses: append([]netip.Addr{}, good.Addresses...), Peers: append([]TunnelPeer{}, good.Peers...)}
		edit(&c)
		if err := c.Check(); fault.Code(err) != "tunnel_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
