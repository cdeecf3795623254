// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/dstack-go/dstack/internal/fault"
)

// variation is what a second build does differently, to show that it does not
// matter. The zero value is an ordinary build.
type variation struct {
	env    map[string]string
	suffix string // of work directories
}

func (v variation) name(base string) string { return base + v.suffix }

// Check builds twice, with another output and work directory, umask, time zone
// and locale, from a copy of the checkout, and compares every byte of both
// releases. Compiling kernel and engine takes minutes and is done a second time
// only if withKernel is set; else both builds share the kernel and Go's compile
// cache, and the log says so.
func Check(ctx context.Context, opt Options, withKernel bool) error {
	first, err := newBuild(opt)
	if err != nil {
		return err
	}
	release, err := first.cache.lock(ctx, first.logf)
	if err != nil {
		return err
	}
	defer release()
	work, err := first.cache.scratch("check")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)

	// Both build from copies of the moment, so that an edit under way is no
	// difference.
	first.Out = filepath.Join(work, "a")
	origin := first.Source
	first.Source = filepath.Join(work, "sources")
	second := *first
	second.Out = filepath.Join(work, "other", "place", "b")
	second.Source = filepath.Join(work, "elsewhere", "the sources")
	if err := copySources(origin, first.Source); err != nil {
		return diskFull(err)
	}
	if err := copySources(first.Source, second.Source); err != nil {
		return diskFull(err)
	}
	a, err := first.run(ctx)
	if err != nil {
		return err
	}

	second.steps, second.cold, second.UpdateFileList = nil, false, false
	second.vary = variation{
		env:    map[string]string{"TZ": "Asia/Kathmandu", "LC_ALL": "", "LANG": "tr_TR.UTF-8"},
		suffix: "-elsewhere",
	}
	if withKernel {
		second.vary.env["GOCACHE"] = filepath.Join(work, "gocache")
	} else {
		first.logf("image: check: both builds share the kernel and Go's compile cache; --check-kernel makes these twice as well")
	}
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	second.logf("image: check: the second build")
	// Its parts are of no further use.
	second.cache = cache(filepath.Join(work, "cache"))
	if err := second.cache.borrow(first.cache, withKernel); err != nil {
		return err
	}
	b, err := second.run(ctx)
	if err != nil {
		return err
	}
	return compareDirs(a.Dir, b.Dir)
}

// compareDirs refuses any difference in names, modes or bytes.
func compareDirs(a, b string) error {
	names := func(dir string) (string, error) {
		entries, err := os.ReadDir(dir)
		var s strings.Builder
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				return "", err
			}
			fmt.Fprintf(&s, "%v %s\n", info.Mode(), e.Name())
		}
		return s.String(), err
	}
	na, err := names(a)
	if err != nil {
		return err
	}
	nb, err := names(b)
	if err != nil {
		return err
	}
	if na != nb {
		return fault.New("image_not_reproducible", "two builds have other files:\n%s", diffLines(na, nb))
	}
	entries, err := os.ReadDir(a)
	if err != nil {
		return err
	}
	for _, e := range entries {
		at, err := firstDifference(filepath.Join(a, e.Name()), filepath.Join(b, e.Name()))
		if err != nil {
			return err
		}
		if at >= 0 {
			return fault.New("image_not_reproducible", "two builds of %s differ at byte %d", e.Name(), at)
		}
	}
	return nil
}

// firstDifference returns the offset of the first byte that differs, or -1.
func firstDifference(a, b string) (int64, error) {
	fa, err := os.Open(a)
	if err != nil {
		return 0, err
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		return 0, err
	}
	defer fb.Close()
	ba, bb := make([]byte, 1<<16), make([]byte, 1<<16)
	for at := int64(0); ; {
		na, ea := io.ReadFull(fa, ba)
		nb, eb := io.ReadFull(fb, bb)
		if !bytes.Equal(ba[:na], bb[:nb]) {
			i := 0
			for i < min(na, nb) && ba[i] == bb[i] {
				i++
			}
			return at + int64(i), nil
		}
		if ea == io.EOF || ea == io.ErrUnexpectedEOF {
			return -1, nil
		}
		if ea != nil {
			return 0, ea
		}
		if eb != nil {
			return 0, eb
		}
		at += int64(na)
	}
}

// copySources copies the checkout, without version control and built programs.
func copySources(from, to string) error {
	return filepath.WalkDir(from, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir() && (d.Name() == ".git" || rel == "bin" || rel == "dist" || d.Name() == "node_modules"):
			return filepath.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		case d.Type().IsRegular():
			return copyFile(path, filepath.Join(to, rel))
		}
		return nil
	})
}

// borrow shares another cache's downloads, and its kernels unless withKernel.
// Everything else starts empty and is built.
func (c cache) borrow(from cache, withKernel bool) error {
	if err := os.MkdirAll(string(c), 0o755); err != nil {
		return err
	}
	kinds := []string{"debs", "apt"}
	if !withKernel {
		kinds = append(kinds, "kernel")
	}
	for _, kind := range kinds {
		if err := os.Symlink(filepath.Join(string(from), kind), filepath.Join(string(c), kind)); err != nil {
			return err
		}
	}
	return nil
}
