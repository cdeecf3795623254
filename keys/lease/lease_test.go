// SPDX-License-Identifier: Apache-2.0

package lease

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"reflect"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

var begin = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func document() *Document {
	return &Document{
		AppID: dstack.AppID{1}, InstanceID: bytes.Repeat([]byte{2}, 20), ComposeHash: dstack.ComposeHash{3}, OSImageHash: bytes.Repeat([]byte{4}, 32),
		NotBefore: begin, NotAfter: begin.Add(time.Hour), Log: "dstack-kms/aa/bb", Index: 7,
	}
}

func signed(t testing.TB, text []byte) (signature, root []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(append([]byte("dstack-lease-v1\n"), text...))
	if signature, err = ecdsa.SignASN1(rand.Reader, key, sum[:]); err != nil {
		t.Fatal(err)
	}
	if root, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		t.Fatal(err)
	}
	return signature, root
}

func TestALeaseComesBack(t *testing.T) {
	text, err := document().Encode()
	if err != nil {
		t.Fatal(err)
	}
	signature, root := signed(t, text)
	got, err := Verify(text, signature, root, begin.Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, document()) {
		t.Errorf("got %+v", got)
	}
}

func TestLeasesThatDoNotHold(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*Document)
		at   time.Duration
		code string
	}{
		{"ended", nil, time.Hour, "lease_ended"},
		{"not begun", nil, -6 * time.Minute, "lease_not_yet"},
		{"longer than any", func(d *Document) { d.NotAfter = begin.Add(25 * time.Hour) }, 0, "lease_malformed"},
		{"over before it begins", func(d *Document) { d.NotAfter = begin }, 0, "lease_malformed"},
		{"of an instance id of another length", func(d *Document) { d.InstanceID = d.InstanceID[:19] }, 0, "lease_malformed"},
		{"of an image hash of another length", func(d *Document) { d.OSImageHash = d.OSImageHash[:31] }, 0, "lease_malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := document()
			if c.edit != nil {
				c.edit(d)
			}
			text, err := d.Encode()
			if err != nil {
				t.Fatal(err)
			}
			signature, root := signed(t, text)
			if got, err := Verify(text, signature, root, begin.Add(c.at)); got != nil || fault.Code(err) != c.code {
				t.Errorf("want %s, got %v", c.code, err)
			}
		})
	}
	text, _ := document().Encode()
	signature, root := signed(t, text)
	_, other := signed(t, text)
	if _, err := Verify(text, signature, other, begin); fault.Code(err) != "lease_signature" {
		t.Errorf("signed by another: %v", err)
	}
	for i := range text {
		changed := bytes.Clone(text)
		changed[i] ^= 1
		if _, err := Verify(changed, signature, root, begin); fault.Code(err) != "lease_signature" {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	if _, err := Verify(text, signature, []byte("no key"), begin); fault.Code(err) != "lease_signature" {
		t.Errorf("no key: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	text, _ := document().Encode()
	f.Add(text)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := Parse(text)
		if err != nil {
			return
		}
		again, err := d.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(again); err != nil {
			t.Fatalf("%s: %v", again, err)
		}
	})
}
