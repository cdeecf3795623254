// SPDX-License-Identifier: Apache-2.0

package caa

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/libdns/libdns"
	"github.com/miekg/dns"

	"github.com/dstack-go/dstack/internal/fault"
)

// Zone changes the records of a zone at its DNS provider.
type Zone interface {
	libdns.RecordGetter
	libdns.RecordAppender
	libdns.RecordDeleter
}

// Change is what Set did.
type Change struct{ Added, Removed []Record }

// Set makes the records at a name in a zone (both without a trailing dot) those of the
// pins: first it adds, then it looks whether what was added is there, and then it removes
// every other issue and issuewild. It changes nothing that is as it should be; after a
// crash it is run again. Codes of [Build]; caa_name (the name is not of the zone),
// caa_zone (the provider), caa_not_added.
func Set(ctx context.Context, z Zone, zone, name string, pins []Pin, ttl time.Duration) (Change, error) {
	var c Change
	want, err := Build(pins)
	if err != nil {
		return c, err
	}
	zone, name = normal(zone), normal(name)
	if zone == "" || name != zone && !strings.HasSuffix(name, "."+zone) {
		return c, fault.New("caa_name", "%s does not lie in the zone %s", clip(name), clip(zone))
	}
	have, err := at(ctx, z, zone, name)
	if err != nil {
		return c, err
	}
	var add []libdns.Record
	for _, w := range want {
		if !slices.ContainsFunc(have, func(h libdns.CAA) bool { return same(h, w) }) {
			add = append(add, libdns.CAA{Name: libdns.RelativeName(name, zone), TTL: ttl, Flags: w.Flags, Tag: w.Tag, Value: w.Value})
			c.Added = append(c.Added, w)
		}
	}
	if len(add) > 0 {
		if _, err := z.AppendRecords(ctx, zone+".", add); err != nil {
			return Change{}, fault.Wrap(err, "caa_zone", "adding CAA records at %s", name)
		}
		if have, err = at(ctx, z, zone, name); err != nil {
			return c, err
		}
		for _, w := range want {
			if !slices.ContainsFunc(have, func(h libdns.CAA) bool { return same(h, w) }) {
				return c, fault.New("caa_not_added", "the DNS provider took the CAA record %q at %s, and does not have it", w, name).
					WithFix("nothing was removed; set the record by hand, or with another provider")
			}
		}
	}
	var remove []libdns.Record
	for _, h := range have {
		r := Record{h.Flags, h.Tag, h.Value}
		if r.issuance() && !slices.ContainsFunc(want, func(w Record) bool { return same(h, w) }) {
			remove = append(remove, h)
			c.Removed = append(c.Removed, r)
		}
	}
	if len(remove) == 0 {
		return c, nil
	}
	if _, err := z.DeleteRecords(ctx, zone+".", remove); err != nil {
		return Change{Added: c.Added}, fault.Wrap(err, "caa_zone", "removing CAA records of others at %s", name)
	}
	return c, nil
}

// same compares as CAs do, who ignore the flags of properties that they know.
func same(h libdns.CAA, w Record) bool { return strings.EqualFold(h.Tag, w.Tag) && h.Value == w.Value }

// at returns the CAA records of a name.
func at(ctx context.Context, z Zone, zone, name string) ([]libdns.CAA, error) {
	all, err := z.GetRecords(ctx, zone+".")
	if err != nil {
		return nil, fault.Wrap(err, "caa_zone", "reading the records of %s", zone)
	}
	var out []libdns.CAA
	for _, r := range all {
		rr := r.RR()
		if !strings.EqualFold(rr.Type, "CAA") || normal(libdns.AbsoluteName(rr.Name, zone+".")) != name {
			continue
		}
		c, ok := r.(libdns.CAA)
		if !ok {
			parsed, err := rr.Parse()
			if c, ok = parsed.(libdns.CAA); err != nil || !ok {
				return nil, fault.New("caa_zone", "the DNS provider has a CAA record at %s that does not parse", name)
			}
		}
		out = append(out, c)
	}
	return out, nil
}

func normal(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// Report is what DNS says of a domain, held against what it should.
type Report struct {
	Name    string   // asked about
	At      string   // where the records are: Name or a parent; "" when there are none
	Records []Record // all, of any property
	Missing []Record // lets a pin issue, and is not there
	Foreign []Record // lets issue, or says who may, and is not ours
}

// OK reports whether the pins alone may issue.
func (r Report) OK() bool { return r.At != "" && len(r.Missing) == 0 && len(r.Foreign) == 0 }

// Err is nil when the pins alone may issue. Code caa_drift.
func (r Report) Err() error {
	if r.OK() {
		return nil
	}
	f := fault.New("caa_drift", "CAA at %s: %d of our records are missing, %d let others issue", r.Name, len(r.Missing), len(r.Foreign))
	if len(r.Missing) > 0 {
		f = f.WithFix("set at %s: %s", r.Name, join(r.Missing))
	} else if len(r.Foreign) > 0 {
		f = f.WithFix("remove at %s: %s", r.At, join(r.Foreign))
	}
	return f
}

func join(list []Record) string {
	text := make([]string, len(list))
	for i, r := range list {
		text[i] = `0 ` + strings.ToLower(r.Tag) + ` "` + clip(r.Value) + `"`
	}
	return strings.Join(text, ", ")
}

// Check asks the servers (host:port) what a CA would ask, and compares. Codes of [Build];
// caa_dns.
func Check(ctx context.Context, servers []string, name string, pins []Pin) (Report, error) {
	want, err := Build(pins)
	if err != nil {
		return Report{}, err
	}
	r := Report{Name: normal(name)}
	if r.At, r.Records, err = Lookup(ctx, servers, r.Name); err != nil {
		return Report{}, err
	}
	in := func(list []Record, x Record) bool {
		return slices.ContainsFunc(list, func(y Record) bool { return strings.EqualFold(x.Tag, y.Tag) && x.Value == y.Value })
	}
	for _, w := range want {
		if !in(r.Records, w) {
			r.Missing = append(r.Missing, w)
		}
	}
	for _, h := range r.Records {
		if h.issuance() && !in(want, h) {
			r.Foreign = append(r.Foreign, h)
		}
	}
	return r, nil
}

// Lookup returns the records that a CA goes by for a name: its own, along a CNAME, or those
// of the nearest parent that has any (RFC 8659 §3); at is "" without any. Code caa_dns.
func Lookup(ctx context.Context, servers []string, name string) (at string, set []Record, err error) {
	for at := normal(name); at != ""; _, at, _ = strings.Cut(at, ".") {
		set, err := ask(ctx, servers, at)
		if err != nil {
			return "", nil, fault.Wrap(err, "caa_dns", "asking for the CAA records of %s", clip(at))
		}
		if len(set) > 0 {
			return at, set, nil
		}
	}
	return "", nil, nil
}

// perServer bounds one question to one server.
const perServer = 5 * time.Second

func ask(ctx context.Context, servers []string, name string) ([]Record, error) {
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeCAA)
	q.SetEdns0(1232, false)
	err := errors.New("there is no resolver")
	for _, server := range servers {
		var in *dns.Msg
		for _, network := range []string{"udp", "tcp"} {
			client := dns.Client{Net: network, Timeout: perServer}
			if in, _, err = client.ExchangeContext(ctx, q, server); err != nil || !in.Truncated {
				break
			}
		}
		switch {
		case err != nil:
			continue
		case in.Rcode != dns.RcodeSuccess && in.Rcode != dns.RcodeNameError:
			err = errors.New(dns.RcodeToString[in.Rcode])
			continue
		}
		var set []Record
		for _, rr := range in.Answer {
			if c, ok := rr.(*dns.CAA); ok {
				set = append(set, Record{c.Flag, c.Tag, c.Value})
			}
		}
		return set, nil
	}
	return nil, err
}
