// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/libdns/cloudflare"
	"github.com/libdns/gandi"
	"github.com/libdns/hetzner"
	"github.com/libdns/libdns"
	"github.com/libdns/rfc2136"
	"github.com/mholt/acmez/v3/acme"
	"github.com/miekg/dns"

	"github.com/dstack-go/dstack/internal/fault"
)

// provider changes the records of a zone.
type provider interface {
	libdns.RecordGetter
	libdns.RecordAppender
	libdns.RecordDeleter
}

// kind is a DNS provider that we know.
type kind struct {
	required, optional []string
	public             []string // parameters that are no secrets
	open               func(p map[string]string) provider
}

func (k kind) secret(param string) bool { return !slices.Contains(k.public, param) }

var kinds = map[string]kind{
	"cloudflare": {
		required: []string{"api_token"}, optional: []string{"zone_token"},
		open: func(p map[string]string) provider {
			return &cloudflare.Provider{APIToken: p["api_token"], ZoneToken: p["zone_token"]}
		},
	},
	"gandi": {
		required: []string{"token"},
		open:     func(p map[string]string) provider { return &gandi.Provider{BearerToken: p["token"]} },
	},
	"hetzner": {
		required: []string{"token"},
		open:     func(p map[string]string) provider { return hetzner.New(p["token"]) },
	},
	"rfc2136": {
		required: []string{"server", "key_name", "key_alg", "key"},
		public:   []string{"server", "key_name", "key_alg"},
		open: func(p map[string]string) provider {
			return &rfc2136.Provider{Server: p["server"], KeyName: p["key_name"], KeyAlg: p["key_alg"], Key: p["key"]}
		},
	},
}

// maxParam is the longest parameter of a credential in bytes.
const maxParam = 4096

// Credential is the right to change a zone at a DNS provider. It prints without its secrets.
type Credential struct {
	kind   string
	params map[string]string
}

// NewCredential checks the parameters of a provider: cloudflare (api_token, zone_token),
// gandi (token), hetzner (token), rfc2136 (server as host:port, key_name, key_alg such as
// hmac-sha256, key in base64). Code dns_credential.
func NewCredential(provider string, params map[string]string) (*Credential, error) {
	k, ok := kinds[provider]
	if !ok {
		return nil, fault.New("dns_credential", "%q is no DNS provider that this gateway knows", clip(provider)).
			WithFix("use one of %s, or delegate _acme-challenge by CNAME to a zone at one of them", strings.Join(slices.Sorted(maps.Keys(kinds)), ", "))
	}
	for _, name := range k.required {
		if params[name] == "" {
			return nil, fault.New("dns_credential", "a credential of %s needs %s", provider, name)
		}
	}
	for name, value := range params {
		if !slices.Contains(k.required, name) && !slices.Contains(k.optional, name) {
			return nil, fault.New("dns_credential", "a credential of %s has no parameter %q", provider, clip(name))
		}
		// Control characters would end up in HTTP headers.
		if len(value) > maxParam || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return nil, fault.New("dns_credential", "the parameter %s of a credential of %s is too long or has control characters", name, provider)
		}
	}
	return &Credential{provider, maps.Clone(params)}, nil
}

// Provider is the name of the DNS provider.
func (c *Credential) Provider() string { return c.kind }

// String names the provider alone.
func (c *Credential) String() string { return "credential of " + c.kind }

// GoString is String.
func (c *Credential) GoString() string { return c.String() }

// LogValue is String.
func (c *Credential) LogValue() slog.Value { return slog.StringValue(c.String()) }

func (c *Credential) equal(o *Credential) bool {
	if c == nil || o == nil {
		return c == o
	}
	return c.kind == o.kind && maps.Equal(c.params, o.params)
}

func (c *Credential) open(s *secrets) (provider, error) {
	if c.params == nil {
		return nil, fault.New("dns_credential", "the DNS credential is empty")
	}
	return guarded{kinds[c.kind].open(c.params), s}, nil
}

// Records opens the zone of a credential, for CAA. Errors of the provider are without its
// secrets. Code dns_credential.
func (m *Manager) Records(c *Credential) (interface {
	libdns.RecordGetter
	libdns.RecordAppender
	libdns.RecordDeleter
}, error) {
	m.secrets.add(c)
	return c.open(m.secrets)
}

// guarded keeps secrets out of a provider's errors.
type guarded struct {
	provider
	secrets *secrets
}

func (g guarded) GetRecords(ctx context.Context, zone string) ([]libdns.Record, error) {
	r, err := g.provider.GetRecords(ctx, zone)
	return r, g.flat(err)
}

func (g guarded) AppendRecords(ctx context.Context, zone string, records []libdns.Record) ([]libdns.Record, error) {
	r, err := g.provider.AppendRecords(ctx, zone, records)
	return r, g.flat(err)
}

func (g guarded) DeleteRecords(ctx context.Context, zone string, records []libdns.Record) ([]libdns.Record, error) {
	r, err := g.provider.DeleteRecords(ctx, zone, records)
	return r, g.flat(err)
}

func (g guarded) flat(err error) error {
	if err == nil || ended(err) {
		return err
	}
	return errors.New(clipTo(g.secrets.text(err.Error()), 1024))
}

// dnsSolver proves names of base domains by TXT records. It remembers what it made, and
// removes nothing else.
type dnsSolver struct {
	m      *Manager
	mu     sync.Mutex
	active map[string]*certmagic.DNS01Solver // by challenge
}

// Present makes the record, where the CNAME at the challenge's name leads.
func (s *dnsSolver) Present(ctx context.Context, c acme.Challenge) error {
	d := s.m.domainOf(c.Identifier.Value)
	if d == nil || d.provider == nil {
		return fault.New("dns_credential", "there is no DNS credential for %s", c.Identifier.Value)
	}
	target, err := s.m.follow(ctx, c.DNS01TXTRecordName())
	if err != nil {
		return err
	}
	solver := &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{
		DNSProvider: d.provider, TTL: d.TTL, Resolvers: s.m.cfg.Resolvers, OverrideDomain: target, Logger: s.m.zap,
	}}
	if solver.PropagationTimeout = d.Propagation; d.Propagation < 0 {
		solver.PropagationTimeout = -1
	}
	if err := solver.Present(ctx, c); err != nil {
		return fault.Wrap(err, "dns_challenge", "making the TXT record at %s", target)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active == nil {
		s.active = map[string]*certmagic.DNS01Solver{}
	}
	s.active[c.URL] = solver
	return nil
}

// Wait returns when the record is seen.
func (s *dnsSolver) Wait(ctx context.Context, c acme.Challenge) error {
	s.mu.Lock()
	solver := s.active[c.URL]
	s.mu.Unlock()
	if solver == nil {
		return fault.New("dns_challenge", "there is no TXT record for %s", c.Identifier.Value)
	}
	return solver.Wait(ctx, c)
}

// CleanUp removes the record that Present made.
func (s *dnsSolver) CleanUp(ctx context.Context, c acme.Challenge) error {
	s.mu.Lock()
	solver := s.active[c.URL]
	delete(s.active, c.URL)
	s.mu.Unlock()
	if solver == nil {
		return nil
	}
	return solver.CleanUp(ctx, c)
}

// maxAliases bounds a chain of CNAME records.
const maxAliases = 8

// follow returns where the CNAME records at a name lead; the name itself without any.
func (m *Manager) follow(ctx context.Context, name string) (string, error) {
	servers := certmagic.RecursiveNameservers(m.cfg.Resolvers)
	for range maxAliases {
		next, err := lookupCNAME(ctx, name, servers)
		if err != nil {
			return "", fault.Wrap(err, "dns_challenge", "asking where %s leads", name)
		}
		if next == "" {
			return name, nil
		}
		name = next
	}
	return "", fault.New("dns_challenge", "the CNAME records at %s lead on more than %d times", name, maxAliases)
}

func lookupCNAME(ctx context.Context, name string, servers []string) (string, error) {
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeCNAME)
	q.SetEdns0(1232, false)
	err := errors.New("there is no resolver")
	for _, server := range servers {
		var in *dns.Msg
		for _, network := range []string{"udp", "tcp"} {
			client := dns.Client{Net: network, Timeout: 5 * time.Second}
			if in, _, err = client.ExchangeContext(ctx, q, server); err != nil || !in.Truncated {
				break
			}
		}
		if err != nil {
			continue
		}
		if in.Rcode != dns.RcodeSuccess && in.Rcode != dns.RcodeNameError {
			err = errors.New(dns.RcodeToString[in.Rcode])
			continue
		}
		for _, rr := range in.Answer {
			if c, ok := rr.(*dns.CNAME); ok && strings.EqualFold(c.Hdr.Name, dns.Fqdn(name)) {
				return strings.ToLower(strings.TrimSuffix(c.Target, ".")), nil
			}
		}
		return "", nil
	}
	return "", err
}

// clip bounds what of a stranger's text goes into a message.
func clip(s string) string { return clipTo(s, 128) }

func clipTo(s string, n int) string {
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "") + "…"
	}
	return s
}
