// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/lease"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

func TestRegistration(t *testing.T) {
	w := newWorld(t, nil)
	a := w.instance(1, 1)
	r, err := a.register(nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.Wg.Servers[0].Pk != w.key.Public().String() || r.Wg.Servers[0].Ip != "100.96.0.1/11" || r.Wg.Servers[0].Endpoint != "gateway.example:51820" ||
		r.Agent.Domain != base || r.Agent.ExternalPort != 443 || r.Agent.InternalPort != 8090 || len(r.Gateways) != 1 {
		t.Errorf("%v", r)
	}
	if until := time.Unix(int64(r.LeaseUntil), 0); until.Sub(tdxtest.At) != time.Hour {
		t.Errorf("until %s", until)
	}
	rt, ok := w.table.Instance(a.guest.InstanceID)
	if !ok {
		t.Fatal("there is no route")
	}
	rec := rt.Record()
	if rec.App != a.guest.AppID || rec.Address.String() != r.Wg.ClientIp || rec.Key != a.wg.Public() || rec.Policy == nil {
		t.Errorf("%+v", rec)
	}
	if listed, others := rec.Policy.Ports(); len(listed) != 2 || others {
		t.Errorf("policy %v, %v", listed, others)
	}
	// Renewed, it keeps its address and its peer.
	w.pass(time.Second)
	again, err := a.register(nil)
	if err != nil || again.Wg.ClientIp != r.Wg.ClientIp || w.peers.sets != 1 {
		t.Errorf("%v, %v, %d sets", again, err, w.peers.sets)
	}
	// A new key replaces the old one.
	old := a.wg.Public()
	a.wg = w.instance(1, 1).wg
	w.pass(time.Second)
	if again, err = a.register(nil); err != nil || again.Wg.ClientIp != r.Wg.ClientIp {
		t.Fatal(err)
	}
	if _, there := w.peers.list[old]; there || len(w.peers.list) != 1 {
		t.Errorf("%d peers", len(w.peers.list))
	}
	// Another gateway gives the same address, without having asked this one.
	other := newWorld(t, nil)
	b := other.instance(1, 1)
	if r2, err := b.register(nil); err != nil || r2.Wg.ClientIp != r.Wg.ClientIp {
		t.Errorf("%v, %v", r2, err)
	}
}

// Threat K01: what a registration cannot take, and what is not taken from it.
func TestThreat_K01_RegistrationsAreTypedAndOwned(t *testing.T) {
	w := newWorld(t, nil)
	victim := w.instance(1, 1)
	if _, err := victim.register(nil); err != nil {
		t.Fatal(err)
	}
	key := func(b []byte) func(*api.RegisterCvmRequest) {
		return func(r *api.RegisterCvmRequest) { r.ClientPublicKey = base64.StdEncoding.EncodeToString(b) }
	}
	own := w.key.Public().Bytes()
	taken := victim.wg.Public().Bytes()
	for name, c := range map[string]struct {
		edit func(*api.RegisterCvmRequest)
		code string
	}{
		"31 bytes":               {key(make([]byte, 31)), "wg_key"},
		"33 bytes":               {key(make([]byte, 33)), "wg_key"},
		"a line of its own":      {func(r *api.RegisterCvmRequest) { r.ClientPublicKey += "\nEndpoint = 192.0.2.1:1" }, "wg_key"},
		"a key of low order":     {key(make([]byte, 32)), "wg_key"},
		"the gateway's key":      {key(own[:]), "route_key_own"},
		"another instance's key": {key(taken[:]), "route_key_taken"},
		"no manifest":            {func(r *api.RegisterCvmRequest) { r.AppCompose = nil }, "register_manifest"},
		"another manifest":       {func(r *api.RegisterCvmRequest) { r.AppCompose = append(r.AppCompose, 10) }, "register_manifest"},
		"a large manifest":       {func(r *api.RegisterCvmRequest) { r.AppCompose = make([]byte, 1<<20+1) }, "register_manifest"},
	} {
		_, err := w.instance(2, 1).register(c.edit)
		if fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	// An instance id of another app's instance is not the caller's to have.
	thief := w.instance(3, 1)
	thief.guest.InstanceID = victim.guest.InstanceID
	if _, err := thief.register(nil); fault.Code(err) != "route_instance_taken" {
		t.Errorf("another app's instance: %v", err)
	}
	// The policy is the measured one, whatever the request says.
	liar := w.instance(4, 1)
	if _, err := liar.register(func(r *api.RegisterCvmRequest) { r.PortPolicy = &api.PortPolicy{} }); err != nil {
		t.Fatal(err)
	}
	rt, _ := w.table.Instance(liar.guest.InstanceID)
	if _, others := rt.Record().Policy.Ports(); others {
		t.Error("the request's policy counts")
	}
	// Half a registration is none.
	w.peers.fail = errors.New("no tunnel")
	half := w.instance(5, 1)
	if _, err := half.register(nil); err == nil {
		t.Error("registered without a peer")
	}
	if _, ok := w.table.Instance(half.guest.InstanceID); ok {
		t.Error("a route without a peer stays")
	}
}

// Threat K03: nothing but evidence of this very connection registers.
func TestThreat_K03_RegistrationNeedsFreshEvidence(t *testing.T) {
	w := newWorld(t, nil)
	a := w.instance(1, 1)
	// A stolen TLS key with an old certificate that carries evidence.
	key, err := channel.KeyOf(a.signer)
	if err != nil {
		t.Fatal(err)
	}
	certifier, err := channel.NewCertifier(t.Context(), channel.CertifierConfig{Attester: a.guest, Key: key, Names: []string{"guest"}, Now: w.now})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := certifier.Certificate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, certs := range map[string][]tls.Certificate{"a stolen certificate": {*cert}, "no certificate": nil} {
		err := w.stranger(certs...).Call(t.Context(), "RegisterCvm", a.request(), new(api.RegisterCvmResponse))
		if fault.Code(err) != "register_unattested" || !strings.Contains(err.Error(), "no attestation provided") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What a stranger may ask.
	var info api.InfoResponse
	if err := w.stranger().Call(t.Context(), "Info", nil, &info); err != nil || info.BaseDomain != base {
		t.Errorf("%v, %v", &info, err)
	}
	for name, c := range map[string]struct {
		edit func(*instance)
		code string
	}{
		"an uncommitted key": {func(i *instance) { i.guest.ChannelSPKI = nil }, "channel_key_uncommitted"},
		"another's key":      {func(i *instance) { i.guest.ChannelSPKI = w.instance(7, 7).key.SPKI() }, "channel_key_mismatch"},
		"a guest that boots": {func(i *instance) { i.guest.Booting = true }, "register_booting"},
		"another platform":   {func(i *instance) { i.guest.Platform = tdxtest.New(t) }, "unknown_root"},
		"no instance id":     {func(i *instance) { i.guest.InstanceID = dstack.InstanceID{} }, "route_identity"},
	} {
		i := w.instance(6, 1)
		c.edit(i)
		if _, err := i.register(nil); fault.Code(err) != c.code && !strings.Contains(errText(err), c.code) {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		} else if err != nil {
			if _, ok := w.table.Instance(i.guest.InstanceID); ok {
				t.Errorf("%s has a route", name)
			}
		}
	}
}

// A connection that is kept open has the evidence that it began with: asking again over it
// renews nothing, and after a removal brings nothing back.
func TestThreat_K03_AnOldConnectionIsOldEvidence(t *testing.T) {
	w := newWorld(t, nil)
	a := w.instance(1, 1)
	tr := a.config().Transport()
	defer tr.CloseIdleConnections()
	c := &prpc.Client{BaseURL: "https://" + w.addr + "/prpc", HTTP: &http.Client{Transport: tr}}
	ask := func() (*api.RegisterCvmResponse, error) {
		out := new(api.RegisterCvmResponse)
		return out, c.Call(t.Context(), "RegisterCvm", a.request(), out)
	}
	first, err := ask()
	if err != nil {
		t.Fatal(err)
	}
	w.pass(2 * time.Minute)
	if again, err := ask(); err != nil || again.LeaseUntil != first.LeaseUntil {
		t.Errorf("%d after %d, %v", again.LeaseUntil, first.LeaseUntil, err)
	}
	w.pass(4 * time.Minute)
	if _, err := ask(); fault.Code(err) != "route_evidence_stale" {
		t.Errorf("evidence of six minutes: %v", err)
	}
	w.table.Remove(a.guest.InstanceID)
	if _, err := ask(); err == nil {
		t.Error("removed, it is back by what it showed before")
	}
	w.pass(time.Second)
	if r, err := a.register(nil); err != nil || r.LeaseUntil <= first.LeaseUntil {
		t.Errorf("with new evidence: %v, %v", r, err)
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// leased is a KMS's lease.
func leased(t *testing.T, key *ecdsa.PrivateKey, i *instance, edit func(*lease.Document)) (document, signature []byte) {
	t.Helper()
	d := &lease.Document{AppID: i.guest.AppID, InstanceID: i.guest.InstanceID[:], ComposeHash: i.guest.ComposeHash, OSImageHash: image[:],
		NotBefore: tdxtest.At.Add(-time.Minute), NotAfter: tdxtest.At.Add(20 * time.Minute), Log: "log"}
	if edit != nil {
		edit(d)
	}
	document, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(append([]byte(lease.Context+"\n"), document...))
	signature, err = ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return document, signature
}

// Threat G05: whom the KMS does not authorise any more has no route, when the lease ends.
func TestThreat_G05_RoutesEndWithTheLease(t *testing.T) {
	kms, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.MarshalPKIXPublicKey(kms.Public())
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(_ *world, c *gateway.Config) { c.Admission = gateway.ByLease{Root: root} })
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := w.instance(1, 1)
	show := func(key *ecdsa.PrivateKey, edit func(*lease.Document)) func(*api.RegisterCvmRequest) {
		return func(r *api.RegisterCvmRequest) { r.LeaseDocument, r.LeaseSignature = leased(t, key, a, edit) }
	}
	for name, c := range map[string]struct {
		edit func(*api.RegisterCvmRequest)
		code string
	}{
		"none":           {nil, "register_lease_missing"},
		"another's word": {show(stranger, nil), "lease_signature"},
		"ended": {show(kms, func(d *lease.Document) {
			d.NotBefore, d.NotAfter = tdxtest.At.Add(-time.Hour), tdxtest.At.Add(-time.Second)
		}), "lease_ended"},
		"not begun":        {show(kms, func(d *lease.Document) { d.NotBefore = tdxtest.At.Add(10 * time.Minute) }), "lease_not_yet"},
		"another app":      {show(kms, func(d *lease.Document) { d.AppID = dstack.AppID{2} }), "register_lease_other"},
		"another instance": {show(kms, func(d *lease.Document) { d.InstanceID = make([]byte, 20) }), "register_lease_other"},
		"another manifest": {show(kms, func(d *lease.Document) { d.ComposeHash = dstack.ComposeHash{9} }), "register_lease_other"},
		"another OS image": {show(kms, func(d *lease.Document) { d.OSImageHash = make([]byte, 32) }), "register_lease_other"},
	} {
		if _, err := a.register(c.edit); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	r, err := a.register(show(kms, nil))
	if err != nil {
		t.Fatal(err)
	}
	if until := time.Unix(int64(r.LeaseUntil), 0); !until.Equal(tdxtest.At.Add(20 * time.Minute)) {
		t.Errorf("the route is until %s, the lease until %s", until, tdxtest.At.Add(20*time.Minute))
	}
}

// What operators say of gateways: one that is down takes no new instance and keeps those that
// it has, and guests are told neither of it nor of an old URL.
func TestOperatorsSayWhichGatewaysThereAre(t *testing.T) {
	var down atomic.Bool
	w := newWorld(t, func(_ *world, c *gateway.Config) {
		second, third := c.Node, c.Node
		second.ID, second.URL, second.Address = 2, "https://two.example:8000", netip.MustParsePrefix("100.96.0.2/11")
		third.ID, third.URL, third.Address = 3, "https://three.example:8000", netip.MustParsePrefix("100.96.0.3/11")
		c.Peers = func() []gateway.Node { return []gateway.Node{second, third} }
		c.Told = func(n gateway.Node) (gateway.Node, bool) {
			if n.ID == 2 {
				n.URL = "https://new.example:8000"
			}
			return n, n.ID != 3
		}
		c.Closed = func() error {
			if down.Load() {
				return fault.New("register_node_down", "this gateway node is marked as down and cannot accept new registrations")
			}
			return nil
		}
	})
	known, late := w.instance(1, 1), w.instance(1, 2)
	r, err := known.register(nil)
	if err != nil {
		t.Fatal(err)
	}
	var urls []string
	for _, g := range r.Gateways {
		urls = append(urls, g.Url)
	}
	if !slices.Equal(urls, []string{"https://gateway.example:8000", "https://new.example:8000"}) || len(r.Wg.Servers) != 2 {
		t.Errorf("%v, %d servers", urls, len(r.Wg.Servers))
	}
	down.Store(true)
	if _, err := late.register(nil); fault.Code(err) != "register_node_down" || !strings.Contains(err.Error(), "marked as down") {
		t.Errorf("a new instance: %v", err)
	}
	if _, err := known.register(nil); err != nil {
		t.Errorf("one that is known: %v", err)
	}
	down.Store(false)
	if _, err := late.register(nil); err != nil {
		t.Error(err)
	}
}

func TestTheZeroAdmissionIsNone(t *testing.T) {
	if _, err := gateway.New(gateway.Config{}); fault.Code(err) != "gateway_config" {
		t.Error(err)
	}
	if _, err := (gateway.ByLease{}).Admit(context.Background(), &applicant.Applicant{}, gateway.Lease{Document: []byte("{}")}, time.Now()); err == nil {
		t.Error("a lease of nobody's counts")
	}
}

func TestCertificatesForWhatIsOnesOwn(t *testing.T) {
	w := newWorld(t, nil)
	a := w.instance(1, 1)
	app, inst := a.guest.AppID.String(), a.guest.InstanceID.String()
	get := func(csr []byte) (*api.GetCertificateResponse, error) {
		out := new(api.GetCertificateResponse)
		return out, a.call("GetCertificate", &api.GetCertificateRequest{Csr: csr}, out)
	}
	r, err := get(a.csr(a.signer, app+"-8080."+base, inst+"."+base))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(r.Chain))
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if leaf.VerifyHostname(app+"-8080."+base) != nil || leaf.VerifyHostname(inst+"."+base) != nil || int64(r.NotAfter) != leaf.NotAfter.Unix() || r.RenewAt >= r.NotAfter {
		t.Errorf("%v", leaf.DNSNames)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	many := make([]string, 65)
	for i := range many {
		many[i] = app + "-" + string(rune('1'+i%9)) + "." + base
	}
	for name, c := range map[string]struct {
		csr  []byte
		code string
	}{
		"another app's name": {a.csr(a.signer, dstack.AppID{2}.String()+"."+base), "certificate_name"},
		"one of two is not":  {a.csr(a.signer, app+"."+base, dstack.AppID{2}.String()+"."+base), "certificate_name"},
		"the gateway's name": {a.csr(a.signer, "gateway."+base), "certificate_name"},
		"the base domain":    {a.csr(a.signer, base), "certificate_name"},
		"a wildcard":         {a.csr(a.signer, "*."+base), "certificate_name"},
		"another domain":     {a.csr(a.signer, app+".bank.example"), "certificate_none"},
		"no name":            {a.csr(a.signer), "certificate_name"},
		"many names":         {a.csr(a.signer, many...), "certificate_name"},
		"another key":        {a.csr(other, app+"."+base), "certificate_key"},
		"no request":         {[]byte{0x30}, "certificate_request"},
		"a large request":    {make([]byte, 16<<10+1), "certificate_request"},
	} {
		if _, err := get(c.csr); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	bad := a.csr(a.signer, app+"."+base)
	bad[len(bad)-1] ^= 1
	if _, err := get(bad); fault.Code(err) != "certificate_request" {
		t.Errorf("a broken signature: %v", err)
	}
}

// What was routed before a restart is routed after it, without a guest's call.
func TestRoutesSurviveARestart(t *testing.T) {
	w := newWorld(t, nil)
	a := w.instance(1, 1)
	if _, err := a.register(nil); err != nil {
		t.Fatal(err)
	}
	w.peers.mu.Lock()
	p := w.peers.list[a.wg.Public()]
	p.Endpoint = endpointOf(t, "192.0.2.7:1234")
	w.peers.list[a.wg.Public()] = p
	w.peers.mu.Unlock()
	file := filepath.Join(t.TempDir(), "routes")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.service.Keep(ctx, file) }()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if text, err := os.ReadFile(file + ".endpoints"); err == nil && strings.HasSuffix(string(text), " 192.0.2.7:1234\n") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("not kept")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	next := newWorld(t, nil)
	if err := next.service.Restore(file); err != nil {
		t.Fatal(err)
	}
	got, ok := next.peers.list[a.wg.Public()]
	if at, known := got.Endpoint.Addr(); !ok || !known || at.String() != "192.0.2.7:1234" || got.Keepalive == 0 {
		t.Errorf("%+v", got)
	}
	if _, ok := next.table.Instance(a.guest.InstanceID); !ok {
		t.Error("the route is gone")
	}
	// A file that cannot be read is no reason not to start.
	for _, text := range []string{"", "x", strings.Repeat("\x00", 1000), "{}\n{}\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file+".endpoints", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := newWorld(t, nil).service.Restore(file); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestTheManifestHasAGateway(t *testing.T) {
	m, err := manifest.Parse(newWorld(t, nil).manifest)
	if err != nil || !m.GatewayWanted() {
		t.Error(err)
	}
}
