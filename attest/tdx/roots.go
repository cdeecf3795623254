// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"crypto/x509"
	_ "embed"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
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
	return roots(attest.EmbeddedRoot(intelRoot, IntelRootSHA256), dstack.TrustProduction)
}

// DevelopmentRoots returns the root of a development trust anchor. Evidence
// accepted under it says nothing about hardware.
func DevelopmentRoots(d *collateral.DevRoots) (attest.Roots, error) {
	cert, err := attest.DevelopmentRoot(d.Name, "tdx_root_pem", d.TDXRootPEM, IntelRootSHA256)
	if err != nil {
		return attest.Roots{}, err
	}
	return roots(cert, dstack.TrustDevelopment), nil
}

func roots(ca *x509.Certificate, trust dstack.Trust) attest.Roots {
	return attest.Roots{TEE: dstack.TDX, CA: []*x509.Certificate{ca}, Trust: trust}
}
