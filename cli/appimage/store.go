// SPDX-License-Identifier: Apache-2.0

package appimage

import (
	"archive/tar"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// dirStore reads below one directory; os.Root refuses links that lead out of it.
type dirStore struct{ root *os.Root }

func openDir(name string) (store, error) {
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, fmt.Errorf("open image layout %s: %w", name, err)
	}
	return dirStore{root}, nil
}

func (d dirStore) size(name string) (int64, error) {
	if !fs.ValidPath(name) {
		return 0, fs.ErrNotExist
	}
	st, err := d.root.Stat(name)
	if err != nil {
		return 0, err
	}
	if !st.Mode().IsRegular() {
		return 0, fs.ErrNotExist
	}
	return st.Size(), nil
}

func (d dirStore) open(name string) (io.ReadCloser, error) { return d.root.Open(name) }

// tarStore reads files out of an uncompressed tarball by offset.
type tarStore struct {
	path  string
	files map[string]span
}

type span struct{ offset, size int64 }

func openTar(name string, l *loader) (store, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open image tarball %s: %w", name, err)
	}
	defer f.Close()
	t := &tarStore{path: name, files: map[string]span{}}
	links := map[string]string{}
	r := tar.NewReader(f)
	for n := 0; ; n++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, l.malformed("the tarball breaks off or is damaged: %v", err)
		}
		if n == maxEntries {
			return nil, fault.New("app_image_too_large", "%s has more than %d entries", name, maxEntries)
		}
		entry := strings.TrimPrefix(h.Name, "./")
		switch h.Typeflag {
		case tar.TypeReg:
			// archive/tar reads headers block by block from a seekable file, so the
			// position is now that of the content.
			offset, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			if _, dup := t.files[entry]; dup {
				return nil, l.malformed("the tarball has %.120q twice", entry)
			}
			t.files[entry] = span{offset, h.Size}
		case tar.TypeSymlink:
			// Old docker writes equal layers once and links to them.
			links[entry] = path.Join(path.Dir(entry), h.Linkname)
		case tar.TypeLink:
			links[entry] = strings.TrimPrefix(h.Linkname, "./")
		case tar.TypeDir:
		default:
			return nil, l.malformed("the tarball has an entry %.120q of type %q", entry, h.Typeflag)
		}
	}
	// One step only: a link to a link is followed by no tool that reads these.
	resolved := map[string]span{}
	for from, to := range links {
		if s, ok := t.files[to]; ok {
			resolved[from] = s
		}
	}
	for from, s := range resolved {
		if _, dup := t.files[from]; dup {
			return nil, l.malformed("the tarball has %.120q twice", from)
		}
		t.files[from] = s
	}
	return t, nil
}

func (t *tarStore) size(name string) (int64, error) {
	s, ok := t.files[name]
	if !ok {
		return 0, fs.ErrNotExist
	}
	return s.size, nil
}

func (t *tarStore) open(name string) (io.ReadCloser, error) {
	s, ok := t.files[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	f, err := os.Open(t.path)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, s.offset, s.size), f}, nil
}

// verifiedReader passes content through and fails in place of io.EOF when it was
// not what the digest and size say.
type verifiedReader struct {
	r      io.ReadCloser
	h      hash.Hash
	digest string
	size   int64
	n      int64
	fail   func(string, ...any) error
}

func (v *verifiedReader) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.h.Write(p[:n])
	v.n += int64(n)
	if v.n > v.size {
		return n, v.fail("blob %s is longer than its %d bytes", v.digest, v.size)
	}
	if errors.Is(err, io.EOF) {
		if v.n != v.size {
			return n, v.fail("blob %s ends after %d of %d bytes", v.digest, v.n, v.size)
		}
		if got := "sha256:" + hex.EncodeToString(v.h.Sum(nil)); got != v.digest {
			return n, v.fail("blob %s hashes to %s", v.digest, got)
		}
	}
	return n, err
}

func (v *verifiedReader) Close() error { return v.r.Close() }
