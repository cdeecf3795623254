// SPDX-License-Identifier: Apache-2.0

package userdir_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/dstack-go/dstack/collateral/internal/userdir"
	"github.com/dstack-go/dstack/internal/fault"
)

func TestOpenMakesAPrivateDirectoryOrRefuses(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "a", "b")
	for range 2 {
		if got, err := userdir.Open(dir); err != nil || got != dir {
			t.Fatalf("%s, %v", got, err)
		}
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	for _, mode := range []os.FileMode{0o755, 0o770, 0o701} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := userdir.Open(dir); fault.Code(err) != "store_unsafe" {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := userdir.Open(file); fault.Code(err) != "store_unreadable" {
		t.Errorf("a file: %v", err)
	}
	if os.Geteuid() == 0 {
		other := filepath.Join(base, "other")
		if err := os.Mkdir(other, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(other, 1234, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := userdir.Open(other); fault.Code(err) != "store_unsafe" {
			t.Errorf("another's directory: %v", err)
		}
	}
}
