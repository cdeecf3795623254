// SPDX-License-Identifier: Apache-2.0

package image

// Version is the version of dstack-os. It continues upstream's numbering (whose
// latest is 0.6.0), since manifests of both demand features by it
// (requirements.os_version).
const Version = "0.7.0"

// securityEpoch rises when older images must no longer get keys.
const securityEpoch = 1

// lockSuites are the Debian suites that inputs come from.
var lockSuites = []string{"trixie", "trixie-updates", "trixie-backports"}

// debianPackages are the inputs from Debian, without the kernel source, whose
// name carries its version. The list is by hand and minimal: a library that is
// missing fails the build by name.
var debianPackages = []string{
	"busybox-static", // debug only
	"ca-certificates",
	"crun", "libcap2", "libseccomp2", "libsystemd0", "libyajl2",
	"e2fsprogs", "libblkid1", "libcom-err2", "libext2fs2t64", "libuuid1",
	"libc6",
	"nftables", "libbsd0", "libedit2", "libgmp10", "libjansson4", "libmd0", "libmnl0", "libnftables1", "libnftnl11", "libtinfo6", "libxtables12",
	"ovmf",
	"tini",
}

// debianFiles maps the programs taken from packages to where they go. Libraries
// follow from the programs (see closure); nothing else of a package is used.
var debianFiles = []struct{ pkg, from, to string }{
	{"crun", "usr/bin/crun", "usr/bin/crun"},
	{"e2fsprogs", "usr/sbin/mke2fs", "usr/bin/mke2fs"},
	{"e2fsprogs", "etc/mke2fs.conf", "etc/mke2fs.conf"},
	{"nftables", "usr/sbin/nft", "usr/bin/nft"},
	{"tini", "usr/bin/tini-static", "usr/bin/docker-init"},
}

// debugFiles are what the debug flavour adds: a shell and the usual tools.
var debugFiles = []struct{ pkg, from, to string }{
	{"busybox-static", "usr/bin/busybox", "usr/bin/busybox"},
}

var debugApplets = []string{
	"sh", "ls", "cat", "cp", "mv", "rm", "mkdir", "mount", "umount", "ps", "top", "df", "du", "dmesg", "grep", "sed", "awk", "find", "head", "tail",
	"less", "vi", "ip", "ping", "netstat", "nslookup", "wget", "nc", "hexdump", "stat", "sync", "sleep", "env", "id", "kill", "free", "uptime", "lsmod", "poweroff", "reboot",
}

// mountPoints are the empty directories of the read-only root.
var mountPoints = []struct {
	path string
	mode uint32
}{
	{"dev", 0o755}, {"proc", 0o555}, {"sys", 0o555}, {"run", 0o755}, {"tmp", 0o1777}, {"mnt", 0o755}, {"persistent", 0o755},
	{"root", 0o700}, {"home", 0o755}, {"var/lib", 0o755}, {"var/log", 0o755}, {"var/tmp", 0o1777},
	// Upstream's work directory; applications mount files below it.
	{"dstack", 0o755},
}

// links make the root look as programs expect: one directory of programs, /var/run
// is /run, the resolver's file is written at boot.
var links = map[string]string{
	"bin": "usr/bin", "sbin": "usr/bin", "usr/sbin": "bin", "lib": "usr/lib", "lib64": "usr/lib64",
	"usr/lib64/ld-linux-x86-64.so.2": "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
	"var/run":                        "../run",
	"etc/resolv.conf":                "/run/resolv.conf",
	"etc/os-release":                 "../usr/lib/os-release",
	"etc/mtab":                       "../proc/self/mounts",
}

// aliases are further names of a program, as hard links: dockerd looks for a
// "runc" beside the runtime it is configured with.
var aliases = map[string]string{"usr/bin/runc": "usr/bin/crun"}

// texts are the written files of the root. The agent's user is 990
// (design.md §3, "Privilege").
var texts = map[string]string{
	"etc/passwd":        "root:x:0:0:root:/root:/usr/bin/nologin\ndstack-agent:x:990:990:dstack guest agent:/:/usr/bin/nologin\n",
	"etc/group":         "root:x:0:\ndstack-agent:x:990:\n",
	"etc/hosts":         "127.0.0.1 localhost\n::1 localhost\n",
	"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}

// cmdlineBase is the kernel command line without the verity arguments: that of
// guest-os.md §2.3, with three differences. panic=-1 powers off at once under
// `-no-reboot` instead of waiting a second; `quiet loglevel=3` keeps the
// console, which is slow and read by people, to errors and our own lines.
const cmdlineBase = "console=ttyS0 init=/init panic=-1 quiet loglevel=3 net.ifnames=0 biosdevname=0 mce=off oops=panic pci=noearly pci=nommconf " +
	"random.trust_cpu=y random.trust_bootloader=n tsc=reliable no-kvmclock"
