// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"time"
)

// Size is a number of bytes: digits, or 0x and hexadecimal digits, with an
// optional binary suffix K, M, G or T in either case (spec vmm.md §2).
type Size uint64

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(b []byte) error {
	text := strings.TrimSpace(string(b))
	shift := 0
	digits := text
	if !strings.HasPrefix(text, "0x") && text != "" {
		switch text[len(text)-1] | 0x20 {
		case 'k':
			shift = 10
		case 'm':
			shift = 20
		case 'g':
			shift = 30
		case 't':
			shift = 40
		}
		if shift != 0 {
			digits = text[:len(text)-1]
		}
	}
	base := 10
	if h, ok := strings.CutPrefix(digits, "0x"); ok {
		digits, base = h, 16
	}
	n, err := strconv.ParseUint(digits, base, 64)
	if err != nil || n > math.MaxUint64>>shift {
		return fmt.Errorf("want a size such as 4096, 512M or 2G, not %q", text)
	}
	*s = Size(n << shift)
	return nil
}

// Duration is a time span: Go's notation ("90s", "5m") or a number of seconds.
// It is a struct because the TOML library would store a bare integer into an
// integer type unread, as nanoseconds.
type Duration struct{ time.Duration }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	text := string(b)
	if n, err := strconv.ParseUint(text, 10, 32); err == nil {
		d.Duration = time.Duration(n) * time.Second
		return nil
	}
	v, err := time.ParseDuration(text)
	if err != nil || v < 0 {
		return fmt.Errorf("want a duration such as 90s or 5m, not %q", text)
	}
	d.Duration = v
	return nil
}

// Secret is text that prints as "(secret)" everywhere; Reveal gives it.
type Secret struct{ text string }

// NewSecret wraps text.
func NewSecret(text string) Secret { return Secret{text} }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Secret) UnmarshalText(b []byte) error { s.text = string(b); return nil }

// MarshalText keeps the text out of every encoder.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String hides the text.
func (s Secret) String() string {
	if s.text == "" {
		return ""
	}
	return "(secret)"
}

// GoString hides the text from %#v.
func (s Secret) GoString() string { return s.String() }

// Format hides the text from every verb, %x included.
func (s Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, s.String()) }

// LogValue hides the text from slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Reveal returns the text.
func (s Secret) Reveal() string { return s.text }
