// SPDX-License-Identifier: Apache-2.0

//go:build linux

package edge

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket is a TCP connection by its descriptor, in the runtime's poller. One goroutine
// reads it and one writes it; the functions for the poller are made once, for they would
// be an allocation a call.
type socket struct {
	raw syscall.RawConn

	tryReadFn, readFn, waitFn, fillFn, drainFn func(fd uintptr) bool
	// Of the read under way.
	buf    *[copySize]byte
	into   []byte
	n      int
	err    error
	waited bool
	fill   *pipe
	// Of the write under way, which is another goroutine's.
	drain    *pipe
	drained  int
	drainErr error
}

func newSocket(c *net.TCPConn) (*socket, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &socket{raw: raw}
	s.tryReadFn, s.readFn, s.waitFn, s.fillFn, s.drainFn = s.onTryRead, s.onRead, s.onWait, s.onFill, s.onDrain
	return s, nil
}

// retry runs a call until no signal interrupts it.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// tryRead reads what has come, and returns emptyError when nothing has.
func (s *socket) tryRead(b []byte) (int, error) {
	s.into = b
	err := s.raw.Read(s.tryReadFn)
	s.into = nil
	switch {
	case err != nil:
		return 0, err
	case s.err == unix.EAGAIN:
		return 0, emptyError{}
	case s.err != nil:
		return 0, os.NewSyscallError("read", s.err)
	case s.n == 0 && len(b) > 0:
		return 0, io.EOF
	}
	return s.n, nil
}

func (s *socket) onTryRead(fd uintptr) bool {
	s.n, s.err = retry(func() (int, error) { return unix.Read(int(fd), s.into) })
	return true
}

// wait returns when there is something to read, an end or an error.
func (s *socket) wait() error { return s.raw.Read(s.waitFn) }

func (s *socket) onWait(fd uintptr) bool {
	var b [1]byte
	_, err := retry(func() (int, error) {
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return n, err
	})
	return err != unix.EAGAIN
}

// busy reports whether something is not acknowledged yet, or has come and was not read.
func (s *socket) busy() (busy bool) {
	s.raw.Control(func(fd uintptr) {
		for _, of := range []uint{unix.SIOCOUTQ, unix.SIOCINQ} {
			if n, err := unix.IoctlGetInt(int(fd), of); err == nil && n > 0 {
				busy = true
			}
		}
	})
	return busy
}

// read returns what has come, in a buffer of copyBuffers that is the caller's to put back.
// n is 0 and buf nil at the end. waited says that nothing was there at first.
func (s *socket) read() (buf *[copySize]byte, n int, waited bool, err error) {
	s.waited = false
	if err := s.raw.Read(s.readFn); err != nil {
		return nil, 0, s.waited, err
	}
	buf, s.buf = s.buf, nil
	if s.err != nil || s.n == 0 {
		copyBuffers.Put(buf)
		return nil, 0, s.waited, os.NewSyscallError("read", s.err)
	}
	return buf, s.n, s.waited, nil
}

func (s *socket) onRead(fd uintptr) bool {
	s.buf = copyBuffers.Get().(*[copySize]byte)
	s.n, s.err = retry(func() (int, error) { return unix.Read(int(fd), s.buf[:]) })
	if s.err == unix.EAGAIN {
		copyBuffers.Put(s.buf)
		s.buf, s.waited = nil, true
		return false
	}
	return true
}

// splice moves bytes to another socket through p, until there are none to read: waited is
// true then, or the end has come: n is 0 then. It leaves p empty or broken.
func (s *socket) splice(to *socket, p *pipe, moved func(int)) (n int, waited bool, err error) {
	for {
		s.fill = p
		if err := s.raw.Read(s.fillFn); err != nil {
			return n, false, err
		}
		switch {
		case s.err == unix.EAGAIN:
			return max(n, 1), true, nil
		case s.err != nil:
			return n, false, os.NewSyscallError("splice", s.err)
		case s.n == 0:
			return 0, false, nil
		}
		p.held = s.n
		for p.held > 0 {
			to.drain = p
			if err := to.raw.Write(to.drainFn); err != nil {
				return n, false, err
			}
			if to.drainErr != nil {
				return n, false, os.NewSyscallError("splice", to.drainErr)
			}
			if to.drained == 0 {
				return n, false, io.ErrUnexpectedEOF
			}
			p.held -= to.drained
			n += to.drained
			moved(to.drained)
		}
	}
}

func (s *socket) onFill(fd uintptr) bool {
	s.n, s.err = retry(func() (int, error) {
		n, err := unix.Splice(int(fd), nil, s.fill.w, nil, pipeSize, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		return int(n), err
	})
	return true
}

func (s *socket) onDrain(fd uintptr) bool {
	s.drained, s.drainErr = retry(func() (int, error) {
		n, err := unix.Splice(s.drain.r, nil, int(fd), nil, s.drain.held, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		return int(n), err
	})
	return s.drainErr != unix.EAGAIN
}

// pipeSize is asked for; the kernel may give less to who has many.
const pipeSize = 256 << 10

// pipe is a pipe of the kernel with held bytes in it.
type pipe struct {
	r, w int
	held int
}

// pool is the empty pipes. Those of ended bursts are kept up to a few.
type pool struct {
	limit int64
	made  atomic.Int64
	mu    sync.Mutex
	free  []*pipe
}

const keptPipes = 64

// get returns an empty pipe, or nil when there are too many or no descriptors.
func (p *pool) get() *pipe {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		out := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return out
	}
	p.mu.Unlock()
	if n := p.made.Add(1); p.limit >= 0 && n > p.limit {
		p.made.Add(-1)
		return nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		p.made.Add(-1)
		return nil
	}
	unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{r: fds[0], w: fds[1]}
}

// put takes a pipe back; one with bytes of a broken relay in it is closed.
func (p *pool) put(x *pipe) {
	if x.held == 0 {
		p.mu.Lock()
		if len(p.free) < keptPipes {
			p.free = append(p.free, x)
			x = nil
		}
		p.mu.Unlock()
	}
	if x != nil {
		p.discard(x)
	}
}

func (p *pool) discard(x *pipe) {
	unix.Close(x.r)
	unix.Close(x.w)
	p.made.Add(-1)
}

func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, x := range p.free {
		p.discard(x)
	}
	p.free = nil
}

// Listen opens n listeners on one address, among which the kernel spreads connections. An
// inbound connection has no keep-alive: the relay's idle time ends it.
func Listen(ctx context.Context, address string, n int) ([]net.Listener, error) {
	lc := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); cerr != nil {
			return cerr
		}
		return err
	}}
	var out []net.Listener
	for range max(1, n) {
		l, err := lc.Listen(ctx, "tcp", address)
		if err != nil {
			for _, l := range out {
				l.Close()
			}
			return nil, err
		}
		out = append(out, l)
		address = l.Addr().String() // the port, where it was 0
	}
	return out, nil
}
