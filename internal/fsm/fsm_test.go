// SPDX-License-Identifier: Apache-2.0

package fsm_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/fsm"
	"github.com/dstack-go/dstack/internal/fsm/fsmtest"
)

// A lamp: switched on and off by hand, its bulb may blow. Replacing the bulb is
// an effect whose outcome comes back as an input.
type lamp struct {
	Mode string // off, on, dark (bulb blown)
	Used int    // bulbs
}

type todo struct{ Kind string } // light, quench, replace

func (e todo) String() string { return e.Kind }

func stepLamp(s lamp, input string) (lamp, []todo, error) {
	switch {
	case input == "press" && s.Mode == "off":
		return lamp{"on", s.Used}, []todo{{"light"}}, nil
	case input == "press" && s.Mode == "on":
		return lamp{"off", s.Used}, []todo{{"quench"}}, nil
	case input == "blown" && s.Mode == "on":
		return lamp{"dark", s.Used}, []todo{{"quench"}, {"replace"}}, nil
	case input == "replaced" && s.Mode == "dark":
		return lamp{"on", s.Used + 1}, []todo{{"light"}}, nil
	}
	return s, nil, fmt.Errorf("%q makes no sense while %s", input, s.Mode)
}

type room struct {
	lit   bool
	bulbs int // fitted since the start
	fresh bool
}

func performLamp(r *room, e todo) ([]string, error) {
	switch e.Kind {
	case "light":
		r.lit, r.fresh = true, false
	case "quench":
		r.lit = false
	case "replace":
		if !r.fresh { // idempotent: a bulb fitted before the crash stays
			r.bulbs, r.fresh = r.bulbs+1, true
		}
		return []string{"replaced"}, nil
	}
	return nil, nil
}

func lampCase() fsmtest.Case[lamp, string, todo, *room] {
	return fsmtest.Case[lamp, string, todo, *room]{
		Machine:  fsm.Func[lamp, string, todo](stepLamp),
		Initial:  lamp{Mode: "off"},
		Inputs:   []string{"press", "blown", "replaced" /* refused */, "press", "press", "blown", "blown"},
		NewWorld: func() *room { return new(room) },
		Perform:  performLamp,
		Check: func(s lamp, r *room) error {
			if r.lit != (s.Mode == "on") || r.bulbs != s.Used {
				return fmt.Errorf("state %+v but room %+v", s, *r)
			}
			return nil
		},
	}
}

func TestLampSurvivesEveryCrash(t *testing.T) { fsmtest.Run(t, lampCase()) }

func TestHarnessFindsEffectThatIsNotIdempotent(t *testing.T) {
	c := lampCase()
	c.Perform = func(r *room, e todo) ([]string, error) {
		r.fresh = false
		return performLamp(r, e)
	}
	err := fsmtest.Explore(c)
	if err == nil || !strings.Contains(err.Error(), "crash at point") || !strings.Contains(err.Error(), "CRASH") {
		t.Fatalf("error %v, want one that names the crash point and the trace", err)
	}
}

type harness struct {
	*fsm.Driver[lamp, string, todo]
	saved   []fsm.Record[lamp, todo]
	saveErr error
	done    []string
	perform func(todo) ([]string, error)
}

func newHarness(rec fsm.Record[lamp, todo]) *harness {
	h := new(harness)
	h.Driver = fsm.New(fsm.Func[lamp, string, todo](stepLamp), rec, func(r fsm.Record[lamp, todo]) error {
		if h.saveErr == nil {
			h.saved = append(h.saved, r)
		}
		return h.saveErr
	}, func(_ context.Context, e todo) ([]string, error) {
		h.done = append(h.done, e.Kind)
		if h.perform != nil {
			return h.perform(e)
		}
		return nil, nil
	})
	return h
}

func TestRefusedInputChangesNothing(t *testing.T) {
	h := newHarness(fsm.Record[lamp, todo]{State: lamp{Mode: "off"}})
	if err := h.Send(t.Context(), "blown"); err == nil || !strings.Contains(err.Error(), "makes no sense while off") {
		t.Fatalf("error %v", err)
	}
	if len(h.saved) != 0 || len(h.done) != 0 || h.State().Mode != "off" {
		t.Errorf("saved %v, performed %v, state %v", h.saved, h.done, h.State())
	}
}

func TestNothingIsPerformedUnlessSaved(t *testing.T) {
	h := newHarness(fsm.Record[lamp, todo]{State: lamp{Mode: "off"}})
	h.saveErr = errors.New("disk full")
	if err := h.Send(t.Context(), "press"); !errors.Is(err, h.saveErr) {
		t.Fatalf("error %v", err)
	}
	if len(h.done) != 0 || h.State().Mode != "off" {
		t.Errorf("performed %v, state %v", h.done, h.State())
	}
}

func TestFailedEffectStaysOutstandingAndIsRetriedFirst(t *testing.T) {
	h := newHarness(fsm.Record[lamp, todo]{State: lamp{Mode: "off"}})
	h.perform = func(todo) ([]string, error) { return nil, errors.New("no power") }
	if err := h.Send(t.Context(), "press"); err == nil || err.Error() != "light: no power" {
		t.Fatalf("error %v", err)
	}
	if got := h.Pending(); !slices.Equal(got, []todo{{"light"}}) {
		t.Fatalf("pending %v", got)
	}
	h.perform = nil
	if err := h.Send(t.Context(), "press"); err != nil {
		t.Fatal(err)
	}
	if want := []string{"light", "light", "quench"}; !slices.Equal(h.done, want) {
		t.Errorf("performed %v, want %v", h.done, want)
	}
}

func TestRefusedReportIsToldAndDoesNotStopTheRest(t *testing.T) {
	h := newHarness(fsm.Record[lamp, todo]{State: lamp{Mode: "off"}, Pending: []todo{{"light"}, {"quench"}}})
	h.perform = func(e todo) ([]string, error) {
		if e.Kind == "light" {
			return []string{"nonsense"}, nil
		}
		return nil, nil
	}
	err := h.Drain(t.Context())
	if err == nil || !strings.HasPrefix(err.Error(), `after light: "nonsense"`) {
		t.Fatalf("error %v", err)
	}
	if len(h.Pending()) != 0 || len(h.done) != 2 {
		t.Errorf("pending %v, performed %v", h.Pending(), h.done)
	}
}

// An input that arrives while an effect is under way is accepted and saved at
// once; its effects come after.
func TestPostDoesNotWaitForEffects(t *testing.T) {
	h := newHarness(fsm.Record[lamp, todo]{State: lamp{Mode: "off"}})
	entered, release := make(chan struct{}), make(chan struct{})
	h.perform = func(e todo) ([]string, error) {
		if e.Kind == "light" {
			close(entered)
			<-release
		}
		return nil, nil
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := h.Send(t.Context(), "press"); err != nil {
			t.Error(err)
		}
	})
	<-entered
	if err := h.Post("press"); err != nil {
		t.Fatal(err)
	}
	if h.State().Mode != "off" {
		t.Errorf("state %v", h.State())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := h.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain during an effect: %v", err)
	}
	close(release)
	wg.Wait()
	if want := []string{"light", "quench"}; !slices.Equal(h.done, want) {
		t.Errorf("performed %v, want %v", h.done, want)
	}
}
