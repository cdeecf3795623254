// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/internal/fault"
)

func alone(t testing.TB, dir string) *Cluster {
	t.Helper()
	c, err := Open(aloneConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	waitFor(t, func() bool { return c.Quorum() })
	return c
}

func aloneConfig(dir string) Config {
	return Config{
		Dir: dir, App: dstack.AppID{1}, Compose: dstack.ComposeHash{2}, Judge: &applicant.Judge{},
		Self: channel.AttesterFunc(func(context.Context, dstack.ReportData) ([]byte, error) { return nil, errors.New("alone") }),
		Node: Node{
			UUID: strings.Repeat("ab", 16), ID: 1, Instance: dstack.InstanceID{3}, URL: "https://one.example:8000", Key: wgconfig.GeneratePrivateKey().Public().String(),
			Address: netip.MustParsePrefix("100.96.0.1/11"), Endpoint: "one.example:51820",
		},
	}
}

func waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not happen")
		}
	}
}

func wantCode(t testing.TB, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("want %s, got %q: %v", code, fault.Code(err), err)
	}
}

func TestASettingChangesOnlyFromTheRevisionThatWasRead(t *testing.T) {
	c := alone(t, t.TempDir())
	ctx := t.Context()
	if _, err := c.Get(ctx, "a/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("absent: %v", err)
	}
	if err := c.Put(ctx, "a/x", []byte("one"), 0); err != nil {
		t.Fatal(err)
	}
	wantCode(t, c.Put(ctx, "a/x", []byte("again"), 0), "state_conflict")
	e, err := c.Get(ctx, "a/x")
	if err != nil || string(e.Value) != "one" || e.Key != "a/x" {
		t.Fatalf("%+v %v", e, err)
	}
	if err := c.Put(ctx, "a/x", []byte("two"), e.Revision); err != nil {
		t.Fatal(err)
	}
	wantCode(t, c.Put(ctx, "a/x", []byte("three"), e.Revision), "state_conflict")
	wantCode(t, c.Delete(ctx, "a/x", e.Revision), "state_conflict")
	for _, k := range []string{"a/z", "a/y", "b"} {
		if err := c.Put(ctx, k, []byte(k), settings.Any); err != nil {
			t.Fatal(err)
		}
	}
	l, err := c.List(ctx, "a/")
	if err != nil || len(l) != 3 || l[0].Key != "a/x" || l[1].Key != "a/y" || string(l[2].Value) != "a/z" {
		t.Fatalf("%+v %v", l, err)
	}
	if err := c.Delete(ctx, "a/x", settings.Any); err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(ctx, "a/x", settings.Any); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("deleted twice: %v", err)
	}
	wantCode(t, c.Put(ctx, "", nil, settings.Any), "state_record")
	wantCode(t, c.Put(ctx, "big", make([]byte, maxRequest), settings.Any), "state_record")
}

func TestAWatchTellsOfChangesBelowItsPrefix(t *testing.T) {
	c := alone(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	var told atomic.Int32
	done := make(chan struct{})
	go func() { defer close(done); c.Watch(ctx, "a/", func() { told.Add(1) }) }()
	waitFor(t, func() bool { return told.Load() == 1 })
	for i, key := range []string{"a/1", "b/1", "a/1"} {
		before := told.Load()
		if err := c.Put(ctx, key, []byte{byte(i)}, settings.Any); err != nil {
			t.Fatal(err)
		}
		if key == "b/1" {
			time.Sleep(100 * time.Millisecond)
			if told.Load() != before {
				t.Error("told of another prefix")
			}
			continue
		}
		waitFor(t, func() bool { return told.Load() > before })
	}
	cancel()
	<-done
}

func TestCertificatesAreStoredAsCertMagicExpects(t *testing.T) {
	c := alone(t, t.TempDir())
	f, ctx := c.Files(), t.Context()
	if _, err := f.Load(ctx, "certificates/ca/x/x.key"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, k := range []string{"certificates/ca/x/x.key", "certificates/ca/x/x.crt", "certificates/ca/y/y.crt", "certificates-not/z"} {
		if err := f.Store(ctx, k, []byte(k)); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := f.Load(ctx, "certificates/ca/x/x.key"); err != nil || string(v) != "certificates/ca/x/x.key" {
		t.Errorf("%s %v", v, err)
	}
	if l, err := f.List(ctx, "certificates/ca", false); err != nil || !slices.Equal(l, []string{"certificates/ca/x", "certificates/ca/y"}) {
		t.Errorf("%v %v", l, err)
	}
	if l, err := f.List(ctx, "certificates", true); err != nil || len(l) != 3 {
		t.Errorf("%v %v", l, err)
	}
	if _, err := f.List(ctx, "nothing", true); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	k, err := f.Stat(ctx, "certificates/ca/x/x.key")
	if err != nil || !k.IsTerminal || k.Size != 23 || time.Since(k.Modified) > time.Minute {
		t.Errorf("%+v %v", k, err)
	}
	if k, err := f.Stat(ctx, "certificates/ca"); err != nil || k.IsTerminal {
		t.Errorf("%+v %v", k, err)
	}
	if err := f.Delete(ctx, "certificates/ca/x"); err != nil {
		t.Fatal(err)
	}
	if f.Exists(ctx, "certificates/ca/x/x.key") || !f.Exists(ctx, "certificates/ca/y/y.crt") || !f.Exists(ctx, "certificates-not/z") {
		t.Error("what is below the key goes, and nothing else")
	}
	if err := f.Delete(ctx, "certificates/ca/x"); err != nil {
		t.Errorf("deleting what is not there: %v", err)
	}
	// A setting of the same name is another record.
	if _, err := c.Get(ctx, "certificates-not/z"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestALockIsOneHoldersAtATime(t *testing.T) {
	c := alone(t, t.TempDir())
	f, ctx := c.Files(), t.Context()
	if err := f.Lock(ctx, "order"); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	wantCode(t, f.Lock(short, "order"), "state_quorum")
	if err := f.Lock(ctx, "other"); err != nil {
		t.Fatal(err)
	}
	if err := f.Unlock(ctx, "order"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, f.Unlock(ctx, "order"), "state_lock")
	if err := f.Lock(ctx, "order"); err != nil {
		t.Fatal(err)
	}
	// By force, from one that is gone.
	if err := c.ReleaseLock(ctx, "order"); err != nil {
		t.Fatal(err)
	}
	if err := f.Lock(ctx, "order"); err != nil {
		t.Fatal(err)
	}
}

// Threat K10: what is kept shows no secret, neither in its files nor to who lacks the key.
func TestThreat_K10_StoredValuesAreSealed(t *testing.T) {
	dir := t.TempDir()
	c := alone(t, dir)
	ctx := t.Context()
	canary := "canary-0f8e2b6a51"
	if err := c.Put(ctx, "dns/1", []byte(`{"token":"`+canary+`"}`), 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Files().Store(ctx, "keys/x.key", []byte(canary)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	found := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte(canary)) {
			t.Errorf("%s shows it", path)
		}
		if bytes.Contains(text, []byte("own/dns/1")) {
			found++ // the search can find what is there
		}
		return err
	})
	if err != nil || found == 0 {
		t.Errorf("%v; records found in %d files", err, found)
	}
}

// Threat K02: a record that this cluster did not seal, or that was moved to another name,
// is nobody's setting, and the others beside it count.
func TestThreat_K02_ForeignRecordsAreLeftOut(t *testing.T) {
	c := alone(t, t.TempDir())
	ctx := t.Context()
	if err := c.Put(ctx, "a/good", []byte("good"), 0); err != nil {
		t.Fatal(err)
	}
	raw, err := c.server.client.Get(ctx, ownPrefix+"a/good")
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string][]byte{
		"a/moved": raw.Kvs[0].Value, "a/clear": []byte("clear"), "a/empty": nil, "a/short": {1, 2, 3},
		"a/old": append([]byte{2}, raw.Kvs[0].Value[1:]...),
	} {
		if _, err := c.server.client.Put(ctx, ownPrefix+key, string(value)); err != nil {
			t.Fatal(err)
		}
		_, err := c.Get(ctx, key)
		wantCode(t, err, "cluster_record")
	}
	l, err := c.List(ctx, "a/")
	if err != nil || len(l) != 1 || l[0].Key != "a/good" {
		t.Errorf("%+v %v", l, err)
	}
	// A member's record that names nonsense is left out too.
	if err := c.Put(ctx, memberKey("x"), []byte(`{"uuid":"x"}`), 0); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { n, err := c.Nodes(ctx); return err == nil && len(n) == 1 })
}

func TestWhatWasAgreedIsThereAfterARestart(t *testing.T) {
	dir := t.TempDir()
	cfg := aloneConfig(dir)
	for i := range 3 {
		c, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if e, err := c.Get(t.Context(), "a"); i > 0 && (err != nil || string(e.Value) != "kept") {
			t.Errorf("start %d: %q %v", i, e.Value, err)
		}
		waitFor(t, c.Quorum)
		if i == 0 {
			if err := c.Put(t.Context(), "a", []byte("kept"), 0); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
	}
	// Another cluster's state file is an error and no new beginning.
	if err := os.WriteFile(filepath.Join(dir, stateFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(cfg)
	wantCode(t, err, "cluster_state")
}

func TestOpenRefusesWhatIsNoMember(t *testing.T) {
	for name, edit := range map[string]func(*Config){
		"directory": func(c *Config) { c.Dir = "relative" },
		"app":       func(c *Config) { c.App = dstack.AppID{} },
		"judge":     func(c *Config) { c.Judge = nil },
	} {
		cfg := aloneConfig(t.TempDir())
		edit(&cfg)
		_, err := Open(cfg)
		if fault.Code(err) != "cluster_config" {
			t.Errorf("%s: %v", name, err)
		}
	}
	cfg := aloneConfig(t.TempDir())
	cfg.Node.Endpoint = "no endpoint"
	_, err := Open(cfg)
	wantCode(t, err, "cluster_record")
}
