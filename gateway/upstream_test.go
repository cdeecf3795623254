// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/manifest"
)

// authorities are a KMS as far as certificates go.
type authorities struct {
	t    *testing.T
	root *certificate.Authority
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthorities(t *testing.T, now time.Time) *authorities {
	t.Helper()
	root, err := certificate.Self(newKey(t), certificate.Subject{Organization: "Dstack", Name: "Dstack KMS CA", Path: 1}, ratls.Issued{}, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	return &authorities{t, root}
}

func (k *authorities) spki() []byte { return k.root.Certificate.RawSubjectPublicKeyInfo }

// form is a certificate to be issued.
type form struct {
	app      ratls.Issued // of the app CA
	leaf     certificate.Leaf
	key      *ecdsa.PrivateKey
	at       time.Time
	noAppCA  bool
	evidence func(spki []byte) []byte
}

// issue makes the certificate that upstream's guest has of instance i; edit changes it.
func (k *authorities) issue(i *instance, edit func(*form)) tls.Certificate {
	k.t.Helper()
	id := i.guest.AppID
	info := &ratls.AppInfo{AppID: id, ComposeHash: i.guest.ComposeHash, InstanceID: i.guest.InstanceID[:], OSImageHash: image[:]}
	f := &form{
		app: ratls.Issued{AppID: &id, Usage: ratls.UsageAppCA}, key: newKey(k.t), at: i.w.now(),
		leaf: certificate.Leaf{Config: csr.Config{Subject: "dstack-guest-agent", ClientAuth: true}, Issued: ratls.Issued{AppID: &id, Usage: ratls.UsageApp, Info: info}, MaxLifetime: 10 * 24 * time.Hour},
	}
	if edit != nil {
		edit(f)
	}
	f.leaf.Public = &f.key.PublicKey
	spki, err := x509.MarshalPKIXPublicKey(&f.key.PublicKey)
	if err != nil {
		k.t.Fatal(err)
	}
	if f.evidence != nil {
		f.leaf.Evidence = f.evidence(spki)
	}
	ca, err := k.root.Authority(newKey(k.t), certificate.Subject{Organization: "Dstack", Name: "Dstack App CA"}, f.app, f.at)
	if err != nil {
		k.t.Fatal(err)
	}
	der, err := ca.Issue(f.leaf, f.at)
	if err != nil {
		k.t.Fatal(err)
	}
	chain := [][]byte{der, ca.Certificate.Raw, k.root.Certificate.Raw}
	if f.noAppCA {
		chain = chain[:1]
	}
	return tls.Certificate{Certificate: chain, PrivateKey: f.key}
}

// evidenceOf is the guest's, over a certificate's key.
func evidenceOf(t *testing.T, i *instance) func([]byte) []byte {
	return func(spki []byte) []byte {
		raw, err := i.guest.Attest(context.Background(), ratls.ReportData(spki))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
}

// upstreamWorld is a gateway that upstream's guests may register at. agent answers at
// 8090 of every instance.
func upstreamWorld(t *testing.T, agent http.Handler, edit func(*gateway.Config)) (*world, *authorities) {
	t.Helper()
	var k *authorities
	var own tls.Certificate
	var addr string
	if agent != nil {
		srv := httptest.NewServer(agent)
		t.Cleanup(srv.Close)
		addr = srv.Listener.Addr().String()
	}
	w := newWorld(t, func(w *world, c *gateway.Config) {
		k = newAuthorities(t, w.now())
		self := &instance{w: w, guest: w.self}
		own = k.issue(self, func(f *form) {
			f.leaf.ServerAuth, f.leaf.Names = true, []string{"gateway." + base}
		})
		c.Upstream = &gateway.Upstream{
			CA: k.spki(), Certificate: func() *tls.Certificate { return &own },
			Dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
				if to.Port() != 8090 {
					t.Errorf("asks %s", to)
				}
				return new(net.Dialer).DialContext(ctx, "tcp", addr)
			},
		}
		if edit != nil {
			edit(c)
		}
	})
	return w, k
}

// upstreamGuest calls as upstream's does: it trusts its KMS's root alone.
func (k *authorities) register(w *world, i *instance, cert *tls.Certificate, edit func(*api.RegisterCvmRequest)) (*api.RegisterCvmResponse, error) {
	k.t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(k.root.Certificate)
	certs := []tls.Certificate{}
	if cert != nil {
		certs = append(certs, *cert)
	}
	c := w.stranger(certs...)
	tr := c.HTTP.Transport.(*http.Transport)
	tr.TLSClientConfig.RootCAs = roots
	defer tr.CloseIdleConnections()
	r := i.request()
	r.AppCompose = nil
	if edit != nil {
		edit(r)
	}
	out := new(api.RegisterCvmResponse)
	return out, c.Call(k.t.Context(), "RegisterCvm", r, out)
}

func reported(ports ...uint32) func(*api.RegisterCvmRequest) {
	return func(r *api.RegisterCvmRequest) {
		r.PortPolicy = &api.PortPolicy{RestrictMode: true}
		for _, p := range ports {
			r.PortPolicy.Ports = append(r.PortPolicy.Ports, &api.PortAttrs{Port: p, Pp: true})
		}
	}
}

func TestUpstreamsGuestsRegisterByCertificate(t *testing.T) {
	w, k := upstreamWorld(t, nil, nil)
	a := w.instance(1, 1)
	cert := k.issue(a, nil)
	out, err := k.register(w, a, &cert, reported(80))
	if err != nil {
		t.Fatal(err)
	}
	rt, ok := w.table.Instance(a.guest.InstanceID)
	if !ok || !rt.Record().CertificateOnly || rt.Record().Policy == nil {
		t.Fatalf("%+v", rt)
	}
	if ports, others := rt.Record().Policy.Ports(); others || len(ports) != 1 || ports[0].Number != 80 || !ports[0].PROXY {
		t.Errorf("policy %v", ports)
	}
	// As upstream's guest reads it: a bare address, and servers with the network's length.
	if _, err := netip.ParseAddr(out.Wg.ClientIp); err != nil || len(out.Wg.Servers) != 1 || out.Wg.Servers[0].Ip != "100.96.0.1/11" || out.Agent.InternalPort != 8090 || out.Agent.Domain != base {
		t.Errorf("%+v", out)
	}
	if until := time.Unix(int64(out.LeaseUntil), 0); until.Sub(w.now()) > time.Hour {
		t.Errorf("until %s", until)
	}
	if n := w.service.Stats().Certified.Load(); n != 1 {
		t.Errorf("%d by certificate", n)
	}
	// A certificate that ends soon is good for as long.
	w.pass(time.Second)
	b := w.instance(1, 2)
	short := k.issue(b, func(f *form) { f.leaf.MaxLifetime = 10 * time.Minute })
	if out, err = k.register(w, b, &short, reported(80)); err != nil || time.Unix(int64(out.LeaseUntil), 0).Sub(w.now()) > 10*time.Minute {
		t.Errorf("%+v, %v", out, err)
	}
	// It survives the disk as what it is.
	text, err := w.table.Dump()
	if err != nil || bytes.Count(text, []byte(`"certificate_only":true`)) != 2 {
		t.Errorf("%s, %v", text, err)
	}
}

func TestThreat_K03_WhatACertificateDoesNotDo(t *testing.T) {
	w, k := upstreamWorld(t, nil, nil)
	a := w.instance(1, 1)
	other := newAuthorities(t, w.now())
	for name, c := range map[string]struct {
		by   *authorities
		edit func(*form)
		code string
	}{
		"of another KMS":          {other, nil, "register_certificate"},
		"without its CA":          {k, func(f *form) { f.noAppCA = true }, "register_certificate"},
		"that has ended":          {k, func(f *form) { f.at = w.now().Add(-11 * 24 * time.Hour) }, "register_certificate"},
		"of no client":            {k, func(f *form) { f.leaf.ClientAuth, f.leaf.ServerAuth = false, true }, "register_certificate"},
		"for another use":         {k, func(f *form) { f.leaf.Issued.Usage = ratls.UsageKMS }, "register_certificate"},
		"of a CA for other uses":  {k, func(f *form) { f.app.Usage = ratls.UsageKMS }, "register_certificate"},
		"of another app's CA":     {k, func(f *form) { f.app.AppID = &dstack.AppID{7} }, "register_certificate"},
		"that says another app":   {k, func(f *form) { f.leaf.Issued.Info.AppID = dstack.AppID{7} }, "register_certificate"},
		"that says nothing":       {k, func(f *form) { f.leaf.Issued.Info = nil }, "register_unattested"},
		"of no instance":          {k, func(f *form) { f.leaf.Issued.Info.InstanceID = nil }, "register_no_instance"},
		"with another's evidence": {k, func(f *form) { f.evidence = evidenceOf(t, w.instance(1, 2)) }, "register_certificate"},
		"with evidence of another key": {k, func(f *form) {
			f.evidence = func([]byte) []byte { return evidenceOf(t, a)([]byte("another")) }
		}, "ratls_report_data_mismatch"},
	} {
		cert := c.by.issue(a, c.edit)
		_, err := k.register(w, a, &cert, reported(80))
		if fault.Code(err) != c.code {
			t.Errorf("a certificate %s: %v, want %s", name, err, c.code)
		}
		if c.code == "register_unattested" && !strings.Contains(err.Error(), "no attestation provided") {
			t.Errorf("upstream's guest does not know %v", err)
		}
	}
	if _, err := k.register(w, a, nil, nil); fault.Code(err) != "register_unattested" || !strings.Contains(err.Error(), "no attestation provided") {
		t.Errorf("no certificate: %v", err)
	}
	if n := w.table.Len(); n != 0 {
		t.Fatalf("%d routes", n)
	}
	// It gets no certificates for names, and replaces no fresh evidence.
	cert := k.issue(a, nil)
	if err := w.stranger(cert).Call(t.Context(), "GetCertificate", &api.GetCertificateRequest{Csr: a.csr(a.signer, a.guest.AppID.String()+"."+base)}, new(api.GetCertificateResponse)); err == nil {
		t.Error("a certificate by certificate only")
	}
	if _, err := k.register(w, a, &cert, reported(80)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.register(nil); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	thief := *a
	thief.wg = w.instance(1, 1).wg
	if _, err := k.register(w, &thief, &cert, reported(80, 81)); fault.Code(err) != "route_downgrade" {
		t.Errorf("a certificate in place of fresh evidence: %v", err)
	}
	if rt, _ := w.table.Instance(a.guest.InstanceID); rt.Record().CertificateOnly || rt.Record().Key != a.wg.Public() {
		t.Errorf("%+v", rt.Record())
	}
	// Unless what it was is over.
	w.pass(2 * time.Hour)
	again := k.issue(a, nil)
	if _, err := k.register(w, a, &again, reported(80)); err != nil {
		t.Error(err)
	}
}

// Where an authority decides over evidence, a certificate must carry some: upstream's
// guest tries the one that does when it is told so.
func TestUpstreamsGuestsBeforeAnAuthority(t *testing.T) {
	var asked atomic.Int64
	w, k := upstreamWorld(t, nil, func(c *gateway.Config) { c.Admission = gateway.ByAuthority{Authority: counting{&asked}} })
	a := w.instance(1, 1)
	plain := k.issue(a, nil)
	if _, err := k.register(w, a, &plain, reported(80)); fault.Code(err) != "register_unattested" || !strings.Contains(err.Error(), "no attestation provided") {
		t.Errorf("without evidence: %v", err)
	}
	if asked.Load() != 0 {
		t.Error("the authority was asked about a certificate")
	}
	quote := k.issue(a, func(f *form) { f.evidence = evidenceOf(t, a) })
	if _, err := k.register(w, a, &quote, reported(80)); err != nil || asked.Load() != 1 {
		t.Errorf("with evidence: %v, asked %d times", err, asked.Load())
	}
	other := gateway.ByLease{Root: newAuthorities(t, w.now()).spki()}
	if _, err := other.AdmitCertificate(k.spki(), nil, w.now()); fault.Code(err) != "register_certificate_other" {
		t.Error(err)
	}
}

// counting is an authority that allows all that it is asked.
type counting struct{ n *atomic.Int64 }

func (c counting) Decide(_ context.Context, q governance.Request) (governance.Decision, error) {
	c.n.Add(1)
	return governance.Decision{Allowed: q.Boot.AppID == dstack.AppID{1} && !q.Session, Code: "x", Reason: "x"}, nil
}

func (counting) About(context.Context) (governance.About, error) { return governance.About{}, nil }

// Until the manifest that the certificate names has been seen, ports are closed.
func TestThePolicyOfUpstreamsGuestsIsFetched(t *testing.T) {
	text, err := manifest.Build(manifest.Draft{Name: "old", DockerComposeFile: "services: {}\n", GatewayEnabled: true, PortPolicy: &manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 7777}}}})
	if err != nil {
		t.Fatal(err)
	}
	answer := func(tcb string) []byte {
		out, _ := json.Marshal(map[string]any{"tcb_info": tcb, "app_name": "old"})
		return out
	}
	manifestOf := func(compose string) string {
		out, _ := json.Marshal(map[string]any{"app_compose": compose, "mrtd": ""})
		return string(out)
	}
	var body atomic.Pointer[[]byte]
	var calls, fails atomic.Int64
	agent := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.String() != "/prpc/Info?json" || r.Method != "POST" {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		calls.Add(1)
		if fails.Add(-1) >= 0 {
			http.Error(rw, "not yet", http.StatusServiceUnavailable)
			return
		}
		rw.Write(*body.Load())
	})
	w, k := upstreamWorld(t, agent, nil)
	w.manifest = text
	known := func(i *instance) (ports []uint16, any, ok bool) {
		rt, is := w.table.Instance(i.guest.InstanceID)
		if !is || rt.Record().Policy == nil {
			return nil, false, false
		}
		list, others := rt.Record().Policy.Ports()
		for _, p := range list {
			ports = append(ports, p.Number)
		}
		return ports, others, true
	}
	until := func(ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it does not come about")
			}
		}
	}
	for n, c := range []struct {
		name  string
		body  []byte
		fails int64
		ports int // -1: unknown, -2: all
	}{
		{"the manifest", answer(manifestOf(string(text))), 0, 1},
		{"not at once", answer(manifestOf(string(text))), 1, 1},
		{"another manifest", answer(manifestOf(strings.Replace(string(text), "7777", "7778", 1))), 0, -1},
		{"no JSON", []byte("<html>"), 0, -1},
		{"a broken tcb_info", answer("{"), 0, -1},
		{"too much", bytes.Repeat([]byte(" "), 4<<20+1), 0, -1},
		{"what is not public", answer(""), 0, -2},
	} {
		w.pass(time.Second)
		calls.Store(0)
		fails.Store(c.fails)
		body.Store(&c.body)
		i := w.instance(3, byte(n+1))
		cert := k.issue(i, nil)
		if _, err := k.register(w, i, &cert, nil); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		// Asked again meanwhile, it is one question still.
		w.pass(time.Second)
		if _, err := k.register(w, i, &cert, nil); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		w.pass(time.Second)
		if c.ports == -1 {
			until(func() bool { return calls.Load() > 0 })
			time.Sleep(50 * time.Millisecond)
			if _, _, ok := known(i); ok {
				t.Errorf("%s: the policy is known", c.name)
			}
			continue
		}
		until(func() bool { _, _, ok := known(i); return ok })
		ports, any, _ := known(i)
		if any != (c.ports == -2) || !any && len(ports) != c.ports {
			t.Errorf("%s: %v, %v", c.name, ports, any)
		}
		// It stays when the guest comes again without one.
		w.pass(time.Second)
		if _, err := k.register(w, i, &cert, nil); err != nil {
			t.Fatal(err)
		}
		if _, _, ok := known(i); !ok {
			t.Errorf("%s: the policy is forgotten", c.name)
		}
	}
}

// Strangers see the KMS's certificate, and our own guests are served as ever.
func TestAttestedChannelsBesideUpstreamsGuests(t *testing.T) {
	w, _ := upstreamWorld(t, nil, nil)
	if _, err := w.instance(1, 1).register(nil); err != nil {
		t.Fatal(err)
	}
	for name, u := range map[string]*gateway.Upstream{"no KMS": {Certificate: func() *tls.Certificate { return nil }}, "nothing": {}} {
		cfg := gateway.Config{}
		newWorld(t, func(_ *world, c *gateway.Config) { cfg = *c })
		cfg.Upstream = u
		if _, err := gateway.New(cfg); fault.Code(err) != "gateway_config" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
