// SPDX-License-Identifier: Apache-2.0

package custody

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"runtime"
	"sync"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/derive"
)

// MaxAhead is how many epochs beyond the first one that they give roots can be asked
// for: it bounds the work of one call.
const MaxAhead = 1 << 16

// Kinds of [Provenance].
const (
	Generated  = "generated"
	Replicated = "replicated" // from another custodian
	Restored   = "restored"   // from a backup
	Upstream   = "upstream"   // from upstream's directory
)

// Provenance says how roots came to be here.
type Provenance struct {
	Kind string // one of the constants
	// Source is the DER SubjectPublicKeyInfo by which the other custodian was known;
	// of Replicated only.
	Source []byte
	Time   time.Time // when, to the second
}

// Roots is the root material of a KMS: the scalar of the root CA (P-256), that of the
// secp256k1 root, and the secret of the native epochs, which roots of an upstream KMS
// lack. It implements [Custodian].
//
// It cannot be printed, logged, compared or serialised by accident, no more than a
// keys.Secret: verbs of fmt and slog show its kind only, encoding/json and
// encoding/gob refuse it, and == does not compile. Its bytes lie in a page of their
// own (see [Roots.Unlocked]), which Wipe overwrites. What the libraries compute from
// them during one call, parsed keys and states of hash functions, lies in ordinary
// memory until the garbage collector and the next use take it.
//
// # Epochs
//
// The secret of epoch e, S(e), gives S(e+1) and not S(e-1): after [Roots.EraseBefore]
// nobody derives the keys of the erased epochs from these roots. The ratchet does no
// more than that. Whoever learns S(e) has every epoch from e on, and the two scalars
// give epoch 0 forever: to recover from a leak takes new roots, or a threshold that
// reshares (spec/threshold-kms.md §4). Copies are others' to erase: replicas ratchet
// by themselves, and a backup gives what it was made of.
type Roots struct {
	_ [0]func() // not comparable
	s *state
}

var _ Custodian = (*Roots)(nil)

type state struct {
	mu         sync.RWMutex
	page       *page // nil after Wipe
	cleanup    runtime.Cleanup
	unlocked   error
	identity   Identity
	first      uint64 // epoch of the secret in the page; 0: there is none
	provenance Provenance
	path       string       // of the file that holds the roots; "": none
	step       func(string) // called after each step of changing the file
}

// page keeps the secrets two pointers away from Roots: fmt follows one, for a verb that
// does not fit, where Roots are an unexported field and Format is out of its reach.
type page struct{ b []byte }

// The layout of the page.
const (
	caAt, k256At, epochAt, pageUsed = 0, 32, 64, 96
	size                            = 32
)

// material is a view of the page, valid under the lock.
type material struct {
	derive.Roots
	epoch []byte
	first uint64
}

func (s *state) material() material {
	b := s.page.b
	return material{derive.Roots{CA: b[caAt:k256At:k256At], K256: b[k256At:epochAt:epochAt]}, b[epochAt:pageUsed:pageUsed], s.first}
}

// newRoots copies secrets of 32 bytes; first is 0 and epoch empty for roots without
// native epochs.
func newRoots(ca, k256, epoch []byte, first uint64, p Provenance) (*Roots, error) {
	switch {
	case len(ca) != size || len(k256) != size:
		return nil, fmt.Errorf("root scalars of %d and %d bytes, not %d", len(ca), len(k256), size)
	case first == 0 && len(epoch) != 0:
		return nil, errors.New("an epoch secret without an epoch")
	case first != 0 && (len(epoch) != size || zero(epoch)):
		return nil, errors.New("no secret for the native epochs")
	case first > math.MaxUint64-MaxAhead:
		return nil, fmt.Errorf("epoch %d is too large", first)
	}
	key, err := derive.P256FromScalar(ca)
	if err != nil {
		return nil, errors.New("the root CA's bytes are no P-256 scalar")
	}
	var id Identity
	if id.CA, err = x509.MarshalPKIXPublicKey(&key.PublicKey); err != nil {
		return nil, err
	}
	if id.K256, err = derive.K256Public(k256); err != nil {
		return nil, err
	}
	b, unlocked, err := newPage()
	if err != nil {
		return nil, err
	}
	copy(b[caAt:], ca)
	copy(b[k256At:], k256)
	copy(b[epochAt:], epoch)
	p.Time = p.Time.UTC().Truncate(time.Second)
	s := &state{page: &page{b}, unlocked: unlocked, identity: id, first: first, provenance: p, step: func(string) {}}
	s.cleanup = runtime.AddCleanup(s, freePage, b)
	return &Roots{s: s}, nil
}

func zero(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }

// Generate makes new roots, whose native epochs begin with 1.
func Generate(rand io.Reader) (*Roots, error) {
	var b [3 * size]byte
	defer clear(b[:])
	// A scalar is out of range once in 2^32 (P-256) or less; a source of randomness
	// that gives nothing else is broken.
	for range 8 {
		if _, err := io.ReadFull(rand, b[:]); err != nil {
			return nil, fmt.Errorf("make root keys: %w", err)
		}
		if r, err := newRoots(b[:32], b[32:64], b[64:], 1, Provenance{Kind: Generated, Time: time.Now()}); err == nil {
			return r, nil
		}
	}
	return nil, errors.New("make root keys: the source of randomness gives no scalars")
}

// use calls do with the secrets, which do must neither keep nor change. Code
// root_wiped.
func (r *Roots) use(ctx context.Context, do func(material) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.s == nil {
		return errWiped
	}
	r.s.mu.RLock()
	defer r.s.mu.RUnlock()
	if r.s.page == nil {
		return errWiped
	}
	return do(r.s.material())
}

var errWiped = fault.New("root_wiped", "these root keys were wiped from memory")

// Wipe overwrites the roots in memory; calls that need them fail from then on with
// code root_wiped. The file stays.
func (r *Roots) Wipe() {
	if r.s == nil {
		return
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if r.s.page != nil {
		r.s.cleanup.Stop()
		freePage(r.s.page.b)
		r.s.page = nil
	}
}

// Unlocked returns why the roots may be swapped out or be part of a core dump, or nil
// where the kernel keeps them from that.
func (r *Roots) Unlocked() error {
	if r.s == nil {
		return nil
	}
	return r.s.unlocked
}

// Identity returns the public half.
func (r *Roots) Identity() Identity {
	if r.s == nil {
		return Identity{}
	}
	return r.s.identity.clone()
}

// Provenance returns how the roots came to be here.
func (r *Roots) Provenance() Provenance {
	if r.s == nil {
		return Provenance{}
	}
	p := r.s.provenance
	p.Source = bytes.Clone(p.Source)
	return p
}

// Epochs returns the first and the last native epoch that the roots give keys of;
// zeroes if they have none.
func (r *Roots) Epochs() (first, last uint64) {
	if r.s == nil {
		return 0, 0
	}
	r.s.mu.RLock()
	defer r.s.mu.RUnlock()
	if r.s.first == 0 {
		return 0, 0
	}
	return r.s.first, r.s.first + MaxAhead
}

func (i Identity) clone() Identity { return Identity{bytes.Clone(i.CA), bytes.Clone(i.K256)} }

// Equal reports whether both are the same roots' identity; an identity that lacks a
// key equals none.
func (i Identity) Equal(o Identity) bool {
	return len(i.CA) > 0 && len(i.K256) > 0 && bytes.Equal(i.CA, o.CA) && bytes.Equal(i.K256, o.K256)
}

// public returns the root CA's key.
func (i Identity) public() (*ecdsa.PublicKey, error) {
	parsed, err := x509.ParsePKIXPublicKey(i.CA)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("the root CA's key is a %T", parsed)
	}
	return key, nil
}

// String says what it is and nothing more.
func (r Roots) String() string { return "[root keys]" }

// Format implements fmt.Formatter: every verb prints String.
func (r Roots) Format(f fmt.State, _ rune) { fmt.Fprint(f, r.String()) }

// LogValue implements slog.LogValuer.
func (r Roots) LogValue() slog.Value { return slog.StringValue(r.String()) }

var errSerialise = errors.New("root keys are not serialised by themselves")

// MarshalText refuses, and with it encoding/json.
func (r Roots) MarshalText() ([]byte, error) { return nil, errSerialise }

// MarshalBinary refuses, and with it encoding/gob.
func (r Roots) MarshalBinary() ([]byte, error) { return nil, errSerialise }
