// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/hex"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	if os.Getenv("DSTACK_TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// program is this program with arguments and settings.
func program(t *testing.T, env []string, args ...string) *exec.Cmd {
	c := exec.CommandContext(t.Context(), os.Args[0], args...)
	c.Env = append(env, "DSTACK_TEST_MAIN=1", "PATH="+os.Getenv("PATH"))
	return c
}

// A key is made, the program serves, outlives a SIGHUP and ends in order at SIGTERM.
func TestTheProgramServesAndEnds(t *testing.T) {
	dir := t.TempDir()
	out, err := program(t, nil, "key", "-o", filepath.Join(dir, "key")).Output()
	if err != nil {
		t.Fatal(err)
	}
	if key, err := hex.DecodeString(strings.TrimSpace(string(out))); err != nil || len(key) != 32 {
		t.Errorf("%q", out)
	}
	env := []string{
		"DSTACK_AUTH_DATA_DIR=" + filepath.Join(dir, "data"), "DSTACK_AUTH_KEY_FILE=" + filepath.Join(dir, "key"), "DSTACK_AUTH_LISTEN__PORT=0",
		"DSTACK_AUTH_AUTH__TYPE=chain", "DSTACK_AUTH_AUTH__CHAIN__RPC=http://127.0.0.1:1", "DSTACK_AUTH_AUTH__CHAIN__THRESHOLD=1",
		"DSTACK_AUTH_AUTH__CHAIN__CHAIN_ID=1", "DSTACK_AUTH_AUTH__CHAIN__REGISTRY=0x" + strings.Repeat("aa", 20),
	}
	if out, err := program(t, env, "check-config").CombinedOutput(); err != nil || !strings.Contains(string(out), "valid") {
		t.Errorf("%v %s", err, out)
	}
	c := program(t, env, "serve")
	pipe, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(pipe).ReadString('\n')
	at, ok := strings.CutPrefix(strings.TrimSpace(line), "listening on ")
	if err != nil || !ok {
		t.Fatalf("%q %v", line, err)
	}
	for range 2 {
		resp, err := http.Get("http://" + at + "/health")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusServiceUnavailable { // its chain is nowhere
			t.Error(resp.Status)
		}
		if err := c.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	out, err = program(t, append(env, "DSTACK_AUTH_LISTEN__ADDRESS=0.0.0.0"), "serve").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "code: auth_plain_http") || !strings.Contains(string(out), "fix: ") {
		t.Errorf("%v %s", err, out)
	}
}
