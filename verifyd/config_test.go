// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestDefaultsAreUpstreamsButForTheAddress(t *testing.T) {
	t.Chdir(t.TempDir())
	c, err := LoadConfig("", nil)
	check(t, err)
	if c.Address != "127.0.0.1" || c.Port != 8080 || c.ImageCacheDir != "/tmp/dstack-verifier/cache" || c.ImageDownloadTimeoutSecs != 300 ||
		c.ImageDownloadURL != "https://download.dstack.org/os-images/mr_{OS_IMAGE_HASH}.tar.gz" || c.Attestation.InsecureAllowExternalTrustAnchors {
		t.Errorf("%+v", c)
	}
}

// A file of upstream's keys, and the environment above it.
func TestUpstreamsConfigurationWorksUnchanged(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	check(t, os.WriteFile(DefaultConfigFile, []byte(`
address = "0.0.0.0"
port = 8081
image_cache_dir = "/var/cache/images"
image_download_url = "https://images.example/mr_{OS_IMAGE_HASH}.tar.gz"
image_download_timeout_secs = 60
[attestation]
insecure_allow_external_trust_anchors = false
[attestation.urls]
pccs = ""
amd_kds = "https://kds.example/vcek/v1"
`), 0o600))
	c, err := LoadConfig("", []string{"DSTACK_VERIFIER_PORT=9000", "DSTACK_VERIFIER_ATTESTATION__URLS__PCCS=https://pccs.example", "OTHER=1"})
	check(t, err)
	if c.Address != "0.0.0.0" || c.Port != 9000 || c.Attestation.URLs != (URLs{"https://pccs.example", "https://kds.example/vcek/v1"}) || c.ImageDownloadTimeoutSecs != 60 {
		t.Errorf("%+v", c)
	}
}

func TestConfigurationsThatCannotWorkAreRefused(t *testing.T) {
	for _, c := range []struct {
		name, text, env, code, message string
	}{
		{"an unknown key", `adress = "::1"`, "", "config_unknown_key", "adress"},
		{"an unknown key further down", "[attestation]\nroots = 1", "", "config_unknown_key", "roots"},
		{"an unknown variable", "", "DSTACK_VERIFIER_HOST=::1", "config_unknown_key", "host"},
		{"a name for an address", `address = "localhost"`, "", "config_value", "address"},
		{"port 0", `port = 0`, "", "config_value", "port"},
		{"a port beyond", `port = 70000`, "", "config_malformed", ""},
		{"no cache", `image_cache_dir = ""`, "", "config_value", "image_cache_dir"},
		{"no time", `image_download_timeout_secs = 0`, "", "config_value", "image_download_timeout_secs"},
		{"a URL without the hash", `image_download_url = "https://a.example/"`, "", "image_url", "{OS_IMAGE_HASH}"},
		{"a URL of a file", `image_download_url = "file:///{OS_IMAGE_HASH}"`, "", "image_url", "host"},
		{"nobody at a time", `max_concurrent = 0`, "", "config_value", "max_concurrent"},
		{"a root without permission", "[attestation.root_ca]\ntdx = \"root.pem\"", "", "config_value", "insecure_allow_external_trust_anchors"},
		{"development roots without permission", "[attestation]\ndevelopment_roots = \"roots.json\"", "", "config_value", "insecure_allow_external_trust_anchors"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "c.toml")
			check(t, os.WriteFile(path, []byte(c.text), 0o600))
			_, err := LoadConfig(path, strings.Fields(c.env))
			if fault.Code(err) != c.code || !strings.Contains(err.Error(), c.message) {
				t.Errorf("%v (%q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
	if _, err := LoadConfig(filepath.Join(t.TempDir(), "none.toml"), nil); fault.Code(err) != "config_missing" {
		t.Errorf("a file that was named and is not there: %v", err)
	}
}

// What the configuration names is read at the start, so that what is wrong is said
// then.
func TestFilesOfTheConfigurationAreReadAtTheStart(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad")
	check(t, os.WriteFile(bad, []byte(`{"accept":true}`), 0o600))
	open := filepath.Join(dir, "open")
	check(t, os.Mkdir(open, 0o777))
	check(t, os.Chmod(open, 0o777))
	for _, c := range []struct {
		name, code string
		edit       func(*Config)
	}{
		{"a policy that is none", "policy_malformed", func(c *Config) { c.Policy = bad }},
		{"a policy that is not there", "file_missing", func(c *Config) { c.Policy = dir + "/none" }},
		{"a root that is not there", "file_missing", func(c *Config) { c.Attestation.RootCA.SEVSNPMilan = dir + "/none" }},
		{"a root that is none", "trust_anchor", func(c *Config) { c.Attestation.RootCA.GCPTPM = bad }},
		{"development roots that are none", "dev_roots_malformed", func(c *Config) { c.Attestation.DevelopmentRoots = bad }},
		{"a cache that others can write to", "image_cache_dir", func(c *Config) { c.ImageCacheDir = open }},
		{"a service that is no URL", "collateral_url", func(c *Config) { c.Attestation.URLs.PCCS = "pccs" }},
		{"another one", "collateral_url", func(c *Config) { c.Attestation.URLs.AMDKDS = "ftp://kds.example" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			conf := DefaultConfig()
			conf.ImageCacheDir = filepath.Join(t.TempDir(), "cache")
			conf.Attestation.InsecureAllowExternalTrustAnchors = true
			s, err := New(conf, Options{})
			check(t, err)
			s.Close()
			c.edit(&conf)
			if _, err := New(conf, Options{}); fault.Code(err) != c.code {
				t.Errorf("%v (%q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}
