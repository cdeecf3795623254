// SPDX-License-Identifier: Apache-2.0

package kmsclient

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func at() time.Time { return tdxtest.At }

// world is a KMS's machine and a guest's, on one platform.
type world struct {
	platform *tdxtest.Platform
	kms, app *tdxtest.Guest
}

func newWorld(t *testing.T) *world {
	p := tdxtest.New(t)
	return &world{
		platform: p,
		kms:      &tdxtest.Guest{Platform: p, AppID: dstack.AppID{0xee}, InstanceID: dstack.InstanceID{1}, ComposeHash: dstack.ComposeHash{0xcc}},
		app:      &tdxtest.Guest{Platform: p, AppID: dstack.AppID{1}, InstanceID: dstack.InstanceID{2}, ComposeHash: dstack.ComposeHash{3}, Booting: true},
	}
}

// demand is a kms_policy that the world's KMS fits.
func (w *world) demand(t *testing.T) *manifest.PeerPolicy {
	t.Helper()
	roots, err := w.platform.DevRoots().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b := w.platform.Body()
	return &manifest.PeerPolicy{
		AppID: w.kms.AppID, ComposeHashes: []dstack.ComposeHash{{9}, w.kms.ComposeHash}, DevRoots: string(roots),
		Registers: map[string][][]byte{"mrtd": {b.MRTD[:]}, "rtmr0": {b.RTMR[0][:]}, "rtmr1": {b.RTMR[1][:]}, "rtmr2": {b.RTMR[2][:]}},
	}
}

func policy(t *testing.T, p *manifest.PeerPolicy) *Policy {
	t.Helper()
	out, err := PolicyOf(p, true, "https://127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func start(t *testing.T, opt kmstest.Options) *kmstest.Server {
	t.Helper()
	if opt.Now == nil {
		opt.Now = at
	}
	s, err := kmstest.Start(opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newClient(t *testing.T, cfg Config) *Client {
	t.Helper()
	if cfg.Now == nil {
		cfg.Now = at
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// keys asks for keys and returns where they came from.
func keys(t *testing.T, c *Client) (answer Answer, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err = Ask(ctx, c, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1}, func(r *kmsapi.AppKeyResponse, a Answer) error {
		answer = a
		if len(r.DiskCryptKey) != 32 {
			return errors.New("no keys")
		}
		_, err := a.RootOf(r.CaCert)
		return err
	})
	return answer, err
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("error %v (code %q), want code %q", err, fault.Code(err), code)
	}
}

func TestAFittingKMSIsAskedOverAnAttestedChannel(t *testing.T) {
	w := newWorld(t)
	s := start(t, kmstest.Options{Attester: w.kms})
	for name, root := range map[string][]byte{"pinned": s.SPKI(), "unpinned": nil} {
		a, err := keys(t, newClient(t, Config{URLs: []string{s.URL}, Root: root, Policy: policy(t, w.demand(t)), Attester: w.app}))
		if err != nil || !a.Session {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	for _, c := range s.Calls() {
		if !c.Session || c.Identity.AppID != w.app.AppID {
			t.Errorf("the KMS saw %+v", c)
		}
	}
}

// A KMS that knows no attested channels is judged by its certificate.
func TestAnOlderKMSIsAppraisedByItsCertificate(t *testing.T) {
	w := newWorld(t)
	s := start(t, kmstest.Options{Attester: w.kms, OnlyRATLS: true})
	a, err := keys(t, newClient(t, Config{URLs: []string{s.URL}, Root: s.SPKI(), Policy: policy(t, w.demand(t)), Attester: w.app}))
	if err != nil || a.Session || a.TempCACert == "" {
		t.Errorf("%+v, %v", a, err)
	}
	demand := w.demand(t)
	demand.RequireSession = true
	_, err = keys(t, newClient(t, Config{URLs: []string{s.URL}, Root: s.SPKI(), Policy: policy(t, demand), Attester: w.app}))
	wantCode(t, err, "kms_session")
	if n := len(s.Calls()); n != 1 {
		t.Errorf("it was asked for keys %d times", n)
	}
}

// Threat C04: the pinned key alone opens nothing where the manifest says what must hold it.
func TestThreat_C04_AKMSThatIsNotWhatTheManifestDemands(t *testing.T) {
	w := newWorld(t)
	other, err := tdxtest.New(t).DevRoots().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*manifest.PeerPolicy){
		"another app":      func(p *manifest.PeerPolicy) { p.AppID[0] ^= 1 },
		"another manifest": func(p *manifest.PeerPolicy) { p.ComposeHashes = p.ComposeHashes[:1] },
		"another machine":  func(p *manifest.PeerPolicy) { p.Devices = []dstack.DeviceID{{1}} },
		"another kernel":   func(p *manifest.PeerPolicy) { p.Registers["rtmr1"] = [][]byte{make([]byte, 48)} },
		"a system that nobody vouches for": func(p *manifest.PeerPolicy) {
			delete(p.Registers, "rtmr2")
		},
		"an image that it does not name": func(p *manifest.PeerPolicy) {
			p.Registers, p.OSImageHashes = nil, []dstack.ImageHash{{7}}
		},
		"other roots":       func(p *manifest.PeerPolicy) { p.DevRoots = string(other) },
		"the vendors' word": func(p *manifest.PeerPolicy) { p.DevRoots = "" },
	} {
		for _, only := range []bool{false, true} {
			s := start(t, kmstest.Options{Attester: w.kms, OnlyRATLS: only})
			demand := w.demand(t)
			edit(demand)
			p := policy(t, demand)
			_, err := keys(t, newClient(t, Config{URLs: []string{s.URL}, Root: s.SPKI(), Policy: p, Attester: w.app}))
			if fault.Code(err) != "kms_not_appraised" || len(s.Calls()) != 0 {
				t.Errorf("%s, RA-TLS %t: %v (code %q) after %d calls", name, only, err, fault.Code(err), len(s.Calls()))
			}
		}
	}
	bare := start(t, kmstest.Options{})
	_, err = keys(t, newClient(t, Config{URLs: []string{bare.URL}, Root: bare.SPKI(), Policy: policy(t, w.demand(t)), Attester: w.app}))
	wantCode(t, err, "kms_evidence_missing")
	if len(bare.Calls()) != 0 {
		t.Error("a KMS without evidence was asked for keys")
	}
}

// Threat C01: evidence of the right KMS that was made for another connection, as a
// thief of its TLS key would relay it.
func TestThreat_C01_EvidenceThatAKMSMadeForAnother(t *testing.T) {
	w := newWorld(t)
	old, err := w.kms.Attest(t.Context(), dstack.ReportData{1})
	if err != nil {
		t.Fatal(err)
	}
	for _, only := range []bool{false, true} {
		s, err := kmstest.Start(kmstest.Options{Now: at, OnlyRATLS: only, Attester: channel.AttesterFunc(func(context.Context, dstack.ReportData) ([]byte, error) { return old, nil })})
		if err != nil {
			t.Fatal(err)
		}
		_, err = keys(t, newClient(t, Config{URLs: []string{s.URL}, Root: s.SPKI(), Policy: policy(t, w.demand(t)), Attester: w.app}))
		wantCode(t, err, "kms_not_appraised")
		if len(s.Calls()) != 0 {
			t.Error("it was asked for keys")
		}
		s.Close()
	}
}

// A KMS whose channel is refused is not asked in the weaker way.
func TestThreat_C03_ARefusalIsNoReasonToAskOtherwise(t *testing.T) {
	w := newWorld(t)
	var asked atomic.Int32
	evil := *w.kms
	evil.ComposeHash[0] ^= 1
	s := start(t, kmstest.Options{Attester: channel.AttesterFunc(func(ctx context.Context, d dstack.ReportData) ([]byte, error) {
		if asked.Add(1) == 1 { // for the certificate
			return w.kms.Attest(ctx, d)
		}
		return evil.Attest(ctx, d)
	})})
	_, err := keys(t, newClient(t, Config{URLs: []string{s.URL}, Root: s.SPKI(), Policy: policy(t, w.demand(t)), Attester: w.app}))
	wantCode(t, err, "kms_not_appraised")
	if len(s.Calls()) != 0 {
		t.Error("it was asked for keys")
	}
	// Nor one that refuses this guest: it has decided.
	denying := start(t, kmstest.Options{Attester: w.kms, Allow: func(kmstest.Call) error { return errors.New("no") }})
	_, err = keys(t, newClient(t, Config{URLs: []string{denying.URL}, Root: denying.SPKI(), Policy: policy(t, w.demand(t)), Attester: w.app}))
	wantCode(t, err, "kms_denied")
	if n := len(denying.Calls()); n != 1 {
		t.Errorf("it was asked %d times", n)
	}
}

func TestPoliciesThatNoGuestHas(t *testing.T) {
	w := newWorld(t)
	_, err := PolicyOf(w.demand(t), false, "")
	wantCode(t, err, "peer_dev_roots")
	bad := w.demand(t)
	bad.DevRoots = "{}"
	_, err = PolicyOf(bad, true, "")
	wantCode(t, err, "dev_roots_malformed")
	_, err = PolicyOf(w.demand(t), true, "http://10.0.2.2")
	wantCode(t, err, "collateral_url")
	if p, err := PolicyOf(nil, false, "http://10.0.2.2"); p != nil || err != nil {
		t.Errorf("no kms_policy: %v, %v", p, err)
	}
}

// silence is a server that takes connections and says nothing.
func silence(t *testing.T) (url string, connections func() int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	n := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			n++
			mu.Unlock()
			wg.Go(func() { io.Copy(io.Discard, c); c.Close() })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return "https://" + l.Addr().String(), func() int { mu.Lock(); defer mu.Unlock(); return n }
}

// An address that says nothing holds nobody up, and is not the first to be asked again.
func TestTheNextAddressIsAskedWhenOneIsSilent(t *testing.T) {
	w := newWorld(t)
	mute, connections := silence(t)
	s := start(t, kmstest.Options{})
	c := newClient(t, Config{URLs: []string{mute, s.URL}, Root: s.SPKI(), Attester: w.app})
	c.silence = time.Second
	begin := time.Now()
	for range 3 {
		if a, err := keys(t, c); err != nil || !strings.HasPrefix(a.URL, s.URL) {
			t.Fatalf("%+v, %v", a, err)
		}
	}
	if d := time.Since(begin); d > ConnectTimeout || connections() != 1 {
		t.Errorf("it took %s, with %d connections to the silent one", d, connections())
	}
	if Silence > 5*time.Second {
		t.Errorf("a dead KMS holds up others for %s", Silence)
	}
}

// One KMS's refusal is final only when no other gives: the first refusal is what is told.
func TestARefusalCountsWhenNoOtherGives(t *testing.T) {
	w := newWorld(t)
	root := bytes.Repeat([]byte{5}, 32)
	good := start(t, kmstest.Options{RootCA: root})
	first := start(t, kmstest.Options{RootCA: root, Allow: func(kmstest.Call) error { return errors.New("first") }})
	second := start(t, kmstest.Options{RootCA: root, Allow: func(kmstest.Call) error { return errors.New("second") }})
	if _, err := keys(t, newClient(t, Config{URLs: []string{first.URL, good.URL}, Root: good.SPKI(), Attester: w.app})); err != nil {
		t.Error(err)
	}
	_, err := keys(t, newClient(t, Config{URLs: []string{"https://127.0.0.1:1", first.URL, second.URL}, Root: good.SPKI(), Attester: w.app}))
	wantCode(t, err, "kms_denied")
	if text := err.Error(); strings.Index(text, "first") > strings.Index(text, "second") || !strings.Contains(text, "127.0.0.1:1:") {
		t.Errorf("%v", err)
	}
	_, err = keys(t, newClient(t, Config{URLs: []string{"https://127.0.0.1:1"}, Root: good.SPKI(), Attester: w.app}))
	wantCode(t, err, "kms_unreachable")
}

// However many answer, one answer is taken, and no key stays in memory that is the
// client's.
func TestOneAnswerIsTakenAndAllAreWiped(t *testing.T) {
	w := newWorld(t)
	root := bytes.Repeat([]byte{5}, 32)
	slow := start(t, kmstest.Options{RootCA: root, Allow: func(kmstest.Call) error { time.Sleep(200 * time.Millisecond); return nil }})
	quick := start(t, kmstest.Options{RootCA: root})
	c := newClient(t, Config{URLs: []string{slow.URL, quick.URL}, Root: quick.SPKI(), Attester: w.app})
	c.silence = time.Millisecond
	taken := 0
	var seen [][]byte
	err := Ask(t.Context(), c, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1}, func(r *kmsapi.AppKeyResponse, _ Answer) error {
		taken++
		time.Sleep(500 * time.Millisecond) // in which the slow one answers
		seen = append(seen, r.DiskCryptKey, r.EnvCryptKey, r.K256Key)
		return nil
	})
	if err != nil || taken != 1 {
		t.Fatalf("%d answers taken, %v", taken, err)
	}
	for _, key := range seen {
		if len(key) != 32 || !bytes.Equal(key, make([]byte, 32)) {
			t.Errorf("%x stays in memory", key)
		}
	}
	r := &kmsapi.AppKeyResponse{Epochs: []*kmsapi.EpochKeys{{Disk: []byte{1}}}, Lease: &kmsapi.Lease{Document: []byte{1}}}
	wipe(r.ProtoReflect())
	if r.Epochs[0].Disk[0]|r.Lease.Document[0] != 0 {
		t.Error("what lies deeper is not wiped")
	}
}

func TestConfigurationsThatNoClientHas(t *testing.T) {
	w := newWorld(t)
	_, err := New(Config{URLs: []string{"https://a"}})
	wantCode(t, err, "key_evidence")
	_, err = New(Config{Attester: w.app})
	wantCode(t, err, "kms_url")
	_, err = New(Config{Attester: w.app, URLs: []string{"https://a"}, Root: []byte("x")})
	wantCode(t, err, "kms_pin")
	for in, want := range map[string]string{"https://a/": "https://a/prpc", "https://a:1/prpc": "https://a:1/prpc", "https://a/b/prpc/": "https://a/b/prpc"} {
		if got, err := parseURL(in); err != nil || got.base != want {
			t.Errorf("%s: %s, %v; want %s", in, got.base, err, want)
		}
	}
}
