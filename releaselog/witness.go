// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Fetch returns entries of somebody's log, at least one and at most count, from start
// on: what the KMS answers to GetLogEntries.
type Fetch func(ctx context.Context, start, count uint64) ([][]byte, error)

// Export makes a copy of a log in a directory, or brings the copy there up to head: the
// same files as the log's but for the key. It keeps a copy only of entries that hash to
// the head's root, so it proves that the log continues the copy without asking for a
// proof.
//
// Codes: release_log_shrunk and release_log_fork, with a [Fork], against the copy;
// release_log_other if the copy is of another log; release_log_entries if the entries
// are not those of head; release_log_damaged if the copy is; release_log_locked.
func Export(ctx context.Context, dir string, head Head, fetch Fetch) error {
	if head.IsZero() {
		return fault.New("release_log_missing", "no head of a release log to export")
	}
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, entriesFile), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("export the release log: %w", err)
	}
	defer f.Close()
	if err := flock(f); err != nil {
		return err
	}
	g := newTree()
	saved, err := readHead(filepath.Join(dir, headFile), head.SPKI())
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case saved.name == head.name && saved.logKey == head.logKey && saved.size > head.size:
		return fault.Wrap(&Fork{saved, head}, "release_log_shrunk", "the release log has %d entries, and its copy %d", head.size, saved.size)
	case saved.name != head.name || saved.logKey != head.logKey || saved.size == head.size:
		return Compare(saved, head, nil)
	default:
		if err := g.scanTo(lineReader(f), saved); err != nil {
			return err
		}
	}
	if err := copyEntries(ctx, f, g, head.size, fetch); err != nil {
		return err
	}
	if root, err := g.root(); err != nil || root != head.root {
		if saved.size > 0 {
			return fault.Wrap(&Fork{saved, head}, "release_log_fork", "the release log's entries do not continue its copy (%v)", err)
		}
		return fault.New("release_log_entries", "the entries are not those of the release log's head (%v)", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("export the release log: %w", err)
	}
	data, err := json.Marshal(head)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, headFile), data, 0o600)
}

// copyEntries writes what is missing behind the tree's entries. What an export that
// failed left there goes.
func copyEntries(ctx context.Context, f *os.File, g *growing, size uint64, fetch Fetch) error {
	if err := f.Truncate(g.end); err != nil {
		return fmt.Errorf("export the release log: %w", err)
	}
	w := bufio.NewWriter(io.NewOffsetWriter(f, g.end))
	for g.size < size {
		want := min(size-g.size, MaxEntries)
		entries, err := fetch(ctx, g.size, want)
		if err != nil {
			return fmt.Errorf("fetch entries of the release log from %d on: %w", g.size, err)
		}
		if len(entries) == 0 || uint64(len(entries)) > want {
			return fault.New("release_log_entries", "%d entries of the release log from %d on, asked for %d", len(entries), g.size, want)
		}
		for _, e := range entries {
			if _, err := ParseEntry(e); err != nil {
				return err
			}
			if err := g.append(e); err != nil {
				return err
			}
			if _, err := w.Write(append(e[:len(e):len(e)], '\n')); err != nil {
				return fmt.Errorf("export the release log: %w", err)
			}
		}
	}
	return w.Flush()
}

// Witness checks that a copy of a log, or a log that is not open, contains what a head
// that somebody saved tells of, and returns the copy's own head.
//
// Codes: release_log_fork (the copy continues another log) and release_log_shrunk (the
// copy ends before the head), with a [Fork]; release_log_other, release_log_missing,
// release_log_damaged.
func Witness(dir string, saved Head) (Head, error) {
	if saved.IsZero() {
		return Head{}, fault.New("release_log_missing", "no saved head of a release log")
	}
	head, err := readHead(filepath.Join(dir, headFile), saved.SPKI())
	if err != nil {
		return Head{}, missing(err, dir)
	}
	f, err := os.OpenFile(filepath.Join(dir, entriesFile), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Head{}, missing(err, dir)
	}
	defer f.Close()
	if head.name != saved.name || head.logKey != saved.logKey || head.size == saved.size {
		if err := Compare(saved, head, nil); err != nil {
			return Head{}, err
		}
	}
	if head.size < saved.size {
		return Head{}, fault.Wrap(&Fork{saved, head}, "release_log_shrunk", "the copy of the release log has %d entries, and the saved head %d", head.size, saved.size)
	}
	// First whether the copy is whole: a damaged one says nothing about the KMS.
	if err := newTree().scanTo(lineReader(f), head); err != nil {
		return Head{}, err
	}
	g := newTree()
	if err := g.scan(lineReader(io.NewSectionReader(f, 0, 1<<62)), saved.size); err != nil {
		return Head{}, err
	}
	if root, err := g.root(); err != nil || root != saved.root {
		return Head{}, fault.Wrap(&Fork{saved, head}, "release_log_fork", "the copy of the release log does not continue the saved head (%v)", err)
	}
	return head, nil
}
