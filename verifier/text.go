// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/dstack-go/dstack"
)

// String returns the verdict for people. The first line says the trust, such as
// "trust: development", after the scope where that is signature only; the second
// begins with ACCEPTED, REFUSED or UNDECIDED.
func (v *Verdict) String() string {
	var b strings.Builder
	line := func(format string, args ...any) {
		b.WriteString(printable(fmt.Sprintf(format, args...)))
		b.WriteByte('\n')
	}
	trust := v.Trust
	if trust == "" {
		trust = dstack.TrustProduction
	}
	if v.Scope == ScopeSignature {
		line("scope: signature, chain and collateral only; trust: %s", trust)
	} else {
		line("trust: %s", trust)
	}
	switch {
	case v.Accepted:
		line("ACCEPTED")
	case v.Undecided:
		line("UNDECIDED: %s", v.Reason)
	default:
		line("REFUSED")
	}
	if w := v.Workload; w != nil {
		if w.Name != "" {
			line("  app       %s", w.Name)
		}
		line("  app id    %s", w.AppID)
		line("  compose   %s", w.ComposeHash)
		if w.OSImageHash != "" {
			word := " (only the guest's word)"
			if slices.ContainsFunc(v.Anchors, func(a Anchor) bool { return a.What == "os_image_hash" && a.Value == w.OSImageHash }) {
				word = ""
			}
			line("  OS image  %s%s", w.OSImageHash, word)
		}
	}
	if c := v.Claims; c != nil {
		line("  TEE       %s, TCB %s, signed under %s", c.TEE, c.TCBStatus, c.Root)
	}
	if p := v.Platform; p != nil && p.DeviceScheme != "" {
		line("  machine   %s, device id %s (%s)", p.Product, p.DeviceID, p.DeviceScheme)
	}
	line("  fresh     %s, channel %s, at %s", v.Freshness, v.Channel, v.At.Format("2006-01-02 15:04:05 UTC"))
	for _, level := range []Level{Error, Warning, Info} {
		for _, f := range v.Findings {
			if f.Level != level {
				continue
			}
			of := ""
			if f.Hop != "" {
				of = f.Hop + ": "
			}
			line("%-8s %s: %s%s", f.Level, f.Code, of, f.Message)
			if f.Fix != "" {
				line("         fix: %s", f.Fix)
			}
		}
	}
	if len(v.Hops) > 0 {
		line("hops, each of which sees plaintext:")
	}
	for i, h := range v.Hops {
		word := "accepted"
		if !h.Accepted {
			word = "refused"
		}
		line("  %d %-8s %s, trust: %s", i+1, h.Role, word, h.Trust)
		if w := h.Workload; w != nil {
			line("    %s app id %s, measured as %s, %s", w.Name, w.AppID, w.ComposeHash, h.TEE)
		}
	}
	section := func(title string, anchors []Anchor) {
		if len(anchors) > 0 {
			line("%s:", title)
		}
		for _, a := range anchors {
			line("  %s %s (%s)", a.What, a.Value, a.Origin)
		}
	}
	section("anchored", v.Anchors)
	section("self-consistent only", v.SelfConsistent)
	if len(v.Assumptions) > 0 {
		line("still trusted:")
	}
	for _, s := range v.Assumptions {
		line("  %s", s)
	}
	return b.String()
}

// printable keeps hostile text from moving the cursor or forging a line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '\uFFFD'
	}, s)
}
