// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A supervisor reaps every child of its program, so each test runs in a program of
// its own: this test binary again, with the name of the scenario.
const scenarioEnv = "SUPERVISE_SCENARIO"

var scenarios = map[string]func() error{
	"statuses": statuses, "orphans": orphans, "signals": signals, "keep": keep, "output": output, "files": files,
	"timeout": timeout, "stop": stop,
}

func TestMain(m *testing.M) {
	if name := os.Getenv(scenarioEnv); name != "" {
		if err := scenarios[name](); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestScenarios(t *testing.T) {
	for name := range scenarios {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), scenarioEnv+"="+name)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		})
	}
}

func running() (*Supervisor, context.CancelFunc) {
	s := New()
	ctx, cancel := context.WithCancel(context.Background())
	go s.Reap(ctx)
	return s, cancel
}

func shell(script string) Command {
	return Command{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin"}}
}

// statuses: many processes that exit at once, started from many goroutines, each
// keeps its own status, and a supervisor that had no children wakes for the first.
func statuses() error {
	s, cancel := running()
	defer cancel()
	time.Sleep(20 * time.Millisecond) // the loop now waits without children
	var wg sync.WaitGroup
	errs := make(chan error, 200)
	for g := range 8 {
		wg.Go(func() {
			for i := range 20 {
				want := (g*20 + i) % 200
				p, err := s.Start(shell("exit " + strconv.Itoa(want)))
				if err != nil {
					errs <- err
					return
				}
				<-p.Done()
				var exit *ExitError
				got := 0
				if errors.As(p.Err(), &exit) {
					got = exit.Status.ExitStatus()
				}
				if got != want {
					errs <- fmt.Errorf("process %d: status %d, want %d", p.PID, got, want)
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

// orphans: grandchildren whose parent is gone are reaped and no zombie stays.
func orphans() error {
	if err := BecomeSubreaper(); err != nil {
		return err
	}
	s, cancel := running()
	defer cancel()
	const n = 30
	var script strings.Builder
	for range n {
		script.WriteString("(sleep 0.1; exit 3) & ")
	}
	// A long-lived sibling keeps its own status while strays are reaped.
	long, err := s.Start(shell("sleep 0.5; exit 7"))
	if err != nil {
		return err
	}
	if err := s.Run(context.Background(), shell(script.String()+"exit 0")); err != nil {
		return err
	}
	<-long.Done()
	if err := long.Err(); err == nil || err.Error() != "sh exited with status 7" {
		return fmt.Errorf("sibling: %v", err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for s.Strays() < n {
		if time.Now().After(deadline) {
			return fmt.Errorf("reaped %d strays of %d", s.Strays(), n)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return noZombies()
}

func noZombies() error {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		_, rest, ok := bytes.Cut(text, []byte(") "))
		fields := strings.Fields(string(rest))
		if ok && len(fields) > 1 && fields[0] == "Z" && fields[1] == strconv.Itoa(os.Getpid()) {
			return fmt.Errorf("zombie: %s", text)
		}
	}
	return nil
}

func signals() error {
	s, cancel := running()
	defer cancel()
	p, err := s.Start(shell("sleep 60 & wait"))
	if err != nil {
		return err
	}
	begin := time.Now()
	p.Terminate(5 * time.Second)
	if err := p.Err(); err == nil || !strings.Contains(err.Error(), "terminated") {
		return fmt.Errorf("terminated process: %v", err)
	}
	// One that ignores the request is killed, with its group.
	out := NewTail(100)
	c := shell("trap '' TERM; echo up; sleep 60; sleep 60")
	c.Output = out
	if p, err = s.Start(c); err != nil {
		return err
	}
	for !strings.Contains(out.String(), "up") {
		time.Sleep(5 * time.Millisecond)
	}
	p.Terminate(100 * time.Millisecond)
	if err := p.Err(); err == nil || !strings.Contains(err.Error(), "killed") {
		return fmt.Errorf("killed process: %v", err)
	}
	if time.Since(begin) > 5*time.Second {
		return errors.New("ending two processes took too long")
	}
	if err := p.Signal(syscall.SIGTERM, false); !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal to a process that is gone: %v", err)
	}
	return nil
}

func keep() error {
	s, cancelReap := running()
	defer cancelReap()
	ctx, cancel := context.WithCancel(context.Background())
	var starts int
	var waits []time.Duration
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Keep(ctx, nil, time.Second, func() (Command, error) {
			starts++
			if starts == 2 {
				return Command{}, errors.New("cannot make the command")
			}
			return shell("exit 1"), nil
		}, func(err error, wait time.Duration) {
			waits = append(waits, wait)
			if err == nil {
				panic("exit without reason")
			}
			if len(waits) == 3 {
				cancel()
			}
		})
	}()
	<-done
	if starts != 3 || fmt.Sprint(waits) != "[200ms 400ms 800ms]" {
		return fmt.Errorf("starts %d, waits %v", starts, waits)
	}
	// The context ends the process.
	ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	p, err := s.Start(shell("sleep 60"))
	if err != nil {
		return err
	}
	time.AfterFunc(50*time.Millisecond, cancel)
	s.Keep(ctx, p, time.Second, nil, nil)
	select {
	case <-p.Done():
		return nil
	default:
		return errors.New("Keep returned before its process was gone")
	}
}

func output() error {
	s, cancel := running()
	defer cancel()
	var lines []string
	var mu sync.Mutex
	out := NewTail(40)
	out.Line = func(l string) { mu.Lock(); lines = append(lines, l); mu.Unlock() }
	c := shell("for i in 1 2 3 4 5 6 7 8 9; do echo line $i; done; echo reason >&2; exit 4")
	c.Output = out
	err := s.Run(context.Background(), c)
	if err == nil || err.Error() != "sh exited with status 4: line 8; line 9; reason" {
		return fmt.Errorf("error %q", err)
	}
	if len(out.String()) > 40 {
		return fmt.Errorf("kept %d bytes of 40", len(out.String()))
	}
	mu.Lock()
	defer mu.Unlock()
	if len(lines) != 10 || lines[0] != "line 1" {
		return fmt.Errorf("lines %q", lines)
	}
	return nil
}

// files: descriptors are handed over in order and the environment is not inherited.
func files() error {
	s, cancel := running()
	defer cancel()
	os.Setenv("CANARY", "secret")
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	c := shell(`echo "$CANARY" >&3; env >&3`)
	c.Files = []*os.File{w}
	if err := s.Run(context.Background(), c); err != nil {
		return err
	}
	w.Close()
	var buf bytes.Buffer
	if _, err := buf.ReadFrom(r); err != nil {
		return err
	}
	if buf.Len() == 0 || strings.Contains(buf.String(), "secret") {
		return fmt.Errorf("child wrote %q", buf.String())
	}
	return nil
}

func timeout() error {
	s, cancel := running()
	defer cancel()
	why := errors.New("too slow")
	ctx, stop := context.WithTimeoutCause(context.Background(), 100*time.Millisecond, why)
	defer stop()
	begin := time.Now()
	if err := s.Run(ctx, shell("sleep 60; true")); !errors.Is(err, why) {
		return fmt.Errorf("error %v", err)
	}
	if time.Since(begin) > 5*time.Second {
		return errors.New("the time limit did not end the process")
	}
	return nil
}

func stop() error {
	s, cancel := running()
	defer cancel()
	if _, err := s.Start(Command{Path: "/nonexistent"}); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("missing program: %v", err)
	}
	s.Stop()
	if _, err := s.Start(shell("true")); err == nil {
		return errors.New("a process started after Stop")
	}
	return nil
}
