// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"

	"github.com/dstack-go/dstack/attest/identity"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// CertificateResponse is what --verify-cert prints.
type CertificateResponse struct {
	IsValid bool               `json:"is_valid"`
	Details CertificateDetails `json:"details"`
	Verdict *verifier.Verdict  `json:"verdict"`
}

// CertificateDetails are of an RA-TLS certificate whose key the quote commits to.
type CertificateDetails struct {
	TEEVariant   string              `json:"tee_variant"`
	ReportData   Hex                 `json:"report_data"`
	PublicKeyDER Hex                 `json:"public_key_der"` // SubjectPublicKeyInfo
	AppInfo      *CertificateAppInfo `json:"app_info"`       // null when it cannot be read
}

// CertificateAppInfo is an AppInfo, and whether the launch registers are those of
// the image that it names. They are not compared where that needs a download.
type CertificateAppInfo struct {
	AppInfo
	OSImageHashVerified bool `json:"os_image_hash_verified"`
}

// maxCertificate bounds a certificate file in bytes.
const maxCertificate = 1 << 20

// VerifyCertificate judges a self-signed RA-TLS certificate, PEM or DER, now: its
// form, the evidence in it, and that this commits to its key. Codes: those of
// ratls.CheckStandalone and ratls.FromCertificate, certificate_malformed, and
// certificate_evidence for evidence that does not hold.
func (s *Service) VerifyCertificate(ctx context.Context, data []byte) (*CertificateResponse, error) {
	if len(data) > maxCertificate {
		return nil, fault.New("certificate_malformed", "a certificate of %d bytes", len(data))
	}
	if text := bytes.TrimSpace(data); bytes.HasPrefix(text, []byte("-----BEGIN")) {
		block, _ := pem.Decode(text)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fault.New("certificate_malformed", "the first PEM block is no certificate")
		}
		data = block.Bytes
	}
	cert, err := x509.ParseCertificate(data)
	if err != nil {
		return nil, fault.Wrap(err, "certificate_malformed", "the certificate is neither PEM nor DER")
	}
	q := &inquiry{at: s.now().UTC(), policy: s.policy}
	if err := ratls.CheckStandalone(cert, q.at); err != nil {
		return nil, err
	}
	src, err := verifier.FromCertificate(cert)
	if code := fault.Code(err); code == "ratls_report_data_mismatch" {
		return nil, fault.Wrap(err, code, "report data mismatch") // upstream's words
	}
	if err != nil {
		return nil, err
	}
	if err := q.container(src.Container); err != nil {
		return nil, err
	}
	q.src = *src
	out := &Response{Details: Details{AdvisoryIDs: []string{}}}
	s.judge(ctx, q, out)
	if !out.Details.QuoteVerified {
		return nil, fault.New("certificate_evidence", "%s", *out.Reason)
	}
	r := &CertificateResponse{IsValid: true, Verdict: out.Verdict}
	reportData, err := hex.DecodeString(*out.Details.ReportData)
	if err != nil {
		return nil, err
	}
	r.Details = CertificateDetails{TEEVariant: *out.Details.TEEVariant, ReportData: reportData, PublicKeyDER: cert.RawSubjectPublicKeyInfo}
	r.Details.AppInfo = q.appInfo(out)
	return r, nil
}

// appInfo reads the identity whether or not the image's check went through.
func (q *inquiry) appInfo(out *Response) *CertificateAppInfo {
	if a := out.Details.AppInfo; a != nil {
		return &CertificateAppInfo{AppInfo: *a, OSImageHashVerified: out.Details.OSImageHashVerified}
	}
	vm, err := q.src.VMConfig()
	if err != nil || q.claims.TDX != nil && q.claims.TPM != nil {
		return nil // on Google Cloud, mr_system is made of the image hash that did not hold
	}
	image, _ := hex.DecodeString(vm.OSImageHash)
	info, err := identity.Of(identity.Input{Claims: q.claims, Evidence: q.evidence, Document: vm.MRConfig, Image: image})
	if err != nil {
		return nil
	}
	return &CertificateAppInfo{AppInfo: *newAppInfo(info)}
}
