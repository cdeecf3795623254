// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// maxPending bounds the handshakes of one listener that are under way or wait to
// be accepted; each may hold evidence of MaxEvidence bytes. A peer that says
// nothing gives its place up after helloTimeout.
const maxPending = 64

// acceptPause is how long to wait when the machine is short of descriptors.
const acceptPause = 50 * time.Millisecond

// Listener accepts connections whose handshake, evidence included, is over. Slow
// peers do not hold up others.
type Listener struct {
	inner     net.Listener
	handshake func(context.Context, net.Conn) (*Conn, error)
	refused   func(net.Addr, error)

	ctx   context.Context // ends with Close
	close context.CancelFunc
	slots chan struct{}
	ready chan *Conn
	work  sync.WaitGroup
	ended chan struct{} // closed after err is set
	err   error
}

// Listen announces on a local address. See NewListener.
func Listen(network, addr string, c *Config) (*Listener, error) {
	if _, err := c.ready(ServerRole); err != nil {
		return nil, err
	}
	inner, err := net.Listen(network, addr)
	if err != nil {
		return nil, fault.Wrap(err, "channel_listen", "listen on %s", addr)
	}
	return NewListener(inner, c)
}

// NewListener serves attested channels on inner, which it owns from now on. All
// connections share the Config's key, or one ephemeral key if it has none.
func NewListener(inner net.Listener, c *Config) (*Listener, error) {
	ready, err := c.ready(ServerRole)
	if err != nil {
		inner.Close()
		return nil, err
	}
	return newListener(inner, ready.Refused, func(ctx context.Context, raw net.Conn) (*Conn, error) {
		return ready.handshake(ctx, raw, ServerRole, "")
	}), nil
}

func newListener(inner net.Listener, refused func(net.Addr, error), handshake func(context.Context, net.Conn) (*Conn, error)) *Listener {
	if refused == nil {
		refused = func(net.Addr, error) {}
	}
	l := &Listener{
		inner: inner, handshake: handshake, refused: refused,
		slots: make(chan struct{}, maxPending), ready: make(chan *Conn), ended: make(chan struct{}),
	}
	l.ctx, l.close = context.WithCancel(context.Background())
	l.work.Go(l.run)
	return l
}

func (l *Listener) run() {
	defer close(l.ended)
	for {
		raw, err := l.inner.Accept()
		if err != nil && l.ctx.Err() == nil && passing(err) {
			select {
			case <-time.After(acceptPause):
				continue
			case <-l.ctx.Done():
			}
		}
		if err != nil {
			l.err = err
			return
		}
		select {
		case l.slots <- struct{}{}:
			l.work.Go(func() { l.serve(raw) })
		case <-l.ctx.Done():
			raw.Close()
		}
	}
}

// passing reports whether a failure of accept(2) says nothing about the listener.
func passing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.ECONNRESET} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (l *Listener) serve(raw net.Conn) {
	defer func() { <-l.slots }()
	conn, err := l.handshake(l.ctx, raw)
	if err != nil {
		if l.ctx.Err() == nil {
			l.refused(raw.RemoteAddr(), err)
		}
		return
	}
	select {
	case l.ready <- conn:
	case <-l.ctx.Done():
		conn.Close()
	}
}

// Accept returns the next connection whose ends accepted each other; its type is
// *Conn. A peer that fails is no error of Accept: Config.Refused is told.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.ready:
		return conn, nil
	case <-l.ended:
		// Handshakes that were under way when the inner listener failed may still end
		// well, but nobody would come for them.
		l.close()
		return nil, l.err
	}
}

// Close stops listening, ends handshakes under way and waits for them. Accepted
// connections stay open.
func (l *Listener) Close() error {
	l.close()
	err := l.inner.Close()
	l.work.Wait()
	return err
}

// Addr returns the address listened on.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

type peerKey struct{}

// ConnContext is for http.Server.ConnContext: with it, a handler asks PeerOf who
// sent the request.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	if c, ok := conn.(*Conn); ok && c.peer != nil {
		return context.WithValue(ctx, peerKey{}, c.peer)
	}
	return ctx
}

// PeerOf returns the accepted peer of the connection that a request came over, or
// an error with code channel_no_peer: the client gave no evidence, or the
// server's ConnContext is not set.
func PeerOf(ctx context.Context) (*Peer, error) {
	if p, ok := ctx.Value(peerKey{}).(*Peer); ok {
		return p, nil
	}
	return nil, fault.New("channel_no_peer", "this request did not come from a peer that gave evidence")
}
