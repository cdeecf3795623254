// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// metrics are counts since the start; the zero value is ready.
type metrics struct {
	valid, invalid, accepted, undecided atomic.Uint64 // of replies
	malformed, tooLarge, busy           atomic.Uint64 // of requests without one
	nanoseconds                         atomic.Int64  // spent on replies
	inFlight                            atomic.Int64
	fetches, fetchFailures              atomic.Uint64
}

func (m *metrics) record(r *Response, took time.Duration) {
	m.nanoseconds.Add(int64(took))
	if r.IsValid {
		m.valid.Add(1)
	} else {
		m.invalid.Add(1)
	}
	if v := r.Verdict; v != nil && v.Accepted {
		m.accepted.Add(1)
	} else if v != nil && v.Undecided {
		m.undecided.Add(1)
	}
}

// writeMetrics writes the text format of Prometheus. There are no labels with values
// from requests.
func (s *Service) writeMetrics(w io.Writer) {
	m, img := &s.metrics, s.images.Stats()
	valid, invalid := m.valid.Load(), m.invalid.Load()
	metric := func(kind, name, help string, values ...any) {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
		for i := 0; i < len(values); i += 2 {
			fmt.Fprintf(w, "%s%v %v\n", name, values[i], values[i+1])
		}
	}
	metric("counter", "dstack_verifier_verifications_total", "Evidence judged, by is_valid.", `{valid="true"}`, valid, `{valid="false"}`, invalid)
	metric("counter", "dstack_verifier_verdicts_total", "Verdicts, by outcome.", `{outcome="accepted"}`, m.accepted.Load(),
		`{outcome="undecided"}`, m.undecided.Load(), `{outcome="refused"}`, valid+invalid-min(valid+invalid, m.accepted.Load()+m.undecided.Load()))
	metric("counter", "dstack_verifier_requests_refused_total", "Requests without a verdict, by reason.",
		`{reason="malformed"}`, m.malformed.Load(), `{reason="too_large"}`, m.tooLarge.Load(), `{reason="busy"}`, m.busy.Load())
	metric("counter", "dstack_verifier_verification_seconds_total", "Time spent on verification.", "", time.Duration(m.nanoseconds.Load()).Seconds())
	metric("gauge", "dstack_verifier_in_flight", "Verifications under way.", "", m.inFlight.Load())
	metric("counter", "dstack_verifier_collateral_requests_total", "Collateral asked for, by result.",
		`{result="ok"}`, m.fetches.Load()-min(m.fetches.Load(), m.fetchFailures.Load()), `{result="failed"}`, m.fetchFailures.Load())
	metric("counter", "dstack_verifier_images_total", "OS images asked for, by result.",
		`{result="cached"}`, img.Hits, `{result="downloaded"}`, img.Downloads, `{result="failed"}`, img.Failures)
}
