// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"encoding/hex"
	"encoding/json"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// What upstream's agents answer leads to the same workload as the container: a
// quote with its log, a quote merged into an Info reply, a bare quote whose log is
// given apart.
func TestReadEvidenceOfUpstreamsReplies(t *testing.T) {
	g := newGuest(t)
	src := g.evidence()
	ev, err := container.Decode(src.Container)
	g.check(err)
	log, err := eventlog.MarshalJSON(ev.EventLog)
	g.check(err)
	marshal := func(v any) []byte {
		b, err := json.Marshal(v)
		g.check(err)
		return b
	}
	type object = map[string]any
	quote := hex.EncodeToString(ev.Quote)
	info := object{"event_log": json.RawMessage(log), "app_compose": string(g.manifest), "mrtd": "00"}
	for name, text := range map[string][]byte{
		"GetQuote":                          marshal(object{"quote": quote, "event_log": string(log), "report_data": ev.ReportData.String(), "vm_config": ev.Config}),
		"a log that is no string":           marshal(object{"quote": "0x" + quote, "event_log": json.RawMessage(log), "vm_config": ev.Config}),
		"Info with a quote":                 marshal(object{"quote": quote, "vm_config": ev.Config, "app_id": "x", "tcb_info": string(marshal(info))}),
		"Info whose tcb_info is an object":  marshal(object{"quote": quote, "vm_config": ev.Config, "tcb_info": info}),
		"a /verify request":                 marshal(object{"attestation": hex.EncodeToString(src.Container)}),
		"a bundle":                          marshal(object{"evidence": hex.EncodeToString(marshal(src))}),
		"a container":                       src.Container,
		"a container in hex":                []byte(hex.EncodeToString(src.Container)),
		"the reply of our endpoint":         marshal(src),
		"the reply of our endpoint, in hex": []byte(hex.EncodeToString(marshal(src))),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ReadEvidence(text, "")
			if err != nil {
				t.Fatal(err)
			}
			r := g.request()
			r.fresh = Freshness{}
			v := r.appraise(*got)
			if v.Workload == nil || v.Workload.ComposeHash != g.composeHash() || v.Signature != SignatureValid || v.Freshness != FreshNone {
				t.Error(show(v))
			}
			if strings.HasPrefix(name, "Info") && v.Workload.Name != "hello" {
				t.Errorf("the manifest of the Info reply is not used%s", show(v))
			}
		})
	}
	bare, err := ReadEvidence(ev.Quote, "")
	g.check(err)
	r := g.request()
	r.fresh = Freshness{}
	if v := r.appraise(*bare); v.Accepted || !v.Undecided || !v.Has(Error, "event_log_missing") {
		t.Error(show(v))
	}
	events, err := ReadEventLog(log)
	g.check(err)
	g.check(bare.AddEventLog(events))
	if v := r.appraise(*bare); v.Workload == nil || v.Workload.ComposeHash != g.composeHash() {
		t.Error(show(v))
	}
	if err := bare.AddEventLog(events); fault.Code(err) != "event_log_twice" {
		t.Error(err)
	}
}

func TestReadEvidenceNamesWhatIsWrong(t *testing.T) {
	for _, c := range []struct{ name, text, kind, code string }{
		{"nothing", " \n", "", "evidence_malformed"},
		{"prose", "see attached", "", "evidence_unknown"},
		{"a kind that does not exist", "00", "sgx", "tee_unknown"},
		{"a JSON array", "[]", "", "evidence_unknown"},
		{"JSON cut short", `{"quote":`, "", "evidence_malformed"},
		{"a member twice", `{"quote":"00","quote":"01"}`, "", "evidence_malformed"},
		{"a quote that is no hex", `{"quote":"zz"}`, "", "evidence_malformed"},
		{"report data of 63 bytes", `{"quote":"00","report_data":"` + strings.Repeat("00", 63) + `"}`, "", "evidence_malformed"},
		{"a log that is none", `{"quote":"00","event_log":"{}"}`, "", "log_malformed"},
		{"tcb_info that is no JSON", `{"quote":"00","tcb_info":"x"}`, "", "evidence_malformed"},
		{"Info without a quote", `{"tcb_info":"{}"}`, "", "info_without_quote"},
		{"a bundle of nothing", `{"evidence":"zz"}`, "", "evidence_malformed"},
		{"a bundle inside a bundle", `{"evidence":"` + hex.EncodeToString([]byte(`{"evidence":"00"}`)) + `"}`, "", "evidence_malformed"},
		{"a TPM bundle without a signature", `{"message":"00","pcr_values":[]}`, "", "tpm_bundle_malformed"},
		{"a certificate that is none", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "", "evidence_malformed"},
		{"DER that is no certificate", "3082000400", "", "evidence_unknown"},
		{"a quote as a container", strings.Repeat("04", 40), "dstack", "evidence_unknown"},
		{"a short report", "0200", "sev-snp", "evidence_unknown"},
		{"binary for TPM", "00010203040506", "tpm", "evidence_unknown"},
	} {
		if _, err := ReadEvidence([]byte(c.text), c.kind); fault.Code(err) != c.code {
			t.Errorf("%s: %v (code %q), want %q", c.name, err, fault.Code(err), c.code)
		}
	}
	if _, err := ReadEvidence(make([]byte, MaxSource+1), ""); fault.Code(err) != "evidence_too_large" {
		t.Error(err)
	}
}

// B15: evidence that promises much costs little.
func TestThreat_B15_HostileEvidenceIsCheapToRefuse(t *testing.T) {
	deep := strings.Repeat(`{"a":`, 100000) + "1" + strings.Repeat("}", 100000)
	wide := `{"event_log":[` + strings.Repeat("{},", 300000) + `{}],"quote":"00"}`
	var before, after runtime.MemStats
	for name, text := range map[string][]byte{
		"nested JSON": []byte(deep), "many events": []byte(wide), "long hex": []byte(strings.Repeat("0", 8<<20)),
		"a MessagePack map of 2^32": {0xdf, 0xff, 0xff, 0xff, 0xff}, "a SCALE vector of 2^30": {0, 0, 0xfe, 0xff, 0xff, 0xff},
		"CBOR nested": append([]byte{0xd9, 0x01, 0x8f}, []byte(strings.Repeat("\x81", 100000))...),
	} {
		runtime.GC()
		runtime.ReadMemStats(&before)
		start := time.Now()
		src, err := ReadEvidence(text, "")
		if err == nil {
			if v := Appraise(Request{Source: *src, Roots: VendorRoots(), Policy: DefaultPolicy(), At: testTime}); v.Accepted {
				t.Errorf("%s is accepted", name)
			}
		}
		runtime.ReadMemStats(&after)
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("%s took %s", name, d)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 128<<20 {
			t.Errorf("%s allocated %d MiB in all", name, grown>>20)
		}
	}
}

func FuzzReadEvidence(f *testing.F) {
	for _, name := range []string{"tdx/dcap-qvl-tdx_quote_v4.bin", "sev-snp/report.bin", "cca/veraison-cca-good.cbor", "nitro/nsm_attestation.bin", "tdx/tdx-lite-getquote.json"} {
		f.Add(testkit.Vectors(f, "attestation/"+name), "")
	}
	f.Add([]byte(`{"message":"00","pcr_values":[]}`), "tpm")
	f.Add([]byte(`{"evidence":"7b7d"}`), "dstack")
	f.Fuzz(func(t *testing.T, data []byte, kind string) {
		src, err := ReadEvidence(data, kind)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		v := Appraise(Request{Source: *src, Roots: VendorRoots(), Policy: SignaturePolicy(), At: testTime})
		_ = v.String()
		if _, err := json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	})
}
