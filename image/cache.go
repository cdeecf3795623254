// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// builderVersion is part of every cache key: raise it when a step starts to
// make other bytes from the same inputs.
const builderVersion = 1

// cache is the directory of downloads and built parts. A part is a directory
// named by the hash of all its inputs; it is filled under another name and
// renamed when whole, so that it is either absent or complete.
type cache string

func openCache(dir string) (cache, error) {
	if dir == "" {
		dir = os.Getenv("DSTACK_CACHE")
	}
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return "", fault.Wrap(err, "cache_missing", "no place for the build cache").WithFix("set DSTACK_CACHE to a directory")
		}
		dir = filepath.Join(base, "dstack")
	}
	dir, err := filepath.Abs(filepath.Join(dir, "image"))
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fault.Wrap(err, "cache_missing", "make the build cache").WithFix("set DSTACK_CACHE to a directory you may write to")
	}
	return cache(dir), nil
}

// lock waits until no other build uses the cache.
func (c cache) lock(ctx context.Context, logf func(string, ...any)) (release func(), err error) {
	f, err := os.OpenFile(filepath.Join(string(c), "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for told := false; ; told = true {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock the build cache %s: %w", c, err)
		}
		if !told {
			logf("image: another build uses %s; waiting for it", c)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// key hashes the inputs of a part.
func key(inputs any) string {
	data, err := json.Marshal(struct {
		Builder int
		Inputs  any
	}{builderVersion, inputs})
	if err != nil {
		panic(err) // inputs are our own plain structs
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// part returns the directory of a part, which fill makes when it is absent.
// fill gets an empty directory; whatever it leaves there is the part.
func (c cache) part(kind, key string, fill func(dir string) error) (dir string, cached bool, err error) {
	dir = filepath.Join(string(c), kind, key)
	if _, err := os.Stat(dir); err == nil {
		now := time.Now()
		os.Chtimes(dir, now, now) // for whoever cleans the cache by age
		return dir, true, nil
	}
	work, err := c.scratch(kind)
	if err != nil {
		return "", false, err
	}
	defer os.RemoveAll(work)
	if err := fill(work); err != nil {
		return "", false, diskFull(err)
	}
	if err := os.Chmod(work, 0o755); err != nil {
		return "", false, err
	}
	if err := os.Rename(work, dir); err != nil {
		return "", false, err
	}
	return dir, false, nil
}

// scratch makes a directory for work under way. Leftovers of builds that died
// are removed: the cache is locked, so they belong to nobody.
func (c cache) scratch(kind string) (string, error) {
	base := filepath.Join(string(c), kind)
	if err := os.MkdirAll(base, 0o755); err != nil {
		return "", diskFull(err)
	}
	old, _ := filepath.Glob(filepath.Join(base, "work-*"))
	for _, dir := range old {
		os.RemoveAll(dir)
	}
	return os.MkdirTemp(base, "work-")
}
