// SPDX-License-Identifier: Apache-2.0

package nitro

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"slices"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// verification is the state of one call: the time, the one root, when the first
// thing relied upon ends, and whose revocation lists were not at hand.
type verification struct {
	at        time.Time
	anchor    *x509.Certificate
	trust     dstack.Trust
	expires   time.Time
	unchecked []string
}

// until notes that the verdict rests on something that ends at t.
func (v *verification) until(t time.Time) {
	if v.expires.IsZero() || t.Before(v.expires) {
		v.expires = t
	}
}

// parseChain reads the certificates of a document, leaf first. The root that the
// document brings along is left out, unread.
func parseChain(d *Document) ([]*x509.Certificate, error) {
	leaf, err := parseCertificate(d.Certificate)
	if err != nil {
		return nil, err
	}
	chain := []*x509.Certificate{leaf}
	for _, der := range slices.Backward(d.CABundle[1:]) {
		cert, err := parseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, cert)
	}
	return chain, nil
}

// understood are the extensions that checkChain judges; others must not be critical.
var understood = []asn1.ObjectIdentifier{
	{2, 5, 29, 15}, // key usage
	{2, 5, 29, 19}, // basic constraints
	{2, 5, 29, 37}, // extended key usage
}

// parseCertificate holds a certificate to AWS's profile: ECDSA P-384 with SHA-384.
func parseCertificate(der []byte) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(err, "nitro_certificate", "certificate of the attestation document")
	}
	if key, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P384() {
		return nil, fault.New("nitro_cert_algorithm", "%q has a key that is not ECDSA P-384", cert.Subject)
	}
	if cert.SignatureAlgorithm != x509.ECDSAWithSHA384 {
		return nil, fault.New("nitro_cert_algorithm", "%q is signed with %s, want ECDSA-SHA384", cert.Subject, cert.SignatureAlgorithm)
	}
	for _, e := range cert.Extensions {
		if e.Critical && !slices.ContainsFunc(understood, e.Id.Equal) {
			return nil, fault.New("nitro_cert_extension", "%q has the critical extension %s, which is not understood", cert.Subject, e.Id)
		}
	}
	return cert, nil
}

// chooseRoot finds the root that signed the topmost certificate.
func (v *verification) chooseRoot(tee dstack.TEE, chain []*x509.Certificate, roots []attest.Roots) error {
	top := chain[len(chain)-1]
	known := 0
	for _, r := range roots {
		if r.TEE != tee {
			continue
		}
		for _, ca := range r.CA {
			known++
			if !bytes.Equal(top.RawIssuer, ca.RawSubject) || top.CheckSignatureFrom(ca) != nil {
				continue
			}
			if v.at.Before(ca.NotBefore) || v.at.After(ca.NotAfter) {
				return fault.New("root_expired", "root %q is valid from %s to %s, not at %s", ca.Subject, stamp(ca.NotBefore), stamp(ca.NotAfter), stamp(v.at))
			}
			v.anchor, v.trust = ca, r.Trust
			v.until(ca.NotAfter)
			return nil
		}
	}
	if known == 0 {
		return fault.New("no_roots", "no root certificate for %s was given", tee)
	}
	return fault.New("unknown_root", "the certificates of the attestation document end in %q, which none of the %d given roots issued", top.Subject, known)
}

// issuer returns who must have signed certificate i of the chain.
func (v *verification) issuer(chain []*x509.Certificate, i int) *x509.Certificate {
	if i+1 < len(chain) {
		return chain[i+1]
	}
	return v.anchor
}

// checkChain verifies usages, constraints, names, signatures and times from the
// leaf up to the anchor.
func (v *verification) checkChain(chain []*x509.Certificate) error {
	for i, cert := range chain {
		if err := checkUse(i, cert); err != nil {
			return err
		}
	}
	for i, cert := range chain {
		issuer := v.issuer(chain, i)
		if !bytes.Equal(cert.RawIssuer, issuer.RawSubject) {
			return fault.New("nitro_chain", "%q names the issuer %q, but %q follows", cert.Subject, cert.Issuer, issuer.Subject)
		}
		if err := cert.CheckSignatureFrom(issuer); err != nil {
			return fault.Wrap(err, "nitro_chain", "signature of %q", cert.Subject)
		}
		if v.at.Before(cert.NotBefore) || v.at.After(cert.NotAfter) {
			return fault.New("nitro_cert_expired", "%q is valid from %s to %s, not at %s", cert.Subject, stamp(cert.NotBefore), stamp(cert.NotAfter), stamp(v.at)).
				WithFix("state the time at which to verify: certificates of enclaves end after three hours")
		}
		v.until(cert.NotAfter)
	}
	// The anchor limits the chain below it as any authority does.
	if p := v.anchor.MaxPathLen; (p > 0 || v.anchor.MaxPathLenZero) && len(chain)-1 > p {
		return fault.New("nitro_path_length", "root %q allows %d authorities below it, the chain has %d", v.anchor.Subject, p, len(chain)-1)
	}
	return nil
}

// checkUse judges what certificate i of a chain, 0 the leaf, may be used for.
func checkUse(i int, cert *x509.Certificate) error {
	if (len(cert.ExtKeyUsage) > 0 || len(cert.UnknownExtKeyUsage) > 0) && !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return fault.New("nitro_cert_usage", "%q is for other uses than client authentication", cert.Subject)
	}
	if i == 0 {
		if cert.IsCA {
			return fault.New("nitro_leaf", "%q, which signed the document, is an authority", cert.Subject)
		}
		if cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
			return fault.New("nitro_cert_usage", "%q, which signed the document, is not for signatures", cert.Subject)
		}
		return nil
	}
	if !cert.BasicConstraintsValid || !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return fault.New("nitro_authority", "%q is no authority that may sign certificates", cert.Subject)
	}
	// i-1 authorities stand between this one and the leaf.
	if p := cert.MaxPathLen; (p > 0 || cert.MaxPathLenZero) && i-1 > p {
		return fault.New("nitro_path_length", "%q allows %d authorities below it, the chain has %d", cert.Subject, p, i-1)
	}
	return nil
}

// checkRevocation looks the certificates of a verified chain up in the lists of
// their issuers. AWS publishes one list per authority, the youngest of which are a
// day old, and does not ask verifiers to have them; the issuers without a list are
// noted. A list that is there must be good. One list at a time is in memory.
func (v *verification) checkRevocation(chain []*x509.Certificate, lists []collateral.Hex) error {
	checked := make([]bool, len(chain))
	for n, der := range lists {
		crl, err := x509.ParseRevocationList(der)
		if err != nil {
			return fault.Wrap(err, "crl_malformed", "revocation list %d of the collateral", n)
		}
		for i, cert := range chain {
			issuer := v.issuer(chain, i)
			if !bytes.Equal(crl.RawIssuer, issuer.RawSubject) {
				continue
			}
			if err := v.checkCRL(crl, issuer); err != nil {
				return err
			}
			for _, e := range crl.RevokedCertificateEntries {
				if e.SerialNumber.Cmp(cert.SerialNumber) == 0 {
					return fault.New("nitro_cert_revoked", "%q, serial %x, is revoked", cert.Subject, cert.SerialNumber)
				}
			}
			checked[i] = true
		}
	}
	for i := range chain {
		if !checked[i] {
			v.unchecked = append(v.unchecked, "certificate revocation list of "+v.issuer(chain, i).Subject.CommonName)
		}
	}
	return nil
}

// checkCRL verifies form, signature and time of an issuer's revocation list.
func (v *verification) checkCRL(crl *x509.RevocationList, issuer *x509.Certificate) error {
	for _, e := range crl.Extensions {
		if e.Critical { // such as a delta or partial list
			return fault.New("crl_malformed", "revocation list of %q has the critical extension %s", crl.Issuer, e.Id)
		}
	}
	if err := crl.CheckSignatureFrom(issuer); err != nil {
		return fault.Wrap(err, "crl_signature", "revocation list of %q", crl.Issuer)
	}
	if v.at.Before(crl.ThisUpdate) {
		return fault.New("crl_not_yet_valid", "revocation list of %q is of %s, after %s", crl.Issuer, stamp(crl.ThisUpdate), stamp(v.at))
	}
	if crl.NextUpdate.IsZero() || v.at.After(crl.NextUpdate) {
		return fault.New("crl_expired", "revocation list of %q was good until %s, not at %s", crl.Issuer, stamp(crl.NextUpdate), stamp(v.at)).
			WithFix("fetch fresh collateral, or leave the list out")
	}
	v.until(crl.NextUpdate)
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
