// SPDX-License-Identifier: Apache-2.0

package proc

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/process"
)

func slot(t *testing.T) Slot {
	dir := t.TempDir()
	return Slot{filepath.Join(dir, "lock"), filepath.Join(dir, "pid")}
}

func start(t *testing.T, s Slot, run uint64) *Child {
	t.Helper()
	c, err := s.Start(exec.Command("sleep", "60"), run)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.ID.Signal(syscall.SIGKILL); <-c.Done() })
	return c
}

func TestOneProcessAtATime(t *testing.T) {
	s := slot(t)
	if id, err := s.Holder(); id != nil || err != nil {
		t.Fatal(id, err)
	}
	c := start(t, s, 1)
	if id, err := s.Holder(); err != nil || id == nil || *id != c.ID {
		t.Fatal(id, err)
	}
	if _, err := s.Start(exec.Command("sleep", "60"), 2); !errors.Is(err, ErrHeld) {
		t.Fatal(err)
	}
	if rec, err := s.Read(); err != nil || rec.Run != 1 || rec.ID != c.ID {
		t.Fatalf("%+v %v", rec, err)
	}
	c.ID.Signal(syscall.SIGKILL)
	<-c.Done()
	if c.Err() == nil {
		t.Fatal("killed, and no error")
	}
	if id, err := s.Holder(); id != nil || err != nil {
		t.Fatal(id, err)
	}
	start(t, s, 2)
}

// The VMM died before it wrote the pid down.
func TestHolderIsFoundWithoutItsRecord(t *testing.T) {
	for name, spoil := range map[string]func(Slot) error{
		"record says that it was about to start": func(s Slot) error { return s.write(Record{Run: 1}) },
		"record is missing":                      func(s Slot) error { return os.Remove(s.Record) },
		"record is torn":                         func(s Slot) error { return os.WriteFile(s.Record, []byte(`{"pid":`), 0o600) },
		"record names another process": func(s Slot) error {
			data, _ := json.Marshal(Record{ID: process.ID{PID: os.Getpid(), StartTicks: 1}, Run: 1})
			return durable.WriteFile(s.Record, data, 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := slot(t)
			c := start(t, s, 1)
			if err := spoil(s); err != nil {
				t.Fatal(err)
			}
			if id, err := s.Holder(); err != nil || id == nil || *id != c.ID {
				t.Fatal(id, err)
			}
			if _, err := s.Start(exec.Command("sleep", "60"), 2); !errors.Is(err, ErrHeld) {
				t.Fatal(err)
			}
		})
	}
}

// A compromised process closes its copy of the lock.
func TestProcessThatDropsTheLockIsStillAHolder(t *testing.T) {
	s := slot(t)
	c, err := s.Start(exec.Command("sh", "-c", "exec 3>&-; sleep 60"), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { syscall.Kill(-c.ID.PID, syscall.SIGKILL); <-c.Done() }()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		f, err := s.lock()
		if err == nil {
			f.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the lock was not dropped")
		}
	}
	if id, err := s.Holder(); err != nil || id == nil || *id != c.ID {
		t.Fatal(id, err)
	}
	if _, err := s.Start(exec.Command("sleep", "60"), 2); !errors.Is(err, ErrHeld) {
		t.Fatal(err)
	}
}

func TestReusedNumberIsNotAHolder(t *testing.T) {
	s := slot(t)
	start(t, s, 1).ID.Signal(syscall.SIGKILL)
	self, err := process.Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	self.StartTicks++ // our number, another start time
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err := s.write(Record{ID: self, Run: 1}); err != nil {
			t.Fatal(err)
		}
		id, err := s.Holder()
		if err == nil && id == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(id, err)
		}
	}
}

func TestProgramThatDoesNotExist(t *testing.T) {
	s := slot(t)
	if _, err := s.Start(exec.Command("/nonexistent/program"), 1); err == nil {
		t.Fatal("started")
	}
	if id, err := s.Holder(); id != nil || err != nil {
		t.Fatal(id, err)
	}
}
