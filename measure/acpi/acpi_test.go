// SPDX-License-Identifier: Apache-2.0

package acpi_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure/acpi"
)

func endpoints(n int) []acpi.Slot { return slices.Repeat([]acpi.Slot{acpi.Endpoint}, n) }

func ports(n int) []acpi.Slot { return slices.Repeat([]acpi.Slot{acpi.RootPort}, n) }

// upstream is the VM of upstream's VMM: data disk, network card, vsock, share,
// root disk.
func upstream(cpus int, memory uint64) acpi.Shape {
	return acpi.Shape{VCPUs: cpus, Memory: memory, Slots: endpoints(5), Serial: true}
}

const gib = 1 << 30

// shapes are those compared with QEMU, by name. The QEMU version is left open.
var shapes = func() map[string]acpi.Shape {
	with := func(s acpi.Shape, edit func(*acpi.Shape)) acpi.Shape {
		s.Slots = slices.Clone(s.Slots)
		edit(&s)
		return s
	}
	ours := acpi.Shape{VCPUs: 1, Memory: gib, Slots: endpoints(6), Serial: true}
	return map[string]acpi.Shape{
		"upstream, 1 processor, 1 GiB":               upstream(1, gib),
		"upstream, 2 processors, 2 GiB":              upstream(2, 2*gib),
		"upstream, 4 processors, 2815 MiB":           upstream(4, 2815<<20),
		"upstream, 4 processors, 2816 MiB":           upstream(4, 2816<<20),
		"upstream, 8 processors, 16 GiB":             upstream(8, 16*gib),
		"upstream, 9 processors":                     upstream(9, 4*gib),
		"upstream, 64 processors, 64 GiB":            upstream(64, 64*gib),
		"upstream, 254 processors":                   upstream(254, 4*gib),
		"upstream, 255 processors":                   upstream(255, 4*gib),
		"upstream, 256 processors":                   upstream(256, 4*gib),
		"upstream, 300 processors on a node":         with(upstream(300, 4*gib), func(s *acpi.Shape) { s.NUMA = true }),
		"upstream, 1024 processors":                  upstream(1024, 4*gib),
		"upstream, PIC":                              with(upstream(2, 2*gib), func(s *acpi.Shape) { s.PIC = true }),
		"upstream, hotplug off":                      with(upstream(2, 2*gib), func(s *acpi.Shape) { s.HotplugOff = true }),
		"upstream, two cards and three volumes":      with(upstream(2, 2*gib), func(s *acpi.Shape) { s.Slots = endpoints(9) }),
		"upstream, hugepages":                        with(upstream(4, 8*gib), func(s *acpi.Shape) { s.NUMA = true }),
		"upstream, hugepages, memory below 2816 MiB": with(upstream(2, 2*gib), func(s *acpi.Shape) { s.NUMA = true }),
		"upstream, 1 GPU, 16 TiB hole":               with(upstream(16, 64*gib), func(s *acpi.Shape) { s.Slots, s.Hole64Size = append(s.Slots, ports(1)...), 16<<40 }),
		"upstream, 1 GPU, hotplug off, 16 TiB hole":  with(upstream(16, 64*gib), func(s *acpi.Shape) { s.Slots, s.HotplugOff, s.Hole64Size = append(s.Slots, ports(1)...), true, 16<<40 }),
		"upstream, 8 GPUs and 4 switches, 16 TiB":    with(upstream(32, 64*gib), func(s *acpi.Shape) { s.Slots, s.Hole64Size = append(s.Slots, ports(12)...), 16<<40 }),
		"upstream, 8 GPUs, hotplug off":              with(upstream(32, 64*gib), func(s *acpi.Shape) { s.Slots, s.HotplugOff, s.Hole64Size = append(s.Slots, ports(8)...), true, 16<<40 }),
		"a hole of no whole number of GiB":           with(upstream(2, 2*gib), func(s *acpi.Shape) { s.Hole64Size = 40*gib + 4096 }),
		"ours, 1 processor, 1 GiB":                   ours,
		"ours, 4 processors, 8 GiB":                  with(ours, func(s *acpi.Shape) { s.VCPUs, s.Memory = 4, 8*gib }),
		"ours, without a TEE":                        with(ours, func(s *acpi.Shape) { s.HPET, s.PIC, s.SMM = true, true, true }),
		"no serial port":                             with(upstream(2, 2*gib), func(s *acpi.Shape) { s.Serial = false }),
		"configuration space of an older OVMF":       with(ours, func(s *acpi.Shape) { s.ConfigBase = 0xb000_0000 }),
		"configuration space right after low memory": with(upstream(2, 2*gib), func(s *acpi.Shape) { s.ConfigBase = 0x8000_0000 }),
		"a full root bus":                            with(upstream(2, 2*gib), func(s *acpi.Shape) { s.Slots = append(endpoints(20), ports(10)...) }),
		"ports between endpoints": with(upstream(2, 2*gib), func(s *acpi.Shape) {
			s.Slots = slices.Concat(endpoints(2), ports(1), endpoints(1), ports(2), endpoints(1))
		}),
		"high precision timer, NUMA and 12 processors": with(upstream(12, 5*gib), func(s *acpi.Shape) { s.HPET, s.NUMA = true, true }),
	}
}()

// golden is what a QEMU made of a shape: digests in the order of the event log.
type golden struct {
	QEMU    string                `json:"qemu"`
	Shape   string                `json:"shape"`
	Digests [3]dstack.Measurement `json:"digests"`
}

const goldenFile = "testdata/golden.json"

// blobShapes are kept as whole blobs too, so that a difference can be looked at
// without a QEMU.
var blobShapes = map[string]string{
	"ours":         "ours, 4 processors, 8 GiB",
	"upstream-gpu": "upstream, 8 GPUs and 4 switches, 16 TiB",
}

// blobName is the file of one blob.
func blobName(version, short, blob string) string {
	return filepath.Join("testdata", "qemu-"+version+"-"+short+"-"+blob+".gz")
}

func names() []string {
	var out []string
	for name := range shapes {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func shapeFor(t testing.TB, name, version string) acpi.Shape {
	t.Helper()
	s, ok := shapes[name]
	if !ok {
		t.Fatalf("no shape %q", name)
	}
	s.QEMU = version
	return s
}

func build(t testing.TB, s acpi.Shape) *acpi.Tables {
	t.Helper()
	got, err := acpi.Build(s)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func writeGzip(t *testing.T, path string, data []byte) {
	t.Helper()
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(data)
	w.Close()
	if err := os.WriteFile(path, buf.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

func readGzip(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestThreat_D13_the_tables_are_those_that_QEMU_made(t *testing.T) {
	text, err := os.ReadFile(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	var all []golden
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	versions := map[string]bool{}
	for _, g := range all {
		versions[g.QEMU] = true
		t.Run(g.QEMU+"/"+g.Shape, func(t *testing.T) {
			got := build(t, shapeFor(t, g.Shape, g.QEMU)).Digests()
			for i, blob := range []string{"loader", "RSDP", "tables"} {
				if got[i] != g.Digests[i] {
					t.Errorf("%s: %s, QEMU made %s", blob, got[i], g.Digests[i])
				}
			}
		})
	}
	if len(all) < 20 || len(versions) < 2 {
		t.Errorf("only %d tables of %d versions were recorded", len(all), len(versions))
	}
	for version := range versions {
		for short, name := range blobShapes {
			t.Run(version+"/byte for byte/"+short, func(t *testing.T) {
				want := &acpi.Tables{
					Tables: readGzip(t, blobName(version, short, "tables")),
					RSDP:   readGzip(t, blobName(version, short, "rsdp")),
					Loader: readGzip(t, blobName(version, short, "loader")),
				}
				sameTables(t, want, build(t, shapeFor(t, name, version)))
			})
		}
	}
}

// sameTables compares blobs byte for byte.
func sameTables(t testing.TB, want, got *acpi.Tables) {
	t.Helper()
	for _, f := range []struct {
		name      string
		want, got []byte
	}{{"tables", want.Tables, got.Tables}, {"RSDP", want.RSDP, got.RSDP}, {"loader", want.Loader, got.Loader}} {
		if bytes.Equal(f.want, f.got) {
			continue
		}
		at := 0
		for at < min(len(f.want), len(f.got)) && f.want[at] == f.got[at] {
			at++
		}
		cut := func(b []byte) []byte { return b[min(len(b), max(0, at-16)):min(len(b), at+16)] }
		t.Errorf("%s: %d bytes, QEMU has %d; first difference at %#x\nQEMU %x\nours %x", f.name, len(f.got), len(f.want), at, cut(f.want), cut(f.got))
	}
}

func TestShapesThatAreNotComputedAreRefusedByField(t *testing.T) {
	for name, tc := range map[string]struct {
		field string
		edit  func(*acpi.Shape)
	}{
		"no version":                         {"qemu_version", func(s *acpi.Shape) { s.QEMU = "" }},
		"a negative version":                 {"qemu_version", func(s *acpi.Shape) { s.QEMU = "10.-1.0" }},
		"four numbers":                       {"qemu_version", func(s *acpi.Shape) { s.QEMU = "10.0.0.1" }},
		"an old version":                     {"qemu_version", func(s *acpi.Shape) { s.QEMU, s.PIC = "8.1.99", true }},
		"a version of the future":            {"qemu_version", func(s *acpi.Shape) { s.QEMU = "12.0.0" }},
		"no PIC in QEMU 9.0":                 {"pic", func(s *acpi.Shape) { s.QEMU = "9.0.2" }},
		"no processor":                       {"cpu_count", func(s *acpi.Shape) { s.VCPUs = 0 }},
		"fewer than no processors":           {"cpu_count", func(s *acpi.Shape) { s.VCPUs = -1 }},
		"too many processors":                {"cpu_count", func(s *acpi.Shape) { s.VCPUs = 1025 }},
		"too little memory":                  {"memory_size", func(s *acpi.Shape) { s.Memory = 8 << 20 }},
		"no whole number of MiB":             {"memory_size", func(s *acpi.Shape) { s.Memory++ }},
		"too much memory":                    {"memory_size", func(s *acpi.Shape) { s.Memory = 1 << 62 }},
		"too many devices":                   {"devices", func(s *acpi.Shape) { s.Slots = endpoints(31) }},
		"an empty slot":                      {"devices", func(s *acpi.Shape) { s.Slots = []acpi.Slot{0} }},
		"an unknown kind of device":          {"devices", func(s *acpi.Shape) { s.Slots = []acpi.Slot{acpi.Endpoint, 3} }},
		"a 64-bit window inside the memory":  {"pci_hole64_base", func(s *acpi.Shape) { s.Hole64Base = 1 << 32 }},
		"a 64-bit window beyond all address": {"pci_hole64_base", func(s *acpi.Shape) { s.Hole64Base = 1 << 63 }},
		"a 64-bit window that is too large":  {"pci_hole64_size", func(s *acpi.Shape) { s.Hole64Size = 1<<64 - 1 }},
		"MCFG inside the memory":             {"pci_config_base", func(s *acpi.Shape) { s.ConfigBase = 0x1000_0000 }},
		"MCFG beyond 4 GiB":                  {"pci_config_base", func(s *acpi.Shape) { s.ConfigBase = 1 << 40 }},
		"MCFG at an odd place":               {"pci_config_base", func(s *acpi.Shape) { s.ConfigBase = 0xb800_0000 }},
	} {
		t.Run(name, func(t *testing.T) {
			s := shapeFor(t, "upstream, 2 processors, 2 GiB", "10.0.2")
			tc.edit(&s)
			tables, err := acpi.Build(s)
			if tables != nil || fault.Code(err) != "acpi_shape_unsupported" || fault.Fix(err) == "" {
				t.Fatalf("%v, code %q, fix %q", tables, fault.Code(err), fault.Fix(err))
			}
			if !strings.Contains(err.Error(), ": "+tc.field+": ") {
				t.Errorf("%q does not name the field %s", err, tc.field)
			}
		})
	}
}

func TestThreat_D13_every_field_of_a_shape_is_in_the_digests(t *testing.T) {
	base := acpi.Shape{QEMU: "9.2.1", VCPUs: 2, Memory: gib, Slots: slices.Concat(endpoints(2), ports(1)), PIC: true}
	edits := map[string]func(*acpi.Shape){
		"QEMU":       func(s *acpi.Shape) { s.QEMU = "10.0.2" },
		"VCPUs":      func(s *acpi.Shape) { s.VCPUs = 3 },
		"Memory":     func(s *acpi.Shape) { s.Memory += 1 << 20 },
		"Slots":      func(s *acpi.Shape) { s.Slots = slices.Concat(endpoints(1), ports(1), endpoints(1)) },
		"HotplugOff": func(s *acpi.Shape) { s.HotplugOff = true },
		"PIC":        func(s *acpi.Shape) { s.PIC = false },
		"SMM":        func(s *acpi.Shape) { s.SMM = true },
		"HPET":       func(s *acpi.Shape) { s.HPET = true },
		"Serial":     func(s *acpi.Shape) { s.Serial = true },
		"NUMA":       func(s *acpi.Shape) { s.NUMA = true },
		"Hole64Size": func(s *acpi.Shape) { s.Hole64Size = 64 * gib },
		"Hole64Base": func(s *acpi.Shape) { s.Hole64Base = 1 << 40 },
		"ConfigBase": func(s *acpi.Shape) { s.ConfigBase = 0xb000_0000 },
	}
	for _, field := range reflect.VisibleFields(reflect.TypeOf(base)) {
		edit := edits[field.Name]
		if edit == nil {
			t.Errorf("field %s is not tried", field.Name)
			continue
		}
		changed := base
		edit(&changed)
		if build(t, changed).Digests() == build(t, base).Digests() {
			t.Errorf("another %s gives the same tables", field.Name)
		}
	}
}

// Releases between which QEMU's tables changed, and some between which they did
// not.
func TestThreat_D13_tables_change_with_QEMU_where_QEMU_changed_them(t *testing.T) {
	of := func(version string) [3]dstack.Measurement {
		s := shapeFor(t, "upstream, PIC", version)
		return build(t, s).Digests()
	}
	for _, tc := range []struct {
		before, after string
		same          bool
	}{
		{"8.2.2", "8.2.8", true}, {"8.2.8", "8.2.9", false}, {"8.2.9", "9.0.0", false}, {"9.0.4", "9.1.2", true},
		{"8.2.2", "9.1.0", true}, {"9.1.2", "9.1.3", false}, {"9.1.3", "9.2.0", false}, {"9.2.0", "9.2.1", false},
		{"9.2.1", "9.2.9", true}, {"9.2.9", "10.0.0", false}, {"10.0.0", "10.2.3", true}, {"10.2.3", "11.0.0", false},
		{"11.0.2", "11.1.0", false}, {"11.1.0", "11.1.9", true},
	} {
		if same := of(tc.before) == of(tc.after); same != tc.same {
			t.Errorf("tables of %s and %s are the same: %v, want %v", tc.before, tc.after, same, tc.same)
		}
	}
}

func sum(b []byte) (s byte) {
	for _, x := range b {
		s += x
	}
	return s
}

// link does what firmware does with the blobs: it runs the loader's commands with
// the tables at the given address, and returns them and the RSDP.
func link(t testing.TB, b *acpi.Tables, address uint32) (tables, rsdp []byte) {
	t.Helper()
	le := binary.LittleEndian
	files := map[string][]byte{}
	base := map[string]uint32{"etc/acpi/tables": address, "etc/acpi/rsdp": 0xf_0000}
	source := map[string][]byte{"etc/acpi/tables": b.Tables, "etc/acpi/rsdp": b.RSDP}
	text := func(b []byte) string { s, _, _ := bytes.Cut(b[:56], []byte{0}); return string(s) }
	for c := b.Loader; len(c) > 0; c = c[128:] {
		name := text(c[4:])
		file := files[name]
		switch le.Uint32(c) {
		case 0:
		case 1:
			if source[name] == nil || file != nil {
				t.Fatalf("allocation of %q", name)
			}
			files[name] = slices.Clone(source[name])
		case 2:
			target, at, size := text(c[60:]), le.Uint32(c[116:]), c[120]
			if size != 4 && size != 8 || files[target] == nil {
				t.Fatalf("pointer of %d bytes to %q", size, target)
			}
			v := le.Uint32(file[at:])
			if int(v) >= len(files[target]) {
				t.Fatalf("pointer beyond %q", target)
			}
			le.PutUint32(file[at:], v+base[target])
		case 3:
			result, start, length := le.Uint32(c[60:]), le.Uint32(c[64:]), le.Uint32(c[68:])
			if file[result] != 0 {
				t.Fatalf("checksum at %#x is not left to the firmware", result)
			}
			file[result] = -sum(file[start:][:length])
		default:
			t.Fatalf("command %d", le.Uint32(c))
		}
	}
	return files["etc/acpi/tables"], files["etc/acpi/rsdp"]
}

// checkLinked follows the pointers of linked tables as a kernel does, and returns
// the signatures in the order of the RSDT.
func checkLinked(t testing.TB, b *acpi.Tables) (signatures []string) {
	t.Helper()
	const address = 0x7e00_0000
	tables, rsdp := link(t, b, address)
	le := binary.LittleEndian
	if len(rsdp) != 20 || sum(rsdp) != 0 || string(rsdp[:8]) != "RSD PTR " {
		t.Fatalf("RSDP %x", rsdp)
	}
	table := func(pointer uint32) []byte {
		at := pointer - address
		length := le.Uint32(tables[at+4:])
		out := tables[at:][:length]
		if string(out[:4]) != "FACS" && sum(out) != 0 {
			t.Fatalf("checksum of %s", out[:4])
		}
		return out
	}
	rsdt := table(le.Uint32(rsdp[16:]))
	end := len(tables)
	for p := rsdt[36:]; len(p) > 0; p = p[4:] {
		x := table(le.Uint32(p))
		signatures = append(signatures, string(x[:4]))
		if string(x[:4]) == "FACP" {
			facs, dsdt := table(le.Uint32(x[36:])), table(le.Uint32(x[40:]))
			if string(facs[:4]) != "FACS" || string(dsdt[:4]) != "DSDT" || le.Uint64(x[140:]) != uint64(le.Uint32(x[40:])) {
				t.Fatalf("FADT points to %q and %q", facs[:4], dsdt[:4])
			}
		}
	}
	if end%(128<<10) != 0 || len(b.Loader)%4096 != 0 {
		t.Fatalf("blobs of %d and %d bytes", end, len(b.Loader))
	}
	return signatures
}

func TestLinkedTablesAreWellFormed(t *testing.T) {
	for _, name := range names() {
		t.Run(name, func(t *testing.T) {
			s := shapeFor(t, name, "10.0.2")
			want := []string{"FACP", "APIC"}
			if s.HPET {
				want = append(want, "HPET")
			}
			if s.NUMA {
				want = append(want, "SRAT")
			}
			want = append(want, "MCFG", "WAET")
			if got := checkLinked(t, build(t, s)); !slices.Equal(got, want) {
				t.Errorf("tables %q, want %q", got, want)
			}
		})
	}
}

// Any shape gives well-formed tables of bounded size or the one refusal.
func FuzzBuild(f *testing.F) {
	f.Add("10.0.2", 2, uint64(2*gib), []byte{1, 1, 2}, uint8(0), uint64(0), uint64(0), uint64(0))
	f.Add("8.2.2", 300, uint64(4*gib), []byte{2, 2}, uint8(0xff), uint64(16<<40), uint64(1<<40), uint64(0xb000_0000))
	f.Add("11.1.3", 1024, uint64(64*gib), []byte{}, uint8(2), uint64(1), uint64(0), uint64(0x8000_0000))
	f.Add("10", -1, uint64(1<<63), []byte{9}, uint8(0), uint64(1<<63), uint64(1<<63), uint64(1))
	f.Fuzz(func(t *testing.T, version string, cpus int, memory uint64, slots []byte, flags uint8, holeSize, holeBase, config uint64) {
		s := acpi.Shape{QEMU: version, VCPUs: cpus, Memory: memory, Hole64Size: holeSize, Hole64Base: holeBase, ConfigBase: config}
		for i, flag := range []*bool{&s.HotplugOff, &s.PIC, &s.SMM, &s.HPET, &s.Serial, &s.NUMA} {
			*flag = flags>>i&1 == 1
		}
		for _, b := range slots {
			s.Slots = append(s.Slots, acpi.Slot(b))
		}
		b, err := acpi.Build(s)
		if err != nil {
			if fault.Code(err) != "acpi_shape_unsupported" {
				t.Fatalf("code %q of %v", fault.Code(err), err)
			}
			return
		}
		if len(b.Tables) > 512<<10 || len(b.Loader) != 4096 {
			t.Fatalf("blobs of %d and %d bytes", len(b.Tables), len(b.Loader))
		}
		checkLinked(t, b)
	})
}
