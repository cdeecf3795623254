// SPDX-License-Identifier: Apache-2.0

package verity

import (
	"bytes"
	"testing"
)

func TestDataBlocksTakesOnlyOurSuperblock(t *testing.T) {
	for _, blocks := range []uint64{1, 2, 128, 129, 128 * 128, 128*128 + 1} {
		tree, _, err := Tree(bytes.NewReader(make([]byte, blocks*BlockSize)), int64(blocks*BlockSize))
		if err != nil {
			t.Fatal(err)
		}
		SetUUID(tree, [16]byte{1, 2})
		if got, err := DataBlocks(tree); err != nil || got != blocks {
			t.Errorf("%d blocks: %d, %v", blocks, got, err)
		}
		if got := TreeSize(blocks); got != uint64(len(tree)) {
			t.Errorf("%d blocks: tree of %d bytes, said %d", blocks, len(tree), got)
		}
	}
	tree, _, _ := Tree(bytes.NewReader(make([]byte, 2*BlockSize)), 2*BlockSize)
	for _, i := range []int{0, 8, 12, 32, 38, 64, 68, 80, 82, 88, 120, 343, 344, 511} {
		b := bytes.Clone(tree[:512])
		b[i] ^= 1
		if _, err := DataBlocks(b); err == nil {
			t.Errorf("byte %d changed and accepted", i)
		}
	}
	for _, n := range []byte{0x00, 0xff} { // number of blocks: none, too many
		b := bytes.Clone(tree[:512])
		copy(b[72:80], bytes.Repeat([]byte{n}, 8))
		if _, err := DataBlocks(b); err == nil {
			t.Errorf("blocks of %#x accepted", n)
		}
	}
	if _, err := DataBlocks(tree[:511]); err == nil {
		t.Error("a short superblock was accepted")
	}
}

func FuzzDataBlocks(f *testing.F) {
	tree, _, _ := Tree(bytes.NewReader(make([]byte, 2*BlockSize)), 2*BlockSize)
	f.Add(tree[:512])
	f.Add([]byte("verity\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := DataBlocks(b); err == nil && (n == 0 || n > maxData/BlockSize || TreeSize(n) < BlockSize) {
			t.Fatalf("%d blocks", n)
		}
	})
}
