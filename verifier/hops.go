// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"fmt"
	"slices"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/collateral"
)

// hops appraises the gateway at which TLS ends, after the app, whose manifest may say
// which gateway that must be (threats.md C05).
//
// The gateway's evidence commits to the caller's nonce and to the key of the caller's own
// connection; the app's to the same nonce, and to a key of the app's init, with which the
// gateway shook hands. That what is said goes to that very app is the gateway's doing, and
// so it is for what the gateway measured to be known.
func (a *appraisal) hops(req *Request) {
	g := a.gateway
	g.pol = req.Policy.ofGateway()
	ref := req.Gateway
	ref.addPolicy(g.pol.Workload)
	if a.man != nil && a.man.GatewayPolicy != nil {
		p := a.man.GatewayPolicy
		app := p.AppID
		ref.added = append(slices.Clone(ref.added), expectation{
			origin: "the app's manifest (gateway_policy)", compose: p.ComposeHashes, app: &app, images: p.OSImageHashes,
		})
		if len(g.pol.Registers) == 0 && len(p.Registers) > 0 {
			g.pol.Registers = map[string][]collateral.Hex{}
			for name, values := range p.Registers {
				for _, v := range values {
					g.pol.Registers[name] = append(g.pol.Registers[name], v)
				}
			}
		}
		if len(g.pol.Devices) == 0 {
			g.pol.Devices = p.Devices
		}
	}
	g.ref = &ref
	col := req.GatewayCollateral
	if col == nil {
		col = req.Collateral
	}
	g.run(req.Roots, col)
	g.conclude()
	for _, f := range g.v.Findings {
		f.Hop = HopGateway
		a.v.Findings = append(a.v.Findings, f)
	}
	if weakness[g.v.Trust] > weakness[a.v.Trust] {
		a.v.Trust = g.v.Trust
	}
	if g.v.Scope == ScopeWorkload {
		a.plaintext()
		if g.v.Channel == ChannelTLS {
			a.v.Channel = ChannelGateway
		}
	}
	a.v.Hops = []Hop{g.hop(HopGateway), a.hop(HopApp)}
}

// weakness orders trust: a verdict's is that of its weakest hop.
var weakness = map[dstack.Trust]int{dstack.TrustProduction: 0, dstack.TrustCaller: 1, dstack.TrustDevelopment: 2}

// plaintext says who sees what is said, and whether the caller put up with it.
func (a *appraisal) plaintext() {
	text := "plaintext is visible to a gateway of which nothing is known"
	if a.gateway.v.Accepted {
		text = "plaintext is visible to the " + a.gateway.v.whom()
	}
	if !a.pol.Gateway.AllowTermination {
		a.add(Error, "gateway_termination_denied", "policy.gateway", "use a name whose TLS ends in the app (deploy with tls: app, or ask <id>-<port>s), or accept it with --allow-gateway-termination", "TLS ends at a gateway: %s", text)
		return
	}
	a.add(Warning, "gateway_terminates", "source.gateway", "", "TLS ends at a gateway: %s", text)
}

// whom names the gateway of a verdict on it.
func (v *Verdict) whom() string {
	w := v.Workload
	if w == nil {
		return "gateway"
	}
	name := ""
	if w.Name != "" {
		name = fmt.Sprintf(" %.64q", w.Name)
	}
	text := fmt.Sprintf("gateway%s (app id %s), measured as compose hash %s", name, w.AppID, w.ComposeHash)
	if w.OSImageHash != "" {
		text += " on OS image " + w.OSImageHash
	}
	return text
}

func (a *appraisal) hop(role string) Hop {
	v := a.v
	h := Hop{
		Role: role, Trust: v.Trust, TEE: v.TEE, TCBStatus: v.TCBStatus, Workload: v.Workload,
		Anchors: v.Anchors, SelfConsistent: v.SelfConsistent, Accepted: v.Accepted,
	}
	if role == HopApp { // not concluded yet, and then for both
		h.Accepted = !slices.ContainsFunc(v.Findings, func(f Finding) bool { return f.Level == Error && f.Hop == "" && f.Code != "gateway_termination_denied" })
		if a.claims != nil {
			h.Trust = a.claims.Trust
		}
	}
	return h
}

// ofGateway is what a policy says of a gateway.
func (p Policy) ofGateway() Policy {
	p.Workload, p.Registers, p.Devices, p.Floor = p.Gateway.Workload, p.Gateway.Registers, p.Gateway.Devices, p.Gateway.Floor
	p.GPU = GPUPolicy{}
	return p
}
