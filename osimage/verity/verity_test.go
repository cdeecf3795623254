// SPDX-License-Identifier: Apache-2.0

package verity

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// pattern is data whose blocks all differ.
func pattern(blocks int) []byte {
	b := make([]byte, blocks*BlockSize)
	for i := range b {
		b[i] = byte(i*7 + i/BlockSize*13 + i>>16)
	}
	return b
}

func TestTreeHasTheRootHashThatVeritysetupComputes(t *testing.T) {
	// `veritysetup format --salt=<64 zeros> --uuid=<zero>` of cryptsetup 2.6.1.
	for blocks, want := range knownRoots {
		_, root, err := Tree(bytes.NewReader(pattern(blocks)), int64(blocks)*BlockSize)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(root[:]); got != want {
			t.Errorf("%d blocks: root %s, veritysetup says %s", blocks, got, want)
		}
	}
}

func TestVeritysetupAcceptsTheTree(t *testing.T) {
	tool, err := exec.LookPath("veritysetup")
	if err != nil {
		t.Skip("SKIP: veritysetup is not installed (package cryptsetup-bin); the known root hashes are still compared")
	}
	for blocks := range knownRoots {
		t.Run(fmt.Sprintf("%d blocks", blocks), func(t *testing.T) {
			data := pattern(blocks)
			tree, root, err := Tree(bytes.NewReader(data), int64(len(data)))
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(path, append(data, tree...), 0o600); err != nil {
				t.Fatal(err)
			}
			verify := func() ([]byte, error) {
				return exec.Command(tool, "verify", path, path, hex.EncodeToString(root[:]), fmt.Sprintf("--hash-offset=%d", len(data))).CombinedOutput()
			}
			if out, err := verify(); err != nil {
				t.Fatalf("veritysetup verify: %v: %s", err, out)
			}
			broken := append(bytes.Clone(data), tree...)
			broken[len(data)/2] ^= 1
			if err := os.WriteFile(path, broken, 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := verify(); err == nil {
				t.Fatalf("veritysetup accepts altered data: %s", out)
			}
		})
	}
}

func TestVerifyRefusesEveryAlteredByteClass(t *testing.T) {
	const blocks = 300 // two levels
	data := pattern(blocks)
	tree, root, err := Tree(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	image := append(bytes.Clone(data), tree...)
	image = append(image, make([]byte, 3*BlockSize)...)
	if err := Verify(bytes.NewReader(image), int64(len(data)), root); err != nil {
		t.Fatalf("the image as written: %v", err)
	}
	for name, at := range map[string]int{
		"first byte of the data":   0,
		"last byte of the data":    len(data) - 1,
		"superblock":               len(data) + 4,
		"padding of superblock":    len(data) + 4000,
		"top level of the tree":    len(data) + BlockSize,
		"lowest level of it":       len(data) + 2*BlockSize,
		"byte after the tree":      len(data) + len(tree),
		"last byte of the padding": len(image) - 1,
	} {
		t.Run(name, func(t *testing.T) {
			bad := bytes.Clone(image)
			bad[at] ^= 0x80
			if err := Verify(bytes.NewReader(bad), int64(len(data)), root); !errors.Is(err, ErrMismatch) {
				t.Fatalf("error %v, want ErrMismatch", err)
			}
		})
	}
	t.Run("other root hash", func(t *testing.T) {
		bad := root
		bad[0] ^= 1
		if err := Verify(bytes.NewReader(image), int64(len(data)), bad); !errors.Is(err, ErrMismatch) {
			t.Fatalf("error %v, want ErrMismatch", err)
		}
	})
	t.Run("cut within the data", func(t *testing.T) {
		if err := Verify(bytes.NewReader(image[:BlockSize]), int64(len(data)), root); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("error %v, want an end of file", err)
		}
	})
	t.Run("cut within the tree", func(t *testing.T) {
		if err := Verify(bytes.NewReader(image[:len(data)+BlockSize]), int64(len(data)), root); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("error %v, want an unexpected end of file", err)
		}
	})
}

func TestTreeRefusesSizesThatAreNoWholeBlocks(t *testing.T) {
	for _, size := range []int64{0, -4096, 1, 4095, 4097, maxData + BlockSize} {
		if _, _, err := Tree(bytes.NewReader(nil), size); err == nil {
			t.Errorf("size %d accepted", size)
		}
	}
}

// knownRoots maps numbers of blocks to the root hash of that much pattern, as
// `veritysetup format` of cryptsetup 2.6.1 prints it: one block, a full and an
// overfull lowest level, and three levels.
var knownRoots = map[int]string{
	1:     "f92ab352a6783be4e02ce6f930f50ecd1641d919a3e091f90ffab6d49013aa69",
	2:     "8802b2682926bccdf2dcff37b5bc882df00b80be39050d99f15bd3d451148296",
	128:   "c48b06efee5090c4bebcdc5ba3f6aef524086e496398ef2770f20c922211c311",
	129:   "4ee36a36370284dd3b025066dbcbe76b3aec43bce0ca96376d65167934a1514b",
	300:   "7c41594264f06543a2e575097ab31039fb209856ceb91007a24107995120b32b",
	16385: "384bbc76c683d08a38c14593380a05bf4c86122d6309458ec5768a357660038b",
}
