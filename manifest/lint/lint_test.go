// SPDX-License-Identifier: Apache-2.0

package lint

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/mutable"
)

// Each file of testdata says in its leading comments what must be found in it:
//
//	# want: LEVEL CODE SERVICE   one per finding, service - for none
//	# want: fails CODE           it must not load
//	# with: env=A=1 allow=B,C mutable
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
						case "mutable":
							opt.AllowMutable = true
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

// oracle judges what compose-go, and so the engine, makes of a file: whatever it
// finds, package mutable must have found in the text.
func oracle(p *types.Project) map[string]bool {
	found := map[string]bool{}
	check := func(name string, c types.ContainerSpec) {
		add := func(rule mutable.Rule, is bool) {
			if is {
				found[name+" "+string(rule)] = true
			}
		}
		add(mutable.Privileged, c.Privileged)
		add(mutable.EngineSocket, c.UseAPISocket)
		add(mutable.HostPID, c.Pid == "host")
		add(mutable.HostNetwork, c.NetworkMode == "host")
		add(mutable.Namespace, c.Ipc == "host" || c.Uts == "host" || c.Cgroup == "host" || c.UserNSMode == "host" || c.CgroupParent != "")
		add(mutable.Device, len(c.Devices)+len(c.DeviceCgroupRules) > 0)
		add(mutable.Runtime, c.Runtime != "" && c.Runtime != "runc" && c.Runtime != "crun")
		for _, capability := range c.CapAdd {
			add(mutable.Capability, capability == "ALL" || strings.Contains(capability, "SYS_ADMIN"))
		}
		for _, o := range c.SecurityOpt {
			add(mutable.Unconfined, strings.Contains(o, "unconfined"))
		}
		for _, v := range c.Volumes {
			source := v.Source
			if named, ok := p.Volumes[source]; ok && v.Type == types.VolumeTypeVolume {
				source = named.DriverOpts["device"]
			}
			if !strings.HasPrefix(source, "/") {
				continue
			}
			source = path.Clean(source)
			add(mutable.EngineSocket, strings.HasSuffix(source, "docker.sock"))
			add(mutable.HostPath, source == "/" || source == "/proc" || source == "/dev" || source == "/etc" || source == "/run")
		}
	}
	for name, s := range p.Services {
		check(name, s.ContainerSpec)
		for _, h := range s.PreStart {
			check(name, h.ContainerSpec)
		}
		for _, h := range slices.Concat(s.PostStart, s.PreStop) {
			if h.Privileged {
				found[name+" "+string(mutable.Privileged)] = true
			}
		}
	}
	return found
}

// missed returns what compose-go sees in a file and package mutable does not.
func missed(t testing.TB, data []byte) []string {
	t.Helper()
	defer func() { _ = recover() }() // compose-go's, on shapes that LoadWith refuses
	p, err := loader.LoadWithContext(t.Context(), details(data, "f", map[string]string{"P": "true", "C": "ALL", "M": "/:/host", "D": "/", "PID_MODE": "host"}), func(o *loader.Options) {
		offline(o)
		o.Profiles, o.SkipConsistencyCheck = []string{"*"}, true
	})
	if err != nil {
		return nil
	}
	seen := map[string]bool{}
	for _, f := range mutable.Scan(data) {
		if f.Rule == mutable.Unreadable {
			return nil
		}
		seen[f.Service+" "+string(f.Rule)] = true
	}
	var out []string
	for f := range oracle(p) {
		if !seen[f] {
			out = append(out, f)
		}
	}
	return out
}

// The linter refuses each file of the corpus by the rules that a verifier judges
// by, and compose-go sees nothing in any that they miss.
func TestMutableHoldsAgainstComposeGo(t *testing.T) {
	a, err := txtar.ParseFile("../mutable/testdata/corpus.txtar")
	if err != nil || len(a.Files) < 60 {
		t.Fatal(len(a.Files), err)
	}
	refused := 0
	for _, f := range a.Files {
		if m := missed(t, f.Data); len(m) > 0 {
			t.Errorf("%s: compose-go sees %q\n%s", f.Name, m, f.Data)
		}
		c, err := LoadWith(f.Data, "f", Options{AllowedEnvs: []string{"P", "C", "M", "D", "PID_MODE"}})
		if err != nil {
			continue // a variable without a usable value, a file from outside
		}
		for _, m := range mutable.Scan(f.Data) {
			code := rules[m.Rule].code
			if code == "" {
				code = "compose_build"
			}
			if !slices.ContainsFunc(c.Findings, func(g Finding) bool { return g.Level == Error && g.Code == code && g.Service == m.Service }) {
				t.Errorf("%s: %+v is not refused: %+v", f.Name, m, c.Findings)
			}
			refused++
		}
		c, err = LoadWith(f.Data, "f", Options{AllowMutable: true, AllowedEnvs: []string{"P", "C", "M", "D", "PID_MODE"}})
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range c.Findings {
			if _, isMutable := codes()[g.Code]; isMutable && g.Level != Warning {
				t.Errorf("%s: %+v although it is allowed", f.Name, g)
			}
		}
	}
	if refused < 50 {
		t.Errorf("%d findings refused only", refused)
	}
}

func codes() map[string]bool {
	out := map[string]bool{}
	for _, r := range rules {
		out[r.code] = true
	}
	return out
}

// An image that is mounted, or run before a service, is part of the lock; one that a
// variable decides is in no lock.
func TestEveryImageIsListed(t *testing.T) {
	c, err := LoadWith([]byte(`
services:
  web:
    image: ${X:-a:1}
    volumes: [{type: image, source: b:1, target: /b}, {type: image, source: "${Y}", target: /c}, {type: image, source: db, target: /d}]
    pre_start: [{image: d:1, command: [x]}, {image: "${Z:-e:1}", command: [x]}]
  db: {image: f:1}
`), "f", Options{Env: map[string]string{"Y": "c:1"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"${X:-a:1}", "b:1", "${Y}", "d:1", "${Z:-e:1}", "f:1"} {
		if !slices.Contains(c.Images, want) {
			t.Errorf("%s is not in %q", want, c.Images)
		}
	}
	variables := 0
	for _, f := range c.Findings {
		if f.Code == "compose_image_variable" && f.Level == Error {
			variables++
		}
	}
	if variables < 3 {
		t.Errorf("images by variables are not refused: %+v", c.Findings)
	}
	if slices.Contains(c.Images, "db") {
		t.Error("a service is taken for an image")
	}
}

func FuzzMutableHoldsAgainstComposeGo(f *testing.F) {
	if a, err := txtar.ParseFile("../mutable/testdata/corpus.txtar"); err == nil {
		for _, c := range a.Files {
			f.Add(c.Data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 8<<10 {
			return
		}
		if m := missed(t, data); len(m) > 0 {
			t.Fatalf("compose-go sees %q", m)
		}
	})
}
