// SPDX-License-Identifier: Apache-2.0

package disk

import "encoding/binary"

// luks2Header is a header of LUKS2 (copy 0 or 1) with the JSON area given: 16 KiB,
// which is all that the attack of threats.md E01 needs.
func luks2Header(json string, copyOf int) []byte {
	b := make([]byte, 0x4000)
	copy(b, [][]byte{[]byte("LUKS\xba\xbe"), []byte("SKUL\xba\xbe")}[copyOf])
	binary.BigEndian.PutUint16(b[6:], 2)
	binary.BigEndian.PutUint64(b[8:], 0x4000)
	binary.BigEndian.PutUint64(b[16:], 3)
	copy(b[72:], "sha256")
	binary.BigEndian.PutUint64(b[256:], uint64(copyOf)*0x4000)
	copy(b[0x1000:], json)
	return b
}

const nullCipherJSON = `{"keyslots":{"0":{"type":"luks2","key_size":64,"area":{"type":"raw","offset":"32768","size":"258048","encryption":"cipher_null-ecb","key_size":64}}},` +
	`"segments":{"0":{"type":"crypt","offset":"16777216","size":"dynamic","iv_tweak":"0","encryption":"cipher_null-ecb","sector_size":512}}}`
