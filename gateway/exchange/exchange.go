// SPDX-License-Identifier: Apache-2.0

// Package exchange passes routes on among the gateways of a cluster, so that an instance
// that registered at one of them is reached through all.
//
// It needs no quorum and no order: a record is what one gateway appraised at a moment, the
// later moment wins, and what a member sends obeys the rules of a registration
// (route.Table.Merge); what does not is put aside there with its reason. Each member is told
// what it does not have, at once, and everything again after it or the way to it was gone.
//
// Trusted: the members, to have appraised what they pass on. Attacker-controlled: nothing
// beyond what a member is; a broken one is bounded by the rules of the table.
//
// Implements spec/gateway.md §5.5 B, C and E; threats.md K01, K02.
package exchange

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/internal/fault"
)

// Call is the name by which members send records.
const Call = "routes"

const (
	look   = 200 * time.Millisecond // between looks at the table
	beat   = 2 * time.Second        // between messages, so that a silent member is noticed
	first  = 500 * time.Millisecond // after a failure, doubling up to most
	most   = 5 * time.Second
	answer = 10 * time.Second
	batch  = 2048 // records
)

// Members are the others.
type Members interface {
	// Others returns their names.
	Others(ctx context.Context) ([]string, error)
	Call(ctx context.Context, member, name string, body []byte) ([]byte, error)
}

// Exchange passes the records of a table on. Make it with New.
type Exchange struct {
	table   *route.Table
	members Members
	applied func()
	log     *slog.Logger
	boot    string

	mu    sync.Mutex
	known map[string]*member
}

// member is what is known of another's table.
type member struct {
	mu   sync.Mutex
	boot string
	has  map[dstack.InstanceID]int64 // Unix milliseconds of the evidence
}

// New returns an exchange. applied is called after records of others came into the table.
func New(table *route.Table, members Members, applied func(), log *slog.Logger) *Exchange {
	b := make([]byte, 8)
	rand.Read(b)
	return &Exchange{table: table, members: members, applied: applied, log: log, boot: hex.EncodeToString(b), known: map[string]*member{}}
}

// Run tells the other members until ctx ends.
func (x *Exchange) Run(ctx context.Context) error {
	var loops sync.WaitGroup
	defer loops.Wait()
	running := map[string]context.CancelFunc{}
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		if names, err := x.members.Others(ctx); err == nil {
			for _, name := range names {
				if running[name] == nil {
					var own context.Context
					own, running[name] = context.WithCancel(ctx)
					loops.Go(func() { x.tell(own, name, x.member(name)) })
				}
			}
			for name, cancel := range running {
				if !slices.Contains(names, name) {
					cancel()
					delete(running, name)
					x.mu.Lock()
					delete(x.known, name)
					x.mu.Unlock()
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (x *Exchange) member(name string) *member {
	x.mu.Lock()
	defer x.mu.Unlock()
	m := x.known[name]
	if m == nil {
		m = &member{has: map[dstack.InstanceID]int64{}}
		x.known[name] = m
	}
	return m
}

// tell is the loop of one other member.
func (x *Exchange) tell(ctx context.Context, name string, m *member) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	var version uint64
	var last time.Time
	again := true // there may be more to tell
	wait := time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := x.table.Version()
		if time.Since(last) < wait || !again && now == version && time.Since(last) < beat {
			continue
		}
		last = time.Now()
		more, err := x.once(ctx, name, m)
		if err != nil {
			if wait == 0 && ctx.Err() == nil {
				x.log.Info("exchange: a gateway does not answer", "uuid", name, "code", fault.Code(err), "error", err)
			}
			wait, again = min(max(2*wait, first), most), true
			m.reset("")
			continue
		}
		version, again, wait = now, more, 0
	}
}

func (m *member) reset(boot string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.boot = boot
	clear(m.has)
}

// reply is what a member says to records.
type reply struct {
	Boot string `json:"boot"` // another after a restart
	Bad  int    `json:"bad"`
}

// once sends what the member does not have, up to a batch.
func (x *Exchange) once(ctx context.Context, name string, m *member) (more bool, err error) {
	var body []byte
	var sent []route.Record
	m.mu.Lock()
	for _, r := range x.table.Records() {
		if m.has[r.Instance] >= r.Attested.UnixMilli() {
			continue
		}
		if len(sent) == batch {
			more = true
			break
		}
		line, err := r.Line()
		if err != nil {
			m.mu.Unlock()
			return false, err
		}
		body, sent = append(body, line...), append(sent, r)
	}
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	text, err := x.members.Call(ctx, name, Call, body)
	if err != nil {
		return more, err
	}
	var r reply
	if err := strictjson.Decode(text, &r, strictjson.Limits{Size: 4 << 10, Depth: 2}); err != nil {
		return more, fault.Wrap(err, "exchange_reply", "a gateway's answer to routes")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.boot != r.Boot {
		m.boot = r.Boot
		clear(m.has)
		more = true // it has what was just sent, and may lack what was sent before
	}
	for _, s := range sent {
		m.has[s.Instance] = max(m.has[s.Instance], s.Attested.UnixMilli())
	}
	if len(m.has) > 2*len(sent)+2*x.table.Len() {
		x.trim(m)
	}
	return more, nil
}

// trim forgets instances that are gone.
func (x *Exchange) trim(m *member) {
	here := map[dstack.InstanceID]bool{}
	for _, r := range x.table.Records() {
		here[r.Instance] = true
	}
	for id := range m.has {
		if !here[id] {
			delete(m.has, id)
		}
	}
}

// Take applies what a member sent, and returns the answer to it.
func (x *Exchange) Take(from string, lines []byte) ([]byte, error) {
	before := x.table.Version()
	_, bad := x.table.Merge("gateway "+from, lines)
	if bad > 0 {
		x.log.Warn("exchange: records put aside", "from", from, "records", bad)
	}
	m := x.member(from)
	m.mu.Lock()
	for line := range bytes.SplitSeq(lines, []byte("\n")) {
		if r, err := route.ParseLine(line); err == nil && len(line) > 0 {
			m.has[r.Instance] = max(m.has[r.Instance], r.Attested.UnixMilli())
		}
	}
	m.mu.Unlock()
	if x.table.Version() != before && x.applied != nil {
		x.applied()
	}
	return json.Marshal(reply{Boot: x.boot, Bad: bad})
}
