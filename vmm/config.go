// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// Config is vmm.toml. Its zero value is not usable; start from [DefaultConfig].
// Each key can be set from the environment, see package internal/config: prefix
// DSTACK_VMM_, two underscores for a dot.
type Config struct {
	// StateDir holds everything that the VMM writes. Default: the directory of
	// the configuration file.
	StateDir string `toml:"state_dir"`
	// Address is "unix:PATH", relative to StateDir, or "tcp:IP:PORT", which needs
	// auth.tokens.
	Address string `toml:"address"`
	// NodeName is shown to operators.
	NodeName string `toml:"node_name"`
	// EventBufferSize is how many events Status returns per VM.
	EventBufferSize int `toml:"event_buffer_size"`

	Image   ImageConfig   `toml:"image"`
	Blobs   BlobConfig    `toml:"blobs"`
	Auth    AuthConfig    `toml:"auth"`
	CVM     CVMConfig     `toml:"cvm"`
	Gateway GatewayConfig `toml:"gateway"`

	KeyProvider KeyProviderConfig `toml:"key_provider"`
}

// KeyProviderConfig says where the local key provider, an SGX enclave, listens.
// Guests whose manifest says key_provider local get their keys from it.
type KeyProviderConfig struct {
	Enabled bool   `toml:"enabled"`
	Address string `toml:"address"`
	Port    uint16 `toml:"port"`
}

// ImageConfig says where OS images are.
type ImageConfig struct {
	Path string `toml:"path"` // default: StateDir/images
}

// BlobConfig bounds the blob store.
type BlobConfig struct {
	MaxSize config.Size `toml:"max_size"` // largest blob
}

// AuthConfig is who may use the API over TCP.
type AuthConfig struct {
	// Tokens are accepted in "Authorization: Bearer" or "X-Admin-Token". Each has
	// at least 16 characters. The unix socket is protected by its file mode.
	Tokens []config.Secret `toml:"tokens"`
}

// GatewayConfig is only used to print app_url.
type GatewayConfig struct {
	BaseDomain string `toml:"base_domain"`
	Port       uint16 `toml:"port"`
	AgentPort  uint16 `toml:"agent_port"`
}

// CVMConfig is about the VMs.
type CVMConfig struct {
	// TEE is "sim" (a simulated TDX beside each VM, for development), "tdx" or
	// "none".
	TEE string `toml:"tee"`
	// TEEHelper is the dstack-simtee program, TEEPKI its key directory (default
	// StateDir/dev-pki).
	TEEHelper string `toml:"tee_helper"`
	TEEPKI    string `toml:"tee_pki"`

	// VolumesDir holds the verity volumes that manifests may name. Default:
	// StateDir/volumes.
	VolumesDir string `toml:"volumes_dir"`

	// SWTPM is the software TPM of VMs whose TEE is simulated; looked up in PATH.
	SWTPM string `toml:"swtpm_path"`

	QEMUPath string `toml:"qemu_path"` // default: qemu-system-x86_64 in PATH
	Accel    string `toml:"accel"`     // auto (a probe boots a guest), kvm or tcg

	// Handed to guests as they are.
	KMSURLs                   []string `toml:"kms_urls"`
	GatewayURLs               []string `toml:"gateway_urls"`
	PCCSURL                   string   `toml:"pccs_url"`
	NvidiaAttestationProxyURL string   `toml:"nvidia_attestation_proxy_url"`
	DockerRegistry            string   `toml:"docker_registry"`

	// Limits per VM, enforced, and on the number of VMs.
	MaxVCPU     uint32 `toml:"max_allocable_vcpu"`
	MaxMemoryMB uint32 `toml:"max_allocable_memory_in_mb"`
	MaxDiskGB   uint32 `toml:"max_disk_size_in_gb"`
	MaxVMs      int    `toml:"max_vms"`

	// MinFreeDisk is kept free: no VM is created or started, no blob stored below.
	MinFreeDisk config.Size `toml:"min_free_disk"`

	QGSPort      uint32          `toml:"qgs_port"`
	PCIHole64    config.Size     `toml:"qemu_pci_hole64_size"`
	ShutdownWait config.Duration `toml:"shutdown_timeout"` // then the power is cut

	PortMapping PortMappingConfig `toml:"port_mapping"`
	Networking  NetworkingConfig  `toml:"networking"`
	Log         LogConfig         `toml:"log"`
}

// PortMappingConfig says which host ports VMs may take.
type PortMappingConfig struct {
	Enabled bool        `toml:"enabled"`
	Address string      `toml:"address"` // used when a request names none
	Expose  bool        `toml:"expose"`  // allow addresses that are not loopback
	Range   []PortRange `toml:"range"`
}

// PortRange is a range of host ports, both ends included.
type PortRange struct {
	Protocol string `toml:"protocol"` // tcp or udp
	From     uint16 `toml:"from"`
	To       uint16 `toml:"to"`
}

// NetworkingConfig is the guests' network.
type NetworkingConfig struct {
	// Mode is "user" (QEMU's own network, with port mapping) or "tap" (an existing
	// interface, for tests of the firewall; one VM at a time).
	Mode    string   `toml:"mode"`
	Ifname  string   `toml:"ifname"`
	Address string   `toml:"address"` // of the guest, with prefix length
	Gateway string   `toml:"gateway"`
	DNS     []string `toml:"dns"`

	// Egress says what guests reach beside the internet (package egress): "filtered",
	// nothing of this machine and its networks but EgressAllow; "open", whatever this
	// machine does; "auto", filtered where this VMM is able to, which needs root. Of
	// mode user only: what an interface lets through is its owner's.
	Egress string `toml:"egress"`
	// EgressAllow has ADDRESS:PORT/tcp, ADDRESS:PORT/udp and NETWORK/LENGTH. This
	// machine's loopback, which guests reach at Gateway, is 127.0.0.1. The addresses in
	// the URLs that this file has for guests (kms_urls and the like) are allowed too.
	EgressAllow []string `toml:"egress_allow"`
}

// LogConfig bounds each VM's serial and error logs: one live file and one older.
type LogConfig struct {
	MaxBytes config.Size `toml:"max_bytes"`
}

// DefaultConfig returns the defaults. They are safe: a unix socket of mode 0600,
// ports on loopback only, evidence under development roots.
func DefaultConfig() Config {
	return Config{
		Address:         "unix:vmm.sock",
		EventBufferSize: 20,
		Blobs:           BlobConfig{MaxSize: 4 << 30},
		CVM: CVMConfig{
			TEE: "sim", TEEHelper: "dstack-simtee", SWTPM: "swtpm", Accel: "auto",
			MaxVCPU: uint32(max(runtime.NumCPU(), 4)), MaxMemoryMB: 100_000, MaxDiskGB: 1000, MaxVMs: 100,
			MinFreeDisk: 1 << 30, QGSPort: 4050, ShutdownWait: config.Duration{Duration: time.Minute},
			PortMapping: PortMappingConfig{Enabled: true, Address: "127.0.0.1",
				Range: []PortRange{{"tcp", 1, 65535}, {"udp", 1, 65535}}},
			Networking: NetworkingConfig{Mode: "user", Address: "10.0.2.15/24", Gateway: "10.0.2.2", DNS: []string{"10.0.2.3"}, Egress: egressAuto},
			Log:        LogConfig{MaxBytes: 4 << 20},
		},
		Gateway:     GatewayConfig{BaseDomain: "localhost", Port: 8082, AgentPort: 8090},
		KeyProvider: KeyProviderConfig{Enabled: true, Address: "127.0.0.1", Port: 3443},
	}
}

// LoadConfig reads a configuration file and the environment, fills in what
// depends on where the file is, and checks the whole.
func LoadConfig(path string, environ []string) (Config, error) {
	c := DefaultConfig()
	err := config.Load(&c, path, config.Env{Prefix: "DSTACK_VMM_", Environ: environ,
		Ignore: []string{"URL", "TOKEN", "AUTH_USER", "AUTH_PASSWORD"}}) // of clients
	if err != nil {
		return c, err
	}
	if c.StateDir == "" {
		c.StateDir = filepath.Dir(path)
	}
	if rest, ok := strings.CutPrefix(c.StateDir, "~/"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return c, err
		}
		c.StateDir = filepath.Join(home, rest)
	}
	return c, c.Check()
}

// vmSock is the longest socket name below StateDir.
const vmSock = "vms/00000000-0000-0000-0000-000000000000/hostlink.sock"

// maxSock is the longest path of a unix socket (sockaddr_un, 108 bytes with NUL).
const maxSock = 107

// Check makes paths absolute, fills in those left empty and refuses what cannot
// work. Codes: config_value, listen_needs_token.
func (c *Config) Check() (err error) {
	bad := func(key, format string, args ...any) error {
		return fault.New("config_value", "%s: %s", key, fmt.Sprintf(format, args...))
	}
	if c.StateDir == "" {
		return bad("state_dir", "must be set")
	}
	if c.StateDir, err = filepath.Abs(c.StateDir); err != nil {
		return err
	}
	if strings.ContainsFunc(c.StateDir, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
		return bad("state_dir", "%q has control characters", c.StateDir)
	}
	if n := len(filepath.Join(c.StateDir, vmSock)); n > maxSock {
		return fault.New("config_value", "state_dir: %s is %d bytes too long for the names of unix sockets", c.StateDir, n-maxSock).
			WithFix("choose a shorter state directory")
	}
	under := func(p *string, def string) {
		if *p == "" {
			*p = def
		}
		if !filepath.IsAbs(*p) {
			*p = filepath.Join(c.StateDir, *p)
		}
	}
	under(&c.Image.Path, "images")
	under(&c.CVM.TEEPKI, "dev-pki")
	under(&c.CVM.VolumesDir, "volumes")
	network, addr, err := c.listen()
	if err != nil {
		return err
	}
	if network == "tcp" && len(c.Auth.Tokens) == 0 {
		return fault.New("listen_needs_token", "address: %s would let everybody who reaches %s control this machine's VMs", c.Address, addr).
			WithFix("set auth.tokens, or listen on a unix socket (address = \"unix:vmm.sock\")")
	}
	for i, token := range c.Auth.Tokens {
		if len(token.Reveal()) < 16 {
			return bad("auth.tokens", "token %d has fewer than 16 characters", i+1)
		}
	}
	switch c.CVM.TEE {
	case TEESim:
		if c.CVM.TEEHelper == "" {
			return bad("cvm.tee_helper", "must name dstack-simtee when cvm.tee is sim")
		}
	case TEETDX, TEENone:
	default:
		return bad("cvm.tee", "want sim, tdx or none, not %q", c.CVM.TEE)
	}
	switch c.CVM.Accel {
	case "auto", "kvm", "tcg":
	default:
		return bad("cvm.accel", "want auto, kvm or tcg, not %q", c.CVM.Accel)
	}
	for _, list := range []struct {
		key  string
		urls []string
	}{
		{"cvm.kms_urls", c.CVM.KMSURLs}, {"cvm.gateway_urls", c.CVM.GatewayURLs}, {"cvm.pccs_url", []string{c.CVM.PCCSURL}},
		{"cvm.docker_registry", []string{c.CVM.DockerRegistry}}, {"cvm.nvidia_attestation_proxy_url", []string{c.CVM.NvidiaAttestationProxyURL}},
	} {
		for _, text := range list.urls {
			if u, err := url.Parse(text); text != "" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
				return bad(list.key, "%q is not an http or https URL with a host", text)
			}
		}
	}
	p := c.CVM.PortMapping
	addr4, err := netip.ParseAddr(p.Address)
	if p.Enabled && (err != nil || !addr4.Is4()) {
		return bad("cvm.port_mapping.address", "want an IPv4 address, not %q", p.Address)
	}
	if p.Enabled && !addr4.IsLoopback() && !p.Expose {
		return bad("cvm.port_mapping.address", "%s is not a loopback address and cvm.port_mapping.expose is not set", p.Address)
	}
	for _, r := range p.Range {
		if r.Protocol != "tcp" && r.Protocol != "udp" || r.From == 0 || r.From > r.To {
			return bad("cvm.port_mapping.range", "{%s %d-%d} is not a range of tcp or udp ports", r.Protocol, r.From, r.To)
		}
	}
	if k := c.KeyProvider; k.Enabled && (net.ParseIP(k.Address) == nil || k.Port == 0) {
		return bad("key_provider", "want an IP address and a port, not %q and %d", k.Address, k.Port)
	}
	n := c.CVM.Networking
	if n.Mode != "user" && n.Mode != "tap" || (n.Mode == "tap") != (n.Ifname != "") {
		return bad("cvm.networking", "want mode user, or mode tap with an ifname")
	}
	if _, err := c.network(); err != nil {
		return bad("cvm.networking", "%v", err)
	}
	if err := c.checkEgress(); err != nil {
		return bad("cvm.networking", "%v", err)
	}
	for key, ok := range map[string]bool{
		"cvm.max_allocable_vcpu": c.CVM.MaxVCPU > 0, "cvm.max_allocable_memory_in_mb": c.CVM.MaxMemoryMB >= minMemoryMB,
		"cvm.max_disk_size_in_gb": c.CVM.MaxDiskGB > 0, "cvm.max_vms": c.CVM.MaxVMs > 0, "event_buffer_size": c.EventBufferSize > 0 && c.EventBufferSize <= maxRecent,
		"blobs.max_size": c.Blobs.MaxSize > 0 && c.Blobs.MaxSize < 1<<50, "cvm.log.max_bytes": c.CVM.Log.MaxBytes >= 1<<12,
	} {
		if !ok {
			return bad(key, "the value is out of range")
		}
	}
	return nil
}

// listen returns the network and address to listen on.
func (c *Config) listen() (network, addr string, err error) {
	if path, ok := strings.CutPrefix(c.Address, "unix:"); ok && path != "" {
		if !filepath.IsAbs(path) {
			path = filepath.Join(c.StateDir, path)
		}
		if len(path) > maxSock {
			return "", "", fault.New("config_value", "address: %s is too long for a unix socket", path).WithFix("choose a shorter path")
		}
		return "unix", path, nil
	}
	if addr, ok := strings.CutPrefix(c.Address, "tcp:"); ok {
		if host, _, err := net.SplitHostPort(addr); err == nil && net.ParseIP(host) != nil {
			return "tcp", addr, nil
		}
	}
	return "", "", fault.New("config_value", "address: want unix:PATH or tcp:IP:PORT, not %q", c.Address)
}
