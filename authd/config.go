// SPDX-License-Identifier: Apache-2.0

package authd

import (
	"net"
	"path/filepath"
	"strconv"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/authority"
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
	// Auth is who decides: a policy, whose file is looked at again at each SIGHUP, or a chain.
	Auth authority.Config `toml:"auth"`
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

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		DataDir:  "/var/lib/dstack-auth",
		Listen:   ListenConfig{Address: "127.0.0.1", Port: 8001},
		Upstream: UpstreamConfig{Trust: string(dstack.TrustProduction)},
		Auth:     authority.Config{Type: authority.TypePolicy},
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
	switch {
	case c.Auth.Type == authority.TypeWebhook:
		return bad("auth.type is webhook, and this is one").WithFix("decide by a policy or a chain")
	case c.Auth.Type == authority.TypePolicy && c.Auth.Policy.File == "":
		return bad("auth.policy.file is missing")
	}
	return c.Auth.Check("auth", bad)
}

func (c ListenConfig) address() string {
	return net.JoinHostPort(c.Address, strconv.Itoa(int(c.Port)))
}
