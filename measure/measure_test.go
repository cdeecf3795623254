// SPDX-License-Identifier: Apache-2.0

package measure_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/measure/measuretest"
)

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want code %s", code)
	}
	if fault.Code(err) != code {
		t.Fatalf("error %q has code %q, want %q", err, fault.Code(err), code)
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// vectors is the part of computed_vectors.json that concerns this package.
type vectors struct {
	TDHOB struct {
		Witness string      `json:"witness"`
		Base    uint64      `json:"td_hob_base"`
		Ranges  [][2]uint64 `json:"ranges"`
		Cases   []struct {
			Memory uint64             `json:"memory_size"`
			HOB    string             `json:"hob"`
			SHA384 dstack.Measurement `json:"sha384"`
		} `json:"cases"`
	} `json:"td_hob"`
	RTMR0 map[string]dstack.Measurement `json:"rtmr0_fixed_digests"`
	RTMR1 []dstack.Measurement          `json:"rtmr1_fixed_digests"`
}

func loadVectors(t *testing.T) vectors {
	var v vectors
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/computed_vectors.json"), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestTDHOBVectors(t *testing.T) {
	v := loadVectors(t).TDHOB
	layout := measure.HOBLayout{HOBPage: v.Base / 4096}
	for _, r := range v.Ranges {
		layout.Ranges = append(layout.Ranges, measure.PageRange{Start: r[0] / 4096, Count: (r[1] - r[0]) / 4096})
	}
	if len(v.Cases) == 0 {
		t.Fatal("no cases")
	}
	for _, c := range v.Cases {
		hob, err := layout.HOB(c.Memory)
		if err != nil {
			t.Fatalf("memory %#x: %v", c.Memory, err)
		}
		if hex.EncodeToString(hob) != c.HOB || dstack.Measurement(sha512.Sum384(hob)) != c.SHA384 {
			t.Errorf("memory %#x: HOB %x, want %s", c.Memory, hob, c.HOB)
		}
	}
}

func TestTDHOBRefusesMemoryItCannotLayOut(t *testing.T) {
	layout := measure.HOBLayout{HOBPage: 0x809, Ranges: []measure.PageRange{{Start: 0x809, Count: 2}}}
	for name, memory := range map[string]uint64{"memory that ends below the HOB": 0x809000, "memory that ends at the HOB": 0x80b000} {
		t.Run(name, func(t *testing.T) { _, err := layout.HOB(memory); wantCode(t, err, "td_hob_malformed") })
	}
	for name, memory := range map[string]uint64{"none": 0, "half a page": 1<<30 + 2048, "more than any machine has": 1 << 63} {
		t.Run(name, func(t *testing.T) { _, err := layout.HOB(memory); wantCode(t, err, "memory_size") })
	}
}

// getQuote is a GetQuote reply of real hardware.
type getQuote struct {
	Quote    string `json:"quote"`
	EventLog string `json:"event_log"`
	VMConfig string `json:"vm_config"`
}

func loadGetQuote(t *testing.T, name string) (q getQuote, register func(offset int) dstack.Measurement, events []eventlog.Event) {
	if err := json.Unmarshal(testkit.Vectors(t, name), &q); err != nil {
		t.Fatal(err)
	}
	quote := unhex(t, q.Quote)
	events, err := eventlog.ParseJSON([]byte(q.EventLog))
	if err != nil {
		t.Fatal(err)
	}
	return q, func(offset int) dstack.Measurement { return dstack.Measurement(quote[offset:][:48]) }, events
}

// Offsets of registers in a version 4 quote (spec/attestation.md §2).
const (
	mrtdAt  = 184
	rtmr0At = 376
	rtmr1At = 424
	rtmr2At = 472
)

func acpiDigests(events []eventlog.Event) (digests []dstack.Measurement) {
	for _, e := range events {
		if e.IMR == 0 && e.EventType == 10 {
			digests = append(digests, dstack.Measurement(e.Digest))
		}
	}
	return digests
}

func TestRealQuoteReproducesFromItsMeasurementDocument(t *testing.T) {
	q, register, events := loadGetQuote(t, "attestation/tdx/tdx-lite-getquote.json")
	config, err := measure.ParseVMConfig([]byte(q.VMConfig))
	if err != nil {
		t.Fatal(err)
	}
	if !config.Lite() || config.NumNICs != 1 {
		t.Fatalf("config = %+v", config)
	}
	image, err := dstack.ParseImageHash(config.OSImageHash)
	if err != nil {
		t.Fatal(err)
	}
	if err := config.TDXMeasurement.Bind(image, measure.TDXDocumentName); err != nil {
		t.Fatal(err)
	}
	doc, err := measure.ParseTDXDocument(config.TDXMeasurement.Measurement)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := doc.Marshal(); err != nil || !bytes.Equal(again, config.TDXMeasurement.Measurement) {
		t.Fatalf("document does not survive parsing and writing: %x, %v", again, err)
	}
	twoPass, err := config.TwoPass()
	if err != nil || !twoPass {
		t.Fatalf("TwoPass = %v, %v; QEMU 8.2.2 adds pages in two passes", twoPass, err)
	}
	tdx, err := doc.TDX(config.MemorySize, twoPass)
	if err != nil {
		t.Fatal(err)
	}
	rtmr0, err := tdx.ReplayRTMR0(acpiDigests(events))
	if err != nil {
		t.Fatal(err)
	}
	got := []dstack.Measurement{tdx.MRTD, rtmr0, tdx.RTMR1, tdx.RTMR2}
	want := []dstack.Measurement{register(mrtdAt), register(rtmr0At), register(rtmr1At), register(rtmr2At)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("registers differ from the quote's (-quote +computed):\n%s", diff)
	}

	t.Run("and its boot log is the firmware's, digest by digest", func(t *testing.T) {
		ours := tdx.BootLog()
		for imr := range uint32(3) {
			of := func(events []eventlog.Event) (list []string) {
				for _, e := range events {
					if e.IMR != imr {
						continue
					}
					digest := hex.EncodeToString(e.Digest)
					if e.EventType == 10 {
						digest = "ACPI"
					}
					list = append(list, hex.EncodeToString(binary.BigEndian.AppendUint32(nil, e.EventType))+" "+digest)
				}
				return list
			}
			if diff := cmp.Diff(of(events), of(ours)); diff != "" {
				t.Errorf("imr %d (-firmware +ours):\n%s", imr, diff)
			}
		}
	})
	t.Run("but not with the other page order", func(t *testing.T) {
		other, err := doc.TDX(config.MemorySize, false)
		if err != nil {
			t.Fatal(err)
		}
		if other.MRTD == register(mrtdAt) {
			t.Fatal("single-pass MRTD equals the quote's")
		}
	})
	t.Run("but not with one ACPI digest changed", func(t *testing.T) {
		acpi := acpiDigests(events)
		acpi[1][0] ^= 1
		if changed, _ := tdx.ReplayRTMR0(acpi); changed == register(rtmr0At) {
			t.Fatal("RTMR0 does not depend on the ACPI digests")
		}
	})
	t.Run("and too few or too many ACPI digests are refused", func(t *testing.T) {
		acpi := acpiDigests(events)
		_, err := tdx.ReplayRTMR0(acpi[:2])
		wantCode(t, err, "acpi_count")
		_, err = tdx.ReplayRTMR0(append(acpi, acpi[0]))
		wantCode(t, err, "acpi_count")
	})
	t.Run("and memory for which the kernel's measurement varies is refused", func(t *testing.T) {
		_, err := doc.TDX(1<<30, twoPass)
		wantCode(t, err, "memory_not_constant")
	})
	t.Run("and the document of another image is refused", func(t *testing.T) {
		split := *config.TDXMeasurement
		wantCode(t, split.Bind(dstack.ImageHash{1}, measure.TDXDocumentName), "image_hash_mismatch")
		wantCode(t, split.Bind(image, "measurement.snp.cbor"), "measurement_not_listed")
		split.Measurement = append(slices.Clone(split.Measurement), 0)
		wantCode(t, split.Bind(image, measure.TDXDocumentName), "measurement_mismatch")
		split.ChecksumFile = bytes.Repeat(config.TDXMeasurement.ChecksumFile, 2)
		wantCode(t, split.Bind(sha256.Sum256(split.ChecksumFile), measure.TDXDocumentName), "measurement_not_listed")
	})
}

// The second real machine: 64 GiB, another QEMU. Its image has upstream's
// firmware, so that all but the ACPI events are known without the image.
func TestRealQuoteWith64GiBReproducesRTMR0(t *testing.T) {
	_, register, events := loadGetQuote(t, "attestation/tdx/quote-report.json")
	lite, _, _ := loadGetQuote(t, "attestation/tdx/tdx-lite-getquote.json")
	config, err := measure.ParseVMConfig([]byte(lite.VMConfig))
	if err != nil {
		t.Fatal(err)
	}
	doc, err := measure.ParseTDXDocument(config.TDXMeasurement.Measurement)
	if err != nil {
		t.Fatal(err)
	}
	tdx, err := doc.TDX(64<<30, false)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tdx.ReplayRTMR0(acpiDigests(events)); err != nil || got != register(rtmr0At) {
		t.Fatalf("RTMR0 = %s, %v; quote has %s", got, err, register(rtmr0At))
	}
}

func TestFixedDigests(t *testing.T) {
	v := loadVectors(t)
	tdx, err := measure.ComputeTDX(measuretest.Launch())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range tdx.RTMR0 {
		names = append(names, e.Name)
		key := map[string]string{"BootOrder": "boot_order", "Boot0000": "boot0000"}[e.Name]
		if key == "" {
			key = e.Name
		}
		want, fixed := v.RTMR0[key]
		if !fixed || e.Name == "cfv" {
			continue
		}
		if e.Digest == nil || *e.Digest != want {
			t.Errorf("%s = %v, want %s", e.Name, e.Digest, want)
		}
		delete(v.RTMR0, key)
	}
	delete(v.RTMR0, "cfv")
	if len(v.RTMR0) != 0 {
		t.Errorf("not among the events: %v", v.RTMR0)
	}
	want := []string{"td-hob", "cfv", "SecureBoot", "PK", "KEK", "db", "dbx", "separator", "acpi-loader", "acpi-rsdp", "acpi-tables", "BootOrder", "Boot0000"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Error(diff)
	}
	var rtmr1 []dstack.Measurement
	for _, e := range tdx.BootLog() {
		if e.IMR == 1 {
			rtmr1 = append(rtmr1, dstack.Measurement(e.Digest))
		}
	}
	if diff := cmp.Diff(v.RTMR1, rtmr1[1:]); diff != "" {
		t.Error(diff)
	}
}

func TestBootLogReplaysToTheRegisters(t *testing.T) {
	tdx, err := measure.ComputeTDX(measuretest.Launch())
	if err != nil {
		t.Fatal(err)
	}
	empty := dstack.Measurement(sha512.Sum384(nil))
	rtmr0, err := tdx.ReplayRTMR0([]dstack.Measurement{empty, empty, empty})
	if err != nil {
		t.Fatal(err)
	}
	for imr, want := range []dstack.Measurement{rtmr0, tdx.RTMR1, tdx.RTMR2} {
		got, err := eventlog.Replay(tdx.BootLog(), uint32(imr))
		if err != nil || got != want {
			t.Errorf("imr %d replays to %s, %v; want %s", imr, got, err, want)
		}
	}
}

func TestTDXSurvivesJSON(t *testing.T) {
	tdx, err := measure.ComputeTDX(measuretest.Launch())
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(tdx)
	if err != nil {
		t.Fatal(err)
	}
	var back measure.TDX
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	acpi := []dstack.Measurement{{1}, {2}, {3}}
	a, _ := tdx.ReplayRTMR0(acpi)
	b, err := back.ReplayRTMR0(acpi)
	if err != nil || a != b || back.MRTD != tdx.MRTD || back.RTMR1 != tdx.RTMR1 || back.RTMR2 != tdx.RTMR2 {
		t.Fatalf("%s reads back as %+v, %v", text, back, err)
	}
}

func TestDocumentGivesWhatTheFilesGive(t *testing.T) {
	l := measuretest.Launch()
	raw, err := measure.TDXDocument(l)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := measure.ParseTDXDocument(raw)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := doc.Marshal(); err != nil || !bytes.Equal(raw, again) {
		t.Fatalf("document does not survive parsing and writing: %v", err)
	}
	for _, memory := range []uint64{2 << 30, 2816 << 20, 64 << 30} {
		for _, twoPass := range []bool{false, true} {
			l.MemoryBytes, l.TwoPassAddPages = memory, twoPass
			want, err := measure.ComputeTDX(l)
			if err != nil {
				t.Fatal(err)
			}
			got, err := doc.TDX(memory, twoPass)
			if err != nil {
				t.Fatal(err)
			}
			w, _ := json.Marshal(want)
			g, _ := json.Marshal(got)
			if !bytes.Equal(w, g) {
				t.Errorf("memory %#x, two passes %v:\nfiles    %s\ndocument %s", memory, twoPass, w, g)
			}
		}
	}
}

func TestEachInputMovesItsRegister(t *testing.T) {
	base, err := measure.ComputeTDX(measuretest.Launch())
	if err != nil {
		t.Fatal(err)
	}
	registers := func(tdx *measure.TDX) []dstack.Measurement {
		rtmr0, err := tdx.ReplayRTMR0(make([]dstack.Measurement, 3))
		if err != nil {
			t.Fatal(err)
		}
		return []dstack.Measurement{tdx.MRTD, rtmr0, tdx.RTMR1, tdx.RTMR2}
	}
	for _, test := range []struct {
		name   string
		change func(*measure.Launch)
		moves  []bool // MRTD, RTMR0, RTMR1, RTMR2
	}{
		{"nothing", func(*measure.Launch) {}, []bool{false, false, false, false}},
		{"a byte of the boot volume", func(l *measure.Launch) { l.Firmware[0x5000] ^= 1 }, []bool{true, false, false, false}},
		{"a byte of the variable store", func(l *measure.Launch) { l.Firmware[7] ^= 1 }, []bool{false, true, false, false}},
		{"a byte of the kernel", func(l *measure.Launch) { l.Kernel[0x2345] ^= 1 }, []bool{false, false, true, false}},
		{"a byte of the initrd", func(l *measure.Launch) { l.Initrd[0] ^= 1 }, []bool{false, false, false, true}},
		{"the length of the initrd", func(l *measure.Launch) { l.Initrd = append(l.Initrd, 0) }, []bool{false, false, true, true}},
		{"the command line", func(l *measure.Launch) { l.Cmdline += " " }, []bool{false, false, false, true}},
		{"the memory", func(l *measure.Launch) { l.MemoryBytes += 4096 }, []bool{false, true, true, false}},
		{"the memory, above the split", func(l *measure.Launch) { l.MemoryBytes = 4 << 30 }, []bool{false, true, true, false}},
		{"the page order", func(l *measure.Launch) { l.TwoPassAddPages = true }, []bool{true, false, false, false}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := measuretest.Launch()
			test.change(&l)
			tdx, err := measure.ComputeTDX(l)
			if err != nil {
				t.Fatal(err)
			}
			was, is := registers(base), registers(tdx)
			for i, name := range []string{"MRTD", "RTMR0", "RTMR1", "RTMR2"} {
				if (was[i] != is[i]) != test.moves[i] {
					t.Errorf("%s moved: %v, want %v", name, was[i] != is[i], test.moves[i])
				}
			}
		})
	}
}

func TestComputeTDXRefuses(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*measure.Launch)
		code   string
	}{
		{"no initrd", func(l *measure.Launch) { l.Initrd = nil }, "initrd_missing"},
		{"an initrd larger than memory", func(l *measure.Launch) { l.MemoryBytes = 16 << 20; l.Initrd = make([]byte, 17<<20) }, "initrd_too_large"},
		{"memory of half a page", func(l *measure.Launch) { l.MemoryBytes += 2048 }, "memory_size"},
		{"a command line with a zero byte", func(l *measure.Launch) { l.Cmdline = "a\x00b" }, "cmdline_malformed"},
		{"a command line that is not text", func(l *measure.Launch) { l.Cmdline = "\xff" }, "cmdline_malformed"},
		{"an endless command line", func(l *measure.Launch) { l.Cmdline = strings.Repeat("x", 1<<16+1) }, "cmdline_malformed"},
		{"an empty kernel", func(l *measure.Launch) { l.Kernel = nil }, "kernel_malformed"},
		{"a kernel without boot protocol", func(l *measure.Launch) { l.Kernel[0x202] = 0 }, "kernel_malformed"},
		{"a kernel of an ancient protocol", func(l *measure.Launch) { l.Kernel[0x207] = 1 }, "kernel_malformed"},
		{"a kernel that loads low", func(l *measure.Launch) { l.Kernel[0x211] = 0 }, "kernel_malformed"},
		{"a kernel that is no PE image", func(l *measure.Launch) { l.Kernel[0] = 0 }, "pe_malformed"},
		{"firmware without TDVF", func(l *measure.Launch) { l.Firmware = make([]byte, 1<<20) }, "firmware_not_tdvf"},
		{"no firmware", func(l *measure.Launch) { l.Firmware = nil }, "firmware_not_tdvf"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := measuretest.Launch()
			test.change(&l)
			_, err := measure.ComputeTDX(l)
			wantCode(t, err, test.code)
		})
	}
}

func TestParseTDVF(t *testing.T) {
	if diff := cmp.Diff(measuretest.Sections(), must(measure.ParseTDVF(measuretest.Firmware()))); diff != "" {
		t.Fatal(diff)
	}
	descriptor := len(measuretest.Firmware()) - measuretest.DescriptorFromEnd
	entry := len(measuretest.Firmware()) - 32 - 18 - 20 - 22
	put32 := func(at int, v uint32) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint32(b[at:], v) }
	}
	put64 := func(at int, v uint64) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint64(b[at:], v) }
	}
	for _, test := range []struct {
		name   string
		change func([]byte)
		code   string
		says   string
	}{
		{"another footer", func(b []byte) { b[len(b)-40] ^= 1 }, "firmware_not_tdvf", "table of GUIDs"},
		{"a table longer than the file", func(b []byte) { b[len(b)-32-17] = 0xff; b[len(b)-32-18] = 0xff }, "firmware_malformed", "table of GUIDs has 65535 bytes"},
		{"a table of length zero", func(b []byte) { b[len(b)-32-17], b[len(b)-32-18] = 0, 0 }, "firmware_malformed", "table of GUIDs has 0 bytes"},
		{"an entry of length zero, which would be walked forever", func(b []byte) { b[len(b)-32-18-18] = 0 }, "firmware_malformed", "entry of 0 bytes"},
		{"an entry shorter than its own header", func(b []byte) { b[len(b)-32-18-18] = 17 }, "firmware_malformed", "entry of 17 bytes"},
		{"an entry longer than the table", func(b []byte) { b[len(b)-32-18-17] = 0x10 }, "firmware_malformed", "entry of"},
		{"no TDVF entry", func(b []byte) { b[entry+6] ^= 1 }, "firmware_not_tdvf", "no TDVF entry"},
		{"a descriptor before the file", put32(entry, 1<<31), "firmware_malformed", "before the end"},
		{"a descriptor across the end", put32(entry, 8), "firmware_malformed", "no TDVF descriptor"},
		{"another signature", func(b []byte) { b[descriptor] = 'X' }, "firmware_malformed", "no TDVF descriptor"},
		{"another version", put32(descriptor+8, 2), "firmware_malformed", "version 2"},
		{"no sections", put32(descriptor+12, 0), "firmware_malformed", "0 sections"},
		{"too many sections", put32(descriptor+12, 1<<30), "firmware_malformed", "sections"},
		{"more sections than its length", put32(descriptor+4, 16), "firmware_malformed", "too short"},
		{"data beyond the file", put32(descriptor+16, 0xffff_f000), "firmware_malformed", "beyond the file"},
		{"an unaligned address", put64(descriptor+16+8, 0xffff4001), "firmware_malformed", "whole number of pages"},
		{"huge memory", put64(descriptor+16+64+16, 1<<60), "firmware_malformed", "out of bounds"},
		{"memory smaller than its data", put64(descriptor+16+16, 0x1000), "firmware_malformed", "do not fit"},
		{"measured memory without data", put64(descriptor+16+16, 0xd000), "firmware_malformed", "measured memory"},
		{"an unknown type", put32(descriptor+16+24, 9), "firmware_malformed", "type 9"},
		{"unknown attributes", put32(descriptor+16+28, 5), "firmware_malformed", "attributes"},
		{"an empty HOB", put64(descriptor+16+32*4+16, 0), "firmware_malformed", "empty"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := measuretest.Firmware()
			test.change(b)
			_, err := measure.ParseTDVF(b)
			wantCode(t, err, test.code)
			if !strings.Contains(err.Error(), test.says) {
				t.Fatalf("error %q does not say %q", err, test.says)
			}
		})
	}
}

func TestLayoutsThatNoHostCouldLayOutAreRefused(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func([]measure.Section) []measure.Section
		code   string
	}{
		{"no HOB", func(s []measure.Section) []measure.Section { s[4].Type = measure.SectionTempMem; return s }, "firmware_malformed"},
		{"two HOBs", func(s []measure.Section) []measure.Section { s[3].Type = measure.SectionTDHOB; return s }, "firmware_malformed"},
		{"overlapping ranges", func(s []measure.Section) []measure.Section { s[3].Address -= 0x1000; return s }, "td_hob_malformed"},
		{"a range above 2 GiB", func(s []measure.Section) []measure.Section { s[2].Address = 1 << 31; return s }, "td_hob_malformed"},
		{"no variable store", func(s []measure.Section) []measure.Section { return slices.Delete(s, 1, 2) }, "firmware_malformed"},
		{"two variable stores", func(s []measure.Section) []measure.Section { return append(s, s[1]) }, "firmware_malformed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := measuretest.Launch()
			l.Firmware = measuretest.Firmware(test.change(measuretest.Sections())...)
			_, err := measure.ComputeTDX(l)
			wantCode(t, err, test.code)
		})
	}
}

func TestDebianFirmware(t *testing.T) {
	const path = "/usr/share/ovmf/OVMF.fd"
	firmware, err := os.ReadFile(path)
	if err != nil {
		t.Skipf("SKIP: no %s (package ovmf): real firmware is not looked at", path)
	}
	sections, err := measure.ParseTDVF(firmware)
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[measure.SectionType]int{}
	for _, s := range sections {
		kinds[s.Type]++
	}
	if kinds[measure.SectionBFV] != 1 || kinds[measure.SectionCFV] != 1 || kinds[measure.SectionTDHOB] != 1 {
		t.Fatalf("sections %+v", sections)
	}
	one, err := measure.MRTD(firmware, false)
	if err != nil {
		t.Fatal(err)
	}
	two, _ := measure.MRTD(firmware, true)
	if one == two {
		t.Fatal("the page order does not matter")
	}
	l := measuretest.Launch()
	l.Firmware = firmware
	if _, err := measure.ComputeTDX(l); err != nil {
		t.Fatal(err)
	}
	// OVMF's layout of accepted memory is that of the published HOB vectors.
	raw, err := measure.TDXDocument(l)
	if err != nil {
		t.Fatal(err)
	}
	if witness := unhex(t, loadVectors(t).TDHOB.Witness); !bytes.Contains(raw, witness) {
		t.Errorf("document %x does not hold the witness %x", raw, witness)
	}
}

func TestPatchKernel(t *testing.T) {
	const initrd = 0x123456
	le := binary.LittleEndian
	for _, test := range []struct {
		name   string
		memory uint64
		change func(k []byte)
		addr   uint32
	}{
		{"below 2 GiB the initrd ends below the ACPI tables", 1 << 30, nil, (1<<30 - 0x28000 - 1 - initrd) &^ 0xfff},
		{"at 2 GiB", 2 << 30, nil, (1<<31 - 0x28000 - 1 - initrd) &^ 0xfff},
		{"between 2 GiB and 2816 MiB memory is not split", 0xa0000000, nil, (0xa0000000 - 0x28000 - 1 - initrd) &^ 0xfff},
		{"from 2816 MiB memory is split at 2 GiB", 0xb0000000, nil, (1<<31 - 0x28000 - 1 - initrd) &^ 0xfff},
		{"far above", 1 << 40, nil, (1<<31 - 0x28000 - 1 - initrd) &^ 0xfff},
		{"a kernel that cannot load above 4 GiB says where the initrd may end", 2 << 30, func(k []byte) {
			le.PutUint16(k[0x236:], 0x69)
			le.PutUint32(k[0x22c:], 0x3000_0000)
		}, (0x3000_0000 - initrd) &^ 0xfff},
		{"and without saying it gets the old limit", 2 << 30, func(k []byte) {
			le.PutUint16(k[0x236:], 0)
			le.PutUint32(k[0x22c:], 0)
		}, (0x37ff_ffff - initrd) &^ 0xfff},
	} {
		t.Run(test.name, func(t *testing.T) {
			kernel := measuretest.Kernel()
			if test.change != nil {
				test.change(kernel)
			}
			before := slices.Clone(kernel)
			k, err := measure.PatchKernel(kernel, initrd, test.memory)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(kernel, before) {
				t.Fatal("the caller's kernel was changed")
			}
			if got := le.Uint32(k[0x218:]); got != test.addr || le.Uint32(k[0x21c:]) != initrd {
				t.Errorf("initrd at %#x+%#x, want %#x+%#x", got, le.Uint32(k[0x21c:]), test.addr, initrd)
			}
			if k[0x210] != 0xb0 || k[0x211] != 0x81 || le.Uint32(k[0x224:]) != 0xfe00 || le.Uint32(k[0x228:]) != 0x20000 {
				t.Errorf("header %x", k[0x210:0x22c])
			}
		})
	}
	if measure.KernelIsConstant(1<<30) || !measure.KernelIsConstant(2<<30) || measure.KernelIsConstant(0xa0000000) || !measure.KernelIsConstant(0xb0000000) {
		t.Error("KernelIsConstant")
	}
}

func TestAuthenticodeIgnoresSignaturesOnly(t *testing.T) {
	pe := measuretest.Kernel()
	base := must(measure.AuthenticodeSHA256(pe))
	if long := must(measure.Authenticode(pe, crypto.SHA256)); !bytes.Equal(long, base[:]) {
		t.Fatalf("Authenticode = %x, AuthenticodeSHA256 = %x", long, base)
	}
	const opt = 0x40 + 24
	// By hand: everything but the checksum and the certificate table's entry.
	hand := sha256.New()
	hand.Write(pe[:opt+64])
	hand.Write(pe[opt+68 : opt+144])
	hand.Write(pe[opt+152:])
	if !bytes.Equal(hand.Sum(nil), base[:]) {
		t.Fatal("digest differs from the one by hand")
	}

	checksum := slices.Clone(pe)
	checksum[opt+64] ^= 1
	if must(measure.AuthenticodeSHA256(checksum)) != base {
		t.Error("the checksum is hashed")
	}
	signed := append(slices.Clone(pe), bytes.Repeat([]byte{7}, 24)...)
	binary.LittleEndian.PutUint32(signed[opt+144:], uint32(len(pe)))
	binary.LittleEndian.PutUint32(signed[opt+148:], 24)
	if must(measure.AuthenticodeSHA256(signed)) != base {
		t.Error("the signature is hashed")
	}
	for _, at := range []int{2, opt + 60 - 20, 0x300, 0x1000, 0x3fff} {
		changed := slices.Clone(pe)
		changed[at] ^= 1
		if must(measure.AuthenticodeSHA256(changed)) == base {
			t.Errorf("byte %#x is not hashed", at)
		}
	}
}

func TestAuthenticodeRefuses(t *testing.T) {
	const pe, opt, table = 0x40, 0x40 + 24, 0x40 + 24 + 160
	le := binary.LittleEndian
	for _, test := range []struct {
		name   string
		change func(b []byte) []byte
		code   string
	}{
		{"an empty file", func([]byte) []byte { return nil }, "pe_malformed"},
		{"a header beyond the file", func(b []byte) []byte { le.PutUint32(b[0x3c:], 0xfffffff0); return b }, "pe_malformed"},
		{"another signature", func(b []byte) []byte { b[pe] = 'X'; return b }, "pe_malformed"},
		{"an optional header beyond the file", func(b []byte) []byte { return b[:opt+10] }, "pe_malformed"},
		{"an unknown optional header", func(b []byte) []byte { b[opt] = 0; return b }, "pe_malformed"},
		{"no certificate table entry", func(b []byte) []byte { b[opt+108] = 4; return b }, "pe_malformed"},
		{"no sections", func(b []byte) []byte { b[pe+6] = 0; return b }, "pe_malformed"},
		{"too many sections", func(b []byte) []byte { b[pe+7] = 0xff; return b }, "pe_malformed"},
		{"headers larger than the file", func(b []byte) []byte { le.PutUint32(b[opt+60:], 1<<20); return b }, "pe_malformed"},
		{"headers that end before the sections' headers", func(b []byte) []byte { le.PutUint32(b[opt+60:], table+8); return b }, "pe_malformed"},
		{"a section beyond the file", func(b []byte) []byte { le.PutUint32(b[table+20:], 1<<30); return b }, "pe_malformed"},
		{"a section inside the headers", func(b []byte) []byte { le.PutUint32(b[table+20:], 0x200); return b }, "pe_malformed"},
		{"overlapping sections", func(b []byte) []byte { le.PutUint32(b[table+16:], 0x1800); return b }, "pe_malformed"},
		{"a gap between sections", func(b []byte) []byte { le.PutUint32(b[table+16:], 0x800); return b }, "pe_malformed"},
		{"a certificate table in the middle", func(b []byte) []byte {
			le.PutUint32(b[opt+144:], 0x2000)
			le.PutUint32(b[opt+148:], 8)
			return b
		}, "pe_malformed"},
		{"data that belong to no section", func(b []byte) []byte { return append(b, 1, 2, 3, 4) }, "pe_trailing_data"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := measure.AuthenticodeSHA256(test.change(measuretest.Kernel()))
			wantCode(t, err, test.code)
		})
	}
}

// osslsigncode is an independent implementation.
func TestAuthenticodeAgreesWithOsslsigncode(t *testing.T) {
	tool, err := exec.LookPath("osslsigncode")
	if err != nil {
		t.Skip("SKIP: osslsigncode is not installed: no second opinion on Authenticode digests")
	}
	dir := t.TempDir()
	pe, key, cert, out := filepath.Join(dir, "in.efi"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "out.efi")
	if err := os.WriteFile(pe, measuretest.Kernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) []byte {
		out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return out
	}
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("SKIP: openssl is not installed: no key to sign with")
	}
	run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=test", "-days", "2", "-keyout", key, "-out", cert)
	for alg, hash := range map[string]crypto.Hash{"sha256": crypto.SHA256, "sha384": crypto.SHA384} {
		os.Remove(out)
		run(tool, "sign", "-h", alg, "-certs", cert, "-key", key, "-in", pe, "-out", out)
		signed, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		want := must(measure.Authenticode(measuretest.Kernel(), hash))
		if got := must(measure.Authenticode(signed, hash)); !bytes.Equal(got, want) {
			t.Errorf("%s: signed file has digest %x, unsigned %x", alg, got, want)
		}
		if !bytes.Contains(signed, want) {
			t.Errorf("%s: digest %x is not the one that osslsigncode signed", alg, want)
		}
	}
}

func TestPCR9(t *testing.T) {
	want := sha256.Sum256([]byte("a\x00 \x00i\x00n\x00i\x00t\x00r\x00d\x00=\x00i\x00n\x00i\x00t\x00r\x00d\x00\x00\x00"))
	if got := measure.PCR9Cmdline("a"); got != want {
		t.Errorf("PCR9Cmdline = %x, want %x", got, want)
	}
	if got := measure.PCR9Initrd([]byte("x")); got != sha256.Sum256([]byte("x")) {
		t.Errorf("PCR9Initrd = %x", got)
	}
}

func TestVMConfig(t *testing.T) {
	yes := true
	c := measure.VMConfig{SpecVersion: 1, CPUCount: 2, MemorySize: 2 << 30, NumNICs: 1, QEMUVersion: "10.0.2", TDXVariant: "lite", MRConfig: `{"version":3}`, TwoPassAddPages: &yes}
	text := string(must(json.Marshal(c)))
	if strings.Contains(text, "num_nics") {
		t.Errorf("one NIC is not omitted: %s", text)
	}
	back, err := measure.ParseVMConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&c, back); diff != "" {
		t.Error(diff)
	}
	if text := string(must(json.Marshal(measure.VMConfig{}))); !strings.Contains(text, `"num_nics":0`) {
		t.Errorf("no NIC is omitted: %s", text)
	}
	for _, test := range []struct {
		text    string
		twoPass bool
		fails   bool
	}{
		{`{}`, false, false},
		{`{"qemu_version":"8.2.2"}`, true, false},
		{`{"qemu_version":"9.0.0"}`, false, false},
		{`{"qemu_version":"8.2.2","qemu_single_pass_add_pages":false}`, false, false},
		{`{"qemu_single_pass_add_pages":true}`, true, false},
		{`{"qemu_version":"7.2.0"}`, false, true},
		{`{"qemu_version":"9.0"}`, false, true},
		{`{"qemu_version":"9.0.x"}`, false, true},
		{`{"qemu_version":"9.0.0","memory_size":-1}`, false, true},
		{`{"memory_size":1,"memory_size":2}`, false, true},
		{`null`, false, true},
		{`[]`, false, true},
		{``, false, true},
		{`{"image":"` + strings.Repeat("x", 1<<20) + `"}`, false, true},
	} {
		c, err := measure.ParseVMConfig([]byte(test.text))
		if test.fails {
			if fault.Code(err) != "vm_config_malformed" {
				t.Errorf("%.40s: error %v", test.text, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.text, err)
			continue
		}
		if got, err := c.TwoPass(); got != test.twoPass || err != nil {
			t.Errorf("%s: TwoPass = %v, %v", test.text, got, err)
		}
	}
}

func TestParseTDXDocumentRefuses(t *testing.T) {
	good := must(measure.TDXDocument(measuretest.Launch()))
	replace := func(old, new string) []byte {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("document does not hold %x", old)
		}
		return bytes.Replace(good, []byte(old), []byte(new), 1)
	}
	for _, test := range []struct {
		name string
		doc  []byte
		code string
	}{
		{"nothing", nil, "measurement_malformed"},
		{"bytes after the end", append(slices.Clone(good), 0), "measurement_malformed"},
		{"a document cut short", good[:len(good)-1], "measurement_malformed"},
		{"another version", replace("version\x03", "version\x02"), "measurement_malformed"},
		{"another firmware layout", replace("pre202505", "pre202506"), "ovmf_variant"},
		{"a missing digest", replace("initrd_sha384", "initrd_sha38X"), "measurement_malformed"},
		{"a key in another case", replace("kernel_authenticode", "Kernel_authenticode"), "measurement_malformed"},
		{"64 KiB and more", make([]byte, 64<<10+1), "measurement_malformed"},
		{"a map of indefinite length", append(append([]byte{0xbf}, good[1:]...), 0xff), "measurement_malformed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := measure.ParseTDXDocument(test.doc)
			wantCode(t, err, test.code)
		})
	}
	t.Run("a duplicate key", func(t *testing.T) {
		doc := append(append([]byte{0xa4}, good[1:]...), append([]byte{0x67}, "version\x03"...)...)
		_, err := measure.ParseTDXDocument(doc)
		wantCode(t, err, "measurement_malformed")
	})
	t.Run("but not an unknown key", func(t *testing.T) {
		doc := append(append([]byte{0xa4}, good[1:]...), append([]byte{0x67}, "unknown\x03"...)...)
		if _, err := measure.ParseTDXDocument(doc); err != nil {
			t.Fatal(err)
		}
	})
}

func TestHOBWitnessRefuses(t *testing.T) {
	good := must(measure.TDXDocument(measuretest.Launch()))
	witness := string(unhex(t, "80100904000609020b021010"))
	field := "td_hob" + string(rune(0x40+len(witness)))
	if !bytes.Contains(good, []byte(field+witness)) {
		t.Fatalf("document %x does not hold the witness", good)
	}
	for name, bad := range map[string]string{
		"nothing":                        "",
		"a witness cut short":            witness[:len(witness)-1],
		"bytes after its end":            witness + "\x00",
		"a number not in shortest form":  "\x80\x90\x00" + witness[2:],
		"a number without end":           "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
		"no ranges":                      "\x80\x10\x09\x00",
		"endless ranges":                 "\x80\x10\x09\xff\xff\x03",
		"an empty range":                 "\x80\x10\x09\x02\x00\x00\x09\x02",
		"overlapping ranges":             "\x80\x10\x09\x02\x00\x0a\x09\x02",
		"ranges out of order":            "\x80\x10\x09\x02\x09\x02\x00\x06",
		"a range beyond 2 GiB":           "\x80\x10\x00\x01\x00\x80\x80\x20",
		"a HOB outside every range":      "\x80\x10\x08\x02\x00\x06\x09\x02",
		"a base that is not the first":   "\x80\x10\x09\x01\x09\x02",
		"a page number beyond any limit": "\x80\x80\x80\x80\x80\x01\x00\x01\x00\x01",
	} {
		t.Run(name, func(t *testing.T) {
			doc := bytes.Replace(good, []byte(field+witness), append([]byte{'t', 'd', '_', 'h', 'o', 'b', byte(0x40 + len(bad))}, bad...), 1)
			_, err := measure.ParseTDXDocument(doc)
			wantCode(t, err, "measurement_malformed")
			if !strings.Contains(err.Error(), "TD HOB") {
				t.Errorf("refused for another reason: %v", err)
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func FuzzParseTDVF(f *testing.F) {
	f.Add(measuretest.Firmware())
	f.Add(measuretest.Firmware()[0xf000:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		measure.MRTD(b, false)
		l := measuretest.Launch()
		l.Firmware = b
		if _, err := measure.TDXDocument(l); err != nil && fault.Code(err) == "" {
			t.Errorf("error without code: %v", err)
		}
	})
}

func FuzzAuthenticode(f *testing.F) {
	f.Add(measuretest.Kernel()[:0x2000])
	f.Add(measuretest.Kernel())
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := measure.AuthenticodeSHA256(b); err != nil && fault.Code(err) == "" {
			t.Errorf("error without code: %v", err)
		}
		measure.PatchKernel(b, 1<<20, 1<<30)
	})
}

func FuzzParseTDXDocument(f *testing.F) {
	f.Add(must(measure.TDXDocument(measuretest.Launch())))
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		doc, err := measure.ParseTDXDocument(b)
		if err != nil {
			if fault.Code(err) == "" {
				t.Errorf("error without code: %v", err)
			}
			return
		}
		if _, err := doc.TDX(4<<30, false); err != nil && fault.Code(err) == "" {
			t.Errorf("error without code: %v", err)
		}
		again, err := doc.Marshal()
		if err != nil {
			t.Fatalf("parsed document cannot be written: %v", err)
		}
		if second, err := measure.ParseTDXDocument(again); err != nil || !cmp.Equal(doc, second) {
			t.Fatalf("written document reads as %+v, %v; was %+v", second, err, doc)
		}
	})
}

func FuzzParseVMConfig(f *testing.F) {
	f.Add([]byte(`{"cpu_count":1,"qemu_version":"9.1.0","tdx_measurement":{"checksum_file":"YQ==","measurement":"YQ=="}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := measure.ParseVMConfig(b); err == nil && c.TDXMeasurement != nil {
			c.TDXMeasurement.Bind(dstack.ImageHash{}, measure.TDXDocumentName)
		}
	})
}
