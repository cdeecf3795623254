// SPDX-License-Identifier: Apache-2.0

package webhook

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// Requests and answers of upstream, as the vectors have them.
func TestNodesOfUpstreamAreAnsweredInTheirForm(t *testing.T) {
	var v struct {
		Request   json.RawMessage `json:"bootAuth_request"`
		Allow     map[string]any  `json:"bootAuth_response_allow"`
		Deny      map[string]any  `json:"bootAuth_response_deny"`
		Malformed map[string]any  `json:"bootAuth_response_malformed_400"`
		Info      map[string]any  `json:"info_response"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/webhook.json"), &v); err != nil {
		t.Fatal(err)
	}
	behind := &authority{}
	h := &Handler{Authority: behind, Upstream: &Upstream{Trust: dstack.TrustProduction, ImageBound: true}, RPC: "https://user:pw@RPC.example/v2/secret"}
	post := func(role governance.Role, body []byte) (int, map[string]any) {
		t.Helper()
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, paths[role], bytes.NewReader(body)))
		var out map[string]any
		if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil || rec.Header().Get("Content-Type") != "application/json" {
			t.Fatalf("%v: %s", err, rec.Body)
		}
		return rec.Code, out
	}
	behind.set(governance.Decision{Allowed: true, GatewayAppID: v.Allow["gatewayAppId"].(string)}, nil)
	if code, out := post(governance.App, v.Request); code != 200 || !reflect.DeepEqual(out, v.Allow) {
		t.Errorf("%d %v, want %v", code, out, v.Allow)
	}
	want := governance.Request{Role: governance.App, Purpose: governance.Keys, Trust: dstack.TrustProduction, ImageBound: true, Boot: bootInfo0()}
	got := behind.asked[0]
	if want.At = got.At; got.At.IsZero() {
		t.Error("no time")
	}
	want.Boot.AdvisoryIDs = []string{}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("asked %+v\nwant  %+v", got, want)
	}
	post(governance.KMS, v.Request)
	if got := behind.asked[1]; got.Role != governance.KMS || got.Purpose != governance.Replication {
		t.Errorf("%+v", got)
	}
	behind.set(governance.Deny("", "app_not_registered", v.Deny["reason"].(string)), nil)
	if code, out := post(governance.App, v.Request); code != 200 || !reflect.DeepEqual(out, v.Deny) {
		t.Errorf("%d %v, want %v", code, out, v.Deny)
	}
	behind.set(governance.Decision{Allowed: true}, errors.New("the chain is away"))
	if code, out := post(governance.App, v.Request); code != 200 || out["isAllowed"] != false || out["reason"] != "authorization backend unavailable" {
		t.Errorf("%d %v", code, out)
	}
	asked := len(behind.asked)
	for name, edit := range map[string][2]string{
		"no app id":             {`"appId"`, `"app"`},
		"no MR":                 {`"mrAggregated"`, `"mr"`},
		"no image":              {`"osImageHash"`, `"image"`},
		"no manifest":           {`"composeHash"`, `"hash"`},
		"no instance":           {`"instanceId"`, `"instance"`},
		"no device":             {`"deviceId"`, `"device"`},
		"too many bytes":        {`"appId": "`, `"appId": "00`},
		"a device of 64 bytes":  {`"deviceId": "`, `"deviceId": "` + strings.Repeat("00", 32)},
		"half a byte":           {`"appId": "1`, `"appId": "`},
		"no hexadecimal":        {`"appId": "1`, `"appId": "x`},
		"another type":          {`"tcbStatus": "UpToDate"`, `"tcbStatus": 1`},
		"a long status":         {`"UpToDate"`, `"` + strings.Repeat("a", 129) + `"`},
		"many advisories":       {`"advisoryIds": []`, `"advisoryIds": [` + strings.Repeat(`"a",`, 128) + `"a"]`},
		"a long advisory":       {`"advisoryIds": []`, `"advisoryIds": ["` + strings.Repeat("a", 257) + `"]`},
		"the same member twice": {`"tcbStatus"`, `"tcbStatus":"UpToDate","tcbStatus"`},
		"no JSON":               {`{`, ``},
	} {
		body := bytes.Replace(v.Request, []byte(edit[0]), []byte(edit[1]), 1)
		if bytes.Equal(body, v.Request) {
			t.Fatalf("%s: %s is not in the vector", name, edit[0])
		}
		if code, out := post(governance.App, body); code != 400 || !reflect.DeepEqual(out, v.Malformed) {
			t.Errorf("%s: %d %v", name, code, out)
		}
	}
	if len(behind.asked) != asked {
		t.Error("somebody decided about a malformed request")
	}
	// What is shorter is filled up, 0x is optional, and what is optional may be absent.
	r, err := h.Upstream.ParseUpstream(governance.App, []byte(`{"mrAggregated":"0x","osImageHash":"","appId":"0x0102","composeHash":"AB","instanceId":"","deviceId":"01"}`))
	if err != nil || r.Boot.AppID != (dstack.AppID{18: 1, 19: 2}) || r.Boot.ComposeHash[31] != 0xab || r.Boot.OSImageHash != nil || r.Boot.InstanceID != nil || r.Boot.DeviceID[31] != 1 {
		t.Errorf("%+v %v", r, err)
	}

	rec := httptest.NewRecorder()
	behind.set(governance.Decision{}, nil)
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/", nil))
	var told map[string]any
	if err := json.Unmarshal(rec.Body.Bytes(), &told); err != nil {
		t.Fatal(err)
	}
	for name := range v.Info {
		if _, ok := told[name]; !ok {
			t.Errorf("GET / does not tell %s", name)
		}
	}
	if told["ethRpcUrl"] != "https://RPC.example" || strings.Contains(rec.Body.String(), "secret") || strings.Contains(rec.Body.String(), "pw") {
		t.Errorf("%s", rec.Body)
	}
	if got := ReducedURL("::"); got != "configured" {
		t.Error(got)
	}
	// Without Upstream nobody is answered unsigned.
	h.Upstream = nil
	if code, _ := post(governance.App, v.Request); code != 400 {
		t.Error(code)
	}
}

// Threat G04: what a node of ours asks is signed; who takes the nonce away on the way gets
// an answer that the node refuses.
func TestThreat_G04_ANonceTakenAwayGivesNothing(t *testing.T) {
	h := &Handler{Authority: &authority{say: yes}, Key: private, Upstream: &Upstream{Trust: dstack.TrustProduction}}
	if d, err := serve(t, h).Decide(ctx, request()); err != nil || !d.Allowed {
		t.Fatal(d, err)
	}
	stripped := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		b.ReadFrom(r.Body)
		again := httptest.NewRequest(r.Method, r.URL.Path, bytes.NewReader(bytes.Replace(b.Bytes(), []byte(`"nonce"`), []byte(`"notce"`), 1)))
		h.ServeHTTP(w, again)
	})
	if d, err := serve(t, stripped).Decide(ctx, request()); fault.Code(err) != "webhook_signature" || d.Allowed {
		t.Errorf("%+v %v", d, err)
	}
}

func FuzzParseUpstream(f *testing.F) {
	f.Add([]byte(`{"mrAggregated":"0x","osImageHash":"","appId":"0x0102","composeHash":"AB","instanceId":"","deviceId":"01"}`))
	f.Add([]byte(`{"mrAggregated":null,"advisoryIds":["a"]}`))
	u := &Upstream{Trust: dstack.TrustProduction}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, role := range []governance.Role{governance.App, governance.KMS} {
			r, err := u.ParseUpstream(role, data)
			if err != nil {
				if fault.Code(err) != "webhook_malformed" {
					t.Fatal(err)
				}
				continue
			}
			if n := len(r.Boot.OSImageHash); n != 0 && n != 32 || !role.MayAsk(r.Purpose) || len(r.Boot.AdvisoryIDs) > maxAdvisories {
				t.Fatalf("%+v", r)
			}
		}
	})
}
