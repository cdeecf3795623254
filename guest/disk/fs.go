// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

// FS is a file system of the data disk. The numbers are those of the record.
type FS uint32

const (
	Ext4 FS = 1
	XFS  FS = 2
)

// ParseFS maps storage_fs of a manifest: the default and "zfs" of older manifests
// mean ext4; code storage_fs for what is not known.
func ParseFS(name string) (FS, error) {
	switch name {
	case "", "zfs", "ext4":
		return Ext4, nil
	case "xfs":
		return XFS, nil
	}
	return 0, fault.New("storage_fs", "storage_fs %q is not a file system of this system", name).WithFix("use ext4 or xfs")
}

// String returns the name that mount(2) knows.
func (f FS) String() string {
	switch f {
	case Ext4:
		return "ext4"
	case XFS:
		return "xfs"
	}
	return "file system " + strconv.FormatUint(uint64(f), 10)
}

// Tools are the paths of the programs that make and check file systems.
type Tools struct{ Mke2fs, E2fsck, MkfsXFS string }

// Mke2fsArgs returns the command that makes an ext4 file system on an empty
// device whose content does not outlive the boot: no journal (a crash loses the
// key, and with it everything), lazily initialised tables, no reserved blocks, no
// discard (dm-crypt does not pass it on).
func Mke2fsArgs(mke2fs, device string) []string {
	return []string{
		mke2fs, "-q", "-F", "-t", "ext4", "-b", strconv.Itoa(cryptSector), "-m", "0",
		"-O", "^has_journal,^resize_inode,^metadata_csum,uninit_bg",
		"-E", "lazy_itable_init=1,nodiscard",
		"-L", "dstack-data", device,
	}
}

// SealedExt4Args returns the command that makes the ext4 file system of a sealed
// volume of size bytes: with a journal, which is written in full since its replay
// reads past its end and a block that was never written cannot be read; inode tables
// are written by the kernel in the background. Checksums of metadata notice most
// blocks that a host rolled back singly. All features are named, since prepare and
// prepareGrowth know their layout. Room to grow online to 64 times the size;
// beyond, ext4 finds its own.
func SealedExt4Args(mke2fs, device string, size uint64) []string {
	blocks := size / cryptSector
	journal := min(max(size>>20/128, 4), 32) // MiB
	return []string{
		mke2fs, "-q", "-F", "-t", "ext4", "-b", strconv.Itoa(cryptSector), "-m", "0", "-e", "remount-ro",
		"-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,flex_bg,64bit,sparse_super," +
			"large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
		"-J", "size=" + strconv.FormatUint(journal, 10),
		"-E", "lazy_itable_init=1,lazy_journal_init=0,nodiscard,resize=" + strconv.FormatUint(min(blocks*64, 1<<32-1), 10),
		"-L", "dstack-data", device,
	}
}

// ext4Group is the blocks of a group: as many as a bitmap of one block has bits.
const ext4Group = 8 * cryptSector

// ext4Copies returns the blocks with copies of the superblock on a file system of the
// given number of 4096-byte blocks: the first of groups 1 and of the powers of 3, 5
// and 7 (feature sparse_super).
func ext4Copies(blocks uint64) []uint64 {
	var copies []uint64
	add := func(n uint64) bool {
		if n*ext4Group >= blocks {
			return false
		}
		copies = append(copies, n*ext4Group)
		return true
	}
	add(1)
	for _, base := range []uint64{3, 5, 7} {
		for n := base; add(n); n *= base {
		}
	}
	return copies
}

// SealedXFSArgs returns the command that makes the XFS file system of a sealed
// volume; mkfs.xfs writes the log in full by itself.
func SealedXFSArgs(mkfs, device string) []string {
	return []string{
		mkfs, "-q", "-f", "-K", "-b", "size=" + strconv.Itoa(cryptSector), "-s", "size=" + strconv.Itoa(cryptSector),
		"-m", "crc=1", "-L", "dstack-data", device,
	}
}

// E2fsckArgs returns the command that brings an ext4 file system in order after a
// crash, without asking; exit status 0 and 1 mean that it is.
func E2fsckArgs(e2fsck, device string) []string {
	return []string{e2fsck, "-p", "-E", "readahead_kb=0", device}
}

// Requests of ext4 (fs/ext4/ext4.h) and XFS (fs/xfs/libxfs/xfs_fs.h).
const (
	ext4Resize  = 0x40086610 // _IOW('f', 16, __u64)
	xfsGeometry = 0x80705864 // _IOR('X', 100, struct xfs_fsop_geom_v1)
	xfsGrow     = 0x4010586e // _IOW('X', 110, struct xfs_growfs_data)
)

func ioctl(f *os.File, request uintptr, b []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&b[0])))
	if errno != 0 {
		return errno
	}
	return nil
}

// growFS makes the mounted file system as large as its device of size bytes. One
// that is already stays as it is.
func growFS(fs FS, dir string, size uint64) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	blocks := size / cryptSector
	switch fs {
	case Ext4:
		b := make([]byte, 8)
		binary.LittleEndian.PutUint64(b, blocks)
		return ioctl(d, ext4Resize, b)
	case XFS:
		geometry := make([]byte, 112)
		if err := ioctl(d, xfsGeometry, geometry); err != nil {
			return err
		}
		if binary.LittleEndian.Uint64(geometry[32:]) >= blocks {
			return nil
		}
		b := make([]byte, 16)
		binary.LittleEndian.PutUint64(b, blocks)
		copy(b[8:], geometry[28:32]) // imaxpct stays
		return ioctl(d, xfsGrow, b)
	}
	return fmt.Errorf("cannot grow %s", fs)
}
