// SPDX-License-Identifier: Apache-2.0

package fetch

import (
	"cmp"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/flight"
)

// HTTP says how to ask. The zero value is for production.
type HTTP struct {
	// RoundTripper carries requests; nil for one of our own with the system's roots
	// and the environment's proxy.
	RoundTripper http.RoundTripper
	Timeout      time.Duration // of one attempt with its body; zero for 30 s
	Total        time.Duration // of one item with all attempts; zero for 120 s
	Attempts     int           // at most this many for one item; zero for 3
	Backoff      time.Duration // before the second attempt, doubled before each next; zero for 500 ms
	UserAgent    string        // empty for dstack
}

// maxRetryAfter is the longest that a server may make us wait between attempts; a
// caller who is told to come back later than that is told so at once.
const maxRetryAfter = 30 * time.Second

// maxHeader bounds a response's header in bytes; issuer chains come in one.
const maxHeader = 128 << 10

// client gets items by HTTP.
type client struct {
	HTTP
	http *http.Client

	flights flight.Group[string, *answer] // by URL
}

// answer is a response of status 200.
type answer struct {
	header http.Header
	body   []byte
}

func newClient(h HTTP) *client {
	if h.RoundTripper == nil {
		h.RoundTripper = &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			ForceAttemptHTTP2:      true,
			TLSHandshakeTimeout:    10 * time.Second,
			IdleConnTimeout:        30 * time.Second,
			MaxConnsPerHost:        4,
			MaxResponseHeaderBytes: maxHeader,
		}
	}
	h.Timeout = cmp.Or(h.Timeout, 30*time.Second)
	h.Total = cmp.Or(h.Total, 120*time.Second)
	h.Attempts = cmp.Or(h.Attempts, 3)
	h.Backoff = cmp.Or(h.Backoff, 500*time.Millisecond)
	h.UserAgent = cmp.Or(h.UserAgent, "dstack")
	return &client{
		HTTP: h,
		http: &http.Client{Transport: h.RoundTripper, CheckRedirect: sameHost},
	}
}

var errRedirect = errors.New("redirect to another host, or more than 3")

// sameHost keeps redirects at the service that was asked: elsewhere is for the
// operator to configure, not for a server to choose (SSRF).
func sameHost(r *http.Request, via []*http.Request) error {
	if first := via[0].URL; len(via) > 3 || r.URL.Host != first.Host || r.URL.Scheme != first.Scheme {
		return errRedirect
	}
	return nil
}

// get returns one item of at most limit bytes. Callers that want the same URL at
// the same time share one request, which ends when the last of them has left.
func (c *client) get(ctx context.Context, what, url string, limit int) (*answer, error) {
	a, _, err := c.flights.Do(ctx, context.WithoutCancel(ctx), url, func(ctx context.Context) (*answer, error) {
		ctx, cancel := context.WithTimeout(ctx, c.Total)
		defer cancel()
		return c.try(ctx, what, url, limit)
	})
	if err != nil && err == ctx.Err() {
		return nil, fault.Wrap(err, "collateral_cancelled", "get the %s", what)
	}
	return a, err
}

// try asks until there is an answer, a refusal, or no attempt left.
func (c *client) try(ctx context.Context, what, url string, limit int) (*answer, error) {
	wait := c.Backoff
	for attempt := 1; ; attempt++ {
		a, problem := c.once(ctx, what, url, limit)
		if problem == nil {
			return a, nil
		}
		if !problem.again || problem.after > maxRetryAfter || attempt >= c.Attempts {
			return nil, problem.err
		}
		// Half of the wait is random, so that those who failed together do not come
		// back together.
		pause := max(wait/2+rand.N(wait/2+1), problem.after)
		select {
		case <-ctx.Done():
			return nil, problem.err
		case <-time.After(pause):
		}
		wait *= 2
	}
}

// problem is an attempt that failed.
type problem struct {
	err   *fault.Error
	again bool          // another attempt may do better
	after time.Duration // but not before
}

func (c *client) once(ctx context.Context, what, url string, limit int) (*answer, *problem) {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, &problem{err: fault.Wrap(err, "collateral_url", "get the %s", what)}
	}
	req.Header.Set("User-Agent", c.UserAgent)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, network(err, what)
	}
	defer resp.Body.Close()
	if p := status(resp, what); p != nil {
		return nil, p
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, int64(limit)+1))
	if err != nil {
		return nil, network(err, what)
	}
	if len(body) > limit {
		return nil, &problem{err: fault.New("collateral_too_large", "the %s exceeds %d bytes", what, limit)}
	}
	return &answer{resp.Header, body}, nil
}

func network(err error, what string) *problem {
	switch {
	case errors.Is(err, errRedirect):
		return &problem{err: fault.Wrap(err, "collateral_redirect", "get the %s", what).WithFix("configure the URL of the service itself")}
	case errors.Is(err, context.DeadlineExceeded):
		return &problem{err: fault.Wrap(err, "collateral_timeout", "get the %s", what).WithFix("check the network, or give collateral in files"), again: true}
	}
	return &problem{err: fault.Wrap(err, "collateral_network", "get the %s", what).WithFix("check the network and proxy, or give collateral in files"), again: true}
}

// status says what a status other than 200 means.
func status(resp *http.Response, what string) *problem {
	after := retryAfter(resp.Header.Get("Retry-After"))
	switch s := resp.StatusCode; {
	case s == http.StatusOK:
		return nil
	case s == http.StatusNotFound:
		return &problem{err: fault.New("collateral_not_found", "the service has no %s", what).WithFix("if the machine is genuine and new, try a newer service or wait for the vendor")}
	case s == http.StatusTooManyRequests:
		return &problem{err: fault.New("collateral_rate_limited", "the service answers too many requests (429) for the %s%s", what, laterThan(after)).
			WithFix("wait, keep the cache on, or run a cache of your own"), again: true, after: after}
	case s >= 500:
		return &problem{err: fault.New("collateral_unavailable", "the service fails with status %d for the %s%s", s, what, laterThan(after)).
			WithFix("try again later, or use another service"), again: true, after: after}
	case s/100 == 3:
		return &problem{err: fault.New("collateral_redirect", "the service redirects (status %d) to nowhere for the %s", s, what).WithFix("configure the URL of the service itself")}
	default:
		return &problem{err: fault.New("collateral_refused", "the service refuses with status %d to give the %s", s, what).WithFix("check the URL of the service")}
	}
}

func laterThan(after time.Duration) string {
	if after <= 0 {
		return ""
	}
	return "; it asks to come back in " + after.Round(time.Second).String()
}

// retryAfter reads seconds or a date (RFC 9110 section 10.2.3); zero if neither.
func retryAfter(value string) time.Duration {
	if n, err := strconv.ParseUint(value, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(time.Until(at), 0)
	}
	return 0
}
