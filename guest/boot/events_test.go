// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// register is a TEE with a runtime register.
type register struct {
	value dstack.Measurement
	fail  error
	at    func()
}

func (r *register) Kind() dstack.TEE { return dstack.TDX }
func (r *register) Quote(context.Context, dstack.ReportData) ([]byte, error) {
	return nil, errors.New("no quote")
}
func (r *register) Extend(_ context.Context, index int, digest dstack.Measurement) error {
	if r.at != nil {
		r.at()
	}
	if index != 3 {
		return errors.New("wrong register")
	}
	if r.fail != nil {
		return r.fail
	}
	r.value = eventlog.Extend(r.value, digest)
	return nil
}

func newTestRecorder(t *testing.T, version int, tee *register) *recorder {
	t.Helper()
	boot := []eventlog.Event{{IMR: 0, EventType: 1, Digest: make([]byte, 48)}}
	r, err := newRecorder(filepath.Join(t.TempDir(), "log"), version, tee, boot)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestTheLogExplainsTheRegister(t *testing.T) {
	for _, version := range []int{1, 2} {
		tee := &register{}
		r := newTestRecorder(t, version, tee)
		ctx := context.Background()
		for _, e := range []struct{ name, payload string }{{"system-preparing", ""}, {"app-id", strings.Repeat("a", 20)}, {"system-ready", ""}} {
			if err := r.System(ctx, e.name, []byte(e.payload)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := r.App(ctx, "mine", []byte{0, 0xff}); err != nil {
			t.Fatal(err)
		}
		log := r.Log()
		if len(log) != 5 || log[0].IMR != 0 {
			t.Fatalf("log %+v", log)
		}
		got, err := eventlog.Replay(log, 3)
		if err != nil || got != tee.value {
			t.Errorf("version %d: replay %s, register %s, %v", version, got, tee.value, err)
		}
		text, err := os.ReadFile(filepath.Join(r.dir, "runtime_events.log"))
		if err != nil {
			t.Fatal(err)
		}
		last := strings.Split(strings.TrimSpace(string(text)), "\n")[3]
		want := map[int]string{1: `{"event":"mine","payload":"AP8="}`, 2: `{"event":"mine","payload":"AP8=","version":2}`}[version]
		if last != want {
			t.Errorf("last line %s, want %s", last, want)
		}
		for _, name := range []string{"runtime_events.log", "runtime_event_version"} {
			if info, err := os.Stat(filepath.Join(r.dir, name)); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v %v", name, info.Mode(), err)
			}
		}
	}
}

func TestTheRegisterIsExtendedBeforeTheLog(t *testing.T) {
	tee := &register{}
	r := newTestRecorder(t, 1, tee)
	path := filepath.Join(r.dir, "runtime_events.log")
	tee.at = func() {
		if _, err := os.Stat(path); err == nil {
			t.Error("the log was written first")
		}
	}
	if err := r.System(context.Background(), "system-preparing", nil); err != nil {
		t.Fatal(err)
	}
}

func TestNamesOfTheSystemAreClosed(t *testing.T) {
	ctx := context.Background()
	tee := &register{}
	r := newTestRecorder(t, 1, tee)
	if _, err := r.App(ctx, "mine", nil); fault.Code(err) != "event_name_reserved" {
		t.Errorf("an app's event before system-ready: %v", err)
	}
	if err := r.System(ctx, "system-ready", nil); err != nil {
		t.Fatal(err)
	}
	before := tee.value
	if err := r.System(ctx, "key-provider", nil); fault.Code(err) != "log_closed" {
		t.Errorf("a system event after system-ready: %v", err)
	}
	for _, name := range []string{"compose-hash", "system-ready", "system-other", "dstack-x", "app-id:x"} {
		if _, err := r.App(ctx, name, nil); fault.Code(err) != "event_name_reserved" {
			t.Errorf("the app's event %s: %v", name, err)
		}
	}
	if tee.value != before {
		t.Error("a refused event moved the register")
	}
}

func TestAFailedExtendEndsTheLog(t *testing.T) {
	ctx := context.Background()
	tee := &register{fail: errors.New("gone")}
	r := newTestRecorder(t, 1, tee)
	if err := r.System(ctx, "system-preparing", nil); fault.Code(err) != "extend_failed" {
		t.Fatalf("error %v", err)
	}
	tee.fail = nil
	if err := r.System(ctx, "app-id", make([]byte, 20)); fault.Code(err) != "log_broken" {
		t.Fatalf("error %v", err)
	}
	if len(r.Log()) != 1 {
		t.Errorf("log %+v", r.Log())
	}
}
