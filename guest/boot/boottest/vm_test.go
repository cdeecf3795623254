// SPDX-License-Identifier: Apache-2.0

// Package boottest boots the guest of this tree in QEMU, by hand: without the VMM,
// with a small host of its own. It has tests only.
package boottest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/api/hostapi"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/hostlink"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

// The environment variables of these tests.
const (
	// imageEnv is the directory of a built image, whose kernel and root are used;
	// init is built from this tree. Without it the tests are skipped.
	imageEnv = "DSTACK_TEST_IMAGE"
	// lockEnv names a file that is locked while a VM runs, where several people
	// share a machine.
	lockEnv = "DSTACK_VM_LOCK"
	// keepEnv names a directory for console logs.
	keepEnv = "DSTACK_TEST_LOGS"
)

// built holds what all tests of the package share.
type built struct {
	image, initramfs, simtee, pki string
	hello                         v1.Image
}

var (
	buildOnce sync.Once
	shared    built
	buildErr  error
	sharedDir string
)

func TestMain(m *testing.M) {
	code := m.Run()
	if sharedDir != "" {
		os.RemoveAll(sharedDir)
	}
	os.Exit(code)
}

func setup(t *testing.T) *built {
	t.Helper()
	image := os.Getenv(imageEnv)
	if image == "" {
		t.Skipf("SKIP: %s is not set to the directory of a built image", imageEnv)
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("SKIP: %v", err)
	}
	buildOnce.Do(func() { buildErr = build(image) })
	if buildErr != nil {
		t.Fatal(buildErr)
	}
	return &shared
}

func goBuild(out, pkg, tags string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-tags", tags, "-ldflags", "-s -w -buildid=", "-o", out, pkg)
	cmd.Dir = testkit.Root()
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, text)
	}
	return nil
}

func build(image string) error {
	dir, err := os.MkdirTemp("", "dstack-boottest-")
	if err != nil {
		return err
	}
	sharedDir = dir
	guest, app := filepath.Join(dir, "dstack-guest"), filepath.Join(dir, "hello")
	shared = built{image: image, initramfs: filepath.Join(dir, "initramfs"), simtee: filepath.Join(dir, "dstack-simtee"), pki: filepath.Join(dir, "pki")}
	for _, b := range [][3]string{{guest, "./cmd/dstack-guest", "dstack_sim"}, {shared.simtee, "./cmd/dstack-simtee", ""}, {app, "./examples/hello", ""}} {
		if err := goBuild(b[0], b[1], b[2]); err != nil {
			return err
		}
	}
	init, err := os.ReadFile(guest)
	if err != nil {
		return err
	}
	if err := os.WriteFile(shared.initramfs, initramfs(init), 0o644); err != nil {
		return err
	}
	if out, err := exec.Command(shared.simtee, "pki", "--out", shared.pki).CombinedOutput(); err != nil {
		return fmt.Errorf("simtee pki: %w\n%s", err, out)
	}
	shared.hello, err = appImage(app)
	return err
}

// initramfs is a cpio archive (newc) of directories, the console and /init.
func initramfs(init []byte) []byte {
	var b bytes.Buffer
	entry := func(name string, mode, major, minor int, data []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", b.Len()+1, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
		b.WriteString(name + "\x00")
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
		b.Write(data)
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	for _, dir := range []string{"dev", "proc", "sys", "run", "newroot"} {
		entry(dir, unix.S_IFDIR|0o755, 0, 0, nil)
	}
	entry("dev/console", unix.S_IFCHR|0o600, 5, 1, nil)
	entry("init", unix.S_IFREG|0o755, 0, 0, init)
	entry("TRAILER!!!", 0, 0, 0, nil)
	return b.Bytes()
}

// appImage is a one-layer image of a static program.
func appImage(program string) (v1.Image, error) {
	data, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(tarOf("app", data))), nil })
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Config.Entrypoint = "linux", "amd64", []string{"/app"}
	return mutate.ConfigFile(img, cfg)
}

// vm is one machine to boot. The zero value plus a manifest is the good case.
type vm struct {
	draft   manifest.Draft
	files   hostshare.Files // further files of the blob
	raw     []byte          // instead of the blob that files make
	network *hostshare.Network
	dhcp    bool
	cmdline func(string) string // changes the command line
	root    string              // other root disk
	noTEE   bool                // serve no tee stream
	noLink  bool                // no hostlink port at all
	noID    bool                // launch commits to nothing
	wrongID bool                // launch commits to another document
	noData  bool                // no data disk
	memory  int                 // MiB
	netdev  string              // instead of slirp
	rtc     time.Time           // what the RTC shows at the start; zero for the truth
}

// running is a booted machine and its host.
type running struct {
	t       *testing.T
	link    *hostlink.Link
	begin   time.Time
	exited  chan struct{}
	ports   map[int]int
	console *consoleLog
	pid     int

	mu     sync.Mutex
	events []event
}

// cpu returns the processor time that QEMU has used: what a boot costs, whatever
// else the machine does.
func (r *running) cpu() time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	var user, system int64
	if f := strings.Fields(rest); len(f) > 12 {
		fmt.Sscan(f[11], &user)
		fmt.Sscan(f[12], &system)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

type event struct {
	at, cpu       time.Duration // since the start of QEMU; used by it
	name, payload string
}

type consoleLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (c *consoleLog) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.text.Len() < 4<<20 {
		c.text.Write(p)
	}
	return len(p), nil
}

func (c *consoleLog) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

const composeText = `services:
  web:
    image: hello:1
    environment:
      GREETING: hello from the boot test
    ports:
      - "8080:80"
    restart: unless-stopped
`

func no() *bool { f := false; return &f }

// goodDraft is the manifest that our deploy would write for the hello app.
func goodDraft(b *built, t *testing.T) manifest.Draft {
	t.Helper()
	digest, err := b.hello.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return manifest.Draft{
		Name: "hello", DockerComposeFile: composeText, KeyProvider: "none", SecureTime: no(),
		PortPolicy:  &manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 8080}}},
		ImagePolicy: "digest", ImageLock: map[string]string{"hello:1": digest.String()},
	}
}

func (v vm) start(t *testing.T, b *built) *running {
	t.Helper()
	dir := t.TempDir()
	unlock := lockVM(t)
	t.Cleanup(unlock)

	var meta struct{ Kernel, Cmdline, Rootfs, Bios string }
	text, err := os.ReadFile(filepath.Join(b.image, "metadata.json"))
	must(t, err)
	must(t, json.Unmarshal(text, &meta))
	cmdline := meta.Cmdline
	if v.cmdline != nil {
		cmdline = v.cmdline(cmdline)
	}
	root := filepath.Join(b.image, meta.Rootfs)
	if v.root != "" {
		root = v.root
	}

	app, err := manifest.Build(v.draft)
	must(t, err)
	m, err := manifest.Parse(app)
	must(t, err)
	doc := mrconfig.Document{ComposeHash: m.Hash(), KeyProvider: m.KeyProviderKind()}
	committed := doc.Bytes()
	id := mrconfig.IDv3(committed)
	if v.noID {
		id = dstack.MRConfigID{}
	}
	if v.wrongID {
		id[5] ^= 1
	}
	network := &hostshare.Network{}
	must(t, json.Unmarshal([]byte(`{"address":"10.0.2.15/24","gateway":"10.0.2.2","dns":["10.0.2.3"]}`), network))
	if v.network != nil {
		network = v.network
	}
	if v.dhcp {
		network = nil
	}
	sys, err := (&hostshare.SysConfig{MRConfig: string(committed), VMConfig: `{"spec_version":1}`, Network: network}).Encode()
	must(t, err)
	files := hostshare.Files{hostshare.AppComposeName: app, hostshare.SysConfigName: sys}
	for name, data := range v.files {
		files[name] = data
	}
	blob, err := hostshare.Write(files)
	must(t, err)
	if v.raw != nil {
		blob = v.raw
	}
	must(t, os.WriteFile(filepath.Join(dir, "shared.tar"), blob, 0o600))
	data, err := os.Create(filepath.Join(dir, "data.img"))
	must(t, err)
	must(t, data.Truncate(4<<30))
	data.Close()

	memory := 1024
	if v.memory > 0 {
		memory = v.memory
	}
	kernel := filepath.Join(b.image, meta.Kernel)
	launch, err := json.Marshal(map[string]any{
		"firmware": filepath.Join(b.image, meta.Bios), "kernel": kernel, "initrd": b.initramfs, "cmdline": cmdline,
		"vcpus": 1, "memory_bytes": memory << 20, "mr_config_id": id, "debug": false,
	})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "launch.json"), launch, 0o600))
	teeSock := filepath.Join(dir, "tee.sock")
	if !v.noTEE {
		startSimtee(t, b, dir, teeSock)
	}

	r := &running{t: t, exited: make(chan struct{}), ports: map[int]int{}, console: &consoleLog{}}
	netdev := v.netdev
	if netdev == "" {
		netdev = "user,id=n,ipv6=off"
		for _, port := range []int{8080, 8081, 8090} {
			r.ports[port] = freePort(t)
			netdev += fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%d-:%d", r.ports[port], port)
		}
	}
	linkSock := filepath.Join(dir, "link.sock")
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", fmt.Sprint(memory),
		"-kernel", kernel, "-initrd", b.initramfs, "-append", cmdline, "-serial", "stdio",
		"-drive", "file=" + root + ",if=none,id=r,format=raw,readonly=on", "-device", "virtio-blk-pci,drive=r,serial=dstack-root",
		"-drive", "file=" + filepath.Join(dir, "shared.tar") + ",if=none,id=s,format=raw,readonly=on", "-device", "virtio-blk-pci,drive=s,serial=dstack-shared",
		"-netdev", netdev, "-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci",
	}
	if !v.noData {
		args = append(args, "-drive", "file="+filepath.Join(dir, "data.img")+",if=none,id=d,format=raw,cache=unsafe", "-device", "virtio-blk-pci,drive=d,serial=dstack-data")
	}
	if !v.rtc.IsZero() {
		args = append(args, "-rtc", "base="+v.rtc.UTC().Format("2006-01-02T15:04:05"))
	}
	if !v.noLink {
		args = append(args, "-device", "virtio-serial-pci", "-chardev", "socket,id=c,path="+linkSock+",server=on,wait=off",
			"-device", "virtserialport,chardev=c,name="+hostlink.PortName)
	}
	cmd := exec.Command("qemu-system-x86_64", args...)
	cmd.Stdout, cmd.Stderr = r.console, r.console
	r.begin = time.Now()
	must(t, cmd.Start())
	r.pid = cmd.Process.Pid
	go func() {
		cmd.Wait()
		close(r.exited)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-r.exited
		if keep := os.Getenv(keepEnv); keep != "" {
			_ = os.MkdirAll(keep, 0o755)
			_ = os.WriteFile(filepath.Join(keep, strings.ReplaceAll(t.Name(), "/", "_")+".log"), []byte(r.console.String()), 0o644)
		}
		if t.Failed() {
			t.Logf("console:\n%s\nevents: %v", r.console, r.noted())
		}
	})
	if !v.noLink {
		r.serve(b, linkSock, teeSock, v.noTEE)
	}
	return r
}

func startSimtee(t *testing.T, b *built, dir, socket string) {
	t.Helper()
	cmd := exec.Command(b.simtee, "run", "--launch", filepath.Join(dir, "launch.json"), "--pki", b.pki, "--state", filepath.Join(dir, "tee"), "--socket", socket)
	out, err := cmd.StdoutPipe()
	must(t, err)
	var failure bytes.Buffer
	cmd.Stderr = &failure
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line := make([]byte, 6)
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "ready\n" {
		t.Fatalf("simtee: %q %v\n%s", line, err, failure.String())
	}
}

// serve is the host: notifications, the registry, the way to the TEE.
func (r *running) serve(b *built, socket, tee string, noTEE bool) {
	r.link = hostlink.NewHostLink(hostlink.DialUnix(socket), hostlink.Options{})
	r.t.Cleanup(func() { r.link.Close() })
	listen := func(stream string) net.Listener {
		l, err := r.link.Listen(stream)
		must(r.t, err)
		return l
	}
	api := prpc.NewMux([]string{"HostApi."}, prpc.Unary("Notify", func(_ context.Context, n *hostapi.Notification) (*emptypb.Empty, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.events = append(r.events, event{time.Since(r.begin), r.cpu(), n.Event, n.Payload})
		return nil, nil
	}))
	go prpc.Server(api).Serve(listen(hostlink.StreamHostAPI))

	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := &http.Server{Handler: reg}
	local, err := net.Listen("tcp", "127.0.0.1:0")
	must(r.t, err)
	go server.Serve(local)
	r.t.Cleanup(func() { server.Close() })
	digest, err := b.hello.Digest()
	must(r.t, err)
	ref, err := name.NewDigest(local.Addr().String()+"/app@"+digest.String(), name.Insecure)
	must(r.t, err)
	must(r.t, remote.Write(ref, b.hello))
	go server.Serve(listen(hostlink.StreamRegistry))

	if !noTEE {
		l := listen(hostlink.StreamTEE)
		go func() {
			for {
				from, err := l.Accept()
				if err != nil {
					return
				}
				go bridge(from, tee)
			}
		}()
	}
}

func bridge(from net.Conn, path string) {
	defer from.Close()
	to, err := net.Dial("unix", path)
	if err != nil {
		return
	}
	defer to.Close()
	done := make(chan struct{}, 2)
	for _, p := range [][2]net.Conn{{from, to}, {to, from}} {
		go func() {
			io.Copy(p[0], p[1])
			done <- struct{}{}
		}()
	}
	<-done
}

func (r *running) noted() []event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

// payloads returns the payloads of one kind of notification, in order.
func (r *running) payloads(name string) []string {
	var out []string
	for _, e := range r.noted() {
		if e.name == name {
			out = append(out, e.payload)
		}
	}
	return out
}

// waitOff waits until the machine has ended by itself.
func (r *running) waitOff(limit time.Duration) {
	r.t.Helper()
	select {
	case <-r.exited:
	case <-time.After(limit):
		r.t.Fatalf("the machine is not off after %s", limit)
	}
}

// get asks the app until it answers.
func (r *running) get(port int, limit time.Duration) (string, time.Duration) {
	r.t.Helper()
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(30 * time.Millisecond) {
		select {
		case <-r.exited:
			r.t.Fatal("the machine ended")
		default:
		}
		resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/", r.ports[port]))
		if err != nil {
			continue
		}
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		resp.Body.Close()
		return string(body), time.Since(r.begin)
	}
	r.t.Fatalf("no answer from port %d within %s", port, limit)
	return "", 0
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lockVM takes the machine-wide lock, if there is one.
func lockVM(t *testing.T) (unlock func()) {
	t.Helper()
	path := os.Getenv(lockEnv)
	if path == "" {
		return func() {}
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	must(t, err)
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	return func() { f.Close() }
}

func tarOf(name string, data []byte) []byte {
	var b bytes.Buffer
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000755\x00")
	copy(h[108:], "0000000\x00")
	copy(h[116:], "0000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00", len(data)))
	copy(h[136:], "00000000000\x00")
	h[156] = '0'
	copy(h[257:], "ustar\x0000")
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	b.Write(h)
	b.Write(data)
	b.Write(make([]byte, (512-len(data)%512)%512+1024))
	return b.Bytes()
}
