// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	"github.com/dstack-go/dstack/attest/ratls"
)

// certificate makes an RA-TLS certificate that carries the guest's evidence, as a
// self-signed server would have it, changed by edit before it is signed.
func (g *guest) certificate(edit func(*x509.Certificate), issuer *ecdsa.PrivateKey) *x509.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	g.check(err)
	if issuer == nil {
		issuer = key
	}
	g.spki, err = x509.MarshalPKIXPublicKey(key.Public())
	g.check(err)
	certified(g, &request{})
	extensions, err := ratls.Extensions(ratls.Issued{}, g.evidence().Container)
	g.check(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ra-tls"}, DNSNames: []string{"app.test"},
		NotBefore: testTime.Add(-time.Hour), NotAfter: testTime.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, ExtraExtensions: extensions,
	}
	parent := *template
	if edit != nil {
		edit(template)
	}
	if issuer == key {
		parent = *template
	} else {
		parent.Subject.CommonName = "somebody else"
	}
	der, err := x509.CreateCertificate(rand.Reader, template, &parent, key.Public(), issuer)
	g.check(err)
	cert, err := x509.ParseCertificate(der)
	g.check(err)
	return cert
}

func TestRATLSCertificates(t *testing.T) {
	foreign, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, code string // empty: accepted
		edit       func(*x509.Certificate)
		issuer     *ecdsa.PrivateKey
	}{
		{"a good certificate", "", nil, nil},
		{"one that another authority issued", "", nil, foreign},
		{"one that has ended", "ratls_expired", func(c *x509.Certificate) { c.NotAfter = testTime.Add(-time.Second) }, nil},
		{"one that is not valid yet", "ratls_not_yet_valid", func(c *x509.Certificate) { c.NotBefore = testTime.Add(time.Second) }, nil},
		{"one that may not sign", "ratls_key_usage", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, nil},
		{"one for other ends", "ratls_ext_key_usage", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} }, nil},
		{"one without a name", "ratls_no_name", func(c *x509.Certificate) { c.DNSNames = nil }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuest(t)
			src, err := FromCertificate(g.certificate(c.edit, c.issuer))
			g.check(err)
			r := g.request()
			r.fresh = Freshness{}
			v := r.appraise(*src)
			if v.Accepted != (c.code == "") || c.code != "" && !v.Has(Error, c.code) || c.issuer != nil && !v.Has(Info, "ratls_issued") {
				t.Error(show(v))
			}
		})
	}
}
