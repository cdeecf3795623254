// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
)

// countingAttester makes evidence and counts it; broken, it makes none.
type countingAttester struct {
	inner  channel.Attester
	n      atomic.Int64
	broken atomic.Bool
	slow   atomic.Bool
}

func (c *countingAttester) Attest(ctx context.Context, d dstack.ReportData) ([]byte, error) {
	c.n.Add(1)
	if c.slow.Load() {
		time.Sleep(50 * time.Millisecond)
	}
	if c.broken.Load() {
		return nil, errors.New("the TEE does not answer")
	}
	return c.inner.Attest(ctx, d)
}

func TestTheServersCertificateIsRenewedAtHalfOfItsLife(t *testing.T) {
	w := newWorld(t, nil)
	a := &countingAttester{inner: w.self}
	cfg := w.service.cfg
	cfg.Self, cfg.Judge = a, w.judge()
	s, err := New(cfg)
	w.check(err)
	l := &serverLeaf{s: s}
	get := func() *tls.Certificate {
		t.Helper()
		c, err := l.get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := get()
	if life := first.Leaf.NotAfter.Sub(w.clock()); life > 24*time.Hour || life < 23*time.Hour {
		t.Errorf("it lives for %s", life)
	}
	w.pass(12*time.Hour - time.Minute)
	if get() != first || a.n.Load() != 1 {
		t.Error("renewed before half of its life")
	}
	w.pass(2 * time.Minute)
	a.broken.Store(true)
	if get() != first {
		t.Error("another one, from a TEE that does not answer")
	}
	a.broken.Store(false)
	// A crowd has one made, and waits for none.
	before := a.n.Load()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() { get() })
	}
	wg.Wait()
	second := get()
	if second == first || a.n.Load() != before+1 {
		t.Errorf("%d quotes for one certificate", a.n.Load()-before)
	}
	// Once the old one is over all wait, and still for one.
	w.pass(25 * time.Hour)
	before = a.n.Load()
	a.slow.Store(true)
	for range 8 {
		wg.Go(func() { get() })
	}
	wg.Wait()
	if a.n.Load() != before+1 {
		t.Errorf("%d quotes for one certificate", a.n.Load()-before)
	}
	a.broken.Store(true)
	w.pass(25 * time.Hour)
	if _, err := l.get(t.Context()); err == nil {
		t.Error("a certificate that is over is served")
	}
}

// slow is an authority that answers when it is let.
type slow struct {
	governance.Authority
	entered chan struct{}
	release chan struct{}
}

func (s *slow) Decide(ctx context.Context, r governance.Request) (governance.Decision, error) {
	if r.Purpose == governance.Keys {
		s.entered <- struct{}{}
		<-s.release
	}
	return s.Authority.Decide(ctx, r)
}

func TestStoppingFinishesWhatIsUnderWay(t *testing.T) {
	gate := &slow{entered: make(chan struct{}), release: make(chan struct{})}
	w := newWorld(t, nil, func(c *Config) { gate.Authority, c.Authority = c.Authority, gate })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.check(err)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.service.Serve(ctx, l) }()
	w.addr = l.Addr().String()
	c := w.session(w.guest(appA, good))
	answer := make(chan error, 1)
	go func() {
		r, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", nil)
		if err == nil && len(r.DiskCryptKey) != 32 {
			err = errors.New("half an answer")
		}
		answer <- err
	}()
	<-gate.entered
	stop()
	select {
	case err := <-done:
		t.Fatalf("it stopped with a request under way: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if c, err := net.DialTimeout("tcp", w.addr, time.Second); err == nil {
		c.Close()
		t.Error("it still takes connections")
	}
	close(gate.release)
	if err := <-answer; err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Bodies that are read before their turn comes are few.
func TestManyLargeRequests(t *testing.T) {
	w := newWorld(t, nil)
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	hold := func() {
		c, err := tls.Dial("tcp", w.addr, &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return nil }})
		w.check(err)
		held = append(held, c)
		_, err = c.Write([]byte("POST /prpc/UpdatePolicy HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nbegun"))
		w.check(err)
	}
	for range maxLarge {
		hold()
	}
	client := w.client(nil)
	var err error
	for range 100 { // until the server has read the headers
		_, err = call[kmsapi.Policy](t, client, "UpdatePolicy", &kmsapi.Policy{Signed: make([]byte, largeBody+1)})
		if fault.Code(err) == "busy" {
			break
		}
		hold() // this call may have had a place that one of those was to have
		time.Sleep(10 * time.Millisecond)
	}
	wantCode(t, err, "busy")
	// Who asks for little is served.
	if _, err := call[kmsapi.LogHead](t, client, "GetLogHead", nil); err != nil {
		t.Error(err)
	}
}
