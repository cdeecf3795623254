// SPDX-License-Identifier: Apache-2.0

package prpc

import (
	"bytes"
	"net"
	"net/http"
	"time"
)

// HTTPServer is an http.Server that takes what upstream's clients send, see
// [Server].
type HTTPServer struct{ http.Server }

// Server returns a server of h with time limits for slow and idle clients, whose
// Serve also takes requests without a Host header, which upstream's Rust client
// sends over unix sockets (guest-agent.md §2, gotcha 2) and net/http refuses.
func Server(h http.Handler) *HTTPServer {
	return &HTTPServer{http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       10 * time.Second, // upstream's keep-alive
	}}
}

// Serve accepts connections until the server is shut down, see http.Server.Serve.
func (s *HTTPServer) Serve(l net.Listener) error { return s.Server.Serve(Listener(l)) }

// Listener wraps a listener so that a request without a Host header, if it is the
// first of its connection, gets one, and a "Connection: close" along with it: the
// server then tells the client not to send another request on this connection.
// Connections that do not begin as HTTP pass unchanged. The wrapped connections have
// a method NetConn that returns the inner one.
func Listener(l net.Listener) net.Listener { return hostListener{l} }

type hostListener struct{ net.Listener }

func (l hostListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &hostConn{Conn: c}, nil
}

// maxHead is how much of a request is buffered in search of its header's end; a
// longer header passes unchanged.
const maxHead = 64 << 10

// hostConn is read by one goroutine at a time, as net/http does.
type hostConn struct {
	net.Conn
	looked bool   // the first header was dealt with
	ready  []byte // bytes to be read before those of Conn
	err    error  // the error to return after ready
}

// NetConn returns the wrapped connection, such as a *net.UnixConn.
func (c *hostConn) NetConn() net.Conn { return c.Conn }

func (c *hostConn) Read(p []byte) (int, error) {
	if !c.looked {
		if err := c.look(); err != nil {
			return 0, err
		}
	}
	if len(c.ready) > 0 {
		n := copy(p, c.ready)
		c.ready = c.ready[n:]
		return n, nil
	}
	if c.err != nil {
		return 0, c.err
	}
	return c.Conn.Read(p)
}

// look reads the first header whole and puts it, mended, into ready. An error of a
// temporary kind, such as a deadline, leaves everything as it is for the next try.
func (c *hostConn) look() error {
	buf := make([]byte, 4096)
	for {
		n, err := c.Conn.Read(buf)
		c.ready = append(c.ready, buf[:n]...)
		if err != nil {
			if t, ok := err.(net.Error); ok && t.Timeout() {
				return err
			}
			c.err = err
			break
		}
		if len(c.ready) > 0 && (c.ready[0] < 'A' || c.ready[0] > 'Z') {
			break // not a request line
		}
		if end := headerEnd(c.ready); end >= 0 {
			c.ready = addHost(c.ready, end)
			break
		}
		if len(c.ready) > maxHead {
			break
		}
	}
	c.looked = true
	return nil
}

// headerEnd returns the offset of the empty line that ends the header, or -1. Lines
// end in LF with or without CR, as net/http reads them.
func headerEnd(b []byte) int {
	for i, c := range b {
		if c != '\n' {
			continue
		}
		if rest := b[i+1:]; bytes.HasPrefix(rest, []byte("\n")) || bytes.HasPrefix(rest, []byte("\r\n")) {
			return i + 1
		}
	}
	return -1
}

// addHost inserts the header lines after the request line, if it says HTTP/1.1 and
// none of the lines up to end is a Host.
func addHost(b []byte, end int) []byte {
	first, rest, _ := bytes.Cut(b[:end], []byte("\n"))
	if !bytes.HasSuffix(bytes.TrimRight(first, "\r"), []byte(" HTTP/1.1")) {
		return b
	}
	for line := range bytes.Lines(rest) {
		if len(line) >= 5 && bytes.EqualFold(line[:5], []byte("host:")) {
			return b
		}
	}
	const add = "Host: dstack\r\nConnection: close\r\n"
	at := len(first) + 1
	out := make([]byte, 0, len(b)+len(add))
	out = append(out, b[:at]...)
	out = append(out, add...)
	return append(out, b[at:]...)
}
