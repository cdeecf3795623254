// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// doc returns a minimal manifest with extra members spliced in.
func doc(extra string) []byte {
	if extra != "" {
		extra = "," + extra
	}
	return []byte(`{"manifest_version":"3","name":"n","runner":"docker-compose"` + extra + `}`)
}

func TestSampleManifest(t *testing.T) {
	var want struct {
		Sample struct {
			ComposeHash string   `json:"compose_hash"`
			Scripts     []string `json:"init_script_hashes"`
			KeyProvider string   `json:"key_provider"`
			Swap        uint64   `json:"swap_bytes"`
		}
		GPU []struct{ Compose, Hash string } `json:"gpu_policy_hash"`
		Tok []struct {
			Token, Hash string
			OK          bool
		} `json:"launch_token"`
		Version struct {
			OK, Error []json.RawMessage
			Max       int `json:"guest_policy_max"`
		} `json:"manifest_version"`
		OS [][]any `json:"os_version"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-os/expected.json"), &want); err != nil {
		t.Fatal(err)
	}
	raw := testkit.Vectors(t, "guest-os/app-compose.sample.json")
	m, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.Hash().String(); got != want.Sample.ComposeHash {
		t.Errorf("compose hash %s, want %s", got, want.Sample.ComposeHash)
	}
	if m.KeyProviderKind() != want.Sample.KeyProvider || m.SwapSize != want.Sample.Swap {
		t.Errorf("key provider %s swap %d", m.KeyProviderKind(), m.SwapSize)
	}
	for i, h := range m.InitScriptHashes() {
		if hex.EncodeToString(h) != want.Sample.Scripts[i] {
			t.Errorf("init script %d hash %x", i, h)
		}
	}
	f := false
	sample := &Manifest{
		Version: 3, Name: "sample", Runner: "docker-compose", DockerComposeFile: "services:\n  web:\n    image: nginx\n",
		InitScripts: []string{"echo one", "echo two"}, PublicTCBInfo: true, KeyProvider: "kms", GatewayEnabled: true,
		AllowedEnvs: []string{"API_KEY"}, SecureTime: &f, StorageFS: "ext4", SwapSize: 1 << 30, EventLogVersion: 1,
		PortPolicy:    PortPolicy{Ports: []Port{{Port: 8080, PP: true}}, RestrictMode: true},
		VerityVolumes: []VerityVolume{{Source: "models.img", Target: "/run/models", Root: [32]byte(bytes.Repeat([]byte{0x5a}, 32))}},
		OnLeaseLoss:   OnLeaseLossContinue,
		Raw:           raw,
	}
	req := m.Requirements
	m.Requirements = nil
	if diff := cmp.Diff(sample, m); diff != "" {
		t.Errorf("manifest (-want +got):\n%s", diff)
	}
	if req.OSVersion != ">=0.6.0" || !cmp.Equal(req.Platforms, []string{"dstack-tdx"}) || len(req.LaunchTokenHash) != 32 || !req.GPUPolicy.AttestGPU {
		t.Errorf("requirements %+v", req)
	}

	for _, g := range want.GPU {
		if g.Compose == "{}" {
			g.Compose = `{}`
		}
		body := strings.TrimSuffix(strings.TrimPrefix(g.Compose, "{"), "}")
		m, err := Parse(doc(body))
		if err != nil {
			t.Fatal(err)
		}
		if h := m.GPUPolicyHash(); hex.EncodeToString(h[:]) != g.Hash {
			t.Errorf("gpu policy hash of %s is %x, want %s", g.Compose, h, g.Hash)
		}
	}
	for _, l := range want.Tok {
		h, err := LaunchTokenHash(l.Token)
		if l.OK && (err != nil || hex.EncodeToString(h[:]) != l.Hash) {
			t.Errorf("launch token hash %x, %v", h, err)
		}
		if !l.OK && fault.Code(err) != "launch_token_short" {
			t.Errorf("token %q: %v", l.Token, err)
		}
	}
	parseVersion := func(v json.RawMessage) error {
		_, err := Parse([]byte(`{"name":"n","runner":"bash","manifest_version":` + string(v) + `}`))
		return err
	}
	for _, v := range want.Version.OK {
		if err := parseVersion(v); err != nil {
			t.Errorf("manifest_version %s: %v", v, err)
		}
	}
	for _, v := range want.Version.Error {
		if err := parseVersion(v); fault.Code(err) != "manifest_version" {
			t.Errorf("manifest_version %s: %v", v, err)
		}
	}
	if want.Version.Max != MaxVersion {
		t.Errorf("MaxVersion is %d, want %d", MaxVersion, want.Version.Max)
	}
	for _, c := range want.OS {
		ok, err := MatchOSVersion(c[0].(string), c[1].(string))
		if c[2] == "error" {
			if err == nil {
				t.Errorf("%v accepted", c)
			}
		} else if err != nil || ok != c[2] {
			t.Errorf("%v: %v, %v", c, ok, err)
		}
	}
}

func TestComposeHashVectors(t *testing.T) {
	var cases []struct {
		Input     json.RawMessage
		Normalize bool
		Canonical string `json:"canonical_json"`
		SHA256    string
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/compose-hash.json"), &cases); err != nil {
		t.Fatal(err)
	}
	for i, c := range cases {
		got, err := Normalise(c.Input, c.Normalize)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != c.Canonical {
			t.Errorf("case %d: %s, want %s", i, got, c.Canonical)
		}
		if h := sha256.Sum256(got); hex.EncodeToString(h[:]) != c.SHA256 {
			t.Errorf("case %d: hash %x", i, h)
		}
	}
}

func TestParseUpstreamSimulatorManifest(t *testing.T) {
	m, err := Parse(testkit.Vectors(t, "attestation/simulator/app-compose.json"))
	if err != nil {
		t.Fatal(err)
	}
	if m.KeyProviderKind() != "kms" || !m.RunsScripts() || m.WantsSecureTime() || !m.GatewayWanted() {
		t.Errorf("%+v", m)
	}
}

func TestAccepted(t *testing.T) {
	for _, tc := range []struct {
		name, extra string
		want        func(*Manifest) bool
	}{
		{"an unknown top-level field is inert", `"docker_config":{"a":1},"zz":[1,{"b":null}]`, func(m *Manifest) bool { return true }},
		{"keys match by case", `"KMS_ENABLED":true,"kmS_enabled":true`, func(m *Manifest) bool { return m.KeyProviderKind() == "none" }},
		{"kms_enabled selects kms", `"kms_enabled":true,"local_key_provider_enabled":true`, func(m *Manifest) bool { return m.KeyProviderKind() == "kms" }},
		{"local is after kms", `"local_key_provider_enabled":true`, func(m *Manifest) bool { return m.KeyProviderKind() == "local" }},
		{"key_provider wins", `"kms_enabled":true,"key_provider":"none"`, func(m *Manifest) bool { return m.KeyProviderKind() == "none" }},
		{"null key_provider is absent", `"kms_enabled":true,"key_provider":null`, func(m *Manifest) bool { return m.KeyProviderKind() == "kms" }},
		{"an empty pin is no pin", `"key_provider":"tpm","key_provider_id":""`, func(m *Manifest) bool { return m.KeyProviderID == nil }},
		{"a pin in upper case", `"key_provider":"kms","key_provider_id":"AB"`, func(m *Manifest) bool { return m.KeyProviderID[0] == 0xab }},
		{"tproxy_enabled is the gateway", `"tproxy_enabled":true`, func(m *Manifest) bool { return m.GatewayWanted() }},
		{"the tproxy-net feature is the gateway", `"features":["x","tproxy-net"]`, func(m *Manifest) bool { return m.GatewayWanted() && !m.GatewayEnabled }},
		{"tcbinfo is public by default", ``, func(m *Manifest) bool { return m.PublicTCBInfo && m.WantsSecureTime() && m.EventLogVersion == 1 }},
		{"secure_time off", `"secure_time":false`, func(m *Manifest) bool { return !m.WantsSecureTime() }},
		{"one init script", `"init_script":"a"`, func(m *Manifest) bool { return len(m.InitScripts) == 1 }},
		{"no init script", `"init_script":null`, func(m *Manifest) bool { return len(m.InitScripts) == 0 && !m.RunsScripts() }},
		{"storage_fs in any case", `"storage_fs":"ZFS"`, func(m *Manifest) bool { return m.StorageFS == "zfs" }},
		{"swap as bytes", `"swap_size":4096`, func(m *Manifest) bool { return m.SwapSize == 4096 }},
		{"swap as digits", `"swap_size":"4096"`, func(m *Manifest) bool { return m.SwapSize == 4096 }},
		{"swap with a suffix", `"swap_size":"3k"`, func(m *Manifest) bool { return m.SwapSize == 3072 }},
		{"swap up to 2^64-1", `"swap_size":18446744073709551615`, func(m *Manifest) bool { return m.SwapSize == 1<<64-1 }},
		{"event log version 2", `"event_log_version":2`, func(m *Manifest) bool { return m.EventLogVersion == 2 }},
		{"an empty port policy lets all in", `"port_policy":{}`, func(m *Manifest) bool { return m.PortPolicy.Allows(22) }},
		{"a restricted port policy", `"port_policy":{"restrict_mode":true,"ports":[{"port":80}]}`,
			func(m *Manifest) bool { return m.PortPolicy.Allows(80) && !m.PortPolicy.Allows(81) }},
		{"who ends TLS", `"port_policy":{"ports":[{"port":80,"tls":"app"},{"port":81,"tls":"gateway"},{"port":82}]}`,
			func(m *Manifest) bool {
				p := m.PortPolicy.Ports
				return p[0].TLS == TLSApp && p[1].TLS == TLSGateway && p[2].TLS == ""
			}},
		{"unknown fields of port_policy are inert", `"port_policy":{"x":1,"ports":[{"port":80,"y":2}]}`, func(m *Manifest) bool { return len(m.PortPolicy.Ports) == 1 }},
		{"platforms may be empty", `"requirements":{"platforms":[]}`, func(m *Manifest) bool { return m.Requirements.HasPlatforms && len(m.Requirements.Platforms) == 0 }},
		{"null requirements are absent", `"requirements":null`, func(m *Manifest) bool { return m.Requirements == nil }},
		{"roots of volumes may repeat", `"verity_volumes":[{"source":"a","verity_root":"` + strings.Repeat("5a", 32) + `","target":"/a"},{"source":"a","verity_root":"` + strings.Repeat("5a", 32) + `","target":"/b"}]`,
			func(m *Manifest) bool { return len(m.VerityVolumes) == 2 }},
		{"an image lock", `"image_policy":"digest","image_lock":{"nginx":"sha256:` + strings.Repeat("0a", 32) + `"}`, func(m *Manifest) bool { return len(m.ImageLock) == 1 && m.ImagePolicy == "digest" }},
		{"the file system xfs", `"storage_fs":"xfs"`, func(m *Manifest) bool { return m.StorageFS == "xfs" }},
		{"key scopes", `"key_scopes":{"web":["web/","shared"],"none":[]}`, func(m *Manifest) bool {
			return InScope(m.KeyScopes["web"], "web/a") && InScope(m.KeyScopes["web"], "shared") && !InScope(m.KeyScopes["web"], "shared/a") &&
				!InScope(m.KeyScopes["web"], "web") && !InScope(m.KeyScopes["web"], "webx") && !InScope(m.KeyScopes["none"], "") && len(m.KeyScopes) == 2
		}},
		{"time servers", `"time_servers":[{"host":"a:4460"},{"host":"b:4460","ca_cert":"x"},{"host":"[::1]:4460"}]`, func(m *Manifest) bool { return len(m.TimeServers) == 3 && m.TimeServers[1].CACert == "x" }},
		{"signers of the environment", `"env_signers":["` + strings.Repeat("0a", 32) + `"]`, func(m *Manifest) bool { return len(m.EnvSigners) == 1 && m.EnvSigners[0][31] == 10 }},
		{"a KMS policy", `"key_provider":"kms","on_lease_loss":"stop","kms_policy":` + kmsPolicy(`"os_image_hashes":["`+strings.Repeat("0b", 32)+`"],"devices":["`+strings.Repeat("0c", 32)+`"],"registers":{"mrtd":["0d","0e"]},"dev_roots":"x","require_session":true`), func(m *Manifest) bool {
			p := m.KMSPolicy
			return p.AppID[19] == 10 && p.ComposeHashes[0][31] == 10 && p.OSImageHashes[0][31] == 11 && p.Devices[0][31] == 12 &&
				p.Registers["mrtd"][1][0] == 14 && p.DevRoots == "x" && p.RequireSession && m.OnLeaseLoss == OnLeaseLossStop
		}},
		{"a KMS policy of registers alone", `"key_provider":"kms","kms_policy":` + kmsPolicy(`"registers":{"mrtd":["0d"]}`), func(m *Manifest) bool { return !m.KMSPolicy.RequireSession }},
		{"no KMS policy", `"kms_policy":null`, func(m *Manifest) bool { return m.KMSPolicy == nil && m.OnLeaseLoss == OnLeaseLossContinue }},
		{"a surrogate pair", `"bash_script":"\ud83d\ude00"`, func(m *Manifest) bool { return m.BashScript == "😀" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, err := Parse(doc(tc.extra))
			if err != nil {
				t.Fatal(err)
			}
			if !tc.want(m) {
				t.Errorf("%+v", m)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	root := strings.Repeat("5a", 32)
	for _, tc := range []struct{ name, raw, code string }{
		{"not JSON", `x`, "manifest_malformed"},
		{"empty", ``, "manifest_malformed"},
		{"an array", `[]`, "manifest_malformed"},
		{"trailing data", string(doc("")) + "{}", "manifest_malformed"},
		{"a byte-order mark", "\ufeff" + string(doc("")), "manifest_malformed"},
		{"invalid UTF-8", string(doc("\"x\":\"\xff\"")), "manifest_malformed"},
		{"a lone surrogate", string(doc(`"x":"\ud800"`)), "manifest_malformed"},
		{"a reversed surrogate pair", string(doc(`"x":"\udc00\ud800"`)), "manifest_malformed"},
		{"a raw newline in a string", string(doc("\"x\":\"\n\"")), "manifest_malformed"},
		{"an unterminated string", `{"a`, "manifest_malformed"},
		{"a leading zero", string(doc(`"x":01`)), "manifest_malformed"},
		{"NaN", string(doc(`"x":NaN`)), "manifest_malformed"},
		{"a trailing comma", string(doc(`"x":[1,]`)), "manifest_malformed"},
		{"too deep", string(doc(`"x":` + strings.Repeat("[", 1000))), "manifest_malformed"},
		{"too many values", string(doc(`"x":[` + strings.Repeat("0,", maxValues) + `0]`)), "manifest_too_large"},
		{"too large", string(doc(`"x":"` + strings.Repeat("a", MaxSize) + `"`)), "manifest_too_large"},
		{"a duplicate key", string(doc(`"name":"m"`)), "manifest_duplicate_key"},
		{"a duplicate key by escape", string(doc(`"n\u0061me":"m"`)), "manifest_duplicate_key"},
		{"a duplicate key deep inside an unknown field", string(doc(`"x":{"y":[{"a":1,"a":2}]}`)), "manifest_duplicate_key"},
		{"no version", `{"name":"n","runner":"bash"}`, "manifest_version"},
		{"a version of another type", `{"manifest_version":true,"name":"n","runner":"bash"}`, "manifest_version"},
		{"no name", `{"manifest_version":2,"runner":"bash"}`, "manifest_field"},
		{"no runner", `{"manifest_version":2,"name":"n"}`, "manifest_field"},
		{"an unknown runner", `{"manifest_version":2,"name":"n","runner":"podman"}`, "manifest_field"},
		{"a runner in upper case", `{"manifest_version":2,"name":"n","runner":"Bash"}`, "manifest_field"},
		{"a name that is a number", `{"manifest_version":2,"name":1,"runner":"bash"}`, "manifest_field"},
		{"requirements in version 2", `{"manifest_version":2,"name":"n","runner":"bash","requirements":{}}`, "manifest_requires_v3"},
		{"nerdctl in version 2", `{"manifest_version":2,"name":"n","runner":"nerdctl-compose"}`, "manifest_requires_v3"},
		{"two init scripts in version 2", `{"manifest_version":2,"name":"n","runner":"bash","init_script":["a","b"]}`, "manifest_requires_v3"},
		{"six init scripts", string(doc(`"init_script":["","","","","",""]`)), "manifest_field"},
		{"an init script that is a number", string(doc(`"init_script":1`)), "manifest_field"},
		{"an init script array of numbers", string(doc(`"init_script":[1]`)), "manifest_field"},
		{"a boolean as text", string(doc(`"kms_enabled":"true"`)), "manifest_field"},
		{"a null boolean", string(doc(`"secure_time":null`)), "manifest_field"},
		{"a null array", string(doc(`"allowed_envs":null`)), "manifest_field"},
		{"a key provider in upper case", string(doc(`"key_provider":"KMS"`)), "manifest_field"},
		{"an empty key provider", string(doc(`"key_provider":""`)), "manifest_field"},
		{"a pin with provider none", string(doc(`"key_provider":"none","key_provider_id":"ab"`)), "manifest_field"},
		{"a pin with provider tpm", string(doc(`"key_provider":"tpm","key_provider_id":"ab"`)), "manifest_field"},
		{"a pin with no provider", string(doc(`"key_provider_id":"ab"`)), "manifest_field"},
		{"a pin that is not hex", string(doc(`"key_provider":"kms","key_provider_id":"abc"`)), "manifest_field"},
		{"an unknown file system", string(doc(`"storage_fs":"btrfs"`)), "manifest_field"},
		{"an unknown snapshotter", `{"manifest_version":"3","name":"n","runner":"nerdctl-compose","snapshotter":"zfs"}`, "manifest_field"},
		{"a snapshotter for docker", string(doc(`"snapshotter":"stargz"`)), "manifest_field"},
		{"a swap size that overflows", string(doc(`"swap_size":"99999999999999G"`)), "manifest_field"},
		{"a swap size of 2^24 T", string(doc(`"swap_size":"16777216T"`)), "manifest_field"},
		{"a swap size with a sign", string(doc(`"swap_size":"+1G"`)), "manifest_field"},
		{"a swap size without digits", string(doc(`"swap_size":"G"`)), "manifest_field"},
		{"an empty swap size", string(doc(`"swap_size":""`)), "manifest_field"},
		{"a control character as suffix", string(doc(`"swap_size":"1\u0007"`)), "manifest_field"},
		{"a negative swap size", string(doc(`"swap_size":-1`)), "manifest_field"},
		{"a fractional swap size", string(doc(`"swap_size":1.0`)), "manifest_field"},
		{"event log version 3", string(doc(`"event_log_version":3`)), "manifest_field"},
		{"event log version as text", string(doc(`"event_log_version":"2"`)), "manifest_field"},
		{"port 65536", string(doc(`"port_policy":{"ports":[{"port":65536}]}`)), "manifest_field"},
		{"a port entry without port", string(doc(`"port_policy":{"ports":[{}]}`)), "manifest_field"},
		{"a port as text", string(doc(`"port_policy":{"ports":[{"port":"80"}]}`)), "manifest_field"},
		{"a port entry that is a number", string(doc(`"port_policy":{"ports":[80]}`)), "manifest_field"},
		{"an unknown word for who ends TLS", string(doc(`"port_policy":{"ports":[{"port":80,"tls":"none"}]}`)), "manifest_field"},
		{"who ends TLS in upper case", string(doc(`"port_policy":{"ports":[{"port":80,"tls":"App"}]}`)), "manifest_field"},
		{"who ends TLS as a truth value", string(doc(`"port_policy":{"ports":[{"port":80,"tls":true}]}`)), "manifest_field"},
		{"a port policy that is an array", string(doc(`"port_policy":[]`)), "manifest_field"},
		{"an unknown requirement", string(doc(`"requirements":{"os_versoin":">=1"}`)), "manifest_unknown_field"},
		{"a requirement in another case", string(doc(`"requirements":{"OS_version":">=1"}`)), "manifest_unknown_field"},
		{"an unknown gpu policy field", string(doc(`"requirements":{"gpu_policy":{"attest":true}}`)), "manifest_unknown_field"},
		{"requirements that are an array", string(doc(`"requirements":[]`)), "manifest_field"},
		{"an unknown platform", string(doc(`"requirements":{"platforms":["dstack-sgx"]}`)), "manifest_field"},
		{"a malformed os_version", string(doc(`"requirements":{"os_version":">=0.6.0.a0"}`)), "manifest_field"},
		{"an empty os_version", string(doc(`"requirements":{"os_version":""}`)), "manifest_field"},
		{"a launch token hash of 31 bytes", string(doc(`"requirements":{"launch_token_hash":"` + root[2:] + `"}`)), "manifest_field"},
		{"a launch token hash of 0 bytes", string(doc(`"requirements":{"launch_token_hash":""}`)), "manifest_field"},
		{"a verity root of 33 bytes", string(doc(`"verity_volumes":[{"source":"a","verity_root":"5a` + root + `","target":"/a"}]`)), "manifest_field"},
		{"no verity root", string(doc(`"verity_volumes":[{"source":"a","target":"/a"}]`)), "manifest_field"},
		{"a relative target", string(doc(`"verity_volumes":[{"source":"a","verity_root":"` + root + `","target":"a"}]`)), "manifest_field"},
		{"the same target twice", string(doc(`"verity_volumes":[{"source":"a","verity_root":"` + root + `","target":"/a"},{"source":"b","verity_root":"` + root + `","target":"/a/"}]`)), "manifest_field"},
		{"an unknown image policy", string(doc(`"image_policy":"tag"`)), "manifest_field"},
		{"an empty image policy", string(doc(`"image_policy":""`)), "manifest_field"},
		{"an image lock of 31 bytes", string(doc(`"image_lock":{"a":"sha256:` + root[2:] + `"}`)), "manifest_field"},
		{"an image lock in upper case", string(doc(`"image_lock":{"a":"sha256:` + strings.ToUpper(root) + `"}`)), "manifest_field"},
		{"an image lock without a name", string(doc(`"image_lock":{"":"sha256:` + root + `"}`)), "manifest_field"},
		{"key scopes that are a list", string(doc(`"key_scopes":[]`)), "manifest_field"},
		{"a key scope that is text", string(doc(`"key_scopes":{"web":"a"}`)), "manifest_field"},
		{"a key scope of a service that climbs", string(doc(`"key_scopes":{"../web":[]}`)), "manifest_field"},
		{"a key scope of a service without a name", string(doc(`"key_scopes":{"":[]}`)), "manifest_field"},
		{"too many paths in a key scope", string(doc(`"key_scopes":{"web":[` + strings.Repeat(`"",`, MaxKeyScopes) + `""]}`)), "manifest_field"},
		{"two time servers", string(doc(`"time_servers":[{"host":"a:1"},{"host":"b:1"}]`)), "manifest_field"},
		{"no time server", string(doc(`"time_servers":[]`)), "manifest_field"},
		{"a time server that counts twice", string(doc(`"time_servers":[{"host":"a:1"},{"host":"b:1"},{"host":"a:1"}]`)), "manifest_field"},
		{"a time server without a port", string(doc(`"time_servers":[{"host":"a:1"},{"host":"b:1"},{"host":"c"}]`)), "manifest_field"},
		{"a time server with port 0", string(doc(`"time_servers":[{"host":"a:1"},{"host":"b:1"},{"host":"c:0"}]`)), "manifest_field"},
		{"an unknown field of a time server", string(doc(`"time_servers":[{"host":"a:1"},{"host":"b:1"},{"host":"c:1","ca":"x"}]`)), "manifest_unknown_field"},
		{"no signer of the environment", string(doc(`"env_signers":[]`)), "manifest_field"},
		{"a signer of 31 bytes", string(doc(`"env_signers":["` + root[2:] + `"]`)), "manifest_field"},
		{"a KMS policy that is a list", string(doc(`"key_provider":"kms","kms_policy":[]`)), "manifest_field"},
		{"a KMS policy for another provider", string(doc(`"key_provider":"local","kms_policy":` + kmsPolicy(`"registers":{"a":["0a"]}`))), "manifest_field"},
		{"a KMS policy that anchors no system", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"require_session":true`))), "manifest_field"},
		{"a KMS policy with an unknown demand", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"registers":{"a":["0a"]},"min_tcb":1`))), "manifest_unknown_field"},
		{"a KMS policy without an app", string(doc(`"key_provider":"kms","kms_policy":{"compose_hashes":["` + root + `"],"os_image_hashes":["` + root + `"]}`)), "manifest_field"},
		{"a KMS policy of the zero app", string(doc(`"key_provider":"kms","kms_policy":{"app_id":"` + strings.Repeat("0", 40) + `","compose_hashes":["` + root + `"],"os_image_hashes":["` + root + `"]}`)), "manifest_field"},
		{"a KMS policy without a manifest", string(doc(`"key_provider":"kms","kms_policy":{"app_id":"` + root[:40] + `","compose_hashes":[],"os_image_hashes":["` + root + `"]}`)), "manifest_field"},
		{"a KMS policy with 17 manifests", string(doc(`"key_provider":"kms","kms_policy":{"app_id":"` + root[:40] + `","compose_hashes":[` + strings.Repeat(`"`+root+`",`, MaxPeerHashes) + `"` + root + `"],"os_image_hashes":["` + root + `"]}`)), "manifest_field"},
		{"a KMS policy with a short hash", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"os_image_hashes":["`+root[2:]+`"]`))), "manifest_field"},
		{"a KMS policy of no machine", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"devices":[],"os_image_hashes":["`+root+`"]`))), "manifest_field"},
		{"a register without a value", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"registers":{"a":[]}`))), "manifest_field"},
		{"a register that is text", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"registers":{"a":"0a"}`))), "manifest_field"},
		{"a register's value in words", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"registers":{"a":["zz"]}`))), "manifest_field"},
		{"registers that are a list", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"registers":[]`))), "manifest_field"},
		{"development roots that are too large", string(doc(`"key_provider":"kms","kms_policy":` + kmsPolicy(`"registers":{"a":["0a"]},"dev_roots":"`+strings.Repeat("a", MaxDevRoots+1)+`"`))), "manifest_field"},
		{"an unknown answer to a lost lease", string(doc(`"on_lease_loss":"reboot"`)), "manifest_field"},
		{"an empty answer to a lost lease", string(doc(`"on_lease_loss":""`)), "manifest_field"},
		{"an image lock that is a list", string(doc(`"image_lock":[]`)), "manifest_field"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, err := Parse([]byte(tc.raw))
			if err == nil {
				t.Fatalf("accepted: %+v", m)
			}
			if fault.Code(err) != tc.code {
				t.Errorf("code %q, want %q: %v", fault.Code(err), tc.code, err)
			}
			if len(err.Error()) > 500 {
				t.Errorf("the message echoes %d bytes of hostile input", len(err.Error()))
			}
		})
	}
}

func TestCheckSupported(t *testing.T) {
	m, err := Parse([]byte(`{"manifest_version":"4","name":"n","runner":"bash"}`))
	if err != nil {
		t.Fatal(err)
	}
	if fault.Code(m.CheckSupported()) != "manifest_version_unsupported" {
		t.Error(m.CheckSupported())
	}
}

func TestBuild(t *testing.T) {
	f := false
	got, err := Build(Draft{
		Name: "hello <&> wörld", DockerComposeFile: "services:\n  a:\n    image: x\u2028y\n", SecureTime: &f,
		ImagePolicy: "digest", ImageLock: map[string]string{"x": "sha256:" + strings.Repeat("ab", 32)},
		PortPolicy: &PortPolicy{Ports: []Port{{Port: 80}, {Port: 443, PP: true, TLS: TLSApp}}, RestrictMode: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"docker_compose_file":"services:\n  a:\n    image: x` + "\u2028" + `y\n","image_lock":{"x":"sha256:` + strings.Repeat("ab", 32) +
		`"},"image_policy":"digest","key_provider":"none","manifest_version":2,"name":"hello <&> wörld",` +
		`"port_policy":{"ports":[{"port":80},{"port":443,"pp":true,"tls":"app"}],"restrict_mode":true},"runner":"docker-compose","secure_time":false}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	ours := Draft{
		KeyProvider: KeyProviderKMS, OnLeaseLoss: OnLeaseLossStop,
		KMSPolicy: &PeerPolicy{
			AppID: dstack.AppID{1}, ComposeHashes: []dstack.ComposeHash{{2}, {3}}, OSImageHashes: []dstack.ImageHash{{4}}, Devices: []dstack.DeviceID{{5}},
			Registers: map[string][][]byte{"b": {{6}}, "a": {{7}, {8}}}, DevRoots: "{}", RequireSession: true,
		},
		Name: "n", KeyScopes: map[string][]string{"b": {"y/"}, "a": {}}, EnvSigners: [][]byte{make([]byte, 32)},
		TimeServers: []TimeServer{{Host: "a:1"}, {Host: "b:1", CACert: "pem"}, {Host: "c:1"}},
	}
	text, err := Build(ours)
	if err != nil {
		t.Fatal(err)
	}
	m, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]any{ours.KeyScopes, ours.EnvSigners, ours.TimeServers, ours.KMSPolicy, ours.OnLeaseLoss}, []any{m.KeyScopes, m.EnvSigners, m.TimeServers, m.KMSPolicy, m.OnLeaseLoss}); d != "" {
		t.Error(d)
	}
	n, err := Normalise(got, false)
	if err != nil || !bytes.Equal(n, got) {
		t.Errorf("Build's output is not normalised: %s, %v", n, err)
	}
	if _, err := Build(Draft{Name: "n", KeyProvider: "none", KeyProviderID: []byte{1}}); fault.Code(err) != "manifest_field" {
		t.Errorf("a draft that cannot be parsed: %v", err)
	}
	if _, err := Build(Draft{Name: "n", Requirements: json.RawMessage(`{"x":1}`)}); fault.Code(err) != "manifest_unknown_field" {
		t.Errorf("a draft with an unknown requirement: %v", err)
	}
}

// kmsPolicy is a policy with further members.
func kmsPolicy(members string) string {
	return `{"app_id":"` + strings.Repeat("0a", 20) + `","compose_hashes":["` + strings.Repeat("0a", 32) + `"],` + members + `}`
}

// The same draft always gives the same bytes, and Parse returns what was drafted.
func TestBuildRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := Draft{
			Name:              rapid.String().Draw(t, "name"),
			DockerComposeFile: rapid.String().Draw(t, "compose"),
			KeyProvider:       rapid.SampledFrom([]string{"none", "kms", "local", "tpm"}).Draw(t, "kp"),
			InitScripts:       rapid.SliceOfN(rapid.String(), 0, 5).Draw(t, "init"),
			AllowedEnvs:       rapid.SliceOfN(rapid.String(), 0, 5).Draw(t, "envs"),
			SwapSize:          rapid.Uint64().Draw(t, "swap"),
			ImageLock:         map[string]string{},
		}
		for i := range rapid.IntRange(0, 3).Draw(t, "n") {
			d.ImageLock[fmt.Sprintf("%d%s", i, rapid.String().Draw(t, "ref"))] = "sha256:" + strings.Repeat("0", 64)
		}
		a, err := Build(d)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := Build(d)
		if !bytes.Equal(a, b) {
			t.Fatal("not deterministic")
		}
		m, err := Parse(a)
		if err != nil {
			t.Fatal(err)
		}
		if m.Name != d.Name || m.DockerComposeFile != d.DockerComposeFile || m.SwapSize != d.SwapSize || len(m.ImageLock) != len(d.ImageLock) ||
			strings.Join(m.InitScripts, "\x00") != strings.Join(d.InitScripts, "\x00") {
			t.Fatalf("%+v\n%+v", d, m)
		}
	})
}

func TestCanonicalNumbersAndOrder(t *testing.T) {
	for in, want := range map[string]string{
		`[-0, 0.0, 1e0, 100, 1e21, 1e-7, 0.000001, 333333333.33333329, 4.5e-10, 1E30, 123456789012345680000]`: `[0,0,1,100,1e+21,1e-7,0.000001,333333333.3333333,4.5e-10,1e+30,123456789012345680000]`,
		`{"\ufb33":1,"\ud83d\ude00":2,"a":3,"\u0080":4}`:                                                      "{\"a\":3,\"\u0080\":4,\"😀\":2,\"\ufb33\":1}",
		`"\u0000\u001f\b\f\n\r\t\"\\\/"`:                                                                      `"\u0000\u001f\b\f\n\r\t\"\\/"`,
	} {
		v, err := parseJSON([]byte(in))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := appendJCS(nil, v); err != nil || string(got) != want {
			t.Errorf("%s: %s, %v; want %s", in, got, err, want)
		}
	}
	v, err := parseJSON([]byte(`1e999`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := appendJCS(nil, v); fault.Code(err) != "manifest_malformed" {
		t.Errorf("a number beyond a double: %v", err)
	}
}

func TestOSVersion(t *testing.T) {
	for _, tc := range []struct {
		req, version string
		want         bool
	}{
		{"1.2.3", "1.2.4", true}, {"1.2.3", "1.2.2", false}, {"1.2.3", "2.0.0", false},
		{"^0.2.3", "0.2.9", true}, {"^0.2.3", "0.3.0", false}, {"^0.0.3", "0.0.3", true}, {"^0.0.3", "0.0.4", false},
		{"^0.0", "0.0.9", true}, {"^0.0", "0.1.0", false}, {"^0", "0.9.9", true}, {"^0", "1.0.0", false},
		{"~1.2.3", "1.2.9", true}, {"~1.2.3", "1.3.0", false}, {"~1.2", "1.2.0", true}, {"~1", "1.9.0", true}, {"~1", "2.0.0", false},
		{"*", "9.9.9", true}, {"1.*", "1.9.0", true}, {"1.*", "2.0.0", false}, {"1.2.*", "1.2.7", true}, {"1.2.*", "1.3.0", false},
		{"=1.2.3", "1.2.3", true}, {"=1.2.3", "1.2.4", false}, {"=1.2", "1.2.9", true}, {"=1.2", "1.3.0", false},
		{">1.2.3", "1.2.4", true}, {">1.2.3", "1.2.3", false}, {">1.2", "1.2.9", false}, {">1.2", "1.3.0", true}, {">1", "2.0.0", true},
		{">=1.2", "1.2.0", true}, {"<1.2", "1.1.9", true}, {"<1.2", "1.2.0", false}, {"<=1.2", "1.2.9", true}, {"<=1.2", "1.3.0", false},
		{"<=1.2.3", "1.2.3", true}, {"<2", "1.9.9", true},
		{">=1.0.0, <2.0.0", "1.5.0", true}, {">=1.0.0, <2.0.0", "2.0.0", false},
		{">=1.0.0", "1.5.0-alpha", false}, {">=1.5.0-alpha", "1.5.0-beta", true}, {">=1.5.0-alpha.2", "1.5.0-alpha.10", true},
		{">=1.5.0-beta", "1.5.0-alpha", false}, {">=1.5.0-alpha", "1.5.0", true}, {"*", "1.0.0-a", false},
		{"=1.2.3", "1.2.3+build5", true},
	} {
		if got, err := MatchOSVersion(tc.req, tc.version); err != nil || got != tc.want {
			t.Errorf("%q against %q: %v, %v; want %v", tc.req, tc.version, got, err, tc.want)
		}
	}
	for _, req := range []string{"", ",", "1.2.3,", ">=", "1.2.3.4", "01.2.3", "1.-2", "=> 1", "1.2-a", "1.*.3", ">=*", "1.2.3-", "1.2.3-01", "*, 1", "v1.2.3", strings.Repeat("1", 300)} {
		if _, err := MatchOSVersion(req, "1.2.3"); err == nil {
			t.Errorf("requirement %q accepted", req)
		}
	}
	for _, v := range []string{"", "1", "1.2", "1.2.3.4", "01.2.3", "1.2.3-", "1.2.3-01", "1.2.3+", "v1.2.3"} {
		if _, err := MatchOSVersion("*", v); err == nil {
			t.Errorf("version %q accepted", v)
		}
	}
}

func TestCompilesToWebAssembly(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIP: builds for another platform")
	}
	cmd := exec.Command("go", "build", "github.com/dstack-go/dstack/manifest")
	cmd.Env = append(os.Environ(), "GOOS=js", "GOARCH=wasm")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(doc(""))
	f.Add(doc(`"requirements":{"os_version":"^1.2","gpu_policy":{"rego":"x","attest_gpu":false}},"swap_size":"1G"`))
	f.Add(doc(`"port_policy":{"restrict_mode":true,"ports":[{"port":80,"pp":true}]},"x":[1e-7,"\ud83d\ude00",null]`))
	f.Add(doc(`"key_provider":"kms","on_lease_loss":"stop","kms_policy":` + kmsPolicy(`"registers":{"mrtd":["0d"]},"devices":["`+strings.Repeat("0c", 32)+`"]`)))
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := Parse(raw)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		// encoding/json is the laxer reader: what we accept, it accepts.
		if !json.Valid(raw) {
			t.Fatalf("accepted what encoding/json refuses: %q", raw)
		}
		m.GPUPolicyHash()
		m.InitScriptHashes()
		n, err := Normalise(raw, false)
		if err != nil {
			if fault.Code(err) != "manifest_malformed" { // a number beyond a double in an inert field
				t.Fatal(err)
			}
			return
		}
		again, err := Normalise(n, false)
		if err != nil || !bytes.Equal(n, again) {
			t.Fatalf("normalising is not idempotent: %q %q %v", n, again, err)
		}
	})
}
