// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3/acme"
	"golang.org/x/time/rate"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

// Bounds of a certificate for a key that is elsewhere.
const (
	MaxCSR       = 16 << 10 // bytes
	MaxSignNames = 8
)

// Limits bound what one app can order. The zero value is the default.
type Limits struct {
	// PerApp orders may be made within Every, by each node; 0 is 6. Certificates that are
	// still good are given again and do not count.
	PerApp int
	// Every is 0 for a day.
	Every time.Duration
	// Apps is how many apps are counted at a time; 0 is 50,000. More are refused.
	Apps int
}

// signedRecord is a certificate for a key that is elsewhere.
type signedRecord struct {
	Version int      `json:"version"` // 1
	CA      string   `json:"ca"`
	Names   []string `json:"names"`
	Chain   string   `json:"chain"`    // PEM
	RenewAt int64    `json:"renew_at"` // Unix seconds
	// AskAt is when the CA is asked again when to renew (RFC 9773 §4.3), Unix seconds; 0:
	// not at all. Window is what it said: start and end, Unix seconds.
	AskAt  int64    `json:"ask_at,omitempty"`
	Window [2]int64 `json:"window,omitempty"`
}

type signed struct {
	chain          []byte
	renewAt, askAt time.Time // askAt zero: never
}

// next is when whoever has the chain is to ask again: when it is due, or may have become so.
func (s signed) next() time.Time {
	if s.askAt.IsZero() || s.askAt.After(s.renewAt) {
		return s.renewAt
	}
	return s.askAt
}

// Bounds of when a CA is asked again when to renew (RFC 9773 §4.3.2 and §4.3.3).
const (
	minAsk = time.Minute
	maxAsk = 24 * time.Hour
	askErr = 6 * time.Hour // without its word
)

// schedule makes the times of a record what the CA says, nil if it says nothing. A window
// that stays keeps the time that was chosen in it.
func (r *signedRecord) schedule(leaf *x509.Certificate, least time.Duration, info *acme.RenewalInfo, err error) {
	now := time.Now()
	if r.RenewAt == 0 {
		r.RenewAt = twoThirds(leaf).Unix()
	}
	switch {
	case errors.Is(err, acme.ErrUnsupported):
		r.AskAt = 0
	case err != nil || info == nil || !info.HasWindow():
		r.AskAt = now.Add(askErr).Unix()
	default:
		wait := askErr
		if info.RetryAfter != nil {
			wait = min(max(time.Until(*info.RetryAfter), least), maxAsk)
		}
		r.AskAt = now.Add(wait).Unix()
		window := [2]int64{info.SuggestedWindow.Start.Unix(), info.SuggestedWindow.End.Unix()}
		if window != r.Window && !info.SelectedTime.IsZero() && info.SelectedTime.Before(leaf.NotAfter) {
			r.Window, r.RenewAt = window, info.SelectedTime.Unix()
		}
	}
}

func (r *signedRecord) signed() signed {
	s := signed{chain: []byte(r.Chain), renewAt: time.Unix(r.RenewAt, 0)}
	if r.AskAt != 0 {
		s.askAt = time.Unix(r.AskAt, 0)
	}
	return s
}

// Sign returns a chain in PEM for the key of a CSR and exactly the given names, which lie
// directly in a base domain, when it ends, and when to ask again: it is due then, or the CA
// may have changed its mind (RFC 9773). Whether the caller may have these names, and whether
// the key is its own, is for our caller to know. Asking again gives the same chain until it
// is due.
// When renewing fails, a chain that is still good is returned, to be asked for again in an
// hour. Codes csr_size, csr_signature, csr_key, csr_names, csr_extension,
// acme_name, acme_rate, and those of the CAs' orders.
func (m *Manager) Sign(ctx context.Context, csr *x509.CertificateRequest, names []hostname.Name) (chain []byte, notAfter, renewAt time.Time, err error) {
	if err := checkCSR(csr, names); err != nil {
		return nil, time.Time{}, time.Time{}, err
	}
	owners := map[string]bool{}
	for _, name := range names {
		label, parent := name.Split()
		m.mu.RLock()
		known := m.domains[parent] != nil
		m.mu.RUnlock()
		if !known {
			return nil, time.Time{}, time.Time{}, fault.New("acme_name", "%s does not lie directly in a base domain of this gateway", clip(string(name)))
		}
		l, err := hostname.ParseLabel(label)
		if err != nil {
			return nil, time.Time{}, time.Time{}, fault.Wrap(err, "acme_name", "the name %s", clip(string(name)))
		}
		owners[string(l.ID)] = true
	}
	return m.give(ctx, csr, owners)
}

// SignCustom is Sign for a custom domain, which is outside the base domains and proven by
// HTTP-01 or TLS-ALPN-01; its orders count to owner.
func (m *Manager) SignCustom(ctx context.Context, csr *x509.CertificateRequest, name hostname.Name, owner string) (chain []byte, notAfter, renewAt time.Time, err error) {
	if err := checkCSR(csr, []hostname.Name{name}); err != nil {
		return nil, time.Time{}, time.Time{}, err
	}
	if _, parent := name.Split(); parent == "" || m.domainOf(string(name)) != nil {
		return nil, time.Time{}, time.Time{}, fault.New("acme_name", "%s is no custom domain", clip(string(name)))
	}
	return m.give(ctx, csr, map[string]bool{owner: true})
}

func (m *Manager) give(ctx context.Context, csr *x509.CertificateRequest, owners map[string]bool) (chain []byte, notAfter, renewAt time.Time, err error) {
	s, err := m.signOnce(ctx, csr, owners)
	if err != nil {
		return nil, time.Time{}, time.Time{}, err
	}
	certs, err := parseChain(s.chain)
	if err != nil {
		return nil, time.Time{}, time.Time{}, err
	}
	return s.chain, certs[0].NotAfter, s.next(), nil
}

func (m *Manager) signOnce(ctx context.Context, csr *x509.CertificateRequest, owners map[string]bool) (signed, error) {
	key := signedKey(csr)
	old, err := m.signedRecord(ctx, key, csr)
	if err == nil && time.Now().Before(old.next()) {
		return old, nil
	}
	if err != nil && !errors.Is(err, errAbsent) {
		return signed{}, err
	}
	s, _, err := m.signing.Do(ctx, m.ctx, key, func(ctx context.Context) (s signed, err error) {
		err = locked(ctx, m.cfg.Storage, key, func() error {
			s, err = m.sign(ctx, key, csr, owners)
			return err
		})
		return s, err
	})
	if err != nil && old.chain != nil && ctx.Err() == nil {
		if chain, bad := parseChain(old.chain); bad == nil && time.Now().Before(chain[0].NotAfter) {
			m.log.Warn("an app's certificate is not renewed; the old one is given", "names", csr.DNSNames, "error", err)
			return signed{chain: old.chain, renewAt: time.Now().Add(time.Hour)}, nil
		}
	}
	return s, err
}

// checkCSR reports whether a CSR is signed by its own key, of P-256 or P-384, and asks for
// exactly the given names and no other extension. Codes csr_size, csr_signature, csr_key,
// csr_names, csr_extension.
func checkCSR(csr *x509.CertificateRequest, names []hostname.Name) error {
	if csr == nil || len(csr.Raw) == 0 || len(csr.Raw) > MaxCSR {
		return fault.New("csr_size", "the CSR is empty or has more than %d bytes", MaxCSR)
	}
	if !isECDSA(csr.PublicKey) {
		return fault.New("csr_key", "the CSR's key is none of P-256 or P-384")
	}
	if err := csr.CheckSignature(); err != nil {
		return fault.Wrap(err, "csr_signature", "the CSR is not signed by its key")
	}
	if len(csr.IPAddresses)+len(csr.EmailAddresses)+len(csr.URIs) > 0 {
		return fault.New("csr_names", "the CSR asks for something else than DNS names")
	}
	for _, e := range csr.Extensions {
		if !e.Id.Equal([]int{2, 5, 29, 17}) {
			return fault.New("csr_extension", "the CSR asks for the extension %s", e.Id)
		}
	}
	if len(names) == 0 || len(names) > MaxSignNames || len(csr.DNSNames) > MaxSignNames {
		return fault.New("csr_names", "a certificate has 1 to %d names", MaxSignNames)
	}
	want := make([]string, len(names))
	for i, n := range names {
		// A wildcard or an address is no name of a host.
		if parsed, err := hostname.ParseName(string(n)); err != nil || parsed != n {
			return fault.New("csr_names", "%q is no name of a host in normal form", clip(string(n)))
		}
		want[i] = string(n)
	}
	if !sameNames(want, csr.DNSNames) {
		return fault.New("csr_names", "the CSR's names are not those that were granted")
	}
	if cn := csr.Subject.CommonName; cn != "" && !slices.Contains(want, strings.ToLower(cn)) {
		return fault.New("csr_names", "the CSR's common name is none of its names")
	}
	return nil
}

func signedKey(csr *x509.CertificateRequest) string {
	h := sha256.New()
	h.Write(csr.RawSubjectPublicKeyInfo)
	names := make([]string, len(csr.DNSNames))
	for i, n := range csr.DNSNames {
		names[i] = strings.ToLower(n)
	}
	slices.Sort(names)
	for _, n := range slices.Compact(names) {
		h.Write([]byte{0})
		h.Write([]byte(n))
	}
	return keyOf("signed", hex.EncodeToString(h.Sum(nil)))
}

// signedRecord reads a stored chain, of a CA that is still in use, that answers the request.
func (m *Manager) signedRecord(ctx context.Context, key string, csr *x509.CertificateRequest) (signed, error) {
	var r signedRecord
	if err := load(ctx, m.cfg.Storage, key, &r); err != nil {
		return signed{}, err
	}
	if r.Version != 1 {
		return signed{}, fault.New("acme_record", "the version of %s is not 1", key)
	}
	_, err := checkIssued([]byte(r.Chain), csr)
	if err != nil || !slices.ContainsFunc(m.issuers, func(i *caIssuer) bool { return i.IssuerKey() == r.CA }) {
		return signed{}, errAbsent
	}
	return r.signed(), nil
}

// asked is a stored chain after its CA was asked again when to renew it.
func (m *Manager) asked(ctx context.Context, key string) (signed, error) {
	var r signedRecord
	if err := load(ctx, m.cfg.Storage, key, &r); err != nil {
		return signed{}, err
	}
	chain, err := parseChain([]byte(r.Chain))
	if err != nil {
		return signed{}, err
	}
	for _, i := range m.issuers {
		if i.IssuerKey() == r.CA {
			info, err := i.GetRenewalInfo(ctx, certmagic.Certificate{Certificate: tls.Certificate{Leaf: chain[0]}})
			r.schedule(chain[0], m.minAsk, &info, err)
		}
	}
	return r.signed(), store(ctx, m.cfg.Storage, key, r)
}

// sign orders; the caller holds the lock of key.
func (m *Manager) sign(ctx context.Context, key string, csr *x509.CertificateRequest, owners map[string]bool) (signed, error) {
	old, err := m.signedRecord(ctx, key, csr)
	if err == nil && time.Now().Before(old.renewAt) && !time.Now().Before(old.next()) {
		old, err = m.asked(ctx, key)
	}
	if err == nil && time.Now().Before(old.renewAt) {
		return old, nil // it is not due, or another node, or the run before, was first
	}
	if err != nil && !errors.Is(err, errAbsent) {
		return signed{}, err
	}
	if err := m.rates.take(owners); err != nil {
		return signed{}, err
	}
	if chain, err := parseChain(old.chain); err == nil {
		var r signedRecord
		if load(ctx, m.cfg.Storage, key, &r) == nil {
			ctx = context.WithValue(ctx, replacesKey{}, map[string]*x509.Certificate{r.CA: chain[0]})
		}
	}
	var failed error
	for _, i := range m.issuers {
		issued, err := i.Issue(ctx, csr)
		if err != nil {
			failed = errors.Join(failed, err)
			if ctx.Err() != nil {
				break
			}
			m.log.Warn("a CA gives no certificate", "ca", i.IssuerKey(), "names", csr.DNSNames, "error", err)
			continue
		}
		chain, err := parseChain(issued.Certificate)
		if err != nil {
			return signed{}, err
		}
		r := signedRecord{Version: 1, CA: i.IssuerKey(), Names: csr.DNSNames, Chain: string(issued.Certificate)}
		info, err := metadataRenewal(issued.Metadata), error(nil)
		if info == nil {
			var asked acme.RenewalInfo
			asked, err = i.GetRenewalInfo(ctx, certmagic.Certificate{Certificate: tls.Certificate{Leaf: chain[0]}})
			info = &asked
		}
		r.schedule(chain[0], m.minAsk, info, err)
		return r.signed(), store(ctx, m.cfg.Storage, key, r)
	}
	return signed{}, fault.Wrap(failed, "acme_order", "no CA gives a certificate for %s", clip(strings.Join(csr.DNSNames, ", ")))
}

// rates counts orders by app.
type rates struct {
	limits Limits
	mu     sync.Mutex
	apps   map[string]*rate.Limiter
}

func newRates(l Limits) *rates {
	if l.PerApp == 0 {
		l.PerApp = 6
	}
	if l.Every == 0 {
		l.Every = 24 * time.Hour
	}
	if l.Apps == 0 {
		l.Apps = 50_000
	}
	return &rates{limits: l, apps: map[string]*rate.Limiter{}}
}

// take counts an order to each of its owners. Code acme_rate.
func (r *rates) take(owners map[string]bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range owners {
		l := r.apps[id]
		if l == nil {
			if len(r.apps) >= r.limits.Apps {
				for id, l := range r.apps {
					if l.Tokens() >= float64(r.limits.PerApp) {
						delete(r.apps, id)
					}
				}
			}
			if len(r.apps) >= r.limits.Apps {
				return fault.New("acme_rate", "too many apps order certificates at this time")
			}
			l = rate.NewLimiter(rate.Every(r.limits.Every/time.Duration(r.limits.PerApp)), r.limits.PerApp)
			r.apps[id] = l
		}
		if !l.Allow() {
			return fault.New("acme_rate", "%s has ordered its %d certificates within %s", id, r.limits.PerApp, r.limits.Every).
				WithFix("keep the key and the names of a certificate, and it is given again without an order")
		}
	}
	return nil
}
