// SPDX-License-Identifier: Apache-2.0

package acpi_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure/acpi"
)

var (
	record = flag.Bool("record", false, "rewrite testdata from the QEMU binaries given by -qemu")
	qemus  = flag.String("qemu", "", "comma separated paths of QEMU binaries for -record and the live tests")
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

func TestThreat_D13_the_tables_are_those_of_the_QEMU_that_is_installed(t *testing.T) {
	for _, binary := range liveQEMUs(t) {
		version := qemuVersion(t, binary)
		for _, name := range names() {
			s := shapeFor(t, name, version)
			got, err := acpi.Build(s)
			if fault.Code(err) == "acpi_shape_unsupported" && strings.Contains(err.Error(), "qemu_version") {
				t.Skipf("SKIP: QEMU %s is newer than those this package knows: %v", version, err)
			}
			t.Run(version+"/"+name, func(t *testing.T) {
				if s.VCPUs > 300 && *qemus == "" {
					t.Skip("QEMU needs long to start; compared with recorded tables, and with -qemu")
				}
				if err != nil {
					t.Fatal(err)
				}
				sameTables(t, runQEMU(t, binary, t.TempDir(), s.ConfigBase, qemuArgs(t, s)...), got)
			})
		}
	}
}
