// SPDX-License-Identifier: Apache-2.0

// Package manifest is the application manifest, app-compose.json: its fields,
// their limits, and the hash that names the workload.
//
// The compose hash is the SHA-256 of the exact bytes, so this package never
// changes what it reads: [Parse] returns the meaning and keeps the bytes. Unknown
// top-level fields are measured but inert, as upstream has it; inside
// `requirements`, `gpu_policy` and our own objects, where an ignored field would be
// an ignored demand, they are errors. [Build] writes the normalised form (sorted keys,
// compact, no needless escapes) that our own tools always produce.
//
// Guarantees: pure (no clock, disk or network; compiles to js/wasm), bounded
// (10 MiB, 64 levels, 2^18 values), and exact: keys match by case, two equal keys
// are refused, so two readers cannot take one manifest in two ways.
//
// Attacker-controlled: every byte. A manifest comes from an untrusted host and is
// only worth what the measured hash of it is compared with.
//
// Implements spec/guest-os.md §4.
package manifest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"path"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

const (
	// MaxSize is the largest manifest in bytes.
	MaxSize = 10 << 20

	// MaxVersion is the highest manifest_version this system runs.
	MaxVersion = 3

	// MaxInitScripts bounds init_script when it is an array.
	MaxInitScripts = 5
)

// Runners.
const (
	RunnerDockerCompose  = "docker-compose"
	RunnerNerdctlCompose = "nerdctl-compose"
	RunnerBash           = "bash"
)

// Kinds of key provider.
const (
	KeyProviderNone  = "none"
	KeyProviderKMS   = "kms"
	KeyProviderLocal = "local"
	KeyProviderTPM   = "tpm"
)

// ImagePolicyDigest is the image_policy under which the guest runs no container
// whose image is not named by digest in image_lock.
const ImagePolicyDigest = "digest"

// Manifest is the meaning of one app-compose.json. Defaults are filled in.
// It is never serialised again: the bytes that count are in Raw.
type Manifest struct {
	Version           int      // manifest_version, 1 or more; see CheckSupported
	Name              string   // name
	Runner            string   // runner: one of the Runner constants
	DockerComposeFile string   // docker_compose_file: YAML text
	BashScript        string   // bash_script
	Snapshotter       string   // snapshotter: "", overlayfs or stargz
	InitScripts       []string // init_script: at most 5, in order
	PreLaunchScript   string   // pre_launch_script
	Features          []string // features (deprecated)

	PublicLogs    bool // public_logs
	PublicSysinfo bool // public_sysinfo
	PublicTCBInfo bool // public_tcbinfo; true unless the manifest says false

	KMSEnabled              bool   // kms_enabled
	LocalKeyProviderEnabled bool   // local_key_provider_enabled
	KeyProvider             string // key_provider as written, "" when absent; use KeyProviderKind
	KeyProviderID           []byte // key_provider_id: pin of the provider, empty = not pinned

	GatewayEnabled bool     // gateway_enabled OR tproxy_enabled; use GatewayWanted
	AllowedEnvs    []string // allowed_envs
	NoInstanceID   bool     // no_instance_id
	SecureTime     *bool    // secure_time; nil when absent; use WantsSecureTime
	StorageFS      string   // storage_fs: "", zfs or ext4 (lower case)
	SwapSize       uint64   // swap_size in bytes

	EventLogVersion int            // event_log_version: 1 or 2
	PortPolicy      PortPolicy     // port_policy
	Requirements    *Requirements  // requirements; nil when absent
	VerityVolumes   []VerityVolume // verity_volumes

	ImagePolicy   string              // image_policy (ours): "" or "digest"
	ImageLock     map[string]string   // image_lock (ours): image reference -> "sha256:<64 hex>"
	KeyScopes     map[string][]string // key_scopes (ours): compose service -> key paths; see InScope
	TimeServers   []TimeServer        // time_servers (ours): empty, or at least MinTimeServers
	EnvSigners    [][]byte            // env_signers (ours): Ed25519 public keys, 32 bytes each
	KMSPolicy     *PeerPolicy         // kms_policy (ours): nil when absent
	GatewayPolicy *PeerPolicy         // gateway_policy (ours): nil when absent
	CustomDomains []CustomDomain      // custom_domains (ours): at most MaxCustomDomains
	OnLeaseLoss   string              // on_lease_loss (ours): continue or stop

	Raw []byte // the exact bytes that were parsed
}

// PortPolicy is what the gateway and the guest's firewall let in.
type PortPolicy struct {
	Ports        []Port // ports
	RestrictMode bool   // restrict_mode: only the listed ports
}

// Port is one entry of port_policy.
type Port struct {
	Port uint16 // port
	PP   bool   // pp: the gateway speaks the PROXY protocol to it
	TLS  string // tls (ours): who ends TLS, app or gateway; "" = as the host name asks
}

// Who ends the TLS connections to a port.
const (
	TLSApp     = "app"
	TLSGateway = "gateway"
)

// TLSPort is the TCP port, in the tunnel to gateways alone, at which a guest's agent
// ends TLS for ports with tls app: a PROXY header of version 2 goes first, then the
// client's own bytes, and the name in its ClientHello says which port is meant.
const TLSPort = 8091

// Allows reports whether the policy lets traffic to a TCP port in.
func (p PortPolicy) Allows(port uint16) bool {
	if !p.RestrictMode {
		return true
	}
	for _, q := range p.Ports {
		if q.Port == port {
			return true
		}
	}
	return false
}

// Requirements are demands that a guest must meet or refuse to boot.
type Requirements struct {
	OSVersion            string    // os_version: Cargo version requirement, "" = any
	Platforms            []string  // platforms: meaningful when HasPlatforms
	HasPlatforms         bool      // platforms was given; an empty list allows none
	TDXMeasureACPITables *bool     // tdx_measure_acpi_tables
	LaunchTokenHash      []byte    // launch_token_hash: 32 bytes or nil
	GPUPolicy            GPUPolicy // gpu_policy with defaults
	gpuPolicy            any       // as written; {} when absent
}

// GPUPolicy says which GPU states are acceptable.
type GPUPolicy struct {
	AttestGPU         bool   // attest_gpu, true by default
	Rego              string // rego
	AllowDevtools     bool   // allow_devtools
	AllowDebug        bool   // allow_debug
	AllowInsecureBoot bool   // allow_insecure_boot
}

// VerityVolume is a read-only disk named by its root hash.
type VerityVolume struct {
	Source string   // source
	Root   [32]byte // verity_root
	Target string   // target: absolute path, unique
}

// TimeServer is one server of authenticated time (NTS, RFC 8915).
type TimeServer struct {
	Host   string // host: name:port of its key exchange
	CACert string // ca_cert: PEM of the authority that certifies it; "" = the image's
}

// Limits of our fields.
const (
	MinTimeServers = 3 // one that lies must not decide
	MaxTimeServers = 16
	MaxEnvSigners  = 16
	MaxKeyScopes   = 256 // services, and paths of one service
)

// InScope reports whether a key path lies in a service's scope: an entry that ends
// in "/" stands for all paths below it, any other for itself.
func InScope(scope []string, keyPath string) bool {
	for _, s := range scope {
		if s == keyPath || strings.HasSuffix(s, "/") && strings.HasPrefix(keyPath, s) {
			return true
		}
	}
	return false
}

// Platforms that requirements.platforms may name.
var platforms = map[string]bool{
	"dstack-tdx": true, "dstack-gcp-tdx": true, "dstack-nitro-enclave": true,
	"dstack-amd-sev-snp": true, "dstack-aws-nitro-tpm": true,
}

// Parse reads a manifest. Errors carry the codes manifest_too_large,
// manifest_malformed (not JSON), manifest_duplicate_key, manifest_unknown_field,
// manifest_field (a member of the wrong type or value), manifest_version and
// manifest_requires_v3.
func Parse(raw []byte) (*Manifest, error) {
	if len(raw) > MaxSize {
		return nil, fault.New("manifest_too_large", "the manifest has %d bytes, more than %d", len(raw), MaxSize)
	}
	v, err := parseJSON(raw)
	if err != nil {
		return nil, err
	}
	top, ok := v.(object)
	if !ok {
		return nil, fault.New("manifest_malformed", "the manifest is %s, not a JSON object", kind(v))
	}
	d := &decoder{obj: top}
	m := &Manifest{Raw: append([]byte(nil), raw...)}

	m.Version = d.version()
	m.Name = d.requiredString("name")
	m.Runner = d.requiredString("runner")
	m.DockerComposeFile = d.optionalString("docker_compose_file")
	m.BashScript = d.optionalString("bash_script")
	m.Snapshotter = d.optionalString("snapshotter")
	m.InitScripts = d.initScripts()
	m.PreLaunchScript = d.optionalString("pre_launch_script")
	m.Features = d.strings("features")
	m.PublicLogs = d.boolean("public_logs", false)
	m.PublicSysinfo = d.boolean("public_sysinfo", false)
	m.PublicTCBInfo = d.boolean("public_tcbinfo", true)
	m.KMSEnabled = d.boolean("kms_enabled", false)
	gateway, tproxy := d.boolean("gateway_enabled", false), d.boolean("tproxy_enabled", false)
	m.GatewayEnabled = gateway || tproxy
	m.LocalKeyProviderEnabled = d.boolean("local_key_provider_enabled", false)
	m.KeyProvider = d.optionalString("key_provider")
	m.KeyProviderID = d.hex("key_provider_id", -1)
	m.AllowedEnvs = d.strings("allowed_envs")
	m.NoInstanceID = d.boolean("no_instance_id", false)
	if _, ok := top["secure_time"]; ok {
		b := d.boolean("secure_time", true)
		m.SecureTime = &b
	}
	m.StorageFS = strings.ToLower(d.optionalString("storage_fs"))
	m.SwapSize = d.swapSize()
	m.EventLogVersion = d.eventLogVersion()
	m.PortPolicy = d.portPolicy()
	m.Requirements = d.requirements()
	m.VerityVolumes = d.verityVolumes()
	m.ImagePolicy = d.optionalString("image_policy")
	m.ImageLock = d.imageLock()
	m.KeyScopes = d.keyScopes()
	m.TimeServers = d.timeServers()
	m.EnvSigners = d.envSigners()
	m.KMSPolicy, m.GatewayPolicy = d.peerPolicy("kms_policy"), d.peerPolicy("gateway_policy")
	m.CustomDomains = d.customDomains()
	m.OnLeaseLoss = d.optionalString("on_lease_loss")
	if d.err != nil {
		return nil, d.err
	}
	if err := m.check(top); err != nil {
		return nil, err
	}
	return m, nil
}

// check enforces the rules that concern more than one field's type.
func (m *Manifest) check(top object) error {
	oneOf := func(field, value string, allowed ...string) error {
		for _, a := range allowed {
			if value == a {
				return nil
			}
		}
		return fieldError(field, "%q is none of %s", clip(value), strings.Join(allowed, ", "))
	}
	if err := oneOf("runner", m.Runner, RunnerDockerCompose, RunnerNerdctlCompose, RunnerBash); err != nil {
		return err
	}
	if m.KeyProvider != "" || isString(top["key_provider"]) {
		if err := oneOf("key_provider", m.KeyProvider, KeyProviderNone, KeyProviderKMS, KeyProviderLocal, KeyProviderTPM); err != nil {
			return err
		}
	}
	if m.StorageFS != "" || isString(top["storage_fs"]) {
		if err := oneOf("storage_fs", m.StorageFS, "zfs", "ext4", "xfs"); err != nil {
			return err
		}
	}
	if m.Snapshotter != "" || isString(top["snapshotter"]) {
		if err := oneOf("snapshotter", m.Snapshotter, "overlayfs", "stargz"); err != nil {
			return err
		}
		if m.Runner != RunnerNerdctlCompose {
			return fieldError("snapshotter", "is only for the runner %s, but the runner is %s", RunnerNerdctlCompose, m.Runner)
		}
	}
	if m.ImagePolicy != "" || isString(top["image_policy"]) {
		if err := oneOf("image_policy", m.ImagePolicy, ImagePolicyDigest); err != nil {
			return err
		}
	}
	if m.OnLeaseLoss != "" || isString(top["on_lease_loss"]) {
		if err := oneOf("on_lease_loss", m.OnLeaseLoss, OnLeaseLossContinue, OnLeaseLossStop); err != nil {
			return err
		}
	} else {
		m.OnLeaseLoss = OnLeaseLossContinue
	}
	if m.GatewayPolicy != nil && !m.GatewayWanted() {
		return fieldError("gateway_policy", "says which gateway gets the app's traffic, but gateway_enabled is false")
	}
	if err := m.checkDomains(); err != nil {
		return err
	}
	if k := m.KeyProviderKind(); m.KMSPolicy != nil && k != KeyProviderKMS {
		return fieldError("kms_policy", "says which KMS may give keys, but the key provider is %s", k)
	}
	if k := m.KeyProviderKind(); len(m.KeyProviderID) > 0 && (k == KeyProviderNone || k == KeyProviderTPM) {
		return fieldError("key_provider_id", "pins a key provider, but the key provider is %s, which has no identity", k)
	}
	if m.Version < 3 {
		for _, v3 := range []struct {
			what string
			used bool
		}{
			{"requirements", m.Requirements != nil},
			{"the runner nerdctl-compose", m.Runner == RunnerNerdctlCompose},
			{"more than one init_script", len(m.InitScripts) > 1},
		} {
			if v3.used {
				return fault.New("manifest_requires_v3", "%s needs manifest_version \"3\", but it is %d: an older guest would ignore the demand", v3.what, m.Version).
					WithFix(`set "manifest_version": "3"`)
			}
		}
	}
	return nil
}

// Hash returns the compose hash: SHA-256 of Raw.
func (m *Manifest) Hash() dstack.ComposeHash { return sha256.Sum256(m.Raw) }

// KeyProviderKind returns none, kms, local or tpm: key_provider wins, then
// kms_enabled, then local_key_provider_enabled.
func (m *Manifest) KeyProviderKind() string {
	switch {
	case m.KeyProvider != "":
		return m.KeyProvider
	case m.KMSEnabled:
		return KeyProviderKMS
	case m.LocalKeyProviderEnabled:
		return KeyProviderLocal
	}
	return KeyProviderNone
}

// GatewayWanted reports whether the app asks for a route through a gateway.
func (m *Manifest) GatewayWanted() bool {
	if m.GatewayEnabled {
		return true
	}
	for _, f := range m.Features {
		if f == "tproxy-net" {
			return true
		}
	}
	return false
}

// WantsSecureTime reports whether the guest must wait for an authenticated clock:
// true unless the manifest says false.
func (m *Manifest) WantsSecureTime() bool { return m.SecureTime == nil || *m.SecureTime }

// RunsScripts reports whether the manifest carries shell scripts of any kind.
func (m *Manifest) RunsScripts() bool {
	return len(m.InitScripts) > 0 || m.PreLaunchScript != "" || m.Runner == RunnerBash
}

// InitScriptHashes returns the SHA-256 of each init script's UTF-8 bytes, in
// order: the payloads of the init-script-hash events.
func (m *Manifest) InitScriptHashes() [][]byte {
	out := make([][]byte, 0, len(m.InitScripts))
	for _, s := range m.InitScripts {
		h := sha256.Sum256([]byte(s))
		out = append(out, h[:])
	}
	return out
}

// GPUPolicyHash returns SHA-256(JCS(requirements.gpu_policy or {})): the payload
// of the gpu-policy-hash event. A default that is written out changes it.
func (m *Manifest) GPUPolicyHash() [32]byte {
	var v any = object{}
	if m.Requirements != nil {
		v = m.Requirements.gpuPolicy
	}
	b, err := appendJCS(nil, v)
	if err != nil {
		// Parse accepted only booleans and strings inside gpu_policy.
		panic("manifest: gpu_policy has no canonical form: " + err.Error())
	}
	return sha256.Sum256(b)
}

// CheckSupported returns an error with code manifest_version_unsupported for a
// manifest written for a newer system than this one.
func (m *Manifest) CheckSupported() error {
	if m.Version > MaxVersion {
		return fault.New("manifest_version_unsupported", "manifest_version %d is newer than this system, which knows up to %d", m.Version, MaxVersion).
			WithFix("use a newer OS image")
	}
	return nil
}

// MinLaunchToken is the least length of a launch token in bytes.
const MinLaunchToken = 32

// LaunchTokenHash returns SHA-256("dstack-launch-token/v1:" ‖ token), or an error
// with code launch_token_short when the token has less than 32 bytes.
func LaunchTokenHash(token string) (h [32]byte, err error) {
	if len(token) < MinLaunchToken {
		return h, fault.New("launch_token_short", "the launch token has %d bytes, at least %d are needed", len(token), MinLaunchToken)
	}
	return sha256.Sum256([]byte("dstack-launch-token/v1:" + token)), nil
}

// decoder reads the members of one object and keeps the first error, so that
// Parse reads as the field table does.
type decoder struct {
	obj    object
	prefix string
	err    error
}

func kind(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case bool:
		return "a boolean"
	case string:
		return "a string"
	case number:
		return "a number"
	case []any:
		return "an array"
	}
	return "an object"
}

func isString(v any) bool { _, ok := v.(string); return ok }

func fieldError(field, format string, args ...any) error {
	return fault.New("manifest_field", "manifest field %s: %s", field, fmt.Sprintf(format, args...))
}

func (d *decoder) fail(field, format string, args ...any) {
	if d.err == nil {
		d.err = fieldError(d.prefix+field, format, args...)
	}
}

func (d *decoder) requiredString(field string) string {
	v, ok := d.obj[field]
	if !ok {
		d.fail(field, "is missing")
		return ""
	}
	s, ok := v.(string)
	if !ok {
		d.fail(field, "must be a string, not %s", kind(v))
	}
	return s
}

// optionalString also takes null, which means absent.
func (d *decoder) optionalString(field string) string {
	if d.obj[field] == nil {
		return ""
	}
	return d.requiredString(field)
}

func (d *decoder) boolean(field string, absent bool) bool {
	v, ok := d.obj[field]
	if !ok {
		return absent
	}
	b, ok := v.(bool)
	if !ok {
		d.fail(field, "must be true or false, not %s", kind(v))
		return absent
	}
	return b
}

func (d *decoder) strings(field string) []string {
	v, ok := d.obj[field]
	if !ok {
		return nil
	}
	a, ok := v.([]any)
	if !ok {
		d.fail(field, "must be an array of strings, not %s", kind(v))
		return nil
	}
	out := make([]string, 0, len(a))
	for i, e := range a {
		s, ok := e.(string)
		if !ok {
			d.fail(field, "element %d must be a string, not %s", i, kind(e))
			return nil
		}
		out = append(out, s)
	}
	return out
}

// hex reads hexadecimal text of size bytes; size -1 takes any length up to 4 KiB.
func (d *decoder) hex(field string, size int) []byte {
	s := d.optionalString(field)
	if s == "" && size < 0 {
		return nil
	}
	b, err := hex.DecodeString(s)
	switch {
	case err != nil:
		d.fail(field, "is not hexadecimal")
	case size >= 0 && len(b) != size:
		d.fail(field, "must be %d hexadecimal digits, got %d", 2*size, len(s))
	case len(b) > 4096:
		d.fail(field, "has %d bytes, more than 4096", len(b))
	}
	return b
}

// version takes the numbers 1 and 2, or a canonical positive decimal string.
func (d *decoder) version() int {
	bad := func(format string, args ...any) int {
		if d.err == nil {
			d.err = fault.New("manifest_version", "manifest_version "+format, args...).
				WithFix(`use 2, or "3" (a string) for features of version 3`)
		}
		return 0
	}
	v, ok := d.obj["manifest_version"]
	if !ok {
		return bad("is missing")
	}
	switch v := v.(type) {
	case number:
		if v == "1" || v == "2" {
			return int(v[0] - '0')
		}
		return bad("%s: as a number only 1 and 2 are allowed", clip(string(v)))
	case string:
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil || n == 0 || strconv.FormatUint(n, 10) != v {
			return bad("%q is not a canonical positive decimal number", clip(v))
		}
		return int(n)
	}
	return bad("must be a number or a string, not %s", kind(v))
}

func (d *decoder) initScripts() []string {
	switch v := d.obj["init_script"].(type) {
	case nil:
		return nil
	case string:
		return []string{v}
	case []any:
		if len(v) > MaxInitScripts {
			d.fail("init_script", "has %d scripts, more than %d", len(v), MaxInitScripts)
			return nil
		}
		return d.strings("init_script")
	default:
		d.fail("init_script", "must be a string or an array of strings, not %s", kind(v))
		return nil
	}
}

// uint reads a number written as plain digits: 1e3 and 1.0 are refused, as
// upstream's integer types refuse them.
func (d *decoder) uint(field string, bits int) uint64 {
	v, ok := d.obj[field]
	if !ok {
		d.fail(field, "is missing")
		return 0
	}
	n, ok := v.(number)
	if !ok {
		d.fail(field, "must be a number, not %s", kind(v))
		return 0
	}
	u, err := strconv.ParseUint(string(n), 10, bits)
	if err != nil {
		d.fail(field, "%s is not an integer from 0 to 2^%d-1", clip(string(n)), bits)
	}
	return u
}

// swapSize takes a number of bytes, or a string with a binary suffix: "1G".
func (d *decoder) swapSize() uint64 {
	v, ok := d.obj["swap_size"]
	if !ok {
		return 0
	}
	s, ok := v.(string)
	if !ok {
		return d.uint("swap_size", 64)
	}
	text, shift := s, 0
	if n := len(s); n > 0 {
		if i := strings.IndexByte("KMGT", s[n-1]&^0x20); i >= 0 && (s[n-1]|0x20 >= 'a') {
			text, shift = s[:n-1], 10*(i+1)
		}
	}
	u, err := strconv.ParseUint(text, 10, 64)
	if err != nil || text[0] == '+' || u > (1<<64-1)>>shift {
		d.fail("swap_size", "%q is not a size such as 1073741824 or \"1G\"", clip(s))
		return 0
	}
	return u << shift
}

func (d *decoder) eventLogVersion() int {
	v, ok := d.obj["event_log_version"]
	if !ok {
		return 1
	}
	switch v {
	case number("1"):
		return 1
	case number("2"):
		return 2
	}
	d.fail("event_log_version", "must be 1 or 2")
	return 0
}

func (d *decoder) portPolicy() (p PortPolicy) {
	v, ok := d.obj["port_policy"]
	if !ok {
		return p
	}
	obj, ok := v.(object)
	if !ok {
		d.fail("port_policy", "must be an object, not %s", kind(v))
		return p
	}
	in := &decoder{obj: obj, prefix: "port_policy."}
	p.RestrictMode = in.boolean("restrict_mode", false)
	for i, e := range in.objects("ports") {
		port := &decoder{obj: e, prefix: fmt.Sprintf("port_policy.ports[%d].", i)}
		entry := Port{Port: uint16(port.uint("port", 16)), PP: port.boolean("pp", false), TLS: port.optionalString("tls")}
		if entry.TLS != "" && entry.TLS != TLSApp && entry.TLS != TLSGateway {
			port.fail("tls", "must be app or gateway")
		}
		p.Ports = append(p.Ports, entry)
		in.merge(port)
	}
	d.merge(in)
	return p
}

func (d *decoder) merge(in *decoder) {
	if d.err == nil {
		d.err = in.err
	}
}

func (d *decoder) objects(field string) []object {
	v, ok := d.obj[field]
	if !ok {
		return nil
	}
	a, ok := v.([]any)
	if !ok {
		d.fail(field, "must be an array of objects, not %s", kind(v))
		return nil
	}
	out := make([]object, 0, len(a))
	for i, e := range a {
		o, ok := e.(object)
		if !ok {
			d.fail(field, "element %d must be an object, not %s", i, kind(e))
			return nil
		}
		out = append(out, o)
	}
	return out
}

// only refuses members that are not listed.
func (d *decoder) only(fields ...string) {
	for k := range d.obj {
		known := false
		for _, f := range fields {
			known = known || k == f
		}
		if !known && d.err == nil {
			d.err = fault.New("manifest_unknown_field", "manifest field %s%s is not known: a demand that is not understood cannot be met", d.prefix, clip(k)).
				WithFix("remove it, or correct its spelling; known here: %s", strings.Join(fields, ", "))
		}
	}
}

func (d *decoder) requirements() *Requirements {
	v, ok := d.obj["requirements"]
	if !ok || v == nil {
		return nil
	}
	obj, ok := v.(object)
	if !ok {
		d.fail("requirements", "must be an object, not %s", kind(v))
		return nil
	}
	in := &decoder{obj: obj, prefix: "requirements."}
	in.only("os_version", "platforms", "tdx_measure_acpi_tables", "launch_token_hash", "gpu_policy")
	r := &Requirements{gpuPolicy: object{}, GPUPolicy: GPUPolicy{AttestGPU: true}}
	r.OSVersion = in.optionalString("os_version")
	if isString(obj["os_version"]) {
		if _, err := parseVersionReq(r.OSVersion); err != nil {
			in.fail("os_version", "%v", err)
		}
	}
	if obj["platforms"] != nil {
		r.HasPlatforms = true
		r.Platforms = in.strings("platforms")
		for _, p := range r.Platforms {
			if !platforms[p] {
				in.fail("platforms", "%q is not a known platform", clip(p))
			}
		}
	}
	if obj["tdx_measure_acpi_tables"] != nil {
		b := in.boolean("tdx_measure_acpi_tables", false)
		r.TDXMeasureACPITables = &b
	}
	if obj["launch_token_hash"] != nil {
		r.LaunchTokenHash = in.hex("launch_token_hash", 32)
	}
	if g, ok := obj["gpu_policy"]; ok && g != nil {
		gobj, ok := g.(object)
		if !ok {
			in.fail("gpu_policy", "must be an object, not %s", kind(g))
		}
		gpu := &decoder{obj: gobj, prefix: "requirements.gpu_policy."}
		gpu.only("attest_gpu", "rego", "allow_devtools", "allow_debug", "allow_insecure_boot")
		r.GPUPolicy = GPUPolicy{
			AttestGPU:         gpu.boolean("attest_gpu", true),
			Rego:              gpu.optionalString("rego"),
			AllowDevtools:     gpu.boolean("allow_devtools", false),
			AllowDebug:        gpu.boolean("allow_debug", false),
			AllowInsecureBoot: gpu.boolean("allow_insecure_boot", false),
		}
		r.gpuPolicy = gobj
		in.merge(gpu)
	}
	d.merge(in)
	return r
}

func (d *decoder) verityVolumes() []VerityVolume {
	var out []VerityVolume
	seen := map[string]bool{}
	for i, obj := range d.objects("verity_volumes") {
		in := &decoder{obj: obj, prefix: fmt.Sprintf("verity_volumes[%d].", i)}
		v := VerityVolume{Source: in.requiredString("source"), Target: in.requiredString("target")}
		if in.requiredString("verity_root") == "" {
			in.fail("verity_root", "must be 64 hexadecimal digits")
		}
		copy(v.Root[:], in.hex("verity_root", 32))
		switch {
		case !path.IsAbs(v.Target) || strings.ContainsRune(v.Target, 0):
			in.fail("target", "%q is not an absolute path", clip(v.Target))
		case seen[path.Clean(v.Target)]:
			in.fail("target", "%q is used twice", clip(v.Target))
		}
		seen[path.Clean(v.Target)] = true
		d.merge(in)
		out = append(out, v)
	}
	return out
}

// imageLock is ours: it maps the reference that the compose file uses to the
// digest of the image manifest (or index) that was reviewed.
func (d *decoder) imageLock() map[string]string {
	v, ok := d.obj["image_lock"]
	if !ok || v == nil {
		return nil
	}
	obj, ok := v.(object)
	if !ok {
		d.fail("image_lock", "must be an object, not %s", kind(v))
		return nil
	}
	out := make(map[string]string, len(obj))
	for ref, v := range obj {
		digest, ok := v.(string)
		if !ok || !IsDigest(digest) {
			d.fail("image_lock", "the image %q must map to sha256:<64 lowercase hexadecimal digits>", clip(ref))
			return nil
		}
		if ref == "" {
			d.fail("image_lock", "has an empty image reference")
			return nil
		}
		out[ref] = digest
	}
	return out
}

// isService reports whether a compose file may call a service so (compose
// specification, §services): letters, digits, '.', '_' and '-', not first.
func isService(name string) bool {
	for i, c := range []byte(name) {
		alnum := c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'z'
		if !alnum && (i == 0 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return name != "" && len(name) <= 128
}

// keyScopes is ours: which of the app's keys a service may ask for.
func (d *decoder) keyScopes() map[string][]string {
	v, ok := d.obj["key_scopes"]
	if !ok || v == nil {
		return nil
	}
	obj, ok := v.(object)
	if !ok {
		d.fail("key_scopes", "must be an object, not %s", kind(v))
		return nil
	}
	if len(obj) > MaxKeyScopes {
		d.fail("key_scopes", "has %d services, more than %d", len(obj), MaxKeyScopes)
		return nil
	}
	in := &decoder{obj: obj, prefix: "key_scopes."}
	out := make(map[string][]string, len(obj))
	for name := range obj {
		if !isService(name) {
			d.fail("key_scopes", "%q is not the name of a service", clip(name))
			return nil
		}
		out[name] = in.strings(name)
		if len(out[name]) > MaxKeyScopes {
			in.fail(name, "has %d paths, more than %d", len(out[name]), MaxKeyScopes)
		}
	}
	d.merge(in)
	return out
}

// timeServers is ours: whom the guest asks for the time instead of the image's list.
func (d *decoder) timeServers() []TimeServer {
	var out []TimeServer
	seen := map[string]bool{}
	for i, obj := range d.objects("time_servers") {
		in := &decoder{obj: obj, prefix: fmt.Sprintf("time_servers[%d].", i)}
		in.only("host", "ca_cert")
		s := TimeServer{Host: in.requiredString("host"), CACert: in.optionalString("ca_cert")}
		host, port, err := net.SplitHostPort(s.Host)
		switch n, perr := strconv.ParseUint(port, 10, 16); {
		case in.err != nil:
		case err != nil || perr != nil || n == 0 || host == "":
			in.fail("host", "%q is not name:port", clip(s.Host))
		case seen[s.Host]:
			in.fail("host", "%q is listed twice: it would count twice", clip(s.Host))
		}
		seen[s.Host] = true
		d.merge(in)
		out = append(out, s)
	}
	if _, ok := d.obj["time_servers"]; ok && (len(out) < MinTimeServers || len(out) > MaxTimeServers) {
		d.fail("time_servers", "has %d servers; %d to %d are needed, so that one which lies is outvoted", len(out), MinTimeServers, MaxTimeServers)
	}
	return out
}

// envSigners is ours: who may write the app's environment.
func (d *decoder) envSigners() [][]byte {
	texts := d.strings("env_signers")
	if _, ok := d.obj["env_signers"]; ok && len(texts) == 0 || len(texts) > MaxEnvSigners {
		// An empty list would read as "nobody may" and work as "anybody may".
		d.fail("env_signers", "has %d keys, not 1 to %d", len(texts), MaxEnvSigners)
		return nil
	}
	var out [][]byte
	for i, text := range texts {
		b, err := hex.DecodeString(text)
		if err != nil || len(b) != 32 {
			d.fail("env_signers", "element %d is not an Ed25519 public key of 64 hexadecimal digits", i)
			return nil
		}
		out = append(out, b)
	}
	return out
}

// IsDigest reports whether s is "sha256:" and exactly 64 lowercase hexadecimal digits.
func IsDigest(s string) bool {
	h, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(h) != 64 {
		return false
	}
	for i := 0; i < len(h); i++ {
		if c := h[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
