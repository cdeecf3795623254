// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/ecdsa"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// certRequest is what a caller wants certified.
type certRequest struct {
	subject                string
	altNames               []string
	serverAuth, clientAuth bool
	raTLS, appInfo         bool
	notBefore, notAfter    *uint64 // Unix seconds; nil: as the issuer likes
}

// check refuses what no issuer would certify, before it costs a quote.
func (r certRequest) check() error {
	if r.notBefore != nil && r.notAfter != nil && *r.notBefore >= *r.notAfter {
		return fault.New("certificate_validity", "not_before must be earlier than not_after")
	}
	return nil
}

// issuer signs certificates of the app.
type issuer interface {
	// issue returns the chain of PEM certificates, leaf first.
	issue(ctx context.Context, key *ecdsa.PrivateKey, r certRequest) ([]string, error)
}

const appCertPatience = 10 * time.Second

type stub struct{}

func (stub) issue(context.Context, *ecdsa.PrivateKey, certRequest) ([]string, error) {
	return nil, fault.New("not_available", "stub")
}
func newIssuer(a *Agent) (issuer, error)                                 { return stub{}, nil }
func (a *Agent) renewAppCert(ctx context.Context) (time.Duration, error) { return 0, nil }
func (a *Agent) keepAppCert(ctx context.Context)                         {}
