// SPDX-License-Identifier: Apache-2.0

// Package health watches the app after the boot: it brings the compose project up
// again when the engine was restarted or compose had failed, and says in one small
// value how the app is and why.
//
// Guarantees: a report for each change and none without one; a turn for the worse
// is reported at once, one for the better when it has lasted, so that a container
// that keeps crashing does not flap; reasons are bounded and on one line. One
// goroutine, which ends with its context.
//
// Trusts: the engine's API. Attacker-controlled: names, states and messages of
// containers, as far as the app decides them.
//
// Implements spec/guest-os.md §8.3, where a failed start is not retried and its
// reason not seen.
package health

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/guest/engine"
	"github.com/dstack-go/dstack/internal/fault"
)

// State is how the app is.
type State string

// The states, from good to bad.
const (
	Healthy  State = "healthy"  // every container runs, or has done its work
	Starting State = "starting" // compose is at work, or health checks are not through
	Degraded State = "degraded" // a container exited, restarts or is unhealthy
	Failed   State = "failed"   // compose failed, or the engine is gone
)

// Container is one container of the app.
type Container struct {
	Service string `json:"service"`
	State   string `json:"state"` // in the engine's words: running, exited …
	Health  string `json:"health,omitempty"`
	Exit    int    `json:"exit,omitempty"` // status of the last end
}

// Health is how the app is.
type Health struct {
	State      State       `json:"state"`
	Reason     string      `json:"reason,omitempty"`
	Code       string      `json:"code,omitempty"` // of what failed, where it has one
	Since      time.Time   `json:"since"`
	Containers []Container `json:"containers,omitempty"` // by service, at most maxContainers
}

// Engine is what the watcher needs of the engine.
type Engine interface {
	Containers(ctx context.Context) ([]engine.Container, error)
	Restarts() int64
}

// Watcher watches one app.
type Watcher struct {
	Engine  Engine
	Project string // of compose
	// Up brings the project up; it is called again after a failure, with back-off,
	// and after an end of the engine.
	Up func(ctx context.Context) error
	// IsUp says that Up has succeeded already, at SeenRestarts ends of the engine.
	IsUp         bool
	SeenRestarts int64
	// Report is told of each change, from the watcher's goroutine.
	Report func(Health)
	// Every is the time between two looks; Settle is how long a turn for the better
	// must last. Zero: 5 s and 20 s.
	Every, Settle time.Duration
}

const (
	defaultEvery  = 5 * time.Second
	defaultSettle = 20 * time.Second
	lookLimit     = 15 * time.Second // for one question to the engine

	maxContainers = 32  // reported
	maxReasons    = 5   // named in Reason
	maxReason     = 400 // bytes
)

// Run watches until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	every, settle := w.Every, w.Settle
	if every == 0 {
		every = defaultEvery
	}
	if settle == 0 {
		settle = defaultSettle
	}
	f := filter{settle: settle, report: w.Report}
	up, seen, failures := w.IsUp, w.SeenRestarts, 0
	var lastErr error
	var retryAt time.Time
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		restarts := w.Engine.Restarts()
		list, err := w.look(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			f.put(Health{State: Failed, Reason: "the container engine does not answer: " + err.Error(), Code: "engine_down"})
		case (!up || restarts != seen) && !time.Now().Before(retryAt):
			if lastErr == nil {
				f.put(Health{State: Starting, Reason: "the app is being started", Containers: containers(list, w.Project)})
			}
			lastErr = w.Up(ctx)
			if ctx.Err() != nil {
				return
			}
			if up = lastErr == nil; up {
				// What ended while compose was at work makes for another round.
				seen, failures = restarts, 0
				continue
			}
			retryAt = time.Now().Add(max(every, supervise.Backoff(failures)))
			failures++
			fallthrough
		case !up || restarts != seen:
			h := Health{State: Failed, Reason: "the app is to be started again", Containers: containers(list, w.Project)}
			if lastErr != nil {
				h.Reason, h.Code = lastErr.Error(), fault.Code(lastErr)
			}
			f.put(h)
		default:
			f.put(judge(containers(list, w.Project)))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (w *Watcher) look(ctx context.Context) ([]engine.Container, error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	return w.Engine.Containers(ctx)
}

// filter reports changes.
type filter struct {
	settle time.Duration
	report func(Health)

	last        Health // as reported
	betterSince time.Time
}

func rank(s State) int { return slices.Index([]State{Healthy, Starting, Degraded, Failed}, s) }

func (f *filter) put(h Health) {
	now := time.Now()
	h.Reason = oneLine(h.Reason)
	if h.State == f.last.State && h.Reason == f.last.Reason {
		f.betterSince = time.Time{}
		return
	}
	if f.last.State != "" && rank(h.State) < rank(f.last.State) && h.State != Starting {
		if f.betterSince.IsZero() {
			f.betterSince = now
		}
		if now.Sub(f.betterSince) < f.settle {
			return
		}
	}
	f.betterSince = time.Time{}
	h.Since = now
	f.last = h
	f.report(h)
}

// oneLine makes what comes from outside safe for logs of lines.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "") + "…"
	}
	return s
}

// Labels of compose.
const (
	projectLabel = "com.docker.compose.project"
	serviceLabel = "com.docker.compose.service"
	oneOffLabel  = "com.docker.compose.oneoff"
)

// The engine's list has exit status and health in a text for people, such as
// "Exited (1) 2 minutes ago" and "Up 5 minutes (unhealthy)".
var (
	exitStatus = regexp.MustCompile(`^[A-Z][a-z]+ \((-?\d{1,9})\)`)
	checked    = regexp.MustCompile(`\((healthy|unhealthy|health: starting)\)$`)
)

// containers returns those of the project, by service.
func containers(list []engine.Container, project string) []Container {
	var out []Container
	for _, c := range list {
		if c.Labels[projectLabel] != project || strings.EqualFold(c.Labels[oneOffLabel], "true") {
			continue
		}
		x := Container{Service: oneLine(c.Labels[serviceLabel]), State: oneLine(c.State)}
		if m := exitStatus.FindStringSubmatch(c.Status); m != nil {
			x.Exit, _ = strconv.Atoi(m[1])
		}
		if m := checked.FindStringSubmatch(c.Status); m != nil {
			x.Health = strings.TrimPrefix(m[1], "health: ")
		}
		out = append(out, x)
	}
	slices.SortStableFunc(out, func(a, b Container) int { return strings.Compare(a.Service, b.Service) })
	return out
}

// judge says how an app with these containers is.
func judge(list []Container) Health {
	h := Health{State: Healthy, Containers: list[:min(len(list), maxContainers)]}
	if len(list) == 0 {
		h.State, h.Reason = Failed, "the app has no container"
		return h
	}
	var bad, slow []string
	for _, c := range list {
		switch {
		case c.State == "running" && c.Health == "unhealthy":
			bad = append(bad, c.Service+" is unhealthy")
		case c.State == "running" && c.Health == "starting":
			slow = append(slow, c.Service+" is not yet healthy")
		case c.State == "running", c.State == "exited" && c.Exit == 0:
		case c.State == "exited":
			bad = append(bad, fmt.Sprintf("%s exited with status %d", c.Service, c.Exit))
		case c.State == "restarting":
			bad = append(bad, fmt.Sprintf("%s keeps restarting, status %d", c.Service, c.Exit))
		case c.State == "created":
			bad = append(bad, c.Service+" was not started")
		default:
			bad = append(bad, c.Service+" is "+c.State)
		}
	}
	reasons := bad
	switch {
	case len(bad) > 0:
		h.State = Degraded
	case len(slow) > 0:
		h.State, reasons = Starting, slow
	}
	reasons = slices.Compact(reasons)
	if more := len(reasons) - maxReasons; more > 0 {
		reasons = append(reasons[:maxReasons], fmt.Sprintf("and %d more", more))
	}
	h.Reason = strings.Join(reasons, "; ")
	return h
}
