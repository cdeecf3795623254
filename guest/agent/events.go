// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	agentpb "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of what apps add to the event log, which every piece of evidence carries,
// the ones in TLS certificates included.
const (
	maxAppEvents     = 256
	maxAppEventBytes = 32 << 10 // names and payloads together
	extendTimeout    = 2 * time.Minute
)

// state is what changes while the agent runs: the log, and Info, which tells it.
// One state is never changed; the next takes its place.
type state struct {
	events []eventlog.Event
	info   *info

	appEvents, appBytes int // what apps added
}

// firstState is the state of a log that has no changes yet. Apps may have added to
// it before an agent that init started again.
func (a *Agent) firstState(events []eventlog.Event) (*state, error) {
	s := &state{events: events}
	var err error
	s.info, err = a.makeInfo(events)
	ready := false
	for _, e := range eventlog.Runtime(events) {
		if ready {
			s.appEvents++
			s.appBytes += len(e.Name) + len(e.Payload)
		}
		ready = ready || e.Name == eventlog.SystemReady
	}
	return s, err
}

// renewInfo tells Info of a change other than to the log.
func (a *Agent) renewInfo() error {
	a.extending.Lock()
	defer a.extending.Unlock()
	next := *a.state.Load()
	var err error
	if next.info, err = a.makeInfo(next.events); err == nil {
		a.state.Store(&next)
	}
	return err
}

// quote asks init for evidence over data. The log in it is the one that the
// register had when the quote was taken: no event comes in between.
func (a *Agent) quote(ctx context.Context, data dstack.ReportData) (*attest.Evidence, error) {
	a.extending.RLock()
	defer a.extending.RUnlock()
	if a.logLost {
		return nil, logLost()
	}
	raw, err := a.init.Quote(ctx, data)
	if err != nil {
		return nil, err
	}
	return &attest.Evidence{TEE: a.tee, Quote: raw, EventLog: a.state.Load().events, Config: a.evidenceConfig, ReportData: data}, nil
}

func logLost() error {
	return fault.New("event_log_lost", "an event may or may not be in the runtime register, so that no evidence can be explained").
		WithFix("restart the VM")
}

// emitEvent extends the runtime register by an event of the app's own and appends
// it to the log (guest-agent.md §16.3; upstream removed the method from 0.6). Names
// by which the system commits its identity are refused here and by init
// (threats.md B09).
func (a *Agent) emitEvent(ctx context.Context, req *agentpb.EmitEventArgs) (*emptypb.Empty, error) {
	switch {
	case a.tee != dstack.TDX:
		return nil, fault.New("events_unsupported", "a %s has no runtime register that an event could extend", a.tee)
	case req.Event == "" || len(req.Event) > initrpc.MaxEventName:
		return nil, fault.New("event_name_length", "an event name has 1 to %d bytes, got %d", initrpc.MaxEventName, len(req.Event))
	case initrpc.Reserved(req.Event):
		return nil, fault.New("event_name_reserved", "the event name %q is reserved for the system", req.Event).
			WithFix("choose a name without a colon that does not begin with system- or dstack-")
	}
	a.extending.Lock()
	defer a.extending.Unlock()
	old := a.state.Load()
	next := &state{appEvents: old.appEvents + 1, appBytes: old.appBytes + len(req.Event) + len(req.Payload)}
	if a.logLost {
		return nil, logLost()
	}
	if next.appEvents > maxAppEvents || next.appBytes > maxAppEventBytes {
		return nil, fault.New("event_log_full", "apps may add %d events of %d bytes altogether", maxAppEvents, maxAppEventBytes)
	}
	// The caller may go away; whether the register was extended must be known.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), extendTimeout)
	defer cancel()
	event, err := a.init.Extend(ctx, req.Event, req.Payload)
	if err != nil {
		switch fault.Code(err) {
		case "event_name_reserved", "event_name_length", "event_payload_too_large", "log_full":
			return nil, err // refused before anything was extended
		}
		a.logLost = true
		a.log.Error("extend the runtime register", "error", err)
		return nil, err
	}
	next.events = append(slices.Clone(old.events), event)
	if next.info, err = a.makeInfo(next.events); err != nil {
		a.logLost = true
		return nil, fmt.Errorf("describe the event log after %s: %w", req.Event, err)
	}
	a.state.Store(next)
	return nil, nil
}
