// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/testkit"
)

// A stack whose KMS decides by contracts on a real chain: what deploy registered runs, what
// was revoked boots no more, with the contract's reason; additions to an app that gives
// notice wait for their time, and a frozen app runs as it is.
func TestSoakGovernedByChain(t *testing.T) {
	if os.Getenv("DSTACK_SOAK") == "" {
		t.Skip("SKIP: five more boots, and a chain; make soak runs them")
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
	must("rm", "governed")

	// What the owner of an app that gives notice allows is refused until its time has come,
	// and a frozen app takes nothing more, and runs on as it is.
	const notice = 40 * time.Second
	hello := []string{"-c", "examples/hello/docker-compose.yaml", "--port", fmt.Sprintf("%d:8080", port), "--app-image", "hello:1=" + filepath.Join(filepath.Dir(shared.bin), "hello"), "--lock", lock}
	value := func(out, name string) string {
		t.Helper()
		m := regexp.MustCompile(`"` + name + `": "([^"]+)"`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("no %s in\n%s", name, out)
		}
		return m[1]
	}
	first := value(must(append([]string{"--json", "deploy", "--dry-run", "-n", "noticed"}, hello...)...), "compose_hash")
	id := value(must("--json", "app", "create", "--notice", notice.String(), "--compose-hash", first, "--any-device"), "app_id")
	verify[1] = value(must(append([]string{"--json", "deploy", "-n", "noticed", "--app-id", id}, hello...)...), "attest_url")
	must(verify...)
	upgrade := []string{"upgrade", "noticed", "--public-logs", "--lock", lock}
	announced := time.Now()
	if out, err := run(upgrade...); err == nil || !strings.Contains(out, "change_announced") {
		t.Fatalf("what is announced counts at once: %v\n%s", err, out)
	}
	if out := must("app", "status", id); !strings.Contains(out, notice.String()) {
		t.Errorf("the notice is not told:\n%s", out)
	}
	time.Sleep(time.Until(announced.Add(notice + 5*time.Second)))
	must(upgrade...)
	if verdict := must(verify...); !strings.Contains(verdict, "governance contract 0x") {
		t.Errorf("the upgraded app's verdict:\n%s", verdict)
	}
	must("app", "freeze", "--yes", "noticed")
	if out, err := run("app", "add", id, "--compose-hash", strings.Repeat("ee", 32)); err == nil || !strings.Contains(out, "frozen") {
		t.Errorf("a frozen app takes another manifest: %v\n%s", err, out)
	}
	must("stop", "noticed")
	must("start", "noticed")
	must(verify...)
}
