// SPDX-License-Identifier: Apache-2.0

package initrpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// closeTimeout bounds how long the end of a stream is waited for.
const closeTimeout = 5 * time.Second

// Client is the agent's side. Its methods may be called concurrently; each
// returns when init has answered, the context has ended (init is told) or the
// connection has.
type Client struct {
	conn net.Conn
	slot chan struct{} // keeps requests in flight below init's limit
	done chan struct{}

	writing sync.Mutex

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan response
	err     error // why the connection ended
}

// NewClient starts a client on conn, which it owns.
func NewClient(conn net.Conn) *Client {
	c := &Client{
		conn:    conn,
		slot:    make(chan struct{}, MaxInFlight/2),
		done:    make(chan struct{}),
		waiting: make(map[uint64]chan response),
	}
	go c.read()
	return c
}

// Close ends the connection and waits for the reader to end.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}

// Done is closed when the connection has ended; an agent without init exits.
func (c *Client) Done() <-chan struct{} { return c.done }

func (c *Client) read() {
	defer close(c.done)
	for {
		var resp response
		frame, err := readFrame(c.conn)
		if err == nil {
			err = decodeStrict(frame, &resp)
		}
		c.mu.Lock()
		if err != nil {
			c.err = err
			clear(c.waiting)
			c.mu.Unlock()
			c.conn.Close()
			return
		}
		if ch := c.waiting[resp.ID]; ch != nil {
			delete(c.waiting, resp.ID)
			ch <- resp // buffered; never blocks
		}
		c.mu.Unlock()
	}
}

func (c *Client) gone() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fault.Wrap(c.err, "init_gone", "init closed the connection")
}

func (c *Client) call(ctx context.Context, method string, params, result any) error {
	release := func() { <-c.slot }
	defer func() { release() }()
	select {
	case c.slot <- struct{}{}:
	case <-ctx.Done():
		release = func() {}
		return fmt.Errorf("init: %s: %w", method, ctx.Err())
	case <-c.done:
		release = func() {}
		return c.gone()
	}
	req := request{Method: method}
	if params != nil {
		var err error
		if req.Params, err = json.Marshal(params); err != nil {
			return err
		}
	}
	answer := make(chan response, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.gone()
	}
	c.next++
	req.ID = c.next
	c.waiting[req.ID] = answer
	c.mu.Unlock()

	if err := c.write(req); err != nil {
		c.mu.Lock()
		delete(c.waiting, req.ID)
		c.mu.Unlock()
		if errors.Is(err, errFrameSize) {
			return fmt.Errorf("init: %s: %w", method, err)
		}
		c.conn.Close()
		return fault.Wrap(err, "init_gone", "write request %s to init", method)
	}
	select {
	case resp := <-answer:
		return c.finish(method, resp, result)
	case <-c.done:
		select { // the answer may have come just before the end
		case resp := <-answer:
			return c.finish(method, resp, result)
		default:
		}
		return c.gone()
	case <-ctx.Done():
		if err := c.write(request{ID: req.ID, Method: methodCancel}); err != nil {
			c.conn.Close()
		}
		// The slot stays taken until init has answered: otherwise cancelled
		// requests would pile up beyond what init accepts. The caller does not
		// wait for that.
		release = func() {
			go func() {
				select {
				case <-answer:
				case <-c.done:
				}
				<-c.slot
			}()
		}
		return fmt.Errorf("init: %s: %w", method, ctx.Err())
	}
}

func (c *Client) finish(method string, resp response, result any) error {
	if resp.Error != nil {
		return resp.Error.err(method)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(resp.Result, result); err != nil {
		return fmt.Errorf("init: parse result of %s: %w", method, err)
	}
	return nil
}

func (c *Client) write(req request) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	return writeFrame(c.conn, req)
}

// Quote asks for hardware evidence over the 64 bytes of data.
func (c *Client) Quote(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	var r quoteResult
	err := c.call(ctx, methodQuote, quoteParams{ReportData: data}, &r)
	return r.Quote, err
}

// Extend asks for one application event; see [Init].
func (c *Client) Extend(ctx context.Context, name string, payload []byte) (eventlog.Event, error) {
	var r extendResult
	err := c.call(ctx, methodExtend, extendParams{Name: name, Payload: payload}, &r)
	return r.Event, err
}

// Containers asks for all containers.
func (c *Client) Containers(ctx context.Context) ([]Container, error) {
	var r containersResult
	err := c.call(ctx, methodContainers, nil, &r)
	return r.Containers, err
}

// Shutdown asks init to power off.
func (c *Client) Shutdown(ctx context.Context, request ShutdownRequest) error {
	return c.call(ctx, methodShutdown, request, nil)
}

// Lease tells init what became of the lease.
func (c *Client) Lease(ctx context.Context, change LeaseChange) error {
	return c.call(ctx, methodLease, change, nil)
}

// Tunnel changes the tunnel, or asks how it is; see [Init].
func (c *Client) Tunnel(ctx context.Context, change TunnelChange) (TunnelStatus, error) {
	var r TunnelStatus
	err := c.call(ctx, methodTunnel, change, &r)
	return r, err
}

// Status asks how far boot has come.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var r Status
	err := c.call(ctx, methodStatus, nil, &r)
	return r, err
}

// Logs opens a container's output. The stream's Close must be called; a Read waits
// for the container, and ends early with the error of ctx when that ends.
func (c *Client) Logs(ctx context.Context, request LogsRequest) (Logs, error) {
	var r logsOpenResult
	if err := c.call(ctx, methodLogsOpen, request, &r); err != nil {
		return Logs{}, err
	}
	return Logs{Framed: r.Framed, Stream: &logStream{client: c, ctx: ctx, id: r.Stream}}, nil
}

// logStream reads one stream of init's. It is used by one goroutine at a time.
type logStream struct {
	client *Client
	ctx    context.Context
	id     uint64
	data   []byte
	end    bool
}

func (s *logStream) Read(b []byte) (int, error) {
	for len(s.data) == 0 {
		if s.end {
			return 0, io.EOF
		}
		var r logsReadResult
		if err := s.client.call(s.ctx, methodLogsRead, logsParams{s.id}, &r); err != nil {
			return 0, err
		}
		s.data, s.end = r.Data, r.End
	}
	n := copy(b, s.data)
	s.data = s.data[n:]
	return n, nil
}

func (s *logStream) Close() error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), closeTimeout)
	defer cancel()
	return s.client.call(ctx, methodLogsClose, logsParams{s.id}, nil)
}

// Ready tells init that the agent serves all its listeners.
func (c *Client) Ready(ctx context.Context) error {
	return c.call(ctx, methodReady, nil, nil)
}
