// SPDX-License-Identifier: Apache-2.0

// Command boot measures how long it takes from `dstack deploy` to the first HTTP
// answer of an app, and what memory the guest uses, beside a peer in the same
// run: Debian 13's cloud kernel with Debian's docker, under the same QEMU with the
// same machine, firmware, processor, memory and app image. Runs alternate.
//
// The peer has the easier part: no quote, no event log, no encrypted disk, no
// verity, no firewall, no host API; its clock starts with QEMU, ours with the
// command.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// sample is one boot.
type sample struct {
	HTTP   float64 `json:"first_http_seconds"`
	CPU    float64 `json:"qemu_cpu_seconds"` // of QEMU until that answer
	Before int     `json:"memory_before_engine_kib"`
	App    int     `json:"memory_app_up_kib"`
	// Listed is what of Before was free, but on the list of a processor: the peer says so.
	Listed int `json:"memory_before_engine_listed_kib,omitempty"`
}

var (
	runs     = flag.Int("runs", 5, "boots of each side, alternating")
	peerDir  = flag.String("peer", "", "directory that peer.sh made; without it only ours is booted")
	dstack   = flag.String("dstack", "bin/dstack", "our tool; its stack must be up")
	state    = flag.String("state", "", "state directory of the stack")
	hello    = flag.String("hello", "bin/hello", "the app, a static binary")
	firmware = flag.String("firmware", "", "firmware for the peer; ours by default")
	qemu     = flag.String("qemu", "qemu-system-x86_64", "QEMU")
	accel    = flag.String("accel", "tcg", "accelerator of both sides")
	out      = flag.String("out", "", "also write the samples as JSON")
)

func main() {
	flag.Parse()
	ours, peers := []sample{}, []sample{}
	for i := range *runs {
		s, err := ourBoot()
		if err != nil {
			log.Fatalf("ours, run %d: %v", i+1, err)
		}
		ours = append(ours, s)
		if *peerDir == "" {
			fmt.Printf("run %d: ours %.1f s, CPU %.1f s, memory %d and %d KiB\n", i+1, s.HTTP, s.CPU, s.Before, s.App)
			continue
		}
		p, err := peerBoot()
		if err != nil {
			log.Fatalf("peer, run %d: %v", i+1, err)
		}
		peers = append(peers, p)
		fmt.Printf("run %d: ours %.1f s, CPU %.1f s; peer %.1f s, CPU %.1f s\n", i+1, s.HTTP, s.CPU, p.HTTP, p.CPU)
	}
	if len(peers) == 0 {
		return
	}
	row := func(what, unit string, scale float64, get func(sample) float64) {
		o, p := spread(ours, get), spread(peers, get)
		fmt.Printf("%-24s %8.1f %8.1f %8.1f   %8.1f %8.1f %8.1f %s   ratio of medians %.2f\n",
			what, o[0]/scale, o[1]/scale, o[2]/scale, p[0]/scale, p[1]/scale, p[2]/scale, unit, o[1]/p[1])
	}
	listed := spread(peers, func(s sample) float64 { return float64(s.Listed) / 1024 })
	fmt.Printf("%-24s %26s   %26s\n", "", "ours: min median max", "peer: min median max")
	row("first HTTP", "s", 1, func(s sample) float64 { return s.HTTP })
	row("QEMU's CPU until then", "s", 1, func(s sample) float64 { return s.CPU })
	row("memory, before engine", "MiB", 1024, func(s sample) float64 { return float64(s.Before) })
	row("memory, app up", "MiB", 1024, func(s sample) float64 { return float64(s.App) })
	fmt.Printf("%-24s %26s   %8.1f %8.1f %8.1f MiB\n", "of the former, listed", "", listed[0], listed[1], listed[2])
	if *out != "" {
		data, _ := json.MarshalIndent(map[string]any{"ours": ours, "peer": peers}, "", "  ")
		if err := os.WriteFile(*out, append(data, '\n'), 0o644); err != nil {
			log.Fatal(err)
		}
	}
}

func spread(list []sample, get func(sample) float64) [3]float64 {
	var v []float64
	for _, s := range list {
		v = append(v, get(s))
	}
	slices.Sort(v)
	return [3]float64{v[0], v[len(v)/2], v[len(v)-1]}
}

func tool(args ...string) *exec.Cmd {
	if *state != "" {
		args = append([]string{"--state", *state}, args...)
	}
	return exec.Command(*dstack, args...)
}

func ourBoot() (s sample, err error) {
	port, err := freePort()
	if err != nil {
		return s, err
	}
	_ = tool("rm", "--force", "bench").Run()
	defer func() { _ = tool("rm", "--force", "bench").Run() }()
	began := time.Now()
	deploy := tool("deploy", "-c", "examples/hello/docker-compose.yaml", "-n", "bench", "--key-provider", "none", "--app-image", "hello:1="+*hello,
		"--port", fmt.Sprintf("%d:8080", port), "--lock", filepath.Join(os.TempDir(), "dstack-bench.lock.json"))
	var errs bytes.Buffer
	deploy.Stderr = &errs
	if err := deploy.Start(); err != nil {
		return s, err
	}
	done := make(chan error, 1)
	go func() { done <- deploy.Wait() }()
	if s.HTTP, err = firstAnswer(port, began); err != nil {
		return s, fmt.Errorf("%w\n%s", err, errs.String())
	}
	if s.CPU, err = ourCPU(); err != nil {
		return s, err
	}
	if err := <-done; err != nil {
		return s, fmt.Errorf("deploy: %w\n%s", err, errs.String())
	}
	console, err := tool("logs", "-n", "2000", "bench").Output()
	if err != nil {
		return s, err
	}
	s.Before, s.App, _ = memoryLines(string(console))
	return s, nil
}

// ourCPU finds the VM of the stack, which is the only one, by its working directory.
func ourCPU() (float64, error) {
	root, err := filepath.EvalSymlinks(*state)
	if err != nil {
		return 0, err
	}
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		return 0, err
	}
	for _, link := range links {
		dir, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(dir, filepath.Join(root, "vms")+"/") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link)))
		if err != nil {
			return 0, err
		}
		if name, err := os.ReadFile(filepath.Join(filepath.Dir(link), "comm")); err == nil && strings.HasPrefix(string(name), "qemu") {
			return cpuOf(pid)
		}
	}
	return 0, fmt.Errorf("no QEMU runs below %s", root)
}

// cpuOf returns the CPU seconds of a process, which tell two boots apart on a machine
// with other work, where the clock does not.
func cpuOf(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold anything; utime and stime are 14 and 15.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	var ticks float64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return ticks / 100, nil // USER_HZ, on every Linux that Go knows
}

var memoryLine = regexp.MustCompile(`memory (\S+) used_kib=(\d+)(?: listed_kib=(\d+))?`)

func memoryLines(console string) (before, app, listed int) {
	for _, m := range memoryLine.FindAllStringSubmatch(console, -1) {
		n, _ := strconv.Atoi(m[2])
		switch m[1] {
		case "before-engine":
			before = n
			listed, _ = strconv.Atoi(m[3])
		case "app-up":
			app = n
		}
	}
	return before, app, listed
}

func firstAnswer(port int, began time.Time) (float64, error) {
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for time.Since(began) < 4*time.Minute {
		resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return time.Since(began).Seconds(), nil
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	return 0, fmt.Errorf("no answer within 4 minutes")
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// helloImage is the app as an image of one layer.
func helloImage() (v1.Image, error) {
	binary, err := os.ReadFile(*hello)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return tarOf("app", binary) })
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	return mutate.ConfigFile(img, withEntrypoint(img))
}

func peerBoot() (s sample, err error) {
	dir, err := os.MkdirTemp("", "dstack-bench-peer-")
	if err != nil {
		return s, err
	}
	defer os.RemoveAll(dir)
	// httptest listens on loopback, which the guest reaches as 10.0.2.2.
	reg := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer reg.Close()
	u, err := url.Parse(reg.URL)
	if err != nil {
		return s, err
	}
	img, err := helloImage()
	if err != nil {
		return s, err
	}
	ref, err := name.ParseReference(u.Host+"/hello:1", name.Insecure)
	if err != nil {
		return s, err
	}
	if err := remote.Write(ref, img); err != nil {
		return s, err
	}
	digest, err := img.Digest()
	if err != nil {
		return s, err
	}
	compose, err := os.ReadFile("examples/hello/docker-compose.yaml")
	if err != nil {
		return s, err
	}
	composeDisk := filepath.Join(dir, "compose.img")
	if err := os.WriteFile(composeDisk, append(compose, make([]byte, 4096-len(compose)%4096)...), 0o600); err != nil {
		return s, err
	}
	dataDisk := filepath.Join(dir, "data.img")
	f, err := os.Create(dataDisk)
	if err != nil {
		return s, err
	}
	if err := f.Truncate(10 << 30); err != nil {
		return s, err
	}
	f.Close()
	port, err := freePort()
	if err != nil {
		return s, err
	}
	bios := *firmware
	if bios == "" {
		found, _ := filepath.Glob(filepath.Join(*state, "images", "*", "ovmf.fd"))
		if len(found) == 0 {
			return s, fmt.Errorf("no firmware under %s; give -firmware", *state)
		}
		bios = found[0]
	}
	serial := filepath.Join(dir, "serial.log")
	disk := func(file, id string, ro bool) []string {
		mode := "off"
		if ro {
			mode = "on"
		}
		return []string{"-drive", "file=" + file + ",if=none,id=" + id + ",format=raw,readonly=" + mode, "-device", "virtio-blk-pci,drive=" + id}
	}
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35", "-accel", *accel, "-cpu", "max", "-smp", "1", "-m", "1024M",
		"-bios", bios, "-kernel", filepath.Join(*peerDir, "vmlinuz"), "-initrd", filepath.Join(*peerDir, "initrd.cpio"),
		"-append", fmt.Sprintf("console=ttyS0 panic=-1 quiet loglevel=3 net.ifnames=0 peer.registry=10.0.2.2:%s peer.image=hello@%s peer.tag=hello:1", u.Port(), digest),
		"-chardev", "file,id=com0,path=" + serial, "-serial", "chardev:com0", "-device", "virtio-rng-pci",
		"-netdev", fmt.Sprintf("user,id=net0,ipv6=off,hostfwd=tcp:127.0.0.1:%d-:8080", port), "-device", "virtio-net-pci,netdev=net0,romfile="}
	args = append(args, disk(filepath.Join(*peerDir, "root.squashfs"), "root", true)...)
	args = append(args, disk(dataDisk, "data", false)...)
	args = append(args, disk(composeDisk, "compose", true)...)
	began := time.Now()
	cmd := exec.Command(*qemu, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		return s, err
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	if s.HTTP, err = firstAnswer(port, began); err != nil {
		text, _ := os.ReadFile(serial)
		return s, fmt.Errorf("%w\n%s\n%s", err, errs.String(), text)
	}
	if s.CPU, err = cpuOf(cmd.Process.Pid); err != nil {
		return s, err
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline) && s.App == 0; time.Sleep(100 * time.Millisecond) {
		text, _ := os.ReadFile(serial)
		s.Before, s.App, s.Listed = memoryLines(strings.ReplaceAll(string(text), "\r", ""))
	}
	return s, nil
}
