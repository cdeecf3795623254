// SPDX-License-Identifier: Apache-2.0

// Package gpu appraises what a guest recorded of its NVIDIA GPUs before it got any
// key: the output of NVIDIA's verifier, and the event that commits to it.
//
// [Appraise] establishes that the exact output is the one whose hash stands in the
// guest's measured log, and that what it says of every GPU is acceptable to a policy;
// the zero policy accepts nothing. The output and the event's text are
// attacker-controlled; the caller vouches that the event is of a log that a TEE's
// register confirms, before system-ready, and there once.
//
// What this does not do: nvattest, run locally, prints verdicts and neither the GPU's
// signed report nor its certificates, and signs nothing (its detached EAT has
// algorithm "none"). So the GPU's certificate chain is not verified here. That the
// verdicts are true rests on the measured guest having run nvattest as it says, that
// is, on the CPU's TEE; [Claims].Assumptions says so. Nor does anything show that the
// GPU sits in the same machine, or is still the same after boot (threats.md A10).
// Where nothing but a policy hash is bound, as on SEV-SNP, there is no event to
// appraise.
//
// Specification: attestation.md §3.5 and §11, guest-os.md §10.
package gpu

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits (threats.md B15).
const (
	MaxEvidence = 1 << 20 // bytes of nvattest's output
	MaxEvent    = 4 << 10 // bytes of the event's payload
	MaxDevices  = 64
	maxText     = 256 // bytes of one textual claim
)

// NonceSize is the length of a nonce in bytes.
const NonceSize = 32

// Evidence is nvattest's output in JSON, as far as it is looked at; unverified.
type Evidence struct {
	ResultCode    int64 // 0: nvattest's own policy is satisfied
	ResultMessage string
	Devices       []Device
	SHA256        [sha256.Size]byte // of the exact bytes
}

// Device is what nvattest says of one device.
type Device struct {
	Type          string // x-nvidia-device-type: gpu
	Nonce         [NonceSize]byte
	NonceMatch    bool   // the GPU signed that nonce
	Signed        bool   // the GPU's signature over its report holds
	Measurements  string // measres: success, fail, …
	SecureBoot    bool   // secboot
	Debug         string // dbgstat: disabled or enabled
	UEID          string // the GPU's identity, a decimal number
	Model         string // hwmodel
	DriverVersion string
	VBIOSVersion  string

	// Failed names the further verdicts (x-nvidia-gpu-…) that are not true, and
	// BadChain the certificate chains that are not valid and good; sorted.
	Failed   []string
	BadChain []string
	// Mismatches says that there are measurements without a reference value.
	Mismatches bool
}

// Parse reads nvattest's output, at most 1 MiB. It judges nothing. Codes:
// gpu_evidence_malformed; gpu_claim_missing for a device without one of the claims
// that an appraisal needs, or with null in its place.
func Parse(evidence []byte) (*Evidence, error) {
	var out struct {
		Code    *int64                       `json:"result_code"`
		Message string                       `json:"result_message"`
		Claims  []map[string]json.RawMessage `json:"claims"`
	}
	if err := strictjson.Decode(evidence, &out, strictjson.Limits{Size: MaxEvidence, Depth: 8, Unknown: true}); err != nil {
		return nil, fault.Wrap(err, "gpu_evidence_malformed", "GPU evidence")
	}
	if out.Code == nil {
		return nil, fault.New("gpu_evidence_malformed", "GPU evidence has no result_code")
	}
	if len(out.Claims) > MaxDevices {
		return nil, fault.New("gpu_evidence_malformed", "GPU evidence is of %d devices, more than %d", len(out.Claims), MaxDevices)
	}
	e := &Evidence{ResultCode: *out.Code, ResultMessage: clip(out.Message), SHA256: sha256.Sum256(evidence)}
	for i, claims := range out.Claims {
		d, err := parseDevice(claims)
		if err != nil {
			return nil, fault.Wrap(err, fault.Code(err), "GPU evidence, device %d", i)
		}
		e.Devices = append(e.Devices, *d)
	}
	return e, nil
}

// verdictPrefix begins the names of nvattest's verdicts on a GPU.
const verdictPrefix = "x-nvidia-gpu-"

func parseDevice(claims map[string]json.RawMessage) (*Device, error) {
	d := &Device{}
	var nonce string
	for _, f := range []struct {
		name string
		to   any
	}{
		{"x-nvidia-device-type", &d.Type},
		{"eat_nonce", &nonce},
		{"x-nvidia-gpu-attestation-report-nonce-match", &d.NonceMatch},
		{"x-nvidia-gpu-attestation-report-signature-verified", &d.Signed},
		{"measres", &d.Measurements},
		{"secboot", &d.SecureBoot},
		{"dbgstat", &d.Debug},
		{"ueid", &d.UEID},
		{"hwmodel", &d.Model},
		{"x-nvidia-gpu-driver-version", &d.DriverVersion},
		{"x-nvidia-gpu-vbios-version", &d.VBIOSVersion},
	} {
		raw, ok := claims[f.name]
		if !ok || isNull(raw) {
			return nil, fault.New("gpu_claim_missing", "there is no claim %s", f.name)
		}
		if err := json.Unmarshal(raw, f.to); err != nil {
			return nil, fault.Wrap(err, "gpu_evidence_malformed", "claim %s", f.name)
		}
		if s, ok := f.to.(*string); ok && len(*s) > maxText {
			return nil, fault.New("gpu_evidence_malformed", "claim %s has %d bytes, more than %d", f.name, len(*s), maxText)
		}
	}
	if n, err := hex.DecodeString(nonce); err != nil || len(n) != NonceSize {
		return nil, fault.New("gpu_evidence_malformed", "claim eat_nonce is not %d bytes in hexadecimal", NonceSize)
	} else {
		d.Nonce = [NonceSize]byte(n)
	}
	for name, raw := range claims {
		switch raw := bytes.TrimSpace(raw); {
		case name == "x-nvidia-mismatch-measurement-records":
			d.Mismatches = !isNull(raw) && string(raw) != "[]"
		case !strings.HasPrefix(name, verdictPrefix):
		case strings.HasSuffix(name, "-cert-chain"):
			if !goodChain(raw) {
				d.BadChain = append(d.BadChain, clip(name))
			}
		case isNull(raw) || string(raw) == "false":
			// Nonce and signature have their own fields.
			if name != "x-nvidia-gpu-attestation-report-nonce-match" && name != "x-nvidia-gpu-attestation-report-signature-verified" {
				d.Failed = append(d.Failed, clip(name))
			}
		}
	}
	slices.Sort(d.Failed)
	slices.Sort(d.BadChain)
	return d, nil
}

// goodChain reads nvattest's verdict on a chain. Whether the responder's nonce
// matched is left out: cached OCSP answers cannot match it (attestation.md §11).
func goodChain(raw json.RawMessage) bool {
	var c struct {
		Status string `json:"x-nvidia-cert-status"`
		OCSP   string `json:"x-nvidia-cert-ocsp-status"`
	}
	return json.Unmarshal(raw, &c) == nil && c.Status == "valid" && c.OCSP == "good"
}

func isNull(raw json.RawMessage) bool { return string(bytes.TrimSpace(raw)) == "null" }

func clip(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxText)], "") }

// Event is the payload of the runtime event gpu-attestation.
type Event struct {
	Version  int    // 1, 2 or 3
	Devices  int    // NVIDIA GPUs that the guest counted
	CCMode   string // on
	DevTools bool   // some GPU can be looked into
	// Debug and SecureBoot sum up the devices' dbgstat and secboot: version 3, nil
	// otherwise.
	Debug      *string
	SecureBoot *bool
	Evidence   [sha256.Size]byte // SHA-256 of nvattest's exact output
}

// ParseEvent reads the payload of a gpu-attestation event, at most 4 KiB of JSON
// without unknown members. Codes: gpu_event_malformed; gpu_event_version;
// gpu_provider for a verifier that is not NVIDIA's.
func ParseEvent(payload []byte) (*Event, error) {
	var w struct {
		Version    *int    `json:"version"`
		Provider   *string `json:"provider"`
		Devices    *int    `json:"devices"`
		CCMode     *string `json:"cc_mode"`
		DevTools   *bool   `json:"devtools"`
		Debug      *string `json:"dbgstat"`
		SecureBoot *bool   `json:"secboot"`
		Evidence   *string `json:"evidence_sha256"`
	}
	if err := strictjson.Decode(payload, &w, strictjson.Limits{Size: MaxEvent, Depth: 2}); err != nil {
		return nil, fault.Wrap(err, "gpu_event_malformed", "gpu-attestation event")
	}
	if w.Version == nil || w.Provider == nil || w.Devices == nil || w.CCMode == nil || w.DevTools == nil || w.Evidence == nil {
		return nil, fault.New("gpu_event_malformed", "gpu-attestation event lacks one of version, provider, devices, cc_mode, devtools, evidence_sha256")
	}
	switch {
	case *w.Version < 1 || *w.Version > 3:
		return nil, fault.New("gpu_event_version", "gpu-attestation event is of version %d, want 1 to 3", *w.Version)
	case *w.Provider != "nvidia":
		return nil, fault.New("gpu_provider", "gpu-attestation event is by %.32q, want nvidia", *w.Provider)
	case (w.Debug != nil) != (*w.Version == 3) || (w.SecureBoot != nil) != (*w.Version == 3):
		return nil, fault.New("gpu_event_malformed", "dbgstat and secboot belong to version 3 of the gpu-attestation event, and only to it")
	}
	hash, err := hex.DecodeString(*w.Evidence)
	if err != nil || len(hash) != sha256.Size {
		return nil, fault.New("gpu_event_malformed", "evidence_sha256 of the gpu-attestation event is not %d bytes in hexadecimal", sha256.Size)
	}
	return &Event{
		Version: *w.Version, Devices: *w.Devices, CCMode: *w.CCMode, DevTools: *w.DevTools,
		Debug: w.Debug, SecureBoot: w.SecureBoot, Evidence: [sha256.Size]byte(hash),
	}, nil
}
