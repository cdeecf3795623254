// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"encoding/base64"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/testkit"
)

// nitroMade is when the documents of the Nitro vectors were made.
var nitroMade = time.UnixMilli(1766678659346).UTC()

// What each vector gives under the policy of scope signature, with the vendors'
// roots and no collateral but its own.
func TestVectorsUnderTheVendorsRoots(t *testing.T) {
	collateralOf := func(name string) *collateral.Bundle {
		b, err := collateral.ParseBundle(testkit.Vectors(t, "attestation/"+name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	pems := func(names ...string) *collateral.Bundle {
		files := map[string][]byte{}
		for _, n := range names {
			files[n] = testkit.Vectors(t, "attestation/"+n)
		}
		b, _, err := collateral.FromFiles(files)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	v4 := time.Date(2025, 6, 20, 0, 0, 0, 0, time.UTC)
	v5 := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	snp := time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name string
		col  *collateral.Bundle
		at   time.Time
		tee  dstack.TEE
		// what the verdict is: accepted, or the code of its error
		code      string
		signature string
		tcb       string
	}{
		{"tdx/dcap-qvl-tdx_quote_v4.bin", collateralOf("tdx/dcap-qvl-tdx_quote_v4_collateral.json"), v4, dstack.TDX, "", SignatureValid, "UpToDate"},
		{"tdx/dcap-qvl-tdx_quote_v5.bin", collateralOf("tdx/dcap-qvl-tdx_quote_v5_collateral.json"), v5, dstack.TDX, "tcb_unsupported", SignatureValid, "Unsupported"},
		{"tdx/dcap-qvl-tdx_quote_v4.bin", collateralOf("tdx/dcap-qvl-tdx_quote_v5_collateral.json"), v5, dstack.TDX, "fmspc_mismatch", SignatureInvalid, ""},
		{"tdx/ra-tls-tdx_quote.bin", nil, v4, dstack.TDX, "collateral_missing", SignatureInvalid, ""},
		{"tdx/tdx-lite-attestation.json", nil, v4, dstack.TDX, "collateral_missing", SignatureInvalid, ""},
		{"tdx/tdx-lite-getquote.json", nil, v4, dstack.TDX, "collateral_missing", SignatureInvalid, ""},
		{"tdx/quote-report.json", nil, v4, dstack.TDX, "collateral_missing", SignatureInvalid, ""},
		{"simulator/attestation.bin", nil, v4, dstack.TDX, "collateral_missing", SignatureInvalid, ""},
		{"simulator/quote.bin", nil, v4, dstack.TDX, "collateral_missing", SignatureInvalid, ""},
		{"sev-snp/report.bin", pems("sev-snp/sev_snp_ask.pem", "sev-snp/sev_snp_vcek.pem"), snp, dstack.SEVSNP, "", SignatureValid, "OutOfDate"},
		{"sev-snp/report.bin", nil, snp, dstack.SEVSNP, "collateral_missing", SignatureInvalid, ""},
		{"sev-snp/sev_snp_attestation.bin", pems("sev-snp/sev_snp_ask.pem", "sev-snp/sev_snp_vcek.pem"), snp, dstack.SEVSNP, "", SignatureValid, "OutOfDate"},
		{"sev-snp/verifier-sev-snp-attestation.json", nil, snp, dstack.SEVSNP, "", SignatureValid, "OutOfDate"},
		{"nitro/nsm_attestation.bin", nil, time.Time{}, dstack.Nitro, "", SignatureValid, "NotReported"},
		{"nitro/versioned_nitro_attestation.bin", nil, nitroMade, dstack.Nitro, "", SignatureValid, "NotReported"},
	} {
		t.Run(c.name+" "+c.code, func(t *testing.T) {
			data := testkit.Vectors(t, "attestation/"+c.name)
			for form, text := range map[string][]byte{"as it is": data, "in hex": []byte(hex.EncodeToString(data))} {
				src, err := ReadEvidence(text, "")
				if err != nil {
					t.Fatalf("%s: %v", form, err)
				}
				at := c.at
				if at.IsZero() {
					at = madeAt(t, src)
				}
				v := Appraise(Request{Source: *src, Collateral: c.col, Roots: VendorRoots(), Policy: SignaturePolicy(), At: at})
				if v.TEE != c.tee || v.Signature != c.signature || v.TCBStatus != c.tcb || v.Accepted != (c.code == "") || c.code != "" && !v.Has(Error, c.code) {
					t.Errorf("%s: %s", form, show(v))
				}
				if !strings.HasPrefix(v.String(), "scope: signature") {
					t.Error("the scope is not said first")
				}
			}
		})
	}
}

// The published Arm CCA token: no public authority vouches for its platform's key,
// so that it counts only on the word of a caller who names it.
func TestCCAVectorOnTheCallersWord(t *testing.T) {
	data := testkit.Vectors(t, "attestation/cca/veraison-cca-good.cbor")
	_, keys, err := collateral.FromFiles(map[string][]byte{"key.jwk": testkit.Vectors(t, "attestation/cca/veraison-ec.p256.pub.jwk")})
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := collateral.FromFiles(map[string][]byte{"key.jwk": testkit.Vectors(t, "attestation/cca/veraison-ec.p384.pub.jwk")})
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, text := range [][]byte{data, []byte(hex.EncodeToString(data)), []byte(base64.StdEncoding.EncodeToString(data))} {
		src, err := ReadEvidence(text, "")
		if err != nil {
			t.Fatal(err)
		}
		req := Request{Source: *src, Roots: append(VendorRoots(), CallerKeys(keys)), Policy: SignaturePolicy(), At: at}
		v := Appraise(req)
		if !v.Accepted || v.TEE != dstack.CCA || v.Trust != dstack.TrustCaller || v.TCBStatus != "NotReported" {
			t.Error(show(v))
		}
		req.Roots = VendorRoots()
		if v := Appraise(req); v.Accepted || !v.Has(Error, "no_roots") {
			t.Error(show(v))
		}
		req.Roots = append(VendorRoots(), CallerKeys(other))
		if v := Appraise(req); v.Accepted || !v.Has(Error, "unknown_root") || v.Claims != nil {
			t.Error(show(v))
		}
	}
}

// madeAt reads the time of a Nitro document out of a verdict that refuses it for
// being verified at the wrong time.
func madeAt(t *testing.T, src *Source) time.Time {
	t.Helper()
	e, err := src.decode()
	if err != nil {
		t.Fatal(err)
	}
	at, err := nitroTime(e.Quote)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// A real enclave: its image hash stands for the workload; the app id beside it is
// nobody's word. B18: it tells no TCB status, which only a policy by name accepts.
func TestThreat_B18_NitroTellsNoTCBStatus(t *testing.T) {
	src, err := ReadEvidence(testkit.Vectors(t, "attestation/nitro/versioned_nitro_attestation.bin"), "dstack")
	if err != nil {
		t.Fatal(err)
	}
	req := Request{Source: *src, Roots: VendorRoots(), Policy: DefaultPolicy(), At: nitroMade}
	v := Appraise(req)
	if v.Workload == nil || v.TCBStatus != "NotReported" {
		t.Fatal(show(v))
	}
	req.Reference.AddComposeHash(v.Workload.ComposeHash, "the test")
	refusedFor(t, Appraise(req), "tcb_status")
	req.Policy.TCB.Accept = []string{"NotReported"}
	v = Appraise(req)
	if !v.Accepted || v.Workload.BoundBy != "pcr0 to pcr2" || !v.Workload.AppID.IsZero() {
		t.Error(show(v))
	}
	t.Log(show(v))
	// Over an hour old.
	req.At = nitroMade.Add(time.Hour + time.Minute)
	refusedFor(t, Appraise(req), "evidence_too_old")
	req.Policy.Evidence.MaxAgeSeconds = 7200
	if v := Appraise(req); !v.Accepted {
		t.Error(show(v))
	}
	// Another image.
	req.At, req.Reference = nitroMade, Reference{}
	req.Reference.AddComposeHash(dstack.ComposeHash{1}, "the test")
	refusedFor(t, Appraise(req), "compose_hash_mismatch")
}

// B01: an enclave in debug mode, whose registers are zero and whose host reads
// along, though its image hash is what it says.
func TestThreat_B01_DebugEnclaveIsRefused(t *testing.T) {
	src, err := ReadEvidence(testkit.Vectors(t, "attestation/nitro/versioned_nitro_attestation_dbg.bin"), "")
	if err != nil {
		t.Fatal(err)
	}
	req := Request{Source: *src, Roots: VendorRoots(), Policy: DefaultPolicy(), At: madeAt(t, src)}
	req.Policy.TCB.Accept = []string{"NotReported"}
	v := Appraise(req)
	if v.Accepted || !v.Has(Error, "nitro_debug") || v.Signature != SignatureValid {
		t.Error(show(v))
	}
	req.Policy.AllowDebug = true
	if v := Appraise(req); v.Accepted || v.Workload != nil {
		t.Errorf("registers of zeros name a workload%s", show(v))
	}
}

func nitroTime(quote []byte) (time.Time, error) {
	d, err := nitro.ParseDocument(quote)
	if err != nil {
		return time.Time{}, err
	}
	return d.Made, nil
}
