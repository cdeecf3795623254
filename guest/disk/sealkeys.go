// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
)

// DiskKeySize is the length in bytes of an app's disk key.
const DiskKeySize = 32

// The roles of the keys that are derived from a disk key.
const (
	roleRecord    = "record"    // HMAC-SHA256 of the record, 32 bytes
	roleData      = "data-xts"  // AES-256-XTS of the data, 64 bytes
	roleIntegrity = "integrity" // HMAC-SHA256 of blocks, 32 bytes
	roleJournal   = "journal"   // HMAC-SHA256 of journal and superblock, 32 bytes
)

// sealVolume names the one volume that an instance has.
const sealVolume = "data"

// sealInfo is LP("dstack-seal-v1") ‖ LP(role) ‖ LP(volume), where LP is the length
// as 4 bytes, big-endian, and the bytes: no two triples give the same text.
func sealInfo(role, volume string) string {
	var b []byte
	for _, part := range []string{"dstack-seal-v1", role, volume} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(part)))
		b = append(b, part...)
	}
	return string(b)
}

// deriveKey is HKDF-SHA256 (RFC 5869) with the seed of the volume as salt; the key
// of the record, which holds the seed, has none. The caller wipes the result.
func deriveKey(key *[DiskKeySize]byte, seed []byte, role string, size int) ([]byte, error) {
	return hkdf.Key(sha256.New, key[:], seed, sealInfo(role, sealVolume), size)
}

// volumeKeys are the keys of one formatting of a volume: the seed is drawn anew each
// time, so that nothing that an earlier one left on the disk authenticates.
type volumeKeys struct {
	data, integrity, journal []byte
}

func deriveVolumeKeys(key *[DiskKeySize]byte, seed *[32]byte) (*volumeKeys, error) {
	k := &volumeKeys{}
	for _, d := range []struct {
		to   *[]byte
		role string
		size int
	}{{&k.data, roleData, CryptKeySize}, {&k.integrity, roleIntegrity, 32}, {&k.journal, roleJournal, 32}} {
		b, err := deriveKey(key, seed[:], d.role, d.size)
		if err != nil {
			k.wipe()
			return nil, err
		}
		*d.to = b
	}
	return k, nil
}

func (k *volumeKeys) wipe() {
	clear(k.data)
	clear(k.integrity)
	clear(k.journal)
}
