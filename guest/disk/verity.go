// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"encoding/hex"
	"fmt"

	"github.com/dstack-go/dstack/internal/fault"
)

// VerityBlock is the size in bytes of data and hash blocks.
const VerityBlock = 4096

// maxVerityData bounds dstack.rootfs_size: 64 GiB.
const maxVerityData = 64 << 30

// Verity names the content of a verity device: squashfs first, the superblock and
// hash tree of `veritysetup format` behind it (spec/guest-os.md §2.4).
type Verity struct {
	RootHash [32]byte // SHA-256 root of the tree, from the measured command line
	DataSize uint64   // bytes, a multiple of 4096; the superblock lies at this offset
}

// Salt is the project's verity salt: 32 zero bytes, as upstream's image builder
// uses; the salt need not be secret or unique since the root hash is measured.
var veritySalt [32]byte

// Target returns the dm-verity table for the device that holds both data and
// tree. The tree starts one block behind DataSize, after the superblock. There is
// no option to ignore corruption or to restart: a bad block is an I/O error.
func (v Verity) Target(device string) (Target, error) {
	if v.DataSize == 0 || v.DataSize%VerityBlock != 0 || v.DataSize > maxVerityData {
		return Target{}, fault.New("cmdline_malformed", "root size %d is not a multiple of %d between 1 block and 64 GiB", v.DataSize, VerityBlock)
	}
	blocks := v.DataSize / VerityBlock
	params := fmt.Sprintf("1 %s %s %d %d %d %d sha256 %s %s",
		device, device, VerityBlock, VerityBlock, blocks, blocks+1,
		hex.EncodeToString(v.RootHash[:]), hex.EncodeToString(veritySalt[:]))
	return Target{Length: v.DataSize / 512, Type: "verity", Params: []byte(params)}, nil
}

// OpenVerity makes the read-only device name over device and returns its node.
// It does not read the data: the first read of a block checks it.
func (m *Mapper) OpenVerity(name, device string, v Verity) (string, error) {
	t, err := v.Target(device)
	if err != nil {
		return "", err
	}
	return m.Create(name, "", true, t)
}
