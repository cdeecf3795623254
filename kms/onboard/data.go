// SPDX-License-Identifier: Apache-2.0

package onboard

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/fsm"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/releaselog"
)

// Files of a data directory.
const (
	stateFile = "state.json"
	rootFile  = "root.keys"
	logDir    = "log"
)

// RootFile and LogDir are where a data directory has the root keys and the release log.
func RootFile(dir string) string { return filepath.Join(dir, rootFile) }
func LogDir(dir string) string   { return filepath.Join(dir, logDir) }

// Obtain gets root keys from another KMS.
type Obtain func(ctx context.Context, source string) (*custody.Roots, error)

// Node is a KMS's data directory on its way to Ready, or there.
type Node struct {
	dir      string
	obtain   Obtain
	generate func() (*custody.Roots, error)
	driver   *fsm.Driver[State, Input, Effect]

	beginning sync.Mutex // held by the one attempt
	mu        sync.Mutex
	failure   error // of the last attempt in this process
}

// Open looks at a data directory, mode 0700, and goes on with what a crash
// interrupted. obtain may be nil for a KMS that only makes keys of its own.
//
// Codes: onboard_state (the record is damaged), onboard_state_lost (there are root keys
// or a log and no record: another directory, or a disk that was tampered with).
func Open(ctx context.Context, dir string, generate func() (*custody.Roots, error), obtain Obtain) (*Node, error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.Wrap(err, "onboard_state", "make the data directory")
	}
	n := &Node{dir: dir, obtain: obtain, generate: generate}
	rec, err := readState(n.path(stateFile))
	if err != nil {
		return nil, fault.Wrap(err, "onboard_state", "the state in %s", n.path(stateFile)).
			WithFix("restore the data directory as a whole")
	}
	if rec.State.Phase == Empty {
		for _, name := range []string{rootFile, logDir} {
			if _, err := os.Lstat(n.path(name)); !errors.Is(err, fs.ErrNotExist) {
				return nil, fault.New("onboard_state_lost", "%s has %s, of which %s knows nothing: nothing is replaced", dir, name, stateFile).
					WithFix("restore the data directory as a whole, or give another one")
			}
		}
	}
	save := func(r fsm.Record[State, Effect]) error {
		text, err := json.Marshal(r)
		if err != nil {
			return err
		}
		return durable.WriteFile(n.path(stateFile), text, 0o600)
	}
	n.driver = fsm.New(Machine, rec, save, n.perform)
	return n, n.driver.Drain(ctx)
}

// maxState is more than a state has, whose longest part is a URL.
const maxState = 64 << 10

// readState reads the record, fresh if there is none.
func readState(path string) (rec fsm.Record[State, Effect], err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return rec, nil
	}
	if err != nil {
		return rec, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return rec, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o022 != 0 {
		return rec, errors.New("it is no regular file that only its owner may write")
	}
	dec := json.NewDecoder(io.LimitReader(f, maxState))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&rec); err != nil {
		return rec, err
	}
	if !slices.Contains([]Phase{Empty, Obtaining, Logging, Ready}, rec.State.Phase) {
		return rec, fmt.Errorf("the phase %.40q is none", rec.State.Phase)
	}
	return rec, nil
}

func (n *Node) path(name string) string { return filepath.Join(n.dir, name) }

// State is where the node is.
func (n *Node) State() State { return n.driver.State() }

// Begin makes root keys, or gets them from source, and returns once the node is Ready
// or the attempt has failed. Codes already_bootstrapped, onboard_busy, those of the
// source.
func (n *Node) Begin(ctx context.Context, source string) error {
	if source != "" && n.obtain == nil {
		return fault.New("onboard_source", "this KMS can get keys from no other")
	}
	if !n.beginning.TryLock() {
		return fault.New("onboard_busy", "this KMS is getting its root keys at this moment")
	}
	defer n.beginning.Unlock()
	if s := n.State(); s.Phase == Obtaining || s.Phase == Logging {
		// The disk failed an attempt before: what it began is finished, and nothing else
		// is begun beside.
		if err := n.driver.Drain(ctx); err != nil {
			return err
		}
		if s.Source == source && n.State().Phase == Ready {
			return nil
		}
	}
	if err := n.driver.Send(ctx, Input{Kind: "begin", Source: source}); err != nil {
		return err
	}
	if n.State().Phase == Ready {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.failure != nil {
		return n.failure
	}
	return fault.New("onboard_failed", "the root keys were not obtained: %s", n.State().Failure)
}

// perform does one effect; doing it again changes nothing.
func (n *Node) perform(ctx context.Context, e Effect) ([]Input, error) {
	switch e.Kind {
	case "obtain":
		return n.performObtain(ctx, e.Source)
	case "log":
		return n.performLog(ctx)
	}
	return nil, errors.New("an effect that is not known: " + e.Kind)
}

func (n *Node) performObtain(ctx context.Context, source string) ([]Input, error) {
	done := []Input{{Kind: "obtained"}}
	if roots, err := custody.Open(n.path(rootFile)); err == nil {
		// An attempt before this one stored them and could not say so.
		roots.Wipe()
		return done, nil
	} else if fault.Code(err) != "root_missing" {
		return nil, err
	}
	var roots *custody.Roots
	var err error
	if source == "" && n.generate == nil {
		err = fault.New("onboard_source", "keys are not made here")
	} else if source == "" {
		roots, err = n.generate()
	} else if n.obtain == nil {
		err = fault.New("onboard_source", "this KMS can get keys from no other")
	} else {
		roots, err = n.obtain(ctx, source)
	}
	if err != nil {
		n.mu.Lock()
		n.failure = err
		n.mu.Unlock()
		code := fault.Code(err)
		if code == "" {
			code = "onboard_failed"
		}
		return []Input{{Kind: "failed", Code: code}}, nil
	}
	defer roots.Wipe()
	if err := roots.Create(n.path(rootFile)); err != nil {
		return nil, err
	}
	return done, nil
}

// performLog makes the release log. Nothing can have been released before it is
// there, so what a crash left of one is worth nothing.
func (n *Node) performLog(ctx context.Context) ([]Input, error) {
	roots, err := custody.Open(n.path(rootFile))
	if err != nil {
		return nil, err
	}
	defer roots.Wipe()
	if err := durable.RemoveAll(n.path(logDir)); err != nil {
		return nil, err
	}
	l, err := releaselog.Create(ctx, n.path(logDir), roots.Identity().CA, func(ctx context.Context, document []byte) ([]byte, error) {
		return roots.Attest(ctx, custody.PurposeReleaseLog, document)
	})
	if err != nil {
		return nil, err
	}
	if note := origin(roots.Provenance()); note != "" {
		e := releaselog.Entry{Time: time.Now(), Kind: releaselog.Member, Note: note}
		if _, err := l.Append(ctx, e); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return []Input{{Kind: "logged"}}, l.Close()
}

// origin says where roots that this KMS did not make come from: others hold them, and
// have logs of their own.
func origin(p custody.Provenance) string {
	switch p.Kind {
	case custody.Generated:
		return ""
	case custody.Replicated:
		return fmt.Sprintf("root keys replicated from the KMS of root sha256:%x; this log begins here", sha256.Sum256(p.Source))
	case custody.Restored:
		return "root keys restored from the operators' backup; this log begins here, and continues none"
	}
	return "root keys of kind " + p.Kind + "; this log begins here"
}

// backupSource begins the source of keys that come from a backup; no URL does.
const backupSource = "backup:"

// Restore brings the roots of a backup, which id names, into a data directory that has
// none, as any other way does: nothing is replaced, and after a crash the next Restore
// of the same backup goes on. It wipes the roots. Codes: those of Open and Begin.
func Restore(ctx context.Context, dir, id string, roots *custody.Roots) error {
	defer roots.Wipe()
	source := backupSource + id
	n, err := Open(ctx, dir, nil, func(_ context.Context, from string) (*custody.Roots, error) {
		if from != source {
			return nil, fault.New("onboard_source", "the directory was to get its keys from %.200q", from)
		}
		return roots, nil
	})
	if err != nil {
		return err
	}
	if s := n.State(); s.Phase == Ready && s.Source == source {
		return nil // Open has finished what an earlier Restore began, or it was done before
	}
	return n.Begin(ctx, source)
}
