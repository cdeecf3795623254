# SPDX-License-Identifier: Apache-2.0
#
# Boot sector of the accelerator probe (probe.go). Firmware loads it at 0x7c00
# from a virtio disk. It enters long mode with paging, takes ten timer
# interrupts there, and leaves through isa-debug-exit with 0x31 (exit code 99).
# A hypervisor that runs real-mode code but loses interrupts, mishandles mode
# switches or stalls in firmware does not get there.
#
# Build: as --64 -o probe.o probe.S && ld -Ttext 0x7c00 --oformat binary -o probe.bin probe.o
	.code16
	.globl _start
_start:
	cli
	cld
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp
	# Clear page tables (0x1000-0x3fff) and interrupt table (0x4000-0x4fff).
	movw $0x1000, %di
	movw $0x2000, %cx
	rep stosw
	# Identity-map the first 2 MiB: PML4 -> PDPT -> PD with one large page.
	movw $0x2003, (0x1000)
	movw $0x3003, (0x2000)
	movw $0x0083, (0x3000)
	# Vector 0x20: a 64-bit interrupt gate to isr, selector 8.
	movw $isr, (0x4200)
	movw $8, (0x4202)
	movw $0x8e00, (0x4204)
	movl $0x1000, %eax
	movl %eax, %cr3
	movl %cr4, %eax
	orb $0x20, %al			# PAE
	movl %eax, %cr4
	movl $0xc0000080, %ecx		# EFER
	rdmsr
	orb $0x01, %ah			# LME
	wrmsr
	lgdtl gdtr
	movl %cr0, %eax
	orl $0x80000001, %eax		# PG, PE
	movl %eax, %cr0
	ljmp $8, $long

	.code64
long:
	movw $16, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movl $0x7c00, %esp
	xorl %ebx, %ebx
	lidt idtr
	# Both 8259s: vectors from 0x20, only the timer unmasked.
	movb $0x11, %al
	outb %al, $0x20
	outb %al, $0xa0
	movb $0x20, %al
	outb %al, $0x21
	movb $0x28, %al
	outb %al, $0xa1
	movb $0x04, %al
	outb %al, $0x21
	movb $0x02, %al
	outb %al, $0xa1
	movb $0x01, %al
	outb %al, $0x21
	outb %al, $0xa1
	movb $0xfe, %al
	outb %al, $0x21
	movb $0xff, %al
	outb %al, $0xa1
	# 8254 channel 0, mode 2, 1193 counts = 1 ms.
	movb $0x34, %al
	outb %al, $0x43
	movb $0xa9, %al
	outb %al, $0x40
	movb $0x04, %al
	outb %al, $0x40
	sti
1:	hlt
	cmpl $10, %ebx
	jb 1b
	cli
	movb $0x31, %al
	outb %al, $0xf4
2:	hlt
	jmp 2b
isr:
	incl %ebx
	pushq %rax
	movb $0x20, %al
	outb %al, $0x20
	popq %rax
	iretq

	.balign 8
gdt:
	.quad 0
	.quad 0x00209a0000000000	# 64-bit code
	.quad 0x0000920000000000	# data
gdtr:
	.word gdtr - gdt - 1
	.long gdt
idtr:
	.word 0xfff
	.quad 0x4000
	.org 510
	.word 0xaa55
