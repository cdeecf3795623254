// SPDX-License-Identifier: Apache-2.0

// Package page answers what a web page asks of the verifier: bytes and options in,
// the JSON of a verdict or of an error out. It is everything of dstack.wasm but
// the calls to JavaScript, so that tests compare the same inputs decided natively
// and in a browser.
//
// Options mean what the flags of `dstack verify` of the same names mean, and the
// decision is [verifier.Appraise]'s: the same evidence, options and time give the
// verdict that the command gives with --offline. What a browser cannot know stays
// unsaid: it shows no page the certificate of a connection, so the channel of every
// verdict is none, with the finding channel_unbound.
//
// All input may be hostile: evidence is, and options may have been pasted from
// anywhere. Sizes are bounded before anything is decoded. Implements design.md §4;
// threats.md C06, F03.
package page

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"maps"
	"slices"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/verifier"
)

// MaxOptions is the largest options document in bytes: collateral and development
// roots, each in base64 or as a string in JSON, and the small rest.
const MaxOptions = 64 << 20

// Options are what the caller expects and brings, each member optional. Unknown
// members are errors: an expectation that is not understood must not be dropped.
type Options struct {
	// Kind names the kind of evidence where looking at it does not tell: --tee.
	Kind string `json:"kind,omitempty"`

	// Policy is the policy document, or the string "signature-only".
	Policy Document `json:"policy,omitzero"`

	// At is the time at which to verify, RFC 3339. Without it, verification is at the
	// page's clock or NotBefore, whichever is later: NotBefore is a time that somebody
	// other than the clock vouches for, such as the server that the page came from.
	// A clock that is set back then brings no old collateral back to life (F03).
	At        string `json:"at,omitempty"`
	NotBefore string `json:"not_before,omitempty"`

	// Nonce is what the evidence must answer, 16 to 64 bytes in hexadecimal. Asked says
	// that the page has just sent it: evidence must then be fresh, whatever the policy.
	Nonce string `json:"nonce,omitempty"`
	Asked bool   `json:"asked,omitempty"`

	// ReportData is demanded exactly, in hexadecimal.
	ReportData string `json:"report_data,omitempty"`

	// EventLog belongs to a bare quote: the text of a JSON log, or a binary CCEL in base64.
	EventLog     string `json:"event_log,omitempty"`
	EventLogCCEL []byte `json:"event_log_ccel,omitempty"`

	// GPUEvidence is what NVIDIA's verifier printed in the guest at boot, as text.
	GPUEvidence string `json:"gpu_evidence,omitempty"`

	// What to expect, in hexadecimal: 32, 20, 20 and 32 bytes.
	ComposeHash string `json:"compose_hash,omitempty"`
	AppID       string `json:"app_id,omitempty"`
	InstanceID  string `json:"instance_id,omitempty"`
	OSImageHash string `json:"os_image_hash,omitempty"`
	// Manifest is the text of the app-compose.json to expect, byte for byte.
	Manifest *string `json:"manifest,omitempty"`
	// Lock is a dstack.lock.json.
	Lock Document `json:"lock,omitzero"`

	// Collateral is a bundle; CollateralFiles are files of --collateral's directory by
	// name, in base64.
	Collateral      Document          `json:"collateral,omitzero"`
	CollateralFiles map[string][]byte `json:"collateral_files,omitempty"`

	// DevRoots are development roots: trust is then development.
	DevRoots Document `json:"dev_roots,omitzero"`
	// TrustAnchors are public keys that the caller vouches for, PEM or JWK, by name.
	TrustAnchors map[string]string `json:"trust_anchors,omitempty"`
}

// Document is a JSON document, given as itself or as a string of its text.
type Document []byte

// UnmarshalJSON keeps the text of the document.
func (d *Document) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '"' {
		var text string
		if err := json.Unmarshal(data, &text); err != nil {
			return err
		}
		*d = Document(text)
		return nil
	}
	*d = bytes.Clone(data)
	return nil
}

// Verify judges evidence of any form that [verifier.ReadEvidence] reads. now is the
// page's clock. It returns the JSON of a [verifier.Verdict], which is also the
// answer to bytes that are no evidence, or, when it is the options that are
// wrong, of an error: {"error": text, "code": code, "fix": text}.
func Verify(input, options []byte, now time.Time) []byte {
	v, err := verify(input, options, now)
	if err != nil {
		return Error(err)
	}
	out, err := json.Marshal(v)
	if err != nil {
		return Error(err)
	}
	return out
}

// Wants names the collateral that evidence needs:
//
//	{"tee": kind, "fmspc": hex, "ca": "processor" or "platform"}           TDX
//	{"tee": kind, "product": name, "chip_id": hex, "tcb": hex, "vlek": bool}  SEV-SNP
//	{"tee": kind}                               other kinds, which bring theirs along
//
// or an error as Verify returns it. chip_id has 64 bytes; tcb is the report's
// number, 16 digits, most significant first.
func Wants(input []byte, kind string) []byte {
	src, err := verifier.ReadEvidence(input, kind)
	if err != nil {
		return Error(err)
	}
	tee, err := src.TEE()
	if err != nil {
		return Error(err)
	}
	want, ok, err := verifier.CollateralFor(src)
	if err != nil {
		return Error(err)
	}
	w := struct {
		TEE     dstack.TEE     `json:"tee"`
		FMSPC   string         `json:"fmspc,omitempty"`
		CA      collateral.CA  `json:"ca,omitempty"`
		Product string         `json:"product,omitempty"`
		ChipID  collateral.Hex `json:"chip_id,omitempty"`
		TCB     string         `json:"tcb,omitempty"`
		VLEK    *bool          `json:"vlek,omitempty"`
	}{TEE: tee, FMSPC: want.FMSPC, CA: want.PCKCA}
	if ok && tee == dstack.SEVSNP {
		var tcb [8]byte
		for i := range tcb {
			tcb[i] = byte(want.TCB >> (8 * (7 - i)))
		}
		w.Product, w.ChipID, w.TCB, w.VLEK = want.Product, want.ChipID[:], hex.EncodeToString(tcb[:]), &want.VLEK
	}
	out, err := json.Marshal(w)
	if err != nil {
		return Error(err)
	}
	return out
}

// Error returns the JSON of an error: {"error", "code", "fix"}. An error without a
// code is a bug of this program, code internal.
func Error(err error) []byte {
	code := fault.Code(err)
	if code == "" {
		code = "internal"
	}
	out, _ := json.Marshal(struct { // strings always marshal
		Error string `json:"error"`
		Code  string `json:"code"`
		Fix   string `json:"fix"`
	}{err.Error(), code, fault.Fix(err)})
	return out
}

func verify(input, options []byte, now time.Time) (*verifier.Verdict, error) {
	var o Options
	if len(bytes.TrimSpace(options)) > 0 {
		if err := strictjson.Decode(options, &o, strictjson.Limits{Size: MaxOptions, Depth: 12}); err != nil {
			return nil, fault.Wrap(err, "options_malformed", "the options do not parse").WithFix("web/verify/README.md lists the options")
		}
	}
	req, err := o.request(now)
	if err != nil {
		return nil, err
	}
	src, err := o.source(input)
	if err != nil {
		return verifier.Refuse(err, req.Policy.Scope, req.At), nil
	}
	req.Source = *src
	return verifier.Appraise(*req), nil
}

// source reads the evidence, and the event log that belongs to it.
func (o *Options) source(input []byte) (*verifier.Source, error) {
	src, err := verifier.ReadEvidence(input, o.Kind)
	if err != nil {
		return nil, err
	}
	log := o.EventLogCCEL
	if o.EventLog != "" {
		log = []byte(o.EventLog)
	}
	if len(log) > 0 {
		events, err := verifier.ReadEventLog(log)
		if err != nil {
			return nil, err
		}
		if err := src.AddEventLog(events); err != nil {
			return nil, err
		}
	}
	if o.GPUEvidence != "" {
		src.GPU = []byte(o.GPUEvidence)
	}
	return src, nil
}

// request is all but the evidence.
func (o *Options) request(now time.Time) (*verifier.Request, error) {
	req := &verifier.Request{Roots: verifier.VendorRoots()}
	for _, step := range []func(*verifier.Request) error{
		func(r *verifier.Request) error { return o.time(r, now) },
		o.policy, o.freshness, o.reference, o.roots, o.collateral,
	} {
		if err := step(req); err != nil {
			return nil, err
		}
	}
	return req, nil
}

func bad(err error, option string) error {
	return fault.Wrap(err, "options_malformed", "option %s", option)
}

func (o *Options) time(req *verifier.Request, now time.Time) error {
	req.At = now.UTC()
	for _, t := range []struct {
		name, text string
		use        func(time.Time)
	}{
		{"not_before", o.NotBefore, func(t time.Time) {
			if t.After(req.At) {
				req.At = t
			}
		}},
		{"at", o.At, func(t time.Time) { req.At = t }},
	} {
		if t.text == "" {
			continue
		}
		v, err := time.Parse(time.RFC3339, t.text)
		if err != nil {
			return fault.New("options_malformed", "option %s: %.40q is no time", t.name, t.text).WithFix("write it as 2026-01-31T12:00:00Z")
		}
		t.use(v.UTC())
	}
	return nil
}

func (o *Options) policy(req *verifier.Request) error {
	switch text := bytes.TrimSpace(o.Policy); {
	case len(text) == 0:
		req.Policy = verifier.DefaultPolicy()
	case string(text) == "signature-only":
		req.Policy = verifier.SignaturePolicy()
	case text[0] != '{':
		return fault.New("policy_malformed", "the policy is not JSON").WithFix("give the policy in JSON; only `dstack verify` reads TOML")
	default:
		p, err := verifier.ParsePolicy(text)
		if err != nil {
			return err
		}
		req.Policy = *p
	}
	return nil
}

func (o *Options) freshness(req *verifier.Request) error {
	var err error
	if o.Nonce != "" {
		if req.Freshness.Nonce, err = hex.DecodeString(o.Nonce); err != nil || len(req.Freshness.Nonce) < 16 || len(req.Freshness.Nonce) > 64 {
			return fault.New("options_malformed", "option nonce is not 32 to 128 hexadecimal digits")
		}
	}
	if o.ReportData != "" {
		if req.Freshness.ReportData, err = hex.DecodeString(o.ReportData); err != nil || len(req.Freshness.ReportData) > dstack.ReportDataSize {
			return fault.New("options_malformed", "option report_data is not up to 128 hexadecimal digits")
		}
	}
	if o.Asked {
		if o.Nonce == "" {
			return fault.New("options_malformed", "option asked needs the nonce that was sent")
		}
		req.Policy.Evidence.RequireFresh = true
	}
	return nil
}

func (o *Options) reference(req *verifier.Request) error {
	ref := &req.Reference
	if len(o.Lock) > 0 {
		l, err := lock.Parse(o.Lock)
		if err != nil {
			return err
		}
		ref.AddLock(l, "the lock file")
	}
	if o.ComposeHash != "" {
		h, err := dstack.ParseComposeHash(o.ComposeHash)
		if err != nil {
			return bad(err, "compose_hash")
		}
		ref.AddComposeHash(h, "the expected compose hash")
	}
	if o.Manifest != nil {
		ref.AddManifest([]byte(*o.Manifest), "the expected manifest")
	}
	if o.AppID != "" {
		id, err := dstack.ParseAppID(o.AppID)
		if err != nil {
			return bad(err, "app_id")
		}
		ref.AddAppID(id, "the expected app id")
	}
	if o.InstanceID != "" {
		id, err := dstack.ParseInstanceID(o.InstanceID)
		if err != nil {
			return bad(err, "instance_id")
		}
		ref.AddInstanceID(id, "the expected instance id")
	}
	if o.OSImageHash != "" {
		h, err := dstack.ParseImageHash(o.OSImageHash)
		if err != nil {
			return bad(err, "os_image_hash")
		}
		ref.AddImageHash(h, "the expected OS image hash")
	}
	return nil
}

// roots adds those that the caller vouches for. Collateral that comes with
// development roots is the caller's as well.
func (o *Options) roots(req *verifier.Request) error {
	for _, name := range slices.Sorted(maps.Keys(o.TrustAnchors)) {
		_, keys, err := collateral.FromFiles(map[string][]byte{name: []byte(o.TrustAnchors[name])})
		if err != nil {
			return err
		}
		if len(keys) == 0 {
			return fault.New("trust_anchor", "%.80q holds no public key", name).WithFix("give a PEM PUBLIC KEY or a JWK")
		}
		req.Roots = append(req.Roots, verifier.CallerKeys(keys))
	}
	if len(o.DevRoots) == 0 {
		return nil
	}
	dev, err := collateral.ParseDevRoots(o.DevRoots)
	if err != nil {
		return err
	}
	roots, err := verifier.DevelopmentRoots(dev)
	if err != nil {
		return err
	}
	req.Roots, req.Policy.DevRoots, req.Collateral = append(req.Roots, roots...), true, dev.Bundle()
	return nil
}

func (o *Options) collateral(req *verifier.Request) error {
	files := map[string][]byte{}
	for name, data := range o.CollateralFiles {
		files[name] = data
	}
	if len(o.Collateral) > 0 {
		files["bundle"] = o.Collateral
	}
	if len(files) == 0 {
		return nil
	}
	bundle, keys, err := collateral.FromFiles(files)
	if err != nil {
		return err
	}
	if req.Collateral == nil {
		req.Collateral = new(collateral.Bundle)
	}
	req.Collateral.Add(bundle)
	if len(keys) > 0 {
		req.Roots = append(req.Roots, verifier.CallerKeys(keys))
	}
	return nil
}
