// SPDX-License-Identifier: Apache-2.0

// Package cose reads and verifies COSE_Sign1 messages and EC2 keys (RFC 9052,
// RFC 9053), the envelope of AWS Nitro documents and Arm CCA tokens.
//
// A message holds every byte of an attacker until [Message.Verify] returns nil.
// What is accepted is what those vendors send: one ECDSA signature on the curve
// that goes with its algorithm, the algorithm in the protected header, the payload
// inside. A header that must be understood and is not, a detached payload and a
// signature of another length are refused. Specification: attestation.md §8.3, §8.4.
package cose

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/binary"
	"math/big"

	// The hashes of the three algorithms.
	_ "crypto/sha256"
	_ "crypto/sha512"

	"github.com/dstack-go/dstack/attest/cose/strictcbor"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxMessage bounds a message in bytes (threats.md B15).
const MaxMessage = 128 << 10

// TagSign1 is the CBOR tag of a COSE_Sign1 message, which may be left out.
const TagSign1 = 18

// Header labels (RFC 9052 §3.1).
const (
	LabelAlgorithm = 1
	LabelCritical  = 2
)

// Algorithm is a COSE signature algorithm (RFC 9053 §2.1).
type Algorithm int64

// The algorithms that are accepted: ECDSA with the curve and hash of equal
// strength.
const (
	ES256 Algorithm = -7  // P-256, SHA-256, signatures of 64 bytes
	ES384 Algorithm = -35 // P-384, SHA-384, 96 bytes
	ES512 Algorithm = -36 // P-521, SHA-512, 132 bytes
)

// suite is what an algorithm stands for. Size is that of r and of s in bytes.
type suite struct {
	curve elliptic.Curve
	hash  crypto.Hash
	size  int
}

func (a Algorithm) suite() (suite, bool) {
	switch a {
	case ES256:
		return suite{elliptic.P256(), crypto.SHA256, 32}, true
	case ES384:
		return suite{elliptic.P384(), crypto.SHA384, 48}, true
	case ES512:
		return suite{elliptic.P521(), crypto.SHA512, 66}, true
	}
	return suite{}, false
}

// Message is a COSE_Sign1 message; unverified.
type Message struct {
	Algorithm Algorithm // from the protected header
	Payload   []byte
	Protected []byte // the protected header as it was signed
	Signature []byte // r ‖ s, big-endian, of the algorithm's length
}

// Parse reads exactly one message. Its memory is its own.
//
// Errors: cose_too_large, cose_tag, cose_malformed, cose_headers, cose_algorithm,
// cose_critical, cose_detached, cose_signature_size.
func Parse(data []byte) (*Message, error) {
	if len(data) > MaxMessage {
		return nil, fault.New("cose_too_large", "COSE message of %d bytes exceeds %d", len(data), MaxMessage)
	}
	tag, body, tagged, err := strictcbor.Untag(data)
	if err != nil {
		return nil, fault.Wrap(err, "cose_malformed", "COSE message")
	}
	if tagged && tag != TagSign1 {
		return nil, fault.New("cose_tag", "CBOR tag %d is not that of COSE_Sign1 (%d)", tag, TagSign1)
	}
	item, err := strictcbor.Decode(body)
	if err != nil {
		return nil, fault.Wrap(err, "cose_malformed", "COSE message")
	}
	parts, err := item.Array(4, 4)
	if err != nil {
		return nil, fault.Wrap(err, "cose_malformed", "COSE message")
	}
	if parts[2].IsNull() {
		return nil, fault.New("cose_detached", "the COSE message does not hold its payload")
	}
	m := &Message{}
	for _, f := range []struct {
		name string
		item strictcbor.Item
		to   *[]byte
	}{{"protected header", parts[0], &m.Protected}, {"payload", parts[2], &m.Payload}, {"signature", parts[3], &m.Signature}} {
		if *f.to, err = f.item.Bytes(1, MaxMessage); err != nil {
			return nil, fault.Wrap(err, "cose_malformed", "%s of the COSE message", f.name)
		}
	}
	if err := m.readHeaders(parts[1]); err != nil {
		return nil, err
	}
	s, ok := m.Algorithm.suite()
	if !ok {
		return nil, fault.New("cose_algorithm", "COSE algorithm %d is none of ES256, ES384, ES512", m.Algorithm)
	}
	if len(m.Signature) != 2*s.size {
		return nil, fault.New("cose_signature_size", "COSE signature has %d bytes, want %d", len(m.Signature), 2*s.size)
	}
	return m, nil
}

// readHeaders takes the algorithm from the protected header. Other parameters are
// ignored as RFC 9052 §3.1 wants, unless they are critical or in both headers.
func (m *Message) readHeaders(unprotected strictcbor.Item) error {
	item, err := strictcbor.Decode(m.Protected)
	if err != nil {
		return fault.Wrap(err, "cose_headers", "protected header of the COSE message")
	}
	protected, err := item.Map()
	if err != nil {
		return fault.Wrap(err, "cose_headers", "protected header of the COSE message")
	}
	open, err := unprotected.Map()
	if err != nil {
		return fault.Wrap(err, "cose_headers", "unprotected header of the COSE message")
	}
	for label := range open {
		if _, both := protected[label]; both {
			return fault.New("cose_headers", "label %v is in both headers of the COSE message", label)
		}
		if label == int64(LabelAlgorithm) || label == int64(LabelCritical) {
			return fault.New("cose_headers", "label %v of the COSE message is not protected", label)
		}
	}
	alg, err := protected.Need(LabelAlgorithm)
	if err != nil {
		return fault.Wrap(err, "cose_algorithm", "protected header of the COSE message")
	}
	n, err := alg.Int()
	if err != nil {
		return fault.Wrap(err, "cose_algorithm", "algorithm of the COSE message")
	}
	m.Algorithm = Algorithm(n)
	if critical, ok := protected.Get(LabelCritical); ok {
		labels, err := critical.Array(1, strictcbor.MaxItems)
		if err != nil {
			return fault.Wrap(err, "cose_critical", "critical labels of the COSE message")
		}
		for _, label := range labels {
			if n, err := label.Int(); err != nil || n != LabelAlgorithm {
				return fault.New("cose_critical", "the COSE message has a critical label other than the algorithm")
			}
		}
	}
	return nil
}

// Verify checks the signature with a key on the algorithm's curve (cose_key), and
// returns cose_signature when it does not hold. There are no external data.
func (m *Message) Verify(key crypto.PublicKey) error {
	s, ok := m.Algorithm.suite()
	if !ok {
		return fault.New("cose_algorithm", "COSE algorithm %d is none of ES256, ES384, ES512", m.Algorithm)
	}
	pub, ok := key.(*ecdsa.PublicKey)
	if !ok || pub == nil || pub.Curve != s.curve {
		return fault.New("cose_key", "the key is not of the curve %s that COSE algorithm %d needs", s.curve.Params().Name, m.Algorithm)
	}
	if len(m.Signature) != 2*s.size {
		return fault.New("cose_signature_size", "COSE signature has %d bytes, want %d", len(m.Signature), 2*s.size)
	}
	// Sig_structure (RFC 9052 §4.4): ["Signature1", protected, h'', payload].
	h := s.hash.New()
	h.Write([]byte("\x84\x6aSignature1"))
	h.Write(bytesHead(len(m.Protected)))
	h.Write(m.Protected)
	h.Write(bytesHead(0))
	h.Write(bytesHead(len(m.Payload)))
	h.Write(m.Payload)
	r := new(big.Int).SetBytes(m.Signature[:s.size])
	t := new(big.Int).SetBytes(m.Signature[s.size:])
	if !ecdsa.Verify(pub, h.Sum(nil), r, t) {
		return fault.New("cose_signature", "the COSE message is not signed by the key")
	}
	return nil
}

// bytesHead is what precedes a byte string of n bytes in its shortest form.
func bytesHead(n int) []byte {
	const byteString = 2 << 5
	switch {
	case n < 24:
		return []byte{byteString | byte(n)}
	case n < 1<<8:
		return []byte{byteString | 24, byte(n)}
	case n < 1<<16:
		return binary.BigEndian.AppendUint16([]byte{byteString | 25}, uint16(n))
	}
	return binary.BigEndian.AppendUint32([]byte{byteString | 26}, uint32(n))
}
