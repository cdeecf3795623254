// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

func TestSealedVolume(t *testing.T) {
	scenario(t, "what is written is there after reopening", "a larger disk grows and shows nothing of the host",
		"a format that ends at any step is done again", "a format without power is done again",
		"what was synced survives power cuts", "a file system with errors is repaired", "ten gigabytes", "XFS")
}

func TestThreat_E01_ForeignHeadersAndWipedDisksAreRefused(t *testing.T) {
	scenario(t, "a null-cipher header is refused", "a wiped disk is refused", "a truncated disk is refused")
}

func TestThreat_E02_WhatIsCheckedIsWhatIsUsed(t *testing.T) {
	scenario(t, "a record that changes between two reads is read once", "a superblock that the host plants is not read")
}

func TestThreat_E04_AlteredBlocksAreReadErrors(t *testing.T) {
	scenario(t, "a flipped bit is a read error", "without integrity a flipped bit changes the text silently",
		"a block in another place is a read error", "the journal is replayed, and not when it was altered")
}

func TestThreat_E05_DisksOfOtherInstancesAreRefused(t *testing.T) {
	scenario(t, "another key is refused", "the disk of another instance is refused",
		"a record before the blocks of another volume opens nothing")
}

func TestThreat_E07_SwapIsUnderAKeyOfItsOwn(t *testing.T) {
	scenario(t, "swap is encrypted and leaves nothing")
}

func TestThreat_E08_CorruptVolumesAreReadErrors(t *testing.T) {
	scenario(t, "a verity volume is found among bogus ones and read")
}

// Fifty times: the power goes while files are written; what was synced is there.
func TestSoakPowerCuts(t *testing.T) {
	if os.Getenv("DSTACK_SOAK") == "" {
		t.Skip("SKIP: fifty power cuts; run with make soak")
	}
	needVM(t)
	seed := uint64(time.Now().UnixNano() & 0xffffffff)
	if s := os.Getenv("SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 32); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SEED=%d", seed)
	check(t, boot("power_cuts", fmt.Sprint(seed)), "power cuts")
}
