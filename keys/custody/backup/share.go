// SPDX-License-Identifier: Apache-2.0

package backup

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strconv"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	shareVersion = "dstack-root-share-v1"
	shareSize    = 32 // bytes of a scalar
	checkSize    = 4
	maxShare     = 256 // bytes of its text
	idSize       = 16
)

// Share is one operator's part of a backup's secret. As many as the quorum give the
// roots to whoever has the backup. It cannot be printed, compared or serialised but by
// [Share.Text].
type Share struct {
	_ [0]func()
	s *share // nil of the zero value
}

type share struct {
	backup [idSize]byte
	index  int // from 1
	// Two pointers away from Share: fmt follows one, for a verb that does not fit, where
	// the Share is an unexported field and Format is out of its reach.
	value *[shareSize]byte
}

func (s Share) String() string               { return "[share of a backup]" }
func (s Share) Format(f fmt.State, _ rune)   { fmt.Fprint(f, s.String()) }
func (s Share) LogValue() slog.Value         { return slog.StringValue(s.String()) }
func (s Share) MarshalText() ([]byte, error) { return nil, errSerialise }

// Wipe overwrites the share.
func (s Share) Wipe() {
	if s.s != nil {
		clear(s.s.value[:])
	}
}

// Text returns the share as one line for the person who restores; it is secret, and
// the caller wipes it:
//
//	dstack-root-share-v1 <backup's id> <index> <share, 32 bytes> <first 4 bytes of SHA-256>
//
// The sum is of the text before it, and against slips of the hand.
func (s Share) Text() []byte {
	if s.s == nil {
		return nil
	}
	b := make([]byte, 0, maxShare)
	b = append(b, shareVersion+" "...)
	b = hex.AppendEncode(b, s.s.backup[:])
	b = append(b, ' ')
	b = strconv.AppendInt(b, int64(s.s.index), 10)
	b = append(b, ' ')
	b = hex.AppendEncode(b, s.s.value[:])
	sum := sha256.Sum256(b)
	b = append(b, ' ')
	b = hex.AppendEncode(b, sum[:checkSize])
	return append(b, '\n')
}

// ParseShare reads a share's line; white space around it does not matter. Code
// share_malformed.
func ParseShare(text []byte) (Share, error) {
	s, err := parseShare(text)
	if err != nil {
		return Share{}, fault.Wrap(err, "share_malformed", "the share of a backup").
			WithFix("have its operator send it again")
	}
	return s, nil
}

func parseShare(text []byte) (Share, error) {
	if len(text) > maxShare {
		return Share{}, fmt.Errorf("more than %d bytes", maxShare)
	}
	line := bytes.TrimSpace(text)
	parts := bytes.Split(line, []byte(" "))
	if len(parts) != 5 || string(parts[0]) != shareVersion {
		return Share{}, errors.New("it is no share of a known version")
	}
	s := &share{value: new([shareSize]byte)}
	index, err := strconv.Atoi(string(parts[2]))
	if err != nil || index < 1 || index > MaxOperators {
		return Share{}, errors.New("its index is out of range")
	}
	s.index = index
	// The library's words would quote what is secret.
	if len(parts[1]) != 2*idSize || len(parts[3]) != 2*shareSize {
		return Share{}, errors.New("it has too few or too many digits")
	}
	if _, err := hex.Decode(s.backup[:], parts[1]); err != nil {
		return Share{}, errors.New("its backup's id is not hexadecimal")
	}
	if _, err := hex.Decode(s.value[:], parts[3]); err != nil {
		clear(s.value[:])
		return Share{}, errors.New("it is not hexadecimal")
	}
	out := Share{s: s}
	want := out.Text()
	defer clear(want)
	if !bytes.Equal(bytes.TrimSpace(want), line) {
		out.Wipe()
		return Share{}, errors.New("its sum is wrong: a character was changed")
	}
	return out, nil
}

// commitment is what the backup says of a share: it tells a right one from a wrong one,
// and of 32 random bytes it tells nothing else.
func (s *share) commitment() [sha256.Size]byte {
	h := sha256.New()
	h.Write([]byte(shareVersion))
	h.Write(s.backup[:])
	h.Write([]byte{byte(s.index)})
	h.Write(s.value[:])
	return [sha256.Size]byte(h.Sum(nil))
}
