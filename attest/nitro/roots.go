// SPDX-License-Identifier: Apache-2.0

package nitro

import (
	"crypto/x509"
	_ "embed"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
)

// awsRoot is the AWS Nitro Enclaves root G1, published at
// https://aws-nitro-enclaves.amazonaws.com/AWS_NitroEnclaves_Root-G1.zip
//
//go:embed roots/aws-nitro-enclaves-root-g1.pem
var awsRoot []byte

// RootG1SHA256 is the SHA-256 fingerprint of the AWS Nitro Enclaves root G1's DER
// form.
const RootG1SHA256 = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"

// VendorRoots returns the root of real hardware, the AWS Nitro Enclaves root G1,
// under which enclaves and NitroTPMs both are: once for each kind of TEE.
func VendorRoots() []attest.Roots {
	return forBoth(attest.EmbeddedRoot(awsRoot, RootG1SHA256), dstack.TrustProduction)
}

// DevelopmentRoots returns the Nitro root of a development trust anchor, for each
// kind of TEE (dev_roots_malformed). Evidence accepted under it says nothing about
// hardware.
func DevelopmentRoots(d *collateral.DevRoots) ([]attest.Roots, error) {
	cert, err := attest.DevelopmentRoot(d.Name, "nitro_root_pem", d.NitroRootPEM, RootG1SHA256)
	if err != nil {
		return nil, err
	}
	return forBoth(cert, dstack.TrustDevelopment), nil
}

func forBoth(cert *x509.Certificate, trust dstack.Trust) []attest.Roots {
	return []attest.Roots{
		{TEE: dstack.Nitro, CA: []*x509.Certificate{cert}, Trust: trust},
		{TEE: dstack.NitroTPM, CA: []*x509.Certificate{cert}, Trust: trust},
	}
}
