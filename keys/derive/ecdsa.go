// SPDX-License-Identifier: Apache-2.0

package derive

import (
	"errors"
	"fmt"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	secpecdsa "github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
)

// SignDigest signs a 32-byte digest with a secp256k1 scalar: deterministic
// (RFC 6979), low s, 64 bytes r ‖ s (spec/guest-agent.md §8.3).
func SignDigest(scalar, digest []byte) ([]byte, error) {
	if len(digest) != 32 {
		return nil, fmt.Errorf("a digest has 32 bytes, not %d", len(digest))
	}
	key, err := k256(scalar)
	if err != nil {
		return nil, err
	}
	defer key.Zero()
	compact := secpecdsa.SignCompact(key, digest, true)
	return compact[1:], nil // without the recovery id in front
}

// ValidDigest reports whether signature, 64 bytes r ‖ s, is one of [SignDigest]
// over digest by the holder of public, a SEC 1 encoding of 33 or 65 bytes. A high s
// is no valid signature; what is not even the encoding of a signature or of a key
// is an error.
func ValidDigest(public, digest, signature []byte) (bool, error) {
	if len(digest) != 32 {
		return false, fmt.Errorf("a digest has 32 bytes, not %d", len(digest))
	}
	// The library also takes hybrid keys (first byte 6 or 7), which SEC 1 readers
	// of upstream refuse.
	if len(public) == 0 || public[0] > 4 {
		return false, errors.New("the public key is no SEC 1 encoding")
	}
	key, err := secp256k1.ParsePubKey(public)
	if err != nil {
		return false, fmt.Errorf("public key: %w", err)
	}
	if len(signature) != 64 {
		return false, fmt.Errorf("a signature has 64 bytes, not %d", len(signature))
	}
	var r, s secp256k1.ModNScalar
	if r.SetByteSlice(signature[:32]) || s.SetByteSlice(signature[32:]) || r.IsZero() || s.IsZero() {
		return false, errors.New("a part of the signature is 0 or not below the order")
	}
	if s.IsOverHalfOrder() {
		return false, nil
	}
	return secpecdsa.NewSignature(&r, &s).Verify(digest, key), nil
}
