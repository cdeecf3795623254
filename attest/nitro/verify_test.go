// SPDX-License-Identifier: Apache-2.0

package nitro_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"runtime"
	"strings"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/cose"
	"github.com/dstack-go/dstack/attest/cose/cosetest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/nitro/nitrotest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

type module = nitrotest.Module

// The compiler holds Verify to the interface of every TEE.
var _ attest.Verify = nitro.Verify

func TestAGoodDocumentVerifies(t *testing.T) {
	for name, m := range map[string]*module{"enclave": nitrotest.New(t), "NitroTPM": nitrotest.NewTPM(t)} {
		t.Run(name, func(t *testing.T) {
			in := attest.Input{Evidence: m.Evidence(), Roots: append(nitro.VendorRoots(), m.Roots()...), At: nitrotest.At}
			c, err := nitro.Verify(in)
			if err != nil {
				t.Fatal(err)
			}
			if c.TEE != m.TEE || c.Trust != dstack.TrustDevelopment || !strings.HasPrefix(c.Root, "a development root (sha256 ") {
				t.Errorf("%s, %s under %s", c.TEE, c.Trust, c.Root)
			}
			if want := bytes.Repeat([]byte{0xda}, 64); !bytes.Equal(c.ReportData, want) || !bytes.Equal(c.Nitro.UserData, want) ||
				string(c.Nitro.Nonce) != "nonce" || c.Nitro.PublicKey != nil {
				t.Errorf("claims %+v", c.Nitro)
			}
			device := map[dstack.TEE]string{dstack.Nitro: "i-0123456789abcdef0", dstack.NitroTPM: "i-0123456789abcdef0-tpm0000000000000000"}[m.TEE]
			if c.DeviceID != sha256.Sum256([]byte(device)) || c.DeviceScheme != "nitro-module" {
				t.Errorf("device %s of scheme %s", c.DeviceID, c.DeviceScheme)
			}
			if !c.Made.Equal(nitrotest.At) || !c.At.Equal(nitrotest.At) || !c.Expires.Equal(nitrotest.At.Add(3*time.Hour)) {
				t.Errorf("made %s, at %s, until %s", c.Made, c.At, c.Expires)
			}
			if n := map[dstack.TEE]int{dstack.Nitro: 16, dstack.NitroTPM: 24}[m.TEE]; len(c.Nitro.PCRs) != n || c.Nitro.PCRs[7][0] != 0xc7 {
				t.Errorf("%d registers", len(c.Nitro.PCRs))
			}
			if c.Debug || len(c.Advisories) != 0 || c.Product != "" {
				t.Errorf("claims %+v", c)
			}
		})
	}
}

// AWS tells no security version. Upstream calls every NitroTPM UpToDate, so that a
// gate on it says nothing.
func TestThreat_B18_TheTCBStatusIsNotReported(t *testing.T) {
	for _, m := range []*module{nitrotest.New(t), nitrotest.NewTPM(t)} {
		c, err := nitro.Verify(attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At})
		if err != nil || c.TCBStatus != attest.NotReported || !c.TCBDate.IsZero() || c.TCBEvaluation != 0 {
			t.Errorf("%s: %+v, %v", m.TEE, c, err)
		}
	}
}

// mutation is one attack and the reason of its refusal. Everything around the
// change is signed as it should be.
type mutation struct {
	name, code string
	tpm        bool            // of a NitroTPM instead of an enclave
	module     func(m *module) // before signing
	quote      func([]byte) []byte
	evidence   func(e *attest.Evidence)
	collateral func(m *module) *collateral.Bundle
	roots      func(m *module) []attest.Roots
	at         time.Time
}

func mutations() []mutation {
	var list []mutation
	add := func(code, name string, m mutation) {
		m.name, m.code = name, code
		list = append(list, m)
	}
	member := func(key string, value any) mutation {
		return mutation{module: func(m *module) { m.Doc[key] = value }}
	}
	without := func(key string) mutation { return mutation{module: func(m *module) { delete(m.Doc, key) }} }
	pcr := func(index, value any) mutation {
		return mutation{module: func(m *module) { m.Doc["pcrs"].(cosetest.Map)[index] = value }}
	}

	// Frame and envelope.
	add("nitro_framing", "no document", mutation{quote: func([]byte) []byte { return nil }})
	add("nitro_framing", "17 bytes of a transport before the document", mutation{quote: func(q []byte) []byte { return append(make([]byte, 17), q...) }})
	add("nitro_framing", "a document that is not there", mutation{quote: func([]byte) []byte { return make([]byte, 4000) }})
	add("nitro_framing", "a document cut short in a transport", mutation{quote: func(q []byte) []byte { return append([]byte{0, 2}, q[:len(q)-1]...) }})
	add("cose_malformed", "a document cut short", mutation{quote: func(q []byte) []byte { return q[:len(q)-1] }})
	add("cose_malformed", "a byte after the document", mutation{quote: func(q []byte) []byte { return append(q, 0) }})
	add("cose_too_large", "B15: a document beyond the size limit", mutation{quote: func(q []byte) []byte { return append(q, make([]byte, cose.MaxMessage)...) }})
	add("cose_too_large", "B15: a transport's bytes beyond the size limit", mutation{quote: func(q []byte) []byte {
		return append(append([]byte{0}, q...), make([]byte, cose.MaxMessage)...)
	}})
	add("cose_tag", "a document under another tag", mutation{module: func(m *module) { m.Message.Tag = 98 }})
	add("cose_detached", "a document without its payload", mutation{module: func(m *module) { m.Message.Edit = func(p []any) { p[2] = nil } }})
	add("cose_critical", "a critical header that nobody knows", mutation{module: func(m *module) {
		m.Message.Protected = cosetest.Map{1: -35, 2: []any{4}, 4: []byte("kid")}
	}})
	add("cose_algorithm", "a document signed by EdDSA", mutation{module: func(m *module) { m.Message.Protected = cosetest.Map{1: -8} }})
	add("cose_signature_size", "a signature of 95 bytes", mutation{module: func(m *module) {
		m.Message.Edit = func(p []any) { p[3] = p[3].([]byte)[1:] }
	}})
	add("cose_signature", "a signature by another key", mutation{module: func(m *module) { m.Message.Key = cosetest.NewKey(m.TB(), elliptic.P384()) }})
	add("cose_signature", "a signature changed in one bit", mutation{quote: func(q []byte) []byte { q[len(q)-1] ^= 1; return q }})
	add("cose_signature", "user data changed after signing", mutation{quote: func(q []byte) []byte {
		return bytes.Replace(q, bytes.Repeat([]byte{0xda}, 64), append(bytes.Repeat([]byte{0xda}, 63), 0xdb), 1)
	}})
	add("nitro_algorithm", "a document signed by ES256", mutation{module: func(m *module) {
		m.Message.Algorithm, m.Message.Key = cose.ES256, cosetest.NewKey(m.TB(), elliptic.P256())
	}})

	// The document.
	add("nitro_document", "a document that is an array", mutation{module: func(m *module) { m.Message.Payload = cosetest.Marshal(m.TB(), []any{1}) }})
	add("nitro_document", "a document that is not CBOR", mutation{module: func(m *module) { m.Message.Payload = []byte{0xff} }})
	add("nitro_document", "a document with a member twice", mutation{module: func(m *module) {
		m.Message.Payload = []byte("\xa2\x66digest\x66SHA384\x66digest\x66SHA384")
	}})
	add("nitro_document", "B15: a document nested nine deep", mutation{module: func(m *module) {
		m.Message.Payload = append([]byte("\xa1\x61x"), append(bytes.Repeat([]byte{0x81}, 9), 0)...)
	}})
	add("nitro_document", "a document that does not end", mutation{module: func(m *module) { m.Message.Payload = []byte{0xbf} }})
	add("nitro_document", "a document with an open map inside", mutation{module: func(m *module) {
		m.Message.Payload = []byte("\xbf\x61x\xbf\xff\xff")
	}})
	add("nitro_module_id", "no module id", without("module_id"))
	add("nitro_module_id", "an empty module id", member("module_id", ""))
	add("nitro_module_id", "a module id of bytes", member("module_id", []byte("i-1-enc2")))
	add("nitro_module_id", "a module id with a line feed", member("module_id", "i-1-enc2\n"))
	add("nitro_module_id", "a module id of 129 bytes", member("module_id", "i-"+strings.Repeat("1", 122)+"-enc2"))
	add("nitro_module_id", "an enclave's module id without an enclave", member("module_id", "i-0123456789abcdef0"))
	add("nitro_module_id", "an enclave's module id without an instance", member("module_id", "-enc1"))
	add("nitro_module_id", "an enclave's module id that ends early", member("module_id", "i-0123456789abcdef0-enc"))
	add("nitro_digest", "no digest", without("digest"))
	add("nitro_digest", "registers of SHA256", member("digest", "SHA256"))
	add("nitro_digest", "a digest in lower case", member("digest", "sha384"))
	add("nitro_timestamp", "no timestamp", without("timestamp"))
	add("nitro_timestamp", "a timestamp of zero", member("timestamp", 0))
	add("nitro_timestamp", "a timestamp before 1970", member("timestamp", -1))
	add("nitro_timestamp", "a timestamp after the year 9999", member("timestamp", uint64(253402300800000)))
	add("nitro_timestamp", "a timestamp beyond 63 bits", member("timestamp", uint64(1)<<63))
	add("nitro_timestamp", "a timestamp that is a fraction", member("timestamp", 1.5e12))
	add("nitro_future", "a document made more than 300 s ahead", member("timestamp", uint64(nitrotest.At.Add(300*time.Second+time.Millisecond).UnixMilli())))
	add("nitro_pcrs", "registers in an array", member("pcrs", []any{make([]byte, 48)}))
	add("nitro_pcr_index", "a register of number 32", pcr(32, make([]byte, 48)))
	add("nitro_pcr_index", "a register of number -1", pcr(-1, make([]byte, 48)))
	add("nitro_pcr_index", "a register with a name", pcr("0", make([]byte, 48)))
	add("nitro_pcr_size", "B17: a register of 47 bytes", pcr(3, make([]byte, 47)))
	add("nitro_pcr_size", "B17: a register of 49 bytes", pcr(3, make([]byte, 49)))
	add("nitro_pcr_size", "B17: a register of 32 bytes", pcr(0, make([]byte, 32)))
	add("nitro_pcr_size", "B17: an empty register", pcr(3, []byte{}))
	add("nitro_pcr_size", "a register that is null", pcr(3, nil))
	for index := range 3 {
		add("nitro_pcr_missing", "no register "+string(rune('0'+index)), mutation{module: func(m *module) { delete(m.Doc["pcrs"].(cosetest.Map), index) }})
	}
	for _, index := range []int{4, 7, 12} {
		add("nitro_pcr_missing", "a NitroTPM without register "+big.NewInt(int64(index)).String(), mutation{tpm: true, module: func(m *module) {
			delete(m.Doc["nitrotpm_pcrs"].(cosetest.Map), index)
		}})
	}
	add("nitro_pcr_index", "a NitroTPM's register of number 24", mutation{tpm: true, module: func(m *module) {
		m.Doc["nitrotpm_pcrs"].(cosetest.Map)[24] = make([]byte, 48)
	}})
	add("nitro_public_key", "a public key of 1025 bytes", member("public_key", make([]byte, 1025)))
	add("nitro_public_key", "a public key of text", member("public_key", "key"))
	add("nitro_user_data", "user data of 513 bytes", member("user_data", make([]byte, 513)))
	add("nitro_user_data", "user data that are numbers", member("user_data", []any{1, 2, 3}))
	add("nitro_nonce", "a nonce of 513 bytes", member("nonce", make([]byte, 513)))
	add("nitro_nonce", "a nonce of text", member("nonce", "nonce"))
	add("nitro_certificate", "a certificate that is null", member("certificate", nil))
	add("nitro_certificate", "a certificate that is not DER", member("certificate", []byte("junk")))
	add("nitro_certificate", "a certificate of 4097 bytes", member("certificate", make([]byte, 4097)))
	add("nitro_cabundle", "no cabundle", member("cabundle", nil))
	add("nitro_cabundle", "an empty cabundle", member("cabundle", []any{}))
	add("nitro_cabundle", "a cabundle of text", member("cabundle", []any{"root"}))
	add("nitro_cabundle", "an empty certificate in cabundle", mutation{module: func(m *module) {
		m.Doc["cabundle"] = append(nitrotest.Bundle(m.Root), []byte{})
	}})
	add("nitro_chain_length", "B15: a cabundle of nine", mutation{module: func(m *module) {
		m.Doc["cabundle"] = nitrotest.Bundle(m.Root, m.Region, m.Region, m.Region, m.Region, m.Region, m.Region, m.Zone, m.Instance)
	}})

	// B19: one kind is never taken for another.
	add("nitro_kind", "B19: an enclave's document as a NitroTPM's", mutation{evidence: func(e *attest.Evidence) { e.TEE = dstack.NitroTPM }})
	add("nitro_kind", "B19: a NitroTPM's document as an enclave's", mutation{tpm: true, evidence: func(e *attest.Evidence) { e.TEE = dstack.Nitro }})
	add("nitro_kind", "B19: a document as a quote of TDX", mutation{evidence: func(e *attest.Evidence) { e.TEE = dstack.TDX }})
	add("nitro_kind", "B19: a document with the registers of both", member("nitrotpm_pcrs", cosetest.Map{4: make([]byte, 48)}))
	add("nitro_kind", "a document without registers", without("pcrs"))

	// Roots.
	add("no_roots", "no roots at all", mutation{roots: func(*module) []attest.Roots { return nil }})
	add("no_roots", "roots of another TEE", mutation{roots: func(m *module) []attest.Roots {
		return []attest.Roots{{TEE: dstack.TDX, CA: []*x509.Certificate{m.Root.Cert}}}
	}})
	add("no_roots", "roots of the other kind only", mutation{roots: func(m *module) []attest.Roots { return m.Roots()[1:] }})
	add("unknown_root", "B14: a simulated document against the vendor's root", mutation{roots: func(*module) []attest.Roots { return nitro.VendorRoots() }})
	add("unknown_root", "another installation's root of the same name", mutation{roots: func(m *module) []attest.Roots { return nitrotest.New(m.TB()).Roots() }})
	add("root_expired", "a root that has ended", mutation{module: func(m *module) {
		key := m.Root.Key
		m.Root.Cert = m.Certify(nitrotest.Authority{}, key, "nitrotest", func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage, c.NotAfter = true, x509.KeyUsageCertSign, nitrotest.At.Add(-time.Second)
		})
	}})

	// The chain.
	reissue := func(edit func(*x509.Certificate)) mutation {
		return mutation{module: func(m *module) { m.Leaf = m.IssueLeaf(m.Instance, edit) }}
	}
	add("nitro_cert_expired", "a leaf that has ended", mutation{at: nitrotest.At.Add(3*time.Hour + time.Second)})
	add("nitro_cert_expired", "a leaf that is not valid yet", mutation{at: nitrotest.At.Add(-4 * time.Second)})
	add("nitro_cert_expired", "no time", mutation{at: time.Unix(0, 0), module: func(m *module) {
		m.Root.Cert = m.Certify(nitrotest.Authority{}, m.Root.Key, "nitrotest", func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage, c.NotBefore = true, x509.KeyUsageCertSign, time.Unix(0, 0)
		})
	}})
	add("nitro_cert_expired", "an instance authority that has ended", mutation{module: func(m *module) {
		m.Instance = m.Issue(m.Zone, "instance.nitrotest", func(c *x509.Certificate) {
			c.IsCA, c.MaxPathLenZero, c.KeyUsage, c.NotAfter = true, true, x509.KeyUsageCertSign, nitrotest.At.Add(-time.Second)
		})
		m.Leaf = m.IssueLeaf(m.Instance, nil)
	}})
	add("nitro_chain", "a leaf of another authority of the same name", mutation{module: func(m *module) {
		m.Leaf = m.IssueLeaf(m.IssueCA(m.Zone, "instance.nitrotest", 0), nil)
	}})
	add("nitro_chain", "a leaf of an authority of another name", mutation{module: func(m *module) {
		renamed := *m.Instance.Cert
		renamed.RawSubject, renamed.Subject.CommonName = nil, "other"
		m.Leaf = m.IssueLeaf(nitrotest.Authority{Key: m.Instance.Key, Cert: &renamed}, nil)
	}})
	add("nitro_path_length", "a cabundle out of order", mutation{module: func(m *module) {
		m.Doc["cabundle"] = nitrotest.Bundle(m.Root, m.Region, m.Instance, m.Zone)
	}})
	add("nitro_chain", "a cabundle with an authority left out", mutation{module: func(m *module) {
		m.Doc["cabundle"] = nitrotest.Bundle(m.Root, m.Region, m.Zone)
	}})
	add("unknown_root", "a cabundle with the topmost authority left out", mutation{module: func(m *module) {
		m.Doc["cabundle"] = nitrotest.Bundle(m.Root, m.Zone, m.Instance)
	}})
	add("nitro_chain", "a chain whose top the root signed and whose bottom a stranger", mutation{module: func(m *module) {
		other := nitrotest.New(m.TB())
		m.Doc["cabundle"] = nitrotest.Bundle(m.Root, m.Region, other.Zone, other.Instance)
		m.Leaf = other.Leaf
	}})
	add("nitro_certificate", "an authority that is not DER", mutation{module: func(m *module) {
		m.Doc["cabundle"] = append(nitrotest.Bundle(m.Root, m.Region, m.Zone), []byte("junk"))
	}})
	add("nitro_cert_algorithm", "a leaf with a P-256 key", mutation{module: func(m *module) {
		m.Leaf.Cert = m.Certify(m.Instance, cosetest.NewKey(m.TB(), elliptic.P256()), "leaf", nil)
	}})
	add("nitro_cert_algorithm", "a leaf signed over SHA-256", reissue(func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA256 }))
	unknown := pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}
	add("nitro_cert_extension", "a leaf with a critical extension that nobody knows", reissue(func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{unknown}
	}))
	add("nitro_cert_extension", "an authority with critical name constraints", mutation{module: func(m *module) {
		m.Instance = m.Issue(m.Zone, "instance.nitrotest", func(c *x509.Certificate) {
			c.IsCA, c.MaxPathLenZero, c.KeyUsage = true, true, x509.KeyUsageCertSign
			c.PermittedDNSDomainsCritical, c.PermittedDNSDomains = true, []string{"example.com"}
		})
		m.Leaf = m.IssueLeaf(m.Instance, nil)
	}})
	add("nitro_cert_usage", "a leaf for servers only", reissue(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }))
	add("nitro_cert_usage", "a leaf for a use that nobody knows", reissue(func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }))
	add("nitro_cert_usage", "a leaf that may not sign", reissue(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }))
	add("nitro_cert_usage", "an authority for servers only", mutation{module: func(m *module) {
		m.Instance = m.Issue(m.Zone, "instance.nitrotest", func(c *x509.Certificate) {
			c.IsCA, c.MaxPathLenZero, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		})
		m.Leaf = m.IssueLeaf(m.Instance, nil)
	}})
	add("nitro_leaf", "a leaf that is an authority", reissue(func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }))
	notCA := func(edit func(*x509.Certificate)) mutation {
		return mutation{module: func(m *module) {
			m.Instance = m.Issue(m.Zone, "instance.nitrotest", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign; edit(c) })
			m.Leaf = m.IssueLeaf(m.Instance, nil)
		}}
	}
	add("nitro_authority", "an enclave's leaf for an authority", notCA(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }))
	add("nitro_authority", "an authority without basic constraints", notCA(func(c *x509.Certificate) { c.BasicConstraintsValid = false }))
	add("nitro_authority", "an authority that may not sign certificates", notCA(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCRLSign }))
	add("nitro_path_length", "an authority below one that allows none", mutation{module: func(m *module) {
		m.Instance = m.IssueCA(m.IssueCA(m.Zone, "between", 0), "instance.nitrotest", 0)
		m.Zone = m.IssueCA(m.Region, "zone", 0)
		m.Instance = m.IssueCA(m.Zone, "instance.nitrotest", 0)
		m.Leaf = m.IssueLeaf(m.Instance, nil)
	}})
	add("nitro_path_length", "a root that allows fewer authorities", mutation{module: func(m *module) {
		m.Root.Cert = m.Certify(nitrotest.Authority{}, m.Root.Key, "nitrotest", func(c *x509.Certificate) {
			c.IsCA, c.MaxPathLen, c.KeyUsage = true, 2, x509.KeyUsageCertSign
		})
	}})

	// Revocation.
	crl := func(edit func(m *module, c *nitrotest.CRL)) func(m *module) *collateral.Bundle {
		return func(m *module) *collateral.Bundle {
			c := nitrotest.Revoke(m.Zone)
			edit(m, &c)
			return &collateral.Bundle{CRLs: []collateral.Hex{m.Sign(c)}}
		}
	}
	add("nitro_cert_revoked", "B02: the instance authority is revoked", mutation{collateral: crl(func(m *module, c *nitrotest.CRL) {
		c.Revoked = []*big.Int{m.Instance.Cert.SerialNumber}
	})})
	add("nitro_cert_revoked", "B02: the region authority is revoked by the root", mutation{collateral: crl(func(m *module, c *nitrotest.CRL) {
		c.Issuer, c.Revoked = m.Root, []*big.Int{m.Region.Cert.SerialNumber}
	})})
	add("nitro_cert_revoked", "B02: the leaf is revoked", mutation{collateral: crl(func(m *module, c *nitrotest.CRL) {
		c.Issuer, c.Revoked = m.Instance, []*big.Int{m.Leaf.Cert.SerialNumber}
	})})
	add("crl_expired", "B02: a revocation list that has ended", mutation{collateral: crl(func(_ *module, c *nitrotest.CRL) { c.NextUpdate = nitrotest.At.Add(-time.Second) })})
	add("crl_not_yet_valid", "B02: a revocation list of the future", mutation{collateral: crl(func(_ *module, c *nitrotest.CRL) { c.ThisUpdate = nitrotest.At.Add(time.Second) })})
	add("crl_signature", "B02: a revocation list by another authority of the same name", mutation{collateral: crl(func(m *module, c *nitrotest.CRL) {
		c.Issuer = m.IssueCA(m.Region, "zone.nitrotest", 1)
	})})
	add("crl_malformed", "B02: a revocation list with a critical extension", mutation{collateral: crl(func(_ *module, c *nitrotest.CRL) {
		c.Extensions = []pkix.Extension{unknown}
	})})
	add("crl_malformed", "a revocation list that is not DER", mutation{collateral: func(*module) *collateral.Bundle {
		return &collateral.Bundle{CRLs: []collateral.Hex{[]byte("junk")}}
	}})
	add("collateral_too_large", "B15: 33 revocation lists", mutation{collateral: func(*module) *collateral.Bundle {
		return &collateral.Bundle{CRLs: make([]collateral.Hex, 33)}
	}})
	return list
}

// input makes what one mutation verifies.
func (mu mutation) input(t testing.TB) (*module, attest.Input) {
	m := nitrotest.New(t)
	if mu.tpm {
		m = nitrotest.NewTPM(t)
	}
	if mu.module != nil {
		mu.module(m)
	}
	in := attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}
	if mu.quote != nil {
		in.Evidence.Quote = mu.quote(in.Evidence.Quote)
	}
	if mu.evidence != nil {
		mu.evidence(in.Evidence)
	}
	if mu.collateral != nil {
		in.Collateral = mu.collateral(m)
	}
	if mu.roots != nil {
		in.Roots = mu.roots(m)
	}
	if !mu.at.IsZero() {
		in.At = mu.at
	}
	return m, in
}

func TestEachMutationIsRefusedForItsReason(t *testing.T) {
	codes := map[string]bool{}
	for _, mu := range mutations() {
		codes[mu.code] = true
		t.Run(mu.name, func(t *testing.T) {
			_, in := mu.input(t)
			c, err := nitro.Verify(in)
			if fault.Code(err) != mu.code {
				t.Errorf("got %q (%v), want %q", fault.Code(err), err, mu.code)
			}
			if c != nil {
				t.Error("claims beside an error of verification")
			}
		})
	}
	t.Logf("%d mutations with %d codes", len(mutations()), len(codes))
}

func TestNoEvidenceIsAnError(t *testing.T) {
	if _, err := nitro.Verify(attest.Input{}); fault.Code(err) != "evidence_missing" {
		t.Error(err)
	}
}

func TestThreat_B01_ADebugEnclaveIsRefused(t *testing.T) {
	for name, zero := range map[string][]int{"all registers": {0, 1, 2}, "image": {0}, "kernel": {1}, "application": {2}} {
		t.Run(name, func(t *testing.T) {
			m := nitrotest.New(t)
			for _, index := range zero {
				m.Doc["pcrs"].(cosetest.Map)[index] = make([]byte, 48)
			}
			in := attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}
			c, err := nitro.Verify(in)
			if fault.Code(err) != "nitro_debug" || c == nil || !c.Debug {
				t.Fatalf("%+v, %v", c, err)
			}
			if _, err := nitro.ImageHash(c.Nitro.PCRs); fault.Code(err) != "nitro_debug" {
				t.Errorf("a debug enclave has an image hash (%v)", err)
			}
			in.Options.AllowDebug = true
			if c, err = nitro.Verify(in); err != nil || !c.Debug {
				t.Errorf("allowed: %+v, %v", c, err)
			}
		})
	}
	// The registers of a NitroTPM have other meanings.
	m := nitrotest.NewTPM(t)
	m.Doc["nitrotpm_pcrs"].(cosetest.Map)[0] = make([]byte, 48)
	if c, err := nitro.Verify(attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}); err != nil || c.Debug {
		t.Errorf("%+v, %v", c, err)
	}
}

// The age is for the policy, which reads it from the claims: a document made at
// another nonce or hours ago is not new because it is verified now.
func TestThreat_B08_TheClaimsSayWhenAndForWhomTheDocumentWasMade(t *testing.T) {
	m := nitrotest.New(t)
	m.Doc["nonce"], m.Doc["timestamp"] = []byte("of the first verifier"), uint64(nitrotest.At.Add(-time.Hour).UnixMilli())
	in := attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At.Add(time.Hour)}
	c, err := nitro.Verify(in)
	if err != nil {
		t.Fatal(err)
	}
	if c.At.Sub(c.Made) != 2*time.Hour || string(c.Nitro.Nonce) != "of the first verifier" {
		t.Errorf("made %s, at %s, nonce %q", c.Made, c.At, c.Nitro.Nonce)
	}
	// After its certificate's three hours nothing makes it good again.
	in.At = nitrotest.At.Add(3*time.Hour + time.Second)
	if _, err := nitro.Verify(in); fault.Code(err) != "nitro_cert_expired" {
		t.Error(err)
	}
	// A clock that is ahead by 300 s is tolerated, and no more (see mutations).
	m.Doc["timestamp"] = uint64(nitrotest.At.Add(300 * time.Second).UnixMilli())
	if _, err := nitro.Verify(attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}); err != nil {
		t.Error(err)
	}
}

// Nothing binds an event log to an enclave's document: whatever log comes with the
// evidence, claims and runtime registers are the same.
func TestThreat_B19_AnEventLogBesideAnEnclaveIsNotInTheClaims(t *testing.T) {
	m := nitrotest.New(t)
	in := attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}
	want, err := nitro.Verify(in)
	if err != nil {
		t.Fatal(err)
	}
	forged := []eventlog.Event{{IMR: 3, Name: "gpu-attestation", Payload: []byte("good")}}
	in.Evidence.EventLog, in.Evidence.Unbound = forged, forged
	in.Evidence.ReportData, in.Evidence.ReportDataClaimed = dstack.ReportData{1}, true
	got, err := nitro.Verify(in)
	if err != nil {
		t.Fatal(err)
	}
	a, _ := want.MarshalJSON()
	b, _ := got.MarshalJSON()
	if !bytes.Equal(a, b) || len(got.RuntimeRegisters()) != 0 || got.ConfigCommitment() != nil {
		t.Errorf("claims changed: %s", b)
	}
	// A NitroTPM has a runtime register.
	tpm := nitrotest.NewTPM(t)
	c, err := nitro.Verify(attest.Input{Evidence: tpm.Evidence(), Roots: tpm.Roots(), At: nitrotest.At})
	if err != nil {
		t.Fatal(err)
	}
	if r := c.RuntimeRegisters(); len(r) != 1 || r[0].Name != "pcr14" || r[0].Hash != "sha-384" || r[0].Value[0] != 0xce {
		t.Errorf("%+v", r)
	}
}

func TestShapesThatAreGoodAsWell(t *testing.T) {
	for name, change := range map[string]func(m *module){
		"nothing chosen by the guest": func(m *module) {
			delete(m.Doc, "public_key")
			m.Doc["user_data"], m.Doc["nonce"] = nil, nil
		},
		"the most that the guest may choose": func(m *module) {
			m.Doc["public_key"], m.Doc["user_data"], m.Doc["nonce"] = make([]byte, 1024), make([]byte, 512), make([]byte, 512)
		},
		"a tagged message": func(m *module) { m.Message.Tag = cose.TagSign1 },
		"a document of definite length": func(m *module) {
			m.Doc["certificate"], m.Doc["cabundle"] = m.Leaf.Cert.Raw, nitrotest.Bundle(m.Root, m.Region, m.Zone, m.Instance)
			m.Message.Payload = cosetest.Marshal(m.TB(), m.Doc)
		},
		"a member that nobody knows": func(m *module) { m.Doc["new"] = 1 },
		"32 registers":               func(m *module) { m.Doc["pcrs"].(cosetest.Map)[31] = make([]byte, 48) },
		"a leaf for clients and servers": func(m *module) {
			m.Leaf = m.IssueLeaf(m.Instance, func(c *x509.Certificate) {
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
			})
		},
		"a root in cabundle that is junk": func(m *module) {
			m.Doc["cabundle"] = append([]any{[]byte("junk")}, nitrotest.Bundle(m.Region, m.Zone, m.Instance)...)
		},
		"a leaf right under the root": func(m *module) {
			m.Leaf = m.IssueLeaf(m.Root, nil)
			m.Doc["cabundle"] = nitrotest.Bundle(m.Root)
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := nitrotest.New(t)
			change(m)
			if _, err := nitro.Verify(attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestADocumentIsFoundInTheFramingOfATransport(t *testing.T) {
	m := nitrotest.New(t)
	quote := m.Quote()
	for _, n := range []int{1, 4, 16} {
		framed := append(append(make([]byte, n), quote...), "what follows"...)
		d, err := nitro.ParseDocument(framed)
		if err != nil || d.ModuleID != m.Doc["module_id"] {
			t.Errorf("%d bytes before the document: %v", n, err)
		}
	}
}

// A good list of each authority leaves nothing unchecked; claims then end with the
// list that ends first.
func TestRevocationListsAreUsedAsFarAsThereAreAny(t *testing.T) {
	m := nitrotest.New(t)
	short := nitrotest.Revoke(m.Zone, big.NewInt(1), big.NewInt(2))
	short.NextUpdate = nitrotest.At.Add(time.Minute)
	stranger := nitrotest.New(t)
	stranger.Root = stranger.IssueCA(nitrotest.Authority{}, "stranger", -1)
	ended := nitrotest.Revoke(stranger.Root)
	ended.NextUpdate = nitrotest.At.Add(-time.Second)
	col := &collateral.Bundle{CRLs: []collateral.Hex{
		m.Sign(nitrotest.Revoke(m.Root)), m.Sign(nitrotest.Revoke(m.Region)), m.Sign(short), m.Sign(nitrotest.Revoke(m.Instance)),
		m.Sign(ended), // of nobody in the chain
	}}
	c, err := nitro.Verify(attest.Input{Evidence: m.Evidence(), Collateral: col, Roots: m.Roots(), At: nitrotest.At})
	if err != nil {
		t.Fatal(err)
	}
	if !c.Expires.Equal(short.NextUpdate) {
		t.Errorf("claims end at %s, want %s", c.Expires, short.NextUpdate)
	}
}

// Whichever bit of the document changes, it is refused.
func TestNoBitOfADocumentCanChange(t *testing.T) {
	m := nitrotest.New(t)
	in := attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}
	good := in.Evidence.Quote
	step := 7
	if testing.Short() {
		step = 97
	}
	for i := 0; i < len(good); i += step {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 8)
		in.Evidence = &attest.Evidence{TEE: m.TEE, Quote: bad}
		if c, err := nitro.Verify(in); fault.Code(err) == "" || c != nil {
			t.Errorf("bit %d of byte %d: %+v, %v", i%8, i, c, err)
		}
	}
}

// Bombs in each place that is read before a signature is checked.
func TestThreat_B15_DocumentBombsAreCheap(t *testing.T) {
	m := nitrotest.New(t)
	nested := append(bytes.Repeat([]byte{0x81}, 100_000), 0)
	payload := func(p []byte) []byte {
		m := nitrotest.New(t)
		m.Message.Payload = p
		return m.Quote()
	}
	huge := cosetest.Map{}
	for i := range 64 {
		huge[i] = make([]byte, 1000)
	}
	crls := make([]collateral.Hex, collateral.MaxCRLs)
	list := nitrotest.Revoke(m.Root)
	for i := range 2000 {
		list.Revoked = append(list.Revoked, big.NewInt(int64(i)))
	}
	for i := range crls {
		crls[i] = m.Sign(list)
	}
	for name, in := range map[string]attest.Input{
		"1e5 nested arrays":                   {Evidence: &attest.Evidence{Quote: nested}},
		"1e5 nested arrays in a frame":        {Evidence: &attest.Evidence{Quote: append([]byte{0, 0x84, 0x44, 0xa1, 1, 0x38, 0x22}, nested...)}},
		"1e5 nested arrays for a document":    {Evidence: &attest.Evidence{Quote: payload(nested)}},
		"1e5 nested maps for a document":      {Evidence: &attest.Evidence{Quote: payload(append(bytes.Repeat([]byte{0xa1, 0}, 60_000), 0))}},
		"a string of 2^63 bytes":              {Evidence: &attest.Evidence{Quote: payload([]byte{0x5b, 0x80, 0, 0, 0, 0, 0, 0, 0})}},
		"a map of 2^32 members":               {Evidence: &attest.Evidence{Quote: payload([]byte{0xba, 0xff, 0xff, 0xff, 0xff, 0})}},
		"a message of 1 MiB":                  {Evidence: &attest.Evidence{Quote: make([]byte, 1<<20)}},
		"registers of 64 kB":                  {Evidence: &attest.Evidence{Quote: payload(cosetest.Marshal(t, cosetest.Map{"module_id": "x", "digest": "SHA384", "timestamp": 1, "pcrs": huge}))}},
		"32 revocation lists of 2000 entries": {Evidence: m.Evidence(), Collateral: &collateral.Bundle{CRLs: crls}, Roots: m.Roots(), At: nitrotest.At},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		_, err := nitro.Verify(in)
		took := time.Since(start)
		runtime.ReadMemStats(&after)
		if fault.Code(err) == "" && in.Collateral == nil {
			t.Errorf("%s: %v", name, err)
		}
		limit := uint64(4 << 20)
		if in.Collateral != nil {
			limit *= 32 // all lists together; no two are held at once
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > limit || took > 2*time.Second {
			t.Errorf("%s: %d bytes allocated in %s", name, used, took)
		}
	}
}
