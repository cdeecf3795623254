// SPDX-License-Identifier: Apache-2.0

// Package durable changes files so that a power cut leaves either the old
// content or the new, never a mixture, and so that what was reported as done is
// still done afterwards.
//
// # The sequence
//
// [WriteFile] performs, in this order:
//
//  1. create a temporary file in the directory of the target (rename works only
//     within one file system; the name starts with ".tmp-", so that a reader of
//     the directory can tell it from data);
//  2. write all of the data;
//  3. fsync the file: without it, ext4 with delayed allocation, XFS and btrfs may
//     commit the rename before the data, and a power cut leaves an empty or
//     zero-filled file under the final name;
//  4. rename it over the target: POSIX makes this atomic for other processes;
//  5. fsync the directory: the rename lives in the directory, and fsync of the
//     file says nothing about it (fsync(2), NOTES).
//
// # Sad paths
//
//   - A crash before step 4 leaves a ".tmp-" file. The target is untouched. The
//     next WriteFile of the same target removes leftovers older than an hour;
//     [Leftover] tells other readers of the directory to skip them.
//   - A crash between 4 and 5: after the restart the target is old or new, whole
//     in both cases. The caller had not been told of success.
//   - fsync fails (step 3 or 5): the kernel may have dropped the dirty pages and
//     marked them clean, so fsync again would succeed without the data being on
//     the disk (the "fsyncgate" of PostgreSQL, 2018). Nothing is retried here:
//     the temporary file is deleted and the error returned. If step 5 is what
//     failed, the target may have either content, and the caller must take the
//     file as unknown until it is written again.
//   - The disk is full: the error comes from step 2 or 3, and the target is intact.
//   - A drive that lies about flushing its cache is beyond us.
//
// [RemoveAll] renames the tree to a ".tmp-" name first, so that a crash in the
// middle never leaves half a tree under the name that people look for.
//
// # Trust
//
// Paths come from our own code. The directories must not be writable by others:
// os.CreateTemp refuses to follow an existing name, but a hostile owner of the
// directory could swap it. Links are replaced, not followed: renaming over a
// symbolic link replaces the link.
//
// The package holds no locks. Two writers of one target both succeed and one of
// them wins whole.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// prefix marks files that are in the making or on their way out.
const prefix = ".tmp-"

// leftoverAge is how old an abandoned temporary file must be before it is
// removed; younger ones may belong to a concurrent writer.
const leftoverAge = time.Hour

// Leftover reports whether a file name, without directory, is one of ours that a
// crash may have left behind. Readers of a directory skip such names.
func Leftover(name string) bool { return strings.HasPrefix(name, prefix) }

// WriteFile replaces the content of path with data, durably: when it returns nil,
// a reader sees exactly data, also after a power cut. On error the old content
// stands, except as the package comment says of a failed directory fsync. The
// permission bits are set exactly, whatever the umask. The directory must exist.
func WriteFile(path string, data []byte, perm fs.FileMode) (err error) {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	sweep(dir, base)
	f, err := os.CreateTemp(dir, prefix+base+"-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	// CreateTemp makes the file 0600; set the mode before there is content, so
	// that a secret is never readable more widely than asked.
	if err = f.Chmod(perm); err != nil {
		return err
	}
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

// sweep removes old temporary files of one target. It is best effort: a leftover
// costs space, not correctness.
func sweep(dir, base string) {
	names, err := filepath.Glob(filepath.Join(escapeGlob(dir), prefix+escapeGlob(base)+"-*"))
	if err != nil {
		return
	}
	for _, name := range names {
		if fi, err := os.Lstat(name); err == nil && fi.Mode().IsRegular() && time.Since(fi.ModTime()) > leftoverAge {
			os.Remove(name)
		}
	}
}

func escapeGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// MkdirAll makes path and its missing parents with the permission bits perm (less
// the umask), and makes each new directory entry durable. An existing directory
// is left as it is.
func MkdirAll(path string, perm fs.FileMode) error {
	path = filepath.Clean(path)
	if fi, err := os.Stat(path); err == nil {
		if !fi.IsDir() {
			return fmt.Errorf("make directory %s: not a directory", path)
		}
		return nil
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := syncDir(parent); err != nil {
		return fmt.Errorf("make directory %s: %w", path, err)
	}
	return nil
}

// RemoveAll removes path and what is below it. It first renames the tree to a
// [Leftover] name beside it, durably; once that is done a crash leaves the tree
// gone from its name, and deleting the renamed tree again finishes the work. A
// path that does not exist is no error. It never follows a symbolic link.
func RemoveAll(path string) error {
	path = filepath.Clean(path)
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	// Finish what an earlier, interrupted call began. A name ending in "-gone"
	// belongs to nobody, whatever its age.
	if old, err := filepath.Glob(filepath.Join(escapeGlob(dir), prefix+escapeGlob(base)+"-*-gone")); err == nil {
		for _, name := range old {
			if err := os.RemoveAll(name); err != nil {
				return fmt.Errorf("remove %s: %w", path, err)
			}
		}
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	gone := filepath.Join(dir, fmt.Sprintf("%s%s-%d-gone", prefix, base, time.Now().UnixNano()))
	if err := os.Rename(path, gone); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove %s: %w", path, err)
	}
	if err := syncDir(dir); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	if err := os.RemoveAll(gone); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	if err := syncDir(dir); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
