// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/internal/fault"
)

// Config says where the engine's programs and data are. The zero value is not
// usable; take [Default].
type Config struct {
	Bin    string // directory of dockerd, containerd, docker-compose, crun, nft
	Run    string // tmpfs for configuration, sockets and state
	Data   string // parent of docker/ and containerd/, on the data disk
	Nosync bool   // the data disk does not outlive the boot: skip database syncs
	// GCPercent is GOGC of the daemons and compose; 0 leaves Go's default. Starting up makes much
	// short-lived garbage and little that stays, so a higher value trades memory
	// for time.
	GCPercent int
}

// Default is the layout of the image.
func Default() Config {
	return Config{Bin: "/usr/bin", Run: "/run", Data: "/var/lib"}
}

// Socket is the engine's API socket.
func (c Config) Socket() string { return filepath.Join(c.Run, "docker.sock") }

func (c Config) containerdSocket() string { return filepath.Join(c.Run, "containerd/containerd.sock") }

// Env is the environment of the daemons and of compose: complete, for nothing is
// inherited from PID 1.
func (c Config) Env() []string {
	return []string{"PATH=" + c.Bin + ":/usr/sbin:/sbin:/bin", "HOME=" + filepath.Join(c.Run, "engine"), "TMPDIR=/tmp"}
}

// processEnv is [Config.Env] and how the engine's own programs collect garbage.
func (c Config) processEnv() []string {
	env := c.Env()
	if c.GCPercent > 0 {
		env = append(env, fmt.Sprintf("GOGC=%d", c.GCPercent))
	}
	return env
}

// dockerdConfig is daemon.json. Every key is there for a reason:
func (c Config) dockerdConfig() ([]byte, error) {
	return json.MarshalIndent(map[string]any{
		// The unix socket only, never TCP.
		"hosts":      []string{"unix://" + c.Socket()},
		"containerd": c.containerdSocket(),
		"data-root":  filepath.Join(c.Data, "docker"),
		"exec-root":  filepath.Join(c.Run, "docker"),
		"pidfile":    filepath.Join(c.Run, "docker.pid"),
		// The containerd store names an image by the digest of its manifest, which
		// is what the lock pins.
		"features":         map[string]bool{"containerd-snapshotter": true},
		"default-runtime":  "crun",
		"runtimes":         map[string]any{"crun": map[string]string{"path": filepath.Join(c.Bin, "crun")}},
		"exec-opts":        []string{"native.cgroupdriver=cgroupfs"}, // no systemd
		"firewall-backend": "nftables",
		"userland-proxy":   false, // no docker-proxy in the image; published ports are translated in the kernel
		"live-restore":     false,
		"log-driver":       "local",
		"log-opts":         map[string]string{"max-size": "10m", "max-file": "3"},
		"shutdown-timeout": 8,
	}, "", "  ")
}

// containerdConfig is containerd's configuration, version 4.
func (c Config) containerdConfig() string {
	return fmt.Sprintf(`version = 4
root = %q
state = %q
imports = []
# The image's root is read-only and nothing installs into it.
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.monitor.container.v1.restart"]
[plugins."io.containerd.server.v1.grpc"]
  address = %q
[plugins."io.containerd.server.v1.ttrpc"]
  address = %q
[plugins."io.containerd.metadata.v1.bolt"]
  no_sync = %v
`, filepath.Join(c.Data, "containerd"), filepath.Join(c.Run, "containerd"),
		c.containerdSocket(), c.containerdSocket()+".ttrpc", c.Nosync)
}

// Engine is the running pair of daemons.
type Engine struct {
	Config
	*Client
	sup        *supervise.Supervisor
	restarts   atomic.Int64
	Containerd *Daemon
	Dockerd    *Daemon
}

// Daemon is one supervised daemon.
type Daemon struct {
	Name string
	Log  *supervise.Tail
	stop context.CancelFunc
	done chan struct{}
}

// daemonLog is how much of a daemon's output is kept, in bytes.
const daemonLog = 32 << 10

// stopGrace is how long a daemon may take to end.
const stopGrace = 10 * time.Second

// Start writes the configuration and starts both daemons at once: dockerd waits
// for containerd's socket by itself. report is told when one exits; it is started
// again with back-off until Stop.
func Start(sup *supervise.Supervisor, cfg Config, report func(daemon string, err error, wait time.Duration)) (*Engine, error) {
	e := &Engine{Config: cfg, Client: NewClient(cfg.Socket()), sup: sup}
	for _, dir := range []string{"containerd", "docker", "engine"} {
		if err := os.MkdirAll(filepath.Join(cfg.Run, dir), 0o711); err != nil {
			return nil, err
		}
	}
	daemonJSON, err := cfg.dockerdConfig()
	if err != nil {
		return nil, err
	}
	dockerConf := filepath.Join(cfg.Run, "docker/daemon.json")
	containerdConf := filepath.Join(cfg.Run, "containerd/config.toml")
	for path, data := range map[string][]byte{dockerConf: daemonJSON, containerdConf: []byte(cfg.containerdConfig())} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return nil, err
		}
	}
	e.Containerd = e.keep("containerd", []string{"--config", containerdConf, "--log-level", "warn"}, report)
	e.Dockerd = e.keep("dockerd", []string{"--config-file", dockerConf, "--log-level", "warn"}, report)
	return e, nil
}

func (e *Engine) keep(name string, args []string, report func(string, error, time.Duration)) *Daemon {
	ctx, cancel := context.WithCancel(context.Background())
	d := &Daemon{Name: name, Log: supervise.NewTail(daemonLog), stop: cancel, done: make(chan struct{})}
	path := filepath.Join(e.Bin, name)
	go func() {
		defer close(d.done)
		e.sup.Keep(ctx, nil, stopGrace, func() (supervise.Command, error) {
			return supervise.Command{Path: path, Args: append([]string{name}, args...), Env: e.processEnv(), Output: d.Log}, nil
		}, func(err error, wait time.Duration) {
			e.restarts.Add(1)
			report(name, err, wait)
		})
	}()
	return d
}

// Restarts counts the ends of daemons since Start. When it has changed, what the
// daemons were told before may be lost.
func (e *Engine) Restarts() int64 { return e.restarts.Load() }

// WaitReady waits until the engine's API answers; the error tells what the daemons
// said last. Code engine_start.
func (e *Engine) WaitReady(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		// The socket appears when dockerd serves; a ping before costs nothing.
		if _, err := os.Stat(e.Socket()); err == nil && e.Ping(ctx) == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.Wrap(errors.New(e.said()), "engine_start", "the container engine did not start (%v)", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// said joins the last words of both daemons.
func (e *Engine) said() string {
	return fmt.Sprintf("dockerd: %s; containerd: %s", orNothing(e.Dockerd.Log.LastLines(3)), orNothing(e.Containerd.Log.LastLines(2)))
}

func orNothing(s string) string {
	if s == "" {
		return "said nothing"
	}
	return s
}

// Stop ends dockerd, then containerd, each within its grace.
func (e *Engine) Stop() {
	for _, d := range []*Daemon{e.Dockerd, e.Containerd} {
		if d != nil {
			d.stop()
			<-d.done
		}
	}
}
