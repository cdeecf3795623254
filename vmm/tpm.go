// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/vmm/qemu"
)

const tpmReadyIn = 10 * time.Second

// swtpm returns the path of the software TPM. Code: swtpm_missing.
func (s *Server) swtpm() (string, error) {
	path, err := exec.LookPath(s.config.CVM.SWTPM)
	if err != nil {
		return "", fault.Wrap(err, "swtpm_missing", "the software TPM was not found").
			WithFix("install it (apt-get install swtpm), or set cvm.swtpm_path")
	}
	return filepath.Abs(path)
}

// ensureTPM makes it so that a software TPM as just switched on waits for QEMU. It
// is a process of its own, keeps its state in the VM's directory over reboots, and
// ends when QEMU does. One that runs already was never met by a guest: each run
// ends it.
//
// Code: swtpm_failed.
func (v *vm) ensureTPM(ctx context.Context, run uint64) error {
	slot := tpmSlot(v.dir)
	holder, err := slot.Holder()
	if err != nil || holder != nil {
		return err
	}
	path, err := v.server.swtpm()
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(filepath.Join(v.dir, tpmState), 0o700); err != nil {
		return diskFull(err, "make the software TPM's directory")
	}
	sock := filepath.Join(v.dir, qemu.TPMSock)
	os.Remove(sock)
	// Its startup is a TPM2_Startup(CLEAR): the registers are those of a machine
	// just switched on.
	cmd, logFile, err := v.command(path, tpmLog, "socket", "--tpm2", "--tpmstate", "dir="+tpmState,
		"--ctrl", "type=unixio,path="+qemu.TPMSock+",mode=0600", "--terminate", "--flags", "not-need-init,startup-clear")
	if err != nil {
		return err
	}
	child, err := slot.Start(cmd, run)
	logFile.Close()
	if err != nil {
		return diskFull(err, "start the software TPM")
	}
	// It takes one client and ends after it, so its socket is only looked at.
	if err := v.await(ctx, child.ID, tpmReadyIn, func() bool {
		_, err := os.Lstat(sock)
		return err == nil
	}); err != nil {
		tail, _ := tailBytes(filepath.Join(v.dir, tpmLog), 1000)
		return fault.New("swtpm_failed", "the software TPM did not start (%v): %s", err, cut(strings.TrimSpace(string(tail)), 1000))
	}
	return nil
}

// stopTPM makes it so that no software TPM of this VM runs.
func (v *vm) stopTPM() error {
	id, err := tpmSlot(v.dir).Holder()
	if err != nil || id == nil {
		return err
	}
	if err := id.Stop(quitWait); err != nil {
		return fmt.Errorf("stop the software TPM: %w", err)
	}
	return nil
}
