// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxEntry bounds an entry in bytes.
const MaxEntry = 16 << 10

// Bounds of the free texts, in bytes. JSON spells a byte with at most six, so that
// what keeps them always fits in MaxEntry.
const (
	maxText = 1024
	maxBy   = 256
)

// Kind is what an entry tells of. More kinds may come; readers keep what they do not
// know.
type Kind string

const (
	Grant    Kind = "grant"    // something was given, and the receipt went with it
	Refusal  Kind = "refusal"  // Code and Reason say why
	Policy   Kind = "policy"   // another policy is in force
	Member   Kind = "member"   // a replica or custodian came or went
	Start    Kind = "start"    // the KMS serves
	Rotation Kind = "rotation" // another epoch is in force
	Shutdown Kind = "shutdown" // the KMS stopped in order
)

// Hash is a SHA-256.
type Hash [32]byte

func (h Hash) String() string               { return hex.EncodeToString(h[:]) }
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }
func (h *Hash) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(h)) {
		return fmt.Errorf("a hash has 64 digits, not %d", len(text))
	}
	_, err := hex.Decode(h[:], text)
	return err
}

// Entry is one line of the log. Its bytes are one compact JSON object with the fields
// in this order and the zero ones left out; there is exactly one spelling of an entry.
type Entry struct {
	Time         time.Time          `json:"time"` // UTC, whole milliseconds
	Kind         Kind               `json:"kind"`
	Purpose      string             `json:"purpose,omitempty"` // what was asked for: a word
	Role         string             `json:"role,omitempty"`    // of whom asked: a word
	AppID        dstack.AppID       `json:"app_id,omitzero"`
	ComposeHash  dstack.ComposeHash `json:"compose_hash,omitzero"`
	InstanceID   dstack.InstanceID  `json:"instance_id,omitzero"`
	DeviceID     dstack.DeviceID    `json:"device_id,omitzero"`
	OSImageHash  dstack.ImageHash   `json:"os_image_hash,omitzero"`
	MRAggregated Hash               `json:"mr_aggregated,omitzero"`
	TCBStatus    string             `json:"tcb_status,omitempty"` // as the verifier names it: a word
	Trust        dstack.Trust       `json:"trust,omitempty"`
	Session      bool               `json:"session,omitempty"`
	Code         string             `json:"code,omitempty"`       // of a refusal: a word
	Reason       string             `json:"reason,omitempty"`     // free text, may quote who asked
	By           string             `json:"by,omitempty"`         // free text: who allowed or changed it
	Evidence     Hash               `json:"evidence,omitzero"`    // of the evidence container
	LeaseUntil   time.Time          `json:"lease_until,omitzero"` // as Time
	Epoch        uint64             `json:"epoch,omitempty"`
	Note         string             `json:"note,omitempty"` // free text
}

// word is what the fields that programs compare may hold; attackers choose none of
// them.
var word = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}$`)

// encode returns the bytes of an entry. It cuts times to milliseconds and free texts
// to their bounds, on a rune, and replaces what is not UTF-8: a refusal must get
// logged whatever its reason quotes. Otherwise the code is release_log_entry.
func (e Entry) encode() ([]byte, error) {
	e.Time, e.LeaseUntil = stamp(e.Time), stamp(e.LeaseUntil)
	e.Reason, e.By, e.Note = bounded(e.Reason, maxText), bounded(e.By, maxBy), bounded(e.Note, maxText)
	if err := e.check(); err != nil {
		return nil, err
	}
	data, err := json.Marshal(e)
	if err != nil || len(data) > MaxEntry {
		return nil, fault.New("release_log_entry", "the entry cannot be written in %d bytes (%v)", MaxEntry, err)
	}
	return data, nil
}

func (e Entry) check() error {
	if e.Time.IsZero() || e.Kind == "" {
		return fault.New("release_log_entry", "an entry has a time and a kind")
	}
	for _, w := range []string{string(e.Kind), e.Purpose, e.Role, e.TCBStatus, string(e.Trust), e.Code} {
		if w != "" && !word.MatchString(w) {
			return fault.New("release_log_entry", "%.80q is no word of an entry", w)
		}
	}
	for _, t := range []time.Time{e.Time, e.LeaseUntil} {
		if !t.Equal(stamp(t)) || t.Location() != time.UTC || !t.IsZero() && (t.Year() < 1970 || t.Year() > 9999) {
			return fault.New("release_log_entry", "the time %v is not UTC in whole milliseconds", t)
		}
	}
	if len(e.Reason) > maxText || len(e.Note) > maxText || len(e.By) > maxBy {
		return fault.New("release_log_entry", "a text of the entry is too long")
	}
	return nil
}

// ParseEntry returns the entry that data is the one spelling of; anything else has the
// code release_log_entry. A field more is another format of the log, and refused too.
func ParseEntry(data []byte) (Entry, error) {
	if len(data) > MaxEntry {
		return Entry{}, fault.New("release_log_entry", "an entry of %d bytes, at most %d are allowed", len(data), MaxEntry)
	}
	var e Entry
	if err := json.Unmarshal(data, &e); err != nil {
		return Entry{}, fault.Wrap(err, "release_log_entry", "read an entry of the release log")
	}
	if err := e.check(); err != nil {
		return Entry{}, err
	}
	// Names twice, names unknown, other cases, spaces, broken UTF-8: all are lost in
	// this copy, so it tells them.
	if again, err := json.Marshal(e); err != nil || !bytes.Equal(again, data) {
		return Entry{}, fault.New("release_log_entry", "an entry of the release log is not spelled as entries are")
	}
	return e, nil
}

func stamp(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC().Truncate(time.Millisecond)
}

func bounded(s string, n int) string {
	const more = "…"
	s = strings.ToValidUTF8(s[:min(len(s), 4*n)], "\uFFFD")
	if len(s) <= n {
		return s
	}
	cut := n - len(more)
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + more
}
