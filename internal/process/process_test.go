// SPDX-License-Identifier: Apache-2.0

package process

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

func TestStopEndsOnlyTheRecordedProcess(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	other := id
	other.StartTicks++
	if err := other.Signal(syscall.SIGKILL); !errors.Is(err, ErrGone) {
		t.Fatalf("a process with another start time: %v, want ErrGone", err)
	}
	if !id.Running() {
		t.Fatal("the process is gone")
	}
	go cmd.Wait()
	if err := id.Stop(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	if id.Running() {
		t.Fatal("the process still runs")
	}
	if err := id.Stop(time.Second); err != nil {
		t.Fatalf("stopping twice: %v", err)
	}
}

func TestStopKillsWhatIgnoresTerm(t *testing.T) {
	cmd := exec.Command("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	id, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	go cmd.Wait()
	if err := id.Stop(200 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if id.Running() {
		t.Fatal("the process still runs")
	}
}

func TestIdentifyOfNobody(t *testing.T) {
	if _, err := Identify(1 << 22); !errors.Is(err, ErrGone) {
		t.Fatalf("got %v, want ErrGone", err)
	}
	if self, err := Identify(os.Getpid()); err != nil || !self.Running() {
		t.Fatalf("self: %v %v", self, err)
	}
}
