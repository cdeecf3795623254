// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

// Harden takes from this process, for good and on all its threads, what the
// agent never needs, so that a bug in a parser is not a way to the host or to
// the other processes of the guest:
//
//   - it is not dumpable: nothing of its own uid can read its memory, which
//     holds keys, and no core is ever written;
//   - no_new_privs, so that no set-user-ID program helps;
//   - a seccomp filter under which it cannot start programs, make executable
//     memory, trace or read other processes, mount, change namespaces, load
//     code into the kernel, set the clock, or open sockets of families other
//     than unix, IP and netlink (no vsock: only init talks to the host).
//
// Denied calls fail with EPERM, clone3 with ENOSYS (its flags cannot be seen by
// a filter, and Go falls back to clone), calls of a foreign ABI kill the process.
// Everything else is allowed: the filter is a denylist, and the agent's uid
// without capabilities is the first wall, not this.
func Harden() error {
	var caps [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	if unix.Geteuid() == 0 || caps[0].Permitted|caps[1].Permitted != 0 {
		return fault.New("agent_privileged", "the agent runs as user %d with capabilities %#x %#x", unix.Geteuid(), caps[0].Permitted, caps[1].Permitted).
			WithFix("it is started by init, as a user of its own")
	}
	return confine()
}

// confine does what Harden says, whoever runs it.
func confine() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("set not dumpable: %w", err)
	}
	if err := syscall.Setrlimit(unix.RLIMIT_CORE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	// The filter must be installed by a thread that has no_new_privs; TSYNC then
	// gives both to all threads, or fails.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	filter := seccompFilter()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("install seccomp filter: %w", errno)
	}
	if r != 0 {
		return fmt.Errorf("install seccomp filter: thread %d did not take it", r)
	}
	return nil
}

// deniedCalls fail with EPERM. Each is here because it reaches past the agent's
// own sockets and memory.
var deniedCalls = append([]uintptr{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, // programs
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
	unix.SYS_PROCESS_MADVISE, unix.SYS_MOVE_PAGES, unix.SYS_MIGRATE_PAGES, // other processes
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT,
	unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR, // mounts
	unix.SYS_UNSHARE, unix.SYS_SETNS, // namespaces; clone is examined below
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, // large kernel surfaces
	unix.SYS_KEXEC_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, // kernel code
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, // keyrings
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, // files past the directory tree
	unix.SYS_FANOTIFY_INIT, unix.SYS_QUOTACTL, unix.SYS_ACCT,
	unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME,
	unix.SYS_SYSLOG, unix.SYS_PERSONALITY, unix.SYS_VHANGUP, // the machine
}, archDeniedCalls...)

// newNamespaces are the flags of clone that make a namespace (sched.h).
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// Offsets in struct seccomp_data (linux/seccomp.h): u32 nr, u32 arch, u64
// instruction pointer, u64 args[6]. Both architectures are little-endian, so the
// low half of an argument comes first.
const (
	offNr   = 0
	offArch = 4
)

func offArg(i uint32) uint32 { return 16 + 8*i }

// seccompFilter returns the classic BPF program. Each rule is self-contained, so
// no jump leaves it and the order does not matter.
func seccompFilter() []unix.SockFilter {
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		atMin  = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		anyBit = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret    = unix.BPF_RET | unix.BPF_K

		kill  = unix.SECCOMP_RET_KILL_PROCESS
		allow = unix.SECCOMP_RET_ALLOW
		eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	)
	op := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(code uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: code, K: k, Jt: yes, Jf: no}
	}
	f := []unix.SockFilter{
		op(load, offArch),
		jump(equal, auditArch, 1, 0),
		op(ret, kill),
		op(load, offNr),
		jump(atMin, 0x40000000, 0, 1), // x32 calls on x86-64; no such numbers elsewhere
		op(ret, kill),
	}
	for _, nr := range deniedCalls {
		f = append(f, jump(equal, uint32(nr), 0, 1), op(ret, eperm))
	}
	f = append(f,
		jump(equal, unix.SYS_CLONE3, 0, 1),
		op(ret, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS)),

		jump(equal, unix.SYS_CLONE, 0, 4),
		op(load, offArg(0)),
		jump(anyBit, newNamespaces, 0, 1),
		op(ret, eperm),
		op(ret, allow),

		jump(equal, unix.SYS_SOCKET, 0, 7),
		op(load, offArg(0)),
		jump(equal, unix.AF_UNIX, 4, 0),
		jump(equal, unix.AF_INET, 3, 0),
		jump(equal, unix.AF_INET6, 2, 0),
		jump(equal, unix.AF_NETLINK, 1, 0),
		op(ret, eperm),
		op(ret, allow),
	)
	for _, nr := range []uint32{unix.SYS_MMAP, unix.SYS_MPROTECT, unix.SYS_PKEY_MPROTECT} {
		f = append(f,
			jump(equal, nr, 0, 4),
			op(load, offArg(2)),
			jump(anyBit, unix.PROT_EXEC, 0, 1),
			op(ret, eperm),
			op(ret, allow),
		)
	}
	return append(f, op(ret, allow))
}
