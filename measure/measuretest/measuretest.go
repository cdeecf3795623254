// SPDX-License-Identifier: Apache-2.0

// Package measuretest makes small boot files for tests: a firmware image with a
// TDVF descriptor and a kernel with a boot protocol header inside a PE image.
// They measure like real ones and boot nothing.
package measuretest

import (
	"encoding/binary"

	"github.com/dstack-go/dstack/measure"
)

// Section offsets of [Firmware], as in OVMF's descriptor.
const (
	DescriptorFromEnd = 0x800
	cfvSize           = 0x4000
)

// Sections are the sections of the firmware that [Firmware] returns.
func Sections() []measure.Section {
	return []measure.Section{
		{DataOffset: cfvSize, RawSize: 0xc000, Address: 0xffff4000, MemSize: 0xc000, Type: measure.SectionBFV, Attributes: 1},
		{DataOffset: 0, RawSize: cfvSize, Address: 0xffff0000, MemSize: cfvSize, Type: measure.SectionCFV},
		{Address: 0x810000, MemSize: 0x10000, Type: measure.SectionTempMem},
		{Address: 0x80b000, MemSize: 0x2000, Type: measure.SectionTempMem},
		{Address: 0x809000, MemSize: 0x2000, Type: measure.SectionTDHOB},
		{Address: 0x800000, MemSize: 0x6000, Type: measure.SectionTempMem},
	}
}

// Firmware returns 64 KiB of firmware with the given sections, or with those of
// [Sections].
func Firmware(sections ...measure.Section) []byte {
	if sections == nil {
		sections = Sections()
	}
	b := make([]byte, 0x10000)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	le := binary.LittleEndian
	d := b[len(b)-DescriptorFromEnd:]
	copy(d, "TDVF")
	le.PutUint32(d[4:], uint32(16+32*len(sections)))
	le.PutUint32(d[8:], 1)
	le.PutUint32(d[12:], uint32(len(sections)))
	for i, s := range sections {
		e := d[16+32*i:]
		le.PutUint32(e, s.DataOffset)
		le.PutUint32(e[4:], s.RawSize)
		le.PutUint64(e[8:], s.Address)
		le.PutUint64(e[16:], s.MemSize)
		le.PutUint32(e[24:], uint32(s.Type))
		le.PutUint32(e[28:], s.Attributes)
	}
	// Table of GUIDs: the TDVF entry, some other entry, the footer.
	end := len(b) - 32
	footer := []byte{0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d}
	tdvf := []byte{0x35, 0x65, 0x7a, 0xe4, 0x4a, 0x98, 0x98, 0x47, 0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2}
	copy(b[end-16:], footer)
	le.PutUint16(b[end-18:], 18+20+22)
	other := b[end-18-20 : end-18]
	copy(other, "\x01\x02\x14\x00some other entry.")
	le.PutUint16(other[2:], 20)
	entry := b[end-18-20-22 : end-18-20]
	le.PutUint32(entry, DescriptorFromEnd)
	le.PutUint16(entry[4:], 22)
	copy(entry[6:], tdvf)
	return b
}

// Kernel returns 16 KiB that are a bzImage and a PE32+ image with two sections.
func Kernel() []byte {
	b := make([]byte, 0x4000)
	for i := range b {
		b[i] = byte(i*13 + i>>8)
	}
	le := binary.LittleEndian
	clear(b[:0x1000])
	copy(b, "MZ")
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x20f)
	b[0x211] = 1
	le.PutUint32(b[0x22c:], 0x7fffffff)
	le.PutUint16(b[0x236:], 0x6b)
	const pe = 0x40
	le.PutUint32(b[0x3c:], pe)
	copy(b[pe:], "PE\x00\x00")
	le.PutUint16(b[pe+4:], 0x8664)
	le.PutUint16(b[pe+6:], 2)
	le.PutUint16(b[pe+20:], 160)
	le.PutUint16(b[pe+22:], 0x206)
	opt := pe + 24
	le.PutUint16(b[opt:], 0x20b)
	le.PutUint32(b[opt+32:], 0x1000) // section alignment
	le.PutUint32(b[opt+36:], 0x1000) // file alignment
	le.PutUint32(b[opt+56:], 0x4000) // size of image
	le.PutUint32(b[opt+60:], 0x1000) // size of headers
	le.PutUint32(b[opt+64:], 0x12345678)
	le.PutUint16(b[opt+68:], 10) // EFI application
	le.PutUint32(b[opt+108:], 6)
	for i, name := range []string{".setup", ".text"} {
		s := b[opt+160+40*i:]
		at, size := uint32(0x1000), uint32(0x1000)
		if i == 1 {
			at, size = 0x2000, 0x2000
		}
		copy(s, name)
		le.PutUint32(s[8:], size)
		le.PutUint32(s[12:], at)
		le.PutUint32(s[16:], size)
		le.PutUint32(s[20:], at)
	}
	return b
}

// Launch returns a VM of 1 GiB with these files.
func Launch() measure.Launch {
	return measure.Launch{
		Firmware:    Firmware(),
		Kernel:      Kernel(),
		Initrd:      []byte("initrd of a test"),
		Cmdline:     "console=ttyS0 panic=-1",
		VCPUs:       1,
		MemoryBytes: 1 << 30,
	}
}
