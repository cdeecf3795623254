// SPDX-License-Identifier: Apache-2.0

package eventlog

import (
	"encoding/binary"

	"github.com/dstack-go/dstack/internal/fault"
)

// TCG digest algorithms and their digest sizes in bytes (TCG Algorithm Registry).
var tcgDigestSize = map[uint16]int{0x4: 20, 0xB: 32, 0xC: 48, 0xD: 64}

const (
	tcgSHA384 = 0xC
	// ccelEnd fills the rest of the log area and stands where the register
	// index of the next record would.
	ccelEnd = 0xFFFFFFFF
)

// EventACPIData names the firmware's three events over ACPI tables by payload:
// register 0, type EV_PLATFORM_CONFIG_FLAGS (10), payload ASCII "ACPI DATA".
const (
	ACPIEventType uint32 = 10
	ACPIPayload          = "ACPI DATA"
)

// IsACPI reports whether e is one of the firmware's three events over ACPI tables.
func (e Event) IsACPI() bool {
	return e.IMR == 0 && e.EventType == ACPIEventType && string(e.Payload) == ACPIPayload
}

// ParseCCEL reads the firmware's event log (ACPI table CCEL, TCG PC Client
// format, little-endian; attestation.md §3.2). Each record must carry exactly
// one SHA-384 digest; the log must end with the 0xFFFFFFFF filler. Records of
// register 0 in TCG numbering are dropped, and the rest count from zero.
func ParseCCEL(data []byte) ([]Event, error) {
	if len(data) > MaxCCEL {
		return nil, fault.New("log_too_large", "firmware event log of %d bytes exceeds %d", len(data), MaxCCEL)
	}
	r := reader{data: data}
	// First record in the SHA-1 form; its data is the SpecID event, whose
	// algorithm table we do not need since sizes are fixed by the registry.
	r.take(4 + 4 + 20)
	r.take(int64(r.u32()))
	var events []Event
	for r.err == nil {
		imr := r.u32()
		if r.err == nil && imr == ccelEnd {
			return events, nil
		}
		typ, count := r.u32(), r.u32()
		if r.err == nil && imr != 0 && count != 1 {
			return nil, fault.New("log_malformed", "firmware event %d has %d digests, want one", len(events), count)
		}
		var digest []byte
		for i := uint32(0); i < count && r.err == nil; i++ {
			if i == 16 {
				return nil, fault.New("log_malformed", "firmware event %d has %d digests", len(events), count)
			}
			alg := r.u16()
			size, ok := tcgDigestSize[alg]
			if r.err == nil && !ok {
				return nil, fault.New("log_malformed", "firmware event %d has unknown digest algorithm %#x", len(events), alg)
			}
			digest = r.take(int64(size))
			if r.err == nil && imr != 0 && alg != tcgSHA384 {
				return nil, fault.New("log_malformed", "firmware event %d has a digest of algorithm %#x, want SHA-384", len(events), alg)
			}
		}
		size := r.u32()
		if r.err == nil && size > MaxPayload {
			return nil, fault.New("log_too_large", "firmware event %d has %d bytes of data, more than %d", len(events), size, MaxPayload)
		}
		payload := r.take(int64(size))
		if r.err != nil || imr == 0 {
			continue
		}
		if len(events) == MaxEvents {
			return nil, fault.New("log_too_large", "firmware event log has more than %d events", MaxEvents)
		}
		events = append(events, Event{IMR: imr - 1, EventType: typ, Digest: digest, Payload: payload})
	}
	return nil, r.err
}

// reader consumes little-endian fields; after a failure it returns zeros and
// keeps the first error.
type reader struct {
	data []byte
	off  int64
	err  error
}

func (r *reader) take(n int64) []byte {
	if r.err != nil {
		return nil
	}
	if n < 0 || n > int64(len(r.data))-r.off {
		r.err = fault.New("log_malformed", "firmware event log ends at byte %d where %d more are declared", len(r.data), n)
		return nil
	}
	b := r.data[r.off : r.off+n : r.off+n]
	r.off += n
	return b
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}
