// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"bytes"
	"encoding/binary"

	"github.com/dstack-go/dstack/internal/fault"
)

// GUIDs of the entries of OVMF's table that matter to SEV-SNP
// (OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm).
var (
	snpHashTableGUID = guid("7255371f-3a3b-4b04-927b-1da6efa8d454") // u32 address of the table of hashes
	snpResetGUID     = guid("00f771de-1a7e-4fcb-890e-68c77e2fb44e") // u32 EIP of further vCPUs
	snpMetadataGUID  = guid("dc886566-984a-4798-a75e-5585a7bf67cc") // u32 distance of the metadata from the end
)

func notSNP(what string) error {
	return fault.New("firmware_not_snp", "firmware: %s", what).WithFix("build OVMF for SEV-SNP with kernel hashes (OvmfPkg/AmdSev)")
}

// parseSNPFirmware returns what a launch digest needs of OVMF; command line and
// hashes of kernel and initrd are left open. Codes: firmware_not_snp,
// firmware_malformed.
func parseSNPFirmware(firmware []byte) (*SNPDocument, error) {
	if len(firmware) == 0 || len(firmware) > maxFirmware || len(firmware)%pageSize != 0 {
		return nil, badFirmware("%d bytes are not whole pages, or more than %d", len(firmware), maxFirmware)
	}
	var table, reset, metadata []byte
	err := walkGUIDTable(firmware, func(id [16]byte, data []byte) error {
		for _, e := range []struct {
			id   [16]byte
			name string
			data *[]byte
		}{{snpHashTableGUID, "hash table", &table}, {snpResetGUID, "reset vector", &reset}, {snpMetadataGUID, "SEV metadata", &metadata}} {
			if id != e.id {
				continue
			}
			if *e.data != nil || len(data) < 4 {
				return badFirmware("table of GUIDs: the %s's entry is there twice or has %d bytes, want at least 4", e.name, len(data))
			}
			*e.data = data
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if table == nil || reset == nil || metadata == nil {
		return nil, notSNP("its table of GUIDs lacks an entry for SEV-SNP with kernel hashes")
	}
	le := binary.LittleEndian
	d := &SNPDocument{HashesTableGPA: le.Uint32(table), ResetEIP: le.Uint32(reset)}
	if d.Sections, err = parseSEVMetadata(firmware, le.Uint32(metadata)); err != nil {
		return nil, err
	}
	d.OVMFHash = firmwareHash(firmware)
	return d, nil
}

// parseSEVMetadata reads the descriptor that lies fromEnd bytes before the end:
// "ASEV", size, version 1 and count, u32 each, and the sections, 12 bytes each.
func parseSEVMetadata(firmware []byte, fromEnd uint32) ([]SNPSection, error) {
	const header, item = 16, 12
	if uint64(fromEnd) > uint64(len(firmware)) || fromEnd < header {
		return nil, badFirmware("SEV metadata lie %d bytes before the end of %d bytes", fromEnd, len(firmware))
	}
	b := firmware[len(firmware)-int(fromEnd):]
	le := binary.LittleEndian
	size, version, count := le.Uint32(b[4:]), le.Uint32(b[8:]), le.Uint32(b[12:])
	if string(b[:4]) != "ASEV" || version != 1 {
		return nil, badFirmware("no SEV metadata of version 1 at %d bytes before the end", fromEnd)
	}
	if count == 0 || count > maxSNPSections {
		return nil, badFirmware("SEV metadata have %d sections, want 1 to %d", count, maxSNPSections)
	}
	if need := header + item*count; size < need || uint64(len(b)) < uint64(need) {
		return nil, badFirmware("SEV metadata of %d bytes are too short for %d sections", size, count)
	}
	sections := make([]SNPSection, count)
	for i := range sections {
		s := b[header+item*i:]
		sections[i] = SNPSection{GPA: le.Uint32(s), Size: le.Uint32(s[4:]), Type: SNPSectionType(le.Uint32(s[8:]))}
	}
	return sections, nil
}

// walkGUIDTable calls f for every entry of OVMF's table of GUIDs, from the last to
// the first. The table ends 32 bytes before the end of the firmware with a footer
// whose length is that of the whole table; each entry is data ‖ length u16 ‖ GUID
// 16 bytes, and its length counts all three.
func walkGUIDTable(firmware []byte, f func(id [16]byte, data []byte) error) error {
	const head = 18
	end := len(firmware) - 32
	if end < head || !bytes.Equal(firmware[end-16:end], footerGUID) {
		return notSNP("no table of GUIDs at its end")
	}
	size := int(binary.LittleEndian.Uint16(firmware[end-head:]))
	if size < head || size > end {
		return badFirmware("table of GUIDs has %d bytes", size)
	}
	rest := firmware[end-size : end-head]
	for len(rest) > 0 {
		if len(rest) < head {
			return badFirmware("table of GUIDs: %d bytes before the first entry", len(rest))
		}
		n := int(binary.LittleEndian.Uint16(rest[len(rest)-head:]))
		if n < head || n > len(rest) {
			return badFirmware("table of GUIDs: entry of %d bytes in a table with %d left", n, len(rest))
		}
		entry := rest[len(rest)-n:]
		if err := f([16]byte(entry[n-16:]), entry[:n-head]); err != nil {
			return err
		}
		rest = rest[:len(rest)-n]
	}
	return nil
}
