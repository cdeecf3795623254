// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
	"github.com/dstack-go/dstack/verifyd/imagecache"
)

// DefaultConfigFile is read when no other is named; it need not exist.
const DefaultConfigFile = "dstack-verifier.toml"

// EnvPrefix begins the environment variables that overlay the file:
// DSTACK_VERIFIER_ATTESTATION__URLS__PCCS sets attestation.urls.pccs.
const EnvPrefix = "DSTACK_VERIFIER_"

// Config is the service's configuration. The keys up to Attestation are upstream's;
// its files work here unchanged.
type Config struct {
	// Address is the IP address to listen on. Upstream's default is 0.0.0.0. Ours is
	// this machine alone: the service has no authentication, and its plain HTTP
	// reply is worth what the path to it is worth.
	Address string `toml:"address"`
	Port    uint16 `toml:"port"` // not 0

	// ImageCacheDir must belong to the service's user alone.
	ImageCacheDir string `toml:"image_cache_dir"`
	// ImageDownloadURL is where images for TDX's older form come from. Nothing in a
	// request can choose another place.
	ImageDownloadURL         string `toml:"image_download_url"`
	ImageDownloadTimeoutSecs uint32 `toml:"image_download_timeout_secs"` // not 0

	Attestation Attestation `toml:"attestation"`

	// Sizes of the image cache: of one download, of its files, of all images.
	ImageMaxDownload config.Size `toml:"image_max_download"`
	ImageMaxUnpacked config.Size `toml:"image_max_unpacked"`
	ImageCacheSize   config.Size `toml:"image_cache_size"`

	// Policy is a file (JSON, docs/policy.md) that verdicts are made under when a
	// request brings no policy of its own; empty for the default policy, which
	// accepts current platforms only.
	Policy string `toml:"policy"`

	// AllowUnknownACPITables lets is_valid be true for a VM of TDX's older form
	// whose ACPI tables cannot be computed: they are then the host's own, and
	// acpi_tables_verified is false. Upstream computes them or refuses.
	AllowUnknownACPITables bool `toml:"allow_unknown_acpi_tables"`

	// MaxConcurrent is how many requests are verified at one time; others wait, up to
	// four times as many, and more are turned away with 503.
	MaxConcurrent int `toml:"max_concurrent"`
	// RequestTimeoutSecs bounds one request, downloads included.
	RequestTimeoutSecs uint32 `toml:"request_timeout_secs"`
	// Metrics serves /metrics beside the API.
	Metrics bool `toml:"metrics"`
	// WebDir is a directory of files to serve under /, such as the page that verifies
	// in the browser; empty for none.
	WebDir string `toml:"web_dir"`
}

// Attestation is upstream's AttestationVerifierConfig, and two keys of our own.
type Attestation struct {
	// InsecureAllowExternalTrustAnchors permits the roots below. Evidence under them
	// has the verdict `trust: development`: it proves nothing about hardware.
	InsecureAllowExternalTrustAnchors bool `toml:"insecure_allow_external_trust_anchors"`
	URLs                              URLs `toml:"urls"`
	RootCA                            Root `toml:"root_ca"`

	// DevelopmentRoots is a file of `dstack-simtee pki`: roots and collateral of a
	// simulated TEE. It needs the permission above, too.
	DevelopmentRoots string `toml:"development_roots"`
	// FetchCollateral asks the services for collateral that a request does not bring.
	FetchCollateral bool `toml:"fetch_collateral"`
	// ExtraCollateral is a directory of certificates and revocation lists that join
	// what is fetched, such as Google's intermediates above attestation keys, which no
	// service here serves. Certificates in it complete chains and anchor nothing.
	ExtraCollateral string `toml:"extra_collateral"`
	// CollateralCacheDir keeps what was fetched; empty for a place beside the images.
	CollateralCacheDir string `toml:"collateral_cache_dir"`
}

// URLs are those of collateral services; empty for the vendors' own.
type URLs struct {
	PCCS   string `toml:"pccs"`
	AMDKDS string `toml:"amd_kds"`
}

// Root are files of a CA certificate each, PEM or DER, in place of a vendor's root.
type Root struct {
	TDX             string `toml:"tdx"`
	GCPTPM          string `toml:"gcp_tpm"`
	AWSNitroEnclave string `toml:"aws_nitro_enclave"`
	AWSNitroTPM     string `toml:"aws_nitro_tpm"`
	SEVSNPMilan     string `toml:"sev_snp_milan"`
	SEVSNPGenoa     string `toml:"sev_snp_genoa"`
	SEVSNPTurin     string `toml:"sev_snp_turin"`
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Address: "127.0.0.1", Port: 8080,
		ImageCacheDir:            "/tmp/dstack-verifier/cache",
		ImageDownloadURL:         "https://download.dstack.org/os-images/mr_" + imagecache.Placeholder + ".tar.gz",
		ImageDownloadTimeoutSecs: 300,
		ImageMaxDownload:         1 << 30, ImageMaxUnpacked: 2 << 30, ImageCacheSize: 10 << 30,
		Attestation:        Attestation{FetchCollateral: true},
		MaxConcurrent:      16,
		RequestTimeoutSecs: 330,
		Metrics:            true,
	}
}

// LoadConfig reads the defaults, then the file (path may be empty for
// DefaultConfigFile, which may be absent), then the environment, and checks the
// result. Codes: config_missing, config_malformed, config_unknown_key, config_value.
func LoadConfig(path string, environ []string) (Config, error) {
	c := DefaultConfig()
	if path == "" {
		if _, err := os.Stat(DefaultConfigFile); !errors.Is(err, fs.ErrNotExist) {
			path = DefaultConfigFile
		}
	}
	if err := config.Load(&c, path, config.Env{Prefix: EnvPrefix, Environ: environ}); err != nil {
		return c, err
	}
	return c, c.Check()
}

// Check refuses values that cannot work, with the code config_value, or image_url.
func (c *Config) Check() error {
	bad := func(key, format string, args ...any) error {
		return fault.New("config_value", key+": "+format, args...)
	}
	if _, err := netip.ParseAddr(c.Address); err != nil {
		return bad("address", "%q is not an IP address", c.Address)
	}
	for _, n := range []struct {
		key   string
		value uint64
	}{
		{"port", uint64(c.Port)}, {"image_download_timeout_secs", uint64(c.ImageDownloadTimeoutSecs)},
		{"request_timeout_secs", uint64(c.RequestTimeoutSecs)}, {"image_max_download", uint64(c.ImageMaxDownload)},
		{"image_max_unpacked", uint64(c.ImageMaxUnpacked)}, {"image_cache_size", uint64(c.ImageCacheSize)},
	} {
		if n.value == 0 || n.value > 1<<50 {
			return bad(n.key, "%d is not a number that works", n.value)
		}
	}
	switch a := c.Attestation; {
	case c.ImageCacheDir == "":
		return bad("image_cache_dir", "is empty")
	case c.MaxConcurrent < 1 || c.MaxConcurrent > 1024:
		return bad("max_concurrent", "%d, want 1 to 1024", c.MaxConcurrent)
	case !a.InsecureAllowExternalTrustAnchors && (a.RootCA != Root{} || a.DevelopmentRoots != ""):
		return fault.New("config_value", "attestation: roots of trust are configured, and attestation.insecure_allow_external_trust_anchors is not true").
			WithFix("remove root_ca and development_roots; set the permission only where evidence need not prove anything about hardware")
	}
	return imagecache.CheckURL(c.ImageDownloadURL)
}

func (c *Config) requestTimeout() time.Duration {
	return time.Duration(c.RequestTimeoutSecs) * time.Second
}

func (c *Config) collateralDir() string {
	if dir := c.Attestation.CollateralCacheDir; dir != "" {
		return dir
	}
	return filepath.Join(c.ImageCacheDir, "collateral")
}

// readPolicy reads the file of the configured policy.
func (c *Config) readPolicy() (verifier.Policy, error) {
	if c.Policy == "" {
		return verifier.DefaultPolicy(), nil
	}
	data, err := readBounded(c.Policy, 1<<20)
	if err != nil {
		return verifier.Policy{}, err
	}
	p, err := verifier.ParsePolicy(data)
	if err != nil {
		return verifier.Policy{}, err
	}
	return *p, nil
}
