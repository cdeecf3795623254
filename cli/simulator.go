// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/guest/agent"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/manifest"
)

type simulatorCmd struct {
	Socket  string `help:"Path of the socket of the SDKs; in the state directory by default." type:"path" placeholder:"PATH"`
	Tappd   string `help:"Path of the socket of legacy SDKs; in the state directory by default." type:"path" placeholder:"PATH"`
	HTTP    string `name:"http" help:"Serve everything over HTTP, too, on this loopback address, such as 127.0.0.1:8090." placeholder:"ADDR"`
	Compose string `help:"Be the app of this docker-compose.yaml or app-compose.json; nothing of it is run." type:"existingfile" placeholder:"FILE"`
	Fresh   bool   `help:"Use new keys and keep nothing, instead of those in the state directory."`
	Keep    string `help:"Keep keys and sockets in this directory, in place of the one in the state directory." type:"path" placeholder:"DIR"`
	PKI     string `name:"pki" help:"Sign evidence with the test PKI in this directory, such as the stack's." type:"existingdir" placeholder:"DIR"`
}

func (c *simulatorCmd) Help() string {
	return `The guest agent of a confidential VM, on this machine and in the foreground, so that
an app can be developed with its SDK unchanged. Keys are the same at each start as
long as the state directory is kept. They, and the quotes, which a simulated TEE
signs, are for development and prove nothing.`
}

// simulatorTrust is what everything that the simulator says is worth.
const simulatorTrust = "development: keys and quotes of this simulator are made on this machine and prove nothing"

func (c *simulatorCmd) Run(a *app) (err error) {
	if c.HTTP != "" {
		addr, err := netip.ParseAddrPort(strings.Replace(c.HTTP, "localhost:", "127.0.0.1:", 1))
		if err != nil || !addr.Addr().IsLoopback() {
			return fault.New("simulator_address", "%q is not a loopback address with a port", c.HTTP).
				WithFix("use 127.0.0.1:8090; whoever reaches this port has every key")
		}
		c.HTTP = addr.String()
	}
	manifestText, err := c.manifest()
	if err != nil {
		return err
	}
	// What lives for one run only: the registers of the simulated TEE, and its socket.
	run, err := os.MkdirTemp("", "dstack-simulator-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(run)
	dir := run
	if !c.Fresh {
		dir = c.Keep
		if dir == "" {
			dir = filepath.Join(a.stack.Dir, "simulator")
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fault.Wrap(err, "state_dir", "make the state directory %s", dir).WithFix("choose a writable directory with --state, or use --fresh")
		}
	}
	if c.PKI == "" {
		c.PKI = filepath.Join(dir, "dev-pki")
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(dir, "dstack.sock")
	}
	if c.Tappd == "" {
		c.Tappd = filepath.Join(dir, "tappd.sock")
	}
	listeners := map[string]net.Listener{}
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	for name, path := range map[string]string{initrpc.ListenDstack: c.Socket, initrpc.ListenTappd: c.Tappd} {
		if listeners[name], err = listenOwn(path); err != nil {
			delete(listeners, name)
			return err
		}
	}
	if c.HTTP != "" {
		l, err := net.Listen("tcp", c.HTTP)
		if err != nil {
			return fault.Wrap(err, "simulator_address", "listen on %s", c.HTTP).WithFix("choose another --http")
		}
		listeners[initrpc.ListenLocal], c.HTTP = l, "http://"+l.Addr().String()
	}

	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	guest, err := newSimGuest(manifestText)
	if err != nil {
		return err
	}
	tee, err := startSimTEE(ctx, a, c.PKI, run, guest.document)
	if err != nil {
		return err
	}
	defer tee.wait()
	defer cancel()
	cfg, err := tee.boot(ctx, guest, dir)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelWarn}))
	ag, err := agent.New(ctx, cfg, tee, agent.Options{Log: log, WholeLog: true})
	if err != nil {
		return err
	}

	a.printf("# %s\nexport DSTACK_SIMULATOR_ENDPOINT=%s\nexport TAPPD_SIMULATOR_ENDPOINT=%s\n", simulatorTrust, quoteShell(c.Socket), quoteShell(c.Tappd))
	if c.HTTP != "" {
		a.printf("# over HTTP: %s\n", c.HTTP)
	}
	roots := filepath.Join(c.PKI, "dev-roots.json")
	if err := a.result(map[string]any{
		"trust": "development", "notice": simulatorTrust, "endpoint": c.Socket, "tappd_endpoint": c.Tappd, "http": c.HTTP,
		"app_id": tee.app.String(), "dev_roots": roots,
	}); err != nil {
		return err
	}
	serving := listeners
	listeners = nil // Serve owns them
	if err := ag.Serve(ctx, serving); err != nil {
		return err
	}
	if a.ctx.Err() == nil {
		return tee.failure()
	}
	return nil
}

// manifest returns the app-compose.json: the file itself, or one around it.
func (c *simulatorCmd) manifest() ([]byte, error) {
	compose, name := []byte("services: {}\n"), "simulator"
	if c.Compose != "" {
		var err error
		if compose, err = os.ReadFile(c.Compose); err != nil {
			return nil, fault.Wrap(err, "compose_unreadable", "read %s", c.Compose)
		}
		name = filepath.Base(filepath.Dir(c.Compose))
		if bytes.HasPrefix(bytes.TrimSpace(compose), []byte("{")) {
			_, err := manifest.Parse(compose)
			return compose, err
		}
	}
	text, err := json.Marshal(map[string]any{
		"manifest_version": 2, "name": name, "runner": manifest.RunnerDockerCompose, "docker_compose_file": string(compose), "key_provider": manifest.KeyProviderNone,
	})
	if err != nil {
		return nil, err
	}
	_, err = manifest.Parse(text)
	return text, err
}

// listenOwn listens on a unix socket that only this user may use. A path that
// something else has, or that another process listens on, is left alone; a socket
// that nobody listens on is what an earlier run left behind.
func listenOwn(path string) (net.Listener, error) {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fault.Wrap(err, "socket_path", "look at %s", path)
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fault.New("socket_path", "%s exists and is not a socket", path).WithFix("choose another path")
	default:
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fault.New("socket_in_use", "another process listens on %s", path).WithFix("stop it, or choose another path")
		}
		if err := os.Remove(path); err != nil {
			return nil, fault.Wrap(err, "socket_path", "replace %s", path)
		}
	}
	// Whoever connects has every key: nobody else may, from the first moment on.
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fault.Wrap(err, "socket_path", "listen on %s", path).WithFix("choose another path, of at most 107 bytes")
	}
	return l, nil
}

// quoteShell makes text one word for a shell.
func quoteShell(text string) string {
	if strings.Trim(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+:") == "" {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// simTEE is the simulated TEE of one run, in its own process, and what init does
// for an agent: nothing else is behind it, no container and no machine.
type simTEE struct {
	http *http.Client
	app  dstack.AppID
	stop context.CancelFunc
	done chan struct{}
	err  error // how the process ended; after done

	mu sync.Mutex // orders register and log
}

// startSimTEE makes the test PKI, if there is none, and starts dstack-simtee with what a
// launch committed to. It ends with ctx, with stop, or with this process.
func startSimTEE(ctx context.Context, a *app, pki, run string, document []byte) (*simTEE, error) {
	program := filepath.Join(a.stack.Bin, "dstack-simtee")
	missing := func(err error) error {
		return fault.Wrap(err, "binary_missing", "start dstack-simtee").WithFix("run `make build` and use bin/dstack")
	}
	if out, err := exec.CommandContext(ctx, program, "pki", "--out", pki).CombinedOutput(); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, missing(err)
		}
		return nil, fault.New("simulator_tee", "make the keys of the simulated TEE: %s", bytes.TrimSpace(out)).WithFix("remove %s", pki)
	}
	launch, socket := filepath.Join(run, "launch.json"), filepath.Join(run, "tee.sock")
	spec, err := json.Marshal(map[string]any{"no_machine": true, "mr_config_id": mrconfig.IDv3(document)})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(launch, spec, 0o600); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var said lockedBuffer
	cmd := exec.CommandContext(ctx, program, "run", "--launch", launch, "--pki", pki, "--state", filepath.Join(run, "tee"), "--socket", socket)
	cmd.Stderr = &said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	// A group of its own: the terminal's ^C is for us, who then end it in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		cancel()
		return nil, err
	}
	t := &simTEE{stop: cancel, done: make(chan struct{}), http: &http.Client{
		Timeout: time.Minute,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}},
	}}
	ready := make(chan error, 1)
	go func() {
		defer close(t.done)
		// Pdeathsig is sent when the thread that started the process ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			ready <- missing(err)
			return
		}
		line, _ := bufio.NewReader(out).ReadString('\n')
		if line == "ready\n" {
			ready <- nil
		}
		_, _ = io.Copy(io.Discard, out)
		err := cmd.Wait()
		t.err = fault.New("simulator_tee", "the simulated TEE ended (%v): %s", err, strings.TrimSpace(said.String()))
		if line != "ready\n" {
			ready <- t.err
		}
	}()
	if err := <-ready; err != nil {
		cancel()
		<-t.done
		return nil, err
	}
	return t, nil
}

func (t *simTEE) wait() {
	t.stop()
	<-t.done
}

// failure returns why the TEE ended, if it did on its own.
func (t *simTEE) failure() error {
	select {
	case <-t.done:
		return t.err
	default:
		return nil
	}
}

// simGuest is the guest that there is none of.
type simGuest struct {
	text     []byte // of the manifest
	manifest *manifest.Manifest
	app      dstack.AppID
	instance []byte // 20 bytes, or empty
	document []byte // of the launch commitment
}

func newSimGuest(text []byte) (*simGuest, error) {
	m, err := manifest.Parse(text)
	if err != nil {
		return nil, err
	}
	g := &simGuest{text: text, manifest: m}
	hash := m.Hash()
	copy(g.app[:], hash[:])
	doc := mrconfig.Document{AppID: &g.app, ComposeHash: hash, KeyProvider: m.KeyProviderKind()}
	if !m.NoInstanceID {
		var id dstack.InstanceID
		if _, err := rand.Read(id[:]); err != nil {
			return nil, err
		}
		g.instance, doc.InstanceID = id[:], &id
	}
	g.document = doc.Bytes()
	return g, nil
}

// boot does what guest/boot does for the agent, without a machine: the launch
// events, the keys, and the events up to system-ready.
func (t *simTEE) boot(ctx context.Context, g *simGuest, dir string) (*initrpc.Config, error) {
	m, instance := g.manifest, g.instance
	compose, gpu := m.Hash(), m.GPUPolicyHash()
	t.app = g.app
	appKeys, err := simulatorKeys(filepath.Join(dir, "seed"))
	if err != nil {
		return nil, err
	}
	defer appKeys.Wipe()
	provider, err := appKeys.Provider.Event()
	if err != nil {
		return nil, err
	}
	channel, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(channel.Public())
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(spki)

	// No image runs: its hash is nothing's. SDKs want one all the same.
	vm, err := json.Marshal(map[string]string{"os_image_hash": strings.Repeat("0", 64), "mr_config": string(g.document)})
	if err != nil {
		return nil, err
	}
	cfg := &initrpc.Config{
		Version: "0.6.0", Revision: "dstack-simulator-" + Version, TEE: dstack.TDX, IsDev: true,
		Manifest: g.text, VMConfig: string(vm), DataDisks: []string{"/"},
	}
	type event struct {
		name    string
		payload []byte
	}
	events := []event{{eventlog.SystemPreparing, nil}, {eventlog.AppIDEvent, t.app[:]}, {eventlog.ComposeHashEvent, compose[:]}}
	for _, h := range m.InitScriptHashes() {
		events = append(events, event{eventlog.InitScriptHash, h})
	}
	events = append(events,
		event{eventlog.GPUPolicyHash, gpu[:]}, event{eventlog.InstanceIDEvent, instance}, event{eventlog.BootMRDone, nil},
		event{eventlog.KeyProvider, provider}, event{eventlog.StorageFS, []byte("ext4")},
		event{eventlog.SystemChannelKey, sum[:]}, event{eventlog.SystemReady, nil},
	)
	for _, e := range events {
		logged, err := t.Extend(ctx, e.name, e.payload)
		if err != nil {
			return nil, err
		}
		cfg.Events = append(cfg.Events, logged)
	}
	if cfg.ChannelKey, err = x509.MarshalPKCS8PrivateKey(channel); err != nil {
		return nil, err
	}
	cfg.AppKeys, err = appKeys.ForAgent().Encode()
	return cfg, err
}

// simulatorKeys returns what the key provider none gives from the seed in a file.
func simulatorKeys(path string) (*keys.AppKeys, error) {
	seed, err := readSeed(path)
	if err != nil {
		return nil, err
	}
	defer seed.Wipe()
	d, err := derive.FromSeed(seed)
	if err != nil {
		return nil, err
	}
	text, err := derive.PEM(d.CA)
	if err != nil {
		return nil, err
	}
	ca, err := certificate.Self(d.CA, certificate.Subject{Name: "App Root Cert", Path: 1}, ratls.Issued{}, nil, time.Now())
	if err != nil {
		return nil, err
	}
	return &keys.AppKeys{App: d.App, Disk: d.Disk, CACert: ca.PEM(), Provider: keys.Provider{Kind: keys.None, CAKey: text}}, nil
}

// readSeed returns the seed in a file, which it makes when it is not there.
func readSeed(path string) (keys.Seed, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		fresh := make([]byte, keys.Size)
		defer clear(fresh)
		if _, err := rand.Read(fresh); err != nil {
			return keys.Seed{}, err
		}
		if err := durable.WriteFile(path, fresh, 0o600); err != nil {
			return keys.Seed{}, fault.Wrap(err, "simulator_seed", "write %s", path)
		}
		return keys.NewSeed(fresh)
	}
	if err != nil {
		return keys.Seed{}, fault.Wrap(err, "simulator_seed", "look at %s", path)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 || info.Size() != keys.Size {
		return keys.Seed{}, fault.New("simulator_seed", "%s is not a file of %d bytes that only its owner may read", path, keys.Size).
			WithFix("chmod 600 %s, or remove it: keys are then made anew", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return keys.Seed{}, fault.Wrap(err, "simulator_seed", "read %s", path)
	}
	defer clear(text)
	return keys.NewSeed(text)
}

// maxTEEReply bounds an answer of the simulated TEE in bytes.
const maxTEEReply = 1 << 20

// call speaks the protocol of dstack-simtee (its package documentation has it). The
// guest's client of it is in no release binary (threats.md B14), hence these lines.
func (t *simTEE) call(ctx context.Context, path string, request any, reply any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://tee"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := t.http.Do(req)
	if err != nil {
		return fault.Wrap(err, "simulator_tee", "ask the simulated TEE")
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxTEEReply))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %.200s", resp.StatusCode, text)
	}
	if err == nil {
		err = json.Unmarshal(text, reply)
	}
	if err != nil {
		return fault.Wrap(err, "simulator_tee", "answer of the simulated TEE to %s", path)
	}
	return nil
}

// Quote implements agent.Init.
func (t *simTEE) Quote(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	var reply struct {
		Quote string `json:"quote"`
	}
	if err := t.call(ctx, "/quote", map[string]any{"report_data": data}, &reply); err != nil {
		return nil, err
	}
	return hex.DecodeString(reply.Quote)
}

// Extend implements agent.Init.
func (t *simTEE) Extend(ctx context.Context, name string, payload []byte) (eventlog.Event, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, err := eventlog.RuntimeV1(name, payload)
	if err != nil {
		return e, err
	}
	return e, t.call(ctx, "/extend", map[string]any{"register": eventlog.RuntimeIMR, "digest": eventlog.Digest(e)}, &struct{}{})
}

// Containers implements agent.Init: there are none.
func (t *simTEE) Containers(context.Context) ([]initrpc.Container, error) { return nil, nil }

// Logs implements agent.Init.
func (t *simTEE) Logs(context.Context, initrpc.LogsRequest) (initrpc.Logs, error) {
	return initrpc.Logs{}, fault.New("container_unknown", "the simulator runs no containers")
}

// Status implements agent.Init.
func (t *simTEE) Status(context.Context) (initrpc.Status, error) {
	return initrpc.Status{Phase: "simulator", Ready: true}, nil
}

// Lease implements agent.Init: there is no KMS.
func (t *simTEE) Tunnel(context.Context, initrpc.TunnelChange) (initrpc.TunnelStatus, error) {
	return initrpc.TunnelStatus{}, fault.New("tunnel_absent", "the simulator has no tunnel")
}

func (t *simTEE) Lease(context.Context, initrpc.LeaseChange) error { return nil }

// Shutdown implements agent.Init; only the host asks for it, and there is none.
func (t *simTEE) Shutdown(context.Context, initrpc.ShutdownRequest) error { return nil }

// lockedBuffer takes what a process says.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if room := 8192 - l.b.Len(); room > 0 {
		l.b.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
