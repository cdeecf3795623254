// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	// MinSealed and MaxSealed bound the size in bytes of a disk that can be sealed.
	MinSealed = 64 << 20
	MaxSealed = 1 << 50
)

// A Sealer opens the sealed volume of a data disk.
type Sealer struct {
	Mapper *Mapper
	// Run runs a program to its end and returns its exit status; err is that it could
	// not run. It is given no secret.
	Run   func(ctx context.Context, argv []string) (exit int, err error)
	Tools Tools
	// Name is what the devices are called in the device mapper.
	Name string

	// step is called with the name of each step of a format that is done; tests stop
	// there.
	step func(string) error
}

// SealOptions say what the caller knows of the instance.
type SealOptions struct {
	// Fresh: the instance never had a disk, so that an empty one may be formatted.
	// What says so must not be the disk, and must still say so when a boot ended
	// before anything was written.
	Fresh bool
	// FS is the file system that the manifest asks for.
	FS FS
}

// Result says what Open did beside opening.
type Result struct {
	Formatted bool // the volume was made anew and is empty
	Grown     bool // the disk is larger than the last time
}

// A Volume is an open sealed volume: a block device of which every block that is
// read was written under the volume's keys at that place, or the read fails. (It may
// be an older one: threats.md E03.)
type Volume struct {
	Node string // of the block device with the file system
	Size uint64 // of that device in bytes
	FS   FS

	mapper    *Mapper
	integrity string   // node of the authenticated device, below encryption
	names     []string // of the device-mapper devices, lowest first
}

// Open returns the volume of the disk dev under the app's disk key. The key stays
// the caller's to wipe; what is derived from it is wiped before Open returns.
//
// Codes: disk_wiped (blank, and the instance had a disk), disk_foreign (something
// else: nothing is written and no key is used), disk_key_mismatch (a record, but
// not under this key), disk_truncated, disk_fs_mismatch, disk_version, disk_size,
// disk_read, disk_map, disk_format, disk_filesystem. On error nothing stays open.
//
// A format is done in an order that lets a crash at any moment be followed by
// another Open: first a record that says "formatting", then the rest, then, when all
// of it is durable, one that says "ready". A volume is "formatting" only as long as
// no app saw it, so to format it again loses nothing.
func (s *Sealer) Open(ctx context.Context, dev Block, key *[DiskKeySize]byte, opt SealOptions) (*Volume, Result, error) {
	var none Result
	if opt.FS != Ext4 && opt.FS != XFS {
		return nil, none, fault.New("storage_fs", "%s is not a file system of this system", opt.FS)
	}
	size := dev.Size - dev.Size%cryptSector
	if size < MinSealed || size > MaxSealed {
		return nil, none, fault.New("disk_size", "the data disk %s has %d bytes; a sealed one has between %d and %d", dev.Name, dev.Size, uint64(MinSealed), uint64(MaxSealed)).
			WithFix("give the VM a disk of 1 GB or more")
	}
	head, err := readHead(dev.Path)
	if err != nil {
		return nil, none, err
	}
	switch state := stateOf(head); state.Kind {
	case Foreign:
		return nil, none, fault.New("disk_foreign", "the data disk %s is not a sealed volume: it begins with %s", dev.Name, state.What).
			WithFix("attach the disk that belongs to this instance; a new instance needs an empty one")
	case Blank:
		if !opt.Fresh {
			return nil, none, fault.New("disk_wiped", "the data disk %s is empty, but this instance had one with data", dev.Name).
				WithFix("attach the instance's disk, or deploy a new instance")
		}
		return s.format(ctx, dev, size, key, opt.FS)
	}
	recordKey, err := deriveKey(key, nil, roleRecord, 32)
	if err != nil {
		return nil, none, err
	}
	defer clear(recordKey)
	r, err := parseRecord(head, recordKey)
	if err != nil {
		return nil, none, err
	}
	if r.state == stateFormatting {
		return s.format(ctx, dev, size, key, opt.FS)
	}
	if size < r.size {
		return nil, none, fault.New("disk_truncated", "the data disk %s has %d bytes, and had %d", dev.Name, dev.Size, r.size).
			WithFix("restore the disk to its full size; it cannot shrink")
	}
	if r.fs != opt.FS {
		return nil, none, fault.New("disk_fs_mismatch", "the data disk holds %s, and the manifest asks for %s", r.fs, opt.FS).
			WithFix("set storage_fs to %s, or deploy a new instance", r.fs)
	}
	return s.reopen(ctx, dev, size, key, recordKey, r)
}

func (s *Sealer) reopen(ctx context.Context, dev Block, size uint64, key *[DiskKeySize]byte, recordKey []byte, r *record) (_ *Volume, _ Result, err error) {
	var none Result
	keys, err := deriveVolumeKeys(key, &r.seed)
	if err != nil {
		return nil, none, err
	}
	defer keys.wipe()
	v, _, err := s.activate(dev, size, keys, &r.salt)
	if err != nil {
		return nil, none, fault.Wrap(err, "disk_map", "open the sealed volume on %s", dev.Name)
	}
	v.FS = r.fs
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	if r.fs == Ext4 {
		exit, err := v.check(ctx, s.Run, E2fsckArgs(s.Tools.E2fsck, v.Node))
		if err == nil && exit > 1 {
			err = fmt.Errorf("e2fsck ended with status %d", exit)
		}
		if err != nil {
			return nil, none, fault.Wrap(err, "disk_filesystem", "check the file system of the data disk").
				WithFix("the disk was altered outside the VM or its file system is damaged; restore a backup")
		}
	}
	if size == r.size {
		return v, none, nil
	}
	// What is new was never written under the volume's keys, so none of it can be
	// read before it is. The record goes before the file system, which therefore has its
	// old size as long as the record has: when a boot ends here, the next grows again.
	if old := providedSectors(superblockSectors+(r.size-HeadSize)/512) * 512; v.Size > old {
		if err := prepareGrowth(v.Node, v.Size, r.fs); err != nil {
			return nil, none, fault.Wrap(err, "disk_filesystem", "prepare the data disk to grow")
		}
	}
	r.size, r.generation = size, r.generation+1
	if err := writeRecord(dev.Path, r.encode(recordKey)); err != nil {
		return nil, none, err
	}
	return v, Result{Grown: true}, nil
}

func (s *Sealer) format(ctx context.Context, dev Block, size uint64, key *[DiskKeySize]byte, fs FS) (_ *Volume, _ Result, err error) {
	var none Result
	did := func(name string) error {
		if s.step == nil {
			return nil
		}
		return s.step(name)
	}
	recordKey, err := deriveKey(key, nil, roleRecord, 32)
	if err != nil {
		return nil, none, err
	}
	defer clear(recordKey)
	r := &record{state: stateFormatting, fs: fs, size: size, generation: 1}
	if _, err := rand.Read(r.seed[:]); err != nil {
		return nil, none, err
	}
	if err := writeRecord(dev.Path, r.encode(recordKey)); err != nil {
		return nil, none, err
	}
	if err := did("record formatting"); err != nil {
		return nil, none, err
	}
	keys, err := deriveVolumeKeys(key, &r.seed)
	if err != nil {
		return nil, none, err
	}
	defer keys.wipe()
	v, salt, err := s.activate(dev, size, keys, nil)
	if err != nil {
		return nil, none, fault.Wrap(err, "disk_map", "make the sealed volume on %s", dev.Name)
	}
	r.salt, v.FS = salt, fs
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	if err := did("integrity"); err != nil {
		return nil, none, err
	}
	if err := prepare(v.Node, v.Size, fs); err != nil {
		return nil, none, fault.Wrap(err, "disk_format", "clear what the volume's file system reads")
	}
	if err := did("cleared"); err != nil {
		return nil, none, err
	}
	args := SealedExt4Args(s.Tools.Mke2fs, v.Node, v.Size)
	if fs == XFS {
		args = SealedXFSArgs(s.Tools.MkfsXFS, v.Node)
	}
	exit, err := s.Run(ctx, args)
	if err == nil && exit != 0 {
		err = fmt.Errorf("%s ended with status %d", args[0], exit)
	}
	if err != nil {
		return nil, none, fault.Wrap(err, "disk_format", "make a file system on the data disk")
	}
	if err := syncDevice(v.Node); err != nil {
		return nil, none, fault.Wrap(err, "disk_format", "write the data disk")
	}
	if err := did("file system"); err != nil {
		return nil, none, err
	}
	r.state = stateReady
	if err := writeRecord(dev.Path, r.encode(recordKey)); err != nil {
		return nil, none, err
	}
	if err := did("record ready"); err != nil {
		return nil, none, err
	}
	return v, Result{Formatted: true}, nil
}

// activate stacks the devices: the superblock from memory and the disk behind it,
// dm-integrity over them, dm-crypt over that. Without a salt the volume is new: the
// kernel finds an empty superblock, writes journal and superblock, and draws the
// salt, which is returned.
func (s *Sealer) activate(dev Block, size uint64, keys *volumeKeys, salt *[integritySalt]byte) (_ *Volume, drawn [integritySalt]byte, err error) {
	payload := (size - HeadSize) / 512
	sectors := superblockSectors + payload
	provided := providedSectors(sectors)
	v := &Volume{Size: provided * 512, mapper: s.Mapper}
	want := make([]byte, superblockSize)
	if salt != nil {
		want = superblock(provided, salt, keys.journal)
	}
	front, err := newRAM(s.Mapper.Dev, want)
	if err != nil {
		return nil, drawn, err
	}
	defer front.close()
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	node, err := v.add(s.Name+"-disk",
		Target{Start: 0, Length: superblockSectors, Type: "linear", Params: []byte(front.path + " 0")},
		Target{Start: superblockSectors, Length: payload, Type: "linear", Params: fmt.Appendf(nil, "%s %d", dev.Path, HeadSize/512)})
	if err != nil {
		return nil, drawn, err
	}
	if v.integrity, err = v.add(s.Name+"-integrity", integrityTarget(node, provided, keys)); err != nil {
		return nil, drawn, err
	}
	have, err := front.content(superblockSize)
	if err != nil {
		return nil, drawn, err
	}
	if drawn, err = saltOf(have, provided, keys.journal); err != nil {
		return nil, drawn, err
	}
	if salt != nil && !bytes.Equal(have, want) {
		return nil, drawn, errors.New("dm-integrity changed the superblock it was given")
	}
	t, err := CryptTarget(v.integrity, v.Size, (*[CryptKeySize]byte)(keys.data))
	if err != nil {
		return nil, drawn, err
	}
	if v.Node, err = v.add(s.Name, t); err != nil {
		return nil, drawn, err
	}
	return v, drawn, nil
}

// add makes one device of the stack.
func (v *Volume) add(name string, targets ...Target) (string, error) {
	node, err := v.mapper.Create(name, "", false, targets...)
	if err != nil {
		return "", err
	}
	v.names = append(v.names, name)
	return node, nil
}

// check runs a program that reads the device, without readahead: a page of the cache
// can span many blocks, and one that was never written would make all of it unreadable.
func (v *Volume) check(ctx context.Context, run func(context.Context, []string) (int, error), argv []string) (exit int, err error) {
	f, err := os.Open(v.Node)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var ahead uint64 // a long, in sectors
	if err := ioctl(f, unix.BLKRAGET, (*[8]byte)(unsafe.Pointer(&ahead))[:]); err != nil {
		return 0, fmt.Errorf("ask for the readahead: %w", err)
	}
	set := func(n uint64) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKRASET, uintptr(n)); errno != 0 {
			return fmt.Errorf("set the readahead: %w", errno)
		}
		return nil
	}
	if err := set(0); err != nil {
		return 0, err
	}
	exit, err = run(ctx, argv)
	return exit, errors.Join(err, set(ahead))
}

// Mount mounts the volume's file system at dir, with its journal and barriers on,
// and grows it to the size of the volume.
func (v *Volume) Mount(dir string, flags uintptr) error {
	data := ""
	if v.FS == Ext4 {
		data = "errors=remount-ro"
	}
	if err := unix.Mount(v.Node, dir, v.FS.String(), flags, data); err != nil {
		return fault.Wrap(err, "disk_filesystem", "mount the data disk as %s", v.FS)
	}
	if err := growFS(v.FS, dir, v.Size); err != nil {
		_ = unix.Unmount(dir, 0)
		return fault.Wrap(err, "disk_filesystem", "grow the file system of the data disk")
	}
	return nil
}

// Close takes the devices down, the highest first; the keys leave the kernel's
// memory with them. The volume must not be mounted. A device that is still in use for
// a moment (its last reader just closed it) is tried again for a second.
func (v *Volume) Close() error {
	for len(v.names) > 0 {
		last := len(v.names) - 1
		if err := removeSoon(v.mapper, v.names[last]); err != nil {
			return err
		}
		v.names = v.names[:last]
	}
	return nil
}

func removeSoon(m *Mapper, name string) error {
	for deadline := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := m.Remove(name)
		if err == nil || !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// writeRecord makes the record durable: the block that holds it, then a flush. All
// that was written to the disk before is durable with it.
func writeRecord(path string, r []byte) error {
	block := make([]byte, cryptSector)
	copy(block, r)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(block, 0)
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err != nil {
		return fault.Wrap(err, "disk_write", "write the record of the data disk")
	}
	return nil
}

// prepare clears the parts of a new volume that the programs read before they write
// them, since a block that was never written cannot be read: the ends, where
// signatures are, and the blocks of which mke2fs writes a part only, the copies of
// the superblock.
func prepare(path string, size uint64, fs FS) error {
	const end = 1 << 20
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	zero := make([]byte, end)
	for _, at := range []uint64{0, size - end} {
		if _, err := f.WriteAt(zero, int64(at)); err != nil {
			return err
		}
	}
	if fs == Ext4 {
		for _, n := range ext4Copies(size / cryptSector) {
			if _, err := f.WriteAt(zero[:cryptSector], int64(n*cryptSector)); err != nil {
				return err
			}
		}
	}
	return f.Sync()
}

// prepareGrowth clears what the kernel reads beyond the end of a file system that it
// is about to grow: the last block of the device, to see that there is one, and for
// ext4 where the bitmaps of new groups will be, whose checksums it computes though
// they are not in use: behind the copies of superblock and group descriptors, if any,
// at the start of a group.
func prepareGrowth(path string, size uint64, fs FS) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	blocks := size / cryptSector
	clearBlocks := func(from, n uint64) error {
		if from >= blocks {
			return nil
		}
		_, err := f.WriteAt(make([]byte, min(n, blocks-from)*cryptSector), int64(from*cryptSector))
		return err
	}
	if err := clearBlocks(blocks-1, 1); err != nil {
		return err
	}
	if fs == Ext4 {
		head := make([]byte, cryptSector)
		if _, err := f.ReadAt(head, 0); err != nil {
			return err
		}
		sb := head[1024:]
		count := uint64(binary.LittleEndian.Uint32(sb[4:])) | uint64(binary.LittleEndian.Uint32(sb[0x150:]))<<32
		if binary.LittleEndian.Uint16(sb[56:]) != 0xef53 || count == 0 {
			return errors.New("the volume holds no ext4 file system")
		}
		copies := ext4Copies(blocks)
		for group := (count + ext4Group - 1) / ext4Group * ext4Group; group < blocks; group += ext4Group {
			n := uint64(64) // two bitmaps for each of 16 groups, twice that to be sure
			if slices.Contains(copies, group) {
				n += 1 + 1024 + blocks/ext4Group/64 + 1 // superblock, reserved and used descriptors
			}
			if err := clearBlocks(group, n); err != nil {
				return err
			}
		}
	}
	return f.Sync()
}

// syncDevice makes what was written to a device durable.
func syncDevice(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
