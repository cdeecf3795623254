// SPDX-License-Identifier: Apache-2.0

package nitro_test

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"testing"

	"github.com/hf/nitrite"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/nitro/nitrotest"
	"github.com/dstack-go/dstack/collateral"
)

func bundleOf(crl []byte) *collateral.Bundle {
	return &collateral.Bundle{CRLs: []collateral.Hex{crl}}
}

// The witness is another implementation, not an oracle: it knows enclaves only, no
// revocation, no critical headers, and no time but the certificates'.
func witness(in attest.Input) (result *nitrite.Result, err error) {
	defer func() {
		if r := recover(); r != nil { // counts as refusal
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	pool := x509.NewCertPool()
	for _, r := range in.Roots {
		if r.TEE == in.Evidence.TEE {
			for _, ca := range r.CA {
				pool.AddCert(ca)
			}
		}
	}
	return nitrite.Verify(in.Evidence.Quote, nitrite.VerifyOptions{Roots: pool, CurrentTime: in.At})
}

func TestWitnessAcceptsAndReadsWhatWeDo(t *testing.T) {
	inputs := map[string]attest.Input{}
	for _, name := range vectors {
		in := vector(t, name)
		in.Options.AllowDebug = true
		inputs[name] = in
	}
	m := nitrotest.New(t)
	inputs["synthetic"] = attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}
	for name, in := range inputs {
		ours, err := nitro.Verify(in)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		theirs, err := witness(in)
		if err != nil {
			t.Errorf("%s: the witness refuses: %v", name, err)
			continue
		}
		d := theirs.Document
		if d.ModuleID != ours.Nitro.ModuleID || int64(d.Timestamp) != ours.Made.UnixMilli() || len(d.PCRs) != len(ours.Nitro.PCRs) ||
			!bytes.Equal(d.UserData, ours.Nitro.UserData) || !bytes.Equal(d.Nonce, ours.Nitro.Nonce) || !bytes.Equal(d.PublicKey, ours.Nitro.PublicKey) {
			t.Errorf("%s: the witness reads %+v", name, d)
		}
		for index, v := range d.PCRs {
			if !bytes.Equal(v, ours.Nitro.PCRs[uint32(index)]) {
				t.Errorf("%s: register %d", name, index)
			}
		}
	}
}

// lenient are the mutations that the witness accepts, by what it does not look at.
var lenient = map[string][]string{
	"tags":             {"a document under another tag"},
	"critical headers": {"a critical header that nobody knows"},
	"the shape of the module id": {"a module id with a line feed", "a module id of 129 bytes", "an enclave's module id without an enclave",
		"an enclave's module id without an instance", "an enclave's module id that ends early"},
	"the document's time":                                         {"a document made more than 300 s ahead", "a timestamp after the year 9999", "a timestamp beyond 63 bits"},
	"types, where the library converts":                           {"user data that are numbers"},
	"registers of other hashes":                                   {"B17: a register of 32 bytes"},
	"which registers there are":                                   {"no register 0", "no register 1", "no register 2"},
	"limits below 1024 bytes":                                     {"user data of 513 bytes", "a nonce of 513 bytes"},
	"the length of the chain":                                     {"B15: a cabundle of nine"},
	"the order of the chain, which it searches for a path":        {"a cabundle out of order"},
	"the kind of the module":                                      {"B19: an enclave's document as a NitroTPM's", "B19: a document with the registers of both"},
	"usages":                                                      {"a leaf for servers only", "a leaf for a use that nobody knows", "a leaf that may not sign", "an authority for servers only", "a leaf that is an authority"},
	"critical name constraints, which bind no leaf without names": {"an authority with critical name constraints"},
	"revocation": {"B02: the instance authority is revoked", "B02: the region authority is revoked by the root", "B02: the leaf is revoked",
		"B02: a revocation list that has ended", "B02: a revocation list of the future", "B02: a revocation list by another authority of the same name",
		"B02: a revocation list with a critical extension", "a revocation list that is not DER", "B15: 33 revocation lists"},
}

func TestWitnessRefusesWhatWeRefuse(t *testing.T) {
	accepts := map[string]bool{}
	for _, names := range lenient {
		for _, name := range names {
			accepts[name] = true
		}
	}
	agree, count := 0, 0
	for _, mu := range mutations() {
		if mu.tpm || mu.code == "no_roots" {
			continue // the witness knows no NitroTPM, and takes no roots for AWS's
		}
		count++
		_, in := mu.input(t)
		_, err := witness(in)
		if (err == nil) != accepts[mu.name] {
			t.Errorf("%s: the witness says %v; we say %s", mu.name, err, mu.code)
		}
		if err != nil {
			agree++
		}
		delete(accepts, mu.name)
	}
	for name := range accepts {
		t.Errorf("%q is no mutation", name)
	}
	t.Logf("the witness refuses %d of %d too", agree, count)
}

// BenchmarkVerify measures one document with its chain of five, beside the witness.
func BenchmarkVerify(b *testing.B) {
	in := vector(b, "nsm_attestation.bin")
	if in.Evidence.TEE != dstack.Nitro {
		b.Fatal(in.Evidence.TEE)
	}
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := nitro.Verify(in); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("nitrite", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := witness(in); err != nil {
				b.Fatal(err)
			}
		}
	})
}
