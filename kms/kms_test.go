// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/keys/lease"
	"github.com/dstack-go/dstack/releaselog"
)

func TestAnAppGetsItsKeysBothWays(t *testing.T) {
	w := newWorld(t, nil)
	g := w.guest(appA, good)
	var disks [][]byte
	for _, way := range []struct {
		name    string
		session bool
	}{{"RA-TLS", false}, {"attested channel", true}} {
		t.Run(way.name, func(t *testing.T) {
			c := w.ratls(g)
			if way.session {
				c = w.session(g)
			}
			r, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1})
			if err != nil {
				t.Fatal(err)
			}
			disks = append(disks, r.DiskCryptKey)
			for name, b := range map[string][]byte{"disk": r.DiskCryptKey, "env": r.EnvCryptKey, "k256": r.K256Key} {
				if len(b) != 32 {
					t.Errorf("%s has %d bytes", name, len(b))
				}
			}
			public, err := derive.K256Public(r.K256Key)
			if err != nil {
				t.Fatal(err)
			}
			if root, err := derive.RecoverApp(r.K256Signature, appA, public); err != nil || !bytes.Equal(root, w.roots.Identity().K256) {
				t.Errorf("the app's key is signed by %x: %v", root, err)
			}
			if !bytes.Equal(r.OsImageHash, image[:]) || len(r.Epochs) != 0 {
				t.Errorf("image %x, %d epochs", r.OsImageHash, len(r.Epochs))
			}
			entry, head, err := releaselog.VerifyRelease(r.Release, w.roots.Identity().CA)
			if err != nil {
				t.Fatal(err)
			}
			if entry.Kind != releaselog.Grant || entry.AppID != appA || entry.ComposeHash != good || entry.Session != way.session || entry.Purpose != "keys" ||
				entry.Evidence == (releaselog.Hash{}) || head.Log() == "" {
				t.Errorf("entry %+v", entry)
			}
			l, err := lease.Verify(r.Lease.Document, r.Lease.Signature, w.roots.Identity().CA, w.clock())
			if err != nil {
				t.Fatal(err)
			}
			if l.AppID != appA || !bytes.Equal(l.InstanceID, g.InstanceID[:]) || l.NotAfter.Sub(w.clock()) != time.Hour || l.Index != r.Release.Index {
				t.Errorf("lease %+v", l)
			}
		})
	}
	if !bytes.Equal(disks[0], disks[1]) {
		t.Error("the two ways give different keys")
	}
	other := w.guest(appA, good)
	other.InstanceID[0]++
	r, err := call[kmsapi.AppKeyResponse](t, w.ratls(other), "GetAppKey", &kmsapi.GetAppKeyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(r.DiskCryptKey, disks[0]) {
		t.Error("two instances share a disk key")
	}
}

// Each refusal has its code, is in the log with it, and gives nothing.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name    string
		edit    func(*policy.Document)
		guest   func(*tdxtest.Guest)
		request *kmsapi.GetAppKeyRequest
		code    string
		logged  bool
	}{
		{"an app that nobody knows", nil, func(g *tdxtest.Guest) { g.AppID = appB }, nil, "app_unknown", true},
		{"a manifest that is not allowed", nil, func(g *tdxtest.Guest) { g.ComposeHash = evil }, nil, "compose_hash_not_allowed", true},
		{"a manifest that was revoked", func(d *policy.Document) {
			d.Apps[0].ComposeHashes[0].Revoked = &policy.Revocation{At: tdxtest.At, Reason: "it leaks"}
		}, nil, nil, "compose_hash_revoked", true},
		{"a machine that is not listed", func(d *policy.Document) { d.Devices.IDs = []dstack.DeviceID{{1}} }, nil, nil, "device_not_allowed", true},
		{"no machine listed", func(d *policy.Document) { d.Devices.IDs = nil }, nil, nil, "device_not_allowed", true},
		{"an image that is not listed", nil, func(g *tdxtest.Guest) {
			g.Config = `{"os_image_hash":"` + dstack.ImageHash{9}.String() + `"}`
		}, nil, "os_image_not_allowed", true},
		{"an image whose registers are others", func(d *policy.Document) {
			for _, l := range d.OSImages[0].Launch {
				l["rtmr1"] = policy.Register{1}
			}
		}, nil, nil, "os_image_unproven", true},
		{"an image of an old epoch", func(d *policy.Document) { d.MinOSEpoch = 2 }, nil, nil, "os_epoch_too_old", true},
		{"a TCB status that is not accepted", func(d *policy.Document) { d.TCB.Accept = []string{"OutOfDate"} }, nil, nil, "tcb_not_allowed", true},
		{"evidence about a key, where a session is demanded", func(d *policy.Document) { d.Apps[0].RequireSession = true }, nil, nil, "session_required", true},
		{"a version that does not exist", nil, nil, &kmsapi.GetAppKeyRequest{ApiVersion: 2}, "api_version", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.edit)
			g := w.guest(appA, good)
			if c.guest != nil {
				c.guest(g)
			}
			before := w.log.Head().Size()
			request := c.request
			if request == nil {
				request = &kmsapi.GetAppKeyRequest{ApiVersion: 1}
			}
			r, err := call[kmsapi.AppKeyResponse](t, w.ratls(g), "GetAppKey", request)
			wantCode(t, err, c.code)
			if len(r.DiskCryptKey)+len(r.EnvCryptKey)+len(r.K256Key) > 0 {
				t.Error("keys came with the refusal")
			}
			if !c.logged {
				return
			}
			all := w.entries()
			last := all[len(all)-1]
			if uint64(len(all)) != before+1 || last.Kind != releaselog.Refusal || last.Code != c.code || last.Reason == "" {
				t.Errorf("log: %+v", last)
			}
		})
	}
}

// An identical request is decided anew each time: a revocation is seen at once.
func TestDecisionsAreNotKept(t *testing.T) {
	w := newWorld(t, nil)
	c := w.ratls(w.guest(appA, good))
	for range 2 {
		if _, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", &kmsapi.GetAppKeyRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.asked.times(governance.Keys); n != 2 {
		t.Errorf("the authority was asked %d times for two requests", n)
	}
	if n := w.asked.times(governance.Service); n < 2 {
		t.Errorf("the authority was asked %d times about the KMS itself", n)
	}
	w.change(func(d *policy.Document) {
		d.Apps[0].ComposeHashes[0].Revoked = &policy.Revocation{At: w.clock(), Reason: "it leaks"}
	})
	_, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", &kmsapi.GetAppKeyRequest{})
	wantCode(t, err, "compose_hash_revoked")
	if err == nil || !strings.Contains(err.Error(), "Boot denied: ") || !strings.Contains(err.Error(), "it leaks") {
		t.Errorf("the reason is lost: %v", err)
	}
}

// A KMS whose own build was revoked gives nothing from that moment on.
func TestAKMSThatIsNotAllowedGivesNothing(t *testing.T) {
	w := newWorld(t, nil)
	c := w.ratls(w.guest(appA, good))
	w.change(func(d *policy.Document) { d.KMS.Allow = nil })
	_, err := call[kmsapi.AppKeyResponse](t, c, "GetAppKey", &kmsapi.GetAppKeyRequest{})
	wantCode(t, err, "kms_not_allowed")
	_, err = call[kmsapi.GetTempCaCertResponse](t, c, "GetTempCaCert", nil)
	wantCode(t, err, "kms_not_allowed")
	_, err = call[kmsapi.PublicKeyResponse](t, c, "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: appA[:]})
	wantCode(t, err, "kms_not_allowed")
}

func TestWhoShowsNoEvidenceGetsNothing(t *testing.T) {
	w := newWorld(t, nil)
	for _, method := range []string{"GetAppKey", "GetKmsKey", "RenewLease"} {
		_, err := call[kmsapi.GetMetaResponse](t, w.client(nil), method, nil)
		wantCode(t, err, "no_attestation")
	}
	// A certificate of the temporary CA, which everybody can make, is no evidence.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	w.check(err)
	der, err := w.service.cfg.TempCA.Issue(certificate.Leaf{Config: csr.Config{Subject: "x", ClientAuth: true}, Public: &key.PublicKey}, w.clock())
	w.check(err)
	cert := w.clientCert(w.guest(appA, good))
	cert.Certificate[0], cert.PrivateKey = der, key
	_, err = call[kmsapi.AppKeyResponse](t, w.client(cert), "GetAppKey", nil)
	wantCode(t, err, "no_attestation")
}

func TestMetaAndEnvironmentKey(t *testing.T) {
	w := newWorld(t, func(d *policy.Document) { app := dstack.AppID{7}; d.GatewayAppID = &app })
	c := w.client(nil)
	meta, err := call[kmsapi.GetMetaResponse](t, c, "GetMeta", nil)
	if err != nil {
		t.Fatal(err)
	}
	root, err := certificate.Parse([]byte(meta.CaCert))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(root.RawSubjectPublicKeyInfo, w.roots.Identity().CA) || !bytes.Equal(meta.K256Pubkey, w.roots.Identity().K256) ||
		!meta.IsDev || meta.GatewayAppId == nil || !strings.Contains(*meta.GatewayAppId, dstack.AppID{7}.String()) {
		t.Errorf("meta %+v", meta)
	}
	if root.Subject.CommonName != "Dstack KMS CA" || root.MaxPathLen != 1 {
		t.Errorf("root %s, path %d", root.Subject, root.MaxPathLen)
	}
	r, err := call[kmsapi.PublicKeyResponse](t, c, "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: appA[:]})
	if err != nil {
		t.Fatal(err)
	}
	if err := envelope.VerifyKey(meta.K256Pubkey, appA, r.PublicKey, r.SignatureV1, r.Timestamp, w.clock()); err != nil {
		t.Error(err)
	}
	keys, err := call[kmsapi.AppKeyResponse](t, w.ratls(w.guest(appA, good)), "GetAppKey", nil)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := w.roots.EnvKey(t.Context(), custody.Scope{App: appA})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(secret.Bytes(), keys.EnvCryptKey) {
		t.Error("the environment's key is another than the app gets")
	}
	for _, n := range []int{0, 19, 21, 32} {
		_, err := call[kmsapi.PublicKeyResponse](t, c, "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: make([]byte, n)})
		wantCode(t, err, "app_id_length")
	}
	if got := get(t, w, "/health"); got != "OK" {
		t.Errorf("health %q", got)
	}
}

// request is a signing request of g for a new key.
func (w *world) request(g *tdxtest.Guest, c csr.Config) (*kmsapi.SignCertRequest, []byte) {
	w.t.Helper()
	return w.requestOf(w.t.Context(), g, c)
}

func (w *world) requestOf(ctx context.Context, g *tdxtest.Guest, c csr.Config) (*kmsapi.SignCertRequest, []byte) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	w.check(err)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	w.check(err)
	evidence, err := g.Attest(ctx, ratls.ReportData(spki))
	w.check(err)
	text, signature, err := (&csr.Request{Version: 2, Config: c, Evidence: evidence}).Sign(key)
	w.check(err)
	return &kmsapi.SignCertRequest{ApiVersion: 2, Csr: text, Signature: signature}, spki
}

func TestCertificatesOfAnApp(t *testing.T) {
	w := newWorld(t, nil)
	g := w.guest(appA, good)
	g.Booting, g.Provider = false, []byte(`{"name":"kms","id":"00"}`)
	c := w.client(nil) // the evidence is in the request
	r, spki := w.request(g, csr.Config{Subject: "web", Names: []string{"web.apps.test"}, ServerAuth: true, WithEvidence: true, WithAppInfo: true})
	out, err := call[kmsapi.SignCertResponse](t, c, "SignCert", r)
	if err != nil {
		t.Fatal(err)
	}
	if len(out.CertificateChain) != 3 {
		t.Fatalf("%d certificates", len(out.CertificateChain))
	}
	var chain []*x509.Certificate
	for _, text := range out.CertificateChain {
		block, _ := pem.Decode([]byte(text))
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(chain[2])
	between.AddCert(chain[1])
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: w.clock(), DNSName: "web.apps.test"}); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(chain[0].RawSubjectPublicKeyInfo, spki) {
		t.Error("another key is certified")
	}
	if life := chain[0].NotAfter.Sub(w.clock()); life > 30*24*time.Hour {
		t.Errorf("it is valid for %s", life)
	}
	issued, err := ratls.IssuerClaims(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if issued.AppID == nil || *issued.AppID != appA || issued.Usage != ratls.UsageApp || issued.Info == nil || issued.Info.ComposeHash != good ||
		issued.Info.DeviceID != w.applicant(g).Request.Boot.DeviceID {
		t.Errorf("it says %+v", issued)
	}
	if _, err := ratls.FromCertificate(chain[0]); err != nil {
		t.Errorf("its evidence: %v", err)
	}
	ca, err := ratls.IssuerClaims(chain[1])
	if err != nil || ca.AppID == nil || *ca.AppID != appA || ca.Usage != ratls.UsageAppCA || chain[1].MaxPathLen != 0 {
		t.Errorf("the app's authority says %+v: %v", ca, err)
	}
	entry, _, err := releaselog.VerifyRelease(out.Release, w.roots.Identity().CA)
	if sum := sha256.Sum256(chain[0].Raw); err != nil || entry.Purpose != "certificate" || !strings.Contains(entry.Note, hexOf(sum[:])) {
		t.Errorf("entry %+v: %v", entry, err)
	}

	for _, c := range []struct {
		name string
		edit func(*kmsapi.SignCertRequest, *tdxtest.Guest) *kmsapi.SignCertRequest
		code string
	}{
		{"a name that is not the app's", func(*kmsapi.SignCertRequest, *tdxtest.Guest) *kmsapi.SignCertRequest {
			r, _ := w.request(g, csr.Config{Subject: "x", Names: []string{"bank.test"}})
			return r
		}, "certificate_name_denied"},
		{"two labels below", func(*kmsapi.SignCertRequest, *tdxtest.Guest) *kmsapi.SignCertRequest {
			r, _ := w.request(g, csr.Config{Subject: "x", Names: []string{"a.b.apps.test"}})
			return r
		}, "certificate_name_denied"},
		{"a manifest that is not allowed", func(*kmsapi.SignCertRequest, *tdxtest.Guest) *kmsapi.SignCertRequest {
			r, _ := w.request(w.guest(appA, evil), csr.Config{Subject: "x"})
			return r
		}, "compose_hash_not_allowed"},
		{"a signature of another key", func(r *kmsapi.SignCertRequest, _ *tdxtest.Guest) *kmsapi.SignCertRequest {
			other, _ := w.request(g, csr.Config{Subject: "x"})
			return &kmsapi.SignCertRequest{ApiVersion: 2, Csr: r.Csr, Signature: other.Signature}
		}, "csr_signature"},
		{"evidence about another key", func(*kmsapi.SignCertRequest, *tdxtest.Guest) *kmsapi.SignCertRequest {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			w.check(err)
			evidence, err := g.Attest(t.Context(), dstack.ReportData{1})
			w.check(err)
			text, signature, err := (&csr.Request{Version: 2, Config: csr.Config{Subject: "x"}, Evidence: evidence}).Sign(key)
			w.check(err)
			return &kmsapi.SignCertRequest{ApiVersion: 2, Csr: text, Signature: signature}
		}, "report_data_mismatch"},
		{"a version that does not exist", func(r *kmsapi.SignCertRequest, _ *tdxtest.Guest) *kmsapi.SignCertRequest {
			return &kmsapi.SignCertRequest{ApiVersion: 3, Csr: r.Csr, Signature: r.Signature}
		}, "api_version"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := call[kmsapi.SignCertResponse](t, w.client(nil), "SignCert", c.edit(r, g))
			wantCode(t, err, c.code)
			if len(out.CertificateChain) > 0 {
				t.Error("a certificate came with the refusal")
			}
		})
	}
	// Ten years are asked for; what the KMS gives is less.
	late := uint64(w.clock().Add(3650 * 24 * time.Hour).Unix())
	r, _ = w.request(g, csr.Config{Subject: "long", NotAfter: &late})
	if out, err = call[kmsapi.SignCertResponse](t, w.client(nil), "SignCert", r); err != nil {
		t.Fatal(err)
	}
	cert, err := certificate.Parse([]byte(out.CertificateChain[0]))
	if err != nil || cert.NotAfter.Sub(w.clock()) > 30*24*time.Hour {
		t.Errorf("it is valid until %s: %v", cert.NotAfter, err)
	}
}

func TestReplication(t *testing.T) {
	w := newWorld(t, nil)
	replica := w.guest(kmsApp, kmsHash)
	replica.Booting, replica.InstanceID, replica.Config = false, dstack.InstanceID{2}, w.self.Config
	r, err := call[kmsapi.KmsKeyResponse](t, w.session(replica), "GetKmsKey", nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Keys) != 1 {
		t.Fatalf("%d sets of keys", len(r.Keys))
	}
	entry, _, err := releaselog.VerifyRelease(r.Release, w.roots.Identity().CA)
	if err != nil || entry.Purpose != "replication" || entry.Role != "kms" {
		t.Errorf("entry %+v: %v", entry, err)
	}
	roots, err := custody.Import(r.Keys[0], w.roots.Identity())
	if err != nil {
		t.Fatal(err)
	}
	roots.Wipe()
	// Evidence about a key, which a thief of the key can show, is not enough.
	_, err = call[kmsapi.KmsKeyResponse](t, w.ratls(replica), "GetKmsKey", nil)
	wantCode(t, err, "session_required")
	w.service.cfg.KeyBoundReplication = true
	if r, err := call[kmsapi.KmsKeyResponse](t, w.ratls(replica), "GetKmsKey", nil); err != nil || len(r.Keys) != 1 {
		t.Errorf("to an upstream replica, where that is configured: %v", err)
	}
	sealed := newWorld(t, nil, func(c *Config) { c.Exporter = nil })
	_, err = call[kmsapi.KmsKeyResponse](t, sealed.session(sealed.self), "GetKmsKey", nil)
	wantCode(t, err, "replication_disabled")
}

func TestConfigurationsThatCannotBeSafe(t *testing.T) {
	w := newWorld(t, nil)
	for name, edit := range map[string]func(*Config){
		"no authority": func(c *Config) { c.Authority = nil },
		"no custodian": func(c *Config) { c.Custodian = nil },
		"no log":       func(c *Config) { c.Log = nil },
		"no name":      func(c *Config) { c.Names = nil },
		"no TEE, in production": func(c *Config) {
			c.Self, c.Development, c.Judge.Development = nil, false, false
		},
		"development roots, in production": func(c *Config) { c.Development = false },
	} {
		t.Run(name, func(t *testing.T) {
			c := w.service.cfg
			j := *w.judge()
			c.Judge = &j
			edit(&c)
			_, err := New(c)
			wantCode(t, err, "kms_config")
		})
	}
}
