// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/dstack-go/dstack/gateway/hello"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

// tlsConfig is for TLS that ends here. Key exchange is left to crypto/tls, which puts
// X25519MLKEM768 first.
func (e *Edge) tlsConfig(alpn ...string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: alpn, GetCertificate: e.show}
}

// show chooses the certificate, and remembers its key for whoever asks what it is of.
func (e *Edge) show(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, err := e.cfg.GetCertificate(h)
	if r, ok := h.Conn.(*replay); ok && err == nil && cert != nil && e.evidence != nil {
		leaf := cert.Leaf
		if leaf == nil && len(cert.Certificate) > 0 {
			if leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
				return nil, err
			}
		}
		if leaf != nil {
			r.shown = leaf.RawSubjectPublicKeyInfo
		}
	}
	return cert, err
}

// ticketKeys takes the cluster's keys, so that a session of one gateway resumes at another.
func (e *Edge) ticketKeys() {
	if e.cfg.TicketKeys == nil {
		return
	}
	if keys := e.cfg.TicketKeys(); len(keys) > 0 {
		e.plain.SetSessionTicketKeys(keys)
		e.h2.SetSessionTicketKeys(keys)
	}
}

// acmeChallenge reports whether a hello is a certificate authority's (RFC 8737 §3).
func acmeChallenge(h hello.Hello) bool { return len(h.ALPN) == 1 && h.ALPN[0] == "acme-tls/1" }

// terminate shakes hands. Codes edge_no_certificate, edge_tls; of the latter crypto/tls has
// told the client.
func (e *Edge) terminate(o *opening, mode hostname.Mode) (*tls.Conn, error) {
	config := e.plain
	if mode == hostname.TerminateH2 {
		config = e.h2
	}
	return e.handshake(o, config)
}

func (e *Edge) handshake(o *opening, config *tls.Config) (*tls.Conn, error) {
	if e.cfg.GetCertificate == nil {
		return nil, fault.New("edge_no_certificate", "the gateway has no certificates")
	}
	// The session may keep what lies behind the hello, so the buffer is its own from here.
	o.buf = nil
	under := &replay{Conn: o.conn, first: o.raw}
	if tcp, ok := o.conn.(*net.TCPConn); ok {
		under.src, _ = newSocket(tcp)
	}
	conn := tls.Server(under, config)
	ctx, cancel := context.WithTimeout(e.ctx, e.adjusted().Timeouts.Handshake)
	defer cancel()
	begun := time.Now()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, &toldError{fault.Wrap(err, "edge_tls", "the TLS handshake for %s", o.hello.ServerName)}
	}
	e.stats.handshake.observe(time.Since(begun))
	return conn, nil
}

// replay is a connection whose first bytes have been read already.
type replay struct {
	net.Conn
	first []byte
	src   *socket // nil where the connection is no TCP socket
	shown []byte  // SPKI of the certificate that the session was shown
	// poll makes Read return errEmpty where it would wait.
	poll bool
}

func (r *replay) Read(b []byte) (int, error) {
	if len(r.first) > 0 {
		n := copy(b, r.first)
		if r.first = r.first[n:]; len(r.first) == 0 {
			r.first = nil
		}
		return n, nil
	}
	if r.poll {
		return r.src.tryRead(b)
	}
	return r.Conn.Read(b)
}

// emptyError says that nothing has come yet. crypto/tls takes a temporary error for one
// that leaves the session whole.
type emptyError struct{}

func (emptyError) Error() string   { return "nothing to read yet" }
func (emptyError) Timeout() bool   { return true }
func (emptyError) Temporary() bool { return true }

// answerACME serves a TLS-ALPN-01 challenge, which is the handshake alone.
func (e *Edge) answerACME(o *opening) error {
	conn, err := e.handshake(o, e.acme)
	if err != nil {
		return err
	}
	conn.SetDeadline(time.Now().Add(lingerTime))
	conn.Close()
	return nil
}

// answerPages serves the gateway's own pages, and returns when the client has left.
func (e *Edge) answerPages(o *opening, mode hostname.Mode) error {
	if e.cfg.Pages == nil {
		return fault.New("edge_no_pages", "the gateway has no pages")
	}
	conn, err := e.terminate(o, mode)
	if err != nil {
		return err
	}
	e.settled(o)
	e.pages.answer(conn)
	return nil
}

// pages is an HTTP server on connections that it is handed.
type pages struct {
	server http.Server
	queue  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPages(h http.Handler) *pages {
	// TLS ended before, and its ALPN said which it is.
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return &pages{
		server: http.Server{Handler: h, Protocols: &protocols, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10},
		queue:  make(chan net.Conn), closed: make(chan struct{}),
	}
}

func (p *pages) serve() { p.server.Serve(p) }

// answer hands a connection over and returns when it is closed.
func (p *pages) answer(conn net.Conn) {
	c := &watched{Conn: conn, closed: make(chan struct{})}
	select {
	case p.queue <- c:
		<-c.closed
	case <-p.closed:
		conn.Close()
	}
}

// drain lets requests finish: clients are told that a connection ends, by Connection: close
// or GOAWAY.
func (p *pages) drain(ctx context.Context) { p.server.Shutdown(ctx) }
func (p *pages) close()                    { p.server.Close() }

// Accept, Close and Addr make it the server's listener.
func (p *pages) Accept() (net.Conn, error) {
	select {
	case c := <-p.queue:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pages) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pages) Addr() net.Addr { return &net.TCPAddr{} }

type watched struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (w *watched) Close() error {
	err := w.Conn.Close()
	w.once.Do(func() { close(w.closed) })
	return err
}
