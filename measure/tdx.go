// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure/acpi"
)

// Launch is what a host boots: the very bytes it gives to the VM, and the shape
// of the VM as far as it is measured.
type Launch struct {
	Firmware []byte
	Kernel   []byte // as in the image; QEMU's patch is applied here
	Initrd   []byte
	Cmdline  string // without the " initrd=initrd" that the firmware appends

	VCPUs       int    // only the ACPI tables depend on it
	MemoryBytes uint64 // a whole number of pages

	// ACPI is the shape of the VM that its ACPI tables follow from; its VCPUs and
	// Memory are not looked at, those above count. Nil: not known, and the three
	// ACPI events stay open.
	ACPI *acpi.Shape

	// TwoPassAddPages is the page order of QEMU 8; the zero value is that of QEMU 9
	// and later.
	TwoPassAddPages bool
}

// TDX is the expected state of a TD's registers at the start of the OS.
type TDX struct {
	MRTD  dstack.Measurement `json:"mrtd"`
	RTMR0 []RTMR0Event       `json:"rtmr0_events"`
	RTMR1 dstack.Measurement `json:"rtmr1"`
	RTMR2 dstack.Measurement `json:"rtmr2"`

	// NoACPI says why the ACPI events have no digest; nil when they have one. Codes:
	// acpi_shape_missing, acpi_shape_unsupported.
	NoACPI error `json:"-"`

	// The events behind RTMR1 and RTMR2; not part of the JSON form.
	rtmr1, rtmr2 []bootEvent
}

// RTMR0Event is one event that the firmware extends into RTMR0. A nil Digest is
// that of an ACPI table set that was not computed and is taken from elsewhere.
type RTMR0Event struct {
	Name   string              `json:"name"`
	Digest *dstack.Measurement `json:"digest"`
}

// Event types (TCG PC Client Platform Firmware Profile, §10.4.1).
const (
	evSeparator           = 0x0000_0004
	evEventTag            = 0x0000_0006
	evPlatformConfigFlags = 0x0000_000a
	evVariableDriver      = 0x8000_0001
	evBootVariable        = 0x8000_0002
	evBootApplication     = 0x8000_0003
	evAction              = 0x8000_0007
	evFirmwareBlob2       = 0x8000_000a
	evHandoffTables2      = 0x8000_000b
)

// Names of the three ACPI events (spec/attestation.md §3.2); all have the payload
// "ACPI DATA".
const (
	ACPILoader = "acpi-loader"
	ACPIRSDP   = "acpi-rsdp"
	ACPITables = "acpi-tables"
)

// rtmr0Types are the event types of RTMR0 by name.
var rtmr0Types = map[string]uint32{
	"td-hob": evHandoffTables2, "cfv": evFirmwareBlob2,
	"SecureBoot": evVariableDriver, "PK": evVariableDriver, "KEK": evVariableDriver, "db": evVariableDriver, "dbx": evVariableDriver,
	"separator": evSeparator,
	ACPILoader:  evPlatformConfigFlags, ACPIRSDP: evPlatformConfigFlags, ACPITables: evPlatformConfigFlags,
	"BootOrder": evBootVariable, "Boot0000": evBootVariable,
}

type bootEvent struct {
	name   string
	kind   uint32
	digest dstack.Measurement
}

// GUIDs of UEFI variables and of OVMF's setup application, little endian.
var (
	globalVariableGUID = guid("8be4df61-93ca-11d2-aa0d-00e098032b8c")
	securityGUID       = guid("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
	dxeVolumeGUID      = guid("7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1")
	uiAppGUID          = guid("462caa21-7614-4503-836e-8ab6f4662331")
)

func sha384(data []byte) dstack.Measurement { return dstack.Measurement(sha512.Sum384(data)) }

func extend(register *dstack.Measurement, digest dstack.Measurement) {
	*register = sha384(append(register[:], digest[:]...))
}

// ComputeTDX returns the registers of a TD that boots l by direct kernel boot. A
// shape whose ACPI tables are not computed here is no error: see TDX.NoACPI.
func ComputeTDX(l Launch) (*TDX, error) {
	f, err := newFacts(l)
	if err != nil {
		return nil, err
	}
	kernel, err := PatchKernel(l.Kernel, len(l.Initrd), l.MemoryBytes)
	if err != nil {
		return nil, err
	}
	f.kernel, err = kernelDigest(kernel)
	if err != nil {
		return nil, err
	}
	t, err := f.tdx(l.MemoryBytes, l.TwoPassAddPages)
	if err != nil || l.ACPI == nil {
		return t, err
	}
	shape := *l.ACPI
	shape.VCPUs, shape.Memory = l.VCPUs, l.MemoryBytes
	t.NoACPI = t.SetACPI(shape)
	return t, nil
}

func kernelDigest(patched []byte) (dstack.Measurement, error) {
	h := sha512.New384()
	if err := authenticode(patched, h); err != nil {
		return dstack.Measurement{}, fault.Wrap(err, fault.Code(err), "kernel")
	}
	return dstack.Measurement(h.Sum(nil)), nil
}

// facts are the inputs of the registers that do not depend on the VM's shape.
type facts struct {
	singlePass, twoPass dstack.Measurement // MRTD
	hob                 HOBLayout
	cfv                 dstack.Measurement
	kernel              dstack.Measurement // of the patched kernel
	cmdline             dstack.Measurement
	initrd              dstack.Measurement
}

func newFacts(l Launch) (facts, error) {
	var f facts
	sections, err := ParseTDVF(l.Firmware)
	if err != nil {
		return f, err
	}
	volume, err := cfv(l.Firmware, sections)
	if err != nil {
		return f, err
	}
	if f.hob, err = hobLayout(sections); err != nil {
		return f, err
	}
	cmdline, err := loadOptions(l.Cmdline)
	if err != nil {
		return f, err
	}
	if len(l.Initrd) == 0 {
		return f, fault.New("initrd_missing", "no initrd: the second event of RTMR2 would be absent")
	}
	f.singlePass = mrtd(l.Firmware, sections, false)
	f.twoPass = mrtd(l.Firmware, sections, true)
	f.cfv = sha384(volume)
	f.cmdline = sha384(cmdline)
	f.initrd = sha384(l.Initrd)
	return f, nil
}

func (f facts) tdx(memory uint64, twoPass bool) (*TDX, error) {
	hob, err := f.hob.HOB(memory)
	if err != nil {
		return nil, err
	}
	t := &TDX{
		MRTD:   f.singlePass,
		NoACPI: errNoShape(),
		rtmr1: []bootEvent{
			{"kernel", evBootApplication, f.kernel},
			{"", evAction, sha384([]byte("Calling EFI Application from Boot Option"))},
			{"", evSeparator, sha384(make([]byte, 4))},
			{"", evAction, sha384([]byte("Exit Boot Services Invocation"))},
			{"", evAction, sha384([]byte("Exit Boot Services Returned with Success"))},
		},
		rtmr2: []bootEvent{
			{"cmdline", evEventTag, f.cmdline},
			{"initrd", evEventTag, f.initrd},
		},
	}
	if twoPass {
		t.MRTD = f.twoPass
	}
	add := func(name string, digest dstack.Measurement) {
		t.RTMR0 = append(t.RTMR0, RTMR0Event{name, &digest})
	}
	add("td-hob", sha384(hob))
	add("cfv", f.cfv)
	add("SecureBoot", absentVariable(globalVariableGUID, "SecureBoot"))
	add("PK", absentVariable(globalVariableGUID, "PK"))
	add("KEK", absentVariable(globalVariableGUID, "KEK"))
	add("db", absentVariable(securityGUID, "db"))
	add("dbx", absentVariable(securityGUID, "dbx"))
	add("separator", sha384(make([]byte, 4)))
	for _, name := range []string{ACPILoader, ACPIRSDP, ACPITables} {
		t.RTMR0 = append(t.RTMR0, RTMR0Event{Name: name})
	}
	add("BootOrder", sha384(make([]byte, 2)))
	add("Boot0000", sha384(setupBootOption()))
	for _, e := range t.rtmr1 {
		extend(&t.RTMR1, e.digest)
	}
	for _, e := range t.rtmr2 {
		extend(&t.RTMR2, e.digest)
	}
	return t, nil
}

// ReplayRTMR0 returns RTMR0 with the given digests, in order, for the events that
// have none. Their number must be that of the open events (code acpi_count).
func (t *TDX) ReplayRTMR0(acpi []dstack.Measurement) (dstack.Measurement, error) {
	var register dstack.Measurement
	open := 0
	for _, e := range t.RTMR0 {
		if e.Digest != nil {
			extend(&register, *e.Digest)
			continue
		}
		if open < len(acpi) {
			extend(&register, acpi[open])
		}
		open++
	}
	if open != len(acpi) {
		return dstack.Measurement{}, fault.New("acpi_count", "%d ACPI digests for %d ACPI events of RTMR0", len(acpi), open)
	}
	return register, nil
}

// BootLog returns the launch as an event log: imr 0, 1 and 2. ACPI events that are
// open have the digest of the empty string, as suits a TEE that has no ACPI tables
// to measure. A TDX that was read from JSON does not know the events behind RTMR1 and
// RTMR2 and returns those of imr 0 only.
func (t *TDX) BootLog() []eventlog.Event {
	var events []eventlog.Event
	add := func(imr, kind uint32, name string, digest dstack.Measurement) {
		e := eventlog.Event{IMR: imr, EventType: kind, Name: name, Digest: digest[:]}
		if kind == evPlatformConfigFlags {
			e.Payload = []byte("ACPI DATA")
		}
		events = append(events, e)
	}
	for _, e := range t.RTMR0 {
		digest := sha384(nil)
		if e.Digest != nil {
			digest = *e.Digest
		}
		add(0, rtmr0Types[e.Name], e.Name, digest)
	}
	for _, e := range t.rtmr1 {
		add(1, e.kind, e.name, e.digest)
	}
	for _, e := range t.rtmr2 {
		add(2, e.kind, e.name, e.digest)
	}
	return events
}

// loadOptions is the kernel's command line as its EFI stub measures it: UTF-16LE
// with the initrd's path that the firmware appends, and a terminating zero.
func loadOptions(cmdline string) ([]byte, error) {
	if len(cmdline) > maxCmdline {
		return nil, fault.New("cmdline_malformed", "command line of %d bytes, want at most %d", len(cmdline), maxCmdline)
	}
	if !utf8.ValidString(cmdline) || strings.ContainsRune(cmdline, 0) {
		return nil, fault.New("cmdline_malformed", "command line is not UTF-8 text without zero bytes")
	}
	return append(utf16LE(cmdline+" initrd=initrd"), 0, 0), nil
}

func utf16LE(s string) []byte {
	var b []byte
	for _, unit := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, unit)
	}
	return b
}

// absentVariable is the digest of the event for a UEFI variable that does not
// exist: UEFI_VARIABLE_DATA with the name and no data.
func absentVariable(vendor [16]byte, name string) dstack.Measurement {
	b := append([]byte(nil), vendor[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(name)))
	b = binary.LittleEndian.AppendUint64(b, 0)
	return sha384(append(b, utf16LE(name)...))
}

// setupBootOption is the EFI_LOAD_OPTION that OVMF creates as Boot0000: active,
// hidden, category application, description "UiApp", device path
// Fv(DXE)/FvFile(UiApp).
func setupBootOption() []byte {
	node := func(subtype byte, id [16]byte) []byte {
		return append([]byte{4, subtype, 20, 0}, id[:]...)
	}
	path := append(node(7, dxeVolumeGUID), node(6, uiAppGUID)...)
	path = append(path, 0x7f, 0xff, 4, 0)
	b := binary.LittleEndian.AppendUint32(nil, 0x109)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(path)))
	b = append(append(b, utf16LE("UiApp")...), 0, 0)
	return append(b, path...)
}

// guid parses a GUID constant into its mixed-endian byte form.
func guid(s string) (g [16]byte) {
	var b [16]byte
	n := 0
	for i := 0; i < len(s); i++ {
		if s[i] == '-' {
			continue
		}
		b[n/2] = b[n/2]<<4 | byte(strings.IndexByte("0123456789abcdef", s[i]))
		n++
	}
	copy(g[8:], b[8:])
	binary.LittleEndian.PutUint32(g[:], binary.BigEndian.Uint32(b[:]))
	binary.LittleEndian.PutUint16(g[4:], binary.BigEndian.Uint16(b[4:]))
	binary.LittleEndian.PutUint16(g[6:], binary.BigEndian.Uint16(b[6:]))
	return g
}

// PCR9Cmdline is the digest that the kernel's EFI stub extends into PCR 9 of a
// TPM for a command line given by direct kernel boot under OVMF.
func PCR9Cmdline(cmdline string) [sha256.Size]byte {
	return sha256.Sum256(append(utf16LE(cmdline+" initrd=initrd"), 0, 0))
}

// PCR9Initrd is the digest that the kernel's EFI stub extends into PCR 9 of a TPM
// for the initrd.
func PCR9Initrd(initrd []byte) [sha256.Size]byte { return sha256.Sum256(initrd) }
