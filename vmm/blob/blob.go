// SPDX-License-Identifier: Apache-2.0

// Package blob keeps immutable content by its SHA-256: container image manifests,
// configurations and layers that a guest pulls through its hostlink.
//
// Guarantees: a blob that exists has exactly the content of its name (verified
// while it was written, before it got that name) and survives a power cut once
// Put returned; a failed Put leaves nothing. Whoever reaches the store may fill
// it up to the limits; contents are untrusted and the guest checks them again.
package blob

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Digest is the SHA-256 of a blob.
type Digest [sha256.Size]byte

// ParseDigest parses "sha256:" and 64 lowercase hexadecimal digits.
func ParseDigest(s string) (Digest, error) {
	text, ok := strings.CutPrefix(s, "sha256:")
	if !ok {
		return Digest{}, fault.New("digest_malformed", "digest %.80q does not start with sha256:", s)
	}
	return parseHex(text)
}

func parseHex(text string) (d Digest, err error) {
	if len(text) != 2*len(d) || strings.ToLower(text) != text {
		return d, fault.New("digest_malformed", "a SHA-256 digest is 64 lowercase hexadecimal digits, got %.80q", text)
	}
	if _, err := hex.Decode(d[:], []byte(text)); err != nil {
		return d, fault.New("digest_malformed", "a SHA-256 digest is 64 lowercase hexadecimal digits, got %.80q", text)
	}
	return d, nil
}

// Hex returns the 64 digits.
func (d Digest) Hex() string { return hex.EncodeToString(d[:]) }

// String returns "sha256:" and the digits.
func (d Digest) String() string { return "sha256:" + d.Hex() }

// Store is a directory <root>/sha256/<hex>.
type Store struct {
	dir     string
	max     int64
	reserve uint64
}

// Open makes the directory if needed and returns the store. A blob may have at
// most max bytes; a Put that would leave less than reserve bytes free on the file
// system is refused. Unfinished writes of an earlier process are removed.
func Open(root string, max int64, reserve uint64) (*Store, error) {
	dir := filepath.Join(root, "sha256")
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if durable.Leftover(e.Name()) {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
	return &Store{dir, max, reserve}, nil
}

// Put stores what r yields under d. Content that is there already is kept and r
// is not read.
//
// Codes: blob_too_large, digest_mismatch, disk_full.
func (s *Store) Put(d Digest, r io.Reader) (err error) {
	path := filepath.Join(s.dir, d.Hex())
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	f, err := os.CreateTemp(s.dir, ".tmp-"+d.Hex()+"-*")
	if err != nil {
		return diskFull(err, "store blob %s", d)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	hash := sha256.New()
	n, err := io.Copy(&bounded{f, s}, io.TeeReader(io.LimitReader(r, s.max+1), hash))
	if err != nil {
		return diskFull(err, "store blob %s", d)
	}
	if n > s.max {
		return fault.New("blob_too_large", "blob %s is larger than %d bytes", d, s.max).
			WithFix("make the image smaller, or raise blobs.max_size in the VMM's configuration")
	}
	if got := Digest(hash.Sum(nil)); got != d {
		return fault.New("digest_mismatch", "the content has digest %s, not %s", got, d).
			WithFix("upload the content again")
	}
	if err = f.Sync(); err != nil {
		return diskFull(err, "store blob %s", d)
	}
	if err = f.Close(); err != nil {
		return diskFull(err, "store blob %s", d)
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("store blob %s: %w", d, err)
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// bounded checks free space once per megabyte written.
type bounded struct {
	f *os.File
	s *Store
}

const spaceCheck = 1 << 20

func (b *bounded) Write(p []byte) (int, error) { return b.f.Write(p) }

// ReadFrom implements io.ReaderFrom, so that io.Copy uses it.
func (b *bounded) ReadFrom(r io.Reader) (total int64, err error) {
	for {
		if err := b.s.space(); err != nil {
			return total, err
		}
		n, err := io.CopyN(struct{ io.Writer }{b.f}, r, spaceCheck)
		total += n
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

func (s *Store) space() error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.dir, &st); err != nil {
		return nil // the write itself will tell
	}
	if free := st.Bavail * uint64(st.Bsize); free < s.reserve+spaceCheck {
		return fault.New("disk_full", "%s has %d MiB free, and %d MiB are kept in reserve", s.dir, free>>20, s.reserve>>20).
			WithFix("free some disk space, or move the state directory")
	}
	return nil
}

func diskFull(err error, format string, args ...any) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fault.Wrap(err, "disk_full", format, args...).WithFix("free some disk space, or move the state directory")
	}
	return fmt.Errorf(format+": %w", append(args, err)...)
}

// Open returns the blob for reading, with its size. Code: blob_missing.
func (s *Store) Open(d Digest) (*os.File, int64, error) {
	f, err := os.Open(filepath.Join(s.dir, d.Hex()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fault.New("blob_missing", "blob %s is not in the store", d).WithFix("upload it, as dstack deploy does")
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open blob %s: %w", d, err)
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("open blob %s: %w", d, err)
	}
	return f, fi.Size(), nil
}

// Read returns a blob of at most limit bytes. Codes: blob_missing, blob_too_large.
func (s *Store) Read(d Digest, limit int64) ([]byte, error) {
	f, size, err := s.Open(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > limit {
		return nil, fault.New("blob_too_large", "blob %s has %d bytes, more than %d", d, size, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// Has reports whether the blob is there.
func (s *Store) Has(d Digest) bool {
	_, err := os.Stat(filepath.Join(s.dir, d.Hex()))
	return err == nil
}

// Handler serves GET, HEAD and PUT of /blobs/sha256/<hex>. A PUT of a blob that
// is there answers 200 at once, of a new one 201. fail writes errors.
func (s *Store) Handler(fail func(http.ResponseWriter, int, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, ok := strings.CutPrefix(r.URL.Path, "/blobs/sha256/")
		if !ok {
			http.NotFound(w, r)
			return
		}
		d, err := parseHex(text)
		if err != nil {
			fail(w, http.StatusBadRequest, err)
			return
		}
		switch r.Method {
		case http.MethodGet, http.MethodHead:
			f, _, err := s.Open(d)
			if err != nil {
				fail(w, http.StatusNotFound, err)
				return
			}
			defer f.Close()
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("ETag", `"`+d.String()+`"`)
			http.ServeContent(w, r, "", fileTime(f), f)
		case http.MethodPut:
			if s.Has(d) {
				w.WriteHeader(http.StatusOK)
				return
			}
			if r.ContentLength > s.max {
				fail(w, http.StatusRequestEntityTooLarge, fault.New("blob_too_large", "blob %s has %d bytes, more than %d", d, r.ContentLength, s.max).
					WithFix("make the image smaller, or raise blobs.max_size in the VMM's configuration"))
				return
			}
			if err := s.Put(d, r.Body); err != nil {
				status := http.StatusBadRequest
				if fault.Code(err) == "disk_full" {
					status = http.StatusInsufficientStorage
				}
				fail(w, status, err)
				return
			}
			w.WriteHeader(http.StatusCreated)
		default:
			w.Header().Set("Allow", "GET, HEAD, PUT")
			fail(w, http.StatusMethodNotAllowed, fault.New("method_not_allowed", "method %s is not allowed on a blob", r.Method))
		}
	})
}

func fileTime(f *os.File) (t time.Time) {
	if fi, err := f.Stat(); err == nil {
		t = fi.ModTime()
	}
	return t
}
