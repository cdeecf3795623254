// SPDX-License-Identifier: Apache-2.0

package nitro

import (
	"crypto/sha256"
	"strings"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxSkew is how far AWS's clock may be ahead of the time of verification.
const MaxSkew = 300 * time.Second

// DeviceScheme is Claims.DeviceScheme of both kinds of document.
const DeviceScheme = "nitro-module"

// Verify establishes what an attestation document proves at a stated time, for
// evidence of an enclave (dstack.Nitro) or of a NitroTPM (dstack.NitroTPM), which
// the document must be of. It is an [attest.Verify].
//
// Revocation lists of the collateral are used for the authorities that they are
// of; none is required. The document's age is Claims.At minus Claims.Made, which
// the caller's policy must judge; a document of the future by more than MaxSkew is
// refused. An enclave in debug mode is an error (nitro_debug) beside the claims
// unless the options allow it.
//
// Claims.DeviceID is the SHA-256 of the instance id for enclaves, the part of the
// module id before "-enc", and of the whole module id for a NitroTPM. Upstream
// splits an enclave's at the first "-" and so gives every enclave the same id.
func Verify(in attest.Input) (*attest.Claims, error) {
	if in.Evidence == nil {
		return nil, fault.New("evidence_missing", "there is no evidence")
	}
	d, err := ParseDocument(in.Evidence.Quote)
	if err != nil {
		return nil, err
	}
	if d.Kind != in.Evidence.TEE {
		return nil, fault.New("nitro_kind", "the document is of %s, the evidence says %s", d.Kind, in.Evidence.TEE)
	}
	device, err := d.device()
	if err != nil {
		return nil, err
	}
	var crls []collateral.Hex
	if in.Collateral != nil {
		if err := in.Collateral.Check(); err != nil {
			return nil, err
		}
		crls = in.Collateral.CRLs
	}

	chain, err := parseChain(d)
	if err != nil {
		return nil, err
	}
	v := verification{at: in.At}
	if err := v.chooseRoot(d.Kind, chain, in.Roots); err != nil {
		return nil, err
	}
	if err := v.checkChain(chain); err != nil {
		return nil, err
	}
	if err := v.checkRevocation(chain, crls); err != nil {
		return nil, err
	}
	if err := d.message.Verify(chain[0].PublicKey); err != nil {
		return nil, err
	}
	if d.Made.After(in.At.Add(MaxSkew)) {
		return nil, fault.New("nitro_future", "the document is of %s, more than %s after %s", stamp(d.Made), MaxSkew, stamp(in.At))
	}

	claims := &attest.Claims{
		TEE: d.Kind, Trust: v.trust, Root: attest.DescribeRoot(v.anchor, v.trust),
		Nitro: &attest.Nitro{
			ModuleID: d.ModuleID, PCRs: d.PCRs,
			PublicKey: d.PublicKey, UserData: d.UserData, Nonce: d.Nonce,
		},
		ReportData:   d.UserData,
		TCBStatus:    attest.NotReported,
		Debug:        d.debug(),
		DeviceID:     sha256.Sum256([]byte(device)),
		DeviceScheme: DeviceScheme,
		Unchecked:    v.unchecked,
		Made:         d.Made, At: in.At, Expires: v.expires,
	}
	if claims.Debug && !in.Options.AllowDebug {
		return claims, fault.New("nitro_debug", "the enclave runs in debug mode: its registers are zero and the host reads its console")
	}
	return claims, nil
}

// device returns the text that names the machine.
func (d *Document) device() (string, error) {
	if d.Kind == dstack.NitroTPM {
		return d.ModuleID, nil
	}
	instance, enclave, ok := strings.Cut(d.ModuleID, "-enc")
	if !ok || instance == "" || enclave == "" {
		return "", fault.New("nitro_module_id", "module_id %q is not an instance id, -enc and an enclave id", d.ModuleID)
	}
	return instance, nil
}

// debug tells an enclave in debug mode by its registers of image, kernel and
// application. They are hashes, so that even one of zeros is of no real image
// (threats.md B01).
func (d *Document) debug() bool {
	return d.Kind == dstack.Nitro && (isZero(d.PCRs[0]) || isZero(d.PCRs[1]) || isZero(d.PCRs[2]))
}

func isZero(b []byte) bool { return strings.Trim(string(b), "\x00") == "" }
