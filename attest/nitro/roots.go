// SPDX-License-Identifier: Apache-2.0

package nitro

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
	block, _ := pem.Decode(awsRoot)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic("attest/nitro: the embedded AWS Nitro Enclaves root does not parse: " + err.Error())
	}
	return forBoth(cert, dstack.TrustProduction)
}

// DevelopmentRoots returns the Nitro root of a development trust anchor, for each
// kind of TEE (dev_roots_malformed). Evidence accepted under it says nothing about
// hardware.
func DevelopmentRoots(d *collateral.DevRoots) ([]attest.Roots, error) {
	block, _ := pem.Decode([]byte(d.NitroRootPEM))
	if block == nil {
		return nil, fault.New("dev_roots_malformed", "nitro_root_pem of %q is not PEM", d.Name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fault.Wrap(err, "dev_roots_malformed", "nitro_root_pem of %q", d.Name)
	}
	if fingerprint(cert) == RootG1SHA256 {
		return nil, fault.New("dev_roots_malformed", "development roots %q contain the vendor's root", d.Name)
	}
	return forBoth(cert, dstack.TrustDevelopment), nil
}

func forBoth(cert *x509.Certificate, trust dstack.Trust) []attest.Roots {
	return []attest.Roots{
		{TEE: dstack.Nitro, CA: []*x509.Certificate{cert}, Trust: trust},
		{TEE: dstack.NitroTPM, CA: []*x509.Certificate{cert}, Trust: trust},
	}
}

// fingerprint returns the SHA-256 of a certificate's DER form, in hex.
func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

func describeRoot(cert *x509.Certificate, trust dstack.Trust) string {
	if trust != dstack.TrustProduction {
		// A development root may bear AWS's names; to print them would mislead.
		return fmt.Sprintf("a development root (sha256 %s)", fingerprint(cert))
	}
	return fmt.Sprintf("%s (sha256 %s)", cert.Subject.CommonName, fingerprint(cert))
}
