// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"strings"

	"github.com/dstack-go/dstack/attest/gpu"
)

// gpus judges what the guest recorded of its NVIDIA GPUs: the output of NVIDIA's
// verifier, bound by the event in the measured log that holds its hash (A10).
func (a *appraisal) gpus() {
	p := a.pol.GPU
	event, evidence := "", a.src.GPU
	if a.id != nil {
		event = a.id.GPUAttestation
	}
	switch {
	case event == "" && p.Devices > 0:
		a.add(Error, "gpu_missing", "event_log.gpu-attestation", "", "%d GPUs are expected, and the measured log says of none", p.Devices)
		return
	case event == "" && len(evidence) > 0:
		a.add(Warning, "gpu_unbound", "gpu_evidence", "", "GPU evidence came along that nothing in the measured log commits to: it is dropped")
		return
	case event == "":
		return
	case p.Devices == 0:
		a.add(Warning, "gpu_not_judged", "event_log.gpu-attestation", "say in the policy's gpu what is accepted, and give --gpu-evidence FILE", "the guest attested GPUs at boot, which were not judged here")
		return
	case len(evidence) == 0:
		a.add(Error, "gpu_evidence_missing", "gpu_evidence", "give the guest's record with --gpu-evidence FILE", "the measured log commits to GPU evidence that did not come along")
		return
	}
	c, err := gpu.Appraise(evidence, []byte(event), gpu.Policy{
		Devices: p.Devices, UEIDs: p.UEIDs, Nonce: p.Nonce, BootNonce: p.BootNonce,
		AllowDevTools: p.AllowDevTools, AllowDebug: p.AllowDebug, AllowInsecureBoot: p.AllowInsecureBoot,
	})
	if err != nil {
		a.fail(err, "gpu_evidence", "gpu_malformed")
		return
	}
	var names []string
	for _, d := range c.Devices {
		names = append(names, d.UEID)
	}
	a.anchor("GPUs", strings.Join(names, ", "), "NVIDIA's verifier, run by the measured guest at boot")
	a.gpuAssumptions = c.Assumptions
}
