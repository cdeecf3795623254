// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// The order of design.md §3; docs and the VM test compare with these names.
var bootOrder = []string{
	"hostlink", "mounts", "open-root", "entropy", "tee", "read-blob", "parse", "launch-events", "config-document",
	"firewall", "network", "time", "key-provider", "runtime-events", "data-disk", "release-log", "env", "channel-key", "system-ready",
	"ingress", "scripts", "engine", "images", "compose-up", "done",
}

func TestThePhasesAreThoseOfTheDesign(t *testing.T) {
	var names []string
	for _, p := range newMachine(Options{}).Phases() {
		names = append(names, p.Name)
	}
	if !slices.Equal(names, bootOrder) {
		t.Fatalf("phases\n%v, want\n%v", names, bootOrder)
	}
}

func TestProgressUsesUpstreamsWordsInUpstreamsOrder(t *testing.T) {
	upstream := []string{"requesting app keys", "initializing data disk", "data disk ready", "setting up docker", "starting containers", "done"}
	at := 0
	for _, p := range newMachine(Options{}).Phases() {
		if at < len(upstream) && p.Progress == upstream[at] {
			at++
		}
	}
	// "init-script" precedes "setting up docker" here: scripts run before the engine.
	if at != len(upstream) {
		t.Fatalf("%q is missing or out of order", upstream[at])
	}
}

// record is a Runner that notes everything.
type record struct {
	lines, progress, ran []string
	clock                time.Time
}

func (r *record) runner() *Runner {
	return &Runner{
		Log:      func(l string) { r.lines = append(r.lines, l) },
		Progress: func(v string) { r.progress = append(r.progress, v) },
		Now:      func() time.Time { r.clock = r.clock.Add(6 * time.Millisecond); return r.clock },
	}
}

// phases returns the real list with every action replaced.
func (r *record) phases(fail string, err error) []Phase {
	list := newMachine(Options{}).Phases()
	for i, p := range list {
		list[i].Run = func(context.Context) error {
			r.ran = append(r.ran, p.Name)
			if p.Name == fail {
				return err
			}
			return nil
		}
	}
	return list
}

func TestEveryPhaseThatFailsEndsTheBootWithItsCode(t *testing.T) {
	for i, name := range bootOrder {
		t.Run(name, func(t *testing.T) {
			var r record
			code := "code_" + strings.ReplaceAll(name, "-", "_")
			err := fmt.Errorf("while testing: %w", fault.New(code, "no %s today", name).WithFix("try tomorrow"))
			timings, f := r.runner().Run(context.Background(), r.phases(name, err))
			if f == nil || f.Phase != name || f.Code() != code {
				t.Fatalf("failure %+v", f)
			}
			if !slices.Equal(r.ran, bootOrder[:i+1]) {
				t.Errorf("ran %v", r.ran)
			}
			if want := fmt.Sprintf("%s: while testing: no %s today (fix: try tomorrow)", code, name); f.String() != want {
				t.Errorf("reported %q, want %q", f, want)
			}
			if want := fmt.Sprintf("phase %s FAILED code=%s while testing: no %s today", name, code, name); !slices.Contains(r.lines, want) {
				t.Errorf("console %q lacks %q", r.lines, want)
			}
			if len(r.progress) != i+1 || len(timings) != i+1 {
				t.Errorf("%d progress reports and %d timings for %d phases", len(r.progress), len(timings), i+1)
			}
		})
	}
}

func TestABootThatSucceeds(t *testing.T) {
	var r record
	timings, f := r.runner().Run(context.Background(), r.phases("", nil))
	if f != nil || len(timings) != len(bootOrder) {
		t.Fatalf("failure %v after %d phases", f, len(timings))
	}
	if r.progress[len(r.progress)-1] != "done" {
		t.Errorf("last progress %q", r.progress[len(r.progress)-1])
	}
	if want := "phase hostlink ok 6ms"; r.lines[0] != want {
		t.Errorf("first line %q, want %q", r.lines[0], want)
	}
}

func TestAPanicIsTheFailureOfItsPhase(t *testing.T) {
	var r record
	_, f := r.runner().Run(context.Background(), []Phase{
		{Name: "bad", Run: func(context.Context) error { panic("boo\nforged: line") }},
		{Name: "never", Run: func(context.Context) error { t.Error("ran"); return nil }},
	})
	if f == nil || f.Code() != "internal" || strings.ContainsRune(f.String(), '\n') || !strings.Contains(f.String(), "boo") {
		t.Fatalf("failure %v", f)
	}
}

func TestAPhaseThatHangsIsLeftBehind(t *testing.T) {
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	for name, run := range map[string]func(context.Context) error{
		"heeds its context": func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
		"heeds nothing":     func(context.Context) error { <-hang; return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r record
			_, f := r.runner().Run(context.Background(), []Phase{{Name: "slow", Limit: 50 * time.Millisecond, Run: run}})
			if f == nil || f.Code() != "phase_timeout" {
				t.Fatalf("failure %v", f)
			}
		})
	}
}

func TestAnErrorWithoutCodeIsInternal(t *testing.T) {
	f := &Failure{Err: errors.New("x")}
	if f.String() != "internal: x" {
		t.Fatal(f)
	}
}
