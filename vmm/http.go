// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/vmm/qemu"
)

// Handler returns the management API:
//
//	/prpc/<Method>          vmm.Vmm, prefixes "Vmm." and "Teepod."
//	/guest/<Method>         guest_api.ProxiedGuestApi
//	/logs?id&follow&ansi&lines&ch
//	/events?id&follow       ours: JSON lines of {time_ms, event, body}
//	/history?kind&id&since&limit
//	                        ours: JSON lines of package history, also of removed VMs;
//	                        kind is events, audit or samples, since Unix milliseconds
//	/blobs/sha256/<hex>     ours: GET, HEAD, PUT
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/prpc/", prpc.NewMux([]string{"Vmm.", "Teepod."}, s.audited(s.methods())...))
	mux.Handle("/guest/", prpc.NewMux([]string{"ProxiedGuestApi.", "GuestApi."}, s.audited(s.guestMethods())...))
	mux.HandleFunc("GET /logs", s.logs)
	mux.HandleFunc("GET /events", s.events)
	mux.HandleFunc("GET /history", s.history)
	mux.Handle("/blobs/", s.blobs.Handler(httpError))
	return s.guard(mux)
}

func httpError(w http.ResponseWriter, status int, err error) {
	body := map[string]string{"error": err.Error()}
	if c := fault.Code(err); c != "" {
		body["code"] = c
	}
	if f := fault.Fix(err); f != "" {
		body["fix"] = f
	}
	data, _ := json.MarshalIndent(body, "", "  ") // a map of strings
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(data)
}

// guard demands a token when tokens are configured, and refuses what a browser
// sends on behalf of a page: there is no console to send it.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App-Version", "v"+s.version+" ("+s.revision+")")
		w.Header().Set("X-Accel-Buffering", "no")
		if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" {
			httpError(w, http.StatusForbidden, fault.New("browser_refused", "this API is not for web pages"))
			return
		}
		token, ok := s.allowed(r)
		if !ok {
			w.Header().Set("WWW-Authenticate", `Bearer realm="dstack-vmm API"`)
			httpError(w, http.StatusUnauthorized, fault.New("unauthorized", "a token is needed").
				WithFix("send one of auth.tokens as Authorization: Bearer"))
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), tokenKey{}, token)))
	})
}

// allowed compares tokens as hashes and looks at all of them, so that time tells
// nothing. It returns which one was given, from 1, or 0 where none is needed.
func (s *Server) allowed(r *http.Request) (token int, ok bool) {
	if len(s.config.Auth.Tokens) == 0 {
		return 0, true // only over the unix socket: see Config.Check
	}
	given := r.Header.Get("X-Admin-Token")
	if auth := r.Header.Get("Authorization"); auth != "" {
		scheme, rest, _ := strings.Cut(auth, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return 0, false
		}
		given = rest
	}
	sum := sha256.Sum256([]byte(given))
	for i, t := range s.config.Auth.Tokens {
		want := sha256.Sum256([]byte(t.Reveal()))
		token = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(sum[:], want[:]), i+1, token)
	}
	return token, token != 0 && given != ""
}

// flag reads a boolean of a query, false when absent.
func flag(r *http.Request, name string) (bool, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return false, nil
	}
	v, err := strconv.ParseBool(text)
	if err != nil {
		return false, fault.New("query_invalid", "%s is %.40q, neither true nor false", name, text)
	}
	return v, nil
}

// streamWriter ends a stream whose client has stopped reading.
type streamWriter struct {
	http.ResponseWriter
	c *http.ResponseController
}

func (w streamWriter) Write(p []byte) (int, error) {
	w.c.SetWriteDeadline(time.Now().Add(30 * time.Second))
	return w.ResponseWriter.Write(p)
}

func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	v, err := s.get(r.Context(), r.URL.Query().Get("id"))
	if err != nil {
		httpError(w, http.StatusNotFound, err)
		return
	}
	files := map[string]string{"": qemu.SerialLog, "serial": qemu.SerialLog, "stderr": stderrLog, "stdout": stderrLog, "tee": teeLog}
	name, ok := files[r.URL.Query().Get("ch")]
	if !ok {
		httpError(w, http.StatusBadRequest, fault.New("query_invalid", "unknown channel %.40q", r.URL.Query().Get("ch")).WithFix("use serial, stderr or tee"))
		return
	}
	follow, err1 := flag(r, "follow")
	ansi, err2 := flag(r, "ansi")
	lines := 10000
	if text := r.URL.Query().Get("lines"); text != "" {
		if lines, err = strconv.Atoi(text); err != nil || lines < 0 {
			err = fault.New("query_invalid", "lines is %.40q, not a number", text)
		}
	}
	for _, e := range []error{err1, err2, err} {
		if e != nil {
			httpError(w, http.StatusBadRequest, e)
			return
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	c := http.NewResponseController(w)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	streamLog(ctx, streamWriter{w, c}, func() { c.Flush() }, filepath.Join(v.dir, name), lines, follow, ansi)
}

func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	v, err := s.get(r.Context(), r.URL.Query().Get("id"))
	if err != nil {
		httpError(w, http.StatusNotFound, err)
		return
	}
	follow, err := flag(r, "follow")
	if err != nil {
		httpError(w, http.StatusBadRequest, err)
		return
	}
	past := v.journal.list(maxRecent)
	var more chan Event
	if follow {
		if past, more = v.journal.follow(); more == nil {
			httpError(w, http.StatusTooManyRequests, fault.New("too_many_followers", "%d clients follow the events of this VM already", maxFollowers))
			return
		}
		defer v.journal.unfollow(more)
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	c := http.NewResponseController(w)
	enc := json.NewEncoder(streamWriter{w, c})
	for _, e := range past {
		if enc.Encode(e) != nil {
			return
		}
	}
	c.Flush()
	for follow {
		select {
		case e, ok := <-more:
			if !ok || enc.Encode(e) != nil {
				return
			}
			c.Flush()
		case <-r.Context().Done():
			return
		case <-s.ctx.Done():
			return
		}
	}
}
