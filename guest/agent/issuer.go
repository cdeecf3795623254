// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/kmsclient"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
)

// Times of the app's certificate.
const (
	appCertPatience = 10 * time.Second // at the start
	appCertRetry    = time.Minute
	appCertLatest   = 30 * 24 * time.Hour // a certificate is renewed after that at the latest
)

// issuer signs certificates of the app.
type issuer interface {
	// issue returns the chain of PEM certificates, leaf first.
	issue(ctx context.Context, key *ecdsa.PrivateKey, r csr.Config) ([]string, error)
}

// newIssuer returns the issuer that belongs to the app's key provider.
func newIssuer(a *Agent, cfg *initrpc.Config) (issuer, error) {
	p := a.keys.Provider
	if p.Kind != keys.KMS {
		ca, err := certificate.Open([]byte(a.keys.CACert), p.CAKey)
		if err != nil {
			return nil, fault.Wrap(err, "app_keys_malformed", "the app's keys")
		}
		return &localIssuer{a, ca}, nil
	}
	malformed := func(err error) (issuer, error) {
		return nil, fault.Wrap(err, "app_keys_malformed", "the app's keys")
	}
	root, err := certificate.Parse([]byte(a.keys.CACert))
	if err != nil {
		return malformed(err)
	}
	if at, err := url.Parse(p.URL); err != nil || at.Scheme != "https" {
		return malformed(fmt.Errorf("the KMS's address %q is no https URL", p.URL))
	}
	// Over attested channels there was no temporary CA.
	var temp *certificate.Authority
	if p.TempCACert != "" {
		if temp, err = certificate.Open([]byte(p.TempCACert), p.TempCAKey); err != nil {
			return malformed(err)
		}
	}
	policy, err := kmsclient.PolicyOf(a.manifest.KMSPolicy, cfg.IsDev, cfg.PCCSURL)
	if err != nil {
		return nil, err
	}
	key, err := channel.KeyOf(a.cert.PrivateKey.(crypto.Signer))
	if err != nil {
		return nil, err
	}
	a.kmsRoot = root.RawSubjectPublicKeyInfo
	a.kms, err = kmsclient.New(kmsclient.Config{
		URLs: append([]string{p.URL}, cfg.KMSURLs[:min(len(cfg.KMSURLs), kmsclient.MaxURLs-1)]...), Root: a.kmsRoot, Policy: policy,
		Attester: channel.AttesterFunc(a.kmsEvidence), Key: key, Temp: temp, Now: a.now,
	})
	if err != nil {
		return malformed(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	return &kmsIssuer{Agent: a, roots: roots}, nil
}

// kmsEvidence is evidence for the KMS, over what binds it to a connection.
func (a *Agent) kmsEvidence(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	ev, err := a.quote(ctx, data)
	if err != nil {
		return nil, err
	}
	ev.EventLog = certLog(ev.EventLog)
	return container.Encode(ev)
}

// keyEvidence is evidence about a key, as certificates and requests for them carry
// it: a container with a log of what replays to the runtime register.
func (a *Agent) keyEvidence(ctx context.Context, spki []byte) ([]byte, error) {
	return a.kmsEvidence(ctx, ratls.ReportData(spki))
}

// certLog is the part of a log that goes into certificates (guest-agent.md §10.3):
// the runtime events, of which those of the first form lose their digest, and the
// three boot events of ACPI tables. Events of the second form keep digest and
// preimage, without which upstream's verifier refuses them (§10.4).
func certLog(events []eventlog.Event) []eventlog.Event {
	var out []eventlog.Event
	for _, e := range events {
		switch {
		case e.IsRuntime() && e.Version == 2:
			d := eventlog.Digest(e)
			e.Digest, e.Preimage = d[:], eventlog.PreimageOf(e)
		case e.IsRuntime():
			e.Digest = nil
		case e.IMR != 0 || string(e.Payload) != acpiMarker:
			continue
		}
		out = append(out, e)
	}
	return out
}

// certInfo is what the agent, as an issuer, says about its own app.
func (a *Agent) certInfo() (*ratls.AppInfo, error) {
	app := a.state.Load().info.app
	if a.body == nil || len(app.MrAggregated) != 32 {
		return nil, fault.New("app_info_unavailable", "app info cannot be established on a %s", a.tee)
	}
	out := &ratls.AppInfo{
		AppID: a.identity.AppID, ComposeHash: a.identity.ComposeHash, InstanceID: a.identity.InstanceID,
		DeviceID: dstack.DeviceID(app.DeviceId), MRAggregated: [32]byte(app.MrAggregated), OSImageHash: app.OsImageHash,
		KeyProvider: []byte(a.identity.KeyProvider), InitScriptHashes: a.identity.InitScriptHashes,
	}
	// mr_system: the launch registers and the key provider (attestation.md §5.2).
	var provider [32]byte
	if a.identity.KeyProvider != "" {
		provider = sha256.Sum256([]byte(a.identity.KeyProvider))
	}
	h := sha256.New()
	for _, m := range [][]byte{a.body.MRTD[:], a.body.RTMR[0][:], a.body.RTMR[1][:], a.body.RTMR[2][:], provider[:]} {
		h.Write(m)
	}
	h.Sum(out.MRSystem[:0])
	return out, nil
}

// localIssuer signs with the app's own CA: providers none, local and tpm.
type localIssuer struct {
	*Agent
	ca *certificate.Authority
}

func (i *localIssuer) issue(ctx context.Context, key *ecdsa.PrivateKey, r csr.Config) ([]string, error) {
	claims := ratls.Issued{Usage: ratls.UsageApp}
	var err error
	if r.WithAppInfo {
		if claims.Info, err = i.certInfo(); err != nil {
			return nil, err
		}
	}
	var evidence []byte
	if r.WithEvidence {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, err
		}
		if evidence, err = i.keyEvidence(ctx, spki); err != nil {
			return nil, err
		}
	}
	leaf, err := i.ca.Issue(certificate.Leaf{Config: r, Public: &key.PublicKey, Issued: claims, Evidence: evidence}, i.now())
	if err != nil {
		return nil, err
	}
	return []string{certificate.Encode(leaf), i.ca.PEM()}, nil
}

// kmsIssuer has the KMS sign, and trusts its root alone.
type kmsIssuer struct {
	*Agent
	roots *x509.CertPool
}

func (i *kmsIssuer) issue(ctx context.Context, key *ecdsa.PrivateKey, r csr.Config) (chain []string, err error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	evidence, err := i.keyEvidence(ctx, spki)
	if err != nil {
		return nil, err
	}
	request, signature, err := (&csr.Request{Version: 2, Config: r, Evidence: evidence}).Sign(key)
	if err != nil {
		return nil, err
	}
	err = kmsclient.Ask(ctx, i.kms, "SignCert", &kmsapi.SignCertRequest{ApiVersion: 2, Csr: request, Signature: signature, VmConfig: i.vmConfig},
		func(reply *kmsapi.SignCertResponse, _ kmsclient.Answer) (err error) {
			if reply.Release != nil {
				if _, err := i.subject().Release(reply.Release, i.kmsRoot); err != nil {
					return err
				}
			}
			chain, err = checkChain(reply.CertificateChain, spki, i.roots, i.now())
			return err
		})
	if err != nil && fault.Code(err) != "kms_chain" {
		err = fault.Wrap(err, "kms_sign_failed", "have the KMS sign a certificate").WithFix("see whether the KMS runs and allows this app")
	}
	return chain, err
}

// checkChain refuses what a KMS should not have returned: a leaf of another key, or
// certificates that do not lead to its root.
func checkChain(chain []string, spki []byte, roots *x509.CertPool, now time.Time) ([]string, error) {
	refuse := func(format string, args ...any) ([]string, error) {
		return nil, fault.New("kms_chain", "the KMS returned "+format, args...)
	}
	if len(chain) < 2 || len(chain) > 5 {
		return refuse("%d certificates", len(chain))
	}
	var leaf *x509.Certificate
	between := x509.NewCertPool()
	for n, text := range chain {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			return refuse("a certificate that is not PEM")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return refuse("a malformed certificate")
		}
		if n == 0 {
			leaf = cert
		} else {
			between.AddCert(cert)
		}
		chain[n] = certificate.Encode(cert.Raw)
	}
	if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, spki) {
		return refuse("a certificate of another key")
	}
	// A caller may have asked for a validity that is over or yet to come: the chain is
	// checked at a time when the leaf is valid.
	at := now
	if at.Before(leaf.NotBefore) || at.After(leaf.NotAfter) {
		at = leaf.NotAfter
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return refuse("a chain that does not lead to its root: %v", err)
	}
	return chain, nil
}

// renewAppCert makes the certificate that Info shows (guest-agent.md §7): a client
// certificate of this instance with its evidence. It returns when to do so again.
func (a *Agent) renewAppCert(ctx context.Context) (time.Duration, error) {
	key, err := randomP256()
	if err != nil {
		return 0, err
	}
	if err := a.authorised(); err != nil {
		return 0, err
	}
	chain, err := a.issuer.issue(ctx, key, csr.Config{Subject: "demo-cert", ClientAuth: true, WithEvidence: true})
	if err != nil {
		return 0, err
	}
	block, _ := pem.Decode([]byte(chain[0]))
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return 0, err
	}
	a.appCert.Store(&chain)
	// Two thirds of what is left, so that there is time for a KMS that is down.
	return min(max(leaf.NotAfter.Sub(a.now())*2/3, appCertRetry), appCertLatest), a.renewInfo()
}

// keepAppCert renews the certificate until ctx ends.
func (a *Agent) keepAppCert(ctx context.Context) {
	wait := a.appCertDue
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		var err error
		if wait, err = a.renewAppCert(ctx); err != nil {
			if ctx.Err() == nil {
				a.log.Warn("certificate of the app", "error", err)
			}
			wait = appCertRetry
		}
	}
}
