// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var truth = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// said returns samples that are off by so much, each open by err.
func said(err time.Duration, offs ...time.Duration) []Sample {
	var out []Sample
	for _, off := range offs {
		out = append(out, Sample{Origin: truth.Add(off), Error: err})
	}
	return out
}

func TestAgree(t *testing.T) {
	const ms, day = time.Millisecond, 24 * time.Hour
	for name, c := range map[string]struct {
		samples []Sample
		members []int
		off     time.Duration
	}{
		"one alone":                        {said(10*ms, 5*ms), []int{0}, 5 * ms},
		"the median of those that agree":   {said(10*ms, 0, 30*ms, 4*ms), []int{0, 1, 2}, 4 * ms},
		"the mean of the middle two":       {said(10*ms, 0, 10*ms, 20*ms, 40*ms), []int{0, 1, 2, 3}, 15 * ms},
		"a liar does not move the median":  {said(10*ms, 0, day, 4*ms), []int{0, 2}, 2 * ms},
		"two liars that differ":            {said(10*ms, day, 0, -day, 4*ms, 6*ms), []int{1, 3, 4}, 4 * ms},
		"the larger set wins":              {said(10*ms, day, day, 0, 0, 0), []int{2, 3, 4}, 0},
		"of equal sets the tighter":        {append(said(500*ms, day, day), said(ms, 0, 0)...), []int{2, 3}, 0},
		"inside what all have in common":   {append(said(ms, 0), said(800*ms, 700*ms, 750*ms)...), []int{0, 1, 2}, 101 * ms},
		"a chain has no common point":      {said(0, 0, 150*ms, 300*ms, 450*ms), []int{0, 1}, 75 * ms},
		"touching intervals have a moment": {said(0, 0, 200*ms), []int{0, 1}, 100 * ms},
	} {
		v := agree(c.samples)
		if !slices.Equal(v.members, c.members) || v.origin.Sub(truth) != c.off {
			t.Errorf("%s: members %v, off by %s; want %v, %s", name, v.members, v.origin.Sub(truth), c.members, c.off)
		}
	}
}

// Whatever fewer than half of the servers say, a majority that agrees is right within
// 2 s; honest ones alone are found.
func TestAgreeAgainstAnyMinority(t *testing.T) {
	for round := range 20000 {
		n := 3 + rand.IntN(MaxSources-2)
		liars := rand.IntN(n - majority(n) + 1)
		var samples []Sample
		for i := range n {
			err := rand.N(maxError + 1)
			off := rand.N(2*err+1) - err // honest: the interval contains the truth
			if i < liars {
				off = rand.N(8*time.Second) - 4*time.Second
			}
			samples = append(samples, Sample{Origin: truth.Add(off), Error: err})
		}
		rand.Shuffle(n, func(i, j int) { samples[i], samples[j] = samples[j], samples[i] })
		v := agree(samples)
		if len(v.members) < majority(n) {
			t.Fatalf("round %d: %d of %d agree, with %d liars", round, len(v.members), n, liars)
		}
		if off := v.origin.Sub(truth).Abs(); off > 2*time.Second {
			t.Fatalf("round %d: off by %s with %d liars of %d", round, off, liars, n)
		}
	}
}

func TestTimestampsAfter2036AreOfTheNextEra(t *testing.T) {
	wrapped := time.Date(1900, 6, 1, 0, 0, 0, 0, time.UTC)
	if got := inEra(wrapped, truth); got.Year() != 2036 {
		t.Errorf("got %s", got)
	}
	if got := inEra(truth, truth.AddDate(1, 0, 0)); !got.Equal(truth) {
		t.Errorf("a time before the bound became %s", got)
	}
}
