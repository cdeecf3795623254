// SPDX-License-Identifier: Apache-2.0

// Package disk finds the guest's block devices and sets up what it uses: the read-only
// root and verity volumes under dm-verity, and the data disk, sealed or, with the key
// provider none, under dm-crypt alone with a key that ends with the boot.
//
// Everything on a disk is under the host's control. Root and volumes are safe because
// their hashes are measured and the kernel checks each block.
//
// A sealed disk ([Sealer]) has, from below: the disk; dm-integrity with HMAC-SHA256
// over salt, sector number and ciphertext, and a keyed journal; dm-crypt with
// AES-256-XTS; the file system. Guarantees: a block that can be read was written under
// the volume's keys at that place, else the read fails; nothing that the disk says
// chooses an algorithm, a key or an offset (threats.md E01); each byte that is checked
// is the byte that is used, since the record is read once and dm-integrity has its
// superblock from memory (E02, E04); a wiped, foreign, shorter or someone else's disk
// is refused and not written (E01, E05). Not guaranteed: that a block, or the whole
// disk, is the newest that was written there (E03), nor that the host does not see
// which blocks are used and when.
//
// The keys are derived from the app's disk key, which is trusted to be of this app and
// instance only. They go to the kernel by ioctl: no tool sees a table, hence no key in
// an argument list, and buffers that carried a key are zeroed afterwards. What is in
// the memory file behind the superblock is not secret.
//
// A block that was never written cannot be read, because making it readable would mean
// to write the whole disk at the first boot. File systems do not read such blocks, but
// for what format, growth and check take care of.
//
// Implements spec/guest-os.md §2.4, §2.5, §7 and §9; ioctl layouts from
// include/uapi/linux.
package disk
