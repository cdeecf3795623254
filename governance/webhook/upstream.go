// SPDX-License-Identifier: Apache-2.0

package webhook

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
)

// Upstream is how requests of upstream's KMS nodes are answered, which have no nonce:
// nothing ties an answer to them, so none is signed, and whoever sits between can alter
// it (threats.md G04). A KMS of ours takes no such answer.
type Upstream struct {
	// Trust is the kind of root that those nodes verify evidence under, which their
	// requests do not tell.
	Trust dstack.Trust
	// ImageBound says that those nodes derive the launch registers from the image whose
	// hash they send, as upstream's do unless they are told not to.
	ImageBound bool
}

// Limits of upstream's request (spec/governance.md §3.1).
const (
	maxStatus     = 128
	maxAdvisories = 128
	maxAdvisory   = 256
)

// padded is a byte field of upstream's: hexadecimal, with 0x or without.
type padded []byte

func (p *padded) UnmarshalText(b []byte) (err error) {
	b = bytes.TrimPrefix(b, []byte("0x"))
	*p, err = hex.DecodeString(string(b))
	return err
}

// into fills out from the right, as upstream does with what is shorter.
func (p *padded) into(what string, out []byte) error {
	if p == nil {
		return fault.New("webhook_malformed", "the request: %s is missing", what)
	}
	if len(*p) > len(out) {
		return fault.New("webhook_malformed", "the request: %s has %d bytes, the most is %d", what, len(*p), len(out))
	}
	copy(out[len(out)-len(*p):], *p)
	return nil
}

// ParseUpstream reads a request of upstream's KMS: spec/governance.md §3.1. Code
// webhook_malformed.
func (u *Upstream) ParseUpstream(role governance.Role, body []byte) (governance.Request, error) {
	var b struct {
		TEEVariant      string   `json:"teeVariant"`
		MRAggregated    *padded  `json:"mrAggregated"`
		OSImageHash     *padded  `json:"osImageHash"`
		MRSystem        padded   `json:"mrSystem"`
		AppID           *padded  `json:"appId"`
		ComposeHash     *padded  `json:"composeHash"`
		InstanceID      *padded  `json:"instanceId"`
		DeviceID        *padded  `json:"deviceId"`
		KeyProviderInfo padded   `json:"keyProviderInfo"`
		TCBStatus       string   `json:"tcbStatus"`
		AdvisoryIDs     []string `json:"advisoryIds"`
	}
	none := governance.Request{}
	if err := strictjson.Decode(body, &b, strictjson.Limits{Size: MaxRequest, Depth: 4, Unknown: true}); err != nil {
		return none, fault.Wrap(err, "webhook_malformed", "the request does not parse")
	}
	r := governance.Request{Role: role, Purpose: governance.Keys, Trust: u.Trust, ImageBound: u.ImageBound, Boot: governance.BootInfo{
		TEEVariant: b.TEEVariant, KeyProviderInfo: b.KeyProviderInfo, TCBStatus: b.TCBStatus, AdvisoryIDs: b.AdvisoryIDs,
	}}
	if role == governance.KMS {
		r.Purpose = governance.Replication
	}
	var image dstack.ImageHash
	var instance dstack.InstanceID
	boot := &r.Boot
	for _, f := range []struct {
		what string
		from *padded
		out  []byte
	}{
		{"mrAggregated", b.MRAggregated, boot.MRAggregated[:]}, {"osImageHash", b.OSImageHash, image[:]}, {"mrSystem", &b.MRSystem, boot.MRSystem[:]},
		{"appId", b.AppID, boot.AppID[:]}, {"composeHash", b.ComposeHash, boot.ComposeHash[:]}, {"instanceId", b.InstanceID, instance[:]},
		{"deviceId", b.DeviceID, boot.DeviceID[:]},
	} {
		if err := f.from.into(f.what, f.out); err != nil {
			return none, err
		}
	}
	if len(*b.OSImageHash) > 0 {
		boot.OSImageHash = image[:]
	}
	if len(*b.InstanceID) > 0 {
		boot.InstanceID = instance[:]
	}
	long := len(b.TCBStatus) > maxStatus || len(b.AdvisoryIDs) > maxAdvisories
	for _, a := range b.AdvisoryIDs {
		long = long || len(a) > maxAdvisory
	}
	if long {
		return none, fault.New("webhook_malformed", "the request: tcbStatus or advisoryIds are too long")
	}
	return r, nil
}

// upstream answers without a signature; a backend that has no answer denies in
// upstream's words.
func (h *Handler) upstream(w http.ResponseWriter, r *http.Request, role governance.Role, body []byte, at time.Time) {
	req, err := h.Upstream.ParseUpstream(role, body)
	if err != nil {
		refuse(w, http.StatusBadRequest, "invalid authorization request")
		return
	}
	req.At = at
	d, err := h.Authority.Decide(r.Context(), req)
	h.told(role, &req, d, err)
	if err != nil {
		d = governance.Deny("", "", "authorization backend unavailable")
	}
	out, err := json.Marshal(map[string]any{"isAllowed": d.Allowed, "gatewayAppId": d.GatewayAppID, "reason": cut(d.Reason, maxReason)})
	if err != nil {
		refuse(w, http.StatusInternalServerError, "authorization backend unavailable")
		return
	}
	reply(w, http.StatusOK, out)
}

// ReducedURL is what may be told of an endpoint: scheme and host, for keys of providers
// are in paths.
func ReducedURL(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "" || u.Host == "" {
		return "configured"
	}
	return fmt.Sprintf("%s://%s", strings.ToLower(u.Scheme), u.Host)
}
