// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/bcrypt"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/gateway/settings/settingstest"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/admintoken"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	token  = "0123456789abcdef0123456789abcdef"
	canary = "canary-cloudflare-token-0123456789"
)

// world is a gateway's administration without a gateway.
type world struct {
	t     *testing.T
	store *settingstest.Memory
	table *route.Table
	log   *buffer
	cfg   Config
	url   string
}

type buffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *buffer) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.String()
}

func newWorld(t *testing.T, edit ...func(*Config)) *world {
	t.Helper()
	w := &world{t: t, store: new(settingstest.Memory), log: new(buffer)}
	own := wgconfig.GeneratePrivateKey().Public()
	w.table = route.New(route.Config{Key: own, Address: netip.MustParseAddr("100.96.0.1"), Network: netip.MustParsePrefix("100.96.0.0/11")})
	hash, err := bcrypt.GenerateFromPassword([]byte("a good password"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(file, []byte("alice:"+string(hash)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	guard, err := admintoken.New(admintoken.Config{Realm: "dstack-gateway admin", Token: config.NewSecret(token), Htpasswd: file, Query: true, Delay: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	node := gateway.Node{ID: 1, UUID: [16]byte{1}, URL: "https://one.example:8000", Key: own, Address: netip.MustParsePrefix("100.96.0.1/11"), Endpoint: "one.example:51820"}
	peer := node
	peer.ID, peer.URL = 2, "https://two.example:8000"
	w.cfg = Config{
		Store: w.store, Routes: w.table, Guard: guard, Node: func() gateway.Node { return node }, Peers: func() []gateway.Node { return []gateway.Node{peer} },
		Fixed: []gateway.Domain{{Name: "fixed.example", Port: 443}}, Trust: "development", Tunnel: "netstack", Version: "v0 (test)",
		CheckDNS: func(p string, params map[string]string) error { _, err := acme.NewCredential(p, params); return err },
		Log:      slog.New(slog.NewTextHandler(w.log, nil)),
	}
	for _, e := range edit {
		e(&w.cfg)
	}
	s, err := New(w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(s.Handler())
	t.Cleanup(func() {
		server.Close()
		http.DefaultClient.CloseIdleConnections()
	})
	w.url = server.URL
	return w
}

// instance registers instance n of app a.
func (w *world) instance(a, n byte, ports ...manifest.Port) dstack.InstanceID {
	w.t.Helper()
	p := portpolicy.Open()
	if ports != nil {
		var err error
		if p, err = portpolicy.New(manifest.PortPolicy{RestrictMode: true, Ports: ports}); err != nil {
			w.t.Fatal(err)
		}
	}
	now := time.Now()
	id := dstack.InstanceID{0xb, n}
	if _, err := w.table.Register(route.Record{
		App: dstack.AppID{0xa, a}, Instance: id, Compose: dstack.ComposeHash{1}, Key: wgconfig.GeneratePrivateKey().Public(),
		Address: netip.AddrFrom4([4]byte{100, 97, 0, n}), Policy: &p, Attested: now, Until: now.Add(10 * time.Minute),
	}); err != nil {
		w.t.Fatal(err)
	}
	return id
}

func (w *world) do(method, path, body string, header ...string) (int, string) {
	w.t.Helper()
	r, err := http.NewRequest(method, w.url+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// call makes a call as upstream's scripts do, and returns the answer, or the code of the
// refusal.
func (w *world) call(method, body string) (doc map[string]any, code string) {
	w.t.Helper()
	if body == "" {
		body = "{}"
	}
	status, text := w.do("POST", "/prpc/Admin."+method, body, "Authorization", "Bearer "+token)
	if text == "null" {
		return nil, ""
	}
	if err := json.Unmarshal([]byte(text), &doc); err != nil {
		w.t.Fatalf("%s: %d %q", method, status, text)
	}
	if status != 200 {
		code, _ := doc["code"].(string)
		return doc, code
	}
	return doc, ""
}

// ok is call where a refusal is a failure.
func (w *world) ok(method, body string) map[string]any {
	w.t.Helper()
	doc, code := w.call(method, body)
	if code != "" || doc["error"] != nil {
		w.t.Fatalf("%s %s: %v", method, body, doc)
	}
	return doc
}

func (w *world) refused(method, body, code string) {
	w.t.Helper()
	if doc, got := w.call(method, body); got != code {
		w.t.Errorf("%s %s: %q %v, want %q", method, body, got, doc, code)
	}
}

func TestThreat_G11_EveryPathOfTheGatewaysAdministratorsAsks(t *testing.T) {
	w := newWorld(t, func(c *Config) {
		c.Pages = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "page") })
	})
	for _, path := range []string{"/", "/metrics", "/prpc/Status", "/prpc/Admin.Status", "/Status", "/prpc/Nothing", "/health"} {
		for _, method := range []string{"GET", "POST"} {
			if status, text := w.do(method, path, ""); status != 401 {
				t.Errorf("%s %s: %d %q", method, path, status, text)
			}
		}
	}
	for _, path := range []string{"/prpc/Status", "/prpc/Admin.Status", "/Status", "/Admin.Status", "/prpc/Status?token=" + token} {
		var header []string
		if !strings.Contains(path, "token") {
			header = []string{"Authorization", "Bearer " + token}
		}
		if status, text := w.do("GET", path, "", header...); status != 200 || !strings.Contains(text, `"trust":"development"`) {
			t.Errorf("%s: %d %q", path, status, text)
		}
	}
	if status, text := w.do("GET", "/", "", "X-Admin-Token", token); status != 200 || text != "page" {
		t.Errorf("the page: %d %q", status, text)
	}
}

// A link or a form of another site has what the browser remembers, and changes nothing.
func TestOtherSitesChangeNothing(t *testing.T) {
	w := newWorld(t)
	basic := func(method, path, body string, header ...string) int {
		r, err := http.NewRequest(method, w.url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.SetBasicAuth("alice", "a good password")
		r.Header.Set("Content-Type", "application/json")
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if got := basic("GET", "/prpc/SetNodeStatus?id=1&status=down", ""); got != 405 {
		t.Errorf("a link: %d", got)
	}
	if got := basic("POST", "/prpc/SetNodeStatus", `{"id":1,"status":"down"}`, "Origin", "https://evil.example"); got != 403 {
		t.Errorf("a form: %d", got)
	}
	if got := basic("POST", "/prpc/SetNodeStatus", `{"id":1,"status":"down"}`, "Sec-Fetch-Site", "cross-site"); got != 403 {
		t.Errorf("a script: %d", got)
	}
	if all, _ := settings.Load(t.Context(), w.store); len(all.Down) != 0 {
		t.Errorf("%v", all.Down)
	}
	if got := basic("POST", "/prpc/SetNodeStatus", `{"id":1,"status":"down"}`, "Sec-Fetch-Site", "same-origin"); got != 200 {
		t.Errorf("our own page: %d", got)
	}
	if got := basic("GET", "/prpc/Status", ""); got != 200 {
		t.Errorf("a look: %d", got)
	}
	// Programs that show a token may GET, as upstream's documentation does.
	if status, text := w.do("GET", "/prpc/SetNodeStatus?id=1&status=up&token="+token, ""); status != 200 {
		t.Errorf("%d %q", status, text)
	}
}

func TestWhatIsNotConfiguredSaysSo(t *testing.T) {
	w := newWorld(t)
	for method, body := range map[string]string{
		"Exit": "{}", "RenewCert": "", "ReloadCert": "", "SetCaa": "", "RotateAcmeCredentials": "", "RenewZtDomainCert": `{"domain":"fixed.example"}`,
		"ForceReleaseCertLock": `{"domain":"fixed.example"}`, "ListCertAttestations": `{"domain":"fixed.example"}`, "SetCertbotConfig": `{"renew_interval_secs":60}`,
		"Drain": `{"on":true}`, "CtStatus": "", "CtAcknowledge": `{"log":"x","index":1}`, "ListMembers": "", "InviteMember": "", "JoinCluster": `{"url":"x.example:1","token":"t"}`, "RemoveMember": `{"id":"x"}`,
	} {
		doc, code := w.call(method, body)
		if fix, _ := doc["fix"].(string); code != "admin_unavailable" || fix == "" {
			t.Errorf("%s: %q %v", method, code, doc)
		}
	}
}

func TestCredentialsOfDNS(t *testing.T) {
	w := newWorld(t)
	made := w.ok("CreateDnsCredential", `{"name":"main","provider_type":"cloudflare","cf_api_token":"`+canary+`","cf_zone_id":"ignored","set_as_default":true}`)
	id := made["id"].(string)
	if made["cf_api_token"] != "cana...6789" || made["dns_txt_ttl"] != 60.0 || made["max_dns_wait"] != 300.0 || made["created_at"].(float64) == 0 {
		t.Errorf("%v", made)
	}
	second := w.ok("CreateDnsCredential", `{"name":"zone","provider_type":"rfc2136","dns_txt_ttl":30,"max_dns_wait":60,"settings":{"server":"192.0.2.1:53","key_name":"k.","key_alg":"hmac-sha256","key":"`+canary+`"}}`)
	if second["cf_api_token"] != "" || second["dns_txt_ttl"] != 30.0 {
		t.Errorf("%v", second)
	}
	short := w.ok("CreateDnsCredential", `{"provider_type":"cloudflare","cf_api_token":"12345678"}`)
	if short["cf_api_token"] != "********" {
		t.Errorf("%v", short)
	}
	list := w.ok("ListDnsCredentials", "")
	if list["default_id"] != id || len(list["credentials"].([]any)) != 3 {
		t.Errorf("%v", list)
	}
	if got := w.ok("GetDefaultDnsCredential", ""); got["default_id"] != id || got["credential"].(map[string]any)["name"] != "main" {
		t.Errorf("%v", got)
	}
	if got := w.ok("UpdateDnsCredential", `{"id":"`+id+`","name":"renamed","max_dns_wait":90,"dns_txt_ttl":120}`); got["name"] != "renamed" || got["max_dns_wait"] != 90.0 || got["dns_txt_ttl"] != 120.0 || got["cf_api_token"] != "cana...6789" {
		t.Errorf("%v", got)
	}
	if d, _, err := settings.Get(t.Context(), w.store, settings.DNSKey(id)); err != nil || d.Params["api_token"] != canary {
		t.Errorf("%v", err)
	}
	for _, c := range []struct{ method, body, code string }{
		{"CreateDnsCredential", `{"provider_type":"nobody","cf_api_token":"x"}`, "dns_credential"},
		{"CreateDnsCredential", `{"provider_type":"cloudflare"}`, "dns_credential"},
		{"CreateDnsCredential", `{"provider_type":"cloudflare","cf_api_token":"x","dns_txt_ttl":0}`, "dns_credential"},
		{"CreateDnsCredential", `{"provider_type":"cloudflare","cf_api_token":"x","max_dns_wait":0}`, "dns_credential"},
		{"CreateDnsCredential", `{"provider_type":"cloudflare","cf_api_token":"x","max_dns_wait":4294967295}`, "dns_credential"},
		{"CreateDnsCredential", `{"provider_type":"cloudflare","cf_api_token":"` + canary + `","cf_api_url":"https://evil.example"}`, "dns_credential"},
		{"UpdateDnsCredential", `{"id":"` + id + `","cf_api_url":"https://evil.example"}`, "dns_credential"},
		{"UpdateDnsCredential", `{"id":"` + id + `","max_dns_wait":0}`, "dns_credential"},
		{"UpdateDnsCredential", `{"id":"none"}`, "dns_credential_unknown"},
		{"GetDnsCredential", `{"id":"none"}`, "dns_credential_unknown"},
		{"GetDnsCredential", `{"id":"../certbot"}`, "dns_credential_unknown"},
		{"GetDnsCredential", `{"id":""}`, "dns_credential_unknown"},
		{"SetDefaultDnsCredential", `{"id":"none"}`, "dns_credential_unknown"},
		{"DeleteDnsCredential", `{"id":"` + id + `"}`, "dns_credential_used"},
	} {
		w.refused(c.method, c.body, c.code)
	}
	if doc, _ := w.call("GetDnsCredential", `{"id":"none"}`); doc["error"] != "dns credential not found" {
		t.Errorf("%v", doc)
	}
	other := second["id"].(string)
	w.ok("AddZtDomain", `{"domain":"apps.example","dns_cred_id":"`+other+`","port":443}`)
	w.refused("DeleteDnsCredential", `{"id":"`+other+`"}`, "dns_credential_used")
	w.ok("DeleteZtDomain", `{"domain":"apps.example"}`)
	w.ok("DeleteDnsCredential", `{"id":"`+other+`"}`)
	w.ok("SetDefaultDnsCredential", `{"id":"`+short["id"].(string)+`"}`)
	w.ok("DeleteDnsCredential", `{"id":"`+id+`"}`)
}

// K10: a token that was given comes out in no answer, no error and no log.
func TestThreat_K10_NoAnswerAndNoLogHasADNSToken(t *testing.T) {
	w := newWorld(t)
	made := w.ok("CreateDnsCredential", `{"name":"main","provider_type":"cloudflare","cf_api_token":"`+canary+`"}`)
	id := made["id"].(string)
	settingsOf := `"settings":{"server":"s:53","key_name":"k","key_alg":"a","key":"` + canary + `"}`
	var out []string
	for method, body := range map[string]string{
		"CreateDnsCredential": `{"provider_type":"rfc2136",` + settingsOf + `}`, "UpdateDnsCredential": `{"id":"` + id + `","cf_api_token":"` + canary + `2"}`,
		"ListDnsCredentials": "", "GetDnsCredential": `{"id":"` + id + `"}`, "SetDefaultDnsCredential": `{"id":"` + id + `"}`, "GetDefaultDnsCredential": "",
		"ListZtDomains": "", "Status": "", "WaveKvStatus": "", "ListQuarantine": "", "GetCertbotConfig": "",
	} {
		_, text := w.do("POST", "/prpc/"+method, body, "Authorization", "Bearer "+token)
		out = append(out, text)
	}
	for _, body := range []string{
		`{"provider_type":"` + canary + `","cf_api_token":"` + canary + `"}`, `{"provider_type":"cloudflare","cf_api_token":"` + canary + `\n"}`,
		`{"provider_type":"cloudflare","cf_api_token":"` + canary + `","cf_api_url":"https://evil.example"}`, `{"provider_type":"gandi",` + settingsOf + `}`,
	} {
		status, text := w.do("POST", "/prpc/CreateDnsCredential", body, "Authorization", "Bearer "+token)
		if status != 400 {
			t.Errorf("%s: %d %q", body, status, text)
		}
		if !strings.Contains(body, `"provider_type":"canary`) { // which is named as what it is
			out = append(out, text)
		}
	}
	out = append(out, strings.ReplaceAll(w.log.text(), "provider_type="+canary, ""), fmt.Sprint(w.store.List(t.Context(), "settings/domain")))
	for _, text := range out {
		if strings.Contains(strings.ReplaceAll(text, `\"`+canary+`\" is no DNS provider`, ""), canary) {
			t.Errorf("%s", text)
		}
	}
	if log := w.log.text(); !strings.Contains(log, "method=CreateDnsCredential who=token") || !strings.Contains(log, "outcome=refused") || !strings.Contains(log, "outcome=done") || strings.Contains(log, token) {
		t.Errorf("%s", log)
	}
}

func TestBaseDomains(t *testing.T) {
	w := newWorld(t, func(c *Config) {
		c.CheckDomain = func(n hostname.Name) error {
			if strings.HasSuffix(string(n), ".invalid") {
				return fault.New("private_ca_domains", "not for %s", n)
			}
			return nil
		}
	})
	got := w.ok("AddZtDomain", `{"domain":" *.Apps.Example. ","port":8443,"priority":-3,"node":2}`)["config"].(map[string]any)
	if got["domain"] != "apps.example" || got["port"] != 8443.0 || got["priority"] != -3.0 || got["node"] != 2.0 || got["dns_cred_id"] != nil {
		t.Errorf("%v", got)
	}
	for _, c := range []struct{ method, body, code string }{
		{"AddZtDomain", `{"domain":"apps.example","port":443}`, "domain_exists"},
		{"AddZtDomain", `{"domain":"b.example","port":0}`, "domain_port"},
		{"AddZtDomain", `{"domain":"b.example","port":65536}`, "domain_port"},
		{"AddZtDomain", `{"domain":"b.example","port":443,"node":0}`, "domain_node"},
		{"AddZtDomain", `{"domain":"b.example","port":443,"dns_cred_id":"none"}`, "dns_credential_unknown"},
		{"AddZtDomain", `{"domain":"-b.example","port":443}`, "host_base"},
		{"AddZtDomain", `{"domain":"","port":443}`, "host_base"},
		{"AddZtDomain", `{"domain":"b.invalid","port":443}`, "private_ca_domains"},
		{"AddZtDomain", `{"domain":"fixed.example","port":443}`, "domain_fixed"},
		{"UpdateZtDomain", `{"domain":"fixed.example","port":443}`, "domain_fixed"},
		{"DeleteZtDomain", `{"domain":"*.fixed.example"}`, "domain_fixed"},
		{"UpdateZtDomain", `{"domain":"b.example","port":443}`, "domain_unknown"},
		{"UpdateZtDomain", `{"domain":"apps.example","port":0}`, "domain_port"},
		{"DeleteZtDomain", `{"domain":"b.example"}`, "domain_unknown"},
		{"GetZtDomain", `{"domain":"b.example"}`, "domain_unknown"},
	} {
		w.refused(c.method, c.body, c.code)
	}
	if doc, _ := w.call("GetZtDomain", `{"domain":"b.example"}`); doc["error"] != "ZT-Domain config not found" {
		t.Errorf("%v", doc)
	}
	w.ok("UpdateZtDomain", `{"domain":"APPS.example","port":443}`)
	if got := w.ok("GetZtDomain", `{"domain":"apps.example."}`)["config"].(map[string]any); got["port"] != 443.0 || got["priority"] != 0.0 {
		t.Errorf("%v", got)
	}
	names := func() (out []string) {
		for _, d := range w.ok("ListZtDomains", "")["domains"].([]any) {
			out = append(out, d.(map[string]any)["config"].(map[string]any)["domain"].(string))
		}
		return out
	}
	if got := names(); !slices.Equal(got, []string{"fixed.example", "apps.example"}) {
		t.Errorf("%v", got)
	}
	// A record that does not parse is no default, and can be set anew or deleted.
	if err := w.store.Put(t.Context(), "settings/domain/apps.example", []byte("{"), settings.Any); err != nil {
		t.Fatal(err)
	}
	w.refused("GetZtDomain", `{"domain":"apps.example"}`, "settings_record")
	if got := w.ok("ListQuarantine", ""); got["total"] != 1.0 {
		t.Errorf("%v", got)
	}
	w.ok("UpdateZtDomain", `{"domain":"apps.example","port":444}`)
	w.ok("DeleteZtDomain", `{"domain":"apps.example"}`)
	if got := names(); !slices.Equal(got, []string{"fixed.example"}) {
		t.Errorf("%v", got)
	}
	w.store.LoseQuorum(true)
	w.refused("AddZtDomain", `{"domain":"c.example","port":443}`, "state_quorum")
}

// authority is certificates that are due or not.
type authority struct {
	due map[hostname.Name]bool
	err error
}

func (a *authority) Renew(_ context.Context, base hostname.Name, force bool) (bool, time.Time, error) {
	was := a.due[base]
	a.due[base] = false
	return was || force, time.Unix(2e9, 0), a.err
}
func (a *authority) Status(hostname.Name) CertificateStatus {
	return CertificateStatus{NotAfter: time.Unix(2e9, 0), NotBefore: time.Unix(1e9, 0), Served: true}
}
func (a *authority) Reload(context.Context, hostname.Name) error { return a.err }
func (a *authority) Attested(context.Context, hostname.Name, int) ([]AttestedKey, error) {
	return []AttestedKey{{SPKI: []byte{1}, At: time.Unix(2, 0)}, {SPKI: []byte{2}, At: time.Unix(1, 0)}}, nil
}

func TestCertificates(t *testing.T) {
	a := &authority{due: map[hostname.Name]bool{"fixed.example": true}}
	const directory = "https://acme.example/directory"
	w := newWorld(t, func(c *Config) { c.Certificates, c.Directories = a, []string{directory} })
	if got := w.ok("RenewCert", ""); got["renewed"] != true {
		t.Errorf("one was due: %v", got)
	}
	if got := w.ok("RenewCert", ""); got["renewed"] != false {
		t.Errorf("nothing was due: %v", got)
	}
	if got := w.ok("RenewZtDomainCert", `{"domain":"*.Fixed.example"}`); got["renewed"] != false || got["not_after"] != 2e9 {
		t.Errorf("%v", got)
	}
	if got := w.ok("RenewZtDomainCert", `{"domain":"fixed.example","force":true}`); got["renewed"] != true {
		t.Errorf("%v", got)
	}
	if got := w.ok("ListCertAttestations", `{"domain":"fixed.example"}`); got["latest"].(map[string]any)["public_key"] != "01" || len(got["history"].([]any)) != 2 {
		t.Errorf("%v", got)
	}
	w.ok("ReloadCert", "")
	w.refused("RenewZtDomainCert", `{"domain":"other.example"}`, "domain_unknown")
	w.refused("AddZtDomain", `{"domain":"apps.example","port":443}`, "dns_credential")
	w.ok("CreateDnsCredential", `{"provider_type":"cloudflare","cf_api_token":"`+canary+`","set_as_default":true}`)
	if got := w.ok("AddZtDomain", `{"domain":"apps.example","port":443}`)["cert_status"].(map[string]any); got["has_cert"] != true || got["loaded_in_memory"] != true || got["issued_at"] != 1e9 {
		t.Errorf("%v", got)
	}
	if got := w.ok("GetCertbotConfig", ""); got["acme_url"] != directory || got["renew_interval_secs"] != 0.0 {
		t.Errorf("%v", got)
	}
	w.ok("SetCertbotConfig", `{"renew_interval_secs":3600,"renew_before_expiration_secs":864000,"renew_timeout_secs":300,"acme_url":"`+directory+`"}`)
	w.ok("SetCertbotConfig", `{"renew_interval_secs":7200}`)
	if got := w.ok("GetCertbotConfig", ""); got["renew_interval_secs"] != 7200.0 || got["renew_before_expiration_secs"] != 864000.0 {
		t.Errorf("%v", got)
	}
	for _, body := range []string{
		`{"acme_url":"https://evil.example/directory"}`, `{"renew_timeout_secs":0}`, `{"renew_interval_secs":18446744073709551615}`, `{"renew_before_expiration_secs":99999999999}`,
	} {
		w.refused("SetCertbotConfig", body, "certbot_config")
	}
	a.err = fault.New("acme_order", "the CA is down")
	w.refused("RenewCert", "", "acme_order")
	if doc, _ := w.call("ReloadCert", ""); !strings.Contains(doc["error"].(string), "apps.example, ") && !strings.Contains(doc["error"].(string), "fixed.example, apps.example") {
		t.Errorf("%v", doc)
	}
	// K02: no default in place of a record that is broken.
	if err := w.store.Put(t.Context(), string(settings.CertbotKey), []byte("?"), settings.Any); err != nil {
		t.Fatal(err)
	}
	w.refused("GetCertbotConfig", "", "settings_record")
}

func TestInstances(t *testing.T) {
	w := newWorld(t)
	one, two, three := w.instance(1, 1, manifest.Port{Port: 80, PP: true}), w.instance(1, 2), w.instance(2, 3)
	status := w.ok("Status", "")
	if len(status["hosts"].([]any)) != 3 || len(status["nodes"].([]any)) != 2 || status["id"] != 1.0 || status["tunnel"] != "netstack" {
		t.Errorf("%v", status)
	}
	if h := status["hosts"].([]any)[0].(map[string]any); h["instance_id"] != one.String() || h["base_domain"] != "fixed.example" || h["ip"] != "100.97.0.1" {
		t.Errorf("%v", h)
	}
	if got := w.ok("GetMeta", ""); got["registered"] != 3.0 || got["online"] != 0.0 {
		t.Errorf("%v", got)
	}
	if got := w.ok("GetInfo", `{"id":"`+one.String()+`"}`); got["found"] != true || got["info"].(map[string]any)["app_id"] == "" {
		t.Errorf("%v", got)
	}
	for _, id := range []string{"", "none", dstack.InstanceID{9}.String()} {
		if got := w.ok("GetInfo", `{"id":"`+id+`"}`); got["found"] != false || got["info"] != nil {
			t.Errorf("%v", got)
		}
		w.refused("SetInstancePortPolicy", `{"instance_id":"`+id+`","policy":{"ports":[]}}`, "instance_unknown")
		w.refused("GetInstancePortPolicy", `{"instance_id":"`+id+`"}`, "instance_unknown")
		w.refused("ClearInstancePortPolicy", `{"instance_id":"`+id+`"}`, "instance_unknown")
		w.refused("GetInstanceHandshakes", `{"instance_id":"`+id+`"}`, "instance_unknown")
		if id != "" {
			w.refused("Drain", `{"instance_id":"`+id+`","on":true}`, "instance_unknown")
		}
	}
	if doc, _ := w.call("ClearInstancePortPolicy", `{"instance_id":"none"}`); doc["error"] != "instance none not found" {
		t.Errorf("%v", doc)
	}

	id := `"instance_id":"` + one.String() + `"`
	if got := w.ok("GetInstancePortPolicy", `{`+id+`}`); got["source"] != "instance" || got["admin_override"] != nil || got["effective"].(map[string]any)["restrict_mode"] != true {
		t.Errorf("%v", got)
	}
	w.ok("SetInstancePortPolicy", `{`+id+`,"policy":{"ports":[{"port":8080,"pp":false}],"restrict_mode":false}}`)
	if got := w.ok("GetInstancePortPolicy", `{`+id+`}`); got["source"] != "admin" || got["effective"].(map[string]any)["restrict_mode"] != true || got["instance_reported"].(map[string]any)["restrict_mode"] != true {
		t.Errorf("%v", got)
	}
	w.refused("SetInstancePortPolicy", `{`+id+`,"policy":{"ports":[{"port":0}]}}`, "port_policy")
	w.refused("SetInstancePortPolicy", `{`+id+`,"policy":{"ports":[{"port":65536}]}}`, "port_policy")
	w.refused("SetInstancePortPolicy", `{`+id+`}`, "port_policy")
	w.ok("ClearInstancePortPolicy", `{`+id+`}`)
	w.ok("ClearInstancePortPolicy", `{`+id+`}`)
	if got := w.ok("GetInstancePortPolicy", `{`+id+`}`); got["source"] != "instance" {
		t.Errorf("%v", got)
	}

	w.ok("Drain", `{`+id+`,"on":true}`)
	rt, _ := w.table.Instance(one)
	if all, _ := settings.Load(t.Context(), w.store); !rt.Draining() || !all.Drained[one] {
		t.Error("it does not drain")
	}
	w.ok("Drain", `{`+id+`,"on":false}`)
	if all, _ := settings.Load(t.Context(), w.store); rt.Draining() || len(all.Drained) != 0 {
		t.Error("it drains still")
	}

	w.refused("RemoveRoutes", `{}`, "remove_what")
	w.refused("RemoveRoutes", `{"app_id":"`+dstack.AppID{0xa, 1}.String()+`",`+id+`}`, "remove_what")
	w.refused("RemoveRoutes", `{"app_id":"x"}`, "app_unknown")
	if got := w.ok("RemoveRoutes", `{"app_id":"`+dstack.AppID{0xa, 1}.String()+`"}`); got["removed"] != 2.0 {
		t.Errorf("%v", got)
	}
	all, err := settings.Load(t.Context(), w.store)
	if err != nil || len(all.Removed) != 2 || time.Since(all.Removed[two]) > time.Minute || w.table.Len() != 1 {
		t.Errorf("%v %v", all.Removed, err)
	}
	// Without a quorum it is done here, and the answer says that the others do not know.
	w.store.LoseQuorum(true)
	doc, code := w.call("RemoveRoutes", `{"instance_id":"`+three.String()+`"}`)
	if code != "state_quorum" || !strings.Contains(doc["error"].(string), "done at this gateway") || w.table.Len() != 0 {
		t.Errorf("%q %v", code, doc)
	}
	w.store.LoseQuorum(false)
	if got := w.ok("RemoveRoutes", `{"instance_id":"`+three.String()+`"}`); got["removed"] != 0.0 {
		t.Errorf("%v", got)
	}
}

func TestNodes(t *testing.T) {
	w := newWorld(t)
	w.ok("SetNodeStatus", `{"id":2,"status":"down"}`)
	if got := fmt.Sprint(w.ok("GetNodeStatuses", "")["statuses"]); got != "[map[node_id:1 status:up] map[node_id:2 status:down]]" {
		t.Error(got)
	}
	w.ok("SetNodeStatus", `{"id":2,"status":"up"}`)
	w.ok("SetNodeUrl", `{"id":1,"url":"https://other.example:9000"}`)
	for _, c := range []struct{ method, body, code string }{
		{"SetNodeStatus", `{"id":2,"status":"UP"}`, "node_status"},
		{"SetNodeStatus", `{"id":3,"status":"up"}`, "node_unknown"},
		{"SetNodeUrl", `{"id":3,"url":"https://x.example"}`, "node_unknown"},
		{"SetNodeUrl", `{"id":1,"url":"ftp://x.example"}`, "node_url"},
		{"SetNodeUrl", `{"id":1,"url":"https://"}`, "node_url"},
		{"SetNodeUrl", `{"id":1,"url":"https://a@x.example"}`, "node_url"},
	} {
		w.refused(c.method, c.body, c.code)
	}
	if doc, _ := w.call("SetNodeStatus", `{"id":2,"status":""}`); doc["error"] != "invalid status: expected 'up' or 'down'" {
		t.Errorf("%v", doc)
	}
	if got := w.ok("WaveKvStatus", ""); got["enabled"] != false || got["persistent"].(map[string]any)["n_keys"] != 2.0 {
		t.Errorf("%v", got)
	}
	if got := fmt.Sprint(w.ok("GetGlobalConnections", "")["node_connections"]); got != "map[1:0]" {
		t.Error(got)
	}
}

// members is a cluster that remembers what was asked of it.
type members struct{ asked []string }

func (m *members) Members(context.Context) (*api.ListMembersResponse, error) {
	return &api.ListMembersResponse{Quorum: true, Members: []*api.Member{{Id: "a"}}}, nil
}
func (m *members) Invite(context.Context) (*api.InviteMemberResponse, error) {
	return &api.InviteMemberResponse{Token: "invitation-canary", Address: "one.example:9000"}, nil
}
func (m *members) Join(_ context.Context, addr, token string) error {
	m.asked = append(m.asked, addr+" "+token)
	return nil
}
func (m *members) Remove(_ context.Context, id string) error {
	m.asked = append(m.asked, id)
	return nil
}
func (m *members) ReleaseLock(_ context.Context, base hostname.Name) error {
	m.asked = append(m.asked, string(base))
	return nil
}

func TestMembers(t *testing.T) {
	m := &members{}
	w := newWorld(t, func(c *Config) { c.Cluster = m })
	if got := w.ok("ListMembers", ""); got["quorum"] != true {
		t.Errorf("%v", got)
	}
	if got := w.ok("InviteMember", ""); got["token"] != "invitation-canary" {
		t.Errorf("%v", got)
	}
	for _, url := range []string{"", "two.example", "https://two.example:1/path", "a@two.example:1"} {
		w.refused("JoinCluster", `{"url":"`+url+`","token":"t"}`, "cluster_address")
	}
	w.refused("JoinCluster", `{"url":"two.example:9000"}`, "cluster_token")
	w.ok("JoinCluster", `{"url":"https://two.example:9000/","token":"invitation-canary"}`)
	w.ok("RemoveMember", `{"id":"b"}`)
	w.ok("ForceReleaseCertLock", `{"domain":"fixed.example"}`)
	if got := strings.Join(m.asked, ","); got != "two.example:9000 invitation-canary,b,fixed.example" {
		t.Error(got)
	}
	if log := w.log.text(); strings.Contains(log, "invitation-canary") || !strings.Contains(log, "method=RemoveMember who=token id=b outcome=done") {
		t.Errorf("%s", log)
	}
}
