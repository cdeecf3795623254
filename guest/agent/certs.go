// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"

	agentpb "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/derive"
)

// maxSubject bounds a certificate's common name in bytes.
const maxSubject = 1 << 10

// randomP256 makes a key that nobody else has, as GetTlsKey returns it.
func randomP256() (*ecdsa.PrivateKey, error) {
	var seed [32]byte
	defer clear(seed[:])
	if _, err := rand.Read(seed[:]); err != nil {
		return nil, err
	}
	return derive.P256(seed[:])
}

// getTLSKey makes a new key and a certificate for it (guest-agent.md §9). No scope
// limits it: nobody else ever has the key.
func (c *caller) getTLSKey(ctx context.Context, req *agentpb.GetTlsKeyArgs) (*agentpb.GetTlsKeyResponse, error) {
	if err := c.authorised(); err != nil {
		return nil, err
	}
	key, err := randomP256()
	if err != nil {
		return nil, err
	}
	return c.certified(ctx, key, csr.Config{
		Subject: req.Subject, Names: req.AltNames, ServerAuth: req.UsageServerAuth, ClientAuth: req.UsageClientAuth,
		WithEvidence: req.UsageRaTls, WithAppInfo: req.WithAppInfo, NotBefore: req.NotBefore, NotAfter: req.NotAfter,
	})
}

// deriveKey is Tappd's: one path, one key, which is the app's key of that path under
// another name (guest-agent.md §8.1); with a random seed it is one of its own.
func (c *caller) deriveKey(ctx context.Context, req *agentpb.DeriveKeyArgs) (*agentpb.GetTlsKeyResponse, error) {
	if err := c.authorised(); err != nil {
		return nil, err
	}
	var key *ecdsa.PrivateKey
	var err error
	if req.RandomSeed {
		var seed [32]byte
		defer clear(seed[:])
		if _, err := rand.Read(seed[:]); err != nil {
			return nil, err
		}
		key, err = derive.P256(seed[:], []byte(req.Path))
	} else {
		if err := c.scope.allow(req.Path); err != nil {
			return nil, err
		}
		key, err = derive.P256(c.keys.App.Bytes(), []byte(req.Path))
	}
	if err != nil {
		return nil, err
	}
	return c.certified(ctx, key, csr.Config{
		Subject: req.Subject, Names: req.AltNames, ServerAuth: req.UsageServerAuth, ClientAuth: req.UsageClientAuth, WithEvidence: req.UsageRaTls,
	})
}

// certified answers with a key and its certificate. Each waits for its turn as a
// quote does, since it costs one.
func (c *caller) certified(ctx context.Context, key *ecdsa.PrivateKey, r csr.Config) (*agentpb.GetTlsKeyResponse, error) {
	// What no issuer would certify is refused before it costs a quote.
	if r.NotBefore != nil && r.NotAfter != nil && *r.NotBefore >= *r.NotAfter {
		return nil, fault.New("certificate_validity", "not_before must be earlier than not_after")
	}
	if len(r.Subject) > maxSubject {
		return nil, fault.New("certificate_name", "a subject has at most %d bytes, got %d", maxSubject, len(r.Subject))
	}
	select {
	case c.quotes <- struct{}{}:
		defer func() { <-c.quotes }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	chain, err := c.issuer.issue(ctx, key, r)
	if err != nil {
		return nil, err
	}
	text, err := derive.PEM(key)
	if err != nil {
		return nil, err
	}
	return &agentpb.GetTlsKeyResponse{Key: string(text), CertificateChain: chain}, nil
}
