// SPDX-License-Identifier: Apache-2.0

package measure_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/measure/acpi"
	"github.com/dstack-go/dstack/measure/measuretest"
)

func parseVMConfig(t *testing.T, text string) *measure.VMConfig {
	t.Helper()
	c, err := measure.ParseVMConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// loggedACPI are the digests of the three events over ACPI tables.
func loggedACPI(t *testing.T, events []eventlog.Event) [3]dstack.Measurement {
	t.Helper()
	var found []dstack.Measurement
	for _, e := range events {
		if e.IsACPI() {
			found = append(found, dstack.Measurement(e.Digest))
		}
	}
	if len(found) != 3 {
		t.Fatalf("%d ACPI events", len(found))
	}
	return [3]dstack.Measurement(found)
}

// realACPI is a VM on real hardware: what its host said of it, and the digests
// that its firmware logged.
type realACPI struct {
	name   string
	config *measure.VMConfig
	logged [3]dstack.Measurement
}

func realVMs(t *testing.T) []realACPI {
	t.Helper()
	var all []realACPI
	for _, name := range []string{"attestation/tdx/tdx-lite-getquote.json", "attestation/tdx/quote-report.json"} {
		q, _, events := loadGetQuote(t, name)
		all = append(all, realACPI{name, parseVMConfig(t, q.VMConfig), loggedACPI(t, events)})
	}
	const simulator = "attestation/simulator/attestation.bin"
	e, err := container.Decode(testkit.Vectors(t, simulator))
	if err != nil {
		t.Fatal(err)
	}
	var sys struct {
		VMConfig string `json:"vm_config"`
	}
	if err := json.Unmarshal([]byte(e.Config), &sys); err != nil {
		t.Fatal(err)
	}
	return append(all, realACPI{simulator, parseVMConfig(t, sys.VMConfig), loggedACPI(t, e.EventLog)})
}

func TestThreat_D13_ACPI_tables_of_real_TDs_follow_from_their_vm_config(t *testing.T) {
	for _, vm := range realVMs(t) {
		t.Run(vm.name, func(t *testing.T) {
			got, err := vm.config.ACPIDigests()
			if err != nil || got != vm.logged {
				t.Fatalf("digests %s, %v; the firmware logged %s", got, err, vm.logged)
			}
			for name, edit := range map[string]func(*measure.VMConfig){
				"one processor more":    func(c *measure.VMConfig) { c.CPUCount++ },
				"less than 2 GiB":       func(c *measure.VMConfig) { c.MemorySize = 1 << 30 },
				"one network card more": func(c *measure.VMConfig) { c.NumNICs++ },
				"one volume more":       func(c *measure.VMConfig) { c.NumVerity++ },
				"one switch more":       func(c *measure.VMConfig) { c.NumNVSwitches, c.PCIHole64Size = 1+c.NumNVSwitches, 16<<40 },
				"hotplug":               func(c *measure.VMConfig) { c.HotplugOff = !c.HotplugOff },
				"another QEMU":          func(c *measure.VMConfig) { c.QEMUVersion = "10.0.0" },
				"a larger window":       func(c *measure.VMConfig) { c.PCIHole64Size = 32 << 40 },
				"another MCFG":          func(c *measure.VMConfig) { c.ConfigBase = 0xb000_0000 },
			} {
				t.Run("but not with "+name, func(t *testing.T) {
					changed := *vm.config
					edit(&changed)
					if got, err := changed.ACPIDigests(); err != nil || got == vm.logged {
						t.Fatalf("digests %s, %v", got, err)
					}
				})
			}
		})
	}
}

func TestThreat_D13_RTMR0_of_a_real_quote_follows_without_its_event_log(t *testing.T) {
	lite, register, _ := loadGetQuote(t, "attestation/tdx/tdx-lite-getquote.json")
	large, largeRegister, _ := loadGetQuote(t, "attestation/tdx/quote-report.json")
	// Both machines have upstream's firmware, and the document of one image tells
	// all that RTMR0 needs of it.
	doc, err := measure.ParseTDXDocument(parseVMConfig(t, lite.VMConfig).TDXMeasurement.Measurement)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, config string
		want         dstack.Measurement
	}{
		{"QEMU 8.2.2, 2 processors, 2 GiB", lite.VMConfig, register(rtmr0At)},
		{"QEMU 9.2.1, 16 processors, 64 GiB, a GPU", large.VMConfig, largeRegister(rtmr0At)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			config := parseVMConfig(t, tc.config)
			tdx, err := doc.TDX(config.MemorySize, false)
			if err != nil {
				t.Fatal(err)
			}
			wantCode(t, tdx.NoACPI, "acpi_shape_missing")
			if _, err := tdx.ReplayRTMR0(nil); fault.Code(err) != "acpi_count" {
				t.Fatalf("replay without any ACPI digest: %v", err)
			}
			shape, err := config.Shape()
			if err != nil {
				t.Fatal(err)
			}
			if err := tdx.SetACPI(shape); err != nil || tdx.NoACPI != nil {
				t.Fatal(err, tdx.NoACPI)
			}
			if got, err := tdx.ReplayRTMR0(nil); err != nil || got != tc.want {
				t.Fatalf("RTMR0 = %s, %v; the quote has %s", got, err, tc.want)
			}
			if got, err := eventlog.Replay(tdx.BootLog(), 0); err != nil || got != tc.want {
				t.Fatalf("the boot log replays to %s, %v; the quote has %s", got, err, tc.want)
			}
			shape.VCPUs++
			if err := tdx.SetACPI(shape); err != nil {
				t.Fatal(err)
			}
			if got, err := tdx.ReplayRTMR0(nil); err != nil || got == tc.want {
				t.Fatalf("one processor more gives the same RTMR0: %v", err)
			}
		})
	}
}

// The register that upstream publishes for image 0.5.5 with one processor and
// 2 GiB (spec/measurement.md §5.2), and the log of another real machine.
func TestThreat_D13_ACPI_tables_match_what_others_published(t *testing.T) {
	q, _, _ := loadGetQuote(t, "attestation/tdx/tdx-lite-getquote.json")
	doc, err := measure.ParseTDXDocument(parseVMConfig(t, q.VMConfig).TDXMeasurement.Measurement)
	if err != nil {
		t.Fatal(err)
	}
	tdx, err := doc.TDX(2<<30, true)
	if err != nil {
		t.Fatal(err)
	}
	pic := true
	shape, err := (&measure.VMConfig{QEMUVersion: "9.1.0", CPUCount: 1, MemorySize: 2 << 30, PIC: &pic, NumNICs: 1}).Shape()
	if err != nil {
		t.Fatal(err)
	}
	if err := tdx.SetACPI(shape); err != nil {
		t.Fatal(err)
	}
	want := dstack.Measurement(unhex(t, "68102e7b524af310f7b7d426ce75481e36c40f5d513a9009c046e9d37e31551f0134d954b496a3357fd61d03f07ffe96"))
	if got, err := tdx.ReplayRTMR0(nil); err != nil || got != want {
		t.Errorf("RTMR0 = %s, %v; upstream publishes %s", got, err, want)
	}

	events, err := eventlog.ParseCCEL(testkit.Vectors(t, "attestation/event-logs/ccel.bin"))
	if err != nil {
		t.Fatal(err)
	}
	// A guest of an older version, whose root disk was a CD-ROM on the SATA bus.
	old := measure.VMConfig{QEMUVersion: "8.2.2", CPUCount: 1, MemorySize: 1 << 30, Endpoints: 4}
	if got, err := old.ACPIDigests(); err != nil || got != loggedACPI(t, events) {
		t.Errorf("digests %s, %v; the firmware logged %s", got, err, loggedACPI(t, events))
	}
}

func TestTheShapeOfAVMConfigIsThatOfUpstreamsVMMOrOurs(t *testing.T) {
	slots := func(endpoints, ports int) []acpi.Slot {
		return append(slices.Repeat([]acpi.Slot{acpi.Endpoint}, endpoints), slices.Repeat([]acpi.Slot{acpi.RootPort}, ports)...)
	}
	for name, tc := range map[string]struct {
		config string
		want   acpi.Shape
	}{
		"upstream's least VM": {
			`{"qemu_version":"9.2.1","cpu_count":1,"memory_size":1073741824}`,
			acpi.Shape{QEMU: "9.2.1", VCPUs: 1, Memory: 1 << 30, Slots: slots(5, 0), Serial: true},
		},
		"QEMU 8 has a PIC": {
			`{"qemu_version":"8.2.2","cpu_count":1,"memory_size":1073741824}`,
			acpi.Shape{QEMU: "8.2.2", VCPUs: 1, Memory: 1 << 30, Slots: slots(5, 0), Serial: true, PIC: true},
		},
		"unless it was switched off, and QEMU 10 if it was on": {
			`{"qemu_version":"10.0.0","cpu_count":1,"memory_size":1073741824,"pic":true}`,
			acpi.Shape{QEMU: "10.0.0", VCPUs: 1, Memory: 1 << 30, Slots: slots(5, 0), Serial: true, PIC: true},
		},
		"cards, volumes, GPUs and switches": {
			`{"qemu_version":"9.2.1","cpu_count":8,"memory_size":1073741824,"num_nics":2,"num_verity_volumes":3,"num_gpus":2,"num_nvswitches":1,"hotplug_off":true,"pci_hole64_size":1099511627776}`,
			acpi.Shape{QEMU: "9.2.1", VCPUs: 8, Memory: 1 << 30, Slots: slots(9, 3), Serial: true, HotplugOff: true, Hole64Size: 1 << 40},
		},
		"hugepages are one node": {
			`{"qemu_version":"9.2.1","cpu_count":8,"memory_size":1073741824,"hugepages":true,"host_share_mode":"vhd"}`,
			acpi.Shape{QEMU: "9.2.1", VCPUs: 8, Memory: 1 << 30, Slots: slots(5, 0), Serial: true, NUMA: true},
		},
		"our VM, under an older OVMF": {
			`{"qemu_version":"10.1.2","cpu_count":2,"memory_size":1073741824,"num_pci_endpoints":6,"pci_config_base":2952790016}`,
			acpi.Shape{QEMU: "10.1.2", VCPUs: 2, Memory: 1 << 30, Slots: slots(6, 0), Serial: true, ConfigBase: 0xb000_0000},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseVMConfig(t, tc.config).Shape()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestVMConfigsWhoseTablesAreNotComputedAreRefusedByField(t *testing.T) {
	good := func() *measure.VMConfig {
		return &measure.VMConfig{QEMUVersion: "10.0.2", CPUCount: 2, MemorySize: 2 << 30, NumNICs: 1}
	}
	if _, err := good().ACPIDigests(); err != nil {
		t.Fatal(err)
	}
	no := false
	for name, tc := range map[string]struct {
		field string
		edit  func(*measure.VMConfig)
	}{
		"no QEMU version":                {"qemu_version", func(c *measure.VMConfig) { c.QEMUVersion = "" }},
		"a version that is none":         {"qemu_version", func(c *measure.VMConfig) { c.QEMUVersion = "ten" }},
		"a version of two numbers":       {"qemu_version", func(c *measure.VMConfig) { c.QEMUVersion = "10.0" }},
		"a version before any TDX":       {"qemu_version", func(c *measure.VMConfig) { c.QEMUVersion = "7.2.0" }},
		"a version too old to be known":  {"qemu_version", func(c *measure.VMConfig) { c.QEMUVersion = "8.1.5" }},
		"a version too new to be known":  {"qemu_version", func(c *measure.VMConfig) { c.QEMUVersion = "11.2.0" }},
		"a number that does not end":     {"qemu_version", func(c *measure.VMConfig) { c.QEMUVersion = "10." + strings.Repeat("0", 1<<16) + ".0" }},
		"no PIC before it was reported":  {"pic", func(c *measure.VMConfig) { c.QEMUVersion, c.PIC = "9.0.4", &no }},
		"a software TPM":                 {"swtpm", func(c *measure.VMConfig) { c.SWTPM = true }},
		"GPUs on a node":                 {"hugepages", func(c *measure.VMConfig) { c.Hugepages, c.NumGPUs, c.PCIHole64Size = true, 1, 1<<40 }},
		"GPUs without a window":          {"pci_hole64_size", func(c *measure.VMConfig) { c.NumGPUs = 1 }},
		"switches without a window":      {"pci_hole64_size", func(c *measure.VMConfig) { c.NumNVSwitches = 1 }},
		"a window that is too large":     {"pci_hole64_size", func(c *measure.VMConfig) { c.PCIHole64Size = 1 << 63 }},
		"another share":                  {"host_share_mode", func(c *measure.VMConfig) { c.HostShareMode = "nfs" }},
		"more devices than slots":        {"devices", func(c *measure.VMConfig) { c.NumNICs = 27 }},
		"more devices than anyone has":   {"devices", func(c *measure.VMConfig) { c.NumNICs, c.NumVerity = 1<<32-1, 1<<32-1 }},
		"more endpoints than anyone has": {"devices", func(c *measure.VMConfig) { c.Endpoints = 1<<32 - 1 }},
		"more GPUs than slots":           {"devices", func(c *measure.VMConfig) { c.NumGPUs, c.PCIHole64Size = 26, 1<<40 }},
		"no processor":                   {"cpu_count", func(c *measure.VMConfig) { c.CPUCount = 0 }},
		"more processors than computed":  {"cpu_count", func(c *measure.VMConfig) { c.CPUCount = 1025 }},
		"4 billion processors":           {"cpu_count", func(c *measure.VMConfig) { c.CPUCount = 1<<32 - 1 }},
		"no memory":                      {"memory_size", func(c *measure.VMConfig) { c.MemorySize = 0 }},
		"half a MiB more":                {"memory_size", func(c *measure.VMConfig) { c.MemorySize += 1 << 19 }},
		"more memory than windows allow": {"memory_size", func(c *measure.VMConfig) { c.MemorySize = 1 << 46 }},
		"MCFG inside the memory":         {"pci_config_base", func(c *measure.VMConfig) { c.ConfigBase = 0x7000_0000 }},
		"MCFG over the I/O APIC":         {"pci_config_base", func(c *measure.VMConfig) { c.ConfigBase = 0xf000_0000 }},
		"MCFG at an odd place":           {"pci_config_base", func(c *measure.VMConfig) { c.ConfigBase = 0xb000_1000 }},
	} {
		t.Run(name, func(t *testing.T) {
			c := good()
			tc.edit(c)
			_, err := c.ACPIDigests()
			wantCode(t, err, "acpi_shape_unsupported")
			if !strings.Contains(err.Error(), ": "+tc.field+": ") {
				t.Errorf("%q does not name the field %s", err, tc.field)
			}
			if len(err.Error()) > 300 {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestALaunchWithAShapeHasNoOpenEvent(t *testing.T) {
	launch := measuretest.Launch()
	open, err := measure.ComputeTDX(launch)
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, open.NoACPI, "acpi_shape_missing")

	shape := acpi.Shape{QEMU: "10.0.2", VCPUs: 77, Memory: 3 << 30, Slots: []acpi.Slot{acpi.Endpoint}, Serial: true}
	launch.ACPI = &shape
	full, err := measure.ComputeTDX(launch)
	if err != nil || full.NoACPI != nil {
		t.Fatal(err, full.NoACPI)
	}
	if slices.ContainsFunc(full.RTMR0, func(e measure.RTMR0Event) bool { return e.Digest == nil }) {
		t.Error("an event is open")
	}
	shape.VCPUs, shape.Memory = launch.VCPUs, launch.MemoryBytes
	tables, err := acpi.Build(shape)
	if err != nil {
		t.Fatal(err)
	}
	digests := tables.Digests()
	want, err := open.ReplayRTMR0(digests[:])
	if err != nil {
		t.Fatal(err)
	}
	if got, err := full.ReplayRTMR0(nil); err != nil || got != want {
		t.Errorf("RTMR0 = %s, %v; want %s, with the processors and memory of the launch", got, err, want)
	}
	if got, err := eventlog.Replay(full.BootLog(), 0); err != nil || got != want {
		t.Errorf("the boot log replays to %s, %v; want %s", got, err, want)
	}

	launch.ACPI.QEMU = "99.0.0"
	open, err = measure.ComputeTDX(launch)
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, open.NoACPI, "acpi_shape_unsupported")
	if _, err := open.ReplayRTMR0(digests[:]); err != nil {
		t.Errorf("the events are not open: %v", err)
	}
}

// Any vm_config gives tables or a refusal with the one code, in bounded space.
func FuzzACPIOfVMConfig(f *testing.F) {
	f.Add([]byte(`{"qemu_version":"9.2.1","cpu_count":16,"memory_size":68719476736,"num_gpus":1,"pci_hole64_size":17592186044416,"hotplug_off":true}`))
	f.Add([]byte(`{"qemu_version":"8.2.2","cpu_count":2,"memory_size":2147483648,"hugepages":true}`))
	f.Add([]byte(`{"qemu_version":"11.1.3","cpu_count":300,"memory_size":1073741824,"num_pci_endpoints":6,"pci_config_base":2952790016,"pic":true}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := measure.ParseVMConfig(data)
		if err != nil {
			return
		}
		if _, err := c.ACPIDigests(); err != nil && fault.Code(err) != "acpi_shape_unsupported" {
			t.Fatalf("code %q of %v", fault.Code(err), err)
		}
	})
}
