// SPDX-License-Identifier: Apache-2.0

package ratls

import (
	"bytes"
	"crypto/x509"
	"slices"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// CheckStandalone checks the form of a certificate that is judged from a file,
// with no connection to prove possession of its key: its signature is by its own
// key, it is valid at the given time, it is for signing in a TLS handshake as
// server or client, and it names someone (verifier.md §5). That makes the
// certificate whole; who holds the key, only its evidence says.
//
// Codes: ratls_not_self_signed, ratls_not_yet_valid, ratls_expired,
// ratls_key_usage, ratls_ext_key_usage, ratls_no_name.
func CheckStandalone(cert *x509.Certificate, at time.Time) error {
	if !bytes.Equal(cert.RawIssuer, cert.RawSubject) {
		return fault.New("ratls_not_self_signed", "the certificate is not self-signed: issuer and subject differ").
			WithFix("verify the chain of an issued certificate to its issuer instead")
	}
	if err := cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		return fault.Wrap(err, "ratls_not_self_signed", "the certificate is not signed by its own key")
	}
	switch {
	case at.Before(cert.NotBefore):
		return fault.New("ratls_not_yet_valid", "the certificate is valid from %s on", cert.NotBefore.UTC().Format(time.RFC3339))
	case at.After(cert.NotAfter):
		return fault.New("ratls_expired", "the certificate expired at %s", cert.NotAfter.UTC().Format(time.RFC3339))
	case cert.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return fault.New("ratls_key_usage", "the certificate's key is not for digital signatures")
	case !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return fault.New("ratls_ext_key_usage", "the certificate is neither for TLS servers nor for TLS clients")
	case len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses)+len(cert.URIs) == 0:
		return fault.New("ratls_no_name", "the certificate has no subject alternative name")
	}
	return nil
}
