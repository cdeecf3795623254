// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto"
	"net/http"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/gwclient"
	"github.com/dstack-go/dstack/guest/peer"
	"github.com/dstack-go/dstack/guest/terminator"
	"github.com/dstack-go/dstack/manifest"
)

// newGateways returns the client of the app's gateways; nil where the manifest asks for
// none, or init made no tunnel. Codes: those of peer.Appraiser, gateway_url.
func newGateways(a *Agent, cfg *initrpc.Config) (*gwclient.Client, error) {
	p := a.manifest.GatewayPolicy
	if p == nil || len(cfg.GatewayURLs) == 0 || len(a.identity.InstanceID) != dstack.InstanceIDSize {
		return nil, nil
	}
	appraiser, intended, err := peer.Appraiser("gateway_policy", p, cfg.IsDev, cfg.PCCSURL)
	if err != nil {
		return nil, err
	}
	signer := a.cert.PrivateKey.(crypto.Signer)
	key, err := channel.KeyOf(signer)
	if err != nil {
		return nil, err
	}
	var ports []uint16
	for _, port := range a.manifest.PortPolicy.Ports {
		if port.TLS == manifest.TLSApp {
			ports = append(ports, port.Port)
		}
	}
	domains := map[string]uint16{}
	for _, d := range a.manifest.CustomDomains {
		domains[d.Domain] = d.Port
	}
	return gwclient.New(gwclient.Config{
		URLs: cfg.GatewayURLs, Appraiser: appraiser, Intended: intended, Attester: channel.AttesterFunc(a.kmsEvidence), Key: key, Signer: signer,
		App: a.identity.AppID, Instance: dstack.InstanceID(a.identity.InstanceID), AppCompose: a.manifest.Raw, Ports: ports, Domains: domains,
		Lease: func() (document, signature []byte) {
			if l := a.lease.Load(); l != nil {
				return l.Document, l.Signature
			}
			return nil, nil
		},
		Tunnel: func(ctx context.Context, c initrpc.TunnelChange) (initrpc.TunnelStatus, error) {
			return a.init.Tunnel(ctx, c)
		},
		Log: a.log,
	})
}

// terminator ends TLS of the app's ports.
func (a *Agent) terminator() *terminator.Terminator {
	proxy := map[uint16]bool{}
	for _, port := range a.manifest.PortPolicy.Ports {
		proxy[port.Port] = port.PP
	}
	return &terminator.Terminator{Certificate: a.gateways.Certificate, PROXY: proxy, Evidence: http.HandlerFunc(a.serveEvidence), Log: a.log}
}
