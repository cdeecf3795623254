// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"io"
	"math/big"
	"os"
	"slices"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

// localMark begins the common name of every private CA, so that nobody takes it for a
// public one.
const localMark = "dstack private CA"

// Lifetimes under a private CA.
const (
	localLife  = 7 * 24 * time.Hour
	localSkew  = 5 * time.Minute
	localYears = 5
)

// Local is a private CA of this gateway, for development and private installations: browsers
// trust it only where somebody installed its certificate. It is limited to the domains in
// its name constraints, so that installing it gives no power over others.
type Local struct {
	cert *x509.Certificate
	pem  []byte
	key  crypto.Signer
}

// NewLocal makes a private CA for the given base domains and returns it with its certificate
// and key in PEM, for the caller to keep; the key is secret. Code local_ca.
func NewLocal(bases []hostname.Name) (ca *Local, certPEM, keyPEM []byte, err error) {
	if len(bases) == 0 {
		return nil, nil, nil, fault.New("local_ca", "a private CA is limited to base domains, and none is named")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: localMark + " " + hex.EncodeToString(serial.Bytes()[:4])},
		NotBefore: now.Add(-localSkew), NotAfter: now.AddDate(localYears, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtKeyUsage:                 []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		PermittedDNSDomainsCritical: true,
	}
	for _, base := range bases {
		name, err := hostname.ParseBase(string(base))
		if err != nil {
			return nil, nil, nil, fault.Wrap(err, "local_ca", "the domain of a private CA")
		}
		template.PermittedDNSDomains = append(template.PermittedDNSDomains, string(name))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, nil, err
	}
	certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	clear(pkcs8)
	ca, err = ParseLocal(certPEM, keyPEM)
	return ca, certPEM, keyPEM, err
}

// OpenLocal reads a private CA from its files. The key file must be nobody else's to read.
// Code local_ca.
func OpenLocal(certFile, keyFile string) (*Local, error) {
	certPEM, err := readBounded(certFile)
	if err != nil {
		return nil, fault.Wrap(err, "local_ca", "the certificate of the private CA")
	}
	info, err := os.Stat(keyFile)
	if err != nil {
		return nil, fault.Wrap(err, "local_ca", "the key of the private CA")
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fault.New("local_ca", "the key of the private CA, %s, can be read by others", keyFile).WithFix("chmod 600 %s", keyFile)
	}
	keyPEM, err := readBounded(keyFile)
	if err != nil {
		return nil, fault.Wrap(err, "local_ca", "the key of the private CA")
	}
	defer clear(keyPEM)
	return ParseLocal(certPEM, keyPEM)
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxChain))
}

// ParseLocal reads a private CA: its certificate must be a CA's, be valid, be limited to
// domains, say that it is private, and have the key. Code local_ca.
func ParseLocal(certPEM, keyPEM []byte) (*Local, error) {
	chain, err := parseChain(certPEM)
	if err != nil || len(chain) != 1 {
		return nil, fault.New("local_ca", "the file of the private CA does not hold one certificate")
	}
	cert := chain[0]
	block, _ := pem.Decode(keyPEM)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fault.New("local_ca", "the key of the private CA is not PKCS #8 in PEM")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	clear(block.Bytes)
	if err != nil {
		return nil, fault.New("local_ca", "the key of the private CA does not parse")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fault.New("local_ca", "the private CA's key is not that of its certificate")
	}
	switch now := time.Now(); {
	case !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, fault.New("local_ca", "the certificate of the private CA is none of a CA")
	case now.Before(cert.NotBefore) || now.After(cert.NotAfter):
		return nil, fault.New("local_ca", "the certificate of the private CA is not valid now").WithFix("make a new one")
	case len(cert.PermittedDNSDomains) == 0 || !cert.PermittedDNSDomainsCritical:
		return nil, fault.New("local_ca", "the certificate of the private CA is not limited to domains").
			WithFix("make one with critical name constraints that permit the base domains alone")
	case !bytes.HasPrefix([]byte(cert.Subject.CommonName), []byte(localMark)):
		return nil, fault.New("local_ca", "the common name of the private CA does not begin with %q", localMark)
	}
	return &Local{cert: cert, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), key: key}, nil
}

// Certificate is the CA's certificate in PEM, for those who want to trust it.
func (l *Local) Certificate() []byte { return slices.Clone(l.pem) }

// localIssuer signs with the private CA.
type localIssuer struct {
	m  *Manager
	ca *Local
}

// IssuerKey names the CA by its key, so that certificates of another one are replaced.
func (i *localIssuer) IssuerKey() string {
	sum := sha256.Sum256(i.ca.cert.RawSubjectPublicKeyInfo)
	return "private-ca-" + hex.EncodeToString(sum[:8])
}

// Issue signs the names of a request that the CA is limited to. Codes local_ca, acme_attest.
func (i *localIssuer) Issue(ctx context.Context, csr *x509.CertificateRequest) (*certmagic.IssuedCertificate, error) {
	if err := csr.CheckSignature(); err != nil {
		return nil, fault.Wrap(err, "csr_signature", "the CSR is not signed by its key")
	}
	if err := i.m.attestKey(ctx, csr); err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	end := now.Add(localLife)
	if end.After(i.ca.cert.NotAfter) {
		end = i.ca.cert.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber: serial, DNSNames: csr.DNSNames,
		NotBefore: now.Add(-localSkew), NotAfter: end,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.ca.cert, csr.PublicKey, i.ca.key)
	if err != nil {
		return nil, err
	}
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), i.ca.pem...)
	leaf, err := checkIssued(chain, csr)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(i.ca.cert)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots}); err != nil {
		return nil, fault.Wrap(err, "local_ca", "the private CA is not one for these names")
	}
	if err := i.m.certified(ctx, leaf); err != nil {
		return nil, err
	}
	return &certmagic.IssuedCertificate{Certificate: chain}, nil
}

func (i *localIssuer) renewAt(_ context.Context, leaf *x509.Certificate) time.Time {
	return twoThirds(leaf)
}

// newSerial is a positive number of 127 random bits (RFC 5280 §4.1.2.2).
func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b), nil
}
