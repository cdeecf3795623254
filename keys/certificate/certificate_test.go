// SPDX-License-Identifier: Apache-2.0

package certificate

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/derive"
)

var now = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

func key(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A chain as a KMS makes it, verified by the standard library.
func TestAChainVerifies(t *testing.T) {
	root := must(Self(key(t), Subject{"Dstack", "Dstack KMS CA", 1}, ratls.Issued{}, nil, now))
	app := dstack.AppID{1, 2, 3}
	ca := must(root.Authority(key(t), Subject{"Dstack", "Dstack App CA", 0}, ratls.Issued{AppID: &app, Usage: "app:ca"}, now))
	k := key(t)
	der := must(ca.Issue(Leaf{
		Config: csr.Config{Subject: "web", Names: []string{"a.example", "127.0.0.1", "::1"}, ServerAuth: true, ClientAuth: true},
		Public: &k.PublicKey, Issued: ratls.Issued{AppID: &app, Usage: "app:custom"}, Evidence: []byte("evidence"),
	}, now))
	leaf := must(x509.ParseCertificate(der))
	roots, middle := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root.Certificate)
	middle.AddCert(ca.Certificate)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: middle, CurrentTime: now, DNSName: "a.example", KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Error(err)
		}
	}
	if leaf.Subject.CommonName != "web" || len(leaf.DNSNames) != 1 || len(leaf.IPAddresses) != 2 || leaf.KeyUsage != x509.KeyUsageDigitalSignature || leaf.IsCA {
		t.Errorf("leaf %+v", leaf)
	}
	claims, err := ratls.IssuerClaims(leaf)
	if err != nil || *claims.AppID != app || claims.Usage != "app:custom" {
		t.Errorf("claims %+v, %v", claims, err)
	}
	if !bytes.Equal(leaf.AuthorityKeyId, ca.Certificate.SubjectKeyId) || len(leaf.SerialNumber.Bytes()) != 20 {
		t.Error("no path by key identifiers")
	}
	again := must(x509.ParseCertificate(must(ca.Issue(Leaf{Public: &k.PublicKey}, now))))
	if again.SerialNumber.Cmp(leaf.SerialNumber) == 0 || len(again.ExtKeyUsage) != 0 || len(again.DNSNames) != 0 {
		t.Errorf("a plain leaf: %+v", again)
	}
	// Upstream writes an empty common name, too.
	if !bytes.Contains(again.RawSubject, []byte{0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x00}) {
		t.Errorf("subject %x", again.RawSubject)
	}
}

func TestAnAuthorityOpens(t *testing.T) {
	k := key(t)
	a := must(Self(k, Subject{Name: "App Root Cert", Path: 1}, ratls.Issued{}, nil, now))
	text := must(derive.PEM(k))
	b, err := Open([]byte(a.PEM()), text)
	if err != nil || !b.Certificate.Equal(a.Certificate) {
		t.Fatal(err)
	}
	leaf := must(a.Issue(Leaf{Public: &k.PublicKey}, now))
	for name, c := range map[string]struct{ cert, key []byte }{
		"another's key":        {[]byte(a.PEM()), must(derive.PEM(key(t)))},
		"no certificate":       {text, text},
		"no key":               {[]byte(a.PEM()), []byte(a.PEM())},
		"nothing":              {nil, nil},
		"a leaf for authority": {[]byte(Encode(leaf)), text},
	} {
		if _, err := Open(c.cert, c.key); fault.Code(err) != "authority_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// remote is a key that is elsewhere: it signs and is no *ecdsa.PrivateKey.
type remote struct{ crypto.Signer }

func TestAnAuthorityWhoseKeyIsElsewhere(t *testing.T) {
	rootKey, appKey := remote{key(t)}, remote{key(t)}
	root := must(Self(rootKey, Subject{Name: "root", Path: 1}, ratls.Issued{}, nil, now))
	again := must(From(root.Certificate, rootKey))
	app := must(again.Authority(appKey, Subject{Name: "app"}, ratls.Issued{}, now))
	k := key(t)
	leaf := must(x509.ParseCertificate(must(app.Issue(Leaf{Public: &k.PublicKey}, now))))
	if err := leaf.CheckSignatureFrom(app.Certificate); err != nil {
		t.Error(err)
	}
	if err := app.Certificate.CheckSignatureFrom(root.Certificate); err != nil {
		t.Error(err)
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wide := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	for name, make := range map[string]func() (*Authority, error){
		"another's key":        func() (*Authority, error) { return From(root.Certificate, appKey) },
		"no key":               func() (*Authority, error) { return From(root.Certificate, nil) },
		"a leaf":               func() (*Authority, error) { return From(leaf, k) },
		"Ed25519":              func() (*Authority, error) { return Self(edwards, Subject{}, ratls.Issued{}, nil, now) },
		"P-384":                func() (*Authority, error) { return Self(wide, Subject{}, ratls.Issued{}, nil, now) },
		"P-384 under the root": func() (*Authority, error) { return root.Authority(wide, Subject{}, ratls.Issued{}, now) },
	} {
		if _, err := make(); fault.Code(err) != "authority_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestValidityAndNames(t *testing.T) {
	a := must(Self(key(t), Subject{Name: "a"}, ratls.Issued{}, nil, now))
	at := func(d time.Duration) *uint64 { v := uint64(now.Add(d).Unix()); return &v }
	huge := ^uint64(0)
	k := key(t)
	for name, c := range map[string]struct {
		leaf     Leaf
		from, to time.Duration
		code     string
	}{
		"by default":               {Leaf{}, -time.Hour, Lifetime, ""},
		"as asked":                 {Leaf{Config: csr.Config{NotBefore: at(time.Hour), NotAfter: at(2 * time.Hour)}}, time.Hour, 2 * time.Hour, ""},
		"no longer than the CA":    {Leaf{Config: csr.Config{NotAfter: &huge}}, -time.Hour, Lifetime, ""},
		"no longer than allowed":   {Leaf{Config: csr.Config{NotAfter: at(99 * time.Hour)}, MaxLifetime: 24 * time.Hour}, -time.Hour, 24 * time.Hour, ""},
		"shorter than allowed":     {Leaf{Config: csr.Config{NotAfter: at(time.Hour)}, MaxLifetime: 24 * time.Hour}, -time.Hour, time.Hour, ""},
		"ends before it begins":    {Leaf{Config: csr.Config{NotBefore: at(2), NotAfter: at(1)}}, 0, 0, "certificate_validity"},
		"begins after the CA ends": {Leaf{Config: csr.Config{NotBefore: &huge}}, 0, 0, "certificate_validity"},
		"a name with a space":      {Leaf{Config: csr.Config{Names: []string{"a b"}}}, 0, 0, "certificate_name"},
		"a name beyond ASCII":      {Leaf{Config: csr.Config{Names: []string{"ä.example"}}}, 0, 0, "certificate_name"},
		"an empty name":            {Leaf{Config: csr.Config{Names: []string{""}}}, 0, 0, "certificate_name"},
		"too many names":           {Leaf{Config: csr.Config{Names: make([]string, maxNames+1)}}, 0, 0, "certificate_name"},
		"a subject of no UTF-8":    {Leaf{Config: csr.Config{Subject: "\xff"}}, 0, 0, "certificate_name"},
		"too much evidence":        {Leaf{Evidence: make([]byte, ratls.MaxEvidence+1)}, 0, 0, "ratls_too_large"},
	} {
		c.leaf.Public = &k.PublicKey
		der, err := a.Issue(c.leaf, now)
		if fault.Code(err) != c.code || (err == nil) != (c.code == "") {
			t.Errorf("%s: %v, want %q", name, err, c.code)
			continue
		}
		if err != nil {
			continue
		}
		cert := must(x509.ParseCertificate(der))
		if !cert.NotBefore.Equal(now.Add(c.from)) || !cert.NotAfter.Equal(now.Add(c.to)) {
			t.Errorf("%s: valid from %s to %s", name, cert.NotBefore, cert.NotAfter)
		}
	}
}
