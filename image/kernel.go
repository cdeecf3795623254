// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// kernel makes the kernel of the image: the distribution's, or bzImage from the
// locked source package and the committed configuration: everything built in, no
// modules.
func (b *build) kernel(ctx context.Context, p *artifacts) (bool, error) {
	if b.Kernel == KernelDistribution {
		return b.distributionKernel(ctx, p)
	}
	src, err := b.lock.kernelSource()
	if err != nil {
		return false, err
	}
	config, err := os.ReadFile(b.recipe("kernel.config"))
	if err != nil {
		return false, fault.Wrap(err, "source_missing", "read the kernel configuration")
	}
	k := key(struct {
		Source, Config, GCC, LD string
	}{src.SHA256, string(config), b.tools.GCC, b.tools.LD})
	dir, cached, err := b.cache.part("kernel", k, func(dir string) error {
		b.logf("image: building the kernel from %s %s; this takes minutes, once", src.Name, src.Version)
		return b.buildKernel(ctx, src.Name, dir)
	})
	if err != nil {
		return false, err
	}
	p.kernel, err = os.ReadFile(filepath.Join(dir, "bzImage"))
	return cached, err
}

func (b *build) buildKernel(ctx context.Context, pkg, dir string) (err error) {
	work := filepath.Join(dir, b.vary.name("kernel"))
	if err := os.Mkdir(work, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(work)
	logFile, err := os.Create(filepath.Join(dir, "kernel.log"))
	if err != nil {
		return err
	}
	defer logFile.Close()

	if err := b.unpackKernel(ctx, pkg, work); err != nil {
		return err
	}
	trees, err := filepath.Glob(filepath.Join(work, "linux-source-*"))
	if err != nil || len(trees) != 1 {
		return fault.New("image_input_incomplete", "package %s does not unpack to one source tree", pkg)
	}
	tree := trees[0]

	// The kernel's scripts split paths at spaces; a checkout may lie at one with some.
	fragment, err := os.ReadFile(b.recipe("kernel.config"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tree, "dstack.config"), fragment, 0o644); err != nil {
		return err
	}

	env := map[string]string{
		"KBUILD_BUILD_TIMESTAMP": fmt.Sprintf("@%d", epoch), "KBUILD_BUILD_USER": "dstack", "KBUILD_BUILD_HOST": "dstack", "KBUILD_BUILD_VERSION": "1",
	}
	for k, v := range b.vary.env {
		env[k] = v
	}
	for _, argv := range [][]string{
		{"make", "tinyconfig"},
		{"scripts/kconfig/merge_config.sh", "-m", ".config", "dstack.config"},
		{"make", "olddefconfig"},
		nil, // compare
		{"make", fmt.Sprintf("-j%d", runtime.NumCPU()), "bzImage"},
	} {
		if argv == nil {
			if err := checkKernelConfig(b.recipe("kernel.config"), filepath.Join(tree, ".config")); err != nil {
				return err
			}
			continue
		}
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		if strings.HasPrefix(argv[0], "scripts/") {
			cmd.Path = filepath.Join(tree, argv[0])
		}
		cmd.Dir, cmd.Stdout, cmd.Stderr = tree, logFile, logFile
		cmd.Env = buildEnv(env)
		if err := cmd.Run(); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			data, _ := os.ReadFile(logFile.Name())
			return fault.Wrap(err, "kernel_build", "%s: %s", strings.Join(argv, " "), lastLines(string(data), 6)).
				WithFix("a missing header or tool is the usual cause: run scripts/host-packages.sh")
		}
	}
	for from, to := range map[string]string{"arch/x86/boot/bzImage": "bzImage", ".config": "config", "System.map": "System.map"} {
		if err := os.Rename(filepath.Join(tree, from), filepath.Join(dir, to)); err != nil {
			return err
		}
	}
	return nil
}

// unpackKernel finds the source archive within the package and hands it to tar,
// which with xz is several times faster than reading it here.
func (b *build) unpackKernel(ctx context.Context, pkg, dir string) error {
	f, err := b.openDeb(pkg)
	if err != nil {
		return err
	}
	defer f.Close()
	done := errors.New("found")
	err = debFiles(f, func(h *tar.Header, r io.Reader) error {
		if h.Typeflag != tar.TypeReg || path.Base(h.Name) != pkg+".tar.xz" {
			return nil
		}
		cmd := exec.CommandContext(ctx, "tar", "-xJf", "-", "-C", dir, "--no-same-owner")
		cmd.Stdin = r
		cmd.Env = buildEnv(b.vary.env)
		if out, err := cmd.CombinedOutput(); err != nil {
			return diskFullOutput(fmt.Errorf("unpack %s: %w: %s", h.Name, err, lastLines(string(out), 3)))
		}
		return done
	})
	if err == done {
		return nil
	}
	if err == nil {
		err = fault.New("image_input_incomplete", "package %s holds no %s.tar.xz", pkg, pkg)
	}
	return err
}

// checkKernelConfig refuses a configuration from which Kconfig dropped an option
// that the fragment asks for, as it silently does when a dependency is missing.
func checkKernelConfig(fragment, final string) error {
	want, err := os.ReadFile(fragment)
	if err != nil {
		return err
	}
	have, err := os.ReadFile(final)
	if err != nil {
		return err
	}
	lines := map[string]bool{}
	for l := range strings.Lines(string(have)) {
		lines[strings.TrimSpace(l)] = true
	}
	var lost []string
	for l := range strings.Lines(string(want)) {
		l = strings.TrimSpace(l)
		name, value, isSet := strings.Cut(l, "=")
		switch {
		case isSet && strings.HasPrefix(name, "CONFIG_") && value != "n" && !lines[l]:
			lost = append(lost, l)
		case isSet && strings.HasPrefix(name, "CONFIG_") && value == "n" && (lines[name+"=y"] || lines[name+"=m"]):
			lost = append(lost, l)
		case strings.HasPrefix(l, "# CONFIG_") && strings.HasSuffix(l, " is not set"):
			name := strings.TrimSuffix(strings.TrimPrefix(l, "# "), " is not set")
			if lines[name+"=y"] || lines[name+"=m"] {
				lost = append(lost, l)
			}
		}
	}
	if len(lost) != 0 {
		return fault.New("kernel_config", "this kernel does not take %s", strings.Join(lost, ", ")).WithFix("a dependency is missing or the option has gone: adapt image/recipe/kernel.config")
	}
	return nil
}

// diskFullOutput gives the error of a program that met a full disk its name.
func diskFullOutput(err error) error {
	if strings.Contains(err.Error(), "No space left on device") {
		return diskFull(errors.Join(errNoSpace, err))
	}
	return err
}
