// SPDX-License-Identifier: Apache-2.0

package clock_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack/guest/clock"
	"github.com/dstack-go/dstack/guest/clock/clocktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// machine has a real-time clock that is off and can be set, without touching the one
// of the machine that runs the test.
type machine struct {
	start time.Time

	mu     sync.Mutex
	offset time.Duration
	sets   int
}

// bootedAt returns a machine whose RTC shows the given time.
func bootedAt(rtc time.Time) *machine {
	return &machine{start: time.Now(), offset: time.Until(rtc)}
}

func (m *machine) off() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.offset
}

func (m *machine) Real() time.Time          { return time.Now().Add(m.off()).Round(0) }
func (m *machine) Monotonic() time.Duration { return time.Since(m.start) }
func (m *machine) Boottime() time.Duration  { return time.Since(m.start) }
func (m *machine) RTC() (time.Time, error)  { return time.Time{}, os.ErrNotExist }

func (m *machine) Set(t time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.offset, m.sets = time.Until(t), m.sets+1
	return nil
}

func (m *machine) Slew(d time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.offset += d
	return nil
}

func roots(t testing.TB, ca *clocktest.Authority) *x509.CertPool {
	t.Helper()
	pool, err := clock.ParseRoots([]byte(ca.PEM))
	if err != nil {
		t.Fatal(err)
	}
	return pool
}

// start runs a time server.
func start(t testing.TB, ca *clocktest.Authority, d clocktest.Daemon) clock.Server {
	t.Helper()
	return clock.Server{Host: fmt.Sprintf("localhost:%d", d.Start(t, ca)), Roots: roots(t, ca)}
}

// listen serves TCP on loopback until the test ends.
func listen(t testing.TB, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			wg.Go(func() {
				defer stop()
				defer conn.Close()
				serve(conn)
			})
		}
	})
	return fmt.Sprintf("localhost:%d", l.Addr().(*net.TCPAddr).Port)
}

// keyExchange is a server with a good certificate whose answer is the test's.
func keyExchange(t testing.TB, ca *clocktest.Authority, answer func(net.Conn)) clock.Server {
	t.Helper()
	cert, key := ca.Issue(t, time.Now().Add(-time.Hour), time.Now().AddDate(0, 0, 90))
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"ntske/1"}}
	return clock.Server{Roots: roots(t, ca), Host: listen(t, func(raw net.Conn) {
		conn := tls.Server(raw, cfg)
		if conn.Handshake() == nil {
			answer(conn)
		}
	})}
}

func record(kind uint16, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, kind)
	return append(binary.BigEndian.AppendUint16(b, uint16(len(body))), body...)
}

// goodRecords is a whole answer of a key exchange that leads to an NTP port.
func goodRecords(ntpPort int) []byte {
	return bytes.Join([][]byte{
		record(0x8001, 0, 0),
		record(0x8004, 0, 15),
		record(0x0005, bytes.Repeat([]byte{7}, 100)...),
		record(0x8007, byte(ntpPort>>8), byte(ntpPort)),
		record(0x8000),
	}, nil)
}

// datagrams answers each datagram by what reply makes of it, and returns its port.
func datagrams(t testing.TB, reply func(question []byte) []byte) int {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		c.Close()
		wg.Wait()
	})
	wg.Go(func() {
		b := make([]byte, 8192)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if answer := reply(bytes.Clone(b[:n])); answer != nil {
				_, _ = c.WriteTo(answer, from)
			}
		}
	})
	return c.LocalAddr().(*net.UDPAddr).Port
}

// plainNTP is an unauthenticated answer, as any NTP server gives it, for a given time.
func plainNTP(question []byte, at time.Time) []byte {
	b := make([]byte, 48)
	b[0], b[1], b[3] = 4<<3|4, 2, 0xec
	copy(b[24:32], question[40:48])
	stamp := uint64(at.Unix()+2208988800) << 32
	for _, i := range []int{16, 32, 40} {
		binary.BigEndian.PutUint64(b[i:], stamp)
	}
	return b
}
