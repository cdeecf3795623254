// SPDX-License-Identifier: Apache-2.0

package hostlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Link is a succession of sessions with one peer: whenever one ends, the next is
// made. Listeners stay, and Open waits for a session.
type Link struct {
	opt    Options
	host   bool
	dial   func(context.Context) (io.ReadWriteCloser, error)
	table  *table
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	current *Session      // nil between sessions
	changed chan struct{} // closed and replaced when current changes
}

// Back-off between attempts: short, since a host process restarts in a second.
const (
	retryMin = 50 * time.Millisecond
	retryMax = time.Second
)

// NewGuestLink returns a link from inside a guest. dial opens the port, as
// OpenVirtioPort does; it is called anew after each session, since closing the port
// is what throws away the remains of the old one.
func NewGuestLink(dial func(context.Context) (io.ReadWriteCloser, error), opt Options) *Link {
	return newLink(dial, opt, false)
}

// NewHostLink returns a link to a guest. dial connects to the socket of QEMU's
// chardev, which takes one client at a time, or to the guest's vsock port.
func NewHostLink(dial func(context.Context) (io.ReadWriteCloser, error), opt Options) *Link {
	return newLink(dial, opt, true)
}

func newLink(dial func(context.Context) (io.ReadWriteCloser, error), opt Options, host bool) *Link {
	ctx, cancel := context.WithCancel(context.Background())
	l := &Link{opt: opt.withDefaults(), host: host, dial: dial, table: newTable(), cancel: cancel,
		done: make(chan struct{}), changed: make(chan struct{})}
	go l.run(ctx)
	return l
}

// run makes sessions until ctx ends.
func (l *Link) run(ctx context.Context) {
	defer close(l.done)
	wait := retryMin
	for ctx.Err() == nil {
		s, err := l.attempt(ctx)
		if err == nil {
			l.opt.Log.Info("hostlink: connected")
			wait = retryMin
			l.set(s)
			select {
			case <-s.Done():
			case <-ctx.Done():
			}
			l.set(nil)
			err = s.Err()
			s.Close()
		}
		if ctx.Err() != nil {
			return
		}
		l.opt.Log.Debug("hostlink: not connected", "err", err, "retry_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(2*wait, retryMax)
	}
}

func (l *Link) attempt(ctx context.Context) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, l.opt.HandshakeTimeout)
	defer cancel()
	rw, err := l.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("hostlink: %w", err)
	}
	return connect(ctx, rw, l.opt, l.host, l.table, false)
}

func (l *Link) set(s *Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.current = s
	close(l.changed)
	l.changed = make(chan struct{})
}

// session waits for a live session.
func (l *Link) session(ctx context.Context) (*Session, error) {
	for {
		l.mu.Lock()
		s, changed := l.current, l.changed
		l.mu.Unlock()
		if s != nil && s.Err() == nil {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("hostlink: not connected: %w", ctx.Err())
		case <-l.done:
			return nil, net.ErrClosed
		}
	}
}

// Wait returns when the link is connected, with an error when ctx ends first.
func (l *Link) Wait(ctx context.Context) error {
	_, err := l.session(ctx)
	return err
}

// Connected reports whether there is a session now.
func (l *Link) Connected() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.current != nil && l.current.Err() == nil
}

// Open waits for a session and opens a stream, again with the next session if one
// ends meanwhile, until ctx ends. ErrNoStream and ErrBusy are returned at once.
func (l *Link) Open(ctx context.Context, name string) (net.Conn, error) {
	for {
		s, err := l.session(ctx)
		if err != nil {
			return nil, fmt.Errorf("open stream %q: %w", name, err)
		}
		c, err := s.Open(ctx, name)
		if !errors.Is(err, ErrSessionLost) {
			return c, err
		}
		<-s.Done()
	}
}

// Listen serves a stream in this and all later sessions, until the listener or the
// link is closed.
func (l *Link) Listen(name string) (net.Listener, error) { return l.table.listen(name) }

// Close ends the link, its session, streams and listeners, and waits for them.
func (l *Link) Close() error {
	l.cancel()
	<-l.done
	l.table.close()
	return nil
}
