// SPDX-License-Identifier: Apache-2.0

// Package fsmtest crashes a state machine's driver at every point where a crash
// differs from no crash, lets it recover, and checks what the world looks like.
package fsmtest

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/dstack-go/dstack/internal/fsm"
)

// Case describes one exploration. W is a fake world: what survives a crash of the
// process, such as the set of running VMs and the files on disk.
type Case[S, I any, E fsm.Effect, W any] struct {
	Machine fsm.Machine[S, I, E]
	Initial S
	Inputs  []I
	// NewWorld returns a fresh world for each run.
	NewWorld func() W
	// Perform does one effect to the world, idempotently.
	Perform func(W, E) ([]I, error)
	// Check returns an error when state and world do not fit together. It is
	// called whenever no effect is outstanding: after each recovery and after each
	// input that follows it.
	Check func(S, W) error
}

// crash is thrown at the chosen point; nothing of the driver survives it.
type crash struct{}

// Run explores the case and fails the test at the first violation.
func Run[S, I any, E fsm.Effect, W any](t *testing.T, c Case[S, I, E, W]) {
	t.Helper()
	if err := Explore(c); err != nil {
		t.Fatal(err)
	}
}

// Explore performs the inputs without a crash, then once for every point after a
// saved record or a performed effect with a crash there, followed by recovery
// from the last record (through JSON, as on disk) and by the remaining inputs;
// and each of these again with a second crash at every point of the recovery.
// Inputs that the machine refuses are skipped, as a user's would be.
func Explore[S, I any, E fsm.Effect, W any](c Case[S, I, E, W]) error {
	points, err := explore(c, nil)
	if err != nil {
		return fmt.Errorf("without a crash: %w", err)
	}
	for first := 1; first <= points; first++ {
		recovery, err := explore(c, []int{first})
		if err != nil {
			return fmt.Errorf("crash at point %d of %d: %w", first, points, err)
		}
		for second := 1; second <= recovery; second++ {
			if _, err := explore(c, []int{first, second}); err != nil {
				return fmt.Errorf("crash at point %d, then at %d: %w", first, second, err)
			}
		}
	}
	return nil
}

// explore runs the inputs with a crash at crashes[0], then one that many points
// into the recovery at crashes[1], and so on. It returns the number of points
// passed after the last crash.
func explore[S, I any, E fsm.Effect, W any](c Case[S, I, E, W], crashes []int) (points int, err error) {
	ctx := context.Background()
	world := c.NewWorld()
	disk, err := json.Marshal(fsm.Record[S, E]{State: c.Initial})
	if err != nil {
		return 0, err
	}
	var trace []string
	tick := func(format string, args ...any) {
		trace = append(trace, fmt.Sprintf(format, args...))
		points++
		if len(crashes) > 0 && points == crashes[0] {
			trace = append(trace, "CRASH")
			crashes, points = crashes[1:], 0
			panic(crash{})
		}
	}
	next := 0 // inputs[next:] are not yet accepted

	life := func() (crashed bool, err error) { // one process, from load to crash or end
		defer func() {
			if r := recover(); r != nil {
				if _, ours := r.(crash); !ours {
					panic(r)
				}
				crashed = true
			}
		}()
		var rec fsm.Record[S, E]
		if err := json.Unmarshal(disk, &rec); err != nil {
			return false, fmt.Errorf("load record: %w", err)
		}
		accepting := false
		d := fsm.New(c.Machine, rec, func(rec fsm.Record[S, E]) error {
			data, err := json.Marshal(rec)
			if err != nil {
				return err
			}
			disk = data
			if accepting {
				next++
			}
			tick("saved %s", data)
			return nil
		}, func(_ context.Context, e E) ([]I, error) {
			inputs, err := c.Perform(world, e)
			tick("performed %s", e)
			return inputs, err
		})
		settle := func() error {
			if err := d.Drain(ctx); err != nil {
				return err
			}
			return c.Check(d.State(), world)
		}
		if err := settle(); err != nil {
			return false, err
		}
		for next < len(c.Inputs) {
			at := next
			accepting = true
			err := d.Post(c.Inputs[at])
			accepting = false
			if err != nil {
				trace = append(trace, fmt.Sprintf("refused %v: %v", c.Inputs[at], err))
				next = at + 1
				continue
			}
			if err := settle(); err != nil {
				return false, err
			}
		}
		return false, nil
	}
	for {
		crashed, err := life()
		if err != nil {
			return points, fmt.Errorf("%w\ntrace: %q", err, trace)
		}
		if !crashed {
			return points, nil
		}
	}
}
