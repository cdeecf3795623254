// SPDX-License-Identifier: Apache-2.0

package cose_test

import (
	"crypto/elliptic"
	"testing"

	gocose "github.com/veraison/go-cose"

	"github.com/dstack-go/dstack/attest/cose"
	"github.com/dstack-go/dstack/attest/cose/cosetest"
)

// The witness is another implementation, not an oracle. It takes tagged and
// untagged messages by different types.
func witness(data []byte, key any, alg gocose.Algorithm) error {
	verifier, err := gocose.NewVerifier(alg, key)
	if err != nil {
		return err
	}
	if len(data) > 0 && data[0] == 0xd2 {
		var m gocose.Sign1Message
		if err := m.UnmarshalCBOR(data); err != nil {
			return err
		}
		return m.Verify(nil, verifier)
	}
	var m gocose.UntaggedSign1Message
	if err := m.UnmarshalCBOR(data); err != nil {
		return err
	}
	return m.Verify(nil, verifier)
}

func TestWitnessAcceptsWhatWeAccept(t *testing.T) {
	for _, alg := range []cose.Algorithm{cose.ES256, cose.ES384, cose.ES512} {
		for _, tag := range []uint64{0, cose.TagSign1} {
			key := cosetest.NewKey(t, curve(alg))
			data := cosetest.Message{Key: key, Algorithm: alg, Payload: []byte("payload"), Tag: tag}.Sign(t)
			if err := witness(data, &key.PublicKey, gocose.Algorithm(alg)); err != nil {
				t.Errorf("algorithm %d, tag %d: %v", alg, tag, err)
			}
		}
	}
}

func TestWitnessRefusesWhatWeRefuse(t *testing.T) {
	key := cosetest.NewKey(t, elliptic.P384())
	agree := 0
	for _, a := range attacks(t) {
		err := witness(a.sign(t, key), &key.PublicKey, gocose.AlgorithmES384)
		if (err == nil) != (a.lenient != "") {
			t.Errorf("%s: the witness says %v, expected to be lenient because %q", a.name, err, a.lenient)
		}
		if err != nil {
			agree++
		}
	}
	t.Logf("the witness refuses %d of %d too", agree, len(attacks(t)))
}

func TestWitnessReadsTheSameFields(t *testing.T) {
	for name, data := range realMessages(t) {
		ours, err := cose.Parse(data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var theirs gocose.UntaggedSign1Message
		if err := theirs.UnmarshalCBOR(data); err != nil {
			t.Fatal(err)
		}
		alg, err := theirs.Headers.Protected.Algorithm()
		if err != nil || int64(alg) != int64(ours.Algorithm) {
			t.Errorf("%s: algorithm %d, the witness says %d (%v)", name, ours.Algorithm, alg, err)
		}
		if string(ours.Payload) != string(theirs.Payload) || string(ours.Signature) != string(theirs.Signature) {
			t.Errorf("%s: payload or signature differ", name)
		}
	}
}

// BenchmarkVerify measures reading and verifying one message of the size of a
// Nitro document, beside the witness.
func BenchmarkVerify(b *testing.B) {
	key := cosetest.NewKey(b, elliptic.P384())
	data := cosetest.Message{Key: key, Algorithm: cose.ES384, Payload: make([]byte, 4400)}.Sign(b)
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m, err := cose.Parse(data)
			if err != nil {
				b.Fatal(err)
			}
			if err := m.Verify(&key.PublicKey); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-cose", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := witness(data, &key.PublicKey, gocose.AlgorithmES384); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("ours without the signature", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := cose.Parse(data); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-cose without the signature", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var m gocose.UntaggedSign1Message
			if err := m.UnmarshalCBOR(data); err != nil {
				b.Fatal(err)
			}
		}
	})
}
