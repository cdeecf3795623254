// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path"
	"sync"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxBody bounds a request's body in bytes, as upstream does.
const MaxBody = 1 << 20

// maxDepth of a request's JSON: collateral and policy nest.
const maxDepth = 8

// readTimeout bounds how long a client may take to send a request.
const readTimeout = 30 * time.Second

// maxConnections bounds the memory that bodies can take before they are looked at.
const maxConnections = 256

// waiting is how many requests may wait for one that is being verified.
const waiting = 4

// openapi describes the API; a test holds it against the structs.
//
//go:embed openapi.json
var openapi []byte

// gate lets a number of requests in, and a number wait.
type gate struct {
	inside chan struct{}
	queue  chan struct{} // those inside count
}

func newGate(n int) *gate {
	return &gate{make(chan struct{}, n), make(chan struct{}, n*(1+waiting))}
}

// enter reports whether there was room; leave must then be called.
func (g *gate) enter(ctx context.Context) (leave func(), ok bool) {
	select {
	case g.queue <- struct{}{}:
	default:
		return nil, false
	}
	select {
	case g.inside <- struct{}{}:
		return func() { <-g.inside; <-g.queue }, true
	case <-ctx.Done():
		<-g.queue
		return nil, false
	}
}

// Handler serves the API. The error is of the web directory (file_missing).
func (s *Service) Handler() (http.Handler, error) {
	mux := http.NewServeMux()
	g := newGate(s.config.MaxConcurrent)
	mux.HandleFunc("POST /verify", func(w http.ResponseWriter, r *http.Request) { s.serveVerify(w, r, g) })
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, json.RawMessage(`{"status":"ok","service":"dstack-verifier"}`))
	})
	mux.HandleFunc("GET /openapi.json", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, json.RawMessage(openapi))
	})
	if s.config.Metrics {
		mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			s.writeMetrics(w)
		})
	}
	if s.config.WebDir != "" {
		pages, err := servePages(s.config.WebDir)
		if err != nil {
			return nil, err
		}
		mux.Handle("GET /", pages)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range headers {
			w.Header()[name] = []string{value}
		}
		mux.ServeHTTP(w, r)
	}), nil
}

// headers are those of every reply. The page may run its own scripts and
// WebAssembly, ask the instances whose addresses it is given, and be framed by nobody.
var headers = map[string]string{
	"X-Content-Type-Options":       "nosniff",
	"Referrer-Policy":              "no-referrer",
	"X-Frame-Options":              "DENY",
	"Cross-Origin-Opener-Policy":   "same-origin",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' data:; " +
		"worker-src 'self'; connect-src 'self' https: http:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}

// servePages serves the files of a directory, and nothing outside of it, hidden in
// it, or that is a directory without an index.
func servePages(dir string) (http.Handler, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fault.Wrap(err, "file_missing", "open web_dir").WithFix("give a directory, or leave web_dir out")
	}
	return http.FileServerFS(pageFS{root.FS()}), nil
}

type pageFS struct{ fs.FS }

func (p pageFS) Open(name string) (fs.File, error) {
	hidden := &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	for part := name; part != "." && part != "/"; part = path.Dir(part) {
		if path.Base(part)[0] == '.' {
			return nil, hidden
		}
	}
	f, err := p.FS.Open(name)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.IsDir() {
		if _, ierr := fs.Stat(p.FS, path.Join(name, "index.html")); ierr != nil {
			err = hidden
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func reply(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"error":"internal","code":"internal"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(data, '\n'))
}

// problem is the body of a reply that is no verdict.
type problem struct {
	Error string `json:"error"`
	Code  string `json:"code"`
}

func (s *Service) serveVerify(w http.ResponseWriter, r *http.Request, g *gate) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		s.metrics.tooLarge.Add(1)
		reply(w, http.StatusRequestEntityTooLarge, problem{"the request has more than 1 MiB", "request_too_large"})
		return
	case err != nil:
		s.metrics.malformed.Add(1)
		reply(w, http.StatusBadRequest, problem{"the request could not be read", "request_malformed"})
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.config.requestTimeout())
	defer cancel()
	leave, ok := g.enter(ctx)
	if !ok {
		s.metrics.busy.Add(1)
		w.Header().Set("Retry-After", "5")
		reply(w, http.StatusServiceUnavailable, problem{"too many requests are being verified", "busy"})
		return
	}
	defer leave()
	req, status, err := ParseRequest(data)
	if err != nil {
		s.metrics.malformed.Add(1)
		reply(w, status, problem{err.Error(), fault.Code(err)})
		return
	}
	s.metrics.inFlight.Add(1)
	defer s.metrics.inFlight.Add(-1)
	start := time.Now()
	out := s.Verify(ctx, req)
	took := time.Since(start)
	s.metrics.record(out, took)
	reason := ""
	if out.Reason != nil {
		reason = *out.Reason
	}
	s.log.Info("verify", "tee", string(out.Verdict.TEE), "is_valid", out.IsValid, "accepted", out.Verdict.Accepted, "reason", reason, "took", took)
	reply(w, http.StatusOK, out)
}

// ParseRequest reads a body. Where it cannot be, status is 400 for what is not JSON
// and 422 for JSON that is no request; the codes are request_malformed and
// request_member.
func ParseRequest(data []byte) (r *Request, status int, err error) {
	if len(data) > MaxBody {
		return nil, http.StatusRequestEntityTooLarge, fault.New("request_too_large", "the request has more than 1 MiB")
	}
	if !json.Valid(data) {
		return nil, http.StatusBadRequest, fault.New("request_malformed", "the request is not JSON")
	}
	if err := strictjson.Decode(data, &r, strictjson.Limits{Size: MaxBody, Depth: maxDepth, Unknown: true}); err != nil {
		return nil, http.StatusUnprocessableEntity, fault.Wrap(err, "request_member", "the request has members of another type than it should, has one twice, or nests too deep")
	}
	if r == nil {
		return nil, http.StatusUnprocessableEntity, fault.New("request_member", "the request is not a JSON object")
	}
	return r, http.StatusOK, nil
}

// Serve listens on the configured address and serves until ctx ends; requests under
// way then have ten seconds to finish. The address in use goes to ready, which may be
// nil.
func (s *Service) Serve(ctx context.Context, ready func(net.Addr)) error {
	ip, err := netip.ParseAddr(s.config.Address)
	if err != nil {
		return fault.Wrap(err, "config_value", "address")
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", netip.AddrPortFrom(ip, s.config.Port).String())
	if err != nil {
		return fault.Wrap(err, "port_busy", "listen").WithFix("give another address or port")
	}
	if ready != nil {
		ready(l.Addr())
	}
	return s.ServeListener(ctx, l)
}

// ServeListener serves on a listener, which it closes, as Serve does.
func (s *Service) ServeListener(ctx context.Context, l net.Listener) error {
	handler, err := s.Handler()
	if err != nil {
		l.Close()
		return err
	}
	// Requests outlive ctx by the grace below, no longer.
	base, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	server := &http.Server{
		Handler:           handler,
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       readTimeout,
		WriteTimeout:      readTimeout + s.config.requestTimeout() + 10*time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(newLimitListener(l, maxConnections)) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(base, 10*time.Second)
	defer cancel()
	if err := server.Shutdown(grace); err != nil {
		end()
		_ = server.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// limitListener accepts only so many connections at one time; others wait in the
// kernel's queue.
type limitListener struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

func newLimitListener(l net.Listener, n int) *limitListener {
	return &limitListener{Listener: l, slots: make(chan struct{}, n), closed: make(chan struct{})}
}

func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: c, slots: l.slots}, nil
}

func (l *limitListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	slots chan struct{}
	once  sync.Once
}

func (c *limitedConn) Close() error {
	c.once.Do(func() { <-c.slots })
	return c.Conn.Close()
}
