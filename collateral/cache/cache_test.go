// SPDX-License-Identifier: Apache-2.0

package cache_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/cache"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// source answers from memory and counts.
type source struct {
	mu     sync.Mutex
	bundle *collateral.Bundle
	err    error
	asked  []collateral.Request
}

func (s *source) Collateral(_ context.Context, want collateral.Request) (*collateral.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, want)
	return s.bundle, s.err
}

// rig is a cache with a clock that a test sets.
type rig struct {
	*cache.Cache
	t     *testing.T
	dir   string
	src   *source
	now   time.Time
	warns []error
}

func newRig(t *testing.T, o cache.Options) *rig {
	r := &rig{t: t, dir: filepath.Join(t.TempDir(), "cache"), src: &source{bundle: realBundle(t)}, now: issued.Add(time.Hour)}
	o.Now = func() time.Time { return r.now }
	o.Warn = func(err error) { r.warns = append(r.warns, err) }
	c, err := cache.Open(r.dir, r.src, o)
	if err != nil {
		t.Fatal(err)
	}
	r.Cache = c
	return r
}

// get returns the code of the error, and how often the source was asked in all.
func (r *rig) get(want collateral.Request) (b *collateral.Bundle, code string, asked int) {
	r.t.Helper()
	b, err := r.Collateral(r.t.Context(), want)
	if (b == nil) == (err == nil) {
		r.t.Fatalf("bundle %v with error %v", b != nil, err)
	}
	return b, fault.Code(err), len(r.src.asked)
}

func (r *rig) expect(what string, want collateral.Request, code string, asked int) {
	r.t.Helper()
	if _, c, n := r.get(want); c != code || n != asked {
		r.t.Errorf("%s: code %q after asking %d times, want %q after %d", what, c, n, code, asked)
	}
}

func (r *rig) files() []string {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		r.t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, filepath.Join(r.dir, e.Name()))
	}
	return out
}

// The v4 vector: TCB info of 2025-06-19 10:16:03, QE identity a little later; the
// first to end is the TCB info or a revocation list.
var (
	issued = time.Date(2025, 6, 19, 11, 0, 0, 0, time.UTC)
	one    = collateral.Request{FMSPC: "b0c06f000000", PCKCA: collateral.Platform}
	down   = fault.New("collateral_unavailable", "the service fails").WithFix("wait")
)

func realBundle(t testing.TB) *collateral.Bundle {
	t.Helper()
	b, err := collateral.ParseBundle(testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_v4_collateral.json"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestAnAnswerIsUsedUntilItIsOldThenAskedForAgain(t *testing.T) {
	r := newRig(t, cache.Options{})
	r.expect("first", one, "", 1)
	b, _, asked := r.get(one)
	if fmt.Sprintf("%q", *b) != fmt.Sprintf("%q", *realBundle(t)) || asked != 1 {
		t.Errorf("the kept answer differs from what was fetched, or the source was asked %d times", asked)
	}
	r.now = r.now.Add(24*time.Hour - time.Second)
	r.expect("a second before it is old", one, "", 1)
	r.now = r.now.Add(time.Second)
	r.expect("when it is old", one, "", 2)
	r.expect("after it was renewed", one, "", 2)
	if len(r.warns) > 0 {
		t.Errorf("warnings %v", r.warns)
	}
	for _, f := range r.files() {
		if fi, err := os.Stat(f); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, fi.Mode(), err)
		}
	}
	// Another process finds it, too.
	again, err := cache.Open(r.dir, r.src, cache.Options{Now: func() time.Time { return r.now }})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Collateral(t.Context(), one); err != nil || len(r.src.asked) != 2 {
		t.Errorf("after a restart: %v, asked %d times", err, len(r.src.asked))
	}
}

func TestThreat_B02_AStaleAnswerIsNeverUsedPastItsEnd(t *testing.T) {
	r := newRig(t, cache.Options{})
	until, err := cache.Expires(r.src.bundle)
	if err != nil {
		t.Fatal(err)
	}
	r.expect("first", one, "", 1)
	r.src.err = down
	r.now = r.now.Add(25 * time.Hour)
	r.expect("an old answer when the source fails", one, "", 2)
	if len(r.warns) != 1 || fault.Code(r.warns[0]) != "collateral_stale" {
		t.Errorf("warnings %v, want one of the stale answer", r.warns)
	}
	r.expect("again, without asking at once", one, "", 2)
	r.now = until.Add(-time.Nanosecond)
	r.expect("just before the first part ends", one, "", 3)
	r.now = until
	r.expect("when it ends", one, "collateral_unavailable", 3)
	r.now = until.Add(time.Minute)
	r.expect("a minute later", one, "collateral_unavailable", 4)
	r.src.err = nil
	r.now = until.Add(2 * time.Minute)
	r.expect("a source that returns what has ended", one, "", 5) // for the verifier to refuse, or to verify the past
	r.expect("which is not kept", one, "", 6)
}

func TestAServiceThatLagsDoesNotReplaceAnAnswerThatIsStillGood(t *testing.T) {
	r := newRig(t, cache.Options{})
	r.expect("first", one, "", 1)
	lagging := realBundle(t)
	lagging.QEIdentity = strings.Replace(lagging.QEIdentity, `"nextUpdate":"2025-07`, `"nextUpdate":"2025-06`, 1)
	r.src.bundle = lagging
	r.now = r.now.Add(25 * time.Hour)
	for asked := range 2 {
		if b, _, n := r.get(one); b.QEIdentity == lagging.QEIdentity || n != asked+2 {
			t.Errorf("what ended took the place of what is good, after asking %d times", n)
		}
	}
	if len(r.warns) != 2 {
		t.Errorf("warnings %v", r.warns)
	}
}

// A clock that was set back makes nothing fresh; the time to verify at is another
// matter, and the caller's.
func TestThreat_F03_AnAnswerFromTheFutureIsNotFresh(t *testing.T) {
	r := newRig(t, cache.Options{})
	r.expect("first", one, "", 1)
	r.now = r.now.Add(-time.Hour)
	r.expect("with the clock set back", one, "", 2)
	r.src.err = down
	r.now = r.now.Add(-time.Hour)
	r.expect("and the source failing", one, "", 3)
	r.now = r.now.Add(-time.Hour)
	r.expect("a failure from the future is not remembered", one, "", 4)
}

func TestFailuresThatAServiceAnsweredAreRememberedShortly(t *testing.T) {
	r := newRig(t, cache.Options{})
	r.src.err = down
	r.expect("first", one, "collateral_unavailable", 1)
	r.now = r.now.Add(29 * time.Second)
	_, err := r.Collateral(t.Context(), one)
	if len(r.src.asked) != 1 || fault.Code(err) != "collateral_unavailable" || err.Error() != "the service fails" || fault.Fix(err) != "wait" {
		t.Errorf("remembered as %v (fix %q)", err, fault.Fix(err))
	}
	r.now = r.now.Add(time.Second)
	r.src.err = fault.New("collateral_network", "no route")
	r.expect("after 30 seconds", one, "collateral_network", 2)
	r.expect("a network failure is not remembered", one, "collateral_network", 3)
	r.src.err = fault.Wrap(context.Canceled, "collateral_cancelled", "gone")
	r.expect("nor is a caller who left", one, "collateral_cancelled", 4)
	r.src.err = fault.New("collateral_request", "no")
	r.expect("nor is a bad request", one, "collateral_request", 5)
	r.src.err = nil
	r.expect("success", one, "", 6)
	r.expect("success again", one, "", 6)
}

func TestForgetAsksAgain(t *testing.T) {
	r := newRig(t, cache.Options{})
	r.expect("first", one, "", 1)
	r.Forget(one)
	r.src.err = down
	r.expect("a forgotten answer", one, "collateral_unavailable", 2)
	r.Forget(one)
	r.src.err = nil
	r.expect("a forgotten failure", one, "", 3)
	if len(r.files()) != 1 {
		t.Errorf("files %v", r.files())
	}
}

func TestRequestsAreKeptApartByWhatMatters(t *testing.T) {
	r := newRig(t, cache.Options{Scope: "pcs early"})
	snp := collateral.Request{Product: "Milan", ChipID: [64]byte{1}, TCB: 7}
	turin := collateral.Request{Product: "Turin", ChipID: [64]byte{1}, TCB: 7}
	edit := func(w collateral.Request, f func(*collateral.Request)) collateral.Request { f(&w); return w }
	asked := 0
	for _, w := range []collateral.Request{
		one, edit(one, func(w *collateral.Request) { w.Enclave = true }), edit(one, func(w *collateral.Request) { w.FMSPC = "b0c06f000001" }), edit(one, func(w *collateral.Request) { w.PCKCA = collateral.Processor }),
		snp, edit(snp, func(w *collateral.Request) { w.Product = "Genoa" }), edit(snp, func(w *collateral.Request) { w.ChipID[63] = 1 }),
		edit(snp, func(w *collateral.Request) { w.TCB = 8 }), edit(snp, func(w *collateral.Request) { w.VLEK = true }), turin,
		{FMSPC: `a" "b`}, {FMSPC: "a", PCKCA: "b"},
	} {
		asked++
		r.expect(fmt.Sprintf("%+v", w), w, "", asked)
		r.expect(fmt.Sprintf("%+v again", w), w, "", asked)
	}
	r.expect("another chip's VLEK", collateral.Request{Product: "Milan", VLEK: true, TCB: 99}, "", asked)
	r.expect("Turin by 8 bytes", edit(turin, func(w *collateral.Request) { w.ChipID[8] = 1 }), "", asked)
	other, err := cache.Open(r.dir, r.src, cache.Options{Scope: "pcs standard", Now: func() time.Time { return r.now }})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Collateral(t.Context(), one); err != nil || len(r.src.asked) != asked+1 {
		t.Errorf("another scope used this one's answer (%v)", err)
	}
}

func TestDamagedEntriesAreDropped(t *testing.T) {
	other := newRig(t, cache.Options{})
	other.get(collateral.Request{FMSPC: "x"})
	foreign, err := os.ReadFile(other.files()[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		damage func(path string, data []byte) error
	}{
		{"an empty file", func(path string, _ []byte) error { return os.WriteFile(path, nil, 0o600) }},
		{"a file cut short", func(path string, data []byte) error { return os.WriteFile(path, data[:len(data)-1], 0o600) }},
		{"one bit flipped", func(path string, data []byte) error { data[len(data)/2] ^= 1; return os.WriteFile(path, data, 0o600) }},
		{"a checksum alone", func(path string, data []byte) error { return os.WriteFile(path, data[:65], 0o600) }},
		{"another request's entry", func(path string, _ []byte) error { return os.WriteFile(path, foreign, 0o600) }},
		{"a file beyond the limit", func(path string, _ []byte) error { return os.Truncate(path, collateral.MaxBundle+8192) }},
		{"a directory", func(path string, _ []byte) error { return errors.Join(os.Remove(path), os.MkdirAll(path+"/x", 0o700)) }},
		{"a pipe", func(path string, _ []byte) error { return errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)) }},
		{"a link", func(path string, data []byte) error {
			return errors.Join(os.Remove(path), os.WriteFile(path+".real", data, 0o600), os.Symlink(path+".real", path))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, cache.Options{})
			r.expect("first", one, "", 1)
			path := r.files()[0]
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.damage(path, data); err != nil {
				t.Fatal(err)
			}
			r.expect("after the damage", one, "", 2)
			if len(r.warns) != 1 || fault.Code(r.warns[0]) != "cache_damaged" {
				t.Errorf("warnings %v", r.warns)
			}
			r.expect("after it was dropped", one, "", 2)
		})
	}
}

func TestTheCacheIsBounded(t *testing.T) {
	r := newRig(t, cache.Options{Entries: 4})
	name := func(i int) collateral.Request { return collateral.Request{FMSPC: fmt.Sprint(i)} }
	past := time.Now().Add(-10 * time.Hour)
	for i := range 4 {
		r.expect("fill", name(i), "", i+1)
		// Entries must differ in when they were used by more than the clock's grain.
		for _, f := range r.files() {
			if fi, err := os.Stat(f); err == nil && time.Since(fi.ModTime()) < time.Minute {
				used := past.Add(time.Duration(i) * time.Minute)
				os.Chtimes(f, used, used)
			}
		}
	}
	r.expect("use the oldest", name(0), "", 4)
	// Unknown machines cannot push out one that is known.
	r.src.err = down
	for i := range 10 {
		r.expect("an unknown machine", name(100+i), "collateral_unavailable", 5+i)
	}
	if n := len(r.files()); n != 4 {
		t.Errorf("%d files, want 4", n)
	}
	r.src.err = nil
	r.expect("the one that was used stays", name(0), "", 14)
	r.expect("another known machine stays", name(3), "", 14)
	r.expect("the one not used for longest went", name(1), "", 15)

	size := func(r *rig) (n int64) {
		for _, f := range r.files() {
			if fi, err := os.Stat(f); err == nil {
				n += fi.Size()
			}
		}
		return n
	}
	small := newRig(t, cache.Options{Bytes: 50_000})
	for i := range 6 {
		small.expect("fill", name(i), "", i+1)
	}
	if n := size(small); n > 50_000 || n == 0 {
		t.Errorf("%d bytes, want up to 50000", n)
	}
	tiny := newRig(t, cache.Options{Bytes: 1})
	tiny.expect("larger than the whole", one, "", 1)
	tiny.expect("is kept alone", one, "", 1)
	tiny.expect("until the next", name(1), "", 2)
	tiny.expect("comes", one, "", 3)
}

func TestLeftoversOfCrashesGo(t *testing.T) {
	r := newRig(t, cache.Options{})
	old, young, foreign := filepath.Join(r.dir, ".tmp-x-1"), filepath.Join(r.dir, ".tmp-x-2"), filepath.Join(r.dir, "notes")
	for _, f := range []string{old, young, foreign} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-2 * time.Hour)
	for _, f := range []string{old, foreign} {
		if err := os.Chtimes(f, past, past); err != nil {
			t.Fatal(err)
		}
	}
	r.get(one)
	files := strings.Join(r.files(), " ")
	if strings.Contains(files, old) || !strings.Contains(files, young) || !strings.Contains(files, foreign) {
		t.Errorf("files %s", files)
	}
}

func TestWhatCannotBeKeptIsReturnedNonetheless(t *testing.T) {
	r := newRig(t, cache.Options{})
	if err := os.RemoveAll(r.dir); err != nil {
		t.Fatal(err)
	}
	r.expect("without a directory", one, "", 1)
	if len(r.warns) == 0 || fault.Code(r.warns[0]) != "cache_unwritable" {
		t.Errorf("warnings %v", r.warns)
	}
	if _, err := cache.Open("/dev/null/x", r.src, cache.Options{}); fault.Code(err) != "store_unreadable" {
		t.Errorf("a directory that cannot be made: %v", err)
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := cache.Open(open, r.src, cache.Options{}); fault.Code(err) != "store_unsafe" {
		t.Errorf("a directory that others may read: %v", err)
	}
}

func TestExpiresIsTheFirstEnd(t *testing.T) {
	real := realBundle(t)
	var info struct{ NextUpdate time.Time }
	if err := json.Unmarshal([]byte(real.TCBInfo), &info); err != nil {
		t.Fatal(err)
	}
	shift := func(doc string, to time.Time) string {
		return strings.ReplaceAll(doc, `"nextUpdate":"`, `"nextUpdate":"`+to.Format(time.RFC3339)+`","was":"`)
	}
	early := time.Date(2025, 6, 20, 0, 0, 0, 0, time.UTC)
	_, pckCRL, err := collateral.ParseCRL(real.PCKCRL)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		edit func(b *collateral.Bundle)
		want time.Time
	}{
		{"TCB info", func(b *collateral.Bundle) { b.TCBInfo = shift(b.TCBInfo, early) }, early},
		{"QE identity", func(b *collateral.Bundle) { b.QEIdentity = shift(b.QEIdentity, early) }, early},
		{"PCK list alone", func(b *collateral.Bundle) { *b = collateral.Bundle{TDX: collateral.TDX{PCKCRL: b.PCKCRL}} }, pckCRL.NextUpdate},
		{"other list alone", func(b *collateral.Bundle) { *b = collateral.Bundle{CRLs: []collateral.Hex{b.PCKCRL}} }, pckCRL.NextUpdate},
	} {
		b := *real
		c.edit(&b)
		if got, err := cache.Expires(&b); err != nil || !got.Equal(c.want) {
			t.Errorf("%s: %v, %v, want %v", c.name, got, err, c.want)
		}
	}
	for _, c := range []struct {
		name string
		edit func(b *collateral.Bundle)
	}{
		{"nothing", func(b *collateral.Bundle) { *b = collateral.Bundle{} }},
		{"a document without an end", func(b *collateral.Bundle) { b.TCBInfo = "{}" }},
		{"a document that is not JSON", func(b *collateral.Bundle) { b.QEIdentity = "x" }},
		{"an end that is no time", func(b *collateral.Bundle) { b.QEIdentity = `{"nextUpdate":"soon"}` }},
		{"a list that is none", func(b *collateral.Bundle) { b.CRLs = []collateral.Hex{{1}} }},
		{"a certificate that is none", func(b *collateral.Bundle) { b.Certificates = []collateral.Hex{{1}} }},
	} {
		b := *real
		c.edit(&b)
		if _, err := cache.Expires(&b); fault.Code(err) != "collateral_malformed" {
			t.Errorf("%s: %v", c.name, err)
		}
		r := newRig(t, cache.Options{})
		r.src.bundle = &b
		r.expect(c.name+" is passed on", one, "", 1)
		r.expect(c.name+" but not kept", one, "", 2)
	}
}

// Processes write, read and evict in one directory; each gets whole answers.
func TestProcessesShareOneDirectory(t *testing.T) {
	if dir := os.Getenv("CACHE_TEST_DIR"); dir != "" {
		src := &source{bundle: realBundle(t)}
		c, err := cache.Open(dir, src, cache.Options{Entries: 3, Now: func() time.Time { return issued.Add(time.Hour) },
			Warn: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 60 {
			b, err := c.Collateral(t.Context(), collateral.Request{FMSPC: fmt.Sprint(i % 5)})
			if err != nil || b.TCBInfo != src.bundle.TCBInfo {
				t.Fatalf("round %d: %v", i, err)
			}
		}
		return
	}
	dir := filepath.Join(t.TempDir(), "cache")
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0], "-test.run=^TestProcessesShareOneDirectory$")
			cmd.Env = append(os.Environ(), "CACHE_TEST_DIR="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	wg.Wait()
}

func FuzzEntry(f *testing.F) {
	b, err := json.Marshal(realBundle(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, "2025-06-19T12:00:00Z", true)
	f.Add([]byte("{}"), "2025-06-19T12:00:00Z", false)
	dir := filepath.Join(f.TempDir(), "cache")
	src := &source{err: fault.New("collateral_network", "none")}
	c, err := cache.Open(dir, src, cache.Options{Now: func() time.Time { return issued.Add(time.Hour) }})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, bundle []byte, at string, hit bool) {
		if err := cache.WriteEntry(c, one, at, bundle, hit); err != nil {
			t.Skip()
		}
		src.asked = nil
		if b, err := c.Collateral(t.Context(), one); err == nil {
			if until, err := cache.Expires(b); err != nil || !until.After(issued.Add(time.Hour)) {
				t.Fatalf("used an entry that ended %v (%v)", until, err)
			}
		}
	})
}

func BenchmarkHit(b *testing.B) {
	src := &source{bundle: realBundle(b)}
	c, err := cache.Open(filepath.Join(b.TempDir(), "cache"), src, cache.Options{Now: func() time.Time { return issued.Add(time.Hour) }})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Collateral(b.Context(), one); err != nil {
			b.Fatal(err)
		}
	}
	if len(src.asked) != 1 {
		b.Fatalf("asked %d times", len(src.asked))
	}
}
