// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/cca"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/sevsnp"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/collateral"
)

// tees are the kinds of TEE that this version verifies.
var tees = map[dstack.TEE]attest.Verify{
	dstack.TDX:      tdx.Verify,
	dstack.SEVSNP:   sevsnp.Verify,
	dstack.CCA:      cca.Verify,
	dstack.TPM:      tpm.Verify,
	dstack.Nitro:    nitro.Verify,
	dstack.NitroTPM: nitro.Verify,
}

// tdxAttributes are the TD attributes that a policy may accept, by name.
var tdxAttributes = map[string]uint64{"pks": tdx.AttrPKS, "kl": tdx.AttrKL, "perfmon": tdx.AttrPerfmon}

// VendorRoots returns the roots of real hardware, of every kind of TEE.
func VendorRoots() []attest.Roots {
	return append([]attest.Roots{tdx.VendorRoots(), sevsnp.VendorRoots(), tpm.VendorRoots()}, nitro.VendorRoots()...)
}

// CallerKeys returns public keys of Arm CCA platforms as roots on the caller's own
// word: no public authority vouches for them.
func CallerKeys(keys []collateral.NamedKey) attest.Roots {
	var list []attest.RootKey
	for _, k := range keys {
		list = append(list, attest.RootKey{Name: k.Name, Key: k.Key})
	}
	return cca.CallerRoots(list...)
}

// DevelopmentRoots returns the roots of a development trust anchor. Evidence
// accepted under them says nothing about hardware.
func DevelopmentRoots(d *collateral.DevRoots) ([]attest.Roots, error) {
	var out []attest.Roots
	for _, kind := range []struct {
		text string
		read func(*collateral.DevRoots) (attest.Roots, error)
	}{
		{d.TDXRootPEM, tdx.DevelopmentRoots}, {d.SNPRootPEM, sevsnp.DevelopmentRoots}, {d.TPMRootPEM, tpm.DevelopmentRoots}, {d.CCAKeyPEM, cca.DevelopmentRoots},
	} {
		if kind.text == "" {
			continue
		}
		r, err := kind.read(d)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	if d.NitroRootPEM != "" {
		both, err := nitro.DevelopmentRoots(d)
		if err != nil {
			return nil, err
		}
		out = append(out, both...)
	}
	return out, nil
}

// CollateralFor names the collateral that evidence needs and that can be fetched:
// of TDX and SEV-SNP. ok is false for other kinds, which bring theirs along.
func CollateralFor(src *Source) (want collateral.Request, ok bool, err error) {
	e, err := src.decode()
	if err != nil {
		return want, false, err
	}
	switch e.TEE {
	case dstack.TDX:
		want, err = tdx.Request(e.Quote)
	case dstack.SEVSNP:
		want, err = sevsnp.Request(e.Quote)
	default:
		return want, false, nil
	}
	return want, err == nil, err
}
