// SPDX-License-Identifier: Apache-2.0

package acpi_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/measure/acpi"
	"github.com/dstack-go/dstack/vmm/qemu"
)

// QEMU's own tables, read as firmware reads them: QEMU is started with its
// processors stopped, and its qtest protocol does the port I/O that OVMF would
// have done.

// qemuVersion asks a binary for its version, X.Y.Z.
func qemuVersion(t testing.TB, binary string) string {
	t.Helper()
	out, err := exec.Command(binary, "--version").Output()
	if err != nil {
		t.Fatalf("%s --version: %v", binary, err)
	}
	v, err := qemu.ParseVersion(string(out))
	if err != nil {
		t.Fatal(err)
	}
	return v.String()
}

// qemuArgs are the arguments for a shape. A random number generator stands for
// every endpoint: the tables know an endpoint by its address only
// (TestThreat_D13_the_tables_do_not_depend_on_what_an_endpoint_is).
func qemuArgs(t testing.TB, s acpi.Shape) []string {
	onOff := map[bool]string{true: "on", false: "off"}
	machine := fmt.Sprintf("q35,hpet=%s,smm=%s,pic=%s", onOff[s.HPET], onOff[s.SMM], onOff[s.PIC])
	mib := strconv.FormatUint(s.Memory>>20, 10)
	args := []string{
		// A sparse file: the guest's memory is never touched.
		"-object", "memory-backend-file,id=mem0,size=" + mib + "M,share=on,mem-path=" + filepath.Join(t.TempDir(), "ram"),
		"-smp", strconv.Itoa(s.VCPUs), "-m", mib + "M",
	}
	if s.NUMA {
		args = append(args, "-numa", fmt.Sprintf("node,nodeid=0,cpus=0-%d,memdev=mem0", s.VCPUs-1))
	} else {
		machine += ",memory-backend=mem0"
	}
	args = append(args, "-machine", machine)
	if s.Serial {
		args = append(args, "-serial", "null")
	}
	for i, slot := range s.Slots {
		bus := "pcie.0"
		if slot == acpi.RootPort {
			bus = fmt.Sprintf("pci.%d", i)
			args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=%s,bus=pcie.0,chassis=%d", bus, i))
		}
		args = append(args, "-device", "virtio-rng-pci,bus="+bus)
	}
	if s.HotplugOff {
		args = append(args, "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
	}
	if s.Hole64Size != 0 {
		args = append(args, "-global", fmt.Sprintf("q35-pcihost.pci-hole64-size=%d", s.Hole64Size))
	}
	return args
}

// qtest is a running QEMU.
type qtest struct {
	t   testing.TB
	in  io.Writer
	out *bufio.Reader
}

// do sends a command and returns what follows its OK.
func (q *qtest) do(format string, args ...any) string {
	q.t.Helper()
	fmt.Fprintf(q.in, format+"\n", args...)
	for {
		line, err := q.out.ReadString('\n')
		if err != nil {
			q.t.Fatalf("qtest %q: QEMU ended", fmt.Sprintf(format, args...))
		}
		switch answer, found := strings.CutPrefix(strings.TrimSpace(line), "OK"); {
		case found:
			return strings.TrimSpace(answer)
		case strings.HasPrefix(line, "FAIL"), strings.HasPrefix(line, "ERR"):
			q.t.Fatalf("qtest %q: %s", fmt.Sprintf(format, args...), line)
		}
	}
}

// config writes a dword to the configuration space of a function of bus 0.
func (q *qtest) config(devfn, offset int, value uint32) {
	q.do("outl 0xcf8 %#x", 1<<31|devfn<<8|offset)
	q.do("outl 0xcfc %#x", value)
}

func (q *qtest) readConfig(devfn, offset int) uint32 {
	q.t.Helper()
	q.do("outl 0xcf8 %#x", 1<<31|devfn<<8|offset)
	v, err := strconv.ParseUint(q.do("inl 0xcfc"), 0, 32)
	if err != nil {
		q.t.Fatal(err)
	}
	return uint32(v)
}

// firmware sets up what the tables depend on, as OVMF does before it reads them:
// the configuration space, power management ports at 0x600, and the
// first 64-bit BAR at the bottom of its 64-bit window.
func (q *qtest) firmware(configBase uint32) {
	const lpc, pcieXBar, pmBase, acpiControl = 31 << 3, 0x60, 0x40, 0x44
	q.config(0, pcieXBar, configBase|1)
	q.config(0, pcieXBar+4, 0)
	q.config(lpc, pmBase, 0x601)
	q.config(lpc, acpiControl, 0x80)
	const command, bar4, virtio, memory64 = 0x04, 0x20, 0x1af4, 4
	for slot := 1; slot < 31; slot++ {
		devfn := slot << 3
		if q.readConfig(devfn, 0)&0xffff == virtio && q.readConfig(devfn, bar4)&6 == memory64 {
			q.config(devfn, bar4, acpi.Hole64Base&0xffff_ffff)
			q.config(devfn, bar4+4, acpi.Hole64Base>>32)
			q.config(devfn, command, 2)
			return
		}
	}
	q.t.Fatal("no device with a 64-bit BAR on the root bus")
}

// file reads a file of the firmware configuration device: into the guest's memory
// and from there, which is many times faster, or byte by byte, which disturbs no
// running guest.
func (q *qtest) file(key uint16, size uint32, dma bool) []byte {
	q.t.Helper()
	if !dma {
		q.do("outw 0x510 %#x", key)
		out := make([]byte, size)
		for i := range out {
			b, err := strconv.ParseUint(q.do("inb 0x511"), 0, 8)
			if err != nil {
				q.t.Fatal(err)
			}
			out[i] = byte(b)
		}
		return out
	}
	const control, data, readSelected = 0x1_0000, 0x10_0000, 1<<3 | 1<<1
	request := binary.BigEndian.AppendUint32(nil, uint32(key)<<16|readSelected)
	request = binary.BigEndian.AppendUint32(request, size)
	request = binary.BigEndian.AppendUint64(request, data)
	q.do("write %#x %d 0x%x", control, len(request), request)
	q.do("outl 0x514 0x0")
	q.do("outl 0x518 0x%x", binary.LittleEndian.Uint32(binary.BigEndian.AppendUint32(nil, control)))
	out, err := hex.DecodeString(strings.TrimPrefix(q.do("read %#x %d", data, size), "0x"))
	if err != nil {
		q.t.Fatal(err)
	}
	return out
}

// blobs reads the three files.
func (q *qtest) blobs(dma bool) *acpi.Tables {
	const directory = 0x19
	count := binary.BigEndian.Uint32(q.file(directory, 4, dma))
	entries := q.file(directory, 4+64*count, dma)[4:]
	out := new(acpi.Tables)
	files := map[string]*[]byte{"etc/table-loader": &out.Loader, "etc/acpi/rsdp": &out.RSDP, "etc/acpi/tables": &out.Tables}
	for ; len(entries) > 0; entries = entries[64:] {
		name, _, _ := bytes.Cut(entries[8:64], []byte{0})
		if into := files[string(name)]; into != nil {
			*into = q.file(binary.BigEndian.Uint16(entries[4:]), binary.BigEndian.Uint32(entries), dma)
		}
	}
	return out
}

// startQEMU starts QEMU without default devices.
func startQEMU(t testing.TB, binary, dir string, args ...string) (q *qtest, stop func()) {
	t.Helper()
	args = append([]string{"-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg",
		"-qtest", "stdio", "-qtest-log", os.DevNull}, args...)
	cmd := exec.CommandContext(t.Context(), binary, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return &qtest{t, in, bufio.NewReader(out)}, func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s %q\n%s", binary, args, &stderr)
		}
	}
}

// runQEMU starts QEMU with stopped processors and returns the tables it makes.
func runQEMU(t testing.TB, binary, dir string, configBase uint64, args ...string) *acpi.Tables {
	t.Helper()
	// 48 address bits are enough for every window here; x2apic is needed beyond 254
	// processors.
	q, stop := startQEMU(t, binary, dir, append([]string{"-S", "-cpu", "qemu64,phys-bits=48,+x2apic"}, args...)...)
	defer stop()
	if configBase == 0 {
		configBase = acpi.ConfigBase
	}
	q.firmware(uint32(configBase))
	return q.blobs(true)
}
