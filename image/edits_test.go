// SPDX-License-Identifier: Apache-2.0

package image

import (
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

// Every edit fits the module that go.mod pins, and leaves Go behind.
func TestEngineEditsFit(t *testing.T) {
	for _, e := range engineEdits {
		cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", e.Module)
		cmd.Dir, cmd.Env = "engine", buildEnv(map[string]string{"GOPROXY": "off"})
		dir, err := cmd.Output()
		if err != nil || strings.TrimSpace(string(dir)) == "" {
			t.Skipf("module %s is not in the module cache", e.Module)
		}
		text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), e.File))
		if err != nil {
			t.Fatal(err)
		}
		edited, err := e.apply(string(text))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parser.ParseFile(token.NewFileSet(), e.File, edited, 0); err != nil {
			t.Error(err)
		}
	}
}

func TestEngineEditRefused(t *testing.T) {
	e := edit{"example.org/m", "a.go", [][2]string{{"x", "y"}}}
	if text, err := e.apply("axb"); err != nil || text != "ayb" {
		t.Fatalf("%q, %v", text, err)
	}
	for _, text := range []string{"ab", "xx"} {
		if _, err := e.apply(text); fault.Code(err) != "engine_edit" {
			t.Errorf("%q: %v", text, err)
		}
	}
}
