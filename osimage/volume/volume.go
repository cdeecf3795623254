// SPDX-License-Identifier: Apache-2.0

// Package volume writes and reads the images of verity volumes: read-only disks with
// data or models that a manifest names by a root hash (guest-os.md §9).
//
// An image is a disk with a GUID partition table and three partitions: "dstack-volume"
// with one block that advertises the root hash, "dstack-data" with the file system,
// and "dstack-verity" with superblock and hash tree of dm-verity. The same data give
// the same image, byte for byte. All of it is attacker-controlled when it is read;
// what binds the data is the root hash in the measured manifest.
//
// Where the specification leaves a byte open: an identifier is the first 16 bytes of
// the hash with the bits of a version 4 UUID, written in the table with its first
// three groups little-endian, as tables have them.
package volume

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
)

// The names of the partitions, in order.
const (
	LabelMetadata = "dstack-volume"
	LabelData     = "dstack-data"
	LabelVerity   = "dstack-verity"
)

const (
	// MetadataSize is the length of the first partition in bytes.
	MetadataSize = 4096

	magic = "DSTACK_VOLUME\x00\x00\x00"
	kind  = 1
)

// ErrMetadata means that a block is not the first partition of a volume.
var ErrMetadata = errors.New("volume metadata: malformed")

// Metadata returns the first partition of a volume with the root hash: magic, kind as
// 4 bytes little-endian, root hash, zeros.
func Metadata(root [32]byte) []byte {
	b := make([]byte, MetadataSize)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[16:], kind)
	copy(b[20:], root[:])
	return b
}

// ParseMetadata returns the root hash that a volume advertises, by which it is found
// and nothing else.
func ParseMetadata(b []byte) (root [32]byte, err error) {
	if len(b) != MetadataSize {
		return root, ErrMetadata
	}
	copy(root[:], b[20:52])
	if string(b) != string(Metadata(root)) {
		return [32]byte{}, ErrMetadata
	}
	return root, nil
}

// id derives an identifier from a label and the root hash: SHA-256 over each as a
// length of 8 bytes, little-endian, and the text, the hash in hexadecimal.
func id(label string, root [32]byte) [16]byte {
	h := sha256.New()
	for _, part := range []string{label, hex.EncodeToString(root[:])} {
		_ = binary.Write(h, binary.LittleEndian, uint64(len(part)))
		io.WriteString(h, part)
	}
	u := uuid(h.Sum(nil))
	return [16]byte{u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]}
}

// uuid is the first 16 bytes with the version and variant of RFC 9562 §5.4.
func uuid(sum []byte) [16]byte {
	u := [16]byte(sum)
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return u
}

// Build writes the image of a volume with size bytes of data, a squashfs or ext4 file
// system whose length is a multiple of 4096, and returns the root hash that the
// manifest names.
func Build(w io.Writer, data io.ReaderAt, size int64) (root [32]byte, err error) {
	tree, root, err := verity.Tree(io.NewSectionReader(data, 0, size), size)
	if err != nil {
		return root, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(data, 0, size)); err != nil {
		return root, err
	}
	verity.SetUUID(tree, uuid(h.Sum(nil)))

	const dataAt = 2 * gpt.Align
	treeAt := dataAt + roundUp(size)
	total := treeAt + roundUp(int64(len(tree))) + gpt.Align
	front, back := gpt.Tables(id("dstack-verity-disk", root), total, []gpt.Entry{
		{Name: LabelMetadata, ID: id("dstack-volume-metadata", root), Start: gpt.Align, Size: MetadataSize},
		{Name: LabelData, ID: id("dstack-verity-data", root), Start: dataAt, Size: size},
		{Name: LabelVerity, ID: id("dstack-verity-hash", root), Start: treeAt, Size: int64(len(tree))},
	})
	metadata := Metadata(root)
	for _, part := range []struct {
		content io.Reader
		size    int64
		upTo    int64
	}{
		{bytes.NewReader(front), int64(len(front)), gpt.Align},
		{bytes.NewReader(metadata), int64(len(metadata)), dataAt},
		{io.NewSectionReader(data, 0, size), size, treeAt},
		{bytes.NewReader(tree), int64(len(tree)), total - gpt.Align},
		{bytes.NewReader(back), int64(len(back)), total},
	} {
		n, err := io.Copy(w, part.content)
		if err == nil && n != part.size {
			err = fmt.Errorf("the data changed while they were read")
		}
		if err == nil {
			_, err = w.Write(make([]byte, (gpt.Align-part.size%gpt.Align)%gpt.Align))
		}
		if err != nil {
			return root, fmt.Errorf("write the volume up to byte %d: %w", part.upTo, err)
		}
	}
	return root, nil
}

func roundUp(n int64) int64 { return (n + gpt.Align - 1) / gpt.Align * gpt.Align }
