// SPDX-License-Identifier: Apache-2.0

// Package ccatest is an Arm CCA platform with one realm for tests: a platform key
// of its own, and tokens of the exact shape of real ones. Every part can be changed
// before it is signed, so that a test can attack one check and be sure that every
// signature around it still holds.
//
// It is for tests only; what it makes is accepted under [Platform.Roots] alone.
package ccatest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/cca"
	"github.com/dstack-go/dstack/attest/cose"
	"github.com/dstack-go/dstack/attest/cose/cosetest"
	"github.com/dstack-go/dstack/collateral"
)

// At is the time to verify at; nothing depends on it.
var At = time.Date(2026, 1, 15, 0, 0, 0, 0, time.UTC)

// Platform is one platform and the realm on it. Change what you like, then ask for
// Evidence.
type Platform struct {
	PlatformKey *ecdsa.PrivateKey // P-384
	RealmKey    *ecdsa.PrivateKey // P-384

	// Realm and Claims are the claims of the realm and of the platform. The realm's
	// key (44237) and the platform's challenge (10), its hash as 44240 says, are
	// added unless they are there.
	Realm, Claims cosetest.Map

	// RawKey spells the realm's key as a point, not as a COSE_Key.
	RawKey bool

	// CMW makes the newer outer form; Outer changes either before it is encoded.
	CMW   bool
	Tag   uint64 // 0 for the form's
	Outer func(cosetest.Map)

	// RealmMessage and PlatformMessage are how the two are signed: key and payload
	// are filled in where they are nil.
	RealmMessage, PlatformMessage cosetest.Message

	t testing.TB
}

// New returns a platform whose tokens verify, of the newer profiles, with
// measurements of SHA-256.
func New(t testing.TB) *Platform {
	t.Helper()
	p := &Platform{
		t:           t,
		PlatformKey: cosetest.NewKey(t, elliptic.P384()), RealmKey: cosetest.NewKey(t, elliptic.P384()),
		RealmMessage:    cosetest.Message{Algorithm: cose.ES384, Tag: cose.TagSign1},
		PlatformMessage: cosetest.Message{Algorithm: cose.ES384, Tag: cose.TagSign1},
	}
	p.Realm = cosetest.Map{
		cca.ClaimProfile: cca.ProfileRealm, cca.ClaimChallenge: fill(0xcc, cca.ChallengeSize), cca.ClaimRPV: fill(0x0d, cca.RPVSize),
		cca.ClaimHash: "sha-256", cca.ClaimKeyHash: "sha-512", cca.ClaimRIM: fill(0x1e, 32),
		cca.ClaimREM: []any{fill(0xe0, 32), fill(0xe1, 32), fill(0xe2, 32), fill(0xe3, 32)},
	}
	p.Claims = cosetest.Map{
		cca.ClaimProfile: cca.ProfilePlatform, cca.ClaimImplementationID: fill(0x17, cca.ImplementationIDSize),
		cca.ClaimInstanceID: append([]byte{1}, fill(0x2d, 32)...), cca.ClaimConfig: []byte("config"), cca.ClaimLifecycle: 0x3003,
		cca.ClaimPlatformHash: "sha-256", cca.ClaimService: "https://ccatest.invalid",
		cca.ClaimComponents: []any{Component("BL", 32), Component("RMM", 32)},
	}
	return p
}

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// Component returns a firmware component with a measurement of n bytes.
func Component(kind string, n int) cosetest.Map {
	return cosetest.Map{
		cca.ComponentType: kind, cca.ComponentVersion: "1.2", cca.ComponentMeasurement: fill(0x3e, n), cca.ComponentSigner: fill(0x51, 32),
	}
}

// Quote returns the token.
func (p *Platform) Quote() []byte {
	p.t.Helper()
	realm, platform := maps.Clone(p.Realm), maps.Clone(p.Claims)
	if _, ok := realm[cca.ClaimKey]; !ok {
		realm[cca.ClaimKey] = cosetest.Marshal(p.t, cosetest.Key(p.t, p.RealmKey))
		if p.RawKey {
			realm[cca.ClaimKey] = cosetest.Point(p.t, p.RealmKey)
		}
	}
	if _, ok := platform[cca.ClaimChallenge]; !ok {
		hash := map[any]crypto.Hash{"sha-256": crypto.SHA256, "sha-384": crypto.SHA384, "sha-512": crypto.SHA512}[realm[cca.ClaimKeyHash]]
		if raw, ok := realm[cca.ClaimKey].([]byte); ok && hash != 0 {
			h := hash.New()
			h.Write(raw)
			platform[cca.ClaimChallenge] = h.Sum(nil)
		} else {
			platform[cca.ClaimChallenge] = make([]byte, 32)
		}
	}
	sign := func(m cosetest.Message, key *ecdsa.PrivateKey, claims cosetest.Map) []byte {
		if m.Key == nil {
			m.Key = key
		}
		if m.Payload == nil {
			m.Payload = cosetest.Marshal(p.t, claims)
		}
		return m.Sign(p.t)
	}
	outer := cosetest.Map{
		cca.LabelPlatform: sign(p.PlatformMessage, p.PlatformKey, platform),
		cca.LabelRealm:    sign(p.RealmMessage, p.RealmKey, realm),
	}
	tag := uint64(cca.TagToken)
	if p.CMW {
		tag = cca.TagCMW
		for label, message := range outer {
			outer[label] = []any{cca.ContentFormatEATCWT, message}
		}
	}
	if p.Outer != nil {
		p.Outer(outer)
	}
	if p.Tag != 0 {
		tag = p.Tag
	}
	return cosetest.Marshal(p.t, cbor.Tag{Number: tag, Content: outer})
}

// Evidence returns the token as evidence.
func (p *Platform) Evidence() *attest.Evidence {
	p.t.Helper()
	return &attest.Evidence{TEE: dstack.CCA, Quote: p.Quote()}
}

// Roots returns the platform's key, of development trust.
func (p *Platform) Roots() []attest.Roots {
	return []attest.Roots{{TEE: dstack.CCA, Trust: dstack.TrustDevelopment, Keys: []attest.RootKey{{Name: "ccatest", Key: &p.PlatformKey.PublicKey}}}}
}

// DevRoots returns the key as a development roots file holds it.
func (p *Platform) DevRoots() *collateral.DevRoots {
	p.t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&p.PlatformKey.PublicKey)
	if err != nil {
		p.t.Fatalf("ccatest: %v", err)
	}
	return &collateral.DevRoots{Version: 1, Name: "ccatest", CCAKeyPEM: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}
}

// For returns a copy of the platform, with claims of its own, that belongs to
// another test.
func (p *Platform) For(t testing.TB) *Platform {
	c := *p
	c.t, c.Realm, c.Claims = t, maps.Clone(p.Realm), maps.Clone(p.Claims)
	return &c
}

// TB returns the test that the platform belongs to.
func (p *Platform) TB() testing.TB { return p.t }
