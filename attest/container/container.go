// SPDX-License-Identifier: Apache-2.0

// Package container reads and writes the envelope in which evidence travels: in
// certificates, in RPC replies and in files.
//
// Two forms exist: V0 in SCALE and V1 in MessagePack; [Decode] tells them apart
// by the first byte. A container is attacker-controlled. Decoding proves nothing;
// it guarantees that sizes, counts and depth stay within limits (threats.md B15),
// that nothing follows the value, and that the two copies of the runtime events
// that a container carries agree, so that what is shown is what is replayed.
// Evidence of a TEE without a runtime register keeps its runtime events in
// Evidence.Unbound (threats.md B19). Specification: attestation.md §7.
package container

import (
	"bytes"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits.
const (
	MaxSize      = 10 << 20 // bytes of a container
	maxConfig    = 1 << 20  // bytes of the configuration text
	maxCerts     = 8
	maxCert      = 64 << 10
	maxPCRs      = 32
	maxPCREvents = eventlog.MaxEvents
	maxDepth     = 8 // nesting of MessagePack values
)

// variant is the SCALE index of a kind of evidence (attestation.md §1).
type variant byte

const (
	variantTDX variant = iota
	variantGCPTDX
	variantNitro
	variantSNP
	variantNitroTPM
	variantCCA // V1 only: upstream has no index for it
)

// kinds are the V1 names of the variants.
var kinds = map[variant]string{
	variantTDX: "tdx", variantGCPTDX: "gcp-tdx", variantNitro: "nitro-enclave",
	variantSNP: "sev-snp", variantNitroTPM: "aws-nitro-tpm", variantCCA: "arm-cca",
}

// platforms are the V1 names of TPMQuote.Platform.
var platforms = []string{"dstack", "gcp", "nitroenclave", "aws-ec2"}

func variantOf(e *attest.Evidence) (variant, error) {
	switch {
	case e.TEE == dstack.TDX && e.TPMQuote == nil:
		return variantTDX, nil
	case e.TEE == dstack.TDX:
		return variantGCPTDX, nil
	case e.TEE == dstack.Nitro:
		return variantNitro, nil
	case e.TEE == dstack.SEVSNP:
		return variantSNP, nil
	case e.TEE == dstack.NitroTPM:
		return variantNitroTPM, nil
	case e.TEE == dstack.CCA:
		return variantCCA, nil
	}
	return 0, fault.New("container_tee", "no container form for evidence of TEE %q", e.TEE)
}

func (v variant) tee() dstack.TEE {
	return map[variant]dstack.TEE{
		variantTDX: dstack.TDX, variantGCPTDX: dstack.TDX, variantNitro: dstack.Nitro,
		variantSNP: dstack.SEVSNP, variantNitroTPM: dstack.NitroTPM, variantCCA: dstack.CCA,
	}[v]
}

// Decode reads a container of either form.
func Decode(data []byte) (*attest.Evidence, error) {
	if len(data) > MaxSize {
		return nil, fault.New("container_too_large", "container of %d bytes exceeds %d", len(data), MaxSize)
	}
	if len(data) == 0 {
		return nil, malformed("it is empty")
	}
	switch b := data[0]; {
	case b == 0:
		return decodeV0(data)
	case b >= 0x80 && b <= 0x8f, b == 0xde, b == 0xdf:
		return decodeV1(data)
	default:
		return nil, fault.New("container_version", "container begins with byte %#02x, which is neither form V0 nor V1", b)
	}
}

// Encode writes V0, as upstream's readers know it, or V1 where V0 cannot hold
// the evidence.
func Encode(e *attest.Evidence) ([]byte, error) {
	if needsV1(e) {
		return EncodeV1(e)
	}
	return EncodeV0(e)
}

func needsV1(e *attest.Evidence) bool {
	if e.ReportDataPayload != nil || e.TEE == dstack.CCA {
		return true
	}
	for _, l := range [][]eventlog.Event{e.EventLog, e.Unbound} {
		for _, ev := range l {
			if ev.Version != 0 {
				return true
			}
		}
	}
	return false
}

// decoded is a container before its two logs are merged.
type decoded struct {
	variant  variant
	evidence attest.Evidence
	log      []eventlog.Event // platform log: boot events and copies of runtime events
	runtime  []eventlog.Event // stack log: runtime events
}

// finish merges the logs. The platform log's copies of runtime events may be
// missing, but where they are they must be the same events in the same order:
// upstream replays the one and shows the other.
func (d *decoded) finish() (*attest.Evidence, error) {
	e := &d.evidence
	e.TEE, e.ReportDataClaimed = d.variant.tee(), true
	switch d.variant {
	case variantTDX, variantGCPTDX, variantCCA:
		copies := eventlog.Runtime(d.log)
		if len(copies) == 0 {
			e.EventLog = append(d.log, d.runtime...)
			break
		}
		same := len(copies) == len(d.runtime)
		for i := 0; same && i < len(copies); i++ {
			a, b := copies[i], d.runtime[i]
			same = a.Name == b.Name && a.Version == b.Version && bytes.Equal(a.Payload, b.Payload)
		}
		if !same {
			return nil, fault.New("container_log_mismatch", "the %d runtime events of the platform's log are not the %d runtime events to be replayed", len(copies), len(d.runtime))
		}
		e.EventLog = d.log
	case variantNitroTPM:
		e.EventLog = d.runtime
	default:
		e.Unbound = d.runtime
	}
	if p := e.ReportDataPayload; p != nil && binding.ReportData(binding.TagAppData, []byte(*p)) != e.ReportData {
		return nil, fault.New("container_payload_mismatch", "report data is not the app-data hash of the payload that the container carries")
	}
	return e, nil
}

// runtimeEvents returns what the stack log of e holds.
func runtimeEvents(e *attest.Evidence, v variant) []eventlog.Event {
	if v == variantNitro || v == variantSNP {
		return e.Unbound
	}
	return eventlog.Runtime(e.EventLog)
}

func malformed(format string, args ...any) *fault.Error {
	return fault.New("container_malformed", "container: "+format, args...)
}

// cut is what both decoders stand on: a bounds-checked cursor that keeps its
// first error and returns zeros after it.
type cut struct {
	data []byte
	off  int
	err  error
}

func (c *cut) fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

// take returns the next n bytes; n may be hostile.
func (c *cut) take(n uint64, what string) []byte {
	if c.err != nil {
		return nil
	}
	if left := uint64(len(c.data) - c.off); n > left {
		c.fail(malformed("%s needs %d bytes at byte %d, %d are left", what, n, c.off, left))
		return nil
	}
	b := c.data[c.off : c.off+int(n) : c.off+int(n)]
	c.off += int(n)
	return b
}

func (c *cut) u8(what string) byte {
	if b := c.take(1, what); b != nil {
		return b[0]
	}
	return 0
}

// within reports whether a hostile count or length is acceptable.
func (c *cut) within(n, max uint64, what string) bool {
	if c.err == nil && n > max {
		c.fail(fault.New("container_too_large", "%s of %d at byte %d of the container exceeds %d", what, n, c.off, max))
	}
	return c.err == nil
}

func (c *cut) end() error {
	if c.err == nil && c.off != len(c.data) {
		c.fail(malformed("%d bytes follow its end at byte %d", len(c.data)-c.off, c.off))
	}
	return c.err
}
