// SPDX-License-Identifier: Apache-2.0

// Package admin is the administrators' RPC of a gateway: what it routes, who its members
// are, and every change that operators make while it runs. What they decide is written to
// the cluster's settings (gateway/settings); each gateway applies it from there.
//
// Guarantees: who calls has shown a credential (internal/admintoken); every change is in the
// log with who made it and how it ended, and never with a secret; no answer has a secret; a
// page of another site changes nothing; what a gateway was not given answers
// admin_unavailable and says what to configure. A change that reads and writes goes through
// only if nobody else changed the same meanwhile (state_conflict).
//
// Trusted: administrators, as far as a gateway's evidence lets anyone (they choose domains
// and close ports; they get no key and end no TLS that an app ends). Attacker-controlled:
// every request until its credential is checked.
//
// Implements spec/gateway.md §1.2 and §9; threats.md K01, K02, K10.
package admin

import (
	"context"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/internal/admintoken"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

// Certificates are those of public authorities.
type Certificates interface {
	// Renew renews the certificates of a base domain that are due, or all when forced, and
	// says whether any was, and until when all hold.
	Renew(ctx context.Context, base hostname.Name, force bool) (renewed bool, notAfter time.Time, err error)
	// Status is that of a base domain's certificates; the zero value when there is none.
	Status(base hostname.Name) CertificateStatus
	// Reload takes what another gateway stored.
	Reload(ctx context.Context, base hostname.Name) error
	// Attested are the keys that certificates of a base domain were ordered for, newest
	// first; limit 0 is as many as one answer has.
	Attested(ctx context.Context, base hostname.Name, limit int) ([]AttestedKey, error)
}

// CertificateStatus says what there is for a base domain.
type CertificateStatus struct {
	NotAfter, NotBefore time.Time // of that which ends first; zero: there is none
	Served              bool      // in memory
	Err                 string    // of the last try, or of CAA
}

// AttestedKey is a key and its evidence.
type AttestedKey struct {
	SPKI  []byte // DER
	Quote string
	At    time.Time
}

// Accounts bind the accounts at public authorities to the base domains.
type Accounts interface {
	// SetCAA makes CAA of the base domains name the accounts.
	SetCAA(ctx context.Context) error
	// RotateAccount makes a new account, and says in how many domains CAA names it.
	RotateAccount(ctx context.Context) (uri string, domains int, err error)
}

// Cluster is the gateways that agree.
type Cluster interface {
	Members(ctx context.Context) (*api.ListMembersResponse, error)
	Invite(ctx context.Context) (*api.InviteMemberResponse, error)
	Join(ctx context.Context, addr, token string) error
	Remove(ctx context.Context, id string) error
	// ReleaseLock takes the lock of a base domain's certificates from whoever holds it.
	ReleaseLock(ctx context.Context, base hostname.Name) error
}

// Public is the listener of the apps.
type Public interface {
	// Drain stops or resumes new connections.
	Drain(on bool) error
	Draining() bool
	// Connections is how many are open.
	Connections() uint64
}

// Config is what the service is made of. Parts that are nil are not configured.
type Config struct {
	Store  settings.Store // required
	Routes *route.Table   // required
	Node   func() gateway.Node
	// Peers are the other gateways.
	Peers func() []gateway.Node
	// Fixed are the base domains of the configuration file, which no call changes; Domains
	// are all as guests are told of them, the preferred first. Nil: Fixed.
	Fixed   []gateway.Domain
	Domains func() []gateway.Domain
	// CheckDomain says why nothing would certify a base domain; nil admits all.
	CheckDomain func(hostname.Name) error
	// CheckDNS says why the parameters are no credential of a DNS provider.
	CheckDNS func(provider string, params map[string]string) error
	// Directories are the public authorities of the configuration file, the first one
	// preferred.
	Directories  []string
	Certificates Certificates
	Accounts     Accounts
	Cluster      Cluster
	// CT is the watch of certificate logs; nil: there is none.
	CT     Watch
	Public Public
	// Applied is called after routes were ended here, so that the tunnel follows.
	Applied func()
	// Exit ends the gateway, at once when forced.
	Exit func(force bool)

	// Private tells of the certificate of the base domains where no public authority is;
	// nil: there is none.
	Private func() CertificateStatus
	// Unready says why a balancer should send no connections here.
	Unready func() []string

	Guard *admintoken.Guard // required
	// Pages answers what is no call, behind the guard; may be nil.
	Pages   http.Handler
	Trust   string // production or development
	Tunnel  string
	Version string
	Now     func() time.Time
	Log     *slog.Logger
}

// Watch is the watch of certificate logs (package gateway/ctwatch).
type Watch interface {
	// Response is what it found.
	Response() *api.CtStatusResponse
	// Acknowledge ends the alarms of an entry of a log.
	Acknowledge(log string, index uint64) error
}

// Service answers administrators. Make it with New.
type Service struct {
	cfg Config
	now func() time.Time
	log *slog.Logger
}

// New checks what it is given. Code gateway_config.
func New(c Config) (*Service, error) {
	if c.Store == nil || c.Routes == nil || c.Guard == nil || c.Node == nil || c.CheckDNS == nil {
		return nil, fault.New("gateway_config", "the administrators' calls need settings, routes, a node, DNS providers and a guard")
	}
	if c.Domains == nil {
		c.Domains = func() []gateway.Domain { return c.Fixed }
	}
	s := &Service{cfg: c, now: c.Now, log: c.Log}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

type empty = emptypb.Empty

// methods are all calls; change says that one changes something.
func (s *Service) methods() (all []prpc.Method, changes map[string]bool) {
	changes = map[string]bool{}
	change := func(m prpc.Method) {
		changes[m.Name] = true
		all = append(all, m)
	}
	all = []prpc.Method{
		prpc.Unary("Status", s.status),
		prpc.Unary("GetInfo", s.getInfo),
		prpc.Unary("GetMeta", s.getMeta),
		prpc.Unary("WaveKvStatus", s.waveKvStatus),
		prpc.Unary("GetInstanceHandshakes", s.getInstanceHandshakes),
		prpc.Unary("GetGlobalConnections", s.getGlobalConnections),
		prpc.Unary("GetNodeStatuses", s.getNodeStatuses),
		prpc.Unary("ListDnsCredentials", s.listDNSCredentials),
		prpc.Unary("GetDnsCredential", s.getDNSCredential),
		prpc.Unary("GetDefaultDnsCredential", s.getDefaultDNSCredential),
		prpc.Unary("ListZtDomains", s.listZtDomains),
		prpc.Unary("GetZtDomain", s.getZtDomain),
		prpc.Unary("ListCertAttestations", s.listCertAttestations),
		prpc.Unary("GetCertbotConfig", s.getCertbotConfig),
		prpc.Unary("GetInstancePortPolicy", s.getInstancePortPolicy),
		prpc.Unary("ListQuarantine", s.listQuarantine),
		prpc.Unary("CtStatus", s.ctStatus),
		prpc.Unary("ListMembers", s.listMembers),
	}
	change(prpc.Unary("Exit", s.exit))
	change(prpc.Unary("CtAcknowledge", s.ctAcknowledge))
	change(prpc.Unary("RenewCert", s.renewCert))
	change(prpc.Unary("ReloadCert", s.reloadCert))
	change(prpc.Unary("SetCaa", s.setCAA))
	change(prpc.Unary("RotateAcmeCredentials", s.rotateAcmeCredentials))
	change(prpc.Unary("SetNodeUrl", s.setNodeURL))
	change(prpc.Unary("SetNodeStatus", s.setNodeStatus))
	change(prpc.Unary("CreateDnsCredential", s.createDNSCredential))
	change(prpc.Unary("UpdateDnsCredential", s.updateDNSCredential))
	change(prpc.Unary("DeleteDnsCredential", s.deleteDNSCredential))
	change(prpc.Unary("SetDefaultDnsCredential", s.setDefaultDNSCredential))
	change(prpc.Unary("AddZtDomain", s.addZtDomain))
	change(prpc.Unary("UpdateZtDomain", s.updateZtDomain))
	change(prpc.Unary("DeleteZtDomain", s.deleteZtDomain))
	change(prpc.Unary("RenewZtDomainCert", s.renewZtDomainCert))
	change(prpc.Unary("ForceReleaseCertLock", s.forceReleaseCertLock))
	change(prpc.Unary("SetCertbotConfig", s.setCertbotConfig))
	change(prpc.Unary("SetInstancePortPolicy", s.setInstancePortPolicy))
	change(prpc.Unary("ClearInstancePortPolicy", s.clearInstancePortPolicy))
	change(prpc.Unary("Drain", s.drain))
	change(prpc.Unary("RemoveRoutes", s.removeRoutes))
	change(prpc.Unary("InviteMember", s.inviteMember))
	change(prpc.Unary("JoinCluster", s.joinCluster))
	change(prpc.Unary("RemoveMember", s.removeMember))
	return all, changes
}

// requestTime bounds a call; orders of certificates take minutes.
const requestTime = 10 * time.Minute

// Handler serves the calls at / and /prpc/, by their names and with Admin. before them, and
// the pages.
func (s *Service) Handler() http.Handler {
	methods, changes := s.methods()
	names := map[string]bool{}
	for i, m := range methods {
		names[m.Name] = true
		if changes[m.Name] {
			methods[i].Handle = s.audited(m)
		}
	}
	calls := prpc.NewMux([]string{"Admin."}, methods...)
	return s.cfg.Guard.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App-Version", s.cfg.Version)
		name := strings.TrimPrefix(path.Base(r.URL.Path), "Admin.")
		if dir := path.Dir(r.URL.Path); dir != "/prpc" && (dir != "/" || !names[name]) {
			if s.cfg.Pages == nil {
				http.NotFound(w, r)
				return
			}
			s.cfg.Pages.ServeHTTP(w, r)
			return
		}
		// A link or an image makes a browser GET with what it remembers.
		if changes[name] && r.Method == http.MethodGet && admintoken.Who(r.Context()).Ambient {
			http.Error(w, "a change is a POST", http.StatusMethodNotAllowed)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), requestTime)
		defer cancel()
		calls.ServeHTTP(w, r.WithContext(ctx))
	}))
}

// audited logs a change: who, what, of what, and how it ended.
func (s *Service) audited(m prpc.Method) func(context.Context, proto.Message) (proto.Message, error) {
	return func(ctx context.Context, req proto.Message) (proto.Message, error) {
		out, err := m.Handle(ctx, req)
		attrs := []any{"method", m.Name, "who", admintoken.Who(ctx).Name}
		for _, field := range subjects {
			if f := req.ProtoReflect().Descriptor().Fields().ByName(field); f != nil && req.ProtoReflect().Has(f) {
				attrs = append(attrs, string(field), clip(req.ProtoReflect().Get(f).String()))
			}
		}
		if err != nil {
			s.log.Warn("admin", append(attrs, "outcome", "refused", "code", fault.Code(err), "error", err)...)
		} else {
			s.log.Info("admin", append(attrs, "outcome", "done")...)
		}
		return out, err
	}
}

// subjects are the fields of requests that name what a change is of: none is a secret.
var subjects = []protoreflect.Name{"id", "url", "domain", "instance_id", "app_id", "status", "on", "force", "name", "provider_type", "acme_url"}

// clip bounds what of a request goes into a message.
func clip(s string) string {
	if len(s) > 128 {
		return strings.ToValidUTF8(s[:128], "") + "…"
	}
	return s
}

func unavailable(what, fix string) error {
	return fault.New("admin_unavailable", "%s", what).WithFix("%s", fix)
}

func seconds(t time.Time) uint64 {
	if t.Unix() <= 0 {
		return 0
	}
	return uint64(t.Unix())
}
