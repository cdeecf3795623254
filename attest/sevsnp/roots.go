// SPDX-License-Identifier: Apache-2.0

package sevsnp

import (
	"crypto/sha256"
	"crypto/x509"
	"embed"
	"encoding/hex"
	"encoding/pem"
	"fmt"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// AMD root keys (ARK), the second certificate of
//
//	https://kdsintf.amd.com/vcek/v1/Milan/cert_chain
//	https://kdsintf.amd.com/vcek/v1/Genoa/cert_chain
//	https://kdsintf.amd.com/vcek/v1/Turin/cert_chain
//
//go:embed roots/*.pem
var rootFiles embed.FS

// SHA-256 fingerprints of the DER form of AMD's roots.
const (
	MilanRootSHA256 = "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"
	GenoaRootSHA256 = "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"
	TurinRootSHA256 = "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"
)

// VendorRoots returns the roots of real hardware: AMD's for Milan, Genoa and Turin.
func VendorRoots() attest.Roots {
	roots := attest.Roots{TEE: dstack.SEVSNP, Trust: dstack.TrustProduction}
	for _, name := range []string{"milan", "genoa", "turin"} {
		text, err := rootFiles.ReadFile("roots/ark-" + name + ".pem")
		if err != nil {
			panic("attest/sevsnp: no embedded root for " + name)
		}
		block, _ := pem.Decode(text)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			panic("attest/sevsnp: the embedded root for " + name + " does not parse: " + err.Error())
		}
		roots.CA = append(roots.CA, cert)
	}
	return roots
}

// DevelopmentRoots returns the root of a development trust anchor. Evidence
// accepted under it says nothing about hardware.
func DevelopmentRoots(d *collateral.DevRoots) (attest.Roots, error) {
	block, _ := pem.Decode([]byte(d.SNPRootPEM))
	if block == nil {
		return attest.Roots{}, fault.New("dev_roots_malformed", "sev_snp_root_pem of %q is not PEM", d.Name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return attest.Roots{}, fault.Wrap(err, "dev_roots_malformed", "sev_snp_root_pem of %q", d.Name)
	}
	for _, vendor := range VendorRoots().CA {
		if cert.Equal(vendor) {
			return attest.Roots{}, fault.New("dev_roots_malformed", "development roots %q contain the vendor's root", d.Name)
		}
	}
	return attest.Roots{TEE: dstack.SEVSNP, CA: []*x509.Certificate{cert}, Trust: dstack.TrustDevelopment}, nil
}

// Fingerprint returns the SHA-256 of a certificate's DER form, in hex.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

func describeRoot(cert *x509.Certificate, trust dstack.Trust) string {
	if trust != dstack.TrustProduction {
		// A development root bears AMD's name, since the name tells the product line; to
		// print it would make it look like AMD's.
		return fmt.Sprintf("a development root (sha256 %s)", Fingerprint(cert))
	}
	return fmt.Sprintf("%s (sha256 %s)", cert.Subject.CommonName, Fingerprint(cert))
}
