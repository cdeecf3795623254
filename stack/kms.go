// SPDX-License-Identifier: Apache-2.0

package stack

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/process"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/signer"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

// GuestHost is this machine's loopback as guests reach it (QEMU's user network).
const GuestHost = "10.0.2.2"

// KMSNode is one KMS of the stack.
type KMSNode struct {
	Name string `json:"name"`
	// URL is where this machine reaches it, GuestURL where guests do.
	URL      string `json:"url"`
	GuestURL string `json:"guest_url"`
	// VM is the CVM that it runs in; empty: it is a process of this machine, which has
	// its keys (development trust).
	VM    string       `json:"vm,omitempty"`
	AppID dstack.AppID `json:"app_id,omitzero"`
}

// Keys is the stack's key management: who its KMSs are. All have one root.
type Keys struct {
	RootCA string    `json:"root_ca"` // DER SubjectPublicKeyInfo, hexadecimal: key_provider_id
	K256   string    `json:"k256"`    // compressed, hexadecimal
	Nodes  []KMSNode `json:"nodes"`
	// Policy is what apps measure of the KMSs, so that guests appraise them; nil when one
	// of them is no CVM.
	Policy *manifest.PeerPolicy `json:"policy,omitempty"`
}

// Pin is key_provider_id of the stack's apps.
func (k *Keys) Pin() []byte {
	b, _ := hex.DecodeString(k.RootCA)
	return b
}

func (s *Stack) keysFile() string       { return filepath.Join(s.Dir, "kms.json") }
func (s *Stack) kmsDir() string         { return filepath.Join(s.Dir, "kms") }
func (s *Stack) kmsPIDFile() string     { return filepath.Join(s.Dir, "kms.pid") }
func (s *Stack) KMSLogFile() string     { return filepath.Join(s.Dir, "kms.log") }
func (s *Stack) kmsConfigFile() string  { return filepath.Join(s.Dir, "kms.toml") }
func (s *Stack) PolicyFile() string     { return filepath.Join(s.Dir, "policy.json") }
func (s *Stack) governanceFile() string { return filepath.Join(s.Dir, "governance.key") }

// Keys returns the stack's key management. Code kms_absent.
func (s *Stack) Keys() (*Keys, error) {
	text, err := os.ReadFile(s.keysFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New("kms_absent", "this stack has no KMS").WithFix("run `dstack up` without --no-kms, or name one with --kms and --kms-id")
	}
	if err != nil {
		return nil, err
	}
	k := new(Keys)
	if err := json.Unmarshal(text, k); err != nil {
		return nil, fmt.Errorf("%s: %w", s.keysFile(), err)
	}
	return k, nil
}

func (s *Stack) saveKeys(k *Keys) error {
	text, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(s.keysFile(), append(text, '\n'), 0o600)
}

// GovernanceKey returns the key that signs the stack's policy, making it at the first
// use. Codes: those of package signer.
func (s *Stack) GovernanceKey() (ed25519.PrivateKey, error) {
	if _, err := os.Lstat(s.governanceFile()); errors.Is(err, fs.ErrNotExist) {
		return signer.Create(s.governanceFile())
	}
	return signer.Open(s.governanceFile())
}

// policyValidity is how long a policy of the stack lasts; each change renews it.
const policyValidity = 90 * 24 * time.Hour

// Policy returns the policy in force. Codes: those of package policy.
func (s *Stack) Policy() (*policy.Document, error) {
	text, err := os.ReadFile(s.PolicyFile())
	if err != nil {
		return nil, fault.Wrap(err, "policy_missing", "read the stack's policy").WithFix("run `dstack up`")
	}
	doc, err := policy.Bytes(text)
	if err != nil {
		return nil, err
	}
	return policy.Parse(doc)
}

// Govern changes the policy, signs it and gives it to every KMS, and to those that have
// no keys yet. What edit returns takes effect as a whole, or not at all; a KMS that
// cannot be reached is an error, and gets the policy when Govern is called again.
func (s *Stack) Govern(ctx context.Context, edit func(*policy.Document) (*policy.Document, error), keyless ...KMSNode) error {
	doc, err := s.Policy()
	if err != nil {
		return err
	}
	next, err := edit(doc)
	if err != nil {
		return err
	}
	if next != doc {
		if err := s.writePolicy(next); err != nil {
			return err
		}
	}
	return s.SubmitPolicy(ctx, keyless...)
}

func (s *Stack) writePolicy(doc *policy.Document) error {
	key, err := s.GovernanceKey()
	if err != nil {
		return err
	}
	text, err := doc.Encode()
	if err != nil {
		return err
	}
	signed, err := policy.Sign(text, key)
	if err != nil {
		return err
	}
	return durable.WriteFile(s.PolicyFile(), signed, 0o600)
}

// SubmitPolicy gives the policy to every KMS of the stack, and to those that have no
// keys yet. A KMS takes it for its signatures, whoever brings it.
func (s *Stack) SubmitPolicy(ctx context.Context, keyless ...KMSNode) error {
	k, err := s.Keys()
	if fault.Code(err) == "kms_absent" {
		k, err = new(Keys), nil
	}
	if err != nil {
		return err
	}
	signed, err := os.ReadFile(s.PolicyFile())
	if err != nil {
		return err
	}
	var failed []error
	for _, n := range k.Nodes {
		if err := n.Call(ctx, k.Pin(), "UpdatePolicy", &kmsapi.Policy{Signed: signed}, &kmsapi.Policy{}); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", n.Name, err))
		}
	}
	for _, n := range keyless {
		if err := n.Call(ctx, nil, "UpdatePolicy", &kmsapi.Policy{Signed: signed}, &kmsapi.Policy{}); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", n.Name, err))
		}
	}
	if err := errors.Join(failed...); err != nil {
		err = &partial{err, len(k.Nodes) + len(keyless) - len(failed)}
		return fault.Wrap(err, "policy_undelivered", "give the policy to the stack's KMSs").WithFix("see `dstack kms status`; run the command again when they answer")
	}
	return nil
}

// kmsTimeout bounds one question to a KMS.
const kmsTimeout = 30 * time.Second

// Call asks a KMS whose certificate the root key, DER SubjectPublicKeyInfo, must have
// issued; nil takes any, for one that has no keys yet.
func (n KMSNode) Call(ctx context.Context, root []byte, method string, req, resp proto.Message) error {
	u, err := url.Parse(n.URL)
	if err != nil {
		return err
	}
	cfg, err := channel.Issued{Issuer: root, FirstContact: root == nil, Usage: ratls.UsageKMS}.Config(u.Hostname())
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: cfg, TLSHandshakeTimeout: 10 * time.Second, DialContext: (&net.Dialer{Timeout: 5 * time.Second}).DialContext}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, kmsTimeout)
	defer cancel()
	c := &prpc.Client{BaseURL: strings.TrimSuffix(n.URL, "/") + "/prpc", HTTP: &http.Client{Transport: transport}}
	err = c.Call(ctx, method, req, resp)
	if err != nil && fault.Code(err) == "" {
		return fault.Wrap(err, "kms_unreachable", "ask the KMS at %s", n.URL).WithFix("see `dstack kms status`, and its log %s", n.Name)
	}
	return err
}

// identify asks a KMS who it is, until it has root keys and tells.
func (n KMSNode) identify(ctx context.Context, patience time.Duration, ended <-chan error) (rootCA, k256 []byte, err error) {
	for deadline := time.Now().Add(patience); ; {
		var meta kmsapi.GetMetaResponse
		if err = n.Call(ctx, nil, "GetMeta", nil, &meta); err == nil {
			root, err := certificate.Parse([]byte(meta.CaCert))
			if err != nil {
				return nil, nil, fault.Wrap(err, "kms_start", "the KMS's root certificate")
			}
			return root.RawSubjectPublicKeyInfo, meta.K256Pubkey, nil
		}
		if time.Now().After(deadline) {
			return nil, nil, err
		}
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case e := <-ended:
			return nil, nil, fault.New("kms_start", "the KMS stopped while starting: %v", e)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// AddNode waits until a KMS has its keys, checks that they are the stack's, and lists it.
func (s *Stack) AddNode(ctx context.Context, n KMSNode, patience time.Duration) (*Keys, error) {
	return s.addNode(ctx, n, patience, nil)
}

func (s *Stack) addNode(ctx context.Context, n KMSNode, patience time.Duration, ended <-chan error) (*Keys, error) {
	rootCA, k256, err := n.identify(ctx, patience, ended)
	if err != nil {
		return nil, err
	}
	k, err := s.Keys()
	if fault.Code(err) == "kms_absent" {
		k, err = &Keys{RootCA: hex.EncodeToString(rootCA), K256: hex.EncodeToString(k256)}, nil
	}
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(k.Pin(), rootCA) || k.K256 != hex.EncodeToString(k256) {
		return nil, fault.New("kms_root", "the KMS %s has other root keys than the stack's: what apps encrypted under those it cannot open", n.Name).
			WithFix("`dstack down` ends the stack with its apps; keep its state directory otherwise")
	}
	for i := range k.Nodes {
		if k.Nodes[i].Name == n.Name {
			k.Nodes[i] = n
			return k, s.saveKeys(k)
		}
	}
	k.Nodes = append(k.Nodes, n)
	return k, s.saveKeys(k)
}

// KMSPort returns the port of this machine at which a KMS in a CVM is reached; it stays
// the same as long as the stack does, since guests are told it.
func (s *Stack) KMSPort(name string) (int, error) {
	path := filepath.Join(s.Dir, "kms-ports.json")
	ports := map[string]int{}
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return 0, err
	default:
		if err := json.Unmarshal(text, &ports); err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
	}
	if port := ports[name]; port != 0 {
		return port, nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	ports[name] = l.Addr().(*net.TCPAddr).Port
	l.Close()
	if text, err = json.Marshal(ports); err != nil {
		return 0, err
	}
	return ports[name], durable.WriteFile(path, text, 0o600)
}

// AppraisedBy makes the stack's apps measure which KMSs may give them keys: those that
// the policy allows. devRoots is the file of development roots, if the TEE is simulated.
func (s *Stack) AppraisedBy(devRoots string) error {
	k, err := s.Keys()
	if err != nil {
		return err
	}
	doc, err := s.Policy()
	if err != nil {
		return err
	}
	p := &manifest.PeerPolicy{DevRoots: devRoots, RequireSession: true}
	for _, n := range k.Nodes {
		if n.VM == "" {
			return nil // there is one that shows no evidence
		}
		p.AppID = n.AppID
	}
	for _, m := range doc.KMS.Allow {
		if m.AppID == nil || *m.AppID != p.AppID {
			continue
		}
		if !slices.Contains(p.ComposeHashes, *m.ComposeHash) {
			p.ComposeHashes = append(p.ComposeHashes, *m.ComposeHash)
		}
		if !slices.Contains(p.OSImageHashes, *m.OSImageHash) {
			p.OSImageHashes = append(p.OSImageHashes, *m.OSImageHash)
		}
	}
	k.Policy = p
	return s.saveKeys(k)
}

// localNode is the KMS that is a process of this machine.
const localNode = "local"

// startKMS starts a KMS as a process of this machine, with its policy, and waits for it.
func (s *Stack) startKMS(ctx context.Context, tee string, step func(string, ...any)) (*Keys, error) {
	authority, err := s.authority()
	if err != nil {
		return nil, err
	}
	node := KMSNode{Name: localNode}
	if k, err := s.Keys(); err == nil {
		for _, n := range k.Nodes {
			if n.Name == localNode {
				node = n
			}
		}
	}
	if node.URL != "" && node.Call(ctx, nil, "GetMeta", nil, &kmsapi.GetMetaResponse{}) == nil {
		step("the KMS is running already")
		return s.Keys()
	}
	if node.URL == "" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		_, port, err := net.SplitHostPort(l.Addr().String())
		l.Close()
		if err != nil {
			return nil, err
		}
		node.URL, node.GuestURL = "https://127.0.0.1:"+port, "https://"+GuestHost+":"+port
	}
	u, err := url.Parse(node.URL)
	if err != nil {
		return nil, err
	}
	roots := ""
	if tee == "sim" {
		roots = s.DevRoots()
	}
	text := fmt.Sprintf(`# Written by dstack up. This KMS is a process of this machine, which has its keys:
# development trust.
[rpc]
address = "127.0.0.1"
port = %s

[core]
data_dir = %q
domain = "kms.dstack.localhost"
names = "localhost,127.0.0.1,%s"
replication = false

[core.guest]
socket = ""

[core.attestation]
dev_roots = %q

%s
[core.onboard]
auto_bootstrap_domain = "kms.dstack.localhost"
`, u.Port(), s.kmsDir(), GuestHost, roots, authority)
	if err := durable.WriteFile(s.kmsConfigFile(), []byte(text), 0o600); err != nil {
		return nil, err
	}
	step("start the KMS (a process of this machine: development trust)")
	p, err := s.spawn("dstack-kms-dev", s.KMSLogFile(), s.kmsPIDFile(), "serve", "--config", s.kmsConfigFile())
	if err != nil {
		return nil, err
	}
	k, err := s.addNode(ctx, node, 60*time.Second, p.Exited)
	if err != nil {
		return nil, fault.Wrap(err, "kms_start", "the KMS does not serve:\n%s", p.Tail()).WithFix("see %s", s.KMSLogFile())
	}
	return k, nil
}

// authority is a KMS's configuration for what the stack is governed by.
func (s *Stack) authority() (string, error) {
	if s.GovernedByChain() {
		return s.chainAuthority()
	}
	key, err := s.GovernanceKey()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(`[core.auth_api]
type = "policy"

[core.auth_api.policy]
keys = %q
threshold = 1
file = %q
`, hex.EncodeToString(key.Public().(ed25519.PublicKey)), s.PolicyFile()), nil
}

// foundPolicy makes the first policy of a stack.
func (s *Stack) foundPolicy(tee string) error {
	if _, err := os.Stat(s.PolicyFile()); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.writePolicy(NewPolicy(tee))
}

// NewPolicy is the first policy of a stack: nothing is allowed but what deploy adds,
// on any machine that the stack's TEE vouches for.
func NewPolicy(tee string) *policy.Document {
	trust := dstack.TrustProduction
	if tee == "sim" {
		trust = dstack.TrustDevelopment
	}
	d := policy.New(trust, time.Now(), policyValidity)
	d.Devices.Any = true
	d.TCB.Accept = []string{"UpToDate"}
	return d
}

// AllowApp lets an app with this manifest have keys on this image, in the policy of the
// stack. Of several KMSs one is enough to boot by: that others do not know of it yet is
// the first error, which a caller may pass over, as no one may pass over a revocation
// that did not arrive.
func (s *Stack) AllowApp(ctx context.Context, app policy.App, image policy.Image) (undelivered, err error) {
	err = s.Govern(ctx, func(d *policy.Document) (*policy.Document, error) {
		d, err := d.Renew(time.Now(), policyValidity)
		if err == nil {
			d, err = d.AllowImage(image)
		}
		if err == nil {
			d, err = d.AllowApp(app)
		}
		return d, err
	})
	var some *partial
	if errors.As(err, &some) && some.delivered > 0 {
		return err, nil
	}
	return nil, err
}

// partial says that a policy reached some KMSs and not others.
type partial struct {
	error
	delivered int
}

func (p *partial) Unwrap() error { return p.error }

// StopKMS stops the KMS that is a process of this machine.
func (s *Stack) StopKMS(grace time.Duration) error {
	return process.StopRecorded(s.kmsPIDFile(), grace)
}
