// SPDX-License-Identifier: Apache-2.0

// Package derive computes keys from keys: upstream's derivations, byte for byte,
// and the signatures that lead from a derived key back to the KMS's root.
//
// Everything here is pure. Upstream's inputs are concatenated without separators
// and stay unambiguous only while their lengths are fixed; the functions that take
// an identity therefore take it as a fixed-length type, or refuse other lengths
// (threats.md B16, B17).
//
// Implements spec/kms.md §4 and §5, spec/guest-agent.md §8.
package derive

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	secpecdsa "github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
	"golang.org/x/crypto/sha3"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/keys"
)

// salt of every derivation: ASCII "RATLS".
var salt = []byte("RATLS")

// KDF is HKDF-SHA-256 with upstream's salt; info is the concatenation of contexts.
func KDF(ikm []byte, size int, contexts ...[]byte) ([]byte, error) {
	return hkdf.Key(sha256.New, ikm, salt, string(slices.Concat(contexts...)), size)
}

// P256 derives a P-256 key: 32 bytes of [KDF] as a big-endian scalar, which is an
// error if it is 0 or not below the order (once in 2^32), as upstream has it.
func P256(ikm []byte, contexts ...[]byte) (*ecdsa.PrivateKey, error) {
	s, err := KDF(ikm, 32, contexts...)
	if err != nil {
		return nil, err
	}
	defer clear(s)
	return P256FromScalar(s)
}

// P256FromScalar returns the key with the 32-byte big-endian scalar.
func P256FromScalar(s []byte) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), s)
	if err != nil {
		return nil, errors.New("the derived bytes are no P-256 scalar")
	}
	return key, nil
}

// PKCS8 returns the 138-byte DER of a P-256 key (spec/guest-agent.md §9.1).
func PKCS8(key *ecdsa.PrivateKey) ([]byte, error) {
	if key.Curve != elliptic.P256() {
		return nil, errors.New("not a P-256 key")
	}
	return x509.MarshalPKCS8PrivateKey(key)
}

// PEM returns the key as PEM of [PKCS8], label PRIVATE KEY.
func PEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := PKCS8(key)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// DH derives 32 secret bytes: the SHA-256 of the PKCS #8 DER of [P256].
func DH(ikm []byte, contexts ...[]byte) ([]byte, error) {
	key, err := P256(ikm, contexts...)
	if err != nil {
		return nil, err
	}
	der, err := PKCS8(key)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	sum := sha256.Sum256(der)
	return sum[:], nil
}

// K256 derives a secp256k1 scalar, 32 bytes big-endian.
func K256(ikm []byte, contexts ...[]byte) ([]byte, error) {
	s, err := KDF(ikm, 32, contexts...)
	if err != nil {
		return nil, err
	}
	if _, err := k256(s); err != nil {
		clear(s)
		return nil, err
	}
	return s, nil
}

func k256(scalar []byte) (*secp256k1.PrivateKey, error) {
	var s secp256k1.ModNScalar
	if len(scalar) != 32 || s.SetByteSlice(scalar) || s.IsZero() {
		return nil, errors.New("the bytes are no secp256k1 scalar")
	}
	return secp256k1.NewPrivateKey(&s), nil
}

// K256Public returns the compressed public key, 33 bytes, of a scalar.
func K256Public(scalar []byte) ([]byte, error) {
	key, err := k256(scalar)
	if err != nil {
		return nil, err
	}
	defer key.Zero()
	return key.PubKey().SerializeCompressed(), nil
}

// Keccak256 is the hash of Ethereum: SHA-3 with its first padding.
func Keccak256(parts ...[]byte) []byte {
	h := sha3.NewLegacyKeccak256()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// SignatureSize is the length of a recoverable signature: r ‖ s ‖ v, v from 0 to 3.
const SignatureSize = 65

// Sign signs the Keccak-256 of message: deterministic (RFC 6979), low s,
// recoverable.
func Sign(scalar []byte, message ...[]byte) ([]byte, error) {
	key, err := k256(scalar)
	if err != nil {
		return nil, err
	}
	defer key.Zero()
	compact := secpecdsa.SignCompact(key, Keccak256(message...), true)
	// The library puts 27 + 4 (compressed) + v in front.
	return append(compact[1:], compact[0]-31), nil
}

// Signer returns [Sign] of a scalar.
func Signer(scalar []byte) func(message ...[]byte) ([]byte, error) {
	return func(message ...[]byte) ([]byte, error) { return Sign(scalar, message...) }
}

// Recover returns the compressed public key, 33 bytes, that made a signature of
// [Sign] over message.
func Recover(signature []byte, message ...[]byte) ([]byte, error) {
	if len(signature) != SignatureSize || signature[64] > 3 {
		return nil, fmt.Errorf("a recoverable signature has %d bytes, the last from 0 to 3", SignatureSize)
	}
	compact := append([]byte{signature[64] + 31}, signature[:64]...)
	key, _, err := secpecdsa.RecoverCompact(compact, Keccak256(message...))
	if err != nil {
		return nil, err
	}
	return key.SerializeCompressed(), nil
}

// issued begins what a KMS signs about an app's key.
const issued = "dstack-kms-issued:"

// AppMessage is what a KMS's root signs about an app's compressed public key.
func AppMessage(app dstack.AppID, public []byte) [][]byte {
	return [][]byte{[]byte(issued), app[:], public}
}

// SignApp signs an app's compressed public key as the KMS's root.
func SignApp(root []byte, app dstack.AppID, public []byte) ([]byte, error) {
	return Sign(root, AppMessage(app, public)...)
}

// RecoverApp returns the KMS root's compressed public key from [SignApp]'s result.
func RecoverApp(signature []byte, app dstack.AppID, public []byte) ([]byte, error) {
	return Recover(signature, AppMessage(app, public)...)
}

// Roots is the root material of a KMS.
type Roots struct {
	CA   []byte // scalar of the P-256 root CA key, 32 bytes
	K256 []byte // scalar of the secp256k1 root, 32 bytes
}

// instance checks the length that keeps upstream's concatenation unambiguous.
func instance(id []byte) error {
	if len(id) != 0 && len(id) != dstack.InstanceIDSize {
		return fmt.Errorf("an instance id has 0 or %d bytes, not %d", dstack.InstanceIDSize, len(id))
	}
	return nil
}

// AppCA returns the key of an app's certificate authority.
func (r Roots) AppCA(app dstack.AppID) (*ecdsa.PrivateKey, error) {
	return P256(r.CA, app[:], []byte("app-ca"))
}

// Disk returns the root of an instance's disk keys; instanceID has 20 bytes, or
// none for an app that has no instance ids.
func (r Roots) Disk(app dstack.AppID, instanceID []byte) (keys.DiskKey, error) {
	if err := instance(instanceID); err != nil {
		return keys.DiskKey{}, err
	}
	b, err := DH(r.CA, app[:], instanceID, []byte("app-disk-crypt-key"))
	if err != nil {
		return keys.DiskKey{}, err
	}
	defer clear(b)
	return keys.NewDiskKey(b)
}

// Env returns the X25519 key of an app's environment.
func (r Roots) Env(app dstack.AppID) (keys.EnvKey, error) {
	b, err := DH(r.CA, app[:], []byte("env-encrypt-key"))
	if err != nil {
		return keys.EnvKey{}, err
	}
	defer clear(b)
	return keys.NewEnvKey(b)
}

// App returns an app's secp256k1 key.
func (r Roots) App(app dstack.AppID) (keys.AppKey, error) {
	b, err := K256(r.K256, app[:], []byte("app-key"))
	if err != nil {
		return keys.AppKey{}, err
	}
	defer clear(b)
	return keys.NewAppKey(b)
}

// Seeded is what follows from the seed of a provider without a KMS.
type Seeded struct {
	CA   *ecdsa.PrivateKey // of the app's own root certificate
	Disk keys.DiskKey
	App  keys.AppKey
}

// FromSeed derives an app's keys from its provider's seed (spec/kms.md §5).
func FromSeed(seed keys.Seed) (Seeded, error) {
	var s Seeded
	ca, err := P256(seed.Bytes(), []byte("app-key"))
	if err != nil {
		return s, err
	}
	disk, err := DH(seed.Bytes(), []byte("app-disk-key"))
	if err != nil {
		return s, err
	}
	defer clear(disk)
	app, err := K256(seed.Bytes(), []byte("app-k256-key"))
	if err != nil {
		return s, err
	}
	defer clear(app)
	s.CA = ca
	if s.Disk, err = keys.NewDiskKey(disk); err != nil {
		return s, err
	}
	s.App, err = keys.NewAppKey(app)
	return s, err
}
