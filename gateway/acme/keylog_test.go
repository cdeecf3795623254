// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
)

// counting counts what is read.
type counting struct {
	certmagic.Storage
	mu    sync.Mutex
	loads int
}

func (c *counting) Load(ctx context.Context, key string) ([]byte, error) {
	c.mu.Lock()
	c.loads++
	c.mu.Unlock()
	return c.Storage.Load(ctx, key)
}

// The history of keys is given in parts, is bounded, and what ended long ago goes.
func TestTheHistoryOfKeysIsBounded(t *testing.T) {
	storage := &counting{Storage: &certmagic.FileStorage{Path: t.TempDir()}}
	m, err := New(Config{Storage: storage, CAs: []CA{{Name: "none", Directory: "https://ca.test/dir"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	now := time.Now()
	add := func(n int, at, until time.Time, names ...string) {
		spki := fmt.Appendf(nil, "key %d", n)
		if err := store(t.Context(), storage, keyLogKey(spki), &keyRecord{Version: 1, SPKI: spki, Names: names, At: at.Unix(), Until: until.Unix()}); err != nil {
			t.Fatal(err)
		}
	}
	const n = MaxInfoKeys + 50
	for i := range n {
		add(i, now.Add(time.Duration(i-n)*time.Minute), now.Add(time.Hour), fmt.Sprintf("%d.test", i%2))
	}
	add(n, now.Add(-200*24*time.Hour), now.Add(-keyGrace-time.Hour), "old.test")
	add(n+1, now.Add(-100*24*time.Hour), now.Add(-keyGrace+time.Hour), "late.test")
	info, err := m.AcmeInfo(t.Context())
	if err != nil || len(info.QuotedHistKeys) != MaxInfoKeys || string(info.QuotedHistKeys[0].PublicKey) != fmt.Sprintf("key %d", n-1) {
		t.Fatalf("%d keys, %v", len(info.GetQuotedHistKeys()), err)
	}
	loads := storage.loads
	for range 100 {
		if _, err := m.AcmeInfo(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if storage.loads != loads {
		t.Errorf("strangers made the storage be read %d times", storage.loads-loads)
	}
	keys, total, err := m.Keys(t.Context(), "", n-3, 100)
	if err != nil || total != n+2 || len(keys) != 5 || keys[4].Names[0] != "old.test" {
		t.Errorf("%d of %d, %v", len(keys), total, err)
	}
	if keys, total, err = m.Keys(t.Context(), "1.test", 0, 3); err != nil || total != n/2 || len(keys) != 3 {
		t.Errorf("%d of %d, %v", len(keys), total, err)
	}
	if keys, _, err = m.Keys(t.Context(), "", 1_000_000, 3); err != nil || len(keys) != 0 {
		t.Errorf("beyond the end: %d, %v", len(keys), err)
	}
	if gone, err := m.Prune(t.Context()); err != nil || gone != 1 {
		t.Errorf("%d went, %v", gone, err)
	}
	if keys, total, err = m.Keys(t.Context(), "old.test", 0, 3); err != nil || total != 0 || len(keys) != 0 {
		t.Errorf("what ended long ago is there: %v", err)
	}
}
