// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"

	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
)

var (
	network = netip.MustParsePrefix("100.96.0.0/11")
	own     = netip.MustParseAddr("100.96.0.1")
	alice   = netip.MustParseAddr("100.96.0.2")
	bob     = netip.MustParseAddr("100.96.0.3")
)

// freePort returns a UDP port that nobody has just now.
func freePort(t *testing.T) uint16 {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func open(t *testing.T, mode Mode) (*Tunnel, Config) {
	t.Helper()
	cfg := Config{Key: wgconfig.GeneratePrivateKey(), Listen: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t)),
		Address: own, Network: network, Mode: mode, Name: "dstack-gwtest"}
	if mode == Kernel {
		cfg.Listen = netip.AddrPortFrom(netip.IPv4Unspecified(), cfg.Listen.Port())
	}
	tn, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tn.Close(); err != nil {
			t.Error(err)
		}
	})
	if tn.Mode() != mode {
		t.Fatalf("mode %s", tn.Mode())
	}
	return tn, cfg
}

// instance is a guest: WireGuard and TCP in this process, which calls the gateway.
func instance(t *testing.T, gateway Config, addr netip.Addr, key wgconfig.PrivateKey) *netstack.Net {
	t.Helper()
	link, stack, err := netstack.CreateNetTUN([]netip.Addr{addr}, nil, MTU)
	if err != nil {
		t.Fatal(err)
	}
	dev := device.NewDevice(link, newBind(netip.MustParseAddr("127.0.0.1")), device.NewLogger(device.LogLevelSilent, ""))
	t.Cleanup(dev.Close)
	text, err := (&wgconfig.Interface{Key: key, Port: freePort(t), Address: addr, Peers: []wgconfig.Peer{{
		Key: gateway.Key.Public(), Address: gateway.Address, Keepalive: wgconfig.Keepalive,
		Endpoint: wgconfig.EndpointOf(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), gateway.Listen.Port())),
	}}}).UAPI()
	if err != nil {
		t.Fatal(err)
	}
	// What the instance sends elsewhere in the network goes to the gateway, too.
	text = append(text, "allowed_ip="+network.String()+"\n"...)
	if err := dev.IpcSetOperation(bytes.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	if err := dev.Up(); err != nil {
		t.Fatal(err)
	}
	return stack
}

// greet serves a port that says a word.
func greet(t *testing.T, l net.Listener, word string) {
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, word)
			c.Close()
		}
	}()
}

func read(ctx context.Context, tn *Tunnel, to netip.AddrPort) (string, error) {
	c, err := tn.Dial(ctx, to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

// isolated runs the test again as the only process of a network namespace, where it may
// make interfaces, and reports whether this is that process.
func isolated(t *testing.T) bool {
	t.Helper()
	if os.Getenv("DSTACK_TEST_NETNS") == t.Name() {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			t.Fatal(err)
		}
		return true
	}
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("not root: no network namespace to make interfaces in")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), "DSTACK_TEST_NETNS="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if bytes.Contains(out, []byte("--- SKIP")) {
		t.Skipf("%s", out)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
	return false
}

// traffic is what holds in every mode.
func traffic(t *testing.T, tn *Tunnel, cfg Config) {
	key := wgconfig.GeneratePrivateKey()
	guest := instance(t, cfg, alice, key)
	l, err := guest.ListenTCPAddrPort(netip.AddrPortFrom(alice, 8080))
	if err != nil {
		t.Fatal(err)
	}
	greet(t, l, "alice")
	target := netip.AddrPortFrom(alice, 8080)

	short, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if got, err := read(short, tn, target); fault.Code(err) != "tunnel_dial" {
		t.Fatalf("an instance that is no peer answered %q, %v", got, err)
	}
	if err := tn.Set(wgconfig.Peer{Key: key.Public(), Address: alice}); err != nil {
		t.Fatal(err)
	}
	// The instance calls first; until then nobody knows where it is.
	deadline := time.Now().Add(20 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		got, err := read(ctx, tn, target)
		cancel()
		if got == "alice" && err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%q, %v", got, err)
		}
	}
	peers, err := tn.Peers()
	if err != nil || len(peers) != 1 || peers[0].Key != key.Public() || peers[0].Handshake.IsZero() || len(peers[0].Allowed) != 1 || peers[0].Allowed[0].Addr() != alice {
		t.Fatalf("%+v, %v", peers, err)
	}
	if err := tn.Remove(key.Public()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if got, err := read(ctx, tn, target); err == nil {
		t.Fatalf("a removed peer answered %q", got)
	}
	if peers, err := tn.Peers(); err != nil || len(peers) != 0 {
		t.Fatalf("%v, %v", peers, err)
	}
}

// unreached reports that nothing answers an instance at the address.
func unreached(t *testing.T, from *netstack.Net, to netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	c, err := from.DialContextTCPAddrPort(ctx, to)
	if err == nil {
		c.Close()
		t.Errorf("an instance reaches %s", to)
	}
}

func TestNetstackCarriesConnections(t *testing.T) {
	t.Parallel()
	tn, cfg := open(t, Netstack)
	traffic(t, tn, cfg)
}

func TestTUNCarriesConnections(t *testing.T) {
	if !isolated(t) {
		return
	}
	tn, cfg := open(t, TUN)
	traffic(t, tn, cfg)
}

func TestKernelCarriesConnections(t *testing.T) {
	if !isolated(t) {
		return
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "probe"
	if err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs}); errors.Is(err, syscall.EOPNOTSUPP) {
		t.Skip("this kernel has no WireGuard")
	}
	tn, cfg := open(t, Kernel)
	traffic(t, tn, cfg)
}

// Threat K05: instances reach neither the gateway nor each other through the tunnel.
func TestThreat_K05_InstancesReachNobody(t *testing.T) {
	if !isolated(t) {
		return
	}
	for _, f := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/conf/all/forwarding"} {
		if err := os.WriteFile(f, []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	tn, cfg := open(t, TUN)
	a, b := wgconfig.GeneratePrivateKey(), wgconfig.GeneratePrivateKey()
	ga, gb := instance(t, cfg, alice, a), instance(t, cfg, bob, b)
	for _, p := range []wgconfig.Peer{{Key: a.Public(), Address: alice}, {Key: b.Public(), Address: bob}} {
		if err := tn.Set(p); err != nil {
			t.Fatal(err)
		}
	}
	for _, g := range []struct {
		stack *netstack.Net
		addr  netip.Addr
	}{{ga, alice}, {gb, bob}} {
		l, err := g.stack.ListenTCPAddrPort(netip.AddrPortFrom(g.addr, 80))
		if err != nil {
			t.Fatal(err)
		}
		greet(t, l, "instance")
	}
	admin, err := net.Listen("tcp", "0.0.0.0:8011")
	if err != nil {
		t.Fatal(err)
	}
	greet(t, admin, "admin")
	// Both are reached from here, so that what follows fails for the filter alone.
	for _, to := range []netip.Addr{alice, bob} {
		deadline := time.Now().Add(20 * time.Second)
		for {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			_, err := read(ctx, tn, netip.AddrPortFrom(to, 80))
			cancel()
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	unreached(t, ga, netip.AddrPortFrom(own, 8011))
	unreached(t, ga, netip.AddrPortFrom(bob, 80))
	// With the filter gone the same connections are made, so that the test can fail.
	if err := tn.back.(*user).end(); err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.AddrPort{netip.AddrPortFrom(bob, 80), netip.AddrPortFrom(own, 8011)} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		c, err := ga.DialContextTCPAddrPort(ctx, to)
		cancel()
		if err != nil {
			t.Fatalf("without the filter %s is not reached either: %v", to, err)
		}
		c.Close()
	}
	if tn.back.(*user).end, err = isolate(cfg.Name); err != nil {
		t.Fatal(err)
	}
}

// Threat K05: a stranger's handshake gets no answer.
func TestThreat_K05_StrangersHearNothing(t *testing.T) {
	tn, cfg := open(t, Netstack)
	if err := tn.Set(wgconfig.Peer{Key: wgconfig.GeneratePrivateKey().Public(), Address: alice}); err != nil {
		t.Fatal(err)
	}
	// A well-formed handshake of a key that is nobody's, and bytes that are nothing.
	stranger := wgconfig.GeneratePrivateKey().Bytes()
	out := make(chan []byte, 1)
	relay, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close()
	k, err := wgconfig.NewPrivateKey(stranger[:])
	if err != nil {
		t.Fatal(err)
	}
	via := cfg
	via.Listen = relay.LocalAddr().(*net.UDPAddr).AddrPort()
	g := instance(t, via, bob, k)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		g.DialContextTCPAddrPort(ctx, netip.AddrPortFrom(own, 1))
	}()
	go func() {
		b := make([]byte, 2048)
		relay.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, _, _ := relay.ReadFromUDPAddrPort(b)
		out <- b[:n]
	}()
	hello := <-out
	if len(hello) != device.MessageInitiationSize {
		t.Fatalf("a handshake of %d bytes", len(hello))
	}
	for name, packet := range map[string][]byte{"handshake": hello, "noise": bytes.Repeat([]byte{1}, 148), "short": {1}} {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(cfg.Listen))
		if err != nil {
			t.Fatal(err)
		}
		c.Write(packet)
		c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, err := c.Read(make([]byte, 2048)); err == nil {
			t.Errorf("%s: an answer of %d bytes", name, n)
		}
		c.Close()
	}
}

func TestRefusals(t *testing.T) {
	tn, cfg := open(t, Netstack)
	key := wgconfig.GeneratePrivateKey().Public()
	for name, c := range map[string]struct {
		peer wgconfig.Peer
		code string
	}{
		"the gateway's own address": {wgconfig.Peer{Key: key, Address: own}, "tunnel_address"},
		"an address outside":        {wgconfig.Peer{Key: key, Address: netip.MustParseAddr("10.0.0.1")}, "tunnel_address"},
		"the broadcast address":     {wgconfig.Peer{Key: key, Address: netip.MustParseAddr("100.127.255.255")}, "tunnel_address"},
		"no address":                {wgconfig.Peer{Key: key}, "tunnel_address"},
		"no key":                    {wgconfig.Peer{Address: alice}, "wg_key_own"},
		"the gateway's own key":     {wgconfig.Peer{Key: cfg.Key.Public(), Address: alice}, "wg_key_own"},
	} {
		if err := tn.Set(c.peer); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	for _, to := range []string{"127.0.0.1:80", "100.96.0.1:80", "10.0.0.1:80"} {
		if _, err := tn.Dial(t.Context(), netip.MustParseAddrPort(to)); fault.Code(err) != "tunnel_address" {
			t.Errorf("dial %s: %v", to, err)
		}
	}
	good := cfg
	good.Listen = netip.AddrPortFrom(good.Listen.Addr(), freePort(t))
	for name, c := range map[string]struct {
		edit func(*Config)
		code string
	}{
		"no key":              {func(c *Config) { c.Key = wgconfig.PrivateKey{} }, "tunnel_config"},
		"no port":             {func(c *Config) { c.Listen = netip.AddrPortFrom(c.Listen.Addr(), 0) }, "tunnel_config"},
		"address elsewhere":   {func(c *Config) { c.Address = netip.MustParseAddr("10.0.0.1") }, "tunnel_config"},
		"a long name":         {func(c *Config) { c.Name = "a-name-that-is-too-long" }, "tunnel_config"},
		"another mode":        {func(c *Config) { c.Mode = "vpn" }, "tunnel_config"},
		"a busy port":         {func(c *Config) { c.Listen = cfg.Listen }, "tunnel_port"},
		"kernel, one address": {func(c *Config) { c.Mode = Kernel }, "tunnel_unavailable"},
	} {
		bad := good
		c.edit(&bad)
		if tn, err := Open(t.Context(), bad); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
			if err == nil {
				tn.Close()
			}
		}
	}
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := tn.Set(wgconfig.Peer{Key: key, Address: alice}); fault.Code(err) != "tunnel_closed" {
		t.Errorf("closed: %v", err)
	}
}

func TestANewTunnelReplacesWhatWasLeftBehind(t *testing.T) {
	if !isolated(t) {
		return
	}
	left := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "dstack-gwtest"}, Mode: netlink.TUNTAP_MODE_TUN}
	if err := netlink.LinkAdd(left); err != nil {
		t.Fatal(err)
	}
	tn, _ := open(t, TUN)
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName("dstack-gwtest"); err == nil {
		t.Error("the interface is there still")
	}
	// What is not ours stays.
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "dstack-gwtest"}}); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Key: wgconfig.GeneratePrivateKey(), Listen: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t)),
		Address: own, Network: network, Mode: TUN, Name: "dstack-gwtest"}
	if tn, err := Open(t.Context(), cfg); fault.Code(err) != "tunnel_unavailable" {
		t.Errorf("a bridge was replaced: %v", err)
		if err == nil {
			tn.Close()
		}
	}
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
