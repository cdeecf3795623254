// SPDX-License-Identifier: Apache-2.0

// Package history is what a VMM remembers for its operator: events of VMs, samples
// of what they use, and who asked for which change. It is a SQLite database, so that
// it can be asked questions that its writer did not think of.
//
// # Guarantees
//
//   - What [Store.Audit] returned for survives the end of this process, however it
//     ends. Events and samples are written behind, within a second.
//   - Writing never blocks a VM: when the queue is full entries are dropped, and
//     their number is recorded.
//   - The size is bounded: per VM and in all, by number and age. One guest that
//     reports without end pushes out its own past only.
//   - A database of a newer program is not touched; one that is broken is put aside.
//
// It is a report for people and decides nothing. Names and bodies of events are the
// guests' words. No secret is written: of a request, its method, its VM and its
// outcome.
package history

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of what is kept.
type Limits struct {
	PerVM  int           // events of one VM
	Rows   int           // of each table
	MaxAge time.Duration // of everything
}

// DefaultLimits keep the database below about 100 MiB.
var DefaultLimits = Limits{PerVM: 5000, Rows: 200_000, MaxAge: 30 * 24 * time.Hour}

// Event is something that happened to a VM.
type Event struct {
	VM     string `json:"vm"`
	TimeMS int64  `json:"time_ms"` // Unix time
	Event  string `json:"event"`
	Body   string `json:"body"`
}

// Audit is a change that somebody asked for.
type Audit struct {
	TimeMS  int64  `json:"time_ms"`
	Who     string `json:"who"`     // such as "uid 1000 pid 4711" or "token 1"
	Method  string `json:"method"`  // of the API
	VM      string `json:"vm"`      // what it was about, where that is known
	Outcome string `json:"outcome"` // "ok", or the code of the refusal
}

// Sample is what a VM used at a time.
type Sample struct {
	VM        string `json:"vm"`
	TimeMS    int64  `json:"time_ms"`
	CPUMS     int64  `json:"cpu_ms"`     // of QEMU since its start
	RSSBytes  int64  `json:"rss_bytes"`  // of QEMU
	DiskBytes int64  `json:"disk_bytes"` // that the data disk takes on the host
}

// schema is what each version of the database adds to the one before; user_version
// counts them.
var schema = []string{
	`CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, vm TEXT NOT NULL, time_ms INTEGER NOT NULL, event TEXT NOT NULL, body TEXT NOT NULL) STRICT;
	 CREATE INDEX events_vm ON events (vm, id);
	 CREATE INDEX events_time ON events (time_ms);
	 CREATE TABLE audit (id INTEGER PRIMARY KEY AUTOINCREMENT, time_ms INTEGER NOT NULL, who TEXT NOT NULL, method TEXT NOT NULL, vm TEXT NOT NULL, outcome TEXT NOT NULL) STRICT;
	 CREATE INDEX audit_vm ON audit (vm, id);
	 CREATE INDEX audit_time ON audit (time_ms);
	 CREATE TABLE samples (id INTEGER PRIMARY KEY AUTOINCREMENT, vm TEXT NOT NULL, time_ms INTEGER NOT NULL, cpu_ms INTEGER NOT NULL, rss_bytes INTEGER NOT NULL, disk_bytes INTEGER NOT NULL) STRICT;
	 CREATE INDEX samples_vm ON samples (vm, id);
	 CREATE INDEX samples_time ON samples (time_ms);`,
}

const (
	maxQueue   = 4096
	batch      = 256
	maxText    = 4096 // bytes of any text that is written
	pruneAfter = 500  // entries
)

// Store is an open history.
type Store struct {
	db     *sql.DB
	limits Limits
	queue  chan any
	lost   atomic.Int64
	stop   chan struct{}
	done   chan struct{}
	once   sync.Once
}

// Open opens the history at path, mode 0600, making or migrating it. A database that
// is broken is renamed to path + ".broken", and a new one begun.
//
// Codes: history_newer, history_open.
func Open(ctx context.Context, path string, limits Limits) (*Store, error) {
	db, err := open(ctx, path)
	if errors.Is(err, errBroken) {
		if os.Rename(path, path+".broken") == nil {
			os.Remove(path + "-wal")
			os.Remove(path + "-shm")
			db, err = open(ctx, path)
		}
	}
	if err != nil {
		if fault.Code(err) == "" {
			err = fault.Wrap(err, "history_open", "open the history %s", path).WithFix("remove %s", path)
		}
		return nil, err
	}
	s := &Store{db: db, limits: limits, queue: make(chan any, maxQueue), stop: make(chan struct{}), done: make(chan struct{})}
	go s.write()
	return s, nil
}

// errBroken says that the file is no database, or a damaged one; a full disk is not.
var errBroken = errors.New("the database is broken")

// broken marks an error of SQLite that says so.
func broken(err error) error {
	var e *sqlite.Error
	if errors.As(err, &e) && (e.Code()&0xff == sqlite3.SQLITE_CORRUPT || e.Code()&0xff == sqlite3.SQLITE_NOTADB) {
		return errors.Join(errBroken, err)
	}
	return err
}

func open(ctx context.Context, path string) (_ *sql.DB, err error) {
	// Made here, so that it has this mode; its side files get the same one.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	f.Close()
	dsn := url.URL{Scheme: "file", Path: path, RawQuery: url.Values{"_pragma": {
		"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(NORMAL)", "journal_size_limit(4194304)",
	}}.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1) // one writer; readers are few
	defer func() {
		if err != nil {
			db.Close()
		}
	}()
	var check string
	if err := db.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&check); err != nil {
		return nil, broken(err)
	}
	if check != "ok" {
		return nil, fmt.Errorf("%w: %.200s", errBroken, check)
	}
	var version int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return nil, err
	}
	if version > len(schema) {
		return nil, fault.New("history_newer", "the history %s is of version %d, this program knows %d", path, version, len(schema)).
			WithFix("use the newer dstack-vmm, or move %s away", path)
	}
	for ; version < len(schema); version++ {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return nil, err
		}
		if _, err = tx.ExecContext(ctx, schema[version]); err == nil {
			_, err = tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", version+1))
		}
		if err != nil {
			tx.Rollback()
			return nil, fmt.Errorf("migrate to version %d: %w", version+1, err)
		}
		if err := tx.Commit(); err != nil {
			return nil, err
		}
	}
	return db, nil
}

// Close writes what is queued and closes the database. It may be called twice.
func (s *Store) Close() error {
	var err error
	s.once.Do(func() {
		close(s.stop)
		<-s.done
		err = s.db.Close()
	})
	return err
}

// Event records an event, soon.
func (s *Store) Event(e Event) { s.enqueue(e) }

// Sample records a sample, soon.
func (s *Store) Sample(m Sample) { s.enqueue(m) }

func (s *Store) enqueue(entry any) {
	select {
	case s.queue <- entry:
	default:
		s.lost.Add(1)
	}
}

// Audit records a request before it returns.
func (s *Store) Audit(ctx context.Context, a Audit) error {
	_, err := s.db.ExecContext(ctx, "INSERT INTO audit (time_ms, who, method, vm, outcome) VALUES (?, ?, ?, ?, ?)",
		a.TimeMS, cut(a.Who), cut(a.Method), cut(a.VM), cut(a.Outcome))
	if err != nil {
		return fmt.Errorf("record a request: %w", err)
	}
	return nil
}

// write is the goroutine that empties the queue.
func (s *Store) write() {
	defer close(s.done)
	written := pruneAfter // prune at the start
	touched := map[string]bool{}
	for {
		var entries []any
		stopping := false
		select {
		case e := <-s.queue:
			entries = append(entries, e)
		case <-s.stop:
			stopping = true
		}
	more:
		for len(entries) < batch || stopping {
			select {
			case e := <-s.queue:
				entries = append(entries, e)
			default:
				break more
			}
		}
		if n := s.lost.Swap(0); n > 0 {
			entries = append(entries, Event{TimeMS: time.Now().UnixMilli(), Event: "history.lost", Body: fmt.Sprint(n)})
		}
		if s.insert(entries) == nil {
			for _, e := range entries {
				if e, ok := e.(Event); ok {
					touched[e.VM] = true
				}
			}
			if written += len(entries); written >= pruneAfter {
				s.prune(touched)
				written, touched = 0, map[string]bool{}
			}
		} // else: the disk is full, or the like; the next batch tries again
		if stopping {
			return
		}
	}
}

func (s *Store) insert(entries []any) error {
	if len(entries) == 0 {
		return nil
	}
	tx, err := s.db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	for _, e := range entries {
		switch e := e.(type) {
		case Event:
			_, err = tx.Exec("INSERT INTO events (vm, time_ms, event, body) VALUES (?, ?, ?, ?)", cut(e.VM), e.TimeMS, cut(e.Event), cut(e.Body))
		case Sample:
			_, err = tx.Exec("INSERT INTO samples (vm, time_ms, cpu_ms, rss_bytes, disk_bytes) VALUES (?, ?, ?, ?, ?)", cut(e.VM), e.TimeMS, e.CPUMS, e.RSSBytes, e.DiskBytes)
		}
		if err != nil {
			return err
		}
	}
	return tx.Commit()
}

// prune deletes what is over the limits. What cannot be deleted now can be next time.
func (s *Store) prune(vms map[string]bool) {
	for vm := range vms {
		s.db.Exec("DELETE FROM events WHERE vm = ? AND id <= (SELECT id FROM events WHERE vm = ? ORDER BY id DESC LIMIT 1 OFFSET ?)", vm, vm, s.limits.PerVM)
	}
	oldest := time.Now().Add(-s.limits.MaxAge).UnixMilli()
	for _, table := range []string{"events", "audit", "samples"} {
		s.db.Exec("DELETE FROM "+table+" WHERE time_ms < ?", oldest)
		s.db.Exec("DELETE FROM "+table+" WHERE id <= (SELECT id FROM "+table+" ORDER BY id DESC LIMIT 1 OFFSET ?)", s.limits.Rows)
	}
}

// Query says which entries are wanted.
type Query struct {
	VM      string // "" for all
	SinceMS int64
	Limit   int // newest entries, at most MaxResults
}

// MaxResults is the most that one query returns.
const MaxResults = 10_000

func (q Query) args() (string, []any) {
	limit := q.Limit
	if limit <= 0 || limit > MaxResults {
		limit = MaxResults
	}
	return "WHERE (? = '' OR vm = ?) AND time_ms >= ? ORDER BY id DESC LIMIT ?", []any{q.VM, q.VM, q.SinceMS, limit}
}

// list returns the entries of a query, oldest first.
func list[T any](ctx context.Context, s *Store, q Query, table, columns string, scan func(*sql.Rows, *T) error) ([]T, error) {
	where, args := q.args()
	rows, err := s.db.QueryContext(ctx, "SELECT "+columns+" FROM "+table+" "+where, args...)
	if err != nil {
		return nil, fmt.Errorf("read the history: %w", err)
	}
	defer rows.Close()
	var out []T
	for rows.Next() {
		var e T
		if err := scan(rows, &e); err != nil {
			return nil, fmt.Errorf("read the history: %w", err)
		}
		out = append(out, e)
	}
	slices.Reverse(out)
	return out, rows.Err()
}

// Events returns events, oldest first.
func (s *Store) Events(ctx context.Context, q Query) ([]Event, error) {
	return list(ctx, s, q, "events", "vm, time_ms, event, body", func(r *sql.Rows, e *Event) error { return r.Scan(&e.VM, &e.TimeMS, &e.Event, &e.Body) })
}

// Audits returns requests, oldest first.
func (s *Store) Audits(ctx context.Context, q Query) ([]Audit, error) {
	return list(ctx, s, q, "audit", "time_ms, who, method, vm, outcome", func(r *sql.Rows, a *Audit) error {
		return r.Scan(&a.TimeMS, &a.Who, &a.Method, &a.VM, &a.Outcome)
	})
}

// Samples returns samples, oldest first.
func (s *Store) Samples(ctx context.Context, q Query) ([]Sample, error) {
	return list(ctx, s, q, "samples", "vm, time_ms, cpu_ms, rss_bytes, disk_bytes", func(r *sql.Rows, m *Sample) error {
		return r.Scan(&m.VM, &m.TimeMS, &m.CPUMS, &m.RSSBytes, &m.DiskBytes)
	})
}

func cut(text string) string {
	if len(text) > maxText {
		return text[:maxText]
	}
	return text
}
