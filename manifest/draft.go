// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"encoding/hex"
	"encoding/json"
	"strconv"

	"github.com/dstack-go/dstack/internal/fault"
)

// Draft is a manifest to be written. The zero value of a field leaves it out of
// the document, so that the reader's default holds.
type Draft struct {
	Version           int    // 0 = the lowest that carries the content: 2, or 3 where needed
	Name              string // required
	Runner            string // "" = docker-compose
	DockerComposeFile string
	BashScript        string
	Snapshotter       string
	InitScripts       []string
	PreLaunchScript   string

	PublicLogs    bool
	PublicSysinfo bool
	PublicTCBInfo *bool

	KeyProvider   string // none, kms, local or tpm; always written, "" = none
	KeyProviderID []byte

	GatewayEnabled bool
	AllowedEnvs    []string
	NoInstanceID   bool
	SecureTime     *bool
	StorageFS      string
	SwapSize       uint64

	EventLogVersion int             // 0 = leave out (1)
	PortPolicy      *PortPolicy     // nil = leave out
	Requirements    json.RawMessage // JSON object; nil = leave out
	VerityVolumes   []VerityVolume

	ImagePolicy   string
	ImageLock     map[string]string
	KeyScopes     map[string][]string
	TimeServers   []TimeServer
	EnvSigners    [][]byte // Ed25519 public keys
	KMSPolicy     *PeerPolicy
	GatewayPolicy *PeerPolicy
	CustomDomains []CustomDomain
	OnLeaseLoss   string
}

// Build writes the normalised manifest: keys sorted, compact, UTF-8 unescaped,
// no trailing newline. The result has passed Parse.
func Build(d Draft) ([]byte, error) {
	o := object{}
	version := d.Version
	if version == 0 {
		version = 2
		if len(d.Requirements) > 0 || d.Runner == RunnerNerdctlCompose || len(d.InitScripts) > 1 {
			version = 3
		}
	}
	if version <= 2 {
		o["manifest_version"] = version
	} else {
		// Numbers above 2 are refused by every reader (guest-os.md §4).
		o["manifest_version"] = strconv.Itoa(version)
	}
	o["name"] = d.Name
	o["runner"] = d.Runner
	if d.Runner == "" {
		o["runner"] = RunnerDockerCompose
	}
	o["key_provider"] = d.KeyProvider
	if d.KeyProvider == "" {
		o["key_provider"] = KeyProviderNone
	}
	setString := func(key, v string) {
		if v != "" {
			o[key] = v
		}
	}
	setBool := func(key string, v bool) {
		if v {
			o[key] = true
		}
	}
	setString("docker_compose_file", d.DockerComposeFile)
	setString("bash_script", d.BashScript)
	setString("snapshotter", d.Snapshotter)
	setString("pre_launch_script", d.PreLaunchScript)
	setString("key_provider_id", hex.EncodeToString(d.KeyProviderID))
	setString("storage_fs", d.StorageFS)
	setString("image_policy", d.ImagePolicy)
	setString("on_lease_loss", d.OnLeaseLoss)
	setBool("public_logs", d.PublicLogs)
	setBool("public_sysinfo", d.PublicSysinfo)
	setBool("gateway_enabled", d.GatewayEnabled)
	setBool("no_instance_id", d.NoInstanceID)
	if d.PublicTCBInfo != nil {
		o["public_tcbinfo"] = *d.PublicTCBInfo
	}
	if d.SecureTime != nil {
		o["secure_time"] = *d.SecureTime
	}
	switch {
	case len(d.InitScripts) == 1:
		o["init_script"] = d.InitScripts[0] // readable by guests before arrays existed
	case len(d.InitScripts) > 1:
		o["init_script"] = anys(d.InitScripts)
	}
	if len(d.AllowedEnvs) > 0 {
		o["allowed_envs"] = anys(d.AllowedEnvs)
	}
	if d.SwapSize > 0 {
		o["swap_size"] = d.SwapSize
	}
	if d.EventLogVersion != 0 {
		o["event_log_version"] = d.EventLogVersion
	}
	if d.PortPolicy != nil {
		ports := []any{}
		for _, p := range d.PortPolicy.Ports {
			e := object{"port": int(p.Port)}
			if p.PP {
				e["pp"] = true
			}
			if p.TLS != "" {
				e["tls"] = p.TLS
			}
			ports = append(ports, e)
		}
		o["port_policy"] = object{"ports": ports, "restrict_mode": d.PortPolicy.RestrictMode}
	}
	if len(d.Requirements) > 0 {
		v, err := parseJSON(d.Requirements)
		if err != nil {
			return nil, err
		}
		o["requirements"] = v
	}
	if len(d.VerityVolumes) > 0 {
		vols := []any{}
		for _, v := range d.VerityVolumes {
			vols = append(vols, object{"source": v.Source, "target": v.Target, "verity_root": hex.EncodeToString(v.Root[:])})
		}
		o["verity_volumes"] = vols
	}
	if len(d.ImageLock) > 0 {
		lock := object{}
		for ref, digest := range d.ImageLock {
			lock[ref] = digest
		}
		o["image_lock"] = lock
	}
	if len(d.KeyScopes) > 0 {
		scopes := object{}
		for name, paths := range d.KeyScopes {
			scopes[name] = anys(paths)
		}
		o["key_scopes"] = scopes
	}
	if len(d.TimeServers) > 0 {
		servers := []any{}
		for _, t := range d.TimeServers {
			e := object{"host": t.Host}
			if t.CACert != "" {
				e["ca_cert"] = t.CACert
			}
			servers = append(servers, e)
		}
		o["time_servers"] = servers
	}
	if len(d.EnvSigners) > 0 {
		var signers []string
		for _, key := range d.EnvSigners {
			signers = append(signers, hex.EncodeToString(key))
		}
		o["env_signers"] = anys(signers)
	}
	if d.KMSPolicy != nil {
		o["kms_policy"] = d.KMSPolicy.document()
	}
	if d.GatewayPolicy != nil {
		o["gateway_policy"] = d.GatewayPolicy.document()
	}
	if len(d.CustomDomains) > 0 {
		domains := make([]any, len(d.CustomDomains))
		for i, c := range d.CustomDomains {
			domains[i] = object{"domain": c.Domain, "port": int(c.Port)}
		}
		o["custom_domains"] = domains
	}
	b, err := appendJCS(nil, o)
	if err != nil {
		return nil, err
	}
	if _, err := Parse(b); err != nil {
		return nil, err
	}
	return b, nil
}

func anys(in []string) []any {
	out := make([]any, len(in))
	for i, s := range in {
		out[i] = s
	}
	return out
}

// Normalise rewrites any JSON object with sorted keys and compact separators:
// what upstream's SDKs hash when asked for a compose hash of a parsed manifest
// (guest-agent.md, compose hash). With dropInert the script that the runner does
// not use and an empty pre_launch_script are left out. The result is another
// manifest with another hash; guests and verifiers never do this.
func Normalise(raw []byte, dropInert bool) ([]byte, error) {
	if len(raw) > MaxSize {
		return nil, fault.New("manifest_too_large", "the manifest has %d bytes, more than %d", len(raw), MaxSize)
	}
	v, err := parseJSON(raw)
	if err != nil {
		return nil, err
	}
	o, ok := v.(object)
	if !ok {
		return nil, fault.New("manifest_malformed", "the manifest is %s, not a JSON object", kind(v))
	}
	if dropInert {
		switch o["runner"] {
		case RunnerBash:
			delete(o, "docker_compose_file")
		case RunnerDockerCompose, RunnerNerdctlCompose:
			delete(o, "bash_script")
		}
		if o["pre_launch_script"] == "" {
			delete(o, "pre_launch_script")
		}
	}
	return appendJCS(nil, o)
}
