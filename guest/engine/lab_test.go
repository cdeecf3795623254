// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/internal/fault"
)

// The lab runs the real engine, from the root file system of the built image, in
// namespaces of its own: one process is one boot, its end a power cut, and the
// directory of the data disk lives on from one to the next.

const (
	labScene = "ENGINE_LAB_SCENE" // environment of the process that is a boot
	labData  = "ENGINE_LAB_DATA"
	labRoot  = "ENGINE_LAB_ROOT"
	labProbe = "ENGINE_LAB_PROBE"
)

func TestMain(m *testing.M) {
	if scene := os.Getenv(labScene); scene != "" {
		if err := (&lab{}).boot(scene); err != nil {
			fmt.Println("lab:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// scenes are the boots.
var scenes = map[string]func(ctx context.Context, l *lab) error{
	"make a container that always restarts": sceneMake,
	"start without gates":                   sceneUngated,
	"start with a lock":                     sceneLocked,
	"start as upstream":                     sceneUpstream,
	"compose with a secret":                 sceneCompose,
	"lose the daemon":                       sceneLoseDaemon,
	"stop after disarming":                  func(context.Context, *lab) error { return nil },
}

type lab struct {
	cfg    Config
	sup    *supervise.Supervisor
	engine *Engine
	gates  *Gates
}

// squashfsAt is where the root file system begins in the image's root partition file.
const squashfsAt = 1 << 20

// builtRoot returns the root partition of the image that was built last.
func builtRoot(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: the real engine needs root")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skip("SKIP: no cache directory with an image:", err)
	}
	roots, _ := filepath.Glob(filepath.Join(cache, "dstack/image/out/dstack-sim-*/rootfs.img.parted.verity"))
	if len(roots) == 0 {
		t.Skip("SKIP: no image is built: bin/dstack image build")
	}
	root := roots[len(roots)-1]
	f, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	magic := make([]byte, 4)
	if _, err := f.ReadAt(magic, squashfsAt); err != nil || string(magic) != "hsqs" {
		t.Fatalf("%s has no squashfs at its first partition: %v", root, err)
	}
	return root
}

// buildProbe returns the static program that containers run.
func buildProbe(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the probe: %v\n%s", err, out)
	}
	return path
}

// bootLab runs one boot and returns what the container has written so far.
func bootLab(t *testing.T, root, data, probe, scene string) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), labScene+"="+scene, labData+"="+data, labRoot+"="+root, labProbe+"="+probe)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		if errors.Is(err, syscall.EPERM) {
			t.Skip("SKIP: namespaces are not to be had:", err)
		}
		t.Fatalf("boot %q: %v\n%s", scene, err, out)
	}
	text, _ := os.ReadFile(filepath.Join(data, "marks/mark"))
	return strings.Count(string(text), "ran\n")
}

// boot is what the process does.
func (l *lab) boot(scene string) error {
	run := scenes[scene]
	if run == nil {
		return fmt.Errorf("no scene %q", scene)
	}
	probe, err := os.ReadFile(os.Getenv(labProbe))
	if err != nil {
		return err
	}
	if err := l.enter(); err != nil {
		return err
	}
	if err := os.WriteFile("/tmp/probe", probe, 0o755); err != nil {
		return err
	}
	crun, err := os.ReadFile("/usr/bin/crun")
	if err != nil {
		return err
	}
	if err := os.WriteFile("/tmp/crun", crun, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/tmp/probe", "/usr/bin/crun", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	sup := supervise.New()
	go sup.Reap(context.Background())
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l.cfg = Default()
	switch scene {
	case "start with a lock":
		l.gates, err = Disarm(l.cfg.Data, true)
	case "start as upstream", "stop after disarming":
		l.gates, err = Disarm(l.cfg.Data, false)
	}
	if err != nil || scene == "stop after disarming" {
		return err
	}
	l.sup = sup
	l.engine, err = Start(sup, l.cfg, func(err error, _ time.Duration) { fmt.Println(err) })
	if err != nil {
		return err
	}
	if err := l.engine.WaitReady(ctx); err != nil {
		return err
	}
	if err := run(ctx, l); err != nil {
		return fmt.Errorf("%w\n%s", err, l.engine.Log)
	}
	return nil
}

// enter makes the image's root this process's.
func (l *lab) enter() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return err
	}
	root := "/mnt"
	if out, err := exec.Command("mount", "-t", "squashfs", "-o", fmt.Sprintf("loop,ro,offset=%d", squashfsAt), os.Getenv(labRoot), root).CombinedOutput(); err != nil {
		return fmt.Errorf("mount the root: %w: %s", err, out)
	}
	for _, m := range []struct{ source, target, fstype string }{
		{"tmpfs", "/run", "tmpfs"}, {"tmpfs", "/tmp", "tmpfs"}, {"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"},
		{"/dev", "/dev", ""}, {os.Getenv(labData), "/var/lib", ""}, {"cgroup2", "/sys/fs/cgroup", "cgroup2"},
	} {
		flags := uintptr(0)
		if m.fstype == "" {
			flags = unix.MS_BIND | unix.MS_REC
		}
		if err := unix.Mount(m.source, root+m.target, m.fstype, flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	if err := unix.Chroot(root); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Mount("", "/var/lib", "", unix.MS_SHARED, ""); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}

// importProbe puts the probe into the image store as probe:1.
func (l *lab) importProbe(ctx context.Context) error {
	program, err := os.ReadFile("/tmp/probe")
	if err != nil {
		return err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "probe", Mode: 0o755, Size: int64(len(program)), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	if _, err := w.Write(program); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	u := "http://docker/" + apiVersion + "/images/create?" + url.Values{"fromSrc": {"-"}, "repo": {"probe"}, "tag": {"1"}}.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u, &layer)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-tar")
	resp, err := l.engine.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK || bytes.Contains(text, []byte(`"error"`)) {
		return fmt.Errorf("import: %s %s", resp.Status, text)
	}
	return nil
}

func (l *lab) create(ctx context.Context, name, policy string, labels map[string]string) (string, error) {
	resp, err := l.engine.send(ctx, http.MethodPost, "/containers/create", url.Values{"name": {name}}, map[string]any{
		"Image": "probe:1", "Cmd": []string{"/probe", "/marks/mark"}, "Labels": labels,
		"HostConfig": map[string]any{
			"RestartPolicy": RestartPolicy{Name: policy}, "Binds": []string{"/var/lib/marks:/marks", "data:/data"}, "NetworkMode": "none",
		},
	})
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var out struct{ ID string }
	return out.ID, json.NewDecoder(resp.Body).Decode(&out)
}

func sceneMake(ctx context.Context, l *lab) error {
	if err := os.MkdirAll("/var/lib/marks", 0o777); err != nil {
		return err
	}
	if err := l.importProbe(ctx); err != nil {
		return err
	}
	for name, labels := range map[string]map[string]string{
		"stray": {}, "kept": {projectLabel: "dstack", serviceLabel: "web"}, "orphan": {projectLabel: "dstack", serviceLabel: "gone"},
	} {
		if _, err := l.create(ctx, name, "always", labels); err != nil {
			return err
		}
	}
	if err := l.engine.StartContainer(ctx, "stray"); err != nil {
		return err
	}
	return waitFor(ctx, func() bool {
		text, _ := os.ReadFile("/var/lib/marks/mark")
		return string(text) == "ran\n"
	}, "the container to run")
}

func waitFor(ctx context.Context, ok func() bool, what string) error {
	for !ok() {
		select {
		case <-ctx.Done():
			return errors.New("waited in vain for " + what)
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

func sceneUngated(ctx context.Context, l *lab) error {
	return waitFor(ctx, func() bool {
		text, _ := os.ReadFile("/var/lib/marks/mark")
		return len(text) > 4
	}, "the container to start with the daemon")
}

// settled is how long a container that starts with the daemon is given to show;
// sceneUngated sees one in a fraction of it.
const settled = 3 * time.Second

func (l *lab) names(ctx context.Context) ([]string, error) {
	list, err := l.engine.Containers(ctx)
	var names []string
	for _, c := range list {
		names = append(names, c.Names[0]+" "+c.State)
	}
	slices.Sort(names)
	return names, err
}

func sceneLocked(ctx context.Context, l *lab) error {
	time.Sleep(settled)
	if n := len(l.gates.Policies); n != 3 {
		return fmt.Errorf("%d policies were taken", n)
	}
	if names, err := l.names(ctx); err != nil || len(names) != 3 || strings.Contains(fmt.Sprint(names), "running") {
		return fmt.Errorf("containers %q, %v", names, err)
	}
	swept, err := l.gates.Sweep(ctx, l.engine.Client, SweepPolicy{Locked: true})
	if err != nil || swept != 3 {
		return fmt.Errorf("swept %d containers, %w", swept, err)
	}
	if swept, err = SweepImages(ctx, l.engine.Client, nil); err != nil || swept != 1 {
		return fmt.Errorf("swept %d images, %w", swept, err)
	}
	var volumes struct{ Volumes []struct{ Name string } }
	if err := l.engine.json(ctx, http.MethodGet, "/volumes", nil, &volumes); err != nil || len(volumes.Volumes) != 1 || volumes.Volumes[0].Name != "data" {
		return fmt.Errorf("volumes %+v, %v", volumes, err)
	}
	return l.gates.Rearm(ctx, l.engine.Client, "dstack")
}

func sceneUpstream(ctx context.Context, l *lab) error {
	time.Sleep(settled)
	if names, err := l.names(ctx); err != nil || strings.Contains(fmt.Sprint(names), "running") {
		return fmt.Errorf("before the gates: %q, %v", names, err)
	}
	if text, _ := os.ReadFile("/var/lib/marks/mark"); strings.Count(string(text), "ran") != 1 {
		return fmt.Errorf("before the gates the container wrote %q", text)
	}
	swept, err := l.gates.Sweep(ctx, l.engine.Client, SweepPolicy{Project: "dstack", Services: []string{"web"}})
	if err != nil || swept != 1 {
		return fmt.Errorf("swept %d containers, %w", swept, err)
	}
	if err := l.gates.Rearm(ctx, l.engine.Client, "dstack"); err != nil {
		return err
	}
	if err := waitFor(ctx, func() bool {
		text, _ := os.ReadFile("/var/lib/marks/mark")
		return strings.Count(string(text), "ran") == 2
	}, "the stray container to be started after the gates"); err != nil {
		return err
	}
	// Compose starts its own; the policy is back.
	if names, err := l.names(ctx); err != nil || fmt.Sprint(names) != "[/kept created /stray running]" {
		return fmt.Errorf("after the gates: %q, %v", names, err)
	}
	for _, name := range []string{"kept", "stray"} {
		var info struct {
			HostConfig struct{ RestartPolicy RestartPolicy }
		}
		if err := l.engine.json(ctx, http.MethodGet, "/containers/"+name+"/json", nil, &info); err != nil || info.HostConfig.RestartPolicy.Name != "always" {
			return fmt.Errorf("%s has the policy %+v, %v", name, info, err)
		}
	}
	saved, err := filepath.Glob("/var/lib/docker/containers/*/" + savedPolicy)
	if len(saved) > 0 || err != nil {
		return fmt.Errorf("%q are left", saved)
	}
	return nil
}

// sceneCompose brings a project up with a value of the decrypted environment.
func sceneCompose(ctx context.Context, l *lab) error {
	if err := os.MkdirAll("/var/lib/marks", 0o777); err != nil {
		return err
	}
	if err := l.importProbe(ctx); err != nil {
		return err
	}
	const secret = "canary $HOME \"'#\\n\nlast"
	c := &Compose{Config: l.cfg, Dir: "/tmp/dstack", Runner: l.sup, NeverPull: true, Env: map[string]string{"SECRET": secret}}
	if err := c.Write("services:\n  web:\n    image: probe:1\n    network_mode: none\n    command: [/probe, /marks/mark]\n    environment: {S: '${SECRET}'}\n    volumes: ['/var/lib/marks:/marks']\n"); err != nil {
		return err
	}
	// While compose is at work, nothing but the container has the value.
	stop, seen := make(chan struct{}), make(chan string)
	go func() {
		for {
			if where := l.canary("canary"); where != "" {
				seen <- where
				return
			}
			select {
			case <-stop:
				seen <- ""
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	err := c.Up(ctx)
	close(stop)
	if where := <-seen; where != "" {
		return fmt.Errorf("the secret is in %s", where)
	}
	if err != nil {
		return err
	}
	var info struct{ Config struct{ Env []string } }
	if err := l.engine.json(ctx, http.MethodGet, "/containers/dstack-web-1/json", nil, &info); err != nil || !slices.Contains(info.Config.Env, "S="+secret) {
		return fmt.Errorf("the container has %q, %v", info.Config.Env, err)
	}
	// An image that is not there is not fetched.
	if err := c.Write("services:\n  web:\n    image: other:1\n    pull_policy: always\n"); err != nil {
		return err
	}
	if err := c.Up(ctx); fault.Code(err) != "compose_failed" || !strings.Contains(err.Error(), "No such image") {
		return fmt.Errorf("an image outside of the lock: %w", err)
	}
	return nil
}

// canary looks for a text in the arguments and environments of all processes but
// the container's.
func (l *lab) canary(text string) string {
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		if comm, _ := os.ReadFile(p + "/comm"); strings.TrimSpace(string(comm)) == "probe" {
			continue
		}
		for _, f := range []string{"/cmdline", "/environ"} {
			if data, _ := os.ReadFile(p + f); bytes.Contains(data, []byte(text)) {
				return p + f
			}
		}
	}
	return ""
}

// sceneLoseDaemon ends the daemon as a crash would.
func sceneLoseDaemon(ctx context.Context, l *lab) error {
	procs, _ := filepath.Glob("/proc/[0-9]*/comm")
	killed := 0
	for _, p := range procs {
		if comm, _ := os.ReadFile(p); strings.TrimSpace(string(comm)) == "dockerd" {
			var pid int
			if _, err := fmt.Sscanf(p, "/proc/%d/comm", &pid); err != nil {
				return err
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				return err
			}
			killed++
		}
	}
	if killed != 1 {
		return fmt.Errorf("%d daemons", killed)
	}
	return waitFor(ctx, func() bool { return l.engine.Restarts() == 1 && l.engine.Ping(ctx) == nil }, "the daemon to come back")
}

// The real engine and its compose: a value reaches the container and no process
// list; an image that is not in the store is not fetched, whatever the file says.
func TestComposeInTheRealEngine(t *testing.T) {
	root, probe := builtRoot(t), buildProbe(t)
	data := newLabData(t)
	bootLab(t, root, data, probe, "compose with a secret")
	bootLab(t, root, data, probe, "lose the daemon")
}

func newLabData(t *testing.T) string {
	t.Helper()
	data := t.TempDir()
	for _, dir := range []string{"docker", "containerd"} {
		if err := os.MkdirAll(filepath.Join(data, dir), 0o710); err != nil {
			t.Fatal(err)
		}
	}
	return data
}

// A container with restart: always starts with the daemon, before any gate. Held
// against the real engine: without Disarm it does, with it it does not.
func TestThreat_J04_RestartedContainerWaitsForTheGates(t *testing.T) {
	root, probe := builtRoot(t), buildProbe(t)
	t.Run("with a lock no container and no image of an earlier boot stays", func(t *testing.T) {
		data := newLabData(t)
		if n := bootLab(t, root, data, probe, "make a container that always restarts"); n != 1 {
			t.Fatalf("the container ran %d times", n)
		}
		n := bootLab(t, root, data, probe, "start without gates")
		if n < 2 {
			t.Fatalf("the engine does not start it: this test shows nothing (%d)", n)
		}
		if got := bootLab(t, root, data, probe, "start with a lock"); got != n {
			t.Fatalf("the container ran %d times before the gates", got-n)
		}
	})
	t.Run("as upstream it starts after the gates", func(t *testing.T) {
		data := newLabData(t)
		bootLab(t, root, data, probe, "make a container that always restarts")
		// A boot that ends between Disarm and Rearm loses no policy.
		bootLab(t, root, data, probe, "stop after disarming")
		bootLab(t, root, data, probe, "start as upstream")
	})
}

// fakeContainers lays out containers as an attacker's earlier boot might have.
func fakeContainers(t *testing.T, files map[string]string) (data, dir string) {
	t.Helper()
	data = t.TempDir()
	dir = filepath.Join(data, "docker/containers")
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return data, dir
}

func idOf(digit string) string { return strings.Repeat(digit, 64) }

func TestDisarmReadsAsTheEngineDoes(t *testing.T) {
	for name, c := range map[string]struct {
		text   string
		policy string // "" when it has none
		gone   bool   // the container's directory is deleted
	}{
		"always":                       {`{"Binds":["a:b"],"RestartPolicy":{"Name":"always","MaximumRetryCount":0},"Memory":9007199254740993}`, "always", false},
		"on-failure":                   {`{"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":3}}`, "on-failure", false},
		"no":                           {`{"RestartPolicy":{"Name":"no"}}`, "", false},
		"none":                         {`{}`, "", false},
		"another case":                 {`{"restartPOLICY":{"name":"always"}}`, "always", false},
		"a letter that folds":          {`{"Re\u017ftartPolicy":{"Name":"always"}}`, "always", false},
		"named twice":                  {`{"RestartPolicy":{"Name":"no"},"restartpolicy":{"Name":"unless-stopped"}}`, "unless-stopped", false},
		"not JSON":                     {`{"RestartPolicy":{"Name":"always"}`, "", true},
		"another type":                 {`{"RestartPolicy":"always"}`, "", true},
		"a list":                       {`[]`, "", true},
		"with a second value after it": {`{} {"RestartPolicy":{"Name":"always"}}`, "", true},
		"too large":                    {`{"x":"` + strings.Repeat("x", maxHostConfig) + `"}`, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			data, dir := fakeContainers(t, map[string]string{idOf("a") + "/" + hostConfigFile: c.text})
			g, err := Disarm(data, false)
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(filepath.Join(dir, idOf("a"), hostConfigFile))
			if gone := errors.Is(err, os.ErrNotExist); gone != c.gone || gone != (len(g.Removed) == 1) {
				t.Fatalf("gone %v, removed %q, %v", gone, g.Removed, err)
			}
			if g.Policies[idOf("a")].Name != c.policy {
				t.Fatalf("policies %v", g.Policies)
			}
			if c.gone {
				return
			}
			var after struct {
				RestartPolicy RestartPolicy
				Memory        json.Number
			}
			if err := json.Unmarshal(text, &after); err != nil || after.RestartPolicy.restarts() {
				t.Fatalf("after: %s, %v", text, err)
			}
			if strings.Contains(c.text, "Memory") && after.Memory != "9007199254740993" {
				t.Errorf("another field changed: %s", text)
			}
			// A second boot that ends before Rearm still knows the policy.
			if again, err := Disarm(data, false); err != nil || again.Policies[idOf("a")] != g.Policies[idOf("a")] {
				t.Fatalf("again %+v, %v", again, err)
			}
		})
	}
}

// What the daemon would have started is started after the gates, and no more.
func TestDisarmKnowsWhatWouldHaveStarted(t *testing.T) {
	for _, c := range []struct {
		policy, state string
		want          bool
	}{
		{"always", `{"HasBeenManuallyStopped":true,"State":{"Running":false}}`, true},
		{"unless-stopped", `{"HasBeenManuallyStopped":false,"State":{"Running":true}}`, true},
		{"unless-stopped", `{"HasBeenManuallyStopped":true,"State":{"Running":false}}`, false},
		{"on-failure", `{"State":{"Running":true}}`, true},
		{"on-failure", `{"State":{"Running":false}}`, false},
		{"always", `not JSON`, false},
	} {
		data, _ := fakeContainers(t, map[string]string{
			idOf("a") + "/" + hostConfigFile: `{"RestartPolicy":{"Name":"` + c.policy + `"}}`, idOf("a") + "/" + stateFile: c.state,
		})
		if g, err := Disarm(data, false); err != nil || g.starting[idOf("a")] != c.want {
			t.Errorf("%s with %s: %v, %v", c.policy, c.state, g, err)
		}
	}
}

// A container that would not have started, and one that cannot be, do not end a boot.
func TestRearmStartsNoMore(t *testing.T) {
	f, client := newFake(t)
	dir := t.TempDir()
	g := &Gates{Policies: map[string]RestartPolicy{"c1": {Name: "always"}}, starting: map[string]bool{}, dir: dir}
	if err := g.Rearm(context.Background(), client, "dstack"); err != nil {
		t.Fatal(err)
	}
	started := func() bool {
		return slices.ContainsFunc(f.calls, func(c string) bool { return strings.HasSuffix(c, "/containers/c1/start") })
	}
	if started() {
		t.Error("a container was started that would not have been")
	}
	g.starting["c1"] = true
	if err := g.Rearm(context.Background(), client, "dstack"); err != nil || !started() || len(g.NotStarted) != 1 {
		t.Errorf("%v, started %v, %q", err, started(), g.NotStarted)
	}
}

func TestDisarmFollowsNothing(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside.json")
	const armed = `{"RestartPolicy":{"Name":"always"}}`
	if err := os.WriteFile(outside, []byte(armed), 0o600); err != nil {
		t.Fatal(err)
	}
	data, dir := fakeContainers(t, map[string]string{
		idOf("a") + "/" + hostConfigFile: armed, idOf("b") + "/x": "", idOf("d") + "/x": "",
		"evil/" + hostConfigFile: armed, "file": "x",
	})
	for link, target := range map[string]string{
		idOf("b") + "/" + hostConfigFile: outside,                                  // a file outside
		idOf("c"):                        idOf("a"),                                // a container twice
		idOf("d") + "/" + hostConfigFile: "../" + idOf("a") + "/" + hostConfigFile, // a file inside
	} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	g, err := Disarm(data, false)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(g.Removed)
	if want := []string{idOf("b"), idOf("c"), idOf("d"), "evil", "file"}; !slices.Equal(g.Removed, want) {
		t.Errorf("removed %q, want %q", g.Removed, want)
	}
	if text, err := os.ReadFile(outside); err != nil || string(text) != armed {
		t.Errorf("a file outside is now %q, %v", text, err)
	}
	if len(g.Policies) != 1 {
		t.Errorf("policies %v", g.Policies)
	}
}

func TestDisarmRefusesALinkedDirectory(t *testing.T) {
	for _, target := range []string{t.TempDir(), "volumes"} {
		data := t.TempDir()
		if err := os.MkdirAll(filepath.Join(data, "docker/volumes"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(data, "docker/containers")); err != nil {
			t.Fatal(err)
		}
		if _, err := Disarm(data, false); fault.Code(err) != "container_state" {
			t.Errorf("linked to %s: %v", target, err)
		}
	}
}

func TestDisarmOfANewDisk(t *testing.T) {
	for _, data := range []string{t.TempDir(), newLabData(t)} {
		if g, err := Disarm(data, true); err != nil || len(g.Policies)+len(g.Removed) != 0 {
			t.Fatal(g, err)
		}
	}
}

// Plugins and a swarm start containers too; a compose file knows neither.
func TestDisarmWithALockDropsPluginsAndSwarm(t *testing.T) {
	for locked, want := range map[bool]int{true: 0, false: 2} {
		data := t.TempDir()
		for _, dir := range []string{"docker/plugins/x", "docker/swarm/worker"} {
			if err := os.MkdirAll(filepath.Join(data, dir), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Disarm(data, locked); err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadDir(filepath.Join(data, "docker"))
		if err != nil || len(left) != want {
			t.Errorf("locked %v: %v, %v", locked, left, err)
		}
	}
}

func FuzzDisarm(f *testing.F) {
	for _, s := range []string{`{"RestartPolicy":{"Name":"always"}}`, `{}`, `null`, `{"RestartPolicy":null}`, `{"restartpolicy":{"name":"always"},"RestartPolicy":{}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		data, dir := fakeContainers(t, map[string]string{idOf("a") + "/" + hostConfigFile: string(text)})
		if _, err := Disarm(data, false); err != nil {
			t.Fatal(err)
		}
		after, err := os.ReadFile(filepath.Join(dir, idOf("a"), hostConfigFile))
		if errors.Is(err, os.ErrNotExist) {
			return
		}
		// As the engine reads it: the first value of the file.
		var engine struct{ RestartPolicy RestartPolicy }
		if json.NewDecoder(bytes.NewReader(after)).Decode(&engine) == nil && engine.RestartPolicy.restarts() {
			t.Fatalf("%q is still armed: %q", text, after)
		}
	})
}
