// SPDX-License-Identifier: Apache-2.0

// Package simtee simulates Intel TDX for development: it keeps measurement
// registers and signs quotes over them, so that the whole system, the verifier
// included, runs without TEE hardware.
//
// This is development trust and proves nothing about hardware. Whoever runs the
// process can make it sign anything; a quote from it says only that this process
// signed it. Its keys chain to a root that is made afresh on each installation
// ([EnsurePKI]); no verifier accepts that root unless its user names it
// (`--dev-roots`), and then the verdict begins with `trust: development`. There is
// no global test root, and no release binary but dstack-simtee links this package.
//
// What it does keep, because the development of everything above depends on it:
//
//   - One process per VM holds the registers, outside the guest. The guest can
//     extend RTMR2 and RTMR3 and ask for quotes over what it extended, and nothing
//     else: no request sets a register.
//   - MRTD and RTMR0 to RTMR2 are computed by package measure from the very files
//     that the VM is started with, which are read once; sizes and hashes are
//     recorded in the state. ACPI events have the digest of nothing (see
//     [measure.TDX.BootLog]).
//   - An extend is durable before it is acknowledged. A process that starts with
//     the state of an earlier one resumes it. State that is damaged, or that
//     belongs to another launch, is refused: it never starts afresh on its own.
//     Deleting the state is the reset of the VM, and the VMM's business.
//   - Quotes have the exact form of TDX quotes, version 4, with a quoting enclave
//     report, a PCK certificate with Intel's SGX extension, TCB info, QE identity
//     and revocation lists, so that the verifier's production code judges them.
//
// Attacker-controlled: requests on the socket come from the guest. They are
// bounded in size, number and time. The launch file and the state directory belong
// to the VMM.
//
// Implements design.md §5 and, for the formats, spec/attestation.md §2.
package simtee
