// SPDX-License-Identifier: Apache-2.0

package cca_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"fmt"
	"maps"
	"runtime"
	"strings"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/cca"
	"github.com/dstack-go/dstack/attest/cca/ccatest"
	"github.com/dstack-go/dstack/attest/cose"
	"github.com/dstack-go/dstack/attest/cose/cosetest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

type (
	platform = ccatest.Platform
	cborMap  = cosetest.Map
)

// The compiler holds Verify to the interface of every TEE.
var _ attest.Verify = cca.Verify

func input(p *platform) attest.Input {
	return attest.Input{Evidence: p.Evidence(), Roots: p.Roots(), At: ccatest.At}
}

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func TestAGoodTokenVerifies(t *testing.T) {
	for name, change := range map[string]func(p *platform){
		"tag 399, COSE_Key":  func(*platform) {},
		"tag 399, raw point": func(p *platform) { p.RawKey = true },
		"tag 907":            func(p *platform) { p.CMW = true },
		"tag 907 with type and indicator": func(p *platform) {
			p.CMW = true
			p.Outer = func(m cborMap) {
				m[cca.LabelCMWType] = "tag:example.com,2026:cca"
				m[cca.LabelRealm] = append(m[cca.LabelRealm].([]any), 4)
			}
		},
		"tag 907 with media types": func(p *platform) {
			p.CMW = true
			p.Outer = func(m cborMap) {
				m[cca.LabelRealm].([]any)[0] = "application/eat+cwt"
				m[cca.LabelPlatform].([]any)[0] = `application/eat+cwt; eat_profile="tag:arm.com,2023:cca_platform#1.0.0"`
			}
		},
		"untagged messages": func(p *platform) { p.RealmMessage.Tag, p.PlatformMessage.Tag = 0, 0 },
		"the older profiles": func(p *platform) {
			delete(p.Realm, cca.ClaimProfile)
			p.Claims[cca.ClaimProfile], p.RawKey = cca.ProfilePlatformLegacy, true
		},
		"a binding of SHA-256": func(p *platform) { p.Realm[cca.ClaimKeyHash] = "sha-256" },
		"a binding of SHA-384": func(p *platform) { p.Realm[cca.ClaimKeyHash] = "sha-384" },
		"a platform key on P-256": func(p *platform) {
			p.PlatformKey, p.PlatformMessage.Algorithm = cosetest.NewKey(p.TB(), elliptic.P256()), cose.ES256
		},
		"a platform key on P-521": func(p *platform) {
			p.PlatformKey, p.PlatformMessage.Algorithm = cosetest.NewKey(p.TB(), elliptic.P521()), cose.ES512
		},
		"no verification service": func(p *platform) { delete(p.Claims, cca.ClaimService) },
		"a component with a hash of its own": func(p *platform) {
			c := ccatest.Component("BL", 64)
			c[cca.ComponentHash] = "sha-512"
			p.Claims[cca.ClaimComponents] = []any{c}
		},
		"a component without type and version": func(p *platform) {
			c := ccatest.Component("BL", 32)
			delete(c, cca.ComponentType)
			delete(c, cca.ComponentVersion)
			p.Claims[cca.ClaimComponents] = []any{c}
		},
		"a claim that nobody knows":       func(p *platform) { p.Realm[99999], p.Claims["x"] = 1, "y" },
		"every lifecycle that is secured": func(p *platform) { p.Claims[cca.ClaimLifecycle] = 0x30ff },
	} {
		t.Run(name, func(t *testing.T) {
			p := ccatest.New(t)
			change(p)
			if _, err := cca.Verify(input(p)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTheClaimsAreTheTokens(t *testing.T) {
	for hash, n := range map[string]int{"sha-256": 32, "sha-384": 48, "sha-512": 64} {
		p := ccatest.New(t)
		p.Realm[cca.ClaimHash], p.Realm[cca.ClaimRIM] = hash, fill(0x1e, n)
		p.Realm[cca.ClaimREM] = []any{fill(0xe0, n), fill(0xe1, n), fill(0xe2, n), fill(0xe3, n)}
		c, err := cca.Verify(input(p))
		if err != nil {
			t.Fatal(err)
		}
		a := c.CCA
		if c.TEE != dstack.CCA || c.Trust != dstack.TrustDevelopment || !strings.HasPrefix(c.Root, "a development platform key (sha256 ") {
			t.Errorf("%s, %s under %s", c.TEE, c.Trust, c.Root)
		}
		if !bytes.Equal(c.ReportData, fill(0xcc, 64)) || a.RPV != [64]byte(fill(0x0d, 64)) || a.HashAlgorithm != hash || !bytes.Equal(a.RIM, fill(0x1e, n)) {
			t.Errorf("claims %+v", a)
		}
		for i := range a.REM {
			if !bytes.Equal(a.REM[i], fill(0xe0+byte(i), n)) {
				t.Errorf("rem%d is %x", i, a.REM[i])
			}
		}
		instance := append([]byte{1}, fill(0x2d, 32)...)
		if a.ImplementationID != [32]byte(fill(0x17, 32)) || !bytes.Equal(a.InstanceID, instance) || a.Lifecycle != 0x3003 ||
			string(a.PlatformConfig) != "config" || len(a.Challenge) != 64 || a.RealmProfile != cca.ProfileRealm || a.PlatformProfile != cca.ProfilePlatform {
			t.Errorf("claims %+v", a)
		}
		if c.DeviceID != sha256.Sum256(instance) || c.DeviceScheme != "cca-instance" {
			t.Errorf("device %s of scheme %s", c.DeviceID, c.DeviceScheme)
		}
		if len(a.Components) != 2 || a.Components[1].Type != "RMM" || a.Components[1].Version != "1.2" || a.Components[1].HashAlgorithm != "sha-256" ||
			!bytes.Equal(a.Components[1].Measurement, fill(0x3e, 32)) || !bytes.Equal(a.Components[1].SignerID, fill(0x51, 32)) {
			t.Errorf("components %+v", a.Components)
		}
		if c.Debug || !c.Expires.IsZero() || !c.Made.IsZero() || !c.At.Equal(ccatest.At) {
			t.Errorf("claims %+v", c)
		}
		if r := c.RuntimeRegisters(); len(r) != 1 || r[0].Name != "rem3" || r[0].Hash != hash || !bytes.Equal(r[0].Value, a.REM[3]) {
			t.Errorf("runtime registers %+v", r)
		}
	}
}

// Nothing in a token is a TCB level; firmware components are for reference values.
func TestThreat_B18_TheTCBStatusIsNotReported(t *testing.T) {
	c, err := cca.Verify(input(ccatest.New(t)))
	if err != nil || c.TCBStatus != attest.NotReported || !c.TCBDate.IsZero() || c.TCBEvaluation != 0 || len(c.Advisories) > 0 {
		t.Errorf("%+v, %v", c, err)
	}
}

// mutation is one attack and the reason of its refusal. Everything around the
// change is signed as it should be.
type mutation struct {
	name, code string
	platform   func(p *platform)
	quote      func([]byte) []byte
	evidence   func(e *attest.Evidence)
	roots      func(p *platform) []attest.Roots
}

func mutations() []mutation {
	var list []mutation
	add := func(code, name string, m mutation) {
		m.name, m.code = name, code
		list = append(list, m)
	}
	realm := func(label int, value any) mutation {
		return mutation{platform: func(p *platform) { p.Realm[label] = value }}
	}
	claim := func(label int, value any) mutation {
		return mutation{platform: func(p *platform) { p.Claims[label] = value }}
	}
	noRealm := func(label int) mutation { return mutation{platform: func(p *platform) { delete(p.Realm, label) }} }
	noClaim := func(label int) mutation { return mutation{platform: func(p *platform) { delete(p.Claims, label) }} }
	outer := func(edit func(m cborMap)) mutation { return mutation{platform: func(p *platform) { p.Outer = edit }} }
	cmw := func(edit func(m cborMap)) mutation {
		return mutation{platform: func(p *platform) { p.CMW, p.Outer = true, edit }}
	}
	component := func(label int, value any) mutation {
		return mutation{platform: func(p *platform) {
			c := ccatest.Component("BL", 32)
			if c[label] = value; value == nil {
				delete(c, label)
			}
			p.Claims[cca.ClaimComponents] = []any{ccatest.Component("RMM", 32), c}
		}}
	}
	message := func(edit func(m *cosetest.Message)) mutation {
		return mutation{platform: func(p *platform) { edit(&p.RealmMessage) }}
	}

	// The outer form.
	add("cca_tag", "no token", mutation{quote: func([]byte) []byte { return nil }})
	add("cca_malformed", "a token cut short", mutation{quote: func(q []byte) []byte { return q[:len(q)-1] }})
	add("cca_malformed", "a byte after the token", mutation{quote: func(q []byte) []byte { return append(q, 0) }})
	add("cca_too_large", "B15: a token beyond the size limit", mutation{quote: func(q []byte) []byte { return append(q, make([]byte, cca.MaxToken)...) }})
	add("cca_tag", "a token without a tag", mutation{quote: func(q []byte) []byte { return q[3:] }})
	add("cca_tag", "a token under another tag", mutation{platform: func(p *platform) { p.Tag = 398 }})
	add("cca_malformed", "a token under two tags", mutation{quote: func(q []byte) []byte { return append([]byte{0xd9, 1, 0x8f}, q...) }})
	add("cca_malformed", "an array for a token", mutation{quote: func([]byte) []byte { return []byte{0xd9, 1, 0x8f, 0x80} }})
	add("cca_malformed", "a token with a label twice", mutation{quote: func(q []byte) []byte {
		return bytes.Replace(q, []byte{0x19, 0xac, 0xd1}, []byte{0x19, 0xac, 0xca}, 1)
	}})
	add("cca_members", "a token without a platform", outer(func(m cborMap) { delete(m, cca.LabelPlatform) }))
	add("cca_members", "a token without a realm", outer(func(m cborMap) { delete(m, cca.LabelRealm) }))
	add("cca_members", "a token with a third member", outer(func(m cborMap) { m[1] = []byte{1} }))
	add("cca_members", "a collection's type in a token that is none", outer(func(m cborMap) { m[cca.LabelCMWType] = "x" }))
	add("cca_members", "records in a token that is no collection", mutation{platform: func(p *platform) { p.CMW, p.Tag = true, cca.TagToken }})
	add("cca_members", "a realm token of text", outer(func(m cborMap) { m[cca.LabelRealm] = "token" }))
	add("cca_members", "a collection with a third member", cmw(func(m cborMap) { m[1] = []any{263, []byte{1}} }))
	add("cca_cmw", "byte strings in a collection", mutation{platform: func(p *platform) { p.Tag = cca.TagCMW }})
	add("cca_cmw", "a collection's type that is no text", cmw(func(m cborMap) { m[cca.LabelCMWType] = 1 }))
	add("cca_cmw", "a record of another content format", cmw(func(m cborMap) { m[cca.LabelRealm].([]any)[0] = 264 }))
	add("cca_cmw", "a record of another media type", cmw(func(m cborMap) { m[cca.LabelRealm].([]any)[0] = "application/eat+cwts" }))
	add("cca_cmw", "a record whose type is a byte string", cmw(func(m cborMap) { m[cca.LabelRealm].([]any)[0] = []byte("x") }))
	add("cca_cmw", "a record that says it is an endorsement", cmw(func(m cborMap) { m[cca.LabelRealm] = append(m[cca.LabelRealm].([]any), 2) }))
	add("cca_cmw", "a record of four parts", cmw(func(m cborMap) { m[cca.LabelRealm] = append(m[cca.LabelRealm].([]any), 4, 4) }))
	add("cca_cmw", "a record of one part", cmw(func(m cborMap) { m[cca.LabelRealm] = m[cca.LabelRealm].([]any)[:1] }))
	add("cca_cmw", "a record without bytes", cmw(func(m cborMap) { m[cca.LabelRealm].([]any)[1] = nil }))

	// The messages.
	add("cose_malformed", "a realm token that is no message", outer(func(m cborMap) { m[cca.LabelRealm] = []byte{0x80} }))
	add("cose_tag", "a realm token under another tag", message(func(m *cosetest.Message) { m.Tag = 98 }))
	add("cose_detached", "a realm token without payload", message(func(m *cosetest.Message) { m.Edit = func(p []any) { p[2] = nil } }))
	add("cose_critical", "a critical header that nobody knows", message(func(m *cosetest.Message) { m.Protected = cborMap{1: -35, 2: []any{4}, 4: []byte("k")} }))
	add("cose_algorithm", "a realm token signed by EdDSA", message(func(m *cosetest.Message) { m.Protected = cborMap{1: -8} }))
	add("cose_algorithm", "a platform token signed by HMAC", mutation{platform: func(p *platform) { p.PlatformMessage.Protected = cborMap{1: 5} }})
	add("cose_signature_size", "a platform signature of 95 bytes", mutation{platform: func(p *platform) {
		p.PlatformMessage.Edit = func(parts []any) { parts[3] = parts[3].([]byte)[1:] }
	}})
	add("cca_algorithm", "a realm token signed by ES256", mutation{platform: func(p *platform) {
		p.RealmMessage.Algorithm, p.RealmMessage.Key = cose.ES256, cosetest.NewKey(p.TB(), elliptic.P256())
	}})
	add("cca_claims", "claims of the realm in an array", message(func(m *cosetest.Message) { m.Payload = []byte{0x80} }))
	add("cca_claims", "claims of the platform that are not CBOR", mutation{platform: func(p *platform) { p.PlatformMessage.Payload = []byte{0xff} }})
	add("cca_claims", "a claim twice", message(func(m *cosetest.Message) { m.Payload = []byte{0xa2, 10, 0, 10, 0} }))
	add("cca_claims", "claims of indefinite length", message(func(m *cosetest.Message) { m.Payload = []byte{0xbf, 10, 0, 0xff} }))

	// The claims of the realm.
	add("cca_challenge", "no challenge", noRealm(cca.ClaimChallenge))
	add("cca_challenge", "B17: a challenge of 63 bytes", realm(cca.ClaimChallenge, fill(1, 63)))
	add("cca_challenge", "B17: a challenge of 65 bytes", realm(cca.ClaimChallenge, fill(1, 65)))
	add("cca_challenge", "a challenge of two", realm(cca.ClaimChallenge, []any{fill(1, 64), fill(2, 64)}))
	add("cca_realm_profile", "a realm profile that nobody knows", realm(cca.ClaimProfile, "tag:arm.com,2023:realm#2.0.0"))
	add("cca_realm_profile", "the platform's profile in the realm token", realm(cca.ClaimProfile, cca.ProfilePlatform))
	add("cca_realm_profile", "an empty realm profile", realm(cca.ClaimProfile, ""))
	add("cca_rpv", "no personalisation value", noRealm(cca.ClaimRPV))
	add("cca_rpv", "B17: a personalisation value of 32 bytes", realm(cca.ClaimRPV, fill(1, 32)))
	add("cca_realm_hash", "no hash algorithm", noRealm(cca.ClaimHash))
	add("cca_realm_hash", "measurements of SHA-1", realm(cca.ClaimHash, "sha-1"))
	add("cca_realm_hash", "a hash algorithm by number", realm(cca.ClaimHash, -16))
	add("cca_realm_key", "no realm key", realm(cca.ClaimKey, nil))
	add("cca_realm_key", "an empty realm key", realm(cca.ClaimKey, []byte{}))
	add("cca_realm_key", "a realm key of 513 bytes", realm(cca.ClaimKey, fill(4, 513)))
	add("cca_realm_key", "a point off the curve", realm(cca.ClaimKey, append([]byte{4}, fill(1, 96)...)))
	add("cca_realm_key", "a compressed point", mutation{platform: func(p *platform) {
		p.Realm[cca.ClaimKey] = append([]byte{2}, cosetest.Point(p.TB(), p.RealmKey)[1:49]...)
	}})
	add("cca_realm_key", "a byte after the point", mutation{platform: func(p *platform) {
		p.Realm[cca.ClaimKey] = append(cosetest.Point(p.TB(), p.RealmKey), 0)
	}})
	add("cca_realm_key", "a raw point on P-256", mutation{platform: func(p *platform) {
		p.Realm[cca.ClaimKey] = cosetest.Point(p.TB(), cosetest.NewKey(p.TB(), elliptic.P256()))
	}})
	add("cca_realm_key", "a COSE_Key on P-256", mutation{platform: func(p *platform) {
		p.Realm[cca.ClaimKey] = cosetest.Marshal(p.TB(), cosetest.Key(p.TB(), cosetest.NewKey(p.TB(), elliptic.P256())))
	}})
	add("cca_realm_key", "a COSE_Key with a byte after it", mutation{platform: func(p *platform) {
		p.Realm[cca.ClaimKey] = append(cosetest.Marshal(p.TB(), cosetest.Key(p.TB(), p.RealmKey)), 0)
	}})
	add("cca_key_hash", "no hash algorithm of the key", noRealm(cca.ClaimKeyHash))
	add("cca_key_hash", "a binding of SHA-1", realm(cca.ClaimKeyHash, "sha-1"))
	add("cca_rim", "no initial measurement", noRealm(cca.ClaimRIM))
	add("cca_rim", "B17: an initial measurement of 33 bytes", realm(cca.ClaimRIM, fill(1, 33)))
	add("cca_rim", "an initial measurement of text", realm(cca.ClaimRIM, strings.Repeat("a", 32)))
	add("cca_rem", "no extensible measurements", noRealm(cca.ClaimREM))
	add("cca_rem", "three extensible measurements", realm(cca.ClaimREM, []any{fill(0, 32), fill(0, 32), fill(0, 32)}))
	add("cca_rem", "five extensible measurements", realm(cca.ClaimREM, []any{fill(0, 32), fill(0, 32), fill(0, 32), fill(0, 32), fill(0, 32)}))
	add("cca_rem", "B17: an extensible measurement of 31 bytes", realm(cca.ClaimREM, []any{fill(0, 32), fill(0, 32), fill(0, 32), fill(0, 31)}))
	add("cca_rem", "an extensible measurement longer than the initial one", realm(cca.ClaimREM, []any{fill(0, 64), fill(0, 64), fill(0, 64), fill(0, 64)}))

	// The claims of the platform.
	add("cca_platform_challenge", "B17: a platform challenge of 33 bytes", claim(cca.ClaimChallenge, fill(1, 33)))
	add("cca_platform_challenge", "an empty platform challenge", claim(cca.ClaimChallenge, []byte{}))
	add("cca_platform_profile", "no platform profile", noClaim(cca.ClaimProfile))
	add("cca_platform_profile", "PSA's profile", claim(cca.ClaimProfile, "http://arm.com/psa/2.0.0"))
	add("cca_implementation_id", "no implementation id", noClaim(cca.ClaimImplementationID))
	add("cca_implementation_id", "B17: an implementation id of 31 bytes", claim(cca.ClaimImplementationID, fill(1, 31)))
	add("cca_instance_id", "no instance id", noClaim(cca.ClaimInstanceID))
	add("cca_instance_id", "B17: an instance id of 32 bytes", claim(cca.ClaimInstanceID, fill(1, 32)))
	add("cca_instance_id", "a UEID of another type", claim(cca.ClaimInstanceID, fill(2, 33)))
	add("cca_platform_config", "no configuration", noClaim(cca.ClaimConfig))
	add("cca_platform_config", "a configuration of 1025 bytes", claim(cca.ClaimConfig, fill(1, 1025)))
	add("cca_lifecycle_value", "no lifecycle", noClaim(cca.ClaimLifecycle))
	add("cca_lifecycle_value", "a lifecycle of 17 bits that ends in secured", claim(cca.ClaimLifecycle, 0x13000))
	add("cca_lifecycle_value", "a negative lifecycle", claim(cca.ClaimLifecycle, -1))
	add("cca_platform_hash", "no hash algorithm of the platform", noClaim(cca.ClaimPlatformHash))
	add("cca_platform_hash", "a hash algorithm of the platform in capitals", claim(cca.ClaimPlatformHash, "SHA-256"))
	add("cca_service", "a verification service that is no text", claim(cca.ClaimService, []byte("x")))
	add("cca_components", "no components", noClaim(cca.ClaimComponents))
	add("cca_components", "an empty list of components", claim(cca.ClaimComponents, []any{}))
	add("cca_components", "B15: 33 components", mutation{platform: func(p *platform) {
		var list []any
		for range 33 {
			list = append(list, cborMap{})
		}
		p.Claims[cca.ClaimComponents] = list
	}})
	add("cca_component", "a component that is an array", claim(cca.ClaimComponents, []any{[]any{}}))
	add("cca_component", "a component without measurement", component(cca.ComponentMeasurement, nil))
	add("cca_component", "B17: a component's measurement of 31 bytes", component(cca.ComponentMeasurement, fill(1, 31)))
	add("cca_component", "a component's measurement of another hash", component(cca.ComponentMeasurement, fill(1, 48)))
	add("cca_component", "a component without signer", component(cca.ComponentSigner, nil))
	add("cca_component", "B17: a component's signer of 33 bytes", component(cca.ComponentSigner, fill(1, 33)))
	add("cca_component", "a component's type with an escape sequence", component(cca.ComponentType, "BL\x1b[2J"))
	add("cca_component", "a component's version that is a number", component(cca.ComponentVersion, 1))
	add("cca_component", "a component's hash that nobody knows", component(cca.ComponentHash, "md5"))
	add("cca_component", "a component's hash of another length than its measurement", component(cca.ComponentHash, "sha-512"))

	// Who vouches.
	add("cca_kind", "B19: a token as an SNP report", mutation{evidence: func(e *attest.Evidence) { e.TEE = dstack.SEVSNP }})
	add("no_roots", "no keys at all", mutation{roots: func(*platform) []attest.Roots { return nil }})
	add("no_roots", "roots without a key", mutation{roots: func(*platform) []attest.Roots { return []attest.Roots{cca.CallerRoots()} }})
	add("no_roots", "keys of another TEE", mutation{roots: func(p *platform) []attest.Roots {
		r := p.Roots()
		r[0].TEE = dstack.TPM
		return r
	}})
	add("unknown_root", "B14: another platform's key", mutation{roots: func(p *platform) []attest.Roots { return ccatest.New(p.TB()).Roots() }})
	add("unknown_root", "keys of other kinds", mutation{roots: func(p *platform) []attest.Roots {
		return []attest.Roots{cca.CallerRoots(attest.RootKey{Key: ed25519.PublicKey(make([]byte, 32))}, attest.RootKey{}, attest.RootKey{Key: &cosetest.NewKey(p.TB(), elliptic.P256()).PublicKey})}
	}})
	add("unknown_root", "the realm's key in place of the platform's", mutation{platform: func(p *platform) { p.PlatformMessage.Key = p.RealmKey }})
	add("unknown_root", "a platform signature changed in one bit", mutation{platform: func(p *platform) {
		p.PlatformMessage.Edit = func(parts []any) { parts[3].([]byte)[95] ^= 1 }
	}})
	add("cca_binding", "a platform that vouches for another realm key", claim(cca.ClaimChallenge, fill(1, 64)))
	add("cca_binding", "a platform challenge of zero", claim(cca.ClaimChallenge, fill(0, 64)))
	add("cca_binding", "a binding by another hash than the token says", mutation{platform: func(p *platform) {
		raw := cosetest.Marshal(p.TB(), cosetest.Key(p.TB(), p.RealmKey))
		sum := sha256.Sum256(raw)
		p.Claims[cca.ClaimChallenge] = sum[:]
	}})
	add("cca_binding", "a realm token of another realm", mutation{platform: func(p *platform) {
		var realm any
		other := ccatest.New(p.TB())
		other.Outer = func(m cborMap) { realm = m[cca.LabelRealm] }
		other.Quote()
		p.Outer = func(m cborMap) { m[cca.LabelRealm] = realm }
	}})
	add("cca_realm_signature", "a realm token signed by another key", mutation{platform: func(p *platform) { p.RealmMessage.Key = cosetest.NewKey(p.TB(), elliptic.P384()) }})
	add("cca_realm_signature", "a realm signature changed in one bit", message(func(m *cosetest.Message) {
		m.Edit = func(parts []any) { parts[3].([]byte)[0] ^= 1 }
	}))
	add("cca_realm_signature", "a challenge changed after signing", message(func(m *cosetest.Message) {
		m.Edit = func(parts []any) { parts[2] = bytes.Replace(parts[2].([]byte), fill(0xcc, 64), fill(0xcd, 64), 1) }
	}))
	return list
}

func (m mutation) input(t testing.TB) (*platform, attest.Input) {
	p := ccatest.New(t)
	if m.platform != nil {
		m.platform(p)
	}
	in := input(p)
	if m.quote != nil {
		in.Evidence.Quote = m.quote(in.Evidence.Quote)
	}
	if m.evidence != nil {
		m.evidence(in.Evidence)
	}
	if m.roots != nil {
		in.Roots = m.roots(p)
	}
	return p, in
}

func TestEachMutationIsRefusedForItsReason(t *testing.T) {
	codes := map[string]bool{}
	for _, m := range mutations() {
		codes[m.code] = true
		t.Run(m.name, func(t *testing.T) {
			_, in := m.input(t)
			c, err := cca.Verify(in)
			if fault.Code(err) != m.code {
				t.Errorf("got %q (%v), want %q", fault.Code(err), err, m.code)
			}
			if c != nil {
				t.Error("claims beside an error of verification")
			}
		})
	}
	t.Logf("%d mutations with %d codes", len(mutations()), len(codes))
}

func TestNoEvidenceIsAnError(t *testing.T) {
	if _, err := cca.Verify(attest.Input{}); fault.Code(err) != "evidence_missing" {
		t.Error(err)
	}
}

func TestThreat_B01_OnlyASecuredPlatformIsAcceptable(t *testing.T) {
	for _, c := range []struct {
		lifecycle      int
		debug, allowed bool // allowed: by AllowDebug
	}{
		{0x0000, false, false}, {0x00ff, false, false}, {0x1000, false, false}, {0x2000, false, false}, {0x2fff, false, false}, {0x3100, false, false},
		{0x4000, true, true}, {0x40ff, true, true}, {0x4100, false, false}, {0x5000, true, true}, {0x50ff, true, true}, {0x6000, false, false}, {0xffff, false, false},
	} {
		t.Run(fmt.Sprintf("%#04x", c.lifecycle), func(t *testing.T) {
			p := ccatest.New(t)
			p.Claims[cca.ClaimLifecycle] = c.lifecycle
			in := input(p)
			claims, err := cca.Verify(in)
			if fault.Code(err) != "cca_lifecycle" || claims == nil || claims.Debug != c.debug || claims.CCA.Lifecycle != uint16(c.lifecycle) {
				t.Errorf("%+v, %v", claims, err)
			}
			in.Options.AllowDebug = true
			if claims, err = cca.Verify(in); (err == nil) != c.allowed || claims == nil || claims.Debug != c.debug {
				t.Errorf("allowed: %+v, %v", claims, err)
			}
		})
	}
}

// A measurement of another length than its hash algorithm's cannot be what the
// algorithm made.
func TestThreat_B17_MeasurementsHaveTheLengthOfTheirHash(t *testing.T) {
	for hash, size := range map[string]int{"sha-256": 32, "sha-384": 48, "sha-512": 64} {
		for _, n := range []int{32, 48, 64} {
			p := ccatest.New(t)
			p.Realm[cca.ClaimHash], p.Realm[cca.ClaimRIM] = hash, fill(1, n)
			p.Realm[cca.ClaimREM] = []any{fill(1, n), fill(1, n), fill(1, n), fill(1, n)}
			c, err := cca.Verify(input(p))
			want := ""
			if n != size {
				want = "cca_measurement_size"
			}
			if fault.Code(err) != want || (err == nil) != (want == "") || c == nil {
				t.Errorf("%s with %d bytes: %v", hash, n, err)
			}
		}
	}
}

// The challenge is the freshness of a token: another one is another claim, and no
// option makes one of them optional.
func TestThreat_B08_TheClaimsSayForWhichChallengeTheTokenWasMade(t *testing.T) {
	p := ccatest.New(t)
	p.Realm[cca.ClaimChallenge] = fill(0x42, 64)
	in := input(p)
	in.Evidence.ReportData, in.Evidence.ReportDataClaimed = dstack.ReportData(fill(0x43, 64)), true
	c, err := cca.Verify(in)
	if err != nil || !bytes.Equal(c.ReportData, fill(0x42, 64)) {
		t.Errorf("%+v, %v", c, err)
	}
}

// Of what comes beside the token nothing reaches the claims: a log is bound by
// REM3 alone, a configuration by RPV alone.
func TestThreat_B19_WhatComesBesideATokenIsNotInTheClaims(t *testing.T) {
	p := ccatest.New(t)
	in := input(p)
	want, err := cca.Verify(in)
	if err != nil {
		t.Fatal(err)
	}
	forged := []eventlog.Event{{IMR: 3, Name: "gpu-attestation", Payload: []byte("good")}}
	in.Evidence.EventLog, in.Evidence.Unbound, in.Evidence.MRConfig, in.Evidence.Config = forged, forged, "{}", "{}"
	got, err := cca.Verify(in)
	if err != nil {
		t.Fatal(err)
	}
	a, _ := want.MarshalJSON()
	b, _ := got.MarshalJSON()
	if !bytes.Equal(a, b) || want.Root != got.Root {
		t.Errorf("claims changed: %s", b)
	}
}

// Roots stand for one trust each: the one whose key verifies is named, whatever
// others there are.
func TestTheKeyThatVerifiesIsNamed(t *testing.T) {
	p, other := ccatest.New(t), ccatest.New(t)
	in := input(p)
	in.Roots = []attest.Roots{
		other.Roots()[0],
		cca.CallerRoots(attest.RootKey{Name: "rack 1", Key: &other.PlatformKey.PublicKey}, attest.RootKey{Name: "rack 2", Key: &p.PlatformKey.PublicKey}),
	}
	c, err := cca.Verify(in)
	if err != nil || c.Trust != dstack.TrustCaller || !strings.HasPrefix(c.Root, "rack 2 (sha256 ") {
		t.Errorf("%+v, %v", c, err)
	}
}

// Whichever bit of the token changes, it is refused.
func TestNoBitOfATokenCanChange(t *testing.T) {
	p := ccatest.New(t)
	in := input(p)
	good := in.Evidence.Quote
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 8)
		in.Evidence = &attest.Evidence{TEE: dstack.CCA, Quote: bad}
		if c, err := cca.Verify(in); fault.Code(err) == "" || c != nil {
			t.Errorf("bit %d of byte %d: %+v, %v", i%8, i, c, err)
		}
	}
}

// Bombs in each place that is read before a signature is checked.
func TestThreat_B15_TokenBombsAreCheap(t *testing.T) {
	p := ccatest.New(t)
	nested := append(bytes.Repeat([]byte{0x81}, 100_000), 0)
	short := append(bytes.Repeat([]byte{0x81}, 40_000), 0)
	huge := []byte{0x5b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	with := func(change func(p *platform)) []byte {
		p := p.For(t)
		change(p)
		return p.Quote()
	}
	tag := []byte{0xd9, 1, 0x8f}
	for name, quote := range map[string][]byte{
		"1e5 nested arrays":                   nested,
		"4e4 nested arrays under the tag":     append(bytes.Clone(tag), short...),
		"1e5 nested tags":                     bytes.Repeat(tag, 20_000),
		"4e4 nested arrays for a message":     with(func(p *platform) { p.Outer = func(m cborMap) { m[cca.LabelRealm] = short } }),
		"4e4 nested arrays for claims":        with(func(p *platform) { p.RealmMessage.Payload = short }),
		"4e4 nested arrays for a realm key":   with(func(p *platform) { p.Realm[cca.ClaimKey] = short }),
		"a string of 2^63-1 bytes":            append(bytes.Clone(tag), huge...),
		"a string of 2^63-1 bytes for claims": with(func(p *platform) { p.RealmMessage.Payload = huge }),
		"a map of 2^32 claims": with(func(p *platform) {
			p.RealmMessage.Payload = append([]byte{0xba, 0xff, 0xff, 0xff, 0xff}, make([]byte, 40_000)...)
		}),
		"a realm key of 2^32 labels": with(func(p *platform) {
			p.Realm[cca.ClaimKey] = append([]byte{0xba, 0xff, 0xff, 0xff, 0xff}, make([]byte, 500)...)
		}),
		"a token of 1 MiB":                   make([]byte, 1<<20),
		"components whose members are 60 kB": with(func(p *platform) { p.Claims[cca.ClaimComponents] = []any{cborMap{1: strings.Repeat("a", 60_000)}} }),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		_, err := cca.Verify(attest.Input{Evidence: &attest.Evidence{TEE: dstack.CCA, Quote: quote}, Roots: p.Roots(), At: ccatest.At})
		took := time.Since(start)
		runtime.ReadMemStats(&after)
		if fault.Code(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 4<<20 || took > 500*time.Millisecond {
			t.Errorf("%s: %d bytes allocated in %s", name, used, took)
		}
	}
}

func TestRootKeysAreReadStrictly(t *testing.T) {
	p := ccatest.New(t)
	good := p.DevRoots()
	roots, err := cca.DevelopmentRoots(good)
	if err != nil || roots.TEE != dstack.CCA || roots.Trust != dstack.TrustDevelopment || len(roots.Keys) != 1 || !p.PlatformKey.PublicKey.Equal(roots.Keys[0].Key) {
		t.Fatalf("%+v, %v", roots, err)
	}
	if c, err := cca.Verify(attest.Input{Evidence: p.Evidence(), Roots: []attest.Roots{roots}, At: ccatest.At}); err != nil || c.Trust != dstack.TrustDevelopment {
		t.Errorf("%+v, %v", c, err)
	}
	for name, text := range map[string]string{
		"nothing": "", "no PEM": "junk", "two keys": good.CCAKeyPEM + good.CCAKeyPEM, "text after the key": good.CCAKeyPEM + "x",
		"a certificate":  "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"junk in PEM":    "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
		"an Ed25519 key": "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n",
	} {
		if _, err := cca.ParseRootKey("key", text); fault.Code(err) != "cca_root_key" {
			t.Errorf("%s: %v", name, err)
		}
		d := *good
		d.CCAKeyPEM = text
		if _, err := cca.DevelopmentRoots(&d); fault.Code(err) != "dev_roots_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	p := ccatest.New(f)
	f.Add(p.Quote())
	p.CMW, p.RawKey = true, true
	f.Add(p.Quote())
	f.Add(tfRMM(f).Evidence.Quote)
	f.Fuzz(func(t *testing.T, data []byte) {
		tok, err := cca.ParseToken(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		for _, m := range append([][]byte{tok.Realm.RIM}, tok.Realm.REM[:]...) {
			if len(m) != len(tok.Realm.RIM) || len(m) < 32 {
				t.Fatalf("a measurement of %d bytes", len(m))
			}
		}
		if tok.Realm.Key == nil || len(tok.Platform.Components) == 0 || len(tok.Realm.Challenge) != cca.ChallengeSize {
			t.Fatalf("%+v", tok)
		}
	})
}

// FuzzVerify feeds hostile claims to everything behind the signatures by signing
// them as platform and realm would.
func FuzzVerify(f *testing.F) {
	p := ccatest.New(f)
	tok, err := cca.ParseToken(p.Quote())
	if err != nil {
		f.Fatal(err)
	}
	claims := maps.Clone(p.Claims)
	claims[cca.ClaimChallenge] = tok.Platform.Challenge
	realm := maps.Clone(p.Realm)
	realm[cca.ClaimKey] = tok.Realm.RawKey
	f.Add(cosetest.Marshal(f, realm), cosetest.Marshal(f, claims))
	f.Fuzz(func(t *testing.T, realm, claims []byte) {
		p := p.For(t)
		p.RealmMessage.Payload, p.PlatformMessage.Payload = realm, claims
		c, err := cca.Verify(input(p))
		if err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
		if err == nil && c == nil {
			t.Fatal("neither claims nor an error")
		}
	})
}
