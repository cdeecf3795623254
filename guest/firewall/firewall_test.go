// SPDX-License-Identifier: Apache-2.0

package firewall

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/testkit/netlab"
)

// A lab is three network namespaces: outside -- veth -- guest -- bridge -- veth --
// container, with addresses of both families, like a guest that runs a container.
type lab struct {
	outside, guest, container netns.NsHandle
}

const (
	outsideV4, guestV4        = "192.0.2.1", "192.0.2.2"
	outsideV6, guestV6        = "2001:db8::1", "2001:db8::2"
	bridgeV4, containerV4     = "198.51.100.1", "198.51.100.2"
	bridgeV6, containerV6     = "2001:db8:1::1", "2001:db8:1::2"
	publishedPort, insidePort = 8080, 80
	// A port published by the engine but not in the measured policy.
	strayPort = 8081
)

// in runs f in the namespace.
func in(t *testing.T, ns netns.NsHandle, f func() error) {
	t.Helper()
	if err := netlab.In(ns, f); err != nil {
		t.Fatal(err)
	}
}

func route(dst, via string) error {
	_, n, err := net.ParseCIDR(dst)
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{Dst: n, Gw: net.ParseIP(via)})
}

func sysctl(path, value string) error {
	return os.WriteFile("/proc/sys/"+path, []byte(value), 0o644)
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{outside: netlab.New(t), guest: netlab.New(t), container: netlab.New(t)}
	in(t, l.guest, func() error {
		v := netlink.NewLinkAttrs()
		v.Name = "eth0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: v, PeerName: "far", PeerNamespace: netlink.NsFd(l.outside)}); err != nil {
			return fmt.Errorf("veth: %w", err)
		}
		b := netlink.NewLinkAttrs()
		b.Name = "br-app"
		bridge := &netlink.Bridge{LinkAttrs: b}
		if err := netlink.LinkAdd(bridge); err != nil {
			return fmt.Errorf("bridge: %w", err)
		}
		c := netlink.NewLinkAttrs()
		c.Name = "c0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: c, PeerName: "eth0", PeerNamespace: netlink.NsFd(l.container)}); err != nil {
			return err
		}
		c0, err := netlink.LinkByName("c0")
		if err != nil {
			return err
		}
		br, err := netlink.LinkByName("br-app")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMaster(c0, br.(*netlink.Bridge)); err != nil {
			return err
		}
		return errors.Join(netlab.Up("c0"),
			netlab.Up("eth0", guestV4+"/24", guestV6+"/64"),
			netlab.Up("br-app", bridgeV4+"/24", bridgeV6+"/64"))
	})
	in(t, l.outside, func() error {
		return errors.Join(netlab.Up("far", outsideV4+"/24", outsideV6+"/64"),
			route("198.51.100.0/24", guestV4), route("2001:db8:1::/64", guestV6))
	})
	in(t, l.container, func() error {
		return errors.Join(netlab.Up("eth0", containerV4+"/24", containerV6+"/64"),
			route("0.0.0.0/0", bridgeV4), route("::/0", bridgeV6))
	})
	in(t, l.guest, func() error {
		// The namespace's own /proc/sys/net follows the thread.
		return errors.Join(sysctl("net/ipv4/ip_forward", "1"), sysctl("net/ipv6/conf/all/forwarding", "1"))
	})
	return l
}

// engineRules adds what a container engine would: destination NAT of the two
// published ports and more, and a forward chain that accepts everything.
func (l *lab) engineRules(t *testing.T, more ...uint16) {
	t.Helper()
	conn, err := nftables.New(nftables.WithNetNSFd(int(l.guest)))
	if err != nil {
		t.Fatal(err)
	}
	accept := nftables.ChainPolicyAccept
	table := conn.AddTable(&nftables.Table{Name: "engine", Family: nftables.TableFamilyINet})
	nat := conn.AddChain(&nftables.Chain{Name: "prerouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest, Policy: &accept})
	forward := conn.AddChain(&nftables.Chain{Name: "forward", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &accept})
	conn.AddRule(&nftables.Rule{Table: table, Chain: forward, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
	for _, port := range append([]uint16{publishedPort, strayPort}, more...) {
		for family, to := range map[byte]net.IP{
			unix.NFPROTO_IPV4: net.ParseIP(containerV4).To4(), unix.NFPROTO_IPV6: net.ParseIP(containerV6).To16(),
		} {
			conn.AddRule(&nftables.Rule{Table: table, Chain: nat, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
				// fib daddr type local, as the engine's own rules have it.
				&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: native32(unix.RTN_LOCAL)},
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
				&expr.Immediate{Register: 1, Data: to},
				&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(insidePort)},
				&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(family), RegAddrMin: 1, RegProtoMin: 2},
			}})
		}
	}
	if err := conn.Flush(); err != nil {
		t.Fatalf("engine rules: %v", err)
	}
}

// serve listens in the namespace until the test ends.
func serve(t *testing.T, ns netns.NsHandle, port int) {
	t.Helper()
	in(t, ns, func() error {
		l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
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
				c.Close()
			}
		}()
		return nil
	})
}

// dial reports whether a connection from the namespace comes about. A refusal is
// a failure of the test: it means that the packet came through.
func dial(t *testing.T, ns netns.NsHandle, host string, port int) bool {
	t.Helper()
	var ok bool
	in(t, ns, func() error {
		d := net.Dialer{Timeout: 250 * time.Millisecond}
		c, err := d.DialContext(context.Background(), "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("%s:%d refused: the packet reached a closed port", host, port)
		}
		if err == nil {
			ok = true
			c.Close()
		}
		return nil
	})
	return ok
}

func guestConn(l *lab) nftables.ConnOption { return nftables.WithNetNSFd(int(l.guest)) }

type attempt struct {
	name string
	from netns.NsHandle
	host string
	port int
	want bool
}

func check(t *testing.T, attempts []attempt) {
	t.Helper()
	for _, a := range attempts {
		got := dial(t, a.from, a.host, a.port)
		// Fresh IPv6 links stay silent until duplicate address detection is over.
		for deadline := time.Now().Add(5 * time.Second); a.want && !got && time.Now().Before(deadline); {
			got = dial(t, a.from, a.host, a.port)
		}
		if got != a.want {
			t.Errorf("%s: connected = %v, want %v", a.name, got, a.want)
		}
	}
}

func TestClosedAcceptsNothingFromOutsideAndOpenJustThePolicy(t *testing.T) {
	l := newLab(t)
	for _, port := range []int{AgentPort, 22, publishedPort} {
		serve(t, l.guest, port)
	}
	serve(t, l.container, insidePort)
	serve(t, l.container, publishedPort)
	serve(t, l.outside, 443)
	check(t, []attempt{{"without a firewall the lab connects", l.outside, guestV4, 22, true}})

	if err := Closed(guestConn(l)); err != nil {
		t.Fatal(err)
	}
	// Before the engine runs nothing is translated; 8080 is the guest's own.
	var closed []attempt
	for _, host := range []string{guestV4, guestV6} {
		for _, port := range []int{AgentPort, 22, publishedPort} {
			closed = append(closed, attempt{fmt.Sprintf("closed: outside to %s:%d", host, port), l.outside, host, port, false})
		}
	}
	closed = append(closed,
		attempt{"closed: outside routes to a container", l.outside, containerV4, insidePort, false},
		attempt{"closed: a container reaches out", l.container, outsideV4, 443, false},
		attempt{"closed: the guest reaches out", l.guest, outsideV4, 443, false},
		attempt{"closed: the guest reaches out over IPv6", l.guest, outsideV6, 443, false},
		attempt{"closed: loopback works", l.guest, "127.0.0.1", 22, true},
	)
	check(t, closed)

	l.engineRules(t)
	check(t, []attempt{
		{"closed: the engine's own rules open nothing", l.outside, guestV4, publishedPort, false},
		{"closed: nor over IPv6", l.outside, guestV6, publishedPort, false},
	})

	if err := Open(Policy{Ports: []uint16{publishedPort}}, guestConn(l)); err != nil {
		t.Fatal(err)
	}
	for _, f := range []struct{ guest, container, outside, name string }{
		{guestV4, containerV4, outsideV4, "IPv4"}, {guestV6, containerV6, outsideV6, "IPv6"},
	} {
		check(t, []attempt{
			{"open: agent, " + f.name, l.outside, f.guest, AgentPort, true},
			{"open: published port of the policy, " + f.name, l.outside, f.guest, publishedPort, true},
			{"open: published port outside the policy, " + f.name, l.outside, f.guest, strayPort, false},
			{"open: a port of the guest outside the policy, " + f.name, l.outside, f.guest, 22, false},
			{"open: routing past the published port, " + f.name, l.outside, f.container, insidePort, false},
			{"open: routing to a container by a port of the policy, " + f.name, l.outside, f.container, publishedPort, false},
			{"open: container egress, " + f.name, l.container, f.outside, 443, true},
		})
	}
}

func TestOpenWithoutPolicyAdmitsWhatIsPublished(t *testing.T) {
	l := newLab(t)
	serve(t, l.guest, 22)
	serve(t, l.container, insidePort)
	l.engineRules(t)
	if err := Open(Policy{AnyPort: true}, guestConn(l)); err != nil {
		t.Fatal(err)
	}
	check(t, []attempt{
		{"a published port", l.outside, guestV4, publishedPort, true},
		{"another published port", l.outside, guestV6, strayPort, true},
		{"a port of the guest (network_mode: host)", l.outside, guestV4, 22, true},
		{"a container's port that is not published", l.outside, containerV4, insidePort, false},
	})
}

func TestZeroPolicyOpensTheAgentOnly(t *testing.T) {
	l := newLab(t)
	serve(t, l.guest, AgentPort)
	serve(t, l.guest, 22)
	if err := Open(Policy{}, guestConn(l)); err != nil {
		t.Fatal(err)
	}
	check(t, []attempt{
		{"agent", l.outside, guestV4, AgentPort, true},
		{"anything else", l.outside, guestV4, 22, false},
	})
}

func TestClosedAgainShutsWhatWasOpen(t *testing.T) {
	l := newLab(t)
	serve(t, l.guest, AgentPort)
	for i := range 2 {
		if err := Open(Policy{}, guestConn(l)); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		check(t, []attempt{{"open", l.outside, guestV4, AgentPort, true}})
		if err := Closed(guestConn(l)); err != nil {
			t.Fatal(err)
		}
		check(t, []attempt{{"closed", l.outside, guestV4, AgentPort, false}})
	}
}

// While the boot asks for time and keys, it may ask and cannot be asked (threats.md
// K05).
func TestThreat_K05_OutboundAsksAndIsNotAsked(t *testing.T) {
	l := newLab(t)
	serve(t, l.guest, AgentPort)
	serve(t, l.guest, 22)
	serve(t, l.container, insidePort)
	serve(t, l.outside, 443)
	l.engineRules(t)
	if err := Outbound(guestConn(l)); err != nil {
		t.Fatal(err)
	}
	check(t, []attempt{
		{"the guest reaches out", l.guest, outsideV4, 443, true},
		{"the guest reaches out over IPv6", l.guest, outsideV6, 443, true},
		{"outside reaches the agent", l.outside, guestV4, AgentPort, false},
		{"outside reaches the agent over IPv6", l.outside, guestV6, AgentPort, false},
		{"outside reaches another port", l.outside, guestV4, 22, false},
		{"outside reaches a published port", l.outside, guestV4, publishedPort, false},
		{"a container reaches out", l.container, outsideV4, 443, false},
	})
}
