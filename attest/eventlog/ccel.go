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
		algorithms := []uint16{tcgSHA384}
		if imr == 0 {
			algorithms = nil // whatever they are, the record is dropped
		}
		rec := r.record(imr, len(events), algorithms)
		if r.err != nil || imr == 0 {
			continue
		}
		if len(events) == MaxEvents {
			return nil, fault.New("log_too_large", "firmware event log has more than %d events", MaxEvents)
		}
		events = append(events, Event{IMR: imr - 1, EventType: rec.typ, Digest: rec.digests[0].value, Payload: rec.data})
	}
	return nil, r.err
}

// tcgRecord is a TCG_PCR_EVENT2 (TCG PC Client Platform Firmware Profile §10.2.2).
type tcgRecord struct {
	register uint32
	typ      uint32
	digests  []tcgDigest
	data     []byte
}

type tcgDigest struct {
	algorithm uint16
	value     []byte
}

// maxDigests bounds the digests of one record; the registry has fewer algorithms.
const maxDigests = 16

// record reads what follows the register of the record with number n (for
// messages). Its digests must be of the algorithms, in their order; nil admits
// any. After a failure r.err says why.
func (r *reader) record(register uint32, n int, algorithms []uint16) tcgRecord {
	rec := tcgRecord{register: register, typ: r.u32()}
	count := r.u32()
	switch {
	case r.err != nil:
	case count > maxDigests:
		r.err = fault.New("log_malformed", "firmware event %d has %d digests, more than %d", n, count, maxDigests)
	case algorithms != nil && int(count) != len(algorithms):
		r.err = fault.New("log_malformed", "firmware event %d has %d digests, want %d", n, count, len(algorithms))
	}
	for i := 0; i < int(count) && r.err == nil; i++ {
		algorithm := r.u16()
		size, ok := tcgDigestSize[algorithm]
		switch {
		case r.err != nil:
		case !ok:
			r.err = fault.New("log_malformed", "firmware event %d has unknown digest algorithm %#x", n, algorithm)
		case algorithms != nil && algorithm != algorithms[i]:
			r.err = fault.New("log_malformed", "firmware event %d has a digest of algorithm %#x, want %#x", n, algorithm, algorithms[i])
		}
		rec.digests = append(rec.digests, tcgDigest{algorithm, r.take(int64(size))})
	}
	size := r.u32()
	if r.err == nil && size > MaxPayload {
		r.err = fault.New("log_too_large", "firmware event %d has %d bytes of data, more than %d", n, size, MaxPayload)
	}
	rec.data = r.take(int64(size))
	return rec
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
