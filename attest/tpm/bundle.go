// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxBundle bounds a TPM quote in JSON, in bytes.
const MaxBundle = 1 << 20

const maxPCRs = 8 * maxSelect

// platforms are the names of TPMQuote.Platform (attestation.md §1.1).
var platforms = [...]string{"dstack", "gcp", "nitroenclave", "aws-ec2"}

// bundle is upstream's TpmQuote in JSON.
type bundle struct {
	Message   string        `json:"message"`
	Signature string        `json:"signature"`
	PCRs      []bundlePCR   `json:"pcr_values"`
	AKCert    string        `json:"ak_cert"`
	Platform  string        `json:"platform"`
	EventLog  []bundleEvent `json:"event_log"`
}

type (
	bundlePCR struct {
		Index     uint32 `json:"index"`
		Algorithm string `json:"algorithm"`
		Value     string `json:"value"`
	}
	bundleEvent struct {
		Index  uint32 `json:"pcr_index"`
		Digest string `json:"digest"`
	}
)

// ParseBundle reads a TPM quote in JSON, at most 1 MiB: the members of upstream's
// TpmQuote (message, signature, pcr_values, ak_cert, platform, event_log) and no
// others. Bytes are hexadecimal or standard padded base64, one of them throughout:
// the message, which must begin with TPM_GENERATED_VALUE, tells which. The result is
// unverified. The code is tpm_bundle_malformed.
func ParseBundle(data []byte) (*attest.TPMQuote, error) {
	var b bundle
	if err := strictjson.Decode(data, &b, strictjson.Limits{Size: MaxBundle, Depth: 4}); err != nil {
		return nil, fault.Wrap(err, "tpm_bundle_malformed", "TPM quote in JSON")
	}
	platform := slices.Index(platforms[:], b.Platform)
	switch {
	case platform < 0:
		return nil, bad("platform is %.32q, want one of %q", b.Platform, platforms)
	case len(b.PCRs) > maxPCRs:
		return nil, bad("%d registers, more than %d", len(b.PCRs), maxPCRs)
	case len(b.EventLog) > eventlog.MaxEvents:
		return nil, bad("%d events, more than %d", len(b.EventLog), eventlog.MaxEvents)
	}
	d := decoder{decode: base64.StdEncoding.Strict().DecodeString}
	if strings.HasPrefix(strings.ToLower(b.Message), "ff544347") {
		d.decode = hex.DecodeString
	}
	q := &attest.TPMQuote{
		Message:   d.bytes("message", b.Message, MaxMessage),
		Signature: d.bytes("signature", b.Signature, MaxSignature),
		AKCert:    d.bytes("ak_cert", b.AKCert, maxCert),
		Platform:  uint8(platform),
	}
	for _, p := range b.PCRs {
		q.PCRs = append(q.PCRs, attest.PCR{Index: p.Index, Algorithm: p.Algorithm, Value: d.bytes("value of a register", p.Value, maxDigest)})
	}
	for _, e := range b.EventLog {
		q.EventLog = append(q.EventLog, attest.PCREvent{Index: e.Index, Digest: d.bytes("digest of an event", e.Digest, maxDigest)})
	}
	if d.err != nil {
		return nil, d.err
	}
	return q, nil
}

// MarshalBundle writes a TPM quote as ParseBundle reads it, in hexadecimal. The code
// is tpm_bundle_malformed for a platform that has no name.
func MarshalBundle(q *attest.TPMQuote) ([]byte, error) {
	if int(q.Platform) >= len(platforms) {
		return nil, bad("platform %d has no name", q.Platform)
	}
	b := bundle{
		Message: hex.EncodeToString(q.Message), Signature: hex.EncodeToString(q.Signature),
		AKCert: hex.EncodeToString(q.AKCert), Platform: platforms[q.Platform],
		PCRs: []bundlePCR{}, EventLog: []bundleEvent{},
	}
	for _, p := range q.PCRs {
		b.PCRs = append(b.PCRs, bundlePCR{p.Index, p.Algorithm, hex.EncodeToString(p.Value)})
	}
	for _, e := range q.EventLog {
		b.EventLog = append(b.EventLog, bundleEvent{e.Index, hex.EncodeToString(e.Digest)})
	}
	return json.Marshal(b)
}

func bad(format string, args ...any) error {
	return fault.New("tpm_bundle_malformed", "TPM quote in JSON: "+format, args...)
}

// decoder reads bytes of one spelling and keeps the first error.
type decoder struct {
	decode func(string) ([]byte, error)
	err    error
}

func (d *decoder) bytes(name, text string, max int) []byte {
	if d.err != nil {
		return nil
	}
	b, err := d.decode(text)
	switch {
	case err != nil:
		d.err = fault.Wrap(err, "tpm_bundle_malformed", "%s of a TPM quote in JSON", name)
	case len(b) == 0:
		d.err = bad("%s is empty", name)
	case len(b) > max:
		d.err = bad("%s has %d bytes, more than %d", name, len(b), max)
	}
	return b
}
