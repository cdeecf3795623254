// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"crypto/sha256"

	"github.com/fxamacker/cbor/v2"
)

// AWSDocumentName is the name of the document in an image and in its
// sha256sum.txt; [Split.Bind] binds it to the image's hash.
const AWSDocumentName = "measurement.aws.cbor"

// AWSDocument is the content of measurement.aws.cbor, which has no version: what a
// NitroTPM measures of an image (spec/measurement.md §7).
type AWSDocument struct {
	// BootPCRs is SHA-256(PCR4 ‖ PCR7 ‖ PCR12) of the SHA-384 bank (48 bytes each): the
	// boot loader, the secure boot policy and the kernel's command line.
	BootPCRs [sha256.Size]byte
}

type wireAWS struct {
	BootPCRs []byte `cbor:"boot_pcr_digest"`
}

// Marshal returns the CBOR form: definite lengths.
func (d *AWSDocument) Marshal() ([]byte, error) {
	return cbor.Marshal(wireAWS{BootPCRs: d.BootPCRs[:]})
}

// ParseAWSDocument reads a document. Unknown keys are ignored, duplicate keys,
// indefinite lengths and trailing bytes are refused. The code is
// measurement_malformed.
func ParseAWSDocument(data []byte) (*AWSDocument, error) {
	var w wireAWS
	if err := decodeDocument(data, &w); err != nil {
		return nil, err
	}
	if len(w.BootPCRs) != sha256.Size {
		return nil, badDocument("boot_pcr_digest has %d bytes, want %d", len(w.BootPCRs), sha256.Size)
	}
	return &AWSDocument{BootPCRs: [sha256.Size]byte(w.BootPCRs)}, nil
}
