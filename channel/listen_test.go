// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"errors"
	"net"
	"syscall"
	"testing"
	"time"
)

// failing is a listener whose first calls of Accept fail.
type failing struct {
	net.Listener
	errs chan error
}

func (f *failing) Accept() (net.Conn, error) {
	select {
	case err := <-f.errs:
		return nil, &net.OpError{Op: "accept", Err: err}
	default:
		return f.Listener.Accept()
	}
}

func TestAListenerOutlivesWhatPasses(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &failing{inner, make(chan error, 2)}
	f.errs <- syscall.EMFILE
	f.errs <- syscall.ECONNABORTED
	l, err := NewListener(f, m.server())
	if err != nil {
		t.Fatal(err)
	}
	go echo(l)
	conn, err := Dial(t.Context(), "tcp", l.Addr().String(), v.client())
	if err != nil {
		t.Fatal(err)
	}
	mustEcho(t, conn)
	conn.Close()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

func TestAListenerThatFailsForGoodSaysSo(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &failing{inner, make(chan error, 1)}
	f.errs <- syscall.EINVAL
	l, err := NewListener(f, m.server())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("%v", err)
	}
	l.Close()
}

func TestClosingAListenerEndsHandshakesUnderWay(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	l, err := Listen("tcp", "127.0.0.1:0", m.server())
	if err != nil {
		t.Fatal(err)
	}
	idle, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	// An accepted connection that nobody comes for.
	conn, err := Dial(t.Context(), "tcp", l.Addr().String(), v.client())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	start := time.Now()
	l.Close()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("Close took %s", took)
	}
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("the connection that nobody accepted is open: %v", err)
	}
}
