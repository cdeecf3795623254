// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of the evidence endpoint.
const (
	minNonce           = 16 // bytes
	maxNonce           = 64
	maxEvidenceRequest = 4 << 10
	maxEvidenceFlights = 8 // quotes under way or waiting for strangers
	evidenceTimeout    = 60 * time.Second

	// preflightAge is how many seconds a browser may remember what it may ask; two
	// hours is the most that Chromium remembers.
	preflightAge = 7200
)

// evidencePath is frozen: verifiers know it (design.md §4).
const evidencePath = "/.well-known/dstack/attest"

// evidenceDesk hands out evidence to strangers: one quote per nonce and
// connection kind at a time, and not too many altogether.
type evidenceDesk struct {
	limit *bucket
	work  sync.WaitGroup

	mu      sync.Mutex
	flights map[flightKey]*flight
}

type flightKey struct {
	nonce string
	tls   bool
}

// flight is one quote under way; requests with its key share its result.
type flight struct {
	done chan struct{}
	body []byte
	err  error
}

func (d *evidenceDesk) init(limit *bucket) {
	d.limit = limit
	d.flights = make(map[flightKey]*flight)
}

// wait waits for the quotes under way.
func (d *evidenceDesk) wait() { d.work.Wait() }

// retryError refuses for now.
type retryError struct {
	error
	after time.Duration
}

func (e retryError) Unwrap() error { return e.error }

// get joins the flight of key or starts one with produce, which outlives the
// request that started it: another may have joined.
func (d *evidenceDesk) get(ctx context.Context, key flightKey, produce func(context.Context) ([]byte, error)) ([]byte, error) {
	f, err := d.join(ctx, key, produce)
	if err != nil {
		return nil, err
	}
	select {
	case <-f.done:
		return f.body, f.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (d *evidenceDesk) join(ctx context.Context, key flightKey, produce func(context.Context) ([]byte, error)) (*flight, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f := d.flights[key]; f != nil {
		return f, nil
	}
	busy := fault.New("evidence_rate_limited", "this instance is asked for evidence too often").
		WithFix("try again later; one answer serves all who share its nonce")
	if len(d.flights) >= maxEvidenceFlights {
		return nil, retryError{busy, time.Second}
	}
	if ok, wait := d.limit.take(); !ok {
		return nil, retryError{busy, wait}
	}
	f := &flight{done: make(chan struct{})}
	d.flights[key] = f
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), evidenceTimeout)
	d.work.Go(func() {
		defer cancel()
		f.body, f.err = produce(ctx)
		d.mu.Lock()
		delete(d.flights, key)
		d.mu.Unlock()
		close(f.done)
	})
	return f, nil
}

// evidenceReply is the JSON form of verifier.Source; declared here so that the
// agent does not link the verifier. A test holds the two together.
type evidenceReply struct {
	Version     int      `json:"version"`
	Container   string   `json:"container"`    // hex, V1 container
	Manifest    string   `json:"manifest"`     // app-compose.json
	Nonce       string   `json:"nonce"`        // hex, echo
	ServedSPKIs []string `json:"served_spkis"` // hex, DER
}

// makeEvidence answers one nonce. spki is the key of the connection, nil for
// plain HTTP.
func (a *Agent) makeEvidence(ctx context.Context, nonce, spki []byte) ([]byte, error) {
	data := binding.Envelope(nonce, spki, a.identity.AppID, a.identity.InstanceID)
	ev, err := a.quote(ctx, data)
	if err != nil {
		return nil, err
	}
	c, err := container.EncodeV1(ev)
	if err != nil {
		return nil, fmt.Errorf("encode evidence: %w", err)
	}
	return json.Marshal(evidenceReply{
		Version: 1, Container: hex.EncodeToString(c), Manifest: string(a.manifest.Raw),
		Nonce: hex.EncodeToString(nonce), ServedSPKIs: []string{hex.EncodeToString(a.spki)},
	})
}

// allowBrowsers lets pages of every origin ask for evidence and read the answer
// (Fetch standard, CORS protocol): a verifier page must not depend on the origin
// that it verifies (threats.md C06). Evidence is for strangers, and the endpoint
// knows no cookie or login that a page could borrow: credentials are not allowed.
// It reports whether r was the browser's question beforehand, which is then
// answered; it takes no quote.
func allowBrowsers(w http.ResponseWriter, r *http.Request) bool {
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", "*")
	if r.Method != http.MethodOptions {
		return false
	}
	h.Set("Access-Control-Allow-Methods", http.MethodPost)
	h.Set("Access-Control-Allow-Headers", "Content-Type")
	h.Set("Access-Control-Max-Age", strconv.Itoa(preflightAge))
	h.Set("Allow", "OPTIONS, POST")
	w.WriteHeader(http.StatusNoContent)
	return true
}

// serveEvidence is POST /.well-known/dstack/attest {"nonce": hex}.
func (a *Agent) serveEvidence(w http.ResponseWriter, r *http.Request) {
	if allowBrowsers(w, r) {
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", "OPTIONS, POST")
		writeError(w, http.StatusMethodNotAllowed, fault.New("method_not_allowed", "evidence is asked for with POST"))
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxEvidenceRequest))
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			writeError(w, http.StatusRequestEntityTooLarge, fault.New("request_too_large", "the request has more than %d bytes", maxEvidenceRequest))
			return
		}
		writeError(w, http.StatusBadRequest, fault.New("request_malformed", "the request did not arrive whole"))
		return
	}
	nonce, err := parseNonce(body)
	if err != nil {
		writeError(w, http.StatusBadRequest, err)
		return
	}
	key := flightKey{nonce: string(nonce), tls: r.TLS != nil}
	reply, err := a.evidence.get(r.Context(), key, func(ctx context.Context) ([]byte, error) {
		var spki []byte
		if key.tls {
			spki = a.spki
		}
		return a.makeEvidence(ctx, nonce, spki)
	})
	var retry retryError
	switch {
	case err == nil:
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Content-Length", strconv.Itoa(len(reply)))
		w.Write(reply)
	case errors.As(err, &retry):
		w.Header().Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(retry.after.Seconds())))))
		writeError(w, http.StatusTooManyRequests, err)
	case r.Context().Err() != nil: // nobody is left to tell
	default:
		a.log.Error("evidence", "error", err)
		// What went wrong inside is for the log, not for strangers.
		writeError(w, http.StatusServiceUnavailable, fault.New("evidence_unavailable", "this instance cannot make evidence now"))
	}
}

// parseNonce reads exactly {"nonce":"<32 to 128 hexadecimal digits>"}.
func parseNonce(body []byte) ([]byte, error) {
	var req struct {
		Nonce string `json:"nonce"`
	}
	if err := strictjson.Decode(body, &req, strictjson.Limits{Size: maxEvidenceRequest, Depth: 1}); err != nil {
		return nil, fault.Wrap(err, "request_malformed", "the request is not {\"nonce\":\"<hex>\"}")
	}
	nonce, err := hex.DecodeString(req.Nonce)
	if err != nil {
		return nil, fault.Wrap(err, "nonce_malformed", "the nonce is not hexadecimal")
	}
	if len(nonce) < minNonce || len(nonce) > maxNonce {
		return nil, fault.New("nonce_length", "a nonce has %d to %d bytes, got %d", minNonce, maxNonce, len(nonce)).
			WithFix("send %d random bytes in hexadecimal", 32)
	}
	return nonce, nil
}

// writeError answers a request that is not prpc with an error in JSON.
func writeError(w http.ResponseWriter, status int, err error) {
	body, _ := json.Marshal(struct {
		Error string `json:"error"`
		Code  string `json:"code,omitempty"`
		Fix   string `json:"fix,omitempty"`
	}{err.Error(), fault.Code(err), fault.Fix(err)})
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}
