// SPDX-License-Identifier: Apache-2.0

package acpi_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure/acpi"
	"github.com/dstack-go/dstack/vmm/qemu"
)

var (
	record = flag.Bool("record", false, "rewrite testdata from the QEMU binaries given by -qemu")
	qemus  = flag.String("qemu", "", "comma separated paths of QEMU binaries to record from or compare with")
)

// liveQEMUs returns the binaries to compare with, or skips.
func liveQEMUs(t testing.TB) []string {
	t.Helper()
	if *qemus != "" {
		return strings.Split(*qemus, ",")
	}
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("SKIP: no qemu-system-x86_64 on this machine: the tables are compared with recorded ones only")
	}
	return []string{path}
}

// Recording: scripts/acpi-golden.sh.
func TestRecord(t *testing.T) {
	if !*record {
		t.Skip("only with -record")
	}
	var all []golden
	for _, binary := range liveQEMUs(t) {
		version := qemuVersion(t, binary)
		for _, name := range names() {
			got := runQEMU(t, binary, t.TempDir(), shapes[name].ConfigBase, qemuArgs(t, shapes[name])...)
			all = append(all, golden{version, name, got.Digests()})
			for short, of := range blobShapes {
				if of != name {
					continue
				}
				writeGzip(t, blobName(version, short, "tables"), got.Tables)
				writeGzip(t, blobName(version, short, "rsdp"), got.RSDP)
				writeGzip(t, blobName(version, short, "loader"), got.Loader)
			}
		}
	}
	text, err := json.MarshalIndent(all, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(goldenFile, append(text, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

// known skips a QEMU that is newer than what the package knows.
func known(t testing.TB, version string) {
	t.Helper()
	if _, err := acpi.Build(acpi.Shape{QEMU: version, VCPUs: 1, Memory: gib, PIC: true}); err != nil {
		t.Skipf("SKIP: QEMU %s: %v", version, err)
	}
}

func TestThreat_D13_the_tables_are_those_of_the_QEMU_that_is_installed(t *testing.T) {
	for _, binary := range liveQEMUs(t) {
		version := qemuVersion(t, binary)
		known(t, version)
		for _, name := range names() {
			s := shapeFor(t, name, version)
			t.Run(version+"/"+name, func(t *testing.T) {
				if s.VCPUs > 100 && *qemus == "" {
					t.Skip("QEMU needs long to start; compared with recorded tables, and with -qemu")
				}
				sameTables(t, runQEMU(t, binary, t.TempDir(), s.ConfigBase, qemuArgs(t, s)...), build(t, s))
			})
		}
	}
}

// qemuArgs has one kind of device for all. Real ones give the same tables; that
// vhost-vsock and vfio do too, which need drivers of the host, follows from the
// logs of real TDs (package measure).
func TestThreat_D13_the_tables_do_not_depend_on_what_an_endpoint_is(t *testing.T) {
	binary := liveQEMUs(t)[0]
	version := qemuVersion(t, binary)
	known(t, version)
	s := acpi.Shape{QEMU: version, VCPUs: 2, Memory: 256 << 20, Serial: true, Hole64Size: 1 << 40,
		Slots: slices.Concat(endpoints(8), ports(2))}
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	got := runQEMU(t, binary, dir, 0, "-machine", "q35,hpet=off,smm=off,pic=off", "-smp", "2", "-m", "256M", "-serial", "null",
		"-global", "q35-pcihost.pci-hole64-size=1T",
		"-drive", "file="+disk+",if=none,id=d0,format=raw,readonly=on", "-device", "virtio-blk-pci,drive=d0,disable-legacy=on,iommu_platform=on",
		"-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0",
		"-netdev", "user,id=n1", "-device", "e1000e,netdev=n1",
		"-device", "virtio-serial-pci",
		"-device", "virtio-balloon-pci",
		"-fsdev", "local,id=f0,path="+dir+",security_model=none,readonly=on", "-device", "virtio-9p-pci,fsdev=f0,mount_tag=host-shared",
		"-device", "virtio-scsi-pci",
		"-device", "pci-testdev",
		"-device", "pcie-root-port,id=p0,chassis=0", "-device", "virtio-rng-pci,bus=p0",
		"-device", "pcie-root-port,id=p1,chassis=1", "-drive", "file="+disk+",if=none,id=d1,format=raw,readonly=on", "-device", "nvme,drive=d1,serial=x,bus=p1")
	sameTables(t, got, build(t, s))
}

// ourShape is the VM that package vmm/qemu starts: root, data and shared disk,
// network card, hostlink, random numbers.
func ourShape(version string, spec qemu.Spec) acpi.Shape {
	return acpi.Shape{QEMU: version, VCPUs: spec.VCPUs, Memory: uint64(spec.MemoryMB) << 20, Slots: endpoints(6),
		Serial: true, Hole64Size: spec.PCIHole64}
}

// vmmArgs returns the arguments with which our VMM starts a VM, changed just so
// far that QEMU runs here: emulation instead of KVM, no firmware and kernel, on
// which no table depends; and of the TDX guest, which needs hardware, what it does
// to the machine (QEMU docs/system/i386/tdx.rst): no PIC and no SMM.
func vmmArgs(t *testing.T, binary string, spec qemu.Spec) []string {
	t.Helper()
	b := &qemu.Binary{Path: binary, Machine: "q35", TDX: true}
	args, err := b.Args(spec)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "-nodefaults", "-no-user-config", "-no-reboot":
		case "-display", "-accel", "-cpu", "-bios", "-kernel", "-initrd", "-append":
			i++
		case "-object":
			if i++; !strings.Contains(args[i], "tdx-guest") {
				out = append(out, "-object", args[i])
			}
		case "-machine":
			i++
			out = append(out, "-machine", strings.Replace(args[i], "confidential-guest-support=tdx", "smm=off,pic=off", 1))
		default:
			out = append(out, args[i])
		}
	}
	return out
}

func TestThreat_D13_the_tables_are_those_of_the_VM_that_our_VMM_starts(t *testing.T) {
	binary := liveQEMUs(t)[0]
	version := qemuVersion(t, binary)
	known(t, version)
	for name, edit := range map[string]func(*qemu.Spec, *acpi.Shape){
		"TDX":                       func(*qemu.Spec, *acpi.Shape) {},
		"TDX, 4 processors, a hole": func(spec *qemu.Spec, _ *acpi.Shape) { spec.VCPUs, spec.PCIHole64 = 4, 1<<40 },
		"no TEE or a simulated one": func(spec *qemu.Spec, s *acpi.Shape) { spec.TDX, s.HPET, s.PIC, s.SMM = nil, true, true, true },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, disk := range []string{"root.img", qemu.DataDisk, qemu.SharedDisk} {
				if err := os.WriteFile(filepath.Join(dir, disk), make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			spec := qemu.Spec{ID: "vm", Machine: "q35", Accel: qemu.KVM, VCPUs: 1, MemoryMB: 256,
				Firmware: "/fw", Kernel: "/k", Initrd: "/i", Rootfs: filepath.Join(dir, "root.img"),
				HostlinkPort: "hostlink", Network: qemu.Network{MAC: "02:00:00:00:00:01"}, TDX: new(qemu.TDX)}
			s := ourShape(version, spec)
			edit(&spec, &s)
			s.VCPUs, s.Hole64Size = spec.VCPUs, spec.PCIHole64
			sameTables(t, runQEMU(t, binary, dir, 0, vmmArgs(t, binary, spec)...), build(t, s))
		})
	}
}

// What the tests above do in place of the firmware is what OVMF does: the one that
// is installed boots, and then the tables are those computed.
func TestThreat_D13_the_tables_are_those_that_OVMF_is_handed(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a firmware under emulation")
	}
	binary := liveQEMUs(t)[0]
	version := qemuVersion(t, binary)
	known(t, version)
	const firmware = "/usr/share/ovmf/OVMF.fd"
	if _, err := os.Stat(firmware); err != nil {
		t.Skipf("SKIP: no OVMF on this machine (%v)", err)
	}
	dir := t.TempDir()
	console := filepath.Join(dir, "console")
	q, stop := startQEMU(t, binary, dir,
		// OVMF believes a processor's 46 address bits if it has pages of 1 GiB.
		"-cpu", "qemu64,+pdpe1gb,phys-bits=46", "-bios", firmware, "-serial", "file:"+console,
		"-machine", "q35,hpet=off,smm=off,pic=off", "-smp", "2", "-m", "512M",
		"-device", "virtio-rng-pci", "-device", "virtio-rng-pci", "-device", "virtio-rng-pci")
	defer stop()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		// The boot device selection comes after everything that reads tables.
		text, _ := os.ReadFile(console)
		if bytes.Contains(text, []byte("BdsDxe")) || bytes.Contains(text, []byte("Shell>")) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("OVMF did not reach its boot menu; its console:\n%.2000q", text)
		}
	}
	got := q.blobs(false)
	s := acpi.Shape{QEMU: version, VCPUs: 2, Memory: 512 << 20, Slots: endpoints(3), Serial: true}
	want := build(t, s)
	if !bytes.Equal(want.Tables, got.Tables) {
		t.Log("this OVMF is from before 2023: its configuration space is at 0xb0000000")
		s.ConfigBase = 0xb000_0000
		want = build(t, s)
	}
	sameTables(t, got, want)
}

// A host that adds a table of its own, here one whose code would write to memory,
// does not get the RTMR0 that its shape has.
func TestThreat_D01_a_table_that_the_host_adds_changes_RTMR0(t *testing.T) {
	binary := liveQEMUs(t)[0]
	version := qemuVersion(t, binary)
	known(t, version)
	s := shapeFor(t, "ours, 1 processor, 1 GiB", version)
	dir := t.TempDir()
	table := filepath.Join(dir, "ssdt")
	// OperationRegion (RAM, SystemMemory, 0x1000000, 4)
	if err := os.WriteFile(table, []byte{0x5b, 0x80, 'R', 'A', 'M', '_', 0, 0x0c, 0, 0, 0, 1, 0x0a, 4}, 0o600); err != nil {
		t.Fatal(err)
	}
	args := qemuArgs(t, s)
	want := build(t, s)
	sameTables(t, runQEMU(t, binary, dir, 0, args...), want)
	got := runQEMU(t, binary, dir, 0, append(args, "-acpitable", "sig=SSDT,data="+table)...)
	if !bytes.Contains(got.Tables, []byte("SSDT")) {
		t.Fatal("QEMU did not add the table")
	}
	for i, blob := range []string{"loader", "RSDP", "tables"} {
		if got.Digests()[i] == want.Digests()[i] {
			t.Errorf("the %s is the same with another table", blob)
		}
	}
}

// The peer is upstream's way: to start a QEMU for every question.
func BenchmarkTables(b *testing.B) {
	s := shapes["upstream, 8 processors, 16 GiB"]
	b.Run("computed", func(b *testing.B) {
		s := s
		s.QEMU = "10.0.2"
		b.ReportAllocs()
		for b.Loop() {
			if _, err := acpi.Build(s); err != nil {
				b.Fatal(err, fault.Code(err))
			}
		}
	})
	b.Run("asked of QEMU", func(b *testing.B) {
		binary := liveQEMUs(b)[0]
		args := qemuArgs(b, s)
		for b.Loop() {
			runQEMU(b, binary, b.TempDir(), 0, args...)
		}
	})
}
