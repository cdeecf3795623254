// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/testkit"
)

// A10: GPU evidence counts only when the measured log commits to it, and then by
// the policy.
func TestThreat_A10_GPUEvidenceIsBoundByTheLog(t *testing.T) {
	record := testkit.Vectors(t, "attestation/gpu/gpu_attestation_h100.json")
	event := fmt.Sprintf(`{"version":1,"provider":"nvidia","devices":1,"cc_mode":"on","devtools":false,"evidence_sha256":"%x"}`, sha256.Sum256(record))
	start := func() (*guest, *request) {
		g := newGuest(t)
		g.edit.runtime = func(l []eventlog.Event) []eventlog.Event {
			at := slices.IndexFunc(l, func(e eventlog.Event) bool { return e.Name == eventlog.InstanceIDEvent })
			e, err := eventlog.RuntimeV1(eventlog.GPUAttestation, []byte(event))
			g.check(err)
			return slices.Insert(slices.Clone(l), at, e)
		}
		g.edit.source = func(s *Source) { s.GPU = record }
		r := g.request()
		r.pol.GPU = GPUPolicy{Devices: 1, BootNonce: true}
		return g, r
	}
	g, r := start()
	v := r.appraise(g.evidence())
	if !v.Accepted || !slices.ContainsFunc(v.Anchors, func(a Anchor) bool { return a.What == "GPUs" }) || !slices.ContainsFunc(v.Assumptions, func(s string) bool { return strings.Contains(s, "NVIDIA") }) {
		t.Fatal(show(v))
	}
	for _, c := range []struct {
		name, code string
		run        func(*guest, *request)
	}{
		{"a byte changed", "gpu_evidence_hash", func(g *guest, _ *request) {
			g.edit.source = func(s *Source) { s.GPU = append(slices.Clone(record), ' ') }
		}},
		{"no evidence", "gpu_evidence_missing", func(g *guest, _ *request) { g.edit.source = nil }},
		{"no event", "gpu_missing", func(g *guest, _ *request) { g.edit.runtime = nil }},
		{"another number", "gpu_devices", func(_ *guest, r *request) { r.pol.GPU.Devices = 2 }},
		{"a nonce of the caller's", "gpu_nonce_stale", func(_ *guest, r *request) { r.pol.GPU.Nonce = make([]byte, 32) }},
		{"an event after the boundary", "log_reserved_after_ready", func(g *guest, _ *request) {
			inner := g.edit.runtime
			g.edit.runtime = func(l []eventlog.Event) []eventlog.Event {
				l = inner(l)
				return append(l, event2(t, l))
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, r := start()
			c.run(g, r)
			refusedFor(t, r.appraise(g.evidence()), c.code)
		})
	}
	g, r = start()
	r.pol.GPU = GPUPolicy{}
	if v := r.appraise(g.evidence()); !v.Accepted || !v.Has(Warning, "gpu_not_judged") {
		t.Error(show(v))
	}
	g.edit.runtime = nil
	if v := r.appraise(g.evidence()); !v.Accepted || !v.Has(Warning, "gpu_unbound") {
		t.Error(show(v))
	}
}

// event2 is the log's GPU event once more.
func event2(t *testing.T, l []eventlog.Event) eventlog.Event {
	t.Helper()
	at := slices.IndexFunc(l, func(e eventlog.Event) bool { return e.Name == eventlog.GPUAttestation })
	return l[at]
}
