// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/testkit"
)

// A stack whose KMS decides by contracts on a real chain: what deploy registered runs, what
// was revoked boots no more, with the contract's reason.
func TestSoakGovernedByChain(t *testing.T) {
	if os.Getenv("DSTACK_SOAK") == "" {
		t.Skip("SKIP: two more boots, and a chain; make soak runs them")
	}
	helloApp(t)                           // which makes its binary
	dir, err := os.MkdirTemp("", "chain") // short: the paths of sockets are
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	state := filepath.Join(dir, "state")
	run := func(args ...string) (string, error) {
		cmd := exec.Command(filepath.Join(shared.bin, "dstack"), append([]string{"--state", state}, args...)...)
		cmd.Dir = testkit.Root()
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := run(args...)
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return out
	}
	defer run("down")
	must("up", "--governance", "chain", "--image", shared.imageDir())
	lock := filepath.Join(t.TempDir(), "lock.json")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	began := time.Now()
	deployed := must("--json", "deploy", "-c", "examples/hello/docker-compose.yaml", "-n", "governed", "--port", fmt.Sprintf("%d:8080", port), "--app-image", "hello:1="+filepath.Join(filepath.Dir(shared.bin), "hello"), "--lock", lock)
	t.Logf("deployed after %s", time.Since(began).Round(time.Second))
	var l struct {
		AppID       string `json:"app_id"`
		ComposeHash string `json:"compose_hash"`
	}
	text, err := os.ReadFile(lock)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &l); err != nil {
		t.Fatal(err)
	}
	if log := must("--json", "kms", "log"); !strings.Contains(log, "contract 0x") || !strings.Contains(log, " block ") {
		t.Errorf("the release log does not name contract and block:\n%s", log)
	}
	var app struct {
		AttestURL string `json:"attest_url"`
	}
	at := strings.Index(deployed, "\n{") // behind what it says while it works
	if err := json.Unmarshal([]byte(deployed[at+1:]), &app); err != nil {
		t.Fatalf("%v\n%s", err, deployed)
	}
	verify := []string{"verify", app.AttestURL, "--lock", lock, "--dev-roots", filepath.Join(state, "dev-pki", "dev-roots.json")}
	if verdict := must(verify...); !strings.Contains(verdict, "governance contract 0x") || !strings.Contains(verdict, "finalised") {
		t.Errorf("the verdict does not name contract and block:\n%s", verdict)
	}
	must("app", "revoke", "governed", "--compose-hash", l.ComposeHash)
	if verdict, err := run(verify...); err == nil || !strings.Contains(verdict, "governance_denied") {
		t.Errorf("a revoked app passes: %v\n%s", err, verdict)
	}
	if out := must("app", "history", "governed"); !strings.Contains(out, "revoked") {
		t.Errorf("history:\n%s", out)
	}
	must("stop", "governed")
	out, err := run("start", "governed")
	if err == nil || !strings.Contains(out, "Compose hash not allowed") {
		t.Errorf("a revoked app starts: %v\n%s", err, out)
	}
}
