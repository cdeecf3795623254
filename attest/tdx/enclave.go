// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"encoding/binary"
	"slices"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Quotes of SGX enclaves (Intel SGX ECDSA QuoteLibReference DCAP API, appendix A):
// as a TDX quote, but for the report, and with one layer of certification data less.
const (
	enclaveQuoteVersion = 3
	enclaveReportSize   = 384 // SGX REPORTBODY
)

// Bits of the first byte of an enclave's ATTRIBUTES.
const (
	enclaveInit  = 1 << 0
	enclaveDebug = 1 << 1
)

// Enclave is what a quote of an SGX enclave proves.
type Enclave struct {
	MREnclave  [32]byte
	MRSigner   [32]byte
	ISVProdID  uint16
	ISVSVN     uint16
	Attributes [16]byte
	ReportData dstack.ReportData

	TCBStatus  string // as for a TD; never Revoked
	Advisories []string
	Trust      dstack.Trust
	PPID       [16]byte  // names the machine
	Expires    time.Time // when the first thing relied upon ends
}

// EnclaveQuote is a parsed, unverified quote of an SGX enclave.
type EnclaveQuote struct {
	quote  Quote
	report [enclaveReportSize]byte
}

// ParseEnclaveQuote reads a quote of version 3, as strictly as ParseQuote.
func ParseEnclaveQuote(data []byte) (*EnclaveQuote, error) {
	if len(data) > MaxQuote {
		return nil, malformed("%d bytes exceed the limit of %d", len(data), MaxQuote)
	}
	p := parser{data: data}
	e := new(EnclaveQuote)
	q := &e.quote
	h := &q.Header
	h.Version, h.AttestationKeyType, h.TEEType = p.u16("version"), p.u16("attestation key type"), p.u32("reserved")
	copy(h.Reserved[:], p.take(4, "QE and PCE SVN"))
	copy(h.QEVendorID[:], p.take(16, "QE vendor id"))
	copy(h.UserData[:], p.take(20, "user data"))
	copy(e.report[:], p.take(enclaveReportSize, "enclave report"))
	if p.err != nil {
		return nil, p.err
	}
	switch {
	case h.Version != enclaveQuoteVersion:
		return nil, fault.New("quote_version", "SGX quote has version %d, want %d", h.Version, enclaveQuoteVersion)
	case h.TEEType != 0:
		return nil, fault.New("quote_tee_type", "quote is of TEE type %#x, want SGX (0)", h.TEEType)
	case h.AttestationKeyType != AttestationKeyECDSAP256:
		return nil, fault.New("quote_key_type", "quote has attestation key type %d, want ECDSA P-256 (%d)", h.AttestationKeyType, AttestationKeyECDSAP256)
	}
	q.Signed = data[:p.off:p.off]
	sig := p.nested("signature data")
	copy(q.Signature[:], sig.take(64, "signature"))
	copy(q.AttestationKey[:], sig.take(64, "attestation key"))
	copy(q.QEReport[:], sig.take(QEReportSize, "QE report"))
	copy(q.QEReportSignature[:], sig.take(64, "QE report signature"))
	q.QEAuthData = sig.take(int(sig.u16("QE authentication data size")), "QE authentication data")
	q.CertType = sig.u16("PCK certification data type")
	q.CertData = sig.lengthPrefixed("PCK certification data")
	if sig.err != nil {
		return nil, sig.err
	}
	switch {
	case sig.off != len(sig.data):
		return nil, malformed("%d bytes follow the certification data", len(sig.data)-sig.off)
	case slices.ContainsFunc(data[p.off:], func(b byte) bool { return b != 0 }):
		return nil, malformed("bytes other than zero follow its end at byte %d", p.off)
	}
	return e, nil
}

// VerifyEnclave establishes what a quote of an SGX enclave proves at a stated time:
// in.Evidence.Quote, with collateral that has TCB info and the QE identity of SGX in
// the fields of TDX, and the roots of TDX, which vouch for both. All of Verify's rules
// hold. An enclave in debug mode is an error (enclave_debug), since its memory is
// open; a TCB status other than Revoked is a grade for the caller to judge.
func VerifyEnclave(in attest.Input) (*Enclave, error) {
	q, err := ParseEnclaveQuote(in.Evidence.Quote)
	if err != nil {
		return nil, err
	}
	v, err := vouch(in, &q.quote, idSGX, idQE)
	if err != nil {
		return nil, err
	}
	out := &Enclave{
		MREnclave:  [32]byte(q.report[QEOffMREnclave:]),
		MRSigner:   [32]byte(q.report[QEOffMRSigner:]),
		ISVProdID:  binary.LittleEndian.Uint16(q.report[QEOffISVProdID:]),
		ISVSVN:     binary.LittleEndian.Uint16(q.report[QEOffISVSVN:]),
		Attributes: [16]byte(q.report[QEOffAttributes:]),
		ReportData: dstack.ReportData(q.report[QEOffReportData:]),
		Trust:      v.trust, PPID: v.ext.PPID, Expires: v.expires,
	}
	if out.Attributes[0]&enclaveDebug != 0 {
		return nil, fault.New("enclave_debug", "the enclave runs in debug mode: the host can read its memory")
	}
	if out.Attributes[0]&enclaveInit == 0 {
		return nil, fault.New("enclave_attributes", "the enclave is not initialised (attributes %x)", out.Attributes)
	}
	level := slices.IndexFunc(v.info.Levels, func(l tcbLevel) bool {
		return reaches(v.ext.Components[:], l.TCB.SGX) && v.ext.PCESVN >= *l.TCB.PCESVN
	})
	if level < 0 {
		return nil, fault.New("tcb_unsupported", "the platform (CPUSVN components %v, PCESVN %d) is below every published TCB level", v.ext.Components, v.ext.PCESVN)
	}
	l := v.info.Levels[level]
	if l.Status == Revoked {
		return nil, fault.New("tcb_revoked", "the platform's TCB level is revoked")
	}
	out.TCBStatus = converge(l.Status, v.qe.Status)
	out.Advisories = slices.Compact(slices.Sorted(slices.Values(slices.Concat(l.Advisories, v.qe.Advisories))))
	return out, nil
}

// EnclaveRequest names the collateral that an enclave's quote needs, as Request does
// for a TD's.
func EnclaveRequest(quote []byte) (collateral.Request, error) {
	q, err := ParseEnclaveQuote(quote)
	if err != nil {
		return collateral.Request{}, err
	}
	want, err := request(&q.quote)
	want.Enclave = true
	return want, err
}
