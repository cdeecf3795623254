// SPDX-License-Identifier: Apache-2.0

// Package appraiser judges the peers of attested channels by package verifier, so
// that a connection is accepted for the same reasons as `dstack verify` accepts
// evidence. It is what most callers give to channel.Config and channel.RATLS.
//
// A peer's evidence must have exactly the report data of the connection; the
// workload must be one that the reference values or the intended identity name.
// Evidence of an RA-TLS certificate is as old as the certificate and never fresh:
// a policy that requires freshness refuses it. The zero value refuses everyone.
// Everything in a candidate is attacker-controlled. Implements design.md §4
// (attested channel).
package appraiser

import (
	"context"
	"slices"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// Appraiser is a channel.Appraiser. It must not be changed once in use.
type Appraiser struct {
	Roots     []attest.Roots
	Reference verifier.Reference
	Policy    verifier.Policy

	// Collateral is where the vendors' statements come from; nil uses only what
	// evidence carries.
	Collateral collateral.Source

	memo attest.Memo
}

// Appraise refuses with the code of the first error of the verdict, whose message
// names all of them.
func (a *Appraiser) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	src := verifier.Source{Version: 1, Container: c.Container}
	fresh, pol := verifier.Freshness{ReportData: c.ReportData[:]}, a.Policy
	if c.Binding == channel.BindingSession {
		pol.Evidence.MaxAgeSeconds = 0 // it was made for this connection
	} else {
		// It was made when the certificate was, and answers nobody's nonce (B08).
		src.RATLS, src.Issued, fresh = c.SPKI, c.Issued, verifier.Freshness{ConnectionSPKI: c.SPKI}
	}
	req := verifier.Request{
		Source: src, Roots: a.Roots, Reference: a.Reference, Policy: pol, At: c.At, Freshness: fresh, Memo: &a.memo,
	}
	// Whom the connection means narrows what is accepted; it never widens it.
	if len(c.Intended.ComposeHashes) > 0 {
		req.Policy.Workload.ComposeHashes = intersect(req.Policy.Workload.ComposeHashes, c.Intended.ComposeHashes)
	}
	if a.Collateral != nil {
		want, ok, err := verifier.CollateralFor(&src)
		if err != nil {
			return nil, err
		}
		if ok {
			if req.Collateral, err = a.Collateral.Collateral(ctx, want); err != nil {
				return nil, err
			}
		}
	}
	v := verifier.Appraise(req)
	if !v.Accepted {
		return nil, v.Refusal()
	}
	id := channel.Identity{AppID: v.Workload.AppID, ComposeHash: v.Workload.ComposeHash}
	if text := v.Workload.InstanceID; text != "" {
		instance, err := dstack.ParseInstanceID(text)
		if err != nil {
			return nil, err
		}
		id.InstanceID = &instance
	}
	if text := v.Workload.ChannelKey; text != "" {
		var key collateral.Hex
		if err := key.UnmarshalText([]byte(text)); err != nil {
			return nil, err
		}
		id.ChannelKey = key
	}
	if len(v.Claims.ReportData) != dstack.ReportDataSize {
		return nil, fault.New("channel_report_data", "%s has no report data of %d bytes", v.TEE, dstack.ReportDataSize)
	}
	return &channel.Appraisal{Identity: id, ReportData: dstack.ReportData(v.Claims.ReportData), Trust: v.Trust, Claims: v.Claims}, nil
}

// intersect returns what both lists allow; an empty first list allows all. Nothing
// in common allows one hash that nothing has.
func intersect(a, b []dstack.ComposeHash) []dstack.ComposeHash {
	if len(a) == 0 {
		return b
	}
	both := slices.DeleteFunc(slices.Clone(a), func(h dstack.ComposeHash) bool { return !slices.Contains(b, h) })
	if len(both) == 0 {
		return []dstack.ComposeHash{{}}
	}
	return both
}
