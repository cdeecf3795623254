// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"

	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/internal/fault"
)

// Where things lie in etcd. settings.Store has all below own, so that no setting is a
// certificate or a lock.
const (
	ownPrefix   = "own/"
	filesPrefix = "acme/"
	locksPrefix = "lock/"

	anyRevision = settings.Any
	// patience is how long a change may wait for a quorum, where the caller has no less.
	patience = 5 * time.Second
	// session is how long, in seconds, a lock outlives the member that holds it.
	session = 60
	maxKey  = 512
)

// sealed makes the stored form of a value: a version byte, a nonce of 12 bytes, and under
// AES-256-GCM, bound to the key, Unix milliseconds as u64 big-endian and the value.
func (c *Cluster) sealed(key string, value []byte) []byte {
	out := make([]byte, 1+12, 1+12+8+len(value)+16)
	out[0] = 1
	rand.Read(out[1:13])
	plain := append(binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixMilli())), value...)
	defer clear(plain)
	return c.seal.Seal(out, out[1:13], plain, []byte(key))
}

// open is the inverse of sealed. Code cluster_record.
func (c *Cluster) open(key string, stored []byte) (value []byte, modified time.Time, err error) {
	if len(stored) < 1+12+8+16 || stored[0] != 1 {
		return nil, modified, fault.New("cluster_record", "the record %s has no known form", key)
	}
	plain, err := c.seal.Open(nil, stored[1:13], stored[13:], []byte(key))
	if err != nil {
		return nil, modified, fault.New("cluster_record", "the record %s was not sealed by this cluster, or is another's", key)
	}
	return plain[8:], time.UnixMilli(int64(binary.BigEndian.Uint64(plain))), nil
}

func absent(key string) error { return fmt.Errorf("record %s: %w", key, fs.ErrNotExist) }

// quorum names the reason why a change was not made.
func quorum(err error) error {
	return fault.Wrap(err, "state_quorum", "the cluster did not agree in time").
		WithFix("a majority of its gateways must be up; what is served needs none")
}

// Get implements settings.Store.
func (c *Cluster) Get(ctx context.Context, key string) (settings.Entry, error) {
	r, err := c.server.get(ctx, ownPrefix+key, clientv3.WithSerializable())
	if err != nil {
		return settings.Entry{}, err
	}
	if len(r.Kvs) == 0 {
		return settings.Entry{}, absent(key)
	}
	v, _, err := c.open(ownPrefix+key, r.Kvs[0].Value)
	return settings.Entry{Key: key, Value: v, Revision: r.Kvs[0].ModRevision}, err
}

// List implements settings.Store. A record that was not sealed by this cluster is left out
// and told to the log: the others beside it count (threats.md K02).
func (c *Cluster) List(ctx context.Context, prefix string) ([]settings.Entry, error) {
	r, err := c.server.get(ctx, ownPrefix+prefix, clientv3.WithPrefix(), clientv3.WithSerializable(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortAscend))
	if err != nil {
		return nil, err
	}
	var out []settings.Entry
	for _, kv := range r.Kvs {
		v, _, err := c.open(string(kv.Key), kv.Value)
		if err != nil {
			c.log.Error("cluster: record left out", "key", string(kv.Key), "code", fault.Code(err), "error", err)
			continue
		}
		out = append(out, settings.Entry{Key: strings.TrimPrefix(string(kv.Key), ownPrefix), Value: v, Revision: kv.ModRevision})
	}
	return out, nil
}

// at is the condition that a record is at a revision.
func at(key string, revision int64) []clientv3.Cmp {
	if revision == settings.Any {
		return nil
	}
	return []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", revision)}
}

func (c *Cluster) change(ctx context.Context, key string, revision int64, op clientv3.Op) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r, err := c.server.client.Txn(ctx).If(at(key, revision)...).Then(op).Commit()
	if err != nil {
		return nil, quorum(err)
	}
	if !r.Succeeded {
		return nil, fault.New("state_conflict", "the record %s was changed meanwhile", strings.TrimPrefix(key, ownPrefix)).WithFix("look at it again, and change that")
	}
	return r, nil
}

// Put implements settings.Store.
func (c *Cluster) Put(ctx context.Context, key string, value []byte, revision int64) error {
	if key == "" || len(key) > maxKey || len(value) > maxRequest/2 {
		return fault.New("state_record", "the record %.100q has %d bytes, or no usable key", key, len(value))
	}
	_, err := c.change(ctx, ownPrefix+key, revision, clientv3.OpPut(ownPrefix+key, string(c.sealed(ownPrefix+key, value))))
	return err
}

// Delete implements settings.Store.
func (c *Cluster) Delete(ctx context.Context, key string, revision int64) error {
	r, err := c.change(ctx, ownPrefix+key, revision, clientv3.OpDelete(ownPrefix+key))
	if err != nil {
		return err
	}
	if r.Responses[0].GetResponseDeleteRange().Deleted == 0 {
		return absent(key)
	}
	return nil
}

// Watch implements settings.Store.
func (c *Cluster) Watch(ctx context.Context, prefix string, changed func()) {
	for ctx.Err() == nil && c.ctx.Err() == nil {
		// What changes between the two is told: the watch begins before the look.
		watch, cancel := context.WithCancel(ctx)
		events := c.server.client.Watch(watch, ownPrefix+prefix, clientv3.WithPrefix())
		changed()
		c.drain(ctx, events, changed)
		cancel()
		select {
		case <-ctx.Done():
		case <-c.ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

func (c *Cluster) drain(ctx context.Context, events clientv3.WatchChan, changed func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.ctx.Done():
			return
		case r, ok := <-events:
			if !ok || r.Canceled {
				return
			}
			if len(r.Events) > 0 {
				changed()
			}
		}
	}
}

// Files is the cluster as a store of certificates.
func (c *Cluster) Files() certmagic.Storage { return files{c} }

type files struct{ *Cluster }

// latest reads with the others' agreement where there is a quorum, since CertMagic looks
// for what another member has just obtained; and what this one has where there is none.
func (c *Cluster) latest(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if c.server.leads() {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		r, err := c.server.get(short, key, opts...)
		cancel()
		if err == nil || ctx.Err() != nil {
			return r, err
		}
	}
	return c.server.get(ctx, key, append(opts, clientv3.WithSerializable())...)
}

// Load implements certmagic.Storage.
func (f files) Load(ctx context.Context, key string) ([]byte, error) {
	r, err := f.latest(ctx, filesPrefix+key)
	if err != nil {
		return nil, err
	}
	if len(r.Kvs) == 0 {
		return nil, absent(key)
	}
	v, _, err := f.open(filesPrefix+key, r.Kvs[0].Value)
	return v, err
}

// Store implements certmagic.Storage.
func (f files) Store(ctx context.Context, key string, value []byte) error {
	if key == "" || len(key) > maxKey || len(value) > maxRequest/2 {
		return fault.New("state_record", "the record %.100q has %d bytes, or no usable key", key, len(value))
	}
	_, err := f.change(ctx, filesPrefix+key, anyRevision, clientv3.OpPut(filesPrefix+key, string(f.sealed(filesPrefix+key, value))))
	return err
}

// Delete implements certmagic.Storage: a key, and everything below it.
func (f files) Delete(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err := f.server.client.Txn(ctx).Then(clientv3.OpDelete(filesPrefix+key), clientv3.OpDelete(filesPrefix+key+"/", clientv3.WithPrefix())).Commit()
	if err != nil {
		return quorum(err)
	}
	return nil
}

// Exists implements certmagic.Storage.
func (f files) Exists(ctx context.Context, key string) bool {
	_, err := f.Stat(ctx, key)
	return err == nil
}

// List implements certmagic.Storage.
func (f files) List(ctx context.Context, dir string, recursive bool) ([]string, error) {
	prefix := filesPrefix
	if dir != "" {
		prefix += strings.TrimSuffix(dir, "/") + "/"
	}
	r, err := f.latest(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortAscend))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, kv := range r.Kvs {
		rest := strings.TrimPrefix(string(kv.Key), prefix)
		if first, _, deeper := strings.Cut(rest, "/"); deeper && !recursive {
			rest = first
		}
		if name := path.Join(dir, rest); len(out) == 0 || out[len(out)-1] != name {
			out = append(out, name)
		}
	}
	if len(out) == 0 {
		return nil, absent(dir)
	}
	return out, nil
}

// Stat implements certmagic.Storage.
func (f files) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	r, err := f.latest(ctx, filesPrefix+key)
	if err != nil {
		return certmagic.KeyInfo{}, err
	}
	if len(r.Kvs) == 0 {
		below, err := f.latest(ctx, filesPrefix+key+"/", clientv3.WithPrefix(), clientv3.WithLimit(1), clientv3.WithKeysOnly())
		if err != nil {
			return certmagic.KeyInfo{}, err
		}
		if len(below.Kvs) == 0 {
			return certmagic.KeyInfo{}, absent(key)
		}
		return certmagic.KeyInfo{Key: key}, nil
	}
	v, modified, err := f.open(filesPrefix+key, r.Kvs[0].Value)
	return certmagic.KeyInfo{Key: key, Modified: modified, Size: int64(len(v)), IsTerminal: true}, err
}

// held is a lock of this member.
type held struct {
	session *concurrency.Session
	mutex   *concurrency.Mutex
}

func (h *held) release(ctx context.Context) error {
	err := h.mutex.Unlock(ctx)
	h.session.Close()
	return err
}

// Lock implements certmagic.Locker. Among the members one holds a name at a time; one that
// dies loses it after a minute.
func (f files) Lock(ctx context.Context, name string) error {
	short, cancel := context.WithTimeout(ctx, patience)
	grant, err := f.server.client.Grant(short, session)
	cancel()
	if err != nil {
		return quorum(err)
	}
	s, err := concurrency.NewSession(f.server.client, concurrency.WithLease(grant.ID), concurrency.WithContext(f.ctx))
	if err != nil {
		return quorum(err)
	}
	h := &held{session: s, mutex: concurrency.NewMutex(s, locksPrefix+name)}
	if err := h.mutex.Lock(ctx); err != nil {
		s.Close()
		return quorum(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.locks[name] = h
	return nil
}

// Unlock implements certmagic.Locker.
func (f files) Unlock(ctx context.Context, name string) error {
	f.mu.Lock()
	h := f.locks[name]
	delete(f.locks, name)
	f.mu.Unlock()
	if h == nil {
		return fault.New("state_lock", "the lock %s is not held", name)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return h.release(ctx)
}

// ReleaseLock takes a lock from whoever holds it, as when its member is gone for good.
func (c *Cluster) ReleaseLock(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := c.server.client.Delete(ctx, locksPrefix+name+"/", clientv3.WithPrefix()); err != nil {
		return quorum(err)
	}
	return nil
}

func (c *Cluster) releaseAll() {
	c.mu.Lock()
	locks := c.locks
	c.locks = map[string]*held{}
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, h := range locks {
		_ = h.release(ctx) // its lease ends by itself
	}
}
