// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/prpc"
)

// Times of the server.
const (
	leafLife    = 24 * time.Hour // of the server's own certificate, and so the age of its evidence
	requestTime = 60 * time.Second
)

// A request's body is large beyond what requests for keys and certificates need; as
// many such are read at a time.
const (
	largeBody = 256 << 10
	maxLarge  = 8
)

// Handler serves the RPC surface, /health and /metrics. Whoever calls it puts the
// caller's connection into the context (Serve does).
func (s *Service) Handler() http.Handler {
	// Verification is bound by the processor: more at once would only make all slower.
	slots := make(chan struct{}, 2*runtime.GOMAXPROCS(0))
	methods := []prpc.Method{
		prpc.Unary("GetMeta", s.getMeta),
		prpc.Unary("GetTempCaCert", s.getTempCA),
		prpc.Unary("GetAppEnvEncryptPubKey", s.getEnvKey),
		prpc.Unary("GetAppKey", s.getAppKey),
		prpc.Unary("GetKmsKey", s.getKmsKey),
		prpc.Unary("SignCert", s.signCert),
		prpc.Unary("RenewLease", s.renewLease),
		prpc.Unary("GetLogHead", s.getLogHead),
		prpc.Unary("GetLogConsistency", s.getLogConsistency),
		prpc.Unary("GetLogEntries", s.getLogEntries),
		prpc.Unary("GetPolicy", s.getPolicy),
		prpc.Unary("UpdatePolicy", s.updatePolicy),
	}
	for i := range methods {
		methods[i] = s.guarded(methods[i], slots)
	}
	out := http.NewServeMux()
	out.Handle("/prpc/", prpc.NewMux([]string{"KMS."}, methods...))
	out.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "OK") })
	out.HandleFunc("GET /metrics", s.serveMetrics)
	// Bodies are read before a method's turn comes: many large ones would fill the memory.
	large := make(chan struct{}, maxLarge)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App-Version", s.cfg.Version)
		if r.ContentLength < 0 || r.ContentLength > largeBody {
			select {
			case large <- struct{}{}:
				defer func() { <-large }()
			default:
				// As every failure is told, in the encoding that clients take from a wrapper.
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusBadRequest)
				io.WriteString(w, `{"error":"the KMS is busy with large requests","code":"busy"}`)
				return
			}
		}
		out.ServeHTTP(w, r)
	})
}

// guarded bounds what one caller asks and how long one request takes.
func (s *Service) guarded(m prpc.Method, slots chan struct{}) prpc.Method {
	handle := m.Handle
	m.Handle = func(ctx context.Context, req proto.Message) (proto.Message, error) {
		if err := s.limits.peer(callerOf(ctx).host()); err != nil {
			s.metrics.limited.Add(1)
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, requestTime)
		defer cancel()
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		case <-ctx.Done():
			return nil, fault.New("busy", "the KMS is busy")
		}
		resp, err := handle(ctx, req)
		s.metrics.count(m.Name, err)
		if err != nil {
			s.log.Info("refused", "method", m.Name, "remote", callerOf(ctx).remote, "code", fault.Code(err), "error", err)
		}
		return resp, err
	}
	return m
}

// metrics are upstream's counters, and ours.
type metrics struct {
	requests, failures, limited, unlogged, handshakes atomic.Uint64
}

// counted are the methods that upstream's counters count.
var counted = []string{"GetAppKey", "GetKmsKey", "SignCert", "RenewLease"}

func (m *metrics) count(method string, err error) {
	if !slices.Contains(counted, method) {
		return
	}
	m.requests.Add(1)
	if err != nil {
		m.failures.Add(1)
	}
}

func (s *Service) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	for _, c := range []struct {
		name, help string
		value      uint64
	}{
		{"dstack_kms_attestation_requests_total", "Requests that need evidence.", s.metrics.requests.Load()},
		{"dstack_kms_attestation_failures_total", "Of those, how many were refused.", s.metrics.failures.Load()},
		{"dstack_kms_rate_limited_total", "Requests turned away unread.", s.metrics.limited.Load()},
		{"dstack_kms_refusals_unlogged_total", "Refusals of evidence that were too many for the release log.", s.metrics.unlogged.Load()},
		{"dstack_kms_handshakes_refused_total", "Connections that were refused.", s.metrics.handshakes.Load()},
		{"dstack_kms_release_log_size", "Entries of the release log.", s.cfg.Log.Head().Size()},
	} {
		kind := "counter"
		if strings.HasSuffix(c.name, "_size") {
			kind = "gauge"
		}
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n%s %d\n", c.name, c.help, c.name, kind, c.name, c.value)
	}
}

// Serve answers on l, which it owns, until ctx ends; requests under way are finished.
func (s *Service) Serve(ctx context.Context, l net.Listener) error {
	leaf := &serverLeaf{s: s}
	if _, err := leaf.get(ctx); err != nil { // a TEE that does not work shows at the start
		l.Close()
		return err
	}
	plain := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, Time: s.now,
		// Any certificate: its chain proves nothing, since everybody has the temporary
		// CA's key; what counts is the evidence in it, which a method looks at.
		ClientAuth:     tls.RequestClientCert,
		GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return leaf.get(h.Context()) },
	}
	secure, err := s.listener(limited{l, s}, plain)
	if err != nil {
		return err
	}
	server := prpc.Server(s.Handler())
	server.ErrorLog = slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)
	server.BaseContext = func(net.Listener) context.Context { return context.WithoutCancel(ctx) }
	server.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		who := caller{remote: c.RemoteAddr().String()}
		switch c := c.(type) {
		case *channel.Conn:
			if who.peer = c.Peer(); who.peer == nil {
				who.leaf = first(c.ConnectionState().PeerCertificates)
			}
		case *tls.Conn:
			// net/http asks before the handshake: the request comes after it.
			return context.WithValue(ctx, callerKey{}, &lateCaller{who, c})
		}
		return context.WithValue(ctx, callerKey{}, who)
	}
	done := make(chan error, 1)
	go func() { done <- server.Server.Serve(secure) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err = server.Shutdown(stop); err != nil {
		server.Close() // whoever is left has had his time
	}
	<-done
	return err
}

func first(certs []*x509.Certificate) *x509.Certificate {
	if len(certs) == 0 {
		return nil
	}
	return certs[0]
}

// limited turns away an address that connects too often: a handshake costs this KMS a
// signature, and an attested one a quote and its verification, before any request.
type limited struct {
	net.Listener
	s *Service
}

func (l limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.s.limits.connection(caller{remote: c.RemoteAddr().String()}.host()) == nil {
			return c, nil
		}
		l.s.metrics.limited.Add(1)
		c.Close()
	}
}

// lateCaller is a caller whose handshake is under way.
type lateCaller struct {
	caller
	conn *tls.Conn
}

// listener serves both kinds of session on one port; outside of a TEE there is no
// evidence to give, and so no attested channel.
func (s *Service) listener(l net.Listener, plain *tls.Config) (net.Listener, error) {
	if s.cfg.Self == nil {
		return tls.NewListener(l, plain), nil
	}
	return channel.NewListener(l, &channel.Config{
		Appraiser: appraiser{s}, Attester: s.cfg.Self, Other: plain, AppEvidence: true, Now: s.now,
		Refused: func(remote net.Addr, err error) {
			s.metrics.handshakes.Add(1)
			s.log.Info("connection refused", "remote", remote.String(), "code", fault.Code(err), "error", err)
		},
	})
}

// appraiser takes any peer whose evidence holds: what he may have, each method asks
// the authority.
type appraiser struct{ s *Service }

func (a appraiser) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	who, err := a.s.judge(ctx, applicant.Evidence{Container: c.Container, ReportData: c.ReportData, Session: true})
	if err != nil {
		return nil, err
	}
	return who.Appraisal(), nil
}

// serverLeaf is the server's certificate, with evidence where there is a TEE.
type serverLeaf struct {
	s       *Service
	renew   sync.Mutex // held by the one who makes the next
	current atomic.Pointer[tls.Certificate]
}

// get returns the certificate. Past half of its life one caller makes a new one, and
// whoever comes meanwhile gets the old: a crowd asks the TEE for one quote.
func (l *serverLeaf) get(ctx context.Context) (*tls.Certificate, error) {
	now := l.s.now()
	c := l.current.Load()
	if c != nil && now.Before(c.Leaf.NotAfter.Add(-leafLife/2)) {
		return c, nil
	}
	valid := c != nil && now.Before(c.Leaf.NotAfter)
	if !l.renew.TryLock() {
		if valid {
			return c, nil
		}
		l.renew.Lock()
	}
	defer l.renew.Unlock()
	if latest := l.current.Load(); latest != c { // made while this caller waited
		return latest, nil
	}
	made, err := l.make(ctx, now)
	if err != nil {
		if valid {
			l.s.log.Warn("certificate of the KMS", "error", err)
			return c, nil
		}
		return nil, err
	}
	l.current.Store(made)
	return made, nil
}

func (l *serverLeaf) make(ctx context.Context, now time.Time) (*tls.Certificate, error) {
	s := l.s
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf := certificate.Leaf{
		Config: csr.Config{Subject: s.cfg.Names[0], Names: s.cfg.Names}, Public: &key.PublicKey,
		Issued: ratls.Issued{Usage: ratls.UsageKMS}, MaxLifetime: leafLife,
	}
	if s.cfg.Self != nil {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, err
		}
		if leaf.Evidence, err = s.cfg.Self.Attest(ctx, ratls.ReportData(spki)); err != nil {
			return nil, fault.Wrap(err, "kms_self", "make evidence for the KMS's certificate")
		}
	}
	der, err := s.root.Issue(leaf, now)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: parsed}, nil
}
