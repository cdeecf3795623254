// SPDX-License-Identifier: Apache-2.0

// Package sevsnptest is a SEV-SNP platform for tests: a PKI of its own in the
// shape of AMD's, reports of the exact shape of real ones, and collateral to verify
// them with. Every part can be changed before it is signed, so that a test can
// attack one check and be sure that every signature around it still holds.
//
// It is for tests only; what it makes is accepted under [Platform.Roots] alone.
package sevsnptest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/sevsnp"
	"github.com/dstack-go/dstack/collateral"
)

// Issued and NextUpdate bound the revocation list; At is the time to verify at.
var (
	Issued     = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	At         = time.Date(2026, 1, 15, 0, 0, 0, 0, time.UTC)
	NextUpdate = time.Date(2026, 1, 31, 0, 0, 0, 0, time.UTC)
)

// SignedSize is how many bytes of a report the signature covers.
const SignedSize = 0x2a0

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

// Platform is one machine and the vendor behind it. Change what you like, then
// ask for Evidence and Collateral.
type Platform struct {
	Product string    // Milan, Genoa or Turin
	Root    Authority // ARK
	ASK     Authority
	ASVK    Authority
	VEK     Authority // signs reports: a VCEK, or a VLEK after UseVLEK
	CRL     CRL
	ChipID  [64]byte
	TCB     uint64

	t testing.TB
}

// Keys of 4096 bits take seconds to make, so a process makes each once. That two
// platforms share them changes nothing: each has certificates of its own.
var (
	arkKey     = sync.OnceValue(newRSA)
	askKey     = sync.OnceValue(newRSA)
	asvkKey    = sync.OnceValue(newRSA)
	foreignKey = sync.OnceValue(newRSA)
)

func newRSA() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 4096)
	if err != nil {
		panic("sevsnptest: " + err.Error())
	}
	return key
}

// ForeignKey returns an RSA key that no platform's certificates name.
func ForeignKey() crypto.Signer { return foreignKey() }

// New returns a platform of a product line whose reports verify as UpToDate.
func New(t testing.TB, product string) *Platform {
	t.Helper()
	p := &Platform{t: t, Product: product}
	ca := func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid = true, true
		c.KeyUsage = x509.KeyUsageCertSign
	}
	p.Root = p.Issue(Authority{}, arkKey(), "ARK-"+product, func(c *x509.Certificate) {
		ca(c)
		c.KeyUsage |= x509.KeyUsageCRLSign
	})
	p.ASK = p.Issue(p.Root, askKey(), "SEV-"+product, ca)
	p.ASVK = p.Issue(p.Root, asvkKey(), "SEV-VLEK-"+product, ca)
	for i := range p.ChipID {
		if product != sevsnp.Turin || i < 8 {
			p.ChipID[i] = byte(0xc0 + i)
		}
	}
	p.TCB = 0x4816000000000004 // microcode 72, SNP 22, boot loader 4
	if product == sevsnp.Turin {
		p.TCB = 0x5200000004010101 // microcode 82, SNP 4, TEE, boot loader and FMC 1
	}
	p.VEK = p.IssueVEK(p.ASK, "SEV-VCEK", p.Extensions(false), nil)
	p.CRL = CRL{Issuer: p.Root, ThisUpdate: Issued, NextUpdate: NextUpdate}
	return p
}

// UseVLEK makes a cloud provider's key sign the reports.
func (p *Platform) UseVLEK() {
	p.VEK = p.IssueVEK(p.ASVK, "SEV-VLEK", p.Extensions(true), nil)
}

// Extensions are AMD's certificate extensions by the end of their OID below
// 1.3.6.1.4.1.3704.1, in DER.
type Extensions map[string][]byte

// DER returns the DER form of a number or a text (as IA5String).
func DER(v any) []byte {
	params := ""
	if _, ok := v.(string); ok {
		params = "ia5"
	}
	der, err := asn1.MarshalWithParams(v, params)
	if err != nil {
		panic("sevsnptest: " + err.Error())
	}
	return der
}

// Extensions returns what AMD certifies of this machine.
func (p *Platform) Extensions(vlek bool) Extensions {
	parts := sevsnp.Parts(p.Product, p.TCB)
	ext := Extensions{
		"1": DER(0), "2": DER(p.Product + "-B1"),
		"3.1": DER(int(parts.Bootloader)), "3.2": DER(int(parts.TEE)), "3.3": DER(int(parts.SNP)),
		"3.4": DER(0), "3.5": DER(0), "3.6": DER(0), "3.7": DER(0),
		"3.8": DER(int(parts.Microcode)), "4": p.ChipID[:],
	}
	if p.Product == sevsnp.Turin {
		ext["1"], ext["3.9"], ext["4"] = DER(1), DER(int(parts.FMC)), p.ChipID[:8]
		delete(ext, "3.4")
	}
	if vlek {
		ext["2"], ext["5"] = DER(p.Product), DER("cloud.example")
		delete(ext, "4")
	}
	return ext
}

// IssueVEK makes a VCEK or VLEK certificate with a new key. Edit may change the
// template.
func (p *Platform) IssueVEK(issuer Authority, cn string, ext Extensions, edit func(*x509.Certificate)) Authority {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p.check(err)
	return p.Issue(issuer, key, cn, func(c *x509.Certificate) {
		c.SerialNumber, c.CRLDistributionPoints = big.NewInt(0), nil
		for suffix, value := range ext {
			oid := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}
			for n := range strings.SplitSeq(suffix, ".") {
				v, err := strconv.Atoi(n)
				p.check(err)
				oid = append(oid, v)
			}
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid, Value: value})
		}
		if edit != nil {
			edit(c)
		}
	})
}

// Issue makes a certificate, self-signed when the parent is empty. Edit may
// change the template.
func (p *Platform) Issue(parent Authority, key crypto.Signer, cn string, edit func(*x509.Certificate)) Authority {
	p.t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 64))
	p.check(err)
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject: pkix.Name{
			OrganizationalUnit: []string{"Engineering"}, Country: []string{"US"}, Locality: []string{"Santa Clara"},
			Province: []string{"CA"}, Organization: []string{"Advanced Micro Devices"}, CommonName: cn,
		},
		NotBefore:             Issued.AddDate(-1, 0, 0),
		NotAfter:              Issued.AddDate(7, 0, 0),
		SignatureAlgorithm:    x509.SHA384WithRSAPSS,
		CRLDistributionPoints: []string{"https://kdsintf.amd.com/vcek/v1/" + p.Product + "/crl"},
	}
	edit(template)
	if parent.Cert == nil {
		parent = Authority{key, template}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent.Cert, key.Public(), parent.Key)
	p.check(err)
	cert, err := x509.ParseCertificate(der)
	p.check(err)
	return Authority{key, cert}
}

// Report returns a report that verifies, unsigned; its values are recognisable
// patterns. Milan's has version 3, the others' 5.
func (p *Platform) Report() *sevsnp.Report {
	r := &sevsnp.Report{
		Version: 5, GuestSVN: 7, Policy: sevsnp.PolicySMT | sevsnp.PolicyReservedOne, Algorithm: 1,
		CurrentTCB: p.TCB, ReportedTCB: p.TCB, CommittedTCB: p.TCB, LaunchTCB: p.TCB,
		PlatformInfo: sevsnp.PlatformSMT | sevsnp.PlatformECC | sevsnp.PlatformAliasChecked,
		ChipID:       p.ChipID,
		Current:      sevsnp.Firmware{Build: 29, Minor: 55, Major: 1},
		Committed:    sevsnp.Firmware{Build: 29, Minor: 55, Major: 1},
	}
	switch p.Product {
	case sevsnp.Milan:
		r.Version, r.CPUID = 3, [3]byte{0x19, 0x01, 0x01}
	case sevsnp.Genoa:
		r.CPUID = [3]byte{0x19, 0x11, 0x01}
	case sevsnp.Turin:
		r.CPUID = [3]byte{0x1a, 0x02, 0x01}
	}
	if p.VEK.Cert.Subject.CommonName == "SEV-VLEK" {
		r.KeyInfo = 1 << 2
	}
	for i := range r.Measurement {
		r.Measurement[i] = 0xd0
	}
	for i := range r.HostData {
		r.HostData[i] = 0x5e
	}
	for i := range r.ReportIDMA {
		r.ReportIDMA[i] = 0xff // no migration agent
	}
	copy(r.ReportID[:], "the report id of this machine...")
	copy(r.ReportData[:], "sevsnptest")
	return r
}

// Sign puts a signature of the platform's key into a report's bytes.
func (p *Platform) Sign(report []byte) []byte {
	p.t.Helper()
	out := slices.Clone(report)
	digest := sha512.Sum384(out[:SignedSize])
	r, s, err := ecdsa.Sign(rand.Reader, p.VEK.Key.(*ecdsa.PrivateKey), digest[:])
	p.check(err)
	for i, n := range []*big.Int{r, s} {
		b := n.FillBytes(make([]byte, 72))
		slices.Reverse(b)
		copy(out[SignedSize+72*i:], b)
	}
	return out
}

// Evidence returns a report, signed, with its chain in PEM.
func (p *Platform) Evidence(r *sevsnp.Report) *attest.Evidence {
	issuer := p.ASK
	if p.VEK.Cert.Subject.CommonName == "SEV-VLEK" {
		issuer = p.ASVK
	}
	return &attest.Evidence{
		TEE: dstack.SEVSNP, Quote: p.Sign(r.Marshal()),
		CertChain: [][]byte{PEM(issuer.Cert), PEM(p.VEK.Cert)},
	}
}

// Collateral returns the vendor's revocation list.
func (p *Platform) Collateral() *collateral.Bundle {
	return &collateral.Bundle{CRLs: []collateral.Hex{p.MarshalCRL(p.CRL)}}
}

// Input returns all that verifies a report.
func (p *Platform) Input(r *sevsnp.Report) attest.Input {
	return attest.Input{Evidence: p.Evidence(r), Collateral: p.Collateral(), Roots: []attest.Roots{p.Roots()}, At: At}
}

// Roots returns the platform's root, of development trust.
func (p *Platform) Roots() attest.Roots {
	return attest.Roots{TEE: dstack.SEVSNP, CA: []*x509.Certificate{p.Root.Cert}, Trust: dstack.TrustDevelopment}
}

// DevRoots returns root and collateral as a development roots file holds them.
func (p *Platform) DevRoots() *collateral.DevRoots {
	col := p.Collateral()
	for _, a := range []Authority{p.ASK, p.ASVK, p.VEK} {
		col.Certificates = append(col.Certificates, a.Cert.Raw)
	}
	return &collateral.DevRoots{
		Version: 1, Name: "sevsnptest", SNPRootPEM: string(PEM(p.Root.Cert)),
		Certificates: col.Certificates, CRLs: col.CRLs,
	}
}

// PEM returns a certificate in PEM.
func PEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// Table returns a certificate table of the GHCB specification with VCEK, ASK and
// ARK, and an entry of another kind; each certificate is padded with zeros.
func (p *Platform) Table() []byte {
	entries := []struct {
		guid    string
		content []byte
	}{
		{"\x63\xda\x75\x8d\xe6\x64\x45\x64\xad\xc5\xf4\xb9\x3b\xe8\xac\xcd", p.VEK.Cert.Raw},
		{"\xec\xae\x0c\x0f\x95\x02\x43\xb1\xaf\xa2\x0a\xe2\xe0\xd5\x65\xb6", []byte("something else")},
		{"\x4a\xb7\xb3\x79\xbb\xac\x4f\xe4\xa0\x2f\x05\xae\xf3\x27\xc7\x82", p.ASK.Cert.Raw},
		{"\xc0\xb4\x06\xa4\xa8\x03\x49\x52\x97\x43\x3f\xb6\x01\x4c\xd0\xae", p.Root.Cert.Raw},
	}
	table := make([]byte, 24*(len(entries)+1))
	for i, e := range entries {
		content := append(slices.Clone(e.content), make([]byte, 16)...)
		copy(table[24*i:], e.guid)
		binary.LittleEndian.PutUint32(table[24*i+16:], uint32(len(table)))
		binary.LittleEndian.PutUint32(table[24*i+20:], uint32(len(content)))
		table = append(table, content...)
	}
	return table
}

// MarshalCRL signs a revocation list.
func (p *Platform) MarshalCRL(c CRL) []byte {
	p.t.Helper()
	template := &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: c.ThisUpdate, NextUpdate: c.NextUpdate,
		SignatureAlgorithm: x509.SHA384WithRSAPSS, ExtraExtensions: c.Extensions,
	}
	for _, serial := range c.Revoked {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: serial, RevocationTime: c.ThisUpdate})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, c.Issuer.Cert, c.Issuer.Key)
	p.check(err)
	return der
}

// For returns the same platform for another test.
func (p *Platform) For(t testing.TB) *Platform {
	c := *p
	c.t = t
	return &c
}

// TB returns the test that the platform belongs to.
func (p *Platform) TB() testing.TB { return p.t }

func (p *Platform) check(err error) {
	if err != nil {
		p.t.Helper()
		p.t.Fatalf("sevsnptest: %v", err)
	}
}
