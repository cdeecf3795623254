// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/hex"

	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/governance/authority"
)

// admission is who gets a route.
func (n *Node) admission() (gateway.Admission, error) {
	c := &n.cfg.Core
	switch c.Auth.Type {
	case "lease":
		root, err := hex.DecodeString(c.Auth.KMSRoot)
		if err != nil {
			return nil, err
		}
		return gateway.ByLease{Root: root}, nil
	case "attested":
		n.log.Warn("every instance whose evidence holds gets a route, whatever it runs (core.auth.type)")
		return gateway.AnyAttested{}, nil
	}
	decides, documents, err := authority.Open(c.Auth.authority(), authority.Options{Dir: c.DataDir, Log: n.log})
	if err != nil {
		return nil, err
	}
	n.reloading.decides(documents)
	return gateway.ByAuthority{Authority: decides}, nil
}
