// SPDX-License-Identifier: Apache-2.0

package caa

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libdns/libdns"
	"github.com/libdns/rfc2136"
	"github.com/miekg/dns"

	"github.com/dstack-go/dstack/gateway/acme/acmetest"
	"github.com/dstack-go/dstack/internal/fault"
)

const account = "https://ca.test/acct/1"

var ours = Pin{Issuer: "ca.test", Account: account, Methods: []string{"dns-01"}}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("got %v with code %q, want %q", err, fault.Code(err), code)
	}
}

func TestThreat_C07_NoRecordWithoutAnAccount(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*Pin)
		code string
	}{
		{"whole", func(*Pin) {}, ""},
		{"no account", func(p *Pin) { p.Account = "" }, "caa_account"},
		{"an account that adds a parameter", func(p *Pin) { p.Account += ";validationmethods=http-01" }, "caa_account"},
		{"an account with a space", func(p *Pin) { p.Account += " x" }, "caa_account"},
		{"an account that is no URI", func(p *Pin) { p.Account = "1234" }, "caa_account"},
		{"a long account", func(p *Pin) { p.Account += strings.Repeat("a", maxValue) }, "caa_account"},
		{"no issuer", func(p *Pin) { p.Issuer = "" }, "caa_issuer"},
		{"an issuer that adds a parameter", func(p *Pin) { p.Issuer = "ca.test;x=y" }, "caa_issuer"},
		{"no method", func(p *Pin) { p.Methods = nil }, "caa_methods"},
		{"a method that ends the list", func(p *Pin) { p.Methods = []string{"dns-01;x"} }, "caa_methods"},
	} {
		p := ours
		c.edit(&p)
		records, err := Build([]Pin{p})
		wantCode(t, err, c.code)
		if c.code == "" && (len(records) != 2 || records[0] != (Record{0, "issue", "ca.test;validationmethods=dns-01;accounturi=" + account}) || records[1].Tag != "issuewild") {
			t.Errorf("%s: %v", c.name, records)
		}
	}
	_, err := Build(nil)
	wantCode(t, err, "caa_pins")
}

// What a CA makes of records, by RFC 8659 §4.2 and §5 and RFC 8657 §3 and §4.
func TestWhoMayIssue(t *testing.T) {
	v := "ca.test; accounturi=" + account + "; validationmethods=dns-01"
	q := Request{Issuer: "ca.test", Account: account, Method: "dns-01"}
	with := func(edit func(*Request)) Request { r := q; edit(&r); return r }
	wild := with(func(r *Request) { r.Wildcard = true })
	for _, c := range []struct {
		name string
		set  []Record
		q    Request
		want bool
	}{
		{"nothing is said", nil, q, true},
		{"iodef says nothing", []Record{{0, "iodef", "mailto:a@b"}}, q, true},
		{"the account", []Record{{0, "issue", v}}, q, true},
		{"the tag in upper case", []Record{{0, "ISSUE", v}}, with(func(r *Request) { r.Account = "https://ca.test/acct/2" }), false},
		{"another account", []Record{{0, "issue", v}}, with(func(r *Request) { r.Account = "https://ca.test/acct/2" }), false},
		{"another method", []Record{{0, "issue", v}}, with(func(r *Request) { r.Method = "http-01" }), false},
		{"another CA", []Record{{0, "issue", v}}, with(func(r *Request) { r.Issuer = "other.test" }), false},
		{"nobody", []Record{{0, "issue", ";"}}, q, false},
		{"nobody, and the account", []Record{{0, "issue", ";"}, {0, "issue", v}}, q, true},
		{"two accounts in one record", []Record{{0, "issue", v + "; accounturi=https://x/"}}, q, false},
		{"a malformed record", []Record{{0, "issue", "ca.test; accounturi"}}, q, false},
		{"a wildcard by issue", []Record{{0, "issue", v}}, wild, true},
		{"a wildcard where issuewild says nobody", []Record{{0, "issue", v}, {0, "issuewild", ";"}}, wild, false},
		{"a name where issuewild says nobody", []Record{{0, "issue", v}, {0, "issuewild", ";"}}, q, true},
		{"something critical that nobody knows", []Record{{0, "issue", v}, {128, "tbs", "x"}}, q, false},
		{"iodef that is critical", []Record{{0, "issue", v}, {128, "iodef", "mailto:a@b"}}, q, true},
	} {
		if got := Permits(c.set, c.q); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}

// watched is a zone that tells what is there after every step, and can fail at one.
type watched struct {
	Zone
	failAt int
	step   int
	seen   func()
}

func (w *watched) do(err error) error {
	w.seen()
	if w.step++; w.step == w.failAt {
		return errors.New("the power went")
	}
	return err
}

func (w *watched) AppendRecords(ctx context.Context, zone string, r []libdns.Record) ([]libdns.Record, error) {
	var out []libdns.Record
	for i := range r { // one by one, as providers do
		if _, err := w.Zone.AppendRecords(ctx, zone, r[i:i+1]); w.do(err) != nil {
			return nil, errors.New("the power went")
		}
	}
	return out, nil
}

func (w *watched) DeleteRecords(ctx context.Context, zone string, r []libdns.Record) ([]libdns.Record, error) {
	for i := range r {
		if _, err := w.Zone.DeleteRecords(ctx, zone, r[i:i+1]); w.do(err) != nil {
			return nil, errors.New("the power went")
		}
	}
	return nil, nil
}

func sets(d *acmetest.DNS, name string) (list []Record) {
	for _, rr := range d.Records(name, dns.TypeCAA) {
		c := rr.(*dns.CAA)
		list = append(list, Record{c.Flag, c.Tag, c.Value})
	}
	return list
}

// By signed updates at an own server, with the power going at every step: at no moment may
// a stranger have a certificate who could not before, and once ours could, it can always.
func TestThreat_C07_SettingOpensNothingAndBlocksNobody(t *testing.T) {
	for fail := 0; fail < 6; fail++ {
		d := acmetest.NewDNS(t, "gw.test")
		d.Add(t, `apps.gw.test. 60 IN CAA 0 issue "ca.test;validationmethods=dns-01;accounturi=`+account+`"`)
		d.Add(t, `apps.gw.test. 60 IN CAA 0 issue "other.test"`)
		d.Add(t, `apps.gw.test. 60 IN CAA 0 issuewild ";"`)
		d.Add(t, `apps.gw.test. 60 IN CAA 0 iodef "mailto:a@gw.test"`)
		d.Add(t, `gw.test. 60 IN CAA 0 issue "parent.test"`)
		next := Pin{Issuer: "ca.test", Account: "https://ca.test/acct/2", Methods: []string{"dns-01"}}
		zone := &rfc2136.Provider{Server: d.Addr, KeyName: acmetest.KeyName, KeyAlg: acmetest.KeyAlg, Key: acmetest.Key}
		w := &watched{Zone: zone, failAt: fail, seen: func() {
			set := sets(d, "apps.gw.test")
			for _, wild := range []bool{false, true} {
				if Permits(set, Request{"stranger.test", "https://stranger.test/1", "dns-01", wild}) ||
					Permits(set, Request{"ca.test", "https://ca.test/acct/666", "dns-01", wild}) || wild && Permits(set, Request{"other.test", "https://other.test/1", "dns-01", wild}) {
					t.Errorf("a stranger may issue: %v", set)
				}
			}
			if !Permits(set, Request{"ca.test", account, "dns-01", false}) && !Permits(set, Request{"ca.test", next.Account, "dns-01", false}) {
				t.Errorf("nobody of ours may issue: %v", set)
			}
		}}
		change, err := Set(t.Context(), w, "gw.test", "apps.gw.test.", []Pin{next}, time.Minute)
		if fail > 0 && w.step >= fail {
			wantCode(t, err, "caa_zone")
			w.failAt = 0
			_, err = Set(t.Context(), w, "gw.test", "apps.gw.test", []Pin{next}, time.Minute)
		} else if len(change.Added) != 2 || len(change.Removed) != 3 {
			t.Errorf("%+v", change)
		}
		if err != nil {
			t.Fatal(err)
		}
		if set := sets(d, "apps.gw.test"); len(set) != 3 || !slices.ContainsFunc(set, func(r Record) bool { return r.Tag == "iodef" }) {
			t.Errorf("in the end: %v", set)
		}
		if set := sets(d, "gw.test"); len(set) != 1 {
			t.Errorf("at the parent: %v", set)
		}
		steps := w.step
		if change, err := Set(t.Context(), w, "gw.test", "apps.gw.test", []Pin{next}, time.Minute); err != nil || len(change.Added)+len(change.Removed) != 0 || w.step != steps {
			t.Errorf("set again: %+v, %v", change, err)
		}
		if r, err := Check(t.Context(), []string{d.Addr}, "apps.gw.test", []Pin{next}); err != nil || !r.OK() {
			t.Errorf("%+v, %v", r, err)
		}
	}
}

// forgetful takes records and has none of them.
type forgetful struct{ Zone }

func (forgetful) AppendRecords(context.Context, string, []libdns.Record) ([]libdns.Record, error) {
	return nil, nil
}

func TestWhatAProviderForgetsRemovesNothing(t *testing.T) {
	d := acmetest.NewDNS(t, "gw.test")
	d.Add(t, `gw.test. 60 IN CAA 0 issue "other.test"`)
	zone := &rfc2136.Provider{Server: d.Addr, KeyName: acmetest.KeyName, KeyAlg: acmetest.KeyAlg, Key: acmetest.Key}
	_, err := Set(t.Context(), forgetful{zone}, "gw.test", "gw.test", []Pin{ours}, 0)
	wantCode(t, err, "caa_not_added")
	if len(d.Removed()) != 0 {
		t.Error("a record was removed")
	}
	_, err = Set(t.Context(), zone, "gw.test", "notgw.test", []Pin{ours}, 0)
	wantCode(t, err, "caa_name")
	zone.Key = "AAAA"
	_, err = Set(t.Context(), zone, "gw.test", "gw.test", []Pin{ours}, 0)
	wantCode(t, err, "caa_zone")
}

func TestDrift(t *testing.T) {
	for _, c := range []struct {
		name             string
		records          []string
		at               string
		missing, foreign int
	}{
		{"nothing", nil, "", 2, 0},
		{"only the parent's", []string{`gw.test. 60 IN CAA 0 issue "other.test"`}, "gw.test", 2, 1},
		{"ours, along a CNAME", []string{"apps.gw.test. 60 IN CNAME x.gw.test.",
			`x.gw.test. 60 IN CAA 0 issue "ca.test;validationmethods=dns-01;accounturi=` + account + `"`,
			`x.gw.test. 60 IN CAA 0 issuewild "ca.test;validationmethods=dns-01;accounturi=` + account + `"`}, "apps.gw.test", 0, 0},
		{"ours and another", []string{
			`apps.gw.test. 60 IN CAA 0 issue "ca.test;validationmethods=dns-01;accounturi=` + account + `"`,
			`apps.gw.test. 60 IN CAA 0 issuewild "ca.test;validationmethods=dns-01;accounturi=` + account + `"`,
			`apps.gw.test. 60 IN CAA 0 issue "ca.test"`}, "apps.gw.test", 0, 1},
	} {
		d := acmetest.NewDNS(t, "gw.test", "test")
		for _, r := range c.records {
			d.Add(t, r)
		}
		r, err := Check(t.Context(), []string{d.Addr}, "apps.gw.test", []Pin{ours})
		if err != nil || r.At != c.at || len(r.Missing) != c.missing || len(r.Foreign) != c.foreign {
			t.Errorf("%s: %+v, %v", c.name, r, err)
		}
		if c.missing+c.foreign > 0 {
			wantCode(t, r.Err(), "caa_drift")
		} else if r.Err() != nil {
			t.Error(r.Err())
		}
	}
	_, err := Check(t.Context(), nil, "gw.test", []Pin{ours})
	wantCode(t, err, "caa_dns")
}

func FuzzParse(f *testing.F) {
	f.Add("ca.test;validationmethods=dns-01;accounturi=" + account)
	f.Add(";")
	f.Add(" ca.test ; a = b ;; ")
	f.Fuzz(func(t *testing.T, value string) {
		p, err := Parse(value)
		if err != nil {
			wantCode(t, err, "caa_malformed")
			return
		}
		if p.Issuer == "" || len(p.Accounts) != 1 || len(p.Methods) == 0 {
			return
		}
		// What can be built is read as it was meant.
		v, err := (Pin{p.Issuer, p.Accounts[0], p.Methods}).Value()
		if err != nil {
			return
		}
		q, err := Parse(v)
		if err != nil || q.Issuer != p.Issuer || !slices.Equal(q.Accounts, p.Accounts) || !slices.Equal(q.Methods, p.Methods) {
			t.Errorf("%q: %+v, %+v, %v", value, p, q, err)
		}
	})
}
