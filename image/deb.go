// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

const maxMember = 2 << 30

// debFiles calls each for every entry of a Debian package's data archive
// (deb(5): an ar archive of debian-binary, control.tar.*, data.tar.*). Names
// come cleaned and relative, such as "usr/bin/crun". No maintainer script runs.
func debFiles(r io.Reader, each func(h *tar.Header, content io.Reader) error) error {
	br := bufio.NewReaderSize(r, 1<<16)
	magic := make([]byte, 8)
	if _, err := io.ReadFull(br, magic); err != nil || string(magic) != "!<arch>\n" {
		return errors.New("not a Debian package: no ar magic")
	}
	for {
		// name[16] mtime[12] uid[6] gid[6] mode[8] size[10] "`\n"
		var head [60]byte
		if _, err := io.ReadFull(br, head[:]); err != nil {
			return fmt.Errorf("Debian package without data archive: %w", err)
		}
		name := strings.TrimSuffix(strings.TrimRight(string(head[:16]), " "), "/")
		size, err := strconv.ParseInt(strings.TrimRight(string(head[48:58]), " "), 10, 64)
		if err != nil || size < 0 || size > maxMember || string(head[58:]) != "`\n" {
			return fmt.Errorf("Debian package: malformed header of member %q", name)
		}
		member := io.LimitReader(br, size)
		if !strings.HasPrefix(name, "data.tar") {
			if _, err := io.CopyN(io.Discard, br, size+size%2); err != nil {
				return fmt.Errorf("Debian package: member %s: %w", name, err)
			}
			continue
		}
		plain, err := decompress(member, strings.TrimPrefix(name, "data.tar"))
		if err != nil {
			return fmt.Errorf("Debian package: %s: %w", name, err)
		}
		t := tar.NewReader(plain)
		for {
			h, err := t.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return fmt.Errorf("Debian package: %s: %w", name, err)
			}
			clean := path.Clean(h.Name)
			if path.IsAbs(clean) || clean == ".." || strings.HasPrefix(clean, "../") {
				return fmt.Errorf("Debian package: entry %q leaves the root", h.Name)
			}
			h.Name = clean
			if err := each(h, t); err != nil {
				return err
			}
		}
	}
}

func decompress(r io.Reader, suffix string) (io.Reader, error) {
	switch suffix {
	case "":
		return r, nil
	case ".xz":
		return xz.NewReader(r)
	case ".zst":
		return zstd.NewReader(r)
	case ".gz":
		return gzip.NewReader(r)
	}
	return nil, fmt.Errorf("unknown compression %q", suffix)
}
