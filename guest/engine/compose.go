// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/mutable"
)

// runner starts a program and waits for it.
type runner interface {
	Run(ctx context.Context, c supervise.Command) error
}

// Compose runs docker compose for the app's one project.
type Compose struct {
	Config Config
	Dir    string // work directory; its base name is the project's name unless the file has one
	Runner runner
	// NeverPull forbids images that are not in the store, and builds: set when the
	// measured manifest locks images.
	NeverPull bool
	// Env is the decrypted environment. It is for interpolation of the compose file
	// only: compose reads it from an inherited file in memory, and neither its
	// arguments nor its environment have it.
	Env map[string]string
	// Fresh makes every container anew at the first Up that succeeds, whatever an
	// earlier boot left of it; volumes stay. Set when the measured manifest locks
	// images.
	Fresh bool
	// Override is a second compose file merged over the first; see ScopeOverride.
	Override []byte
	// Wait before each further attempt; its length is the number of retries.
	Retries []time.Duration
	// Report is told of each failed attempt.
	Report func(attempt int, err error, wait time.Duration)

	text *string // as given to Write
}

// DefaultRetries let a service that is slow to become healthy come up.
func DefaultRetries() []time.Duration { return []time.Duration{2 * time.Second, 8 * time.Second} }

// attemptLimit bounds one compose up: an app may wait for health checks.
const attemptLimit = 10 * time.Minute

// DefaultProject is what compose calls a project whose file gives no name: the base
// name of the guest's work directory.
const DefaultProject = "dstack"

// Project returns what compose calls the project of a file, and its services. There
// are none when the file cannot be read in full: who removes what is none of them
// must then remove nothing.
func Project(compose string) (name string, services []string) {
	file := mutable.Read([]byte(compose))
	if name = file.Name; name == "" || strings.Contains(name, "$") {
		name = DefaultProject
	}
	for _, f := range file.Findings {
		if f.Rule == mutable.Unreadable || f.Rule == mutable.Outside && f.Service == "" {
			return name, nil
		}
	}
	return name, slices.Sorted(maps.Keys(file.Services))
}

// File is the path of the compose file.
func (c *Compose) File() string { return filepath.Join(c.Dir, "docker-compose.yaml") }

// Write writes the compose file: exactly the text of the measured manifest.
func (c *Compose) Write(text string) error {
	c.text = &text
	return c.write()
}

// write is repeated before each start: a container or a script with the work
// directory mounted may have changed the file since.
func (c *Compose) write() error {
	if c.text == nil {
		return nil
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(c.File()); err != nil {
		return err
	}
	return os.WriteFile(c.File(), []byte(*c.text), 0o600)
}

// Up brings the project up, with bounded retries. Code compose_failed.
func (c *Compose) Up(ctx context.Context) error {
	args := []string{"up", "-d", "--remove-orphans", "--quiet-pull"}
	if c.NeverPull {
		args = append(args, "--pull", "never", "--no-build")
	}
	if c.Fresh {
		args = append(args, "--force-recreate")
	}
	if err := c.write(); err != nil {
		return err
	}
	for attempt := 0; ; attempt++ {
		err := c.run(ctx, attemptLimit, args...)
		if err == nil {
			c.Fresh = false
			return nil
		}
		if fault.Code(err) == "env_value" {
			return err
		}
		if attempt == len(c.Retries) || ctx.Err() != nil || permanent(err) {
			return fault.Wrap(err, "compose_failed", "the app did not start after %d attempts", attempt+1).
				WithFix("read the reason above; `dstack logs` has the output of the containers")
		}
		wait := c.Retries[attempt]
		if c.Report != nil {
			c.Report(attempt+1, err, wait)
		}
		select {
		case <-ctx.Done():
			return fault.Wrap(err, "compose_failed", "the app did not start")
		case <-time.After(wait):
		}
	}
}

// permanent recognises failures that another attempt cannot change: the file is
// wrong, or an image is not there and may not be fetched.
func permanent(err error) bool {
	text := err.Error()
	for _, sign := range []string{"No such image", "yaml:", "validating /", "additional properties", "service has neither"} {
		if strings.Contains(text, sign) {
			return true
		}
	}
	return false
}

// Stop stops the project's containers, each within grace.
func (c *Compose) Stop(ctx context.Context, grace time.Duration) error {
	return c.run(ctx, grace+10*time.Second, "stop", "-t", fmt.Sprint(int(grace.Seconds())))
}

// Descriptors that compose inherits, in the order of supervise.Command.Files.
const firstFile = 3

func (c *Compose) run(ctx context.Context, limit time.Duration, args ...string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errors.New("took longer than "+limit.String()))
	defer cancel()
	command, err := c.command(args...)
	for _, f := range command.Files {
		defer f.Close()
	}
	if err != nil {
		return err
	}
	return redacted(c.Runner.Run(ctx, command), c.Env)
}

// command returns what to run. The caller closes the files, after an error too.
func (c *Compose) command(args ...string) (supervise.Command, error) {
	command := supervise.Command{
		Path: filepath.Join(c.Config.Bin, "docker-compose"),
		Args: []string{"docker-compose", "--progress", "plain", "-f", c.File()},
		Dir:  c.Dir, Env: append(c.Config.processEnv(), "DOCKER_HOST=unix://"+c.Config.Socket(), "COMPOSE_ANSI=never"),
	}
	// inherit hands a file in memory down and returns its path in the child.
	inherit := func(name string, content []byte) (string, error) {
		f, err := supervise.SecretFile(name, content)
		if err != nil {
			return "", err
		}
		command.Files = append(command.Files, f)
		return fmt.Sprintf("/proc/self/fd/%d", firstFile+len(command.Files)-1), nil
	}
	if len(c.Override) > 0 {
		path, err := inherit("override", c.Override)
		if err != nil {
			return command, err
		}
		// A path outside the work directory must not become the project's directory.
		command.Args = append(command.Args, "-f", path, "--project-directory", c.Dir)
	}
	if len(c.Env) > 0 {
		content, err := composeEnv(c.Env)
		if err != nil {
			return command, err
		}
		defer clear(content)
		path, err := inherit("env", content)
		if err != nil {
			return command, err
		}
		// Given one env file, compose no longer looks for .env, which a script may
		// have written; the decrypted values win over it, as upstream.
		if info, err := os.Lstat(filepath.Join(c.Dir, ".env")); err == nil && info.Mode().IsRegular() {
			command.Args = append(command.Args, "--env-file", filepath.Join(c.Dir, ".env"))
		}
		command.Args = append(command.Args, "--env-file", path)
	}
	command.Args = append(command.Args, args...)
	return command, nil
}
