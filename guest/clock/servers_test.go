// SPDX-License-Identifier: Apache-2.0

package clock_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack/guest/clock"
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

// authority certifies time servers.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "time authority"},
		NotBefore: time.Now().AddDate(-10, 0, 0), NotAfter: time.Now().AddDate(20, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) roots(t testing.TB) *x509.CertPool {
	t.Helper()
	pool, err := clock.ParseRoots(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
	if err != nil {
		t.Fatal(err)
	}
	return pool
}

// issue returns a certificate for localhost and its key, in PEM form.
func (a *authority) issue(t testing.TB, notBefore, notAfter time.Time) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: notBefore, NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

// daemon is how to run chronyd. The zero value tells the truth with a certificate that
// is an hour old and holds for 90 days.
type daemon struct {
	lie                 time.Duration
	notBefore, notAfter time.Time
}

// start runs chronyd as an NTS server on loopback. It controls no clock.
func (d daemon) start(t testing.TB, ca *authority) clock.Server {
	t.Helper()
	bin, err := exec.LookPath("chronyd")
	if err != nil {
		if bin, err = exec.LookPath("/usr/sbin/chronyd"); err != nil {
			t.Fatal("chronyd is missing; run scripts/host-packages.sh")
		}
	}
	if d.notBefore.IsZero() {
		d.notBefore, d.notAfter = time.Now().Add(-time.Hour), time.Now().AddDate(0, 0, 90)
	}
	dir := t.TempDir()
	cert, key := ca.issue(t, d.notBefore, d.notAfter)
	kePort, ntpPort := freePort(t, "tcp"), freePort(t, "udp")
	conf := fmt.Sprintf(`port %d
ntsport %d
ntsserverkey %[3]s/key.pem
ntsservercert %[3]s/cert.pem
ntsdumpdir %[3]s
pidfile %[3]s/pid
bindaddress 127.0.0.1
bindcmdaddress /
cmdport 0
allow 127.0.0.1
local stratum 5
`, ntpPort, kePort, dir)
	for name, text := range map[string][]byte{"cert.pem": cert, "key.pem": key, "conf": []byte(conf)} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"-d", "-x", "-U", "-f", filepath.Join(dir, "conf")}
	if os.Getuid() == 0 {
		args = append(args, "-u", "root")
	}
	cmd := exec.Command(bin, args...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if d.lie != 0 {
		libs, _ := filepath.Glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
		if len(libs) == 0 {
			t.Fatal("libfaketime is missing; run scripts/host-packages.sh")
		}
		cmd.Env = append(os.Environ(), "LD_PRELOAD="+libs[0], fmt.Sprintf("FAKETIME=%+d", int(d.lie.Seconds())))
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("chronyd, lie %s:\n%s", d.lie, &log)
		}
	})
	addr := fmt.Sprintf("127.0.0.1:%d", kePort)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			return clock.Server{Host: fmt.Sprintf("localhost:%d", kePort), Roots: ca.roots(t)}
		}
		if time.Now().After(deadline) {
			t.Fatalf("chronyd does not listen: %v", err)
		}
	}
}

func freePort(t testing.TB, network string) int {
	t.Helper()
	if network == "udp" {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.LocalAddr().(*net.UDPAddr).Port
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
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
func keyExchange(t testing.TB, ca *authority, answer func(net.Conn)) clock.Server {
	t.Helper()
	cert, key := ca.issue(t, time.Now().Add(-time.Hour), time.Now().AddDate(0, 0, 90))
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"ntske/1"}}
	return clock.Server{Roots: ca.roots(t), Host: listen(t, func(raw net.Conn) {
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
