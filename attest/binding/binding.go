// SPDX-License-Identifier: Apache-2.0

// Package binding makes report data: the 64 bytes by which a quote commits to
// something outside the TEE, such as a key, a nonce or an application's own data.
//
// Two constructions exist. [ReportData] is upstream's: an application may ask for
// any tag, so its tags separate domains among honest callers only. [Envelope] is
// ours, for evidence of the system itself: every part is length prefixed, it
// begins with a domain tag of its own, and the agent never lets an application
// choose those 64 bytes (threats.md B16, B20). Neither trusts its input.
// Specification: attestation.md §7.4, design.md §4.
package binding

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"hash"
	"slices"

	"golang.org/x/crypto/sha3"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Tags that upstream's programs use.
const (
	TagAppData   = "app-data"
	TagRATLS     = "ratls-cert"  // content is the DER SubjectPublicKeyInfo
	TagKMSRootCA = "kms-root-ca" // content is the DER SubjectPublicKeyInfo
)

// AlgorithmRaw takes 64 bytes of content as they are and ignores the tag.
const AlgorithmRaw = "raw"

var algorithms = map[string]func() hash.Hash{
	"sha256":    sha256.New,
	"sha384":    sha512.New384,
	"sha512":    sha512.New,
	"sha3-256":  sha3.New256,
	"sha3-384":  sha3.New384,
	"sha3-512":  sha3.New512,
	"keccak256": sha3.NewLegacyKeccak256,
	"keccak512": sha3.NewLegacyKeccak512,
}

// ReportData returns SHA-512(tag ‖ ":" ‖ content).
func ReportData(tag string, content []byte) dstack.ReportData {
	h := sha512.New()
	h.Write([]byte(tag))
	h.Write([]byte{':'})
	h.Write(content)
	return dstack.ReportData(h.Sum(nil))
}

// ReportDataWith is ReportData with a hash of another name, its value padded
// with zeros on the right: sha256, sha384, sha512, sha3-256, sha3-384, sha3-512,
// keccak256, keccak384, keccak512, or raw. The empty name means sha512.
func ReportDataWith(algorithm, tag string, content []byte) (dstack.ReportData, error) {
	var out dstack.ReportData
	switch algorithm {
	case "":
		algorithm = "sha512"
	case AlgorithmRaw:
		if len(content) != len(out) {
			return out, fault.New("report_data_length", "raw report data must be %d bytes, got %d", len(out), len(content))
		}
		copy(out[:], content)
		return out, nil
	}
	message := slices.Concat([]byte(tag), []byte{':'}, content)
	if algorithm == "keccak384" {
		copy(out[:], keccak384(message))
		return out, nil
	}
	newHash := algorithms[algorithm]
	if newHash == nil {
		return out, fault.New("report_data_algorithm", "unknown report data hash %q", algorithm).
			WithFix("use one of %v or %s", names(), AlgorithmRaw)
	}
	h := newHash()
	h.Write(message)
	copy(out[:], h.Sum(nil))
	return out, nil
}

func names() []string {
	out := []string{"keccak384"}
	for name := range algorithms {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// EnvelopeTag is the domain of system evidence.
const EnvelopeTag = "dstack-evidence-v1"

// Envelope returns the report data of evidence made by the system for one
// verifier:
//
//	SHA-512( LP("dstack-evidence-v1") ‖ LP(nonce) ‖ LP(spki) ‖ LP(app id) ‖ LP(instance id) )
//
// where LP(x) is the length of x as u32 big-endian, then x. The nonce is the
// verifier's; spkiDER is the key of the very connection, empty over plain HTTP;
// instance is 20 bytes, or empty for an app without instance ids.
func Envelope(nonce, spkiDER []byte, app dstack.AppID, instance []byte) dstack.ReportData {
	h := sha512.New()
	for _, part := range [][]byte{[]byte(EnvelopeTag), nonce, spkiDER, app[:], instance} {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
		h.Write(part)
	}
	return dstack.ReportData(h.Sum(nil))
}
