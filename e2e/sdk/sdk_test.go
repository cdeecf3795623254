// SPDX-License-Identifier: Apache-2.0

// Package sdk runs the published SDKs of upstream, unchanged, against `dstack
// simulator`: npm @phala/dstack-sdk and PyPI dstack-sdk, each with the exact versions
// of its lock file. What a package registry is needed for once lies in the user's
// cache afterwards, by the lock file's hash; a registry that cannot be reached is a
// skip that says so, never a pass.
package sdk

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/testkit"
)

var bin string // holds dstack and dstack-simtee

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "dstack-sdk-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", dir+"/", "./cmd/dstack", "./cmd/dstack-simtee")
	build.Dir = testkit.Root()
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Printf("build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// simulator is a running `dstack simulator`.
type simulator struct {
	cmd    *exec.Cmd
	first  string            // line of its output
	env    map[string]string // what it tells the shell to export
	http   string
	stderr bytes.Buffer
	exited chan error
}

func start(t *testing.T, state string, args ...string) *simulator {
	t.Helper()
	s := &simulator{env: map[string]string{}, exited: make(chan error, 1)}
	s.cmd = exec.Command(filepath.Join(bin, "dstack"), append([]string{"simulator"}, args...)...)
	s.cmd.Env = append(os.Environ(), "DSTACK_STATE="+state, "TMPDIR="+shortDir(t))
	s.cmd.Stderr = &s.stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		line := lines.Text()
		if s.first == "" {
			s.first = line
		}
		if text, ok := strings.CutPrefix(line, "export "); ok {
			name, value, _ := strings.Cut(text, "=")
			s.env[name] = value
		}
		if text, ok := strings.CutPrefix(line, "# over HTTP: "); ok {
			s.http = text
			break
		}
	}
	go func() {
		_, _ = io.Copy(io.Discard, out)
		s.exited <- s.cmd.Wait()
	}()
	t.Cleanup(func() { s.cmd.Process.Kill(); <-s.exited; s.exited <- nil })
	if s.http == "" {
		s.cmd.Process.Kill()
		<-s.exited
		s.exited <- nil
		t.Fatalf("the simulator did not start: %s", &s.stderr)
	}
	return s
}

// stop ends the simulator by a signal and returns how it went.
func (s *simulator) stop(t *testing.T, signal syscall.Signal) error {
	t.Helper()
	if err := s.cmd.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-s.exited:
		s.exited <- nil
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("the simulator did not stop")
		return nil
	}
}

// shortDir is a directory whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sdk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// cached returns a directory that was filled once for the files named, by what they
// contain. fill works in a directory of its own, which takes its place when whole.
func cached(t *testing.T, kind string, files []string, fill func(dir string) error) string {
	t.Helper()
	base, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(h, "%d\n", len(text))
		h.Write(text)
	}
	dir := filepath.Join(base, "dstack", "sdk", kind+"-"+hex.EncodeToString(h.Sum(nil))[:16])
	if _, err := os.Stat(filepath.Join(dir, "complete")); err == nil {
		return dir
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "complete")); err == nil {
		return dir // while we waited
	}
	if err := os.RemoveAll(dir); err != nil { // an earlier run was cut off
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := fill(dir); err != nil {
		os.RemoveAll(dir)
		t.Skipf("SKIP: the %s packages of the SDK cannot be fetched, so the published SDK was NOT tested: %v", kind, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "complete"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("SKIP: no %s on this machine, so the published SDK was NOT tested; run scripts/host-packages.sh", program)
	}
	return path
}

// fetch runs a program that asks a package registry, for a bounded time.
func fetch(dir, program string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.WaitDelay = dir, 5*time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", filepath.Base(program), args[0], err, tail(out))
	}
	return nil
}

func tail(out []byte) []byte { return out[max(0, len(out)-4000):] }

// drive runs a test program of an SDK against a new simulator.
func drive(t *testing.T, dir, program string, args ...string) {
	t.Helper()
	compose := filepath.Join(t.TempDir(), "docker-compose.yaml")
	if err := os.WriteFile(compose, []byte("services:\n  web:\n    image: nginx\n    # naïve – 世界\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := start(t, shortDir(t), "--http", "127.0.0.1:0", "--compose", compose)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.WaitDelay = dir, 5*time.Second
	cmd.Env = append(os.Environ(), "SDK_HTTP="+s.http, "SDK_VECTORS="+testkit.VectorPath(t, "."))
	for name, value := range s.env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s\nthe simulator said: %s", err, out, &s.stderr)
	}
	t.Logf("%s", tail(out))
	if err := s.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("the simulator ended with %v: %s", err, &s.stderr)
	}
}

func TestJavaScriptSDK(t *testing.T) {
	node, npm := need(t, "node"), need(t, "npm")
	source := filepath.Join(testkit.Root(), "e2e", "sdk", "js")
	files := []string{filepath.Join(source, "package.json"), filepath.Join(source, "package-lock.json")}
	dir := cached(t, "npm", files, func(dir string) error {
		for _, name := range files {
			text, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), text, 0o644); err != nil {
				return err
			}
		}
		return fetch(dir, npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	})
	// Modules are looked for beside the file that imports them.
	work := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "node_modules"), filepath.Join(work, "node_modules")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(source, "sdk.test.mjs"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(work, "sdk.test.mjs"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	drive(t, work, node, "--test", "--test-concurrency=1", "sdk.test.mjs")
}

func TestPythonSDK(t *testing.T) {
	python := need(t, "python3")
	source := filepath.Join(testkit.Root(), "e2e", "sdk", "python")
	requirements := filepath.Join(source, "requirements.txt")
	dir := cached(t, "python", []string{requirements}, func(dir string) error {
		if err := fetch(dir, python, "-m", "venv", "venv"); err != nil {
			return err
		}
		return fetch(dir, filepath.Join(dir, "venv", "bin", "pip"), "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "-r", requirements)
	})
	drive(t, source, filepath.Join(dir, "venv", "bin", "python"), "-B", "sdk_test.py")
}

// The simulator itself.

func post(t *testing.T, socket, method string) map[string]any {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST http://x/%s HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", method)
	text, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := bytes.Cut(text, []byte("\r\n\r\n"))
	var v map[string]any
	if err := json.Unmarshal(body, &v); err != nil {
		t.Fatalf("%s: %v in %s", method, err, text)
	}
	return v
}

func TestTheSimulatorSaysWhatItIsWorthAndKeepsItsKeys(t *testing.T) {
	state := shortDir(t)
	var key any
	for i, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGINT} {
		args := []string{"--http", "127.0.0.1:0"}
		if i == 2 {
			args = append(args, "--fresh")
		}
		s := start(t, state, args...)
		if !strings.HasPrefix(s.first, "# development") {
			t.Errorf("the first line is %q", s.first)
		}
		socket := s.env["DSTACK_SIMULATOR_ENDPOINT"]
		got := post(t, socket, "GetKey")["key"]
		switch {
		case i == 0:
			key = got
		case (got == key) != (i == 1):
			t.Errorf("run %d has the key %v, the first had %v", i, got, key)
		}
		info, err := os.Stat(socket)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("socket: %v, %v", info.Mode(), err)
		}
		if err := s.stop(t, signal); err != nil {
			t.Errorf("%v: %v, %s", signal, err, &s.stderr)
		}
		for _, path := range s.env {
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s is left behind", path)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(s.cmd.Env[len(s.cmd.Env)-1][len("TMPDIR="):], "*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	seed, err := os.Stat(filepath.Join(state, "simulator", "seed"))
	if err != nil || seed.Mode().Perm() != 0o600 || seed.Size() != 32 {
		t.Errorf("seed: %v, %v", seed, err)
	}
	// Threat E06: a seed that others can read is refused.
	if err := os.Chmod(filepath.Join(state, "simulator", "seed"), 0o644); err != nil {
		t.Fatal(err)
	}
	refuse(t, state, "simulator_seed")
}

// refuse runs a simulator that must not start.
func refuse(t *testing.T, state, code string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "dstack"), append([]string{"--json", "simulator"}, args...)...)
	cmd.Env = append(os.Environ(), "DSTACK_STATE="+state, "TMPDIR="+shortDir(t))
	out, err := cmd.Output()
	var reply struct{ Code, Fix string }
	if json.Unmarshal(out, &reply); err == nil || reply.Code != code || reply.Fix == "" {
		t.Errorf("%v: %v, %s; want code %s", args, err, out, code)
	}
}

func TestTheSimulatorLeavesOthersSocketsAlone(t *testing.T) {
	state, dir := shortDir(t), shortDir(t)
	s := start(t, state, "--http", "127.0.0.1:0")
	refuse(t, state, "socket_in_use")
	if post(t, s.env["DSTACK_SIMULATOR_ENDPOINT"], "Version")["version"] == nil {
		t.Error("the first simulator is disturbed")
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	refuse(t, state, "socket_path", "--socket", file, "--tappd", filepath.Join(dir, "t"))
	if text, err := os.ReadFile(file); err != nil || string(text) != "x" {
		t.Errorf("the file is now %q, %v", text, err)
	}
	refuse(t, state, "simulator_address", "--http", "0.0.0.0:0")
	// What a dead run left is replaced.
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	start(t, shortDir(t), "--http", "127.0.0.1:0", "--socket", stale)
	if post(t, stale, "Version")["version"] == nil {
		t.Error("no answer on the replaced socket")
	}
}

// The simulated TEE ends with the simulator, however that ends.
func TestAKilledSimulatorTakesItsTEEAlong(t *testing.T) {
	s := start(t, shortDir(t), "--http", "127.0.0.1:0")
	children := func() []string {
		out, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", s.cmd.Process.Pid, s.cmd.Process.Pid))
		all := strings.Fields(string(out))
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.cmd.Process.Pid))
		for _, task := range tasks {
			out, _ := os.ReadFile(task)
			all = append(all, strings.Fields(string(out))...)
		}
		return all
	}()
	if len(children) == 0 {
		t.Skip("SKIP: this kernel does not list children")
	}
	s.cmd.Process.Kill()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + children[0] + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %s lives on: %s", children[0], stat)
		}
	}
}
