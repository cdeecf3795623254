// SPDX-License-Identifier: Apache-2.0

package sevsnp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strings"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/internal/fault"
)

// TCB statuses. AMD publishes no levels, so these speak of one platform at one
// time: UpToDate means that the firmware running now, the one reported, the one it
// cannot fall back behind and the one at launch are the same.
const (
	UpToDate  = "UpToDate"
	OutOfDate = "OutOfDate"
)

// Verify establishes what a report proves at a stated time; it is an
// [attest.Verify]. Certificates come from Evidence.CertChain and from
// Collateral.Certificates, in any order; AMD's revocation list from
// Collateral.CRLs. Without a list of the root that vouches the code is
// crl_missing, or with Options.AllowMissingCRL the claims say that it was not
// checked. Claims.TCBStatus is [UpToDate] or [OutOfDate].
//
// Codes without claims: those of [ParseReport] and [ParseExtensions];
// report_unsigned, report_signer, report_signature; cert_malformed, cert_table,
// chain_length, collateral_too_large; collateral_missing, no_roots, unknown_root,
// root_role, vek_chain, vek_issuer, root_expired, ask_expired, vek_expired;
// crl_missing, crl_malformed, crl_signature, crl_not_yet_valid, crl_expired,
// ask_revoked, ark_revoked; product_unknown, product_mismatch, vek_product,
// snp_tcb_mismatch, snp_chip_mismatch.
//
// Codes beside claims, when the guest is open to the host, or the platform is not
// what the guest's policy demands: snp_debug, snp_migration, snp_vmpl,
// snp_policy_unknown, snp_abi_version, snp_smt, snp_rapl, snp_ciphertext_hiding,
// snp_author_key, snp_id_key, snp_tcb_committed, snp_tcb_reported,
// snp_version_committed.
func Verify(in attest.Input) (*attest.Claims, error) {
	r, err := ParseReport(in.Evidence.Quote)
	if err != nil {
		return nil, err
	}
	signer, err := r.signerName()
	if err != nil {
		return nil, err
	}
	certs, err := gather(in)
	if err != nil {
		return nil, err
	}
	v := verification{at: in.At, roots: in.Roots, certs: certs}
	if err := v.findChain(r, in.Evidence.Quote[:signedSize], signer); err != nil {
		return nil, err
	}
	unchecked, number, err := v.checkRevocation(in)
	if err != nil {
		return nil, err
	}
	ext, err := v.checkCertificate(r)
	if err != nil {
		return nil, err
	}

	claims := &attest.Claims{
		TEE: dstack.SEVSNP, Trust: v.trust, Root: attest.DescribeRoot(v.root, v.trust),
		SNP: &attest.SNP{
			Version: r.Version, GuestSVN: r.GuestSVN, Policy: r.Policy, FamilyID: r.FamilyID, ImageID: r.ImageID,
			VMPL: r.VMPL, PlatformInfo: r.PlatformInfo, KeyInfo: r.KeyInfo,
			Measurement: r.Measurement, HostData: r.HostData, IDKeyDigest: r.IDKeyDigest, AuthorKey: r.AuthorKeyDigest,
			ReportID: r.ReportID, ReportIDMA: r.ReportIDMA, ChipID: r.ChipID,
			CurrentTCB: r.CurrentTCB, ReportedTCB: r.ReportedTCB, CommittedTCB: r.CommittedTCB, LaunchTCB: r.LaunchTCB,
			CertifiedTCB: ext.TCB, CPUID: r.CPUID, Product: v.product, SigningKey: signer, CSPID: ext.CSPID,
			Parts: Parts(v.product, ext.TCB),
		},
		ReportData: r.ReportData[:],
		TCBStatus:  OutOfDate, Advisories: []string{},
		Product:   v.product,
		Debug:     r.Policy&PolicyDebug != 0,
		Unchecked: unchecked, TCBEvaluation: number,
		At: in.At, Expires: v.expires,
	}
	if r.CurrentTCB == r.ReportedTCB && r.CurrentTCB == r.CommittedTCB && r.CurrentTCB == r.LaunchTCB {
		claims.TCBStatus = UpToDate
	}
	if r.ChipID != [64]byte{} {
		claims.DeviceID, claims.DeviceScheme = sha256.Sum256(r.ChipID[:]), "chip-id"
	}
	return claims, judge(r, in.Options)
}

// verification is the state of one call.
type verification struct {
	at    time.Time
	roots []attest.Roots
	certs []*x509.Certificate

	leaf, intermediate, root *x509.Certificate
	trust                    dstack.Trust
	product                  string
	expires                  time.Time // when the first thing relied upon ends
}

func (v *verification) until(t time.Time) {
	if v.expires.IsZero() || t.Before(v.expires) {
		v.expires = t
	}
}

// findChain finds the certificate whose key signed the report, and its chain to
// one of the roots. Certificates that do not fit are passed over, since anyone can
// add some; the error is that of the best candidate.
func (v *verification) findChain(r *Report, signed []byte, signer string) error {
	known := 0
	for _, roots := range v.roots {
		if roots.TEE == dstack.SEVSNP {
			known += len(roots.CA)
		}
	}
	if known == 0 {
		return fault.New("no_roots", "no root certificate for SEV-SNP was given")
	}
	cn := map[string]string{"VCEK": cnVCEK, "VLEK": cnVLEK}[signer]
	leaves := slices.DeleteFunc(slices.Clone(v.certs), func(c *x509.Certificate) bool { return !isLeaf(c, cn) })
	if len(leaves) == 0 {
		return fault.New("collateral_missing", "there is no %s certificate for the report", signer).
			WithFix("fetch it for the report's chip id and reported TCB")
	}
	leaves = slices.DeleteFunc(leaves, func(c *x509.Certificate) bool {
		return !verifyReport(c.PublicKey.(*ecdsa.PublicKey), signed, r)
	})
	if len(leaves) == 0 {
		return fault.New("report_signature", "the report is not signed by the key of the %s certificate given", signer)
	}
	var first error
	tried := 0
	for _, leaf := range leaves {
		for _, issuer := range v.certs {
			if !isIntermediate(issuer) || !bytes.Equal(leaf.RawIssuer, issuer.RawSubject) {
				continue
			}
			// A chain has one; more than a few are there to make work (threats.md B15).
			if tried++; tried > 2*maxChain {
				return first
			}
			err := v.tryChain(leaf, issuer)
			if err == nil {
				return nil
			}
			if first == nil {
				first = err
			}
		}
	}
	if first == nil {
		return fault.New("collateral_missing", "there is no certificate of the %s's issuer %q", signer, leaves[0].Issuer.CommonName).
			WithFix("fetch the certificate chain of the product line")
	}
	return first
}

// tryChain verifies leaf ← intermediate ← a root: signatures, roles, times.
func (v *verification) tryChain(leaf, intermediate *x509.Certificate) error {
	// CheckSignatureFrom also demands that the issuer may sign certificates.
	if err := leaf.CheckSignatureFrom(intermediate); err != nil {
		return fault.Wrap(err, "vek_chain", "signature of %q by %q", leaf.Subject.CommonName, intermediate.Subject.CommonName)
	}
	root, trust := v.findRoot(intermediate)
	if root == nil {
		return fault.New("unknown_root", "%q (sha256 %s) is not certified by any of the given roots",
			intermediate.Subject.CommonName, attest.Fingerprint(intermediate))
	}
	product, ok := strings.CutPrefix(root.Subject.CommonName, cnARK)
	if !ok || productOfName(product) != product {
		return fault.New("root_role", "root %q is not AMD's for a known product line", root.Subject.CommonName)
	}
	want := cnASK + product
	if leaf.Subject.CommonName == cnVLEK {
		want = cnASVK + product
	}
	if got := intermediate.Subject.CommonName; got != want {
		return fault.New("vek_issuer", "%s is issued by %q, want %q", leaf.Subject.CommonName, got, want)
	}
	switch {
	case !v.holds(root):
		return fault.New("root_expired", "root %s, not at %s", validity(root), day(v.at))
	case !v.holds(intermediate):
		return fault.New("ask_expired", "intermediate %s, not at %s", validity(intermediate), day(v.at))
	case !v.holds(leaf):
		return fault.New("vek_expired", "certificate %s, not at %s", validity(leaf), day(v.at))
	}
	for _, c := range []*x509.Certificate{root, intermediate, leaf} {
		v.until(c.NotAfter)
	}
	v.leaf, v.intermediate, v.root, v.trust, v.product = leaf, intermediate, root, trust, product
	return nil
}

func (v *verification) findRoot(intermediate *x509.Certificate) (*x509.Certificate, dstack.Trust) {
	for _, roots := range v.roots {
		if roots.TEE != dstack.SEVSNP {
			continue
		}
		for _, ca := range roots.CA {
			if bytes.Equal(intermediate.RawIssuer, ca.RawSubject) && intermediate.CheckSignatureFrom(ca) == nil {
				return ca, roots.Trust
			}
		}
	}
	return nil, ""
}

// checkRevocation looks the intermediate and the root up in the root's revocation
// lists (threats.md B02). AMD revokes no VCEK or VLEK: a new TCB supersedes it. A
// list that names them counts whatever its age; otherwise one list must be
// current; its number, which rises with each list, is returned. Lists of other
// issuers are none of our concern.
func (v *verification) checkRevocation(in attest.Input) (unchecked []string, number uint32, err error) {
	var lists [][]byte
	if in.Collateral != nil {
		for _, der := range in.Collateral.CRLs {
			lists = append(lists, der)
		}
	}
	var current time.Time // when the last of the lists that hold now ends
	note := func(e error) {
		if err == nil {
			err = e
		}
	}
	for _, der := range lists {
		crl, parseErr := x509.ParseRevocationList(der)
		if parseErr != nil || !bytes.Equal(crl.RawIssuer, v.root.RawSubject) {
			continue
		}
		if e := crl.CheckSignatureFrom(v.root); e != nil {
			note(fault.Wrap(e, "crl_signature", "revocation list of %q", v.root.Subject.CommonName))
			continue
		}
		for _, entry := range crl.RevokedCertificateEntries {
			switch {
			case entry.SerialNumber.Cmp(v.intermediate.SerialNumber) == 0:
				return nil, 0, fault.New("ask_revoked", "%q, serial %x, is revoked since %s",
					v.intermediate.Subject.CommonName, v.intermediate.SerialNumber, day(entry.RevocationTime))
			case entry.SerialNumber.Cmp(v.root.SerialNumber) == 0:
				return nil, 0, fault.New("ark_revoked", "root %q, serial %x, is revoked since %s",
					v.root.Subject.CommonName, v.root.SerialNumber, day(entry.RevocationTime))
			}
		}
		partial := slices.IndexFunc(crl.Extensions, isCritical) // such as a delta list
		switch {
		case partial >= 0:
			note(fault.New("crl_malformed", "revocation list has the critical extension %s", crl.Extensions[partial].Id))
		case v.at.Before(crl.ThisUpdate):
			note(fault.New("crl_not_yet_valid", "revocation list is of %s, after %s", day(crl.ThisUpdate), day(v.at)))
		case crl.NextUpdate.IsZero() || v.at.After(crl.NextUpdate):
			note(fault.New("crl_expired", "revocation list was good until %s, not at %s", day(crl.NextUpdate), day(v.at)).
				WithFix("fetch a fresh list, or state the time at which to verify"))
		case crl.NextUpdate.After(current):
			current, number = crl.NextUpdate, 0
			if n := crl.Number; n != nil && n.IsUint64() && n.Uint64() <= math.MaxUint32 {
				number = uint32(n.Uint64())
			}
		}
	}
	switch {
	case !current.IsZero():
		v.until(current)
		return nil, number, nil
	case err != nil:
		return nil, 0, err
	case in.Options.AllowMissingCRL:
		return []string{"certificate revocation list"}, 0, nil
	}
	return nil, 0, fault.New("crl_missing", "collateral has no revocation list of %q", v.root.Subject.CommonName).
		WithFix("fetch it, or allow in the policy that it is missing")
}

// checkCertificate compares the report with what AMD certified: the product line,
// the chip and the TCB version. The key that signed is derived from the last two,
// so that a difference means evidence put together from different pieces.
func (v *verification) checkCertificate(r *Report) (*Extensions, error) {
	if r.Version > 2 {
		product := productOf(r.CPUID)
		if product == "" {
			return nil, unknownProduct(r)
		}
		if product != v.product {
			return nil, fault.New("product_mismatch", "report is of a %s processor, its certificates are %s's", product, v.product)
		}
	}
	ext, err := ParseExtensions(v.leaf, v.product)
	if err != nil {
		return nil, err
	}
	if productOfName(ext.ProductName) != v.product {
		return nil, fault.New("vek_product", "certificate is for product %q, its chain is %s's", ext.ProductName, v.product)
	}
	if r.ReportedTCB != ext.TCB {
		return nil, fault.New("snp_tcb_mismatch", "report says TCB %#016x, its key is certified for %#016x", r.ReportedTCB, ext.TCB)
	}
	// A host may mask the chip's id (MASK_CHIP_ID, which the report does not tell).
	if ext.HWID != nil && r.ChipID != [64]byte{} {
		var chip [64]byte
		copy(chip[:], ext.HWID)
		if r.ChipID != chip {
			return nil, fault.New("snp_chip_mismatch", "report is of chip %x, its key is certified for %x", r.ChipID, ext.HWID)
		}
	}
	return ext, nil
}

// verifyReport verifies the signature r ‖ s, little-endian, over SHA-384 of what
// is signed.
func verifyReport(key *ecdsa.PublicKey, signed []byte, r *Report) bool {
	digest := sha512.Sum384(signed)
	return ecdsa.Verify(key, digest[:], littleEndian(r.R), littleEndian(r.S))
}

func littleEndian(b [scalarSize]byte) *big.Int {
	slices.Reverse(b[:])
	return new(big.Int).SetBytes(b[:])
}

func (v *verification) holds(c *x509.Certificate) bool {
	return !v.at.Before(c.NotBefore) && !v.at.After(c.NotAfter)
}

func validity(c *x509.Certificate) string {
	return fmt.Sprintf("%q is valid from %s to %s", c.Subject.CommonName, day(c.NotBefore), day(c.NotAfter))
}

func day(t time.Time) string { return t.UTC().Format(time.RFC3339) }
