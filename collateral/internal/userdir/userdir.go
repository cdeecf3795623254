// SPDX-License-Identifier: Apache-2.0

// Package userdir makes directories that one user alone may look into and change.
//
// What lies in them is judged again when it is read, but another account that could
// write there could delete what we remember, or put old, still signed statements in
// its place (threats.md B03).
package userdir

import (
	"os"
	"path/filepath"
	"syscall"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Open makes dir with mode 0700, parents included, unless it is there, and returns
// its absolute path. A directory that others may enter, or that another owns, has
// the code store_unsafe; one that cannot be made, store_unreadable.
func Open(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err == nil {
		err = durable.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return "", fault.Wrap(err, "store_unreadable", "make %s", dir).WithFix("name a directory that you may write to")
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return "", fault.Wrap(err, "store_unreadable", "look at %s", dir)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return "", fault.New("store_unsafe", "%s belongs to user %d", dir, st.Uid).WithFix("name a directory of your own")
	}
	if perm := fi.Mode().Perm(); perm&0o077 != 0 {
		return "", fault.New("store_unsafe", "%s has mode %#o: others may look into it or change it", dir, perm).WithFix("chmod 700 %s", dir)
	}
	return dir, nil
}
