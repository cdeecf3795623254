// SPDX-License-Identifier: Apache-2.0

// Package verity writes and checks dm-verity hash trees: what ties every byte of
// the root file system to one hash on the measured kernel command line.
//
// The layout is version 1 of the kernel's dm-verity with the superblock of
// cryptsetup (Documentation/admin-guide/device-mapper/verity.rst), SHA-256, data
// and hash blocks of 4096 bytes, a salt of 32 zero bytes and a zero UUID, as
// guest-os.md §2.4 fixes them. The salt may be zero since the tree protects
// content that is public; it only has to be the same everywhere.
//
// The kernel in the guest is what enforces a tree. This package makes one at
// build time, and lets a host check an image file before it is used; the image
// file is attacker-controlled, so its superblock is never a source of parameters.
package verity

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	// BlockSize is the size of data and hash blocks in bytes.
	BlockSize = 4096
	// SaltSize is the length of the salt, all zero, in bytes.
	SaltSize = 32

	hashSize = sha256.Size
	perBlock = BlockSize / hashSize

	// maxData bounds the data that Tree accepts: 16 GiB, far above any root
	// file system, so that a hostile length cannot ask for terabytes of hashing.
	maxData = 16 << 30
)

// ErrMismatch means that data or tree do not lead to the expected root hash.
var ErrMismatch = errors.New("data does not match the verity root hash")

// superblock is cryptsetup's struct verity_sb, 512 bytes, little endian.
type superblock struct {
	Signature  [8]byte // "verity\0\0"
	Version    uint32  // 1
	HashType   uint32  // 1: the salt comes before the data
	UUID       [16]byte
	Algorithm  [32]byte // "sha256", zero padded
	DataBlock  uint32
	HashBlock  uint32
	DataBlocks uint64
	SaltSize   uint16
	_          [6]byte
	Salt       [256]byte
	_          [168]byte
}

// Tree reads size bytes of data, a positive multiple of BlockSize, and returns
// what is appended to it: the superblock in a block of its own, then the levels
// of hashes from the root's down. The root hash commits to all of data.
func Tree(data io.Reader, size int64) (tree []byte, root [hashSize]byte, err error) {
	leaves, err := leaves(data, size)
	if err != nil {
		return nil, root, err
	}
	var levels [][]byte
	if size == BlockSize {
		root = [hashSize]byte(leaves[:hashSize]) // a single block is its own tree
	} else {
		levels = [][]byte{leaves}
		for len(levels[0]) > BlockSize {
			levels = append([][]byte{hashBlocks(levels[0])}, levels...)
		}
		root = hashBlock(levels[0])
	}

	sb := superblock{Version: 1, HashType: 1, DataBlock: BlockSize, HashBlock: BlockSize,
		DataBlocks: uint64(size / BlockSize), SaltSize: SaltSize}
	copy(sb.Signature[:], "verity\x00\x00")
	copy(sb.Algorithm[:], "sha256")
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, sb); err != nil {
		return nil, root, err
	}
	tree = pad(b.Bytes())
	for _, level := range levels {
		tree = append(tree, level...)
	}
	return tree, root, nil
}

// Verify checks that image holds size bytes of data followed by exactly the
// tree of that data with the given root hash; whatever comes after the tree
// must be zero. It returns ErrMismatch when it does not.
func Verify(image io.Reader, size int64, root [hashSize]byte) error {
	want, got, err := Tree(io.LimitReader(image, size), size)
	if err != nil {
		return err
	}
	if got != root {
		return fmt.Errorf("%w: root hash is %x, expected %x", ErrMismatch, got, root)
	}
	have := make([]byte, len(want))
	if _, err := io.ReadFull(image, have); err != nil {
		return fmt.Errorf("read verity tree: %w", err)
	}
	if !bytes.Equal(have, want) {
		return fmt.Errorf("%w: the stored tree is not the tree of the data", ErrMismatch)
	}
	buf := make([]byte, 1<<16)
	for {
		n, err := image.Read(buf)
		if len(bytes.Trim(buf[:n], "\x00")) != 0 {
			return fmt.Errorf("%w: bytes after the tree", ErrMismatch)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read after verity tree: %w", err)
		}
	}
}

// SetUUID writes the UUID into the superblock at the start of a tree. The root hash
// does not cover it.
func SetUUID(tree []byte, uuid [16]byte) { copy(tree[16:32], uuid[:]) }

// DataBlocks returns how many blocks of data a superblock says that there are, after
// it has found everything else in it (but the UUID) to be as this package writes it.
// The number is the host's word: a wrong one makes the tree lead to another hash, or
// shows less of the data.
func DataBlocks(block []byte) (uint64, error) {
	var sb superblock
	if len(block) < 512 {
		return 0, errors.New("verity superblock: too short")
	}
	if _, err := binary.Decode(block[:512], binary.LittleEndian, &sb); err != nil {
		return 0, fmt.Errorf("verity superblock: %w", err)
	}
	want := superblock{Version: 1, HashType: 1, DataBlock: BlockSize, HashBlock: BlockSize, SaltSize: SaltSize, UUID: sb.UUID, DataBlocks: sb.DataBlocks}
	copy(want.Signature[:], "verity\x00\x00")
	copy(want.Algorithm[:], "sha256")
	exact := make([]byte, 512)
	if _, err := binary.Encode(exact, binary.LittleEndian, want); err != nil || !bytes.Equal(exact, block[:512]) {
		return 0, errors.New("verity superblock: not of format 1 with SHA-256, blocks of 4096 bytes and a salt of zeros")
	}
	if sb.DataBlocks == 0 || sb.DataBlocks > maxData/BlockSize {
		return 0, fmt.Errorf("verity superblock: %d blocks of data", sb.DataBlocks)
	}
	return sb.DataBlocks, nil
}

// TreeSize returns the length in bytes of what Tree appends to so many blocks of data.
func TreeSize(blocks uint64) uint64 {
	size := uint64(BlockSize)
	for n := blocks; n > 1; {
		n = (n + perBlock - 1) / perBlock
		size += n * BlockSize
	}
	return size
}

func leaves(data io.Reader, size int64) ([]byte, error) {
	if size <= 0 || size%BlockSize != 0 || size > maxData {
		return nil, fmt.Errorf("verity: %d bytes of data; must be a positive multiple of %d, at most %d", size, BlockSize, int64(maxData))
	}
	out := make([]byte, 0, (size/BlockSize+perBlock)*hashSize)
	buf := make([]byte, 256*BlockSize)
	for left := size; left > 0; {
		n := min(left, int64(len(buf)))
		if _, err := io.ReadFull(data, buf[:n]); err != nil {
			return nil, fmt.Errorf("read verity data at byte %d of %d: %w", size-left, size, err)
		}
		for at := int64(0); at < n; at += BlockSize {
			h := hashBlock(buf[at : at+BlockSize])
			out = append(out, h[:]...)
		}
		left -= n
	}
	return pad(out), nil
}

// hashBlocks returns the hashes of the blocks of a level, padded to a block.
func hashBlocks(level []byte) []byte {
	var out []byte
	for at := 0; at < len(level); at += BlockSize {
		h := hashBlock(level[at : at+BlockSize])
		out = append(out, h[:]...)
	}
	return pad(out)
}

func hashBlock(block []byte) (sum [hashSize]byte) {
	var salted [SaltSize + BlockSize]byte
	copy(salted[SaltSize:], block)
	return sha256.Sum256(salted[:])
}

func pad(b []byte) []byte {
	if rest := len(b) % BlockSize; rest != 0 {
		b = append(b, make([]byte, BlockSize-rest)...)
	}
	return b
}
