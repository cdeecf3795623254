// SPDX-License-Identifier: Apache-2.0

package custody

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/derive"
)

// Native derivations. S(e) is the secret of epoch e, len(x) is x behind its length
// as u32 big-endian, and || concatenates:
//
//	S(e+1) = HKDF-Expand(S(e), len("dstack-kms-epoch-v1"), 32)
//	key    = HKDF-Expand(S(e), len("dstack-kms-native-v1") || len(kind) || len(app id)
//	                           || len(e as u64 big-endian) || len(instance id), 32)
//
// with SHA-256; S(e) is uniform, so that there is nothing to extract. kind is one of
// the below; the instance id is empty but for the disk. No two inputs encode alike,
// and no key of one kind shares a byte with that of another (threats.md G13).
const (
	epochLabel  = "dstack-kms-epoch-v1"
	nativeLabel = "dstack-kms-native-v1"

	kindApp  = "app"
	kindEnv  = "env"
	kindDisk = "disk"
)

// fields encodes a derivation's input.
func fields(parts ...[]byte) string {
	var b []byte
	for _, p := range parts {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	return string(b)
}

// next replaces the secret of an epoch by that of the one after.
func next(secret []byte) error {
	s, err := hkdf.Expand(sha256.New, secret, fields([]byte(epochLabel)), size)
	if err != nil {
		return err
	}
	copy(secret, s)
	clear(s)
	return nil
}

// at returns the secret of an epoch, which the caller wipes. Code epoch_unavailable.
func (m material) at(epoch uint64) ([]byte, error) {
	switch {
	case m.first == 0:
		return nil, fault.New("epoch_unavailable", "these root keys have no native epochs, and epoch %d is one", epoch)
	case epoch < m.first:
		return nil, fault.New("epoch_unavailable", "epoch %d is erased: these root keys begin with epoch %d", epoch, m.first)
	case epoch-m.first > MaxAhead:
		return nil, fault.New("epoch_unavailable", "epoch %d is too far ahead of epoch %d, with which these root keys begin", epoch, m.first)
	}
	s := bytes.Clone(m.epoch)
	for e := m.first; e < epoch; e++ {
		if err := next(s); err != nil {
			clear(s)
			return nil, err
		}
	}
	return s, nil
}

// native gives the key of a native epoch to put, and wipes its own copy.
func (m material) native(kind string, s Scope, instance []byte, put func([]byte) error) error {
	secret, err := m.at(s.Epoch)
	if err != nil {
		return err
	}
	defer clear(secret)
	info := fields([]byte(nativeLabel), []byte(kind), s.App[:], binary.BigEndian.AppendUint64(nil, s.Epoch), instance)
	key, err := hkdf.Expand(sha256.New, secret, info, size)
	if err != nil {
		return err
	}
	defer clear(key)
	return put(key)
}

// AppKey returns an app's secp256k1 key.
func (r *Roots) AppKey(ctx context.Context, s Scope) (key keys.AppKey, err error) {
	err = r.use(ctx, func(m material) (err error) {
		if s.Epoch == 0 {
			key, err = m.App(s.App)
			return err
		}
		return m.native(kindApp, s, nil, func(b []byte) (err error) {
			// Not every 32 bytes are a scalar; one in 2^128 is none.
			if _, err := derive.K256Public(b); err != nil {
				return err
			}
			key, err = keys.NewAppKey(b)
			return err
		})
	})
	return key, err
}

// EnvKey returns the key of an app's environment.
func (r *Roots) EnvKey(ctx context.Context, s Scope) (key keys.EnvKey, err error) {
	err = r.use(ctx, func(m material) (err error) {
		if s.Epoch == 0 {
			key, err = m.Env(s.App)
			return err
		}
		return m.native(kindEnv, s, nil, func(b []byte) (err error) {
			key, err = keys.NewEnvKey(b)
			return err
		})
	})
	return key, err
}

// DiskKey returns the root of the keys of an instance's disk.
func (r *Roots) DiskKey(ctx context.Context, s Scope) (key keys.DiskKey, err error) {
	if n := len(s.Instance); n != 0 && n != dstack.InstanceIDSize {
		return key, fault.New("scope_malformed", "an instance id has 0 or %d bytes, not %d", dstack.InstanceIDSize, n)
	}
	err = r.use(ctx, func(m material) (err error) {
		if s.Epoch == 0 {
			key, err = m.Disk(s.App, s.Instance)
			return err
		}
		return m.native(kindDisk, s, s.Instance, func(b []byte) (err error) {
			key, err = keys.NewDiskKey(b)
			return err
		})
	})
	return key, err
}

// Sign signs as the secp256k1 root.
func (r *Roots) Sign(ctx context.Context, message ...[]byte) (signature []byte, err error) {
	err = r.use(ctx, func(m material) (err error) {
		signature, err = derive.Sign(m.K256, message...)
		return err
	})
	return signature, err
}

// Attest signs a document for a purpose. A purpose begins with "dstack-" and has one
// line, so that what is signed is neither a certificate nor a document for another
// purpose. Code scope_malformed.
func (r *Roots) Attest(ctx context.Context, purpose string, document []byte) (signature []byte, err error) {
	if !strings.HasPrefix(purpose, "dstack-") || strings.Contains(purpose, "\n") {
		return nil, fault.New("scope_malformed", "%.40q is no purpose of a signature", purpose)
	}
	h := sha256.New()
	io.WriteString(h, purpose+"\n")
	h.Write(document)
	err = r.use(ctx, func(m material) (err error) {
		signature, err = sign(m.CA, h.Sum(nil))
		return err
	})
	return signature, err
}

// sign makes an ASN.1 signature with a P-256 scalar.
func sign(scalar, digest []byte) ([]byte, error) {
	key, err := derive.P256FromScalar(scalar)
	if err != nil {
		return nil, err
	}
	return ecdsa.SignASN1(rand.Reader, key, digest)
}

// signer signs with a key of the roots and does not hold it.
type signer struct {
	roots  *Roots
	app    *dstack.AppID // nil: the root CA
	public *ecdsa.PublicKey
}

// CA returns what signs as the root CA.
func (r *Roots) CA() crypto.Signer {
	public, err := r.Identity().public()
	if err != nil {
		public = nil // of roots that are none: nothing signs
	}
	return &signer{roots: r, public: public}
}

// AppCA returns what signs as the authority of an app's certificates.
func (r *Roots) AppCA(ctx context.Context, app dstack.AppID) (crypto.Signer, error) {
	s := &signer{roots: r, app: &app}
	err := r.use(ctx, func(m material) error {
		key, err := m.AppCA(app)
		if err != nil {
			return err
		}
		public := key.PublicKey // a copy: a pointer into the key would lead to the rest of it
		s.public = &public
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *signer) Public() crypto.PublicKey {
	if s.public == nil {
		return nil
	}
	return s.public
}

// Sign takes SHA-256 only: code signature_hash. The source of randomness is the
// system's.
func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, fault.New("signature_hash", "a root signs digests of SHA-256 and no other")
	}
	err = s.roots.use(context.Background(), func(m material) error {
		if s.app == nil {
			signature, err = sign(m.CA, digest)
			return err
		}
		key, err := m.AppCA(*s.app)
		if err != nil {
			return err
		}
		signature, err = ecdsa.SignASN1(rand.Reader, key, digest)
		return err
	})
	return signature, err
}
