// SPDX-License-Identifier: Apache-2.0

package privateca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

func TestTheAuthority(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	clock := func() time.Time { return now }
	ca, err := Open(dir, []hostname.Name{"apps.example"}, clock)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, KeyFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	text, err := os.ReadFile(filepath.Join(dir, CertFile))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		t.Fatal("no certificate")
	}
	own, err := ca.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"apps.example", "x-8080.apps.example"} {
		if _, err := own.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: now}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	again, err := Open(dir, []hostname.Name{"apps.example"}, clock)
	if err != nil || !again.is.Load().cert.Equal(ca.is.Load().cert) {
		t.Fatalf("opened again: %v", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	chain, notAfter, renew, err := again.Sign(t.Context(), csr, []hostname.Name{"a.apps.example"})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(chain)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "a.apps.example", CurrentTime: now}); err != nil || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error(err)
	}
	if !renew.After(now) || !renew.Before(notAfter) {
		t.Errorf("renewal at %s of %s", renew, notAfter)
	}
	now = now.Add(6 * 24 * time.Hour)
	if later, err := ca.GetCertificate(nil); err != nil || later.Leaf.Equal(own.Leaf) {
		t.Errorf("not renewed: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	ca, err := Open(dir, []hostname.Name{"apps.example"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []hostname.Name{"bank.example", "a.b.apps.example", "apps.example.evil.example"} {
		if _, _, _, err := ca.Sign(t.Context(), &x509.CertificateRequest{}, []hostname.Name{name}); fault.Code(err) != "private_ca_domains" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open(dir, []hostname.Name{"other.example"}, nil); fault.Code(err) != "private_ca_domains" {
		t.Error(err)
	}
	if _, err := Open(t.TempDir(), nil, nil); fault.Code(err) != "private_ca_domains" {
		t.Error(err)
	}
	// Its certificate is good for nothing else, whoever has the key.
	leaf, err := ca.issue(ca.is.Load().key.Public(), []string{"bank.example"})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.is.Load().cert)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "bank.example"}); err == nil {
		t.Error("the CA's word counts for another domain")
	}
	if err := os.WriteFile(filepath.Join(dir, CertFile), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, []hostname.Name{"apps.example"}, nil); fault.Code(err) != "private_ca" {
		t.Error(err)
	}
}

func TestDomainsChangeWithinTheCAsOwn(t *testing.T) {
	ca, err := Open(t.TempDir(), []hostname.Name{"apps.example"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	covers := func(names ...string) {
		t.Helper()
		cert, err := ca.GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if err := cert.Leaf.VerifyHostname(n); err != nil {
				t.Error(err)
			}
		}
	}
	covers("x.apps.example")
	if err := ca.SetDomains([]hostname.Name{"apps.example", "eu.apps.example"}); err != nil {
		t.Fatal(err)
	}
	covers("x.apps.example", "x.eu.apps.example")
	for _, d := range []hostname.Name{"other.example", "example", "myapps.example"} {
		if err := ca.SetDomains([]hostname.Name{"apps.example", d}); fault.Code(err) != "private_ca_domains" {
			t.Errorf("%s: %v", d, err)
		}
	}
	covers("x.eu.apps.example")
}

func TestAnotherGatewaysAuthorityIsAdoptedForGood(t *testing.T) {
	open := func(dir string) *CA {
		ca, err := Open(dir, []hostname.Name{"apps.example"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return ca
	}
	dir := t.TempDir()
	one, two, other := open(t.TempDir()), open(dir), open(t.TempDir())
	cert, key, err := one.Export()
	if err != nil {
		t.Fatal(err)
	}
	otherCert, otherKey, err := other.Export()
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := Open(t.TempDir(), []hostname.Name{"other.example"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	foreignCert, foreignKey, err := foreign.Export()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := one.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]struct {
		cert, key []byte
		code      string
	}{
		"another key":   {cert, otherKey, "private_ca"},
		"a leaf":        {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Certificate[0]}), key, "private_ca"},
		"no key":        {cert, nil, "private_ca"},
		"no text":       {nil, key, "private_ca"},
		"other domains": {foreignCert, foreignKey, "private_ca_domains"},
	} {
		if err := two.Adopt(bad.cert, bad.key); fault.Code(err) != bad.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	before, err := two.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := two.Adopt(cert, key); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(cert)
	for i, ca := range []*CA{two, open(dir)} {
		c, err := ca.GetCertificate(nil)
		if err != nil || c == before {
			t.Fatalf("%d: %v", i, err)
		}
		if _, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "a.apps.example"}); err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	if err := two.Adopt(otherCert, otherKey); err != nil {
		t.Error(err)
	}
}
