// SPDX-License-Identifier: Apache-2.0

// Package tpmtest is a machine with a TPM for tests: an authority of its own that
// certifies the attestation key, registers that can be extended, and quotes of the
// exact shape of real ones. Every part can be changed before it is signed, so that a
// test can attack one check and be sure that every signature around it still holds.
//
// It is for tests only; what it makes is accepted under [Machine.Roots] alone.
package tpmtest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"math/big"
	"slices"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/collateral"
)

// Issued and NextUpdate bound all revocation lists; At is the time to verify at.
var (
	Issued     = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	At         = time.Date(2026, 1, 15, 0, 0, 0, 0, time.UTC)
	NextUpdate = time.Date(2026, 1, 31, 0, 0, 0, 0, time.UTC)
)

// OIDEKCertificate is the purpose that Google's authorities bear.
var OIDEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}

// Authority is a certificate and its key.
type Authority struct {
	Key  crypto.Signer
	Cert *x509.Certificate
}

// CRL describes a revocation list.
type CRL struct {
	Issuer     Authority
	Revoked    []*big.Int
	ThisUpdate time.Time
	NextUpdate time.Time
	Extensions []pkix.Extension
}

// Machine is a TPM and the authority behind it. Change what you like, then ask for
// Quote and Collateral.
type Machine struct {
	Root         Authority
	Intermediate Authority // issues the attestation key's certificate
	AK           Authority
	Scheme       uint16 // of signatures: tpm.AlgECDSA at first
	Hash         crypto.Hash

	Bank   eventlog.Bank // SHA-256 at first
	PCRs   [24][]byte    // nil counts as zero
	Events []attest.PCREvent

	CRLs         []CRL
	Certificates []Authority // of the collateral: the intermediate at first

	// EditAttest and EditMessage change what is about to be signed.
	EditAttest  func(*tpm.Attest)
	EditMessage func([]byte) []byte

	t testing.TB
}

// New returns a machine whose quotes verify.
func New(t testing.TB) *Machine {
	t.Helper()
	m := &Machine{t: t, Scheme: tpm.AlgECDSA, Hash: crypto.SHA256, Bank: eventlog.BankSHA256}
	m.Root = m.IssueCA(Authority{}, "Test TPM Root", nil)
	m.Intermediate = m.IssueCA(m.Root, "Test TPM Intermediate", nil)
	m.AK = m.Issue(m.Intermediate, m.P256(), "test attestation key", nil)
	m.Certificates = []Authority{m.Intermediate}
	m.CRLs = []CRL{
		{Issuer: m.Root, ThisUpdate: Issued, NextUpdate: NextUpdate},
		{Issuer: m.Intermediate, ThisUpdate: Issued, NextUpdate: NextUpdate},
	}
	return m
}

// UseRSA gives the machine a 2048-bit RSA attestation key and a scheme for it.
func (m *Machine) UseRSA(scheme uint16) {
	m.AK = m.Issue(m.Intermediate, m.RSA(2048), "test attestation key", nil)
	m.Scheme = scheme
}

// UseP384 gives the machine a P-384 attestation key that signs SHA-384.
func (m *Machine) UseP384() {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	m.check(err)
	m.AK = m.Issue(m.Intermediate, key, "test attestation key", nil)
	m.Hash = crypto.SHA384
}

// Register returns the value of a register.
func (m *Machine) Register(pcr uint32) []byte {
	if m.PCRs[pcr] == nil {
		return make([]byte, m.Bank.Size())
	}
	return m.PCRs[pcr]
}

// Extend extends a register by a digest and logs it.
func (m *Machine) Extend(pcr uint32, digest []byte) {
	m.PCRs[pcr] = m.Bank.Sum(slices.Concat(m.Register(pcr), digest))
	m.Events = append(m.Events, attest.PCREvent{Index: pcr, Digest: bytes.Clone(digest)})
}

// Measure extends a register by the digest of data.
func (m *Machine) Measure(pcr uint32, data string) { m.Extend(pcr, m.Bank.Sum([]byte(data))) }

// Attest returns what the TPM is about to sign: registers in ascending order.
func (m *Machine) Attest(extraData []byte, pcrs ...uint32) tpm.Attest {
	h := m.Hash.New()
	for _, i := range pcrs {
		h.Write(m.Register(i))
	}
	algorithm := tpm.AlgSHA256
	if m.Bank == eventlog.BankSHA384 {
		algorithm = tpm.AlgSHA384
	}
	name := sha256.Sum256([]byte("qualified name"))
	return tpm.Attest{
		QualifiedSigner: append([]byte{0, 0xB}, name[:]...),
		ExtraData:       extraData,
		Clock:           123456789, ResetCount: 7, RestartCount: 1, Safe: true,
		FirmwareVersion: 0x2016051100162800,
		Banks:           []tpm.Selection{{Hash: algorithm, PCRs: pcrs}},
		PCRDigest:       h.Sum(nil),
	}
}

// Quote returns a quote of the registers, which must be ascending, with the log's
// events of them.
func (m *Machine) Quote(extraData []byte, pcrs ...uint32) *attest.TPMQuote {
	m.t.Helper()
	a := m.Attest(extraData, pcrs...)
	if m.EditAttest != nil {
		m.EditAttest(&a)
	}
	message := MarshalAttest(a)
	if m.EditMessage != nil {
		message = m.EditMessage(message)
	}
	q := &attest.TPMQuote{Message: message, Signature: m.Sign(message), AKCert: m.AK.Cert.Raw, Platform: 1}
	for _, i := range pcrs {
		q.PCRs = append(q.PCRs, attest.PCR{Index: i, Algorithm: string(m.Bank), Value: m.Register(i)})
	}
	for _, e := range m.Events {
		if slices.Contains(pcrs, e.Index) {
			q.EventLog = append(q.EventLog, e)
		}
	}
	return q
}

// MarshalAttest writes a TPMS_ATTEST with PCR bitmaps of three bytes.
func MarshalAttest(a tpm.Attest) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0xff544347)
	b = binary.BigEndian.AppendUint16(b, 0x8018)
	b = appendSized(b, a.QualifiedSigner)
	b = appendSized(b, a.ExtraData)
	b = binary.BigEndian.AppendUint64(b, a.Clock)
	b = binary.BigEndian.AppendUint32(b, a.ResetCount)
	b = binary.BigEndian.AppendUint32(b, a.RestartCount)
	safe := byte(0)
	if a.Safe {
		safe = 1
	}
	b = append(b, safe)
	b = binary.BigEndian.AppendUint64(b, a.FirmwareVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(len(a.Banks)))
	for _, s := range a.Banks {
		b = binary.BigEndian.AppendUint16(b, s.Hash)
		var bitmap [3]byte
		for _, i := range s.PCRs {
			bitmap[i/8] |= 1 << (i % 8)
		}
		b = append(append(b, byte(len(bitmap))), bitmap[:]...)
	}
	return appendSized(b, a.PCRDigest)
}

// Sign returns a TPMT_SIGNATURE of the attestation key over a message.
func (m *Machine) Sign(message []byte) []byte {
	m.t.Helper()
	h := m.Hash.New()
	h.Write(message)
	digest := h.Sum(nil)
	b := binary.BigEndian.AppendUint16(nil, m.Scheme)
	b = binary.BigEndian.AppendUint16(b, map[crypto.Hash]uint16{crypto.SHA1: tpm.AlgSHA1, crypto.SHA256: tpm.AlgSHA256, crypto.SHA384: tpm.AlgSHA384}[m.Hash])
	switch key := m.AK.Key.(type) {
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, key, digest)
		m.check(err)
		return appendSized(appendSized(b, r.Bytes()), s.Bytes())
	case *rsa.PrivateKey:
		var opts crypto.SignerOpts = m.Hash
		if m.Scheme == tpm.AlgRSAPSS {
			opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: m.Hash}
		}
		sig, err := key.Sign(rand.Reader, digest, opts)
		m.check(err)
		return appendSized(b, sig)
	}
	m.t.Fatalf("tpmtest: no signature by a %T", m.AK.Key)
	return nil
}

// Collateral returns what a verifier needs to verify the machine's quotes.
func (m *Machine) Collateral() *collateral.Bundle {
	m.t.Helper()
	b := &collateral.Bundle{}
	for _, a := range m.Certificates {
		b.Certificates = append(b.Certificates, a.Cert.Raw)
	}
	for _, c := range m.CRLs {
		b.CRLs = append(b.CRLs, m.MarshalCRL(c))
	}
	return b
}

// Roots returns the machine's root, of development trust.
func (m *Machine) Roots() attest.Roots {
	return attest.Roots{TEE: dstack.TPM, CA: []*x509.Certificate{m.Root.Cert}, Trust: dstack.TrustDevelopment}
}

// Input returns a quote with all that its verification takes.
func (m *Machine) Input(q *attest.TPMQuote) attest.Input {
	return attest.Input{
		Evidence:   &attest.Evidence{TEE: dstack.TPM, TPMQuote: q},
		Collateral: m.Collateral(), Roots: []attest.Roots{m.Roots()}, At: At,
	}
}

// DevRoots returns root and collateral as a development roots file holds them.
func (m *Machine) DevRoots() *collateral.DevRoots {
	col := m.Collateral()
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Root.Cert.Raw})
	return &collateral.DevRoots{Version: 1, Name: "tpmtest", TPMRootPEM: string(root), Certificates: col.Certificates, CRLs: col.CRLs}
}

// P256 returns a new key.
func (m *Machine) P256() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	m.check(err)
	return key
}

// RSA returns a new key.
func (m *Machine) RSA(bits int) *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	m.check(err)
	return key
}

// Issue makes a certificate over a key, self-signed when the parent is empty. Edit
// may change the template.
func (m *Machine) Issue(parent Authority, key crypto.Signer, name string, edit func(*x509.Certificate)) Authority {
	m.t.Helper()
	return Authority{Key: key, Cert: m.Certify(parent, key.Public(), name, edit)}
}

// Certify makes a certificate over a public key, such as one inside a TPM.
func (m *Machine) Certify(parent Authority, key crypto.PublicKey, name string, edit func(*x509.Certificate)) *x509.Certificate {
	m.t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	m.check(err)
	spki, err := x509.MarshalPKIXPublicKey(key)
	m.check(err)
	keyID := sha256.Sum256(spki)
	template := &x509.Certificate{
		SerialNumber: serial, SubjectKeyId: keyID[:20],
		Subject:   pkix.Name{CommonName: name},
		NotBefore: Issued.AddDate(-1, 0, 0), NotAfter: Issued.AddDate(10, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
	}
	if edit != nil {
		edit(template)
	}
	if parent.Cert == nil {
		parent.Cert = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent.Cert, key, parent.Key)
	m.check(err)
	cert, err := x509.ParseCertificate(der)
	m.check(err)
	return cert
}

// IssueCA makes an authority with the purpose that Google's have. An empty parent
// makes a root.
func (m *Machine) IssueCA(parent Authority, name string, edit func(*x509.Certificate)) Authority {
	m.t.Helper()
	key := m.P256()
	if parent.Cert == nil {
		parent.Key = key
	}
	return m.Issue(parent, key, name, func(c *x509.Certificate) {
		c.IsCA = true
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
		c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{OIDEKCertificate}
		if edit != nil {
			edit(c)
		}
	})
}

// MarshalCRL signs a revocation list.
func (m *Machine) MarshalCRL(c CRL) []byte {
	m.t.Helper()
	template := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: c.ThisUpdate, NextUpdate: c.NextUpdate, ExtraExtensions: c.Extensions}
	for _, serial := range c.Revoked {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: serial, RevocationTime: c.ThisUpdate})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, c.Issuer.Cert, c.Issuer.Key)
	m.check(err)
	return der
}

// TB returns the test that the machine belongs to.
func (m *Machine) TB() testing.TB { return m.t }

func (m *Machine) check(err error) {
	if err != nil {
		m.t.Helper()
		m.t.Fatalf("tpmtest: %v", err)
	}
}

func appendSized(b, data []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(data))), data...)
}
