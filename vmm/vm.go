// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/fsm"
	"github.com/dstack-go/dstack/internal/process"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/vmm/history"
	"github.com/dstack-go/dstack/vmm/lifecycle"
	"github.com/dstack-go/dstack/vmm/proc"
)

// vm is one VM: its state machine, the goroutine that performs its effects, and
// what is known about its present run.
type vm struct {
	server  *Server
	dir     string
	journal *journal
	log     *slog.Logger
	notify  bucket
	driver  *fsm.Driver[lifecycle.State, lifecycle.Input, lifecycle.Effect]
	saved   lifecycle.State // as of the last save; the driver saves one at a time
	wake    chan struct{}   // there may be effects to perform
	ready   chan struct{}   // closed when it was taken over

	now  atomic.Pointer[setup] // what it is; replaced in apply only
	next atomic.Pointer[setup] // what it is from the next start on, or nil

	updateMu sync.Mutex // held during an update
	filesMu  sync.Mutex // held while files for the guest are read and written

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced when anything below or the state changes
	report    report
	watched   map[process.ID]bool
	children  map[process.ID]*proc.Child
	conn      *connection // of the present run
	stuck     error       // why effects are outstanding
	floodSaid time.Time
}

// report is what is known about the VM beside its lifecycle. It is rebuilt from
// the journal after a restart of the VMM.
type report struct {
	StartedMS, ExitedMS           int64
	Progress, Error, ShutdownText string
	Health                        string // the guest's latest app.health
	Instance                      *dstack.InstanceID
}

// absorb updates a report by an event.
func (r *report) absorb(e Event) {
	switch e.Event {
	case eventStart:
		*r = report{StartedMS: e.TimeMS, Progress: "booting", Instance: r.Instance}
	case eventExit:
		r.ExitedMS, r.Health = e.TimeMS, ""
		if r.Error == "" && !strings.HasPrefix(e.Body, codePoweroff) && !strings.HasPrefix(e.Body, codeStopped) {
			r.Error = e.Body
		}
	case "boot.progress":
		r.Progress = e.Body
		if e.Body == "done" { // whatever was wrong on the way did not matter
			r.Error = ""
		}
	case eventHealth:
		r.Health = e.Body
	case "boot.error":
		r.Error = e.Body
	case "shutdown.progress":
		r.ShutdownText = e.Body
	}
}

// Events of the VMM.
const (
	eventCreated = "vm.created"
	eventUpdate  = "vm.update"  // will take effect at the next start
	eventUpdated = "vm.updated" // took effect
	eventStart   = "vm.start"
	eventExit    = "vm.exit"
	eventTEE     = "vm.tee_restarted"
	eventFlood   = "vm.flood"
)

// eventHealth is the guest's word on how its app does: a JSON object with at least
// "state", a word, and "reason" when it is not well.
const eventHealth = "app.health"

// Codes of ends that are no error.
const (
	codePoweroff = "guest_poweroff"
	codeStopped  = "stopped"
)

func newVM(s *Server, dir string, spec *Spec, m *manifest.Manifest, rec record) *vm {
	v := &vm{server: s, dir: dir, saved: rec.State, log: s.log.With("vm", spec.ID),
		wake: make(chan struct{}, 1), changed: make(chan struct{}), watched: map[process.ID]bool{}, children: map[process.ID]*proc.Child{}}
	v.now.Store(&setup{spec, m})
	v.journal = openJournal(filepath.Join(dir, eventsFile), v.report.absorb)
	v.readInstance()
	v.driver = fsm.New(fsm.Func[lifecycle.State, lifecycle.Input, lifecycle.Effect](lifecycle.Step), rec, v.save, v.perform)
	return v
}

// loadVM reads a VM's directory.
func loadVM(s *Server, dir, id string) (*vm, error) {
	now, err := loadSetup(dir, specFile, id)
	if err != nil {
		return nil, err
	}
	rec, err := loadRecord(dir)
	if err != nil {
		return nil, err
	}
	v := newVM(s, dir, now.spec, now.manifest, rec)
	return v, v.loadUpdate()
}

func (v *vm) readInstance() {
	limit, _ := hostshare.Limit(hostshare.InstanceInfoName)
	data, err := readFile(filepath.Join(v.shared(), hostshare.InstanceInfoName), limit)
	if err != nil {
		return
	}
	if info, err := hostshare.ParseInstanceInfo(data); err == nil {
		v.mu.Lock()
		v.report.Instance = info.InstanceID
		v.mu.Unlock()
	}
}

// save makes a record durable. The directory of a VM whose removal is complete is
// gone, and then nothing is left to save.
func (v *vm) save(rec record) error {
	if v.server.crash != nil {
		defer v.server.crash(fmt.Sprintf("saved %s %v", rec.State.Phase, rec.Pending))
	}
	if rec.State.Phase == lifecycle.Removing || rec.State.Phase == lifecycle.Removed {
		if _, err := os.Lstat(v.dir); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	if err := writeJSON(filepath.Join(v.dir, stateFile), rec); err != nil {
		return diskFull(err, "save the state of VM "+v.spec().ID)
	}
	v.transition(v.saved, rec.State)
	v.saved = rec.State
	return nil
}

// signal tells everybody who waits that something changed.
func (v *vm) signal() {
	v.mu.Lock()
	close(v.changed)
	v.changed = make(chan struct{})
	v.mu.Unlock()
}

func (v *vm) state() lifecycle.State { return v.driver.State() }

func (v *vm) getReport() report {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.report
}

// event records an event and what follows from it.
func (v *vm) event(name, body string) {
	e := v.journal.add(name, body)
	v.mu.Lock()
	v.report.absorb(e)
	v.mu.Unlock()
	if v.server.past != nil {
		v.server.past.Event(history.Event{VM: v.spec().ID, TimeMS: e.TimeMS, Event: e.Event, Body: e.Body})
	}
	v.signal()
}

// post gives the machine an input and has its effects performed soon.
func (v *vm) post(in lifecycle.Input) error {
	err := v.driver.Post(in)
	select {
	case v.wake <- struct{}{}:
	default:
	}
	v.signal()
	return err
}

// transition records what a user wants to see of a change of state.
func (v *vm) transition(before, after lifecycle.State) {
	if before.Run != after.Run {
		v.event(eventStart, fmt.Sprintf("run %d", after.Run))
	}
	if before.Phase != after.Phase {
		v.log.Info("vm", "phase", string(after.Phase), "run", after.Run)
		switch {
		case after.Phase == lifecycle.Exited && after.Exit != nil:
			v.event(eventExit, after.Exit.Code+": "+after.Exit.Reason)
		case after.Phase == lifecycle.Stopped && before.Phase == lifecycle.Stopping:
			v.event(eventExit, codeStopped)
		}
	}
}

// work performs effects until ctx ends. An effect that could not be tried is tried
// again every second.
func (v *vm) work(ctx context.Context) {
	for {
		err := v.driver.Drain(ctx)
		if ctx.Err() != nil {
			return
		}
		v.mu.Lock()
		v.stuck = err
		v.mu.Unlock()
		v.signal()
		if v.state().Phase == lifecycle.Removed {
			v.server.forget(v)
			return
		}
		var again <-chan time.Time
		if err != nil {
			v.log.Warn("vm effect", "error", err)
			again = time.After(time.Second)
		}
		select {
		case <-ctx.Done():
			return
		case <-v.wake:
		case <-again:
		}
	}
}

// wait waits until ok, which sees the state and whether effects are outstanding.
func (v *vm) wait(ctx context.Context, ok func(s lifecycle.State, busy bool) bool) error {
	for {
		v.mu.Lock()
		changed := v.changed
		v.mu.Unlock()
		// In this order: effects leave the record together with the change of
		// state that they bring.
		s, busy := v.state(), len(v.driver.Pending()) > 0
		if ok(s, busy) {
			return nil
		}
		select {
		case <-changed:
		case <-time.After(200 * time.Millisecond): // effects that change no state
		case <-ctx.Done():
			return ctx.Err()
		case <-v.server.ctx.Done():
			return fault.New("vmm_stopping", "the VMM is shutting down; it goes on when it is started again")
		}
	}
}

// start asks for a run and waits until QEMU runs or has failed to.
func (v *vm) start(ctx context.Context) error {
	if err := v.post(lifecycle.Input{Kind: lifecycle.Start}); err != nil {
		return err
	}
	var end lifecycle.State
	var stuck error
	err := v.wait(ctx, func(s lifecycle.State, _ bool) bool {
		end = s
		v.mu.Lock()
		stuck = v.stuck
		v.mu.Unlock()
		if stuck != nil {
			return true
		}
		switch s.Phase {
		case lifecycle.Running, lifecycle.Stopped, lifecycle.Exited, lifecycle.Removing, lifecycle.Removed:
			return true
		}
		return false
	})
	if err = errors.Join(err, stuck); err != nil {
		return err
	}
	if end.Phase == lifecycle.Exited && end.Exit != nil {
		return end.Exit.Err()
	}
	if end.Phase != lifecycle.Running {
		return fault.New("vm_stopped", "the VM was stopped while it started")
	}
	return nil
}

// perform carries out one effect. Outcomes are inputs; an error means try again.
func (v *vm) perform(ctx context.Context, e lifecycle.Effect) (out []lifecycle.Input, err error) {
	if v.server.crash != nil {
		defer v.server.crash("performed " + e.String())
	}
	fail := func(err error) ([]lifecycle.Input, error) {
		if ctx.Err() != nil {
			return nil, ctx.Err() // the VMM is stopping; the next one goes on
		}
		return []lifecycle.Input{{Kind: lifecycle.Failed, Run: e.Run, Exit: exitOf(err)}}, nil
	}
	switch e.Do {
	case lifecycle.Prepare:
		if err := v.prepare(ctx); err != nil {
			return fail(err)
		}
		v.readInstance()
		return []lifecycle.Input{{Kind: lifecycle.Prepared, Run: e.Run}}, nil
	case lifecycle.StartTEE:
		if err := v.ensureTEE(ctx, e.Run); err != nil {
			return fail(err)
		}
		return []lifecycle.Input{{Kind: lifecycle.TEEStarted, Run: e.Run}}, nil
	case lifecycle.StartQEMU:
		if v.spec().TEE == TEESim {
			if err := v.ensureTEE(ctx, e.Run); err != nil {
				return fail(err)
			}
		}
		lost, err := v.ensureQEMU(ctx, e.Run)
		if err != nil {
			return fail(err)
		}
		if lost {
			return []lifecycle.Input{{Kind: lifecycle.RunLost, Run: e.Run}}, nil
		}
		return []lifecycle.Input{{Kind: lifecycle.QEMUStarted, Run: e.Run}}, nil
	case lifecycle.Connect:
		return nil, v.connect(e.Run)
	case lifecycle.Kill:
		if err := v.kill(ctx); err != nil {
			return nil, err
		}
		return []lifecycle.Input{{Kind: lifecycle.Killed, Run: e.Run}}, nil
	case lifecycle.Delete:
		if err := durable.RemoveAll(v.dir); err != nil {
			return nil, err
		}
		return []lifecycle.Input{{Kind: lifecycle.Deleted, Run: e.Run}}, nil
	}
	return nil, fmt.Errorf("unknown effect %q", e.Do)
}

func exitOf(err error) *lifecycle.Exit {
	x := &lifecycle.Exit{Code: fault.Code(err), Reason: err.Error(), Fix: fault.Fix(err)}
	if x.Code == "" {
		x.Code = "start_failed"
	}
	return x
}

// child returns the process as started by this VMM, or nil when it was adopted.
func (v *vm) child(id process.ID) *proc.Child {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.children[id]
}

// watch calls ended, once per process, when a process has ended.
func (v *vm) watch(id process.ID, ended func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.watched[id] {
		return
	}
	v.watched[id] = true
	c := v.children[id]
	v.server.group.Go(func() {
		defer func() {
			v.mu.Lock()
			delete(v.watched, id)
			delete(v.children, id)
			v.mu.Unlock()
		}()
		if c != nil {
			select {
			case <-c.Done():
			case <-v.server.ctx.Done():
				return
			}
		} else {
			for id.Running() {
				select {
				case <-time.After(100 * time.Millisecond):
				case <-v.server.ctx.Done():
					return
				}
			}
		}
		ended()
	})
}

// settle waits a moment for takeOver, so that what an earlier VMM believed is not
// shown as true.
func (v *vm) settle(ctx context.Context) {
	select {
	case <-v.ready:
	case <-ctx.Done():
	case <-time.After(2 * time.Second):
	}
}

// takeOver continues a VM that an earlier VMM left, in whatever state.
func (v *vm) takeOver(ctx context.Context) error {
	if err := v.driver.Drain(ctx); err != nil {
		return err
	}
	if v.state().Phase == lifecycle.Removed {
		return nil
	}
	qemu, err := qemuSlot(v.dir).Holder()
	if err != nil {
		return err
	}
	tee, err := teeSlot(v.dir).Holder()
	if err != nil {
		return err
	}
	if qemu == nil && !v.state().Active() { // QEMU may never have come to it
		if err := v.stopTPM(); err != nil {
			return err
		}
	}
	if qemu != nil && v.server.egress != nil {
		if err := v.server.egress.Adopt(v.spec().ID, qemu.PID); err != nil {
			return err
		}
	}
	return v.post(lifecycle.Input{Kind: lifecycle.Recovered, QEMU: qemu != nil, TEE: tee != nil})
}
