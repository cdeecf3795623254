// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"slices"
	"time"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
)

// Issued recognises a server by the key that issued its certificate and by what
// the issuer says the certificate is for. That is how guests know a KMS, of which
// the measured manifest pins the root's key: the root's certificate differs between
// replicas, its key does not (kms.md §2.4). All is checked inside the handshake, on
// each connection (threats.md C03); no system root counts.
//
// The zero value can judge nobody.
type Issued struct {
	// Issuer is the DER SubjectPublicKeyInfo, P-256, that must have signed the leaf
	// itself. Nil takes any issuer: a first contact, with which FirstContact must be
	// set, and after which the caller dials again with the issuer he learned.
	Issuer []byte
	// FirstContact says that any issuer will do. What such a connection carries is
	// the word of whoever is in between.
	FirstContact bool
	// Usage is what the leaf must be for, such as ratls.UsageKMS; required.
	Usage string
	// Check, if any, judges a leaf that passed everything else, such as by the
	// evidence in it.
	Check func(leaf *x509.Certificate) error
	// Certificate, if any, is this end's own, for a server that asks.
	Certificate *tls.Certificate
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Config returns the TLS 1.3 configuration of a client that connects to host, a
// name or an address. Its handshakes fail with the codes channel_certificate_time,
// channel_certificate_name, channel_issuer, channel_usage, those of
// ratls.IssuerClaims and of Check. Code channel_config.
func (i Issued) Config(host string) (*tls.Config, error) {
	bad := func(why string) (*tls.Config, error) {
		return nil, fault.New("channel_config", "a server by its issuer: %s", why)
	}
	switch {
	case host == "":
		return bad("there is no host")
	case i.Usage == "":
		return bad("there is no usage")
	case (i.Issuer == nil) != i.FirstContact:
		return bad("either the issuer is known or this is the first contact")
	}
	var issuer *ecdsa.PublicKey
	if i.Issuer != nil {
		parsed, err := x509.ParsePKIXPublicKey(i.Issuer)
		key, ok := parsed.(*ecdsa.PublicKey)
		if err != nil || !ok || key.Curve != elliptic.P256() {
			return bad("the issuer's key is not a P-256 key in DER")
		}
		issuer = key
	}
	now := i.Now
	if now == nil {
		now = time.Now
	}
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         host,
		NextProtos:         []string{"http/1.1"},
		Time:               now,
		InsecureSkipVerify: true, // the issuer's key takes the place of an authority
		VerifyConnection: func(cs tls.ConnectionState) error {
			return i.judge(cs, host, issuer, now())
		},
	}
	if i.Certificate != nil {
		// Whatever authorities the server names: there is one certificate to show.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return i.Certificate, nil }
	}
	return cfg, nil
}

func (i Issued) judge(cs tls.ConnectionState, host string, issuer *ecdsa.PublicKey, now time.Time) error {
	if cs.DidResume {
		return fault.New("channel_handshake", "the session is resumed")
	}
	if _, err := leafSPKI(cs); err != nil {
		return err
	}
	leaf := cs.PeerCertificates[0]
	if issuer != nil {
		if err := CheckIssuer(leaf, i.Issuer); err != nil {
			return err
		}
	}
	claims, err := ratls.IssuerClaims(leaf)
	switch {
	case err != nil:
		return err
	case claims.Usage != i.Usage:
		return fault.New("channel_usage", "the server's certificate is for %q, not for %q", claims.Usage, i.Usage).
			WithFix("check the address: another program answers there")
	case leaf.IsCA, len(leaf.UnhandledCriticalExtensions) > 0,
		len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth):
		return fault.New("channel_usage", "the server's certificate is none of a server")
	case now.Before(leaf.NotBefore) || now.After(leaf.NotAfter):
		return fault.New("channel_certificate_time", "the certificate of the server is valid from %s to %s, not now",
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	if err := leaf.VerifyHostname(host); err != nil {
		return fault.Wrap(err, "channel_certificate_name", "the certificate of the server").WithFix("use the name that the certificate has")
	}
	if i.Check != nil {
		return i.Check(leaf)
	}
	return nil
}

// CheckIssuer checks that a certificate was signed by a P-256 key, given as DER
// SubjectPublicKeyInfo. Code channel_issuer.
func CheckIssuer(cert *x509.Certificate, spki []byte) error {
	parsed, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return fault.Wrap(err, "channel_issuer", "the issuer's key")
	}
	// An authority that has nothing but the key: its name and dates are of no account.
	by := &x509.Certificate{PublicKeyAlgorithm: x509.ECDSA, PublicKey: parsed}
	if cert.SignatureAlgorithm != x509.ECDSAWithSHA256 || by.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature) != nil {
		return fault.New("channel_issuer", "the server's certificate is not signed by the key that is expected").
			WithFix("the address leads to another server than the one that is meant, or its root key is another")
	}
	return nil
}
