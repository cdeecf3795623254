// SPDX-License-Identifier: Apache-2.0

package sevsnp_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/sevsnp"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/google/go-sev-guest/verify/testdata"
	"github.com/google/go-sev-guest/verify/trust"
)

func vector(t testing.TB, name string) []byte { return testkit.Vectors(t, "attestation/sev-snp/"+name) }

// realTime lies in the validity of the vectors' VCEK certificate.
var realTime = time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)

// realCase is evidence of real hardware. None comes with AMD's revocation list.
type realCase struct {
	name     string
	evidence *attest.Evidence
	at       time.Time
}

func realCases(t testing.TB) []realCase {
	ask, vcek := vector(t, "sev_snp_ask.pem"), vector(t, "sev_snp_vcek.pem")
	decode := func(raw []byte) *attest.Evidence {
		e, err := container.Decode(raw)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	bare := decode(vector(t, "sev_snp_attestation.bin"))
	bare.CertChain = [][]byte{ask, vcek}
	var request struct {
		Attestation string `json:"attestation"`
	}
	if err := json.Unmarshal(vector(t, "verifier-sev-snp-attestation.json"), &request); err != nil {
		t.Fatal(err)
	}
	raw, err := hex.DecodeString(request.Attestation)
	if err != nil {
		t.Fatal(err)
	}
	return []realCase{
		{"a Milan report of version 3", &attest.Evidence{TEE: dstack.SEVSNP, Quote: vector(t, "report.bin"), CertChain: [][]byte{vcek, ask}}, realTime},
		{"a container without certificates, and some", bare, realTime},
		{"a container with its chain", decode(raw), realTime},
		{"go-sev-guest's Milan report of version 2", &attest.Evidence{
			TEE: dstack.SEVSNP, Quote: testdata.AttestationBytes[:sevsnp.ReportSize],
			CertChain: [][]byte{testdata.VcekBytes, trust.AskArkMilanVcekBytes},
		}, time.Date(2023, 1, 1, 0, 0, 0, 0, time.UTC)},
	}
}

func TestRealReportsVerifyUnderAMDsRoots(t *testing.T) {
	for _, c := range realCases(t) {
		t.Run(c.name, func(t *testing.T) {
			in := attest.Input{Evidence: c.evidence, Roots: []attest.Roots{sevsnp.VendorRoots()}, At: c.at}
			if claims, err := sevsnp.Verify(in); fault.Code(err) != "crl_missing" || claims != nil {
				t.Fatalf("without a revocation list: %v, %v", claims, err)
			}
			in.Options.AllowMissingCRL = true
			claims, err := sevsnp.Verify(in)
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(claims.Unchecked) != "[certificate revocation list]" || claims.Trust != dstack.TrustProduction ||
				claims.Root != "ARK-Milan (sha256 "+sevsnp.MilanRootSHA256+")" {
				t.Errorf("unchecked %q, trust %s, root %q", claims.Unchecked, claims.Trust, claims.Root)
			}
			if claims.Product != sevsnp.Milan || claims.SNP.SigningKey != "VCEK" || claims.Debug || claims.TCBStatus != sevsnp.OutOfDate {
				t.Errorf("product %s, key %s, debug %v, status %s", claims.Product, claims.SNP.SigningKey, claims.Debug, claims.TCBStatus)
			}
			t.Logf("%+v", claims.SNP)
		})
	}
}
