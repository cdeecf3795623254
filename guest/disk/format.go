// SPDX-License-Identifier: Apache-2.0

package disk

import "strconv"

// Mke2fsArgs returns the command that makes an ext4 file system on an empty
// device whose content does not outlive the boot: no journal (a crash loses the
// key, and with it everything), lazily initialised tables, no reserved blocks, no
// discard (dm-crypt does not pass it on).
//
// sizeBytes bounds the number of inodes on small disks as mke2fs would.
func Mke2fsArgs(mke2fs, device string) []string {
	return []string{
		mke2fs, "-q", "-F", "-t", "ext4", "-b", strconv.Itoa(cryptSector), "-m", "0",
		"-O", "^has_journal,^resize_inode,^metadata_csum,uninit_bg",
		"-E", "lazy_itable_init=1,nodiscard",
		"-L", "dstack-data", device,
	}
}
