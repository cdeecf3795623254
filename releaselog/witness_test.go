// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func fetcher(l *Log) Fetch {
	return func(_ context.Context, start, count uint64) ([][]byte, error) {
		entries, _, err := l.Entries(start, min(count, 7))
		return entries, err
	}
}

func TestExportFollowsALog(t *testing.T) {
	a := newAuthority(t)
	l, logDir := a.create(t)
	dir := filepath.Join(t.TempDir(), "copy")
	var heads []Head
	for _, n := range []int{0, 5, 0, 300} {
		grow(t, l, n)
		if n == 300 { // what an export left that failed
			f, err := os.OpenFile(filepath.Join(dir, entriesFile), os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			_, err = f.Write(make([]byte, 1<<20))
			must(t, err)
			must(t, f.Close())
		}
		must(t, Export(t.Context(), dir, l.Head(), fetcher(l)))
		heads = append(heads, l.Head())
		for _, h := range heads {
			head, err := Witness(dir, h)
			must(t, err)
			if head != l.Head() {
				t.Fatalf("the copy's head is %s, want %s", head, l.Head())
			}
		}
	}
	for _, name := range []string{entriesFile, headFile} {
		want, _ := os.ReadFile(filepath.Join(logDir, name))
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s of the copy differs (%v)", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, keyFile)); err == nil {
		t.Error("the copy has a key")
	}
}

func TestThreat_G10_AWitnessTellsAnotherLog(t *testing.T) {
	a := newAuthority(t)
	l, logDir := a.create(t)
	grow(t, l, 4)
	older := copyDir(t, logDir)
	grow(t, l, 2)
	saved := l.Head()
	dir := filepath.Join(t.TempDir(), "copy")
	must(t, Export(t.Context(), dir, saved, fetcher(l)))
	// The log goes on from an older copy: another view.
	other := a.open(t, older)
	t.Run("that is behind", func(t *testing.T) {
		err := Export(t.Context(), dir, other.Head(), fetcher(other))
		wantCode(t, err, "release_log_shrunk")
		wantFork(t, err, saved, other.Head())
		_, err = Witness(older, saved)
		wantCode(t, err, "release_log_shrunk")
		wantFork(t, err, saved, other.Head())
	})
	e := testEntry(4)
	e.Note = "another"
	_, err := other.Append(t.Context(), e)
	must(t, err)
	for _, n := range []int{1, 3} {
		grow(t, other, n)
		err := Export(t.Context(), dir, other.Head(), fetcher(other))
		wantCode(t, err, "release_log_fork")
		wantFork(t, err, saved, other.Head())
		_, err = Witness(older, saved)
		wantCode(t, err, "release_log_fork")
		wantFork(t, err, saved, other.Head())
	}
	// What was refused left the copy as it was.
	_, err = Witness(dir, saved)
	must(t, err)
	grow(t, l, 1)
	must(t, Export(t.Context(), dir, l.Head(), fetcher(l)))
}

func TestExportRefuses(t *testing.T) {
	a := newAuthority(t)
	l, _ := a.create(t)
	grow(t, l, 3)
	two, _ := a.create(t)
	grow(t, two, 4)
	lost := errors.New("no answer")
	for name, c := range map[string]struct {
		head  Head
		fetch Fetch
		code  string
	}{
		"no head":          {Head{}, nil, "release_log_missing"},
		"no entries":       {l.Head(), func(context.Context, uint64, uint64) ([][]byte, error) { return nil, nil }, "release_log_entries"},
		"too many entries": {l.Head(), func(context.Context, uint64, uint64) ([][]byte, error) { return make([][]byte, 4), nil }, "release_log_entries"},
		"what is no entry": {l.Head(), func(context.Context, uint64, uint64) ([][]byte, error) { return [][]byte{[]byte("a\nb")}, nil }, "release_log_entry"},
		"another log's":    {a.head(t, logA, 1, 3, Hash{}), fetcher(l), "release_log_entries"},
		"none to be had":   {l.Head(), func(context.Context, uint64, uint64) ([][]byte, error) { return nil, lost }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "copy")
			err := Export(t.Context(), dir, c.head, c.fetch)
			wantCode(t, err, c.code)
			if err == nil {
				t.Fatal("no error")
			}
			if _, err := os.Stat(filepath.Join(dir, headFile)); err == nil {
				t.Fatal("there is a copy")
			}
		})
	}
	dir := filepath.Join(t.TempDir(), "copy")
	must(t, Export(t.Context(), dir, l.Head(), fetcher(l)))
	t.Run("another log into the copy", func(t *testing.T) {
		wantCode(t, Export(t.Context(), dir, two.Head(), fetcher(two)), "release_log_other")
		_, err := Witness(dir, two.Head())
		wantCode(t, err, "release_log_other")
	})
	t.Run("another root into the copy", func(t *testing.T) {
		wantCode(t, Export(t.Context(), dir, newAuthority(t).head(t, logA, 1, 9, Hash{}), nil), "release_log_key")
	})
	t.Run("two keys of one log", func(t *testing.T) {
		name := l.Head().Log()
		forged := a.head(t, name[len(name)-16:], 7, 9, Hash{})
		wantCode(t, Export(t.Context(), dir, forged, nil), "release_log_fork")
		_, err := Witness(dir, forged)
		wantCode(t, err, "release_log_fork")
	})
	t.Run("a copy in use", func(t *testing.T) {
		f, err := os.Open(filepath.Join(dir, entriesFile))
		must(t, err)
		defer f.Close()
		must(t, flock(f))
		wantCode(t, Export(t.Context(), dir, l.Head(), fetcher(l)), "release_log_locked")
	})
	t.Run("a damaged copy", func(t *testing.T) {
		saved := l.Head()
		path := filepath.Join(dir, entriesFile)
		whole, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(path, bytes.Replace(whole, []byte("grant"), []byte("start"), 1), 0o600))
		_, err = Witness(dir, saved)
		wantCode(t, err, "release_log_damaged") // and not a fork
		must(t, os.WriteFile(path, whole, 0o600))
		grow(t, l, 1)
		must(t, os.Truncate(filepath.Join(dir, entriesFile), 9))
		wantCode(t, Export(t.Context(), dir, l.Head(), fetcher(l)), "release_log_damaged")
		_, err = Witness(dir, saved)
		wantCode(t, err, "release_log_damaged")
	})
	t.Run("no copy", func(t *testing.T) {
		_, err := Witness(t.TempDir(), l.Head())
		wantCode(t, err, "release_log_missing")
		_, err = Witness(dir, Head{})
		wantCode(t, err, "release_log_missing")
	})
}
