// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"net"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables/expr"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "dial":
		os.Exit(dialRole())
	case "serve":
		os.Exit(serveRole())
	}
	goleak.VerifyTestMain(m)
}

func TestParseAllow(t *testing.T) {
	for _, text := range []string{"127.0.0.1:8000/tcp", "192.0.2.7:51820/udp", "[::1]:8000/tcp", "10.1.0.0/16", "fd00:1::/32", "192.0.2.1/32"} {
		a, err := ParseAllow(text)
		if err != nil || a.String() != text {
			t.Errorf("%s: %v, %v", text, a, err)
		}
	}
	for _, text := range []string{
		"", "/", "127.0.0.1", "127.0.0.1:8000", "127.0.0.1:0/tcp", "127.0.0.1:65536/tcp", "127.0.0.1:8000/sctp", "127.0.0.1:8000/TCP",
		"localhost:8000/tcp", ":8000/tcp", "0.0.0.0:8000/tcp", "[::]:8000/udp", "[::ffff:127.0.0.1]:1/tcp", "[fe80::1%eth0]:1/tcp",
		"10.1.0.1/16", "0.0.0.0/0", "::/0", "10.0.0.0/33", "10.0.0.0/-1", "::ffff:10.0.0.0/104", "10.1.0.0/16/tcp", "127.0.0.1:8000/tcp/tcp",
	} {
		if a, err := ParseAllow(text); err == nil || a != (Allow{}) {
			t.Errorf("%q was taken as %v", text, a)
		}
	}
}

func FuzzParseAllow(f *testing.F) {
	for _, s := range []string{"127.0.0.1:8000/tcp", "[::1]:1/udp", "10.0.0.0/8", "fd00::/8", "1.2.3.4:5/tcp/6", "%"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAllow(s)
		if err != nil {
			return
		}
		if !a.Net.IsValid() || a.Net.Bits() == 0 || a.Port != 0 && !a.Net.IsSingleIP() {
			t.Fatalf("%q gives %+v", s, a)
		}
		if again, err := ParseAllow(a.String()); err != nil || again != a {
			t.Fatalf("%q gives %v, which reads as %v, %v", s, a, again, err)
		}
	})
}

func TestOwnCgroup(t *testing.T) {
	const hybrid = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
	const pure = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
	const part = "30 23 0:26 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
	for _, c := range []struct {
		name, mounts, cgroup string
		self, mount          place
	}{
		{"hybrid, in the root", hybrid, "9:name=systemd:/x\n0::/\n", place{"/sys/fs/cgroup/unified", 0}, place{"/sys/fs/cgroup/unified", 0}},
		{"a service", pure, "0::/system.slice/vmm.service\n", place{"/sys/fs/cgroup/system.slice/vmm.service", 2}, place{"/sys/fs/cgroup", 0}},
		{"a container sees its part", part, "0::/docker/ab/c\n", place{"/sys/fs/cgroup/c", 3}, place{"/sys/fs/cgroup", 2}},
		{"a mount point with a space", "1 1 0:1 / /mnt/a\\040b rw - cgroup2 c rw\n", "0::/x\n", place{"/mnt/a b/x", 1}, place{"/mnt/a b", 0}},
		{"the second mount shows it", part + pure, "0::/user.slice\n", place{"/sys/fs/cgroup/user.slice", 1}, place{"/sys/fs/cgroup", 0}},
	} {
		self, mount, err := own([]byte(c.mounts), []byte(c.cgroup))
		if err != nil || self != c.self || mount != c.mount {
			t.Errorf("%s: %v %v %v", c.name, self, mount, err)
		}
	}
	for name, c := range map[string][2]string{
		"no cgroup2":              {"40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw\n", "0::/\n"},
		"version 1 alone":         {pure, "4:memory:/x\n"},
		"outside of what it sees": {pure, "0::/../x\n"},
		"another's part":          {part, "0::/docker/abc\n"},
		"a line cut short":        {"41 31 0:38 / - cgroup2\n41 - cgroup2\n-\n", "0::/\n"},
	} {
		if self, _, err := own([]byte(c[0]), []byte(c[1])); err == nil {
			t.Errorf("%s: %v", name, self)
		}
	}
}

func TestNameServersAndAttachedNetworks(t *testing.T) {
	names, err := nameServers(strings.NewReader("# x\nsearch a b\nnameserver 127.0.0.53\n nameserver\t fe80::1%eth0 \nnameserver nonsense\nnameserver\noptions edns0\n"))
	want := []netip.Addr{netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("fe80::1")}
	if err != nil || !slices.Equal(names, want) {
		t.Errorf("%v, %v", names, err)
	}
	cidr := func(s string) net.Addr {
		ip, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		n.IP = ip
		return n
	}
	got := attached([]net.Addr{cidr("203.0.113.9/24"), cidr("203.0.113.8/24"), cidr("198.51.100.1/32"), cidr("8.0.0.1/1"), cidr("2001:db8::2/64"), cidr("2001:db8::2/3"), cidr("2001:db8::2/128")})
	if !slices.Equal(got, prefixes("203.0.113.0/24", "2001:db8::/64")) {
		t.Errorf("%v", got)
	}
}

// What is refused comes after what is allowed and before the last rule, which lets pass.
func TestRulesInTheirOrder(t *testing.T) {
	a, _ := ParseAllow("127.0.0.1:8000/tcp")
	n, _ := ParseAllow("10.1.0.0/16")
	empty := rules{}.count()
	r := rules{bases: []base{{place{"/x", 3}, 77}}, allow: []Allow{a, n}, names: []netip.Addr{netip.MustParseAddr("127.0.0.53")}, attached: prefixes("203.0.113.0/24")}
	c := r.chains()
	if got := r.count(); got != empty+1+2+2+1 {
		t.Errorf("%d rules, %d for nothing", got, empty)
	}
	guests := c[chainGuests]
	if !reflect.DeepEqual(guests[0], rule(isReply(), accept())) || !reflect.DeepEqual(guests[len(guests)-1], accept()) ||
		!reflect.DeepEqual(guests[2], rule(toNet(n.Net), accept())) || !reflect.DeepEqual(guests[1], rule(toNet(a.Net), toPort(6, 8000), accept())) {
		t.Errorf("%v", guests)
	}
	if !reflect.DeepEqual(c[chainOutput], [][]expr.Any{rule(inCgroup(r.bases[0]), to(expr.VerdictGoto, chainGuests))}) {
		t.Errorf("%v", c[chainOutput])
	}
	if r.equal(rules{bases: r.bases}) || !r.equal(r) {
		t.Error("equality")
	}
}

func TestOpenNeedsRoot(t *testing.T) {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: this thread alone is another user, and ends
		if os.Geteuid() == 0 {
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
				done <- errno
				return
			}
		}
		_, err := Open(Config{Dir: t.TempDir()})
		done <- err
	}()
	if err := <-done; fault.Code(err) != Code || !strings.Contains(err.Error(), "not root") || fault.Fix(err) == "" {
		t.Error(err)
	}
}
