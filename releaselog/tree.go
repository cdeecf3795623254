// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"slices"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/dstack-go/dstack/internal/fault"
)

// A tile is 256 entries in a row, whose subtree has height 8.
const (
	tileHeight = 8
	tileSize   = 1 << tileHeight
)

var hasher = rfc6962.DefaultHasher

// tree is what stays in memory of a log at one size. A copy is a snapshot: growing
// writes only behind what the copy sees.
type tree struct {
	size   uint64
	end    int64    // bytes of the entries file that it covers
	starts []int64  // where each tile begins in it
	recent []Hash   // leaf hashes, from the first of a tile to the last leaf; 256 at least, if there are
	upper  [][]Hash // upper[k][i] is node i of level tileHeight+k
}

// growing is a tree to which its owner appends.
type growing struct {
	tree
	edge *compact.Range
}

func newTree() *growing {
	return &growing{edge: (&compact.RangeFactory{Hash: hasher.HashChildren}).NewEmptyRange(0)}
}

// append adds the entry that stands next in the entries file.
func (g *growing) append(entry []byte) error {
	if g.size%tileSize == 0 {
		g.starts = append(g.starts, g.end)
		if len(g.recent) == 2*tileSize {
			g.recent = slices.Clone(g.recent[tileSize:])
		}
	}
	leaf := hasher.HashLeaf(entry)
	g.recent = append(g.recent, Hash(leaf))
	g.size++
	g.end += int64(len(entry)) + 1
	return g.edge.Append(leaf, func(id compact.NodeID, hash []byte) {
		if id.Level < tileHeight {
			return
		}
		k := int(id.Level - tileHeight)
		if k == len(g.upper) {
			g.upper = append(g.upper, nil)
		}
		g.upper[k] = append(g.upper[k], Hash(hash))
	})
}

func (g *growing) root() (Hash, error) {
	if g.size == 0 {
		return Hash(hasher.EmptyRoot()), nil
	}
	root, err := g.edge.GetRootHash(nil)
	if err != nil {
		return Hash{}, err
	}
	return Hash(root), nil
}

func (g *growing) snapshot() tree {
	t := g.tree
	t.upper = slices.Clone(g.upper)
	return t
}

// inclusion proves the entry at index to be in the tree.
func (t *tree) inclusion(file io.ReaderAt, index uint64) ([][]byte, error) {
	nodes, err := proof.Inclusion(index, t.size)
	if err != nil {
		return nil, fault.Wrap(err, "release_log_range", "the release log has %d entries", t.size)
	}
	return t.prove(file, nodes)
}

// consistency proves that the tree of size to continues that of size from.
func (t *tree) consistency(file io.ReaderAt, from, to uint64) ([][]byte, error) {
	nodes, err := proof.Consistency(from, to)
	if err != nil || to > t.size {
		return nil, fault.New("release_log_range", "no proof from %d to %d entries: the release log has %d", from, to, t.size)
	}
	return t.prove(file, nodes)
}

func (t *tree) prove(file io.ReaderAt, nodes proof.Nodes) ([][]byte, error) {
	hashes := make([][]byte, len(nodes.IDs))
	// A proof visits a tile for each of its lower levels, in a row.
	last, leaves := ^uint64(0), []Hash(nil)
	for i, id := range nodes.IDs {
		if id.Level >= tileHeight {
			hashes[i] = bytes.Clone(t.upper[id.Level-tileHeight][id.Index][:])
			continue
		}
		begin, end := id.Coverage()
		if tile := begin / tileSize; tile != last {
			var err error
			if leaves, err = t.leaves(file, tile); err != nil {
				return nil, err
			}
			last = tile
		}
		hashes[i] = subtree(leaves[begin%tileSize:][:end-begin])
	}
	return nodes.Rehash(hashes, hasher.HashChildren)
}

// leaves returns the leaf hashes of a tile; the last may be short.
func (t *tree) leaves(file io.ReaderAt, tile uint64) ([]Hash, error) {
	if first := t.size - uint64(len(t.recent)); tile*tileSize >= first {
		at := tile*tileSize - first
		return t.recent[at:min(at+tileSize, uint64(len(t.recent)))], nil
	}
	_, leaves, err := t.read(file, tile)
	return leaves, err
}

// read returns the entries of a tile from the file, and their hashes. That they are
// not those which were logged has the code release_log_damaged.
func (t *tree) read(file io.ReaderAt, tile uint64) ([][]byte, []Hash, error) {
	end := t.end
	if tile+1 < uint64(len(t.starts)) {
		end = t.starts[tile+1]
	}
	data := make([]byte, end-t.starts[tile])
	if _, err := file.ReadAt(data, t.starts[tile]); err != nil {
		return nil, nil, fault.Wrap(err, "release_log_damaged", "read the release log from byte %d", t.starts[tile])
	}
	entries := bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n"))
	leaves := make([]Hash, len(entries))
	for i, e := range entries {
		leaves[i] = Hash(hasher.HashLeaf(e))
	}
	good := false
	if tile < t.size/tileSize {
		good = len(leaves) == tileSize && t.upper[0][tile] == Hash(subtree(leaves))
	} else {
		good = slices.Equal(leaves, t.recent[len(t.recent)-int(t.size%tileSize):])
	}
	if !good {
		return nil, nil, fault.New("release_log_damaged", "entries from %d on are not those that were logged", tile*tileSize)
	}
	return entries, leaves, nil
}

// entries returns count entries from start on, or those until the end or maxReply bytes.
func (t *tree) entries(file io.ReaderAt, start, count uint64) ([][]byte, error) {
	if start > t.size {
		return nil, fault.New("release_log_range", "the release log has %d entries, none from %d on", t.size, start)
	}
	count = min(count, t.size-start)
	var entries [][]byte
	for total := 0; uint64(len(entries)) < count; {
		at := start + uint64(len(entries))
		tile, _, err := t.read(file, at/tileSize)
		if err != nil {
			return nil, err
		}
		for _, e := range tile[at%tileSize:] {
			if total += len(e); uint64(len(entries)) == count || total > maxReply {
				return entries, nil
			}
			entries = append(entries, e)
		}
	}
	return entries, nil
}

// subtree returns the root of a power of two leaves.
func subtree(leaves []Hash) []byte {
	if len(leaves) == 1 {
		return bytes.Clone(leaves[0][:])
	}
	half := len(leaves) / 2
	return hasher.HashChildren(subtree(leaves[:half]), subtree(leaves[half:]))
}

// scan appends entries from the file until the tree has the given size.
func (g *growing) scan(r *bufio.Reader, size uint64) error {
	for g.size < size {
		line, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			return fault.New("release_log_damaged", "the release log ends in entry %d, and its head tells of %d", g.size, size)
		case err != nil:
			return fault.Wrap(err, "release_log_damaged", "read entry %d of the release log", g.size)
		}
		if err := g.append(line[:len(line)-1]); err != nil {
			return err
		}
	}
	return nil
}

// scanTo reads the entries up to a head and holds them against it.
func (g *growing) scanTo(r *bufio.Reader, head Head) error {
	if err := g.scan(r, head.size); err != nil {
		return err
	}
	if root, err := g.root(); err != nil || root != head.root {
		return fault.New("release_log_damaged", "the release log's entries are not those of its head (%v)", err)
	}
	return nil
}

// lineReader reads lines of one entry each, and no longer ones.
func lineReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, MaxEntry+1) }
