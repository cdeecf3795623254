// SPDX-License-Identifier: Apache-2.0

package boottest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/guest/clock/clocktest"
	"github.com/dstack-go/dstack/manifest"
)

// A VM whose RTC is years off, and time servers on its host: the clock is right before
// the phase of the keys, or that phase does not come.
func TestThreat_F01_AVMWithAWrongRTC(t *testing.T) {
	b := setup(t)
	if os.Getenv("DSTACK_TEST_BOOTS") != "all" {
		t.Skip("SKIP: DSTACK_TEST_BOOTS is not all")
	}
	ca := clocktest.NewAuthority(t)
	const day = 24 * time.Hour
	for _, c := range []struct {
		name string
		rtc  time.Time
		lies []time.Duration
		fail string // the code; "" for a clock that is right
	}{
		{"2019", time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC), []time.Duration{0, 0, day}, ""},
		{"2035", time.Date(2035, 1, 1, 0, 0, 0, 0, time.UTC), []time.Duration{0, 0, -day}, ""},
		{"2035 with two that lie", time.Date(2035, 1, 1, 0, 0, 0, 0, time.UTC), []time.Duration{0, day, -day}, "time_disagreement"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := goodDraft(b, t)
			d.SecureTime = nil
			for _, lie := range c.lies {
				port := clocktest.Daemon{Lie: lie}.Start(t, ca)
				d.TimeServers = append(d.TimeServers, manifest.TimeServer{Host: fmt.Sprintf("10.0.2.2:%d", port), CACert: ca.PEM})
			}
			r := vm{draft: d, rtc: c.rtc}.start(t, b)
			if c.fail != "" {
				r.waitOff(120 * time.Second)
				if ok, failed := r.seen(); !strings.HasPrefix(failed, "time code="+c.fail) || slices.Contains(ok, "key-provider") {
					t.Errorf("phases %v, failed %q", ok, failed)
				}
				return
			}
			const found = "the clock was off by "
			var text string
			for deadline := time.Now().Add(120 * time.Second); !strings.Contains(text, "phase key-provider ok"); time.Sleep(100 * time.Millisecond) {
				if _, failed := r.seen(); failed != "" || time.Now().After(deadline) {
					t.Fatalf("no phase of the keys, failed %q", failed)
				}
				text = r.console.String()
			}
			_, rest, ok := strings.Cut(text, found)
			offset, err := time.ParseDuration(strings.TrimRight(strings.Fields(rest + " -")[0], ";"))
			if !ok || err != nil {
				t.Fatalf("the console does not say what the clock was off by: %v", err)
			}
			// QEMU counts on from the RTC's start, so that the guest is off by as much
			// as the RTC was when QEMU started.
			if diff := (r.begin.Sub(c.rtc) - offset).Abs(); diff > 2*time.Second+rtcStart {
				t.Errorf("the guest corrected its clock by %s, which leaves %s", offset, diff)
			}
			if strings.Count(text, "is off by ") != 1 {
				t.Error("the console does not name the one that lies")
			}
			t.Log(found, offset)
		})
	}
}

// rtcStart is what passes until QEMU starts its RTC, and the second that the kernel
// cannot tell when it reads it.
const rtcStart = 2 * time.Second
