// SPDX-License-Identifier: Apache-2.0

// Package eventlog reads, writes and replays the log that explains the TDX
// runtime registers (RTMR): the firmware's events and dstack's own.
//
// A log is a claim of the guest or of whoever forwarded it, so all of it is
// attacker-controlled until [Replay] reproduces a register that a verified quote
// reports. Replay recomputes the digest of every runtime event from its name and
// payload and never trusts a supplied one (threats.md B09). [Boundary] then reads
// the identity that the guest's init committed before `system-ready`; what comes
// after belongs to the application and never feeds identity.
//
// Formats: attestation.md §3. Registers count from zero here (imr 0 is RTMR0).
package eventlog

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"strings"
	"unicode/utf8"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// RuntimeEventType is the TCG event type of dstack's runtime events, both versions.
const RuntimeEventType uint32 = 0x08000001

// RuntimeIMR is the register of runtime events: RTMR3.
const RuntimeIMR uint32 = 3

// Limits on a log (threats.md B15).
const (
	MaxJSON    = 1 << 20 // bytes of a log in JSON
	MaxEvents  = 10000
	MaxName    = 1024     // bytes of an event name
	MaxPayload = 64 << 10 // bytes of an event payload
	MaxCCEL    = 1 << 20  // bytes of a firmware event log
)

// Event is one entry of a log.
type Event struct {
	IMR       uint32 // register, from zero
	EventType uint32
	Digest    []byte // SHA-384 (48 bytes), or empty in a stripped log
	Name      string
	Payload   []byte
	Version   int    // 0 (the first form) or 2
	Preimage  []byte // V2 only: what Digest is the hash of; may be empty
}

// IsRuntime reports whether e is an event of dstack's own, whose digest follows
// from its name and payload.
func (e Event) IsRuntime() bool { return e.EventType == RuntimeEventType }

// RuntimeV1 returns a runtime event of the first form with its digest filled in.
// It refuses names with a colon: in that form ("a:b","c") and ("a","b:c") have
// one digest.
func RuntimeV1(name string, payload []byte) (Event, error) {
	if strings.Contains(name, ":") {
		return Event{}, fault.New("log_name_ambiguous", "event name %q contains a colon, which the first event form cannot tell from its separator", name)
	}
	return runtime(name, payload, 0)
}

// RuntimeV2 returns a runtime event of the second form, with digest and preimage.
func RuntimeV2(name string, payload []byte) (Event, error) { return runtime(name, payload, 2) }

func runtime(name string, payload []byte, version int) (Event, error) {
	e := Event{IMR: RuntimeIMR, EventType: RuntimeEventType, Name: name, Payload: bytes.Clone(payload), Version: version}
	if err := e.check(); err != nil {
		return Event{}, err
	}
	d := Digest(e)
	e.Digest = d[:]
	if version == 2 {
		e.Preimage = PreimageOf(e)
	}
	return e, nil
}

// PreimageOf returns the bytes whose hash is the digest of a runtime event.
//
//	V1: event type as u32 little-endian ‖ ":" ‖ name ‖ ":" ‖ payload
//	V2: {"name":"…","payload":"<lowercase hex>","type":134217729} after RFC 8785
func PreimageOf(e Event) []byte {
	if e.Version == 2 {
		b := append([]byte(`{"name":`), quoteJCS(e.Name)...)
		b = append(b, `,"payload":"`...)
		b = hex.AppendEncode(b, e.Payload)
		return fmt.Appendf(b, `","type":%d}`, RuntimeEventType)
	}
	b := binary.LittleEndian.AppendUint32(nil, RuntimeEventType)
	b = append(b, ':')
	b = append(b, e.Name...)
	b = append(b, ':')
	return append(b, e.Payload...)
}

// quoteJCS quotes a string as RFC 8785 §3.2.2.2 does: short escapes where JSON
// has them, \u00xx for other control characters, everything else verbatim.
func quoteJCS(s string) []byte {
	b := []byte{'"'}
	for i := range len(s) {
		switch c := s[i]; c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\b':
			b = append(b, '\\', 'b')
		case '\f':
			b = append(b, '\\', 'f')
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			if c < 0x20 {
				b = fmt.Appendf(b, `\u%04x`, c)
			} else {
				b = append(b, c)
			}
		}
	}
	return append(b, '"')
}

// Digest returns the SHA-384 digest of a runtime event, computed from its name,
// payload and version; the event's own Digest is not looked at.
func Digest(e Event) dstack.Measurement { return sha512.Sum384(PreimageOf(e)) }

// Extend returns the register after digest was extended into it:
// SHA-384(register ‖ digest).
func Extend(register, digest dstack.Measurement) dstack.Measurement {
	return sha512.Sum384(append(register[:], digest[:]...))
}

// check enforces the limits and the form of one event.
func (e Event) check() error {
	switch {
	case len(e.Name) > MaxName:
		return fault.New("log_too_large", "event name of %d bytes exceeds %d", len(e.Name), MaxName)
	case len(e.Payload) > MaxPayload:
		return fault.New("log_too_large", "payload of event %q has %d bytes, more than %d", e.Name, len(e.Payload), MaxPayload)
	case !utf8.ValidString(e.Name):
		return fault.New("log_malformed", "event name %q is not UTF-8", e.Name)
	case len(e.Digest) != 0 && len(e.Digest) != dstack.MeasurementSize:
		return fault.New("log_malformed", "digest of event %q has %d bytes, want 48 or none", e.Name, len(e.Digest))
	case e.Version != 0 && e.Version != 2:
		return fault.New("log_event_version", "event %q has unknown version %d", e.Name, e.Version)
	case e.Version == 2 && !e.IsRuntime():
		return fault.New("log_event_version", "boot event %q cannot have version 2", e.Name)
	case len(e.Preimage) != 0 && e.Version != 2:
		return fault.New("log_preimage_mismatch", "event %q carries a preimage but is not of version 2", e.Name)
	}
	return nil
}

// Check verifies that whatever a runtime event says about its own digest agrees
// with its name and payload. Fields that are absent are not missed.
func (e Event) Check() error {
	if err := e.check(); err != nil {
		return err
	}
	if e.IsRuntime() != (e.IMR == RuntimeIMR) {
		return fault.New("log_register", "event %q of type %#x stands in register %d: runtime events, and only they, belong to register %d", e.Name, e.EventType, e.IMR, RuntimeIMR)
	}
	if !e.IsRuntime() {
		return nil
	}
	if d := Digest(e); len(e.Digest) != 0 && !bytes.Equal(e.Digest, d[:]) {
		return fault.New("log_digest_mismatch", "event %q carries digest %x but hashes to %s", e.Name, e.Digest, d)
	}
	if len(e.Preimage) != 0 && !bytes.Equal(e.Preimage, PreimageOf(e)) {
		return fault.New("log_preimage_mismatch", "event %q carries a preimage that is not its canonical form", e.Name)
	}
	return nil
}

// runtimeHashes are the hashes of registers that runtime events are extended into.
var runtimeHashes = map[string]func() hash.Hash{"sha-256": sha256.New, "sha-384": sha512.New384, "sha-512": sha512.New}

// ReplayRuntime returns the value that a register of the named hash (sha-256,
// sha-384 or sha-512) has after the runtime events among events, from zero:
// register ← H(register ‖ H(preimage)). Boot events are passed over.
func ReplayRuntime(events []Event, name string) ([]byte, error) {
	newHash := runtimeHashes[name]
	if newHash == nil {
		return nil, fault.New("log_hash", "no runtime register of hash %q is known", name)
	}
	if len(events) > MaxEvents {
		return nil, fault.New("log_too_large", "event log has %d events, more than %d", len(events), MaxEvents)
	}
	h := newHash()
	register := make([]byte, h.Size())
	for _, e := range events {
		if !e.IsRuntime() && e.IMR != RuntimeIMR {
			continue
		}
		if err := e.Check(); err != nil {
			return nil, err
		}
		h.Reset()
		h.Write(PreimageOf(e))
		digest := h.Sum(nil)
		h.Reset()
		h.Write(register)
		h.Write(digest)
		register = h.Sum(register[:0])
	}
	return register, nil
}

// Replay returns the value that register imr has after the events, from zero.
// Runtime events are hashed anew from name and payload; an event that
// contradicts itself is an error. A boot event needs its digest, since its
// payload does not determine it.
func Replay(events []Event, imr uint32) (dstack.Measurement, error) {
	if len(events) > MaxEvents {
		return dstack.Measurement{}, fault.New("log_too_large", "event log has %d events, more than %d", len(events), MaxEvents)
	}
	var reg dstack.Measurement
	for i, e := range events {
		if e.IMR != imr && !(imr == RuntimeIMR && e.IsRuntime()) {
			continue
		}
		if err := e.Check(); err != nil {
			return reg, fmt.Errorf("event %d: %w", i, err)
		}
		var d dstack.Measurement
		switch {
		case e.IsRuntime():
			d = Digest(e)
		case len(e.Digest) == len(d):
			copy(d[:], e.Digest)
		default:
			return reg, fault.New("log_malformed", "boot event %d of register %d has no digest", i, imr)
		}
		reg = Extend(reg, d)
	}
	return reg, nil
}

// Runtime returns the runtime events of a log, in order.
func Runtime(events []Event) []Event {
	var out []Event
	for _, e := range events {
		if e.IsRuntime() {
			out = append(out, e)
		}
	}
	return out
}

// wire is the JSON form of an event (attestation.md §3.1).
type wire struct {
	IMR       *uint32 `json:"imr"`
	EventType *uint32 `json:"event_type"`
	Digest    string  `json:"digest"`
	Name      string  `json:"event"`
	Payload   string  `json:"event_payload"`
	Version   *int    `json:"version,omitempty"`
	Preimage  string  `json:"preimage,omitempty"`
}

// MarshalJSON writes the form of attestation.md §3.1: bytes as lowercase hex,
// version only when 2, preimage only when present.
func (e Event) MarshalJSON() ([]byte, error) {
	w := wire{
		IMR: &e.IMR, EventType: &e.EventType, Digest: hex.EncodeToString(e.Digest), Name: e.Name,
		Payload: hex.EncodeToString(e.Payload), Preimage: hex.EncodeToString(e.Preimage),
	}
	if e.Version != 0 {
		w.Version = &e.Version
	}
	// An Encoder, since Marshal would escape <, > and & and upstream does not.
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(w); err != nil {
		return nil, err
	}
	return bytes.TrimRight(buf.Bytes(), "\n"), nil
}

// UnmarshalJSON reads one event. It checks form and limits, not consistency.
func (e *Event) UnmarshalJSON(data []byte) error {
	var w wire
	if err := json.Unmarshal(data, &w); err != nil {
		return err
	}
	if w.IMR == nil || w.EventType == nil {
		return fault.New("log_malformed", "event %q lacks imr or event_type", w.Name)
	}
	v := Event{IMR: *w.IMR, EventType: *w.EventType, Name: w.Name}
	if w.Version != nil && *w.Version != 1 {
		v.Version = *w.Version
		if v.Version == 0 {
			return fault.New("log_event_version", "event %q has unknown version 0", w.Name)
		}
	}
	for _, f := range []struct {
		name, text string
		dst        *[]byte
	}{{"digest", w.Digest, &v.Digest}, {"event_payload", w.Payload, &v.Payload}, {"preimage", w.Preimage, &v.Preimage}} {
		b, err := hex.DecodeString(f.text)
		if err != nil {
			return fault.Wrap(err, "log_malformed", "%s of event %q", f.name, w.Name)
		}
		if len(b) > 0 {
			*f.dst = b
		}
	}
	if err := v.check(); err != nil {
		return err
	}
	*e = v
	return nil
}

// ParseJSON reads a log: a JSON array of at most 10000 events and 1 MiB.
func ParseJSON(data []byte) ([]Event, error) {
	if len(data) > MaxJSON {
		return nil, fault.New("log_too_large", "event log of %d bytes exceeds %d", len(data), MaxJSON)
	}
	var events []Event
	if err := strictjson.Decode(data, &events, strictjson.Limits{Size: MaxJSON, Depth: 4, Unknown: true}); err != nil {
		if fault.Code(err) != "" {
			return nil, fmt.Errorf("event log: %w", err)
		}
		return nil, fault.Wrap(err, "log_malformed", "event log")
	}
	if len(events) > MaxEvents {
		return nil, fault.New("log_too_large", "event log has %d events, more than %d", len(events), MaxEvents)
	}
	return events, nil
}

// MarshalJSON writes a log as ParseJSON reads it.
func MarshalJSON(events []Event) ([]byte, error) {
	out := []byte{'['}
	for i, e := range events {
		b, err := e.MarshalJSON()
		if err != nil {
			return nil, err
		}
		if i > 0 {
			out = append(out, ',')
		}
		out = append(out, b...)
	}
	return append(out, ']'), nil
}
