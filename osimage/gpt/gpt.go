// SPDX-License-Identifier: Apache-2.0

// Package gpt writes and reads the envelope of a root image: a disk with a GUID
// partition table (UEFI 2.10 §5) and exactly one partition, named
// "dstack-rootfs", by which the guest finds it (guest-os.md §2.1).
//
// All identifiers are fixed, so that the same content gives the same bytes. The
// table is not a source of trust: whoever can replace the disk can write any
// table, and the verity root hash on the command line decides what is mounted.
package gpt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"unicode/utf16"
)

const (
	sector = 512
	// Align is where the partition starts, the unit its size is rounded up to,
	// and the room left after it, in bytes.
	Align = 1 << 20
	// Label is the name of the one partition.
	Label = "dstack-rootfs"

	entries   = 128
	entrySize = 128
	tableSize = entries * entrySize
	maxDisk   = 17 << 30
)

// The fixed identifiers of guest-os.md §2.1, in their on-disk byte order
// (first three groups little endian), and the type "Linux filesystem data".
var (
	diskGUID  = [16]byte{0x00, 0xc0, 0xac, 0xd5, 0x00, 0x00, 0x00, 0x40, 0x80, 0, 0, 0, 0, 0, 0, 0}
	partGUID  = [16]byte{0x00, 0xc0, 0xac, 0xd5, 0x00, 0x00, 0x00, 0x40, 0x80, 0, 0, 0, 0, 0, 0, 1}
	linuxData = [16]byte{0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4}
)

type header struct {
	Signature   [8]byte
	Revision    uint32
	HeaderSize  uint32
	CRC         uint32
	_           uint32
	Current     uint64
	Backup      uint64
	FirstUsable uint64
	LastUsable  uint64
	Disk        [16]byte
	TableAt     uint64
	Entries     uint32
	EntrySize   uint32
	TableCRC    uint32
}

type entry struct {
	Type, ID    [16]byte
	First, Last uint64
	Attributes  uint64
	Name        [36]uint16
}

// Partition is where the content lies within the disk, in bytes.
type Partition struct{ Start, Size int64 }

// DiskSize returns the size in bytes of a disk that holds content of the given size.
func DiskSize(content int64) int64 { return 2*Align + roundUp(content) }

// Write writes a disk whose partition holds size bytes from content, padded
// with zeros to a multiple of Align.
func Write(w io.Writer, content io.Reader, size int64) error {
	if size <= 0 || DiskSize(size) > maxDisk {
		return fmt.Errorf("gpt: content of %d bytes; must be between 1 and %d", size, int64(maxDisk-2*Align))
	}
	total := DiskSize(size)
	last := uint64(total/sector) - 1

	var e entry
	e.Type, e.ID = linuxData, partGUID
	e.First = Align / sector
	e.Last = uint64((Align+roundUp(size))/sector) - 1
	copy(e.Name[:], utf16.Encode([]rune(Label)))
	table := make([]byte, tableSize)
	if _, err := binary.Encode(table, binary.LittleEndian, e); err != nil {
		return err
	}

	head := header{Revision: 0x10000, HeaderSize: 92, Current: 1, Backup: last,
		FirstUsable: 2 + tableSize/sector, LastUsable: last - 1 - tableSize/sector,
		Disk: diskGUID, TableAt: 2, Entries: entries, EntrySize: entrySize, TableCRC: crc32.ChecksumIEEE(table)}
	copy(head.Signature[:], "EFI PART")

	front := make([]byte, Align)
	writeMBR(front, last)
	head.put(front[sector:])
	copy(front[2*sector:], table)

	backup := head
	backup.Current, backup.Backup, backup.TableAt = last, 1, last-tableSize/sector
	back := make([]byte, Align)
	copy(back[Align-sector-tableSize:], table)
	backup.put(back[Align-sector:])

	if _, err := w.Write(front); err != nil {
		return err
	}
	if n, err := io.Copy(w, io.LimitReader(content, size)); err != nil {
		return err
	} else if n != size {
		return fmt.Errorf("gpt: content ended after %d of %d bytes", n, size)
	}
	if _, err := w.Write(make([]byte, roundUp(size)-size)); err != nil {
		return err
	}
	_, err := w.Write(back)
	return err
}

// Find returns the partition of a disk that Write made. It refuses a disk with
// a damaged table or other partitions than the one: a root image has no others.
func Find(disk io.ReaderAt) (Partition, error) {
	var none Partition
	buf := make([]byte, 2*sector+tableSize)
	if _, err := disk.ReadAt(buf, 0); err != nil {
		return none, fmt.Errorf("read partition table: %w", err)
	}
	var head header
	raw := bytes.Clone(buf[sector : sector+92])
	if _, err := binary.Decode(raw, binary.LittleEndian, &head); err != nil {
		return none, err
	}
	if string(head.Signature[:]) != "EFI PART" || head.HeaderSize != 92 {
		return none, fmt.Errorf("no GUID partition table")
	}
	copy(raw[16:20], []byte{0, 0, 0, 0})
	if crc32.ChecksumIEEE(raw) != head.CRC {
		return none, fmt.Errorf("partition table header: checksum does not match")
	}
	table := buf[2*sector:]
	if head.TableAt != 2 || head.Entries != entries || head.EntrySize != entrySize || crc32.ChecksumIEEE(table) != head.TableCRC {
		return none, fmt.Errorf("partition table: entries do not match the header")
	}
	var e entry
	if _, err := binary.Decode(table[:entrySize], binary.LittleEndian, &e); err != nil {
		return none, err
	}
	if name := string(utf16.Decode(e.Name[:len(Label)])); name != Label || e.Name[len(Label)] != 0 {
		return none, fmt.Errorf("first partition is not named %s", Label)
	}
	if len(bytes.Trim(table[entrySize:], "\x00")) != 0 {
		return none, fmt.Errorf("more than one partition")
	}
	if e.First*sector != Align || e.Last < e.First || e.Last > maxDisk/sector || (e.Last+1-e.First)*sector%Align != 0 {
		return none, fmt.Errorf("partition covers sectors %d to %d; not one of ours", e.First, e.Last)
	}
	return Partition{Start: Align, Size: int64(e.Last+1-e.First) * sector}, nil
}

// put writes the header with its checksum.
func (h header) put(b []byte) {
	h.CRC = 0
	binary.Encode(b[:92], binary.LittleEndian, h)
	binary.LittleEndian.PutUint32(b[16:], crc32.ChecksumIEEE(b[:92]))
}

// writeMBR writes the protective record of UEFI 2.10 §5.2.3.
func writeMBR(b []byte, last uint64) {
	b[446+2], b[446+4] = 2, 0xee
	b[446+5], b[446+6], b[446+7] = 0xff, 0xff, 0xff
	binary.LittleEndian.PutUint32(b[446+8:], 1)
	binary.LittleEndian.PutUint32(b[446+12:], uint32(min(last, 0xffffffff)))
	b[510], b[511] = 0x55, 0xaa
}

func roundUp(n int64) int64 { return (n + Align - 1) / Align * Align }
