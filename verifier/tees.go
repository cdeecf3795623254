// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/collateral"
)

// tees are the kinds of TEE that this version verifies.
var tees = map[dstack.TEE]attest.Verify{
	dstack.TDX: tdx.Verify,
}

// tdxAttributes are the TD attributes that a policy may accept, by name.
var tdxAttributes = map[string]uint64{"pks": tdx.AttrPKS, "kl": tdx.AttrKL, "perfmon": tdx.AttrPerfmon}

// VendorRoots returns the roots of real hardware, of every kind of TEE.
func VendorRoots() []attest.Roots {
	return []attest.Roots{tdx.VendorRoots()}
}

// DevelopmentRoots returns the roots of a development trust anchor. Evidence
// accepted under them says nothing about hardware.
func DevelopmentRoots(d *collateral.DevRoots) ([]attest.Roots, error) {
	var out []attest.Roots
	if d.TDXRootPEM != "" {
		r, err := tdx.DevelopmentRoots(d)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}
