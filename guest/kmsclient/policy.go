// SPDX-License-Identifier: Apache-2.0

package kmsclient

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/peer"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// Policy says what the evidence of a KMS must show before anything that it says counts.
type Policy struct {
	Appraiser channel.Appraiser // required
	Intended  channel.Intended  // with an app id
	// RequireSession refuses a KMS that knows no attested channels.
	RequireSession bool
}

// PolicyOf is the policy of a manifest's kms_policy; of nil it is nil. Codes: those of
// peer.Appraiser.
func PolicyOf(p *manifest.PeerPolicy, development bool, pccs string) (*Policy, error) {
	if p == nil {
		return nil, nil
	}
	a, intended, err := peer.Appraiser("kms_policy", p, development, pccs)
	if err != nil {
		return nil, err
	}
	return &Policy{Appraiser: a, Intended: intended, RequireSession: p.RequireSession}, nil
}

// judge is the appraiser, with one code for what it refuses.
func (p *Policy) judge() channel.Appraiser { return judge{p} }

type judge struct{ p *Policy }

func (j judge) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	r, err := j.p.Appraiser.Appraise(ctx, c)
	if err == nil && r == nil {
		err = fault.New("channel_appraisal", "the appraiser named no error and no identity")
	}
	if err == nil && r.ReportData != c.ReportData {
		err = fault.New("channel_report_data", "the evidence was made for another connection, nonce, role or key")
	}
	if err == nil {
		err = c.Intended.Check(r.Identity)
	}
	if err != nil {
		return nil, fault.Wrap(err, "kms_not_appraised", "the evidence of the KMS does not show what kms_policy of the manifest demands").
			WithFix("see whether kms_policy names what this KMS runs")
	}
	return r, nil
}

// checkCertificate judges the evidence in a KMS's RA-TLS certificate; without a policy
// any is as good as none.
func (p *Policy) checkCertificate(ctx context.Context, leaf *x509.Certificate, now time.Time) error {
	if p == nil {
		return nil
	}
	a, err := ratls.FromCertificate(leaf)
	if fault.Code(err) == "ratls_no_evidence" {
		return fault.Wrap(err, "kms_evidence_missing", "kms_policy of the manifest demands evidence, and the KMS shows none").
			WithFix("use a KMS that runs in a TEE and shows it")
	}
	if err != nil {
		return fault.Wrap(err, "kms_not_appraised", "read the evidence of the KMS")
	}
	_, err = p.judge().Appraise(ctx, channel.Candidate{
		Container: a.Container, ReportData: a.ReportData, SPKI: leaf.RawSubjectPublicKeyInfo, Role: channel.ServerRole,
		Intended: p.Intended, Binding: channel.BindingKey, At: now, Issued: leaf.NotBefore,
	})
	return err
}

// handshakeTimeout bounds a TLS handshake, in which a policy may have to fetch what it
// judges by.
func handshakeTimeout(p *Policy) time.Duration {
	if p == nil {
		return ConnectTimeout
	}
	return Timeout / 2
}
