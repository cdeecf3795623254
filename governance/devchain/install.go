// SPDX-License-Identifier: Apache-2.0

package devchain

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// The node's version and the hashes of its packages.
//
//go:embed package.json package-lock.json
var lock embed.FS

// cacheDir is where the tools of all checkouts are: as scripts/contracts.sh has it.
func cacheDir() (string, error) {
	if dir := os.Getenv("DSTACK_CACHE"); dir != "" {
		return filepath.Join(dir, "devchain"), nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fault.Wrap(err, "cache_missing", "no place for the development chain's node").WithFix("set DSTACK_CACHE to a directory")
	}
	return filepath.Join(dir, "dstack", "devchain"), nil
}

// Install returns the path of the node, getting it from npm at the first use. Codes:
// npm_missing, devchain_install, cache_missing.
func Install(ctx context.Context, step func(string, ...any)) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	files := map[string][]byte{}
	for _, name := range []string{"package.json", "package-lock.json"} {
		text, err := lock.ReadFile(name)
		if err != nil {
			return "", err
		}
		files[name] = text
		sum.Write(text)
	}
	tools := filepath.Join(cache, "tools-"+hex.EncodeToString(sum.Sum(nil))[:16])
	if node, err := find(tools); err == nil {
		return node, nil
	}
	if err := durable.MkdirAll(cache, 0o755); err != nil {
		return "", fault.Wrap(err, "cache_missing", "make the cache %s", cache).WithFix("set DSTACK_CACHE to a directory you may write to")
	}
	// Two may install at once.
	guard, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", fault.Wrap(err, "cache_missing", "lock the cache %s", cache)
	}
	defer guard.Close()
	if err := syscall.Flock(int(guard.Fd()), syscall.LOCK_EX); err != nil {
		return "", fault.Wrap(err, "cache_missing", "lock the cache %s", cache)
	}
	if node, err := find(tools); err == nil {
		return node, nil
	}
	if _, err := exec.LookPath("npm"); err != nil {
		return "", fault.Wrap(err, "npm_missing", "the development chain's node comes from npm, which is not installed").WithFix("install nodejs and npm")
	}
	step("get the development chain's node from npm")
	fresh, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(fresh)
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(fresh, name), text, 0o644); err != nil {
			return "", err
		}
	}
	// Its install script would fetch a binary; the platform's package has it, and npm
	// checks that against the lock file.
	cmd := exec.CommandContext(ctx, "npm", "ci", "--prefix", fresh, "--ignore-scripts", "--no-audit", "--no-fund", "--silent")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fault.Wrap(err, "devchain_install", "npm: %s", strings.TrimSpace(string(out[:min(len(out), 2000)]))).WithFix("check that npm reaches its registry")
	}
	if _, err := find(fresh); err != nil {
		return "", fault.Wrap(err, "devchain_install", "there is no node for this platform")
	}
	if err := os.RemoveAll(tools); err != nil {
		return "", err
	}
	if err := os.Rename(fresh, tools); err != nil {
		return "", err
	}
	return find(tools)
}

// find returns the node's binary in a directory of tools.
func find(tools string) (string, error) {
	found, err := filepath.Glob(filepath.Join(tools, "node_modules", "@foundry-rs", "anvil-*", "bin", "anvil"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fs.ErrNotExist
	}
	return found[0], nil
}
