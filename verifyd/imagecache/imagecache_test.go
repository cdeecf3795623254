// SPDX-License-Identifier: Apache-2.0

package imagecache

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/verifyd/imagecache/imagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server answers each path with its handler and counts what is asked.
type server struct {
	*httptest.Server
	asked  atomic.Int64
	answer atomic.Pointer[http.HandlerFunc]
}

func newServer(t *testing.T, answer http.HandlerFunc) *server {
	s := &server{}
	s.answer.Store(&answer)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		(*s.answer.Load())(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func serve(data []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { w.Write(data) }
}

func open(t *testing.T, s *server, edit func(*Options)) *Cache {
	t.Helper()
	o := Options{URL: s.URL + "/os-images/mr_" + Placeholder + ".tar.gz"}
	if edit != nil {
		edit(&o)
	}
	c, err := Open(filepath.Join(t.TempDir(), "cache"), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestAnImageIsDownloadedOnceAndReadAgain(t *testing.T) {
	r := imagetest.New(t, "0.6.0", true)
	s := newServer(t, func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path != "/os-images/mr_"+r.Hash.String()+".tar.gz" {
			http.NotFound(w, q)
			return
		}
		w.Write(r.Archive(t))
	})
	c := open(t, s, nil)
	for range 3 {
		img, err := c.Get(t.Context(), r.Hash)
		if err != nil {
			t.Fatal(err)
		}
		l, err := img.Launch(measure.VMConfig{CPUCount: 1, MemorySize: 2 << 30})
		if err != nil {
			t.Fatal(err)
		}
		got, err := measure.ComputeTDX(l)
		if err != nil {
			t.Fatal(err)
		}
		want, err := measure.ComputeTDX(r.Launch)
		if err != nil || got.MRTD != want.MRTD || got.RTMR1 != want.RTMR1 || got.RTMR2 != want.RTMR2 {
			t.Error("the image measures otherwise than the release")
		}
		if !img.Metadata.IsDev || img.Metadata.Version != "0.6.0" {
			t.Errorf("%+v", img.Metadata)
		}
	}
	if n := s.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	if st := c.Stats(); st != (Stats{Hits: 2, Downloads: 1}) {
		t.Errorf("%+v", st)
	}
	if left, _ := os.ReadDir(filepath.Join(c.dir, "tmp")); len(left) != 0 {
		t.Errorf("%d temporary directories are left", len(left))
	}
	// A directory of the same cache, opened again, has it.
	c.Close()
	again, err := Open(filepath.Dir(c.dir), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := again.Get(t.Context(), r.Hash); err != nil {
		t.Error(err)
	}
	if _, err := again.Get(t.Context(), dstack.ImageHash{1}); fault.Code(err) != "image_missing" {
		t.Errorf("without a URL: %v", err)
	}
}

func TestThoseWhoAskTogetherShareOneDownload(t *testing.T) {
	r := imagetest.New(t, "0.6.0", false)
	gate := make(chan struct{})
	s := newServer(t, func(w http.ResponseWriter, q *http.Request) { <-gate; w.Write(r.Archive(t)) })
	c := open(t, s, nil)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := c.Get(t.Context(), r.Hash); err != nil {
				t.Error(err)
			}
		})
	}
	for s.asked.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	close(gate)
	wg.Wait()
	if n := s.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// A caller who leaves does not end the download of the others; the last one does.
func TestTheLastCallerWhoLeavesEndsTheDownload(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	s := newServer(t, func(w http.ResponseWriter, q *http.Request) {
		close(started)
		w.(http.Flusher).Flush()
		<-q.Context().Done()
		close(ended)
	})
	c := open(t, s, nil)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-started; cancel() }()
	if _, err := c.Get(ctx, dstack.ImageHash{1}); fault.Code(err) != "image_cancelled" {
		t.Errorf("%v", err)
	}
	<-ended
	// It was nobody's failure, so that it is not remembered.
	answer := http.HandlerFunc(http.NotFound)
	s.answer.Store(&answer)
	if _, err := c.Get(t.Context(), dstack.ImageHash{1}); fault.Code(err) != "image_not_found" {
		t.Errorf("%v", err)
	}
}

func TestFailuresAreRememberedForAWhile(t *testing.T) {
	now := time.Unix(1e9, 0)
	s := newServer(t, http.NotFound)
	c := open(t, s, func(o *Options) { o.Now = func() time.Time { return now } })
	h := dstack.ImageHash{7}
	ask := func(code string, asked int64) {
		t.Helper()
		if _, err := c.Get(t.Context(), h); fault.Code(err) != code || s.asked.Load() != asked {
			t.Errorf("%v, asked %d times, want %s and %d", err, s.asked.Load(), code, asked)
		}
	}
	ask("image_not_found", 1)
	now = now.Add(rememberMissing - time.Second)
	ask("image_not_found", 1)
	now = now.Add(2 * time.Second)
	busy := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503) })
	s.answer.Store(&busy)
	ask("image_download", 2)
	now = now.Add(rememberFailure + time.Second)
	ask("image_download", 3)
	// What is remembered is bounded.
	for i := range 2 * maxRemembered {
		c.remember(dstack.ImageHash{1, byte(i), byte(i >> 8)}, fault.New("image_download", "x"))
	}
	if n := len(c.failed); n > maxRemembered {
		t.Errorf("%d failures are remembered", n)
	}
}

func file(name, data string) imagetest.Entry {
	return imagetest.Entry{Header: tar.Header{Name: name, Typeflag: tar.TypeReg}, Data: data}
}

func special(kind byte, name, target string) imagetest.Entry {
	return imagetest.Entry{Header: tar.Header{Name: name, Typeflag: kind, Linkname: target}}
}

// G11: archives that try to write elsewhere, or to be something else than files.
func TestThreat_G11_ArchivesCannotLeaveTheirDirectory(t *testing.T) {
	r := imagetest.New(t, "0.6.0", false)
	with := func(extra ...imagetest.Entry) []imagetest.Entry {
		out := []imagetest.Entry{file("sha256sum.txt", string(r.Sums))}
		for name, data := range r.Files {
			out = append(out, file(name, string(data)))
		}
		return append(out, extra...)
	}
	for _, c := range []struct {
		name  string
		entry imagetest.Entry
	}{
		{"a parent directory", file("../evil", "x")},
		{"a parent directory further down", file("a/../../evil", "x")},
		{"a parent directory that comes back", file("a/../ovmf.fd2", "x")},
		{"an absolute name", file("/tmp/evil", "x")},
		{"an empty part", file("a//b", "x")},
		{"a backslash", file(`..\evil`, "x")},
		{"a hidden file", file(".profile", "x")},
		{"a name with a line break", file("a\nb", "x")},
		{"a name of 200 bytes", file(strings.Repeat("a", 200), "x")},
		{"a symbolic link", special(tar.TypeSymlink, "link", "/etc/passwd")},
		{"a symbolic link in place of a file", special(tar.TypeSymlink, "metadata.json", "/etc/passwd")},
		{"a hard link", special(tar.TypeLink, "link", "ovmf.fd")},
		{"a device", special(tar.TypeChar, "null", "")},
		{"a pipe", special(tar.TypeFifo, "pipe", "")},
		{"a file twice", file("ovmf.fd", "x")},
	} {
		t.Run(c.name, func(t *testing.T) {
			archive := imagetest.Archive(t, with(c.entry)...)
			s := newServer(t, serve(archive))
			cache := open(t, s, nil)
			outside := filepath.Dir(filepath.Dir(cache.dir))
			before := tree(t, outside)
			if _, err := cache.Get(t.Context(), r.Hash); fault.Code(err) != "image_archive" {
				t.Errorf("%v (%q)", err, fault.Code(err))
			}
			if after := tree(t, outside); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
	// The twin: the same archive without them, and with what is only passed over.
	s := newServer(t, serve(imagetest.Archive(t, with(file("extra.txt", "x"), file("docs/x/readme", "x"), special(tar.TypeDir, "docs/", ""))...)))
	c := open(t, s, nil)
	if _, err := c.Get(t.Context(), r.Hash); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(c.dir, r.Hash.String(), "extra.txt")); !os.IsNotExist(err) {
		t.Error("a file that is not listed was kept")
	}
}

// Neither archive/tar's writer nor its reader lets a NUL through; should one ever come.
func TestThreat_G11_NULInAName(t *testing.T) {
	if _, err := place(&tar.Header{Name: "ovmf.fd\x00/../../x", Typeflag: tar.TypeReg}); fault.Code(err) != "image_archive" {
		t.Errorf("%v", err)
	}
}

// G11: nothing but the operator's template chooses where an image comes from.
func TestThreat_G11_DownloadsStayAtTheConfiguredServer(t *testing.T) {
	r := imagetest.New(t, "0.6.0", false)
	elsewhere := newServer(t, serve(r.Archive(t)))
	s := newServer(t, func(w http.ResponseWriter, q *http.Request) {
		http.Redirect(w, q, elsewhere.URL+"/x", http.StatusFound)
	})
	if _, err := open(t, s, nil).Get(t.Context(), r.Hash); fault.Code(err) != "image_download" {
		t.Errorf("%v", err)
	}
	if n := elsewhere.asked.Load(); n != 0 {
		t.Errorf("the other server was asked %d times", n)
	}
	for name, template := range map[string]string{
		"no hash": "https://a.example/x", "a file": "file:///{OS_IMAGE_HASH}", "no host": "https:///{OS_IMAGE_HASH}",
		"a hash in the host": "https://{OS_IMAGE_HASH}.example/", "a user": "https://u:p@a.example/{OS_IMAGE_HASH}", "no URL": "://{OS_IMAGE_HASH}",
	} {
		if err := CheckURL(template); fault.Code(err) != "image_url" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := CheckURL("https://download.example/os-images/mr_{OS_IMAGE_HASH}.tar.gz"); err != nil {
		t.Error(err)
	}
}

func tree(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		out.WriteString(path + "\n")
		return err
	})
	return out.String()
}

func TestImagesThatAreNotTheirHashAreRefused(t *testing.T) {
	repack := func(edit func(*imagetest.Release)) func(*testing.T) (dstack.ImageHash, []byte) {
		return func(t *testing.T) (dstack.ImageHash, []byte) {
			r := imagetest.New(t, "0.6.0", false)
			edit(r)
			return r.Hash, r.Archive(t)
		}
	}
	sums := func(text string) func(*imagetest.Release) {
		return func(r *imagetest.Release) { r.Sums = []byte(text); r.Hash = sha256.Sum256(r.Sums) }
	}
	zeros := strings.Repeat("0", 64)
	for _, c := range []struct {
		name, code string
		make       func(*testing.T) (dstack.ImageHash, []byte)
	}{
		{"another image", "image_hash_mismatch", repack(func(r *imagetest.Release) { r.Hash[0] ^= 1 })},
		{"a kernel that was changed", "image_altered", repack(func(r *imagetest.Release) { r.Files["bzImage"] = []byte("evil") })},
		{"a document that was changed", "image_altered", repack(func(r *imagetest.Release) { r.Files["measurement.tdx.cbor"] = []byte("evil") })},
		{"no kernel", "image_checksums", repack(func(r *imagetest.Release) { delete(r.Files, "bzImage") })},
		{"no list", "image_checksums", func(t *testing.T) (dstack.ImageHash, []byte) {
			return dstack.ImageHash{}, imagetest.Archive(t, file("ovmf.fd", "x"))
		}},
		{"a list without metadata", "image_checksums", repack(func(r *imagetest.Release) { delete(r.Files, "metadata.json"); r.Seal() })},
		{"a list of three words", "image_checksums", repack(sums(zeros + " a b\n"))},
		{"a list of short digests", "image_checksums", repack(sums("00 metadata.json\n"))},
		{"a list with a path", "image_checksums", repack(sums(zeros + "  ../metadata.json\n"))},
		{"a list of itself", "image_checksums", repack(sums(zeros + "  sha256sum.txt\n"))},
		{"a list with a name twice", "image_checksums", repack(sums(zeros + "  a\n" + zeros + "  a\n"))},
		{"metadata that is no JSON", "image_metadata", repack(func(r *imagetest.Release) { r.Files["metadata.json"] = []byte("{"); r.Seal() })},
		{"metadata of a file elsewhere", "image_metadata", repack(func(r *imagetest.Release) {
			r.Files["metadata.json"] = []byte(`{"bios":"../../etc/passwd","kernel":"bzImage","initrd":"initramfs.cpio.gz","cmdline":"x"}`)
			r.Seal()
		})},
		{"metadata of a file that is not listed", "image_metadata", repack(func(r *imagetest.Release) {
			r.Files["metadata.json"] = []byte(`{"bios":"other.fd","kernel":"bzImage","initrd":"initramfs.cpio.gz","cmdline":"x"}`)
			r.Seal()
		})},
		{"text", "image_archive", func(*testing.T) (dstack.ImageHash, []byte) { return dstack.ImageHash{}, []byte("<html>log in</html>") }},
		{"half an archive", "image_archive", func(t *testing.T) (dstack.ImageHash, []byte) {
			r := imagetest.New(t, "0.6.0", false)
			a := r.Archive(t)
			return r.Hash, a[:len(a)/2]
		}},
		{"300 entries", "image_archive", func(t *testing.T) (dstack.ImageHash, []byte) {
			var list []imagetest.Entry
			for range 300 {
				list = append(list, special(tar.TypeDir, "d/", ""))
			}
			return dstack.ImageHash{}, imagetest.Archive(t, list...)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, archive := c.make(t)
			s := newServer(t, serve(archive))
			cache := open(t, s, nil)
			if _, err := cache.Get(t.Context(), h); fault.Code(err) != c.code {
				t.Errorf("%v (%q), want %q", err, fault.Code(err), c.code)
			}
			if dirs, _ := os.ReadDir(cache.dir); len(dirs) != 1 {
				t.Errorf("something was kept: %v", dirs)
			}
			if left, _ := os.ReadDir(filepath.Join(cache.dir, "tmp")); len(left) != 0 {
				t.Error("something is left")
			}
		})
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// B15: bombs stop at their limits, not at the disk's.
func TestThreat_B15_BombsInImageArchives(t *testing.T) {
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Name: "ovmf.fd", Typeflag: tar.TypeReg, Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	io.Copy(w, io.LimitReader(zeroReader{}, 64<<20))
	w.Close()
	z.Close()
	t.Logf("%d bytes unpack to %d", bomb.Len(), 64<<20)
	chunked := func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush() // no Content-Length
		w.Write([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0})
		io.Copy(w, io.LimitReader(zeroReader{}, 64<<20))
	}
	stored := func(w http.ResponseWriter, r *http.Request) { // gzip without compression
		w.(http.Flusher).Flush()
		z, _ := gzip.NewWriterLevel(w, gzip.NoCompression)
		tw := tar.NewWriter(z)
		tw.WriteHeader(&tar.Header{Name: "ovmf.fd", Typeflag: tar.TypeReg, Size: 64 << 20})
		io.Copy(tw, io.LimitReader(zeroReader{}, 64<<20))
	}
	for _, c := range []struct {
		name, code string
		serve      http.HandlerFunc
	}{
		{"64 MiB in gzip", "image_too_large", serve(bomb.Bytes())},
		{"a length beyond the limit", "image_too_large", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000000000")
			w.Write([]byte{0x1f})
		}},
		{"a body beyond the limit without a length", "image_too_large", stored},
		{"rubbish without end", "image_archive", chunked},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t, c.serve)
			cache := open(t, s, func(o *Options) { o.MaxDownload, o.MaxUnpacked = 4<<20, 8<<20 })
			start := time.Now()
			if _, err := cache.Get(t.Context(), dstack.ImageHash{1}); fault.Code(err) != c.code {
				t.Errorf("%v (%q)", err, fault.Code(err))
			}
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

func TestASlowServerIsGivenUp(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte{0x1f, 0x8b})
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	c := open(t, s, func(o *Options) { o.Timeout = 100 * time.Millisecond })
	if _, err := c.Get(t.Context(), dstack.ImageHash{1}); fault.Code(err) != "image_timeout" {
		t.Errorf("%v (%q)", err, fault.Code(err))
	}
}

// What changed on the disk is not used, but replaced.
func TestAnImageThatRottedIsDownloadedAgain(t *testing.T) {
	r := imagetest.New(t, "0.6.0", false)
	s := newServer(t, serve(r.Archive(t)))
	c := open(t, s, nil)
	for _, name := range []string{"", "bzImage", "sha256sum.txt", "metadata.json", "ovmf.fd"} {
		if name != "" {
			path := filepath.Join(c.dir, r.Hash.String(), name)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			data[0] ^= 1
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before := s.asked.Load()
		img, err := c.Get(t.Context(), r.Hash)
		if err != nil || !bytes.Equal(img.Kernel, r.Launch.Kernel) || !bytes.Equal(img.Firmware, r.Launch.Firmware) {
			t.Errorf("%s: %v", name, err)
		}
		if s.asked.Load() != before+1 {
			t.Errorf("%s: asked %d times", name, s.asked.Load()-before)
		}
	}
}

func TestTheLeastRecentlyUsedImageMakesRoom(t *testing.T) {
	releases := map[string]*imagetest.Release{}
	var list []*imagetest.Release
	for _, v := range []string{"0.6.0", "0.6.1", "0.6.2"} {
		r := imagetest.New(t, v, false)
		releases[r.Hash.String()], list = r, append(list, r)
	}
	s := newServer(t, func(w http.ResponseWriter, q *http.Request) {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(q.URL.Path), "mr_"), ".tar.gz")
		w.Write(releases[name].Archive(t))
	})
	size := int64(0)
	for _, data := range list[0].Files {
		size += int64(len(data))
	}
	now := time.Now()
	c := open(t, s, func(o *Options) {
		o.MaxCache = 2*size + size/2
		o.Now = func() time.Time { now = now.Add(time.Minute); return now }
	})
	get := func(i int) {
		t.Helper()
		if _, err := c.Get(t.Context(), list[i].Hash); err != nil {
			t.Fatal(err)
		}
	}
	get(0)
	get(1)
	get(0) // used again, so that 1 is the oldest
	get(2)
	for i, want := range []bool{true, false, true} {
		if _, err := os.Stat(filepath.Join(c.dir, list[i].Hash.String())); (err == nil) != want {
			t.Errorf("image %d: %v, want it kept: %v", i, err, want)
		}
	}
}

func TestLeftoversAreRemovedWhenTheyAreOld(t *testing.T) {
	dir := t.TempDir()
	old, young := filepath.Join(dir, "images/tmp/tmp-download-1"), filepath.Join(dir, "images/tmp/tmp-download-2")
	for _, d := range []string{old, young} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	long := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(old, long, long); err != nil {
		t.Fatal(err)
	}
	c, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := os.Stat(old); !os.IsNotExist(err) {
		t.Error("the old one is left")
	}
	if _, err := os.Stat(young); err != nil {
		t.Error("the young one is gone")
	}
}

func TestADirectoryOfOthersIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); fault.Code(err) != "image_cache_dir" {
		t.Errorf("%v", err)
	}
	if _, err := Open(filepath.Join(dir, "own"), Options{}); fault.Code(err) != "image_cache_dir" {
		t.Errorf("in a directory that everyone can write to: %v", err)
	}
	if os.Geteuid() == 0 {
		theirs := t.TempDir()
		if err := os.Chown(theirs, 12345, -1); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(filepath.Join(theirs, "own"), Options{}); fault.Code(err) != "image_cache_dir" {
			t.Errorf("in a directory of another user: %v", err)
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(link, Options{}); fault.Code(err) != "image_cache_dir" {
		t.Errorf("%v", err)
	}
}

func FuzzUnpack(f *testing.F) {
	r := imagetest.New(f, "0.6.0", false)
	f.Add(r.Archive(f))
	f.Add(imagetest.Archive(f, file("../x", "y")))
	f.Add(imagetest.Archive(f, special(tar.TypeSymlink, "a", "b"), file("a", "x")))
	f.Fuzz(func(t *testing.T, data []byte) {
		top := t.TempDir()
		dir := filepath.Join(top, "in")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		_ = unpack(bytes.NewReader(data), dir, 1<<20)
		if entries, err := os.ReadDir(top); err != nil || len(entries) != 1 {
			t.Fatalf("%v %v", entries, err)
		}
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if !e.Type().IsRegular() {
				t.Fatalf("%s is %v", e.Name(), e.Type())
			}
		}
	})
}

func FuzzSums(f *testing.F) {
	f.Add([]byte(strings.Repeat("0", 64) + "  metadata.json\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		sums, err := parseSums(data)
		for name := range sums {
			if err == nil && (!flat(name) || strings.Contains(name, "/")) {
				t.Fatalf("%q", name)
			}
		}
	})
}
