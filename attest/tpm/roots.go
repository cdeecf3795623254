// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"crypto/x509"
	_ "embed"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
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
	return roots(attest.EmbeddedRoot(googleRoot, GoogleRootSHA256), dstack.TrustProduction)
}

// DevelopmentRoots returns the root of a development trust anchor. Evidence
// accepted under it says nothing about hardware. The code is dev_roots_malformed.
func DevelopmentRoots(d *collateral.DevRoots) (attest.Roots, error) {
	cert, err := attest.DevelopmentRoot(d.Name, "tpm_root_pem", d.TPMRootPEM, GoogleRootSHA256)
	if err != nil {
		return attest.Roots{}, err
	}
	return roots(cert, dstack.TrustDevelopment), nil
}

func roots(ca *x509.Certificate, trust dstack.Trust) attest.Roots {
	return attest.Roots{TEE: dstack.TPM, CA: []*x509.Certificate{ca}, Trust: trust}
}
