// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits on SEV-SNP launches.
const (
	maxVCPUs       = 512
	maxInitrd      = 1 << 30 // bytes
	maxSNPSections = 64
	maxSNPPages    = 1 << 18 // over all sections: 1 GiB; OVMF has some 30 pages
)

// SNPLaunch is what a host boots as a SEV-SNP guest with measured direct boot
// (QEMU's kernel-hashes=on): the very bytes it gives to the VM, and its shape.
type SNPLaunch struct {
	Firmware []byte // OVMF with SEV metadata, a whole number of 4 KiB pages
	Kernel   []byte // as in the image; QEMU's patch of the setup header is not measured
	Initrd   []byte // may be empty
	Cmdline  string // white space around it is not measured
	SNPShape
}

// SNPShape is the shape of a VM as far as a SEV-SNP launch digest depends on it.
type SNPShape struct {
	VCPUs         int    `json:"vcpus"`          // 1 to 512
	VCPUType      string `json:"vcpu_type"`      // QEMU's CPU model, such as EPYC-v4; case does not matter
	GuestFeatures uint64 `json:"guest_features"` // SEV_FEATURES of the VMSA, not zero; 1 is SNP alone
}

// ComputeSNP returns the launch digest, MEASUREMENT of an attestation report, of
// a guest that boots l (spec/measurement.md §6). Codes: firmware_malformed,
// firmware_not_snp, kernel_malformed, initrd_too_large, cmdline_malformed, and those of
// [SNPDocument.Measurement].
func ComputeSNP(l SNPLaunch) (dstack.Measurement, error) {
	d, err := NewSNPDocument(l)
	if err != nil {
		return dstack.Measurement{}, err
	}
	return d.Measurement(l.SNPShape)
}

// NewSNPDocument returns the part of a launch that does not depend on the VM's
// shape, which is not looked at: the document of an image. Codes as [ComputeSNP].
func NewSNPDocument(l SNPLaunch) (*SNPDocument, error) {
	if len(l.Kernel) == 0 || len(l.Kernel) > maxKernel {
		return nil, fault.New("kernel_malformed", "kernel of %d bytes, want 1 to %d", len(l.Kernel), maxKernel)
	}
	if len(l.Initrd) > maxInitrd {
		return nil, fault.New("initrd_too_large", "initrd of %d bytes, want at most %d", len(l.Initrd), maxInitrd)
	}
	d, err := parseSNPFirmware(l.Firmware)
	if err != nil {
		return nil, err
	}
	d.Cmdline, d.KernelHash, d.InitrdHash = l.Cmdline, sha256.Sum256(l.Kernel), sha256.Sum256(l.Initrd)
	if err := checkCmdline(d.Cmdline); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(d.Sections, func(s SNPSection) bool { return s.Type == SNPKernelHashes }) {
		return nil, notSNP("no page for the hashes of kernel, initrd and command line among its SEV metadata")
	}
	if err := d.check(); err != nil {
		return nil, fault.Wrap(err, "firmware_malformed", "firmware: SEV metadata")
	}
	return d, nil
}

// Measurement returns the launch digest of a VM with this image and shape. Codes:
// vcpu_count, vcpu_type, guest_features, and those of [ParseSNPDocument].
func (d *SNPDocument) Measurement(s SNPShape) (dstack.Measurement, error) {
	if err := d.check(); err != nil {
		return dstack.Measurement{}, err
	}
	if s.VCPUs < 1 || s.VCPUs > maxVCPUs {
		return dstack.Measurement{}, fault.New("vcpu_count", "%d vCPUs, want 1 to %d", s.VCPUs, maxVCPUs)
	}
	signature, ok := cpuSignature(s.VCPUType)
	if !ok {
		return dstack.Measurement{}, fault.New("vcpu_type", "no CPU signature is known for vCPU type %.32q", s.VCPUType)
	}
	if s.GuestFeatures == 0 {
		return dstack.Measurement{}, fault.New("guest_features", "guest features are zero, SEV-SNP is at least 1")
	}
	ld := launchDigest(d.OVMFHash)
	for _, section := range d.Sections {
		switch section.Type {
		case SNPSecMem, SNPSVSMCAA:
			for at := uint32(0); at < section.Size; at += pageSize {
				ld.extend(pageZero, uint64(section.GPA)+uint64(at), dstack.Measurement{})
			}
		case SNPSecrets:
			ld.extend(pageSecrets, uint64(section.GPA), dstack.Measurement{})
		case SNPCPUID:
			ld.extend(pageCPUID, uint64(section.GPA), dstack.Measurement{})
		case SNPKernelHashes:
			ld.extend(pageNormal, uint64(section.GPA), sha384(d.hashPage()))
		}
	}
	first, others := sha384(vmsa(bootEIP, signature, s.GuestFeatures)), sha384(vmsa(d.ResetEIP, signature, s.GuestFeatures))
	ld.extend(pageVMSA, vmsaGPA, first)
	for range s.VCPUs - 1 {
		ld.extend(pageVMSA, vmsaGPA, others)
	}
	return dstack.Measurement(ld), nil
}

// Page types of SNP_LAUNCH_UPDATE (AMD 56860, table PAGE_TYPE).
const (
	pageNormal  = 1
	pageVMSA    = 2
	pageZero    = 3
	pageSecrets = 5
	pageCPUID   = 6
)

// launchDigest is the running digest of a launch.
type launchDigest dstack.Measurement

// extend adds a page: the digest becomes the SHA-384 of PAGE_INFO (AMD 56860,
// SNP_LAUNCH_UPDATE), 112 bytes: digest, digest of the contents, length u16, type,
// five bytes of flags and permissions that are zero here, address u64.
func (d *launchDigest) extend(kind byte, gpa uint64, contents dstack.Measurement) {
	const size = 0x70
	var info [size]byte
	copy(info[:], d[:])
	copy(info[48:], contents[:])
	binary.LittleEndian.PutUint16(info[96:], size)
	info[98] = kind
	binary.LittleEndian.PutUint64(info[104:], gpa)
	*d = sha512.Sum384(info[:])
}

// firmwareHash is the digest after the firmware's pages, which end at 4 GiB.
func firmwareHash(firmware []byte) dstack.Measurement {
	var ld launchDigest
	for at := 0; at < len(firmware); at += pageSize {
		ld.extend(pageNormal, highBase-uint64(len(firmware)-at), sha384(firmware[at:at+pageSize]))
	}
	return dstack.Measurement(ld)
}

// GUIDs of QEMU's table of hashes (target/i386/sev.c) and of its entries.
var (
	hashTableGUID   = guid("9438d606-4f22-4cc9-b479-a793d411fd21")
	hashCmdlineGUID = guid("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
	hashInitrdGUID  = guid("44baf731-3a2f-4bd7-9af1-41e29169781d")
	hashKernelGUID  = guid("4de79437-abd2-427f-b835-d5b172d2045b")
)

const (
	hashEntrySize = 16 + 2 + sha256.Size
	hashTableSize = 16 + 2 + 3*hashEntrySize
	hashTableRoom = (hashTableSize + 15) / 16 * 16 // QEMU pads it
)

// hashPage is the page in which QEMU tells the firmware what to boot.
func (d *SNPDocument) hashPage() []byte {
	page := make([]byte, pageSize)
	t := page[d.HashesTableGPA%pageSize:][:0]
	t = append(t, hashTableGUID[:]...)
	t = binary.LittleEndian.AppendUint16(t, hashTableSize)
	entry := func(id [16]byte, hash [sha256.Size]byte) {
		t = append(t, id[:]...)
		t = binary.LittleEndian.AppendUint16(t, hashEntrySize)
		t = append(t, hash[:]...)
	}
	entry(hashCmdlineGUID, sha256.Sum256(append([]byte(strings.TrimSpace(d.Cmdline)), 0)))
	entry(hashInitrdGUID, d.InitrdHash)
	entry(hashKernelGUID, d.KernelHash)
	return page
}

const (
	bootEIP = 0xffff_fff0      // where the first vCPU begins
	vmsaGPA = 0xffff_ffff_f000 // where the firmware of the processor measures VMSAs
)

// vmsa returns the save area (AMD APM volume 2, table B-4) with which QEMU and KVM
// begin a vCPU at eip: reset state, in 4096 bytes. The signature is CPUID leaf 1's
// EAX, which a reset leaves in EDX.
func vmsa(eip, signature uint32, features uint64) []byte {
	page := make([]byte, pageSize)
	le := binary.LittleEndian
	for _, s := range []struct {
		at, selector, attributes uint16
		base                     uint32
	}{
		{0x00, 0, 0x93, 0}, {0x10, 0xf000, 0x9b, eip & 0xffff_0000}, {0x20, 0, 0x93, 0}, // ES, CS, SS
		{0x30, 0, 0x93, 0}, {0x40, 0, 0x93, 0}, {0x50, 0, 0x93, 0}, // DS, FS, GS
		{0x60, 0, 0, 0}, {0x70, 0, 0x82, 0}, {0x80, 0, 0, 0}, {0x90, 0, 0x8b, 0}, // GDTR, LDTR, IDTR, TR
	} {
		le.PutUint16(page[s.at:], s.selector)
		le.PutUint16(page[s.at+2:], s.attributes)
		le.PutUint32(page[s.at+4:], 0xffff)
		le.PutUint64(page[s.at+8:], uint64(s.base))
	}
	for _, r := range []struct {
		at    uint16
		value uint64
	}{
		{0x0d0, 0x1000},                // EFER: SVME, set by KVM
		{0x148, 0x40},                  // CR4: MCE, set by KVM
		{0x158, 0x10},                  // CR0: ET
		{0x160, 0x400},                 // DR7
		{0x168, 0xffff_0ff0},           // DR6
		{0x170, 2},                     // RFLAGS
		{0x178, uint64(eip & 0xffff)},  // RIP
		{0x268, 0x0007_0406_0007_0406}, // PAT
		{0x310, uint64(signature)},     // RDX
		{0x3b0, features},              // SEV_FEATURES
		{0x3e8, 1},                     // XCR0
		{0x408, 0x1f80},                // MXCSR
		{0x410, 0x37f},                 // x87 FCW
	} {
		le.PutUint64(page[r.at:], r.value)
	}
	return page
}

// cpuSignatures are family, model and stepping of QEMU's CPU models
// (target/i386/cpu.c); the versions of a model do not differ in them.
var cpuSignatures = []struct {
	model                    string
	versions                 int // -v1 to -vN
	family, number, stepping uint32
}{
	{"epyc", 5, 23, 1, 2},
	{"epyc-ibpb", 0, 23, 1, 2},
	{"epyc-rome", 5, 23, 49, 0},
	{"epyc-milan", 3, 25, 1, 1},
	{"epyc-genoa", 2, 25, 17, 0},
	{"epyc-turin", 1, 26, 0, 0},
}

// cpuSignature returns CPUID leaf 1's EAX of a CPU model.
func cpuSignature(model string) (uint32, bool) {
	if len(model) > 32 {
		return 0, false
	}
	model = strings.ToLower(model)
	for _, c := range cpuSignatures {
		rest, ok := strings.CutPrefix(model, c.model)
		if !ok || rest != "" && (len(rest) != 3 || rest[:2] != "-v" || rest[2] < '1' || int(rest[2]-'0') > c.versions) {
			continue
		}
		family := c.family << 8
		if c.family > 15 {
			family = 15<<8 | (c.family-15)<<20
		}
		return family | c.number>>4<<16 | c.number&15<<4 | c.stepping, true
	}
	return 0, false
}

// checkCmdline bounds a command line. A zero byte would end it for the kernel
// while more of it is measured.
func checkCmdline(cmdline string) error {
	if len(cmdline) > maxCmdline || !utf8.ValidString(cmdline) || strings.ContainsRune(cmdline, 0) {
		return fault.New("cmdline_malformed", "command line of %d bytes, want at most %d of UTF-8 text without zero bytes", len(cmdline), maxCmdline)
	}
	return nil
}
