// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Verify establishes what a quote proves at a stated time; it is an
// [attest.Verify]. Collateral must be complete: a missing revocation list is a
// refusal. Everything, quote and collateral, must chain to one certificate of one
// of the roots, whose Trust the claims carry.
//
// A TCB status other than Revoked is not an error but a grade, Claims.TCBStatus,
// which the caller's policy must judge. A platform whose level is revoked or below
// every published one, a module that is not Intel's, and TD attributes outside the
// allow-list are errors beside the claims.
func Verify(in attest.Input) (*attest.Claims, error) {
	q, err := ParseQuote(in.Evidence.Quote)
	if err != nil {
		return nil, err
	}
	w, err := vouch(in, q, idTDX, idTDQE)
	if err != nil {
		return nil, err
	}
	body := q.Body()
	claims := &attest.Claims{
		TEE: dstack.TDX, Trust: w.trust, Root: attest.DescribeRoot(w.anchor, w.trust),
		TDX: &attest.TDX{
			MRTD: body.MRTD, RTMR: body.RTMR, MRConfigID: body.MRConfigID,
			MROwner: body.MROwner, MROwnerConfig: body.MROwnerConfig,
			MRSEAM: body.MRSEAM, MRSignerSEAM: body.MRSignerSEAM, MRServiceTD: body.MRServiceTD,
			SEAMAttributes: body.SEAMAttributes, TDAttributes: body.TDAttributes, XFAM: body.XFAM,
			TEETCBSVN: body.TEETCBSVN, TEETCBSVN2: body.TEETCBSVN2, V15: body.V15,
			QEStatus: w.qe.Status, PPID: w.ext.PPID, FMSPC: w.ext.FMSPC,
		},
		ReportData:    body.ReportData[:],
		TCBStatus:     Unsupported,
		Advisories:    []string{},
		TCBEvaluation: w.evaluation,
		Product:       hex.EncodeToString(w.ext.FMSPC[:]),
		Debug:         body.Attributes()&AttrDebug != 0,
		DeviceID:      sha256.Sum256(w.ext.PPID[:]), DeviceScheme: "ppid",
		At: in.At, Expires: w.expires,
	}

	// From here on the signatures hold; what follows judges platform and TD.
	grade, err := w.info.appraise(body, w.ext, w.qe)
	if err != nil {
		if fault.Code(err) == "tcb_revoked" {
			claims.TCBStatus = Revoked
		}
		return claims, err
	}
	claims.TCBStatus, claims.Advisories, claims.TCBDate = grade.status, grade.advisories, grade.date
	claims.TDX.PlatformStatus, claims.TDX.ModuleStatus = grade.platform, grade.module
	if !body.MRSignerSEAM.IsZero() {
		return claims, fault.New("mr_signer_seam", "the TDX module is signed by %s, want Intel's (all zero)", body.MRSignerSEAM)
	}
	return claims, checkAttributes(body, in.Options)
}

// vouched is what a quote's signatures and the vendor's documents establish about
// whoever made it, before its report is judged.
type vouched struct {
	verification
	trust      dstack.Trust
	ext        PCKExtension
	info       *info
	qe         enclaveLevel
	evaluation uint32 // of the older document
}

// vouch verifies everything about a quote but its report, whose signature it
// verifies; infoID and qeID say which documents are for that kind of quote.
func vouch(in attest.Input, q *Quote, infoID, qeID string) (*vouched, error) {
	var col collateral.TDX
	if in.Collateral != nil {
		col = in.Collateral.TDX
	}
	if q.Header.QEVendorID != IntelQEVendorID {
		return nil, fault.New("qe_vendor", "quoting enclave has vendor id %x, want Intel's %x", q.Header.QEVendorID, IntelQEVendorID)
	}
	if err := col.Check(); err != nil {
		return nil, err
	}

	// Who vouches: the PCK certificate chain selects the one root that all the
	// collateral must chain to as well, so that development collateral can never
	// grade a production quote.
	v := &vouched{verification: verification{at: in.At, memo: in.Memo}}
	pckPEM := q.CertData
	switch q.CertType {
	case CertTypePCKChain:
	case CertTypeEncryptedPPID2048, CertTypeEncryptedPPID3072:
		pckPEM = []byte(col.PCKCertificateChain)
	default:
		return nil, fault.New("quote_cert_type", "quote has PCK certification data of type %d, want %d, %d or %d",
			q.CertType, CertTypePCKChain, CertTypeEncryptedPPID2048, CertTypeEncryptedPPID3072)
	}
	pckChain, err := v.chain("pck", pckPEM)
	if err != nil {
		return nil, err
	}
	if v.trust, err = v.chooseRoot(pckChain, in.Roots); err != nil {
		return nil, err
	}
	if in.Collateral == nil || !in.Collateral.HasTDX() {
		return nil, fault.New("collateral_missing", "there is no collateral (TCB info, QE identity, revocation lists) to verify the quote with").
			WithFix("fetch it for FMSPC and CA of the quote's PCK certificate")
	}
	if err := v.loadRootCRL(col.RootCACRL); err != nil {
		return nil, err
	}
	if err := v.checkChain("pck", pckChain, []string{CNPCK}, []string{CNPlatformCA, CNProcessorCA}); err != nil {
		return nil, err
	}
	pck, pckCA := pckChain[0], pckChain[1]
	if err := v.checkPCKCRL(col, pck, pckCA); err != nil {
		return nil, err
	}
	if v.ext, err = parsePCKExtension(pck); err != nil {
		return nil, err
	}

	// What the vendor says about such platforms and enclaves today.
	if v.info, err = v.tcbInfo(col, infoID); err != nil {
		return nil, err
	}
	if v.info.fmspc != v.ext.FMSPC {
		return nil, fault.New("fmspc_mismatch", "TCB info is for FMSPC %x, the PCK certificate for %x", v.info.fmspc, v.ext.FMSPC)
	}
	if v.info.pceID != v.ext.PCEID {
		return nil, fault.New("pceid_mismatch", "TCB info is for PCE %x, the PCK certificate for %x", v.info.pceID, v.ext.PCEID)
	}
	identity, err := v.qeIdentity(col, qeID)
	if err != nil {
		return nil, err
	}

	// The chain of signatures inside the quote: PCK → QE report → attestation
	// key → report.
	if err := checkQEReport(q, pck); err != nil {
		return nil, err
	}
	if v.qe, err = identity.appraise(q.QEReport[:]); err != nil {
		return nil, err
	}
	attestationKey, err := rawKey(q.AttestationKey[:])
	if err != nil {
		return nil, fault.Wrap(err, "quote_signature", "attestation key of the quote")
	}
	if !verifyRaw(attestationKey, q.Signed, q.Signature[:]) {
		return nil, fault.New("quote_signature", "the quote is not signed by its attestation key")
	}
	v.evaluation = min(v.info.Evaluation, identity.Evaluation)
	return v, nil
}

// Request names the collateral that a quote needs, by its PCK certificate. Nothing
// is verified: a hostile quote may ask for another platform's, which then does not
// fit it.
func Request(quote []byte) (collateral.Request, error) {
	var want collateral.Request
	q, err := ParseQuote(quote)
	if err != nil {
		return want, err
	}
	return request(q)
}

func request(q *Quote) (collateral.Request, error) {
	var want collateral.Request
	if q.CertType != CertTypePCKChain {
		return want, fault.New("quote_cert_type", "the quote does not carry its PCK certificate (certification data of type %d), which names the platform", q.CertType).
			WithFix("give the collateral with --collateral, its pck_certificate_chain included")
	}
	chain, err := parseChain("pck", q.CertData)
	if err != nil {
		return want, err
	}
	ext, err := parsePCKExtension(chain[0])
	if err != nil {
		return want, err
	}
	switch chain[0].Issuer.CommonName {
	case CNPlatformCA:
		want.PCKCA = collateral.Platform
	case CNProcessorCA:
		want.PCKCA = collateral.Processor
	default:
		return want, fault.New("pck_role", "the PCK certificate is issued by %q, want %q or %q", chain[0].Issuer.CommonName, CNPlatformCA, CNProcessorCA)
	}
	want.FMSPC = hex.EncodeToString(ext.FMSPC[:])
	return want, nil
}

// verification is the state of one call: the time, the one root, its revocation
// list, and when the first thing relied upon ends.
type verification struct {
	at      time.Time
	memo    *attest.Memo
	anchor  *x509.Certificate
	rootCRL *x509.RevocationList
	expires time.Time
}

// until notes that the verdict rests on something that ends at t.
func (v *verification) until(t time.Time) {
	if v.expires.IsZero() || t.Before(v.expires) {
		v.expires = t
	}
}

func (v *verification) loadRootCRL(der []byte) (err error) {
	v.rootCRL, err = v.crl("root CA CRL", der, v.anchor)
	return err
}

// checkPCKCRL verifies the intermediate's revocation list by way of its own
// issuer chain, which must lead to the very intermediate that issued the PCK
// certificate, and looks the certificate up in it.
func (v *verification) checkPCKCRL(col collateral.TDX, pck, pckCA *x509.Certificate) error {
	chain, err := v.chain("pck_crl", []byte(col.PCKCRLIssuerChain))
	if err != nil {
		return err
	}
	if err := v.checkChain("pck_crl", chain, []string{CNPlatformCA, CNProcessorCA}); err != nil {
		return err
	}
	if !sameKey(chain[0], pckCA) || string(chain[0].RawSubject) != string(pckCA.RawSubject) {
		return fault.New("crl_issuer", "PCK CRL is of %q, the PCK certificate was issued by %q", chain[0].Subject.CommonName, pckCA.Subject.CommonName)
	}
	crl, err := v.crl("PCK CRL", col.PCKCRL, pckCA)
	if err != nil {
		return err
	}
	if revoked(crl, pck) {
		return fault.New("pck_revoked", "PCK certificate with serial %x is revoked", pck.SerialNumber)
	}
	return nil
}

// checkQEReport verifies that the PCK certificate signed the QE report, and that
// the report commits to the attestation key.
func checkQEReport(q *Quote, pck *x509.Certificate) error {
	if !verifyRaw(pck.PublicKey.(*ecdsa.PublicKey), q.QEReport[:], q.QEReportSignature[:]) {
		return fault.New("qe_report_signature", "the QE report is not signed by the PCK certificate's key")
	}
	if len(q.QEAuthData) != QEAuthSize {
		return fault.New("qe_auth_size", "QE authentication data has %d bytes, want %d", len(q.QEAuthData), QEAuthSize)
	}
	want := sha256.Sum256(slices.Concat(q.AttestationKey[:], q.QEAuthData))
	if got := q.QEReport[QEOffReportData:QEReportSize]; string(got) != string(want[:])+string(make([]byte, 32)) {
		return fault.New("qe_report_data", "the QE report does not commit to the quote's attestation key")
	}
	return nil
}

// checkAttributes admits the allow-list of TD attributes only (threats.md A06, B01).
func checkAttributes(b ReportBody, opt attest.Options) error {
	attr := b.Attributes()
	allowed := AttrSEPTVEDisable | opt.TDXAttributes&(AttrPKS|AttrKL|AttrPerfmon)
	if opt.AllowDebug {
		allowed |= AttrDebug
	}
	rest := attr &^ allowed
	switch {
	case rest&AttrDebug != 0:
		return fault.New("td_debug", "the TD runs in debug mode: the host can read its memory")
	case rest&AttrTUD != 0:
		return fault.New("td_tud", "the TD is under debug or profiling (attributes %x)", b.TDAttributes)
	case rest&AttrMigratable != 0:
		return fault.New("td_migratable", "the TD may be migrated to another platform")
	case rest != 0:
		return fault.New("td_attributes", "the TD has attributes %x, of which %#x are not accepted", b.TDAttributes, rest)
	case attr&AttrSEPTVEDisable == 0:
		return fault.New("td_sept_ve", "the TD has not disabled virtualization exceptions on pages that the host takes away (SEPT_VE_DISABLE)")
	case !b.MRServiceTD.IsZero():
		return fault.New("td_service_td", "a service TD (%s) is bound to the TD and may act on it", b.MRServiceTD)
	}
	return nil
}

// verifyRaw verifies a 64-byte signature r ‖ s over SHA-256 of message.
func verifyRaw(key *ecdsa.PublicKey, message, sig []byte) bool {
	if len(sig) != 64 {
		return false
	}
	digest := sha256.Sum256(message)
	return ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:]))
}

// rawKey reads a P-256 point x ‖ y and checks that it is on the curve.
func rawKey(xy []byte) (*ecdsa.PublicKey, error) {
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, xy...))
	if err != nil {
		return nil, fmt.Errorf("not a point on P-256: %w", err)
	}
	return key, nil
}
