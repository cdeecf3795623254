// SPDX-License-Identifier: Apache-2.0

package script

import "golang.org/x/sys/unix"

// deniedCalls fail with EPERM. Without capabilities most of them would fail anyway;
// a new user namespace would bring capabilities back, and with them much of the
// kernel into reach.
var deniedCalls = append([]uintptr{
	unix.SYS_UNSHARE, unix.SYS_SETNS, // namespaces; clone is examined below
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT,
	unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR, // mounts
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, // keyrings, which know no namespace
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, // large kernel surfaces
	unix.SYS_KEXEC_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, // kernel code
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, // files past the directory tree
	unix.SYS_FANOTIFY_INIT, unix.SYS_QUOTACTL, unix.SYS_ACCT,
	unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_SYSLOG, // the machine
}, archDeniedCalls...)

// newNamespaces are the flags of clone that make a namespace (sched.h).
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// seccompFilter returns the classic BPF program. Each rule is self-contained, so no
// jump leaves it and the order does not matter. Calls of a foreign ABI kill; clone3,
// whose flags cannot be seen, does not exist, and libraries fall back to clone;
// sockets are of the families unix, IP and netlink, not of vsock, which reaches the
// host.
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

		// Offsets in struct seccomp_data (linux/seccomp.h).
		nr, arch, arg0 = 0, 4, 16
	)
	op := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(code uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: code, K: k, Jt: yes, Jf: no}
	}
	f := []unix.SockFilter{
		op(load, arch),
		jump(equal, auditArch, 1, 0),
		op(ret, kill),
		op(load, nr),
		jump(atMin, 0x40000000, 0, 1), // x32 calls on x86-64; no such numbers elsewhere
		op(ret, kill),
	}
	for _, call := range deniedCalls {
		f = append(f, jump(equal, uint32(call), 0, 1), op(ret, eperm))
	}
	return append(f,
		jump(equal, unix.SYS_CLONE3, 0, 1),
		op(ret, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS)),

		jump(equal, unix.SYS_CLONE, 0, 4),
		op(load, arg0),
		jump(anyBit, newNamespaces, 0, 1),
		op(ret, eperm),
		op(ret, allow),

		jump(equal, unix.SYS_SOCKET, 0, 7),
		op(load, arg0),
		jump(equal, unix.AF_UNIX, 4, 0),
		jump(equal, unix.AF_INET, 3, 0),
		jump(equal, unix.AF_INET6, 2, 0),
		jump(equal, unix.AF_NETLINK, 1, 0),
		op(ret, eperm),
		op(ret, allow),

		op(ret, allow))
}
