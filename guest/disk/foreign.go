// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/dstack-go/dstack/internal/fault"
)

// Kind is what the start of a data disk is.
type Kind int

const (
	// Foreign: something that is not ours, or is damaged beyond being known.
	Foreign Kind = iota
	// Blank: HeadSize zero bytes.
	Blank
	// Sealed: a record that says it is ours. Its MAC was not checked.
	Sealed
)

// State is a first look at a disk, by which nothing is decided but whether to
// refuse: all of it is the host's word.
type State struct {
	Kind Kind
	What string // for people: "a LUKS2 header with a null cipher"
}

// Inspect looks at the disk at path. It opens it for reading only.
func Inspect(path string) (State, error) {
	head, err := readHead(path)
	if err != nil {
		return State{}, err
	}
	return stateOf(head), nil
}

// readHead reads the head of the disk once: whatever is decided is decided about
// these bytes, and the disk is not asked again (threats.md E02).
func readHead(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(err, "disk_read", "open the data disk")
	}
	defer f.Close()
	head := make([]byte, HeadSize)
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, fault.Wrap(err, "disk_read", "read the start of the data disk %s", path)
	}
	return head, nil
}

func stateOf(head []byte) State {
	switch {
	case bytes.HasPrefix(head, []byte(recordMagic)):
		return State{Sealed, "a sealed volume"}
	case len(bytes.TrimLeft(head, "\x00")) == 0:
		return State{Blank, "zero bytes"}
	}
	return State{Foreign, looksLike(head)}
}

// looksLike names what is at the start of a disk, to tell a user what was attached.
func looksLike(head []byte) string {
	has := func(at int, magic string) bool {
		return len(head) >= at+len(magic) && string(head[at:at+len(magic)]) == magic
	}
	if has(0, "LUKS\xba\xbe") {
		return luks(head, 0)
	}
	// The second header of LUKS2 lies at one of these, should the first be gone.
	for at := 0x4000; at < HeadSize; at *= 2 {
		if has(at, "SKUL\xba\xbe") {
			return luks(head, at)
		}
	}
	for _, m := range []struct {
		at          int
		magic, what string
	}{
		{512, "EFI PART", "a GUID partition table"},
		{0, "integrt\x00", "a dm-integrity superblock"},
		{0, "verity\x00\x00", "a dm-verity superblock"},
		{0, "XFSB", "an XFS file system"},
		{0, "hsqs", "a squashfs file system"},
		{1080, "\x53\xef", "an ext2, ext3 or ext4 file system"},
		{0x10040, "_BHRfS_M", "a btrfs file system"},
		{128 << 10, "\x0c\xb1\xba\x00\x00\x00\x00\x00", "a ZFS pool"},
		{512, "LABELONE", "an LVM volume"},
		{4086, "SWAPSPACE2", "swap space"},
		{510, "\x55\xaa", "a partition table"},
	} {
		if has(m.at, m.magic) {
			return m.what
		}
	}
	return "data of an unknown kind"
}

// luks describes a header without believing it.
func luks(head []byte, at int) string {
	what := "a LUKS header"
	if len(head) >= at+8 {
		what = fmt.Sprintf("a LUKS%d header", binary.BigEndian.Uint16(head[at+6:]))
	}
	if at > 0 {
		what = "a second " + what[2:]
	}
	if area := head[at:min(len(head), at+0x4000)]; bytes.Contains(area, []byte("null")) {
		what += " with a null cipher"
	}
	return what
}
