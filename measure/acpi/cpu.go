// SPDX-License-Identifier: Apache-2.0

package acpi

import (
	"encoding/binary"
	"fmt"
)

// Commands of the register interface for processors that come and go
// (QEMU docs/specs/acpi_cpu_hotplug.rst).
const (
	cpuNextEvent = 0
	cpuOSTEvent  = 1
	cpuOSTStatus = 2
)

// batch is how many processors CSCN collects at a time: the largest package of
// ACPI 1.0.
const batch = 255

// register is a field of the interface.
func cpuRegister(field string) []byte { return name(`\_SB.PCI0.PRES.` + field) }

const cpuLock = `\_SB.PCI0.PRES.CPLK`

// processors are the processors and what lets the guest follow their coming and
// going; a shape never adds any, yet QEMU describes it.
func (s *Shape) processors(p profile) []byte {
	registers := [][]byte{
		define("_HID", eisaID("PNP0A06")),
		define("_UID", text("CPU Hotplug resources")),
		mutex("CPLK"),
		define("_CRS", resources(ioPorts(cpuHotplug, 1, 12))),
		opRegion("PRST", systemIO, cpuHotplug, 12),
		field("PRST", byteAccess|writeAsZeros,
			gap(32), bits("CPEN", 1), bits("CINS", 1), bits("CRMV", 1), bits("CEJ0", 1), bits("CEJF", 1), gap(3), bits("CCMD", 8)),
		field("PRST", dwordAccess, bits("CSEL", 32), gap(32), bits("CDAT", 32)),
	}
	if p.legacyCPUHotplug {
		registers = append(registers, serialized("_INI", 0, store(zero, name("CSEL"))))
	}

	var notifications [][]byte
	for i := range s.VCPUs {
		notifications = append(notifications,
			ifThen(equal(arg(0), integer(uint64(i))), notify(name(cpuName(i)), arg(1))))
	}
	body := [][]byte{
		define("_HID", text("ACPI0010")),
		define("_CID", eisaID("PNP0A05")),
		method("CTFY", 2, notifications...),
		serialized("CSTA", 1,
			lock(cpuLock),
			store(arg(0), cpuRegister("CSEL")),
			store(zero, local(0)),
			ifThen(equal(cpuRegister("CPEN"), one), store(integer(0x0f), local(0))),
			unlock(cpuLock),
			ret(local(0))),
		serialized("CEJ0", 1,
			lock(cpuLock),
			store(arg(0), cpuRegister("CSEL")),
			store(one, cpuRegister("CEJ0")),
			unlock(cpuLock)),
		s.scanProcessors(p),
		serialized("COST", 4,
			lock(cpuLock),
			store(arg(0), cpuRegister("CSEL")),
			store(integer(cpuOSTEvent), cpuRegister("CCMD")),
			store(arg(1), cpuRegister("CDAT")),
			store(integer(cpuOSTStatus), cpuRegister("CCMD")),
			store(arg(2), cpuRegister("CDAT")),
			unlock(cpuLock)),
	}
	for i := range s.VCPUs {
		body = append(body, s.processor(i))
	}
	return seq(
		scope("_SB", device(`\_SB.PCI0.PRES`, registers...), device(`\_SB.CPUS`, body...)),
		method(`\_GPE._E02`, 0, call(`\_SB.CPUS.CSCN`)))
}

func cpuName(i int) string { return fmt.Sprintf("C%03X", i) }

// scanProcessors is CSCN: find the processors with events, in batches, and tell
// the guest of them.
func (s *Shape) scanProcessors(p profile) []byte {
	hasEvent, added, i, uid, hasJob, ejected := local(0), local(1), local(2), local(3), local(4), local(5)
	full := integer(batch)
	remember := func(list string, count []byte) []byte {
		return seq(
			store(uid, index(name(list), count)),
			increment(count),
			store(one, hasEvent))
	}
	// report tells the guest of the processors in a list, then clears their event.
	report := func(list string, count []byte, event uint64, register string, debug []byte) []byte {
		return seq(
			store(zero, i),
			while(lessThan(i, count),
				store(derefOf(index(name(list), i)), uid),
				call("CTFY", uid, integer(event)),
				debug,
				store(uid, cpuRegister("CSEL")),
				store(one, cpuRegister(register)),
				increment(i)))
	}
	const deviceCheck, ejectRequest = 1, 3
	lists := define("CNEW", pkg(batch))
	counts := store(zero, added)
	isFull := equal(added, full)
	removal := ifThen(equal(cpuRegister("CRMV"), one), remember("CEJL", ejected))
	reports := report("CNEW", added, deviceCheck, "CINS", store(uid, extOp(0x31)))
	if p.ejectAtOnce {
		removal = otherwise(ifThen(equal(cpuRegister("CRMV"), one),
			call("CTFY", uid, integer(ejectRequest)),
			store(one, cpuRegister("CRMV")),
			store(one, hasEvent)))
	} else {
		lists = seq(lists, define("CEJL", pkg(batch)))
		counts = seq(counts, store(zero, ejected))
		isFull = eitherTrue(isFull, equal(ejected, full))
		reports = seq(reports, report("CEJL", ejected, ejectRequest, "CRMV", nil))
	}
	return serialized("CSCN", 0,
		lock(cpuLock),
		lists,
		store(zero, uid),
		store(one, hasJob),
		while(equal(hasJob, one),
			store(zero, hasJob),
			store(one, hasEvent),
			counts,
			while(bothTrue(equal(hasEvent, one), lessThan(uid, integer(uint64(s.VCPUs)))),
				store(zero, hasEvent),
				store(uid, cpuRegister("CSEL")),
				store(integer(cpuNextEvent), cpuRegister("CCMD")),
				ifThen(lessThan(cpuRegister("CDAT"), uid), leaveLoop()),
				ifThen(isFull, store(one, hasJob), leaveLoop()),
				store(cpuRegister("CDAT"), uid),
				ifThen(equal(cpuRegister("CINS"), one), remember("CNEW", added)),
				removal,
				increment(uid)),
			reports),
		unlock(cpuLock))
}

// processor is one processor. From local APIC number 255 on it is a device, since
// the old form has one byte for the number.
func (s *Shape) processor(i int) []byte {
	uid := integer(uint64(i))
	body := [][]byte{
		serialized("_STA", 0, ret(call("CSTA", uid))),
		define("_MAT", buffer(apicEntry(i))),
	}
	if i > 0 { // the first one cannot be removed
		body = append(body, method("_EJ0", 1, call("CEJ0", uid)))
	}
	body = append(body, serialized("_OST", 3, call("COST", uid, arg(0), arg(1), arg(2))))
	if s.NUMA {
		body = append(body, define("_PXM", zero))
	}
	if i < 255 {
		return processor(cpuName(i), byte(i), body...)
	}
	return device(cpuName(i), append([][]byte{define("_HID", text("ACPI0007")), define("_UID", uid)}, body...)...)
}

// apicEntry describes an enabled processor in the MADT: its local APIC, or x2APIC
// from number 255 on (ACPI 6.5, §5.2.12.2 and §5.2.12.12).
func apicEntry(i int) []byte {
	if i < 255 {
		return []byte{0, 8, byte(i), byte(i), 1, 0, 0, 0}
	}
	out := binary.LittleEndian.AppendUint32([]byte{9, 16, 0, 0}, uint32(i))
	out = binary.LittleEndian.AppendUint32(out, 1)
	return binary.LittleEndian.AppendUint32(out, uint32(i))
}
