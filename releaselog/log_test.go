// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/custody"
)

// appenderDir makes the test binary append until it is killed: the log's directory,
// whose log.root beside it is the root.
const appenderDir = "RELEASELOG_TEST_APPENDER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(appenderDir); dir != "" {
		appendForever(dir)
	}
	goleak.VerifyTestMain(m)
}

// authority is a root CA key.
type authority struct {
	key  *ecdsa.PrivateKey
	spki []byte
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	must(t, err)
	return &authority{key, spki}
}

// attest is what custody.Custodian documents.
func (a *authority) attest(_ context.Context, document []byte) ([]byte, error) {
	digest := sha256.Sum256(append([]byte(custody.PurposeReleaseLog+"\n"), document...))
	return ecdsa.SignASN1(rand.Reader, a.key, digest[:])
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, err error, code string) {
	t.Helper()
	if got := fault.Code(err); got != code {
		t.Fatalf("code %q (%v), want %q", got, err, code)
	}
}

func (a *authority) create(t testing.TB) (*Log, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	l, err := Create(t.Context(), dir, a.spki, a.attest)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return l, dir
}

func (a *authority) open(t testing.TB, dir string) *Log {
	t.Helper()
	l, err := Open(dir, a.spki)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return l
}

func testEntry(i int) Entry {
	return Entry{Time: time.UnixMilli(1_790_000_000_123 + int64(i)), Kind: Grant, Purpose: "app-key", AppID: dstack.AppID{1, byte(i), byte(i >> 8)}, Note: strconv.Itoa(i)}
}

// grow appends entries of consecutive numbers.
func grow(t testing.TB, l *Log, n int) []Receipt {
	t.Helper()
	var receipts []Receipt
	for range n {
		r, err := l.Append(t.Context(), testEntry(int(l.Head().Size())))
		must(t, err)
		receipts = append(receipts, r)
	}
	return receipts
}

// copyDir is what a host does who keeps an older copy of a disk.
func copyDir(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	must(t, os.CopyFS(to, os.DirFS(from)))
	must(t, os.Chmod(filepath.Join(to, keyFile), 0o600))
	return to
}

func TestAReceiptProvesItsEntryAndSurvivesReopening(t *testing.T) {
	a := newAuthority(t)
	l, dir := a.create(t)
	if l.Head().Size() != 0 || l.Head().Root() != Hash(hasher.EmptyRoot()) {
		t.Fatalf("a new log has the head %s", l.Head())
	}
	receipts := grow(t, l, 5)
	check := func(r Receipt, i int) {
		t.Helper()
		e, head, err := VerifyRelease(r.Release(), a.spki)
		must(t, err)
		want := testEntry(i)
		if e.AppID != want.AppID || !e.Time.Equal(want.Time) || r.Index != uint64(i) || head.Size() <= r.Index {
			t.Fatalf("receipt %d is of %+v at %d in %s", i, e, r.Index, head)
		}
	}
	for i, r := range receipts {
		check(r, i)
	}
	last := l.Head()
	must(t, l.Close())
	must(t, l.Close())
	l = a.open(t, dir)
	if l.Head() != last || l.Tail() != (Tail{}) {
		t.Fatalf("opened with %s and %+v, closed with %s", l.Head(), l.Tail(), last)
	}
	check(grow(t, l, 1)[0], 5)
	for i := range 6 {
		r, err := l.Prove(uint64(i))
		must(t, err)
		check(r, i)
	}
	if fi, err := os.Stat(filepath.Join(dir, keyFile)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("the log's key is %v, %v", fi, err)
	}
}

func TestEachLogHasItsOwnName(t *testing.T) {
	a := newAuthority(t)
	one, _ := a.create(t)
	two, _ := a.create(t)
	if one.Head().Log() == two.Head().Log() || !strings.HasPrefix(one.Head().Log(), namePrefix(a.spki)) {
		t.Fatalf("names %s and %s", one.Head().Log(), two.Head().Log())
	}
}

func TestCreateRefuses(t *testing.T) {
	a := newAuthority(t)
	for name, prepare := range map[string]func(dir string) error{
		"a log": func(dir string) error { l, err := Create(t.Context(), dir, a.spki, a.attest); l.Close(); return err },
		"a log's key": func(dir string) error {
			must(t, os.Mkdir(dir, 0o700))
			return os.WriteFile(filepath.Join(dir, keyFile), nil, 0o600)
		},
		"its entries": func(dir string) error {
			must(t, os.Mkdir(dir, 0o700))
			return os.WriteFile(filepath.Join(dir, entriesFile), nil, 0o600)
		},
		"a plain file": func(dir string) error { return os.WriteFile(dir, nil, 0o600) },
	} {
		t.Run("where there is "+name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "log")
			must(t, prepare(dir))
			_, err := Create(t.Context(), dir, a.spki, a.attest)
			wantCode(t, err, "release_log_exists")
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".tmp-*")); len(left) > 0 {
				t.Fatalf("left %v", left)
			}
		})
	}
	t.Run("a root that does not vouch", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "log")
		_, err := Create(t.Context(), dir, a.spki, newAuthority(t).attest)
		wantCode(t, err, "release_log_key")
		_, err = Create(t.Context(), dir, a.spki, func(context.Context, []byte) ([]byte, error) { return nil, io.ErrUnexpectedEOF })
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Fatal("there is a log")
		}
	})
	t.Run("not an empty directory", func(t *testing.T) {
		l, err := Create(t.Context(), t.TempDir(), a.spki, a.attest)
		must(t, err)
		l.Close()
	})
}

func TestThreat_G10_ALostOrDamagedLogIsRefused(t *testing.T) {
	a := newAuthority(t)
	l, dir := a.create(t)
	grow(t, l, 3)
	must(t, l.Close())
	other, otherDir := a.create(t)
	for i := range 3 {
		_, err := other.Append(t.Context(), testEntry(7+i))
		must(t, err)
	}
	must(t, other.Close())
	file := func(dir, name string) string { return filepath.Join(dir, name) }
	edit := func(name string, change func([]byte) []byte) func(string) {
		return func(dir string) {
			data, err := os.ReadFile(file(dir, name))
			must(t, err)
			must(t, os.WriteFile(file(dir, name), change(data), 0o600))
		}
	}
	take := func(name string) func(string) {
		return edit(name, func([]byte) []byte { data, err := os.ReadFile(file(otherDir, name)); must(t, err); return data })
	}
	for name, c := range map[string]struct {
		harm func(dir string)
		code string
	}{
		"no directory":           {func(dir string) { must(t, os.RemoveAll(dir)) }, "release_log_missing"},
		"an empty directory":     {func(dir string) { must(t, os.RemoveAll(dir)); must(t, os.Mkdir(dir, 0o700)) }, "release_log_missing"},
		"no entries":             {func(dir string) { must(t, os.Remove(file(dir, entriesFile))) }, "release_log_missing"},
		"no head":                {func(dir string) { must(t, os.Remove(file(dir, headFile))) }, "release_log_missing"},
		"no key":                 {func(dir string) { must(t, os.Remove(file(dir, keyFile))) }, "release_log_missing"},
		"entries cut short":      {edit(entriesFile, func(b []byte) []byte { return b[:len(b)-1] }), "release_log_damaged"},
		"an entry less":          {edit(entriesFile, func(b []byte) []byte { return b[bytes.IndexByte(b, '\n')+1:] }), "release_log_damaged"},
		"an entry changed":       {edit(entriesFile, func(b []byte) []byte { return bytes.Replace(b, []byte("grant"), []byte("start"), 1) }), "release_log_damaged"},
		"an overlong entry":      {edit(entriesFile, func(b []byte) []byte { return append(bytes.Repeat([]byte("x"), MaxEntry+1), b...) }), "release_log_damaged"},
		"emptied":                {edit(entriesFile, func([]byte) []byte { return nil }), "release_log_damaged"},
		"another log's entries":  {take(entriesFile), "release_log_damaged"},
		"another log's key":      {take(keyFile), "release_log_damaged"},
		"another log's head":     {take(headFile), "release_log_damaged"},
		"a short key":            {edit(keyFile, func(b []byte) []byte { return b[:31] }), "release_log_damaged"},
		"a long key":             {edit(keyFile, func(b []byte) []byte { return append(b, 0) }), "release_log_damaged"},
		"a key open to others":   {func(dir string) { must(t, os.Chmod(file(dir, keyFile), 0o640)) }, "release_log_damaged"},
		"a head that is torn":    {edit(headFile, func(b []byte) []byte { return b[:len(b)/2] }), "release_log_damaged"},
		"a head that is changed": {edit(headFile, func(b []byte) []byte { return bytes.Replace(b, []byte(`\n3\n`), []byte(`\n2\n`), 1) }), "release_log_damaged"},
		"a head and more":        {edit(headFile, func(b []byte) []byte { return append(b, b...) }), "release_log_damaged"},
		"entries that are a link": {func(dir string) {
			must(t, os.Rename(file(dir, entriesFile), file(dir, "x")))
			must(t, os.Symlink("x", file(dir, entriesFile)))
		}, "release_log_damaged"},
		"more than one write behind the head": {edit(entriesFile, func(b []byte) []byte {
			line := b[:bytes.IndexByte(b, '\n')+1]
			return append(b, bytes.Repeat(line, maxGroup+1)...)
		}), "release_log_damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := copyDir(t, dir)
			c.harm(dir)
			_, err := Open(dir, a.spki)
			wantCode(t, err, c.code)
		})
	}
	t.Run("another root's", func(t *testing.T) {
		_, err := Open(dir, newAuthority(t).spki)
		wantCode(t, err, "release_log_damaged")
	})
	a.open(t, dir)
}

func TestOneProcessAppends(t *testing.T) {
	a := newAuthority(t)
	l, dir := a.create(t)
	_, err := Open(dir, a.spki)
	wantCode(t, err, "release_log_locked")
	must(t, l.Close())
	a.open(t, dir)
}

// faulty fails at a step (write, sync or publish), having done it, or half of it, if
// told so.
type faulty struct {
	disk
	step string
	done bool
}

var errDisk = errors.New("the disk is gone")

func (f *faulty) write(data []byte, at int64) error {
	if f.step != "write" {
		return f.disk.write(data, at)
	}
	if f.done {
		f.disk.write(data[:len(data)/2], at)
	}
	return errDisk
}

func (f *faulty) sync() error {
	if f.step != "sync" {
		return f.disk.sync()
	}
	return errDisk
}

func (f *faulty) publish(head Head) error {
	if f.step != "publish" {
		return f.disk.publish(head)
	}
	if f.done {
		f.disk.publish(head)
	}
	return errDisk
}

func TestThreat_G10_NoReleaseWithoutInclusion(t *testing.T) {
	a := newAuthority(t)
	for _, f := range []*faulty{{step: "write"}, {step: "write", done: true}, {step: "sync"}, {step: "publish"}, {step: "publish", done: true}} {
		t.Run(fmt.Sprintf("%s fails, done %v", f.step, f.done), func(t *testing.T) {
			l, dir := a.create(t)
			before := grow(t, l, 2)[1]
			f.disk, l.disk = l.disk, f
			for range 2 {
				r, err := l.Append(t.Context(), testEntry(2))
				wantCode(t, err, "release_log_failed")
				if r.Entry != nil || r.Inclusion != nil || !r.Head.IsZero() {
					t.Fatalf("a receipt of what was not logged: %+v", r)
				}
				if l.Head() != before.Head {
					t.Fatalf("the head is %s after a failure, was %s", l.Head(), before.Head)
				}
				// The disk is well again, which nobody can know.
				f.step = ""
			}
			must(t, l.Close())
			l = a.open(t, dir)
			if l.Head().Size() < 2 {
				t.Fatalf("an acknowledged entry is gone: %s", l.Head())
			}
			grow(t, l, 1)
		})
	}
	l, _ := a.create(t)
	t.Run("closed", func(t *testing.T) {
		must(t, l.Close())
		_, err := l.Append(t.Context(), testEntry(0))
		wantCode(t, err, "release_log_closed")
	})
	t.Run("cancelled", func(t *testing.T) {
		l, _ := a.create(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 20 {
			if r, err := l.Append(ctx, testEntry(0)); err == nil && r.Head.IsZero() {
				t.Fatal("neither receipt nor error")
			} else if err != nil && !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
		}
	})
	t.Run("an entry that cannot be written", func(t *testing.T) {
		l, _ := a.create(t)
		_, err := l.Append(t.Context(), Entry{Time: time.Now(), Kind: "a kind"})
		wantCode(t, err, "release_log_entry")
		if l.Head().Size() != 0 {
			t.Fatal("logged")
		}
	})
}

// recorder notes the steps of a commit, and what the log says of itself meanwhile.
type recorder struct {
	disk
	log   *Log
	steps []string
}

func (r *recorder) note(step string) {
	r.steps = append(r.steps, fmt.Sprintf("%s at %d", step, r.log.Head().Size()))
}
func (r *recorder) write(data []byte, at int64) error {
	defer r.note("write")
	return r.disk.write(data, at)
}
func (r *recorder) sync() error { defer r.note("sync"); return r.disk.sync() }
func (r *recorder) publish(head Head) error {
	defer r.note("publish")
	return r.disk.publish(head)
}

func TestAHeadIsKnownOnlyOnceItIsDurable(t *testing.T) {
	l, _ := newAuthority(t).create(t)
	r := &recorder{disk: l.disk, log: l}
	l.disk = r
	grow(t, l, 2)
	want := []string{"write at 0", "sync at 0", "publish at 0", "write at 1", "sync at 1", "publish at 1"}
	if !slices.Equal(r.steps, want) {
		t.Fatalf("steps %q, want %q", r.steps, want)
	}
}

// Every prefix of the writes of a commit, and of the files of an acknowledged one: Open
// recovers or refuses, and forgets nothing that was acknowledged.
func TestCrashes(t *testing.T) {
	a := newAuthority(t)
	l, dir := a.create(t)
	grow(t, l, 3)
	old := l.Head()
	oldDir := copyDir(t, dir)
	grow(t, l, 2)
	must(t, l.Close())
	whole, err := os.ReadFile(filepath.Join(dir, entriesFile))
	must(t, err)
	acknowledged := l.growing.end
	begin := int64(0) // of the last two entries
	for range 3 {
		begin += int64(bytes.IndexByte(whole[begin:], '\n')) + 1
	}
	if acknowledged != int64(len(whole)) {
		t.Fatal("the tree and its file differ")
	}
	t.Run("acknowledged entries cut", func(t *testing.T) {
		dir := copyDir(t, dir)
		for n := int64(len(whole)) - 1; n >= begin; n-- {
			must(t, os.Truncate(filepath.Join(dir, entriesFile), n))
			_, err := Open(dir, a.spki)
			wantCode(t, err, "release_log_damaged")
		}
	})
	// The head is of 3 entries, and the write of two more was cut at n.
	for n := begin; n <= int64(len(whole)); n++ {
		for _, hole := range []bool{false, true} {
			data := slices.Clone(whole[:n])
			if hole && n-begin > 10 { // a page that did not reach the disk
				clear(data[begin+5 : begin+8])
			}
			must(t, os.WriteFile(filepath.Join(oldDir, entriesFile), data, 0o600))
			dir := copyDir(t, oldDir)
			l, err := Open(dir, a.spki)
			must(t, err)
			kept, rest := 0, data[begin:]
			for end := bytes.IndexByte(rest, '\n'); end >= 0 && !bytes.Contains(rest[:end], []byte{0}); end = bytes.IndexByte(rest, '\n') {
				kept, rest = kept+1, rest[end+1:]
			}
			dropped := len(rest)
			if l.Tail() != (Tail{kept, dropped}) || l.Head().Size() != uint64(3+kept) {
				t.Fatalf("cut at %d: %+v, %s; want %d kept, %d bytes dropped", n-begin, l.Tail(), l.Head(), kept, dropped)
			}
			proof, _, err := l.Consistency(3, 0)
			must(t, err)
			must(t, Compare(old, l.Head(), proof))
			if n%97 == 0 { // appends still, and opens still
				grow(t, l, 1)
				must(t, l.Close())
				l = a.open(t, dir)
				if l.Tail() != (Tail{}) {
					t.Fatalf("again %+v", l.Tail())
				}
			}
			must(t, l.Close())
		}
	}
}

// Killed at random between its writes, a log has everything that it said it has.
func TestKilledAppenderForgetsNothing(t *testing.T) {
	a := newAuthority(t)
	l, dir := a.create(t)
	must(t, l.Close())
	must(t, os.WriteFile(dir+".root", a.spki, 0o600))
	seen := uint64(0)
	for round := range 6 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), appenderDir+"="+dir)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		time.AfterFunc(time.Duration(30+mathrand.IntN(120))*time.Millisecond, func() { cmd.Process.Kill() })
		for s := bufio.NewScanner(out); s.Scan(); {
			n, err := strconv.ParseUint(s.Text(), 10, 64)
			if err != nil {
				break // cut by the kill
			}
			seen = max(seen, n)
		}
		cmd.Wait()
		l := a.open(t, dir)
		if l.Head().Size() < seen {
			t.Fatalf("round %d: %d entries were acknowledged, there are %d", round, seen, l.Head().Size())
		}
		must(t, l.Close())
	}
	if seen == 0 {
		t.Fatal("no entry was acknowledged in any round")
	}
}

// appendForever prints the size of the log after each Append.
func appendForever(dir string) {
	spki, err := os.ReadFile(dir + ".root")
	if err != nil {
		os.Exit(2)
	}
	l, err := Open(dir, spki)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	for range 4 {
		go func() {
			for {
				r, err := l.Append(context.Background(), testEntry(1))
				if err != nil {
					os.Exit(2)
				}
				// Whole lines, as a number cut short would be smaller anyway.
				os.Stdout.WriteString(strconv.FormatUint(r.Index+1, 10) + "\n")
			}
		}()
	}
	select {}
}

func TestFiftyAppenders(t *testing.T) {
	a := newAuthority(t)
	l, dir := a.create(t)
	const each = 12 // 600 entries: three tiles
	var mu sync.Mutex
	seen := map[uint64]string{}
	heads := map[Head]bool{}
	var wg sync.WaitGroup
	for w := range 50 {
		wg.Go(func() {
			for i := range each {
				r, err := l.Append(t.Context(), testEntry(w*each+i))
				if err != nil {
					t.Error(err)
					return
				}
				e, _, err := VerifyRelease(r.Release(), a.spki)
				if err != nil || e.Note != strconv.Itoa(w*each+i) {
					t.Errorf("receipt of %q: %v", e.Note, err)
				}
				mu.Lock()
				if seen[r.Index] != "" {
					t.Errorf("index %d twice", r.Index)
				}
				seen[r.Index], heads[r.Head] = e.Note, true
				mu.Unlock()
				if w == 0 {
					proof, head, err := l.Consistency(r.Head.Size(), 0)
					if err != nil || Compare(r.Head, head, proof) != nil {
						t.Errorf("consistency from %d: %v", r.Head.Size(), err)
					}
				}
			}
		})
	}
	wg.Wait()
	if len(seen) != 50*each || l.Head().Size() != 50*each {
		t.Fatalf("%d entries, %s", len(seen), l.Head())
	}
	if len(heads) > 40*each {
		t.Errorf("%d heads for %d entries: groups do not share a write", len(heads), 50*each)
	}
	must(t, l.Close())
	l = a.open(t, dir)
	var at uint64
	for at < l.Head().Size() {
		entries, _, err := l.Entries(at, 0)
		must(t, err)
		for _, data := range entries {
			e, err := ParseEntry(data)
			if err != nil || e.Note != seen[at] {
				t.Fatalf("entry %d is %q, was %q (%v)", at, e.Note, seen[at], err)
			}
			at++
		}
	}
	all := map[Head]bool{}
	for h := range heads {
		all[h] = true
		proof, head, err := l.Consistency(h.Size(), 0)
		must(t, err)
		must(t, Compare(h, head, proof))
	}
}

func TestRangesAreBounded(t *testing.T) {
	a := newAuthority(t)
	l, dir := a.create(t)
	for _, start := range []uint64{1, math.MaxUint64} {
		_, _, err := l.Entries(start, 1)
		wantCode(t, err, "release_log_range")
	}
	if entries, _, err := l.Entries(0, 1); err != nil || len(entries) != 0 {
		t.Fatal(entries, err)
	}
	big := testEntry(0)
	big.Reason, big.Note = strings.Repeat("\x01", maxText), strings.Repeat("\x01", maxText)
	var wg sync.WaitGroup
	for range 300 {
		wg.Go(func() {
			if _, err := l.Append(t.Context(), big); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, c := range []struct{ start, count, want uint64 }{{0, 0, 100}, {250, 0, 50}, {299, math.MaxUint64, 1}, {300, 7, 0}, {10, 20, 20}, {255, 2, 2}} {
		entries, head, err := l.Entries(c.start, c.count)
		if err != nil || uint64(len(entries)) != c.want || head.Size() != 300 {
			t.Errorf("%d entries from %d: %d, %v; want %d", c.count, c.start, len(entries), err, c.want)
		}
	}
	if entries, _, err := l.Entries(0, 1000); err != nil || len(entries) >= 300 || len(entries) < 100 {
		t.Errorf("%d entries of 12 KiB each (%v), want 2 MiB", len(entries), err)
	}
	for _, c := range [][2]uint64{{301, 0}, {5, 4}, {0, 301}, {math.MaxUint64, math.MaxUint64}} {
		_, _, err := l.Consistency(c[0], c[1])
		wantCode(t, err, "release_log_range")
	}
	for _, i := range []uint64{300, 301, math.MaxUint64} {
		_, err := l.Prove(i)
		wantCode(t, err, "release_log_range")
	}
	// The file changes below an open log.
	f, err := os.OpenFile(filepath.Join(dir, entriesFile), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte("X"), 20)
	must(t, err)
	_, err = l.Prove(3)
	wantCode(t, err, "release_log_damaged")
	_, err = f.WriteAt([]byte("X"), l.tree.starts[1]+20)
	must(t, err)
	_, err = l.Prove(260)
	wantCode(t, err, "release_log_damaged")
}

func BenchmarkAppend(b *testing.B) {
	for _, parallel := range []int{1, 50} {
		b.Run(fmt.Sprintf("%d callers", parallel), func(b *testing.B) {
			l, _ := newAuthority(b).create(b)
			b.SetParallelism(parallel)
			if parallel == 1 {
				for b.Loop() {
					if _, err := l.Append(b.Context(), testEntry(1)); err != nil {
						b.Fatal(err)
					}
				}
				return
			}
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					if _, err := l.Append(b.Context(), testEntry(1)); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

// Proofs of a large log, from memory alone for a new entry and with one tile read for
// an old one.
func BenchmarkInclusion(b *testing.B) {
	g := newTree()
	var file bytes.Buffer
	for i := range 1_000_000 {
		e, err := testEntry(i).encode()
		must(b, err)
		must(b, g.append(e))
		file.Write(append(e, '\n'))
	}
	r := bytes.NewReader(file.Bytes())
	for _, index := range []uint64{g.size - 1, 12345} {
		b.Run(fmt.Sprintf("%d of %d", index, g.size), func(b *testing.B) {
			for b.Loop() {
				if _, err := g.inclusion(r, index); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
