// SPDX-License-Identifier: Apache-2.0

package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/attest/tpm/tpmtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

type machine = tpmtest.Machine

var _ attest.Verify = tpm.Verify

// booted returns a machine with events in PCRs 0, 2 and 14; PCR 7 has none.
func booted(t testing.TB) *machine {
	m := tpmtest.New(t)
	boot(m)
	return m
}

func boot(m *machine) {
	m.PCRs, m.Events = [24][]byte{}, nil
	m.Measure(0, "firmware")
	m.Measure(2, "separator")
	m.Measure(2, "image")
	m.Measure(14, "runtime event")
}

var challenge = []byte("qualifying data")

func TestAGoodQuoteVerifies(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(*machine)
	}{
		{"an ECDSA P-256 key", func(*machine) {}},
		{"an ECDSA P-384 key with SHA-384", func(m *machine) { m.UseP384() }},
		{"a P-256 key with SHA-384", func(m *machine) { m.Hash = crypto.SHA384 }},
		{"an RSA key with PKCS #1 v1.5", func(m *machine) { m.UseRSA(tpm.AlgRSASSA) }},
		{"an RSA key with PSS", func(m *machine) { m.UseRSA(tpm.AlgRSAPSS) }},
		{"the SHA-384 bank", func(m *machine) { m.Bank = eventlog.BankSHA384 }},
		{"a quote beside TDX", func(*machine) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := tpmtest.New(t)
			c.set(m)
			boot(m)
			in := m.Input(m.Quote(challenge, 0, 2, 7, 14))
			if c.name == "a quote beside TDX" {
				in.Evidence.TEE = dstack.TDX
			}
			in.Roots = append([]attest.Roots{tpm.VendorRoots()}, in.Roots...)
			claims, err := tpm.Verify(in)
			if err != nil {
				t.Fatal(err)
			}
			if claims.TEE != dstack.TPM || claims.Trust != dstack.TrustDevelopment || !strings.Contains(claims.Root, attest.Fingerprint(m.Root.Cert)) || strings.Contains(claims.Root, "Test TPM Root") {
				t.Errorf("%s, trust %s under %s", claims.TEE, claims.Trust, claims.Root)
			}
			if !bytes.Equal(claims.ReportData, challenge) || claims.Debug {
				t.Errorf("report data %q, debug %v", claims.ReportData, claims.Debug)
			}
			if claims.DeviceID != sha256.Sum256(m.AK.Cert.RawSubjectPublicKeyInfo) || claims.DeviceScheme != "ak" {
				t.Errorf("device %s of scheme %q", claims.DeviceID, claims.DeviceScheme)
			}
			got := *claims.TPM
			if got.Clock != 123456789 || got.ResetCount != 7 || got.RestartCount != 1 || !got.Safe || got.FirmwareVersion != 0x2016051100162800 || got.AKSubject != "CN=test attestation key" {
				t.Errorf("claims = %+v", got)
			}
			pcrs := claims.PCRs()
			if len(pcrs) != 4 || !bytes.Equal(pcrs[2], m.Register(2)) || !bytes.Equal(pcrs[7], make([]byte, m.Bank.Size())) {
				t.Errorf("registers = %x", pcrs)
			}
			if !claims.Expires.Equal(tpmtest.NextUpdate) || !claims.At.Equal(tpmtest.At) {
				t.Errorf("at %s until %s", claims.At, claims.Expires)
			}
		})
	}
}

// mutation is one attack: what the attacker changes, at one of several places, and
// the reason of the refusal. Everything around the change is signed as it should be.
type mutation struct {
	name, code string
	text       string                   // what the message says, where one code stands for several checks
	machine    func(m *machine)         // before anything is signed
	attest     func(a *tpm.Attest)      // before the TPM signs
	message    func(b []byte) []byte    // the same, as bytes
	quote      func(q *attest.TPMQuote) // after it signed
	input      func(m *machine, in *attest.Input)
}

func reissueAK(edit func(*x509.Certificate)) func(*machine) {
	return func(m *machine) {
		m.AK = m.Issue(m.Intermediate, m.AK.Key.(*ecdsa.PrivateKey), "test attestation key", edit)
	}
}

func reissueIntermediate(edit func(*x509.Certificate)) func(*machine) {
	return func(m *machine) {
		m.Intermediate = m.IssueCA(m.Root, "Test TPM Intermediate", edit)
		m.AK = m.Issue(m.Intermediate, m.P256(), "test attestation key", nil)
		m.Certificates = []tpmtest.Authority{m.Intermediate}
		m.CRLs[1].Issuer = m.Intermediate
	}
}

// deepen puts n authorities between the root and the attestation key.
func deepen(n int) func(*machine) {
	return func(m *machine) {
		above := m.Root
		m.Certificates, m.CRLs = nil, m.CRLs[:1]
		for i := range n {
			above = m.IssueCA(above, fmt.Sprint("authority ", i), nil)
			m.Certificates = append(m.Certificates, above)
			m.CRLs = append(m.CRLs, tpmtest.CRL{Issuer: above, ThisUpdate: tpmtest.Issued, NextUpdate: tpmtest.NextUpdate})
		}
		m.AK = m.Issue(above, m.P256(), "test attestation key", nil)
	}
}

func mutations() []mutation {
	var list []mutation
	add := func(code, name string, m mutation) {
		m.name, m.code = name, code
		list = append(list, m)
	}
	cut := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:n] } }
	put := func(off int, v ...byte) func([]byte) []byte {
		return func(b []byte) []byte { copy(b[off:], v); return b }
	}
	// Offsets in a message with a name of 34 and qualifying data of 15 bytes.
	const (
		nameOff  = 6
		extraOff = nameOff + 2 + 34
		safeOff  = extraOff + 2 + 15 + 16
		countOff = safeOff + 1 + 8
		sizeOff  = countOff + 4 + 2
	)

	// Evidence.
	add("tpm_missing", "no evidence", mutation{input: func(_ *machine, in *attest.Input) { in.Evidence = nil }})
	add("tpm_missing", "evidence without a TPM quote", mutation{input: func(_ *machine, in *attest.Input) { in.Evidence.TPMQuote = nil }})
	add("tpm_tee", "B19: a TPM quote in evidence of SEV-SNP", mutation{input: func(_ *machine, in *attest.Input) { in.Evidence.TEE = dstack.SEVSNP }})

	// TPMS_ATTEST.
	add("tpm_message_malformed", "an empty message", mutation{message: cut(0)})
	add("tpm_message_malformed", "a message cut inside the qualified signer", mutation{message: cut(20)})
	add("tpm_message_malformed", "a message cut inside the digest", mutation{message: func(b []byte) []byte { return b[:len(b)-1] }})
	add("tpm_message_malformed", "a byte after the message", mutation{message: func(b []byte) []byte { return append(b, 0) }})
	add("tpm_message_malformed", "B15: a message beyond the size limit", mutation{message: func(b []byte) []byte { return append(b, make([]byte, tpm.MaxMessage)...) }, text: "exceeds 1024"})
	add("tpm_message_malformed", "B15: a qualified signer of 65535 bytes", mutation{message: put(nameOff, 0xff, 0xff)})
	add("tpm_message_malformed", "qualifying data longer than TPMs take", mutation{attest: func(a *tpm.Attest) { a.ExtraData = make([]byte, 67) }})
	add("tpm_message_malformed", "a boolean of 2", mutation{message: put(safeOff, 2)})
	add("tpm_message_malformed", "B15: 2^32-1 selections", mutation{message: put(countOff, 0xff, 0xff, 0xff, 0xff)})
	add("tpm_message_malformed", "B15: nine selections", mutation{attest: func(a *tpm.Attest) { a.Banks = slices.Repeat(a.Banks, 9) }})
	add("tpm_message_malformed", "a bitmap of 5 bytes", mutation{message: func(b []byte) []byte {
		b[sizeOff] = 5
		return slices.Insert(b, sizeOff+4, 0, 0)
	}})
	add("tpm_message_malformed", "a digest longer than any hash", mutation{attest: func(a *tpm.Attest) { a.PCRDigest = make([]byte, 65) }})
	add("tpm_magic", "data that the TPM was only asked to sign", mutation{message: put(0, 0xfe)})
	add("tpm_type", "a certification of a key", mutation{message: put(5, 0x17)})

	// TPMT_SIGNATURE.
	add("tpm_signature_malformed", "no signature", mutation{quote: func(q *attest.TPMQuote) { q.Signature = nil }})
	add("tpm_signature_malformed", "a signature cut short", mutation{quote: func(q *attest.TPMQuote) { q.Signature = q.Signature[:len(q.Signature)-1] }})
	add("tpm_signature_malformed", "a byte after the signature", mutation{quote: func(q *attest.TPMQuote) { q.Signature = append(q.Signature, 0) }})
	add("tpm_signature_malformed", "B15: an ECDSA scalar of 49 bytes", mutation{quote: func(q *attest.TPMQuote) {
		q.Signature = append([]byte{0, 0x18, 0, 0xB, 0, 49}, make([]byte, 60)...)
	}})
	add("tpm_signature_malformed", "B15: a signature beyond the size limit", mutation{quote: func(q *attest.TPMQuote) { q.Signature = append(q.Signature, make([]byte, tpm.MaxSignature)...) }, text: "exceeds 1024"})
	add("tpm_signature_scheme", "a signature over SHA-1", mutation{machine: func(m *machine) { m.Hash = crypto.SHA1 }})
	add("tpm_signature_scheme", "an HMAC for a signature", mutation{quote: func(q *attest.TPMQuote) { q.Signature[1] = 0x05 }})
	add("tpm_signature_scheme", "RSASSA with SHA-384", mutation{quote: func(q *attest.TPMQuote) { q.Signature = append([]byte{0, 0x14, 0, 0xC, 0, 1}, 0) }})
	add("tpm_signature", "a changed message", mutation{quote: func(q *attest.TPMQuote) { q.Message[extraOff+2] ^= 1 }})
	add("tpm_signature", "a changed signature", mutation{quote: func(q *attest.TPMQuote) { q.Signature[len(q.Signature)-1] ^= 1 }})
	add("tpm_signature", "scalars of zero", mutation{quote: func(q *attest.TPMQuote) { q.Signature = []byte{0, 0x18, 0, 0xB, 0, 0, 0, 0} }})
	add("tpm_signature", "a certificate of another key of the same authority", mutation{machine: nil, input: func(m *machine, in *attest.Input) {
		in.Evidence.TPMQuote.AKCert = m.Issue(m.Intermediate, m.P256(), "another key", nil).Cert.Raw
	}})
	add("tpm_signature", "a changed RSA signature", mutation{machine: func(m *machine) { m.UseRSA(tpm.AlgRSASSA) }, quote: func(q *attest.TPMQuote) { q.Signature[9] ^= 1 }})
	add("tpm_signature", "a changed PSS signature", mutation{machine: func(m *machine) { m.UseRSA(tpm.AlgRSAPSS) }, quote: func(q *attest.TPMQuote) { q.Signature[9] ^= 1 }})
	add("tpm_signature", "a PSS signature that is said to be PKCS #1 v1.5", mutation{machine: func(m *machine) { m.UseRSA(tpm.AlgRSAPSS) }, quote: func(q *attest.TPMQuote) { q.Signature[1] = 0x14 }})

	// The attestation key.
	add("ak_key", "an RSA key of 1024 bits", mutation{machine: func(m *machine) {
		m.Scheme, m.AK = tpm.AlgRSASSA, m.Issue(m.Intermediate, weakRSA(m), "test attestation key", nil)
	}})
	add("ak_key", "an ECDSA signature for an RSA key", mutation{input: func(m *machine, in *attest.Input) {
		in.Evidence.TPMQuote.AKCert = m.Issue(m.Intermediate, m.RSA(2048), "rsa", nil).Cert.Raw
	}})
	add("ak_key", "an RSA signature for an ECDSA key", mutation{machine: func(m *machine) { m.UseRSA(tpm.AlgRSASSA) }, input: func(m *machine, in *attest.Input) {
		in.Evidence.TPMQuote.AKCert = m.Issue(m.Intermediate, m.P256(), "ecdsa", nil).Cert.Raw
	}})
	add("ak_key", "a P-224 key", mutation{machine: func(m *machine) {
		key, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
		m.AK = m.Issue(m.Intermediate, key, "test attestation key", nil)
	}})
	add("ak_key", "an Ed25519 key", mutation{input: func(m *machine, in *attest.Input) {
		_, key, _ := ed25519.GenerateKey(rand.Reader)
		in.Evidence.TPMQuote.AKCert = m.Issue(m.Intermediate, key, "ed25519", nil).Cert.Raw
	}})
	add("ak_cert_malformed", "no certificate", mutation{quote: func(q *attest.TPMQuote) { q.AKCert = nil }})
	add("ak_cert_malformed", "a certificate with a byte after it", mutation{quote: func(q *attest.TPMQuote) { q.AKCert = append(bytes.Clone(q.AKCert), 0) }})
	add("ak_cert_malformed", "B15: a certificate beyond the size limit", mutation{quote: func(q *attest.TPMQuote) { q.AKCert = make([]byte, 16<<10+1) }, text: "more than 16384"})
	add("ak_key_usage", "a certificate of an endorsement key", mutation{machine: reissueAK(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })})
	add("ak_is_ca", "a certificate of an authority", mutation{machine: reissueAK(func(c *x509.Certificate) { c.IsCA = true })})
	add("ak_eku", "a certificate for a web server", mutation{machine: reissueAK(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })})
	add("ak_eku", "a certificate for any purpose", mutation{machine: reissueAK(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} })})
	add("ak_eku", "an authority over web servers", mutation{machine: reissueIntermediate(func(c *x509.Certificate) {
		c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})})
	add("chain_extension", "a certificate with an unknown critical extension", mutation{machine: reissueAK(func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
	})})
	add("chain_extension", "an authority that constrains names", mutation{machine: reissueIntermediate(func(c *x509.Certificate) {
		c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"example.com"}, true
	})})
	add("ak_cert_expired", "a certificate that has ended", mutation{machine: reissueAK(func(c *x509.Certificate) { c.NotAfter = tpmtest.At.Add(-time.Second) })})
	add("ak_cert_expired", "a certificate that is not valid yet", mutation{machine: reissueAK(func(c *x509.Certificate) { c.NotBefore = tpmtest.At.Add(time.Second) })})
	add("ak_issuer_expired", "an authority that has ended", mutation{machine: reissueIntermediate(func(c *x509.Certificate) { c.NotAfter = tpmtest.At.Add(-time.Second) })})
	add("root_expired", "a root that has ended", mutation{machine: reissueAK(func(c *x509.Certificate) { c.NotAfter = tpmtest.At.AddDate(30, 0, 0) }), input: func(m *machine, in *attest.Input) {
		root := m.Certify(tpmtest.Authority{Key: m.Root.Key}, m.Root.Key.Public(), "Test TPM Root", func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage, c.NotAfter = true, x509.KeyUsageCertSign, tpmtest.At.Add(-time.Second)
			c.SubjectKeyId = m.Root.Cert.SubjectKeyId
		})
		in.Roots[0].CA = []*x509.Certificate{root}
	}})

	// Roots and the way to them.
	add("no_roots", "no roots at all", mutation{input: func(_ *machine, in *attest.Input) { in.Roots = nil }})
	add("no_roots", "B19: roots of another TEE only", mutation{input: func(_ *machine, in *attest.Input) { in.Roots[0].TEE = dstack.SEVSNP }})
	add("unknown_root", "a simulated quote against the vendor's root", mutation{input: func(_ *machine, in *attest.Input) { in.Roots = []attest.Roots{tpm.VendorRoots()} }})
	add("unknown_root", "another machine's root of the same name", mutation{input: func(m *machine, in *attest.Input) { in.Roots = []attest.Roots{tpmtest.New(m.TB()).Roots()} }})
	add("unknown_root", "the root among the collateral only", mutation{input: func(m *machine, in *attest.Input) {
		in.Collateral.Certificates = append(in.Collateral.Certificates, m.Root.Cert.Raw)
		in.Roots = []attest.Roots{tpm.VendorRoots()}
	}})
	add("unknown_root", "no collateral", mutation{input: func(_ *machine, in *attest.Input) { in.Collateral = nil }})
	add("unknown_root", "the intermediate left out", mutation{input: func(_ *machine, in *attest.Input) { in.Collateral.Certificates = nil }})
	add("unknown_root", "an attestation key that issues another", mutation{machine: func(m *machine) {
		m.AK = m.Issue(m.AK, m.P256(), "test attestation key of an attestation key", nil)
	}})
	add("unknown_root", "a certificate that names another issuer than the one that signed it", mutation{machine: func(m *machine) {
		m.AK.Cert = m.Certify(tpmtest.Authority{Key: m.Intermediate.Key, Cert: selfNamed(m)}, m.AK.Key.Public(), "test attestation key", nil)
	}})
	add("unknown_root", "an authority that may not issue certificates", mutation{machine: reissueIntermediate(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })})
	add("unknown_root", "an intermediate with a key of 1024 bits", mutation{machine: func(m *machine) {
		m.Intermediate = m.Issue(m.Root, weakRSA(m), "weak", func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign })
		m.AK = m.Issue(m.Intermediate, m.P256(), "test attestation key", nil)
		m.Certificates, m.CRLs[1].Issuer = []tpmtest.Authority{m.Intermediate}, m.Intermediate
	}})
	add("unknown_root", "a self-signed root for the attestation key's certificate", mutation{input: func(m *machine, in *attest.Input) { in.Evidence.TPMQuote.AKCert = m.Root.Cert.Raw }})
	add("chain_length", "B15: a chain of nine certificates", mutation{machine: deepen(7)})
	add("chain_path_length", "an authority below one that allows none", mutation{machine: func(m *machine) {
		first := m.IssueCA(m.Root, "first", func(c *x509.Certificate) { c.MaxPathLenZero = true })
		m.Intermediate = m.IssueCA(first, "second", nil)
		m.AK = m.Issue(m.Intermediate, m.P256(), "test attestation key", nil)
		m.Certificates, m.CRLs = []tpmtest.Authority{first, m.Intermediate}, append(m.CRLs[:1], tpmtest.CRL{Issuer: first, ThisUpdate: tpmtest.Issued, NextUpdate: tpmtest.NextUpdate}, tpmtest.CRL{Issuer: m.Intermediate, ThisUpdate: tpmtest.Issued, NextUpdate: tpmtest.NextUpdate})
	}})
	add("collateral_too_large", "B15: 65 certificates", mutation{input: func(_ *machine, in *attest.Input) { in.Collateral.Certificates = make([]collateral.Hex, 65) }})

	// Revocation.
	revoke := func(list int, serial func(m *machine) *big.Int) func(*machine) {
		return func(m *machine) { m.CRLs[list].Revoked = []*big.Int{big.NewInt(1), serial(m)} }
	}
	add("ak_revoked", "B02: a revoked attestation key", mutation{machine: revoke(1, func(m *machine) *big.Int { return m.AK.Cert.SerialNumber })})
	add("ak_issuer_revoked", "B02: a revoked authority", mutation{machine: revoke(0, func(m *machine) *big.Int { return m.Intermediate.Cert.SerialNumber })})
	add("ak_revoked", "B02: an older list beside one that revokes", mutation{machine: func(m *machine) {
		newer := m.CRLs[1]
		newer.Revoked = []*big.Int{m.AK.Cert.SerialNumber}
		m.CRLs = append(m.CRLs, newer)
	}})
	add("crl_missing", "B02: no list of the authority", mutation{machine: func(m *machine) { m.CRLs = m.CRLs[:1] }})
	add("crl_missing", "B02: no list of the root", mutation{machine: func(m *machine) { m.CRLs = m.CRLs[1:] }})
	add("crl_malformed", "a list that is not DER", mutation{input: func(_ *machine, in *attest.Input) { in.Collateral.CRLs[1] = []byte("junk") }})
	add("crl_malformed", "a list with a byte after it", mutation{input: func(_ *machine, in *attest.Input) { in.Collateral.CRLs[1] = append(in.Collateral.CRLs[1], 0) }})
	add("crl_malformed", "a list of the issuer that is cut inside", mutation{input: func(m *machine, in *attest.Input) {
		in.Collateral.CRLs[1], _ = asn1.Marshal(struct {
			TBS struct{ Algorithm, Issuer asn1.RawValue }
		}{struct{ Algorithm, Issuer asn1.RawValue }{asn1.NullRawValue, asn1.RawValue{FullBytes: m.Intermediate.Cert.RawSubject}}})
	}})
	add("crl_partial", "a delta list", mutation{machine: func(m *machine) {
		m.CRLs[1].Extensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}}}
	}})
	add("crl_signature", "a list of an authority of the same name", mutation{machine: func(m *machine) { m.CRLs[1].Issuer = m.IssueCA(m.Root, "Test TPM Intermediate", nil) }})
	add("crl_not_yet_valid", "a list of tomorrow", mutation{machine: func(m *machine) { m.CRLs[1].ThisUpdate = tpmtest.At.AddDate(0, 0, 1) }})
	add("crl_expired", "B02: a list of last year", mutation{machine: func(m *machine) {
		m.CRLs[1].ThisUpdate, m.CRLs[1].NextUpdate = tpmtest.At.AddDate(-1, 0, 0), tpmtest.At.Add(-time.Second)
	}})

	// Registers.
	add("tpm_bank_count", "no bank", mutation{attest: func(a *tpm.Attest) { a.Banks = nil }})
	add("tpm_bank_count", "two banks", mutation{attest: func(a *tpm.Attest) { a.Banks = append(a.Banks, tpm.Selection{Hash: tpm.AlgSHA384}) }})
	add("tpm_bank_weak", "the SHA-1 bank", mutation{attest: func(a *tpm.Attest) { a.Banks[0].Hash = tpm.AlgSHA1 }})
	add("tpm_bank", "a bank that nobody knows", mutation{attest: func(a *tpm.Attest) { a.Banks[0].Hash = 0x12 }})
	add("tpm_pcr_none", "no register", mutation{attest: func(a *tpm.Attest) { a.Banks[0].PCRs = nil }})
	add("tpm_pcr_selection", "a register more than quoted", mutation{attest: func(a *tpm.Attest) { a.Banks[0].PCRs = []uint32{0, 2, 7} }})
	add("tpm_pcr_selection", "a register less than quoted", mutation{quote: func(q *attest.TPMQuote) { q.PCRs = q.PCRs[:3] }})
	add("tpm_pcr_selection", "registers in another order", mutation{quote: func(q *attest.TPMQuote) { q.PCRs[0], q.PCRs[1] = q.PCRs[1], q.PCRs[0] }})
	add("tpm_pcr_selection", "a register under another's number", mutation{quote: func(q *attest.TPMQuote) { q.PCRs[2].Index = 8 }})
	add("tpm_pcr_algorithm", "values of another bank", mutation{quote: func(q *attest.TPMQuote) { q.PCRs[1].Algorithm = "sha384" }})
	add("tpm_pcr_length", "B17: a register of 31 bytes", mutation{quote: func(q *attest.TPMQuote) { q.PCRs[1].Value = q.PCRs[1].Value[:31] }})
	add("tpm_pcr_length", "B17: bytes moved from one register to the next", mutation{quote: func(q *attest.TPMQuote) {
		v := slices.Concat(q.PCRs[0].Value, q.PCRs[1].Value)
		q.PCRs[0].Value, q.PCRs[1].Value = v[:31], v[31:]
	}})
	add("tpm_pcr_digest", "a changed register", mutation{quote: func(q *attest.TPMQuote) { q.PCRs[2].Value = bytes.Repeat([]byte{1}, 32) }})
	add("tpm_pcr_digest", "a digest cut to the length of another hash", mutation{attest: func(a *tpm.Attest) { a.PCRDigest = a.PCRDigest[:20] }})

	// The event log.
	add("tpm_log_mismatch", "an event less", mutation{quote: func(q *attest.TPMQuote) { q.EventLog = slices.Delete(q.EventLog, 1, 2) }})
	add("tpm_log_mismatch", "an event more", mutation{quote: func(q *attest.TPMQuote) { q.EventLog = append(q.EventLog, q.EventLog[0]) }})
	add("tpm_log_mismatch", "two events exchanged", mutation{quote: func(q *attest.TPMQuote) { q.EventLog[1], q.EventLog[2] = q.EventLog[2], q.EventLog[1] }})
	add("tpm_log_mismatch", "an event of an untouched register", mutation{quote: func(q *attest.TPMQuote) {
		q.EventLog = append(q.EventLog, attest.PCREvent{Index: 7, Digest: make([]byte, 32)})
	}})
	add("tpm_log_pcr", "B19: an event of a register that is not quoted", mutation{quote: func(q *attest.TPMQuote) {
		q.EventLog = append(q.EventLog, attest.PCREvent{Index: 8, Digest: make([]byte, 32)})
	}})
	for _, n := range []int{0, 20, 31, 33, 64} {
		add("tpm_log_digest", fmt.Sprintf("B17: a digest of %d bytes", n), mutation{quote: func(q *attest.TPMQuote) { q.EventLog[1].Digest = make([]byte, n) }})
	}
	add("tpm_log_size", "B15: 10001 events", mutation{quote: func(q *attest.TPMQuote) { q.EventLog = make([]attest.PCREvent, eventlog.MaxEvents+1) }})
	return list
}

func weakRSA(m *machine) crypto.Signer {
	m.TB().Setenv("GODEBUG", "rsa1024min=0")
	return m.RSA(1024)
}

// verify applies a mutation to a machine that verifies without it.
func verify(t *testing.T, c mutation) (*attest.Claims, error) {
	m := booted(t)
	if c.machine != nil {
		c.machine(m)
	}
	m.EditAttest, m.EditMessage = c.attest, c.message
	q := m.Quote(challenge, 0, 2, 7, 14)
	if c.quote != nil {
		c.quote(q)
	}
	in := m.Input(q)
	if c.input != nil {
		c.input(m, &in)
	}
	return tpm.Verify(in)
}

func TestEveryMutationIsRefusedForItsOwnReason(t *testing.T) {
	for _, c := range mutations() {
		t.Run(c.name, func(t *testing.T) {
			claims, err := verify(t, c)
			if fault.Code(err) != c.code || claims != nil || !strings.Contains(fmt.Sprint(err), c.text) {
				t.Errorf("claims %v, err = %v (code %q), want %q %s", claims != nil, err, fault.Code(err), c.code, c.text)
			}
		})
	}
	if _, err := verify(t, mutation{}); err != nil {
		t.Errorf("without a mutation: %v", err)
	}
}

func TestChainsOfAnyAllowedShapeVerify(t *testing.T) {
	for _, c := range []struct {
		name    string
		machine func(*machine)
	}{
		{"a key certified by the root", func(m *machine) {
			m.AK = m.Issue(m.Root, m.P256(), "test attestation key", nil)
			m.Certificates, m.CRLs = nil, m.CRLs[:1]
		}},
		{"eight certificates", deepen(6)},
		{"a certificate without usages", reissueAK(func(c *x509.Certificate) { c.KeyUsage = 0 })},
		{"a certificate for TPM keys", reissueAK(func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{tpmtest.OIDEKCertificate} })},
		{"a certificate with the TPM's name in a critical extension", reissueAK(func(c *x509.Certificate) {
			name, _ := asn1.Marshal(pkix.Name{CommonName: "TPM"}.ToRDNSequence())
			san, _ := asn1.Marshal([]asn1.RawValue{{Class: 2, Tag: 4, IsCompound: true, Bytes: name}})
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}}
		})},
		{"a renewed authority beside its expired self", func(m *machine) {
			expired := m.Certify(m.Root, m.Intermediate.Key.Public(), "Test TPM Intermediate", func(c *x509.Certificate) {
				c.IsCA, c.KeyUsage, c.NotAfter = true, x509.KeyUsageCertSign, tpmtest.At.Add(-time.Second)
			})
			m.Certificates = []tpmtest.Authority{{Cert: expired}, m.Intermediate}
		}},
		{"a fresh list beside a stale one", func(m *machine) {
			stale := m.CRLs[1]
			stale.ThisUpdate, stale.NextUpdate = tpmtest.At.AddDate(-1, 0, 0), tpmtest.At.AddDate(0, -1, 0)
			m.CRLs = append([]tpmtest.CRL{stale}, append(m.CRLs, stale)...)
		}},
		{"lists and certificates of others", func(m *machine) {
			other := tpmtest.New(m.TB())
			m.CRLs = append(m.CRLs, tpmtest.CRL{Issuer: other.IssueCA(other.Root, "somebody else", nil), ThisUpdate: tpmtest.Issued, NextUpdate: tpmtest.NextUpdate, Revoked: []*big.Int{m.AK.Cert.SerialNumber}})
			m.Certificates = append(m.Certificates, other.Root, other.Intermediate)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := verify(t, mutation{machine: c.machine}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestClaimsEndWithTheFirstThingTheyRestOn(t *testing.T) {
	end := tpmtest.At.Add(time.Hour)
	c, err := verify(t, mutation{machine: reissueAK(func(c *x509.Certificate) { c.NotAfter = end })})
	if err != nil || !c.Expires.Equal(end) {
		t.Errorf("the certificate ends first: %v, %v", c, err)
	}
	c, err = verify(t, mutation{machine: func(m *machine) { m.CRLs[0].NextUpdate = end }})
	if err != nil || !c.Expires.Equal(end) {
		t.Errorf("the root's list ends first: %v, %v", c, err)
	}
}

func TestListsOfOtherIssuersAreNotRead(t *testing.T) {
	// A name, and nothing that a list has.
	name, _ := asn1.Marshal(pkix.Name{CommonName: "somebody else"}.ToRDNSequence())
	truncated, err := asn1.Marshal(struct {
		TBS struct{ Algorithm, Issuer asn1.RawValue }
	}{struct{ Algorithm, Issuer asn1.RawValue }{asn1.NullRawValue, asn1.RawValue{FullBytes: name}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = verify(t, mutation{input: func(_ *machine, in *attest.Input) { in.Collateral.CRLs = append(in.Collateral.CRLs, truncated) }})
	if err != nil {
		t.Error(err)
	}
}

func TestAMissingListThatIsAllowedIsNamed(t *testing.T) {
	allow := func(_ *machine, in *attest.Input) { in.Options.AllowMissingCRL = true }
	c, err := verify(t, mutation{input: allow})
	if err != nil || len(c.Unchecked) != 0 {
		t.Errorf("nothing is missing: %v, %q", err, c.Unchecked)
	}
	c, err = verify(t, mutation{machine: func(m *machine) { m.CRLs = m.CRLs[:1] }, input: allow})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.Unchecked, []string{"certificate revocation list of Test TPM Intermediate"}) {
		t.Errorf("unchecked = %q", c.Unchecked)
	}
	// A list that is there is judged all the same.
	for _, m := range mutations() {
		if !strings.HasPrefix(m.code, "crl_") && !strings.HasSuffix(m.code, "_revoked") || m.code == "crl_missing" {
			continue
		}
		before := m.input
		m.input = func(machine *machine, in *attest.Input) {
			if before != nil {
				before(machine, in)
			}
			in.Options.AllowMissingCRL = true
		}
		if _, err := verify(t, m); fault.Code(err) != m.code {
			t.Errorf("%s: err = %v, want %q", m.name, err, m.code)
		}
	}
}

func TestThreat_B02_RevocationIsEnforced(t *testing.T) { threat(t, "B02") }

func TestThreat_B17_ValuesOfAnotherLengthAreRefused(t *testing.T) { threat(t, "B17") }

func TestThreat_B19_EvidenceOfAnotherKindIsRefused(t *testing.T) { threat(t, "B19") }

// threat runs the mutations that stand for a row of the threat table.
func threat(t *testing.T, id string) {
	n := 0
	for _, c := range mutations() {
		if !strings.HasPrefix(c.name, id) {
			continue
		}
		n++
		if _, err := verify(t, c); fault.Code(err) != c.code {
			t.Errorf("%s: err = %v, want %q", c.name, err, c.code)
		}
	}
	if n == 0 {
		t.Error("no mutation is of this threat")
	}
}

func TestThreat_B08_AQuoteForAnotherNonceShowsItsOwn(t *testing.T) {
	m := booted(t)
	old, err := tpm.Verify(m.Input(m.Quote([]byte("nonce of the first verifier"), 0)))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(old.ReportData, []byte("nonce of the second verifier")) || string(old.ReportData) != "nonce of the first verifier" {
		t.Errorf("report data = %q", old.ReportData)
	}
	_, err = verify(t, mutation{quote: func(q *attest.TPMQuote) { copy(q.Message[bytes.Index(q.Message, challenge):], "QUALIFYING DATA") }})
	if fault.Code(err) != "tpm_signature" {
		t.Errorf("a nonce written over: %v", err)
	}
}

func TestThreat_B18_ATPMReportsNoTCBStatus(t *testing.T) {
	m := booted(t)
	c, err := tpm.Verify(m.Input(m.Quote(nil, 0)))
	if err != nil || c.TCBStatus != attest.NotReported || len(c.ReportData) != 0 {
		t.Errorf("status %q, report data %x, %v", c.TCBStatus, c.ReportData, err)
	}
}

// TestThreat_B15_HostileCollateralIsBounded gives the search for a chain the most
// expensive collateral that the limits admit, and the judgement of revocation 32
// lists of the greatest size.
func TestThreat_B15_HostileCollateralIsBounded(t *testing.T) {
	m := booted(t)
	// Authorities of one name that all sign themselves and none of which signed the key.
	var same []collateral.Hex
	for range collateral.MaxCerts {
		same = append(same, m.IssueCA(m.Root, "Test TPM Intermediate", func(c *x509.Certificate) { c.Subject.CommonName = "Test TPM Intermediate" }).Cert.Raw)
	}
	in := m.Input(m.Quote(nil, 0))
	in.Collateral.Certificates = same
	bounded(t, in, "unknown_root")

	// One key under one name, certified by itself over and over, beside many keys
	// that claim the name: each link costs a test of every certificate.
	loop := tpmtest.Authority{Key: m.Intermediate.Key}
	var ring []collateral.Hex
	for i := range collateral.MaxCerts {
		key := m.P256()
		if i%4 == 0 {
			key = m.Intermediate.Key.(*ecdsa.PrivateKey)
		}
		loop.Cert = m.Intermediate.Cert
		cert := m.Certify(tpmtest.Authority{Key: loop.Key, Cert: selfNamed(m)}, key.Public(), "ring", func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage, c.SubjectKeyId = true, x509.KeyUsageCertSign, nil
		})
		ring = append(ring, cert.Raw)
	}
	in = m.Input(m.Quote(nil, 0))
	in.Evidence.TPMQuote.AKCert = m.Certify(tpmtest.Authority{Key: loop.Key, Cert: selfNamed(m)}, m.AK.Key.Public(), "test attestation key", nil).Raw
	in.Collateral.Certificates = ring
	bounded(t, in, "chain_search")

	// The greatest lists, of 20-byte entries, said to be the intermediate's.
	entries := make([]x509.RevocationListEntry, 25000)
	for i := range entries {
		entries[i] = x509.RevocationListEntry{SerialNumber: big.NewInt(int64(i)), RevocationTime: tpmtest.Issued}
	}
	for len(entries) > 0 {
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: tpmtest.Issued, NextUpdate: tpmtest.NextUpdate, RevokedCertificateEntries: entries}, m.Intermediate.Cert, m.Intermediate.Key)
		if err != nil {
			t.Fatal(err)
		}
		if len(der) <= collateral.MaxCRL {
			in = m.Input(m.Quote(nil, 0))
			for len(in.Collateral.CRLs) < collateral.MaxCRLs {
				in.Collateral.CRLs = append(in.Collateral.CRLs, der)
			}
			break
		}
		entries = entries[:len(entries)*9/10]
	}
	bounded(t, in, "crl_too_large")
}

// selfNamed is a certificate that only lends its name to what it issues.
func selfNamed(m *machine) *x509.Certificate {
	c := *m.Intermediate.Cert
	c.RawSubject, _ = asn1.Marshal(pkix.Name{CommonName: "ring"}.ToRDNSequence())
	c.SubjectKeyId = nil
	return &c
}

// bounded verifies within 2 s and 32 MiB of live heap above what the input takes.
func bounded(t *testing.T, in attest.Input, code string) {
	t.Helper()
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	peak := make(chan uint64)
	stop := make(chan struct{})
	go func() {
		var most uint64
		for {
			select {
			case <-stop:
				peak <- most
				return
			case <-time.After(5 * time.Millisecond):
				var now runtime.MemStats
				runtime.ReadMemStats(&now)
				most = max(most, now.HeapAlloc)
			}
		}
	}()
	start := time.Now()
	_, err := tpm.Verify(in)
	took := time.Since(start)
	close(stop)
	most := <-peak
	if fault.Code(err) != code {
		t.Errorf("err = %v, want %q", err, code)
	}
	grown := int64(most) - int64(before.HeapAlloc)
	t.Logf("%v, %d KiB of heap", took, grown>>10)
	if took > 2*time.Second || grown > 32<<20 {
		t.Errorf("verification took %v and %d KiB of heap", took, grown>>10)
	}
}

func TestReplaySaysWhichRegistersTheLogExplains(t *testing.T) {
	m := booted(t)
	explained, unexplained, err := tpm.Replay(m.Quote(nil, 0, 2, 7, 14))
	if err != nil || !slices.Equal(explained, []uint32{0, 2, 14}) || !slices.Equal(unexplained, []uint32{7}) {
		t.Errorf("explained %d, unexplained %d, %v", explained, unexplained, err)
	}
	q := m.Quote(nil, 0, 2)
	q.EventLog = nil
	if explained, unexplained, err = tpm.Replay(q); err != nil || explained != nil || !slices.Equal(unexplained, []uint32{0, 2}) {
		t.Errorf("without a log: explained %d, unexplained %d, %v", explained, unexplained, err)
	}
	q = m.Quote(nil, 0)
	q.PCRs[0].Algorithm = "sha1"
	if _, _, err = tpm.Replay(q); fault.Code(err) != "tpm_log_digest" {
		t.Errorf("a bank that cannot be replayed: %v", err)
	}
}

func TestClaimsDoNotShareMemoryWithEvidence(t *testing.T) {
	m := booted(t)
	q := m.Quote(challenge, 0, 2)
	c, err := tpm.Verify(m.Input(q))
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(c.TPM.PCRs[0].Value)
	q.PCRs[0].Value[0] ^= 1
	clear(q.Message)
	if !bytes.Equal(c.TPM.PCRs[0].Value, want) || !bytes.Equal(c.ReportData, challenge) {
		t.Error("claims changed with the evidence")
	}
}

func TestRootsAreWhatTheySay(t *testing.T) {
	r := tpm.VendorRoots()
	if len(r.CA) != 1 || attest.Fingerprint(r.CA[0]) != tpm.GoogleRootSHA256 || r.Trust != dstack.TrustProduction || r.TEE != dstack.TPM {
		t.Errorf("vendor roots = %+v", r)
	}
	if err := r.CA[0].CheckSignatureFrom(r.CA[0]); err != nil {
		t.Errorf("the vendor's root does not sign itself: %v", err)
	}
	m := tpmtest.New(t)
	dev := m.DevRoots()
	got, err := tpm.DevelopmentRoots(dev)
	if err != nil || got.Trust != dstack.TrustDevelopment || !got.CA[0].Equal(m.Root.Cert) {
		t.Errorf("development roots = %+v, %v", got, err)
	}
	for name, pem := range map[string]string{
		"nothing": "", "no certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "the vendor's root": vendorPEM(t),
	} {
		dev.TPMRootPEM = pem
		if _, err := tpm.DevelopmentRoots(dev); fault.Code(err) != "dev_roots_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
