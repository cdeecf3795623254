// SPDX-License-Identifier: Apache-2.0

// Package webhook is authority over HTTP: upstream's webhook, whose answers count only
// when a pinned key signed them for the very request.
//
// [Authority] asks, [Handler] answers by another authority; [Sign] and [Verify] are the
// two ends of an answer, for servers of other making. Upstream's webhook signs nothing,
// and so do not count here: whoever sits between could turn a denial into a grant
// (threats.md G04).
//
// Guarantees: an answer to another request, an old answer and an altered one are
// errors, and errors deny. Every question is asked anew. A webhook that hangs, redirects
// or floods costs a bounded time and memory.
//
// Trusted: the pinned key, and who has it. Attacker-controlled: the network, every byte
// of an answer until its signature holds; to a server, every byte of a request. A
// request is not signed: a server that must know who asks needs TLS client
// certificates. What GET / tells is not signed either, and nothing is decided by it.
//
// Implements spec/governance.md §3 and spec/kms.md §8 (6, 7).
//
// # Request
//
// POST {base}/bootAuth/app or {base}/bootAuth/kms. The body is upstream's BootInfo and,
// behind it, ours:
//
//	nonce        32 bytes, hexadecimal
//	purpose      keys, certificate, renewal; replication, service, source
//	requestedAt  RFC 3339
//	trust        production or development
//	launch       launch registers by name, hexadecimal
//	imageBound   whether osImageHash is more than the guest's word
//	devImage, osEpoch   of the image; absent: unknown
//	session      whether the evidence is for this connection
//
// # Answer
//
// Upstream's isAllowed, gatewayAppId and reason, and ours: requestHash, the SHA-256 of
// the request's exact body; nonce, the request's; expires, RFC 3339, at most 60 seconds
// ahead; code, by, leaseSeconds, names, keyEpoch, oldestKeyEpoch as
// governance.Decision has them, all optional, names absent allowing any; signature.
// Hashes and nonce are hexadecimal, the signature is base64 of Ed25519's 64 bytes over
//
//	LP("dstack-webhook-v1") ‖ LP(requestHash) ‖ LP(nonce) ‖ LP(expires) ‖ LP(isAllowed) ‖
//	LP(gatewayAppId) ‖ LP(reason) ‖ LP(code) ‖ LP(by) ‖ LP(leaseSeconds) ‖ LP(keyEpoch) ‖
//	LP(oldestKeyEpoch) ‖ LP(names)
//
// LP(x) is the length of x, four bytes big-endian, and x. requestHash and nonce are
// their 32 bytes; expires and the other texts their UTF-8 as the answer has it;
// isAllowed one byte, 0 or 1; numbers eight bytes, big-endian; names nothing when
// absent, and otherwise one byte 1 and LP of each name.
//
// The request's hash covers its purpose, which belongs to one of the two paths only.
//
// # Upstream's nodes
//
// A Handler that is told to answers upstream's requests too, which have no nonce, in
// upstream's form and unsigned. A KMS of ours refuses such an answer.
package webhook

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits.
const (
	MaxAnswer  = 64 << 10 // bytes
	MaxRequest = 64 << 10 // bytes
	MaxAhead   = time.Minute
	MaxLease   = time.Hour
	Timeout    = 5 * time.Second
)

const (
	domain = "dstack-webhook-v1"
	// validity of the answers that Sign makes: half of what counts, so that two clocks
	// may differ by as much.
	validity  = MaxAhead / 2
	maxReason = 512 // bytes
	maxNames  = 256
)

// paths are where each role is asked for.
var paths = map[governance.Role]string{governance.App: "/bootAuth/app", governance.KMS: "/bootAuth/kms"}

// bootInfo is governance.BootInfo as it is read.
type bootInfo struct {
	TEEVariant      string             `json:"teeVariant"`
	MRAggregated    hex32              `json:"mrAggregated"`
	OSImageHash     hexBytes           `json:"osImageHash"`
	MRSystem        hex32              `json:"mrSystem"`
	AppID           dstack.AppID       `json:"appId"`
	ComposeHash     dstack.ComposeHash `json:"composeHash"`
	InstanceID      hexBytes           `json:"instanceId"`
	DeviceID        dstack.DeviceID    `json:"deviceId"`
	KeyProviderInfo hexBytes           `json:"keyProviderInfo"`
	TCBStatus       string             `json:"tcbStatus"`
	AdvisoryIDs     []string           `json:"advisoryIds"`
}

// more is what of a request is ours.
type more struct {
	Nonce       *hex32              `json:"nonce"`
	Purpose     governance.Purpose  `json:"purpose"`
	RequestedAt time.Time           `json:"requestedAt"`
	Trust       dstack.Trust        `json:"trust"`
	Launch      map[string]hexBytes `json:"launch"`
	ImageBound  bool                `json:"imageBound"`
	DevImage    *bool               `json:"devImage,omitempty"`
	OSEpoch     *int                `json:"osEpoch,omitempty"`
	Session     bool                `json:"session"`
}

type hex32 [32]byte

func (h hex32) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h[:])), nil }
func (h *hex32) UnmarshalText(b []byte) error {
	if len(b) != 64 {
		return fault.New("webhook_malformed", "want 64 hexadecimal digits, got %d characters", len(b))
	}
	_, err := hex.Decode(h[:], b)
	return err
}

type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }
func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

// newRequest writes the body that asks r, with a fresh nonce.
func newRequest(r governance.Request) ([]byte, error) {
	if !r.Role.MayAsk(r.Purpose) {
		return nil, fault.New("purpose_denied", "a machine of role %.20q cannot ask for %.20q", r.Role, r.Purpose)
	}
	head, err := r.Boot.MarshalJSON()
	if err != nil {
		return nil, fault.Wrap(err, "webhook_malformed", "write the request")
	}
	m := more{
		Nonce: new(hex32), Purpose: r.Purpose, RequestedAt: r.At.UTC(), Trust: r.Trust, Launch: map[string]hexBytes{},
		ImageBound: r.ImageBound, DevImage: r.DevImage, OSEpoch: r.OSEpoch, Session: r.Session,
	}
	rand.Read(m.Nonce[:])
	for name, value := range r.Launch {
		m.Launch[name] = value
	}
	tail, err := json.Marshal(m)
	if err != nil {
		return nil, fault.Wrap(err, "webhook_malformed", "write the request")
	}
	// One object of two: BootInfo's members come first, byte by byte as upstream has them.
	body := append(append(head[:len(head)-1:len(head)-1], ','), tail[1:]...)
	if len(body) > MaxRequest {
		return nil, fault.New("webhook_too_large", "the request has %d bytes, the most is %d", len(body), MaxRequest)
	}
	return body, nil
}

// ParseRequest reads a request's body for a server, by the role of its path. A body
// that is not of this form, or whose purpose is not the role's, has the code
// webhook_malformed. Its time is the asker's word.
func ParseRequest(role governance.Role, body []byte) (governance.Request, error) {
	var b struct {
		bootInfo
		more
	}
	if err := strictjson.Decode(body, &b, strictjson.Limits{Size: MaxRequest, Depth: 4, Unknown: true}); err != nil {
		return governance.Request{}, fault.Wrap(err, "webhook_malformed", "the request does not parse")
	}
	bad := func(format string, args ...any) (governance.Request, error) {
		return governance.Request{}, fault.New("webhook_malformed", "the request: "+format, args...)
	}
	switch {
	case b.Nonce == nil:
		return bad("there is no nonce")
	case !role.MayAsk(b.Purpose):
		return bad("a machine of role %.20q cannot ask for %.20q", role, b.Purpose)
	case len(b.OSImageHash) != 0 && len(b.OSImageHash) != dstack.ImageHashSize:
		return bad("osImageHash has %d bytes", len(b.OSImageHash))
	case len(b.InstanceID) != 0 && len(b.InstanceID) != dstack.InstanceIDSize:
		return bad("instanceId has %d bytes", len(b.InstanceID))
	case b.AppID.IsZero() || b.ComposeHash.IsZero():
		// What is absent is zero too.
		return bad("appId or composeHash is missing")
	}
	r := governance.Request{
		Role: role, Purpose: b.Purpose, Trust: b.Trust, Launch: map[string][]byte{}, ImageBound: b.ImageBound,
		DevImage: b.DevImage, OSEpoch: b.OSEpoch, Session: b.Session, At: b.RequestedAt,
		Boot: governance.BootInfo{
			TEEVariant: b.TEEVariant, MRAggregated: b.MRAggregated, OSImageHash: b.OSImageHash, MRSystem: b.MRSystem,
			AppID: b.AppID, ComposeHash: b.ComposeHash, InstanceID: b.InstanceID, DeviceID: b.DeviceID,
			KeyProviderInfo: b.KeyProviderInfo, TCBStatus: b.TCBStatus, AdvisoryIDs: b.AdvisoryIDs,
		},
	}
	for name, value := range b.Launch {
		r.Launch[name] = value
	}
	return r, nil
}

// answer is an answer; pointers tell absent from zero.
type answer struct {
	IsAllowed    *bool   `json:"isAllowed"`
	GatewayAppID *string `json:"gatewayAppId"`
	Reason       *string `json:"reason"`

	RequestHash    *hex32    `json:"requestHash,omitempty"`
	Nonce          *hex32    `json:"nonce,omitempty"`
	Expires        string    `json:"expires,omitempty"`
	Code           string    `json:"code,omitempty"`
	By             string    `json:"by,omitempty"`
	LeaseSeconds   uint64    `json:"leaseSeconds,omitempty"`
	KeyEpoch       uint64    `json:"keyEpoch,omitempty"`
	OldestKeyEpoch uint64    `json:"oldestKeyEpoch,omitempty"`
	Names          *[]string `json:"names,omitempty"`
	Signature      []byte    `json:"signature,omitempty"`
}

// message is what is signed: the package comment has it.
func (a *answer) message() []byte {
	var out []byte
	lp := func(b []byte) {
		out = binary.BigEndian.AppendUint32(out, uint32(len(b)))
		out = append(out, b...)
	}
	number := func(n uint64) { lp(binary.BigEndian.AppendUint64(nil, n)) }
	lp([]byte(domain))
	lp(a.RequestHash[:])
	lp(a.Nonce[:])
	lp([]byte(a.Expires))
	allowed := []byte{0}
	if *a.IsAllowed {
		allowed[0] = 1
	}
	lp(allowed)
	lp([]byte(*a.GatewayAppID))
	lp([]byte(*a.Reason))
	lp([]byte(a.Code))
	lp([]byte(a.By))
	number(a.LeaseSeconds)
	number(a.KeyEpoch)
	number(a.OldestKeyEpoch)
	var names []byte
	if a.Names != nil {
		names = []byte{1}
		for _, n := range *a.Names {
			names = binary.BigEndian.AppendUint32(names, uint32(len(n)))
			names = append(names, n...)
		}
	}
	lp(names)
	return out
}

// Sign answers a request's exact body, as a server: the answer counts for half a minute
// from at. A body without a nonce cannot be answered: webhook_malformed.
func Sign(key ed25519.PrivateKey, body []byte, d governance.Decision, at time.Time) ([]byte, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, fault.New("webhook_signature", "the signing key has %d bytes, want %d", len(key), ed25519.PrivateKeySize)
	}
	nonce, err := nonceOf(body)
	if err != nil {
		return nil, err
	}
	reason, hash := cut(d.Reason, maxReason), hex32(sha256.Sum256(body))
	a := answer{
		IsAllowed: &d.Allowed, GatewayAppID: &d.GatewayAppID, Reason: &reason, RequestHash: &hash, Nonce: nonce,
		Expires: at.Add(validity).UTC().Format(time.RFC3339), Code: d.Code, By: cut(d.By, maxReason),
		LeaseSeconds: uint64(max(d.Lease, 0) / time.Second), KeyEpoch: d.Epoch, OldestKeyEpoch: d.OldestEpoch,
	}
	if d.Names != nil {
		a.Names = &d.Names
	}
	a.Signature = ed25519.Sign(key, a.message())
	out, err := json.Marshal(a)
	if err != nil {
		return nil, fault.Wrap(err, "webhook_malformed", "write the answer")
	}
	return out, nil
}

func nonceOf(body []byte) (*hex32, error) {
	var b struct {
		Nonce *hex32 `json:"nonce"`
	}
	if err := strictjson.Decode(body, &b, strictjson.Limits{Size: MaxRequest, Depth: 4, Unknown: true}); err != nil {
		return nil, fault.Wrap(err, "webhook_malformed", "the request does not parse")
	}
	if b.Nonce == nil {
		return nil, fault.New("webhook_malformed", "the request has no nonce, so that nothing binds an answer to it")
	}
	return b.Nonce, nil
}

// Verify returns what an answer decides about a request's exact body. Codes:
// webhook_too_large, webhook_malformed, webhook_signature when there is none or it is
// not the key's, webhook_mismatch when it answers another request, webhook_expired when
// it counts no longer, or for longer than a minute.
func Verify(key ed25519.PublicKey, body, data []byte, at time.Time) (governance.Decision, error) {
	var none governance.Decision
	if len(data) > MaxAnswer {
		return none, fault.New("webhook_too_large", "the webhook answered %d bytes or more, the most is %d", len(data), MaxAnswer)
	}
	nonce, err := nonceOf(body)
	if err != nil {
		return none, err
	}
	var a answer
	if err := strictjson.Decode(data, &a, strictjson.Limits{Size: MaxAnswer, Depth: 8, Unknown: true}); err != nil {
		return none, fault.Wrap(err, "webhook_malformed", "the webhook's answer does not parse")
	}
	if a.IsAllowed == nil || a.GatewayAppID == nil || a.Reason == nil {
		return none, fault.New("webhook_malformed", "the webhook's answer must have isAllowed, gatewayAppId and reason")
	}
	if a.RequestHash == nil || a.Nonce == nil || len(a.Signature) == 0 {
		return none, fault.New("webhook_signature", "the webhook's answer is not signed for this request").
			WithFix("use a webhook that signs its answers; upstream's does not, and whoever sits between could alter them")
	}
	if len(key) != ed25519.PublicKeySize || !ed25519.Verify(key, a.message(), a.Signature) {
		return none, fault.New("webhook_signature", "the webhook's answer is not signed by the pinned key").WithFix("compare the webhook's key with the configuration")
	}
	sum := sha256.Sum256(body)
	if subtle.ConstantTimeCompare(sum[:], a.RequestHash[:]) != 1 || subtle.ConstantTimeCompare(nonce[:], a.Nonce[:]) != 1 {
		return none, fault.New("webhook_mismatch", "the webhook's answer is to another request")
	}
	expires, err := time.Parse(time.RFC3339, a.Expires)
	switch {
	case err != nil:
		return none, fault.Wrap(err, "webhook_malformed", "the webhook's answer: expires")
	case !at.Before(expires):
		return none, fault.New("webhook_expired", "the webhook's answer counted until %s", a.Expires).WithFix("see whether the clocks are right")
	case expires.Sub(at) > MaxAhead:
		return none, fault.New("webhook_expired", "the webhook's answer counts until %s, which is more than a minute ahead", a.Expires).WithFix("see whether the clocks are right")
	}
	return a.decision(key)
}

// decision reads what the signature vouches for, which may be nonsense still.
func (a *answer) decision(key ed25519.PublicKey) (governance.Decision, error) {
	bad := func(what string) (governance.Decision, error) {
		return governance.Decision{}, fault.New("webhook_malformed", "the webhook's answer: %s", what)
	}
	switch {
	case a.LeaseSeconds > uint64(MaxLease/time.Second):
		return bad("leaseSeconds is more than an hour")
	case a.OldestKeyEpoch > a.KeyEpoch || (a.OldestKeyEpoch == 0) != (a.KeyEpoch == 0):
		return bad("oldestKeyEpoch must be from 1 to keyEpoch, or both absent")
	case !isCode(a.Code):
		return bad("code is none")
	}
	d := governance.Decision{By: "webhook " + keyID(key)}
	if a.By != "" {
		d.By += " by " + cut(a.By, maxReason)
	}
	if !*a.IsAllowed {
		d.Code, d.Reason = a.Code, cut(*a.Reason, maxReason)
		if d.Code == "" {
			d.Code = "webhook_denied"
		}
		return d, nil
	}
	if a.Names != nil {
		if len(*a.Names) > maxNames || slices.ContainsFunc(*a.Names, func(n string) bool { return !governance.NameWellFormed(n) }) {
			return bad("names")
		}
		d.Names = append([]string{}, *a.Names...)
	}
	d.Allowed, d.GatewayAppID = true, *a.GatewayAppID
	d.Lease, d.Epoch, d.OldestEpoch = time.Duration(a.LeaseSeconds)*time.Second, a.KeyEpoch, a.OldestKeyEpoch
	return d, nil
}

// isCode reports whether s looks like a code, or is empty.
func isCode(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
			return false
		}
	}
	return len(s) <= 64
}

// keyID names a key: the first 8 bytes of its SHA-256, hexadecimal.
func keyID(key ed25519.PublicKey) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:8])
}

// cut shortens text to n bytes, between runes.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
