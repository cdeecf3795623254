// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/keys/lease"
	"github.com/dstack-go/dstack/releaselog"
)

// allow asks this KMS's and the authority's leave for an applicant, whose evidence
// holds. A denial is logged before it is told.
func (s *Service) allow(ctx context.Context, a *applicant.Applicant, role governance.Role, purpose governance.Purpose) (governance.Decision, error) {
	var none governance.Decision
	q := a.Request
	q.Role, q.Purpose, q.At = role, purpose, s.now()
	if n := len(q.Boot.InstanceID); n != 0 && n != dstack.InstanceIDSize {
		return none, fault.New("instance_id_length", "the instance id has %d bytes, not %d", n, dstack.InstanceIDSize)
	}
	// Anyone's own machine can name this app: until the authority has allowed it, it
	// counts by itself, and takes nothing from the app's own machines.
	if err := s.limits.app(q.Boot.AppID.String() + " " + q.Boot.DeviceID.String()); err != nil {
		return none, err
	}
	var d governance.Decision
	err := s.permitted(ctx, a, q)
	if err == nil {
		err = s.authorised(ctx)
	}
	if err == nil {
		d, err = s.cfg.Authority.Decide(ctx, q)
		if err != nil {
			err = unanswered(err)
		} else if !d.Allowed {
			err = denied("Boot denied", d)
		}
	}
	if err != nil {
		return none, s.refused(ctx, a, q, d, err)
	}
	if err := s.limits.app(q.Boot.AppID.String()); err != nil {
		return none, err
	}
	return d, s.erase(ctx, d)
}

// ratchet is how far epochs are erased.
type ratchet struct {
	mu     sync.Mutex
	oldest atomic.Uint64
}

// erase makes underivable what is never given again (threats.md G02): the entry first,
// then the deed, which is done again after a crash in between.
func (s *Service) erase(ctx context.Context, d governance.Decision) error {
	if s.cfg.Eraser == nil || d.OldestEpoch <= s.ratchet.oldest.Load() {
		return nil
	}
	s.ratchet.mu.Lock()
	defer s.ratchet.mu.Unlock()
	if d.OldestEpoch <= s.ratchet.oldest.Load() {
		return nil
	}
	switch first, last := s.cfg.Eraser.Epochs(); {
	case d.OldestEpoch > last:
		// Of no roots, or out of their reach: a slip in a document takes no keys away.
		s.log.Warn("epochs not erased", "before", d.OldestEpoch, "last", last)
	case first < d.OldestEpoch:
		note := fmt.Sprintf("the keys of epochs before %d are erased", d.OldestEpoch)
		if _, err := s.append(ctx, releaselog.Entry{Kind: releaselog.Rotation, By: d.By, Epoch: d.Epoch, Note: note}); err != nil {
			return err
		}
		if err := s.cfg.Eraser.EraseBefore(d.OldestEpoch); err != nil {
			return err
		}
		s.log.Info("epochs erased", "before", d.OldestEpoch, "by", d.By)
	}
	s.ratchet.oldest.Store(d.OldestEpoch)
	return nil
}

// permitted is what no authority can allow.
func (s *Service) permitted(ctx context.Context, a *applicant.Applicant, q governance.Request) error {
	own := callerOf(ctx).committed(a)
	switch {
	// Apps may ask their guest for a quote over 64 bytes of anybody's choice, and some
	// pass the answer on: evidence of a guest in which one may run speaks for who has the
	// key that its init committed to before, and for nobody else (threats.md B20).
	case q.Purpose == governance.Keys && a.Running && !own:
		return fault.New("guest_running", "keys are given to a guest that boots: an app runs in this one, and may have made its evidence for somebody else").
			WithFix("ask before the event system-ready, or over the channel key that the guest committed to")
	case q.Purpose == governance.Renewal && q.Session && a.Running && len(a.ChannelKey) > 0 && !own:
		return fault.New("channel_key_mismatch", "the connection's key is not the one that the guest committed to before its app started")
	// Whoever has a copy of a replica's key can show its evidence. For the roots that is
	// not enough, whatever an app may do with as little (threats.md C01, C03).
	case q.Purpose == governance.Replication && !q.Session && !s.cfg.KeyBoundReplication:
		return fault.New("session_required", "root keys are given over an attested channel only: this evidence was made for a key and not for the connection").
			WithFix("onboard the replica with this project's KMS, or set core.key_bound_replication for one of upstream's")
	}
	return nil
}

// refused writes a refusal to the log before it is told.
func (s *Service) refused(ctx context.Context, a *applicant.Applicant, q governance.Request, d governance.Decision, err error) error {
	e := s.entry(a, q, d)
	e.Kind, e.Code, e.Reason = releaselog.Refusal, fault.Code(err), err.Error()
	if _, logErr := s.append(ctx, e); logErr != nil {
		return logErr
	}
	return err
}

// entry describes a request in the release log.
func (s *Service) entry(a *applicant.Applicant, q governance.Request, d governance.Decision) releaselog.Entry {
	e := releaselog.Entry{
		Kind: releaselog.Grant, Purpose: string(q.Purpose), Role: string(q.Role), AppID: q.Boot.AppID, ComposeHash: q.Boot.ComposeHash,
		DeviceID: q.Boot.DeviceID, MRAggregated: q.Boot.MRAggregated, TCBStatus: q.Boot.TCBStatus, Trust: q.Trust, Session: q.Session,
		By: d.By, Evidence: a.Digest,
	}
	copy(e.InstanceID[:], q.Boot.InstanceID)
	copy(e.OSImageHash[:], q.Boot.OSImageHash)
	return e
}

// leaseOf returns how long a decision lasts.
func (s *Service) leaseOf(d governance.Decision) time.Duration {
	if d.Lease <= 0 || d.Lease > s.cfg.Limits.Lease {
		return s.cfg.Limits.Lease
	}
	return d.Lease
}

// lease makes the lease of an instance, which refers to the log's entry about it.
func (s *Service) lease(ctx context.Context, a *applicant.Applicant, until time.Time, r releaselog.Receipt) (*kmsapi.Lease, error) {
	b := a.Request.Boot
	doc := lease.Document{
		AppID: b.AppID, InstanceID: b.InstanceID, ComposeHash: b.ComposeHash, OSImageHash: b.OSImageHash,
		NotBefore: s.now(), NotAfter: until, Log: r.Head.Log(), Index: r.Index,
	}
	text, err := doc.Encode()
	if err != nil {
		return nil, err
	}
	signature, err := s.cfg.Custodian.Attest(ctx, custody.PurposeLease, text)
	return &kmsapi.Lease{Document: text, Signature: signature}, err
}

func (s *Service) getAppKey(ctx context.Context, r *kmsapi.GetAppKeyRequest) (*kmsapi.AppKeyResponse, error) {
	if r.ApiVersion > 1 {
		return nil, fault.New("api_version", "Unsupported API version: %d", r.ApiVersion)
	}
	a, err := s.applicant(ctx, r.VmConfig)
	if err != nil {
		return nil, err
	}
	d, err := s.allow(ctx, a, governance.App, governance.Keys)
	if err != nil {
		return nil, err
	}
	out, err := s.appKeys(ctx, a, d, r.WantEpochs)
	if err != nil {
		return nil, err
	}
	until := s.now().Add(s.leaseOf(d))
	e := s.entry(a, purposed(a, governance.App, governance.Keys), d)
	e.LeaseUntil, e.Epoch = until, newest(out.Epochs)
	receipt, err := s.append(ctx, e)
	if err == nil {
		out.Release = receipt.Release()
		out.Lease, err = s.lease(ctx, a, until, receipt)
	}
	if err != nil {
		wipe(out)
		return nil, err
	}
	return out, nil
}

func purposed(a *applicant.Applicant, role governance.Role, purpose governance.Purpose) governance.Request {
	q := a.Request
	q.Role, q.Purpose = role, purpose
	return q
}

func newest(epochs []*kmsapi.EpochKeys) uint64 {
	if len(epochs) == 0 {
		return 0
	}
	return epochs[0].Epoch
}

func wipe(r *kmsapi.AppKeyResponse) {
	for _, b := range [][]byte{r.DiskCryptKey, r.EnvCryptKey, r.K256Key} {
		clear(b)
	}
	for _, e := range r.Epochs {
		clear(e.Disk)
		clear(e.Env)
		clear(e.App)
	}
}

// appKeys derives what an app gets.
func (s *Service) appKeys(ctx context.Context, a *applicant.Applicant, d governance.Decision, epochs bool) (*kmsapi.AppKeyResponse, error) {
	b := a.Request.Boot
	legacy, err := s.derive(ctx, custody.Scope{App: b.AppID, Instance: b.InstanceID})
	if err != nil {
		return nil, err
	}
	out := &kmsapi.AppKeyResponse{
		CaCert: s.RootPEM(), DiskCryptKey: legacy.Disk, EnvCryptKey: legacy.Env, K256Key: legacy.App,
		TproxyAppId: d.GatewayAppID, GatewayAppId: d.GatewayAppID, OsImageHash: b.OSImageHash,
	}
	public, err := derive.K256Public(legacy.App)
	if err == nil {
		out.K256Signature, err = s.cfg.Custodian.Sign(ctx, derive.AppMessage(b.AppID, public)...)
	}
	if err == nil && epochs && d.Epoch > 0 {
		// The epoch in force, and the one before it to read by (threats.md G02).
		for e := d.Epoch; e >= max(1, d.OldestEpoch) && e+1 >= d.Epoch && err == nil; e-- {
			var k *kmsapi.EpochKeys
			if k, err = s.derive(ctx, custody.Scope{App: b.AppID, Instance: b.InstanceID, Epoch: e}); err == nil {
				out.Epochs = append(out.Epochs, k)
			}
		}
	}
	if err != nil {
		wipe(out)
		return nil, err
	}
	return out, nil
}

// derive returns the keys of one scope; the caller wipes them.
func (s *Service) derive(ctx context.Context, at custody.Scope) (*kmsapi.EpochKeys, error) {
	disk, err := s.cfg.Custodian.DiskKey(ctx, at)
	if err != nil {
		return nil, err
	}
	defer disk.Wipe()
	env, err := s.cfg.Custodian.EnvKey(ctx, at)
	if err != nil {
		return nil, err
	}
	defer env.Wipe()
	app, err := s.cfg.Custodian.AppKey(ctx, at)
	if err != nil {
		return nil, err
	}
	defer app.Wipe()
	return &kmsapi.EpochKeys{Epoch: at.Epoch, Disk: bytes.Clone(disk.Bytes()), Env: bytes.Clone(env.Bytes()), App: bytes.Clone(app.Bytes())}, nil
}

// renewLease lets a running instance go on.
func (s *Service) renewLease(ctx context.Context, r *kmsapi.RenewLeaseRequest) (*kmsapi.RenewLeaseResponse, error) {
	a, err := s.applicant(ctx, r.VmConfig)
	if err != nil {
		return nil, err
	}
	d, err := s.allow(ctx, a, governance.App, governance.Renewal)
	if err != nil {
		return nil, err
	}
	until := s.now().Add(s.leaseOf(d))
	e := s.entry(a, purposed(a, governance.App, governance.Renewal), d)
	e.LeaseUntil = until
	receipt, err := s.append(ctx, e)
	if err != nil {
		return nil, err
	}
	l, err := s.lease(ctx, a, until, receipt)
	if err != nil {
		return nil, err
	}
	return &kmsapi.RenewLeaseResponse{Lease: l, Release: receipt.Release()}, nil
}

// getKmsKey gives the roots to another custodian.
func (s *Service) getKmsKey(ctx context.Context, r *kmsapi.GetKmsKeyRequest) (*kmsapi.KmsKeyResponse, error) {
	if s.cfg.Exporter == nil {
		return nil, fault.New("replication_disabled", "this KMS gives its root keys to nobody").WithFix("enable replication in its configuration, which is measured")
	}
	a, err := s.applicant(ctx, r.VmConfig)
	if err != nil {
		return nil, err
	}
	d, err := s.allow(ctx, a, governance.KMS, governance.Replication)
	if err != nil {
		return nil, err
	}
	receipt, err := s.append(ctx, s.entry(a, purposed(a, governance.KMS, governance.Replication), d))
	if err != nil {
		return nil, err
	}
	keys, err := s.cfg.Exporter.Export()
	if err != nil {
		return nil, err
	}
	return &kmsapi.KmsKeyResponse{TempCaKey: string(s.cfg.TempCAKey), Keys: []*kmsapi.KmsKeys{keys}, Release: receipt.Release()}, nil
}

// signCert certifies a key of an app, whose request carries the evidence.
func (s *Service) signCert(ctx context.Context, r *kmsapi.SignCertRequest) (*kmsapi.SignCertResponse, error) {
	if r.ApiVersion != 1 && r.ApiVersion != 2 {
		return nil, fault.New("api_version", "Unsupported API version: %d", r.ApiVersion)
	}
	request, err := csr.Open(int(r.ApiVersion), r.Csr, r.Signature)
	if err != nil {
		return nil, err
	}
	evidence, err := requestEvidence(request)
	if err != nil {
		return nil, err
	}
	a, err := s.judge(ctx, applicant.Evidence{
		Container: evidence, ReportData: ratls.ReportData(request.SPKI), VMConfig: r.VmConfig, BootTime: true,
	})
	if err != nil {
		return nil, err
	}
	// The evidence is about the certificate's key, over which an app may have had it made
	// for anybody. The guest's own system has another connection to show (threats.md B20).
	a.Request.Session = callerOf(ctx).isSystemOf(a)
	d, err := s.allow(ctx, a, governance.App, governance.Certificate)
	if err != nil {
		return nil, err
	}
	for _, name := range request.Names {
		if !governance.NameAllowed(d.Names, name) {
			err := fault.New("certificate_name_denied", "the app may not have a certificate for %.200q", name).WithFix("add the name to the app's names in the policy")
			return nil, s.refused(ctx, a, purposed(a, governance.App, governance.Certificate), d, err)
		}
	}
	parsed, err := x509.ParsePKIXPublicKey(request.SPKI)
	if err != nil {
		return nil, fault.Wrap(err, "csr_key", "the key to be certified")
	}
	public, ok := parsed.(*ecdsa.PublicKey)
	if !ok {
		return nil, fault.New("csr_key", "Unsupported algorithm")
	}
	signer, err := s.cfg.Custodian.AppCA(ctx, a.Info.AppID)
	if err != nil {
		return nil, err
	}
	now := s.now()
	ca, err := s.root.Authority(signer, appCASubject, ratls.Issued{AppID: &a.Info.AppID, Usage: ratls.UsageAppCA}, now)
	if err != nil {
		return nil, err
	}
	leaf := certificate.Leaf{
		Config: request.Config, Public: public, Issued: ratls.Issued{AppID: &a.Info.AppID, Usage: ratls.UsageApp},
		MaxLifetime: s.cfg.Limits.Certificate,
	}
	if request.WithEvidence {
		leaf.Evidence = evidence
	}
	if request.WithAppInfo {
		leaf.Issued.Info = &a.Info // of the verified evidence, unlike upstream's
	}
	der, err := ca.Issue(leaf, now)
	if err != nil {
		return nil, err
	}
	e := s.entry(a, purposed(a, governance.App, governance.Certificate), d)
	sum := sha256.Sum256(der)
	e.Note = "certificate sha256:" + hexOf(sum[:])
	receipt, err := s.append(ctx, e)
	if err != nil {
		return nil, err
	}
	return &kmsapi.SignCertResponse{CertificateChain: []string{certificate.Encode(der), ca.PEM(), s.RootPEM()}, Release: receipt.Release()}, nil
}

// requestEvidence returns the container of a signing request; version 1 has a bare
// quote and its log.
func requestEvidence(r *csr.Request) ([]byte, error) {
	if r.Version == 2 {
		return r.Evidence, nil
	}
	events, err := eventlog.ParseJSON(r.EventLog)
	if err != nil {
		return nil, fmt.Errorf("the event log of the request: %w", err)
	}
	return container.EncodeV1(&attest.Evidence{TEE: dstack.TDX, Quote: r.Quote, EventLog: events, ReportData: ratls.ReportData(r.SPKI)})
}
