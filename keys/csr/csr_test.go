// SPDX-License-Identifier: Apache-2.0

package csr

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// vector is a case of either file of vectors, whose names differ.
type vector struct {
	Pubkey    string `json:"pubkey"`
	PubkeyHex string `json:"pubkey_hex"`
	Scale     string `json:"scale"`
	ScaleHex  string `json:"scale_hex"`
	Config    config `json:"config"`
	config
}

type config struct {
	Subject  string   `json:"subject"`
	Names    []string `json:"subject_alt_names"`
	Server   bool     `json:"usage_server_auth"`
	Client   bool     `json:"usage_client_auth"`
	ExtQuote bool     `json:"ext_quote"`
	AppInfo  bool     `json:"ext_app_info"`
	Before   *uint64  `json:"not_before"`
	After    *uint64  `json:"not_after"`
}

func TestUpstreamsRequests(t *testing.T) {
	n := 0
	for _, file := range []string{"kms/csr-v2-scale.json", "guest-agent/csr-v2.json"} {
		var in struct{ Vectors, Cases []vector }
		if err := json.Unmarshal(testkit.Vectors(t, file), &in); err != nil {
			t.Fatal(err)
		}
		for _, v := range append(in.Vectors, in.Cases...) {
			n++
			c := v.Config
			if v.ScaleHex != "" {
				c = v.config
			}
			want, err := hex.DecodeString(v.Scale + v.ScaleHex)
			if err != nil {
				t.Fatal(err)
			}
			r, err := Decode(2, want)
			if err != nil {
				t.Fatal(err)
			}
			if hex.EncodeToString(r.SPKI) != v.Pubkey+v.PubkeyHex || r.Subject != c.Subject || r.ServerAuth != c.Server ||
				r.ClientAuth != c.Client || r.WithEvidence != c.ExtQuote || r.WithAppInfo != c.AppInfo || len(r.Names) != len(c.Names) ||
				(r.NotBefore == nil) != (c.Before == nil) || (r.NotAfter == nil) != (c.After == nil) {
				t.Errorf("%s: decoded %+v", file, r)
			}
			if got := r.Encode(); !bytes.Equal(got, want) {
				t.Errorf("%s:\n%x\n%x", file, got, want)
			}
		}
	}
	if n < 4 {
		t.Errorf("%d vectors only", n)
	}
}

func full() *Request {
	before, after := uint64(1), uint64(1<<40)
	return &Request{Version: 2, Config: Config{
		Organization: "o", Subject: "s", Names: []string{"a.example", "127.0.0.1"}, ServerAuth: true, WithEvidence: true, WithAppInfo: true,
		NotBefore: &before, NotAfter: &after,
	}, Evidence: bytes.Repeat([]byte{0xab}, 1<<15)}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestASignedRequestOpens(t *testing.T) {
	for _, r := range []*Request{full(), {Version: 1, Config: Config{Subject: "s"}, Quote: []byte{1}, EventLog: bytes.Repeat([]byte("x"), 20000)}} {
		request, signature, err := r.Sign(newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		got, err := Open(r.Version, request, signature)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(r, got); d != "" {
			t.Error(d)
		}
	}
}

func TestRequestsThatAreRefused(t *testing.T) {
	key := newKey(t)
	request, signature, err := full().Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := full().Sign(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	change := func(at int, to byte) []byte {
		b := bytes.Clone(request)
		b[at] = to
		return b
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	spki, _ := x509.MarshalPKIXPublicKey(rsaKey.Public())
	foreign := full()
	foreign.SPKI = spki
	orgFlag := bytes.IndexByte(request[18+2+91:], 1) + 18 + 2 + 91
	for name, c := range map[string]struct {
		version            int
		request, signature []byte
		code               string
	}{
		"another version":                {3, request, signature, "csr_malformed"},
		"empty":                          {2, nil, signature, "csr_malformed"},
		"too large":                      {2, make([]byte, MaxSize+1), signature, "csr_malformed"},
		"another confirm word":           {2, change(3, 'X'), signature, "csr_malformed"},
		"a flag of 2":                    {2, change(orgFlag, 2), signature, "csr_malformed"},
		"cut short":                      {2, request[:40], signature, "csr_malformed"},
		"a length in a longer form":      {2, append([]byte{0x45, 0x00}, request[1:]...), signature, "csr_malformed"},
		"a length of 2^30":               {2, append([]byte{3}, request[1:]...), signature, "csr_malformed"},
		"version 2 read as 1":            {1, request, signature, "csr_malformed"},
		"an RSA key":                     {2, foreign.Encode(), signature, "csr_key"},
		"no key":                         {2, (&Request{Version: 2}).Encode(), signature, "csr_key"},
		"another's signature":            {2, request, other, "csr_signature"},
		"no signature":                   {2, request, nil, "csr_signature"},
		"a changed request":              {2, change(len(request)-1, 0), signature, "csr_signature"},
		"a subject changed after":        {2, bytes.Replace(request, []byte("a.example"), []byte("b.example"), 1), signature, "csr_signature"},
		"an empty organization, present": {2, bytes.Replace(request, []byte{1, 4, 'o'}, []byte{1, 0}, 1), signature, "csr_malformed"},
	} {
		if _, err := Open(c.version, c.request, c.signature); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(2, full().Encode())
	f.Add(1, (&Request{Version: 1, Quote: []byte{1}, EventLog: []byte("[]")}).Encode())
	f.Fuzz(func(t *testing.T, version int, data []byte) {
		r, err := Decode(version, data)
		if err != nil {
			return
		}
		if got := r.Encode(); !bytes.Equal(got, data) {
			t.Fatalf("%x decodes and encodes to %x", data, got)
		}
	})
}
