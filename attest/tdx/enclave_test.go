// SPDX-License-Identifier: Apache-2.0

package tdx_test

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

var (
	testEnclave = [32]byte(bytes.Repeat([]byte{0x4d}, 32))
	testData    = dstack.ReportData(bytes.Repeat([]byte{0x9}, 64))
)

func verifyEnclave(p *tdxtest.Platform, quote []byte, col collateral.TDX, memo *attest.Memo) (*tdx.Enclave, error) {
	return tdx.VerifyEnclave(attest.Input{
		Evidence: &attest.Evidence{Quote: quote}, Collateral: &collateral.Bundle{TDX: col},
		Roots: []attest.Roots{p.Roots()}, At: tdxtest.Issued.Add(time.Hour), Memo: memo,
	})
}

func TestAnEnclavesQuoteVerifies(t *testing.T) {
	p := tdxtest.New(t)
	quote := p.EnclaveQuote(tdxtest.EnclaveReport(testEnclave, testData))
	e, err := verifyEnclave(p, quote, p.EnclaveCollateral(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if e.MREnclave != testEnclave || e.ReportData != testData || e.TCBStatus != tdx.UpToDate || e.Trust != dstack.TrustDevelopment ||
		e.PPID != tdxtest.Extension().PPID || e.Expires.IsZero() {
		t.Errorf("%+v", e)
	}
	want, err := tdx.EnclaveRequest(quote)
	if err != nil || want.FMSPC != "90c06f000000" || want.PCKCA != collateral.Platform || !want.Enclave {
		t.Errorf("%+v, %v", want, err)
	}
	// Hosts pad quotes with zeros.
	if _, err := verifyEnclave(p, append(quote, 0, 0), p.EnclaveCollateral(), nil); err != nil {
		t.Error(err)
	}
}

func TestEnclavesQuotesThatAreRefused(t *testing.T) {
	report := func(change func([]byte)) []byte {
		r := tdxtest.EnclaveReport(testEnclave, testData)
		change(r)
		return r
	}
	good := report(func([]byte) {})
	for _, c := range []struct {
		name, code string
		platform   func(*tdxtest.Platform)
		report     []byte
		quote      func([]byte) []byte
		collateral func(*tdxtest.Platform) collateral.TDX
	}{
		{name: "debug", code: "enclave_debug", report: report(func(r []byte) { r[tdx.QEOffAttributes] |= 2 })},
		{name: "not initialised", code: "enclave_attributes", report: report(func(r []byte) { r[tdx.QEOffAttributes] &^= 1 })},
		{name: "another enclave put in", code: "quote_signature", quote: func(q []byte) []byte { q[48+tdx.QEOffMREnclave] ^= 1; return q }},
		{name: "QE report", code: "qe_report_signature", quote: func(q []byte) []byte { q[436+128] ^= 1; return q }},
		{name: "a TD's version", code: "quote_version", quote: func(q []byte) []byte { q[0] = 4; return q }},
		{name: "a TD's type", code: "quote_tee_type", quote: func(q []byte) []byte { q[4] = 0x81; return q }},
		{name: "another key type", code: "quote_key_type", quote: func(q []byte) []byte { q[2] = 3; return q }},
		{name: "another vendor", code: "qe_vendor", quote: func(q []byte) []byte { q[12] ^= 1; return q }},
		{name: "cut", code: "quote_malformed", quote: func(q []byte) []byte { return q[:len(q)-1] }},
		{name: "short", code: "quote_malformed", quote: func(q []byte) []byte { return q[:100] }},
		{name: "followed", code: "quote_malformed", quote: func(q []byte) []byte { return append(q, 1) }},
		{name: "large", code: "quote_malformed", quote: func(q []byte) []byte { return append(q, make([]byte, tdx.MaxQuote)...) }},
		{name: "collateral of TDX", code: "tcb_info_id", collateral: func(p *tdxtest.Platform) collateral.TDX { return p.Collateral() }},
		{name: "B06: the identity of the TD's quoting enclave", code: "qe_identity_id", collateral: func(p *tdxtest.Platform) collateral.TDX {
			c, of := p.EnclaveCollateral(), p.Collateral()
			c.QEIdentity, c.QEIdentitySignature = of.QEIdentity, of.QEIdentitySignature
			return c
		}},
		{name: "no collateral", code: "collateral_missing", collateral: func(*tdxtest.Platform) collateral.TDX { return collateral.TDX{} }},
		{name: "QE of others", code: "qe_mrsigner", platform: func(p *tdxtest.Platform) { p.QEReport[tdx.QEOffMRSigner] ^= 1 }},
		{name: "below all levels", code: "tcb_unsupported", platform: func(p *tdxtest.Platform) {
			e := tdxtest.Extension()
			e.Components[0] = 1
			p.PCK = p.IssuePCK(p.PCKCA, e, nil)
		}},
		{name: "a revoked level", code: "tcb_revoked", platform: func(p *tdxtest.Platform) {
			p.TCBInfo["tcbLevels"] = []any{tdxtest.PlatformLevel([16]uint8{}, 1, [16]uint8{}, tdx.Revoked)}
		}},
	} {
		p := tdxtest.New(t)
		if c.platform != nil {
			c.platform(p)
		}
		if c.report == nil {
			c.report = good
		}
		quote := p.EnclaveQuote(c.report)
		if c.quote != nil {
			quote = c.quote(quote)
		}
		col := p.EnclaveCollateral()
		if c.collateral != nil {
			col = c.collateral(p)
		}
		if _, err := verifyEnclave(p, quote, col, nil); fault.Code(err) != c.code {
			t.Errorf("%s: %v (code %q), want %q", c.name, err, fault.Code(err), c.code)
		}
	}
	// A TD's verification does not take an enclave's documents, also not from memory.
	p, memo := tdxtest.New(t), new(attest.Memo)
	if _, err := verifyEnclave(p, p.EnclaveQuote(good), p.EnclaveCollateral(), memo); err != nil {
		t.Fatal(err)
	}
	_, err := tdx.Verify(attest.Input{
		Evidence: &attest.Evidence{TEE: dstack.TDX, Quote: p.Quote(p.Body())}, Collateral: &collateral.Bundle{TDX: p.EnclaveCollateral()},
		Roots: []attest.Roots{p.Roots()}, At: tdxtest.Issued.Add(time.Hour), Memo: memo,
	})
	if fault.Code(err) != "tcb_info_id" {
		t.Errorf("a TD with an enclave's TCB info: %v", err)
	}
}

func TestAnOldPlatformIsAGrade(t *testing.T) {
	p := tdxtest.New(t)
	e := tdxtest.Extension()
	e.Components[0] = 2
	p.PCK = p.IssuePCK(p.PCKCA, e, nil)
	binary.LittleEndian.PutUint16(p.QEReport[tdx.QEOffISVSVN:], 2)
	got, err := verifyEnclave(p, p.EnclaveQuote(tdxtest.EnclaveReport(testEnclave, testData)), p.EnclaveCollateral(), nil)
	if err != nil || got.TCBStatus != tdx.OutOfDate || len(got.Advisories) != 2 {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzParseEnclaveQuote(f *testing.F) {
	p := tdxtest.New(f)
	f.Add(p.EnclaveQuote(tdxtest.EnclaveReport(testEnclave, testData)))
	f.Add([]byte{3, 0, 2, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		if q, err := tdx.ParseEnclaveQuote(data); (err == nil) != (q != nil) || err != nil && fault.Code(err) == "" {
			t.Errorf("%v, %v", q, err)
		}
	})
}
