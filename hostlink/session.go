// SPDX-License-Identifier: Apache-2.0

package hostlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// Answers to the header of a stream.
const (
	answerOK   = 0
	answerNone = 1
	answerBusy = 2
)

const (
	headerTimeout = 10 * time.Second
	closeTimeout  = 5 * time.Second // for the peer to close what we closed
	backlog       = 64              // accepted streams of one name that wait for Accept
)

// Session is one connection to one peer, after the handshake.
type Session struct {
	opt    Options
	mux    *yamux.Session
	guard  *guard
	table  *table
	own    bool // the table is not shared with another Session
	out    chan struct{}
	in     chan struct{}
	accept sync.WaitGroup

	mu  sync.Mutex
	err error
}

// Host shakes hands as the host, with the guest at the other end of rw: a connection
// to the socket of QEMU's chardev, or a vsock connection. It repeats its hello until
// the guest answers or ctx ends; ctx does not bound the session. rw is owned by the
// session, and closed on error.
func Host(ctx context.Context, rw io.ReadWriteCloser, opt Options) (*Session, error) {
	return connect(ctx, rw, opt, true, newTable(), true)
}

// Guest shakes hands as the guest; see Host.
func Guest(ctx context.Context, rw io.ReadWriteCloser, opt Options) (*Session, error) {
	return connect(ctx, rw, opt, false, newTable(), true)
}

func connect(ctx context.Context, rw io.ReadWriteCloser, opt Options, host bool, t *table, own bool) (*Session, error) {
	opt = opt.withDefaults()
	g := newGuard(nil, rw)
	// Reads and writes of a pipe know no context; closing it ends them.
	stop := context.AfterFunc(ctx, func() { g.Close() })
	defer stop()
	var err error
	if host {
		g.r, err = shakeHost(ctx, rw)
	} else {
		g.r, err = shakeGuest(rw)
	}
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err != nil {
		g.Close()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("hostlink: handshake: %w", ctx.Err())
		}
		return nil, err
	}
	s := &Session{opt: opt, guard: g, table: t, own: own,
		out: make(chan struct{}, opt.MaxStreams), in: make(chan struct{}, opt.MaxStreams)}
	config := yamux.DefaultConfig()
	config.KeepAliveInterval = opt.KeepAlive
	config.ConnectionWriteTimeout = opt.Timeout
	config.StreamOpenTimeout = opt.Timeout
	config.StreamCloseTimeout = closeTimeout
	config.LogOutput, config.Logger = nil, log.New(io.Discard, "", 0)
	config.AcceptBacklog = 4 * opt.MaxStreams
	// An honest peer opens a stream only while it remembers fewer than three times
	// MaxStreams in all (see Open). With what both sides have under way at that
	// moment, MaxStreams each, we never remember more than this.
	g.maxStreams = 5 * opt.MaxStreams
	// yamux starts to read before its constructor returns, and what it reads asks
	// for the number of its streams.
	ready := make(chan struct{})
	g.streams = func() int { <-ready; return s.mux.NumStreams() }
	if host {
		s.mux, err = yamux.Client(g, config)
	} else {
		s.mux, err = yamux.Server(g, config)
	}
	if err != nil {
		g.Close()
		return nil, fmt.Errorf("hostlink: %w", err)
	}
	close(ready)
	s.accept.Go(s.acceptLoop)
	return s, nil
}

// Done is closed when the session has ended, for whatever reason.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Err returns why the session has ended, or nil while it lives.
func (s *Session) Err() error {
	select {
	case <-s.Done():
	default:
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return ErrSessionLost
}

// Close ends the session and its streams and waits for its goroutines.
func (s *Session) Close() error {
	s.fail(errors.New("hostlink: closed by this side"))
	s.mux.Close()
	s.accept.Wait()
	return nil
}

func (s *Session) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

// Open opens a stream that the peer serves under the name. It returns ErrNoStream
// when the peer does not, ErrBusy when either side is at its limit, and
// ErrSessionLost when the session ends.
func (s *Session) Open(ctx context.Context, name string) (net.Conn, error) {
	if !nameRule.MatchString(name) {
		return nil, fmt.Errorf("hostlink: %q is not the name of a stream", name)
	}
	// This limit counts the peer's streams too, and those that one side closed and the
	// other has not; the next one counts ours that are open.
	if s.mux.NumStreams() >= 3*s.opt.MaxStreams {
		return nil, ErrBusy
	}
	select {
	case s.out <- struct{}{}:
	default:
		return nil, ErrBusy
	}
	release := sync.OnceFunc(func() { <-s.out })
	raw, err := s.mux.OpenStream()
	if err != nil {
		release()
		return nil, s.lost(err)
	}
	c := &conn{Stream: raw, session: s, name: name, release: release}
	// A deadline in the past wakes what ctx would interrupt.
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var answer [1]byte
	_, err = raw.Write(append([]byte{byte(len(name))}, name...))
	if err == nil {
		_, err = io.ReadFull(c, answer[:])
	}
	if !stop() {
		err = ctx.Err()
	}
	switch {
	case err != nil:
		err = s.lost(err)
	case answer[0] == answerNone:
		err = ErrNoStream
	case answer[0] == answerBusy:
		err = ErrBusy
	case answer[0] != answerOK:
		err = fmt.Errorf("%w: answer %d to a stream's header", errProtocol, answer[0])
	default:
		return c, nil
	}
	c.Close()
	return nil, fmt.Errorf("open stream %q: %w", name, err)
}

// lost returns ErrSessionLost for errors that come from the end of the session, and
// ends the session when nothing could be written to the peer for Options.Timeout.
func (s *Session) lost(err error) error {
	if errors.Is(err, yamux.ErrConnectionWriteTimeout) {
		s.guard.Close()
		return fmt.Errorf("%w (%w)", ErrSessionLost, err)
	}
	if s.mux.IsClosed() && !errors.Is(err, ErrSessionLost) &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w (%w)", ErrSessionLost, err)
	}
	return err
}

// Listen serves a stream: what the peer opens under the name comes out of the
// listener. The listener ends with the session.
func (s *Session) Listen(name string) (net.Listener, error) { return s.table.listen(name) }

func (s *Session) acceptLoop() {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		raw, err := s.mux.AcceptStream()
		if err != nil {
			if !s.mux.IsClosed() {
				continue // this stream is broken, the session is not
			}
			s.fail(fmt.Errorf("%w (%w)", ErrSessionLost, err))
			if s.own {
				s.table.close()
			}
			return
		}
		select {
		case s.in <- struct{}{}:
			serving.Go(func() { s.serve(raw) })
		default:
			// One write into a fresh window; it blocks only when all is blocked.
			raw.Write([]byte{answerBusy})
			raw.Close()
		}
	}
}

// serve reads the header of a stream and hands the stream over.
func (s *Session) serve(raw *yamux.Stream) {
	c := &conn{Stream: raw, session: s, release: sync.OnceFunc(func() { <-s.in })}
	raw.SetDeadline(time.Now().Add(headerTimeout))
	name, err := readHeader(c)
	if err != nil {
		c.Close()
		return
	}
	c.name = name
	l, answer := s.table.reserve(name)
	if _, err = raw.Write([]byte{answer}); err != nil || l == nil {
		c.Close()
		if l != nil {
			l.unreserve()
		}
		return
	}
	raw.SetDeadline(time.Time{})
	l.deliver(c)
}

// readHeader reads the length and name of a stream, as long as they obey the rule.
func readHeader(r io.Reader) (string, error) {
	var n [1]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return "", err
	}
	if n[0] == 0 || n[0] > maxName {
		return "", fmt.Errorf("%w: a stream's name of %d bytes", errProtocol, n[0])
	}
	name := make([]byte, n[0])
	if _, err := io.ReadFull(r, name); err != nil {
		return "", err
	}
	if !nameRule.Match(name) {
		return "", fmt.Errorf("%w: a stream's name is %q", errProtocol, name)
	}
	return string(name), nil
}

// conn is a stream as a net.Conn.
type conn struct {
	*yamux.Stream
	session *Session
	name    string
	release func()
}

// Addr is the address of both ends of a stream: its name.
type Addr struct{ Stream string }

// Network returns "hostlink".
func (Addr) Network() string  { return "hostlink" }
func (a Addr) String() string { return a.Stream }

func (c *conn) LocalAddr() net.Addr  { return Addr{c.name} }
func (c *conn) RemoteAddr() net.Addr { return Addr{c.name} }

// Read tells the end of the session from the end of the stream: yamux reports EOF
// for both.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Stream.Read(p)
	if err != nil {
		err = c.session.lost(err)
	}
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Stream.Write(p)
	if err != nil {
		err = c.session.lost(err)
	}
	return n, err
}

func (c *conn) Close() error {
	defer c.release()
	return c.Stream.Close()
}

// table holds the listeners of a session or link.
type table struct {
	mu     sync.Mutex
	byName map[string]*listener
	closed bool
}

func newTable() *table { return &table{byName: make(map[string]*listener)} }

func (t *table) listen(name string) (net.Listener, error) {
	if !nameRule.MatchString(name) {
		return nil, fmt.Errorf("hostlink: %q is not the name of a stream", name)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, net.ErrClosed
	}
	if t.byName[name] != nil {
		return nil, fmt.Errorf("hostlink: stream %q has a listener already", name)
	}
	l := &listener{table: t, name: name, queue: make(chan *conn, backlog), slots: make(chan struct{}, backlog), done: make(chan struct{})}
	t.byName[name] = l
	return l, nil
}

// reserve finds the listener of a name and a place in its queue, and the answer to
// give.
func (t *table) reserve(name string) (*listener, byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.byName[name]
	if l == nil {
		return nil, answerNone
	}
	select {
	case l.slots <- struct{}{}:
		return l, answerOK
	default:
		return nil, answerBusy
	}
}

func (t *table) close() {
	t.mu.Lock()
	t.closed = true
	all := t.byName
	t.byName = make(map[string]*listener)
	t.mu.Unlock()
	for _, l := range all {
		l.Close()
	}
}

type listener struct {
	table *table
	name  string
	slots chan struct{} // one token per stream in queue or on its way there
	queue chan *conn

	mu     sync.Mutex
	closed bool
	done   chan struct{}
}

func (l *listener) unreserve() { <-l.slots }

// deliver puts a stream into the queue, where its reservation has kept a place.
func (l *listener) deliver(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		l.unreserve()
		c.Close()
		return
	}
	l.queue <- c
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		l.unreserve()
		return c, nil
	case <-l.done:
		return nil, fmt.Errorf("accept stream %q: %w", l.name, net.ErrClosed)
	}
}

// Close ends Accept and closes streams that nobody accepted. The name is free again.
func (l *listener) Close() error {
	l.table.mu.Lock()
	if l.table.byName[l.name] == l {
		delete(l.table.byName, l.name)
	}
	l.table.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	close(l.done)
	for {
		select {
		case c := <-l.queue:
			l.unreserve()
			c.Close()
		default:
			return nil
		}
	}
}

func (l *listener) Addr() net.Addr { return Addr{l.name} }
