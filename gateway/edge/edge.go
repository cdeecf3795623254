// SPDX-License-Identifier: Apache-2.0

// Package edge is the gateway's public listener: it takes a stranger's TLS connection, reads
// for whom it is, and joins it to an instance of that app.
//
// The way of a connection: limits of its source; a PROXY header, where a trusted balancer
// is in front; the ClientHello; the name's meaning (or the TXT record of a custom domain);
// candidates of the route table; the measured port policy of each; TLS, where the gateway
// ends it; the dial; the app's PROXY header; the relay.
//
// Guarantees:
//   - nothing reaches an app that its measured policy does not admit, whatever the name
//     asks for (threats.md K04), and no connection outlives its route by more than a tick;
//   - the bytes relayed are opaque and whole: an end is passed on as an end, a failure as a
//     failure and never as an end (K09). The gateway reads no HTTP of an app, but for the
//     first bytes of a connection whose TLS it ends: they may ask for evidence (C05);
//   - memory, descriptors, queries and connections are bounded in total and by source (K08):
//     an idle connection holds two descriptors and no buffer;
//   - it needs neither peers nor quorum nor disk (spec/gateway.md §5.5 A).
//
// Attacker-controlled: every byte and its time, on both sides of the relay. Trusted: the
// route table and its policies, the balancers in Balancers, the certificates.
//
// Implements spec/gateway.md §2 and §7.
package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
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
)

// Config is the listener's. Zero durations and numbers stand for the defaults.
type Config struct {
	Rules  func() hostname.Rules
	Routes *route.Table
	// Operator returns the operator's own policy of an instance, nil for none.
	Operator func(dstack.InstanceID) *portpolicy.Policy
	// Dial reaches an address in the tunnel. A *net.TCPConn is spliced.
	Dial func(context.Context, netip.AddrPort) (net.Conn, error)
	// GetCertificate chooses by the client's hello; without it nothing ends here.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// TicketKeys returns the session ticket keys, the first for new tickets; they are asked
	// for every second. Keys of one process alone if nil.
	TicketKeys func() [][32]byte
	// Challenge reports whether a custom domain is being proven by TLS-ALPN-01 here, with
	// GetCertificate; nil for never. Other challenges are the app's own.
	Challenge func(context.Context, hostname.Name) bool
	// Pages answers for gateway.<base> and health.<base>.
	Pages http.Handler
	// Evidence answers a POST to [channel.EvidencePath], the first request of a connection
	// whose TLS ends here; nil leaves the path to the app.
	Evidence func(http.ResponseWriter, *http.Request, Asked)
	// Balancers may, and must, send a PROXY header. Nobody else is asked for one.
	Balancers proxyproto.Sources
	// TXT answers for custom domains; without it there are none.
	TXT TXT
	// TXTPrefix and TXTCompat are as in [hostname.TXTNames].
	TXTPrefix string
	TXTCompat bool

	// Ended is told of each connection when it is over, and must not wait; nil: nobody is.
	Ended func(Ended)

	Timeouts Timeouts
	Limits   Limits
	Log      *slog.Logger
}

// Timeouts of a connection (spec/gateway.md §2.8).
type Timeouts struct {
	PROXY     time.Duration // inbound PROXY header; 5 s
	Handshake time.Duration // ClientHello, and again the handshake that ends here; 5 s
	DNS       time.Duration // all queries for a custom domain; 5 s
	Connect   time.Duration // all candidates together; 5 s
	Stagger   time.Duration // until the next candidate is tried too; 100 ms
	Idle      time.Duration // without a byte in either direction; 10 min
	Total     time.Duration // the whole connection; 5 h
	Health    time.Duration // how long an instance that could not be reached goes last; 5 s
}

// Limits bound what strangers take. A negative number is no limit.
type Limits struct {
	Connections      int // open at once; 65536
	Pending          int // of these, not yet joined to an app; 8192
	PerSource        int // open at once of one source (IPv4 address, IPv6 /64); 4096
	PendingPerSource int // 256
	Rate             int // new connections of one source a second, with a burst of twice that; 500
	Lookups          int // custom domains looked up a second; 200
	LookupsPerSource int // 10
	Pipes            int // pipes for splicing at once; 1024
}

// Adjustable is what a listener takes anew while it runs, see [Edge.Adjust].
type Adjustable struct {
	Timeouts  Timeouts
	Limits    Limits
	Balancers proxyproto.Sources
}

func set[T int | time.Duration](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}

func (a *Adjustable) defaults() {
	t, l := &a.Timeouts, &a.Limits
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&t.PROXY, 5 * time.Second}, {&t.Handshake, 5 * time.Second}, {&t.DNS, 5 * time.Second}, {&t.Connect, 5 * time.Second},
		{&t.Stagger, 100 * time.Millisecond}, {&t.Idle, 10 * time.Minute}, {&t.Total, 5 * time.Hour}, {&t.Health, 5 * time.Second},
	} {
		set(d.v, d.def)
	}
	for _, n := range []struct {
		v   *int
		def int
	}{
		{&l.Connections, 65536}, {&l.Pending, 8192}, {&l.PerSource, 4096}, {&l.PendingPerSource, 256}, {&l.Rate, 500},
		{&l.Lookups, 200}, {&l.LookupsPerSource, 10}, {&l.Pipes, 1024},
	} {
		set(n.v, n.def)
	}
}

func (c *Config) defaults() {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Rules == nil {
		c.Rules = func() hostname.Rules { return hostname.Rules{} }
	}
}

// Edge is the listener. Make it with [New], end it with [Edge.Shutdown].
type Edge struct {
	cfg     Config
	start   time.Time
	plain   *tls.Config // no ALPN
	h2      *tls.Config // ALPN h2 alone
	acme    *tls.Config // ALPN acme-tls/1 alone
	custom  *resolver
	sources sources
	health  health
	relays  registry
	apps    apps
	pool    pool
	stats   counters
	pages   *pages
	// evidence is nil when there is none.
	evidence *pages

	adjustable atomic.Pointer[Adjustable]
	retimed    chan struct{} // for the ticker

	now  atomic.Int64 // coarse, nanoseconds since start
	stop context.CancelFunc
	ctx  context.Context // of all that has no caller
	work sync.WaitGroup  // connections, the ticker, the pages

	mu        sync.Mutex
	draining  bool
	listeners map[net.Listener]struct{}
	opening   map[*opening]struct{}
}

// New returns a listener without a socket. Code edge_config: Routes or Dial is missing.
func New(cfg Config) (*Edge, error) {
	if cfg.Routes == nil || cfg.Dial == nil {
		return nil, fault.New("edge_config", "the listener needs a route table and a way to dial")
	}
	cfg.defaults()
	e := &Edge{cfg: cfg, start: time.Now(), retimed: make(chan struct{}, 1), listeners: map[net.Listener]struct{}{}, opening: map[*opening]struct{}{}}
	e.ctx, e.stop = context.WithCancel(context.Background())
	e.plain, e.h2, e.acme = e.tlsConfig(), e.tlsConfig("h2"), e.tlsConfig("acme-tls/1")
	e.Adjust(Adjustable{Timeouts: cfg.Timeouts, Limits: cfg.Limits, Balancers: cfg.Balancers})
	e.custom = newResolver(&e.cfg, e.adjusted, &e.stats, &e.sources)
	e.pool.limit = int64(e.adjusted().Limits.Pipes)
	e.pages = newPages(cfg.Pages)
	if cfg.Evidence != nil {
		e.evidence = evidencePages(cfg.Evidence)
		e.work.Go(e.evidence.serve)
	}
	e.ticketKeys()
	e.work.Go(e.pages.serve)
	e.work.Go(e.tick)
	return e, nil
}

// Adjust gives the listener other limits, times and balancers. Connections that there are go
// on: other times count for them at once, and limits, except on pipes, for who comes next.
func (e *Edge) Adjust(a Adjustable) {
	a.defaults()
	e.adjustable.Store(&a)
	e.sources.adjust(a.Limits)
	select {
	case e.retimed <- struct{}{}:
	default:
	}
}

func (e *Edge) adjusted() *Adjustable { return e.adjustable.Load() }

// tick keeps the coarse clock, and ends what has run out.
func (e *Edge) tick() {
	every := func() time.Duration {
		t := e.adjusted().Timeouts
		return max(10*time.Millisecond, min(time.Second, t.Idle/4, t.Total/4))
	}
	t := time.NewTicker(every())
	defer t.Stop()
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-e.retimed:
			t.Reset(every())
			continue
		case <-t.C:
		}
		now := time.Since(e.start)
		e.now.Store(int64(now))
		e.relays.reap(now, e.adjusted().Timeouts.Idle, e.adjusted().Timeouts.Total)
		e.health.sweep(time.Now())
		e.ticketKeys()
	}
}

// Serve accepts connections until ctx ends or the listener is drained, and returns nil
// then. Connections outlive it; see [Edge.Shutdown]. It closes l.
func (e *Edge) Serve(ctx context.Context, l net.Listener) error {
	e.mu.Lock()
	if e.draining {
		e.mu.Unlock()
		return l.Close()
	}
	e.listeners[l] = struct{}{}
	e.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
		e.mu.Lock()
		delete(e.listeners, l)
		e.mu.Unlock()
	}()
	for pause := time.Duration(0); ; {
		conn, err := l.Accept()
		switch {
		case err == nil:
			pause = 0
			e.accept(conn)
			continue
		case errors.Is(err, net.ErrClosed):
			return nil
		}
		// Most likely there are no descriptors left; those that end give some back.
		e.stats.refused("edge_accept")
		pause = min(max(5*time.Millisecond, 2*pause), time.Second)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		case <-e.ctx.Done():
		}
	}
}

// opening is a connection that is not yet joined.
type opening struct {
	conn   net.Conn
	start  time.Time
	source *source
	client netip.AddrPort // as the balancer or the socket tells
	local  netip.AddrPort
	hello  hello.Hello
	raw    []byte // the hello, to be sent on
	buf    *[]byte
	done   bool
}

func (e *Edge) accept(conn net.Conn) {
	e.mu.Lock()
	if e.draining {
		e.mu.Unlock()
		conn.Close()
		return
	}
	var code string
	switch l := e.adjusted().Limits; {
	case l.Connections >= 0 && e.stats.open.Load() >= int64(l.Connections):
		code = "edge_full"
	case l.Pending >= 0 && len(e.opening) >= l.Pending:
		code = "edge_pending_full"
	}
	if code != "" {
		e.mu.Unlock()
		e.stats.refused(code)
		conn.Close()
		return
	}
	o := &opening{conn: conn, start: time.Now()}
	e.opening[o] = struct{}{}
	e.stats.open.Add(1)
	e.stats.accepted.Add(1)
	e.work.Add(1)
	e.mu.Unlock()
	go e.open(o)
}

// settled says that a connection is joined or refused.
func (e *Edge) settled(o *opening) {
	if o.done {
		return
	}
	o.done = true
	e.mu.Lock()
	delete(e.opening, o)
	e.mu.Unlock()
	if o.source != nil {
		e.sources.settled(o.source)
	}
	if o.buf != nil {
		helloBuffers.Put(o.buf)
		o.buf, o.raw = nil, nil
	}
}

// ended is the last of a connection.
func (e *Edge) ended(s *source) {
	if s != nil {
		e.sources.end(s)
	}
	e.stats.open.Add(-1)
	e.work.Done()
}

// open takes a connection up to its relay.
func (e *Edge) open(o *opening) {
	r, err := e.join(o)
	if err != nil {
		e.refuse(o, err)
	}
	if r != nil {
		e.begin(o, r)
	}
	e.settled(o)
	if r == nil {
		o.conn.Close()
		e.ended(o.source)
		return
	}
	e.run(r)
}

// refuse counts an error and tells the client what TLS has to say of it.
func (e *Edge) refuse(o *opening, err error) {
	code := codeOf(err)
	e.stats.refused(code)
	e.toldRefused(o, err)
	e.cfg.Log.Debug("connection refused", "code", code, "source", o.client.Addr(), "err", err)
	var answer []byte
	var told *toldError
	switch alert, ok := hello.AlertFor(err); {
	case errors.As(err, &told): // crypto/tls has answered
		return
	case code == "hello_http":
		answer = e.answerHTTP(o.raw)
	case ok:
		answer = alert.Record()
	case o.hello.Size == 0:
		return
	case unrecognized[code]:
		answer = hello.UnrecognizedName.Record()
	default:
		answer = hello.InternalError.Record()
	}
	// What lies unread when a socket closes makes the kernel send a reset, which can
	// overtake the answer; so a little more is read, for a little while.
	o.conn.SetDeadline(time.Now().Add(lingerTime))
	if _, err := o.conn.Write(answer); err != nil {
		return
	}
	if c, ok := o.conn.(closeWriter); ok {
		c.CloseWrite()
	}
	var scrap [512]byte
	for range lingerReads {
		if _, err := o.conn.Read(scrap[:]); err != nil {
			return
		}
	}
}

const (
	lingerTime  = 250 * time.Millisecond
	lingerReads = 64
)

// unrecognized are the codes of names that lead nowhere.
var unrecognized = map[string]bool{
	"edge_no_name": true, "edge_unknown_id": true, "edge_no_txt": true, "route_unknown": true, "host_malformed": true,
	"host_label": true, "host_port": true, "host_single_label": true, "host_reserved": true, "host_loopback": true, "host_txt": true,
}

// toldError is an error whose alert was sent.
type toldError struct{ error }

func (t *toldError) Unwrap() error { return t.error }

type closeWriter interface{ CloseWrite() error }

var helloBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 2<<10); return &b }}

// join returns the relay, or nil without an error when the connection has been answered.
func (e *Edge) join(o *opening) (*relay, error) {
	if err := e.identify(o); err != nil {
		return nil, err
	}
	o.conn.SetReadDeadline(time.Now().Add(e.adjusted().Timeouts.Handshake))
	o.buf = helloBuffers.Get().(*[]byte)
	var err error
	if o.hello, o.raw, err = hello.Read(o.conn, *o.buf); err != nil {
		return nil, err
	}
	o.conn.SetReadDeadline(time.Time{})
	if o.hello.ServerName == "" {
		e.stats.noName.Add(1)
		return nil, fault.New("edge_no_name", "the ClientHello names no host")
	}
	d, err := e.cfg.Rules().Resolve(o.hello.ServerName)
	if err != nil {
		e.stats.noName.Add(1)
		return nil, err
	}
	if acmeChallenge(o.hello) && d.Kind != hostname.Custom && d.Mode != hostname.Passthrough {
		return nil, e.answerACME(o)
	}
	if acmeChallenge(o.hello) && d.Kind == hostname.Custom && e.cfg.Challenge != nil && e.cfg.Challenge(e.ctx, o.hello.ServerName) {
		return nil, e.answerACME(o)
	}
	switch d.Kind {
	case hostname.Gateway, hostname.Health:
		return nil, e.answerPages(o, d.Mode)
	case hostname.Loopback:
		to := target{addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), d.Port)}
		return e.connect(o, plan{mode: d.Mode, targets: []target{to}})
	case hostname.Custom:
		a, err := e.custom.lookup(e.ctx, o.source, o.hello.ServerName)
		if err != nil {
			return nil, err
		}
		d.ID, d.Port = a.ID, a.Port
	}
	p, err := e.plan(d)
	if err != nil {
		return nil, err
	}
	return e.connect(o, p)
}

// identify finds the connection's source and admits it.
func (e *Edge) identify(o *opening) error {
	o.client, o.local = addrPort(o.conn.RemoteAddr()), addrPort(o.conn.LocalAddr())
	if e.adjusted().Balancers.Trust(o.client.Addr()) {
		o.conn.SetReadDeadline(time.Now().Add(e.adjusted().Timeouts.PROXY))
		h, err := proxyproto.Read(o.conn)
		if err != nil {
			return err
		}
		if !h.Local() {
			o.client, o.local = h.Source, h.Destination
		}
	}
	var err error
	o.source, err = e.sources.begin(o.client.Addr(), time.Now())
	return err
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// Drain stops accepting; connections go on.
func (e *Edge) Drain() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.draining = true
	for l := range e.listeners {
		l.Close()
	}
}

// Shutdown drains, waits for the connections until ctx ends, and then ends those that are
// left; its error is then that of ctx. Nothing of the listener runs when it returns.
//
// The gateway reads no HTTP of apps, so it cannot tell their clients that a connection is
// the last of its kind. What it can do is to choose the moment: in the second half of the
// time, a connection on which the app had the last word ends in a pause, and the nearer
// the end the shorter a pause will do. A client that keeps connections alive then finds
// this one gone before it asks again, and not while it waits for an answer.
func (e *Edge) Shutdown(ctx context.Context) error {
	e.Drain()
	begun := time.Now()
	end, bounded := ctx.Deadline()
	var err error
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for told := false; e.stats.open.Load() > 0 && err == nil; {
		// The pages end when nobody is on the way to them; evidence, which every connection
		// may ask for, with the last.
		if !told && e.allSettled() {
			told = true
			e.work.Go(func() { e.pages.drain(ctx) })
		}
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-t.C:
			now := time.Since(e.start)
			e.now.Store(int64(now))
			if left := time.Until(end); bounded && left < end.Sub(begun)/2 {
				e.relays.endPauses(now, left/pausePart)
			}
		}
	}
	e.stop()
	e.mu.Lock()
	for o := range e.opening {
		o.conn.Close()
	}
	e.mu.Unlock()
	e.relays.closeAll()
	e.pages.close()
	if e.evidence != nil {
		e.evidence.close()
	}
	e.work.Wait()
	e.custom.wait()
	e.pool.close()
	return err
}

func (e *Edge) allSettled() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.opening) == 0
}

// pausePart is how many times longer than a pause what is left of the drain is, for the
// pause to be taken.
const pausePart = 8
