// SPDX-License-Identifier: Apache-2.0

// Package script runs the shell scripts of a manifest. The system itself runs no
// shell; the scripts' comes from a layer of its own, a squashfs under dm-verity that
// the caller has mounted, and each script is one bash in a world of its own:
//
//   - a mount namespace whose root is that layer, with changes going to memory and
//     lost at the end, and besides it only the work directory /dstack, the agent's
//     socket dstack.sock, an empty /tmp, and the harmless devices. The engine's
//     socket, the data disk and the rest of /run are not there;
//   - process, IPC and host name namespaces of its own: it sees no other process,
//     and whatever it started ends with it;
//   - no capabilities and no way back to any, and a system call filter;
//   - the guest's network, behind the guest's firewall.
//
// The text goes down in memory, never in arguments. The decrypted environment is
// given to pre_launch_script and bash_script, as upstream does, and not to
// init_script, which has the files only (spec/guest-os.md §5, §8.3).
//
// Guarantees: a script that ended otherwise than with status 0, or not within its
// time, is an error that names it. Trusts: the kernel, the layer (measured by the
// command line), the scripts as far as the manifest is measured. Attacker-
// controlled: what scripts fetch and print.
//
// Implements design.md §6.
package script

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/redact"
	"github.com/dstack-go/dstack/manifest"
)

// Script is one script of a manifest.
type Script struct {
	// Name is how messages call it, such as "init_script 2".
	Name string
	Text string
	// Env are variables of its environment besides PATH, HOME, LANG and SHELL.
	Env map[string]string
	// Strict are bash's options, such as "-euo pipefail" word by word.
	Strict []string
	// Limit is how long it may run; zero: for ever.
	Limit time.Duration
}

// gateLimit bounds a script that the boot waits for.
const gateLimit = 10 * time.Minute

// Gates returns the scripts that must succeed before the app starts, in order: the
// init scripts, then pre_launch_script.
func Gates(m *manifest.Manifest, env map[string]string) []Script {
	var list []Script
	for i, text := range m.InitScripts {
		name := "init_script"
		if len(m.InitScripts) > 1 {
			name = fmt.Sprintf("init_script %d", i+1)
		}
		list = append(list, Script{Name: name, Text: text, Strict: []string{"-e"}, Limit: gateLimit})
	}
	if m.PreLaunchScript != "" {
		list = append(list, Script{
			Name: "pre_launch_script", Text: m.PreLaunchScript, Env: env, Strict: []string{"-euo", "pipefail"}, Limit: gateLimit,
		})
	}
	return list
}

// App returns the script that is the app, for a manifest of the runner bash. It
// runs in the foreground, for as long as it likes.
func App(m *manifest.Manifest, env map[string]string) (Script, bool) {
	return Script{Name: "bash_script", Text: m.BashScript, Env: env}, m.Runner == manifest.RunnerBash
}

// runner starts a program and waits for it.
type runner interface {
	Run(ctx context.Context, c supervise.Command) error
}

// Room is where scripts run.
type Room struct {
	// Layer is the directory where the scripts layer is mounted.
	Layer string
	// WorkDir is mounted at /dstack, writable.
	WorkDir string
	// Socket is the agent's socket, mounted as /run/dstack.sock.
	Socket string
	// Resolver is the file that becomes /run/resolv.conf; it may be absent.
	Resolver string
	// Programs are files of the guest mounted read-only into the layer, by path in
	// the layer.
	Programs map[string]string

	// Exe is this program, which is started again as a stage; see Stage.
	Exe    string
	Runner runner
	// Log is told of each line that a script prints, at most maxLines of one, with the
	// values of Secrets and of the script's environment taken out: lines and errors
	// go to the host's console.
	Log     func(script, line string)
	Secrets map[string]string
}

// StageArg is the argument with which Room starts Exe again. Its main function must
// then call Stage and nothing else.
const StageArg = "script-stage"

const (
	maxText  = 1 << 20 // bytes of one script
	keep     = 8 << 10 // bytes kept of the output, for messages
	maxLines = 500     // lines of one script that are logged
)

// stageConfig is what the stage reads from its first inherited file. The second is
// the text.
type stageConfig struct {
	Layer, WorkDir, Socket, Resolver string
	Programs                         map[string]string
	Args, Env                        []string
}

// Inherited files of the stage, and of the script.
const (
	configFD = 3
	textFD   = 4
)

// Run runs the script and waits for its end. Codes script_failed, script_timeout,
// script_too_large.
func (r *Room) Run(ctx context.Context, s Script) error {
	if len(s.Text) > maxText {
		return fault.New("script_too_large", "%s has %d bytes, more than %d", s.Name, len(s.Text), maxText)
	}
	config, err := json.Marshal(stageConfig{
		Layer: r.Layer, WorkDir: r.WorkDir, Socket: r.Socket, Resolver: r.Resolver, Programs: r.Programs,
		Args: append(append([]string{"bash", "--noprofile", "--norc"}, s.Strict...), "-c", fmt.Sprintf(". /proc/self/fd/%d", textFD), s.Name),
		Env:  environment(s.Env),
	})
	if err != nil {
		return err
	}
	defer clear(config)
	configFile, err := supervise.SecretFile("config", config)
	if err != nil {
		return err
	}
	defer configFile.Close()
	text, err := supervise.SecretFile("script", []byte(s.Text))
	if err != nil {
		return err
	}
	defer text.Close()

	late := fault.New("script_timeout", "%s took longer than %s", s.Name, s.Limit)
	if s.Limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.Limit, late)
		defer cancel()
	}
	known := maps.Clone(s.Env)
	if known == nil {
		known = map[string]string{}
	}
	maps.Copy(known, r.Secrets)
	secrets := redact.New(known)
	lines := &logger{room: r, name: s.Name, secrets: secrets}
	output := supervise.NewTail(keep)
	output.Line = lines.line
	err = r.Runner.Run(ctx, supervise.Command{
		Path: r.Exe, Args: []string{"bash", StageArg}, Env: []string{}, Dir: "/", Output: output,
		Files: []*os.File{configFile, text},
		Attr: &syscall.SysProcAttr{
			Setsid:     true,
			Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		},
	})
	lines.end()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, late):
		if last := secrets.Text(output.LastLines(3)); last != "" {
			return fault.Wrap(errors.New(last), late.Code, "%s", late.Message)
		}
		return late
	default:
		if text := secrets.Text(err.Error()); text != err.Error() {
			err = errors.New(text)
		}
		return fault.Wrap(err, "script_failed", "%s failed", s.Name).WithFix("`dstack logs` has what it printed; a script fails with its first failing command")
	}
}

// environment returns the variables of a script. Those of the system win: values
// that decide what the shell runs are not for the environment to set.
func environment(env map[string]string) []string {
	all := maps.Clone(env)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, map[string]string{"PATH": "/usr/bin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "SHELL": "/usr/bin/bash"})
	for _, name := range []string{"BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS", "IFS"} {
		delete(all, name)
	}
	var out []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		out = append(out, name+"="+all[name])
	}
	return out
}

// logger passes on the first lines of a script.
type logger struct {
	room    *Room
	name    string
	secrets *redact.Redactor
	mu      sync.Mutex
	n       int
}

func (l *logger) line(text string) {
	l.mu.Lock()
	l.n++
	n := l.n
	l.mu.Unlock()
	if n <= maxLines && l.room.Log != nil {
		l.room.Log(l.name, l.secrets.Text(text))
	}
}

func (l *logger) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if more := l.n - maxLines; more > 0 && l.room.Log != nil {
		l.room.Log(l.name, fmt.Sprintf("(%d lines more)", more))
	}
}
