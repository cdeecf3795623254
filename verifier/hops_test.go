// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/manifest"
)

// hop is a gateway at which TLS ends, before a guest. Its key is its app's: its init
// committed to another.
type hop struct {
	*guest
	served []byte
}

func newHop(g *guest) *hop {
	g.t.Helper()
	h := &hop{guest: newGuest(g.t), served: []byte("the subject public key info of the gateway's certificate")}
	var err error
	h.manifest, err = manifest.Build(manifest.Draft{
		Name: "gateway", DockerComposeFile: "services:\n  gateway:\n    image: gateway:1\n", KeyProvider: "none",
		ImagePolicy: manifest.ImagePolicyDigest, ImageLock: map[string]string{"gateway:1": "sha256:" + hex.EncodeToString(bytes.Repeat([]byte{0xcd}, 32))},
	})
	g.check(err)
	hash := h.composeHash()
	h.app, h.instance, h.platform, h.nonce = dstack.AppID(hash[:20]), bytes.Repeat([]byte{0x9a}, 20), g.platform, g.nonce
	h.document.ComposeHash = hash
	h.edit.envelope = func() dstack.ReportData { return binding.Envelope(h.nonce, h.served, h.app, h.instance) }
	h.edit.source = func(s *Source) { s.ServedSPKIs = [][]byte{h.served} }
	return h
}

// behind is what a caller has who asked the guest through the gateway.
func (h *hop) behind(g *guest) (*request, func() Source) {
	r := g.request()
	r.fresh.ConnectionSPKI = bytes.Clone(h.served)
	r.pol.Gateway.AllowTermination = true
	r.gateway.AddComposeHash(h.composeHash(), "--gateway-compose-hash")
	r.gateway.AddAppID(h.app, "--gateway-app-id")
	r.gateway.AddImage(h.image, h.expected(), "--gateway-image")
	return r, func() Source {
		src, own := g.evidence(), h.evidence()
		src.Gateway = &own
		return src
	}
}

func TestThreat_C05_BothHopsAreInTheVerdict(t *testing.T) {
	g := newGuest(t)
	h := newHop(g)
	r, ask := h.behind(g)
	v := r.appraise(ask())
	if !v.Accepted || v.Channel != ChannelGateway || v.Freshness != FreshNonce || !v.Has(Warning, "gateway_terminates") || v.Has(Warning, "channel_unbound") {
		t.Fatal(show(v))
	}
	if len(v.Hops) != 2 || v.Hops[0].Role != HopGateway || v.Hops[1].Role != HopApp || !v.Hops[0].Accepted || !v.Hops[1].Accepted ||
		v.Hops[0].Workload.ComposeHash != h.composeHash() || v.Hops[1].Workload.ComposeHash != g.composeHash() || v.Workload.ComposeHash != g.composeHash() {
		t.Errorf("hops: %+v", v.Hops)
	}
	says := "plaintext is visible to the gateway \"gateway\" (app id " + h.app.String() + "), measured as compose hash " + h.composeHash().String()
	if text := v.String(); !strings.Contains(text, says) || !strings.Contains(text, "  1 gateway  accepted") || !strings.Contains(text, "  2 app      accepted") {
		t.Error(text)
	}
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"hops":[{"role":"gateway","accepted":true`, `{"role":"app","accepted":true`, `"hop":"gateway"`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the verdict's JSON has no %s", want)
		}
	}
	// As it is saved and read again, it is the same, but for the connection.
	wire, err := json.Marshal(ask())
	if err != nil {
		t.Fatal(err)
	}
	back, err := ReadEvidence(wire, "")
	if err != nil {
		t.Fatal(err)
	}
	r.fresh = Freshness{}
	if v := r.appraise(*back); !v.Accepted || v.Channel != ChannelNone || !v.Has(Warning, "channel_unbound") || len(v.Hops) != 2 {
		t.Error(show(v))
	}
}

func TestThreat_C05_TerminationIsRefused(t *testing.T) {
	other := bytes.Repeat([]byte{8}, 32)
	for _, c := range []struct {
		name, code, hop string
		change          func(*guest, *hop, *request, *Source)
		only            bool // of the errors, it is the only one
	}{
		{"a policy that says nothing of it", "gateway_termination_denied", "", func(_ *guest, _ *hop, r *request, _ *Source) { r.pol.Gateway = GatewayPolicy{} }, true},
		{"a gateway that nobody named", "gateway_not_specified", HopGateway, func(_ *guest, h *hop, r *request, _ *Source) {
			r.gateway = Reference{}
			r.gateway.AddImage(h.image, h.expected(), "--gateway-image")
		}, true},
		{"a gateway named by its app id alone", "gateway_not_specified", HopGateway, func(_ *guest, h *hop, r *request, _ *Source) {
			r.gateway = Reference{AppID: &h.app}
			r.gateway.AddImage(h.image, h.expected(), "--gateway-image")
		}, true},
		{"another gateway", "compose_hash_mismatch", HopGateway, func(g *guest, _ *hop, r *request, _ *Source) {
			r.gateway.AddComposeHash(g.composeHash(), "--gateway-compose-hash")
		}, true},
		{"a gateway on another image", "image_unanchored", HopGateway, func(_ *guest, h *hop, r *request, _ *Source) {
			r.gateway = Reference{}
			r.gateway.AddComposeHash(h.composeHash(), "--gateway-compose-hash")
		}, false},
		{"no evidence of the gateway", "gateway_evidence_missing", "", func(_ *guest, _ *hop, _ *request, s *Source) { s.Gateway = nil }, true},
		{"no evidence of the gateway, which was not expected either", "spki_mismatch", "", func(_ *guest, _ *hop, r *request, s *Source) {
			s.Gateway, r.pol.Gateway = nil, GatewayPolicy{}
		}, true},
		{"evidence of another connection's key", "spki_mismatch", HopGateway, func(_ *guest, _ *hop, r *request, _ *Source) {
			r.fresh.ConnectionSPKI = []byte("the key of someone in between")
		}, true},
		{"evidence that only lists the connection's key", "spki_mismatch", HopGateway, func(_ *guest, _ *hop, r *request, s *Source) {
			r.fresh.ConnectionSPKI = []byte("the key of someone in between")
			s.Gateway.ServedSPKIs = append(s.Gateway.ServedSPKIs, r.fresh.ConnectionSPKI)
		}, true},
		{"a stale answer of the gateway", "nonce_mismatch", HopGateway, func(g *guest, h *hop, _ *request, s *Source) {
			h.nonce = other
			old := h.evidence()
			s.Gateway = &old
		}, true},
		{"a stale answer of the gateway that echoes the nonce", "report_data_mismatch", HopGateway, func(g *guest, h *hop, _ *request, s *Source) {
			h.nonce = other
			old := h.evidence()
			old.Nonce = g.nonce
			s.Gateway = &old
		}, true},
		{"an answer of the app to another nonce", "nonce_mismatch", "", func(g *guest, h *hop, _ *request, s *Source) {
			g.nonce = other
			old := g.evidence()
			old.Gateway = s.Gateway
			*s = old
		}, true},
		{"an answer of the app over plain HTTP", "gateway_unbound", "", func(g *guest, _ *hop, _ *request, s *Source) {
			g.edit.envelope = func() dstack.ReportData { return binding.Envelope(g.nonce, nil, g.app, g.instance) }
			plain := g.evidence()
			plain.Gateway = s.Gateway
			*s = plain
		}, true},
		{"an answer that a container made", "channel_key_mismatch", "", func(g *guest, _ *hop, _ *request, s *Source) {
			own := []byte("a container's own key")
			g.edit.envelope = func() dstack.ReportData { return binding.Envelope(g.nonce, own, g.app, g.instance) }
			forged := g.evidence()
			forged.ServedSPKIs, forged.Gateway = [][]byte{own}, s.Gateway
			*s = forged
		}, true},
		{"another app behind the gateway", "compose_hash_mismatch", "", func(_ *guest, _ *hop, r *request, _ *Source) {
			r.ref.AddComposeHash(dstack.ComposeHash{1}, "--compose-hash")
		}, true},
		{"a gateway behind a gateway", "evidence_malformed", "", func(_ *guest, _ *hop, _ *request, s *Source) {
			again := *s.Gateway
			s.Gateway.Gateway = &again
		}, false},
		{"a machine that the policy does not accept", "device_not_allowed", HopGateway, func(_ *guest, _ *hop, r *request, _ *Source) {
			r.pol.Gateway.Devices = []dstack.DeviceID{{1}}
		}, true},
		{"launch registers that the policy does not accept", "register_mismatch", HopGateway, func(_ *guest, _ *hop, r *request, _ *Source) {
			r.pol.Gateway.Registers = map[string][]collateral.Hex{"mrtd": {bytes.Repeat([]byte{1}, 48)}}
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuest(t)
			h := newHop(g)
			r, ask := h.behind(g)
			src := ask()
			c.change(g, h, r, &src)
			v := r.appraise(src)
			if v.Accepted || !slices.ContainsFunc(v.Findings, func(f Finding) bool { return f.Level == Error && f.Code == c.code && f.Hop == c.hop }) {
				t.Error(show(v))
			}
			if c.only && len(v.errors()) != 1 {
				t.Errorf("%d errors: %s", len(v.errors()), show(v))
			}
		})
	}
}

func TestZeroPolicyDeniesTermination(t *testing.T) {
	g := newGuest(t)
	r, ask := newHop(g).behind(g)
	r.pol = Policy{}
	if v := r.appraise(ask()); v.Accepted || !v.Has(Error, "gateway_termination_denied") || !v.Has(Error, "policy_zero") {
		t.Error(show(v))
	}
}

// What the app's measured manifest says of its gateway is as good as the manifest, which
// the caller expects.
func TestTheManifestNamesTheGateway(t *testing.T) {
	for name, c := range map[string]struct {
		code   string
		change func(*manifest.PeerPolicy)
	}{
		"itself":            {"", func(*manifest.PeerPolicy) {}},
		"another manifest":  {"compose_hash_mismatch", func(p *manifest.PeerPolicy) { p.ComposeHashes = []dstack.ComposeHash{{1}} }},
		"another app":       {"app_id_mismatch", func(p *manifest.PeerPolicy) { p.AppID[0]++ }},
		"other registers":   {"register_mismatch", func(p *manifest.PeerPolicy) { p.Registers["mrtd"] = [][]byte{bytes.Repeat([]byte{1}, 48)} }},
		"on other machines": {"device_not_allowed", func(p *manifest.PeerPolicy) { p.Devices = []dstack.DeviceID{{1}} }},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			h := newHop(g)
			body := h.registers()
			p := &manifest.PeerPolicy{AppID: h.app, ComposeHashes: []dstack.ComposeHash{h.composeHash()}, Registers: map[string][][]byte{"mrtd": {body.MRTD[:]}}, OSImageHashes: []dstack.ImageHash{h.image}}
			c.change(p)
			off := false
			raw, err := manifest.Build(manifest.Draft{
				Name: "hello", DockerComposeFile: "services:\n  web:\n    image: hello:1\n", KeyProvider: "none", SecureTime: &off, GatewayEnabled: true, GatewayPolicy: p,
				ImagePolicy: manifest.ImagePolicyDigest, ImageLock: map[string]string{"hello:1": "sha256:" + hex.EncodeToString(bytes.Repeat([]byte{0xab}, 32))},
			})
			g.check(err)
			g.manifest = raw
			g.app = dstack.AppID(raw[:20])
			g.document.ComposeHash = g.composeHash()
			r, ask := h.behind(g)
			r.gateway = Reference{}
			r.gateway.AddImage(h.image, h.expected(), "--gateway-image")
			v := r.appraise(ask())
			if c.code == "" && !v.Accepted || c.code != "" && (v.Accepted || !slices.ContainsFunc(v.Findings, func(f Finding) bool { return f.Level == Error && f.Code == c.code && f.Hop == HopGateway })) {
				t.Error(show(v))
			}
		})
	}
}
