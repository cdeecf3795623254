// SPDX-License-Identifier: Apache-2.0

package acpi

import "encoding/binary"

// Encoding of the ACPI Machine Language (ACPI 6.5, §20.2). A term is its bytes;
// the functions nest as the source text of a definition block would.

// seq is several terms, one after the other.
func seq(terms ...[]byte) []byte {
	n := 0
	for _, t := range terms {
		n += len(t)
	}
	out := make([]byte, 0, n)
	for _, t := range terms {
		out = append(out, t...)
	}
	return out
}

// op is an opcode with its operands.
func op(opcode byte, operands ...[]byte) []byte {
	return append([]byte{opcode}, seq(operands...)...)
}

// extOp is a two byte opcode with its operands.
func extOp(opcode byte, operands ...[]byte) []byte {
	return append([]byte{0x5b, opcode}, seq(operands...)...)
}

// pkgLength encodes a PkgLength (§20.2.4): one byte up to 63, else the low four
// bits and how many bytes follow. n must be below 2^28.
func pkgLength(n int) []byte {
	if n < 1<<6 {
		return []byte{byte(n)}
	}
	out := []byte{byte(n & 15)}
	for n >>= 4; n > 0; n >>= 8 {
		out = append(out, byte(n))
		out[0] += 1 << 6
	}
	return out
}

// sized prefixes a body with a PkgLength that counts itself.
func sized(body []byte) []byte {
	for self := 1; ; self++ {
		if p := pkgLength(len(body) + self); len(p) == self {
			return append(p, body...)
		}
	}
}

func pkgOp(opcode byte, body ...[]byte) []byte    { return op(opcode, sized(seq(body...))) }
func extPkgOp(opcode byte, body ...[]byte) []byte { return extOp(opcode, sized(seq(body...))) }

// integer is the shortest constant (§20.2.3), with no use of Ones.
func integer(n uint64) []byte {
	switch {
	case n <= 1:
		return []byte{byte(n)}
	case n <= 0xff:
		return []byte{0x0a, byte(n)}
	case n <= 0xffff:
		return binary.LittleEndian.AppendUint16([]byte{0x0b}, uint16(n))
	case n <= 0xffff_ffff:
		return binary.LittleEndian.AppendUint32([]byte{0x0c}, uint32(n))
	}
	return binary.LittleEndian.AppendUint64([]byte{0x0e}, n)
}

func text(s string) []byte { return append(append([]byte{0x0d}, s...), 0) }

// name encodes a NameString (§20.2.2) such as `\_SB.PCI0`, `^S28.PCNT` or `\`.
// Segments have at most four characters and are padded with underscores.
func name(path string) []byte {
	var out []byte
	for len(path) > 0 && (path[0] == '\\' || path[0] == '^') {
		out, path = append(out, path[0]), path[1:]
	}
	var segments []byte
	for len(path) > 0 {
		segment := [4]byte{'_', '_', '_', '_'}
		n := 0
		for n < len(path) && path[n] != '.' {
			n++
		}
		copy(segment[:], path[:n])
		segments = append(segments, segment[:]...)
		path = path[min(n+1, len(path)):]
	}
	switch n := len(segments) / 4; n {
	case 0:
		out = append(out, 0)
	case 1:
	case 2:
		out = append(out, 0x2e)
	default:
		out = append(out, 0x2f, byte(n))
	}
	return append(out, segments...)
}

// eisaID packs an EISA product identifier such as PNP0A08 into an integer
// (§19.3.4).
func eisaID(id string) []byte {
	hex := func(c byte) uint32 {
		if c >= 'A' {
			return uint32(c-'A') + 10
		}
		return uint32(c - '0')
	}
	v := uint32(id[0]-'@')<<26 | uint32(id[1]-'@')<<21 | uint32(id[2]-'@')<<16 |
		hex(id[3])<<12 | hex(id[4])<<8 | hex(id[5])<<4 | hex(id[6])
	return binary.BigEndian.AppendUint32([]byte{0x0c}, v)
}

func buffer(data []byte) []byte {
	return pkgOp(0x11, integer(uint64(len(data))), data)
}

// pkg is a package of n elements of which only the given ones are initialised.
func pkg(n int, elements ...[]byte) []byte {
	return pkgOp(0x12, append([][]byte{{byte(n)}}, elements...)...)
}

// Named objects and scopes.

func define(object string, value []byte) []byte { return op(0x08, name(object), value) }

func scope(path string, body ...[]byte) []byte {
	return pkgOp(0x10, name(path), seq(body...))
}

func device(path string, body ...[]byte) []byte {
	return extPkgOp(0x82, name(path), seq(body...))
}

func processor(path string, id byte, body ...[]byte) []byte {
	// No processor register block: address 0, length 0.
	return extPkgOp(0x83, name(path), []byte{id, 0, 0, 0, 0, 0}, seq(body...))
}

// method has args arguments; it may be entered by several threads at once.
func method(path string, args byte, body ...[]byte) []byte {
	return pkgOp(0x14, name(path), []byte{args}, seq(body...))
}

// serialized is a method that one thread at a time may enter.
func serialized(path string, args byte, body ...[]byte) []byte {
	return method(path, args|1<<3, body...)
}

// Address spaces of operation regions.
const (
	systemMemory = 0
	systemIO     = 1
	pciConfig    = 2
)

func opRegion(region string, space byte, offset, length uint64) []byte {
	return extOp(0x80, name(region), []byte{space}, integer(offset), integer(length))
}

// Flags of a field: access width, lock, what happens to the other bits.
const (
	byteAccess   = 1
	dwordAccess  = 3
	lockField    = 1 << 4
	writeAsZeros = 2 << 5
)

func field(region string, flags byte, units ...[]byte) []byte {
	return extPkgOp(0x81, name(region), []byte{flags}, seq(units...))
}

func bits(unit string, n int) []byte { return append(name(unit), pkgLength(n)...) }
func gap(n int) []byte               { return append([]byte{0}, pkgLength(n)...) }

func mutex(object string) []byte { return extOp(0x01, name(object), []byte{0}) }

// lock waits without limit.
func lock(object string) []byte   { return extOp(0x23, name(object), []byte{0xff, 0xff}) }
func unlock(object string) []byte { return extOp(0x27, name(object)) }

func dwordField(source []byte, offset uint64, object string) []byte {
	return op(0x8a, source, integer(offset), name(object))
}

// Statements and expressions.

var none = []byte{0} // NullName: no target

func local(n byte) []byte { return []byte{0x60 + n} }
func arg(n byte) []byte   { return []byte{0x68 + n} }

func ifThen(condition []byte, body ...[]byte) []byte {
	return pkgOp(0xa0, condition, seq(body...))
}
func otherwise(body ...[]byte) []byte { return pkgOp(0xa1, body...) }
func while(condition []byte, body ...[]byte) []byte {
	return pkgOp(0xa2, condition, seq(body...))
}

func ret(value []byte) []byte            { return op(0xa4, value) }
func leaveLoop() []byte                  { return []byte{0xa5} }
func notify(object, value []byte) []byte { return op(0x86, object, value) }

func store(value, target []byte) []byte { return op(0x70, value, target) }
func increment(target []byte) []byte    { return op(0x75, target) }
func index(object, i []byte) []byte     { return op(0x88, object, i, none) }
func derefOf(reference []byte) []byte   { return op(0x83, reference) }

func and(a, b, target []byte) []byte        { return op(0x7b, a, b, target) }
func or(a, b, target []byte) []byte         { return op(0x7d, a, b, target) }
func shiftLeft(a, b []byte) []byte          { return op(0x79, a, b, none) }
func shiftRight(a, b, target []byte) []byte { return op(0x7a, a, b, target) }
func subtract(a, b, target []byte) []byte   { return op(0x74, a, b, target) }

func bothTrue(a, b []byte) []byte    { return op(0x90, a, b) }
func eitherTrue(a, b []byte) []byte  { return op(0x91, a, b) }
func not(a []byte) []byte            { return op(0x92, a) }
func equal(a, b []byte) []byte       { return op(0x93, a, b) }
func greaterThan(a, b []byte) []byte { return op(0x94, a, b) }
func lessThan(a, b []byte) []byte    { return op(0x95, a, b) }

func call(path string, args ...[]byte) []byte { return append(name(path), seq(args...)...) }

// Resource descriptors (ACPI 6.5, §6.4).

// resources is a resource template: a buffer that ends with an end tag whose
// checksum is zero, which counts as correct.
func resources(descriptors ...[]byte) []byte {
	return buffer(append(seq(descriptors...), 0x79, 0))
}

// ioPorts are n ports from base that decode 16 address bits.
func ioPorts(base uint16, alignment, n byte) []byte {
	return []byte{0x47, 1, byte(base), byte(base >> 8), byte(base), byte(base >> 8), alignment, n}
}

// isaIRQ is an ISA interrupt: edge triggered, active high, not shared.
func isaIRQ(n byte) []byte {
	return binary.LittleEndian.AppendUint16([]byte{0x22}, 1<<n)
}

// sharedISAIRQ is an ISA interrupt: level triggered, active low, shared.
func sharedISAIRQ(n byte) []byte {
	return append(binary.LittleEndian.AppendUint16([]byte{0x23}, 1<<n), 0x18)
}

// interrupts are shared, active high interrupts of a consumer.
func interrupts(edge bool, numbers ...byte) []byte {
	out := []byte{0x89, byte(2 + 4*len(numbers)), 0, 1 | 1<<3, byte(len(numbers))}
	if edge {
		out[3] |= 1 << 1
	}
	for _, n := range numbers {
		out = append(out, n, 0, 0, 0)
	}
	return out
}

// memory32 is a fixed range of memory.
func memory32(base, length uint32) []byte {
	out := binary.LittleEndian.AppendUint32([]byte{0x86, 9, 0, 0}, base)
	return binary.LittleEndian.AppendUint32(out, length)
}

// Kinds and flags of address space descriptors. Every range is fixed at both
// ends and positively decoded.
const (
	memoryRange = 0
	ioRange     = 1
	busRange    = 2

	rangeFixed   = 1<<2 | 1<<3
	entireRange  = 3 // of I/O ports
	readWrite    = 1
	rwAndCaching = 1 | 1<<1
)

// addresses is an address space descriptor of width 2, 4 or 8 bytes for the range
// from first to last.
func addresses(width int, kind, flags byte, first, last uint64) []byte {
	tag := map[int]byte{2: 0x88, 4: 0x87, 8: 0x8a}[width]
	out := []byte{tag, byte(3 + 5*width), 0, kind, rangeFixed, flags}
	for _, v := range []uint64{0, first, last, 0, last - first + 1} {
		out = append(out, binary.LittleEndian.AppendUint64(nil, v)[:width]...)
	}
	return out
}

func words(kind, flags byte, first, last uint64) []byte {
	return addresses(2, kind, flags, first, last)
}
func dwords(flags byte, first, last uint64) []byte {
	return addresses(4, memoryRange, flags, first, last)
}
func qwords(flags byte, first, last uint64) []byte {
	return addresses(8, memoryRange, flags, first, last)
}
