// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/guest/disk"
	"github.com/dstack-go/dstack/internal/fault"
)

// mountPoint is one file system of the guest.
type mountPoint struct {
	target, fstype string
	flags          uintptr
	data           string
	// optional: absent from the kernel is not an error.
	optional bool
}

const (
	nosuid = unix.MS_NOSUID
	nodev  = unix.MS_NODEV
	noexec = unix.MS_NOEXEC
)

// firstMounts are needed to find the hostlink port and to write to the console;
// they move along to the new root.
var firstMounts = []mountPoint{
	{target: "/proc", fstype: "proc", flags: nosuid | nodev | noexec},
	{target: "/sys", fstype: "sysfs", flags: nosuid | nodev | noexec},
	{target: "/dev", fstype: "devtmpfs", flags: nosuid | noexec, data: "mode=0755"},
	{target: "/run", fstype: "tmpfs", flags: nosuid | nodev, data: "mode=0755"},
}

// restMounts sit on the first ones, so they move along as well.
var restMounts = []mountPoint{
	{target: "/dev/pts", fstype: "devpts", flags: nosuid | noexec, data: "gid=5,mode=0620,ptmxmode=0666"},
	{target: "/dev/shm", fstype: "tmpfs", flags: nosuid | nodev | noexec, data: "mode=1777"},
	{target: "/dev/mqueue", fstype: "mqueue", flags: nosuid | nodev | noexec},
	{target: "/sys/fs/cgroup", fstype: "cgroup2", flags: nosuid | nodev | noexec, data: "nsdelegate,memory_recursiveprot"},
	{target: "/sys/kernel/security", fstype: "securityfs", flags: nosuid | nodev | noexec, optional: true},
	{target: "/sys/kernel/config", fstype: "configfs", flags: nosuid | nodev | noexec, optional: true},
}

// movedMounts is what switchRoot takes along.
var movedMounts = []string{"/proc", "/sys", "/dev", "/run"}

func mountAll(list []mountPoint) error {
	for _, m := range list {
		// Directories on sysfs and procfs exist or cannot be made.
		if err := os.MkdirAll(m.target, 0o755); err != nil && !m.optional {
			return fault.Wrap(err, "mount_failed", "make mount point %s", m.target)
		}
		err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
		switch {
		case err == nil || errors.Is(err, unix.EBUSY): // EBUSY: the kernel mounted devtmpfs itself
		case m.optional && (errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT)):
		default:
			return fault.Wrap(err, "mount_failed", "mount %s on %s", m.fstype, m.target)
		}
	}
	return nil
}

// A sysctl is one kernel setting. Settings the kernel does not have are skipped:
// what is not built in needs no switching off.
type sysctl struct{ key, value string }

var hardening = []sysctl{
	{"kernel/core_pattern", "core"}, // together with a core limit of zero: no core dumps
	{"fs/suid_dumpable", "0"},
	{"kernel/dmesg_restrict", "1"},
	{"kernel/kptr_restrict", "2"},
	{"kernel/perf_event_paranoid", "3"},
	{"kernel/unprivileged_bpf_disabled", "1"},
	{"net/core/bpf_jit_harden", "2"},
	{"kernel/kexec_load_disabled", "1"},
	{"kernel/sysrq", "0"},
	{"kernel/ctrl-alt-del", "0"},
	{"fs/protected_hardlinks", "1"},
	{"fs/protected_symlinks", "1"},
	{"fs/protected_fifos", "2"},
	{"fs/protected_regular", "2"},
}

// networkSettings are made before the interface comes up. No router advertisement
// and no redirect: routes come from the host's blob or DHCP alone.
var networkSettings = []sysctl{
	{"net/ipv6/conf/all/accept_ra", "0"},
	{"net/ipv6/conf/default/accept_ra", "0"},
	{"net/ipv4/conf/all/accept_redirects", "0"},
	{"net/ipv4/conf/default/accept_redirects", "0"},
	{"net/ipv6/conf/all/accept_redirects", "0"},
	{"net/ipv6/conf/default/accept_redirects", "0"},
	{"net/ipv4/conf/all/send_redirects", "0"},
	{"net/ipv4/conf/all/accept_source_route", "0"},
	{"net/ipv4/conf/all/rp_filter", "2"},
	{"net/ipv4/icmp_echo_ignore_broadcasts", "1"},
	{"net/ipv4/tcp_syncookies", "1"},
}

// forwarding is switched on for containers, after the firewall is loaded.
var forwarding = []sysctl{
	{"net/ipv4/ip_forward", "1"},
	{"net/ipv6/conf/default/forwarding", "1"},
	{"net/ipv6/conf/all/forwarding", "1"},
	{"net/netfilter/nf_conntrack_max", "2097152"}, // upstream's value (guest-os.md §2.7)
}

func applySysctls(proc string, list []sysctl) error {
	for _, s := range list {
		err := os.WriteFile(filepath.Join(proc, "sys", s.key), []byte(s.value), 0o644)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fault.Wrap(err, "sysctl_failed", "set %s to %s", s.key, s.value)
		}
	}
	return nil
}

// noCoreDumps makes this process, and all it starts, dump no core (threats.md E07).
func noCoreDumps() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("set the core size limit to zero: %w", err)
	}
	return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

// rootMapping is the device-mapper name of the verity root.
const rootMapping = "dstack-root"

const newRoot = "/newroot"

// largeFrom is the memory of a machine that gives some away for speed, in bytes.
const largeFrom = 4 << 30

// smallMachine has the kernel of a small machine spare memory. Transparent huge pages
// need a reserve: with them on, a guest of 1 GiB was measured to use 24 MiB more before
// the engine and 50 MiB more with an app up. The list of free pages that each processor
// keeps for itself may hold an eighth of the memory unless told otherwise; it held
// 25 MiB of such a guest, which nobody else could use or saw as free.
func smallMachine(sys, proc string, memory uint64) error {
	if memory >= largeFrom {
		return nil
	}
	for path, value := range map[string]string{
		filepath.Join(sys, "kernel/mm/transparent_hugepage/enabled"): "never",
		filepath.Join(proc, "sys/vm/percpu_pagelist_high_fraction"):  "1000",
	} {
		if err := os.WriteFile(path, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fault.Wrap(err, "mount_failed", "set %s", path)
		}
	}
	return nil
}

// openRoot maps the root partition under the measured hash and mounts it.
func openRoot(cmdline string, finder *disk.Finder, mapper *disk.Mapper) (layers, error) {
	on, err := parseCmdline(cmdline)
	if err != nil {
		return on, err
	}
	verity := on.root
	part, err := finder.Root()
	if err != nil {
		return on, err
	}
	if part.Size <= verity.DataSize {
		return on, fault.New("root_truncated", "root partition %s has %d bytes, but the root needs more than %d", part.Name, part.Size, verity.DataSize)
	}
	node, err := mapper.OpenVerity(rootMapping, part.Path, verity)
	if err != nil {
		return on, fault.Wrap(err, "root_verity", "open the root on %s under its measured hash", part.Name)
	}
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return on, err
	}
	// The first read checks the superblock's path up to the root hash.
	if err := unix.Mount(node, newRoot, "squashfs", unix.MS_RDONLY|nodev, ""); err != nil {
		return on, fault.Wrap(err, "root_verity", "mount the root on %s: its content does not match the measured hash, or is no squashfs", part.Name)
	}
	return on, nil
}

// switchRoot makes the mounted root the root of this process, taking the mounts
// along; the same process goes on. The initramfs stays below, out of reach.
func switchRoot() error {
	for _, m := range movedMounts {
		if err := unix.Mount(m, newRoot+m, "", unix.MS_MOVE, ""); err != nil {
			return fault.Wrap(err, "switch_root", "move %s to the new root", m)
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return fault.Wrap(err, "switch_root", "enter the new root")
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fault.Wrap(err, "switch_root", "move the new root to /")
	}
	if err := unix.Chroot("."); err != nil {
		return fault.Wrap(err, "switch_root", "chroot")
	}
	if err := os.Chdir("/"); err != nil {
		return fault.Wrap(err, "switch_root", "enter /")
	}
	// Containers get their mounts from here; a private tree would keep a later
	// bind mount of ours from them, a shared one is what engines expect.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fault.Wrap(err, "switch_root", "share the mount tree")
	}
	return unix.Mount("tmpfs", "/tmp", "tmpfs", nosuid|nodev, "mode=1777")
}
