// SPDX-License-Identifier: Apache-2.0

// Package edge is the gateway's public listener: it reads the name that a client wants,
// finds an instance that may have the connection, and carries bytes.
//
// A connection costs what it needs and no more: a bounded hello under a deadline, one
// route, one dial (the next candidate is tried beside a slow one, before the app has seen
// a byte), and then two copies, in which buffers are held while there is data and not
// while there is none.
//
// Guarantees: what passes through is never decrypted here; a port whose measured policy
// says that the app ends TLS is never ended here, whatever the name asks (threats.md K04,
// C05); a route that ends takes its connections with it (G05); connections, hellos under
// way, sources and lookups are bounded (K08).
//
// Attacker-controlled: every byte of clients and instances, names, and what DNS says.
// Trusted: the route table, and the configuration.
//
// Implements spec/gateway.md §2.
package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/hello"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/proxyproto"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// Config says what the edge serves. Zero durations and numbers stand for the defaults.
type Config struct {
	// Rules are the base domains. It is asked for each connection.
	Rules  func() hostname.Rules
	Routes *route.Table
	// Operator returns what the operator took away of an instance's ports; may be nil.
	Operator func(dstack.InstanceID) *portpolicy.Policy
	// Dial connects to an instance.
	Dial func(context.Context, netip.AddrPort) (net.Conn, error)
	// GetCertificate has the certificates of what ends here, and those of ALPN
	// acme-tls/1; nil: nothing ends here.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// Pages are the gateway's own; nil: there are none.
	Pages http.Handler
	// Evidence answers the evidence path on connections to an instance that end here, with
	// the key of the certificate that the client saw, DER; nil: the path is the app's.
	Evidence func(w http.ResponseWriter, r *http.Request, instance netip.Addr, spki []byte)
	// Lookup returns TXT records; nil: there are no custom domains.
	Lookup    func(context.Context, string) ([]string, error)
	TXTPrefix string // "" is upstream's
	TXTCompat bool   // the older prefix is asked, too

	Balancers proxyproto.Sources // whose PROXY header is believed

	Connections int // at a time; 50000
	PerSource   int // at a time, of one address (IPv6: /64); 4096
	Rate        int // new ones of one source per second, on average; 500
	Candidates  int // instances of an app that one connection tries; 3

	Handshake time.Duration // for a hello, and for TLS that ends here; 5 s
	Connect   time.Duration // for all candidates; 5 s
	Resolve   time.Duration // 5 s
	Idle      time.Duration // without a byte in either direction; 10 min
	Total     time.Duration // 5 h

	Log *slog.Logger
}

// alpnChallenge is what a CA offers that asks by TLS-ALPN-01 (RFC 8737 §6.2).
const alpnChallenge = "acme-tls/1"

// stagger is after how long the next candidate is dialled beside one that is silent.
const stagger = 100 * time.Millisecond

// Edge serves connections. Make it with New.
type Edge struct {
	cfg     Config
	sources *sources
	names   *names
	plain   *tls.Config // no ALPN: HTTP/1.1
	h2      *tls.Config // ALPN h2 alone
	stats   stats

	mu       sync.Mutex
	open     map[net.Conn]struct{}
	draining atomic.Bool
	work     sync.WaitGroup
}

// New returns an edge. Code edge_config.
func New(cfg Config) (*Edge, error) {
	if cfg.Rules == nil || cfg.Routes == nil || cfg.Dial == nil {
		return nil, fault.New("edge_config", "an edge needs rules, routes and a way to dial")
	}
	for _, d := range []struct {
		v  *time.Duration
		is time.Duration
	}{{&cfg.Handshake, 5 * time.Second}, {&cfg.Connect, 5 * time.Second}, {&cfg.Resolve, 5 * time.Second}, {&cfg.Idle, 10 * time.Minute}, {&cfg.Total, 5 * time.Hour}} {
		if *d.v == 0 {
			*d.v = d.is
		}
	}
	for _, n := range []struct {
		v  *int
		is int
	}{{&cfg.Connections, 50000}, {&cfg.PerSource, 4096}, {&cfg.Rate, 500}, {&cfg.Candidates, 3}} {
		if *n.v == 0 {
			*n.v = n.is
		}
	}
	if cfg.Operator == nil {
		cfg.Operator = func(dstack.InstanceID) *portpolicy.Policy { return nil }
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	e := &Edge{cfg: cfg, sources: newSources(cfg.PerSource, cfg.Rate), names: newNames(cfg), open: map[net.Conn]struct{}{}}
	if cfg.GetCertificate != nil {
		e.plain = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: cfg.GetCertificate}
		e.h2 = e.plain.Clone()
		e.h2.NextProtos = []string{"h2"}
	}
	return e, nil
}

// Serve takes connections from l, which it owns, until ctx ends, Drain is called or l
// fails. Connections that were taken go on.
func (e *Edge) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	e.mu.Lock()
	e.work.Add(1)
	e.mu.Unlock()
	defer e.work.Done()
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			var t interface{ Temporary() bool } // out of descriptors, or reset before it was taken
			if !errors.As(err, &t) || !t.Temporary() {
				return fault.Wrap(err, "edge_accept", "take a connection at %s", l.Addr())
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		case e.draining.Load():
			c.Close()
			return nil
		}
		e.take(c)
	}
}

// take begins a connection, if there is room for it.
func (e *Edge) take(c net.Conn) {
	from := sourceOf(c.RemoteAddr())
	balancer := e.cfg.Balancers.Trust(from)
	e.stats.total.Add(1)
	e.mu.Lock()
	full := len(e.open) >= e.cfg.Connections
	if !full {
		e.open[c] = struct{}{}
		e.work.Add(1)
	}
	e.mu.Unlock()
	if full {
		e.stats.refused("edge_full")
		c.Close()
		return
	}
	go func() {
		defer e.work.Done()
		err := e.handle(c, from, balancer)
		c.Close()
		e.mu.Lock()
		delete(e.open, c)
		e.mu.Unlock()
		if code := fault.Code(err); code != "" {
			e.stats.refused(code)
			e.cfg.Log.Debug("connection", "code", code, "error", err)
		}
	}()
}

// Drain stops taking connections.
func (e *Edge) Drain() { e.draining.Store(true) }

// Shutdown waits until the connections have ended, and ends them when ctx does. Serve
// must have been told to stop.
func (e *Edge) Shutdown(ctx context.Context) {
	e.Drain()
	done := make(chan struct{})
	go func() { e.work.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		e.mu.Lock()
		for c := range e.open {
			c.Close()
		}
		e.mu.Unlock()
		<-done
	}
}

// handle is one connection.
func (e *Edge) handle(c net.Conn, from netip.Addr, balancer bool) error {
	c.SetDeadline(time.Now().Add(e.cfg.Handshake))
	client := addrPort(c.RemoteAddr())
	local := addrPort(c.LocalAddr())
	if balancer {
		h, err := proxyproto.Read(c)
		if err != nil {
			return err
		}
		if !h.Local() {
			client, local = h.Source, h.Destination
			from = h.Source.Addr()
		}
	}
	leave, err := e.sources.enter(from, time.Now())
	if err != nil {
		return err
	}
	defer leave()

	buf := buffers.Get().(*[]byte)
	h, raw, err := hello.Read(c, (*buf)[:0:len(*buf)])
	release := func() { buffers.Put(buf) }
	if err != nil {
		e.refuse(c, err)
		release()
		return err
	}
	if slices.Equal(h.ALPN, []string{alpnChallenge}) {
		defer release()
		return e.challenge(c, raw)
	}
	ctx, cancel := context.WithTimeout(context.Background(), e.cfg.Total)
	defer cancel()
	p, err := e.plan(ctx, h)
	if err != nil {
		e.refuse(c, err)
		release()
		return err
	}
	if p.own != hostname.None {
		defer release()
		return e.serveOwn(ctx, c, raw)
	}
	to, err := e.connect(ctx, p)
	if err != nil {
		e.refuse(c, err)
		release()
		return err
	}
	defer to.route.End()
	defer to.conn.Close()
	if to.proxy {
		head, err := proxyproto.Header{Source: client, Destination: local}.Bytes()
		if err == nil {
			_, err = to.conn.Write(head)
		}
		if err != nil {
			release()
			return fault.Wrap(err, "edge_broken", "send the PROXY header")
		}
	}
	e.stats.connections[to.mode].Add(1)
	defer e.stats.connections[to.mode].Add(-1)
	if to.mode == hostname.Passthrough {
		_, err := to.conn.Write(raw)
		release()
		if err != nil {
			return fault.Wrap(err, "edge_broken", "send the hello on")
		}
		c.SetDeadline(time.Time{})
		return e.relay(ctx, c, to.conn, to.route)
	}
	conf := e.plain
	if to.mode == hostname.TerminateH2 {
		conf = e.h2
	}
	if conf == nil {
		err := fault.New("edge_no_certificate", "no TLS ends at this gateway")
		e.refuse(c, err)
		release()
		return err
	}
	first := &replayed{Conn: c, rest: raw}
	session := tls.Server(first, conf)
	err = session.HandshakeContext(ctx)
	if len(first.rest) == 0 {
		release()
	}
	if err != nil {
		return fault.Wrap(err, "edge_handshake", "end TLS for %s", h.ServerName)
	}
	c.SetDeadline(time.Time{})
	if e.cfg.Evidence != nil && to.mode == hostname.Terminate {
		return e.terminated(ctx, session, to)
	}
	return e.relay(ctx, session, to.conn, to.route)
}

// refuse answers a client that nothing can be done for, in the protocol that it speaks.
func (e *Edge) refuse(c net.Conn, err error) {
	switch code := fault.Code(err); {
	case code == "hello_http":
		io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 37\r\n\r\nThis port speaks TLS: use https here.")
	default:
		alert, ok := hello.AlertFor(err)
		if !ok && len(code) > 6 && code[:6] == "hello_" {
			return
		}
		if !ok {
			alert = hello.InternalError
			switch code {
			case "host_malformed", "host_label", "host_port", "host_single_label", "host_reserved", "host_loopback", "host_unknown", "route_unknown", "edge_no_name":
				alert = hello.UnrecognizedName
			}
		}
		c.Write(alert.Record())
	}
}

// challenge answers a CA that asks by TLS-ALPN-01.
func (e *Edge) challenge(c net.Conn, raw []byte) error {
	if e.cfg.GetCertificate == nil {
		return fault.New("edge_no_certificate", "no TLS ends at this gateway")
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: e.cfg.GetCertificate, NextProtos: []string{alpnChallenge}}
	session := tls.Server(&replayed{Conn: c, rest: raw}, conf)
	if err := session.Handshake(); err != nil {
		return fault.Wrap(err, "edge_handshake", "answer a challenge")
	}
	return session.Close()
}

// serveOwn serves the gateway's own pages.
func (e *Edge) serveOwn(ctx context.Context, c net.Conn, raw []byte) error {
	if e.plain == nil || e.cfg.Pages == nil {
		err := fault.New("edge_no_certificate", "this gateway has no pages")
		e.refuse(c, err)
		return err
	}
	session := tls.Server(&replayed{Conn: c, rest: raw}, e.plain)
	if err := session.HandshakeContext(ctx); err != nil {
		return fault.Wrap(err, "edge_handshake", "end TLS for the gateway's pages")
	}
	c.SetDeadline(time.Time{})
	serveHTTP(ctx, session, e.cfg.Pages)
	return nil
}

// wanted is what a hello asks for.
type wanted struct {
	own  hostname.Kind // Gateway or Health: served here
	id   [dstack.AppIDSize]byte
	port uint16
	form hostname.Mode
}

// plan reads the name. Codes of hostname.Rules.Resolve; edge_no_name, host_unknown (an id
// that is none), those of names.find.
func (e *Edge) plan(ctx context.Context, h hello.Hello) (wanted, error) {
	if h.ServerName == "" {
		return wanted{}, fault.New("edge_no_name", "the client names no host")
	}
	d, err := e.cfg.Rules().Resolve(h.ServerName)
	if err != nil {
		return wanted{}, err
	}
	w := wanted{port: d.Port, form: d.Mode}
	id := d.ID
	switch d.Kind {
	case hostname.Gateway, hostname.Health:
		w.own = d.Kind
		return w, nil
	case hostname.Custom:
		a, err := e.names.find(ctx, d.Name)
		if err != nil {
			return wanted{}, err
		}
		id, w.port, w.form = a.ID, a.Port, hostname.Passthrough
	case hostname.App:
	default:
		return wanted{}, fault.New("host_unknown", "%s leads nowhere", h.ServerName)
	}
	b, ok := id.Bytes()
	if !ok {
		return wanted{}, fault.New("host_unknown", "%q is no app's and no instance's id", string(id))
	}
	w.id = b
	return w, nil
}

// target is an instance that was reached.
type target struct {
	conn  net.Conn
	route *route.Route
	mode  hostname.Mode
	proxy bool
}

// candidate is an instance that may be reached, and how.
type candidate struct {
	route *route.Route
	to    netip.AddrPort
	mode  hostname.Mode
	proxy bool
}

// candidates are the instances whose policy admits the connection, best first. Codes of
// Table.Select and portpolicy.Decide.
func (e *Edge) candidates(w wanted) ([]candidate, error) {
	var array [route.MaxSelect]*route.Route
	routes, err := e.cfg.Routes.Select(array[:0], w.id, e.cfg.Candidates)
	if err != nil {
		return nil, err
	}
	var out []candidate
	var why error
	for _, r := range routes {
		rec := r.Record()
		d, err := portpolicy.Decide(rec.Policy, e.cfg.Operator(rec.Instance), portpolicy.Request{Port: w.port, Form: w.form})
		if err != nil {
			why = err
			continue
		}
		c := candidate{route: r, to: netip.AddrPortFrom(rec.Address, w.port), mode: d.Mode, proxy: d.PROXY}
		if d.Mode == hostname.Passthrough && w.form != hostname.Passthrough {
			// The name asks for plain bytes at the port, and the app's policy for TLS
			// that ends in its guest: the guest's agent does that.
			c.to, c.proxy = netip.AddrPortFrom(rec.Address, manifest.TLSPort), true
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, why
	}
	// Instances of one app may run under two policies while it is upgraded: whichever was
	// chosen first says what is done with the connection.
	return slices.DeleteFunc(out, func(c candidate) bool { return c.mode != out[0].mode || c.proxy != out[0].proxy }), nil
}

// connect reaches the first of the candidates that answers. The app has seen nothing of
// the client yet, so that trying another is safe.
func (e *Edge) connect(ctx context.Context, w wanted) (*target, error) {
	list, err := e.candidates(w)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, e.cfg.Connect)
	defer cancel()
	type result struct {
		t   *target
		err error
	}
	results := make(chan result, len(list))
	dial := func(c candidate) {
		if err := c.route.Begin(); err != nil {
			results <- result{err: err}
			return
		}
		conn, err := e.cfg.Dial(ctx, c.to)
		if err != nil {
			c.route.End()
			results <- result{err: err}
			return
		}
		results <- result{t: &target{conn, c.route, c.mode, c.proxy}}
	}
	next, pending := 0, 0
	begin := func() {
		if next < len(list) {
			go dial(list[next])
			next++
			pending++
		}
	}
	begin()
	timer := time.NewTimer(stagger)
	defer timer.Stop()
	var errs []error
	for pending > 0 {
		select {
		case r := <-results:
			pending--
			if r.err == nil {
				// Those that are still on their way are not needed any more.
				go func(n int) {
					for range n {
						if late := <-results; late.err == nil {
							late.t.conn.Close()
							late.t.route.End()
						}
					}
				}(pending)
				return r.t, nil
			}
			errs = append(errs, r.err)
			begin()
		case <-timer.C:
			begin()
			timer.Reset(stagger)
		}
	}
	if code := fault.Code(errs[0]); code == "route_app_full" || code == "route_ended" {
		return nil, errs[0]
	}
	return nil, fault.Wrap(errors.Join(errs...), "edge_unreachable", "reach an instance (%d tried)", len(errs))
}

// sourceOf is the address of a peer.
func sourceOf(a net.Addr) netip.Addr { return addrPort(a).Addr() }

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// replayed is a connection of which some was read already.
type replayed struct {
	net.Conn
	rest []byte
}

func (r *replayed) Read(b []byte) (int, error) {
	if len(r.rest) > 0 {
		n := copy(b, r.rest)
		r.rest = r.rest[n:]
		return n, nil
	}
	return r.Conn.Read(b)
}

// Redirect answers plain HTTP: a CA's challenges by challenge, which may be nil, and
// everything else that is for one of our names with the https URL at the port.
func (e *Edge) Redirect(challenge func(http.Handler) http.Handler, port uint16) http.Handler {
	var out http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		name, err := hostname.ParseName(host)
		if err != nil {
			http.Error(w, "this host is not here", http.StatusMisdirectedRequest)
			return
		}
		if d, err := e.cfg.Rules().Resolve(name); err != nil || d.Kind == hostname.Custom && e.cfg.Lookup == nil {
			http.Error(w, "this host is not here", http.StatusMisdirectedRequest)
			return
		}
		to := string(name)
		if port != 443 {
			to = fmt.Sprintf("%s:%d", name, port)
		}
		// 308 keeps method and body, and a browser remembers it: what it sent was in clear once.
		http.Redirect(w, r, "https://"+to+r.URL.RequestURI(), http.StatusPermanentRedirect)
	})
	if challenge != nil {
		out = challenge(out)
	}
	return out
}
