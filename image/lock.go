// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"sort"
	"strings"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// LockFile is recipe/lock.json: every input of the image that is not a Go
// module, each by version and SHA-256, and the tools it was last built with.
type LockFile struct {
	Version  int       `json:"version"` // 1
	Suites   []string  `json:"suites"`
	Packages []Package `json:"packages"` // sorted by name
	Tools    Tools     `json:"tools"`
}

// Package is one pinned Debian package.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Arch    string `json:"arch"`
	Suite   string `json:"suite"`
	Size    int64  `json:"size"`
	SHA256  string `json:"sha256"`
}

// Tools are the programs of the host whose versions the bytes may depend on.
type Tools struct {
	Go         string `json:"go"`
	GCC        string `json:"gcc"`
	LD         string `json:"ld"`
	Mksquashfs string `json:"mksquashfs"`
}

const maxLock = 1 << 20

// Names and versions reach apt's argument list and file names, so that their
// alphabet is Debian policy's (§5.6.1, §5.6.12) and they cannot start with "-".
var (
	nameRE    = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{1,99}$`)
	versionRE = regexp.MustCompile(`^[0-9][A-Za-z0-9.+:~-]{0,99}$`)
	suiteRE   = regexp.MustCompile(`^[a-z][a-z0-9-]{1,49}$`)
)

// ReadLock reads and checks a lock file.
func ReadLock(path string) (*LockFile, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New("image_lock_missing", "%s does not exist", path).WithFix("run `dstack image lock`")
	}
	if err != nil {
		return nil, err
	}
	l, err := parseLock(data)
	if err != nil {
		return nil, fault.Wrap(err, "image_lock_malformed", "%s", path).WithFix("restore it from version control, or run `dstack image lock`")
	}
	return l, nil
}

func parseLock(data []byte) (*LockFile, error) {
	if len(data) > maxLock {
		return nil, fmt.Errorf("%d bytes; at most %d are allowed", len(data), maxLock)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var l LockFile
	if err := dec.Decode(&l); err != nil {
		return nil, err
	}
	if l.Version != 1 {
		return nil, fmt.Errorf("version %d; this program knows version 1", l.Version)
	}
	for _, s := range l.Suites {
		if !suiteRE.MatchString(s) {
			return nil, fmt.Errorf("suite %q", s)
		}
	}
	seen := map[string]bool{}
	for _, p := range l.Packages {
		sum, err := hex.DecodeString(p.SHA256)
		switch {
		case !nameRE.MatchString(p.Name), !versionRE.MatchString(p.Version), !nameRE.MatchString(p.Arch):
			return nil, fmt.Errorf("package %q version %q architecture %q", p.Name, p.Version, p.Arch)
		case err != nil || len(sum) != 32 || strings.ToLower(p.SHA256) != p.SHA256:
			return nil, fmt.Errorf("package %s: sha256 is not 64 lowercase hexadecimal digits", p.Name)
		case p.Size <= 0 || p.Size > 1<<30:
			return nil, fmt.Errorf("package %s: size %d", p.Name, p.Size)
		case seen[p.Name]:
			return nil, fmt.Errorf("package %s: twice", p.Name)
		}
		seen[p.Name] = true
	}
	return &l, nil
}

// Package returns a pinned package by name.
func (l *LockFile) Package(name string) (Package, error) {
	for _, p := range l.Packages {
		if p.Name == name {
			return p, nil
		}
	}
	return Package{}, fault.New("image_lock_incomplete", "the lock has no package %s", name).WithFix("run `dstack image lock`")
}

// kernelSource returns the pinned linux-source-X.Y package.
func (l *LockFile) kernelSource() (Package, error) {
	for _, p := range l.Packages {
		if kernelSourceRE.MatchString(p.Name) {
			return p, nil
		}
	}
	return Package{}, fault.New("image_lock_incomplete", "the lock has no kernel source package").WithFix("run `dstack image lock`")
}

func (l *LockFile) write(path string) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(l); err != nil {
		return err
	}
	return durable.WriteFile(path, b.Bytes(), 0o644)
}

// Lock refreshes the lock file from the mirrors that the host's apt is
// configured with, and returns one line per change. apt checks the archive's
// signatures.
func Lock(ctx context.Context, opt Options) ([]string, error) {
	b, err := newBuild(opt)
	if err != nil {
		return nil, err
	}
	release, err := b.cache.lock(ctx, b.logf)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := checkTools(); err != nil {
		return nil, err
	}
	return b.relock(ctx)
}

func (b *build) relock(ctx context.Context) ([]string, error) {
	apt, err := b.apt(lockSuites)
	if err != nil {
		return nil, err
	}
	if err := apt.update(ctx); err != nil {
		return nil, err
	}
	kernel, err := apt.newestKernelSource(ctx)
	if err != nil {
		return nil, err
	}
	next := &LockFile{Version: 1, Suites: lockSuites}
	if next.Tools, err = hostTools(ctx); err != nil {
		return nil, err
	}
	release, err := apt.newestDistributionKernel(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Concat([]string{kernel}, distributionPackages(release), debianPackages) {
		p, err := apt.candidate(ctx, name)
		if err != nil {
			return nil, err
		}
		next.Packages = append(next.Packages, p)
	}
	sort.Slice(next.Packages, func(i, j int) bool { return next.Packages[i].Name < next.Packages[j].Name })

	old, err := ReadLock(b.lockPath())
	if err != nil {
		if fault.Code(err) != "image_lock_missing" {
			return nil, err
		}
		old = &LockFile{}
	}
	changes := compareLocks(old, next)
	if err := next.write(b.lockPath()); err != nil {
		return nil, err
	}
	b.lock = next
	return changes, nil
}

func compareLocks(old, next *LockFile) []string {
	was := map[string]Package{}
	for _, p := range old.Packages {
		was[p.Name] = p
	}
	var lines []string
	for _, p := range next.Packages {
		q, ok := was[p.Name]
		delete(was, p.Name)
		switch {
		case !ok:
			lines = append(lines, fmt.Sprintf("%s %s added", p.Name, p.Version))
		case q.Version != p.Version:
			lines = append(lines, fmt.Sprintf("%s %s -> %s", p.Name, q.Version, p.Version))
		case q.SHA256 != p.SHA256:
			lines = append(lines, fmt.Sprintf("%s %s: other content, sha256 %s -> %s", p.Name, p.Version, q.SHA256, p.SHA256))
		}
	}
	for name := range was {
		lines = append(lines, name+" removed")
	}
	lines = append(lines, old.Tools.differences(next.Tools)...)
	sort.Strings(lines)
	return lines
}

func (t Tools) differences(now Tools) []string {
	var out []string
	for _, f := range []struct{ name, was, is string }{
		{"go", t.Go, now.Go}, {"gcc", t.GCC, now.GCC}, {"ld", t.LD, now.LD}, {"mksquashfs", t.Mksquashfs, now.Mksquashfs},
	} {
		if f.was != f.is {
			out = append(out, fmt.Sprintf("%s: %q -> %q", f.name, f.was, f.is))
		}
	}
	return out
}

// compareTools holds the host's tools against those of the lock. Another
// compiler makes another image, which is fine for development and not for prod.
func (b *build) compareTools(ctx context.Context) error {
	now, err := hostTools(ctx)
	if err != nil {
		return err
	}
	b.tools = now
	diff := b.lock.Tools.differences(now)
	if len(diff) == 0 {
		return nil
	}
	if b.Flavour == Prod {
		return fault.New("image_tools_differ", "the tools of this host are not those of the lock: %s", strings.Join(diff, "; ")).
			WithFix("build prod images on a host with the recorded tools, or run `dstack image lock` and review the change")
	}
	b.logf("image: NOTE: other tools than the lock records, so other bytes and another os_image_hash: %s", strings.Join(diff, "; "))
	return nil
}
