// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// platformNames is how requirements.platforms calls the TEEs.
var platformNames = map[dstack.TEE]string{dstack.TDX: "dstack-tdx", dstack.SEVSNP: "dstack-amd-sev-snp"}

// Supported refuses what a manifest demands and this system cannot give, before
// anything is measured. Codes: manifest_unsupported, requirement_platform,
// requirement_os_version.
func Supported(m *manifest.Manifest, tee dstack.TEE, version string) error {
	unsupported := func(format string, args ...any) error {
		return fault.New("manifest_unsupported", format, args...).WithFix("remove it from the manifest, or use an image that has it")
	}
	switch {
	case m.Runner == manifest.RunnerNerdctlCompose:
		return unsupported("the runner %s is not available in this image", m.Runner)
	case m.Runner == manifest.RunnerDockerCompose && m.DockerComposeFile == "":
		return fault.New("manifest_field", "manifest field docker_compose_file is empty")
	case m.Runner == manifest.RunnerBash && m.BashScript == "":
		return fault.New("manifest_field", "manifest field bash_script is empty")
	case len(m.KeyScopes) > 0 && m.Runner != manifest.RunnerDockerCompose:
		return unsupported("key_scopes are for the services of a compose file, and the runner is %s", m.Runner)
	}
	r := m.Requirements
	if r == nil {
		return nil
	}
	if r.GPUPolicy.Rego != "" {
		return unsupported("requirements.gpu_policy.rego cannot be evaluated by this image")
	}
	if r.TDXMeasureACPITables != nil && tee != dstack.TDX {
		return fault.New("requirement_platform", "requirements.tdx_measure_acpi_tables is for TDX, but this is %s", tee)
	}
	if r.HasPlatforms && !slices.Contains(r.Platforms, platformNames[tee]) {
		return fault.New("requirement_platform", "the manifest runs on %s only, but this is %s", strings.Join(r.Platforms, ", "), platformNames[tee]).
			WithFix("run it on one of these platforms")
	}
	if r.OSVersion != "" {
		ok, err := manifest.MatchOSVersion(r.OSVersion, version)
		if err != nil || !ok {
			return fault.New("requirement_os_version", "the manifest demands the OS version %q, but this is %q", r.OSVersion, version).
				WithFix("use an image with such a version")
		}
	}
	return nil
}

// acpiVariant holds what the manifest demands of the ACPI tables' measurement against
// what the host told verifiers (vmm.md §6.3): true wants every table measured and
// compared, false the smaller form. Code requirement_acpi.
func acpiVariant(m *manifest.Manifest, vmConfig string) error {
	if m.Requirements == nil || m.Requirements.TDXMeasureACPITables == nil {
		return nil
	}
	var c struct {
		Variant string `json:"tdx_attestation_variant"`
	}
	if vmConfig != "" {
		if err := json.Unmarshal([]byte(vmConfig), &c); err != nil {
			return fault.Wrap(err, "requirement_acpi", "read which form of ACPI measurement the host chose")
		}
	}
	if want := *m.Requirements.TDXMeasureACPITables; want != (c.Variant != "lite") {
		return fault.New("requirement_acpi", "requirements.tdx_measure_acpi_tables is %v, and the host's vm_config says %q", want, c.Variant).
			WithFix("start the VM with a VMM that heeds the manifest's requirement")
	}
	return nil
}

// launchToken checks the token that the manifest demands of whoever starts the VM:
// the member dstack.launch_token of the user's configuration must hash to
// requirements.launch_token_hash. Code launch_token.
func launchToken(m *manifest.Manifest, userConfig []byte) error {
	if m.Requirements == nil || len(m.Requirements.LaunchTokenHash) == 0 {
		return nil
	}
	refuse := func(what string) error {
		return fault.New("launch_token", "the manifest demands a launch token: %s", what).
			WithFix("start the VM with the user configuration that carries the token of this manifest")
	}
	var config struct {
		Dstack struct {
			LaunchToken string `json:"launch_token"`
		} `json:"dstack"`
	}
	if err := json.Unmarshal(userConfig, &config); err != nil {
		return refuse("there is no user configuration in JSON")
	}
	if config.Dstack.LaunchToken == "" {
		return refuse("dstack.launch_token of the user configuration is missing")
	}
	hash, err := manifest.LaunchTokenHash(config.Dstack.LaunchToken)
	if err != nil {
		return refuse(err.Error())
	}
	if !bytes.Equal(hash[:], m.Requirements.LaunchTokenHash) {
		return refuse("the one given is another")
	}
	return nil
}
