// SPDX-License-Identifier: Apache-2.0

// Package measure computes what a TEE will measure from what a host boots: the
// firmware, the kernel, the initial RAM disk, the command line and the shape of
// the VM.
//
// [ComputeTDX] takes the files themselves. A [Document] is the part of that
// computation that does not need the files again; it travels with an image
// (measurement.tdx.cbor) and in the VM's configuration ([VMConfig]), so that a
// relying party without the image can derive the same registers for the shapes
// of VM for which they are constant ([Document.TDX]).
//
// Guarantees: everything is a function of the arguments; there is no file,
// network, clock or environment. Firmware, kernel, document and configuration
// may come from an attacker: every length and offset is checked before use, work
// is bounded by fixed limits, and what does not parse is an error with a code,
// never a guess. A measurement that this package computes proves nothing on its
// own: it is a reference value, as good as the origin of its inputs.
//
// The three ACPI events of RTMR0 follow from the VM's shape (package acpi) where
// that is known and computed there ([Launch].ACPI, [TDX.SetACPI],
// [VMConfig.Shape]). Otherwise they are left open in [TDX.RTMR0] and must come from
// elsewhere: the event log, which is host controlled, or recorded values.
//
// Not covered: firmware of edk2 202505 or later, which logs other RTMR0 events.
// The fixed digest of the Boot0000 variable holds for OVMF
// builds whose first boot option is the setup application of the DXE volume.
//
// Implements spec/measurement.md §2, §3, §4 (but for §4.3), §5 and §7 (TDX part).
package measure

// Limits on what comes from outside.
const (
	maxFirmware = 64 << 20 // bytes; OVMF builds have 2 or 4 MiB
	maxKernel   = 512 << 20
	maxCmdline  = 1 << 16 // bytes
	maxMemory   = 1 << 46 // bytes of guest memory; 64 TiB

	pageSize = 4096
)
