// SPDX-License-Identifier: Apache-2.0

package sevsnp_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-sev-guest/verify/testdata"
	"github.com/google/go-sev-guest/verify/trust"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/sevsnp"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func vector(t testing.TB, name string) []byte { return testkit.Vectors(t, "attestation/sev-snp/"+name) }

func decode(t testing.TB, raw []byte) *attest.Evidence {
	t.Helper()
	e, err := container.Decode(raw)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// realCase is evidence of real hardware. None comes with AMD's revocation list.
type realCase struct {
	name     string
	evidence *attest.Evidence
	at       time.Time // in the validity of the VCEK certificate
	code     string    // of the error beside the claims
}

func realCases(t testing.TB) []realCase {
	ask, vcek := vector(t, "sev_snp_ask.pem"), vector(t, "sev_snp_vcek.pem")
	bare := decode(t, vector(t, "sev_snp_attestation.bin"))
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
	at := time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)
	return []realCase{
		{"a Milan report of version 3", &attest.Evidence{TEE: dstack.SEVSNP, Quote: vector(t, "report.bin"), CertChain: [][]byte{vcek, ask}}, at, ""},
		{"a container without certificates, and some", bare, at, ""},
		{"a container with its chain", decode(t, raw), at, ""},
		{"go-sev-guest's Milan report of version 2, of a guest in debug mode", &attest.Evidence{
			TEE: dstack.SEVSNP, Quote: testdata.AttestationBytes,
			CertChain: [][]byte{testdata.VcekBytes, trust.AskArkMilanVcekBytes},
		}, time.Date(2023, 1, 1, 0, 0, 0, 0, time.UTC), "snp_debug"},
	}
}

// input allows the missing revocation list.
func (c realCase) input() attest.Input {
	return attest.Input{
		Evidence: c.evidence, Roots: []attest.Roots{sevsnp.VendorRoots()}, At: c.at,
		Options: attest.Options{AllowMissingCRL: true},
	}
}

func TestRealReportsVerifyUnderAMDsRoots(t *testing.T) {
	for _, c := range realCases(t) {
		t.Run(c.name, func(t *testing.T) {
			in := c.input()
			claims, err := sevsnp.Verify(in)
			if fault.Code(err) != c.code || claims == nil {
				t.Fatalf("%v, %v", claims, err)
			}
			if fmt.Sprint(claims.Unchecked) != "[certificate revocation list]" || claims.Trust != dstack.TrustProduction ||
				claims.Root != "ARK-Milan (sha256 "+sevsnp.MilanRootSHA256+")" {
				t.Errorf("unchecked %q, trust %s, root %q", claims.Unchecked, claims.Trust, claims.Root)
			}
			if claims.Product != sevsnp.Milan || claims.SNP.SigningKey != "VCEK" || claims.Debug != (c.code == "snp_debug") {
				t.Errorf("product %s, key %s, debug %v", claims.Product, claims.SNP.SigningKey, claims.Debug)
			}
			if claims.SNP.CertifiedTCB != claims.SNP.ReportedTCB {
				t.Errorf("certified %x, reported %x", claims.SNP.CertifiedTCB, claims.SNP.ReportedTCB)
			}
			in.Options.AllowMissingCRL = false
			if claims, err := sevsnp.Verify(in); fault.Code(err) != "crl_missing" || claims != nil {
				t.Errorf("without leave to miss the revocation list: %v, %v", claims, err)
			}
		})
	}
}

func TestTheRealReportSaysWhatIsKnownOfIt(t *testing.T) {
	var known struct {
		Case struct {
			Measurement dstack.Measurement `json:"measurement"`
			HostData    string             `json:"host_data"`
			DeviceID    dstack.DeviceID    `json:"device_id"`
		} `json:"snp_case"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/computed_vectors.json"), &known); err != nil {
		t.Fatal(err)
	}
	claims, err := sevsnp.Verify(realCases(t)[1].input())
	if err != nil {
		t.Fatal(err)
	}
	s := claims.SNP
	if s.Measurement != known.Case.Measurement || hex.EncodeToString(s.HostData[:]) != known.Case.HostData {
		t.Errorf("measurement %s, host data %x", s.Measurement, s.HostData)
	}
	if claims.DeviceID != known.Case.DeviceID || claims.DeviceScheme != "chip-id" {
		t.Errorf("device id %s of scheme %q, want %s", claims.DeviceID, claims.DeviceScheme, known.Case.DeviceID)
	}
	if want := "attest-test-fixture-2026"; string(bytes.TrimRight(claims.ReportData, "\x00")) != want || len(claims.ReportData) != 64 {
		t.Errorf("report data %q, want %q", claims.ReportData, want)
	}
	if want := (attest.SNPParts{Bootloader: 4, SNP: 0x17, Microcode: 0xd5}); s.Parts != want {
		t.Errorf("parts %+v, want %+v", s.Parts, want)
	}
	// Current firmware is newer than the reported one.
	if claims.TCBStatus != sevsnp.OutOfDate || claims.Advisories == nil || len(claims.Advisories) != 0 {
		t.Errorf("status %s, advisories %v", claims.TCBStatus, claims.Advisories)
	}
	if s.Version != 3 || s.CPUID != [3]byte{0x19, 1, 1} || s.PlatformInfo&sevsnp.PlatformAliasChecked == 0 {
		t.Errorf("version %d, CPUID %x, platform %#x", s.Version, s.CPUID, s.PlatformInfo)
	}
	// The VCEK certificate is the first thing that ends.
	if want := time.Date(2033, 6, 17, 1, 5, 4, 0, time.UTC); !claims.Expires.Equal(want) {
		t.Errorf("expires %s, want %s", claims.Expires, want)
	}
}

func TestThreat_B19_AnEventLogBesideAReportIsVouchedForByNothing(t *testing.T) {
	c := realCases(t)[1]
	fake, err := eventlog.RuntimeV1("gpu-attestation", []byte("a GPU that nobody saw"))
	if err != nil {
		t.Fatal(err)
	}
	c.evidence.Unbound = append(c.evidence.Unbound, fake)
	c.evidence.EventLog = append(c.evidence.EventLog, fake)
	claims, err := sevsnp.Verify(c.input())
	if err != nil {
		t.Fatal(err)
	}
	if regs := claims.RuntimeRegisters(); len(regs) != 0 {
		t.Errorf("registers %v seem to vouch for the log", regs)
	}
	text, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(text, []byte("gpu")) {
		t.Errorf("the claims repeat the log: %s", text)
	}
}

func TestRealReportsMarshalBack(t *testing.T) {
	for _, c := range realCases(t) {
		r, err := sevsnp.ParseReport(c.evidence.Quote)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(r.Marshal(), c.evidence.Quote) {
			t.Errorf("%s does not marshal to the bytes it was read from", c.name)
		}
		req, err := sevsnp.Request(c.evidence.Quote)
		if err != nil || req.ChipID != r.ChipID || req.TCB != r.ReportedTCB || req.VLEK || (req.Product == sevsnp.Milan) != (r.Version == 3) {
			t.Errorf("%s needs %+v, %v", c.name, req, err)
		}
	}
}

func TestVendorRootsAreThoseOfTheList(t *testing.T) {
	roots := sevsnp.VendorRoots()
	want := map[string]string{
		"ARK-Milan": sevsnp.MilanRootSHA256, "ARK-Genoa": sevsnp.GenoaRootSHA256, "ARK-Turin": sevsnp.TurinRootSHA256,
	}
	if len(roots.CA) != len(want) || roots.TEE != dstack.SEVSNP || roots.Trust != dstack.TrustProduction {
		t.Fatalf("%d roots of %s, trust %s", len(roots.CA), roots.TEE, roots.Trust)
	}
	for _, ca := range roots.CA {
		cn := ca.Subject.CommonName
		if got := attest.Fingerprint(ca); got != want[cn] {
			t.Errorf("%s has fingerprint %s, want %s", cn, got, want[cn])
		}
		if err := ca.CheckSignatureFrom(ca); err != nil {
			t.Errorf("%s is not self-signed: %v", cn, err)
		}
		// A second source: what go-sev-guest embeds.
		theirs := trust.DefaultRootCerts[cn[len("ARK-"):]].ProductCerts.Ark
		if !ca.Equal(theirs) {
			t.Errorf("%s differs from go-sev-guest's", cn)
		}
	}
}
