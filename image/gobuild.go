// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// engineModules are the modules whose versions the engine reports.
var engineModules = map[string]string{
	"github.com/moby/moby/v2":             "github.com/moby/moby/v2/dockerversion.Version",
	"github.com/containerd/containerd/v2": "github.com/containerd/containerd/v2/version.Version",
	"github.com/docker/compose/v5":        "github.com/docker/compose/v5/internal.Version",
	"github.com/docker/cli":               "github.com/docker/cli/cli/version.Version",
}

// engine builds dockerd, docker-compose and docker (one binary, containerd in it) and
// the shim from the module image/engine and the modules that it pins, edited as
// engineEdits says.
func (b *build) engine(ctx context.Context, p *artifacts) (bool, error) {
	src := filepath.Join(b.Source, "image", "engine")
	inputs, err := goSources(src)
	if err != nil {
		return false, fault.Wrap(err, "source_missing", "read the engine's module")
	}
	mod, err := os.ReadFile(filepath.Join(src, "go.mod"))
	if err != nil {
		return false, fault.Wrap(err, "source_missing", "read the engine's module")
	}
	ldflags, err := engineFlags(string(mod))
	if err != nil {
		return false, err
	}
	k := key(struct {
		Inputs      []string
		Go, LDFlags string
		Edits       []edit
	}{inputs, b.tools.Go, ldflags, engineEdits})
	dir, cached, err := b.cache.part("engine", k, func(dir string) error {
		b.logf("image: building the container engine; this takes minutes, once")
		edited := filepath.Join(dir, "source")
		if err := b.editedSource(ctx, src, edited); err != nil {
			return err
		}
		if err := b.goBuild(ctx, edited, "./shim", filepath.Join(dir, "containerd-shim-runc-v2"), "", ldflags); err != nil {
			return err
		}
		if err := b.goBuild(ctx, edited, ".", filepath.Join(dir, "engine"), "", ldflags); err != nil {
			return err
		}
		return os.RemoveAll(edited)
	})
	p.engine, p.shim = filepath.Join(dir, "engine"), filepath.Join(dir, "containerd-shim-runc-v2")
	return cached, err
}

// engineFlags sets the version strings from go.mod, which is where they are pinned.
func engineFlags(mod string) (string, error) {
	var flags []string
	for module, variable := range engineModules {
		m := regexp.MustCompile(`(?m)^\s*(?:require )?` + regexp.QuoteMeta(module) + ` v(\S+)`).FindStringSubmatch(mod)
		if m == nil {
			return "", fmt.Errorf("image/engine/go.mod does not require %s", module)
		}
		flags = append(flags, fmt.Sprintf("-X %s=%s", variable, strings.TrimSuffix(m[1], "+incompatible")))
		if strings.HasSuffix(module, "/compose/v5") {
			flags = append(flags, "-X main.composeVersion="+m[1])
		}
		if strings.HasSuffix(module, "/moby/v2") {
			flags = append(flags, "-X github.com/moby/moby/v2/dockerversion.GitCommit=v"+m[1])
		}
	}
	sort.Strings(flags)
	return strings.Join(flags, " "), nil
}

// goSources lists the files a module is built from as "name hash".
func goSources(dir string) ([]string, error) {
	var out []string
	for _, pattern := range []string{"*.go", "*/*.go", "go.mod", "go.sum"} {
		names, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			sum, err := hashFile(name)
			if err != nil {
				return nil, err
			}
			rel, err := filepath.Rel(dir, name)
			if err != nil {
				return nil, err
			}
			out = append(out, rel+" "+sum)
		}
	}
	sort.Strings(out)
	return out, nil
}

// guest builds the first process. Go's own build cache makes this quick, so
// that it always runs.
func (b *build) guest(ctx context.Context, p *artifacts) (bool, error) {
	dir, err := b.cache.scratch("guest")
	if err != nil {
		return false, err
	}
	tags := ""
	if devImage(b.Flavour) {
		// The driver of the simulated TEE; without the tag it is not linked.
		tags = "dstack_sim"
	}
	p.guest = filepath.Join(dir, "dstack-guest")
	return false, b.goBuild(ctx, b.Source, b.Guest, p.guest, tags, "")
}

// goBuild builds a static program without anything of this host in it.
func (b *build) goBuild(ctx context.Context, dir, pkg, out, tags, ldflags string) error {
	args := []string{"build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-tags", tags, "-ldflags", strings.TrimSpace("-s -w -buildid= " + ldflags), "-o", out, pkg}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = buildEnv(b.vary.env)
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &errs, &errs
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return diskFullOutput(fault.Wrap(err, "go_build", "go build %s: %s", pkg, lastLines(errs.String(), 8)).
			WithFix("build it by hand in %s to see the whole output", dir))
	}
	return nil
}

// buildEnv is the environment of every program a build runs: the caller's, for
// proxies and caches, without what changes bytes, plus what is given.
func buildEnv(extra map[string]string) []string {
	set := map[string]string{
		"LC_ALL": "C", "TZ": "UTC",
		"CGO_ENABLED": "0", "GOOS": "linux", "GOARCH": "amd64", "GOAMD64": "v1", "GOFLAGS": "", "GOEXPERIMENT": "", "GOWORK": "off", "GOTOOLCHAIN": "local",
	}
	for k, v := range extra {
		set[k] = v
	}
	drop := map[string]bool{"SOURCE_DATE_EPOCH": true, "LANG": true, "LANGUAGE": true, "MAKEFLAGS": true, "MAKELEVEL": true, "MFLAGS": true, "CC": true, "CFLAGS": true,
		"LDFLAGS": true, "KCFLAGS": true, "ARCH": true, "CROSS_COMPILE": true, "KCONFIG_CONFIG": true, "O": true}
	var env []string
	for _, e := range os.Environ() {
		k, _, _ := strings.Cut(e, "=")
		if _, ok := set[k]; !ok && !drop[k] {
			env = append(env, e)
		}
	}
	for k, v := range set {
		env = append(env, k+"="+v)
	}
	sort.Strings(env)
	return env
}
