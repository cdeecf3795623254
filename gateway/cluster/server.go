// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/etcdhttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/features"
	"go.uber.org/zap"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/zaplog"
)

// Limits of etcd. Records are at most a MiB; what changes are domains and certificates.
const (
	maxRequest = 2 << 20   // bytes
	quota      = 256 << 20 // bytes of the whole store
	tick       = 100       // ms; an election begins after ten without a leader
)

// server is the embedded etcd.
type server struct {
	etcd    *etcdserver.EtcdServer
	client  *clientv3.Client
	handler http.Handler

	// Reading of what is closed would end the process: readers hold the lock.
	reading sync.RWMutex
	stopped bool
}

// get reads. Code cluster_closed.
func (s *server) get(ctx context.Context, key string, opts ...clientv3.OpOption) (r *clientv3.GetResponse, err error) {
	closed := fault.New("cluster_closed", "this gateway is no part of a cluster now: it is starting anew, or was removed").
		WithFix("invite and join it again if it was removed")
	s.reading.RLock()
	defer s.reading.RUnlock()
	if s.stopped {
		return nil, closed
	}
	defer func() {
		// etcd stops by itself when it learns that it was removed.
		select {
		case <-s.etcd.StopNotify():
			if recover() != nil || err != nil {
				r, err = nil, closed
			}
		default:
		}
	}()
	return s.client.Get(ctx, key, opts...)
}

// ended marks that etcd has stopped by itself.
func (s *server) ended() {
	s.reading.Lock()
	defer s.reading.Unlock()
	s.stopped = true
}

// socketName is the name of the socket that leads to a member, and, for etcd, its address.
// The port is there because etcd's client would add one.
func socketName(uuid string) string { return "gw-" + uuid[:12] + ":1" }

func peerURL(uuid string) string { return "unix://" + socketName(uuid) }

// start starts etcd. It has no listener: Cluster.Serve hands it what members send.
func start(c *Cluster) (*server, error) {
	bad := func(err error, what string) (*server, error) {
		return nil, fault.Wrap(err, "cluster_start", "%s", what).WithFix("see the log; a member whose files are lost is removed from the cluster and joins anew")
	}
	// etcd's client dials "unix://name:1" as the relative path name:1, and takes no path.
	if err := os.Chdir(filepath.Join(c.cfg.Dir, socketsDir)); err != nil {
		return bad(err, "change to the directory of the sockets")
	}
	own := peerURL(c.cfg.Node.UUID)
	initial := types.URLsMap{}
	for _, n := range append(c.state.Members, c.cfg.Node) {
		u, err := types.NewURLs([]string{peerURL(n.UUID)})
		if err != nil {
			return bad(err, "a member's address")
		}
		initial[n.UUID] = u
	}
	// Its warnings are that members are away, every few seconds; Members says so once.
	log := zaplog.New(c.log.Handler()).WithOptions(zap.IncreaseLevel(zap.ErrorLevel), zap.WithPanicHook(broken{c.cfg.Dir}), zap.WithFatalHook(broken{c.cfg.Dir}))
	cfg := config.ServerConfig{
		Name: c.cfg.Node.UUID, PeerURLs: types.MustNewURLs([]string{own}), ClientURLs: types.URLs{url.URL{Scheme: "http", Host: "none.invalid:1"}},
		DataDir: filepath.Join(c.cfg.Dir, etcdDir), NewCluster: !c.state.Joined,
		InitialPeerURLsMap: initial, InitialClusterToken: c.state.Token,
		TickMs: tick, ElectionTicks: 10, InitialElectionTickAdvance: true, PreVote: true,
		SnapshotCount: 10000, SnapshotCatchUpEntries: 5000, MaxSnapFiles: 3, MaxWALFiles: 3,
		QuotaBackendBytes: quota, MaxTxnOps: 128, MaxRequestBytes: maxRequest, MaxConcurrentStreams: 64,
		AutoCompactionMode: "periodic", AutoCompactionRetention: time.Hour,
		StrictReconfigCheck: true, MaxLearners: 1, AuthToken: "", BcryptCost: 10, TokenTTL: 300,
		WarningApplyDuration: 500 * time.Millisecond, WarningUnaryRequestDuration: time.Second,
		CompactHashCheckTime: time.Minute, DowngradeCheckTime: time.Hour,
		Logger: log, ServerFeatureGate: features.NewDefaultServerFeatureGate(c.cfg.Node.UUID, log), Metrics: "basic",
	}
	if err := durable.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return bad(err, "make the directory of the store")
	}
	etcd, err := newServer(cfg)
	if err != nil {
		return bad(err, "start the store")
	}
	etcd.Start()
	return &server{etcd: etcd, client: v3client.New(etcd), handler: etcdhttp.NewPeerHandler(log, etcd)}, nil
}

// newServer survives what etcd does with an empty log.
func newServer(cfg config.ServerConfig) (s *etcdserver.EtcdServer, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the store is broken: %v", p)
		}
	}()
	return etcdserver.NewServer(cfg)
}

func (s *server) stop() {
	s.reading.Lock()
	defer s.reading.Unlock()
	if !s.stopped {
		s.stopped = true
		s.client.Close()
		s.etcd.Stop()
	}
}

// leads reports whether there is a leader, by which a majority is there.
func (s *server) leads() bool { return s.etcd.Leader() != 0 }

// isGone reports whether this member was removed.
func (s *server) isGone() bool { return s.etcd.IsIDRemoved(uint64(s.etcd.MemberID())) }
