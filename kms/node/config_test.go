// SPDX-License-Identifier: Apache-2.0

package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const goodConfig = `
[core]
domain = "kms.example.org"
[core.auth_api.policy]
keys = "0101010101010101010101010101010101010101010101010101010101010101"
threshold = 1
`

func load(t *testing.T, text string, environ ...string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kms.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return LoadConfig(path, environ)
}

func TestConfiguration(t *testing.T) {
	c, err := load(t, goodConfig+"[core.limits]\nlease = \"10m\"\npeer_rate = 5.0\n", "DSTACK_KMS_RPC__PORT=9000", "DSTACK_KMS_CORE__NAMES=10.0.0.1, kms2.example.org", "PATH=/bin")
	if err != nil {
		t.Fatal(err)
	}
	if c.RPC.listen() != "0.0.0.0:9000" || strings.Join(c.names(), " ") != "kms.example.org 10.0.0.1 kms2.example.org" ||
		c.Core.Limits.Lease.Duration != 10*time.Minute || c.Core.Limits.PeerRate != 5 || c.Core.Guest.Socket != "/var/run/dstack.sock" || c.Core.Replication {
		t.Errorf("%+v", c)
	}
	// The domain of the keys is that of the service where none is named.
	c, err = load(t, strings.Replace(goodConfig, `domain = "kms.example.org"`, "", 1)+"[core.onboard]\nauto_bootstrap_domain = \"auto.example.org\"\n")
	if err != nil || c.Core.Domain != "auto.example.org" {
		t.Errorf("domain %q: %v", c.Core.Domain, err)
	}
	// Everything from the environment, as a compose file has it.
	if _, err := LoadConfig("", []string{
		"DSTACK_KMS_CORE__DOMAIN=kms.example.org", "DSTACK_KMS_CORE__AUTH_API__TYPE=webhook", "DSTACK_KMS_CORE__AUTH_API__WEBHOOK__URL=https://auth.example.org",
		"DSTACK_KMS_CORE__AUTH_API__WEBHOOK__KEY=" + strings.Repeat("02", 32),
	}); err != nil {
		t.Error(err)
	}
}

func TestConfigurationsThatAreRefused(t *testing.T) {
	for _, c := range []struct{ name, text, env, code string }{
		{"a key that does not exist", goodConfig + "[core.onbord]\nport = 1\n", "", "config_unknown_key"},
		{"upstream's switch that believes any anchor", goodConfig + "[core.attestation]\ninsecure_allow_external_trust_anchors = true\n", "", "config_unknown_key"},
		{"an administrator without a token, as upstream has it", goodConfig + "[core.admin]\ninsecure_no_auth = true\n", "", "config_unknown_key"},
		{"switching self-authorisation off", goodConfig, "DSTACK_KMS_CORE__ENFORCE_SELF_AUTHORIZATION=false", "config_unknown_key"},
		{"a variable that does not exist", goodConfig, "DSTACK_KMS_CORE__DOMIAN=x", "config_unknown_key"},
		{"no domain", strings.Replace(goodConfig, `domain = "kms.example.org"`, "", 1), "", "kms_config"},
		{"a domain that is none", strings.Replace(goodConfig, "kms.example.org", "kms_x.y", 1), "", "kms_domain"},
		{"a name that is none", goodConfig, "DSTACK_KMS_CORE__NAMES=ok.example.org,-bad", "kms_domain"},
		{"a relative directory", goodConfig, "DSTACK_KMS_CORE__DATA_DIR=keys", "kms_config"},
		{"no key of the policy", strings.Replace(goodConfig, "threshold = 1", "", 1), "", "kms_config"},
		{"a threshold above the keys", strings.Replace(goodConfig, "threshold = 1", "threshold = 2", 1), "", "kms_config"},
		{"a key of the policy that is none", strings.Replace(goodConfig, "0101", "01", 1), "", "kms_config"},
		{"a webhook that signs nothing", goodConfig + "[core.auth_api]\ntype = \"webhook\"\n", "", "kms_config"},
		{"a webhook without a key", goodConfig, "DSTACK_KMS_CORE__AUTH_API__TYPE=webhook", "kms_config"},
		{"development's authority", goodConfig, "DSTACK_KMS_CORE__AUTH_API__TYPE=dev", "kms_config"},
		{"no authority", goodConfig, "DSTACK_KMS_CORE__AUTH_API__TYPE=", "kms_config"},
		{"two ways to the keys", goodConfig + "[core.onboard]\nauto_bootstrap_domain = \"a.b\"\nsource_url = \"https://c.d\"\n", "", "kms_config"},
		{"a source over plain HTTP", goodConfig + "[core.onboard]\nsource_url = \"http://c.d\"\n", "", "kms_config"},
		{"a source with a password", goodConfig + "[core.onboard]\nsource_url = \"https://u:p@c.d\"\n", "", "kms_config"},
		{"a source's app that is none", goodConfig + "[core.onboard]\nsource_app_id = \"0102\"\n", "", "kms_config"},
		{"a pinned root that is none", goodConfig + "[core.onboard]\nroot_ca = \"xyz\"\n", "", "kms_config"},
		{"administrators without a token", goodConfig + "[core.admin]\nenabled = true\n", "", "kms_config"},
		{"administrators with a short token", goodConfig + "[core.admin]\nenabled = true\nauth_token = \"short\"\n", "", "kms_config"},
		{"a cache that is anywhere", goodConfig + "[core.admin]\ncache_dir = \"cache\"\n", "", "kms_config"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := load(t, c.text, c.env)
			wantCode(t, err, c.code)
		})
	}
}

// Upstream's variables for the administrators' token count where the file has none.
func TestUpstreamsVariablesForTheToken(t *testing.T) {
	const token = "0123456789abcdef0123456789abcdef"
	for _, env := range []string{"DSTACK_KMS_ADMIN_TOKEN=" + token, "ADMIN_API_TOKEN=" + token} {
		c, err := load(t, goodConfig+"[core.admin]\nenabled = true\n", env)
		if err != nil || c.Core.Admin.AuthToken.Reveal() != token {
			t.Errorf("%s: %v", env[:10], err)
		}
	}
	c, err := load(t, goodConfig+"[core.admin]\nenabled = true\nauth_token = \"of the file, long enough\"\n", "ADMIN_API_TOKEN="+token)
	if err != nil || c.Core.Admin.AuthToken.Reveal() != "of the file, long enough" {
		t.Error(err)
	}
}

// The table of kms.md §7.
func TestDomains(t *testing.T) {
	label := strings.Repeat("a", 63)
	longest := strings.Join([]string{label, label, label, label[:61]}, ".")
	for _, name := range []string{"kms.example.org", "kms", "KMS-1.example", "1.2", label, longest} {
		if err := CheckDomain(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", longest + "a", strings.Repeat("a", 254), "-kms.x", "kms-.x", "kms..x", "kms_x.y", ".kms", "kms.", label + "a", "kms x", "kms\x00", "kms.ñ", "*.kms.x"} {
		wantCode(t, CheckDomain(name), "kms_domain")
	}
}
