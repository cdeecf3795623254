// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
)

func TestAServerKnownByItsIssuer(t *testing.T) {
	newKey := func() (*ecdsa.PrivateKey, []byte) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		return key, spki
	}
	root, rootSPKI := newKey()
	_, otherSPKI := newKey()
	key, _ := newKey()
	leaf := func(usage string, change func(*x509.Certificate)) tls.Certificate {
		ext, err := ratls.Extensions(ratls.Issued{Usage: usage}, nil)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			DNSNames: []string{"kms.test"}, ExtraExtensions: ext,
		}
		if change != nil {
			change(c)
		}
		der, err := x509.CreateCertificate(rand.Reader, c, &x509.Certificate{}, key.Public(), root)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	refuse := func(*x509.Certificate) error { return fault.New("check_says_no", "no") }
	for _, c := range []struct {
		name, code string
		server     tls.Certificate
		client     Issued
		host       string
	}{
		{"the pinned issuer", "", leaf(ratls.UsageKMS, nil), Issued{Issuer: rootSPKI}, "kms.test"},
		{"first contact", "", leaf(ratls.UsageKMS, nil), Issued{FirstContact: true}, "kms.test"},
		{"another issuer", "channel_issuer", leaf(ratls.UsageKMS, nil), Issued{Issuer: otherSPKI}, "kms.test"},
		{"an app's certificate", "channel_usage", leaf(ratls.UsageApp, nil), Issued{Issuer: rootSPKI}, "kms.test"},
		{"no usage", "channel_usage", leaf("", nil), Issued{FirstContact: true}, "kms.test"},
		{"an authority", "channel_usage", leaf(ratls.UsageKMS, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), Issued{Issuer: rootSPKI}, "kms.test"},
		{"of a client", "channel_usage", leaf(ratls.UsageKMS, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), Issued{Issuer: rootSPKI}, "kms.test"},
		{"over", "channel_certificate_time", leaf(ratls.UsageKMS, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), Issued{Issuer: rootSPKI}, "kms.test"},
		{"another name", "channel_certificate_name", leaf(ratls.UsageKMS, nil), Issued{Issuer: rootSPKI}, "other.test"},
		{"a check that refuses", "check_says_no", leaf(ratls.UsageKMS, nil), Issued{Issuer: rootSPKI, Check: refuse}, "kms.test"},
	} {
		c.client.Usage = ratls.UsageKMS
		cfg, err := c.client.Config(c.host)
		if err != nil {
			t.Fatal(c.name, err)
		}
		a, b := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = tls.Server(b, &tls.Config{Certificates: []tls.Certificate{c.server}}).Handshake()
			b.Close()
		}()
		err = tls.Client(a, cfg).Handshake()
		a.Close()
		<-done
		if (err == nil) != (c.code == "") || fault.Code(err) != c.code {
			t.Errorf("%s: %v, want code %q", c.name, err, c.code)
		}
	}

	for name, bad := range map[string]Issued{
		"nothing":                  {},
		"no usage":                 {FirstContact: true},
		"neither":                  {Usage: "x"},
		"both":                     {Usage: "x", Issuer: rootSPKI, FirstContact: true},
		"an issuer without a key":  {Usage: "x", Issuer: []byte{}},
		"an issuer that is no key": {Usage: "x", Issuer: []byte("key")},
	} {
		if _, err := bad.Config("kms.test"); fault.Code(err) != "channel_config" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (Issued{Usage: "x", FirstContact: true}).Config(""); fault.Code(err) != "channel_config" {
		t.Errorf("no host: %v", err)
	}
}
