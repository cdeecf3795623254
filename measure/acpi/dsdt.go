// SPDX-License-Identifier: Apache-2.0

package acpi

import "fmt"

// I/O ports and addresses of the q35 machine, as OVMF programs it.
const (
	debugPort  = 0x402
	fwCfgPort  = 0x510
	pmBase     = 0x600
	gpeBlock   = pmBase + 0x20
	gpeLength  = 16
	pciHotplug = 0xcc0
	cpuHotplug = 0xcd8
	ioAPIC     = 0xfec0_0000
	localAPIC  = 0xfee0_0000
	hpetBase   = 0xfed0_0000
)

var zero, one = integer(0), integer(1)

// dsdt is the body of the Differentiated System Description Table.
func (s *Shape) dsdt(p profile) []byte {
	return seq(
		debugOutput(),
		s.hostBridge(),
		s.pciHotplugRegisters(p),
		interruptRouting(p),
		s.hpet(),
		scope("_GPE", define("_HID", text("ACPI0006"))),
		s.processors(p),
		s.windows(),
		sleepStates(),
		scope(`\_SB.PCI0`, device("FWCF",
			define("_HID", text("QEMU0002")),
			define("_STA", integer(0x0b)),
			define("_CRS", resources(ioPorts(fwCfgPort, 1, 12))))),
		scope(`\_SB`, scope("PCI0", s.devices(p))),
		s.pciHotplugEvents(),
	)
}

// debugOutput is a method that prints to QEMU's debug port.
func debugOutput() []byte {
	buf, length, i := local(0), local(1), local(2)
	return scope(`\`,
		opRegion("DBG", systemIO, debugPort, 1),
		field("DBG", byteAccess, bits("DBGB", 8)),
		method("DBUG", 1,
			op(0x98, arg(0), buf), // ToHexString
			op(0x96, buf, buf),    // ToBuffer
			subtract(op(0x87, buf), one, length),
			store(zero, i),
			while(lessThan(i, length),
				store(derefOf(index(buf, i)), name("DBGB")),
				increment(i)),
			store(integer('\n'), name("DBGB"))))
}

// uuid is a UUID in the mixed byte order of a ToUUID buffer.
func uuid(u ...byte) []byte {
	return buffer([]byte{u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6],
		u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]})
}

func (s *Shape) hostBridge() []byte {
	return scope("_SB",
		device("PCI0",
			define("_HID", eisaID("PNP0A08")),
			define("_CID", eisaID("PNP0A03")),
			define("_UID", zero),
			s.negotiate(),
			staticLabel()),
		device("DRAC",
			define("_HID", text("PNP0C01")),
			define("_CRS", resources(dwords(readWrite, s.configBase(), s.configBase()+configLength-1)))))
}

// negotiate is _OSC: which features of PCI Express the guest may drive itself (PCI
// Firmware Specification 3.3, §4.5). Native hotplug only when ACPI's is off.
func (s *Shape) negotiate() []byte {
	allowed := uint64(0x1e)
	if s.HotplugOff {
		allowed = 0x1f
	}
	status, control := name("CDW1"), local(0)
	return method("_OSC", 4,
		dwordField(arg(3), 0, "CDW1"),
		ifThen(equal(arg(0), uuid(0x33, 0xdb, 0x4d, 0x5b, 0x1f, 0xf7, 0x40, 0x1c, 0x96, 0x57, 0x74, 0x41, 0xc0, 0x3d, 0xd7, 0x66)),
			dwordField(arg(3), 4, "CDW2"),
			dwordField(arg(3), 8, "CDW3"),
			store(name("CDW3"), control),
			and(control, integer(allowed), control),
			ifThen(not(equal(arg(1), one)), or(status, integer(8), status)),
			ifThen(not(equal(name("CDW3"), control)), or(status, integer(0x10), status)),
			store(control, name("CDW3"))),
		otherwise(or(status, integer(4), status)),
		ret(arg(3)))
}

// labelQuery is the common start of answers to _DSM function 0: nothing for other
// UUIDs and older revisions (PCI Firmware Specification 3.3, §4.6).
func labelQuery(result []byte) []byte {
	return seq(
		store(buffer([]byte{0}), result),
		ifThen(not(equal(arg(0), uuid(0xe5, 0xc9, 0x37, 0xd0, 0x35, 0x53, 0x4d, 0x7a, 0x91, 0x17, 0xea, 0x4d, 0x19, 0xc3, 0x43, 0x4d))),
			ret(result)),
		ifThen(lessThan(arg(1), integer(2)), ret(result)))
}

// staticLabel answers _DSM for devices that cannot be unplugged.
func staticLabel() []byte {
	function, params := arg(2), arg(4)
	result, label := local(0), local(1)
	return serialized("EDSM", 5,
		ifThen(equal(function, zero),
			labelQuery(result),
			store(integer(1|1<<7), index(result, zero)),
			ret(result)),
		ifThen(equal(function, integer(7)),
			store(pkg(2, zero, text("")), result),
			store(derefOf(index(params, zero)), label),
			store(label, index(result, zero)),
			ret(result)))
}

// pciHotplugRegisters are the ports through which slots are reported and ejected.
func (s *Shape) pciHotplugRegisters(p profile) []byte {
	if s.HotplugOff {
		return nil
	}
	selectSlot := func(target string) []byte {
		return seq(
			lock("BLCK"),
			store(arg(0), name("BNUM")),
			store(shiftLeft(one, arg(1)), name(target)))
	}
	return scope("_SB.PCI0",
		opRegion("PCST", systemIO, pciHotplug, 8),
		field("PCST", dwordAccess|writeAsZeros, bits("PCIU", 32), bits("PCID", 32)),
		opRegion("SEJ", systemIO, pciHotplug+8, 4),
		field("SEJ", dwordAccess|writeAsZeros, bits("B0EJ", 32)),
		opRegion("BNMR", systemIO, pciHotplug+16, 8),
		field("BNMR", dwordAccess|writeAsZeros, bits("BNUM", 32), bits("PIDX", 32)),
		mutex("BLCK"),
		method("PCEJ", 2,
			selectSlot("B0EJ"),
			unlock("BLCK"),
			ret(zero)),
		method("AIDX", 2,
			selectSlot("PIDX"),
			store(name("PIDX"), local(0)),
			unlock("BLCK"),
			ret(local(0))),
		slotLabel(p))
}

// slotLabel answers _DSM for devices in slots: the index that QEMU's acpi-index
// gave them.
func slotLabel(p profile) []byte {
	function, params := arg(2), arg(4)
	result, caps, label := local(0), local(1), local(2)
	param := func(i []byte) []byte { return derefOf(index(params, i)) }
	readLabel := store(call("AIDX", param(zero), param(one)), label)
	unknown := integer(0xffff_ffff)

	answer := seq(
		readLabel,
		store(pkg(2), result),
		ifThen(not(eitherTrue(equal(label, zero), equal(label, unknown))),
			store(label, index(result, zero)),
			store(text(""), index(result, one))))
	if p.plainLabel {
		answer = seq(
			store(pkg(2, zero, text("")), result),
			readLabel,
			store(label, index(result, zero)))
	}
	return serialized("PDSM", 5,
		ifThen(equal(function, zero),
			labelQuery(result),
			store(zero, caps),
			readLabel,
			ifThen(not(or(equal(label, zero), equal(label, unknown), none)),
				or(caps, one, caps),
				or(caps, shiftLeft(one, integer(7)), caps)),
			store(caps, index(result, zero)),
			ret(result)),
		ifThen(equal(function, integer(7)), answer, ret(result)))
}

// interruptRouting is the routing of PCI interrupts: links A to H in PIC mode,
// global interrupts 16 to 23 in APIC mode.
func interruptRouting(p profile) []byte {
	links := [][]byte{
		scope("PCI0",
			define("PRTP", routes("LNK")),
			define("PRTA", routes("GSI")),
			method("_PRT", 0,
				ifThen(equal(name("PICF"), zero), ret(name("PRTP"))),
				otherwise(ret(name("PRTA"))))),
		method("IQST", 1,
			ifThen(and(integer(0x80), arg(0), none), ret(integer(9))),
			ret(integer(0x0b))),
		serialized("IQCR", 1,
			define("PRR0", resources(interrupts(p.edgeTriggered, 0))),
			dwordField(name("PRR0"), 5, "PRRI"),
			store(and(arg(0), integer(0x0f), none), name("PRRI")),
			ret(name("PRR0"))),
	}
	for i := range byte(8) {
		register := name("PRQ" + string('A'+rune(i)))
		links = append(links, device("LNK"+string('A'+rune(i)),
			define("_HID", eisaID("PNP0C0F")),
			define("_UID", integer(uint64(i))),
			define("_PRS", resources(interrupts(p.edgeTriggered, 5, 10, 11))),
			method("_STA", 0, ret(call("IQST", register))),
			method("_DIS", 0, or(register, integer(0x80), register)),
			method("_CRS", 0, ret(call("IQCR", register))),
			method("_SRS", 1,
				dwordField(arg(0), 5, "PRRI"),
				store(name("PRRI"), register))))
	}
	for i := range byte(8) {
		current := resources(interrupts(p.edgeTriggered, 16+i))
		links = append(links, device("GSI"+string('A'+rune(i)),
			define("_HID", eisaID("PNP0C0F")),
			define("_UID", integer(uint64(16+i))),
			define("_PRS", current),
			define("_CRS", current),
			method("_DIS", 0),
			method("_SRS", 1)))
	}
	return seq(
		define("PICF", zero),
		method("_PIC", 1, store(arg(0), name("PICF"))),
		scope("_SB", links...))
}

// routes is a routing table for 32 slots with 4 pins each; prefix names the links
// of one interrupt mode. Slots 0 to 24 and 30 use links E to H, starting at
// another one each, the others A to D.
func routes(prefix string) []byte {
	var entries [][]byte
	for slot := range 32 {
		first, group := slot%4, 'E'
		switch {
		case slot == 24 || slot == 30:
			first = 0
		case slot > 24:
			first, group = 0, 'A'
		}
		for pin := range 4 {
			link := prefix + string(group+rune((first+pin)%4))
			entries = append(entries, pkg(4, integer(uint64(slot)<<16|0xffff), integer(uint64(pin)), name(link), zero))
		}
	}
	return pkg(len(entries), entries...)
}

func (s *Shape) hpet() []byte {
	if !s.HPET {
		return nil
	}
	id, period := local(0), local(1)
	return scope("_SB", device("HPET",
		define("_HID", eisaID("PNP0103")),
		define("_UID", zero),
		opRegion("HPTM", systemMemory, hpetBase, 0x400),
		field("HPTM", dwordAccess|lockField, bits("VEND", 32), bits("PRD", 32)),
		method("_STA", 0,
			store(name("VEND"), id),
			store(name("PRD"), period),
			shiftRight(id, integer(16), id),
			ifThen(eitherTrue(equal(id, zero), equal(id, integer(0xffff))), ret(zero)),
			ifThen(eitherTrue(equal(period, zero), greaterThan(period, integer(100_000_000))), ret(zero)),
			ret(integer(0x0f))),
		define("_CRS", resources(memory32(hpetBase, 0x400)))))
}

// windows are the address ranges that the PCI root bridge hands on, and the ports
// that ACPI itself takes.
func (s *Shape) windows() []byte {
	// What is left of the 32-bit window around the configuration space.
	var window32 []byte
	if low, config := s.lowMemory(), s.configBase(); low < config {
		window32 = dwords(readWrite, low, config-1)
	}
	window32 = append(window32, dwords(readWrite, s.configBase()+configLength, ioAPIC-1)...)
	crs := resources(
		words(busRange, 0, 0, 0xff),
		ioPorts(0xcf8, 1, 8),
		words(ioRange, entireRange, 0, 0xcf7),
		words(ioRange, entireRange, 0xd00, 0xffff),
		dwords(rwAndCaching, 0xa_0000, 0xb_ffff),
		window32,
		qwords(rwAndCaching, s.hole64Base(), s.hole64End()-1))
	reserve := func(object, what string, ports []byte) []byte {
		return device(object,
			define("_HID", text("PNP0A06")),
			define("_UID", text(what)),
			define("_STA", integer(0x0b)),
			define("_CRS", resources(ports)))
	}
	body := [][]byte{
		define("_CRS", crs),
		reserve("GPE0", "GPE0 resources", ioPorts(gpeBlock, 1, gpeLength)),
	}
	if !s.HotplugOff {
		body = append(body, reserve("PHPR", "PCI Hotplug resources", ioPorts(pciHotplug, 1, 0x18)))
	}
	return scope(`\_SB.PCI0`, body...)
}

func sleepStates() []byte {
	state := func(object string, n uint64) []byte {
		return define(object, pkg(4, integer(n), integer(n), zero, zero))
	}
	return scope(`\`, state("_S3", 1), state("_S4", 2), state("_S5", 0))
}

// slotName is the name of function 0 in a slot of pcie.0.
func slotName(slot int) string { return fmt.Sprintf("S%02X", slot<<3) }

// devices are those of pcie.0.
func (s *Shape) devices(p profile) []byte {
	function := func(devfn int, body ...[]byte) []byte {
		address := define("_ADR", integer(uint64(devfn>>3<<16|devfn&7)))
		return device(fmt.Sprintf("S%02X", devfn), append([][]byte{address}, body...)...)
	}
	all := [][]byte{function(0)}
	// QEMU numbers the buses from the last one to the first.
	bus := s.rootPorts()
	for i, slot := range s.Slots {
		if slot == Endpoint {
			all = append(all, function((i+1)<<3))
			continue
		}
		bus--
		behind := function(0)
		if !s.HotplugOff {
			behind = seq(behind, hotplugSlot(uint64(bus)))
		}
		all = append(all, function((i+1)<<3, behind))
	}
	all = append(all,
		function(31<<3, s.lpc(p)),
		function(31<<3|2), // SATA
		function(31<<3|3)) // SMBus
	return seq(all...)
}

func (s *Shape) rootPorts() int {
	n := 0
	for _, slot := range s.Slots {
		if slot == RootPort {
			n++
		}
	}
	return n
}

// hotplugSlot makes the only slot behind a root port one that can be ejected. bus
// is the number by which the hotplug registers know the port's bus.
func hotplugSlot(bus uint64) []byte {
	params := local(0)
	return seq(
		define("BSEL", integer(bus)),
		scope("S00",
			define("ASUN", zero),
			serialized("_DSM", 4,
				store(pkg(2, zero, zero), params),
				store(name("BSEL"), index(params, zero)),
				store(name("ASUN"), index(params, one)),
				ret(call("PDSM", arg(0), arg(1), arg(2), arg(3), params))),
			define("_SUN", zero),
			method("_EJ0", 1, call("PCEJ", name("BSEL"), name("_SUN")))),
		method("DVNT", 2,
			ifThen(and(arg(0), one, none), notify(name("S00"), arg(1)))))
}

// pciHotplugEvents are the methods that tell the guest which slots changed.
func (s *Shape) pciHotplugEvents() []byte {
	if s.HotplugOff {
		return nil
	}
	var ports, calls [][]byte
	bus := uint64(0)
	for i := len(s.Slots) - 1; i >= 0; i-- {
		if s.Slots[i] != RootPort {
			continue
		}
		port := slotName(i + 1)
		ports = append(ports, scope(port, method("PCNT", 0,
			store(integer(bus), name("BNUM")),
			call("DVNT", name("PCIU"), integer(1)),
			call("DVNT", name("PCID"), integer(3)))))
		calls = append(calls, call("^"+port+".PCNT"))
		bus++
	}
	if len(ports) == 0 {
		return scope("_GPE", method("_E01", 0))
	}
	return seq(
		scope(`\_SB.PCI0`, seq(ports...), method("PCNT", 0, calls...)),
		scope("_GPE", method("_E01", 0,
			lock(`\_SB.PCI0.BLCK`),
			call(`\_SB.PCI0.PCNT`),
			unlock(`\_SB.PCI0.BLCK`))))
}

// lpc is the content of the ISA bridge.
func (s *Shape) lpc(p profile) []byte {
	present := define("_STA", integer(0x0f))
	var registers [][]byte
	for i := range 8 {
		if i == 4 {
			registers = append(registers, gap(32))
		}
		registers = append(registers, bits("PRQ"+string('A'+rune(i)), 8))
	}
	var serial []byte
	if s.Serial {
		irq := isaIRQ(4)
		if p.sharedSerialIRQ {
			irq = sharedISAIRQ(4)
		}
		serial = device("COM1",
			define("_HID", eisaID("PNP0501")),
			define("_UID", one),
			present,
			define("_CRS", resources(ioPorts(0x3f8, 0, 8), irq)))
	}
	return seq(
		opRegion("PIRQ", pciConfig, 0x60, 0x0c),
		scope(`\_SB`, field("PCI0.SF8.PIRQ", byteAccess, registers...)),
		device("KBD",
			define("_HID", eisaID("PNP0303")),
			present,
			define("_CRS", resources(ioPorts(0x60, 1, 1), ioPorts(0x64, 1, 1), isaIRQ(1)))),
		device("MOU",
			define("_HID", eisaID("PNP0F13")),
			present,
			define("_CRS", resources(isaIRQ(12)))),
		serial,
		device("RTC",
			define("_HID", eisaID("PNP0B00")),
			define("_CRS", resources(ioPorts(0x70, 1, 8), isaIRQ(8)))))
}
