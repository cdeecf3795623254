// SPDX-License-Identifier: Apache-2.0

package nitro

import (
	"slices"
	"testing"

	"github.com/dstack-go/dstack/attest/nitro/nitrotest"
	"github.com/dstack-go/dstack/collateral"
)

func TestWhatHasNoRevocationListIsNoted(t *testing.T) {
	m := nitrotest.New(t)
	check := func(lists ...collateral.Hex) []string {
		t.Helper()
		d, err := ParseDocument(m.Quote())
		if err != nil {
			t.Fatal(err)
		}
		chain, err := parseChain(d)
		if err != nil {
			t.Fatal(err)
		}
		v := verification{at: nitrotest.At}
		if err := v.chooseRoot(d.Kind, chain, m.Roots()); err != nil {
			t.Fatal(err)
		}
		if err := v.checkRevocation(chain, lists); err != nil {
			t.Fatal(err)
		}
		return v.unchecked
	}
	all := []string{
		"certificate revocation list of instance.nitrotest", "certificate revocation list of zone.nitrotest",
		"certificate revocation list of region.nitrotest", "certificate revocation list of nitrotest",
	}
	if got := check(); !slices.Equal(got, all) {
		t.Errorf("without lists: %q", got)
	}
	if got := check(m.Sign(nitrotest.Revoke(m.Zone))); !slices.Equal(got, []string{all[0], all[2], all[3]}) {
		t.Errorf("with the zone's list: %q", got)
	}
	if got := check(m.Sign(nitrotest.Revoke(m.Root)), m.Sign(nitrotest.Revoke(m.Region)), m.Sign(nitrotest.Revoke(m.Zone)), m.Sign(nitrotest.Revoke(m.Instance))); len(got) > 0 {
		t.Errorf("with all lists: %q", got)
	}
}
