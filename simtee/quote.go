// SPDX-License-Identifier: Apache-2.0

package simtee

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx"
)

// Body is what the simulated module reports of a TD. Zero values are those of
// fields that dstack does not use.
type Body struct {
	MRTD       dstack.Measurement
	RTMR       [4]dstack.Measurement
	MRConfigID dstack.MRConfigID
	ReportData dstack.ReportData
	Debug      bool // TD_ATTRIBUTES.DEBUG: the host may read the TD
}

// xfam is the extended features mask of the real quotes in the test vectors.
const xfam = 0x0000_0000_0006_02e7

// bytes is the 584-byte TD report body of TDX 1.0, little endian.
func (b Body) bytes() []byte {
	le := binary.LittleEndian
	out := make([]byte, tdx.BodySizeV10)
	copy(out[tdx.OffTEETCBSVN:], teeTCBSVN[:])
	// MRSEAM is the measurement of no module; MRSIGNERSEAM zero means Intel, and
	// verifiers demand it.
	seam := sha256.Sum256([]byte("dstack simulated TDX module"))
	copy(out[tdx.OffMRSEAM:], seam[:])
	attributes := tdx.AttrSEPTVEDisable
	if b.Debug {
		attributes |= tdx.AttrDebug
	}
	le.PutUint64(out[tdx.OffTDAttributes:], attributes)
	le.PutUint64(out[tdx.OffXFAM:], xfam)
	copy(out[tdx.OffMRTD:], b.MRTD[:])
	copy(out[tdx.OffMRConfigID:], b.MRConfigID[:])
	for i := range b.RTMR {
		copy(out[tdx.OffRTMR0+i*dstack.MeasurementSize:], b.RTMR[i][:])
	}
	copy(out[tdx.OffReportData:], b.ReportData[:])
	return out
}

// Quote signs a body: a version 4 quote with the quoting enclave's report, 32
// bytes of authentication data and the PCK certificate chain (spec/attestation.md
// §2; Intel TDX DCAP Quoting Library API, appendix A.3).
func (p *PKI) Quote(b Body) ([]byte, error) {
	le := binary.LittleEndian
	quote := make([]byte, tdx.HeaderSize)
	le.PutUint16(quote, 4)
	le.PutUint16(quote[2:], tdx.AttestationKeyECDSAP256)
	le.PutUint32(quote[4:], tdx.TEETypeTDX)
	copy(quote[12:], tdx.IntelQEVendorID[:])
	// user_data: 16 bytes that name the quoting enclave, 4 zero.
	qeID := sha256.Sum256(append([]byte("dstack simulated QE ID"), p.ppid[:]...))
	copy(quote[28:44], qeID[:])
	quote = append(quote, b.bytes()...)

	signature, err := sign(p.attestation, quote)
	if err != nil {
		return nil, fmt.Errorf("sign quote: %w", err)
	}
	point, err := p.attestation.PublicKey.Bytes()
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	key := point[1:] // x ‖ y without the mark of an uncompressed point
	report, err := p.qeReport(key)
	if err != nil {
		return nil, err
	}
	chain := []byte(pemChain(p.pckCert, p.caCert, p.rootCert))

	certification := append([]byte(nil), report...)
	certification = le.AppendUint16(certification, uint16(len(p.qeAuth)))
	certification = append(certification, p.qeAuth[:]...)
	certification = le.AppendUint16(certification, tdx.CertTypePCKChain)
	certification = le.AppendUint32(certification, uint32(len(chain)))
	certification = append(certification, chain...)

	auth := append(signature, key...)
	auth = le.AppendUint16(auth, tdx.CertTypeQEReport)
	auth = le.AppendUint32(auth, uint32(len(certification)))
	auth = append(auth, certification...)

	quote = le.AppendUint32(quote, uint32(len(auth)))
	return append(quote, auth...), nil
}

// qeReport returns the quoting enclave's report, whose first 32 bytes of report
// data are SHA-256(attestation key ‖ authentication data), and its signature by
// the PCK.
func (p *PKI) qeReport(attestationKey []byte) ([]byte, error) {
	le := binary.LittleEndian
	report := make([]byte, tdx.QEReportSize)
	copy(report[tdx.QEOffCPUSVN:], cpuSVN[:])
	copy(report[tdx.QEOffAttributes:], qeAttributes[:])
	copy(report[tdx.QEOffMREnclave:], qeMREnclave[:])
	copy(report[tdx.QEOffMRSigner:], qeMRSigner[:])
	le.PutUint16(report[tdx.QEOffISVProdID:], qeISVProdID)
	le.PutUint16(report[tdx.QEOffISVSVN:], qeISVSVN)
	binding := sha256.Sum256(append(append([]byte(nil), attestationKey...), p.qeAuth[:]...))
	copy(report[tdx.QEOffReportData:], binding[:])
	signature, err := sign(p.pck, report)
	if err != nil {
		return nil, fmt.Errorf("sign QE report: %w", err)
	}
	return append(report, signature...), nil
}
