// SPDX-License-Identifier: Apache-2.0

// Package keys holds the secrets of an app: one type for each role, and the file
// in which a key provider hands them over.
//
// A [Secret] cannot be printed, logged, compared or serialised by accident: every
// formatting verb shows its role only, encoding/json refuses it, == does not
// compile. Its bytes are reached by [Secret.Bytes] alone, and [Secret.Wipe]
// overwrites them wherever the value was copied to.
//
// Trusted: the process. The garbage collector may have moved what a caller made
// of the bytes; only the array behind a Secret is promised to be wiped.
// Attacker-controlled: the text that [Parse] reads, until its source is known.
//
// Implements spec/guest-os.md §3.3 and spec/kms.md §5.
package keys

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/dstack-go/dstack/internal/fault"
)

// Size is the length of every secret in bytes.
const Size = 32

// A role says what a secret is for; it makes secrets of different use different types.
type role interface{ role() string }

type (
	appRole  struct{}
	diskRole struct{}
	envRole  struct{}
	seedRole struct{}
)

func (appRole) role() string  { return "app key" }
func (diskRole) role() string { return "disk key" }
func (envRole) role() string  { return "env key" }
func (seedRole) role() string { return "seed" }

type (
	// AppKey is the app's secp256k1 scalar, big-endian (k256_key): the root of
	// every key that the app derives for itself.
	AppKey = Secret[appRole]
	// DiskKey is the root of the keys of the data disk (disk_crypt_key). It is
	// specific to the instance, or to the app where that has no instance ids.
	DiskKey = Secret[diskRole]
	// EnvKey is the X25519 scalar, not clamped, to which the app's environment is
	// encrypted (env_crypt_key).
	EnvKey = Secret[envRole]
	// Seed is what a provider without a KMS keeps: all keys follow from it.
	Seed = Secret[seedRole]
)

// Secret is 32 secret bytes in one role. The zero value has none.
type Secret[R role] struct {
	_ [0]func() // not comparable
	h *hidden
}

// hidden keeps the bytes two pointers away: fmt follows one, for a verb that does not
// fit, where the Secret is an unexported field and Format is out of its reach.
type hidden struct{ b *[Size]byte }

// New copies 32 bytes into a secret; code key_length for any other number.
func New[R role](b []byte) (Secret[R], error) {
	if len(b) != Size {
		var r R
		return Secret[R]{}, fault.New("key_length", "the %s has %d bytes, not %d", r.role(), len(b), Size)
	}
	s := Secret[R]{h: &hidden{new([Size]byte)}}
	copy(s.h.b[:], b)
	return s, nil
}

// NewAppKey, NewDiskKey, NewEnvKey and NewSeed name the roles for callers outside.
func NewAppKey(b []byte) (AppKey, error)   { return New[appRole](b) }
func NewDiskKey(b []byte) (DiskKey, error) { return New[diskRole](b) }
func NewEnvKey(b []byte) (EnvKey, error)   { return New[envRole](b) }
func NewSeed(b []byte) (Seed, error)       { return New[seedRole](b) }

// IsZero reports whether there is no secret here: never set, or wiped.
func (s Secret[R]) IsZero() bool { return s.h == nil || *s.h.b == [Size]byte{} }

// Bytes returns the secret's own 32 bytes, nil of a zero value. They are zero after
// Wipe; the caller does not change them.
func (s Secret[R]) Bytes() []byte {
	if s.h == nil {
		return nil
	}
	return s.h.b[:]
}

// Clone returns a copy that outlives Wipe of s.
func (s Secret[R]) Clone() Secret[R] {
	if s.h == nil {
		return s
	}
	b := *s.h.b
	return Secret[R]{h: &hidden{&b}}
}

// Wipe overwrites the secret in every copy of this value.
func (s Secret[R]) Wipe() {
	if s.h != nil {
		clear(s.h.b[:])
	}
}

// String says which secret it is and not what.
func (s Secret[R]) String() string {
	var r R
	return "[" + r.role() + "]"
}

// Format implements fmt.Formatter: every verb prints String.
func (s Secret[R]) Format(f fmt.State, _ rune) { fmt.Fprint(f, s.String()) }

// LogValue implements slog.LogValuer.
func (s Secret[R]) LogValue() slog.Value { return slog.StringValue(s.String()) }

var errSerialise = errors.New("a secret is not serialised by itself")

// MarshalText refuses, and with it encoding/json.
func (s Secret[R]) MarshalText() ([]byte, error) { return nil, errSerialise }

// MarshalBinary refuses, and with it encoding/gob.
func (s Secret[R]) MarshalBinary() ([]byte, error) { return nil, errSerialise }
