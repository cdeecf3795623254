// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"time"

	"golang.org/x/crypto/nacl/box"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/guest/kmsclient"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
)

const (
	localTimeout   = 30 * time.Second
	mrEnclaveSize  = 32
	maxSealedBytes = keys.Size + box.AnonymousOverhead
)

// localStatuses are the TCB statuses of a machine whose enclave is believed: those
// of which the firmware is current.
var localStatuses = []string{tdx.UpToDate, tdx.SWHardeningNeeded, tdx.ConfigurationNeeded, tdx.ConfigurationAndSWHardeningNeeded}

// Local asks the key provider on the same machine, an SGX enclave, for a seed that
// follows from the machine and this TD's measurements (spec/kms.md §5.2). The host
// carries the messages.
//
// The enclave gives a seed to any TD that has this one's measurements, and neither
// the TD's attributes nor its configuration are among them.
type Local struct {
	// Pin is key_provider_id of the manifest: MRENCLAVE, 32 bytes. Empty: none.
	Pin []byte
	// Quote returns a TDX quote over the report data; required.
	Quote func(ctx context.Context, data dstack.ReportData) ([]byte, error)
	// SealingKey is GetSealingKey of the host's API; required.
	SealingKey func(ctx context.Context, quote []byte) (sealed, providerQuote []byte, err error)
	// Collateral returns what an enclave's quote is verified with: TCB info and QE
	// identity of SGX, in the fields of TDX. Required; its answer is not trusted.
	Collateral func(ctx context.Context, want collateral.Request) (*collateral.Bundle, error)
	// Roots vouch for the enclave's quote.
	Roots    []attest.Roots
	Attester channel.Attester // for the app's root certificate; nil: none
	Now      func() time.Time // nil: time.Now
}

// Keys implements [Provider]. Codes: provider_unavailable, provider_pin (another
// enclave than the pinned), provider_tcb, provider_binding (the quote is over another
// sealed key), provider_sealed (it does not open), those of tdx.VerifyEnclave,
// key_derivation, key_evidence.
func (l *Local) Keys(ctx context.Context) (*Grant, error) {
	if n := len(l.Pin); n != 0 && n != mrEnclaveSize {
		return nil, fault.New("provider_pin", "key_provider_id of the manifest has %d bytes, and MRENCLAVE has %d", n, mrEnclaveSize)
	}
	if l.Quote == nil || l.SealingKey == nil || l.Collateral == nil {
		return nil, fault.New("provider_unavailable", "the local key provider needs a TDX guest with a host API").
			WithFix("use another key provider")
	}
	ctx, cancel := context.WithTimeout(ctx, localTimeout)
	defer cancel()
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	public := [32]byte(private.PublicKey().Bytes())
	var data dstack.ReportData
	copy(data[:], public[:])
	quote, err := l.Quote(ctx, data)
	if err != nil {
		return nil, fault.Wrap(err, "key_evidence", "make a quote for the local key provider")
	}
	sealed, providerQuote, err := l.SealingKey(ctx, quote)
	if refusal, ok := err.(*fault.Error); ok {
		// The host's words, behind whatever code it chose to give.
		return nil, fault.New("provider_unavailable", "the host gives no key of the local key provider: %s", kmsclient.Printable(refusal.Message, kmsclient.MaxReason)).
			WithFix("see whether the host runs a key provider, and its log")
	}
	if err != nil {
		return nil, fault.Wrap(err, "provider_unavailable", "ask the local key provider").
			WithFix("see whether the host runs a key provider, and its log")
	}
	enclave, err := l.verify(ctx, sealed, providerQuote)
	if err != nil {
		return nil, err
	}
	secret := [32]byte(private.Bytes())
	defer clear(secret[:])
	raw, ok := box.OpenAnonymous(nil, sealed, &public, &secret)
	if !ok {
		return nil, fault.New("provider_sealed", "the local key provider's answer is not sealed to this guest's key")
	}
	defer clear(raw)
	seed, err := keys.NewSeed(raw)
	if err != nil {
		return nil, fault.Wrap(err, "provider_sealed", "the local key provider's answer")
	}
	if seed.IsZero() {
		return nil, fault.New("provider_sealed", "the local key provider's seed is all zeros")
	}
	k, err := seeded(ctx, seed, keys.Provider{Kind: keys.Local, MR: enclave.MREnclave[:]}, l.Attester, clock(l.Now))
	if err != nil {
		return nil, err
	}
	return &Grant{Keys: k, Unpinned: len(l.Pin) == 0}, nil
}

// verify checks that the right enclave made the answer, on a machine that is
// believed.
func (l *Local) verify(ctx context.Context, sealed, quote []byte) (*tdx.Enclave, error) {
	if len(sealed) > maxSealedBytes {
		return nil, fault.New("provider_sealed", "the local key provider's answer has %d bytes, more than %d", len(sealed), maxSealedBytes)
	}
	want, err := tdx.EnclaveRequest(quote)
	if err != nil {
		return nil, err
	}
	bundle, err := l.Collateral(ctx, want)
	if err != nil {
		return nil, err
	}
	e, err := tdx.VerifyEnclave(attest.Input{
		Evidence: &attest.Evidence{Quote: quote}, Collateral: bundle, Roots: l.Roots, At: clock(l.Now),
	})
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(sealed)
	switch {
	case len(l.Pin) > 0 && !bytes.Equal(e.MREnclave[:], l.Pin):
		return nil, fault.New("provider_pin", "the local key provider is the enclave %s, and the manifest pins %s",
			hex.EncodeToString(e.MREnclave[:]), hex.EncodeToString(l.Pin)).WithFix("run the key provider that key_provider_id names")
	case !slices.Contains(localStatuses, e.TCBStatus):
		return nil, fault.New("provider_tcb", "the local key provider's machine has TCB status %s (%v)", e.TCBStatus, e.Advisories).
			WithFix("update the machine's firmware")
	case !bytes.Equal(e.ReportData[:], append(sum[:], make([]byte, 32)...)):
		return nil, fault.New("provider_binding", "the local key provider's quote speaks of another answer")
	}
	return e, nil
}
