// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// Accel is an accelerator as QEMU names it.
type Accel string

// The accelerators in use.
const (
	KVM Accel = "kvm"
	TCG Accel = "tcg"
)

// probe.bin is a boot sector assembled from probe.S.
//
//go:embed probe.bin
var probeSector []byte

// probeExit is QEMU's exit status when the sector ran to its end: isa-debug-exit
// yields (value << 1) | 1 and the sector writes 0x31.
const probeExit = 0x31<<1 | 1

// ProbeLimit is how long a probe may take. The guest needs 0.2 s under TCG.
const ProbeLimit = 3 * time.Second

// Probe boots a tiny guest under an accelerator: firmware, a virtio disk, long
// mode with paging, timer interrupts. That /dev/kvm exists and opens, and even
// that a few real-mode instructions run, was seen on machines where no guest gets
// past its firmware.
func (b *Binary) Probe(ctx context.Context, accel Accel) error {
	if accel == KVM {
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		f.Close()
	}
	dir, err := os.MkdirTemp("", "dstack-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	disk := make([]byte, 1<<20)
	copy(disk, probeSector)
	if err := os.WriteFile(filepath.Join(dir, "disk.img"), disk, 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, ProbeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.Path, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", b.Machine, "-accel", string(accel), "-cpu", b.cpu(accel), "-m", "64", "-sandbox", sandbox,
		"-blockdev", blockdev("probe", "disk.img", true),
		"-device", "virtio-blk-pci,drive=probe",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=4")
	cmd.Dir = dir
	stderr := &tail{}
	cmd.Stderr = stderr
	// The probe is the one QEMU that must not outlive this process.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("a test guest did not finish within %v", ProbeLimit)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == probeExit {
		return nil
	}
	return fmt.Errorf("a test guest did not run (%v): %s", err, stderr)
}

// Choice is the outcome of Choose.
type Choice struct {
	Accel Accel
	// WhyNotKVM is set when KVM was wanted and does not work.
	WhyNotKVM string
}

// Choose picks the accelerator: the wanted one, or for "auto" KVM if a guest
// runs under it and TCG otherwise. Codes: accel_unusable, qemu_too_old.
func Choose(ctx context.Context, b *Binary, want string) (Choice, error) {
	var c Choice
	switch want {
	case "auto", "":
		c.Accel = KVM
		if err := b.Probe(ctx, KVM); err != nil {
			c = Choice{TCG, err.Error()}
		}
	case string(KVM):
		c.Accel = KVM
		if err := b.Probe(ctx, KVM); err != nil {
			return c, fault.Wrap(err, "accel_unusable", "KVM does not work on this machine").
				WithFix("set cvm.accel to auto or tcg, or make /dev/kvm usable (load kvm_intel or kvm_amd; in a VM switch on nested virtualisation)")
		}
	case string(TCG):
		c.Accel = TCG
	default:
		return c, fault.New("accel_unusable", "unknown accelerator %q", want).WithFix("set cvm.accel to auto, kvm or tcg")
	}
	return c, b.Check(c.Accel)
}

// cpu returns the CPU model. Under TCG "max"; QEMU before 8.1 miscompiles
// cmpxchg16b, which recent kernels use in their allocator.
func (b *Binary) cpu(accel Accel) string {
	switch {
	case accel == KVM:
		return "host"
	case b.Version.Before(8, 1):
		return "max,-cx16"
	}
	return "max"
}

// blockdev returns a -blockdev argument in JSON, where a path needs no escape. A
// disk that is written has the host's page cache as its volatile write cache, and a
// flush of the guest is one to the host's medium (no-flush off), so that what a
// guest has flushed survives a power cut of the host as well.
func blockdev(node, file string, readOnly bool) string {
	type cache struct {
		Direct  bool `json:"direct"`
		NoFlush bool `json:"no-flush"`
	}
	type options struct {
		ReadOnly bool   `json:"read-only,omitempty"`
		Discard  string `json:"discard,omitempty"`
		Cache    *cache `json:"cache,omitempty"`
	}
	type fileNode struct {
		Driver   string `json:"driver"`
		Filename string `json:"filename"`
		options
	}
	o := options{ReadOnly: readOnly}
	if !readOnly {
		o.Discard, o.Cache = "unmap", &cache{}
	}
	b, err := json.Marshal(struct {
		Driver   string `json:"driver"`
		NodeName string `json:"node-name"`
		options
		File fileNode `json:"file"`
	}{"raw", node, o, fileNode{"file", file, o}})
	if err != nil { // strings and booleans always marshal
		return ""
	}
	return string(b)
}
