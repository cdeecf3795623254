// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"slices"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/internal/fault"
)

// maxChain bounds the certificates of one chain (threats.md B15).
const maxChain = 8

// chain is parseChain, remembered.
func (v *verification) chain(role string, data []byte) ([]*x509.Certificate, error) {
	c, err := v.memo.Do("tdx chain", [][]byte{[]byte(role), data}, func() (any, error) { return parseChain(role, data) })
	if err != nil {
		return nil, err
	}
	return c.([]*x509.Certificate), nil
}

// parseChain reads a PEM chain, leaf first. The role begins the codes of errors:
// pck, pck_crl, tcb_info or qe_identity. Hosts end chains with NUL bytes.
func parseChain(role string, data []byte) ([]*x509.Certificate, error) {
	data = bytes.TrimSpace(bytes.TrimRight(data, "\x00"))
	if len(data) == 0 {
		return nil, fault.New(role+"_chain", "there is no %s certificate chain", role)
	}
	var chain []*x509.Certificate
	for len(data) > 0 {
		if !bytes.HasPrefix(data, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, fault.New(role+"_chain", "%s certificate chain has text that is not a PEM certificate", role)
		}
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, fault.New(role+"_chain", "certificate %d of the %s chain is not PEM", len(chain), role)
		}
		if len(chain) == maxChain {
			return nil, fault.New(role+"_chain_length", "%s certificate chain has more than %d certificates", role, maxChain)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fault.Wrap(err, role+"_chain", "certificate %d of the %s chain", len(chain), role)
		}
		if err := checkProfile(cert); err != nil {
			return nil, fault.Wrap(err, role+"_chain", "certificate %d of the %s chain", len(chain), role)
		}
		chain, data = append(chain, cert), bytes.TrimSpace(rest)
	}
	return chain, nil
}

// checkProfile holds a certificate to Intel's profile: P-256 with SHA-256, and
// no critical extension that we do not understand.
func checkProfile(cert *x509.Certificate) error {
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !ok || key.Curve != elliptic.P256():
		return fault.New("chain_algorithm", "%q has a key that is not ECDSA P-256", cert.Subject.CommonName)
	case cert.SignatureAlgorithm != x509.ECDSAWithSHA256:
		return fault.New("chain_algorithm", "%q is signed with %s, want ECDSA-SHA256", cert.Subject.CommonName, cert.SignatureAlgorithm)
	case len(cert.UnhandledCriticalExtensions) > 0:
		return fault.New("chain_extension", "%q has unknown critical extension %s", cert.Subject.CommonName, cert.UnhandledCriticalExtensions[0])
	}
	return nil
}

// chooseRoot finds the trusted certificate that the chain ends in or is signed by.
func (v *verification) chooseRoot(chain []*x509.Certificate, roots []attest.Roots) (dstack.Trust, error) {
	top := chain[len(chain)-1]
	known := 0
	for _, r := range roots {
		if r.TEE != dstack.TDX {
			continue
		}
		for _, ca := range r.CA {
			known++
			if !top.Equal(ca) && (!bytes.Equal(top.RawIssuer, ca.RawSubject) || top.CheckSignatureFrom(ca) != nil) {
				continue
			}
			if v.at.Before(ca.NotBefore) || v.at.After(ca.NotAfter) {
				return "", fault.New("root_expired", "root %q is valid from %s to %s, not at %s", ca.Subject.CommonName, day(ca.NotBefore), day(ca.NotAfter), day(v.at))
			}
			v.anchor = ca
			v.until(ca.NotAfter)
			return r.Trust, nil
		}
	}
	if known == 0 {
		return "", fault.New("no_roots", "no root certificate was given")
	}
	return "", fault.New("unknown_root", "the PCK certificate chain ends in %q (sha256 %s), which is none of the %d given roots",
		top.Subject.CommonName, attest.Fingerprint(top), known)
}

// checkChain verifies a chain of fixed shape: one certificate for each list of
// names, each signed by the next and the last by the anchor, which may itself
// stand at the end. Times, names, CA flags and the root CRL are checked.
func (v *verification) checkChain(role string, chain []*x509.Certificate, names ...[]string) error {
	if chain[len(chain)-1].Equal(v.anchor) {
		chain = chain[:len(chain)-1]
	}
	if len(chain) != len(names) {
		return fault.New(role+"_chain", "%s chain has %d certificates below the root %q, want %d", role, len(chain), v.anchor.Subject.CommonName, len(names))
	}
	for i, cert := range chain {
		issuer := v.anchor
		if i+1 < len(chain) {
			issuer = chain[i+1]
		}
		if !bytes.Equal(cert.RawIssuer, issuer.RawSubject) {
			return fault.New(role+"_chain", "%q of the %s chain names the issuer %q, but %q follows", cert.Subject.CommonName, role, cert.Issuer, issuer.Subject)
		}
		// CheckSignatureFrom also demands that the issuer may sign certificates.
		_, err := v.memo.Do("tdx issued", [][]byte{cert.Raw, issuer.Raw}, func() (any, error) { return nil, cert.CheckSignatureFrom(issuer) })
		if err != nil {
			return fault.Wrap(err, role+"_chain", "signature of %q of the %s chain", cert.Subject.CommonName, role)
		}
		if !slices.Contains(names[i], cert.Subject.CommonName) {
			return fault.New(role+"_role", "certificate %d of the %s chain is %q, want one of %q", i, role, cert.Subject.CommonName, names[i])
		}
		if v.at.Before(cert.NotBefore) || v.at.After(cert.NotAfter) {
			return fault.New(role+"_cert_expired", "%q of the %s chain is valid from %s to %s, not at %s",
				cert.Subject.CommonName, role, day(cert.NotBefore), day(cert.NotAfter), day(v.at))
		}
		v.until(cert.NotAfter)
		if issuer == v.anchor && revoked(v.rootCRL, cert) {
			return fault.New(role+"_issuer_revoked", "%q of the %s chain, serial %x, is revoked by the root", cert.Subject.CommonName, role, cert.SerialNumber)
		}
	}
	return nil
}

// crl reads a DER revocation list and verifies issuer, signature and time.
func (v *verification) crl(what string, der []byte, issuer *x509.Certificate) (*x509.RevocationList, error) {
	if len(der) == 0 {
		return nil, fault.New("crl_missing", "collateral has no %s", what).WithFix("fetch complete collateral")
	}
	read, err := v.memo.Do("tdx crl", [][]byte{[]byte(what), der, issuer.Raw}, func() (any, error) { return readCRL(what, der, issuer) })
	if err != nil {
		return nil, err
	}
	crl := read.(*x509.RevocationList)
	if v.at.Before(crl.ThisUpdate) {
		return nil, fault.New("crl_not_yet_valid", "%s is of %s, after %s", what, day(crl.ThisUpdate), day(v.at))
	}
	if crl.NextUpdate.IsZero() || v.at.After(crl.NextUpdate) {
		return nil, fault.New("crl_expired", "%s was good until %s, not at %s", what, day(crl.NextUpdate), day(v.at)).
			WithFix("fetch fresh collateral, or state the time at which to verify")
	}
	v.until(crl.NextUpdate)
	return crl, nil
}

// readCRL reads a list that the issuer signed.
func readCRL(what string, der []byte, issuer *x509.Certificate) (*x509.RevocationList, error) {
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fault.Wrap(err, "crl_malformed", "%s", what)
	}
	for _, e := range crl.Extensions {
		if e.Critical { // such as a delta or partial list
			return nil, fault.New("crl_malformed", "%s has the critical extension %s", what, e.Id)
		}
	}
	if !bytes.Equal(crl.RawIssuer, issuer.RawSubject) {
		return nil, fault.New("crl_issuer", "%s is issued by %q, want %q", what, crl.Issuer, issuer.Subject)
	}
	if err := crl.CheckSignatureFrom(issuer); err != nil {
		return nil, fault.Wrap(err, "crl_signature", "%s", what)
	}
	return crl, nil
}

func revoked(crl *x509.RevocationList, cert *x509.Certificate) bool {
	return slices.ContainsFunc(crl.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool {
		return e.SerialNumber.Cmp(cert.SerialNumber) == 0
	})
}

func sameKey(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

func day(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// PCKExtension is the SGX extension of a PCK certificate: the identity and the
// certified security version of one platform.
type PCKExtension struct {
	PPID       [16]byte
	Components [16]uint8 // SGX TCB component SVNs
	PCESVN     uint16
	CPUSVN     [16]byte
	PCEID      [2]byte
	FMSPC      [6]byte
}

// parsePCKExtension reads the extension. Every field that verification rests on
// must be there exactly once and have its length.
func parsePCKExtension(cert *x509.Certificate) (PCKExtension, error) {
	var out PCKExtension
	var raw []byte
	for _, e := range cert.Extensions {
		if e.Id.Equal(OIDSGX) { // once: x509 refuses repeated extensions
			raw = e.Value
		}
	}
	top, err := parsePairs(raw)
	if err != nil {
		return out, err
	}
	tcb, err := parsePairs(top[OIDTCB.String()])
	if err != nil {
		return out, err
	}
	for _, f := range []struct {
		oid asn1.ObjectIdentifier
		in  map[string][]byte
		dst []byte
	}{{OIDPPID, top, out.PPID[:]}, {OIDPCEID, top, out.PCEID[:]}, {OIDFMSPC, top, out.FMSPC[:]}, {OIDCPUSVN, tcb, out.CPUSVN[:]}} {
		var v []byte
		rest, err := asn1.Unmarshal(f.in[f.oid.String()], &v)
		if err != nil || len(rest) > 0 || len(v) != len(f.dst) {
			return out, extFault("has no %d-byte field %s", len(f.dst), f.oid)
		}
		copy(f.dst, v)
	}
	number := func(oid asn1.ObjectIdentifier, max int) (int, error) {
		var v int
		rest, err := asn1.Unmarshal(tcb[oid.String()], &v)
		if err != nil || len(rest) > 0 || v < 0 || v > max {
			return 0, extFault("has no number from 0 to %d in field %s", max, oid)
		}
		return v, nil
	}
	for i := range out.Components {
		v, err := number(append(slices.Clone(OIDTCB), i+1), 255)
		if err != nil {
			return out, err
		}
		out.Components[i] = uint8(v)
	}
	v, err := number(OIDPCESVN, 65535)
	out.PCESVN = uint16(v)
	return out, err
}

// parsePairs reads SEQUENCE OF SEQUENCE {OID, value} into value DER by OID.
func parsePairs(der []byte) (map[string][]byte, error) {
	var seq []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &seq); err != nil || len(rest) > 0 {
		return nil, extFault("is missing or not a sequence")
	}
	out := map[string][]byte{}
	for _, item := range seq {
		var oid asn1.ObjectIdentifier
		value, err := asn1.Unmarshal(item.Bytes, &oid)
		if err != nil || item.Tag != asn1.TagSequence {
			return nil, extFault("holds something that is not a pair of identifier and value")
		}
		if _, dup := out[oid.String()]; dup {
			return nil, extFault("has field %s twice", oid)
		}
		out[oid.String()] = value
	}
	return out, nil
}

func extFault(format string, args ...any) error {
	return fault.New("pck_extension", "the SGX extension of the PCK certificate "+format, args...)
}
