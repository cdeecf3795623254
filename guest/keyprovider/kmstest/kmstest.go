// SPDX-License-Identifier: Apache-2.0

// Package kmstest is a KMS for tests, written from spec/kms.md alone: real keys, real
// TLS, upstream's messages, in memory on a loopback port.
//
// IT DOES NOT VERIFY EVIDENCE. Nothing checks the signatures of a quote, the platform
// or the measurements: whoever writes an app id into an event log gets that app's
// keys. It reads the evidence, and holds the report data of a TDX quote to the key
// that it must speak of, so that a client that binds wrongly fails. Only tests may
// import it (house_test.go).
package kmstest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"net"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/prpc"

	"google.golang.org/protobuf/types/known/emptypb"
)

// Options of a KMS; the zero value is one that allows everything.
type Options struct {
	Addr  string   // to listen on; "" means 127.0.0.1:0
	Names []string // of the server's certificate; nil means localhost and 127.0.0.1
	// Usage of the server's certificate; "" means ratls.UsageKMS.
	Usage string
	// RootCA and RootK256 are the root keys' scalars; nil means new ones.
	RootCA, RootK256 []byte
	// Allow refuses a call by its error, whose text the caller gets; nil allows all.
	Allow func(Call) error
	// Answer and AnswerTemp change an answer before it is sent; nil leaves it.
	Answer       func(*kmsapi.AppKeyResponse)
	AnswerTemp   func(*kmsapi.GetTempCaCertResponse)
	GatewayAppID string
	OSImageHash  []byte
	Now          func() time.Time
}

// Call is what the KMS learned of a caller; nothing of it was verified.
type Call struct {
	Method   string // GetAppKey or SignCert
	Identity eventlog.Identity
	Evidence *attest.Evidence
	VMConfig string
	Request  *csr.Request // of SignCert
}

// Server is a KMS that runs.
type Server struct {
	URL string // without /prpc

	opt       Options
	roots     derive.Roots
	root      *certificate.Authority
	temp      *certificate.Authority
	tempKey   []byte // PEM
	http      *prpc.HTTPServer
	done      chan struct{}
	mu        sync.Mutex
	calls     []Call
	clientCAs *x509.CertPool
}

// Start runs a KMS until Close.
func Start(opt Options) (*Server, error) {
	if opt.Addr == "" {
		opt.Addr = "127.0.0.1:0"
	}
	if opt.Names == nil {
		opt.Names = []string{"localhost", "127.0.0.1"}
	}
	if opt.Usage == "" {
		opt.Usage = ratls.UsageKMS
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	s := &Server{opt: opt, done: make(chan struct{})}
	cert, err := s.makeKeys()
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", opt.Addr)
	if err != nil {
		return nil, err
	}
	s.URL = "https://" + l.Addr().String()
	s.http = prpc.Server(prpc.NewMux([]string{"KMS."},
		prpc.Unary("GetMeta", s.getMeta),
		prpc.Unary("GetTempCaCert", s.getTempCA),
		prpc.Unary("GetAppEnvEncryptPubKey", s.getEnvKey),
		prpc.Unary("GetAppKey", s.getAppKey),
		prpc.Unary("SignCert", s.signCert),
	))
	s.http.ErrorLog = log.New(discard{}, "", 0) // refused handshakes are what tests are about
	s.http.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) }
	secure := tls.NewListener(l, &tls.Config{
		Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: s.clientCAs, Time: opt.Now,
	})
	go func() {
		defer close(s.done)
		_ = s.http.Server.Serve(secure)
	}()
	return s, nil
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

type connKey struct{}

// Close stops the KMS.
func (s *Server) Close() error {
	err := s.http.Close()
	<-s.done
	return err
}

// SPKI is what key_provider_id pins: the root CA's key.
func (s *Server) SPKI() []byte { return s.root.Certificate.RawSubjectPublicKeyInfo }

// RootPEM is the root CA's certificate.
func (s *Server) RootPEM() string { return s.root.PEM() }

// K256 is the KMS's compressed secp256k1 key.
func (s *Server) K256() []byte {
	public, err := derive.K256Public(s.roots.K256)
	if err != nil {
		panic(err) // Start made a signature with it
	}
	return public
}

// Roots are the root keys' scalars.
func (s *Server) Roots() derive.Roots { return s.roots }

// Calls returns the calls that the KMS took, in order.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Call(nil), s.calls...)
}

// makeKeys makes roots, the temporary CA and the server's certificate (kms.md §2.2).
func (s *Server) makeKeys() (tls.Certificate, error) {
	var none tls.Certificate
	s.roots = derive.Roots{CA: s.opt.RootCA, K256: s.opt.RootK256}
	for _, k := range []*[]byte{&s.roots.CA, &s.roots.K256} {
		if *k == nil {
			*k = make([]byte, 32)
			rand.Read(*k)
			(*k)[0] &= 0x7f // below both orders
		}
	}
	if _, err := derive.K256Public(s.roots.K256); err != nil {
		return none, err
	}
	rootKey, err := derive.P256FromScalar(s.roots.CA)
	if err != nil {
		return none, err
	}
	now := s.opt.Now()
	if s.root, err = certificate.Self(rootKey, certificate.Subject{Organization: "Dstack", Name: "Dstack KMS CA", Path: 1}, ratls.Issued{}, nil, now); err != nil {
		return none, err
	}
	tempKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return none, err
	}
	if s.tempKey, err = derive.PEM(tempKey); err != nil {
		return none, err
	}
	if s.temp, err = certificate.Self(tempKey, certificate.Subject{Organization: "Dstack", Name: "Dstack Client Temp CA"}, ratls.Issued{}, nil, now); err != nil {
		return none, err
	}
	s.clientCAs = x509.NewCertPool()
	s.clientCAs.AddCert(s.temp.Certificate)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return none, err
	}
	der, err := s.root.Issue(certificate.Leaf{
		Config: csr.Config{Subject: s.opt.Names[0], Names: s.opt.Names},
		Public: &key.PublicKey, Issued: ratls.Issued{Usage: s.opt.Usage},
	}, now)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

func (s *Server) getMeta(context.Context, *emptypb.Empty) (*kmsapi.GetMetaResponse, error) {
	return &kmsapi.GetMetaResponse{
		CaCert: s.RootPEM(), AllowAnyUpgrade: true, IsDev: true, K256Pubkey: s.K256(), GatewayAppId: &s.opt.GatewayAppID,
	}, nil
}

func (s *Server) getTempCA(context.Context, *emptypb.Empty) (*kmsapi.GetTempCaCertResponse, error) {
	out := &kmsapi.GetTempCaCertResponse{TempCaCert: s.temp.PEM(), TempCaKey: string(s.tempKey), CaCert: s.RootPEM()}
	if s.opt.AnswerTemp != nil {
		s.opt.AnswerTemp(out)
	}
	return out, nil
}

func appID(b []byte) (dstack.AppID, error) {
	if len(b) != dstack.AppIDSize {
		return dstack.AppID{}, errors.New("app_id must be 20 bytes")
	}
	return dstack.AppID(b), nil
}

func (s *Server) getEnvKey(_ context.Context, r *kmsapi.AppId) (*kmsapi.PublicKeyResponse, error) {
	app, err := appID(r.AppId)
	if err != nil {
		return nil, err
	}
	key, err := s.roots.Env(app)
	if err != nil {
		return nil, err
	}
	public, err := envelope.PublicKey(key)
	if err != nil {
		return nil, err
	}
	at := uint64(s.opt.Now().Unix())
	v0, v1, err := envelope.SignKey(derive.Signer(s.roots.K256), app, public, at)
	return &kmsapi.PublicKeyResponse{PublicKey: public, Signature: v0, SignatureV1: v1, Timestamp: at}, err
}

// allow reads what evidence says of its maker and asks the hook.
func (s *Server) allow(method string, e *attest.Evidence, want dstack.ReportData, c Call) (eventlog.Identity, error) {
	var none eventlog.Identity
	if !e.ReportDataClaimed || e.ReportData != want {
		return none, errors.New("report data mismatch")
	}
	if e.TEE == dstack.TDX {
		q, err := tdx.ParseQuote(e.Quote)
		if err != nil {
			return none, fmt.Errorf("invalid quote: %w", err)
		}
		if q.Body().ReportData != want {
			return none, errors.New("invalid quote: report data mismatch")
		}
	}
	id, err := eventlog.LaunchIdentity(e.EventLog)
	if err != nil {
		return none, err
	}
	c.Method, c.Identity, c.Evidence = method, id, e
	s.mu.Lock()
	s.calls = append(s.calls, c)
	s.mu.Unlock()
	if s.opt.Allow != nil {
		if err := s.opt.Allow(c); err != nil {
			return none, fmt.Errorf("Boot denied: %w", err)
		}
	}
	return id, nil
}

func (s *Server) getAppKey(ctx context.Context, r *kmsapi.GetAppKeyRequest) (*kmsapi.AppKeyResponse, error) {
	if r.ApiVersion > 1 {
		return nil, fmt.Errorf("Unsupported API version: %d", r.ApiVersion)
	}
	conn, ok := ctx.Value(connKey{}).(*tls.Conn)
	if !ok || len(conn.ConnectionState().PeerCertificates) == 0 {
		return nil, errors.New("No attestation provided")
	}
	a, err := ratls.FromCertificate(conn.ConnectionState().PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	id, err := s.allow("GetAppKey", a.Evidence, a.ReportData, Call{VMConfig: r.VmConfig})
	if err != nil {
		return nil, err
	}
	disk, err := s.roots.Disk(id.AppID, id.InstanceID)
	if err != nil {
		return nil, err
	}
	env, err := s.roots.Env(id.AppID)
	if err != nil {
		return nil, err
	}
	app, err := s.roots.App(id.AppID)
	if err != nil {
		return nil, err
	}
	public, err := derive.K256Public(app.Bytes())
	if err != nil {
		return nil, err
	}
	signature, err := derive.SignApp(s.roots.K256, id.AppID, public)
	if err != nil {
		return nil, err
	}
	out := &kmsapi.AppKeyResponse{
		CaCert: s.RootPEM(), DiskCryptKey: disk.Bytes(), EnvCryptKey: env.Bytes(), K256Key: app.Bytes(), K256Signature: signature,
		TproxyAppId: s.opt.GatewayAppID, GatewayAppId: s.opt.GatewayAppID, OsImageHash: s.opt.OSImageHash,
	}
	if s.opt.Answer != nil {
		s.opt.Answer(out)
	}
	return out, nil
}

func (s *Server) signCert(_ context.Context, r *kmsapi.SignCertRequest) (*kmsapi.SignCertResponse, error) {
	request, err := csr.Open(int(r.ApiVersion), r.Csr, r.Signature)
	if err != nil {
		return nil, err
	}
	if request.Version != 2 {
		return nil, errors.New("the test KMS signs requests of version 2")
	}
	e, err := container.Decode(request.Evidence)
	if err != nil {
		return nil, err
	}
	id, err := s.allow("SignCert", e, ratls.ReportData(request.SPKI), Call{VMConfig: r.VmConfig, Request: request})
	if err != nil {
		return nil, err
	}
	caKey, err := s.roots.AppCA(id.AppID)
	if err != nil {
		return nil, err
	}
	now := s.opt.Now()
	ca, err := s.root.Authority(caKey, certificate.Subject{Organization: "Dstack", Name: "Dstack App CA"},
		ratls.Issued{AppID: &id.AppID, Usage: ratls.UsageAppCA}, now)
	if err != nil {
		return nil, err
	}
	public, err := x509.ParsePKIXPublicKey(request.SPKI)
	if err != nil {
		return nil, err
	}
	leaf := certificate.Leaf{
		Config: request.Config, Public: public.(*ecdsa.PublicKey),
		Issued: ratls.Issued{AppID: &id.AppID, Usage: ratls.UsageApp},
	}
	if request.WithEvidence {
		leaf.Evidence = request.Evidence
	}
	if request.WithAppInfo {
		leaf.Issued.Info = &ratls.AppInfo{
			AppID: id.AppID, ComposeHash: id.ComposeHash, InstanceID: id.InstanceID,
			KeyProvider: []byte(id.KeyProvider), InitScriptHashes: id.InitScriptHashes,
		}
	}
	der, err := ca.Issue(leaf, now)
	if err != nil {
		return nil, err
	}
	return &kmsapi.SignCertResponse{CertificateChain: []string{certificate.Encode(der), ca.PEM(), s.RootPEM()}}, nil
}
