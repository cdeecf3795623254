// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"sort"
	"strings"
	"time"
)

// epoch is the time stamp of everything in an image: 2026-01-01 00:00:00 UTC.
const epoch = 1767225600

type kind byte

const (
	file     kind = 'f'
	dir      kind = 'd'
	symlink  kind = 'l'
	hardlink kind = 'h'
	char     kind = 'c'
)

// node is one entry of a file tree in memory. Owner is always 0:0, the time
// always epoch: a tree has only what its content decides.
type node struct {
	kind   kind
	mode   uint32 // permission bits
	data   []byte // file
	from   string // file: read from this path instead of data
	target string // symlink, hardlink (a path in the tree)
	major  uint32 // char
	minor  uint32
}

// tree maps slash-separated relative paths, such as "usr/bin/crun", to nodes.
type tree map[string]node

// add puts a node and its missing parent directories (0755) into the tree.
func (t tree) add(name string, n node) {
	for p := path.Dir(name); p != "."; p = path.Dir(p) {
		if _, ok := t[p]; !ok {
			t[p] = node{kind: dir, mode: 0o755}
		}
	}
	t[name] = n
}

// names returns the paths in the order they are stored: parents first, and
// hard links after the files they name.
func (t tree) names() []string {
	out := make([]string, 0, len(t))
	for name := range t {
		out = append(out, name)
	}
	sort.Strings(out)
	return out
}

// list renders the tree as the committed file lists have it: type, mode, path,
// and where a link points.
func (t tree) list() string {
	var b strings.Builder
	for _, name := range t.names() {
		n := t[name]
		fmt.Fprintf(&b, "%c %04o /%s", n.kind, n.mode, name)
		if n.target != "" {
			fmt.Fprintf(&b, " -> %s", n.target)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// digest hashes names, modes and content.
func (t tree) digest() (string, error) {
	h := sha256.New()
	for _, name := range t.names() {
		n := t[name]
		sum := sha256.Sum256(n.data)
		content := hex.EncodeToString(sum[:])
		if n.from != "" {
			var err error
			if content, err = hashFile(n.from); err != nil {
				return "", err
			}
		}
		fmt.Fprintf(h, "%c %o %q %q %s %d %d\n", n.kind, n.mode, name, n.target, content, n.major, n.minor)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func (n node) open() (io.ReadCloser, int64, error) {
	if n.from == "" {
		return io.NopCloser(bytes.NewReader(n.data)), int64(len(n.data)), nil
	}
	f, err := os.Open(n.from)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

// writeTar writes the tree as a tar stream, the way mksquashfs takes it: no
// staging directory, so neither umask nor user nor file system can leak in.
func (t tree) writeTar(w io.Writer) error {
	tw := tar.NewWriter(w)
	put := func(name string, n node) error {
		h := &tar.Header{Name: name, Mode: int64(n.mode), ModTime: time.Unix(epoch, 0), Format: tar.FormatUSTAR}
		var content io.ReadCloser
		switch n.kind {
		case file:
			h.Typeflag = tar.TypeReg
			var err error
			if content, h.Size, err = n.open(); err != nil {
				return err
			}
			defer content.Close()
		case dir:
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
		case symlink:
			h.Typeflag, h.Linkname = tar.TypeSymlink, n.target
		case hardlink:
			h.Typeflag, h.Linkname = tar.TypeLink, n.target
		default:
			return fmt.Errorf("%s: a %c has no place in the root", name, n.kind)
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if content != nil {
			_, err := io.Copy(tw, content)
			return err
		}
		return nil
	}
	if err := put(".", node{kind: dir, mode: 0o755}); err != nil {
		return err
	}
	// Hard links last: a tar reader must have met their target.
	names := t.names()
	links := slices.DeleteFunc(slices.Clone(names), func(s string) bool { return t[s].kind != hardlink })
	names = slices.DeleteFunc(names, func(s string) bool { return t[s].kind == hardlink })
	for _, name := range append(names, links...) {
		if err := put(name, t[name]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return tw.Close()
}

// cpio returns the tree as an initramfs in the kernel's "newc" format
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func (t tree) cpio() ([]byte, error) {
	var b bytes.Buffer
	ino := 0
	put := func(name string, mode, nlink, mtime uint32, data []byte, major, minor uint32) {
		ino++
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			ino, mode, 0, 0, nlink, mtime, len(data), 0, 0, major, minor, len(name)+1, 0, name)
		align4(&b)
		b.Write(data)
		align4(&b)
	}
	for _, name := range t.names() {
		n := t[name]
		switch n.kind {
		case file:
			r, _, err := n.open()
			if err != nil {
				return nil, err
			}
			data, err := io.ReadAll(r)
			r.Close()
			if err != nil {
				return nil, err
			}
			put(name, 0o100000|n.mode, 1, epoch, data, 0, 0)
		case dir:
			put(name, 0o040000|n.mode, 2, epoch, nil, 0, 0)
		case symlink:
			put(name, 0o120000|n.mode, 1, epoch, []byte(n.target), 0, 0)
		case char:
			put(name, 0o020000|n.mode, 1, epoch, nil, n.major, n.minor)
		default:
			return nil, fmt.Errorf("%s: a %c has no place in the initramfs", name, n.kind)
		}
	}
	ino = -1
	put("TRAILER!!!", 0, 1, 0, nil, 0, 0)
	for b.Len()%512 != 0 {
		b.WriteByte(0)
	}
	return b.Bytes(), nil
}

func align4(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}
