// SPDX-License-Identifier: Apache-2.0

// Package kmsclient asks a KMS, which answers at one or several addresses: for a
// guest's init, which wants keys, and for its agent, which wants certificates and
// leases.
//
// Guarantees: what [Ask] hands over came over a connection whose other end proved in
// the handshake to be the KMS that is meant: the root key that is pinned or was learned
// issued its certificate for being a KMS (channel.Issued), or, with a [Policy], its
// evidence showed that it is the app that the manifest names (an attested channel, or
// RA-TLS with a KMS that knows none). Every connection is judged by itself; what one
// showed counts for no other (threats.md C03). A KMS that says nothing holds up the
// others for seconds, one that refuses keeps nobody from asking the next, and all is
// bounded in time and size.
//
// Trusted: the pin and the policy, which are measured. Without a pin and without a
// policy it is whoever answers first (spec/kms.md §5.1). Attacker-controlled:
// addresses, the network, and every byte of an answer until it was accepted.
//
// Implements spec/kms.md §5.1; design.md §7; threats.md C01, C03, C04.
package kmsclient

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/prpc"
)

// Times and sizes of a KMS (spec/kms.md §5.1; sizes are ours).
const (
	ConnectTimeout = 5 * time.Second  // for a connection, and for its handshake
	Timeout        = 60 * time.Second // for one address
	MaxReply       = 256 << 10        // bytes
	MaxURLs        = 16

	// Silence is after how long the next address is asked beside one that has not
	// answered.
	Silence = 5 * time.Second

	MaxReason = 512 // bytes of a KMS's words
)

// Config says which KMS is meant and who asks.
type Config struct {
	// URLs are where the KMS answers; https, with or without /prpc at the end.
	URLs []string
	// Root is the DER SubjectPublicKeyInfo of the KMS's root CA, pinned or learned.
	// Empty takes the root that answers.
	Root []byte
	// Policy says what the KMS's evidence must show; nil asks for none.
	Policy *Policy
	// Attester makes the evidence of this end; required.
	Attester channel.Attester
	// Key is the guest's channel key, once its init committed to one; before that nil.
	Key *channel.Key
	// Temp is the temporary CA of this KMS where it is known already, which saves a
	// connection; it counts with a Root only.
	Temp *certificate.Authority
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Client asks one KMS. It is safe for concurrent use.
type Client struct {
	cfg     Config
	at      []endpoint
	silence time.Duration

	mu   sync.Mutex
	last int // which address answered last
}

// Answer says where an answer came from.
type Answer struct {
	URL string // ending in /prpc
	// Root is the DER SubjectPublicKeyInfo that issued the KMS's certificate; nil for a
	// session whose KMS nothing but the Policy names.
	Root []byte
	// TempCACert and TempCAKey are the KMS's temporary CA, PEM; empty for a session.
	TempCACert, TempCAKey string
	// Session says that the answer came over an attested channel.
	Session bool
}

// New returns a client. Codes: kms_url, kms_pin, key_evidence.
func New(cfg Config) (*Client, error) {
	switch {
	case cfg.Attester == nil:
		return nil, fault.New("key_evidence", "there is nothing to make evidence for a KMS")
	case len(cfg.URLs) == 0:
		return nil, fault.New("kms_url", "the app's keys come from a KMS, and the host names none").
			WithFix("configure the VMM with the address of a KMS, or deploy with another key provider")
	case len(cfg.URLs) > MaxURLs:
		return nil, fault.New("kms_url", "the host names %d KMSs, more than %d", len(cfg.URLs), MaxURLs)
	}
	if len(cfg.Root) > 0 {
		if parsed, err := x509.ParsePKIXPublicKey(cfg.Root); err != nil || !isP256(parsed) {
			return nil, fault.New("kms_pin", "key_provider_id of the manifest is no DER SubjectPublicKeyInfo of a P-256 key").
				WithFix("pin the key of the KMS's root CA, in hexadecimal digits")
		}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Client{cfg: cfg, silence: Silence}
	var first error
	for _, u := range cfg.URLs {
		at, err := parseURL(u)
		if err != nil && first == nil {
			first = err
		}
		if err == nil {
			c.at = append(c.at, at)
		}
	}
	if len(c.at) == 0 {
		return nil, first
	}
	return c, nil
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
	base := strings.TrimRight(u.String(), "/")
	if !strings.HasSuffix(base, "/prpc") {
		base += "/prpc"
	}
	return endpoint{base: base, host: u.Hostname()}, nil
}

// Ask calls a method at one address after another, beginning with the one that answered
// last, until accept takes an answer: an error of it counts as the KMS's. The answer is
// wiped when accept returns, which keeps copies of what it wants.
//
// When there is none, the error is that of the first KMS that refused (kms_denied), for
// it decided something; else that of the first address. Its text has all of them.
//
// Codes: kms_unreachable, kms_denied (with the KMS's words), kms_reply (malformed, too
// large, or of another KMS than the pinned), key_evidence, kms_not_appraised,
// kms_evidence_missing, kms_session; in the handshake those of [channel.Issued]; those
// of accept.
func Ask[T any, P interface {
	*T
	proto.Message
}](ctx context.Context, c *Client, method string, req proto.Message, accept func(P, Answer) error) error {
	var mu sync.Mutex
	won := false
	return c.each(ctx, method, func(ctx context.Context, at endpoint) error {
		reply := P(new(T))
		defer func() { wipe(reply.ProtoReflect()) }()
		answer, err := c.call(ctx, at, method, req, reply)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if won { // another address was faster
			return context.Canceled
		}
		err = accept(reply, answer)
		won = err == nil
		return err
	})
}

// wipe overwrites the byte strings of a message: keys may be among them.
func wipe(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			for i := range v.List().Len() {
				wipe(v.List().Get(i).Message())
			}
		case !f.IsList() && !f.IsMap() && f.Kind() == protoreflect.MessageKind:
			wipe(v.Message())
		case !f.IsList() && f.Kind() == protoreflect.BytesKind:
			clear(v.Bytes())
		}
		return true
	})
}

// each tries the addresses until one succeeds.
func (c *Client) each(ctx context.Context, method string, try func(context.Context, endpoint) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.mu.Lock()
	first := c.last
	c.mu.Unlock()
	index := func(i int) int { return (first + i) % len(c.at) }
	type result struct {
		i   int
		err error
	}
	results := make(chan result, len(c.at))
	errs := make([]error, len(c.at))
	started, ended := 0, 0
	next := func() {
		i := started
		started++
		go func() {
			ctx, cancel := context.WithTimeout(ctx, Timeout)
			defer cancel()
			results <- result{i, try(ctx, c.at[index(i)])}
		}()
	}
	next()
	silent := time.NewTimer(c.silence)
	defer silent.Stop()
	for {
		select {
		case r := <-results:
			ended++
			if r.err == nil {
				cancel()
				for ; ended < started; ended++ {
					<-results
				}
				c.mu.Lock()
				c.last = index(r.i)
				c.mu.Unlock()
				return nil
			}
			errs[r.i] = r.err
			switch {
			case started < len(c.at):
				next()
				silent.Reset(c.silence)
			case ended == started:
				return c.failure(method, errs, index)
			}
		case <-silent.C:
			if started < len(c.at) {
				next()
				silent.Reset(c.silence)
			}
		}
	}
}

// failure is the one error of several.
func (c *Client) failure(method string, errs []error, index func(int) int) error {
	var first error
	var all []string
	for i, err := range errs {
		if fault.Code(err) == "" {
			err = fault.Wrap(err, "kms_unreachable", "ask the KMS")
		}
		if first == nil || fault.Code(first) != "kms_denied" && fault.Code(err) == "kms_denied" {
			first = err
		}
		all = append(all, fmt.Sprintf("%.200s: %v", strings.TrimSuffix(c.at[index(i)].base, "/prpc"), err))
	}
	return fault.New(fault.Code(first), "no KMS answers %s: %s", method, strings.Join(all, "; ")).WithFix("%s", fault.Fix(first))
}

// call makes one call at one address, over the strongest connection that both know.
func (c *Client) call(ctx context.Context, at endpoint, method string, req, reply proto.Message) (Answer, error) {
	if p := c.cfg.Policy; p != nil {
		err := c.session(ctx, at, method, req, reply)
		if err == nil {
			return Answer{URL: at.base, Root: c.cfg.Root, Session: true}, nil
		}
		old := fault.Code(err) == "channel_alpn" || fault.Code(err) == "channel_handshake"
		switch {
		case !old:
			return Answer{}, err
		case p.RequireSession:
			return Answer{}, fault.Wrap(err, "kms_session", "the manifest demands a KMS with attested channels").
				WithFix("use a KMS that speaks %s, or remove require_session from kms_policy", channel.ALPN)
		}
	}
	return c.ratls(ctx, at, method, req, reply)
}

// session makes an attested channel and one call on it.
func (c *Client) session(ctx context.Context, at endpoint, method string, req, reply proto.Message) error {
	p := c.cfg.Policy
	cfg := &channel.Config{
		Appraiser: p.judge(), Intended: p.Intended, Attester: c.cfg.Attester, Key: c.cfg.Key,
		AppEvidence: true, // a KMS is an app, which kms_policy knows by its workload
		Timeout:     Timeout, Now: c.cfg.Now,
	}
	t := cfg.Transport()
	t.DisableKeepAlives, t.DisableCompression, t.MaxResponseHeaderBytes = true, true, 16<<10
	defer t.CloseIdleConnections()
	err := exchange(ctx, t, at, method, req, reply)
	if fault.Code(err) == "channel_refused" { // by the KMS, of our evidence
		return fault.Wrap(err, "kms_denied", "the KMS refuses this guest's evidence").WithFix("see the KMS's log, and whether its policy allows this app, manifest and OS image")
	}
	return err
}

// exchange makes one call over a transport.
func exchange(ctx context.Context, t http.RoundTripper, at endpoint, method string, req, reply proto.Message) error {
	client := &prpc.Client{BaseURL: at.base, HTTP: &http.Client{Transport: bounded{t}}}
	err := client.Call(ctx, method, req, reply)
	if refusal, ok := err.(*fault.Error); ok {
		// The server's words, behind whatever code it chose to give.
		by := "the KMS refuses: "
		if refusal.Code != "rpc_failed" {
			by = "the KMS refuses (" + Printable(refusal.Code, 64) + "): "
		}
		return fault.New("kms_denied", "%s", by+Printable(refusal.Message, MaxReason)).
			WithFix("see the KMS's log, and whether its policy allows this app, manifest and OS image")
	}
	if err != nil && fault.Code(err) == "" {
		return fault.Wrap(err, "kms_unreachable", "reach the KMS")
	}
	return err
}

func malformed(format string, args ...any) error {
	return fault.New("kms_reply", "the KMS's answer is not acceptable: "+format, args...)
}

// RootOf returns the root certificate that a KMS names, PEM, whose key must be that of
// the answer; code kms_reply. What else the text holds is not in what it returns.
func (a Answer) RootOf(text string) (cert *x509.Certificate, err error) {
	if cert, err = rootCertificate(text); err != nil {
		return nil, err
	}
	if len(a.Root) > 0 && !bytes.Equal(cert.RawSubjectPublicKeyInfo, a.Root) {
		return nil, malformed("its root is not the one that it is known by")
	}
	return cert, nil
}

func rootCertificate(text string) (*x509.Certificate, error) {
	cert, err := certificate.Parse([]byte(text))
	if err != nil {
		return nil, malformed("its root certificate: %v", err)
	}
	if !cert.IsCA || !isP256(cert.PublicKey) || cert.CheckSignatureFrom(cert) != nil {
		return nil, malformed("its root certificate is not one of a P-256 authority that signs itself")
	}
	return cert, nil
}

// Printable makes a server's words fit for logs and consoles: no control characters,
// whole characters, not many.
func Printable(text string, most int) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
	if len(text) <= most {
		return text
	}
	cut := most
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut]
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
	case resp.ContentLength > MaxReply:
		resp.Body.Close()
		return nil, malformed("it has %d bytes, more than %d", resp.ContentLength, MaxReply)
	}
	resp.Body = &boundedBody{resp.Body, MaxReply}
	return resp, nil
}

type boundedBody struct {
	inner io.ReadCloser
	left  int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.inner.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, malformed("it has more than %d bytes", MaxReply)
	}
	return n, err
}

func (b *boundedBody) Close() error { return b.inner.Close() }
