// SPDX-License-Identifier: Apache-2.0

// Package acme obtains and keeps the gateway's certificates: the wildcard of each base
// domain, certificates for keys that live elsewhere (in an app's CVM), and, where the
// caller allows a name, certificates of custom domains.
//
// CertMagic does what it does well: storage layout, locks between nodes, the cache, renewal
// (ARI, RFC 9773; else at two thirds of the lifetime). The issuer under it is ours, on acmez,
// because the account must be bound by CAA and attested, every key attested before its
// certificate can appear in a log, and nothing here may open a port of its own.
//
// Guarantees: [New] does no I/O and issuance runs in the background, so that nothing here
// holds up a listener; a configuration without an issuer is an error, never some production
// CA; a record that does not parse is an error, never a new account; no certificate is
// served that has expired or is not for the name asked; a certificate from a CA is taken only
// if it has the key and the names of the request; only the TXT records made here are removed;
// secrets of DNS providers appear in no log, no error and no stored record.
//
// Trusted: the storage (the cluster's, inside gateway CVMs), the configuration. Not trusted:
// CAs beyond the names they vouch for, DNS, CSRs, whoever asks HTTP or TLS challenges.
//
// Implements spec/gateway.md §4 and §8 item 3, threats C07, K02, K10 and K11.
package acme

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"log/slog"
	"math/big"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3"
	"go.uber.org/zap"

	"github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/flight"
	"github.com/dstack-go/dstack/internal/zaplog"
)

// Method is a way to prove control of a name (RFC 8555 §8, RFC 8737); the text is that of
// CAA's validationmethods (RFC 8657 §4).
type Method string

const (
	DNS01     Method = "dns-01"
	HTTP01    Method = "http-01"
	TLSALPN01 Method = "tls-alpn-01"
)

// Config is what a Manager needs. Its zero value is refused.
type Config struct {
	// Storage holds certificates with their keys, accounts and locks; shared by the nodes
	// of a cluster. It must be private to them.
	Storage certmagic.Storage
	// CAs are tried in this order; there must be one, and two are better. A private CA is
	// package privateca's.
	CAs []CA
	// Methods are the challenges in use; nil is all three. Names of a base domain are
	// proven by DNS-01 alone.
	Methods []Method
	// Resolvers (host:port) answer for DNS zones and whether a record is seen; empty is the
	// system's, and then the authoritative servers are asked for propagation.
	Resolvers []string
	// Allowed says whether a certificate may be ordered for a name outside the base
	// domains, at the time of a handshake. Nil refuses all.
	Allowed func(ctx context.Context, name hostname.Name) error
	// CAA is what is done about CAA records of the base domains: CAACheck, CAASet, or
	// nothing; "" is CAAOff.
	CAA string
	// Attest makes the evidence that binds report data to this gateway. Nil: no key is
	// attested (development). When it fails, no certificate is ordered for the key.
	Attest func(ctx context.Context, reportData [64]byte) (quote, attestation string, err error)
	// Limits bound what apps can order.
	Limits Limits
	// CheckEvery is how often renewal is looked at; 0 is ten minutes.
	CheckEvery time.Duration
	// Log takes what happens; nil discards.
	Log *slog.Logger
}

// Domain is a base domain.
type Domain struct {
	Name hostname.Name
	// Credential writes the TXT records: in the zone of the domain, or in the zone that
	// the CNAME at _acme-challenge.<name> leads to, and then no right to the domain's own
	// zone is needed.
	Credential *Credential
	// TTL of the TXT records; 0 is 60 s.
	TTL time.Duration
	// Propagation is how long to wait for a record to be seen; 0 is two minutes, negative
	// does not look.
	Propagation time.Duration
}

// Manager obtains certificates and serves them. Its methods may be called at any time from
// any goroutine until Close.
type Manager struct {
	cfg      Config
	log      *slog.Logger
	zap      *zap.Logger
	cache    *certmagic.Cache
	managed  *certmagic.Config
	onDemand *certmagic.Config // nil when nothing is allowed
	issuers  []*caIssuer
	secrets  *secrets
	tokens   *tokens
	signing  flight.Group[string, signed]
	asking   flight.Group[struct{}, *gateway.AcmeInfoResponse]
	rates    *rates
	slots    chan struct{} // orders of base domains under way
	minAsk   time.Duration // see there

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu      sync.RWMutex
	domains map[hostname.Name]*domain
	caa     []CAAStatus
	info    *gateway.AcmeInfoResponse // the last answer of AcmeInfo
	infoAt  time.Time
	// custom are names outside the base domains, and until when (Unix seconds) they are
	// certified.
	custom   map[hostname.Name]int64
	customAt time.Time // when the log of keys was read for them
	closed   bool

	recheck chan struct{} // CAA is to be looked at
}

// domain is a base domain under management.
type domain struct {
	Domain
	provider provider
	cancel   context.CancelFunc
	status   map[string]*NameStatus // by certificate name; guarded by Manager.mu
}

// NameStatus is where a certificate of a base domain stands.
type NameStatus struct {
	Name     string
	NotAfter time.Time // zero: none yet
	Err      string    // of the last try, empty when it went well
	NextTry  time.Time // after an error
}

// New makes a Manager; it neither reads storage nor reaches for the network. Codes
// acme_config, acme_ca.
func New(cfg Config) (*Manager, error) {
	if cfg.Storage == nil {
		return nil, fault.New("acme_config", "the certificate manager has no storage")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Methods == nil {
		cfg.Methods = []Method{DNS01, TLSALPN01, HTTP01}
	}
	for _, method := range cfg.Methods {
		if method != DNS01 && method != HTTP01 && method != TLSALPN01 {
			return nil, fault.New("acme_config", "%q is no challenge", method).WithFix("use %s, %s or %s", DNS01, TLSALPN01, HTTP01)
		}
	}
	switch cfg.CAA {
	case "":
		cfg.CAA = CAAOff
	case CAAOff, CAACheck, CAASet:
	default:
		return nil, fault.New("acme_config", "CAA is to be %s, %s or %s, not %q", CAAOff, CAACheck, CAASet, clip(cfg.CAA))
	}
	if len(cfg.CAs) == 0 {
		return nil, fault.New("acme_config", "no CA is configured, and none is assumed").
			WithFix("name the directory of an ACME CA, better of two")
	}
	ctx, cancel := context.WithCancel(context.Background())
	m := &Manager{
		cfg: cfg, secrets: &secrets{}, rates: newRates(cfg.Limits), slots: make(chan struct{}, 4), minAsk: minAsk,
		ctx: ctx, cancel: cancel, domains: map[hostname.Name]*domain{}, recheck: make(chan struct{}, 1),
	}
	m.log = slog.New(redacting{cfg.Log.Handler(), m.secrets})
	m.zap = zaplog.New(m.log.Handler())
	m.tokens = newTokens(cfg.Storage)
	keys := map[string]bool{}
	for _, ca := range cfg.CAs {
		i, err := newCAIssuer(m, ca)
		if err != nil {
			cancel()
			return nil, err
		}
		if keys[i.IssuerKey()] {
			cancel()
			return nil, fault.New("acme_config", "two CAs have the name %q", ca.Name)
		}
		keys[i.IssuerKey()] = true
		m.issuers = append(m.issuers, i)
	}
	m.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert:   m.configFor,
		RenewCheckInterval: cfg.CheckEvery,
		Logger:             m.zap,
		Capacity:           100_000,
	})
	m.managed = m.config(nil)
	if cfg.Allowed != nil {
		m.onDemand = m.config(&certmagic.OnDemandConfig{DecisionFunc: m.decide})
	}
	m.work.Go(m.keepRecords)
	return m, nil
}

func (m *Manager) config(onDemand *certmagic.OnDemandConfig) *certmagic.Config {
	issuers := make([]certmagic.Issuer, len(m.issuers))
	for i, is := range m.issuers {
		issuers[i] = is
	}
	return certmagic.New(m.cache, certmagic.Config{
		RenewalWindowRatio: 1. / 3,
		KeySource:          certmagic.StandardKeyGenerator{KeyType: certmagic.P256},
		Issuers:            issuers,
		OnDemand:           onDemand,
		Storage:            m.cfg.Storage,
		// Stapling would have handshakes depend on the CA's responder, and CAs end OCSP.
		OCSP:   certmagic.OCSPConfig{DisableStapling: true},
		Logger: m.zap,
	})
}

// configFor is how certificates in the cache are renewed: those of base domains in the
// background, others when they are asked for.
func (m *Manager) configFor(cert certmagic.Certificate) (*certmagic.Config, error) {
	if m.onDemand != nil && len(cert.Names) > 0 && m.domainOf(strings.TrimPrefix(cert.Names[0], "*.")) == nil {
		return m.onDemand, nil
	}
	return m.managed, nil
}

// Close ends all work and waits for it.
func (m *Manager) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	m.mu.Unlock()
	m.cancel()
	m.cache.Stop()
	m.work.Wait()
	m.signing.Wait()
	m.asking.Wait()
	for _, i := range m.issuers {
		i.http.CloseIdleConnections()
	}
	return nil
}

// SetDomains makes the given base domains those under management: certificates for
// `*.<base>` and `<base>` are obtained and renewed in the background, and domains that are
// not listed are no longer served. Codes acme_domain, dns_credential, acme_closed.
func (m *Manager) SetDomains(_ context.Context, list []Domain) error {
	next := map[hostname.Name]*domain{}
	for _, d := range list {
		name, err := hostname.ParseBase(string(d.Name))
		if err != nil {
			return fault.Wrap(err, "acme_domain", "the base domain %q", d.Name)
		}
		if next[name] != nil {
			return fault.New("acme_domain", "the base domain %s is listed twice", name)
		}
		d.Name = name
		if d.TTL == 0 {
			d.TTL = time.Minute
		}
		next[name] = &domain{Domain: d, status: map[string]*NameStatus{}}
		if d.Credential == nil {
			return fault.New("dns_credential", "the base domain %s has no DNS credential, and a wildcard is proven by DNS alone", name).
				WithFix("add a credential of its DNS provider, or of the zone that _acme-challenge.%s leads to", name)
		}
		m.secrets.add(d.Credential)
		if next[name].provider, err = d.Credential.open(m.secrets); err != nil {
			return err
		}
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return fault.New("acme_closed", "the certificate manager is closed")
	}
	var old []*domain
	for name, was := range m.domains {
		is := next[name]
		if is != nil && is.same(was) {
			next[name] = was
			continue
		}
		was.cancel()
		old = append(old, was)
	}
	m.domains = next
	var gone []certmagic.SubjectIssuer
	for _, was := range old {
		if next[was.Name] == nil {
			gone = append(gone, certmagic.SubjectIssuer{Subject: "*." + string(was.Name)}, certmagic.SubjectIssuer{Subject: string(was.Name)})
		}
	}
	for _, d := range next {
		if d.cancel == nil {
			m.begin(d)
		}
	}
	m.mu.Unlock()
	m.cache.RemoveManaged(gone)
	select {
	case m.recheck <- struct{}{}:
	default:
	}
	return nil
}

func (d *domain) same(o *domain) bool {
	return d.TTL == o.TTL && d.Propagation == o.Propagation && d.Credential.equal(o.Credential)
}

// begin obtains the certificates of a domain in the background. The caller holds m.mu.
func (m *Manager) begin(d *domain) {
	ctx, cancel := context.WithCancel(m.ctx)
	d.cancel = cancel
	for _, name := range []string{"*." + string(d.Name), string(d.Name)} {
		d.status[name] = &NameStatus{Name: name}
		m.work.Go(func() { m.keep(ctx, d, name) })
	}
}

// keep tries until a certificate is in the cache; from then on the cache renews it.
func (m *Manager) keep(ctx context.Context, d *domain, name string) {
	for wait := 15 * time.Second; ; wait = min(2*wait, time.Hour) {
		err := m.obtain(ctx, name)
		if ctx.Err() != nil {
			return
		}
		pause := jitter(wait)
		m.mu.Lock()
		*d.status[name] = NameStatus{Name: name}
		if err != nil {
			d.status[name].Err, d.status[name].NextTry = m.secrets.text(err.Error()), time.Now().Add(pause)
		}
		m.mu.Unlock()
		if err == nil {
			return
		}
		m.log.Warn("no certificate yet", "name", name, "error", err, "again_in", pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func (m *Manager) obtain(ctx context.Context, name string) error {
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return m.managed.ManageSync(ctx, []string{name})
}

// jitter spreads a duration over ±20 %.
func jitter(d time.Duration) time.Duration {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(d)*2/5+1))
	if err != nil {
		return d
	}
	return d - d/5 + time.Duration(n.Int64())
}

// domainOf is the base domain that a name is, or lies directly or deeper in; nil when none.
func (m *Manager) domainOf(name string) *domain {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for n := hostname.Name(name); n != ""; _, n = n.Split() {
		if d := m.domains[n]; d != nil {
			return d
		}
	}
	return nil
}

// Status tells of the certificates of the base domains, by name.
func (m *Manager) Status() []NameStatus {
	m.mu.RLock()
	var list []NameStatus
	for _, d := range m.domains {
		for _, s := range d.status {
			list = append(list, *s)
		}
	}
	m.mu.RUnlock()
	for i := range list {
		for _, c := range m.cache.AllMatchingCertificates(list[i].Name) {
			if slices.Contains(c.Names, list[i].Name) && c.Leaf.NotAfter.After(list[i].NotAfter) {
				list[i].NotAfter = c.Leaf.NotAfter
			}
		}
	}
	slices.SortFunc(list, func(a, b NameStatus) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// Outcome is what became of the orders at a CA since the start.
type Outcome struct {
	CA             string
	Issued, Failed uint64
}

// Outcomes returns them in the order of the CAs.
func (m *Manager) Outcomes() (out []Outcome) {
	for _, i := range m.issuers {
		out = append(out, Outcome{CA: i.ca.Name, Issued: i.issued.Load(), Failed: i.failed.Load()})
	}
	return out
}

// GetCertificate is for [tls.Config]: it serves the certificate of a name, and answers
// TLS-ALPN-01 challenges of any node on the storage. It returns no certificate that has
// expired, is not yet valid or is not for the name. Codes cert_name, cert_none, cert_expired.
func (m *Manager) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name, err := hostname.ParseName(hello.ServerName)
	if err != nil {
		return nil, fault.Wrap(err, "cert_name", "no certificate without the name of a host")
	}
	if slices.Equal(hello.SupportedProtos, []string{acmez.ACMETLS1Protocol}) {
		return m.tokens.certificate(hello.Context(), name)
	}
	cfg := m.managed
	if m.domainOf(string(name)) == nil {
		if cfg = m.onDemand; cfg == nil {
			return nil, fault.New("cert_none", "there is no certificate for %s", name)
		}
	}
	cert, err := cfg.GetCertificate(hello)
	if err != nil {
		return nil, fault.Wrap(m.secrets.error(err), "cert_none", "there is no certificate for %s", name)
	}
	if cert == nil || cert.Leaf == nil {
		return nil, fault.New("cert_none", "there is no certificate for %s", name)
	}
	if now := time.Now(); now.After(cert.Leaf.NotAfter) || now.Before(cert.Leaf.NotBefore) {
		return nil, fault.New("cert_expired", "the certificate for %s is valid from %s to %s alone", name,
			cert.Leaf.NotBefore.UTC().Format(time.RFC3339), cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	if err := cert.Leaf.VerifyHostname(string(name)); err != nil {
		return nil, fault.New("cert_none", "there is no certificate for %s", name)
	}
	return cert, nil
}

// decide is asked before a certificate outside the base domains is loaded or ordered.
func (m *Manager) decide(ctx context.Context, name string) error {
	n, err := hostname.ParseName(name)
	if err != nil {
		return err
	}
	if m.domainOf(name) != nil {
		return fault.New("cert_none", "%s lies in a base domain, whose certificate is the wildcard", n)
	}
	return m.cfg.Allowed(ctx, n)
}

// Renew replaces the certificates of a base domain when they are due, or in any case when
// forced. Connections that are open are not touched. Codes acme_domain, acme_renew.
func (m *Manager) Renew(ctx context.Context, base hostname.Name, force bool) error {
	m.mu.RLock()
	known := m.domains[base] != nil
	m.mu.RUnlock()
	if !known {
		return fault.New("acme_domain", "%s is no base domain of this gateway", base)
	}
	for _, name := range []string{"*." + string(base), string(base)} {
		if err := m.managed.RenewCertSync(ctx, name, force); err != nil {
			return fault.Wrap(m.secrets.error(err), "acme_renew", "renewing %s", name)
		}
	}
	return m.Reload(ctx, base)
}

// Reload takes the stored certificates of a base domain into service, as when another node
// has renewed them. What is served stays until the new is loaded. Code acme_reload.
func (m *Manager) Reload(ctx context.Context, base hostname.Name) error {
	for _, name := range []string{"*." + string(base), string(base)} {
		var old []string
		for _, c := range m.cache.AllMatchingCertificates(name) {
			if slices.Contains(c.Names, name) {
				old = append(old, c.Hash())
			}
		}
		cert, err := m.managed.CacheManagedCertificate(ctx, name)
		if err != nil {
			return fault.Wrap(err, "acme_reload", "loading the certificate of %s", name)
		}
		if !slices.Contains(old, cert.Hash()) {
			m.cache.Remove(old)
		}
	}
	return nil
}

// ended reports whether an error is the end of a context.
func ended(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
