// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	agentpb "github.com/dstack-go/dstack/api/agent"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/keyprovider"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/lease"

	"github.com/dstack-go/dstack"
)

// leased is an agent whose keys and lease a KMS gave, and what moves its clocks.
type leased struct {
	*guest
	kms        *kmstest.Server
	init       *fakeInit
	deny       atomic.Bool
	wall, boot atomic.Int64 // nanoseconds beyond the machine's own
}

func (l *leased) now() time.Time { return time.Now().Add(time.Duration(l.wall.Load())) }

func newLeased(t *testing.T, life time.Duration, edit func(*initrpc.Config)) *leased {
	t.Helper()
	l := new(leased)
	var err error
	l.kms, err = kmstest.Start(kmstest.Options{Lease: life, LogDir: t.TempDir() + "/log", Now: l.now, Allow: func(c kmstest.Call) error {
		if l.deny.Load() {
			return errors.New("revoked")
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.kms.Close() })
	cfg, init := config(t, testManifest)
	l.init = init
	id, err := eventlog.Boundary(cfg.Events)
	if err != nil {
		t.Fatal(err)
	}
	// As init gets them: by the same evidence, before the agent runs.
	kms := &keyprovider.KMS{
		URLs: []string{l.kms.URL}, Pin: l.kms.SPKI(), App: testApp, Instance: testInstance[:], Compose: id.ComposeHash, VMConfig: testVMConfig, Now: l.now,
		Attester: channel.AttesterFunc(func(ctx context.Context, data dstack.ReportData) ([]byte, error) {
			a := &Agent{init: init, tee: dstack.TDX, evidenceConfig: testVMConfig}
			a.state.Store(&state{events: cfg.Events})
			return a.kmsEvidence(ctx, data)
		}),
	}
	grant, err := kms.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if cfg.AppKeys, err = grant.Keys.ForAgent().Encode(); err != nil {
		t.Fatal(err)
	}
	if life > 0 {
		cfg.Lease, cfg.LeaseSignature = grant.Lease.Document, grant.Lease.Signature
	}
	if edit != nil {
		edit(cfg)
	}
	begin := time.Now()
	l.guest = serve(t, cfg, init, Options{Now: l.now, boottime: func() time.Duration { return time.Since(begin) + time.Duration(l.boot.Load()) }})
	return l
}

// calls are those that give key material, signatures or certificates.
func (l *leased) calls(t *testing.T) map[string]error {
	ctx := context.Background()
	return map[string]error{
		"GetKey":        l.dstack(t).Call(ctx, "GetKey", &agentpb.GetKeyArgs{Path: "a"}, nil),
		"GetTlsKey":     l.dstack(t).Call(ctx, "GetTlsKey", &agentpb.GetTlsKeyArgs{}, nil),
		"Sign":          l.dstack(t).Call(ctx, "Sign", &agentpb.SignRequest{Algorithm: "ed25519", Data: []byte("x")}, nil),
		"DeriveKey":     l.tappd(t).Call(ctx, "DeriveKey", &agentpb.DeriveKeyArgs{Path: "a"}, nil),
		"DeriveK256Key": l.tappd(t).Call(ctx, "DeriveK256Key", &agentpb.GetKeyArgs{Path: "a"}, nil),
	}
}

// want waits until every call ends with a code, "" for none.
func (l *leased) want(t *testing.T, code string, patience time.Duration) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		bad := ""
		for name, err := range l.calls(t) {
			if fault.Code(err) != code {
				bad = name + ": " + errText(err)
			}
		}
		if bad == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("want code %q: %s", code, bad)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func errText(err error) string {
	if err == nil {
		return "no error"
	}
	return err.Error()
}

// state is what Info says of the lease.
func (l *leased) leaseState(t *testing.T) string {
	t.Helper()
	var info agentpb.AppInfo
	if err := l.dstack(t).Call(context.Background(), "Info", nil, &info); err != nil {
		t.Fatal(err)
	}
	var c initrpc.LeaseChange
	if err := json.Unmarshal([]byte(info.Lease), &c); err != nil {
		t.Fatalf("%q: %v", info.Lease, err)
	}
	return c.State
}

func (l *leased) renewals() int {
	n := 0
	for _, c := range l.kms.Calls() {
		if c.Method == "RenewLease" {
			n++
		}
	}
	return n
}

func (l *leased) told() (states []string) {
	l.init.mu.Lock()
	defer l.init.mu.Unlock()
	for _, c := range l.init.leases {
		states = append(states, c.State)
	}
	return states
}

// Threat G05: an instance that the KMS no longer authorises gets no new keys once its
// lease has ended, and gets them again when it is authorised again.
func TestThreat_G05_LeaseLostStopsNewKeys(t *testing.T) {
	l := newLeased(t, 4*time.Second, nil)
	l.want(t, "", 0)
	if s := l.leaseState(t); s != initrpc.LeaseHeld {
		t.Errorf("the lease is %s", s)
	}
	for deadline := time.Now().Add(10 * time.Second); l.renewals() == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the lease is not renewed")
		}
	}
	l.deny.Store(true)
	l.want(t, "lease_lost", 10*time.Second)
	if s := l.leaseState(t); s != initrpc.LeaseLost {
		t.Errorf("the lease is %s", s)
	}
	err := l.dstack(t).Call(context.Background(), "GetKey", &agentpb.GetKeyArgs{}, nil)
	if !strings.Contains(errText(err), "revoked") {
		t.Errorf("the reason is lost: %v", err)
	}
	if _, err := l.renewAppCert(context.Background()); fault.Code(err) != "lease_lost" {
		t.Errorf("the app's certificate is renewed: %v", err)
	}
	// What shows who the instance is goes on.
	if err := l.dstack(t).Call(context.Background(), "GetQuote", &agentpb.RawQuoteArgs{}, nil); err != nil {
		t.Errorf("evidence: %v", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if told := l.told(); len(told) > 0 && told[len(told)-1] == initrpc.LeaseLost {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("init was told %v", l.told())
		}
	}
	l.deny.Store(false)
	l.want(t, "", 40*time.Second)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if told := l.told(); told[len(told)-1] == initrpc.LeaseHeld {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("init was told %v", l.told())
		}
	}
}

// Threat F02: a machine that stood still for longer than its lease locks before it
// serves, whichever clock tells; and asks for a new lease by itself.
func TestThreat_F02_AMachineThatStoodStillLocksBeforeItServes(t *testing.T) {
	for name, move := range map[string]func(*leased){
		"by the time since boot": func(l *leased) { l.boot.Add(int64(2 * time.Hour)) },
		"by the wall clock":      func(l *leased) { l.wall.Add(int64(2 * time.Hour)) },
		"with the wall clock set back": func(l *leased) {
			l.boot.Add(int64(2 * time.Hour))
			l.wall.Add(-int64(time.Hour))
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLeased(t, time.Hour, nil)
			l.want(t, "", 0)
			l.deny.Store(true)
			move(l)
			for method, err := range l.calls(t) {
				if fault.Code(err) != "lease_lost" {
					t.Errorf("%s: %v", method, err)
				}
			}
			l.deny.Store(false)
			l.want(t, "", 30*time.Second)
			if l.renewals() == 0 {
				t.Error("nobody asked for a lease")
			}
		})
	}
}

// A machine that stood still and is authorised is not said to have lost its lease.
func TestALeaseThatIsRenewedInTimeIsNoNews(t *testing.T) {
	l := newLeased(t, time.Hour, nil)
	l.boot.Add(int64(2 * time.Hour))
	l.want(t, "", 30*time.Second)
	if told := l.told(); len(told) > 0 {
		t.Errorf("init was told %v", told)
	}
}

func TestAKMSWithoutLeases(t *testing.T) {
	l := newLeased(t, 0, nil)
	l.boot.Add(int64(1000 * time.Hour))
	l.want(t, "", 0)
	var info agentpb.AppInfo
	if err := l.dstack(t).Call(context.Background(), "Info", nil, &info); err != nil || info.Lease != "" {
		t.Errorf("Info says %q, %v", info.Lease, err)
	}
}

// An agent that is started again may be given a lease that has ended since: it asks for
// another, and serves then.
func TestAnAgentThatIsStartedAgainWithAnOldLease(t *testing.T) {
	l := newLeased(t, time.Second, func(*initrpc.Config) { time.Sleep(1200 * time.Millisecond) })
	if n := l.renewals(); n == 0 {
		l.want(t, "", 30*time.Second)
	}
	if l.renewals() == 0 {
		t.Error("nobody asked for a lease")
	}
}

func TestLeasesThatNoAgentTakes(t *testing.T) {
	l := newLeased(t, time.Hour, nil)
	for name, c := range map[string]struct {
		code string
		edit func(*Agent, *initrpc.Config)
	}{
		"of another signer":   {"lease_signature", func(_ *Agent, c *initrpc.Config) { c.LeaseSignature = []byte("x") }},
		"of another instance": {"lease_other", func(a *Agent, _ *initrpc.Config) { a.identity.InstanceID = nil }},
		"without a KMS":       {"app_keys_malformed", func(a *Agent, _ *initrpc.Config) { a.kms = nil }},
	} {
		doc, signature := signedLease(t, l)
		a := &Agent{kms: l.guest.kms, kmsRoot: l.kmsRoot, now: time.Now, boottime: l.boottime, identity: l.identity}
		cfg := &initrpc.Config{Lease: doc, LeaseSignature: signature}
		c.edit(a, cfg)
		if err := a.takeLease(cfg); fault.Code(err) != c.code {
			t.Errorf("%s: %v (code %q), want %q", name, err, fault.Code(err), c.code)
		}
	}
}

// signedLease has the KMS make one more.
func signedLease(t *testing.T, l *leased) (document, signature []byte) {
	t.Helper()
	var out kmsapi.Lease
	if err := l.renewLease(context.Background()); err != nil {
		t.Fatal(err)
	}
	id := l.identity
	kms := &keyprovider.KMS{
		URLs: []string{l.kms.URL}, Pin: l.kms.SPKI(), App: id.AppID, Instance: id.InstanceID, Compose: id.ComposeHash,
		Attester: channel.AttesterFunc(l.kmsEvidence),
	}
	grant, err := kms.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out.Document, out.Signature = grant.Lease.Document, grant.Lease.Signature
	return out.Document, out.Signature
}

// The pure part: when to ask, and what state it is.
func TestTenure(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	u := newTenure()
	check := func(when string, wall time.Duration, boot time.Duration, state string, wait time.Duration) {
		t.Helper()
		if got, _ := u.state(now.Add(wall), boot); got != state {
			t.Errorf("%s: %s, want %s", when, got, state)
		}
		if got := u.wait(boot); got != wait {
			t.Errorf("%s: wait %s, want %s", when, got, wait)
		}
	}
	check("before any", 0, 0, initrpc.LeaseLost, 0)
	u.renewed(&lease.Document{NotAfter: now.Add(time.Minute)}, now, time.Hour, 0)
	check("new", 0, time.Hour, initrpc.LeaseHeld, 30*time.Second)
	check("at half", 30*time.Second, time.Hour+30*time.Second, initrpc.LeaseHeld, 0)
	u.refused("no", time.Hour+30*time.Second, 0)
	check("refused once", 30*time.Second, time.Hour+30*time.Second, initrpc.LeaseGrace, leaseRetryFirst)
	for range 20 {
		u.refused("no", time.Hour+30*time.Second, 0)
	}
	check("refused often", 30*time.Second, time.Hour+30*time.Second+31*time.Second, initrpc.LeaseLost, 29*time.Second)
	check("ended by the wall", time.Minute, time.Hour, initrpc.LeaseLost, leaseLook)
	check("ended by the boot clock", 0, time.Hour+time.Minute, initrpc.LeaseLost, 30*time.Second)
	u.renewed(&lease.Document{NotAfter: now.Add(time.Hour)}, now, 0, 1)
	check("far away, and looked at", 0, 0, initrpc.LeaseHeld, leaseLook)
	if u.due != 24*time.Minute {
		t.Errorf("due after %s", u.due)
	}
}
