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
	req, err := ParseRequest(role, body)
	if err != nil {
		refuse(w, http.StatusBadRequest, "invalid authorization request")
		return
	}
	now := time.Now
	if h.Now != nil {
		now = h.Now
	}
	at := now()
	// The asker's clock decides nothing here; an answer that does not fit it, it refuses.
	req.At = at
	d, err := h.Authority.Decide(r.Context(), req)
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
	out, err := json.Marshal(info{&status, &about.Contract, &about.GatewayAppID, &about.ChainID, &about.Implementation})
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
