// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/internal/fault"
)

const (
	bufferSize = 32 << 10
	smallSize  = 4 << 10 // while a side that cannot say that it has data has none
	// spliceAfter is how many full buffers in a row begin a bulk transfer, which then
	// stays in the kernel.
	spliceAfter = 4
	pipeSize    = 256 << 10
)

var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// relay carries bytes both ways until both sides have ended theirs, nothing came for the
// idle time, ctx ends, or the route does.
func (e *Edge) relay(ctx context.Context, client, app net.Conn, r *route.Route) error {
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-ctx.Done():
		case <-r.Gone():
		case <-ended:
			return
		}
		// The other side sees the end at once, in whatever it was doing.
		client.SetDeadline(past)
		app.SetDeadline(past)
		client.Close()
		app.Close()
	}()
	f := &flow{idle: e.cfg.Idle}
	f.touch()
	done := make(chan error, 1)
	go func() { done <- f.pump(app, client, &e.stats.received) }()
	err := f.pump(client, app, &e.stats.sent)
	if other := <-done; err == nil {
		err = other
	}
	return err
}

var past = time.Unix(1, 0)

// flow is what the two directions of a connection share.
type flow struct {
	idle time.Duration
	last atomic.Int64 // Unix nanoseconds of the last byte in either direction
}

func (f *flow) touch() { f.last.Store(time.Now().UnixNano()) }

// left is how long the connection may stay idle still.
func (f *flow) left() time.Duration {
	return f.idle - time.Duration(time.Now().UnixNano()-f.last.Load())
}

// again says whether an operation that timed out is to go on, and sets its new deadline.
func (f *flow) again(err error, set func(time.Time) error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	left := f.left()
	if left <= 0 {
		return false
	}
	return set(time.Now().Add(left)) == nil
}

// pump copies one direction, and ends that half of to when from has ended its. An error
// ends both.
func (f *flow) pump(to, from net.Conn, count *atomic.Uint64) error {
	from.SetReadDeadline(time.Now().Add(f.idle))
	to.SetWriteDeadline(time.Now().Add(f.idle))
	err := f.copy(to, from, count)
	if err == nil {
		err = closeWrite(to)
	}
	if err != nil {
		to.Close()
		from.Close()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fault.New("edge_idle", "no byte in either direction for %s", f.idle)
		case errors.Is(err, net.ErrClosed), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
			return nil // the other direction ended it, or a peer that is gone
		}
		return fault.Wrap(err, "edge_broken", "carry bytes")
	}
	return nil
}

func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		if err := h.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) {
			return err
		}
		return nil
	}
	return c.Close()
}

func (f *flow) copy(to, from net.Conn, count *atomic.Uint64) error {
	src, lazy := from.(*net.TCPConn)
	if !lazy {
		return f.eager(to, from, count)
	}
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	dst, direct := to.(*net.TCPConn)
	full := 0
	for {
		buf, n, err := f.read(src, raw)
		if err != nil || n == 0 {
			return err
		}
		f.touch()
		count.Add(uint64(n))
		err = f.write(to, (*buf)[:n])
		buffers.Put(buf)
		if err != nil {
			return err
		}
		if full++; n < bufferSize {
			full = 0
		}
		if direct && full >= spliceAfter {
			if err := f.splice(dst, src, raw, count); err != nil {
				return err
			}
			full = 0
		}
	}
}

// read waits for data without holding a buffer, and returns it in one; 0 is the end.
func (f *flow) read(src *net.TCPConn, raw syscall.RawConn) (buf *[]byte, n int, err error) {
	for {
		var failed error
		err = raw.Read(func(fd uintptr) bool {
			buf = buffers.Get().(*[]byte)
			for {
				n, failed = unix.Read(int(fd), *buf)
				if failed != unix.EINTR {
					break
				}
			}
			if failed != nil || n == 0 {
				buffers.Put(buf)
				buf = nil
			}
			return failed != unix.EAGAIN
		})
		if err == nil && failed != nil {
			err = os.NewSyscallError("read", failed)
		}
		if err == nil || !f.again(err, src.SetReadDeadline) {
			return buf, max(n, 0), err
		}
	}
}

func (f *flow) write(to net.Conn, b []byte) error {
	_, session := to.(*tls.Conn)
	for {
		if session { // which a write that timed out would break
			to.SetWriteDeadline(time.Now().Add(f.idle))
		}
		n, err := to.Write(b)
		if err == nil {
			return nil
		}
		if b = b[n:]; n > 0 {
			f.touch()
		}
		if session || !f.again(err, to.SetWriteDeadline) {
			return err
		}
	}
}

// eager copies from a side of which nobody knows whether it has data without asking for
// it, with a small buffer that grows while there is much.
func (f *flow) eager(to, from net.Conn, count *atomic.Uint64) error {
	small := make([]byte, smallSize)
	buf := small
	var big *[]byte
	drop := func() {
		if big != nil {
			buffers.Put(big)
			big, buf = nil, small
		}
	}
	defer drop()
	for {
		n, err := from.Read(buf)
		if n > 0 {
			f.touch()
			count.Add(uint64(n))
			if err := f.write(to, buf[:n]); err != nil {
				return err
			}
			switch {
			case n == len(buf) && big == nil:
				big = buffers.Get().(*[]byte)
				buf = *big
			case n < smallSize:
				drop()
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF): // clients often leave without close_notify
			return nil
		default:
			// A TLS session survives a read that timed out before any byte of a record.
			if !f.again(err, from.SetReadDeadline) {
				return err
			}
		}
	}
}

// pipe is a kernel pipe, empty whenever it is in the pool.
type pipe struct{ r, w int }

// pipes are kept for the next bulk transfers; beyond those they are closed.
var pipes = make(chan *pipe, 64)

func getPipe() (*pipe, error) {
	select {
	case p := <-pipes:
		return p, nil
	default:
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // else it is smaller
	return &pipe{fds[0], fds[1]}, nil
}

func (p *pipe) put(empty bool) {
	if empty {
		select {
		case pipes <- p:
			return
		default:
		}
	}
	unix.Close(p.r)
	unix.Close(p.w)
}

// splice moves what is there from src to dst within the kernel, and returns when nothing
// is: the pipe is not held while both sides wait.
func (f *flow) splice(dst, src *net.TCPConn, in syscall.RawConn, count *atomic.Uint64) error {
	p, err := getPipe()
	if err != nil {
		return nil // out of descriptors: the copy through this process goes on
	}
	inside := 0
	defer func() { p.put(inside == 0) }()
	out, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	for {
		n, waiting := 0, false
		var failed error
		err := in.Read(func(fd uintptr) bool {
			for {
				var m int64
				m, failed = unix.Splice(int(fd), nil, p.w, nil, pipeSize, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
				if n = int(m); failed != unix.EINTR {
					break
				}
			}
			waiting = failed == unix.EAGAIN
			return true
		})
		switch {
		case err != nil:
			return err
		case waiting || failed == nil && n <= 0:
			return nil // nothing now, or the end, which the next read sees
		case failed != nil:
			return os.NewSyscallError("splice", failed)
		}
		f.touch()
		count.Add(uint64(n))
		for inside = n; inside > 0; {
			var moved int64
			err := out.Write(func(fd uintptr) bool {
				for {
					moved, failed = unix.Splice(p.r, nil, int(fd), nil, inside, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
					if failed != unix.EINTR {
						break
					}
				}
				return failed != unix.EAGAIN
			})
			if err == nil && failed != nil {
				err = os.NewSyscallError("splice", failed)
			}
			if err != nil {
				if f.again(err, dst.SetWriteDeadline) {
					continue
				}
				return err
			}
			inside -= int(moved)
			f.touch()
		}
	}
}

// evidencePath is frozen: verifiers know it (design.md §4).
const evidencePath = "/.well-known/dstack/attest"

// maxLine is how much of a terminated connection is read to see what it asks for.
const maxLine = len("POST " + evidencePath + " ")

// terminated looks whether a connection whose TLS ended here asks for evidence, which is
// then the instance's with the gateway's own; all else is the app's.
func (e *Edge) terminated(ctx context.Context, session *tls.Conn, to *target) error {
	const ask = "POST " + evidencePath
	session.SetReadDeadline(time.Now().Add(e.cfg.Idle))
	head := make([]byte, 0, maxLine)
	for len(head) < maxLine && strings.HasPrefix(ask+" ", string(head)) {
		n, err := session.Read(head[len(head):maxLine])
		head = head[:len(head)+n]
		if err != nil {
			break // and the relay sees it again
		}
	}
	if string(head) != ask+" " {
		if _, err := to.conn.Write(head); err != nil {
			return fault.Wrap(err, "edge_broken", "send the first bytes on")
		}
		return e.relay(ctx, session, to.conn, to.route)
	}
	to.conn.Close() // the agent is asked, at its own port
	cert, err := e.cfg.GetCertificate(&tls.ClientHelloInfo{ServerName: session.ConnectionState().ServerName, SupportedVersions: []uint16{tls.VersionTLS13},
		SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}, CipherSuites: []uint16{tls.TLS_AES_128_GCM_SHA256}, SupportedCurves: []tls.CurveID{tls.X25519}})
	if err != nil {
		return fault.Wrap(err, "edge_no_certificate", "name the key of this connection")
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return fault.Wrap(err, "edge_no_certificate", "name the key of this connection")
	}
	at := to.route.Record().Address
	serveHTTP(ctx, &replayed{Conn: session, rest: head}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		e.cfg.Evidence(w, r, at, leaf.RawSubjectPublicKeyInfo)
	}))
	return nil
}
