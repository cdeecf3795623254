// SPDX-License-Identifier: Apache-2.0

// Package settingstest is a settings.Store in memory, for tests, and the tests that every
// Store passes.
package settingstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/internal/fault"
)

// Memory is a store in memory. Its zero value is empty.
type Memory struct {
	mu       sync.Mutex
	entries  map[string]settings.Entry
	revision int64
	watchers map[chan struct{}]string
	lost     bool
}

// LoseQuorum makes changes fail from now on, or work again.
func (m *Memory) LoseQuorum(lost bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lost = lost
}

// Get implements settings.Store.
func (m *Memory) Get(_ context.Context, key string) (settings.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[key]
	if !ok {
		return settings.Entry{}, fmt.Errorf("record %s: %w", key, fs.ErrNotExist)
	}
	return e, nil
}

// List implements settings.Store.
func (m *Memory) List(_ context.Context, prefix string) ([]settings.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []settings.Entry
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		if strings.HasPrefix(key, prefix) {
			out = append(out, m.entries[key])
		}
	}
	return out, nil
}

// ready is whether a change may be made. The caller holds m.mu.
func (m *Memory) ready(key string, at int64) error {
	switch {
	case m.lost:
		return fault.New("state_quorum", "the cluster did not agree in time")
	case at != settings.Any && m.entries[key].Revision != at:
		return fault.New("state_conflict", "the record %s was changed meanwhile", key)
	}
	return nil
}

func (m *Memory) told(key string) {
	for c, prefix := range m.watchers {
		if strings.HasPrefix(key, prefix) {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
}

// Put implements settings.Store.
func (m *Memory) Put(_ context.Context, key string, value []byte, at int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.ready(key, at); err != nil {
		return err
	}
	if m.entries == nil {
		m.entries = map[string]settings.Entry{}
	}
	m.revision++
	m.entries[key] = settings.Entry{Key: key, Value: bytes.Clone(value), Revision: m.revision}
	m.told(key)
	return nil
}

// Delete implements settings.Store.
func (m *Memory) Delete(_ context.Context, key string, at int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.ready(key, at); err != nil {
		return err
	}
	if _, ok := m.entries[key]; !ok {
		return fmt.Errorf("record %s: %w", key, fs.ErrNotExist)
	}
	delete(m.entries, key)
	m.told(key)
	return nil
}

// Watch implements settings.Store.
func (m *Memory) Watch(ctx context.Context, prefix string, changed func()) {
	c := make(chan struct{}, 1)
	m.mu.Lock()
	if m.watchers == nil {
		m.watchers = map[chan struct{}]string{}
	}
	m.watchers[c] = prefix
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.watchers, c)
		m.mu.Unlock()
	}()
	changed()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c:
			changed()
		}
	}
}

// Conform checks that an empty store keeps what its interface promises.
func Conform(t *testing.T, s settings.Store) {
	ctx := t.Context()
	want := func(err error, code string) {
		t.Helper()
		if code == "absent" && errors.Is(err, fs.ErrNotExist) || code == "" && err == nil || code != "" && fault.Code(err) == code {
			return
		}
		t.Errorf("%v, want %q", err, code)
	}
	_, err := s.Get(ctx, "conform/a")
	want(err, "absent")
	want(s.Delete(ctx, "conform/a", settings.Any), "absent")
	want(s.Put(ctx, "conform/a", []byte("1"), 7), "state_conflict")
	want(s.Put(ctx, "conform/a", []byte("1"), 0), "")
	want(s.Put(ctx, "conform/a", []byte("2"), 0), "state_conflict")
	first, err := s.Get(ctx, "conform/a")
	want(err, "")
	if first.Key != "conform/a" || string(first.Value) != "1" || first.Revision < 1 {
		t.Errorf("%+v", first)
	}
	want(s.Put(ctx, "conform/a", []byte("2"), first.Revision), "")
	want(s.Put(ctx, "conform/a", []byte("3"), first.Revision), "state_conflict")
	want(s.Delete(ctx, "conform/a", first.Revision), "state_conflict")
	want(s.Put(ctx, "conform/a", []byte("3"), settings.Any), "")
	want(s.Put(ctx, "conform/b", nil, settings.Any), "")
	want(s.Put(ctx, "conformist", []byte("4"), settings.Any), "")
	list, err := s.List(ctx, "conform/")
	want(err, "")
	if len(list) != 2 || list[0].Key != "conform/a" || string(list[0].Value) != "3" || list[0].Revision <= first.Revision || list[1].Key != "conform/b" {
		t.Errorf("%+v", list)
	}

	watch, cancel := context.WithCancel(ctx)
	told, done := make(chan struct{}, 64), make(chan struct{})
	go func() {
		defer close(done)
		s.Watch(watch, "conform/", func() { told <- struct{}{} })
	}()
	hear := func(when string) {
		t.Helper()
		select {
		case <-told:
		case <-time.After(10 * time.Second):
			t.Errorf("not told %s", when)
		}
	}
	hear("at the start")
	want(s.Put(ctx, "conform/c", []byte("5"), 0), "")
	hear("of a change")
	want(s.Delete(ctx, "conform/c", settings.Any), "")
	hear("of a deletion")
	cancel()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("the watch goes on")
	}
}
