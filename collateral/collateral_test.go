// SPDX-License-Identifier: Apache-2.0

package collateral_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func TestRealCollateralKeepsEveryByte(t *testing.T) {
	for _, version := range []string{"v4", "v5"} {
		raw := testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_"+version+"_collateral.json")
		col, err := collateral.ParseTDX(raw)
		if err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(col)
		if err != nil {
			t.Fatal(err)
		}
		var a, b map[string]any
		if err := json.Unmarshal(raw, &a); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(again, &b); err != nil {
			t.Fatal(err)
		}
		for key, value := range a {
			if b[key] != value && value != nil {
				t.Errorf("%s: field %s changed", version, key)
			}
		}
	}
}

func TestDevRootsAreReadBack(t *testing.T) {
	p := tdxtest.New(t)
	raw, err := p.DevRoots().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	d, err := collateral.ParseDevRoots(raw)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := tdx.DevelopmentRoots(d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tdxtest.Verify(p.Quote(p.Body()), d.TDX, []attest.Roots{roots}, tdxtest.At); err != nil {
		t.Error(err)
	}
}

func TestDevRootsAreRefusedForTheirOwnReason(t *testing.T) {
	p := tdxtest.New(t)
	change := func(edit func(d *collateral.DevRoots)) []byte {
		d := p.DevRoots()
		edit(d)
		raw, err := d.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for _, c := range []struct {
		name string
		in   []byte
		code string
	}{
		{"not JSON", []byte("x"), "dev_roots_malformed"},
		{"an unknown field", bytes.Replace(change(func(*collateral.DevRoots) {}), []byte("{"), []byte(`{"trust":"production",`), 1), "dev_roots_malformed"},
		{"version 2", change(func(d *collateral.DevRoots) { d.Version = 2 }), "dev_roots_malformed"},
		{"a name of two lines", change(func(d *collateral.DevRoots) { d.Name = "a\ntrust: production" }), "dev_roots_malformed"},
		{"a name with an escape", change(func(d *collateral.DevRoots) { d.Name = "\x1b[2J" }), "dev_roots_malformed"},
		{"a name of 201 bytes", change(func(d *collateral.DevRoots) { d.Name = strings.Repeat("a", 201) }), "dev_roots_malformed"},
		{"no certificate", change(func(d *collateral.DevRoots) { d.TDXRootPEM = "" }), "dev_roots_malformed"},
		{"two certificates", change(func(d *collateral.DevRoots) { d.TDXRootPEM += d.TDXRootPEM }), "dev_roots_malformed"},
		{"a private key", change(func(d *collateral.DevRoots) {
			d.TDXRootPEM = strings.ReplaceAll(d.TDXRootPEM, "CERTIFICATE", "PRIVATE KEY")
		}), "dev_roots_malformed"},
		{"a CRL beyond the limit", change(func(d *collateral.DevRoots) { d.TDX.PCKCRL = make([]byte, collateral.MaxCRL+1) }), "collateral_too_large"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := collateral.ParseDevRoots(c.in); fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
	d := p.DevRoots()
	d.TDXRootPEM = p.Chain(tdxtest.Authority{Cert: tdx.VendorRoots().CA[0]})
	if _, err := tdx.DevelopmentRoots(d); fault.Code(err) != "dev_roots_malformed" {
		t.Errorf("the vendor's root as a development root: %v", err)
	}
	d.TDXRootPEM = ""
	if _, err := tdx.DevelopmentRoots(d); fault.Code(err) != "dev_roots_malformed" {
		t.Errorf("no certificate: %v", err)
	}
	d.TDXRootPEM = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
	if _, err := tdx.DevelopmentRoots(d); fault.Code(err) != "dev_roots_malformed" {
		t.Errorf("a certificate that is not DER: %v", err)
	}
}

func TestCollateralIsRefusedForItsOwnReason(t *testing.T) {
	for _, c := range []struct{ name, in, code string }{
		{"not JSON", `{`, "collateral_malformed"},
		{"a field twice", `{"tcb_info":"a","tcb_info":"b"}`, "collateral_malformed"},
		{"a CRL that is not hex", `{"pck_crl":"xy"}`, "collateral_malformed"},
		{"a signature of 65 bytes", `{"tcb_info_signature":"` + strings.Repeat("00", 65) + `"}`, "collateral_too_large"},
		{"a TCB info beyond the limit", `{"tcb_info":"` + strings.Repeat("a", collateral.MaxDocument+1) + `"}`, "collateral_too_large"},
		{"a chain beyond the limit", `{"qe_identity_issuer_chain":"` + strings.Repeat("a", collateral.MaxChain+1) + `"}`, "collateral_too_large"},
		{"a document beyond the limit", strings.Repeat(" ", collateral.MaxTDX+1), "collateral_malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := collateral.ParseTDX([]byte(c.in)); fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
	if _, err := (collateral.Static{}).Collateral(t.Context(), collateral.Request{}); fault.Code(err) != "collateral_missing" {
		t.Errorf("an empty source: %v", err)
	}
}

func FuzzParseTDX(f *testing.F) {
	f.Add(testkit.Vectors(f, "attestation/tdx/dcap-qvl-tdx_quote_v4_collateral.json"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := collateral.ParseTDX(data); err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
		if _, err := collateral.ParseDevRoots(data); err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
	})
}
