// SPDX-License-Identifier: Apache-2.0

package sevsnp

import (
	"crypto/x509"
	_ "embed"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
)

// AMD root keys (ARK), the second certificate of
//
//	https://kdsintf.amd.com/vcek/v1/Milan/cert_chain
//	https://kdsintf.amd.com/vcek/v1/Genoa/cert_chain
//	https://kdsintf.amd.com/vcek/v1/Turin/cert_chain
var (
	//go:embed roots/ark-milan.pem
	milanRoot []byte
	//go:embed roots/ark-genoa.pem
	genoaRoot []byte
	//go:embed roots/ark-turin.pem
	turinRoot []byte
)

// SHA-256 fingerprints of the DER form of AMD's roots.
const (
	MilanRootSHA256 = "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"
	GenoaRootSHA256 = "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"
	TurinRootSHA256 = "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"
)

// VendorRoots returns the roots of real hardware: AMD's for Milan, Genoa and Turin.
func VendorRoots() attest.Roots {
	return attest.Roots{TEE: dstack.SEVSNP, Trust: dstack.TrustProduction, CA: []*x509.Certificate{
		attest.EmbeddedRoot(milanRoot, MilanRootSHA256),
		attest.EmbeddedRoot(genoaRoot, GenoaRootSHA256),
		attest.EmbeddedRoot(turinRoot, TurinRootSHA256),
	}}
}

// DevelopmentRoots returns the root of a development trust anchor. Evidence
// accepted under it says nothing about hardware.
func DevelopmentRoots(d *collateral.DevRoots) (attest.Roots, error) {
	cert, err := attest.DevelopmentRoot(d.Name, "sev_snp_root_pem", d.SNPRootPEM, MilanRootSHA256, GenoaRootSHA256, TurinRootSHA256)
	if err != nil {
		return attest.Roots{}, err
	}
	return attest.Roots{TEE: dstack.SEVSNP, CA: []*x509.Certificate{cert}, Trust: dstack.TrustDevelopment}, nil
}
