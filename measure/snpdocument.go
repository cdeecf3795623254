// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"crypto/sha256"
	"encoding/hex"

	"github.com/fxamacker/cbor/v2"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// SNPDocumentName is the name of the document in an image and in its
// sha256sum.txt.
const SNPDocumentName = "measurement.snp.cbor"

// SNPSectionType is the type of a section of OVMF's SEV metadata (edk2
// OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm).
type SNPSectionType uint32

// Section types. All but SEC memory and the SVSM's calling areas are one page.
const (
	SNPSecMem       SNPSectionType = 1
	SNPSecrets      SNPSectionType = 2
	SNPCPUID        SNPSectionType = 3
	SNPSVSMCAA      SNPSectionType = 4
	SNPKernelHashes SNPSectionType = 0x10
)

// SNPSection is memory that the host prepares for the firmware. Address and size
// are in bytes, whole pages below 4 GiB.
type SNPSection struct {
	GPA  uint32         `cbor:"gpa"`
	Size uint32         `cbor:"size"`
	Type SNPSectionType `cbor:"type"`
}

// SNPDocument is the content of measurement.snp.cbor, version 3: what a verifier
// needs of an image to derive the launch digest of any shape of VM
// (spec/measurement.md §7).
type SNPDocument struct {
	Cmdline        string
	OVMFHash       dstack.Measurement // launch digest after the firmware's pages
	KernelHash     [sha256.Size]byte
	InitrdHash     [sha256.Size]byte // of the empty string without an initrd
	HashesTableGPA uint32            // where the firmware looks for the hashes of what it boots
	ResetEIP       uint32            // where vCPUs other than the first begin
	Sections       []SNPSection      // in the firmware's order, 1 to 64
}

// The CBOR form. Field order is the order on the wire.
type wireSNP struct {
	Version        uint64       `cbor:"version"`
	Cmdline        string       `cbor:"cmdline"`
	OVMFHash       []byte       `cbor:"ovmf_hash"`
	KernelHash     []byte       `cbor:"kernel_hash"`
	InitrdHash     []byte       `cbor:"initrd_hash"`
	HashesTableGPA uint32       `cbor:"hashes_table_gpa"`
	ResetEIP       uint32       `cbor:"reset_eip"`
	Sections       []SNPSection `cbor:"ovmf_sections"`
}

// Marshal returns the CBOR form: definite lengths, keys in upstream's order.
func (d *SNPDocument) Marshal() ([]byte, error) {
	if err := d.check(); err != nil {
		return nil, err
	}
	return cbor.Marshal(wireSNP{
		Version: 3, Cmdline: d.Cmdline, OVMFHash: d.OVMFHash[:], KernelHash: d.KernelHash[:], InitrdHash: d.InitrdHash[:],
		HashesTableGPA: d.HashesTableGPA, ResetEIP: d.ResetEIP, Sections: d.Sections,
	})
}

// ParseSNPDocument reads a document of version 3 of at most 64 KiB. Unknown keys
// are ignored, duplicate keys, indefinite lengths and trailing bytes are refused.
// Codes: measurement_malformed, cmdline_malformed.
func ParseSNPDocument(data []byte) (*SNPDocument, error) {
	if len(data) > maxDocument {
		return nil, badDocument("%d bytes, want at most %d", len(data), maxDocument)
	}
	mode, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		MaxNestedLevels:   8,
		MaxArrayElements:  maxSNPSections,
		MaxMapPairs:       64,
	}.DecMode()
	if err != nil {
		return nil, err
	}
	var w wireSNP
	if err := mode.Unmarshal(data, &w); err != nil {
		return nil, fault.Wrap(err, "measurement_malformed", "measurement document")
	}
	if w.Version != 3 {
		return nil, badDocument("version %d, want 3", w.Version)
	}
	d := &SNPDocument{Cmdline: w.Cmdline, HashesTableGPA: w.HashesTableGPA, ResetEIP: w.ResetEIP, Sections: w.Sections}
	if err := d.setHashes(w.OVMFHash, w.KernelHash, w.InitrdHash); err != nil {
		return nil, err
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	return d, nil
}

// setHashes copies hashes of exactly the right length.
func (d *SNPDocument) setHashes(ovmf, kernel, initrd []byte) error {
	for _, f := range []struct {
		name     string
		from, to []byte
	}{
		{"ovmf_hash", ovmf, d.OVMFHash[:]}, {"kernel_hash", kernel, d.KernelHash[:]}, {"initrd_hash", initrd, d.InitrdHash[:]},
	} {
		if len(f.from) != len(f.to) {
			return badDocument("%s has %d bytes, want %d", f.name, len(f.from), len(f.to))
		}
		copy(f.to, f.from)
	}
	return nil
}

// check enforces the limits, and that the kernel is measured at all.
func (d *SNPDocument) check() error {
	if err := checkCmdline(d.Cmdline); err != nil {
		return err
	}
	if len(d.Sections) == 0 || len(d.Sections) > maxSNPSections {
		return badDocument("%d sections of the firmware, want 1 to %d", len(d.Sections), maxSNPSections)
	}
	pages, hashes := uint32(0), 0
	for i, s := range d.Sections {
		switch {
		case s.GPA%pageSize != 0 || s.Size%pageSize != 0 || s.Size == 0 || uint64(s.GPA)+uint64(s.Size) > highBase:
			return badDocument("section %d, %#x+%#x, is not whole pages below 4 GiB", i, s.GPA, s.Size)
		case s.Size/pageSize > maxSNPPages-pages:
			return badDocument("sections cover more than %d pages", maxSNPPages)
		}
		pages += s.Size / pageSize
		switch s.Type {
		case SNPSecMem, SNPSVSMCAA:
			continue
		case SNPSecrets, SNPCPUID, SNPKernelHashes:
			if s.Size != pageSize {
				return badDocument("section %d of type %d has %d bytes, want one page", i, s.Type, s.Size)
			}
		default:
			return badDocument("section %d has unknown type %d", i, s.Type)
		}
		if s.Type == SNPKernelHashes {
			hashes++
		}
	}
	if hashes != 1 {
		return badDocument("%d sections for the hashes of kernel, initrd and command line, want 1", hashes)
	}
	if d.HashesTableGPA%pageSize > pageSize-hashTableRoom {
		return badDocument("table of hashes at %#x does not fit in its page", d.HashesTableGPA)
	}
	return nil
}

// SNPSplit is the "sev_snp_measurement" of a vm_config: the image's document with
// the checksum file that names it, and the shape of the VM.
type SNPSplit struct {
	Split
	SNPShape
}

// ParseSNPSplit reads the text of "sev_snp_measurement", a JSON object. Unknown
// keys are ignored, as in all of vm_config. The code of every error is
// measurement_malformed.
func ParseSNPSplit(text []byte) (*SNPSplit, error) {
	var s SNPSplit
	if err := strictjson.Decode(text, &s, strictjson.Limits{Size: maxVMConfig, Depth: 4, Unknown: true}); err != nil {
		return nil, fault.Wrap(err, "measurement_malformed", "sev_snp_measurement")
	}
	return &s, nil
}

// Compute returns the launch digest of the VM, and the document it follows from,
// after it has checked that the document belongs to the image. Codes: those of
// [Split.Bind], [ParseSNPDocument] and [SNPDocument.Measurement].
func (s *SNPSplit) Compute(image dstack.ImageHash) (dstack.Measurement, *SNPDocument, error) {
	if err := s.Bind(image, SNPDocumentName); err != nil {
		return dstack.Measurement{}, nil, err
	}
	d, err := ParseSNPDocument(s.Measurement)
	if err != nil {
		return dstack.Measurement{}, nil, err
	}
	m, err := d.Measurement(s.SNPShape)
	return m, d, err
}

// ParseSNPInput reads upstream's historic MeasurementInput: document and shape in
// one JSON object of at most 64 KiB, unknown keys refused. Nothing binds it to an
// image. The code of every error is measurement_malformed or cmdline_malformed.
func ParseSNPInput(text []byte) (*SNPDocument, SNPShape, error) {
	var w struct {
		Cmdline        string `json:"base_cmdline"`
		OVMFHash       string `json:"ovmf_hash"`
		KernelHash     string `json:"kernel_hash"`
		InitrdHash     string `json:"initrd_hash"` // empty: no initrd
		HashesTableGPA uint32 `json:"sev_hashes_table_gpa"`
		ResetEIP       uint32 `json:"sev_es_reset_eip"`
		SNPShape
		Sections []struct {
			GPA  uint32         `json:"gpa"`
			Size uint32         `json:"size"`
			Type SNPSectionType `json:"section_type"`
		} `json:"ovmf_sections"`
	}
	if err := strictjson.Decode(text, &w, strictjson.Limits{Size: maxDocument, Depth: 4}); err != nil {
		return nil, SNPShape{}, fault.Wrap(err, "measurement_malformed", "measurement input")
	}
	d := &SNPDocument{Cmdline: w.Cmdline, HashesTableGPA: w.HashesTableGPA, ResetEIP: w.ResetEIP}
	var hashes [3][]byte
	for i, text := range []string{w.OVMFHash, w.KernelHash, w.InitrdHash} {
		var err error
		if hashes[i], err = hex.DecodeString(text); err != nil {
			return nil, SNPShape{}, fault.Wrap(err, "measurement_malformed", "measurement input")
		}
	}
	if w.InitrdHash == "" {
		empty := sha256.Sum256(nil)
		hashes[2] = empty[:]
	}
	if err := d.setHashes(hashes[0], hashes[1], hashes[2]); err != nil {
		return nil, SNPShape{}, err
	}
	for _, s := range w.Sections {
		d.Sections = append(d.Sections, SNPSection(s))
	}
	if err := d.check(); err != nil {
		return nil, SNPShape{}, err
	}
	return d, w.SNPShape, nil
}
