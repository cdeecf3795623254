// SPDX-License-Identifier: Apache-2.0

package fetch

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// AMDKDS is AMD's key distribution service.
const AMDKDS = "https://kdsintf.amd.com"

// KDSOptions configures a KDS. The zero value asks AMD.
type KDSOptions struct {
	Base string // URL of a KDS or a cache of it; the path /vcek/v1 is cut off; empty for AMDKDS
	HTTP HTTP
}

// KDS is a Source of certificates for SEV-SNP: the chain and revocation list of a
// product, and the VCEK of one chip at one TCB version.
//
// The service limits how often one may ask. What belongs to a product rather than
// to a chip is therefore kept in memory for ten minutes, though never past the
// revocation list's nextUpdate.
type KDS struct {
	base   string
	client *client

	mu       sync.Mutex
	products map[string]product // by path; at most two for each product
}

type product struct {
	certs []collateral.Hex
	crl   []byte
	until time.Time
}

const keepProduct = 10 * time.Minute

// NewKDS returns a KDS. A URL that cannot be used has the code collateral_url.
func NewKDS(o KDSOptions) (*KDS, error) {
	base, err := parseBase(o.Base, AMDKDS, "/vcek/v1")
	if err != nil {
		return nil, err
	}
	return &KDS{base: base, client: newClient(o.HTTP), products: map[string]product{}}, nil
}

// Scope names what answers depend on beside the request, for a cache to keep apart.
func (k *KDS) Scope() string { return "kds " + k.base }

// Collateral implements collateral.Source. It needs Product.
//
// With VLEK, or a ChipID of zeros (a platform that masks it), there is no
// certificate to look up: chain and revocation list alone are returned, and the
// evidence must carry its own VLEK or VCEK.
func (k *KDS) Collateral(ctx context.Context, want collateral.Request) (*collateral.Bundle, error) {
	if !slices.Contains([]string{"Milan", "Genoa", "Turin"}, want.Product) {
		return nil, fault.New("collateral_request", "SEV-SNP product %.40q is not Milan, Genoa or Turin", want.Product)
	}
	root, chip := "/vcek/v1/"+want.Product, want.ChipID != [64]byte{}
	if want.VLEK {
		root, chip = "/vlek/v1/"+want.Product, false
	}
	var common product
	var vcek []collateral.Hex
	err := together(ctx,
		func(ctx context.Context) (err error) {
			common, err = k.product(ctx, want.Product, root)
			return err
		},
		func(ctx context.Context) (err error) {
			if chip {
				vcek, err = k.vcek(ctx, want)
			}
			return err
		},
	)
	if err != nil {
		return nil, err
	}
	b := &collateral.Bundle{Certificates: slices.Concat(common.certs, vcek), CRLs: []collateral.Hex{common.crl}}
	return b, b.Check()
}

// product gets the chain, ASK or ASVK before ARK, and the revocation list.
func (k *KDS) product(ctx context.Context, name, root string) (product, error) {
	k.mu.Lock()
	p, ok := k.products[root]
	k.mu.Unlock()
	if ok && time.Now().Before(p.until) {
		return p, nil
	}
	p = product{}
	err := together(ctx,
		func(ctx context.Context) error {
			what := "certificate chain of " + name
			a, err := k.client.get(ctx, what, k.base+root+"/cert_chain", collateral.MaxChain)
			if err != nil {
				return err
			}
			if p.certs, err = certificates(a.body); err != nil {
				return malformed(err, what)
			}
			return nil
		},
		func(ctx context.Context) error {
			what := "revocation list of " + name
			a, err := k.client.get(ctx, what, k.base+root+"/crl", collateral.MaxCRL)
			if err != nil {
				return err
			}
			der, crl, err := collateral.ParseCRL(a.body)
			if err != nil {
				return malformed(err, what)
			}
			p.crl, p.until = der, time.Now().Add(keepProduct)
			if crl.NextUpdate.Before(p.until) {
				p.until = crl.NextUpdate
			}
			return nil
		},
	)
	if err != nil {
		return product{}, err
	}
	k.mu.Lock()
	k.products[root] = p
	k.mu.Unlock()
	return p, nil
}

func (k *KDS) vcek(ctx context.Context, want collateral.Request) ([]collateral.Hex, error) {
	what := "VCEK of a " + want.Product + " chip"
	a, err := k.client.get(ctx, what, k.base+vcekPath(want), collateral.MaxCert)
	if err != nil {
		return nil, err
	}
	certs, err := certificates(a.body)
	if err == nil && len(certs) != 1 {
		err = fault.New("collateral_response", "%d certificates, want 1", len(certs))
	}
	if err != nil {
		return nil, malformed(err, what)
	}
	return certs, nil
}

// vcekPath names a chip and its security versions (AMD 57230, VCEK and KDS
// interface). Turin's TCB version begins with one for the FMC, and 8 bytes of its
// chip id count; elsewhere it is boot loader, TEE, four reserved, SNP, microcode.
func vcekPath(want collateral.Request) string {
	b := binary.LittleEndian.AppendUint64(nil, want.TCB)
	if want.Product == "Turin" {
		return fmt.Sprintf("/vcek/v1/Turin/%s?fmcSPL=%d&blSPL=%d&teeSPL=%d&snpSPL=%d&ucodeSPL=%d",
			hex.EncodeToString(want.ChipID[:8]), b[0], b[1], b[2], b[3], b[7])
	}
	return fmt.Sprintf("/vcek/v1/%s/%s?blSPL=%d&teeSPL=%d&snpSPL=%d&ucodeSPL=%d",
		want.Product, hex.EncodeToString(want.ChipID[:]), b[0], b[1], b[6], b[7])
}
