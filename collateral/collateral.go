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
	"context"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits in bytes (threats.md B15).
const (
	MaxTDX      = 4 << 20 // one set of collateral in JSON
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
	PCKCRLIssuerChain     string `json:"pck_crl_issuer_chain"`
	RootCACRL             Hex    `json:"root_ca_crl"` // DER
	PCKCRL                Hex    `json:"pck_crl"`     // DER
	TCBInfoIssuerChain    string `json:"tcb_info_issuer_chain"`
	TCBInfo               string `json:"tcb_info"`           // raw JSON, as signed
	TCBInfoSignature      Hex    `json:"tcb_info_signature"` // 64 bytes, r ‖ s big-endian
	QEIdentityIssuerChain string `json:"qe_identity_issuer_chain"`
	QEIdentity            string `json:"qe_identity"`           // raw JSON, as signed
	QEIdentitySignature   Hex    `json:"qe_identity_signature"` // 64 bytes, r ‖ s big-endian
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

// CA names which of Intel's two intermediates issued a PCK certificate; it
// selects the CRL.
type CA string

// The two intermediates of the vendor's PKI.
const (
	Processor CA = "processor"
	Platform  CA = "platform"
)

// Source finds collateral. What it returns is unverified, and it may be stale:
// the verifier judges its times. Implementations bound what they read.
type Source interface {
	// TDX returns collateral for a platform (FMSPC, 6 bytes as lowercase hex)
	// whose PCK certificate the given intermediate issued.
	TDX(ctx context.Context, fmspc string, ca CA) (*TDX, error)
}

// Static is a Source that always returns one set, such as one read from a file.
type Static struct{ Set *TDX }

// TDX returns the set whatever the platform; the verifier refuses a wrong one.
func (s Static) TDX(context.Context, string, CA) (*TDX, error) {
	if s.Set == nil {
		return nil, fault.New("collateral_missing", "no TDX collateral given")
	}
	return s.Set, nil
}

// DevRoots is a development trust anchor with its collateral: the file that
// `dstack-simtee pki` writes and `--dev-roots` reads. Evidence under it proves
// nothing about hardware.
type DevRoots struct {
	Version    int    `json:"version"` // 1
	Name       string `json:"name"`    // for people; one line
	TDXRootPEM string `json:"tdx_root_pem"`
	TDX        TDX    `json:"tdx_collateral"`
}

// ParseDevRoots reads such a file, strictly.
func ParseDevRoots(data []byte) (*DevRoots, error) {
	var d DevRoots
	if err := strictjson.Decode(data, &d, strictjson.Limits{Size: MaxTDX + MaxChain, Depth: 8}); err != nil {
		return nil, fault.Wrap(err, "dev_roots_malformed", "development roots")
	}
	switch block, rest := pem.Decode([]byte(d.TDXRootPEM)); {
	case d.Version != 1:
		return nil, fault.New("dev_roots_malformed", "development roots have version %d, want 1", d.Version)
	case len(d.Name) > 200 || strings.ContainsFunc(d.Name, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return nil, fault.New("dev_roots_malformed", "the name of the development roots is longer than 200 bytes or not one printable line")
	case block == nil || block.Type != "CERTIFICATE" || strings.TrimSpace(string(rest)) != "":
		return nil, fault.New("dev_roots_malformed", "tdx_root_pem is not exactly one PEM certificate")
	}
	if err := d.TDX.Check(); err != nil {
		return nil, fmt.Errorf("development roots: %w", err)
	}
	return &d, nil
}

// Bytes returns the file's content.
func (d *DevRoots) Bytes() ([]byte, error) { return json.MarshalIndent(d, "", "  ") }
