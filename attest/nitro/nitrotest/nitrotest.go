// SPDX-License-Identifier: Apache-2.0

// Package nitrotest is an AWS Nitro module for tests: a PKI of its own in the
// shape of the real one (root, region, zone, instance, leaf) and attestation
// documents of the exact shape of real ones, of an enclave or of a NitroTPM. Every
// part can be changed before it is signed, so that a test can attack one check and
// be sure that every signature around it still holds.
//
// It is for tests only; what it makes is accepted under [Module.Roots] alone.
package nitrotest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"maps"
	"math/big"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/cose"
	"github.com/dstack-go/dstack/attest/cose/cosetest"
	"github.com/dstack-go/dstack/collateral"
)

// At is the time to verify at; the leaf is valid around it for three hours, and
// documents are made at it.
var At = time.Date(2026, 1, 15, 12, 0, 0, 0, time.UTC)

// Authority is a certificate and its key.
type Authority struct {
	Key  *ecdsa.PrivateKey
	Cert *x509.Certificate
}

// CRL describes a revocation list.
type CRL struct {
	Issuer     Authority
	Revoked    []*big.Int
	ThisUpdate time.Time
	NextUpdate time.Time
	Extensions []pkix.Extension
}

// Module is one Nitro module and the authorities above it. Change what you like,
// then ask for Evidence.
type Module struct {
	TEE dstack.TEE

	Root, Region, Zone, Instance Authority
	Leaf                         Authority

	// Doc is what is signed. The members certificate and cabundle are added from
	// Leaf and from Root, Region, Zone, Instance unless they are there.
	Doc cosetest.Map

	// Message is how it is signed: key and payload are filled in where they are nil.
	Message cosetest.Message

	t testing.TB
}

// New returns an enclave that verifies.
func New(t testing.TB) *Module {
	m := newModule(t, dstack.Nitro, "i-0123456789abcdef0-enc0123456789abcdef")
	m.Doc["pcrs"] = registers(16)
	return m
}

// NewTPM returns an instance with a NitroTPM that verifies.
func NewTPM(t testing.TB) *Module {
	m := newModule(t, dstack.NitroTPM, "i-0123456789abcdef0-tpm0000000000000000")
	m.Doc["nitrotpm_pcrs"] = registers(24)
	return m
}

func newModule(t testing.TB, tee dstack.TEE, id string) *Module {
	t.Helper()
	m := &Module{TEE: tee, t: t, Message: cosetest.Message{Algorithm: cose.ES384}}
	m.Root = m.IssueCA(Authority{}, "nitrotest", -1)
	m.Region = m.IssueCA(m.Root, "region.nitrotest", 2)
	m.Zone = m.IssueCA(m.Region, "zone.nitrotest", 1)
	m.Instance = m.IssueCA(m.Zone, "instance.nitrotest", 0)
	m.Leaf = m.IssueLeaf(m.Instance, nil)
	m.Doc = cosetest.Map{
		"module_id": id, "digest": "SHA384", "timestamp": uint64(At.UnixMilli()),
		"user_data": bytes.Repeat([]byte{0xda}, dstack.ReportDataSize), "nonce": []byte("nonce"), "public_key": nil,
	}
	return m
}

// registers returns recognisable values.
func registers(n int) cosetest.Map {
	out := cosetest.Map{}
	for i := range n {
		out[i] = bytes.Repeat([]byte{0xc0 + byte(i)}, 48)
	}
	return out
}

// Quote returns the signed document.
func (m *Module) Quote() []byte {
	m.t.Helper()
	doc := cosetest.Map{
		"certificate": m.Leaf.Cert.Raw,
		"cabundle":    Bundle(m.Root, m.Region, m.Zone, m.Instance),
	}
	for key, value := range m.Doc {
		doc[key] = value
	}
	message := m.Message
	if message.Key == nil {
		message.Key = m.Leaf.Key
	}
	if message.Payload == nil {
		// Real documents are maps of indefinite length.
		definite := cosetest.Marshal(m.t, doc)
		message.Payload = append(append([]byte{0xbf}, definite[1:]...), 0xff)
	}
	return message.Sign(m.t)
}

// Evidence returns the signed document as evidence.
func (m *Module) Evidence() *attest.Evidence {
	m.t.Helper()
	return &attest.Evidence{TEE: m.TEE, Quote: m.Quote()}
}

// Roots returns the module's root, of development trust, for both kinds of TEE.
func (m *Module) Roots() []attest.Roots {
	ca := []*x509.Certificate{m.Root.Cert}
	return []attest.Roots{
		{TEE: dstack.Nitro, CA: ca, Trust: dstack.TrustDevelopment},
		{TEE: dstack.NitroTPM, CA: ca, Trust: dstack.TrustDevelopment},
	}
}

// DevRoots returns the root as a development roots file holds it.
func (m *Module) DevRoots() *collateral.DevRoots {
	return &collateral.DevRoots{Version: 1, Name: "nitrotest",
		NitroRootPEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Root.Cert.Raw}))}
}

// Bundle returns certificates as a document's cabundle holds them.
func Bundle(list ...Authority) []any {
	var out []any
	for _, a := range list {
		out = append(out, a.Cert.Raw)
	}
	return out
}

// Issue makes a certificate, self-signed when the parent is empty. Edit may change
// the template.
func (m *Module) Issue(parent Authority, name string, edit func(*x509.Certificate)) Authority {
	m.t.Helper()
	key := cosetest.NewKey(m.t, elliptic.P384())
	return Authority{key, m.Certify(parent, key, name, edit)}
}

// Certify is Issue for a key of any curve.
func (m *Module) Certify(parent Authority, key *ecdsa.PrivateKey, name string, edit func(*x509.Certificate)) *x509.Certificate {
	m.t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	m.check(err)
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name, Organization: []string{"nitrotest"}},
		NotBefore:             At.AddDate(0, 0, -1),
		NotAfter:              At.AddDate(0, 0, 1),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
	}
	if edit != nil {
		edit(template)
	}
	if parent.Cert == nil {
		parent = Authority{key, template}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent.Cert, &key.PublicKey, parent.Key)
	m.check(err)
	cert, err := x509.ParseCertificate(der)
	m.check(err)
	return cert
}

// IssueCA makes an authority with at most that many authorities below it, or any
// number if it is negative.
func (m *Module) IssueCA(parent Authority, name string, below int) Authority {
	return m.Issue(parent, name, func(c *x509.Certificate) {
		c.IsCA, c.MaxPathLen, c.MaxPathLenZero = true, below, below == 0
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	})
}

// IssueLeaf makes the certificate of a key that signs documents.
func (m *Module) IssueLeaf(parent Authority, edit func(*x509.Certificate)) Authority {
	return m.Issue(parent, "leaf.nitrotest", func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = At.Add(-3*time.Second), At.Add(3*time.Hour)
		if edit != nil {
			edit(c)
		}
	})
}

// Revoke returns a good revocation list of an authority.
func Revoke(issuer Authority, serials ...*big.Int) CRL {
	return CRL{Issuer: issuer, Revoked: serials, ThisUpdate: At.Add(-time.Hour), NextUpdate: At.Add(2 * time.Hour)}
}

// Sign returns a revocation list in DER.
func (m *Module) Sign(c CRL) collateral.Hex {
	m.t.Helper()
	template := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: c.ThisUpdate, NextUpdate: c.NextUpdate, ExtraExtensions: c.Extensions}
	for _, serial := range c.Revoked {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: serial, RevocationTime: c.ThisUpdate})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, c.Issuer.Cert, c.Issuer.Key)
	m.check(err)
	return der
}

// For returns a copy of the module, with members of its own, that belongs to
// another test.
func (m *Module) For(t testing.TB) *Module {
	c := *m
	c.t, c.Doc = t, maps.Clone(m.Doc)
	return &c
}

// TB returns the test that the module belongs to.
func (m *Module) TB() testing.TB { return m.t }

func (m *Module) check(err error) {
	if err != nil {
		m.t.Helper()
		m.t.Fatalf("nitrotest: %v", err)
	}
}
