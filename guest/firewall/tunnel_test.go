// SPDX-License-Identifier: Apache-2.0

package firewall

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/dstack-go/dstack/internal/testkit/netlab"
)

const (
	tunnelGuest, tunnelGateway, tunnelStranger = "100.96.0.9", "100.96.0.1", "100.96.0.2"
	elsewhereV4                                = "192.0.2.3"
	wgPort, tlsPort                            = 9182, 8091
)

// dialFrom is dial from a source address. A refusal means that the packet came through.
func dialFrom(t *testing.T, ns netns.NsHandle, source, host string, port int) (ok bool) {
	t.Helper()
	in(t, ns, func() error {
		d := net.Dialer{Timeout: 250 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		c, err := d.DialContext(context.Background(), "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			c.Close()
		}
		ok = err == nil || errors.Is(err, syscall.ECONNREFUSED)
		return nil
	})
	return ok
}

// Threat K05: over the tunnel comes what the policy lists, from gateways alone; where the
// agent ends TLS nobody comes another way; and WireGuard itself hears gateways alone.
func TestThreat_K05_TheTunnelIsForGateways(t *testing.T) {
	l := newLab(t)
	gateway := netlab.New(t)
	in(t, l.guest, func() error {
		v := netlink.NewLinkAttrs()
		v.Name = "dstack-wg0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: v, PeerName: "wg", PeerNamespace: netlink.NsFd(gateway)}); err != nil {
			return err
		}
		return netlab.Up("dstack-wg0", tunnelGuest+"/24")
	})
	in(t, gateway, func() error { return netlab.Up("wg", tunnelGateway+"/24", tunnelStranger+"/24") })
	in(t, l.outside, func() error { return netlab.Up("far", elsewhereV4+"/24") })
	l.engineRules(t)
	serve(t, l.container, insidePort)
	for _, port := range []int{80, 81, AgentPort, tlsPort} {
		serve(t, l.guest, port)
	}
	var heard net.PacketConn
	in(t, l.guest, func() (err error) {
		heard, err = net.ListenPacket("udp4", ":"+strconv.Itoa(wgPort))
		return err
	})
	defer heard.Close()
	// hears reports whether a datagram of a source reaches WireGuard's port.
	hears := func(ns netns.NsHandle, source, host string) bool {
		in(t, ns, func() error {
			c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(source)}, &net.UDPAddr{IP: net.ParseIP(host), Port: wgPort})
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("x"))
			return err
		})
		heard.SetReadDeadline(time.Now().Add(250 * time.Millisecond))
		_, _, err := heard.ReadFrom(make([]byte, 8))
		return err == nil
	}
	tunnel := &Tunnel{Interface: "dstack-wg0", Port: wgPort, TLSPort: tlsPort,
		Gateways: []netip.Addr{netip.MustParseAddr(tunnelGateway)}, Endpoints: []netip.AddrPort{netip.MustParseAddrPort(outsideV4 + ":51820")}}
	for name, p := range map[string]Policy{"listed ports": {Ports: []uint16{80, publishedPort}, Tunnel: tunnel}, "any port": {AnyPort: true, Tunnel: tunnel}} {
		if err := Open(p, guestConn(l)); err != nil {
			t.Fatal(err)
		}
		for _, a := range []struct {
			what         string
			from         netns.NsHandle
			source, host string
			port         int
			want         bool
		}{
			{"a gateway to a listed port", gateway, tunnelGateway, tunnelGuest, 80, true},
			{"a gateway to the agent", gateway, tunnelGateway, tunnelGuest, AgentPort, true},
			{"a gateway to where TLS ends", gateway, tunnelGateway, tunnelGuest, tlsPort, true},
			{"a gateway to another port", gateway, tunnelGateway, tunnelGuest, 81, p.AnyPort},
			{"another in the tunnel to a listed port", gateway, tunnelStranger, tunnelGuest, 80, false},
			{"another in the tunnel to the agent", gateway, tunnelStranger, tunnelGuest, AgentPort, false},
			{"another in the tunnel to where TLS ends", gateway, tunnelStranger, tunnelGuest, tlsPort, false},
			{"a gateway to a published port", gateway, tunnelGateway, tunnelGuest, publishedPort, true},
			{"a gateway to a published port that is not listed", gateway, tunnelGateway, tunnelGuest, strayPort, p.AnyPort},
			{"another in the tunnel to a published port", gateway, tunnelStranger, tunnelGuest, publishedPort, false},
			{"outside to a published port", l.outside, outsideV4, guestV4, publishedPort, true},
			{"outside to a listed port", l.outside, outsideV4, guestV4, 80, true},
			{"outside to where TLS ends", l.outside, outsideV4, guestV4, tlsPort, false},
		} {
			if got := dialFrom(t, a.from, a.source, a.host, a.port); got != a.want {
				t.Errorf("%s: %s: comes through: %v, want %v", name, a.what, got, a.want)
			}
		}
		if !hears(l.outside, outsideV4, guestV4) {
			t.Errorf("%s: WireGuard does not hear its gateway", name)
		}
		if hears(l.outside, elsewhereV4, guestV4) {
			t.Errorf("%s: WireGuard hears a stranger", name)
		}
		if hears(gateway, tunnelGateway, tunnelGuest) {
			t.Errorf("%s: a datagram comes over the tunnel", name)
		}
	}
	// Without a tunnel those are ports like others.
	if err := Open(Policy{AnyPort: true}, guestConn(l)); err != nil {
		t.Fatal(err)
	}
	if !dialFrom(t, l.outside, outsideV4, guestV4, tlsPort) || !hears(l.outside, elsewhereV4, guestV4) {
		t.Error("the rules of the tunnel stay without it")
	}
}

// A container that publishes the port where TLS ends, or the agent's, takes neither from
// the agent: plaintext would be its own, and so would evidence.
func TestThreat_C05_NoContainerTakesThePortWhereTLSEnds(t *testing.T) {
	l := newLab(t)
	gateway := netlab.New(t)
	in(t, l.guest, func() error {
		v := netlink.NewLinkAttrs()
		v.Name = "dstack-wg0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: v, PeerName: "wg", PeerNamespace: netlink.NsFd(gateway)}); err != nil {
			return err
		}
		return netlab.Up("dstack-wg0", tunnelGuest+"/24")
	})
	in(t, gateway, func() error { return netlab.Up("wg", tunnelGateway+"/24") })
	l.engineRules(t, tlsPort, AgentPort)
	answers := func(ns netns.NsHandle, port int, text string) {
		in(t, ns, func() error {
			l, err := net.Listen("tcp4", ":"+strconv.Itoa(port))
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					io.WriteString(c, text)
					c.Close()
				}
			}()
			return nil
		})
	}
	answers(l.container, insidePort, "container")
	for _, port := range []int{tlsPort, AgentPort} {
		answers(l.guest, port, "agent")
	}
	tunnel := &Tunnel{Interface: "dstack-wg0", Port: wgPort, TLSPort: tlsPort, Gateways: []netip.Addr{netip.MustParseAddr(tunnelGateway)}}
	for name, p := range map[string]Policy{"listed ports": {Ports: []uint16{publishedPort, tlsPort}, Tunnel: tunnel}, "any port": {AnyPort: true, Tunnel: tunnel}} {
		if err := Open(p, guestConn(l)); err != nil {
			t.Fatal(err)
		}
		for port, want := range map[int]string{tlsPort: "agent", AgentPort: "agent", publishedPort: "container"} {
			var got []byte
			in(t, gateway, func() error {
				c, err := net.DialTimeout("tcp", net.JoinHostPort(tunnelGuest, strconv.Itoa(port)), 2*time.Second)
				if err != nil {
					return err
				}
				defer c.Close()
				got, err = io.ReadAll(c)
				return err
			})
			if string(got) != want {
				t.Errorf("%s: port %d is answered by %q, want the %s", name, port, got, want)
			}
		}
	}
}
