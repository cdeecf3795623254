// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Keys of records of members and of what lets others in.
const (
	memberPrefix = "member/"
	idPrefix     = "member-id/"
	invitePrefix = "invite/"

	inviteLife = time.Hour
	// reserved is how many addresses at the start of a large network are gateways'.
	reserved = 256
)

func memberKey(uuid string) string { return memberPrefix + uuid }

// Nodes returns the members that there are records of, by id. A record that does not
// parse is left out.
func (c *Cluster) Nodes(ctx context.Context) ([]Node, error) {
	entries, err := c.List(ctx, memberPrefix)
	if err != nil {
		return nil, err
	}
	var out []Node
	for _, e := range entries {
		n, err := parseNode(e.Value)
		if err != nil || memberKey(n.UUID) != e.Key {
			c.log.Error("cluster: record left out", "key", e.Key, "error", err)
			continue
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b Node) int { return int(a.ID) - int(b.ID) })
	return out, nil
}

func parseNode(text []byte) (n Node, err error) {
	if err := strictjson.Decode(text, &n, strictjson.Limits{Size: 8 << 10, Depth: 3}); err != nil {
		return n, fault.Wrap(err, "cluster_record", "a member's record")
	}
	return n, n.check()
}

// Member is a member and how it is.
type Member struct {
	Node
	Leader, Learner, Self bool
	// Heard is when it last answered this one; this one's is now.
	Heard time.Time
}

// Members returns the members, and whether a majority of them is there.
func (c *Cluster) Members(ctx context.Context) ([]Member, bool, error) {
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return nil, false, err
	}
	etcd := c.etcdMembers()
	var out []Member
	for _, n := range nodes {
		m := Member{Node: n, Self: n.UUID == c.cfg.Node.UUID, Learner: true}
		if e := etcd[n.UUID]; e != nil {
			m.Leader, m.Learner = c.server.etcd.Leader() == e.ID, e.IsLearner
		}
		if m.Self {
			m.Heard = time.Now()
		} else if x := c.peers.get(n.UUID); x != nil && x.heard.Load() != 0 {
			m.Heard = time.UnixMilli(x.heard.Load())
		}
		out = append(out, m)
	}
	return out, c.server.leads(), nil
}

// Quorum reports whether what is agreed can change.
func (c *Cluster) Quorum() bool { return c.server.leads() && !c.Removed() }

// etcdMembers are etcd's members by the UUID that their address names.
func (c *Cluster) etcdMembers() map[string]*membership.Member {
	out := map[string]*membership.Member{}
	for _, m := range c.server.etcd.Cluster().Members() {
		for _, u := range m.PeerURLs {
			for _, n := range c.known() {
				if u == peerURL(n) {
					out[n] = m
				}
			}
		}
	}
	return out
}

// known are the UUIDs that this member has heard of.
func (c *Cluster) known() []string {
	out := []string{c.cfg.Node.UUID}
	c.peers.mu.Lock()
	defer c.peers.mu.Unlock()
	for uuid := range c.peers.nodes {
		out = append(out, uuid)
	}
	return out
}

// invite is who may join: whoever shows the token, once.
type invite struct {
	Until int64  `json:"until"` // Unix seconds
	By    string `json:"by"`    // UUID of who used it; empty: nobody has
}

// Invite lets one gateway join within an hour, and returns the token for it to show.
func (c *Cluster) Invite(ctx context.Context) (token string, until time.Time, err error) {
	if c.cfg.Node.Peer == "" {
		return "", until, fault.New("cluster_off", "other gateways cannot reach this one").WithFix("set core.cluster.listen and core.cluster.address")
	}
	b := make([]byte, 32)
	rand.Read(b)
	token = base64.RawURLEncoding.EncodeToString(b)
	until = time.Now().Add(inviteLife).Truncate(time.Second)
	text, err := json.Marshal(invite{Until: until.Unix()})
	if err != nil {
		return "", until, err
	}
	c.prune(ctx)
	return token, until, c.Put(ctx, inviteKey(token), text, 0)
}

// inviteKey does not tell the token.
func inviteKey(token string) string {
	h := sha256.Sum256([]byte(token))
	return invitePrefix + hex.EncodeToString(h[:])
}

// prune removes invitations that have ended.
func (c *Cluster) prune(ctx context.Context) {
	entries, err := c.List(ctx, invitePrefix)
	if err != nil {
		return
	}
	for _, e := range entries {
		var i invite
		if err := json.Unmarshal(e.Value, &i); err != nil || i.Until < time.Now().Unix() {
			_ = c.Delete(ctx, e.Key, e.Revision) // or another time
		}
	}
}

// use spends an invitation; the same gateway may use it again while it lasts. Code
// cluster_uninvited.
func (c *Cluster) use(ctx context.Context, token, uuid string) error {
	refuse := func(format string, args ...any) error {
		return fault.New("cluster_uninvited", format, args...).WithFix("`dstack gateway invite` at a member makes an invitation for one gateway, for an hour")
	}
	e, err := c.Get(ctx, inviteKey(token))
	if errors.Is(err, fs.ErrNotExist) {
		return refuse("nobody made this invitation")
	}
	if err != nil {
		return err
	}
	var i invite
	if err := json.Unmarshal(e.Value, &i); err != nil || i.Until < time.Now().Unix() {
		return refuse("the invitation has ended")
	}
	if i.By == uuid {
		return nil
	}
	if i.By != "" {
		return refuse("the invitation was used by another gateway")
	}
	i.By = uuid
	text, err := json.Marshal(i)
	if err != nil {
		return err
	}
	if err := c.Put(ctx, e.Key, text, e.Revision); fault.Code(err) == "state_conflict" {
		return refuse("the invitation was used by another gateway")
	} else {
		return err
	}
}

// joining is what a gateway asks with that wants to join.
type joining struct {
	Token string `json:"token"`
	Node  Node   `json:"node"` // its id, address and instance do not count
}

// admission is the answer.
type admission struct {
	Token   string   `json:"token"` // of etcd
	Key     hexBytes `json:"key"`
	Node    Node     `json:"node"`
	Members []Node   `json:"members"` // the others
}

// admit lets a gateway in, whose evidence is of this app. Codes cluster_request,
// cluster_uninvited, cluster_full, cluster_twice, state_quorum.
func (c *Cluster) admit(ctx context.Context, peer *channel.Peer, body []byte) ([]byte, error) {
	var j joining
	if err := strictjson.Decode(body, &j, strictjson.Limits{Size: maxState, Depth: 4}); err != nil {
		return nil, fault.Wrap(err, "cluster_request", "the request to join")
	}
	n := j.Node
	if peer.Identity.InstanceID == nil {
		return nil, fault.New("cluster_request", "a gateway without an instance id cannot be told from others").WithFix("deploy the gateway without no_instance_id")
	}
	n.ID, n.Instance, n.Compose, n.Address = 1, *peer.Identity.InstanceID, peer.Identity.ComposeHash, c.cfg.Node.Address
	if err := n.check(); err != nil {
		return nil, fault.Wrap(err, "cluster_request", "the gateway that wants to join")
	}
	if _, _, err := net.SplitHostPort(n.Peer); err != nil {
		return nil, fault.New("cluster_request", "the gateway does not say where members reach it").WithFix("set core.cluster.address there")
	}
	if err := c.use(ctx, j.Token, n.UUID); err != nil {
		return nil, err
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	known := slices.IndexFunc(nodes, func(m Node) bool { return m.UUID == n.UUID })
	switch {
	case known >= 0 && nodes[known].Instance != n.Instance:
		return nil, fault.New("cluster_twice", "another instance has the UUID %s", n.UUID)
	case known < 0 && slices.ContainsFunc(nodes, func(m Node) bool { return m.Instance == n.Instance || m.wg == n.wg }):
		return nil, fault.New("cluster_twice", "this instance, or its WireGuard key, is a member already, by another UUID").WithFix("remove that member first")
	case known < 0 && len(nodes) >= MaxMembers:
		return nil, fault.New("cluster_full", "the cluster has %d members, its most", len(nodes))
	case known >= 0:
		n.ID, n.Address = nodes[known].ID, nodes[known].Address
	default:
		if err := c.number(ctx, &n, nodes); err != nil {
			return nil, err
		}
	}
	u, err := types.NewURLs([]string{peerURL(n.UUID)})
	if err != nil {
		return nil, err
	}
	if c.etcdMembers()[n.UUID] == nil {
		if err := c.learn(ctx, u); err != nil {
			return nil, err
		}
	}
	text, err := json.Marshal(&n)
	if err != nil {
		return nil, err
	}
	if err := c.Put(ctx, memberKey(n.UUID), text, anyRevision); err != nil {
		return nil, err
	}
	if err := c.peers.know(&n); err != nil {
		return nil, err
	}
	c.log.Info("cluster: joins", "uuid", n.UUID, "id", n.ID, "instance", n.Instance.String())
	return c.admission(ctx, n)
}

// admission is what a new member begins with.
func (c *Cluster) admission(ctx context.Context, n Node) ([]byte, error) {
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	others := slices.DeleteFunc(nodes, func(m Node) bool { return m.UUID == n.UUID })
	return json.Marshal(admission{Token: c.state.Token, Key: c.state.Key, Node: n, Members: others})
}

// admitted reads it. Code cluster_reply.
func (c *Cluster) admitted(text []byte) (*state, error) {
	defer clear(text)
	var a admission
	if err := strictjson.Decode(text, &a, strictjson.Limits{Size: maxState, Depth: 4}); err != nil {
		return nil, fault.Wrap(err, "cluster_reply", "a member's answer")
	}
	s := &state{Token: a.Token, Key: a.Key, ID: a.Node.ID, Address: a.Node.Address.String(), Members: a.Members, Joined: true}
	if err := a.Node.check(); err != nil || a.Node.UUID != c.cfg.Node.UUID || len(s.Key) != 32 || len(s.Token) != 32 || len(s.Members) == 0 || len(s.Members) > MaxMembers {
		return nil, fault.New("cluster_reply", "a member's answer lacks parts")
	}
	for i := range s.Members {
		if err := s.Members[i].check(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// learn makes a gateway a member that does not vote. etcd takes nobody while another
// learns, or before the last who came has been there for five seconds: that is waited for.
// Codes cluster_busy, state_quorum.
func (c *Cluster) learn(ctx context.Context, u types.URLs) error {
	ctx, cancel := context.WithTimeout(ctx, 3*patience)
	defer cancel()
	now := time.Now() // so that it has another id in etcd than it may have had before
	for {
		_, err := c.server.etcd.AddMember(ctx, *membership.NewMemberAsLearner("", u, c.state.Token, &now))
		switch {
		case err == nil || errors.Is(err, membership.ErrPeerURLexists):
			return nil
		case !errors.Is(err, membership.ErrTooManyLearners) && !errors.Is(err, etcderrors.ErrUnhealthy):
			return quorum(err)
		}
		select {
		case <-ctx.Done():
			return fault.Wrap(err, "cluster_busy", "another gateway is joining, or not all are well").WithFix("`dstack gateway members` shows them; join again with the same invitation")
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// number gives a new member an id and an address, each of which it has alone.
func (c *Cluster) number(ctx context.Context, n *Node, nodes []Node) error {
	network := c.cfg.Node.Address
	for id := uint32(1); id < reserved; id++ {
		a := network.Masked().Addr()
		for range id {
			a = a.Next()
		}
		if !wgconfig.Inside(network.Masked(), a) || slices.ContainsFunc(nodes, func(m Node) bool { return m.ID == id || m.Address.Addr() == a }) {
			continue
		}
		err := c.Put(ctx, fmt.Sprintf("%s%d", idPrefix, id), []byte(n.UUID), 0)
		if fault.Code(err) == "state_conflict" {
			continue // of another that joins just now, or of one that was removed
		}
		if err != nil {
			return err
		}
		n.ID, n.Address = id, netip.PrefixFrom(a, network.Bits())
		return nil
	}
	return fault.New("cluster_full", "no address is left for a gateway in %s", network.Masked())
}

// promote lets a member vote that has caught up. Code state_quorum.
func (c *Cluster) promote(ctx context.Context, uuid string) error {
	m := c.etcdMembers()[uuid]
	if m == nil {
		return fault.New("cluster_stranger", "no member %s", uuid)
	}
	if !m.IsLearner {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := c.server.etcd.PromoteMember(ctx, uint64(m.ID)); err != nil && !errors.Is(err, membership.ErrMemberNotLearner) {
		return quorum(err)
	}
	return nil
}

// Join makes this gateway a member of another cluster, that of the gateway at addr
// (host:port of its core.cluster.address), and leaves the cluster of one that it was. What
// was stored here is kept aside. Whoever runs this member then opens it anew (Joined).
//
// Codes cluster_off, cluster_member (it is in a cluster already), those of channel.Dial and
// of the member that is asked.
func (c *Cluster) Join(ctx context.Context, addr, token string) error {
	if c.cfg.Node.Peer == "" {
		return fault.New("cluster_off", "other gateways cannot reach this one").WithFix("set core.cluster.listen and core.cluster.address")
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return err
	}
	if len(nodes) > 1 {
		return fault.New("cluster_member", "this gateway is in a cluster of %d already", len(nodes)).WithFix("`dstack gateway leave` first")
	}
	body, err := json.Marshal(joining{Token: token, Node: c.cfg.Node})
	if err != nil {
		return err
	}
	t := &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return c.dial(ctx, addr, nil)
	}}
	defer t.CloseIdleConnections()
	text, err := call(ctx, t, "join", body)
	if err != nil {
		return err
	}
	s, err := c.admitted(text)
	if err != nil {
		return err
	}
	return c.leaveFor(s)
}

// leaveFor puts aside what there is and writes what the next Open begins with.
func (c *Cluster) leaveFor(s *state) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.joined:
		return fault.New("cluster_member", "this gateway is joining already")
	default:
	}
	c.leaving = true
	c.server.stop()
	aside := filepath.Join(c.cfg.Dir, time.Now().UTC().Format("before-20060102-150405"))
	if err := os.Rename(filepath.Join(c.cfg.Dir, etcdDir), aside); err != nil {
		return err
	}
	// With the key it was sealed with.
	old, err := json.Marshal(&c.state)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(aside, stateFile), old, 0o600); err != nil {
		return err
	}
	if err := s.write(c.cfg.Dir); err != nil {
		return err
	}
	close(c.joined)
	return nil
}

// Remove ends a member's part for good, at all others. Codes cluster_stranger, state_quorum.
func (c *Cluster) Remove(ctx context.Context, uuid string) error {
	m := c.etcdMembers()[uuid]
	_, err := c.Get(ctx, memberKey(uuid))
	if m == nil && errors.Is(err, fs.ErrNotExist) {
		return fault.New("cluster_stranger", "no member %.64q", uuid)
	}
	if m != nil {
		wait, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		if _, err := c.server.etcd.RemoveMember(wait, uint64(m.ID)); err != nil && !errors.Is(err, membership.ErrIDRemoved) {
			return quorum(err)
		}
	}
	if uuid == c.cfg.Node.UUID {
		return nil // the others see that it is gone, and forget its record
	}
	if err := c.Delete(ctx, memberKey(uuid), anyRevision); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// settle is a joined member's way to vote: it asks until it has caught up. Its own etcd
// does not know at first that it is a learner.
func (c *Cluster) settle() {
	said := false
	for wait := 200 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		for _, n := range c.state.Members {
			ctx, cancel := context.WithTimeout(c.ctx, 2*patience)
			_, err := c.Call(ctx, n.UUID, "promote", nil)
			cancel()
			if err == nil {
				return
			}
			if !said {
				c.log.Info("cluster: not a voting member yet", "asked", n.UUID, "code", fault.Code(err), "error", err)
				said = true
			}
		}
		select {
		case <-c.ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}
