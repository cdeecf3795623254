// SPDX-License-Identifier: Apache-2.0

// Package authd is the authorisation webhook as a service: upstream's bootAuth API
// (POST /bootAuth/app and /bootAuth/kms, GET /), for KMS nodes of ours and of upstream,
// deciding by a signed policy document or by the contracts on a chain.
//
// Guarantees: an answer to a node of ours is signed for its very request (package
// governance/webhook). A node of upstream gets an unsigned answer, if the configuration
// allows it at all. It does not start on a policy that is not signed, or to serve plain
// HTTP to other machines unless that is said. Whatever it cannot decide it denies; the
// newest policy and the highest block that it saw are never gone back on.
//
// Trusted: configuration, data directory and key file. Attacker-controlled: every byte of
// a request, and of a chain's endpoint. Requests are not authenticated but by
// listen.client_ca: what is decided is no secret.
//
// Implements spec/governance.md §3 and spec/kms.md §8 (6); threats.md G04.
package authd

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/net/netutil"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/authority"
	"github.com/dstack-go/dstack/governance/chain"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/webhook"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of the service.
const (
	maxConnections = 256
	requestTime    = 30 * time.Second // a chain's endpoints may be slow
	grace          = 10 * time.Second
)

// Service is the webhook. Make it with Open.
type Service struct {
	cfg       Config
	log       *slog.Logger
	authority governance.Authority
	policies  *policy.Authority // nil: a chain decides
	handler   *webhook.Handler
	tls       *tls.Config
	data      *os.File // locks the data directory
}

// Open makes a service of a configuration that was checked. now is nil but in tests.
// Codes: auth_config, auth_key, auth_data; those of
// authority.Open.
func Open(cfg Config, log *slog.Logger, now func() time.Time) (*Service, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if now == nil {
		now = time.Now
	}
	s := &Service{cfg: cfg, log: log}
	h := &webhook.Handler{Now: now, Told: s.told}
	if cfg.KeyFile != "" {
		key, err := ReadKey(cfg.KeyFile)
		if err != nil {
			return nil, err
		}
		h.Key = key
	}
	if u := cfg.Upstream; u.Enabled {
		h.Upstream = &webhook.Upstream{Trust: dstack.Trust(u.Trust), ImageBound: u.ImageVerified}
		log.Warn("nodes of upstream are answered, and nothing signs what they are told")
	}
	if cfg.Listen.InsecureHTTP {
		log.Warn("other machines are served in plain HTTP: whoever sits between can alter what nodes of upstream are told")
	}
	var err error
	if s.tls, err = cfg.Listen.tls(); err != nil {
		return nil, err
	}
	if err := s.own(); err != nil {
		return nil, err
	}
	if s.authority, s.policies, err = authority.Open(cfg.Auth, authority.Options{Dir: cfg.DataDir, Now: now, Log: log}); err != nil {
		s.Close()
		return nil, err
	}
	h.Authority = s.authority
	if cfg.Auth.Type == authority.TypeChain {
		h.RPC = chain.Endpoints(cfg.Auth.Chain.RPC)[0]
	}
	s.handler = h
	return s, nil
}

// own takes the data directory: one process at a time uses what it holds.
func (s *Service) own() error {
	if err := durable.MkdirAll(s.cfg.DataDir, 0o700); err != nil {
		return fault.Wrap(err, "auth_data", "make %s", s.cfg.DataDir)
	}
	f, err := os.OpenFile(filepath.Join(s.cfg.DataDir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fault.Wrap(err, "auth_data", "lock %s", s.cfg.DataDir)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return fault.Wrap(err, "auth_data", "another process uses %s", s.cfg.DataDir).WithFix("give each its own data_dir")
	}
	s.data = f
	return nil
}

// Reload takes the policy's file, if it is newer than what is in force, which otherwise
// stays. Codes: authority_policy; those of policy.Authority.Update.
func (s *Service) Reload() error {
	if s.policies == nil {
		return nil
	}
	err := s.cfg.Auth.Policy.Update(s.policies)
	if err != nil {
		s.log.Warn("the policy's file is not taken", "code", fault.Code(err), "error", err)
	} else {
		s.log.Info("the policy is in force", "file", s.cfg.Auth.Policy.File)
	}
	return err
}

// Close gives back what Open took.
func (s *Service) Close() {
	if c, ok := s.authority.(io.Closer); ok {
		_ = c.Close()
	}
	s.data.Close()
}

func (s *Service) told(role governance.Role, r *governance.Request, d governance.Decision, err error) {
	attrs := []any{"role", role, "app", r.Boot.AppID, "compose_hash", r.Boot.ComposeHash, "by", d.By}
	switch {
	case err != nil:
		s.log.Error("no decision", append(attrs, "code", fault.Code(err), "error", err)...)
	case d.Allowed:
		s.log.Info("allowed", attrs...)
	default:
		s.log.Info("denied", append(attrs, "code", d.Code, "reason", d.Reason)...)
	}
}

// ServeHTTP serves the API, and GET /health: 200 when the authority can be asked.
func (s *Service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), requestTime)
	defer cancel()
	if r.URL.Path != "/health" {
		s.handler.ServeHTTP(w, r.WithContext(ctx))
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.Error(w, "GET only", http.StatusMethodNotAllowed)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if _, err := s.authority.About(ctx); err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, `{"status":"unavailable","code":"`+fault.Code(err)+"\"}\n")
		return
	}
	io.WriteString(w, "{\"status\":\"ok\"}\n")
}

// Run listens and serves until ctx ends, and then gives requests ten seconds to end.
// ready, unless nil, gets the address. Code auth_listen.
func (s *Service) Run(ctx context.Context, ready func(net.Addr)) error {
	l, err := s.listen(ctx)
	if err != nil {
		return err
	}
	if ready != nil {
		ready(l.Addr())
	}
	base, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	server := &http.Server{
		Handler: s, BaseContext: func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: requestTime + 10*time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	last, cancel := context.WithTimeout(base, grace)
	defer cancel()
	if server.Shutdown(last) != nil {
		end()
		_ = server.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (s *Service) listen(ctx context.Context) (net.Listener, error) {
	c := s.cfg.Listen
	network, address := "tcp", c.address()
	if c.Socket != "" {
		network, address = "unix", c.Socket
		// Of a process that was killed; one that serves holds the data directory's lock.
		if fi, err := os.Lstat(c.Socket); err == nil && fi.Mode().Type() == fs.ModeSocket {
			_ = os.Remove(c.Socket)
		}
	}
	l, err := new(net.ListenConfig).Listen(ctx, network, address)
	if err != nil {
		return nil, fault.Wrap(err, "auth_listen", "listen at %s", address).WithFix("give another address, port or socket")
	}
	if c.Socket != "" {
		if err := os.Chmod(c.Socket, 0o600); err != nil {
			l.Close()
			return nil, fault.Wrap(err, "auth_listen", "close the socket %s to others", c.Socket)
		}
	}
	l = netutil.LimitListener(l, maxConnections)
	if s.tls != nil {
		l = tls.NewListener(l, s.tls)
	}
	return l, nil
}

// tls returns nil for plain HTTP.
func (c ListenConfig) tls() (*tls.Config, error) {
	if c.Cert == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(c.Cert, c.Key)
	if err != nil {
		return nil, fault.Wrap(err, "auth_config", "listen.cert and listen.key")
	}
	out := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}}
	if c.ClientCA != "" {
		text, err := readLimited(c.ClientCA, 1<<20)
		if err != nil {
			return nil, fault.Wrap(err, "auth_config", "listen.client_ca")
		}
		out.ClientCAs, out.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
		if !out.ClientCAs.AppendCertsFromPEM(text) {
			return nil, bad("listen.client_ca %s holds no certificate", c.ClientCA)
		}
	}
	return out, nil
}

// NewKey makes a signing key in a file that is not there yet, mode 0600, and returns its
// public half. Code auth_key.
func NewKey(path string) (ed25519.PublicKey, error) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	defer clear(private)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, "auth_key", "make the key file").WithFix("give the path of a file that is not there yet")
	}
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fault.Wrap(err, "auth_key", "write the key file")
	}
	return public, nil
}

// ReadKey reads what NewKey wrote, and refuses it when others may read it. Code auth_key.
func ReadKey(path string) (ed25519.PrivateKey, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fault.Wrap(err, "auth_key", "read the key file").WithFix("make one with `dstack-auth key -o FILE`")
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 != 0 {
		return nil, fault.New("auth_key", "others may read the key file %s (mode %04o)", path, fi.Mode().Perm()).WithFix("chmod 600 %s; whoever read it can sign answers", path)
	}
	text, err := readLimited(path, 4096)
	if err != nil {
		return nil, fault.Wrap(err, "auth_key", "read the key file")
	}
	defer clear(text)
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" || len(rest) > 0 {
		return nil, fault.New("auth_key", "%s holds no private key", path)
	}
	defer clear(block.Bytes)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.Wrap(err, "auth_key", "%s", path)
	}
	out, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New("auth_key", "%s holds no Ed25519 key", path)
	}
	return out, nil
}

func readLimited(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(text)) > most {
		err = fault.New("auth_config", "%s is larger than %d bytes", path, most)
	}
	return text, err
}
