// SPDX-License-Identifier: Apache-2.0

// Package proc keeps at most one helper process per place: one QEMU and one
// simulated TEE per VM directory, across crashes of the VMM.
//
// # How
//
// A [Slot] is a lock file. The process that is started in it inherits the open,
// flock-ed file; the lock belongs to the open file description, so the kernel
// releases it when the last holder ends, however it ends, and not before. A VMM
// that is killed between fork and exec leaves a child that holds the lock
// already. So "is it running?" is asked of the kernel, never of a pid file.
//
// # Guarantees
//
//   - Start never runs while another process holds the slot.
//   - Holder finds a running process also when the VMM died before it could
//     write the pid down (by looking for the open lock file under /proc).
//   - Only a process that was started in the slot is ever signalled.
//
// A compromised QEMU could close the lock; therefore the recorded process counts
// as a holder as well.
package proc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/process"
)

// Slot names the two files of a place.
type Slot struct {
	Lock   string // lock file
	Record string // pid file: JSON {pid, start_ticks, run}
}

// Record is the content of the pid file. PID 0 says that run was about to start.
type Record struct {
	process.ID
	Run uint64 `json:"run"`
}

// ErrHeld says that a process holds the slot.
var ErrHeld = errors.New("a process runs here already")

// errUnknown says that the lock is held but its holder cannot be found.
var errUnknown = errors.New("its lock is held by a process that cannot be found")

// Child is a process that this VMM started.
type Child struct {
	ID   process.ID
	done chan struct{}
	err  error // as of exec.Cmd.Wait
}

// Done is closed when the process has ended.
func (c *Child) Done() <-chan struct{} { return c.done }

// Err is valid after Done: nil for exit status 0, or *exec.ExitError.
func (c *Child) Err() error { return c.err }

// Read returns the record, zero when there is none.
func (s Slot) Read() (r Record, err error) {
	data, err := os.ReadFile(s.Record)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("%s: %w", s.Record, err)
	}
	return r, nil
}

func (s Slot) write(r Record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return durable.WriteFile(s.Record, data, 0o600)
}

func (s Slot) lock() (*os.File, error) {
	f, err := os.OpenFile(s.Lock, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, ErrHeld
		}
		return nil, fmt.Errorf("lock %s: %w", s.Lock, err)
	}
	return f, nil
}

// Holder returns the process that holds the slot, or nil when it is free.
func (s Slot) Holder() (*process.ID, error) {
	if _, err := os.Lstat(s.Lock); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	// A child between fork and exec holds the lock under its parent's name for an
	// instant; so look again before giving up.
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		rec, recErr := s.Read()
		if recErr == nil && rec.PID != 0 && rec.Running() {
			return &rec.ID, nil
		}
		f, err := s.lock()
		if err == nil {
			return nil, f.Close()
		}
		if !errors.Is(err, ErrHeld) {
			return nil, err
		}
		if id := s.search(); id != nil {
			return id, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%s: %w", filepath.Dir(s.Lock), errUnknown)
		}
	}
}

// search looks for another process that has the lock file open as the descriptor
// that Start hands down.
func (s Slot) search() *process.ID {
	want, err := os.Stat(s.Lock)
	if err != nil {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		fi, err := os.Stat(filepath.Join("/proc", e.Name(), "fd", strconv.Itoa(lockFD)))
		if err != nil || !os.SameFile(fi, want) {
			continue
		}
		if id, err := process.Identify(pid); err == nil && id.Running() {
			return &id
		}
	}
	return nil
}

// lockFD is the descriptor of the lock in the started process.
const lockFD = 3

// Start runs cmd in the slot as number run, in a session of its own, so that it
// survives this process. Its caller must not have set ExtraFiles. ErrHeld says
// that the slot is not free.
func (s Slot) Start(cmd *exec.Cmd, run uint64) (*Child, error) {
	if rec, err := s.Read(); err == nil && rec.PID != 0 && rec.Running() {
		return nil, ErrHeld
	}
	lock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer lock.Close() // the child's copy keeps the lock
	// From here on a restart knows that this run had begun.
	if err := s.write(Record{Run: run}); err != nil {
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{lock}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &Child{done: make(chan struct{})}
	id, idErr := process.Identify(cmd.Process.Pid)
	go func() {
		c.err = cmd.Wait()
		close(c.done)
	}()
	if idErr != nil { // only when /proc is unusable: a zombie is still there
		cmd.Process.Kill()
		<-c.done
		return nil, fmt.Errorf("identify process %d: %w", cmd.Process.Pid, idErr)
	}
	c.ID = id
	if err := s.write(Record{ID: id, Run: run}); err != nil {
		// Without the record the process can still be found by its lock.
		return c, nil
	}
	return c, nil
}
