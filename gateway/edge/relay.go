// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"cmp"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/hostname"
)

// A relay is two loops, one a direction. A loop waits without a buffer where it can: it
// takes one when there is something to read, and gives it back before it waits again. It
// begins with copies; a flow that fills them is moved through a pipe by splice(2), which
// costs more calls for little data and far fewer cycles for much.

const (
	copySize = 16 << 10 // a TLS record
	bulkFrom = 32 << 10 // bytes without a pause from which a flow is spliced
)

// side is one end of a relay.
type side struct {
	conn   net.Conn
	socket *socket   // for splicing; nil where conn is no TCP socket
	under  *replay   // of a session of TLS on a TCP socket
	tls    *tls.Conn // nil for plain TCP
}

func newSide(conn net.Conn) side {
	s := side{conn: conn}
	switch c := conn.(type) {
	case *net.TCPConn:
		s.socket, _ = newSocket(c)
	case *tls.Conn:
		s.tls = c
		if r, ok := c.NetConn().(*replay); ok && r.src != nil {
			s.under = r
			r.poll = true
		}
	}
	return s
}

// closeWrite passes an end on.
func (s *side) closeWrite() error {
	if s.tls != nil {
		if err := s.tls.CloseWrite(); err != nil {
			return err
		}
		// What follows close_notify is the end of the stream, for clients that wait for it.
		if c, ok := s.tls.NetConn().(*replay).Conn.(closeWriter); ok {
			return c.CloseWrite()
		}
		return nil
	}
	if c, ok := s.conn.(closeWriter); ok {
		return c.CloseWrite()
	}
	return s.conn.Close()
}

// busy reports whether the kernel has bytes that its peer has not got or that were not read.
func (s *side) busy() bool {
	k := s.socket
	if s.under != nil {
		k = s.under.src
	}
	return k != nil && k.busy()
}

// bare is the connection without TLS.
func (s *side) bare() net.Conn {
	if s.tls != nil {
		return s.tls.NetConn().(*replay).Conn
	}
	return s.conn
}

// relay is a joined connection.
type relay struct {
	e           *Edge
	mode        hostname.Mode
	source      *source
	target      target
	client, app side
	of          dstack.AppID
	counted     *appCounters
	access      *accessed    // nil without an access log
	up, down    uint64       // bytes; each is one loop's
	how         atomic.Value // a string: why it was aborted
	begun       int64        // of the coarse clock
	last        atomic.Int64 // when bytes last moved
	owed        atomic.Bool  // the client has spoken last
	running     atomic.Int32 // loops
	closed      atomic.Bool
	prev, next  *relay // in the registry

	// answered is nil when the client can ask for no evidence; it is closed when the loop
	// from the app has ended.
	answered chan struct{}
	began    bool        // the client sent something; of the loop from the client
	first    []byte      // what it sent, asking for evidence
	taken    atomic.Bool // the connection is the app's no more
	spoke    atomic.Bool // the app sent something
}

func (e *Edge) newRelay(o *opening, mode hostname.Mode, client net.Conn, t target, app net.Conn) *relay {
	now := e.now.Load()
	r := &relay{e: e, mode: mode, source: o.source, target: t, client: newSide(client), app: newSide(app), begun: now}
	r.last.Store(now)
	r.running.Store(2)
	if e.evidence != nil && r.client.tls != nil && t.route != nil {
		r.answered = make(chan struct{})
	}
	return r
}

// run starts the relay. Its loops have stacks of their own, small ones, in place of the
// one that the handshake has grown.
func (e *Edge) run(r *relay) {
	e.stats.joined[r.mode].Add(1)
	e.stats.relaying[r.mode].Add(1)
	e.relays.add(r)
	if e.ctx.Err() != nil {
		r.abort("stopped")
	}
	go r.loop(&r.client, &r.app, &e.stats.up)
	go r.loop(&r.app, &r.client, &e.stats.down)
}

func (r *relay) loop(from, to *side, count *atomic.Uint64) {
	err := r.move(from, to, count)
	switch {
	case err == errAsked:
		err = r.answer()
	case from == &r.app && r.taken.Load(): // the other loop answers the client, and ends it
		err = nil
	// The last of the two is about to close anyway; only TLS has an end to tell before.
	case err == nil && (to.tls != nil || r.running.Load() > 1):
		err = to.closeWrite()
	}
	if err != nil {
		r.abort("failed")
	}
	if from == &r.app && r.answered != nil {
		close(r.answered)
	}
	if r.running.Add(-1) == 0 {
		r.finish()
	}
}

// abort ends both sides with a reset: neither may take what it has for the whole.
func (r *relay) abort(how string) {
	r.how.CompareAndSwap(nil, how)
	if !r.closed.CompareAndSwap(false, true) {
		return
	}
	for _, s := range []*side{&r.client, &r.app} {
		c := s.bare()
		if t, ok := c.(interface{ SetLinger(int) error }); ok {
			t.SetLinger(0)
		}
		c.Close()
	}
}

func (r *relay) finish() {
	if r.closed.CompareAndSwap(false, true) {
		r.client.bare().Close()
		r.app.bare().Close()
	}
	r.e.relays.remove(r)
	endRoute(r.target)
	r.e.stats.relaying[r.mode].Add(-1)
	r.e.told(r)
	r.e.ended(r.source)
}

func (r *relay) moved(n int, count *atomic.Uint64) {
	count.Add(uint64(n))
	if r.answered != nil && count == &r.e.stats.down && !r.spoke.Load() {
		r.spoke.Store(true)
	}
	if now := r.e.now.Load(); r.last.Load() != now {
		r.last.Store(now)
	}
	r.tally(n, count == &r.e.stats.down)
}

// speaks notes who has the word. It is called before the bytes are on their way, since an
// answer to them may overtake what is done after.
func (r *relay) speaks(from *side) {
	if client := from == &r.client; r.owed.Load() != client {
		r.owed.Store(client)
	}
}

var copyBuffers = sync.Pool{New: func() any { return new([copySize]byte) }}

// move carries one direction to its end; nil is the end of the stream.
func (r *relay) move(from, to *side, count *atomic.Uint64) error {
	switch {
	case from.socket != nil:
		return r.moveSocket(from, to, count)
	case from.under != nil:
		return r.moveTLS(from, to, count)
	}
	buf := copyBuffers.Get().(*[copySize]byte)
	defer copyBuffers.Put(buf)
	for {
		n, err := from.conn.Read(buf[:])
		if n > 0 {
			if from == &r.client && r.asks(buf[:n]) {
				return errAsked
			}
			r.speaks(from)
			if _, err := to.conn.Write(buf[:n]); err != nil {
				return err
			}
			r.moved(n, count)
		}
		if err != nil {
			return ended(err)
		}
	}
}

// ended makes of io.EOF the end that it is.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// moveTLS reads what has come, and waits for more on the socket beneath.
func (r *relay) moveTLS(from, to *side, count *atomic.Uint64) error {
	for {
		buf := copyBuffers.Get().(*[copySize]byte)
		var err error
		for err == nil {
			var n int
			if n, err = from.tls.Read(buf[:]); n > 0 {
				if from == &r.client && r.asks(buf[:n]) {
					err = errAsked
					break
				}
				r.speaks(from)
				if _, werr := to.conn.Write(buf[:n]); werr != nil {
					err = werr
					break
				}
				r.moved(n, count)
			}
		}
		copyBuffers.Put(buf)
		if !errors.Is(err, emptyError{}) {
			return ended(err)
		}
		if err := from.under.src.wait(); err != nil {
			return err
		}
	}
}

// moveSocket copies, and splices while there is much to move.
func (r *relay) moveSocket(from, to *side, count *atomic.Uint64) error {
	burst, bulk := 0, false
	for {
		if bulk && to.socket != nil {
			if p := r.e.pool.get(); p != nil {
				n, waited, err := from.socket.splice(to.socket, p, func(n int) { r.speaks(from); r.moved(n, count) })
				r.e.pool.put(p)
				switch {
				case err != nil:
					return err
				case n == 0:
					return nil
				case waited:
					// A flow that stops again and again soon after it began is not bulk.
					bulk, burst = n >= bulkFrom/4, 0
				}
				continue
			}
		}
		buf, n, waited, err := from.socket.read()
		if err != nil || n == 0 {
			return err
		}
		r.speaks(from)
		_, err = to.conn.Write(buf[:n])
		copyBuffers.Put(buf)
		if err != nil {
			return err
		}
		r.moved(n, count)
		if waited {
			burst = 0
		}
		burst += n
		bulk = burst >= bulkFrom
	}
}

// registry is the relays there are.
type registry struct {
	mu   sync.Mutex
	head *relay
}

func (g *registry) add(r *relay) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.next = g.head; r.next != nil {
		r.next.prev = r
	}
	g.head = r
}

func (g *registry) remove(r *relay) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		g.head = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	}
}

// reap ends relays that are idle, too old, or whose route has ended.
func (g *registry) reap(now, idle, total time.Duration) {
	for _, r := range g.those(func(r *relay) bool { return r.overdue(now, idle, total) != "" }) {
		r.e.stats.reaped.Add(1)
		r.abort(cmp.Or(r.overdue(now, idle, total), "idle"))
	}
}

// overdue says why a relay has to end.
func (r *relay) overdue(now, idle, total time.Duration) string {
	switch {
	case int64(now)-r.last.Load() > int64(idle):
		return "idle"
	case int64(now)-r.begun > int64(total):
		return "total"
	case r.target.route == nil:
		return ""
	}
	select {
	case <-r.target.route.Gone():
		return "route"
	default:
		return ""
	}
}

// endPauses ends relays on which the app had the last word, least ago or earlier, and the
// client has all of it and has sent no more. It is a reset as any: an end would be taken
// for the app's, even in TLS by clients that do without its own.
func (g *registry) endPauses(now, least time.Duration) {
	for _, r := range g.those(func(r *relay) bool {
		return !r.owed.Load() && int64(now)-r.last.Load() >= int64(least) && !r.client.busy()
	}) {
		r.abort("drained")
	}
}

func (g *registry) closeAll() {
	for _, r := range g.those(func(*relay) bool { return true }) {
		r.abort("stopped")
	}
}

func (g *registry) those(which func(*relay) bool) (out []*relay) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for r := g.head; r != nil; r = r.next {
		if !r.closed.Load() && which(r) {
			out = append(out, r)
		}
	}
	return out
}
