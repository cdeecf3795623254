// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func TestParseVersion(t *testing.T) {
	var v struct {
		Pairs [][2]string `json:"qemu_version"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "vmm/derivations.json"), &v); err != nil {
		t.Fatal(err)
	}
	for _, p := range v.Pairs {
		got, err := ParseVersion(p[0])
		want, _, _ := strings.Cut(p[1], "-") // ours is numbers only
		if err != nil || got.String() != want {
			t.Errorf("%q: %s %v", p[0], got, err)
		}
	}
	for _, bad := range []string{"", "version", "QEMU emulator version x.y.z", "QEMU emulator version 8", "QEMU emulator version -1.0.0"} {
		if _, err := ParseVersion(bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestTooOldIsRefused(t *testing.T) {
	for _, tc := range []struct {
		v     Version
		accel Accel
		code  string
	}{
		{Version{10, 0, 2}, TCG, ""}, {Version{9, 2, 0}, TCG, "qemu_too_old"}, {Version{9, 2, 0}, KVM, ""},
		{Version{7, 2, 9}, KVM, "qemu_too_old"}, {Version{11, 0, 0}, TCG, ""},
	} {
		err := (&Binary{Path: "/q", Version: tc.v}).Check(tc.accel)
		if fault.Code(err) != tc.code || tc.code != "" && fault.Fix(err) == "" {
			t.Errorf("%s %s: %v", tc.v, tc.accel, err)
		}
	}
}

// script makes an executable that stands for a broken QEMU.
func script(t *testing.T, body string) string {
	path := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestUnusableQEMUIsNamed(t *testing.T) {
	for name, tc := range map[string]struct{ path, code string }{
		"missing":                 {"/nonexistent/qemu", "qemu_missing"},
		"not executable":          {os.DevNull, "qemu_missing"},
		"fails":                   {script(t, "exit 3"), "qemu_unusable"},
		"prints nonsense":         {script(t, "echo hello"), "qemu_unusable"},
		"has a version only":      {script(t, `[ "$1" = --version ] && echo QEMU emulator version 10.0.0 && exit 0; echo no >&2; exit 1`), "qemu_unusable"},
		"never answers on socket": {script(t, `[ "$1" = --version ] && echo QEMU emulator version 10.0.0 && exit 0; exec sleep 60`), "qemu_unusable"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			if _, err := Find(ctx, tc.path); fault.Code(err) != tc.code || fault.Fix(err) == "" {
				t.Fatalf("%q %v", fault.Code(err), err)
			}
		})
	}
}

func real(t *testing.T) *Binary {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("SKIP: no qemu-system-x86_64 on this machine")
	}
	b, err := Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestProbeBootsAGuest(t *testing.T) {
	b := real(t)
	if !strings.HasPrefix(b.Machine, "pc-q35-") {
		t.Fatalf("machine type %q is not versioned", b.Machine)
	}
	if err := b.Probe(t.Context(), TCG); err != nil {
		t.Fatalf("TCG runs everywhere: %v", err)
	}
	start := time.Now()
	c, err := Choose(t.Context(), b, "auto")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("chose %s in %v; KVM: %q", c.Accel, time.Since(start), c.WhyNotKVM)
	if took := time.Since(start); took > ProbeLimit+2*time.Second {
		t.Errorf("took %v", took)
	}
	if c.Accel == TCG {
		if c.WhyNotKVM == "" {
			t.Error("no reason given")
		}
		if _, err := Choose(t.Context(), b, "kvm"); fault.Code(err) != "accel_unusable" || fault.Fix(err) == "" {
			t.Error(err)
		}
	}
	if _, err := Choose(t.Context(), b, "warp"); fault.Code(err) != "accel_unusable" {
		t.Error(err)
	}
}

// A guest that hangs, crashes or never starts is not taken for a working one.
func TestProbeIsNotFooled(t *testing.T) {
	b := real(t)
	defer func(saved []byte) { probeSector = saved }(probeSector)
	for name, code := range map[string][]byte{
		"loops":                  {0xeb, 0xfe},
		"halts":                  {0xfa, 0xf4, 0xeb, 0xfc},
		"resets":                 {0xea, 0xf0, 0xff, 0x00, 0xf0},
		"leaves too early":       {0xb0, 0x10, 0xe6, 0xf4, 0xeb, 0xfe}, // another value
		"is not a boot sector":   nil,
		"exits through shutdown": {0xba, 0x04, 0x06, 0xb8, 0x00, 0x34, 0xef, 0xeb, 0xfe},
	} {
		probeSector = make([]byte, 512)
		copy(probeSector, code)
		if code != nil {
			probeSector[510], probeSector[511] = 0x55, 0xaa
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if err := b.Probe(ctx, TCG); err == nil {
			t.Errorf("a guest that %s passed", name)
		}
		cancel()
	}
	if err := (&Binary{Path: script(t, "exit 0"), Machine: "q35"}).Probe(t.Context(), TCG); err == nil {
		t.Error("a program that exits with 0 passed")
	}
}

func TestProbeSectorIsWhatItsSourceSays(t *testing.T) {
	if len(probeSector) != 512 || probeSector[510] != 0x55 || probeSector[511] != 0xaa {
		t.Fatal("not a boot sector")
	}
	if _, err := exec.LookPath("as"); err != nil {
		t.Skip("SKIP: no assembler on this machine")
	}
	dir := t.TempDir()
	for _, args := range [][]string{
		{"as", "--64", "-o", dir + "/probe.o", "probe.S"},
		{"ld", "-Ttext", "0x7c00", "--oformat", "binary", "-o", dir + "/probe.bin", dir + "/probe.o"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	built, err := os.ReadFile(dir + "/probe.bin")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(built, probeSector) {
		t.Fatal("probe.bin is not assembled from probe.S")
	}
}

func spec() Spec {
	return Spec{ID: "3f2504e0-4f89-41d3-9a0c-0305e82c3301", Machine: "pc-q35-10.0", Accel: TCG, VCPUs: 1, MemoryMB: 1024,
		Firmware: "/img/ovmf.fd", Kernel: "/img/bzImage", Initrd: "/img/initramfs.cpio.gz", Rootfs: "/img/rootfs,x=y.img",
		Cmdline: "console=ttyS0 a=b,c", HostlinkPort: "org.dstack.hostlink.0",
		Network: Network{MAC: "2e:62:b0:03:5f:34", Forwards: []Forward{{"tcp", netip.MustParseAddr("127.0.0.1"), 18080, 8080}}}}
}

func after(args []string, flag string) []string {
	var out []string
	for i, a := range args {
		if a == flag {
			out = append(out, args[i+1])
		}
	}
	return out
}

func TestArgs(t *testing.T) {
	b := &Binary{Path: "/q", Version: Version{10, 0, 2}, Machine: "pc-q35-10.0"}
	args, err := b.Args(spec())
	if err != nil {
		t.Fatal(err)
	}
	for flag, want := range map[string]string{
		"-accel": "tcg,thread=multi", "-cpu": "max", "-machine": "pc-q35-10.0", "-append": "console=ttyS0 a=b,c",
		"-sandbox": "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-netdev":  "user,id=net0,restrict=off,ipv6=off,hostfwd=tcp:127.0.0.1:18080-:8080",
	} {
		if got := after(args, flag); len(got) != 1 || got[0] != want {
			t.Errorf("%s: %q, want %q", flag, got, want)
		}
	}
	for _, must := range []string{"-nodefaults", "-no-user-config", "-no-reboot"} {
		if !slices.Contains(args, must) {
			t.Errorf("no %s", must)
		}
	}
	devices := after(args, "-device")
	want := []string{"virtio-blk-pci,drive=root,serial=dstack-root", "virtio-blk-pci,drive=data,serial=dstack-data",
		"virtio-blk-pci,drive=shared,serial=dstack-shared", "virtio-net-pci,netdev=net0,mac=2e:62:b0:03:5f:34,romfile=",
		"virtio-serial-pci,id=vser0", "virtserialport,bus=vser0.0,chardev=hostlink,name=org.dstack.hostlink.0", "virtio-rng-pci"}
	if !slices.Equal(devices, want) {
		t.Errorf("devices %q", devices)
	}
	// A comma in a path is data, not an option.
	var root struct {
		ReadOnly bool `json:"read-only"`
		File     struct{ Filename string }
	}
	if err := json.Unmarshal([]byte(after(args, "-blockdev")[0]), &root); err != nil || root.File.Filename != "/img/rootfs,x=y.img" || !root.ReadOnly {
		t.Errorf("root %+v %v", root, err)
	}
	// The data disk is written and flushed; the others are not written.
	if drives := after(args, "-blockdev"); len(drives) != 3 ||
		drives[1] != `{"driver":"raw","node-name":"data","discard":"unmap","cache":{"direct":false,"no-flush":false},"file":{"driver":"file","filename":"data.img","discard":"unmap","cache":{"direct":false,"no-flush":false}}}` ||
		!strings.Contains(drives[2], `"read-only":true`) {
		t.Errorf("%q", drives)
	}
	// Volumes come after, read-only, in their order.
	withVolumes := spec()
	withVolumes.Volumes = []string{"/v/a,b", "/v/c"}
	if args, err := b.Args(withVolumes); err != nil || !slices.Equal(after(args, "-device"), append(slices.Clone(want), "virtio-blk-pci,drive=vol0,serial=dstack-vol0", "virtio-blk-pci,drive=vol1,serial=dstack-vol1")) ||
		after(args, "-blockdev")[3] != `{"driver":"raw","node-name":"vol0","read-only":true,"file":{"driver":"file","filename":"/v/a,b","read-only":true}}` {
		t.Errorf("%q %v", args, err)
	}
	withVolumes.Volumes = []string{"relative"}
	if _, err := b.Args(withVolumes); fault.Code(err) != "qemu_argument" {
		t.Error(err)
	}
	// A TPM comes last and sits on no bus: the devices before keep their addresses.
	withTPM := spec()
	withTPM.TPM = true
	if args, err := b.Args(withTPM); err != nil || !slices.Equal(after(args, "-device"), append(slices.Clone(want), "tpm-crb,tpmdev=tpm0")) ||
		after(args, "-tpmdev")[0] != "emulator,id=tpm0,chardev=tpm0" || !slices.Contains(after(args, "-chardev"), "socket,id=tpm0,path=tpm/tpm.sock") {
		t.Errorf("%q %v", args, err)
	}
	old := &Binary{Version: Version{8, 0, 0}}
	if args, _ := old.Args(spec()); after(args, "-cpu")[0] != "max,-cx16" {
		t.Errorf("old QEMU: -cpu %q", after(args, "-cpu"))
	}
}

// The parts that upstream's command line has too are spelt as upstream spells them.
func TestTDXArgs(t *testing.T) {
	var v struct{ Args map[string][]string }
	if err := json.Unmarshal(testkit.Vectors(t, "vmm/qemu-args.json"), &v); err != nil {
		t.Fatal(err)
	}
	up := v.Args["tdx"]
	var id dstack.MRConfigID
	id[0] = 1
	for i := 1; i < 33; i++ {
		id[i] = 0x22
	}
	s := spec()
	s.Accel, s.TDX, s.Machine = KVM, &TDX{MRConfigID: id, QGSPort: 4050}, "q35"
	b := &Binary{Version: Version{10, 1, 0}, TDX: true}
	args, err := b.Args(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range []string{"-object", "-machine", "-accel", "-cpu", "-smbios"} {
		if got, want := after(args, flag), after(up, flag); !slices.Equal(got, want) {
			t.Errorf("%s: %q, upstream %q", flag, got, want)
		}
	}
	for _, d := range after(args, "-device") {
		if strings.HasPrefix(d, "virtio-") && !strings.Contains(d, "iommu_platform=on") {
			t.Errorf("%s bypasses the DMA API", d)
		}
	}
	for name, b := range map[string]*Binary{"QEMU without TDX": {Version: Version{10, 0, 0}}} {
		if _, err := b.Args(s); fault.Code(err) != "tee_unavailable" || fault.Fix(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	s.Accel = TCG
	if _, err := b.Args(s); fault.Code(err) != "tee_unavailable" {
		t.Errorf("TDX under TCG: %v", err)
	}
}

func TestValuesThatWouldBeOptionsAreRefused(t *testing.T) {
	b := &Binary{Version: Version{10, 0, 2}}
	for name, spoil := range map[string]func(*Spec){
		"id with a comma":           func(s *Spec) { s.ID = "a,debug-threads=on" },
		"id with a newline":         func(s *Spec) { s.ID = "a\nb" },
		"id that looks like a flag": func(s *Spec) { s.ID = "-S" },
		"machine with an option":    func(s *Spec) { s.Machine = "q35,dump-guest-core=on" },
		"accelerator with option":   func(s *Spec) { s.Accel = "tcg,tb-size=1" },
		"MAC with an option":        func(s *Spec) { s.Network.MAC = "2e:62:b0:03:5f:34,netdev=x" },
		"interface with an option":  func(s *Spec) { s.Network.Ifname = "tap0,script=/x" },
		"port name with an option":  func(s *Spec) { s.HostlinkPort = "a,b" },
		"relative kernel":           func(s *Spec) { s.Kernel = "bzImage" },
		"kernel with a newline":     func(s *Spec) { s.Kernel = "/x\ny" },
		"command line with newline": func(s *Spec) { s.Cmdline = "a\nb" },
		"IPv6 forward":              func(s *Spec) { s.Network.Forwards[0].Address = netip.MustParseAddr("::1") },
		"protocol with an option":   func(s *Spec) { s.Network.Forwards[0].Protocol = "tcp::80-:80,hostfwd=tcp" },
		"port zero":                 func(s *Spec) { s.Network.Forwards[0].VM = 0 },
		"no memory":                 func(s *Spec) { s.MemoryMB = 0 },
	} {
		s := spec()
		spoil(&s)
		if args, err := b.Args(s); fault.Code(err) != "qemu_argument" {
			t.Errorf("%s: %v %q", name, err, args)
		}
	}
}
