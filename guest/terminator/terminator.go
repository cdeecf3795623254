// SPDX-License-Identifier: Apache-2.0

// Package terminator ends TLS in the guest for ports of the app whose policy says so: a
// gateway passes a client's bytes on unread, behind a PROXY header, and the key of the
// certificate is the one that the guest's init committed to before any app ran. Whoever
// compares that key with evidence knows that nobody was in between (threats.md C05).
//
// Attacker-controlled: every byte. It is reached through the tunnel alone, which the
// firewall sees to.
package terminator

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	lib "github.com/pires/go-proxyproto"

	"github.com/dstack-go/dstack/internal/fault"
)

// Times of a connection.
const (
	handshake = 10 * time.Second
	connect   = 5 * time.Second
	idle      = 10 * time.Minute
	silence   = time.Second
)

// evidencePath is frozen: verifiers know it (design.md §4).
const evidencePath = "/.well-known/dstack/attest"

// Terminator ends TLS.
type Terminator struct {
	// Certificate has the certificate of a host that a gateway, by its address in the
	// tunnel, leads here, and the port that it leads to.
	Certificate func(host string, gateway netip.Addr) (*tls.Certificate, uint16, error)
	// PROXY says which ports get the client's PROXY header.
	PROXY map[uint16]bool
	// Evidence answers the evidence path.
	Evidence http.Handler
	// Dial reaches the app; nil uses the guest's network.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	Log  *slog.Logger
}

// Serve takes connections from l until ctx ends.
func (t *Terminator) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var work sync.WaitGroup
	defer work.Wait()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			select { // out of descriptors, or a connection that was reset: go on
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		work.Go(func() {
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			if err := t.handle(ctx, c); err != nil && t.Log != nil {
				t.Log.Debug("terminator", "code", fault.Code(err), "error", err)
			}
		})
	}
}

// handle is one connection. Codes proxy_malformed, terminator_handshake, terminator_dial,
// those of Certificate.
func (t *Terminator) handle(ctx context.Context, c net.Conn) error {
	c.SetDeadline(time.Now().Add(handshake))
	in := bufio.NewReaderSize(c, 4<<10)
	head, err := lib.Read(in)
	if err != nil || head.Version != 2 {
		return fault.New("proxy_malformed", "the gateway's PROXY header is missing or of another version (%v)", err)
	}
	var from netip.Addr
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		from = a.AddrPort().Addr().Unmap()
	}
	var port uint16
	session := tls.Server(&peeked{Conn: c, in: in}, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(h *tls.ClientHelloInfo) (cert *tls.Certificate, err error) {
			cert, port, err = t.Certificate(h.ServerName, from)
			return cert, err
		},
		// Every handshake shows the certificate that evidence names.
		SessionTicketsDisabled: true,
	})
	if err := session.HandshakeContext(ctx); err != nil {
		if code := fault.Code(err); code != "" {
			return err
		}
		return fault.Wrap(err, "terminator_handshake", "end TLS")
	}
	// Whoever wants evidence says so at once. A client that waits for the app to speak
	// first, or sends nothing at all, is the app's.
	session.SetDeadline(time.Now().Add(silence))
	text, err := begins(session, "POST "+evidencePath+" ")
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, io.EOF) {
		return nil
	}
	session.SetDeadline(time.Now().Add(idle))
	if string(text) == "POST "+evidencePath+" " && t.Evidence != nil {
		state := session.ConnectionState()
		return serveOne(ctx, &peeked{Conn: session, in: bufio.NewReader(io.MultiReader(strings.NewReader(string(text)), session))}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.TLS = &state
			w.Header().Set("Connection", "close")
			t.Evidence.ServeHTTP(w, r)
		}))
	}
	// The engine translates published ports at every address of the guest's but loopback.
	host, _, err := net.SplitHostPort(c.LocalAddr().String())
	if err != nil {
		return err
	}
	dial := t.Dial
	if dial == nil {
		dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{Timeout: connect}).DialContext(ctx, "tcp", addr)
		}
	}
	app, err := dial(ctx, net.JoinHostPort(host, strconv.Itoa(int(port))))
	if err != nil {
		return fault.Wrap(err, "terminator_dial", "reach port %d of the app", port)
	}
	defer app.Close()
	if t.PROXY[port] {
		if _, err := head.WriteTo(app); err != nil {
			return nil
		}
	}
	if _, err := app.Write(text); err != nil {
		return nil
	}
	relay(session, app)
	return nil
}

// begins reads as long as what comes is the beginning of want.
func begins(r io.Reader, want string) ([]byte, error) {
	buf := make([]byte, 0, len(want))
	for len(buf) < len(want) && strings.HasPrefix(want, string(buf)) {
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err != nil {
			return buf, err
		}
	}
	return buf, nil
}

// relay copies both ways, until both sides have ended theirs or nothing came for long.
func relay(client *tls.Conn, app net.Conn) {
	touch := func() {
		at := time.Now().Add(idle)
		client.SetDeadline(at)
		app.SetDeadline(at)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if pump(app, client, touch) != nil {
			client.Close()
			app.Close()
			return
		}
		if half, ok := app.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
	}()
	if pump(client, app, touch) != nil {
		client.Close()
		app.Close()
	} else {
		client.CloseWrite()
	}
	<-done
}

func pump(to io.Writer, from io.Reader, touch func()) error {
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			touch()
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF): // clients often leave without close_notify
			return nil
		case err != nil:
			return err
		}
	}
}

// peeked is a connection of which some was read already.
type peeked struct {
	net.Conn
	in *bufio.Reader
}

func (p *peeked) Read(b []byte) (int, error) { return p.in.Read(b) }

// serveOne serves HTTP/1.1 on one connection until it ends.
func serveOne(ctx context.Context, c net.Conn, h http.Handler) error {
	l := &single{conn: make(chan net.Conn, 1), done: make(chan struct{}), addr: c.LocalAddr()}
	l.conn <- &ending{c, l}
	srv := &http.Server{Handler: h, ReadTimeout: handshake, WriteTimeout: 90 * time.Second, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), BaseContext: func(net.Listener) context.Context { return ctx }}
	defer srv.Close()
	if err := srv.Serve(l); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// single is a listener of one connection, which ends with it.
type single struct {
	conn chan net.Conn
	done chan struct{}
	once sync.Once
	addr net.Addr
}

func (l *single) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *single) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *single) Addr() net.Addr { return l.addr }

type ending struct {
	net.Conn
	l *single
}

func (e *ending) Close() error { defer e.l.Close(); return e.Conn.Close() }
