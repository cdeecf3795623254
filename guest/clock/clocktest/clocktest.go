// SPDX-License-Identifier: Apache-2.0

// Package clocktest runs real NTS servers for tests: chronyd on loopback, with
// certificates of a test's own authority, telling the truth or lying by a given time.
// None controls the machine's clock. For tests only.
package clocktest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Authority certifies time servers.
type Authority struct {
	PEM string // its certificate

	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes one that holds for a generation.
func NewAuthority(t testing.TB) *Authority {
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
	return &Authority{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), cert, key}
}

// Issue returns a certificate and its key in PEM form: for localhost, and for the
// address by which a guest on QEMU's user network reaches its host.
func (a *Authority) Issue(t testing.TB, notBefore, notAfter time.Time) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(10, 0, 2, 2)},
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

// Daemon is how to run chronyd. The zero value tells the truth with a certificate that
// is an hour old and holds for 90 days.
type Daemon struct {
	Lie                 time.Duration
	NotBefore, NotAfter time.Time
}

// Start runs chronyd as an NTS server on loopback until the test ends, and returns the
// port of its key exchange. It controls no clock.
func (d Daemon) Start(t testing.TB, ca *Authority) int {
	t.Helper()
	bin, err := exec.LookPath("chronyd")
	if err != nil {
		if bin, err = exec.LookPath("/usr/sbin/chronyd"); err != nil {
			t.Fatal("chronyd is missing; run scripts/host-packages.sh")
		}
	}
	if d.NotBefore.IsZero() {
		d.NotBefore, d.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(0, 0, 90)
	}
	dir := t.TempDir()
	cert, key := ca.Issue(t, d.NotBefore, d.NotAfter)
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
	if d.Lie != 0 {
		libs, _ := filepath.Glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
		if len(libs) == 0 {
			t.Fatal("libfaketime is missing; run scripts/host-packages.sh")
		}
		cmd.Env = append(os.Environ(), "LD_PRELOAD="+libs[0], fmt.Sprintf("FAKETIME=%+d", int(d.Lie.Seconds())))
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("chronyd, lie %s:\n%s", d.Lie, &log)
		}
	})
	addr := fmt.Sprintf("127.0.0.1:%d", kePort)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			return kePort
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
