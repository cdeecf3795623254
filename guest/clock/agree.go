// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"slices"
	"time"
)

const (
	// maxError is how far an answer may leave the truth open, to each side.
	maxError = time.Second - tolerance
	// tolerance widens every answer: servers smear leap seconds differently, and the
	// machine's own clock drifts between two answers (500 ppm over the limit of a
	// proof: 15 ms).
	tolerance = 100 * time.Millisecond
)

// verdict is what the largest set of samples that can all be true has in common.
type verdict struct {
	origin  time.Time     // the median of the members, inside what they have in common
	open    time.Duration // half the width of what they have in common
	members []int
}

// agree finds the moments that lie in the most samples' intervals (Marzullo). Some
// largest set has in common an interval that starts where one of its members starts,
// so it is enough to try every start. Of equally large sets the one that leaves the
// least open counts. There must be a sample.
func agree(samples []Sample) verdict {
	zero := samples[0].Origin
	mid := make([]time.Duration, len(samples))
	low := make([]time.Duration, len(samples))
	high := make([]time.Duration, len(samples))
	for i, s := range samples {
		mid[i] = s.Origin.Sub(zero)
		low[i], high[i] = mid[i]-s.Error-tolerance, mid[i]+s.Error+tolerance
	}
	var best verdict
	for _, at := range low {
		var members []int
		var mids []time.Duration
		end := time.Duration(1<<63 - 1)
		for i := range samples {
			if low[i] <= at && at <= high[i] {
				members, mids = append(members, i), append(mids, mid[i])
				end = min(end, high[i])
			}
		}
		open := (end - at) / 2
		if len(members) < len(best.members) || len(members) == len(best.members) && open >= best.open {
			continue
		}
		best = verdict{zero.Add(min(max(median(mids), at), end)), open, members}
	}
	return best
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	a, b := d[(len(d)-1)/2], d[len(d)/2]
	return a + (b-a)/2
}
