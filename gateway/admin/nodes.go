// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/internal/fault"
)

// online is the age of a handshake from which an instance counts as away.
const online = 5 * time.Minute

func (s *Service) peers() []gateway.Node {
	if s.cfg.Peers == nil {
		return nil
	}
	return s.cfg.Peers()
}

func (s *Service) host(rt *route.Route, domain string) *api.HostInfo {
	rec := rt.Record()
	return &api.HostInfo{
		InstanceId: rec.Instance.String(), Ip: rec.Address.String(), AppId: rec.App.String(), BaseDomain: domain,
		LatestHandshake: seconds(rt.Handshake()), NumConnections: uint64(max(rt.Connections(), 0)),
		Attested: seconds(rec.Attested), LeaseUntil: seconds(rec.Until), Draining: rt.Draining(), ComposeHash: rec.Compose.String(),
	}
}

// bestDomain is that which guests are told of first.
func (s *Service) bestDomain() string {
	if d := s.cfg.Domains(); len(d) > 0 {
		return string(d[0].Name)
	}
	return ""
}

func (s *Service) status(context.Context, *empty) (*api.StatusResponse, error) {
	own, domain := s.cfg.Node(), s.bestDomain()
	out := &api.StatusResponse{
		Id: own.ID, Url: own.URL, Uuid: own.UUID[:], Trust: s.cfg.Trust, Tunnel: s.cfg.Tunnel,
		Accel: &api.ProxyAccelStatus{KtlsMode: "off", SpliceMode: "immediate"}, Authority: "private",
	}
	if s.cfg.Certificates != nil {
		out.Authority = "public"
	}
	if s.cfg.Unready != nil {
		out.Unready = s.cfg.Unready()
	}
	for _, rec := range s.cfg.Routes.Records() {
		if rt, ok := s.cfg.Routes.Instance(rec.Instance); ok {
			h := s.host(rt, domain)
			out.NumConnections += h.NumConnections
			out.Hosts = append(out.Hosts, h)
		}
	}
	if s.cfg.Public != nil {
		out.NumConnections, out.Draining = s.cfg.Public.Connections(), s.cfg.Public.Draining()
	}
	for _, n := range append([]gateway.Node{own}, s.peers()...) {
		out.Nodes = append(out.Nodes, &api.GatewayNodeInfo{
			Id: n.ID, Uuid: n.UUID[:], Url: n.URL, LastSeen: uint64(s.now().Unix()), WgPublicKey: n.Key.String(), WgIp: n.Address.Addr().String(), WgEndpoint: n.Endpoint,
		})
	}
	return out, nil
}

func (s *Service) getInfo(_ context.Context, r *api.GetInfoRequest) (*api.GetInfoResponse, error) {
	id, err := dstack.ParseInstanceID(r.Id)
	if err != nil {
		return &api.GetInfoResponse{}, nil
	}
	rt, ok := s.cfg.Routes.Instance(id)
	if !ok {
		return &api.GetInfoResponse{}, nil
	}
	return &api.GetInfoResponse{Found: true, Info: s.host(rt, s.bestDomain())}, nil
}

func (s *Service) getMeta(context.Context, *empty) (*api.GetMetaResponse, error) {
	out := &api.GetMetaResponse{}
	for _, rec := range s.cfg.Routes.Records() {
		rt, ok := s.cfg.Routes.Instance(rec.Instance)
		if !ok {
			continue
		}
		out.Registered++
		if s.now().Sub(rt.Handshake()) < online {
			out.Online++
		}
	}
	return out, nil
}

func (s *Service) exit(_ context.Context, r *api.ExitRequest) (*empty, error) {
	if s.cfg.Exit == nil {
		return nil, unavailable("this gateway cannot be ended by a call", "stop its process")
	}
	s.cfg.Exit(r.Force)
	return nil, nil
}

// node finds a gateway by its number. Code node_unknown.
func (s *Service) node(id uint32) error {
	if id == s.cfg.Node().ID || slices.ContainsFunc(s.peers(), func(n gateway.Node) bool { return n.ID == id }) {
		return nil
	}
	return fault.New("node_unknown", "there is no gateway %d", id).WithFix("Status lists them")
}

func (s *Service) setNodeURL(ctx context.Context, r *api.SetNodeUrlRequest) (*empty, error) {
	if err := s.node(r.Id); err != nil {
		return nil, err
	}
	u, err := url.Parse(r.Url)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
		return nil, fault.New("node_url", "%q is no http or https URL with a host and without a user", clip(r.Url))
	}
	return nil, settings.Put(ctx, s.cfg.Store, settings.NodeURLKey(r.Id), settings.NodeURL{URL: r.Url}, settings.Any)
}

func (s *Service) setNodeStatus(ctx context.Context, r *api.SetNodeStatusRequest) (*empty, error) {
	if r.Status != "up" && r.Status != "down" {
		return nil, fault.New("node_status", "invalid status: expected 'up' or 'down'")
	}
	if err := s.node(r.Id); err != nil {
		return nil, err
	}
	return nil, settings.Put(ctx, s.cfg.Store, settings.NodeStatusKey(r.Id), settings.NodeStatus{Down: r.Status == "down"}, settings.Any)
}

func (s *Service) getNodeStatuses(ctx context.Context, _ *empty) (*api.GetNodeStatusesResponse, error) {
	all, err := settings.Load(ctx, s.cfg.Store)
	if err != nil {
		return nil, err
	}
	out := &api.GetNodeStatusesResponse{}
	for _, n := range append([]gateway.Node{s.cfg.Node()}, s.peers()...) {
		status := "up"
		if all.Down[n.ID] {
			status = "down"
		}
		out.Statuses = append(out.Statuses, &api.NodeStatusEntry{NodeId: n.ID, Status: status})
	}
	return out, nil
}

// waveKvStatus is for upstream's scripts: our store is none of WaveKV's.
func (s *Service) waveKvStatus(ctx context.Context, _ *empty) (*api.WaveKvStatusResponse, error) {
	entries, err := s.cfg.Store.List(ctx, "")
	if err != nil {
		return nil, err
	}
	var last int64
	for _, e := range entries {
		last = max(last, e.Revision)
	}
	own := s.cfg.Node().ID
	var peers []*api.PeerSyncStatus
	for _, n := range s.peers() {
		peers = append(peers, &api.PeerSyncStatus{Id: n.ID})
	}
	return &api.WaveKvStatusResponse{
		Enabled:    s.cfg.Cluster != nil,
		Persistent: &api.StoreSyncStatus{Name: "persistent", NodeId: own, NKeys: uint64(len(entries)), NextSeq: uint64(last) + 1, WalEnabled: true, Peers: peers},
		Ephemeral:  &api.StoreSyncStatus{Name: "ephemeral", NodeId: own, NKeys: uint64(s.cfg.Routes.Len()), NextSeq: s.cfg.Routes.Version() + 1, Peers: peers},
	}, nil
}

// getInstanceHandshakes tells what this gateway saw: others are asked at theirs.
func (s *Service) getInstanceHandshakes(_ context.Context, r *api.GetInstanceHandshakesRequest) (*api.GetInstanceHandshakesResponse, error) {
	rt, err := s.instance(r.InstanceId)
	if err != nil {
		return nil, err
	}
	out := &api.GetInstanceHandshakesResponse{}
	if at := seconds(rt.Handshake()); at != 0 {
		out.Handshakes = []*api.HandshakeEntry{{ObserverNodeId: s.cfg.Node().ID, Timestamp: at}}
	}
	return out, nil
}

// getGlobalConnections tells of this gateway alone, as getInstanceHandshakes.
func (s *Service) getGlobalConnections(context.Context, *empty) (*api.GlobalConnectionsStats, error) {
	var n uint64
	if s.cfg.Public != nil {
		n = s.cfg.Public.Connections()
	}
	return &api.GlobalConnectionsStats{TotalConnections: n, NodeConnections: map[uint32]uint64{s.cfg.Node().ID: n}}, nil
}

func (s *Service) cluster() (Cluster, error) {
	if s.cfg.Cluster == nil {
		return nil, unavailable("this gateway is in no cluster", "set core.cluster.listen and core.cluster.address")
	}
	return s.cfg.Cluster, nil
}

func (s *Service) listMembers(ctx context.Context, _ *empty) (*api.ListMembersResponse, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	return c.Members(ctx)
}

func (s *Service) inviteMember(ctx context.Context, _ *empty) (*api.InviteMemberResponse, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	return c.Invite(ctx)
}

func (s *Service) joinCluster(ctx context.Context, r *api.JoinClusterRequest) (*api.ListMembersResponse, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	addr := strings.TrimSuffix(strings.TrimPrefix(r.Url, "https://"), "/")
	if addr == "" || strings.ContainsAny(addr, "/?#@ ") || !strings.Contains(addr, ":") {
		return nil, fault.New("cluster_address", "%q is no host:port of a member", clip(r.Url)).WithFix("`dstack gateway invite` at a member says it")
	}
	if r.Token == "" {
		return nil, fault.New("cluster_token", "whoever joins shows the token of an invitation").WithFix("`dstack gateway invite` at a member makes one")
	}
	if err := c.Join(ctx, addr, r.Token); err != nil {
		return nil, err
	}
	// It begins anew as a member: who there are is asked then.
	return &api.ListMembersResponse{}, nil
}

func (s *Service) removeMember(ctx context.Context, r *api.RemoveMemberRequest) (*api.ListMembersResponse, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	if err := c.Remove(ctx, r.Id); err != nil {
		return nil, err
	}
	return c.Members(ctx)
}
