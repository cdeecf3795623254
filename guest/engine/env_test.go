// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/dotenv"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/internal/fault"
)

// awkward values: what quoting gets wrong.
var awkward = map[string]string{
	"EMPTY": "", "PLAIN": "value", "SPACES": "  two  words  ", "TAB": "\ta\tb\t", "NEWLINE": "a\nb\n\nc\n", "CRLF": "a\r\nb\r",
	"SINGLE": "it's", "DOUBLE": `say "hi"`, "BOTH": `'"'"`, "DOLLAR": "$HOME ${HOME} $$ $(id) ${X:-y} $", "HASH": "a #b#c", "LEAD_HASH": "#x",
	"BACKSLASH": `a\b\\c\`, "ESCAPES": `\n\t\$\"\'\\\0101\x41`, "BACKSLASH_QUOTE": `\"\'`, "ENDS": `\\\`, "BACKTICK": "`id` \\`", "EQUALS": "a=b=c",
	"UNICODE": "grüße 世界 🔑 \u00a0\u2028", "CONTROL": "\x01\x07\x08\x0b\x0c\x1b[31m\x7f", "COLON": "a: b", "EXPORT": "export X=1", "BANG": "!x!", "YAML": "- {a: [b]} & *c | > %@",
	"JSON": `{"a":"b\n","c":["$d"]}`, "PEM": "-----BEGIN KEY-----\nAAAA+/==\n-----END KEY-----\n", "NEXT_LINE": "a\nPLAIN=hijacked\nB=\"c", "PERCENT": "100%d%s",
	"LONG": strings.Repeat("0123456789abcdef", 8192),
}

func TestDotenvArrivesByteForByte(t *testing.T) {
	text, err := composeEnv(awkward)
	if err != nil {
		t.Fatal(err)
	}
	// A value must not see another, nor anything of this process.
	got, err := dotenv.ParseWithLookup(strings.NewReader(string(text)), func(string) (string, bool) { return "looked-up", true })
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range awkward {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, clip(got[name]), clip(want))
		}
	}
	if len(got) != len(awkward) {
		t.Errorf("%d variables, want %d", len(got), len(awkward))
	}
}

func clip(s string) string { return s[:min(len(s), 200)] }

func FuzzDotenv(f *testing.F) {
	for _, v := range awkward {
		f.Add(clip(v))
	}
	f.Fuzz(func(t *testing.T, value string) {
		env := map[string]string{"A": value, "Z": "z"}
		text, err := composeEnv(env)
		if err != nil {
			if strings.ContainsRune(value, 0) && fault.Code(err) == "env_value" {
				return
			}
			t.Fatal(err)
		}
		got, err := dotenv.Parse(strings.NewReader(string(text)))
		if err != nil || !maps.Equal(got, env) {
			t.Fatalf("%q became %q, %v", value, got, err)
		}
	})
}

func TestAZeroByteIsRefused(t *testing.T) {
	c := &Compose{Config: Default(), Dir: t.TempDir(), Runner: &fakeRunner{}, Env: map[string]string{"A": "a\x00b"}}
	if err := c.Up(context.Background()); fault.Code(err) != "env_value" {
		t.Fatal(err)
	}
}

// composeBinary is the engine's own docker-compose.
func composeBinary(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skip("SKIP: no cache directory with an engine:", err)
	}
	engines, _ := filepath.Glob(filepath.Join(cache, "dstack/image/engine/*/engine"))
	if len(engines) == 0 {
		t.Skip("SKIP: no engine is built: bin/dstack image build")
	}
	path := filepath.Join(t.TempDir(), "docker-compose")
	if err := os.Symlink(engines[len(engines)-1], path); err != nil {
		t.Fatal(err)
	}
	return path
}

// execRunner runs with os/exec, inherited files included, and keeps what was said
// and what could be seen of the process.
type execRunner struct {
	stdout []byte
	line   []string
	env    string
}

func (r *execRunner) Run(ctx context.Context, c supervise.Command) error {
	cmd := exec.CommandContext(ctx, c.Path, c.Args[1:]...)
	cmd.Env, cmd.Dir, cmd.ExtraFiles = c.Env, c.Dir, c.Files
	r.line, r.env = c.Args, strings.Join(c.Env, "\x00")
	var err error
	if r.stdout, err = cmd.Output(); err != nil {
		if e, ok := err.(*exec.ExitError); ok {
			return fmt.Errorf("%w: %s", err, e.Stderr)
		}
	}
	return err
}

// config runs the engine's compose on what the guest would start.
func config(t *testing.T, c *Compose, text string) map[string]any {
	t.Helper()
	run := &execRunner{}
	c.Config, c.Dir, c.Runner = Config{Bin: filepath.Dir(composeBinary(t)), Run: "/run"}, filepath.Join(t.TempDir(), "dstack"), run
	if err := c.Write(text); err != nil {
		t.Fatal(err)
	}
	if err := c.run(context.Background(), attemptLimit, "config", "--format", "json"); err != nil {
		t.Fatal(err)
	}
	for _, v := range c.Env {
		if len(v) > 6 && (strings.Contains(run.env, v) || strings.Contains(strings.Join(run.line, "\x00"), v)) {
			t.Errorf("the value %q is in the arguments or environment of compose", clip(v))
		}
	}
	var out map[string]any
	if err := json.Unmarshal(run.stdout, &out); err != nil {
		t.Fatalf("%v: %s", err, run.stdout)
	}
	return out
}

func member(v any, path ...string) any {
	for _, p := range path {
		m, _ := v.(map[string]any)
		v = m[p]
	}
	return v
}

// The engine's own compose, reading what it inherits, puts every value into the
// container's configuration unchanged, and nothing into what a process list shows.
func TestEnvironmentReachesInterpolationByteForByte(t *testing.T) {
	var text strings.Builder
	text.WriteString("services:\n  web:\n    image: app:1\n    environment:\n")
	for _, name := range slices.Sorted(maps.Keys(awkward)) {
		fmt.Fprintf(&text, "      C_%[1]s: \"${%[1]s}\"\n      %[1]s:\n", name)
	}
	out := config(t, &Compose{Env: awkward}, text.String())
	env, _ := member(out, "services", "web", "environment").(map[string]any)
	for name, want := range awkward {
		for _, n := range []string{name, "C_" + name} {
			got, _ := env[n].(string)
			// config writes a dollar twice, so that its output can be read again.
			if got = strings.ReplaceAll(got, "$$", "$"); got != want {
				t.Errorf("%s: %q, want %q", n, clip(got), clip(want))
			}
		}
	}
}

func TestEnvironmentWinsOverADotEnvFile(t *testing.T) {
	c := &Compose{Env: map[string]string{"A": "secret-a"}}
	out := config(t, c, "services:\n  web:\n    image: app:1\n    environment: {A: '${A}', B: '${B:-none}'}\n")
	if a, b := member(out, "services", "web", "environment", "A"), member(out, "services", "web", "environment", "B"); a != "secret-a" || b != "none" {
		t.Errorf("A=%v B=%v", a, b)
	}
	if err := os.WriteFile(filepath.Join(c.Dir, ".env"), []byte("A=file\nB=file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run := c.Runner.(*execRunner)
	if err := c.run(context.Background(), attemptLimit, "config", "--format", "json"); err != nil {
		t.Fatal(err)
	}
	if s := string(run.stdout); !strings.Contains(s, `"A": "secret-a"`) || !strings.Contains(s, `"B": "file"`) || member(out, "name") != "dstack" {
		t.Error(s)
	}
}

// Compose quotes a value that it cannot use, and its message goes to the host.
func TestValuesAreTakenOutOfErrors(t *testing.T) {
	dir := t.TempDir()
	run := &execRunner{}
	c := &Compose{
		Config: Config{Bin: filepath.Dir(composeBinary(t)), Run: "/run"}, Dir: dir, Runner: run,
		Env: map[string]string{"PORT": "hunter2\nhunter3", "FLAG": "swordfish"},
	}
	for _, text := range []string{
		"services: {web: {image: a, ports: ['${PORT}:80']}}\n", "services: {web: {image: a, privileged: '${FLAG}'}}\n",
		"services: {web: {image: a, ports: ['${FLAG}:80']}}\n", "services: {web: {image: a, cpus: '${PORT}'}}\n",
	} {
		if err := c.Write(text); err != nil {
			t.Fatal(err)
		}
		err := c.run(context.Background(), attemptLimit, "config", "--quiet")
		if err == nil || strings.Contains(err.Error(), "hunter") || strings.Contains(err.Error(), "swordfish") {
			t.Errorf("%s: %v", text, err)
		}
		t.Log(err)
	}
}

func TestProject(t *testing.T) {
	for text, want := range map[string]string{
		"services: {web: {}, db: {}}":                       "dstack [db web]",
		"name: shop\nservices: {web: {}}":                   "shop [web]",
		"name: ${N}\nservices: {web: {}}":                   "dstack [web]",
		"include: [x.yaml]\nservices: {web: {}}":            "dstack []",
		"services: {web: {extends: {file: x, service: y}}}": "dstack [web]",
		"services: [": "dstack []",
	} {
		name, services := Project(text)
		if got := fmt.Sprint(name, " ", services); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

// What a container changed in the work directory does not reach the next start.
func TestComposeFileIsWrittenAnew(t *testing.T) {
	c := &Compose{Config: Default(), Dir: t.TempDir(), Runner: &fakeRunner{}}
	if err := c.Write("services: {}\n"); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := os.Remove(c.File()); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, c.File()); err != nil {
		t.Fatal(err)
	}
	if err := c.Up(context.Background()); err != nil {
		t.Fatal(err)
	}
	if text, err := readFile(c.File()); err != nil || text != "services: {}\n" {
		t.Errorf("%q, %v", text, err)
	}
	if _, err := os.Stat(other); err == nil {
		t.Error("the file was written through a link")
	}
}

func TestEnvFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, envFile), []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := WriteEnvFiles(dir, awkward); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{envFile, envFileJSON} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	text, err := readFile(filepath.Join(dir, envFileJSON))
	var got map[string]string
	if err != nil || json.Unmarshal([]byte(text), &got) != nil || !maps.Equal(got, awkward) {
		t.Errorf("%s: %v", envFileJSON, err)
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("SKIP: no bash:", err)
	}
	lines, err := readFile(filepath.Join(dir, envFile))
	if err != nil {
		t.Fatal(err)
	}
	compose, err := dotenv.Parse(strings.NewReader(lines))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range awkward {
		out, err := exec.Command(bash, "--noprofile", "--norc", "-c", `. "$1"; printf '%s' "${!2}"`, "x", filepath.Join(dir, envFile), name).Output()
		if err != nil || string(out) != want {
			t.Errorf("a shell reads %s as %q, want %q (%v)", name, clip(string(out)), clip(want), err)
		}
		if both := strings.ContainsAny(want, "`\r") && strings.ContainsAny(want, "'\r\\"); compose[name] != want && !both {
			t.Errorf("compose reads %s as %q, want %q", name, clip(compose[name]), clip(want))
		}
	}
	if !RefersToEnvFiles("", "env_file: .decrypted-env") || RefersToEnvFiles("services: {}") {
		t.Error("references are not seen")
	}
}
