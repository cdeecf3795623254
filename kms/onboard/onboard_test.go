// SPDX-License-Identifier: Apache-2.0

package onboard

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/fsm"
	"github.com/dstack-go/dstack/internal/fsm/fsmtest"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/releaselog"
)

func generate() (*custody.Roots, error) { return custody.Generate(rand.Reader) }

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("want %s, got %q: %v", code, fault.Code(err), err)
	}
}

// from is a source of the given roots.
func from(t *testing.T, roots *custody.Roots) Obtain {
	return func(context.Context, string) (*custody.Roots, error) {
		keys, err := roots.Export()
		if err != nil {
			return nil, err
		}
		return custody.Import(keys, roots.Identity())
	}
}

// identity is that of the roots in a data directory; empty: there are none.
func identity(dir string) (string, error) {
	roots, err := custody.Open(RootFile(dir))
	if fault.Code(err) == "root_missing" {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer roots.Wipe()
	return string(roots.Identity().CA), nil
}

// disk is a world whose disk is a directory: what the state machine's driver leaves
// there at each point is looked at, and gone on from.
type disk struct {
	dir  string
	node *Node
	root string // the first identity seen: there is never another
	logs map[string]bool
	// litter makes what a crash in the middle of an effect leaves.
	litter func(dir string)
	made   int // root keys
}

func (d *disk) check(s State) error {
	id, err := identity(d.dir)
	if err != nil {
		return err
	}
	if d.root != "" && id != d.root {
		return errors.New("the root is another, or gone")
	}
	d.root = id
	switch s.Phase {
	case Empty:
		if id != "" {
			return errors.New("there is a root, and the state knows of none")
		}
	case Ready:
		if id == "" {
			return errors.New("ready without a root")
		}
		l, err := releaselog.Open(LogDir(d.dir), []byte(id))
		if err != nil {
			return err
		}
		d.logs[l.Head().Log()] = true
		if len(d.logs) > 1 {
			return errors.New("a second log for one root, of which the first was in use")
		}
		return l.Close()
	default:
		return fmt.Errorf("nothing is outstanding in the phase %s", s.Phase)
	}
	return nil
}

func crashes(t *testing.T, inputs []Input, litter func(string), obtain Obtain) {
	var made []*disk
	fsmtest.Run(t, fsmtest.Case[State, Input, Effect, *disk]{
		Machine: Machine, Inputs: inputs,
		NewWorld: func() *disk {
			d := &disk{dir: t.TempDir(), logs: map[string]bool{}, litter: litter}
			d.node = &Node{dir: d.dir, obtain: obtain, generate: func() (*custody.Roots, error) { d.made++; return generate() }}
			made = append(made, d)
			return d
		},
		Perform: func(d *disk, e Effect) ([]Input, error) {
			if d.litter != nil {
				d.litter(d.dir)
			}
			return d.node.perform(context.Background(), e)
		},
		Check: func(s State, d *disk) error { return d.check(s) },
	})
	for _, d := range made {
		if d.made > 1 {
			t.Errorf("root keys were made %d times for one directory", d.made)
		}
	}
	t.Logf("%d lives", len(made))
}

// A crash at every point of making keys, and a second one at every point of recovering.
func TestThreat_G09_ACrashAnywhereInBootstrapping(t *testing.T) {
	inputs := []Input{{Kind: "begin"}, {Kind: "begin"}, {Kind: "begin", Source: "https://other.test"}}
	t.Run("between the steps", func(t *testing.T) { crashes(t, inputs, nil, nil) })
	t.Run("amid a step", func(t *testing.T) {
		crashes(t, inputs, func(dir string) {
			// What os.CreateTemp, MkdirTemp and durable leave, and what a log's removal does.
			os.WriteFile(filepath.Join(dir, ".tmp-root.keys-new-123"), []byte("half a ro"), 0o600)
			os.MkdirAll(filepath.Join(dir, ".tmp-log-456"), 0o700)
			os.WriteFile(filepath.Join(dir, ".tmp-log-456", "log.key"), make([]byte, 32), 0o600)
			os.WriteFile(filepath.Join(dir, ".tmp-state.json-7"), []byte("{"), 0o600)
		}, nil)
	})
}

func TestThreat_G09_ACrashAnywhereInOnboarding(t *testing.T) {
	roots, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	defer roots.Wipe()
	source := from(t, roots)
	inputs := []Input{{Kind: "begin", Source: "https://broken.test"}, {Kind: "begin", Source: "https://kms.test"}, {Kind: "begin"}}
	crashes(t, inputs, nil, func(ctx context.Context, url string) (*custody.Roots, error) {
		if url != "https://kms.test" {
			return nil, fault.New("source_is_broken", "it is")
		}
		return source(ctx, url)
	})
}

// What is there is never replaced, whatever else is lost.
func TestThreat_G09_NothingIsReplaced(t *testing.T) {
	ready := func(t *testing.T) (string, string) {
		dir := t.TempDir()
		n, err := Open(t.Context(), dir, generate, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Begin(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		wantCode(t, n.Begin(t.Context(), ""), "already_bootstrapped")
		id, err := identity(dir)
		if err != nil || id == "" {
			t.Fatal(err)
		}
		return dir, id
	}
	for _, c := range []struct {
		name string
		lose func(dir string) error
		code string // of Open
	}{
		{"nothing lost", func(string) error { return nil }, ""},
		{"the state", func(dir string) error { return os.Remove(filepath.Join(dir, stateFile)) }, "onboard_state_lost"},
		{"the state and the root", func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, stateFile)), os.Remove(RootFile(dir)))
		}, "onboard_state_lost"},
		{"the state and the log", func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, stateFile)), os.RemoveAll(LogDir(dir)))
		}, "onboard_state_lost"},
		{"half of the state", func(dir string) error { return os.WriteFile(filepath.Join(dir, stateFile), []byte(`{"state":`), 0o600) }, "onboard_state"},
		{"the state's content", func(dir string) error { return os.WriteFile(filepath.Join(dir, stateFile), []byte(`{}`), 0o600) }, "onboard_state_lost"},
		{"a phase that is none", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, stateFile), []byte(`{"state":{"phase":"retired"}}`), 0o600)
		}, "onboard_state"},
		{"a state that others wrote", func(dir string) error { return os.Chmod(filepath.Join(dir, stateFile), 0o666) }, "onboard_state"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, id := ready(t)
			if err := c.lose(dir); err != nil {
				t.Fatal(err)
			}
			before, err := identity(dir)
			if err != nil {
				t.Fatal(err)
			}
			n, err := Open(t.Context(), dir, generate, nil)
			wantCode(t, err, c.code)
			if err == nil {
				wantCode(t, n.Begin(t.Context(), ""), "already_bootstrapped")
			}
			if after, err := identity(dir); err != nil || after != before || after != "" && after != id {
				t.Errorf("the root changed: %v", err)
			}
		})
	}
}

// A disk that fails an attempt does not need a restart once it is mended.
func TestAnAttemptThatTheDiskFailedGoesOn(t *testing.T) {
	dir := t.TempDir()
	n, err := Open(t.Context(), dir, generate, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(RootFile(dir), 0o700); err != nil { // in the way
		t.Fatal(err)
	}
	wantCode(t, n.Begin(t.Context(), ""), "root_malformed")
	wantCode(t, n.Begin(t.Context(), ""), "root_malformed")
	if err := os.Remove(RootFile(dir)); err != nil {
		t.Fatal(err)
	}
	if err := n.Begin(t.Context(), ""); err != nil || n.State().Phase != Ready {
		t.Errorf("phase %q: %v", n.State().Phase, err)
	}
	wantCode(t, n.Begin(t.Context(), ""), "already_bootstrapped")
}

func TestOneAttemptAtATime(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	n, err := Open(t.Context(), t.TempDir(), func() (*custody.Roots, error) {
		close(entered)
		<-release
		return generate()
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := n.Begin(t.Context(), ""); err != nil {
			t.Error(err)
		}
	})
	<-entered
	wantCode(t, n.Begin(t.Context(), ""), "onboard_busy")
	close(release)
	wg.Wait()
	wantCode(t, n.Begin(t.Context(), ""), "already_bootstrapped")
	wantCode(t, n.Begin(t.Context(), "https://kms.test"), "onboard_source")
}

func TestAFailureIsToldAndLeavesTheDirectoryEmpty(t *testing.T) {
	dir := t.TempDir()
	n, err := Open(t.Context(), dir, generate, func(context.Context, string) (*custody.Roots, error) {
		return nil, fault.New("root_mismatch", "another root")
	})
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, n.Begin(t.Context(), "https://kms.test"), "root_mismatch")
	if s := n.State(); s.Phase != Empty || s.Failure != "root_mismatch" {
		t.Errorf("state %+v", s)
	}
	if _, err := os.Lstat(RootFile(dir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a root: %v", err)
	}
	if err := n.Begin(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

// logged are the notes of a directory's log.
func logged(t *testing.T, dir string) []string {
	t.Helper()
	id, err := identity(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := releaselog.Open(LogDir(dir), []byte(id))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	raw, _, err := l.Entries(0, 100)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range raw {
		e, err := releaselog.ParseEntry(r)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(e.Kind)+": "+e.Note)
	}
	return out
}

// escrow copies roots as a backup does.
func escrow(t *testing.T, roots *custody.Roots) *custody.Roots {
	t.Helper()
	var out *custody.Roots
	err := roots.Escrow(func(text []byte) (err error) {
		out, err = custody.Restore(append([]byte(nil), text...), roots.Identity())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRestoring(t *testing.T) {
	roots, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	defer roots.Wipe()
	other, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Wipe()
	want := string(roots.Identity().CA)

	dir := t.TempDir()
	for range 2 { // the second changes nothing
		if err := Restore(t.Context(), dir, "aa", escrow(t, roots)); err != nil {
			t.Fatal(err)
		}
		if id, err := identity(dir); err != nil || id != want {
			t.Fatalf("another root: %v", err)
		}
	}
	if got := logged(t, dir); len(got) != 1 || !strings.HasPrefix(got[0], "member: root keys restored") {
		t.Errorf("log %q", got)
	}
	opened, err := custody.Open(RootFile(dir))
	if err != nil || opened.Provenance().Kind != custody.Restored {
		t.Fatalf("provenance: %v", err)
	}
	opened.Wipe()
	wantCode(t, Restore(t.Context(), dir, "bb", escrow(t, other)), "already_bootstrapped")
	if id, err := identity(dir); err != nil || id != want {
		t.Errorf("another root: %v", err)
	}

	// A crash before the roots were there: a KMS that starts makes none of its own, and
	// the operators can go on.
	dir = t.TempDir()
	text, err := json.Marshal(fsm.Record[State, Effect]{
		State: State{Phase: Obtaining, Source: backupSource + "aa"}, Pending: []Effect{{Kind: "obtain", Source: backupSource + "aa"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, stateFile), text, 0o600); err != nil {
		t.Fatal(err)
	}
	copied := t.TempDir()
	if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	n, err := Open(t.Context(), dir, generate, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s := n.State(); s.Phase != Empty || s.Failure != "onboard_source" {
		t.Errorf("state %+v", s)
	}
	for _, d := range []string{dir, copied} {
		if err := Restore(t.Context(), d, "aa", escrow(t, roots)); err != nil {
			t.Error(err)
		}
		if id, err := identity(d); err != nil || id != want {
			t.Errorf("another root: %v", err)
		}
	}
}

func TestWhereKeysCameFromIsInTheLog(t *testing.T) {
	roots, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	defer roots.Wipe()
	dir := t.TempDir()
	n, err := Open(t.Context(), dir, generate, from(t, roots))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Begin(t.Context(), "https://kms.test"); err != nil {
		t.Fatal(err)
	}
	if got := logged(t, dir); len(got) != 1 || !strings.HasPrefix(got[0], "member: root keys replicated") {
		t.Errorf("log %q", got)
	}
	dir = t.TempDir()
	if n, err = Open(t.Context(), dir, generate, nil); err != nil {
		t.Fatal(err)
	}
	if err := n.Begin(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	if got := logged(t, dir); len(got) != 0 {
		t.Errorf("log %q", got)
	}
}

// Crashes restores the machine from the record at each point of restoring, too.
func TestThreat_G09_ACrashAnywhereInRestoring(t *testing.T) {
	roots, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	defer roots.Wipe()
	crashes(t, []Input{{Kind: "begin", Source: backupSource + "aa"}, {Kind: "begin"}}, nil,
		func(context.Context, string) (*custody.Roots, error) { return escrow(t, roots), nil })
}
