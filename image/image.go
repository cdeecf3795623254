// SPDX-License-Identifier: Apache-2.0

// Package image builds dstack-os: the kernel, the initramfs with our first
// process, the verity-protected root with the container engine, and the release
// directory that names all of it by one hash (guest-os.md §2).
//
// Guarantees: every input is pinned by SHA-256 in recipe/lock.json (Debian
// packages, kernel source, firmware) or in engine/go.sum and go.sum (Go
// modules); the same inputs and the same tools give the same bytes, whatever
// the directory, umask, time zone, locale or user; nothing outside the committed
// file list of the flavour gets into the root; a release directory appears whole
// or not at all.
//
// It trusts the host it runs on (compiler, linker, mksquashfs), whose versions
// the lock records, and apt's signature check for new locks only. Package files
// from a mirror are hostile until their hash matches the lock.
//
// Steps are cached by the content of their inputs, outside the checkout.
package image

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage"
)

// The flavours of the image, from one recipe. The flavour is part of the
// measured metadata.
const (
	// Prod runs in a real TEE only.
	Prod = "prod"
	// Sim is Prod plus exactly the driver of the simulated TEE.
	Sim = "sim"
	// Debug is Sim plus a shell.
	Debug = "debug"
)

// Options says what to build and where. The zero value builds a sim image from
// the checkout around the working directory into the cache.
type Options struct {
	// Flavour is prod, sim or debug; sim if empty.
	Flavour string
	// Kernel is KernelOwn or KernelDistribution; KernelOwn if empty.
	Kernel string
	// Source is the root of the checkout that holds image/recipe, image/engine
	// and the guest; found at or above the working directory if empty.
	Source string
	// Out is the directory that gets the release directory
	// dstack-<flavour>-<version>, or dstack-<flavour>-distribution-<version> with
	// that kernel; <cache>/out if empty.
	Out string
	// Cache holds downloads and built parts; $DSTACK_CACHE, else
	// ~/.cache/dstack, if empty.
	Cache string
	// Log receives the steps with their times; nothing is written if nil.
	Log io.Writer
	// Guest is the import path, within Source, of the first process;
	// ./cmd/dstack-guest if empty.
	Guest string
	// Revision is recorded as git_revision. It is empty by default, since the
	// hash of an image should change with its content only.
	Revision string
	// UpdateFileList rewrites the committed file list of the flavour instead of
	// refusing a difference.
	UpdateFileList bool

	// What Check varies; see variation.
	vary variation
}

// Result is a finished image.
type Result struct {
	Dir             string           // the release directory
	Hash            dstack.ImageHash // os_image_hash
	CompressedBytes int64            // of the files a host needs to boot it
	Elapsed         time.Duration
	Cold            bool // whether the kernel or the engine was built
	Steps           []Step
}

// Step is one part of a build.
type Step struct {
	Name    string
	Cached  bool
	Elapsed time.Duration
}

// Build builds an image, or assembles it from cached parts.
func Build(ctx context.Context, opt Options) (*Result, error) {
	b, err := newBuild(opt)
	if err != nil {
		return nil, err
	}
	release, err := b.cache.lock(ctx, b.logf)
	if err != nil {
		return nil, err
	}
	defer release()
	return b.run(ctx)
}

// build is one build under way.
type build struct {
	Options
	cache cache
	lock  *LockFile
	tools Tools
	began time.Time
	steps []Step
	cold  bool
	// sources gives apt's sources; tests put a mirror of their own here.
	sources func(suites []string) (string, error)
}

func newBuild(opt Options) (*build, error) {
	b := &build{Options: opt, began: time.Now(), sources: hostSources}
	if b.Flavour == "" {
		b.Flavour = Sim
	}
	if b.Flavour != Prod && b.Flavour != Sim && b.Flavour != Debug {
		return nil, fault.New("image_flavour", "%q is not a flavour of the image", b.Flavour).WithFix("use prod, sim or debug")
	}
	if b.Kernel == "" {
		b.Kernel = KernelOwn
	}
	if b.Kernel != KernelOwn && b.Kernel != KernelDistribution {
		return nil, fault.New("image_kernel", "%q is no kernel of the image", b.Kernel).WithFix("use own or distribution")
	}
	if b.Log == nil {
		b.Log = io.Discard
	}
	if b.Guest == "" {
		b.Guest = "./cmd/dstack-guest"
	}
	var err error
	if b.Source, err = findSource(b.Source); err != nil {
		return nil, err
	}
	if b.cache, err = openCache(b.Cache); err != nil {
		return nil, err
	}
	if b.Out == "" {
		b.Out = filepath.Join(string(b.cache), "out")
	}
	if b.Out, err = filepath.Abs(b.Out); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *build) run(ctx context.Context) (*Result, error) {
	if err := checkTools(); err != nil {
		return nil, err
	}
	var err error
	if b.lock, err = ReadLock(b.lockPath()); err != nil {
		return nil, err
	}
	if err := b.compareTools(ctx); err != nil {
		return nil, err
	}

	var a artifacts
	for _, s := range []struct {
		name string
		run  func(context.Context, *artifacts) (cached bool, err error)
	}{
		{"packages", b.fetch},
		{"kernel", b.kernel},
		{"engine", b.engine},
		{"guest", b.guest},
		{"initramfs", b.initramfs},
		{"unpack", b.unpack},
		{"scripts", b.scripts},
		{"root", b.root},
		{"firmware", b.firmware},
		{"release", b.release},
	} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		start := time.Now()
		cached, err := s.run(ctx, &a)
		if err != nil {
			return nil, fmt.Errorf("image: %s: %w", s.name, err)
		}
		step := Step{s.name, cached, time.Since(start)}
		b.steps = append(b.steps, step)
		how := "built "
		if cached {
			how = "cached"
		}
		b.logf("image: %-10s %s %7.1fs", s.name, how, step.Elapsed.Seconds())
		if !cached && (s.name == "kernel" || s.name == "engine") {
			b.cold = true
		}
	}

	// What was written is read back by the very reader the rest of the house uses.
	img, err := osimage.Load(a.dir)
	if err != nil {
		return nil, fmt.Errorf("image: the finished release does not load: %w", err)
	}
	res := &Result{Dir: a.dir, Hash: img.Hash, CompressedBytes: a.compressed, Elapsed: time.Since(b.began), Cold: b.cold, Steps: b.steps}
	temperature := "warm"
	if res.Cold {
		temperature = "cold"
	}
	b.logf("image: %s", res.Dir)
	b.logf("image: os_image_hash %s", res.Hash)
	b.logf("image: root %.1f MB, scripts layer %.1f MB", float64(img.RootSize)/1e6, float64(img.Scripts.Size)/1e6)
	b.logf("image: %.1f MB compressed (aim 120), %s build in %.1fs (aim %s)",
		float64(res.CompressedBytes)/1e6, temperature, res.Elapsed.Seconds(), map[bool]string{true: "1500", false: "60"}[res.Cold])
	return res, nil
}

// artifacts is what the steps hand to one another.
type artifacts struct {
	kernel, firmware, initramfs []byte
	engine, shim, guest         string   // paths
	early, late                 []module // of the distribution's kernel: in the initramfs, in the root
	pool                        *pool
	scripts, rootfs             layer
	dir                         string
	compressed                  int64
}

func (b *build) logf(format string, args ...any) {
	fmt.Fprintf(b.Log, format+"\n", args...)
}

// recipe returns the path of a file of the recipe.
func (b *build) recipe(name string) string {
	return filepath.Join(b.Source, "image", "recipe", name)
}

func (b *build) lockPath() string { return b.recipe("lock.json") }

// devImage reports whether the flavour is for development.
func devImage(flavour string) bool { return flavour != Prod }

func findSource(dir string) (string, error) {
	given := dir != ""
	if !given {
		var err error
		if dir, err = os.Getwd(); err != nil {
			return "", err
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for at := dir; ; at = filepath.Dir(at) {
		data, err := os.ReadFile(filepath.Join(at, "go.mod"))
		if err == nil && strings.HasPrefix(string(data), "module github.com/dstack-go/dstack\n") {
			return at, nil
		}
		if given || at == filepath.Dir(at) {
			return "", fault.New("source_missing", "%s is not a checkout of dstack, which the image is built from", dir).
				WithFix("run the command in a checkout, or name one with --source")
		}
	}
}
