// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"encoding/hex"
	"fmt"
)

// CryptKeySize is the length of a data-disk key: two AES-256 keys for XTS.
const CryptKeySize = 64

// cryptSector is the encryption sector in bytes. Larger sectors mean fewer cipher
// calls and fewer IVs; ext4 with 4096-byte blocks never splits one.
const cryptSector = 4096

// CryptTarget returns the dm-crypt table that maps the whole of device, size bytes
// long, under key. It copies the key as text into Params, which [Mapper.Create]
// wipes. No discards: the host must not learn which blocks are free.
func CryptTarget(device string, size uint64, key *[CryptKeySize]byte) (Target, error) {
	size -= size % cryptSector
	if size < 1<<20 {
		return Target{}, fmt.Errorf("data disk %s has %d bytes: too small", device, size)
	}
	// Appended piecewise so that no string, which could not be wiped, holds the key.
	params := make([]byte, 0, 32+2*CryptKeySize+len(device)+32)
	params = append(params, "aes-xts-plain64 "...)
	params = hex.AppendEncode(params, key[:])
	params = fmt.Appendf(params, " 0 %s 0 1 sector_size:%d", device, cryptSector)
	return Target{Length: size / 512, Type: "crypt", Params: params, Secret: true}, nil
}

// OpenCrypt makes the device name over the whole of device and returns its node.
func (m *Mapper) OpenCrypt(name, device string, size uint64, key *[CryptKeySize]byte) (string, error) {
	t, err := CryptTarget(device, size, key)
	if err != nil {
		return "", err
	}
	return m.Create(name, "", false, t)
}
