// SPDX-License-Identifier: Apache-2.0

// Package qmp is a small client of the QEMU Machine Protocol (QEMU's
// docs/interop/qmp-spec.rst): greeting, capability negotiation, commands matched
// to replies by id, and events.
//
// Guarantees: a reply goes to the command whose id it carries and to no other;
// every waiting command ends when the connection does; memory stays bounded
// whatever the peer sends. The peer is half trusted: a guest may have taken over
// its QEMU, so a line longer than [MaxLine] or a malformed one ends the
// connection, and a flood of events drops the oldest.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// MaxLine is the longest accepted message in bytes; QEMU's longest here, the
// answer to query-machines, is below 64 KiB.
const MaxLine = 1 << 20

// maxEvents is how many unread events are kept.
const maxEvents = 64

// Version is QEMU's version as its greeting states it.
type Version struct{ Major, Minor, Micro int }

// Event is something that happened in QEMU, such as SHUTDOWN.
type Event struct {
	Name string
	Data json.RawMessage // may be empty
	Time time.Time       // QEMU's clock
}

// Error is QEMU's refusal of a command.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return e.Desc + " (" + e.Class + ")" }

// ErrClosed says that the connection has ended.
var ErrClosed = errors.New("QMP connection closed")

// Client is one connection. Its methods may be called by several goroutines.
type Client struct {
	conn    net.Conn
	version Version
	events  chan Event
	done    chan struct{}

	mu      sync.Mutex // guards what follows, and writes
	next    uint64
	waiting map[uint64]chan message
	err     error
}

type message struct {
	QMP *struct {
		Version struct {
			QEMU struct{ Major, Minor, Micro int }
		}
	} `json:"QMP"`
	ID        *uint64         `json:"id"`
	Return    json.RawMessage `json:"return"`
	Error     *Error          `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// Dial connects to the monitor at a unix socket and negotiates.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to QMP: %w", err)
	}
	return New(ctx, conn)
}

// New negotiates over conn, which it owns from then on: it closes conn on error.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{conn: conn, events: make(chan Event, maxEvents), done: make(chan struct{}), waiting: map[uint64]chan message{}}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, 4096)
	greeting, err := readMessage(r)
	if err == nil && greeting.QMP == nil {
		err = errors.New("first message is not a greeting")
	}
	if err != nil {
		stop()
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("QMP greeting: %w", err)
	}
	v := greeting.QMP.Version.QEMU
	c.version = Version{v.Major, v.Minor, v.Micro}
	go c.read(r)
	err = c.Execute(ctx, "qmp_capabilities", nil, nil)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("QMP negotiation: %w", err)
	}
	return c, nil
}

// Version returns the version that the greeting stated.
func (c *Client) Version() Version { return c.version }

// Events delivers events in order; when nobody reads, the oldest are dropped. It
// is closed when the connection ends.
func (c *Client) Events() <-chan Event { return c.events }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection and waits for the reader.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}

// Execute runs a command. args is marshalled as its arguments unless nil; result
// receives the returned value unless nil. It fails with *Error when QEMU refused.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	reply, id, err := c.send(ctx, command, args)
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case m := <-reply:
		if m.Error != nil {
			return fmt.Errorf("QMP %s: %w", command, m.Error)
		}
		if result != nil {
			if err := json.Unmarshal(m.Return, result); err != nil {
				return fmt.Errorf("QMP %s: reply: %w", command, err)
			}
		}
		return nil
	case <-c.done:
		err = c.failure()
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.mu.Lock()
	delete(c.waiting, id)
	c.mu.Unlock()
	return fmt.Errorf("QMP %s: %w", command, err)
}

func (c *Client) send(ctx context.Context, command string, args any) (chan message, uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, 0, c.err
	}
	c.next++
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, c.next})
	if err != nil {
		return nil, 0, err
	}
	// A monitor that does not read must not hold the lock for ever.
	limit := time.Now().Add(10 * time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(limit) {
		limit = d
	}
	c.conn.SetWriteDeadline(limit)
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		return nil, 0, err
	}
	reply := make(chan message, 1)
	c.waiting[c.next] = reply
	return reply, c.next, nil
}

func (c *Client) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Client) read(r *bufio.Reader) {
	var err error
	for err == nil {
		var m message
		if m, err = readMessage(r); err == nil {
			err = c.dispatch(m)
		}
	}
	c.conn.Close()
	c.mu.Lock()
	c.err = fmt.Errorf("%w: %w", ErrClosed, err)
	c.mu.Unlock()
	close(c.events)
	close(c.done)
}

func (c *Client) dispatch(m message) error {
	switch {
	case m.Event != "":
		e := Event{m.Event, m.Data, time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)}
		for {
			select {
			case c.events <- e:
				return nil
			default:
			}
			select {
			case <-c.events:
			default:
			}
		}
	case m.Return != nil || m.Error != nil:
		if m.ID == nil {
			// QEMU answers so when it could not parse a command.
			return fmt.Errorf("reply without id: %v", m.Error)
		}
		c.mu.Lock()
		reply := c.waiting[*m.ID]
		delete(c.waiting, *m.ID)
		c.mu.Unlock()
		if reply != nil {
			reply <- m
		}
	}
	return nil
}

func readMessage(r *bufio.Reader) (message, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > MaxLine {
			return message{}, fmt.Errorf("message longer than %d bytes", MaxLine)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return message{}, err
		}
	}
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("malformed message: %w", err)
	}
	return m, nil
}
