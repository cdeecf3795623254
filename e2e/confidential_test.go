// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/testkit"
)

// The KMSs themselves run in CVMs: the first makes the root keys, the second gets them
// from it over an attested channel, and an app boots by either while the other is gone
// (threats.md C03, G01, G09). Two VMs run at a time.
func TestSoakConfidentialServices(t *testing.T) {
	if os.Getenv("DSTACK_SOAK") == "" {
		t.Skip("SKIP: six boots; run with make soak")
	}
	// A short path: sockets lie below it.
	state, err := os.MkdirTemp("", "ck-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	tool := func(args ...string) result {
		t.Helper()
		cmd := exec.Command(filepath.Join(shared.bin, "dstack"), append([]string{"--state", state}, args...)...)
		cmd.Dir = testkit.Root()
		var out, errOut strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &errOut
		_ = cmd.Run()
		return result{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
	}
	t.Cleanup(func() { tool("down") })
	up := []string{"--json", "up", "--confidential-services", "--image", shared.imageDir()}
	tool(up...).must(t)
	type status struct {
		RootCA string `json:"root_ca"`
		Nodes  []struct {
			Name    string `json:"name"`
			Answers bool   `json:"answers"`
			Log     string `json:"log"`
		} `json:"nodes"`
	}
	look := func() (s status) {
		t.Helper()
		if err := json.Unmarshal([]byte(tool("--json", "kms", "status").must(t).stdout), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	began := look()
	if len(began.Nodes) != 2 || !began.Nodes[0].Answers || !began.Nodes[1].Answers || began.Nodes[0].Log == began.Nodes[1].Log {
		t.Fatalf("%+v", began)
	}
	// No process of this machine has the roots.
	if _, err := os.Stat(filepath.Join(state, "kms")); !os.IsNotExist(err) {
		t.Errorf("there is a KMS's data on this machine: %v", err)
	}
	if out, err := exec.Command("grep", "-raElm1", "^k256 [0-9a-f]{64}$", state).Output(); err == nil {
		t.Errorf("root keys lie in %s", out)
	}

	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(state, "hello")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", binary, "./examples/hello")
	build.Dir, build.Env = testkit.Root(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	tool("stop", "kms-0").must(t)
	deploy := tool("--json", "deploy", "-c", "examples/hello/docker-compose.yaml", "-n", "hello", "--port", fmt.Sprintf("%d:8080", port),
		"--app-image", "hello:1="+binary, "--lock", filepath.Join(state, "hello.lock.json")).must(t)
	if !strings.Contains(deploy.stderr, "policy_undelivered") {
		t.Errorf("that a KMS does not know of the app is not said:\n%s", deploy.stderr)
	}
	var app deployed
	if err := json.Unmarshal([]byte(deploy.stdout), &app); err != nil {
		t.Fatal(err)
	}
	v := tool("--json", "verify", app.AttestURL, "--lock", filepath.Join(state, "hello.lock.json"), "--dev-roots", filepath.Join(state, "dev-pki", "dev-roots.json"))
	if v.code != 0 || !strings.Contains(v.stdout, `"kms_appraised"`) {
		t.Errorf("exit %d\n%s", v.code, v.stdout)
	}
	tool("stop", "hello").must(t)

	// The other way round: the first comes back with the same root, and the app boots by it.
	tool("stop", "kms-1").must(t)
	tool("start", "kms-0").must(t)
	now := look()
	for deadline := time.Now().Add(time.Minute); !now.Nodes[0].Answers && time.Now().Before(deadline); now = look() {
		time.Sleep(time.Second) // its container has just been started
	}
	if now.RootCA != began.RootCA || !now.Nodes[0].Answers || now.Nodes[0].Log != began.Nodes[0].Log {
		t.Fatalf("%+v", now)
	}
	r := tool("kms", "policy", "--submit")
	r.refused(t, "policy_undelivered") // the second one is down
	tool("start", "hello").must(t)
	log := tool("--json", "kms", "log", "kms-0").must(t).stdout
	if !strings.Contains(log, app.AppID) {
		t.Errorf("the first KMS gave the app no keys:\n%s", log)
	}
}
