// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// ACMEConfig is public authorities, in place of the private CA.
type ACMEConfig struct {
	// Directories are the URLs of ACME directories, separated by commas, tried in this
	// order; empty: the private CA certifies.
	Directories string `toml:"directories"`
	Contact     string `toml:"contact"` // an address for the authorities' mails
	// Roots is a PEM file of the roots that their API is checked with; empty: the system's.
	Roots string `toml:"roots"`
	// DNSProvider writes the TXT records that prove the base domains: cloudflare, gandi,
	// hetzner or rfc2136; DNSSettings are its parameters, key=value, separated by commas.
	DNSProvider string        `toml:"dns_provider"`
	DNSSettings config.Secret `toml:"dns_settings"`
	// Resolvers (host:port, separated by commas) are asked whether a record is seen.
	Resolvers string `toml:"resolvers"`
	// Propagation is how long to wait for that; 2 min. Negative: not at all.
	Propagation config.Duration `toml:"propagation"`
}

// list splits at commas.
func list(text string) (out []string) {
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, part)
		}
	}
	return out
}

func (c *ACMEConfig) check() error {
	if c.Directories == "" {
		if c.DNSProvider != "" {
			return bad("core.acme.dns_provider without core.acme.directories").WithFix("name the authorities' directories")
		}
		return nil
	}
	for _, text := range list(c.Directories) {
		if u, err := url.Parse(text); err != nil || u.Scheme != "https" || u.Hostname() == "" {
			return bad("core.acme.directories: %q is no https URL", text)
		}
	}
	_, err := c.credential()
	return err
}

func (c *ACMEConfig) credential() (*acme.Credential, error) {
	params := map[string]string{}
	for _, part := range list(c.DNSSettings.Reveal()) {
		key, value, _ := strings.Cut(part, "=")
		params[key] = value
	}
	return acme.NewCredential(c.DNSProvider, params)
}

// caName names an authority in the storage: its host, in letters, digits and hyphens.
func caName(directory string) string {
	u, err := url.Parse(directory)
	if err != nil {
		return ""
	}
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(u.Host))
}

// authorities opens the manager of certificates; nil: the private CA certifies. It asks
// nobody yet.
func (n *Node) authorities(storage certmagic.Storage, edit ...func(*acme.Config)) (*acme.Manager, error) {
	c := &n.cfg.Core.ACME
	if c.Directories == "" {
		return nil, nil
	}
	var roots *x509.CertPool
	if c.Roots != "" {
		text, err := os.ReadFile(c.Roots)
		if err != nil {
			return nil, fault.Wrap(err, "gateway_config", "core.acme.roots")
		}
		if roots = x509.NewCertPool(); !roots.AppendCertsFromPEM(text) {
			return nil, bad("core.acme.roots: %s has no certificate", c.Roots)
		}
	}
	cfg := acme.Config{Storage: storage, Resolvers: list(c.Resolvers), Log: n.log}
	for _, d := range list(c.Directories) {
		cfg.CAs = append(cfg.CAs, acme.CA{Name: caName(d), Directory: d, Contact: c.Contact, Roots: roots})
	}
	if n.self != nil {
		cfg.Attest = func(ctx context.Context, data [64]byte) (quote, attestation string, err error) {
			b, err := n.self.Attest(ctx, dstack.ReportData(data))
			return "", hex.EncodeToString(b), err
		}
	}
	for _, e := range edit { // of tests
		e(&cfg)
	}
	return acme.New(cfg)
}

// manage puts the base domains, those of the file and others, under the manager, which
// obtains their certificates in the background.
func (n *Node) manage(ctx context.Context, m *acme.Manager, others []acme.Domain) error {
	c := &n.cfg.Core.ACME
	credential, err := c.credential()
	if err != nil {
		return err
	}
	domains := slices.Clone(others)
	for _, d := range n.domains {
		domains = append(domains, acme.Domain{Name: d.Name, Credential: credential, Propagation: c.Propagation.Duration})
	}
	return m.SetDomains(ctx, domains)
}

// orderTime is how long an order may take.
const orderTime = 5 * time.Minute

// orders lets an order go on when whoever asked has no more time: he gets the certificate
// when he asks again.
type orders struct {
	m interface {
		Sign(ctx context.Context, csr *x509.CertificateRequest, names []hostname.Name) ([]byte, time.Time, time.Time, error)
	}
	mu      sync.Mutex
	running map[[sha256.Size]byte]bool
}

type signed struct {
	chain             []byte
	notAfter, renewAt time.Time
	err               error
}

// Sign implements gateway.Certificates. Code certificate_pending: it is being ordered.
func (o *orders) Sign(ctx context.Context, csr *x509.CertificateRequest, names []hostname.Name) ([]byte, time.Time, time.Time, error) {
	pending := fault.New("certificate_pending", "the certificate is being ordered").WithFix("ask again in a while")
	key := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	o.mu.Lock()
	if o.running == nil {
		o.running = map[[sha256.Size]byte]bool{}
	}
	if o.running[key] {
		o.mu.Unlock()
		return nil, time.Time{}, time.Time{}, pending
	}
	o.running[key] = true
	o.mu.Unlock()
	done := make(chan signed, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), orderTime)
		defer cancel()
		var s signed
		s.chain, s.notAfter, s.renewAt, s.err = o.m.Sign(ctx, csr, names)
		o.mu.Lock()
		delete(o.running, key)
		o.mu.Unlock()
		done <- s
	}()
	select {
	case s := <-done:
		return s.chain, s.notAfter, s.renewAt, s.err
	case <-ctx.Done():
		return nil, time.Time{}, time.Time{}, pending
	}
}
