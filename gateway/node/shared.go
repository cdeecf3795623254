// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/internal/fault"
)

// Records of what gateways of a cluster share beside settings.
const (
	sharedPrefix = "shared/"
	ticketsKey   = sharedPrefix + "tickets"
	caKey        = sharedPrefix + "private-ca"

	// ticketTurn is how long a ticket key makes tickets. Two more are kept for those that
	// clients have; older ones go, and with them what was recorded under TLS 1.2.
	ticketTurn  = 12 * time.Hour
	ticketsKept = 3
	maxShared   = 16 << 10 // bytes
)

// shared are session ticket keys, so that a session of one gateway resumes at another, and
// the private CA where no public one certifies: clients trust one.
type shared struct {
	n     *Node
	store settings.Store
	now   func() time.Time
	keys  atomic.Pointer[[][32]byte]
}

func (n *Node) newShared(store settings.Store) *shared {
	return &shared{n: n, store: store, now: time.Now}
}

// ticketRecord has the keys, the one that makes tickets first.
type ticketRecord struct {
	Keys []ticketKey `json:"keys"`
}

type ticketKey struct {
	Key  string `json:"key"`  // 64 hexadecimal digits
	From int64  `json:"from"` // Unix seconds
}

// caRecord is the private CA; PEM.
type caRecord struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

// tickets are the keys, none as long as the gateways have not agreed on any.
func (s *shared) tickets() [][32]byte {
	if k := s.keys.Load(); k != nil {
		return *k
	}
	return nil
}

// run follows the records until ctx ends, and makes those that are due. What fails is tried
// again: until then the gateway goes on with what it has.
func (s *shared) run(ctx context.Context) error {
	due := make(chan struct{}, 1)
	go s.store.Watch(ctx, sharedPrefix, func() {
		select {
		case due <- struct{}{}:
		default:
		}
	})
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-due:
		case <-tick.C:
		}
		for what, do := range map[string]func(context.Context) error{"session tickets": s.turn, "private CA": s.agree} {
			if err := do(ctx); err != nil && ctx.Err() == nil && fault.Code(err) != "state_conflict" {
				s.n.log.Info("cluster: "+what, "code", fault.Code(err), "error", err)
			}
		}
	}
}

// record reads one; the revision is 0 when there is none.
func (s *shared) record(ctx context.Context, key string, into any) (int64, error) {
	e, err := s.store.Get(ctx, key)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer clear(e.Value)
	if err := strictjson.Decode(e.Value, into, strictjson.Limits{Size: maxShared, Depth: 4}); err != nil {
		return 0, fault.Wrap(err, "shared_record", "the record %s", key)
	}
	return e.Revision, nil
}

func (s *shared) put(ctx context.Context, key string, record any, at int64) error {
	text, err := json.Marshal(record)
	if err != nil {
		return err
	}
	defer clear(text)
	return s.store.Put(ctx, key, text, at)
}

// turn takes the ticket keys, and makes a new one when the first is old.
func (s *shared) turn(ctx context.Context) error {
	var r ticketRecord
	at, err := s.record(ctx, ticketsKey, &r)
	if err != nil {
		return err
	}
	var keys [][32]byte
	for _, k := range r.Keys {
		b, err := hex.DecodeString(k.Key)
		if err != nil || len(b) != 32 || len(keys) == ticketsKept {
			return fault.New("shared_record", "the record %s has %d keys, or one that is none", ticketsKey, len(r.Keys))
		}
		keys = append(keys, [32]byte(b))
	}
	if len(keys) > 0 {
		s.keys.Store(&keys)
		if s.now().Before(time.Unix(r.Keys[0].From, 0).Add(ticketTurn)) {
			return nil
		}
	}
	fresh := make([]byte, 32)
	rand.Read(fresh)
	r.Keys = append([]ticketKey{{hex.EncodeToString(fresh), s.now().Unix()}}, r.Keys[:min(len(r.Keys), ticketsKept-1)]...)
	return s.put(ctx, ticketsKey, r, at)
}

// agree takes the cluster's private CA, or gives it this gateway's where it has none.
func (s *shared) agree(ctx context.Context) error {
	var r caRecord
	at, err := s.record(ctx, caKey, &r)
	if err != nil {
		return err
	}
	if at == 0 {
		cert, key, err := s.n.ca.Export()
		if err != nil {
			return err
		}
		defer clear(key)
		return s.put(ctx, caKey, caRecord{string(cert), string(key)}, 0)
	}
	return s.n.ca.Adopt([]byte(r.Cert), []byte(r.Key))
}
