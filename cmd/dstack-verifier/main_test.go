// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/dstack-go/dstack/internal/testkit"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"dstack-verifier": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(env *testscript.Env) error {
			env.Setenv("DSTACK_VERIFIER_IMAGE_CACHE_DIR", filepath.Join(env.WorkDir, "cache"))
			env.Setenv("DSTACK_VERIFIER_ATTESTATION__FETCH_COLLATERAL", "false")
			for _, name := range []string{"sev-snp/verifier-sev-snp-attestation.json", "tdx/tdx-lite-getquote.json", "nitro/versioned_nitro_attestation.bin"} {
				data := testkit.Vectors(t, "attestation/"+name)
				if strings.HasSuffix(name, ".bin") {
					data = fmt.Appendf(nil, `{"attestation":"%x","at":"2025-12-25T16:04:19Z"}`, data)
				}
				if err := os.WriteFile(filepath.Join(env.WorkDir, filepath.Base(name)), data, 0o600); err != nil {
					return err
				}
			}
			return nil
		},
	})
}

// The server starts, answers, and ends with status 0 when it is told to.
func TestServerRunsUntilItIsTold(t *testing.T) {
	bin, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The test binary is the command when it is called by its name.
	link := filepath.Join(t.TempDir(), "dstack-verifier")
	if err := os.Symlink(bin, link); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	cmd := exec.Command(link)
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "DSTACK_VERIFIER_IMAGE_CACHE_DIR="+filepath.Join(cmd.Dir, "cache"), "DSTACK_VERIFIER_PORT="+port)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "listening on 127.0.0.1:") {
		t.Fatalf("%q %v", line, err)
	}
	resp, err := http.Get("http://" + strings.TrimSpace(strings.TrimPrefix(line, "listening on ")) + "/health")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var health struct{ Status, Service string }
	if err := json.NewDecoder(resp.Body).Decode(&health); err != nil || health.Status != "ok" || health.Service != "dstack-verifier" {
		t.Errorf("%+v %v", health, err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(15 * time.Second):
		t.Error("it does not end")
	}
}
