// SPDX-License-Identifier: Apache-2.0

package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
)

const good = `
[core]
my_url = "https://gateway.example:8000"
domains = "apps.example, other.example:8443"
[core.wg]
endpoint = "gateway.example:51820"
[core.auth]
type = "lease"
kms_root = "3059"
`

func load(t *testing.T, text string, environ ...string) (Config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "gateway.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return LoadConfig(file, environ)
}

func TestConfiguration(t *testing.T) {
	c, err := load(t, good, "DSTACK_GATEWAY_CORE__WG__IP=10.8.0.1/16", "DSTACK_GATEWAY_CORE__PROXY__INBOUND_PP_SOURCES=10.0.0.0/8, 192.0.2.1/32")
	if err != nil {
		t.Fatal(err)
	}
	d, err := c.domains()
	if err != nil || len(d) != 2 || d[0].Name != "apps.example" || d[0].Port != 443 || d[1].Port != 8443 {
		t.Errorf("%v, %v", d, err)
	}
	if c.Core.WG.ip.String() != "10.8.0.1/16" || len(c.Core.Proxy.sources) != 2 {
		t.Errorf("%+v", c.Core.WG)
	}
	for name, r := range map[string]struct{ old, new, code string }{
		"an unknown key":                   {"[core]\n", "[core]\nnode_uuid = 1\n", "config_unknown_key"},
		"no URL":                           {"https://gateway.example:8000", "http://gateway.example:8000", "gateway_config"},
		"no domain":                        {"apps.example, other.example:8443", "", "gateway_config"},
		"a domain that is an address":      {"apps.example, ", "192.0.2.1, ", "gateway_config"},
		"a port of none":                   {"other.example:8443", "other.example:0", "gateway_config"},
		"no endpoint":                      {"gateway.example:51820", "", "gateway_config"},
		"who is admitted unsaid":           {`type = "lease"`, `type = ""`, "gateway_config"},
		"upstream's guests of another KMS": {"[core]\n", "[core]\nupstream_guests = true\nkms_ca = \"3058\"\n", "gateway_config"},
		"a KMS for no upstream's guests":   {"[core]\n", "[core]\nkms_ca = \"3059\"\n", "gateway_config"},
		"upstream's guests of nobody":      {"[core]\n", "[core]\nupstream_guests = true\nkms_ca = \"x\"\n", "gateway_config"},
		"a policy of nobody's":             {`type = "lease"`, `type = "policy"`, "gateway_config"},
		"an unsigned webhook":              {`type = "lease"`, "type = \"webhook\"\nwebhook.url = \"https://a.example\"", "gateway_config"},
		"a chain without contracts":        {`type = "lease"`, "type = \"chain\"\nchain.rpc = \"https://a.example\"", "gateway_config"},
		"a lease of nobody's":              {`kms_root = "3059"`, `kms_root = ""`, "gateway_config"},
		"another tunnel":                   {"[core.auth]", "mode = \"vpn\"\n[core.auth]", "gateway_config"},
		"an address of no network":         {"[core.auth]", "ip = \"10.0.0.0/8\"\n[core.auth]", "gateway_config"},
		"IPv6 in the tunnel":               {"[core.auth]", "ip = \"fd00::1/64\"\n[core.auth]", "gateway_config"},
		"no listening address":             {"[core.auth]", "listen = \"51820\"\n[core.auth]", "gateway_config"},
		"a relative directory":             {"[core]\n", "[core]\ndata_dir = \"data\"\n", "gateway_config"},
		"no number":                        {"[core]\n", "[core]\nnode_id = 0\n", "gateway_config"},
		"balancers of no network":          {"[core.auth]", "[core.proxy]\ninbound_pp_sources = \"all\"\n[core.auth]", "gateway_config"},
	} {
		if !strings.Contains(good, r.old) {
			t.Fatalf("%s replaces nothing", name)
		}
		if _, err := load(t, strings.Replace(good, r.old, r.new, 1)); fault.Code(err) != r.code {
			t.Errorf("%s: %v, want %s", name, err, r.code)
		}
	}
}

// The zero configuration admits nobody.
func TestNothingIsOpenUnlessItSaysSo(t *testing.T) {
	if _, err := load(t, strings.Replace(good, "[core.auth]\ntype = \"lease\"\nkms_root = \"3059\"\n", "", 1)); fault.Code(err) != "gateway_config" {
		t.Error(err)
	}
}

func TestTheKeyStays(t *testing.T) {
	file := filepath.Join(t.TempDir(), keyFile)
	k, err := openKey(file)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	again, err := openKey(file)
	if err != nil || again.Public() != k.Public() || (again.Public() == wgconfig.PublicKey{}) {
		t.Errorf("%v, %v", again.Public(), err)
	}
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openKey(file); fault.Code(err) != "gateway_key" {
		t.Error(err)
	}
}

// Threat G08: a gateway for production takes no development roots.
func TestThreat_G08_ReleasedGatewaysTakeNoDevelopmentRoots(t *testing.T) {
	if development {
		t.Skip("SKIP: this is the build for development")
	}
	c, err := load(t, good+"[core.attestation]\ndev_roots = \"{}\"\n")
	if err != nil {
		t.Fatal(err)
	}
	c.Core.DataDir = t.TempDir()
	if _, err := Open(t.Context(), c, nil); fault.Code(err) != "development_refused" {
		t.Error(err)
	}
}

func TestPublicAuthoritiesAreNamedWhole(t *testing.T) {
	const acme = "[core.acme]\ndirectories = \"https://ca.example/dir, https://other.example/dir\"\ndns_provider = \"hetzner\"\ndns_settings = \"token=secret\"\n"
	if _, err := load(t, good+acme); err != nil {
		t.Fatal(err)
	}
	c, err := load(t, good+acme+"caa = \"set\"\ncaa_identities = \"ca.example,\"\neab_key_ids = \",b\"\neab_mac_keys = \",secret\"\n")
	if err != nil {
		t.Fatal(err)
	}
	if cas, err := c.Core.ACME.cas(); err != nil || cas[0].Identity != "ca.example" || cas[0].KeyID != "" || cas[1].Identity != "" || cas[1].KeyID != "b" || cas[1].MACKey != "secret" {
		t.Errorf("%v", err)
	}
	for name, r := range map[string]struct{ old, new, code string }{
		"no TLS":            {"https://ca.example/dir", "http://ca.example/dir", "gateway_config"},
		"no provider":       {"hetzner", "", "dns_credential"},
		"no such provider":  {"hetzner", "pigeon", "dns_credential"},
		"no parameters":     {"token=secret", "", "dns_credential"},
		"no directory":      {"https://ca.example/dir, https://other.example/dir", "", "gateway_config"},
		"another parameter": {"token=secret", "password=secret", "dns_credential"},
		"CAA sometimes":     {"[core.acme]", "[core.acme]\ncaa = \"sometimes\"", "gateway_config"},
		"one identity":      {"[core.acme]", "[core.acme]\ncaa_identities = \"ca.example\"", "gateway_config"},
		"a key id, no key":  {"[core.acme]", "[core.acme]\neab_key_ids = \"a,\"", "gateway_config"},
		"another's key":     {"[core.acme]", "[core.acme]\neab_key_ids = \"a,\"\neab_mac_keys = \",secret\"", "gateway_config"},
	} {
		_, err := load(t, good+strings.Replace(acme, r.old, r.new, 1))
		if fault.Code(err) != r.code || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, want %s", name, err, r.code)
		}
	}
}

func TestCertificateLogsAreNamedWhole(t *testing.T) {
	const key = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEOvVMq4yioi4wbRaa9ZY8/XLAlGtjUUJGyvrP3JgfRv23H2xR30Y9UP3EEvC5RIvdahh0Yq9gY1xdw2nImwlA5g=="
	const ct = "[core.ct]\nlogs = \"https://log.example " + key + "\"\ninterval = \"30s\"\nwebhook = \"https://hook.example/secret\"\n"
	if _, err := load(t, good+ct); err != nil {
		t.Fatal(err)
	}
	for _, r := range [][2]string{{"https://log", "http://log"}, {key, "AAAA"}, {"30s", "1ms"}, {"https://log.example " + key, ""}} {
		_, err := load(t, good+strings.Replace(ct, r[0], r[1], 1))
		if fault.Code(err) != "gateway_config" || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", r[1], err)
		}
	}
}

func TestAuthoritiesHaveNames(t *testing.T) {
	if a, b := caName("https://acme-v02.api.example.org/directory"), caName("https://acme-v02.api.example.org:14000/dir"); a != "acme-v02-api-example-org" || a == b {
		t.Errorf("%s, %s", a, b)
	}
}
