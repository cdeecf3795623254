// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// allowing is what contracts that allow the guest say.
func allowing(g *guest, v *Verdict) *Governance {
	block := testTime.Add(-time.Minute)
	return &Governance{
		ChainID: 1, Registry: "0x00000000000000000000000000000000000000aa", Block: 77, BlockHash: "0x" + strings.Repeat("5b", 32), BlockTime: block,
		Threshold: 2, Endpoints: 3, AppID: g.app, ComposeHash: g.composeHash(), DeviceID: v.Platform.DeviceID, OSImageHash: g.image.String(), Allowed: true,
		NoticeSeconds: 48 * 3600, RegistryNoticeSeconds: 48 * 3600, Announced: block.Add(-72 * time.Hour),
	}
}

// G06: what the contracts say is in the verdict, and a policy can demand how long they
// announce what they are to allow.
func TestThreat_G06_VerdictsDemandNotice(t *testing.T) {
	g := newGuest(t)
	src := g.evidence()
	plain := g.request().appraise(src)
	if !plain.Accepted || plain.Governance != nil {
		t.Fatal(show(plain))
	}
	day := int64(24 * 3600)
	for _, c := range []struct {
		name string
		edit func(*Governance, *GovernancePolicy)
		code string // of an error; "" is accepted
		says string // code of another finding
	}{
		{"allowed", func(*Governance, *GovernancePolicy) {}, "", "governance_noticed"},
		{"denied", func(g *Governance, _ *GovernancePolicy) {
			g.Allowed, g.Code, g.Reason = false, "compose_hash_not_allowed", "Compose hash not allowed"
		}, "governance_denied", ""},
		{"asked about another app", func(g *Governance, _ *GovernancePolicy) { g.AppID = dstack.AppID{9} }, "governance_mismatch", ""},
		{"asked about another manifest", func(g *Governance, _ *GovernancePolicy) { g.ComposeHash[0]++ }, "governance_mismatch", ""},
		{"asked about another machine", func(g *Governance, _ *GovernancePolicy) { g.DeviceID[0]++ }, "governance_mismatch", ""},
		{"asked about another image", func(g *Governance, _ *GovernancePolicy) { g.OSImageHash = "" }, "governance_mismatch", ""},
		{"not to be asked", func(g *Governance, _ *GovernancePolicy) {
			*g = Governance{Unavailable: fault.New("chain_no_agreement", "one endpoint answers")}
		}, "governance_unavailable", ""},
		{"no notice, and none demanded", func(g *Governance, _ *GovernancePolicy) { g.NoticeSeconds = 0 }, "", "governance_no_notice"},
		{"no notice", func(g *Governance, p *GovernancePolicy) { g.NoticeSeconds, p.MinNoticeSeconds = 0, day }, "governance_notice", ""},
		{"less notice by a second", func(g *Governance, p *GovernancePolicy) { g.NoticeSeconds, p.MinNoticeSeconds = day-1, day }, "governance_notice", ""},
		{"as much notice", func(g *Governance, p *GovernancePolicy) { g.NoticeSeconds, p.MinNoticeSeconds = day, day }, "", "governance_noticed"},
		{"a registry without notice", func(g *Governance, p *GovernancePolicy) { g.RegistryNoticeSeconds, p.MinNoticeSeconds = 0, day }, "governance_notice", ""},
		{"a registry without notice, and a frozen app", func(g *Governance, p *GovernancePolicy) {
			g.Frozen, g.RegistryNoticeSeconds, p.MinNoticeSeconds = true, 0, day
		}, "governance_notice", "governance_frozen"},
		{"a manifest that is newer", func(g *Governance, p *GovernancePolicy) {
			g.Announced, p.MinNoticeSeconds = g.BlockTime.Add(-time.Hour), day
		}, "governance_notice", ""},
		{"a manifest announced later than the block", func(g *Governance, p *GovernancePolicy) {
			g.Announced, p.MinNoticeSeconds = g.BlockTime.Add(time.Hour), day
		}, "governance_notice", ""},
		{"a frozen app that is newer", func(g *Governance, p *GovernancePolicy) {
			g.Frozen, g.Announced, p.MinNoticeSeconds = true, g.BlockTime, day
		}, "", "governance_frozen"},
		{"frozen", func(g *Governance, p *GovernancePolicy) {
			g.Frozen, g.NoticeSeconds, p.MinNoticeSeconds, p.RequireFrozen = true, 0, day, true
		}, "", "governance_frozen"},
		{"foreign", func(g *Governance, _ *GovernancePolicy) { g.Foreign, g.NoticeSeconds = true, 0 }, "", "governance_foreign"},
		{"foreign, and notice demanded", func(g *Governance, p *GovernancePolicy) {
			g.Foreign, g.NoticeSeconds, g.Announced, p.MinNoticeSeconds = true, 0, time.Time{}, day
		}, "governance_notice", ""},
		{"not frozen", func(_ *Governance, p *GovernancePolicy) { p.RequireFrozen = true }, "governance_not_frozen", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			gov, r := allowing(g, plain), g.request()
			c.edit(gov, &r.pol.Governance)
			r.gov = gov
			v := r.appraise(src)
			if c.code == "" != v.Accepted || c.code != "" && !slices.Equal(v.errors(), []string{c.code}) {
				t.Error(show(v))
			}
			if c.says != "" && !v.Has(Info, c.says) && !v.Has(Warning, c.says) {
				t.Errorf("no %s:%s", c.says, show(v))
			}
			anchored := slices.ContainsFunc(v.Anchors, func(a Anchor) bool {
				return a.What == "governance" && strings.Contains(a.Value, "contract "+gov.Registry+" on chain 1, block 77 "+gov.BlockHash) && strings.Contains(a.Value, "finalised") && strings.Contains(a.Origin, "2 of 3")
			})
			if refused := c.code == "governance_denied" || c.code == "governance_mismatch" || c.code == "governance_unavailable"; anchored == refused {
				t.Errorf("anchored %v:%s", anchored, show(v))
			}
			if undecided := c.code == "governance_unavailable"; v.Undecided != undecided {
				t.Errorf("undecided %v", v.Undecided)
			}
		})
	}
	for name, p := range map[string]GovernancePolicy{"required": {Required: true}, "notice": {MinNoticeSeconds: 1}, "frozen": {RequireFrozen: true}} {
		r := g.request()
		r.pol.Governance = p
		if v := r.appraise(src); !slices.Equal(v.errors(), []string{"governance_missing"}) || !v.Undecided {
			t.Errorf("%s:%s", name, show(v))
		}
	}
	// Contracts that allow it do not say what is expected: the caller does.
	r := g.request()
	r.ref = Reference{}
	r.gov = allowing(g, plain)
	if v := r.appraise(src); v.Accepted || !v.Has(Error, "workload_not_specified") {
		t.Error(show(v))
	}
	if _, err := ParsePolicy([]byte(`{"governance":{"min_notice_seconds":-1}}`)); fault.Code(err) != "policy_malformed" {
		t.Error(err)
	}
	if p, err := ParsePolicy([]byte(`{"governance":{"required":true,"min_notice_seconds":86400,"require_frozen":true}}`)); err != nil || !p.Governance.RequireFrozen || p.Governance.MinNoticeSeconds != day {
		t.Error(err, p)
	}
}
