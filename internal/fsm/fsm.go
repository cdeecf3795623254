// SPDX-License-Identifier: Apache-2.0

// Package fsm is the one shape of state machines in this project: VM lifecycle,
// boot, onboarding and key epochs all are pure functions
//
//	(state, input) → (state, effects as values)
//
// driven by one [Driver], and tested by one harness (fsmtest) that crashes the
// driver after every step and after every effect.
//
// # Guarantees
//
//   - An input that Post or Send accepted is in the saved record, together with
//     the effects it asked for, before any of those effects is performed.
//   - Effects are performed one at a time, in the order in which they were asked
//     for. Each is performed at least once, and again if the process died before
//     its completion was saved. Perform must therefore be idempotent: "make it so
//     that a QEMU with this id runs", never "start a QEMU".
//   - What an effect reports back (the inputs that Perform returns) is stepped
//     and saved in the same record that drops the effect, so that a report is
//     neither lost nor stepped twice.
//
// # Use
//
// State S and effect E must survive encoding/json, since records are saved; a
// struct with a kind and plain fields does. A lifecycle looks like this:
//
//	created --start--> starting --[spawn]--> started--> running --exited--> stopped
//	running --stop--> stopping --[powerdown, kill]--> exited--> stopped
//	any --remove--> removing --[kill, delete files]--> gone--> removed
//
// where words on arrows are inputs and those in brackets are effects. Events from
// outside (a process died, the guest reported) are inputs like those from users.
// Perform returns an error only when the effect could not be tried and should be
// tried again (it stays outstanding and blocks those behind it); when it was
// tried and failed, that is an outcome: an input, on which the machine decides.
package fsm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// Effect is something to be done to the world, as a value. String names it in
// errors and test output; it must not contain secrets.
type Effect interface{ fmt.Stringer }

// Machine is the pure part. Step must not do I/O, read the clock or keep state,
// and must not change what state points to. An error refuses the input: the state
// stays as it was and the returned effects are ignored.
type Machine[S, I any, E Effect] interface {
	Step(state S, input I) (S, []E, error)
}

// Func makes a Machine of a function.
type Func[S, I any, E Effect] func(state S, input I) (S, []E, error)

// Step calls f.
func (f Func[S, I, E]) Step(state S, input I) (S, []E, error) { return f(state, input) }

// Record is what is saved: the state, and the effects not known to be complete,
// oldest first.
type Record[S any, E Effect] struct {
	State   S   `json:"state"`
	Pending []E `json:"pending,omitempty"`
}

// Driver runs one machine. Its methods may be called by several goroutines.
type Driver[S, I any, E Effect] struct {
	machine Machine[S, I, E]
	save    func(Record[S, E]) error
	perform func(context.Context, E) ([]I, error)

	turn chan struct{} // holds a token while no effect is being performed
	mu   sync.Mutex    // guards rec; held while saving, never while performing
	rec  Record[S, E]
}

// New returns a driver that continues from rec, either fresh (a state and nothing
// pending) or loaded. It performs nothing yet: call Drain after loading.
//
// save makes a record durable before it returns nil (internal/durable.WriteFile);
// the driver calls it from one goroutine at a time. perform must be idempotent and
// must not call Drain or Send of this driver; Post is allowed.
func New[S, I any, E Effect](m Machine[S, I, E], rec Record[S, E],
	save func(Record[S, E]) error, perform func(context.Context, E) ([]I, error)) *Driver[S, I, E] {
	d := &Driver[S, I, E]{machine: m, save: save, perform: perform, rec: rec, turn: make(chan struct{}, 1)}
	d.turn <- struct{}{}
	return d
}

// State returns the state as last saved.
func (d *Driver[S, I, E]) State() S {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.rec.State
}

// Pending returns the outstanding effects, oldest first.
func (d *Driver[S, I, E]) Pending() []E {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.rec.Pending)
}

// Post steps the machine with an input and saves the result. It performs nothing
// and does not wait for effects under way. The error is the machine's refusal, or
// that of save: then the driver holds the old state and the caller does not know
// which of the two a restart will find.
func (d *Driver[S, I, E]) Post(input I) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	next, refused := d.step(d.rec, input)
	if refused != nil {
		return refused
	}
	return d.commit(next)
}

// Drain performs the outstanding effects, and those that they lead to, until none
// is left. Call it after loading a record and to retry after an error. One effect
// runs at a time, so Drain waits for a concurrent one, as long as ctx lives.
//
// It stops at the first effect that could not be performed, or save that failed.
// Inputs from effects that the machine refused are reported too, but do not stop it.
func (d *Driver[S, I, E]) Drain(ctx context.Context) error {
	select {
	case <-d.turn:
		defer func() { d.turn <- struct{}{} }()
	case <-ctx.Done():
		return ctx.Err()
	}
	var refusals []error
	for {
		pending := d.Pending()
		if len(pending) == 0 {
			return errors.Join(refusals...)
		}
		effect := pending[0]
		if err := ctx.Err(); err != nil {
			return errors.Join(append(refusals, err)...)
		}
		inputs, err := d.perform(ctx, effect)
		if err != nil {
			return errors.Join(append(refusals, fmt.Errorf("%s: %w", effect, err))...)
		}
		refused, err := d.complete(inputs)
		for _, r := range refused {
			refusals = append(refusals, fmt.Errorf("after %s: %w", effect, r))
		}
		if err != nil {
			return errors.Join(append(refusals, err)...)
		}
	}
}

// complete drops the oldest effect and steps its reports, in one record. Only the
// holder of the turn removes effects, so the oldest is still the one performed.
func (d *Driver[S, I, E]) complete(inputs []I) (refused []error, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	next := Record[S, E]{State: d.rec.State, Pending: d.rec.Pending[1:]}
	for _, input := range inputs {
		after, r := d.step(next, input)
		if r != nil {
			refused = append(refused, r)
			continue
		}
		next = after
	}
	return refused, d.commit(next)
}

// Send posts an input and drains.
func (d *Driver[S, I, E]) Send(ctx context.Context, input I) error {
	if err := d.Post(input); err != nil {
		return err
	}
	return d.Drain(ctx)
}

func (d *Driver[S, I, E]) step(rec Record[S, E], input I) (Record[S, E], error) {
	state, effects, err := d.machine.Step(rec.State, input)
	if err != nil {
		return rec, err
	}
	// A fresh slice: records handed to save or returned must not share an array
	// that a later step appends to.
	return Record[S, E]{State: state, Pending: slices.Concat(rec.Pending, effects)}, nil
}

func (d *Driver[S, I, E]) commit(next Record[S, E]) error {
	if err := d.save(next); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	d.rec = next
	return nil
}
