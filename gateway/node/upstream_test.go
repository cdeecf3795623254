// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	agentapi "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel/self"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/prpc"
)

// What upstream's guests are shown is of their KMS, names the gateway's app, and comes
// from the gateway's guest agent.
func TestTheCertificateForUpstreamsGuests(t *testing.T) {
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	authority := func() *certificate.Authority {
		a, err := certificate.Self(newKey(), certificate.Subject{Name: "Dstack KMS CA", Path: 1}, ratls.Issued{}, nil, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	kms, other := authority(), authority()
	own, another := dstack.AppID{0x9a}, dstack.AppID{7}
	var asked *agentapi.GetTlsKeyArgs
	reply := func(by *certificate.Authority, app dstack.AppID, chain int) *agentapi.GetTlsKeyResponse {
		ca, err := by.Authority(newKey(), certificate.Subject{Name: "Dstack App CA"}, ratls.Issued{AppID: &app, Usage: ratls.UsageAppCA}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		key := newKey()
		der, err := ca.Issue(certificate.Leaf{
			Config: csr.Config{Subject: "dstack-gateway", Names: []string{"gateway.example"}, ServerAuth: true, ClientAuth: true}, Public: &key.PublicKey,
			Issued: ratls.Issued{AppID: &app, Usage: ratls.UsageApp}, MaxLifetime: 24 * time.Hour,
		}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		text, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		out := []string{certificate.Encode(der), ca.PEM(), by.PEM()}
		return &agentapi.GetTlsKeyResponse{Key: string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text})), CertificateChain: out[:chain]}
	}
	next := reply(kms, own, 3)
	dir, err := os.MkdirTemp("", "agent") // sockets' paths are short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	srv := prpc.Server(prpc.NewMux(nil,
		prpc.Unary("Info", func(context.Context, *emptypb.Empty) (*agentapi.AppInfo, error) {
			return &agentapi.AppInfo{AppId: own[:], TcbInfo: `{"app_compose":"{}"}`}, nil
		}),
		prpc.Unary("GetTlsKey", func(_ context.Context, r *agentapi.GetTlsKeyArgs) (*agentapi.GetTlsKeyResponse, error) {
			asked = r
			return next, nil
		}),
	))
	go srv.Serve(l)
	defer srv.Close()
	app, err := self.Open(t.Context(), filepath.Join(dir, "s"))
	if err != nil || app.Manifest != "{}" {
		t.Fatal(app, err)
	}
	n := &Node{self: app, log: slog.New(slog.DiscardHandler)}
	n.cfg.Core.MyURL = "https://gateway.example:8000"
	u := &upstreamCert{n: n, ca: kms.Certificate.RawSubjectPublicKeyInfo}
	wait, err := u.renew(t.Context())
	if err != nil || u.cert.Load() == nil || wait < 15*time.Hour || wait > 17*time.Hour {
		t.Fatal(wait, err)
	}
	if !asked.UsageRaTls || !asked.UsageServerAuth || !asked.UsageClientAuth || !asked.WithAppInfo || asked.Subject != "dstack-gateway" || len(asked.AltNames) != 1 || asked.AltNames[0] != "gateway.example" {
		t.Errorf("asked for %v", asked)
	}
	held := u.cert.Load()
	for name, r := range map[string]*agentapi.GetTlsKeyResponse{
		"of another KMS":         reply(other, own, 3),
		"of another app":         reply(kms, another, 3),
		"of no KMS":              reply(kms, own, 1),
		"with another's key":     {Key: reply(kms, own, 3).Key, CertificateChain: next.CertificateChain},
		"that is no certificate": {Key: next.Key, CertificateChain: []string{"x"}},
	} {
		next = r
		wait, err := u.renew(t.Context())
		if code := fault.Code(err); code != "gateway_certificate" && code != "app_self" || wait != certificateRetry || u.cert.Load() != held {
			t.Errorf("one %s: %v after %s", name, err, wait)
		}
	}
	if _, err := u.check(held, held.Leaf.NotAfter); fault.Code(err) != "gateway_certificate" {
		t.Errorf("one that has run out: %v", err)
	}
	// It keeps what it has, and ends when it is told to.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := u.keep(ctx); err != nil || u.cert.Load() != held {
		t.Error(err)
	}
}
