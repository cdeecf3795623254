// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/fsm"
	"github.com/dstack-go/dstack/internal/fsm/fsmtest"
	"pgregory.net/rapid"
)

// world is what survives a crash of the VMM: processes and files.
type world struct {
	qemu, tee uint64 // run of the live process, 0: none
	registers uint64 // run in which the TEE's state was made new
	extended  bool   // a guest has run on that state
	begun     uint64 // last run in which QEMU was started (the durable record)
	dir       bool
	noTEE     bool
	fail      map[Do]bool
	starts    []uint64
	broken    []string // violations seen while performing
}

func newWorld() *world { return &world{dir: true} }

func (w *world) violation(format string, args ...any) {
	w.broken = append(w.broken, fmt.Sprintf(format, args...))
}

func perform(w *world, e Effect) ([]Input, error) {
	if !w.dir && e.Do != Delete && e.Do != Kill {
		w.violation("%s after the directory was deleted", e)
	}
	if w.fail[e.Do] {
		return []Input{{Kind: Failed, Run: e.Run, Exit: &Exit{Code: "test", Reason: e.String()}}}, nil
	}
	switch e.Do {
	case Prepare:
		if w.qemu != 0 || w.tee != 0 {
			w.violation("%s while a process runs", e)
		}
		w.registers, w.extended = e.Run, false
		return []Input{{Kind: Prepared, Run: e.Run}}, nil
	case StartTEE:
		if w.tee == 0 {
			w.tee = e.Run
		}
		return []Input{{Kind: TEEStarted, Run: e.Run}}, nil
	case StartQEMU:
		switch {
		case w.qemu == e.Run: // adopted
		case w.qemu != 0:
			w.violation("%s while QEMU of run %d runs", e, w.qemu)
		case w.begun == e.Run:
			return []Input{{Kind: RunLost, Run: e.Run}}, nil
		default:
			if !w.noTEE && (w.registers != e.Run || w.extended || w.tee != e.Run) {
				w.violation("%s with registers of run %d (extended %v), TEE of run %d", e, w.registers, w.extended, w.tee)
			}
			w.begun, w.qemu, w.extended = e.Run, e.Run, true
			w.starts = append(w.starts, e.Run)
		}
		return []Input{{Kind: QEMUStarted, Run: e.Run}}, nil
	case Connect:
	case Kill:
		w.qemu, w.tee = 0, 0
		return []Input{{Kind: Killed, Run: e.Run}}, nil
	case Delete:
		if w.qemu != 0 || w.tee != 0 {
			w.violation("%s while a process runs", e)
		}
		w.dir = false
		return []Input{{Kind: Deleted, Run: e.Run}}, nil
	}
	return nil, nil
}

func check(s State, w *world) error {
	switch {
	case len(w.broken) > 0:
		return fmt.Errorf("%s", strings.Join(w.broken, "; "))
	case (s.Phase == Running) != (w.qemu != 0):
		return fmt.Errorf("%s, but QEMU of run %d", s.Phase, w.qemu)
	case (s.Phase == Running && s.HasTEE) != (w.tee != 0):
		return fmt.Errorf("%s, but TEE of run %d", s.Phase, w.tee)
	case (s.Phase == Removed) == w.dir:
		return fmt.Errorf("%s, but directory %v", s.Phase, w.dir)
	}
	switch s.Phase {
	case Stopped, Running, Exited, Removed:
	default:
		return fmt.Errorf("settled in %s", s.Phase)
	}
	seen := map[uint64]bool{}
	for _, run := range w.starts {
		if seen[run] {
			return fmt.Errorf("QEMU was started twice in run %d", run)
		}
		seen[run] = true
	}
	return nil
}

func explore(t *testing.T, inputs []Input, fail ...Do) {
	t.Helper()
	fsmtest.Run(t, fsmtest.Case[State, Input, Effect, *world]{
		Machine: fsm.Func[State, Input, Effect](Step),
		Initial: State{Phase: Stopped, HasTEE: true},
		Inputs:  inputs,
		NewWorld: func() *world {
			w := newWorld()
			w.fail = map[Do]bool{}
			for _, d := range fail {
				w.fail[d] = true
			}
			return w
		},
		Perform: perform,
		Check:   check,
	})
}

var (
	start, stop, remove = Input{Kind: Start}, Input{Kind: Stop}, Input{Kind: Remove}
)

func TestSurvivesEveryCrash(t *testing.T) {
	for name, inputs := range map[string][]Input{
		"start, stop, start again":    {start, stop, start, stop},
		"twice the same":              {start, start, stop, stop},
		"removed while running":       {start, remove, remove, start, stop},
		"removed while stopped":       {remove, start},
		"guest announces its end":     {start, {Kind: GuestOff}, stop, start},
		"reports of another run":      {start, {Kind: QEMUExited, Run: 99}, {Kind: Failed, Run: 0}, {Kind: Killed, Run: 7}, stop},
		"taken over while running":    {start, {Kind: Recovered, QEMU: true, TEE: true}, stop},
		"taken over with TEE gone":    {start, {Kind: Recovered, QEMU: true}, stop},
		"taken over with QEMU gone":   {start, {Kind: Recovered, TEE: true}, start, stop},
		"taken over with both gone":   {start, {Kind: Recovered}, start},
		"stopped, process left alive": {{Kind: Recovered, QEMU: true, TEE: true}, start},
	} {
		t.Run(name, func(t *testing.T) { explore(t, inputs) })
	}
	for _, d := range []Do{Prepare, StartTEE, StartQEMU} {
		t.Run(string(d)+" fails", func(t *testing.T) { explore(t, []Input{start, start, stop, start, remove}, d) })
	}
}

// drive is a driver on a world, for what the harness cannot do: processes that
// die on their own at any moment, with the VMM away or not.
type drive struct {
	*fsm.Driver[State, Input, Effect]
	w    *world
	disk []byte
}

func newDrive(w *world, rec fsm.Record[State, Effect]) *drive {
	d := &drive{w: w}
	d.Driver = fsm.New(fsm.Func[State, Input, Effect](Step), rec, func(r fsm.Record[State, Effect]) (err error) {
		d.disk, err = json.Marshal(r)
		return err
	}, func(_ context.Context, e Effect) ([]Input, error) { return perform(w, e) })
	return d
}

func TestRandomLives(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		d := newDrive(w, fsm.Record[State, Effect]{State: State{Phase: Stopped, HasTEE: true}})
		var last Kind
		for range rapid.IntRange(1, 25).Draw(t, "steps") {
			var in Input
			switch rapid.SampledFrom([]string{"start", "stop", "qemu dies", "tee dies", "crash", "crash and qemu dies", "crash in start", "remove"}).Draw(t, "event") {
			case "start":
				in = start
			case "stop":
				in = stop
			case "remove":
				if rapid.Bool().Draw(t, "really") {
					in = remove
				}
			case "qemu dies":
				if w.qemu != 0 {
					in = Input{Kind: QEMUExited, Run: w.qemu, Exit: &Exit{Code: "guest_panic", Reason: "panic"}}
					w.qemu = 0
				}
			case "tee dies":
				if w.tee != 0 {
					in = Input{Kind: TEEExited, Run: w.tee}
					w.tee = 0
				}
			case "crash and qemu dies":
				w.qemu = 0
				fallthrough
			case "crash":
				d, in = restart(t, d, w)
			case "crash in start":
				// The VMM dies with n effects performed and not recorded; then QEMU dies.
				if d.Post(start) == nil {
					for range rapid.IntRange(0, 3).Draw(t, "effects") {
						if p := d.Pending(); len(p) > 0 {
							perform(w, p[0])
						}
					}
					if rapid.Bool().Draw(t, "qemu too") {
						w.qemu = 0
					}
					last = Start
					d, in = restart(t, d, w)
				}
			}
			if in.Kind == "" {
				continue
			}
			if in.Kind == Start || in.Kind == Stop || in.Kind == Remove {
				if d.State().Phase != Removed {
					last = in.Kind
				}
			}
			if err := d.Send(t.Context(), in); err != nil && fault.Code(err) != "vm_removing" {
				t.Fatal(err)
			}
			s := d.State()
			if err := check(s, w); err != nil {
				t.Fatalf("after %v: %v", in, err)
			}
			if last == Stop && s.Started || last == Stop && s.Phase == Running || last == Remove && s.Phase != Removed {
				t.Fatalf("the user asked to %s, and the VM is %+v", last, s)
			}
		}
	})
}

func restart(t *rapid.T, d *drive, w *world) (*drive, Input) {
	var rec fsm.Record[State, Effect]
	if d.disk == nil {
		rec.State = d.State()
	} else if err := json.Unmarshal(d.disk, &rec); err != nil {
		t.Fatal(err)
	}
	next := newDrive(w, rec)
	next.disk = d.disk
	if err := next.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	return next, Input{Kind: Recovered, QEMU: w.qemu != 0, TEE: w.tee != 0}
}

func TestReasonsAreKept(t *testing.T) {
	w := newWorld()
	d := newDrive(w, fsm.Record[State, Effect]{State: State{Phase: Stopped}})
	send := func(in Input) State {
		t.Helper()
		if err := d.Send(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		return d.State()
	}
	w.noTEE = true
	send(start)
	w.qemu = 0
	s := send(Input{Kind: QEMUExited, Run: 1, Exit: &Exit{Code: "guest_panic", Reason: "kernel panic"}})
	if s.Phase != Exited || s.Exit == nil || s.Exit.Code != "guest_panic" || !s.Started {
		t.Fatalf("%+v", s)
	}
	if s = send(stop); s.Phase != Stopped || s.Started {
		t.Fatalf("%+v", s)
	}
	if s = send(start); s.Exit != nil || s.Run != 2 {
		t.Fatalf("a new run keeps the old reason: %+v", s)
	}
	send(remove)
	if err := d.Send(t.Context(), start); fault.Code(err) != "vm_removing" {
		t.Fatal(err)
	}
	if len(w.broken) > 0 {
		t.Fatal(w.broken)
	}
}

func TestInterruptedStartIsGivenUpInTheEnd(t *testing.T) {
	s := State{Phase: StartingQEMU, Started: true, Run: 1}
	for i := range maxLost + 1 {
		var err error
		if s, _, err = Step(s, Input{Kind: RunLost, Run: s.Run}); err != nil {
			t.Fatal(err)
		}
		if s, _, err = Step(s, Input{Kind: Killed, Run: s.Run}); err != nil {
			t.Fatal(err)
		}
		if i < maxLost && s.Phase != Preparing {
			t.Fatalf("attempt %d: %+v", i, s)
		}
		if i == maxLost && (s.Phase != Exited || s.Exit.Code != "start_interrupted") {
			t.Fatalf("%+v", s)
		}
		s.Phase = StartingQEMU
	}
}

func TestSteps(t *testing.T) {
	on := State{Phase: Running, Started: true, HasTEE: true, Run: 2}
	with := func(s State, change func(*State)) State { change(&s); return s }
	stopping := with(on, func(s *State) { s.Phase, s.Started = Stopping, false })
	failure := &Exit{Code: "x", Reason: "y"}
	for _, tc := range []struct {
		name  string
		state State
		in    Input
		phase Phase
		do    []Do
	}{
		{"the end of an older run changes nothing", on, Input{Kind: QEMUExited, Run: 1, Exit: failure}, Running, nil},
		{"the failure of an older run changes nothing", on, Input{Kind: Failed, Run: 1, Exit: failure}, Running, nil},
		{"an older kill does not end a stop", stopping, Input{Kind: Killed, Run: 1}, Stopping, nil},
		{"a process found in a stopped VM is ended", State{Phase: Stopped}, Input{Kind: Recovered, QEMU: true}, Stopped, []Do{Kill}},
		{"a TEE found in an exited VM is ended", State{Phase: Exited}, Input{Kind: Recovered, TEE: true}, Exited, []Do{Kill}},
		{"a TEE lost with the VMM is started on its state", on, Input{Kind: Recovered, QEMU: true}, Running, []Do{StartTEE, Connect}},
		{"a VM without TEE needs none", with(on, func(s *State) { s.HasTEE = false }), Input{Kind: Recovered, QEMU: true}, Running, []Do{Connect}},
		{"start during a stop waits for it", stopping, start, Stopping, nil},
		{"and runs after it", with(stopping, func(s *State) { s.Again = true }), Input{Kind: Killed, Run: 2}, Preparing, []Do{Prepare}},
		{"stop takes such a start back", with(stopping, func(s *State) { s.Again = true }), stop, Stopping, nil},
		{"stop while starting kills", with(on, func(s *State) { s.Phase = StartingTEE }), stop, Stopping, []Do{Kill}},
		{"a stop wins over a failure at the same time", with(stopping, func(s *State) { s.Exit = failure }), Input{Kind: Failed, Run: 2, Exit: failure}, Stopping, nil},
	} {
		s, effects, err := Step(tc.state, tc.in)
		var do []Do
		for _, e := range effects {
			do = append(do, e.Do)
		}
		if err != nil || s.Phase != tc.phase || fmt.Sprint(do) != fmt.Sprint(tc.do) {
			t.Errorf("%s: %s %v %v, want %s %v", tc.name, s.Phase, do, err, tc.phase, tc.do)
		}
	}
	s, _, _ := Step(with(stopping, func(s *State) { s.Again = true }), stop)
	if s.Again {
		t.Error("stop leaves a start behind")
	}
	if s, _, _ = Step(stopping, start); !s.Again || !s.Started {
		t.Error("start during a stop is forgotten")
	}
	s = on
	for range maxTEERestarts {
		s, _, _ = Step(s, Input{Kind: TEEExited, Run: 2})
	}
	if s, _, _ = Step(s, Input{Kind: TEEExited, Run: 2}); s.Phase != Stopping || s.Exit.Code != "tee_lost" {
		t.Errorf("a TEE that always ends: %+v", s)
	}
}
