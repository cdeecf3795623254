// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Each bad input is refused with its code and a fix, and leaves nothing behind.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	binary := filepath.Join(shared.bin, "dstack") // static
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	busyPort := busy.Addr().(*net.TCPAddr).Port
	good := file("good.yaml", "services:\n  web:\n    image: web:1\n    ports: [\"8080:80\"]\n")

	for _, c := range []struct {
		name, code string
		args       []string
	}{
		{"no such file", "compose_missing", []string{"-c", filepath.Join(dir, "absent.yaml")}},
		{"not YAML", "compose_not_yaml", []string{"-c", file("notyaml.yaml", "services: [unclosed")}},
		{"a build section", "compose_build", []string{"-c", file("build.yaml", "services:\n  web:\n    build: .\n")}},
		{"an image that nothing resolves", "image_unresolved", []string{"-c", good}},
		{"an image path that is not there", "app_image_missing", []string{"-c", good, "--app-image", "web:1=" + filepath.Join(dir, "gone.tar")}},
		{"an image that is no image", "app_image_malformed", []string{"-c", good, "--app-image", "web:1=" + file("x.tar", "not a tarball")}},
		{"oversize", "file_too_large", []string{"-c", file("big.yaml", strings.Repeat("# padding\n", 1100000))}},
		{"a port that the compose file does not publish", "port_not_published", []string{"-c", good, "--port", "9999:99", "--app-image", "web:1=" + binary}},
		{"a busy port", "port_busy", []string{"-c", good, "--port", fmt.Sprintf("%d:8080", busyPort), "--app-image", "web:1=" + binary}},
		{"a malformed port", "port_malformed", []string{"-c", good, "--port", "http", "--app-image", "web:1=" + binary}},
		{"a malformed name", "name_malformed", []string{"-c", good, "-n", "a b", "--app-image", "web:1=" + binary}},
		{"an image unknown to the stack", "image_missing", []string{"-c", good, "--image", "absent", "--app-image", "web:1=" + binary}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := vmDirs(t)
			lock := filepath.Join(dir, "half.lock.json")
			args := append([]string{"deploy", "-n", "bad", "--lock", lock}, c.args...)
			dstack(t, args...).refused(t, c.code)
			if after := vmDirs(t); after != before {
				t.Errorf("%d VM directories before, %d after", before, after)
			}
			if _, err := os.Stat(lock); err == nil {
				t.Error("a lock was written")
			}
		})
	}
}

func vmDirs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(shared.state, "vms"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return len(entries)
}
