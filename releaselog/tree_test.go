// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"math/bits"
	"slices"
	"testing"
)

// What follows is RFC 6962 §2.1 word by word, in the slowest way.

func split(n int) int { return 1 << (bits.Len(uint(n-1)) - 1) } // largest power of two below n

func mth(d [][]byte) []byte {
	switch len(d) {
	case 0:
		s := sha256.Sum256(nil)
		return s[:]
	case 1:
		s := sha256.Sum256(append([]byte{0}, d[0]...))
		return s[:]
	}
	k := split(len(d))
	s := sha256.Sum256(slices.Concat([]byte{1}, mth(d[:k]), mth(d[k:])))
	return s[:]
}

func path(m int, d [][]byte) [][]byte {
	if len(d) == 1 {
		return nil
	}
	if k := split(len(d)); m < k {
		return append(path(m, d[:k]), mth(d[k:]))
	} else {
		return append(path(m-k, d[k:]), mth(d[:k]))
	}
}

func subproof(m int, d [][]byte, b bool) [][]byte {
	if m == len(d) {
		if b {
			return nil
		}
		return [][]byte{mth(d)}
	}
	if k := split(len(d)); m <= k {
		return append(subproof(m, d[:k], b), mth(d[k:]))
	} else {
		return append(subproof(m-k, d[k:], false), mth(d[:k]))
	}
}

// leaf i; no newlines.
func leaf(i int) []byte { return []byte(hex.EncodeToString([]byte{byte(i), byte(i >> 8)})) }

func TestTreeIsThatOfRFC6962(t *testing.T) {
	g := newTree()
	var file bytes.Buffer
	var d [][]byte
	check := []int{1, 2, 3, 7, 8, 255, 256, 257, 300, 511, 512, 513, 768, 1000, 1025}
	for n := 0; n <= 1025; n++ {
		root, err := g.root()
		must(t, err)
		if slices.Contains(check, n) || n < 70 {
			if !bytes.Equal(root[:], mth(d)) {
				t.Fatalf("root of %d entries is %s", n, root)
			}
		}
		if slices.Contains(check, n) || n < 20 && n > 0 {
			snapshot := g.snapshot()
			r := bytes.NewReader(file.Bytes())
			for m := 0; m < n; m += 1 + n/50 {
				got, err := snapshot.inclusion(r, uint64(m))
				must(t, err)
				if !slices.EqualFunc(got, path(m, d), bytes.Equal) {
					t.Fatalf("inclusion of %d in %d", m, n)
				}
			}
			for _, m := range append(check, n) {
				if m > n {
					continue
				}
				got, err := snapshot.consistency(r, uint64(m), uint64(n))
				must(t, err)
				if m < n && !slices.EqualFunc(got, subproof(m, d, true), bytes.Equal) || m == n && len(got) > 0 {
					t.Fatalf("consistency from %d to %d", m, n)
				}
				// Also to a size that is not the newest.
				if m > 2 {
					got, err = snapshot.consistency(r, 2, uint64(m))
					must(t, err)
					if !slices.EqualFunc(got, subproof(2, d[:m], true), bytes.Equal) {
						t.Fatalf("consistency from 2 to %d in %d", m, n)
					}
				}
			}
		}
		d = append(d, leaf(n))
		file.Write(append(leaf(n), '\n'))
		must(t, g.append(leaf(n)))
	}
}

// The leaves and roots that implementations of RFC 6962 publish.
func TestTreeHasThePublishedRoots(t *testing.T) {
	g := newTree()
	for i, v := range [][2]string{
		{"", "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"},
		{"00", "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"},
		{"10", "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"},
		{"2021", "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"},
		{"3031", "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4"},
		{"40414243", "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef"},
		{"5051525354555657", "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c"},
		{"606162636465666768696a6b6c6d6e6f", "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"},
	} {
		data, err := hex.DecodeString(v[0])
		must(t, err)
		must(t, g.append(data))
		if root, err := g.root(); err != nil || root.String() != v[1] {
			t.Errorf("root of %d leaves is %s (%v), want %s", i+1, root, err, v[1])
		}
	}
}

// What a log keeps in memory, for the package comment.
func TestTreeKeepsLittleInMemory(t *testing.T) {
	g := newTree()
	const n = 100_000
	for i := range n {
		must(t, g.append(leaf(i)))
	}
	kept := 8*cap(g.starts) + 32*cap(g.recent)
	for _, u := range g.upper {
		kept += 32 * cap(u)
	}
	if perMillion := kept * 10; perMillion > 600_000 || len(g.recent) > 2*tileSize {
		t.Errorf("%d bytes per million entries, %d leaves", perMillion, len(g.recent))
	}
}
