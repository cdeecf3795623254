// SPDX-License-Identifier: Apache-2.0

package hostlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// port behaves as a QEMU virtio-serial port behind a chardev socket: one host at a
// time; the guest's end outlives hosts; bytes that the old host or guest left are
// found by the new one.
type port struct {
	mu      sync.Mutex
	cond    *sync.Cond
	toGuest []byte
	toHost  []byte
	host    *portEnd // nil: no host connected
	guest   *portEnd
	// noEOF: the guest's reads block while no host is connected, else they return
	// EOF, as Linux's driver does. With dropping, the guest's writes then vanish,
	// else they block.
	noEOF, dropping bool
}

const portBuffer = 64 << 10

func newPort() *port {
	p := &port{}
	p.cond = sync.NewCond(&p.mu)
	return p
}

type portEnd struct {
	p      *port
	isHost bool
	closed bool
}

func (p *port) dialHost(context.Context) (io.ReadWriteCloser, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.host != nil {
		return nil, syscall.EBUSY
	}
	p.host = &portEnd{p: p, isHost: true}
	p.cond.Broadcast()
	return p.host, nil
}

func (p *port) dialGuest(context.Context) (io.ReadWriteCloser, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.guest != nil {
		return nil, syscall.EBUSY
	}
	p.guest = &portEnd{p: p}
	p.cond.Broadcast()
	return p.guest, nil
}

func (e *portEnd) Read(b []byte) (int, error) {
	p := e.p
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		in := &p.toGuest
		if e.isHost {
			in = &p.toHost
		}
		switch {
		case e.closed:
			return 0, os.ErrClosed
		case len(*in) > 0:
			n := copy(b, *in)
			*in = slices.Delete(*in, 0, n)
			p.cond.Broadcast()
			return n, nil
		case !e.isHost && p.host == nil && !p.noEOF:
			return 0, io.EOF
		}
		p.cond.Wait()
	}
}

func (e *portEnd) Write(b []byte) (n int, err error) {
	p := e.p
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		out := &p.toHost
		if e.isHost {
			out = &p.toGuest
		}
		switch {
		case e.closed:
			return n, os.ErrClosed
		case len(b) == 0:
			return n, nil
		case !e.isHost && p.host == nil && p.dropping:
			return n + len(b), nil
		case len(*out) < portBuffer && (e.isHost || p.host != nil):
			k := min(len(b), portBuffer-len(*out))
			*out = append(*out, b[:k]...)
			n, b = n+k, b[k:]
			p.cond.Broadcast()
			continue
		}
		p.cond.Wait()
	}
}

func (e *portEnd) Close() error {
	p := e.p
	p.mu.Lock()
	defer p.mu.Unlock()
	e.closed = true
	if p.host == e {
		p.host = nil
	}
	if p.guest == e {
		p.guest = nil
	}
	p.cond.Broadcast()
	return nil
}

// kill ends the host's process: its end is gone without a word, even from yamux.
func (p *port) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.host != nil {
		p.host.closed = true
		p.host = nil
	}
	p.cond.Broadcast()
}

func TestLinkSurvivesHostRestarts(t *testing.T) {
	for _, c := range []struct{ noEOF, dropping bool }{{false, false}, {false, true}, {true, false}, {true, true}} {
		t.Run(fmt.Sprintf("noEOF=%v dropping=%v", c.noEOF, c.dropping), func(t *testing.T) {
			t.Parallel()
			p := newPort()
			p.noEOF, p.dropping = c.noEOF, c.dropping
			p.toGuest, p.toHost = garbage(5000), garbage(20_000)
			guest := NewGuestLink(p.dialGuest, quick())
			defer guest.Close()
			echo(t, guest, StreamGuestAPI)
			for life := range 4 {
				host := NewHostLink(p.dialHost, quick())
				echo(t, host, StreamHostAPI)
				if err := host.Wait(deadline(t)); err != nil {
					t.Fatal(err)
				}
				eventually(t, func() error { return roundTrip(t, host, StreamGuestAPI, 100_000) })
				eventually(t, func() error { return roundTrip(t, guest, StreamHostAPI, 100_000) })

				// Die in the middle of transfers in both directions.
				up, err := guest.Open(deadline(t), StreamHostAPI)
				if err != nil {
					t.Fatalf("life %d: %v", life, err)
				}
				down, err := host.Open(deadline(t), StreamGuestAPI)
				if err != nil {
					t.Fatalf("life %d: %v", life, err)
				}
				var wg sync.WaitGroup
				for _, s := range []net.Conn{up, down} {
					wg.Go(func() {
						for {
							if _, err := s.Write(make([]byte, 30_000)); err != nil {
								return
							}
						}
					})
				}
				time.Sleep(20 * time.Millisecond)
				p.kill()
				host.Close()
				if _, err := io.Copy(io.Discard, up); !errors.Is(err, ErrSessionLost) {
					t.Errorf("life %d: the old stream ends with %v", life, err)
				}
				up.Close()
				down.Close()
				wg.Wait()
			}
		})
	}
}

func TestLinkSurvivesGuestReboot(t *testing.T) {
	p := newPort()
	host := NewHostLink(p.dialHost, quick())
	defer host.Close()
	for range 3 {
		guest := NewGuestLink(p.dialGuest, quick())
		echo(t, guest, StreamGuestAPI)
		eventually(t, func() error { return roundTrip(t, host, StreamGuestAPI, 50_000) })
		guest.Close()
	}
}

func TestLinkOverUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	guest := NewGuestLink(func(ctx context.Context) (io.ReadWriteCloser, error) {
		os.Remove(path)
		l, err := net.Listen("unix", path)
		if err != nil {
			return nil, err
		}
		defer l.Close()
		end, _ := ctx.Deadline()
		l.(*net.UnixListener).SetDeadline(end)
		stop := context.AfterFunc(ctx, func() { l.Close() })
		defer stop()
		return l.Accept()
	}, patient())
	defer guest.Close()
	echo(t, guest, StreamGuestAPI)
	host := NewHostLink(DialUnix(path), patient())
	defer host.Close()
	if err := host.Wait(deadline(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return roundTrip(t, host, StreamGuestAPI, 1<<20) })
	if !host.Connected() {
		t.Error("not connected")
	}
}

func TestLinkWithoutPeer(t *testing.T) {
	l := NewHostLink(func(context.Context) (io.ReadWriteCloser, error) { return nil, errors.New("no such socket") }, quick())
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := l.Open(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if l.Connected() {
		t.Error("connected")
	}
	ln, err := l.Listen("x")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after Close: %v", err)
	}
	if _, err := l.Open(deadline(t), "x"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("open after Close: %v", err)
	}
	if _, err := l.Listen("y"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listen after Close: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestLinkReturnsRefusalsAtOnce(t *testing.T) {
	p := newPort()
	guest, host := NewGuestLink(p.dialGuest, patient()), NewHostLink(p.dialHost, patient())
	defer guest.Close()
	defer host.Close()
	if _, err := host.Open(deadline(t), "absent"); !errors.Is(err, ErrNoStream) {
		t.Errorf("error %v", err)
	}
}

// A hello between two frames of a running session, as when the old host's end was
// never noticed, ends the session at once and the next hello is answered.
func TestGuestNoticesANewHostWithoutEOF(t *testing.T) {
	p := newPort()
	p.noEOF = true
	opt := patient() // keep-alive alone would take half a minute
	guest := NewGuestLink(p.dialGuest, opt)
	defer guest.Close()
	echo(t, guest, StreamGuestAPI)
	for range 3 {
		host := NewHostLink(p.dialHost, opt)
		start := time.Now()
		eventually(t, func() error { return roundTrip(t, host, StreamGuestAPI, 100) })
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("took %v", took)
		}
		p.kill()
		host.Close()
	}
}
