// SPDX-License-Identifier: Apache-2.0

package durable

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestWriteFileReplacesContentAndSetsExactMode(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	for _, step := range []struct {
		data string
		perm fs.FileMode
	}{{"one", 0o600}, {"", 0o644}, {"three, longer than before", 0o666}} {
		if err := WriteFile(path, []byte(step.data), step.perm); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != step.data {
			t.Fatalf("read %q, %v; want %q", got, err, step.data)
		}
		fi, _ := os.Stat(path)
		if fi.Mode().Perm() != step.perm {
			t.Errorf("mode %v, want %v", fi.Mode().Perm(), step.perm)
		}
	}
	if got := names(t, dir); len(got) != 1 {
		t.Errorf("directory holds %v, want the target only", got)
	}
}

func TestWriteFileInCurrentDirectory(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := WriteFile("plain", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestWriteFileFailureKeepsOldContentAndNoLeftover(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "target")
	// A directory under the final name makes the rename fail, after all other steps.
	if err := os.MkdirAll(filepath.Join(path, "child"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("new"), 0o600); err == nil || !strings.Contains(err.Error(), path) {
		t.Fatalf("error %v, want one naming %s", err, path)
	}
	if got := names(t, dir); len(got) != 1 || got[0] != "target" {
		t.Errorf("directory holds %v after the failure", got)
	}
	if err := WriteFile(filepath.Join(dir, "absent", "f"), nil, 0o600); err == nil {
		t.Error("write below a missing directory succeeded")
	}
}

func TestWriteFileReplacesLinkInsteadOfFollowingIt(t *testing.T) {
	dir := t.TempDir()
	victim, link := filepath.Join(dir, "victim"), filepath.Join(dir, "link")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, link); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(link, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(victim); string(got) != "precious" {
		t.Errorf("the link's target was written: %q", got)
	}
}

func TestWriteFileSweepsOldLeftoversOnly(t *testing.T) {
	dir := t.TempDir()
	old, young := filepath.Join(dir, ".tmp-s[1]*-111"), filepath.Join(dir, ".tmp-s[1]*-222")
	other := filepath.Join(dir, ".tmp-s1-333")
	for _, p := range []string{old, young, other} {
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-2 * leftoverAge)
	for _, p := range []string{old, other} {
		if err := os.Chtimes(p, past, past); err != nil {
			t.Fatal(err)
		}
	}
	if err := WriteFile(filepath.Join(dir, "s[1]*"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(names(t, dir), " ")
	if want := ".tmp-s1-333 .tmp-s[1]*-222 s[1]*"; got != want {
		t.Errorf("directory holds %q, want %q", got, want)
	}
}

// Readers racing with writers see a whole version each time.
func TestWriteFileIsAtomicForReaders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	version := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i%26)}, 1+i*997%50000) }
	if err := WriteFile(path, version(0), 0o600); err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			for i := range 30 {
				if err := WriteFile(path, version(w*30+i), 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { writers.Wait(); close(done) }()
	for {
		got, err := os.ReadFile(path)
		if err != nil || len(got) == 0 || bytes.Count(got, got[:1]) != len(got) {
			t.Fatalf("reader saw a torn file: %d bytes, %v", len(got), err)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

func TestMkdirAll(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b", "c")
	for range 2 {
		if err := MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o700 {
		t.Fatalf("%v, %v", fi, err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{file, filepath.Join(file, "below")} {
		if err := MkdirAll(p, 0o700); err == nil {
			t.Errorf("MkdirAll(%s) succeeded over a file", p)
		}
	}
	t.Chdir(dir)
	if err := MkdirAll("rel/x", 0o700); err != nil {
		t.Error(err)
	}
}

func TestRemoveAll(t *testing.T) {
	dir := t.TempDir()
	tree := filepath.Join(dir, "vm")
	outside := filepath.Join(dir, "outside")
	if err := os.MkdirAll(filepath.Join(tree, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := os.WriteFile(filepath.Join(tree, "sub", fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(outside, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(tree, "link")); err != nil {
		t.Fatal(err)
	}
	// What a crash after the rename of an earlier call left.
	if err := os.MkdirAll(filepath.Join(dir, ".tmp-vm-1-gone", "deep"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := RemoveAll(tree); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(names(t, dir), " "); got != "outside" {
		t.Errorf("directory holds %q", got)
	}
	if !Leftover(".tmp-vm-1-gone") || Leftover("vm") {
		t.Error("Leftover does not tell leftovers from data")
	}
}
