#!/bin/sh
# Builds the peer of the boot benchmark: Debian 13's cloud kernel and Debian's own
# docker.io, docker-compose, containerd and runc on a squashfs root, with a minimal
# first process. Usage: peer.sh OUTDIR. Needs apt, dpkg-deb, mksquashfs, depmod, go.
set -eu
out=$1
here=$(cd "$(dirname "$0")" && pwd)
[ -e "$out/ready" ] && exit 0
mkdir -p "$out"
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(REPO_URI)|$(RELEASE)|$(COMPONENT)' 'Created-By: Packages' |
	awk -F'|' -v c="$codename" '$2==c && $3=="main" {print $1; exit}')
[ -n "$mirror" ] || { echo "apt names no Debian archive to derive the mirror from" >&2; exit 1; }
apt="$out/apt"
mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
: >"$apt/state/status"
for suite in trixie trixie-updates; do
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
done >"$apt/sources.list"
run_apt() {
	apt-get -q -o Dir::State="$apt/state" -o Dir::State::status="$apt/state/status" -o Dir::Cache="$apt/cache" \
		-o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferences=/dev/null \
		-o Dir::Etc::preferencesparts=/dev/null -o APT::Architecture=amd64 -o APT::Sandbox::User=root "$@"
}
run_apt update >"$out/log" 2>&1
run_apt install -y --download-only --no-install-recommends \
	linux-image-cloud-amd64 docker.io docker-compose containerd runc iptables ca-certificates e2fsprogs kmod >>"$out/log" 2>&1
root="$out/root"
rm -rf "$root"
mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib" "$root/usr/lib64"
for link in bin sbin lib lib64; do ln -s "usr/$link" "$root/$link"; done
for deb in "$apt"/cache/archives/*.deb; do
	case $(basename "$deb") in
	linux-image-*) dpkg-deb -x "$deb" "$out/kernel" ;;
	*) dpkg-deb -x "$deb" "$root" ;;
	esac
done
version=$(ls "$out/kernel/usr/lib/modules" | head -1)
cp "$out/kernel/boot/vmlinuz-$version" "$out/vmlinuz"
depmod -b "$out/kernel/usr" "$version"
# What update-alternatives and the maintainer scripts would have made.
ln -sf xtables-nft-multi "$root/usr/sbin/iptables"
ln -sf xtables-nft-multi "$root/usr/sbin/ip6tables"
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/tmp" "$root/data" "$root/var/lib/docker" "$root/var/lib/containerd" "$root/etc/docker" "$root/modules"
[ -e "$root/var/run" ] || ln -s /run "$root/var/run"
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
echo 'docker:x:999:' >>"$root/etc/group"
ln -sf /run/resolv.conf "$root/etc/resolv.conf"
rm -f "$out/root.squashfs"
mksquashfs "$root" "$out/root.squashfs" -comp lz4 -noappend -no-progress -all-root >>"$out/log"
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$out/init" "$here/peerinit"
# The initramfs: the first process and the modules it needs, in load order.
ird="$out/initrd"
rm -rf "$ird"
mkdir -p "$ird/modules" "$ird/dev" "$ird/proc" "$ird/sys" "$ird/root"
cp "$out/init" "$ird/init"
: >"$ird/modules/order"
add() {
	modprobe -d "$out/kernel/usr" -S "$version" --show-depends "$1" 2>/dev/null | awk '$1=="insmod"{print $2}' | while read -r ko; do
		name=$(basename "$ko" .xz)
		grep -qx "$name" "$ird/modules/order" && continue
		case $ko in
		*.xz) xz -dc "$ko" >"$ird/modules/$name" ;;
		*) cp "$ko" "$ird/modules/$name" ;;
		esac
		echo "$name" >>"$ird/modules/order"
	done
}
for m in virtio_blk virtio_net virtio_rng squashfs overlay loop ext4 bridge veth br_netfilter nf_tables nft_compat \
	nft_chain_nat nft_nat nft_masq nft_ct nf_conntrack_netlink xt_nat xt_addrtype xt_conntrack xt_MASQUERADE \
	xt_comment xt_mark xt_tcpudp nft_fib nft_fib_ipv4 nft_fib_ipv6; do add $m; done
(cd "$ird" && find . | sort | cpio --quiet -o -H newc -R 0:0) >"$out/initrd.cpio"
touch "$out/ready"
