// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/proxyproto"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// target is one instance and how it is to be reached.
type target struct {
	route *route.Route // nil for the loopback of development
	id    dstack.InstanceID
	addr  netip.AddrPort
	proxy bool
}

// plan is where a connection may go, best first. All targets have one mode.
type plan struct {
	mode    hostname.Mode
	targets []target
}

// plan decides over an app's candidates, each by its own policy: instances of one app can
// run different versions of it. The first that is admitted fixes who ends TLS.
func (e *Edge) plan(d hostname.Destination) (plan, error) {
	id, ok := d.ID.Bytes()
	if !ok {
		e.stats.noName.Add(1)
		return plan{}, fault.New("edge_unknown_id", "the host name's id is no app id or instance id")
	}
	var array [route.MaxSelect]*route.Route
	routes, err := e.cfg.Routes.Select(array[:0], id, route.MaxSelect)
	if err != nil {
		if fault.Code(err) == "route_unknown" {
			e.stats.noName.Add(1)
		}
		return plan{}, err
	}
	var (
		p        plan
		refusal  error
		decision portpolicy.Decision
	)
	for _, r := range routes {
		rec := r.Record()
		var operator *portpolicy.Policy
		if e.cfg.Operator != nil {
			operator = e.cfg.Operator(rec.Instance)
		}
		got, err := portpolicy.Decide(rec.Policy, operator, portpolicy.Request{Port: d.Port, Form: d.Mode})
		if err != nil {
			refusal = err
			continue
		}
		if len(p.targets) == 0 {
			decision = got
		} else if got.Mode != decision.Mode || got.Reason != decision.Reason {
			continue
		}
		t := target{route: r, id: rec.Instance, addr: netip.AddrPortFrom(rec.Address, d.Port), proxy: got.PROXY}
		own := d.Kind == hostname.Custom && rec.Leads(route.Domain{Name: d.Name, Port: d.Port})
		if got.Reason == portpolicy.ByApp && (d.Mode != hostname.Passthrough || own) {
			// The name asks for an end of TLS that the gateway may not be, or is a domain
			// that the manifest lists: the guest's agent is that end, and is told the
			// client whatever the port's policy says.
			t.addr, t.proxy = netip.AddrPortFrom(rec.Address, manifest.TLSPort), true
		}
		p.targets = append(p.targets, t)
	}
	if len(p.targets) == 0 {
		return plan{}, refusal
	}
	p.mode = decision.Mode
	e.health.sort(p.targets, time.Now())
	return p, nil
}

// health remembers which instances could not be reached lately.
type health struct {
	mu     sync.Mutex
	failed map[dstack.InstanceID]time.Time // until when it goes last
}

func (h *health) fail(id dstack.InstanceID, until time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.failed == nil {
		h.failed = map[dstack.InstanceID]time.Time{}
	}
	h.failed[id] = until
}

func (h *health) succeed(id dstack.InstanceID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.failed, id)
}

// sort moves the failed behind the others.
func (h *health) sort(ts []target, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.failed) == 0 || len(ts) < 2 {
		return
	}
	late := func(t target) int {
		if now.Before(h.failed[t.id]) {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(ts, func(a, b target) int { return late(a) - late(b) })
}

func (h *health) sweep(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, until := range h.failed {
		if !now.Before(until) {
			delete(h.failed, id)
		}
	}
}

// dialled is the outcome of one dial.
type dialled struct {
	target target
	conn   net.Conn
	err    error
}

// dial tries the targets in order, each next one when the one before failed or has not
// answered for a while. The first that answers is it; nothing of the client's has been sent
// to any. The target returned has been begun in its route. Codes of [route.Route.Begin],
// edge_dial (no target can be reached).
func (e *Edge) dial(parent context.Context, targets []target) (target, net.Conn, error) {
	ctx, cancel := context.WithTimeout(parent, e.adjusted().Timeouts.Connect)
	defer cancel()
	if len(targets) == 1 {
		d := e.dialOne(ctx, targets[0])
		return d.target, d.conn, d.err
	}
	var (
		results = make(chan dialled)
		next    = time.NewTimer(0)
		last    error
		done    = make(chan struct{})
	)
	defer close(done)
	defer next.Stop()
	for waiting, left := 0, targets; waiting > 0 || len(left) > 0; {
		select {
		case <-next.C:
			if len(left) == 0 {
				continue
			}
			t := left[0]
			left = left[1:]
			waiting++
			e.work.Go(func() {
				d := e.dialOne(ctx, t)
				select {
				case results <- d:
				case <-done:
					if d.err == nil {
						d.conn.Close()
						endRoute(d.target)
					}
				}
			})
			next.Reset(e.adjusted().Timeouts.Stagger)
		case d := <-results:
			if d.err == nil {
				return d.target, d.conn, nil
			}
			waiting--
			last = d.err
			next.Reset(0)
		}
	}
	return target{}, nil, last
}

func (e *Edge) dialOne(ctx context.Context, t target) dialled {
	if t.route != nil {
		if err := t.route.Begin(); err != nil {
			return dialled{err: err}
		}
	}
	start := time.Now()
	conn, err := e.cfg.Dial(ctx, t.addr)
	if err != nil {
		endRoute(t)
		// A dial that lost the race was ended by us and says nothing of the instance.
		if ctx.Err() != context.Canceled {
			e.stats.dialFailed.Add(1)
			e.health.fail(t.id, time.Now().Add(e.adjusted().Timeouts.Health))
		}
		return dialled{err: fault.Wrap(err, "edge_dial", "reach instance %s at port %d", t.id, t.addr.Port())}
	}
	e.stats.dial.observe(time.Since(start))
	e.health.succeed(t.id)
	return dialled{target: t, conn: conn}
}

func endRoute(t target) {
	if t.route != nil {
		t.route.End()
	}
}

// connect carries out a plan: TLS first, where it ends here, so that nobody costs an app a
// connection who cannot shake hands.
func (e *Edge) connect(o *opening, p plan) (*relay, error) {
	client := o.conn
	if p.mode != hostname.Passthrough {
		c, err := e.terminate(o, p.mode)
		if err != nil {
			return nil, err
		}
		client = c
	}
	t, conn, err := e.dial(e.ctx, p.targets)
	if err != nil {
		if p.mode != hostname.Passthrough {
			err = &toldError{err}
		}
		return nil, err
	}
	if err := e.greet(o, t, conn, p.mode); err != nil {
		conn.Close()
		endRoute(t)
		if p.mode != hostname.Passthrough {
			err = &toldError{err}
		}
		return nil, err
	}
	return e.newRelay(o, p.mode, client, t, conn), nil
}

// freeWrite is what a new socket takes without waiting (tcp_wmem).
const freeWrite = 4 << 10

// greet sends what precedes the relay: the PROXY header and the hello, in one write.
func (e *Edge) greet(o *opening, t target, conn net.Conn, mode hostname.Mode) error {
	var first []byte
	if mode == hostname.Passthrough {
		first = o.raw
	}
	if t.proxy {
		h := proxyproto.Header{Version: 2, Source: o.client, Destination: o.local}
		if !h.Source.IsValid() || !h.Destination.IsValid() {
			h = proxyproto.Header{Version: 2}
		}
		head, err := h.Bytes()
		if err != nil {
			return err
		}
		first = append(head, first...)
	}
	if len(first) == 0 {
		return nil
	}
	if len(first) > freeWrite {
		conn.SetWriteDeadline(time.Now().Add(e.adjusted().Timeouts.Connect))
		defer conn.SetWriteDeadline(time.Time{})
	}
	if _, err := conn.Write(first); err != nil {
		return fault.Wrap(err, "edge_dial", "send the first bytes to instance %s", t.id)
	}
	if mode == hostname.Passthrough {
		e.stats.up.Add(uint64(len(o.raw)))
	}
	return nil
}
