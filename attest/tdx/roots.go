// SPDX-License-Identifier: Apache-2.0

package tdx

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

// intelRoot is the Intel SGX Root CA, published at
// https://certificates.trustedservices.intel.com/Intel_SGX_Provisioning_Certification_RootCA.pem
//
//go:embed roots/intel-sgx-root-ca.pem
var intelRoot []byte

// IntelRootSHA256 is the SHA-256 fingerprint of the Intel SGX Root CA's DER form.
const IntelRootSHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"

// VendorRoots returns the roots of real hardware: the Intel SGX Root CA.
func VendorRoots() attest.Roots {
	block, _ := pem.Decode(intelRoot)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic("attest/tdx: the embedded Intel SGX Root CA does not parse: " + err.Error())
	}
	return attest.Roots{TEE: dstack.TDX, CA: []*x509.Certificate{cert}, Trust: dstack.TrustProduction}
}

// DevelopmentRoots returns the root of a development trust anchor. Evidence
// accepted under it says nothing about hardware.
func DevelopmentRoots(d *collateral.DevRoots) (attest.Roots, error) {
	block, _ := pem.Decode([]byte(d.TDXRootPEM))
	if block == nil {
		return attest.Roots{}, fault.New("dev_roots_malformed", "tdx_root_pem of %q is not PEM", d.Name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return attest.Roots{}, fault.Wrap(err, "dev_roots_malformed", "tdx_root_pem of %q", d.Name)
	}
	if Fingerprint(cert) == IntelRootSHA256 {
		return attest.Roots{}, fault.New("dev_roots_malformed", "development roots %q contain the vendor's root", d.Name)
	}
	return attest.Roots{TEE: dstack.TDX, CA: []*x509.Certificate{cert}, Trust: dstack.TrustDevelopment}, nil
}

// Fingerprint returns the SHA-256 of a certificate's DER form, in hex.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

func describeRoot(cert *x509.Certificate, trust dstack.Trust) string {
	if trust != dstack.TrustProduction {
		// Verifiers demand Intel's names of every chain, so a development root bears
		// them too; to print its name would make it look like Intel's.
		return fmt.Sprintf("a development root (sha256 %s)", Fingerprint(cert))
	}
	return fmt.Sprintf("%s (sha256 %s)", cert.Subject.CommonName, Fingerprint(cert))
}
