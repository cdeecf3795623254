// SPDX-License-Identifier: Apache-2.0

package witness

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/verifier"
	"github.com/dstack-go/dstack/verifier/verifiertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const base = "apps.example"

// world is an instance behind a gateway that ends its TLS: the listener, the tunnel's
// dial and both machines' evidence are real, but for whose hardware signs it.
type world struct {
	t       *testing.T
	app     *verifiertest.Instance
	gateway *tdxtest.Guest
	addr    string // of the gateway
	// agent answers at port 8090 of the instance.
	agent func(w http.ResponseWriter, nonce []byte)
}

func certificate(t *testing.T, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func spkiOf(t *testing.T, c tls.Certificate) []byte {
	t.Helper()
	leaf, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf.RawSubjectPublicKeyInfo
}

var instanceAddr = netip.MustParseAddr("100.96.0.7")

func newWorld(t *testing.T) *world {
	w := &world{t: t, app: verifiertest.New(t, "shop")}
	text, err := manifest.Build(manifest.Draft{Name: "gateway", DockerComposeFile: "services: {}\n", KeyProvider: "none"})
	if err != nil {
		t.Fatal(err)
	}
	w.gateway = &tdxtest.Guest{Platform: w.app.Platform, AppID: dstack.AppID{0x9a}, InstanceID: dstack.InstanceID{9}, ComposeHash: sha256.Sum256(text), Provider: []byte(`{"name":"none","id":""}`), ChannelSPKI: []byte("the system's")}
	agentCert := certificate(t, "guest")
	w.app.SPKI = spkiOf(t, agentCert)
	w.agent = func(rw http.ResponseWriter, nonce []byte) {
		src, err := w.app.Answer(nonce, true)
		if err != nil {
			t.Error(err)
		}
		json.NewEncoder(rw).Encode(src)
	}
	agent := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var q struct{ Nonce string }
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil || r.URL.Path != channel.EvidencePath {
			t.Error(r.URL, err)
		}
		nonce, _ := hex.DecodeString(q.Nonce)
		w.agent(rw, nonce)
	}))
	agent.TLS = &tls.Config{Certificates: []tls.Certificate{agentCert}}
	agent.StartTLS()
	t.Cleanup(agent.Close)
	web, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { web.Close() })
	go func() {
		for {
			c, err := web.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(io.Discard, c); c.Close() }()
		}
	}()
	dial := func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
		switch a {
		case netip.AddrPortFrom(instanceAddr, portpolicy.AgentPort):
			return new(net.Dialer).DialContext(ctx, "tcp", agent.Listener.Addr().String())
		case netip.AddrPortFrom(instanceAddr, 8080):
			return new(net.Dialer).DialContext(ctx, "tcp", web.Addr().String())
		}
		return nil, errors.New("no route")
	}

	table := route.New(route.Config{})
	policy := portpolicy.Open()
	now := time.Now()
	rec := route.Record{App: w.app.AppID, Instance: w.app.InstanceID, Compose: w.app.ComposeHash(), Key: wgconfig.GeneratePrivateKey().Public(), Address: instanceAddr, Policy: &policy, Attested: now, Until: now.Add(time.Minute)}
	if _, err := table.Register(rec); err != nil {
		t.Fatal(err)
	}
	table.Observe([]wgconfig.Status{{Key: rec.Key, Handshake: now}})
	public := certificate(t, "*."+base)
	desk := New(Desk{AppID: w.gateway.AppID, Instance: w.gateway.InstanceID[:], Manifest: string(text), Attester: w.gateway, Dial: dial})
	e, err := edge.New(edge.Config{
		Rules: func() hostname.Rules { return hostname.Rules{Bases: []hostname.Name{base}} }, Routes: table, Dial: dial, Evidence: desk.Answer,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &public, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- e.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		e.Shutdown(ctx)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

// ask does what `dstack verify` does.
func (w *world) ask(edit func(*verifier.Request)) (*verifier.Verdict, error) {
	w.t.Helper()
	nonce := make([]byte, 32)
	rand.Read(nonce)
	raw, spki, err := channel.FetchEvidenceBy(w.t.Context(), func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", w.addr)
	}, "https://"+w.app.AppID.String()+"-8080."+base, nonce)
	if err != nil {
		return nil, err
	}
	src, err := verifier.ReadEvidence(raw, "")
	if err != nil {
		return nil, err
	}
	req := verifier.Request{Source: *src, Roots: []attest.Roots{w.app.Platform.Roots()}, Collateral: w.app.Collateral(), At: verifiertest.At, Policy: verifier.DefaultPolicy()}
	req.Freshness = verifier.Freshness{Nonce: nonce, ConnectionSPKI: spki}
	req.Policy.DevRoots, req.Policy.Evidence.RequireFresh, req.Policy.Image.AllowUnanchored = true, true, true
	req.Policy.Gateway.AllowTermination = true
	req.Policy.Gateway.Workload.AllowUnpinnedImages = true
	req.Reference.AddComposeHash(w.app.ComposeHash(), "test")
	req.Gateway.AddComposeHash(w.gateway.ComposeHash, "test")
	if edit != nil {
		edit(&req)
	}
	return verifier.Appraise(req), nil
}

func has(v *verifier.Verdict, hop, code string) bool {
	return slices.ContainsFunc(v.Findings, func(f verifier.Finding) bool {
		return f.Level == verifier.Error && f.Code == code && f.Hop == hop
	})
}

func TestThreat_C05_AGatewayThatEndsTLSIsAHopOfTheVerdict(t *testing.T) {
	w := newWorld(t)
	v, err := w.ask(nil)
	if err != nil {
		t.Fatal(err)
	}
	if !v.Accepted || v.Freshness != verifier.FreshNonce || v.Channel != verifier.ChannelGateway || len(v.Hops) != 2 || v.Hops[0].Workload.ComposeHash != w.gateway.ComposeHash || v.Hops[0].Workload.Name != "gateway" {
		t.Errorf("\n%s", v)
	}
}

func TestThreat_C05_WhatTheGatewayCannotShow(t *testing.T) {
	w := newWorld(t)
	honest := w.agent
	other := bytes.Repeat([]byte{8}, 32)
	for name, c := range map[string]struct {
		agent     func(http.ResponseWriter, []byte)
		edit      func(*verifier.Request)
		hop, code string
	}{
		"it stands in for another connection": {nil, func(r *verifier.Request) { r.Freshness.ConnectionSPKI = []byte("another") }, "gateway", "spki_mismatch"},
		"its answer is stale":                 {nil, func(r *verifier.Request) { r.Freshness.Nonce = other }, "gateway", "nonce_mismatch"},
		"it was not asked for":                {nil, func(r *verifier.Request) { r.Policy.Gateway.AllowTermination = false }, "", "gateway_termination_denied"},
		"its evidence is missing":             {nil, func(r *verifier.Request) { r.Source.Gateway = nil }, "", "gateway_evidence_missing"},
		"the app's is of another nonce":       {func(rw http.ResponseWriter, _ []byte) { honest(rw, other) }, nil, "", "nonce_mismatch"},
		"another instance's": {func(rw http.ResponseWriter, nonce []byte) {
			another := verifiertest.New(t, "other")
			another.Platform, another.SPKI = w.app.Platform, w.app.SPKI
			src, err := another.Answer(nonce, true)
			if err != nil {
				t.Error(err)
			}
			json.NewEncoder(rw).Encode(src)
		}, nil, "", "compose_hash_mismatch"},
	} {
		t.Run(name, func(t *testing.T) {
			if w.agent = honest; c.agent != nil {
				w.agent = c.agent
			}
			v, err := w.ask(c.edit)
			if err != nil {
				t.Fatal(err)
			}
			if v.Accepted || !has(v, c.hop, c.code) {
				t.Errorf("\n%s", v)
			}
		})
	}
}

func TestWhatTheGatewayRefusesToSay(t *testing.T) {
	w := newWorld(t)
	desk := New(Desk{Attester: w.gateway, Dial: func(context.Context, netip.AddrPort) (net.Conn, error) { return nil, errors.New("no route") }})
	post := func(d *Desk, body string, a edge.Asked) string {
		rec := httptest.NewRecorder()
		d.Answer(rec, httptest.NewRequest("POST", channel.EvidencePath, strings.NewReader(body)), a)
		var e struct{ Code string }
		if err := json.Unmarshal(rec.Body.Bytes(), &e); err != nil || rec.Code == http.StatusOK {
			t.Errorf("status %d, %s", rec.Code, rec.Body)
		}
		return e.Code
	}
	shown := edge.Asked{SPKI: []byte("key"), Address: instanceAddr}
	nonce := `{"nonce":"` + strings.Repeat("07", 32) + `"}`
	for _, c := range []struct {
		body string
		a    edge.Asked
		want string
	}{
		{"", shown, "request_malformed"},
		{`{"nonce":"zz"}`, shown, "request_malformed"},
		{`{"nonce":"07"}`, shown, "nonce_length"},
		{`{"nonce":"` + strings.Repeat("07", 65) + `"}`, shown, "nonce_length"},
		{`{"nonce":"` + strings.Repeat("07", 32) + `","spki":"00"}`, shown, "request_malformed"},
		{strings.Repeat(" ", maxRequest+1), shown, "request_too_large"},
		{nonce, edge.Asked{Address: instanceAddr}, "evidence_resumed"},
		{nonce, shown, "evidence_app"},
	} {
		if got := post(desk, c.body, c.a); got != c.want {
			t.Errorf("%.40q: %s, want %s", c.body, got, c.want)
		}
	}
	for range flights {
		desk.slots <- struct{}{}
	}
	if got := post(desk, nonce, shown); got != "evidence_rate_limited" {
		t.Error(got)
	}
	// What an instance may not answer is not passed on.
	honest := w.agent
	for name, edit := range map[string]func(*verifier.Source){
		"a gateway of its own": func(s *verifier.Source) { own := *s; s.Gateway = &own },
		"other keys":           func(s *verifier.Source) { s.ServedSPKIs = [][]byte{[]byte("another")} },
	} {
		w.agent = func(rw http.ResponseWriter, nonce []byte) {
			src, err := w.app.Answer(nonce, true)
			if err != nil {
				t.Error(err)
			}
			edit(&src)
			json.NewEncoder(rw).Encode(src)
		}
		if _, err := w.ask(nil); fault.Code(err) != "evidence_refused" || !strings.Contains(err.Error(), "the instance's evidence") {
			t.Errorf("%s: %v", name, err)
		}
	}
	w.agent = honest
}

func FuzzParseNonce(f *testing.F) {
	f.Add([]byte(`{"nonce":"` + strings.Repeat("07", 32) + `"}`))
	f.Add([]byte(`{"nonce":""}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if n, err := parseNonce(body); err == nil && (len(n) < channel.MinNonce || len(n) > channel.MaxNonce) {
			t.Errorf("%d bytes", len(n))
		}
	})
}
