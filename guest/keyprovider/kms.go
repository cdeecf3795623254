// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/prpc"
)

// Times and sizes of a KMS (spec/kms.md §5.1; sizes are ours).
const (
	connectTimeout = 5 * time.Second
	kmsTimeout     = 60 * time.Second // for one address
	maxReply       = 256 << 10        // bytes
	maxURLs        = 16
	maxGateways    = 4 << 10 // bytes of gateway_app_id
	maxReason      = 512     // bytes of a KMS's words
)

// KMS asks a KMS for the keys of an app, which are the same on every machine.
//
// Two connections are made: for the temporary CA under which the guest shows its
// evidence, and for the keys. On both the server must prove in the handshake that
// the root key issued its certificate for being a KMS. With a pin that is the pinned
// key, both times; without, it is on the second what it was on the first (threats.md
// C03).
type KMS struct {
	// URLs are tried in order until one gives keys; https, without /prpc.
	URLs []string
	// Pin is key_provider_id of the manifest: the DER SubjectPublicKeyInfo of the
	// KMS's root CA. Empty: none.
	Pin []byte
	// App is whose keys they are.
	App dstack.AppID
	// VMConfig is what the KMS computes expected measurements from.
	VMConfig string
	// Attester makes the evidence in this end's certificate; required.
	Attester channel.Attester
	// Appraiser, if any, judges the evidence that the KMS's certificate may carry.
	Appraiser Appraiser
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Appraiser decides whether evidence is a KMS's that may give keys.
type Appraiser interface {
	// AppraiseKMS returns nil, or the error that refuses it, which has a code. a is
	// nil when the certificate carries no evidence.
	AppraiseKMS(a *ratls.Attestation) error
}

// Keys implements [Provider]. When no address gives keys the error has the code of
// the first one's and the text of all.
//
// Codes: kms_url, kms_pin, kms_unreachable, kms_denied (with the KMS's words), kms_reply
// (malformed, too large, or of another KMS than the pinned), key_evidence; in the
// handshake those of [channel.Issued] and of the appraiser.
func (k *KMS) Keys(ctx context.Context) (*Grant, error) {
	switch {
	case k.Attester == nil:
		return nil, fault.New("key_evidence", "there is nothing to make evidence for a KMS")
	case len(k.URLs) == 0:
		return nil, fault.New("kms_url", "the app's keys come from a KMS, and the host names none").
			WithFix("configure the VMM with the address of a KMS, or deploy with another key provider")
	case len(k.URLs) > maxURLs:
		return nil, fault.New("kms_url", "the host names %d KMSs, more than %d", len(k.URLs), maxURLs)
	}
	if len(k.Pin) > 0 {
		if parsed, err := x509.ParsePKIXPublicKey(k.Pin); err != nil || !isP256(parsed) {
			return nil, fault.New("kms_pin", "key_provider_id of the manifest is no DER SubjectPublicKeyInfo of a P-256 key").
				WithFix("pin the key of the KMS's root CA, in hexadecimal digits")
		}
	}
	var first error
	var all []string
	for _, u := range k.URLs {
		grant, err := k.ask(ctx, u)
		if err == nil {
			return grant, nil
		}
		if fault.Code(err) == "" {
			err = fault.Wrap(err, "kms_unreachable", "ask the KMS")
		}
		if first == nil {
			first = err
		}
		all = append(all, fmt.Sprintf("%.200s: %v", u, err))
	}
	return nil, fault.New(fault.Code(first), "no KMS gives the app's keys: %s", strings.Join(all, "; ")).WithFix("%s", fault.Fix(first))
}

func isP256(public any) bool {
	key, ok := public.(*ecdsa.PublicKey)
	return ok && key.Curve == elliptic.P256()
}

// endpoint is a KMS's address.
type endpoint struct {
	base string // ending in /prpc
	host string // of certificates
}

func parseURL(text string) (endpoint, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return endpoint{}, fault.New("kms_url", "%.200q is not the https URL of a KMS", text).WithFix("it looks like https://kms.example.com:8000")
	}
	return endpoint{strings.TrimRight(u.String(), "/") + "/prpc", u.Hostname()}, nil
}

// ask gets the keys from one address.
func (k *KMS) ask(ctx context.Context, address string) (*Grant, error) {
	ctx, cancel := context.WithTimeout(ctx, kmsTimeout)
	defer cancel()
	at, err := parseURL(address)
	if err != nil {
		return nil, err
	}

	var temp kmsapi.GetTempCaCertResponse
	var leaf *x509.Certificate // of the first connection
	err = k.call(ctx, at, channel.Issued{
		Issuer: pin(k.Pin), FirstContact: len(k.Pin) == 0,
		Check: func(c *x509.Certificate) error { leaf = c; return k.appraise(c) },
	}, "GetTempCaCert", nil, &temp)
	if err != nil {
		return nil, err
	}
	// Whoever answered first must have shown a certificate of the root that he names.
	cert, err := k.root(temp.CaCert)
	if err != nil {
		return nil, err
	}
	root := cert.RawSubjectPublicKeyInfo
	if err := channel.CheckIssuer(leaf, root); err != nil {
		return nil, err
	}
	client, err := k.clientCertificate(ctx, &temp)
	if err != nil {
		return nil, err
	}

	var reply kmsapi.AppKeyResponse
	defer wipeReply(&reply)
	err = k.call(ctx, at, channel.Issued{Issuer: root, Check: k.appraise, Certificate: client},
		"GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1, VmConfig: k.VMConfig}, &reply)
	if err != nil {
		return nil, err
	}
	again, err := k.root(reply.CaCert)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again.RawSubjectPublicKeyInfo, root) {
		return nil, malformed("the root of its keys is not the root of its certificate")
	}
	app, err := k.appKeys(&reply)
	if err != nil {
		return nil, err
	}
	// What was checked, and not what else the text holds: the app trusts it.
	app.CACert = certificate.Encode(again.Raw)
	app.Provider = keys.Provider{
		Kind: keys.KMS, URL: at.base, SPKI: root,
		TempCACert: temp.TempCaCert, TempCAKey: []byte(temp.TempCaKey),
	}
	return &Grant{Keys: app, OSImageHash: bytes.Clone(reply.OsImageHash), Unpinned: len(k.Pin) == 0}, nil
}

func pin(p []byte) []byte {
	if len(p) == 0 {
		return nil
	}
	return p
}

func malformed(format string, args ...any) error {
	return fault.New("kms_reply", "the KMS's answer is not acceptable: "+format, args...)
}

// appraise judges the evidence in a KMS's certificate, if somebody does.
func (k *KMS) appraise(leaf *x509.Certificate) error {
	if k.Appraiser == nil {
		return nil
	}
	a, err := ratls.FromCertificate(leaf)
	if err != nil && fault.Code(err) != "ratls_no_evidence" {
		return err
	}
	return k.Appraiser.AppraiseKMS(a)
}

// root returns the key of a KMS's root certificate, which must be the pinned one.
func (k *KMS) root(text string) (*x509.Certificate, error) {
	cert, err := certificate.Parse([]byte(text))
	if err != nil {
		return nil, malformed("its root certificate: %v", err)
	}
	if !cert.IsCA || !isP256(cert.PublicKey) || cert.CheckSignatureFrom(cert) != nil {
		return nil, malformed("its root certificate is not one of a P-256 authority that signs itself")
	}
	if len(k.Pin) > 0 && !bytes.Equal(cert.RawSubjectPublicKeyInfo, k.Pin) {
		return nil, malformed("its root is not the one that the manifest pins")
	}
	return cert, nil
}

// clientCertificate makes the certificate by which the KMS appraises this guest: a
// fresh key, with evidence over it, signed by the temporary CA.
func (k *KMS) clientCertificate(ctx context.Context, temp *kmsapi.GetTempCaCertResponse) (*tls.Certificate, error) {
	ca, err := certificate.Open([]byte(temp.TempCaCert), []byte(temp.TempCaKey))
	if err != nil {
		return nil, malformed("its temporary authority: %v", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	evidence, err := k.Attester.Attest(ctx, ratls.ReportData(spki))
	if err != nil {
		return nil, fault.Wrap(err, "key_evidence", "make evidence for the KMS")
	}
	der, err := ca.Issue(certificate.Leaf{
		Config: csr.Config{Subject: "RA-TLS TEMP Cert", ClientAuth: true},
		Public: &key.PublicKey, Evidence: evidence,
	}, clock(k.Now))
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der, ca.Certificate.Raw}, PrivateKey: key}, nil
}

// appKeys reads the keys out of an answer.
func (k *KMS) appKeys(r *kmsapi.AppKeyResponse) (*keys.AppKeys, error) {
	out := &keys.AppKeys{AppSignature: bytes.Clone(r.K256Signature), GatewayAppID: r.GatewayAppId}
	err := func() (err error) {
		if out.Disk, err = keys.NewDiskKey(r.DiskCryptKey); err != nil {
			return err
		}
		if out.Env, err = keys.NewEnvKey(r.EnvCryptKey); err != nil {
			return err
		}
		if out.App, err = keys.NewAppKey(r.K256Key); err != nil {
			return err
		}
		if out.Disk.IsZero() || out.Env.IsZero() {
			return errors.New("a key is all zeros")
		}
		public, err := derive.K256Public(out.App.Bytes())
		if err != nil {
			return err
		}
		// By whom is for those to check who know the KMS's second key; a signature it is.
		if _, err := derive.RecoverApp(r.K256Signature, k.App, public); err != nil {
			return fmt.Errorf("the signature over the app's key: %w", err)
		}
		if n := len(r.OsImageHash); n != 0 && n != dstack.ImageHashSize {
			return fmt.Errorf("the OS image hash has %d bytes, not %d", n, dstack.ImageHashSize)
		}
		return checkGateways(out.GatewayAppID)
	}()
	if err != nil {
		out.Wipe()
		return nil, malformed("%v", err)
	}
	return out, nil
}

func wipeReply(r *kmsapi.AppKeyResponse) {
	clear(r.DiskCryptKey)
	clear(r.EnvCryptKey)
	clear(r.K256Key)
}

// call makes one connection, which server describes, and one call on it.
func (k *KMS) call(ctx context.Context, at endpoint, server channel.Issued, method string, req, resp proto.Message) error {
	server.Usage, server.Now = ratls.UsageKMS, k.Now
	cfg, err := server.Config(at.host)
	if err != nil {
		return err
	}
	transport := &http.Transport{
		TLSClientConfig: cfg, TLSHandshakeTimeout: connectTimeout,
		DialContext:       (&net.Dialer{Timeout: connectTimeout}).DialContext,
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	}
	defer transport.CloseIdleConnections()
	client := &prpc.Client{BaseURL: at.base, HTTP: &http.Client{Transport: bounded{transport}}}
	err = client.Call(ctx, method, req, resp)
	if refusal, ok := err.(*fault.Error); ok {
		// The server's words, behind whatever code it chose to give.
		return fault.New("kms_denied", "the KMS refuses: %s", printable(refusal.Message)).
			WithFix("see the KMS's log, and whether its policy allows this app, manifest and OS image")
	}
	if err != nil && fault.Code(err) == "" {
		return fault.Wrap(err, "kms_unreachable", "reach the KMS")
	}
	return err
}

// printable makes a server's words fit for logs and consoles: no control characters,
// whole characters, not many.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
	if len(text) <= maxReason {
		return text
	}
	cut := maxReason
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut]
}

// checkGateways takes what keys.AppKeys.GatewayAppID may be, or the word any.
func checkGateways(text string) error {
	if len(text) > maxGateways {
		return fmt.Errorf("gateway_app_id has %d bytes, more than %d", len(text), maxGateways)
	}
	if text == "" || text == "any" {
		return nil
	}
	for id := range strings.SplitSeq(text, ",") {
		b, err := hex.DecodeString(strings.TrimPrefix(strings.TrimSpace(id), "0x"))
		if err != nil || len(b) != len(dstack.AppID{}) {
			return fmt.Errorf("gateway_app_id: %.100q is no app id", id)
		}
	}
	return nil
}

// bounded refuses replies that are too large, or that no KMS gives.
type bounded struct{ inner http.RoundTripper }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.inner.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusBadRequest:
		resp.Body.Close()
		return nil, malformed("HTTP status %d", resp.StatusCode)
	case resp.ContentLength > maxReply:
		resp.Body.Close()
		return nil, malformed("it has %d bytes, more than %d", resp.ContentLength, maxReply)
	}
	resp.Body = &boundedBody{resp.Body, maxReply}
	return resp, nil
}

type boundedBody struct {
	inner io.ReadCloser
	left  int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.inner.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, malformed("it has more than %d bytes", maxReply)
	}
	return n, err
}

func (b *boundedBody) Close() error { return b.inner.Close() }
