// SPDX-License-Identifier: Apache-2.0

package tdx

import "encoding/asn1"

// Layout of a quote (Intel TDX DCAP Quoting Library API, appendix A.3 and A.4);
// all integers little-endian.
const (
	HeaderSize         = 48
	BodySizeV10        = 584 // TD report of TDX 1.0
	BodySizeV15        = 648 // of TDX 1.5: TEE_TCB_SVN_2 and MRSERVICETD follow
	BodyDescriptorSize = 6   // v5 only, after the header: u16 type, u32 size

	BodyTypeTD10 = 2
	BodyTypeTD15 = 3

	AttestationKeyECDSAP256 = 2
	TEETypeTDX              = 0x81

	QEReportSize = 384 // SGX report body of the quoting enclave
	QEAuthSize   = 32  // QE authentication data

	// Kinds of certification data.
	CertTypeEncryptedPPID2048 = 2
	CertTypeEncryptedPPID3072 = 3
	CertTypePCKChain          = 5 // PEM, leaf first
	CertTypeQEReport          = 6 // nests one of the above

	// MaxQuote bounds a quote in bytes; real ones are below 8 KiB.
	MaxQuote = 128 << 10
)

// IntelQEVendorID is the vendor of the quoting enclave that this package accepts.
var IntelQEVendorID = [16]byte{0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07}

// Offsets in a report body of either size.
const (
	OffTEETCBSVN      = 0
	OffMRSEAM         = 16
	OffMRSignerSEAM   = 64
	OffSEAMAttributes = 112
	OffTDAttributes   = 120
	OffXFAM           = 128
	OffMRTD           = 136
	OffMRConfigID     = 184
	OffMROwner        = 232
	OffMROwnerConfig  = 280
	OffRTMR0          = 328
	OffReportData     = 520
	OffTEETCBSVN2     = 584 // V15 only
	OffMRServiceTD    = 600 // V15 only
)

// Offsets in a QE report (SGX REPORTBODY).
const (
	QEOffCPUSVN     = 0   // 16
	QEOffMiscSelect = 16  // u32
	QEOffAttributes = 48  // 16
	QEOffMREnclave  = 64  // 32
	QEOffMRSigner   = 128 // 32
	QEOffISVProdID  = 256 // u16
	QEOffISVSVN     = 258 // u16
	QEOffReportData = 320 // 64
)

// Bits of TD_ATTRIBUTES as a little-endian u64 (TDX module ABI, TD_ATTRIBUTES).
const (
	AttrDebug         uint64 = 1 << 0
	AttrTUD           uint64 = 0xff // "TD under debug": any bit unmasks the TD
	AttrSEPTVEDisable uint64 = 1 << 28
	AttrMigratable    uint64 = 1 << 29
	AttrPKS           uint64 = 1 << 30
	AttrKL            uint64 = 1 << 31
	AttrPerfmon       uint64 = 1 << 63
)

// Common names in Intel's SGX PKI (Intel SGX PCK Certificate and CRL Profile
// Specification). A certificate is good for its role only: names are checked so
// that a PCK certificate cannot sign TCB info.
const (
	CNRoot        = "Intel SGX Root CA"
	CNPlatformCA  = "Intel SGX PCK Platform CA"
	CNProcessorCA = "Intel SGX PCK Processor CA"
	CNPCK         = "Intel SGX PCK Certificate"
	CNTCBSigning  = "Intel SGX TCB Signing"
)

// Object identifiers of the SGX extension in a PCK certificate (same document).
// OIDSGX's value is a SEQUENCE of SEQUENCE {OID, value} with the ones below;
// OIDTCB's value is such a sequence again, with OIDTCB.1 to .16 (component SVNs),
// .17 PCESVN (INTEGER) and .18 CPUSVN (OCTET STRING, 16 bytes).
var (
	OIDSGX     = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1}
	OIDPPID    = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 1}     // OCTET STRING, 16
	OIDTCB     = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 2}     // SEQUENCE
	OIDPCESVN  = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 2, 17} // INTEGER
	OIDCPUSVN  = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 2, 18} // OCTET STRING, 16
	OIDPCEID   = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 3}     // OCTET STRING, 2
	OIDFMSPC   = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 4}     // OCTET STRING, 6
	OIDSGXType = asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1, 5}     // ENUMERATED
)
