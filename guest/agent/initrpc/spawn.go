// SPDX-License-Identifier: Apache-2.0

package initrpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// File descriptors that the agent inherits. Listeners follow from FDListeners
// on, in the order of Config.Listeners; 0 is /dev/null, 1 and 2 the log.
const (
	FDInit      = 3
	FDConfig    = 4
	FDListeners = 5
)

// exitGrace is how long an agent may run after it has closed its connection.
const exitGrace = 5 * time.Second

// Names of the listeners the agent knows. All are stream sockets; guestapi is a
// unix socket to which init proxies the hostlink stream of that name.
const (
	ListenDstack   = "dstack.sock"
	ListenTappd    = "tappd.sock"
	ListenExternal = "external"
	ListenGuestAPI = "guestapi"

	// ListenTunnel is where TLS ends for ports with tls app (manifest.TLSPort), in the
	// tunnel to gateways alone.
	ListenTunnel = "tunnel"

	// ListenLocal serves apps and the public side on one port: development only.
	ListenLocal = "local"

	// ListenScope and the name of a service is that service's own socket. It has
	// what dstack.sock and tappd.sock have, with the keys of [Config].Scopes only.
	ListenScope = "scope:"
)

// SpawnOptions say what to start and with what.
type SpawnOptions struct {
	Path     string   // the executable
	Args     []string // its arguments; nil means "agent"
	Env      []string // its whole environment; nil means none
	UID, GID uint32   // it runs with these and no supplementary groups
	Config   *Config  // Listeners is filled in

	// Init answers the agent.
	Init Init

	// Listeners are sockets, bound and listening, by name. They stay the
	// caller's: it closes its copies when it likes.
	Listeners map[string]*os.File

	// Log receives the agent's standard output and error; nil discards them.
	Log io.Writer

	// Start starts the process that cmd describes: Path, Args, Env, Dir,
	// ExtraFiles (descriptors 3 and up), Stdout (an *os.File, for standard error
	// too) and SysProcAttr. PID 1, which reaps all children itself, brings its
	// own, and may send the output elsewhere; nil means cmd.Start.
	Start func(cmd *exec.Cmd) (Child, error)
}

// Child is a started process. Wait returns once, when it has ended; Kill sends
// SIGKILL, and never to another process that got the number since.
type Child struct {
	Pid  int
	Wait func() error
	Kill func() error
}

func startCmd(cmd *exec.Cmd) (Child, error) {
	if err := cmd.Start(); err != nil {
		return Child{}, err
	}
	return Child{Pid: cmd.Process.Pid, Wait: cmd.Wait, Kill: cmd.Process.Kill}, nil
}

// Process is a running agent.
type Process struct {
	Pid int

	kill  func() error
	ready chan struct{}
	done  chan struct{}
	err   error
}

// Ready is closed once the agent serves all its listeners.
func (p *Process) Ready() <-chan struct{} { return p.ready }

// Done is closed when the agent has ended; see Wait.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits until the agent has ended and all its log was copied. It returns
// how it ended, or how it broke the protocol, for which it was killed.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Kill ends the agent at once.
func (p *Process) Kill() error { return p.kill() }

// Spawn starts the agent: own user and group, no supplementary groups, no
// capabilities, no environment, and no descriptors but the ones named here. It
// serves the agent's requests until the agent ends, and kills the agent when
// ctx ends, when the agent breaks the protocol, or when the caller dies.
func Spawn(ctx context.Context, opt SpawnOptions) (*Process, error) {
	cfg := *opt.Config
	cfg.Listeners = slices.Sorted(maps.Keys(opt.Listeners))
	memfd, err := cfg.Seal()
	if err != nil {
		return nil, err
	}
	defer memfd.Close()

	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()

	logRead, logWrite, err := os.Pipe()
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("create log pipe: %w", err)
	}
	defer logWrite.Close()

	args := opt.Args
	if args == nil {
		args = []string{"agent"}
	}
	env := opt.Env
	if env == nil {
		env = []string{} // nil would mean ours
	}
	cmd := &exec.Cmd{
		Path: opt.Path, Args: append([]string{filepath.Base(opt.Path)}, args...), Env: env, Dir: "/",
		Stdout: logWrite, Stderr: logWrite,
		ExtraFiles:  []*os.File{FDInit - 3: theirs, FDConfig - 3: memfd},
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true},
	}
	// Leaving uid 0 clears the permitted, effective and ambient sets; the agent
	// itself then sets no_new_privs. Only tests run as the caller's own user.
	if opt.UID != uint32(os.Getuid()) || opt.GID != uint32(os.Getgid()) {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: opt.UID, Gid: opt.GID}
	}
	for _, name := range cfg.Listeners {
		cmd.ExtraFiles = append(cmd.ExtraFiles, opt.Listeners[name])
	}
	start := opt.Start
	if start == nil {
		start = startCmd
	}

	p := &Process{ready: make(chan struct{}), done: make(chan struct{})}
	started, ended := make(chan error), make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the *thread* that forked ends, so that
		// thread has to live as long as the child (golang.org/issue/27505).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		child, err := start(cmd)
		p.Pid, p.kill = child.Pid, child.Kill
		started <- err
		if err == nil {
			ended <- child.Wait()
		}
	}()
	if err := <-started; err != nil {
		ours.Close()
		logRead.Close()
		return nil, fmt.Errorf("start agent %s: %w", opt.Path, err)
	}
	logWrite.Close()

	logged := make(chan struct{})
	go func() {
		defer close(logged)
		defer logRead.Close()
		w := opt.Log
		if w == nil {
			w = io.Discard
		}
		if _, err := io.Copy(w, logRead); err != nil {
			io.Copy(io.Discard, logRead) // never block the agent on its log
		}
	}()
	go func() {
		defer close(p.done)
		served := make(chan error, 1)
		serveCtx, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() { served <- Serve(serveCtx, ours, opt.Init, func() { close(p.ready) }) }()
		var protocol error
		select {
		case p.err = <-ended:
			cancel()
			<-served
		case protocol = <-served: // including the end of ctx
			grace := time.NewTimer(exitGrace)
			defer grace.Stop()
			if protocol != nil {
				p.kill()
			}
			select {
			case p.err = <-ended:
			case <-grace.C: // it hung up and stayed: an agent without init is of no use
				p.kill()
				p.err = <-ended
			}
		}
		<-logged
		if protocol != nil && !errors.Is(protocol, context.Canceled) {
			p.err = errors.Join(protocol, p.err)
		}
	}()
	return p, nil
}

// socketpair returns a connected pair: ours as a connection, theirs to inherit.
func socketpair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("create socket pair: %w", err)
	}
	mine := os.NewFile(uintptr(fds[0]), "init-agent")
	theirs := os.NewFile(uintptr(fds[1]), "agent-init")
	conn, err := net.FileConn(mine)
	mine.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	return conn, theirs, nil
}

// Inherited is what an agent started by Spawn finds.
type Inherited struct {
	Config    *Config
	Init      *Client
	Listeners map[string]net.Listener
}

// Inherit takes over the descriptors that Spawn passed. It marks them
// close-on-exec and may be called once in a process.
func Inherit() (*Inherited, error) {
	unix.CloseOnExec(FDInit)
	unix.CloseOnExec(FDConfig)
	cfg, err := ReadConfig(os.NewFile(FDConfig, "agent-config"))
	if err != nil {
		return nil, err
	}
	sock := os.NewFile(FDInit, "agent-init")
	conn, err := net.FileConn(sock)
	sock.Close()
	if err != nil {
		cfg.Wipe()
		return nil, fmt.Errorf("socket to init: %w", err)
	}
	in := &Inherited{Config: cfg, Listeners: make(map[string]net.Listener)}
	for i, name := range cfg.Listeners {
		fd := FDListeners + i
		unix.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), name)
		ln, err := net.FileListener(f)
		f.Close()
		if err != nil {
			conn.Close()
			cfg.Wipe()
			for _, ln := range in.Listeners {
				ln.Close()
			}
			return nil, fmt.Errorf("inherited listener %q: %w", name, err)
		}
		if u, ok := ln.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // the path is init's
		}
		in.Listeners[name] = ln
	}
	in.Init = NewClient(conn)
	return in, nil
}

// ListenUnix binds a unix stream socket for the agent, replacing a stale one,
// and makes it connectable for everyone (mode 0777) as upstream does: the
// containers that mount it run as any user (guest-agent.md §1).
func ListenUnix(path string) (*os.File, error) {
	if !filepath.IsAbs(path) { // an abstract name could not be chmod'ed
		return nil, fmt.Errorf("unix socket path %q is not absolute", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	ln.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o777); err != nil {
		return nil, err
	}
	return ln.File()
}
