// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"crypto/sha256"

	"github.com/fxamacker/cbor/v2"

	"github.com/dstack-go/dstack/internal/fault"
)

// GCPDocumentName is the name of the document in an image and in its
// sha256sum.txt; [Split.Bind] binds it to the image's hash.
const GCPDocumentName = "measurement.gcp.cbor"

// GCPDocument is the content of measurement.gcp.cbor, version 1: what a Google
// Cloud VM's TPM measures of an image (spec/measurement.md §7).
type GCPDocument struct {
	// UKI is the Authenticode SHA-256 of the unified kernel image: the digest of the
	// third event of PCR 2.
	UKI [sha256.Size]byte
}

type wireGCP struct {
	Version uint64 `cbor:"version"`
	UKI     []byte `cbor:"uki_auth"`
}

// Marshal returns the CBOR form: definite lengths, keys in upstream's order.
func (d *GCPDocument) Marshal() ([]byte, error) {
	return cbor.Marshal(wireGCP{Version: 1, UKI: d.UKI[:]})
}

// ParseGCPDocument reads a document of version 1. Unknown keys are ignored,
// duplicate keys, indefinite lengths and trailing bytes are refused. The code is
// measurement_malformed.
func ParseGCPDocument(data []byte) (*GCPDocument, error) {
	var w wireGCP
	if err := decodeDocument(data, &w); err != nil {
		return nil, err
	}
	if w.Version != 1 {
		return nil, badDocument("version %d, want 1", w.Version)
	}
	if len(w.UKI) != sha256.Size {
		return nil, badDocument("uki_auth has %d bytes, want %d", len(w.UKI), sha256.Size)
	}
	return &GCPDocument{UKI: [sha256.Size]byte(w.UKI)}, nil
}

// decodeDocument decodes one small map, as strictly as ParseTDXDocument does.
func decodeDocument(data []byte, v any) error {
	if len(data) > maxDocument {
		return badDocument("%d bytes, want at most %d", len(data), maxDocument)
	}
	mode, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		MaxNestedLevels:   8,
		MaxArrayElements:  64,
		MaxMapPairs:       64,
	}.DecMode()
	if err != nil {
		return err
	}
	if err := mode.Unmarshal(data, v); err != nil {
		return fault.Wrap(err, "measurement_malformed", "measurement document")
	}
	return nil
}
