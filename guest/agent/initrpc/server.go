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

	"github.com/dstack-go/dstack/internal/fault"
)

// writeTimeout bounds how long a peer that does not read can hold init up.
const writeTimeout = 30 * time.Second

// Serve answers the agent at the other end of conn until the connection ends
// (nil), the context ends, or the agent breaks the protocol. It closes conn and
// returns after the last handler has. onReady, which may be nil, is called at
// most once, when the agent says that it serves.
func Serve(ctx context.Context, conn net.Conn, init Init, onReady func()) error {
	ctx, cancel := context.WithCancel(ctx)
	s := &server{
		conn: conn, init: init, onReady: onReady,
		inFlight: make(map[uint64]context.CancelFunc),
		quoting:  make(chan struct{}, 1),
	}
	defer s.logs.closeAll()
	defer s.handlers.Wait()
	defer conn.Close()
	defer cancel()
	s.life = ctx
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	for {
		frame, err := readFrame(conn)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("read request of the agent: %w", err)
		}
		var req request
		if err := decodeStrict(frame, &req); err != nil {
			return fmt.Errorf("parse request of the agent: %w", err)
		}
		if err := s.dispatch(ctx, req); err != nil {
			return err
		}
	}
}

type server struct {
	conn     net.Conn
	init     Init
	onReady  func()
	quoting  chan struct{} // held while Init.Quote runs
	handlers sync.WaitGroup
	life     context.Context // ends with the connection
	logs     logDesk

	writing sync.Mutex // held while a frame is written

	mu       sync.Mutex
	inFlight map[uint64]context.CancelFunc
}

// dispatch starts one request. Its error means that the agent broke the protocol.
func (s *server) dispatch(ctx context.Context, req request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	cancel, busy := s.inFlight[req.ID]
	if req.Method == methodCancel {
		if busy {
			cancel()
		}
		return nil // a request may end while its cancellation is under way
	}
	if busy {
		return fmt.Errorf("agent used request id %d twice at a time", req.ID)
	}
	if len(s.inFlight) >= MaxInFlight {
		return fmt.Errorf("agent has more than %d requests in flight", MaxInFlight)
	}
	ctx, cancel = context.WithCancel(ctx)
	s.inFlight[req.ID] = cancel
	s.handlers.Go(func() {
		result, err := s.handle(ctx, req)
		s.mu.Lock()
		delete(s.inFlight, req.ID)
		s.mu.Unlock()
		cancel()
		s.reply(req.ID, result, err)
	})
	return nil
}

func (s *server) reply(id uint64, result any, err error) {
	resp := response{ID: id}
	if err == nil {
		resp.Result, err = json.Marshal(result)
		if err == nil && len(resp.Result) > MaxFrame-64 {
			err = fault.New("init_reply_too_large", "the reply has %d bytes, more than a frame carries", len(resp.Result))
		}
	}
	if err != nil {
		resp.Result, resp.Error = nil, toWire(err)
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	s.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err := writeFrame(s.conn, resp); err != nil {
		s.conn.Close() // half a frame may be out: nothing sensible can follow
	}
}

func (s *server) handle(ctx context.Context, req request) (any, error) {
	params := func(v any) error {
		if len(req.Params) == 0 {
			return fault.New("init_bad_request", "%s needs parameters", req.Method)
		}
		if err := decodeStrict(req.Params, v); err != nil {
			return fault.Wrap(err, "init_bad_request", "parse parameters of %s", req.Method)
		}
		return nil
	}
	switch req.Method {
	case methodQuote:
		var p quoteParams
		if err := params(&p); err != nil {
			return nil, err
		}
		select {
		case s.quoting <- struct{}{}:
			defer func() { <-s.quoting }()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		quote, err := s.init.Quote(ctx, p.ReportData)
		if err != nil {
			return nil, err
		}
		if len(quote) > MaxQuote {
			return nil, fault.New("init_reply_too_large", "the quote has %d bytes, allowed %d", len(quote), MaxQuote)
		}
		return quoteResult{Quote: quote}, nil

	case methodExtend:
		var p extendParams
		if err := params(&p); err != nil {
			return nil, err
		}
		switch {
		case p.Name == "" || len(p.Name) > MaxEventName:
			return nil, fault.New("event_name_length", "an event name has 1 to %d bytes, got %d", MaxEventName, len(p.Name))
		case len(p.Payload) > MaxPayload:
			return nil, fault.New("event_payload_too_large", "an event payload has at most %d bytes, got %d", MaxPayload, len(p.Payload))
		case Reserved(p.Name):
			return nil, fault.New("event_name_reserved", "the event name %q is reserved for the system", p.Name).
				WithFix("choose a name without a colon that does not begin with system- or dstack-")
		}
		event, err := s.init.Extend(ctx, p.Name, p.Payload)
		if err != nil {
			return nil, err
		}
		return extendResult{Event: event}, nil

	case methodContainers:
		list, err := s.init.Containers(ctx)
		if err != nil {
			return nil, err
		}
		if len(list) > MaxContainer {
			list = list[:MaxContainer]
		}
		return containersResult{Containers: list}, nil

	case methodShutdown:
		var p ShutdownRequest
		if err := params(&p); err != nil {
			return nil, err
		}
		return struct{}{}, s.init.Shutdown(ctx, p)

	case methodLease:
		var p LeaseChange
		if err := params(&p); err != nil {
			return nil, err
		}
		return struct{}{}, s.init.Lease(ctx, p)

	case methodTunnel:
		var p TunnelChange
		if err := params(&p); err != nil {
			return nil, err
		}
		if err := p.Check(); err != nil {
			return nil, err
		}
		return s.init.Tunnel(ctx, p)

	case methodStatus:
		return s.init.Status(ctx)

	case methodLogsOpen:
		var p LogsRequest
		if err := params(&p); err != nil {
			return nil, err
		}
		return s.logs.openStream(ctx, s.life, s.init, p)

	case methodLogsRead, methodLogsClose:
		var p logsParams
		if err := params(&p); err != nil {
			return nil, err
		}
		if req.Method == methodLogsRead {
			return s.logs.read(ctx, p.Stream)
		}
		s.logs.close(p.Stream)
		return struct{}{}, nil

	case methodReady:
		s.mu.Lock()
		ready := s.onReady
		s.onReady = nil
		s.mu.Unlock()
		if ready != nil {
			ready()
		}
		return struct{}{}, nil
	}
	return nil, fault.New("init_unknown_method", "init has no method %q", req.Method)
}
