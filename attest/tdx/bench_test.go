// SPDX-License-Identifier: Apache-2.0

//go:build !js

package tdx_test

import (
	"crypto/x509"
	"testing"

	"github.com/google/go-tdx-guest/verify"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
)

// The same real quote by ours, with all collateral checked, and by the peer, which
// checks the quote's signatures and PCK chain only; then by the peer with its
// collateral.
func BenchmarkVerifyRealQuote(b *testing.B) {
	quote, col, at := vector(b, "v4")
	roots := []attest.Roots{tdx.VendorRoots()}
	pool := x509.NewCertPool()
	pool.AddCert(roots[0].CA[0])
	b.Run("ours, all collateral", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := tdxtest.Verify(quote, col, roots, at); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("ours, all collateral, seen before", func(b *testing.B) {
		b.ReportAllocs()
		in := attest.Input{Evidence: &attest.Evidence{TEE: dstack.TDX, Quote: quote}, Collateral: &collateral.Bundle{TDX: col}, Roots: roots, At: at, Memo: new(attest.Memo)}
		for b.Loop() {
			if _, err := tdx.Verify(in); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-tdx-guest, signature only", func(b *testing.B) {
		b.ReportAllocs()
		opt := &verify.Options{TrustedRoots: pool, Now: &verify.TimeSet{PckCertChain: at}}
		for b.Loop() {
			if err := verify.RawTdxQuote(quote, opt); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-tdx-guest, all collateral", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := witness(quote, col, roots[0], at); err != nil {
				b.Fatal(err)
			}
		}
	})
}
