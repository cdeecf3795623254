// SPDX-License-Identifier: Apache-2.0

package dstack_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/guest/boot"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/measure"
)

// What the guest does with a field.
const (
	supported = "supported"
	ignored   = "ignored" // read by nobody, though measured
	refused   = "refused" // with the code named
	passedOn  = "passed on"
)

// field is one row of docs/fields.md.
type field struct {
	name    string
	support string
	note    string
	// sample is a JSON value that differs from the default; a refused row's sample
	// is refused with code.
	sample string
	code   string
	// with are further members that the sample needs.
	with string
}

// manifestFields are the fields of app-compose.json (spec/guest-os.md §4), then ours.
var manifestFields = []field{
	{name: "manifest_version", support: supported, note: "1, 2, or a string up to \"3\"", sample: `2`},
	{name: "manifest_version", support: refused, note: "newer than \"3\"", sample: `"4"`, code: "manifest_version_unsupported"},
	{name: "name", support: supported, sample: `"other"`},
	{name: "runner", support: supported, note: "docker-compose, bash", sample: `"bash"`, with: `"bash_script":"true"`},
	{name: "runner", support: refused, note: "nerdctl-compose", sample: `"nerdctl-compose"`, code: "manifest_unsupported"},
	{name: "docker_compose_file", support: supported, sample: `"services: {}"`},
	{name: "bash_script", support: supported, note: "with the runner bash", sample: `"true"`},
	{name: "snapshotter", support: refused, note: "for nerdctl-compose only", sample: `"stargz"`, with: `"runner":"nerdctl-compose"`, code: "manifest_unsupported"},
	{name: "init_script", support: supported, note: "before any container, without the environment's values", sample: `["a","b"]`},
	{name: "pre_launch_script", support: supported, note: "after the init scripts and before the engine starts, so that it is a gate; upstream runs it beside a running engine", sample: `"true"`},
	{name: "features", support: supported, note: "tproxy-net asks for the gateway", sample: `["tproxy-net"]`},
	{name: "public_logs", support: supported, sample: `true`},
	{name: "public_sysinfo", support: supported, sample: `true`},
	{name: "public_tcbinfo", support: supported, sample: `false`},
	{name: "kms_enabled", support: supported, sample: `true`},
	{name: "gateway_enabled", support: supported, note: "with gateway_policy; without it no gateway can be known, and the console says so", sample: `true`},
	{name: "tproxy_enabled", support: supported, note: "older name of gateway_enabled", sample: `true`},
	{name: "local_key_provider_enabled", support: supported, sample: `true`},
	{name: "key_provider", support: supported, note: "none, kms, local; tpm where a platform vouches for it, or in a development image", sample: `"kms"`},
	{name: "key_provider_id", support: supported, note: "enforced in the handshake with the KMS", sample: `"30"`, with: `"key_provider":"kms"`},
	{name: "allowed_envs", support: supported, sample: `["A"]`},
	{name: "no_instance_id", support: supported, sample: `true`},
	{name: "secure_time", support: supported, note: "NTS before any key; true is the default", sample: `false`},
	{name: "storage_fs", support: supported, note: "ext4, xfs (ours); zfs is taken as ext4, and the event storage-fs says what was used; xfs needs a key provider other than none", sample: `"xfs"`},
	{name: "swap_size", support: supported, note: "under a key of this boot only; needs a key provider other than none (`swap_needs_keys`)", sample: `"1G"`},
	{name: "event_log_version", support: supported, sample: `2`},
	{name: "port_policy", support: supported, note: "held by the guest's firewall and the gateway; with tls app (ours) the guest's agent ends TLS, with pp the app gets a PROXY header", sample: `{"ports":[{"port":80}],"restrict_mode":true}`},
	{name: "requirements", support: supported, sample: `{"os_version":">=0.5"}`},
	{name: "requirements.os_version", support: supported, sample: `">=0.5"`},
	{name: "requirements.os_version", support: refused, note: "that this image does not meet", sample: `">=99.0"`, code: "requirement_os_version"},
	{name: "requirements.platforms", support: supported, sample: `["dstack-tdx"]`},
	{name: "requirements.platforms", support: refused, note: "without the one at hand", sample: `[]`, code: "requirement_platform"},
	{name: "requirements.tdx_measure_acpi_tables", support: supported, note: "true or false as the host's vm_config must have it", sample: `true`},
	{name: "requirements.launch_token_hash", support: supported, sample: `"` + strings.Repeat("5a", 32) + `"`},
	{name: "requirements.gpu_policy", support: supported, note: "measured; no GPU driver is in this version's image", sample: `{"allow_debug":true}`},
	{name: "requirements.gpu_policy.rego", support: refused, note: "no evaluator in this version", sample: `"package policy"`, code: "manifest_unsupported"},
	{name: "verity_volumes", support: supported, sample: `[{"source":"a","verity_root":"` + strings.Repeat("5a", 32) + `","target":"/a"}]`},
	{name: "docker_config", support: ignored, note: "as upstream since 0.5.5", sample: `{"registry":"r"}`},
	{name: "image_policy", support: supported, note: "ours: digest", sample: `"digest"`},
	{name: "image_lock", support: supported, note: "ours", sample: `{"a":"sha256:` + strings.Repeat("5a", 32) + `"}`},
	{name: "key_scopes", support: supported, note: "ours: service to key paths", sample: `{"web":["web/"]}`},
	{name: "time_servers", support: supported, note: "ours: three or more NTS servers instead of the image's", sample: `[{"host":"a:1"},{"host":"b:1"},{"host":"c:1"}]`},
	{name: "env_signers", support: supported, note: "ours: Ed25519 keys that may sign the environment", sample: `["` + strings.Repeat("5a", 32) + `"]`},
	{name: "gateway_policy", support: supported, note: "ours: which gateway gets the app's traffic, by its evidence; without it the app has no route", sample: `{"app_id":"` + strings.Repeat("5a", 20) + `","compose_hashes":["` + strings.Repeat("5a", 32) + `"],"os_image_hashes":["` + strings.Repeat("5a", 32) + `"]}`, with: `"gateway_enabled":true`},
	{name: "gateway_policy", support: refused, note: "without gateway_enabled", sample: `{"app_id":"` + strings.Repeat("5a", 20) + `","compose_hashes":["` + strings.Repeat("5a", 32) + `"],"os_image_hashes":["` + strings.Repeat("5a", 32) + `"]}`, code: "manifest_field"},
	{name: "custom_domains", support: supported, note: "ours: domains of the owner's that lead to a port with tls app", sample: `[{"domain":"shop.example.com","port":8080}]`, with: `"gateway_enabled":true,"port_policy":{"ports":[{"port":8080, "tls":"app"}]}`},
	{name: "custom_domains", support: refused, note: "for a port without tls app", sample: `[{"domain":"shop.example.com","port":8081}]`, with: `"gateway_enabled":true,"port_policy":{"ports":[{"port":8080, "tls":"app"}]}`, code: "manifest_field"},
	{name: "kms_policy", support: supported, note: "ours: which KMS may give the keys, by its evidence; development roots only in a development image", sample: `{"app_id":"` + strings.Repeat("5a", 20) + `","compose_hashes":["` + strings.Repeat("5a", 32) + `"],"os_image_hashes":["` + strings.Repeat("5a", 32) + `"]}`, with: `"key_provider":"kms"`},
	{name: "kms_policy", support: refused, note: "for another key provider than kms", sample: `{"app_id":"` + strings.Repeat("5a", 20) + `","compose_hashes":["` + strings.Repeat("5a", 32) + `"],"os_image_hashes":["` + strings.Repeat("5a", 32) + `"]}`, code: "manifest_field"},
	{name: "on_lease_loss", support: supported, note: "ours: continue (the default) or stop, once the KMS no longer authorises the instance", sample: `"stop"`},
}

// sysConfigFields are the fields of .sys-config.json (spec/guest-os.md §3.1).
var sysConfigFields = []field{
	{name: "kms_urls", support: supported, note: "tried in order"},
	{name: "gateway_urls", support: supported},
	{name: "pccs_url", support: supported, note: "older name of collateral_urls.pccs"},
	{name: "collateral_urls", support: supported},
	{name: "collateral_urls.pccs", support: supported, note: "for the evidence of a local key provider"},
	{name: "collateral_urls.amd_kds", support: ignored, note: "nothing in the guest verifies AMD evidence yet"},
	{name: "nvidia_attestation_proxy_url", support: ignored, note: "no GPU support in this version"},
	{name: "docker_registry", support: ignored, note: "images come by digest from the host's blob store"},
	{name: "host_api_url", support: ignored, note: "the host API is a hostlink stream"},
	{name: "mr_config", support: supported},
	{name: "vm_config", support: passedOn, note: "to verifiers and the KMS, byte by byte"},
	{name: "network", support: supported, note: "ours"},
	{name: "network.address", support: supported, note: "ours"},
	{name: "network.gateway", support: supported, note: "ours"},
	{name: "network.dns", support: supported, note: "ours"},
}

// vmConfigNotes says what is to be known of a field of vm_config; the guest acts on
// mr_config and tdx_attestation_variant only, the rest is for verifiers.
var vmConfigNotes = map[string]string{
	"mr_config":               "compared with the launch's commitment",
	"tdx_attestation_variant": "compared with requirements.tdx_measure_acpi_tables",
	"num_pci_endpoints":       "ours",
	"pci_config_base":         "ours",
}

// document returns a manifest with one field set, as bytes.
func (f field) document() []byte {
	members := map[string]string{"manifest_version": `"3"`, "name": `"n"`, "runner": `"docker-compose"`, "docker_compose_file": `"services:"`}
	path := strings.Split(f.name, ".")
	value := f.sample
	for i := len(path) - 1; i > 0; i-- {
		value = fmt.Sprintf("{%q:%s}", path[i], value)
	}
	for _, pair := range strings.Split(f.with, `,"`) {
		if name, v, ok := strings.Cut(pair, ":"); ok {
			members[strings.Trim(name, `"`)] = v
		}
	}
	members[path[0]] = value
	var parts []string
	for name, v := range members {
		parts = append(parts, fmt.Sprintf("%q:%s", name, v))
	}
	slices.Sort(parts)
	return []byte("{" + strings.Join(parts, ",") + "}")
}

// check parses a manifest as the guest does, up to the first thing measured.
func check(text []byte) (*manifest.Manifest, error) {
	m, err := manifest.Parse(text)
	if err != nil {
		return nil, err
	}
	if err := m.CheckSupported(); err != nil {
		return nil, err
	}
	return m, boot.Supported(m, dstack.TDX, "0.7.0")
}

// Every field of a manifest does what docs/fields.md says: a supported one changes
// what the guest reads, an ignored one nothing, a refused one stops the boot.
func TestManifestFields(t *testing.T) {
	for _, f := range manifestFields {
		t.Run(strings.ReplaceAll(f.name+" "+f.note, "/", " "), func(t *testing.T) {
			plain := f
			plain.sample = "null"
			text := f.document()
			m, err := check(text)
			if f.support == refused {
				if fault.Code(err) != f.code {
					t.Fatalf("%s: %v, want %s", text, err, f.code)
				}
				return
			}
			if err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			base := field{name: "name", sample: `"n"`, with: f.with}
			if f.name == "manifest_version" || f.name == "name" {
				base.with = ""
			}
			b, err := check(base.document())
			if err != nil {
				t.Fatal(err)
			}
			m.Raw, b.Raw = nil, nil
			same := cmp.Equal(m, b, cmp.AllowUnexported(manifest.Requirements{}), cmp.Exporter(func(reflect.Type) bool { return true }))
			if same != (f.support == ignored) {
				t.Errorf("%s: it changes what the guest reads: %v; the page says %s", text, !same, f.support)
			}
		})
	}
}

// The tables have every field that the parsers know and that the specification lists.
func TestFieldsAreAllListed(t *testing.T) {
	source, err := os.ReadFile(filepath.Join("manifest", "manifest.go"))
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, f := range manifestFields {
		listed[f.name] = true
	}
	calls := regexp.MustCompile(`\bd\.(?:requiredString|optionalString|boolean|strings|hex)\("([a-z0-9_]+)"`).FindAllSubmatch(source, -1)
	members := regexp.MustCompile(`\bd\.obj\["([a-z0-9_]+)"\]`).FindAllSubmatch(source, -1)
	if len(calls) < 15 || len(members) < 5 {
		t.Fatalf("found %d and %d fields only", len(calls), len(members))
	}
	for _, m := range append(calls, members...) {
		if !listed[string(m[1])] {
			t.Errorf("the parser reads %s, which docs/fields.md does not list", m[1])
		}
	}

	var classed []string
	for _, c := range hostshare.Classes() {
		if c.File == hostshare.SysConfigName && c.Field != "" {
			classed = append(classed, c.Field)
		}
	}
	var named []string
	for _, f := range sysConfigFields {
		named = append(named, f.name)
	}
	if d := cmp.Diff(classed, named); d != "" {
		t.Errorf("fields of %s: %s", hostshare.SysConfigName, d)
	}

	spec, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(testkit.VectorPath(t, "guest-os/expected.json")))), "spec", "guest-os.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(spec), "\n## 4. app-compose.json")
	section, _, _ = strings.Cut(section, "\n## 5.")
	rows := regexp.MustCompile(`(?m)^\| ([a-z_]+(?:(?:, | / )[a-z_]+)*) \|`).FindAllStringSubmatch(section, -1)
	if len(rows) < 20 {
		t.Fatalf("the specification's table has %d rows", len(rows))
	}
	for _, row := range rows {
		for _, name := range regexp.MustCompile(`[a-z_]+`).FindAllString(row[1], -1) {
			if !listed[name] {
				t.Errorf("the specification lists %s, docs/fields.md does not", name)
			}
		}
	}
}

// vmConfigKeys are the keys of vm_config, in the order of its type.
func vmConfigKeys() []string {
	var names []string
	for f := range reflect.TypeFor[measure.VMConfig]().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			name = "num_nics"
		}
		names = append(names, name)
	}
	return names
}

func TestFieldsPage(t *testing.T) {
	var page bytes.Buffer
	page.WriteString("# Fields: what the guest does with them\n\nGenerated and held by tests (`go test -run TestFieldsPage . -args -update-pages`). Fields of\na manifest that are not listed are measured and inert, as upstream has it; inside\n`requirements` and `gpu_policy` they are refused.\n\n## app-compose.json\n\n| Field | | |\n|---|---|---|\n")
	row := func(f field) {
		what := f.support
		if f.code != "" {
			what += " (`" + f.code + "`)"
		}
		fmt.Fprintf(&page, "| `%s` | %s | %s |\n", f.name, what, f.note)
	}
	for _, f := range manifestFields {
		row(f)
	}
	page.WriteString("\n## .sys-config.json\n\nNot measured: why each may be believed, or need not be, is in `hostshare.Classes`.\n\n| Field | | | Trust |\n|---|---|---|---|\n")
	classes := map[string]hostshare.FieldClass{}
	for _, c := range hostshare.Classes() {
		if c.File == hostshare.SysConfigName {
			classes[c.Field] = c
		}
	}
	for _, f := range sysConfigFields {
		c := classes[f.name]
		fmt.Fprintf(&page, "| `%s` | %s | %s | %s: %s |\n", f.name, f.support, f.note, c.Class, c.Why)
	}
	page.WriteString("\n## vm_config\n\nThe host's account of the VM's shape. The guest passes it on; verifiers compute the launch\nmeasurements from it and compare them with the quote.\n\n| Field | | |\n|---|---|---|\n")
	for _, name := range vmConfigKeys() {
		row(field{name: name, support: passedOn, note: vmConfigNotes[name]})
	}
	compare(t, "docs/fields.md", page.Bytes())
	if !json.Valid(manifestFields[0].document()) {
		t.Error("the sample documents are not JSON")
	}
}
