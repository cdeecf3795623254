// SPDX-License-Identifier: Apache-2.0

// Package node is a KMS as a program: its configuration, its data directory and its
// phases, from the first start to the service.
//
// In its first phase a KMS has no root keys. It makes them, or gets them from another
// KMS, when its configuration says so and its authority allows it; or an operator says
// so, over plain HTTP, with the token that the KMS printed on its own console. There
// is no other way in. Then it serves, for ever after.
//
// Development trust — a KMS outside of a TEE, evidence under roots that no vendor
// stands for — exists only in builds with the tag dstack_sim (threats.md G08).
//
// Implements spec/kms.md §1, §2 and §6; threats.md C03, G08, G09.
package node

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/channel/self"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/governance/chain"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/webhook"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/kms"
	"github.com/dstack-go/dstack/kms/onboard"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/releaselog"
)

// Files of the data directory beside those of package onboard.
const (
	policyFile    = "policy.json"
	tempCAFile    = "temp-ca.pem"
	bootstrapFile = "bootstrap-info.json"
	chainFile     = "chain-finalised" // the highest block seen
)

// Node is one KMS.
type Node struct {
	cfg Config
	log *slog.Logger
	// Console is where the setup token is printed; nil means standard output.
	Console io.Writer
	// Version is what replies say in X-App-Version.
	Version   string
	now       func() time.Time
	authority governance.Authority
	policies  *policy.Authority // nil with a webhook
	judge     *applicant.Judge
	self      channel.Attester // nil outside of a TEE
	// development is what only a build for it can be brought to: see makeJudge and findSelf.
	development bool
	vmConfig    string
	appID       dstack.AppID // of the KMS as an app; zero outside of a TEE
	state       *onboard.Node
}

// Open reads what is in the data directory and goes on with what a crash interrupted.
func Open(ctx context.Context, c Config, log *slog.Logger) (*Node, error) {
	return open(ctx, c, log, time.Now, nil)
}

// open is Open with a clock, and with a judge in place of the configured one.
func open(ctx context.Context, c Config, log *slog.Logger, now func() time.Time, judge *applicant.Judge) (*Node, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	n := &Node{cfg: c, log: log, now: now, judge: judge}
	if err := durable.MkdirAll(c.Core.DataDir, 0o700); err != nil {
		return nil, fault.Wrap(err, "kms_config", "make core.data_dir")
	}
	var err error
	if n.judge == nil {
		if n.judge, err = n.makeJudge(); err != nil {
			return nil, err
		}
		n.judge.Now = now
	}
	if err := n.makeAuthority(); err != nil {
		return nil, err
	}
	if err := n.findSelf(ctx); err != nil {
		return nil, err
	}
	n.development = development && n.self == nil || n.judge.Development
	n.state, err = onboard.Open(ctx, c.Core.DataDir, func() (*custody.Roots, error) { return custody.Generate(rand.Reader) }, n.replicate)
	return n, err
}

func (n *Node) console() io.Writer {
	if n.Console != nil {
		return n.Console
	}
	return os.Stdout
}

func (n *Node) path(name string) string { return filepath.Join(n.cfg.Core.DataDir, name) }

func (n *Node) makeJudge() (*applicant.Judge, error) {
	a := n.cfg.Core.Attestation
	return applicant.Trust{
		PCCS: a.PCCS, KDS: a.KDS, DevRoots: a.DevRoots, Development: useDevRoots, Dir: n.cfg.Core.DataDir,
		Warn: func(err error) { n.log.Warn("collateral", "error", err) },
	}.Judge()
}

func (n *Node) makeAuthority() error {
	a := n.cfg.Core.AuthAPI
	if a.Type == "chain" {
		r, err := a.Chain.reader(n.cfg.Core.DataDir, n.now)
		if err != nil {
			return err
		}
		n.authority = chain.NewAuthority(r)
		return nil
	}
	if a.Type == "webhook" {
		key, err := publicKey(a.Webhook.Key)
		if err != nil {
			return err
		}
		n.authority = &webhook.Authority{URL: a.Webhook.URL, Key: key}
		return nil
	}
	keys, err := a.Policy.keys()
	if err != nil {
		return err
	}
	authority, err := policy.OpenAuthority(n.path(policyFile), keys, n.now)
	if err != nil {
		return err
	}
	n.policies, n.authority = authority, authority
	if a.Policy.File == "" {
		return nil
	}
	text, err := readText(a.Policy.File)
	if err != nil {
		return fault.Wrap(err, "kms_config", "core.auth_api.policy.file")
	}
	// The file is the first document. What was submitted since stands, and no file that
	// is older, or has run out, keeps a KMS from starting with it.
	if err := authority.Update(text); err != nil {
		if authority.Signed() == nil {
			return err
		}
		n.log.Info("core.auth_api.policy.file is not taken: the policy accepted before stands", "code", fault.Code(err))
	}
	return nil
}

// findSelf asks the guest agent who this KMS is.
func (n *Node) findSelf(ctx context.Context) error {
	socket := n.cfg.Core.Guest.Socket
	if socket == "" {
		if !development {
			return fault.New("development_refused", "core.guest.socket is empty: outside of a TEE a KMS protects nothing, and this one is built for production")
		}
		n.log.Warn("this KMS runs in no TEE: whoever has this machine has its keys (development trust)")
		return nil
	}
	app, err := self.Open(ctx, socket)
	if err != nil {
		return err
	}
	n.appID, n.vmConfig, n.self = app.ID, app.VMConfig, app
	return nil
}

// allowed asks the authority whether this KMS may be one, before it has keys.
func (n *Node) allowed(ctx context.Context) error {
	if n.self == nil {
		return nil
	}
	a, err := n.selfApplicant(ctx)
	if err != nil {
		return err
	}
	return n.decide(ctx, a, governance.Service, "this KMS is not allowed")
}

func (n *Node) decide(ctx context.Context, a *applicant.Applicant, purpose governance.Purpose, what string) error {
	q := a.Request
	q.Role, q.Purpose, q.At = governance.KMS, purpose, n.now()
	d, err := n.authority.Decide(ctx, q)
	if err != nil {
		return err
	}
	if !d.Allowed {
		return fault.New(d.Code, "%s: %s", what, d.Reason)
	}
	return nil
}

// sourceTime bounds one attempt to get the keys from another KMS.
const sourceTime = 2 * time.Minute

// replicate gets the root keys over one attested connection, on which both ends have
// judged each other: there is no second one that could lead elsewhere (threats.md C03).
func (n *Node) replicate(ctx context.Context, source string) (*custody.Roots, error) {
	if n.self == nil {
		return nil, fault.New("onboard_source", "outside of a TEE no KMS gives its keys").WithFix("run the KMS as a dstack app")
	}
	ctx, cancel := context.WithTimeout(ctx, sourceTime)
	defer cancel()
	addr, err := hostPort(source)
	if err != nil {
		return nil, err
	}
	app := n.appID
	if text := n.cfg.Core.Onboard.SourceAppID; text != "" {
		if app, err = dstack.ParseAppID(text); err != nil {
			return nil, err
		}
	}
	conn, err := channel.Dial(ctx, "tcp", addr, &channel.Config{
		Appraiser: sourceAppraiser{n}, Intended: channel.Intended{AppID: app}, Attester: n.self, AppEvidence: true, Timeout: sourceTime, Now: n.now,
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	dialled := false
	client := prpc.NewClient("http://kms/prpc", func(context.Context) (net.Conn, error) {
		if dialled {
			return nil, fault.New("onboard_source", "the source closed the connection on which it was verified")
		}
		dialled = true
		return conn, nil
	})
	if t, ok := client.HTTP.Transport.(*http.Transport); ok {
		t.DisableKeepAlives, t.MaxConnsPerHost = false, 1
		defer t.CloseIdleConnections()
	}
	var meta kmsapi.GetMetaResponse
	if err := client.Call(ctx, "GetMeta", nil, &meta); err != nil {
		return nil, err
	}
	want := custody.Identity{K256: meta.K256Pubkey}
	root, err := certificate.Parse([]byte(meta.CaCert))
	if err != nil {
		return nil, fault.Wrap(err, "onboard_source", "the source's root certificate")
	}
	want.CA = root.RawSubjectPublicKeyInfo
	if pin := n.cfg.Core.Onboard.RootCA; pin != "" && !strings.EqualFold(pin, hex.EncodeToString(want.CA)) {
		return nil, fault.New("root_mismatch", "the source's root is not the one of core.onboard.root_ca").WithFix("the address leads to another KMS than the one that is meant")
	}
	var reply kmsapi.KmsKeyResponse
	if err := client.Call(ctx, "GetKmsKey", &kmsapi.GetKmsKeyRequest{}, &reply); err != nil {
		return nil, err
	}
	if len(reply.Keys) != 1 {
		return nil, fault.New("onboard_source", "Invalid keys: the source gave %d sets", len(reply.Keys))
	}
	// What it gave is in its log, or it is no source (threats.md G10).
	entry, _, err := releaselog.VerifyRelease(reply.Release, want.CA)
	if err != nil {
		return nil, err
	}
	if entry.Purpose != string(governance.Replication) || entry.AppID != n.appID {
		return nil, fault.New("onboard_source", "the source logged that it gave %s for the app %s", entry.Purpose, entry.AppID)
	}
	roots, err := custody.Import(reply.Keys[0], want)
	if err != nil {
		return nil, err
	}
	if reply.TempCaKey != "" {
		if err := n.storeTempCA([]byte(reply.TempCaKey)); err != nil {
			roots.Wipe()
			return nil, err
		}
	}
	return roots, nil
}

// sourceAppraiser takes a KMS that the authority allows to be a source.
type sourceAppraiser struct{ n *Node }

func (s sourceAppraiser) Appraise(ctx context.Context, c channel.Candidate) (*channel.Appraisal, error) {
	a, err := s.n.judge.Judge(ctx, applicant.Evidence{Container: c.Container, ReportData: c.ReportData, Session: true})
	if err != nil {
		return nil, err
	}
	if err := s.n.decide(ctx, a, governance.Source, "the source is not allowed"); err != nil {
		return nil, err
	}
	return a.Appraisal(), nil
}

// storeTempCA keeps the key of the temporary CA, which is no secret.
func (n *Node) storeTempCA(keyPEM []byte) error {
	if _, err := certificate.KeyFromPEM(keyPEM); err != nil {
		return fault.Wrap(err, "onboard_source", "the source's temporary CA")
	}
	return durable.WriteFile(n.path(tempCAFile), keyPEM, 0o600)
}

// tempCA opens the temporary CA, making it if there is none.
func (n *Node) tempCA() (*certificate.Authority, []byte, error) {
	text, err := os.ReadFile(n.path(tempCAFile))
	if errors.Is(err, fs.ErrNotExist) {
		ca, text, err := kms.NewTempCA(nil, n.now())
		if err != nil {
			return nil, nil, err
		}
		return ca, text, durable.WriteFile(n.path(tempCAFile), text, 0o600)
	}
	if err != nil {
		return nil, nil, err
	}
	key, err := certificate.KeyFromPEM(text)
	if err != nil {
		return nil, nil, fault.Wrap(err, "kms_config", "%s", n.path(tempCAFile)).WithFix("remove the file: it holds no secret, and is made anew")
	}
	return kms.NewTempCA(key, n.now())
}

// bootstrap returns what GetMeta tells of the keys' making: the attestation of this
// KMS over them, made once (spec/kms.md §2.3).
func (n *Node) bootstrap(ctx context.Context, id custody.Identity) (*kmsapi.BootstrapResponse, error) {
	text, err := os.ReadFile(n.path(bootstrapFile))
	if err == nil {
		out := new(kmsapi.BootstrapResponse)
		return out, prpc.UnmarshalJSON(text, out)
	}
	if !errors.Is(err, fs.ErrNotExist) || n.self == nil || n.state.State().Source != "" {
		return nil, nil
	}
	var data dstack.ReportData
	copy(data[:], BootstrapData(id))
	raw, err := n.self.Attest(ctx, data)
	if err != nil {
		return nil, err
	}
	out := &kmsapi.BootstrapResponse{CaPubkey: id.CA, K256Pubkey: id.K256, Attestation: raw}
	if text, err = prpc.MarshalJSON(out); err != nil {
		return nil, err
	}
	return out, durable.WriteFile(n.path(bootstrapFile), text, 0o644)
}

// BootstrapData is the first half, 32 bytes, of the report data by which a KMS attests
// that it made its keys; upstream's spelling of the text is part of the format.
func BootstrapData(id custody.Identity) []byte {
	return derive.Keccak256(fmt.Appendf(nil, "dstack-kms-genereted-keys-v1:%x;%x;", id.CA, id.K256))
}

// hostPort reads the https URL of a KMS.
func hostPort(text string) (string, error) {
	u, err := parseURL(text)
	if err != nil {
		return "", err
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}

// Run onboards, if the KMS has no keys yet, and serves until ctx ends. ready, if not
// nil, is told the address once the service answers.
func (n *Node) Run(ctx context.Context, ready func(net.Addr)) error {
	if n.state.State().Phase != onboard.Ready {
		if err := n.onboard(ctx); err != nil {
			return err
		}
	}
	roots, err := custody.Open(onboard.RootFile(n.cfg.Core.DataDir))
	if err != nil {
		return err
	}
	defer roots.Wipe()
	log, err := releaselog.Open(onboard.LogDir(n.cfg.Core.DataDir), roots.Identity().CA)
	if err != nil {
		return err
	}
	defer log.Close()
	temp, tempKey, err := n.tempCA()
	if err != nil {
		return err
	}
	info, err := n.bootstrap(ctx, roots.Identity())
	if err != nil {
		return err
	}
	c := kms.Config{
		Custodian: roots, Authority: n.authority, Judge: n.judge, Log: log, TempCA: temp, TempCAKey: tempKey,
		Names: n.cfg.names(), Self: n.self, VMConfig: n.vmConfig, Development: n.development, Now: n.now,
		Bootstrap: info, Version: n.Version, Logger: n.log,
		Limits: kms.Limits{
			Certificate: n.cfg.Core.Limits.Certificate.Duration, Lease: n.cfg.Core.Limits.Lease.Duration,
			PeerRate: n.cfg.Core.Limits.PeerRate, AppRate: n.cfg.Core.Limits.AppRate,
		},
	}
	c.KeyBoundReplication = n.cfg.Core.KeyBoundReplication
	if n.cfg.Core.Replication {
		c.Exporter = roots
	}
	if n.policies != nil {
		c.Policies, c.Eraser = n.policies, roots // a policy's oldest epoch never falls
	}
	service, err := kms.New(c)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(roots.Identity().CA)
	if _, err := log.Append(ctx, releaselog.Entry{Time: n.now(), Kind: releaselog.Start, Note: fmt.Sprintf("root sha256:%x", sum)}); err != nil {
		return err
	}
	stopAdmin, err := n.serveAdmin()
	if err != nil {
		return err
	}
	defer stopAdmin()
	l, err := net.Listen("tcp", n.cfg.RPC.listen())
	if err != nil {
		return fault.Wrap(err, "kms_listen", "listen on %s", n.cfg.RPC.listen())
	}
	n.log.Info("the KMS serves", "address", l.Addr().String(), "root_ca", hex.EncodeToString(roots.Identity().CA), "log", log.Head().Log())
	if ready != nil {
		ready(l.Addr())
	}
	if err := service.Serve(ctx, l); err != nil {
		return err
	}
	_, err = log.Append(context.WithoutCancel(ctx), releaselog.Entry{Time: n.now(), Kind: releaselog.Shutdown})
	return err
}
