// SPDX-License-Identifier: Apache-2.0

// Package lifecycle is the life of one VM as a pure state machine on
// internal/fsm: what a user, the guest or a process's end may ask for, and what
// has to be done about it.
//
//	stopped --start--> preparing --[prepare]--> starting-tee --[start tee]-->
//	  starting-qemu --[start qemu]--> running --[connect]
//	running --qemu exited, fault--> stopping --[kill]--> exited
//	any active --stop--> stopping --[kill]--> stopped
//	any --remove--> removing --[kill, delete]--> removed
//
// Invariants, which the crash harness of the tests checks with the VMM killed at
// every point: a settled VM has a QEMU if and only if it is running; never two;
// a QEMU is started at most once in a run, after its TEE was started anew in that
// run, so that registers that an earlier boot extended are never met again; what
// the user asked for last holds in the end.
//
// A run is one attempt to boot. Its number rises with each, and a report about an
// older run changes nothing.
package lifecycle

import (
	"fmt"

	"github.com/dstack-go/dstack/internal/fault"
)

// Phase is where a VM is in its life.
type Phase string

// Phases.
const (
	Stopped      Phase = "stopped"
	Preparing    Phase = "preparing"
	StartingTEE  Phase = "starting-tee"
	StartingQEMU Phase = "starting-qemu"
	Running      Phase = "running"
	Stopping     Phase = "stopping"
	Exited       Phase = "exited"
	Removing     Phase = "removing"
	Removed      Phase = "removed"
)

// Exit says why a run ended or did not begin.
type Exit struct {
	Code   string `json:"code"` // such as guest_panic, guest_poweroff, port_busy
	Reason string `json:"reason"`
	Fix    string `json:"fix,omitempty"`
}

// Err returns it as an error.
func (e *Exit) Err() error {
	f := fault.New(e.Code, "%s", e.Reason)
	if e.Fix != "" {
		f = f.WithFix("%s", e.Fix)
	}
	return f
}

// State is what is saved.
type State struct {
	Phase Phase `json:"phase"`
	// Started is the state that the user wants (upstream's vm-state.json).
	Started bool `json:"started"`
	// HasTEE says that a simulated TEE runs beside QEMU.
	HasTEE bool   `json:"has_tee"`
	Run    uint64 `json:"run"`
	// Again says that a new run follows the stop under way.
	Again bool `json:"again,omitempty"`
	// Lost counts runs in a row that ended while the VMM was away, before they
	// were known to have begun.
	Lost int `json:"lost,omitempty"`
	// TEERestarts counts how often the TEE process was restarted in this run.
	TEERestarts int   `json:"tee_restarts,omitempty"`
	Exit        *Exit `json:"exit,omitempty"`
}

// Active reports whether processes may run.
func (s State) Active() bool {
	switch s.Phase {
	case Preparing, StartingTEE, StartingQEMU, Running, Stopping:
		return true
	}
	return false
}

// Limits on what is tried again.
const (
	maxLost        = 2
	maxTEERestarts = 3
)

// Kind is the kind of an input.
type Kind string

// Inputs from a user.
const (
	Start  Kind = "start"
	Stop   Kind = "stop"
	Remove Kind = "remove"
)

// Inputs from the world. All but GuestOff, Recovered and Deleted are about a run.
const (
	Prepared    Kind = "prepared"
	TEEStarted  Kind = "tee started"
	QEMUStarted Kind = "qemu started"
	// Failed: preparing or starting failed, for Exit.
	Failed Kind = "failed"
	// RunLost: QEMU was to be started, but in this run it had been started before
	// (by a VMM that died), and it is gone.
	RunLost    Kind = "run lost"
	QEMUExited Kind = "qemu exited"
	TEEExited  Kind = "tee exited"
	Killed     Kind = "killed"
	Deleted    Kind = "deleted"
	// GuestOff: the guest told that it powers off, so its end is wanted.
	GuestOff Kind = "guest off"
	// Recovered: a VMM took over and found these processes.
	Recovered Kind = "recovered"
)

// Input is something that happened.
type Input struct {
	Kind Kind
	Run  uint64
	Exit *Exit
	// For Recovered.
	QEMU, TEE bool
}

func (i Input) String() string { return fmt.Sprintf("%s %d", i.Kind, i.Run) }

// Do is the kind of an effect.
type Do string

// Effects. Each means "make it so", and may be asked for twice.
const (
	Prepare   Do = "prepare"    // shared files; the TEE as new
	StartTEE  Do = "start tee"  // a TEE runs, on the state that it has
	StartQEMU Do = "start qemu" // QEMU runs, if it did not in this run before
	Connect   Do = "connect"    // watched and talked to
	Kill      Do = "kill"       // neither QEMU nor TEE runs
	Delete    Do = "delete"     // the VM's directory is gone
)

// Effect is something to be done.
type Effect struct {
	Do  Do     `json:"do"`
	Run uint64 `json:"run"`
}

func (e Effect) String() string { return fmt.Sprintf("%s %d", e.Do, e.Run) }

// Step is the machine.
func Step(s State, in Input) (State, []Effect, error) {
	do := func(d ...Do) []Effect {
		out := make([]Effect, len(d))
		for i := range d {
			out[i] = Effect{d[i], s.Run}
		}
		return out
	}
	gone := s.Phase == Removing || s.Phase == Removed
	switch in.Kind {
	case Start:
		if gone {
			return s, nil, fault.New("vm_removing", "the VM is being removed")
		}
		s.Started = true
		switch s.Phase {
		case Stopping:
			s.Again = true
		case Stopped, Exited:
			s.Lost = 0
			return s.newRun()
		}
		return s, nil, nil

	case Stop:
		if gone {
			return s, nil, fault.New("vm_removing", "the VM is being removed")
		}
		s.Started, s.Again = false, false
		switch s.Phase {
		case Stopping:
			s.Exit = nil // it ends because the user wants it
		case Exited:
			s.Phase = Stopped
		case Preparing, StartingTEE, StartingQEMU, Running:
			s.Phase = Stopping
			return s, do(Kill), nil
		}
		return s, nil, nil

	case Remove:
		if gone {
			return s, nil, nil
		}
		s.Phase, s.Started, s.Again = Removing, false, false
		return s, do(Kill, Delete), nil

	case GuestOff:
		if s.Phase == Running {
			s.Started = false
		}
		return s, nil, nil

	case Deleted:
		if s.Phase == Removing {
			s.Phase = Removed
		}
		return s, nil, nil

	case Recovered:
		switch s.Phase {
		case Running:
			if !in.QEMU {
				return s.end(&Exit{Code: "ended_while_away", Reason: "the VM ended while the VMM was not running"})
			}
			if s.HasTEE && !in.TEE {
				return s, do(StartTEE, Connect), nil
			}
			return s, do(Connect), nil
		case Stopped, Exited:
			if in.QEMU || in.TEE {
				return s, do(Kill), nil
			}
		}
		return s, nil, nil
	}

	if in.Run != s.Run { // a report about a run that is over
		return s, nil, nil
	}
	switch in.Kind {
	case Prepared:
		if s.Phase == Preparing {
			if s.HasTEE {
				s.Phase = StartingTEE
				return s, do(StartTEE), nil
			}
			s.Phase = StartingQEMU
			return s, do(StartQEMU), nil
		}
	case TEEStarted:
		if s.Phase == StartingTEE {
			s.Phase = StartingQEMU
			return s, do(StartQEMU), nil
		}
	case QEMUStarted:
		if s.Phase == StartingQEMU {
			s.Phase, s.Lost, s.Exit = Running, 0, nil
			return s, do(Connect), nil
		}
	case Failed:
		switch s.Phase {
		case Preparing, StartingTEE, StartingQEMU, Running:
			return s.end(in.Exit)
		}
	case RunLost:
		if s.Phase == StartingQEMU {
			if s.Lost++; s.Lost > maxLost {
				return s.end(&Exit{Code: "start_interrupted", Reason: "the start of the VM was interrupted several times"})
			}
			s.Phase, s.Again = Stopping, true
			return s, do(Kill), nil
		}
	case QEMUExited:
		switch s.Phase {
		case StartingQEMU, Running:
			return s.end(in.Exit)
		}
	case TEEExited:
		switch s.Phase {
		case StartingQEMU, Running:
			if s.TEERestarts++; s.TEERestarts > maxTEERestarts {
				return s.end(&Exit{Code: "tee_lost", Reason: "the simulated TEE ended several times"})
			}
			return s, do(StartTEE), nil
		}
	case Killed:
		if s.Phase == Stopping {
			switch {
			case s.Again:
				return s.newRun()
			case s.Exit != nil:
				s.Phase = Exited
			default:
				s.Phase = Stopped
			}
		}
	default:
		return s, nil, fmt.Errorf("unknown input %q", in.Kind)
	}
	return s, nil, nil
}

func (s State) newRun() (State, []Effect, error) {
	s.Run++
	s.Phase, s.Again, s.Exit, s.TEERestarts = Preparing, false, nil, 0
	return s, []Effect{{Prepare, s.Run}}, nil
}

// end kills what is left of a run that ended for a reason.
func (s State) end(why *Exit) (State, []Effect, error) {
	s.Phase, s.Exit = Stopping, why
	return s, []Effect{{Kill, s.Run}}, nil
}
