// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func newMemory(t testing.TB) *Memory { return OpenMemory(filepath.Join(t.TempDir(), "heads.json")) }

// prover proves by a log.
func prover(l *Log, to uint64) func(uint64) ([][]byte, error) {
	return func(from uint64) ([][]byte, error) {
		proof, _, err := l.Consistency(from, to)
		return proof, err
	}
}

func never(t testing.TB) func(uint64) ([][]byte, error) {
	return func(uint64) ([][]byte, error) { t.Error("a proof was asked for"); return nil, nil }
}

func (m *Memory) remembers(t testing.TB, want ...Head) {
	t.Helper()
	heads, err := m.Heads(want[0].SPKI())
	must(t, err)
	if fmt.Sprint(heads) != fmt.Sprint(want) {
		t.Fatalf("remembered %v, want %v", heads, want)
	}
}

func TestMemoryFollowsALog(t *testing.T) {
	a := newAuthority(t)
	l, _ := a.create(t)
	m := newMemory(t)
	must(t, m.Missing(a.spki))
	empty := l.Head()
	must(t, m.Observe(t.Context(), empty, never(t)))
	for range 5 {
		grow(t, l, 3)
		must(t, m.Observe(t.Context(), l.Head(), prover(l, l.Head().Size())))
		must(t, OpenMemory(m.path).Observe(t.Context(), l.Head(), never(t)))
		m.remembers(t, l.Head())
	}
	// A replica's log is another line.
	r, _ := a.create(t)
	must(t, m.Observe(t.Context(), r.Head(), never(t)))
	m.remembers(t, l.Head(), r.Head())
	// And so is a log of another root.
	other := newAuthority(t)
	o, _ := other.create(t)
	must(t, m.Missing(other.spki))
	must(t, m.Observe(t.Context(), o.Head(), never(t)))
	m.remembers(t, l.Head(), r.Head())
	m.remembers(t, o.Head())
	if fi, err := os.Stat(m.path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatal(fi, err)
	}
}

// The host starts the KMS from an older copy of its disk.
func TestThreat_G10_ARollbackToAnOlderCopyIsDetected(t *testing.T) {
	a := newAuthority(t)
	l, dir := a.create(t)
	grow(t, l, 4)
	old := copyDir(t, dir)
	grow(t, l, 3)
	m := newMemory(t)
	must(t, m.Observe(t.Context(), l.Head(), nil))
	remembered := l.Head()
	must(t, l.Close())
	back := a.open(t, old) // nothing in the directory tells
	err := m.Observe(t.Context(), back.Head(), prover(back, 0))
	wantCode(t, err, "release_log_shrunk")
	wantFork(t, err, remembered, back.Head())
	grow(t, back, 2)
	wantCode(t, m.Observe(t.Context(), back.Head(), prover(back, 0)), "release_log_shrunk")
	// It logs something else in the place of what it forgot, as much and then more.
	e := testEntry(6)
	e.Note = "another"
	_, err = back.Append(t.Context(), e)
	must(t, err)
	err = m.Observe(t.Context(), back.Head(), never(t))
	wantCode(t, err, "release_log_fork")
	wantFork(t, err, remembered, back.Head())
	grow(t, back, 5)
	err = m.Observe(t.Context(), back.Head(), prover(back, 0))
	wantCode(t, err, "release_log_fork")
	wantFork(t, err, remembered, back.Head())
	m.remembers(t, remembered)
}

func TestMemoryRefuses(t *testing.T) {
	a := newAuthority(t)
	l, _ := a.create(t)
	grow(t, l, 3)
	m := newMemory(t)
	must(t, m.Observe(t.Context(), l.Head(), nil))
	first := l.Head()
	grow(t, l, 1)
	lost := errors.New("no answer")
	for name, c := range map[string]struct {
		head  Head
		proof func(uint64) ([][]byte, error)
		code  string
	}{
		"no head":             {Head{}, never(t), "release_log_missing"},
		"no way to a proof":   {l.Head(), nil, "release_log_unproven"},
		"no proof":            {l.Head(), func(uint64) ([][]byte, error) { return nil, lost }, "release_log_unproven"},
		"an empty proof":      {l.Head(), func(uint64) ([][]byte, error) { return nil, nil }, "release_log_fork"},
		"another proof":       {l.Head(), func(uint64) ([][]byte, error) { return prover(l, 4)(2) }, "release_log_fork"},
		"short hashes":        {l.Head(), func(uint64) ([][]byte, error) { return [][]byte{{1}}, nil }, "release_log_fork"},
		"another key":         {a.head(t, strings.Split(first.Log(), "/")[2], 9, 9, Hash{}), never(t), "release_log_fork"},
		"another key, behind": {a.head(t, strings.Split(first.Log(), "/")[2], 9, 1, Hash{}), never(t), "release_log_fork"},
	} {
		t.Run(name, func(t *testing.T) {
			wantCode(t, m.Observe(t.Context(), c.head, c.proof), c.code)
			m.remembers(t, first)
		})
	}
	t.Run("a reply without a head", func(t *testing.T) {
		wantCode(t, m.Missing(a.spki), "release_log_missing")
		must(t, m.Missing(newAuthority(t).spki))
	})
	t.Run("a memory in use", func(t *testing.T) {
		unlock, err := m.lock(t.Context())
		must(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		wantCode(t, m.Observe(ctx, l.Head(), prover(l, 0)), "release_log_locked")
		unlock()
		must(t, m.Observe(t.Context(), l.Head(), prover(l, 0)))
	})
	t.Run("a memory that cannot be written", func(t *testing.T) {
		m := OpenMemory(filepath.Join(t.TempDir(), "absent", "heads.json"))
		wantCode(t, m.Observe(t.Context(), l.Head(), nil), "release_log_memory")
	})
}

func TestADamagedMemoryStaysAnError(t *testing.T) {
	a := newAuthority(t)
	l, _ := a.create(t)
	m := newMemory(t)
	must(t, m.Observe(t.Context(), l.Head(), nil))
	good, err := os.ReadFile(m.path)
	must(t, err)
	head := string(good[strings.Index(string(good), "[")+1 : len(good)-2])
	for name, text := range map[string]string{
		"empty":           "",
		"cut":             string(good[:len(good)-1]),
		"two":             string(good) + string(good),
		"another version": strings.Replace(string(good), `"version":1`, `"version":2`, 1),
		"an extra field":  strings.Replace(string(good), `"version":1`, `"version":1,"x":1`, 1),
		"a changed head":  strings.Replace(string(good), `\n0\n`, `\n1\n`, 1),
		"a log twice":     `{"version":1,"heads":[` + head + "," + head + `]}`,
		"too long":        string(good) + strings.Repeat(" ", maxMemory),
		"too many":        `{"version":1,"heads":[` + strings.Repeat("{},", MaxLogs) + `{}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.WriteFile(m.path, []byte(text), 0o600))
			wantCode(t, m.Observe(t.Context(), l.Head(), nil), "release_log_memory")
			wantCode(t, m.Missing(a.spki), "release_log_memory")
		})
	}
	must(t, os.WriteFile(m.path, good, 0o600))
	must(t, os.Chmod(m.path, 0o622))
	wantCode(t, m.Missing(a.spki), "release_log_memory")
}

func TestMemoryIsBounded(t *testing.T) {
	m := newMemory(t)
	logs := func(a *authority, n int) error {
		for i := range n {
			if err := m.Observe(t.Context(), a.head(t, fmt.Sprintf("%016x", i), byte(i), 0, Hash(hasher.EmptyRoot())), nil); err != nil {
				return err
			}
		}
		return nil
	}
	a := newAuthority(t)
	must(t, logs(a, MaxLogsPerRoot))
	wantCode(t, logs(a, MaxLogsPerRoot+1), "release_log_memory_full")
	must(t, logs(a, MaxLogsPerRoot)) // those are still followed
	doc, _, err := m.read()
	must(t, err)
	for len(doc.Heads) < MaxLogs {
		a := newAuthority(t)
		for i := range MaxLogsPerRoot {
			doc.Heads = append(doc.Heads, a.head(t, fmt.Sprintf("%016x", i), byte(i), 0, Hash(hasher.EmptyRoot())).document())
		}
	}
	must(t, m.write(doc))
	wantCode(t, logs(newAuthority(t), 1), "release_log_memory_full")
	if fi, err := os.Stat(m.path); err != nil || fi.Size() > maxMemory {
		t.Fatal(fi.Size(), err)
	}
}

func TestManyShareOneMemory(t *testing.T) {
	a := newAuthority(t)
	m := newMemory(t)
	var wg sync.WaitGroup
	for i := range 12 {
		l, _ := a.create(t)
		wg.Go(func() {
			for range 3 {
				if _, err := l.Append(t.Context(), testEntry(i)); err != nil {
					t.Error(err)
				}
				if err := OpenMemory(m.path).Observe(t.Context(), l.Head(), prover(l, 0)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	heads, err := m.Heads(a.spki)
	if err != nil || len(heads) != 12 {
		t.Fatalf("%d logs remembered, %v", len(heads), err)
	}
	for _, h := range heads {
		if h.Size() != 3 {
			t.Errorf("remembered %s", h)
		}
	}
}

func FuzzMemory(f *testing.F) {
	a := newAuthority(f)
	l, _ := a.create(f)
	m := newMemory(f)
	must(f, m.Observe(f.Context(), l.Head(), nil))
	good, err := os.ReadFile(m.path)
	must(f, err)
	f.Add(good)
	for _, seed := range []string{"", "{}", `{"version":1}`, `{"version":1,"heads":[{}]}`, `{"version":1,"heads":null}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, heads, err := parseMemory(data)
		if err == nil && (len(doc.Heads) != len(heads) || len(heads) > MaxLogs) {
			t.Fatalf("%d heads of %d", len(heads), len(doc.Heads))
		}
		for _, h := range heads {
			if h.IsZero() {
				t.Fatal("a head that did not verify")
			}
		}
	})
}
