// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"net"
	"net/netip"

	"github.com/dstack-go/dstack/gateway/tunnel"
	"github.com/dstack-go/dstack/gateway/witness"
)

// witness answers for this gateway on names whose TLS it ends.
func (n *Node) witness(tn *tunnel.Tunnel) *witness.Desk {
	var instance []byte
	if id := n.self.Instance; id != nil {
		instance = id[:]
	}
	return witness.New(witness.Desk{
		AppID: n.self.ID, Instance: instance, Manifest: n.self.Manifest, Attester: n.self,
		Dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) { return tn.Dial(ctx, to) }, Log: n.log,
	})
}
