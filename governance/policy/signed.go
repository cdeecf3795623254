// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// domain begins what is signed.
const domain = "dstack-policy-v1\n"

// MaxSigned bounds the signed form in bytes.
const MaxSigned = MaxDocument/3*4 + 64<<10

const maxSignatures = 64

// signed is the signed form.
type signed struct {
	Document   []byte      `json:"document"`
	Signatures []signature `json:"signatures"`
}

type signature struct {
	KeyID     string `json:"key_id"`
	Signature []byte `json:"signature"`
}

// Keys are who may sign, and how many of them must. The zero value takes no document.
type Keys struct {
	Keys      []ed25519.PublicKey
	Threshold int
}

// ParseKeys reads public keys of 64 hexadecimal digits each, separated by commas, of
// which threshold must sign. Code policy_keys.
func ParseKeys(text string, threshold int) (Keys, error) {
	k := Keys{Threshold: threshold}
	for one := range strings.SplitSeq(text, ",") {
		if one = strings.TrimSpace(one); one == "" {
			continue
		}
		key, err := hex.DecodeString(one)
		if err != nil || len(key) != ed25519.PublicKeySize {
			return Keys{}, fault.New("policy_keys", "%.80q is no Ed25519 key of %d hexadecimal digits", one, 2*ed25519.PublicKeySize)
		}
		k.Keys = append(k.Keys, key)
	}
	if len(k.Keys) == 0 || threshold < 1 || threshold > len(k.Keys) {
		return Keys{}, fault.New("policy_keys", "%d of %d keys must sign: the threshold is 1 to their number", threshold, len(k.Keys)).
			WithFix("name the governance keys whose signatures count")
	}
	return k, nil
}

// KeyID names a key: the first 8 bytes of the SHA-256 of its 32 bytes, hexadecimal.
func KeyID(key ed25519.PublicKey) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:8])
}

// Sign returns the signed form of a document's bytes with one signature. Bytes that are
// no document are not signed: policy_malformed.
func Sign(document []byte, key ed25519.PrivateKey) ([]byte, error) {
	return addSignature(signed{Document: document}, key)
}

// AddSignature returns the signed form with a signature more, or with that key's
// renewed.
func AddSignature(signedForm []byte, key ed25519.PrivateKey) ([]byte, error) {
	s, err := parseSigned(signedForm)
	if err != nil {
		return nil, err
	}
	return addSignature(*s, key)
}

func addSignature(s signed, key ed25519.PrivateKey) ([]byte, error) {
	if _, err := Parse(s.Document); err != nil {
		return nil, err
	}
	if len(key) != ed25519.PrivateKeySize {
		return nil, fault.New("policy_signature", "the signing key has %d bytes, want %d", len(key), ed25519.PrivateKeySize)
	}
	id := KeyID(key.Public().(ed25519.PublicKey))
	s.Signatures = slices.DeleteFunc(slices.Clone(s.Signatures), func(o signature) bool { return o.KeyID == id })
	if len(s.Signatures) >= maxSignatures {
		return nil, fault.New("policy_malformed", "the document has %d signatures already", len(s.Signatures))
	}
	s.Signatures = append(s.Signatures, signature{id, ed25519.Sign(key, message(s.Document))})
	out, err := json.Marshal(s)
	if err != nil {
		return nil, fault.Wrap(err, "policy_malformed", "write the signed policy")
	}
	return append(out, '\n'), nil
}

func message(document []byte) []byte { return append([]byte(domain), document...) }

func parseSigned(data []byte) (*signed, error) {
	var s signed
	err := strictjson.Decode(data, &s, strictjson.Limits{Size: MaxSigned, Depth: 3})
	if err == nil {
		err = noNull(data)
	}
	if err != nil {
		return nil, fault.Wrap(err, "policy_malformed", "the signed policy does not parse").WithFix("docs/kms-policy.md has the form")
	}
	if len(s.Document) == 0 || len(s.Document) > MaxDocument || len(s.Signatures) > maxSignatures {
		return nil, fault.New("policy_malformed", "the signed policy has a document of %d bytes and %d signatures; the most are %d and %d",
			len(s.Document), len(s.Signatures), MaxDocument, maxSignatures)
	}
	return &s, nil
}

// Bytes returns the document's exact bytes without looking at signatures: for people
// who are about to sign, never for a decision.
func Bytes(signedForm []byte) ([]byte, error) {
	s, err := parseSigned(signedForm)
	if err != nil {
		return nil, err
	}
	return s.Document, nil
}

// Open reads a document that enough of the keys signed and that is in force at a time.
// Codes: policy_signature when a signature of one of the keys is wrong or there is none,
// policy_threshold when distinct keys are too few, policy_malformed, policy_future,
// policy_expired.
func Open(signedForm []byte, keys Keys, at time.Time) (*Document, error) {
	doc, _, err := open(signedForm, keys)
	if err != nil {
		return nil, err
	}
	if err := current(doc, at); err != nil {
		return nil, err
	}
	return doc, nil
}

// current is [Document.inForce] as an error.
func current(doc *Document, at time.Time) error {
	no := doc.inForce(at)
	switch {
	case no == nil:
		return nil
	case no.code == codeFuture:
		return fault.New("policy_future", "%s", no.reason).WithFix("see whether the clocks are right")
	default:
		return fault.New("policy_expired", "%s", no.reason).WithFix("renew and sign it again")
	}
}

// open verifies, and parses what is verified only.
func open(signedForm []byte, keys Keys) (*Document, []byte, error) {
	s, err := parseSigned(signedForm)
	if err != nil {
		return nil, nil, err
	}
	if err := keys.verify(s); err != nil {
		return nil, nil, err
	}
	doc, err := Parse(s.Document)
	if err != nil {
		return nil, nil, err
	}
	return doc, s.Document, nil
}

func (k Keys) verify(s *signed) error {
	if k.Threshold < 1 {
		return fault.New("policy_threshold", "no number of signatures is configured that would be enough").WithFix("set the threshold of the governance keys")
	}
	good := map[string]bool{} // by public key
	for _, sig := range s.Signatures {
		for _, key := range k.Keys {
			if len(key) != ed25519.PublicKeySize || KeyID(key) != sig.KeyID {
				continue
			}
			if !ed25519.Verify(key, message(s.Document), sig.Signature) {
				return fault.New("policy_signature", "the signature of key %s is wrong", sig.KeyID).WithFix("fetch the policy again, or have it signed again")
			}
			good[string(key)] = true
		}
	}
	switch {
	case len(good) == 0:
		return fault.New("policy_signature", "none of the governance keys signed the policy").WithFix("sign it with a key that the KMS's configuration has")
	case len(good) < k.Threshold:
		return fault.New("policy_threshold", "%d of the governance keys signed the policy, %d must", len(good), k.Threshold).WithFix("have others sign it too")
	}
	return nil
}

// digest names a document by its exact bytes.
func digest(document []byte) string {
	sum := sha256.Sum256(document)
	return hex.EncodeToString(sum[:])
}
