// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/prpc"
)

// probeEnv makes this test binary probe ports instead of testing; it runs so
// inside the namespace of TestThreat_K05.
const probeEnv = "DSTACK_E2E_PROBE"

func init() {
	if addr := os.Getenv(probeEnv); addr != "" {
		probe(addr)
		os.Exit(0)
	}
}

// reply is one answer to a connection attempt; silence is not reported.
type reply struct {
	Port   int   `json:"port"`
	Millis int64 `json:"ms"` // since 1970
	Reset  bool  `json:"reset"`
}

var probedPorts = []int{22, 2375, 5000, 8080, 8090, 9999}

// probe tries each port again and again for four minutes at most and prints every
// first answer as a JSON line.
func probe(addr string) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, port := range probedPorts {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for end := time.Now().Add(4 * time.Minute); time.Now().Before(end); {
				conn, err := net.DialTimeout("tcp", net.JoinHostPort(addr, fmt.Sprint(port)), 250*time.Millisecond)
				if err == nil {
					conn.Close()
				} else if !errors.Is(err, syscall.ECONNREFUSED) {
					continue
				}
				mu.Lock()
				line, _ := json.Marshal(reply{port, time.Now().UnixMilli(), err != nil})
				fmt.Println(string(line))
				mu.Unlock()
				return
			}
		}()
	}
	wg.Wait()
}

// Threat K05: a guest answers no packet before system-ready, and afterwards only
// on the ports of its measured policy and the agent's. Seen from the other end
// of its network interface, in a namespace of its own.
func TestThreat_K05_NoInboundPacketBeforeSystemReady(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: network namespaces need root")
	}
	app := helloApp(t)
	ns := fmt.Sprintf("dstack-e2e-%d", os.Getpid())
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	ip("netns", "add", ns)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() })
	ip("-n", ns, "link", "set", "lo", "up")
	ip("-n", ns, "tuntap", "add", "dev", "tap0", "mode", "tap")
	ip("-n", ns, "addr", "add", "10.77.0.1/24", "dev", "tap0")
	ip("-n", ns, "link", "set", "tap0", "up")

	dir, err := os.MkdirTemp("", "dstack-k05-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	// This host also starts the TEE with its debug attribute: a lie that the guest
	// cannot see and a verifier must.
	helper := filepath.Join(dir, "debug-simtee")
	script := "#!/bin/sh\n[ \"$1\" = run ] && sed -i 's/\"debug\": *false/\"debug\":true/' tee/launch.json\nexec " + filepath.Join(shared.bin, "dstack-simtee") + " \"$@\"\n"
	if err := os.WriteFile(helper, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	tool := func(args ...string) *exec.Cmd {
		cmd := exec.Command("ip", append([]string{"netns", "exec", ns, filepath.Join(shared.bin, "dstack"), "--state", dir}, args...)...)
		cmd.Env = append(os.Environ(), "DSTACK_VMM_CVM__NETWORKING__MODE=tap", "DSTACK_VMM_CVM__NETWORKING__IFNAME=tap0",
			"DSTACK_VMM_CVM__NETWORKING__ADDRESS=10.77.0.2/24", "DSTACK_VMM_CVM__NETWORKING__GATEWAY=10.77.0.1",
			"DSTACK_VMM_CVM__TEE_HELPER="+helper)
		return cmd
	}
	t.Cleanup(func() { _ = tool("down").Run() })
	if out, err := tool("up", "--image", shared.imageDir()).CombinedOutput(); err != nil {
		t.Fatalf("up: %v\n%s", err, out)
	}
	copyBlobs(t, filepath.Join(shared.state, "blobs"), filepath.Join(dir, "blobs"))

	prober := exec.Command("ip", "netns", "exec", ns, os.Args[0])
	prober.Env = append(os.Environ(), probeEnv+"=10.77.0.2")
	out, err := prober.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := prober.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = prober.Process.Kill(); _ = prober.Wait() })
	replies := make(chan reply, len(probedPorts))
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var r reply
			if json.Unmarshal(lines.Bytes(), &r) == nil {
				replies <- r
			}
		}
	}()

	client := &prpc.Client{BaseURL: "http://vmm/prpc", HTTP: socketClient(filepath.Join(dir, "vmm.sock"))}
	var id vmmpb.Id
	config := &vmmpb.VmConfiguration{Name: "k05", Image: shared.image, ComposeFile: vmInfo(t, app.ID).Configuration.ComposeFile, Vcpu: 1, Memory: 1024, DiskSize: 10}
	if err := client.Call(context.Background(), "CreateVm", config, &id); err != nil {
		t.Fatal(err)
	}
	first := map[int]reply{}
	phases := map[string]uint64{}
	for deadline := time.Now().Add(3 * time.Minute); len(first) < 2; time.Sleep(100 * time.Millisecond) {
		var info vmmpb.GetInfoResponse
		if err := client.Call(context.Background(), "GetInfo", &id, &info); err != nil {
			t.Fatal(err)
		}
		if info.Info.BootError != "" || time.Now().After(deadline) {
			text, _ := os.ReadFile(filepath.Join(dir, "vms", id.Id, "serial.log"))
			t.Fatalf("boot error %q, progress %s, replies %v\n%s", info.Info.BootError, info.Info.BootProgress, first, text)
		}
		for _, e := range info.Info.Events {
			if e.Event == "boot.progress" && phases[e.Body] == 0 {
				phases[e.Body] = e.Timestamp
			}
		}
		select {
		case r := <-replies:
			first[r.Port] = r
		default:
		}
	}
	time.Sleep(2 * time.Second)
	for len(replies) > 0 {
		r := <-replies
		first[r.Port] = r
	}
	// The guest reports a phase as it begins, in the background: so what the host
	// saw when channel-key began, the phase before system-ready, is the latest
	// moment that is surely not after system-ready.
	before := phases["channel-key"]
	if before == 0 {
		t.Fatalf("no report of channel-key in %v", phases)
	}
	for port, r := range first {
		if port != 8080 && port != 8090 {
			t.Errorf("port %d answered (reset: %v)", port, r.Reset)
		}
		if uint64(r.Millis) < before {
			t.Errorf("port %d answered %d ms before system-ready", port, before-uint64(r.Millis))
		}
	}
	checkDebugRefused(t, tool, app.Lock, filepath.Join(dir, "dev-pki", "dev-roots.json"))
}

// B01: evidence of a TEE whose memory the host can read is refused.
func checkDebugRefused(t *testing.T, tool func(...string) *exec.Cmd, lock, roots string) {
	t.Helper()
	var v verdict
	var exit *exec.ExitError
	// The agent has just been started by the first who knocked, and may take its time.
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(time.Second) {
		out, err := tool("--json", "verify", "https://10.77.0.2:8090", "--lock", lock, "--dev-roots", roots).Output()
		v = verdict{}
		if jsonErr := json.Unmarshal(out, &v); jsonErr != nil {
			t.Fatalf("%v (%v): %s", jsonErr, err, out)
		}
		if !errors.As(err, &exit) {
			t.Fatalf("a debug TEE was accepted: %s", out)
		}
		if len(v.Findings) > 0 {
			break
		}
		t.Logf("no verdict yet: %s", exit.Stderr)
		if time.Now().After(deadline) {
			t.Fatal("no verdict")
		}
	}
	wantRefused(t, v, exit.ExitCode(), "td_debug")
}

// copyBlobs gives one stack the blobs of another.
func copyBlobs(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "-a", from+"/.", to+"/").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
