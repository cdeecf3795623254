// SPDX-License-Identifier: Apache-2.0

package container

import (
	"encoding/binary"
	"unicode/utf8"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// scale reads SCALE: fixed integers little-endian, vectors and strings as a
// compact length and the data, enums as one byte.
type scale struct{ cut }

func (s *scale) u32(what string) uint32 {
	if b := s.take(4, what); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// compact reads a length. The two low bits of the first byte choose 1, 2 or 4
// bytes; the fourth mode is for numbers of 2³⁰ and more, which no length here
// may reach. A longer form than needed is refused, so that a value has one
// encoding.
func (s *scale) compact(what string) uint64 {
	b := s.u8(what)
	var v, min uint64
	switch b & 3 {
	case 0:
		return uint64(b >> 2)
	case 1:
		v, min = uint64(b)|uint64(s.u8(what))<<8, 1<<6
	case 2:
		rest := s.take(3, what)
		if rest == nil {
			return 0
		}
		v, min = uint64(b)|uint64(rest[0])<<8|uint64(rest[1])<<16|uint64(rest[2])<<24, 1<<14
	case 3:
		s.fail(fault.New("container_too_large", "%s at byte %d of the container has a length of 2^30 or more", what, s.off-1))
		return 0
	}
	if v >>= 2; s.err == nil && v < min {
		s.fail(malformed("%s at byte %d has a length in a longer form than needed", what, s.off))
	}
	return v
}

func (s *scale) bytes(max uint64, what string) []byte {
	n := s.compact(what)
	if !s.within(n, max, what) || n == 0 {
		return nil
	}
	return s.take(n, what)
}

func (s *scale) string(max uint64, what string) string {
	b := s.bytes(max, what)
	if !utf8.Valid(b) {
		s.fail(malformed("%s before byte %d is not UTF-8", what, s.off))
	}
	return string(b)
}

// vec reads a vector of at most max elements. No space is set aside for the
// declared count: it grows with elements really present.
func vec[T any](s *scale, max uint64, what string, element func() T) []T {
	n := s.compact(what)
	if !s.within(n, max, what) {
		return nil
	}
	var out []T
	for range n {
		v := element()
		if s.err != nil {
			return nil
		}
		out = append(out, v)
	}
	return out
}

func decodeV0(data []byte) (*attest.Evidence, error) {
	s := &scale{cut{data: data}}
	s.u8("version")
	d := decoded{variant: variant(s.u8("quote variant"))}
	e := &d.evidence
	event := func() eventlog.Event {
		return eventlog.Event{
			IMR: s.u32("register"), EventType: s.u32("event type"), Digest: s.digest(),
			Name: s.string(eventlog.MaxName, "event name"), Payload: s.bytes(eventlog.MaxPayload, "event payload"),
		}
	}
	switch d.variant {
	case variantTDX, variantGCPTDX:
		e.Quote = s.bytes(attest.MaxQuote, "quote")
		d.log = vec(s, eventlog.MaxEvents, "event log", event)
		if d.variant == variantGCPTDX {
			e.TPMQuote = s.tpmQuote()
		}
	case variantNitro, variantNitroTPM:
		e.Quote = s.bytes(attest.MaxQuote, "attestation document")
	case variantSNP:
		e.Quote = s.bytes(attest.MaxQuote, "report")
		e.CertChain = vec(s, maxCerts, "certificate chain", func() []byte { return s.bytes(maxCert, "certificate") })
		e.MRConfig = s.string(maxConfig, "config document")
	default:
		s.fail(fault.New("container_tee", "container has unknown quote variant %d", d.variant))
	}
	d.runtime = vec(s, eventlog.MaxEvents, "runtime events", func() eventlog.Event {
		return eventlog.Event{
			IMR: eventlog.RuntimeIMR, EventType: eventlog.RuntimeEventType,
			Name: s.string(eventlog.MaxName, "event name"), Payload: s.bytes(eventlog.MaxPayload, "event payload"),
		}
	})
	copy(e.ReportData[:], s.take(uint64(len(e.ReportData)), "report data"))
	e.Config = s.string(maxConfig, "config")
	if err := s.end(); err != nil {
		return nil, err
	}
	return d.finish()
}

func (s *scale) digest() []byte {
	b := s.bytes(64, "event digest")
	if len(b) != 0 && len(b) != 48 {
		s.fail(malformed("an event digest before byte %d has %d bytes, want 48 or none", s.off, len(b)))
	}
	return b
}

func (s *scale) tpmQuote() *attest.TPMQuote {
	return &attest.TPMQuote{
		Message: s.bytes(maxCert, "TPM quote"), Signature: s.bytes(maxCert, "TPM signature"),
		PCRs: vec(s, maxPCRs, "PCR values", func() attest.PCR {
			return attest.PCR{Index: s.u32("PCR index"), Algorithm: s.string(32, "PCR algorithm"), Value: s.bytes(64, "PCR value")}
		}),
		AKCert: s.bytes(maxCert, "AK certificate"), Platform: s.platform(),
		EventLog: vec(s, maxPCREvents, "TPM event log", func() attest.PCREvent {
			return attest.PCREvent{Index: s.u32("PCR index"), Digest: s.bytes(64, "PCR digest")}
		}),
	}
}

func (s *scale) platform() byte {
	p := s.u8("platform")
	if int(p) >= len(platforms) {
		s.fail(malformed("unknown platform %d at byte %d", p, s.off-1))
	}
	return p
}

// EncodeV0 writes the SCALE form. It cannot hold events of the second form or a
// report data payload.
func EncodeV0(e *attest.Evidence) ([]byte, error) {
	v, err := variantOf(e)
	if err != nil {
		return nil, err
	}
	if needsV1(e) {
		return nil, fault.New("container_needs_v1", "container form V0 cannot hold events of version 2, a report data payload or an Arm CCA token").
			WithFix("encode form V1")
	}
	b := []byte{0, byte(v)}
	b = putBytes(b, e.Quote)
	switch v {
	case variantTDX, variantGCPTDX:
		b = putCompact(b, len(e.EventLog))
		for _, ev := range e.EventLog {
			b = binary.LittleEndian.AppendUint32(b, ev.IMR)
			b = binary.LittleEndian.AppendUint32(b, ev.EventType)
			b = putBytes(b, ev.Digest)
			b = putBytes(b, []byte(ev.Name))
			b = putBytes(b, ev.Payload)
		}
		if q := e.TPMQuote; v == variantGCPTDX {
			b = putBytes(putBytes(b, q.Message), q.Signature)
			b = putCompact(b, len(q.PCRs))
			for _, p := range q.PCRs {
				b = binary.LittleEndian.AppendUint32(b, p.Index)
				b = putBytes(putBytes(b, []byte(p.Algorithm)), p.Value)
			}
			b = append(putBytes(b, q.AKCert), q.Platform)
			b = putCompact(b, len(q.EventLog))
			for _, p := range q.EventLog {
				b = putBytes(binary.LittleEndian.AppendUint32(b, p.Index), p.Digest)
			}
		}
	case variantSNP:
		b = putCompact(b, len(e.CertChain))
		for _, c := range e.CertChain {
			b = putBytes(b, c)
		}
		b = putBytes(b, []byte(e.MRConfig))
	}
	runtime := runtimeEvents(e, v)
	b = putCompact(b, len(runtime))
	for _, ev := range runtime {
		b = putBytes(putBytes(b, []byte(ev.Name)), ev.Payload)
	}
	b = append(b, e.ReportData[:]...)
	b = putBytes(b, []byte(e.Config))
	return checkSize(b)
}

func checkSize(b []byte) ([]byte, error) {
	if len(b) > MaxSize {
		return nil, fault.New("container_too_large", "container of %d bytes exceeds %d", len(b), MaxSize)
	}
	return b, nil
}

func putCompact(b []byte, n int) []byte {
	switch {
	case n < 1<<6:
		return append(b, byte(n<<2))
	case n < 1<<14:
		return binary.LittleEndian.AppendUint16(b, uint16(n<<2|1))
	default:
		return binary.LittleEndian.AppendUint32(b, uint32(n)<<2|2)
	}
}

func putBytes(b, v []byte) []byte { return append(putCompact(b, len(v)), v...) }
