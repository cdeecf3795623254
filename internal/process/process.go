// SPDX-License-Identifier: Apache-2.0

// Package process names a process beyond the reuse of its number: by process id
// and start time, so that a recorded process can be recognised, and ended, after
// the one who started it is gone, and no other process ever is.
package process

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"syscall"
	"time"
)

// ID is a process by number and start time.
type ID struct {
	PID int `json:"pid"`
	// StartTicks is field 22 of /proc/PID/stat (proc_pid_stat(5)): the start
	// time in clock ticks since the boot of the machine.
	StartTicks uint64 `json:"start_ticks"`
}

// ErrGone says that no process with that number runs.
var ErrGone = errors.New("no such process")

// Identify returns the identity of the running process pid, or ErrGone.
func Identify(pid int) (ID, error) {
	ticks, _, err := stat(pid)
	if err != nil {
		return ID{}, err
	}
	return ID{PID: pid, StartTicks: ticks}, nil
}

// stat reads start time and state letter of a process.
func stat(pid int) (ticks uint64, state byte, err error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return 0, 0, ErrGone
	}
	if err != nil {
		return 0, 0, err
	}
	// The second field is the command in parentheses and may hold anything, so
	// count from the last closing parenthesis.
	end := bytes.LastIndexByte(data, ')')
	if end < 0 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has no command field", pid)
	}
	fields := bytes.Fields(data[end+1:])
	if len(fields) < 20 || len(fields[0]) != 1 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has %d fields after the command", pid, len(fields))
	}
	ticks, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return ticks, fields[0][0], err
}

// Running reports whether this very process still runs; a zombie does not.
func (id ID) Running() bool {
	ticks, state, err := stat(id.PID)
	return err == nil && ticks == id.StartTicks && state != 'Z' && state != 'X'
}

// Signal sends sig to this very process, or returns ErrGone. It holds a pidfd
// while it compares, so that the number cannot change hands in between.
func (id ID) Signal(sig syscall.Signal) error {
	p, err := os.FindProcess(id.PID)
	if err != nil {
		return ErrGone
	}
	defer p.Release()
	if !id.Running() {
		return ErrGone
	}
	if err := p.Signal(sig); err != nil {
		if errors.Is(err, os.ErrProcessDone) || errors.Is(err, syscall.ESRCH) {
			return ErrGone
		}
		return fmt.Errorf("signal process %d: %w", id.PID, err)
	}
	return nil
}

// Stop sends SIGTERM, waits up to grace, then sends SIGKILL and waits up to 5 s.
// A process that is gone already is no error.
func (id ID) Stop(grace time.Duration) error {
	if err := id.Signal(syscall.SIGTERM); err != nil {
		if errors.Is(err, ErrGone) {
			return nil
		}
		return err
	}
	if id.await(grace) {
		return nil
	}
	if err := id.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, ErrGone) {
		return err
	}
	if !id.await(5 * time.Second) {
		return fmt.Errorf("process %d did not end after SIGKILL", id.PID)
	}
	return nil
}

func (id ID) await(limit time.Duration) bool {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		if !id.Running() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}
