// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
)

func data(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i * i >> 7)
	}
	return b
}

func build(t *testing.T, d []byte) ([]byte, [32]byte) {
	t.Helper()
	var b bytes.Buffer
	root, err := Build(&b, bytes.NewReader(d), int64(len(d)))
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), root
}

func TestImageHasItsPartsWhereTheTableSays(t *testing.T) {
	d := data(3<<20 + 4096)
	image, root := build(t, d)
	again, _ := build(t, d)
	if !bytes.Equal(image, again) {
		t.Error("two images of the same data differ")
	}
	if len(image)%gpt.Align != 0 || string(image[512:520]) != "EFI PART" || string(image[len(image)-512:len(image)-504]) != "EFI PART" {
		t.Fatalf("%d bytes without tables at both ends", len(image))
	}
	// Entries of 128 bytes from sector 2: first and last sector at 32, name at 56.
	le := func(b []byte) (n int64) {
		for i := 7; i >= 0; i-- {
			n = n<<8 | int64(b[i])
		}
		return n
	}
	var parts [][]byte
	for i, label := range []string{LabelMetadata, LabelData, LabelVerity} {
		e := image[1024+128*i:]
		name := strings.TrimRight(strings.ReplaceAll(string(e[56:128]), "\x00", ""), "\x00")
		first, last := le(e[32:]), le(e[40:])
		if name != label || first*512%gpt.Align != 0 {
			t.Errorf("partition %d is %q from sector %d", i+1, name, first)
		}
		parts = append(parts, image[first*512:(last+1)*512])
	}
	if got, err := ParseMetadata(parts[0]); err != nil || got != root {
		t.Errorf("metadata %x, %v", got, err)
	}
	if !bytes.Equal(parts[1], d) {
		t.Error("the data are not in the second partition")
	}
	blocks, err := verity.DataBlocks(parts[2])
	if err != nil || blocks != uint64(len(d)/4096) || verity.TreeSize(blocks) != uint64(len(parts[2])) {
		t.Errorf("%d blocks, tree of %d bytes, %v", blocks, len(parts[2]), err)
	}
	tree, want, err := verity.Tree(bytes.NewReader(d), int64(len(d)))
	if err != nil || want != root || !bytes.Equal(tree[512:], parts[2][512:]) {
		t.Errorf("tree or root differ: %v", err)
	}
	sum := sha256.Sum256(d)
	if u := parts[2][16:32]; u[0] != sum[0] || u[6]>>4 != 4 || u[8]>>6 != 2 || !bytes.Equal(u[9:], sum[9:16]) {
		t.Errorf("UUID %x of data %x", u, sum[:16])
	}
}

// The rule of guest-os.md §9, computed here by hand.
func TestIdentifiers(t *testing.T) {
	root := [32]byte{0xab}
	text := "\x12\x00\x00\x00\x00\x00\x00\x00dstack-verity-disk" + "\x40\x00\x00\x00\x00\x00\x00\x00" + hex.EncodeToString(root[:])
	sum := sha256.Sum256([]byte(text))
	got := id("dstack-verity-disk", root)
	if got[3] != sum[0] || got[0] != sum[3] || got[7]>>4 != 4 || got[8]>>6 != 2 || !bytes.Equal(got[9:], sum[9:16]) {
		t.Errorf("%x of %x", got, sum[:16])
	}
	if id("dstack-verity-data", root) == got || id("dstack-verity-disk", [32]byte{}) == got {
		t.Error("identifiers collide")
	}
}

func TestBuildRefuses(t *testing.T) {
	for _, size := range []int64{0, 1, 4095, -1} {
		if _, err := Build(&bytes.Buffer{}, bytes.NewReader(data(8192)), size); err == nil {
			t.Errorf("%d bytes were accepted", size)
		}
	}
	if _, err := Build(&bytes.Buffer{}, bytes.NewReader(data(4096)), 8192); err == nil {
		t.Error("data shorter than said were accepted")
	}
}

func TestMetadataIsExact(t *testing.T) {
	good := Metadata([32]byte{1})
	if _, err := ParseMetadata(good); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 15, 16, 19, 52, 4095} {
		b := bytes.Clone(good)
		b[i] ^= 1
		if _, err := ParseMetadata(b); !errors.Is(err, ErrMetadata) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	for _, b := range [][]byte{nil, good[:4095], append(bytes.Clone(good), 0)} {
		if _, err := ParseMetadata(b); !errors.Is(err, ErrMetadata) {
			t.Errorf("%d bytes: %v", len(b), err)
		}
	}
}

func FuzzMetadata(f *testing.F) {
	f.Add(Metadata([32]byte{1}))
	f.Add(make([]byte, MetadataSize))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if root, err := ParseMetadata(b); err == nil && !bytes.Equal(Metadata(root), b) {
			t.Fatal("accepted what would not be written")
		}
	})
}
