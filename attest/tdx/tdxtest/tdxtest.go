// SPDX-License-Identifier: Apache-2.0

// Package tdxtest is a TDX platform for tests: a PKI of its own, quotes of the
// exact shape of real ones, and collateral to verify them with. Every part can
// be changed before it is signed, so that a test can attack one check and be
// sure that every signature around it still holds.
//
// It is for tests only; what it makes is accepted under [Platform.Roots] alone.
package tdxtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"maps"
	"math/big"
	"slices"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/collateral"
)

// Issued and NextUpdate bound all collateral; At is the time to verify at.
var (
	Issued     = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	At         = time.Date(2026, 1, 15, 0, 0, 0, 0, time.UTC)
	NextUpdate = time.Date(2026, 1, 31, 0, 0, 0, 0, time.UTC)
)

// RootCRLURL is where the root certificate says its CRL is.
const RootCRLURL = "https://tdxtest.invalid/root.crl"

// Authority is a certificate and its key.
type Authority struct {
	Key  *ecdsa.PrivateKey
	Cert *x509.Certificate
}

// JSON is a document that can be changed before it is signed.
type JSON = map[string]any

// CRL describes a revocation list.
type CRL struct {
	Issuer     Authority
	Revoked    []*big.Int
	ThisUpdate time.Time
	NextUpdate time.Time
	Extensions []pkix.Extension
}

// Platform is one machine and the vendor behind it. Change what you like, then
// ask for Quote and Collateral.
type Platform struct {
	Root      Authority
	PCKCA     Authority // issues the PCK certificate
	PCK       Authority
	TCBSigner Authority
	QESigner  Authority // signs the QE identity; the same as TCBSigner at first

	AttestationKey *ecdsa.PrivateKey
	// AttestationPoint stands in the quote for the public attestation key, x ‖ y,
	// when it is not nil; the QE report commits to it.
	AttestationPoint []byte
	Header           tdx.Header
	QEReport         [tdx.QEReportSize]byte // report data are filled in when a quote is made
	QEAuth           []byte
	CertType         uint16 // of the PCK certification data
	CertData         []byte // nil for the PCK chain in PEM
	// KeepReportData leaves the QE report's report data as they are in QEReport.
	KeepReportData bool

	TCBInfo    JSON
	QEIdentity JSON
	RootCRL    CRL
	PCKCRL     CRL

	t testing.TB
}

// Extension is what New's PCK certificate certifies.
func Extension() tdx.PCKExtension {
	return tdx.PCKExtension{
		PPID:       [16]byte{0xaa, 1, 2, 3},
		Components: [16]uint8{3, 3, 2, 2, 4, 1, 0, 5},
		PCESVN:     13,
		CPUSVN:     [16]byte{3, 3, 2, 2, 4, 1, 0, 5},
		FMSPC:      [6]byte{0x90, 0xc0, 0x6f},
	}
}

// New returns a platform that verifies as UpToDate.
func New(t testing.TB) *Platform {
	t.Helper()
	p := &Platform{t: t, CertType: tdx.CertTypePCKChain}
	p.Root = p.Issue(Authority{}, tdx.CNRoot, func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.MaxPathLen = true, true, 1
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	})
	p.PCKCA = p.IssueCA(p.Root, tdx.CNPlatformCA)
	p.PCK = p.IssuePCK(p.PCKCA, Extension(), nil)
	p.TCBSigner = p.Issue(p.Root, tdx.CNTCBSigning, nil)
	p.QESigner = p.TCBSigner
	p.AttestationKey = p.newKey()
	p.Header = tdx.Header{Version: 4, AttestationKeyType: tdx.AttestationKeyECDSAP256, TEEType: tdx.TEETypeTDX, QEVendorID: tdx.IntelQEVendorID}
	p.QEAuth = make([]byte, tdx.QEAuthSize)
	for i := range p.QEAuth {
		p.QEAuth[i] = byte(i)
	}
	p.QEReport[tdx.QEOffAttributes] = 0x11
	p.QEReport[tdx.QEOffAttributes+8] = 0xe7 // XFRM, outside the mask
	for i := range 32 {
		p.QEReport[tdx.QEOffMRSigner+i] = 0xdc
	}
	binary.LittleEndian.PutUint16(p.QEReport[tdx.QEOffISVProdID:], 2)
	binary.LittleEndian.PutUint16(p.QEReport[tdx.QEOffISVSVN:], 4)

	p.TCBInfo = JSON{
		"id": "TDX", "version": 3, "issueDate": stamp(Issued), "nextUpdate": stamp(NextUpdate),
		"fmspc": "90C06F000000", "pceId": "0000", "tcbType": 0, "tcbEvaluationDataNumber": 18,
		"tdxModule": JSON{"mrsigner": zeros(48), "attributes": zeros(8), "attributesMask": "FFFFFFFFFFFFFFFF"},
		"tdxModuleIdentities": []any{
			p.Module("TDX_03", Level(3, tdx.UpToDate)),
			p.Module("TDX_01", Level(6, tdx.UpToDate), Level(4, tdx.OutOfDate, "INTEL-SA-00001")),
		},
		"tcbLevels": []any{
			PlatformLevel([16]uint8{3, 3, 2, 2, 4, 1, 0, 5}, 13, [16]uint8{5, 0, 3}, tdx.UpToDate),
			PlatformLevel([16]uint8{2, 2, 2, 2, 3, 1, 0, 5}, 5, [16]uint8{5, 0, 2}, tdx.OutOfDate, "INTEL-SA-00002"),
		},
	}
	p.QEIdentity = JSON{
		"id": "TD_QE", "version": 2, "issueDate": stamp(Issued), "nextUpdate": stamp(NextUpdate), "tcbEvaluationDataNumber": 18,
		"miscselect": "00000000", "miscselectMask": "FFFFFFFF",
		"attributes": "11000000000000000000000000000000", "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
		"mrsigner": hex.EncodeToString(p.QEReport[tdx.QEOffMRSigner : tdx.QEOffMRSigner+32]), "isvprodid": 2,
		"tcbLevels": []any{Level(4, tdx.UpToDate), Level(2, tdx.OutOfDate, "INTEL-SA-00003")},
	}
	p.RootCRL = CRL{Issuer: p.Root, ThisUpdate: Issued, NextUpdate: NextUpdate}
	p.PCKCRL = CRL{Issuer: p.PCKCA, ThisUpdate: Issued, NextUpdate: NextUpdate}
	return p
}

// Level is a TCB level of a module or quoting enclave.
func Level(isvsvn int, status string, advisories ...string) JSON {
	l := JSON{"tcb": JSON{"isvsvn": isvsvn}, "tcbDate": "2025-05-14T00:00:00Z", "tcbStatus": status}
	if len(advisories) > 0 {
		l["advisoryIDs"] = advisories
	}
	return l
}

// PlatformLevel is a TCB level of a platform.
func PlatformLevel(sgx [16]uint8, pcesvn int, td [16]uint8, status string, advisories ...string) JSON {
	list := func(v [16]uint8) (out []any) {
		for _, n := range v {
			out = append(out, JSON{"svn": n})
		}
		return out
	}
	l := Level(0, status, advisories...)
	l["tcb"] = JSON{"sgxtcbcomponents": list(sgx), "pcesvn": pcesvn, "tdxtcbcomponents": list(td)}
	return l
}

// Module is an identity of a TDX module signed by Intel.
func (p *Platform) Module(id string, levels ...JSON) JSON {
	var list []any
	for _, l := range levels {
		list = append(list, l)
	}
	return JSON{"id": id, "mrsigner": zeros(48), "attributes": zeros(8), "attributesMask": "FFFFFFFFFFFFFFFF", "tcbLevels": list}
}

// Body returns a TD report that verifies; its measurements are recognisable
// patterns.
func (p *Platform) Body() tdx.ReportBody {
	b := tdx.ReportBody{TEETCBSVN: [16]byte{6, 1, 3}}
	binary.LittleEndian.PutUint64(b.TDAttributes[:], tdx.AttrSEPTVEDisable)
	b.XFAM = [8]byte{0xe7, 0x02, 0x06}
	fill := func(m *dstack.Measurement, v byte) {
		for i := range m {
			m[i] = v
		}
	}
	fill(&b.MRTD, 0xd0)
	fill(&b.MRSEAM, 0x5e)
	for i := range b.RTMR {
		fill(&b.RTMR[i], 0xe0+byte(i))
	}
	return b
}

// Quote returns a quote over body, of the version that the header says: 4 with a
// TDX 1.0 body, 5 with the body's own size.
func (p *Platform) Quote(body tdx.ReportBody) []byte {
	p.t.Helper()
	h := p.Header
	signed := binary.LittleEndian.AppendUint16(nil, h.Version)
	signed = binary.LittleEndian.AppendUint16(signed, h.AttestationKeyType)
	signed = binary.LittleEndian.AppendUint32(signed, h.TEEType)
	signed = slices.Concat(signed, h.Reserved[:], h.QEVendorID[:], h.UserData[:])
	v10, v15 := body.MarshalV10(), body.MarshalV15()
	raw, kind := v10[:], uint16(tdx.BodyTypeTD10)
	if body.V15 {
		raw, kind = v15[:], tdx.BodyTypeTD15
	}
	if h.Version == 5 {
		signed = binary.LittleEndian.AppendUint16(signed, kind)
		signed = binary.LittleEndian.AppendUint32(signed, uint32(len(raw)))
	}
	signed = append(signed, raw...)

	point, err := p.AttestationKey.PublicKey.Bytes()
	p.check(err)
	key := point[1:]
	if p.AttestationPoint != nil {
		key = p.AttestationPoint
	}
	report := p.QEReport
	if !p.KeepReportData {
		sum := sha256.Sum256(slices.Concat(key, p.QEAuth))
		copy(report[tdx.QEOffReportData:], sum[:])
	}
	certData := p.CertData
	if certData == nil {
		certData = append([]byte(p.Chain(p.PCK, p.PCKCA, p.Root)), 0)
	}
	qe := slices.Concat(report[:], p.sign(p.PCK.Key, report[:]))
	qe = binary.LittleEndian.AppendUint16(qe, uint16(len(p.QEAuth)))
	qe = append(qe, p.QEAuth...)
	qe = binary.LittleEndian.AppendUint16(qe, p.CertType)
	qe = binary.LittleEndian.AppendUint32(qe, uint32(len(certData)))
	qe = append(qe, certData...)

	sig := slices.Concat(p.sign(p.AttestationKey, signed), key)
	sig = binary.LittleEndian.AppendUint16(sig, tdx.CertTypeQEReport)
	sig = binary.LittleEndian.AppendUint32(sig, uint32(len(qe)))
	sig = append(sig, qe...)
	return append(binary.LittleEndian.AppendUint32(signed, uint32(len(sig))), sig...)
}

// EnclaveQuote returns a version 3 quote over an SGX report body of 384 bytes.
func (p *Platform) EnclaveQuote(report []byte) []byte {
	p.t.Helper()
	signed := binary.LittleEndian.AppendUint16(nil, 3)
	signed = binary.LittleEndian.AppendUint16(signed, p.Header.AttestationKeyType)
	signed = slices.Concat(signed, make([]byte, 8), p.Header.QEVendorID[:], p.Header.UserData[:], report)
	point, err := p.AttestationKey.PublicKey.Bytes()
	p.check(err)
	key := point[1:]
	qeReport := p.QEReport
	if !p.KeepReportData {
		sum := sha256.Sum256(slices.Concat(key, p.QEAuth))
		copy(qeReport[tdx.QEOffReportData:], sum[:])
	}
	certData := []byte(p.Chain(p.PCK, p.PCKCA, p.Root))
	sig := slices.Concat(p.sign(p.AttestationKey, signed), key, qeReport[:], p.sign(p.PCK.Key, qeReport[:]))
	sig = append(binary.LittleEndian.AppendUint16(sig, uint16(len(p.QEAuth))), p.QEAuth...)
	sig = binary.LittleEndian.AppendUint16(sig, tdx.CertTypePCKChain)
	sig = append(binary.LittleEndian.AppendUint32(sig, uint32(len(certData))), certData...)
	return append(binary.LittleEndian.AppendUint32(signed, uint32(len(sig))), sig...)
}

// EnclaveReport returns an SGX report body of an enclave that verifies.
func EnclaveReport(mrEnclave [32]byte, data dstack.ReportData) []byte {
	report := make([]byte, tdx.QEReportSize)
	report[tdx.QEOffAttributes] = 5 // initialised, 64 bits
	copy(report[tdx.QEOffMREnclave:], mrEnclave[:])
	copy(report[tdx.QEOffReportData:], data[:])
	return report
}

// EnclaveCollateral returns the platform's collateral for enclaves' quotes: TCB info
// and QE identity with the ids, and without the fields, of SGX.
func (p *Platform) EnclaveCollateral() collateral.TDX {
	p.t.Helper()
	info, identity := p.TCBInfo, p.QEIdentity
	defer func() { p.TCBInfo, p.QEIdentity = info, identity }()
	p.QEIdentity = Edit(identity, "id", "QE")
	p.TCBInfo = Edit(Edit(Edit(info, "id", "SGX"), "tdxModule", nil), "tdxModuleIdentities", nil)
	var levels []any
	for _, l := range info["tcbLevels"].([]any) {
		levels = append(levels, Edit(l.(JSON), "tcb", Edit(l.(JSON)["tcb"].(JSON), "tdxtcbcomponents", nil)))
	}
	p.TCBInfo["tcbLevels"] = levels
	return p.Collateral()
}

// Collateral returns what a verifier needs to verify the platform's quotes.
func (p *Platform) Collateral() collateral.TDX {
	p.t.Helper()
	info, identity := p.marshal(p.TCBInfo), p.marshal(p.QEIdentity)
	return collateral.TDX{
		PCKCRLIssuerChain:     p.Chain(p.PCKCA, p.Root),
		RootCACRL:             p.crl(p.RootCRL),
		PCKCRL:                p.crl(p.PCKCRL),
		TCBInfoIssuerChain:    p.Chain(p.TCBSigner, p.Root),
		TCBInfo:               string(info),
		TCBInfoSignature:      p.sign(p.TCBSigner.Key, info),
		QEIdentityIssuerChain: p.Chain(p.QESigner, p.Root),
		QEIdentity:            string(identity),
		QEIdentitySignature:   p.sign(p.QESigner.Key, identity),
	}
}

// Roots returns the platform's root, of development trust.
func (p *Platform) Roots() attest.Roots {
	return attest.Roots{TEE: dstack.TDX, CA: []*x509.Certificate{p.Root.Cert}, Trust: dstack.TrustDevelopment}
}

// DevRoots returns root and collateral as a development roots file holds them.
func (p *Platform) DevRoots() *collateral.DevRoots {
	return &collateral.DevRoots{Version: 1, Name: "tdxtest", TDXRootPEM: p.Chain(p.Root), TDX: p.Collateral()}
}

// Chain returns certificates in PEM.
func (p *Platform) Chain(list ...Authority) string {
	var out []byte
	for _, a := range list {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Cert.Raw})...)
	}
	return string(out)
}

// Issue makes a certificate, self-signed when the parent is empty. Edit may
// change the template.
func (p *Platform) Issue(parent Authority, name string, edit func(*x509.Certificate)) Authority {
	p.t.Helper()
	key := p.newKey()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	p.check(err)
	point, err := key.PublicKey.Bytes()
	p.check(err)
	keyID := sha256.Sum256(point)
	template := &x509.Certificate{
		SerialNumber:          serial,
		SubjectKeyId:          keyID[:20],
		Subject:               pkix.Name{CommonName: name, Organization: []string{"Intel Corporation"}, Locality: []string{"Santa Clara"}, Province: []string{"CA"}, Country: []string{"US"}},
		NotBefore:             Issued.AddDate(-1, 0, 0),
		NotAfter:              Issued.AddDate(10, 0, 0),
		SignatureAlgorithm:    x509.ECDSAWithSHA256,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		CRLDistributionPoints: []string{RootCRLURL},
	}
	if edit != nil {
		edit(template)
	}
	if parent.Cert == nil {
		parent = Authority{key, template}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent.Cert, &key.PublicKey, parent.Key)
	p.check(err)
	cert, err := x509.ParseCertificate(der)
	p.check(err)
	return Authority{key, cert}
}

// IssueCA makes an intermediate that may issue leaves.
func (p *Platform) IssueCA(parent Authority, name string) Authority {
	return p.Issue(parent, name, func(c *x509.Certificate) {
		c.IsCA, c.MaxPathLenZero = true, true
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	})
}

// IssuePCK makes a PCK certificate with the SGX extension.
func (p *Platform) IssuePCK(parent Authority, ext tdx.PCKExtension, edit func(*x509.Certificate)) Authority {
	return p.Issue(parent, tdx.CNPCK, func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: tdx.OIDSGX, Value: p.MarshalExtension(ext)})
		if edit != nil {
			edit(c)
		}
	})
}

// MarshalExtension writes the SGX extension of a PCK certificate.
func (p *Platform) MarshalExtension(ext tdx.PCKExtension) []byte {
	type pair struct {
		ID    asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	value := func(v any) asn1.RawValue {
		der, err := asn1.Marshal(v)
		p.check(err)
		return asn1.RawValue{FullBytes: der}
	}
	var tcb []pair
	for i, svn := range ext.Components {
		tcb = append(tcb, pair{append(slices.Clone(tdx.OIDTCB), i+1), value(int(svn))})
	}
	tcb = append(tcb, pair{tdx.OIDPCESVN, value(int(ext.PCESVN))}, pair{tdx.OIDCPUSVN, value(ext.CPUSVN[:])})
	return value([]pair{
		{tdx.OIDPPID, value(ext.PPID[:])},
		{tdx.OIDTCB, value(tcb)},
		{tdx.OIDPCEID, value(ext.PCEID[:])},
		{tdx.OIDFMSPC, value(ext.FMSPC[:])},
		{tdx.OIDSGXType, value(asn1.Enumerated(0))},
	}).FullBytes
}

// Edit returns a copy of a document with one field changed, or without it when
// the value is nil.
func Edit(doc JSON, key string, value any) JSON {
	out := maps.Clone(doc)
	if value == nil {
		delete(out, key)
	} else {
		out[key] = value
	}
	return out
}

func (p *Platform) crl(c CRL) []byte {
	template := &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: c.ThisUpdate, NextUpdate: c.NextUpdate,
		SignatureAlgorithm: x509.ECDSAWithSHA256, ExtraExtensions: c.Extensions,
	}
	for _, serial := range c.Revoked {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: serial, RevocationTime: c.ThisUpdate})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, c.Issuer.Cert, c.Issuer.Key)
	p.check(err)
	return der
}

// Sign signs a message as the vendor signs its documents: r ‖ s, 32 bytes each,
// over SHA-256 of the message.
func (p *Platform) Sign(a Authority, message []byte) []byte { return p.sign(a.Key, message) }

// sign returns r ‖ s, 32 bytes each, over SHA-256 of message.
func (p *Platform) sign(key *ecdsa.PrivateKey, message []byte) []byte {
	digest := sha256.Sum256(message)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	p.check(err)
	return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
}

func (p *Platform) newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p.check(err)
	return key
}

func (p *Platform) marshal(doc JSON) []byte {
	out, err := json.Marshal(doc)
	p.check(err)
	return out
}

func (p *Platform) check(err error) {
	if err != nil {
		p.t.Helper()
		p.t.Fatalf("tdxtest: %v", err)
	}
}

func stamp(t time.Time) string { return t.Format(time.RFC3339) }
func zeros(n int) string       { return hex.EncodeToString(make([]byte, n)) }

// TB returns the test that the platform belongs to.
func (p *Platform) TB() testing.TB { return p.t }

// Verify is tdx.Verify of a bare quote.
func Verify(quote []byte, col collateral.TDX, roots []attest.Roots, at time.Time, opt ...attest.Options) (*attest.Claims, error) {
	in := attest.Input{Evidence: &attest.Evidence{TEE: dstack.TDX, Quote: quote}, Collateral: &collateral.Bundle{TDX: col}, Roots: roots, At: at}
	if len(opt) > 0 {
		in.Options = opt[0]
	}
	return tdx.Verify(in)
}
