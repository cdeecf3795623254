// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Fingerprint returns the SHA-256 of a certificate's DER form, as 64 lowercase
// hexadecimal digits.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// EmbeddedRoot reads a vendor's root that the program was built with, in PEM. It
// panics when that is not the certificate of the fingerprint: such a program must
// not run.
func EmbeddedRoot(text []byte, fingerprint string) *x509.Certificate {
	block, _ := pem.Decode(text)
	if block == nil {
		panic("the embedded root " + fingerprint + " is not PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil || Fingerprint(cert) != fingerprint {
		panic(fmt.Sprintf("the embedded root is not the certificate %s: %v", fingerprint, err))
	}
	return cert
}

// DevelopmentRoot reads the root of a development trust anchor of some name from one
// of its fields, in PEM. A root with one of the vendor's fingerprints is refused. The
// code is dev_roots_malformed.
func DevelopmentRoot(name, field, text string, vendor ...string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, fault.New("dev_roots_malformed", "%s of %q is not PEM", field, name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fault.Wrap(err, "dev_roots_malformed", "%s of %q", field, name)
	}
	for _, f := range vendor {
		if Fingerprint(cert) == f {
			return nil, fault.New("dev_roots_malformed", "development roots %q contain the vendor's root", name)
		}
	}
	return cert, nil
}

// DescribeRoot names a root for people. Anyone can give a root of his own a vendor's
// name, and verification demands those names; to print them for a development root
// would make it look like the vendor's.
func DescribeRoot(cert *x509.Certificate, trust dstack.Trust) string {
	if trust == dstack.TrustDevelopment {
		return fmt.Sprintf("a development root (sha256 %s)", Fingerprint(cert))
	}
	return fmt.Sprintf("%s (sha256 %s)", cert.Subject.CommonName, Fingerprint(cert))
}
