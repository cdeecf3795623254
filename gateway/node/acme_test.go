// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/acme/acmetest"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// What the configuration says is what obtains: the wildcard of the base domain, and a
// certificate for a key that is in a guest.
func TestTheConfiguredAuthorityCertifies(t *testing.T) {
	d := acmetest.NewDNS(t, "gw.test")
	ca := acmetest.NewCA(t, d, 1, 1)
	n := &Node{domains: []gateway.Domain{{Name: "gw.test", Port: 443}}}
	n.cfg.Core.DataDir = t.TempDir()
	n.cfg.Core.ACME = ACMEConfig{
		Directories: ca.Directory, DNSProvider: "rfc2136", Resolvers: d.Addr, Propagation: config.Duration{Duration: -1},
		DNSSettings: config.NewSecret(fmt.Sprintf("server=%s,key_name=%s,key_alg=%s,key=%s", d.Addr, acmetest.KeyName, acmetest.KeyAlg, acmetest.Key)),
	}
	m, err := n.authorities(&certmagic.FileStorage{Path: t.TempDir()}, func(c *acme.Config) { c.CAs[0].Roots = ca.APIRoots })
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := n.manage(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetCertificate: m.GetCertificate})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.(*tls.Conn).Handshake()
			c.Close()
		}
	}()
	for end := time.Now().Add(40 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{ServerName: "x.gw.test", InsecureSkipVerify: true})
		if err == nil {
			if err := c.ConnectionState().PeerCertificates[0].VerifyHostname("x.gw.test"); err != nil {
				t.Error(err)
			}
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	// Administrators are told of a certificate that is served, and that CAA lets everybody
	// have one, until it names our account.
	status := func() string {
		s := certificates{m}.Status("gw.test")
		if s.Served == s.NotAfter.IsZero() {
			t.Errorf("%+v", s)
		}
		return s.Err
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %q", what, status())
			}
		}
	}
	until("CAA that is missing is told", func() bool { return strings.Contains(status(), "CAA") })
	if err := m.SetCAA(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CheckCAA(t.Context()); err != nil {
		t.Fatal(err)
	}
	if text := status(); text != "" {
		t.Errorf("when CAA is right: %s", text)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	name := hostname.Name(strings.Repeat("ab", 20) + "-8080.gw.test")
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{string(name)}}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	o := &orders{m: m}
	chain, _, _, err := o.Sign(t.Context(), csr, []hostname.Name{name})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(chain)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil || !key.PublicKey.Equal(leaf.PublicKey) || leaf.VerifyHostname(string(name)) != nil {
		t.Errorf("%v", err)
	}
}

// slow is an authority that takes its time.
type slow struct {
	go_   chan struct{}
	mu    sync.Mutex
	asked int
}

func (s *slow) Sign(ctx context.Context, _ *x509.CertificateRequest, _ []hostname.Name) ([]byte, time.Time, time.Time, error) {
	s.mu.Lock()
	s.asked++
	s.mu.Unlock()
	select {
	case <-s.go_:
		return []byte("chain"), time.Time{}, time.Time{}, nil
	case <-ctx.Done():
		return nil, time.Time{}, time.Time{}, ctx.Err()
	}
}

func (s *slow) SignCustom(ctx context.Context, csr *x509.CertificateRequest, _ hostname.Name, _ string) ([]byte, time.Time, time.Time, error) {
	return s.Sign(ctx, csr, nil)
}

func TestAnOrderOutlivesWhoAsked(t *testing.T) {
	s := &slow{go_: make(chan struct{})}
	o := &orders{m: s}
	csr := &x509.CertificateRequest{RawSubjectPublicKeyInfo: []byte("key")}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	for range 3 {
		if _, _, _, err := o.Sign(short, csr, nil); fault.Code(err) != "certificate_pending" {
			t.Errorf("%v", err)
		}
	}
	close(s.go_)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		chain, _, _, err := o.Sign(t.Context(), csr, nil)
		if err == nil && string(chain) == "chain" {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	if s.asked != 2 {
		t.Errorf("ordered %d times, once while it was under way and once after", s.asked)
	}
}
