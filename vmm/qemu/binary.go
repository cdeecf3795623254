// SPDX-License-Identifier: Apache-2.0

// Package qemu knows QEMU: which binary, which accelerator really works, and the
// argument list for one VM.
//
// Guarantees: arguments are a list, never a shell line; every value that varies
// is passed where QEMU does not parse it further, or as JSON, or is checked to
// hold no separator (threats.md L02); an accelerator is used only after a guest
// was seen to run under it; each refusal has a code and a fix.
//
// Trusted: the binary named in the configuration. Not trusted: what its guests do.
package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/vmm/qmp"
)

// Version is QEMU's version.
type Version struct{ Major, Minor, Micro int }

// String returns "X.Y.Z", the form that vm_config carries.
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// Before reports whether v is older than major.minor.
func (v Version) Before(major, minor int) bool {
	return v.Major < major || v.Major == major && v.Minor < minor
}

// ParseVersion finds the version in what `qemu --version` prints: the word after
// "version" in the first line, cut at "+" and "-" (spec vmm.md §15).
func ParseVersion(output string) (v Version, err error) {
	line, _, _ := strings.Cut(output, "\n")
	words := strings.Fields(line)
	for i, w := range words {
		if w != "version" || i+1 == len(words) {
			continue
		}
		text := words[i+1]
		if cut := strings.IndexAny(text, "+-"); cut >= 0 {
			text = text[:cut]
		}
		parts := strings.Split(text, ".")
		if len(parts) != 3 {
			break
		}
		for j, p := range []*int{&v.Major, &v.Minor, &v.Micro} {
			n, err := strconv.ParseUint(parts[j], 10, 16)
			if err != nil {
				return Version{}, fmt.Errorf("no version in %.80q", line)
			}
			*p = int(n)
		}
		return v, nil
	}
	return Version{}, fmt.Errorf("no version in %.80q", line)
}

// Binary is an installed QEMU.
type Binary struct {
	Path    string
	Version Version
	// Machine is the versioned name behind "q35", such as pc-q35-10.0. A VM keeps
	// the one it was first started with, so that its shape, which is measured,
	// does not change with an upgrade of QEMU.
	Machine string
	// TDX says that it has the tdx-guest object.
	TDX bool
}

const installFix = "install QEMU 10 or later (Debian 13: apt-get install qemu-system-x86; Debian 12: add bookworm-backports and apt-get install -t bookworm-backports qemu-system-x86), or set cvm.qemu_path"

// Find looks path up (empty: qemu-system-x86_64 in PATH) and asks it what it is.
//
// Codes: qemu_missing, qemu_unusable.
func Find(ctx context.Context, path string) (*Binary, error) {
	name := path
	if name == "" {
		name = "qemu-system-x86_64"
	}
	full, err := exec.LookPath(name)
	if err != nil {
		return nil, fault.Wrap(err, "qemu_missing", "QEMU was not found").WithFix(installFix)
	}
	if full, err = filepath.Abs(full); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, full, "--version").Output()
	if err != nil {
		return nil, fault.Wrap(err, "qemu_unusable", "%s --version", full).WithFix(installFix)
	}
	b := &Binary{Path: full}
	if b.Version, err = ParseVersion(string(out)); err != nil {
		return nil, fault.Wrap(err, "qemu_unusable", "%s --version", full).WithFix(installFix)
	}
	if err := b.inspect(ctx); err != nil {
		return nil, fault.Wrap(err, "qemu_unusable", "ask %s what it can do", full).WithFix(installFix)
	}
	return b, nil
}

// inspect starts QEMU without a machine and asks over QMP.
func (b *Binary) inspect(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "dstack-qemu-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	cmd := exec.CommandContext(ctx, b.Path, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
		"-sandbox", sandbox, "-qmp", "unix:qmp.sock,server=on,wait=off")
	cmd.Dir = dir
	stderr := &tail{}
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	defer func() { cmd.Process.Kill(); <-exited }()
	var c *qmp.Client
	for {
		if c, err = qmp.Dial(ctx, filepath.Join(dir, "qmp.sock")); err == nil {
			break
		}
		select {
		case <-exited:
			return fmt.Errorf("it ended at once: %s", stderr)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	defer c.Close()
	var machines []struct{ Name, Alias string }
	if err := c.Execute(ctx, "query-machines", nil, &machines); err != nil {
		return err
	}
	for _, m := range machines {
		if m.Alias == "q35" {
			b.Machine = m.Name
		}
	}
	if b.Machine == "" {
		return errors.New("it has no machine type q35")
	}
	var types []struct{ Name string }
	if err := c.Execute(ctx, "qom-list-types", map[string]string{"implements": "tdx-guest"}, &types); err == nil {
		b.TDX = len(types) > 0
	}
	return c.Execute(ctx, "quit", nil, nil)
}

// minTCG is the oldest QEMU whose emulator runs the guest kernel reliably.
const minTCG = 10

// Check refuses a QEMU that is too old for an accelerator.
//
// QEMU 7.2 corrupts memory of kernels from 6.12 under TCG; 8 and 9 were not
// tried. Code: qemu_too_old.
func (b *Binary) Check(accel Accel) error {
	if accel == TCG && b.Version.Before(minTCG, 0) {
		return fault.New("qemu_too_old", "%s is QEMU %s; emulation without KVM needs version %d", b.Path, b.Version, minTCG).WithFix(installFix)
	}
	if b.Version.Before(8, 0) {
		return fault.New("qemu_too_old", "%s is QEMU %s; at least version 8 is needed", b.Path, b.Version).WithFix(installFix)
	}
	return nil
}

// tail keeps the end of what a process printed.
type tail struct{ buf []byte }

const maxTail = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - maxTail; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return string(bytes.TrimSpace(t.buf)) }
