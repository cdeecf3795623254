// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"
)

// serveHTTP serves HTTP/1.1 on one connection until it ends.
func serveHTTP(ctx context.Context, c net.Conn, h http.Handler) {
	l := &single{addr: c.LocalAddr(), conn: make(chan net.Conn, 1), done: make(chan struct{})}
	l.conn <- &counted{Conn: c, closed: l.end}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 30 * time.Second, WriteTimeout: 90 * time.Second, MaxHeaderBytes: 16 << 10,
		ErrorLog: log.New(io.Discard, "", 0), BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	srv.Serve(l)
}

// single is a listener of one connection, which ends with it.
type single struct {
	addr net.Addr
	conn chan net.Conn
	done chan struct{}
	once sync.Once
}

func (l *single) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *single) end()           { l.once.Do(func() { close(l.done) }) }
func (l *single) Close() error   { l.end(); return nil }
func (l *single) Addr() net.Addr { return l.addr }

type counted struct {
	net.Conn
	closed func()
}

func (c *counted) Close() error {
	defer c.closed()
	return c.Conn.Close()
}
