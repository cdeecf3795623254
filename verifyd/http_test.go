// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
	"github.com/dstack-go/dstack/verifyd/imagecache/imagetest"
)

// serve runs a service on a port of its own and returns its URL. The returned stop
// ends it and returns what Serve did.
func serve(t testing.TB, s *Service) (url string, stop func() error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.ServeListener(ctx, l) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { stop(); http.DefaultClient.CloseIdleConnections() })
	return "http://" + l.Addr().String(), stop
}

func send(t testing.TB, method, url string, body []byte) (int, http.Header, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	check(t, err)
	resp, err := http.DefaultClient.Do(req)
	check(t, err)
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	check(t, err)
	return resp.StatusCode, resp.Header, data
}

func TestHealth(t *testing.T) {
	url, _ := serve(t, setup(t, nil, nil))
	status, _, body := send(t, "GET", url+"/health", nil)
	if status != 200 || strings.TrimSpace(string(body)) != `{"status":"ok","service":"dstack-verifier"}` {
		t.Errorf("%d %s", status, body)
	}
}

// upstreamReply is a client's view that was written from verifier.md §2 alone. It
// knows no other member of details.
type upstreamReply struct {
	IsValid *bool   `json:"is_valid"`
	Reason  *string `json:"reason"`
	Details *struct {
		QuoteVerified       bool     `json:"quote_verified"`
		EventLogVerified    bool     `json:"event_log_verified"`
		OSImageHashVerified bool     `json:"os_image_hash_verified"`
		ACPITablesVerified  bool     `json:"acpi_tables_verified"`
		OSImageIsDev        *bool    `json:"os_image_is_dev"`
		OSImageVersion      *string  `json:"os_image_version"`
		TEEVariant          *string  `json:"tee_variant"`
		ReportData          *string  `json:"report_data"`
		TCBStatus           *string  `json:"tcb_status"`
		AdvisoryIDs         []string `json:"advisory_ids"`
		KeyProvider         *struct {
			Name string `json:"name"`
			ID   string `json:"id"`
		} `json:"key_provider"`
		AppInfo *struct {
			AppID            string   `json:"app_id"`
			ComposeHash      string   `json:"compose_hash"`
			InstanceID       string   `json:"instance_id"`
			DeviceID         string   `json:"device_id"`
			MRSystem         string   `json:"mr_system"`
			MRAggregated     string   `json:"mr_aggregated"`
			OSImageHash      string   `json:"os_image_hash"`
			KeyProviderInfo  string   `json:"key_provider_info"`
			InitScriptHashes []string `json:"init_script_hashes"`
		} `json:"app_info"`
		BootInfo *struct {
			TEEVariant      string   `json:"teeVariant"`
			MRAggregated    string   `json:"mrAggregated"`
			OSImageHash     string   `json:"osImageHash"`
			MRSystem        string   `json:"mrSystem"`
			AppID           string   `json:"appId"`
			ComposeHash     string   `json:"composeHash"`
			InstanceID      string   `json:"instanceId"`
			DeviceID        string   `json:"deviceId"`
			KeyProviderInfo string   `json:"keyProviderInfo"`
			TCBStatus       string   `json:"tcbStatus"`
			AdvisoryIDs     []string `json:"advisoryIds"`
		} `json:"boot_info"`
	} `json:"details"`
	// Ours; upstream's clients ignore them.
	Verdict    json.RawMessage `json:"verdict"`
	Collateral json.RawMessage `json:"collateral"`
}

func TestAClientOfUpstreamUnderstandsEveryReply(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	url, _ := serve(t, setup(t, g.roots(), nil))
	ask := func(body any) (*upstreamReply, map[string]json.RawMessage) {
		t.Helper()
		text, err := json.Marshal(body)
		check(t, err)
		status, header, reply := send(t, "POST", url+"/verify", text)
		if status != 200 || header.Get("Content-Type") != "application/json" {
			t.Fatalf("%d %v %s", status, header, reply)
		}
		d := json.NewDecoder(bytes.NewReader(reply))
		d.DisallowUnknownFields()
		var out upstreamReply
		if err := d.Decode(&out); err != nil {
			t.Fatalf("%v in %s", err, reply)
		}
		if out.IsValid == nil || out.Details == nil || *out.IsValid != (out.Reason == nil) || *out.IsValid != (out.Details.BootInfo != nil) || out.Details.AdvisoryIDs == nil {
			t.Fatalf("%s", reply)
		}
		var raw struct{ Details map[string]json.RawMessage }
		check(t, json.Unmarshal(reply, &raw))
		return &out, raw.Details
	}
	q := g.raw()
	// A GetQuote reply, posted as it is, with members that nobody knows.
	reply, raw := ask(map[string]any{"quote": q.Quote, "event_log": q.EventLog, "vm_config": q.VMConfig, "report_data": q.ReportData, "hash_algorithm": "raw", "prefix": map[string]any{"a": []int{1}}})
	if !*reply.IsValid || reply.Details.BootInfo.AppID != reply.Details.AppInfo.AppID || len(reply.Details.BootInfo.AppID) != 40 || reply.Details.KeyProvider == nil ||
		reply.Details.AppInfo.InitScriptHashes == nil || *reply.Details.ReportData != *q.ReportData {
		t.Errorf("%+v", reply.Details)
	}
	for _, name := range []string{"os_image_is_dev", "os_image_version"} {
		if string(raw[name]) != "null" {
			t.Errorf("%s is %s, upstream has null", name, raw[name])
		}
	}
	for _, name := range []string{"acpi_tables", "rtmr_debug"} {
		if raw[name] != nil {
			t.Errorf("%s is there", name)
		}
	}
	// What is invalid has nulls, and no boot_info.
	reply, raw = ask(map[string]any{})
	if *reply.IsValid || *reply.Reason != "Internal error: Quote is required" || string(raw["app_info"]) != "null" || string(raw["tee_variant"]) != "null" || string(raw["key_provider"]) != "null" {
		t.Errorf("%+v", reply)
	}
	reply, _ = ask(map[string]any{"attestation": nil, "quote": q.Quote})
	if *reply.Reason != "Internal error: Event log is required" {
		t.Errorf("%v", *reply.Reason)
	}
	reply, _ = ask(map[string]any{"attestation": g.attestation().Attestation, "debug": true})
	if !*reply.IsValid {
		t.Errorf("%v", *reply.Reason)
	}
}

func TestBodiesThatAreNoRequestsAreRefused(t *testing.T) {
	s := setup(t, nil, nil)
	url, _ := serve(t, s)
	for _, c := range []struct {
		name, body, code string
		status           int
	}{
		{"nothing", "", "request_malformed", 400},
		{"text", "hello", "request_malformed", 400},
		{"half an object", `{"quote":`, "request_malformed", 400},
		{"two objects", `{}{}`, "request_malformed", 400},
		{"an array", `[]`, "request_member", 422},
		{"null", `null`, "request_member", 422},
		{"a number for a quote", `{"quote":1}`, "request_member", 422},
		{"text for debug", `{"debug":"yes"}`, "request_member", 422},
		{"a member twice", `{"quote":"00","quote":"01"}`, "request_member", 422},
		{"a member twice in another case", `{"quote":"00","QUOTE":"01"}`, "request_member", 422},
		{"broken UTF-8", "{\"quote\":\"\xff\"}", "request_member", 422},
		{"deep nesting", `{"x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`, "request_member", 422},
		{"deeper nesting", `{"x":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`, "request_malformed", 400},
		{"more than 1 MiB", `{"quote":"` + strings.Repeat("0", MaxBody) + `"}`, "request_too_large", 413},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, _, body := send(t, "POST", url+"/verify", []byte(c.body))
			var p problem
			if err := json.Unmarshal(body, &p); err != nil || status != c.status || p.Code != c.code {
				t.Errorf("%d %s, want %d %s", status, body, c.status, c.code)
			}
		})
	}
	if n := s.metrics.tooLarge.Load(); n != 1 {
		t.Errorf("%d bodies were cut off at the limit", n)
	}
	// Exactly 1 MiB is read.
	pad := strings.Repeat(" ", MaxBody-2)
	if status, _, body := send(t, "POST", url+"/verify", []byte("{}"+pad)); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if status, _, _ := send(t, "GET", url+"/verify", nil); status != 405 {
		t.Errorf("GET /verify: %d", status)
	}
	if status, _, _ := send(t, "GET", url+"/nothing", nil); status != 404 {
		t.Errorf("GET /nothing: %d", status)
	}
}

// B15: hostile evidence through the front door ends soon and is not valid.
func TestThreat_B15_HostileBodiesEndSoon(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, g.roots(), nil)
	good := *g.attestation().Attestation
	var bodies []string
	for _, text := range []string{"00", "0000", "8180", "81" + strings.Repeat("81", 10000), "de" + strings.Repeat("ff", 1000), "00" + strings.Repeat("ff", 100000), strings.Repeat("00", 400000), "0000fe" + strings.Repeat("ff", 16)} {
		bodies = append(bodies, fmt.Sprintf(`{"attestation":%q}`, text))
	}
	for i := 0; i < len(good); i += 997 { // cut, and one digit changed
		bodies = append(bodies, fmt.Sprintf(`{"attestation":%q}`, good[:i&^1]), fmt.Sprintf(`{"attestation":%q}`, good[:i]+flip(good[i])+good[i+1:]))
	}
	log := `[` + strings.Repeat(`{"imr":3,"event_type":134217729,"digest":"","event":"x","event_payload":""},`, 9000) + `{"imr":3,"event_type":134217729,"digest":"","event":"x","event_payload":""}]`
	for _, r := range []Request{
		{Quote: ptr("0400"), EventLog: ptr("[]")}, {Quote: ptr(*g.raw().Quote), EventLog: ptr(log), VMConfig: ptr("{}")},
		{Quote: ptr(*g.raw().Quote), EventLog: ptr(strings.Repeat("[", 1000)), VMConfig: ptr(strings.Repeat("{", 1000))},
	} {
		text, err := json.Marshal(map[string]any{"quote": r.Quote, "event_log": r.EventLog, "vm_config": r.VMConfig})
		check(t, err)
		bodies = append(bodies, string(text))
	}
	for _, body := range bodies {
		req, _, err := ParseRequest([]byte(body))
		if err != nil {
			continue
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		out := s.Verify(t.Context(), req)
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("%.80s: %v", body, d)
		}
		// All that was allocated, garbage included: more than twice what is ever live.
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
			t.Errorf("%.80s: %d bytes were allocated", body, n)
		}
		// A changed digit may be in what nothing vouches for, such as the padding of a
		// quote; an accepted verdict there is none.
		if out.Verdict == nil || out.Verdict.Accepted || out.IsValid && !bytes.Equal(out.Details.AppInfo.AppID, g.log[len(g.log)-8].Payload) {
			t.Errorf("%.80s: %s", body, show(out))
		}
	}
}

func flip(b byte) string {
	if b == '0' {
		return "1"
	}
	return "0"
}

func FuzzVerify(f *testing.F) {
	g := newGuest(f, imagetest.New(f, "0.6.0", false), true)
	s := setup(f, g.roots(), func(c *Config, o *Options) { c.ImageDownloadURL = "http://127.0.0.1:1/{OS_IMAGE_HASH}" })
	for _, r := range []*Request{g.attestation(), g.raw()} {
		text, err := json.Marshal(map[string]any{"attestation": r.Attestation, "quote": r.Quote, "event_log": r.EventLog, "vm_config": r.VMConfig, "debug": true})
		check(f, err)
		f.Add(text)
	}
	f.Add([]byte(`{"attestation":"00","at":"2026-01-01T00:00:00Z","policy":{"tcb":{"accept":["UpToDate"]}},"collateral":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, status, err := ParseRequest(data)
		if (err == nil) != (status == 200) {
			t.Fatalf("%d %v", status, err)
		}
		if err != nil {
			return
		}
		out := s.Verify(t.Context(), r)
		if out.IsValid == (out.Reason != nil) || out.IsValid != (out.Details.BootInfo != nil) || out.Verdict == nil {
			t.Fatal(show(out))
		}
		if _, err := json.Marshal(out); err != nil {
			t.Fatal(err)
		}
	})
}

// slow is a source of collateral that answers when the test says so.
type slow struct{ gate chan struct{} }

func (s slow) Collateral(ctx context.Context, _ collateral.Request) (*collateral.Bundle, error) {
	select {
	case <-s.gate:
		return nil, fmt.Errorf("nothing")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// known makes a guest's root count, without its collateral.
func known(t testing.TB, c *Config, g *guest) {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "root.der")
	check(t, os.WriteFile(ca, g.platform.Root.Cert.Raw, 0o600))
	c.Attestation.InsecureAllowExternalTrustAnchors, c.Attestation.RootCA.TDX = true, ca
}

// B15: evidence that leads to no root makes the service ask nobody for anything.
func TestThreat_B15_EvidenceOfNoRootCausesNoRequests(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), false)
	release := g.release
	url, asked := imageServer(t, release)
	for _, counts := range []bool{false, true} {
		source := new(unreachable)
		s := setup(t, nil, func(c *Config, o *Options) {
			c.ImageDownloadURL, o.Collateral = url, source
			if counts {
				known(t, c, g)
			}
		})
		out := s.Verify(t.Context(), g.attestation())
		if out.IsValid || (source.asked.Load() > 0) != counts || asked.Load() != 0 {
			t.Errorf("the root counts: %v; asked %d times for collateral, %d for images%s", counts, source.asked.Load(), asked.Load(), show(out))
		}
	}
}

func TestMoreRequestsThanThereIsRoomForAreTurnedAway(t *testing.T) {
	gate := make(chan struct{})
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, nil, func(c *Config, o *Options) { known(t, c, g); c.MaxConcurrent, o.Collateral = 1, slow{gate} })
	url, _ := serve(t, s)
	body, err := json.Marshal(map[string]any{"attestation": g.attestation().Attestation})
	check(t, err)
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[int]int{}
	for range 12 {
		wg.Go(func() {
			resp, err := http.Post(url+"/verify", "application/json", bytes.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if resp.StatusCode == 503 && resp.Header.Get("Retry-After") == "" {
				t.Error("no Retry-After")
			}
			mu.Lock()
			got[resp.StatusCode]++
			mu.Unlock()
		})
	}
	for s.metrics.busy.Load() < 12-(1+waiting) {
		time.Sleep(time.Millisecond)
	}
	// The service answers what is cheap all the while.
	if status, _, _ := send(t, "GET", url+"/health", nil); status != 200 {
		t.Error("no health")
	}
	close(gate)
	wg.Wait()
	if got[200] != 1+waiting || got[503] != 12-(1+waiting) {
		t.Errorf("%v", got)
	}
}

func TestARequestEndsWithItsTime(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, nil, func(c *Config, o *Options) { known(t, c, g); c.RequestTimeoutSecs, o.Collateral = 1, slow{nil} })
	url, _ := serve(t, s)
	body, err := json.Marshal(map[string]any{"attestation": g.attestation().Attestation})
	check(t, err)
	start := time.Now()
	status, _, reply := send(t, "POST", url+"/verify", body)
	if d := time.Since(start); status != 200 || d > 5*time.Second || !strings.Contains(string(reply), "deadline exceeded") {
		t.Errorf("%v %d %s", d, status, reply)
	}
}

// Requests under way are finished when the service is told to end; slow clients do
// not hold it up for long, and nothing is left behind (goleak).
func TestTheServiceEndsGracefully(t *testing.T) {
	gate := make(chan struct{})
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, nil, func(c *Config, o *Options) { known(t, c, g); o.Collateral = slow{gate} })
	url, stop := serve(t, s)
	body, err := json.Marshal(map[string]any{"attestation": g.attestation().Attestation})
	check(t, err)
	answered := make(chan int, 1)
	go func() {
		resp, err := http.Post(url+"/verify", "application/json", bytes.NewReader(body))
		if err != nil {
			answered <- 0
			return
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		answered <- resp.StatusCode
	}()
	for s.metrics.inFlight.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	ended := make(chan error, 1)
	go func() { ended <- stop() }()
	time.Sleep(20 * time.Millisecond)
	if _, err := net.DialTimeout("tcp", strings.TrimPrefix(url, "http://"), time.Second); err == nil {
		t.Error("it still listens")
	}
	close(gate)
	if status := <-answered; status != 200 {
		t.Errorf("the request under way got %d", status)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A client that sends a byte now and then, or a header without end, takes a
// connection and nothing else.
func TestSlowAndTalkativeClientsHarmNobody(t *testing.T) {
	url, _ := serve(t, setup(t, nil, nil))
	addr := strings.TrimPrefix(url, "http://")
	for range 50 {
		c, err := net.Dial("tcp", addr)
		check(t, err)
		defer c.Close()
		io.WriteString(c, "POST /verify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
	}
	start := time.Now()
	if status, _, _ := send(t, "POST", url+"/verify", []byte("{}")); status != 200 || time.Since(start) > 2*time.Second {
		t.Errorf("%d after %v", status, time.Since(start))
	}
	c, err := net.Dial("tcp", addr)
	check(t, err)
	defer c.Close()
	go io.WriteString(c, "GET /health HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("a", 100<<10)+"\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 431 {
		t.Errorf("a header of 100 KiB: %v %v", resp, err)
	}
	if resp != nil {
		resp.Body.Close()
	}
}

func TestConnectionsAreLimited(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	l := newLimitListener(inner, 2)
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	for range 3 {
		c, err := net.Dial("tcp", l.Addr().String())
		check(t, err)
		defer c.Close()
	}
	one, two := <-accepted, <-accepted
	select {
	case <-accepted:
		t.Error("a third connection was accepted")
	case <-time.After(50 * time.Millisecond):
	}
	one.Close()
	one.Close()
	three := <-accepted
	two.Close()
	three.Close()
	l.Close()
	for range accepted {
	}
}

func TestPagesAreServedFromTheDirectoryAlone(t *testing.T) {
	dir := t.TempDir()
	web := filepath.Join(dir, "web")
	for path, text := range map[string]string{"web/index.html": "<p>page", "web/verify.wasm": "\x00asm", "web/.git/config": "hidden", "web/assets/app.js": "x", "secret": "the text of it"} {
		check(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755))
		check(t, os.WriteFile(filepath.Join(dir, path), []byte(text), 0o644))
	}
	check(t, os.Symlink("../secret", filepath.Join(web, "link")))
	url, _ := serve(t, setup(t, nil, func(c *Config, o *Options) { c.WebDir = web }))
	for path, want := range map[string]int{
		"/": 200, "/index.html": 200, "/verify.wasm": 200, "/assets/app.js": 200, "/assets/": 404, "/.git/config": 404, "/link": 404,
		"/../secret": 404, "/%2e%2e/secret": 404, "/..%2fsecret": 404, "/health": 200, "/nothing": 404,
	} {
		c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		check(t, err)
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		check(t, err)
		body, _ := io.ReadAll(resp.Body)
		c.Close()
		status := resp.StatusCode
		if want == 200 && path == "/index.html" {
			want = 301 // to ./
		}
		if status != want && !(want == 404 && (status == 301 || status == 307 || status == 400 || status >= 500)) || bytes.Contains(body, []byte("the text of it")) || bytes.Contains(body, []byte("hidden")) {
			t.Errorf("%s: %d %s", path, status, body)
		}
		for _, name := range []string{"X-Content-Type-Options", "Content-Security-Policy", "Referrer-Policy", "X-Frame-Options", "Cross-Origin-Opener-Policy"} {
			if resp.Header.Get(name) == "" {
				t.Errorf("%s: no %s", path, name)
			}
		}
	}
	if _, header, _ := send(t, "GET", url+"/verify.wasm", nil); header.Get("Content-Type") != "application/wasm" {
		t.Errorf("the module is %s", header.Get("Content-Type"))
	}
	s := setup(t, nil, func(c *Config, o *Options) { c.WebDir = filepath.Join(dir, "none") })
	if _, err := s.Handler(); fault.Code(err) != "file_missing" {
		t.Errorf("%v", err)
	}
}

func TestMetricsCount(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	url, _ := serve(t, setup(t, g.roots(), nil))
	body, err := json.Marshal(map[string]any{"attestation": g.attestation().Attestation})
	check(t, err)
	send(t, "POST", url+"/verify", body)
	send(t, "POST", url+"/verify", []byte("{}"))
	send(t, "POST", url+"/verify", []byte("rubbish"))
	_, header, text := send(t, "GET", url+"/metrics", nil)
	if !strings.HasPrefix(header.Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Error(header)
	}
	for _, want := range []string{
		`dstack_verifier_verifications_total{valid="true"} 1`, `dstack_verifier_verifications_total{valid="false"} 1`,
		`dstack_verifier_verdicts_total{outcome="refused"} 2`, `dstack_verifier_requests_refused_total{reason="malformed"} 1`, "dstack_verifier_in_flight 0",
	} {
		if !strings.Contains(string(text), want+"\n") {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	// Every line is a comment or a name, labels and a number.
	for line := range strings.Lines(string(text)) {
		var name string
		var n float64
		if !strings.HasPrefix(line, "# ") {
			if c, err := fmt.Sscanf(strings.TrimSpace(line), "%s %g", &name, &n); c != 2 || err != nil {
				t.Errorf("%q", line)
			}
		}
	}
	off, _ := serve(t, setup(t, nil, func(c *Config, o *Options) { c.Metrics = false }))
	if status, _, _ := send(t, "GET", off+"/metrics", nil); status != 404 {
		t.Errorf("metrics that are off: %d", status)
	}
}

// openapi.json describes exactly the members of the structs, with their types.
func TestOpenAPIMatchesTheStructs(t *testing.T) {
	url, _ := serve(t, setup(t, nil, nil))
	_, _, text := send(t, "GET", url+"/openapi.json", nil)
	var doc struct {
		OpenAPI    string
		Paths      map[string]map[string]any
		Components struct {
			Schemas map[string]struct {
				Properties map[string]map[string]any
				Required   []string
			}
		}
	}
	check(t, json.Unmarshal(text, &doc))
	for path, method := range map[string]string{"/health": "get", "/verify": "post", "/metrics": "get", "/openapi.json": "get"} {
		if doc.Paths[path][method] == nil {
			t.Errorf("%s %s is not described", method, path)
		}
	}
	types := func(p map[string]any) []string {
		switch v := p["type"].(type) {
		case string:
			return []string{v}
		case []any:
			var out []string
			for _, x := range v {
				out = append(out, x.(string))
			}
			return out
		}
		return []string{"object"} // $ref, oneOf
	}
	for name, v := range map[string]any{
		"Request": Request{}, "Response": Response{}, "Details": Details{}, "KeyProvider": KeyProvider{}, "AppInfo": AppInfo{}, "BootInfo": BootInfo{},
		"ACPITables": ACPITables{}, "RTMRDebug": RTMRDebug{}, "RTMREvent": RTMREvent{}, "Verdict": verifier.Verdict{}, "Finding": verifier.Finding{},
		"Anchor": verifier.Anchor{}, "Hop": verifier.Hop{}, "Governance": verifier.Governance{}, "Problem": problem{},
	} {
		schema, ok := doc.Components.Schemas[name]
		if !ok {
			t.Errorf("%s is not described", name)
			continue
		}
		seen := map[string]bool{}
		rt := reflect.TypeOf(v)
		for i := range rt.NumField() {
			f := rt.Field(i)
			tag, option, _ := strings.Cut(f.Tag.Get("json"), ",")
			if tag == "-" {
				continue
			}
			seen[tag] = true
			p, ok := schema.Properties[tag]
			if !ok {
				t.Errorf("%s.%s is not described", name, tag)
				continue
			}
			want := kindOf(f.Type)
			if !slices.Contains(types(p), want) {
				t.Errorf("%s.%s is %v, want %s", name, tag, types(p), want)
			}
			if required := slices.Contains(schema.Required, tag); name != "Request" && required == strings.HasPrefix(option, "omit") {
				t.Errorf("%s.%s: required is %v", name, tag, required)
			}
		}
		for tag := range schema.Properties {
			if !seen[tag] {
				t.Errorf("%s.%s is described, and not there", name, tag)
			}
		}
	}
}

func kindOf(t reflect.Type) string {
	if t == reflect.TypeFor[Hex]() || t == reflect.TypeFor[time.Time]() {
		return "string"
	}
	if t == reflect.TypeFor[json.RawMessage]() {
		return "object"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return kindOf(t.Elem())
	case reflect.Bool:
		return "boolean"
	case reflect.Slice:
		return "array"
	case reflect.Int, reflect.Int64, reflect.Uint32, reflect.Uint64:
		return "integer"
	case reflect.Struct:
		return "object"
	}
	return "string"
}

// The log tells outcomes, and nothing of the evidence that could move a terminal.
func TestTheLogHoldsNoRawText(t *testing.T) {
	var buf bytes.Buffer
	s := setup(t, nil, func(c *Config, o *Options) { o.Log = slog.New(slog.NewTextHandler(&buf, nil)) })
	url, _ := serve(t, s)
	send(t, "POST", url+"/verify", []byte(`{"attestation":"`+hex.EncodeToString([]byte("\x1b[2J"))+`"}`))
	if !strings.Contains(buf.String(), "is_valid=false") || strings.ContainsAny(buf.String(), "\x1b") {
		t.Errorf("%q", buf.String())
	}
}

// BenchmarkVerify is POST /verify of a TDX guest, collateral at hand, over loopback.
func BenchmarkVerify(b *testing.B) {
	release := imagetest.New(b, "0.6.0", false)
	imageURL, _ := imageServer(b, release)
	for _, lite := range []bool{true, false} {
		name := "lite"
		if !lite {
			name = "legacy"
		}
		b.Run(name, func(b *testing.B) {
			g := newGuest(b, release, lite)
			s := setup(b, nil, func(c *Config, o *Options) {
				known(b, c, g)
				c.ImageDownloadURL, o.Collateral = imageURL, collateral.Static{Bundle: g.roots().Bundle()}
			})
			url, _ := serve(b, s)
			body, err := json.Marshal(map[string]any{"attestation": g.attestation().Attestation})
			check(b, err)
			b.ReportAllocs()
			for b.Loop() {
				if status, _, reply := send(b, "POST", url+"/verify", body); status != 200 || !bytes.HasPrefix(reply, []byte(`{"is_valid":true`)) {
					b.Fatalf("%d %s", status, reply)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
		})
	}
}
