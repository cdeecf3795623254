// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"net"
	"os"
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
	"github.com/dstack-go/dstack/guest/keyprovider"
	"github.com/dstack-go/dstack/guest/modules"
	"github.com/dstack-go/dstack/guest/script"
	"github.com/dstack-go/dstack/guest/tunnel"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
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
	volume    *disk.Volume // nil: the data disk does not outlive the boot
	swap      *disk.Swap
	remembers string            // directory of the data disk for what outlives the boot
	variables map[string]string // the decrypted environment, for the compose file
	layers    layers            // of the measured command line

	imageHash []byte            // of the OS image, by the KMS; empty: no KMS
	grant     keyprovider.Grant // less the keys
	kms       keyprovider.Provider

	tunnel      *tunnel.Tunnel // nil: none to gateways
	gatewayURLs []string
	agent       *agentKeeper
	scriptRoom  *script.Room // nil: the manifest has no scripts
	engine      *engine.Engine
	gates       *engine.Gates // nil: no earlier boot left anything
	compose     *engine.Compose
	restarts    int64              // ends of the engine before compose began
	stopWatch   context.CancelFunc // nil: nobody watches the app
	shutdowns   chan string        // reasons

	statusMu sync.Mutex
	status   initrpc.Status
	health   string // JSON, empty before the first report
}

// secrets are the keys in init's memory.
type secrets struct {
	mu         sync.Mutex
	app        *keys.AppKeys // from the key provider
	channelKey []byte        // PKCS#8 DER
}

// Wipe overwrites every key.
func (s *secrets) Wipe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.app != nil {
		s.app.Wipe()
	}
	clear(s.channelKey)
	s.channelKey = nil
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
		{Name: "release-log", Limit: releaseLogLimit, Run: m.releaseLog},
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
	// Those that the way to the root needs; the others lie in the root.
	if err := m.loadModules(); err != nil {
		return err
	}
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
	if err := smallMachine("/sys", "/proc", uint64(info.Totalram)*uint64(info.Unit)); err != nil {
		return err
	}
	return applySysctls("/proc", hardening)
}

func (m *Machine) openRoot(context.Context) error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	if m.layers, err = openRoot(string(cmdline), m.finder, m.mapper); err != nil {
		return err
	}
	if err := switchRoot(); err != nil {
		return err
	}
	if err := m.loadModules(); err != nil {
		return err
	}
	return modules.Seal("/proc")
}

// loadModules loads what the initramfs or, after the switch, the root has; nothing
// on an image with the project's own kernel.
func (m *Machine) loadModules() error {
	n, err := modules.Load(modules.Dir)
	if n > 0 {
		m.console.Log(fmt.Sprintf("modules: %d loaded", n))
	}
	return err
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
	if err := Supported(m.manifest, m.tee.Kind(), readOSRelease("/etc/os-release")["VERSION_ID"]); err != nil {
		return err
	}
	if m.sysConfig, err = hostshare.ParseSysConfig(m.files[hostshare.SysConfigName]); err != nil {
		return err
	}
	if err := launchToken(m.manifest, m.files[hostshare.UserConfigName]); err != nil {
		return err
	}
	if err := acpiVariant(m.manifest, m.sysConfig.VMConfig); err != nil {
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

// ingress binds the agent's sockets, behind which it starts, and lets in what the measured
// manifest allows.
func (m *Machine) ingress(context.Context) error {
	var err error
	if m.gatewayURLs = m.gateways(); len(m.gatewayURLs) > 0 {
		// Without a route through gateways the app runs all the same: they can be away, too.
		if m.tunnel, err = tunnel.Open(); err != nil {
			m.console.Log(fmt.Sprintf("gateway: no tunnel: %v", err))
			m.host.Notify(eventGateway, oneLine(truncate(err.Error(), 1024)))
		}
	}
	if m.agent, err = startAgent(m); err != nil {
		return fault.Wrap(err, "agent_start", "start the guest agent")
	}
	if err := firewall.Open(m.ingressPolicy(&initrpc.TunnelChange{})); err != nil {
		return fault.Wrap(err, "firewall_failed", "open the firewall")
	}
	m.keepTime()
	return nil
}

// gateways are where the app's gateways may be; none unless the manifest asks for them and
// says by which evidence they are known.
func (m *Machine) gateways() []string {
	if !m.manifest.GatewayWanted() {
		return nil
	}
	switch urls := m.sysConfig.GatewayURLs; {
	case m.manifest.GatewayPolicy == nil:
		m.console.Log("gateway: the manifest has no gateway_policy, so that no gateway can be known; the app has the ports of its VM only")
		return nil
	case len(urls) == 0:
		m.console.Log("gateway: the host names none; the app has the ports of its VM only")
		return nil
	default:
		return urls[:min(len(urls), initrpc.MaxPeers)]
	}
}

// ingressPolicy is what the measured manifest lets in, with the gateways of a tunnel.
func (m *Machine) ingressPolicy(c *initrpc.TunnelChange) firewall.Policy {
	policy := firewall.Policy{AnyPort: !m.manifest.PortPolicy.RestrictMode}
	for _, p := range m.manifest.PortPolicy.Ports {
		policy.Ports = append(policy.Ports, p.Port)
	}
	if m.tunnel != nil {
		policy.Tunnel = &firewall.Tunnel{Interface: tunnel.Name, Port: tunnel.Port, TLSPort: manifest.TLSPort}
		for _, p := range c.Peers {
			policy.Tunnel.Gateways = append(policy.Tunnel.Gateways, p.Address)
			policy.Tunnel.Endpoints = append(policy.Tunnel.Endpoints, p.Endpoint)
		}
	}
	return policy
}

// done watches over the app from now on.
func (m *Machine) done(context.Context) error {
	m.logMemory("app-up")
	m.watch()
	m.statusMu.Lock()
	m.status.Ready = true
	m.statusMu.Unlock()
	return nil
}
