// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// Upstream lets upstream's guests register, over plain TLS with a client certificate that
// a KMS issued. Such a certificate says what its KMS once established, lives for days, and
// serves whoever has its key, wherever (threats.md K03): it is the weaker way, and records
// of it say so (route.Record.CertificateOnly). It never replaces what fresh evidence of an
// instance made.
//
// Implements spec/gateway.md §1.1.1, §1.1.2, §2.6 and §9.
type Upstream struct {
	// CA is the KMS, by its root CA's key: DER SubjectPublicKeyInfo.
	CA []byte
	// Certificate is what such guests are shown: issued by that KMS, with the gateway's app
	// id, by which they know it. Until there is one, it returns nil.
	Certificate func() *tls.Certificate
	// Dial reaches an address in the tunnel.
	Dial func(context.Context, netip.AddrPort) (net.Conn, error)
}

// ByCertificate is an Admission to which a certificate of a KMS is enough. Without it, a
// guest has to show evidence in its certificate.
type ByCertificate interface {
	// AdmitCertificate returns the end of what was admitted; ca is the KMS's key.
	AdmitCertificate(ca []byte, info *ratls.AppInfo, at time.Time) (until time.Time, err error)
}

// AdmitCertificate implements ByCertificate: the KMS that gives the leases issued the
// certificate. Code register_certificate_other.
func (b ByLease) AdmitCertificate(ca []byte, _ *ratls.AppInfo, at time.Time) (time.Time, error) {
	if !bytes.Equal(ca, b.Root) {
		return time.Time{}, fault.New("register_certificate_other", "the certificate is of another KMS than the one whose instances get routes").
			WithFix("set core.kms_ca to core.auth.kms_root")
	}
	return at.Add(upstreamLease), nil
}

// AdmitCertificate implements ByCertificate.
func (AnyAttested) AdmitCertificate(_ []byte, _ *ratls.AppInfo, at time.Time) (time.Time, error) {
	return at.Add(upstreamLease), nil
}

const (
	// upstreamLease is how long a certificate is good for at most: upstream's guests come
	// again every three minutes.
	upstreamLease = time.Hour

	maxInfo       = 4 << 20 // bytes of an instance's Info
	infoTime      = 10 * time.Second
	infoTries     = 6 // the first and five more
	infoPause     = time.Second
	infoLongPause = 30 * time.Second
	maxFetches    = 64
)

type certificatesKey struct{}

// connContext remembers the certificates of a client that gave no evidence.
func (s *Service) connContext(ctx context.Context, conn net.Conn) context.Context {
	ctx = channel.ConnContext(ctx, conn)
	if c, ok := conn.(*channel.Conn); ok && c.Peer() == nil && s.cfg.Upstream != nil {
		ctx = context.WithValue(ctx, certificatesKey{}, c.ConnectionState().PeerCertificates)
	}
	return ctx
}

// otherTLS is for those who speak no attested channel.
func (s *Service) otherTLS() *tls.Config {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: s.cfg.Certificate}
	if u := s.cfg.Upstream; u != nil {
		// Whose the certificate is, certified judges: a KMS is known by its key, and its
		// root certificate differs between replicas.
		cfg.ClientAuth = tls.RequestClientCert
		cfg.SessionTicketsDisabled = true // a certificate is looked at each time
		cfg.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if cert := u.Certificate(); cert != nil {
				return cert, nil
			}
			return s.cfg.Certificate(h)
		}
	}
	return cfg
}

// registrant is who registers, and what is known of it.
type registrant struct {
	identity channel.Identity
	at       time.Time            // of the evidence; of a certificate, now
	who      *applicant.Applicant // nil: a certificate without evidence
	info     *ratls.AppInfo       // nil: an attested channel
	notAfter time.Time            // of the certificate
}

// registrant is the caller of RegisterCvm. Codes of caller and certified.
func (s *Service) registrant(ctx context.Context) (*registrant, error) {
	if certs, ok := ctx.Value(certificatesKey{}).([]*x509.Certificate); ok {
		return s.certified(ctx, certs)
	}
	peer, who, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	return &registrant{identity: peer.Identity, at: peer.At, who: who}, nil
}

// certified is the caller of whom a KMS's certificate speaks. Codes register_unattested
// (for which upstream's guests try the certificate with evidence), register_certificate,
// register_no_instance, those of package ratls and of Judge.
func (s *Service) certified(ctx context.Context, certs []*x509.Certificate) (*registrant, error) {
	none := func(why string) (*registrant, error) {
		return nil, fault.New("register_unattested", "no attestation provided: %s", why)
	}
	if len(certs) == 0 {
		return none("there is neither an attested channel nor a client certificate")
	}
	now := s.now()
	leaf := certs[0]
	claims, err := issuedBy(s.cfg.Upstream.CA, certs, now)
	if err != nil {
		return nil, err
	}
	r := &registrant{at: now, info: claims.Info, notAfter: leaf.NotAfter}
	evidence, err := ratls.FromCertificate(leaf)
	switch {
	case err == nil:
		// Whatever the certificate says besides: evidence that is there must hold.
		if r.who, err = s.judgeCertificate(ctx, leaf, evidence); err != nil {
			return nil, err
		}
		if r.info == nil {
			r.info = &r.who.Info
		}
		if i := r.who.Info; i.AppID != r.info.AppID || i.ComposeHash != r.info.ComposeHash || !bytes.Equal(i.InstanceID, r.info.InstanceID) {
			return nil, fault.New("register_certificate", "the certificate's evidence is of another app, instance or manifest than the certificate says")
		}
	case fault.Code(err) != "ratls_no_evidence":
		return nil, err
	case r.info == nil:
		return none("the certificate has neither app info nor evidence")
	}
	if _, enough := s.cfg.Admission.(ByCertificate); !enough && r.who == nil {
		return none("who gets a route here is decided over evidence, and the certificate has none")
	}
	if claims.AppID != nil && *claims.AppID != r.info.AppID {
		return nil, fault.New("register_certificate", "the certificate is of app %s and says app %s", *claims.AppID, r.info.AppID)
	}
	if len(r.info.InstanceID) != dstack.InstanceIDSize {
		return nil, fault.New("register_no_instance", "an instance without an id has no route of its own").WithFix("deploy the app without no_instance_id")
	}
	id := dstack.InstanceID(r.info.InstanceID)
	r.identity = channel.Identity{AppID: r.info.AppID, InstanceID: &id, ComposeHash: r.info.ComposeHash}
	return r, nil
}

func (s *Service) judgeCertificate(ctx context.Context, leaf *x509.Certificate, a *ratls.Attestation) (*applicant.Applicant, error) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return nil, fault.New("busy", "the gateway is busy")
	}
	return s.cfg.Judge.Judge(ctx, applicant.Evidence{Container: a.Container, ReportData: ratls.ReportData(leaf.RawSubjectPublicKeyInfo)})
}

// issuedBy is what the KMS with a key says in a chain of leaf, app CA and whatever follows.
// The handshake has shown that the client has the leaf's key. Code register_certificate.
func issuedBy(ca []byte, chain []*x509.Certificate, now time.Time) (ratls.Issued, error) {
	bad := func(format string, args ...any) (ratls.Issued, error) {
		return ratls.Issued{}, fault.New("register_certificate", "the client's certificate: "+format, args...).
			WithFix("register with the certificate that the gateway's KMS issued to the guest (core.kms_ca)")
	}
	if len(chain) < 2 {
		return bad("the certificate of its app CA is missing")
	}
	leaf, app := chain[0], chain[1]
	if err := channel.CheckIssuer(app, ca); err != nil {
		return bad("its app CA is none of the KMS with the pinned key")
	}
	if err := leaf.CheckSignatureFrom(app); err != nil {
		return bad("it is not signed by its app CA: %v", err)
	}
	for _, c := range []*x509.Certificate{leaf, app} {
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return bad("it is valid from %s to %s, not now", c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
		}
		if len(c.UnhandledCriticalExtensions) > 0 {
			return bad("it has a critical extension that is not known here")
		}
	}
	if leaf.IsCA || !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return bad("it is none of a client")
	}
	authority, err := ratls.IssuerClaims(app)
	if err != nil {
		return bad("its app CA: %v", err)
	}
	claims, err := ratls.IssuerClaims(leaf)
	if err != nil {
		return bad("%v", err)
	}
	// The KMS issues other certificates too, which speak of no app.
	if authority.Usage != ratls.UsageAppCA || claims.Usage != ratls.UsageApp || authority.AppID == nil || claims.AppID == nil || *authority.AppID != *claims.AppID {
		return bad("it is none of an app, of that app's CA")
	}
	return claims, nil
}

// admission asks who gets a route, until when. Codes of Admission.
func (s *Service) admission(ctx context.Context, r *registrant, l Lease, now time.Time) (time.Time, error) {
	until := time.Time{}
	var err error
	by, enough := s.cfg.Admission.(ByCertificate)
	if r.info != nil && enough {
		until, err = by.AdmitCertificate(s.cfg.Upstream.CA, r.info, now)
	} else {
		until, err = s.cfg.Admission.Admit(ctx, r.who, l, now)
	}
	if err == nil && r.info != nil && until.After(r.notAfter) {
		until = r.notAfter
	}
	return until, err
}

// reportedPolicy is what upstream's guest says of its ports, or what is known of it; nil is
// to be fetched.
func reportedPolicy(p *api.PortPolicy, was route.Record, compose dstack.ComposeHash) (*portpolicy.Policy, error) {
	if p == nil {
		if was.CertificateOnly && was.Compose == compose {
			return was.Policy, nil
		}
		return nil, nil
	}
	m := manifest.PortPolicy{RestrictMode: p.RestrictMode}
	for _, a := range p.Ports {
		if a.Port == 0 || a.Port > 65535 {
			return nil, fault.New("register_ports", "port must be between 1 and 65535, not %d", a.Port)
		}
		m.Ports = append(m.Ports, manifest.Port{Port: uint16(a.Port), PP: a.Pp})
	}
	out, err := portpolicy.New(m)
	return &out, err
}

// fetches are the policies of upstream's guests that are being asked for: one at a time
// of an instance. Until it is there, its ports are closed.
type fetches struct {
	mu   sync.Mutex
	busy map[dstack.InstanceID]bool
	work sync.WaitGroup
	ctx  context.Context
	stop context.CancelFunc
}

func (f *fetches) init() {
	f.busy = map[dstack.InstanceID]bool{}
	f.ctx, f.stop = context.WithCancel(context.Background())
}

// end tells the fetches to end and waits for them.
func (f *fetches) end() {
	f.stop()
	f.work.Wait()
}

// fetch asks for the policy of a route in the background.
func (s *Service) fetch(rec route.Record) {
	f := &s.fetches
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.busy[rec.Instance] || len(f.busy) >= maxFetches || f.ctx.Err() != nil {
		return
	}
	f.busy[rec.Instance] = true
	f.work.Go(func() {
		defer func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			delete(f.busy, rec.Instance)
		}()
		pause := infoPause
		for try := range infoTries {
			if try > 0 {
				select {
				case <-time.After(pause):
				case <-f.ctx.Done():
					return
				}
				pause = min(2*pause, infoLongPause)
			}
			p, final, err := s.askPolicy(f.ctx, rec)
			if err == nil {
				err, final = s.know(rec, p), true
			}
			if err != nil && f.ctx.Err() == nil {
				s.log.Warn("port policy", "app", rec.App.String(), "instance", rec.Instance.String(), "code", fault.Code(err), "error", err)
			}
			if final {
				return
			}
		}
	})
}

// later is when a certificate was shown, after what is known already: records are told
// apart by that.
func later(now time.Time, was route.Record) time.Time {
	if least := was.Attested.Add(time.Millisecond); was.CertificateOnly && now.Before(least) {
		return least
	}
	return now
}

// know gives a route the policy, if it is the same still.
func (s *Service) know(rec route.Record, p *portpolicy.Policy) error {
	lock := &s.registering[int(rec.Instance[0])%len(s.registering)]
	lock.Lock()
	defer lock.Unlock()
	rt, known := s.cfg.Routes.Instance(rec.Instance)
	if !known {
		return nil
	}
	now := rt.Record()
	if !now.CertificateOnly || now.Key != rec.Key || now.Compose != rec.Compose || now.Policy != nil {
		return nil
	}
	now.Policy, now.Attested = p, later(s.now(), now)
	_, err := s.cfg.Routes.Register(now)
	return err
}

// askPolicy takes the policy from the manifest that the guest's agent shows, which must be
// the one that the certificate names. final says that asking again would not help. Code
// register_policy.
func (s *Service) askPolicy(ctx context.Context, rec route.Record) (p *portpolicy.Policy, final bool, err error) {
	fail := func(err error) (*portpolicy.Policy, bool, error) {
		return nil, final, fault.Wrap(err, "register_policy", "ask the instance for its manifest")
	}
	ctx, cancel := context.WithTimeout(ctx, infoTime)
	defer cancel()
	to := netip.AddrPortFrom(rec.Address, portpolicy.AgentPort)
	tr := &http.Transport{DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.cfg.Upstream.Dial(ctx, to) }}
	defer tr.CloseIdleConnections()
	c := http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+to.String()+"/prpc/Info?json", http.NoBody)
	if err != nil {
		return fail(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxInfo+1))
	if err != nil {
		return fail(err)
	}
	if resp.StatusCode != http.StatusOK {
		return fail(fault.New("register_policy", "it answered with status %d", resp.StatusCode))
	}
	final = true
	var info struct {
		TCBInfo string `json:"tcb_info"`
	}
	if err := strictjson.Decode(body, &info, strictjson.Limits{Size: maxInfo, Depth: 16, Unknown: true}); err != nil {
		return fail(err)
	}
	if info.TCBInfo == "" { // public_tcbinfo = false: upstream's gateway opens all ports then
		open := portpolicy.Open()
		return &open, true, nil
	}
	var tcb struct {
		AppCompose string `json:"app_compose"`
	}
	if err := strictjson.Decode([]byte(info.TCBInfo), &tcb, strictjson.Limits{Size: maxInfo, Depth: 16, Unknown: true}); err != nil {
		return fail(err)
	}
	if sha256.Sum256([]byte(tcb.AppCompose)) != rec.Compose {
		return fail(fault.New("register_policy", "the manifest is not the one that the certificate names (%s)", rec.Compose))
	}
	m, err := manifest.Parse([]byte(tcb.AppCompose))
	if err != nil {
		return fail(err)
	}
	out, err := portpolicy.New(m.PortPolicy)
	if err != nil {
		return fail(err)
	}
	return &out, true, nil
}
