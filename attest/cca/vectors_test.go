// SPDX-License-Identifier: Apache-2.0

package cca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"os"
	"testing"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/cca"
	"github.com/dstack-go/dstack/attest/cca/ccatest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// tfRMM is a token of Arm's realm management monitor (testdata/README.md).
func tfRMM(t testing.TB) attest.Input {
	t.Helper()
	token, err := os.ReadFile("testdata/tf-rmm-token.cbor")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("testdata/tf-rmm-platform-key.pem")
	if err != nil {
		t.Fatal(err)
	}
	key, err := cca.ParseRootKey("TF-RMM", string(text))
	if err != nil {
		t.Fatal(err)
	}
	return attest.Input{Evidence: &attest.Evidence{TEE: dstack.CCA, Quote: token}, Roots: []attest.Roots{cca.CallerRoots(key)}, At: ccatest.At}
}

// veraison is a synthetic token of the verifier project of that name.
func veraison(t testing.TB) attest.Input {
	t.Helper()
	key := attest.RootKey{Name: "veraison", Key: readJWK(t, "veraison-ec.p256.pub.jwk", elliptic.P256())}
	return attest.Input{
		Evidence: &attest.Evidence{TEE: dstack.CCA, Quote: testkit.Vectors(t, "attestation/cca/veraison-cca-good.cbor")},
		Roots:    []attest.Roots{cca.CallerRoots(key)}, At: ccatest.At,
	}
}

func readJWK(t testing.TB, name string, curve elliptic.Curve) *ecdsa.PublicKey {
	t.Helper()
	var jwk struct{ X, Y string }
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/cca/"+name), &jwk); err != nil {
		t.Fatal(err)
	}
	point := []byte{4}
	for _, s := range []string{jwk.X, jwk.Y} {
		b, err := base64.RawURLEncoding.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		point = append(point, b...)
	}
	key, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestARealTokenVerifies(t *testing.T) {
	c, err := cca.Verify(tfRMM(t))
	if err != nil {
		t.Fatal(err)
	}
	a := c.CCA
	if c.Trust != dstack.TrustCaller || a.RealmProfile != "" || a.PlatformProfile != cca.ProfilePlatformLegacy || a.Lifecycle != 0x3003 ||
		a.HashAlgorithm != "sha-256" || len(a.RealmKey) != 97 || !bytes.Equal(c.ReportData, fill(0xab, 64)) {
		t.Errorf("claims %+v", a)
	}
	for _, m := range append([][]byte{a.RIM}, a.REM[:]...) {
		if !bytes.Equal(m, make([]byte, 32)) {
			t.Errorf("measurement %x", m)
		}
	}
	if len(a.Components) != 4 || a.Components[0].Type != "BL" || a.Components[0].Version != "3.4.2" || a.Components[3].HashAlgorithm != "sha-256" {
		t.Errorf("components %+v", a.Components)
	}
	in := tfRMM(t)
	in.Roots = ccatest.New(t).Roots()
	if _, err := cca.Verify(in); fault.Code(err) != "unknown_root" {
		t.Error(err)
	}
	in.Roots = nil
	if _, err := cca.Verify(in); fault.Code(err) != "no_roots" {
		t.Error(err)
	}
}

// The synthetic token has measurements of 64 bytes under sha-256, which no realm
// management monitor makes: its signatures and claims hold, and it is judged.
func TestTheSyntheticTokenVerifiesAndIsJudged(t *testing.T) {
	c, err := cca.Verify(veraison(t))
	if fault.Code(err) != "cca_measurement_size" || c == nil {
		t.Fatalf("%+v, %v", c, err)
	}
	var want struct {
		Platform struct {
			Challenge        []byte `json:"cca-platform-challenge"`
			Profile          string `json:"cca-platform-profile"`
			ImplementationID []byte `json:"cca-platform-implementation-id"`
			InstanceID       []byte `json:"cca-platform-instance-id"`
			Config           []byte `json:"cca-platform-config"`
			Lifecycle        uint16 `json:"cca-platform-lifecycle"`
			Components       []struct {
				Type     string `json:"measurement-type"`
				Value    []byte `json:"measurement-value"`
				SignerID []byte `json:"signer-id"`
				Version  string `json:"version"`
			} `json:"cca-platform-sw-components"`
			Hash string `json:"cca-platform-hash-algo-id"`
		} `json:"cca-platform-token"`
		Realm struct {
			Challenge []byte   `json:"cca-realm-challenge"`
			RPV       []byte   `json:"cca-realm-personalization-value"`
			RIM       []byte   `json:"cca-realm-initial-measurement"`
			REM       [][]byte `json:"cca-realm-extensible-measurements"`
			Hash      string   `json:"cca-realm-hash-algo-id"`
			Key       []byte   `json:"cca-realm-public-key"`
		} `json:"cca-realm-delegated-token"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/cca/veraison-cca-good.claims.json"), &want); err != nil {
		t.Fatal(err)
	}
	a := c.CCA
	for name, pair := range map[string][2][]byte{
		"platform challenge": {a.Challenge, want.Platform.Challenge}, "implementation id": {a.ImplementationID[:], want.Platform.ImplementationID},
		"instance id": {a.InstanceID, want.Platform.InstanceID}, "config": {a.PlatformConfig, want.Platform.Config},
		"challenge": {c.ReportData, want.Realm.Challenge}, "rpv": {a.RPV[:], want.Realm.RPV}, "rim": {a.RIM, want.Realm.RIM},
		"rem0": {a.REM[0], want.Realm.REM[0]}, "rem3": {a.REM[3], want.Realm.REM[3]}, "key": {a.RealmKey, want.Realm.Key},
	} {
		if !bytes.Equal(pair[0], pair[1]) {
			t.Errorf("%s is %x, want %x", name, pair[0], pair[1])
		}
	}
	if a.PlatformProfile != want.Platform.Profile || a.Lifecycle != want.Platform.Lifecycle || a.HashAlgorithm != want.Realm.Hash || a.RealmProfile != cca.ProfileRealm {
		t.Errorf("claims %+v", a)
	}
	for i, w := range want.Platform.Components {
		got := a.Components[i]
		if got.Type != w.Type || got.Version != w.Version || !bytes.Equal(got.Measurement, w.Value) || !bytes.Equal(got.SignerID, w.SignerID) || got.HashAlgorithm != want.Platform.Hash {
			t.Errorf("component %d is %+v, want %+v", i, got, w)
		}
	}
	// The realm's key is the one that the vector's makers publish.
	tok, err := cca.ParseToken(veraison(t).Evidence.Quote)
	if err != nil || !tok.Realm.Key.Equal(readJWK(t, "veraison-ec.p384.pub.jwk", elliptic.P384())) {
		t.Errorf("realm key, %v", err)
	}
}
