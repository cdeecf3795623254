// SPDX-License-Identifier: Apache-2.0

// Package acpi computes the ACPI tables that QEMU hands the firmware of a q35
// machine: the blobs etc/acpi/tables, etc/acpi/rsdp and etc/table-loader, whose
// digests TDVF extends into RTMR0. A verifier can so tell tables of QEMU's making
// from others, without a QEMU: tables may carry code that the guest's kernel runs
// (threats.md D01), and RTMR0 without them says nothing of it.
//
// [Build] is a function of its argument, a [Shape]; there is no file, program,
// network or clock. The blobs are QEMU's byte for byte: the tests compare them
// with logs of real TDs, with recorded tables of several QEMU versions and with
// those of the QEMU that is installed. How tables differ between versions is data
// (type profile).
//
// A shape may come from an attacker: counts and sizes are bounded before use, and
// what is not known to be right is refused with the code acpi_shape_unsupported,
// never guessed: versions of QEMU that were not looked at, TPMs, expander bridges,
// more than one NUMA node, processors added later. A shape is a claim; only an
// RTMR0 of a verified quote says that a VM has it.
//
// The tables depend on two choices of the firmware, as it programs the chipset
// before it reads them: where the configuration space and the first 64-bit BAR
// lie. Defaults are those of TDVF and of OVMF from 2023 on.
//
// Implements spec/measurement.md §4.2. Facts are from the ACPI specification 6.5,
// from the PCI Firmware Specification 3.3 and from tables that QEMU made.
package acpi
