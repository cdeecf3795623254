// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"crypto/tls"
	"net"
	"slices"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
)

// otherTLS is what an upstream service speaks on the same port.
func otherTLS(t testing.TB) *tls.Config {
	t.Helper()
	return &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{newKey(t).cert},
		NextProtos: []string{"http/1.1"}, ClientAuth: tls.RequestClientCert,
	}
}

func TestAServerServesOtherProtocolsBeside(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	cfg := m.serverFor(appB)
	cfg.Other = otherTLS(t)
	l, err := Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan *Conn, 2)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- conn.(*Conn)
		}
	}()
	key := newKey(t)
	plain, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}, Certificates: []tls.Certificate{key.cert},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	got := <-accepted
	defer got.Close()
	cs := got.ConnectionState()
	if got.Peer() != nil {
		t.Errorf("a client that gave no evidence is the peer %+v", got.Peer())
	}
	if len(cs.PeerCertificates) != 1 || cs.NegotiatedProtocol != "http/1.1" {
		t.Errorf("%d certificates, protocol %q", len(cs.PeerCertificates), cs.NegotiatedProtocol)
	}
	attested, err := Dial(t.Context(), "tcp", l.Addr().String(), v.mutual(v.boot(t, appB, inst2, newKey(t))))
	if err != nil {
		t.Fatal(err)
	}
	defer attested.Close()
	got = <-accepted
	defer got.Close()
	if p := got.Peer(); p == nil || p.Identity.AppID != appB {
		t.Errorf("the attested client is %+v", p)
	}
}

// Threat C01: who offers the token does not get around its evidence by offering
// another protocol beside it.
func TestThreat_C01_TheTokenBesideAnotherIsNotADowngrade(t *testing.T) {
	v := newVendor(t)
	cfg := v.boot(t, appA, inst1, newKey(t)).serverFor(appB)
	cfg.Other = otherTLS(t)
	addr, refused := serve(t, cfg)
	for _, protos := range [][]string{{"http/1.1", ALPN}, {ALPN, "http/1.1"}} {
		conn, err := tls.Dial("tcp", addr, &tls.Config{
			InsecureSkipVerify: true, NextProtos: protos, Certificates: []tls.Certificate{newKey(t).cert},
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := conn.ConnectionState().NegotiatedProtocol; got != ALPN {
			t.Errorf("%q gives %q", protos, got)
		}
		conn.Close()
		waitRefused(t, refused, "channel_broken")
	}
	if _, err := Listen("tcp", "127.0.0.1:0", func() *Config {
		c := *cfg
		c.Other = &tls.Config{NextProtos: []string{ALPN}}
		return &c
	}()); err == nil {
		t.Error("the token is served as another protocol")
	}
}

// bootJudge is judge for guests that may be booting yet.
type bootJudge struct{}

func (bootJudge) Appraise(_ context.Context, c Candidate) (*Appraisal, error) {
	e, err := container.Decode(c.Container)
	if err != nil {
		return nil, err
	}
	id, err := eventlog.LaunchIdentity(e.EventLog)
	if err != nil {
		return nil, err
	}
	return &Appraisal{
		Identity: Identity{AppID: id.AppID, ComposeHash: id.ComposeHash, ChannelKey: id.ChannelKey}, ReportData: e.ReportData,
		Trust: dstack.TrustDevelopment, Booting: !id.SystemReady, Detail: "what the server needs",
	}, nil
}

// Threat B20: evidence that an app may have made is not the system's; evidence from
// before any app ran is.
func TestThreat_B20_ABootingGuestNeedsNoCommittedKey(t *testing.T) {
	v := newVendor(t)
	server := v.boot(t, appA, inst1, newKey(t))
	client := func(booting bool) *machine {
		m := v.boot(t, appB, inst2, nil)
		m.key = newKey(t)
		if booting {
			m.events = slices.DeleteFunc(m.events, func(e eventlog.Event) bool { return e.Name == eventlog.SystemReady })
		}
		return m
	}
	for _, c := range []struct {
		name         string
		booting, app bool
		code         string
	}{
		{"a guest that boots", true, false, ""},
		{"a guest whose app runs, with a key of its own", false, false, "channel_key_uncommitted"},
		{"an app, where apps are meant", false, true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := server.serverFor(appB)
			cfg.Appraiser, cfg.AppEvidence = bootJudge{}, c.app
			details := make(chan any, 1)
			refused := make(chan error, 1)
			cfg.Refused = func(_ net.Addr, err error) { refused <- err }
			l, err := Listen("tcp", "127.0.0.1:0", cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				if conn, err := l.Accept(); err == nil {
					details <- conn.(*Conn).Peer().Detail
					conn.Close()
				}
			}()
			conn, err := Dial(t.Context(), "tcp", l.Addr().String(), v.mutual(client(c.booting)))
			if c.code != "" {
				wantRefusal(t, conn, err, "channel_refused")
				waitRefused(t, refused, c.code)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			select {
			case d := <-details:
				if d != "what the server needs" {
					t.Errorf("the server has %v of its peer", d)
				}
			case <-time.After(10 * time.Second):
				t.Error("the server accepted nobody")
			}
		})
	}
}
