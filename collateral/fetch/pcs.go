// SPDX-License-Identifier: Apache-2.0

package fetch

import (
	"context"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"

	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Intel's services.
const (
	IntelPCS = "https://api.trustedservices.intel.com"
	// IntelRootCRL is where the revocation list of Intel's root is, as the root
	// certificate itself says (CRL distribution point).
	IntelRootCRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
)

// Update says which of Intel's two statements to ask for after a TCB recovery.
type Update string

// Early is published at the start of a recovery, Standard up to a year later, when
// machines have had time to be updated. After Early was once seen, a floor on the
// evaluation data number refuses Standard until that catches up.
const (
	Standard Update = "standard"
	Early    Update = "early"
)

// PCSOptions configures a PCS. The zero value asks Intel.
type PCSOptions struct {
	Base    string // URL of a PCS or PCCS; paths /sgx and /tdx/certification/v4 are cut off; empty for IntelPCS
	RootCRL string // asked when the service itself has no root revocation list; empty for IntelRootCRL
	Update  Update // empty for Standard
	HTTP    HTTP
}

// PCS is a Source of collateral for TDX and for SGX enclaves: TCB info, QE identity,
// and the revocation lists of root and PCK issuer, each with its issuer chain.
type PCS struct {
	base, rootCRL string
	update        Update
	client        *client
}

// NewPCS returns a PCS. A URL or update channel that cannot be used has the code
// collateral_url or collateral_update.
func NewPCS(o PCSOptions) (*PCS, error) {
	base, err := parseBase(o.Base, IntelPCS, "/sgx/certification/v4", "/tdx/certification/v4")
	if err != nil {
		return nil, err
	}
	rootCRL, err := parseBase(o.RootCRL, IntelRootCRL)
	if err != nil {
		return nil, err
	}
	switch o.Update {
	case "":
		o.Update = Standard
	case Standard, Early:
	default:
		return nil, fault.New("collateral_update", "update channel is %q, want %s or %s", o.Update, Standard, Early)
	}
	return &PCS{base: base, rootCRL: rootCRL, update: o.Update, client: newClient(o.HTTP)}, nil
}

// Scope names what answers depend on beside the request, for a cache to keep
// apart: the service and the update channel.
func (p *PCS) Scope() string { return "pcs " + p.base + " " + p.rootCRL + " " + string(p.update) }

var fmspcSpelling = regexp.MustCompile(`^[0-9a-f]{12}$`)

// Collateral implements collateral.Source. It needs FMSPC and PCKCA.
func (p *PCS) Collateral(ctx context.Context, want collateral.Request) (*collateral.Bundle, error) {
	if !fmspcSpelling.MatchString(want.FMSPC) {
		return nil, fault.New("collateral_request", "FMSPC %.40q is not 12 lowercase hexadecimal digits", want.FMSPC)
	}
	if want.PCKCA != collateral.Platform && want.PCKCA != collateral.Processor {
		return nil, fault.New("collateral_request", "PCK issuer %.40q is neither %s nor %s", want.PCKCA, collateral.Platform, collateral.Processor)
	}
	// The service keeps the two kinds of documents under the same paths of each TEE;
	// revocation lists are common to both and under SGX's.
	tee := "tdx"
	if want.Enclave {
		tee = "sgx"
	}
	documents := "/" + tee + "/certification/v4"
	var t collateral.TDX
	err := together(ctx,
		func(ctx context.Context) (err error) {
			t.TCBInfo, t.TCBInfoSignature, t.TCBInfoIssuerChain, err = p.signed(ctx,
				strings.ToUpper(tee)+" TCB info of FMSPC "+want.FMSPC, documents+"/tcb?fmspc="+strings.ToUpper(want.FMSPC)+"&update="+string(p.update),
				collateral.ParseTCBInfo, "TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain")
			return err
		},
		func(ctx context.Context) (err error) {
			t.QEIdentity, t.QEIdentitySignature, t.QEIdentityIssuerChain, err = p.signed(ctx,
				strings.ToUpper(tee)+" QE identity", documents+"/qe/identity?update="+string(p.update),
				collateral.ParseQEIdentity, "SGX-Enclave-Identity-Issuer-Chain")
			return err
		},
		func(ctx context.Context) (err error) {
			what := "revocation list of PCK certificates"
			a, err := p.client.get(ctx, what, p.base+"/sgx/certification/v4/pckcrl?ca="+string(want.PCKCA)+"&encoding=der", 2*collateral.MaxCRL)
			if err != nil {
				return err
			}
			if t.PCKCRL, _, err = collateral.ParseCRL(a.body); err != nil {
				return malformed(err, what)
			}
			t.PCKCRLIssuerChain, err = issuerChain(a.header, what, "SGX-PCK-CRL-Issuer-Chain")
			return err
		},
		func(ctx context.Context) (err error) {
			t.RootCACRL, err = p.rootList(ctx)
			return err
		},
	)
	if err != nil {
		return nil, err
	}
	if err := t.Check(); err != nil {
		return nil, err
	}
	return &collateral.Bundle{TDX: t}, nil
}

func (p *PCS) signed(ctx context.Context, what, path string, parse func([]byte) (string, collateral.Hex, error), headers ...string) (document string, signature collateral.Hex, chain string, err error) {
	a, err := p.client.get(ctx, what, p.base+path, collateral.MaxDocument)
	if err != nil {
		return "", nil, "", err
	}
	if document, signature, err = parse(a.body); err != nil {
		return "", nil, "", malformed(err, what)
	}
	chain, err = issuerChain(a.header, what, headers...)
	return document, signature, chain, err
}

// rootList returns the root's revocation list. A PCCS has it; Intel's own service
// does not, and the vendor's distribution point does. That URL is configured, never
// taken from a certificate.
func (p *PCS) rootList(ctx context.Context) ([]byte, error) {
	const what = "revocation list of the TDX root"
	a, err := p.client.get(ctx, what, p.base+"/sgx/certification/v4/rootcacrl", 2*collateral.MaxCRL)
	if code := fault.Code(err); code == "collateral_not_found" || code == "collateral_refused" {
		a, err = p.client.get(ctx, what, p.rootCRL, collateral.MaxCRL)
	}
	if err != nil {
		return nil, err
	}
	der, _, err := collateral.ParseCRL(a.body)
	if err != nil {
		return nil, malformed(err, what)
	}
	return der, nil
}

// issuerChain reads a chain from the first header that is there: PEM, URL-encoded.
func issuerChain(h http.Header, what string, names ...string) (string, error) {
	for _, name := range names {
		value := h.Get(name)
		if value == "" {
			continue
		}
		// In a path a plus sign is itself, as it is in base64.
		text, err := url.PathUnescape(value)
		if err != nil {
			return "", malformed(err, "issuer chain of the "+what)
		}
		if _, err := certificates([]byte(text)); err != nil {
			return "", malformed(err, "issuer chain of the "+what)
		}
		return text, nil
	}
	return "", fault.New("collateral_issuer_chain", "the %s comes without the header %s", what, names[0]).
		WithFix("check that the URL is of a PCS or PCCS of version 4, and that no proxy drops the header")
}

func malformed(err error, what string) error {
	return fault.Wrap(err, "collateral_response", "the service's answer is no %s", what).
		WithFix("check the URL of the service, and that nothing between answers in its place")
}

// together runs functions at once. It returns the first error in their order that
// is not due to another's failing.
func together(ctx context.Context, run ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(run))
	var wg sync.WaitGroup
	for i, f := range run {
		wg.Go(func() {
			if errs[i] = f(ctx); errs[i] != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	var cancelled error
	for _, err := range errs {
		if err != nil && fault.Code(err) != "collateral_cancelled" {
			return err
		}
		if cancelled == nil {
			cancelled = err
		}
	}
	return cancelled
}
