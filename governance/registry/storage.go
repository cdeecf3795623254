// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/crypto"

	"github.com/dstack-go/dstack"
)

// Slots of both contracts (spec/governance.md §4.4), by the standards that name them.
var (
	ImplementationSlot = common.HexToHash("0x360894a13ba1a3210667c828492db98dca3e2076cc3735a920a3ca505d382bbc")
	OwnerSlot          = common.HexToHash("0x9016d09d72d40fdae2fd8ceac6b6234c7706214fd39c1cd1e609a0528c199300")
	PendingOwnerSlot   = common.HexToHash("0x237e158222e3e6968b72b9db0d8043aacf074ad9f650f0d1606b4d82ee432c00")

	noticeSlot   = Namespace("dstack.storage.Notice")
	governedSlot = Namespace("dstack.storage.Governed")
	appSlot      = Namespace("dstack.storage.App")
	kmsSlot      = Namespace("dstack.storage.Kms")
)

// Namespace is where ERC-7201 puts a namespace's first slot.
func Namespace(id string) common.Hash {
	inner := crypto.Keccak256Hash([]byte(id)).Big()
	slot := crypto.Keccak256Hash(common.BigToHash(inner.Sub(inner, common.Big1)).Bytes())
	slot[31] = 0
	return slot
}

// plus is the n-th slot after one.
func plus(slot common.Hash, n uint64) common.Hash {
	b := slot.Big()
	return common.BigToHash(b.Add(b, uintHash(n).Big()))
}

// MappingSlot is where a mapping at slot has the value of a key.
func MappingSlot(slot common.Hash, key [32]byte) common.Hash {
	return crypto.Keccak256Hash(key[:], slot[:])
}

// Field is a value within a slot: width bytes, that end offset bytes before its end.
type Field struct {
	Slot          common.Hash
	Offset, Width int
}

// Of takes the field out of the slot's word, as a number.
func (f Field) Of(word common.Hash) common.Hash {
	var out common.Hash
	end := 32 - f.Offset
	copy(out[32-f.Width:], word[end-f.Width:end])
	return out
}

// True reports whether a field is not zero, as Solidity reads a bool.
func (f Field) True(word common.Hash) bool { return f.Of(word) != common.Hash{} }

func flag(slot common.Hash, offset int) Field { return Field{slot, offset, 1} }

func listed(base uint64, key [32]byte) Field { return flag(MappingSlot(uintHash(base), key), 0) }

// What an app's contract holds.

func (App) ComposeHashSlot(h dstack.ComposeHash) Field { return listed(0, h) }
func (App) UpgradesDisabledSlot() Field                { return flag(uintHash(1), 0) }
func (App) AllowAnyDeviceSlot() Field                  { return flag(uintHash(1), 1) }
func (App) DeviceSlot(d dstack.DeviceID) Field         { return listed(2, d) }
func (App) RequireTCBSlot() Field                      { return flag(uintHash(3), 0) }
func (App) FrozenSlot() Field                          { return flag(appSlot, 0) }

// What the registry holds.

func (KMS) GatewaySlot() common.Hash { return uintHash(4) } // a string, as Solidity packs it
func (KMS) RegisteredAppSlot(app common.Address) Field {
	return listed(5, addressHash(app))
}
func (KMS) MRSlot(mr [32]byte) Field             { return listed(6, mr) }
func (KMS) DeviceSlot(d dstack.DeviceID) Field   { return listed(7, d) }
func (KMS) OSImageSlot(h dstack.ImageHash) Field { return listed(8, h) }
func (KMS) AppImplementationSlot() Field         { return Field{uintHash(9), 0, 20} }
func (KMS) KMSUpgradesDisabledSlot() Field       { return flag(kmsSlot, 0) }
func (KMS) MinOSEpochSlot() Field                { return Field{kmsSlot, 1, 8} }
func (KMS) OSImageEpochSlot(h dstack.ImageHash) Field {
	return Field{MappingSlot(plus(kmsSlot, 1), h), 0, 8}
}
func (KMS) WithdrawnAppSlot(app common.Address) Field {
	return flag(MappingSlot(plus(kmsSlot, 2), addressHash(app)), 0)
}

// What both hold.

func (governed) OwnerSlot() Field        { return Field{OwnerSlot, 0, 20} }
func (governed) PendingOwnerSlot() Field { return Field{PendingOwnerSlot, 0, 20} }
func (governed) NoticeSlot() Field       { return Field{noticeSlot, 0, 8} }
func (governed) GuardianSlot() Field     { return Field{noticeSlot, 8, 20} }

// ChangeSlot holds an announcement: announcedAt, effectiveAt, pending.
func (governed) ChangeSlot(c Change) common.Hash {
	return MappingSlot(MappingSlot(plus(noticeSlot, 1), c.Policy), c.Value)
}

// AnnouncedSlot holds when an announcement was made, also of a change that was made since.
func (g governed) AnnouncedSlot(c Change) Field { return Field{g.ChangeSlot(c), 0, 8} }

func (governed) PlatformRequiredSlot() Field { return flag(governedSlot, 0) }
func (governed) KeyEpochSlot() Field         { return Field{governedSlot, 1, 8} }
func (governed) OldestKeyEpochSlot() Field   { return Field{governedSlot, 9, 8} }
func (governed) TEEVariantSlot(word string) Field {
	return flag(MappingSlot(plus(governedSlot, 1), PolicyID(word)), 0)
}
func (governed) TCBStatusSlot(word string) Field {
	return flag(MappingSlot(plus(governedSlot, 2), PolicyID(word)), 0)
}
func (governed) AdvisoryBlockedSlot(word string) Field {
	return flag(MappingSlot(plus(governedSlot, 3), PolicyID(word)), 0)
}
