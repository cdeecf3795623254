// SPDX-License-Identifier: Apache-2.0

package webhook

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
)

// Authority asks a webhook. It keeps nothing between questions.
type Authority struct {
	// URL is the base: https, http on this machine (127.0.0.1, [::1], localhost), or
	// unix:///path/of/socket.
	URL string
	// Key signs the answers: 32 bytes.
	Key ed25519.PublicKey
	// HTTP, when given, has the transport for https and http: such as one with a client
	// certificate. Nil means one of its own, with the system's roots and no proxy.
	HTTP *http.Client
}

var _ governance.Authority = (*Authority)(nil)

// Decide implements governance.Authority. Codes: those of [Verify], webhook_url,
// webhook_unreachable when there is no answer in 5 seconds or none of status 200, and
// purpose_denied. What a webhook denies without a code has the code webhook_denied.
func (a *Authority) Decide(ctx context.Context, r governance.Request) (governance.Decision, error) {
	begun := time.Now()
	body, err := newRequest(r)
	if err != nil {
		return governance.Decision{}, err
	}
	data, err := a.do(ctx, http.MethodPost, paths[r.Role], body)
	if err != nil {
		return governance.Decision{}, err
	}
	// The time of the request is the KMS's, which may know better than this machine's clock.
	return Verify(a.Key, body, data, r.At.Add(time.Since(begun)))
}

// info is what GET / tells.
type info struct {
	Status          *string `json:"status"`
	KMSContractAddr *string `json:"kmsContractAddr"`
	GatewayAppID    *string `json:"gatewayAppId"`
	ChainID         *uint64 `json:"chainId"`
	Implementation  *string `json:"appImplementation"`
	// What follows is told and not read.
	AppAuthImplementation *string `json:"appAuthImplementation,omitempty"`
	ETHRPCURL             *string `json:"ethRpcUrl,omitempty"`
}

var address = regexp.MustCompile(`^(0x[0-9a-fA-F]{40})?$`)

// About implements governance.Authority. Nothing signs it. Codes: webhook_url,
// webhook_unreachable, webhook_too_large, webhook_malformed.
func (a *Authority) About(ctx context.Context) (governance.About, error) {
	data, err := a.do(ctx, http.MethodGet, "/", nil)
	if err != nil {
		return governance.About{}, err
	}
	var i info
	if err := strictjson.Decode(data, &i, strictjson.Limits{Size: MaxAnswer, Depth: 8, Unknown: true}); err != nil {
		return governance.About{}, fault.Wrap(err, "webhook_malformed", "what the webhook tells of itself does not parse")
	}
	if i.Status == nil || i.KMSContractAddr == nil || i.GatewayAppID == nil || i.ChainID == nil || i.Implementation == nil ||
		!address.MatchString(*i.KMSContractAddr) || !address.MatchString(*i.Implementation) || len(*i.GatewayAppID) > maxReason {
		return governance.About{}, fault.New("webhook_malformed", "what the webhook tells of itself must have status, kmsContractAddr, gatewayAppId, chainId and appImplementation")
	}
	return governance.About{
		GatewayAppID: *i.GatewayAppID, Contract: *i.KMSContractAddr, ChainID: *i.ChainID, Implementation: *i.Implementation,
		By: "webhook " + keyID(a.Key),
	}, nil
}

// do makes one request over a connection of its own.
func (a *Authority) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	base, transport, err := a.transport()
	if err != nil {
		return nil, err
	}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, base+path, bytes.NewReader(body))
	if err != nil {
		return nil, fault.Wrap(err, "webhook_url", "the webhook's address %s", base)
	}
	req.Header.Set("User-Agent", "dstack-kms")
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	client := http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // one would carry the question elsewhere
	}}
	if a.HTTP != nil && a.HTTP.Transport != nil && !strings.HasPrefix(a.URL, "unix:") {
		client.Transport = a.HTTP.Transport
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, a.unreachable(err, "ask the webhook")
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, MaxAnswer+1))
	if res.StatusCode != http.StatusOK {
		return nil, a.unreachable(nil, "the webhook answered %d: %q", res.StatusCode, cut(strings.ToValidUTF8(string(data), "?"), maxReason))
	}
	if err != nil {
		return nil, a.unreachable(err, "read the webhook's answer")
	}
	if len(data) > MaxAnswer {
		return nil, fault.New("webhook_too_large", "the webhook answered more than %d bytes", MaxAnswer)
	}
	return data, nil
}

func (a *Authority) unreachable(err error, format string, args ...any) error {
	return fault.Wrap(err, "webhook_unreachable", "%s", fmt.Sprintf(format, args...)).WithFix("see whether the webhook runs, and its log")
}

// transport returns the base without a slash at its end, and how to get there.
func (a *Authority) transport() (string, *http.Transport, error) {
	bad := func(why string) (string, *http.Transport, error) {
		return "", nil, fault.New("webhook_url", "the webhook's address %s", why).
			WithFix("use https, http on this machine, or unix:///path/of/socket")
	}
	u, err := url.Parse(a.URL)
	if err != nil {
		// The error would repeat an address that may hold a password.
		return bad("does not parse")
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return bad("has a user, a query or a fragment")
	}
	dialer := &net.Dialer{Timeout: Timeout}
	t := &http.Transport{
		DialContext: dialer.DialContext, DisableKeepAlives: true, DisableCompression: true, TLSHandshakeTimeout: Timeout,
		MaxResponseHeaderBytes: 16 << 10,
	}
	base := strings.TrimRight(u.Scheme+"://"+u.Host+u.EscapedPath(), "/")
	switch u.Scheme {
	case "https":
		if u.Hostname() == "" {
			return bad("names no host")
		}
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	case "http":
		ip, err := netip.ParseAddr(u.Hostname())
		if u.Hostname() != "localhost" && (err != nil || !ip.IsLoopback()) {
			return bad("is http to another machine")
		}
		t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			if err := isHere(c.RemoteAddr()); err != nil {
				c.Close()
				return nil, err
			}
			return c, nil
		}
	case "unix":
		if u.Host != "" || !strings.HasPrefix(u.Path, "/") {
			return bad("names no socket")
		}
		base = "http://localhost"
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", u.Path)
		}
	default:
		return bad("is neither https, http nor unix")
	}
	return base, t, nil
}

// isHere refuses an address of another machine: localhost is what a resolver says it is.
func isHere(a net.Addr) error {
	if to, ok := a.(*net.TCPAddr); !ok || !to.IP.IsLoopback() {
		return errors.New("localhost is another machine")
	}
	return nil
}
