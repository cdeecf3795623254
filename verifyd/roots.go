// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"crypto/x509"
	"encoding/pem"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// trustAnchors returns the roots that count: the vendors', but for those that the
// configuration puts others in place of. Those are of development trust. The
// collateral of a development installation is returned beside them.
func (a *Attestation) trustAnchors() ([]attest.Roots, *collateral.Bundle, error) {
	roots := verifier.VendorRoots()
	for _, r := range []struct {
		path   string
		tee    dstack.TEE
		vendor string // common name of the root replaced; empty: every root of the TEE
	}{
		{a.RootCA.TDX, dstack.TDX, ""}, {a.RootCA.GCPTPM, dstack.TPM, ""},
		{a.RootCA.AWSNitroEnclave, dstack.Nitro, ""}, {a.RootCA.AWSNitroTPM, dstack.NitroTPM, ""},
		{a.RootCA.SEVSNPMilan, dstack.SEVSNP, "ARK-Milan"}, {a.RootCA.SEVSNPGenoa, dstack.SEVSNP, "ARK-Genoa"}, {a.RootCA.SEVSNPTurin, dstack.SEVSNP, "ARK-Turin"},
	} {
		if r.path == "" {
			continue
		}
		cert, err := readCA(r.path)
		if err != nil {
			return nil, nil, err
		}
		for i := range roots {
			if roots[i].TEE == r.tee && roots[i].Trust == dstack.TrustProduction {
				roots[i].CA = slices.DeleteFunc(slices.Clone(roots[i].CA), func(c *x509.Certificate) bool {
					return r.vendor == "" || c.Subject.CommonName == r.vendor
				})
			}
		}
		roots = append(roots, attest.Roots{TEE: r.tee, Trust: dstack.TrustDevelopment, CA: []*x509.Certificate{cert}})
	}
	if a.DevelopmentRoots == "" {
		return roots, nil, nil
	}
	data, err := readBounded(a.DevelopmentRoots, collateral.MaxBundle)
	if err != nil {
		return nil, nil, err
	}
	dev, err := collateral.ParseDevRoots(data)
	if err != nil {
		return nil, nil, err
	}
	more, err := verifier.DevelopmentRoots(dev)
	if err != nil {
		return nil, nil, err
	}
	return append(roots, more...), dev.Bundle(), nil
}

// readCA reads one CA certificate, PEM or DER.
func readCA(path string) (*x509.Certificate, error) {
	data, err := readBounded(path, collateral.MaxCert)
	if err != nil {
		return nil, err
	}
	if strings.Contains(string(data), "-----BEGIN") {
		block, rest := pem.Decode(data)
		if block == nil || block.Type != "CERTIFICATE" || strings.TrimSpace(string(rest)) != "" {
			return nil, fault.New("trust_anchor", "%s is not exactly one certificate", path)
		}
		data = block.Bytes
	}
	cert, err := x509.ParseCertificate(data)
	if err != nil {
		return nil, fault.Wrap(err, "trust_anchor", "%s is not a certificate, PEM or DER", path)
	}
	if !cert.BasicConstraintsValid || !cert.IsCA {
		return nil, fault.New("trust_anchor", "%s is not the certificate of an authority", path)
	}
	return cert, nil
}

// readBounded reads a file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(err, "file_missing", "read a file")
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fault.Wrap(err, "file_missing", "read %s", path)
	}
	if int64(len(data)) > limit {
		return nil, fault.New("file_too_large", "%s has more than %d bytes", path, limit)
	}
	return data, nil
}
