// SPDX-License-Identifier: Apache-2.0

// Package custody keeps the root keys of a KMS: it derives and signs, and gives no
// root byte to anyone but another custodian.
//
// What a KMS does with its roots it does through [Custodian], which a single holder
// and a replica implement now ([Roots]) and a threshold of holders can implement
// without any of them having a root (spec/threshold-kms.md §8): signatures are asked
// for, never keys that sign.
//
// Trusted: this process and its memory. Attacker-controlled: the files of a data
// directory and of a backup until their checks hold.
//
// Implements spec/kms.md §2 and §4; design.md §7; threats.md G01, G02, G09.
package custody

import (
	"context"
	"crypto"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/keys"
)

// Identity is the public half of the roots: what apps pin and chains record.
type Identity struct {
	CA   []byte // DER SubjectPublicKeyInfo of the P-256 root CA: key_provider_id
	K256 []byte // secp256k1, compressed, 33 bytes
}

// Scope is whose key is meant.
type Scope struct {
	App dstack.AppID
	// Instance is 20 bytes, or empty for an app without instance ids.
	Instance []byte
	// Epoch is zero for upstream's derivations, which have none (spec/kms.md §4), and
	// otherwise the key epoch of a native one.
	Epoch uint64
}

// Custodian derives keys from roots and signs with them. Methods are safe for
// concurrent use. What they return the caller wipes.
//
// Codes: epoch_unavailable (not of these roots, not begun, or erased), scope_malformed.
type Custodian interface {
	Identity() Identity

	AppKey(ctx context.Context, s Scope) (keys.AppKey, error)   // Instance is ignored
	EnvKey(ctx context.Context, s Scope) (keys.EnvKey, error)   // Instance is ignored
	DiskKey(ctx context.Context, s Scope) (keys.DiskKey, error) // of the instance

	// CA signs as the root CA, P-256; AppCA as the authority of an app's certificates.
	CA() crypto.Signer
	AppCA(ctx context.Context, app dstack.AppID) (crypto.Signer, error)
	// Sign signs the Keccak-256 of the concatenated message with the secp256k1 root: 65
	// bytes r ‖ s ‖ v, v from 0 to 3.
	Sign(ctx context.Context, message ...[]byte) ([]byte, error)
	// Attest signs SHA-256(purpose ‖ "\n" ‖ document) with the root CA's key: ECDSA, ASN.1.
	Attest(ctx context.Context, purpose string, document []byte) ([]byte, error)
}

// Purposes of Custodian.Attest.
const (
	PurposeReleaseLog = "dstack-release-log-v1"
	PurposeLease      = "dstack-lease-v1"
)
