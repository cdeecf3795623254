// SPDX-License-Identifier: Apache-2.0

package binding

import (
	"encoding/binary"
	"math/bits"
)

// keccak384 is Keccak[768] with the padding from before FIPS 202 (first byte
// 0x01), which upstream offers and no library of ours has; its siblings of 256
// and 512 bits come from x/crypto, against which the test compares keccak.
func keccak384(data []byte) []byte { return keccak(data, 48) }

// keccak returns size bytes, at most one block, of the sponge with a capacity of
// twice that (the Keccak reference, version 3.0, section 1).
func keccak(data []byte, size int) []byte {
	rate := 200 - 2*size
	padded := append(append([]byte{}, data...), 1)
	for len(padded)%rate != 0 {
		padded = append(padded, 0)
	}
	padded[len(padded)-1] |= 0x80
	var a [25]uint64
	for ; len(padded) > 0; padded = padded[rate:] {
		for i := range rate / 8 {
			a[i] ^= binary.LittleEndian.Uint64(padded[8*i:])
		}
		permute(&a)
	}
	var out []byte
	for _, lane := range a {
		out = binary.LittleEndian.AppendUint64(out, lane)
	}
	return out[:size]
}

// permute is Keccak-f[1600] on lanes a[x + 5y].
func permute(a *[25]uint64) {
	lfsr := byte(1)
	for range 24 {
		var c, d [5]uint64 // theta
		for x := range 5 {
			c[x] = a[x] ^ a[x+5] ^ a[x+10] ^ a[x+15] ^ a[x+20]
		}
		for x := range 5 {
			d[x] = c[(x+4)%5] ^ bits.RotateLeft64(c[(x+1)%5], 1)
		}
		for i := range a {
			a[i] ^= d[i%5]
		}
		x, y, t := 1, 0, a[1] // rho and pi
		for i := range 24 {
			x, y = y, (2*x+3*y)%5
			t, a[x+5*y] = a[x+5*y], bits.RotateLeft64(t, (i+1)*(i+2)/2)
		}
		for y := 0; y < 25; y += 5 { // chi
			row := [5]uint64(a[y : y+5])
			for x := range 5 {
				a[y+x] = row[x] ^ ^row[(x+1)%5]&row[(x+2)%5]
			}
		}
		for j := range 7 { // iota
			if lfsr&1 != 0 {
				a[0] ^= 1 << (1<<j - 1)
			}
			high := lfsr >> 7
			if lfsr <<= 1; high != 0 {
				lfsr ^= 0x71
			}
		}
	}
}
