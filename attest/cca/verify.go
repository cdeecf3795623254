// SPDX-License-Identifier: Apache-2.0

package cca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/internal/fault"
)

// DeviceScheme is Claims.DeviceScheme: Claims.DeviceID is the SHA-256 of the
// platform's instance id (UEID, 33 bytes).
const DeviceScheme = "cca-instance"

// Verify establishes what a token proves: that a platform whose key is among the
// roots vouches for the realm's key (cca_binding, unknown_root), and the realm's key
// for the realm (cca_realm_signature). It is an [attest.Verify].
//
// Errors beside the claims: cca_lifecycle, of a platform that is not secured, unless
// it is in debug mode and the options allow that; and cca_measurement_size, of
// realm measurements whose length is not that of their hash algorithm.
func Verify(in attest.Input) (*attest.Claims, error) {
	if in.Evidence == nil {
		return nil, fault.New("evidence_missing", "there is no evidence")
	}
	if in.Evidence.TEE != dstack.CCA {
		return nil, fault.New("cca_kind", "the evidence is of %s, not of %s", in.Evidence.TEE, dstack.CCA)
	}
	t, err := ParseToken(in.Evidence.Quote)
	if err != nil {
		return nil, err
	}
	root, trust, err := t.chooseKey(in.Roots)
	if err != nil {
		return nil, err
	}
	hash, _ := hashByName(t.Realm.KeyHash)
	h := hash.New()
	h.Write(t.Realm.RawKey)
	if !bytes.Equal(t.Platform.Challenge, h.Sum(nil)) {
		return nil, fault.New("cca_binding", "the platform token does not commit to the realm's key")
	}
	if err := t.realm.Verify(t.Realm.Key); err != nil {
		return nil, fault.Wrap(err, "cca_realm_signature", "realm token")
	}

	claims := &attest.Claims{
		TEE: dstack.CCA, Trust: trust, Root: describeKey(root, trust),
		CCA: &attest.CCA{
			RIM: t.Realm.RIM, REM: t.Realm.REM, RPV: t.Realm.RPV, HashAlgorithm: t.Realm.Hash,
			RealmProfile: t.Realm.Profile, RealmKey: t.Realm.RawKey,
			ImplementationID: t.Platform.ImplementationID, InstanceID: t.Platform.InstanceID[:],
			Lifecycle: t.Platform.Lifecycle, PlatformProfile: t.Platform.Profile,
			PlatformConfig: t.Platform.Config, Challenge: t.Platform.Challenge, Components: t.Platform.Components,
		},
		ReportData:   t.Realm.Challenge,
		TCBStatus:    attest.NotReported,
		Debug:        isDebug(t.Platform.Lifecycle),
		DeviceID:     sha256.Sum256(t.Platform.InstanceID[:]),
		DeviceScheme: DeviceScheme,
		At:           in.At,
	}
	return claims, judge(t, in.Options)
}

// judge says why a platform or realm of a verified token is not acceptable.
func judge(t *Token, opt attest.Options) error {
	l := t.Platform.Lifecycle
	if !isSecured(l) && (!isDebug(l) || !opt.AllowDebug) {
		return fault.New("cca_lifecycle", "the platform's lifecycle is %#04x (%s), want secured (0x3000 to 0x30ff)", l, lifecycleName(l))
	}
	hash, _ := hashByName(t.Realm.Hash)
	if len(t.Realm.RIM) != hash.Size() {
		return fault.New("cca_measurement_size", "the realm's measurements have %d bytes, %s has %d", len(t.Realm.RIM), t.Realm.Hash, hash.Size())
	}
	return nil
}

// The lifecycle's upper byte is the state (RMM specification A7.2.4).
func isSecured(l uint16) bool { return l>>8 == 0x30 }
func isDebug(l uint16) bool   { return l>>8 == 0x40 || l>>8 == 0x50 }

func lifecycleName(l uint16) string {
	switch l >> 8 {
	case 0x00:
		return "unknown"
	case 0x10:
		return "assembly and test"
	case 0x20:
		return "provisioning"
	case 0x30:
		return "secured"
	case 0x40:
		return "debug, of another part than CCA"
	case 0x50:
		return "debug, recoverable"
	case 0x60:
		return "decommissioned"
	}
	return "undefined"
}

// chooseKey finds the platform key that signed the platform token. A token names
// none, so that a bad signature and an unknown platform look alike.
func (t *Token) chooseKey(roots []attest.Roots) (attest.RootKey, dstack.Trust, error) {
	known := 0
	for _, r := range roots {
		if r.TEE != dstack.CCA {
			continue
		}
		for _, k := range r.Keys {
			known++
			if t.platform.Verify(k.Key) == nil {
				return k, r.Trust, nil
			}
		}
	}
	if known == 0 {
		return attest.RootKey{}, "", fault.New("no_roots", "no platform key for %s was given", dstack.CCA).
			WithFix("name the platform's attestation key: no public authority certifies it")
	}
	return attest.RootKey{}, "", fault.New("unknown_root", "the platform token is signed by none of the %d given platform keys", known)
}

// describeKey names a platform key by what the caller calls it and the SHA-256 of
// its SubjectPublicKeyInfo.
func describeKey(k attest.RootKey, trust dstack.Trust) string {
	der, err := x509.MarshalPKIXPublicKey(k.Key.(*ecdsa.PublicKey))
	if err != nil { // not of a key that has verified
		return k.Name
	}
	sum := sha256.Sum256(der)
	name := k.Name
	if trust == dstack.TrustDevelopment {
		name = "a development platform key"
	}
	return fmt.Sprintf("%s (sha256 %s)", name, hex.EncodeToString(sum[:]))
}
