// SPDX-License-Identifier: Apache-2.0

package simtee

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/dstack-go/dstack/attest/collect/sim"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of the server. A guest has a handful of clients at most: its init, and
// through it the agent.
const (
	maxConnections = 32
	maxConcurrent  = 8
	requestTimeout = 10 * time.Second
	idleTimeout    = 2 * time.Minute
)

// Server answers the requests of package sim.
type Server struct {
	machine *Machine
	busy    chan struct{}
}

// NewServer returns a server of one machine.
func NewServer(m *Machine) *Server {
	return &Server{machine: m, busy: make(chan struct{}, maxConcurrent)}
}

// Handler returns the HTTP side: the four methods of package sim and nothing else.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /quote", handle(s, func(q sim.QuoteRequest) (sim.QuoteReply, error) {
		quote, err := s.machine.Quote(q.ReportData)
		return sim.QuoteReply{Quote: quote}, err
	}))
	mux.Handle("POST /extend", handle(s, func(q sim.ExtendRequest) (struct{}, error) {
		return struct{}{}, s.machine.Extend(q.Register, q.Digest)
	}))
	mux.Handle("GET /bootlog", handle(s, func(struct{}) (sim.BootLogReply, error) {
		return sim.BootLogReply{Events: s.machine.BootLog()}, nil
	}))
	mux.Handle("GET /registers", handle(s, func(struct{}) (r sim.RegistersReply, err error) {
		r.MRTD, r.RTMR, err = s.machine.Registers()
		return r, err
	}))
	return mux
}

// handle decodes a request, which must be complete: a missing register or digest
// must not become zero.
func handle[Q, R any](s *Server, f func(Q) (R, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case s.busy <- struct{}{}:
			defer func() { <-s.busy }()
		default:
			w.Header().Set("Retry-After", "1")
			reply(w, http.StatusServiceUnavailable, refusal(fault.New("tee_busy", "too many requests at once")))
			return
		}
		var q Q
		if r.Method == http.MethodPost {
			text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, sim.MaxRequest))
			var tooLarge *http.MaxBytesError
			if errors.As(err, &tooLarge) {
				reply(w, http.StatusRequestEntityTooLarge, refusal(fault.New("request_too_large", "request of more than %d bytes", sim.MaxRequest)))
				return
			}
			if err != nil {
				return // the client has gone
			}
			if err := decode(text, &q); err != nil {
				reply(w, http.StatusBadRequest, refusal(fault.Wrap(err, "request_malformed", "request")))
				return
			}
		}
		answer, err := f(q)
		switch {
		case err == nil:
			reply(w, http.StatusOK, answer)
		case fault.Code(err) == "register_not_extendable":
			reply(w, http.StatusBadRequest, refusal(err))
		default:
			reply(w, http.StatusInternalServerError, refusal(err))
		}
	})
}

// decode demands every field of the request to be present.
func decode(text []byte, q any) error {
	limits := strictjson.Limits{Size: sim.MaxRequest, Depth: 2}
	if err := strictjson.Decode(text, q, limits); err != nil {
		return err
	}
	var given, want map[string]json.RawMessage
	if err := json.Unmarshal(text, &given); err != nil {
		return err
	}
	all, err := json.Marshal(q)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(all, &want); err != nil {
		return err
	}
	for name := range want {
		if value, ok := given[name]; !ok || string(value) == "null" {
			return fmt.Errorf("%s is missing", name)
		}
	}
	return nil
}

func refusal(err error) sim.ErrorReply {
	return sim.ErrorReply{Error: err.Error(), Code: fault.Code(err)}
}

func reply(w http.ResponseWriter, status int, v any) {
	text, err := json.Marshal(v)
	if err != nil {
		status, text = http.StatusInternalServerError, []byte(`{"error":"reply cannot be encoded"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", fmt.Sprint(len(text)))
	w.WriteHeader(status)
	w.Write(text)
}

// Serve answers on a listener until stop is closed, then finishes the requests
// under way and closes the listener.
func (s *Server) Serve(l net.Listener, stop <-chan struct{}) error {
	server := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: requestTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      2 * requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    16 << 10,
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(&limitListener{Listener: l, slots: make(chan struct{}, maxConnections)}) }()
	select {
	case err := <-done:
		l.Close()
		return err
	case <-stop:
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if server.Shutdown(ctx) != nil {
		server.Close()
	}
	<-done
	return nil
}

// Listen makes the socket with mode 0600, taking the place of one that a dead
// process left behind: the caller holds the lock of the VM's state, so that no
// living one can be in use. The socket is made in a directory of its own that
// nobody else may enter and then renamed, so that it is never reachable under a
// wider mode.
func Listen(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != os.ModeSocket {
		return nil, fault.New("socket_path", "%s exists and is not a socket", path).WithFix("choose another --socket")
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".s")
	if err != nil {
		return nil, fmt.Errorf("make socket %s: %w", path, err)
	}
	defer os.RemoveAll(dir)
	temporary := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, fault.Wrap(err, "socket_path", "make socket %s", path).WithFix("choose a shorter path: the kernel allows 107 bytes")
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(temporary, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	if err := os.Rename(temporary, path); err != nil {
		l.Close()
		return nil, fmt.Errorf("make socket %s: %w", path, err)
	}
	return &socket{UnixListener: l, path: path}, nil
}

// socket removes its path when it is closed.
type socket struct {
	*net.UnixListener
	path string
}

func (s *socket) Close() error {
	err := s.UnixListener.Close()
	if err == nil {
		os.Remove(s.path)
	}
	return err
}

// limitListener accepts a bounded number of connections at a time.
type limitListener struct {
	net.Listener
	slots chan struct{}
}

func (l *limitListener) Accept() (net.Conn, error) {
	l.slots <- struct{}{}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: conn, release: func() { <-l.slots }}, nil
}

type limitedConn struct {
	net.Conn
	release func()
	once    sync.Once
}

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.release)
	return err
}
