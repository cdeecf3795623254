// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"encoding/binary"
	"slices"

	"github.com/dstack-go/dstack/internal/fault"
)

// HOBLayout is what the TD HOB of a firmware depends on, apart from the size of
// memory: the page ranges that the host accepts before the firmware runs. It is
// the "td_hob" field of a measurement document.
type HOBLayout struct {
	HOBPage uint64 // page number of the TD HOB itself
	Ranges  []PageRange
}

// PageRange is Count pages of 4 KiB from page number Start.
type PageRange struct{ Start, Count uint64 }

// End of memory below 4 GiB: a VM with at least lowMemory bytes keeps
// highSplit of them below 4 GiB, a smaller one all.
const (
	lowMemory = 0xB000_0000
	highSplit = 0x8000_0000
	highBase  = 0x1_0000_0000
)

func hobLayout(sections []Section) (HOBLayout, error) {
	var layout HOBLayout
	hobs := 0
	for _, s := range sections {
		if s.Type != SectionTDHOB && s.Type != SectionTempMem {
			continue
		}
		if s.Type == SectionTDHOB {
			layout.HOBPage = s.Address / pageSize
			hobs++
		}
		layout.Ranges = append(layout.Ranges, PageRange{s.Address / pageSize, s.MemSize / pageSize})
	}
	if hobs != 1 {
		return HOBLayout{}, badFirmware("%d TD HOB sections, want 1", hobs)
	}
	slices.SortFunc(layout.Ranges, func(a, b PageRange) int {
		switch {
		case a.Start < b.Start:
			return -1
		case a.Start > b.Start:
			return 1
		}
		return 0
	})
	if err := layout.check(); err != nil {
		return HOBLayout{}, err
	}
	return layout, nil
}

func badHOB(format string, args ...any) error {
	return fault.New("td_hob_malformed", "TD HOB layout: "+format, args...)
}

// check demands sorted, non-empty, disjoint ranges below 2 GiB. The host accepts
// them before it knows the upper end of memory, so a layout above the split could
// not be laid out.
func (l HOBLayout) check() error {
	if len(l.Ranges) == 0 || len(l.Ranges) > maxSections {
		return badHOB("%d ranges, want 1 to %d", len(l.Ranges), maxSections)
	}
	next, contains := uint64(0), false
	for i, r := range l.Ranges {
		if r.Count == 0 {
			return badHOB("range %d is empty", i)
		}
		if r.Start < next {
			return badHOB("range %d is not sorted, or overlaps the one before", i)
		}
		if r.Start > highSplit/pageSize || r.Count > highSplit/pageSize || (r.Start+r.Count)*pageSize >= highSplit {
			return badHOB("range %d reaches beyond 2 GiB", i)
		}
		next = r.Start + r.Count
		contains = contains || r.Start == l.HOBPage
	}
	if !contains {
		return badHOB("no range begins with the TD HOB at page %#x", l.HOBPage)
	}
	return nil
}

// HOB returns the bytes of the TD HOB that a host writes for memory bytes of
// guest memory, as OVMF measures them: a hand-off table and one resource
// descriptor for each range, accepted (type 0) or not (type 7), without the end
// marker (spec/measurement.md §4.1). Little endian.
func (l HOBLayout) HOB(memory uint64) ([]byte, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	if err := checkMemory(memory); err != nil {
		return nil, err
	}
	last := l.Ranges[len(l.Ranges)-1]
	if (last.Start+last.Count)*pageSize >= memory {
		return nil, badHOB("it needs more than %d bytes of memory", memory)
	}
	hob := make([]byte, 56, 56+48*(2*len(l.Ranges)+2))
	binary.LittleEndian.PutUint16(hob, 1)
	binary.LittleEndian.PutUint16(hob[2:], 56)
	binary.LittleEndian.PutUint32(hob[8:], 9)
	resource := func(kind uint32, start, end uint64) {
		var b [48]byte
		binary.LittleEndian.PutUint16(b[:], 3)
		binary.LittleEndian.PutUint16(b[2:], 48)
		binary.LittleEndian.PutUint32(b[24:], kind)
		binary.LittleEndian.PutUint32(b[28:], 7)
		binary.LittleEndian.PutUint64(b[32:], start)
		binary.LittleEndian.PutUint64(b[40:], end-start)
		hob = append(hob, b[:]...)
	}
	const accepted, unaccepted = 0, 7
	at := uint64(0)
	for _, r := range l.Ranges {
		start, end := r.Start*pageSize, (r.Start+r.Count)*pageSize
		if at < start {
			resource(unaccepted, at, start)
		}
		resource(accepted, start, end)
		at = end
	}
	if memory < lowMemory {
		resource(unaccepted, at, memory)
	} else {
		resource(unaccepted, at, highSplit)
		resource(unaccepted, highBase, highBase+memory-highSplit)
	}
	// The end of the list lies after the end marker, which is not measured.
	binary.LittleEndian.PutUint64(hob[48:], l.HOBPage*pageSize+uint64(len(hob))+8)
	return hob, nil
}

// encode is the "td_hob" witness: unsigned LEB128 numbers, the first page of all
// ranges, the TD HOB's page relative to it, the count, and each range's start
// (relative) and length (spec/measurement.md §7).
func (l HOBLayout) encode() []byte {
	base := l.Ranges[0].Start
	b := binary.AppendUvarint(nil, base)
	b = binary.AppendUvarint(b, l.HOBPage-base)
	b = binary.AppendUvarint(b, uint64(len(l.Ranges)))
	for _, r := range l.Ranges {
		b = binary.AppendUvarint(b, r.Start-base)
		b = binary.AppendUvarint(b, r.Count)
	}
	return b
}

// parseHOBLayout reads a witness. It accepts the shortest form of each number
// only, so that there is one witness for each layout.
func parseHOBLayout(b []byte) (HOBLayout, error) {
	var failed error
	number := func(what string) uint64 {
		v, n := binary.Uvarint(b)
		switch {
		case failed != nil:
			return 0
		case n <= 0 || (n > 1 && b[n-1] == 0):
			failed = badHOB("%s is not a number in shortest form", what)
			return 0
		case v > highSplit/pageSize:
			failed = badHOB("%s %d is out of bounds", what, v)
			return 0
		}
		b = b[n:]
		return v
	}
	base := number("base page")
	layout := HOBLayout{HOBPage: base + number("TD HOB page")}
	count := number("count")
	if failed == nil && count > maxSections {
		failed = badHOB("%d ranges, want 1 to %d", count, maxSections)
	}
	for i := uint64(0); failed == nil && i < count; i++ {
		layout.Ranges = append(layout.Ranges, PageRange{base + number("range start"), number("range length")})
	}
	if failed != nil {
		return HOBLayout{}, failed
	}
	if len(b) != 0 {
		return HOBLayout{}, badHOB("%d bytes after its end", len(b))
	}
	if err := layout.check(); err != nil {
		return HOBLayout{}, err
	}
	if layout.Ranges[0].Start != base {
		return HOBLayout{}, badHOB("the first range does not begin at the base page")
	}
	return layout, nil
}

func checkMemory(memory uint64) error {
	if memory == 0 || memory%pageSize != 0 || memory > maxMemory {
		return fault.New("memory_size", "guest memory of %d bytes: want a whole number of pages, at most %d", memory, uint64(maxMemory))
	}
	return nil
}
