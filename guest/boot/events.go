// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/dstack-go/dstack/attest/collect"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// recorder extends the runtime register and keeps the log that explains it. Init
// is the only one who can extend, so one lock orders register and log.
//
// The register is extended first, the log appended after: if the machine dies in
// between, the log does not replay and the evidence is refused, which is safe.
type recorder struct {
	dir     string // of the log, spec/attestation.md §3.3
	version int    // 1 or 2: event_log_version of the manifest
	tee     collect.TEE

	mu     sync.Mutex
	ready  bool // system-ready is out: the names of the system are closed
	broken error
	boot   []eventlog.Event // imr 0 to 2
	events []eventlog.Event
}

// newRecorder makes the log's directory and version file.
func newRecorder(dir string, version int, tee collect.TEE, boot []eventlog.Event) (*recorder, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "runtime_event_version"), []byte(strconv.Itoa(version)), 0o600); err != nil {
		return nil, err
	}
	return &recorder{dir: dir, version: version, tee: tee, boot: boot}, nil
}

// logLine is one line of runtime_events.log, as upstream writes it.
type logLine struct {
	Event   string `json:"event"`
	Payload []byte `json:"payload"` // standard base64
	Version int    `json:"version,omitempty"`
}

// System records an event of the system's own. After system-ready there are none.
func (r *recorder) System(ctx context.Context, name string, payload []byte) error {
	_, err := r.emit(ctx, name, payload, true)
	return err
}

// App records an event of the application; names of the system are refused.
func (r *recorder) App(ctx context.Context, name string, payload []byte) (eventlog.Event, error) {
	return r.emit(ctx, name, payload, false)
}

func (r *recorder) emit(ctx context.Context, name string, payload []byte, system bool) (eventlog.Event, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.broken != nil:
		return eventlog.Event{}, fault.Wrap(r.broken, "log_broken", "the event log no longer explains the register")
	case system && r.ready:
		return eventlog.Event{}, fault.New("log_closed", "%s after system-ready", name)
	case !system && (!r.ready || eventlog.Reserved(name)):
		return eventlog.Event{}, fault.New("event_name_reserved", "the event name %q is reserved for the system", name)
	case len(r.events) >= eventlog.MaxEvents-len(r.boot):
		return eventlog.Event{}, fault.New("log_full", "the event log has %d events and takes no more", len(r.events))
	}
	form := eventlog.RuntimeV1
	if r.version == 2 {
		form = eventlog.RuntimeV2
	}
	event, err := form(name, payload)
	if err != nil {
		return eventlog.Event{}, err
	}
	// A TEE without a register (SEV-SNP) has the log only; its evidence says so.
	if x, ok := r.tee.(collect.Extender); ok {
		if err := x.Extend(ctx, int(eventlog.RuntimeIMR), eventlog.Digest(event)); err != nil {
			// The register may or may not have moved: no later log can be trusted
			// to replay.
			r.broken = err
			return eventlog.Event{}, fault.Wrap(err, "extend_failed", "extend the runtime register by %s", name)
		}
	}
	r.events = append(r.events, event)
	if err := r.append(event); err != nil {
		return eventlog.Event{}, fmt.Errorf("append %s to the event log: %w", name, err)
	}
	if name == "system-ready" {
		r.ready = true
	}
	return event, nil
}

func (r *recorder) append(e eventlog.Event) error {
	line, err := json.Marshal(logLine{e.Name, e.Payload, e.Version})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(r.dir, "runtime_events.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Write(append(line, '\n'))
	return err
}

// Log returns a copy of the whole log: boot events, then runtime events.
func (r *recorder) Log() []eventlog.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append(append([]eventlog.Event(nil), r.boot...), r.events...)
}
