// SPDX-License-Identifier: Apache-2.0

package node

import (
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ethereum/go-ethereum/common"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/chain"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// Config is kms.toml; keys that upstream's has too have its names. Each can be set
// from the environment, see package internal/config: prefix DSTACK_KMS_, two
// underscores for a dot (DSTACK_KMS_CORE__DOMAIN). In a CVM that is the app's compose
// file, which is measured.
type Config struct {
	RPC  RPCConfig  `toml:"rpc"`
	Core CoreConfig `toml:"core"`
}

// RPCConfig is where the service listens.
type RPCConfig struct {
	Address string `toml:"address"`
	Port    uint16 `toml:"port"`
}

// CoreConfig is everything else.
type CoreConfig struct {
	// DataDir holds the root keys, the release log and the policy: 0700, and in a CVM on
	// its sealed disk. Upstream calls it cert_dir.
	DataDir string `toml:"data_dir"`
	// Domain is the name in the service's certificate; Names are more of them, and
	// addresses, separated by commas.
	Domain string `toml:"domain"`
	Names  string `toml:"names"`
	// SiteName is shown to operators.
	SiteName string `toml:"site_name"`
	// Replication gives the root keys to other KMSs that the authority allows.
	Replication bool `toml:"replication"`
	// KeyBoundReplication gives them to upstream's KMSs, too, whose evidence is about a
	// TLS key and not about the connection.
	KeyBoundReplication bool `toml:"key_bound_replication"`

	Guest       GuestConfig       `toml:"guest"`
	Attestation AttestationConfig `toml:"attestation"`
	AuthAPI     AuthConfig        `toml:"auth_api"`
	Onboard     OnboardConfig     `toml:"onboard"`
	Admin       AdminConfig       `toml:"admin"`
	Limits      LimitsConfig      `toml:"limits"`
}

// GuestConfig is the TEE that the KMS runs in.
type GuestConfig struct {
	// Socket is that of the guest agent. Empty: the KMS runs in no TEE, which only a
	// build for development does.
	Socket string `toml:"socket"`
}

// AttestationConfig is whose evidence counts.
type AttestationConfig struct {
	// PCCS is where TDX collateral comes from; empty: the vendor's service.
	PCCS string `toml:"pccs"`
	// KDS is where SEV-SNP certificates come from; empty: the vendor's service.
	KDS string `toml:"kds"`
	// DevRoots is the file or text of development roots, which only a build for
	// development takes.
	DevRoots string `toml:"dev_roots"`
}

// AuthConfig is who decides.
type AuthConfig struct {
	Type    string        `toml:"type"` // policy, webhook or chain
	Policy  PolicyConfig  `toml:"policy"`
	Chain   ChainConfig   `toml:"chain"`
	Webhook WebhookConfig `toml:"webhook"`
}

// PolicyConfig is the signed policy document.
type PolicyConfig struct {
	// Keys are the Ed25519 keys, 64 hexadecimal digits each, separated by commas, of which
	// Threshold must have signed a document.
	Keys      string `toml:"keys"`
	Threshold int    `toml:"threshold"`
	// File is a signed document to begin with; a newer one that was submitted stands.
	File string `toml:"file"`
}

// ChainConfig is the governance contracts on a chain (package governance/chain).
type ChainConfig struct {
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
}

// reader opens what the configuration says; dir is the data directory.
func (c ChainConfig) reader(dir string, now func() time.Time) (*chain.Reader, error) {
	cfg := chain.Config{Threshold: c.Threshold, ChainID: c.ChainID, Confirmations: c.Confirmations, MaxStaleness: c.MaxStaleness.Duration, File: filepath.Join(dir, chainFile), Now: now}
	cfg.RPC = chain.Endpoints(c.RPC)
	if !common.IsHexAddress(c.Registry) {
		return nil, bad("core.auth_api.chain.registry %q is no contract's address", c.Registry)
	}
	cfg.Registry = common.HexToAddress(c.Registry)
	return chain.Open(cfg)
}

// WebhookConfig is a signed webhook.
type WebhookConfig struct {
	URL string `toml:"url"`
	Key string `toml:"key"` // Ed25519, 64 hexadecimal digits
}

// OnboardConfig is how the KMS gets its root keys.
type OnboardConfig struct {
	// AutoBootstrapDomain makes keys at the first start without being asked, under this
	// domain, once the authority allows this KMS.
	AutoBootstrapDomain string `toml:"auto_bootstrap_domain"`
	// SourceURL gets them from another KMS instead, and SourceAppID is that KMS's app id;
	// empty: that of this KMS.
	SourceURL   string `toml:"source_url"`
	SourceAppID string `toml:"source_app_id"`
	// RootCA pins the root: DER SubjectPublicKeyInfo in hexadecimal digits. Empty: that
	// which the source, whose evidence the authority accepted, shows.
	RootCA string `toml:"root_ca"`
	// Address and Port serve the operator's onboarding calls; Port 0: none.
	Address string `toml:"address"`
	Port    uint16 `toml:"port"`
}

// AdminConfig is the administrators' listener.
type AdminConfig struct {
	Enabled   bool          `toml:"enabled"`
	Address   string        `toml:"address"`
	Port      uint16        `toml:"port"`
	AuthToken config.Secret `toml:"auth_token"` // at least 16 characters
	// CacheDir holds images and measurements, which Admin.ClearImageCache removes; empty:
	// there are none.
	CacheDir string `toml:"cache_dir"`
}

// LimitsConfig bounds what callers get; zero values are the defaults of package kms.
type LimitsConfig struct {
	Certificate config.Duration `toml:"certificate"`
	Lease       config.Duration `toml:"lease"`
	PeerRate    float64         `toml:"peer_rate"`
	AppRate     float64         `toml:"app_rate"`
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		RPC: RPCConfig{Address: "0.0.0.0", Port: 8000},
		Core: CoreConfig{
			DataDir: "/etc/kms/certs",
			Guest:   GuestConfig{Socket: "/var/run/dstack.sock"},
			AuthAPI: AuthConfig{Type: "policy"},
			Onboard: OnboardConfig{Address: "0.0.0.0"},
			Admin:   AdminConfig{Address: "127.0.0.1", Port: 8001},
		},
	}
}

// LoadConfig reads and checks a file ("" for none) and the environment. Codes: those of
// package config; kms_config.
func LoadConfig(path string, environ []string) (Config, error) {
	c := DefaultConfig()
	if err := config.Load(&c, path, config.Env{Prefix: "DSTACK_KMS_", Environ: environ, Ignore: []string{"ADMIN_TOKEN"}}); err != nil {
		return c, err
	}
	for _, name := range adminTokens {
		i := slices.IndexFunc(environ, func(kv string) bool { return strings.HasPrefix(kv, name+"=") })
		if i < 0 || c.Core.Admin.AuthToken.Reveal() != "" {
			continue
		}
		if err := c.Core.Admin.AuthToken.UnmarshalText([]byte(environ[i][len(name)+1:])); err != nil {
			return c, err
		}
	}
	return c, c.check()
}

// adminTokens are upstream's variables for core.admin.auth_token, if that is empty.
var adminTokens = []string{"DSTACK_KMS_ADMIN_TOKEN", "ADMIN_API_TOKEN"}

// Build says in words what trust this build admits.
func Build() string {
	if development {
		return "built for development: it admits trust that protects nothing"
	}
	return "built for production"
}

func bad(format string, args ...any) *fault.Error { return fault.New("kms_config", format, args...) }

func (c *Config) check() error {
	if c.Core.Domain == "" {
		c.Core.Domain = c.Core.Onboard.AutoBootstrapDomain
	}
	if c.Core.Domain == "" {
		return bad("core.domain is missing").WithFix("give the name by which guests reach this KMS")
	}
	for _, name := range c.names() {
		if err := CheckDomain(name); err != nil && net.ParseIP(name) == nil {
			return err
		}
	}
	if !filepath.IsAbs(c.Core.DataDir) {
		return bad("core.data_dir %q is no absolute path", c.Core.DataDir)
	}
	switch a := &c.Core.AuthAPI; a.Type {
	case "policy":
		if _, err := a.Policy.keys(); err != nil {
			return err
		}
	case "webhook":
		if _, err := publicKey(a.Webhook.Key); err != nil || a.Webhook.URL == "" {
			return bad("core.auth_api.webhook needs url and key: an unsigned answer decides nothing")
		}
	case "chain":
		if !common.IsHexAddress(a.Chain.Registry) || a.Chain.RPC == "" || a.Chain.Threshold < 1 || a.Chain.ChainID == 0 {
			return bad("core.auth_api.chain needs rpc, threshold, chain_id and registry").WithFix("name endpoints of different operators, and how many of them must agree")
		}
	case "dev":
		return bad("core.auth_api.type dev would allow everything, and does not exist").WithFix("sign a policy, or use dstack up, which signs its own")
	default:
		return bad("core.auth_api.type is %q, not policy, webhook or chain", a.Type)
	}
	o := c.Core.Onboard
	if o.AutoBootstrapDomain != "" && o.SourceURL != "" {
		return bad("core.onboard makes root keys or gets them from another KMS, not both")
	}
	if o.SourceURL != "" {
		if u, err := url.Parse(o.SourceURL); err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return bad("core.onboard.source_url %q is not the https URL of a KMS", o.SourceURL)
		}
	}
	if o.SourceAppID != "" {
		if _, err := dstack.ParseAppID(o.SourceAppID); err != nil {
			return bad("core.onboard.source_app_id: %v", err)
		}
	}
	if _, err := hex.DecodeString(o.RootCA); err != nil {
		return bad("core.onboard.root_ca is not hexadecimal")
	}
	if a := c.Core.Admin; a.Enabled && len(a.AuthToken.Reveal()) < 16 {
		return bad("core.admin.auth_token has fewer than 16 characters").WithFix("make one with `openssl rand -hex 16`")
	}
	if dir := c.Core.Admin.CacheDir; dir != "" && !filepath.IsAbs(dir) {
		return bad("core.admin.cache_dir %q is no absolute path", dir)
	}
	return nil
}

// names are those of the service's certificate.
func (c *Config) names() []string {
	out := []string{c.Core.Domain}
	for name := range strings.SplitSeq(c.Core.Names, ",") {
		if name = strings.TrimSpace(name); name != "" && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

func (c RPCConfig) listen() string { return net.JoinHostPort(c.Address, strconv.Itoa(int(c.Port))) }

// keys are those that sign policies.
func (c PolicyConfig) keys() (policy.Keys, error) {
	k, err := policy.ParseKeys(c.Keys, c.Threshold)
	if err != nil {
		return k, fault.Wrap(err, "kms_config", "core.auth_api.policy.keys").WithFix("name the governance keys whose signatures count")
	}
	return k, nil
}

func publicKey(text string) (ed25519.PublicKey, error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%.80q is no Ed25519 key of %d hexadecimal digits", text, 2*ed25519.PublicKeySize)
	}
	return b, nil
}

// CheckDomain accepts a DNS name of 1 to 253 ASCII bytes, in labels of 1 to 63 letters,
// digits and hyphens that neither begin nor end with one (spec/kms.md §2.3). Code
// kms_domain.
func CheckDomain(name string) error {
	if len(name) == 0 || len(name) > 253 {
		return fault.New("kms_domain", "a domain has 1 to 253 bytes, not %d", len(name))
	}
	for label := range strings.SplitSeq(name, ".") {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.ContainsFunc(label, func(r rune) bool {
				return !(r == '-' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z')
			}) {
			return fault.New("kms_domain", "%.80q is no domain: the label %.80q", name, label)
		}
	}
	return nil
}

// readText returns the content of a file, or text that is JSON itself.
func readText(value string) ([]byte, error) {
	if strings.HasPrefix(strings.TrimSpace(value), "{") {
		return []byte(value), nil
	}
	return os.ReadFile(value)
}
