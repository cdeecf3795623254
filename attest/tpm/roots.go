// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"crypto/sha256"
	"crypto/x509"
	_ "embed"
	"encoding/hex"
	"encoding/pem"
	"fmt"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// googleRoot is Google Cloud's EK/AK CA Root, published at
// http://privateca-content-62d71773-0000-21da-852e-f4f5e80d7778.storage.googleapis.com/032bf9d39db4fa06aade/ca.crt
//
//go:embed roots/google-ek-ak-root.pem
var googleRoot []byte

// GoogleRootSHA256 is the SHA-256 fingerprint of that root's DER form.
const GoogleRootSHA256 = "594759594b9b61524f6c8ef668f7177f7b9066bc0674f2f49fe9e052be78beb2"

// VendorRoots returns the roots over attestation keys of real TPMs: Google Cloud's
// EK/AK CA Root, which certifies the vTPMs of its confidential VMs.
func VendorRoots() attest.Roots {
	block, _ := pem.Decode(googleRoot)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic("attest/tpm: the embedded EK/AK CA Root does not parse: " + err.Error())
	}
	return attest.Roots{TEE: dstack.TPM, CA: []*x509.Certificate{cert}, Trust: dstack.TrustProduction}
}

// DevelopmentRoots returns the root of a development trust anchor. Evidence
// accepted under it says nothing about hardware. The code is dev_roots_malformed.
func DevelopmentRoots(d *collateral.DevRoots) (attest.Roots, error) {
	block, _ := pem.Decode([]byte(d.TPMRootPEM))
	if block == nil {
		return attest.Roots{}, fault.New("dev_roots_malformed", "tpm_root_pem of %q is not PEM", d.Name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return attest.Roots{}, fault.Wrap(err, "dev_roots_malformed", "tpm_root_pem of %q", d.Name)
	}
	if Fingerprint(cert) == GoogleRootSHA256 {
		return attest.Roots{}, fault.New("dev_roots_malformed", "development roots %q contain the vendor's root", d.Name)
	}
	return attest.Roots{TEE: dstack.TPM, CA: []*x509.Certificate{cert}, Trust: dstack.TrustDevelopment}, nil
}

// Fingerprint returns the SHA-256 of a certificate's DER form, in hex.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

func describeRoot(cert *x509.Certificate, trust dstack.Trust) string {
	if trust == dstack.TrustDevelopment {
		// Anyone can give a root any name; to print it would make it look like a vendor's.
		return fmt.Sprintf("a development root (sha256 %s)", Fingerprint(cert))
	}
	return fmt.Sprintf("%s (sha256 %s)", cert.Subject.CommonName, Fingerprint(cert))
}
