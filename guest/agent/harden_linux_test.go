// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
)

// helperEnv makes the test binary act as a child: "run" is the agent that Spawn
// starts, "confine" tries what the filter forbids, "privileged" hardens as root.
const helperEnv = "AGENT_TEST_HELPER"

func helper(mode string) int {
	switch mode {
	case "run":
		if err := Run(context.Background(), os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, "agent:", fault.Code(err), err)
			return 3
		}
		return 0
	case "privileged":
		fmt.Println(fault.Code(Harden()))
		return 0
	case "confine":
		return confined()
	}
	return 2
}

// confined confines itself and reports every forbidden thing that worked.
func confined() int {
	// Threads that exist before the filter must get it too.
	var threads sync.WaitGroup
	start, tried := make(chan struct{}), make(chan error, 4)
	for range cap(tried) {
		threads.Add(1)
		go func() {
			runtime.LockOSThread()
			threads.Done()
			<-start
			tried <- unix.Unshare(unix.CLONE_NEWUTS)
		}()
	}
	threads.Wait()
	if err := confine(); err != nil {
		fmt.Println("confine:", err)
		return 3
	}
	failures := 0
	check := func(name string, err, want error) {
		if !errors.Is(err, want) {
			fmt.Printf("%s: %v, want %v\n", name, err, want)
			failures++
		}
	}
	eperm := func(name string, err error) { check(name, err, unix.EPERM) }
	call := func(nr uintptr, args ...uintptr) error {
		var a [6]uintptr
		copy(a[:], args)
		if _, _, errno := unix.RawSyscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			return errno
		}
		return nil
	}
	close(start)
	for range cap(tried) {
		eperm("unshare on an older thread", <-tried)
	}
	eperm("exec", exec.Command("/bin/true").Run())
	eperm("execve", unix.Exec("/bin/true", []string{"true"}, nil))
	for _, nr := range deniedCalls {
		eperm(fmt.Sprintf("system call %d", nr), call(nr))
	}
	check("clone3", call(unix.SYS_CLONE3), unix.ENOSYS)
	for _, flag := range []uintptr{unix.CLONE_NEWUSER, unix.CLONE_NEWNET, unix.CLONE_NEWNS} {
		eperm("clone into a namespace", call(unix.SYS_CLONE, flag|uintptr(unix.SIGCHLD)))
	}
	for _, family := range []int{unix.AF_VSOCK, unix.AF_ALG, unix.AF_PACKET, unix.AF_BLUETOOTH} {
		_, err := unix.Socket(family, unix.SOCK_STREAM, 0)
		eperm(fmt.Sprintf("socket family %d", family), err)
	}
	_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_ANON|unix.MAP_PRIVATE)
	eperm("executable mmap", err)
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	check("mmap", err, nil)
	eperm("executable mprotect", call(unix.SYS_MPROTECT, uintptr(unsafe.Pointer(&page[0])), 4096, unix.PROT_READ|unix.PROT_EXEC))

	dumpable, _, _ := unix.Syscall(unix.SYS_PRCTL, unix.PR_GET_DUMPABLE, 0, 0)
	nnp, _, _ := unix.Syscall6(unix.SYS_PRCTL, unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0, 0)
	var core unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_CORE, &core)
	if dumpable != 0 || nnp != 1 || core.Cur != 0 || core.Max != 0 {
		fmt.Printf("dumpable %d, no_new_privs %d, core limit %+v\n", dumpable, nnp, core)
		failures++
	}
	// What the agent does must still work, on new threads as well.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check("listen", err, nil)
	go func() {
		runtime.LockOSThread() // ends with the goroutine: a new thread each time
		if c, err := ln.Accept(); err == nil {
			c.Write([]byte("x"))
			c.Close()
		}
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	check("dial", err, nil)
	if b, _ := io.ReadAll(c); string(b) != "x" {
		fmt.Println("no answer")
		failures++
	}
	_, err = net.Interfaces()
	check("interfaces", err, nil)
	if failures > 0 {
		return 4
	}
	fmt.Println("confined")
	return 0
}

func child(t *testing.T, mode string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{helperEnv + "=" + mode}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v", mode, err)
	}
	return string(out)
}

func TestAConfinedProcessCanStartNothing(t *testing.T) {
	if out := child(t, "confine"); out != "confined\n" {
		t.Error(out)
	}
}

func TestAPrivilegedAgentDoesNotStart(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root")
	}
	if out := child(t, "privileged"); out != "agent_privileged\n" {
		t.Error(out)
	}
}

// syncLog is what a process says, to be read while it goes on.
type syncLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *syncLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *syncLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// The whole path: spawned by init as a user of its own, hardened, serving inherited
// sockets, ended with init; and no key where others may look (threats.md E06).
func TestThreat_E06_RunAsInitStartsIt(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: only root can start a process as another user")
	}
	cfg, init := config(t, testManifest)
	dir := t.TempDir()
	sock, err := initrpc.ListenUnix(filepath.Join(dir, "dstack.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ext, err := tcp.(*net.TCPListener).File()
	addr := tcp.Addr().String()
	tcp.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer ext.Close()
	var log syncLog
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p, err := initrpc.Spawn(ctx, initrpc.SpawnOptions{
		Path: "/proc/self/exe", Env: []string{helperEnv + "=run"}, UID: 990, GID: 990, Config: cfg, Init: init, Log: &log,
		Listeners: map[string]*os.File{initrpc.ListenDstack: sock, initrpc.ListenExternal: ext},
	})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Ready():
	case <-p.Done():
		t.Fatalf("agent ended: %v\n%s", p.Wait(), log.String())
	case <-time.After(20 * time.Second):
		t.Fatal("agent not ready")
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t990\t990\t990\t990", "Groups:\t \n", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("/proc/status lacks %q:\n%s", want, status)
		}
	}
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return net.Dial("unix", filepath.Join(dir, "dstack.sock"))
	}}}
	if code, body, _ := post(t, &c, "http://x/Version", "{}"); code != 200 {
		t.Errorf("Version: %d %s", code, body)
	}
	if _, spki, err := channel.FetchEvidence(ctx, "https://"+addr, nonceOf(32)); err != nil || spki == nil {
		t.Errorf("evidence: %v", err)
	}
	// Threat E06: where others may look, there are no keys.
	var got struct{ Key string }
	if code, body, _ := post(t, &c, "http://x/GetKey", `{"path":"canary"}`); code != 200 || json.Unmarshal([]byte(body), &got) != nil {
		t.Errorf("GetKey: %d %s", code, body)
	}
	app := testKeys(t)
	key, err := hex.DecodeString(got.Key)
	if err != nil || len(key) != 32 {
		t.Fatalf("key %q", got.Key)
	}
	seen := log.String()
	for _, name := range []string{"cmdline", "environ", "status"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.Pid, name))
		if err != nil {
			t.Error(err)
		}
		seen += string(text)
	}
	for _, secret := range [][]byte{key, app.App.Bytes(), app.Provider.CAKey} {
		if strings.Contains(seen, string(secret)) || strings.Contains(seen, hex.EncodeToString(secret)) {
			t.Error("a key is in the agent's command line, environment or log")
		}
	}
	if left, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.Pid)); err != nil || strings.Contains(string(left), "dstack-agent-config") {
		t.Errorf("the configuration with the keys is still mapped: %v", err)
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Pid))
	if err != nil || len(fds) == 0 {
		t.Errorf("descriptors: %v", err)
	}
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); strings.Contains(target, "dstack-agent-config") {
			t.Errorf("the configuration with the keys is still open as %s", fd)
		}
	}
	cancel() // init goes
	err = p.Wait()
	if ws := new(exec.ExitError); errors.As(err, &ws) && !ws.Sys().(syscall.WaitStatus).Signaled() {
		t.Errorf("agent ended with %v\n%s", err, log.String())
	}
}
