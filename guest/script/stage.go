// SPDX-License-Identifier: Apache-2.0

package script

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Stage is the life of the process that [Room.Run] starts, in namespaces of its
// own, up to the moment when it becomes the script's shell. It returns only with an
// error.
func Stage() error {
	// Credentials and filter are a thread's; the thread that has them must be the
	// one that becomes the shell.
	runtime.LockOSThread()
	f := os.NewFile(configFD, "config")
	data, err := io.ReadAll(io.LimitReader(f, 4<<20))
	if err != nil {
		return fmt.Errorf("read the stage's orders: %w", err)
	}
	f.Close()
	var c stageConfig
	if err := json.Unmarshal(data, &c); err != nil {
		return fmt.Errorf("read the stage's orders: %w", err)
	}
	if os.Getpid() != 1 {
		return errors.New("a script's stage has namespaces of its own")
	}
	if err := c.enter(); err != nil {
		return err
	}
	if err := drop(); err != nil {
		return err
	}
	return fmt.Errorf("start the shell of the scripts layer: %w", syscall.Exec("/usr/bin/bash", c.Args, c.Env))
}

// base is covered with memory in the stage's own mount namespace; what the guest
// has there is out of sight anyway.
const base = "/tmp"

const memory = unix.MS_NOSUID | unix.MS_NODEV

// devices are those that cannot do anything.
var devices = []string{"null", "zero", "full", "random", "urandom"}

// enter makes the script's root this process's.
func (c *stageConfig) enter() error {
	// Held open before base is covered. They close when the shell starts.
	held := map[string]string{} // path -> path by descriptor
	hold := func(path string) error {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s for the scripts: %w", path, err)
		}
		held[path] = fmt.Sprintf("/proc/self/fd/%d", fd)
		return nil
	}
	for _, path := range []string{c.Layer, c.WorkDir, c.Socket} {
		if err := hold(path); err != nil {
			return err
		}
	}
	for _, d := range devices {
		if err := hold("/dev/" + d); err != nil {
			return err
		}
	}
	for _, source := range c.Programs {
		if err := hold(source); err != nil {
			return err
		}
	}
	resolver, err := os.ReadFile(c.Resolver)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}

	b := &builder{root: base + "/root"}
	b.mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "")
	b.mount("tmpfs", base, "tmpfs", memory, "mode=0755,size=64m")
	for _, dir := range []string{"/upper", "/work", "/root"} {
		b.do(os.Mkdir(base+dir, 0o755))
	}
	b.mount("overlay", b.root, "overlay", memory, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", held[c.Layer], base, base))

	b.dir("/dstack")
	b.mount(held[c.WorkDir], b.root+"/dstack", "", unix.MS_BIND, "")
	b.mount("", b.root+"/dstack", "", unix.MS_BIND|unix.MS_REMOUNT|memory, "")

	b.memory("/tmp", "mode=1777,size=25%", 0)
	b.memory("/run", "mode=0755,size=1m", unix.MS_NOEXEC)
	b.bind(held[c.Socket], "/run/dstack.sock", false)
	b.dir("/run/dstack")
	b.do(os.Symlink("../dstack.sock", b.root+"/run/dstack/dstack.sock"))
	b.do(os.WriteFile(b.root+"/run/resolv.conf", resolver, 0o644))
	b.dir("/var")
	b.link("../run", "/var/run")
	b.link("/run/resolv.conf", "/etc/resolv.conf")

	b.memory("/dev", "mode=0755,size=64k", unix.MS_NOEXEC)
	for _, d := range devices {
		b.bind(held["/dev/"+d], "/dev/"+d, false)
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		b.do(os.Symlink(target, b.root+"/dev/"+name))
	}
	b.memory("/dev/shm", "mode=1777,size=25%", unix.MS_NOEXEC)

	b.dir("/proc")
	b.mount("proc", b.root+"/proc", "proc", memory|unix.MS_NOEXEC, "")
	// The script is root in name: what root may write without a capability is made
	// read-only, and what it may read of the machine is covered.
	for _, name := range []string{"/proc/sys", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/sysrq-trigger"} {
		b.readOnly(name)
	}
	for _, name := range []string{"/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/kmsg", "/proc/timer_list", "/proc/sched_debug", "/proc/kallsyms"} {
		if _, err := os.Lstat(b.root + name); err == nil {
			b.mount(held["/dev/null"], b.root+name, "", unix.MS_BIND, "")
		}
	}
	targets := make([]string, 0, len(c.Programs))
	for target := range c.Programs {
		targets = append(targets, target)
	}
	slices.Sort(targets)
	for _, target := range targets {
		if filepath.Clean("/"+target) != target {
			return fmt.Errorf("%q is no clean path for a program of the scripts layer", target)
		}
		b.bind(held[c.Programs[target]], target, true)
	}
	if b.err != nil {
		return b.err
	}

	// The old root goes away for good (pivot_root(2), the form without a directory
	// for it).
	if err := os.Chdir(b.root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("enter the scripts layer: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the guest's root: %w", err)
	}
	return os.Chdir("/dstack")
}

// builder remembers the first error.
type builder struct {
	root string
	err  error
}

func (b *builder) do(err error) {
	if b.err == nil {
		b.err = err
	}
}

func (b *builder) mount(source, target, fstype string, flags uintptr, data string) {
	if b.err != nil {
		return
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		b.err = fmt.Errorf("mount %s for the scripts: %w", target, err)
	}
}

func (b *builder) dir(path string) { b.do(os.MkdirAll(b.root+path, 0o755)) }

func (b *builder) memory(path, options string, flags uintptr) {
	b.dir(path)
	b.mount("tmpfs", b.root+path, "tmpfs", memory|flags, options)
}

// link makes a symbolic link unless the layer has something there.
func (b *builder) link(target, path string) {
	if _, err := os.Lstat(b.root + path); errors.Is(err, os.ErrNotExist) {
		b.do(os.MkdirAll(filepath.Dir(b.root+path), 0o755))
		b.do(os.Symlink(target, b.root+path))
	}
}

// bind mounts one file.
func (b *builder) bind(source, path string, readOnly bool) {
	b.do(os.MkdirAll(filepath.Dir(b.root+path), 0o755))
	f, err := os.OpenFile(b.root+path, os.O_CREATE|os.O_RDONLY, 0o755)
	b.do(err)
	if err == nil {
		f.Close()
	}
	b.mount(source, b.root+path, "", unix.MS_BIND, "")
	if readOnly {
		b.mount("", b.root+path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|memory, "")
	}
}

func (b *builder) readOnly(path string) {
	if _, err := os.Lstat(b.root + path); err != nil {
		return
	}
	b.mount(b.root+path, b.root+path, "", unix.MS_BIND|unix.MS_REC, "")
	b.mount("", b.root+path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|memory|unix.MS_NOEXEC, "")
}

// lastCap bounds the search for the kernel's last capability.
const lastCap = 63

// drop gives up every capability of this thread, with all ways to get one back, and
// puts it under the filter.
func drop() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	for c := uintptr(0); c <= lastCap; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); errors.Is(err, unix.EINVAL) {
			break // beyond the kernel's last one
		} else if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	// Root is a user like any other from here on, and stays it (linux/securebits.h).
	const noRoot, noRootLocked, noFixup, noFixupLocked, keepLocked, noAmbient, noAmbientLocked = 1, 2, 4, 8, 32, 64, 128
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, noRoot|noRootLocked|noFixup|noFixupLocked|keepLocked|noAmbient|noAmbientLocked, 0, 0, 0); err != nil {
		return fmt.Errorf("set secure bits: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	var none [2]unix.CapUserData
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	filter := seccompFilter()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("install seccomp filter: %w", errno)
	}
	return nil
}
