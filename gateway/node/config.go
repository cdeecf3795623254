// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"encoding/hex"
	"log/slog"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/proxyproto"
	"github.com/dstack-go/dstack/gateway/tunnel"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/governance/authority"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// Config is gateway.toml; keys that upstream's has too have its names. Each can be set
// from the environment, see package internal/config: prefix DSTACK_GATEWAY_, two
// underscores for a dot (DSTACK_GATEWAY_CORE__WG__ENDPOINT). In a CVM that is the app's
// compose file, which is measured.
type Config struct {
	// Address and Port are where guests register.
	Address string `toml:"address"`
	Port    uint16 `toml:"port"`
	// LogLevel is the least level of the log: DEBUG, INFO, WARN or ERROR; empty: as the
	// program was told when it was started.
	LogLevel string     `toml:"log_level"`
	Core     CoreConfig `toml:"core"`
}

// CoreConfig is everything else.
type CoreConfig struct {
	// DataDir holds the WireGuard key, the routes and certificates: 0700, and in a CVM on
	// its sealed disk.
	DataDir string `toml:"data_dir"`
	// NodeID tells gateways of one cluster apart, from 1; MyURL is this one's Address and
	// Port as guests reach them.
	NodeID  uint32 `toml:"node_id"`
	MyURL   string `toml:"my_url"`
	Domains string `toml:"domains"` // base domains, "name" or "name:port", separated by commas

	// UpstreamGuests lets upstream's guests register, with a certificate of the KMS whose
	// root CA key (DER SubjectPublicKeyInfo, hexadecimal) is KMSCA; empty: core.auth.kms_root.
	// Such a certificate proves less than evidence: whoever has its key is believed.
	UpstreamGuests bool   `toml:"upstream_guests"`
	KMSCA          string `toml:"kms_ca"`

	WG          WGConfig          `toml:"wg"`
	Proxy       ProxyConfig       `toml:"proxy"`
	Guest       GuestConfig       `toml:"guest"`
	Attestation AttestationConfig `toml:"attestation"`
	Auth        AuthConfig        `toml:"auth"`
	ACME        ACMEConfig        `toml:"acme"`
	CT          CTConfig          `toml:"ct"`
	Cluster     ClusterConfig     `toml:"cluster"`
	Admin       AdminConfig       `toml:"admin"`
}

// ClusterConfig is how gateways of one app reach each other. Without it a gateway is a
// cluster of one.
type ClusterConfig struct {
	// Listen is where other gateways call, address:port; Address is host:port as they
	// reach it.
	Listen  string `toml:"listen"`
	Address string `toml:"address"`
	// ComposeHashes are other manifests of this app that members may have, as in an
	// upgrade; hexadecimal, separated by commas.
	ComposeHashes string `toml:"compose_hashes"`
	also          []dstack.ComposeHash
}

func (c *ClusterConfig) check() error {
	if (c.Listen == "") != (c.Address == "") {
		return bad("core.cluster.listen and core.cluster.address belong together")
	}
	if c.Listen != "" {
		if a, err := netip.ParseAddrPort(c.Listen); err != nil || a.Port() == 0 {
			return bad("core.cluster.listen %q is no address:port", c.Listen)
		}
		if _, err := wgconfig.ParseEndpoint(c.Address); err != nil {
			return fault.Wrap(err, "gateway_config", "core.cluster.address")
		}
	}
	for _, text := range list(c.ComposeHashes) {
		h, err := dstack.ParseComposeHash(text)
		if err != nil {
			return fault.Wrap(err, "gateway_config", "core.cluster.compose_hashes")
		}
		c.also = append(c.also, h)
	}
	return nil
}

// WGConfig is the network to the instances.
type WGConfig struct {
	Listen    string `toml:"listen"`   // address:port, UDP; 0.0.0.0:51820
	Endpoint  string `toml:"endpoint"` // host:port as guests reach it
	IP        string `toml:"ip"`       // the gateway's address in the network, such as 100.96.0.1/11
	Mode      string `toml:"mode"`     // kernel, tun or netstack; empty: the first that works
	Interface string `toml:"interface"`
	listen    netip.AddrPort
	ip        netip.Prefix
}

// ProxyConfig is the public listener.
type ProxyConfig struct {
	ListenAddr string `toml:"listen_addr"`
	ListenPort uint16 `toml:"listen_port"`
	// HTTPPort redirects plain HTTP to https; 0: not at all.
	HTTPPort uint16 `toml:"http_port"`
	// CustomDomains asks DNS where names lead that are on no base domain.
	CustomDomains         bool     `toml:"custom_domains"`
	AppAddressNSPrefix    string   `toml:"app_address_ns_prefix"`
	AppAddressNSCompat    bool     `toml:"app_address_ns_compat"`
	InboundPPSources      string   `toml:"inbound_pp_sources"` // networks whose PROXY header is believed, separated by commas
	MaxConnections        int      `toml:"max_connections"`
	MaxConnectionsPerApp  int      `toml:"max_connections_per_app"`
	MaxConnectionsPerPeer int      `toml:"max_connections_per_source"`
	ConnectionRatePerPeer int      `toml:"connection_rate_per_source"`
	Timeouts              Timeouts `toml:"timeouts"`
	// AccessLog writes a line for each connection that is over; AccessLogClients has the
	// client's address in it.
	AccessLog        bool `toml:"access_log"`
	AccessLogClients bool `toml:"access_log_clients"`
	sources          proxyproto.Sources
}

// Timeouts are upstream's; zero values are the defaults of package gateway/edge.
type Timeouts struct {
	Connect    config.Duration `toml:"connect"`
	Handshake  config.Duration `toml:"handshake"`
	PPHeader   config.Duration `toml:"pp_header"`
	DNSResolve config.Duration `toml:"dns_resolve"`
	Idle       config.Duration `toml:"idle"`
	Total      config.Duration `toml:"total"`
	// Drain is how long connections may go on after the gateway was told to stop; 9 s, less
	// than the 10 s after which container engines kill. It is not upstream's.
	Drain config.Duration `toml:"drain"`
}

func (t Timeouts) drain() time.Duration { return cmp.Or(t.Drain.Duration, drainTime) }

// GuestConfig is the TEE that the gateway runs in.
type GuestConfig struct {
	Socket string `toml:"socket"` // of the guest agent
}

// AttestationConfig is whose evidence counts.
type AttestationConfig struct {
	PCCS string `toml:"pccs"` // where TDX collateral comes from; empty: the vendor's service
	KDS  string `toml:"kds"`  // where SEV-SNP certificates come from; empty: the vendor's service
	// DevRoots is the file or text of development roots, which only a build for
	// development takes.
	DevRoots string `toml:"dev_roots"`
}

// AuthConfig says which attested instances get a route.
type AuthConfig struct {
	// Type is lease (a KMS authorised it), policy, webhook or chain (that authority allows
	// it, as it would a KMS's app), or attested (any whose evidence holds).
	Type string `toml:"type"`
	// KMSRoot is that KMS: its root CA's key, DER SubjectPublicKeyInfo, hexadecimal.
	KMSRoot string `toml:"kms_root"`
	// Lease is the longest life of a route without fresh evidence; 1 h.
	Lease config.Duration `toml:"lease"`

	Policy  authority.Policy  `toml:"policy"`
	Webhook authority.Webhook `toml:"webhook"`
	Chain   authority.Chain   `toml:"chain"`
}

// authority is who decides, for the types that name one.
func (c AuthConfig) authority() authority.Config {
	return authority.Config{Type: c.Type, Policy: c.Policy, Webhook: c.Webhook, Chain: c.Chain}
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Address: "0.0.0.0", Port: 8000,
		Core: CoreConfig{
			DataDir: "/data/gateway", NodeID: 1,
			WG:    WGConfig{Listen: "0.0.0.0:51820", IP: "100.96.0.1/11"},
			Proxy: ProxyConfig{ListenAddr: "0.0.0.0", ListenPort: 443, AppAddressNSCompat: true},
			Guest: GuestConfig{Socket: "/var/run/dstack.sock"},
			Admin: AdminConfig{Address: "127.0.0.1", Port: 8011},
		},
	}
}

// LoadConfig reads and checks a file ("" for none) and the environment. Codes: those of
// package config; gateway_config.
func LoadConfig(path string, environ []string) (Config, error) {
	c := DefaultConfig()
	if err := config.Load(&c, path, config.Env{Prefix: "DSTACK_GATEWAY_", Environ: environ, Ignore: []string{"ADMIN_TOKEN"}}); err != nil {
		return c, err
	}
	if err := c.Core.Admin.check(environ); err != nil {
		return c, err
	}
	return c, c.check()
}

// Build says in words what trust this build admits.
func Build() string {
	if development {
		return "built for development: it admits trust that protects nothing"
	}
	return "built for production"
}

func bad(format string, args ...any) *fault.Error {
	return fault.New("gateway_config", format, args...)
}

func (c *Config) check() (err error) {
	core := &c.Core
	if err := new(slog.Level).UnmarshalText([]byte(cmp.Or(c.LogLevel, "INFO"))); err != nil {
		return bad("log_level is %q, not DEBUG, INFO, WARN or ERROR", c.LogLevel)
	}
	if !filepath.IsAbs(core.DataDir) {
		return bad("core.data_dir %q is no absolute path", core.DataDir)
	}
	if core.NodeID == 0 {
		return bad("core.node_id is 0").WithFix("number the gateways of a cluster from 1")
	}
	if u, err := url.Parse(core.MyURL); err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return bad("core.my_url %q is not the https URL at which guests reach this gateway", core.MyURL)
	}
	if _, err := c.domains(); err != nil {
		return err
	}
	wg := &core.WG
	if wg.listen, err = netip.ParseAddrPort(wg.Listen); err != nil || wg.listen.Port() == 0 {
		return bad("core.wg.listen %q is no address:port", wg.Listen)
	}
	if wg.ip, err = netip.ParsePrefix(wg.IP); err != nil || !wg.ip.Addr().Is4() || wg.ip.Bits() > 28 || !wgconfig.Inside(wg.ip.Masked(), wg.ip.Addr()) {
		return bad("core.wg.ip %q is no IPv4 host of a network of at most 28 bits", wg.IP)
	}
	if _, err := wgconfig.ParseEndpoint(wg.Endpoint); err != nil {
		return fault.Wrap(err, "gateway_config", "core.wg.endpoint")
	}
	switch tunnel.Mode(wg.Mode) {
	case tunnel.Auto, tunnel.Kernel, tunnel.TUN, tunnel.Netstack:
	default:
		return bad("core.wg.mode is %q, not kernel, tun or netstack", wg.Mode)
	}
	for text := range strings.SplitSeq(core.Proxy.InboundPPSources, ",") {
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return bad("core.proxy.inbound_pp_sources: %q is no network", text)
		}
		core.Proxy.sources = append(core.Proxy.sources, p.Masked())
	}
	switch core.Auth.Type {
	case "attested":
	case "lease":
		if b, err := hex.DecodeString(core.Auth.KMSRoot); err != nil || len(b) == 0 {
			return bad("core.auth.kms_root is missing or not hexadecimal").WithFix("give the KMS's root CA key, which its apps pin as key_provider_id")
		}
	case authority.TypePolicy, authority.TypeWebhook, authority.TypeChain:
		who := core.Auth.authority()
		if err := who.Check("core.auth", bad); err != nil {
			return err
		}
	default:
		return bad("core.auth.type is %q, not lease, policy, webhook, chain or attested", core.Auth.Type).
			WithFix("lease routes to instances that a KMS authorised; policy, webhook and chain to whom that authority allows; attested to any whose evidence holds, whatever it runs")
	}
	if core.UpstreamGuests {
		if b, err := hex.DecodeString(core.kmsCA()); err != nil || len(b) == 0 {
			return bad("core.upstream_guests needs core.kms_ca, in hexadecimal").WithFix("give the root CA key of the KMS whose apps register")
		}
		if core.Auth.Type == "lease" && core.kmsCA() != core.Auth.KMSRoot {
			return bad("core.kms_ca is another KMS than core.auth.kms_root, whose instances get routes").WithFix("leave core.kms_ca out")
		}
	} else if core.KMSCA != "" {
		return bad("core.kms_ca is for core.upstream_guests, which is off")
	}
	if err := core.CT.check(); err != nil {
		return err
	}
	if err := core.Cluster.check(); err != nil {
		return err
	}
	return core.ACME.check()
}

// kmsCA is the KMS whose certificates count.
func (c *CoreConfig) kmsCA() string { return cmp.Or(c.KMSCA, c.Auth.KMSRoot) }

// domains are the base domains, the preferred first.
func (c *Config) domains() ([]gateway.Domain, error) {
	var out []gateway.Domain
	for text := range strings.SplitSeq(c.Core.Domains, ",") {
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		d := gateway.Domain{Port: c.Core.Proxy.ListenPort}
		host, port, ok := strings.Cut(text, ":")
		if ok {
			n, err := strconv.ParseUint(port, 10, 16)
			if err != nil || n == 0 {
				return nil, bad("core.domains: %q has no port", text)
			}
			d.Port = uint16(n)
		}
		var err error
		if d.Name, err = hostname.ParseBase(host); err != nil {
			return nil, fault.Wrap(err, "gateway_config", "core.domains: %q", text)
		}
		out = append(out, d)
	}
	if len(out) == 0 {
		return nil, bad("core.domains is empty").WithFix("name the domain whose subdomains lead to apps, such as apps.example.org")
	}
	return out, nil
}
