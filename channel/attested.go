// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// ALPN is the protocol token of an attested channel, with its version. Both ends
// offer nothing else and refuse a session without it, but for a server that serves
// other protocols beside (Config.Other).
const ALPN = "dstack-attest/1"

const (
	defaultTimeout = 60 * time.Second
	// helloTimeout is how long a peer may take for what costs it nothing. What
	// costs it a quote has the whole handshake's time.
	helloTimeout  = 10 * time.Second
	refuseTimeout = time.Second
	maxChain      = 8       // certificates that a peer presents
	maxSPKI       = 4 << 10 // bytes
)

// Config says how one end of attested channels behaves. It must not be changed
// once in use; the zero value can neither dial nor listen.
type Config struct {
	// Appraiser judges peers. A client must have one.
	Appraiser Appraiser

	// AnyClient lets a server do without an Appraiser: clients then give no evidence
	// and their connections have no Peer. Exactly one of the two must be set.
	AnyClient bool

	// Intended is whom this end means. A client must name an app; a server that
	// names none takes any client that its Appraiser admits.
	Intended Intended

	// Attester makes this end's evidence. A server must have one; a client needs one
	// only for servers that ask for its evidence.
	Attester Attester

	// AppEvidence accepts evidence that the app of a guest made: its peer then is the
	// app, on its own word, and not the guest's system. It is for peers that are apps,
	// such as a KMS, whose workload the Appraiser knows. Without it only the key counts
	// to which the guest's init committed, or evidence from before any app ran.
	AppEvidence bool

	// Other, when set at a server, serves clients that do not offer [ALPN]: their
	// connections have no Peer, whatever they show. Its NextProtos must not hold ALPN.
	Other *tls.Config

	// Key is the channel key of this end, in a guest the one that init committed to.
	// Nil makes an ephemeral one for each client connection and each listener.
	Key *Key

	// Self, when set, is who this end is: a peer that means another gets no evidence.
	Self *Identity

	// Timeout bounds a handshake with all its evidence; zero means 60 seconds.
	Timeout time.Duration

	// Refused, when set, is told of each connection that a Listener turned away, from
	// several goroutines.
	Refused func(remote net.Addr, err error)

	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// ready returns a checked copy with every default filled in.
func (c *Config) ready(role Role) (*Config, error) {
	bad := func(why string) (*Config, error) {
		return nil, fault.New("channel_config", "attested channel: %s", why)
	}
	if c == nil {
		return bad("there is no configuration")
	}
	out := *c
	switch {
	case role == ClientRole && c.Appraiser == nil:
		return bad("a client must judge its server and has no appraiser")
	case role == ClientRole && c.AnyClient:
		return bad("AnyClient is for servers")
	case role == ClientRole && c.Intended.AppID.IsZero():
		return bad("a client must say which app it means")
	case role == ServerRole && c.Attester == nil:
		return bad("a server must give evidence and has no attester")
	case c.Other != nil && (role == ClientRole || slices.Contains(c.Other.NextProtos, ALPN)):
		return bad("other protocols are a server's, and none of them is " + ALPN)
	case role == ServerRole && (c.Appraiser == nil) != c.AnyClient:
		return bad("a server must either judge its clients by an appraiser or admit any client")
	}
	if _, err := c.Intended.encode(); err != nil {
		return nil, err
	}
	if c.Key == nil && c.Attester != nil {
		key, err := NewKey()
		if err != nil {
			return nil, err
		}
		out.Key = key
	}
	if c.Timeout <= 0 {
		out.Timeout = defaultTimeout
	}
	if c.Now == nil {
		out.Now = time.Now
	}
	return &out, nil
}

// Conn is a connection whose ends accepted each other before the first byte. It
// is the only thing that carries a [Peer]: there is no way to verify now and talk
// over another connection later (threats.md C03).
type Conn struct {
	net.Conn // the TLS session
	tls      *tls.Conn
	peer     *Peer
}

// Peer returns who is at the other end; nil only at a server that admits clients
// without evidence, or serves other protocols beside.
func (c *Conn) Peer() *Peer { return c.peer }

// ConnectionState describes the TLS session. It establishes nothing about the peer
// but that it has the keys of the certificates that it presented.
func (c *Conn) ConnectionState() tls.ConnectionState { return c.tls.ConnectionState() }

// CloseWrite ends this end's half of the session.
func (c *Conn) CloseWrite() error { return c.tls.CloseWrite() }

// Dial makes one connection and returns it once both ends have accepted each
// other. It never dials again by itself.
//
// Codes: channel_config, channel_unreachable, channel_handshake, channel_alpn,
// channel_exporter, channel_broken (also a timeout), channel_protocol,
// channel_frame_too_large, channel_refused (by the peer), channel_attest,
// channel_no_attester, channel_not_intended; for a peer that is not accepted
// channel_appraisal, channel_report_data, channel_wrong_app,
// channel_wrong_instance, channel_wrong_workload, channel_key_uncommitted,
// channel_key_mismatch and those of the appraiser.
func Dial(ctx context.Context, network, addr string, c *Config) (*Conn, error) {
	ready, err := c.ready(ClientRole)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, ready.Timeout)
	defer cancel()
	raw, host, err := dialRaw(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return ready.handshake(ctx, raw, ClientRole, host)
}

// Client makes raw an attested channel as Dial does; it closes raw on an error.
func Client(ctx context.Context, raw net.Conn, c *Config) (*Conn, error) {
	return start(ctx, raw, c, ClientRole)
}

// Server is the other end of Client and Dial.
func Server(ctx context.Context, raw net.Conn, c *Config) (*Conn, error) {
	return start(ctx, raw, c, ServerRole)
}

func start(ctx context.Context, raw net.Conn, c *Config, role Role) (*Conn, error) {
	ready, err := c.ready(role)
	if err != nil {
		raw.Close()
		return nil, err
	}
	return ready.handshake(ctx, raw, role, "")
}

// Transport returns an HTTP/1.1 transport each of whose connections is dialled by
// Dial, and that knows no proxy and no plain HTTP. Whatever host a URL or a
// redirect names, what answers there must be the intended peer.
func (c *Config) Transport() *http.Transport {
	return transport(func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := Dial(ctx, network, addr, c)
		if err != nil {
			return nil, err // not a typed nil
		}
		return conn, nil
	})
}

func transport(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Transport {
	return &http.Transport{
		DialTLSContext: dial,
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			return nil, fault.New("channel_plain_http", "plain HTTP to %s would reach a peer that nobody verified", addr).
				WithFix("use an https URL")
		},
		IdleConnTimeout:       time.Minute,
		ResponseHeaderTimeout: 2 * time.Minute,
	}
}

// session is a handshake under way.
type session struct {
	cfg  *Config
	role Role // of this end
	raw  net.Conn
	conn *tls.Conn

	own, peer    []byte // DER SPKI of the leaves; nil where an end presented none
	mine, theirs hello
	exported     []byte
	other        bool // the client did not offer ALPN, and that is served
}

// handshake takes over raw: TLS 1.3, then, inside it and strictly in turns:
//
//	client: hello
//	server: hello, evidence
//	client: [evidence,] accept
//	server: accept
//
// A server gives evidence to strangers; a client only to a server that it has
// accepted.
func (c *Config) handshake(ctx context.Context, raw net.Conn, role Role, host string) (_ *Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	defer func() {
		if err != nil {
			raw.Close()
		}
	}()
	stop := endOn(ctx, raw)
	defer stop()

	s := &session{cfg: c, role: role, raw: raw}
	if s.conn, err = s.secure(ctx, raw, host); err != nil {
		return nil, err
	}
	var peer *Peer
	if !s.other {
		peer, err = s.attest(ctx)
	}
	if err != nil {
		if ctx.Err() != nil && fault.Code(err) == "channel_broken" {
			err = fault.Wrap(ctx.Err(), "channel_broken", "attested handshake with the %s", role.other())
		}
		s.refuse(err)
		return nil, err
	}
	if !stop() {
		return nil, fault.Wrap(ctx.Err(), "channel_broken", "attested handshake with the %s", role.other())
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return nil, fault.Wrap(err, "channel_broken", "attested handshake with the %s", role.other())
	}
	return &Conn{Conn: s.conn, tls: s.conn, peer: peer}, nil
}

// endOn ends all I/O on conn when ctx ends. Until a handshake is over, deadlines
// only ever come nearer, so that no other one undoes this.
func endOn(ctx context.Context, conn net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
}

// secure does the TLS handshake.
func (s *session) secure(ctx context.Context, raw net.Conn, host string) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	var conn *tls.Conn
	if s.role == ClientRole {
		conn = tls.Client(raw, s.clientTLS(host))
	} else {
		conn = tls.Server(raw, s.serverTLS())
	}
	err := conn.HandshakeContext(ctx)
	switch {
	case err == nil:
		return conn, nil
	case fault.Code(err) != "":
		return nil, err
	case strings.Contains(err.Error(), "application protocol"): // crypto/tls has no type for it
		return nil, fault.Wrap(err, "channel_alpn", "the %s does not speak %s", s.role.other(), ALPN)
	}
	return nil, fault.Wrap(err, "channel_handshake", "TLS 1.3 handshake with the %s", s.role.other())
}

// clientTLS judges no certificate: the evidence that follows over the session
// vouches for the key, of which TLS proves possession.
func (s *session) clientTLS(host string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ServerName:             host,
		NextProtos:             []string{ALPN},
		SessionTicketsDisabled: true,
		InsecureSkipVerify:     true,
		VerifyConnection:       s.check,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if s.cfg.Attester == nil {
				return nil, noAttester(ServerRole)
			}
			s.own = s.cfg.Key.SPKI()
			return &s.cfg.Key.cert, nil
		},
	}
}

func (s *session) serverTLS() *tls.Config {
	s.own = s.cfg.Key.SPKI()
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{s.cfg.Key.cert},
		NextProtos:             []string{ALPN},
		SessionTicketsDisabled: true,
		VerifyConnection:       s.check,
	}
	if s.cfg.Appraiser != nil {
		cfg.ClientAuth = tls.RequireAnyClientCert
	}
	if s.cfg.Other != nil {
		cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			if slices.Contains(h.SupportedProtos, ALPN) {
				return nil, nil
			}
			s.other = true
			return s.cfg.Other, nil
		}
	}
	return cfg
}

func noAttester(who Role) error {
	return fault.New("channel_no_attester", "the %s asks for evidence of this end, which can make none", who).
		WithFix("run this end in a TEE, or ask a server that admits any client")
}

// check runs inside the TLS handshake, on both ends.
func (s *session) check(cs tls.ConnectionState) (err error) {
	switch {
	case cs.Version != tls.VersionTLS13 || cs.DidResume:
		return fault.New("channel_handshake", "the session is resumed, or not of TLS 1.3")
	case cs.NegotiatedProtocol != ALPN:
		return fault.New("channel_alpn", "the %s does not speak %s: it agreed on protocol %q", s.role.other(), ALPN, cs.NegotiatedProtocol)
	}
	if s.role == ClientRole || s.cfg.Appraiser != nil {
		s.peer, err = leafSPKI(cs)
	}
	return err
}

// leafSPKI returns the public key of the peer's certificate.
func leafSPKI(cs tls.ConnectionState) ([]byte, error) {
	if n := len(cs.PeerCertificates); n == 0 || n > maxChain {
		return nil, fault.New("channel_handshake", "the peer presented %d certificates, want 1 to %d", n, maxChain)
	}
	spki := cs.PeerCertificates[0].RawSubjectPublicKeyInfo
	if len(spki) > maxSPKI {
		return nil, fault.New("channel_handshake", "the peer's public key has %d bytes, more than %d", len(spki), maxSPKI)
	}
	if _, err := x509.ParsePKIXPublicKey(spki); err != nil {
		return nil, fault.Wrap(err, "channel_handshake", "the peer's public key")
	}
	return spki, nil
}

// attest is the handshake inside the session.
func (s *session) attest(ctx context.Context) (*Peer, error) {
	if err := s.greet(ctx); err != nil {
		return nil, err
	}
	if s.role == ClientRole {
		return s.attestClient(ctx)
	}
	return s.attestServer(ctx)
}

func (s *session) attestClient(ctx context.Context) (*Peer, error) {
	container, err := readFrame(s.conn, frameEvidence)
	if err != nil {
		return nil, err
	}
	peer, err := s.judge(ctx, container)
	if err != nil {
		return nil, err
	}
	if s.theirs.demand {
		if err := s.send(ctx); err != nil {
			return nil, err
		}
	}
	if err := writeFrame(s.conn, frameAccept, nil); err != nil {
		return nil, err
	}
	_, err = readFrame(s.conn, frameAccept)
	return peer, err
}

func (s *session) attestServer(ctx context.Context) (peer *Peer, err error) {
	if err := s.send(ctx); err != nil {
		return nil, err
	}
	var container []byte
	if s.mine.demand {
		if container, err = readFrame(s.conn, frameEvidence); err != nil {
			return nil, err
		}
	}
	// All that the client sends is read before it is judged: closing a connection
	// with unread bytes resets it, and the reason would be lost on the way.
	if _, err := readFrame(s.conn, frameAccept); err != nil {
		return nil, err
	}
	if s.mine.demand {
		if peer, err = s.judge(ctx, container); err != nil {
			return nil, err
		}
	}
	return peer, writeFrame(s.conn, frameAccept, nil)
}

// greet exchanges hellos and derives the session's secret from both nonces.
func (s *session) greet(ctx context.Context) (err error) {
	rand.Read(s.mine.nonce[:])
	if s.mine.demand = s.cfg.Appraiser != nil; s.mine.demand {
		if s.mine.intended, err = s.cfg.Intended.encode(); err != nil {
			return err
		}
	}
	if s.role == ClientRole {
		if err := writeFrame(s.conn, frameHello, s.mine.encode()); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	stop := endOn(ctx, s.raw)
	payload, err := readFrame(s.conn, frameHello)
	if !stop() {
		return fault.Wrap(ctx.Err(), "channel_broken", "hello of the %s", s.role.other())
	}
	if err != nil {
		return err
	}
	if s.theirs, err = decodeHello(payload); err != nil {
		return err
	}
	if s.role == ServerRole {
		if !s.theirs.demand {
			return fault.New("channel_protocol", "the client does not ask for the server's evidence")
		}
		if err := writeFrame(s.conn, frameHello, s.mine.encode()); err != nil {
			return err
		}
	}
	cs := s.conn.ConnectionState()
	client, server := &s.mine.nonce, &s.theirs.nonce
	if s.role == ServerRole {
		client, server = server, client
	}
	s.exported, err = export(&cs, client[:], server[:])
	return err
}

// send makes this end's evidence for the peer.
func (s *session) send(ctx context.Context) error {
	switch {
	case s.cfg.Attester == nil:
		return noAttester(s.role.other())
	case s.own == nil:
		return fault.New("channel_protocol", "the %s asks for evidence of a key that it did not ask for", s.role.other())
	}
	if s.cfg.Self != nil {
		intended, err := decodeIntended(s.theirs.intended)
		if err == nil {
			err = intended.Check(*s.cfg.Self)
		}
		if err != nil {
			return fault.Wrap(err, "channel_not_intended", "the %s means another than this end", s.role.other())
		}
	}
	container, err := s.cfg.Attester.Attest(ctx, commitment{
		role: s.role, exported: s.exported, own: s.own, peer: s.peer,
		nonce: s.theirs.nonce[:], intended: s.theirs.intended,
	}.reportData())
	if err != nil {
		return fault.Wrap(err, "channel_attest", "make evidence for the %s", s.role.other())
	}
	if len(container) > MaxEvidence {
		return fault.New("channel_attest", "the evidence of this end has %d bytes, more than %d", len(container), MaxEvidence)
	}
	return writeFrame(s.conn, frameEvidence, container)
}

// judge appraises the peer's evidence.
func (s *session) judge(ctx context.Context, container []byte) (*Peer, error) {
	return admit(ctx, s.cfg.Appraiser, Candidate{
		Container: container,
		ReportData: commitment{
			role: s.role.other(), exported: s.exported, own: s.peer, peer: s.own,
			nonce: s.mine.nonce[:], intended: s.mine.intended,
		}.reportData(),
		SPKI: s.peer, Role: s.role.other(), Intended: s.cfg.Intended,
		Binding: BindingSession, At: s.cfg.Now(),
	}, !s.cfg.AppEvidence)
}

// refuse tells the peer the code of err, and no more, unless the peer was the one
// to refuse or is gone.
func (s *session) refuse(err error) {
	code := fault.Code(err)
	if code == "channel_refused" || code == "channel_broken" || len(code) > maxCode {
		return
	}
	s.conn.SetDeadline(time.Now().Add(refuseTimeout))
	if writeFrame(s.conn, frameRefuse, []byte(code)) == nil {
		s.conn.Close() // a close_notify after the frame
	}
}

// dialRaw makes the TCP connection and returns it with the name for SNI.
func dialRaw(ctx context.Context, network, addr string) (net.Conn, string, error) {
	host := ""
	if strings.HasPrefix(network, "tcp") {
		h, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, "", fault.Wrap(err, "channel_unreachable", "address %q", addr).WithFix("give host:port")
		}
		host, addr = h, net.JoinHostPort(loopback(h), port)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, "", fault.Wrap(err, "channel_unreachable", "connect to %s", addr)
	}
	return raw, host, nil
}
