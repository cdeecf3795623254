// SPDX-License-Identifier: Apache-2.0

package tdx_test

import (
	"bytes"
	"testing"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// Raw quotes of the vectors, none of which may fail to parse.
var rawQuotes = []string{"tdx/dcap-qvl-tdx_quote_v4.bin", "tdx/dcap-qvl-tdx_quote_v5.bin", "tdx/ra-tls-tdx_quote.bin", "simulator/quote.bin"}

func TestEveryRealQuoteParsesAndMarshalsBack(t *testing.T) {
	for _, name := range rawQuotes {
		raw := testkit.Vectors(t, "attestation/"+name)
		q, err := tdx.ParseQuote(raw)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if q.CertType != tdx.CertTypePCKChain || len(q.QEAuthData) != tdx.QEAuthSize {
			t.Errorf("%s: certification data of type %d, %d bytes of QE authentication data", name, q.CertType, len(q.QEAuthData))
		}
		v10, v15 := q.Body().MarshalV10(), q.Body().MarshalV15()
		body := v10[:]
		if q.Body().V15 {
			body = v15[:]
		}
		if !bytes.HasSuffix(q.Signed, body) {
			t.Errorf("%s: the body does not marshal to the bytes it was read from", name)
		}
	}
}

func FuzzParseQuote(f *testing.F) {
	for _, name := range rawQuotes {
		f.Add(testkit.Vectors(f, "attestation/"+name))
	}
	p := tdxtest.New(f)
	f.Add(p.Quote(p.Body()))
	f.Fuzz(func(t *testing.T, data []byte) {
		q, err := tdx.ParseQuote(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		if !bytes.HasPrefix(data, q.Signed) || len(q.QEAuthData)+len(q.CertData) > len(data) {
			t.Fatal("fields are not of the quote")
		}
	})
}

// FuzzVerifyCollateral feeds hostile documents to everything behind the
// signature by signing them as the vendor would.
func FuzzVerifyCollateral(f *testing.F) {
	p := tdxtest.New(f)
	quote, good := p.Quote(p.Body()), p.Collateral()
	f.Add(good.TCBInfo, good.QEIdentity, []byte(good.RootCACRL), []byte(good.PCKCRL), good.TCBInfoIssuerChain)
	roots := []attest.Roots{p.Roots()}
	f.Fuzz(func(t *testing.T, info, identity string, rootCRL, pckCRL []byte, chain string) {
		col := good
		col.RootCACRL, col.PCKCRL, col.TCBInfoIssuerChain = rootCRL, pckCRL, chain
		col.TCBInfo, col.TCBInfoSignature = info, p.Sign(p.TCBSigner, []byte(info))
		col.QEIdentity, col.QEIdentitySignature = identity, p.Sign(p.QESigner, []byte(identity))
		claims, err := tdxtest.Verify(quote, col, roots, tdxtest.At)
		if err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
		if (err == nil) != (claims != nil) {
			t.Fatal("claims and error disagree")
		}
	})
}
