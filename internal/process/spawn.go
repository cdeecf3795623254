// SPDX-License-Identifier: Apache-2.0

package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/durable"
)

// Spawned is a process that outlives the one that started it.
type Spawned struct {
	ID       ID
	Exited   chan error
	LogFile  string
	LogStart int64 // where its part of the log begins
}

// Spawn starts a program in a session of its own, appends what it prints to a log, and
// records its process id.
func Spawn(cmd *exec.Cmd, logFile, pidFile string) (*Spawned, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	start, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// It outlives this command. What this one inherited from its caller, such as a
	// lock, must not live on in it.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("close what was inherited: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Spawned{Exited: make(chan error, 1), LogFile: logFile, LogStart: start}
	go func() { p.Exited <- cmd.Wait() }()
	if p.ID, err = Identify(cmd.Process.Pid); err != nil {
		return nil, err
	}
	data, err := json.Marshal(p.ID)
	if err == nil {
		err = durable.WriteFile(pidFile, data, 0o600)
	}
	if err != nil {
		_ = p.ID.Stop(0)
		return nil, err
	}
	return p, nil
}

// Tail is the beginning of what a spawned process printed.
func (p *Spawned) Tail() string {
	f, err := os.Open(p.LogFile)
	if err != nil {
		return ""
	}
	defer f.Close()
	if _, err := f.Seek(p.LogStart, io.SeekStart); err != nil {
		return ""
	}
	data, _ := io.ReadAll(io.LimitReader(f, 4096))
	return string(data)
}

// Recorded is the process that a file of Spawn names; false when there is no file.
func Recorded(pidFile string) (ID, bool, error) {
	data, err := os.ReadFile(pidFile)
	if errors.Is(err, fs.ErrNotExist) {
		return ID{}, false, nil
	}
	if err != nil {
		return ID{}, false, err
	}
	var id ID
	if err := json.Unmarshal(data, &id); err != nil {
		return ID{}, false, fmt.Errorf("read %s: %w", pidFile, err)
	}
	return id, true, nil
}

// StopRecorded stops the process that a file of Spawn names, and removes the file.
func StopRecorded(pidFile string, grace time.Duration) error {
	id, ok, err := Recorded(pidFile)
	if err != nil || !ok {
		return err
	}
	if err := id.Stop(grace); err != nil {
		return err
	}
	return os.Remove(pidFile)
}
