// SPDX-License-Identifier: Apache-2.0

// Package privateca is a certificate authority of the gateway's own, for development and
// for private installations whose clients trust it: it certifies the gateway's base
// domains, and keys of attested instances for names under them. No public client trusts
// it, and nobody can ask it over the network but through the gateway.
//
// Guarantees: its own certificate is constrained to the base domains, so that whoever
// adds it to a trust store trusts it for nothing else; leaves live for a week.
//
// Trusted: the directory that holds its key. Attacker-controlled: certificate requests,
// of which it takes the key alone.
package privateca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
)

// Lives of certificates. They begin a little in the past, for clocks that are behind.
const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 7 * 24 * time.Hour
	backdate = 5 * time.Minute
)

// Files of the directory.
const (
	KeyFile  = "private-ca.key"
	CertFile = "private-ca.pem" // the public half, for trust stores
)

// CA is the authority. It is safe for concurrent use.
type CA struct {
	dir string
	now func() time.Time
	is  atomic.Pointer[authority]

	mu      sync.Mutex
	domains []hostname.Name
	leaf    *tls.Certificate // of the base domains
}

// authority is a CA's certificate and its key.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// Open opens the authority in dir, making it at the first time. One that was made for
// other domains is an error: those who trust it trust it for those. Codes private_ca,
// private_ca_domains.
func Open(dir string, domains []hostname.Name, now func() time.Time) (*CA, error) {
	if now == nil {
		now = time.Now
	}
	if len(domains) == 0 {
		return nil, fault.New("private_ca_domains", "a private CA needs a base domain")
	}
	ca := &CA{dir: dir, domains: domains, now: now}
	keyText, err := os.ReadFile(filepath.Join(dir, KeyFile))
	if errors.Is(err, fs.ErrNotExist) {
		return ca, ca.make()
	}
	if err != nil {
		return nil, fault.Wrap(err, "private_ca", "read the private CA's key")
	}
	defer clear(keyText)
	text, err := os.ReadFile(filepath.Join(dir, CertFile))
	if err != nil {
		return nil, fault.Wrap(err, "private_ca", "read the private CA's certificate")
	}
	is, err := parse(text, keyText)
	if err != nil {
		return nil, fault.Wrap(err, "private_ca", "the private CA in %s", dir).WithFix("remove %s and %s to make a new CA, and trust that", CertFile, KeyFile)
	}
	ca.is.Store(is)
	for _, d := range domains {
		if err := ca.Admits(d); err != nil {
			return nil, err
		}
	}
	return ca, nil
}

// parse reads a CA. Code private_ca: one of the texts is no certificate or key, or they do
// not belong together.
func parse(cert, key []byte) (*authority, error) {
	k, err := certificate.KeyFromPEM(key)
	if err != nil {
		return nil, fault.Wrap(err, "private_ca", "the key")
	}
	c, err := certificate.Parse(cert)
	if err != nil {
		return nil, fault.Wrap(err, "private_ca", "the certificate")
	}
	if public, ok := k.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(c.PublicKey) || !c.IsCA {
		return nil, fault.New("private_ca", "the certificate is no CA's, or another key's")
	}
	return &authority{c, k}, nil
}

// Export returns the authority for another gateway of the same domains: two PEM texts, of
// which the key is secret.
func (ca *CA) Export() (cert, key []byte, err error) {
	is := ca.is.Load()
	pkcs8, err := x509.MarshalPKCS8PrivateKey(is.key)
	if err != nil {
		return nil, nil, err
	}
	defer clear(pkcs8)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: is.cert.Raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}

// Adopt makes this the authority that another exported, for good; with an error nothing
// changes. Codes private_ca, private_ca_domains.
func (ca *CA) Adopt(cert, key []byte) error {
	is, err := parse(cert, key)
	if err != nil {
		return err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	for _, d := range ca.domains {
		if err := is.admits(d); err != nil {
			return err
		}
	}
	if bytes.Equal(is.cert.Raw, ca.is.Load().cert.Raw) {
		return nil
	}
	if err := ca.write(cert, key); err != nil {
		return err
	}
	ca.is.Store(is)
	ca.leaf = nil
	return nil
}

// write keeps the authority. The key is last: without it there is no CA yet.
func (ca *CA) write(cert, key []byte) error {
	if err := durable.WriteFile(filepath.Join(ca.dir, CertFile), cert, 0o644); err != nil {
		return fault.Wrap(err, "private_ca", "keep the private CA in %s", ca.dir)
	}
	if err := durable.WriteFile(filepath.Join(ca.dir, KeyFile), key, 0o600); err != nil {
		return fault.Wrap(err, "private_ca", "keep the private CA in %s", ca.dir)
	}
	return nil
}

// Admits says why the authority cannot certify a base domain: its own certificate, which
// clients have, is not for it. Code private_ca_domains.
func (ca *CA) Admits(d hostname.Name) error { return ca.is.Load().admits(d) }

func (is *authority) admits(d hostname.Name) error {
	for n := d; n != ""; _, n = n.Split() {
		if slices.Contains(is.cert.PermittedDNSDomains, string(n)) {
			return nil
		}
	}
	return fault.New("private_ca_domains", "the private CA is for %v, not for %s", is.cert.PermittedDNSDomains, d).
		WithFix("name the domain in core.domains, and remove %s and %s to make one for the new domains", KeyFile, CertFile)
}

// SetDomains makes these the base domains that are certified; with an error nothing
// changes. Code private_ca_domains.
func (ca *CA) SetDomains(domains []hostname.Name) error {
	for _, d := range domains {
		if err := ca.Admits(d); err != nil {
			return err
		}
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if !slices.Equal(ca.domains, domains) {
		ca.domains, ca.leaf = slices.Clone(domains), nil
	}
	return nil
}

func (ca *CA) make() error {
	fail := func(err error) error { return fault.Wrap(err, "private_ca", "make a private CA in %s", ca.dir) }
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fail(err)
	}
	now := ca.now()
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "dstack private CA of " + string(ca.domains[0])},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(caLife), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, PermittedDNSDomainsCritical: true,
	}
	for _, d := range ca.domains {
		t.PermittedDNSDomains = append(t.PermittedDNSDomains, string(d))
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return fail(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fail(err)
	}
	ca.is.Store(&authority{cert, key})
	certText, keyText, err := ca.Export()
	if err != nil {
		return fail(err)
	}
	defer clear(keyText)
	return ca.write(certText, keyText)
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

// issue signs a leaf for a key.
func (ca *CA) issue(public crypto.PublicKey, names []string) (*x509.Certificate, error) {
	now := ca.now()
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{}, DNSNames: names, NotBefore: now.Add(-backdate), NotAfter: now.Add(leafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	is := ca.is.Load()
	der, err := x509.CreateCertificate(rand.Reader, t, is.cert, public, is.key)
	if err != nil {
		return nil, fault.Wrap(err, "private_ca", "sign a certificate")
	}
	return x509.ParseCertificate(der)
}

// Sign implements gateway.Certificates: the request's key, and these names. Code
// private_ca_domains: a name that is not under the base domains.
func (ca *CA) Sign(_ context.Context, csr *x509.CertificateRequest, names []hostname.Name) (chain []byte, notAfter, renewAt time.Time, err error) {
	ca.mu.Lock()
	domains := ca.domains
	ca.mu.Unlock()
	var list []string
	for _, n := range names {
		if _, parent := n.Split(); !slices.Contains(domains, parent) {
			return nil, time.Time{}, time.Time{}, fault.New("private_ca_domains", "%s is not under %v", n, domains)
		}
		list = append(list, string(n))
	}
	leaf, err := ca.issue(csr.PublicKey, list)
	if err != nil {
		return nil, time.Time{}, time.Time{}, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}), leaf.NotAfter, renewal(leaf), nil
}

// renewal is two thirds into the life of a certificate.
func renewal(c *x509.Certificate) time.Time {
	return c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3)
}

// GetCertificate has the certificate of the base domains and of every name one level under
// them, made anew when two thirds of its life are over.
func (ca *CA) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.leaf != nil && ca.now().Before(renewal(ca.leaf.Leaf)) {
		return ca.leaf, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, d := range ca.domains {
		names = append(names, "*."+string(d), string(d))
	}
	leaf, err := ca.issue(key.Public(), names)
	if err != nil {
		return nil, err
	}
	ca.leaf = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	return ca.leaf, nil
}
