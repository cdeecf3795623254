// SPDX-License-Identifier: Apache-2.0

// Package authority is who decides, as a service's configuration names it: a signed policy
// document, a signed webhook, or contracts on a chain. KMS and gateway take the same keys.
//
// A configuration that names nobody, or somebody whose answers nobody signs, is an error:
// nothing here admits by default.
//
// Trusted: the configuration, which in a CVM is measured; the directory that the newest
// document and block are remembered in. What authorities themselves trust, their packages
// say (governance/policy, webhook, chain).
//
// Implements spec/kms.md §8 and spec/governance.md §3.
package authority

import (
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ethereum/go-ethereum/common"

	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/chain"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/webhook"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// Types of an authority.
const (
	TypePolicy  = "policy"
	TypeWebhook = "webhook"
	TypeChain   = "chain"
)

// Config is who decides.
type Config struct {
	Type    string  `toml:"type"` // policy, webhook or chain
	Policy  Policy  `toml:"policy"`
	Chain   Chain   `toml:"chain"`
	Webhook Webhook `toml:"webhook"`
}

// Policy is the signed policy document.
type Policy struct {
	// Keys are the Ed25519 keys, 64 hexadecimal digits each, separated by commas, of which
	// Threshold must have signed a document.
	Keys      string `toml:"keys"`
	Threshold int    `toml:"threshold"`
	// File is a signed document to begin with, or its text; a newer one that was submitted
	// stands.
	File string `toml:"file"`
}

// Chain is the governance contracts on a chain (package governance/chain).
type Chain struct {
	// RPC are JSON-RPC endpoints of different operators, separated by commas, of which
	// Threshold must agree.
	RPC       string `toml:"rpc"`
	Threshold int    `toml:"threshold"`
	ChainID   uint64 `toml:"chain_id"`
	Registry  string `toml:"registry"` // address of the KMS's registry contract
	// MaxStaleness is how old the finalised block may be; 30 min. Confirmations is how many
	// blocks behind the head count as final; 0: the chain's own finality.
	MaxStaleness  config.Duration `toml:"max_staleness"`
	Confirmations uint64          `toml:"confirmations"`
	// Foreign takes apps whose contracts are of other code than ours. What such a contract
	// answers is computed from proven code and storage; how it may change is not known.
	Foreign bool `toml:"foreign"`
}

// Webhook is a signed webhook.
type Webhook struct {
	URL string `toml:"url"`
	Key string `toml:"key"` // Ed25519, 64 hexadecimal digits
}

// Check checks what a configuration says under a key, such as core.auth. The error is
// made by bad, and so has the code of whose configuration it is.
func (c *Config) Check(key string, bad func(format string, args ...any) *fault.Error) error {
	switch c.Type {
	case TypePolicy:
		if _, err := c.Policy.keys(); err != nil {
			return bad("%s.policy: %v", key, err).WithFix("name the governance keys whose signatures count")
		}
	case TypeWebhook:
		if _, err := publicKey(c.Webhook.Key); err != nil || c.Webhook.URL == "" {
			return bad("%s.webhook needs url and key: an unsigned answer decides nothing", key)
		}
	case TypeChain:
		if a := c.Chain; !common.IsHexAddress(a.Registry) || len(chain.Endpoints(a.RPC)) == 0 || a.Threshold < 1 || a.ChainID == 0 {
			return bad("%s.chain needs rpc, threshold, chain_id and registry", key).WithFix("name endpoints of different operators, and how many of them must agree")
		}
	case "dev":
		return bad("%s.type dev would allow everything, and does not exist", key).WithFix("sign a policy, or use dstack up, which signs its own")
	default:
		return bad("%s.type is %q, not policy, webhook or chain", key, c.Type)
	}
	return nil
}

// Files of the directory in which an authority remembers.
const (
	policyFile = "policy.json"
	chainFile  = "chain-finalised" // the highest block seen
)

// Options are what is not configured.
type Options struct {
	Dir string           // that only the service may write
	Now func() time.Time // nil: time.Now
	Log *slog.Logger     // nil: nowhere
}

// Open makes the authority of a configuration that passed Check. documents is the same one
// when it decides by policy documents, and nil otherwise. Codes of the packages of the
// three; authority_policy: the file cannot be read.
func Open(c Config, o Options) (decides governance.Authority, documents *policy.Authority, err error) {
	switch c.Type {
	case TypeChain:
		r, err := chain.Open(c.Chain.config(o))
		if err != nil {
			return nil, nil, err
		}
		return chain.NewAuthority(r), nil, nil
	case TypeWebhook:
		key, err := publicKey(c.Webhook.Key)
		if err != nil {
			return nil, nil, err
		}
		return &webhook.Authority{URL: c.Webhook.URL, Key: key}, nil, nil
	case TypePolicy:
		if documents, err = c.Policy.open(o); err != nil {
			return nil, nil, err
		}
		return documents, documents, nil
	}
	return nil, nil, fault.New("authority_type", "%q is no kind of authority", c.Type)
}

func (c Policy) open(o Options) (*policy.Authority, error) {
	keys, err := c.keys()
	if err != nil {
		return nil, err
	}
	a, err := policy.OpenAuthority(filepath.Join(o.Dir, policyFile), keys, o.Now)
	if err != nil || c.File == "" {
		return a, err
	}
	// The file is the first document. What was submitted since stands, and no file that
	// is older, or has run out, keeps a service from starting with it.
	if err := c.Update(a); err != nil {
		if a.Signed() == nil {
			return nil, err
		}
		if o.Log != nil {
			o.Log.Info("the policy's file is not taken: the policy accepted before stands", "code", fault.Code(err))
		}
	}
	return a, nil
}

// Update gives an authority the document of the file, if there is one.
func (c Policy) Update(a *policy.Authority) error {
	if c.File == "" {
		return nil
	}
	text := []byte(c.File)
	if !strings.HasPrefix(strings.TrimSpace(c.File), "{") {
		var err error
		if text, err = os.ReadFile(c.File); err != nil {
			return fault.Wrap(err, "authority_policy", "read the signed policy")
		}
	}
	return a.Update(text)
}

// keys are those that sign policies.
func (c Policy) keys() (policy.Keys, error) { return policy.ParseKeys(c.Keys, c.Threshold) }

func publicKey(text string) (ed25519.PublicKey, error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%.80q is no Ed25519 key of %d hexadecimal digits", text, 2*ed25519.PublicKeySize)
	}
	return b, nil
}

// config is what the configuration says, for package chain.
func (c Chain) config(o Options) chain.Config {
	return chain.Config{
		RPC: chain.Endpoints(c.RPC), Threshold: c.Threshold, ChainID: c.ChainID, Registry: common.HexToAddress(c.Registry),
		Confirmations: c.Confirmations, MaxStaleness: c.MaxStaleness.Duration, File: filepath.Join(o.Dir, chainFile), Now: o.Now, Foreign: c.Foreign,
	}
}
