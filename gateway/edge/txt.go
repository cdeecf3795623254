// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/flight"
)

// TXT asks for TXT records. It returns the first character string of the first answer and
// how long it may be kept; no answer, whether the name is there or not, is "" and no error.
type TXT interface {
	TXT(ctx context.Context, name hostname.Name) (value string, ttl time.Duration, err error)
}

// Bounds of what is remembered of an answer.
const (
	maxCached   = 16384
	minTTL      = 5 * time.Second // against records that ask to be asked for on every connection
	maxTTL      = 5 * time.Minute
	negativeTTL = 10 * time.Second
)

// resolver finds where custom domains lead, and bounds how often it asks.
type resolver struct {
	cfg   *Config
	stats *counters
	now   func() time.Time
	// adjusted has the limits and times in force.
	adjusted func() *Adjustable
	ctx      context.Context
	stop     context.CancelFunc
	runs     flight.Group[hostname.Name, found]

	mu     sync.Mutex
	cache  map[hostname.Name]found
	budget bucket
	wallet sourceBudget
}

// found is an outcome, also a failed one.
type found struct {
	answer hostname.Answer
	err    error
	until  time.Time
}

// sourceBudget charges a source for a look-up.
type sourceBudget interface {
	lookup(*source, time.Time) error
}

func newResolver(cfg *Config, adjusted func() *Adjustable, stats *counters, wallet sourceBudget) *resolver {
	r := &resolver{cfg: cfg, adjusted: adjusted, stats: stats, now: time.Now, cache: map[hostname.Name]found{}, wallet: wallet}
	r.ctx, r.stop = context.WithCancel(context.Background())
	return r
}

func (r *resolver) wait() {
	r.stop()
	r.runs.Wait()
}

// Leads returns where a custom domain leads, by its TXT record. Codes edge_no_txt, host_txt,
// host_port, edge_dns, edge_dns_budget.
func (e *Edge) Leads(ctx context.Context, name hostname.Name) (hostname.Answer, error) {
	return e.custom.lookup(ctx, nil, name)
}

// lookup returns where a custom domain leads. Codes edge_no_txt (no record), host_txt and
// host_port (a record that leads nowhere), edge_dns (no answer), edge_dns_budget,
// edge_dns_source_budget.
func (r *resolver) lookup(ctx context.Context, src *source, name hostname.Name) (hostname.Answer, error) {
	if r.cfg.TXT == nil {
		return hostname.Answer{}, fault.New("edge_no_txt", "the gateway serves no custom domains")
	}
	r.mu.Lock()
	f, ok := r.cache[name]
	r.mu.Unlock()
	if now := r.now(); ok && now.Before(f.until) {
		r.stats.lookupHits.Add(1)
		return f.answer, f.err
	} else if src != nil {
		if err := r.wallet.lookup(src, now); err != nil {
			return hostname.Answer{}, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, r.adjusted().Timeouts.DNS)
	defer cancel()
	f, _, err := r.runs.Do(ctx, r.ctx, name, func(ctx context.Context) (found, error) { return r.find(ctx, name) })
	if err != nil {
		if fault.Code(err) == "" {
			err = fault.Wrap(err, "edge_dns", "ask for the TXT record of %s", name)
		}
		return hostname.Answer{}, err
	}
	return f.answer, f.err
}

// find asks, and remembers. Its error is not remembered; that in found is.
func (r *resolver) find(ctx context.Context, name hostname.Name) (found, error) {
	r.mu.Lock()
	n := r.adjusted().Limits.Lookups
	ok := r.budget.take(r.now(), n, 2*n)
	r.mu.Unlock()
	if !ok {
		return found{}, fault.New("edge_dns_budget", "the gateway asks for no more than %d unknown domains a second", n)
	}
	r.stats.lookups.Add(1)
	ctx, cancel := context.WithTimeout(ctx, r.adjusted().Timeouts.DNS)
	defer cancel()
	value, ttl, err := r.ask(ctx, name)
	var f found
	switch {
	case err != nil:
		f.err = fault.Wrap(err, "edge_dns", "ask for the TXT record of %s", name)
	case value == "":
		f.err = fault.New("edge_no_txt", "the domain %s has no TXT record that leads to an app", name).
			WithFix("set %s.%s to <app id>:<port>", hostname.TXTPrefix, name)
	default:
		f.answer, f.err = hostname.ParseTXT(value)
	}
	if ctx.Err() != nil {
		return f, nil
	}
	keep := negativeTTL
	if f.err == nil {
		keep = min(max(ttl, minTTL), maxTTL)
	}
	f.until = r.now().Add(keep)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.cache) >= maxCached {
		r.evict()
	}
	r.cache[name] = f
	return f, nil
}

// evict drops failures first, for a stranger can make any number of them.
func (r *resolver) evict() {
	target := maxCached * 3 / 4
	now := r.now()
	for _, drop := range []func(found) bool{
		func(f found) bool { return !now.Before(f.until) },
		func(f found) bool { return f.err != nil },
		func(found) bool { return true },
	} {
		for name, f := range r.cache {
			if len(r.cache) <= target {
				return
			}
			if drop(f) {
				delete(r.cache, name)
			}
		}
	}
}

// ask puts the questions of spec/gateway.md §2.4 in their order.
func (r *resolver) ask(ctx context.Context, name hostname.Name) (string, time.Duration, error) {
	q, err := hostname.TXTNames(name, r.cfg.TXTPrefix, r.cfg.TXTCompat)
	if err != nil {
		return "", 0, err
	}
	type reply struct {
		value string
		ttl   time.Duration
		err   error
	}
	replies := make([]reply, len(q.Exact))
	var wg sync.WaitGroup
	for i, n := range q.Exact {
		wg.Go(func() { replies[i].value, replies[i].ttl, replies[i].err = r.cfg.TXT.TXT(ctx, n) })
	}
	wg.Wait()
	for _, a := range replies {
		if a.err != nil {
			err = a.err
		} else if a.value != "" {
			return a.value, a.ttl, nil
		}
	}
	if q.Wildcard == "" {
		return "", 0, err
	}
	return r.cfg.TXT.TXT(ctx, q.Wildcard)
}

// DNS asks servers ("address:port") in their order, by UDP, and by TCP where an answer
// does not fit. Answers are as trustworthy as the way to the servers; a false one leads to
// another app, which has no certificate of the name.
type DNS struct{ Servers []string }

// SystemDNS returns the servers of /etc/resolv.conf.
func SystemDNS() (DNS, error) {
	c, err := dns.ClientConfigFromFile("/etc/resolv.conf")
	if err != nil {
		return DNS{}, err
	}
	var d DNS
	for _, s := range c.Servers {
		d.Servers = append(d.Servers, net.JoinHostPort(s, c.Port))
	}
	return d, nil
}

// perServer bounds one question to one server, so that a dead one leaves time for others.
const perServer = 1500 * time.Millisecond

// TXT implements [TXT].
func (d DNS) TXT(ctx context.Context, name hostname.Name) (string, time.Duration, error) {
	m := new(dns.Msg)
	m.SetQuestion(string(name)+".", dns.TypeTXT)
	m.SetEdns0(1232, false)
	last := errors.New("no DNS server is configured")
	for _, server := range d.Servers {
		in, err := d.exchange(ctx, m, server)
		switch {
		case err != nil:
			last = err
		case in.Rcode == dns.RcodeNameError:
			return "", 0, nil
		case in.Rcode != dns.RcodeSuccess:
			last = errors.New("the DNS server " + server + " answers " + dns.RcodeToString[in.Rcode])
		default:
			value, ttl := firstTXT(in)
			return value, ttl, nil
		}
	}
	return "", 0, last
}

func (d DNS) exchange(ctx context.Context, m *dns.Msg, server string) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, perServer)
	defer cancel()
	in, _, err := (&dns.Client{Net: "udp"}).ExchangeContext(ctx, m, server)
	if err == nil && in.Truncated {
		in, _, err = (&dns.Client{Net: "tcp"}).ExchangeContext(ctx, m, server)
	}
	return in, err
}

// firstTXT returns the first record's first string, and the shortest life on the way to it.
func firstTXT(in *dns.Msg) (value string, ttl time.Duration) {
	ttl = maxTTL
	for _, rr := range in.Answer {
		ttl = min(ttl, time.Duration(rr.Header().Ttl)*time.Second)
		if t, ok := rr.(*dns.TXT); ok && len(t.Txt) > 0 {
			return t.Txt[0], ttl
		}
	}
	return "", 0
}
