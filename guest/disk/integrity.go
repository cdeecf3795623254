// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/bits"
)

// What dm-integrity is told, always the same (Documentation/admin-guide/
// device-mapper/dm-integrity.rst): journal mode, HMAC-SHA256 of blocks of 4096
// bytes, keyed journal, 16 MiB of journal.
const (
	integritySalt      = 16
	integrityTag       = sha256.Size
	log2BlockSectors   = 3  // blocks of 4096 bytes
	log2Interleave     = 15 // data between two runs of tags: 16 MiB
	log2BitmapBlocks   = 12 // written by the kernel though there is no bitmap
	journalSectors     = 32768
	superblockSectors  = 8
	superblockSize     = superblockSectors * 512
	superblockMAC      = 512 - sha256.Size
	superblockFlags    = 0x1 | 0x8 | 0x10 // journal MAC, fixed padding, fixed HMAC
	superblockVersion  = 5
	integrityArguments = "J 7 block_size:4096 journal_sectors:32768 interleave_sectors:32768 fix_padding fix_hmac"
)

// The layout that follows from them, as drivers/md/dm-integrity.c computes it.
const (
	journalEntry          = (8 + 8<<log2BlockSectors + integrityTag + 7) &^ 7 // sector, last bytes of each sector, tag
	journalEntriesSector  = (512 - 8 - 8) / journalEntry                      // less commit id and MAC
	journalSectionEntries = journalEntriesSector * 8
	journalSectionSectors = journalSectionEntries<<log2BlockSectors + 8
	journalSections       = journalSectors / journalSectionSectors
	initialSectors        = superblockSectors + journalSectionSectors*journalSections
	// tagRun is the tags of one interleave, a multiple of 4096 bytes.
	tagRun = (integrityTag << (log2Interleave - log2BlockSectors)) / 512
)

// providedSectors returns how many sectors dm-integrity offers on a device with the
// given number: what get_provided_data_sectors finds, the kernel's own search
// included, which is greedy by bits. 0: the device is too small.
func providedSectors(sectors uint64) uint64 {
	if initialSectors+8 >= sectors {
		return 0
	}
	var provided uint64
	for bit := bits.Len64(sectors) - 1; bit >= log2BlockSectors; bit-- {
		try := provided | 1<<bit
		area, offset := (try-1)>>log2Interleave, (try-1)&(1<<log2Interleave-1)
		if area<<log2Interleave+(area+1)*tagRun+initialSectors+offset < sectors {
			provided = try
		}
	}
	return provided
}

// superblock returns the superblock that dm-integrity would write for a device that
// provides so many sectors. The kernel is given this one, from memory; what lies on
// the disk is never read.
func superblock(provided uint64, salt *[integritySalt]byte, journalKey []byte) []byte {
	b := make([]byte, superblockSize)
	copy(b, "integrt\x00")
	b[8], b[9] = superblockVersion, log2Interleave
	binary.LittleEndian.PutUint16(b[10:], integrityTag)
	binary.LittleEndian.PutUint32(b[12:], journalSections)
	binary.LittleEndian.PutUint64(b[16:], provided)
	binary.LittleEndian.PutUint32(b[24:], superblockFlags)
	b[28], b[29] = log2BlockSectors, log2BitmapBlocks
	copy(b[48:], salt[:])
	m := hmac.New(sha256.New, journalKey)
	m.Write(b[:superblockMAC])
	m.Sum(b[:superblockMAC])
	return b
}

// saltOf returns the salt that the kernel drew, after it has compared every other
// byte of the superblock with what this code expects.
func saltOf(b []byte, provided uint64, journalKey []byte) ([integritySalt]byte, error) {
	var salt [integritySalt]byte
	if len(b) != superblockSize {
		return salt, fmt.Errorf("superblock of %d bytes", len(b))
	}
	salt = [integritySalt]byte(b[48:])
	if !bytes.Equal(b, superblock(provided, &salt, journalKey)) {
		return salt, fmt.Errorf("dm-integrity made another superblock than expected: %x", b[:48])
	}
	return salt, nil
}

// integrityTarget returns the table over device, whose superblock is in memory. The
// keys are in Params.
func integrityTarget(device string, provided uint64, k *volumeKeys) Target {
	// Appended piecewise so that no string, which could not be wiped, holds a key.
	p := make([]byte, 0, 512)
	p = fmt.Appendf(p, "%s 0 %d %s", device, integrityTag, integrityArguments)
	p = append(p, " internal_hash:hmac(sha256):"...)
	p = hex.AppendEncode(p, k.integrity)
	p = append(p, " journal_mac:hmac(sha256):"...)
	p = hex.AppendEncode(p, k.journal)
	return Target{Length: provided, Type: "integrity", Params: p, Secret: true}
}
