// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	pageSize = 4096
	// minSwap is the smallest swap space that is worth its bookkeeping.
	minSwap = 1 << 20
)

// Swap is swap space on the sealed volume under a key that only the kernel has and
// that ends with the boot (threats.md E07). What the host sees is encrypted with that
// key and authenticated with the volume's.
//
// The blocks belong to a file without a name on the mounted file system, which keeps
// them from any other use and gives them back when the machine stops in whatever way.
// They are mapped below dm-crypt of the volume, so that nothing is encrypted twice,
// no file system runs while memory is short, and no loop device is needed.
type Swap struct {
	file   *os.File
	mapper *Mapper
	names  []string
	node   string
}

// AddSwap makes and enables size bytes of swap space, rounded down to whole pages,
// whose blocks come from the volume's file system mounted at dir. Code disk_swap.
func (v *Volume) AddSwap(dir string, size uint64) (_ *Swap, err error) {
	size -= size % pageSize
	if size < minSwap || size > v.Size {
		return nil, fault.New("disk_swap", "swap_size %d is not between %d and the %d bytes of the data disk", size, minSwap, v.Size)
	}
	s := &Swap{mapper: v.mapper}
	defer func() {
		if err != nil {
			s.Close()
			err = fault.Wrap(err, "disk_swap", "make swap space on the data disk").WithFix("make the data disk larger, or swap_size smaller")
		}
	}()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	s.file = os.NewFile(uintptr(fd), "swap")
	if err := unix.Fallocate(fd, 0, 0, int64(size)); err != nil {
		return nil, err
	}
	if err := s.file.Sync(); err != nil {
		return nil, err
	}
	targets, err := extents(s.file, size, v.integrity, v.Size)
	if err != nil {
		return nil, err
	}
	blocks := v.names[len(v.names)-1] + "-swap-blocks"
	node, err := s.mapper.Create(blocks, "", false, targets...)
	if err != nil {
		return nil, err
	}
	s.names = append(s.names, blocks)
	var key [CryptKeySize]byte
	defer clear(key[:])
	if _, err := rand.Read(key[:]); err != nil {
		return nil, err
	}
	t, err := CryptTarget(node, size, &key)
	if err != nil {
		return nil, err
	}
	name := v.names[len(v.names)-1] + "-swap"
	swap, err := s.mapper.Create(name, "", false, t)
	if err != nil {
		return nil, err
	}
	s.names = append(s.names, name)
	f, err := os.OpenFile(swap, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.WriteAt(swapHeader(size), 0); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	if err := swapon(swap); err != nil {
		return nil, fmt.Errorf("swapon: %w", err)
	}
	s.node = swap
	return s, nil
}

// Close disables the swap space and gives its blocks back.
func (s *Swap) Close() error {
	if s.node != "" {
		if err := swapoff(s.node); err != nil {
			return fmt.Errorf("swapoff: %w", err)
		}
		s.node = ""
	}
	for len(s.names) > 0 {
		last := len(s.names) - 1
		if err := removeSoon(s.mapper, s.names[last]); err != nil {
			return err
		}
		s.names = s.names[:last]
	}
	if s.file != nil {
		return s.file.Close()
	}
	return nil
}

// swapHeader is the first page of swap space (include/linux/swap.h, version 1).
func swapHeader(size uint64) []byte {
	b := make([]byte, pageSize)
	binary.LittleEndian.PutUint32(b[1024:], 1)
	binary.LittleEndian.PutUint32(b[1028:], uint32(min(size/pageSize, 1<<32)-1)) // the last page
	copy(b[pageSize-10:], "SWAPSPACE2")
	return b
}

func swapSyscall(number uintptr, path string) error {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(number, uintptr(unsafe.Pointer(p)), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func swapon(path string) error  { return swapSyscall(unix.SYS_SWAPON, path) }
func swapoff(path string) error { return swapSyscall(unix.SYS_SWAPOFF, path) }

// FIEMAP (include/uapi/linux/fiemap.h).
const (
	fsIocFiemap  = 0xc020660b
	fiemapHeader = 32
	fiemapExtent = 56
	// Where the blocks are is not known, or they are not whole blocks of this file.
	fiemapUnusable = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000
	fiemapSync     = 0x1
)

// extents returns the table that maps the blocks of a file in order, as they lie on
// device; limit is the size in bytes of the device of the file system.
func extents(f *os.File, size uint64, device string, limit uint64) ([]Target, error) {
	const batch = 512
	var targets []Target
	for at := uint64(0); at < size; {
		b := make([]byte, fiemapHeader+batch*fiemapExtent)
		binary.LittleEndian.PutUint64(b[0:], at)
		binary.LittleEndian.PutUint64(b[8:], size-at)
		binary.LittleEndian.PutUint32(b[16:], fiemapSync)
		binary.LittleEndian.PutUint32(b[24:], batch)
		if err := ioctl(f, fsIocFiemap, b); err != nil {
			return nil, fmt.Errorf("ask where the blocks are: %w", err)
		}
		mapped := binary.LittleEndian.Uint32(b[20:])
		got, next, err := extentTargets(b[fiemapHeader:], int(min(mapped, batch)), at, size, device, limit)
		if err != nil {
			return nil, err
		}
		if next == at {
			return nil, fmt.Errorf("the file has a hole at byte %d", at)
		}
		targets, at = append(targets, got...), next
		if len(targets) > maxTargets {
			return nil, fmt.Errorf("the file system is too fragmented: more than %d pieces", maxTargets)
		}
	}
	return targets, nil
}

// extentTargets maps n extents of a reply that begin at byte at of the file.
func extentTargets(b []byte, n int, at, size uint64, device string, limit uint64) ([]Target, uint64, error) {
	var targets []Target
	for ; n > 0 && at < size; n, b = n-1, b[fiemapExtent:] {
		logical, physical := binary.LittleEndian.Uint64(b[0:]), binary.LittleEndian.Uint64(b[8:])
		length, flags := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint32(b[40:])
		if logical > at || at-logical >= length {
			return nil, 0, fmt.Errorf("the file has a hole at byte %d", at)
		}
		physical, length = physical+(at-logical), length-(at-logical)
		length = min(length, size-at)
		if flags&fiemapUnusable != 0 || (physical|length)%pageSize != 0 || physical == 0 || physical > limit || length > limit-physical {
			return nil, 0, fmt.Errorf("blocks at %d, %d bytes, flags %#x cannot be mapped", physical, length, flags)
		}
		targets = append(targets, Target{Start: at / 512, Length: length / 512, Type: "linear", Params: fmt.Appendf(nil, "%s %d", device, physical/512)})
		at += length
	}
	return targets, at, nil
}
