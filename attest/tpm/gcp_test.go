// SPDX-License-Identifier: Apache-2.0

package tpm_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"testing"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/attest/tpm/tpmtest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

var tdxQuote = []byte("the bytes of a TDX quote")

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// gcpVM returns a machine that booted with the firmware log of a real Google Cloud VM,
// in a quote for the TDX quote.
func gcpVM(t testing.TB) (*machine, *attest.TPMQuote) {
	log, err := eventlog.ParseTPMLog(testkit.Vectors(t, "attestation/gcp/tpm_eventlog.bin"))
	if err != nil {
		t.Fatal(err)
	}
	events, err := tpm.Events(log, eventlog.BankSHA256, tpm.GCPFirmwarePCR, tpm.GCPImagePCR, tpm.GCPRuntimePCR)
	if err != nil {
		t.Fatal(err)
	}
	m := tpmtest.New(t)
	for _, e := range events {
		m.Extend(e.Index, e.Digest)
	}
	m.Measure(tpm.GCPRuntimePCR, "a runtime event")
	sum := sha256.Sum256(tdxQuote)
	return m, m.Quote(sum[:], tpm.GCPFirmwarePCR, tpm.GCPImagePCR, tpm.GCPRuntimePCR)
}

// gcpReference accepts that log (measurement.md §8).
func gcpReference(t testing.TB) tpm.GCPReference {
	return tpm.GCPReference{
		Firmware: [][]byte{make([]byte, 32), unhex(t, tpm.GCPFirmwareV2)},
		GPT:      [][]byte{unhex(t, "00b8a357e652623798d1bbd16c375ec90fbed802b4269affa3e78e6eb19386cf")},
		UKI:      [32]byte(unhex(t, "9ab14a46f858662a89adc102d2a57a13f52f75c1769d65a4c34edbbfc8855f0f")),
	}
}

func TestARealGoogleCloudBootIsAccepted(t *testing.T) {
	m, q := gcpVM(t)
	c, err := tpm.Verify(m.Input(q))
	if err != nil {
		t.Fatal(err)
	}
	if explained, unexplained, err := tpm.Replay(q); err != nil || !slices.Equal(explained, []uint32{0, 2, 14}) || unexplained != nil {
		t.Errorf("explained %d, unexplained %d, %v", explained, unexplained, err)
	}
	if err := tpm.CheckGCP(c, tdxQuote); err != nil {
		t.Error(err)
	}
	want := gcpReference(t)
	if err := tpm.CheckGCPImage(c, q.EventLog, want); err != nil {
		t.Error(err)
	}
	want.GPT, want.AnyGPT = nil, true
	if err := tpm.CheckGCPImage(c, q.EventLog, want); err != nil {
		t.Errorf("any partition table: %v", err)
	}
}

func TestATPMQuoteForAnotherTDXQuoteIsRefused(t *testing.T) {
	m, q := gcpVM(t)
	c, err := tpm.Verify(m.Input(q))
	if err != nil {
		t.Fatal(err)
	}
	for name, quote := range map[string][]byte{"another": []byte("another"), "none": nil, "padded": append(bytes.Clone(tdxQuote), 0)} {
		if err := tpm.CheckGCP(c, quote); fault.Code(err) != "gcp_quote_binding" {
			t.Errorf("%s quote: %v", name, err)
		}
	}
	c.ReportData = nil
	if err := tpm.CheckGCP(c, nil); fault.Code(err) != "gcp_quote_binding" {
		t.Errorf("no qualifying data for no quote: %v", err)
	}
	for _, c := range []*attest.Claims{nil, {}} {
		if err := tpm.CheckGCP(c, tdxQuote); fault.Code(err) != "tpm_missing" {
			t.Errorf("no claims: %v", err)
		}
		if err := tpm.CheckGCPImage(c, nil, gcpReference(t)); fault.Code(err) != "tpm_missing" {
			t.Errorf("no claims: %v", err)
		}
	}
}

func TestAnotherBootIsRefusedForItsOwnReason(t *testing.T) {
	for _, c := range []struct {
		name, code string
		boot       func(m *machine)       // what the VM does differently
		quote      []uint32               // what it quotes
		claims     func(c *attest.Claims) // after verification
		log        func([]attest.PCREvent) []attest.PCREvent
		want       func(w *tpm.GCPReference)
	}{
		{name: "a reference that accepts nothing", code: "gcp_firmware_unspecified", want: func(w *tpm.GCPReference) { *w = tpm.GCPReference{} }},
		{name: "a reference without firmware", code: "gcp_firmware_unspecified", want: func(w *tpm.GCPReference) { w.Firmware = nil }},
		{name: "a reference without a partition table", code: "gcp_gpt_unspecified", want: func(w *tpm.GCPReference) { w.GPT = nil }},
		{name: "another firmware", code: "gcp_firmware", boot: func(m *machine) { m.Measure(0, "more") }},
		{name: "a firmware cut to 31 bytes", code: "gcp_firmware", want: func(w *tpm.GCPReference) { w.Firmware[1] = w.Firmware[1][:31] }},
		{name: "another image", code: "gcp_uki", want: func(w *tpm.GCPReference) { w.UKI[0] ^= 1 }},
		{name: "another partition table", code: "gcp_gpt", want: func(w *tpm.GCPReference) { w.GPT[0][0] ^= 1 }},
		{name: "an event before the separator", code: "gcp_separator", boot: func(m *machine) {
			events := slices.Clone(m.Events)
			m.PCRs, m.Events = [24][]byte{}, nil
			m.Measure(2, "option ROM")
			for _, e := range events {
				m.Extend(e.Index, e.Digest)
			}
		}},
		{name: "too few events", code: "gcp_log", boot: func(m *machine) {
			m.PCRs[2] = nil
			m.Events = slices.DeleteFunc(m.Events, func(e attest.PCREvent) bool { return e.Index == 2 })
			m.Measure(2, "\x00\x00\x00\x00")
		}},
		{name: "a partition table and no image", code: "gcp_log", boot: func(m *machine) {
			m.PCRs[2] = nil
			events := slices.Clone(m.Events)
			m.Events = slices.DeleteFunc(m.Events, func(e attest.PCREvent) bool { return e.Index == 2 })
			for n := 0; len(events) > 0; events = events[1:] {
				if events[0].Index == 2 && n < 2 {
					m.Extend(2, events[0].Digest)
					n++
				}
			}
		}},
		{name: "a log without its last event", code: "gcp_log", log: func(l []attest.PCREvent) []attest.PCREvent {
			return slices.Delete(l, len(l)-2, len(l)-1)
		}},
		{name: "no log", code: "gcp_log", log: func([]attest.PCREvent) []attest.PCREvent { return nil }},
		{name: "a digest of 33 bytes", code: "gcp_log", log: func(l []attest.PCREvent) []attest.PCREvent {
			return append(l, attest.PCREvent{Index: 2, Digest: make([]byte, 33)})
		}},
		{name: "10001 events", code: "gcp_log", log: func(l []attest.PCREvent) []attest.PCREvent {
			return slices.Repeat([]attest.PCREvent{{Index: 2, Digest: make([]byte, 32)}}, eventlog.MaxEvents+1)
		}},
		{name: "a quote without PCR 14", code: "gcp_registers", quote: []uint32{0, 2}},
		{name: "a quote without PCR 0", code: "gcp_registers", quote: []uint32{2, 14}},
		{name: "registers of another bank", code: "gcp_registers", claims: func(c *attest.Claims) { c.TPM.PCRs[0].Algorithm = "sha384" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, _ := gcpVM(t)
			if c.boot != nil {
				c.boot(m)
			}
			if c.quote == nil {
				c.quote = []uint32{0, 2, 14}
			}
			q := m.Quote(nil, c.quote...)
			claims, err := tpm.Verify(m.Input(q))
			if err != nil {
				t.Fatal(err)
			}
			if c.claims != nil {
				c.claims(claims)
			}
			if c.log != nil {
				q.EventLog = c.log(q.EventLog)
			}
			want := gcpReference(t)
			if c.want != nil {
				c.want(&want)
			}
			if err := tpm.CheckGCPImage(claims, q.EventLog, want); fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}

// TestALoaderInThePlaceOfThePartitionTable shows why a reference names it: digests
// alone do not tell a loader that was measured before the genuine image from the
// partition table that stands there otherwise.
func TestALoaderInThePlaceOfThePartitionTable(t *testing.T) {
	m, q := gcpVM(t)
	genuine := slices.Clone(q.EventLog)
	m.PCRs, m.Events = [24][]byte{}, nil
	n := 0
	for _, e := range genuine {
		if e.Index == 2 {
			if n++; n == 2 {
				e.Digest = bytes.Repeat([]byte{0xee}, 32) // Authenticode of an attacker's loader
			}
		}
		m.Extend(e.Index, e.Digest)
	}
	q = m.Quote(nil, 0, 2, 14)
	c, err := tpm.Verify(m.Input(q))
	if err != nil {
		t.Fatal(err)
	}
	want := gcpReference(t)
	if err := tpm.CheckGCPImage(c, q.EventLog, want); fault.Code(err) != "gcp_gpt" {
		t.Errorf("a named partition table: %v", err)
	}
	want.AnyGPT = true
	if err := tpm.CheckGCPImage(c, q.EventLog, want); err != nil {
		t.Errorf("the comment on AnyGPT is wrong: %v", err)
	}
}

func TestEventsAreOfOneBankAndTheRegistersAskedFor(t *testing.T) {
	log, err := eventlog.ParseTPMLog(testkit.Vectors(t, "attestation/gcp/tpm_eventlog.bin"))
	if err != nil {
		t.Fatal(err)
	}
	events, err := tpm.Events(log, eventlog.BankSHA384, 2)
	if err != nil || len(events) != 4 || len(events[0].Digest) != 48 || events[3].Index != 2 {
		t.Errorf("events = %x, %v", events, err)
	}
	if _, err := tpm.Events(log, "sha512", 2); fault.Code(err) != "log_bank" {
		t.Errorf("a bank that the log does not have: %v", err)
	}
}
