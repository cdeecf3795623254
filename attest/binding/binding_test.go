// SPDX-License-Identifier: Apache-2.0

package binding

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"hash"
	"testing"

	"golang.org/x/crypto/sha3"
	"pgregory.net/rapid"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func TestReportDataMatchesTheVectors(t *testing.T) {
	var v struct {
		Cases []struct {
			Tag, Alg   string
			Content    string            `json:"content_utf8"`
			ReportData dstack.ReportData `json:"report_data"`
		} `json:"report_data"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/computed_vectors.json"), &v); err != nil {
		t.Fatal(err)
	}
	algorithms := map[string]bool{}
	for _, c := range v.Cases {
		algorithms[c.Alg] = true
		got, err := ReportDataWith(c.Alg, c.Tag, []byte(c.Content))
		if err != nil || got != c.ReportData {
			t.Errorf("%s of %s: %s (%v), want %s", c.Alg, c.Tag, got, err, c.ReportData)
		}
		if c.Alg == "sha512" && ReportData(c.Tag, []byte(c.Content)) != c.ReportData {
			t.Errorf("ReportData of %s differs", c.Tag)
		}
	}
	if len(algorithms) < 7 {
		t.Errorf("only %v are covered", algorithms)
	}
}

func TestRawAndUnknownAlgorithms(t *testing.T) {
	raw := bytes.Repeat([]byte{5}, 64)
	if got, err := ReportDataWith("raw", "ignored", raw); err != nil || !bytes.Equal(got[:], raw) {
		t.Errorf("raw: %s, %v", got, err)
	}
	for _, n := range []int{0, 63, 65} {
		if _, err := ReportDataWith("raw", "", make([]byte, n)); fault.Code(err) != "report_data_length" {
			t.Errorf("raw of %d bytes: %v", n, err)
		}
	}
	if _, err := ReportDataWith("md5", "", nil); fault.Code(err) != "report_data_algorithm" {
		t.Errorf("md5: %v", err)
	}
	if got, err := ReportDataWith("", "t", nil); err != nil || got != ReportData("t", nil) {
		t.Errorf("default: %s, %v", got, err)
	}
}

// Our Keccak agrees with the library's where the library has one, over lengths on
// both sides of each block; so its 384-bit sibling is right too.
func TestKeccakAgreesWithTheLibrary(t *testing.T) {
	for n := range 300 {
		data := bytes.Repeat([]byte{byte(n)}, n)
		for size, h := range map[int]hash.Hash{32: sha3.NewLegacyKeccak256(), 64: sha3.NewLegacyKeccak512()} {
			h.Write(data)
			if want := h.Sum(nil); !bytes.Equal(keccak(data, size), want) {
				t.Fatalf("Keccak-%d of %d bytes differs", 8*size, n)
			}
		}
	}
	// Published answer for the empty message (the Keccak team's ShortMsgKAT_384, length 0).
	want := "2c23146a63a29acf99e73b88f8c24eaa7dc60aa771780ccc006afbfa8fe2479b2dd2b21362337441ac12b515911957ff"
	if got := hex.EncodeToString(keccak384(nil)); got != want {
		t.Errorf("Keccak-384 of nothing is %s", got)
	}
	if got, err := ReportDataWith("keccak384", "app-data", []byte("x")); err != nil || !bytes.Equal(got[:48], keccak384([]byte("app-data:x"))) || got[48] != 0 {
		t.Errorf("report data %s (%v)", got, err)
	}
}

// A known answer, computed apart with Python's hashlib and struct: nonce "hi", no
// SPKI, app id of twenty times "a", no instance id.
const envelopeAnswer = "ab4c3cae69f939fc547ebc758ba35676ca70b4fa3565e450652faa14da163edda9d75b6c33fcce4517f44608fb8be144ccdc7f659aad69ee82c7fb712d15b708"

func TestEnvelopeHasItsKnownAnswer(t *testing.T) {
	app := dstack.AppID(bytes.Repeat([]byte{'a'}, 20))
	if got := Envelope([]byte("hi"), nil, app, nil).String(); got != envelopeAnswer {
		t.Errorf("got %s", got)
	}
}

// B16: no two tuples share an envelope, wherever the boundaries lie.
func TestThreat_B16_EnvelopesDoNotCollide(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		part := rapid.SliceOfN(rapid.ByteRange(0, 2), 0, 6)
		type tuple struct {
			nonce, spki, instance []byte
			app                   dstack.AppID
		}
		draw := func(name string) tuple {
			return tuple{part.Draw(r, name+" nonce"), part.Draw(r, name+" spki"), part.Draw(r, name+" instance"), dstack.AppID{rapid.ByteRange(0, 1).Draw(r, name+" app")}}
		}
		a, b := draw("a"), draw("b")
		same := bytes.Equal(a.nonce, b.nonce) && bytes.Equal(a.spki, b.spki) && bytes.Equal(a.instance, b.instance) && a.app == b.app
		if got := Envelope(a.nonce, a.spki, a.app, a.instance) == Envelope(b.nonce, b.spki, b.app, b.instance); got != same {
			r.Fatalf("%v and %v: equal envelopes %v", a, b, got)
		}
	})
}

// B20: a tag that an application may choose never yields a system envelope.
func TestThreat_B20_TagsDoNotReachTheEnvelope(t *testing.T) {
	app := dstack.AppID{1}
	envelope := Envelope([]byte("n"), nil, app, nil)
	for _, tag := range []string{"", EnvelopeTag, "\x00\x00\x00\x12" + EnvelopeTag} {
		if ReportData(tag, []byte("n")) == envelope {
			t.Errorf("tag %q gives the envelope", tag)
		}
	}
}
