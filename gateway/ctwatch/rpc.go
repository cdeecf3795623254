// SPDX-License-Identifier: Apache-2.0

package ctwatch

import (
	"time"

	api "github.com/dstack-go/dstack/api/gateway"
)

// Response is the status as administrators get it.
func (w *Watcher) Response() *api.CtStatusResponse {
	s := w.Status()
	unix := func(t time.Time) uint64 {
		if t.IsZero() {
			return 0
		}
		return uint64(t.Unix())
	}
	out := &api.CtStatusResponse{CheckedAt: unix(s.Checked), Dropped: uint64(s.Dropped)}
	for _, l := range s.Logs {
		text := ""
		if l.Err != nil {
			text = l.Err.Error()
		}
		out.Logs = append(out.Logs, &api.CtLog{Name: l.Name, Size: l.Read, Error: text})
	}
	for _, a := range s.Alarms {
		out.Alarms = append(out.Alarms, &api.CtAlarm{Log: a.Log, Index: a.Index, Names: a.Names, Key: a.Key, At: unix(a.At), Kind: a.Kind, Text: a.Text})
	}
	return out
}
