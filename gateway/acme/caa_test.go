// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mholt/acmez/v3/acme"
	"github.com/miekg/dns"

	"github.com/dstack-go/dstack/gateway/acme/acmetest"
	"github.com/dstack-go/dstack/gateway/caa"
	"github.com/dstack-go/dstack/gateway/hostname"
)

// heeds lets a CA go by CAA, as the own DNS server has it.
func heeds(d *acmetest.DNS, c *acmetest.CA) *acmetest.CA {
	c.Check = func(account string, csr *x509.CertificateRequest) error {
		for _, name := range csr.DNSNames {
			bare, wildcard := strings.CutPrefix(name, "*.")
			_, set, err := caa.Lookup(context.Background(), []string{d.Addr}, bare)
			if err != nil {
				return err
			}
			if !caa.Permits(set, caa.Request{Issuer: acmetest.Identity, Account: account, Method: "dns-01", Wildcard: wildcard}) {
				return errors.New("CAA forbids " + name)
			}
		}
		return nil
	}
	return c
}

func until(t *testing.T, log *lines, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(40 * time.Second); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s does not come to pass\n%s", what, log)
		}
	}
}

func caaOK(m *Manager) func() bool {
	return func() bool { list := m.CAA(); return len(list) == 1 && list[0].Err == nil }
}

func TestThreat_C07_CAANamesOurAccountsAlone(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	d.Add(t, base+`. 60 IN CAA 0 iodef "mailto:a@gw.test"`)
	d.Add(t, base+`. 60 IN CAA 0 issue "`+acmetest.Identity+`"`)
	ca := heeds(d, acmetest.NewCA(t, d, 1, 1))
	other := acmetest.NewCA(t, d, 1, 1)
	m, log := openWith(t, t.TempDir(), d, func(c *Config) { c.CAA = CAASet }, caOf("pebble", ca), CA{Name: "second", Directory: other.Directory, Roots: other.APIRoots, Identity: "second.test"})
	ready(t, m, log)
	until(t, log, "CAA", caaOK(m))
	accounts, err := m.Accounts(t.Context())
	if err != nil || len(accounts) != 2 || accounts[0].Identity != acmetest.Identity || accounts[1].Identity != "second.test" {
		t.Fatalf("%+v, %v", accounts, err)
	}
	var text []string
	for _, rr := range d.Records(base, dns.TypeCAA) {
		text = append(text, rr.(*dns.CAA).Tag+" "+rr.(*dns.CAA).Value)
	}
	want := []string{"iodef mailto:a@gw.test"}
	for _, a := range accounts {
		for _, tag := range []string{"issue ", "issuewild "} {
			want = append(want, tag+a.Identity+";validationmethods=dns-01;accounturi="+a.URI)
		}
	}
	slices.Sort(text)
	slices.Sort(want)
	if !slices.Equal(text, want) {
		t.Errorf("records:\n%s\nwant:\n%s", strings.Join(text, "\n"), strings.Join(want, "\n"))
	}

	// Somebody who controls the names in DNS, with another account at the same CA, has
	// nothing signed.
	m2, log2 := openWith(t, t.TempDir(), d, func(*Config) {}, caOf("pebble", ca))
	until(t, log2, "a refusal", func() bool {
		return slices.ContainsFunc(m2.Status(), func(s NameStatus) bool { return strings.Contains(s.Err, "CAA forbids") })
	})
	// The owner of the first one is told nothing of it, and can go on.
	if err := m.Renew(t.Context(), base, true); err != nil {
		t.Error(err)
	}
}

func TestThreat_C07_ADriftOfCAAIsTold(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	d.Add(t, base+`. 60 IN CAA 0 issue "other.test"`)
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := openWith(t, t.TempDir(), d, func(c *Config) { c.CAA = CAACheck }, caOf("pebble", ca))
	until(t, log, "a warning", func() bool { return strings.Contains(log.String(), "caa_drift") })
	list := m.CAA()
	if len(list) != 1 || len(list[0].Report.Missing) != 2 || len(list[0].Report.Foreign) != 1 {
		t.Errorf("%+v", list)
	}
	if len(d.Removed()) > 2 || len(d.Records(base, dns.TypeCAA)) != 1 { // the two are challenges
		t.Error("a look changed the records")
	}
	if err := m.SetCAA(t.Context()); err != nil {
		t.Fatal(err)
	}
	if list, err := m.CheckCAA(t.Context()); err != nil || list[0].Err != nil {
		t.Errorf("%+v, %v", list, err)
	}
	_, err := New(Config{Storage: m.cfg.Storage, CAs: m.cfg.CAs, CAA: "sometimes"})
	wantCode(t, err, "acme_config")
}

func TestRotateAccount(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	ca := heeds(d, acmetest.NewCA(t, d, 1, 1))
	m, log := openWith(t, t.TempDir(), d, func(c *Config) { c.CAA = CAASet }, caOf("pebble", ca))
	ready(t, m, log)
	until(t, log, "CAA", caaOK(m))
	before, key, err := m.issuers[0].stored(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	accounts, err := m.RotateAccount(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	now := accounts[0]
	if now.URI == before.URI || !slices.Equal(now.Old, []string{before.URI}) || now.Quote == "" || now.Quote == before.Quote {
		t.Errorf("%+v", now)
	}
	set := d.Records(base, dns.TypeCAA)
	if len(set) != 2 || !strings.HasSuffix(set[0].(*dns.CAA).Value, now.URI) {
		t.Errorf("CAA: %v", set)
	}
	client := m.issuers[0].client().Client
	if old, err := client.GetAccount(t.Context(), acme.Account{PrivateKey: key}); err == nil && old.Status == acme.StatusValid {
		t.Errorf("the old account lives: %+v", old)
	}
	if r, _, err := m.issuers[0].stored(t.Context()); err != nil || r.Retiring != nil {
		t.Errorf("the old key is kept: %v", err)
	}
	name := hostname.Name(app + "-443." + base)
	if _, _, _, err := m.Sign(t.Context(), csr(t, newKey(t), string(name)), []hostname.Name{name}); err != nil {
		t.Errorf("after it: %v", err)
	}
}

// Where CAA cannot be made to name the next account, the old one stays.
func TestRotateAccountOnlyWhereCAAFollows(t *testing.T) {
	d := acmetest.NewDNS(t, base, "challenges.test")
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := openWith(t, t.TempDir(), d, func(c *Config) { c.CAA = CAASet }, caOf("pebble", ca))
	ready(t, m, log)
	until(t, log, "CAA", caaOK(m))
	before, _, err := m.issuers[0].stored(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.SetDomains(t.Context(), []Domain{{Name: base, Credential: credential(t, d, "AAAA"), Propagation: -1}}); err != nil {
		t.Fatal(err)
	}
	_, err = m.RotateAccount(t.Context())
	wantCode(t, err, "acme_pin")
	if r, _, err := m.issuers[0].stored(t.Context()); err != nil || r.URI != before.URI {
		t.Errorf("%v, %v", r, err)
	}
}
