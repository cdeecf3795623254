// SPDX-License-Identifier: Apache-2.0

// Package certificate issues the certificates of the system: authorities of apps and
// of a KMS, and the leaves of apps.
//
// Their fields are upstream's, so that its clients read them; what a client cannot
// trip over is better: serial numbers are random where upstream's repeat with the
// key, keys have identifiers by which TLS stacks build paths, a leaf ends no later
// than its issuer, and begins an hour before it was made instead of in 1975.
//
// An issuer here signs what it is asked to. Names and dates of an app's certificate
// are the app's choice: who relies on one looks at the app id in it, never at its
// name (threats.md K03).
//
// Implements spec/guest-agent.md §9.3 and spec/kms.md §2.2.
package certificate

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"
	"unicode/utf8"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/csr"
)

// Lifetime is how long a certificate is valid if nobody says otherwise.
const Lifetime = 3650 * 24 * time.Hour

const (
	// backdate spares a new certificate the clocks that are slow.
	backdate = time.Hour
	maxNames = 256
)

// caStart is the first day of authorities, upstream's: their keys are older than
// any of their certificates.
var caStart = time.Date(1975, 1, 1, 0, 0, 0, 0, time.UTC)

// Authority is a certificate that may issue others, and its key.
type Authority struct {
	Certificate *x509.Certificate
	key         crypto.Signer // P-256
}

// Subject names an authority. Path is how many authorities may follow it.
type Subject struct {
	Organization, Name string
	Path               int
}

// Open reads an authority from PEM: the certificate and a PKCS #8 key. Code
// authority_malformed; the key must be that of the certificate.
func Open(certPEM, keyPEM []byte) (*Authority, error) {
	fail := func(err error, what string) (*Authority, error) {
		return nil, fault.Wrap(err, "authority_malformed", "the certificate authority: %s", what)
	}
	cert, err := Parse(certPEM)
	if err != nil {
		return fail(err, "its certificate")
	}
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return fail(fmt.Errorf("not PEM"), "its key")
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return fail(err, "its key")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return fail(fmt.Errorf("it does not sign"), "its key")
	}
	return From(cert, key)
}

// From makes an authority of a certificate and what signs with its key, which may
// lie elsewhere: nothing here asks for more than a signature. Code
// authority_malformed; the key must be the P-256 one of the certificate.
func From(cert *x509.Certificate, key crypto.Signer) (*Authority, error) {
	fail := func(why, what string) (*Authority, error) {
		return nil, fault.Wrap(errors.New(why), "authority_malformed", "the certificate authority: %s", what)
	}
	public, err := publicKey(key)
	if err != nil {
		return fail(err.Error(), "its key")
	}
	if !public.Equal(cert.PublicKey) {
		return fail("it is not the key of the certificate", "its key")
	}
	if !cert.IsCA {
		return fail("it is not one of an authority", "its certificate")
	}
	return &Authority{cert, key}, nil
}

// publicKey returns the key with which a signer's signatures are checked.
func publicKey(key crypto.Signer) (*ecdsa.PublicKey, error) {
	if key == nil {
		return nil, errors.New("there is none")
	}
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, errors.New("it is no P-256 key")
	}
	return public, nil
}

// KeyFromPEM reads a P-256 key, PEM of PKCS #8. Code authority_malformed.
func KeyFromPEM(text []byte) (*ecdsa.PrivateKey, error) {
	bad := func(why string) (*ecdsa.PrivateKey, error) {
		return nil, fault.New("authority_malformed", "the key of an authority: %s", why)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return bad("not PEM")
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return bad("not PKCS #8")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return bad("it is no P-256 key")
	}
	return key, nil
}

// Parse reads the first certificate of a PEM text.
func Parse(text []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("not a certificate in PEM form")
	}
	return x509.ParseCertificate(block.Bytes)
}

// PEM returns the authority's certificate.
func (a *Authority) PEM() string { return Encode(a.Certificate.Raw) }

// Encode returns a certificate as PEM.
func Encode(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// Self makes an authority that signs itself; key is of P-256. evidence, if any, was
// made over ratls.ReportData of its key. Code authority_malformed.
func Self(key crypto.Signer, s Subject, issued ratls.Issued, evidence []byte, now time.Time) (*Authority, error) {
	return authority(key, s, issued, evidence, now, nil)
}

// Authority issues the certificate of another authority; key is of P-256 and signs
// nothing yet. Code authority_malformed.
func (a *Authority) Authority(key crypto.Signer, s Subject, issued ratls.Issued, now time.Time) (*Authority, error) {
	return authority(key, s, issued, nil, now, a)
}

func authority(key crypto.Signer, s Subject, issued ratls.Issued, evidence []byte, now time.Time, by *Authority) (*Authority, error) {
	public, err := publicKey(key)
	if err != nil {
		return nil, fault.Wrap(err, "authority_malformed", "the certificate authority: its key")
	}
	extensions, err := ratls.Extensions(issued, evidence)
	if err != nil {
		return nil, err
	}
	t, err := template(public, s.Organization, s.Name)
	if err != nil {
		return nil, err
	}
	t.NotBefore, t.NotAfter = caStart, now.Add(Lifetime)
	t.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLen, t.MaxPathLenZero = true, true, s.Path, s.Path == 0
	t.ExtraExtensions = extensions
	parent, signer := t, key
	if by != nil {
		parent, signer = by.Certificate, by.key
		if t.NotAfter.After(parent.NotAfter) {
			t.NotAfter = parent.NotAfter
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, public, signer)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &Authority{cert, key}, err
}

// Leaf is the certificate of an app, or of a program of the system.
type Leaf struct {
	csr.Config // its WithEvidence and WithAppInfo are the caller's to act on
	Public     *ecdsa.PublicKey
	Issued     ratls.Issued
	Evidence   []byte // to embed, made over ratls.ReportData of the key; nil: none
	// MaxLifetime bounds the validity from now on; zero: [Lifetime].
	MaxLifetime time.Duration
}

// Codes of Issue: certificate_validity, certificate_name, ratls_too_large.
func (a *Authority) Issue(l Leaf, now time.Time) (der []byte, err error) {
	t, err := template(l.Public, l.Organization, l.Subject)
	if err != nil {
		return nil, err
	}
	if t.NotBefore, t.NotAfter, err = a.validity(l, now); err != nil {
		return nil, err
	}
	custom, err := ratls.Extensions(l.Issued, l.Evidence)
	if err != nil {
		return nil, err
	}
	names, err := subjectAltNames(l.Names)
	if err != nil {
		return nil, err
	}
	ours, err := extensions(names, l.ServerAuth, l.ClientAuth)
	if err != nil {
		return nil, err
	}
	t.ExtraExtensions = append(ours, custom...)
	return x509.CreateCertificate(rand.Reader, t, a.Certificate, l.Public, a.key)
}

// validity is what was asked for, or the default, within that of the issuer.
func (a *Authority) validity(l Leaf, now time.Time) (from, to time.Time, err error) {
	lifetime := l.MaxLifetime
	if lifetime == 0 {
		lifetime = Lifetime
	}
	from, to = now.Add(-backdate), now.Add(lifetime)
	year9999 := uint64(time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC).Unix()) // RFC 5280 §4.1.2.5
	if l.NotBefore != nil {
		from = time.Unix(int64(min(*l.NotBefore, year9999)), 0)
	}
	if l.NotAfter != nil {
		if asked := time.Unix(int64(min(*l.NotAfter, year9999)), 0); asked.Before(to) || l.MaxLifetime == 0 {
			to = asked
		}
	}
	if to.After(a.Certificate.NotAfter) {
		to = a.Certificate.NotAfter
	}
	if from.Before(a.Certificate.NotBefore) {
		from = a.Certificate.NotBefore
	}
	if !from.Before(to) {
		// Upstream's words, as far as they say it.
		return from, to, fault.New("certificate_validity", "not_before must be earlier than not_after: the certificate would be valid from %s to %s",
			from.UTC().Format(time.RFC3339), to.UTC().Format(time.RFC3339))
	}
	return from.UTC(), to.UTC(), nil
}

// generalName tags (RFC 5280 §4.2.1.6).
const (
	tagDNSName   = 2
	tagIPAddress = 7
)

// subjectAltNames returns names as GeneralNames, in their order: addresses and DNS
// names.
func subjectAltNames(names []string) ([]asn1.RawValue, error) {
	if len(names) > maxNames {
		return nil, fault.New("certificate_name", "a certificate for %d names, more than %d", len(names), maxNames)
	}
	var out []asn1.RawValue
	add := func(tag int, b []byte) {
		out = append(out, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: b})
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			if v4 := ip.To4(); v4 != nil {
				ip = v4
			}
			add(tagIPAddress, ip)
			continue
		}
		if n == "" || len(n) > 253 {
			return nil, fault.New("certificate_name", "a DNS name has 1 to 253 characters, not %d", len(n))
		}
		for _, c := range []byte(n) {
			if c <= ' ' || c >= 0x7f {
				return nil, fault.New("certificate_name", "%.100q is not a DNS name: it has other characters than visible ASCII", n).
					WithFix("write international names in their ASCII form (xn--…)")
			}
		}
		add(tagDNSName, []byte(n))
	}
	return out, nil
}

// extensions of a leaf that are in the standard, in upstream's order; the library
// would write them in its own (spec/guest-agent.md §9.3).
func extensions(names []asn1.RawValue, server, client bool) ([]pkix.Extension, error) {
	var out []pkix.Extension
	var failed error
	add := func(arc int, critical bool, value any) {
		der, err := asn1.Marshal(value)
		failed = errors.Join(failed, err)
		out = append(out, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, arc}, Critical: critical, Value: der})
	}
	if len(names) > 0 {
		add(17, false, names)
	}
	add(15, true, asn1.BitString{Bytes: []byte{0x80}, BitLength: 1}) // digitalSignature
	var uses []asn1.ObjectIdentifier
	if server {
		uses = append(uses, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1})
	}
	if client {
		uses = append(uses, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2})
	}
	if len(uses) > 0 {
		add(37, false, uses)
	}
	return out, failed
}

// template has what all certificates have: a random serial number, the identifier of
// the key (RFC 5280 §4.2.1.2, method 1), and a subject with a common name even where
// that is empty, as upstream writes it.
func template(public crypto.PublicKey, organization, name string) (*x509.Certificate, error) {
	key, ok := public.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("a certificate for a %T", public)
	}
	point, err := key.Bytes()
	if err != nil {
		return nil, err
	}
	id := sha1.Sum(point)
	var serial [20]byte
	if _, err := rand.Read(serial[:]); err != nil {
		return nil, err
	}
	serial[0] = serial[0]&0x7f | 0x40 // positive, and always 20 bytes
	subject, err := rawSubject(organization, name)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial[:]), RawSubject: subject, SubjectKeyId: id[:]}, nil
}

// rawSubject encodes O, if there is one, and CN, as UTF8String.
func rawSubject(organization, name string) ([]byte, error) {
	attribute := func(arc int, text string) (pkix.AttributeTypeAndValue, error) {
		if !utf8.ValidString(text) {
			return pkix.AttributeTypeAndValue{}, fmt.Errorf("%.100q is not UTF-8", text)
		}
		value, err := asn1.MarshalWithParams(text, "utf8")
		return pkix.AttributeTypeAndValue{Type: asn1.ObjectIdentifier{2, 5, 4, arc}, Value: asn1.RawValue{FullBytes: value}}, err
	}
	var sequence pkix.RDNSequence
	if organization != "" {
		o, err := attribute(10, organization)
		if err != nil {
			return nil, fault.Wrap(err, "certificate_name", "the organization of a certificate")
		}
		sequence = append(sequence, pkix.RelativeDistinguishedNameSET{o})
	}
	cn, err := attribute(3, name)
	if err != nil {
		return nil, fault.Wrap(err, "certificate_name", "the subject of a certificate")
	}
	return asn1.Marshal(append(sequence, pkix.RelativeDistinguishedNameSET{cn}))
}
