// SPDX-License-Identifier: Apache-2.0

// Package cca verifies attestation tokens of the Arm Confidential Compute
// Architecture: what a realm is (signed by the realm attestation key, RAK) on what
// platform (signed by the CCA platform attestation key, CPAK), and that the second
// vouches for the first.
//
// [Verify] is pure: a token, keys, and a time that it only notes, as tokens carry
// none. It guarantees that the claims were signed under one given platform key and
// that every claim has its type and length. No public authority certifies platform
// keys: whose key it is, the caller must know, and Claims.Trust says so. Whether
// firmware components and measurements are the right ones is for the caller's
// reference values, so the TCB status is NotReported (threats.md B18).
//
// The token is attacker-controlled; the realm personalisation value in it is
// chosen by the host. Specification: attestation.md §8.4, Field notes; formats: RMM
// specification (Arm DEN0137) A7.2, draft-ffm-rats-cca-token.
package cca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	_ "crypto/sha256" // the hashes of the claims
	_ "crypto/sha512"
	"fmt"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/cose"
	"github.com/dstack-go/dstack/attest/cose/strictcbor"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits in bytes, and counts (threats.md B15).
const (
	MaxToken      = 64 << 10
	MaxComponents = 32
	MaxConfig     = 1024
	MaxText       = 256
	MaxKey        = 512 // the realm key as its claim spells it
)

// CBOR tags and labels of the outer token. The older form is a map of two byte
// strings under TagToken, the newer a collection of conceptual messages
// (draft-ietf-rats-msg-wrap) under TagCMW, each [type, bytes] or [type, bytes,
// indicator].
const (
	TagToken      = 399
	TagCMW        = 907
	LabelPlatform = 44234
	LabelRealm    = 44241
	LabelCMWType  = "__cmwc_t"

	// ContentFormatEATCWT is the CoAP content format of application/eat+cwt.
	ContentFormatEATCWT = 263
	MediaTypeEATCWT     = "application/eat+cwt"
	IndicatorEvidence   = 4 // cm-type bit 2
)

// Labels of claims. Challenge and profile are in both tokens.
const (
	ClaimChallenge = 10
	ClaimProfile   = 265

	ClaimRPV     = 44235
	ClaimHash    = 44236
	ClaimKey     = 44237
	ClaimRIM     = 44238
	ClaimREM     = 44239
	ClaimKeyHash = 44240

	ClaimInstanceID       = 256
	ClaimLifecycle        = 2395
	ClaimImplementationID = 2396
	ClaimComponents       = 2399
	ClaimService          = 2400
	ClaimConfig           = 2401
	ClaimPlatformHash     = 2402

	ComponentType        = 1
	ComponentMeasurement = 2
	ComponentVersion     = 4
	ComponentSigner      = 5
	ComponentHash        = 6
)

// Profiles that are known. The realm token of the older kind names none.
const (
	ProfileRealm          = "tag:arm.com,2023:realm#1.0.0"
	ProfilePlatform       = "tag:arm.com,2023:cca_platform#1.0.0"
	ProfilePlatformLegacy = "http://arm.com/CCA-SSD/1.0.0"
)

// Lengths in bytes.
const (
	ChallengeSize        = 64
	RPVSize              = 64
	InstanceIDSize       = 33 // a UEID of type RAND: 0x01 and 32 bytes
	ImplementationIDSize = 32
)

// hashes are the algorithms of claims by their IANA names.
func hashByName(name string) (crypto.Hash, bool) {
	switch name {
	case "sha-256":
		return crypto.SHA256, true
	case "sha-384":
		return crypto.SHA384, true
	case "sha-512":
		return crypto.SHA512, true
	}
	return 0, false
}

// Token is a parsed token; unverified. Its claims have their types and the lengths
// given here.
type Token struct {
	Realm    Realm
	Platform Platform

	realm, platform *cose.Message
}

// Realm are the claims of the realm token.
type Realm struct {
	Profile   string           // empty in the older kind
	Challenge []byte           // 64 bytes, chosen by the guest
	RPV       [RPVSize]byte    // realm personalisation value
	Hash      string           // algorithm of RIM and REM
	RIM       []byte           // 32, 48 or 64 bytes, as are the next
	REM       [4][]byte        // of one length with RIM
	RawKey    []byte           // claim 44237, as the platform's challenge hashes it
	Key       *ecdsa.PublicKey // RawKey, read; P-384
	KeyHash   string           // algorithm of the platform's challenge
}

// Platform are the claims of the platform token.
type Platform struct {
	Profile          string
	Challenge        []byte // 32, 48 or 64 bytes
	ImplementationID [ImplementationIDSize]byte
	InstanceID       [InstanceIDSize]byte
	Config           []byte
	Lifecycle        uint16
	Hash             string
	Components       []attest.CCAComponent // HashAlgorithm is Hash where the token names none
}

// ParseToken reads a token of either outer form.
//
// Errors: cca_too_large, cca_malformed, cca_tag, cca_members, cca_cmw, those of
// cose.Parse, cca_algorithm, cca_claims, and one for each claim: cca_challenge,
// cca_realm_profile, cca_rpv, cca_realm_hash, cca_realm_key, cca_key_hash, cca_rim,
// cca_rem, cca_platform_challenge, cca_platform_profile, cca_implementation_id,
// cca_instance_id, cca_platform_config, cca_lifecycle_value, cca_platform_hash,
// cca_service, cca_components, cca_component.
func ParseToken(data []byte) (*Token, error) {
	platform, realm, err := open(data)
	if err != nil {
		return nil, err
	}
	t := &Token{}
	if t.platform, err = cose.Parse(platform); err != nil {
		return nil, fmt.Errorf("platform token: %w", err)
	}
	if t.realm, err = cose.Parse(realm); err != nil {
		return nil, fmt.Errorf("realm token: %w", err)
	}
	if t.realm.Algorithm != cose.ES384 {
		return nil, fault.New("cca_algorithm", "the realm token is signed by COSE algorithm %d, want ES384 (%d)", t.realm.Algorithm, cose.ES384)
	}
	m, err := claimsOf(t.platform)
	if err != nil {
		return nil, fmt.Errorf("platform token: %w", err)
	}
	if err := t.Platform.read(m); err != nil {
		return nil, err
	}
	if m, err = claimsOf(t.realm); err != nil {
		return nil, fmt.Errorf("realm token: %w", err)
	}
	if err := t.Realm.read(m); err != nil {
		return nil, err
	}
	return t, nil
}

// open takes the two signed messages out of a token.
func open(data []byte) (platform, realm []byte, err error) {
	if len(data) > MaxToken {
		return nil, nil, fault.New("cca_too_large", "token of %d bytes exceeds %d", len(data), MaxToken)
	}
	tag, body, _, err := strictcbor.Untag(data)
	if err != nil {
		return nil, nil, fault.Wrap(err, "cca_malformed", "token")
	}
	if tag != TagToken && tag != TagCMW {
		return nil, nil, fault.New("cca_tag", "the token has CBOR tag %d, want %d or %d", tag, TagToken, TagCMW)
	}
	item, err := strictcbor.Decode(body)
	if err != nil {
		return nil, nil, fault.Wrap(err, "cca_malformed", "token")
	}
	m, err := item.Map()
	if err != nil {
		return nil, nil, fault.Wrap(err, "cca_malformed", "token")
	}
	want := 2
	if kind, ok := m.Get(LabelCMWType); ok && tag == TagCMW {
		if _, err := kind.Text(1, MaxText); err != nil {
			return nil, nil, fault.Wrap(err, "cca_cmw", "type of the collection")
		}
		want++
	}
	p, hasPlatform := m.Get(LabelPlatform)
	r, hasRealm := m.Get(LabelRealm)
	if !hasPlatform || !hasRealm || len(m) != want {
		return nil, nil, fault.New("cca_members", "the token does not consist of a platform token (%d) and a realm token (%d)", LabelPlatform, LabelRealm)
	}
	unwrap := func(i strictcbor.Item) ([]byte, error) {
		b, err := i.Bytes(1, MaxToken)
		if err != nil {
			return nil, fault.Wrap(err, "cca_members", "member of the token")
		}
		return b, nil
	}
	if tag == TagCMW {
		unwrap = unwrapRecord
	}
	if platform, err = unwrap(p); err != nil {
		return nil, nil, err
	}
	realm, err = unwrap(r)
	return platform, realm, err
}

// unwrapRecord takes a signed message out of a record of a collection.
func unwrapRecord(i strictcbor.Item) ([]byte, error) {
	record, err := i.Array(2, 3)
	if err != nil {
		return nil, fault.Wrap(err, "cca_cmw", "record of the collection")
	}
	if record[0].IsText() {
		name, err := record[0].Text(1, MaxText)
		if err != nil || name != MediaTypeEATCWT && !strings.HasPrefix(name, MediaTypeEATCWT+";") {
			return nil, fault.New("cca_cmw", "record of media type %q, want %s", name, MediaTypeEATCWT)
		}
	} else if n, err := record[0].Int(); err != nil || n != ContentFormatEATCWT {
		return nil, fault.New("cca_cmw", "record of content format %d, want %d", n, ContentFormatEATCWT)
	}
	if len(record) == 3 {
		if n, err := record[2].Int(); err != nil || n != IndicatorEvidence {
			return nil, fault.New("cca_cmw", "record that is not marked as evidence alone")
		}
	}
	b, err := record[1].Bytes(1, MaxToken)
	if err != nil {
		return nil, fault.Wrap(err, "cca_cmw", "record of the collection")
	}
	return b, nil
}

func claimsOf(m *cose.Message) (strictcbor.Map, error) {
	item, err := strictcbor.Decode(m.Payload)
	if err != nil {
		return nil, fault.Wrap(err, "cca_claims", "claims")
	}
	claims, err := item.Map()
	if err != nil {
		return nil, fault.Wrap(err, "cca_claims", "claims")
	}
	return claims, nil
}

func (r *Realm) read(m strictcbor.Map) (err error) {
	if r.Challenge, err = bytesClaim(m, ClaimChallenge, ChallengeSize, ChallengeSize); err != nil {
		return fault.Wrap(err, "cca_challenge", "challenge of the realm")
	}
	if _, ok := m.Get(ClaimProfile); ok {
		if r.Profile, err = textClaim(m, ClaimProfile, ProfileRealm); err != nil {
			return fault.Wrap(err, "cca_realm_profile", "profile of the realm token")
		}
	}
	rpv, err := bytesClaim(m, ClaimRPV, RPVSize, RPVSize)
	if err != nil {
		return fault.Wrap(err, "cca_rpv", "personalisation value of the realm")
	}
	r.RPV = [RPVSize]byte(rpv)
	if r.Hash, err = hashClaim(m, ClaimHash); err != nil {
		return fault.Wrap(err, "cca_realm_hash", "hash algorithm of the realm")
	}
	if r.RawKey, err = bytesClaim(m, ClaimKey, 1, MaxKey); err == nil {
		r.Key, err = realmKey(r.RawKey)
	}
	if err != nil {
		return fault.Wrap(err, "cca_realm_key", "key of the realm")
	}
	if r.KeyHash, err = hashClaim(m, ClaimKeyHash); err != nil {
		return fault.Wrap(err, "cca_key_hash", "hash algorithm of the realm's key")
	}
	if r.RIM, err = digestClaim(m, ClaimRIM); err != nil {
		return fault.Wrap(err, "cca_rim", "initial measurement of the realm")
	}
	item, err := m.Need(ClaimREM)
	if err != nil {
		return fault.Wrap(err, "cca_rem", "extensible measurements of the realm")
	}
	list, err := item.Array(len(r.REM), len(r.REM))
	if err != nil {
		return fault.Wrap(err, "cca_rem", "extensible measurements of the realm")
	}
	for n, item := range list {
		if r.REM[n], err = item.Bytes(len(r.RIM), len(r.RIM)); err != nil {
			return fault.Wrap(err, "cca_rem", "extensible measurement %d of the realm", n)
		}
	}
	return nil
}

// realmKey reads the realm's key on P-384, which is a raw point (0x04 ‖ x ‖ y, 97
// bytes) or a COSE_Key. The two cannot be confused: a COSE_Key is a map and begins
// with another byte.
func realmKey(raw []byte) (*ecdsa.PublicKey, error) {
	const uncompressed = 4
	if raw[0] == uncompressed {
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), raw)
		if err != nil {
			return nil, fmt.Errorf("not a point on P-384: %w", err)
		}
		return key, nil
	}
	key, err := cose.ParseKey(raw)
	if err != nil {
		return nil, err
	}
	if key.Curve != elliptic.P384() {
		return nil, fmt.Errorf("a key on %s, want P-384", key.Curve.Params().Name)
	}
	return key, nil
}

func (p *Platform) read(m strictcbor.Map) (err error) {
	if p.Challenge, err = digestClaim(m, ClaimChallenge); err != nil {
		return fault.Wrap(err, "cca_platform_challenge", "challenge of the platform")
	}
	if p.Profile, err = textClaim(m, ClaimProfile, ProfilePlatform, ProfilePlatformLegacy); err != nil {
		return fault.Wrap(err, "cca_platform_profile", "profile of the platform token")
	}
	id, err := bytesClaim(m, ClaimImplementationID, ImplementationIDSize, ImplementationIDSize)
	if err != nil {
		return fault.Wrap(err, "cca_implementation_id", "implementation id of the platform")
	}
	p.ImplementationID = [ImplementationIDSize]byte(id)
	if id, err = bytesClaim(m, ClaimInstanceID, InstanceIDSize, InstanceIDSize); err != nil {
		return fault.Wrap(err, "cca_instance_id", "instance id of the platform")
	}
	const ueidRAND = 1
	if id[0] != ueidRAND {
		return fault.New("cca_instance_id", "instance id of the platform is a UEID of type %d, want %d", id[0], ueidRAND)
	}
	p.InstanceID = [InstanceIDSize]byte(id)
	if p.Config, err = bytesClaim(m, ClaimConfig, 1, MaxConfig); err != nil {
		return fault.Wrap(err, "cca_platform_config", "configuration of the platform")
	}
	item, err := m.Need(ClaimLifecycle)
	if err != nil {
		return fault.Wrap(err, "cca_lifecycle_value", "lifecycle of the platform")
	}
	lifecycle, err := item.Uint(1<<16 - 1)
	if err != nil {
		return fault.Wrap(err, "cca_lifecycle_value", "lifecycle of the platform")
	}
	p.Lifecycle = uint16(lifecycle)
	if p.Hash, err = hashClaim(m, ClaimPlatformHash); err != nil {
		return fault.Wrap(err, "cca_platform_hash", "hash algorithm of the platform")
	}
	if item, ok := m.Get(ClaimService); ok { // read by nobody; a token of another shape is refused
		if _, err := item.Text(0, MaxText); err != nil {
			return fault.Wrap(err, "cca_service", "verification service of the platform")
		}
	}
	if item, err = m.Need(ClaimComponents); err != nil {
		return fault.Wrap(err, "cca_components", "firmware components of the platform")
	}
	list, err := item.Array(1, MaxComponents)
	if err != nil {
		return fault.Wrap(err, "cca_components", "firmware components of the platform")
	}
	for n, item := range list {
		c, err := readComponent(item, p.Hash)
		if err != nil {
			return fault.Wrap(err, "cca_component", "firmware component %d of the platform", n)
		}
		p.Components = append(p.Components, c)
	}
	return nil
}

// readComponent reads one component: a measurement as long as its hash algorithm
// says, a signer id of 32, 48 or 64 bytes, and a type and version of printable
// ASCII, which may be absent.
func readComponent(item strictcbor.Item, hash string) (c attest.CCAComponent, err error) {
	m, err := item.Map()
	if err != nil {
		return c, err
	}
	for _, f := range []struct {
		label int
		to    *string
	}{{ComponentType, &c.Type}, {ComponentVersion, &c.Version}} {
		item, ok := m.Get(f.label)
		if !ok {
			continue
		}
		if *f.to, err = item.Text(0, MaxText); err != nil {
			return c, err
		}
		if strings.ContainsFunc(*f.to, func(r rune) bool { return r < ' ' || r > '~' }) {
			return c, fmt.Errorf("%q is not printable ASCII", *f.to)
		}
	}
	c.HashAlgorithm = hash
	if _, ok := m.Get(ComponentHash); ok {
		if c.HashAlgorithm, err = hashClaim(m, ComponentHash); err != nil {
			return c, err
		}
	}
	h, _ := hashByName(c.HashAlgorithm)
	if c.Measurement, err = bytesClaim(m, ComponentMeasurement, h.Size(), h.Size()); err != nil {
		return c, err
	}
	c.SignerID, err = digestClaim(m, ComponentSigner)
	return c, err
}

// bytesClaim reads a mandatory byte string.
func bytesClaim(m strictcbor.Map, label, least, most int) ([]byte, error) {
	item, err := m.Need(label)
	if err != nil {
		return nil, err
	}
	return item.Bytes(least, most)
}

// digestClaim reads a mandatory byte string of the length of some hash.
func digestClaim(m strictcbor.Map, label int) ([]byte, error) {
	b, err := bytesClaim(m, label, 32, 64)
	if err == nil && len(b) != 32 && len(b) != 48 && len(b) != 64 {
		return nil, fmt.Errorf("%d bytes, want 32, 48 or 64", len(b))
	}
	return b, err
}

// textClaim reads a mandatory text that is one of those given.
func textClaim(m strictcbor.Map, label int, known ...string) (string, error) {
	item, err := m.Need(label)
	if err != nil {
		return "", err
	}
	s, err := item.Text(0, MaxText)
	if err == nil && !slices.Contains(known, s) {
		return "", fmt.Errorf("%q is none of %q", s, known)
	}
	return s, err
}

// hashClaim reads the name of a hash algorithm.
func hashClaim(m strictcbor.Map, label int) (string, error) {
	return textClaim(m, label, "sha-256", "sha-384", "sha-512")
}
