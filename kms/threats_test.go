// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/webhook"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/keys/lease"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/releaselog"
)

// sessionOf is session with more to say.
func (w *world) sessionOf(c channel.Config) *prpc.Client {
	w.t.Helper()
	if c.Appraiser == nil {
		c.Appraiser = kmsAppraiser{w}
	}
	if c.Intended.AppID.IsZero() {
		c.Intended.AppID = kmsApp
	}
	c.AppEvidence, c.Now, c.Timeout = true, w.clock, 20*time.Second
	transport := c.Transport()
	dial := transport.DialTLSContext
	transport.DialTLSContext = w.dialler(dial)
	w.t.Cleanup(transport.CloseIdleConnections)
	return &prpc.Client{BaseURL: "https://kms.test/prpc", HTTP: &http.Client{Transport: transport, Timeout: 30 * time.Second}}
}

// replica is a guest that runs what the policy allows to be a KMS.
func (w *world) replica() *tdxtest.Guest {
	g := w.guest(kmsApp, kmsHash)
	g.Booting, g.InstanceID, g.Config = false, dstack.InstanceID{2}, w.self.Config
	return g
}

// elsewhere is the same guest on another genuine machine of the vendor.
func (w *world) elsewhere(g *tdxtest.Guest) *tdxtest.Guest {
	p, ext := *w.platform, tdxtest.Extension()
	ext.PPID[0]++
	p.PCK = p.IssuePCK(p.PCKCA, ext, nil)
	moved := *g
	moved.Platform = &p
	return &moved
}

func nothing(t *testing.T, m proto.Message, err error, code string) {
	t.Helper()
	wantCode(t, err, code)
	if proto.Size(m) > 0 {
		t.Errorf("the refusal came with %v", m)
	}
}

// A thief of an instance's TLS key shows the evidence that goes with it, from his own
// machine. What he gets is what the app's policy says such evidence is good for.
func TestThreat_C01_AThiefOfATLSKeyGetsNoKeysWhereASessionIsDemanded(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.Apps[0].RequireSession = true })
	g := w.guest(appA, good)
	stolen := w.clientCert(g)
	for range 2 {
		r, err := call[kmsapi.AppKeyResponse](t, w.client(stolen), "GetAppKey", nil)
		nothing(t, r, err, "session_required")
	}
	r, err := call[kmsapi.RenewLeaseResponse](t, w.client(stolen), "RenewLease", nil)
	nothing(t, r, err, "session_required")
	if e := w.entries(); e[len(e)-1].Code != "session_required" || e[len(e)-1].Session {
		t.Errorf("log: %+v", e[len(e)-1])
	}
	// The instance itself, over its own connection, has them.
	if _, err := call[kmsapi.AppKeyResponse](t, w.session(g), "GetAppKey", nil); err != nil {
		t.Error(err)
	}
}

// Evidence that was made for another connection is worth nothing on the thief's.
func TestThreat_C01_EvidenceOfAnotherConnectionIsRefused(t *testing.T) {
	w := newWorld(t, nil)
	g := w.guest(appA, good)
	var mu sync.Mutex
	var seen []byte // what the instance showed, as a proxy in between cannot but the KMS can see
	observed := channel.AttesterFunc(func(ctx context.Context, data dstack.ReportData) ([]byte, error) {
		raw, err := g.Attest(ctx, data)
		mu.Lock()
		defer mu.Unlock()
		seen = raw
		return raw, err
	})
	if _, err := call[kmsapi.AppKeyResponse](t, w.sessionOf(channel.Config{Attester: observed}), "GetAppKey", nil); err != nil {
		t.Fatal(err)
	}
	before := w.log.Head().Size()
	replay := channel.AttesterFunc(func(context.Context, dstack.ReportData) ([]byte, error) { return seen, nil })
	_, err := call[kmsapi.AppKeyResponse](t, w.sessionOf(channel.Config{Attester: replay}), "GetAppKey", nil)
	wantCode(t, err, "channel_refused")
	if err == nil || !strings.Contains(err.Error(), "report_data_mismatch") {
		t.Errorf("refused for another reason: %v", err)
	}
	// Reflection: the KMS is shown what it has just shown.
	mirror := &mirror{kmsAppraiser: kmsAppraiser{w}}
	_, err = call[kmsapi.KmsKeyResponse](t, w.sessionOf(channel.Config{Appraiser: mirror, Attester: mirror}), "GetKmsKey", nil)
	wantCode(t, err, "channel_refused")
	if err == nil || !strings.Contains(err.Error(), "report_data_mismatch") {
		t.Errorf("refused for another reason: %v", err)
	}
	for _, e := range w.entries()[before:] {
		if e.Kind != releaselog.Refusal || e.Code != "report_data_mismatch" || !e.AppID.IsZero() {
			t.Errorf("evidence that is nobody's is in the log as %+v", e)
		}
	}
}

// mirror gives back the evidence that it was given.
type mirror struct {
	kmsAppraiser
	mu   sync.Mutex
	seen []byte
}

func (m *mirror) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	m.mu.Lock()
	m.seen = c.Container
	m.mu.Unlock()
	return m.kmsAppraiser.Appraise(ctx, c)
}

func (m *mirror) Attest(context.Context, dstack.ReportData) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen, nil
}

// Whoever takes the channel's protocol out of the hello talks RA-TLS, and has what RA-TLS
// is good for: no keys of an app that demands a session, and no roots.
func TestThreat_C01_WithoutTheChannelsProtocolThereIsNoSession(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.Apps[0].RequireSession = true })
	r, err := call[kmsapi.AppKeyResponse](t, w.ratls(w.guest(appA, good)), "GetAppKey", nil)
	nothing(t, r, err, "session_required")
	k, err := call[kmsapi.KmsKeyResponse](t, w.ratls(w.replica()), "GetKmsKey", nil)
	nothing(t, k, err, "session_required")
	if _, err := call[kmsapi.KmsKeyResponse](t, w.session(w.replica()), "GetKmsKey", nil); err != nil {
		t.Error(err)
	}
}

// An app of the guest, or whoever it serves, asks for a quote over the binding of a
// connection of his own: what such evidence names is the app, and who asks is anybody.
func TestThreat_B20_EvidenceThatARunningAppMadeGetsNoKeys(t *testing.T) {
	w := newWorld(t, nil)
	key, err := channel.NewKey()
	w.check(err)
	g := w.guest(appA, good)
	g.Booting, g.ChannelSPKI = false, key.SPKI()
	for _, c := range []*prpc.Client{w.ratls(g), w.session(g)} {
		r, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", nil)
		nothing(t, r, err, "guest_running")
	}
	l, err := call[kmsapi.RenewLeaseResponse](t, w.session(g), "RenewLease", nil)
	nothing(t, l, err, "channel_key_mismatch")
	if e := w.entries(); e[len(e)-1].Code != "channel_key_mismatch" || e[len(e)-2].Code != "guest_running" {
		t.Errorf("log: %+v", e[len(e)-1])
	}
	// The guest's own agent, which has the key, may.
	own := w.sessionOf(channel.Config{Attester: g, Key: key})
	if _, err := call[kmsapi.RenewLeaseResponse](t, own, "RenewLease", nil); err != nil {
		t.Error(err)
	}
	if _, err := call[kmsapi.AppKeyResponse](t, own, "GetAppKey", nil); err != nil {
		t.Error(err)
	}
	// A guest that committed to nothing has no key to show, once an app runs in it.
	g.ChannelSPKI = nil
	r, err := call[kmsapi.AppKeyResponse](t, w.session(g), "GetAppKey", nil)
	nothing(t, r, err, "guest_running")
}

// Nor a certificate of an app that demands a session.
func TestThreat_B20_ACertificateIsForTheGuestThatAsks(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.Apps[0].RequireSession = true })
	key, err := channel.NewKey()
	w.check(err)
	g := w.guest(appA, good)
	g.Booting, g.ChannelSPKI = false, key.SPKI()
	other := w.guest(appA, good)
	other.Booting, other.ChannelSPKI, other.InstanceID = false, key.SPKI(), dstack.InstanceID{8}
	request, _ := w.request(g, csr.Config{Subject: "x"})
	for name, c := range map[string]*prpc.Client{
		"nobody": w.client(nil), "RA-TLS": w.ratls(g), "an app's connection": w.session(g),
		"another instance": w.sessionOf(channel.Config{Attester: other, Key: key}), "another app": w.session(w.replica()),
	} {
		s, err := call[kmsapi.SignCertResponse](t, c, "SignCert", request)
		if fault.Code(err) != "session_required" || proto.Size(s) > 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	s, err := call[kmsapi.SignCertResponse](t, w.sessionOf(channel.Config{Attester: g, Key: key}), "SignCert", request)
	w.check(err)
	if e, _, err := releaselog.VerifyRelease(s.Release, w.roots.Identity().CA); err != nil || !e.Session {
		t.Errorf("entry %+v: %v", e, err)
	}
}

func TestThreat_C02_AnotherKMSThanTheOneMeant(t *testing.T) {
	w := newWorld(t, nil)
	other := w.self.InstanceID
	other[0]++
	g := w.guest(appA, good)
	_, err := call[kmsapi.AppKeyResponse](t, w.sessionOf(channel.Config{Attester: g, Intended: channel.Intended{AppID: kmsApp, InstanceID: &other}}), "GetAppKey", nil)
	wantCode(t, err, "channel_wrong_instance")
	_, err = call[kmsapi.AppKeyResponse](t, w.sessionOf(channel.Config{Attester: g, Intended: channel.Intended{AppID: kmsApp, InstanceID: &w.self.InstanceID}}), "GetAppKey", nil)
	if err != nil {
		t.Error(err)
	}
}

// The temporary CA's key is everybody's: a certificate under it is no reason for anything.
func TestThreat_C04_ACertificateOfTheTemporaryCAIsNoEvidence(t *testing.T) {
	w := newWorld(t, nil)
	cert := w.clientCert(w.guest(appA, good))
	bare := w.bareCert()
	for _, method := range []string{"GetAppKey", "GetKmsKey", "RenewLease"} {
		_, err := call[kmsapi.KmsKeyResponse](t, w.client(bare), method, nil)
		wantCode(t, err, "no_attestation")
	}
	// Evidence that is another key's.
	other := w.clientCert(w.guest(appA, good))
	moved := *cert
	moved.Certificate, moved.PrivateKey = w.transplant(cert, other), other.PrivateKey
	_, err := call[kmsapi.AppKeyResponse](t, w.client(&moved), "GetAppKey", nil)
	wantCode(t, err, "ratls_report_data_mismatch")
}

// A quote of a genuine machine, with the right measurements, from a machine that nobody
// listed: what a broken attestation key of such a machine can sign.
func TestThreat_A01_AValidQuoteOfAMachineThatIsNotListed(t *testing.T) {
	w := newWorld(t, nil)
	app := w.elsewhere(w.guest(appA, good))
	for _, c := range []*prpc.Client{w.ratls(app), w.session(app)} {
		r, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", nil)
		nothing(t, r, err, "device_not_allowed")
	}
	request, _ := w.request(app, csr.Config{Subject: "x"})
	s, err := call[kmsapi.SignCertResponse](t, w.client(nil), "SignCert", request)
	nothing(t, s, err, "device_not_allowed")
	k, err := call[kmsapi.KmsKeyResponse](t, w.session(w.elsewhere(w.replica())), "GetKmsKey", nil)
	nothing(t, k, err, "device_not_allowed")
	// Machines for apps are not machines for a KMS.
	w.change(func(d *policy.Document) { d.Devices = policy.Devices{Any: true} })
	if _, err := call[kmsapi.AppKeyResponse](t, w.session(app), "GetAppKey", nil); err != nil {
		t.Error(err)
	}
	k, err = call[kmsapi.KmsKeyResponse](t, w.session(w.elsewhere(w.replica())), "GetKmsKey", nil)
	nothing(t, k, err, "device_not_allowed")
	for _, e := range w.entries() {
		if e.Kind == releaselog.Refusal && (e.Code != "device_not_allowed" || e.DeviceID == (dstack.DeviceID{})) {
			t.Errorf("log: %+v", e)
		}
	}
}

// And this KMS itself is held to the list.
func TestThreat_A01_AKMSOnAMachineThatIsNotListedGivesNothing(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.KMS.Devices = []dstack.DeviceID{{9}} })
	r, err := call[kmsapi.AppKeyResponse](t, w.session(w.guest(appA, good)), "GetAppKey", nil)
	nothing(t, r, err, "device_not_allowed")
}

func TestThreat_B03_OldCollateral(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.Expires = d.Issued.Add(60 * 24 * time.Hour) })
	cert := w.clientCert(w.guest(appA, good))
	w.pass(17 * 24 * time.Hour) // past NextUpdate
	r, err := call[kmsapi.AppKeyResponse](t, w.client(cert), "GetAppKey", nil)
	nothing(t, r, err, "crl_expired")
}

func TestThreat_B08_ACertificateThatIsOver(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.Expires = d.Issued.Add(60 * 24 * time.Hour) })
	cert := w.shortCert(w.guest(appA, good), time.Hour)
	if _, err := call[kmsapi.AppKeyResponse](t, w.client(cert), "GetAppKey", nil); err != nil {
		t.Fatal(err)
	}
	w.pass(2 * time.Hour)
	_, err := call[kmsapi.AppKeyResponse](t, w.client(cert), "GetAppKey", nil)
	wantCode(t, err, "client_certificate_time")
}

// The roots go to what the authority allows to be a KMS, and to nothing else.
func TestThreat_G01_RootKeysGoToListedKMSsOnly(t *testing.T) {
	w := newWorld(t, nil)
	build := w.replica()
	build.ComposeHash = evil
	img := w.replica()
	img.Config = `{"os_image_hash":"` + image.String() + `"}`
	for _, c := range []struct {
		name string
		g    *tdxtest.Guest
		code string
	}{
		{"an app", w.guest(appA, good), "kms_not_allowed"},
		{"a build that is not listed", build, "kms_not_allowed"},
		{"a listed build on another image", img, "kms_not_allowed"},
		{"a listed build on a machine that is not listed", w.elsewhere(w.replica()), "device_not_allowed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := call[kmsapi.KmsKeyResponse](t, w.session(c.g), "GetKmsKey", nil)
			nothing(t, r, err, c.code)
			e := w.entries()
			if last := e[len(e)-1]; last.Kind != releaselog.Refusal || last.Code != c.code || last.Purpose != "replication" {
				t.Errorf("log: %+v", last)
			}
		})
	}
	closed := newWorld(t, nil, func(c *Config) { c.Exporter = nil })
	r, err := call[kmsapi.KmsKeyResponse](t, closed.session(closed.replica()), "GetKmsKey", nil)
	nothing(t, r, err, "replication_disabled")
}

// Epochs rotate by the policy: new data under the new key, the one before to read by.
func TestThreat_G02_EpochsRotateAndOldOnesAreErased(t *testing.T) {
	epoch := func(current, oldest uint64) func(*policy.Document) {
		return func(d *policy.Document) { d.KeyEpoch = policy.KeyEpoch{Current: current, Oldest: oldest} }
	}
	w := newWorld(t, epoch(1, 1))
	g := w.guest(appA, good)
	get := func(want ...uint64) *kmsapi.AppKeyResponse {
		t.Helper()
		r, err := call[kmsapi.AppKeyResponse](t, w.session(g), "GetAppKey", &kmsapi.GetAppKeyRequest{WantEpochs: true})
		if err != nil {
			t.Fatal(err)
		}
		var got []uint64
		for _, e := range r.Epochs {
			got = append(got, e.Epoch)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("epochs %v, want %v", got, want)
		}
		return r
	}
	first := get(1)
	w.change(epoch(2, 1))
	second := get(2, 1)
	if !bytes.Equal(first.Epochs[0].Disk, second.Epochs[1].Disk) || bytes.Equal(second.Epochs[0].Disk, second.Epochs[1].Disk) {
		t.Error("the epoch before does not read what was written")
	}
	w.change(epoch(3, 1))
	third := get(3, 2)
	if !bytes.Equal(third.Epochs[1].Env, second.Epochs[0].Env) {
		t.Error("epoch 2 is another than it was")
	}
	w.change(epoch(3, 3))
	get(3)
	w.doc.Sequence++
	w.doc.KeyEpoch = policy.KeyEpoch{Current: 2, Oldest: 2}
	_, err := call[kmsapi.Policy](t, w.client(nil), "UpdatePolicy", &kmsapi.Policy{Signed: w.signed()})
	wantCode(t, err, "policy_epoch")

	// What is never given again cannot be derived any more, and the log tells of it once.
	if first, _ := w.roots.Epochs(); first != 3 {
		t.Errorf("the roots begin with epoch %d", first)
	}
	var rotations int
	for _, e := range w.entries() {
		if e.Kind == releaselog.Rotation && e.Epoch == 3 && strings.Contains(e.Note, "before 3") {
			rotations++
		}
	}
	if rotations != 1 {
		t.Errorf("%d entries tell of the erasure", rotations)
	}
	if err := w.roots.EraseBefore(3); err != nil {
		t.Fatal(err)
	}
	if _, err := w.roots.DiskKey(t.Context(), custody.Scope{App: appA, Instance: g.InstanceID[:], Epoch: 2}); fault.Code(err) != "epoch_unavailable" {
		t.Errorf("epoch 2 after its erasure: %v", err)
	}
	again := get(3)
	if !bytes.Equal(again.DiskCryptKey, first.DiskCryptKey) || !bytes.Equal(again.Epochs[0].App, third.Epochs[0].App) {
		t.Error("an erasure changed what is left")
	}
}

// A slip in a policy, which no later one can take back, does not stop the KMS.
func TestAnEpochOutOfReach(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.KeyEpoch = policy.KeyEpoch{Current: 1 << 40, Oldest: 1 << 40} })
	if _, err := call[kmsapi.AppKeyResponse](t, w.session(w.guest(appA, good)), "GetAppKey", nil); err != nil {
		t.Error(err)
	}
	_, err := call[kmsapi.AppKeyResponse](t, w.session(w.guest(appA, good)), "GetAppKey", &kmsapi.GetAppKeyRequest{WantEpochs: true})
	wantCode(t, err, "epoch_unavailable")
	if first, _ := w.roots.Epochs(); first != 1 {
		t.Errorf("the roots begin with epoch %d", first)
	}
}

// middle is a proxy that changes answers on their way.
func middle(t *testing.T, target string, change func(path string, body []byte) []byte) string {
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	p := httputil.NewSingleHostReverseProxy(u)
	p.ModifyResponse = func(r *http.Response) error {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		b = change(r.Request.URL.Path, b)
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
		r.Header.Set("Content-Length", fmt.Sprint(len(b)))
		return nil
	}
	s := httptest.NewServer(p)
	t.Cleanup(s.Close)
	return s.URL
}

func TestThreat_G04_AnswersOfTheWebhookAreNotChangedOnTheWay(t *testing.T) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var change func(string, []byte) []byte
	w := newWorld(t, nil, func(c *Config) {
		backend := httptest.NewServer(&webhook.Handler{Authority: c.Authority, Key: private, Now: c.Now})
		t.Cleanup(backend.Close)
		url := middle(t, backend.URL, func(path string, b []byte) []byte { return change(path, b) })
		c.Authority, c.Policies = &webhook.Authority{URL: url, Key: public}, nil
	})
	app, stranger := w.guest(appA, good), w.guest(appA, evil)
	var recorded []byte
	change = func(path string, b []byte) []byte {
		if strings.HasSuffix(path, "/app") {
			recorded = bytes.Clone(b)
		}
		return b
	}
	if _, err := call[kmsapi.AppKeyResponse](t, w.session(app), "GetAppKey", nil); err != nil {
		t.Fatal(err)
	}
	r, err := call[kmsapi.AppKeyResponse](t, w.session(stranger), "GetAppKey", nil)
	nothing(t, r, err, "compose_hash_not_allowed")
	_, err = call[kmsapi.AppKeyResponse](t, w.session(app), "GetAppKey", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func([]byte) []byte
		code   string
	}{
		{"no becomes yes", func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"isAllowed":false`), []byte(`"isAllowed":true`), 1)
		}, "webhook_signature"},
		{"the yes to another", func([]byte) []byte { return recorded }, "webhook_mismatch"},
		{"upstream's unsigned yes", func([]byte) []byte { return []byte(`{"isAllowed":true,"gatewayAppId":"","reason":""}`) }, "webhook_signature"},
		{"nonsense", func([]byte) []byte { return []byte(`{`) }, "webhook_malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			change = func(path string, b []byte) []byte {
				if strings.HasSuffix(path, "/app") {
					return c.change(b)
				}
				return b
			}
			r, err := call[kmsapi.AppKeyResponse](t, w.session(stranger), "GetAppKey", nil)
			nothing(t, r, err, c.code)
		})
	}
	// The next request is asked anew.
	change = func(_ string, b []byte) []byte { return b }
	if _, err := call[kmsapi.AppKeyResponse](t, w.session(app), "GetAppKey", nil); err != nil {
		t.Error(err)
	}
}

// A revoked manifest's instances go on for as long as their lease, and no longer.
func TestThreat_G05_ARevokedInstanceGetsNoLease(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.LeaseSeconds = 600 })
	key, err := channel.NewKey()
	w.check(err)
	g := w.guest(appA, good)
	g.Booting, g.ChannelSPKI = false, key.SPKI()
	c := w.sessionOf(channel.Config{Attester: g, Key: key})
	root := w.roots.Identity().CA
	r, err := call[kmsapi.RenewLeaseResponse](t, c, "RenewLease", nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := lease.Verify(r.Lease.Document, r.Lease.Signature, root, w.clock())
	if err != nil {
		t.Fatal(err)
	}
	first := r.Lease
	if life := l.NotAfter.Sub(w.clock()); life > 10*time.Minute || life <= 0 {
		t.Errorf("the lease lasts %s", life)
	}
	if e, _, err := releaselog.VerifyRelease(r.Release, root); err != nil || e.Purpose != "renewal" || !e.LeaseUntil.Equal(l.NotAfter) {
		t.Errorf("entry %+v: %v", e, err)
	}
	w.change(func(d *policy.Document) {
		d.Apps[0].ComposeHashes[0].Revoked = &policy.Revocation{At: w.clock(), Reason: "it leaks"}
	})
	// Over the very connection that was good a moment ago.
	r, err = call[kmsapi.RenewLeaseResponse](t, c, "RenewLease", nil)
	nothing(t, r, err, "compose_hash_revoked")
	k, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", nil)
	nothing(t, k, err, "compose_hash_revoked")
	request, _ := w.request(g, csr.Config{Subject: "x"})
	s, err := call[kmsapi.SignCertResponse](t, w.client(nil), "SignCert", request)
	nothing(t, s, err, "compose_hash_revoked")
	if _, err := lease.Verify(first.Document, first.Signature, root, w.clock().Add(10*time.Minute)); fault.Code(err) != "lease_ended" {
		t.Errorf("the lease of before, after its time: %v", err)
	}
}

// No authority's word makes a lease longer than the KMS's own bound.
func TestThreat_G05_LeasesAreBounded(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { d.LeaseSeconds = 3600 }, func(c *Config) { c.Limits.Lease = 5 * time.Minute })
	r, err := call[kmsapi.AppKeyResponse](t, w.session(w.guest(appA, good)), "GetAppKey", nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := lease.Verify(r.Lease.Document, r.Lease.Signature, w.roots.Identity().CA, w.clock())
	if err != nil || l.NotAfter.Sub(w.clock()) > 5*time.Minute {
		t.Errorf("lease %+v: %v", l, err)
	}
	if _, err := lease.Verify(r.Lease.Document, r.Lease.Signature, w.roots.Identity().CA, w.clock().Add(5*time.Minute)); fault.Code(err) != "lease_ended" {
		t.Errorf("after its end: %v", err)
	}
}

// What cannot be written down is not given; neither is a refusal told as one.
func TestThreat_G10_NothingIsGivenThatIsNotLogged(t *testing.T) {
	w := newWorld(t, nil)
	app, replica := w.session(w.guest(appA, good)), w.session(w.replica())
	request, _ := w.request(w.guest(appA, good), csr.Config{Subject: "x"})
	if err := w.log.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := call[kmsapi.AppKeyResponse](t, app, "GetAppKey", nil)
	nothing(t, r, err, "release_log_unavailable")
	l, err := call[kmsapi.RenewLeaseResponse](t, app, "RenewLease", nil)
	nothing(t, l, err, "release_log_unavailable")
	k, err := call[kmsapi.KmsKeyResponse](t, replica, "GetKmsKey", nil)
	nothing(t, k, err, "release_log_unavailable")
	s, err := call[kmsapi.SignCertResponse](t, w.client(nil), "SignCert", request)
	nothing(t, s, err, "release_log_unavailable")
}

// Every reply has a head, each continues the ones before, and every refusal is there.
func TestThreat_G10_HeadsContinueEachOther(t *testing.T) {
	w := newWorld(t, nil)
	root := w.roots.Identity().CA
	memory := releaselog.OpenMemory(filepath.Join(t.TempDir(), "heads"))
	c := w.client(nil)
	observe := func(wire *kmsapi.LogHead) {
		t.Helper()
		head, err := releaselog.VerifyHead(wire, root)
		if err != nil {
			t.Fatal(err)
		}
		err = memory.Observe(t.Context(), head, func(from uint64) ([][]byte, error) {
			r, err := call[kmsapi.LogConsistencyResponse](t, c, "GetLogConsistency", &kmsapi.LogConsistencyRequest{From: from})
			return r.GetProof(), err
		})
		if err != nil {
			t.Error(err)
		}
	}
	for i := range 5 {
		g := w.guest(appA, good)
		if i%2 == 1 {
			g = w.guest(appB, good)
		}
		r, err := call[kmsapi.AppKeyResponse](t, w.session(g), "GetAppKey", nil)
		if (err == nil) != (i%2 == 0) {
			t.Fatal(err)
		}
		if err == nil {
			observe(r.Release.Head)
		}
		meta, err := call[kmsapi.GetMetaResponse](t, c, "GetMeta", nil)
		if err != nil {
			t.Fatal(err)
		}
		observe(meta.LogHead)
	}
	temp, err := call[kmsapi.GetTempCaCertResponse](t, c, "GetTempCaCert", nil)
	if err != nil {
		t.Fatal(err)
	}
	observe(temp.LogHead)
	// A policy that comes a second time is no second event.
	before := w.log.Head().Size()
	w.doc.Sequence++
	for range 3 {
		if _, err := call[kmsapi.Policy](t, c, "UpdatePolicy", &kmsapi.Policy{Signed: w.signed()}); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.log.Head().Size() - before; n != 1 {
		t.Errorf("one policy made %d entries", n)
	}
}

// A host in between gives a client another key for the app's environment.
func TestThreat_G12_TheEnvironmentsKeyIsTheKMSs(t *testing.T) {
	w, other := newWorld(t, nil), newWorld(t, nil)
	r, err := call[kmsapi.PublicKeyResponse](t, w.client(nil), "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: appA[:]})
	if err != nil {
		t.Fatal(err)
	}
	kms, now := w.roots.Identity().K256, w.clock()
	verify := func(kms []byte, app dstack.AppID, key []byte, now time.Time) error {
		return envelope.VerifyKey(kms, app, key, r.SignatureV1, r.Timestamp, now)
	}
	if err := verify(kms, appA, r.PublicKey, now); err != nil {
		t.Fatal(err)
	}
	swapped := bytes.Clone(r.PublicKey)
	swapped[0] ^= 1
	for name, err := range map[string]error{
		"another key":   verify(kms, appA, swapped, now),
		"another app":   verify(kms, appB, r.PublicKey, now),
		"another KMS":   verify(other.roots.Identity().K256, appA, r.PublicKey, now),
		"six minutes":   verify(kms, appA, r.PublicKey, now.Add(6*time.Minute)),
		"from tomorrow": verify(kms, appA, r.PublicKey, now.Add(-24*time.Hour)),
	} {
		if fault.Code(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// No two uses share key bytes: neither of one app, nor across apps, instances or epochs.
func TestThreat_G13_EveryUseHasAKeyOfItsOwn(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) {
		d.Apps = append(d.Apps, policy.App{AppID: appB, ComposeHashes: []policy.Compose{{Hash: good}}})
		d.KeyEpoch = policy.KeyEpoch{Current: 2, Oldest: 1}
	})
	seen := map[string]string{}
	for _, app := range []dstack.AppID{appA, appB} {
		r, err := call[kmsapi.AppKeyResponse](t, w.session(w.guest(app, good)), "GetAppKey", &kmsapi.GetAppKeyRequest{WantEpochs: true})
		if err != nil {
			t.Fatal(err)
		}
		all := map[string][]byte{"disk": r.DiskCryptKey, "env": r.EnvCryptKey, "app": r.K256Key}
		for _, e := range r.Epochs {
			all[fmt.Sprint("disk ", e.Epoch)], all[fmt.Sprint("env ", e.Epoch)], all[fmt.Sprint("app ", e.Epoch)] = e.Disk, e.Env, e.App
		}
		if len(all) != 9 {
			t.Fatalf("%d keys", len(all))
		}
		for name, key := range all {
			if was, twice := seen[string(key)]; twice || len(key) != 32 {
				t.Errorf("the key %s of %s is that of %s", name, app, was)
			}
			seen[string(key)] = app.String() + " " + name
		}
	}
}

// Nobody is allowed because nobody said anything yet.
func TestThreat_J07_AFreshKMSAllowsNobody(t *testing.T) {
	w := newWorld(t, nil)
	// What dstack begins with: this KMS may serve, and no app is known.
	w.change(func(d *policy.Document) { d.Apps = nil })
	r, err := call[kmsapi.AppKeyResponse](t, w.session(w.guest(appA, good)), "GetAppKey", nil)
	nothing(t, r, err, "app_unknown")
	// An upgrade whose manifest nobody allowed.
	w.change(func(d *policy.Document) {
		d.Apps = []policy.App{{AppID: appA, ComposeHashes: []policy.Compose{{Hash: good}}}}
	})
	r, err = call[kmsapi.AppKeyResponse](t, w.session(w.guest(appA, evil)), "GetAppKey", nil)
	nothing(t, r, err, "compose_hash_not_allowed")

	// A document that says nothing, and none at all.
	for name, document := range map[string]*policy.Document{"empty": policy.New(dstack.TrustDevelopment, tdxtest.At, time.Hour), "none": nil} {
		t.Run(name, func(t *testing.T) {
			fresh := newWorld(t, nil, func(c *Config) {
				public, private, err := ed25519.GenerateKey(rand.Reader)
				if err != nil {
					t.Fatal(err)
				}
				a, err := policy.OpenAuthority(filepath.Join(t.TempDir(), "policy.json"), policy.Keys{Keys: []ed25519.PublicKey{public}, Threshold: 1}, c.Now)
				if err != nil {
					t.Fatal(err)
				}
				if document != nil {
					text, err := document.Encode()
					if err != nil {
						t.Fatal(err)
					}
					signed, err := policy.Sign(text, private)
					if err != nil {
						t.Fatal(err)
					}
					if err := a.Update(signed); err != nil {
						t.Fatal(err)
					}
				}
				c.Authority, c.Policies = a, a
			})
			for _, g := range []*tdxtest.Guest{fresh.guest(appA, good), fresh.guest(appB, evil)} {
				r, err := call[kmsapi.AppKeyResponse](t, fresh.session(g), "GetAppKey", nil)
				if err == nil || fault.Code(err) == "" || proto.Size(r) > 0 {
					t.Errorf("got %v: %v", r, err)
				}
			}
			k, err := call[kmsapi.KmsKeyResponse](t, fresh.session(fresh.replica()), "GetKmsKey", nil)
			if err == nil || fault.Code(err) == "" || proto.Size(k) > 0 {
				t.Errorf("roots: %v", err)
			}
		})
	}
}

func TestRefusalsThatNoAuthorityDecidesAreLoggedToo(t *testing.T) {
	w := newWorld(t, nil)
	g := w.guest(appA, good)
	doc := mrconfig.Document{AppID: &g.AppID, ComposeHash: g.ComposeHash, KeyProvider: "kms", KeyProviderID: []byte{1}}
	g.Edit = func(b *tdx.ReportBody) { b.MRConfigID = mrconfig.IDv3(doc.Bytes()) }
	_, err := call[kmsapi.AppKeyResponse](t, w.ratls(g), "GetAppKey", nil)
	wantCode(t, err, "mr_config_mismatch")
	if e := w.entries(); e[len(e)-1].Code != "mr_config_mismatch" || e[len(e)-1].Evidence == (releaselog.Hash{}) {
		t.Errorf("log: %+v", e[len(e)-1])
	}
	g.Edit = nil
	// Evidence that does not hold fills no log.
	before := w.log.Head().Size()
	bad := w.guest(appA, good)
	bad.Edit = func(b *tdx.ReportBody) { b.RTMR[3] = dstack.Measurement{} }
	c := w.ratls(bad)
	for range 30 {
		_, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", nil)
		wantCode(t, err, "log_replay_mismatch")
	}
	if n := w.log.Head().Size() - before; n == 0 || n > 2*strangerRate {
		t.Errorf("%d entries of 30 refusals", n)
	}
	r, _ := w.request(g, csr.Config{Subject: "x", Names: []string{"bank.test"}})
	_, err = call[kmsapi.SignCertResponse](t, w.client(nil), "SignCert", r)
	wantCode(t, err, "certificate_name_denied")
	if e := w.entries(); e[len(e)-1].Code != "certificate_name_denied" || e[len(e)-1].Kind != releaselog.Refusal {
		t.Errorf("log: %+v", e[len(e)-1])
	}
}

func TestLimitsOfCallers(t *testing.T) {
	w := newWorld(t, nil, func(c *Config) { c.Limits = Limits{PeerRate: 1e6, AppRate: 2} })
	// Somebody else's machine names the app, and uses up nothing of it.
	other := w.elsewhere(w.guest(appA, good))
	c := w.session(other)
	for i := range 8 {
		_, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", nil)
		if i < 4 {
			wantCode(t, err, "device_not_allowed")
		} else {
			wantCode(t, err, "rate_limited")
		}
	}
	c = w.session(w.guest(appA, good))
	for i := range 6 {
		_, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", nil)
		if i < 4 && err != nil {
			t.Fatal(err)
		} else if i >= 4 {
			wantCode(t, err, "rate_limited")
		}
	}
	w.pass(time.Second)
	if _, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", nil); err != nil {
		t.Error(err)
	}

	w = newWorld(t, nil, func(c *Config) { c.Limits = Limits{PeerRate: 3, AppRate: 1e6} })
	c = w.client(nil)
	for i := range 8 {
		_, err := call[kmsapi.LogHead](t, c, "GetLogHead", nil)
		if i < 6 && err != nil {
			t.Fatal(err)
		} else if i >= 6 {
			wantCode(t, err, "rate_limited")
		}
	}
	// Connections count as well: the bucket has six, of which one is open.
	failed := 0
	for range 8 {
		if _, err := call[kmsapi.LogHead](t, w.client(nil), "GetLogHead", nil); err != nil && fault.Code(err) != "rate_limited" {
			failed++
		}
	}
	if failed != 3 {
		t.Errorf("%d of 8 connections were turned away, want 3", failed)
	}
}

func TestPeersAreAddressesAndNetworks(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.1:5": "192.0.2.1", "[2001:db8:1:2:3:4:5:6]:5": "2001:db8:1:2::", "[::1]:5": "::", "@": "@",
	} {
		if got := (caller{remote: remote}).host(); got != want {
			t.Errorf("%s: %s, want %s", remote, got, want)
		}
	}
}

// A JSON reply says no secret in its refusals.
func TestRefusalsTellTheirCode(t *testing.T) {
	w := newWorld(t, nil)
	c := w.client(nil)
	resp, err := c.HTTP.Post("https://kms.test/prpc/GetAppKey?json", "application/json", strings.NewReader(`{"api_version":1}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var e struct{ Error, Code, Fix string }
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || resp.StatusCode != 400 || e.Code != "no_attestation" || e.Fix == "" {
		t.Errorf("%d %+v: %v", resp.StatusCode, e, err)
	}
}
