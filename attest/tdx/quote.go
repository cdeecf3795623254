// SPDX-License-Identifier: Apache-2.0

// Package tdx reads and verifies Intel TDX quotes, and quotes of SGX enclaves
// ([VerifyEnclave]), for which the same infrastructure vouches.
//
// [ParseQuote] turns hostile bytes into a typed quote; it proves nothing. [Verify]
// does all of Intel's DCAP verification at a stated time, from collateral it is
// given: certificate chains, revocation lists, signed TCB info and QE identity,
// the quote's own signatures, TCB levels, TDX module identity and the TD's
// attributes. Every refusal has its own code. It trusts the roots its caller
// passes, and nothing else; quote and collateral are attacker-controlled. It
// opens no socket, reads no clock, and uses the standard library only, so that
// the same code runs in a browser.
//
// Specification: attestation.md §2 and Field notes; threats.md B01, B02, B05, B06.
package tdx

import (
	"bytes"
	"encoding/binary"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Header is the first 48 bytes of a quote.
type Header struct {
	Version            uint16 // 4 or 5
	AttestationKeyType uint16
	TEEType            uint32
	Reserved           [4]byte
	QEVendorID         [16]byte
	UserData           [20]byte
}

// ReportBody is the TD report inside a quote. Byte arrays are in memory order.
type ReportBody struct {
	TEETCBSVN      [16]byte // [0] TDX module ISVSVN, [1] TDX module version
	MRSEAM         dstack.Measurement
	MRSignerSEAM   dstack.Measurement // zero for Intel's module
	SEAMAttributes [8]byte
	TDAttributes   [8]byte
	XFAM           [8]byte
	MRTD           dstack.Measurement
	MRConfigID     dstack.MRConfigID
	MROwner        dstack.Measurement
	MROwnerConfig  dstack.Measurement
	RTMR           [4]dstack.Measurement
	ReportData     dstack.ReportData

	V15         bool     // body type 3: the fields below are present
	TEETCBSVN2  [16]byte // what the module is now, after updates since launch
	MRServiceTD dstack.Measurement
}

// MarshalV10 returns the body in the layout of TDX 1.0; the V15 fields are left out.
func (b ReportBody) MarshalV10() (out [BodySizeV10]byte) {
	w := out[:0]
	for _, f := range [][]byte{
		b.TEETCBSVN[:], b.MRSEAM[:], b.MRSignerSEAM[:], b.SEAMAttributes[:], b.TDAttributes[:], b.XFAM[:],
		b.MRTD[:], b.MRConfigID[:], b.MROwner[:], b.MROwnerConfig[:],
		b.RTMR[0][:], b.RTMR[1][:], b.RTMR[2][:], b.RTMR[3][:], b.ReportData[:],
	} {
		w = append(w, f...)
	}
	return out
}

// MarshalV15 returns the body in the layout of TDX 1.5.
func (b ReportBody) MarshalV15() (out [BodySizeV15]byte) {
	v10 := b.MarshalV10()
	copy(out[:], v10[:])
	copy(out[OffTEETCBSVN2:], b.TEETCBSVN2[:])
	copy(out[OffMRServiceTD:], b.MRServiceTD[:])
	return out
}

// Attributes returns TD_ATTRIBUTES as a number, for the Attr constants.
func (b ReportBody) Attributes() uint64 { return binary.LittleEndian.Uint64(b.TDAttributes[:]) }

func parseBody(data []byte) ReportBody {
	var b ReportBody
	r := bytes.NewReader(data)
	for _, f := range [][]byte{
		b.TEETCBSVN[:], b.MRSEAM[:], b.MRSignerSEAM[:], b.SEAMAttributes[:], b.TDAttributes[:], b.XFAM[:],
		b.MRTD[:], b.MRConfigID[:], b.MROwner[:], b.MROwnerConfig[:],
		b.RTMR[0][:], b.RTMR[1][:], b.RTMR[2][:], b.RTMR[3][:], b.ReportData[:],
	} {
		_, _ = r.Read(f)
	}
	if len(data) == BodySizeV15 {
		b.V15 = true
		_, _ = r.Read(b.TEETCBSVN2[:])
		_, _ = r.Read(b.MRServiceTD[:])
	}
	return b
}

// Quote is a parsed, unverified quote.
type Quote struct {
	Header         Header
	BodyType       uint16 // BodyTypeTD10 or BodyTypeTD15
	Signed         []byte // header, body descriptor (v5) and body, as the attestation key signs them
	Signature      [64]byte
	AttestationKey [64]byte // P-256 point, x ‖ y big-endian

	QEReport          [QEReportSize]byte
	QEReportSignature [64]byte
	QEAuthData        []byte
	CertType          uint16 // kind of CertData
	CertData          []byte

	body ReportBody
}

// Body returns the TD report.
func (q *Quote) Body() ReportBody { return q.body }

// ParseQuote reads a quote of version 4 or 5. It refuses truncated data,
// lengths that disagree with each other and anything but zeros after the
// declared end (hosts pad quotes with zeros).
func ParseQuote(data []byte) (*Quote, error) {
	if len(data) > MaxQuote {
		return nil, malformed("%d bytes exceed the limit of %d", len(data), MaxQuote)
	}
	p := parser{data: data}
	q := &Quote{BodyType: BodyTypeTD10}
	h := &q.Header
	h.Version, h.AttestationKeyType, h.TEEType = p.u16("version"), p.u16("attestation key type"), p.u32("TEE type")
	copy(h.Reserved[:], p.take(4, "header"))
	copy(h.QEVendorID[:], p.take(16, "QE vendor id"))
	copy(h.UserData[:], p.take(20, "user data"))
	if p.err != nil {
		return nil, p.err
	}
	if h.Version != 4 && h.Version != 5 {
		return nil, fault.New("quote_version", "TDX quote has version %d, want 4 or 5", h.Version)
	}
	if h.TEEType != TEETypeTDX {
		return nil, fault.New("quote_tee_type", "quote is of TEE type %#x, want TDX (%#x)", h.TEEType, TEETypeTDX)
	}
	if h.AttestationKeyType != AttestationKeyECDSAP256 {
		return nil, fault.New("quote_key_type", "quote has attestation key type %d, want ECDSA P-256 (%d)", h.AttestationKeyType, AttestationKeyECDSAP256)
	}
	size := uint32(BodySizeV10)
	if h.Version == 5 {
		q.BodyType, size = p.u16("body type"), p.u32("body size")
		want := map[uint16]uint32{BodyTypeTD10: BodySizeV10, BodyTypeTD15: BodySizeV15}[q.BodyType]
		if p.err == nil && (want == 0 || size != want) {
			return nil, fault.New("quote_body_type", "quote has body type %d of %d bytes", q.BodyType, size)
		}
	}
	if raw := p.take(int(size), "TD report"); p.err == nil {
		q.body = parseBody(raw)
		q.Signed = data[:p.off:p.off]
	}

	// The signature data and the two layers of certification data inside it must
	// fill each other exactly.
	sig := p.nested("signature data")
	copy(q.Signature[:], sig.take(64, "signature"))
	copy(q.AttestationKey[:], sig.take(64, "attestation key"))
	outer := sig.u16("certification data type")
	if sig.err == nil && outer != CertTypeQEReport {
		return nil, fault.New("quote_cert_type", "quote has certification data of type %d, want a QE report (%d)", outer, CertTypeQEReport)
	}
	qe := sig.nested("certification data")
	copy(q.QEReport[:], qe.take(QEReportSize, "QE report"))
	copy(q.QEReportSignature[:], qe.take(64, "QE report signature"))
	q.QEAuthData = qe.take(int(qe.u16("QE authentication data size")), "QE authentication data")
	q.CertType = qe.u16("PCK certification data type")
	q.CertData = qe.lengthPrefixed("PCK certification data")
	if qe.err != nil {
		return nil, qe.err
	}
	switch {
	case qe.off != len(qe.data):
		return nil, malformed("%d bytes follow the PCK certification data", len(qe.data)-qe.off)
	case sig.off != len(sig.data):
		return nil, malformed("%d bytes follow the certification data", len(sig.data)-sig.off)
	case len(bytes.Trim(data[p.off:], "\x00")) != 0:
		return nil, malformed("bytes other than zero follow its end at byte %d", p.off)
	}
	return q, nil
}

func malformed(format string, args ...any) *fault.Error {
	return fault.New("quote_malformed", "TDX quote: "+format, args...)
}

// parser consumes fields; after the first failure it returns zeros and keeps
// the error. The offset at says where its data begins in the quote.
type parser struct {
	data []byte
	off  int
	at   int
	err  error
}

func (p *parser) take(n int, what string) []byte {
	if p.err != nil {
		return nil
	}
	if n < 0 || n > len(p.data)-p.off {
		p.err = malformed("%s needs %d bytes at byte %d, %d are left", what, n, p.at+p.off, len(p.data)-p.off)
		return nil
	}
	b := p.data[p.off : p.off+n : p.off+n]
	p.off += n
	return b
}

func (p *parser) u16(what string) uint16 {
	if b := p.take(2, what); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (p *parser) u32(what string) uint32 {
	if b := p.take(4, what); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// nested returns a parser over a length-prefixed field.
func (p *parser) nested(what string) parser {
	data := p.lengthPrefixed(what)
	return parser{data: data, at: p.at + p.off - len(data), err: p.err}
}

// lengthPrefixed takes a u32 and that many bytes. Where int has 32 bits a large
// length becomes negative, which take refuses.
func (p *parser) lengthPrefixed(what string) []byte {
	n := p.u32(what + " size")
	return p.take(int(n), what)
}
