// SPDX-License-Identifier: Apache-2.0

package settings_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/gateway/settings/settingstest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func TestStoreInMemory(t *testing.T) { settingstest.Conform(t, new(settingstest.Memory)) }

const canary = "canary-token-0123456789"

var (
	now      = time.UnixMilli(1_800_000_000_123)
	instance = dstack.InstanceID{1, 2, 3}
)

func credential() settings.DNS {
	return settings.DNS{Name: "main", Provider: "cloudflare", Params: map[string]string{"api_token": canary}, TTL: time.Minute, Wait: 5 * time.Minute, Created: now, Updated: now}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fill writes one record of each kind.
func fill(t *testing.T, s settings.Store) {
	t.Helper()
	ctx := t.Context()
	policy, err := portpolicy.New(manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 8080, PP: true}, {Port: 80}}})
	must(t, err)
	for _, err := range []error{
		settings.Put(ctx, s, settings.DNSKey("18f-ab"), credential(), 0),
		settings.Put(ctx, s, settings.DefaultDNSKey, settings.DefaultDNS{ID: "18f-ab"}, 0),
		settings.Put(ctx, s, settings.DomainKey("apps.example"), settings.Domain{Port: 443, Priority: -1}, 0),
		settings.Put(ctx, s, settings.CertbotKey, settings.Certbot{RenewBefore: time.Hour, URL: "https://acme.example/dir"}, 0),
		settings.Put(ctx, s, settings.NodeStatusKey(2), settings.NodeStatus{Down: true}, 0),
		settings.Put(ctx, s, settings.NodeURLKey(2), settings.NodeURL{URL: "https://two.example:8000"}, 0),
		settings.Put(ctx, s, settings.PolicyKey(instance), settings.Policy{Ports: policy}, 0),
		settings.Put(ctx, s, settings.RemovedKey(instance), settings.Removed{At: now}, 0),
		settings.Put(ctx, s, settings.DrainedKey(instance), settings.Drained{}, 0),
	} {
		must(t, err)
	}
}

func TestRecordsComeBack(t *testing.T) {
	s := new(settingstest.Memory)
	fill(t, s)
	got, err := settings.Load(t.Context(), s)
	must(t, err)
	if len(got.Bad) != 0 {
		t.Fatalf("%v", got.Bad)
	}
	d := got.DNS["18f-ab"]
	if d.Params["api_token"] != canary || d.TTL != time.Minute || d.Wait != 5*time.Minute || !d.Created.Equal(now) || got.DefaultDNS != "18f-ab" {
		t.Errorf("%v %q", d, got.DefaultDNS)
	}
	if got.Domains["apps.example"] != (settings.Domain{Port: 443, Priority: -1}) || *got.Certbot != (settings.Certbot{RenewBefore: time.Hour, URL: "https://acme.example/dir"}) {
		t.Errorf("%+v %+v", got.Domains, got.Certbot)
	}
	if !got.Down[2] || got.URLs[2] != "https://two.example:8000" || !got.Removed[instance].Equal(now) || !got.Drained[instance] {
		t.Errorf("%+v", got)
	}
	if p, others := got.Policies[instance].Ports(); others || len(p) != 2 || !p[1].PROXY {
		t.Errorf("%+v", p)
	}
	if c, ok := got.Credential(got.Domains["apps.example"]); !ok || c.Name != "main" {
		t.Errorf("%v, %v", c, ok)
	}
	if _, ok := got.Credential(settings.Domain{DNS: "gone"}); ok {
		t.Error("a credential that is gone")
	}
	v, at, err := settings.Get(t.Context(), s, settings.DomainKey("apps.example"))
	if err != nil || at == 0 || v.Port != 443 {
		t.Errorf("%+v at %d, %v", v, at, err)
	}
	if err := settings.Put(t.Context(), s, settings.DomainKey("apps.example"), v, at-1); fault.Code(err) != "state_conflict" {
		t.Errorf("%v", err)
	}
	if _, _, err := settings.Get(t.Context(), s, settings.DomainKey("other.example")); !settings.Absent(err) {
		t.Errorf("%v", err)
	}
}

func TestWhatNoReaderTakesIsNotWritten(t *testing.T) {
	ctx, s := t.Context(), new(settingstest.Memory)
	long := credential()
	long.Wait = 2 * time.Hour
	control := credential()
	control.Params = map[string]string{"api_token": "a\nb"}
	untimed := credential()
	untimed.TTL = 0
	for name, err := range map[string]error{
		"a wait too long":        settings.Put(ctx, s, settings.DNSKey("a"), long, 0),
		"control characters":     settings.Put(ctx, s, settings.DNSKey("a"), control, 0),
		"no TTL":                 settings.Put(ctx, s, settings.DNSKey("a"), untimed, 0),
		"an id with a path":      settings.Put(ctx, s, settings.DNSKey("../a"), credential(), 0),
		"an empty id":            settings.Put(ctx, s, settings.DNSKey(""), credential(), 0),
		"no port":                settings.Put(ctx, s, settings.DomainKey("a.example"), settings.Domain{}, 0),
		"a domain in capitals":   settings.Put(ctx, s, settings.DomainKey("A.example"), settings.Domain{Port: 1}, 0),
		"a domain of no name":    settings.Put(ctx, s, settings.DomainKey("a/b"), settings.Domain{Port: 1}, 0),
		"plain HTTP to a CA":     settings.Put(ctx, s, settings.CertbotKey, settings.Certbot{URL: "http://acme.example/dir"}, 0),
		"a negative interval":    settings.Put(ctx, s, settings.CertbotKey, settings.Certbot{RenewInterval: -time.Second}, 0),
		"a URL with a password":  settings.Put(ctx, s, settings.NodeURLKey(1), settings.NodeURL{URL: "https://a:b@c.example"}, 0),
		"gateway 0":              settings.Put(ctx, s, settings.NodeStatusKey(0), settings.NodeStatus{}, 0),
		"a removal without time": settings.Put(ctx, s, settings.RemovedKey(instance), settings.Removed{}, 0),
	} {
		if fault.Code(err) != "settings_value" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all, _ := s.List(ctx, ""); len(all) != 0 {
		t.Errorf("%v", all)
	}
}

// K02: records that are malformed, of another version or out of range are put aside, each by
// itself; what they closed stays closed, and no default stands in for them.
func TestThreat_K02_BadSettingsAreAnErrorAndNoDefault(t *testing.T) {
	ctx := t.Context()
	id := instance.String()
	for _, c := range []struct{ key, value string }{
		{"certbot", `{"version":1,"renew_interval":1,"renew_before":1,"renew_timeout":1,"url":"http://acme.example"}`},
		{"certbot", `{"version":2,"renew_interval":0,"renew_before":0,"renew_timeout":0,"url":""}`},
		{"certbot", `{"version":1,"renew_interval":18446744073709551615,"renew_before":0,"renew_timeout":0,"url":""}`},
		{"certbot", ""},
		{"certbot", "{}"},
		{"dns/x", `{"version":1}`},
		{"dns/x", `{"version":1,"version":1,"name":"","provider":"cloudflare","params":{},"ttl":1,"wait":1,"created":1,"updated":1}`},
		{"dns/x", `{"version":1,"name":"","provider":"cloudflare","params":{},"ttl":1,"wait":1,"created":18446744073709551615,"updated":1}`},
		{"dns/x", `{"version":1,"name":"","provider":"cloudflare","params":{},"ttl":9223372036854775807,"wait":1,"created":1,"updated":1}`},
		{"dns/x/y", `{"version":1,"name":"","provider":"cloudflare","params":{},"ttl":1,"wait":1,"created":1,"updated":1}`},
		{"dns-default", `{"version":1,"id":""}`},
		{"domain/apps.example", `{"version":1,"dns":"","port":0,"node":0,"priority":0}`},
		{"domain/apps.example", `{"version":1,"dns":"","port":443,"node":0,"priority":0,"wildcard":true}`},
		{"domain/Apps.example", `{"version":1,"dns":"","port":443,"node":0,"priority":0}`},
		{"domain/", `{"version":1,"dns":"","port":443,"node":0,"priority":0}`},
		{"node/1/status", `{"version":1,"status":"UP"}`},
		{"node/01/status", `{"version":1,"status":"down"}`},
		{"node/4294967296/status", `{"version":1,"status":"down"}`},
		{"node/1/url", `{"version":1,"url":"https://x.example/?a"}`},
		{"node/1/other", `{}`},
		{"policy/" + id, `{"version":1,"restrict_mode":true,"ports":[{"port":0,"pp":false}]}`},
		{"policy/" + id, `not JSON`},
		{"policy/" + strings.ToUpper(id[:38]) + "AB", `{"version":1,"restrict_mode":false,"ports":[]}`},
		{"removed/" + id, `{"version":1,"at":18446744073709551615}`},
		{"removed/" + id, `{"version":1,"at":-1}`},
		{"drained/" + id, `{"version":0}`},
		{"unknown", `{"version":1}`},
		{"", `{"version":1}`},
	} {
		s := new(settingstest.Memory)
		must(t, settings.Put(ctx, s, settings.DomainKey("good.example"), settings.Domain{Port: 443}, 0))
		must(t, s.Put(ctx, "settings/"+c.key, []byte(c.value), 0))
		got, err := settings.Load(ctx, s)
		must(t, err)
		if len(got.Bad) != 1 || fault.Code(got.Bad[0].Err) != "settings_record" || len(got.Domains) != 1 {
			t.Errorf("%s %s: %+v", c.key, c.value, got.Bad)
		}
		if got.Certbot != nil || len(got.DNS)+len(got.Down)+len(got.URLs)+len(got.Removed)+len(got.Drained) != 0 || got.DefaultDNS != "" {
			t.Errorf("%s %s is applied: %+v", c.key, c.value, got)
		}
		open := portpolicy.Open()
		for _, p := range got.Policies {
			if _, err := portpolicy.Decide(&open, p, portpolicy.Request{Port: 22, Form: hostname.Passthrough}); err == nil {
				t.Errorf("%s opens port 22", c.value)
			}
		}
		if c.key == "policy/"+id && got.Policies[instance] == nil {
			t.Errorf("%s: what it closed is open", c.value)
		}
	}
	s := new(settingstest.Memory)
	must(t, s.Put(ctx, string(settings.CertbotKey), []byte("{"), 0))
	if c, _, err := settings.Get(ctx, s, settings.CertbotKey); fault.Code(err) != "settings_record" || c != (settings.Certbot{}) {
		t.Errorf("%+v, %v", c, err)
	}
}

// A record that rots on one gateway ends nothing there.
func TestWhatRotsIsKeptAsItWas(t *testing.T) {
	s := new(settingstest.Memory)
	fill(t, s)
	before, err := settings.Load(t.Context(), s)
	must(t, err)
	all, err := s.List(t.Context(), "")
	must(t, err)
	for _, e := range all {
		must(t, s.Put(t.Context(), e.Key, []byte("{"), settings.Any))
	}
	after, err := settings.Load(t.Context(), s)
	must(t, err)
	if len(after.Domains) != 0 || len(after.Bad) != len(all) {
		t.Errorf("%+v", after)
	}
	after.Keep(nil)
	after.Keep(before)
	closed := after.Policies[instance]
	after.Policies, before.Policies, after.Bad = nil, nil, nil
	if !reflect.DeepEqual(after, before) {
		t.Errorf("%+v, want %+v", after, before)
	}
	open := portpolicy.Open()
	if _, err := portpolicy.Decide(&open, closed, portpolicy.Request{Port: 8080}); fault.Code(err) != "port_denied_operator" {
		t.Errorf("%v", err)
	}
}

// K10: a credential shows its token nowhere but in the store that the cluster seals.
func TestThreat_K10_CredentialsPrintWithoutTheirSecrets(t *testing.T) {
	d := credential()
	text, err := json.Marshal(map[string]any{"dns": d, "list": []settings.DNS{d}})
	must(t, err)
	for _, out := range []string{fmt.Sprint(d), fmt.Sprintf("%v %+v %#v %s", d, d, d, d), string(text), d.LogValue().String()} {
		if strings.Contains(out, canary) {
			t.Errorf("%s", out)
		}
	}
	s := new(settingstest.Memory)
	bad := credential()
	bad.Params["api_token"] = canary + "\n"
	if err := settings.Put(t.Context(), s, settings.DNSKey("a"), bad, 0); err == nil || strings.Contains(err.Error(), canary) {
		t.Errorf("%v", err)
	}
	must(t, s.Put(t.Context(), "settings/dns/a", []byte(`{"version":1,"params":{"api_token":"`+canary+`"},"name":7}`), 0))
	if got, _ := settings.Load(t.Context(), s); len(got.Bad) != 1 || strings.Contains(got.Bad[0].Err.Error(), canary) {
		t.Errorf("%v", got.Bad)
	}
}

func TestWhichDomainIsPreferred(t *testing.T) {
	s := settings.Snapshot{Domains: map[hostname.Name]settings.Domain{
		"b.example": {Priority: 1}, "a.example": {Priority: 1}, "mine.example": {Priority: 1, Node: 1},
		"best.example": {Priority: 5}, "theirs.example": {Priority: 9, Node: 2}, "least.example": {Priority: -2147483648},
	}}
	want := []hostname.Name{"best.example", "a.example", "b.example", "mine.example", "least.example", "theirs.example"}
	if got := s.Names(1); !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

func TestFollow(t *testing.T) {
	s := new(settingstest.Memory)
	ctx, cancel := context.WithCancel(t.Context())
	seen, done := make(chan []hostname.Name, 16), make(chan struct{})
	go func() {
		defer close(done)
		settings.Follow(ctx, s, func(x *settings.Snapshot) { seen <- slices.Sorted(maps.Keys(x.Domains)) }, func(err error) { t.Error(err) })
	}()
	wait := func(want ...hostname.Name) {
		t.Helper()
		for deadline := time.After(10 * time.Second); ; {
			select {
			case got := <-seen:
				if slices.Equal(got, want) {
					return
				}
			case <-deadline:
				t.Fatalf("%v was not seen", want)
			}
		}
	}
	wait()
	must(t, settings.Put(ctx, s, settings.DomainKey("a.example"), settings.Domain{Port: 1}, 0))
	must(t, settings.Put(ctx, s, settings.DomainKey("b.example"), settings.Domain{Port: 1}, 0))
	wait("a.example", "b.example")
	must(t, settings.Delete(ctx, s, settings.DomainKey("a.example"), settings.Any))
	wait("b.example")
	cancel()
	<-done
}

func FuzzRecords(f *testing.F) {
	for key, value := range map[string]string{
		"certbot":                      `{"version":1,"renew_interval":1,"renew_before":1,"renew_timeout":1,"url":"https://acme.example"}`,
		"dns-default":                  `{"version":1,"id":"a"}`,
		"dns/a":                        `{"version":1,"name":"","provider":"cloudflare","params":{"api_token":"x"},"ttl":1,"wait":1,"created":1,"updated":1}`,
		"domain/a.b":                   `{"version":1,"dns":"","port":443,"node":0,"priority":-1}`,
		"node/1/url":                   `{"version":1,"url":"https://x.example"}`,
		"node/1/status":                `{"version":1,"status":"down"}`,
		"policy/" + instance.String():  `{"version":1,"restrict_mode":true,"ports":[{"port":80,"pp":true}]}`,
		"removed/" + instance.String(): `{"version":1,"at":1}`,
		"drained/" + instance.String(): `{"version":1}`,
	} {
		f.Add(key, []byte(value))
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		m := new(settingstest.Memory)
		if err := m.Put(t.Context(), "settings/"+key, value, 0); err != nil {
			t.Fatal(err)
		}
		got, err := settings.Load(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		applied := len(got.DNS) + len(got.Domains) + len(got.Down) + len(got.URLs) + len(got.Removed) + len(got.Drained)
		if got.Certbot != nil {
			applied++
		}
		if got.DefaultDNS != "" {
			applied++
		}
		if len(got.Bad)+applied != 1 && len(got.Policies) != 1 {
			t.Fatalf("%+v", got)
		}
		// What is read is written again, and reads the same.
		for id, d := range got.DNS {
			if err := settings.Put(t.Context(), m, settings.DNSKey(id), d, settings.Any); err != nil {
				t.Fatal(err)
			}
		}
		for name, d := range got.Domains {
			if err := settings.Put(t.Context(), m, settings.DomainKey(name), d, settings.Any); err != nil {
				t.Fatal(err)
			}
		}
		if again, err := settings.Load(t.Context(), m); err != nil || len(again.Bad) != len(got.Bad) || len(again.DNS) != len(got.DNS) || len(again.Domains) != len(got.Domains) {
			t.Fatalf("%+v, %v", again, err)
		}
	})
}
