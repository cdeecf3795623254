// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"net"
	"sync/atomic"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// vendor is a simulated TDX platform: quotes have the shape and the signatures of
// real ones and are verified by package tdx.
type vendor struct {
	platform   *tdxtest.Platform
	collateral *collateral.Bundle
}

func newVendor(t testing.TB) *vendor {
	p := tdxtest.New(t)
	return &vendor{p, &collateral.Bundle{TDX: p.Collateral()}}
}

var (
	appA  = dstack.AppID{0xa}
	appB  = dstack.AppID{0xb}
	good  = dstack.ComposeHash{0xc0}
	inst1 = dstack.InstanceID{1}
	inst2 = dstack.InstanceID{2}
)

// machine is one CVM: what it committed to at boot, and its TEE.
type machine struct {
	vendor *vendor
	id     Identity
	events []eventlog.Event
	key    *Key // the key that it commits to; nil for none
	quotes atomic.Int32
	last   atomic.Pointer[[]byte] // container of the last quote
}

func event(t testing.TB, name string, payload []byte) eventlog.Event {
	t.Helper()
	e, err := eventlog.RuntimeV1(name, payload)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func newKey(t testing.TB) *Key {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// boot starts a machine of an app that commits to key, or to none.
func (v *vendor) boot(t testing.TB, app dstack.AppID, instance dstack.InstanceID, key *Key) *machine {
	t.Helper()
	m := &machine{vendor: v, key: key, id: Identity{AppID: app, InstanceID: &instance, ComposeHash: good}}
	add := func(name string, payload []byte) { m.events = append(m.events, event(t, name, payload)) }
	add(eventlog.SystemPreparing, nil)
	add(eventlog.AppIDEvent, app[:])
	add(eventlog.ComposeHashEvent, good[:])
	add(eventlog.InstanceIDEvent, instance[:])
	add(eventlog.BootMRDone, nil)
	if key != nil {
		sum := sha256.Sum256(key.SPKI())
		m.id.ChannelKey = sum[:]
		add(eventlog.SystemChannelKey, sum[:])
	}
	add(eventlog.SystemReady, nil)
	return m
}

// Attest is what the guest's system does, and just as well what any app of it gets
// from GetQuote with 64 bytes of its choice.
func (m *machine) Attest(_ context.Context, data dstack.ReportData) ([]byte, error) {
	body := m.vendor.platform.Body()
	rtmr, err := eventlog.Replay(m.events, eventlog.RuntimeIMR)
	if err != nil {
		return nil, err
	}
	body.RTMR[eventlog.RuntimeIMR], body.ReportData = rtmr, data
	c, err := container.EncodeV1(&attest.Evidence{
		TEE: dstack.TDX, Quote: m.vendor.platform.Quote(body), EventLog: m.events, ReportData: data, Config: "{}",
	})
	m.quotes.Add(1)
	m.last.Store(&c)
	return c, err
}

// judge is an appraiser that verifies quote and log, and leaves everything that
// this package checks to this package: it is the careless one of Appraiser's
// comment.
type judge struct {
	vendor *vendor
	seen   atomic.Int32
}

func (j *judge) Appraise(_ context.Context, c Candidate) (*Appraisal, error) {
	j.seen.Add(1)
	e, err := container.Decode(c.Container)
	if err != nil {
		return nil, err
	}
	claims, err := tdx.Verify(attest.Input{
		Evidence: e, Collateral: j.vendor.collateral, Roots: []attest.Roots{j.vendor.platform.Roots()}, At: tdxtest.At,
	})
	if err != nil {
		return nil, err
	}
	rtmr, err := eventlog.Replay(e.EventLog, eventlog.RuntimeIMR)
	if err != nil {
		return nil, err
	}
	if rtmr != claims.TDX.RTMR[3] {
		return nil, fault.New("log_replay_mismatch", "the log does not replay to the quote's register")
	}
	id, err := eventlog.Boundary(e.EventLog)
	if err != nil {
		return nil, err
	}
	a := &Appraisal{
		Identity:   Identity{AppID: id.AppID, ComposeHash: id.ComposeHash, ChannelKey: id.ChannelKey},
		ReportData: dstack.ReportData(claims.ReportData), Trust: claims.Trust, Claims: claims,
	}
	if len(id.InstanceID) > 0 {
		instance := dstack.InstanceID(id.InstanceID)
		a.Identity.InstanceID = &instance
	}
	return a, nil
}

// client is the usual configuration of a client that means app A and gives no
// evidence.
func (v *vendor) client() *Config {
	return &Config{Appraiser: &judge{vendor: v}, Intended: Intended{AppID: appA}, Timeout: 20 * time.Second}
}

// mutual is client with evidence of m.
func (v *vendor) mutual(m *machine) *Config {
	c := v.client()
	c.Attester, c.Key = m, m.key
	return c
}

// server is the usual configuration of m as a server for anyone.
func (m *machine) server() *Config {
	return &Config{Attester: m, Key: m.key, AnyClient: true, Timeout: 20 * time.Second}
}

// serverFor is server, but for clients of an app.
func (m *machine) serverFor(app dstack.AppID) *Config {
	return &Config{Attester: m, Key: m.key, Appraiser: &judge{vendor: m.vendor}, Intended: Intended{AppID: app}, Timeout: 20 * time.Second}
}

// serve runs a listener that echoes; its refusals go to a channel.
func serve(t testing.TB, c *Config) (addr string, refused chan error) {
	t.Helper()
	refused = make(chan error, 16)
	cfg := *c
	cfg.Refused = func(_ net.Addr, err error) { refused <- err }
	l, err := Listen("tcp", "127.0.0.1:0", &cfg)
	if err != nil {
		t.Fatal(err)
	}
	go echo(l)
	t.Cleanup(func() { l.Close() })
	return l.Addr().String(), refused
}

func echo(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			buf := make([]byte, 1024)
			for {
				n, err := conn.Read(buf)
				if err != nil {
					return
				}
				if _, err := conn.Write(buf[:n]); err != nil {
					return
				}
			}
		}()
	}
}

// mustEcho sends a message that must come back.
func mustEcho(t testing.TB, conn net.Conn) {
	t.Helper()
	message := []byte("application bytes")
	if _, err := conn.Write(message); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(message))
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	for n := 0; n < len(got); {
		m, err := conn.Read(got[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	if !bytes.Equal(got, message) {
		t.Fatalf("echo %q", got)
	}
}

func wantRefusal(t testing.TB, conn *Conn, err error, code string) {
	t.Helper()
	if conn != nil {
		conn.Close()
		t.Errorf("a connection to %+v, want a refusal", conn.Peer())
	}
	wantCode(t, err, code)
}

func waitRefused(t testing.TB, refused chan error, code string) {
	t.Helper()
	select {
	case err := <-refused:
		wantCode(t, err, code)
	case <-time.After(10 * time.Second):
		t.Fatal("the server refused nobody")
	}
}

// relabel returns a container that claims other report data than its quote has.
func relabel(t testing.TB, raw []byte, from, to dstack.ReportData) []byte {
	t.Helper()
	e, err := container.Decode(raw)
	if err != nil {
		t.Fatal(err)
	}
	if e.ReportData != from {
		t.Fatal("not the container that was expected")
	}
	e.ReportData = to
	out, err := container.EncodeV1(e)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
