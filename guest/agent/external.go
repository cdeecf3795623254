// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// Limits of the external port, which anyone can reach.
const (
	maxExternalConns = 256
	sniffTimeout     = 10 * time.Second
)

// tlsHandshake is the first byte of every TLS connection (RFC 8446 §5.1:
// ContentType handshake). No HTTP request begins with it.
const tlsHandshake = 0x16

// split serves plain HTTP and TLS on one port: it looks at the first byte of
// each connection and hands it to one of two listeners, which end when ctx does
// or base fails. At most maxExternalConns connections are open at a time.
func split(ctx context.Context, base net.Listener) (plain, encrypted net.Listener) {
	p, e := newQueue(base.Addr()), newQueue(base.Addr())
	slots := make(chan struct{}, maxExternalConns)
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(ctx, func() { base.Close() })
	go func() {
		defer cancel()
		defer p.Close()
		defer e.Close()
		for {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			conn, err := base.Accept()
			if err != nil {
				<-slots
				if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
					return
				}
				select { // out of descriptors or a connection that was reset: go on
				case <-time.After(50 * time.Millisecond):
				case <-ctx.Done():
				}
				continue
			}
			c := &sniffed{Conn: conn, release: sync.OnceFunc(func() { <-slots })}
			go func() {
				stop := context.AfterFunc(ctx, func() { c.Close() })
				defer stop()
				c.SetReadDeadline(time.Now().Add(sniffTimeout))
				if _, err := conn.Read(c.first[:]); err != nil {
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
	first   [1]byte
	read    bool
	release func()
}

func (c *sniffed) Read(b []byte) (int, error) {
	if c.read || len(b) == 0 {
		return c.Conn.Read(b)
	}
	c.read = true
	b[0] = c.first[0]
	return 1, nil
}

func (c *sniffed) Close() error {
	defer c.release()
	return c.Conn.Close()
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
