// SPDX-License-Identifier: Apache-2.0

package tdx_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

type (
	platform = tdxtest.Platform
	doc      = tdxtest.JSON
)

func TestAGoodQuoteVerifies(t *testing.T) {
	for _, version := range []uint16{4, 5} {
		for _, v15 := range []bool{false, true} {
			if version == 4 && v15 {
				continue
			}
			t.Run(fmt.Sprintf("v%d, TDX 1.5 body %v", version, v15), func(t *testing.T) {
				p := tdxtest.New(t)
				p.Header.Version = version
				body := p.Body()
				body.V15 = v15
				c, err := tdxtest.Verify(p.Quote(body), p.Collateral(), []attest.Roots{tdx.VendorRoots(), p.Roots()}, tdxtest.At)
				if err != nil {
					t.Fatal(err)
				}
				if c.Trust != dstack.TrustDevelopment || !strings.Contains(c.Root, attest.Fingerprint(p.Root.Cert)) {
					t.Errorf("trust %s under %s", c.Trust, c.Root)
				}
				if c.TCBStatus != tdx.UpToDate || len(c.Advisories) != 0 || c.TCBEvaluation != 18 || c.Debug {
					t.Errorf("claims = %+v", *c)
				}
				if c.TDX.MRTD != body.MRTD || c.TDX.RTMR != body.RTMR || !bytes.Equal(c.ReportData, body.ReportData[:]) || c.Product != "90c06f000000" {
					t.Errorf("claims = %+v", *c)
				}
				if !c.Expires.Equal(tdxtest.NextUpdate) || !c.At.Equal(tdxtest.At) {
					t.Errorf("at %s until %s", c.At, c.Expires)
				}
			})
		}
	}
}

func TestPaddingAfterTheQuoteIsAccepted(t *testing.T) {
	p := tdxtest.New(t)
	quote := append(p.Quote(p.Body()), make([]byte, 300)...)
	if _, err := tdxtest.Verify(quote, p.Collateral(), []attest.Roots{p.Roots()}, tdxtest.At); err != nil {
		t.Error(err)
	}
}

func TestPCKChainFromCollateralIsUsedForEncryptedPPID(t *testing.T) {
	p := tdxtest.New(t)
	p.CertType, p.CertData = tdx.CertTypeEncryptedPPID3072, make([]byte, 404)
	col := p.Collateral()
	quote := p.Quote(p.Body())
	if _, err := tdxtest.Verify(quote, col, []attest.Roots{p.Roots()}, tdxtest.At); fault.Code(err) != "pck_chain" {
		t.Errorf("without a chain: %v", err)
	}
	col.PCKCertificateChain = p.Chain(p.PCK, p.PCKCA, p.Root)
	if _, err := tdxtest.Verify(quote, col, []attest.Roots{p.Roots()}, tdxtest.At); err != nil {
		t.Error(err)
	}
}

// mutation is one attack: what the attacker changes, at one of four places, and
// the reason of the refusal. Everything around the change is signed as it should be.
type mutation struct {
	name string
	code string
	// platform changes the machine or the vendor's documents before signing.
	platform func(p *platform)
	body     func(b *tdx.ReportBody)
	// quote and collateral change what was signed.
	quote      func(q []byte) []byte
	collateral func(p *platform, c *collateral.TDX)
	roots      func(p *platform) []attest.Roots
	at         time.Time
}

// set returns a mutation of one field of a signed document.
func set(of func(p *platform) *doc, key string, value any) func(*platform) {
	return func(p *platform) { d := of(p); *d = tdxtest.Edit(*d, key, value) }
}

func tcbInfo(p *platform) *doc    { return &p.TCBInfo }
func qeIdentity(p *platform) *doc { return &p.QEIdentity }

func flip(off int, bit byte) func([]byte) []byte {
	return func(q []byte) []byte { q[off] ^= bit; return q }
}

// foreign is an authority that looks like the vendor's and is not.
func foreign(p *platform) (root, ca, signer tdxtest.Authority) {
	other := tdxtest.New(tb(p))
	return other.Root, other.PCKCA, other.TCBSigner
}

func attributes(set uint64) func(*tdx.ReportBody) {
	return func(b *tdx.ReportBody) {
		binary.LittleEndian.PutUint64(b.TDAttributes[:], b.Attributes()|set)
	}
}

func putU16(p *platform, off int, v uint16) { binary.LittleEndian.PutUint16(p.QEReport[off:], v) }

// Offsets in a v4 quote.
const (
	sigOff    = tdx.HeaderSize + tdx.BodySizeV10 + 4
	keyOff    = sigOff + 64
	outerOff  = keyOff + 64
	reportOff = outerOff + 6
	qeSigOff  = reportOff + tdx.QEReportSize
	authOff   = qeSigOff + 64
	certOff   = authOff + 2 + tdx.QEAuthSize
)

func mutations() []mutation {
	var list []mutation
	add := func(code, name string, m mutation) {
		m.name, m.code = name, code
		list = append(list, m)
	}
	// The quote's frame.
	add("quote_malformed", "an empty quote", mutation{quote: func([]byte) []byte { return nil }})
	add("quote_malformed", "a quote cut inside the signature", mutation{quote: func(q []byte) []byte { return q[:sigOff+10] }})
	add("quote_malformed", "a byte after the end", mutation{quote: func(q []byte) []byte { return append(q, 0, 0, 1) }})
	add("quote_malformed", "signature data larger than the quote", mutation{quote: func(q []byte) []byte {
		binary.LittleEndian.PutUint32(q[sigOff-4:], 1<<31)
		return q
	}})
	add("quote_malformed", "certification data larger than the signature data", mutation{quote: func(q []byte) []byte {
		binary.LittleEndian.PutUint32(q[outerOff+2:], 0xffffffff)
		return q
	}})
	add("quote_malformed", "certification data smaller than the signature data", mutation{quote: func(q []byte) []byte {
		n := binary.LittleEndian.Uint32(q[outerOff+2:])
		binary.LittleEndian.PutUint32(q[outerOff+2:], n-1)
		return q
	}})
	add("quote_malformed", "a byte between certification data and the end of signature data", mutation{quote: func(q []byte) []byte {
		n := binary.LittleEndian.Uint32(q[sigOff-4:])
		binary.LittleEndian.PutUint32(q[sigOff-4:], n+1)
		return append(q, 0)
	}})
	add("quote_malformed", "QE authentication data larger than what holds them", mutation{quote: func(q []byte) []byte {
		binary.LittleEndian.PutUint16(q[authOff:], 0xffff)
		return q
	}})
	add("quote_malformed", "a PCK chain that ends before its frame", mutation{quote: func(q []byte) []byte {
		n := binary.LittleEndian.Uint32(q[certOff+2:])
		binary.LittleEndian.PutUint32(q[certOff+2:], n-1)
		return q
	}})
	add("quote_malformed", "a quote beyond the size limit", mutation{quote: func(q []byte) []byte { return append(q, make([]byte, tdx.MaxQuote)...) }})
	add("quote_version", "a quote of version 3", mutation{platform: func(p *platform) { p.Header.Version = 3 }})
	add("quote_tee_type", "an SGX quote", mutation{platform: func(p *platform) { p.Header.TEEType = 0 }})
	add("quote_key_type", "a P-384 attestation key", mutation{platform: func(p *platform) { p.Header.AttestationKeyType = 3 }})
	add("quote_body_type", "a v5 quote of body type 1", mutation{platform: func(p *platform) { p.Header.Version = 5 }, quote: func(q []byte) []byte { q[48] = 1; return q }})
	add("quote_body_type", "a v5 quote whose body size is another type's", mutation{platform: func(p *platform) { p.Header.Version = 5 }, quote: func(q []byte) []byte { q[48] = 3; return q }})
	add("quote_cert_type", "certification data that are no QE report", mutation{quote: flip(outerOff, 1)})
	add("quote_cert_type", "PCK certification data of type 1", mutation{platform: func(p *platform) { p.CertType = 1 }})
	add("qe_vendor", "a quoting enclave of another vendor", mutation{platform: func(p *platform) { p.Header.QEVendorID[0] ^= 1 }})

	// Roots.
	add("no_roots", "no roots at all", mutation{roots: func(*platform) []attest.Roots { return nil }})
	add("no_roots", "roots without a certificate", mutation{roots: func(*platform) []attest.Roots {
		return []attest.Roots{{TEE: dstack.TDX, Trust: dstack.TrustProduction}}
	}})
	add("unknown_root", "B14: a simulated quote against the vendor's root", mutation{roots: func(*platform) []attest.Roots { return []attest.Roots{tdx.VendorRoots()} }})
	add("unknown_root", "another installation's development root", mutation{roots: func(p *platform) []attest.Roots { return []attest.Roots{tdxtest.New(tb(p)).Roots()} }})
	add("root_expired", "a root that has ended", mutation{at: tdxtest.Issued.AddDate(11, 0, 0)})

	// PCK chain.
	add("pck_chain", "a PCK chain that is not PEM", mutation{platform: func(p *platform) { p.CertData = []byte("hello") }})
	add("pck_chain", "a PCK chain with broken PEM", mutation{platform: func(p *platform) {
		p.CertData = []byte("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")
	}})
	add("pck_chain", "a PCK certificate that is not DER", mutation{platform: func(p *platform) {
		p.CertData = []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
	}})
	add("pck_chain", "a PCK certificate signed with another hash", mutation{platform: func(p *platform) {
		p.PCK = p.IssuePCK(p.PCKCA, tdxtest.Extension(), func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA384 })
	}})
	add("pck_chain_length", "B15: a PCK chain of nine certificates", mutation{platform: func(p *platform) {
		p.CertData = []byte(p.Chain(p.PCK, p.PCKCA, p.PCKCA, p.PCKCA, p.PCKCA, p.PCKCA, p.PCKCA, p.PCKCA, p.Root))
	}})
	add("pck_chain", "a PCK chain with text between certificates", mutation{platform: func(p *platform) {
		p.CertData = []byte(p.Chain(p.PCK) + "x\n" + p.Chain(p.PCKCA, p.Root))
	}})
	add("pck_chain", "a PCK certificate of another intermediate of the same name", mutation{platform: func(p *platform) {
		p.PCK = p.IssuePCK(p.IssueCA(p.Root, tdx.CNPlatformCA), tdxtest.Extension(), nil)
	}})
	add("pck_chain", "a PCK certificate issued by the root", mutation{platform: func(p *platform) {
		p.PCK = p.IssuePCK(p.Root, tdxtest.Extension(), nil)
		p.CertData = []byte(p.Chain(p.PCK, p.Root))
	}})
	add("pck_chain", "a chain with the intermediate left out", mutation{platform: func(p *platform) { p.CertData = []byte(p.Chain(p.PCK, p.Root)) }})
	add("pck_chain", "an intermediate that is no CA", mutation{platform: func(p *platform) {
		fake := p.Issue(p.Root, tdx.CNPlatformCA, nil)
		p.PCKCA = fake
		p.PCK = p.IssuePCK(fake, tdxtest.Extension(), nil)
		p.PCKCRL.Issuer = fakeIssuer(fake)
	}})
	add("pck_chain", "a PCK key on another curve", mutation{platform: func(p *platform) {
		p.CertData = []byte(p.Chain(otherCurve(p), p.PCKCA, p.Root))
	}})
	add("pck_chain", "a PCK certificate with an unknown critical extension", mutation{platform: func(p *platform) {
		p.PCK = p.IssuePCK(p.PCKCA, tdxtest.Extension(), func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		})
	}})
	add("pck_role", "a TCB signing certificate for a PCK certificate", mutation{platform: func(p *platform) {
		p.PCK = p.Issue(p.PCKCA, tdx.CNTCBSigning, nil)
	}})
	add("pck_role", "an intermediate of another name", mutation{platform: func(p *platform) {
		p.PCKCA = p.IssueCA(p.Root, "Intel SGX PCK Other CA")
		p.PCK = p.IssuePCK(p.PCKCA, tdxtest.Extension(), nil)
	}})
	add("pck_cert_expired", "a PCK certificate that has ended", mutation{platform: func(p *platform) {
		p.PCK = p.IssuePCK(p.PCKCA, tdxtest.Extension(), func(c *x509.Certificate) { c.NotAfter = tdxtest.At.Add(-time.Second) })
	}})
	add("pck_cert_expired", "a PCK certificate that is not valid yet", mutation{platform: func(p *platform) {
		p.PCK = p.IssuePCK(p.PCKCA, tdxtest.Extension(), func(c *x509.Certificate) { c.NotBefore = tdxtest.At.Add(time.Second) })
	}})
	add("pck_extension", "a PCK certificate without the SGX extension", mutation{platform: func(p *platform) { p.PCK = p.Issue(p.PCKCA, tdx.CNPCK, nil) }})
	add("pck_extension", "an SGX extension that is not DER", mutation{platform: func(p *platform) {
		p.PCK = p.Issue(p.PCKCA, tdx.CNPCK, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: tdx.OIDSGX, Value: []byte("junk")}}
		})
	}})
	add("pck_extension", "an SGX extension without the FMSPC", mutation{platform: func(p *platform) {
		der := p.MarshalExtension(tdxtest.Extension())
		oid, _ := asn1.Marshal(tdx.OIDFMSPC)
		other, _ := asn1.Marshal(append(tdx.OIDSGX[:len(tdx.OIDSGX):len(tdx.OIDSGX)], 99))
		der = bytes.Replace(der, oid, other, 1)
		p.PCK = p.Issue(p.PCKCA, tdx.CNPCK, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: tdx.OIDSGX, Value: der}}
		})
	}})

	// extension certifies an SGX extension changed in its DER form.
	extension := func(edit func(der []byte) []byte) func(*platform) {
		return func(p *platform) {
			der := edit(p.MarshalExtension(tdxtest.Extension()))
			p.PCK = p.Issue(p.PCKCA, tdx.CNPCK, func(c *x509.Certificate) {
				c.ExtraExtensions = []pkix.Extension{{Id: tdx.OIDSGX, Value: der}}
			})
		}
	}
	// patch replaces the value that follows an identifier.
	patch := func(oid asn1.ObjectIdentifier, old, new []byte) func([]byte) []byte {
		id, _ := asn1.Marshal(oid)
		return func(der []byte) []byte {
			out := bytes.Replace(der, append(bytes.Clone(id), old...), append(bytes.Clone(id), new...), 1)
			if bytes.Equal(out, der) {
				panic("nothing to patch")
			}
			return out
		}
	}
	insert := func(element ...byte) func([]byte) []byte {
		return func(der []byte) []byte {
			var seq []asn1.RawValue
			if _, err := asn1.Unmarshal(der, &seq); err != nil {
				panic(err)
			}
			out, err := asn1.Marshal(append(seq, asn1.RawValue{FullBytes: element}))
			if err != nil {
				panic(err)
			}
			return out
		}
	}
	fmspc, _ := asn1.Marshal(tdx.OIDFMSPC)
	add("pck_extension", "a PCESVN below zero", mutation{platform: extension(patch(tdx.OIDPCESVN, []byte{2, 1, 13}, []byte{2, 1, 0x8d}))})
	add("pck_extension", "a component SVN below zero", mutation{platform: extension(patch(append(slices.Clone(tdx.OIDTCB), 1), []byte{2, 1, 3}, []byte{2, 1, 0x83}))})
	add("pck_extension", "a PCESVN of another type", mutation{platform: extension(patch(tdx.OIDPCESVN, []byte{2, 1, 13}, []byte{4, 1, 13}))})
	add("pck_extension", "an FMSPC of another type", mutation{platform: extension(patch(tdx.OIDFMSPC, []byte{4, 6}, []byte{2, 6}))})
	add("pck_extension", "bytes after the SGX extension", mutation{platform: extension(func(der []byte) []byte { return append(der, 5, 0) })})
	add("pck_extension", "a number among the fields", mutation{platform: extension(insert(2, 1, 0))})
	add("pck_extension", "a set among the fields", mutation{platform: extension(insert(append([]byte{0x31, byte(len(fmspc) - 1 + 3), 6, byte(len(fmspc) - 2 + 1)}, append(bytes.Clone(fmspc[2:]), 99, 5, 0)...)...))})
	add("pck_extension", "two FMSPCs", mutation{platform: extension(insert(append(append([]byte{0x30, byte(len(fmspc) + 8)}, fmspc...), 4, 6, 1, 2, 3, 4, 5, 6)...))})
	add("pck_chain", "a PCK certificate that names another issuer with the same key", mutation{platform: func(p *platform) {
		renamed := *p.PCKCA.Cert
		renamed.RawSubject, renamed.Subject.CommonName = nil, tdx.CNProcessorCA
		p.PCK = p.IssuePCK(tdxtest.Authority{Key: p.PCKCA.Key, Cert: &renamed}, tdxtest.Extension(), nil)
	}})

	// B02: revocation.
	add("pck_revoked", "B02: the PCK certificate is in the CRL", mutation{platform: func(p *platform) { p.PCKCRL.Revoked = []*big.Int{p.PCK.Cert.SerialNumber} }})
	add("pck_issuer_revoked", "B02: the intermediate is in the root CRL", mutation{platform: func(p *platform) { p.RootCRL.Revoked = []*big.Int{p.PCKCA.Cert.SerialNumber} }})
	add("tcb_info_issuer_revoked", "B02: the TCB signing certificate is in the root CRL", mutation{platform: func(p *platform) { p.RootCRL.Revoked = []*big.Int{p.TCBSigner.Cert.SerialNumber} }})
	add("qe_identity_issuer_revoked", "B02: the QE identity's signing certificate is in the root CRL", mutation{platform: func(p *platform) {
		p.QESigner = p.Issue(p.Root, tdx.CNTCBSigning, nil)
		p.RootCRL.Revoked = []*big.Int{p.QESigner.Cert.SerialNumber}
	}})
	add("crl_missing", "B02: no root CRL", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.RootCACRL = nil }})
	add("crl_missing", "B02: no PCK CRL", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.PCKCRL = nil }})
	add("crl_malformed", "B02: a root CRL that is not DER", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.RootCACRL = []byte("-----BEGIN") }})
	add("crl_malformed", "B02: a delta CRL", mutation{platform: func(p *platform) {
		p.PCKCRL.Extensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}}}
	}})
	add("crl_expired", "B02: a root CRL that has ended", mutation{platform: func(p *platform) { p.RootCRL.NextUpdate = tdxtest.At.Add(-time.Second) }})
	add("crl_expired", "B02: a PCK CRL that has ended", mutation{platform: func(p *platform) { p.PCKCRL.NextUpdate = tdxtest.At.Add(-time.Second) }})
	add("crl_not_yet_valid", "B02: a PCK CRL of the future", mutation{platform: func(p *platform) { p.PCKCRL.ThisUpdate = tdxtest.At.Add(time.Second) }})
	add("crl_signature", "B02: a root CRL signed by a foreign root of the same name", mutation{platform: func(p *platform) { p.RootCRL.Issuer, _, _ = foreign(p) }})
	add("crl_signature", "B02: a PCK CRL signed by a foreign intermediate of the same name", mutation{platform: func(p *platform) { _, p.PCKCRL.Issuer, _ = foreign(p) }})
	add("crl_issuer", "B02: the root CRL in place of the PCK CRL", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.PCKCRL = c.RootCACRL }})
	add("crl_issuer", "B02: the CRL of the vendor's other intermediate", mutation{platform: func(p *platform) { p.PCKCRL.Issuer = p.IssueCA(p.Root, tdx.CNProcessorCA) },
		collateral: func(p *platform, c *collateral.TDX) { c.PCKCRLIssuerChain = p.Chain(p.PCKCRL.Issuer, p.Root) }})
	add("crl_issuer", "an issuer chain to the vendor's other intermediate", mutation{collateral: func(p *platform, c *collateral.TDX) {
		c.PCKCRLIssuerChain = p.Chain(p.IssueCA(p.Root, tdx.CNProcessorCA), p.Root)
	}})
	add("pck_crl_chain", "no issuer chain of the PCK CRL", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.PCKCRLIssuerChain = "" }})
	add("pck_crl_chain", "an issuer chain of the PCK CRL to a foreign root", mutation{collateral: func(p *platform, c *collateral.TDX) {
		root, ca, _ := foreign(p)
		c.PCKCRLIssuerChain = p.Chain(ca, root)
	}})
	add("pck_crl_role", "a PCK CRL by the TCB signer", mutation{collateral: func(p *platform, c *collateral.TDX) { c.PCKCRLIssuerChain = p.Chain(p.TCBSigner, p.Root) }})

	// TCB info.
	add("tcb_info_missing", "no TCB info", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.TCBInfo = "" }})
	add("tcb_info_chain", "no issuer chain of the TCB info", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.TCBInfoIssuerChain = "" }})
	add("tcb_info_chain", "TCB info re-signed under a foreign root", mutation{collateral: func(p *platform, c *collateral.TDX) {
		f := tdxtest.New(tb(p)).Collateral()
		c.TCBInfo, c.TCBInfoSignature, c.TCBInfoIssuerChain = f.TCBInfo, f.TCBInfoSignature, f.TCBInfoIssuerChain
	}})
	add("tcb_info_role", "TCB info signed by the PCK intermediate", mutation{platform: func(p *platform) { p.TCBSigner = p.PCKCA }})
	add("tcb_info_cert_expired", "a TCB signing certificate that has ended", mutation{platform: func(p *platform) {
		p.TCBSigner = p.Issue(p.Root, tdx.CNTCBSigning, func(c *x509.Certificate) { c.NotAfter = tdxtest.At.Add(-time.Second) })
	}})
	add("tcb_info_signature", "TCB info with one byte changed", mutation{collateral: func(_ *platform, c *collateral.TDX) {
		c.TCBInfo = strings.Replace(c.TCBInfo, "OutOfDate", "UpToDate", 1)
	}})
	add("tcb_info_signature", "TCB info with white space added", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.TCBInfo += " " }})
	add("tcb_info_signature", "a signature cut short", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.TCBInfoSignature = c.TCBInfoSignature[:63] }})
	add("tcb_info_signature", "the QE identity's signature", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.TCBInfoSignature = c.QEIdentitySignature }})
	add("tcb_info_id", "TCB info for SGX", mutation{platform: set(tcbInfo, "id", "SGX")})
	add("tcb_info_id", "the QE identity in place of TCB info", mutation{collateral: func(_ *platform, c *collateral.TDX) {
		c.TCBInfo, c.TCBInfoSignature = c.QEIdentity, c.QEIdentitySignature
	}})
	add("tcb_info_version", "TCB info of version 2", mutation{platform: set(tcbInfo, "version", 2)})
	add("tcb_info_expired", "B03: TCB info that has ended", mutation{platform: set(tcbInfo, "nextUpdate", "2026-01-14T23:59:59Z")})
	add("tcb_info_not_yet_valid", "TCB info of the future", mutation{platform: set(tcbInfo, "issueDate", "2026-01-15T00:00:01Z")})
	add("tcb_info_malformed", "TCB info without dates", mutation{platform: set(tcbInfo, "nextUpdate", nil)})
	add("tcb_info_malformed", "TCB info without an issue date", mutation{platform: set(tcbInfo, "issueDate", nil)})
	add("tcb_info_malformed", "a PCE id of one byte", mutation{platform: set(tcbInfo, "pceId", "00")})
	add("tcb_info_malformed", "signed TCB info with a field twice", mutation{collateral: func(p *platform, c *collateral.TDX) {
		c.TCBInfo = strings.Replace(c.TCBInfo, `"id":"TDX",`, `"id":"TDX","id":"TDX",`, 1)
		c.TCBInfoSignature = p.Sign(p.TCBSigner, []byte(c.TCBInfo))
	}})
	add("tcb_info_malformed", "TCB info without levels", mutation{platform: set(tcbInfo, "tcbLevels", []any{})})
	add("tcb_info_malformed", "a level without a PCESVN", mutation{platform: func(p *platform) {
		level := p.TCBInfo["tcbLevels"].([]any)[0].(doc)
		delete(level["tcb"].(doc), "pcesvn")
	}})
	add("tcb_info_malformed", "a level with fifteen components", mutation{platform: func(p *platform) {
		tcb := p.TCBInfo["tcbLevels"].([]any)[0].(doc)["tcb"].(doc)
		tcb["tdxtcbcomponents"] = tcb["tdxtcbcomponents"].([]any)[:15]
	}})
	add("tcb_info_malformed", "a component without an SVN", mutation{platform: func(p *platform) {
		tcb := p.TCBInfo["tcbLevels"].([]any)[0].(doc)["tcb"].(doc)
		tcb["sgxtcbcomponents"].([]any)[0] = doc{}
	}})
	add("tcb_info_malformed", "an FMSPC of five bytes", mutation{platform: set(tcbInfo, "fmspc", "90C06F0000")})
	add("tcb_info_malformed", "a module level without an ISVSVN", mutation{platform: func(p *platform) {
		delete(p.TCBInfo["tdxModuleIdentities"].([]any)[1].(doc)["tcbLevels"].([]any)[0].(doc)["tcb"].(doc), "isvsvn")
	}})
	add("tcb_status_unknown", "a status nobody knows", mutation{platform: set(tcbInfo, "tcbLevels", []any{
		tdxtest.PlatformLevel([16]uint8{}, 0, [16]uint8{}, "Splendid"),
	})})
	add("tcb_status_unknown", "a module of a status that only platforms have", mutation{platform: func(p *platform) {
		p.TCBInfo["tdxModuleIdentities"] = []any{p.Module("TDX_01", tdxtest.Level(0, tdx.SWHardeningNeeded))}
	}})
	add("tcb_status_unknown", "a quoting enclave of a status nobody knows", mutation{platform: set(qeIdentity, "tcbLevels", []any{tdxtest.Level(0, "Splendid")})})
	add("tcb_info_malformed", "a module without levels", mutation{platform: func(p *platform) {
		p.TCBInfo["tdxModuleIdentities"] = []any{p.Module("TDX_01", tdxtest.Level(0, tdx.UpToDate)), p.Module("TDX_07")}
	}})
	add("tcb_info_malformed", "a level without a date", mutation{platform: set(tcbInfo, "tcbLevels", []any{
		tdxtest.Edit(tdxtest.PlatformLevel([16]uint8{}, 0, [16]uint8{}, tdx.UpToDate), "tcbDate", "yesterday"),
	})})
	add("fmspc_mismatch", "B06: TCB info of another platform", mutation{platform: set(tcbInfo, "fmspc", "B0C06F000000")})
	add("pceid_mismatch", "B06: TCB info of another PCE", mutation{platform: set(tcbInfo, "pceId", "0001")})
	add("tcb_unsupported", "a platform below every level", mutation{platform: set(tcbInfo, "tcbLevels", []any{
		tdxtest.PlatformLevel([16]uint8{4}, 0, [16]uint8{}, tdx.UpToDate),
	})})
	add("tcb_unsupported", "a PCE below every level", mutation{platform: set(tcbInfo, "tcbLevels", []any{
		tdxtest.PlatformLevel([16]uint8{}, 14, [16]uint8{}, tdx.UpToDate),
	})})
	add("tcb_unsupported", "a TDX component below every level", mutation{platform: set(tcbInfo, "tcbLevels", []any{
		tdxtest.PlatformLevel([16]uint8{}, 0, [16]uint8{0, 0, 4}, tdx.UpToDate),
	})})
	add("tcb_revoked", "a platform whose level is revoked", mutation{platform: set(tcbInfo, "tcbLevels", []any{
		tdxtest.PlatformLevel([16]uint8{}, 0, [16]uint8{}, tdx.Revoked),
	})})
	add("tcb_revoked", "a platform whose SGX part is revoked", mutation{platform: set(tcbInfo, "tcbLevels", []any{
		tdxtest.PlatformLevel([16]uint8{}, 0, [16]uint8{0, 0, 9}, tdx.Revoked),
		tdxtest.PlatformLevel([16]uint8{}, 0, [16]uint8{}, tdx.UpToDate),
	})})
	add("tcb_revoked", "B05: a module whose level is revoked", mutation{platform: func(p *platform) {
		p.TCBInfo["tdxModuleIdentities"] = []any{p.Module("TDX_01", tdxtest.Level(0, tdx.Revoked))}
	}})
	add("tcb_revoked", "B05: a quoting enclave whose level is revoked", mutation{platform: set(qeIdentity, "tcbLevels", []any{tdxtest.Level(0, tdx.Revoked)})})
	add("module_unknown", "a TDX module without an identity", mutation{body: func(b *tdx.ReportBody) { b.TEETCBSVN[1] = 2 }})
	add("module_tcb_unsupported", "a TDX module below every level", mutation{body: func(b *tdx.ReportBody) { b.TEETCBSVN[0] = 3 }})
	add("module_mrsigner", "a TDX module of another signer", mutation{body: func(b *tdx.ReportBody) { b.MRSignerSEAM[47] = 1 }})
	add("mr_signer_seam", "a TDX module of another signer that TCB info allows", mutation{
		body: func(b *tdx.ReportBody) { b.MRSignerSEAM[0] = 1 },
		platform: func(p *platform) {
			m := p.Module("TDX_01", tdxtest.Level(0, tdx.UpToDate))
			m["mrsigner"] = "01" + strings.Repeat("00", 47)
			p.TCBInfo["tdxModuleIdentities"] = []any{m}
		}})
	add("module_attributes", "a debug TDX module", mutation{body: func(b *tdx.ReportBody) { b.SEAMAttributes[0] = 1 }})
	add("module_attributes", "a module attribute outside the mask", mutation{
		body: func(b *tdx.ReportBody) { b.SEAMAttributes[7] = 0x80 },
		platform: func(p *platform) {
			m := p.Module("TDX_01", tdxtest.Level(0, tdx.UpToDate))
			m["attributesMask"] = strings.Repeat("00", 8)
			p.TCBInfo["tdxModuleIdentities"] = []any{m}
		}})
	add("tcb_info_malformed", "a module identity without a signer", mutation{platform: func(p *platform) {
		m := p.Module("TDX_01", tdxtest.Level(0, tdx.UpToDate))
		delete(m, "mrsigner")
		p.TCBInfo["tdxModuleIdentities"] = []any{m}
	}})

	// B06: the quoting enclave (CVE-2026-22696).
	add("qe_identity_missing", "B06: no QE identity", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.QEIdentity = "" }})
	add("qe_identity_chain", "B06: QE identity re-signed under a foreign root", mutation{collateral: func(p *platform, c *collateral.TDX) {
		f := tdxtest.New(tb(p)).Collateral()
		c.QEIdentity, c.QEIdentitySignature, c.QEIdentityIssuerChain = f.QEIdentity, f.QEIdentitySignature, f.QEIdentityIssuerChain
	}})
	add("qe_identity_signature", "B06: QE identity re-signed by a foreign key under the genuine chain", mutation{collateral: func(p *platform, c *collateral.TDX) {
		f := tdxtest.New(tb(p)).Collateral()
		c.QEIdentity, c.QEIdentitySignature = f.QEIdentity, f.QEIdentitySignature
	}})
	add("qe_identity_signature", "B06: QE identity with one byte changed", mutation{collateral: func(_ *platform, c *collateral.TDX) {
		c.QEIdentity = strings.Replace(c.QEIdentity, `"isvprodid":2`, `"isvprodid":3`, 1)
	}})
	add("qe_identity_role", "B06: QE identity signed by a PCK certificate", mutation{platform: func(p *platform) { p.QESigner = p.IssuePCK(p.Root, tdxtest.Extension(), nil) }})
	add("qe_identity_cert_expired", "a QE identity signing certificate that has ended", mutation{platform: func(p *platform) {
		p.QESigner = p.Issue(p.Root, tdx.CNTCBSigning, func(c *x509.Certificate) { c.NotAfter = tdxtest.At.Add(-time.Second) })
	}})
	add("qe_identity_id", "B06: the identity of an SGX quoting enclave", mutation{platform: set(qeIdentity, "id", "QE")})
	add("qe_identity_version", "a QE identity of version 1", mutation{platform: set(qeIdentity, "version", 1)})
	add("qe_identity_expired", "a QE identity that has ended", mutation{platform: set(qeIdentity, "nextUpdate", "2026-01-14T23:59:59Z")})
	add("qe_identity_not_yet_valid", "a QE identity of the future", mutation{platform: set(qeIdentity, "issueDate", "2026-01-15T00:00:01Z")})
	add("qe_identity_malformed", "a QE identity without a signer", mutation{platform: set(qeIdentity, "mrsigner", nil)})
	add("qe_identity_malformed", "a QE identity without a product id", mutation{platform: set(qeIdentity, "isvprodid", nil)})
	add("qe_identity_malformed", "a QE identity with an attributes mask of eight bytes", mutation{platform: set(qeIdentity, "attributesMask", "FFFFFFFFFFFFFFFF")})
	add("qe_mrsigner", "B06: a quoting enclave that Intel did not sign", mutation{platform: func(p *platform) { p.QEReport[tdx.QEOffMRSigner] ^= 1 }})
	add("qe_mrsigner", "B06: a QE identity of another signer", mutation{platform: set(qeIdentity, "mrsigner", strings.Repeat("ab", 32))})
	add("qe_isvprodid", "B06: another enclave of the same signer", mutation{platform: func(p *platform) { putU16(p, tdx.QEOffISVProdID, 1) }})
	add("qe_miscselect", "B06: a quoting enclave with MISCSELECT set", mutation{platform: func(p *platform) { p.QEReport[tdx.QEOffMiscSelect] = 1 }})
	add("qe_attributes", "B06: a quoting enclave with the provision key", mutation{platform: func(p *platform) { p.QEReport[tdx.QEOffAttributes] |= 0x20 }})
	add("qe_debug", "B01: a debug quoting enclave", mutation{platform: func(p *platform) { p.QEReport[tdx.QEOffAttributes] |= 2 }})
	add("qe_debug", "B01: a debug quoting enclave that the mask would let pass", mutation{platform: func(p *platform) {
		p.QEReport[tdx.QEOffAttributes] |= 2
		p.QEIdentity = tdxtest.Edit(p.QEIdentity, "attributesMask", strings.Repeat("00", 16))
		p.QEIdentity = tdxtest.Edit(p.QEIdentity, "attributes", strings.Repeat("00", 16))
	}})
	add("qe_tcb_unsupported", "B06: a quoting enclave below every level", mutation{platform: func(p *platform) { putU16(p, tdx.QEOffISVSVN, 1) }})

	// Signatures inside the quote.
	add("qe_report_signature", "a QE report with one bit changed", mutation{quote: flip(reportOff+tdx.QEOffMREnclave, 1)})
	add("qe_report_signature", "a QE report signed by another key", mutation{platform: func(p *platform) {
		p.CertData = []byte(p.Chain(p.PCK, p.PCKCA, p.Root))
		p.PCK = p.IssuePCK(p.PCKCA, tdxtest.Extension(), nil)
	}})
	add("qe_report_signature", "a QE report signature of zeros", mutation{quote: func(q []byte) []byte { clear(q[qeSigOff : qeSigOff+64]); return q }})
	add("qe_auth_size", "QE authentication data of 31 bytes", mutation{platform: func(p *platform) { p.QEAuth = p.QEAuth[:31] }})
	add("qe_auth_size", "no QE authentication data", mutation{platform: func(p *platform) { p.QEAuth = nil }})
	add("qe_report_data", "QE authentication data with one bit changed", mutation{quote: flip(authOff+2, 1)})
	add("qe_report_data", "B06: an attestation key the quoting enclave did not certify", mutation{platform: func(p *platform) { p.KeepReportData = true }})
	add("qe_report_data", "QE report data with a tail that is not zero", mutation{platform: func(p *platform) { p.QEReport[tdx.QEOffReportData+63] = 1 }})
	add("qe_report_data", "an attestation key with one bit changed", mutation{quote: flip(keyOff, 1)})
	add("quote_signature", "a quote signature with one bit changed", mutation{quote: flip(sigOff, 1)})
	add("quote_signature", "an attestation key that is not on the curve", mutation{platform: func(p *platform) { p.AttestationPoint = make([]byte, 64) }})
	add("quote_signature", "a quote signature of zeros", mutation{quote: func(q []byte) []byte { clear(q[sigOff : sigOff+64]); return q }})
	add("quote_signature", "a measurement with one bit changed", mutation{quote: flip(tdx.HeaderSize+tdx.OffMRTD, 1)})
	add("quote_signature", "report data with one bit changed", mutation{quote: flip(tdx.HeaderSize+tdx.OffReportData+63, 1)})
	add("quote_signature", "user data with one bit changed", mutation{quote: flip(28, 1)})

	// The TD itself.
	for bit := range 8 {
		code := "td_tud"
		if bit == 0 {
			code = "td_debug"
		}
		add(code, fmt.Sprintf("B01: TUD bit %d", bit), mutation{body: attributes(1 << bit)})
	}
	add("td_migratable", "A06: a TD that may migrate", mutation{body: attributes(tdx.AttrMigratable)})
	add("td_sept_ve", "a TD with virtualization exceptions on", mutation{body: func(b *tdx.ReportBody) { b.TDAttributes = [8]byte{} }})
	add("td_service_td", "A06: a bound service TD", mutation{platform: func(p *platform) { p.Header.Version = 5 }, body: func(b *tdx.ReportBody) { b.V15 = true; b.MRServiceTD[3] = 1 }})
	add("collateral_too_large", "a CRL beyond the limit", mutation{collateral: func(_ *platform, c *collateral.TDX) { c.PCKCRL = make([]byte, collateral.MaxCRL+1) }})
	return list
}

func (m mutation) run(t *testing.T) error {
	p := tdxtest.New(t)
	if m.platform != nil {
		m.platform(p)
	}
	body := p.Body()
	if m.body != nil {
		m.body(&body)
	}
	quote := p.Quote(body)
	if m.quote != nil {
		quote = m.quote(quote)
	}
	col := p.Collateral()
	if m.collateral != nil {
		m.collateral(p, &col)
	}
	roots := []attest.Roots{p.Roots()}
	if m.roots != nil {
		roots = m.roots(p)
	}
	at := tdxtest.At
	if !m.at.IsZero() {
		at = m.at
	}
	claims, err := tdxtest.Verify(quote, col, roots, at)
	// What a memo remembers changes no outcome, neither when it is filled nor when it
	// is used, whatever it saw of the same platform before.
	memo := new(attest.Memo)
	for _, q := range [][]byte{p.Quote(p.Body()), quote, quote} {
		in := attest.Input{Evidence: &attest.Evidence{TEE: dstack.TDX, Quote: q}, Collateral: &collateral.Bundle{TDX: col}, Roots: roots, At: at, Memo: memo}
		again, err2 := tdx.Verify(in)
		if bytes.Equal(q, quote) && (fault.Code(err2) != fault.Code(err) || (again == nil) != (claims == nil)) {
			t.Errorf("with a memo: %v, without: %v", err2, err)
		}
	}
	if claims != nil && !judgement[fault.Code(err)] {
		t.Error("claims came with a signature, chain or collateral that does not hold")
	}
	return err
}

// judgement are the codes of errors that come beside claims: the signatures hold,
// platform or TD are not acceptable.
var judgement = map[string]bool{
	"tcb_unsupported": true, "tcb_revoked": true, "module_unknown": true, "module_mrsigner": true, "module_attributes": true,
	"module_tcb_unsupported": true, "mr_signer_seam": true, "td_debug": true, "td_tud": true, "td_migratable": true,
	"td_attributes": true, "td_sept_ve": true, "td_service_td": true,
}

func TestEachMutationIsRefusedForItsOwnReason(t *testing.T) {
	list := mutations()
	t.Logf("%d mutations", len(list))
	seen := map[string]bool{}
	for _, m := range list {
		if seen[m.name] {
			t.Errorf("mutation %q is listed twice", m.name)
		}
		seen[m.name] = true
		t.Run(m.name, func(t *testing.T) {
			if err := m.run(t); fault.Code(err) != m.code {
				t.Errorf("err = %v (code %q), want code %q", err, fault.Code(err), m.code)
			}
		})
	}
}

// named runs the mutations whose name begins with an id of the catalogue.
func named(t *testing.T, id string, least int) {
	t.Helper()
	count := 0
	for _, m := range mutations() {
		if !strings.HasPrefix(m.name, id+": ") {
			continue
		}
		count++
		t.Run(m.name, func(t *testing.T) {
			if err := m.run(t); fault.Code(err) != m.code {
				t.Errorf("err = %v (code %q), want code %q", err, fault.Code(err), m.code)
			}
		})
	}
	if count < least {
		t.Errorf("%d mutations bear the name %s, want at least %d", count, id, least)
	}
}

// B01: each bit of the TUD byte, and a debug quoting enclave.
func TestThreat_B01_DebugTDsAreRefused(t *testing.T) { named(t, "B01", 10) }

// B02: revoked, missing, expired, foreign and misplaced revocation lists.
func TestThreat_B02_RevocationIsChecked(t *testing.T) { named(t, "B02", 14) }

// B06: CVE-2026-22696 and its neighbours.
func TestThreat_B06_ForgedQuotingEnclavesAreRefused(t *testing.T) { named(t, "B06", 8) }

// F03: collateral is judged at the stated time, in both directions.
func TestThreat_F03_CollateralIsJudgedAtTheStatedTime(t *testing.T) {
	p := tdxtest.New(t)
	quote, col, roots := p.Quote(p.Body()), p.Collateral(), []attest.Roots{p.Roots()}
	for _, c := range []struct {
		at   time.Time
		code string
	}{
		{tdxtest.Issued.Add(-time.Second), "crl_not_yet_valid"},
		{tdxtest.Issued, ""},
		{tdxtest.NextUpdate, ""},
		{tdxtest.NextUpdate.Add(time.Second), "crl_expired"},
	} {
		if _, err := tdxtest.Verify(quote, col, roots, c.at); fault.Code(err) != c.code {
			t.Errorf("at %s: %v, want code %q", c.at, err, c.code)
		}
	}
}

// M04: the root is the one that the vendor publishes, by fingerprint, and comes
// with its address.
func TestThreat_M04_RootHasItsFingerprint(t *testing.T) {
	roots := tdx.VendorRoots()
	if len(roots.CA) != 1 || attest.Fingerprint(roots.CA[0]) != tdx.IntelRootSHA256 {
		t.Errorf("roots %v", roots)
	}
}

// A06: of all attributes only SEPT_VE_DISABLE passes by default, three more when
// the caller asks, and debug only by its own name.
func TestThreat_A06_OnlyListedTDAttributesPass(t *testing.T) {
	p := tdxtest.New(t)
	col, roots := p.Collateral(), []attest.Roots{p.Roots()}
	for bit := range 64 {
		attr := uint64(1) << bit
		body := p.Body()
		attributes(attr)(&body)
		quote := p.Quote(body)
		_, err := tdxtest.Verify(quote, col, roots, tdxtest.At)
		if want := attr == tdx.AttrSEPTVEDisable; (err == nil) != want || !want && !strings.HasPrefix(fault.Code(err), "td_") {
			t.Errorf("bit %d: %v", bit, err)
		}
		_, err = tdxtest.Verify(quote, col, roots, tdxtest.At, attest.Options{TDXAttributes: ^uint64(0)})
		if want := attr&(tdx.AttrSEPTVEDisable|tdx.AttrPKS|tdx.AttrKL|tdx.AttrPerfmon) != 0; (err == nil) != want {
			t.Errorf("bit %d with every extra attribute allowed: %v", bit, err)
		}
	}
	body := p.Body()
	attributes(tdx.AttrDebug)(&body)
	c, err := tdxtest.Verify(p.Quote(body), col, roots, tdxtest.At, attest.Options{AllowDebug: true})
	if err != nil || !c.Debug {
		t.Errorf("debug TD with AllowDebug: %v, %+v", err, c)
	}
}

// B05: the outcome is the worst of platform, module and quoting enclave, and
// advisories are the union.
func TestThreat_B05_StatusesConverge(t *testing.T) {
	type levels struct{ platform, module, qe string }
	cases := []struct {
		in   levels
		want string
	}{
		{levels{tdx.UpToDate, tdx.UpToDate, tdx.UpToDate}, tdx.UpToDate},
		{levels{tdx.OutOfDate, tdx.UpToDate, tdx.UpToDate}, tdx.OutOfDate},
		{levels{tdx.UpToDate, tdx.OutOfDate, tdx.UpToDate}, tdx.OutOfDate},
		{levels{tdx.UpToDate, tdx.UpToDate, tdx.OutOfDate}, tdx.OutOfDate},
		{levels{tdx.SWHardeningNeeded, tdx.UpToDate, tdx.UpToDate}, tdx.SWHardeningNeeded},
		{levels{tdx.SWHardeningNeeded, tdx.OutOfDate, tdx.UpToDate}, tdx.OutOfDate},
		{levels{tdx.SWHardeningNeeded, tdx.UpToDate, tdx.OutOfDate}, tdx.OutOfDate},
		{levels{tdx.ConfigurationNeeded, tdx.UpToDate, tdx.UpToDate}, tdx.ConfigurationNeeded},
		{levels{tdx.ConfigurationNeeded, tdx.OutOfDate, tdx.UpToDate}, tdx.OutOfDateConfigurationNeeded},
		{levels{tdx.ConfigurationNeeded, tdx.UpToDate, tdx.OutOfDate}, tdx.OutOfDateConfigurationNeeded},
		{levels{tdx.ConfigurationAndSWHardeningNeeded, tdx.UpToDate, tdx.OutOfDate}, tdx.OutOfDateConfigurationNeeded},
		{levels{tdx.OutOfDateConfigurationNeeded, tdx.OutOfDate, tdx.OutOfDate}, tdx.OutOfDateConfigurationNeeded},
		{levels{tdx.OutOfDate, tdx.OutOfDate, tdx.OutOfDate}, tdx.OutOfDate},
	}
	for _, c := range cases {
		t.Run(fmt.Sprintf("%s, %s, %s", c.in.platform, c.in.module, c.in.qe), func(t *testing.T) {
			p := tdxtest.New(t)
			p.TCBInfo["tcbLevels"] = []any{tdxtest.PlatformLevel([16]uint8{}, 0, [16]uint8{}, c.in.platform, "INTEL-SA-1", "INTEL-SA-2")}
			p.TCBInfo["tdxModuleIdentities"] = []any{p.Module("TDX_01", tdxtest.Level(0, c.in.module, "INTEL-SA-2"))}
			p.QEIdentity["tcbLevels"] = []any{tdxtest.Level(0, c.in.qe, "INTEL-SA-0")}
			got, err := tdxtest.Verify(p.Quote(p.Body()), p.Collateral(), []attest.Roots{p.Roots()}, tdxtest.At)
			if err != nil {
				t.Fatal(err)
			}
			if got.TCBStatus != c.want || got.TDX.PlatformStatus != c.in.platform || got.TDX.ModuleStatus != c.in.module || got.TDX.QEStatus != c.in.qe {
				t.Errorf("status %s of %s, %s, %s, want %s", got.TCBStatus, got.TDX.PlatformStatus, got.TDX.ModuleStatus, got.TDX.QEStatus, c.want)
			}
			if fmt.Sprint(got.Advisories) != "[INTEL-SA-0 INTEL-SA-1 INTEL-SA-2]" {
				t.Errorf("advisories %v", got.Advisories)
			}
		})
	}
}

func TestLevelsAreChosenAsTheVendorChoosesThem(t *testing.T) {
	upToDate := [16]uint8{3, 3, 2, 2, 4, 1, 0, 5}
	verify := func(t *testing.T, p *platform, b tdx.ReportBody) (string, error) {
		c, err := tdxtest.Verify(p.Quote(b), p.Collateral(), []attest.Roots{p.Roots()}, tdxtest.At)
		if err != nil {
			return "", err
		}
		return c.TCBStatus + "/" + c.TDX.ModuleStatus, nil
	}
	t.Run("components 0 and 1 are the module's from version 1 on", func(t *testing.T) {
		p := tdxtest.New(t)
		p.TCBInfo["tcbLevels"] = []any{tdxtest.PlatformLevel(upToDate, 13, [16]uint8{255, 255, 3}, tdx.UpToDate)}
		if got, err := verify(t, p, p.Body()); got != "UpToDate/UpToDate" {
			t.Error(got, err)
		}
	})
	t.Run("and the platform's for version 0", func(t *testing.T) {
		p := tdxtest.New(t)
		b := p.Body()
		b.TEETCBSVN = [16]byte{5, 0, 3}
		if got, err := verify(t, p, b); got != "UpToDate/" {
			t.Error(got, err)
		}
		b.TEETCBSVN[0] = 4
		if _, err := verify(t, p, b); fault.Code(err) != "tcb_unsupported" {
			t.Error(err)
		}
	})
	t.Run("a lower level is reached when the first is not", func(t *testing.T) {
		p := tdxtest.New(t)
		ext := tdxtest.Extension()
		ext.Components[4] = 3
		p.PCK = p.IssuePCK(p.PCKCA, ext, nil)
		if got, err := verify(t, p, p.Body()); got != "OutOfDate/UpToDate" {
			t.Error(got, err)
		}
	})
	t.Run("an older module is OutOfDate on a platform that is UpToDate", func(t *testing.T) {
		p := tdxtest.New(t)
		b := p.Body()
		b.TEETCBSVN[0] = 5
		if got, err := verify(t, p, b); got != "OutOfDate/OutOfDate" {
			t.Error(got, err)
		}
	})

	relaunch := func(p *platform, launched, now uint8) tdx.ReportBody {
		p.Header.Version = 5
		b := p.Body()
		b.V15 = true
		b.TEETCBSVN[0] = launched
		b.TEETCBSVN2 = [16]byte{now, 1, 3}
		return b
	}
	t.Run("a TD older than its module is advised to relaunch", func(t *testing.T) {
		p := tdxtest.New(t)
		if got, err := verify(t, p, relaunch(p, 4, 6)); got != "TDRelaunchAdvised/OutOfDate" {
			t.Error(got, err)
		}
	})
	t.Run("and told of the configuration", func(t *testing.T) {
		p := tdxtest.New(t)
		p.TCBInfo["tcbLevels"].([]any)[0].(doc)["tcbStatus"] = tdx.ConfigurationNeeded
		if got, err := verify(t, p, relaunch(p, 4, 6)); got != "TDRelaunchAdvisedConfigurationNeeded/OutOfDate" {
			t.Error(got, err)
		}
	})
	t.Run("but not while its module is still old", func(t *testing.T) {
		p := tdxtest.New(t)
		if got, err := verify(t, p, relaunch(p, 4, 5)); got != "OutOfDate/OutOfDate" {
			t.Error(got, err)
		}
	})
	t.Run("nor while the platform is old", func(t *testing.T) {
		p := tdxtest.New(t)
		p.TCBInfo["tcbLevels"].([]any)[0].(doc)["tcbStatus"] = tdx.OutOfDate
		if got, err := verify(t, p, relaunch(p, 4, 6)); got != "OutOfDate/OutOfDate" {
			t.Error(got, err)
		}
	})
	t.Run("nor while the quoting enclave is old", func(t *testing.T) {
		p := tdxtest.New(t)
		putU16(p, tdx.QEOffISVSVN, 3)
		if got, err := verify(t, p, relaunch(p, 4, 6)); got != "OutOfDate/OutOfDate" {
			t.Error(got, err)
		}
	})
	t.Run("nor with a present module that nobody knows", func(t *testing.T) {
		p := tdxtest.New(t)
		b := relaunch(p, 4, 6)
		b.TEETCBSVN2[1] = 9
		if _, err := verify(t, p, b); fault.Code(err) != "module_unknown" {
			t.Error(err)
		}
	})
}

// Every item of the collateral counts: corrupting any byte string of it is
// noticed ("fetched means verified", threats.md B06).
func TestThreat_B06_EveryCollateralItemIsVerified(t *testing.T) {
	p := tdxtest.New(t)
	quote, roots := p.Quote(p.Body()), []attest.Roots{p.Roots()}
	for name, corrupt := range map[string]func(*collateral.TDX){
		"pck_crl_issuer_chain":     func(c *collateral.TDX) { c.PCKCRLIssuerChain = garble(c.PCKCRLIssuerChain) },
		"root_ca_crl":              func(c *collateral.TDX) { c.RootCACRL[len(c.RootCACRL)-1] ^= 1 },
		"pck_crl":                  func(c *collateral.TDX) { c.PCKCRL[len(c.PCKCRL)-1] ^= 1 },
		"tcb_info_issuer_chain":    func(c *collateral.TDX) { c.TCBInfoIssuerChain = garble(c.TCBInfoIssuerChain) },
		"tcb_info":                 func(c *collateral.TDX) { c.TCBInfo = garble(c.TCBInfo) },
		"tcb_info_signature":       func(c *collateral.TDX) { c.TCBInfoSignature[0] ^= 1 },
		"qe_identity_issuer_chain": func(c *collateral.TDX) { c.QEIdentityIssuerChain = garble(c.QEIdentityIssuerChain) },
		"qe_identity":              func(c *collateral.TDX) { c.QEIdentity = garble(c.QEIdentity) },
		"qe_identity_signature":    func(c *collateral.TDX) { c.QEIdentitySignature[63] ^= 1 },
	} {
		col := p.Collateral()
		if _, err := tdxtest.Verify(quote, col, roots, tdxtest.At); err != nil {
			t.Fatal(err)
		}
		corrupt(&col)
		if _, err := tdxtest.Verify(quote, col, roots, tdxtest.At); fault.Code(err) == "" {
			t.Errorf("%s corrupted: err = %v", name, err)
		}
	}
}

// garble changes one character in the middle of a text.
func garble(s string) string {
	b := []byte(s)
	i := len(b) / 3
	if b[i]++; b[i] == '\n'+1 {
		b[i-1]++
	}
	return string(b)
}

// tb is how a mutation, which has no test at hand, makes another platform.
func tb(p *platform) testing.TB { return p.TB() }

// fakeIssuer returns an authority that x509 lets sign a CRL.
func fakeIssuer(a tdxtest.Authority) tdxtest.Authority {
	c := *a.Cert
	c.KeyUsage |= x509.KeyUsageCRLSign
	return tdxtest.Authority{Key: a.Key, Cert: &c}
}

// otherCurve returns a PCK certificate over a P-384 key.
func otherCurve(p *platform) tdxtest.Authority {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		p.TB().Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(5), Subject: pkix.Name{CommonName: tdx.CNPCK}, NotBefore: tdxtest.Issued, NotAfter: tdxtest.NextUpdate}
	der, err := x509.CreateCertificate(rand.Reader, template, p.PCKCA.Cert, &key.PublicKey, p.PCKCA.Key)
	if err != nil {
		p.TB().Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.TB().Fatal(err)
	}
	return tdxtest.Authority{Key: key, Cert: cert}
}
