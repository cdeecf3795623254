// SPDX-License-Identifier: Apache-2.0

// Package hostshare is the one thing that a host hands to a guest before it boots:
// a few files in a USTAR archive on a read-only virtio-blk disk whose serial number
// is [Serial]. It replaces upstream's shared directory (spec guest-os.md §3), which
// a host could change, link and grow while the guest was reading it (threats.md D05).
//
// # Guarantees
//
// [Read] reads the disk once, front to back, into memory, and what it returns is
// what everybody uses: there is no second look. It accepts regular files with the
// names of guest-os.md §3 only, each at most once and each within its limit, and
// after the end of the archive only zeros. [Write] makes exactly such archives,
// the same bytes for the same files.
//
// # Trust
//
// Everything here is chosen by the host, byte by byte. [Classes] says for each file
// and field why that is bearable: it is measured, or verified by cryptography, or
// mere transport, where a lie costs availability and nothing else (threats.md D06).
// A test walks the table against the types, so a new field without a class fails.
package hostshare

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/dstack-go/dstack/internal/fault"
)

// Serial is the serial number of the virtio-blk disk that carries the archive.
const Serial = "dstack-shared"

// MaxSize bounds the whole disk, in bytes.
const MaxSize = 16 << 20

// Names of the files.
const (
	AppComposeName   = "app-compose.json"
	SysConfigName    = ".sys-config.json"
	InstanceInfoName = ".instance_info"
	EncryptedEnvName = ".encrypted-env"
	UserConfigName   = ".user-config"
)

// entry is one allowed file. The order is that of the archive.
type entry struct {
	name     string
	limit    int64 // bytes
	required bool
}

var entries = []entry{
	{AppComposeName, 10 << 20, true},
	{SysConfigName, 32 << 10, true},
	{InstanceInfoName, 10 << 10, false},
	{EncryptedEnvName, 256 << 10, false},
	{UserConfigName, 1 << 20, false},
}

// Limit returns the largest allowed size of a file in bytes, and whether a file of
// that name may exist at all.
func Limit(name string) (limit int64, known bool) {
	for _, e := range entries {
		if e.name == name {
			return e.limit, true
		}
	}
	return 0, false
}

// Files maps names to contents. An empty file is present with an empty content; an
// absent one is not in the map.
type Files map[string][]byte

func (f Files) check() error {
	for name, data := range f {
		limit, known := Limit(name)
		if !known {
			return fault.New("shared_unknown_file", "shared blob: no file may be called %q", name)
		}
		if int64(len(data)) > limit {
			return tooLarge(name, int64(len(data)), limit)
		}
	}
	for _, e := range entries {
		if _, ok := f[e.name]; e.required && !ok {
			return fault.New("shared_missing", "shared blob: %s is missing", e.name)
		}
	}
	return nil
}

func tooLarge(name string, size, limit int64) error {
	return fault.New("shared_file_too_large", "shared blob: %s has %d bytes, more than the allowed %d", name, size, limit).
		WithFix("make %s smaller", name)
}

const block = 512

// Offsets in a USTAR header (POSIX.1-1988; POSIX.1-2017, pax, "ustar Interchange
// Format"). Numbers are octal ASCII text.
const (
	offName     = 0   // 100 bytes
	offMode     = 100 // 8
	offUID      = 108 // 8
	offGID      = 116 // 8
	offSize     = 124 // 12
	offMtime    = 136 // 12
	offChecksum = 148 // 8
	offType     = 156 // 1
	offLink     = 157 // 100
	offMagic    = 257 // "ustar\0" "00"
	offPrefix   = 345 // 155
	endPrefix   = 500
)

const magic = "ustar\x0000"

// Write returns the archive: files in the order of guest-os.md §3, mode 0444, owner
// and time zero, closed by two zero blocks; its length is a multiple of 512. It
// refuses what Read would.
func Write(files Files) ([]byte, error) {
	if err := files.check(); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, e := range entries {
		data, ok := files[e.name]
		if !ok {
			continue
		}
		var h [block]byte
		copy(h[offName:], e.name)
		copy(h[offMode:], "0000444\x00")
		copy(h[offUID:], "0000000\x00")
		copy(h[offGID:], "0000000\x00")
		copy(h[offSize:], fmt.Sprintf("%011o\x00", len(data)))
		copy(h[offMtime:], "00000000000\x00")
		h[offType] = '0'
		copy(h[offMagic:], magic)
		copy(h[offChecksum:], fmt.Sprintf("%06o\x00 ", checksum(&h)))
		out.Write(h[:])
		out.Write(data)
		out.Write(make([]byte, padding(len(data))))
	}
	out.Write(make([]byte, 2*block))
	return out.Bytes(), nil
}

func padding(n int) int { return (block - n%block) % block }

// checksum is the sum of the header's bytes with the checksum field as spaces.
func checksum(h *[block]byte) int64 {
	var sum int64
	for i, b := range h {
		if i >= offChecksum && i < offChecksum+8 {
			b = ' '
		}
		sum += int64(b)
	}
	return sum
}

// Read parses an archive, to the end of r. The errors have the codes
// shared_truncated, shared_malformed, shared_unknown_file, shared_duplicate_file,
// shared_not_regular, shared_file_too_large, shared_too_large, shared_trailing_data
// and shared_missing; an error of r itself is passed on without a code.
func Read(r io.Reader) (Files, error) {
	in := &source{r: io.LimitReader(r, MaxSize+1)}
	files := make(Files)
	var h [block]byte
	for {
		if err := in.fill(h[:]); err != nil {
			return nil, err
		}
		if h == [block]byte{} {
			break
		}
		name, size, err := parseHeader(&h)
		if err != nil {
			return nil, fmt.Errorf("at byte %d: %w", in.off-block, err)
		}
		if _, twice := files[name]; twice {
			return nil, fault.New("shared_duplicate_file", "shared blob: %s occurs twice", name)
		}
		data := make([]byte, size+int64(padding(int(size))))
		if err := in.fill(data); err != nil {
			return nil, err
		}
		if !zero(data[size:]) {
			return nil, fault.New("shared_malformed", "shared blob: the padding after %s is not zero", name)
		}
		files[name] = data[:size:size]
	}
	if err := in.fill(h[:]); err != nil { // the second end-of-archive block
		return nil, err
	}
	if h != [block]byte{} {
		return nil, fault.New("shared_trailing_data", "shared blob: data after the end of the archive, at byte %d", in.off-block)
	}
	rest := make([]byte, 64<<10)
	for {
		n, err := in.r.Read(rest)
		in.off += int64(n)
		if in.off > MaxSize {
			return nil, fault.New("shared_too_large", "shared blob: larger than %d bytes", MaxSize)
		}
		if !zero(rest[:n]) {
			return nil, fault.New("shared_trailing_data", "shared blob: data after the end of the archive, before byte %d", in.off)
		}
		if errors.Is(err, io.EOF) {
			return files, files.check()
		}
		if err != nil {
			return nil, fmt.Errorf("read shared blob at byte %d: %w", in.off, err)
		}
	}
}

// source reads whole pieces and counts.
type source struct {
	r   io.Reader
	off int64
}

func (s *source) fill(p []byte) error {
	n, err := io.ReadFull(s.r, p)
	s.off += int64(n)
	if s.off > MaxSize {
		return fault.New("shared_too_large", "shared blob: larger than %d bytes", MaxSize)
	}
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fault.New("shared_truncated", "shared blob: ends at byte %d, before the end of the archive", s.off)
	case err != nil:
		return fmt.Errorf("read shared blob at byte %d: %w", s.off, err)
	}
	return nil
}

// parseHeader returns the name and size of a regular file. Mode, owner and time say
// nothing to us and are ignored.
func parseHeader(h *[block]byte) (name string, size int64, err error) {
	if string(h[offMagic:offMagic+len(magic)]) != magic {
		return "", 0, fault.New("shared_malformed", "shared blob: not a USTAR header")
	}
	sum, err := octal(h[offChecksum : offChecksum+8])
	if err != nil || sum != checksum(h) {
		return "", 0, fault.New("shared_malformed", "shared blob: the header's checksum is wrong")
	}
	raw := h[offName:offMode]
	if i := bytes.IndexByte(raw, 0); i >= 0 && zero(raw[i:]) {
		raw = raw[:i]
	} // else a full name or bytes after the NUL: not one of ours
	name = string(raw)
	limit, known := Limit(name)
	if !known || !zero(h[offPrefix:endPrefix]) {
		return "", 0, fault.New("shared_unknown_file", "shared blob: no file may be called %q", name)
	}
	if h[offType] != '0' || !zero(h[offLink:offMagic]) {
		return "", 0, fault.New("shared_not_regular", "shared blob: %s is not a regular file (type %q)", name, h[offType])
	}
	size, err = octal(h[offSize:offMtime])
	if err != nil {
		return "", 0, fault.Wrap(err, "shared_malformed", "shared blob: size of %s", name)
	}
	if size > limit {
		return "", 0, tooLarge(name, size, limit)
	}
	return name, size, nil
}

// octal parses digits closed by at least one NUL or space; GNU's binary numbers are
// refused.
func octal(field []byte) (int64, error) {
	text := bytes.TrimRight(field, " \x00")
	if len(text) == len(field) || len(text) == 0 {
		return 0, fmt.Errorf("not an octal number: %q", field)
	}
	for _, c := range text {
		if c < '0' || c > '7' {
			return 0, fmt.Errorf("not an octal number: %q", field)
		}
	}
	return strconv.ParseInt(string(text), 8, 64)
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
