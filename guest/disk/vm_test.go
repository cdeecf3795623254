// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/guest/disk/nbdtest"
)

// The tests in a VM: the kernel of a built image, an initramfs with this test binary
// as init, and disks served by nbdtest. All scenarios of guest_test.go share one
// boot. The environment variables are those of guest/boot/boottest.
const (
	imageEnv = "DSTACK_TEST_IMAGE"
	lockEnv  = "DSTACK_VM_LOCK"
	keepEnv  = "DSTACK_TEST_LOGS"
	controls = "disk.test"
)

// exports are the disks of the VM, by serial, in bytes.
var exports = map[string]int64{
	"small": 192 << 20, "disk": 256 << 20, "large": 384 << 20, "huge": 10 << 30, "vol1": 64 << 20, "vol2": 64 << 20,
}

func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guestMain()
	}
	os.Exit(m.Run())
}

// outcome is what the scenarios said, by name.
type outcome struct {
	lines   map[string]string
	console string
	err     error
}

var inVM = sync.OnceValue(func() outcome { return boot("", "") })

// scenario reports how the named scenario went in the VM, which is booted once.
func scenario(t *testing.T, names ...string) {
	t.Helper()
	needVM(t)
	o := inVM()
	check(t, o, names...)
}

func check(t *testing.T, o outcome, names ...string) {
	t.Helper()
	if o.err != nil {
		t.Fatalf("VM: %v\n%s", o.err, o.console)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			switch line, ran := o.lines[name]; {
			case !ran:
				t.Fatalf("it did not run\n%s", o.console)
			case strings.HasPrefix(line, "SKIP"):
				t.Skip(line)
			case !strings.HasPrefix(line, "ok"):
				t.Fatalf("%s\n%s", line, o.console)
			default:
				t.Log(line)
			}
		})
	}
}

func needVM(t *testing.T) {
	t.Helper()
	if os.Getenv(imageEnv) == "" {
		t.Skipf("SKIP: %s is not set to the directory of a built image", imageEnv)
	}
	for _, program := range []string{"qemu-system-x86_64", "ldd", "mke2fs", "e2fsck"} {
		if _, err := lookPath(program); err != nil {
			t.Skipf("SKIP: %v", err)
		}
	}
}

func lookPath(program string) (string, error) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return filepath.EvalSymlinks(path)
		}
	}
	return "", fmt.Errorf("%s is not installed", program)
}

// boot runs the scenarios whose names match only ("" all but the long ones) and
// passes the guest an argument.
func boot(only, argument string) outcome {
	var o outcome
	dir, err := os.MkdirTemp("", "dstack-disk-")
	if err != nil {
		return outcome{err: err}
	}
	defer os.RemoveAll(dir)
	if o.err = bootIn(dir, only, argument, &o); o.err == nil && o.lines["end"] == "" {
		o.err = fmt.Errorf("the scenarios did not come to an end")
	}
	return o
}

func bootIn(dir, only, argument string, o *outcome) error {
	initramfs, err := makeInitramfs(dir)
	if err != nil {
		return err
	}
	if path := os.Getenv(lockEnv); path != "" {
		lock, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
			return err
		}
	}
	socket, port := filepath.Join(dir, "nbd"), filepath.Join(dir, "control")
	server, err := nbdtest.Listen(socket, exports)
	if err != nil {
		return err
	}
	defer server.Close()
	listener, err := net.Listen("unix", port)
	if err != nil {
		return err
	}
	defer listener.Close()
	go func() {
		if c, err := listener.Accept(); err == nil {
			newHost(server).serve(c)
		}
	}()
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "512",
		"-kernel", filepath.Join(os.Getenv(imageEnv), "bzImage"), "-initrd", initramfs,
		"-append", "console=ttyS0 panic=-1 quiet disk.only=" + only + " disk.argument=" + argument,
		"-serial", "stdio", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
		"-chardev", "socket,id=c,path=" + port, "-device", "virtserialport,chardev=c,name=" + controls,
	}
	for name := range exports {
		args = append(args, "-blockdev", "driver=nbd,node-name="+name+",server.type=unix,server.path="+socket+",export="+name+",discard=unmap",
			"-device", "virtio-blk-pci,drive="+name+",serial="+name)
	}
	console := &bytes.Buffer{}
	cmd := exec.Command("qemu-system-x86_64", args...)
	cmd.Stdout, cmd.Stderr = console, console
	limit := 5 * time.Minute
	if only != "" {
		limit = 30 * time.Minute
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	stop := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	err = cmd.Wait()
	stop.Stop()
	o.console, o.lines = console.String(), map[string]string{}
	if keep := os.Getenv(keepEnv); keep != "" {
		_ = os.MkdirAll(keep, 0o755)
		_ = os.WriteFile(filepath.Join(keep, "disk.log"), console.Bytes(), 0o644)
	}
	for line := range strings.Lines(o.console) {
		if _, rest, ok := strings.Cut(strings.TrimRight(line, "\r\n"), "RESULT "); ok {
			name, result, _ := strings.Cut(rest, ": ")
			o.lines[name] = result
		}
	}
	return err
}

// makeInitramfs packs this test binary and the programs that make and check file
// systems, those of the host with their libraries.
func makeInitramfs(dir string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if !static(self) {
		built := filepath.Join(dir, "init")
		cmd := exec.Command("go", "test", "-c", "-o", built, ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build the test for the guest: %w\n%s", err, out)
		}
		self = built
	}
	files := map[string]string{"init": self}
	for _, program := range []string{"mke2fs", "e2fsck", "mkfs.xfs"} {
		path, err := lookPath(program)
		if err != nil {
			continue // its scenarios skip
		}
		files["bin/"+program] = path
		out, err := exec.Command("ldd", path).Output()
		if err != nil {
			return "", fmt.Errorf("ldd %s: %w", path, err)
		}
		for _, library := range regexp.MustCompile(`/\S+`).FindAllString(string(out), -1) {
			files[strings.TrimPrefix(library, "/")] = library
		}
	}
	// A squashfs, where the host can make one.
	source := filepath.Join(dir, "source")
	if err := os.Mkdir(source, 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(source, "model"), content(11, 1<<20), 0o644); err != nil {
		return "", err
	}
	squashfs := filepath.Join(dir, "volume.squashfs")
	if exec.Command("mksquashfs", source, squashfs, "-quiet", "-no-progress", "-noD", "-noF", "-no-fragments").Run() == nil {
		files["volume.squashfs"] = squashfs
	}
	var b bytes.Buffer
	seen := map[string]bool{}
	for _, d := range []string{"dev", "proc", "sys", "tmp", "mnt", "mnt2"} {
		cpioEntry(&b, d, unix.S_IFDIR|0o755, 0, nil)
		seen[d] = true
	}
	for name, path := range files {
		for i := range name {
			if d := name[:i]; name[i] == '/' && !seen[d] {
				cpioEntry(&b, d, unix.S_IFDIR|0o755, 0, nil)
				seen[d] = true
			}
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		cpioEntry(&b, name, unix.S_IFREG|0o755, 0, data)
	}
	cpioEntry(&b, "dev/console", unix.S_IFCHR|0o600, 5<<8|1, nil)
	cpioEntry(&b, "TRAILER!!!", 0, 0, nil)
	path := filepath.Join(dir, "initramfs")
	return path, os.WriteFile(path, b.Bytes(), 0o600)
}

func static(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}

// cpioEntry appends a file in the newc format.
func cpioEntry(b *bytes.Buffer, name string, mode, device int, data []byte) {
	fmt.Fprintf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		b.Len()+1, mode, 0, 0, 1, 0, len(data), 0, 0, device>>8, device&0xff, len(name)+1, 0)
	b.WriteString(name + "\x00")
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
	b.Write(data)
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

// host does what the guest's scenarios ask a hostile host to do: one command per
// line, one answer per line.
type host struct {
	server *nbdtest.Server
	stores map[string]*nbdtest.Store
	reads  map[string]int
	mu     sync.Mutex
}

func newHost(s *nbdtest.Server) *host {
	return &host{server: s, stores: map[string]*nbdtest.Store{}, reads: map[string]int{}}
}

func (h *host) serve(c net.Conn) {
	defer c.Close()
	for lines := bufio.NewScanner(c); lines.Scan(); {
		answer, err := h.do(strings.Fields(lines.Text()))
		if err != nil {
			answer = "error " + err.Error()
		}
		if _, err := io.WriteString(c, answer+"\n"); err != nil {
			return
		}
	}
}

func (h *host) do(f []string) (string, error) {
	if len(f) < 2 {
		return "", fmt.Errorf("short command")
	}
	n := make([]int64, len(f))
	for i := range f {
		n[i], _ = strconv.ParseInt(f[i], 0, 64)
	}
	s := h.stores[f[1]]
	if s == nil {
		s = nbdtest.NewStore()
		h.stores[f[1]] = s
	}
	switch f[0] {
	case "attach": // store export
		return "ok", h.server.Attach(f[2], s)
	case "clone": // store new
		h.stores[f[2]] = s.Clone()
	case "flip": // store at bit
		s.Flip(n[2], uint(n[3]))
	case "copy": // store from to size
		p := make([]byte, n[4])
		s.Read(n[2], p)
		s.Put(n[3], p)
	case "splice": // store source from size: the bytes of another store
		p := make([]byte, n[4])
		h.stores[f[2]].Read(n[3], p)
		s.Put(n[3], p)
	case "put": // store at hex
		p, err := hex.DecodeString(f[3])
		if err != nil {
			return "", err
		}
		s.Put(n[2], p)
	case "noise": // store from size
		p := make([]byte, n[3])
		for i := range p {
			p[i] = byte(rand.Uint32())
		}
		s.Put(n[2], p)
	case "zero": // store from size
		s.Put(n[2], make([]byte, n[3]))
	case "sum":
		return fmt.Sprintf("%x", s.Sum()), nil
	case "contains": // store hex
		p, err := hex.DecodeString(f[2])
		return fmt.Sprint(s.Contains(p)), err
	case "cut": // store seed
		s.Cut(rand.New(rand.NewPCG(uint64(n[2]), 1)))
	case "cutafter": // store writes
		s.CutAfter(int(n[2]))
	case "restore":
		s.Restore()
	case "flipflop": // store at size: other bytes at every read but the first
		var mu sync.Mutex
		seen := false
		s.OnRead(func(at int64, p []byte) {
			from, to := max(at, n[2]), min(at+int64(len(p)), n[2]+n[3])
			if from >= to {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			h.mu.Lock()
			h.reads[f[1]]++
			h.mu.Unlock()
			if seen {
				for i := from; i < to; i++ {
					p[i-at] ^= 0x5a
				}
			}
			seen = true
		})
	case "reads":
		h.mu.Lock()
		defer h.mu.Unlock()
		return strconv.Itoa(h.reads[f[1]]), nil
	case "steady":
		s.OnRead(nil)
	default:
		return "", fmt.Errorf("unknown command %q", f[0])
	}
	return "ok", nil
}
