// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	// Required is how many servers must have answered before any time is believed.
	Required = 3
	// MaxSources bounds the list.
	MaxSources = 16
	// DefaultLimit is how long Prove tries.
	DefaultLimit = 30 * time.Second

	// attemptLimit is for one attempt at one server: name, TLS, question, answer.
	attemptLimit = 5 * time.Second
	// Pause before a server is asked again; it doubles.
	firstPause, lastPause = time.Second, 8 * time.Second
)

// Source is a server whose answers are authenticated.
type Source interface {
	// Name of the server, for reports.
	Name() string
	// Query asks once. Whatever makes the answer authentic must have held at some
	// moment not before notBefore.
	Query(ctx context.Context, notBefore time.Time) (Sample, error)
}

// Sample is one answer.
type Sample struct {
	// Origin is the true time, by this server, at the zero of the monotonic clock.
	Origin time.Time
	// Error bounds how far the truth can be from Origin to each side if the server is
	// honest: half of the round trip, and the server's distance from its reference.
	Error time.Duration
	// ValidAt says whether what authenticates the answer holds at a given time; nil
	// when that does not depend on time.
	ValidAt func(time.Time) error
}

// LowerBound is a time that is known to have passed.
type LowerBound struct {
	Time time.Time
	Why  string // such as "the build of the image"
}

// System is the machine's clocks.
type System interface {
	// Real is the clock that everybody reads.
	Real() time.Time
	// Monotonic runs since some zero, at the rate of time, while the machine runs.
	Monotonic() time.Duration
	// Boottime is Monotonic plus the time suspended.
	Boottime() time.Duration
	// RTC is the battery clock, a hint from the host.
	RTC() (time.Time, error)
	// Set steps the real-time clock.
	Set(time.Time) error
	// Slew lets it run faster or slower until it has moved by the offset.
	Slew(offset time.Duration) error
}

// Config of a Clock.
type Config struct {
	// Sources are the servers, [Required] to [MaxSources], each once.
	Sources []Source
	// Bounds are the lower bounds known at start; there must be one.
	Bounds []LowerBound
	System System
	// Limit is how long one proof is tried; zero for DefaultLimit.
	Limit time.Duration
	// OnGap is told by Keep that the machine did not run for a while: whatever expires
	// must be looked at before anything is served again. It is called with the clock
	// still as it was; nil ignores gaps.
	OnGap func(Gap)
	// GapLimit is how long a gap must be; zero for DefaultGapLimit.
	GapLimit time.Duration
	// Log takes a line for the console; nil drops it.
	Log func(string)
}

// Clock proves and keeps the time of one machine.
type Clock struct {
	cfg Config

	mu     sync.Mutex
	bound  LowerBound // the highest
	last   Proof
	proven bool
}

// New returns a clock that has proven nothing yet. Code time_servers.
func New(cfg Config) (*Clock, error) {
	if n := len(cfg.Sources); n < Required || n > MaxSources {
		return nil, fault.New("time_servers", "there are %d time servers; %d to %d are needed, so that one which lies is outvoted", n, Required, MaxSources)
	}
	seen := map[string]bool{}
	for _, s := range cfg.Sources {
		name := strings.ToLower(s.Name())
		if seen[name] {
			return nil, fault.New("time_servers", "the time server %s is listed twice, and would have two votes", s.Name())
		}
		seen[name] = true
	}
	if len(cfg.Bounds) == 0 {
		return nil, errors.New("clock: no lower bound")
	}
	if cfg.Limit == 0 {
		cfg.Limit = DefaultLimit
	}
	if cfg.GapLimit == 0 {
		cfg.GapLimit = DefaultGapLimit
	}
	if cfg.Log == nil {
		cfg.Log = func(string) {}
	}
	highest := slices.MaxFunc(cfg.Bounds, func(a, b LowerBound) int { return a.Time.Compare(b.Time) })
	return &Clock{cfg: cfg, bound: highest}, nil
}

// Proof says what the time is and who vouches for it.
type Proof struct {
	Origin  time.Time     // the true time at the zero of the monotonic clock
	Error   time.Duration // how far the agreeing servers leave it open, to each side
	Offset  time.Duration // what the real-time clock lacked
	Agreed  []string      // the servers that agree
	Ignored []string      // the others, each with its reason
	Took    time.Duration

	provenAt time.Duration // by the monotonic clock
}

// String is for the console.
func (p Proof) String() string {
	text := fmt.Sprintf("%d of %d servers agree within %s after %s; the clock was off by %s",
		len(p.Agreed), len(p.Agreed)+len(p.Ignored), p.Error.Round(time.Millisecond), p.Took.Round(time.Millisecond), p.Offset.Round(time.Millisecond))
	if len(p.Ignored) > 0 {
		text += "; not used: " + strings.Join(p.Ignored, "; ")
	}
	return text
}

// Proven returns the last proof and its age by the monotonic clock. Before the first
// there is none.
func (c *Clock) Proven() (Proof, time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last, c.cfg.System.Monotonic() - c.last.provenAt, c.proven
}

// Prove finds the time and steps the real-time clock to it. Codes: time_unproven (too
// few authentic answers within the limit), time_disagreement (enough, but no majority
// agrees), time_before_bound (a majority agrees on a time that has passed).
func (c *Clock) Prove(ctx context.Context) (Proof, error) {
	p, err := c.measure(ctx)
	if err != nil {
		return Proof{}, err
	}
	if err := c.cfg.System.Set(p.now(c.cfg.System)); err != nil {
		return Proof{}, fault.Wrap(err, "time_set", "set the clock")
	}
	c.keep(p)
	return p, nil
}

// Raise adds a lower bound that became known later. Code time_before_bound when the
// time proven before contradicts it, which then must not be relied on.
func (c *Clock) Raise(b LowerBound) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b.Time.After(c.bound.Time) {
		c.bound = b
	}
	if !c.proven {
		return nil
	}
	return c.last.after(c.bound, c.cfg.System)
}

func (c *Clock) keep(p Proof) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last, c.proven = p, true
}

func (c *Clock) lowest() LowerBound {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bound
}

func (p Proof) now(sys System) time.Time { return p.Origin.Add(sys.Monotonic()) }

// after holds the proof against a bound. The proof's own uncertainty counts in its
// favour, as a bound may be seconds old.
func (p Proof) after(b LowerBound, sys System) error {
	if now := p.now(sys); now.Add(p.Error).Before(b.Time) {
		return fault.New("time_before_bound", "the time servers agree on %s, but it was %s already at %s",
			now.UTC().Format(time.RFC3339), b.Time.UTC().Format(time.RFC3339), b.Why).
			WithFix("look for what is wrong with most of the time servers, or pin others with time_servers in the manifest")
	}
	return nil
}

// state of one source during a proof.
type state struct {
	sample *Sample
	why    error // the last reason for having no sample
	pause  time.Duration
}

type answer struct {
	source int
	sample Sample
	err    error
}

// measure asks all sources at once, those that fail again, and ends as soon as a
// majority agrees: more answers could not outvote it.
func (c *Clock) measure(ctx context.Context) (Proof, error) {
	sys, bound := c.cfg.System, c.lowest()
	start := sys.Monotonic()
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Limit)

	// Each source has at most one attempt under way, so that sending never blocks.
	answers := make(chan answer, len(c.cfg.Sources))
	var attempts sync.WaitGroup
	defer attempts.Wait()
	defer cancel()
	ask := func(i int, pause time.Duration) {
		attempts.Go(func() {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
			ctx, cancel := context.WithTimeout(ctx, attemptLimit)
			defer cancel()
			s, err := c.cfg.Sources[i].Query(ctx, bound.Time)
			answers <- answer{i, s, err}
		})
	}
	states := make([]state, len(c.cfg.Sources))
	again := func(i int, why error) {
		st := &states[i]
		st.sample, st.why = nil, why
		st.pause = min(max(2*st.pause, firstPause), lastPause)
		ask(i, st.pause)
	}
	for i := range states {
		states[i].why = errors.New("no answer")
		ask(i, 0)
	}
	for {
		select {
		case <-ctx.Done():
			return Proof{}, c.refuse(states)
		case a := <-answers:
			if a.err == nil && a.sample.Error > maxError {
				a.err = fmt.Errorf("the answer may be off by %s", a.sample.Error.Round(time.Millisecond))
			}
			if a.err != nil {
				again(a.source, a.err)
				continue
			}
			states[a.source].sample = &a.sample
		}
		p, agreed, ok := c.decide(states)
		if !ok {
			if !slices.ContainsFunc(states, func(s state) bool { return s.sample == nil }) {
				return Proof{}, c.refuse(states) // all have spoken
			}
			continue
		}
		// The time is found if the answers that it rests on hold at that time.
		now, expired := p.now(sys), false
		for _, i := range agreed {
			if valid := states[i].sample.ValidAt; valid != nil {
				if err := valid(now); err != nil {
					expired = true
					again(i, err)
				}
			}
		}
		if expired {
			continue
		}
		if err := p.after(bound, sys); err != nil {
			return Proof{}, err
		}
		for i, st := range states {
			name := c.cfg.Sources[i].Name()
			switch {
			case slices.Contains(agreed, i):
				p.Agreed = append(p.Agreed, name)
			case st.sample != nil:
				p.Ignored = append(p.Ignored, fmt.Sprintf("%s: is off by %s", name, st.sample.Origin.Sub(p.Origin).Round(time.Millisecond)))
			default:
				p.Ignored = append(p.Ignored, fmt.Sprintf("%s: %v", name, st.why))
			}
		}
		p.provenAt = sys.Monotonic()
		p.Took, p.Offset = p.provenAt-start, p.now(sys).Sub(sys.Real())
		return p, nil
	}
}

// decide looks for a majority of all sources, and says which it is.
func (c *Clock) decide(states []state) (p Proof, agreed []int, ok bool) {
	var samples []Sample
	var who []int
	for i, st := range states {
		if st.sample != nil {
			samples, who = append(samples, *st.sample), append(who, i)
		}
	}
	if len(samples) < Required {
		return Proof{}, nil, false
	}
	v := agree(samples)
	if len(v.members) < majority(len(states)) {
		return Proof{}, nil, false
	}
	for _, m := range v.members {
		agreed = append(agreed, who[m])
	}
	return Proof{Origin: v.origin, Error: v.open}, agreed, true
}

func majority(n int) int { return n/2 + 1 }

// refuse tells why no time was found.
func (c *Clock) refuse(states []state) error {
	var silent, spoke []string
	for i, st := range states {
		name := c.cfg.Sources[i].Name()
		if st.sample == nil {
			silent = append(silent, fmt.Sprintf("%s: %v", name, st.why))
		} else {
			spoke = append(spoke, fmt.Sprintf("%s: %s", name, st.sample.Origin.Add(c.cfg.System.Monotonic()).UTC().Format(time.RFC3339)))
		}
	}
	need := max(Required, majority(len(states)))
	if len(spoke) >= need {
		return fault.New("time_disagreement", "no majority of the %d time servers agrees: %s", len(states), strings.Join(append(spoke, silent...), "; ")).
			WithFix("leave out the servers that are wrong, or pin others with time_servers in the manifest")
	}
	return fault.New("time_unproven", "%d of %d time servers gave an authentic answer, %d are needed: %s", len(spoke), len(states), need, strings.Join(silent, "; ")).
		WithFix("let the VM reach the servers (TCP 4460, UDP 123), pin reachable ones with time_servers in the manifest, or set \"secure_time\": false; verdicts then say \"time: host\"")
}
