// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/tunnel"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// The manifest asks for gateways and says by what they are known; the host says where they
// are. Without the one or the other there is no tunnel, and an app without a gateway has
// nothing of it.
func TestGatewaysAreTheManifestsWish(t *testing.T) {
	policy := &manifest.PeerPolicy{AppID: dstack.AppID{1}, ComposeHashes: []dstack.ComposeHash{{1}}, OSImageHashes: []dstack.ImageHash{{1}}}
	var many []string
	for i := range 40 {
		many = append(many, fmt.Sprintf("https://g%d.example", i))
	}
	for name, c := range map[string]struct {
		draft manifest.Draft
		urls  []string
		want  int
		says  string
	}{
		"no gateway":      {manifest.Draft{}, many, 0, ""},
		"nobody's policy": {manifest.Draft{GatewayEnabled: true}, many, 0, "no gateway_policy"},
		"no address":      {manifest.Draft{GatewayEnabled: true, GatewayPolicy: policy}, nil, 0, "the host names none"},
		"one":             {manifest.Draft{GatewayEnabled: true, GatewayPolicy: policy}, many[:1], 1, ""},
		"very many":       {manifest.Draft{GatewayEnabled: true, GatewayPolicy: policy}, many, initrpc.MaxPeers, ""},
	} {
		var said bytes.Buffer
		m := &Machine{console: &console{w: &said}, manifest: parsed(t, c.draft), sysConfig: &hostshare.SysConfig{GatewayURLs: c.urls}}
		if got := m.gateways(); len(got) != c.want {
			t.Errorf("%s: %d gateways, want %d", name, len(got), c.want)
		}
		if c.says == "" && said.Len() > 0 || !strings.Contains(said.String(), c.says) {
			t.Errorf("%s: the console says %q, want %q", name, said.String(), c.says)
		}
	}
}

func TestThreat_K05_IngressIsTheManifestsAndTheTunnels(t *testing.T) {
	m := &Machine{manifest: parsed(t, manifest.Draft{PortPolicy: &manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 80}, {Port: 443}}}})}
	change := initrpc.TunnelChange{Set: true, Peers: []initrpc.TunnelPeer{{Key: make([]byte, 32), Address: netip.MustParseAddr("100.96.0.1"), Endpoint: netip.MustParseAddrPort("192.0.2.1:51820")}}}
	if p := m.ingressPolicy(&change); p.AnyPort || !slices.Equal(p.Ports, []uint16{80, 443}) || p.Tunnel != nil {
		t.Errorf("without a tunnel: %+v", p)
	}
	if _, err := (rpcInit{m}).Tunnel(t.Context(), change); fault.Code(err) != "tunnel_absent" {
		t.Errorf("a change of no tunnel: %v", err)
	}
	m.tunnel = new(tunnel.Tunnel)
	p := m.ingressPolicy(&change)
	if p.AnyPort || p.Tunnel == nil || p.Tunnel.Interface != tunnel.Name || p.Tunnel.TLSPort != manifest.TLSPort ||
		!slices.Equal(p.Tunnel.Gateways, []netip.Addr{change.Peers[0].Address}) || !slices.Equal(p.Tunnel.Endpoints, []netip.AddrPort{change.Peers[0].Endpoint}) {
		t.Errorf("%+v", p.Tunnel)
	}
	if p := m.ingressPolicy(&initrpc.TunnelChange{}); len(p.Tunnel.Gateways) != 0 {
		t.Error("a gateway before there is one")
	}
}
