// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

const (
	// DefaultGapLimit is the shortest time not run that is reported. It is longer than
	// what a busy host makes a guest wait in passing.
	DefaultGapLimit = time.Minute

	keepEvery  = 17 * time.Minute
	keepJitter = 4 * time.Minute
	// retryEvery is the pause after a proof that failed.
	retryEvery = time.Minute
	// tick is how often the clocks are compared with each other.
	tick = 10 * time.Second
	// slewLimit is the largest offset that is slewed: at the kernel's 500 ppm it is
	// gone before the next proof.
	slewLimit = 500 * time.Millisecond
)

// Gap says that the machine did not run.
type Gap struct {
	Length time.Duration
	Why    string
}

// reading of all clocks at once.
type reading struct {
	real, rtc           time.Time
	hasRTC              bool
	monotonic, boottime time.Duration
}

func (c *Clock) read() reading {
	sys := c.cfg.System
	rtc, err := sys.RTC()
	return reading{
		real: sys.Real(), rtc: rtc, hasRTC: err == nil,
		monotonic: sys.Monotonic(), boottime: sys.Boottime(),
	}
}

// Keep keeps the clock right until the context ends. Call it once, after Prove. A
// proof that fails leaves the clock as it is and is tried again.
func (c *Clock) Keep(ctx context.Context) {
	prev := c.read()
	asked := prev.monotonic
	due := asked + nextProof()
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := c.read()
		gap, suspect := c.compare(prev, now)
		if gap.Length > 0 {
			c.gap(gap)
			due = now.monotonic
		}
		if suspect {
			// A host that plays with the RTC cannot make us press the servers.
			due = min(due, asked+retryEvery)
		}
		if now.monotonic >= due {
			err := c.correct(ctx)
			now = c.read()
			asked = now.monotonic
			due = asked + nextProof()
			if err != nil && ctx.Err() == nil {
				c.cfg.Log("time: " + err.Error())
				due = asked + retryEvery
			}
		}
		prev = now
	}
}

func nextProof() time.Duration { return keepEvery - keepJitter + rand.N(2*keepJitter) }

// compare looks for a gap between two readings that should be a tick apart. A suspect
// RTC is the host's word and reason enough to ask, for no more.
func (c *Clock) compare(prev, now reading) (gap Gap, suspect bool) {
	limit := c.cfg.GapLimit
	ran := now.monotonic - prev.monotonic
	suspended := now.boottime - prev.boottime - ran
	stepped := now.real.Sub(prev.real) - ran
	switch {
	case suspended > limit:
		gap = Gap{suspended, "the machine was suspended"}
	case ran-tick > limit:
		gap = Gap{ran - tick, "the machine was stopped"}
	case stepped.Abs() > limit:
		gap = Gap{stepped.Abs(), "the real-time clock was changed"}
	}
	if now.hasRTC && prev.hasRTC {
		suspect = (now.rtc.Sub(prev.rtc) - ran).Abs() > limit
	}
	return gap, suspect
}

func (c *Clock) gap(g Gap) {
	c.cfg.Log(fmt.Sprintf("time: gap of %s: %s", g.Length.Round(time.Second), g.Why))
	if c.cfg.OnGap != nil {
		c.cfg.OnGap(g)
	}
}

// correct proves the time again and moves the clock. Where authenticated time went on
// while the monotonic clock stood still, it reports the gap.
func (c *Clock) correct(ctx context.Context) error {
	p, err := c.measure(ctx)
	if err != nil {
		return err
	}
	last, _, proven := c.Proven()
	if moved := p.Origin.Sub(last.Origin); proven && moved.Abs() > c.cfg.GapLimit {
		c.gap(Gap{moved.Abs(), "authenticated time and the monotonic clock went apart"})
	}
	// The offset is taken again: telling about a gap may have taken time.
	offset := p.now(c.cfg.System).Sub(c.cfg.System.Real())
	if offset.Abs() <= slewLimit {
		err = c.cfg.System.Slew(offset)
	} else {
		c.cfg.Log("time: stepping the clock: " + p.String())
		err = c.cfg.System.Set(p.now(c.cfg.System))
	}
	if err != nil {
		return fmt.Errorf("move the clock: %w", err)
	}
	c.keep(p)
	return nil
}
