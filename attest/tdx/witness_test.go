// SPDX-License-Identifier: Apache-2.0

//go:build !js

// The witness does not build for js/wasm.

package tdx_test

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tdx-guest/abi"
	pb "github.com/google/go-tdx-guest/proto/tdx"
	"github.com/google/go-tdx-guest/verify"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
)

// The witness is another implementation, not an oracle: it does not check the
// QE vendor id, TD attributes or CRL critical extensions, knows pass and fail
// only, and takes the module's status for the platform's. What both accept and
// what both refuse is a check of our reading of the formats.

// getter serves collateral to the witness as the vendor's service would.
type getter struct{ col collateral.TDX }

func (g getter) Get(u string) (map[string][]string, []byte, error) {
	header := func(name, chain string) map[string][]string {
		return map[string][]string{name: {url.QueryEscape(chain)}}
	}
	switch {
	case strings.Contains(u, "/pckcrl"):
		return header("Sgx-Pck-Crl-Issuer-Chain", g.col.PCKCRLIssuerChain), g.col.PCKCRL, nil
	case strings.Contains(u, "/tcb?"):
		return header("Tcb-Info-Issuer-Chain", g.col.TCBInfoIssuerChain),
			fmt.Appendf(nil, `{"tcbInfo":%s,"signature":"%x"}`, g.col.TCBInfo, []byte(g.col.TCBInfoSignature)), nil
	case strings.Contains(u, "/qe/identity"):
		return header("Sgx-Enclave-Identity-Issuer-Chain", g.col.QEIdentityIssuerChain),
			fmt.Appendf(nil, `{"enclaveIdentity":%s,"signature":"%x"}`, g.col.QEIdentity, []byte(g.col.QEIdentitySignature)), nil
	default: // the CRL distribution point of the root
		return nil, g.col.RootCACRL, nil
	}
}

func witness(quote []byte, col collateral.TDX, roots attest.Roots, at time.Time) error {
	pool := x509.NewCertPool()
	for _, c := range roots.CA {
		pool.AddCert(c)
	}
	return verify.RawTdxQuote(quote, &verify.Options{
		CheckRevocations: true, GetCollateral: true, Getter: getter{col}, TrustedRoots: pool,
		Now: &verify.TimeSet{PckCertChain: at, TcbInfo: at, QeIdentity: at, PckCrl: at, RootCaCrl: at},
	})
}

func TestWitnessAcceptsWhatWeAccept(t *testing.T) {
	t.Run("real v4 quote", func(t *testing.T) {
		quote, col, at := vector(t, "v4")
		if err := witness(quote, col, tdx.VendorRoots(), at); err != nil {
			t.Error(err)
		}
	})
	t.Run("synthetic v4 quote", func(t *testing.T) {
		p := tdxtest.New(t)
		if err := witness(p.Quote(p.Body()), p.Collateral(), p.Roots(), tdxtest.At); err != nil {
			t.Error(err)
		}
	})
	t.Run("synthetic v5 quote", func(t *testing.T) {
		p := tdxtest.New(t)
		p.Header.Version = 5
		b := p.Body()
		b.V15, b.TEETCBSVN2 = true, b.TEETCBSVN
		if err := witness(p.Quote(b), p.Collateral(), p.Roots(), tdxtest.At); err != nil {
			t.Error(err)
		}
	})
}

// lenient are the mutations that the witness accepts, by what it does not look at.
var lenient = map[string][]string{
	"what follows the quote, and its size": {"a byte after the end", "a quote beyond the size limit"},
	"the QE vendor id":                     {"a quoting enclave of another vendor"},
	"text between certificates":            {"a PCK chain with text between certificates"},
	"critical extensions of a CRL":         {"B02: a delta CRL"},
	"when validity begins":                 {"B02: a PCK CRL of the future", "TCB info of the future", "a QE identity of the future"},
	"the issuer chain of the PCK CRL":      {"an issuer chain of the PCK CRL to a foreign root", "an issuer chain to the vendor's other intermediate", "a PCK CRL by the TCB signer"},
	"bytes outside the JSON value":         {"TCB info with white space added"},
	"equal keys":                           {"signed TCB info with a field twice"},
	"absent fields, which it reads as zero": {"a level without a PCESVN", "a level with fifteen components", "a component without an SVN",
		"TCB info without an issue date", "a module without levels", "a level without a date",
		"a module level without an ISVSVN", "a module identity without a signer"},
	"the platform's level when the module has one": {"a platform whose level is revoked", "a platform whose SGX part is revoked"},
	"the debug bit apart from the mask":            {"B01: a debug quoting enclave that the mask would let pass"},
	"the size of QE authentication data":           {"QE authentication data of 31 bytes", "no QE authentication data"},
	"TD attributes and service TD (its policy package does)": {"B01: TUD bit 0", "B01: TUD bit 1", "B01: TUD bit 2", "B01: TUD bit 3",
		"B01: TUD bit 4", "B01: TUD bit 5", "B01: TUD bit 6", "B01: TUD bit 7", "A06: a TD that may migrate",
		"a TD with virtualization exceptions on", "A06: a bound service TD"},
}

func TestWitnessRefusesWhatWeRefuse(t *testing.T) {
	agree, accepts := 0, map[string]bool{}
	for _, names := range lenient {
		for _, name := range names {
			accepts[name] = true
		}
	}
	for _, m := range mutations() {
		if m.roots != nil || m.at != (time.Time{}) {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			p := tdxtest.New(t)
			if m.platform != nil {
				m.platform(p)
			}
			body := p.Body()
			if m.body != nil {
				m.body(&body)
			}
			quote, col := p.Quote(body), p.Collateral()
			if m.quote != nil {
				quote = m.quote(quote)
			}
			if m.collateral != nil {
				m.collateral(p, &col)
			}
			err := func() (err error) {
				// The witness panics on lengths that lie; that counts as refusal here.
				defer func() {
					if r := recover(); r != nil {
						err = fmt.Errorf("panic: %v", r)
					}
				}()
				return witness(quote, col, p.Roots(), tdxtest.At)
			}()
			if err == nil && !accepts[m.name] {
				t.Errorf("the witness accepts it; we say %s", m.code)
			}
			if err != nil {
				agree++
			}
		})
	}
	t.Logf("the witness refuses %d of the mutations too", agree)
}

// The parsers agree on every field.
func TestWitnessReadsTheSameFields(t *testing.T) {
	v4, _, _ := vector(t, "v4")
	v5, _, _ := vector(t, "v5")
	for name, raw := range map[string][]byte{"v4": v4, "v5": v5} {
		t.Run(name, func(t *testing.T) {
			ours, err := tdx.ParseQuote(raw)
			if err != nil {
				t.Fatal(err)
			}
			b := ours.Body()
			theirs, err := abi.QuoteToProto(raw)
			if err != nil {
				t.Fatal(err)
			}
			var f interface {
				GetTeeTcbSvn() []byte
				GetMrTd() []byte
				GetMrConfigId() []byte
				GetRtmrs() [][]byte
				GetReportData() []byte
				GetTdAttributes() []byte
			}
			switch q := theirs.(type) {
			case *pb.QuoteV4:
				f = q.TdQuoteBody
			case *pb.QuoteV5:
				f = q.TdQuoteBodyDescriptor.TdQuoteBodyV5
			default:
				t.Fatalf("%T", theirs)
			}
			for field, pair := range map[string][2][]byte{
				"tee_tcb_svn": {b.TEETCBSVN[:], f.GetTeeTcbSvn()}, "mr_td": {b.MRTD[:], f.GetMrTd()},
				"mr_config_id": {b.MRConfigID[:], f.GetMrConfigId()}, "rtmr0": {b.RTMR[0][:], f.GetRtmrs()[0]},
				"rtmr3": {b.RTMR[3][:], f.GetRtmrs()[3]}, "report_data": {b.ReportData[:], f.GetReportData()},
				"td_attributes": {b.TDAttributes[:], f.GetTdAttributes()},
			} {
				if string(pair[0]) != string(pair[1]) {
					t.Errorf("%s: ours %s, theirs %s", field, hex.EncodeToString(pair[0]), hex.EncodeToString(pair[1]))
				}
			}
		})
	}
}
