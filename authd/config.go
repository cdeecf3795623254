// SPDX-License-Identifier: Apache-2.0

package authd

import (
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/ethereum/go-ethereum/common"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/chain"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// Config is the configuration.
type Config struct {
	// DataDir holds what must not be forgotten: the newest policy, or the highest block.
	DataDir string `toml:"data_dir"`
	// KeyFile holds the key that signs answers, which `dstack-auth key` makes. Empty:
	// only upstream's requests are answered.
	KeyFile string `toml:"key_file"`

	Listen   ListenConfig   `toml:"listen"`
	Upstream UpstreamConfig `toml:"upstream"`
	Auth     AuthConfig     `toml:"auth"`
}

// ListenConfig is where requests come in: a socket, or an address.
type ListenConfig struct {
	// Socket is the path of a unix socket, which only its owner may reach. It comes
	// before the address.
	Socket  string `toml:"socket"`
	Address string `toml:"address"`
	Port    uint16 `toml:"port"`
	// Cert and Key are PEM files for TLS; ClientCA a file of the authorities whose
	// certificates clients must have.
	Cert     string `toml:"cert"`
	Key      string `toml:"key"`
	ClientCA string `toml:"client_ca"`
	// InsecureHTTP serves plain HTTP to other machines: whoever sits between can then
	// alter what is answered to upstream's nodes.
	InsecureHTTP bool `toml:"insecure_http"`
}

// UpstreamConfig is about KMS nodes of upstream, whose answers nothing signs.
type UpstreamConfig struct {
	Enabled bool `toml:"enabled"`
	// Trust is the kind of root that they verify evidence under: production or
	// development.
	Trust string `toml:"trust"`
	// ImageVerified says that they verify images (core.image.verify).
	ImageVerified bool `toml:"image_verified"`
}

// AuthConfig is who decides.
type AuthConfig struct {
	Type   string       `toml:"type"` // policy or chain
	Policy PolicyConfig `toml:"policy"`
	Chain  ChainConfig  `toml:"chain"`
}

// PolicyConfig is a signed policy document (docs/kms-policy.md).
type PolicyConfig struct {
	Keys      string `toml:"keys"` // Ed25519, hexadecimal, separated by commas
	Threshold int    `toml:"threshold"`
	File      string `toml:"file"` // looked at again at each SIGHUP
}

// ChainConfig is the contracts on a chain (docs/chain.md).
type ChainConfig struct {
	RPC           string          `toml:"rpc"` // separated by commas
	Threshold     int             `toml:"threshold"`
	ChainID       uint64          `toml:"chain_id"`
	Registry      string          `toml:"registry"`
	MaxStaleness  config.Duration `toml:"max_staleness"`
	Confirmations uint64          `toml:"confirmations"`
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		DataDir:  "/var/lib/dstack-auth",
		Listen:   ListenConfig{Address: "127.0.0.1", Port: 8001},
		Upstream: UpstreamConfig{Trust: string(dstack.TrustProduction)},
		Auth:     AuthConfig{Type: "policy"},
	}
}

// LoadConfig reads and checks a file ("" for none) and the environment. Codes: those of
// package config; auth_config, auth_plain_http.
func LoadConfig(path string, environ []string) (Config, error) {
	c := DefaultConfig()
	if err := config.Load(&c, path, config.Env{Prefix: "DSTACK_AUTH_", Environ: environ}); err != nil {
		return c, err
	}
	return c, c.Check()
}

func bad(format string, args ...any) *fault.Error { return fault.New("auth_config", format, args...) }

// Check says what is wrong. Codes auth_config, auth_plain_http.
func (c *Config) Check() error {
	l := c.Listen
	switch {
	case !filepath.IsAbs(c.DataDir):
		return bad("data_dir %q is no absolute path", c.DataDir)
	case c.KeyFile == "" && !c.Upstream.Enabled:
		return bad("there is no key_file to sign answers with, and upstream.enabled is false: nobody would be answered").
			WithFix("make a key with `dstack-auth key`, or set upstream.enabled for nodes of upstream")
	case l.Socket != "" && !filepath.IsAbs(l.Socket):
		return bad("listen.socket %q is no absolute path", l.Socket)
	case (l.Cert == "") != (l.Key == ""):
		return bad("listen.cert and listen.key go together")
	case l.ClientCA != "" && l.Cert == "":
		return bad("listen.client_ca needs TLS: listen.cert and listen.key")
	case l.Socket != "" && l.Cert != "":
		return bad("listen.socket is for this machine, and wants no TLS")
	}
	if ip := net.ParseIP(l.Address); l.Socket == "" && ip == nil {
		return bad("listen.address %q is no IP address", l.Address)
	} else if l.Socket == "" && !ip.IsLoopback() && l.Cert == "" && !l.InsecureHTTP {
		return fault.New("auth_plain_http", "listen.address %s is reached by other machines, in plain HTTP: whoever sits between could allow anything to nodes of upstream", l.Address).
			WithFix("give listen.cert and listen.key, a socket, a loopback address, or say listen.insecure_http = true")
	}
	if t := dstack.Trust(c.Upstream.Trust); t != dstack.TrustProduction && t != dstack.TrustDevelopment {
		return bad("upstream.trust is %q, not production or development", c.Upstream.Trust)
	}
	switch a := c.Auth; a.Type {
	case "policy":
		if _, err := a.Policy.keys(); err != nil {
			return err
		}
		if a.Policy.File == "" {
			return bad("auth.policy.file is missing")
		}
	case "chain":
		if len(chain.Endpoints(a.Chain.RPC)) == 0 || a.Chain.Threshold < 1 || a.Chain.ChainID == 0 || !common.IsHexAddress(a.Chain.Registry) {
			return bad("auth.chain needs rpc, threshold, chain_id and registry").WithFix("name endpoints of different operators, and how many of them must agree")
		}
	default:
		return bad("auth.type is %q, not policy or chain", a.Type)
	}
	return nil
}

func (c PolicyConfig) keys() (policy.Keys, error) {
	k, err := policy.ParseKeys(c.Keys, c.Threshold)
	if err != nil {
		return k, fault.Wrap(err, "auth_config", "auth.policy.keys").WithFix("name the governance keys whose signatures count")
	}
	return k, nil
}

// reader opens what the configuration says.
func (c ChainConfig) reader(dir string, now func() time.Time) (*chain.Reader, error) {
	return chain.Open(chain.Config{
		RPC: chain.Endpoints(c.RPC), Threshold: c.Threshold, ChainID: c.ChainID, Registry: common.HexToAddress(c.Registry),
		Confirmations: c.Confirmations, MaxStaleness: c.MaxStaleness.Duration, File: filepath.Join(dir, "chain-floor"), Now: now,
	})
}

func (c ListenConfig) address() string {
	return net.JoinHostPort(c.Address, strconv.Itoa(int(c.Port)))
}
