// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"encoding/binary"
	"slices"

	"github.com/dstack-go/dstack/internal/fault"
)

// Offsets into the x86 boot protocol header (Documentation/arch/x86/boot.rst).
const (
	hdrMagic        = 0x202
	hdrProtocol     = 0x206
	hdrLoader       = 0x210
	hdrLoadflags    = 0x211
	hdrInitrdAddr   = 0x218
	hdrInitrdSize   = 0x21c
	hdrHeapEnd      = 0x224
	hdrCmdline      = 0x228
	hdrInitrdMax    = 0x22c
	hdrXloadflags   = 0x236
	minKernel       = 0x1000
	acpiDataSize    = 0x28000 // QEMU keeps this much below the end of low memory
	loadedHigh      = 1 << 0
	canUseHeap      = 1 << 7
	canLoadAbove4G  = 1 << 1
	oldInitrdMax    = 0x37ff_ffff
	loaderQEMU      = 0xb0
	qemuHighReal    = 0x10000
	qemuHighCmdline = 0x20000
)

func badKernel(format string, args ...any) error {
	return fault.New("kernel_malformed", "kernel: "+format, args...)
}

// PatchKernel returns the kernel as QEMU hands it to the firmware: a copy with
// loader type, heap end, command line and initrd addresses written into its setup
// header (spec/measurement.md §5.1; QEMU hw/i386/x86-common.c, x86_load_linux).
// The initrd address follows from its size and from the memory of the VM, and is
// the same for 2 GiB and for everything from 2816 MiB ([KernelIsConstant]).
//
// It differs from upstream's rule in one bit that no current kernel shows: the
// flag that lifts the limit on the initrd is XLF_CAN_BE_LOADED_ABOVE_4G, bit 1, as
// QEMU has it, not bit 6.
func PatchKernel(kernel []byte, initrdSize int, memory uint64) ([]byte, error) {
	if len(kernel) < minKernel || len(kernel) > maxKernel {
		return nil, badKernel("%d bytes, want %d to %d", len(kernel), minKernel, maxKernel)
	}
	if string(kernel[hdrMagic:hdrMagic+4]) != "HdrS" {
		return nil, badKernel("no boot protocol header (not a bzImage)")
	}
	if err := checkMemory(memory); err != nil {
		return nil, err
	}
	if initrdSize < 0 || int64(initrdSize) > 0xffff_ffff {
		return nil, fault.New("initrd_too_large", "initrd of %d bytes", initrdSize)
	}
	le := binary.LittleEndian
	protocol := le.Uint16(kernel[hdrProtocol:])
	if protocol < 0x202 || kernel[hdrLoadflags]&loadedHigh == 0 {
		// The older forms put the real-mode part at 0x90000; they end before 64-bit
		// kernels begin.
		return nil, badKernel("boot protocol %#x with load flags %#x cannot start a 64-bit kernel", protocol, kernel[hdrLoadflags])
	}
	k := slices.Clone(kernel)
	k[hdrLoader] = loaderQEMU
	k[hdrLoadflags] |= canUseHeap
	le.PutUint32(k[hdrHeapEnd:], qemuHighCmdline-qemuHighReal-0x200)
	le.PutUint32(k[hdrCmdline:], qemuHighCmdline)
	if initrdSize == 0 {
		return k, nil
	}

	initrdMax := uint64(oldInitrdMax)
	switch {
	case protocol >= 0x20c && le.Uint16(k[hdrXloadflags:])&canLoadAbove4G != 0:
		initrdMax = 0xffff_ffff
	case protocol >= 0x203 && le.Uint32(k[hdrInitrdMax:]) != 0:
		initrdMax = uint64(le.Uint32(k[hdrInitrdMax:]))
	}
	low := uint64(lowMemory)
	if memory >= lowMemory {
		low = highSplit
	}
	below4G := min(memory, low)
	if below4G <= acpiDataSize {
		return nil, fault.New("initrd_too_large", "%d bytes of memory hold no initrd", memory)
	}
	initrdMax = min(initrdMax, below4G-acpiDataSize-1)
	if uint64(initrdSize) >= initrdMax {
		return nil, fault.New("initrd_too_large", "initrd of %d bytes does not fit below %#x", initrdSize, initrdMax)
	}
	le.PutUint32(k[hdrInitrdAddr:], uint32(initrdMax-uint64(initrdSize))&^0xfff)
	le.PutUint32(k[hdrInitrdSize:], uint32(initrdSize))
	return k, nil
}

// KernelIsConstant reports whether the patched kernel of a VM with this much
// memory is the one of every VM with much memory, so that a measurement document
// applies.
func KernelIsConstant(memory uint64) bool { return memory == highSplit || memory >= lowMemory }
