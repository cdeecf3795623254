// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/osimage"
)

// One cold boot of the production image through UEFI firmware with a software
// TPM, outside any TEE. It shows two things: a production guest stops with
// no_tee, and the firmware's own measurements of kernel, command line and initrd
// (PCR 4 and 9) are what package measure computes from the files.
func TestThreat_D03_ProductionImageStopsWithoutATEE(t *testing.T) {
	for _, tool := range []string{"swtpm"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: run scripts/host-packages.sh", tool)
		}
	}
	build := exec.Command(filepath.Join(shared.bin, "dstack"), "--state", shared.state, "--json", "image", "build", "prod")
	build.Dir = testkit.Root()
	var errs bytes.Buffer
	build.Stderr = &errs
	out, err := build.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, errs.String())
	}
	dir := regexp.MustCompile(`"dir": "(.*)"`).FindSubmatch(out)
	if dir == nil {
		t.Fatalf("no directory in %s", out)
	}
	img, err := osimage.Load(string(dir[1]))
	if err != nil {
		t.Fatal(err)
	}
	if img.Metadata.IsDev {
		t.Fatal("the production image says it is for development")
	}

	work, err := os.MkdirTemp("", "dstack-tpm-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(work)
	sock := filepath.Join(work, "tpm.sock")
	tpm := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+work, "--ctrl", "type=unixio,path="+sock, "--terminate", "--flags", "not-need-init,startup-clear")
	if err := tpm.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tpm.Process.Kill(); _ = tpm.Wait() }()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("swtpm made no socket")
		}
	}
	serial := filepath.Join(work, "serial.log")
	firmware := "/usr/share/OVMF/OVMF_CODE_4M.fd"
	vars := filepath.Join(work, "vars.fd")
	data, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
	if err != nil {
		t.Fatalf("%v: run scripts/host-packages.sh", err)
	}
	if err := os.WriteFile(vars, data, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu := exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35", "-accel", "tcg", "-cpu", "max",
		"-smp", "1", "-m", "1024M",
		"-drive", "if=pflash,format=raw,readonly=on,file="+firmware, "-drive", "if=pflash,format=raw,file="+vars,
		"-kernel", img.Kernel(), "-initrd", img.Initrd(), "-append", img.Metadata.Cmdline,
		"-chardev", "socket,id=chrtpm,path="+sock, "-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-crb,tpmdev=tpm0",
		"-drive", "file="+img.Rootfs()+",if=none,id=root,format=raw,readonly=on", "-device", "virtio-blk-pci,drive=root,serial=dstack-root",
		"-device", "virtio-rng-pci", "-chardev", "file,id=com0,path="+serial, "-serial", "chardev:com0")
	var qerr bytes.Buffer
	qemu.Stderr = &qerr
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- qemu.Wait() }()
	select {
	case <-ended:
	case <-time.After(120 * time.Second):
		_ = qemu.Process.Kill()
		<-ended
		text, _ := os.ReadFile(serial)
		t.Fatalf("it did not power off within 120 s\n%s\n%s", qerr.String(), text)
	}
	text, err := os.ReadFile(serial)
	if err != nil {
		t.Fatal(err)
	}
	log := strings.ReplaceAll(string(text), "\r", "")
	if !strings.Contains(log, "phase tee FAILED code=no_tee") {
		t.Fatalf("no no_tee on the console\n%s\n%s", qerr.String(), log)
	}
	for _, later := range []string{"read-blob", "data-disk", "engine"} {
		if strings.Contains(log, "phase "+later+" ") {
			t.Errorf("phase %s ran without a TEE", later)
		}
	}

	pcr := map[string]string{}
	for _, m := range regexp.MustCompile(`tpm pcr(\d+)=([0-9a-f]{64})`).FindAllStringSubmatch(log, -1) {
		pcr[m[1]] = m[2]
	}
	kernel, err := os.ReadFile(img.Kernel())
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := os.ReadFile(img.Initrd())
	if err != nil {
		t.Fatal(err)
	}
	// The firmware sees the kernel as QEMU patches it, and measures it when it is
	// loaded; action and separator follow when boot is about to begin. So PCR 4
	// witnesses the patch and the order of RTMR1 (measurement.md §5), too.
	patched, err := measure.PatchKernel(kernel, len(initrd), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	image, err := measure.AuthenticodeSHA256(patched)
	if err != nil {
		t.Fatal(err)
	}
	cmdline := measure.PCR9Cmdline(img.Metadata.Cmdline)
	ramdisk := measure.PCR9Initrd(initrd)
	action := sha256.Sum256([]byte("Calling EFI Application from Boot Option"))
	separator := sha256.Sum256(make([]byte, 4))
	if want := extend(image, action, separator); pcr["4"] != want {
		t.Errorf("PCR 4 is %s, computed %s", pcr["4"], want)
	}
	if want := extend(cmdline, ramdisk); pcr["9"] != want {
		t.Errorf("PCR 9 is %s, computed %s", pcr["9"], want)
	}
}

// extend replays digests into a SHA-256 PCR.
func extend(digests ...[32]byte) string {
	var reg [32]byte
	for _, d := range digests {
		reg = sha256.Sum256(append(reg[:], d[:]...))
	}
	return hex.EncodeToString(reg[:])
}
