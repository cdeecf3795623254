// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/keyprovider"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/releaselog"
)

// Threat G05: host and console learn that a lease was lost; whether the app goes on
// says the manifest.
func TestThreat_G05_ALostLeaseStopsTheAppIfTheManifestSaysSo(t *testing.T) {
	for _, c := range []struct {
		loss, state string
		stops       bool
	}{
		{"", initrpc.LeaseLost, false}, {"continue", initrpc.LeaseLost, false}, {"stop", initrpc.LeaseLost, true},
		{"stop", initrpc.LeaseGrace, false}, {"stop", initrpc.LeaseHeld, false},
	} {
		var mu sync.Mutex
		var events []string
		m := &Machine{
			console: &console{w: io.Discard}, manifest: parsed(t, manifest.Draft{KeyProvider: "kms", OnLeaseLoss: c.loss}), shutdowns: make(chan string, 1),
			host: newHost(func(_ context.Context, event, payload string) error {
				mu.Lock()
				defer mu.Unlock()
				events = append(events, event+" "+payload)
				return nil
			}),
		}
		change := initrpc.LeaseChange{State: c.state, Until: time.Unix(1_800_000_000, 0), Reason: "no\nphase ok"}
		if err := (rpcInit{m}).Lease(t.Context(), change); err != nil {
			t.Fatal(err)
		}
		m.host.Flush(time.Second)
		want := "kms.lease lease_" + c.state + ": the KMS's lease until 2027-01-15T08:00:00Z: no phase ok"
		mu.Lock()
		if len(events) != 1 || events[0] != want {
			t.Errorf("the host was told %q, want %q", events, want)
		}
		mu.Unlock()
		select {
		case reason := <-m.shutdowns:
			if !c.stops || !strings.HasPrefix(reason, "lease_lost:") {
				t.Errorf("%q, %s: it stops: %s", c.loss, c.state, reason)
			}
		default:
			if c.stops {
				t.Errorf("%q, %s: it goes on", c.loss, c.state)
			}
		}
	}
}

// Threat G10: a KMS that showed a release log in an earlier boot, and none now, gets no
// further.
func TestThreat_G10_AKMSThatHidesItsLogStopsTheBoot(t *testing.T) {
	dir := t.TempDir()
	kms, err := kmstest.Start(kmstest.Options{LogDir: filepath.Join(dir, "log")})
	if err != nil {
		t.Fatal(err)
	}
	defer kms.Close()
	g := &tdxtest.Guest{Platform: tdxtest.New(t), AppID: dstack.AppID{1}, InstanceID: dstack.InstanceID{2}, ComposeHash: dstack.ComposeHash{3}, Booting: true}
	k := &keyprovider.KMS{
		URLs: []string{kms.URL}, Pin: kms.SPKI(), App: g.AppID, Instance: g.InstanceID[:], Compose: g.ComposeHash, Attester: g,
	}
	grant, err := k.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := &Machine{console: &console{w: io.Discard}, manifest: parsed(t, manifest.Draft{KeyProvider: "kms"}), remembers: filepath.Join(dir, "disk")}
	m.secrets.app, grant.Keys = grant.Keys, nil
	// A KMS that never had one is upstream's.
	if err := m.releaseLog(t.Context()); err != nil {
		t.Errorf("a KMS that never showed a log: %v", err)
	}
	if err := k.Observe(t.Context(), releaselog.OpenMemory(filepath.Join(m.remembers, releaseLogs)), grant.Head, kms.URL); err != nil {
		t.Fatal(err)
	}
	if err := m.releaseLog(t.Context()); fault.Code(err) != "release_log_missing" {
		t.Errorf("a KMS that hides its log: %v", err)
	}
	m.secrets.app = &keys.AppKeys{Provider: keys.Provider{Kind: keys.None}}
	if err := m.releaseLog(t.Context()); err != nil {
		t.Errorf("no KMS: %v", err)
	}
}
