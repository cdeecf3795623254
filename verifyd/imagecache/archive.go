// SPDX-License-Identifier: Apache-2.0

package imagecache

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

const (
	sumsName     = "sha256sum.txt"
	metadataName = "metadata.json"
)

// Limits in bytes, and counts.
const (
	maxSums     = 64 << 10
	maxListed   = 64
	maxMetadata = 64 << 10
	maxFile     = 512 << 20 // firmware, kernel, initramfs
	maxEntries  = 256       // of an archive
	maxName     = 128
	maxCmdline  = 64 << 10
)

// Metadata is the part of metadata.json that measurement and policy need. Other
// keys are ignored (measurement.md §1).
type Metadata struct {
	BIOS    string `json:"bios"` // names of files, each listed in sha256sum.txt
	Kernel  string `json:"kernel"`
	Initrd  string `json:"initrd"`
	Cmdline string `json:"cmdline"`
	Version string `json:"version"` // x.y.z; empty in old images
	IsDev   bool   `json:"is_dev"`
}

func parseMetadata(data []byte) (*Metadata, error) {
	var m Metadata
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fault.Wrap(err, "image_metadata", "%s", metadataName)
	}
	for _, name := range []string{m.BIOS, m.Kernel, m.Initrd} {
		if !flat(name) {
			return nil, fault.New("image_metadata", "%s names the file %q", metadataName, name)
		}
	}
	if m.Cmdline == "" || len(m.Cmdline) > maxCmdline {
		return nil, fault.New("image_metadata", "%s has a cmdline of %d bytes", metadataName, len(m.Cmdline))
	}
	return &m, nil
}

// flat reports whether a name is of a file in one directory, and an ordinary one.
func flat(name string) bool {
	if name == "" || len(name) > maxName || name[0] == '.' {
		return false
	}
	for _, c := range []byte(name) {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_' || c == '+'
		if !ok {
			return false
		}
	}
	return true
}

// parseSums reads sha256sum.txt: each line that is not blank is a SHA-256 and a flat
// name that is not the list's own, no name twice.
func parseSums(data []byte) (map[string][32]byte, error) {
	out := map[string][32]byte{}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) != 2 {
			return nil, fault.New("image_checksums", "%s: line %d has %d words, not a digest and a name", sumsName, n, len(f))
		}
		sum, err := hex.DecodeString(f[0])
		if err != nil || len(sum) != sha256.Size {
			return nil, fault.New("image_checksums", "%s: line %d has no SHA-256", sumsName, n)
		}
		if !flat(f[1]) || f[1] == sumsName {
			return nil, fault.New("image_checksums", "%s: line %d lists %q", sumsName, n, f[1])
		}
		if _, twice := out[f[1]]; twice || len(out) == maxListed {
			return nil, fault.New("image_checksums", "%s: %q is listed twice, or more than %d files are", sumsName, f[1], maxListed)
		}
		out[f[1]] = [32]byte(sum)
	}
	return out, nil
}

func readSums(dir string, h dstack.ImageHash) (map[string][32]byte, error) {
	data, err := readFile(filepath.Join(dir, sumsName), maxSums)
	if err != nil {
		return nil, err
	}
	if got := dstack.ImageHash(sha256.Sum256(data)); got != h {
		return nil, fault.New("image_hash_mismatch", "%s has hash %s, the image is %s", sumsName, got, h)
	}
	return parseSums(data)
}

func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fault.New("image_too_large", "%s has more than %d bytes", filepath.Base(path), limit)
	}
	return data, err
}

// checkAll checks every listed file of an unpacked image, removes the others, and
// returns the image.
func checkAll(ctx context.Context, dir string, h dstack.ImageHash) (*Image, error) {
	sums, err := readSums(dir, h)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fault.New("image_checksums", "the archive has no %s", sumsName)
	}
	if err != nil {
		return nil, err
	}
	if _, ok := sums[metadataName]; !ok {
		return nil, fault.New("image_checksums", "%s does not list %s", sumsName, metadataName)
	}
	for name, want := range sums {
		if err := ctx.Err(); err != nil {
			return nil, fault.Wrap(err, "image_timeout", "check the image %s", h)
		}
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return nil, fault.New("image_checksums", "%s lists %s, which the archive has not", sumsName, name)
		}
		sum := sha256.New()
		_, err = io.Copy(sum, f)
		f.Close()
		if err != nil {
			return nil, fault.Wrap(err, "image_cache_dir", "read %s", name)
		}
		if got := [32]byte(sum.Sum(nil)); got != want {
			return nil, fault.New("image_altered", "%s has SHA-256 %x, %s says %x", name, got, sumsName, want)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fault.Wrap(err, "image_cache_dir", "list the image")
	}
	for _, e := range entries {
		if _, ok := sums[e.Name()]; !ok && e.Name() != sumsName {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, fault.Wrap(err, "image_cache_dir", "remove a file that is not listed")
			}
		}
	}
	return load(dir, h)
}

var errRedirect = errors.New("redirect to another host or scheme, or more than 3")

func sameHost(r *http.Request, via []*http.Request) error {
	if first := via[0].URL; len(via) > 3 || r.URL.Host != first.Host || r.URL.Scheme != first.Scheme {
		return errRedirect
	}
	return nil
}

// fetch asks for one archive. The error texts hold nothing that the server said.
func (c *Cache) fetch(ctx context.Context, url string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fault.Wrap(err, "image_url", "download the image")
	}
	req.Header.Set("User-Agent", "dstack-verifier")
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fault.Wrap(err, "image_timeout", "download the image")
	case err != nil:
		return nil, fault.Wrap(err, "image_download", "download the image")
	case resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone:
		resp.Body.Close()
		return nil, fault.New("image_not_found", "the image server has not got this image")
	case resp.StatusCode/100 != 2:
		resp.Body.Close()
		return nil, fault.New("image_download", "the image server answers with status %d", resp.StatusCode)
	case resp.ContentLength > c.MaxDownload:
		resp.Body.Close()
		return nil, tooLarge("download", c.MaxDownload)
	}
	return resp.Body, nil
}

func tooLarge(what string, limit int64) error {
	return fault.New("image_too_large", "the %s of the image has more than %d bytes", what, limit)
}

// limited fails, rather than ends, at its limit.
type limited struct {
	r     io.Reader
	left  int64
	limit int64
	what  string
}

func bounded(r io.Reader, limit int64) io.Reader { return &limited{r, limit, limit, "download"} }

func (l *limited) Read(p []byte) (int, error) {
	if l.left < 0 {
		return 0, tooLarge(l.what, l.limit)
	}
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return n, tooLarge(l.what, l.limit)
	}
	return n, err
}

// unpack writes the files of a tar.gz archive into dir. Directories and what is in
// them are passed over, since sha256sum.txt cannot list them; anything that is
// neither a regular file nor a directory, and any name that could lead out of dir,
// refuses the archive.
func unpack(r io.Reader, dir string, limit int64) error {
	z, err := gzip.NewReader(r)
	if err != nil {
		return archiveError(err)
	}
	defer z.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fault.Wrap(err, "image_cache_dir", "open the image's directory")
	}
	defer root.Close()
	archive := tar.NewReader(&limited{z, limit, limit, "unpacked form"})
	for n := 0; ; n++ {
		h, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return archiveError(err)
		}
		if n == maxEntries {
			return fault.New("image_archive", "the archive has more than %d entries", maxEntries)
		}
		name, err := place(h)
		if err != nil {
			return err
		}
		if name == "" {
			continue
		}
		if err := write(root, name, archive); err != nil {
			return err
		}
	}
}

// place returns the file name of an entry, or empty for what is passed over.
func place(h *tar.Header) (string, error) {
	bad := func(why string) (string, error) {
		return "", fault.New("image_archive", "the archive's entry %.100q %s", h.Name, why)
	}
	if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
		return bad("is neither a regular file nor a directory")
	}
	if h.Name == "" || h.Name[0] == '/' || strings.ContainsAny(h.Name, "\x00\\") {
		return bad("is absolute or has a character that no image has")
	}
	var parts []string
	for part := range strings.SplitSeq(strings.TrimSuffix(h.Name, "/"), "/") {
		switch part {
		case ".":
		case "", "..":
			return bad("does not lead to a place in it")
		default:
			parts = append(parts, part)
		}
	}
	if h.Typeflag == tar.TypeDir || len(parts) != 1 {
		return "", nil
	}
	if !flat(parts[0]) {
		return bad("has a name that no image has")
	}
	return parts[0], nil
}

func write(root *os.Root, name string, from io.Reader) error {
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fault.New("image_archive", "the archive has %q twice", name)
	}
	if err != nil {
		return fault.Wrap(err, "image_cache_dir", "write %s", name)
	}
	_, err = io.Copy(f, from)
	if cerr := f.Close(); err == nil && cerr != nil {
		return fault.Wrap(cerr, "image_cache_dir", "write %s", name)
	}
	if err != nil {
		return archiveError(err)
	}
	return nil
}

// archiveError is err where it has a code, and a malformed archive otherwise.
func archiveError(err error) error {
	if fault.Code(err) != "" {
		return err
	}
	return fault.Wrap(err, "image_archive", "read the archive")
}
