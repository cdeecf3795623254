// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
)

// Times of certificates and of the KMS that signs them.
const (
	kmsDialTimeout = 5 * time.Second // guest-agent.md §9.2
	kmsTimeout     = 60 * time.Second
	maxKMSReply    = 1 << 20

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
func newIssuer(a *Agent) (issuer, error) {
	p := a.keys.Provider
	if p.Kind != keys.KMS {
		ca, err := certificate.Open([]byte(a.keys.CACert), p.CAKey)
		if err != nil {
			return nil, fault.Wrap(err, "app_keys_malformed", "the app's keys")
		}
		return &localIssuer{a, ca}, nil
	}
	ca, err := certificate.Open([]byte(p.TempCACert), p.TempCAKey)
	if err != nil {
		return nil, fault.Wrap(err, "app_keys_malformed", "the app's keys")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(a.keys.CACert)) {
		return nil, fault.New("app_keys_malformed", "the app's keys: the KMS's root certificate is malformed")
	}
	at, err := url.Parse(p.URL)
	if err != nil || at.Scheme != "https" || at.Host == "" || at.User != nil {
		return nil, fault.New("app_keys_malformed", "the app's keys: the KMS's address %q is no https URL", p.URL)
	}
	return &kmsIssuer{Agent: a, ca: ca, url: strings.TrimSuffix(p.URL, "/") + "/SignCert?json", roots: roots}, nil
}

// keyEvidence is evidence about a key, as certificates and requests for them carry
// it: a container with a log of what replays to the runtime register.
func (a *Agent) keyEvidence(ctx context.Context, spki []byte) ([]byte, error) {
	ev, err := a.quote(ctx, ratls.ReportData(spki))
	if err != nil {
		return nil, err
	}
	ev.EventLog = certLog(ev.EventLog)
	return container.Encode(ev)
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

// kmsIssuer has a KMS sign, over TLS that trusts the KMS's root alone and shows
// evidence of this instance.
type kmsIssuer struct {
	*Agent
	ca    *certificate.Authority // the KMS's temporary CA, which everyone may use
	url   string
	roots *x509.CertPool
}

// clientCert makes the certificate that this instance shows to the KMS.
func (i *kmsIssuer) clientCert(ctx context.Context) (tls.Certificate, error) {
	key, err := randomP256()
	if err != nil {
		return tls.Certificate{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return tls.Certificate{}, err
	}
	evidence, err := i.keyEvidence(ctx, spki)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, err := i.ca.Issue(certificate.Leaf{Config: csr.Config{Subject: "RA-TLS TEMP Cert", ClientAuth: true}, Public: &key.PublicKey, Evidence: evidence}, i.now())
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{leaf, i.ca.Certificate.Raw}, PrivateKey: key}, nil
}

func (i *kmsIssuer) issue(ctx context.Context, key *ecdsa.PrivateKey, r csr.Config) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, kmsTimeout)
	defer cancel()
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
	cert, err := i.clientCert(ctx)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(map[string]any{
		"api_version": 2, "csr": hex.EncodeToString(request), "signature": hex.EncodeToString(signature), "vm_config": i.vmConfig,
	})
	if err != nil {
		return nil, err
	}
	reply, err := i.post(ctx, cert, body)
	if err != nil {
		return nil, fault.Wrap(err, "kms_sign_failed", "have the KMS sign a certificate").WithFix("see whether the KMS runs and allows this app")
	}
	return checkChain(reply, spki, i.roots, i.now())
}

// post asks once, on a connection of its own: the certificate is of this call.
func (i *kmsIssuer) post(ctx context.Context, cert tls.Certificate, body []byte) ([]string, error) {
	dial := &tls.Config{RootCAs: i.roots, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, Time: i.now}
	transport := &http.Transport{
		TLSClientConfig: dial, TLSHandshakeTimeout: kmsDialTimeout, DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10,
		DialContext: (&net.Dialer{Timeout: kmsDialTimeout}).DialContext, DisableCompression: true,
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("the KMS redirects") }}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, i.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxKMSReply))
	if err != nil {
		return nil, err
	}
	var reply struct {
		Chain []string `json:"certificate_chain"`
		Error string   `json:"error"`
	}
	err = json.Unmarshal(text, &reply)
	if resp.StatusCode != http.StatusOK || reply.Error != "" {
		return nil, fmt.Errorf("it answers %s: %.300q", resp.Status, reply.Error)
	}
	return reply.Chain, err
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
