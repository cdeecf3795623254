// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	// HeadSize is the part of a data disk, from its start, that the record has to
	// itself: 1 MiB, of which all but the first sector is zero and never read back.
	HeadSize = 1 << 20

	// recordSize is one sector, which disks write whole or not at all.
	recordSize  = 512
	recordMAC   = recordSize - sha256.Size
	recordMagic = "dstack-sealed\x00\x00\x00"
	// recordVersion is of this layout; there is no other.
	recordVersion = 1
)

// The states of a volume.
const (
	// stateFormatting: nothing of the volume is worth keeping yet.
	stateFormatting = 1
	// stateReady: the volume holds the app's data.
	stateReady = 2
)

// record is the first sector of a data disk. All integers are big-endian.
//
//	 0  magic, 16 bytes
//	16  version, 4
//	20  state, 4
//	24  file system, 4
//	28  zero, 4
//	32  size of the disk that the volume uses, in bytes, 8
//	40  generation, 8: one more each time the volume grows
//	48  seed of the volume's keys, 32
//	80  salt of dm-integrity, 16
//	96  zero, 384
//	480 HMAC-SHA256 of the bytes before, under the key with the role "record"
//
// Nothing in it chooses an algorithm or a place: those are constants of this code.
type record struct {
	state      uint32
	fs         FS
	size       uint64
	generation uint64
	seed       [32]byte
	salt       [integritySalt]byte
}

func (r *record) encode(key []byte) []byte {
	b := make([]byte, recordSize)
	copy(b, recordMagic)
	binary.BigEndian.PutUint32(b[16:], recordVersion)
	binary.BigEndian.PutUint32(b[20:], r.state)
	binary.BigEndian.PutUint32(b[24:], uint32(r.fs))
	binary.BigEndian.PutUint64(b[32:], r.size)
	binary.BigEndian.PutUint64(b[40:], r.generation)
	copy(b[48:], r.seed[:])
	copy(b[80:], r.salt[:])
	m := hmac.New(sha256.New, key)
	m.Write(b[:recordMAC])
	m.Sum(b[:recordMAC])
	return b
}

// parseRecord checks the MAC before it looks at any field; b is HeadSize bytes of
// which the caller keeps the only copy.
func parseRecord(b, key []byte) (*record, error) {
	if len(b) < recordSize || !bytes.HasPrefix(b, []byte(recordMagic)) {
		return nil, fault.New("disk_foreign", "the data disk has no record of ours")
	}
	b = b[:recordSize]
	m := hmac.New(sha256.New, key)
	m.Write(b[:recordMAC])
	if !hmac.Equal(m.Sum(nil), b[recordMAC:]) {
		return nil, fault.New("disk_key_mismatch", "the data disk was sealed for another app or instance, or its record was altered").
			WithFix("attach the disk that belongs to this instance")
	}
	if v := binary.BigEndian.Uint32(b[16:]); v != recordVersion {
		return nil, fault.New("disk_version", "the data disk has a record of version %d, which this system does not know", v).
			WithFix("start the OS version that wrote it, or a newer one")
	}
	r := &record{
		state:      binary.BigEndian.Uint32(b[20:]),
		fs:         FS(binary.BigEndian.Uint32(b[24:])),
		size:       binary.BigEndian.Uint64(b[32:]),
		generation: binary.BigEndian.Uint64(b[40:]),
		seed:       [32]byte(b[48:]),
		salt:       [integritySalt]byte(b[80:]),
	}
	// Authentic, hence written by this code or by a newer one that kept the version.
	if r.state != stateFormatting && r.state != stateReady || r.fs != Ext4 && r.fs != XFS || r.size < MinSealed || r.size > MaxSealed || r.size%cryptSector != 0 {
		return nil, fault.New("disk_version", "the data disk has a record that this system cannot have written")
	}
	return r, nil
}
