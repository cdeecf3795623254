// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"cmp"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"slices"

	"github.com/dstack-go/dstack/internal/fault"
)

const maxPESections = 96 // the loader of Windows has the same limit

func badPE(format string, args ...any) error {
	return fault.New("pe_malformed", "PE image: "+format, args...)
}

// Authenticode returns the Authenticode digest of a PE image: the hash of
// everything but the checksum field, the certificate table and its entry in the
// header, zero-padded to a multiple of 8 bytes (Microsoft, "Windows Authenticode
// Portable Executable Signature Format"; spec/measurement.md §5.2).
//
// Data after the last section of an unsigned image are refused (code
// pe_trailing_data): upstream leaves them out and edk2 hashes them, so that two
// verifiers would disagree about what was measured. The hash must be linked in.
func Authenticode(pe []byte, alg crypto.Hash) ([]byte, error) {
	if !alg.Available() {
		return nil, fault.New("hash_unavailable", "hash function %d is not linked in", alg)
	}
	h := alg.New()
	if err := authenticode(pe, h); err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}

// AuthenticodeSHA256 is what firmware extends into PCR 4 of a TPM for an image it
// starts. It is given the bytes that the firmware saw.
func AuthenticodeSHA256(pe []byte) (digest [sha256.Size]byte, err error) {
	h := sha256.New()
	if err := authenticode(pe, h); err != nil {
		return digest, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

func authenticode(pe []byte, h hash.Hash) error {
	le := binary.LittleEndian
	size := uint64(len(pe))
	if size < 0x40 || size > maxKernel {
		return badPE("%d bytes", size)
	}
	if pe[0] != 'M' || pe[1] != 'Z' {
		return badPE("does not begin with MZ")
	}
	header := uint64(le.Uint32(pe[0x3c:]))
	// "PE\0\0" ‖ COFF header of 20 bytes ‖ optional header.
	const coff = 24
	if header+coff > size || string(pe[header:header+4]) != "PE\x00\x00" {
		return badPE("no PE header at %#x", header)
	}
	sections := uint64(le.Uint16(pe[header+6:]))
	optSize := uint64(le.Uint16(pe[header+20:]))
	opt := header + coff
	if opt+optSize > size || optSize < 2 {
		return badPE("optional header of %d bytes at %#x", optSize, opt)
	}
	if sections == 0 || sections > maxPESections {
		return badPE("%d sections, want 1 to %d", sections, maxPESections)
	}
	var directories uint64 // offset of the data directories in the optional header
	switch magic := le.Uint16(pe[opt:]); magic {
	case 0x20b:
		directories = 112
	case 0x10b:
		directories = 96
	default:
		return badPE("optional header magic %#x", magic)
	}
	const security = 4 // index of the certificate table
	entry := opt + directories + security*8
	if optSize < directories+(security+1)*8 || le.Uint32(pe[opt+directories-4:]) <= security {
		return badPE("no certificate table entry in the optional header")
	}
	checksum := opt + 64
	headers := uint64(le.Uint32(pe[opt+60:]))
	table := opt + optSize
	if headers > size || headers < entry+8 || headers < table+40*sections {
		return badPE("headers of %d bytes in a file of %d", headers, size)
	}
	certAt, certSize := uint64(le.Uint32(pe[entry:])), uint64(le.Uint32(pe[entry+4:]))
	if certSize != 0 && (certAt < headers || certAt+certSize != size) {
		return badPE("certificate table %#x+%#x does not end the file of %d bytes", certAt, certSize, size)
	}
	body := size - certSize

	h.Write(pe[:checksum])
	h.Write(pe[checksum+4 : entry])
	h.Write(pe[entry+8 : headers])

	type raw struct{ at, size uint64 }
	var raws []raw
	for i := range sections {
		s := pe[table+40*i:]
		r := raw{at: uint64(le.Uint32(s[20:])), size: uint64(le.Uint32(s[16:]))}
		if r.size == 0 {
			continue
		}
		if r.at < headers || r.at >= body {
			return badPE("section %d at %#x lies outside the file", i, r.at)
		}
		// A last section may be declared larger than the file holds.
		r.size = min(r.size, body-r.at)
		raws = append(raws, r)
	}
	slices.SortStableFunc(raws, func(a, b raw) int { return cmp.Compare(a.at, b.at) })
	// Sections are hashed back to back; edk2 counts their sizes, not their ends. A
	// gap or an overlap would make the count differ from the file's layout.
	next := headers
	for _, r := range raws {
		if r.at < next {
			return badPE("sections overlap at %#x", r.at)
		}
		if r.at > next {
			return badPE("bytes %#x to %#x belong to no section", next, r.at)
		}
		h.Write(pe[r.at : r.at+r.size])
		next = r.at + r.size
	}
	if next < body {
		if certSize == 0 {
			return fault.New("pe_trailing_data", "PE image: %d bytes after its last section, and no signature", body-next)
		}
		h.Write(pe[next:body])
	}
	if rest := size % 8; rest != 0 {
		h.Write(make([]byte, 8-rest))
	}
	return nil
}
