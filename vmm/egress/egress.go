// SPDX-License-Identifier: Apache-2.0

// Package egress keeps guests away from the machine that runs them and from its
// networks, and lets them reach the internet. QEMU's user network opens a guest's
// connections as sockets of the QEMU process: without a filter a guest reaches, as
// 10.0.2.2, whatever listens on this machine's loopback, and the LAN and the cloud's
// metadata service as this machine does.
//
// # How
//
// Each QEMU process is started in a cgroup (version 2) of its own below one of the
// VMM's, and one nftables table looks at what sockets of that cgroup send. In this
// order: replies to who connected from outside (published ports) pass; what the
// configuration allows passes; port 53 of this machine's name servers passes; this
// machine's own addresses, the networks it is attached to, and private, link-local and
// special networks are refused at once (TCP by a reset) and counted; the rest passes.
//
// # Guarantees
//
//   - A QEMU process is in its cgroup before it runs its first instruction.
//   - A change of the table is one transaction: there is no moment with half of it.
//   - Table and cgroups outlive the VMM, as VMs do. The next VMM finds the cgroups of
//     its predecessors wherever these were made, and its table is about all of them.
//   - Nothing outside of those cgroups is touched.
//   - While the VMM runs, a table that something took away or altered in length (nft
//     flush ruleset) is there again within seconds.
//
// # Trust
//
// The kernel, and QEMU: it runs as the VMM's user, who may leave the cgroup. A guest
// that has taken over its QEMU is not of this package, nor is a tap interface, whose
// packets no socket of QEMU sends. Attacker-controlled: what the guest sends, and to
// where. Implements spec/threats.md K12.
package egress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// Code of every refusal of [Open].
const Code = "vmm_egress"

// Config says whose guests may reach what.
type Config struct {
	// Dir is the VMM's state directory, absolute; it names table and cgroup.
	Dir   string
	Allow []Allow
	Log   *slog.Logger

	resolvConf string // for tests; "" is /etc/resolv.conf
}

// Allow is what guests reach though it is this machine's or near it.
type Allow struct {
	Net  netip.Prefix
	UDP  bool   // with Port: UDP and not TCP
	Port uint16 // 0: everything of the network
}

// String is the form that ParseAllow reads.
func (a Allow) String() string {
	if a.Port == 0 {
		return a.Net.String()
	}
	proto := "/tcp"
	if a.UDP {
		proto = "/udp"
	}
	return netip.AddrPortFrom(a.Net.Addr(), a.Port).String() + proto
}

// ParseAllow reads ADDRESS:PORT/tcp, ADDRESS:PORT/udp or NETWORK/LENGTH.
func ParseAllow(text string) (Allow, error) {
	at, proto, _ := strings.Cut(text, "/")
	if proto == "tcp" || proto == "udp" {
		ap, err := netip.ParseAddrPort(at)
		if err != nil || ap.Port() == 0 || ap.Addr().Zone() != "" || ap.Addr().Is4In6() || ap.Addr().IsUnspecified() {
			return Allow{}, fmt.Errorf("%.80q is not an address and a port, such as 127.0.0.1:8000/%s", text, proto)
		}
		return Allow{Net: netip.PrefixFrom(ap.Addr(), ap.Addr().BitLen()), UDP: proto == "udp", Port: ap.Port()}, nil
	}
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil || p.Addr().Is4In6():
		return Allow{}, fmt.Errorf("%.80q is neither ADDRESS:PORT/tcp, ADDRESS:PORT/udp nor NETWORK/LENGTH", text)
	case p != p.Masked():
		return Allow{}, fmt.Errorf("%s has bits set after its length; the network is %s", p, p.Masked())
	case p.Bits() == 0:
		return Allow{}, fmt.Errorf(`%s is everything; egress = "open" says that`, p)
	}
	return Allow{Net: p}, nil
}

// cgroupType is the file system that shows cgroups of version 2.
const cgroupType = "cgroup2"

// initialNamespace is the inode of the first cgroup namespace (PROC_CGROUP_INIT_INO).
// In others, kernels differ about what the level of a cgroup is counted from.
const initialNamespace = 0xEFFFFFFB

// place is a directory of the hierarchy and how deep it is below the root.
type place struct {
	dir   string
	level int
}

func depth(path string) int {
	return len(strings.FieldsFunc(path, func(r rune) bool { return r == '/' }))
}

// own finds this process's cgroup and the mount that shows it, by /proc/self/mountinfo
// and /proc/self/cgroup.
func own(mountinfo, cgroup []byte) (self, mount place, err error) {
	path := ""
	for line := range strings.Lines(string(cgroup)) {
		if rest, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			path = rest
		}
	}
	if !strings.HasPrefix(path, "/") || strings.Contains(path+"/", "/../") {
		return self, mount, errors.New("this process is in no cgroup of version 2 that can be seen")
	}
	for line := range strings.Lines(string(mountinfo)) {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+2 || fields[dash+1] != cgroupType {
			continue
		}
		root, dir := unescape(fields[3]), unescape(fields[4])
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
			continue
		}
		return place{filepath.Join(dir, rel), depth(path)}, place{dir, depth(root)}, nil
	}
	return self, mount, errors.New("no mounted cgroup2 file system shows this process's cgroup")
}

// unescape undoes the octal escapes of mountinfo (proc(5)).
func unescape(s string) string {
	var out []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out = append(out, byte(n))
				i += 3
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}

// base is a cgroup below which VMs of this VMM are.
type base struct {
	place
	id uint64 // of the cgroup: the directory's inode
}

// Filter is the egress filter of one VMM.
type Filter struct {
	config Config
	mount  place
	name   string // of the base directories
	table  string

	mu      sync.Mutex
	bases   []base // [0]: where VMs are started
	loaded  rules
	refused uint64
	said    time.Time
}

// newFilter names what tells the VMMs of one machine apart.
func newFilter(c Config) *Filter {
	sum := sha256.Sum256([]byte(c.Dir))
	id := hex.EncodeToString(sum[:4])
	return &Filter{config: c, name: "dstack-vmm-" + id, table: "dstack_vmm_" + id}
}

// Open loads the filter, in place of one that a VMM on this directory left. Code
// vmm_egress, with what is missing and how to have it.
func Open(c Config) (*Filter, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.resolvConf == "" {
		c.resolvConf = "/etc/resolv.conf"
	}
	unable := func(err error, fix string) error {
		return fault.Wrap(err, Code, "guests cannot be kept from this machine and its networks").WithFix("%s", fix)
	}
	const fixRoot = "run the VMM as root on a kernel with nftables (socket, ct, fib) and cgroup2"
	if os.Geteuid() != 0 {
		return nil, unable(errors.New("the VMM is not root"), fixRoot)
	}
	ns, err := os.Stat("/proc/self/ns/cgroup")
	if err != nil {
		return nil, unable(err, fixRoot)
	}
	if ns.Sys().(*syscall.Stat_t).Ino != initialNamespace {
		return nil, unable(errors.New("the VMM is in a cgroup namespace of its own"), "run it in the machine's (docker run --cgroupns=host)")
	}
	f := newFilter(c)
	var self place
	if self, f.mount, err = here(); err != nil {
		return nil, unable(err, "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")
	}
	first := place{filepath.Join(self.dir, f.name), self.level + 1}
	if err := os.Mkdir(first.dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, unable(err, "let the VMM make cgroups below its own (systemd: Delegate=yes)")
	}
	kind, err := os.ReadFile(filepath.Join(first.dir, "cgroup.type"))
	if err != nil || strings.TrimSpace(string(kind)) != "domain" {
		return nil, unable(fmt.Errorf("the cgroup %s has the type %q (%v)", first.dir, bytes.TrimSpace(kind), err), "start the VMM in a cgroup that is not threaded")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.find(first); err != nil {
		return nil, unable(err, fixRoot)
	}
	if err := f.load(); err != nil {
		return nil, unable(err, fixRoot)
	}
	return f, nil
}

func here() (self, mount place, err error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return self, mount, err
	}
	cgroup, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return self, mount, err
	}
	return own(mounts, cgroup)
}

// find sets bases: first, and the directories of the same name that VMMs made before
// which were started elsewhere (another login has another cgroup).
func (f *Filter) find(first place) error {
	places := []place{first}
	err := filepath.WalkDir(f.mount.dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // it went meanwhile
			return nil
		case err != nil:
			return err
		case !d.IsDir():
			return nil
		case d.Name() == f.name:
			if path != first.dir {
				places = append(places, place{path, f.mount.level + depth(strings.TrimPrefix(path, f.mount.dir))})
			}
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("look for cgroups of %s: %w", f.config.Dir, err)
	}
	var found []base
	for _, p := range places {
		fi, err := os.Stat(p.dir)
		if errors.Is(err, fs.ErrNotExist) { // [Filter.make] and Open made the first
			continue
		}
		if err != nil {
			return err
		}
		found = append(found, base{p, fi.Sys().(*syscall.Stat_t).Ino})
	}
	f.bases = found
	return nil
}

// Cgroup makes the cgroup of a VM and opens its directory, to start QEMU in
// (SysProcAttr.CgroupFD). The filter is in force when it returns.
func (f *Filter) Cgroup(vm string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	dir, err := f.make(vm)
	if err == nil {
		var d *os.File
		if d, err = os.Open(dir); err == nil {
			return d, nil
		}
	}
	return nil, fault.Wrap(err, Code, "make the cgroup of VM %s", vm).WithFix("restart the VMM")
}

func (f *Filter) make(vm string) (string, error) {
	if vm == "" || vm != filepath.Base(vm) || strings.HasPrefix(vm, ".") {
		return "", fmt.Errorf("%q names no cgroup", vm)
	}
	first := f.bases[0]
	if fi, err := os.Stat(first.dir); err != nil || fi.Sys().(*syscall.Stat_t).Ino != first.id {
		// Somebody removed it while it was empty. Another of its name is another.
		if err := os.Mkdir(first.dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
		if err := f.find(first.place); err != nil {
			return "", err
		}
	}
	if err := f.refresh(); err != nil {
		return "", err
	}
	dir := filepath.Join(first.dir, vm)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return dir, nil
}

// Adopt sees to it that a QEMU process which runs already is in a cgroup of the filter.
// One that was started without is moved; connections that it has stay as they are.
func (f *Filter) Adopt(vm string, pid int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok && slices.Contains(strings.Split(path, "/"), f.name) {
			return nil
		}
	}
	dir, err := f.make(vm)
	if err != nil {
		return err
	}
	f.config.Log.Warn("this VM was started without an egress filter; new connections of it are filtered from now on", "vm", vm)
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644)
}

// every is how long a change of this machine's networks or a lost table goes unnoticed.
const every = 3 * time.Second

// Watch keeps the table as it should be, until ctx ends.
func (f *Filter) Watch(ctx context.Context) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		f.mu.Lock()
		if err := f.refresh(); err != nil {
			f.config.Log.Error("the egress filter could not be kept", "error", err)
		}
		f.mu.Unlock()
	}
}

// refresh loads the table again if it is not what it should be.
func (f *Filter) refresh() error {
	want, err := f.want()
	if err != nil {
		return err
	}
	n, refused, err := f.look()
	switch {
	case err != nil: // what cannot be read is replaced
	case n != want.count():
		f.config.Log.Warn("the egress filter was altered by another program; it is loaded again", "table", "inet "+f.table)
	case !want.equal(f.loaded):
		f.config.Log.Info("the egress filter follows this machine's networks", "name_servers", want.names, "attached", want.attached)
	default:
		if refused > f.refused && time.Since(f.said) > time.Minute {
			f.said = time.Now()
			f.config.Log.Info("packets of guests to this machine or its networks were refused", "since_last", refused-f.refused,
				"fix", "cvm.networking.egress_allow lists what guests may reach")
			f.refused = refused
		}
		return nil
	}
	return f.load()
}

func (f *Filter) load() error {
	want, err := f.want()
	if err != nil {
		return err
	}
	if err := want.replace(f.table); err != nil {
		return err
	}
	f.loaded, f.refused = want, 0
	return nil
}

// want is what the table should hold now.
func (f *Filter) want() (rules, error) {
	r := rules{bases: f.bases, allow: f.config.Allow}
	file, err := os.Open(f.config.resolvConf)
	if err == nil {
		r.names, err = nameServers(file)
		file.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, fmt.Errorf("read the name servers: %w", err)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return r, fmt.Errorf("list this machine's addresses: %w", err)
	}
	r.attached = attached(addrs)
	return r, nil
}

// nameServers reads resolv.conf(5).
func nameServers(file io.Reader) (out []netip.Addr, err error) {
	lines := bufio.NewScanner(io.LimitReader(file, 1<<16))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil {
			out = append(out, a.Unmap().WithZone(""))
		}
	}
	return out, lines.Err()
}

// attached are the networks in which this machine has an address: its neighbours, be
// their addresses private or not.
func attached(addrs []net.Addr) (out []netip.Prefix) {
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		// One of a few bits is no LAN but a route to everywhere.
		if err != nil || p.IsSingleIP() || p.Bits() < 8 || p.Addr().Is6() && p.Bits() < 32 {
			continue
		}
		if p = p.Masked(); !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// Close removes table and cgroups unless a VM runs in them.
func (f *Filter) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.sweep() {
		return nil
	}
	return drop(f.table)
}

// sweep removes cgroups that have no process and reports whether all have gone.
func (f *Filter) sweep() bool {
	gone := true
	for _, b := range f.bases {
		entries, _ := os.ReadDir(b.dir)
		for _, e := range entries {
			if e.IsDir() {
				_ = os.Remove(filepath.Join(b.dir, e.Name())) // fails while a process is in it
			}
		}
		if err := os.Remove(b.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			gone = false
		}
	}
	return gone
}

// Remove takes away the filter that a VMM on this directory left, for a VMM that is told
// to have none. Cgroups in which VMs run stay, without effect.
func Remove(dir string) error {
	self, mount, err := here()
	if err != nil || os.Geteuid() != 0 {
		return nil // then there is none
	}
	f := newFilter(Config{Dir: dir})
	f.mount = mount
	if err := f.find(place{filepath.Join(self.dir, f.name), self.level + 1}); err == nil {
		f.sweep()
	}
	return drop(f.table)
}
