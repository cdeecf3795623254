// SPDX-License-Identifier: Apache-2.0

package tpm_test

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/attest/tpm/tpmtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func vendorPEM(t testing.TB) string {
	data, err := os.ReadFile("roots/google-ek-ak-root.pem")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestTheRealQuoteParses(t *testing.T) {
	a, err := tpm.ParseAttest(testkit.Vectors(t, "attestation/tpm/tpm_quote_sample.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if hex.EncodeToString(a.ExtraData) != "12345678" || len(a.Banks) != 1 || a.Banks[0].Hash != tpm.AlgSHA256 || !slices.Equal(a.Banks[0].PCRs, []uint32{0, 1, 2}) {
		t.Errorf("attest = %+v", a)
	}
	if len(a.QualifiedSigner) != 34 || len(a.PCRDigest) != 32 || a.PCRDigest[0] != 0xd8 || a.Clock != 0x054dd1ef || a.ResetCount != 16 || a.RestartCount != 0 || !a.Safe || a.FirmwareVersion != 0x2016051100162800 {
		t.Errorf("attest = %+v", a)
	}
}

func TestTheVendorsRootIsTheVectors(t *testing.T) {
	if got := string(testkit.Vectors(t, "attestation/roots/gcp-root-ca.pem")); got != vendorPEM(t) {
		t.Error("the embedded root differs from the vector")
	}
}

// realGCP returns the quote of a real Google Cloud VM, and the time to verify it at.
func realGCP(t testing.TB) attest.Input {
	raw, err := os.ReadFile("testdata/google-tdx-vtpm.json")
	if err != nil {
		t.Fatal(err)
	}
	q, err := tpm.ParseBundle(raw)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("testdata/google-ek-ak-intermediate.pem")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	return attest.Input{
		Evidence:   &attest.Evidence{TEE: dstack.TDX, TPMQuote: q},
		Collateral: &collateral.Bundle{Certificates: []collateral.Hex{block.Bytes}},
		Roots:      []attest.Roots{tpm.VendorRoots()},
		At:         time.Date(2026, 2, 4, 0, 0, 0, 0, time.UTC),
		// No revocation list came with the quote.
		Options: attest.Options{AllowMissingCRL: true},
	}
}

func TestARealGoogleCloudQuoteVerifies(t *testing.T) {
	in := realGCP(t)
	sameAttest(t, in.Evidence.TPMQuote.Message)
	c, err := tpm.Verify(in)
	if err != nil {
		t.Fatal(err)
	}
	if c.Trust != dstack.TrustProduction || c.Root != "EK/AK CA Root (sha256 "+tpm.GoogleRootSHA256+")" || c.TCBStatus != attest.NotReported {
		t.Errorf("trust %s under %s, status %s", c.Trust, c.Root, c.TCBStatus)
	}
	if hex.EncodeToString(c.ReportData) != "6424632e79ec068f2189adf46d121b9a10f758c45a18c52f630da14600d4317b" {
		t.Errorf("report data %x", c.ReportData)
	}
	pcrs := c.PCRs()
	if len(pcrs) != 24 || hex.EncodeToString(pcrs[0]) != tpm.GCPFirmwareV2 || hex.EncodeToString(pcrs[17]) != strings.Repeat("ff", 32) {
		t.Errorf("registers %x", pcrs)
	}
	if !strings.Contains(c.TPM.AKSubject, "CN=2141209421113254303") || c.TPM.ResetCount != 15 || c.TPM.Clock != 142657 || !c.TPM.Safe {
		t.Errorf("subject %s, reset %d, clock %d, safe %v", c.TPM.AKSubject, c.TPM.ResetCount, c.TPM.Clock, c.TPM.Safe)
	}
	want := []string{"certificate revocation list of EK/AK CA Intermediate", "certificate revocation list of EK/AK CA Root"}
	if !slices.Equal(c.Unchecked, want) {
		t.Errorf("unchecked %q", c.Unchecked)
	}
	if explained, unexplained, err := tpm.Replay(in.Evidence.TPMQuote); err != nil || explained != nil || len(unexplained) != 24 {
		t.Errorf("explained %d, unexplained %d, %v", explained, unexplained, err)
	}
}

func TestARealGoogleCloudQuoteIsRefusedWhenChanged(t *testing.T) {
	for _, c := range []struct {
		name, code string
		edit       func(in *attest.Input)
	}{
		{"without a revocation list", "crl_missing", func(in *attest.Input) { in.Options = attest.Options{} }},
		{"with another nonce", "tpm_signature", func(in *attest.Input) { in.Evidence.TPMQuote.Message[44] ^= 1 }},
		{"with another register", "tpm_pcr_digest", func(in *attest.Input) { in.Evidence.TPMQuote.PCRs[2].Value[0] ^= 1 }},
		{"with a changed certificate", "unknown_root", func(in *attest.Input) { in.Evidence.TPMQuote.AKCert[len(in.Evidence.TPMQuote.AKCert)-1] ^= 1 }},
		{"without the intermediate", "unknown_root", func(in *attest.Input) { in.Collateral = nil }},
		{"under another root", "unknown_root", func(in *attest.Input) { in.Roots = []attest.Roots{tpmtest.New(t).Roots()} }},
		{"before the key was certified", "ak_cert_expired", func(in *attest.Input) { in.At = time.Date(2026, 2, 3, 0, 0, 0, 0, time.UTC) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := realGCP(t)
			c.edit(&in)
			if claims, err := tpm.Verify(in); fault.Code(err) != c.code || claims != nil {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}

// TestGooglesCertificatesSayWhereListsAre holds the comment on missing lists to the
// real certificates.
func TestGooglesCertificatesSayWhereListsAre(t *testing.T) {
	in := realGCP(t)
	ak, err := x509.ParseCertificate(in.Evidence.TPMQuote.AKCert)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(in.Collateral.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(ak.CRLDistributionPoints) != 0 || len(ca.CRLDistributionPoints) != 1 {
		t.Errorf("the key's certificate names %q, its authority's %q", ak.CRLDistributionPoints, ca.CRLDistributionPoints)
	}
}
