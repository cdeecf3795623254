// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/osimage"
	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
	"github.com/dstack-go/dstack/verifier"
)

func command(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

// verifyQuietly is verify for calls that may fail to reach the VM.
func verifyQuietly(t testing.TB, args ...string) (verdict, int) {
	t.Helper()
	r := dstack(t, append([]string{"--json", "verify"}, args...)...)
	var v verdict
	_ = json.Unmarshal([]byte(r.stdout), &v)
	return v, r.code
}

// killVMM ends the VMM as a crash would.
func killVMM(t testing.TB) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(shared.state, "vmm.pid"))
	if err != nil {
		t.Fatal(err)
	}
	var id struct {
		PID int `json:"pid"`
	}
	if err := json.Unmarshal(data, &id); err != nil {
		t.Fatal(err)
	}
	p, err := os.FindProcess(id.PID)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", id.PID))
		if err != nil || bytes.Contains(data, []byte(") Z ")) {
			return
		}
	}
	t.Fatal("the VMM survives SIGKILL")
}

// runtimeEvents returns the names of the runtime events of saved evidence.
func runtimeEvents(t testing.TB, path string) []string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	src, err := verifier.ParseSource(raw)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := container.Decode(src.Container)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range ev.EventLog {
		if e.IMR == 3 {
			names = append(names, e.Name)
		}
	}
	return names
}

// alteredImage puts a copy of the shared image into the stack in which edit has
// changed files, with its sums made consistent again: what a host would do.
func alteredImage(t *testing.T, name string, edit func(dir string)) string {
	t.Helper()
	dir := filepath.Join(shared.state, "images", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	entries, err := os.ReadDir(shared.imageDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(shared.imageDir(), e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, e.Name()), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	edit(dir)
	resum(t, dir)
	return name
}

// resum recomputes sha256sum.txt and digest.txt.
func resum(t *testing.T, dir string) {
	t.Helper()
	sums, err := os.ReadFile(filepath.Join(dir, "sha256sum.txt"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for _, line := range strings.Split(strings.TrimSpace(string(sums)), "\n") {
		file := strings.Fields(line)[1]
		data, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "%x  %s\n", sha256.Sum256(data), file)
	}
	digest := sha256.Sum256(out.Bytes())
	for file, data := range map[string][]byte{"sha256sum.txt": out.Bytes(), "digest.txt": []byte(hex.EncodeToString(digest[:]) + "\n")} {
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// flip inverts one bit of the byte at offset, from the end when negative.
func flip(t *testing.T, path string, offset int64) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if offset < 0 {
		offset += int64(len(data))
	}
	data[offset] ^= 1
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// create makes a VM that runs the shared app's manifest on an image.
func create(t *testing.T, name, image string, config func(*vmmpb.VmConfiguration)) (id, attestURL string) {
	t.Helper()
	app := helloApp(t)
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	vm := &vmmpb.VmConfiguration{
		Name: name, Image: image, ComposeFile: vmInfo(t, app.ID).Configuration.ComposeFile,
		Vcpu: 1, Memory: 1024, DiskSize: 10,
		Ports: []*vmmpb.PortMapping{{Protocol: "tcp", HostAddress: "127.0.0.1", HostPort: uint32(port), VmPort: 8090}},
	}
	if config != nil {
		config(vm)
	}
	var resp vmmpb.Id
	if err := vmm().Call(context.Background(), "CreateVm", vm, &resp); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dstack(t, "rm", "--force", resp.Id) })
	return resp.Id, fmt.Sprintf("https://127.0.0.1:%d", port)
}

// awaitEvidence waits until the agent answers.
func awaitEvidence(t *testing.T, id, url string, args ...string) (verdict, int) {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(300 * time.Millisecond) {
		v, exit := verifyQuietly(t, append([]string{url}, args...)...)
		if len(v.Findings) > 0 {
			return v, exit
		}
		info := vmInfo(t, id)
		if info.BootError != "" || info.Status == "exited" || time.Now().After(deadline) {
			t.Fatalf("no evidence: status %s, boot error %q\n%s", info.Status, info.BootError, console(t, id))
		}
	}
}

// awaitBootError waits until the VM gives up and returns its reason.
func awaitBootError(t *testing.T, id string) string {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); time.Sleep(300 * time.Millisecond) {
		info := vmInfo(t, id)
		if info.BootError != "" && info.Status != "running" {
			return info.BootError
		}
		if info.BootProgress == "done" {
			t.Fatalf("it booted\n%s", console(t, id))
		}
	}
	t.Fatalf("neither error nor end\n%s", console(t, id))
	return ""
}

// A byte that is hashed and not executed, in the kernel and in the initramfs: the VM
// boots, and each shows in a register of its own.
func TestAlteredKernelAndInitramfsBootAndAreRefused(t *testing.T) {
	image := alteredImage(t, "altered-boot", func(dir string) {
		// A byte of the PE header's padding: hashed by the firmware, never executed.
		flip(t, filepath.Join(dir, "bzImage"), paddingOffset(t, filepath.Join(dir, "bzImage")))
		// Bytes behind the archive's end are hashed, and ignored by the kernel
		// as long as they are zero padding; so lengthen the padding.
		f, err := os.OpenFile(filepath.Join(dir, "initramfs.cpio.gz"), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	})
	id, url := create(t, "altered-boot", image, nil)
	v, exit := awaitEvidence(t, id, url, "--lock", helloApp(t).Lock, "--dev-roots", shared.devRoots())
	wantRefused(t, v, exit, "rtmr1_mismatch")
	wantRefused(t, v, exit, "rtmr2_mismatch")
	wantRefused(t, v, exit, "image_hash_mismatch")
}

// paddingOffset finds a byte of the kernel that is hashed but neither executed
// nor read: the DOS stub's message in the first sector, or zero padding in it.
func paddingOffset(t *testing.T, path string) int64 {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The setup header ends before 0x290 and the second sector's code starts
	// later; bytes 0x02..0x3b of the DOS header are unused but for the PE offset
	// at 0x3c.
	if data[0] != 'M' || data[1] != 'Z' {
		t.Fatal("the kernel has no EFI stub")
	}
	return 0x10
}

func idMessage(id string) *vmmpb.Id { return &vmmpb.Id{Id: id} }

// growRoot lengthens the root's data by one block of zeros and builds a new tree:
// the same files under another root hash. The scripts layer stays as it is.
func growRoot(t *testing.T, dir string) (hash string, size int64) {
	t.Helper()
	img, err := osimage.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := os.Open(img.Rootfs())
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	parts, err := gpt.Find(disk)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, img.RootSize+verity.BlockSize)
	if _, err := io.ReadFull(io.NewSectionReader(disk, parts.Root.Start, img.RootSize), data[:img.RootSize]); err != nil {
		t.Fatal(err)
	}
	tree, root, err := verity.Tree(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	content := append(data, tree...)
	var out bytes.Buffer
	scripts := gpt.Content{Data: io.NewSectionReader(disk, parts.Scripts.Start, parts.Scripts.Size), Size: parts.Scripts.Size}
	if err := gpt.Write(&out, gpt.Content{Data: bytes.NewReader(content), Size: int64(len(content))}, scripts); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(img.Rootfs(), out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(root[:]), int64(len(data))
}

func TestAlteredRootAndCommandLineBootAndAreRefused(t *testing.T) {
	image := alteredImage(t, "altered-root-cmdline", func(dir string) {
		hash, size := growRoot(t, dir)
		path := filepath.Join(dir, "metadata.json")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data = regexp.MustCompile(`dstack\.rootfs_hash=[0-9a-f]{64}`).ReplaceAll(data, []byte("dstack.rootfs_hash="+hash))
		data = regexp.MustCompile(`dstack\.rootfs_size=\d+`).ReplaceAll(data, fmt.Appendf(nil, "dstack.rootfs_size=%d", size))
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	})
	id, url := create(t, "altered-root-cmdline", image, nil)
	v, exit := awaitEvidence(t, id, url, "--lock", helloApp(t).Lock, "--dev-roots", shared.devRoots())
	wantRefused(t, v, exit, "rtmr2_mismatch")
}

func TestAlteredRootAloneStopsInOpenRoot(t *testing.T) {
	image := alteredImage(t, "altered-root", func(dir string) {
		img, err := osimage.Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		disk, err := os.Open(img.Rootfs())
		if err != nil {
			t.Fatal(err)
		}
		parts, err := gpt.Find(disk)
		disk.Close()
		if err != nil {
			t.Fatal(err)
		}
		flip(t, img.Rootfs(), parts.Root.Start+8) // in the file system's superblock
	})
	id, _ := create(t, "altered-root", image, nil)
	reason := awaitBootError(t, id)
	log := console(t, id)
	if !strings.Contains(log, "phase open-root FAILED code=root_verity") {
		t.Fatalf("reason %q\n%s", reason, log)
	}
	for _, later := range []string{"tee", "read-blob", "launch-events"} {
		if strings.Contains(log, "phase "+later+" ok") {
			t.Errorf("phase %s ran on an altered root", later)
		}
	}
}
