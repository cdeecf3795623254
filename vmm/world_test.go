// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/process"
	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/vmm/qemu"
	"go.uber.org/goleak"
)

// roleEnv makes the test binary play another program: the VMM, to be killed, or
// the simulated TEE.
const (
	roleEnv  = "DSTACK_VMM_TEST_ROLE"
	crashEnv = "DSTACK_VMM_TEST_CRASH"
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "vmm":
		runVMM()
	case "tee":
		runTEE()
	default:
		if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
			panic("started as a helper without its role")
		}
		goleak.VerifyTestMain(m)
	}
}

// testConfig is the configuration of a state directory, in this and other processes.
func testConfig(dir string) Config {
	c := DefaultConfig()
	c.StateDir = dir
	c.CVM.Accel = "tcg"
	c.CVM.TEEHelper = os.Args[0]
	c.CVM.MinFreeDisk = 1 << 20
	c.CVM.Networking.Egress = egressOpen
	if err := c.Check(); err != nil {
		panic(err)
	}
	return c
}

// runTEE stands for dstack-simtee: it notes each start in its state directory and
// answers on its socket.
func runTEE() {
	arg := func(name string) string {
		for i, a := range os.Args {
			if a == name && i+1 < len(os.Args) {
				return os.Args[i+1]
			}
		}
		panic("no " + name)
	}
	check := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if os.Args[1] == "pki" {
		check(os.MkdirAll(arg("--out"), 0o700))
		check(os.WriteFile(filepath.Join(arg("--out"), "dev-roots.json"), []byte("{}"), 0o644))
		os.Exit(0)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	f, err := os.OpenFile(filepath.Join(arg("--state"), "starts"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	check(err)
	fmt.Fprintf(f, "%d\n", os.Getpid())
	l, err := net.Listen("unix", arg("--socket"))
	check(err)
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "tee "+r.URL.Path) }))
	<-stop
	os.Exit(0)
}

// runVMM serves the state directory named in argv until it is killed, by itself if so
// asked: at the n-th point where a crash would matter.
func runVMM() {
	c := testConfig(os.Args[1])
	var opt Options
	opt.args = loopArgs(os.Args[2])
	opt.childEnv = []string{roleEnv + "=tee"}
	opt.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	left := 0
	fmt.Sscan(os.Getenv(crashEnv), &left)
	if left > 0 {
		points := make(chan string)
		opt.crash = func(point string) { points <- point }
		go func() {
			for p := range points {
				fmt.Println("point", p)
				if left--; left == 0 {
					syscall.Kill(os.Getpid(), syscall.SIGKILL)
				}
			}
		}()
	}
	s, err := Open(c, opt)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	l, err := s.Listen()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("listening")
	s.Serve(context.Background(), l)
}

// Boot sectors. Each runs in real mode at 0x7c00 after SeaBIOS.
var (
	// mov si,text; lodsb; test al,al; jz +; mov dx,3f8; out; jmp; then code, then text
	codeHalt     = []byte{0xfa, 0xf4, 0xeb, 0xfc}                               // cli; hlt; jmp
	codePowerOff = []byte{0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xeb, 0xfe} // out 0x604 (PM1a control), SLP_EN
	codeReset    = []byte{0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe}                   // out 0x64, 0xfe
	codeFlood    = []byte{0xba, 0xf8, 0x03, 0xb0, 'x', 0xee, 0xeb, 0xfd}        // out 0x3f8 for ever
)

// bootDisk makes a disk whose boot sector prints text on the serial port and then
// runs code.
func bootDisk(t testing.TB, text string, code []byte) string {
	t.Helper()
	const head = 24
	at := 0x7c00 + head + len(code)
	prog := []byte{0x31, 0xc0, 0x8e, 0xd8, 0xfc, 0xbe, byte(at), byte(at >> 8), // xor ax,ax; mov ds,ax; cld; mov si,text
		0xac, 0x84, 0xc0, 0x74, 0x06, // lodsb; test al,al; jz +6
		0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // mov dx,3f8; out dx,al; jmp lodsb
		0x90, 0x90, 0x90, 0x90, 0x90}
	prog = append(append(append(prog, code...), text...), 0)
	if len(prog) > 510 {
		t.Fatal("boot sector too long")
	}
	disk := make([]byte, 1<<20)
	copy(disk, prog)
	disk[510], disk[511] = 0x55, 0xaa
	path := filepath.Join(t.TempDir(), "boot.img")
	if err := os.WriteFile(path, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// loopArgs builds QEMU's real arguments, but boots a disk instead of the image.
func loopArgs(disk string) func(qemu.Spec) ([]string, error) {
	return func(s qemu.Spec) ([]string, error) {
		s.Rootfs = disk
		args, err := (&qemu.Binary{Version: qemu.Version{Major: 10}}).Args(s)
		if err != nil {
			return nil, err
		}
		var out []string
		for i := 0; i < len(args); i++ {
			switch args[i] {
			case "-bios", "-kernel", "-initrd", "-append":
				i++
			default:
				out = append(out, args[i])
			}
		}
		return out, nil
	}
}

// makeImage writes a release directory that osimage.Load accepts.
func makeImage(t testing.TB, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	root := bytes.Repeat([]byte("root"), 1024)
	tree, hash, err := verity.Tree(bytes.NewReader(root), int64(len(root)))
	if err != nil {
		t.Fatal(err)
	}
	var disk bytes.Buffer
	content := append(root, tree...)
	if err := gpt.Write(&disk, gpt.Content{Data: bytes.NewReader(content), Size: int64(len(content))}, gpt.Content{}); err != nil {
		t.Fatal(err)
	}
	meta, _ := json.Marshal(map[string]any{"bios": "ovmf.fd", "kernel": "bzImage", "initrd": "initramfs.cpio.gz", "rootfs": "rootfs.img.parted.verity",
		"cmdline": fmt.Sprintf("console=ttyS0 dstack.rootfs_hash=%x dstack.rootfs_size=%d", hash, len(root)), "version": "0.1.0", "flavour": "sim", "is_dev": true})
	files := map[string][]byte{"ovmf.fd": []byte("firmware"), "bzImage": []byte("kernel"), "initramfs.cpio.gz": []byte("initrd"), "metadata.json": meta}
	sums := ""
	for _, name := range []string{"ovmf.fd", "bzImage", "initramfs.cpio.gz", "metadata.json"} {
		sums += fmt.Sprintf("%x  %s\n", sha256.Sum256(files[name]), name)
	}
	files["sha256sum.txt"] = []byte(sums)
	files["digest.txt"] = fmt.Appendf(nil, "%x\n", sha256.Sum256([]byte(sums)))
	files["rootfs.img.parted.verity"] = disk.Bytes()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

const imageName = "dstack-sim-0.1.0"

// world is a state directory with an image, and at most one VMM on it.
type world struct {
	t      testing.TB
	config Config
	opt    Options
	server *Server
	client *prpc.Client
	http   *http.Client
	stop   func() error
}

func newWorld(t testing.TB, disk string) *world {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("SKIP: no qemu-system-x86_64 on this machine")
	}
	dir, err := os.MkdirTemp("", "vmm") // short, for socket names
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, config: testConfig(dir)}
	makeImage(t, filepath.Join(dir, "images", imageName))
	w.opt = Options{Version: "0.0.0", args: loopArgs(disk), childEnv: []string{roleEnv + "=tee"}}
	if os.Getenv("VMM_TEST_LOG") != "" {
		w.opt.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	sock := filepath.Join(dir, "vmm.sock")
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sock)
	}}
	w.http = &http.Client{Transport: tr}
	w.client = &prpc.Client{BaseURL: "http://vmm/prpc", HTTP: w.http}
	t.Cleanup(func() {
		w.close()
		for _, id := range w.dirs() { // whatever a failed test left
			for _, slot := range []interface{ Holder() (*process.ID, error) }{qemuSlot(w.dir(id)), teeSlot(w.dir(id))} {
				if p, _ := slot.Holder(); p != nil {
					p.Signal(syscall.SIGKILL)
					for range 100 {
						if !p.Running() {
							break
						}
						time.Sleep(20 * time.Millisecond)
					}
				}
			}
		}
		os.RemoveAll(dir)
	})
	return w
}

func (w *world) open() *world {
	w.t.Helper()
	s, err := Open(w.config, w.opt)
	if err != nil {
		w.t.Fatal(err)
	}
	l, err := s.Listen()
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	w.server = s
	w.stop = func() error {
		cancel()
		return errors.Join(<-served, s.Close())
	}
	return w
}

// close stops the VMM in good order.
func (w *world) close() {
	w.t.Helper()
	if w.stop != nil {
		if err := w.stop(); err != nil {
			w.t.Error(err)
		}
		w.stop, w.server = nil, nil
	}
}

func (w *world) dir(id string) string { return filepath.Join(w.config.StateDir, "vms", id) }

func (w *world) dirs() (out []string) {
	entries, _ := os.ReadDir(filepath.Join(w.config.StateDir, "vms"))
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func (w *world) call(method string, req, resp proto.Message) error {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	return w.client.Call(ctx, method, req, resp)
}

func (w *world) do(method, id string) error {
	return w.call(method, &vmmpb.Id{Id: id}, &emptypb.Empty{})
}

func (w *world) must(method, id string) {
	w.t.Helper()
	if err := w.do(method, id); err != nil {
		w.t.Fatalf("%s: %v", method, err)
	}
}

const compose = `{"manifest_version":2,"name":"app","runner":"docker-compose","docker_compose_file":"services: {}"}`

func request() *vmmpb.VmConfiguration {
	return &vmmpb.VmConfiguration{Name: "app", Image: imageName, ComposeFile: compose, Memory: 128, DiskSize: 1}
}

func (w *world) create(req *vmmpb.VmConfiguration) (string, error) {
	var id vmmpb.Id
	err := w.call("CreateVm", req, &id)
	return id.Id, err
}

func (w *world) mustCreate(req *vmmpb.VmConfiguration) string {
	w.t.Helper()
	id, err := w.create(req)
	if err != nil {
		w.t.Fatal(err)
	}
	return id
}

func (w *world) info(id string) *vmmpb.VmInfo {
	w.t.Helper()
	var out vmmpb.GetInfoResponse
	if err := w.call("GetInfo", &vmmpb.Id{Id: id}, &out); err != nil {
		w.t.Fatal(err)
	}
	if !out.Found {
		return nil
	}
	return out.Info
}

// until polls for something that must come true.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("not in time: %s", what)
		}
	}
}

func (w *world) untilStatus(id, status string) {
	w.t.Helper()
	last := ""
	w.until(fmt.Sprintf("VM %s is %s", id, status), func() bool {
		if info := w.info(id); info != nil {
			last = info.Status
		} else {
			last = "gone"
		}
		return last == status
	})
}

func (w *world) holders(id string) (q, tee *process.ID) {
	w.t.Helper()
	q, err1 := qemuSlot(w.dir(id)).Holder()
	tee, err2 := teeSlot(w.dir(id)).Holder()
	if err := errors.Join(err1, err2); err != nil {
		w.t.Fatal(err)
	}
	return q, tee
}

func (w *world) get(path string) (int, string) {
	w.t.Helper()
	res, err := w.http.Get("http://vmm" + path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(b)
}

func (w *world) wantStopped(id string) {
	w.t.Helper()
	if q, tee := w.holders(id); q != nil || tee != nil {
		w.t.Fatalf("processes left: QEMU %v, TEE %v", q, tee)
	}
}

// strays returns this machine's processes whose command line names the state
// directory or work in it.
func (w *world) strays() (out []string) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err == nil && strings.HasPrefix(cwd, w.config.StateDir+"/") {
			out = append(out, e.Name()+" in "+cwd)
		}
	}
	return out
}
