// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // hashes of signatures
	_ "crypto/sha512"
	"math/big"

	"github.com/dstack-go/dstack/internal/fault"
)

// Limits on keys and signatures.
const (
	minRSABits = 2048
	maxRSABits = 4096
	maxScalar  = 48 // bytes of r and s: P-384
)

// Signature is a TPMT_SIGNATURE.
type Signature struct {
	Scheme uint16 // AlgRSASSA, AlgRSAPSS or AlgECDSA
	Hash   crypto.Hash
	RSA    []byte // of RSA schemes, as long as the modulus
	R, S   []byte // of ECDSA, big-endian, up to 48 bytes
}

// ParseSignature reads a TPMT_SIGNATURE of at most 1 KiB; nothing may follow it.
// Codes: tpm_signature_malformed; tpm_signature_scheme for a scheme other than
// RSASSA and RSAPSS with SHA-256 and ECDSA with SHA-256 or SHA-384.
func ParseSignature(data []byte) (*Signature, error) {
	if len(data) > MaxSignature {
		return nil, fault.New("tpm_signature_malformed", "TPM signature of %d bytes exceeds %d", len(data), MaxSignature)
	}
	r := reader{what: "TPM signature", code: "tpm_signature_malformed", data: data}
	scheme, hash := r.u16(), r.u16()
	if r.err != nil {
		return nil, r.err
	}
	s := &Signature{Scheme: scheme}
	switch {
	case hash == AlgSHA256 && (scheme == AlgRSASSA || scheme == AlgRSAPSS):
		s.Hash = crypto.SHA256
		s.RSA = r.sized("RSA signature", maxRSABits/8)
	case (hash == AlgSHA256 || hash == AlgSHA384) && scheme == AlgECDSA:
		s.Hash = map[uint16]crypto.Hash{AlgSHA256: crypto.SHA256, AlgSHA384: crypto.SHA384}[hash]
		s.R = r.sized("r", maxScalar)
		s.S = r.sized("s", maxScalar)
	default:
		return nil, fault.New("tpm_signature_scheme", "TPM signature is of scheme %#x with hash %#x, want RSASSA or RSAPSS with SHA-256, or ECDSA with SHA-256 or SHA-384", scheme, hash)
	}
	if err := r.end(); err != nil {
		return nil, err
	}
	return s, nil
}

// check verifies the signature over message. Codes: ak_key for a key that is of
// another kind than the signature or weak; tpm_signature.
func (s *Signature) check(key crypto.PublicKey, message []byte) error {
	h := s.Hash.New()
	h.Write(message)
	digest := h.Sum(nil)
	var ok bool
	switch key := key.(type) {
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n < minRSABits || n > maxRSABits {
			return fault.New("ak_key", "the attestation key has %d bits, want %d to %d", n, minRSABits, maxRSABits)
		}
		switch s.Scheme {
		case AlgRSASSA:
			ok = rsa.VerifyPKCS1v15(key, s.Hash, digest, s.RSA) == nil
		case AlgRSAPSS: // the salt's length is the TPM's choice
			ok = rsa.VerifyPSS(key, s.Hash, digest, s.RSA, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto}) == nil
		default:
			return fault.New("ak_key", "the signature is of scheme %#x, the attestation key is an RSA key", s.Scheme)
		}
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
			return fault.New("ak_key", "the attestation key is on %s, want P-256 or P-384", key.Curve.Params().Name)
		}
		if s.Scheme != AlgECDSA {
			return fault.New("ak_key", "the signature is of scheme %#x, the attestation key is an ECDSA key", s.Scheme)
		}
		ok = ecdsa.Verify(key, digest, new(big.Int).SetBytes(s.R), new(big.Int).SetBytes(s.S))
	default:
		return fault.New("ak_key", "the attestation key is a %T, want RSA or ECDSA", key)
	}
	if !ok {
		return fault.New("tpm_signature", "the quote is not signed by the attestation key")
	}
	return nil
}
