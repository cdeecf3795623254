// SPDX-License-Identifier: Apache-2.0

// Package witness answers for the gateway where it ends TLS: with evidence of its own,
// made for the key of that very connection, and with that of the instance behind, for the
// same nonce. A client that appraises both knows who sees what it says (package verifier,
// threats.md C05).
//
// Guarantees: the gateway's evidence commits to no key but the one that the connection was
// shown; the instance's is asked of the instance that this connection was joined to, over
// the tunnel, and counts only for the key that answered there. Quotes under way are few.
//
// Trusted: the guest agent of the gateway. Attacker-controlled: the request, and what the
// instance answers, which is passed on and judged by whoever asked.
//
// Implements design.md §4 (evidence of terminated hosts).
package witness

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

const (
	maxRequest = 4 << 10
	// flights is how many answers are made at once; each costs two quotes.
	flights  = 4
	patience = 75 * time.Second
)

// Desk answers. All fields but Log are required.
type Desk struct {
	AppID    dstack.AppID
	Instance []byte           // id of this gateway's instance; empty without one
	Manifest string           // app-compose.json of the gateway; empty when unknown
	Attester channel.Attester // of the gateway
	// Dial reaches an address in the tunnel.
	Dial func(context.Context, netip.AddrPort) (net.Conn, error)
	Log  *slog.Logger

	slots chan struct{}
}

// New returns a desk.
func New(d Desk) *Desk {
	d.slots = make(chan struct{}, flights)
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	return &d
}

// Answer is for edge.Config.Evidence. Its refusals are JSON {"error", "code"}, as those of
// an instance.
func (d *Desk) Answer(w http.ResponseWriter, r *http.Request, a edge.Asked) {
	w.Header().Set("Access-Control-Allow-Origin", "*") // evidence is for strangers, and pages are
	body, err := d.answer(r, a)
	if err != nil {
		if r.Context().Err() == nil {
			d.Log.Info("evidence", "code", fault.Code(err), "error", err)
		}
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}

// statuses of the refusals.
var statuses = map[string]int{
	"request_malformed": http.StatusBadRequest, "nonce_length": http.StatusBadRequest, "request_too_large": http.StatusRequestEntityTooLarge,
	"evidence_resumed": http.StatusConflict, "evidence_rate_limited": http.StatusTooManyRequests, "evidence_app": http.StatusBadGateway,
}

func refuse(w http.ResponseWriter, err error) {
	status, known := statuses[fault.Code(err)]
	if !known { // what went wrong inside is for the log
		status, err = http.StatusServiceUnavailable, fault.New("evidence_unavailable", "this gateway cannot make evidence now")
	}
	if status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "1")
	}
	body, _ := json.Marshal(struct {
		Error string `json:"error"`
		Code  string `json:"code"`
	}{err.Error(), fault.Code(err)})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(body)
}

// answer returns the JSON of a verifier.Source. Codes request_malformed,
// request_too_large, nonce_length; evidence_resumed (the connection has no certificate of
// which the gateway could speak), evidence_rate_limited, evidence_app (the instance's is
// not to be had).
func (d *Desk) answer(r *http.Request, a edge.Asked) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxRequest+1))
	if err != nil {
		return nil, fault.Wrap(err, "request_malformed", "the request did not arrive whole")
	}
	if len(body) > maxRequest {
		return nil, fault.New("request_too_large", "the request has more than %d bytes", maxRequest)
	}
	nonce, err := parseNonce(body)
	if err != nil {
		return nil, err
	}
	if len(a.SPKI) == 0 {
		return nil, fault.New("evidence_resumed", "this connection resumed a session, and was shown no certificate").WithFix("ask over a new session")
	}
	select {
	case d.slots <- struct{}{}:
		defer func() { <-d.slots }()
	default:
		return nil, fault.New("evidence_rate_limited", "this gateway is asked for evidence too often").WithFix("try again later")
	}
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	var app *verifier.Source
	own := &verifier.Source{Version: 1, Manifest: d.Manifest, Nonce: nonce, ServedSPKIs: [][]byte{a.SPKI}}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		app, err = d.instance(ctx, a.Address, nonce)
		return err
	})
	group.Go(func() (err error) {
		own.Container, err = d.Attester.Attest(ctx, binding.Envelope(nonce, a.SPKI, d.AppID, d.Instance))
		return err
	})
	if err := group.Wait(); err != nil {
		return nil, err
	}
	app.Gateway = own
	return json.Marshal(app)
}

// instance asks the guest's agent, over TLS, so that its evidence is of the key that the
// guest's init committed to, and of the holder of that key.
func (d *Desk) instance(ctx context.Context, addr netip.Addr, nonce []byte) (*verifier.Source, error) {
	to := netip.AddrPortFrom(addr, portpolicy.AgentPort)
	reply, spki, err := channel.FetchEvidenceBy(ctx, func(ctx context.Context, _ string) (net.Conn, error) { return d.Dial(ctx, to) }, "https://"+to.String(), nonce)
	if err != nil {
		return nil, fault.Wrap(err, "evidence_app", "ask the instance for its evidence")
	}
	src, err := verifier.ParseSource(reply)
	if err == nil && src.Gateway != nil {
		err = errors.New("it names a gateway of its own")
	}
	if err == nil && !slices.ContainsFunc(src.ServedSPKIs, func(k []byte) bool { return bytes.Equal(k, spki) }) {
		err = errors.New("it is not of the key that answered")
	}
	if err != nil {
		return nil, fault.Wrap(err, "evidence_app", "the instance's evidence")
	}
	src.ServedSPKIs = [][]byte{spki}
	return src, nil
}

// parseNonce reads exactly {"nonce":"<hex>"}.
func parseNonce(body []byte) ([]byte, error) {
	var req struct {
		Nonce string `json:"nonce"`
	}
	if err := strictjson.Decode(body, &req, strictjson.Limits{Size: maxRequest, Depth: 1}); err != nil {
		return nil, fault.Wrap(err, "request_malformed", "the request is not {\"nonce\":\"<hex>\"}")
	}
	nonce, err := hex.DecodeString(req.Nonce)
	if err != nil {
		return nil, fault.Wrap(err, "request_malformed", "the nonce is not hexadecimal")
	}
	if len(nonce) < channel.MinNonce || len(nonce) > channel.MaxNonce {
		return nil, fault.New("nonce_length", "a nonce has %d to %d bytes, got %d", channel.MinNonce, channel.MaxNonce, len(nonce))
	}
	return nonce, nil
}
