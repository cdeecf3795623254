#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Installs the Debian packages that building the image, the demo and the tests
# need. Safe to run again: when everything is there it does nothing, needs no
# root and no network. Debian 12 takes QEMU from its backports suite, since
# QEMU 7.2 corrupts newer kernels under emulation; Debian 13 has a good one.
#
#   host-packages.sh           install what is missing
#   host-packages.sh --check   only say what is missing; exit 1 if anything is
set -eu
export LC_ALL=C

# Building: kernel, engine, root file system.
packages="build-essential bc bison cpio flex kmod libelf-dev libssl-dev lz4 make xz-utils zstd squashfs-tools"
# Running and testing.
packages="$packages qemu-utils ovmf swtpm nftables iproute2 ca-certificates curl"
# Sealed disks are tested with the programs that make and check file systems.
packages="$packages e2fsprogs xfsprogs"
# The verifier page is tested in a real browser.
packages="$packages chromium chromium-driver"
# The guest's clock is tested against real time servers, some of which lie.
# As a package, chrony takes the place of another time daemon of the machine.
packages="$packages chrony faketime"
# Upstream's published SDKs are tested with whatever Node and Python are here.
command -v node >/dev/null && command -v npm >/dev/null || packages="$packages nodejs npm"
python3 -c 'import venv, ensurepip' 2>/dev/null || packages="$packages python3-venv"
qemu="qemu-system-x86"
qemu_least=10

say() { printf 'host-packages: %s\n' "$*"; }
die() { printf 'host-packages: %s\n' "$*" >&2; exit 1; }

installed() {
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null || true)" = installed ]
}

# The major version of an installed QEMU, or 0: "1:10.0.2+ds-2" is 10.
qemu_major() {
	installed "$qemu" || { echo 0; return; }
	v=$(dpkg-query -W -f '${Version}' "$qemu")
	v=${v#*:}
	echo "${v%%.*}"
}

command -v dpkg-query >/dev/null || die "this is not a Debian system; Debian 12 or 13 is needed"

missing=
for p in $packages; do
	installed "$p" || missing="$missing $p"
done
[ "$(qemu_major)" -ge "$qemu_least" ] || missing="$missing $qemu"

if [ -z "$missing" ]; then
	say "everything is installed"
	exit 0
fi
if [ "${1:-}" = --check ]; then
	say "missing:$missing"
	exit 1
fi

as_root=
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || die "missing:$missing; run this as root, or install sudo"
	if ! sudo -n true 2>/dev/null && ! [ -t 0 ]; then
		die "missing:$missing; sudo asks for a password: run scripts/host-packages.sh by hand, once"
	fi
	as_root=sudo
fi
say "installing$missing"

. /etc/os-release
codename=${VERSION_CODENAME:-}

apt() {
	$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 "$@"
}

# The major version of QEMU that a plain installation would take, or 0.
qemu_default() {
	v=$(apt-cache policy "$qemu" | awk '$1 == "Candidate:" { print $2 }')
	v=${v#*:}
	v=${v%%.*}
	case $v in '' | *[!0-9]*) echo 0 ;; *) echo "$v" ;; esac
}

# Does a version of QEMU that is new enough lie in a suite apt knows? Prints its
# version.
qemu_candidate() {
	apt-cache madison "$qemu" 2>/dev/null | while IFS='|' read -r _ version _; do
		version=$(echo "$version" | tr -d ' ')
		v=${version#*:}
		if [ "${v%%.*}" -ge "$qemu_least" ] 2>/dev/null; then
			echo "$version"
			break
		fi
	done
}

apt update

case " $missing " in
*" $qemu "*) wanted=yes ;;
*) wanted= ;;
esac
if [ -n "$wanted" ] && [ "$(qemu_default)" -lt "$qemu_least" ]; then
	if [ -z "$(qemu_candidate)" ]; then
		# Enable the backports of the host's own release, from the archive that
		# apt already uses: mirror and proxy stay the administrator's choice.
		uri=$(apt-get indextargets --format '$(RELEASE)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' |
			awk -F'|' -v r="$codename" '($1 == r || $1 == "stable") && $2 == "main" { print $3; exit }')
		[ -n "$uri" ] || die "QEMU $qemu_least or newer is needed, and apt has no source for '$codename main' from which to derive its backports; add the backports suite by hand"
		keyring=/usr/share/keyrings/debian-archive-keyring.gpg
		list=/etc/apt/sources.list.d/dstack-backports.list
		say "enabling $codename-backports in $list"
		if [ -e "$keyring" ]; then option="[signed-by=$keyring] "; else option=; fi
		echo "deb $option$uri $codename-backports main" | $as_root tee "$list" >/dev/null
		apt update
	fi
	version=$(qemu_candidate)
	[ -n "$version" ] || die "no suite that apt knows has $qemu $qemu_least or newer"
	# QEMU's parts must be of one version. Only they are asked for by suite, so
	# that everything else stays the release's own: `-t` would also take
	# libraries from there, and leave libelf-dev without its libelf1.
	suite=$(apt-cache madison "$qemu" | awk -F'|' -v v="$version" '{ gsub(/ /, "", $2); split($3, w, " "); split(w[2], s, "/") } $2 == v { print s[1]; exit }')
	missing=$(echo " $missing " | sed "s/ $qemu / /; s/ qemu-utils / /")
	missing="$missing $qemu/$suite qemu-utils/$suite qemu-system-common/$suite qemu-system-data/$suite seabios/$suite"
fi
# shellcheck disable=SC2086
apt install --no-install-recommends $missing

[ "$(qemu_major)" -ge "$qemu_least" ] || die "$qemu is still older than $qemu_least"
say "done"
