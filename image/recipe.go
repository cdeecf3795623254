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
var debianPackages = append([]string{
	"busybox-static", // debug only
	"ca-certificates",
	"crun", "libcap2", "libseccomp2", "libsystemd0", "libyajl2",
	"e2fsprogs", "libblkid1", "libcom-err2", "libext2fs2t64", "libuuid1",
	"libc6",
	"nftables", "libbsd0", "libedit2", "libgmp10", "libjansson4", "libmd0", "libmnl0", "libnftables1", "libnftnl11", "libtinfo6", "libxtables12",
	"ovmf",
	"tini",
	"xfsprogs", "libinih1", "liburcu8t64",
}, scriptsPackages...)

// scriptsPackages are the further inputs of the scripts layer.
var scriptsPackages = []string{
	"bash-static",
	"coreutils", "libacl1", "libattr1", "libselinux1", "libpcre2-8-0", "libssl3t64",
	"curl", "libcurl4t64", "libbrotli1", "libidn2-0", "libnghttp2-14", "libnghttp3-9", "libpsl5t64", "libssh2-1t64", "libunistring5", "libzstd1", "zlib1g",
	"libgssapi-krb5-2", "libk5crypto3", "libkeyutils1", "libkrb5-3", "libkrb5support0", // curl: Kerberos
	"libldap2", "libsasl2-2", // curl: LDAP
	"librtmp1", "libffi8", "libgnutls30t64", "libhogweed6t64", "libnettle8t64", "libp11-kit0", "libtasn1-6", // curl: RTMP
	"findutils", "grep", "gzip", "mawk", "sed", "tar",
	"jq", "libjq1", "libonig5",
}

// debianFile is a file of a package and where it goes.
type debianFile struct{ pkg, from, to string }

// debianFiles are the programs that the root takes from packages. Libraries follow
// from the programs (see closure); nothing else of a package is used.
var debianFiles = []debianFile{
	{"crun", "usr/bin/crun", "usr/bin/crun"},
	{"e2fsprogs", "usr/sbin/e2fsck", "usr/bin/e2fsck"},
	{"e2fsprogs", "usr/sbin/mke2fs", "usr/bin/mke2fs"},
	{"e2fsprogs", "usr/sbin/resize2fs", "usr/bin/resize2fs"},
	{"e2fsprogs", "etc/mke2fs.conf", "etc/mke2fs.conf"},
	{"nftables", "usr/sbin/nft", "usr/bin/nft"},
	{"tini", "usr/bin/tini-static", "usr/bin/docker-init"},
	{"xfsprogs", "usr/sbin/mkfs.xfs", "usr/bin/mkfs.xfs"},
	{"xfsprogs", "usr/sbin/xfs_growfs", "usr/bin/xfs_growfs"},
	{"xfsprogs", "usr/sbin/xfs_repair", "usr/bin/xfs_repair"},
}

// debugFiles are what the debug flavour adds: a shell and the usual tools.
var debugFiles = []debianFile{
	{"busybox-static", "usr/bin/busybox", "usr/bin/busybox"},
}

var debugApplets = []string{
	"sh", "ls", "cat", "cp", "mv", "rm", "mkdir", "mount", "umount", "ps", "top", "df", "du", "dmesg", "grep", "sed", "awk", "find", "head", "tail",
	"less", "vi", "ip", "ping", "netstat", "nslookup", "wget", "nc", "hexdump", "stat", "sync", "sleep", "env", "id", "kill", "free", "uptime", "lsmod", "poweroff", "reboot",
}

// What the scripts layer has (design.md §6). The shell, the text tools and curl are
// those of Debian, which upstream's system has as well: busybox differs in options
// that scripts use (`date -d`, `grep -P`, `sed -z`, `sort -V`), and has no curl or
// jq. The shell is static; of the others Debian has no static builds.
var scriptsFiles = []debianFile{
	{"bash-static", "usr/bin/bash-static", "usr/bin/bash"},
	{"coreutils", "usr/libexec/coreutils/libstdbuf.so", "usr/libexec/coreutils/libstdbuf.so"}, // of stdbuf
	{"curl", "usr/bin/curl", "usr/bin/curl"},
	{"jq", "usr/bin/jq", "usr/bin/jq"},
	{"mawk", "usr/bin/mawk", "usr/bin/mawk"},
	{"tar", "usr/bin/tar", "usr/bin/tar"},
}

// scriptsPrograms are the packages of which the layer has every program.
var scriptsPrograms = []string{"coreutils", "findutils", "grep", "gzip", "sed"}

var scriptsAliases = map[string]string{"usr/bin/sh": "usr/bin/bash", "usr/bin/awk": "usr/bin/mawk"}

// scriptsLinks: OpenSSL looks for the certificates in a directory of its own.
var scriptsLinks = map[string]string{"usr/lib/ssl/cert.pem": "../../../etc/ssl/certs/ca-certificates.crt"}

// scriptsBinds are empty files over which the guest mounts the engine, which is
// `docker` and `docker-compose` when called so. A client of its own would add 9 MB
// to a prod image and 12 MB to a sim image; within the engine it adds 0.8 MB.
var scriptsBinds = []string{"usr/bin/docker", "usr/bin/docker-compose"}

var scriptsTexts = map[string]string{
	"etc/passwd":        "root:x:0:0:root:/root:/usr/bin/bash\n",
	"etc/group":         "root:x:0:\n",
	"etc/hosts":         texts["etc/hosts"],
	"etc/nsswitch.conf": texts["etc/nsswitch.conf"],
}

// mountPoints are the empty directories of the read-only root and scripts layer.
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
