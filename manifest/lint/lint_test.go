// SPDX-License-Identifier: Apache-2.0

package lint

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstack-go/dstack/internal/fault"
)

// Each file of testdata says in its leading comments what must be found in it:
//
//	# want: LEVEL CODE SERVICE   one per finding, service - for none
//	# want: fails CODE           it must not load
//	# with: env=A=1 allow=B,C strict
func TestCorpus(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) < 30 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			fails := ""
			opt := Options{Env: map[string]string{}}
			for line := range strings.Lines(string(data)) {
				line = strings.TrimSpace(line)
				if w, ok := strings.CutPrefix(line, "# want: fails "); ok {
					fails = w
				} else if w, ok := strings.CutPrefix(line, "# want: "); ok {
					want = append(want, w)
				} else if w, ok := strings.CutPrefix(line, "# with: "); ok {
					for _, f := range strings.Fields(w) {
						k, v, _ := strings.Cut(f, "=")
						switch k {
						case "env":
							k, v, _ = strings.Cut(v, "=")
							opt.Env[k] = v
						case "allow":
							opt.AllowedEnvs = strings.Split(v, ",")
						case "strict":
							opt.Strict = true
						}
					}
				}
			}
			c, err := LoadWith(data, "docker-compose.yaml", opt)
			if fails != "" {
				if fault.Code(err) != fails {
					t.Fatalf("code %q, want %q: %v", fault.Code(err), fails, err)
				}
				if fault.Fix(err) == "" {
					t.Error("no fix")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range c.Findings {
				svc := f.Service
				if svc == "" {
					svc = "-"
				}
				got = append(got, fmt.Sprintf("%s %s %s", f.Level, f.Code, svc))
				if f.Fix == "" {
					t.Errorf("%s has no fix", f.Code)
				}
			}
			slices.Sort(got)
			slices.Sort(want)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("findings (-want +got):\n%s\n%+v", diff, c.Findings)
			}
			if hasError := slices.ContainsFunc(want, func(s string) bool { return strings.HasPrefix(s, "error") }); (c.Err() != nil) != hasError {
				t.Errorf("Err is %v", c.Err())
			}
		})
	}
}

func TestWhatAComposeFileAsksFor(t *testing.T) {
	c, err := Load([]byte(`
name: shop
services:
  web:
    image: nginx:1.27
    ports: ["8080:80", "9000-9001:9000-9001/udp", "0.0.0.0:443:8443"]
  db:
    image: postgres
    profiles: [x]
  web2:
    image: nginx:1.27
`), "f")
	if err != nil {
		t.Fatal(err)
	}
	web := []Port{
		{"web", "", 8080, 80, "tcp"}, {"web", "", 9000, 9000, "udp"}, {"web", "", 9001, 9001, "udp"}, {"web", "0.0.0.0", 443, 8443, "tcp"},
	}
	want := &Compose{
		Name:     "shop",
		Services: []Service{{Name: "db", Image: "postgres"}, {Name: "web", Image: "nginx:1.27", Ports: web}, {Name: "web2", Image: "nginx:1.27"}},
		Images:   []string{"nginx:1.27", "postgres"},
		Ports:    []Port{web[3], web[0], web[1], web[2]},
	}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestTooLarge(t *testing.T) {
	_, err := Load(make([]byte, MaxSize+1), "f")
	if fault.Code(err) != "compose_too_large" {
		t.Error(err)
	}
}

// Neither this process's environment nor a file on this machine may reach the
// result: what was linted would not be what runs.
func TestNothingOfThisMachineIsRead(t *testing.T) {
	t.Setenv("LINT_CANARY", "canary-value")
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.WriteFile(".env", []byte("LINT_CANARY=canary-value\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("docker-compose.override.yaml", []byte("services: {evil: {image: canary-value}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load([]byte("services:\n  web:\n    image: app\n    command: [\"${LINT_CANARY}\"]\n    environment: [LINT_CANARY]\n"), "docker-compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Services) != 1 || len(c.Findings) != 1 || c.Findings[0].Code != "compose_variable_unset" {
		t.Errorf("%+v", c)
	}
	for _, text := range []string{
		"include: [{path: " + dir + "/docker-compose.override.yaml}]\n",
		"services: {web: {extends: {file: " + dir + "/docker-compose.override.yaml, service: evil}}}\n",
		"include: [https://example.com/x.yaml]\n",
		"include: [\"git@example.com:x\"]\nservices: {web: {image: a}}\n",
	} {
		if c, err := Load([]byte(text), "f"); fault.Code(err) != "compose_external" {
			t.Errorf("%q: %+v, %v", text, c, err)
		}
	}
}

// A finding about a secret must not spread it.
func TestSecretsAreNotRepeated(t *testing.T) {
	c, err := Load([]byte("services:\n  web:\n    image: app\n    environment: {A_TOKEN: \"ghp_"+strings.Repeat("Xy9", 12)+"\"}\n"), "f")
	if err != nil || len(c.Findings) != 1 {
		t.Fatal(c, err)
	}
	if strings.Contains(fmt.Sprint(c.Findings), "Xy9") {
		t.Error(c.Findings)
	}
}

func FuzzLoad(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.yaml")
	for _, file := range files {
		if data, err := os.ReadFile(file); err == nil && !strings.Contains(file, "bomb") {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Load(data, "f")
		if err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
		if err == nil && c == nil {
			t.Fatal("neither result nor error")
		}
	})
}
