// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
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
	// CAA is off, check (say what is wrong with CAA records at the base domains) or set
	// (make them let these accounts alone issue); check.
	CAA string `toml:"caa"`
	// CAAIdentities are what CAA calls the authorities, EABKeyIDs and EABMACKeys their
	// external accounts (base64url): one for each of Directories, in its order, separated
	// by commas; empty: as the directory says, and none.
	CAAIdentities string        `toml:"caa_identities"`
	EABKeyIDs     string        `toml:"eab_key_ids"`
	EABMACKeys    config.Secret `toml:"eab_mac_keys"`
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

// each splits at commas into exactly n, or n empty ones.
func each(key, text string, n int) ([]string, error) {
	if text == "" {
		return make([]string, n), nil
	}
	parts := strings.Split(text, ",")
	if len(parts) != n {
		return nil, bad("%s has %d parts, and core.acme.directories %d", key, len(parts), n).WithFix("separate them by commas, and leave those empty that have none")
	}
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	return parts, nil
}

// cas are the authorities.
func (c *ACMEConfig) cas() ([]acme.CA, error) {
	directories := list(c.Directories)
	var identities, ids, keys []string
	for _, part := range []struct {
		key, text string
		to        *[]string
	}{
		{"core.acme.caa_identities", c.CAAIdentities, &identities}, {"core.acme.eab_key_ids", c.EABKeyIDs, &ids}, {"core.acme.eab_mac_keys", c.EABMACKeys.Reveal(), &keys},
	} {
		var err error
		if *part.to, err = each(part.key, part.text, len(directories)); err != nil {
			return nil, err
		}
	}
	var out []acme.CA
	for i, d := range directories {
		if (ids[i] == "") != (keys[i] == "") {
			return nil, bad("core.acme.eab_key_ids and core.acme.eab_mac_keys are not both there for %s", d)
		}
		out = append(out, acme.CA{Name: caName(d), Directory: d, Contact: c.Contact, Identity: identities[i], KeyID: ids[i], MACKey: keys[i]})
	}
	return out, nil
}

func (c *ACMEConfig) check() error {
	switch c.CAA {
	case "", acme.CAAOff, acme.CAACheck, acme.CAASet:
	default:
		return bad("core.acme.caa is %q, not %s, %s or %s", c.CAA, acme.CAAOff, acme.CAACheck, acme.CAASet)
	}
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
	if _, err := c.cas(); err != nil {
		return err
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
	cfg := acme.Config{Storage: storage, Resolvers: list(c.Resolvers), CAA: cmp.Or(c.CAA, acme.CAACheck), Log: n.log}
	var err error
	if cfg.CAs, err = c.cas(); err != nil {
		return nil, err
	}
	for i := range cfg.CAs {
		cfg.CAs[i].Roots = roots
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
		SignCustom(ctx context.Context, csr *x509.CertificateRequest, name hostname.Name, owner string) ([]byte, time.Time, time.Time, error)
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
	return o.order(ctx, csr, "", func(ctx context.Context) (s signed) {
		s.chain, s.notAfter, s.renewAt, s.err = o.m.Sign(ctx, csr, names)
		return s
	})
}

// SignCustom implements gateway.CustomCertificates. Code certificate_pending.
func (o *orders) SignCustom(ctx context.Context, csr *x509.CertificateRequest, name hostname.Name, owner string) ([]byte, time.Time, time.Time, error) {
	return o.order(ctx, csr, name, func(ctx context.Context) (s signed) {
		s.chain, s.notAfter, s.renewAt, s.err = o.m.SignCustom(ctx, csr, name, owner)
		return s
	})
}

// order runs one order at a time for a key and a custom domain ("" for the base domains).
func (o *orders) order(ctx context.Context, csr *x509.CertificateRequest, domain hostname.Name, sign func(context.Context) signed) ([]byte, time.Time, time.Time, error) {
	pending := fault.New("certificate_pending", "the certificate is being ordered").WithFix("ask again in a while")
	key := sha256.Sum256(append([]byte(domain+"\n"), csr.RawSubjectPublicKeyInfo...))
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
		s := sign(ctx)
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
