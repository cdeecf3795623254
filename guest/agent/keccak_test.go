// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/crypto/sha3"
)

// The permutation is checked against the one of x/crypto through Keccak-256,
// whose sponge differs from keccak384's only in the rate.
func TestTheSpongeAgreesWithKeccak256(t *testing.T) {
	for _, n := range []int{0, 1, 135, 136, 137, 500} {
		data := bytes.Repeat([]byte{0xa7}, n)
		const rate = 136
		var state [25]uint64
		padded := append(bytes.Clone(data), 1)
		for len(padded)%rate != 0 {
			padded = append(padded, 0)
		}
		padded[len(padded)-1] |= 0x80
		for ; len(padded) > 0; padded = padded[rate:] {
			for i := range rate / 8 {
				state[i] ^= binary.LittleEndian.Uint64(padded[8*i:])
			}
			keccakF(&state)
		}
		var got []byte
		for _, lane := range state[:4] {
			got = binary.LittleEndian.AppendUint64(got, lane)
		}
		h := sha3.NewLegacyKeccak256()
		h.Write(data)
		if !bytes.Equal(got, h.Sum(nil)) {
			t.Errorf("%d bytes: %x, want %x", n, got, h.Sum(nil))
		}
	}
}
