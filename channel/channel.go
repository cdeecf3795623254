// SPDX-License-Identifier: Apache-2.0

// Package channel makes connections whose peer is judged by evidence instead of
// by a certificate authority, and is the only package that may switch Go's
// certificate verification off.
//
// The rule that makes that safe: whoever gets bytes from this package also gets
// the public key (SubjectPublicKeyInfo) of the very connection they came over,
// and appraises both together. "Verify, then dial again" cannot be said with
// this API (threats.md C03): one call makes one connection, never follows a
// redirect, never retries on another one, never uses a proxy from the
// environment.
//
// There are three ways, from strong to weak:
//
//   - An attested channel ([Dial], [Listen]) is for dstack's own parts. Inside a
//     TLS 1.3 session with its own ALPN token, before the first application byte,
//     each end that is asked gives evidence made for this connection: over keying
//     material that TLS exports, the leaf keys of both ends, its role, the
//     verifier's nonce and whom the verifier means. Relay, even by a thief of the
//     TLS key, reflection and replay fail (C01, B08); the same app on another
//     machine is refused when an instance is meant (C02); evidence that an app
//     rather than the system made is refused, since the key must be the one that
//     the guest's init committed to before any app ran (B20). Not covered: a guest
//     whose init or kernel is in the attacker's hands, and a thief of the channel
//     key who also controls an app inside the same instance.
//   - RA-TLS ([DialRATLS], [ListenRATLS]) is for upstream's programs: evidence
//     about a TLS key, made at some time, in the certificate. It says so: its peers
//     have [BindingKey].
//   - [FetchEvidence] and [FetchCertificate] get what a verifier looks at and give
//     no connection to talk over.
//
// An [Appraiser] decides who is accepted and an [Attester] makes evidence; a peer
// that was accepted is a value ([Peer]) that hangs on its connection, and nothing
// here returns a bool. Attacker-controlled are every byte of a peer and the path;
// all of it is bounded in size and time before it is used, and untrusted in
// meaning until the appraiser has accepted it and this package has held what the
// appraiser established against the connection.
//
// On the wire, a message of the handshake is one byte of kind, the payload's
// length as u32 big-endian, and the payload:
//
//	1 hello     nonce (32) ‖ evidence wanted (0 or 1) ‖ intended identity; at most 4 KiB
//	2 evidence  container; at most 1 MiB
//	3 accept    empty
//	4 refuse    error code; at most 64 bytes
//
// in the order hello → ← hello, evidence → [evidence,] accept ← accept, the client
// first. What evidence is made over is in commitment.go, the encoding of an
// intended identity in peer.go. The version of all that is in the token [ALPN].
//
// Implements design.md §4; attestation.md §7.4 and §7.5; threats.md B08, B20, C01
// to C05.
package channel

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// EvidencePath is where an instance answers a nonce with evidence.
const EvidencePath = "/.well-known/dstack/attest"

// Limits of one fetch.
const (
	MinNonce = 16 // bytes
	MaxNonce = 64 // bytes
	MaxReply = 16 << 20

	maxHeader   = 64 << 10
	maxRefusal  = 4 << 10
	dialTimeout = 15 * time.Second
	// A quote takes milliseconds on hardware and up to seconds in an emulated
	// guest whose other requests are served first.
	fetchTimeout = 60 * time.Second
)

// FetchEvidence sends nonce (16 to 64 bytes) to an instance's evidence endpoint
// and returns the raw JSON it answered.
//
// target is the base URL of the instance, such as https://host:8090, or the full
// URL of the endpoint. For https, spki is the SubjectPublicKeyInfo DER of the
// leaf certificate of the one TLS 1.3 connection that carried the exchange; the
// certificate itself is not judged. For http, spki is nil: nothing binds the
// answer to the connection.
//
// Error codes: evidence_url (target or nonce unusable), evidence_unreachable (no
// connection, or it broke), evidence_refused (the instance declined, or
// redirected), evidence_endpoint_absent (404: an upstream instance, or another
// server), evidence_malformed (not HTTP, not JSON, too large).
func FetchEvidence(ctx context.Context, target string, nonce []byte) (reply, spki []byte, err error) {
	return FetchEvidenceBy(ctx, func(ctx context.Context, addr string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}, target, nonce)
}

// FetchEvidenceBy is FetchEvidence over the connection that dial makes to the host:port of
// target, for callers that reach it otherwise than by the system's network.
func FetchEvidenceBy(ctx context.Context, by func(ctx context.Context, addr string) (net.Conn, error), target string, nonce []byte) (reply, spki []byte, err error) {
	u, addr, err := parseTarget(target)
	if err != nil {
		return nil, nil, err
	}
	if len(nonce) < MinNonce || len(nonce) > MaxNonce {
		return nil, nil, fault.New("evidence_url", "a nonce has %d to %d bytes, got %d", MinNonce, MaxNonce, len(nonce))
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()

	conn, spki, err := dial(ctx, by, u, addr)
	if err != nil {
		return nil, nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	reply, err = exchange(ctx, conn, u, nonce)
	if err != nil {
		return nil, nil, err
	}
	return reply, spki, nil
}

// parseTarget returns the endpoint's URL and the address to dial.
func parseTarget(target string) (*url.URL, string, error) {
	bad := func(why string) (*url.URL, string, error) {
		return nil, "", fault.New("evidence_url", "cannot fetch evidence from %q: %s", target, why).
			WithFix("give the address of the instance, such as https://host:8090")
	}
	u, err := url.Parse(target)
	switch {
	case err != nil:
		return bad("not a URL")
	case u.Scheme != "https" && u.Scheme != "http":
		return bad("the scheme must be https or http")
	case u.Hostname() == "":
		return bad("it names no host")
	case u.User != nil:
		return bad("it carries a user name or password")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return bad("it has a query or a fragment")
	}
	if !strings.HasSuffix(u.Path, EvidencePath) {
		u = u.JoinPath(EvidencePath)
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443", "http": "80"}[u.Scheme]
	}
	return u, net.JoinHostPort(loopback(u.Hostname()), port), nil
}

// loopback returns host, or 127.0.0.1 for the names that are loopback whatever a
// resolver says (RFC 6761 §6.3).
func loopback(host string) string {
	if h := strings.TrimSuffix(strings.ToLower(host), "."); h == "localhost" || strings.HasSuffix(h, ".localhost") {
		return "127.0.0.1"
	}
	return host
}

// dial makes the one connection. spki is nil for http.
func dial(ctx context.Context, by func(context.Context, string) (net.Conn, error), u *url.URL, addr string) (net.Conn, []byte, error) {
	dialCtx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	unreachable := func(err error) error {
		return fault.Wrap(err, "evidence_unreachable", "connect to %s", u.Host).
			WithFix("check that the instance runs and that its port 8090 is forwarded to this address")
	}
	raw, err := by(dialCtx, addr)
	if err != nil {
		return nil, nil, unreachable(err)
	}
	if u.Scheme == "http" {
		return raw, nil, nil
	}
	var spki []byte
	conn := tls.Client(raw, &tls.Config{
		ServerName: u.Hostname(),
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"http/1.1"},
		// No authority vouches for the key: the evidence does, and the caller
		// compares it with the key recorded here. TLS 1.3 has proved possession
		// of that key by the time the handshake returns.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) (err error) {
			spki, err = leafSPKI(cs)
			return err
		},
	})
	if err := conn.HandshakeContext(dialCtx); err != nil {
		raw.Close()
		return nil, nil, unreachable(fmt.Errorf("TLS 1.3 handshake: %w", err))
	}
	return conn, spki, nil
}

// exchange sends the request and reads the whole reply, over conn alone.
func exchange(ctx context.Context, conn net.Conn, u *url.URL, nonce []byte) ([]byte, error) {
	body, err := json.Marshal(map[string]string{"nonce": hex.EncodeToString(nonce)})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, fault.Wrap(err, "evidence_url", "cannot fetch evidence from %s", u)
	}
	req.Close = true
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Accept-Encoding", "identity") // a reply is what it is: no bombs
	req.Header.Set("User-Agent", "dstack-verify")
	broke := func(err error) error {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fault.Wrap(err, "evidence_unreachable", "fetch evidence from %s", u)
	}
	if err := req.Write(conn); err != nil {
		return nil, broke(err)
	}
	// http.ReadResponse bounds nothing by itself.
	limited := &io.LimitedReader{R: conn, N: maxHeader}
	resp, err := http.ReadResponse(bufio.NewReaderSize(limited, 4<<10), req)
	if err != nil {
		var ne net.Error
		if ctx.Err() != nil || errors.As(err, &ne) || (errors.Is(err, io.ErrUnexpectedEOF) && limited.N > 0) {
			return nil, broke(err)
		}
		return nil, fault.Wrap(err, "evidence_malformed", "%s did not answer in HTTP/1.1", u)
	}
	defer resp.Body.Close()
	limited.N = MaxReply + maxHeader // chunk framing included

	if resp.StatusCode != http.StatusOK {
		return nil, refusal(u, resp)
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return nil, fault.New("evidence_malformed", "%s answered in content encoding %q, which was not asked for", u, enc)
	}
	if resp.ContentLength > MaxReply {
		return nil, tooLarge(u)
	}
	reply, err := io.ReadAll(io.LimitReader(resp.Body, MaxReply+1))
	switch {
	case len(reply) > MaxReply || limited.N <= 0:
		return nil, tooLarge(u)
	case err != nil:
		return nil, broke(err)
	case !json.Valid(reply):
		return nil, fault.New("evidence_malformed", "the reply of %s is not JSON", u)
	}
	return reply, nil
}

func tooLarge(u *url.URL) error {
	return fault.New("evidence_malformed", "the reply of %s is larger than %d bytes", u, MaxReply)
}

// refusal turns a status other than 200 into an error. The text of a JSON
// {"error"} is quoted: it is the server's word and may hold anything.
func refusal(u *url.URL, resp *http.Response) error {
	switch {
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return fault.New("evidence_refused", "%s redirects to %q; evidence counts only for the connection it came over", u, resp.Header.Get("Location")).
			WithFix("give the address of the instance itself")
	case resp.StatusCode == http.StatusNotFound:
		return fault.New("evidence_endpoint_absent", "%s does not exist", u).
			WithFix("this is an upstream dstack instance or another server: verify it from its RA-TLS certificate or a saved evidence file, without freshness")
	}
	text := ""
	if body, err := io.ReadAll(io.LimitReader(resp.Body, maxRefusal)); err == nil {
		var e struct {
			Error string `json:"error"`
		}
		if json.Unmarshal(body, &e) == nil && e.Error != "" {
			text = fmt.Sprintf(": %q", e.Error)
		}
	}
	e := fault.New("evidence_refused", "%s answered with status %d%s", u, resp.StatusCode, text)
	if resp.StatusCode == http.StatusTooManyRequests {
		if after := resp.Header.Get("Retry-After"); after != "" {
			return e.WithFix("the instance limits how many quotes it makes; try again in %q seconds", after)
		}
		return e.WithFix("the instance limits how many quotes it makes; try again later")
	}
	return e
}
