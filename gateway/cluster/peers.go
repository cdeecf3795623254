// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
)

// Times of connections between members.
const (
	// silence is how long a connection may bring nothing: etcd's streams beat more often.
	silence = 10 * time.Second
	// longest is how old a connection's evidence may be.
	longest   = time.Hour
	dialTime  = 15 * time.Second
	peersPath = "/cluster/"
)

// peers are the attested connections to and from the other members.
type peers struct {
	c *Cluster

	mu    sync.Mutex
	nodes map[string]*peer // by UUID
	done  bool
}

// peer is another member.
type peer struct {
	c         *Cluster
	node      atomic.Pointer[Node]
	transport *http.Transport
	forward   *http.Server // behind the socket that etcd dials
	heard     atomic.Int64 // Unix milliseconds of the last answer
}

func newPeers(c *Cluster) *peers { return &peers{c: c, nodes: map[string]*peer{}} }

// know makes a member reachable, or notes that it moved.
func (p *peers) know(n *Node) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done || n.UUID == p.c.cfg.Node.UUID {
		return nil
	}
	if known := p.nodes[n.UUID]; known != nil {
		known.node.Store(n)
		return nil
	}
	if len(p.nodes) >= 2*MaxMembers {
		return fault.New("cluster_full", "more than %d members", 2*MaxMembers)
	}
	x := &peer{c: p.c}
	x.node.Store(n)
	x.transport = &http.Transport{
		DialContext: x.dial, MaxIdleConnsPerHost: 4, IdleConnTimeout: silence, DisableCompression: true, ResponseHeaderTimeout: 30 * time.Second,
	}
	path := filepath.Join(p.c.cfg.Dir, socketsDir, socketName(n.UUID))
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return fault.Wrap(err, "cluster_start", "the socket that leads to member %s", n.UUID).WithFix("give core.data_dir a shorter path")
	}
	quiet := log.New(io.Discard, "", 0) // etcd itself says what it cannot reach
	x.forward = &http.Server{ErrorLog: quiet, Handler: &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", "member", "member"
		},
		Transport: x.transport, FlushInterval: -1, ErrorLog: quiet,
		ModifyResponse: func(*http.Response) error { x.heard.Store(time.Now().UnixMilli()); return nil },
	}}
	p.nodes[n.UUID] = x
	p.c.jobs.Go(func() { _ = x.forward.Serve(l) })
	return nil
}

// keep forgets those who are members no more.
func (p *peers) keep(nodes []Node) {
	listed := map[string]bool{}
	for _, n := range nodes {
		listed[n.UUID] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for uuid, x := range p.nodes {
		if !listed[uuid] && len(nodes) > 0 {
			x.close()
			delete(p.nodes, uuid)
		}
	}
}

func (x *peer) close() {
	x.forward.Close()
	x.transport.CloseIdleConnections()
}

func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = true
	for _, x := range p.nodes {
		x.close()
	}
}

func (p *peers) get(uuid string) *peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nodes[uuid]
}

// dial makes an attested connection to the member and nobody else.
func (x *peer) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	n := x.node.Load()
	return x.c.dial(ctx, n.Peer, &n.Instance)
}

// dial connects to an instance of this app; nil: any.
func (c *Cluster) dial(ctx context.Context, addr string, instance *dstack.InstanceID) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	conn, err := channel.Dial(ctx, "tcp", addr, &channel.Config{
		Appraiser: judging{c}, Attester: c.cfg.Self, AppEvidence: true, Timeout: dialTime,
		Intended: channel.Intended{AppID: c.cfg.App, InstanceID: instance, ComposeHashes: c.manifests()},
	})
	if err != nil {
		return nil, err
	}
	return &beating{Conn: conn, until: time.Now().Add(longest)}, nil
}

func (c *Cluster) manifests() []dstack.ComposeHash {
	return append([]dstack.ComposeHash{c.cfg.Compose}, c.cfg.Also...)
}

// beating is a connection that must bring something now and then, and ends for good with
// its evidence.
type beating struct {
	*channel.Conn
	until time.Time
}

func (b *beating) Read(p []byte) (int, error) {
	at := time.Now().Add(silence)
	if at.After(b.until) {
		at = b.until
	}
	if err := b.SetReadDeadline(at); err != nil {
		return 0, err
	}
	return b.Conn.Read(p)
}

// judging takes any machine whose evidence holds; that it is of this app is the channel's
// to check, by Intended.
type judging struct{ c *Cluster }

func (j judging) Appraise(ctx context.Context, x channel.Candidate) (*channel.Appraisal, error) {
	who, err := j.c.cfg.Judge.Judge(ctx, applicant.Evidence{Container: x.Container, ReportData: x.ReportData, Session: true})
	if err != nil {
		return nil, err
	}
	return who.Appraisal(), nil
}

// Handlers are what members ask of this one beside what the cluster itself needs, by the
// rest of the path after /cluster/; the caller is the member.
type Handlers map[string]func(ctx context.Context, from Node, body []byte) ([]byte, error)

// Limits of what members send.
const maxBody = 32 << 20 // bytes

// Serve answers members on l, which it owns, until ctx ends.
func (c *Cluster) Serve(ctx context.Context, l net.Listener, handlers Handlers) error {
	secure, err := channel.NewListener(l, &channel.Config{
		Appraiser: judging{c}, Attester: c.cfg.Self, AppEvidence: true, Timeout: dialTime,
		Intended: channel.Intended{AppID: c.cfg.App, ComposeHashes: c.manifests()},
		Refused: func(remote net.Addr, err error) {
			c.log.Info("cluster: connection refused", "remote", remote.String(), "code", fault.Code(err), "error", err)
			if c.cfg.Refused != nil {
				c.cfg.Refused(err)
			}
		},
	})
	if err != nil {
		l.Close()
		return err
	}
	server := &http.Server{
		Handler: c.handler(handlers), ReadHeaderTimeout: silence, IdleTimeout: silence, ConnContext: channel.ConnContext,
		ErrorLog: slog.NewLogLogger(c.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(secure); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// member is the member that a request came from. Codes channel_no_peer,
// cluster_stranger, cluster_evidence_old.
func (c *Cluster) member(ctx context.Context) (*Node, error) {
	peer, err := channel.PeerOf(ctx)
	if err != nil {
		return nil, err
	}
	return c.memberOf(ctx, peer)
}

func (c *Cluster) memberOf(ctx context.Context, peer *channel.Peer) (*Node, error) {
	if time.Since(peer.At) > longest+time.Minute {
		return nil, fault.New("cluster_evidence_old", "the evidence of this connection is from %s", peer.At)
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	// A member whose store has not caught up yet knows the others by what it was told when
	// it joined. Afterwards that counts no more: it still names who was removed since.
	if !slices.ContainsFunc(nodes, func(n Node) bool { return n.UUID == c.cfg.Node.UUID }) {
		nodes = append(nodes, c.state.Members...)
	}
	for _, n := range nodes {
		if peer.Identity.InstanceID != nil && n.Instance == *peer.Identity.InstanceID {
			return &n, nil
		}
	}
	return nil, fault.New("cluster_stranger", "this instance of the app is no member of the cluster").WithFix("`dstack gateway invite` at a member, `dstack gateway join` at this one")
}

func (c *Cluster) handler(handlers Handlers) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+peersPath+"join", func(w http.ResponseWriter, r *http.Request) {
		peer, err := channel.PeerOf(r.Context())
		var out []byte
		if err == nil {
			var body []byte
			if body, err = io.ReadAll(io.LimitReader(r.Body, maxState)); err == nil {
				out, err = c.admit(r.Context(), peer, body)
			}
		}
		reply(w, out, err)
	})
	mux.HandleFunc("POST "+peersPath+"promote", func(w http.ResponseWriter, r *http.Request) {
		n, err := c.member(r.Context())
		if err == nil {
			err = c.promote(r.Context(), n.UUID)
		}
		reply(w, nil, err)
	})
	all := Handlers{
		"rejoin": func(ctx context.Context, from Node, _ []byte) ([]byte, error) { return c.readmit(ctx, from) },
	}
	maps.Copy(all, handlers)
	for name, serve := range all {
		mux.HandleFunc("POST "+peersPath+name, func(w http.ResponseWriter, r *http.Request) {
			n, err := c.member(r.Context())
			var body, out []byte
			if err == nil {
				body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
			}
			if err == nil {
				out, err = serve(r.Context(), *n, body)
			}
			reply(w, out, err)
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if _, err := c.member(r.Context()); err != nil {
			// 410 is how etcd learns that it was removed.
			http.Error(w, err.Error(), http.StatusGone)
			return
		}
		c.server.handler.ServeHTTP(w, r)
	})
	return mux
}

// reply answers with bytes, or with an error's code and text.
func reply(w http.ResponseWriter, body []byte, err error) {
	if err != nil {
		w.Header().Set("X-Error-Code", fault.Code(err))
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	_, _ = w.Write(body)
}

// Call asks a member, over the connection that there is or a new one. Codes
// cluster_unreachable, those of channel.Dial, and
// those that the member answers with.
func (c *Cluster) Call(ctx context.Context, uuid, name string, body []byte) ([]byte, error) {
	x := c.peers.get(uuid)
	if x == nil {
		return nil, fault.New("cluster_unreachable", "the member %s is not known", uuid)
	}
	out, err := call(ctx, x.transport, name, body)
	if err == nil {
		x.heard.Store(time.Now().UnixMilli())
	}
	return out, err
}

func call(ctx context.Context, t http.RoundTripper, name string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://member"+peersPath+name, strings.NewReader(string(body)))
	if err != nil {
		return nil, err
	}
	r, err := t.RoundTrip(req)
	if fault.Code(err) != "" {
		return nil, err // says why the connection was not made
	}
	if err != nil {
		return nil, fault.Wrap(err, "cluster_unreachable", "ask a member")
	}
	defer r.Body.Close()
	out, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	if err != nil {
		return nil, fault.Wrap(err, "cluster_unreachable", "a member's answer")
	}
	if r.StatusCode != http.StatusOK {
		code := r.Header.Get("X-Error-Code")
		if code == "" {
			code = "cluster_refused"
		}
		return nil, fault.New(code, "%s", strings.TrimSpace(string(out[:min(len(out), 1000)])))
	}
	return out, nil
}
