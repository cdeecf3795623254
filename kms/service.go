// SPDX-License-Identifier: Apache-2.0

// Package kms is dstack-kms: it gives apps their keys, if their machines prove what
// they run and an authority allows it, and nobody else.
//
// A request goes one way: limits, evidence (governance/applicant), this KMS's own
// authorisation, the authority's decision (package governance), derivation
// (keys/custody), the release log (package releaselog), the reply. What cannot be
// written to the log is not given. Every refusal has a code.
//
// Trusted: the machine that this runs in, the custodian, the authority's keys.
// Attacker-controlled: every byte that a caller sends, whatever his certificate says;
// the network; the clock of the host. Nothing that a caller chose reaches a path, a
// URL or a program.
//
// Upstream's clients work unchanged; what is ours beside them has field numbers from
// 1000 on (api/kms). Two listeners share a port: TLS as upstream's clients speak it,
// with evidence in the client's certificate (RA-TLS), and attested channels (package
// channel), whose evidence is of this very connection.
//
// Implements spec/kms.md; design.md §7; threats.md A01, C01 to C04, G01, G02, G04, G05,
// G08 to G13, J07.
package kms

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/releaselog"
)

// Limits of a service; DefaultLimits has what New takes for a zero value.
type Limits struct {
	// Certificate is the longest validity of a certificate of an app.
	Certificate time.Duration
	// Lease is the longest lease, and what an authority that names none gives.
	Lease time.Duration
	// PeerRate and AppRate are requests a second of one address (IPv6: one /64) and of
	// one app, with bursts of twice as many.
	PeerRate, AppRate float64
}

// DefaultLimits returns the limits of a KMS that is told none.
func DefaultLimits() Limits {
	return Limits{Certificate: 30 * 24 * time.Hour, Lease: time.Hour, PeerRate: 20, AppRate: 10}
}

// Exporter gives the root keys to another custodian.
type Exporter interface {
	Export() (*kmsapi.KmsKeys, error)
}

// Policies is an authority whose document can be read and replaced by whoever has
// signatures for a newer one.
type Policies interface {
	Signed() []byte
	Update(signed []byte) error
}

// Eraser makes the keys of epochs underivable.
type Eraser interface {
	// Epochs are the first and the last native epoch; zero: there are none.
	Epochs() (first, last uint64)
	EraseBefore(epoch uint64) error
}

// Config is what a service is made of.
type Config struct {
	Custodian custody.Custodian
	Authority governance.Authority
	Judge     *applicant.Judge
	Log       *releaselog.Log
	// Exporter gives the roots to other KMSs that the authority allows; nil: to none.
	Exporter Exporter
	// KeyBoundReplication gives them on evidence about a TLS key, too, as upstream's
	// replicas show it: whoever copied that key can do the same.
	KeyBoundReplication bool
	// Policies, if any, is the authority's document.
	Policies Policies
	// Eraser, if any, erases the epochs before the oldest that the authority gives. That
	// cannot be undone: it is for an authority whose oldest epoch never falls.
	Eraser Eraser
	// TempCA is the authority of client certificates, whose key everybody is given.
	TempCA *certificate.Authority
	// TempCAKey is that key, PEM of PKCS #8: no secret.
	TempCAKey []byte
	// Names are the DNS names and addresses of this KMS; at least one.
	Names []string
	// Self makes this KMS's own evidence. Nil says that it runs in no TEE, which New
	// refuses unless Development is set.
	Self channel.Attester
	// VMConfig is what belongs to that evidence.
	VMConfig string
	// Development admits evidence under development roots, and a KMS outside of a TEE.
	Development bool
	// Bootstrap is what bootstrapping left, for GetMeta; may be nil.
	Bootstrap *kmsapi.BootstrapResponse
	// Version is what replies say in X-App-Version.
	Version string
	Limits  Limits
	Logger  *slog.Logger
	Now     func() time.Time
}

// Service answers upstream's KMS service, and ours.
type Service struct {
	cfg     Config
	now     func() time.Time
	log     *slog.Logger
	root    *certificate.Authority // this KMS's certificate of the root CA
	limits  limiter
	self    self
	metrics metrics
	ratchet ratchet
	// identity, of the first moment.
	identity custody.Identity
}

// New checks what it is given and makes the root's certificate. Code kms_config.
func New(c Config) (*Service, error) {
	bad := func(what string) (*Service, error) { return nil, fault.New("kms_config", "KMS: %s", what) }
	switch {
	case c.Custodian == nil:
		return bad("there is no custodian of its keys")
	case c.Authority == nil:
		return bad("there is no authority, so nobody would be given anything")
	case c.Judge == nil || c.Log == nil || c.TempCA == nil:
		return bad("the judge of evidence, the release log or the temporary CA is missing")
	case len(c.Names) == 0:
		return bad("it has no name")
	case c.Self == nil && !c.Development:
		return bad("it runs in no TEE")
	case c.Judge.Development && !c.Development:
		return bad("development roots need development trust")
	}
	d := DefaultLimits()
	for _, l := range []struct{ set, otherwise *time.Duration }{{&c.Limits.Certificate, &d.Certificate}, {&c.Limits.Lease, &d.Lease}} {
		if *l.set <= 0 {
			*l.set = *l.otherwise
		}
	}
	for _, l := range []struct{ set, otherwise *float64 }{{&c.Limits.PeerRate, &d.PeerRate}, {&c.Limits.AppRate, &d.AppRate}} {
		if *l.set <= 0 {
			*l.set = *l.otherwise
		}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Service{cfg: c, now: c.Now, log: c.Logger, identity: c.Custodian.Identity()}
	// A guest whose launch committed to another key provider has nothing to get here.
	c.Judge.Provider = s.identity.CA
	s.limits.init(c.Limits, c.Now)
	var err error
	if s.root, err = certificate.Self(c.Custodian.CA(), rootSubject, ratls.Issued{}, nil, s.now()); err != nil {
		return nil, fault.Wrap(err, "kms_config", "make the root's certificate")
	}
	return s, nil
}

// Subjects of upstream's certificates (kms.md §2.2).
var (
	rootSubject  = certificate.Subject{Organization: "Dstack", Name: "Dstack KMS CA", Path: 1}
	tempSubject  = certificate.Subject{Organization: "Dstack", Name: "Dstack Client Temp CA"}
	appCASubject = certificate.Subject{Organization: "Dstack", Name: "Dstack App CA"}
)

// NewTempCA makes the certificate of a temporary CA; nil makes a key, too.
func NewTempCA(key *ecdsa.PrivateKey, now time.Time) (ca *certificate.Authority, keyPEM []byte, err error) {
	if key == nil {
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, nil, err
		}
	}
	if keyPEM, err = derive.PEM(key); err != nil {
		return nil, nil, err
	}
	ca, err = certificate.Self(key, tempSubject, ratls.Issued{}, nil, now)
	return ca, keyPEM, err
}

// Identity is the public half of the roots.
func (s *Service) Identity() custody.Identity { return s.identity }

// RootPEM is this KMS's certificate of the root CA; those of its replicas differ, and
// the key is the same.
func (s *Service) RootPEM() string { return s.root.PEM() }

func (s *Service) getMeta(ctx context.Context, _ *emptypb.Empty) (*kmsapi.GetMetaResponse, error) {
	about, err := s.cfg.Authority.About(ctx)
	if err != nil {
		return nil, unanswered(err)
	}
	dev := about.Dev || s.cfg.Development
	out := &kmsapi.GetMetaResponse{
		CaCert: s.RootPEM(), AllowAnyUpgrade: dev, IsDev: dev, K256Pubkey: s.identity.K256, BootstrapInfo: s.cfg.Bootstrap,
		LogHead: s.cfg.Log.Head().Wire(),
	}
	for _, f := range []struct {
		to   **string
		text string
	}{{&out.GatewayAppId, about.GatewayAppID}, {&out.KmsContractAddress, about.Contract}, {&out.AppAuthImplementation, about.Implementation}} {
		if f.text != "" {
			*f.to = &f.text
		}
	}
	if about.ChainID != 0 {
		out.ChainId = &about.ChainID
	}
	return out, nil
}

// unanswered is the refusal of a KMS whose authority gave no answer.
func unanswered(err error) error {
	code := fault.Code(err)
	if code == "" {
		code = "authority_unavailable"
	}
	return fault.Wrap(err, code, "the authority gives no answer").WithFix("see the KMS's log, and whether its authority can be reached")
}

func (s *Service) getTempCA(ctx context.Context, _ *emptypb.Empty) (*kmsapi.GetTempCaCertResponse, error) {
	if err := s.authorised(ctx); err != nil {
		return nil, err
	}
	return &kmsapi.GetTempCaCertResponse{TempCaCert: s.cfg.TempCA.PEM(), TempCaKey: string(s.cfg.TempCAKey), CaCert: s.RootPEM(), LogHead: s.cfg.Log.Head().Wire()}, nil
}

// appID reads an app id of exactly 20 bytes.
func appID(b []byte) (dstack.AppID, error) {
	if len(b) != dstack.AppIDSize {
		return dstack.AppID{}, fault.New("app_id_length", "app_id must be 20 bytes")
	}
	return dstack.AppID(b), nil
}

func (s *Service) getEnvKey(ctx context.Context, r *kmsapi.AppId) (*kmsapi.PublicKeyResponse, error) {
	if err := s.authorised(ctx); err != nil {
		return nil, err
	}
	app, err := appID(r.AppId)
	if err != nil {
		return nil, err
	}
	key, err := s.cfg.Custodian.EnvKey(ctx, custody.Scope{App: app})
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	public, err := envelope.PublicKey(key)
	if err != nil {
		return nil, err
	}
	at := uint64(s.now().Unix())
	sign := func(m ...[]byte) ([]byte, error) { return s.cfg.Custodian.Sign(ctx, m...) }
	v0, v1, err := envelope.SignKey(sign, app, public, at)
	if err != nil {
		return nil, err
	}
	return &kmsapi.PublicKeyResponse{PublicKey: public, Signature: v0, SignatureV1: v1, Timestamp: at, LogHead: s.cfg.Log.Head().Wire()}, nil
}

func (s *Service) getLogHead(context.Context, *emptypb.Empty) (*kmsapi.LogHead, error) {
	return s.cfg.Log.Head().Wire(), nil
}

func (s *Service) getLogConsistency(_ context.Context, r *kmsapi.LogConsistencyRequest) (*kmsapi.LogConsistencyResponse, error) {
	proof, head, err := s.cfg.Log.Consistency(r.From, r.To)
	if err != nil {
		return nil, err
	}
	return &kmsapi.LogConsistencyResponse{Head: head.Wire(), Proof: proof}, nil
}

func (s *Service) getLogEntries(_ context.Context, r *kmsapi.LogEntriesRequest) (*kmsapi.LogEntriesResponse, error) {
	entries, head, err := s.cfg.Log.Entries(r.Start, r.Count)
	if err != nil {
		return nil, err
	}
	return &kmsapi.LogEntriesResponse{Head: head.Wire(), Entries: entries}, nil
}

func (s *Service) getPolicy(context.Context, *emptypb.Empty) (*kmsapi.Policy, error) {
	if s.cfg.Policies == nil {
		return nil, fault.New("policy_absent", "this KMS decides by no policy document")
	}
	return &kmsapi.Policy{Signed: s.cfg.Policies.Signed()}, nil
}

// updatePolicy takes a newer document from anyone: its signatures are its authority.
func (s *Service) updatePolicy(ctx context.Context, r *kmsapi.Policy) (*kmsapi.Policy, error) {
	if s.cfg.Policies == nil {
		return nil, fault.New("policy_absent", "this KMS decides by no policy document")
	}
	before, _ := s.cfg.Authority.About(ctx) // an error: none is in force
	if err := s.cfg.Policies.Update(r.Signed); err != nil {
		return nil, err
	}
	about, err := s.cfg.Authority.About(ctx)
	if err != nil {
		return nil, unanswered(err)
	}
	// Anyone may submit the one in force again; that is no event to fill the log with.
	if about.By == before.By {
		return s.getPolicy(ctx, nil)
	}
	s.log.Info("policy", "by", about.By)
	if _, err := s.append(ctx, releaselog.Entry{Kind: releaselog.Policy, By: about.By}); err != nil {
		return nil, err
	}
	return s.getPolicy(ctx, nil)
}

// append writes one entry; what is not written does not happen.
func (s *Service) append(ctx context.Context, e releaselog.Entry) (releaselog.Receipt, error) {
	e.Time = s.now()
	r, err := s.cfg.Log.Append(ctx, e)
	if err != nil {
		s.log.Error("release log", "error", err)
		return r, fault.Wrap(err, "release_log_unavailable", "the release log takes no entry, so nothing is given").WithFix("see the KMS's log: its disk may be full or failing; restart it once that is mended")
	}
	return r, nil
}

// self is this KMS's authorisation of itself.
type self struct {
	mu        sync.Mutex // held while evidence is made: one quote serves all who wait
	applicant *applicant.Applicant
	at        time.Time // when that was made
}

// selfAge is how old a KMS's evidence of itself may be before it is made anew: unlike
// upstream's, it notices that its own platform has fallen out of date.
const selfAge = time.Hour

// evidence returns this KMS as an applicant; nil outside of a TEE.
func (s *Service) evidence(ctx context.Context) (*applicant.Applicant, error) {
	if s.cfg.Self == nil {
		return nil, nil
	}
	s.self.mu.Lock()
	defer s.self.mu.Unlock()
	now := s.now()
	if s.self.applicant != nil && now.Sub(s.self.at).Abs() < selfAge {
		return s.self.applicant, nil
	}
	var nonce dstack.ReportData
	rand.Read(nonce[:])
	raw, err := s.cfg.Self.Attest(ctx, nonce)
	if err != nil {
		return nil, fault.Wrap(err, "kms_self", "make evidence of this KMS")
	}
	a, err := s.cfg.Judge.Judge(ctx, applicant.Evidence{Container: raw, ReportData: nonce, VMConfig: s.cfg.VMConfig, Session: true})
	if err != nil {
		return nil, fault.Wrap(err, "kms_self", "this KMS's own evidence")
	}
	s.self.applicant, s.self.at = a, now
	return a, nil
}

// authorised asks whether this KMS may go on; the answer is never kept.
func (s *Service) authorised(ctx context.Context) error {
	a, err := s.evidence(ctx)
	if err != nil {
		return err
	}
	if a == nil {
		return nil // New took Development for it
	}
	q := a.Request
	q.Role, q.Purpose, q.At = governance.KMS, governance.Service, s.now()
	d, err := s.cfg.Authority.Decide(ctx, q)
	if err != nil {
		return unanswered(err)
	}
	if !d.Allowed {
		return denied("KMS is not allowed", d)
	}
	return nil
}

// denied is a refusal by the authority, in upstream's words.
func denied(what string, d governance.Decision) error {
	code := d.Code
	if code == "" {
		code = "boot_denied"
	}
	return fault.New(code, "%s: %s", what, cut(d.Reason, 512))
}

// cut shortens a text on a rune's boundary.
func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	end := 0
	for i := range text {
		if i > most {
			break
		}
		end = i
	}
	return text[:end]
}

// caller is who sent a request.
type caller struct {
	remote string
	peer   *channel.Peer     // of an attested channel
	leaf   *x509.Certificate // of a client that showed one
}

type callerKey struct{}

func callerOf(ctx context.Context) caller {
	switch c := ctx.Value(callerKey{}).(type) {
	case caller:
		return c
	case *lateCaller:
		who := c.caller
		who.leaf = first(c.conn.ConnectionState().PeerCertificates)
		return who
	}
	return caller{}
}

// host is the part of an address that limits go by: an IPv4 address, or a /64.
func (c caller) host() string {
	h, _, err := net.SplitHostPort(c.remote)
	if err != nil {
		return c.remote
	}
	ip := net.ParseIP(h)
	if ip == nil || ip.To4() != nil {
		return h
	}
	return ip.Mask(net.CIDRMask(64, 128)).String()
}

// committed reports whether the key of the caller's connection is the one that the
// applicant's init committed to.
func (c caller) committed(a *applicant.Applicant) bool {
	var spki []byte
	switch {
	case c.peer != nil:
		spki = c.peer.SPKI
	case c.leaf != nil:
		spki = c.leaf.RawSubjectPublicKeyInfo
	}
	sum := sha256.Sum256(spki)
	return spki != nil && bytes.Equal(sum[:], a.ChannelKey)
}

// isSystemOf reports whether the caller, over an attested channel, is the system of the
// same guest that an applicant is.
func (c caller) isSystemOf(a *applicant.Applicant) bool {
	if c.peer == nil {
		return false
	}
	p, ok := c.peer.Detail.(*applicant.Applicant)
	return ok && (p.Booting || c.committed(p)) && p.Info.AppID == a.Info.AppID && p.Info.ComposeHash == a.Info.ComposeHash &&
		bytes.Equal(p.Info.InstanceID, a.Info.InstanceID) && p.Info.DeviceID == a.Info.DeviceID
}

// applicant judges the caller's evidence. Codes no_attestation, vm_config_conflict, and
// those of package applicant.
func (s *Service) applicant(ctx context.Context, vmConfig string) (*applicant.Applicant, error) {
	c := callerOf(ctx)
	if c.peer != nil {
		a, ok := c.peer.Detail.(*applicant.Applicant)
		if !ok {
			return nil, errors.New("an attested peer without an applicant")
		}
		if vmConfig != "" && vmConfig != a.Evidence.Config {
			return nil, fault.New("vm_config_conflict", "the request's vm_config is not the one of the evidence of its connection")
		}
		return a, nil
	}
	if c.leaf == nil {
		return nil, fault.New("no_attestation", "No attestation provided").WithFix("show a certificate with evidence, or use an attested channel")
	}
	// Its chain proves nothing, but its dates are the caller's own word for how long it
	// is to count.
	if now := s.now(); now.Before(c.leaf.NotBefore) || now.After(c.leaf.NotAfter) {
		return nil, fault.New("client_certificate_time", "the client's certificate is valid from %s to %s, not now",
			c.leaf.NotBefore.UTC().Format(time.RFC3339), c.leaf.NotAfter.UTC().Format(time.RFC3339)).WithFix("make a new certificate, with new evidence")
	}
	e, err := ratls.FromCertificate(c.leaf)
	if err != nil {
		if fault.Code(err) == "ratls_no_evidence" {
			return nil, fault.Wrap(err, "no_attestation", "No attestation provided")
		}
		return nil, err
	}
	return s.judge(ctx, applicant.Evidence{Container: e.Container, ReportData: e.ReportData, VMConfig: vmConfig})
}

// judge verifies evidence, and writes into the release log that it does not hold. What
// it claims of itself is not written: nothing vouches for it. Strangers can make as much
// evidence as they like, so that beyond strangerRate their refusals are only counted.
func (s *Service) judge(ctx context.Context, e applicant.Evidence) (*applicant.Applicant, error) {
	a, err := s.cfg.Judge.Judge(ctx, e)
	if err == nil || fault.Code(err) == "collateral_unavailable" {
		return a, err
	}
	if s.limits.strangers.allow("", s.now()) {
		_, logErr := s.append(ctx, releaselog.Entry{
			Kind: releaselog.Refusal, Code: fault.Code(err), Reason: err.Error(), Evidence: sha256.Sum256(e.Container), Session: e.Session,
		})
		if logErr != nil {
			return nil, logErr
		}
	} else {
		s.metrics.unlogged.Add(1)
	}
	return nil, err
}

// hexOf is for logs and entries.
func hexOf(b []byte) string { return hex.EncodeToString(b) }
