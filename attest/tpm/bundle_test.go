// SPDX-License-Identifier: Apache-2.0

package tpm_test

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/internal/fault"
)

func TestABundleIsReadAsItWasWritten(t *testing.T) {
	m := booted(t)
	q := m.Quote(challenge, 0, 2, 7, 14)
	raw, err := tpm.MarshalBundle(q)
	if err != nil {
		t.Fatal(err)
	}
	got, err := tpm.ParseBundle(raw)
	if err != nil || !reflect.DeepEqual(got, q) {
		t.Fatalf("bundle = %+v, %v", got, err)
	}
	if _, err := tpm.Verify(m.Input(got)); err != nil {
		t.Errorf("the quote that was read does not verify: %v", err)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(raw, &members); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"message", "signature", "pcr_values", "ak_cert", "platform", "event_log"} {
		if _, ok := members[name]; !ok {
			t.Errorf("no member %s", name)
		}
	}
	if string(members["platform"]) != `"gcp"` || len(members) != 6 {
		t.Errorf("platform %s, %d members", members["platform"], len(members))
	}
}

// inBase64 spells every byte string of a bundle in base64.
func inBase64(q *attest.TPMQuote) string {
	b := base64.StdEncoding.EncodeToString
	var pcrs, events []string
	for _, p := range q.PCRs {
		s, _ := json.Marshal(map[string]any{"index": p.Index, "algorithm": p.Algorithm, "value": b(p.Value)})
		pcrs = append(pcrs, string(s))
	}
	for _, e := range q.EventLog {
		s, _ := json.Marshal(map[string]any{"pcr_index": e.Index, "digest": b(e.Digest)})
		events = append(events, string(s))
	}
	return `{"message":"` + b(q.Message) + `","signature":"` + b(q.Signature) + `","ak_cert":"` + b(q.AKCert) +
		`","platform":"gcp","pcr_values":[` + strings.Join(pcrs, ",") + `],"event_log":[` + strings.Join(events, ",") + `]}`
}

func TestABundleMayBeInBase64(t *testing.T) {
	q := booted(t).Quote(challenge, 0, 2)
	got, err := tpm.ParseBundle([]byte(inBase64(q)))
	if err != nil || !reflect.DeepEqual(got, q) {
		t.Errorf("bundle = %+v, %v", got, err)
	}
}

func TestABundleIsRefused(t *testing.T) {
	q := booted(t).Quote(challenge, 0, 2)
	raw, err := tpm.MarshalBundle(q)
	if err != nil {
		t.Fatal(err)
	}
	good := string(raw)
	sub := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("the bundle has no %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	signature, value := hex.EncodeToString(q.Signature), hex.EncodeToString(q.PCRs[0].Value)
	pcrs := `"pcr_values":[` + strings.Repeat(`{"index":0,"algorithm":"sha256","value":"00"},`, 33)
	events := `"event_log":[` + strings.Repeat(`{"pcr_index":0,"digest":"00"},`, eventlog.MaxEvents+1)
	for _, c := range []struct{ name, in string }{
		{"nothing", ""},
		{"not JSON", "{"},
		{"an array", "[]"},
		{"an empty object", "{}"},
		{"something after it", good + "x"},
		{"an unknown member", sub(`{"message"`, `{"quote":"","message"`)},
		{"a member twice", sub(`{"message"`, `{"Message":"00","message"`)},
		{"another platform", sub(`"gcp"`, `"azure"`)},
		{"a platform by number", sub(`"gcp"`, `1`)},
		{"no message", sub(hex.EncodeToString(q.Message), "")},
		{"no certificate", sub(hex.EncodeToString(q.AKCert), "")},
		{"half a byte", sub(signature, signature[:len(signature)-1])},
		{"base64 beside hexadecimal", sub(value, base64.StdEncoding.EncodeToString(q.PCRs[0].Value))},
		{"hexadecimal beside base64", strings.Replace(inBase64(q), base64.StdEncoding.EncodeToString(q.Signature), signature+"!", 1)},
		{"base64 with bits left over", strings.Replace(inBase64(q), base64.StdEncoding.EncodeToString(q.PCRs[0].Value), "AB==", 1)},
		{"a register number below zero", sub(`"index":0`, `"index":-1`)},
		{"a register number beyond 32 bits", sub(`"index":0`, `"index":4294967296`)},
		{"B15: a message beyond the limit", sub(hex.EncodeToString(q.Message), "ff544347"+strings.Repeat("00", tpm.MaxMessage))},
		{"B15: a signature beyond the limit", sub(signature, strings.Repeat("00", tpm.MaxSignature+1))},
		{"B15: a certificate beyond the limit", sub(hex.EncodeToString(q.AKCert), strings.Repeat("00", 16<<10+1))},
		{"B17: a register of 65 bytes", sub(value, strings.Repeat("00", 65))},
		{"B15: 33 registers", sub(`"pcr_values":[`, pcrs)},
		{"B15: 10001 events", sub(`"event_log":[`, events)},
		{"B15: 1 MiB", good + strings.Repeat(" ", tpm.MaxBundle)},
		{"B15: nesting", strings.Repeat("[", 100000)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if q, err := tpm.ParseBundle([]byte(c.in)); fault.Code(err) != "tpm_bundle_malformed" || q != nil {
				t.Errorf("bundle %v, err = %v (code %q)", q != nil, err, fault.Code(err))
			}
		})
	}
	if _, err := tpm.MarshalBundle(&attest.TPMQuote{Platform: 4}); fault.Code(err) != "tpm_bundle_malformed" {
		t.Errorf("a platform without a name: %v", err)
	}
}

func FuzzParseBundle(f *testing.F) {
	q := booted(f).Quote(challenge, 0, 2)
	raw, err := tpm.MarshalBundle(q)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(inBase64(q)))
	f.Fuzz(func(t *testing.T, data []byte) {
		q, err := tpm.ParseBundle(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		raw, err := tpm.MarshalBundle(q)
		if err != nil {
			t.Fatal(err)
		}
		// What base64 spelled may not begin as a message does; only hexadecimal then
		// reads back.
		if again, err := tpm.ParseBundle(raw); len(q.Message) >= 4 && string(q.Message[:4]) == "\xffTCG" && (err != nil || !reflect.DeepEqual(again, q)) {
			t.Fatalf("written and read again differs: %v", err)
		}
		_, _, _ = tpm.Replay(q)
	})
}
