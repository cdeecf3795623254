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
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"os"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/keys/lease"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/releaselog"

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
	// Attester gives the KMS evidence: in its certificate, and on attested channels, which
	// it then serves beside RA-TLS, unless OnlyRATLS is set. Nil: none, as outside a TEE.
	Attester  channel.Attester
	OnlyRATLS bool
	// LogDir is where the release log is, made if it is not there; "": none, as
	// upstream's.
	LogDir string
	// Lease is how long leases last; zero: none, as upstream's.
	Lease time.Duration
	Now   func() time.Time
}

// Call is what the KMS learned of a caller; nothing of it was verified.
type Call struct {
	Method   string // GetAppKey, RenewLease or SignCert
	Session  bool   // over an attested channel
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
	log       *releaselog.Log // nil: none
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
	if err := s.openLog(); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", opt.Addr)
	if err != nil {
		s.closeLog()
		return nil, err
	}
	s.URL = "https://" + l.Addr().String()
	s.http = prpc.Server(prpc.NewMux([]string{"KMS."},
		prpc.Unary("GetMeta", s.getMeta),
		prpc.Unary("GetTempCaCert", s.getTempCA),
		prpc.Unary("GetAppEnvEncryptPubKey", s.getEnvKey),
		prpc.Unary("GetAppKey", s.getAppKey),
		prpc.Unary("SignCert", s.signCert),
		prpc.Unary("RenewLease", s.renewLease),
		prpc.Unary("GetLogConsistency", s.getConsistency),
	))
	s.http.ErrorLog = log.New(discard{}, "", 0) // refused handshakes are what tests are about
	s.http.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) }
	plain := &tls.Config{
		Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: s.clientCAs, Time: opt.Now,
	}
	secure := net.Listener(tls.NewListener(l, plain))
	if opt.Attester != nil && !opt.OnlyRATLS {
		secure, err = channel.NewListener(l, &channel.Config{Attester: opt.Attester, Appraiser: believer{}, AppEvidence: true, Other: plain, Now: opt.Now})
		if err != nil {
			s.closeLog()
			return nil, err
		}
	}
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
	s.closeLog()
	return err
}

func (s *Server) openLog() error {
	if s.opt.LogDir == "" {
		return nil
	}
	key, err := derive.P256FromScalar(s.roots.CA)
	if err != nil {
		return err
	}
	if _, err = os.Stat(s.opt.LogDir); errors.Is(err, fs.ErrNotExist) {
		s.log, err = releaselog.Create(context.Background(), s.opt.LogDir, s.SPKI(), func(_ context.Context, document []byte) ([]byte, error) {
			sum := sha256.Sum256(releaselog.AttestedMessage(document))
			return ecdsa.SignASN1(rand.Reader, key, sum[:])
		})
	} else if err == nil {
		s.log, err = releaselog.Open(s.opt.LogDir, s.SPKI())
	}
	return err
}

func (s *Server) closeLog() {
	if s.log != nil {
		s.log.Close()
	}
}

// believer takes every peer for what its log says it is.
type believer struct{}

func (believer) Appraise(_ context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	e, err := container.Decode(c.Container)
	if err != nil {
		return nil, err
	}
	id, err := eventlog.LaunchIdentity(e.EventLog)
	if err != nil {
		return nil, err
	}
	return &channel.Appraisal{
		Identity:   channel.Identity{AppID: id.AppID, ComposeHash: id.ComposeHash, ChannelKey: id.ChannelKey},
		ReportData: e.ReportData, Trust: dstack.TrustDevelopment, Booting: !id.SystemReady, Detail: e,
	}, nil
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
	var evidence []byte
	if s.opt.Attester != nil {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return none, err
		}
		if evidence, err = s.opt.Attester.Attest(context.Background(), ratls.ReportData(spki)); err != nil {
			return none, err
		}
	}
	der, err := s.root.Issue(certificate.Leaf{
		Config: csr.Config{Subject: s.opt.Names[0], Names: s.opt.Names},
		Public: &key.PublicKey, Issued: ratls.Issued{Usage: s.opt.Usage}, Evidence: evidence,
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
	id, err := s.caller(ctx, "GetAppKey", r.VmConfig)
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
	if out.Release, out.Lease, err = s.grant(ctx, id); err != nil {
		return nil, err
	}
	if s.opt.Answer != nil {
		s.opt.Answer(out)
	}
	return out, nil
}

// caller reads who is at the other end of the connection, and asks the hook.
func (s *Server) caller(ctx context.Context, method, vmConfig string) (eventlog.Identity, error) {
	c := Call{VMConfig: vmConfig}
	conn, ok := ctx.Value(connKey{}).(interface{ ConnectionState() tls.ConnectionState })
	if !ok {
		return eventlog.Identity{}, errors.New("No attestation provided")
	}
	if ch, ok := conn.(*channel.Conn); ok && ch.Peer() != nil {
		e := ch.Peer().Detail.(*attest.Evidence)
		c.Session = true
		return s.allow(method, e, e.ReportData, c)
	}
	certs := conn.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return eventlog.Identity{}, errors.New("No attestation provided")
	}
	a, err := ratls.FromCertificate(certs[0])
	if err != nil {
		return eventlog.Identity{}, err
	}
	return s.allow(method, a.Evidence, a.ReportData, c)
}

// grant logs a grant and makes a lease, where the KMS has them.
func (s *Server) grant(ctx context.Context, id eventlog.Identity) (*kmsapi.Release, *kmsapi.Lease, error) {
	var release *kmsapi.Release
	var out *kmsapi.Lease
	now := s.opt.Now()
	doc := lease.Document{AppID: id.AppID, InstanceID: id.InstanceID, ComposeHash: id.ComposeHash, NotBefore: now, NotAfter: now.Add(s.opt.Lease)}
	if s.log != nil {
		e := releaselog.Entry{Time: now, Kind: releaselog.Grant, AppID: id.AppID, ComposeHash: id.ComposeHash}
		copy(e.InstanceID[:], id.InstanceID)
		receipt, err := s.log.Append(ctx, e)
		if err != nil {
			return nil, nil, err
		}
		release = receipt.Release()
		doc.Log, doc.Index = receipt.Head.Log(), receipt.Index
	}
	if s.opt.Lease > 0 {
		text, err := doc.Encode()
		if err != nil {
			return nil, nil, err
		}
		key, err := derive.P256FromScalar(s.roots.CA)
		if err != nil {
			return nil, nil, err
		}
		sum := sha256.Sum256([]byte(lease.Context + "\n" + string(text)))
		signature, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
		if err != nil {
			return nil, nil, err
		}
		out = &kmsapi.Lease{Document: text, Signature: signature}
	}
	return release, out, nil
}

func (s *Server) renewLease(ctx context.Context, r *kmsapi.RenewLeaseRequest) (*kmsapi.RenewLeaseResponse, error) {
	if s.opt.Lease == 0 {
		return nil, errors.New("Service not found: RenewLease")
	}
	id, err := s.caller(ctx, "RenewLease", r.VmConfig)
	if err != nil {
		return nil, err
	}
	release, l, err := s.grant(ctx, id)
	return &kmsapi.RenewLeaseResponse{Release: release, Lease: l}, err
}

func (s *Server) getConsistency(_ context.Context, r *kmsapi.LogConsistencyRequest) (*kmsapi.LogConsistencyResponse, error) {
	if s.log == nil {
		return nil, errors.New("Service not found: GetLogConsistency")
	}
	to := r.To
	if to == 0 {
		to = s.log.Head().Size()
	}
	proof, head, err := s.log.Consistency(r.From, to)
	return &kmsapi.LogConsistencyResponse{Head: head.Wire(), Proof: proof}, err
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
