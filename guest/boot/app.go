// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/guest/engine"
	"github.com/dstack-go/dstack/guest/health"
	"github.com/dstack-go/dstack/guest/script"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

const (
	// eventHealth is ours: how the app is, health.Health as JSON.
	eventHealth = "app.health"

	scriptsMapping = "dstack-scripts"
	scriptsLabel   = "dstack-scripts" // of the partition
	scriptsLayer   = "/run/dstack/scripts-layer"
)

// room mounts the layer that scripts run in. Codes: scripts_unsupported,
// scripts_layer.
func (m *Machine) room() (*script.Room, error) {
	if m.layers.scripts == nil {
		return nil, fault.New("scripts_unsupported", "the manifest has scripts, and this image has no layer to run them in").
			WithFix("use an image with dstack.scripts_hash on its command line, or move what the scripts do into a container")
	}
	fail := func(err error) (*script.Room, error) {
		return nil, fault.Wrap(err, "scripts_layer", "open the scripts layer under its measured hash")
	}
	part, err := m.finder.Partition(scriptsLabel)
	if err != nil {
		return fail(err)
	}
	node, err := m.mapper.OpenVerity(scriptsMapping, part.Path, *m.layers.scripts)
	if err != nil {
		return fail(err)
	}
	if err := os.MkdirAll(scriptsLayer, 0o700); err != nil {
		return fail(err)
	}
	if err := unix.Mount(node, scriptsLayer, "squashfs", unix.MS_RDONLY|nodev|nosuid, ""); err != nil {
		return fail(err)
	}
	return &script.Room{
		Layer: scriptsLayer, WorkDir: workDir, Socket: dstackSocket, Resolver: resolvConf,
		// The client without its engine: docker login works, docker run cannot.
		Programs: map[string]string{"/usr/bin/docker": "/usr/bin/docker-compose", "/usr/bin/docker-compose": "/usr/bin/docker-compose"},
		Exe:      "/proc/self/exe", Runner: m.sup, Secrets: m.variables,
		Log: func(name, line string) { m.console.Log(name + ": " + oneLine(line)) },
	}, nil
}

// scripts runs what must succeed before any container exists. Nothing of it is
// mounted for a manifest without scripts.
func (m *Machine) scripts(ctx context.Context) error {
	if !m.manifest.RunsScripts() {
		return nil
	}
	room, err := m.room()
	if err != nil {
		return err
	}
	m.scriptRoom = room
	for _, s := range script.Gates(m.manifest, m.variables) {
		if err := room.Run(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func (m *Machine) startEngine(ctx context.Context) error {
	if err := applySysctls("/proc", forwarding); err != nil {
		return err
	}
	m.logMemory("before-engine")
	cfg := engine.Default()
	cfg.Nosync = !m.lasting() // a disk that dies with its key needs no care
	cfg.GCPercent = 400
	// What an earlier boot left must not start with the daemon (threats.md J04).
	gates, err := engine.Disarm(cfg.Data, m.locked())
	if err != nil {
		return err
	}
	e, err := engine.Start(m.sup, cfg, func(err error, wait time.Duration) {
		m.console.Log(fmt.Sprintf("dockerd: %v; starting it again in %s", err, wait))
	})
	if err != nil {
		return fault.Wrap(err, "engine_start", "start the container engine")
	}
	m.statusMu.Lock()
	m.engine = e
	m.statusMu.Unlock()
	ctx, cancel := context.WithTimeoutCause(ctx, 4*time.Minute, errors.New("no answer for 4 minutes"))
	defer cancel()
	if err := e.WaitReady(ctx); err != nil || !m.lasting() {
		return err
	}
	m.gates = gates
	return m.sweep(ctx)
}

// locked reports whether the measured manifest locks images.
func (m *Machine) locked() bool { return m.manifest.ImagePolicy == manifest.ImagePolicyDigest }

// sweep removes the containers that an earlier boot left and this manifest does not
// let stay.
func (m *Machine) sweep(ctx context.Context) error {
	project, services := engine.Project(m.manifest.DockerComposeFile)
	removed, err := m.gates.Sweep(ctx, m.engine.Client, engine.SweepPolicy{Locked: m.locked(), Project: project, Services: services})
	if err == nil && removed > 0 {
		m.console.Log(fmt.Sprintf("engine: removed %d containers of earlier boots", removed))
	}
	return err
}

// images fetches what the manifest locks. With the image policy digest nothing
// else may run: compose never pulls, and an image of the compose file that the
// lock lacks is refused by name.
func (m *Machine) images(ctx context.Context) error {
	if m.locked() {
		if err := allLocked(m.manifest); err != nil {
			return err
		}
	}
	if len(m.manifest.ImageLock) == 0 {
		return nil
	}
	host := func(ctx context.Context) (net.Conn, error) { return m.dial(ctx, "registry") }
	registry, err := engine.ServeRegistry(engine.RegistryAddr, host)
	if err != nil {
		return fault.Wrap(err, "registry_failed", "serve the loopback registry")
	}
	defer registry.Close()
	if m.hostlink() == nil {
		_, err := host(ctx)
		return err
	}
	if err := engine.Preload(ctx, m.engine.Config, host, m.manifest.ImageLock); err != nil && ctx.Err() == nil {
		m.console.Log("images: not fetched ahead: " + oneLine(err.Error()))
	}
	return engine.PullLocked(ctx, m.engine, registry.Addr, m.manifest.ImageLock, nil)
}

// composeUp brings the app up, and then the agent unless somebody has asked it before:
// who is told that the app is up can ask for its evidence.
func (m *Machine) composeUp(ctx context.Context) error {
	if err := m.appUp(ctx); err != nil {
		return err
	}
	return m.agent.WaitReady(ctx)
}

// appUp brings the app up. Every gate has passed.
func (m *Machine) appUp(ctx context.Context) error {
	if m.manifest.Runner == manifest.RunnerBash {
		return m.bashUp()
	}
	override, err := engine.ScopeOverride(m.manifest.DockerComposeFile, m.manifest.KeyScopes)
	if err != nil {
		return err
	}
	project, _ := engine.Project(m.manifest.DockerComposeFile)
	m.compose = &engine.Compose{
		Config: m.engine.Config, Dir: workDir, Runner: m.sup,
		NeverPull: m.locked(), Fresh: m.locked() && m.lasting(), Env: m.variables, Override: override,
		Retries: engine.DefaultRetries(),
		Report: func(attempt int, err error, wait time.Duration) {
			m.console.Log(fmt.Sprintf("compose up, attempt %d: %v; again in %s", attempt, err, wait))
		},
	}
	if m.gates != nil {
		if err := m.gates.Rearm(ctx, m.engine.Client, project); err != nil {
			return fault.Wrap(err, "container_state", "give containers their restart policies back")
		}
		for _, why := range m.gates.NotStarted {
			m.console.Log("not started: " + oneLine(why))
		}
	}
	if err := m.compose.Write(m.manifest.DockerComposeFile); err != nil {
		return err
	}
	m.restarts = m.engine.Restarts()
	if err := m.compose.Up(ctx); err != nil || !m.locked() || !m.lasting() {
		return err
	}
	// Nothing runs from an image that the lock lacks; it only takes space.
	if _, err := engine.SweepImages(ctx, m.engine.Client, m.manifest.ImageLock); err != nil {
		m.console.Log(err.Error())
	}
	return nil
}

// bashUp starts the app of the runner bash, a script in the foreground. When it ends,
// the app has ended, which health says.
func (m *Machine) bashUp() error {
	s, _ := script.App(m.manifest, m.variables)
	m.report(health.Health{State: health.Healthy, Since: time.Now()})
	go func() {
		h := health.Health{State: health.Failed, Reason: s.Name + " ended", Code: "script_ended"}
		if err := m.scriptRoom.Run(context.Background(), s); err != nil {
			h.Reason, h.Code = oneLine(err.Error()), fault.Code(err)
		}
		h.Since = time.Now()
		m.report(h)
	}()
	return nil
}

// watch says how the app is from now on, and brings it up again.
func (m *Machine) watch() {
	if m.compose == nil {
		return
	}
	project, _ := engine.Project(m.manifest.DockerComposeFile)
	w := &health.Watcher{
		Engine: m.engine, Project: project, Up: m.compose.Up, IsUp: true, SeenRestarts: m.restarts, Report: m.report,
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.stopWatch = cancel
	go w.Run(ctx)
}

// report tells host, console and agent how the app is.
func (m *Machine) report(h health.Health) {
	text, err := json.Marshal(h)
	if err != nil {
		return
	}
	m.statusMu.Lock()
	m.health = string(text)
	m.statusMu.Unlock()
	m.host.Notify(eventHealth, string(text))
	line := "app: " + string(h.State)
	if h.Reason != "" {
		line += ": " + h.Reason
	}
	m.console.Log(line)
}

// allLocked refuses a compose file with an image that the lock lacks.
func allLocked(m *manifest.Manifest) error {
	if m.Runner == manifest.RunnerBash {
		return nil
	}
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
