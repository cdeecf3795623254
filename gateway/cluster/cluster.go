// SPDX-License-Identifier: Apache-2.0

// Package cluster is what gateways of one app agree on: certificates, accounts, locks,
// domains, operators' settings, and who belongs to them.
//
// An embedded etcd keeps it. One gateway is a cluster of one; others join, each admitted by
// an operator's invitation and by its evidence, and can be removed. Changes need a majority
// of the members. Reading does not: every member reads its own copy, alone, and after a
// cold start, so that nothing that serves a request waits for another gateway.
//
// Members talk over attested channels only, in both directions: each end is an instance of
// the same app with a manifest that this one admits, and is listed as a member. etcd itself
// neither listens nor dials on the network: what comes in is handed to it by this package,
// and its own calls go to sockets in [Config.Dir], one for each member, behind which this
// package dials. For that the process's working directory becomes that of the sockets,
// since etcd's addresses of sockets are relative (see server.start).
//
// Values are sealed with a key that members give to those who join: a copy of the files, a
// backup or a dump shows none. It lies beside them on the gateway's disk, which a CVM seals.
//
// Trusted: the members. Attacker-controlled: the network; whoever calls without being one.
//
// Implements spec/gateway.md §5.5 A, D, E, F and G; threats.md K02, K10.
package cluster

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxMembers is the most members of a cluster.
const MaxMembers = 7

// Files of the directory.
const (
	stateFile  = "state.json" // state, 0600: it has the key
	etcdDir    = "etcd"
	socketsDir = "peers"
)

// Node is a gateway as its cluster knows it.
type Node struct {
	UUID     string             `json:"uuid"` // 32 hexadecimal digits
	ID       uint32             `json:"id"`
	Instance dstack.InstanceID  `json:"instance"`
	Peer     string             `json:"peer"` // host:port at which members reach it; empty: it is alone
	URL      string             `json:"url"`  // where guests register
	Key      string             `json:"key"`  // of WireGuard, base64
	Address  netip.Prefix       `json:"address"`
	Endpoint string             `json:"endpoint"`
	Compose  dstack.ComposeHash `json:"compose"`
	wg       wgconfig.PublicKey // Key
}

// PublicKey is the WireGuard key.
func (n *Node) PublicKey() wgconfig.PublicKey { return n.wg }

// check parses what is text. Code cluster_record.
func (n *Node) check() (err error) {
	b, err := hex.DecodeString(n.UUID)
	if err != nil || len(b) != 16 || n.ID == 0 || n.Instance.IsZero() && n.Peer != "" {
		return fault.New("cluster_record", "a member without id, UUID or instance")
	}
	if n.wg, err = wgconfig.ParsePublicKey(n.Key); err != nil {
		return fault.Wrap(err, "cluster_record", "the member %s", n.UUID)
	}
	if _, err = wgconfig.ParseEndpoint(n.Endpoint); err != nil {
		return fault.Wrap(err, "cluster_record", "the member %s", n.UUID)
	}
	if !n.Address.IsValid() || !n.Address.Addr().Is4() || len(n.URL) > 2048 || len(n.Peer) > 300 {
		return fault.New("cluster_record", "the member %s has no address, or texts that are too long", n.UUID)
	}
	return nil
}

// Config is what a member is made of.
type Config struct {
	Dir  string // absolute; 0700
	Node Node   // this gateway; its ID and Address are those of a cluster of one
	// App and Compose are what this gateway is; Also are other manifests of the app that
	// members may have, as in an upgrade.
	App     dstack.AppID
	Compose dstack.ComposeHash
	Also    []dstack.ComposeHash
	Self    channel.Attester
	Judge   *applicant.Judge
	Log     *slog.Logger
	// Refused, if set, is told of each connection of a stranger that was turned away.
	Refused func(error)
}

// Cluster is this gateway's membership. Make it with Open.
type Cluster struct {
	cfg    Config
	log    *slog.Logger
	state  state
	seal   cipher.AEAD
	server *server
	peers  *peers

	ctx    context.Context
	cancel context.CancelFunc
	jobs   sync.WaitGroup

	mu      sync.Mutex
	locks   map[string]*held
	removed bool
	leaving bool          // Join stops etcd
	joined  chan struct{} // closed when Join has made the directory another cluster's
}

// state is what a member knows before its etcd runs.
type state struct {
	Token   string   `json:"token"` // of etcd's cluster, 32 hexadecimal digits
	Key     hexBytes `json:"key"`   // seals values; 32 bytes
	ID      uint32   `json:"id"`
	Address string   `json:"address"` // in the tunnel
	// Members are those at the join; from then on the records count.
	Members []Node `json:"members"`
	Joined  bool   `json:"joined"` // there were others
}

type hexBytes []byte

func (b hexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, b), nil }

func (b *hexBytes) UnmarshalText(text []byte) (err error) {
	*b, err = hex.AppendDecode(nil, text)
	return err
}

const maxState = 64 << 10

func readState(dir string) (s state, err error) {
	text, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		return s, err
	}
	defer clear(text)
	if err := strictjson.Decode(text, &s, strictjson.Limits{Size: maxState, Depth: 6}); err != nil {
		return s, fault.Wrap(err, "cluster_state", "%s does not parse", filepath.Join(dir, stateFile)).
			WithFix("restore it from a backup, or move %s away: the gateway then begins a cluster of its own", dir)
	}
	if len(s.Key) != 32 || len(s.Token) != 32 || s.ID == 0 {
		return s, fault.New("cluster_state", "%s lacks parts", filepath.Join(dir, stateFile))
	}
	for i := range s.Members {
		if err := s.Members[i].check(); err != nil {
			return s, err
		}
	}
	return s, nil
}

func (s *state) write(dir string) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	defer clear(text)
	return durable.WriteFile(filepath.Join(dir, stateFile), text, 0o600)
}

// Open starts this member, making a cluster of one at the first start. It waits for nobody:
// without a quorum it reads. Codes cluster_config, cluster_state, cluster_start.
func Open(cfg Config) (*Cluster, error) {
	if !filepath.IsAbs(cfg.Dir) || cfg.Self == nil || cfg.Judge == nil || cfg.App.IsZero() || cfg.Compose.IsZero() {
		return nil, fault.New("cluster_config", "a member needs an absolute directory, an app, a manifest, evidence and a judge of others'")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := durable.MkdirAll(filepath.Join(cfg.Dir, socketsDir), 0o700); err != nil {
		return nil, fault.Wrap(err, "cluster_config", "make %s", cfg.Dir)
	}
	s, err := readState(cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		s = state{Token: randomHex(16), Key: make([]byte, 32), ID: cfg.Node.ID, Address: cfg.Node.Address.String()}
		rand.Read(s.Key)
		err = s.write(cfg.Dir)
	}
	if err != nil {
		return nil, err
	}
	if s.Joined {
		cfg.Node.ID = s.ID
		if cfg.Node.Address, err = netip.ParsePrefix(s.Address); err != nil {
			return nil, fault.Wrap(err, "cluster_state", "the address in %s", stateFile)
		}
	}
	if err := cfg.Node.check(); err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(s.Key)
	if err != nil {
		return nil, err
	}
	c := &Cluster{cfg: cfg, log: cfg.Log, state: s, locks: map[string]*held{}, joined: make(chan struct{})}
	if c.seal, err = cipher.NewGCM(block); err != nil {
		return nil, err
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.peers = newPeers(c)
	for i := range s.Members {
		if err := c.peers.know(&s.Members[i]); err != nil {
			c.Close()
			return nil, err
		}
	}
	_, marked := os.Stat(filepath.Join(cfg.Dir, brokenFile))
	if marked != nil || !s.Joined {
		c.server, err = start(c)
	}
	if c.server == nil && s.Joined {
		if again := c.rejoin(); again != nil {
			c.Close()
			return nil, fault.Wrap(errors.Join(again, err), "cluster_stale", "this gateway's store is broken, or older than what it told its cluster, and it could not become a member anew").
				WithFix("it needs a majority of the others; or remove it from the cluster, move %s away, and join again", cfg.Dir)
		}
		c.server, err = start(c)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	c.jobs.Go(c.publish)
	c.jobs.Go(c.follow)
	if c.state.Joined {
		c.jobs.Go(c.settle)
	}
	return c, nil
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// Close ends this member's part in the cluster until it is opened again.
func (c *Cluster) Close() {
	c.releaseAll()
	c.cancel()
	if c.server != nil {
		c.server.stop()
	}
	c.peers.close()
	c.jobs.Wait()
}

// Node is this member.
func (c *Cluster) Node() Node { return c.cfg.Node }

// Joined is closed when Join succeeded: whoever runs this member opens it anew.
func (c *Cluster) Joined() <-chan struct{} { return c.joined }

// Others returns the UUIDs of the other members.
func (c *Cluster) Others(ctx context.Context) ([]string, error) {
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range nodes {
		if n.UUID != c.cfg.Node.UUID && n.Peer != "" {
			out = append(out, n.UUID)
		}
	}
	return out, nil
}

// Removed reports whether the cluster removed this member.
func (c *Cluster) Removed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.removed
}

// publish keeps this member's own record, which others reach it by.
func (c *Cluster) publish() {
	text, err := json.Marshal(&c.cfg.Node)
	if err != nil {
		c.log.Error("cluster", "error", err)
		return
	}
	key := memberKey(c.cfg.Node.UUID)
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		e, err := c.Get(c.ctx, key)
		switch {
		case err == nil && string(e.Value) == string(text):
			return
		case errors.Is(err, fs.ErrNotExist) && c.state.Joined && c.Removed():
			return // it is not this one's to come back
		}
		if err = c.Put(c.ctx, key, text, anyRevision); err == nil {
			return
		}
		select {
		case <-c.ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// follow keeps the addresses of the members, and notices when this one is none any more.
func (c *Cluster) follow() {
	c.jobs.Go(func() {
		select {
		case <-c.ctx.Done():
		case <-c.server.etcd.StopNotify():
			c.server.ended()
			if c.ctx.Err() == nil {
				c.noteRemoved("etcd stopped")
			}
		}
	})
	c.Watch(c.ctx, memberPrefix, func() {
		nodes, err := c.Nodes(c.ctx)
		if err != nil {
			c.log.Warn("cluster", "code", fault.Code(err), "error", err)
			return
		}
		here := false
		for i := range nodes {
			if nodes[i].UUID == c.cfg.Node.UUID {
				here = true
				continue
			}
			if nodes[i].Peer == "" {
				continue
			}
			if err := c.peers.know(&nodes[i]); err != nil {
				c.log.Warn("cluster: member", "uuid", nodes[i].UUID, "code", fault.Code(err), "error", err)
			}
		}
		c.peers.keep(nodes)
		if !here && c.state.Joined && len(nodes) > 0 && c.server.isGone() {
			c.noteRemoved("there is no record of it")
		}
	})
}

func (c *Cluster) noteRemoved(why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.removed && !c.leaving {
		c.removed = true
		c.log.Warn("this gateway is no member of its cluster any more", "why", why)
	}
}
