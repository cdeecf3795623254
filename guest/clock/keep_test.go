// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// world is true time and a guest in it, inside a synctest bubble, whose time is the
// guest's monotonic clock: it does not know of the time that the guest missed.
type world struct {
	start time.Time

	mu        sync.Mutex
	stopped   time.Duration // missed by all clocks of the guest
	suspended time.Duration // missed by all but Boottime
	real      time.Duration // what the real-time clock is off by from the bubble's time
	rtc       bool
	rtcLie    time.Duration
	steps     []time.Duration
	slews     []time.Duration
	asked     int
	down      bool          // no server answers
	wrong     time.Duration // what all servers are off by
	setErr    error
}

func newWorld() *world { return &world{start: time.Now(), rtc: true} }

func (w *world) locked(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// truth is called with the lock held.
func (w *world) truth() time.Time { return time.Now().Add(w.stopped + w.suspended) }

// off is what the real-time clock is off by.
func (w *world) off() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.real - w.stopped - w.suspended
}

func (w *world) Monotonic() time.Duration { return time.Since(w.start) }

func (w *world) Boottime() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Since(w.start) + w.suspended
}

func (w *world) Real() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.real)
}

func (w *world) RTC() (time.Time, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.rtc {
		return time.Time{}, errors.New("no RTC")
	}
	return w.truth().Add(w.rtcLie), nil
}

func (w *world) Set(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.setErr != nil {
		return w.setErr
	}
	by := time.Until(t) - w.real
	w.steps = append(w.steps, by)
	w.real += by
	return nil
}

func (w *world) Slew(d time.Duration) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.slews = append(w.slews, d)
	w.real += d
	return nil
}

// server of the world.
type server struct {
	w    *world
	name string
	// fails is how often it does not answer first.
	fails int
}

func (s *server) Name() string { return s.name }

func (s *server) Query(ctx context.Context, _ time.Time) (Sample, error) {
	mono := s.w.Monotonic()
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.w.asked++
	if s.w.down {
		return Sample{}, errors.New("no route")
	}
	if s.fails > 0 {
		s.fails--
		return Sample{}, errors.New("no route")
	}
	return Sample{Origin: s.w.truth().Add(s.w.wrong - mono), Error: 10 * time.Millisecond}, nil
}

// kept is a clock of the world that has proven its time and is kept; it returns the
// gaps reported so far and how to end it.
func kept(t *testing.T, w *world) (gaps func() []Gap, end func()) {
	t.Helper()
	var mu sync.Mutex
	var seen []Gap
	c, err := New(Config{
		Sources: []Source{&server{w: w, name: "a"}, &server{w: w, name: "b"}, &server{w: w, name: "c"}},
		Bounds:  []LowerBound{{w.truth().AddDate(0, -1, 0), "the build"}},
		System:  w, Log: func(s string) { t.Log(time.Since(w.start), s) },
		OnGap: func(g Gap) {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, g)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Prove(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Keep(ctx)
	}()
	return func() []Gap {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(seen)
		}, func() {
			cancel()
			<-done
		}
}

func TestThreat_F02_AGapIsReported(t *testing.T) {
	const pause = 10 * time.Minute
	for name, c := range map[string]struct {
		happen func(w *world)
		within time.Duration // in which it must be reported
		why    string
	}{
		"suspended": {func(w *world) { w.suspended += pause }, tick, "suspended"},
		"stopped with its clocks, and an RTC that says so": {func(w *world) { w.stopped += pause }, tick, "went apart"},
		"stopped with its clocks, and no RTC":              {func(w *world) { w.rtc, w.stopped = false, pause }, keepEvery + keepJitter + tick, "went apart"},
		"the clock was changed":                            {func(w *world) { w.real -= pause }, tick, "real-time clock was changed"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				gaps, end := kept(t, w)
				defer end()
				time.Sleep(2*time.Minute + tick/2)
				if got := gaps(); len(got) > 0 {
					t.Fatalf("gaps before any: %v", got)
				}
				w.locked(func() { c.happen(w) })
				time.Sleep(c.within)
				synctest.Wait()
				got := gaps()
				if len(got) == 0 || !strings.Contains(got[0].Why, c.why) || (got[0].Length-pause).Abs() > tick {
					t.Fatalf("gaps: %v, want one of %s: %s", got, pause, c.why)
				}
				if off := w.off().Abs(); off > 2*time.Second {
					t.Errorf("the clock is off by %s after the gap", off)
				}
			})
		})
	}
}

// A machine that is stopped while its monotonic clock runs on finds its timers late.
func TestThreat_F02_LateTimersAreAGap(t *testing.T) {
	c := &Clock{cfg: Config{GapLimit: DefaultGapLimit}}
	at := func(mono time.Duration) reading {
		return reading{real: truth.Add(mono), rtc: truth.Add(mono), hasRTC: true, monotonic: mono, boottime: mono}
	}
	if g, suspect := c.compare(at(0), at(tick+10*time.Minute)); g.Length != 10*time.Minute || suspect {
		t.Errorf("got %v, %v", g, suspect)
	}
	if g, suspect := c.compare(at(0), at(tick+30*time.Second)); g.Length != 0 || suspect {
		t.Errorf("a busy host: got %v, %v", g, suspect)
	}
}

func TestKeepSlewsWhatIsSmallAndStepsWhatIsLarge(t *testing.T) {
	for _, drift := range []time.Duration{300 * time.Millisecond, -300 * time.Millisecond, 3 * time.Second, -3 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			gaps, end := kept(t, w)
			defer end()
			time.Sleep(tick / 2)
			w.locked(func() { w.steps = nil; w.real += drift })
			time.Sleep(keepEvery + keepJitter + tick)
			synctest.Wait()
			want := []time.Duration{-drift}
			w.locked(func() {
				if small := drift.Abs() < slewLimit; small && (!slices.Equal(w.slews, want) || w.steps != nil) || !small && (!slices.Equal(w.steps, want) || w.slews != nil) {
					t.Errorf("drift %s: slews %v, steps %v", drift, w.slews, w.steps)
				}
			})
			if got := gaps(); got != nil {
				t.Errorf("gaps: %v", got)
			}
		})
	}
}

func TestKeepAsksSlowlyAndTriesAgainWhatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		_, end := kept(t, w)
		defer end()
		time.Sleep(3 * time.Hour)
		w.locked(func() {
			if rounds := w.asked / 3; rounds < 8 || rounds > 15 {
				t.Errorf("%d rounds in three hours", rounds)
			}
			w.down, w.asked, w.steps, w.slews = true, 0, nil, nil
		})
		time.Sleep(time.Hour)
		w.locked(func() {
			if w.steps != nil || w.slews != nil {
				t.Errorf("the clock moved without a proof: %v %v", w.steps, w.slews)
			}
			w.down, w.real = false, 5*time.Second
		})
		time.Sleep(retryEvery + DefaultLimit + 2*tick)
		if off := w.off().Abs(); off > time.Second {
			t.Errorf("the clock is off by %s after the servers came back", off)
		}
	})
}

func TestAnRTCThatJumpsCannotPressTheServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		gaps, end := kept(t, w)
		defer end()
		time.Sleep(tick / 2)
		w.locked(func() { w.asked = 0 })
		for range 360 { // an hour
			time.Sleep(tick)
			w.locked(func() { w.rtcLie += time.Hour })
		}
		w.locked(func() {
			if rounds := w.asked / 3; rounds < 30 || rounds > 60 {
				t.Errorf("%d rounds in an hour", rounds)
			}
		})
		if got := gaps(); got != nil {
			t.Errorf("the RTC's word was taken: %v", got)
		}
	})
}

func TestProveTriesAgainUntilTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		sources := []Source{&server{w: w, name: "a", fails: 2}, &server{w: w, name: "b"}, &server{w: w, name: "c"}}
		c, err := New(Config{Sources: sources, System: w, Bounds: []LowerBound{{w.truth().AddDate(0, -1, 0), "the build"}}})
		if err != nil {
			t.Fatal(err)
		}
		p, err := c.Prove(t.Context())
		if err != nil || p.Took != 3*firstPause {
			t.Errorf("got %v, %v; want a proof after two pauses", p, err)
		}
		w.locked(func() { w.down = true })
		start := time.Now()
		if _, err = c.Prove(t.Context()); fault.Code(err) != "time_unproven" || time.Since(start) != DefaultLimit {
			t.Errorf("got %v after %s", err, time.Since(start))
		}
		// The caller's own limit is kept as well.
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		start = time.Now()
		if _, err = c.Prove(ctx); fault.Code(err) != "time_unproven" || time.Since(start) != 2*time.Second {
			t.Errorf("got %v after %s", err, time.Since(start))
		}
		w.locked(func() { w.down, w.setErr = false, errors.New("not permitted") })
		if _, err = c.Prove(t.Context()); fault.Code(err) != "time_set" {
			t.Errorf("got %v", err)
		}
	})
}

// wide answers truly and says that it may be off by much.
type wide struct{ server }

func (s *wide) Query(ctx context.Context, t time.Time) (Sample, error) {
	sample, err := s.server.Query(ctx, t)
	sample.Error = maxError + time.Millisecond
	return sample, err
}

// A host that delays packets must not be able to move the clock by the delay.
func TestThreat_F01_AnAnswerThatLeavesTooMuchOpenIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		c, err := New(Config{
			Sources: []Source{&server{w: w, name: "a"}, &server{w: w, name: "b"}, &wide{server{w: w, name: "c"}}},
			System:  w, Bounds: []LowerBound{{w.truth().AddDate(0, -1, 0), "the build"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Prove(t.Context()); fault.Code(err) != "time_unproven" || !strings.Contains(err.Error(), "may be off by") {
			t.Errorf("got %v", err)
		}
	})
}

func TestLowerBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		sources := []Source{&server{w: w, name: "a"}, &server{w: w, name: "b"}, &server{w: w, name: "c"}}
		now := w.truth()
		c, err := New(Config{Sources: sources, System: w, Bounds: []LowerBound{{now.Add(-time.Hour), "the build"}, {now.Add(-2 * time.Hour), "the code"}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, ok := c.Proven(); ok {
			t.Error("something is proven before anything was asked")
		}
		w.locked(func() { w.wrong = -time.Hour - time.Second })
		if _, err := c.Prove(t.Context()); fault.Code(err) != "time_before_bound" || !strings.Contains(err.Error(), "the build") {
			t.Errorf("a second before the bound: got %v", err)
		}
		w.locked(func() {
			if w.steps != nil {
				t.Errorf("the clock moved: %v", w.steps)
			}
			w.wrong = -time.Hour + time.Second
		})
		if _, err := c.Prove(t.Context()); err != nil {
			t.Errorf("a second after the bound: %v", err)
		}
		if err := c.Raise(LowerBound{now.Add(-90 * time.Minute), "an old document"}); err != nil {
			t.Errorf("an older bound: %v", err)
		}
		// The clock was set an hour back; what becomes known later shows it.
		if err := c.Raise(LowerBound{now.Add(-time.Minute), "the KMS"}); fault.Code(err) != "time_before_bound" {
			t.Errorf("got %v", err)
		}
		if _, err := c.Prove(t.Context()); fault.Code(err) != "time_before_bound" || !strings.Contains(err.Error(), "the KMS") {
			t.Errorf("got %v", err)
		}
		w.locked(func() { w.wrong = 0 })
		if _, err := c.Prove(t.Context()); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		if p, age, ok := c.Proven(); !ok || age != time.Minute || len(p.Agreed) != 3 {
			t.Errorf("got %v, %s, %v", p, age, ok)
		}
	})
}

func TestNewWantsEnoughDistinctServers(t *testing.T) {
	w := &world{}
	bounds := []LowerBound{{truth, "the build"}}
	list := func(names ...string) (out []Source) {
		for _, n := range names {
			out = append(out, &server{w: w, name: n})
		}
		return out
	}
	many := make([]string, MaxSources+1)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	for _, bad := range [][]Source{nil, list("a", "b"), list("a", "b", "A"), list(many...)} {
		if _, err := New(Config{Sources: bad, Bounds: bounds, System: w}); fault.Code(err) != "time_servers" {
			t.Errorf("%d servers: got %v", len(bad), err)
		}
	}
	if _, err := New(Config{Sources: list("a", "b", "c"), System: w}); err == nil {
		t.Error("a clock without a lower bound was made")
	}
}

func TestTheDefaultServersAreOfDistinctOperators(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range DefaultServers(nil) {
		host, port, ok := strings.Cut(s.Host, ":")
		labels := strings.Split(host, ".")
		operator := strings.Join(labels[len(labels)-2:], ".")
		if !ok || port != "4460" || seen[operator] {
			t.Errorf("%s: port %s, operator %s", s.Host, port, operator)
		}
		seen[operator] = true
	}
	if len(seen) < Required+2 {
		t.Errorf("%d operators: two that fail leave too few", len(seen))
	}
}

func TestParseRoots(t *testing.T) {
	if _, err := ParseRoots([]byte("nothing")); fault.Code(err) != "time_roots" {
		t.Errorf("got %v", err)
	}
	if _, err := ReadRoots("/does/not/exist"); fault.Code(err) != "time_roots" {
		t.Errorf("got %v", err)
	}
}

// The clocks of this machine, read only.
func TestLinux(t *testing.T) {
	var l Linux
	if d := time.Until(l.Real()).Abs(); d > time.Minute {
		t.Errorf("the real-time clock is off by %s", d)
	}
	a := l.Monotonic()
	b := l.Monotonic()
	if a <= 0 || b < a || l.Boottime() < a {
		t.Errorf("monotonic %s, %s, boottime %s", a, b, l.Boottime())
	}
}
