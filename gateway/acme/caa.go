// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/dstack-go/dstack/gateway/caa"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

// What is done about CAA without being asked.
const (
	CAAOff   = "off"
	CAACheck = "check" // look, and say what is wrong
	CAASet   = "set"   // make it right, where the credential may
)

// Times between looks at CAA.
const (
	caaEvery = time.Hour
	caaRetry = time.Minute
)

// CAAStatus is how CAA stands at a base domain.
type CAAStatus struct {
	Domain hostname.Name
	At     time.Time // of the look; zero: none yet
	Report caa.Report
	Err    error // caa_drift among others; nil: our accounts alone may have certificates
}

// pins are our accounts as CAA names them. A base domain is proven by DNS-01 alone.
func pins(accounts []Account) []caa.Pin {
	list := make([]caa.Pin, len(accounts))
	for i, a := range accounts {
		list[i] = caa.Pin{Issuer: a.Identity, Account: a.URI, Methods: []string{string(DNS01)}}
	}
	return list
}

// SetCAA lets our accounts alone have certificates for the base domains: it makes the
// accounts that are missing, and sets the records. All domains are tried. Codes of
// Register, [caa.Set]; caa_zone also when the zone is not found.
func (m *Manager) SetCAA(ctx context.Context) error {
	accounts, err := m.Register(ctx)
	if err != nil {
		return err
	}
	return m.pin(ctx, pins(accounts))
}

func (m *Manager) pin(ctx context.Context, pins []caa.Pin) error {
	var errs []error
	for _, d := range m.managedDomains() {
		errs = append(errs, m.pinDomain(ctx, d, pins))
	}
	return errors.Join(errs...)
}

func (m *Manager) managedDomains() []*domain {
	m.mu.RLock()
	defer m.mu.RUnlock()
	list := make([]*domain, 0, len(m.domains))
	for _, d := range m.domains {
		list = append(list, d)
	}
	slices.SortFunc(list, func(a, b *domain) int { return strings.Compare(string(a.Name), string(b.Name)) })
	return list
}

// pinDomain sets the records of one domain; no other node does at the same time.
func (m *Manager) pinDomain(ctx context.Context, d *domain, pins []caa.Pin) error {
	return locked(ctx, m.cfg.Storage, keyOf("caa", safe(string(d.Name))), func() error {
		zone, err := certmagic.FindZoneByFQDN(ctx, m.zap, string(d.Name)+".", certmagic.RecursiveNameservers(m.cfg.Resolvers))
		if err != nil {
			return fault.Wrap(m.secrets.error(err), "caa_zone", "finding the zone of %s", d.Name)
		}
		change, err := caa.Set(ctx, d.provider, zone, string(d.Name), pins, d.TTL)
		if len(change.Added)+len(change.Removed) > 0 {
			m.log.Info("CAA", "domain", d.Name, "added", len(change.Added), "removed", len(change.Removed))
		}
		return m.secrets.error(err)
	})
}

// CheckCAA looks at the CAA records of the base domains as a CA would. Without accounts
// there is nothing to hold them against. Codes acme_account; those of one domain are in
// its status.
func (m *Manager) CheckCAA(ctx context.Context) ([]CAAStatus, error) {
	accounts, err := m.Accounts(ctx)
	if err != nil || len(accounts) == 0 {
		return nil, err
	}
	var list []CAAStatus
	for _, d := range m.managedDomains() {
		s := CAAStatus{Domain: d.Name, At: time.Now()}
		if s.Report, s.Err = caa.Check(ctx, certmagic.RecursiveNameservers(m.cfg.Resolvers), string(d.Name), pins(accounts)); s.Err == nil {
			s.Err = s.Report.Err()
		}
		list = append(list, s)
	}
	m.mu.Lock()
	m.caa = list
	m.mu.Unlock()
	return list, nil
}

// CAA is what the last look at the base domains' CAA records found.
func (m *Manager) CAA() []CAAStatus {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Clone(m.caa)
}

// keepRecords looks at CAA, and sets it if it is to, ends accounts that were replaced, and
// forgets keys of long ago, until the manager is closed.
func (m *Manager) keepRecords() {
	said := map[hostname.Name]string{}
	var pruned time.Time
	for wait := caaEvery; ; {
		select {
		case <-m.ctx.Done():
			return
		case <-time.After(wait):
		case <-m.recheck:
		}
		wait = jitter(caaEvery)
		var errs []error
		if m.cfg.CAA != CAAOff && len(m.managedDomains()) > 0 {
			errs = append(errs, m.lookCAA(said))
		}
		for _, i := range m.issuers {
			errs = append(errs, i.retire(m.ctx))
		}
		if time.Since(pruned) > 24*time.Hour {
			pruned = time.Now()
			_, err := m.Prune(m.ctx)
			errs = append(errs, err)
		}
		if err := errors.Join(errs...); err != nil && m.ctx.Err() == nil {
			wait = jitter(caaRetry)
			m.log.Warn("keeping accounts and CAA", "code", fault.Code(err), "error", err, "again_in", wait)
		}
	}
}

func (m *Manager) lookCAA(said map[hostname.Name]string) error {
	var failed error
	if m.cfg.CAA == CAASet {
		failed = m.SetCAA(m.ctx)
	} else if _, err := m.Register(m.ctx); err != nil {
		return err
	}
	list, err := m.CheckCAA(m.ctx)
	for _, s := range list {
		text := ""
		if s.Err != nil {
			text = s.Err.Error()
		}
		// A drift is said once, and again when it is another.
		if text != said[s.Domain] && text != "" {
			m.log.Warn("others may have certificates for the domain, or we may not", "domain", s.Domain, "code", fault.Code(s.Err), "error", s.Err, "fix", fault.Fix(s.Err))
		}
		said[s.Domain] = text
	}
	return errors.Join(failed, err)
}
