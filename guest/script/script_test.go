// SPDX-License-Identifier: Apache-2.0

package script

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == StageArg {
		fmt.Fprintln(os.Stderr, "script:", Stage())
		os.Exit(126)
	}
	os.Exit(m.Run())
}

// programs of this machine that stand for those of the scripts layer.
var programs = []string{
	"bash", "cat", "ls", "id", "stat", "sleep", "env", "touch", "mkdir", "chmod", "mount", "unshare", "mknod", "grep", "true", "false", "printf", "sort", "chown", "readlink",
}

// layer returns a directory like the scripts layer: this machine's programs with
// the libraries they need.
func layer(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: namespaces and mounts need root")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(from, to string) {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, to)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, to), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	library := regexp.MustCompile(`(/\S+) \(0x`)
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Skip("SKIP: this machine lacks a program:", err)
		}
		put(path, "/usr/bin/"+name)
		out, _ := exec.Command("ldd", path).Output()
		for _, m := range library.FindAllStringSubmatch(string(out), -1) {
			put(m[1], m[1])
		}
	}
	for link, target := range map[string]string{"bin": "usr/bin", "var/run": "../run", "etc/resolv.conf": "/run/resolv.conf"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, link)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	put("/dev/null", "/usr/bin/docker")
	return dir
}

type room struct {
	Room
	mu    sync.Mutex
	lines []string
}

func (r *room) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.lines, "\n")
}

func newRoom(t *testing.T, layer string) *room {
	t.Helper()
	sup := supervise.New()
	ctx, cancel := context.WithCancel(context.Background())
	var reaper sync.WaitGroup
	reaper.Go(func() { sup.Reap(ctx) })
	t.Cleanup(func() {
		cancel()
		// The reaper waits for a child; give it one to see the end by.
		if p, err := sup.Start(supervise.Command{Path: "/bin/true"}); err == nil {
			_ = p
		}
		reaper.Wait()
	})
	dir := t.TempDir()
	socket := filepath.Join(dir, "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	resolver := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(resolver, []byte("nameserver 192.0.2.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	r := &room{}
	r.Room = Room{
		Layer: layer, WorkDir: work, Socket: socket, Resolver: resolver, Exe: "/proc/self/exe", Runner: sup,
		Programs: map[string]string{"/usr/bin/docker": "/bin/true"},
		Log: func(script, line string) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.lines = append(r.lines, script+": "+line)
		},
	}
	return r
}

// run runs a text as an init script and returns what it printed.
func (r *room) run(t *testing.T, text string) (string, error) {
	t.Helper()
	r.mu.Lock()
	r.lines = nil
	r.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := r.Run(ctx, Script{Name: "s", Text: text, Strict: []string{"-e"}})
	// The pipe drains a moment after the exit.
	time.Sleep(50 * time.Millisecond)
	return r.text(), err
}

func TestScriptsSeeTheirRoomAndNothingElse(t *testing.T) {
	t.Setenv("CANARY_OF_INIT", "secret") // of this process
	l := layer(t)
	r := newRoom(t, l)
	secret := filepath.Join(filepath.Dir(r.WorkDir), "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ text, want string }{
		"starts in the work directory":      {`pwd`, `s: /dstack`},
		"writes the work directory":         {`echo made > made; cat made`, `s: made`},
		"has the agent's socket, twice":     {`stat -c %F /run/dstack.sock /var/run/dstack.sock /run/dstack/dstack.sock`, "s: socket\ns: socket\ns: symbolic link"},
		"has nothing else in run":           {`ls -A /run`, "s: dstack\ns: dstack.sock\ns: resolv.conf"},
		"has an empty tmp":                  {`ls -A /tmp; touch /tmp/x; ls /tmp`, "s: x"},
		"sees no file of the guest":         {`ls ` + secret + ` 2>&1 || echo none`, "none"},
		"has the resolver":                  {`cat /etc/resolv.conf`, "s: nameserver 192.0.2.53"},
		"sees no other process":             {`shopt -s nullglob; cd /proc; for p in [0-9]*; do echo $p; done | sort -n`, "s: 1\n"},
		"has no capability":                 {`grep -E "^Cap" /proc/self/status | sort`, "s: CapAmb:\t0000000000000000\ns: CapBnd:\t0000000000000000\ns: CapEff:\t0000000000000000\ns: CapInh:\t0000000000000000\ns: CapPrm:\t0000000000000000"},
		"has no new privileges, a filter":   {`grep -E "^(NoNewPrivs|Seccomp):" /proc/self/status`, "s: NoNewPrivs:\t1\ns: Seccomp:\t2"},
		"cannot mount":                      {`mount -t tmpfs x /tmp 2>/dev/null || echo no`, "s: no"},
		"cannot make a user namespace":      {`unshare -U true 2>/dev/null || echo no`, "s: no"},
		"cannot make a device":              {`mknod /tmp/d b 1 1 2>/dev/null || echo no`, "s: no"},
		"cannot give files away":            {`touch f; chown 5 f 2>/dev/null || echo no`, "s: no"},
		"cannot set the kernel's variables": {`(echo x > /proc/sys/kernel/core_pattern) 2>/dev/null || echo no`, "s: no"},
		"cannot pull the kernel's triggers": {`(echo h > /proc/sysrq-trigger) 2>/dev/null || echo no`, "s: no"},
		"has the harmless devices only":     {`ls -A /dev; echo x > /dev/null; [[ -c /dev/urandom ]]`, "s: fd\ns: full\ns: null\ns: random\ns: shm\ns: stderr\ns: stdin\ns: stdout\ns: urandom\ns: zero"},
		"has no sysfs":                      {`ls -A /sys 2>/dev/null || true; echo end`, "s: end"},
		"has the programs of the guest":     {`docker && echo ran; echo x 2>/dev/null > /usr/bin/docker || echo no`, "s: ran\ns: no"},
		"has a plain environment":           {`env | grep -vE "^(PWD|SHLVL|_|OLDPWD)=" | sort`, "s: HOME=/root\ns: LANG=C.UTF-8\ns: PATH=/usr/bin:/bin\ns: SHELL=/usr/bin/bash"},
		"may return, being sourced":         {`echo a; return 0; echo b`, "s: a"},
		"has no text in its arguments":      {`printf '%s\n' "$(cat /proc/1/cmdline | while IFS= read -r -d '' a; do printf '%s\n' "$a"; done)"`, "s: bash\ns: --noprofile\ns: --norc\ns: -e\ns: -c\ns: . /proc/self/fd/4\ns: s"},
		"has no descriptor but its own":     {`cd /proc/self/fd; for f in *; do case $(readlink $f) in /dev/null|pipe:*|/memfd:script*|/proc/*|"") ;; *) echo "$f $(readlink $f)";; esac; done; echo end`, "s: end"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := r.run(t, c.text)
			if err != nil {
				t.Fatalf("%v\n%s", err, got)
			}
			if got != c.want && !(strings.HasSuffix(c.want, "\n") && strings.HasPrefix(got+"\n", c.want)) && !(c.want == "none" && strings.HasSuffix(got, "s: none")) {
				t.Errorf("got %q\nwant %q", got, c.want)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(r.WorkDir, "made")); err != nil {
		t.Error("what a script wrote into the work directory is lost:", err)
	}
	// The layer is as it was.
	if _, err := r.run(t, `echo changed > /usr/bin/cat; mkdir /new; ls -d /new`); err != nil {
		t.Error("a script cannot change its own root:", err)
	}
	if _, err := os.Stat(filepath.Join(l, "new")); err == nil {
		t.Error("a script changed the layer")
	}
	if got, err := r.run(t, `ls -d /new 2>/dev/null || echo fresh`); got != "s: fresh" {
		t.Errorf("the next script sees it: %q, %v", got, err)
	}
	// No mount is left behind here.
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte("/tmp/root")) || bytes.Contains(mounts, []byte(r.WorkDir)) {
		t.Errorf("mounts are left, %v:\n%s", err, mounts)
	}
}

// A background process ends with its script: it cannot go on behind the gate.
func TestNothingOutlivesAScript(t *testing.T) {
	r := newRoom(t, layer(t))
	if _, err := r.run(t, `(while :; do echo alive >> alive; sleep 0.05; done) & sleep 0.3; exit 0`); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(r.WorkDir, "alive")
	before, err := os.ReadFile(path)
	if err != nil || len(before) == 0 {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	if after, _ := os.ReadFile(path); len(after) != len(before) {
		t.Error("it runs on")
	}
}

func TestScriptsFail(t *testing.T) {
	r := newRoom(t, layer(t))
	for name, c := range map[string]struct {
		script Script
		code   string
		says   string
	}{
		"with a failing command":          {Script{Name: "init_script 2", Text: "echo before >&2\nfalse\necho after", Strict: []string{"-e"}}, "script_failed", "init_script 2 failed"},
		"with a status":                   {Script{Name: "a", Text: "echo why; exit 7"}, "script_failed", "status 7: why"},
		"with an unset variable":          {Script{Name: "pre_launch_script", Text: "echo $nothing", Strict: []string{"-euo", "pipefail"}}, "script_failed", "unbound variable"},
		"in a pipe":                       {Script{Name: "a", Text: "false | true", Strict: []string{"-euo", "pipefail"}}, "script_failed", ""},
		"by its syntax":                   {Script{Name: "a", Text: "if"}, "script_failed", "syntax error"},
		"by a signal":                     {Script{Name: "a", Text: "kill -9 $BASHPID; sleep 0.1; (kill -9 $BASHPID)", Strict: []string{"-e"}}, "script_failed", ""},
		"when they take too long":         {Script{Name: "a", Text: "trap '' TERM; echo slow; sleep 60", Limit: 400 * time.Millisecond}, "script_timeout", "slow"},
		"when they take too long in vain": {Script{Name: "a", Text: "sleep 60 & sleep 60 & wait", Limit: 400 * time.Millisecond}, "script_timeout", "a took longer"},
		"when they are too large":         {Script{Name: "a", Text: strings.Repeat("#", maxText+1)}, "script_too_large", ""},
	} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			err := r.Run(context.Background(), c.script)
			if fault.Code(err) != c.code || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("error %v, want code %s and %q", err, c.code, c.says)
			}
			if strings.Contains(err.Error(), "after") {
				t.Error("it went on after a failing command")
			}
			if took := time.Since(begin); took > 10*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}

func TestAMissingLayerFails(t *testing.T) {
	r := newRoom(t, layer(t))
	for name, edit := range map[string]func(*Room){
		"no layer":                       func(r *Room) { r.Layer = "/nonexistent" },
		"no socket":                      func(r *Room) { r.Socket = "/nonexistent" },
		"no shell":                       func(r *Room) { r.Layer = t.TempDir() },
		"a program outside of the layer": func(r *Room) { r.Programs = map[string]string{"/../x": "/bin/true"} },
	} {
		room := r.Room
		edit(&room)
		if err := room.Run(context.Background(), Script{Name: "a", Text: "true"}); fault.Code(err) != "script_failed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Stage(); err == nil {
		t.Error("a stage without namespaces went on")
	}
}

// The decrypted environment reaches the scripts that upstream gives it, and cannot
// decide what the shell runs.
func TestEnvironmentOfScripts(t *testing.T) {
	env := map[string]string{"SECRET": "a'b\"$c\n`d", "PATH": "/dstack", "BASH_ENV": "/dstack/evil", "LD_PRELOAD_": "x", "SHELLOPTS": "xtrace"}
	m := &manifest.Manifest{InitScripts: []string{"a", "b"}, PreLaunchScript: "c", Runner: manifest.RunnerBash, BashScript: "d"}
	gates := Gates(m, env)
	var names []string
	for _, s := range gates {
		names = append(names, s.Name)
		if s.Limit == 0 {
			t.Errorf("%s has no limit", s.Name)
		}
	}
	if !slices.Equal(names, []string{"init_script 1", "init_script 2", "pre_launch_script"}) {
		t.Fatalf("gates %q", names)
	}
	if gates[0].Env != nil || gates[1].Env != nil || gates[2].Env == nil {
		t.Error("the environment is for pre_launch_script and not for init_script")
	}
	app, ok := App(m, env)
	if !ok || app.Env == nil || app.Limit != 0 {
		t.Errorf("app %+v", app)
	}
	if _, ok := App(&manifest.Manifest{Runner: manifest.RunnerDockerCompose}, env); ok {
		t.Error("compose is no script")
	}
	r := newRoom(t, layer(t))
	s := gates[2]
	s.Text = `printf '%s' "$SECRET" > got; echo "$PATH ${BASH_ENV-none}"`
	if err := r.Run(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(r.WorkDir, "got")); err != nil || string(got) != env["SECRET"] {
		t.Errorf("%q, %v", got, err)
	}
	time.Sleep(50 * time.Millisecond)
	if got := r.text(); got != "pre_launch_script: /usr/bin:/bin none" {
		t.Error(got)
	}
}

// What a script prints goes to the host, and so does why it failed.
func TestSecretsAreTakenOutOfWhatScriptsPrint(t *testing.T) {
	r := newRoom(t, layer(t))
	r.Secrets = map[string]string{"OTHER": "swordfish"}
	err := r.Run(context.Background(), Script{Name: "s", Text: "set -x; : $TOKEN swordfish; echo \"got $TOKEN\"; exit 3", Env: map[string]string{"TOKEN": "hunter2"}})
	time.Sleep(50 * time.Millisecond)
	for _, text := range []string{fmt.Sprint(err), r.text()} {
		if strings.Contains(text, "hunter2") || strings.Contains(text, "swordfish") || !strings.Contains(text, "got [TOKEN]") {
			t.Errorf("%s", text)
		}
	}
}

// A script cannot flood the console, nor this process's memory.
func TestOutputIsBounded(t *testing.T) {
	r := newRoom(t, layer(t))
	out, err := r.run(t, fmt.Sprintf("for ((i=0; i<%d; i++)); do echo $i; done; printf 'x%%.0s' {1..100000}; echo", maxLines+100))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out, "\n"); n > maxLines+1 || len(out) > 1<<20 {
		t.Errorf("%d lines, %d bytes", n, len(out))
	}
}

// The filter, looked at as the kernel does: every call of the list is denied.
func TestSeccompDeniesItsList(t *testing.T) {
	f := seccompFilter()
	if len(f) > 4096 {
		t.Fatalf("%d instructions", len(f))
	}
	eval := func(nr uint32, arg uint64) uint32 {
		data := map[uint32]uint32{0: nr, 4: auditArch, 16: uint32(arg)}
		acc := uint32(0)
		for pc := 0; pc < len(f); pc++ {
			switch i := f[pc]; i.Code {
			case 0x20:
				acc = data[i.K]
			case 0x15, 0x35, 0x45:
				yes := i.Code == 0x15 && acc == i.K || i.Code == 0x35 && acc >= i.K || i.Code == 0x45 && acc&i.K != 0
				if yes {
					pc += int(i.Jt)
				} else {
					pc += int(i.Jf)
				}
			case 0x06:
				return i.K
			default:
				t.Fatalf("instruction %+v", i)
			}
		}
		t.Fatal("no verdict")
		return 0
	}
	const allow = 0x7fff0000
	for _, nr := range deniedCalls {
		if eval(uint32(nr), 0) != 0x50000|uint32(syscall.EPERM) {
			t.Errorf("call %d is not denied", nr)
		}
	}
	for _, c := range []struct {
		nr, arg uint64
		want    uint32
	}{
		{syscall.SYS_CLONE, syscall.CLONE_NEWUSER, 0x50000 | uint32(syscall.EPERM)}, {syscall.SYS_CLONE, uint64(syscall.SIGCHLD), allow},
		{435, 0, 0x50000 | uint32(syscall.ENOSYS)}, {syscall.SYS_SOCKET, 40, 0x50000 | uint32(syscall.EPERM)},
		{syscall.SYS_SOCKET, syscall.AF_PACKET, 0x50000 | uint32(syscall.EPERM)}, {syscall.SYS_SOCKET, syscall.AF_UNIX, allow},
		{syscall.SYS_SOCKET, syscall.AF_INET6, allow}, {syscall.SYS_EXECVE, 0, allow}, {syscall.SYS_READ, 0, allow},
	} {
		if got := eval(uint32(c.nr), c.arg); got != c.want {
			t.Errorf("call %d with %#x: %#x, want %#x", c.nr, c.arg, got, c.want)
		}
	}
}
