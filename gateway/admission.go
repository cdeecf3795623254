// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"context"
	"time"

	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/lease"
)

// Admission says which attested instances get a route, and until when at most.
type Admission interface {
	// Admit returns the end of what was admitted, or the error that refuses it: a [Denied]
	// when that is the answer, which ends the route too that there is.
	Admit(ctx context.Context, who *applicant.Applicant, l Lease, at time.Time) (until time.Time, err error)
}

// Denied is the answer no. Other errors mean that there is no answer.
type Denied struct{ Reason error }

func (d *Denied) Error() string { return d.Reason.Error() }
func (d *Denied) Unwrap() error { return d.Reason }

// Lease is what a guest shows of its KMS; empty when it shows none.
type Lease struct{ Document, Signature []byte }

// ByLease admits whom a KMS authorised, as long as its lease holds: who is revoked there
// loses the route with it (threats.md G05).
type ByLease struct {
	Root []byte // of the KMS: DER SubjectPublicKeyInfo of its root CA
}

// Admit implements Admission. Codes register_lease_missing, register_lease_other, those
// of lease.Verify.
func (b ByLease) Admit(_ context.Context, who *applicant.Applicant, l Lease, at time.Time) (time.Time, error) {
	if len(l.Document) == 0 {
		return time.Time{}, fault.New("register_lease_missing", "this gateway routes to instances that a KMS authorised, and this one shows no lease").
			WithFix("deploy the app with the gateway's KMS as its key provider")
	}
	d, err := lease.Verify(l.Document, l.Signature, b.Root, at)
	if err != nil {
		return time.Time{}, err
	}
	if d.AppID != who.Info.AppID || !bytes.Equal(d.InstanceID, who.Info.InstanceID) || d.ComposeHash != who.Info.ComposeHash ||
		len(d.OSImageHash) > 0 && !bytes.Equal(d.OSImageHash, who.Request.Boot.OSImageHash) {
		return time.Time{}, fault.New("register_lease_other", "the lease is for the app %s, instance %x, manifest %s, which this instance is not", d.AppID, d.InstanceID, d.ComposeHash)
	}
	return d.NotAfter, nil
}

// ByAuthority asks an authority as a KMS does.
type ByAuthority struct{ Authority governance.Authority }

// Admit implements Admission. Codes are those of the authority's refusals.
func (b ByAuthority) Admit(ctx context.Context, who *applicant.Applicant, _ Lease, at time.Time) (time.Time, error) {
	q := who.Request
	q.Role, q.Purpose, q.At = governance.App, governance.Renewal, at
	d, err := b.Authority.Decide(ctx, q)
	if err != nil {
		return time.Time{}, err
	}
	if !d.Allowed {
		return time.Time{}, &Denied{fault.New(d.Code, "no route: %s", d.Reason)}
	}
	if d.Lease > 0 {
		return at.Add(d.Lease), nil
	}
	return at.Add(lease.Longest), nil
}

// AnyAttested admits every instance whose evidence holds, whatever it runs: for a gateway
// that is open to all. It says so at the start.
type AnyAttested struct{}

// Admit implements Admission.
func (AnyAttested) Admit(_ context.Context, _ *applicant.Applicant, _ Lease, at time.Time) (time.Time, error) {
	return at.Add(lease.Longest), nil
}
