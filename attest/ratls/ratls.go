// SPDX-License-Identifier: Apache-2.0

// Package ratls reads and writes the certificate extensions of RA-TLS, by which a
// TLS certificate carries evidence about the holder of its key.
//
// It encodes and decodes only: it opens no connection, appraises nothing and
// accepts nobody. Certificates are attacker-controlled. Two sorts of extension
// must not be confused. Evidence ([FromCertificate]) is judged by its own
// signatures, whoever signed the certificate; this package guarantees that it was
// made over the certificate's key where it claims its report data, and names the
// report data that the quote must have. All others ([IssuerClaims]) are the
// issuer's word and worth nothing unless the certificate chains to an issuer that
// the caller trusts for them (threats.md K03).
//
// RA-TLS has no nonce: evidence may be as old as the key, and who stole the key
// has the evidence with it (threats.md B08, C01). It is for interoperation;
// package channel has the handshake that is proof against both.
// Specification: attestation.md §7.4 and §7.5, guest-agent.md §10.
package ratls

import (
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"io"
	"unicode/utf8"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// Last arcs of the extensions' object identifiers below 1.3.6.1.4.1.62397.1.
const (
	ExtQuote      = 1 // raw TDX quote; read, never written
	ExtEventLog   = 2 // JSON event log beside ExtQuote; read, never written
	ExtAppID      = 3 // 20 bytes; the issuer's word
	ExtUsage      = 4 // UTF-8; the issuer's word
	ExtContainer  = 8 // container, V0 or V1
	ExtAppInfo    = 9 // MessagePack; the issuer's word
	maxUsage      = 256
	maxAppInfo    = 64 << 10
	compressedLog = "ELGZv1" // then one gzip stream

	// MaxEvidence bounds evidence in a certificate, in bytes (threats.md B15).
	MaxEvidence = 1 << 20
	// MaxInflated bounds what a compressed event log inflates to, in bytes.
	MaxInflated = 16384
)

// Usages that upstream's programs write into ExtUsage.
const (
	UsageApp   = "app:custom"
	UsageAppCA = "app:ca"
	UsageKMS   = "kms:rpc"
)

// OID returns the object identifier of an extension.
func OID(ext int) asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 62397, 1, ext}
}

// Attestation is the evidence of a certificate, unverified.
type Attestation struct {
	Evidence *attest.Evidence

	// Container is what the certificate carries, V0 or V1. For the legacy pair of
	// quote and event log it is a V1 container made of them, whose claimed report
	// data is what the quote must have.
	Container []byte

	// ReportData is what the hardware must have signed for the evidence to speak
	// of this certificate's key. Evidence with any other says nothing about it.
	ReportData dstack.ReportData

	// Legacy says that the evidence was the pair of quote and event log.
	Legacy bool
}

// ReportData returns SHA-512("ratls-cert:" ‖ spki), spki being the DER
// SubjectPublicKeyInfo of the certificate's key (attestation.md §7.4).
func ReportData(spki []byte) dstack.ReportData {
	return binding.ReportData(binding.TagRATLS, spki)
}

// FromCertificate returns the evidence in a certificate: the container, or, only
// where there is none, the legacy pair of quote and event log. A container that
// does not decode is an error and never a reason to look at the legacy pair.
//
// Codes: ratls_no_evidence, ratls_extension_duplicate, ratls_extension_malformed,
// ratls_too_large, ratls_event_log_missing, ratls_event_log_compressed,
// ratls_report_data_mismatch (the container claims to be about something else);
// those of packages container and eventlog.
func FromCertificate(cert *x509.Certificate) (*Attestation, error) {
	want := ReportData(cert.RawSubjectPublicKeyInfo)
	raw, found, err := extension(cert, ExtContainer, MaxEvidence)
	if err != nil {
		return nil, err
	}
	if !found {
		return legacy(cert, want)
	}
	e, err := container.Decode(raw)
	if err != nil {
		return nil, err
	}
	if !e.ReportDataClaimed || e.ReportData != want {
		return nil, fault.New("ratls_report_data_mismatch", "the evidence in the certificate was made for another key than the certificate's")
	}
	return &Attestation{Evidence: e, Container: raw, ReportData: want}, nil
}

func legacy(cert *x509.Certificate, want dstack.ReportData) (*Attestation, error) {
	quote, found, err := extension(cert, ExtQuote, attest.MaxQuote)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fault.New("ratls_no_evidence", "the certificate carries no evidence").
			WithFix("ask the instance for evidence, or have it serve a RA-TLS certificate")
	}
	log, found, err := extension(cert, ExtEventLog, eventlog.MaxJSON)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fault.New("ratls_event_log_missing", "the certificate carries a quote without its event log")
	}
	if log, err = inflate(log); err != nil {
		return nil, err
	}
	events, err := eventlog.ParseJSON(log)
	if err != nil {
		return nil, err
	}
	e := &attest.Evidence{TEE: dstack.TDX, Quote: quote, EventLog: events, ReportData: want}
	raw, err := container.EncodeV1(e)
	if err != nil {
		return nil, err
	}
	return &Attestation{Evidence: e, Container: raw, ReportData: want, Legacy: true}, nil
}

// inflate returns the log as it is, or what it is the compressed form of.
func inflate(log []byte) ([]byte, error) {
	stream, compressed := bytes.CutPrefix(log, []byte(compressedLog))
	if !compressed {
		return log, nil
	}
	bad := func(err error) ([]byte, error) {
		return nil, fault.Wrap(err, "ratls_event_log_compressed", "compressed event log of the certificate")
	}
	rest := bytes.NewReader(stream)
	z, err := gzip.NewReader(rest)
	if err != nil {
		return bad(err)
	}
	z.Multistream(false)
	out, err := io.ReadAll(io.LimitReader(z, MaxInflated+1))
	switch {
	case len(out) > MaxInflated:
		return nil, fault.New("ratls_too_large", "the event log of the certificate inflates to more than %d bytes", MaxInflated)
	case err != nil:
		return bad(err)
	case rest.Len() > 0:
		return nil, fault.New("ratls_event_log_compressed", "%d bytes follow the compressed event log of the certificate", rest.Len())
	}
	return out, nil
}

// extension returns what the OCTET STRING inside an extension holds: the payload
// is wrapped twice (attestation.md §7.5).
func extension(cert *x509.Certificate, ext, limit int) (payload []byte, found bool, err error) {
	oid := OID(ext)
	for _, e := range cert.Extensions {
		if !e.Id.Equal(oid) {
			continue
		}
		if found {
			return nil, false, fault.New("ratls_extension_duplicate", "the certificate has extension %s twice", oid)
		}
		found = true
		// 6 bytes hold the tag and the longest length in use here.
		if len(e.Value) > limit+6 {
			return nil, false, fault.New("ratls_too_large", "extension %s of the certificate has %d bytes, more than %d", oid, len(e.Value), limit)
		}
		rest, err := asn1.Unmarshal(e.Value, &payload)
		if err != nil {
			return nil, false, fault.Wrap(err, "ratls_extension_malformed", "extension %s of the certificate is not an OCTET STRING", oid)
		}
		if len(rest) > 0 {
			return nil, false, fault.New("ratls_extension_malformed", "%d bytes follow the OCTET STRING in extension %s of the certificate", len(rest), oid)
		}
		if len(payload) > limit {
			return nil, false, fault.New("ratls_too_large", "extension %s of the certificate holds %d bytes, more than %d", oid, len(payload), limit)
		}
	}
	return payload, found, nil
}

// Issued is what the issuer of a certificate says about its holder. Nothing of it
// may be believed before the certificate's chain was verified to an issuer that
// is trusted to say it.
type Issued struct {
	AppID *dstack.AppID // nil when absent
	Usage string        // empty when absent
	Info  *AppInfo      // nil when absent
}

// IssuerClaims reads the extensions that are the issuer's word; absent ones stay
// zero. Codes: ratls_extension_duplicate, ratls_extension_malformed,
// ratls_too_large, ratls_app_info_malformed.
func IssuerClaims(cert *x509.Certificate) (Issued, error) {
	var out Issued
	id, found, err := extension(cert, ExtAppID, dstack.AppIDSize)
	switch {
	case err != nil:
		return Issued{}, err
	case found && len(id) != dstack.AppIDSize:
		return Issued{}, fault.New("ratls_extension_malformed", "the app id in the certificate has %d bytes, want %d", len(id), dstack.AppIDSize)
	case found:
		v := dstack.AppID(id)
		out.AppID = &v
	}
	usage, _, err := extension(cert, ExtUsage, maxUsage)
	switch {
	case err != nil:
		return Issued{}, err
	case !utf8.Valid(usage):
		return Issued{}, fault.New("ratls_extension_malformed", "the usage in the certificate is not UTF-8")
	}
	out.Usage = string(usage)
	info, found, err := extension(cert, ExtAppInfo, maxAppInfo)
	if err != nil {
		return Issued{}, err
	}
	if found {
		if out.Info, err = ParseAppInfo(info); err != nil {
			return Issued{}, err
		}
	}
	return out, nil
}

// Extensions returns the extensions of a certificate to be made, not critical and
// in upstream's order: app id, app info, usage, container. What is absent from
// issued, and an empty container, is left out.
//
// The container must have been made over [ReportData] of the certificate's key;
// its length is limited to MaxEvidence (code ratls_too_large).
func Extensions(issued Issued, container []byte) ([]pkix.Extension, error) {
	if len(container) > MaxEvidence {
		return nil, fault.New("ratls_too_large", "evidence of %d bytes for a certificate, more than %d", len(container), MaxEvidence)
	}
	var (
		out []pkix.Extension
		err error
	)
	add := func(ext int, payload []byte) {
		value, e := asn1.Marshal(payload)
		if e != nil && err == nil {
			err = e
		}
		out = append(out, pkix.Extension{Id: OID(ext), Value: value})
	}
	if issued.AppID != nil {
		add(ExtAppID, issued.AppID[:])
	}
	if issued.Info != nil {
		add(ExtAppInfo, issued.Info.Marshal())
	}
	if issued.Usage != "" {
		add(ExtUsage, []byte(issued.Usage))
	}
	if len(container) > 0 {
		add(ExtContainer, container)
	}
	return out, err
}
