// SPDX-License-Identifier: Apache-2.0

package tdx_test

import (
	"crypto/x509"
	"encoding/json"
	dstack "github.com/dstack-go/dstack"
	"testing"
	"time"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// vector returns a real quote, its collateral, and one second before the first
// part of it ends. (That is the PCK CRL, which other verifiers use after its
// end.)
func vector(t testing.TB, version string) (quote []byte, col collateral.TDX, at time.Time) {
	t.Helper()
	quote = testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_"+version+".bin")
	c, err := collateral.ParseTDX(testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_"+version+"_collateral.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, raw := range []string{c.TCBInfo, c.QEIdentity} {
		var doc struct{ NextUpdate time.Time }
		if err := json.Unmarshal([]byte(raw), &doc); err != nil {
			t.Fatal(err)
		}
		if at.IsZero() || doc.NextUpdate.Before(at) {
			at = doc.NextUpdate
		}
	}
	crl, err := x509.ParseRevocationList(c.PCKCRL)
	if err != nil {
		t.Fatal(err)
	}
	if crl.NextUpdate.Before(at) {
		at = crl.NextUpdate
	}
	return quote, *c, at.Add(-time.Second)
}

func TestRealQuoteV4VerifiesAsUpToDate(t *testing.T) {
	quote, col, at := vector(t, "v4")
	c, err := tdxtest.Verify(quote, col, []attest.Roots{tdx.VendorRoots()}, at)
	if err != nil {
		t.Fatal(err)
	}
	if c.TCBStatus != tdx.UpToDate || len(c.Advisories) != 0 || c.Trust != dstack.TrustProduction || c.Product != "b0c06f000000" || c.TCBEvaluation != 17 {
		t.Errorf("claims = %+v", *c)
	}
	if got := c.Expires.Sub(at); got != time.Second {
		t.Errorf("collateral said to end in %s, want 1s", got)
	}
}

// The platform of the v5 sample has an older SEAM loader (SGX component 7 is 3,
// every published level wants 5): no TCB level matches, which is a refusal. All
// that is verified before, signatures and QE identity, holds.
func TestRealQuoteV5IsBelowEveryTCBLevel(t *testing.T) {
	quote, col, at := vector(t, "v5")
	q, err := tdx.ParseQuote(quote)
	if err != nil {
		t.Fatal(err)
	}
	if q.Header.Version != 5 || q.BodyType != tdx.BodyTypeTD15 || !q.Body().V15 || len(q.Signed) != 54+648 {
		t.Errorf("quote has version %d, body type %d, %d signed bytes", q.Header.Version, q.BodyType, len(q.Signed))
	}
	c, err := tdxtest.Verify(quote, col, []attest.Roots{tdx.VendorRoots()}, at)
	if fault.Code(err) != "tcb_unsupported" || c == nil || c.TCBStatus != tdx.Unsupported {
		t.Errorf("err = %v, claims %+v, want tcb_unsupported beside claims", err, c)
	}
}

func TestVendorRootIsTheOneIntelPublishes(t *testing.T) {
	roots := tdx.VendorRoots()
	if len(roots.CA) != 1 || attest.Fingerprint(roots.CA[0]) != tdx.IntelRootSHA256 || roots.Trust != dstack.TrustProduction {
		t.Errorf("vendor roots are %+v", roots)
	}
}
