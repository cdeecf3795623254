// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/hex"
	"errors"
	"net"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/cluster"
	"github.com/dstack-go/dstack/gateway/exchange"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/internal/fault"
)

// clusterDir is where the cluster's state is, in the data directory.
const clusterDir = "cluster"

// errJoined ends a run of the gateway that has become a member of another cluster.
var errJoined = errors.New("the gateway has joined a cluster")

// openCluster starts this gateway's part in its cluster.
func (n *Node) openCluster() (*cluster.Cluster, error) {
	c := &n.cfg.Core
	own := cluster.Node{
		UUID: hex.EncodeToString(n.uuid[:]), ID: c.NodeID, Peer: c.Cluster.Address, URL: c.MyURL, Key: n.key.Public().String(),
		Address: c.WG.ip, Endpoint: c.WG.Endpoint, Compose: n.self.Compose,
	}
	if n.self.Instance != nil {
		own.Instance = *n.self.Instance
	} else if own.Peer != "" {
		return nil, bad("a gateway without an instance id cannot be in a cluster").WithFix("deploy it without no_instance_id, or take core.cluster.listen out")
	}
	return cluster.Open(cluster.Config{
		Dir: filepath.Join(c.DataDir, clusterDir), Node: own, App: n.self.ID, Compose: n.self.Compose, Also: c.Cluster.also,
		Self: n.self, Judge: n.judge, Log: n.log,
	})
}

// gatewayNode is a member as guests are told of it.
func gatewayNode(n cluster.Node) gateway.Node {
	out := gateway.Node{ID: n.ID, URL: n.URL, Key: n.PublicKey(), Address: n.Address, Endpoint: n.Endpoint}
	b, _ := hex.DecodeString(n.UUID) // it was checked
	copy(out.UUID[:], b)
	return out
}

// others are the other members as guests are told of them.
func (n *Node) others(c *cluster.Cluster) []gateway.Node {
	nodes, err := c.Nodes(context.Background())
	if err != nil {
		n.log.Warn("cluster", "error", err)
		return nil
	}
	var out []gateway.Node
	for _, m := range nodes {
		if m.UUID != c.Node().UUID {
			out = append(out, gatewayNode(m))
		}
	}
	return out
}

// closed says why guests cannot register here, if they cannot. Code register_node_removed,
// those of live.closed.
func (n *Node) closed(c *cluster.Cluster) func() error {
	return func() error {
		if c.Removed() {
			return fault.New("register_node_removed", "this gateway was removed from its cluster").WithFix("register at another gateway")
		}
		return n.live.closed()
	}
}

// together serves the other members on l, if there is one, and passes routes on to them,
// until ctx ends; errJoined when this gateway joined another cluster.
func (n *Node) together(ctx context.Context, c *cluster.Cluster, l net.Listener, table *route.Table, applied func()) error {
	x := exchange.New(table, c, applied, n.log)
	group, ctx := errgroup.WithContext(ctx)
	if l != nil {
		group.Go(func() error {
			return c.Serve(ctx, l, cluster.Handlers{exchange.Call: func(_ context.Context, from cluster.Node, body []byte) ([]byte, error) {
				return x.Take(from.UUID, body)
			}})
		})
	}
	group.Go(func() error { return x.Run(ctx) })
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-c.Joined():
			return errJoined
		}
	})
	return group.Wait()
}
