// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

// variable is one encrypted variable. Its value is printed nowhere.
type variable struct {
	name  string
	value []byte
}

// String keeps a value out of messages.
func (v variable) String() string { return v.name + "=<hidden>" }

// variables reads -e and --env-file: files first, so that -e prevails. No message
// repeats a value, nor a line, which may be one.
//
// Codes: env_needs_kms, env_malformed, env_missing, env_too_large, file_missing.
func (w *workload) variables(provider string) ([]variable, error) {
	if len(w.Env)+len(w.EnvFile) == 0 {
		return nil, nil
	}
	if provider != manifest.KeyProviderKMS {
		return nil, fault.New("env_needs_kms", "with the key provider %s there is no key to encrypt variables to before the app runs", provider).
			WithFix("--key-provider kms; or let the app derive its secrets from /var/run/dstack.sock")
	}
	values := map[string][]byte{}
	take := func(where string, text []byte) error {
		name, value, given := bytes.Cut(text, []byte("="))
		if manifest.CheckEnvName(string(name)) != nil {
			return fault.New("env_malformed", "%s does not begin with the name of a variable", where).
				WithFix("write KEY=VALUE or KEY; names have letters, digits and '_'")
		}
		if !given {
			from, ok := os.LookupEnv(string(name))
			if !ok {
				return fault.New("env_missing", "%s names %s, which has no value in this environment", where, name).WithFix("export %s, or write %s=VALUE into a file for --env-file", name, name)
			}
			value = []byte(from)
		}
		if len(value) > envelope.MaxValue {
			return fault.New("env_too_large", "%s has a value of %d bytes, more than %d", name, len(value), envelope.MaxValue).WithFix("give the app large data in another way")
		}
		values[string(name)] = bytes.Clone(value)
		return nil
	}
	for _, path := range w.EnvFile {
		data, err := readLimited(path, 2*envelope.MaxTotal)
		if err != nil {
			return nil, err
		}
		defer clear(data)
		for i, line := range bytes.Split(data, []byte("\n")) {
			line = bytes.TrimSuffix(line, []byte("\r"))
			if trimmed := bytes.TrimSpace(line); len(trimmed) == 0 || trimmed[0] == '#' {
				continue
			}
			if err := take(path+" line "+strconv.Itoa(i+1), line); err != nil {
				return nil, err
			}
		}
	}
	for i, text := range w.Env {
		if err := take("-e number "+strconv.Itoa(i+1), []byte(text)); err != nil {
			return nil, err
		}
	}
	var out []variable
	total := 0
	for name, value := range values {
		out = append(out, variable{name, value})
		total += len(name) + len(value)
	}
	if len(out) > envelope.MaxVariables || total > envelope.MaxTotal {
		return nil, fault.New("env_too_large", "%d variables of %d bytes are more than %d of %d", len(out), total, envelope.MaxVariables, envelope.MaxTotal).
			WithFix("give the app large data in another way")
	}
	slices.SortFunc(out, func(a, b variable) int { return strings.Compare(a.name, b.name) })
	if len(out) == 0 {
		return nil, fault.New("env_malformed", "the files for --env-file hold no variable").WithFix("leave them out, or write KEY=VALUE")
	}
	return out, nil
}

func names(env []variable) []string {
	out := make([]string, len(env))
	for i, v := range env {
		out[i] = v.name
	}
	return out
}

// sealable sets what the manifest says of variables: their names, and that only this
// deployer may write them. Codes: kms_url_missing, kms_signer.
func (w *workload) sealable(a *app, p *plan, d *manifest.Draft) error {
	if len(p.kms) == 0 {
		return fault.New("kms_url_missing", "variables are encrypted to a key of the KMS, and nothing says where it is").WithFix("--kms URL")
	}
	var err error
	if w.KMSSigner != "" {
		p.kmsSigner, err = hex.DecodeString(strings.TrimPrefix(w.KMSSigner, "0x"))
		if err != nil || len(p.kmsSigner) != 33 {
			return fault.New("kms_signer", "--kms-signer is no compressed secp256k1 public key of 33 bytes").
				WithFix("give the key that the KMS's operator publishes, or leave it out: the KMS's root is pinned in any case")
		}
	}
	if p.deployer, err = a.stack.DeployerKey(); err != nil {
		return err
	}
	d.AllowedEnvs, d.EnvSigners = names(p.env), [][]byte{p.deployer.Public().(ed25519.PublicKey)}
	return nil
}

// Times of a question to a KMS.
const (
	kmsDialTimeout = 5 * time.Second
	kmsTimeout     = 30 * time.Second
)

// appKey asks the KMSs in order for the public key to which the app's variables are
// encrypted. Each connection must end at the root that the manifest pins; the key
// must be a fresh one, signed by the KMS that answers there, or by the signer given
// (threats.md G12). Whoever answers in a KMS's place is not passed over.
//
// Codes: kms_unreachable, kms_signer, env_key_signer, env_key_stale, and those of
// channel.Issued and of releaselog.Memory.
func (p *plan) appKey(a *app) ([]byte, error) {
	var failed error
	for _, u := range p.kms {
		a.step("ask %s for the key of the app's variables", u)
		key, err := p.appKeyAt(a, u)
		if err == nil {
			return key, nil
		}
		if fault.Code(err) != "" {
			return nil, err
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", u, err))
	}
	return nil, fault.Wrap(failed, "kms_unreachable", "no KMS tells the key of the app's variables").WithFix("check the addresses of --kms, and that a KMS runs there")
}

func (p *plan) appKeyAt(a *app, address string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(a.ctx, kmsTimeout)
	defer cancel()
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	cfg, err := channel.Issued{Issuer: p.pin, Usage: ratls.UsageKMS}.Config(u.Hostname())
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		TLSClientConfig: cfg, TLSHandshakeTimeout: kmsDialTimeout, Proxy: http.ProxyFromEnvironment,
		DialContext: (&net.Dialer{Timeout: kmsDialTimeout}).DialContext,
	}
	defer transport.CloseIdleConnections()
	c := &prpc.Client{BaseURL: strings.TrimSuffix(address, "/") + "/prpc", HTTP: &http.Client{Transport: transport}}
	var meta kmsapi.GetMetaResponse
	if err := c.Call(ctx, "GetMeta", &emptypb.Empty{}, &meta); err != nil {
		return nil, err
	}
	err = observe(ctx, a, p.pin, meta.LogHead, func(method string, req, resp proto.Message) error { return c.Call(ctx, method, req, resp) })
	if err != nil {
		return nil, err
	}
	if p.kmsSigner != nil && !bytes.Equal(p.kmsSigner, meta.K256Pubkey) {
		return nil, fault.New("kms_signer", "the KMS signs with the key %x, and --kms-signer names %x", meta.K256Pubkey, p.kmsSigner).
			WithFix("find out which of the two the KMS's operator publishes")
	}
	var answer kmsapi.PublicKeyResponse
	if err := c.Call(ctx, "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: p.lock.AppID[:]}, &answer); err != nil {
		return nil, err
	}
	if err := envelope.VerifyKey(meta.K256Pubkey, p.lock.AppID, answer.PublicKey, answer.SignatureV1, answer.Timestamp, time.Now()); err != nil {
		return nil, err
	}
	return answer.PublicKey, nil
}

// seal encrypts the variables to the app and this manifest, signs them, and wipes
// them. The version is the time, which only rises.
//
// Codes: those of appKey, env_name, env_name_denied, env_too_large.
func (p *plan) seal(a *app) ([]byte, error) {
	if p.env == nil {
		return nil, nil
	}
	public, err := p.appKey(a)
	if err != nil {
		return nil, err
	}
	values := map[string]string{}
	for _, v := range p.env {
		values[v.name] = string(v.value)
		clear(v.value)
	}
	defer clear(values)
	return envelope.Seal(public, envelope.Binding{App: p.lock.AppID, Compose: p.lock.ComposeHash, Version: uint64(time.Now().UnixMilli())}, p.deployer, values)
}
