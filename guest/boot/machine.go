// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/collect"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/guest/clock"
	"github.com/dstack-go/dstack/guest/disk"
	"github.com/dstack-go/dstack/guest/engine"
	"github.com/dstack-go/dstack/guest/firewall"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// Link is the guest's end of hostlink.
type Link interface {
	Open(ctx context.Context, stream string) (net.Conn, error)
	Listen(stream string) (net.Listener, error)
}

// Options is what the binary decides.
type Options struct {
	// Drivers are the TEEs that this binary knows, in the order they are tried.
	Drivers []collect.Driver
	// Version and Revision of the software, for the agent.
	Version, Revision string
}

// Machine is the guest while it boots and runs. Phases fill it in from top to
// bottom; none reads what a later one sets.
type Machine struct {
	opt     Options
	console *console
	sup     *supervise.Supervisor
	host    *host

	finder *disk.Finder
	mapper *disk.Mapper

	linkMu sync.Mutex
	link   Link // nil: the machine has no hostlink

	linkTried chan struct{} // closed when the phase hostlink is over

	tee       collect.TEE
	files     hostshare.Files
	manifest  *manifest.Manifest
	sysConfig *hostshare.SysConfig
	instance  *hostshare.InstanceInfo
	document  *mrconfig.Document // as the host's blob has it; nil: none
	identity  identity
	log       *recorder
	secrets   secrets
	clock     *clock.Clock // nil: the host's clock is believed

	agent     *agentKeeper
	engine    *engine.Engine
	compose   *engine.Compose
	shutdowns chan string // reasons

	statusMu sync.Mutex
	status   initrpc.Status
}

// secrets are the keys in init's memory.
type secrets struct {
	mu         sync.Mutex
	diskKey    *[disk.CryptKeySize]byte
	channelKey []byte // PKCS#8 DER
}

// Wipe overwrites every key.
func (s *secrets) Wipe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.diskKey != nil {
		clear(s.diskKey[:])
	}
	clear(s.channelKey)
	s.diskKey, s.channelKey = nil, nil
}

// Paths in the guest.
const (
	eventDir   = "/run/log/dstack"
	workDir    = "/dstack"
	persistent = "/persistent"

	dataMapping = "dstack-data"
)

// Phases returns the boot, in order: design.md §3.
func (m *Machine) Phases() []Phase {
	return []Phase{
		{Name: "hostlink", Run: m.openHostlink},
		{Name: "mounts", Run: m.mounts},
		{Name: "open-root", Run: m.openRoot},
		{Name: "entropy", Run: m.entropy},
		{Name: "tee", Run: m.openTEE},
		{Name: "read-blob", Run: m.readBlob},
		{Name: "parse", Run: m.parse},
		{Name: "launch-events", Run: m.launchEvents},
		{Name: "config-document", Run: m.configDocument},
		{Name: "firewall", Run: m.closeFirewall},
		{Name: "network", Run: m.network},
		{Name: "time", Limit: timeLimit, Run: m.time},
		{Name: "key-provider", Progress: "requesting app keys", Run: m.keyProvider},
		{Name: "runtime-events", Run: m.runtimeEvents},
		{Name: "data-disk", Progress: "initializing data disk", Limit: 5 * time.Minute, Run: m.dataDisk},
		{Name: "env", Progress: "data disk ready", Run: m.env},
		{Name: "channel-key", Run: m.channelKey},
		{Name: "system-ready", Run: m.systemReady},
		{Name: "ingress", Run: m.ingress},
		{Name: "scripts", Progress: "init-script", Run: m.scripts},
		{Name: "engine", Progress: "setting up docker", Limit: 5 * time.Minute, Run: m.startEngine},
		{Name: "images", Limit: 30 * time.Minute, Run: m.images},
		{Name: "compose-up", Progress: "starting containers", Limit: time.Hour, Run: m.composeUp},
		{Name: "done", Progress: "done", Run: m.done},
	}
}

// openHostlink connects to the host. A machine without the port boots on until
// something needs the host: it is the TEE that decides whether it may.
func (m *Machine) openHostlink(ctx context.Context) error {
	defer close(m.linkTried)
	if err := mountAll(firstMounts); err != nil {
		return err
	}
	m.console = openConsole()
	link, err := openLink(ctx)
	if err != nil {
		m.console.Log("no hostlink: " + err.Error())
		return nil
	}
	m.linkMu.Lock()
	m.link = link
	m.linkMu.Unlock()
	return nil
}

func (m *Machine) hostlink() Link {
	m.linkMu.Lock()
	defer m.linkMu.Unlock()
	return m.link
}

// dial opens a stream to the host; code hostlink_absent on a machine without one.
func (m *Machine) dial(ctx context.Context, stream string) (net.Conn, error) {
	link := m.hostlink()
	if link == nil {
		return nil, fault.New("hostlink_absent", "this machine has no hostlink port, which %s needs", stream).
			WithFix("start the VM with dstack-vmm, or add the virtio-serial port of hostlink")
	}
	return link.Open(ctx, stream)
}

func (m *Machine) mounts(context.Context) error {
	if err := mountAll(restMounts); err != nil {
		return err
	}
	if err := noCoreDumps(); err != nil {
		return err
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	_ = unix.Sethostname([]byte("dstack"))
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fault.Wrap(err, "mount_failed", "ask for the size of the memory")
	}
	if err := hugePages("/sys", uint64(info.Totalram)*uint64(info.Unit)); err != nil {
		return err
	}
	return applySysctls("/proc", hardening)
}

func (m *Machine) openRoot(context.Context) error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	if err := openRoot(string(cmdline), m.finder, m.mapper); err != nil {
		return err
	}
	return switchRoot()
}

// entropy waits until the kernel's generator is seeded; every key and every
// crypto/rand read after it is good (threats.md D10).
func (m *Machine) entropy(ctx context.Context) error {
	ready := make(chan error, 1)
	go func() {
		var b [1]byte
		_, err := unix.Getrandom(b[:], 0)
		ready <- err
	}()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	select {
	case err := <-ready:
		return err
	case <-ctx.Done():
		return fault.New("entropy_timeout", "the kernel's random generator was not seeded within 30 s").
			WithFix("give the VM a CPU with RDRAND, or a virtio-rng device")
	}
}

func (m *Machine) openTEE(ctx context.Context) error {
	m.logTPM("/sys")
	env := collect.Env{}
	if m.hostlink() != nil {
		env.Dial = m.dial
	}
	tee, err := collect.Open(ctx, env, m.opt.Drivers)
	if err != nil {
		return err
	}
	m.tee = tee
	m.console.Log("tee: " + string(tee.Kind()))
	return nil
}

// readBlob reads the host's blob once; from here on only this copy exists.
func (m *Machine) readBlob(context.Context) error {
	blob, err := m.finder.Disk(hostshare.Serial)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(blob.Path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fault.Wrap(err, "blob_unreadable", "open the host's blob on %s", blob.Name)
	}
	defer f.Close()
	if m.files, err = hostshare.Read(f); err != nil {
		if fault.Code(err) == "" {
			err = fault.Wrap(err, "blob_unreadable", "read the host's blob on %s", blob.Name)
		}
		return err
	}
	return nil
}

func (m *Machine) parse(context.Context) error {
	var err error
	if m.manifest, err = manifest.Parse(m.files[hostshare.AppComposeName]); err != nil {
		return err
	}
	if err = m.manifest.CheckSupported(); err != nil {
		return err
	}
	if err := supported(m.manifest, m.tee.Kind(), readOSRelease("/etc/os-release")["VERSION_ID"]); err != nil {
		return err
	}
	if m.sysConfig, err = hostshare.ParseSysConfig(m.files[hostshare.SysConfigName]); err != nil {
		return err
	}
	if err := launchToken(m.manifest, m.files[hostshare.UserConfigName]); err != nil {
		return err
	}
	m.instance = &hostshare.InstanceInfo{}
	if text, ok := m.files[hostshare.InstanceInfoName]; ok {
		if m.instance, err = hostshare.ParseInstanceInfo(text); err != nil {
			return err
		}
	}
	if text := m.sysConfig.ConfigDocument(); text != "" {
		// Whether it is the committed one is checked in config-document; a text
		// that is no document pins nothing here and fails there.
		if doc, err := mrconfig.Parse([]byte(text)); err == nil {
			m.document = &doc
		}
	}
	return nil
}

// launchEvents measures what is to run, up to boot-mr-done.
func (m *Machine) launchEvents(ctx context.Context) error {
	var boot []eventlog.Event
	if l, ok := m.tee.(collect.Logger); ok {
		var err error
		if boot, err = l.BootLog(ctx); err != nil {
			return fault.Wrap(err, "boot_log", "read the log of the launch")
		}
	}
	var err error
	if m.log, err = newRecorder(eventDir, m.manifest.EventLogVersion, m.tee, boot); err != nil {
		return err
	}
	if m.identity, err = newIdentity(m.manifest, m.instance, m.document, fillRandom); err != nil {
		return err
	}
	id, gpu := m.identity, m.manifest.GPUPolicyHash()
	events := []struct {
		name    string
		payload []byte
	}{
		{eventlog.SystemPreparing, nil},
		{eventlog.AppIDEvent, id.appID[:]},
		{eventlog.ComposeHashEvent, id.composeHash[:]},
	}
	for _, h := range m.manifest.InitScriptHashes() {
		events = append(events, struct {
			name    string
			payload []byte
		}{eventlog.InitScriptHash, h})
	}
	events = append(events, []struct {
		name    string
		payload []byte
	}{
		{eventlog.GPUPolicyHash, gpu[:]},
		{eventlog.InstanceIDEvent, id.instanceID},
		{eventlog.BootMRDone, nil},
	}...)
	for _, e := range events {
		if err := m.log.System(ctx, e.name, e.payload); err != nil {
			return err
		}
	}
	return nil
}

func fillRandom(b []byte) error {
	_, err := rand.Read(b)
	return err
}

// configDocument compares the launch commitment that the TEE vouches for with
// the guest's own reading.
func (m *Machine) configDocument(ctx context.Context) error {
	if m.tee.Kind() != dstack.TDX {
		return fault.New("tee_unsupported", "the launch commitment of a %s cannot be checked yet", m.tee.Kind())
	}
	raw, err := m.tee.Quote(ctx, dstack.ReportData{})
	if err != nil {
		return fault.Wrap(err, "quote_failed", "get a quote")
	}
	quote, err := tdx.ParseQuote(raw)
	if err != nil {
		return err
	}
	return checkConfigID(quote.Body().MRConfigID, m.sysConfig.ConfigDocument(), m.manifest, m.identity)
}

func (m *Machine) closeFirewall(context.Context) error {
	if err := firewall.Closed(); err != nil {
		return fault.Wrap(err, "firewall_failed", "load the firewall")
	}
	return nil
}

func (m *Machine) network(ctx context.Context) error {
	if err := applySysctls("/proc", networkSettings); err != nil {
		return err
	}
	what, err := bringUp(ctx, "/sys", m.sysConfig.Network)
	if err != nil {
		return err
	}
	m.console.Log("network: " + what)
	return nil
}

func (m *Machine) keyProvider(context.Context) error {
	if kind := m.manifest.KeyProviderKind(); kind != manifest.KeyProviderNone {
		return fault.New("key_provider_unavailable", "the manifest asks for the key provider %s, which this image does not have yet", kind).
			WithFix(`use the key provider "none"; its data disk does not outlive a reboot`)
	}
	key := new([disk.CryptKeySize]byte)
	if err := fillRandom(key[:]); err != nil {
		return err
	}
	m.secrets.mu.Lock()
	m.secrets.diskKey = key
	m.secrets.mu.Unlock()
	return nil
}

func (m *Machine) runtimeEvents(ctx context.Context) error {
	// Field order and compactness are measured (spec/attestation.md §5.4).
	if err := m.log.System(ctx, eventlog.KeyProvider, []byte(`{"name":"none","id":""}`)); err != nil {
		return err
	}
	return m.log.System(ctx, eventlog.StorageFS, []byte("ext4"))
}

// dataDisk maps the data disk under the key and makes a file system on it. With a
// fresh key whatever was there before is noise, so it is made anew each boot.
func (m *Machine) dataDisk(ctx context.Context) error {
	dev, err := m.finder.Disk(disk.SerialData)
	if err != nil {
		return err
	}
	m.secrets.mu.Lock()
	key := m.secrets.diskKey
	m.secrets.mu.Unlock()
	node, err := m.mapper.OpenCrypt(dataMapping, dev.Path, dev.Size, key)
	if err != nil {
		return fault.Wrap(err, "data_disk", "encrypt the data disk %s", dev.Name)
	}
	clear(key[:]) // the kernel has it now, and nobody else needs it
	args := disk.Mke2fsArgs("/usr/bin/mke2fs", node)
	if err := m.sup.Run(ctx, supervise.Command{Path: args[0], Args: args, Env: []string{"PATH=/usr/bin"}}); err != nil {
		return fault.Wrap(err, "data_disk", "make a file system on the data disk")
	}
	// Not nosuid: container images, whose files live here, have set-user-id
	// programs. nodev, since device nodes of containers are on their own tmpfs. No
	// barriers, no lazy initialisation: the content dies with the boot.
	if err := unix.Mount(node, persistent, "ext4", nodev|unix.MS_NOATIME, "nobarrier,noinit_itable"); err != nil {
		return fault.Wrap(err, "data_disk", "mount the data disk")
	}
	// The root is read-only; its empty /var/lib shows the disk's.
	for _, dir := range []string{"/var/lib/docker", "/var/lib/containerd"} {
		if err := os.MkdirAll(filepath.Join(persistent, dir), 0o710); err != nil {
			return fault.Wrap(err, "data_disk", "make %s", dir)
		}
	}
	if err := unix.Mount(filepath.Join(persistent, "/var/lib"), "/var/lib", "", unix.MS_BIND, ""); err != nil {
		return fault.Wrap(err, "data_disk", "bind /var/lib")
	}
	// The work directory holds what is made anew each boot: RAM.
	if err := unix.Mount("tmpfs", workDir, "tmpfs", nosuid|nodev, "mode=0755"); err != nil {
		return fault.Wrap(err, "data_disk", "mount the work directory")
	}
	if err := os.WriteFile(filepath.Join(workDir, "app-compose.json"), m.manifest.Raw, 0o644); err != nil {
		return err
	}
	if text, ok := m.files[hostshare.UserConfigName]; ok {
		if err := os.WriteFile(filepath.Join(workDir, "user_config"), text, 0o644); err != nil {
			return err
		}
	}
	m.host.Notify(eventInstance, m.instanceInfo())
	return nil
}

// instanceInfo is .instance_info as upstream's host stores it.
func (m *Machine) instanceInfo() string {
	info := hostshare.InstanceInfo{InstanceIDSeed: m.identity.seed, AppID: &m.identity.appID}
	if len(m.identity.instanceID) > 0 {
		id := dstack.InstanceID(m.identity.instanceID)
		info.InstanceID = &id
	}
	text, err := json.Marshal(info)
	if err != nil {
		return "{}"
	}
	return string(text)
}

// env refuses what it could not decrypt: with the key provider none there is no
// key that a client could have encrypted for.
func (m *Machine) env(context.Context) error {
	if len(m.files[hostshare.EncryptedEnvName]) > 0 {
		return fault.New("env_without_key_provider", "there is an encrypted environment, but the key provider none has no key to decrypt it").
			WithFix("deploy without encrypted variables, or with a key provider")
	}
	return nil
}

// channelKey makes the key of the instance's own TLS certificates and commits to
// it before system-ready, so that evidence names the key of the connection.
func (m *Machine) channelKey(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	m.secrets.mu.Lock()
	m.secrets.channelKey = der
	m.secrets.mu.Unlock()
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	sum := sha256.Sum256(spki)
	return m.log.System(ctx, eventlog.SystemChannelKey, sum[:])
}

func (m *Machine) systemReady(ctx context.Context) error {
	return m.log.System(ctx, eventlog.SystemReady, nil)
}

// ingress starts the agent behind its sockets and lets in what the measured
// manifest allows.
func (m *Machine) ingress(context.Context) error {
	var err error
	if m.agent, err = startAgent(m); err != nil {
		return fault.Wrap(err, "agent_start", "start the guest agent")
	}
	policy := firewall.Policy{AnyPort: !m.manifest.PortPolicy.RestrictMode}
	for _, p := range m.manifest.PortPolicy.Ports {
		policy.Ports = append(policy.Ports, p.Port)
	}
	if err := firewall.Open(policy); err != nil {
		return fault.Wrap(err, "firewall_failed", "open the firewall")
	}
	m.keepTime()
	return nil
}

func (m *Machine) scripts(context.Context) error {
	if m.manifest.RunsScripts() {
		return fault.New("scripts_unsupported", "the manifest has scripts, which this image cannot run yet").
			WithFix("move what init_script and pre_launch_script do into a container of the compose file")
	}
	return nil
}

func (m *Machine) startEngine(ctx context.Context) error {
	if err := applySysctls("/proc", forwarding); err != nil {
		return err
	}
	m.logMemory("before-engine")
	cfg := engine.Default()
	cfg.Nosync = true // the data disk dies with its key at power off
	cfg.GCPercent = 400
	e, err := engine.Start(m.sup, cfg, func(daemon string, err error, wait time.Duration) {
		m.console.Log(fmt.Sprintf("%s: %v; starting it again in %s", daemon, err, wait))
	})
	if err != nil {
		return fault.Wrap(err, "engine_start", "start the container engine")
	}
	m.statusMu.Lock()
	m.engine = e
	m.statusMu.Unlock()
	ctx, cancel := context.WithTimeoutCause(ctx, 4*time.Minute, errors.New("no answer for 4 minutes"))
	defer cancel()
	return e.WaitReady(ctx)
}

// images fetches what the manifest locks. With the image policy digest nothing
// else may run: compose never pulls, and an image of the compose file that the
// lock lacks is refused by name.
func (m *Machine) images(ctx context.Context) error {
	if m.manifest.ImagePolicy == manifest.ImagePolicyDigest {
		if err := allLocked(m.manifest); err != nil {
			return err
		}
	}
	if len(m.manifest.ImageLock) == 0 {
		return nil
	}
	registry, err := engine.ServeRegistry(engine.RegistryAddr, func(ctx context.Context) (net.Conn, error) {
		return m.dial(ctx, "registry")
	})
	if err != nil {
		return fault.Wrap(err, "registry_failed", "serve the loopback registry")
	}
	defer registry.Close()
	if m.hostlink() == nil {
		_, err := m.dial(ctx, "registry")
		return err
	}
	return engine.PullLocked(ctx, m.engine, registry.Addr, m.manifest.ImageLock, nil)
}

func (m *Machine) composeUp(ctx context.Context) error {
	m.compose = &engine.Compose{
		Config: m.engine.Config, Dir: workDir, Runner: m.sup,
		NeverPull: m.manifest.ImagePolicy == manifest.ImagePolicyDigest,
		Retries:   engine.DefaultRetries(),
		Report: func(attempt int, err error, wait time.Duration) {
			m.console.Log(fmt.Sprintf("compose up, attempt %d: %v; again in %s", attempt, err, wait))
		},
	}
	if err := m.compose.Write(m.manifest.DockerComposeFile); err != nil {
		return err
	}
	return m.compose.Up(ctx)
}

// done waits for the agent, which has started beside the engine.
func (m *Machine) done(ctx context.Context) error {
	if err := m.agent.WaitReady(ctx); err != nil {
		return err
	}
	m.logMemory("app-up")
	m.statusMu.Lock()
	m.status.Ready = true
	m.statusMu.Unlock()
	return nil
}

// allLocked refuses a compose file with an image that the lock lacks.
func allLocked(m *manifest.Manifest) error {
	refs, err := composeImages(m.DockerComposeFile)
	if err != nil {
		return fault.Wrap(err, "compose_malformed", "the compose file of the manifest")
	}
	var missing []string
	for _, ref := range refs {
		if _, ok := m.ImageLock[ref]; !ok {
			missing = append(missing, ref)
		}
	}
	if len(missing) > 0 {
		return fault.New("image_not_locked", "image_lock of the manifest lacks %s", strings.Join(missing, ", ")).
			WithFix("deploy again with dstack deploy, which locks every image")
	}
	return nil
}
