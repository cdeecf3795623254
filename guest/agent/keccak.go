// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"math/bits"
)

// keccak384 is Keccak[c=768] with the padding of the competition (0x01), of 48
// bytes. Upstream's Tappd.TdxQuote offers it, and x/crypto/sha3 has the legacy
// padding for 256 and 512 bits only. It hashes public report data; nothing here
// needs to run in constant time, though it does.
func keccak384(data []byte) (sum [48]byte) {
	const rate = 200 - 2*48
	var state [25]uint64
	padded := append(append([]byte(nil), data...), 0x01)
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
	for i := range len(sum) / 8 {
		binary.LittleEndian.PutUint64(sum[8*i:], state[i])
	}
	return sum
}

// keccakF is Keccak-f[1600] (FIPS 202 §3.3), lane (x, y) at index x+5y.
func keccakF(a *[25]uint64) {
	lfsr := byte(1) // the round constants' generator, FIPS 202 algorithm 5
	for range 24 {
		// θ
		var c [5]uint64
		for i, lane := range a {
			c[i%5] ^= lane
		}
		for i := range a {
			a[i] ^= c[(i+4)%5] ^ bits.RotateLeft64(c[(i+1)%5], 1)
		}
		// ρ and π
		x, y, lane := 1, 0, a[1]
		for t := range 24 {
			x, y = y, (2*x+3*y)%5
			lane, a[x+5*y] = a[x+5*y], bits.RotateLeft64(lane, (t+1)*(t+2)/2)
		}
		// χ
		for row := 0; row < 25; row += 5 {
			r := [5]uint64(a[row : row+5])
			for x := range 5 {
				a[row+x] = r[x] ^ ^r[(x+1)%5]&r[(x+2)%5]
			}
		}
		// ι: bit j of the generator goes to bit 2^j-1 of lane (0, 0)
		for j := range 7 {
			a[0] ^= uint64(lfsr&1) << (1<<j - 1)
			lfsr = lfsr<<1 ^ lfsr>>7*0x71
		}
	}
}
