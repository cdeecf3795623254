// SPDX-License-Identifier: Apache-2.0

// Package onboard brings a KMS to its root keys, once: by making them, or by getting
// them from another KMS.
//
// It is a state machine (internal/fsm) whose record is on disk. What happens after a
// crash at any point is either that the same attempt goes on, or that nothing had
// begun: a root that exists is never replaced, and a KMS that has lost its record, its
// root or its release log does not start with new ones; it refuses (threats.md G09,
// G10).
//
//	empty --begin--> obtaining --[obtain]--> obtained--> logging --[log]--> logged--> ready
//	                     obtaining --failed--> empty
//
// Trusted: the data directory's owner, which is the machine itself (a CVM's sealed
// disk). Attacker-controlled: everything that a source answers.
//
// Implements spec/kms.md §2.3, §2.5 and §8 (2, 10); threats.md C03, G09.
package onboard

import (
	"fmt"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/fsm"
)

// Phase is where a KMS is.
type Phase string

const (
	Empty     Phase = ""          // it has never had keys
	Obtaining Phase = "obtaining" // root keys are being made or fetched
	Logging   Phase = "logging"   // they are stored; the release log is not there yet
	Ready     Phase = "ready"     // it has both
)

// State is what is remembered.
type State struct {
	Phase Phase `json:"phase"`
	// Source is where the keys come from: empty for keys of its own.
	Source string `json:"source,omitempty"`
	// Failure is why the last attempt ended, by code.
	Failure string `json:"failure,omitempty"`
}

// Input is what happened.
type Input struct {
	Kind   string // begin, obtained, failed, logged
	Source string // of begin
	Code   string // of failed
}

// Effect is what to do.
type Effect struct {
	Kind   string `json:"kind"` // obtain or log
	Source string `json:"source,omitempty"`
}

func (e Effect) String() string {
	if e.Source != "" {
		return e.Kind + " from " + e.Source
	}
	return e.Kind
}

// Machine is the pure part.
var Machine = fsm.Func[State, Input, Effect](step)

func step(s State, in Input) (State, []Effect, error) {
	refuse := func(code, format string, args ...any) (State, []Effect, error) {
		return s, nil, fault.New(code, format, args...)
	}
	switch {
	case in.Kind == "begin" && s.Phase == Ready:
		return refuse("already_bootstrapped", "this KMS has its root keys already; it has already been bootstrapped")
	case in.Kind == "begin" && s.Phase != Empty:
		return refuse("onboard_busy", "this KMS is getting its root keys at this moment")
	case in.Kind == "begin":
		return State{Phase: Obtaining, Source: in.Source}, []Effect{{Kind: "obtain", Source: in.Source}}, nil
	case in.Kind == "obtained" && s.Phase == Obtaining:
		return State{Phase: Logging, Source: s.Source}, []Effect{{Kind: "log"}}, nil
	case in.Kind == "failed" && s.Phase == Obtaining:
		return State{Failure: in.Code}, nil, nil
	case in.Kind == "logged" && s.Phase == Logging:
		return State{Phase: Ready, Source: s.Source}, nil, nil
	}
	return s, nil, fmt.Errorf("the input %q does not belong to the phase %q", in.Kind, s.Phase)
}
