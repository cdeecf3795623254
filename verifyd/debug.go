// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"encoding/hex"
	"fmt"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
)

// debugRTMRs compares the log with the events that the image gives, for the
// registers 0 to 2 that differ. The log's word counts for nothing but this display.
func (r *imageCheck) debugRTMRs(ev *attest.Evidence, t *attest.TDX) []RTMRDebug {
	if r.want == nil {
		return nil
	}
	want := *r.want
	boot := want.BootLog()
	open := map[int]bool{} // places in RTMR0 whose digest is the log's own
	for i, e := range want.RTMR0 {
		open[i] = e.Digest == nil
	}
	var out []RTMRDebug
	for imr := range uint32(3) {
		expected := r.expected(imr)
		if expected == t.RTMR[imr] {
			continue
		}
		d := RTMRDebug{RTMR: fmt.Sprintf("RTMR%d", imr), Expected: expected.String(), Actual: t.RTMR[imr].String(), Events: []RTMREvent{}}
		theirs, ours := only(ev.EventLog, imr), only(boot, imr)
		for i := range max(len(theirs), len(ours)) {
			e := RTMREvent{Index: i}
			if i < len(ours) {
				e.EventType, e.EventName, e.Expected = ours[i].EventType, ours[i].Name, hex.EncodeToString(ours[i].Digest)
			}
			if i < len(theirs) {
				have := theirs[i]
				e.EventType, e.Actual, e.PayloadLen = have.EventType, hex.EncodeToString(have.Digest), len(have.Payload)
				if have.Name != "" || i >= len(ours) {
					e.EventName = have.Name
				}
			}
			switch {
			case i >= len(theirs):
				e.Status = "missing"
				d.MissingExpected = append(d.MissingExpected, e.Expected)
			case i >= len(ours):
				e.Status = "extra"
			case imr == 0 && open[i]:
				e.Status, e.Expected = "match", ""
			case e.Actual == e.Expected:
				e.Status = "match"
			default:
				e.Status = "mismatch"
			}
			d.Events = append(d.Events, e)
		}
		out = append(out, d)
	}
	return out
}

func (r *imageCheck) expected(imr uint32) dstack.Measurement {
	switch imr {
	case 1:
		return r.want.RTMR1
	case 2:
		return r.want.RTMR2
	}
	m, err := r.want.ReplayRTMR0(r.listed)
	if err != nil {
		return dstack.Measurement{}
	}
	return m
}

func only(events []eventlog.Event, imr uint32) []eventlog.Event {
	var out []eventlog.Event
	for _, e := range events {
		if e.IMR == imr && !e.IsRuntime() {
			out = append(out, e)
		}
	}
	return out
}
