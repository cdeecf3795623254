// SPDX-License-Identifier: Apache-2.0

package custody

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/derive"
)

// maxPEM bounds the root CA's key as text.
const maxPEM = 4 << 10

// Export returns the roots for another custodian: everything. The one caller is what
// answers GetKmsKey, after the asking KMS's evidence, its authorization and the entry
// in the release log hold, and it sends the message over the connection whose key that
// evidence speaks of and over no other (threats.md C03, G01). The byte fields are the
// caller's to wipe; the text of the CA key, which upstream has as a string, cannot be.
// Code root_wiped.
func (r *Roots) Export() (*kmsapi.KmsKeys, error) {
	var out *kmsapi.KmsKeys
	err := r.use(context.Background(), func(m material) error {
		key, err := derive.P256FromScalar(m.CA)
		if err != nil {
			return err
		}
		text, err := derive.PEM(key)
		if err != nil {
			return err
		}
		defer clear(text)
		out = &kmsapi.KmsKeys{CaKey: string(text), K256Key: bytes.Clone(m.K256), FirstEpoch: m.first}
		if m.first != 0 {
			out.EpochSecret = bytes.Clone(m.epoch)
		}
		return nil
	})
	return out, err
}

// Import makes roots of another custodian's answer, whose secrets it wipes as far as
// that goes. want is what the source's certificate and the chain say that the roots
// are: others are refused, and a want that lacks a key refuses all (threats.md C03).
// The identity does not cover the native epochs' secret; it is the source's word, whose
// evidence the caller verified. Roots of an upstream KMS come without.
//
// The roots have no file yet: see [Roots.Create]. Codes root_malformed, root_mismatch.
func Import(k *kmsapi.KmsKeys, want Identity) (*Roots, error) {
	if k == nil {
		return nil, fault.New("root_malformed", "the source sent no root keys")
	}
	defer func() {
		clear(k.K256Key)
		clear(k.EpochSecret)
		k.CaKey, k.K256Key, k.EpochSecret = "", nil, nil
	}()
	malformed := func(err error) error {
		return fault.Wrap(err, "root_malformed", "the root keys that the source sent")
	}
	if len(k.CaKey) > maxPEM {
		return nil, malformed(errors.New("the root CA's key is too large"))
	}
	text := []byte(k.CaKey)
	defer clear(text)
	ca, err := scalarOfPEM(text)
	if err != nil {
		return nil, malformed(err)
	}
	defer clear(ca)
	r, err := newRoots(ca, k.K256Key, k.EpochSecret, k.FirstEpoch,
		Provenance{Kind: Replicated, Source: bytes.Clone(want.CA), Time: time.Now()})
	if err != nil {
		return nil, malformed(err)
	}
	return r.expect(want)
}

// expect returns the roots if they are the wanted ones, and wipes them if not.
func (r *Roots) expect(want Identity) (*Roots, error) {
	if !r.s.identity.Equal(want) {
		r.Wipe()
		return nil, fault.New("root_mismatch", "these are other root keys than the expected ones").
			WithFix("check key_provider_id and the KMS's entry on the chain against the KMS that you mean; do not use this source")
	}
	return r, nil
}

// scalarOfPEM reads the one PKCS #8 key of a text; the caller wipes the result.
func scalarOfPEM(text []byte) ([]byte, error) {
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("the root CA's key is no PEM of one private key")
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("the root CA's key is no PKCS #8 key")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("the root CA's key is no P-256 key")
	}
	return key.Bytes()
}

// Escrow calls use with the roots as their file has them, and overwrites that
// afterwards. The one caller is package backup, which encrypts it. Code root_wiped,
// and the errors of use.
func (r *Roots) Escrow(use func(encoded []byte) error) error {
	return r.use(context.Background(), func(m material) error {
		text, err := r.s.encode(m)
		if err != nil {
			return err
		}
		defer clear(text)
		return use(text)
	})
}

// Restore makes roots of what [Roots.Escrow] gave, which it wipes, if they are the
// wanted ones. They have no file yet. Codes root_malformed, root_mismatch.
func Restore(encoded []byte, want Identity) (*Roots, error) {
	defer clear(encoded)
	r, err := decode(encoded)
	if err != nil {
		return nil, err
	}
	r.s.provenance = Provenance{Kind: Restored, Time: time.Now().UTC().Truncate(time.Second)}
	return r.expect(want)
}

// OpenUpstream reads the root keys of an upstream KMS from its directory (core.cert_dir),
// to be imported: Create writes them anew. The caller compares [Roots.Identity] with
// what the KMS's apps have pinned.
//
// Codes: root_missing; root_partial (one of the two keys is there: what upstream would
// overwrite, spec/kms.md §2.3); root_malformed; root_mode.
func OpenUpstream(dir string) (*Roots, error) {
	caPath, k256Path := filepath.Join(dir, "root-ca.key"), filepath.Join(dir, "root-k256.key")
	_, caErr := os.Lstat(caPath)
	_, k256Err := os.Lstat(k256Path)
	if missing := errors.Is(caErr, fs.ErrNotExist); missing != errors.Is(k256Err, fs.ErrNotExist) {
		lost := k256Path
		if missing {
			lost = caPath
		}
		return nil, fault.New("root_partial", "one root key of the upstream KMS is there, and %s is missing", lost).
			WithFix("restore it; the other one alone is of no use, and must not be overwritten")
	}
	text, err := readSecret(caPath)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	k256, err := readSecret(k256Path)
	if err != nil {
		return nil, err
	}
	defer clear(k256)
	malformed := func(err error) error {
		return fault.Wrap(err, "root_malformed", "the upstream KMS's root keys in %s", dir)
	}
	if len(text) > maxPEM {
		return nil, malformed(errors.New("the root CA's key is too large"))
	}
	ca, err := scalarOfPEM(text)
	if err != nil {
		return nil, malformed(err)
	}
	defer clear(ca)
	r, err := newRoots(ca, k256, nil, 0, Provenance{Kind: Upstream, Time: time.Now()})
	if err != nil {
		return nil, malformed(err)
	}
	return r, nil
}
