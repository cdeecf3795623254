// SPDX-License-Identifier: Apache-2.0

// Package gpt writes GUID partition tables (UEFI 2.10 §5), and writes and reads the
// envelope of a root image: a disk with a partition named "dstack-rootfs", by which
// the guest finds it (guest-os.md §2.1); behind it, where the image has a scripts
// layer (design.md §6), one named "dstack-scripts"; no others.
//
// All identifiers are fixed, so that the same content gives the same bytes. The
// table is not a source of trust: whoever can replace the disk can write any
// table, and the verity root hashes on the command line decide what is mounted.
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
	// Align is where the first partition starts, the unit that sizes are rounded
	// up to, and the room left after the last partition, in bytes.
	Align = 1 << 20
	// Label is the name of the root's partition.
	Label = "dstack-rootfs"
	// ScriptsLabel is the name of the scripts layer's partition.
	ScriptsLabel = "dstack-scripts"

	entries   = 128
	entrySize = 128
	tableSize = entries * entrySize
	maxDisk   = 17 << 30
)

// The fixed identifiers of guest-os.md §2.1, in their on-disk byte order
// (first three groups little endian), and the type "Linux filesystem data". The
// scripts layer has the next number that upstream does not use: 2 is its ESP.
var (
	diskGUID    = [16]byte{0x00, 0xc0, 0xac, 0xd5, 0x00, 0x00, 0x00, 0x40, 0x80, 0, 0, 0, 0, 0, 0, 0}
	rootGUID    = [16]byte{0x00, 0xc0, 0xac, 0xd5, 0x00, 0x00, 0x00, 0x40, 0x80, 0, 0, 0, 0, 0, 0, 1}
	scriptsGUID = [16]byte{0x00, 0xc0, 0xac, 0xd5, 0x00, 0x00, 0x00, 0x40, 0x80, 0, 0, 0, 0, 0, 0, 3}
	linuxData   = [16]byte{0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4}
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

// slots are the entries of the table, in their order.
var slots = []struct {
	label string
	id    [16]byte
}{{Label, rootGUID}, {ScriptsLabel, scriptsGUID}}

// Partition is where a content lies within the disk, in bytes.
type Partition struct{ Start, Size int64 }

// Layout is what lies on a disk. Scripts has size 0 where there is none.
type Layout struct{ Root, Scripts Partition }

// Content is what fills a partition: Size bytes from Data. The zero value is no
// partition.
type Content struct {
	Data io.Reader
	Size int64
}

// DiskSize returns the size in bytes of a disk with contents of the given sizes;
// scripts is 0 where there is none.
func DiskSize(root, scripts int64) int64 { return 2*Align + roundUp(root) + roundUp(scripts) }

// Write writes a disk with the root and, unless it is zero, the scripts layer
// behind it, each padded with zeros to a multiple of Align.
func Write(w io.Writer, root, scripts Content) error {
	if root.Size <= 0 || scripts.Size < 0 || root.Size > maxDisk || scripts.Size > maxDisk || DiskSize(root.Size, scripts.Size) > maxDisk {
		return fmt.Errorf("gpt: contents of %d and %d bytes; must be positive, at most %d together", root.Size, scripts.Size, int64(maxDisk-2*Align))
	}
	contents := []Content{root}
	if scripts.Size > 0 {
		contents = append(contents, scripts)
	}
	at := int64(Align)
	var parts []Entry
	for i, c := range contents {
		parts = append(parts, Entry{Name: slots[i].label, ID: slots[i].id, Start: at, Size: roundUp(c.Size)})
		at += roundUp(c.Size)
	}
	front, back := Tables(diskGUID, DiskSize(root.Size, scripts.Size), parts)
	if _, err := w.Write(front); err != nil {
		return err
	}
	for _, c := range contents {
		if n, err := io.Copy(w, io.LimitReader(c.Data, c.Size)); err != nil {
			return err
		} else if n != c.Size {
			return fmt.Errorf("gpt: content ended after %d of %d bytes", n, c.Size)
		}
		if _, err := w.Write(make([]byte, roundUp(c.Size)-c.Size)); err != nil {
			return err
		}
	}
	_, err := w.Write(back)
	return err
}

// An Entry is a partition to write.
type Entry struct {
	Name        string   // at most 36 characters of the basic plane
	ID          [16]byte // on-disk byte order
	Start, Size int64    // bytes, multiples of 512
}

// Tables returns the first and last Align bytes of a disk of total bytes with the
// partitions, all of the type "Linux filesystem data". The caller keeps them apart
// and out of those two ranges.
func Tables(disk [16]byte, total int64, parts []Entry) (front, back []byte) {
	last := uint64(total/sector) - 1
	table := make([]byte, tableSize)
	for i, p := range parts {
		e := entry{Type: linuxData, ID: p.ID, First: uint64(p.Start / sector), Last: uint64((p.Start+p.Size)/sector) - 1}
		copy(e.Name[:], utf16.Encode([]rune(p.Name)))
		_, _ = binary.Encode(table[i*entrySize:], binary.LittleEndian, e) // of fixed size: it fits
	}
	head := header{Revision: 0x10000, HeaderSize: 92, Current: 1, Backup: last,
		FirstUsable: 2 + tableSize/sector, LastUsable: last - 1 - tableSize/sector,
		Disk: disk, TableAt: 2, Entries: entries, EntrySize: entrySize, TableCRC: crc32.ChecksumIEEE(table)}
	copy(head.Signature[:], "EFI PART")

	front = make([]byte, Align)
	writeMBR(front, last)
	head.put(front[sector:])
	copy(front[2*sector:], table)

	backup := head
	backup.Current, backup.Backup, backup.TableAt = last, 1, last-tableSize/sector
	back = make([]byte, Align)
	copy(back[Align-sector-tableSize:], table)
	backup.put(back[Align-sector:])
	return front, back
}

// Find returns the partitions of a disk that Write made. It refuses a disk with
// a damaged table or with others than these: a root image has no others.
func Find(disk io.ReaderAt) (Layout, error) {
	var none, found Layout
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
	next := uint64(Align)
	for i, p := range []*Partition{&found.Root, &found.Scripts} {
		raw, want := table[i*entrySize:(i+1)*entrySize], slots[i]
		if i > 0 && len(bytes.Trim(raw, "\x00")) == 0 {
			break
		}
		var e entry
		if _, err := binary.Decode(raw, binary.LittleEndian, &e); err != nil {
			return none, err
		}
		if name := string(utf16.Decode(e.Name[:len(want.label)])); name != want.label || e.Name[len(want.label)] != 0 {
			return none, fmt.Errorf("partition %d is not named %s", i+1, want.label)
		}
		if e.First*sector != next || e.Last < e.First || e.Last > maxDisk/sector || (e.Last+1-e.First)*sector%Align != 0 {
			return none, fmt.Errorf("partition %d covers sectors %d to %d; not one of ours", i+1, e.First, e.Last)
		}
		*p = Partition{Start: int64(next), Size: int64(e.Last+1-e.First) * sector}
		next = (e.Last + 1) * sector
	}
	if len(bytes.Trim(table[len(slots)*entrySize:], "\x00")) != 0 {
		return none, fmt.Errorf("more than %d partitions", len(slots))
	}
	return found, nil
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
