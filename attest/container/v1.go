// SPDX-License-Identifier: Apache-2.0

package container

import (
	"encoding/binary"
	"slices"
	"unicode/utf8"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// pack reads MessagePack by schema: it never builds a tree, so memory is bounded
// by what the schema keeps. Only the types that a container has are known.
type pack struct{ cut }

func (p *pack) be(n uint64, what string) uint64 {
	var v uint64
	for _, b := range p.take(n, what) {
		v = v<<8 | uint64(b)
	}
	return v
}

func (p *pack) bad(b byte, want, what string) {
	p.fail(malformed("%s at byte %d has MessagePack type %#02x, want %s", what, p.off-1, b, want))
}

// uint reads an unsigned integer of at most max.
func (p *pack) uint(max uint64, what string) uint64 {
	var v uint64
	switch b := p.u8(what); {
	case b < 0x80:
		v = uint64(b)
	case b >= 0xcc && b <= 0xcf:
		v = p.be(1<<(b-0xcc), what)
	case b >= 0xd0 && b <= 0xd3: // signed, as other writers choose; must not be negative
		n := uint64(1) << (b - 0xd0)
		if v = p.be(n, what); v>>(8*n-1) != 0 {
			p.bad(b, "an unsigned integer", what)
		}
	default:
		p.bad(b, "an unsigned integer", what)
	}
	p.within(v, max, what)
	return v
}

// array reads the header of an array.
func (p *pack) array(max uint64, what string) uint64 {
	var n uint64
	switch b := p.u8(what); {
	case b&0xf0 == 0x90:
		n = uint64(b & 0x0f)
	case b == 0xdc || b == 0xdd:
		n = p.be(2<<(b-0xdc), what)
	default:
		p.bad(b, "an array", what)
	}
	if !p.within(n, max, what) {
		return 0
	}
	return n
}

// bytes reads binary data: bin, or an array of small integers (serde writes
// plain byte vectors so; attestation.md §7.3).
func (p *pack) bytes(max uint64, what string) []byte {
	var n uint64
	switch b := p.u8(what); {
	case b >= 0xc4 && b <= 0xc6:
		n = p.be(1<<(b-0xc4), what)
		if !p.within(n, max, what) || n == 0 {
			return nil
		}
		return p.take(n, what)
	case p.err == nil:
		p.off--
	}
	n = p.array(max, what)
	if p.err != nil || n == 0 {
		return nil
	}
	out := make([]byte, 0, n)
	for range n {
		out = append(out, byte(p.uint(255, what)))
		if p.err != nil {
			return nil
		}
	}
	return out
}

func (p *pack) string(max uint64, what string) string {
	var n uint64
	switch b := p.u8(what); {
	case b&0xe0 == 0xa0:
		n = uint64(b & 0x1f)
	case b >= 0xd9 && b <= 0xdb:
		n = p.be(1<<(b-0xd9), what)
	default:
		p.bad(b, "a string", what)
	}
	if !p.within(n, max, what) {
		return ""
	}
	v := p.take(n, what)
	if !utf8.Valid(v) {
		p.fail(malformed("%s before byte %d is not UTF-8", what, p.off))
	}
	return string(v)
}

// fields reads a map: it calls the function of each key. Unknown keys are
// skipped, a key that comes twice and a required one that is missing are errors.
func (p *pack) fields(what string, required []string, known map[string]func()) {
	var n uint64
	switch b := p.u8(what); {
	case b&0xf0 == 0x80:
		n = uint64(b & 0x0f)
	case b == 0xde || b == 0xdf:
		n = p.be(2<<(b-0xde), what)
	default:
		p.bad(b, "a map", what)
	}
	if !p.within(n, 64, what) {
		return
	}
	seen := map[string]bool{}
	for range n {
		key := p.string(64, "key of "+what)
		if p.err != nil {
			return
		}
		if seen[key] {
			p.fail(malformed("key %q of %s occurs twice", key, what))
			return
		}
		seen[key] = true
		if read := known[key]; read != nil {
			read()
		} else {
			p.skip(maxDepth, what)
		}
	}
	for _, key := range required {
		if p.err == nil && !seen[key] {
			p.fail(malformed("%s lacks %q", what, key))
		}
	}
}

// skip passes over one value of any type. Its work is bounded by the bytes
// present, its recursion by depth.
func (p *pack) skip(depth int, what string) {
	if depth == 0 {
		p.fail(fault.New("container_too_large", "%s at byte %d of the container nests deeper than %d", what, p.off, maxDepth))
		return
	}
	children := func(n uint64) {
		for ; n > 0 && p.err == nil; n-- {
			p.skip(depth-1, what)
		}
	}
	switch b := p.u8(what); {
	case p.err != nil, b < 0x80, b >= 0xe0, b == 0xc0, b == 0xc2, b == 0xc3:
	case b < 0x90:
		children(2 * uint64(b&0x0f))
	case b < 0xa0:
		children(uint64(b & 0x0f))
	case b < 0xc0:
		p.take(uint64(b&0x1f), what)
	case b >= 0xc4 && b <= 0xc6:
		p.take(p.be(1<<(b-0xc4), what), what)
	case b >= 0xc7 && b <= 0xc9:
		p.take(p.be(1<<(b-0xc7), what)+1, what)
	case b == 0xca:
		p.take(4, what)
	case b == 0xcb:
		p.take(8, what)
	case b >= 0xcc && b <= 0xcf:
		p.take(1<<(b-0xcc), what)
	case b >= 0xd0 && b <= 0xd3:
		p.take(1<<(b-0xd0), what)
	case b >= 0xd4 && b <= 0xd8:
		p.take(1+1<<(b-0xd4), what)
	case b >= 0xd9 && b <= 0xdb:
		p.take(p.be(1<<(b-0xd9), what), what)
	case b == 0xdc || b == 0xdd:
		children(p.be(2<<(b-0xdc), what))
	case b == 0xde || b == 0xdf:
		children(2 * p.be(2<<(b-0xde), what))
	default:
		p.bad(b, "a known type", what)
	}
}

func list[T any](p *pack, max uint64, what string, element func() T) []T {
	var out []T
	for n := p.array(max, what); n > 0 && p.err == nil; n-- {
		out = append(out, element())
	}
	return out
}

// tagged reads {"kind":K,"data":{…}} with kind before data, as serde writes it
// and as a streaming reader needs it.
func (p *pack) tagged(what string, data func(kind string)) {
	kind := ""
	p.fields(what, []string{"kind", "data"}, map[string]func(){
		"kind": func() { kind = p.string(64, "kind of "+what) },
		"data": func() {
			if kind == "" {
				p.fail(malformed("the data of %s come before its kind", what))
				return
			}
			data(kind)
		},
	})
}

func decodeV1(data []byte) (*attest.Evidence, error) {
	p := &pack{cut{data: data}}
	var d decoded
	p.fields("container", []string{"version", "platform", "stack"}, map[string]func(){
		"version": func() {
			if v := p.uint(1<<32, "version"); p.err == nil && v != 1 {
				p.fail(fault.New("container_version", "MessagePack container has version %d, want 1", v))
			}
		},
		"platform": func() { p.tagged("platform", func(kind string) { p.platformData(&d, kind) }) },
		"stack":    func() { p.tagged("stack", func(kind string) { p.stackData(&d, kind) }) },
	})
	if err := p.end(); err != nil {
		return nil, err
	}
	return d.finish()
}

func (p *pack) platformData(d *decoded, kind string) {
	e := &d.evidence
	quote := func(key string) func() { return func() { e.Quote = p.bytes(attest.MaxQuote, key) } }
	log := func() {
		d.log = list(p, eventlog.MaxEvents, "event log", func() (ev eventlog.Event) {
			p.fields("event", []string{"imr", "event_type", "event", "event_payload"}, map[string]func(){
				"imr":           func() { ev.IMR = uint32(p.uint(1<<32-1, "register")) },
				"event_type":    func() { ev.EventType = uint32(p.uint(1<<32-1, "event type")) },
				"digest":        func() { ev.Digest = p.digest() },
				"event":         func() { ev.Name = p.string(eventlog.MaxName, "event name") },
				"event_payload": func() { ev.Payload = p.bytes(eventlog.MaxPayload, "event payload") },
				"version":       func() { ev.Version = p.eventVersion() },
				"preimage":      func() { ev.Preimage = p.bytes(4*eventlog.MaxPayload, "event preimage") },
			})
			return ev
		})
	}
	switch kind {
	case "tdx":
		d.variant = variantTDX
		p.fields("tdx evidence", []string{"quote", "event_log"}, map[string]func(){"quote": quote("quote"), "event_log": log})
	case "gcp-tdx":
		d.variant = variantGCPTDX
		p.fields("gcp-tdx evidence", []string{"quote", "event_log", "tpm_quote"}, map[string]func(){
			"quote": quote("quote"), "event_log": log, "tpm_quote": func() { e.TPMQuote = p.tpmQuote() },
		})
	case "nitro-enclave":
		d.variant = variantNitro
		p.fields("nitro-enclave evidence", []string{"nsm_quote"}, map[string]func(){"nsm_quote": quote("nsm_quote")})
	case "aws-nitro-tpm":
		d.variant = variantNitroTPM
		p.fields("aws-nitro-tpm evidence", []string{"attestation_doc"}, map[string]func(){"attestation_doc": quote("attestation_doc")})
	case "sev-snp":
		d.variant = variantSNP
		p.fields("sev-snp evidence", []string{"report", "cert_chain", "mr_config"}, map[string]func(){
			"report": quote("report"),
			"cert_chain": func() {
				e.CertChain = list(p, maxCerts, "certificate chain", func() []byte { return p.bytes(maxCert, "certificate") })
			},
			"mr_config": func() { e.MRConfig = p.string(maxConfig, "config document") },
		})
	case "arm-cca":
		d.variant = variantCCA
		p.fields("arm-cca evidence", []string{"token", "event_log"}, map[string]func(){
			"token": quote("token"), "event_log": log, "mr_config": func() { e.MRConfig = p.string(maxConfig, "config document") },
		})
	default:
		p.fail(fault.New("container_tee", "container has unknown platform kind %q", kind))
	}
}

func (p *pack) stackData(d *decoded, kind string) {
	e := &d.evidence
	required := []string{"report_data", "runtime_events", "config"}
	known := map[string]func(){
		"report_data": func() {
			b := p.bytes(uint64(len(e.ReportData)), "report data")
			if p.err == nil && len(b) != len(e.ReportData) {
				p.fail(malformed("report data has %d bytes, want %d", len(b), len(e.ReportData)))
			}
			copy(e.ReportData[:], b)
		},
		"config": func() { e.Config = p.string(maxConfig, "config") },
		"runtime_events": func() {
			d.runtime = list(p, eventlog.MaxEvents, "runtime events", func() eventlog.Event {
				ev := eventlog.Event{IMR: eventlog.RuntimeIMR, EventType: eventlog.RuntimeEventType}
				p.fields("runtime event", []string{"event", "payload"}, map[string]func(){
					"event":   func() { ev.Name = p.string(eventlog.MaxName, "event name") },
					"payload": func() { ev.Payload = p.bytes(eventlog.MaxPayload, "event payload") },
					"version": func() { ev.Version = p.eventVersion() },
				})
				return ev
			})
		},
	}
	switch kind {
	case "dstack":
	case "dstack-pod":
		required = append(required, "report_data_payload")
		known["report_data_payload"] = func() {
			s := p.string(maxConfig, "report data payload")
			e.ReportDataPayload = &s
		}
	default:
		p.fail(fault.New("container_stack", "container has unknown stack kind %q", kind))
		return
	}
	p.fields("stack", required, known)
}

func (p *pack) digest() []byte {
	b := p.bytes(64, "event digest")
	if len(b) != 0 && len(b) != 48 {
		p.fail(malformed("an event digest before byte %d has %d bytes, want 48 or none", p.off, len(b)))
	}
	return b
}

func (p *pack) eventVersion() int {
	switch v := p.uint(1<<32, "event version"); v {
	case 1:
		return 0
	case 2:
		return 2
	default:
		p.fail(fault.New("log_event_version", "event before byte %d of the container has unknown version %d", p.off, v))
		return 0
	}
}

func (p *pack) tpmQuote() *attest.TPMQuote {
	q := &attest.TPMQuote{}
	p.fields("TPM quote", []string{"message", "signature", "pcr_values", "ak_cert", "platform", "event_log"}, map[string]func(){
		"message":   func() { q.Message = p.bytes(maxCert, "TPM quote") },
		"signature": func() { q.Signature = p.bytes(maxCert, "TPM signature") },
		"ak_cert":   func() { q.AKCert = p.bytes(maxCert, "AK certificate") },
		"platform": func() {
			name := p.string(32, "platform")
			i := slices.Index(platforms, name)
			if p.err == nil && i < 0 {
				p.fail(malformed("unknown platform %q", name))
			}
			q.Platform = byte(i)
		},
		"pcr_values": func() {
			q.PCRs = list(p, maxPCRs, "PCR values", func() (v attest.PCR) {
				p.fields("PCR", []string{"index", "algorithm", "value"}, map[string]func(){
					"index":     func() { v.Index = uint32(p.uint(1<<32-1, "PCR index")) },
					"algorithm": func() { v.Algorithm = p.string(32, "PCR algorithm") },
					"value":     func() { v.Value = p.bytes(64, "PCR value") },
				})
				return v
			})
		},
		"event_log": func() {
			q.EventLog = list(p, maxPCREvents, "TPM event log", func() (v attest.PCREvent) {
				p.fields("PCR event", []string{"pcr_index", "digest"}, map[string]func(){
					"pcr_index": func() { v.Index = uint32(p.uint(1<<32-1, "PCR index")) },
					"digest":    func() { v.Digest = p.bytes(64, "PCR digest") },
				})
				return v
			})
		},
	})
	return q
}

// out writes MessagePack with the shortest form of each value, as rmp does.
type out []byte

func (o *out) short(fix byte, fixMax int, ops [3]byte, n int) {
	switch {
	case n <= fixMax:
		*o = append(*o, fix|byte(n))
	case n < 1<<8 && ops[0] != 0:
		*o = append(*o, ops[0], byte(n))
	case n < 1<<16:
		*o = binary.BigEndian.AppendUint16(append(*o, ops[1]), uint16(n))
	default:
		*o = binary.BigEndian.AppendUint32(append(*o, ops[2]), uint32(n))
	}
}

func (o *out) mapHeader(n int) { o.short(0x80, 15, [3]byte{0, 0xde, 0xdf}, n) }
func (o *out) array(n int)     { o.short(0x90, 15, [3]byte{0, 0xdc, 0xdd}, n) }
func (o *out) uint(n uint32)   { o.short(0, 127, [3]byte{0xcc, 0xcd, 0xce}, int(n)) }
func (o *out) str(s string) {
	o.short(0xa0, 31, [3]byte{0xd9, 0xda, 0xdb}, len(s))
	*o = append(*o, s...)
}

func (o *out) bin(b []byte) {
	o.short(0, -1, [3]byte{0xc4, 0xc5, 0xc6}, len(b))
	*o = append(*o, b...)
}

// ints writes bytes as an array of integers, the form serde gives a plain Vec<u8>.
func (o *out) ints(b []byte) {
	o.array(len(b))
	for _, v := range b {
		o.uint(uint32(v))
	}
}

// EncodeV1 writes the MessagePack form: named maps in upstream's key order.
func EncodeV1(e *attest.Evidence) ([]byte, error) {
	v, err := variantOf(e)
	if err != nil {
		return nil, err
	}
	var o out
	o.mapHeader(3)
	o.str("version")
	o.uint(1)
	o.str("platform")
	o.mapHeader(2)
	o.str("kind")
	o.str(kinds[v])
	o.str("data")
	switch v {
	case variantTDX, variantGCPTDX:
		o.mapHeader(2 + int(v))
		o.str("quote")
		o.ints(e.Quote)
		o.eventLog(e.EventLog)
		if v == variantGCPTDX {
			o.str("tpm_quote")
			if err := o.tpmQuote(e.TPMQuote); err != nil {
				return nil, err
			}
		}
	case variantNitro:
		o.mapHeader(1)
		o.str("nsm_quote")
		o.ints(e.Quote)
	case variantNitroTPM:
		o.mapHeader(1)
		o.str("attestation_doc")
		o.ints(e.Quote)
	case variantSNP:
		o.mapHeader(3)
		o.str("report")
		o.ints(e.Quote)
		o.str("cert_chain")
		o.array(len(e.CertChain))
		for _, c := range e.CertChain {
			o.ints(c)
		}
		o.str("mr_config")
		o.str(e.MRConfig)
	case variantCCA:
		o.mapHeader(3)
		o.str("token")
		o.ints(e.Quote)
		o.eventLog(e.EventLog)
		o.str("mr_config")
		o.str(e.MRConfig)
	}
	o.str("stack")
	o.mapHeader(2)
	o.str("kind")
	n := 3
	if e.ReportDataPayload != nil {
		n = 4
		o.str("dstack-pod")
	} else {
		o.str("dstack")
	}
	o.str("data")
	o.mapHeader(n)
	o.str("report_data")
	o.ints(e.ReportData[:])
	o.str("runtime_events")
	runtime := runtimeEvents(e, v)
	o.array(len(runtime))
	for _, ev := range runtime {
		n := 2
		if ev.Version == 2 {
			n = 3
		}
		o.mapHeader(n)
		o.str("event")
		o.str(ev.Name)
		o.str("payload")
		o.bin(ev.Payload)
		if ev.Version == 2 {
			o.str("version")
			o.uint(2)
		}
	}
	o.str("config")
	o.str(e.Config)
	if e.ReportDataPayload != nil {
		o.str("report_data_payload")
		o.str(*e.ReportDataPayload)
	}
	return checkSize(o)
}

func (o *out) eventLog(events []eventlog.Event) {
	o.str("event_log")
	o.array(len(events))
	for _, ev := range events {
		o.event(ev)
	}
}

func (o *out) event(ev eventlog.Event) {
	n := 5
	if ev.Version == 2 {
		n++
	}
	if len(ev.Preimage) > 0 {
		n++
	}
	o.mapHeader(n)
	o.str("imr")
	o.uint(ev.IMR)
	o.str("event_type")
	o.uint(ev.EventType)
	o.str("digest")
	o.bin(ev.Digest)
	o.str("event")
	o.str(ev.Name)
	o.str("event_payload")
	o.bin(ev.Payload)
	if ev.Version == 2 {
		o.str("version")
		o.uint(2)
	}
	if len(ev.Preimage) > 0 {
		o.str("preimage")
		o.bin(ev.Preimage)
	}
}

func (o *out) tpmQuote(q *attest.TPMQuote) error {
	if int(q.Platform) >= len(platforms) {
		return malformed("unknown platform %d", q.Platform)
	}
	o.mapHeader(6)
	o.str("message")
	o.bin(q.Message)
	o.str("signature")
	o.bin(q.Signature)
	o.str("pcr_values")
	o.array(len(q.PCRs))
	for _, p := range q.PCRs {
		o.mapHeader(3)
		o.str("index")
		o.uint(p.Index)
		o.str("algorithm")
		o.str(p.Algorithm)
		o.str("value")
		o.bin(p.Value)
	}
	o.str("ak_cert")
	o.bin(q.AKCert)
	o.str("platform")
	o.str(platforms[q.Platform])
	o.str("event_log")
	o.array(len(q.EventLog))
	for _, p := range q.EventLog {
		o.mapHeader(2)
		o.str("pcr_index")
		o.uint(p.Index)
		o.str("digest")
		o.bin(p.Digest)
	}
	return nil
}
