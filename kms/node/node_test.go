// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/authd"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/governance/authority"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/webhook"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/kms"
	"github.com/dstack-go/dstack/kms/onboard"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/releaselog"
)

func TestARestartKeepsEverything(t *testing.T) {
	w := newWorld(t)
	c := w.config(w.guest(1))
	r := w.start(c)
	root, env, meta := r.root(), r.envKey(), r.meta()
	temp, err := call[kmsapi.GetTempCaCertResponse](r.client(), "GetTempCaCert", nil)
	w.check(err)
	if meta.BootstrapInfo == nil || string(meta.BootstrapInfo.CaPubkey) != root || !bytes.Equal(meta.BootstrapInfo.K256Pubkey, meta.K256Pubkey) {
		t.Errorf("bootstrap info %v", meta.BootstrapInfo)
	}
	// What it attests to is what its keys are.
	var data dstack.ReportData
	copy(data[:], BootstrapData(custody.Identity{CA: []byte(root), K256: meta.K256Pubkey}))
	if _, err := w.judge().Judge(t.Context(), applicant.Evidence{Container: meta.BootstrapInfo.Attestation, ReportData: data}); err != nil {
		t.Errorf("its attestation: %v", err)
	}
	head := meta.LogHead
	if err := r.end(); err != nil {
		t.Fatalf("it ended with %v", err)
	}
	again := w.start(c)
	tempAgain, err := call[kmsapi.GetTempCaCertResponse](again.client(), "GetTempCaCert", nil)
	w.check(err)
	if again.root() != root || again.envKey() != env || tempAgain.TempCaKey != temp.TempCaKey ||
		!bytes.Equal(again.meta().BootstrapInfo.Attestation, meta.BootstrapInfo.Attestation) {
		t.Error("something changed")
	}
	old, err := releaselog.VerifyHead(head, []byte(root))
	w.check(err)
	now, err := releaselog.VerifyHead(again.meta().LogHead, []byte(root))
	w.check(err)
	proof, err := call[kmsapi.LogConsistencyResponse](again.client(), "GetLogConsistency", &kmsapi.LogConsistencyRequest{From: old.Size()})
	w.check(err)
	if err := releaselog.Compare(old, now, proof.Proof); err != nil || now.Size() <= old.Size() {
		t.Errorf("the log: %v", err)
	}
	kinds := ""
	for _, e := range again.entries() {
		kinds += string(e.Kind) + " "
	}
	if kinds != "start shutdown start " {
		t.Errorf("the log tells of %s", kinds)
	}
}

// A KMS without a policy waits for one, which anyone may bring: its signatures count.
func TestAPolicyComesBeforeTheKeys(t *testing.T) {
	w := newWorld(t)
	c := w.config(w.guest(1))
	c.Core.AuthAPI.Policy.File = ""
	r, err := w.run(c)
	w.check(err)
	client := r.client()
	var wrong error
	for range 100 {
		if _, wrong = call[kmsapi.GetMetaResponse](client, "GetMeta", nil); fault.Code(wrong) == "onboarding" {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	wantCode(t, wrong, "onboarding")
	good := w.signed()
	forged := bytes.Replace(good, []byte(`"signature":"`), []byte(`"signature":"00`), 1)
	_, err = call[kmsapi.Policy](client, "UpdatePolicy", &kmsapi.Policy{Signed: forged})
	if err == nil {
		t.Error("a forged policy is taken")
	}
	noRoot(t, c.Core.DataDir)
	out, err := call[kmsapi.Policy](client, "UpdatePolicy", &kmsapi.Policy{Signed: good})
	w.check(err)
	if !bytes.Equal(out.Signed, good) {
		t.Error("another policy is in force")
	}
	r.serving()
	root := r.root()
	// What was submitted stands, although the file that a later configuration names is older.
	w.doc.Sequence, w.doc.Apps = 5, nil
	if _, err := call[kmsapi.Policy](r.client(), "UpdatePolicy", &kmsapi.Policy{Signed: w.signed()}); err != nil {
		t.Fatal(err)
	}
	newest := w.signed()
	r.end()
	c.Core.AuthAPI.Policy.File = string(good)
	again := w.start(c)
	in, err := call[kmsapi.Policy](again.client(), "GetPolicy", nil)
	w.check(err)
	if !bytes.Equal(in.Signed, newest) || again.root() != root {
		t.Error("an older policy came back")
	}
	// Even one that has run out keeps it from nothing.
	again.end()
	w.mu.Lock()
	w.now = w.now.Add(23 * time.Hour)
	w.mu.Unlock()
	expired := newWorld(t)
	expired.owner, expired.platform = w.owner, w.platform
	expired.doc.Expires = expired.doc.Issued.Add(time.Hour)
	c.Core.AuthAPI.Policy.File = string(expired.signed())
	w.start(c)
}

// Two KMSs: the second gets the first one's keys over one attested connection.
func TestAReplicaHasTheSameKeys(t *testing.T) {
	w := newWorld(t)
	a := w.start(w.config(w.guest(1)))
	c := w.config(w.guest(2))
	c.Core.Onboard.AutoBootstrapDomain, c.Core.Onboard.SourceURL, c.Core.Domain = "", a.url(), "kms2.test"
	c.Core.Onboard.RootCA = strings.ToUpper(hex.EncodeToString([]byte(a.root())))
	c.Core.Names = "kms.test,127.0.0.1"
	b := w.start(c)
	if a.root() != b.root() || !bytes.Equal(a.meta().K256Pubkey, b.meta().K256Pubkey) || a.envKey() != b.envKey() {
		t.Error("the replica has other keys")
	}
	if b.meta().BootstrapInfo != nil {
		t.Error("the replica says that it made the keys")
	}
	ta, err := call[kmsapi.GetTempCaCertResponse](a.client(), "GetTempCaCert", nil)
	w.check(err)
	tb, err := call[kmsapi.GetTempCaCertResponse](b.client(), "GetTempCaCert", nil)
	w.check(err)
	if ta.TempCaKey != tb.TempCaKey {
		t.Error("the temporary CA is another")
	}
	ha, err := releaselog.VerifyHead(a.meta().LogHead, []byte(a.root()))
	w.check(err)
	hb, err := releaselog.VerifyHead(b.meta().LogHead, []byte(a.root()))
	w.check(err)
	if ha.Log() == hb.Log() {
		t.Error("two KMSs write one log")
	}
	var grants int
	for _, e := range a.entries() {
		if e.Purpose == "replication" && e.Kind == releaselog.Grant && e.InstanceID == (dstack.InstanceID{2}) && e.Session {
			grants++
		}
	}
	if grants != 1 {
		t.Errorf("the source logged %d replications", grants)
	}
	if e := b.entries(); e[0].Kind != releaselog.Member || !strings.Contains(e[0].Note, "replicated") {
		t.Errorf("the replica's log begins with %+v", e[0])
	}
	// The first is gone; the second serves, and starts again by itself.
	root := a.root()
	a.end()
	b.end()
	if w.start(c).root() != root {
		t.Error("another root after a restart")
	}
}

// source is a KMS of an attacker who has a genuine one's machine to answer with: his
// evidence holds, and what he says is his own.
type source struct {
	addr     string
	accepted atomic.Int64
	requests atomic.Int64
}

func (w *world) source(attester channel.Attester, handler http.Handler) *source {
	w.t.Helper()
	s := &source{}
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	w.check(err)
	s.addr = raw.Addr().String()
	l, err := channel.NewListener(counting{raw, &s.accepted}, &channel.Config{
		Appraiser: anyPeer{w}, Attester: attester, AppEvidence: true, Now: w.clock,
	})
	w.check(err)
	server := prpc.Server(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		s.requests.Add(1)
		handler.ServeHTTP(rw, r)
	}))
	done := make(chan struct{})
	go func() { defer close(done); server.Server.Serve(l) }()
	w.t.Cleanup(func() { server.Close(); <-done })
	return s
}

type counting struct {
	net.Listener
	n *atomic.Int64
}

func (c counting) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.n.Add(1)
	}
	return conn, err
}

type anyPeer struct{ w *world }

func (p anyPeer) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	a, err := p.w.judge().Judge(ctx, applicant.Evidence{Container: c.Container, ReportData: c.ReportData, Session: true})
	if err != nil {
		return nil, err
	}
	return a.Appraisal(), nil
}

// replica opens a node that has no keys, for one attempt.
func (w *world) replica(edit func(*Config)) *Node {
	w.t.Helper()
	c := w.config(w.guest(2))
	c.Core.Onboard.AutoBootstrapDomain, c.Core.Domain = "", "kms2.test"
	if edit != nil {
		edit(&c)
	}
	n, err := open(w.t.Context(), c, nil, w.clock, w.judge())
	w.check(err)
	return n
}

// honest is what a genuine source of the given roots answers.
func honest(w *world, roots *custody.Roots, edit func(*kmsapi.GetMetaResponse, *kmsapi.KmsKeyResponse)) http.Handler {
	id := roots.Identity()
	ca, err := certificate.Self(roots.CA(), certificate.Subject{Organization: "Dstack", Name: "Dstack KMS CA", Path: 1}, ratls.Issued{}, nil, w.clock())
	w.check(err)
	_, tempKey, err := kms.NewTempCA(nil, w.clock())
	w.check(err)
	log, err := releaselog.Create(context.Background(), filepath.Join(w.t.TempDir(), "log"), id.CA, func(ctx context.Context, d []byte) ([]byte, error) {
		return roots.Attest(ctx, custody.PurposeReleaseLog, d)
	})
	w.check(err)
	w.t.Cleanup(func() { log.Close() })
	meta := &kmsapi.GetMetaResponse{CaCert: ca.PEM(), K256Pubkey: id.K256}
	keys, err := roots.Export()
	w.check(err)
	receipt, err := log.Append(context.Background(), releaselog.Entry{Time: w.clock(), Kind: releaselog.Grant, Purpose: "replication", Role: "kms", AppID: kmsApp})
	w.check(err)
	reply := &kmsapi.KmsKeyResponse{TempCaKey: string(tempKey), Keys: []*kmsapi.KmsKeys{keys}, Release: receipt.Release()}
	if edit != nil {
		edit(meta, reply)
	}
	return prpc.NewMux([]string{"KMS."},
		prpc.Unary("GetMeta", func(context.Context, *emptypb.Empty) (*kmsapi.GetMetaResponse, error) { return meta, nil }),
		prpc.Unary("GetKmsKey", func(context.Context, *kmsapi.GetKmsKeyRequest) (*kmsapi.KmsKeyResponse, error) { return reply, nil }),
	)
}

func generate(w *world) *custody.Roots {
	w.t.Helper()
	r, err := onboardRoots()
	w.check(err)
	w.t.Cleanup(r.Wipe)
	return r
}

// The proxy lets the verified connection through and cuts it once the roots are to
// come, to answer the second one himself: there is no second one.
func TestThreat_C03_ASecondConnectionIsNotMade(t *testing.T) {
	w := newWorld(t)
	evil := honest(w, generate(w), nil)
	// Without an answer, or after an orderly one: the next request needs a connection.
	for _, at := range []string{"GetMeta", "GetKmsKey", "the end of GetMeta"} {
		t.Run("cut at "+at, func(t *testing.T) {
			meta := honest(w, generate(w), nil)
			var s *source
			s = w.source(w.guest(1), http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				switch {
				case s.accepted.Load() > 1:
					evil.ServeHTTP(rw, r)
				case strings.HasSuffix(r.URL.Path, at):
					panic(http.ErrAbortHandler) // the connection is closed without an answer
				default:
					if strings.HasPrefix(at, "the end") {
						rw.Header().Set("Connection", "close")
					}
					meta.ServeHTTP(rw, r)
				}
			}))
			n := w.replica(nil)
			err := n.state.Begin(t.Context(), "https://"+s.addr)
			if err == nil {
				t.Fatal("the replica has keys")
			}
			if got := s.accepted.Load(); got != 1 {
				t.Errorf("%d connections, want the one that was verified: %v", got, err)
			}
			noRoot(t, n.cfg.Core.DataDir)
			if p := n.state.State().Phase; p != onboard.Empty {
				t.Errorf("phase %q", p)
			}
		})
	}
}

// A proxy cannot end the connection: it has no evidence for its own.
func TestThreat_C03_AProxyInBetweenIsRefused(t *testing.T) {
	w := newWorld(t)
	a := w.guest(1)
	// It shows what the genuine KMS showed on its own connection to it.
	s := w.source(channel.AttesterFunc(func(ctx context.Context, _ dstack.ReportData) ([]byte, error) {
		return a.Attest(ctx, dstack.ReportData{1, 2, 3})
	}), honest(w, generate(w), nil))
	n := w.replica(nil)
	wantCode(t, n.state.Begin(t.Context(), "https://"+s.addr), "report_data_mismatch")
	if s.requests.Load() != 0 {
		t.Error("it was asked for something")
	}
	noRoot(t, n.cfg.Core.DataDir)
}

// A source whose evidence holds, and whose answers do not hang together.
func TestThreat_C03_RootsThatAreSwapped(t *testing.T) {
	w := newWorld(t)
	good, evil := generate(w), generate(w)
	swapped, err := evil.Export()
	w.check(err)
	for _, c := range []struct {
		name string
		edit func(*kmsapi.GetMetaResponse, *kmsapi.KmsKeyResponse)
		pin  bool
		code string
	}{
		{"nothing swapped", nil, true, ""},
		{"other roots than the certificate's", func(_ *kmsapi.GetMetaResponse, k *kmsapi.KmsKeyResponse) {
			k.Keys = []*kmsapi.KmsKeys{{CaKey: swapped.CaKey, K256Key: bytes.Clone(swapped.K256Key)}}
		}, false, "root_mismatch"},
		{"one other root", func(_ *kmsapi.GetMetaResponse, k *kmsapi.KmsKeyResponse) {
			k.Keys[0].K256Key = bytes.Clone(swapped.K256Key)
		}, false, "root_mismatch"},
		{"two sets", func(_ *kmsapi.GetMetaResponse, k *kmsapi.KmsKeyResponse) { k.Keys = append(k.Keys, swapped) }, false, "onboard_source"},
		{"none", func(_ *kmsapi.GetMetaResponse, k *kmsapi.KmsKeyResponse) { k.Keys = nil }, false, "onboard_source"},
		{"no certificate", func(m *kmsapi.GetMetaResponse, _ *kmsapi.KmsKeyResponse) { m.CaCert = "" }, false, "onboard_source"},
		{"roots that are in no log", func(_ *kmsapi.GetMetaResponse, k *kmsapi.KmsKeyResponse) { k.Release = nil }, false, "release_log_missing"},
		{"no proof that they are", func(_ *kmsapi.GetMetaResponse, k *kmsapi.KmsKeyResponse) { k.Release.Index++ }, false, "release_log_inclusion"},
		{"a temporary CA that is none", func(_ *kmsapi.GetMetaResponse, k *kmsapi.KmsKeyResponse) { k.TempCaKey = "x" }, false, "onboard_source"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := w.source(w.guest(1), honest(w, good, c.edit))
			n := w.replica(func(cfg *Config) {
				if c.pin {
					cfg.Core.Onboard.RootCA = hex.EncodeToString(good.Identity().CA)
				}
			})
			wantCode(t, n.state.Begin(t.Context(), "https://"+s.addr), c.code)
			if c.code != "" {
				noRoot(t, n.cfg.Core.DataDir)
			}
		})
	}
	// Everything is of one other root, and the replica's configuration pins the right one.
	s := w.source(w.guest(1), honest(w, evil, nil))
	n := w.replica(func(cfg *Config) { cfg.Core.Onboard.RootCA = hex.EncodeToString(good.Identity().CA) })
	wantCode(t, n.state.Begin(t.Context(), "https://"+s.addr), "root_mismatch")
	noRoot(t, n.cfg.Core.DataDir)
}

// The root's own certificate, and no evidence: a KMS that is known by its authority alone
// is none to a replica.
func TestThreat_C04_ACertificateOfTheRootIsNotEnough(t *testing.T) {
	w := newWorld(t)
	roots := generate(w)
	ca, err := certificate.Self(roots.CA(), certificate.Subject{Name: "Dstack KMS CA", Path: 1}, ratls.Issued{}, nil, w.clock())
	w.check(err)
	key, evidence := ephemeral(w)
	der, err := ca.Issue(certificate.Leaf{
		Config: csr.Config{Subject: "kms.test", Names: []string{"kms.test", "127.0.0.1"}}, Public: &key.PublicKey,
		Issued: ratls.Issued{Usage: ratls.UsageKMS}, Evidence: evidence,
	}, w.clock())
	w.check(err)
	var requests atomic.Int64
	handler := honest(w, roots, nil)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	})
	w.check(err)
	server := prpc.Server(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { requests.Add(1); handler.ServeHTTP(rw, r) }))
	done := make(chan struct{})
	go func() { defer close(done); server.Server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	n := w.replica(func(c *Config) { c.Core.Onboard.RootCA = hex.EncodeToString(roots.Identity().CA) })
	wantCode(t, n.state.Begin(t.Context(), "https://"+l.Addr().String()), "channel_alpn")
	if requests.Load() != 0 {
		t.Error("it was asked for something")
	}
	noRoot(t, n.cfg.Core.DataDir)
}

// A source that the replica's own authority does not allow, and a replica that the
// source's does not.
func TestThreat_G01_BothEndsOfAReplicationAreAuthorised(t *testing.T) {
	w := newWorld(t)
	other := w.guest(1)
	other.ComposeHash = dstack.ComposeHash{0xee}
	s := w.source(other, honest(w, generate(w), nil))
	n := w.replica(nil)
	wantCode(t, n.state.Begin(t.Context(), "https://"+s.addr), "kms_not_allowed")
	if s.requests.Load() != 0 {
		t.Error("it was asked for something")
	}
	noRoot(t, n.cfg.Core.DataDir)

	a := w.start(w.config(w.guest(1)))
	root := a.root()
	b := w.guest(2)
	b.ComposeHash = other.ComposeHash
	c := w.config(b)
	c.Core.Onboard.AutoBootstrapDomain, c.Core.Domain, c.Core.Onboard.SourceURL = "", "kms2.test", a.url()
	// Its own authority would let it.
	mine := *w.doc
	mine.KMS.Allow = append([]policy.Member{{AppID: &kmsApp, ComposeHash: &b.ComposeHash, OSImageHash: &kmsImage}}, mine.KMS.Allow...)
	was := w.doc
	w.doc = &mine
	c.Core.AuthAPI.Policy.File = string(w.signed())
	w.doc = was
	m, err := open(t.Context(), c, nil, w.clock, w.judge())
	w.check(err)
	wantCode(t, m.state.Begin(t.Context(), a.url()), "kms_not_allowed")
	noRoot(t, c.Core.DataDir)
	if e := a.entries(); e[len(e)-1].Kind != releaselog.Refusal || e[len(e)-1].Code != "kms_not_allowed" || a.root() != root {
		t.Errorf("the source's log: %+v", e[len(e)-1])
	}
}

// operators starts a KMS that waits for its operators.
func (w *world) operators() (*running, string) {
	w.t.Helper()
	c := w.config(w.guest(1))
	c.Core.Onboard.AutoBootstrapDomain, c.Core.Domain, c.Core.Onboard.Port = "", "kms.test", freePort(w.t)
	r, err := w.run(c)
	w.check(err)
	return r, "http://" + net.JoinHostPort("127.0.0.1", itoa(c.Core.Onboard.Port))
}

func TestThreat_G09_BootstrappingTakesTheTokenOfTheConsole(t *testing.T) {
	w := newWorld(t)
	r, url := w.operators()
	token := r.token()
	if len(token) < 32 {
		t.Errorf("token %q", token)
	}
	const domain = `{"domain":"kms.test"}`
	for _, path := range []string{"/prpc/Onboard.Bootstrap?json", "/prpc/Bootstrap?json", "/prpc/Onboard.Onboard?json", "/prpc/Onboard.GetAttestationInfo?json", "/prpc/Onboard.Finish?json", "/finish", "/"} {
		for _, header := range []map[string]string{nil, {"Authorization": "Bearer"}, {"Authorization": "Bearer " + token[:31]}, {"X-Admin-Token": token + "0"}} {
			method := "POST"
			if !strings.HasPrefix(path, "/prpc") {
				method = "GET"
			}
			if status, text, _ := httpDo(t, method, url+path, header, domain); status != 401 || strings.Contains(text, token[:8]) {
				t.Errorf("%s with %v: %d %q", path, header, status, text)
			}
		}
	}
	if status, text, _ := httpDo(t, "GET", url+"/health", nil, ""); status != 200 || text != "OK" {
		t.Errorf("health: %d %q", status, text)
	}
	noRoot(t, r.cfg.Core.DataDir)
	select {
	case err := <-r.done:
		t.Fatalf("a stranger ended it: %v", err)
	default:
	}

	with := map[string]string{"Authorization": "Bearer " + token}
	post := func(method, body string) (int, map[string]any) {
		t.Helper()
		status, text, _ := httpDo(t, "POST", url+"/prpc/Onboard."+method+"?json", with, body)
		out := map[string]any{}
		if text != "null" && json.Unmarshal([]byte(text), &out) != nil {
			t.Errorf("%s: %q", method, text)
		}
		return status, out
	}
	status, info := post("GetAttestationInfo", "{}")
	if status != 200 || info["tee_variant"] != "dstack-tdx" || info["os_image_hash"] != kmsImage.String() || info["device_id"] == "" || info["ppid"] == "" {
		t.Errorf("attestation info: %d %v", status, info)
	}
	for _, c := range []struct{ body, code string }{
		{`{"domain":""}`, "kms_domain"}, {`{"domain":"kms_x.y"}`, "kms_domain"}, {`{"domain":"other.test"}`, "kms_domain"},
	} {
		if status, out := post("Bootstrap", c.body); status != 400 || out["code"] != c.code {
			t.Errorf("%s: %d %v", c.body, status, out)
		}
	}
	for _, u := range []string{"http://kms.test", "https://", "https://u:p@kms.test", "file:///etc/passwd", "https://kms.test?x=1"} {
		if status, out := post("Onboard", `{"domain":"kms.test","source_url":"`+u+`"}`); status != 400 || out["code"] != "onboard_source" {
			t.Errorf("%s: %d %v", u, status, out)
		}
	}
	noRoot(t, r.cfg.Core.DataDir)
	status, made := post("Bootstrap", domain)
	if status != 200 || made["ca_pubkey"] == "" || made["attestation"] == "" {
		t.Fatalf("bootstrap: %d %v", status, made)
	}
	// Twice is once.
	for _, method := range []string{"Bootstrap", "Onboard"} {
		if status, out := post(method, `{"domain":"kms.test","source_url":"https://kms.test"}`); status != 400 || out["code"] != "already_bootstrapped" ||
			!strings.Contains(out["error"].(string), "already been bootstrapped") {
			t.Errorf("%s again: %d %v", method, status, out)
		}
	}
	if status, _ := post("Finish", "{}"); status != 200 {
		t.Errorf("finish: %d", status)
	}
	r.serving()
	if hex.EncodeToString([]byte(r.root())) != made["ca_pubkey"] || hex.EncodeToString(r.meta().K256Pubkey) != made["k256_pubkey"] {
		t.Error("it serves other keys than it told the operator of")
	}
	if strings.Contains(strings.Replace(r.out.String(), "setup token: "+token, "", 1), token) {
		t.Error("the token is in the log")
	}
	// The operators' port is gone.
	if c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://")); err == nil {
		c.Close()
		t.Error("the operators' port is still open")
	}
}

func TestFinishingWithoutKeysEndsIt(t *testing.T) {
	w := newWorld(t)
	r, url := w.operators()
	if status, _, _ := httpDo(t, "GET", url+"/finish", map[string]string{"X-Admin-Token": r.token()}, ""); status != 200 {
		t.Errorf("finish: %d", status)
	}
	err := <-r.done
	r.done <- err
	wantCode(t, err, "onboard_failed")
	noRoot(t, r.cfg.Core.DataDir)
}

func TestAKMSThatIsNotAllowedMakesNoKeys(t *testing.T) {
	w := newWorld(t)
	g := w.guest(1)
	g.ComposeHash = dstack.ComposeHash{0xee}
	c := w.config(g)
	r, err := w.run(c)
	w.check(err)
	for range 100 {
		if strings.Contains(r.out.String(), "kms_not_allowed") {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	r.stop()
	if err := <-r.done; !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	r.done <- nil
	if !strings.Contains(r.out.String(), "kms_not_allowed") {
		t.Errorf("it does not say why:\n%s", r.out)
	}
	noRoot(t, c.Core.DataDir)
}

func TestAKMSThatIsToldNoWayToItsKeys(t *testing.T) {
	w := newWorld(t)
	c := w.config(w.guest(1))
	c.Core.Onboard.AutoBootstrapDomain, c.Core.Domain = "", "kms.test"
	r, err := w.run(c)
	w.check(err)
	err = <-r.done
	r.done <- err
	wantCode(t, err, "onboard_absent")
}

// A log that is lost, or shorter than its head says, is a refusal to start; another one is
// never begun in its place.
func TestThreat_G10_ALostLogIsARefusal(t *testing.T) {
	w := newWorld(t)
	c := w.config(w.guest(1))
	r := w.start(c)
	r.envKey()
	r.end()
	for _, d := range []struct {
		name string
		lose func(dir string) error
		code string
	}{
		{"the whole log", os.RemoveAll, "release_log_missing"},
		{"its entries", func(dir string) error { return os.Remove(filepath.Join(dir, "entries.jsonl")) }, "release_log_missing"},
		{"its head", func(dir string) error { return os.Remove(filepath.Join(dir, "head.json")) }, "release_log_missing"},
		{"its key", func(dir string) error { return os.Remove(filepath.Join(dir, "log.key")) }, "release_log_missing"},
		{"half of its entries", func(dir string) error { return os.Truncate(filepath.Join(dir, "entries.jsonl"), 20) }, "release_log_damaged"},
		{"all of its entries", func(dir string) error { return os.Truncate(filepath.Join(dir, "entries.jsonl"), 0) }, "release_log_damaged"},
		{"a byte of an entry", func(dir string) error {
			path := filepath.Join(dir, "entries.jsonl")
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, bytes.Replace(b, []byte("start"), []byte("stort"), 1), 0o600)
		}, "release_log_damaged"},
	} {
		t.Run(d.name, func(t *testing.T) {
			cfg := c
			cfg.Core.DataDir = filepath.Join(t.TempDir(), "data")
			if err := os.CopyFS(cfg.Core.DataDir, os.DirFS(c.Core.DataDir)); err != nil {
				t.Fatal(err)
			}
			privatise(t, cfg.Core.DataDir)
			dir := onboard.LogDir(cfg.Core.DataDir)
			if err := d.lose(dir); err != nil {
				t.Fatal(err)
			}
			before := listing(t, cfg.Core.DataDir)
			for range 2 {
				r, err := w.run(cfg)
				w.check(err)
				err = <-r.done
				r.done <- err
				wantCode(t, err, d.code)
			}
			if after := listing(t, cfg.Core.DataDir); after != before {
				t.Errorf("files\n%s\nbecame\n%s", before, after)
			}
		})
	}
}

// The root is lost, and nothing else: it starts no other.
func TestThreat_G09_ALostRootIsARefusal(t *testing.T) {
	w := newWorld(t)
	c := w.config(w.guest(1))
	w.start(c).end()
	if err := os.Remove(onboard.RootFile(c.Core.DataDir)); err != nil {
		t.Fatal(err)
	}
	r, err := w.run(c)
	w.check(err)
	err = <-r.done
	r.done <- err
	wantCode(t, err, "root_missing")
	noRoot(t, c.Core.DataDir)
}

// One data directory, one KMS.
func TestTwoOfOneDirectory(t *testing.T) {
	w := newWorld(t)
	c := w.config(w.guest(1))
	w.start(c)
	c.RPC.Port = freePort(t)
	r, err := w.run(c)
	w.check(err)
	err = <-r.done
	r.done <- err
	wantCode(t, err, "release_log_locked")
}

func TestAdministratorsListenerRuns(t *testing.T) {
	w := newWorld(t)
	c := w.config(w.guest(1))
	c.Core.Admin.Enabled, c.Core.Admin.Port = true, freePort(t)
	w.check(c.Core.Admin.AuthToken.UnmarshalText([]byte(adminTokenText)))
	w.check(c.check())
	w.start(c)
	url := "http://" + net.JoinHostPort("127.0.0.1", itoa(c.Core.Admin.Port))
	if status, text, h := httpDo(t, "POST", url+"/prpc/Admin.ClearImageCache?json", map[string]string{"X-Admin-Token": adminTokenText}, `{"image_hash":"all"}`); status != 200 || h.Get("X-App-Version") != "v0 (test)" {
		t.Errorf("%d %q", status, text)
	}
	if status, _, _ := httpDo(t, "POST", url+"/prpc/Admin.ClearImageCache?json", nil, `{}`); status != 401 {
		t.Errorf("without a token: %d", status)
	}
}

// Development roots are refused by a build for production, as tests are one.
func TestThreat_G08_DevelopmentIsNoConfiguration(t *testing.T) {
	if development {
		t.Skip("built for development")
	}
	w := newWorld(t)
	c := w.config(w.guest(1))
	roots, err := w.platform.DevRoots().Bytes()
	w.check(err)
	c.Core.Attestation.DevRoots, c.Core.AuthAPI.Policy.File = string(roots), ""
	_, err = Open(t.Context(), c, nil)
	wantCode(t, err, "development_refused")
	c.Core.Attestation.DevRoots, c.Core.Guest.Socket = "", ""
	_, err = Open(t.Context(), c, nil)
	wantCode(t, err, "development_refused")
	c.Core.AuthAPI.Type = "dev"
	wantCode(t, c.check(), "kms_config")
	noRoot(t, c.Core.DataDir)
}

func TestAGuestAgentThatDoesNotAnswer(t *testing.T) {
	w := newWorld(t)
	c := w.config(w.guest(1))
	c.Core.Guest.Socket = filepath.Join(t.TempDir(), "none")
	_, err := w.run(c)
	wantCode(t, err, "app_self")
}

// Many ask at once while it stops: whoever was answered was answered whole.
func TestStoppingUnderLoad(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.config(w.guest(1)))
	var wg sync.WaitGroup
	var answered atomic.Int64
	for range 8 {
		client := r.client()
		wg.Go(func() {
			for {
				k, err := call[kmsapi.PublicKeyResponse](client, "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: app[:]})
				if err != nil {
					return
				}
				if len(k.PublicKey) != 32 || k.LogHead == nil {
					t.Error("half an answer")
				}
				answered.Add(1)
			}
		})
	}
	for answered.Load() < 20 {
		time.Sleep(5 * time.Millisecond)
	}
	if err := r.end(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	wg.Wait()
}

// A KMS whose authority is a webhook, as its configuration names it, and somebody in
// between who turns a no into a yes.
func TestThreat_G04_ANodeBelievesItsWebhooksSignatureAlone(t *testing.T) {
	w := newWorld(t)
	public, private, err := ed25519.GenerateKey(rand.Reader)
	w.check(err)
	document, err := policy.OpenAuthority(filepath.Join(t.TempDir(), "policy.json"), policy.Keys{Keys: []ed25519.PublicKey{w.owner.Public().(ed25519.PublicKey)}, Threshold: 1}, w.clock)
	w.check(err)
	w.check(document.Update(w.signed()))
	genuine := &webhook.Handler{Authority: document, Key: private, Now: w.clock}
	var flip atomic.Bool
	proxy := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rec := httptest.NewRecorder()
		genuine.ServeHTTP(rec, r)
		body := rec.Body.Bytes()
		if flip.Load() {
			body = bytes.Replace(body, []byte(`"isAllowed":false`), []byte(`"isAllowed":true`), 1)
		}
		rw.WriteHeader(rec.Code)
		rw.Write(body)
	}))
	defer proxy.Close()
	config := func(g *tdxtest.Guest) Config {
		c := w.config(g)
		c.Core.AuthAPI = authority.Config{Type: "webhook", Webhook: authority.Webhook{URL: proxy.URL, Key: hex.EncodeToString(public)}}
		w.check(c.check())
		return c
	}
	a := w.start(config(w.guest(1)))
	a.envKey()
	if _, err := call[kmsapi.Policy](a.client(), "GetPolicy", nil); fault.Code(err) != "policy_absent" {
		t.Errorf("a policy beside a webhook: %v", err)
	}
	// A build that is not listed, which the one in between lets through.
	g := w.guest(2)
	g.ComposeHash = dstack.ComposeHash{0xee}
	flip.Store(true)
	n, err := open(t.Context(), config(g), nil, w.clock, w.judge())
	w.check(err)
	wantCode(t, n.allowed(t.Context()), "webhook_signature")
	// It is gone: nothing is decided in its stead.
	proxy.Close()
	_, err = call[kmsapi.PublicKeyResponse](a.client(), "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: app[:]})
	wantCode(t, err, "webhook_unreachable")
	_, err = call[kmsapi.GetMetaResponse](a.client(), "GetMeta", nil)
	wantCode(t, err, "webhook_unreachable")
}

// A KMS and the webhook's service, each as its configuration says, over a real listener:
// what the service's policy lists gets keys, what it does not list gets none.
func TestThreat_G04_TheServiceDecidesForANode(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "policy.json")
	w.check(os.WriteFile(file, w.signed(), 0o600))
	public, err := authd.NewKey(filepath.Join(dir, "key"))
	w.check(err)
	conf := authd.DefaultConfig()
	conf.DataDir, conf.KeyFile, conf.Listen.Socket = filepath.Join(dir, "data"), filepath.Join(dir, "key"), filepath.Join(dir, "auth.sock")
	conf.Auth.Policy = authority.Policy{Keys: fmt.Sprintf("%x", w.owner.Public()), Threshold: 1, File: file}
	service, err := authd.Open(conf, slog.New(slog.DiscardHandler), w.clock)
	w.check(err)
	ctx, stop := context.WithCancel(t.Context())
	ready, done := make(chan net.Addr, 1), make(chan error, 1)
	go func() { done <- service.Run(ctx, func(a net.Addr) { ready <- a }) }()
	t.Cleanup(func() {
		stop()
		w.check(<-done)
		service.Close()
	})
	<-ready
	config := func(g *tdxtest.Guest) Config {
		c := w.config(g)
		c.Core.AuthAPI = authority.Config{Type: authority.TypeWebhook, Webhook: authority.Webhook{URL: "unix://" + conf.Listen.Socket, Key: hex.EncodeToString(public)}}
		w.check(c.check())
		return c
	}
	w.start(config(w.guest(1))).envKey()
	g := w.guest(2)
	g.ComposeHash = dstack.ComposeHash{0xee}
	n, err := open(t.Context(), config(g), nil, w.clock, w.judge())
	w.check(err)
	wantCode(t, n.allowed(t.Context()), "kms_not_allowed")
}
