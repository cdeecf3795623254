// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"math/big"
	"slices"

	"github.com/dstack-go/dstack"
	agentpb "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/derive"
)

// Algorithms of keys and signatures (guest-agent.md §3, §8).
const (
	algEd25519   = "ed25519"
	algK256      = "secp256k1"
	algPrehashed = "secp256k1_prehashed" // signatures only
)

// algorithm returns the canonical name of a key's algorithm.
func algorithm(name string) (string, error) {
	switch name {
	case "", algK256, "k256":
		return algK256, nil
	case algEd25519:
		return algEd25519, nil
	}
	return "", unsupported(name)
}

func unsupported(name string) error {
	if len(name) > 40 {
		name = name[:40] + "…"
	}
	// Upstream's words first: clients match on them.
	return fault.New("key_algorithm", "Unsupported algorithm: %q", name).
		WithFix("use %s or %s", algK256, algEd25519)
}

// derived is one key of the app, with the signatures that lead from it to the KMS.
type derived struct {
	key    []byte // 32 bytes: a secp256k1 scalar or an Ed25519 seed; secret
	public []byte // 33 bytes compressed, or 32 bytes
	chain  [][]byte
}

func (d *derived) wipe() { clear(d.key) }

// derive makes the key of a path. The app's key signs "purpose:hex(public)", and
// the KMS, if there is one, signed the app's key (guest-agent.md §8.2).
func (a *Agent) derive(path, purpose, algorithm string) (*derived, error) {
	root := a.keys.App.Bytes()
	d := new(derived)
	var err error
	if algorithm == algEd25519 {
		if d.key, err = derive.KDF(root, ed25519.SeedSize, []byte(path)); err != nil {
			return nil, err
		}
		private := ed25519.NewKeyFromSeed(d.key)
		d.public = slices.Clone(private.Public().(ed25519.PublicKey))
		clear(private)
	} else {
		if d.key, err = derive.K256(root, []byte(path)); err != nil {
			return nil, err
		}
		if d.public, err = derive.K256Public(d.key); err != nil {
			d.wipe()
			return nil, err
		}
	}
	link, err := derive.Sign(root, []byte(purpose), []byte(":"), []byte(hex.EncodeToString(d.public)))
	if err != nil {
		d.wipe()
		return nil, err
	}
	d.chain = [][]byte{link, a.keys.AppSignature}
	return d, nil
}

// getKey answers GetKey, whose caller may use what s allows.
func (a *Agent) getKey(s *scope, req *agentpb.GetKeyArgs) (*agentpb.GetKeyResponse, error) {
	if err := a.authorised(); err != nil {
		return nil, err
	}
	if err := s.allow(req.Path); err != nil {
		return nil, err
	}
	name, err := algorithm(req.Algorithm)
	if err != nil {
		return nil, err
	}
	d, err := a.derive(req.Path, req.Purpose, name)
	if err != nil {
		return nil, err
	}
	return &agentpb.GetKeyResponse{Key: d.key, SignatureChain: d.chain}, nil
}

func (a *Agent) deriveK256Key(s *scope, req *agentpb.GetKeyArgs) (*agentpb.DeriveK256KeyResponse, error) {
	key, err := a.getKey(s, req)
	if err != nil {
		return nil, err
	}
	return &agentpb.DeriveK256KeyResponse{K256Key: key.Key, K256SignatureChain: key.SignatureChain}, nil
}

// sign signs with the key of the path "vms" and the purpose "signing".
func (a *Agent) sign(s *scope, req *agentpb.SignRequest) (*agentpb.SignResponse, error) {
	if err := a.authorised(); err != nil {
		return nil, err
	}
	if err := s.allow(signPath); err != nil {
		return nil, err
	}
	if req.Algorithm == "" { // GetKey has a default, Sign has none
		return nil, unsupported(req.Algorithm)
	}
	base := req.Algorithm
	if base == algPrehashed {
		base = algK256
	}
	name, err := algorithm(base)
	if err != nil {
		return nil, err
	}
	if req.Algorithm == algPrehashed {
		if err := checkDigest(req.Data); err != nil {
			return nil, err
		}
	}
	d, err := a.derive(signPath, "signing", name)
	if err != nil {
		return nil, err
	}
	defer d.wipe()
	var signature []byte
	switch {
	case name == algEd25519:
		private := ed25519.NewKeyFromSeed(d.key)
		signature = ed25519.Sign(private, req.Data)
		clear(private)
	case req.Algorithm == algPrehashed:
		signature, err = derive.SignDigest(d.key, req.Data)
	default:
		sum := sha256.Sum256(req.Data)
		signature, err = derive.SignDigest(d.key, sum[:])
	}
	if err != nil {
		return nil, err
	}
	return &agentpb.SignResponse{
		Signature: signature, PublicKey: d.public,
		SignatureChain: append([][]byte{signature}, d.chain...),
	}, nil
}

// checkDigest refuses what is no SHA-256-sized digest. Upstream's Verify takes
// others and pads or cuts them (guest-agent.md §8.4); here both methods agree.
func checkDigest(b []byte) error {
	if len(b) != sha256.Size {
		return fault.New("digest_length", "%s requires a 32-byte digest, got %d bytes", algPrehashed, len(b))
	}
	return nil
}

// verify checks a signature by any key; it uses none of ours. A key or a signature
// that is none is an error, a wrong signature is not.
func (a *Agent) verify(_ context.Context, req *agentpb.VerifyRequest) (*agentpb.VerifyResponse, error) {
	malformed := func(format string, args ...any) (*agentpb.VerifyResponse, error) {
		return nil, fault.New("signature_malformed", format, args...)
	}
	var valid bool
	var err error
	switch req.Algorithm {
	case algEd25519:
		if len(req.PublicKey) != ed25519.PublicKeySize || !onEdwards25519(req.PublicKey) {
			return malformed("the public key is no Ed25519 key")
		}
		if len(req.Signature) != ed25519.SignatureSize {
			return malformed("an Ed25519 signature has %d bytes, not %d", ed25519.SignatureSize, len(req.Signature))
		}
		valid = ed25519.Verify(req.PublicKey, req.Data, req.Signature)
	case algK256, "k256":
		sum := sha256.Sum256(req.Data)
		valid, err = derive.ValidDigest(req.PublicKey, sum[:], req.Signature)
	case algPrehashed:
		if err := checkDigest(req.Data); err != nil {
			return nil, err
		}
		valid, err = derive.ValidDigest(req.PublicKey, req.Data, req.Signature)
	default:
		return nil, unsupported(req.Algorithm)
	}
	if err != nil {
		return malformed("%v", err)
	}
	return &agentpb.VerifyResponse{Valid: valid}, nil
}

var (
	edwardsP = new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19))
	edwardsD = func() *big.Int { // −121665/121666 (RFC 8032 §5.1)
		d := new(big.Int).ModInverse(big.NewInt(121666), edwardsP)
		return d.Mul(d, big.NewInt(-121665)).Mod(d, edwardsP)
	}()
)

// onEdwards25519 reports whether 32 bytes are the y of a point (RFC 8032 §5.1.3):
// (y² − 1)/(d·y² + 1) is a square. crypto/ed25519 does not tell a key that is none
// from a signature that is wrong.
func onEdwards25519(key []byte) bool {
	le := slices.Clone(key)
	le[31] &= 0x7f // the sign of x
	slices.Reverse(le)
	y2 := new(big.Int).SetBytes(le)
	y2.Mul(y2, y2).Mod(y2, edwardsP)
	u := new(big.Int).Sub(y2, big.NewInt(1))
	v := new(big.Int).Mul(y2, edwardsD)
	v.Add(v, big.NewInt(1)).Mod(v, edwardsP)
	// d is no square, so that v is never 0; u·v is a square when u/v is.
	return big.Jacobi(u.Mul(u, v).Mod(u, edwardsP), edwardsP) >= 0
}

// appKeyText is the text by which evidence names the public half of the key of
// Sign (guest-agent.md §5), at most 64 bytes of ASCII.
func appKeyText(algorithm string, public []byte) string {
	kind := "dip1::secp256k1c-pk:"
	if algorithm == algEd25519 {
		kind = "dip1::ed25519-pk:"
	}
	return kind + base64.RawURLEncoding.EncodeToString(public)
}

// appKeyData returns the report data that binds the key of Sign. The empty
// algorithm, which GetKey takes, is refused as upstream refuses it.
func (a *Agent) appKeyData(name string) (dstack.ReportData, error) {
	var data dstack.ReportData
	canonical, err := algorithm(name)
	if err != nil {
		return data, err
	}
	if name == "" {
		return data, unsupported(name)
	}
	d, err := a.derive(signPath, "signing", canonical)
	if err != nil {
		return data, err
	}
	defer d.wipe()
	copy(data[:], appKeyText(canonical, d.public))
	return data, nil
}
