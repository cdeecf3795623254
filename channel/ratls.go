// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxCertificateAge is the longest that RA-TLS evidence counts where an age is
// demanded, and the longest life of a certificate made here.
const MaxCertificateAge = 24 * time.Hour

// AnyAge accepts RA-TLS certificates however old. Upstream's need it: they begin
// in 1975 and say nothing about when they were made.
const AnyAge time.Duration = -1

// RATLS judges peers by the evidence in their certificates, as upstream's
// programs do. It is weaker than an attested channel and for interoperation only:
// the evidence speaks of a key, not of this connection. It may be old, whoever has
// a copy of the key can use it, and any app in the guest can make it for a key of
// its own unless CommittedKey is set (threats.md B08, B20, C01). Peers carry
// BindingKey.
//
// It must not be changed once in use; the zero value can neither dial nor judge.
type RATLS struct {
	// Appraiser judges peers; required.
	Appraiser Appraiser
	// Intended is whom this end means; a client must name an app.
	Intended Intended
	// MaxAge is the greatest age of a certificate, since it began to be valid: zero
	// means MaxCertificateAge, which is also the most, and AnyAge means no limit. It
	// holds honest peers to renewing their evidence; a thief of the key can date a
	// new certificate as he likes.
	MaxAge time.Duration
	// CommittedKey demands the key that the guest's init committed to before its app
	// ran. Upstream's guests commit to none.
	CommittedKey bool
	// Certifier, when set, gives this end's own certificate to servers that ask.
	Certifier *Certifier
	// Timeout bounds the handshake; zero means 60 seconds.
	Timeout time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

func (c *RATLS) ready(role Role) (*RATLS, error) {
	bad := func(why string) (*RATLS, error) { return nil, fault.New("channel_config", "RA-TLS: %s", why) }
	switch {
	case c == nil || c.Appraiser == nil:
		return bad("there is no appraiser")
	case role == ClientRole && c.Intended.AppID.IsZero():
		return bad("a client must say which app it means")
	case c.MaxAge > MaxCertificateAge || c.MaxAge < 0 && c.MaxAge != AnyAge:
		return bad("the greatest age of a certificate is at most " + MaxCertificateAge.String() + ", or AnyAge")
	}
	out := *c
	if c.MaxAge == 0 {
		out.MaxAge = MaxCertificateAge
	}
	if c.Timeout <= 0 {
		out.Timeout = defaultTimeout
	}
	if c.Now == nil {
		out.Now = time.Now
	}
	return &out, nil
}

// DialRATLS makes one TLS 1.3 connection to a server whose certificate carries
// evidence, and returns it once the evidence is accepted.
//
// Codes: channel_config, channel_unreachable, channel_handshake, channel_broken;
// channel_certificate_time and channel_certificate_age; those of package ratls, of
// Dial for a peer that is not accepted, and of the appraiser.
func DialRATLS(ctx context.Context, network, addr string, c *RATLS) (*Conn, error) {
	c, err := c.ready(ClientRole)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	raw, host, err := dialRaw(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	var peer *Peer
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         host,
		NextProtos:         []string{"http/1.1"},
		InsecureSkipVerify: true, // evidence takes the place of an authority
		VerifyConnection: func(cs tls.ConnectionState) (err error) {
			peer, err = c.judge(ctx, cs, ServerRole)
			return err
		},
	}
	if c.Certifier != nil {
		cfg.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return c.Certifier.Certificate(r.Context())
		}
	}
	conn := tls.Client(raw, cfg)
	if err := finish(ctx, conn, ServerRole); err != nil {
		return nil, err
	}
	return &Conn{Conn: conn, tls: conn, peer: peer}, nil
}

// finish completes a TLS handshake, or closes the connection.
func finish(ctx context.Context, conn *tls.Conn, with Role) error {
	err := conn.HandshakeContext(ctx)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		err = fault.Wrap(ctx.Err(), "channel_broken", "RA-TLS handshake with the %s", with)
	case fault.Code(err) == "":
		err = fault.Wrap(err, "channel_handshake", "TLS 1.3 handshake with the %s", with)
	}
	conn.Close()
	return err
}

// Transport returns an HTTP/1.1 transport each of whose connections is dialled by
// DialRATLS, and that knows no proxy and no plain HTTP.
func (c *RATLS) Transport() *http.Transport {
	return transport(func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := DialRATLS(ctx, network, addr, c)
		if err != nil {
			return nil, err
		}
		return conn, nil
	})
}

// judge runs inside the TLS handshake: a connection that it refuses never exists.
func (c *RATLS) judge(ctx context.Context, cs tls.ConnectionState, role Role) (*Peer, error) {
	if cs.DidResume {
		return nil, fault.New("channel_handshake", "the session is resumed")
	}
	spki, err := leafSPKI(cs)
	if err != nil {
		return nil, err
	}
	leaf, now := cs.PeerCertificates[0], c.Now()
	switch age := now.Sub(leaf.NotBefore); {
	case now.Before(leaf.NotBefore) || now.After(leaf.NotAfter):
		return nil, fault.New("channel_certificate_time", "the certificate of the %s is valid from %s to %s, not now", role,
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
	case c.MaxAge != AnyAge && age > c.MaxAge:
		return nil, fault.New("channel_certificate_age", "the certificate of the %s began %s ago, more than %s: its evidence may be old", role, age.Round(time.Second), c.MaxAge).
			WithFix("have the peer renew its certificate, use an attested channel, or accept any age")
	}
	a, err := ratls.FromCertificate(leaf)
	if err != nil {
		return nil, err
	}
	return admit(ctx, c.Appraiser, Candidate{
		Container: a.Container, ReportData: a.ReportData, SPKI: spki, Role: role,
		Intended: c.Intended, Binding: BindingKey, At: now, Issued: leaf.NotBefore,
	}, c.CommittedKey)
}

// ListenRATLS serves TLS 1.3 on inner, which it owns from now on, with the
// certifier's certificate. Clients must present a certificate with evidence that
// clients accepts; with nil, any client may connect and has no Peer. refused may
// be nil; see Config.Refused.
func ListenRATLS(inner net.Listener, own *Certifier, clients *RATLS, refused func(net.Addr, error)) (*Listener, error) {
	timeout := defaultTimeout
	if clients != nil {
		ready, err := clients.ready(ServerRole)
		if err != nil {
			inner.Close()
			return nil, err
		}
		clients, timeout = ready, ready.Timeout
	}
	return newListener(inner, refused, func(ctx context.Context, raw net.Conn) (*Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		var peer *Peer
		cfg := &tls.Config{
			MinVersion:             tls.VersionTLS13,
			NextProtos:             []string{"http/1.1"},
			SessionTicketsDisabled: true,
			GetCertificate:         func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return own.Certificate(h.Context()) },
		}
		if clients != nil {
			cfg.ClientAuth = tls.RequireAnyClientCert
			cfg.VerifyConnection = func(cs tls.ConnectionState) (err error) {
				peer, err = clients.judge(ctx, cs, ClientRole)
				return err
			}
		}
		conn := tls.Server(raw, cfg)
		if err := finish(ctx, conn, ClientRole); err != nil {
			return nil, err
		}
		return &Conn{Conn: conn, tls: conn, peer: peer}, nil
	}), nil
}

// CertifierConfig says what RA-TLS certificates are made of.
type CertifierConfig struct {
	Attester Attester // required
	// Key is what every certificate certifies; nil makes a new key for each.
	Key *Key
	// Names are the DNS names and IP addresses of this end; at least one.
	Names []string
	// Life is how long a certificate is valid; zero means MaxCertificateAge, which is
	// also the most. At half of it a new one is made, with new evidence.
	Life time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// clockSkew is how far behind a peer's clock may be.
const clockSkew = 5 * time.Minute

// Certifier holds one end's RA-TLS certificate and keeps it young. It is safe for
// concurrent use.
type Certifier struct {
	cfg     CertifierConfig
	renew   sync.Mutex // held by whoever makes a certificate
	mu      sync.Mutex // guards current
	current *tls.Certificate
}

// NewCertifier makes the first certificate, so that a TEE that does not work shows
// at start. Codes: channel_config,
// channel_attest, ratls_too_large.
func NewCertifier(ctx context.Context, cfg CertifierConfig) (*Certifier, error) {
	switch {
	case cfg.Attester == nil:
		return nil, fault.New("channel_config", "RA-TLS certificates need an attester")
	case len(cfg.Names) == 0:
		return nil, fault.New("channel_config", "RA-TLS certificates need a name")
	case cfg.Life < 0 || cfg.Life > MaxCertificateAge:
		return nil, fault.New("channel_config", "a RA-TLS certificate lives at most %s", MaxCertificateAge)
	case cfg.Life == 0:
		cfg.Life = MaxCertificateAge
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Certifier{cfg: cfg}
	_, err := c.make(ctx)
	return c, err
}

// Certificate returns the certificate of now. Past half of its life, one caller
// waits for a new one while others get the old; when that fails the old one
// serves until it ends.
func (c *Certifier) Certificate(ctx context.Context) (*tls.Certificate, error) {
	cert, now := c.latest(), c.cfg.Now()
	valid := !now.After(cert.Leaf.NotAfter)
	if now.Before(cert.Leaf.NotAfter.Add(-c.cfg.Life / 2)) {
		return cert, nil
	}
	if !c.renew.TryLock() {
		if valid {
			return cert, nil
		}
		c.renew.Lock()
	}
	defer c.renew.Unlock()
	if latest := c.latest(); latest != cert { // made while this caller waited
		return latest, nil
	}
	made, err := c.make(ctx)
	if err != nil && valid {
		return cert, nil
	}
	return made, err
}

func (c *Certifier) latest() *tls.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current
}

// make does not end with the handshake that asked for it: others wait for the
// result.
func (c *Certifier) make(ctx context.Context) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), defaultTimeout)
	defer cancel()
	key := c.cfg.Key
	if key == nil {
		var err error
		if key, err = NewKey(); err != nil {
			return nil, err
		}
	}
	container, err := c.cfg.Attester.Attest(ctx, ratls.ReportData(key.SPKI()))
	if err != nil {
		return nil, fault.Wrap(err, "channel_attest", "make evidence for the RA-TLS certificate")
	}
	extensions, err := ratls.Extensions(ratls.Issued{}, container)
	if err != nil {
		return nil, err
	}
	serial := make([]byte, 19) // positive in DER, whatever its first bit
	rand.Read(serial)
	now := c.cfg.Now()
	template := &x509.Certificate{
		SerialNumber:    new(big.Int).SetBytes(serial),
		Subject:         pkix.Name{CommonName: c.cfg.Names[0]},
		NotBefore:       now.Add(-clockSkew),
		NotAfter:        now.Add(c.cfg.Life),
		KeyUsage:        x509.KeyUsageDigitalSignature,
		ExtKeyUsage:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		ExtraExtensions: extensions,
	}
	for _, name := range c.cfg.Names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.signer().Public(), key.signer())
	if err != nil {
		return nil, fault.Wrap(err, "channel_config", "make a RA-TLS certificate")
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(err, "channel_config", "make a RA-TLS certificate")
	}
	cert := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key.signer(), Leaf: leaf}
	c.mu.Lock()
	c.current = cert
	c.mu.Unlock()
	return cert, nil
}

// FetchCertificate returns the certificate that a TLS 1.3 server at host:port
// presents, DER, and the DER SubjectPublicKeyInfo of its key, of which the
// connection proved possession. Nothing of it is judged, and the connection is
// gone: it serves to look at an instance (`dstack verify host:port`), never to
// dial it again and trust the answer. To talk to it, use DialRATLS.
//
// Codes: channel_unreachable, channel_handshake, channel_broken.
func FetchCertificate(ctx context.Context, addr string) (certDER, spki []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, host, err := dialRaw(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, err
	}
	conn := tls.Client(raw, &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         host,
		InsecureSkipVerify: true, // nothing is sent, and the caller judges what it presented
		VerifyConnection: func(cs tls.ConnectionState) (err error) {
			if spki, err = leafSPKI(cs); err == nil {
				certDER, spki = bytes.Clone(cs.PeerCertificates[0].Raw), bytes.Clone(spki)
			}
			return err
		},
	})
	if err := finish(ctx, conn, ServerRole); err != nil {
		return nil, nil, err
	}
	conn.Close()
	return certDER, spki, nil
}
