// SPDX-License-Identifier: Apache-2.0

package initrpc

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// logsIdle is how long a stream stays open that nobody reads.
const logsIdle = time.Minute

// logDesk keeps the open streams of one agent.
type logDesk struct {
	mu      sync.Mutex
	next    uint64
	open    int // streams, and those being opened
	streams map[uint64]*openLogs
}

type openLogs struct {
	stream  io.ReadCloser
	cancel  context.CancelFunc // ends what init does for it
	idle    *time.Timer
	reading bool
}

// openStream answers logs-open. The stream lives as long as life, the connection,
// not as the request.
func (d *logDesk) openStream(ctx, life context.Context, init Init, req LogsRequest) (any, error) {
	if req.Container == "" || len(req.Container) > maxLogName || strings.ContainsAny(req.Container, "/?#%\\ \x00") {
		return nil, fault.New("container_unknown", "there is no container of that name")
	}
	d.mu.Lock()
	if d.open >= MaxLogs {
		d.mu.Unlock()
		return nil, fault.New("logs_busy", "%d streams of logs are open already", MaxLogs).WithFix("close one, or try again later")
	}
	d.open++
	d.mu.Unlock()

	life, cancel := context.WithCancel(life)
	stop := context.AfterFunc(ctx, cancel)
	logs, err := init.Logs(life, req)
	if !stop() && err == nil { // the agent gave up
		logs.Stream.Close()
		err = ctx.Err()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.open--
		cancel()
		return nil, err
	}
	d.next++
	id := d.next
	if d.streams == nil {
		d.streams = make(map[uint64]*openLogs)
	}
	d.streams[id] = &openLogs{stream: logs.Stream, cancel: cancel, idle: time.AfterFunc(logsIdle, func() { d.close(id) })}
	return logsOpenResult{Stream: id, Framed: logs.Framed}, nil
}

// read answers logs-read; a request that is cancelled ends the stream.
func (d *logDesk) read(ctx context.Context, id uint64) (any, error) {
	d.mu.Lock()
	s := d.streams[id]
	if s == nil || s.reading {
		d.mu.Unlock()
		return nil, fault.New("logs_closed", "the stream of logs is closed, or read already")
	}
	s.reading = true
	s.idle.Stop()
	d.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { d.close(id) })
	buf := make([]byte, maxLogRead)
	n, err := s.stream.Read(buf)
	cancelled := !stop()
	d.mu.Lock()
	s.reading = false
	if d.streams[id] == s {
		s.idle.Reset(logsIdle)
	}
	d.mu.Unlock()
	switch {
	case cancelled:
		return nil, ctx.Err()
	case errors.Is(err, io.EOF):
		return logsReadResult{Data: buf[:n], End: true}, nil
	case err != nil && n == 0:
		return nil, err
	}
	return logsReadResult{Data: buf[:n]}, nil
}

func (d *logDesk) close(id uint64) {
	d.mu.Lock()
	s := d.streams[id]
	if s != nil {
		delete(d.streams, id)
		d.open--
		s.idle.Stop()
	}
	d.mu.Unlock()
	if s != nil {
		s.cancel()
		s.stream.Close()
	}
}

// closeAll ends every stream; no new ones come.
func (d *logDesk) closeAll() {
	d.mu.Lock()
	var ids []uint64
	for id := range d.streams {
		ids = append(ids, id)
	}
	d.mu.Unlock()
	for _, id := range ids {
		d.close(id)
	}
}
