// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// Phase is one step of the boot.
type Phase struct {
	// Name is stable: the host, the console and tests know it.
	Name string
	// Progress is what the host is told when the phase begins, in upstream's words
	// where it has some (vmm.md §9.2); empty: the name.
	Progress string
	// Limit bounds the phase; zero: defaultLimit.
	Limit time.Duration
	Run   func(ctx context.Context) error
}

// defaultLimit is for phases that do no more than local work. Generous, for an
// emulated machine on a busy host is a hundred times slower than a real one.
const defaultLimit = 60 * time.Second

// Timing is how long a phase took.
type Timing struct {
	Name string `json:"name"`
	MS   int64  `json:"ms"`
}

// Failure is why a boot ended.
type Failure struct {
	Phase string
	Err   error
}

// Code returns the stable code of the failure; "internal" for an error without.
func (f *Failure) Code() string {
	if code := fault.Code(f.Err); code != "" {
		return code
	}
	return "internal"
}

// String returns "CODE: message", on one line.
func (f *Failure) String() string {
	text := f.Code() + ": " + f.Err.Error()
	if fix := fault.Fix(f.Err); fix != "" {
		text += " (fix: " + fix + ")"
	}
	return oneLine(text)
}

// oneLine makes text safe for a log of lines: control characters, which hostile
// input in an error could use to forge lines, become spaces.
func oneLine(text string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
}

// Runner runs phases in order.
type Runner struct {
	Log      func(line string)  // console; never blocks for long
	Progress func(value string) // host; never blocks
	Enter    func(phase string) // told of each phase as it begins; may be nil
	Now      func() time.Time   // clock for the timings
}

// Run runs the phases until one fails. No phase begins before the one above it
// has ended well.
func (r *Runner) Run(ctx context.Context, phases []Phase) ([]Timing, *Failure) {
	var timings []Timing
	for _, p := range phases {
		if r.Enter != nil {
			r.Enter(p.Name)
		}
		progress := p.Progress
		if progress == "" {
			progress = p.Name
		}
		r.Progress(progress)
		begin := r.Now()
		err := runPhase(ctx, p)
		took := r.Now().Sub(begin).Milliseconds()
		timings = append(timings, Timing{p.Name, took})
		if err != nil {
			f := &Failure{Phase: p.Name, Err: err}
			r.Log(fmt.Sprintf("phase %s FAILED code=%s %s", p.Name, f.Code(), oneLine(err.Error())))
			if fix := fault.Fix(err); fix != "" {
				r.Log("fix: " + oneLine(fix))
			}
			return timings, f
		}
		r.Log(fmt.Sprintf("phase %s ok %dms", p.Name, took))
	}
	return timings, nil
}

// runPhase bounds a phase in time and turns a panic into its failure. A phase that
// does not heed its context is left behind: after a failure nothing follows but the
// power switch.
func runPhase(ctx context.Context, p Phase) error {
	limit := p.Limit
	if limit == 0 {
		limit = defaultLimit
	}
	late := fault.New("phase_timeout", "phase %s took longer than %s", p.Name, limit)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, late)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if v := recover(); v != nil {
				done <- fault.New("internal", "phase %s panicked: %v: %s", p.Name, v, debug.Stack())
			}
		}()
		done <- p.Run(ctx)
	}()
	grace := time.NewTimer(limit + 2*time.Second)
	defer grace.Stop()
	select {
	case err := <-done:
		if errors.Is(err, context.DeadlineExceeded) && fault.Code(err) == "" {
			return fault.Wrap(err, late.Code, "%s", late.Message)
		}
		return err
	case <-grace.C:
		return late
	}
}
