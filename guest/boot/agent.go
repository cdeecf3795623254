// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/guest/engine"
	"github.com/dstack-go/dstack/guest/firewall"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// agentUser is the uid and gid of the agent (design.md §3, "Privilege").
const agentUser = 990

// Sockets of the agent, bound by init.
const (
	dstackSocket   = "/run/dstack.sock"
	tappdSocket    = "/run/tappd.sock"
	guestAPISocket = "/run/dstack/guestapi.sock"
)

// socketLinks are further names by which upstream's apps know the first socket;
// /var/run is /run in the image.
var socketLinks = map[string]string{"/run/dstack/dstack.sock": "../dstack.sock"}

// agentKeeper keeps the agent running.
type agentKeeper struct {
	m         *Machine
	config    *initrpc.Config
	listeners map[string]*os.File
	stop      context.CancelFunc
	stopped   chan struct{}

	wanted *os.File // reads the end of the file once the agent shall start
	want   *os.File // its other end, closed by Start

	once  sync.Once
	ready chan struct{}
}

// startAgent binds the agent's sockets, so that clients can connect from here on. The
// agent starts behind them with the first client or with Start: on one CPU it would
// take time from the engine that an app without questions gains nothing from.
func startAgent(m *Machine) (*agentKeeper, error) {
	release := readOSRelease("/etc/os-release")
	m.secrets.mu.Lock()
	key := slices.Clone(m.secrets.channelKey)
	m.secrets.mu.Unlock()
	// Not the disk's key nor the environment's: the agent has no use for them. Its copy
	// is wiped with the configuration, since an agent that crashes gets it again.
	appKeys, err := m.appKeys().ForAgent().Encode()
	if err != nil {
		return nil, err
	}
	a := &agentKeeper{
		m: m, stopped: make(chan struct{}), ready: make(chan struct{}), listeners: map[string]*os.File{},
		config: &initrpc.Config{
			Version: m.opt.Version, Revision: m.opt.Revision, TEE: m.tee.Kind(),
			IsDev:    m.development(),
			Manifest: m.manifest.Raw, SysConfig: m.files[hostshare.SysConfigName], VMConfig: m.sysConfig.VMConfig,
			Events: m.log.Log(), ChannelKey: key, AppKeys: appKeys, Scopes: m.manifest.KeyScopes,
			DataDisks: []string{"/", persistent},
			KMSURLs:   m.sysConfig.KMSURLs, PCCSURL: m.sysConfig.PCCS(),
			GatewayURLs: m.gatewayURLs,
		},
	}
	if l := m.grant.Lease; l != nil {
		a.config.Lease, a.config.LeaseSignature = l.Document, l.Signature
	}
	if v := release["VERSION_ID"]; v != "" {
		a.config.Version = v
	}
	if a.wanted, a.want, err = os.Pipe(); err != nil {
		return nil, err
	}
	if err := a.listen(); err != nil {
		a.Start()
		a.close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	a.stop = cancel
	go a.run(ctx)
	return a, nil
}

func (a *agentKeeper) listen() error {
	if err := os.MkdirAll(filepath.Dir(guestAPISocket), 0o755); err != nil {
		return err
	}
	for name, path := range map[string]string{initrpc.ListenDstack: dstackSocket, initrpc.ListenTappd: tappdSocket, initrpc.ListenGuestAPI: guestAPISocket} {
		f, err := initrpc.ListenUnix(path)
		if err != nil {
			return err
		}
		a.listeners[name] = f
	}
	for service := range a.m.manifest.KeyScopes {
		dir := filepath.Join(engine.ScopesDir, service)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		f, err := initrpc.ListenUnix(filepath.Join(dir, engine.ScopedSocket))
		if err != nil {
			return err
		}
		a.listeners[initrpc.ListenScope+service] = f
	}
	// The host's door is init's to open, not a container's.
	if err := os.Chmod(guestAPISocket, 0o600); err != nil {
		return err
	}
	for link, target := range socketLinks {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	tcp, err := net.Listen("tcp", fmt.Sprintf(":%d", firewall.AgentPort))
	if err != nil {
		return err
	}
	defer tcp.Close()
	if a.listeners[initrpc.ListenExternal], err = tcp.(*net.TCPListener).File(); err != nil {
		return err
	}
	if a.m.tunnel != nil {
		l, err := net.Listen("tcp4", fmt.Sprintf(":%d", manifest.TLSPort))
		if err != nil {
			return err
		}
		defer l.Close()
		if a.listeners[initrpc.ListenTunnel], err = l.(*net.TCPListener).File(); err != nil {
			return err
		}
	}
	if link := a.m.hostlink(); link != nil {
		l, err := link.Listen("guestapi")
		if err != nil {
			return fmt.Errorf("listen for the host's calls: %w", err)
		}
		go proxyTo(l, guestAPISocket)
	}
	return nil
}

func (a *agentKeeper) close() {
	for _, f := range a.listeners {
		f.Close()
	}
	a.wanted.Close()
	a.config.Wipe()
}

// Start starts the agent if no client has yet. It may be called again.
func (a *agentKeeper) Start() { _ = a.want.Close() }

// awaitClient returns when a client has connected to one of the sockets, or after
// Start.
func (a *agentKeeper) awaitClient() {
	var fds []unix.PollFd
	for _, f := range append(slices.Collect(maps.Values(a.listeners)), a.wanted) {
		// Not Fd, which would make the socket block for everyone who has it.
		c, err := f.SyscallConn()
		if err != nil {
			return
		}
		if c.Control(func(fd uintptr) { fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}) }) != nil {
			return
		}
	}
	for {
		// Anything but an interruption is a reason to start: an agent too early costs
		// a second, an agent that never comes costs the app.
		if _, err := unix.Poll(fds, -1); err != unix.EINTR {
			return
		}
	}
}

// proxyTo hands each connection of l to the unix socket at path.
func proxyTo(l net.Listener, path string) {
	for {
		from, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer from.Close()
			to, err := net.DialTimeout("unix", path, 5*time.Second)
			if err != nil {
				return
			}
			defer to.Close()
			done := make(chan struct{}, 2)
			for _, pair := range [][2]net.Conn{{from, to}, {to, from}} {
				go func() {
					_, _ = io.Copy(pair[0], pair[1])
					done <- struct{}{}
				}()
			}
			<-done // one side is over; requests are answered whole, so both are
		}()
	}
}

// run starts the agent again with back-off whenever it ends.
func (a *agentKeeper) run(ctx context.Context) {
	defer close(a.stopped)
	defer a.close()
	a.awaitClient()
	for n := 0; ctx.Err() == nil; n++ {
		begin := time.Now()
		err := a.runOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begin) > time.Minute {
			n = 0
		}
		wait := supervise.Backoff(n)
		a.m.console.Log(fmt.Sprintf("agent: %v; starting it again in %s", err, wait))
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// runOnce runs the agent until it ends.
func (a *agentKeeper) runOnce(ctx context.Context) error {
	tail := supervise.NewTail(8 << 10)
	limit := &ration{n: 50, interval: time.Second}
	tail.Line = func(line string) {
		if ok, dropped := limit.allow(time.Now()); ok {
			if dropped > 0 {
				line = fmt.Sprintf("(%d lines dropped) %s", dropped, line)
			}
			a.m.console.Log("agent: " + line)
		}
	}
	a.config.Events = a.m.log.Log() // with what the app added since the last start
	p, err := initrpc.Spawn(ctx, initrpc.SpawnOptions{
		Path: "/proc/self/exe", Args: []string{"agent"}, UID: agentUser, GID: agentUser,
		Config: a.config, Init: rpcInit{a.m}, Listeners: maps.Clone(a.listeners), Log: tail, Start: a.start,
	})
	if err != nil {
		return err
	}
	select {
	case <-p.Ready():
		a.once.Do(func() { close(a.ready) })
	case <-p.Done():
	}
	if err = p.Wait(); err == nil {
		err = errors.New("exited")
	}
	return err
}

func (a *agentKeeper) start(cmd *exec.Cmd) (initrpc.Child, error) {
	p, err := a.m.sup.StartCmd(cmd)
	if err != nil {
		return initrpc.Child{}, err
	}
	return initrpc.Child{
		Pid:  p.PID,
		Wait: func() error { <-p.Done(); return p.Err() },
		Kill: func() error { return p.Signal(syscall.SIGKILL, false) },
	}, nil
}

// WaitReady starts the agent and waits until it has served once. Code agent_start.
func (a *agentKeeper) WaitReady(ctx context.Context) error {
	a.Start()
	select {
	case <-a.ready:
		return nil
	case <-ctx.Done():
		return fault.New("agent_start", "the guest agent did not become ready (%v)", context.Cause(ctx))
	}
}

// Stop ends the agent and wipes its configuration.
func (a *agentKeeper) Stop() {
	a.stop()
	a.Start() // a keeper that still waits for a client sees that it is over
	<-a.stopped
}

// rpcInit is what the agent may ask of init.
type rpcInit struct{ m *Machine }

func (i rpcInit) Quote(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	return i.m.tee.Quote(ctx, data)
}

func (i rpcInit) Extend(ctx context.Context, name string, payload []byte) (eventlog.Event, error) {
	return i.m.log.App(ctx, name, payload)
}

func (i rpcInit) Containers(ctx context.Context) ([]initrpc.Container, error) {
	e := i.m.runningEngine()
	if e == nil {
		return nil, fault.New("engine_not_ready", "the container engine is not up yet")
	}
	list, err := e.Containers(ctx)
	if err != nil {
		return nil, err
	}
	var out []initrpc.Container
	for _, c := range list {
		out = append(out, initrpc.Container{
			ID: c.ID, Names: c.Names, Image: c.Image, ImageID: c.ImageID,
			Created: c.Created, State: c.State, Status: c.Status,
		})
	}
	return out, nil
}

func (i rpcInit) Logs(ctx context.Context, r initrpc.LogsRequest) (initrpc.Logs, error) {
	e := i.m.runningEngine()
	if e == nil {
		return initrpc.Logs{}, fault.New("engine_not_ready", "the container engine is not up yet")
	}
	stream, framed, err := e.Output(ctx, r.Container, engine.OutputOptions{
		Since: r.Since, Until: r.Until, Tail: r.Tail, Follow: r.Follow, Timestamps: r.Timestamps,
	})
	if engine.NotFound(err) {
		return initrpc.Logs{}, fault.Wrap(err, "container_unknown", "there is no container %s", r.Container)
	}
	return initrpc.Logs{Framed: framed, Stream: stream}, err
}

func (i rpcInit) Shutdown(_ context.Context, r initrpc.ShutdownRequest) error {
	i.m.RequestShutdown(r.Reason)
	return nil
}

// Lease tells host and console what became of the KMS's lease; once it is lost, the
// manifest may want the app to stop.
func (i rpcInit) Lease(_ context.Context, c initrpc.LeaseChange) error {
	text := leaseLine(c)
	i.m.console.Log(text)
	i.m.host.Notify(eventLease, text)
	if c.State == initrpc.LeaseLost && i.m.manifest.OnLeaseLoss == manifest.OnLeaseLossStop {
		i.m.RequestShutdown(text)
	}
	return nil
}

// Tunnel changes the tunnel and lets its gateways in.
func (i rpcInit) Tunnel(_ context.Context, c initrpc.TunnelChange) (initrpc.TunnelStatus, error) {
	t := i.m.tunnel
	if t == nil {
		return initrpc.TunnelStatus{}, fault.New("tunnel_absent", "this guest has no tunnel: its manifest asks for no gateway, or the host names none")
	}
	if c.Set {
		// The firewall first: what it does not know yet it drops.
		if err := firewall.Open(i.m.ingressPolicy(&c)); err != nil {
			return initrpc.TunnelStatus{}, fault.Wrap(err, "firewall_failed", "open the firewall for the gateways")
		}
		if err := t.Set(c); err != nil {
			return initrpc.TunnelStatus{}, fault.Wrap(err, "tunnel_failed", "set up the tunnel")
		}
		i.m.console.Log(fmt.Sprintf("gateway: %d in the tunnel, this guest is %v", len(c.Peers), c.Addresses))
	}
	return t.Status()
}

// leaseLine says it on one line; lost is what has a code.
func leaseLine(c initrpc.LeaseChange) string {
	text := fmt.Sprintf("lease_%s: the KMS's lease until %s", c.State, c.Until.UTC().Format(time.RFC3339))
	if c.Reason != "" {
		text += ": " + c.Reason
	}
	return oneLine(truncate(text, 1024))
}

func (i rpcInit) Status(context.Context) (initrpc.Status, error) {
	i.m.statusMu.Lock()
	defer i.m.statusMu.Unlock()
	status := i.m.status
	status.Health = i.m.health
	return status, nil
}

// readOSRelease reads KEY=VALUE lines; a file that is not there has none.
func readOSRelease(path string) map[string]string {
	values := map[string]string{}
	text, err := os.ReadFile(path)
	if err != nil {
		return values
	}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			values[key] = strings.Trim(value, `"`)
		}
	}
	return values
}
