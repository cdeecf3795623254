// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/kms/onboard"
	"github.com/dstack-go/dstack/prpc"
)

// retry is how long to wait before trying again what the authority or a source refused.
const retry = 2 * time.Second

// onboard returns once the KMS has its root keys, or ctx ends.
func (n *Node) onboard(ctx context.Context) error {
	o := n.cfg.Core.Onboard
	auto := o.AutoBootstrapDomain != "" || o.SourceURL != ""
	if !auto && o.Port == 0 {
		return fault.New("onboard_absent", "this KMS has no root keys, and its configuration does not say how it gets them").
			WithFix("set core.onboard.auto_bootstrap_domain, source_url or port")
	}
	done := make(chan struct{}, 1)
	stop, err := n.serveOnboarding(ctx, done)
	if err != nil {
		return err
	}
	defer stop()
	last := ""
	for {
		if auto {
			err := n.allowed(ctx)
			if err == nil {
				err = n.state.Begin(ctx, o.SourceURL)
			}
			if err == nil {
				return nil
			}
			if text := err.Error(); text != last && ctx.Err() == nil {
				last = text
				n.log.Warn("no root keys yet", "code", fault.Code(err), "error", err)
			}
		}
		wait := time.NewTimer(retry)
		select {
		case <-ctx.Done():
			wait.Stop()
			return ctx.Err()
		case <-done:
			wait.Stop()
			if n.state.State().Phase == onboard.Ready {
				return nil
			}
			return fault.New("onboard_failed", "Failed to onboard")
		case <-wait.C:
		}
	}
}

// serveOnboarding serves, until stop is called, what there is before there are keys:
// on the service's own port, over TLS of a throwaway authority, the policy, whose
// signatures are its authority; and on the operators' port, if there is one, upstream's
// calls, with the token printed here.
func (n *Node) serveOnboarding(ctx context.Context, done chan<- struct{}) (stop func(), err error) {
	var servers []*prpc.HTTPServer
	stop = func() {
		// Whoever said Finish is to read the answer.
		soon, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		for _, s := range servers {
			if s.Shutdown(soon) != nil {
				s.Close()
			}
		}
	}
	serve := func(l net.Listener, h http.Handler) {
		s := prpc.Server(h)
		s.ErrorLog = slog.NewLogLogger(n.log.Handler(), slog.LevelDebug)
		servers = append(servers, s)
		go s.Server.Serve(l)
	}
	cert, err := n.throwaway(ctx)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", n.cfg.RPC.listen())
	if err != nil {
		return nil, fault.Wrap(err, "kms_listen", "listen on %s", n.cfg.RPC.listen())
	}
	serve(tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*cert}, NextProtos: []string{"http/1.1"}}), n.early())
	o := n.cfg.Core.Onboard
	if o.Port == 0 {
		return stop, nil
	}
	var token [16]byte
	rand.Read(token[:])
	text := hex.EncodeToString(token[:])
	operators, err := net.Listen("tcp", net.JoinHostPort(o.Address, strconv.Itoa(int(o.Port))))
	if err != nil {
		stop()
		return nil, fault.Wrap(err, "kms_listen", "listen for operators")
	}
	// The console of this machine is where its operator reads it, once; it is good for
	// this start alone.
	fmt.Fprintf(n.console(), "setup token: %s\n", text)
	serve(operators, n.operators(text, done))
	return stop, nil
}

// throwaway makes the certificate of a KMS without keys.
func (n *Node) throwaway(ctx context.Context) (*tls.Certificate, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca, err := certificate.Self(caKey, certificate.Subject{Organization: "Dstack", Name: "Dstack KMS without keys"}, ratls.Issued{}, nil, n.now())
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf := certificate.Leaf{
		Config: csr.Config{Subject: n.cfg.Core.Domain, Names: n.cfg.names()}, Public: &key.PublicKey,
		Issued: ratls.Issued{Usage: ratls.UsageKMS}, MaxLifetime: 365 * 24 * time.Hour,
	}
	if n.self != nil {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, err
		}
		if leaf.Evidence, err = n.self.Attest(ctx, ratls.ReportData(spki)); err != nil {
			return nil, fault.Wrap(err, "kms_self", "make evidence of this KMS")
		}
	}
	der, err := ca.Issue(leaf, n.now())
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// early is what a KMS without keys answers.
func (n *Node) early() http.Handler {
	get := func(context.Context, *emptypb.Empty) (*kmsapi.Policy, error) {
		if n.policies == nil {
			return nil, fault.New("policy_absent", "this KMS decides by no policy document")
		}
		return &kmsapi.Policy{Signed: n.policies.Signed()}, nil
	}
	mux := http.NewServeMux()
	mux.Handle("/prpc/", prpc.NewMux([]string{"KMS."},
		prpc.Unary("GetPolicy", get),
		prpc.Unary("UpdatePolicy", func(ctx context.Context, r *kmsapi.Policy) (*kmsapi.Policy, error) {
			if n.policies == nil {
				return get(ctx, nil)
			}
			if err := n.policies.Update(r.Signed); err != nil {
				return nil, err
			}
			return get(ctx, nil)
		}),
		prpc.Unary("GetMeta", func(context.Context, *emptypb.Empty) (*kmsapi.GetMetaResponse, error) {
			return nil, fault.New("onboarding", "this KMS has no root keys yet").WithFix("wait, or see its log for what it waits for")
		}),
	))
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "OK") })
	return mux
}

// operators serves upstream's onboarding calls to who has the token: as bearer, as
// X-Admin-Token, or in the query.
func (n *Node) operators(token string, done chan<- struct{}) http.Handler {
	rpc := prpc.NewMux([]string{"Onboard."},
		prpc.Unary("Bootstrap", n.rpcBootstrap),
		prpc.Unary("Onboard", n.rpcOnboard),
		prpc.Unary("GetAttestationInfo", n.rpcAttestationInfo),
		prpc.Unary("Finish", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) { finish(done); return nil, nil }),
	)
	mux := http.NewServeMux()
	mux.Handle("/prpc/", rpc)
	mux.HandleFunc("GET /finish", func(w http.ResponseWriter, _ *http.Request) { finish(done); io.WriteString(w, "OK") })
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, "This KMS has no root keys yet.\n\nPOST /prpc/Onboard.Bootstrap?json {\"domain\": …}\nPOST /prpc/Onboard.Onboard?json {\"source_url\": …, \"domain\": …}\nPOST /prpc/Onboard.Finish\n\nwith the header Authorization: Bearer and the token from the KMS's console.\n")
	})
	want := sha256.Sum256([]byte(token))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App-Version", n.Version)
		if r.URL.Path == "/health" {
			io.WriteString(w, "OK")
			return
		}
		given := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		if given == "" {
			given = r.Header.Get("X-Admin-Token")
		}
		if given == "" {
			given = r.URL.Query().Get("token")
		}
		if sum := sha256.Sum256([]byte(given)); subtle.ConstantTimeCompare(sum[:], want[:]) != 1 {
			http.Error(w, "the setup token is missing or wrong: it is on the KMS's console", http.StatusUnauthorized)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func finish(done chan<- struct{}) {
	select {
	case done <- struct{}{}:
	default: // said already
	}
}

// domain checks that the operator means the domain that is configured, and so measured.
func (n *Node) domain(name string) error {
	if err := CheckDomain(name); err != nil {
		return err
	}
	if name != n.cfg.Core.Domain {
		return fault.New("kms_domain", "this KMS is configured for the domain %s, not %.80q", n.cfg.Core.Domain, name)
	}
	return nil
}

func (n *Node) rpcBootstrap(ctx context.Context, r *kmsapi.BootstrapRequest) (*kmsapi.BootstrapResponse, error) {
	if err := n.domain(r.Domain); err != nil {
		return nil, err
	}
	id, err := n.begin(ctx, "")
	if err != nil {
		return nil, err
	}
	info, err := n.bootstrap(ctx, id)
	if err == nil && info == nil { // outside of a TEE nothing attests to it
		info = &kmsapi.BootstrapResponse{CaPubkey: id.CA, K256Pubkey: id.K256}
	}
	return info, err
}

func (n *Node) rpcOnboard(ctx context.Context, r *kmsapi.OnboardRequest) (*kmsapi.OnboardResponse, error) {
	if err := n.domain(r.Domain); err != nil {
		return nil, err
	}
	source := strings.TrimSuffix(strings.TrimRight(r.SourceUrl, "/"), "/prpc")
	if _, err := parseURL(source); err != nil {
		return nil, err
	}
	id, err := n.begin(ctx, source)
	if err != nil {
		return nil, err
	}
	return &kmsapi.OnboardResponse{K256Pubkey: id.K256}, nil
}

// rpcAttestationInfo tells what an authority has to allow for this KMS to be one.
func (n *Node) rpcAttestationInfo(ctx context.Context, _ *emptypb.Empty) (*kmsapi.AttestationInfoResponse, error) {
	if n.self == nil {
		return nil, fault.New("kms_self", "this KMS runs in no TEE")
	}
	a, err := n.selfApplicant(ctx)
	if err != nil {
		return nil, err
	}
	b := a.Request.Boot
	out := &kmsapi.AttestationInfoResponse{
		DeviceId: b.DeviceID[:], MrAggregated: b.MRAggregated[:], OsImageHash: b.OSImageHash, TeeVariant: b.TEEVariant, SiteName: n.cfg.Core.SiteName,
	}
	if t := a.Claims.TDX; t != nil {
		out.Ppid = t.PPID[:]
	}
	if s := a.Claims.SNP; s != nil {
		out.Ppid = s.ChipID[:]
	}
	return out, nil
}

func (n *Node) selfApplicant(ctx context.Context) (*applicant.Applicant, error) {
	var nonce dstack.ReportData
	rand.Read(nonce[:])
	raw, err := n.self.Attest(ctx, nonce)
	if err != nil {
		return nil, fault.Wrap(err, "kms_self", "make evidence of this KMS")
	}
	return n.judge.Judge(ctx, applicant.Evidence{Container: raw, ReportData: nonce, VMConfig: n.vmConfig, Session: true})
}

func parseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fault.New("onboard_source", "%.200q is not the https URL of a KMS", text)
	}
	return u, nil
}

// begin gets the keys for an operator.
func (n *Node) begin(ctx context.Context, source string) (custody.Identity, error) {
	if err := n.allowed(ctx); err != nil {
		return custody.Identity{}, err
	}
	if err := n.state.Begin(ctx, source); err != nil {
		return custody.Identity{}, err
	}
	roots, err := custody.Open(onboard.RootFile(n.cfg.Core.DataDir))
	if err != nil {
		return custody.Identity{}, err
	}
	defer roots.Wipe()
	return roots.Identity(), nil
}
