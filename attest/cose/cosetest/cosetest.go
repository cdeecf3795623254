// SPDX-License-Identifier: Apache-2.0

// Package cosetest makes COSE_Sign1 messages and keys for tests. Every part can be
// changed before it is signed, so that a test can attack one check and be sure
// that the signature still holds. It builds the signed structure with a CBOR
// library, apart from the code that it tests. It is for tests only.
package cosetest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"math/big"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/dstack-go/dstack/attest/cose"
)

// Map is a CBOR map with keys of any type.
type Map = map[any]any

// Message is a message to be signed.
type Message struct {
	Key         *ecdsa.PrivateKey
	Algorithm   cose.Algorithm // of the signature, and of the header unless Protected is set
	Protected   any            // header; nil for the algorithm alone, []byte for an encoding as it is
	Unprotected any            // header; nil for an empty one
	Payload     any            // []byte, or what shall stand there instead
	Tag         uint64         // 0 for none
	Edit        func(parts []any)
}

// Sign returns the message: four parts, which Edit may change after signing.
func (m Message) Sign(t testing.TB) []byte {
	t.Helper()
	if m.Protected == nil {
		m.Protected = Map{1: int64(m.Algorithm)}
	}
	protected, ok := m.Protected.([]byte)
	if !ok {
		protected = Marshal(t, m.Protected)
	}
	if m.Unprotected == nil {
		m.Unprotected = Map{}
	}
	payload, _ := m.Payload.([]byte)
	parts := []any{protected, m.Unprotected, m.Payload, Signature(t, m.Key, m.Algorithm, protected, payload)}
	if m.Edit != nil {
		m.Edit(parts)
	}
	if m.Tag != 0 {
		return Marshal(t, cbor.Tag{Number: m.Tag, Content: parts})
	}
	return Marshal(t, parts)
}

// Signature signs the structure of RFC 9052 §4.4: r ‖ s.
func Signature(t testing.TB, key *ecdsa.PrivateKey, alg cose.Algorithm, protected, payload []byte) []byte {
	t.Helper()
	hash, size := crypto.SHA256, 32
	switch alg {
	case cose.ES384:
		hash, size = crypto.SHA384, 48
	case cose.ES512:
		hash, size = crypto.SHA512, 66
	}
	h := hash.New()
	h.Write(Marshal(t, []any{"Signature1", protected, []byte{}, payload}))
	der, err := key.Sign(nil, h.Sum(nil), hash) // deterministic, so that fuzzing is
	if err != nil {
		t.Fatalf("cosetest: %v", err)
	}
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &sig); err != nil {
		t.Fatalf("cosetest: %v", err)
	}
	return append(sig.R.FillBytes(make([]byte, size)), sig.S.FillBytes(make([]byte, size))...)
}

// NewKey makes a private key.
func NewKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatalf("cosetest: %v", err)
	}
	return key
}

// Point returns the public point 0x04 ‖ x ‖ y.
func Point(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatalf("cosetest: %v", err)
	}
	return point
}

// Key returns the members of a COSE_Key.
func Key(t testing.TB, key *ecdsa.PrivateKey) Map {
	t.Helper()
	curve := map[elliptic.Curve]int{elliptic.P256(): 1, elliptic.P384(): 2, elliptic.P521(): 3}[key.Curve]
	point := Point(t, key)[1:]
	return Map{1: 2, -1: curve, -2: point[:len(point)/2], -3: point[len(point)/2:]}
}

// Marshal encodes with sorted keys and definite lengths.
func Marshal(t testing.TB, v any) []byte {
	t.Helper()
	mode, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		t.Fatalf("cosetest: %v", err)
	}
	out, err := mode.Marshal(v)
	if err != nil {
		t.Fatalf("cosetest: %v", err)
	}
	return out
}
