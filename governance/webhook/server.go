// SPDX-License-Identifier: Apache-2.0

package webhook

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"time"

	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
)

// Handler answers requests by an authority and signs what it answers. An authority
// that has no answer denies, signed, with the code of its error.
type Handler struct {
	Authority governance.Authority
	Key       ed25519.PrivateKey
	// Now is the server's clock, by which it decides; nil means time.Now.
	Now func() time.Time
	// Upstream, when set, has requests answered that have no nonce.
	Upstream *Upstream
	// RPC is the chain's endpoint that GET / tells of; empty: there is none.
	RPC string
	// Told, when set, is told each decision. err says why there is none.
	Told func(role governance.Role, r *governance.Request, d governance.Decision, err error)
}

func (h *Handler) told(role governance.Role, r *governance.Request, d governance.Decision, err error) {
	if h.Told != nil {
		h.Told(role, r, d, err)
	}
}

// ServeHTTP serves POST /bootAuth/app, POST /bootAuth/kms and GET /.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.Method + " " + r.URL.Path {
	case "POST " + paths[governance.App]:
		h.decide(w, r, governance.App)
	case "POST " + paths[governance.KMS]:
		h.decide(w, r, governance.KMS)
	case "GET /":
		h.about(w, r)
	default:
		http.NotFound(w, r)
	}
}

func (h *Handler) decide(w http.ResponseWriter, r *http.Request, role governance.Role) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxRequest))
	if err != nil {
		status := http.StatusBadRequest
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			status = http.StatusRequestEntityTooLarge
		}
		refuse(w, status, "invalid authorization request")
		return
	}
	now := time.Now
	if h.Now != nil {
		now = h.Now
	}
	at := now()
	if _, err := nonceOf(body); err != nil && h.Upstream != nil {
		h.upstream(w, r, role, body, at)
		return
	}
	req, err := ParseRequest(role, body)
	if err != nil {
		refuse(w, http.StatusBadRequest, "invalid authorization request")
		return
	}
	// The asker's clock decides nothing here; an answer that does not fit it, it refuses.
	req.At = at
	d, err := h.Authority.Decide(r.Context(), req)
	h.told(role, &req, d, err)
	if err != nil {
		code := fault.Code(err)
		if code == "" {
			code = "authority_unavailable"
		}
		d = governance.Deny("", code, "the authority has no answer")
	}
	out, err := Sign(h.Key, body, d, at)
	if err != nil {
		refuse(w, http.StatusInternalServerError, "authorization backend unavailable")
		return
	}
	reply(w, http.StatusOK, out)
}

func (h *Handler) about(w http.ResponseWriter, r *http.Request) {
	about, err := h.Authority.About(r.Context())
	if err != nil {
		reply(w, http.StatusInternalServerError, []byte(`{"status":"error","message":"authorization backend unavailable"}`))
		return
	}
	status := "ok"
	said := info{Status: &status, KMSContractAddr: &about.Contract, GatewayAppID: &about.GatewayAppID, ChainID: &about.ChainID,
		Implementation: &about.Implementation, AppAuthImplementation: &about.Implementation}
	if h.RPC != "" {
		rpc := ReducedURL(h.RPC)
		said.ETHRPCURL = &rpc
	}
	out, err := json.Marshal(said)
	if err != nil {
		reply(w, http.StatusInternalServerError, []byte(`{"status":"error"}`))
		return
	}
	reply(w, http.StatusOK, out)
}

// refuse is upstream's answer to what it cannot read: unsigned, so that it allows nobody.
func refuse(w http.ResponseWriter, status int, reason string) {
	out, _ := json.Marshal(map[string]any{"isAllowed": false, "reason": reason, "gatewayAppId": ""})
	reply(w, status, out)
}

func reply(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(body)
}
