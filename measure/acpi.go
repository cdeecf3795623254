// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"fmt"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure/acpi"
)

func errNoShape() error {
	return fault.New("acpi_shape_missing", "the shape of the VM, on which its ACPI tables depend, was not given")
}

// SetACPI fills in the digests of the three ACPI events with those of the tables
// that QEMU makes for a VM of this shape. When it fails (code
// acpi_shape_unsupported) t is unchanged.
func (t *TDX) SetACPI(shape acpi.Shape) error {
	tables, err := acpi.Build(shape)
	if err != nil {
		return err
	}
	digests := tables.Digests()
	for i, name := range []string{ACPILoader, ACPIRSDP, ACPITables} {
		for j := range t.RTMR0 {
			if t.RTMR0[j].Name == name {
				t.RTMR0[j].Digest = &digests[i]
			}
		}
	}
	t.NoACPI = nil
	return nil
}

// upstreamEndpoints are the devices on the root bus of every VM of upstream's VMM
// besides network cards and verity volumes: data disk, vsock, share, root disk.
const upstreamEndpoints = 4

// Shape returns the shape of the VM as far as its ACPI tables depend on it
// (spec/measurement.md §4.2). It is as much a claim as c is: tables of that shape
// are QEMU's own, whatever the host said, but which shape the VM has only RTMR0
// tells.
//
// A VM has num_pci_endpoints devices on the root bus, or those of upstream's VMM:
// four, network cards and verity volumes. GPUs and NVSwitches sit on root ports
// behind them. A TD has no high precision timer and no system management mode, and
// a legacy interrupt controller only where "pic" says so or the version is 8.
//
// The code of every error is acpi_shape_unsupported; its message names the field.
// Refused are a software TPM, GPUs without a pci_hole64_size (the window then
// depends on their BARs), and GPUs with hugepages (an expander bridge, whose
// windows the firmware chooses). [acpi.Build] refuses more, such as a QEMU version
// that was not stated.
func (c *VMConfig) Shape() (acpi.Shape, error) {
	refuse := func(field, why string) (acpi.Shape, error) {
		return acpi.Shape{}, fault.New("acpi_shape_unsupported", "ACPI tables of this VM: %s: %s", field, why)
	}
	gpus := c.NumGPUs > 0 || c.NumNVSwitches > 0
	switch {
	case c.SWTPM:
		return refuse("swtpm", "a TPM adds tables and a log area")
	case c.Hugepages && gpus:
		return refuse("hugepages", "GPUs are then behind an expander bridge, whose windows the firmware chooses")
	case gpus && c.PCIHole64Size == 0:
		return refuse("pci_hole64_size", "not stated, so that the window depends on the GPUs")
	}
	switch c.HostShareMode {
	case "", "9p", "vvfat", "vhd": // one device each
	default:
		return refuse("host_share_mode", fmt.Sprintf("%.32q is not known", c.HostShareMode))
	}
	endpoints := uint64(c.Endpoints)
	if endpoints == 0 {
		endpoints = upstreamEndpoints + uint64(c.NumNICs) + uint64(c.NumVerity)
	}
	ports := uint64(c.NumGPUs) + uint64(c.NumNVSwitches)
	if endpoints+ports > acpi.MaxSlots {
		return refuse("devices", fmt.Sprintf("%d on the root bus, want at most %d", endpoints+ports, acpi.MaxSlots))
	}
	s := acpi.Shape{
		QEMU: c.QEMUVersion, VCPUs: int(c.CPUCount), Memory: c.MemorySize,
		HotplugOff: c.HotplugOff, PIC: c.pic(), Serial: true, NUMA: c.Hugepages,
		Hole64Size: c.PCIHole64Size, ConfigBase: c.ConfigBase,
	}
	for i := range endpoints + ports {
		slot := acpi.Endpoint
		if i >= endpoints {
			slot = acpi.RootPort
		}
		s.Slots = append(s.Slots, slot)
	}
	return s, nil
}

// pic reports whether the VM has a legacy interrupt controller: as stated, or with
// QEMU 8 only.
func (c *VMConfig) pic() bool {
	if c.PIC != nil {
		return *c.PIC
	}
	major, err := c.qemuMajor()
	return err == nil && major == 8
}

// ACPIDigests returns the digests of the tables for [VMConfig.Shape] in the order
// of the event log. The code of every error is acpi_shape_unsupported.
func (c *VMConfig) ACPIDigests() ([3]dstack.Measurement, error) {
	shape, err := c.Shape()
	if err != nil {
		return [3]dstack.Measurement{}, err
	}
	tables, err := acpi.Build(shape)
	if err != nil {
		return [3]dstack.Measurement{}, err
	}
	return tables.Digests(), nil
}
