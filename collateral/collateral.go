// SPDX-License-Identifier: Apache-2.0

// Package collateral is what a verifier needs beside a quote: the vendor's
// signed statements about which platforms, modules and enclaves are current, and
// which certificates are revoked.
//
// Everything here travels through untrusted hands (a cache, a file, the very
// machine to be verified), so types hold it unverified and parsing only bounds
// it; attest/tdx verifies each item's signature and time. Raw JSON is kept as it
// came since the signatures cover its exact bytes. Specification:
// attestation.md §2.1.
package collateral

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits in bytes (threats.md B15), and counts.
const (
	MaxTDX      = 4 << 20  // one set of TDX collateral in JSON
	MaxBundle   = 16 << 20 // one bundle in JSON
	MaxCerts    = 64       // certificates of a bundle
	MaxCRLs     = 32       // revocation lists of a bundle
	MaxCert     = 16 << 10
	MaxCRL      = 1 << 20
	MaxDocument = 512 << 10 // TCB info, QE identity
	MaxChain    = 64 << 10  // a PEM chain
)

// Hex is bytes that JSON spells in lowercase hexadecimal.
type Hex []byte

// MarshalText writes lowercase hexadecimal.
func (h Hex) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }

// UnmarshalText reads hexadecimal of either case.
func (h *Hex) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	if err != nil {
		return err
	}
	*h = b
	return nil
}

// TDX is one set of collateral for TDX quotes; its JSON is upstream's
// QuoteCollateralV3. Chains are PEM, leaf first.
type TDX struct {
	PCKCRLIssuerChain     string `json:"pck_crl_issuer_chain,omitempty"`
	RootCACRL             Hex    `json:"root_ca_crl,omitempty"` // DER
	PCKCRL                Hex    `json:"pck_crl,omitempty"`     // DER
	TCBInfoIssuerChain    string `json:"tcb_info_issuer_chain,omitempty"`
	TCBInfo               string `json:"tcb_info,omitempty"`           // raw JSON, as signed
	TCBInfoSignature      Hex    `json:"tcb_info_signature,omitempty"` // 64 bytes, r ‖ s big-endian
	QEIdentityIssuerChain string `json:"qe_identity_issuer_chain,omitempty"`
	QEIdentity            string `json:"qe_identity,omitempty"`           // raw JSON, as signed
	QEIdentitySignature   Hex    `json:"qe_identity_signature,omitempty"` // 64 bytes, r ‖ s big-endian
	// PCKCertificateChain is for quotes that do not carry their PCK certificate
	// (certification data types 2 and 3).
	PCKCertificateChain string `json:"pck_certificate_chain,omitempty"`
}

// ParseTDX reads one set of collateral. Unknown fields are tolerated, since
// caches add their own; missing items are left to the verifier, which names them.
func ParseTDX(data []byte) (*TDX, error) {
	var t TDX
	if err := strictjson.Decode(data, &t, strictjson.Limits{Size: MaxTDX, Depth: 8, Unknown: true}); err != nil {
		return nil, fault.Wrap(err, "collateral_malformed", "TDX collateral")
	}
	if err := t.Check(); err != nil {
		return nil, err
	}
	return &t, nil
}

// Check enforces the limits on each item; it verifies nothing.
func (t *TDX) Check() error {
	for _, f := range []struct {
		name     string
		len, max int
	}{
		{"pck_crl_issuer_chain", len(t.PCKCRLIssuerChain), MaxChain},
		{"root_ca_crl", len(t.RootCACRL), MaxCRL},
		{"pck_crl", len(t.PCKCRL), MaxCRL},
		{"tcb_info_issuer_chain", len(t.TCBInfoIssuerChain), MaxChain},
		{"tcb_info", len(t.TCBInfo), MaxDocument},
		{"tcb_info_signature", len(t.TCBInfoSignature), 64},
		{"qe_identity_issuer_chain", len(t.QEIdentityIssuerChain), MaxChain},
		{"qe_identity", len(t.QEIdentity), MaxDocument},
		{"qe_identity_signature", len(t.QEIdentitySignature), 64},
		{"pck_certificate_chain", len(t.PCKCertificateChain), MaxChain},
	} {
		if f.len > f.max {
			return fault.New("collateral_too_large", "%s of %d bytes exceeds %d", f.name, f.len, f.max)
		}
	}
	return nil
}

// Bundle is what a verifier may need beside evidence of any kind of TEE. Its JSON
// is a superset of TDX's: the same members, and certificates and crls as arrays of
// hexadecimal DER. Certificates here complete chains; they are never trust anchors.
type Bundle struct {
	TDX                // zero when absent
	Certificates []Hex `json:"certificates,omitempty"` // DER: ASK, VCEK, VLEK, ASVK, AK issuers, …
	CRLs         []Hex `json:"crls,omitempty"`         // DER
}

// HasTDX reports whether the bundle holds anything for TDX.
func (b *Bundle) HasTDX() bool {
	t := b.TDX
	return t.TCBInfo != "" || t.QEIdentity != "" || len(t.PCKCRL) > 0 || len(t.RootCACRL) > 0
}

// ParseBundle reads a bundle, or upstream's TDX collateral, which is one. Unknown
// members are tolerated; missing items are left to the verifier, which names them.
func ParseBundle(data []byte) (*Bundle, error) {
	var b Bundle
	if err := strictjson.Decode(data, &b, strictjson.Limits{Size: MaxBundle, Depth: 8, Unknown: true}); err != nil {
		return nil, fault.Wrap(err, "collateral_malformed", "collateral")
	}
	if err := b.Check(); err != nil {
		return nil, err
	}
	return &b, nil
}

// Check enforces the limits on each item; it verifies nothing.
func (b *Bundle) Check() error {
	if err := b.TDX.Check(); err != nil {
		return err
	}
	if len(b.Certificates) > MaxCerts || len(b.CRLs) > MaxCRLs {
		return fault.New("collateral_too_large", "%d certificates and %d revocation lists, at most %d and %d", len(b.Certificates), len(b.CRLs), MaxCerts, MaxCRLs)
	}
	for _, c := range b.Certificates {
		if len(c) > MaxCert {
			return fault.New("collateral_too_large", "a certificate of %d bytes exceeds %d", len(c), MaxCert)
		}
	}
	for _, c := range b.CRLs {
		if len(c) > MaxCRL {
			return fault.New("collateral_too_large", "a revocation list of %d bytes exceeds %d", len(c), MaxCRL)
		}
	}
	return nil
}

// Add joins what another bundle holds to this one, without duplicates. TDX
// collateral of the other replaces this one's as a whole, never in part.
func (b *Bundle) Add(other *Bundle) {
	if other == nil {
		return
	}
	if other.HasTDX() {
		b.TDX = other.TDX
	}
	join := func(to *[]Hex, from []Hex) {
		for _, item := range from {
			if !slices.ContainsFunc(*to, func(have Hex) bool { return bytes.Equal(have, item) }) {
				*to = append(*to, item)
			}
		}
	}
	join(&b.Certificates, other.Certificates)
	join(&b.CRLs, other.CRLs)
}

// CA names which of Intel's two intermediates issued a PCK certificate; it
// selects the CRL.
type CA string

// The two intermediates of the vendor's PKI.
const (
	Processor CA = "processor"
	Platform  CA = "platform"
)

// Request names what evidence needs. Its fields come from evidence and are as
// hostile; a Source uses them in no other way than their documented spelling.
type Request struct {
	// TDX and SGX: FMSPC is 6 bytes as lowercase hex, PCKCA the intermediate that
	// issued the PCK certificate. Enclave asks for TCB info and QE identity of SGX,
	// which come in the fields of TDX: an answer is for a TD or for an enclave, never
	// for both.
	FMSPC   string
	PCKCA   CA
	Enclave bool

	// SEV-SNP: Product is Milan, Genoa or Turin. ChipID is 64 bytes (8 count for
	// Turin); TCB the reported version; VLEK asks for the chain of VLEKs instead of
	// a VCEK.
	Product string
	ChipID  [64]byte
	TCB     uint64
	VLEK    bool
}

// Source finds collateral. What it returns is unverified, and it may be stale:
// the verifier judges its times. Implementations bound what they read and time out.
type Source interface {
	Collateral(ctx context.Context, want Request) (*Bundle, error)
}

// Static is a Source that always returns one bundle, such as one read from a file.
type Static struct{ Bundle *Bundle }

// Collateral returns the bundle whatever is asked; the verifier refuses a wrong one.
func (s Static) Collateral(context.Context, Request) (*Bundle, error) {
	if s.Bundle == nil {
		return nil, fault.New("collateral_missing", "no collateral given")
	}
	return s.Bundle, nil
}

// DevRoots is a development trust anchor with its collateral: the file that
// `dstack-simtee pki` writes and `--dev-roots` reads. Evidence under it proves
// nothing about hardware. Each root is optional, but one must be there.
type DevRoots struct {
	Version    int    `json:"version"` // 1
	Name       string `json:"name"`    // for people; one line
	TDXRootPEM string `json:"tdx_root_pem,omitempty"`
	TDX        TDX    `json:"tdx_collateral"`

	SNPRootPEM   string `json:"sev_snp_root_pem,omitempty"` // an ARK
	NitroRootPEM string `json:"nitro_root_pem,omitempty"`   // enclaves and NitroTPM
	TPMRootPEM   string `json:"tpm_root_pem,omitempty"`     // over attestation keys
	CCAKeyPEM    string `json:"cca_key_pem,omitempty"`      // a platform attestation key, PEM PUBLIC KEY

	Certificates []Hex `json:"certificates,omitempty"` // as in Bundle
	CRLs         []Hex `json:"crls,omitempty"`
}

// Bundle returns the collateral that stands beside the roots.
func (d *DevRoots) Bundle() *Bundle {
	return &Bundle{TDX: d.TDX, Certificates: d.Certificates, CRLs: d.CRLs}
}

// ParseDevRoots reads such a file, strictly.
func ParseDevRoots(data []byte) (*DevRoots, error) {
	var d DevRoots
	if err := strictjson.Decode(data, &d, strictjson.Limits{Size: MaxBundle, Depth: 8}); err != nil {
		return nil, fault.Wrap(err, "dev_roots_malformed", "development roots")
	}
	switch {
	case d.Version != 1:
		return nil, fault.New("dev_roots_malformed", "development roots have version %d, want 1", d.Version)
	case len(d.Name) > 200 || strings.ContainsFunc(d.Name, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return nil, fault.New("dev_roots_malformed", "the name of the development roots is longer than 200 bytes or not one printable line")
	}
	count := 0
	for _, f := range []struct{ name, text, kind string }{
		{"tdx_root_pem", d.TDXRootPEM, "CERTIFICATE"}, {"sev_snp_root_pem", d.SNPRootPEM, "CERTIFICATE"},
		{"nitro_root_pem", d.NitroRootPEM, "CERTIFICATE"}, {"tpm_root_pem", d.TPMRootPEM, "CERTIFICATE"},
		{"cca_key_pem", d.CCAKeyPEM, "PUBLIC KEY"},
	} {
		if f.text == "" {
			continue
		}
		count++
		block, rest := pem.Decode([]byte(f.text))
		if block == nil || block.Type != f.kind || strings.TrimSpace(string(rest)) != "" {
			return nil, fault.New("dev_roots_malformed", "%s is not exactly one PEM %s", f.name, strings.ToLower(f.kind))
		}
	}
	if count == 0 {
		return nil, fault.New("dev_roots_malformed", "development roots hold no root")
	}
	if err := d.Bundle().Check(); err != nil {
		return nil, fmt.Errorf("development roots: %w", err)
	}
	return &d, nil
}

// Bytes returns the file's content.
func (d *DevRoots) Bytes() ([]byte, error) { return json.MarshalIndent(d, "", "  ") }
