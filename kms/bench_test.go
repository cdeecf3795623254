// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/prpc"
)

// latencies is what operations took.
type latencies struct {
	mu  sync.Mutex
	all []time.Duration
}

func (l *latencies) add(d time.Duration) {
	l.mu.Lock()
	l.all = append(l.all, d)
	l.mu.Unlock()
}

func (l *latencies) report(b *testing.B, took time.Duration) {
	if len(l.all) == 0 {
		return
	}
	slices.Sort(l.all)
	at := func(p float64) float64 {
		return float64(l.all[min(len(l.all)-1, int(p*float64(len(l.all))))].Microseconds()) / 1000
	}
	b.ReportMetric(at(0.50), "p50-ms")
	b.ReportMetric(at(0.99), "p99-ms")
	b.ReportMetric(float64(len(l.all))/took.Seconds(), "per-s")
}

// measure runs op one after another, and from as many goroutines as there are
// processors, each with what begin gives it.
func measure[T any](b *testing.B, begin func() T, op func(T) error) {
	b.Run("serial", func(b *testing.B) {
		state, l := begin(), &latencies{}
		if err := op(state); err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		for b.Loop() {
			t := time.Now()
			if err := op(state); err != nil {
				b.Fatal(err)
			}
			l.add(time.Since(t))
		}
		l.report(b, time.Since(start))
	})
	b.Run("parallel", func(b *testing.B) {
		l := &latencies{}
		var start time.Time
		var once sync.Once
		b.RunParallel(func(pb *testing.PB) {
			state := begin()
			if err := op(state); err != nil {
				b.Error(err)
				return
			}
			once.Do(func() { start = time.Now() })
			for pb.Next() {
				t := time.Now()
				if err := op(state); err != nil {
					b.Error(err)
					return
				}
				l.add(time.Since(t))
			}
		})
		l.report(b, time.Since(start))
	})
}

func appKey(c *prpc.Client) error {
	return c.Call(context.Background(), "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1}, new(kmsapi.AppKeyResponse))
}

// afresh makes each call over a connection of its own.
func afresh(c *prpc.Client) *prpc.Client {
	c.HTTP.Transport.(*http.Transport).DisableKeepAlives = true
	return c
}

// BenchmarkGetAppKey is the whole of a request: evidence verified on cached collateral,
// this KMS's authorisation and the app's, derivation, an entry of the log on the disk,
// the lease. A client's own evidence is made within what is measured where connections
// are attested, as it is in a guest, but by software.
func BenchmarkGetAppKey(b *testing.B) {
	w := newWorld(b, nil)
	guest := func() *tdxtest.Guest { return w.guest(appA, good) }
	b.Run("ratls kept", func(b *testing.B) { measure(b, func() *prpc.Client { return w.ratls(guest()) }, appKey) })
	b.Run("ratls new", func(b *testing.B) { measure(b, func() *prpc.Client { return afresh(w.ratls(guest())) }, appKey) })
	b.Run("attested kept", func(b *testing.B) { measure(b, func() *prpc.Client { return w.session(guest()) }, appKey) })
	b.Run("attested new", func(b *testing.B) { measure(b, func() *prpc.Client { return afresh(w.session(guest())) }, appKey) })
}

func BenchmarkSignCert(b *testing.B) {
	w := newWorld(b, nil)
	g := w.guest(appA, good)
	g.Booting = false
	type one struct {
		c *prpc.Client
		r *kmsapi.SignCertRequest
	}
	measure(b, func() one {
		r, _ := w.requestOf(b.Context(), g, csr.Config{Subject: "web", Names: []string{"web.apps.test"}, ServerAuth: true})
		return one{w.client(nil), r}
	}, func(o one) error {
		return o.c.Call(context.Background(), "SignCert", o.r, new(kmsapi.SignCertResponse))
	})
}

// BenchmarkPeer is what no KMS can go below: a mutual handshake and the derivations, for
// anybody who asks, with nothing verified, decided or written.
func BenchmarkPeer(b *testing.B) {
	roots, err := custody.Generate(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	defer roots.Wipe()
	cert := bare(b)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"http/1.1"}})
	if err != nil {
		b.Fatal(err)
	}
	server := prpc.Server(prpc.NewMux(nil, prpc.Unary("GetAppKey", func(ctx context.Context, _ *emptypb.Empty) (*kmsapi.AppKeyResponse, error) {
		at := custody.Scope{App: appA, Instance: make([]byte, 20)}
		disk, err := roots.DiskKey(ctx, at)
		if err != nil {
			return nil, err
		}
		env, err := roots.EnvKey(ctx, at)
		if err != nil {
			return nil, err
		}
		app, err := roots.AppKey(ctx, at)
		if err != nil {
			return nil, err
		}
		public, err := derive.K256Public(app.Bytes())
		if err != nil {
			return nil, err
		}
		signature, err := roots.Sign(ctx, derive.AppMessage(appA, public)...)
		return &kmsapi.AppKeyResponse{DiskCryptKey: disk.Bytes(), EnvCryptKey: env.Bytes(), K256Key: app.Bytes(), K256Signature: signature}, err
	})))
	go server.Server.Serve(l)
	defer server.Close()
	client := func() *prpc.Client {
		t := &http.Transport{TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return nil },
		}, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, l.Addr().String())
		}}
		b.Cleanup(t.CloseIdleConnections)
		return &prpc.Client{BaseURL: "https://peer.test/prpc", HTTP: &http.Client{Transport: t}}
	}
	b.Run("kept", func(b *testing.B) { measure(b, client, appKey) })
	b.Run("new", func(b *testing.B) { measure(b, func() *prpc.Client { return afresh(client()) }, appKey) })
}

func bare(b *testing.B) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		b.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
