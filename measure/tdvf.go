// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// SectionType is the type of a TDVF section (Intel TDX Virtual Firmware Design
// Guide, table "TDVF section types").
type SectionType uint32

// Section types this package knows. Others (TD_PARAMS, PAYLOAD, …) do not occur
// in OVMF and are refused.
const (
	SectionBFV     SectionType = 0 // boot firmware volume
	SectionCFV     SectionType = 1 // configuration firmware volume: the variable store
	SectionTDHOB   SectionType = 2
	SectionTempMem SectionType = 3
)

// Section attributes.
const (
	attrMRExtend = 1 << 0
	attrPageAug  = 1 << 1
)

// Limits of a TDVF descriptor. OVMF has 6 sections, 2.2 MiB of memory in all.
const (
	maxSections     = 64
	maxSectionPages = 1 << 18 // over all sections: 1 GiB
)

// Section is one section of a TDVF descriptor. Offsets and sizes are in bytes;
// [ParseTDVF] has checked that the raw data lie inside the file and that memory
// ranges are whole pages.
type Section struct {
	DataOffset uint32
	RawSize    uint32
	Address    uint64
	MemSize    uint64
	Type       SectionType
	Attributes uint32
}

func (s Section) measured() bool  { return s.Attributes&attrMRExtend != 0 }
func (s Section) augmented() bool { return s.Attributes&attrPageAug != 0 }

// GUIDs as they lie in the firmware: the first three groups little endian.
var (
	// footerGUID 96b582de-1fb2-45f7-baea-a366c55a082d ends the table of GUIDs.
	footerGUID = []byte{0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d}
	// tdvfGUID e47a6535-984a-4798-865e-4685a7bf8ec2 tags the entry with the offset
	// of the descriptor.
	tdvfGUID = []byte{0x35, 0x65, 0x7a, 0xe4, 0x4a, 0x98, 0x98, 0x47, 0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2}
)

func badFirmware(format string, args ...any) error {
	return fault.New("firmware_malformed", "firmware: "+format, args...)
}

// ParseTDVF returns the sections of the TDVF descriptor of a firmware image, in
// file order (spec/measurement.md §3.1). The code of every error is
// firmware_malformed, except firmware_not_tdvf for firmware without a descriptor.
func ParseTDVF(firmware []byte) ([]Section, error) {
	if len(firmware) > maxFirmware {
		return nil, badFirmware("%d bytes are more than %d", len(firmware), maxFirmware)
	}
	// The footer entry {length u16, GUID 16} ends 32 bytes before the end.
	end := len(firmware) - 32
	if end < 18 || !bytes.Equal(firmware[end-16:end], footerGUID) {
		return nil, fault.New("firmware_not_tdvf", "firmware: no table of GUIDs at its end")
	}
	tableLen := int(binary.LittleEndian.Uint16(firmware[end-18:]))
	if tableLen < 18 || tableLen > end {
		return nil, badFirmware("table of GUIDs has %d bytes", tableLen)
	}
	// Entries are walked backwards; each is data ‖ length u16 ‖ GUID 16, and its
	// length counts all three. The footer is the last entry and its length is that
	// of the whole table.
	start := end - tableLen
	for at := end - 18; at > start; {
		if at-start < 18 {
			return nil, badFirmware("table of GUIDs: %d bytes before the first entry", at-start)
		}
		entryLen := int(binary.LittleEndian.Uint16(firmware[at-18:]))
		if entryLen < 18 || entryLen > at-start {
			return nil, badFirmware("table of GUIDs: entry of %d bytes in a table with %d left", entryLen, at-start)
		}
		if bytes.Equal(firmware[at-16:at], tdvfGUID) {
			if entryLen < 22 {
				return nil, badFirmware("TDVF entry has %d bytes, want at least 22", entryLen)
			}
			fromEnd := binary.LittleEndian.Uint32(firmware[at-22:])
			if fromEnd > uint32(len(firmware)) {
				return nil, badFirmware("TDVF descriptor lies %d bytes before the end of %d bytes", fromEnd, len(firmware))
			}
			return parseDescriptor(firmware, len(firmware)-int(fromEnd))
		}
		at -= entryLen
	}
	return nil, fault.New("firmware_not_tdvf", "firmware: no TDVF entry in its table of GUIDs")
}

func parseDescriptor(firmware []byte, at int) ([]Section, error) {
	d := firmware[at:]
	if len(d) < 16 || string(d[:4]) != "TDVF" {
		return nil, badFirmware("no TDVF descriptor at offset %#x", at)
	}
	length := binary.LittleEndian.Uint32(d[4:])
	version := binary.LittleEndian.Uint32(d[8:])
	count := binary.LittleEndian.Uint32(d[12:])
	if version != 1 {
		return nil, badFirmware("TDVF descriptor version %d, want 1", version)
	}
	if count == 0 || count > maxSections {
		return nil, badFirmware("TDVF descriptor has %d sections, want 1 to %d", count, maxSections)
	}
	if need := 16 + 32*int(count); int64(length) < int64(need) || len(d) < need {
		return nil, badFirmware("TDVF descriptor of %d bytes is too short for %d sections", length, count)
	}
	sections := make([]Section, count)
	pages := uint64(0)
	for i := range sections {
		b := d[16+32*i:]
		s := Section{
			DataOffset: binary.LittleEndian.Uint32(b),
			RawSize:    binary.LittleEndian.Uint32(b[4:]),
			Address:    binary.LittleEndian.Uint64(b[8:]),
			MemSize:    binary.LittleEndian.Uint64(b[16:]),
			Type:       SectionType(binary.LittleEndian.Uint32(b[24:])),
			Attributes: binary.LittleEndian.Uint32(b[28:]),
		}
		if err := s.check(len(firmware)); err != nil {
			return nil, fault.Wrap(err, "firmware_malformed", "firmware: TDVF section %d", i)
		}
		if pages += s.MemSize / pageSize; pages > maxSectionPages {
			return nil, badFirmware("TDVF sections cover more than %d pages", maxSectionPages)
		}
		sections[i] = s
	}
	return sections, nil
}

func (s Section) check(fileSize int) error {
	switch {
	case s.Type > SectionTempMem:
		return badFirmware("type %d is not known", s.Type)
	case s.Attributes&^(attrMRExtend|attrPageAug) != 0:
		return badFirmware("attributes %#x are not known", s.Attributes)
	case s.Address%pageSize != 0 || s.MemSize%pageSize != 0:
		return badFirmware("memory %#x+%#x is not a whole number of pages", s.Address, s.MemSize)
	case s.MemSize > maxSectionPages*pageSize || s.Address > maxMemory:
		return badFirmware("memory %#x+%#x is out of bounds", s.Address, s.MemSize)
	case uint64(s.RawSize) > s.MemSize:
		return badFirmware("%d bytes do not fit in %d bytes of memory", s.RawSize, s.MemSize)
	case uint64(s.DataOffset)+uint64(s.RawSize) > uint64(fileSize):
		return badFirmware("data %#x+%#x reach beyond the file of %d bytes", s.DataOffset, s.RawSize, fileSize)
	case s.measured() && uint64(s.RawSize) != s.MemSize:
		// The loader zero-fills what the file lacks, while the upstream computation
		// goes on reading the file. No firmware does this; choosing one would be a guess.
		return badFirmware("measured memory of %d bytes has only %d bytes of data", s.MemSize, s.RawSize)
	case (s.Type == SectionTDHOB || s.Type == SectionTempMem) && s.MemSize == 0:
		return badFirmware("empty memory range")
	}
	return nil
}

// MRTD returns the build-time measurement of a TD with this firmware
// (spec/measurement.md §3.2): one running SHA-384 over 128-byte records, "page
// add" for each page and "extend" for each 256-byte chunk of measured pages.
//
// With twoPass all pages of a section are added before any is extended, as QEMU 8
// does; otherwise the two alternate page by page, as QEMU 9 and later do. Upstream
// calls the former, confusingly, qemu_single_pass_add_pages.
func MRTD(firmware []byte, twoPass bool) (dstack.Measurement, error) {
	sections, err := ParseTDVF(firmware)
	if err != nil {
		return dstack.Measurement{}, err
	}
	return mrtd(firmware, sections, twoPass), nil
}

func mrtd(firmware []byte, sections []Section, twoPass bool) dstack.Measurement {
	h := sha512.New384()
	record := func(name string, gpa uint64) {
		var b [128]byte
		copy(b[:], name)
		binary.LittleEndian.PutUint64(b[16:], gpa)
		h.Write(b[:])
	}
	for _, s := range sections {
		pages := s.MemSize / pageSize
		add := func(page uint64) {
			if !s.augmented() {
				record("MEM.PAGE.ADD", s.Address+page*pageSize)
			}
		}
		extend := func(page uint64) {
			if !s.measured() {
				return
			}
			for chunk := uint64(0); chunk < pageSize; chunk += 256 {
				offset := page*pageSize + chunk
				record("MR.EXTEND", s.Address+offset)
				h.Write(firmware[uint64(s.DataOffset)+offset:][:256])
			}
		}
		if twoPass {
			for page := range pages {
				add(page)
			}
			for page := range pages {
				extend(page)
			}
			continue
		}
		for page := range pages {
			add(page)
			extend(page)
		}
	}
	return dstack.Measurement(h.Sum(nil))
}

// cfv returns the bytes of the configuration firmware volume, which OVMF measures
// into RTMR0 as it lies in the file.
func cfv(firmware []byte, sections []Section) ([]byte, error) {
	var found []byte
	for _, s := range sections {
		if s.Type != SectionCFV {
			continue
		}
		if found != nil {
			return nil, badFirmware("more than one configuration volume")
		}
		found = firmware[s.DataOffset:][:s.RawSize]
	}
	if len(found) == 0 {
		return nil, badFirmware("no configuration volume")
	}
	return found, nil
}
