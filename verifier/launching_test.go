// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"slices"
	"testing"

	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/eventlog"
)

// booting ends the log where a guest asks for its keys.
func booting(events []eventlog.Event) []eventlog.Event {
	end := slices.IndexFunc(events, func(e eventlog.Event) bool { return e.Name == eventlog.BootMRDone })
	return events[:end+1]
}

func TestAGuestThatAsksForItsKeysIsJudgedWhenThatIsMeant(t *testing.T) {
	for _, c := range []struct {
		name      string
		launching bool
		edit      func(*guest)
		code      string
	}{
		{"at boot-mr-done", true, func(g *guest) {}, ""},
		{"with a key provider that is pinned and not measured yet", true, func(g *guest) { g.document.KeyProviderID = []byte{1, 2} }, ""},
		{"by a relying party of what runs", false, func(g *guest) {}, "log_boundary_missing"},
		{"before boot-mr-done", true, func(g *guest) {
			g.edit.runtime = func(e []eventlog.Event) []eventlog.Event { b := booting(e); return b[:len(b)-1] }
		}, "log_boundary_missing"},
		{"with a document of another manifest", true, func(g *guest) { g.document.ComposeHash[0] ^= 1 }, "mr_config_mismatch"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuest(t)
			g.edit.runtime = booting
			c.edit(g)
			r, want := g.request(), binding.Envelope(g.nonce, g.spki, g.app, g.instance)
			v := Appraise(Request{
				Source: g.evidence(), Roots: r.roots, Collateral: r.col, Reference: r.ref, Policy: r.pol, At: r.at,
				Freshness: Freshness{ReportData: want[:]}, Launching: c.launching,
			})
			if c.code == "" && !v.Accepted || c.code != "" && !v.Has(Error, c.code) {
				t.Errorf("want %q, got\n%s", c.code, v)
			}
		})
	}
}
