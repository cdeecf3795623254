// SPDX-License-Identifier: Apache-2.0

package acpi

import (
	"crypto/sha512"
	"encoding/binary"

	"github.com/dstack-go/dstack"
)

// Files of QEMU's firmware configuration device.
const (
	tablesFile = "etc/acpi/tables"
	rsdpFile   = "etc/acpi/rsdp"
)

// QEMU pads the blobs so that their size rarely changes.
const (
	tablesAlign = 128 << 10
	loaderAlign = 4 << 10
)

// Tables are the three blobs that QEMU hands the firmware and that TDVF extends
// into RTMR0.
type Tables struct {
	Loader []byte // etc/table-loader: commands of 128 bytes, a multiple of 4 KiB
	RSDP   []byte // etc/acpi/rsdp: 20 bytes, checksum 0
	Tables []byte // etc/acpi/tables: a multiple of 128 KiB, checksums 0, pointers relative to its start
}

// Digests returns the SHA-384 digests in the order of the event log: loader,
// RSDP, tables (spec/measurement.md §4).
func (t *Tables) Digests() [3]dstack.Measurement {
	return [3]dstack.Measurement{sha512.Sum384(t.Loader), sha512.Sum384(t.RSDP), sha512.Sum384(t.Tables)}
}

// Build returns the blobs for a shape. The code of every error is
// acpi_shape_unsupported; its text names the field.
func Build(s Shape) (*Tables, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	p, err := s.profileOf()
	if err != nil {
		return nil, err
	}
	b := new(builder)
	b.loader = append(b.loader, allocate(rsdpFile, 16, zoneFSEG), allocate(tablesFile, 64, zoneHigh))

	facs := b.add(s.facs())
	dsdt := b.table("DSDT", 1, s.dsdt(p))
	b.fadt(s.fadt(), facs, dsdt)
	listed := []uint32{b.last}
	list := func(signature string, revision byte, body []byte) {
		listed = append(listed, b.table(signature, revision, body))
	}
	list("APIC", 3, s.madt(p))
	if s.HPET {
		list("HPET", 1, hpetTable())
	}
	if s.NUMA {
		list("SRAT", 1, s.srat())
	}
	list("MCFG", 1, s.mcfg())
	list("WAET", 1, le32(1<<1)) // the ACPI timer is reliable
	rsdt := b.rsdt(listed)

	// Root System Description Pointer, revision 0 (ACPI 6.5, §5.2.5.3).
	rsdp := append([]byte("RSD PTR \x00BOCHS \x00"), le32(rsdt)...)
	b.loader = append(b.loader,
		addPointer(rsdpFile, tablesFile, 16, 4),
		addChecksum(rsdpFile, 8, 0, uint32(len(rsdp))))
	return &Tables{
		Loader: padded(seq(b.loader...), loaderAlign),
		RSDP:   rsdp,
		Tables: padded(b.tables, tablesAlign),
	}, nil
}

func padded(b []byte, align int) []byte {
	return append(b, make([]byte, (align-len(b)%align)%align)...)
}

func le16(n uint16) []byte { return binary.LittleEndian.AppendUint16(nil, n) }
func le32(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }
func le64(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }

// builder collects tables and the commands that finish them in the guest.
type builder struct {
	tables []byte
	loader [][]byte
	last   uint32 // offset of the table added last
}

// add appends a table as it is and returns its offset.
func (b *builder) add(table []byte) uint32 {
	b.last = uint32(len(b.tables))
	b.tables = append(b.tables, table...)
	return b.last
}

// header is that of a description table (ACPI 6.5, §5.2.6); its checksum is left
// to the guest.
func header(signature string, revision byte, body []byte) []byte {
	return seq(
		[]byte(signature), le32(uint32(36+len(body))), []byte{revision, 0},
		[]byte("BOCHS BXPC    "), le32(1), []byte("BXPC"), le32(1), body)
}

const checksumOffset = 9

func (b *builder) table(signature string, revision byte, body []byte) uint32 {
	at := b.add(header(signature, revision, body))
	b.loader = append(b.loader, addChecksum(tablesFile, at+checksumOffset, at, uint32(36+len(body))))
	return at
}

// fadt appends the FADT with its three pointers to FACS and DSDT.
func (b *builder) fadt(body []byte, facs, dsdt uint32) {
	at := uint32(len(b.tables))
	pointers := [][]byte{
		addPointer(tablesFile, tablesFile, at+36, 4),
		addPointer(tablesFile, tablesFile, at+40, 4),
		addPointer(tablesFile, tablesFile, at+140, 8),
	}
	binary.LittleEndian.PutUint32(body[0:], facs)
	binary.LittleEndian.PutUint32(body[4:], dsdt)
	binary.LittleEndian.PutUint64(body[104:], uint64(dsdt))
	b.loader = append(b.loader, pointers...)
	b.table("FACP", 3, body)
}

func (b *builder) rsdt(listed []uint32) uint32 {
	at := uint32(len(b.tables))
	var body []byte
	for i, offset := range listed {
		body = append(body, le32(offset)...)
		b.loader = append(b.loader, addPointer(tablesFile, tablesFile, at+36+4*uint32(i), 4))
	}
	return b.table("RSDT", 1, body)
}

// Commands for the firmware's table loader, 128 bytes each
// (QEMU hw/acpi/bios-linker-loader.c; spec/measurement.md §4.2).

const (
	zoneHigh = 1
	zoneFSEG = 2
)

func command(kind uint32, operands ...[]byte) []byte {
	out := make([]byte, 128)
	copy(out, seq(le32(kind), seq(operands...)))
	return out
}

func fileName(file string) []byte {
	out := make([]byte, 56)
	copy(out, file)
	return out
}

func allocate(file string, align uint32, zone byte) []byte {
	return command(1, fileName(file), le32(align), []byte{zone})
}

func addPointer(in, to string, offset uint32, size byte) []byte {
	return command(2, fileName(in), fileName(to), le32(offset), []byte{size})
}

func addChecksum(file string, result, start, length uint32) []byte {
	return command(3, fileName(file), le32(result), le32(start), le32(length))
}

// facs is the Firmware ACPI Control Structure (ACPI 6.5, §5.2.10).
func (s *Shape) facs() []byte {
	return append(append([]byte("FACS"), le32(64)...), make([]byte, 56)...)
}

// Flags of the FADT (ACPI 6.5, table 5.10).
const (
	wbinvd          = 1 << 0
	processorC1     = 1 << 2
	sleepButton     = 1 << 5
	rtcWakesS4      = 1 << 7
	resetRegister   = 1 << 10
	platformClock   = 1 << 15
	clusteredAPICID = 1 << 18
)

// fadt is the body of the Fixed ACPI Description Table, revision 3 (ACPI 6.5,
// §5.2.9), without its pointers.
func (s *Shape) fadt() []byte {
	flags := uint32(wbinvd | processorC1 | sleepButton | rtcWakesS4 | resetRegister | platformClock)
	if s.VCPUs > 8 {
		flags |= clusteredAPICID
	}
	smiCommand, enable, disable := uint32(0), byte(0), byte(0)
	if s.SMM {
		smiCommand, enable, disable = 0xb2, 2, 3
	}
	// Generic address structures of the blocks below.
	port := func(width byte, at uint64) []byte { return append([]byte{1, width, 0, 0}, le64(at)...) }
	absent := make([]byte, 12)
	return seq(
		make([]byte, 8),  // FACS, DSDT
		[]byte{1, 0},     // interrupt model, preferred profile
		le16(9),          // SCI interrupt
		le32(smiCommand), //
		[]byte{enable, disable, 0, 0},
		le32(pmBase), le32(0), // PM1 event blocks a, b
		le32(pmBase+4), le32(0), // PM1 control blocks a, b
		le32(0), le32(pmBase+8), // PM2 control, PM timer
		le32(gpeBlock), le32(0), // GPE blocks 0, 1
		[]byte{4, 2, 0, 4, gpeLength, 0, 0, 0}, // lengths of them
		le16(0xfff), le16(0xfff),               // C2 and C3 are not supported
		make([]byte, 8),       // flush size and stride, duty, day and month alarm
		[]byte{0x32},          // century in the RTC
		le16(1<<1), []byte{0}, // boot flags: an 8042 is there
		le32(flags),
		port(8, 0xcf9), []byte{0x0f}, make([]byte, 3), // reset register and its value
		make([]byte, 8+8), // X_FACS, X_DSDT
		port(32, pmBase), absent,
		port(16, pmBase+4), absent,
		absent, port(32, pmBase+8),
		port(8*gpeLength, gpeBlock), absent)
}

// madt is the body of the Multiple APIC Description Table, revision 3 (ACPI 6.5,
// §5.2.12).
func (s *Shape) madt(p profile) []byte {
	flags := uint32(0)
	if s.PIC {
		flags = 1
	}
	out := append(le32(localAPIC), le32(flags)...)
	for i := range s.VCPUs {
		out = append(out, apicEntry(i)...)
	}
	out = append(out, 1, 12, 0, 0) // I/O APIC 0, interrupts from 0
	out = append(append(out, le32(ioAPIC)...), le32(0)...)

	override := func(source byte, interrupt uint32, flags uint16) {
		out = append(out, 2, 10, 0, source)
		out = append(append(out, le32(interrupt)...), le16(flags)...)
	}
	const activeHighEdge, activeHighLevel = 1 | 1<<2, 1 | 3<<2
	if p.edgeTriggered {
		override(0, 2, activeHighEdge)
		for i := range byte(15) {
			override(i+1, uint32(i+1), activeHighEdge)
		}
	} else {
		override(0, 2, 0)
		for _, i := range []byte{5, 9, 10, 11} {
			override(i, uint32(i), activeHighLevel)
		}
	}
	// Local interrupt 1 of all processors is the NMI.
	if s.VCPUs > 255 {
		return append(out, 0x0a, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0)
	}
	return append(out, 4, 6, 0xff, 0, 0, 1)
}

// hpetTable is the body of the HPET table (IA-PC HPET Specification 1.0a, §3.2.4).
func hpetTable() []byte {
	return seq(le32(0x8086_a201), []byte{0, 0, 0, 0}, le64(hpetBase), make([]byte, 4))
}

// srat is the body of the System Resource Affinity Table (ACPI 6.5, §5.2.16) for
// one node.
func (s *Shape) srat() []byte {
	out := append(le32(1), make([]byte, 8)...)
	for i := range s.VCPUs {
		if i < 255 {
			out = append(out, 0, 16, 0, byte(i), 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
			continue
		}
		out = append(out, 2, 24, 0, 0, 0, 0, 0, 0)
		out = append(append(out, le32(uint32(i))...), le32(1)...)
		out = append(out, make([]byte, 8)...)
	}
	entries := 0
	memory := func(base, length uint64, flags uint32) {
		if length == 0 && flags != 0 {
			return
		}
		entries++
		out = append(out, 1, 40, 0, 0, 0, 0, 0, 0)
		out = append(append(out, le64(base)...), le64(length)...)
		out = append(append(out, make([]byte, 4)...), le32(flags)...)
		out = append(out, make([]byte, 8)...)
	}
	const enabled = 1
	const lowEnd, highStart = 640 << 10, 1 << 20
	low := s.lowMemory()
	memory(0, lowEnd, enabled)
	memory(highStart, low-highStart, enabled)
	memory(1<<32, s.Memory-low, enabled)
	for entries < 3 { // QEMU fills up to two more than there are nodes
		memory(0, 0, 0)
	}
	return out
}

// mcfg is the body of the MCFG table (PCI Firmware Specification 3.3, §4.1.2): all
// buses of segment 0.
func (s *Shape) mcfg() []byte {
	return seq(make([]byte, 8), le64(s.configBase()), []byte{0, 0, 0, 0xff}, make([]byte, 4))
}
