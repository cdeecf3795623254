// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

const (
	entriesFile = "entries.jsonl"
	headFile    = "head.json"
	keyFile     = "log.key"
)

// maxGroup bounds the entries of one write. A tile: the leaf hashes that a group's
// proofs need are then all in tree.recent.
const maxGroup = tileSize

// MaxEntries bounds what one call of [Log.Entries] returns, beside maxReply bytes.
const (
	MaxEntries     = 1000
	maxReply       = 2 << 20
	defaultEntries = 100
)

// Attest signs [AttestedMessage] of the document with the root CA key, as
// custody.Custodian.Attest does for [Purpose].
type Attest func(ctx context.Context, document []byte) ([]byte, error)

// Log is a log open for appending. Its methods may be called concurrently.
type Log struct {
	dir     *os.File // locked
	entries *os.File
	key     *logKey
	logKey  string
	attest  []byte
	spki    []byte
	tail    Tail

	queue chan *pending
	quit  chan struct{}
	done  chan struct{}
	close sync.Once

	// Of the writer alone.
	disk    disk
	growing *growing
	failed  error

	mu   sync.Mutex
	head Head // on the disk
	tree tree // of head
}

// disk is the steps of a commit, in this order; each is durable when it returns, but
// write, which sync makes so.
type disk interface {
	write(data []byte, at int64) error
	sync() error
	publish(head Head) error
}

// pending is an Append that waits for its group.
type pending struct {
	entry []byte
	index uint64
	head  Head
	tree  tree
	err   error
	done  chan struct{}
}

// Receipt says that an entry is in the log.
type Receipt struct {
	Entry     []byte
	Index     uint64
	Inclusion [][]byte // RFC 6962 §2.1.1, in the tree of Head
	Head      Head
}

// Release is the receipt as replies carry it.
func (r Receipt) Release() *kmsapi.Release {
	return &kmsapi.Release{Head: r.Head.Wire(), Entry: r.Entry, Index: r.Index, Inclusion: r.Inclusion}
}

// Tail is what Open found beyond the last head: at most the one write that a crash cut
// short, which nobody was told of.
type Tail struct {
	Kept    int // whole entries, which are in the log now
	Dropped int // bytes that made no entry, which are gone
}

// Create makes the log of a KMS in a directory that is not there or empty, and opens
// it. It has a name and a key of its own, so that each replica's log is another one.
// A crash leaves the directory as it was, and perhaps a durable.Leftover beside it.
//
// Codes: release_log_exists; release_log_key if what attest returns does not verify
// by the root CA key (DER SubjectPublicKeyInfo).
func Create(ctx context.Context, dir string, rootSPKI []byte, attest Attest) (*Log, error) {
	dir = filepath.Clean(dir)
	seed, id := make([]byte, ed25519.SeedSize), make([]byte, 8)
	rand.Read(seed)
	rand.Read(id)
	defer clear(seed)
	key, text, err := newLogKey(fmt.Sprintf("%s%x", namePrefix(rootSPKI), id), seed)
	if err != nil {
		return nil, err
	}
	defer clear(key.private)
	signature, err := attest(ctx, []byte(text))
	if err != nil {
		return nil, fmt.Errorf("have the root vouch for the release log: %w", err)
	}
	root, err := newTree().root()
	if err != nil {
		return nil, err
	}
	checkpoint, err := key.checkpoint(0, root)
	if err != nil {
		return nil, err
	}
	head, err := headDocument{rootSPKI, checkpoint, text, signature}.verify()
	if err != nil {
		return nil, err
	}
	if err := install(dir, head, seed); err != nil {
		return nil, err
	}
	return Open(dir, rootSPKI)
}

// install makes the directory whole under another name first.
func install(dir string, head Head, seed []byte) error {
	temp, err := os.MkdirTemp(filepath.Dir(dir), ".tmp-"+filepath.Base(dir)+"-*")
	if err != nil {
		return fmt.Errorf("create the release log: %w", err)
	}
	defer os.RemoveAll(temp)
	data, err := json.Marshal(head)
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{keyFile: seed, entriesFile: nil, headFile: data} {
		if err := durable.WriteFile(filepath.Join(temp, name), data, 0o600); err != nil {
			return fmt.Errorf("create the release log: %w", err)
		}
	}
	// The kernel renames over an empty directory and over nothing else.
	err = syscall.Rename(temp, dir)
	if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) || errors.Is(err, syscall.ENOTDIR) {
		return fault.New("release_log_exists", "%s is there already and not empty", dir).WithFix("open the log that is there; a KMS never begins another one in its place")
	}
	if err != nil {
		return fmt.Errorf("create the release log %s: %w", dir, err)
	}
	parent, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return fmt.Errorf("create the release log %s: %w", dir, err)
	}
	defer parent.Close()
	return parent.Sync()
}

// Open opens a log of this root for appending, once its entries were read and found to
// be those of its head, and its key the one that the root vouches for. [Log.Tail] says
// what a crash had left behind.
//
// Codes: release_log_missing, release_log_damaged, release_log_locked (another process
// has it open).
func Open(dir string, rootSPKI []byte) (l *Log, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, missing(err, dir)
	}
	opened := []io.Closer{d}
	defer func() {
		if err != nil {
			for _, c := range opened {
				c.Close()
			}
		}
	}()
	if err := flock(d); err != nil {
		return nil, err
	}
	head, err := readHead(filepath.Join(dir, headFile), rootSPKI)
	if err != nil {
		return nil, missing(err, dir)
	}
	seed, err := readFile(filepath.Join(dir, keyFile), ed25519.SeedSize, 0o077)
	if err != nil {
		return nil, missing(err, dir)
	}
	defer clear(seed)
	if len(seed) != ed25519.SeedSize {
		return nil, fault.New("release_log_damaged", "the key of the release log has %d bytes", len(seed))
	}
	key, text, err := newLogKey(head.name, seed)
	if err != nil {
		return nil, fault.Wrap(err, "release_log_damaged", "read the key of the release log")
	}
	if text != head.logKey {
		return nil, fault.New("release_log_damaged", "the release log %s has the key of another one", dir)
	}
	file, err := os.OpenFile(filepath.Join(dir, entriesFile), os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, missing(err, dir)
	}
	opened = append(opened, file)
	l = &Log{dir: d, entries: file, key: key, logKey: text, attest: []byte(head.logKeySignature), spki: rootSPKI, growing: newTree(),
		head: head, disk: files{file, dir}, queue: make(chan *pending), quit: make(chan struct{}), done: make(chan struct{})}
	if err := l.load(head); err != nil {
		clear(key.private)
		return nil, err
	}
	go l.run()
	return l, nil
}

// load reads the log, and makes what a crash cut short an end again.
func (l *Log) load(head Head) error {
	r := lineReader(l.entries)
	if err := l.growing.scanTo(r, head); err != nil {
		return err
	}
	l.tree = l.growing.snapshot()
	// Beyond the head: the next group's write comes after the head of the one before.
	tail, err := io.ReadAll(io.LimitReader(r, maxGroup*(MaxEntry+1)+1))
	if err != nil {
		return fault.Wrap(err, "release_log_damaged", "read the end of the release log")
	}
	var whole [][]byte
	rest := tail
	for {
		line, after, found := bytes.Cut(rest, []byte("\n"))
		if !found {
			break
		}
		if _, err := ParseEntry(line); err != nil {
			break
		}
		whole, rest = append(whole, line), after
	}
	if len(whole) > maxGroup || len(tail) > maxGroup*(MaxEntry+1) {
		return fault.New("release_log_damaged", "the release log's head is older than its entries")
	}
	l.tail = Tail{Kept: len(whole), Dropped: len(rest)}
	if len(tail) == 0 {
		return nil
	}
	// Written again: after a failed fsync the kernel may hold pages that are not on
	// the disk for clean, and sync nothing.
	if err := l.entries.Truncate(l.growing.end); err != nil {
		return fmt.Errorf("cut the end of the release log: %w", err)
	}
	if len(whole) == 0 {
		return l.entries.Sync()
	}
	return l.commit(whole)
}

func missing(err error, dir string) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault.Wrap(err, "release_log_missing", "open the release log %s", dir).
			WithFix("restore the log; a KMS that lost it gives no keys, as nobody could tell what it gave")
	case fault.Code(err) == "release_log_damaged":
		return err
	}
	return fault.Wrap(err, "release_log_damaged", "open the release log %s", dir)
}

func readHead(path string, rootSPKI []byte) (Head, error) {
	data, err := readFile(path, maxHeadFile, 0o022)
	if err != nil {
		return Head{}, err
	}
	return ParseHead(data, rootSPKI)
}

// readFile returns the content of a regular file that the bits of never do not open to
// others, and one byte more than limit of a longer one.
func readFile(path string, limit int64, never fs.FileMode) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&never != 0 {
		return nil, fault.New("release_log_damaged", "%s is open to others, or no regular file: %s", path, fi.Mode())
	}
	return io.ReadAll(io.LimitReader(f, limit+1))
}

// flock takes the lock of an open file, which the kernel drops with the process.
func flock(f *os.File) error {
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch err {
		case nil:
			return nil
		case syscall.EINTR:
			continue
		}
		return fault.Wrap(err, "release_log_locked", "lock %s", f.Name()).WithFix("stop the other process that uses it")
	}
}

// files is the disk of a log.
type files struct {
	entries *os.File
	dir     string
}

func (f files) write(data []byte, at int64) error {
	_, err := f.entries.WriteAt(data, at)
	return err
}

func (f files) sync() error { return f.entries.Sync() }

func (f files) publish(head Head) error {
	data, err := json.Marshal(head)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(f.dir, headFile), data, 0o600)
}

// Append logs an entry and returns once it and a head that covers it are durable. Many
// callers share one write. Without a receipt nothing may be given.
//
// Codes: release_log_entry (the entry cannot be written), release_log_failed (the disk
// failed, now or before; the log takes nothing until it is opened anew),
// release_log_closed. When ctx ends first the entry may get logged all the same.
func (l *Log) Append(ctx context.Context, e Entry) (Receipt, error) {
	data, err := e.encode()
	if err != nil {
		return Receipt{}, err
	}
	p := &pending{entry: data, done: make(chan struct{})}
	select {
	case <-l.quit:
		return Receipt{}, closed()
	case <-ctx.Done():
		return Receipt{}, fmt.Errorf("log a release: %w", ctx.Err())
	case l.queue <- p:
	}
	select {
	case <-ctx.Done():
		return Receipt{}, fmt.Errorf("log a release: %w", ctx.Err())
	case <-p.done:
	}
	if p.err != nil {
		return Receipt{}, p.err
	}
	return l.receipt(p)
}

func (l *Log) receipt(p *pending) (Receipt, error) {
	inclusion, err := p.tree.inclusion(l.entries, p.index)
	if err != nil {
		return Receipt{}, err
	}
	return Receipt{p.entry, p.index, inclusion, p.head}, nil
}

func closed() error { return fault.New("release_log_closed", "the release log is closed") }

// run writes groups of whoever waits.
func (l *Log) run() {
	defer close(l.done)
	for {
		select {
		case <-l.quit:
			return
		case p := <-l.queue:
			l.group(p)
		}
	}
}

func (l *Log) group(first *pending) {
	group := []*pending{first}
more:
	for len(group) < maxGroup {
		select {
		case p := <-l.queue:
			group = append(group, p)
		default:
			break more
		}
	}
	if l.failed == nil {
		entries := make([][]byte, len(group))
		for i, p := range group {
			entries[i], p.index = p.entry, l.growing.size+uint64(i)
		}
		if err := l.commit(entries); err != nil {
			l.failed = fault.Wrap(err, "release_log_failed", "the release log could not be written").
				WithFix("look after the disk and start the KMS anew")
		}
	}
	head, tree := l.current()
	for _, p := range group {
		p.head, p.tree, p.err = head, tree, l.failed
		close(p.done)
	}
}

// commit makes a group durable, and then its head. After an error the log is of no
// more use: what is on the disk is unknown.
func (l *Log) commit(entries [][]byte) error {
	var data []byte
	for _, e := range entries {
		data = append(append(data, e...), '\n')
	}
	if err := l.disk.write(data, l.growing.end); err != nil {
		return err
	}
	if err := l.disk.sync(); err != nil {
		return err
	}
	for _, e := range entries {
		if err := l.growing.append(e); err != nil {
			return err
		}
	}
	root, err := l.growing.root()
	if err != nil {
		return err
	}
	checkpoint, err := l.key.checkpoint(l.growing.size, root)
	if err != nil {
		return err
	}
	head := Head{spki: string(l.spki), checkpoint: checkpoint, logKey: l.logKey, logKeySignature: string(l.attest),
		name: l.key.Name(), size: l.growing.size, root: root}
	if err := l.disk.publish(head); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.head, l.tree = head, l.growing.snapshot()
	return nil
}

func (l *Log) current() (Head, tree) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head, l.tree
}

// Head returns the newest head.
func (l *Log) Head() Head {
	head, _ := l.current()
	return head
}

// Tail says what Open found beyond the last head.
func (l *Log) Tail() Tail { return l.tail }

// Prove returns the receipt of an entry, under the newest head. An index that is not in
// the log has the code release_log_range; release_log_damaged means that the file
// changed since it was opened.
func (l *Log) Prove(index uint64) (Receipt, error) {
	head, tree := l.current()
	entries, err := tree.entries(l.entries, index, 1)
	if err != nil {
		return Receipt{}, err
	}
	if len(entries) == 0 {
		return Receipt{}, fault.New("release_log_range", "the release log has %d entries, none of index %d", head.size, index)
	}
	return l.receipt(&pending{entry: entries[0], index: index, head: head, tree: tree})
}

// Consistency proves that the log of size to continues the one of size from; zero for to
// means the newest head, which is returned in any case. Codes as of [Log.Prove].
func (l *Log) Consistency(from, to uint64) ([][]byte, Head, error) {
	head, tree := l.current()
	if to == 0 {
		to = head.size
	}
	hashes, err := tree.consistency(l.entries, from, to)
	return hashes, head, err
}

// Entries returns entries from start on, count of them or fewer: not beyond the head,
// which is returned too, nor MaxEntries or 2 MiB. Zero for count means 100. Codes as of
// [Log.Prove].
func (l *Log) Entries(start, count uint64) ([][]byte, Head, error) {
	head, tree := l.current()
	if count == 0 {
		count = defaultEntries
	}
	entries, err := tree.entries(l.entries, start, min(count, MaxEntries))
	return entries, head, err
}

// Close ends the log after the group that is being written. What waits behind it is
// refused.
func (l *Log) Close() error {
	var err error
	l.close.Do(func() {
		close(l.quit)
		<-l.done
		clear(l.key.private)
		err = errors.Join(l.entries.Close(), l.dir.Close())
	})
	return err
}
