// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// maxConns is how many connections one listener has open at a time. Without
	// it, one app could use up the descriptors that all listeners share.
	maxConns     = 256
	sniffTimeout = 10 * time.Second
)

// tlsHandshake is the first byte of every TLS connection (RFC 8446 §5.1:
// ContentType handshake). No HTTP request begins with it.
const tlsHandshake = 0x16

// split serves plain HTTP and TLS on one port: it looks at the first byte of
// each connection and hands it to one of two listeners, which end when ctx does
// or base fails.
func split(ctx context.Context, base net.Listener) (plain, encrypted net.Listener) {
	p, e := newQueue(base.Addr()), newQueue(base.Addr())
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(ctx, func() { base.Close() })
	go func() {
		defer cancel()
		defer p.Close()
		defer e.Close()
		for {
			conn, err := base.Accept()
			if err != nil {
				if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
					return
				}
				select { // out of descriptors or a connection that was reset: go on
				case <-time.After(50 * time.Millisecond):
				case <-ctx.Done():
				}
				continue
			}
			c := &sniffed{Conn: conn}
			go func() {
				stop := context.AfterFunc(ctx, func() { c.Close() })
				defer stop()
				c.SetReadDeadline(time.Now().Add(sniffTimeout))
				if _, err := io.ReadFull(conn, c.first[:]); err != nil {
					c.Close()
					return
				}
				c.SetReadDeadline(time.Time{})
				q := p
				if c.first[0] == tlsHandshake {
					q = e
				}
				q.put(c)
			}()
		}
	}()
	return p, e
}

// sniffed is a connection whose first byte was read already.
type sniffed struct {
	net.Conn
	first [1]byte
	read  bool
}

func (c *sniffed) Read(b []byte) (int, error) {
	if c.read || len(b) == 0 {
		return c.Conn.Read(b)
	}
	c.read = true
	b[0] = c.first[0]
	return 1, nil
}

// queue is a listener that is fed connections.
type queue struct {
	addr net.Addr
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

func newQueue(addr net.Addr) *queue {
	return &queue{addr: addr, ch: make(chan net.Conn), done: make(chan struct{})}
}

// put hands c to Accept, or closes it when the listener has ended.
func (q *queue) put(c net.Conn) {
	select {
	case q.ch <- c:
	case <-q.done:
		c.Close()
	}
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.ch:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

func (q *queue) Addr() net.Addr { return q.addr }

// limited is a listener with at most cap(slots) connections open.
type limited struct {
	net.Listener
	slots chan struct{}
	done  chan struct{}
	close func() error
}

func limit(ln net.Listener, n int) net.Listener {
	l := &limited{Listener: ln, slots: make(chan struct{}, n), done: make(chan struct{})}
	l.close = sync.OnceValue(func() error {
		close(l.done)
		return ln.Close()
	})
	return l
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &slotConn{Conn: conn, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *limited) Close() error { return l.close() }

// slotConn gives its slot back when it is closed.
type slotConn struct {
	net.Conn
	release func()
}

func (c *slotConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
