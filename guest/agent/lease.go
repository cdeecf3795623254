// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	agentpb "github.com/dstack-go/dstack/api/agent"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/kmsclient"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/lease"
)

// Times of a lease's renewal.
const (
	leaseLook       = 30 * time.Second // at the longest, for a machine that stood still
	leaseRetryFirst = 5 * time.Second
	leaseRetryMost  = time.Minute
	leaseAttempt    = 90 * time.Second
)

// tenure is how long the KMS authorises this instance (threats.md G05). It ends by the
// wall clock or by the time since boot, whichever is first: a machine that was stopped
// and goes on, or whose wall clock was set back, does not serve keys on an old lease
// (F02). It has no goroutine and reads no clock.
type tenure struct {
	mu     sync.Mutex
	until  time.Time     // by the wall clock
	ends   time.Duration // by CLOCK_BOOTTIME
	due    time.Duration // when to renew, by CLOCK_BOOTTIME
	failed int           // renewals, one after another
	reason string        // of the last failure
	told   string        // the state that init knows
	wake   chan struct{} // somebody found it ended
}

// newTenure returns a tenure that has ended.
func newTenure() *tenure { return &tenure{wake: make(chan struct{}, 1), told: initrpc.LeaseHeld} }

// renewed takes a lease that was verified at now. spread, from 0 to 1, keeps guests that
// started together from asking together.
func (t *tenure) renewed(d *lease.Document, now time.Time, boot time.Duration, spread float64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	left := d.NotAfter.Sub(now)
	t.until, t.ends, t.failed, t.reason = d.NotAfter, boot+left, 0, ""
	t.due = boot + time.Duration(float64(left)*(0.5-0.1*spread))
}

// refused takes a renewal that failed.
func (t *tenure) refused(reason string, boot time.Duration, spread float64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	wait := min(leaseRetryFirst<<min(t.failed, 10), leaseRetryMost)
	t.failed++
	t.reason, t.due = reason, boot+time.Duration(float64(wait)*(1+0.2*spread))
}

// state is what it is now.
func (t *tenure) state(now time.Time, boot time.Duration) (state string, change initrpc.LeaseChange) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case !now.Before(t.until) || boot >= t.ends:
		state = initrpc.LeaseLost
	case t.failed > 0:
		state = initrpc.LeaseGrace
	default:
		state = initrpc.LeaseHeld
	}
	return state, initrpc.LeaseChange{State: state, Until: t.until, Reason: t.reason}
}

// wait is how long nothing is to be done.
func (t *tenure) wait(boot time.Duration) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return min(max(t.due-boot, 0), leaseLook)
}

// tell reports whether a state is news.
func (t *tenure) tell(state string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	news := t.told != state
	t.told = state
	return news
}

// takeLease takes over the lease that init got; without one there is no tenure, as with
// upstream's KMS. An agent that was started again may be given one that has ended.
func (a *Agent) takeLease(cfg *initrpc.Config) error {
	if len(cfg.Lease) == 0 {
		return nil
	}
	if a.kms == nil {
		return fault.New("app_keys_malformed", "there is a lease, and no KMS that gave it")
	}
	t := newTenure()
	a.lease.Store(&kmsapi.Lease{Document: cfg.Lease, Signature: cfg.LeaseSignature})
	d, err := a.subject().Lease(a.lease.Load(), a.kmsRoot, a.now())
	switch {
	case err == nil:
		t.renewed(d, a.now(), a.boottime(), rand.Float64())
	case fault.Code(err) != "lease_ended":
		return err
	}
	a.tenure = t
	return nil
}

func (a *Agent) subject() kmsclient.Subject {
	return kmsclient.Subject{App: a.identity.AppID, Instance: a.identity.InstanceID, Compose: a.identity.ComposeHash}
}

// authorised refuses what a lost lease forbids: keys, signatures and certificates. Code
// lease_lost.
func (a *Agent) authorised() error {
	if a.tenure == nil {
		return nil
	}
	state, change := a.tenure.state(a.now(), a.boottime())
	if state != initrpc.LeaseLost {
		return nil
	}
	select {
	case a.tenure.wake <- struct{}{}:
	default:
	}
	reason := ""
	if change.Reason != "" {
		reason = "; " + change.Reason
	}
	return fault.New("lease_lost", "the KMS no longer authorises this instance: its lease ended%s", reason).
		WithFix("see whether the KMS runs and allows this app; a new lease is taken as soon as it gives one")
}

// renewLease asks the KMS once.
func (a *Agent) renewLease(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseAttempt)
	defer cancel()
	var got *lease.Document
	err := kmsclient.Ask(ctx, a.kms, "RenewLease", &kmsapi.RenewLeaseRequest{VmConfig: a.vmConfig}, func(r *kmsapi.RenewLeaseResponse, _ kmsclient.Answer) (err error) {
		if r.Release != nil {
			if _, err := a.subject().Release(r.Release, a.kmsRoot); err != nil {
				return err
			}
		}
		if got, err = a.subject().Lease(r.Lease, a.kmsRoot, a.now()); err == nil {
			a.lease.Store(&kmsapi.Lease{Document: bytes.Clone(r.Lease.Document), Signature: bytes.Clone(r.Lease.Signature)})
		}
		return err
	})
	if err != nil {
		a.tenure.refused(err.Error(), a.boottime(), rand.Float64())
		return err
	}
	a.tenure.renewed(got, a.now(), a.boottime(), rand.Float64())
	return nil
}

// keepLease renews the lease until ctx ends, and tells init when its state changes. That
// it was lost is told once a renewal has failed since: a machine that merely stood
// still gets a new one.
func (a *Agent) keepLease(ctx context.Context) {
	if a.tenure == nil {
		return
	}
	for ctx.Err() == nil {
		timer := time.NewTimer(a.tenure.wait(a.boottime()))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-a.tenure.wake:
		}
		timer.Stop()
		// One that has just ended is asked for at once, however long the wait was to be.
		state, _ := a.tenure.state(a.now(), a.boottime())
		if ctx.Err() != nil || a.tenure.wait(a.boottime()) > 0 && !(state == initrpc.LeaseLost && a.tenure.news(state)) {
			continue
		}
		if err := a.renewLease(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("the KMS's lease is not renewed", "error", err)
		}
		state, change := a.tenure.state(a.now(), a.boottime())
		if ctx.Err() != nil || !a.tenure.tell(state) {
			continue
		}
		if state == initrpc.LeaseLost {
			a.log.Error("no new keys", "code", "lease_lost", "reason", change.Reason)
		}
		if err := a.init.Lease(ctx, change); err != nil {
			a.log.Warn("tell init of the lease", "error", err)
		}
	}
}

// news reports whether init does not know a state.
func (t *tenure) news(state string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.told != state
}

// withLease adds to Info what the lease is now.
func (a *Agent) withLease(info *agentpb.AppInfo) *agentpb.AppInfo {
	text := a.leaseText()
	if text == "" {
		return info
	}
	info = proto.Clone(info).(*agentpb.AppInfo)
	info.Lease = text
	return info
}

// leaseText is the lease's state as JSON; empty without a lease.
func (a *Agent) leaseText() string {
	if a.tenure == nil {
		return ""
	}
	_, change := a.tenure.state(a.now(), a.boottime())
	change.Reason = "" // it may quote the network
	text, err := json.Marshal(change)
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(text))
}
