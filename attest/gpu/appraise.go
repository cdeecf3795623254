// SPDX-License-Identifier: Apache-2.0

package gpu

import (
	"crypto/sha256"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// Policy says which GPUs are acceptable. The zero value accepts none.
type Policy struct {
	// Devices is the number of GPUs that there must be, no more and no fewer.
	Devices int
	// UEIDs are the identities of GPUs that may be among them; nil leaves it open.
	UEIDs []string
	// Nonce is the one that the GPUs must have signed, 32 bytes, when the relying
	// party chose it.
	Nonce []byte
	// BootNonce accepts a nonce that the guest chose by itself at boot, when Nonce is
	// nil. The event then says when: in this boot, at its place in the log.
	BootNonce bool

	AllowDevTools     bool // GPUs that can be looked into: not for secrets
	AllowDebug        bool // dbgstat other than disabled
	AllowInsecureBoot bool // secboot false
}

// Claims is what an appraisal established.
type Claims struct {
	Devices  []Device
	Nonce    [NonceSize]byte
	DevTools bool
	Evidence [sha256.Size]byte // SHA-256 of nvattest's output, as the log has it
	// Assumptions are what the claims rest on without proof, in words.
	Assumptions []string
}

// assumptions of every appraisal; see the package comment.
func assumptions() []string {
	return []string{
		"the measured guest ran NVIDIA's verifier and recorded what it said: its output is not signed, and the GPU's report and certificate chain are not verified here",
		"the GPU is in the machine that the CPU's evidence is of, and is still the one that was attested at boot",
	}
}

// Appraise checks nvattest's exact output against the payload of the measured
// gpu-attestation event and a policy. Beside the codes of [Parse] and [ParseEvent]
// (threats.md A10):
//
//	gpu_policy_empty         the policy expects no GPU
//	gpu_nonce_unspecified    the policy has no nonce and does not accept the guest's
//	gpu_nonce_length         the policy's nonce has not 32 bytes
//	gpu_cc_mode              the GPUs are not in confidential computing mode
//	gpu_devtools             a GPU is in DevTools mode
//	gpu_evidence_hash        the output is not the one that the log commits to
//	gpu_devices              event, output and policy differ in the number of GPUs
//	gpu_result               nvattest's own policy was not satisfied
//	gpu_device_type          a device that is no GPU
//	gpu_duplicate_device     one GPU counted twice
//	gpu_unknown_device       a GPU that the policy does not name
//	gpu_nonce_stale          not the nonce of the policy
//	gpu_nonce_mixed          GPUs attested at different times
//	gpu_nonce_mismatch       the GPU did not sign the nonce
//	gpu_report_signature     the GPU's report is not signed by it
//	gpu_measurements         measurements that differ from NVIDIA's reference values
//	gpu_certificate          a certificate chain that is not valid and not revoked
//	gpu_verdict              another verdict of nvattest that is not true
//	gpu_secboot              a GPU that did not boot securely
//	gpu_debug                a GPU that can be debugged
//	gpu_event_contradiction  the event's summary is not that of the output
func Appraise(evidence, event []byte, policy Policy) (*Claims, error) {
	switch {
	case policy.Devices <= 0:
		return nil, fault.New("gpu_policy_empty", "the policy expects no GPU")
	case policy.Nonce == nil && !policy.BootNonce:
		return nil, fault.New("gpu_nonce_unspecified", "the policy names no nonce and does not accept the guest's own")
	case policy.Nonce != nil && len(policy.Nonce) != NonceSize:
		return nil, fault.New("gpu_nonce_length", "the policy's nonce has %d bytes, want %d", len(policy.Nonce), NonceSize)
	}
	ev, err := ParseEvent(event)
	if err != nil {
		return nil, err
	}
	if err := policy.checkEvent(ev); err != nil {
		return nil, err
	}
	if got := sha256.Sum256(evidence); got != ev.Evidence {
		return nil, fault.New("gpu_evidence_hash", "GPU evidence has SHA-256 %x, the log commits to %x", got, ev.Evidence)
	}
	out, err := Parse(evidence)
	if err != nil {
		return nil, err
	}
	if out.ResultCode != 0 {
		return nil, fault.New("gpu_result", "nvattest refused the GPUs with code %d: %q", out.ResultCode, out.ResultMessage)
	}
	if len(out.Devices) != ev.Devices {
		return nil, fault.New("gpu_devices", "nvattest speaks of %d GPUs, the guest has %d", len(out.Devices), ev.Devices)
	}
	for i, d := range out.Devices {
		if err := policy.checkDevice(d); err != nil {
			return nil, fault.Wrap(err, fault.Code(err), "GPU %d", i)
		}
		if d.Nonce != out.Devices[0].Nonce {
			return nil, fault.New("gpu_nonce_mixed", "GPU %d signed another nonce than GPU 0", i)
		}
		if j := slices.IndexFunc(out.Devices[:i], func(other Device) bool { return other.UEID == d.UEID }); j >= 0 {
			return nil, fault.New("gpu_duplicate_device", "GPUs %d and %d are one device, %s", j, i, d.UEID)
		}
	}
	if err := ev.checkSummary(out.Devices); err != nil {
		return nil, err
	}
	return &Claims{
		Devices: out.Devices, Nonce: out.Devices[0].Nonce, DevTools: ev.DevTools, Evidence: ev.Evidence,
		Assumptions: assumptions(),
	}, nil
}

// checkEvent judges what only the guest can know: counts and modes.
func (p Policy) checkEvent(e *Event) error {
	switch {
	case e.Devices != p.Devices:
		return fault.New("gpu_devices", "the guest has %d GPUs, want %d", e.Devices, p.Devices)
	case e.CCMode != "on":
		return fault.New("gpu_cc_mode", "confidential computing mode of the GPUs is %.32q, want on", e.CCMode)
	case e.DevTools && !p.AllowDevTools:
		return fault.New("gpu_devtools", "a GPU is in DevTools mode: it can be looked into")
	}
	return nil
}

func (p Policy) checkDevice(d Device) error {
	switch {
	case d.Type != "gpu":
		return fault.New("gpu_device_type", "the device is a %q, want a gpu", d.Type)
	case p.UEIDs != nil && !slices.Contains(p.UEIDs, d.UEID):
		return fault.New("gpu_unknown_device", "%q is none of the %d GPUs that the policy names", d.UEID, len(p.UEIDs))
	case p.Nonce != nil && d.Nonce != [NonceSize]byte(p.Nonce):
		return fault.New("gpu_nonce_stale", "the evidence is for the nonce %x, not for %x", d.Nonce, p.Nonce)
	case !d.NonceMatch:
		return fault.New("gpu_nonce_mismatch", "the GPU's report is not for the nonce")
	case !d.Signed:
		return fault.New("gpu_report_signature", "the signature of the GPU's report does not hold")
	case d.Measurements != "success":
		return fault.New("gpu_measurements", "the result of the measurements is %q, want success", d.Measurements)
	case d.Mismatches:
		return fault.New("gpu_measurements", "there are measurements that differ from the reference values")
	case len(d.BadChain) > 0:
		return fault.New("gpu_certificate", "not valid and good: %s", strings.Join(d.BadChain, ", "))
	case len(d.Failed) > 0:
		return fault.New("gpu_verdict", "not true: %s", strings.Join(d.Failed, ", "))
	case !d.SecureBoot && !p.AllowInsecureBoot:
		return fault.New("gpu_secboot", "the GPU did not boot securely")
	case d.Debug != "disabled" && !p.AllowDebug:
		return fault.New("gpu_debug", "the GPU's debug state is %q, want disabled", d.Debug)
	}
	return nil
}

// checkSummary compares version 3's summary with the devices: debug is enabled when
// it is so on any, and boot secure when it is so on all.
func (e *Event) checkSummary(devices []Device) error {
	if e.Version != 3 {
		return nil
	}
	debug := "disabled"
	if slices.ContainsFunc(devices, func(d Device) bool { return d.Debug != "disabled" }) {
		debug = "enabled"
	}
	secure := !slices.ContainsFunc(devices, func(d Device) bool { return !d.SecureBoot })
	if *e.Debug != debug || *e.SecureBoot != secure {
		return fault.New("gpu_event_contradiction", "the event says dbgstat %.32q and secboot %v, the evidence %q and %v", *e.Debug, *e.SecureBoot, debug, secure)
	}
	return nil
}
