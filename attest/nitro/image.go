// SPDX-License-Identifier: Apache-2.0

package nitro

import (
	"crypto/sha256"
	"crypto/sha512"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// ImageHash returns what stands for os_image_hash of an enclave:
// SHA-256(PCR0 ‖ PCR1 ‖ PCR2), the registers of image, kernel and application
// (attestation.md §5.5). Registers of zeros, which an enclave in debug mode has,
// name no image (nitro_debug); others than of 48 bytes are nitro_pcr_missing.
func ImageHash(pcrs map[uint32][]byte) (dstack.ImageHash, error) {
	sum, err := hashOf(pcrs, 0, 1, 2)
	if err != nil {
		return dstack.ImageHash{}, err
	}
	for index := range uint32(3) {
		if isZero(pcrs[index]) {
			return dstack.ImageHash{}, fault.New("nitro_debug", "register %d is zero: the enclave runs in debug mode", index)
		}
	}
	return sum, nil
}

// BootPCRDigest returns what aws_measurement's boot_pcr_digest must be for an
// instance with a NitroTPM: SHA-256(PCR4 ‖ PCR7 ‖ PCR12), the registers of boot
// manager, secure boot policy and kernel command line (attestation.md §8.3).
// Registers other than of 48 bytes are nitro_pcr_missing.
func BootPCRDigest(pcrs map[uint32][]byte) ([sha256.Size]byte, error) {
	return hashOf(pcrs, 4, 7, 12)
}

// ConfigPCR8 returns what PCR8 of a NitroTPM is when the guest has committed to a
// configuration: SHA-384(0^48 ‖ id), one extension by the document's MRCONFIGID
// (form V2).
func ConfigPCR8(id dstack.MRConfigID) dstack.Measurement {
	return sha512.Sum384(append(make([]byte, PCRSize), id[:]...))
}

func hashOf(pcrs map[uint32][]byte, indices ...uint32) ([sha256.Size]byte, error) {
	h := sha256.New()
	for _, index := range indices {
		if len(pcrs[index]) != PCRSize {
			return [sha256.Size]byte{}, fault.New("nitro_pcr_missing", "register %d has %d bytes, want %d", index, len(pcrs[index]), PCRSize)
		}
		h.Write(pcrs[index])
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}
