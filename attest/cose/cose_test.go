// SPDX-License-Identifier: Apache-2.0

package cose_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"encoding/hex"
	"maps"
	"runtime"
	"testing"
	"time"

	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/cose"
	"github.com/dstack-go/dstack/attest/cose/cosetest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

type cborMap = cosetest.Map

func curve(alg cose.Algorithm) elliptic.Curve {
	return map[cose.Algorithm]elliptic.Curve{cose.ES256: elliptic.P256(), cose.ES384: elliptic.P384(), cose.ES512: elliptic.P521()}[alg]
}

func TestAGoodMessageVerifies(t *testing.T) {
	for _, alg := range []cose.Algorithm{cose.ES256, cose.ES384, cose.ES512} {
		for _, size := range []int{1, 23, 24, 255, 256, 65535, 65536} {
			for _, tag := range []uint64{0, cose.TagSign1} {
				key := cosetest.NewKey(t, curve(alg))
				payload := bytes.Repeat([]byte{0xa5}, size)
				m, err := cose.Parse(cosetest.Message{Key: key, Algorithm: alg, Payload: payload, Tag: tag}.Sign(t))
				if err != nil {
					t.Fatalf("algorithm %d, %d bytes: %v", alg, size, err)
				}
				if err := m.Verify(&key.PublicKey); err != nil {
					t.Errorf("algorithm %d, %d bytes: %v", alg, size, err)
				}
				if m.Algorithm != alg || !bytes.Equal(m.Payload, payload) {
					t.Errorf("algorithm %d, payload of %d bytes", m.Algorithm, len(m.Payload))
				}
			}
		}
	}
}

// attack is one change to a good ES384 message and the reason of its refusal; the
// library says whether another implementation refuses it too.
type attack struct {
	name, code string
	message    func(m *cosetest.Message)
	parts      func(parts []any)
	raw        func(data []byte) []byte
	lenient    string // why the library accepts it
}

func attacks(t testing.TB) []attack {
	other := cosetest.NewKey(t, elliptic.P384())
	protect := func(v any) func(*cosetest.Message) { return func(m *cosetest.Message) { m.Protected = v } }
	open := func(v any) func(*cosetest.Message) { return func(m *cosetest.Message) { m.Unprotected = v } }
	part := func(i int, v any) func([]any) { return func(parts []any) { parts[i] = v } }
	return []attack{
		{name: "an empty message", code: "cose_malformed", raw: func([]byte) []byte { return nil }},
		{name: "a message cut short", code: "cose_malformed", raw: func(b []byte) []byte { return b[:len(b)-1] }},
		{name: "a byte after the message", code: "cose_malformed", raw: func(b []byte) []byte { return append(b, 0) }},
		{name: "B15: a message beyond the size limit", code: "cose_too_large", message: func(m *cosetest.Message) { m.Payload = make([]byte, cose.MaxMessage) },
			lenient: "it has no limit on size"},
		{name: "the tag of a COSE_Sign message", code: "cose_tag", message: func(m *cosetest.Message) { m.Tag = 98 }},
		{name: "two tags", code: "cose_malformed", raw: func(b []byte) []byte { return append([]byte{0xd2, 0xd2}, b...) }},
		{name: "a map in place of the message", code: "cose_malformed", raw: func([]byte) []byte { return []byte{0xa0} }},
		{name: "three parts", code: "cose_malformed", raw: func(b []byte) []byte { return append([]byte{0x83}, b[1:len(b)-98]...) }},
		{name: "five parts", code: "cose_malformed", raw: func(b []byte) []byte { return append(append([]byte{0x85}, b[1:]...), 0xa0) }},
		{name: "an array of indefinite length", code: "cose_malformed", raw: func(b []byte) []byte { return append(append([]byte{0x9f}, b[1:]...), 0xff) }},
		{name: "a protected header that is not wrapped", code: "cose_malformed", parts: part(0, cborMap{1: -35})},
		{name: "an empty protected header", code: "cose_malformed", message: protect([]byte{})},
		{name: "a protected header that is an array", code: "cose_headers", message: protect([]any{1, -35})},
		{name: "a protected header with bytes after it", code: "cose_headers", message: protect([]byte{0xa1, 1, 0x38, 0x22, 0})},
		{name: "a protected header with the algorithm twice", code: "cose_headers", message: protect([]byte{0xa2, 1, 0x38, 0x22, 1, 0x38, 0x22})},
		{name: "a protected header with a byte string for label", code: "cose_headers", message: protect([]byte{0xa2, 1, 0x38, 0x22, 0x41, 1, 0})},
		{name: "no algorithm", code: "cose_algorithm", message: protect(cborMap{4: []byte("kid")})},
		{name: "the algorithm in words", code: "cose_algorithm", message: protect(cborMap{1: "ES384"})},
		{name: "an EdDSA message", code: "cose_algorithm", message: protect(cborMap{1: -8})},
		{name: "the algorithm HMAC 256/256", code: "cose_algorithm", message: protect(cborMap{1: 5})},
		{name: "an algorithm beyond 64 bits", code: "cose_algorithm", message: protect([]byte{0xa1, 1, 0x3b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})},
		{name: "an algorithm in the unprotected header only", code: "cose_algorithm", message: func(m *cosetest.Message) {
			m.Protected, m.Unprotected = cborMap{4: []byte("kid")}, cborMap{3: 0}
		}},
		{name: "an algorithm in the unprotected header too", code: "cose_headers", message: open(cborMap{1: -35}),
			lenient: "it compares no labels of the two headers but IV"},
		{name: "critical labels in the unprotected header", code: "cose_headers", message: open(cborMap{2: []any{1}})},
		{name: "a label in both headers", code: "cose_headers", message: func(m *cosetest.Message) {
			m.Protected, m.Unprotected = cborMap{1: -35, 4: []byte("a")}, cborMap{4: []byte("b")}
		}, lenient: "it compares no labels of the two headers but IV"},
		{name: "an unprotected header that is an array", code: "cose_headers", parts: part(1, []any{})},
		{name: "an unprotected header that is null", code: "cose_headers", parts: part(1, nil)},
		{name: "an unprotected header with a label twice", code: "cose_headers", raw: func(b []byte) []byte {
			return bytes.Replace(b, []byte{0x38, 0x22, 0xa0}, []byte{0x38, 0x22, 0xa2, 4, 0x41, 1, 4, 0x41, 1}, 1)
		}},
		{name: "an unknown critical label", code: "cose_critical", message: protect(cborMap{1: -35, 2: []any{4}, 4: []byte("kid")}),
			lenient: "it leaves critical labels that are there to its caller"},
		{name: "an unknown critical label beside the algorithm", code: "cose_critical", message: protect(cborMap{1: -35, 2: []any{1, "x"}, "x": 1}),
			lenient: "it leaves critical labels that are there to its caller"},
		{name: "a critical label that is absent", code: "cose_critical", message: protect(cborMap{1: -35, 2: []any{99}})},
		{name: "no critical label in the list", code: "cose_critical", message: protect(cborMap{1: -35, 2: []any{}})},
		{name: "critical labels that are no list", code: "cose_critical", message: protect(cborMap{1: -35, 2: 1})},
		{name: "a detached payload", code: "cose_detached", parts: part(2, nil)},
		{name: "an empty payload", code: "cose_malformed", message: func(m *cosetest.Message) { m.Payload = []byte{} }, lenient: "it verifies a signature over nothing"},
		{name: "a payload of text", code: "cose_malformed", parts: part(2, "payload")},
		{name: "a payload of numbers", code: "cose_malformed", parts: part(2, []any{1, 2, 3})},
		{name: "a signature that is null", code: "cose_malformed", parts: part(3, nil)},
		{name: "an empty signature", code: "cose_malformed", parts: part(3, []byte{})},
		{name: "a signature of 95 bytes", code: "cose_signature_size", parts: func(p []any) { p[3] = p[3].([]byte)[1:] }},
		{name: "a signature of 97 bytes", code: "cose_signature_size", parts: func(p []any) { p[3] = append([]byte{0}, p[3].([]byte)...) }},
		{name: "a signature of zeros", code: "cose_signature", parts: part(3, make([]byte, 96))},
		{name: "a signature with r changed", code: "cose_signature", parts: func(p []any) { p[3].([]byte)[0] ^= 1 }},
		{name: "a signature with s changed", code: "cose_signature", parts: func(p []any) { p[3].([]byte)[95] ^= 1 }},
		{name: "another payload", code: "cose_signature", parts: part(2, []byte("payloae"))},
		{name: "another protected header", code: "cose_signature", parts: part(0, []byte{0xa2, 1, 0x38, 0x22, 4, 0x41, 1})},
		{name: "a protected header in another encoding", code: "cose_signature", parts: part(0, []byte{0xa1, 1, 0x39, 0, 0x22})},
		{name: "another's signature", code: "cose_signature", message: func(m *cosetest.Message) { m.Key = other }},
		{name: "a header that says ES256 over an ES384 signature", code: "cose_signature_size", message: protect(cborMap{1: -7})},
	}
}

// sign returns the message of one attack.
func (a attack) sign(t testing.TB, key *ecdsa.PrivateKey) []byte {
	m := cosetest.Message{Key: key, Algorithm: cose.ES384, Payload: []byte("payload"), Edit: a.parts}
	if a.message != nil {
		a.message(&m)
	}
	data := m.Sign(t)
	if a.raw != nil {
		data = a.raw(data)
	}
	return data
}

func TestEachAttackIsRefusedForItsReason(t *testing.T) {
	key := cosetest.NewKey(t, elliptic.P384())
	for _, a := range attacks(t) {
		t.Run(a.name, func(t *testing.T) {
			m, err := cose.Parse(a.sign(t, key))
			if err == nil {
				err = m.Verify(&key.PublicKey)
			}
			if fault.Code(err) != a.code {
				t.Errorf("got %q (%v), want %q", fault.Code(err), err, a.code)
			}
		})
	}
}

func TestHeadersThatAreNotCriticalAreIgnored(t *testing.T) {
	key := cosetest.NewKey(t, elliptic.P384())
	for name, m := range map[string]cosetest.Message{
		"a critical algorithm":                             {Protected: cborMap{1: -35, 2: []any{1}}},
		"a protected content type":                         {Protected: cborMap{1: -35, 3: "application/eat+cwt"}},
		"an unprotected key id":                            {Unprotected: cborMap{4: []byte("kid")}},
		"an unprotected label that is text":                {Unprotected: cborMap{"x": 1}},
		"an algorithm that takes more bytes than it needs": {Protected: []byte{0xa1, 1, 0x39, 0, 0x22}},
	} {
		m.Key, m.Algorithm, m.Payload = key, cose.ES384, []byte("payload")
		parsed, err := cose.Parse(m.Sign(t))
		if err == nil {
			err = parsed.Verify(&key.PublicKey)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOnlyAKeyOfTheAlgorithmsCurveVerifies(t *testing.T) {
	key := cosetest.NewKey(t, elliptic.P384())
	m, err := cose.Parse(cosetest.Message{Key: key, Algorithm: cose.ES384, Payload: []byte("payload")}.Sign(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]any{
		"a P-256 key": &cosetest.NewKey(t, elliptic.P256()).PublicKey, "a P-521 key": &cosetest.NewKey(t, elliptic.P521()).PublicKey,
		"an Ed25519 key": ed25519.PublicKey(make([]byte, 32)), "no key": nil, "a private key": key, "a nil key": (*ecdsa.PublicKey)(nil),
	} {
		if err := m.Verify(k); fault.Code(err) != "cose_key" {
			t.Errorf("%s: %v", name, err)
		}
	}
	m.Algorithm = cose.ES256
	if err := m.Verify(&key.PublicKey); fault.Code(err) != "cose_key" {
		t.Error(err)
	}
	m.Algorithm = 0
	if err := m.Verify(&key.PublicKey); fault.Code(err) != "cose_algorithm" {
		t.Error(err)
	}
	m.Algorithm, m.Signature = cose.ES384, m.Signature[:95]
	if err := m.Verify(&key.PublicKey); fault.Code(err) != "cose_signature_size" {
		t.Error(err)
	}
}

func TestAKeyIsReadStrictly(t *testing.T) {
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		key := cosetest.NewKey(t, c)
		got, err := cose.ParseKey(cosetest.Marshal(t, cosetest.Key(t, key)))
		if err != nil || !got.Equal(&key.PublicKey) {
			t.Errorf("%s: %v", c.Params().Name, err)
		}
	}
	key := cosetest.NewKey(t, elliptic.P384())
	good := cosetest.Key(t, key)
	with := func(label, value any) cborMap {
		m := maps.Clone(good)
		if value == nil {
			delete(m, label)
		} else {
			m[label] = value
		}
		return m
	}
	for name, m := range map[string]cborMap{
		"an algorithm of the curve": with(3, -35), "a key id": with(2, []byte("kid")), "operations with verification": with(4, []any{1, "x", 2}),
	} {
		if _, err := cose.ParseKey(cosetest.Marshal(t, m)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	x, y := good[-2].([]byte), good[-3].([]byte)
	off := bytes.Clone(y)
	off[47] ^= 1
	for name, v := range map[string]any{
		"no type": with(1, nil), "an octet key pair": with(1, 1), "a symmetric key": with(1, 4), "a type in words": with(1, "EC2"),
		"no curve": with(-1, nil), "an Ed25519 curve": with(-1, 6), "another curve's number": with(-1, 1), "a curve of zero": with(-1, 0),
		"no x": with(-2, nil), "no y": with(-3, nil), "a y that is a sign": with(-3, true),
		"B17: an x of 47 bytes": with(-2, x[1:]), "B17: an x of 49 bytes": with(-2, append([]byte{0}, x...)), "B17: a y of 47 bytes": with(-3, y[1:]),
		"B17: a byte of y at the end of x": cborMap{1: 2, -1: 2, -2: append(bytes.Clone(x), y[0]), -3: y[1:]},
		"a point off the curve":            with(-3, off), "the point at infinity": cborMap{1: 2, -1: 2, -2: make([]byte, 48), -3: make([]byte, 48)},
		"a private key": with(-4, make([]byte, 48)), "another curve's algorithm": with(3, -7), "an algorithm in words": with(3, "ES384"),
		"operations without verification": with(4, []any{1}), "no operations": with(4, []any{}), "operations that are no list": with(4, 2),
		"an array": []any{1, 2}, "nothing": []byte(nil),
	} {
		data := cosetest.Marshal(t, v)
		if name == "nothing" {
			data = nil
		}
		if _, err := cose.ParseKey(data); fault.Code(err) != "cose_key" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := cose.ParseKey(append(cosetest.Marshal(t, good), 0)); fault.Code(err) != "cose_key" {
		t.Error("a byte after the key is accepted:", err)
	}
}

// Bombs in each place that is parsed before the signature is checked.
func TestThreat_B15_COSEBombsAreCheap(t *testing.T) {
	key := cosetest.NewKey(t, elliptic.P384())
	nested := append(bytes.Repeat([]byte{0x81}, 100_000), 0)
	huge := []byte{0x5b, 0, 0, 0, 1, 0, 0, 0, 0}
	sign := func(protected []byte) []byte {
		return cosetest.Message{Key: key, Algorithm: cose.ES384, Payload: []byte("x"), Protected: protected}.Sign(t)
	}
	for name, data := range map[string][]byte{
		"1e5 nested arrays":                   nested,
		"1e5 nested arrays under the tag":     append([]byte{0xd2}, nested...),
		"1e5 nested arrays for a header":      sign(nested),
		"a string of 2^32 bytes":              huge,
		"a string of 2^32 bytes for a header": sign(huge),
		"an unprotected header of 2^32 labels": append([]byte{0x84, 0x43, 0xa1, 1, 0x26, 0xba, 0xff, 0xff, 0xff, 0xff},
			make([]byte, 100_000)...),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		_, err := cose.Parse(data)
		took := time.Since(start)
		runtime.ReadMemStats(&after)
		if fault.Code(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 4<<20 || took > 100*time.Millisecond {
			t.Errorf("%s: %d bytes allocated in %s", name, used, took)
		}
	}
}

// realMessages are the COSE messages of the vectors.
func realMessages(t testing.TB) map[string][]byte {
	out := map[string][]byte{}
	for _, name := range []string{"nsm_attestation.bin", "versioned_nitro_attestation.bin", "versioned_nitro_attestation_dbg.bin"} {
		e, err := container.Decode(testkit.Vectors(t, "attestation/nitro/"+name))
		if err != nil {
			t.Fatal(err)
		}
		out[name] = e.Quote
	}
	return out
}

func FuzzParse(f *testing.F) {
	for _, m := range realMessages(f) {
		f.Add(m)
	}
	key := cosetest.NewKey(f, elliptic.P384())
	for _, a := range attacks(f) {
		if data := a.sign(f, key); len(data) < 1000 {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := cose.Parse(data)
		if err == nil {
			err = m.Verify(&key.PublicKey)
		}
		if err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
	})
}

func FuzzParseKey(f *testing.F) {
	key := cosetest.NewKey(f, elliptic.P384())
	f.Add(cosetest.Marshal(f, cosetest.Key(f, key)))
	raw, _ := hex.DecodeString("a401022001215820")
	f.Add(raw)
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := cose.ParseKey(data)
		if (err == nil) != (key != nil) || err != nil && fault.Code(err) != "cose_key" {
			t.Fatalf("%v, %v", key, err)
		}
	})
}
