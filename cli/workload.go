// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/cli/appimage"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/lint"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/osimage"
	"github.com/dstack-go/dstack/stack"
)

// workload is what deploy and upgrade are told about an app. What deploy is not
// told has a default; what upgrade is not told stays as it was.
type workload struct {
	Port         []string          `help:"Publish [ADDR:]HOST:VM[/udp]; by default each port that the compose file publishes, on loopback." placeholder:"H:V" sep:"none"`
	AppImage     map[string]string `help:"Where an image of the compose file comes from: an OCI layout, a docker-save tarball or a static binary." placeholder:"NAME=PATH"`
	Image        string            `help:"OS image of the stack to run on; its only one by default." placeholder:"NAME"`
	VCPU         int               `name:"vcpu" help:"Virtual CPUs; 1 by default." placeholder:"N"`
	Memory       int               `help:"Memory in MiB; 1024 by default." placeholder:"MIB"`
	AllowMutable bool              `help:"Deploy although containers could change what runs (the engine's socket, privileges, the guest's files). The verdict says so."`
	PublicLogs   *bool             `help:"Let anyone read the containers' logs at the agent." negatable:""`
	AppID        string            `name:"app-id" help:"Id of the app; by default it follows from the manifest. Instances with the same id share keys." placeholder:"HEX"`
	Lock         string            `help:"Where to write the lock; by default dstack.lock.json beside the compose file." placeholder:"FILE"`

	KeyProvider string   `help:"Who keeps the app's keys: none (the data disk is new at each boot), local, tpm or kms; by default the stack's KMS, if it has one." enum:",none,local,tpm,kms" default:"" placeholder:"KIND"`
	KMS         []string `name:"kms" help:"URL of the KMS; may be given again." placeholder:"URL" sep:"none"`
	ProviderID  string   `name:"kms-id" aliases:"key-provider-id" help:"Who the key provider must be, in hex: for kms the public key of its root CA (DER), for local the MRENCLAVE of the enclave. It is measured." placeholder:"HEX"`
	NoInstance  *bool    `name:"no-instance-id" help:"All instances of the app share their keys and can open each other's disks." negatable:"instance-id"`
	StorageFS   string   `name:"storage-fs" help:"File system of the data disk: ext4 or xfs." enum:",ext4,xfs" default:"" placeholder:"FS"`
	Swap        string   `help:"Swap on the data disk, such as 1G." placeholder:"SIZE"`

	Env       []string `short:"e" help:"Variable for the compose file, encrypted to the app; without =VALUE its value is taken from this environment, which no other user of the machine sees." placeholder:"KEY[=VALUE]" sep:"none"`
	KMSSigner string   `name:"kms-signer" help:"What the KMS's signing key must be, in hex, 33 bytes: a second check beside --kms-id when variables are encrypted." placeholder:"HEX"`
	EnvFile   []string `help:"File with a variable per line, KEY=VALUE or KEY." placeholder:"FILE" sep:"none"`

	Volume []string `help:"Read-only disk with a file system under dm-verity, mounted at TARGET in the guest, /dstack/volumes/NAME by default; a service gets it as a bind mount." placeholder:"NAME=FILE[:TARGET]" sep:"none"`

	ScriptInit      []string `help:"Shell script to run before the container engine starts; may be given again." placeholder:"FILE" sep:"none"`
	ScriptPreLaunch string   `help:"Shell script to run before the containers start." placeholder:"FILE"`

	SecureTime *bool    `help:"Begin only with authenticated time; by default the host's clock is believed, and the verdict says so." negatable:""`
	TimeServer []string `help:"NTS server to ask, with the authority that certifies it where that is not a public one; three or more. Means --secure-time." placeholder:"HOST:PORT[=CAFILE]" sep:"none"`
	LeaseLoss  string   `name:"on-lease-loss" help:"What happens to containers when the KMS no longer authorises the instance: continue, or stop. It gets no new keys or certificates in either case." enum:",continue,stop" default:"" placeholder:"WHAT"`
	Gateway    string   `help:"Who gives the app a public name: stack (its gateway, if it has one) or none." enum:",stack,none" default:"" placeholder:"WHO"`
	GatewayTLS []uint16 `name:"gateway-tls" help:"Port of the VM whose TLS ends at the gateway, which then sees plaintext; may be given again. TLS of all others ends in the guest." placeholder:"PORT" sep:"none"`
	Domain     []string `help:"Domain of your own that leads to a port of the app, with a certificate for a key of the guest's; may be given again. DNS must lead it to the gateway, and a TXT record to the app." placeholder:"NAME=PORT" sep:"none"`
	KeyScope   []string `help:"Path of a key that a service may ask for, or of a tree of keys when it ends in '/'; may be given again. With any, services get no other keys." placeholder:"SERVICE=PATH" sep:"none"`

	sendFlags // of the app's contract, where a chain governs the stack
}

// previous is an app as it is before an upgrade.
type previous struct {
	info     *vmmpb.VmInfo
	appID    dstack.AppID
	manifest *manifest.Manifest
	ports    []mapping
	attest   int // host port of the agent, 0: none
}

// plan is an app that could be run.
type plan struct {
	text  []byte // of the manifest
	vm    measure.VMConfig
	lock  *lock.Lock
	blobs []appimage.Blob
	disks []volumeFile
	ports []mapping
	kms   []string // where this machine asks

	gateway  *stack.Gateway // nil: the app has no route through one
	governed *stack.Keys    // the stack's KMSs, if the app's keys come from them
	image    policy.Image   // as their policy names it

	env       []variable // nil: none are given
	pin       []byte     // of the KMS's root
	kmsSigner []byte     // nil: whatever the pinned KMS has
	deployer  ed25519.PrivateKey

	send  sendFlags // who owns the app's contract on a chain
	signs *owners   // nil: not asked for yet
}

// close forgets keys.
func (p *plan) close() {
	if p.signs != nil {
		p.signs.close()
	}
}

// plan decides and measures what is to run, and changes nothing.
//
// Codes: compose_*, image_*, port_*, key_provider_*, env_*, script_*, time_server,
// key_scope, custom_domain, volume_malformed, usage, manifest_*.
func (w *workload) plan(a *app, name, composeFile string, compose []byte, was *previous) (*plan, error) {
	if (w.Keystore != "" || w.Signer != "") && !a.stack.GovernedByChain() {
		return nil, usage("--keystore and --signer sign for the app's contract, and no chain governs this stack")
	}
	p := &plan{kms: w.KMS, send: w.sendFlags}
	draft := manifest.Draft{SecureTime: new(bool)}
	image := w.Image
	cpu, mem := uint32(1), uint64(1024)
	var ports []mapping
	if was != nil {
		var err error
		if draft, err = draftOf(was.manifest); err != nil {
			return nil, err
		}
		c := was.info.Configuration
		cpu, mem, ports = c.Vcpu, uint64(c.Memory), was.ports
		if image == "" {
			image = c.Image
		}
		if len(p.kms) == 0 {
			p.kms = c.KmsUrls
		}
	}
	draft.Name, draft.DockerComposeFile, draft.ImagePolicy = name, string(compose), manifest.ImagePolicyDigest
	if w.VCPU < 0 || w.Memory < 0 || w.VCPU > math.MaxInt32 || w.Memory > math.MaxInt32 {
		return nil, usage("--vcpu and --memory cannot be negative")
	}
	if w.VCPU > 0 {
		cpu = uint32(w.VCPU)
	}
	if w.Memory > 0 {
		mem = uint64(w.Memory)
	}
	var err error
	if p.governed, err = w.stackKeys(a, &draft, was); err != nil {
		return nil, err
	}
	if err := w.keys(&draft); err != nil {
		return nil, err
	}
	if p.pin = draft.KeyProviderID; p.governed != nil && !bytes.Equal(p.pin, p.governed.Pin()) {
		p.governed = nil // another KMS is meant
	}
	if p.governed != nil {
		draft.KMSPolicy = p.governed.Policy
	}
	if p.governed != nil && len(w.KMS) == 0 {
		p.kms = nil
		for _, n := range p.governed.Nodes {
			p.kms = append(p.kms, n.URL)
		}
	}
	if p.env, err = w.variables(draft.KeyProvider); err != nil {
		return nil, err
	}
	if p.env != nil {
		if err := w.sealable(a, p, &draft); err != nil {
			return nil, err
		}
	}
	if err := w.settings(&draft); err != nil {
		return nil, err
	}

	if p.gateway, err = w.stackGateway(a, &draft, was); err != nil {
		return nil, err
	}
	if p.disks, err = w.volumes(&draft); err != nil {
		return nil, err
	}

	linted, err := lint.LoadWith(compose, name, lint.Options{AllowedEnvs: draft.AllowedEnvs, AllowMutable: w.AllowMutable})
	if err != nil {
		return nil, err
	}
	for _, f := range linted.Findings {
		a.step("%s %s (%s)", a.paint(amber, f.Level+":"), f.Message, f.Code)
	}
	if err := linted.Err(); err != nil {
		return nil, err
	}
	if err := w.scopes(&draft, linted); err != nil {
		return nil, err
	}
	img, err := w.osImage(a, image)
	if err != nil {
		return nil, err
	}
	if p.ports, err = w.mappings(linted, composeFile, ports); err != nil {
		return nil, err
	}
	draft.ImageLock, p.blobs, err = w.resolve(a, linted, draft.ImageLock)
	if err != nil {
		return nil, err
	}
	if draft.PortPolicy, err = w.portPolicy(p, was); err != nil {
		return nil, err
	}
	if err := w.domains(&draft); err != nil {
		return nil, err
	}
	if p.text, err = manifest.Build(draft); err != nil {
		return nil, err
	}
	m, err := manifest.Parse(p.text)
	if err != nil {
		return nil, fmt.Errorf("the manifest that was built does not parse: %w", err)
	}
	hash := m.Hash()
	// Variables are sealed to one manifest.
	if was != nil && p.env == nil && len(m.EnvSigners) > 0 && hash != was.manifest.Hash() {
		return nil, fault.New("env_again", "the app's variables are sealed to the manifest that it has, and this is another one").
			WithFix("give them again with -e or --env-file, or --no-env to go on without")
	}
	appID := dstack.AppID(hash[:dstack.AppIDSize])
	switch {
	case w.AppID != "":
		if appID, err = dstack.ParseAppID(w.AppID); err != nil {
			return nil, usage("--app-id: %v", err)
		}
		if was != nil && appID != was.appID {
			return nil, fault.New("app_id_fixed", "the app is %s, and stays it: its keys and its disk are that app's", was.appID).WithFix("leave --app-id out, or deploy another app")
		}
	case was != nil:
		appID = was.appID
	}

	p.vm = measure.VMConfig{CPUCount: cpu, MemorySize: mem << 20}
	if draft.KeyProvider == manifest.KeyProviderTPM {
		p.vm.SWTPM = true
		a.step("%s a software TPM, which is for development, changes the ACPI tables: RTMR0 is then not computed (acpi_shape_unsupported)", a.paint(amber, "note:"))
	}
	registers, err := measureImage(img, p.vm)
	if err != nil {
		return nil, err
	}
	if p.governed != nil {
		if err := provable(img, p.vm); err != nil {
			return nil, err
		}
		p.image = policy.Image{Hash: img.Hash, Name: filepath.Base(img.Dir), Dev: img.Metadata.IsDev, Epoch: img.Metadata.SecurityEpoch}
	}
	a.step("measured: compose %s…, image %s…, app id %s", hash.String()[:16], img.Hash.String()[:16], appID)
	shape, err := json.Marshal(p.vm)
	if err != nil {
		return nil, err
	}
	p.lock = &lock.Lock{
		Version: 1, Name: name, ComposeHash: hash, AppID: appID, OSImageHash: img.Hash,
		Image: filepath.Base(img.Dir), VMConfig: shape, TEE: dstack.TDX, Measurements: registers, Images: draft.ImageLock,
		Created: time.Now().UTC().Format(time.RFC3339),
	}
	return p, nil
}

// stackKeys makes the stack's KMS the provider of an app for which nobody names
// another, and returns what the stack has.
func (w *workload) stackKeys(a *app, d *manifest.Draft, was *previous) (*stack.Keys, error) {
	k, err := a.stack.Keys()
	if fault.Code(err) == "kms_absent" {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	kind := w.KeyProvider
	if kind == "" {
		kind = d.KeyProvider
	}
	if kind == "" && was == nil {
		kind = manifest.KeyProviderKMS
	}
	if kind != manifest.KeyProviderKMS {
		return nil, nil
	}
	if w.KeyProvider == "" {
		w.KeyProvider = kind
	}
	if w.ProviderID == "" && len(w.KMS) == 0 && (was == nil || d.KeyProvider != kind) {
		w.ProviderID = k.RootCA
	}
	return k, nil
}

// stackGateway makes the stack's gateway the app's, unless another is meant or none.
func (w *workload) stackGateway(a *app, d *manifest.Draft, was *previous) (*stack.Gateway, error) {
	if w.Gateway == "none" {
		d.GatewayEnabled, d.GatewayPolicy, d.CustomDomains = false, nil, nil
		return nil, nil
	}
	g, err := a.stack.Gateway()
	switch {
	case fault.Code(err) == "gateway_absent" && w.Gateway != "stack":
		return nil, nil
	case err != nil:
		return nil, err
	case w.Gateway == "" && was != nil && !d.GatewayEnabled, d.NoInstanceID:
		return nil, nil // as it was; and without an instance id there is no route
	}
	d.GatewayEnabled, d.GatewayPolicy = true, g.Policy
	return g, nil
}

// portPolicy lets in what is published. Code port_not_published.
func (w *workload) portPolicy(p *plan, was *previous) (*manifest.PortPolicy, error) {
	out := &manifest.PortPolicy{RestrictMode: true}
	open := slices.Clone(w.GatewayTLS)
	if len(open) == 0 && was != nil {
		for _, port := range was.manifest.PortPolicy.Ports {
			if port.TLS == manifest.TLSGateway && slices.ContainsFunc(p.ports, func(m mapping) bool { return m.proto == "tcp" && m.vm == int(port.Port) }) {
				open = append(open, port.Port)
			}
		}
	}
	for _, m := range p.ports {
		port := manifest.Port{Port: uint16(m.vm)}
		switch i := slices.Index(open, port.Port); {
		case p.gateway == nil || m.proto != "tcp":
		case i >= 0:
			port.TLS = manifest.TLSGateway
			open = slices.Delete(open, i, i+1)
		default:
			port.TLS = manifest.TLSApp // the app's plaintext is its own (threats.md C05)
		}
		out.Ports = append(out.Ports, port)
	}
	if p.gateway != nil && len(open) > 0 {
		return nil, fault.New("port_not_published", "--gateway-tls %d: no such TCP port is published", open[0])
	}
	return out, nil
}

// provable makes sure that a KMS will be able to tell from its hash that the image is
// the one that runs. Code memory_not_constant.
func provable(img *osimage.Image, vm measure.VMConfig) error {
	raw, err := readLimited(img.TDXMeasurement(), 1<<20)
	if err != nil {
		return err
	}
	doc, err := measure.ParseTDXDocument(raw)
	if err != nil {
		return err
	}
	_, err = doc.TDX(vm.MemorySize, false)
	return err
}

// allow has the stack's KMSs give keys to the app as it is planned.
func (p *plan) allow(a *app) error {
	if p.governed == nil {
		return nil
	}
	if a.stack.GovernedByChain() {
		return p.allowOnChain(a)
	}
	a.step("allow the app in the stack's policy")
	undelivered, err := a.stack.AllowApp(a.ctx, policy.App{
		AppID: p.lock.AppID, Name: p.lock.Name, ComposeHashes: []policy.Compose{{Hash: p.lock.ComposeHash}}, AnyName: true,
	}, p.image)
	if undelivered != nil {
		a.step("%s %v (%s)", a.paint(amber, "warning:"), undelivered, fault.Code(undelivered))
	}
	return err
}

// keys sets who keeps the keys. The provider is always pinned: without a pin the
// host could put one of its own in its place (design.md §7).
//
// Codes: key_provider_unpinned, key_provider_id, key_provider_unused.
func (w *workload) keys(d *manifest.Draft) error {
	if w.KeyProvider != "" && w.KeyProvider != d.KeyProvider {
		d.KeyProvider, d.KeyProviderID, d.KMSPolicy = w.KeyProvider, nil, nil
	}
	if d.KeyProvider == "" {
		d.KeyProvider = manifest.KeyProviderNone
	}
	if len(w.KMS) > 0 && d.KeyProvider != manifest.KeyProviderKMS {
		return fault.New("key_provider_unused", "--kms is given, but the key provider is %s", d.KeyProvider).WithFix("--key-provider kms")
	}
	for _, u := range w.KMS {
		if !strings.HasPrefix(u, "https://") {
			return usage("--kms wants an https URL, not %q", u)
		}
	}
	pinned := d.KeyProvider == manifest.KeyProviderKMS || d.KeyProvider == manifest.KeyProviderLocal
	if w.ProviderID != "" {
		if !pinned {
			return fault.New("key_provider_unused", "--kms-id is given, but the key provider is %s, which has no identity", d.KeyProvider).WithFix("--key-provider kms")
		}
		id, err := hex.DecodeString(strings.TrimPrefix(w.ProviderID, "0x"))
		if err == nil && d.KeyProvider == manifest.KeyProviderKMS {
			_, err = x509.ParsePKIXPublicKey(id)
		} else if err == nil && len(id) != 32 {
			err = fmt.Errorf("%d bytes, want 32", len(id))
		}
		if err != nil {
			return fault.Wrap(err, "key_provider_id", "--kms-id is not the identity of a key provider of kind %s", d.KeyProvider).
				WithFix("give the DER public key of the KMS's root CA, or the enclave's MRENCLAVE, in hexadecimal")
		}
		d.KeyProviderID = id
	}
	if pinned && len(d.KeyProviderID) == 0 {
		return fault.New("key_provider_unpinned", "nothing says who the key provider must be: whoever answers would get to know the app's keys").
			WithFix("--kms-id HEX with the identity that the provider's operator publishes")
	}
	return nil
}

// settings sets what is neither keys nor compose file.
//
// Codes: script_missing, time_server, usage.
func (w *workload) settings(d *manifest.Draft) error {
	set := func(from *bool, to *bool) {
		if from != nil {
			*to = *from
		}
	}
	set(w.PublicLogs, &d.PublicLogs)
	set(w.NoInstance, &d.NoInstanceID)
	if w.StorageFS != "" {
		d.StorageFS = w.StorageFS
	}
	if w.LeaseLoss != "" {
		d.OnLeaseLoss = w.LeaseLoss
	}
	if w.Swap != "" {
		n, err := parseSize("--swap", w.Swap)
		if err != nil {
			return err
		}
		d.SwapSize = n
	}
	script := func(path string) (string, error) {
		text, err := readLimited(path, 1<<20)
		if err != nil {
			return "", fault.Wrap(err, "script_missing", "read the script %s", path).WithFix("give a shell script of at most 1 MiB")
		}
		return string(text), nil
	}
	if len(w.ScriptInit) > 0 {
		d.InitScripts = nil
		for _, path := range w.ScriptInit {
			text, err := script(path)
			if err != nil {
				return err
			}
			d.InitScripts = append(d.InitScripts, text)
		}
	}
	if w.ScriptPreLaunch != "" {
		var err error
		if d.PreLaunchScript, err = script(w.ScriptPreLaunch); err != nil {
			return err
		}
	}
	if w.SecureTime != nil {
		d.SecureTime = w.SecureTime
	}
	if len(w.TimeServer) > 0 {
		if w.SecureTime != nil && !*w.SecureTime {
			return usage("--time-server means --secure-time")
		}
		d.SecureTime, d.TimeServers = new(true), nil
		for _, text := range w.TimeServer {
			host, ca, hasCA := strings.Cut(text, "=")
			s := manifest.TimeServer{Host: host}
			if _, _, err := net.SplitHostPort(host); err != nil {
				return fault.New("time_server", "%q is not a time server", text).WithFix("write HOST:PORT, such as nts.example:4460, or HOST:PORT=CAFILE")
			}
			if hasCA {
				pem, err := readLimited(ca, 64<<10)
				if err != nil {
					return err
				}
				s.CACert = string(pem)
			}
			d.TimeServers = append(d.TimeServers, s)
		}
		if len(d.TimeServers) < manifest.MinTimeServers {
			return fault.New("time_server", "%d time servers are fewer than %d: one that lies must not decide", len(d.TimeServers), manifest.MinTimeServers).
				WithFix("give more with --time-server, or none to use the OS image's")
		}
	}
	return nil
}

// domains sets the app's own domains. Code custom_domain.
func (w *workload) domains(d *manifest.Draft) error {
	if len(w.Domain) == 0 {
		return nil
	}
	if !d.GatewayEnabled {
		return fault.New("custom_domain", "the app has no gateway, which its domains could lead to").WithFix("run 'dstack up' without --no-gateway, and leave out --no-instance-id")
	}
	d.CustomDomains = nil
	for _, text := range w.Domain {
		name, port, ok := strings.Cut(text, "=")
		n, err := strconv.ParseUint(port, 10, 16)
		if !ok || err != nil || n == 0 {
			return fault.New("custom_domain", "%q is not a domain and a port of the app", text).WithFix("write NAME=PORT, such as shop.example.com=8080")
		}
		d.CustomDomains = append(d.CustomDomains, manifest.CustomDomain{Domain: strings.ToLower(strings.TrimSuffix(name, ".")), Port: uint16(n)})
	}
	return nil
}

// scopes sets which service may ask for which keys. Code: key_scope.
func (w *workload) scopes(d *manifest.Draft, compose *lint.Compose) error {
	if len(w.KeyScope) > 0 {
		d.KeyScopes = map[string][]string{}
	}
	for _, text := range w.KeyScope {
		service, path, ok := strings.Cut(text, "=")
		if !ok || service == "" || path == "" {
			return fault.New("key_scope", "%q is not the scope of a service", text).WithFix("write SERVICE=PATH")
		}
		d.KeyScopes[service] = append(d.KeyScopes[service], path)
	}
	for service := range d.KeyScopes {
		if !slices.ContainsFunc(compose.Services, func(s lint.Service) bool { return s.Name == service }) {
			return fault.New("key_scope", "a key scope is for the service %q, which the compose file does not have", service).
				WithFix("name one of its services with --key-scope SERVICE=PATH")
		}
	}
	return nil
}

// draftOf is the draft that would make a manifest of the same meaning.
func draftOf(m *manifest.Manifest) (manifest.Draft, error) {
	d := manifest.Draft{
		Name: m.Name, Runner: m.Runner, DockerComposeFile: m.DockerComposeFile, BashScript: m.BashScript, Snapshotter: m.Snapshotter,
		InitScripts: m.InitScripts, PreLaunchScript: m.PreLaunchScript, PublicLogs: m.PublicLogs, PublicSysinfo: m.PublicSysinfo,
		KeyProvider: m.KeyProviderKind(), KeyProviderID: m.KeyProviderID, GatewayEnabled: m.GatewayWanted(), AllowedEnvs: m.AllowedEnvs,
		NoInstanceID: m.NoInstanceID, SecureTime: m.SecureTime, StorageFS: m.StorageFS, SwapSize: m.SwapSize,
		PortPolicy: &m.PortPolicy, VerityVolumes: m.VerityVolumes, ImagePolicy: m.ImagePolicy, ImageLock: m.ImageLock,
		KeyScopes: m.KeyScopes, TimeServers: m.TimeServers, EnvSigners: m.EnvSigners, KMSPolicy: m.KMSPolicy, GatewayPolicy: m.GatewayPolicy,
		CustomDomains: m.CustomDomains,
	}
	if m.OnLeaseLoss != manifest.OnLeaseLossContinue {
		d.OnLeaseLoss = m.OnLeaseLoss
	}
	if !m.PublicTCBInfo {
		d.PublicTCBInfo = new(bool)
	}
	if m.EventLogVersion != 1 {
		d.EventLogVersion = m.EventLogVersion
	}
	if m.Requirements != nil { // as written: an explicit default has another hash
		var raw struct {
			Requirements json.RawMessage `json:"requirements"`
		}
		if err := json.Unmarshal(m.Raw, &raw); err != nil {
			return d, err
		}
		d.Requirements = raw.Requirements
	}
	return d, nil
}

// lockFile is where the lock goes.
func (w *workload) lockFile(compose string) string {
	if w.Lock != "" {
		return w.Lock
	}
	return filepath.Join(filepath.Dir(compose), "dstack.lock.json")
}

// store gives the VMM what the app consists of.
func (p *plan) store(a *app) error {
	for _, b := range p.blobs {
		if err := push(a, b); err != nil {
			return err
		}
	}
	for _, d := range p.disks {
		a.step("store volume %s", d.source)
		if err := a.stack.PlaceVolume(d.path, d.source); err != nil {
			return err
		}
	}
	return nil
}

// portMappings are the ports to ask the VMM for, the agent's first.
func (p *plan) portMappings(attest int) []*vmmpb.PortMapping {
	out := []*vmmpb.PortMapping{{Protocol: "tcp", HostAddress: "127.0.0.1", HostPort: uint32(attest), VmPort: agentPort}}
	for _, m := range p.ports {
		out = append(out, &vmmpb.PortMapping{Protocol: m.proto, HostAddress: m.addr, HostPort: uint32(m.host), VmPort: uint32(m.vm)})
	}
	return out
}
