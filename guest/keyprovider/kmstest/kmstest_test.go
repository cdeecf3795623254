// SPDX-License-Identifier: Apache-2.0

package kmstest_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/prpc"
)

var app = dstack.AppID(bytes.Repeat([]byte{0x11}, 20))

// call asks with the root as the only authority, protobuf or JSON.
func call(t *testing.T, s *kmstest.Server, asJSON bool, method string, req, resp proto.Message) error {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.RootPEM()))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return (&prpc.Client{BaseURL: s.URL + "/prpc", HTTP: &http.Client{Transport: transport}, JSON: asJSON}).Call(ctx, method, req, resp)
}

func evidence(t *testing.T, data, quoted dstack.ReportData) []byte {
	t.Helper()
	var log []eventlog.Event
	for _, e := range []struct {
		name    string
		payload []byte
	}{{"app-id", app[:]}, {"compose-hash", make([]byte, 32)}, {"instance-id", nil}, {"boot-mr-done", nil}} {
		ev, err := eventlog.RuntimeV1(e.name, e.payload)
		if err != nil {
			t.Fatal(err)
		}
		log = append(log, ev)
	}
	p := tdxtest.New(t)
	body := p.Body()
	body.ReportData = quoted
	out, err := container.Encode(&attest.Evidence{TEE: dstack.TDX, Quote: p.Quote(body), EventLog: log, ReportData: data, ReportDataClaimed: true})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// request returns a signed request for a new key; change may spoil it before.
func request(t *testing.T, change func(*csr.Request)) *kmsapi.SignCertRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	data := ratls.ReportData(spki)
	r := &csr.Request{Version: 2, Evidence: evidence(t, data, data), Config: csr.Config{
		Subject: "web", Names: []string{"web.example.com"}, ServerAuth: true, WithEvidence: true, WithAppInfo: true,
	}}
	if change != nil {
		change(r)
	}
	raw, signature, err := r.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	return &kmsapi.SignCertRequest{ApiVersion: 2, Csr: raw, Signature: signature, VmConfig: "{}"}
}

func TestItSignsCertificates(t *testing.T) {
	var deny error
	s, err := kmstest.Start(kmstest.Options{Allow: func(kmstest.Call) error { return deny }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, asJSON := range []bool{false, true} {
		var resp kmsapi.SignCertResponse
		if err := call(t, s, asJSON, "SignCert", request(t, nil), &resp); err != nil {
			t.Fatal(err)
		}
		if len(resp.CertificateChain) != 3 || resp.CertificateChain[2] != s.RootPEM() {
			t.Fatalf("the chain is %q", resp.CertificateChain)
		}
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AppendCertsFromPEM([]byte(s.RootPEM()))
		between.AppendCertsFromPEM([]byte(resp.CertificateChain[1]))
		block, _ := pem.Decode([]byte(resp.CertificateChain[0]))
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: "web.example.com"}); err != nil {
			t.Error(err)
		}
		claims, err := ratls.IssuerClaims(leaf)
		if err != nil || claims.AppID == nil || *claims.AppID != app || claims.Usage != ratls.UsageApp || claims.Info == nil {
			t.Errorf("%+v, %v", claims, err)
		}
		if _, err := ratls.FromCertificate(leaf); err != nil {
			t.Error(err)
		}
		ca, err := certificate.Parse([]byte(resp.CertificateChain[1]))
		if err != nil {
			t.Fatal(err)
		}
		if claims, err := ratls.IssuerClaims(ca); err != nil || claims.Usage != ratls.UsageAppCA || *claims.AppID != app {
			t.Errorf("the app's CA: %+v, %v", claims, err)
		}
	}

	// A quote over another key, or over what it does not claim.
	other := dstack.ReportData{1}
	for name, change := range map[string]func(*csr.Request){
		"claim": func(r *csr.Request) { r.Evidence = evidence(t, other, other) },
		"quote": func(r *csr.Request) {
			e, err := container.Decode(r.Evidence)
			if err != nil {
				t.Fatal(err)
			}
			r.Evidence = evidence(t, e.ReportData, other)
		},
	} {
		err := call(t, s, false, "SignCert", request(t, change), &kmsapi.SignCertResponse{})
		if err == nil || !strings.Contains(err.Error(), "report data mismatch") {
			t.Errorf("%s: %v", name, err)
		}
	}
	forged := request(t, nil)
	forged.Signature = request(t, nil).Signature
	if err := call(t, s, false, "SignCert", forged, &kmsapi.SignCertResponse{}); err == nil {
		t.Error("a request that its key did not sign")
	}
	deny = errors.New("not today")
	if err := call(t, s, true, "SignCert", request(t, nil), &kmsapi.SignCertResponse{}); err == nil || !strings.Contains(err.Error(), "Boot denied: not today") {
		t.Errorf("denied: %v", err)
	}
}

func TestItGivesTheKeyOfAnEnvironment(t *testing.T) {
	s, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var meta kmsapi.GetMetaResponse
	if err := call(t, s, true, "KMS.GetMeta", nil, &meta); err != nil || !bytes.Equal(meta.K256Pubkey, s.K256()) || meta.CaCert != s.RootPEM() {
		t.Fatalf("%v, %v", &meta, err)
	}
	var key kmsapi.PublicKeyResponse
	if err := call(t, s, false, "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: app[:]}, &key); err != nil {
		t.Fatal(err)
	}
	if err := envelope.VerifyKey(s.K256(), app, key.PublicKey, key.SignatureV1, key.Timestamp, time.Now()); err != nil {
		t.Error(err)
	}
	if err := call(t, s, false, "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: app[:19]}, &key); err == nil || !strings.Contains(err.Error(), "app_id must be 20 bytes") {
		t.Errorf("a short app id: %v", err)
	}
	if err := call(t, s, false, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1}, &kmsapi.AppKeyResponse{}); err == nil || !strings.Contains(err.Error(), "No attestation provided") {
		t.Errorf("keys without evidence: %v", err)
	}
	if err := call(t, s, false, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 2}, &kmsapi.AppKeyResponse{}); err == nil || !strings.Contains(err.Error(), "Unsupported API version: 2") {
		t.Errorf("another version: %v", err)
	}
}
