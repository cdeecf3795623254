// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/beevik/ntp"
	"github.com/beevik/nts"
)

const (
	// keyExchangeBytes is what a server may send in its key exchange, TLS included.
	keyExchangeBytes = 128 << 10
	// ntpEra is how often the seconds of NTP start again: 2036, 2172, …
	ntpEra = 1 << 32 * time.Second
)

// Server is an NTS server.
type Server struct {
	Host  string         // name:port of its key exchange
	Roots *x509.CertPool // who may certify it
}

// NTS returns the source that asks a server by NTS, timed by the system's monotonic
// clock.
func NTS(server Server, sys System) Source { return &source{server, sys} }

type source struct {
	server Server
	sys    System
}

func (s *source) Name() string { return s.server.Host }

// Query makes a key exchange and asks once. Each time with new keys and cookies: a
// query every quarter of an hour need not be spared, and nothing is kept between.
func (s *source) Query(ctx context.Context, notBefore time.Time) (Sample, error) {
	at := s.sys.Real()
	if at.Before(notBefore) {
		at = notBefore
	}
	sample, err := s.ask(ctx, at, notBefore)
	var bad *tls.CertificateVerificationError
	if !errors.As(err, &bad) {
		return sample, err
	}
	at, ok := s.whenValid(bad.UnverifiedCertificates, notBefore)
	if !ok {
		return Sample{}, err
	}
	return s.ask(ctx, at, notBefore)
}

// ask connects with certificates checked as of the given time.
func (s *source) ask(ctx context.Context, at, notBefore time.Time) (Sample, error) {
	name, _, err := net.SplitHostPort(s.server.Host)
	if err != nil {
		return Sample{}, err
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(attemptLimit)
	}
	var chain []*x509.Certificate
	session, err := nts.NewSessionWithOptions(s.server.Host, &nts.SessionOptions{
		TLSConfig: &tls.Config{
			RootCAs: s.server.Roots, ServerName: name, MinVersion: tls.VersionTLS13,
			Time: func() time.Time { return at },
		},
		Dialer: func(network, addr string, cfg *tls.Config) (*tls.Conn, error) {
			raw, err := dial(ctx, network, addr, deadline)
			if err != nil {
				return nil, err
			}
			conn := tls.Client(&limitedConn{raw, keyExchangeBytes}, cfg)
			if err := conn.HandshakeContext(ctx); err != nil {
				raw.Close()
				return nil, err
			}
			chain = conn.ConnectionState().PeerCertificates
			return conn, nil
		},
	})
	if err != nil {
		return Sample{}, err
	}
	var conn *guardConn
	r, err := session.QueryWithOptions(&ntp.QueryOptions{
		Timeout: time.Until(deadline),
		Dialer: func(_, addr string) (net.Conn, error) {
			raw, err := dial(ctx, "udp", addr, deadline)
			if err != nil {
				return nil, err
			}
			conn = &guardConn{Conn: raw, now: s.sys.Monotonic}
			return conn, nil
		},
	})
	if err != nil {
		return Sample{}, fmt.Errorf("ask %s: %w", session.Address(), err)
	}
	if err := r.Validate(); err != nil {
		return Sample{}, err
	}
	// The server sent its answer between the two readings. The library's own offset and
	// round trip go by the real-time clock, which is the host's.
	half := (conn.received - conn.sent) / 2
	return Sample{
		Origin:  inEra(r.Time, notBefore).Add(half - conn.received),
		Error:   half + r.RootDelay/2 + r.RootDispersion,
		ValidAt: func(t time.Time) error { return s.verify(chain, t) },
	}, nil
}

// inEra chooses among the times that an NTP timestamp can mean the one next to a time
// that is known to be near in the scale of eras.
func inEra(t, near time.Time) time.Time {
	for near.Sub(t) > ntpEra/2 {
		t = t.Add(ntpEra)
	}
	return t
}

// verify checks a chain as crypto/tls does, at a given time.
func (s *source) verify(chain []*x509.Certificate, at time.Time) error {
	name, _, err := net.SplitHostPort(s.server.Host)
	if err != nil {
		return err
	}
	opts := x509.VerifyOptions{DNSName: name, Roots: s.server.Roots, Intermediates: x509.NewCertPool(), CurrentTime: at}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err = chain[0].Verify(opts)
	return err
}

// whenValid returns the earliest moment, not before a given one, at which the chain
// holds. A chain begins to hold when the last of its certificates becomes valid.
func (s *source) whenValid(chain []*x509.Certificate, notBefore time.Time) (time.Time, bool) {
	moments := []time.Time{notBefore}
	for _, c := range chain {
		if c.NotBefore.After(notBefore) {
			moments = append(moments, c.NotBefore)
		}
	}
	slices.SortFunc(moments, time.Time.Compare)
	for _, t := range moments {
		if len(chain) > 0 && s.verify(chain, t) == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

// dial opens a connection that ends with the context.
func dial(ctx context.Context, network, addr string, deadline time.Time) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(deadline); err != nil {
		conn.Close()
		return nil, err
	}
	return &boundConn{conn, context.AfterFunc(ctx, func() { conn.Close() })}, nil
}

type boundConn struct {
	net.Conn
	stop func() bool
}

func (c *boundConn) Close() error {
	c.stop()
	return c.Conn.Close()
}

// limitedConn refuses to read more than so much: the library takes records until one
// says that it is the last.
type limitedConn struct {
	net.Conn
	left int
}

func (c *limitedConn) Read(b []byte) (int, error) {
	if c.left <= 0 {
		return 0, fmt.Errorf("the server sent more than %d bytes", keyExchangeBytes)
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

// guardConn times the question and the answer, and lets only a datagram through that
// the library is bound to authenticate. Others are dropped: anybody can send them.
type guardConn struct {
	net.Conn
	now            func() time.Duration
	question       []byte
	sent, received time.Duration
}

func (c *guardConn) Write(b []byte) (int, error) {
	c.question = slices.Clone(b)
	c.sent = c.now()
	return c.Conn.Write(b)
}

func (c *guardConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil {
			return 0, err
		}
		c.received = c.now()
		if checkReply(c.question, b[:n]) == nil {
			return n, nil
		}
	}
}
