// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/collect/sim"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/measure/measuretest"
	"github.com/dstack-go/dstack/simtee"
)

// asMain makes the test binary be the command, in a process that can be killed.
const asMain = "SIMTEE_TEST_AS_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asMain) != "" {
		main()
		os.Exit(0)
	}
	testscript.Main(m, map[string]func(){"dstack-simtee": main})
}

func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			// waitready SOCKET waits until something listens there.
			"waitready": func(ts *testscript.TestScript, _ bool, args []string) {
				for range 500 {
					if conn, err := net.Dial("unix", ts.MkAbs(args[0])); err == nil {
						conn.Close()
						return
					}
					time.Sleep(20 * time.Millisecond)
				}
				ts.Fatalf("nothing listens on %s", args[0])
			},
		},
		Setup: func(env *testscript.Env) error {
			_, err := writeLaunch(env.WorkDir)
			return err
		},
	})
}

// writeLaunch writes boot files and a launch file into dir.
func writeLaunch(dir string) (string, error) {
	l := measuretest.Launch()
	spec := simtee.LaunchSpec{
		Firmware: filepath.Join(dir, "firmware"), Kernel: filepath.Join(dir, "kernel"), Initrd: filepath.Join(dir, "initrd"),
		Cmdline: l.Cmdline, VCPUs: 1, MemoryBytes: l.MemoryBytes,
	}
	for path, data := range map[string][]byte{spec.Firmware: l.Firmware, spec.Kernel: l.Kernel, spec.Initrd: l.Initrd} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return "", err
		}
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "launch.json")
	return path, os.WriteFile(path, text, 0o600)
}

type process struct {
	cmd    *exec.Cmd
	client *sim.Client
	stderr *strings.Builder
}

// start runs the command and waits until it says ready.
func start(t *testing.T, dir, launch string) (*process, error) {
	t.Helper()
	socket := filepath.Join(dir, "tee.sock")
	p := &process{stderr: &strings.Builder{}}
	p.cmd = exec.Command(os.Args[0], "run", "--launch", launch, "--pki", filepath.Join(dir, "pki"), "--state", filepath.Join(dir, "state"), "--socket", socket)
	p.cmd.Env = append(os.Environ(), asMain+"=1")
	p.cmd.Stderr = p.stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "ready\n" {
		io.Copy(io.Discard, out)
		p.cmd.Wait()
		return nil, fmt.Errorf("said %q (%v), then: %s", line, err, p.stderr)
	}
	p.client = sim.New(func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	})
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	})
	return p, nil
}

func TestKilledProcessKeepsAcknowledgedExtends(t *testing.T) {
	dir := t.TempDir()
	launch, err := writeLaunch(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := simtee.EnsurePKI(filepath.Join(dir, "pki"), time.Now()); err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)

	var register dstack.Measurement // replay of the acknowledged extends
	acknowledged, inFlight := 0, 0
	for round := range 8 {
		p, err := start(t, dir, launch)
		if err != nil {
			t.Fatal(err)
		}
		digest := func(i int) (d dstack.Measurement) {
			d[0], d[1], d[2] = byte(round), byte(i), byte(i>>8)
			return d
		}
		delay := time.Duration(random.IntN(40)) * time.Millisecond
		time.AfterFunc(delay, func() { p.cmd.Process.Kill() })
		var last dstack.Measurement
		for i := 0; ; i++ {
			last = digest(i)
			if err := p.client.Extend(t.Context(), 3, last); err != nil {
				break
			}
			register = eventlog.Extend(register, last)
			acknowledged++
		}
		p.cmd.Wait()

		again, err := start(t, dir, launch)
		if err != nil {
			t.Fatalf("round %d: the state does not survive a kill: %v", round, err)
		}
		got, err := again.client.Registers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		switch got.RTMR[3] {
		case register:
		case eventlog.Extend(register, last):
			register = got.RTMR[3] // the one in flight was done
			inFlight++
		default:
			t.Fatalf("round %d: RTMR3 is %s, neither the %d acknowledged extends nor those and the one in flight", round, got.RTMR[3], acknowledged)
		}
		quote, err := again.client.Quote(t.Context(), dstack.ReportData{1})
		if err != nil {
			t.Fatal(err)
		}
		const rtmr3At = 520
		if dstack.Measurement(quote[rtmr3At:][:48]) != register {
			t.Fatal("the quote shows another RTMR3")
		}
		again.cmd.Process.Kill()
		again.cmd.Wait()
	}
	t.Logf("%d extends acknowledged, %d rounds with one more done", acknowledged, inFlight)
	if acknowledged == 0 {
		t.Fatal("no extend was acknowledged: the test tested nothing")
	}
}

func TestSecondProcessOnOneStateIsRefused(t *testing.T) {
	dir := t.TempDir()
	launch, err := writeLaunch(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := simtee.EnsurePKI(filepath.Join(dir, "pki"), time.Now()); err != nil {
		t.Fatal(err)
	}
	first, err := start(t, dir, launch)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := start(t, dir, launch); err == nil || !strings.Contains(err.Error(), "code: state_locked") {
		t.Fatalf("second process: %v", err)
	}
	if _, err := first.client.Registers(t.Context()); err != nil {
		t.Fatalf("the first process no longer answers: %v", err)
	}
	if err := first.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := first.cmd.Wait(); err != nil {
		t.Fatalf("SIGTERM: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "tee.sock")); err == nil {
		t.Error("the socket is left behind")
	}
}
