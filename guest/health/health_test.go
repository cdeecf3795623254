// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dstack-go/dstack/guest/engine"
	"github.com/dstack-go/dstack/internal/fault"
)

func container(service, state, status string) engine.Container {
	return engine.Container{State: state, Status: status, Labels: map[string]string{projectLabel: "dstack", serviceLabel: service}}
}

var running = container("web", "running", "Up 2 minutes")

func TestJudge(t *testing.T) {
	foreign := container("x", "exited", "Exited (1) now")
	foreign.Labels[projectLabel] = "other"
	oneOff := container("x", "exited", "Exited (1) now")
	oneOff.Labels[oneOffLabel] = "True"
	var many []engine.Container
	for i := range 50 {
		many = append(many, container(fmt.Sprintf("s%02d", i), "exited", "Exited (1) now"))
	}
	for name, c := range map[string]struct {
		list   []engine.Container
		state  State
		reason string
	}{
		"all run":                       {[]engine.Container{running, container("db", "running", "Up 1 second (healthy)")}, Healthy, ""},
		"one has done its work":         {[]engine.Container{running, container("job", "exited", "Exited (0) 5 seconds ago")}, Healthy, ""},
		"one exited":                    {[]engine.Container{running, container("db", "exited", "Exited (137) 5 seconds ago")}, Degraded, "db exited with status 137"},
		"one is unhealthy":              {[]engine.Container{container("web", "running", "Up 5 minutes (unhealthy)")}, Degraded, "web is unhealthy"},
		"one is not yet healthy":        {[]engine.Container{container("web", "running", "Up 5 seconds (health: starting)")}, Starting, "web is not yet healthy"},
		"one keeps restarting":          {[]engine.Container{container("web", "restarting", "Restarting (3) 2 seconds ago")}, Degraded, "web keeps restarting, status 3"},
		"one was not started":           {[]engine.Container{running, container("db", "created", "Created")}, Degraded, "db was not started"},
		"one is paused":                 {[]engine.Container{container("web", "paused", "Up 5 minutes (Paused)")}, Degraded, "web is paused"},
		"two are bad, one is slow":      {[]engine.Container{container("b", "dead", "Dead"), container("a", "exited", "Exited (2) x"), container("c", "running", "Up (health: starting)")}, Degraded, "a exited with status 2; b is dead"},
		"replicas are named once":       {[]engine.Container{container("a", "exited", "Exited (2) x"), container("a", "exited", "Exited (2) x")}, Degraded, "a exited with status 2"},
		"other containers do not count": {[]engine.Container{running, foreign, oneOff}, Healthy, ""},
		"none":                          {nil, Failed, "the app has no container"},
		"very many":                     {many, Degraded, "s00 exited with status 1; s01 exited with status 1; s02 exited with status 1; s03 exited with status 1; s04 exited with status 1; and 45 more"},
	} {
		t.Run(name, func(t *testing.T) {
			h := judge(containers(c.list, "dstack"))
			if h.State != c.state || h.Reason != c.reason || len(h.Containers) > maxContainers {
				t.Errorf("%s %q, %d containers", h.State, h.Reason, len(h.Containers))
			}
		})
	}
}

// world is an engine whose state a test sets.
type world struct {
	mu       sync.Mutex
	list     []engine.Container
	err      error
	restarts int64
	upErr    error
	ups      []time.Time
	reports  []Health
}

func (w *world) Containers(context.Context) ([]engine.Container, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.list), w.err
}

func (w *world) Restarts() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.restarts
}

func (w *world) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// states returns what was reported since the last call.
func (w *world) states() (out []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, h := range w.reports {
		out = append(out, strings.TrimSpace(string(h.State)+" "+h.Reason))
	}
	w.reports = nil
	return out
}

// watch runs a watcher in a bubble of fake time until the test ends.
func watch(t *testing.T, w *world, isUp bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		(&Watcher{
			Engine: w, Project: "dstack", IsUp: isUp,
			Up: func(context.Context) error {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.ups = append(w.ups, time.Now())
				return w.upErr
			},
			Report: func(h Health) { w.set(func() { w.reports = append(w.reports, h) }) },
		}).Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
}

func expect(t *testing.T, w *world, after time.Duration, want ...string) {
	t.Helper()
	time.Sleep(after)
	synctest.Wait()
	if got := w.states(); !slices.Equal(got, want) {
		t.Errorf("reports %q, want %q", got, want)
	}
}

func TestChangesAreReportedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{list: []engine.Container{running}}
		watch(t, w, true)
		expect(t, w, time.Second, "healthy")
		expect(t, w, time.Hour)
		w.set(func() { w.list = []engine.Container{container("web", "exited", "Exited (1) now")} })
		expect(t, w, 6*time.Second, "degraded web exited with status 1")
		expect(t, w, time.Hour)
		w.set(func() { w.list = []engine.Container{running} })
		expect(t, w, 10*time.Second)
		expect(t, w, 20*time.Second, "healthy")
		if len(w.ups) != 0 {
			t.Errorf("compose was started %d times", len(w.ups))
		}
	})
}

func TestACrashingContainerDoesNotFlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{list: []engine.Container{running}}
		watch(t, w, true)
		expect(t, w, time.Second, "healthy")
		for i := range 100 {
			w.set(func() {
				w.list = []engine.Container{running}
				if i%2 == 0 {
					w.list = []engine.Container{container("web", "restarting", "Restarting (1) now")}
				}
			})
			time.Sleep(5 * time.Second)
		}
		expect(t, w, 0, "degraded web keeps restarting, status 1")
	})
}

func TestTheAppComesBackAfterAnEndOfTheEngine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{list: []engine.Container{running}}
		watch(t, w, true)
		expect(t, w, time.Second, "healthy")
		w.set(func() { w.err = errors.New("connection refused"); w.restarts++ })
		expect(t, w, 6*time.Second, "failed the container engine does not answer: connection refused")
		expect(t, w, time.Minute)
		w.set(func() { w.err = nil })
		expect(t, w, time.Minute, "starting the app is being started", "healthy")
		if len(w.ups) != 1 {
			t.Errorf("compose was started %d times", len(w.ups))
		}
		// An end between two looks is seen all the same.
		w.set(func() { w.restarts++ })
		expect(t, w, time.Minute, "starting the app is being started", "healthy")
		if len(w.ups) != 2 {
			t.Errorf("compose was started %d times", len(w.ups))
		}
	})
}

func TestAFailedStartIsTriedAgainWithItsReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{upErr: fault.New("compose_failed", "port\nis busy")}
		watch(t, w, false)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		w.mu.Lock()
		ups, code := slices.Clone(w.ups), w.reports[len(w.reports)-1].Code
		w.mu.Unlock()
		if code != "compose_failed" {
			t.Errorf("code %q", code)
		}
		expect(t, w, 0, "starting the app is being started", "failed port is busy")
		if n := len(ups); n < 15 || n > 40 {
			t.Errorf("%d attempts in ten minutes", n)
		}
		for i := 1; i < len(ups); i++ {
			if gap := ups[i].Sub(ups[i-1]); gap > 40*time.Second {
				t.Errorf("attempt %d came after %s", i, gap)
			}
		}
		w.set(func() { w.upErr, w.list = nil, []engine.Container{running} })
		expect(t, w, 2*time.Minute, "healthy")
	})
}

func TestReasonsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{err: errors.New(strings.Repeat("x\x1b[31m\n", 1000))}
		watch(t, w, true)
		time.Sleep(time.Second)
		synctest.Wait()
		w.mu.Lock()
		defer w.mu.Unlock()
		if r := w.reports[0].Reason; len(r) > maxReason+4 || strings.ContainsAny(r, "\n\x1b") {
			t.Errorf("%q", r)
		}
	})
}
