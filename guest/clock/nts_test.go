// SPDX-License-Identifier: Apache-2.0

package clock_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dstack-go/dstack/guest/clock"
	"github.com/dstack-go/dstack/guest/clock/clocktest"
	"github.com/dstack-go/dstack/internal/fault"
)

// day is how far lying servers lie (threats.md F01).
const day = 24 * time.Hour

// prover has the given servers and a bound of half a year ago.
func prover(t testing.TB, sys *machine, limit time.Duration, servers ...clock.Server) *clock.Clock {
	t.Helper()
	return boundProver(t, sys, limit, time.Now().AddDate(0, -6, 0), servers...)
}

func boundProver(t testing.TB, sys *machine, limit time.Duration, bound time.Time, servers ...clock.Server) *clock.Clock {
	t.Helper()
	c, err := clock.New(clock.Config{
		Sources: clock.Sources(servers, sys), System: sys, Limit: limit,
		Bounds: []clock.LowerBound{{Time: bound, Why: "the build of the image"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// refused expects a code, and the clock to be where it was.
func refused(t *testing.T, c *clock.Clock, sys *machine, code string, words ...string) {
	t.Helper()
	p, err := c.Prove(t.Context())
	if fault.Code(err) != code {
		t.Fatalf("got %v, %v; want the code %s", p, err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the refusal does not say %q: %v", w, err)
		}
	}
	if sys.sets != 0 {
		t.Error("the clock was set all the same")
	}
}

func TestThreat_F01_TheRTCIsNotBelieved(t *testing.T) {
	ca := clocktest.NewAuthority(t)
	servers := []clock.Server{start(t, ca, clocktest.Daemon{}), start(t, ca, clocktest.Daemon{}), start(t, ca, clocktest.Daemon{})}
	for _, rtc := range []time.Time{
		time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2035, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Unix(0, 0), time.Date(2500, 1, 1, 0, 0, 0, 0, time.UTC), time.Now(),
	} {
		t.Run(rtc.UTC().Format("2006"), func(t *testing.T) {
			sys := bootedAt(rtc)
			c := prover(t, sys, 10*time.Second, servers...)
			p, err := c.Prove(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if off := sys.off().Abs(); off > 2*time.Second {
				t.Errorf("the clock is off by %s", off)
			}
			if len(p.Agreed) != 3 {
				t.Errorf("agreed: %q", p.Agreed)
			}
			t.Log(p)
		})
	}
}

func TestThreat_F01_AServerThatLiesByADayIsIgnored(t *testing.T) {
	ca := clocktest.NewAuthority(t)
	for _, lie := range []time.Duration{day, -day} {
		t.Run(lie.String(), func(t *testing.T) {
			sys := bootedAt(time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC))
			liar := start(t, ca, clocktest.Daemon{Lie: lie})
			p, err := prover(t, sys, 10*time.Second, start(t, ca, clocktest.Daemon{}), liar, start(t, ca, clocktest.Daemon{})).Prove(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if off := sys.off().Abs(); off > 2*time.Second {
				t.Errorf("the clock is off by %s", off)
			}
			text, found := strings.CutPrefix(strings.Join(p.Ignored, " and "), liar.Host+": is off by ")
			if by, err := time.ParseDuration(text); !found || err != nil || (by-lie).Abs() > 2*time.Second {
				t.Errorf("ignored: %q, want the liar %s", p.Ignored, liar.Host)
			}
		})
	}
}

func TestThreat_F01_TwoOfThreeThatLieAreRefused(t *testing.T) {
	t.Parallel()
	ca := clocktest.NewAuthority(t)
	old := clocktest.Daemon{Lie: -day, NotBefore: time.Now().AddDate(0, 0, -30), NotAfter: time.Now().AddDate(0, 0, 60)}
	honest, ahead, behind, behindToo := start(t, ca, clocktest.Daemon{}), start(t, ca, clocktest.Daemon{Lie: day}), start(t, ca, old), start(t, ca, old)

	sys := bootedAt(time.Now())
	refused(t, prover(t, sys, 10*time.Second, honest, ahead, behind), sys, "time_disagreement", honest.Host, ahead.Host)

	// Two that tell the same lie are a majority. What is known to have passed binds
	// it, and so does the age of their own certificates.
	refused(t, boundProver(t, sys, 10*time.Second, time.Now().Add(-time.Hour), honest, behind, behindToo), sys, "time_before_bound", "the build of the image")
	young, youngToo := start(t, ca, clocktest.Daemon{Lie: -day}), start(t, ca, clocktest.Daemon{Lie: -day})
	refused(t, prover(t, sys, 3*time.Second, honest, young, youngToo), sys, "time_unproven", young.Host, "has expired or is not yet valid")
}

// A certificate must hold at the time that it helps to prove, whatever the RTC says,
// even one that makes the certificate look good.
func TestThreat_F01_AnExpiredCertificateProvesNothing(t *testing.T) {
	t.Parallel()
	ca := clocktest.NewAuthority(t)
	now := time.Now()
	good := []clock.Server{start(t, ca, clocktest.Daemon{}), start(t, ca, clocktest.Daemon{})}
	for name, bad := range map[string]clocktest.Daemon{
		"expired":       {NotBefore: now.AddDate(0, 0, -60), NotAfter: now.AddDate(0, 0, -30)},
		"not yet valid": {NotBefore: now.AddDate(0, 0, 30), NotAfter: now.AddDate(0, 0, 60)},
	} {
		server := start(t, ca, bad)
		for _, rtc := range []time.Time{now, bad.NotBefore.AddDate(0, 0, 1)} {
			sys := bootedAt(rtc)
			c := prover(t, sys, 3*time.Second, append(good, server)...)
			t.Run(name, func(t *testing.T) {
				refused(t, c, sys, "time_unproven", server.Host, "has expired or is not yet valid")
			})
		}
	}
	// One that expired before the bound does not even get to answer.
	sys := bootedAt(now)
	server := start(t, ca, clocktest.Daemon{NotBefore: now.AddDate(-2, 0, 0), NotAfter: now.AddDate(-1, 0, 0)})
	if _, err := clock.NTS(server, sys).Query(t.Context(), now.AddDate(0, -6, 0)); err == nil {
		t.Error("a certificate that expired before the bound was taken")
	}
}

func TestAnotherAuthorityOrNameIsRefused(t *testing.T) {
	t.Parallel()
	ca := clocktest.NewAuthority(t)
	good := []clock.Server{start(t, ca, clocktest.Daemon{}), start(t, ca, clocktest.Daemon{}), start(t, ca, clocktest.Daemon{})}
	foreign := good[2]
	foreign.Roots = roots(t, clocktest.NewAuthority(t))
	sys := bootedAt(time.Now())
	refused(t, prover(t, sys, 3*time.Second, good[0], good[1], foreign), sys, "time_unproven", foreign.Host, "unknown authority")

	otherName := good[2]
	otherName.Host = strings.Replace(otherName.Host, "localhost", "127.0.0.1", 1)
	refused(t, prover(t, sys, 3*time.Second, good[0], good[1], otherName), sys, "time_unproven", otherName.Host)
}

func TestSilentServersDelayAndDoNotDecide(t *testing.T) {
	t.Parallel()
	ca := clocktest.NewAuthority(t)
	mute := func() clock.Server {
		return clock.Server{Roots: roots(t, ca), Host: listen(t, func(c net.Conn) {
			_, _ = c.Read(make([]byte, 1)) // the hello
			_, _ = c.Read(make([]byte, 1<<20))
		})}
	}
	noNTP := keyExchange(t, ca, func(c net.Conn) {
		_, _ = c.Write(goodRecords(datagrams(t, func([]byte) []byte { return nil })))
	})
	good := []clock.Server{start(t, ca, clocktest.Daemon{}), start(t, ca, clocktest.Daemon{}), start(t, ca, clocktest.Daemon{})}

	sys := bootedAt(time.Now())
	refused(t, prover(t, sys, 3*time.Second, good[0], good[1], mute()), sys, "time_unproven", "2 of 3 time servers")
	refused(t, prover(t, sys, 3*time.Second, good[0], good[1], noNTP), sys, "time_unproven", "2 of 3 time servers")
	// Three answers, but no majority of seven.
	refused(t, prover(t, sys, 3*time.Second, append(good, mute(), mute(), mute(), mute())...), sys, "time_unproven", "3 of 7 time servers", "4 are needed")

	start := time.Now()
	p, err := prover(t, sys, 20*time.Second, append(good, mute(), noNTP)...).Prove(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("a proof with three of five servers took %s", took)
	}
	if len(p.Ignored) != 2 {
		t.Errorf("ignored: %q", p.Ignored)
	}
}

// The host sees the questions and can answer them with whatever an NTP server says.
// The key exchange is genuine here, the answers are not.
func TestAnswersWithoutAuthenticatorAreDropped(t *testing.T) {
	ca := clocktest.NewAuthority(t)
	field := func(kind uint16, size int, body ...byte) []byte {
		b := binary.BigEndian.AppendUint16(nil, kind)
		b = binary.BigEndian.AppendUint16(b, uint16(size))
		return append(b, body...)
	}
	const uniqueID, authenticator = 0x0104, 0x0404
	id := func(q []byte) []byte { return q[48 : 48+36] } // the library's first field
	for name, fields := range map[string]func(q []byte) []byte{
		"stolen from plain NTP":        func([]byte) []byte { return nil },
		"the identifier only":          id,
		"an empty field":               func([]byte) []byte { return field(0x0104, 0) },
		"a field larger than the rest": func([]byte) []byte { return field(uniqueID, 400, 1, 2, 3) },
		"a nonce of 0 bytes": func(q []byte) []byte {
			return append(bytes.Clone(id(q)), field(authenticator, 24, append([]byte{0, 0, 0, 16}, make([]byte, 16)...)...)...)
		},
		"a nonce of 12 bytes": func(q []byte) []byte {
			return append(bytes.Clone(id(q)), field(authenticator, 36, append([]byte{0, 12, 0, 16}, make([]byte, 28)...)...)...)
		},
		"a forged authenticator": func(q []byte) []byte {
			return append(bytes.Clone(id(q)), field(authenticator, 40, append([]byte{0, 16, 0, 16}, make([]byte, 32)...)...)...)
		},
		"the question's own fields": func(q []byte) []byte { return q[48:] },
	} {
		t.Run(name, func(t *testing.T) {
			asked := make(chan struct{}, 100)
			port := datagrams(t, func(q []byte) []byte {
				asked <- struct{}{}
				return append(plainNTP(q, time.Now().Add(day)), fields(q)...)
			})
			server := keyExchange(t, ca, func(c net.Conn) { _, _ = c.Write(goodRecords(port)) })
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			s, err := clock.NTS(server, bootedAt(time.Now())).Query(ctx, time.Now().AddDate(0, -6, 0))
			if err == nil {
				t.Fatalf("the answer was believed: %+v", s)
			}
			if len(asked) == 0 {
				t.Fatalf("the server was not asked: %v", err)
			}
		})
	}
}

func TestHostileKeyExchangesEnd(t *testing.T) {
	ca := clocktest.NewAuthority(t)
	var sent atomic.Int64
	for name, answer := range map[string]func(net.Conn){
		"says nothing and closes": func(net.Conn) {},
		"says nothing and stays":  func(c net.Conn) { _, _ = c.Read(make([]byte, 1<<16)); _, _ = c.Read(make([]byte, 1)) },
		"garbage":                 func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte{0xa5, 0x01, 0xff}, 5000)) },
		"a giant record":          func(c net.Conn) { _, _ = c.Write(record(5, make([]byte, 65535)...)) },
		"no end of cookies": func(c net.Conn) {
			cookies := bytes.Repeat(record(5, make([]byte, 1000)...), 16)
			for {
				n, err := c.Write(cookies)
				if err != nil {
					return
				}
				sent.Add(int64(n))
			}
		},
		"no cookie": func(c net.Conn) {
			_, _ = c.Write(bytes.Join([][]byte{record(0x8001, 0, 0), record(0x8004, 0, 15), record(0x8000)}, nil))
		},
		"no algorithm":      func(c net.Conn) { _, _ = c.Write(bytes.Join([][]byte{record(0x8001, 0, 0), record(0x8000)}, nil)) },
		"an error":          func(c net.Conn) { _, _ = c.Write(record(0x8002, 0, 1)) },
		"another algorithm": func(c net.Conn) { _, _ = c.Write(bytes.Join([][]byte{record(0x8004, 0, 99), record(0x8000)}, nil)) },
		"a strange server": func(c net.Conn) {
			_, _ = c.Write(bytes.Join([][]byte{record(0x8004, 0, 15), record(5, 1), record(0x8006, []byte("\x00%zz:\xff]")...), record(0x8000)}, nil))
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := keyExchange(t, ca, answer)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			if s, err := clock.NTS(server, bootedAt(time.Now())).Query(ctx, time.Now().AddDate(0, -6, 0)); err == nil {
				t.Fatalf("the answer was believed: %+v", s)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
	if n := sent.Load(); n > 8<<20 { // what socket buffers hold, at most
		t.Errorf("%d bytes of cookies were taken", n)
	}
}

func TestOtherProtocolsThanNTSAreRefused(t *testing.T) {
	ca := clocktest.NewAuthority(t)
	server := clock.Server{Roots: roots(t, ca), Host: listen(t, func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) })}
	if _, err := clock.NTS(server, bootedAt(time.Now())).Query(t.Context(), time.Now()); err == nil {
		t.Error("a server without TLS was believed")
	}
}

// Not a check: prints what a proof with three servers on loopback takes.
func BenchmarkProve(b *testing.B) {
	ca := clocktest.NewAuthority(b)
	servers := []clock.Server{start(b, ca, clocktest.Daemon{}), start(b, ca, clocktest.Daemon{}), start(b, ca, clocktest.Daemon{})}
	for name, rtc := range map[string]time.Time{"rtc=good": time.Now(), "rtc=2019": time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC)} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := prover(b, bootedAt(rtc), 10*time.Second, servers...).Prove(context.Background()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
