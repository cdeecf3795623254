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
	Bin    string // directory of dockerd, docker-compose, the shim, crun, nft
	Run    string // tmpfs for configuration, sockets and state
	Data   string // parent of docker/ and containerd/, on the data disk
	Nosync bool   // the data disk does not outlive the boot: skip database syncs
	// GCPercent is GOGC of the daemon and compose; 0 leaves Go's default. Starting up makes much
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

// Env is the environment of the daemon and of compose: complete, for nothing is
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

// daemonEnv is the daemon's environment.
func (c Config) daemonEnv() []string {
	// Where containerd's data has always been; the daemon would put it elsewhere.
	env := append(c.processEnv(), "DOCKER_CONTAINERD_ROOT="+filepath.Join(c.Data, "containerd"))
	if c.Nosync {
		env = append(env, "ENGINE_NOSYNC=1")
	}
	return env
}

// dockerdConfig is daemon.json. Every key is there for a reason:
func (c Config) dockerdConfig() ([]byte, error) {
	return json.MarshalIndent(map[string]any{
		// The unix socket only, never TCP.
		"hosts":     []string{"unix://" + c.Socket()},
		"data-root": filepath.Join(c.Data, "docker"),
		"exec-root": filepath.Join(c.Run, "docker"),
		"pidfile":   filepath.Join(c.Run, "docker.pid"),
		// The containerd store names an image by the digest of its manifest, which
		// is what the lock pins. containerd runs within dockerd.
		"features":         map[string]bool{"containerd-snapshotter": true, "embedded-containerd": true},
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

// Engine is the running daemon: dockerd with containerd in it.
type Engine struct {
	Config
	*Client
	Log      *supervise.Tail // what the daemon says
	restarts atomic.Int64
	stop     context.CancelFunc
	done     chan struct{}
}

// daemonLog is how much of the daemon's output is kept, in bytes.
const daemonLog = 32 << 10

// stopGrace is how long a daemon may take to end.
const stopGrace = 10 * time.Second

// Start writes the configuration and starts the daemon. report is told when it
// exits; it is started again with back-off until Stop.
func Start(sup *supervise.Supervisor, cfg Config, report func(err error, wait time.Duration)) (*Engine, error) {
	for _, dir := range []string{"docker", "engine"} {
		if err := os.MkdirAll(filepath.Join(cfg.Run, dir), 0o711); err != nil {
			return nil, err
		}
	}
	daemonJSON, err := cfg.dockerdConfig()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(cfg.Run, "docker/daemon.json")
	if err := os.WriteFile(file, daemonJSON, 0o600); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	e := &Engine{Config: cfg, Client: NewClient(cfg.Socket()), Log: supervise.NewTail(daemonLog), stop: cancel, done: make(chan struct{})}
	command := supervise.Command{
		Path: filepath.Join(cfg.Bin, "dockerd"), Args: []string{"dockerd", "--config-file", file, "--log-level", "warn"},
		Env: cfg.daemonEnv(), Output: e.Log,
	}
	go func() {
		defer close(e.done)
		sup.Keep(ctx, nil, stopGrace, func() (supervise.Command, error) { return command, nil }, func(err error, wait time.Duration) {
			e.restarts.Add(1)
			report(err, wait)
		})
	}()
	return e, nil
}

// Restarts counts the ends of the daemon since Start. When it has changed, what the
// daemon was told before may be lost.
func (e *Engine) Restarts() int64 { return e.restarts.Load() }

// WaitReady waits until the engine's API answers; the error tells what the daemon
// said last. Code engine_start.
func (e *Engine) WaitReady(ctx context.Context) error {
	// The daemon listens long before it serves, and answers the ping when it does: each
	// look before that takes time from it.
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(e.Socket()); err == nil && e.Ping(ctx) == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.Wrap(errors.New(orNothing(e.Log.LastLines(4))), "engine_start", "the container engine did not start (%v)", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func orNothing(s string) string {
	if s == "" {
		return "said nothing"
	}
	return s
}

// Stop ends the daemon within its grace.
func (e *Engine) Stop() {
	e.stop()
	<-e.done
}
