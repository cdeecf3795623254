// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/process"
	"github.com/dstack-go/dstack/measure"
)

var sealedByTPM = strings.Replace(keyed, "local", "tpm", 1)

func TestSoftwareTPMLivesWithItsVM(t *testing.T) {
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("SKIP: no swtpm on this machine (scripts/host-packages.sh installs it)")
	}
	w := newWorld(t, bootDisk(t, "up\r\n", codeHalt)).open()
	req := request()
	req.ComposeFile = sealedByTPM
	id := w.mustCreate(req)
	tpm := func() *process.ID {
		t.Helper()
		p, err := tpmSlot(w.dir(id)).Holder()
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	first := tpm()
	if first == nil {
		t.Fatal("no software TPM runs")
	}
	if c := w.info(id).Configuration; c.Tpm == nil || !*c.Tpm {
		t.Error("the configuration does not tell")
	}
	// Whoever verifies is told that the ACPI tables have another shape.
	sys, err := hostshare.ParseSysConfig(w.files(id)[hostshare.SysConfigName])
	if err != nil {
		t.Fatal(err)
	}
	if vc, err := measure.ParseVMConfig([]byte(sys.VMConfig)); err != nil || !vc.SWTPM {
		t.Errorf("%+v %v", vc, err)
	} else if _, err := vc.Shape(); fault.Code(err) != "acpi_shape_unsupported" {
		t.Error(err)
	}
	state := filepath.Join(w.dir(id), tpmState)
	w.until("the TPM keeps state", func() bool { e, _ := os.ReadDir(state); return len(e) > 0 })
	mark := filepath.Join(state, "mark")
	os.WriteFile(mark, nil, 0o600)

	// It outlives the VMM, and is stopped with its VM by another one.
	w.close()
	if !first.Running() {
		t.Fatal("the TPM ended with the VMM")
	}
	w.open()
	w.untilStatus(id, "running")
	if p := tpm(); p == nil || *p != *first {
		t.Fatal("another TPM")
	}
	w.must("StopVm", id)
	w.wantStopped(id)
	if first.Running() || tpm() != nil {
		t.Fatal("the TPM outlives its VM")
	}
	w.must("StartVm", id)
	second := tpm()
	if second == nil || *second == *first {
		t.Fatal("the TPM was not switched off and on")
	}
	if _, err := os.Stat(mark); err != nil {
		t.Error("its state is lost")
	}

	// QEMU ends while no VMM runs: the TPM ends by itself.
	w.close()
	q, _ := w.holders(id)
	q.Signal(syscall.SIGKILL)
	w.until("the TPM ends with QEMU", func() bool { return !second.Running() })
	w.open()
	w.untilStatus(id, "exited")
	w.must("StartVm", id)
	w.must("RemoveVm", id)
	w.until("gone", func() bool { return w.info(id) == nil })
	if s := w.strays(); len(s) != 0 || len(w.dirs()) != 0 {
		t.Fatalf("left %v %v", s, w.dirs())
	}
}

// A VMM that was killed between the start of the TPM and that of QEMU.
func TestOrphanedTPMIsStopped(t *testing.T) {
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("SKIP: no swtpm on this machine (scripts/host-packages.sh installs it)")
	}
	w := newWorld(t, bootDisk(t, "up\r\n", codeHalt)).open()
	req := request()
	req.ComposeFile, req.Stopped = sealedByTPM, true
	id := w.mustCreate(req)
	if err := w.server.vms[id].ensureTPM(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	p, err := tpmSlot(w.dir(id)).Holder()
	if err != nil || p == nil {
		t.Fatal(p, err)
	}
	w.close()
	w.open()
	w.until("the orphan ended", func() bool { return !p.Running() })
	w.must("StartVm", id)
}

func TestSoftwareTPMIsForDevelopmentOnly(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt))
	w.config.CVM.SWTPM = "/nonexistent/swtpm"
	w.open()
	req := request()
	req.NoTee, req.Tpm, req.Stopped = true, ptr(true), true
	if _, err := w.create(req); fault.Code(err) != "tpm_untrusted" || fault.Fix(err) == "" {
		t.Error(err)
	}
	// Without a simulated TEE the manifest alone brings none.
	req.Tpm, req.ComposeFile = nil, sealedByTPM
	id := w.mustCreate(req)
	if w.server.vms[id].spec().TPM {
		t.Error("a software TPM without a simulated TEE")
	}
	req.NoTee = false
	if _, err := w.create(req); fault.Code(err) != "swtpm_missing" || fault.Fix(err) == "" {
		t.Error(err)
	}
	// An update that brings one, and one that takes it away.
	w.close()
	w.config.CVM.SWTPM = os.Args[0]
	w.open()
	req.ComposeFile = compose
	id = w.mustCreate(req)
	for _, tc := range []struct {
		text string
		want bool
	}{{sealedByTPM, true}, {keyed, false}} {
		if _, err := w.update(&vmmpb.UpdateVmRequest{Id: id, ComposeFile: tc.text}); err != nil {
			t.Fatal(err)
		}
		if has := w.server.vms[id].spec().TPM; has != tc.want {
			t.Errorf("TPM %v", has)
		}
	}
}
