// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/dstack-go/dstack/internal/testkit/netlab"
)

// roleEnv makes the test binary play QEMU: it dials what its arguments name, or serves.
const roleEnv = "DSTACK_EGRESS_TEST_ROLE"

// patience is when a dial counts as one that nobody refused.
const patience = 2 * time.Second

// outcome of a dial.
type outcome struct {
	Reached bool
	Refused bool // at once
	Text    string
}

// dial reaches for network!address. UDP reaches whom an answer comes from.
func dial(target string) (o outcome) {
	network, addr, _ := strings.Cut(target, "!")
	began := time.Now()
	c, err := net.DialTimeout(network, addr, patience)
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if _, err = c.Write([]byte("x")); err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
	}
	took := time.Since(began)
	return outcome{err == nil, err != nil && took < patience/2, fmt.Sprint(err, " after ", took)}
}

func dialRole() int {
	out := map[string]outcome{}
	for _, target := range os.Args[1:] {
		out[target] = dial(target)
	}
	json.NewEncoder(os.Stdout).Encode(out)
	return 0
}

// serveRole echoes on an address until its standard input ends.
func serveRole() int {
	stop, err := serve(os.Args[1])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer stop()
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// serve echoes one byte by TCP and UDP.
func serve(addr string) (stop func(), err error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	p, err := net.ListenPacket("udp", addr)
	if err != nil {
		l.Close()
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(10 * time.Second))
				b := make([]byte, 1)
				if _, err := io.ReadFull(c, b); err == nil {
					c.Write(b)
				}
			}()
		}
	}()
	go func() {
		b := make([]byte, 16)
		for {
			n, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			p.WriteTo(b[:n], from)
		}
	}()
	return func() { l.Close(); p.Close() }, nil
}

// lab is a machine with VMs, and beyond its one cable everything else: a neighbour, a
// metadata service, the internet.
type lab struct {
	t             *testing.T
	machine, rest netns.NsHandle
	resolv        string
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func route(via string) error {
	return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(via)})
}

func newLab(t *testing.T) *lab {
	t.Helper()
	if _, _, err := here(); err != nil {
		t.Skip("SKIP: no cgroup2 on this machine: ", err)
	}
	l := &lab{t: t, resolv: filepath.Join(t.TempDir(), "resolv.conf")}
	l.machine, l.rest = netlab.New(t), netlab.New(t)
	l.names("10.9.0.2")
	l.must(netlab.In(l.machine, func() error {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "lan0", PeerNamespace: netlink.NsFd(int(l.rest))}
		return errors.Join(netlink.LinkAdd(v), netlab.Up("lo"), netlab.Up("eth0", "10.9.0.1/24", "203.0.113.1/24", "198.51.100.99/32", "fd09::1/64"))
	}))
	l.must(netlab.In(l.rest, func() error {
		return errors.Join(netlab.Up("lan0", "10.9.0.2/24", "203.0.113.2/24", "fd09::2/64"),
			netlab.Up("lo", "169.254.169.254/32", "198.51.100.7/32", "192.168.77.1/32", "168.63.129.16/32", "2001:db8:7::7/128"))
	}))
	l.must(netlab.In(l.machine, func() error { return errors.Join(route("10.9.0.2"), route("fd09::2")) }))
	for port, ns := range map[string]netns.NsHandle{":53": l.rest, ":80": l.rest, ":8000": l.machine, ":8001": l.machine,
		// UDP answers from the address that was asked only where it listens on that.
		"198.51.100.7:81": l.rest, "[2001:db8:7::7]:81": l.rest, "169.254.169.254:81": l.rest} {
		var stop func()
		l.must(netlab.In(ns, func() (err error) { stop, err = serve(port); return err }))
		t.Cleanup(stop)
	}
	// The first packets to a neighbour of IPv6 may find the link not ready yet.
	l.must(netlab.In(l.machine, func() (err error) {
		for range 10 {
			if o := dial(far[2]); o.Reached {
				return nil
			} else {
				err = errors.New(o.Text)
			}
		}
		return err
	}))
	return l
}

func (l *lab) names(addr string) {
	l.t.Helper()
	l.must(os.WriteFile(l.resolv, []byte("nameserver "+addr+"\n"), 0o600))
}

// filter opens one; what is left of it goes with the test.
func (l *lab) filter(dir string, allow ...string) *Filter {
	l.t.Helper()
	c := Config{Dir: dir, resolvConf: l.resolv}
	for _, text := range allow {
		a, err := ParseAllow(text)
		l.must(err)
		c.Allow = append(c.Allow, a)
	}
	var f *Filter
	l.must(netlab.In(l.machine, func() (err error) { f, err = Open(c); return err }))
	l.t.Cleanup(func() {
		if err := netlab.In(l.machine, func() error { return Remove(dir) }); err != nil {
			l.t.Error(err)
		}
		if _, err := os.Stat(f.bases[0].dir); !os.IsNotExist(err) {
			l.t.Errorf("%s is left: %v", f.bases[0].dir, err)
		}
	})
	return f
}

// command is this binary in another role, in a cgroup, or in the test's own for nil.
func (l *lab) command(f *Filter, role string, args ...string) *exec.Cmd {
	l.t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stderr = os.Stderr
	if f != nil {
		var dir *os.File
		l.must(netlab.In(l.machine, func() (err error) { dir, err = f.Cgroup("vm-1"); return err }))
		l.t.Cleanup(func() { dir.Close() })
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	return cmd
}

func (l *lab) dial(f *Filter, targets ...string) (out map[string]outcome) {
	l.t.Helper()
	cmd := l.command(f, "dial", targets...)
	var text []byte
	l.must(netlab.In(l.machine, func() (err error) { text, err = cmd.Output(); return err }))
	l.must(json.Unmarshal(text, &out))
	return out
}

func (l *lab) reached(f *Filter, targets ...string) {
	l.t.Helper()
	for target, o := range l.dial(f, targets...) {
		if !o.Reached {
			l.t.Errorf("%s: not reached: %s", target, o.Text)
		}
	}
}

func (l *lab) refused(f *Filter, targets ...string) {
	l.t.Helper()
	for target, o := range l.dial(f, targets...) {
		if o.Reached || !o.Refused {
			l.t.Errorf("%s: reached %v, refused at once %v: %s", target, o.Reached, o.Refused, o.Text)
		}
	}
}

// What a guest may not reach.
var near = []string{
	"tcp!127.0.0.1:8001", "udp!127.0.0.1:8001", "udp!127.0.0.1:8000", "tcp!127.1.2.3:8000", "tcp!0.0.0.0:8001", "tcp![::1]:8001", "udp![::1]:8001", // loopback
	"tcp!10.9.0.1:8001", "tcp!203.0.113.1:8001", "tcp!198.51.100.99:8001", "tcp![fd09::1]:8001", "tcp!10.9.0.1:8000", // this machine by its other addresses
	"tcp!10.9.0.2:80", "udp!10.9.0.2:80", "tcp!203.0.113.2:80", "tcp![fd09::2]:80", "tcp!192.168.77.1:80", // neighbours
	"tcp!169.254.169.254:80", "udp!169.254.169.254:81", "tcp!168.63.129.16:80", // metadata
}

var far = []string{"tcp!198.51.100.7:80", "udp!198.51.100.7:81", "tcp![2001:db8:7::7]:80", "udp![2001:db8:7::7]:81"}

func TestThreat_K12_GuestReachesTheInternetAndNotTheHost(t *testing.T) {
	l := newLab(t)
	dir := t.TempDir()
	f := l.filter(dir, "127.0.0.1:8000/tcp")
	t.Run("allowed, name servers, the internet", func(t *testing.T) {
		l.reached(f, append([]string{"tcp!127.0.0.1:8000", "udp!10.9.0.2:53", "tcp!10.9.0.2:53"}, far...)...)
	})
	t.Run("this machine and what is near it", func(t *testing.T) { l.refused(f, near...) })
	t.Run("a process outside of the cgroup is not touched", func(t *testing.T) { l.reached(nil, append(near, far...)...) })
	t.Run("refusals are counted", func(t *testing.T) {
		var n uint64
		l.must(netlab.In(l.machine, func() (err error) { _, n, err = f.look(); return err }))
		if n < uint64(len(near)) {
			t.Errorf("%d packets refused", n)
		}
	})
	t.Run("a published port answers, near and far", func(t *testing.T) {
		server := l.command(f, "serve", ":9000")
		in, err := server.StdinPipe()
		l.must(err)
		out, err := server.StdoutPipe()
		l.must(err)
		l.must(netlab.In(l.machine, server.Start))
		defer server.Wait()
		defer in.Close()
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			t.Fatal(line, err)
		}
		l.reached(nil, "tcp!127.0.0.1:9000", "udp!127.0.0.1:9000", "tcp!10.9.0.1:9000")
		for _, target := range []string{"tcp!10.9.0.1:9000", "udp!10.9.0.1:9000", "tcp![fd09::1]:9000"} {
			l.must(netlab.In(l.rest, func() error {
				if o := dial(target); !o.Reached {
					return fmt.Errorf("%s from the LAN: %s", target, o.Text)
				}
				return nil
			}))
		}
		// The next VMM on the directory, while a VM runs; then a clean end.
		l.must(netlab.In(l.machine, f.Close))
		l.refused(f, "tcp!127.0.0.1:8001")
		next := l.filter(dir, "127.0.0.1:8001/tcp")
		l.reached(next, "tcp!127.0.0.1:8001")
		l.refused(next, "tcp!127.0.0.1:8000")
	})
	t.Run("with no VM left, nothing is", func(t *testing.T) {
		l.must(netlab.In(l.machine, f.Close))
		if _, err := os.Stat(f.bases[0].dir); !os.IsNotExist(err) {
			t.Error(err)
		}
		var n int
		l.must(netlab.In(l.machine, func() (err error) { n, _, err = f.look(); return err }))
		if n != 0 {
			t.Errorf("%d rules are left", n)
		}
	})
	t.Run("the cgroup alone does nothing", func(t *testing.T) {
		f := l.filter(dir)
		cmd := l.command(f, "dial", "tcp!127.0.0.1:8001")
		l.must(netlab.In(l.machine, func() error { return drop(f.table) }))
		var text []byte
		l.must(netlab.In(l.machine, func() (err error) { text, err = cmd.Output(); return err }))
		if !strings.Contains(string(text), `"Reached":true`) {
			t.Errorf("%s", text)
		}
	})
}

func TestThreat_K12_TheFilterStays(t *testing.T) {
	l := newLab(t)
	dir := t.TempDir()
	f := l.filter(dir)
	refresh := func() {
		l.t.Helper()
		l.must(netlab.In(l.machine, func() error { f.mu.Lock(); defer f.mu.Unlock(); return f.refresh() }))
	}
	prober := func() *exec.Cmd { return l.command(f, "dial", "tcp!127.0.0.1:8001", "udp!10.9.0.2:53") }
	run := func(cmd *exec.Cmd) (host, names bool) {
		t.Helper()
		var text []byte
		var out map[string]outcome
		l.must(netlab.In(l.machine, func() (err error) { text, err = cmd.Output(); return err }))
		l.must(json.Unmarshal(text, &out))
		return out["tcp!127.0.0.1:8001"].Reached, out["udp!10.9.0.2:53"].Reached
	}
	t.Run("another program takes the table away", func(t *testing.T) {
		cmd := prober()
		l.must(netlab.In(l.machine, func() error { return drop(f.table) }))
		refresh()
		if host, _ := run(cmd); host {
			t.Error("the machine was reached")
		}
	})
	t.Run("the name servers change", func(t *testing.T) {
		l.names("10.9.0.3")
		refresh()
		if host, names := run(prober()); host || names {
			t.Error("reached: ", host, names)
		}
		l.names("10.9.0.2")
		refresh()
		if _, names := run(prober()); !names {
			t.Error("the name server is not reached")
		}
	})
	t.Run("the empty cgroup was removed meanwhile", func(t *testing.T) {
		f.sweep()
		if host, _ := run(prober()); host {
			t.Error("the machine was reached")
		}
	})
	t.Run("and made again by another", func(t *testing.T) {
		f.sweep()
		l.must(os.Mkdir(f.bases[0].dir, 0o755))
		if host, _ := run(prober()); host {
			t.Error("the machine was reached from a cgroup of the same name")
		}
	})
	t.Run("a VM in the cgroup of a VMM that was started elsewhere", func(t *testing.T) {
		elsewhere := filepath.Join(f.mount.dir, "dstack-egress-test-"+strconv.Itoa(os.Getpid()))
		vm := filepath.Join(elsewhere, "deeper", f.name, "vm-2")
		l.must(os.MkdirAll(vm, 0o755))
		t.Cleanup(func() {
			os.Remove(vm)
			for at := filepath.Dir(vm); at != f.mount.dir; at = filepath.Dir(at) {
				os.Remove(at)
			}
		})
		d, err := os.Open(vm)
		l.must(err)
		defer d.Close()
		cmd := exec.Command(os.Args[0], "tcp!127.0.0.1:8001", "udp!10.9.0.2:53")
		cmd.Env, cmd.SysProcAttr = append(os.Environ(), roleEnv+"=dial"), &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
		l.filter(dir)
		if host, names := run(cmd); host || !names {
			t.Error("reached: ", host, names)
		}
	})
	t.Run("two VMMs have tables of their own", func(t *testing.T) {
		other := l.filter(t.TempDir(), "127.0.0.1:8001/tcp")
		l.reached(other, "tcp!127.0.0.1:8001")
		l.refused(f, "tcp!127.0.0.1:8001")
		l.must(netlab.In(l.machine, other.Close))
		l.refused(f, "tcp!127.0.0.1:8001")
	})
	t.Run("a process that was started outside is taken in", func(t *testing.T) {
		cmd := exec.Command(os.Args[0], ":9001")
		cmd.Env = append(os.Environ(), roleEnv+"=serve")
		in, err := cmd.StdinPipe()
		l.must(err)
		l.must(netlab.In(l.machine, cmd.Start))
		defer cmd.Wait()
		defer in.Close()
		for range 2 { // the second time it is in
			l.must(netlab.In(l.machine, func() error { return f.Adopt("vm-3", cmd.Process.Pid) }))
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
		if err != nil || !strings.Contains(string(text), "/"+f.name+"/vm-3\n") {
			t.Errorf("%s %v", text, err)
		}
	})
	for _, name := range []string{"", ".", "..", "a/b", ".x"} {
		if d, err := f.Cgroup(name); err == nil {
			d.Close()
			t.Errorf("a cgroup %q", name)
		}
	}
}
