// SPDX-License-Identifier: Apache-2.0

package tdx_test

import (
	"testing"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
)

func TestAGoodQuoteVerifies(t *testing.T) {
	p := tdxtest.New(t)
	body := p.Body()
	c, err := tdx.Verify(p.Quote(body), p.Collateral(), []tdx.Roots{tdx.VendorRoots(), p.Roots()}, tdxtest.At)
	if err != nil {
		t.Fatal(err)
	}
	if c.Trust != dstack.TrustDevelopment || c.TCBStatus != tdx.UpToDate || c.MRTD != body.MRTD || c.RTMR != body.RTMR || c.Debug {
		t.Errorf("claims = %+v", *c)
	}
}
