// SPDX-License-Identifier: Apache-2.0

package sevsnp

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"testing"
	"time"

	"github.com/google/go-sev-guest/verify/testdata"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func hasCode(t *testing.T, err error) {
	if fault.Code(err) == "" {
		t.Fatalf("an error without a code: %v", err)
	}
}

func FuzzParseReport(f *testing.F) {
	f.Add(testkit.Vectors(f, "attestation/sev-snp/report.bin"))
	f.Add(testdata.AttestationBytes)
	f.Add((&Report{Version: 5, Policy: PolicyReservedOne, Algorithm: 1}).Marshal())
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseReport(data)
		if err != nil {
			hasCode(t, err)
			return
		}
		if !bytes.Equal(r.Marshal(), data) {
			t.Fatal("the report does not marshal to the bytes it was read from")
		}
		if _, err := Request(data); err != nil {
			hasCode(t, err)
		}
	})
}

func FuzzParseBlob(f *testing.F) {
	vcek := testdata.VcekBytes
	f.Add(vcek)
	f.Add(testkit.Vectors(f, "attestation/sev-snp/sev_snp_ask.pem"))
	table := make([]byte, 72)
	copy(table, tableGUIDs[1][:])
	table[16], table[20], table[21] = 72, byte(len(vcek)), byte(len(vcek)>>8)
	copy(table[24:], "some other entry")
	f.Add(append(table, vcek...))
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := parseBlob(data)
		if err != nil {
			hasCode(t, err)
			return
		}
		size := 0
		for _, c := range certs {
			size += len(c.Raw)
		}
		// Entries of a table may share bytes.
		if len(certs) > maxChain || size > maxChain*len(data) {
			t.Fatalf("%d certificates of %d bytes from %d", len(certs), size, len(data))
		}
	})
}

// FuzzParseExtensions feeds AMD's extensions with hostile values: a certificate
// is signed, but the parser must not rest on that.
func FuzzParseExtensions(f *testing.F) {
	cert, err := x509.ParseCertificate(testdata.VcekBytes)
	if err != nil {
		f.Fatal(err)
	}
	values := map[string][]byte{}
	for _, e := range cert.Extensions {
		values[e.Id.String()] = e.Value
	}
	f.Add(values[extBase+extProduct], values[extBase+extSNP], values[extBase+extHWID], []byte(nil), false, false)
	f.Add([]byte("\x16\x05Turin"), []byte{2, 1, 4}, make([]byte, 8), []byte(nil), true, false)
	f.Add([]byte("\x16\x05Genoa"), []byte{2, 1, 4}, []byte(nil), []byte("\x16\x01x"), false, true)
	f.Fuzz(func(t *testing.T, product, snp, hwid, csp []byte, turin, vlek bool) {
		c := &x509.Certificate{Subject: pkix.Name{CommonName: cnVCEK}}
		add := func(value []byte, oid ...int) {
			if value != nil {
				c.Extensions = append(c.Extensions, pkix.Extension{Id: append(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, oid...), Value: value})
			}
		}
		one := []byte{2, 1, 1}
		add(one, 1)
		add(product, 2)
		for i := range 9 {
			switch {
			case i == 2:
				add(snp, 3, 3)
			case i >= 3 && i <= 6:
				add([]byte{2, 1, 0}, 3, i+1)
			default:
				add(one, 3, i+1)
			}
		}
		add(hwid, 4)
		add(csp, 5)
		line := Milan
		if turin {
			line = Turin
		}
		if vlek {
			c.Subject.CommonName = cnVLEK
		}
		ext, err := ParseExtensions(c, line)
		if err != nil {
			hasCode(t, err)
			return
		}
		if (len(ext.HWID) != 0) == vlek || (ext.CSPID != "") != vlek || len(ext.ProductName) > 64 {
			t.Fatalf("%+v of a VLEK: %v", ext, vlek)
		}
		if parts := Parts(line, ext.TCB); parts.Microcode != 1 || parts.TEE != 1 || parts.Bootloader != 1 {
			t.Fatalf("parts %+v", parts)
		}
	})
}

// FuzzVerify is the attacker: all of the evidence and the collateral are his, the
// root is AMD's. Claims come out for the one report that AMD's key signed, unchanged.
func FuzzVerify(f *testing.F) {
	genuine := testkit.Vectors(f, "attestation/sev-snp/report.bin")
	ask, vcek := testkit.Vectors(f, "attestation/sev-snp/sev_snp_ask.pem"), testkit.Vectors(f, "attestation/sev-snp/sev_snp_vcek.pem")
	der, _ := pem.Decode(vcek)
	f.Add(genuine, ask, vcek, []byte(nil), []byte(nil))
	f.Add(genuine, append(bytes.Clone(ask), vcek...), []byte(nil), der.Bytes, []byte{0x30, 0})
	f.Add(testdata.AttestationBytes, testdata.VcekBytes, ask, []byte(nil), []byte(nil))
	in := attest.Input{
		Roots: []attest.Roots{VendorRoots()}, At: time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC),
		Options: attest.Options{AllowMissingCRL: true, AllowDebug: true},
	}
	f.Fuzz(func(t *testing.T, report, first, second, cert, crl []byte) {
		in := in
		in.Evidence = &attest.Evidence{Quote: report, CertChain: [][]byte{first, second}}
		in.Collateral = &collateral.Bundle{Certificates: []collateral.Hex{cert}, CRLs: []collateral.Hex{crl}}
		claims, err := Verify(in)
		if err != nil {
			hasCode(t, err)
		}
		if claims != nil && !bytes.Equal(report, genuine) && !bytes.Equal(report, testdata.AttestationBytes) {
			t.Fatalf("claims about a report that AMD's key did not sign: %x", report)
		}
		if claims == nil && err == nil {
			t.Fatal("neither claims nor an error")
		}
	})
}
