// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack/api/hostapi"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/guest/disk"
	"github.com/dstack-go/dstack/guest/engine"
	"github.com/dstack-go/dstack/manifest/lint"
	"github.com/dstack-go/dstack/prpc"
)

// Main is PID 1. It does not return.
func Main(opt Options) {
	m := newMachine(opt)
	// The kernel passes unknown words of its command line on as environment; none
	// of it is for us or for what we start.
	os.Clearenv()
	go m.sup.Reap(context.Background())
	m.signals()
	m.boot()
}

func newMachine(opt Options) *Machine {
	m := &Machine{
		opt: opt, console: &console{w: os.Stderr}, sup: supervise.New(),
		finder: disk.NewFinder(), mapper: disk.NewMapper(), shutdowns: make(chan string, 1), linkTried: make(chan struct{}), remembers: systemDir,
	}
	m.host = newHost(m.sendHost())
	return m
}

// boot runs the phases, then waits for the end.
func (m *Machine) boot() {
	begin := time.Now()
	ctx, cancel := context.WithCancel(context.Background())
	type result struct {
		timings []Timing
		failure *Failure
	}
	over := make(chan result, 1)
	go func() {
		r := &Runner{
			Log:      func(line string) { m.console.Log(line) },
			Progress: func(value string) { m.host.Notify(eventProgress, value) },
			Enter:    m.enter,
			Now:      time.Now,
		}
		timings, failure := r.Run(ctx, m.Phases())
		over <- result{timings, failure}
	}()
	select {
	case r := <-over:
		if r.failure != nil {
			m.statusMu.Lock()
			m.status.Failed = r.failure.String()
			m.statusMu.Unlock()
			m.fail(r.failure)
		}
		if text, err := json.Marshal(r.timings); err == nil {
			m.host.Notify(eventTimings, string(text))
		}
		m.console.Log(fmt.Sprintf("booted in %dms", time.Since(begin).Milliseconds()))
	case reason := <-m.shutdowns:
		// A shutdown during boot ends the phase under way, too.
		cancel()
		m.shutdown(reason)
	}
	reason := <-m.shutdowns
	cancel()
	m.shutdown(reason)
}

func (m *Machine) enter(phase string) {
	m.statusMu.Lock()
	m.status = initrpc.Status{Phase: phase}
	m.statusMu.Unlock()
}

func (m *Machine) runningEngine() *engine.Engine {
	m.statusMu.Lock()
	defer m.statusMu.Unlock()
	return m.engine
}

// hostAPI returns a client of HostApi, over hostlink.
func (m *Machine) hostAPI() *prpc.Client {
	return prpc.NewClient("http://host/api", func(ctx context.Context) (net.Conn, error) { return m.dial(ctx, "hostapi") })
}

// sendHost returns the caller of HostApi.Notify.
func (m *Machine) sendHost() func(ctx context.Context, event, payload string) error {
	client := m.hostAPI()
	return func(ctx context.Context, event, payload string) error {
		// What happens before there is a link is told once there is one.
		select {
		case <-m.linkTried:
		case <-ctx.Done():
			return ctx.Err()
		}
		return client.Call(ctx, "Notify", &hostapi.Notification{Event: event, Payload: payload}, &emptypb.Empty{})
	}
}

// composeImages lists the image references of a compose file as written.
func composeImages(text string) ([]string, error) {
	c, err := lint.Load([]byte(text), "docker-compose.yaml")
	if err != nil {
		return nil, err
	}
	return c.Images, nil
}
