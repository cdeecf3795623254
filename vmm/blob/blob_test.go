// SPDX-License-Identifier: Apache-2.0

package blob

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/dstack-go/dstack/internal/fault"
)

func newStore(t *testing.T, max int64) (*Store, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := Open(dir, max, 0)
	if err != nil {
		t.Fatal(err)
	}
	return s, filepath.Join(dir, "sha256")
}

func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestPutThenRead(t *testing.T) {
	s, dir := newStore(t, 3<<20)
	data := bytes.Repeat([]byte("layer "), 400_000)
	d := Digest(sha256.Sum256(data))
	if s.Has(d) {
		t.Fatal("there before")
	}
	var wg sync.WaitGroup
	for range 3 { // concurrent writers of one blob
		wg.Go(func() {
			if err := s.Put(d, bytes.NewReader(data)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got, err := s.Read(d, 3<<20)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatal(len(got), err)
	}
	if names := files(t, dir); len(names) != 1 || names[0] != d.Hex() {
		t.Fatalf("directory holds %v", names)
	}
	if err := s.Put(d, iotest.ErrReader(errors.New("read"))); err != nil {
		t.Fatalf("content that is there was read again: %v", err)
	}
}

func TestAFailedPutLeavesNothing(t *testing.T) {
	s, dir := newStore(t, 1000)
	good := Digest(sha256.Sum256([]byte("good")))
	for _, tc := range []struct {
		name string
		r    io.Reader
		code string
	}{
		{"other content", strings.NewReader("evil"), "digest_mismatch"},
		{"truncated content", strings.NewReader("goo"), "digest_mismatch"},
		{"endless content", iotest.DataErrReader(io.LimitReader(zero{}, 1<<30)), "blob_too_large"},
		{"sender that dies", io.MultiReader(strings.NewReader("go"), iotest.ErrReader(io.ErrUnexpectedEOF)), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := s.Put(good, tc.r); err == nil || fault.Code(err) != tc.code {
				t.Fatalf("code %q: %v", fault.Code(err), err)
			}
			if s.Has(good) || len(files(t, dir)) != 0 {
				t.Fatalf("left %v", files(t, dir))
			}
		})
	}
}

type zero struct{}

func (zero) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestReserveIsKept(t *testing.T) {
	s, err := Open(t.TempDir(), 1000, 1<<62)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(Digest{}, strings.NewReader("x")); fault.Code(err) != "disk_full" || fault.Fix(err) == "" {
		t.Fatal(err)
	}
}

func TestOpenRemovesUnfinishedWrites(t *testing.T) {
	root := t.TempDir()
	s, err := Open(root, 1000, 0)
	if err != nil {
		t.Fatal(err)
	}
	data := []byte("kept")
	if err := s.Put(sha256.Sum256(data), bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(root, "sha256", ".tmp-half"), []byte("x"), 0o600)
	if _, err := Open(root, 1000, 0); err != nil {
		t.Fatal(err)
	}
	if names := files(t, filepath.Join(root, "sha256")); len(names) != 1 || !s.Has(sha256.Sum256(data)) {
		t.Fatalf("directory holds %v", names)
	}
}

func TestDigests(t *testing.T) {
	good := "sha256:" + strings.Repeat("ab", 32)
	if d, err := ParseDigest(good); err != nil || d.String() != good {
		t.Fatal(d, err)
	}
	for _, bad := range []string{"", "sha256:", strings.Repeat("ab", 32), "sha512:" + strings.Repeat("ab", 32),
		"sha256:" + strings.Repeat("AB", 32), "sha256:" + strings.Repeat("zz", 32), good + "00",
		"sha256:" + strings.Repeat("../", 21) + "a"} {
		if _, err := ParseDigest(bad); fault.Code(err) != "digest_malformed" {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestHTTP(t *testing.T) {
	s, dir := newStore(t, 1000)
	srv := httptest.NewServer(s.Handler(func(w http.ResponseWriter, status int, err error) {
		http.Error(w, fault.Code(err), status)
	}))
	defer srv.Close()
	do := func(method, path, body string, header ...string) (int, string) {
		t.Helper()
		req, _ := http.NewRequest(method, srv.URL+path, strings.NewReader(body))
		for i := 0; i+1 < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, strings.TrimSpace(string(b))
	}
	d := Digest(sha256.Sum256([]byte("content")))
	path := "/blobs/sha256/" + d.Hex()
	for _, tc := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"HEAD", path, "", 404, ""},
		{"GET", path, "", 404, "blob_missing"},
		{"PUT", path, "other", 400, "digest_mismatch"},
		{"PUT", path, strings.Repeat("x", 2000), 413, "blob_too_large"},
		{"GET", "/blobs/sha256/../../etc/passwd", "", 400, "digest_malformed"},
		{"GET", "/blobs/sha256/" + strings.ToUpper(d.Hex()), "", 400, "digest_malformed"},
		{"DELETE", path, "", 405, "method_not_allowed"},
		{"PUT", path, "content", 201, ""},
		{"PUT", path, "content", 200, ""},
		{"HEAD", path, "", 200, ""},
		{"GET", path, "", 200, "content"},
	} {
		if status, body := do(tc.method, tc.path, tc.body); status != tc.status || body != tc.want {
			t.Errorf("%s %s: %d %q, want %d %q", tc.method, tc.path, status, body, tc.status, tc.want)
		}
	}
	if status, body := do("GET", path, "", "Range", "bytes=1-3"); status != 206 || body != "ont" {
		t.Errorf("range: %d %q", status, body)
	}
	if n := len(files(t, dir)); n != 1 {
		t.Errorf("%d files", n)
	}
}
