// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"slices"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits on certificates (threats.md B15).
const (
	maxCert      = 16 << 10 // bytes of the attestation key's certificate
	maxChain     = 8        // certificates, from the attestation key's to the root
	maxLinkTests = 256      // signatures checked in search of a chain
	maxCRLs      = 2 << 20  // bytes of all revocation lists of the chain's issuers
)

var (
	// oidEKCertificate is tcg-kp-EKCertificate, which Google's authorities bear.
	oidEKCertificate   = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidSubjectAltName  = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidNameConstraints = asn1.ObjectIdentifier{2, 5, 29, 30}
)

// chain is the way from an attestation key to a trusted root.
type chain struct {
	unchecked []string            // revocation lists that are missing and may be
	certs     []*x509.Certificate // attestation key first, root last; two or more
	trust     dstack.Trust
	expires   time.Time // when the first certificate or revocation list ends
}

func (c *chain) leaf() *x509.Certificate { return c.certs[0] }
func (c *chain) root() *x509.Certificate { return c.certs[len(c.certs)-1] }

// until notes that the verdict rests on something that ends at t.
func (c *chain) until(t time.Time) {
	if c.expires.IsZero() || t.Before(c.expires) {
		c.expires = t
	}
}

// verifyChain establishes that a root of TPMs vouches for the certificate at the
// stated time. Certificates and revocation lists come from the collateral only.
func verifyChain(der []byte, in attest.Input) (*chain, error) {
	if len(der) > maxCert {
		return nil, fault.New("ak_cert_malformed", "the attestation key's certificate has %d bytes, more than %d", len(der), maxCert)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(err, "ak_cert_malformed", "the attestation key's certificate")
	}
	var col collateral.Bundle
	if in.Collateral != nil {
		col = *in.Collateral
	}
	if err := col.Check(); err != nil {
		return nil, err
	}
	c, err := findChain(leaf, issuers(col.Certificates, in.At), in.Roots)
	if err != nil {
		return nil, err
	}
	if err := c.checkLeaf(); err != nil {
		return nil, err
	}
	if err := c.checkIssuers(); err != nil {
		return nil, err
	}
	if err := c.checkTimes(in.At); err != nil {
		return nil, err
	}
	if err := c.checkRevocation(col.CRLs, in.At, in.Options); err != nil {
		return nil, err
	}
	return c, nil
}

// issuers returns the certificates that may stand in a chain, those valid at the
// time first, so that a renewed authority is found before its expired self. The
// collateral may serve other kinds of evidence too: what does not parse, or has a
// key of another kind, is none of our concern.
func issuers(ders []collateral.Hex, at time.Time) []*x509.Certificate {
	var valid, rest []*x509.Certificate
	for _, der := range ders {
		cert, err := x509.ParseCertificate(der)
		switch {
		case err != nil || !isStrong(cert.PublicKey):
		case at.Before(cert.NotBefore) || at.After(cert.NotAfter):
			rest = append(rest, cert)
		default:
			valid = append(valid, cert)
		}
	}
	return append(valid, rest...)
}

// isStrong admits RSA keys of 2048 to 4096 bits, P-256 and P-384.
func isStrong(key any) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() >= minRSABits && key.N.BitLen() <= maxRSABits
	case *ecdsa.PublicKey:
		return key.Curve == elliptic.P256() || key.Curve == elliptic.P384()
	}
	return false
}

// findChain searches, breadth first, for the shortest chain to a root of TPMs. Each
// certificate is visited once, so a bundle of certificates that sign one another
// costs no more than another.
func findChain(leaf *x509.Certificate, pool []*x509.Certificate, roots []attest.Roots) (*chain, error) {
	known, tests, cut := 0, 0, false
	issued := func(cert, by *x509.Certificate) bool {
		if !bytes.Equal(cert.RawIssuer, by.RawSubject) || tests == maxLinkTests {
			return false
		}
		tests++
		// CheckSignatureFrom also demands that the issuer may sign certificates.
		return cert.CheckSignatureFrom(by) == nil
	}
	seen := make([]bool, len(pool))
	for queue := [][]*x509.Certificate{{leaf}}; len(queue) > 0; queue = queue[1:] {
		certs := queue[0]
		last := certs[len(certs)-1]
		for _, r := range roots {
			if r.TEE != dstack.TPM {
				continue
			}
			for _, ca := range r.CA {
				known++
				if !last.Equal(ca) && issued(last, ca) {
					return &chain{certs: append(slices.Clip(certs), ca), trust: r.Trust}, nil
				}
			}
		}
		if known == 0 {
			return nil, fault.New("no_roots", "no root certificate over attestation keys of TPMs was given")
		}
		for i, cert := range pool {
			if seen[i] || cert.Equal(leaf) || !issued(last, cert) {
				continue
			}
			if len(certs)+2 > maxChain { // a root is still to come
				cut = true
				continue
			}
			seen[i] = true
			queue = append(queue, append(slices.Clip(certs), cert))
		}
	}
	switch {
	case tests == maxLinkTests:
		return nil, fault.New("chain_search", "no chain to a root within %d tests of a signature: the collateral has too many certificates of the same names", maxLinkTests)
	case cut:
		return nil, fault.New("chain_length", "no chain to a root of at most %d certificates", maxChain)
	}
	return nil, fault.New("unknown_root", "the certificate of the attestation key, issued by %q, leads to none of the given roots", leaf.Issuer).
		WithFix("give the certificates of its issuers with the collateral")
}

// checkLeaf demands a certificate of a key that signs quotes.
func (c *chain) checkLeaf() error {
	leaf := c.leaf()
	switch {
	case leaf.IsCA:
		return fault.New("ak_is_ca", "the attestation key's certificate is one of an authority")
	case leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		// An endorsement key's certificate of the same authority, for instance.
		return fault.New("ak_key_usage", "the attestation key's certificate is not for signatures")
	}
	return nil
}

// checkIssuers enforces what x509 leaves to the caller when it checks one
// signature at a time: purposes, lengths, and extensions that must be understood.
func (c *chain) checkIssuers() error {
	for i, cert := range c.certs {
		name := cert.Subject.String()
		for _, oid := range cert.UnhandledCriticalExtensions {
			// TPM certificates name the TPM in a critical directory name (TCG EK
			// Credential Profile §3.2.9); nothing here rests on it.
			if !oid.Equal(oidSubjectAltName) {
				return fault.New("chain_extension", "certificate %d of the chain, %q, has unknown critical extension %s", i, name, oid)
			}
		}
		for _, e := range cert.Extensions {
			if e.Id.Equal(oidNameConstraints) {
				return fault.New("chain_extension", "certificate %d of the chain, %q, constrains names, which is not understood here", i, name)
			}
		}
		if c.root() != cert && len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) > 0 &&
			!slices.ContainsFunc(cert.UnknownExtKeyUsage, oidEKCertificate.Equal) {
			return fault.New("ak_eku", "certificate %d of the chain, %q, is for other purposes than TPM keys (%s)", i, name, oidEKCertificate)
		}
		// i-1 authorities stand between an issuer and the attestation key.
		if limited := cert.MaxPathLen > 0 || cert.MaxPathLenZero; i > 0 && limited && i-1 > cert.MaxPathLen {
			return fault.New("chain_path_length", "%q may stand above %d authorities, not %d", name, cert.MaxPathLen, i-1)
		}
	}
	return nil
}

func (c *chain) checkTimes(at time.Time) error {
	for i, cert := range c.certs {
		if !at.Before(cert.NotBefore) && !at.After(cert.NotAfter) {
			c.until(cert.NotAfter)
			continue
		}
		from, to, now := day(cert.NotBefore), day(cert.NotAfter), day(at)
		switch i {
		case 0:
			return fault.New("ak_cert_expired", "the attestation key's certificate is valid from %s to %s, not at %s", from, to, now)
		case len(c.certs) - 1:
			return fault.New("root_expired", "root %q is valid from %s to %s, not at %s", cert.Subject, from, to, now)
		}
		return fault.New("ak_issuer_expired", "the authority %q is valid from %s to %s, not at %s", cert.Subject, from, to, now)
	}
	return nil
}

// checkRevocation demands of every issuer of the chain, the root among them, a
// revocation list that is valid at the time and does not list what it issued. Each
// list is read, judged and dropped before the next, so that memory holds one; those
// of other issuers are not read at all.
func (c *chain) checkRevocation(ders []collateral.Hex, at time.Time, opt attest.Options) error {
	found := make([]bool, len(c.certs)-1)
	wrong := make([]error, len(c.certs)-1) // why a list of that issuer does not count
	size := 0
	for _, der := range ders {
		name, err := crlIssuer(der)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(c.certs[1:], func(ca *x509.Certificate) bool { return bytes.Equal(name, ca.RawSubject) }) {
			continue
		}
		if size += len(der); size > maxCRLs {
			return fault.New("crl_too_large", "the revocation lists of the chain's issuers have more than %d bytes", maxCRLs)
		}
		crl, err := x509.ParseRevocationList(der)
		if err != nil {
			return fault.Wrap(err, "crl_malformed", "a revocation list of the collateral")
		}
		for i := range found {
			cert, issuer := c.certs[i], c.certs[i+1]
			if !bytes.Equal(name, issuer.RawSubject) {
				continue
			}
			if err := checkCRL(crl, issuer, at); err != nil {
				wrong[i] = err
				continue
			}
			switch {
			case !lists(crl, cert):
			case i == 0:
				return fault.New("ak_revoked", "the attestation key's certificate, serial %x, is revoked", cert.SerialNumber)
			default:
				return fault.New("ak_issuer_revoked", "the certificate of the authority %q, serial %x, is revoked", cert.Subject, cert.SerialNumber)
			}
			found[i] = true
			c.until(crl.NextUpdate)
		}
	}
	for i := range found {
		switch {
		case found[i]:
		case wrong[i] != nil:
			return wrong[i]
		default:
			if err := c.missingCRL(c.certs[i], c.certs[i+1], opt); err != nil {
				return err
			}
		}
	}
	return nil
}

// crlIssuer returns the DER of the issuer's name, without reading the entries.
func crlIssuer(der []byte) ([]byte, error) {
	var list struct {
		TBS struct {
			Version           int `asn1:"optional,default:0"`
			Algorithm, Issuer asn1.RawValue
		}
	}
	if rest, err := asn1.Unmarshal(der, &list); err != nil || len(rest) > 0 {
		return nil, fault.New("crl_malformed", "a revocation list of the collateral is not one DER structure")
	}
	return list.TBS.Issuer.FullBytes, nil
}

// checkCRL verifies a list of a given issuer at a time.
func checkCRL(crl *x509.RevocationList, issuer *x509.Certificate, at time.Time) error {
	for _, e := range crl.Extensions {
		if e.Critical { // such as a delta or partial list
			return fault.New("crl_partial", "revocation list of %q has the critical extension %s", crl.Issuer, e.Id)
		}
	}
	if err := crl.CheckSignatureFrom(issuer); err != nil {
		return fault.Wrap(err, "crl_signature", "revocation list of %q", crl.Issuer)
	}
	if at.Before(crl.ThisUpdate) {
		return fault.New("crl_not_yet_valid", "revocation list of %q is of %s, after %s", crl.Issuer, day(crl.ThisUpdate), day(at))
	}
	if crl.NextUpdate.IsZero() || at.After(crl.NextUpdate) {
		return fault.New("crl_expired", "revocation list of %q was good until %s, not at %s", crl.Issuer, day(crl.NextUpdate), day(at)).
			WithFix("fetch fresh collateral, or state the time at which to verify")
	}
	return nil
}

// missingCRL decides what it means that the collateral has no revocation list of
// issuer, which issued cert (threats.md B02): a refusal, or, where the caller allows
// it, something that the claims name as unchecked. As of 2026 Google's
// certificates of attestation keys name no distribution point for one, while that
// of the authority above them does.
func (c *chain) missingCRL(cert, issuer *x509.Certificate, opt attest.Options) error {
	if opt.AllowMissingCRL {
		c.unchecked = append(c.unchecked, "certificate revocation list of "+issuer.Subject.CommonName)
		return nil
	}
	err := fault.New("crl_missing", "collateral has no revocation list of %q, which issued %q", issuer.Subject, cert.Subject)
	if len(cert.CRLDistributionPoints) == 0 {
		return err.WithFix("the certificate does not say where its issuer publishes one; add it to the collateral by hand")
	}
	return err.WithFix("fetch complete collateral")
}

func lists(crl *x509.RevocationList, cert *x509.Certificate) bool {
	return slices.ContainsFunc(crl.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool {
		return e.SerialNumber.Cmp(cert.SerialNumber) == 0
	})
}

func day(t time.Time) string { return t.UTC().Format(time.RFC3339) }
