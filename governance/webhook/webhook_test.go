// SPDX-License-Identifier: Apache-2.0

package webhook

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	private = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	public  = private.Public().(ed25519.PublicKey)
	ctx     = context.Background()
)

func repeat(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// bootInfo0 is that of vectors/kms/webhook.json.
func bootInfo0() governance.BootInfo {
	return governance.BootInfo{
		TEEVariant: "dstack-tdx", MRAggregated: [32]byte(repeat(0x66, 32)), OSImageHash: repeat(0x77, 32), MRSystem: [32]byte(repeat(0x55, 32)),
		AppID: dstack.AppID(repeat(0x11, 20)), ComposeHash: dstack.ComposeHash(repeat(0x22, 32)), InstanceID: repeat(0x33, 20),
		DeviceID: dstack.DeviceID(repeat(0x44, 32)), KeyProviderInfo: []byte(`{"name":"kms","id":"3059"}`), TCBStatus: "UpToDate",
	}
}

func request() governance.Request {
	dev, epoch := false, 3
	return governance.Request{
		Role: governance.App, Purpose: governance.Keys, Boot: bootInfo0(), Trust: dstack.TrustProduction,
		Launch: map[string][]byte{"mrtd": repeat(1, 48), "rtmr0": {}}, ImageBound: true, DevImage: &dev, OSEpoch: &epoch, Session: true,
		At: time.Now().UTC(),
	}
}

// authority is one whose answer tests choose; it remembers what it was asked.
type authority struct {
	mu    sync.Mutex
	asked []governance.Request
	say   governance.Decision
	err   error
}

func (a *authority) Decide(_ context.Context, r governance.Request) (governance.Decision, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked = append(a.asked, r)
	return a.say, a.err
}

func (a *authority) About(context.Context) (governance.About, error) {
	return governance.About{GatewayAppID: "9a", Contract: "0x" + strings.Repeat("ab", 20), ChainID: 5}, a.err
}

func (a *authority) set(d governance.Decision, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.say, a.err = d, err
}

var yes = governance.Decision{
	Allowed: true, By: "policy 7", GatewayAppID: "9a", Lease: 20 * time.Minute, Names: []string{"web.example.org"}, Epoch: 2, OldestEpoch: 1,
}

// serve runs a webhook, and whoever stands before it.
func serve(t *testing.T, h http.Handler) *Authority {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return &Authority{URL: s.URL, Key: public}
}

func TestBootInfoIsUpstreams(t *testing.T) {
	var v struct {
		Request json.RawMessage `json:"bootAuth_request"`
		Info    json.RawMessage `json:"info_response"`
		Allow   json.RawMessage `json:"bootAuth_response_allow"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/webhook.json"), &v); err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if err := json.Compact(&want, v.Request); err != nil {
		t.Fatal(err)
	}
	got, err := bootInfo0().MarshalJSON()
	if err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%s\nwant\n%s (%v)", got, want.Bytes(), err)
	}
	// The body begins with it, byte by byte.
	body, err := newRequest(request())
	if err != nil || !bytes.HasPrefix(body, append(want.Bytes()[:want.Len()-1:want.Len()-1], `,"nonce":"`...)) {
		t.Errorf("%s %v", body, err)
	}
	// What upstream's webhook tells of itself is read, what it decides is not taken.
	a := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.Write(v.Info)
			return
		}
		w.Write(v.Allow)
	}))
	about, err := a.About(ctx)
	if err != nil || about.ChainID != 11155111 || about.Contract != "0xe6c23bfE4686E28DcDA15A1996B1c0C549656E26" || about.Implementation == "" || about.Dev {
		t.Errorf("%+v %v", about, err)
	}
	if got, err := a.Decide(ctx, request()); fault.Code(err) != "webhook_signature" || got.Allowed {
		t.Errorf("an unsigned answer: %+v %v", got, err)
	}
}

func TestTheServerIsAskedWhatTheClientAsks(t *testing.T) {
	behind := &authority{say: yes}
	r := request()
	clock := r.At.Add(5 * time.Second) // the server's is ahead
	a := serve(t, &Handler{Authority: behind, Key: private, Now: func() time.Time { return clock }})
	got, err := a.Decide(ctx, r)
	want := yes
	want.By = "webhook " + keyID(public) + " by policy 7"
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v %v, want %+v", got, err, want)
	}
	asked := behind.asked[0]
	if !asked.At.Equal(clock) {
		t.Errorf("the server decides by its own clock, not at %s", asked.At)
	}
	asked.At = r.At
	r.Boot.AdvisoryIDs = []string{}
	if diff := cmp.Diff(r, asked); diff != "" {
		t.Error(diff)
	}
	// A KMS, and no launch, no names.
	k := request()
	k.Role, k.Purpose, k.Launch, k.DevImage, k.OSEpoch = governance.KMS, governance.Service, nil, nil, nil
	behind.set(governance.Decision{Allowed: true}, nil)
	if got, err = a.Decide(ctx, k); err != nil || !got.Allowed || got.Names != nil || got.Lease != 0 {
		t.Errorf("%+v %v", got, err)
	}
	if r := behind.asked[1]; r.Role != governance.KMS || r.DevImage != nil || r.OSEpoch != nil {
		t.Errorf("%+v", r)
	}
	behind.set(governance.Decision{Allowed: true, Names: []string{}}, nil)
	if got, err = a.Decide(ctx, r); err != nil || got.Names == nil {
		t.Errorf("an empty list of names, which allows none, became none, which allows any: %+v %v", got, err)
	}
	behind.set(governance.Deny("policy 7", "app_unknown", "nobody"), nil)
	if got, err = a.Decide(ctx, r); err != nil || got.Allowed || got.Code != "app_unknown" || got.Reason != "nobody" {
		t.Errorf("%+v %v", got, err)
	}
	behind.set(governance.Decision{}, nil)
	if got, err = a.Decide(ctx, r); err != nil || got.Allowed || got.Code != "webhook_denied" {
		t.Errorf("%+v %v", got, err)
	}
	// An authority that fails denies, and tells nobody why.
	behind.set(yes, fault.New("chain_stale", "secret detail"))
	if got, err = a.Decide(ctx, r); err != nil || got.Allowed || got.Code != "chain_stale" || strings.Contains(got.Reason, "secret") {
		t.Errorf("%+v %v", got, err)
	}
	behind.set(yes, errors.New("secret detail"))
	if got, err = a.Decide(ctx, r); err != nil || got.Allowed || got.Code != "authority_unavailable" {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := a.About(ctx); fault.Code(err) != "webhook_unreachable" {
		t.Error(err)
	}
	behind.set(yes, nil)
	if about, err := a.About(ctx); err != nil || about.GatewayAppID != "9a" || about.ChainID != 5 {
		t.Errorf("%+v %v", about, err)
	}
	late := request()
	late.At = late.At.Add(-time.Hour)
	if got, err = a.Decide(ctx, late); fault.Code(err) != "webhook_expired" || got.Allowed {
		t.Errorf("a request an hour old: %+v %v", got, err)
	}
	wrong := request()
	wrong.Role = governance.KMS
	if _, err := a.Decide(ctx, wrong); fault.Code(err) != "purpose_denied" {
		t.Error(err)
	}
}

// relay passes requests on to h and lets a test change the answers.
func relay(h http.Handler, change func(request, answer []byte) []byte) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		w.Write(change(body, rec.Body.Bytes()))
	})
}

// G04: whoever stands between alters, replays and delays answers.
func TestThreat_G04_ManInTheMiddle(t *testing.T) {
	no := governance.Deny("policy 7", "app_unknown", "nobody")
	edit := func(answer []byte, key string, value any) []byte {
		var m map[string]any
		if err := json.Unmarshal(answer, &m); err != nil {
			t.Error(err)
		}
		if m[key] = value; value == nil {
			delete(m, key)
		}
		out, _ := json.Marshal(m)
		return out
	}
	set := func(key string, value any) func(_, answer []byte) []byte {
		return func(_, answer []byte) []byte { return edit(answer, key, value) }
	}
	earlier := func() func(_, answer []byte) []byte { // the first answer for every request
		var first []byte
		return func(_, answer []byte) []byte {
			if first == nil {
				first = answer
			}
			return first
		}
	}
	other := func(d governance.Decision, at time.Duration) func(body, _ []byte) []byte {
		return func(body, _ []byte) []byte {
			out, err := Sign(private, body, d, time.Now().Add(at))
			if err != nil {
				t.Error(err)
			}
			return out
		}
	}
	for _, c := range []struct {
		what   string
		say    governance.Decision
		change func(body, answer []byte) []byte
		code   string // of the second answer; empty: taken
	}{
		{"passed on", no, func(_, answer []byte) []byte { return answer }, ""},
		{"in another order, with more beside it", no, set("comment", "x"), ""},
		{"isAllowed flipped", no, set("isAllowed", true), "webhook_signature"},
		{"isAllowed flipped and no signature", no, func(_, a []byte) []byte { return edit(edit(a, "isAllowed", true), "signature", nil) }, "webhook_signature"},
		{"an empty signature", no, set("signature", ""), "webhook_signature"},
		{"a signature cut short", yes, set("signature", "AAAA"), "webhook_signature"},
		{"no hash", yes, set("requestHash", nil), "webhook_signature"},
		{"no nonce", yes, set("nonce", nil), "webhook_signature"},
		{"another nonce", yes, set("nonce", strings.Repeat("00", 32)), "webhook_signature"},
		{"another gateway", yes, set("gatewayAppId", "66"), "webhook_signature"},
		{"another reason", no, set("reason", "ask again"), "webhook_signature"},
		{"another code", no, set("code", "x"), "webhook_signature"},
		{"another author", yes, set("by", "x"), "webhook_signature"},
		{"a longer lease", yes, set("leaseSeconds", 3600), "webhook_signature"},
		{"another key epoch", yes, set("keyEpoch", 9), "webhook_signature"},
		{"an older key epoch", yes, set("oldestKeyEpoch", 2), "webhook_signature"},
		{"other names", yes, set("names", []string{"evil.example.org"}), "webhook_signature"},
		{"any name", yes, set("names", nil), "webhook_signature"},
		{"a later end", yes, set("expires", time.Now().Add(time.Hour).UTC().Format(time.RFC3339)), "webhook_signature"},
		{"an answer to another request", yes, earlier(), "webhook_mismatch"},
		{"signed by another key", no, func(body, _ []byte) []byte {
			out, _ := Sign(ed25519.NewKeyFromSeed(repeat(8, 32)), body, yes, time.Now())
			return out
		}, "webhook_signature"},
		{"an expired answer", no, other(yes, -time.Minute), "webhook_expired"},
		{"an answer that counts for too long", no, other(yes, time.Minute), "webhook_expired"},
		{"a fresh answer", no, other(yes, 0), ""},
		{"upstream's malformed answer", yes, func(_, _ []byte) []byte { return []byte(`{"isAllowed":true`) }, "webhook_malformed"},
		{"nothing", yes, func(_, _ []byte) []byte { return nil }, "webhook_malformed"},
		{"isAllowed twice", yes, func(_, a []byte) []byte { return append([]byte(`{"isAllowed":true,`), a[1:]...) }, "webhook_malformed"},
		{"no isAllowed", yes, set("isAllowed", nil), "webhook_malformed"},
		{"no gatewayAppId", yes, set("gatewayAppId", nil), "webhook_malformed"},
		{"no reason", yes, set("reason", nil), "webhook_malformed"},
		{"isAllowed as text", yes, set("isAllowed", "true"), "webhook_malformed"},
		{"a hash of 31 bytes", yes, set("requestHash", strings.Repeat("00", 31)), "webhook_malformed"},
		{"a lease of more than an hour", no, other(governance.Decision{Allowed: true, Lease: 2 * time.Hour}, 0), "webhook_malformed"},
		{"epochs that cannot be", no, other(governance.Decision{Allowed: true, Epoch: 1, OldestEpoch: 2}, 0), "webhook_malformed"},
		{"a code that is none", no, other(governance.Deny("", "App Unknown", ""), 0), "webhook_malformed"},
		{"names that are none", no, other(governance.Decision{Allowed: true, Names: []string{"*"}}, 0), "webhook_malformed"},
		{"a flood", yes, func(_, a []byte) []byte { return append(a, repeat(' ', MaxAnswer)...) }, "webhook_too_large"},
	} {
		a := serve(t, relay(&Handler{Authority: &authority{say: c.say}, Key: private}, c.change))
		a.Decide(ctx, request()) // the one that is replayed
		got, err := a.Decide(ctx, request())
		if fault.Code(err) != c.code || (err != nil) != (c.code != "") || err != nil && (got.Allowed || got.Code != "") {
			t.Errorf("%s: %+v %v, want code %q", c.what, got, err, c.code)
		}
	}
	// An app's request carried to the path of KMSs is no request.
	moved := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = paths[governance.KMS]
		(&Handler{Authority: &authority{say: yes}, Key: private}).ServeHTTP(w, r)
	}))
	if got, err := moved.Decide(ctx, request()); fault.Code(err) != "webhook_unreachable" || got.Allowed {
		t.Errorf("%+v %v", got, err)
	}
	for _, key := range []ed25519.PublicKey{nil, public[:31], make([]byte, 33)} {
		a := serve(t, &Handler{Authority: &authority{say: yes}, Key: private})
		a.Key = key
		if got, err := a.Decide(ctx, request()); fault.Code(err) != "webhook_signature" || got.Allowed {
			t.Errorf("a pinned key of %d bytes: %+v %v", len(key), got, err)
		}
	}
}

// Nothing is kept: a revocation counts for the next request.
func TestTwoEqualRequestsAreTwoQuestions(t *testing.T) {
	behind := &authority{say: yes}
	a := serve(t, &Handler{Authority: behind, Key: private})
	r := request()
	for range 2 {
		if got, err := a.Decide(ctx, r); err != nil || !got.Allowed {
			t.Fatal(got, err)
		}
	}
	if len(behind.asked) != 2 {
		t.Errorf("asked %d times", len(behind.asked))
	}
	behind.set(governance.Deny("", "compose_hash_revoked", "leaks"), nil)
	if got, err := a.Decide(ctx, r); err != nil || got.Allowed || got.Code != "compose_hash_revoked" {
		t.Errorf("%+v %v", got, err)
	}
}

func TestABadAnswerDeniesAndTheNextRequestRecovers(t *testing.T) {
	bad := true
	a := serve(t, relay(&Handler{Authority: &authority{say: yes}, Key: private}, func(_, answer []byte) []byte {
		if bad {
			return []byte(`{"isAllowed":tru`)
		}
		return answer
	}))
	if got, err := a.Decide(ctx, request()); fault.Code(err) != "webhook_malformed" || got.Allowed {
		t.Errorf("%+v %v", got, err)
	}
	bad = false
	if got, err := a.Decide(ctx, request()); err != nil || !got.Allowed {
		t.Errorf("%+v %v", got, err)
	}
}

func TestAWebhookThatDoesNotAnswer(t *testing.T) {
	other := 0
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { other++ }))
	defer elsewhere.Close()
	long := strings.Repeat("ü", 400)
	for _, c := range []struct {
		what string
		h    http.HandlerFunc
	}{
		{"a redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}},
		{"an error", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); io.WriteString(w, "x"+long) }},
		{"an answer with another status", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(201)
			(&Handler{Authority: &authority{say: yes}, Key: private}).ServeHTTP(w, r)
		}},
		{"a connection that breaks", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "{")
		}},
	} {
		a := serve(t, c.h)
		got, err := a.Decide(ctx, request())
		if fault.Code(err) != "webhook_unreachable" || got.Allowed || fault.Fix(err) == "" {
			t.Errorf("%s: %+v %v", c.what, got, err)
		}
		if err != nil && (!utf8.ValidString(err.Error()) || len(err.Error()) > 2*maxReason || strings.Contains(err.Error(), `\x`)) {
			t.Errorf("%s: %q", c.what, err)
		}
	}
	if other != 0 {
		t.Error("a redirect was followed")
	}
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	a := &Authority{URL: closed.URL, Key: public}
	if got, err := a.Decide(ctx, request()); fault.Code(err) != "webhook_unreachable" || got.Allowed {
		t.Errorf("%+v %v", got, err)
	}

	// One that hangs is left after the time; this test's is shorter.
	hang := make(chan struct{})
	slow := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hang:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(func() { close(hang) })
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if got, err := slow.Decide(short, request()); fault.Code(err) != "webhook_unreachable" || got.Allowed {
		t.Errorf("%+v %v", got, err)
	}
}

func TestAddresses(t *testing.T) {
	for url, code := range map[string]string{
		"":                            "webhook_url",
		"http://example.org":          "webhook_url",
		"http://10.0.2.2:8001":        "webhook_url",
		"http://localhost.evil.org":   "webhook_url",
		"ftp://127.0.0.1":             "webhook_url",
		"https://":                    "webhook_url",
		"https://user:pw@example.org": "webhook_url",
		"https://example.org/?a=b":    "webhook_url",
		"https://example.org/#a":      "webhook_url",
		"unix://host/socket":          "webhook_url",
		"unix:socket":                 "webhook_url",
		"http://user:secret@[::1":     "webhook_url",
		"https://127.0.0.1:1/":        "webhook_unreachable",
		"http://127.0.0.1:1":          "webhook_unreachable",
		"http://[::1]:1":              "webhook_unreachable",
		"http://localhost:1":          "webhook_unreachable",
		"unix:///nowhere/socket":      "webhook_unreachable",
	} {
		a := &Authority{URL: url, Key: public}
		got, err := a.Decide(ctx, request())
		if fault.Code(err) != code || got.Allowed || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v, want %s", url, err, code)
		}
	}

	h := &Handler{Authority: &authority{say: yes}, Key: private}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	defer s.Close()
	a := &Authority{URL: "unix://" + socket, Key: public}
	if got, err := a.Decide(ctx, request()); err != nil || !got.Allowed {
		t.Errorf("%+v %v", got, err)
	}

	for _, there := range []net.Addr{&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1)}, &net.TCPAddr{}, &net.UnixAddr{}} {
		if isHere(there) == nil {
			t.Errorf("%v is this machine", there)
		}
	}

	// https by the caller's roots, and not without them; a base with a path.
	secure := httptest.NewTLSServer(http.StripPrefix("/base", h))
	secure.Config.ErrorLog = nil
	defer secure.Close()
	a = &Authority{URL: secure.URL + "/base/", Key: public, HTTP: secure.Client()}
	if got, err := a.Decide(ctx, request()); err != nil || !got.Allowed {
		t.Errorf("%+v %v", got, err)
	}
	if about, err := a.About(ctx); err != nil || about.ChainID != 5 {
		t.Errorf("%+v %v", about, err)
	}
	secure.Client().CloseIdleConnections()
	a.HTTP = nil
	if _, err := a.Decide(ctx, request()); fault.Code(err) != "webhook_unreachable" {
		t.Error(err)
	}
}

func TestWhatAWebhookTellsOfItself(t *testing.T) {
	good := `{"status":"ok","kmsContractAddr":"","gatewayAppId":"","chainId":0,"appImplementation":""}`
	for body, code := range map[string]string{
		good: "",
		strings.Replace(good, `"chainId":0,`, "", 1):                                              "webhook_malformed",
		strings.Replace(good, `"kmsContractAddr":""`, `"kmsContractAddr":"0x12"`, 1):              "webhook_malformed",
		strings.Replace(good, `"appImplementation":""`, `"appImplementation":"`+"\\u001b"+`"`, 1): "webhook_malformed",
		"{":                                   "webhook_malformed",
		good + strings.Repeat(" ", MaxAnswer): "webhook_too_large",
	} {
		a := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }))
		if _, err := a.About(ctx); fault.Code(err) != code {
			t.Errorf("%.80s: %v, want %q", body, err, code)
		}
	}
}

func TestRequestsThatAreNone(t *testing.T) {
	body, err := newRequest(request())
	if err != nil {
		t.Fatal(err)
	}
	h := &Handler{Authority: &authority{say: yes}, Key: private}
	post := func(path string, body []byte) (int, string) {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, path, bytes.NewReader(body)))
		return rec.Code, rec.Body.String()
	}
	if code, out := post(paths[governance.App], body); code != 200 || !strings.Contains(out, `"isAllowed":true`) {
		t.Fatal(code, out)
	}
	app := hex.EncodeToString(repeat(0x11, 20))
	for _, c := range []struct{ what, old, new string }{
		{"an app id of 19 bytes", app, app[:38]},
		{"an app id of 21 bytes", app, app + "00"},
		{"no app id", `"appId":"` + app + `",`, ``},
		{"a compose hash of 31 bytes", strings.Repeat("22", 32), strings.Repeat("22", 31)},
		{"a device id of 31 bytes", strings.Repeat("44", 32), strings.Repeat("44", 31)},
		{"an image hash of 31 bytes", strings.Repeat("77", 32), strings.Repeat("77", 31)},
		{"an instance id of 19 bytes", strings.Repeat("33", 20), strings.Repeat("33", 19)},
		{"an mr of 31 bytes", strings.Repeat("66", 32), strings.Repeat("66", 31)},
		{"no nonce", `"nonce"`, `"other"`},
		{"a nonce of 31 bytes", `"nonce":"`, `"nonce":"0`},
		{"the purpose of a KMS", `"keys"`, `"replication"`},
		{"a key twice", `"purpose"`, `"isAllowed":1,"isallowed":1,"purpose"`},
		{"no time", `"requestedAt":"`, `"requestedAt":"x`},
		{"more behind it", `{"teeVariant"`, `{}{"teeVariant"`},
	} {
		edited := bytes.Replace(body, []byte(c.old), []byte(c.new), 1)
		if bytes.Equal(edited, body) {
			t.Fatalf("%s: %q is not in %s", c.what, c.old, body)
		}
		if _, err := ParseRequest(governance.App, edited); fault.Code(err) != "webhook_malformed" {
			t.Errorf("%s: %v", c.what, err)
		}
		if code, out := post(paths[governance.App], edited); code != 400 || !strings.Contains(out, `"isAllowed":false`) {
			t.Errorf("%s: %d %s", c.what, code, out)
		}
	}
	if code, _ := post(paths[governance.App], repeat(' ', MaxRequest+1)); code != http.StatusRequestEntityTooLarge {
		t.Error(code)
	}
	if code, _ := post("/bootAuth/any", body); code != 404 {
		t.Error(code)
	}
	if _, err := Sign(private, []byte(`{}`), yes, time.Now()); fault.Code(err) != "webhook_malformed" {
		t.Error(err)
	}
	if _, err := Verify(public, body, repeat(' ', MaxAnswer+1), time.Now()); fault.Code(err) != "webhook_too_large" {
		t.Error(err)
	}
	if _, err := Sign(nil, body, yes, time.Now()); fault.Code(err) != "webhook_signature" {
		t.Error(err)
	}
	huge := request()
	huge.Boot.KeyProviderInfo = repeat('x', MaxRequest)
	if _, err := newRequest(huge); fault.Code(err) != "webhook_too_large" {
		t.Error(err)
	}
	other, _ := newRequest(request())
	if bytes.Equal(other, body) {
		t.Error("two requests have one nonce")
	}
}

// The bytes that are signed, written down: another implementation must make the same.
func TestSignedBytes(t *testing.T) {
	allowed, gateway, reason := true, "gw", "r"
	a := answer{
		IsAllowed: &allowed, GatewayAppID: &gateway, Reason: &reason, RequestHash: &hex32{1}, Nonce: &hex32{2}, Expires: "E", Code: "c", By: "b",
		LeaseSeconds: 3, KeyEpoch: 5, OldestKeyEpoch: 4, Names: &[]string{"n", "mm"},
	}
	lp := func(b string) string { return string([]byte{0, 0, 0, byte(len(b))}) + b }
	number := func(n byte) string { return lp("\x00\x00\x00\x00\x00\x00\x00" + string([]byte{n})) }
	zeros := strings.Repeat("\x00", 31)
	want := lp("dstack-webhook-v1") + lp("\x01"+zeros) + lp("\x02"+zeros) + lp("E") + lp("\x01") + lp("gw") + lp("r") + lp("c") + lp("b") +
		number(3) + number(5) + number(4) + lp("\x01"+lp("n")+lp("mm"))
	if got := string(a.message()); got != want {
		t.Errorf("%x\nwant\n%x", got, want)
	}
}

func TestCutFallsBetweenRunes(t *testing.T) {
	for _, c := range []struct {
		in   string
		n    int
		want string
	}{{"abc", 3, "abc"}, {"abcd", 3, "abc"}, {"aüb", 2, "a"}, {"aüb", 3, "aü"}, {"\x80\x80", 1, ""}, {"€€", 5, "€"}, {"", 0, ""}} {
		if got := cut(c.in, c.n); got != c.want {
			t.Errorf("%q to %d: %q", c.in, c.n, got)
		}
	}
	// The reason of a decision too.
	body, _ := newRequest(request())
	data, err := Sign(private, body, governance.Deny("", "x", "a"+strings.Repeat("ü", maxReason)), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Verify(public, body, data, time.Now()); err != nil || !utf8.ValidString(got.Reason) || len(got.Reason) != maxReason-1 {
		t.Errorf("%d %v", len(got.Reason), err)
	}
}

// fixedRequest is the same in every process of a fuzzer.
func fixedRequest(f *testing.F) ([]byte, time.Time) {
	r := request()
	r.At = time.Unix(1_800_000_000, 0)
	body, err := newRequest(r)
	if err != nil {
		f.Fatal(err)
	}
	nonce, err := nonceOf(body)
	if err != nil {
		f.Fatal(err)
	}
	text, _ := nonce.MarshalText()
	return bytes.Replace(body, text, repeat('5', 64), 1), r.At
}

func FuzzAnswer(f *testing.F) {
	body, at := fixedRequest(f)
	good, err := Sign(private, body, yes, at)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"isAllowed":true,"gatewayAppId":"","reason":"","requestHash":"00","names":null}`))
	f.Add([]byte(`{"isAllowed":true,"gatewayAppId":"","reason":""}`))
	want, err := Verify(public, body, good, at)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := Verify(public, body, data, at)
		if err == nil && !reflect.DeepEqual(d, want) {
			t.Fatalf("%s decided %+v", data, d)
		}
		if err != nil && (d.Allowed || fault.Code(err) == "") {
			t.Fatalf("%+v %v", d, err)
		}
	})
}

func FuzzParseRequest(f *testing.F) {
	body, at := fixedRequest(f)
	f.Add(body)
	f.Add([]byte(`{"appId":"11","nonce":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRequest(governance.App, data)
		if err != nil {
			if fault.Code(err) != "webhook_malformed" {
				t.Fatal(err)
			}
			return
		}
		if n := len(r.Boot.OSImageHash); n != 0 && n != 32 || r.Role != governance.App {
			t.Fatalf("%+v", r)
		}
		if _, err := Sign(private, data, yes, at); err != nil {
			t.Fatalf("%s can be asked and not be answered: %v", data, err)
		}
	})
}
