// SPDX-License-Identifier: Apache-2.0

// Package fetch gets collateral from the vendors' services, or from caches that
// speak like them: [PCS] for TDX and SGX from Intel's provisioning certification
// service or a PCCS, [KDS] for SEV-SNP from AMD's key distribution service.
//
// # Guarantees
//
// A URL is made of the operator's base and of request fields that have been held
// to their documented spelling: nothing in evidence can choose a host or a path
// (threats.md B15). Redirects leave neither host nor scheme. Every answer is
// bounded before it is kept, after decompression; every call ends in bounded time,
// retries included. Equal requests at one time are sent once. Error texts hold
// nothing that a server said.
//
// # Trust
//
// None. TLS only keeps passive observers from seeing which machines are verified.
// What comes back is checked for shape, so that a captive portal is reported as
// such, and nothing more: signatures, times and revocation are the verifier's, and
// an old answer, still signed and valid, is caught by collateral/floor (B03).
//
// Specification: attestation.md §2.1 (PCS), §8.1 (KDS).
package fetch

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"net/netip"
	"net/url"
	"strings"

	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Vendors is a Source that asks the service of whichever TEE a request is about. A
// nil service is one that may not be asked.
type Vendors struct {
	PCS, KDS collateral.Source
}

// Collateral implements collateral.Source. It returns the error
// collateral_source for a request whose service is nil, and collateral_request for
// one that names neither an FMSPC nor a product.
func (v Vendors) Collateral(ctx context.Context, want collateral.Request) (*collateral.Bundle, error) {
	out := new(collateral.Bundle)
	if want.FMSPC == "" && want.Product == "" {
		return nil, fault.New("collateral_request", "the request names neither an FMSPC nor an SEV-SNP product")
	}
	for _, s := range []struct {
		asked  bool
		tee    string
		source collateral.Source
	}{{want.FMSPC != "", "TDX", v.PCS}, {want.Product != "", "SEV-SNP", v.KDS}} {
		if !s.asked {
			continue
		}
		if s.source == nil {
			return nil, fault.New("collateral_source", "there is no service to ask for collateral of %s", s.tee)
		}
		b, err := s.source.Collateral(ctx, want)
		if err != nil {
			return nil, err
		}
		out.Add(b)
	}
	return out, nil
}

// Scope names what answers depend on beside the request, for a cache to keep
// apart: it joins the scopes of the services that have one.
func (v Vendors) Scope() string {
	var scopes []string
	for _, s := range []collateral.Source{v.PCS, v.KDS} {
		if s, ok := s.(interface{ Scope() string }); ok {
			scopes = append(scopes, s.Scope())
		}
	}
	return strings.Join(scopes, "; ")
}

// parseBase reads the URL of a service, less the paths that people copy with it.
// Plain HTTP is for this machine only: what is fetched is signed, but who asks
// about which machine is nobody's business.
func parseBase(text, def string, suffixes ...string) (string, error) {
	if text == "" {
		text = def
	}
	bad := func(why string) error {
		return fault.New("collateral_url", "%q is not the URL of a collateral service: %s", text, why).WithFix("give a URL such as %s", def)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Host == "" || u.Opaque != "":
		return "", bad("it has no host")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return "", bad("it has a user, query or fragment")
	case u.Scheme == "http" && !loopback(u.Hostname()):
		return "", bad("http is for loopback addresses only")
	case u.Scheme != "https" && u.Scheme != "http":
		return "", bad("it is neither https nor http")
	}
	base := strings.TrimRight(u.String(), "/")
	for _, s := range suffixes {
		base = strings.TrimRight(strings.TrimSuffix(base, s), "/")
	}
	return base, nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// maxChain bounds the certificates of one answer (threats.md B15).
const maxChain = 8

// certificates reads one certificate in DER, or up to maxChain in PEM.
func certificates(data []byte) ([]collateral.Hex, error) {
	if cert, err := x509.ParseCertificate(data); err == nil {
		return []collateral.Hex{cert.Raw}, nil
	}
	var out []collateral.Hex
	for text := bytes.TrimSpace(data); len(text) > 0; {
		block, rest := pem.Decode(text)
		if !bytes.HasPrefix(text, []byte("-----BEGIN CERTIFICATE-----")) || block == nil {
			return nil, fault.New("collateral_response", "not certificates in PEM")
		}
		if len(out) == maxChain {
			return nil, fault.New("collateral_response", "more than %d certificates", maxChain)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fault.Wrap(err, "collateral_response", "certificate %d", len(out))
		}
		out, text = append(out, block.Bytes), bytes.TrimSpace(rest)
	}
	if len(out) == 0 {
		return nil, fault.New("collateral_response", "no certificate")
	}
	return out, nil
}
