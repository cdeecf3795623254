// SPDX-License-Identifier: Apache-2.0

// Package peer is how a guest judges the services that its manifest names: the KMS that
// it takes keys from, the gateways that it gives its traffic to. What counts is their
// evidence, held against the measured policy.
//
// Trusted: the policy, which is measured. Attacker-controlled: the evidence.
package peer

import (
	"time"

	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/channel/appraiser"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/fetch"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/verifier"
)

// statuses are the TCB statuses of a machine whose service is believed: those of which the
// firmware is current.
var statuses = []string{tdx.UpToDate, tdx.SWHardeningNeeded, tdx.ConfigurationNeeded, tdx.ConfigurationAndSWHardeningNeeded}

// The wait for collateral ends before a connection's does, for the failure to say what
// was waited for.
const (
	collateralAttempt = 6 * time.Second
	collateralLimit   = 15 * time.Second
)

// Appraiser is the judge that a manifest's kms_policy or gateway_policy (field) describes,
// and whom it means. pccs is where the vendors' statements are, which roots for
// development bring along: those count in an image for development only, and then alone.
// Codes: peer_dev_roots, dev_roots_malformed, collateral_url.
func Appraiser(field string, p *manifest.PeerPolicy, development bool, pccs string) (channel.Appraiser, channel.Intended, error) {
	fail := func(err error) (channel.Appraiser, channel.Intended, error) { return nil, channel.Intended{}, err }
	source, err := fetch.NewPCS(fetch.PCSOptions{Base: pccs, HTTP: fetch.HTTP{Timeout: collateralAttempt, Total: collateralLimit}})
	if err != nil {
		return fail(err)
	}
	registers := map[string][]collateral.Hex{}
	for name, values := range p.Registers {
		for _, v := range values {
			registers[name] = append(registers[name], v)
		}
	}
	app := p.AppID
	a := &appraiser.Appraiser{
		Roots: verifier.VendorRoots(), Collateral: source,
		Policy: verifier.Policy{
			TCB: verifier.TCBPolicy{Accept: statuses}, Devices: p.Devices, Registers: registers,
			Workload: verifier.WorkloadPolicy{AppID: &app, ComposeHashes: p.ComposeHashes, ImageHashes: p.OSImageHashes},
		},
	}
	if p.DevRoots != "" {
		if !development {
			return fail(fault.New("peer_dev_roots", "%s of the manifest names development roots, which an image for production does not believe", field).
				WithFix("remove dev_roots from %s, or use an image for development", field))
		}
		dev, err := collateral.ParseDevRoots([]byte(p.DevRoots))
		if err != nil {
			return fail(err)
		}
		if a.Roots, err = verifier.DevelopmentRoots(dev); err != nil {
			return fail(err)
		}
		a.Collateral, a.Policy.DevRoots = collateral.Static{Bundle: dev.Bundle()}, true
	}
	return a, channel.Intended{AppID: app, ComposeHashes: p.ComposeHashes}, nil
}
