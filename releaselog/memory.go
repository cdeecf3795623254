// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Bounds of a [Memory]. Who has a root can make any number of logs; forgetting the old
// ones for new ones is what an attacker wants, so a full memory refuses.
const (
	MaxLogs        = 256
	MaxLogsPerRoot = 32
)

const maxMemory = 1 << 20

// Memory remembers, in a file, the newest head of each log that was seen: one line for
// each root and log name, as every replica has a log of its own. The first head of a
// log is believed. Several processes may use one file; beside it is one to lock.
//
// A file that is not there is a first use. One that cannot be read is an error and
// stays one, code release_log_memory.
type Memory struct{ path string }

// memoryDocument is the file.
type memoryDocument struct {
	Version int            `json:"version"` // 1
	Heads   []headDocument `json:"heads"`
}

// OpenMemory returns the memory in a file, whose directory must exist.
func OpenMemory(path string) *Memory { return &Memory{path} }

// Observe holds a head against the one that is remembered of its log, and remembers it
// instead, durably. If the log has grown, consistency is asked for the proof that leads
// from the remembered size to that of head; it may be nil if none can be had.
//
// Codes: release_log_fork, with a [Fork]: not a continuation; release_log_shrunk, with a
// Fork too: fewer entries than before, as from a copy that was restored (a reply that
// was overtaken by another looks the same: ask for the head again);
// release_log_unproven: no proof to be had; release_log_missing: a zero Head;
// release_log_memory, release_log_memory_full, release_log_locked. On any of them the
// old head stays remembered.
func (m *Memory) Observe(ctx context.Context, head Head, consistency func(from uint64) ([][]byte, error)) error {
	if head.IsZero() {
		return fault.New("release_log_missing", "no head of a release log to remember")
	}
	unlock, err := m.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	doc, heads, err := m.read()
	if err != nil {
		return err
	}
	ofRoot := 0
	for i, old := range heads {
		if old.spki != head.spki {
			continue
		}
		ofRoot++
		if old.name != head.name {
			continue
		}
		if err := continues(old, head, consistency); err != nil {
			return err
		}
		if old.size == head.size {
			return nil
		}
		doc.Heads[i] = head.document()
		return m.write(doc)
	}
	if ofRoot >= MaxLogsPerRoot || len(heads) >= MaxLogs {
		return fault.New("release_log_memory_full", "%s remembers %d release logs, %d of them of this root", m.path, len(heads), ofRoot).
			WithFix("if the KMS has that many replicas, begin another memory")
	}
	doc.Heads = append(doc.Heads, head.document())
	return m.write(doc)
}

func continues(old, head Head, consistency func(from uint64) ([][]byte, error)) error {
	if old.logKey == head.logKey && head.size < old.size {
		return fault.Wrap(&Fork{old, head}, "release_log_shrunk", "the KMS's release log has %d entries, and had %d", head.size, old.size).
			WithFix("do not trust this KMS: its log was rolled back to an older copy")
	}
	var hashes [][]byte
	if old.logKey == head.logKey && 0 < old.size && old.size < head.size {
		if consistency == nil {
			return fault.New("release_log_unproven", "no proof was asked for that the KMS's release log grew")
		}
		var err error
		if hashes, err = consistency(old.size); err != nil {
			return fault.Wrap(err, "release_log_unproven", "ask for the proof that the KMS's release log continues what was seen of it")
		}
	}
	return Compare(old, head, hashes)
}

// Missing tells what it means that a reply of the KMS of this root had no head: nothing
// of a KMS that never had a log, and the code release_log_missing if one of its logs is
// remembered.
func (m *Memory) Missing(rootSPKI []byte) error {
	heads, err := m.Heads(rootSPKI)
	if err != nil {
		return err
	}
	if len(heads) > 0 {
		return fault.New("release_log_missing", "the KMS's reply has no head of its release log, and it had one before").
			WithFix("do not trust this KMS: it hides its log, or is not the one that it was")
	}
	return nil
}

// Heads returns what is remembered of the logs of a root, for others to [Compare].
func (m *Memory) Heads(rootSPKI []byte) ([]Head, error) {
	_, heads, err := m.read()
	if err != nil {
		return nil, err
	}
	var of []Head
	for _, h := range heads {
		if h.spki == string(rootSPKI) {
			of = append(of, h)
		}
	}
	return of, nil
}

func (m *Memory) read() (*memoryDocument, []Head, error) {
	data, err := readFile(m.path, maxMemory, 0o022)
	if errors.Is(err, fs.ErrNotExist) {
		return &memoryDocument{Version: 1}, nil, nil
	}
	var doc *memoryDocument
	var heads []Head
	if err == nil {
		doc, heads, err = parseMemory(data)
	}
	if err != nil {
		return nil, nil, fault.Wrap(err, "release_log_memory", "read the release logs seen, %s", m.path).
			WithFix("restore the file; removing it makes the next head of each log believed, whatever it hides")
	}
	return doc, heads, nil
}

// parseMemory returns the file's heads, all verified: what is remembered is evidence.
func parseMemory(data []byte) (*memoryDocument, []Head, error) {
	if len(data) > maxMemory {
		return nil, nil, fault.New("release_log_memory", "more than %d bytes", maxMemory)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var doc memoryDocument
	if err := dec.Decode(&doc); err != nil {
		return nil, nil, err
	}
	if doc.Version != 1 || len(doc.Heads) > MaxLogs || dec.More() {
		return nil, nil, fault.New("release_log_memory", "version %d with %d heads, want version 1, at most %d, and nothing more", doc.Version, len(doc.Heads), MaxLogs)
	}
	heads := make([]Head, len(doc.Heads))
	seen := map[string]bool{}
	for i, d := range doc.Heads {
		h, err := d.verify()
		if err != nil {
			return nil, nil, err
		}
		if seen[h.name+h.spki] {
			return nil, nil, fault.New("release_log_memory", "%s is there twice", h.name)
		}
		seen[h.name+h.spki], heads[i] = true, h
	}
	return &doc, heads, nil
}

func (m *Memory) write(doc *memoryDocument) error {
	data, err := json.Marshal(doc)
	if err == nil && len(data) > maxMemory {
		return fault.New("release_log_memory_full", "%s would have more than %d bytes", m.path, maxMemory)
	}
	if err == nil {
		err = durable.WriteFile(m.path, data, 0o600)
	}
	if err != nil {
		return fault.Wrap(err, "release_log_memory", "remember the head of a release log").WithFix("make room and check the permissions of %s", m.path)
	}
	return nil
}

// lock waits until no other observes.
func (m *Memory) lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(m.path+".lock", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, "release_log_memory", "open the lock of %s", m.path)
	}
	for {
		err := flock(f)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			return nil, err
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, err
		case <-time.After(5 * time.Millisecond):
		}
	}
}
