// SPDX-License-Identifier: Apache-2.0

package acpi

import (
	"fmt"

	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of a shape.
const (
	maxVCPUs  = 1024
	maxMemory = 1 << 45 // bytes; below the default Hole64Base
)

// MaxSlots is how many slots of the root bus are free: 1 to 30. Slot 0 is the host
// bridge, 31 the ICH9.
const MaxSlots = 30

// hole64Size is what QEMU gives a q35 machine when nobody asks for another size.
const hole64Size = 32 << 30

// Hole64Base is where OVMF places the first 64-bit BAR on a machine with 46 or
// more physical address bits, as every TDX host has: the last eighth of 2^46.
// QEMU starts the 64-bit window of PCI0's resources there. (OVMF before 2023 used
// one bit more where there was one.)
const Hole64Base = 0x3800_0000_0000

// ConfigBase is where OVMF places the configuration space of PCI Express, 256 MiB.
// Builds before 2023 used 0xb0000000; TDVF never did.
const ConfigBase = 0xe000_0000

const configLength = 256 << 20

// Slot is what sits in one slot of the PCI Express root bus.
type Slot uint8

// Kinds of slots. The tables do not depend on what an endpoint is, only on its
// address: a disk, a network card and a vsock device look the same.
const (
	Endpoint Slot = 1 + iota // a device without functions other than 0
	RootPort                 // a root port with one endpoint behind it
)

// Shape is a VM of QEMU's q35 machine as far as its ACPI tables depend on it. It
// has no display adapter and no device besides those named here and those of
// every q35 machine. Machine types from pc-q35-7.1 on give the same tables.
type Shape struct {
	// QEMU is the version of the QEMU binary, X.Y.Z, from 8.2.0 to 11.1. Versions
	// before 10.1, which had no TDX of their own, are QEMU as patched for TDX.
	QEMU string

	VCPUs  int    // 1 to 1024, in one socket, none to be added later
	Memory uint64 // bytes, a whole number of MiB

	// Slots are those of pcie.0 from slot 1 on, without a gap: QEMU fills the
	// first free one, in the order of its -device arguments. At most MaxSlots.
	Slots []Slot

	HotplugOff bool // ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off
	PIC        bool // legacy interrupt controller present; before QEMU 9.1 it must be
	SMM        bool // system management mode, with a firmware that does not use it for CPU hotplug
	HPET       bool // high precision timer present
	Serial     bool // COM1 present
	NUMA       bool // one node with all processors and all memory

	Hole64Size uint64 // bytes, q35-pcihost.pci-hole64-size; 0: QEMU's 32 GiB
	Hole64Base uint64 // lowest 64-bit BAR; 0: Hole64Base
	ConfigBase uint64 // configuration space of PCI Express; 0: ConfigBase
}

// unsupported is the refusal of a shape that this package does not compute.
func unsupported(field, format string, args ...any) error {
	return fault.New("acpi_shape_unsupported", "ACPI tables of this VM: %s: %s", field, fmt.Sprintf(format, args...)).
		WithFix("choose a shape whose tables are computed, or take the digests from the event log and accept unknown tables")
}

// check returns the code acpi_shape_unsupported with the field in question.
func (s *Shape) check() error {
	if s.VCPUs < 1 || s.VCPUs > maxVCPUs {
		return unsupported("cpu_count", "%d, want 1 to %d", s.VCPUs, maxVCPUs)
	}
	if s.Memory < 16<<20 || s.Memory > maxMemory || s.Memory%(1<<20) != 0 {
		return unsupported("memory_size", "%d bytes, want 16 MiB to 32 TiB in whole MiB", s.Memory)
	}
	if len(s.Slots) > MaxSlots {
		return unsupported("devices", "%d on the root bus, want at most %d", len(s.Slots), MaxSlots)
	}
	for i, slot := range s.Slots {
		if slot != Endpoint && slot != RootPort {
			return unsupported("devices", "kind %d in slot %d", slot, i+1)
		}
	}
	if base := s.hole64Base(); base < 1<<32+s.Memory || base >= 1<<51 {
		return unsupported("pci_hole64_base", "%#x for %d bytes of memory", base, s.Memory)
	}
	if base := s.configBase(); base < s.lowMemory() || base > ConfigBase || base%configLength != 0 {
		return unsupported("pci_config_base", "%#x, want a multiple of 256 MiB from the end of low memory to %#x", base, uint64(ConfigBase))
	}
	if s.Hole64Size > 1<<51 {
		return unsupported("pci_hole64_size", "%d bytes, want at most 2 PiB", s.Hole64Size)
	}
	return nil
}

func (s *Shape) hole64Base() uint64 {
	if s.Hole64Base != 0 {
		return s.Hole64Base
	}
	return Hole64Base
}

func (s *Shape) configBase() uint64 {
	if s.ConfigBase != 0 {
		return s.ConfigBase
	}
	return ConfigBase
}

// hole64End is the first byte after the 64-bit window: QEMU rounds it up to whole
// GiB.
func (s *Shape) hole64End() uint64 {
	size := s.Hole64Size
	if size == 0 {
		size = hole64Size
	}
	return (s.hole64Base() + size + 1<<30 - 1) &^ (1<<30 - 1)
}

// lowMemory is the amount of memory below 4 GiB, at whose end the 32-bit window
// starts.
func (s *Shape) lowMemory() uint64 {
	if s.Memory < 0xb000_0000 {
		return s.Memory
	}
	return 0x8000_0000
}
