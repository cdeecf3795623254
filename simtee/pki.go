// SPDX-License-Identifier: Apache-2.0

package simtee

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"time"

	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/collateral"
)

// Organization is in the subject of every certificate of a test PKI. Common names
// must be Intel's, since verifiers look for them; this is what tells them apart.
const Organization = "dstack simulated TEE, development only, not Intel"

// rootCRLURL is where the root certificate says its CRL is. The name cannot
// resolve (RFC 6761): collateral of a test PKI comes from its dev-roots file.
const rootCRLURL = "https://simtee.dstack.invalid/IntelSGXRootCA.der"

// Lifetimes. What a verifier must find fresh is valid for a year; certificates
// outlive it, so that the collateral is what expires.
const (
	collateralLife  = 365 * 24 * time.Hour
	certificateLife = 10 * 365 * 24 * time.Hour
	// backdate makes a new PKI acceptable to a guest whose clock is behind.
	backdate = 24 * time.Hour
)

// The simulated platform. SVNs are those of no real machine; TCB info declares
// them up to date.
var (
	fmspc        = []byte{0x00, 0xd5, 0x7a, 0xc4, 0x00, 0x00}
	pceID        = []byte{0x00, 0x00}
	componentSVN = [16]byte{5, 5, 2, 2, 3, 1, 0, 3}
	cpuSVN       = componentSVN
	// teeTCBSVN: module ISVSVN 5, module version 1, SEAM loader 2.
	teeTCBSVN   = [16]byte{5, 1, 2}
	moduleID    = "TDX_01"
	oldModule   = byte(3) // the module level declared out of date
	pceSVN      = 13
	qeISVSVN    = uint16(4)
	qeISVProdID = uint16(2)
	// qeAttributes: flags INIT, MODE64BIT and PROVISIONKEY, not DEBUG; then XFRM.
	qeAttributes = [16]byte{0x15, 0, 0, 0, 0, 0, 0, 0, 0xe7}
	qeMRSigner   = sha256.Sum256([]byte("dstack simulated quoting enclave: signer"))
	qeMREnclave  = sha256.Sum256([]byte("dstack simulated quoting enclave"))
)

// PKI is a development root with everything below it: certification authorities,
// one platform with its PCK certificate, the quoting enclave's attestation key,
// and the collateral. It holds private keys, hence has no printable form.
type PKI struct {
	root, ca, tcb, pck, attestation *ecdsa.PrivateKey

	rootCert, caCert, tcbCert, pckCert *x509.Certificate
	ppid                               [16]byte
	qeAuth                             [tdx.QEAuthSize]byte
	devRoots                           collateral.DevRoots
}

// String and GoString keep keys out of logs.
func (p *PKI) String() string   { return "simtee.PKI(" + p.devRoots.Name + ")" }
func (p *PKI) GoString() string { return p.String() }

// DevRoots returns the public part: the root to trust, and the collateral.
func (p *PKI) DevRoots() *collateral.DevRoots {
	d := p.devRoots
	return &d
}

// NewPKI makes a fresh PKI whose certificates and collateral are valid from a day
// before now; the collateral expires a year after now.
func NewPKI(now time.Time) (*PKI, error) {
	p := &PKI{}
	for _, key := range p.keys() {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("make a key of the test PKI: %w", err)
		}
		*key.at = k
	}
	rand.Read(p.ppid[:])
	rand.Read(p.qeAuth[:])
	if err := p.certify(now); err != nil {
		return nil, fmt.Errorf("make the certificates of the test PKI: %w", err)
	}
	if err := p.issueCollateral(now, teeTCBSVN); err != nil {
		return nil, fmt.Errorf("make the collateral of the test PKI: %w", err)
	}
	return p, nil
}

type namedKey struct {
	name string
	at   **ecdsa.PrivateKey
}

func (p *PKI) keys() []namedKey {
	return []namedKey{{"root", &p.root}, {"pck_ca", &p.ca}, {"tcb_signing", &p.tcb}, {"pck", &p.pck}, {"attestation", &p.attestation}}
}

// certify issues the four certificates. The profile is Intel's ("SGX PCK
// Certificate and CRL Profile Specification"); a PCK certificate has exactly six
// extensions.
func (p *PKI) certify(now time.Time) error {
	issue := func(cn string, key, parentKey *ecdsa.PrivateKey, parent *x509.Certificate, pathLen int, extra ...pkix.Extension) (*x509.Certificate, error) {
		serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 159))
		if err != nil {
			return nil, err
		}
		template := &x509.Certificate{
			SerialNumber: serial,
			Subject: pkix.Name{
				CommonName: cn, Organization: []string{Organization},
				Locality: []string{"localhost"}, Country: []string{"ZZ"},
			},
			NotBefore:             now.Add(-backdate).UTC().Truncate(time.Second),
			NotAfter:              now.Add(certificateLife).UTC().Truncate(time.Second),
			BasicConstraintsValid: true,
			IsCA:                  pathLen >= 0,
			MaxPathLen:            pathLen,
			MaxPathLenZero:        pathLen == 0,
			KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment,
			SubjectKeyId:          keyID(&key.PublicKey),
			CRLDistributionPoints: []string{rootCRLURL},
			SignatureAlgorithm:    x509.ECDSAWithSHA256,
			ExtraExtensions:       extra,
		}
		if template.IsCA {
			template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
		}
		if parent == nil {
			parent = template
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
		if err != nil {
			return nil, err
		}
		return x509.ParseCertificate(der)
	}
	sgx, err := p.sgxExtension()
	if err != nil {
		return err
	}
	if p.rootCert, err = issue(tdx.CNRoot, p.root, p.root, nil, 1); err != nil {
		return err
	}
	if p.caCert, err = issue(tdx.CNPlatformCA, p.ca, p.root, p.rootCert, 0); err != nil {
		return err
	}
	if p.tcbCert, err = issue(tdx.CNTCBSigning, p.tcb, p.root, p.rootCert, -1); err != nil {
		return err
	}
	p.pckCert, err = issue(tdx.CNPCK, p.pck, p.ca, p.caCert, -1, sgx)
	return err
}

// keyID is the SHA-1 of the public key's bits, RFC 5280 §4.2.1.2 method 1.
func keyID(key *ecdsa.PublicKey) []byte {
	point, err := key.Bytes()
	if err != nil {
		panic(err) // a key of our own making lies on its curve
	}
	sum := sha1.Sum(point)
	return sum[:]
}

// sgxExtension is a sequence of (OID, value): PPID, TCB (a sequence of 16
// component SVNs, PCESVN and CPUSVN), PCEID, FMSPC and SGX type.
func (p *PKI) sgxExtension() (pkix.Extension, error) {
	type entry struct {
		ID    asn1.ObjectIdentifier
		Value any
	}
	sequence := func(entries []entry) (asn1.RawValue, error) {
		var content []byte
		for _, e := range entries {
			der, err := asn1.Marshal(e)
			if err != nil {
				return asn1.RawValue{}, err
			}
			content = append(content, der...)
		}
		return asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSequence, IsCompound: true, Bytes: content}, nil
	}
	var components []entry
	for i, svn := range componentSVN {
		components = append(components, entry{append(append(asn1.ObjectIdentifier{}, tdx.OIDTCB...), i+1), int(svn)})
	}
	components = append(components, entry{tdx.OIDPCESVN, pceSVN}, entry{tdx.OIDCPUSVN, cpuSVN[:]})
	tcb, err := sequence(components)
	if err != nil {
		return pkix.Extension{}, err
	}
	all, err := sequence([]entry{
		{tdx.OIDPPID, p.ppid[:]}, {tdx.OIDTCB, tcb}, {tdx.OIDPCEID, pceID}, {tdx.OIDFMSPC, fmspc},
		{tdx.OIDSGXType, asn1.Enumerated(1)}, // scalable
	})
	if err != nil {
		return pkix.Extension{}, err
	}
	der, err := asn1.Marshal(all)
	return pkix.Extension{Id: tdx.OIDSGX, Value: der}, err
}

func pemChain(certs ...*x509.Certificate) string {
	var b strings.Builder
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.String()
}

// issueCollateral makes the CRLs (empty), TCB info and QE identity. The level at
// or above current is up to date, everything older out of date.
func (p *PKI) issueCollateral(now time.Time, current [16]byte) error {
	issued := now.Add(-backdate).UTC().Truncate(time.Second)
	next := now.Add(collateralLife).UTC().Truncate(time.Second)
	crl := func(issuer *x509.Certificate, key *ecdsa.PrivateKey) ([]byte, error) {
		return x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
			Number: big.NewInt(1), ThisUpdate: issued, NextUpdate: next,
			SignatureAlgorithm: x509.ECDSAWithSHA256,
		}, issuer, key)
	}
	rootCRL, err := crl(p.rootCert, p.root)
	if err != nil {
		return err
	}
	pckCRL, err := crl(p.caCert, p.ca)
	if err != nil {
		return err
	}
	tcbInfo, err := json.Marshal(p.tcbInfo(issued, next, current))
	if err != nil {
		return err
	}
	identity, err := json.Marshal(qeIdentity(issued, next))
	if err != nil {
		return err
	}
	tcbSignature, err := sign(p.tcb, tcbInfo)
	if err != nil {
		return err
	}
	identitySignature, err := sign(p.tcb, identity)
	if err != nil {
		return err
	}
	signers := pemChain(p.tcbCert, p.rootCert)
	p.devRoots = collateral.DevRoots{
		Version:    1,
		Name:       p.name(now),
		TDXRootPEM: pemChain(p.rootCert),
		TDX: collateral.TDX{
			PCKCRLIssuerChain:     pemChain(p.caCert, p.rootCert),
			RootCACRL:             rootCRL,
			PCKCRL:                pckCRL,
			TCBInfoIssuerChain:    signers,
			TCBInfo:               string(tcbInfo),
			TCBInfoSignature:      tcbSignature,
			QEIdentityIssuerChain: signers,
			QEIdentity:            string(identity),
			QEIdentitySignature:   identitySignature,
		},
	}
	return nil
}

func (p *PKI) name(now time.Time) string {
	id := sha256.Sum256(p.rootCert.Raw)
	return fmt.Sprintf("dstack-simtee development root %x, made %s", id[:8], now.UTC().Format(time.DateOnly))
}

// JSON forms of TCB info version 3 and QE identity version 2 (Intel PCS API
// version 4). Byte strings are upper-case hexadecimal there.
type (
	tcbInfoJSON struct {
		ID                      string         `json:"id"`
		Version                 int            `json:"version"`
		IssueDate               string         `json:"issueDate"`
		NextUpdate              string         `json:"nextUpdate"`
		FMSPC                   string         `json:"fmspc"`
		PCEID                   string         `json:"pceId"`
		TCBType                 int            `json:"tcbType"`
		TCBEvaluationDataNumber int            `json:"tcbEvaluationDataNumber"`
		TDXModule               moduleJSON     `json:"tdxModule"`
		TDXModuleIdentities     []moduleJSON   `json:"tdxModuleIdentities"`
		TCBLevels               []tcbLevelJSON `json:"tcbLevels"`
	}
	moduleJSON struct {
		ID             string         `json:"id,omitempty"`
		MRSigner       string         `json:"mrsigner"`
		Attributes     string         `json:"attributes"`
		AttributesMask string         `json:"attributesMask"`
		TCBLevels      []tcbLevelJSON `json:"tcbLevels,omitempty"`
	}
	tcbLevelJSON struct {
		TCB         tcbJSON  `json:"tcb"`
		TCBDate     string   `json:"tcbDate"`
		TCBStatus   string   `json:"tcbStatus"`
		AdvisoryIDs []string `json:"advisoryIDs,omitempty"`
	}
	tcbJSON struct {
		SGX    []svnJSON `json:"sgxtcbcomponents,omitempty"`
		PCESVN *int      `json:"pcesvn,omitempty"`
		TDX    []svnJSON `json:"tdxtcbcomponents,omitempty"`
		ISVSVN *int      `json:"isvsvn,omitempty"`
	}
	svnJSON struct {
		SVN      int    `json:"svn"`
		Category string `json:"category,omitempty"`
		Type     string `json:"type,omitempty"`
	}
	qeIdentityJSON struct {
		ID                      string         `json:"id"`
		Version                 int            `json:"version"`
		IssueDate               string         `json:"issueDate"`
		NextUpdate              string         `json:"nextUpdate"`
		TCBEvaluationDataNumber int            `json:"tcbEvaluationDataNumber"`
		MiscSelect              string         `json:"miscselect"`
		MiscSelectMask          string         `json:"miscselectMask"`
		Attributes              string         `json:"attributes"`
		AttributesMask          string         `json:"attributesMask"`
		MRSigner                string         `json:"mrsigner"`
		ISVProdID               int            `json:"isvprodid"`
		TCBLevels               []tcbLevelJSON `json:"tcbLevels"`
	}
)

func upperHex(b []byte) string { return strings.ToUpper(hex.EncodeToString(b)) }

func rfc3339(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func svns(list [16]byte) []svnJSON {
	out := make([]svnJSON, len(list))
	for i, svn := range list {
		out[i].SVN = int(svn)
	}
	return out
}

const tcbEvaluationNumber = 17

func (p *PKI) tcbInfo(issued, next time.Time, current [16]byte) tcbInfoJSON {
	date := rfc3339(issued.Truncate(24 * time.Hour))
	level := func(tdxSVN [16]byte, pce int, status string, advisories ...string) tcbLevelJSON {
		return tcbLevelJSON{tcbJSON{SGX: svns(componentSVN), PCESVN: &pce, TDX: svns(tdxSVN)}, date, status, advisories}
	}
	module := func(svn byte, status string, advisories ...string) tcbLevelJSON {
		n := int(svn)
		return tcbLevelJSON{tcbJSON{ISVSVN: &n}, date, status, advisories}
	}
	identity := moduleJSON{
		MRSigner:       strings.Repeat("0", 96),
		Attributes:     strings.Repeat("0", 16),
		AttributesMask: strings.Repeat("F", 16),
	}
	versioned := identity
	versioned.ID = moduleID
	versioned.TCBLevels = []tcbLevelJSON{module(current[0], "UpToDate"), module(oldModule, "OutOfDate", "DSTACK-SIM-0001")}
	older := current
	older[2]--
	return tcbInfoJSON{
		ID: "TDX", Version: 3, IssueDate: rfc3339(issued), NextUpdate: rfc3339(next),
		FMSPC: upperHex(fmspc), PCEID: upperHex(pceID), TCBEvaluationDataNumber: tcbEvaluationNumber,
		TDXModule: identity, TDXModuleIdentities: []moduleJSON{versioned},
		TCBLevels: []tcbLevelJSON{
			level(current, pceSVN, "UpToDate"),
			level(older, pceSVN-1, "OutOfDate", "DSTACK-SIM-0002"),
		},
	}
}

func qeIdentity(issued, next time.Time) qeIdentityJSON {
	svn := int(qeISVSVN)
	// Intel's mask: all flags but MODE64BIT, no XFRM. DEBUG is covered, and zero.
	mask := []byte{0xfb, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0}
	attributes := make([]byte, len(mask))
	for i := range mask {
		attributes[i] = qeAttributes[i] & mask[i]
	}
	return qeIdentityJSON{
		ID: "TD_QE", Version: 2, IssueDate: rfc3339(issued), NextUpdate: rfc3339(next),
		TCBEvaluationDataNumber: tcbEvaluationNumber,
		MiscSelect:              "00000000", MiscSelectMask: "FFFFFFFF",
		Attributes: upperHex(attributes), AttributesMask: upperHex(mask),
		MRSigner: upperHex(qeMRSigner[:]), ISVProdID: int(qeISVProdID),
		TCBLevels: []tcbLevelJSON{{tcbJSON{ISVSVN: &svn}, rfc3339(issued.Truncate(24 * time.Hour)), "UpToDate", nil}},
	}
}

// sign returns the 64-byte r ‖ s of ECDSA P-256 over SHA-256(data).
func sign(key *ecdsa.PrivateKey, data []byte) ([]byte, error) {
	digest := sha256.Sum256(data)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return nil, err
	}
	out := make([]byte, 64)
	r.FillBytes(out[:32])
	s.FillBytes(out[32:])
	return out, nil
}
