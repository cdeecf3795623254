// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/internal/fault"
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
	// NeverPull forbids images that are not in the store: set when the measured
	// manifest locks images.
	NeverPull bool
	// Wait before each further attempt; its length is the number of retries.
	Retries []time.Duration
	// Report is told of each failed attempt.
	Report func(attempt int, err error, wait time.Duration)
}

// DefaultRetries let a service that is slow to become healthy come up.
func DefaultRetries() []time.Duration { return []time.Duration{2 * time.Second, 8 * time.Second} }

// attemptLimit bounds one compose up: an app may wait for health checks.
const attemptLimit = 10 * time.Minute

// File is the path of the compose file.
func (c *Compose) File() string { return filepath.Join(c.Dir, "docker-compose.yaml") }

// Write writes the compose file: exactly the text of the measured manifest.
func (c *Compose) Write(text string) error {
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(c.File(), []byte(text), 0o600)
}

// Up brings the project up, with bounded retries. Code compose_failed.
func (c *Compose) Up(ctx context.Context) error {
	args := []string{"up", "-d", "--remove-orphans", "--quiet-pull"}
	if c.NeverPull {
		args = append(args, "--pull", "never")
	}
	for attempt := 0; ; attempt++ {
		err := c.run(ctx, attemptLimit, args...)
		if err == nil {
			return nil
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

func (c *Compose) run(ctx context.Context, limit time.Duration, args ...string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errors.New("took longer than "+limit.String()))
	defer cancel()
	path := filepath.Join(c.Config.Bin, "docker-compose")
	return c.Runner.Run(ctx, supervise.Command{
		Path: path, Args: append([]string{"docker-compose", "--progress", "plain", "-f", c.File()}, args...),
		Dir: c.Dir, Env: append(c.Config.Env(), "DOCKER_HOST=unix://"+c.Config.Socket(), "COMPOSE_ANSI=never"),
	})
}
