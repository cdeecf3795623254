// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3"
	"github.com/mholt/acmez/v3/acme"
	"golang.org/x/time/rate"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

// challengeLife is how long a challenge can be answered.
const challengeLife = 15 * time.Minute

// maxToken is the longest token of a challenge that is looked up.
const maxToken = 128

// tokenRecord is a challenge under way, for the node that the CA happens to reach.
type tokenRecord struct {
	Version          int    `json:"version"` // 1
	Type             string `json:"type"`
	Name             string `json:"name"`
	Token            string `json:"token"`
	KeyAuthorization string `json:"key_authorization"`
	Until            int64  `json:"until"` // Unix seconds
}

// tokens answers HTTP-01 and TLS-ALPN-01 challenges that any node on the storage began.
type tokens struct {
	storage certmagic.Storage
	// Strangers ask; the storage is not to feel it.
	reads *rate.Limiter
	mu    sync.Mutex
	ours  map[string]tokenRecord // by key
}

func newTokens(s certmagic.Storage) *tokens {
	return &tokens{storage: s, reads: rate.NewLimiter(20, 100), ours: map[string]tokenRecord{}}
}

func tokenKey(kind, name string) string { return keyOf("challenges", kind, safe(name)) }

// Present makes the challenge known.
func (t *tokens) Present(ctx context.Context, c acme.Challenge) error {
	r := tokenRecord{1, c.Type, c.Identifier.Value, c.Token, c.KeyAuthorization, time.Now().Add(challengeLife).Unix()}
	key := tokenKey(r.Type, r.Name)
	if err := store(ctx, t.storage, key, r); err != nil {
		return err
	}
	t.mu.Lock()
	t.ours[key] = r
	t.mu.Unlock()
	return nil
}

// CleanUp forgets the challenge.
func (t *tokens) CleanUp(ctx context.Context, c acme.Challenge) error {
	key := tokenKey(c.Type, c.Identifier.Value)
	t.mu.Lock()
	delete(t.ours, key)
	t.mu.Unlock()
	// The order may have ended with its context; the record must go nevertheless.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return t.storage.Delete(ctx, key)
}

func (t *tokens) find(ctx context.Context, kind string, name hostname.Name) (r tokenRecord, ok bool) {
	key := tokenKey(kind, string(name))
	t.mu.Lock()
	r, ok = t.ours[key]
	t.mu.Unlock()
	if !ok {
		if !t.reads.Allow() || load(ctx, t.storage, key, &r) != nil {
			return r, false
		}
	}
	return r, r.Version == 1 && r.Type == kind && r.Name == string(name) && time.Now().Unix() < r.Until
}

// certificate answers a TLS-ALPN-01 challenge. Code cert_challenge.
func (t *tokens) certificate(ctx context.Context, name hostname.Name) (*tls.Certificate, error) {
	r, ok := t.find(ctx, acme.ChallengeTypeTLSALPN01, name)
	if !ok {
		return nil, fault.New("cert_challenge", "there is no challenge for %s", name)
	}
	return acmez.TLSALPN01ChallengeCert(acme.Challenge{
		Type: r.Type, Token: r.Token, KeyAuthorization: r.KeyAuthorization,
		Identifier: acme.Identifier{Type: "dns", Value: r.Name},
	})
}

// Challenged reports whether a name is being proven by TLS-ALPN-01, by any node on the
// storage.
func (m *Manager) Challenged(ctx context.Context, name hostname.Name) bool {
	_, ok := m.tokens.find(ctx, acme.ChallengeTypeTLSALPN01, name)
	return ok
}

const challengePath = "/.well-known/acme-challenge/"

// HTTPChallenge answers HTTP-01 challenges of any node on the storage and passes everything
// else on.
func (m *Manager) HTTPChallenge(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, ok := strings.CutPrefix(r.URL.Path, challengePath)
		if ok && r.Method == http.MethodGet && token != "" && len(token) <= maxToken {
			host := r.Host
			if h, _, err := net.SplitHostPort(host); err == nil {
				host = h
			}
			if name, err := hostname.ParseName(host); err == nil {
				if c, ok := m.tokens.find(r.Context(), acme.ChallengeTypeHTTP01, name); ok && c.Token == token {
					w.Header().Set("Content-Type", "application/octet-stream")
					w.Write([]byte(c.KeyAuthorization))
					return
				}
			}
		}
		next.ServeHTTP(w, r)
	})
}
