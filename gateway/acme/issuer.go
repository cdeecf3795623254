// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3"
	"github.com/mholt/acmez/v3/acme"

	"github.com/dstack-go/dstack/internal/fault"
)

// CA is an ACME certification authority.
type CA struct {
	// Name tells CAs apart in storage and logs: lower-case letters, digits, hyphens. It
	// must stay with the CA: its account and certificates lie under it.
	Name string
	// Directory is the URL of the directory (RFC 8555 §7.1.1).
	Directory string
	// Identity is what CAA calls the CA, such as letsencrypt.org; empty takes the first
	// that its directory lists.
	Identity string
	// KeyID and MACKey (base64url) bind the account to one at the CA (RFC 8555 §7.3.4).
	KeyID, MACKey string
	// Profile of certificates to ask for; empty is the CA's default.
	Profile string
	// Roots that the CA's API is checked with; nil is the system's.
	Roots *x509.CertPool
	// Contact is an address for the CA's mails; may be empty.
	Contact string
}

// Bounds of what a CA may answer.
const (
	maxAnswer = 1 << 20
	maxChain  = 64 << 10
	callTime  = 30 * time.Second
	orderTime = 10 * time.Minute
)

// Bounds of how long a CA is left alone that is down or asks for quiet.
const (
	minBackoff = time.Minute
	maxBackoff = 6 * time.Hour
)

// caIssuer orders certificates at one CA.
type caIssuer struct {
	m    *Manager
	ca   CA
	http *http.Client
	dns  *dnsSolver

	mu       sync.Mutex
	until    time.Time // before which the CA is left alone
	failures int       // in a row
	outage   *outage   // what the last calls met

	issued, failed atomic.Uint64 // orders
}

// outage is an answer that says the CA, not the request, is the trouble.
type outage struct {
	what  string
	after time.Duration // as the CA asks; 0 when it does not
}

func newCAIssuer(m *Manager, ca CA) (*caIssuer, error) {
	if ca.Name == "" || len(ca.Name) > 64 || strings.Trim(ca.Name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return nil, fault.New("acme_ca", "the CA's name %q is not 1 to 64 lower-case letters, digits and hyphens", clip(ca.Name))
	}
	u, err := url.Parse(ca.Directory)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, fault.New("acme_ca", "the directory of the CA %s is no https URL", ca.Name).WithFix("write it as the CA's documentation has it, such as https://acme-v02.api.letsencrypt.org/directory")
	}
	if (ca.KeyID == "") != (ca.MACKey == "") {
		return nil, fault.New("acme_ca", "the external account of the CA %s needs both the key id and the MAC key", ca.Name)
	}
	i := &caIssuer{m: m, ca: ca, dns: &dnsSolver{m: m}}
	if ca.MACKey != "" {
		m.secrets.addValue("eab-"+ca.Name, ca.MACKey)
	}
	i.http = &http.Client{
		Timeout: callTime,
		Transport: watched{i, &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: callTime, ResponseHeaderTimeout: callTime,
			IdleConnTimeout: time.Minute, MaxIdleConnsPerHost: 2,
			TLSClientConfig: &tls.Config{RootCAs: ca.Roots, MinVersion: tls.VersionTLS12},
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("the CA leads to another address") },
	}
	return i, nil
}

// watched bounds answers and remembers what says that the CA is in trouble.
type watched struct {
	i    *caIssuer
	next *http.Transport
}

func (w watched) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := w.next.RoundTrip(r)
	switch {
	case err != nil:
		if r.Context().Err() == nil {
			w.i.note(&outage{what: "cannot be reached"})
		}
		return nil, err
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500:
		o := &outage{what: "answers " + strconv.Itoa(resp.StatusCode)}
		if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
			o.after = time.Duration(min(s, int(maxBackoff/time.Second))) * time.Second
		} else if at, err := http.ParseTime(resp.Header.Get("Retry-After")); err == nil {
			o.after = time.Until(at)
		}
		w.i.note(o)
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	return resp, nil
}

func (w watched) CloseIdleConnections() { w.next.CloseIdleConnections() }

func (i *caIssuer) note(o *outage) {
	i.mu.Lock()
	i.outage = o
	i.mu.Unlock()
}

// IssuerKey is the CA's place in storage.
func (i *caIssuer) IssuerKey() string { return i.ca.Name }

// rest returns an error while the CA is left alone.
func (i *caIssuer) rest() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if wait := time.Until(i.until); wait > 0 {
		return fault.New("acme_ca_down", "the CA %s is left alone for %s", i.ca.Name, wait.Round(time.Second))
	}
	i.outage = nil
	return nil
}

// settle draws the lesson from a run at the CA: whoever is down, or asks for quiet, gets it.
func (i *caIssuer) settle(err error) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err == nil {
		i.failures, i.until = 0, time.Time{}
		return nil
	}
	if i.outage == nil {
		if fault.Code(err) != "" {
			return i.m.secrets.error(err)
		}
		return fault.Wrap(i.m.secrets.error(err), "acme_order", "the CA %s", i.ca.Name)
	}
	wait := min(minBackoff<<min(i.failures, 16), maxBackoff)
	wait = min(max(jitter(wait), i.outage.after), maxBackoff)
	i.failures++
	i.until = time.Now().Add(wait)
	return fault.Wrap(i.m.secrets.error(err), "acme_ca_down", "the CA %s %s", i.ca.Name, i.outage.what)
}

func (i *caIssuer) client() *acmez.Client {
	return &acmez.Client{Client: &acme.Client{
		Directory: i.ca.Directory, HTTPClient: i.http, UserAgent: "dstack-gateway",
		PollTimeout: 3 * time.Minute, Logger: slog.New(quiet{i.m.log.Handler()}),
	}}
}

// quiet drops the debug lines of the ACME client, which hold whole requests.
type quiet struct{ slog.Handler }

func (q quiet) Enabled(ctx context.Context, l slog.Level) bool {
	return l > slog.LevelDebug && q.Handler.Enabled(ctx, l)
}
func (q quiet) WithAttrs(a []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(a)} }
func (q quiet) WithGroup(n string) slog.Handler      { return quiet{q.Handler.WithGroup(n)} }

// Issue orders a certificate for the key and the DNS names of a request. Codes acme_ca_down
// (the next CA may do), acme_order, acme_wrong_certificate, acme_attest, acme_record.
func (i *caIssuer) Issue(ctx context.Context, csr *x509.CertificateRequest) (*certmagic.IssuedCertificate, error) {
	if err := i.rest(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, orderTime)
	defer cancel()
	out, err := i.issue(ctx, csr)
	if err != nil {
		i.failed.Add(1)
		return nil, err
	}
	i.issued.Add(1)
	return out, nil
}

func (i *caIssuer) issue(ctx context.Context, csr *x509.CertificateRequest) (*certmagic.IssuedCertificate, error) {
	if err := i.m.attestKey(ctx, csr); err != nil {
		return nil, err
	}
	cert, err := i.order(ctx, csr)
	if err = i.settle(err); err != nil {
		return nil, err
	}
	leaf, err := checkIssued(cert.ChainPEM, csr)
	if err != nil {
		return nil, err
	}
	if err := i.m.certified(ctx, leaf); err != nil {
		return nil, err
	}
	return &certmagic.IssuedCertificate{Certificate: cert.ChainPEM, Metadata: cert}, nil
}

func (i *caIssuer) order(ctx context.Context, csr *x509.CertificateRequest) (acme.Certificate, error) {
	client := i.client()
	account, err := i.account(ctx, client.Client)
	if err != nil {
		return acme.Certificate{}, err
	}
	client.ChallengeSolvers = i.solvers(csr.DNSNames)
	params, err := acmez.OrderParametersFromCSR(account, csr)
	if err != nil {
		return acme.Certificate{}, err
	}
	params.Profile = i.ca.Profile
	params.Replaces = i.replaces(ctx, csr.DNSNames)
	chains, err := client.ObtainCertificate(ctx, params)
	if err != nil {
		return acme.Certificate{}, err
	}
	if len(chains) == 0 {
		return acme.Certificate{}, errors.New("the CA offers no chain")
	}
	return chains[0], nil
}

// solvers proves names in base domains by DNS-01, others by what needs no credential.
func (i *caIssuer) solvers(names []string) map[string]acmez.Solver {
	byDNS := slices.ContainsFunc(names, func(n string) bool { return i.m.domainOf(strings.TrimPrefix(n, "*.")) != nil })
	all := map[Method]acmez.Solver{HTTP01: i.m.tokens, TLSALPN01: i.m.tokens}
	if byDNS {
		all = map[Method]acmez.Solver{DNS01: i.dns}
	}
	use := map[string]acmez.Solver{}
	for method, solver := range all {
		if slices.Contains(i.m.cfg.Methods, method) {
			use[string(method)] = solver
		}
	}
	return use
}

type replacesKey struct{}

// replaces is the certificate that an order of this CA follows (RFC 9773 §5).
func (i *caIssuer) replaces(ctx context.Context, names []string) *x509.Certificate {
	if old, ok := ctx.Value(replacesKey{}).(map[string]*x509.Certificate); ok {
		return old[i.ca.Name]
	}
	if len(names) != 1 {
		return nil
	}
	data, err := i.m.cfg.Storage.Load(ctx, certmagic.StorageKeys.SiteCert(i.IssuerKey(), names[0]))
	if err != nil {
		return nil
	}
	chain, err := parseChain(data)
	if err != nil || time.Now().After(chain[0].NotAfter) {
		return nil
	}
	return chain[0]
}

// GetRenewalInfo lets CertMagic ask the CA when to renew.
func (i *caIssuer) GetRenewalInfo(ctx context.Context, cert certmagic.Certificate) (acme.RenewalInfo, error) {
	if err := i.rest(); err != nil {
		return acme.RenewalInfo{}, err
	}
	info, err := i.client().GetRenewalInfo(ctx, cert.Leaf)
	if errors.Is(err, acme.ErrUnsupported) {
		return info, err
	}
	return info, i.settle(err)
}

// twoThirds is when a certificate is due without the CA's word, spread over a twentieth of
// its lifetime, earlier.
func twoThirds(leaf *x509.Certificate) time.Time {
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	return leaf.NotBefore.Add(life*2/3 - jitter(life/40))
}

// parseChain reads a chain in PEM, the leaf first, and nothing else.
func parseChain(data []byte) ([]*x509.Certificate, error) {
	if len(data) > maxChain {
		return nil, fmt.Errorf("the chain has %d bytes, more than %d", len(data), maxChain)
	}
	var chain []*x509.Certificate
	for rest := bytes.TrimSpace(data); len(rest) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("the chain holds something else than certificates")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		chain, rest = append(chain, cert), bytes.TrimSpace(rest)
	}
	if len(chain) == 0 {
		return nil, errors.New("the chain is empty")
	}
	return chain, nil
}

// checkIssued reports whether a chain is what was asked for: the key of the request, exactly
// its names, valid now, and each certificate signed by the next. Code acme_wrong_certificate.
func checkIssued(chainPEM []byte, csr *x509.CertificateRequest) (*x509.Certificate, error) {
	chain, err := parseChain(chainPEM)
	if err != nil {
		return nil, fault.Wrap(err, "acme_wrong_certificate", "the CA's answer")
	}
	leaf := chain[0]
	if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, csr.RawSubjectPublicKeyInfo) {
		return nil, fault.New("acme_wrong_certificate", "the CA certified another key than was asked for")
	}
	if !sameNames(leaf.DNSNames, csr.DNSNames) || len(leaf.IPAddresses)+len(leaf.EmailAddresses)+len(leaf.URIs) > 0 {
		return nil, fault.New("acme_wrong_certificate", "the CA certified other names than were asked for")
	}
	if now := time.Now(); now.After(leaf.NotAfter) {
		return nil, fault.New("acme_wrong_certificate", "the CA's certificate ended at %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	if leaf.IsCA {
		return nil, fault.New("acme_wrong_certificate", "the CA's certificate is one of a CA")
	}
	for n, cert := range chain[:len(chain)-1] {
		if err := cert.CheckSignatureFrom(chain[n+1]); err != nil {
			return nil, fault.Wrap(err, "acme_wrong_certificate", "the CA's chain does not hold at %d", n)
		}
	}
	return leaf, nil
}

func sameNames(a, b []string) bool {
	normal := func(list []string) []string {
		list = slices.Clone(list)
		for i := range list {
			list[i] = strings.ToLower(list[i])
		}
		slices.SortFunc(list, cmp.Compare[string])
		return slices.Compact(list)
	}
	return slices.Equal(normal(a), normal(b))
}

// isECDSA reports whether a key is one that we certify.
func isECDSA(key any) bool {
	k, ok := key.(*ecdsa.PublicKey)
	return ok && (k.Curve.Params().BitSize == 256 || k.Curve.Params().BitSize == 384)
}

// metadataRenewal is when the CA wants a certificate renewed, if that came with it.
func metadataRenewal(metadata any) *acme.RenewalInfo {
	if cert, ok := metadata.(acme.Certificate); ok {
		return cert.RenewalInfo
	}
	return nil
}
