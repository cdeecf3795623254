// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/osimage"
)

type doctorCmd struct{}

// check is one thing that doctor looked at.
type check struct {
	Name   string `json:"name"`
	Level  string `json:"level"` // ok, note, problem
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"`
}

func (c *doctorCmd) Run(a *app) error {
	var checks []check
	add := func(name, level, detail, fix string) {
		checks = append(checks, check{name, level, detail, fix})
	}
	checkQEMU(add)
	checkTool(add, "mksquashfs", "needed to build OS images", "apt-get install squashfs-tools")
	checkTool(add, "gcc", "needed to build the kernel of OS images", "scripts/host-packages.sh")
	checkTool(add, "flex", "needed to build the kernel of OS images", "scripts/host-packages.sh")
	checkTool(add, "go", "needed to build OS images and dstack itself", "install Go 1.26 or newer")
	if path, err := exec.LookPath("swtpm"); err != nil {
		add("swtpm", "note", "is missing: apps with --key-provider tpm cannot be tried without a real TPM", "apt-get install swtpm")
	} else {
		add("swtpm", "ok", path, "")
	}
	for _, bin := range []string{"dstack-vmm", "dstack-simtee"} {
		if _, err := os.Stat(filepath.Join(a.stack.Bin, bin)); err != nil {
			add(bin, "problem", "is not beside dstack in "+a.stack.Bin, "make build")
		} else {
			add(bin, "ok", filepath.Join(a.stack.Bin, bin), "")
		}
	}
	checkTEE(add)
	checkSpace(add, a.stack.Dir)
	checkStack(a, add)

	problems := 0
	for _, k := range checks {
		mark := a.paint(green, "ok     ")
		switch k.Level {
		case "note":
			mark = a.paint(amber, "note   ")
		case "problem":
			mark = a.paint(red, "problem")
			problems++
		}
		a.printf("%s  %-14s %s\n", mark, k.Name, k.Detail)
		if k.Fix != "" {
			a.printf("         %-14s fix: %s\n", "", k.Fix)
		}
	}
	if err := a.result(map[string]any{"checks": checks, "problems": problems}); err != nil {
		return err
	}
	if problems > 0 {
		return exitError(exitFailed)
	}
	return nil
}

var qemuVersion = regexp.MustCompile(`version (\d+)\.(\d+)`)

func checkQEMU(add func(name, level, detail, fix string)) {
	out, err := exec.Command("qemu-system-x86_64", "--version").Output()
	if err != nil {
		add("qemu", "problem", "qemu-system-x86_64 does not run: "+err.Error(), "scripts/host-packages.sh installs QEMU 10")
		return
	}
	first, _, _ := strings.Cut(string(out), "\n")
	m := qemuVersion.FindStringSubmatch(first)
	if m == nil {
		add("qemu", "note", "its version is unreadable: "+first, "")
		return
	}
	if major, _ := strconv.Atoi(m[1]); major < 10 {
		add("qemu", "problem", first+": older than 10", "scripts/host-packages.sh installs QEMU 10 from the backports suite")
		return
	}
	add("qemu", "ok", first, "")
}

func checkTool(add func(name, level, detail, fix string), name, why, fix string) {
	if path, err := exec.LookPath(name); err == nil {
		add(name, "ok", path, "")
	} else {
		add(name, "problem", "is missing: "+why, fix)
	}
}

func checkTEE(add func(name, level, detail, fix string)) {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		add("kvm", "note", "/dev/kvm is not usable ("+err.Error()+"): VMs run under emulation, slowly", "load kvm_intel or kvm_amd and join the kvm group")
	} else {
		f.Close()
		add("kvm", "ok", "/dev/kvm opens (the VMM probes by booting whether it works)", "")
	}
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	switch {
	case kernelFlag("/sys/module/kvm_intel/parameters/tdx"):
		add("tee", "ok", "this host can run Intel TDX VMs", "")
	case kernelFlag("/sys/module/kvm_amd/parameters/sev_snp"):
		add("tee", "note", "this host can run AMD SEV-SNP VMs, which this version cannot start yet", "")
	case strings.Contains(string(cpu), " sev_snp"):
		add("tee", "note", "the CPU has SEV-SNP, the kernel does not offer it", "boot with kvm_amd.sev_snp=1 on a kernel that has it")
	default:
		add("tee", "note", "no TEE: only the simulated one works here (development trust)", "")
	}
}

func kernelFlag(path string) bool {
	data, err := os.ReadFile(path)
	return err == nil && strings.HasPrefix(string(data), "Y")
}

func checkSpace(add func(name, level, detail, fix string), dir string) {
	for at := dir; ; at = filepath.Dir(at) {
		var st syscall.Statfs_t
		if err := syscall.Statfs(at, &st); err == nil {
			free := st.Bavail * uint64(st.Bsize) >> 20
			if free < 4096 {
				add("disk", "problem", fmt.Sprintf("%d MiB free at %s", free, at), "free at least 4 GiB, or move the state with --state")
			} else {
				add("disk", "ok", fmt.Sprintf("%d GiB free at %s", free>>10, at), "")
			}
			return
		}
		if at == filepath.Dir(at) {
			return
		}
	}
}

// checkEgress says what guests reach beside the internet.
func checkEgress(a *app, add func(name, level, detail, fix string)) {
	var meta vmmpb.GetMetaResponse
	if a.stack.VMM().Call(a.ctx, "GetMeta", nil, &meta) != nil {
		return
	}
	switch n := meta.GetNetworking(); {
	case n.GetEgress() == "filtered":
		add("egress", "ok", "guests reach the internet, and of this machine and its networks what egress_allow lists", "")
	case n.GetEgressReason() != "":
		add("egress", "note", n.GetEgressReason(), n.GetEgressFix())
	default:
		add("egress", "note", "guests reach this machine's loopback and its networks, as the VMM's configuration says", "remove egress = \"open\" from it")
	}
}

func checkStack(a *app, add func(name, level, detail, fix string)) {
	st, err := os.Stat(a.stack.Dir)
	if err != nil {
		add("stack", "note", "there is none at "+a.stack.Dir, "dstack up")
		return
	}
	if st.Mode().Perm()&0o077 != 0 {
		add("state", "problem", fmt.Sprintf("%s is open to others (mode %04o)", a.stack.Dir, st.Mode().Perm()), "chmod 700 "+a.stack.Dir)
	}
	if !a.stack.Responding(a.ctx) {
		add("vmm", "problem", "does not answer at "+a.stack.Socket(), "dstack up; its log is "+a.stack.LogFile())
		return
	}
	add("vmm", "ok", "answers at "+a.stack.Socket(), "")
	checkEgress(a, add)
	entries, _ := os.ReadDir(a.stack.ImagesDir())
	for _, e := range entries {
		if _, err := osimage.Load(filepath.Join(a.stack.ImagesDir(), e.Name())); err != nil {
			add("image", "problem", err.Error(), "remove "+filepath.Join(a.stack.ImagesDir(), e.Name())+" and run dstack up")
		} else {
			add("image", "ok", e.Name(), "")
		}
	}
	vms, err := listVMs(a)
	if err != nil {
		return
	}
	for _, vm := range vms {
		if vm.BootError != "" {
			add("app", "problem", vm.Name+": "+printable(vm.BootError), "dstack logs "+vm.Name)
		}
	}
}
