// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"slices"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// Registers that a Google Cloud VM quotes, all of the SHA-256 bank.
const (
	GCPFirmwarePCR uint32 = 0
	GCPImagePCR    uint32 = 2
	GCPRuntimePCR  uint32 = 14 // dstack's runtime events
)

// GCPFirmwareV2 is PCR 0 of "GCE Virtual Firmware v2" with no special host
// information, in hex: the only one that upstream accepts. It is known, not trusted:
// a policy must name it.
const GCPFirmwareV2 = "0cca9ec161b09288802e5a112255d21340ed5b797f5fe29cecccfd8f67b9f802"

// Places of events in PCR 2 (measurement.md §8).
const (
	gcpSeparator = iota // EV_SEPARATOR: four zero bytes
	gcpGPT              // EV_EFI_GPT_EVENT: the partition table of the boot disk
	gcpUKI              // EV_EFI_BOOT_SERVICES_APPLICATION: Authenticode of the image
)

// CheckGCP checks that verified claims of a TPM were made for a TDX quote:
// qualifying data are the SHA-256 of its exact bytes. The code is gcp_quote_binding.
//
// The binding goes one way only. The TDX quote does not name the TPM, so the claims
// say that some certified vTPM of Google's saw this quote, not that it belongs to the
// same VM; that is left to Google (attestation.md §8.2).
func CheckGCP(c *attest.Claims, tdxQuote []byte) error {
	if c == nil || c.TPM == nil {
		return fault.New("tpm_missing", "there are no claims of a TPM")
	}
	if want := sha256.Sum256(tdxQuote); !bytes.Equal(c.ReportData, want[:]) {
		return fault.New("gcp_quote_binding", "the TPM quote is for the data %x, not for the TDX quote (%x)", c.ReportData, want)
	}
	return nil
}

// GCPReference is what a relying party accepts of a Google Cloud VM's boot. The zero
// value accepts nothing.
type GCPReference struct {
	// Firmware are values of PCR 0 (32 bytes each), such as [GCPFirmwareV2].
	Firmware [][]byte
	// GPT are digests of the boot disk's partition table (32 bytes each).
	GPT [][]byte
	// AnyGPT accepts any partition table. The log tells digests only, so an attacker
	// who boots without one can have a loader of his own measured in that place,
	// which then starts the genuine image and changes it: name GPT where you can.
	AnyGPT bool
	// UKI is the Authenticode SHA-256 of the image's unified kernel image
	// (measurement.gcp.cbor).
	UKI [32]byte
}

// CheckGCPImage checks the boot of a Google Cloud VM: that firmware, partition table
// and unified kernel image are the expected ones, in the registers of verified claims
// and the events that lead to them. Events after the third are the kernel's doing.
// Codes: gcp_registers for a quote that does not cover PCRs 0, 2 and 14 of the
// SHA-256 bank; gcp_firmware_unspecified, gcp_gpt_unspecified for a reference that
// leaves it open; gcp_firmware; gcp_log for events that do not lead to PCR 2 or are
// too few; gcp_separator; gcp_gpt; gcp_uki.
func CheckGCPImage(c *attest.Claims, log []attest.PCREvent, want GCPReference) error {
	if c == nil || c.TPM == nil {
		return fault.New("tpm_missing", "there are no claims of a TPM")
	}
	pcrs := map[uint32][]byte{}
	for _, p := range c.TPM.PCRs {
		if p.Algorithm == string(eventlog.BankSHA256) {
			pcrs[p.Index] = p.Value
		}
	}
	for _, i := range []uint32{GCPFirmwarePCR, GCPImagePCR, GCPRuntimePCR} {
		if len(pcrs[i]) != sha256.Size {
			return fault.New("gcp_registers", "the TPM quote does not cover PCR %d of the SHA-256 bank", i)
		}
	}
	switch {
	case len(want.Firmware) == 0:
		return fault.New("gcp_firmware_unspecified", "no firmware (PCR 0) is accepted").WithFix("accept %s, after you have judged it", GCPFirmwareV2)
	case len(want.GPT) == 0 && !want.AnyGPT:
		return fault.New("gcp_gpt_unspecified", "no partition table is accepted")
	case !contains(want.Firmware, pcrs[GCPFirmwarePCR]):
		return fault.New("gcp_firmware", "PCR 0 is %x, which is none of the %d accepted firmware values", pcrs[GCPFirmwarePCR], len(want.Firmware))
	}
	var events [][]byte
	register := make([]byte, sha256.Size)
	for _, e := range log {
		if e.Index != GCPImagePCR {
			continue
		}
		if len(e.Digest) != sha256.Size || len(events) == eventlog.MaxEvents {
			return fault.New("gcp_log", "event %d of PCR 2 has a digest of %d bytes, or there are too many", len(events), len(e.Digest))
		}
		events = append(events, e.Digest)
		register = eventlog.BankSHA256.Sum(append(register, e.Digest...))
	}
	separator := sha256.Sum256(make([]byte, 4))
	switch {
	case !bytes.Equal(register, pcrs[GCPImagePCR]):
		return fault.New("gcp_log", "the %d events of PCR 2 lead to %x, the quote says %x", len(events), register, pcrs[GCPImagePCR])
	case len(events) <= gcpUKI:
		return fault.New("gcp_log", "PCR 2 has %d events, too few for an image", len(events))
	case !bytes.Equal(events[gcpSeparator], separator[:]):
		return fault.New("gcp_separator", "PCR 2 begins with %x, not with the separator that ends the firmware's part: something ran before it", events[gcpSeparator])
	case !want.AnyGPT && !contains(want.GPT, events[gcpGPT]):
		return fault.New("gcp_gpt", "the partition table has the digest %x, which is none of the %d accepted ones", events[gcpGPT], len(want.GPT))
	case !bytes.Equal(events[gcpUKI], want.UKI[:]):
		return fault.New("gcp_uki", "the VM booted an image with Authenticode digest %x, want %s", events[gcpUKI], hex.EncodeToString(want.UKI[:]))
	}
	return nil
}

func contains(list [][]byte, value []byte) bool {
	return slices.ContainsFunc(list, func(v []byte) bool { return bytes.Equal(v, value) })
}
