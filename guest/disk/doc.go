// SPDX-License-Identifier: Apache-2.0

// Package disk finds the guest's block devices and sets up the two it uses: the
// read-only root under dm-verity and the data disk under dm-crypt.
//
// Everything on a disk is under the host's control. The root is safe because
// its hash is on the measured kernel command line and the kernel checks each
// block. The data disk has no header at all: its parameters are constants in this
// measured code and its key never touches the disk, so there is no on-disk
// metadata to forge (threats.md E01, E02). AES-XTS gives secrecy only; a host can
// still garble or roll back blocks (E03, E04).
//
// Device-mapper devices are made by ioctl; no tool sees a table, hence no key in
// an argument list, and the buffer that carried a key is zeroed afterwards.
//
// Implements spec/guest-os.md §2.4, §2.5 and §7; ioctl layout from
// include/uapi/linux/dm-ioctl.h.
package disk
