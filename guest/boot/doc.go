// SPDX-License-Identifier: Apache-2.0

// Package boot is PID 1 of the guest: it brings the machine from the first
// instruction of user space to a running, measured app, and ends it in order.
//
// Read [Machine.Phases] first: boot is that list, from top to bottom, and nothing
// happens outside it. Each phase is named, timed, bounded, written to the console
// and reported to the host. The first failure ends the boot: keys are wiped, the
// host learns a code and a sentence, the console is flushed, the machine powers
// off. There is no rescue shell and no retry that could be turned into an oracle.
//
// Guarantees: no container exists and no packet from outside is accepted before
// system-ready is measured; no key is made before the random generator is seeded;
// the bytes of the host's blob that are parsed are the bytes that are measured;
// what PID 1 cannot undo (an extended register) it logs only after it is done.
//
// Trusts: the kernel, the measured command line, the TEE. Attacker-controlled:
// every disk, the host's blob, everything that comes over hostlink or the network.
//
// Implements design.md §3 and spec/guest-os.md §5.
package boot
