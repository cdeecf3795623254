// SPDX-License-Identifier: Apache-2.0

// Package e2e holds the tests that boot real VMs: one local stack, one engine VM
// that most tests share, and short boots of altered images beside it.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/prpc"
)

// world is the stack that the tests of this package share.
type world struct {
	bin, state, image string
	reached           int // a port of loopback that guests may reach
}

var shared world

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Getenv("DSTACK_E2E") == "off" {
		fmt.Println("SKIP: VM tests are switched off by DSTACK_E2E=off")
		return 0
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		fmt.Println("VM tests need QEMU: run scripts/host-packages.sh")
		return 1
	}
	dir, err := os.MkdirTemp("", "dstack-e2e-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	shared = world{bin: filepath.Join(dir, "bin"), state: filepath.Join(dir, "state")}
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", shared.bin+"/", "./cmd/...")
	build.Dir = testkit.Root()
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Printf("build: %v\n%s", err, out)
		return 1
	}
	// The stack's KMS and gateway are ones for development: their TEE is simulated.
	for _, name := range []string{"dstack-kms", "dstack-gateway"} {
		build = exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags", "dstack_sim", "-o", filepath.Join(shared.bin, name+"-dev"), "./cmd/"+name)
		build.Dir = testkit.Root()
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Printf("build: %v\n%s", err, out)
			return 1
		}
	}
	defer func() {
		down := exec.Command(filepath.Join(shared.bin, "dstack"), "--state", shared.state, "down")
		if out, err := down.CombinedOutput(); err != nil {
			fmt.Printf("down: %v\n%s", err, out)
		}
		if left, err := os.ReadDir(shared.state); err == nil {
			fmt.Printf("down left %d entries in its state directory\n", len(left))
		}
		os.RemoveAll(dir)
	}()
	if shared.reached, err = freePort(); err != nil {
		fmt.Println(err)
		return 1
	}
	up := exec.Command(filepath.Join(shared.bin, "dstack"), "--state", shared.state, "--json", "up", "--guest-reaches", fmt.Sprintf("127.0.0.1:%d/tcp", shared.reached))
	up.Dir = testkit.Root()
	up.Stderr = os.Stderr
	if out, err := up.Output(); err != nil {
		fmt.Printf("up: %v\n%s", err, out)
		return 1
	}
	images, err := os.ReadDir(filepath.Join(shared.state, "images"))
	if err != nil || len(images) != 1 {
		fmt.Printf("images: %v %v\n", images, err)
		return 1
	}
	shared.image = images[0].Name()
	return m.Run()
}

func (w world) imageDir() string { return filepath.Join(w.state, "images", w.image) }
func (w world) devRoots() string { return filepath.Join(w.state, "dev-pki", "dev-roots.json") }

// result is one finished command.
type result struct {
	stdout, stderr string
	code           int
}

// dstack runs the tool on the shared stack.
func dstack(t testing.TB, args ...string) result {
	t.Helper()
	cmd := exec.Command(filepath.Join(shared.bin, "dstack"), append([]string{"--state", shared.state}, args...)...)
	cmd.Dir = testkit.Root()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// must fails the test when the command failed.
func (r result) must(t testing.TB) result {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("exit %d\nstdout:\n%s\nstderr:\n%s", r.code, r.stdout, r.stderr)
	}
	return r
}

// refused fails the test unless the command failed with the given code and
// named a fix.
func (r result) refused(t testing.TB, code string) result {
	t.Helper()
	if r.code == 0 {
		t.Fatalf("it succeeded, want %s\n%s%s", code, r.stdout, r.stderr)
	}
	if !strings.Contains(r.stderr, "["+code+"]") {
		t.Fatalf("want code %s\nstdout:\n%s\nstderr:\n%s", code, r.stdout, r.stderr)
	}
	if !strings.Contains(r.stderr, "fix:") {
		t.Fatalf("%s names no fix:\n%s", code, r.stderr)
	}
	return r
}

// verdict is what the tests read of a verdict's JSON.
type verdict struct {
	Accepted  bool   `json:"accepted"`
	Undecided bool   `json:"undecided"`
	Trust     string `json:"trust"`
	Channel   string `json:"channel"`
	Hops      []struct {
		Role     string `json:"role"`
		Accepted bool   `json:"accepted"`
	} `json:"hops"`
	Findings []struct {
		Level, Code, Message, Evidence string
	} `json:"findings"`
}

func (v verdict) codes(level string) []string {
	var out []string
	for _, f := range v.Findings {
		if f.Level == level {
			out = append(out, f.Code)
		}
	}
	return out
}

// verify runs dstack verify and reads its verdict.
func verify(t testing.TB, args ...string) (verdict, int) {
	t.Helper()
	r := dstack(t, append([]string{"--json", "verify"}, args...)...)
	var v verdict
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil {
		t.Fatalf("verdict: %v\nstdout:\n%s\nstderr:\n%s", err, r.stdout, r.stderr)
	}
	return v, r.code
}

// wantRefused demands a refusal whose errors include the code.
func wantRefused(t testing.TB, v verdict, exit int, code string) {
	t.Helper()
	if v.Accepted || exit != 1 {
		t.Fatalf("accepted=%v exit=%d, want a refusal with %s", v.Accepted, exit, code)
	}
	for _, got := range v.codes("error") {
		if got == code {
			return
		}
	}
	t.Fatalf("want error %s, got %v", code, v.Findings)
}

// deployed is the app that tests share.
type deployed struct {
	ID          string   `json:"id"`
	AppID       string   `json:"app_id"`
	ComposeHash string   `json:"compose_hash"`
	Lock        string   `json:"lock"`
	AttestURL   string   `json:"attest_url"`
	URLs        []string `json:"urls"`
	httpURL     string
}

var hello = sync.OnceValues(func() (deployed, error) {
	dir := filepath.Dir(shared.bin)
	binary := filepath.Join(dir, "hello")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", binary, "./examples/hello")
	build.Dir = testkit.Root()
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return deployed{}, fmt.Errorf("build hello: %v\n%s", err, out)
	}
	port, err := freePort()
	if err != nil {
		return deployed{}, err
	}
	cmd := exec.Command(filepath.Join(shared.bin, "dstack"), "--state", shared.state, "--json", "deploy",
		"-c", "examples/hello/docker-compose.yaml", "-n", "hello", "--image", shared.image, "--port", fmt.Sprintf("%d:8080", port),
		"--app-image", "hello:1="+binary, "--lock", filepath.Join(dir, "hello.lock.json"),
		// Its manifest runs on altered images, too, to which a KMS gives nothing.
		"--key-provider", "none")
	cmd.Dir = testkit.Root()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return deployed{}, fmt.Errorf("deploy: %v\n%s%s", err, out.String(), errOut.String())
	}
	var d deployed
	if err := json.Unmarshal(out.Bytes(), &d); err != nil {
		return d, err
	}
	d.httpURL = fmt.Sprintf("http://127.0.0.1:%d/", port)
	// Compose has started the container; its process may not listen yet.
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		_, err := get(d.httpURL)
		if err == nil {
			return d, nil
		}
		if time.Now().After(deadline) {
			return d, fmt.Errorf("the app does not answer: %w", err)
		}
	}
})

// helloApp returns the shared app, deploying it the first time.
func helloApp(t testing.TB) deployed {
	t.Helper()
	d, err := hello()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// get fetches a URL and returns its body.
func get(url string) (string, error) {
	client := &http.Client{Timeout: 20 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, body)
	}
	return string(body), err
}

// socketClient reaches a unix socket whatever host the URL names.
func socketClient(path string) *http.Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
}

// vmm is a client of the shared stack's VMM.
func vmm() *prpc.Client {
	return &prpc.Client{BaseURL: "http://vmm/prpc", HTTP: socketClient(filepath.Join(shared.state, "vmm.sock"))}
}

// vmInfo returns what the VMM says of a VM.
func vmInfo(t testing.TB, id string) *vmmpb.VmInfo {
	t.Helper()
	var resp vmmpb.GetInfoResponse
	if err := vmm().Call(context.Background(), "GetInfo", &vmmpb.Id{Id: id}, &resp); err != nil {
		t.Fatal(err)
	}
	if !resp.Found {
		t.Fatalf("VM %s is gone", id)
	}
	return resp.Info
}

// console returns the console log of a VM.
func console(t testing.TB, id string) string {
	t.Helper()
	return dstack(t, "logs", "-n", "2000", id).must(t).stdout
}
