// SPDX-License-Identifier: Apache-2.0

package cca_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/veraison/ccatoken"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/cca"
	"github.com/dstack-go/dstack/attest/cca/ccatest"
)

// The witness is another implementation, not an oracle: it knows the older outer
// form only, and judges no lifecycle.
func witness(in attest.Input) (e *ccatoken.Evidence, err error) {
	defer func() {
		if r := recover(); r != nil { // counts as refusal
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	if e, err = ccatoken.DecodeAndValidateEvidenceFromCBOR(in.Evidence.Quote); err != nil {
		return nil, err
	}
	err = errors.New("no key")
	for _, r := range in.Roots {
		for _, k := range r.Keys {
			if err = e.Verify(k.Key); err == nil {
				return e, nil
			}
		}
	}
	return nil, err
}

func TestWitnessAcceptsAndReadsWhatWeDo(t *testing.T) {
	p := ccatest.New(t)
	older := ccatest.New(t)
	older.RawKey = true
	delete(older.Realm, cca.ClaimProfile)
	older.Claims[cca.ClaimProfile] = cca.ProfilePlatformLegacy
	for name, in := range map[string]attest.Input{"TF-RMM": tfRMM(t), "veraison": veraison(t), "synthetic": input(p), "synthetic, older": input(older)} {
		t.Run(name, func(t *testing.T) {
			ours, _ := cca.Verify(in)
			if ours == nil {
				t.Fatal("we refuse it")
			}
			theirs, err := witness(in)
			if err != nil {
				t.Fatalf("the witness refuses: %v", err)
			}
			get := func(b []byte, err error) []byte {
				t.Helper()
				if err != nil {
					t.Error(err)
				}
				return b
			}
			r, pl := theirs.RealmClaims, theirs.PlatformClaims
			rem, err := r.GetExtensibleMeasurements()
			if err != nil {
				t.Fatal(err)
			}
			for field, pair := range map[string][2][]byte{
				"challenge": {ours.ReportData, get(r.GetChallenge())}, "rpv": {ours.CCA.RPV[:], get(r.GetPersonalizationValue())},
				"rim": {ours.CCA.RIM, get(r.GetInitialMeasurement())}, "rem0": {ours.CCA.REM[0], rem[0]}, "rem3": {ours.CCA.REM[3], rem[3]},
				"realm key": {ours.CCA.RealmKey, get(r.GetPubKey())}, "platform challenge": {ours.CCA.Challenge, get(pl.GetNonce())},
				"instance id": {ours.CCA.InstanceID, get(pl.GetInstID())}, "implementation id": {ours.CCA.ImplementationID[:], get(pl.GetImplID())},
				"config": {ours.CCA.PlatformConfig, get(pl.GetConfig())},
			} {
				if !bytes.Equal(pair[0], pair[1]) {
					t.Errorf("%s: ours %x, theirs %x", field, pair[0], pair[1])
				}
			}
			hash, err := r.GetHashAlgID()
			if err != nil || hash != ours.CCA.HashAlgorithm {
				t.Errorf("hash %s (%v), ours %s", hash, err, ours.CCA.HashAlgorithm)
			}
			lifecycle, err := pl.GetSecurityLifeCycle()
			if err != nil || lifecycle != ours.CCA.Lifecycle {
				t.Errorf("lifecycle %#x (%v), ours %#x", lifecycle, err, ours.CCA.Lifecycle)
			}
			list, err := pl.GetSoftwareComponents()
			if err != nil || len(list) != len(ours.CCA.Components) {
				t.Fatalf("%d components (%v), ours %d", len(list), err, len(ours.CCA.Components))
			}
			for i, c := range list {
				if !bytes.Equal(get(c.GetMeasurementValue()), ours.CCA.Components[i].Measurement) || !bytes.Equal(get(c.GetSignerID()), ours.CCA.Components[i].SignerID) {
					t.Errorf("component %d", i)
				}
			}
		})
	}
}

// lenient are the mutations that the witness accepts, by what it does not look at.
var lenient = map[string][]string{
	"members beside the two tokens":   {"a token with a third member", "a collection's type in a token that is none"},
	"critical headers":                {"a critical header that nobody knows"},
	"which hash algorithms there are": {"measurements of SHA-1", "a component's hash that nobody knows"},
	"how many extensible measurements there are, and that all have one length": {"three extensible measurements", "five extensible measurements",
		"an extensible measurement longer than the initial one"},
	"the length of a measurement beside the name of its hash": {"a component's measurement of another hash", "a component's hash of another length than its measurement"},
	"sizes and characters":         {"a configuration of 1025 bytes", "a component's type with an escape sequence"},
	"what the evidence says it is": {"B19: a token as an SNP report"},
}

func TestWitnessRefusesWhatWeRefuse(t *testing.T) {
	accepts := map[string]bool{}
	for _, names := range lenient {
		for _, name := range names {
			accepts[name] = true
		}
	}
	agree, count := 0, 0
	for _, m := range mutations() {
		p, in := m.input(t)
		if p.CMW || m.roots != nil {
			continue // the witness knows no collections, and takes one key
		}
		count++
		_, err := witness(in)
		if (err == nil) != accepts[m.name] {
			t.Errorf("%s: the witness says %v; we say %s", m.name, err, m.code)
		}
		if err != nil {
			agree++
		}
		delete(accepts, m.name)
	}
	for name := range accepts {
		t.Errorf("%q is no mutation", name)
	}
	t.Logf("the witness refuses %d of %d too", agree, count)
}

// BenchmarkVerify measures one token with its two signatures, beside the witness.
func BenchmarkVerify(b *testing.B) {
	in := tfRMM(b)
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := cca.Verify(in); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("ccatoken", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := witness(in); err != nil {
				b.Fatal(err)
			}
		}
	})
}
