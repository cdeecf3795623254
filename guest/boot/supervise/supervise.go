// SPDX-License-Identifier: Apache-2.0

// Package supervise starts, watches and reaps the processes of the guest.
//
// PID 1 must reap every process of the machine whose parent has died, and must
// not take away the exit status of a child that someone waits for. With os/exec
// the two cannot live together: whoever calls wait4(-1) first wins. So the guest
// starts all processes here and one loop waits for all of them: the status of a
// child goes to the [Process] it belongs to, that of a stranger is discarded.
//
// Guarantees: no exit status is lost, however quickly a process exits (a process
// is registered before the loop can look it up); a signal never goes to a reused
// process number (a number is free for reuse only once the loop has reaped it under
// the lock that signals take); output of a child is bounded in memory. Nothing here
// passes a secret: arguments and environment are visible to every root process.
//
// Implements design.md §3 (PID 1).
package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Supervisor starts processes and reaps them. One per program: make it with
// [New] and let [Supervisor.Reap] run for the life of the program.
type Supervisor struct {
	mu       sync.Mutex // held across fork and registration, and across reaping
	children map[int]*Process
	started  chan struct{} // a token after each start, for a loop without children
	strays   int           // processes reaped that were not ours
	stopped  bool
}

// New returns a Supervisor. In a program that is not PID 1, call
// [BecomeSubreaper] first if orphans matter.
func New() *Supervisor {
	return &Supervisor{children: map[int]*Process{}, started: make(chan struct{}, 1)}
}

// BecomeSubreaper makes orphaned descendants children of this process.
func BecomeSubreaper() error { return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }

// Command describes a process.
type Command struct {
	Path string   // absolute
	Args []string // argv, Args[0] included; default: Path
	Env  []string // complete environment; nothing is inherited
	Dir  string   // default "/"
	// Files become descriptors 3, 4, … of the child. The caller keeps its own.
	Files []*os.File
	// Output receives standard output and error. nil: discarded.
	Output *Tail
	// Stdout, when set, is standard output and error instead of Output.
	Stdout *os.File
	// Attr is how to fork; nil: a session of its own.
	Attr *syscall.SysProcAttr
}

// Process is a started process.
type Process struct {
	PID  int
	Name string
	sup  *Supervisor
	done chan struct{}

	status syscall.WaitStatus // valid when done is closed
	exited bool               // guarded by sup.mu
}

// Start starts the process. It is the leader of a session and process group of its
// own, so that a signal to the group reaches its helpers too.
func (s *Supervisor) Start(c Command) (*Process, error) {
	if c.Args == nil {
		c.Args = []string{c.Path}
	}
	if c.Dir == "" {
		c.Dir = "/"
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	out := null.Fd()
	var reader, writer *os.File
	if c.Stdout != nil {
		out = c.Stdout.Fd()
	} else if c.Output != nil {
		if reader, writer, err = os.Pipe(); err != nil {
			return nil, err
		}
		defer writer.Close()
		out = writer.Fd()
	}
	files := []uintptr{null.Fd(), out, out}
	for _, f := range c.Files {
		files = append(files, f.Fd())
	}
	if c.Attr == nil {
		c.Attr = &syscall.SysProcAttr{Setsid: true}
	}
	attr := &syscall.ProcAttr{Dir: c.Dir, Env: c.Env, Files: files, Sys: c.Attr}
	name := c.Args[0][strings.LastIndexByte(c.Args[0], '/')+1:]

	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		if reader != nil {
			reader.Close()
		}
		return nil, errors.New("the machine is shutting down")
	}
	pid, err := syscall.ForkExec(c.Path, c.Args, attr)
	if err != nil {
		s.mu.Unlock()
		if reader != nil {
			reader.Close()
		}
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	p := &Process{PID: pid, Name: name, sup: s, done: make(chan struct{})}
	s.children[pid] = p
	s.mu.Unlock()

	select {
	case s.started <- struct{}{}:
	default:
	}
	if reader != nil {
		c.Output.reading(1)
		go func() {
			defer reader.Close()
			c.Output.readFrom(reader)
		}()
	}
	return p, nil
}

// StartCmd starts a command made for os/exec whose streams are files or nil. The
// command's own methods must not be used afterwards.
func (s *Supervisor) StartCmd(cmd *exec.Cmd) (*Process, error) {
	stdout, _ := cmd.Stdout.(*os.File)
	return s.Start(Command{
		Path: cmd.Path, Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir,
		Files: cmd.ExtraFiles, Stdout: stdout, Attr: cmd.SysProcAttr,
	})
}

// Reap waits for children until ctx ends. It is the only place in the program that
// waits, and runs once.
func (s *Supervisor) Reap(ctx context.Context) {
	for ctx.Err() == nil {
		// Look first without reaping, so that the number cannot be reused before
		// the lock is held.
		var info siginfo
		err := waitid(&info)
		switch err {
		case nil:
			s.reapOne(int(info.pid))
		case unix.EINTR:
		case unix.ECHILD:
			// No child now; orphans can only come from a child yet to be started.
			select {
			case <-ctx.Done():
			case <-s.started:
			}
		default:
			// No other error is documented for P_ALL; do not spin on one.
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// siginfo is the head of siginfo_t for SIGCHLD on 64-bit Linux; 128 bytes in all.
type siginfo struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
	_                     [128 - 28]byte
}

// waitid blocks until a child has exited and leaves it waitable.
func waitid(info *siginfo) error {
	const pAll = 0
	_, _, errno := unix.Syscall6(unix.SYS_WAITID, pAll, 0, uintptr(unsafe.Pointer(info)),
		unix.WEXITED|unix.WNOWAIT, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func (s *Supervisor) reapOne(pid int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var status syscall.WaitStatus
	got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
	if err != nil || got != pid {
		return
	}
	p, ours := s.children[pid]
	if !ours {
		s.strays++
		return
	}
	delete(s.children, pid)
	p.status, p.exited = status, true
	close(p.done)
}

// Strays returns how many processes were reaped that no one here had started.
func (s *Supervisor) Strays() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.strays
}

// Stop lets no further process start.
func (s *Supervisor) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
}

// Done is closed when the process has exited and was reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitError is the failure of a process.
type ExitError struct {
	Name   string
	Status syscall.WaitStatus
}

func (e *ExitError) Error() string {
	if e.Status.Signaled() {
		return fmt.Sprintf("%s was ended by %s", e.Name, e.Status.Signal())
	}
	return fmt.Sprintf("%s exited with status %d", e.Name, e.Status.ExitStatus())
}

// Err returns nil for an exit with status 0. Call it after Done.
func (p *Process) Err() error {
	if p.status == 0 {
		return nil
	}
	return &ExitError{Name: p.Name, Status: p.status}
}

// Signal sends sig to the process, or to its whole group; a process that has
// exited gets nothing.
func (p *Process) Signal(sig syscall.Signal, group bool) error {
	p.sup.mu.Lock()
	defer p.sup.mu.Unlock()
	if p.exited {
		return os.ErrProcessDone
	}
	pid := p.PID
	if group {
		pid = -pid
	}
	return syscall.Kill(pid, sig)
}

// Terminate asks the process to end and kills its group when it has not within
// grace.
func (p *Process) Terminate(grace time.Duration) {
	if p.Signal(syscall.SIGTERM, false) != nil {
		return
	}
	select {
	case <-p.done:
	case <-time.After(grace):
		_ = p.Signal(syscall.SIGKILL, true)
		<-p.done
	}
}

// Run starts the process and waits for it. When ctx ends first, its group is
// killed. An error carries the last line of the output.
func (s *Supervisor) Run(ctx context.Context, c Command) error {
	if c.Output == nil {
		c.Output = NewTail(4 << 10)
	}
	p, err := s.Start(c)
	if err != nil {
		return err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		_ = p.Signal(syscall.SIGKILL, true)
		<-p.Done()
		return fmt.Errorf("%s: %w", p.Name, context.Cause(ctx))
	}
	if err := p.Err(); err != nil {
		c.Output.settle(200 * time.Millisecond)
		if last := c.Output.LastLines(3); last != "" {
			return fmt.Errorf("%w: %s", err, last)
		}
		return err
	}
	return nil
}

// Backoff says how long to wait before restart number n (from 0): 200 ms,
// doubling up to 30 s.
func Backoff(n int) time.Duration {
	return min(200*time.Millisecond<<min(n, 10), 30*time.Second)
}

// Keep runs the process again and again until ctx ends, with [Backoff] between a
// failure and the next start; a process that ran for a minute starts the count
// anew. report is told of each exit. Keep returns once the process is gone.
//
// first, when not nil, is the process already running. command is asked before
// each start, since inherited files may have to be made anew.
func (s *Supervisor) Keep(ctx context.Context, first *Process, grace time.Duration,
	command func() (Command, error), report func(err error, wait time.Duration),
) {
	for n := 0; ; n++ {
		begin := time.Now()
		var err error
		p := first
		first = nil
		if p == nil {
			var c Command
			if c, err = command(); err == nil {
				p, err = s.Start(c)
			}
		}
		if p != nil {
			select {
			case <-p.Done():
				err = p.Err()
				if err == nil {
					err = fmt.Errorf("%s exited", p.Name)
				}
			case <-ctx.Done():
				p.Terminate(grace)
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(begin) > time.Minute {
			n = 0
		}
		wait := Backoff(n)
		report(err, wait)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}
