// SPDX-License-Identifier: Apache-2.0

// Package gateway is dstack-gateway: it lets attested instances register, carries public
// connections to them (gateway/edge) over a network of their own (gateway/tunnel), and
// gets certificates for names that they own, whose keys it never has.
//
// A registration comes over an attached attested channel, whose evidence is of that very
// connection; app, instance and manifest are taken from it and from nothing that the
// caller says, the port policy from the manifest that was measured. What follows is a
// route with a lease: it ends unless fresh evidence, and whoever authorises, renew it.
//
// Trusted: the machine that this runs in, the roots of evidence, the authority or KMS
// that admits. Attacker-controlled: every byte that a guest sends, whatever it proves to
// be; the network.
//
// Implements spec/gateway.md §1 and §3.1; threats.md K01, K03, K05, G05.
package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

// Limits of a registration, and of a request for a certificate.
const (
	maxManifest = 1 << 20 // bytes
	maxCSR      = 16 << 10
	maxNames    = 64
	// probes is how many addresses are tried for one instance.
	probes      = 64
	requestTime = 60 * time.Second
)

// Tunnel is what carries packets to instances.
type Tunnel interface {
	Set(wgconfig.Peer) error
	Remove(wgconfig.PublicKey) error
	Peers() ([]wgconfig.Status, error)
}

// Certificates makes certificates for keys that are elsewhere.
type Certificates interface {
	// Sign returns a chain, PEM, for the key of a certificate request and exactly these
	// names, and when to ask again.
	Sign(ctx context.Context, csr *x509.CertificateRequest, names []hostname.Name) (chain []byte, notAfter, renewAt time.Time, err error)
}

// CustomCertificates makes certificates for keys that are elsewhere and domains that are
// not the gateway's.
type CustomCertificates interface {
	// SignCustom returns what Certificates.Sign does. Orders count to owner.
	SignCustom(ctx context.Context, csr *x509.CertificateRequest, name hostname.Name, owner string) (chain []byte, notAfter, renewAt time.Time, err error)
}

// Domain is a base domain, and the port at which its names are reached.
type Domain struct {
	Name hostname.Name
	Port uint16
}

// Node is a gateway as guests are told of it.
type Node struct {
	ID       uint32
	UUID     [16]byte
	URL      string // of its RPC
	Key      wgconfig.PublicKey
	Address  netip.Prefix // in the tunnel, with the network's length
	Endpoint string       // host:port of WireGuard
}

// Config is what a service is made of.
type Config struct {
	Judge     *applicant.Judge // of guests' evidence
	Self      channel.Attester // makes the gateway's own
	Admission Admission        // required: the zero value admits nobody
	Routes    *route.Table
	Tunnel    Tunnel
	// Certificates makes those of apps; nil: there are none.
	Certificates Certificates
	// Custom makes those of apps' own domains, of which Leads says where TXT leads them
	// now; nil: there are none.
	Custom CustomCertificates
	Leads  func(context.Context, hostname.Name) (hostname.Answer, error)
	// AcmeInfo tells the accounts and keys at public authorities; nil: there are none.
	AcmeInfo func(context.Context) (*api.AcmeInfoResponse, error)
	// Domains are the base domains, the preferred first.
	Domains func() []Domain
	Node    Node
	// Peers are the other gateways that are up; may be nil.
	Peers func() []Node
	// Told returns a gateway as guests are told of it, and whether they are: operators can
	// change both. Nil: as it is.
	Told func(Node) (Node, bool)
	// Closed says why this gateway takes no instance that it does not know; nil, or nothing:
	// it does.
	Closed func() error
	// Upstream, if not nil, lets upstream's guests register by certificate.
	Upstream  *Upstream
	TXTPrefix string // what guests are told; "" is upstream's

	Lease time.Duration // of a route, at most; 1 h
	// Certificate is for strangers, who get no evidence: what `Info` says is not secret.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Version     string
	Now         func() time.Time
	Log         *slog.Logger
}

// Service answers guests. Make it with New.
type Service struct {
	cfg   Config
	now   func() time.Time
	log   *slog.Logger
	slots chan struct{}
	// applied tells Keep that the table changed without a registration here.
	applied chan struct{}

	// registering keeps what one instance does in order; most others go on.
	registering [64]sync.Mutex
	stats       Stats
	fetches     fetches

	// endpoints are where peers were last heard of; of Restore and then Keep alone.
	endpoints map[wgconfig.PublicKey]netip.AddrPort
}

// Stats are counts since the start.
type Stats struct {
	Registered, Renewed, Refused, Certificates, Handshakes atomic.Uint64
	Certified                                              atomic.Uint64 // of the registered and renewed: by certificate only
}

// New checks what it is given. Code gateway_config.
func New(c Config) (*Service, error) {
	if c.Judge == nil || c.Self == nil || c.Admission == nil || c.Routes == nil || c.Tunnel == nil || c.Domains == nil || c.Certificate == nil {
		return nil, fault.New("gateway_config", "a gateway needs a judge, evidence of its own, admission, routes, a tunnel, domains and a certificate")
	}
	if c.Node.Key.IsZero() || !c.Node.Address.Addr().Is4() || c.Node.Endpoint == "" {
		return nil, fault.New("gateway_config", "a gateway needs a WireGuard key, an IPv4 address in its network and an endpoint that guests reach")
	}
	if c.Lease == 0 {
		c.Lease = time.Hour
	}
	if c.TXTPrefix == "" {
		c.TXTPrefix = hostname.TXTPrefix
	}
	s := &Service{cfg: c, now: c.Now, log: c.Log, slots: make(chan struct{}, 2*runtime.GOMAXPROCS(0)), applied: make(chan struct{}, 1)}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.fetches.init()
	if u := c.Upstream; u != nil {
		if len(u.CA) == 0 || u.Certificate == nil || u.Dial == nil {
			return nil, fault.New("gateway_config", "upstream's guests need the KMS that vouches for them, a certificate of it, and a way to ask them")
		}
		s.log.Warn("upstream's guests register by certificate only, which shows no evidence of whoever has its key (core.upstream_guests)")
	}
	return s, nil
}

// Stats returns the counts.
func (s *Service) Stats() *Stats { return &s.stats }

// Handler serves the RPC of guests. Their connection must be in the context (Serve).
func (s *Service) Handler() http.Handler {
	methods := []prpc.Method{
		prpc.Unary("RegisterCvm", s.register),
		prpc.Unary("GetCertificate", s.certificate),
		prpc.Unary("Info", s.info),
		prpc.Unary("AcmeInfo", func(ctx context.Context, _ *emptypb.Empty) (*api.AcmeInfoResponse, error) {
			if s.cfg.AcmeInfo == nil {
				return &api.AcmeInfoResponse{}, nil
			}
			return s.cfg.AcmeInfo(ctx)
		}),
		prpc.Unary("GetPeers", s.peers),
	}
	mux := http.NewServeMux()
	mux.Handle("/prpc/", prpc.NewMux([]string{"Gateway.", "Tproxy."}, methods...))
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "OK") })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App-Version", s.cfg.Version)
		ctx, cancel := context.WithTimeout(r.Context(), requestTime)
		defer cancel()
		mux.ServeHTTP(w, r.WithContext(ctx))
	})
}

// Serve answers on l, which it owns, until ctx ends.
func (s *Service) Serve(ctx context.Context, l net.Listener) error {
	secure, err := channel.NewListener(l, &channel.Config{
		Appraiser: appraiser{s}, Attester: s.cfg.Self, Now: s.now,
		Other: s.otherTLS(),
		Refused: func(remote net.Addr, err error) {
			s.stats.Handshakes.Add(1)
			s.log.Info("connection refused", "remote", remote.String(), "code", fault.Code(err), "error", err)
		},
	})
	if err != nil {
		l.Close()
		return err
	}
	server := prpc.Server(s.Handler())
	server.ErrorLog = slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)
	server.BaseContext = func(net.Listener) context.Context { return context.WithoutCancel(ctx) }
	server.ConnContext = s.connContext
	defer s.fetches.end()
	done := make(chan error, 1)
	go func() { done <- server.Server.Serve(secure) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err = server.Shutdown(stop); err != nil {
		server.Close()
	}
	<-done
	return nil
}

// appraiser takes any guest whose evidence holds: whether it gets a route is Admission's.
type appraiser struct{ s *Service }

func (a appraiser) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	select { // verification is bound by the processor: more at once would only make all slower
	case a.s.slots <- struct{}{}:
		defer func() { <-a.s.slots }()
	case <-ctx.Done():
		return nil, fault.New("busy", "the gateway is busy")
	}
	who, err := a.s.cfg.Judge.Judge(ctx, applicant.Evidence{Container: c.Container, ReportData: c.ReportData, Session: true})
	if err != nil {
		return nil, err
	}
	return who.Appraisal(), nil
}

// caller is the instance at the other end. Codes register_unattested, register_no_instance,
// register_booting.
func (s *Service) caller(ctx context.Context) (*channel.Peer, *applicant.Applicant, error) {
	peer, err := channel.PeerOf(ctx)
	if err != nil {
		return nil, nil, fault.Wrap(err, "register_unattested", "no attestation provided").
			WithFix("register over an attested channel (ALPN %s): a certificate alone shows no fresh evidence", channel.ALPN)
	}
	who, ok := peer.Detail.(*applicant.Applicant)
	switch {
	case !ok:
		return nil, nil, fault.New("register_unattested", "no attestation provided")
	case peer.Identity.InstanceID == nil:
		return nil, nil, fault.New("register_no_instance", "an instance without an id has no route of its own").WithFix("deploy the app without no_instance_id")
	case who.Booting:
		return nil, nil, fault.New("register_booting", "the guest has not finished booting: nothing runs there yet")
	}
	return peer, who, nil
}

func (s *Service) register(ctx context.Context, r *api.RegisterCvmRequest) (*api.RegisterCvmResponse, error) {
	out, err := s.admit(ctx, r)
	if err != nil {
		s.stats.Refused.Add(1)
		s.log.Info("registration refused", "code", fault.Code(err), "error", err)
	}
	return out, err
}

// admit makes or renews the caller's route. Codes of caller, Admission and route.Table;
// wg_key, register_manifest, register_addresses (no address is free).
func (s *Service) admit(ctx context.Context, r *api.RegisterCvmRequest) (*api.RegisterCvmResponse, error) {
	who, err := s.registrant(ctx)
	if err != nil {
		return nil, err
	}
	key, err := wgconfig.ParsePublicKey(r.ClientPublicKey)
	if err != nil {
		return nil, err
	}
	var policy *portpolicy.Policy
	var domains []route.Domain
	if certified := who.info != nil; !certified || len(r.AppCompose) > 0 {
		if policy, domains, err = measuredPolicy(r.AppCompose, who.identity.ComposeHash); err != nil {
			return nil, err
		}
	}
	now := s.now()
	until, err := s.admission(ctx, who, Lease{r.LeaseDocument, r.LeaseSignature}, now)
	if err != nil {
		var no *Denied
		if errors.As(err, &no) {
			s.revoke(who.identity, key)
		}
		return nil, err
	}
	// The evidence is the connection's, and as old as it: a guest that keeps one open gets
	// nothing newer by asking again (threats.md K03).
	if most := who.at.Add(s.cfg.Lease); until.After(most) {
		until = most
	}
	rec := route.Record{
		App: who.identity.AppID, Instance: *who.identity.InstanceID, Compose: who.identity.ComposeHash,
		Key: key, Policy: policy, Domains: domains, Attested: who.at, Until: until, CertificateOnly: who.info != nil,
	}
	lock := &s.registering[int(rec.Instance[0])%len(s.registering)]
	lock.Lock()
	defer lock.Unlock()
	before, known := s.cfg.Routes.Instance(rec.Instance)
	if !known && s.cfg.Closed != nil {
		if err := s.cfg.Closed(); err != nil {
			return nil, err
		}
	}
	var was route.Record
	if known {
		was = before.Record()
	}
	if rec.CertificateOnly {
		rec.Attested = later(rec.Attested, was)
	}
	if rec.CertificateOnly && rec.Policy == nil {
		if rec.Policy, err = reportedPolicy(r.PortPolicy, was, rec.Compose); err != nil {
			return nil, err
		}
	}
	rt, err := s.place(rec, was)
	if err != nil {
		return nil, err
	}
	rec = rt.Record()
	if !known || was.Key != rec.Key || was.Address != rec.Address {
		if known && was.Key != rec.Key {
			if err := s.cfg.Tunnel.Remove(was.Key); err != nil {
				return nil, err
			}
		}
		if err := s.cfg.Tunnel.Set(wgconfig.Peer{Key: rec.Key, Address: rec.Address}); err != nil {
			s.cfg.Routes.Remove(rec.Instance) // not half a route
			return nil, err
		}
		s.stats.Registered.Add(1)
		s.log.Info("route", "app", rec.App.String(), "instance", rec.Instance.String(), "address", rec.Address.String(), "until", rec.Until)
	} else {
		s.stats.Renewed.Add(1)
	}
	if rec.CertificateOnly {
		s.stats.Certified.Add(1)
		s.log.Warn("certificate only: no evidence of this connection was shown", "app", rec.App.String(), "instance", rec.Instance.String(), "until", rec.Until)
		if rec.Policy == nil {
			s.fetch(rec)
		}
	}
	return s.reply(rec), nil
}

// revoke ends the route of who is denied now. It is the same instance, for who has its
// id alone would end another's.
func (s *Service) revoke(id channel.Identity, key wgconfig.PublicKey) {
	lock := &s.registering[int(id.InstanceID[0])%len(s.registering)]
	lock.Lock()
	defer lock.Unlock()
	rt, known := s.cfg.Routes.Instance(*id.InstanceID)
	if !known {
		return
	}
	if rec := rt.Record(); rec.App != id.AppID || rec.Compose != id.ComposeHash || rec.Key != key {
		return
	}
	s.cfg.Routes.Remove(*id.InstanceID)
	if err := s.cfg.Tunnel.Remove(key); err != nil {
		s.log.Warn("tunnel", "code", fault.Code(err), "error", err) // Keep tries again
	}
	s.log.Info("route revoked", "app", id.AppID.String(), "instance", id.InstanceID.String())
}

// place registers a record at the address that the instance has already, or else at the
// first free one of those that follow from its id, so that gateways mostly agree.
func (s *Service) place(rec, was route.Record) (*route.Route, error) {
	if was.Address.IsValid() {
		rec.Address = was.Address
		return s.cfg.Routes.Register(rec)
	}
	for i := range probes {
		a, ok := addressOf(s.cfg.Node.Address.Masked(), rec.Instance, i)
		if !ok || s.gatewaysOwn(a) {
			continue
		}
		rec.Address = a
		rt, err := s.cfg.Routes.Register(rec)
		if fault.Code(err) != "route_address_taken" {
			return rt, err
		}
	}
	return nil, fault.New("register_addresses", "no free address was found in %s", s.cfg.Node.Address.Masked()).WithFix("give the gateway a larger network")
}

// gatewaysOwn reports whether an address is a gateway's, or is kept for one: the first 256
// of a network, or a sixteenth of a small one.
func (s *Service) gatewaysOwn(a netip.Addr) bool {
	network := s.cfg.Node.Address
	first, at := network.Masked().Addr().As4(), a.As4()
	offset := binary.BigEndian.Uint32(at[:]) - binary.BigEndian.Uint32(first[:])
	if uint64(offset) < min(256, uint64(1)<<(32-network.Bits())/16) || a == network.Addr() {
		return true
	}
	return slices.ContainsFunc(s.allOthers(), func(n Node) bool { return n.Address.Addr() == a })
}

// addressOf is the n-th address to try for an instance: a host of the network by the
// SHA-256 of a tag, the instance's id and n.
func addressOf(network netip.Prefix, id dstack.InstanceID, n int) (netip.Addr, bool) {
	h := sha256.New()
	h.Write([]byte("dstack-gateway-address-v1"))
	h.Write(id[:])
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(n)))
	base := network.Addr().As4()
	host := binary.BigEndian.Uint32(h.Sum(nil)) >> network.Bits()
	if network.Bits() == 0 {
		host = binary.BigEndian.Uint32(h.Sum(nil))
	}
	a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(base[:])|host)))
	return a, wgconfig.Inside(network, a)
}

// measuredPolicy is the port policy, and the custom domains, of the manifest with the
// hash. Code register_manifest.
func measuredPolicy(text []byte, hash dstack.ComposeHash) (*portpolicy.Policy, []route.Domain, error) {
	switch {
	case len(text) == 0:
		return nil, nil, fault.New("register_manifest", "the app's manifest is missing: its ports are not known")
	case len(text) > maxManifest:
		return nil, nil, fault.New("register_manifest", "the manifest has %d bytes, more than %d", len(text), maxManifest)
	case sha256.Sum256(text) != hash:
		return nil, nil, fault.New("register_manifest", "the manifest is not the one that the instance measured (%s)", hash)
	}
	m, err := manifest.Parse(text)
	if err != nil {
		return nil, nil, fault.Wrap(err, "register_manifest", "the app's manifest")
	}
	p, err := portpolicy.New(m.PortPolicy)
	if err != nil {
		return nil, nil, err
	}
	var domains []route.Domain
	for _, c := range m.CustomDomains {
		name, err := hostname.ParseName(c.Domain)
		if err != nil {
			return nil, nil, fault.Wrap(err, "register_manifest", "the app's custom domains")
		}
		domains = append(domains, route.Domain{Name: name, Port: c.Port})
	}
	return &p, domains, nil
}

func (s *Service) reply(rec route.Record) *api.RegisterCvmResponse {
	nodes := append([]Node{s.self()}, s.others()...)
	out := &api.RegisterCvmResponse{
		Wg:         &api.WireGuardConfig{ClientIp: rec.Address.String()},
		Agent:      &api.GuestAgentConfig{InternalPort: portpolicy.AgentPort, AppAddressNsPrefix: s.cfg.TXTPrefix},
		LeaseUntil: uint64(rec.Until.Unix()),
	}
	for _, d := range s.cfg.Domains() {
		if out.Agent.Domain == "" {
			out.Agent.Domain, out.Agent.ExternalPort = string(d.Name), uint32(d.Port)
		}
		out.Domains = append(out.Domains, string(d.Name))
	}
	for _, n := range nodes {
		out.Wg.Servers = append(out.Wg.Servers, &api.WireGuardPeer{Pk: n.Key.String(), Ip: n.Address.String(), Endpoint: n.Endpoint})
		out.Gateways = append(out.Gateways, &api.GatewayNodeInfo{
			Id: n.ID, Uuid: n.UUID[:], Url: n.URL, LastSeen: uint64(s.now().Unix()), WgPublicKey: n.Key.String(), WgIp: n.Address.Addr().String(), WgEndpoint: n.Endpoint,
		})
	}
	return out
}

// self is this gateway as guests are told of it: by whom they are told they know already.
func (s *Service) self() Node {
	if s.cfg.Told == nil {
		return s.cfg.Node
	}
	n, _ := s.cfg.Told(s.cfg.Node)
	return n
}

// others are the gateways that guests are told of beside this one.
func (s *Service) others() []Node {
	var out []Node
	for _, n := range s.allOthers() {
		told := true
		if s.cfg.Told != nil {
			n, told = s.cfg.Told(n)
		}
		if told {
			out = append(out, n)
		}
	}
	return out
}

func (s *Service) allOthers() []Node {
	if s.cfg.Peers == nil {
		return nil
	}
	return s.cfg.Peers()
}

func (s *Service) info(context.Context, *emptypb.Empty) (*api.InfoResponse, error) {
	out := &api.InfoResponse{AppAddressNsPrefix: s.cfg.TXTPrefix, Version: s.cfg.Version}
	if d := s.cfg.Domains(); len(d) > 0 {
		out.BaseDomain, out.ExternalPort = string(d[0].Name), uint32(d[0].Port)
	}
	return out, nil
}

func (s *Service) peers(context.Context, *emptypb.Empty) (*api.GetPeersResponse, error) {
	self := s.self()
	out := &api.GetPeersResponse{MyId: self.ID, MyUrl: self.URL}
	for _, n := range append([]Node{self}, s.others()...) {
		out.Peers = append(out.Peers, &api.PeerInfo{Id: n.ID, Url: n.URL})
	}
	return out, nil
}

// certificate gets one for the key of the caller's own channel and names that are its
// own: on base domains, or one custom domain. Codes of caller; certificate_request,
// certificate_key, certificate_name, certificate_none (this gateway makes none), those of
// ownDomain, those of Certificates and CustomCertificates.
func (s *Service) certificate(ctx context.Context, r *api.GetCertificateRequest) (*api.GetCertificateResponse, error) {
	peer, _, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	if s.cfg.Certificates == nil {
		return nil, fault.New("certificate_none", "this gateway makes no certificates")
	}
	if len(r.Csr) > maxCSR {
		return nil, fault.New("certificate_request", "the certificate request has %d bytes, more than %d", len(r.Csr), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(r.Csr)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return nil, fault.Wrap(err, "certificate_request", "the certificate request")
	}
	if !bytes.Equal(csr.RawSubjectPublicKeyInfo, peer.SPKI) {
		return nil, fault.New("certificate_key", "the request is for another key than this channel's, which the guest's init committed to")
	}
	var chain []byte
	var notAfter, renewAt time.Time
	names, custom, err := s.names(csr)
	switch {
	case err != nil:
		return nil, err
	case custom:
		if err := s.ownDomain(ctx, names[0], peer.Identity); err != nil {
			s.log.Info("certificate refused", "app", peer.Identity.AppID.String(), "domain", names[0], "code", fault.Code(err), "error", err)
			return nil, err
		}
		chain, notAfter, renewAt, err = s.cfg.Custom.SignCustom(ctx, csr, names[0], peer.Identity.AppID.String())
	default:
		if err := s.ownNames(names, peer.Identity); err != nil {
			return nil, err
		}
		chain, notAfter, renewAt, err = s.cfg.Certificates.Sign(ctx, csr, names)
	}
	if err != nil {
		s.log.Warn("certificate", "app", peer.Identity.AppID.String(), "code", fault.Code(err), "error", err)
		return nil, err
	}
	s.stats.Certificates.Add(1)
	s.log.Info("certificate", "app", peer.Identity.AppID.String(), "instance", peer.Identity.InstanceID.String(), "names", len(names), "not_after", notAfter)
	return &api.GetCertificateResponse{Chain: string(chain), NotAfter: uint64(notAfter.Unix()), RenewAt: uint64(renewAt.Unix())}, nil
}

// names are the names of a request: forms on base domains, or one custom domain.
func (s *Service) names(csr *x509.CertificateRequest) (names []hostname.Name, custom bool, err error) {
	if len(csr.DNSNames) == 0 || len(csr.DNSNames) > maxNames || len(csr.IPAddresses)+len(csr.EmailAddresses)+len(csr.URIs) > 0 {
		return nil, false, fault.New("certificate_name", "a request names 1 to %d hosts and nothing else", maxNames)
	}
	rules := s.rules()
	for _, text := range csr.DNSNames {
		name, err := hostname.ParseName(text)
		if err != nil {
			return nil, false, fault.Wrap(err, "certificate_name", "the request's name %q", text)
		}
		if _, parent := name.Split(); parent == "" {
			return nil, false, fault.New("certificate_name", "the request's name %s lies in no domain", name)
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
		if !slices.ContainsFunc(rules.Bases, func(base hostname.Name) bool {
			return name == base || strings.HasSuffix(string(name), "."+string(base))
		}) {
			custom = true
		}
	}
	if custom && len(names) > 1 {
		return nil, false, fault.New("certificate_name", "a certificate for a custom domain is for that alone")
	}
	return names, custom, nil
}

func (s *Service) rules() hostname.Rules {
	rules := hostname.Rules{}
	for _, d := range s.cfg.Domains() {
		rules.Bases = append(rules.Bases, d.Name)
	}
	return rules
}

// ownNames reports whether each name leads to the identity. Code certificate_name.
func (s *Service) ownNames(names []hostname.Name, id channel.Identity) error {
	rules := s.rules()
	for _, name := range names {
		d, err := rules.Resolve(name)
		if err != nil {
			return fault.Wrap(err, "certificate_name", "the request's name %s", name)
		}
		if d.Kind != hostname.App || !isOf(d.ID, id) {
			return fault.New("certificate_name", "%s does not lead to app %s", name, id.AppID)
		}
	}
	return nil
}

// isOf reports whether an id of a name is the identity's app or instance.
func isOf(text hostname.ID, id channel.Identity) bool {
	b, ok := text.Bytes()
	return ok && (b == id.AppID || id.InstanceID != nil && b == *id.InstanceID)
}

// ownDomain reports whether a custom domain is one of the caller's measured manifest, with
// which it registered here, and leads to the caller. Codes certificate_none,
// certificate_route (not registered), certificate_domain (not in the list), certificate_txt
// (it leads elsewhere), those of Leads.
func (s *Service) ownDomain(ctx context.Context, name hostname.Name, id channel.Identity) error {
	if s.cfg.Custom == nil || s.cfg.Leads == nil {
		return fault.New("certificate_none", "this gateway makes no certificates for custom domains")
	}
	rt, ok := s.cfg.Routes.Instance(*id.InstanceID)
	if !ok {
		return fault.New("certificate_route", "the instance is not registered here")
	}
	rec := rt.Record()
	if rec.App != id.AppID || rec.Compose != id.ComposeHash {
		return fault.New("certificate_route", "the instance registered with another manifest")
	}
	i := slices.IndexFunc(rec.Domains, func(d route.Domain) bool { return d.Name == name })
	if i < 0 {
		return fault.New("certificate_domain", "%s is not in custom_domains of the app's manifest", name)
	}
	a, err := s.cfg.Leads(ctx, name)
	if err != nil {
		return err
	}
	if !isOf(a.ID, id) || a.Port != rec.Domains[i].Port {
		return fault.New("certificate_txt", "the TXT record of %s does not lead to port %d of app %s", name, rec.Domains[i].Port, id.AppID).
			WithFix("set %s.%s to %s:%d", s.cfg.TXTPrefix, name, id.AppID, rec.Domains[i].Port)
	}
	return nil
}
