// SPDX-License-Identifier: Apache-2.0

// Package ctwatch reads certificate transparency logs and raises an alarm at every
// certificate for a name of ours whose key is not one that this gateway, or a guest that it
// vouched for, attested before ordering: such a certificate is somebody else's, who can
// pose as our apps.
//
// It reads logs of RFC 6962 and tiled ones (C2SP static-ct-api).
//
// Guarantees: heads count only with the log's signature; every entry up to a head is read,
// and counts as read only when together they give the head's root, so that a log cannot
// hide an entry from us that it shows to others without signing two trees, which is an
// alarm too; the position, and alarms until somebody acknowledges them, survive a restart;
// a certificate that cannot be parsed and has one of our names in it is an alarm; memory
// and requests are bounded. A log that is seen first is read from its head on, or from its
// beginning if it is small: what was logged before is for other monitors.
//
// Trusted: the keys of the logs, the list of known keys, the directory. Attacker-controlled:
// every byte that comes as a log's. Whoever owns the network can keep us from reading, which
// the status tells, and nothing else.
//
// Implements spec/gateway.md §4.5 and §8 item 11, threat C07.
package ctwatch

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/time/rate"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits.
const (
	maxLogs   = 32
	maxAlarms = 256     // of one log; more are counted
	maxState  = 4 << 20 // bytes
	// Backfill is how many entries a log may have to be read from its beginning.
	Backfill = 100_000
	// staleAfter is the age at which a head is an old one: logs promise a day (RFC 6962 §3).
	staleAfter = 26 * time.Hour
)

// Log is a log to watch.
type Log struct {
	URL   string // https, of the log's API or of its tiles; without a trailing slash
	Key   []byte // DER SubjectPublicKeyInfo
	Tiled bool
}

// Name is the log's host and path.
func (l Log) Name() string {
	_, name, _ := strings.Cut(l.URL, "://")
	return name
}

// ParseLogs reads a list, separated by commas, of "<url> <public key in base64>"; the URL
// of a tiled log begins with static+https. Code ct_logs.
func ParseLogs(text string) ([]Log, error) {
	var out []Log
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		bad := func(why string) ([]Log, error) {
			return nil, fault.New("ct_logs", "the certificate log %.100q %s", part, why).WithFix("write https://log.example/2026h2 <public key in base64>, with static+ before https for a tiled one")
		}
		fields := strings.Fields(part)
		if len(fields) != 2 {
			return bad("is not a URL and a key")
		}
		var l Log
		l.URL, l.Tiled = strings.CutPrefix(strings.TrimSuffix(fields[0], "/"), "static+")
		u, err := url.Parse(l.URL)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return bad("has no https URL")
		}
		if l.Key, err = base64.StdEncoding.DecodeString(fields[1]); err != nil {
			return bad("has a key that is not base64")
		}
		if _, err := logKey(l.Key); err != nil {
			return bad("has a key that logs do not have")
		}
		if slices.ContainsFunc(out, func(o Log) bool { return bytes.Equal(o.Key, l.Key) }) {
			return bad("is there twice")
		}
		if out = append(out, l); len(out) > maxLogs {
			return bad("is one too many")
		}
	}
	return out, nil
}

// Names are what certificates are looked for.
type Names struct {
	Bases []hostname.Name // and everything below them
	Exact []hostname.Name // whose control was proven here: whoever lists a name must not raise alarms
}

// Config is what a Watcher needs.
type Config struct {
	Logs  []Log
	Names func(context.Context) Names
	// Known reports whether a key (SHA-256 of its DER SubjectPublicKeyInfo) is one that a
	// certificate may have.
	Known func(ctx context.Context, spki [32]byte) (bool, error)
	Dir   string // where positions and alarms are kept
	// Every is the pause between looks at a log; 30 s.
	Every time.Duration
	// Rate is how many requests a second each log gets; 5.
	Rate float64
	// Webhook is told each alarm by POST, as JSON; empty: nobody. It is kept secret.
	Webhook string
	// HTTP asks the logs and the webhook; nil has the system's roots.
	HTTP *http.Client
	Log  *slog.Logger
	Now  func() time.Time
}

// Watcher watches logs. Make it with New.
type Watcher struct {
	cfg      Config
	logs     []*watched
	backfill uint64
}

// watched is one log.
type watched struct {
	Log
	w      *Watcher
	id     [32]byte // SHA-256 of Key (RFC 6962 §3.2)
	source source
	path   string

	mu    sync.Mutex
	state state
	size  uint64 // of the newest head
	err   error  // of the last look
}

// state is what is kept of a log.
type state struct {
	Version int      `json:"version"` // 1
	Log     string   `json:"log"`     // hexadecimal id
	Held    *place   `json:"held"`    // up to the last head that held; null before the first
	Reading *place   `json:"reading"` // on the way to Target
	Target  *Head    `json:"target"`
	ReadAt  int64    `json:"read_at"` // Unix seconds, of Held
	Alarms  []*Alarm `json:"alarms"`
	Dropped int      `json:"dropped"` // alarms beyond the most that are kept
}

// place is a position in a log: how many entries, and the subtrees that they make.
type place struct {
	Size uint64   `json:"size"`
	Edge [][]byte `json:"edge"`
	Head *Head    `json:"head,omitempty"` // of Held alone
}

// Kinds of alarms.
const (
	Certificate = "certificate" // for our name, of a key that is not ours
	Unreadable  = "unreadable"  // has our name in it, and cannot be parsed
	Fork        = "fork"        // the log signed two trees of which none continues the other
)

// Alarm is what somebody must look at.
type Alarm struct {
	Kind  string    `json:"kind"`
	Log   string    `json:"log"`
	Index uint64    `json:"index"` // of the entry; of a fork: its size
	Names []string  `json:"names"`
	Key   []byte    `json:"key"` // SHA-256 of the DER SubjectPublicKeyInfo
	At    time.Time `json:"at"`
	Text  string    `json:"text"`
	Told  bool      `json:"told"` // to the webhook
}

// source is how a log is asked.
type source interface {
	// head returns the newest head, whose signature holds.
	head(ctx context.Context) (Head, error)
	// leaves returns some leaves (MerkleTreeLeaf, RFC 6962 §3.4) from an index on, at least
	// one, none from end on.
	leaves(ctx context.Context, from, end uint64) ([][]byte, error)
	// edge returns the hashes of a compact range from 0 to the size of a head. They are the
	// log's word.
	edge(ctx context.Context, h Head) ([][]byte, error)
}

var ranges = &compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}

// New reads what was kept. Codes ct_config, ct_state.
func New(c Config) (*Watcher, error) {
	if len(c.Logs) == 0 || c.Names == nil || c.Known == nil || c.Dir == "" {
		return nil, fault.New("ct_config", "a watch needs logs, names, known keys and a directory")
	}
	if c.Webhook != "" {
		if u, err := url.Parse(c.Webhook); err != nil || u.Scheme != "https" || u.Host == "" {
			return nil, fault.New("ct_config", "the address of the webhook is no https URL")
		}
	}
	c.Every, c.Rate = cmp.Or(c.Every, 30*time.Second), cmp.Or(c.Rate, 5)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.HTTP == nil {
		c.HTTP = &http.Client{Transport: http.DefaultTransport.(*http.Transport).Clone()}
	}
	c.HTTP = &http.Client{Transport: c.HTTP.Transport, Timeout: requestTime, CheckRedirect: func(*http.Request, []*http.Request) error {
		return errors.New("it leads to another address")
	}}
	if err := durable.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fault.Wrap(err, "ct_state", "make the directory of the watch")
	}
	w := &Watcher{cfg: c, backfill: Backfill}
	for _, l := range c.Logs {
		key, err := logKey(l.Key)
		if err != nil {
			return nil, fault.Wrap(err, "ct_config", "the key of the log %s", l.Name())
		}
		x := &watched{Log: l, w: w, id: sha256.Sum256(l.Key)}
		x.path = filepath.Join(c.Dir, hex.EncodeToString(x.id[:])+".json")
		ask := &asker{http: c.HTTP, base: l.URL, limit: rate.NewLimiter(rate.Limit(c.Rate), 1+int(c.Rate))}
		if x.source = (&rfc6962Log{asker: ask, key: key}); l.Tiled {
			x.source = &tiledLog{asker: ask, key: key, id: x.id}
		}
		if err := x.load(); err != nil {
			return nil, err
		}
		w.logs = append(w.logs, x)
	}
	return w, nil
}

func (x *watched) load() error {
	x.state = state{Version: 1, Log: hex.EncodeToString(x.id[:])}
	data, err := os.ReadFile(x.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		x.state, err = parseState(data, x.id)
	}
	if err != nil {
		return fault.Wrap(err, "ct_state", "read where the watch of %s was, %s", x.Name(), x.path).
			WithFix("restore the file; removing it forgets alarms, and begins at the log's head")
	}
	return nil
}

func parseState(data []byte, id [32]byte) (s state, err error) {
	if err := strictjson.Decode(data, &s, strictjson.Limits{Size: maxState, Depth: 8}); err != nil {
		return s, err
	}
	if s.Version != 1 || s.Log != hex.EncodeToString(id[:]) || len(s.Alarms) > maxAlarms || (s.Reading == nil) != (s.Target == nil) {
		return s, errors.New("it is of another version or log, or not whole")
	}
	for _, p := range []*place{s.Held, s.Reading} {
		if p != nil {
			if _, err := p.tree(); err != nil {
				return s, err
			}
		}
	}
	if s.Held != nil && (s.Held.Head == nil || s.Held.Head.Size != s.Held.Size) || s.Reading != nil && s.Reading.Size > s.Target.Size {
		return s, errors.New("its position is not of its head")
	}
	if slices.Contains(s.Alarms, nil) {
		return s, errors.New("an alarm is null")
	}
	return s, nil
}

func (p *place) tree() (*compact.Range, error) {
	for _, h := range p.Edge {
		if len(h) != sha256.Size {
			return nil, errors.New("a hash has another length")
		}
	}
	return ranges.NewRange(0, p.Size, p.Edge)
}

// save keeps the state. The caller holds x.mu.
func (x *watched) save() error {
	data, err := json.Marshal(&x.state)
	if err == nil {
		err = durable.WriteFile(x.path, data, 0o600)
	}
	if err != nil {
		return fault.Wrap(err, "ct_state", "keep where the watch of %s is", x.Name())
	}
	return nil
}

// Run watches until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	var work sync.WaitGroup
	for _, x := range w.logs {
		work.Go(func() { x.run(ctx) })
	}
	work.Wait()
	w.cfg.HTTP.CloseIdleConnections()
}

func (x *watched) run(ctx context.Context) {
	said := ""
	for {
		err := x.look(ctx)
		if ctx.Err() != nil {
			return
		}
		x.mu.Lock()
		x.err = err
		x.mu.Unlock()
		text := ""
		if err != nil {
			text = err.Error()
		}
		if text != said && text != "" {
			x.w.cfg.Log.Warn("certificate log", "log", x.Name(), "code", fault.Code(err), "error", err)
		}
		said = text
		x.tell(ctx)
		select {
		case <-ctx.Done():
			return
		case <-time.After(x.w.cfg.Every):
		}
	}
}

// look reads on up to the newest head. Codes ct_log (no answer, or none that can be used),
// ct_head (its signature), ct_stale, ct_fork, ct_known, ct_state.
func (x *watched) look(ctx context.Context) error {
	h, err := x.source.head(ctx)
	if err != nil {
		return err
	}
	x.mu.Lock()
	x.size = max(x.size, h.Size)
	held, target := x.state.Held, x.state.Target
	x.mu.Unlock()
	if held == nil {
		if held, err = x.begin(ctx, h); err != nil {
			return err
		}
	}
	if err := x.compare(held.Head, h); err != nil {
		return err
	}
	if target == nil || target.Size <= held.Size {
		target = nil
		if h.Size > held.Size {
			target = &h
		}
	}
	// What was begun is ended before something newer: its head is one to hold the log to.
	for target != nil {
		if err := x.read(ctx, *target); err != nil {
			return err
		}
		if target, held = nil, x.held(); h.Size > held.Size {
			target = &h
		}
	}
	if err := x.compare(held.Head, h); err != nil {
		return err
	}
	if x.w.cfg.Now().Sub(h.At()) > staleAfter {
		return fault.New("ct_stale", "the newest head of %s is of %s", x.Name(), h.At().UTC().Format(time.RFC3339))
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.state.ReadAt = x.w.cfg.Now().Unix()
	return nil
}

func (x *watched) held() *place {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.state.Held
}

// begin takes up a log that is seen first.
func (x *watched) begin(ctx context.Context, h Head) (*place, error) {
	p := &place{Head: &Head{Root: rfc6962.DefaultHasher.EmptyRoot()}, Edge: [][]byte{}}
	if h.Size > x.w.backfill {
		edge, err := x.source.edge(ctx, h)
		if err != nil {
			return nil, err
		}
		p = &place{Size: h.Size, Edge: edge, Head: &h}
		t, err := p.tree()
		if err == nil {
			var root []byte
			if root, err = t.GetRootHash(nil); err == nil && !bytes.Equal(root, h.Root) {
				err = errors.New("they make another root")
			}
		}
		if err != nil {
			return nil, fault.Wrap(err, "ct_log", "the hashes at the head of %s", x.Name())
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.state.Held = p
	return p, x.save()
}

// compare holds a new head against the one that held.
func (x *watched) compare(held *Head, h Head) error {
	switch {
	case h.Size == held.Size && h.Size > 0 && !bytes.Equal(h.Root, held.Root):
	case h.Size < held.Size && h.Timestamp > held.Timestamp:
	default:
		return nil // also an older head, of another of the log's servers
	}
	return x.fork(*held, h)
}

func (x *watched) fork(held, h Head) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	a, _ := json.Marshal(held) // evidence: both are signed
	b, _ := json.Marshal(h)
	x.raise(&Alarm{Kind: Fork, Index: h.Size, Text: string(a) + " " + string(b)})
	return errors.Join(fault.New("ct_fork", "the log %s signed two trees, of %d and of %d entries, of which none continues the other", x.Name(), held.Size, h.Size).
		WithFix("do not count on this log; tell those who keep lists of logs"), x.save())
}

// read reads the entries up to a head, and then holds them against it.
func (x *watched) read(ctx context.Context, target Head) error {
	x.mu.Lock()
	held, at := x.state.Held, x.state.Reading
	if at == nil || x.state.Target == nil || x.state.Target.Size != target.Size || !bytes.Equal(x.state.Target.Root, target.Root) {
		at = &place{Size: held.Size, Edge: held.Edge}
	}
	x.mu.Unlock()
	tree, err := at.tree()
	if err != nil {
		return err
	}
	for tree.End() < target.Size {
		from := tree.End()
		leaves, err := x.source.leaves(ctx, from, target.Size)
		if err != nil {
			return err
		}
		if len(leaves) == 0 || uint64(len(leaves)) > target.Size-from {
			return fault.New("ct_log", "the log %s gave %d entries from %d on", x.Name(), len(leaves), from)
		}
		alarms, err := x.judge(ctx, from, leaves)
		if err != nil {
			return err
		}
		for _, l := range leaves {
			if err := tree.Append(rfc6962.DefaultHasher.HashLeaf(l), nil); err != nil {
				return err
			}
		}
		x.mu.Lock()
		for _, a := range alarms {
			x.raise(a)
		}
		x.state.Target, x.state.Reading = &target, &place{Size: tree.End(), Edge: slices.Clone(tree.Hashes())}
		err = x.save()
		x.mu.Unlock()
		if err != nil {
			return err
		}
	}
	root, err := tree.GetRootHash(nil)
	if err != nil {
		return err
	}
	x.mu.Lock()
	x.state.Target, x.state.Reading = nil, nil
	good := bytes.Equal(root, target.Root)
	if good {
		x.state.Held, x.state.ReadAt = &place{Size: target.Size, Edge: slices.Clone(tree.Hashes()), Head: &target}, x.w.cfg.Now().Unix()
	}
	err = x.save()
	x.mu.Unlock()
	if !good {
		return errors.Join(x.fork(*held.Head, target), err)
	}
	return err
}

// judge looks at leaves. Code ct_known.
func (x *watched) judge(ctx context.Context, from uint64, leaves [][]byte) ([]*Alarm, error) {
	want := newWanted(x.w.cfg.Names(ctx))
	var alarms []*Alarm
	for i, l := range leaves {
		if !want.mentioned(l) {
			continue
		}
		index := from + uint64(i)
		cert, err := parseLeaf(l)
		if err != nil {
			alarms = append(alarms, &Alarm{Kind: Unreadable, Index: index, Text: clip(err.Error())})
			continue
		}
		names := want.of(cert)
		if len(names) == 0 {
			continue
		}
		spki := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
		known, err := x.w.cfg.Known(ctx, spki)
		if err != nil {
			return nil, fault.Wrap(err, "ct_known", "looking for the key of entry %d of %s", index, x.Name())
		}
		if !known {
			alarms = append(alarms, &Alarm{Kind: Certificate, Index: index, Names: names, Key: spki[:],
				Text: clip("issued by " + cert.Issuer.String() + ", serial " + cert.SerialNumber.Text(16) + ", until " + cert.NotAfter.UTC().Format(time.RFC3339))})
		}
	}
	return alarms, nil
}

// raise keeps an alarm, once. The caller holds x.mu, and saves.
func (x *watched) raise(a *Alarm) {
	a.Log, a.At = x.Name(), x.w.cfg.Now().UTC()
	for _, b := range x.state.Alarms {
		if b.Kind == a.Kind && b.Index == a.Index {
			return
		}
	}
	x.w.cfg.Log.Error("ALARM: certificate transparency", "kind", a.Kind, "log", a.Log, "index", a.Index, "names", strings.Join(a.Names, " "), "key", hex.EncodeToString(a.Key), "text", a.Text)
	if len(x.state.Alarms) == maxAlarms {
		x.state.Dropped++
		return
	}
	x.state.Alarms = append(x.state.Alarms, a)
}

// tell tells the webhook what it was not told.
func (x *watched) tell(ctx context.Context) {
	if x.w.cfg.Webhook == "" {
		return
	}
	x.mu.Lock()
	var list []Alarm
	for _, a := range x.state.Alarms {
		if !a.Told {
			list = append(list, *a)
		}
	}
	x.mu.Unlock()
	for _, a := range list {
		if err := x.w.post(ctx, a); err != nil {
			x.w.cfg.Log.Warn("the webhook of alarms", "error", err)
			return
		}
		x.mu.Lock()
		for _, b := range x.state.Alarms {
			b.Told = b.Told || b.Kind == a.Kind && b.Index == a.Index
		}
		err := x.save()
		x.mu.Unlock()
		if err != nil {
			x.w.cfg.Log.Warn("certificate log", "log", x.Name(), "code", fault.Code(err), "error", err)
		}
	}
}

func (w *Watcher) post(ctx context.Context, a Alarm) error {
	body, err := json.Marshal(a)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.cfg.Webhook, bytes.NewReader(body))
	if err != nil {
		return errors.New("its address is none")
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := w.cfg.HTTP.Do(req)
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err // without the address, which is a secret
	}
	if err != nil {
		return err
	}
	io.Copy(io.Discard, io.LimitReader(resp.Body, 4<<10))
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return errors.New("it answers " + resp.Status)
	}
	return nil
}

// Status is what the watch knows.
type Status struct {
	Red     bool      // there are alarms
	Checked time.Time // when the log was read that was read longest ago; zero: one never was
	Logs    []LogStatus
	Alarms  []Alarm // newest first
	Dropped int     // alarms that there was no room for
}

// LogStatus is how the watch of a log stands.
type LogStatus struct {
	Name       string
	Size, Read uint64
	At         time.Time
	Err        error
}

// Status returns what the watch knows.
func (w *Watcher) Status() Status {
	var s Status
	for i, x := range w.logs {
		x.mu.Lock()
		l := LogStatus{Name: x.Name(), Size: x.size, Err: x.err}
		if x.state.Held != nil {
			l.Read = x.state.Held.Size
		}
		if x.state.Reading != nil {
			l.Read = x.state.Reading.Size
		}
		if x.state.ReadAt != 0 {
			l.At = time.Unix(x.state.ReadAt, 0)
		}
		for _, a := range x.state.Alarms {
			s.Alarms = append(s.Alarms, *a)
		}
		s.Dropped += x.state.Dropped
		x.mu.Unlock()
		if i == 0 || l.At.Before(s.Checked) {
			s.Checked = l.At
		}
		s.Logs = append(s.Logs, l)
	}
	slices.SortStableFunc(s.Alarms, func(a, b Alarm) int { return b.At.Compare(a.At) })
	s.Red = len(s.Alarms)+s.Dropped > 0
	return s
}

// Acknowledge ends the alarms of an entry of a log, and with the last of a log the count of
// those that there was no room for. Code ct_alarm.
func (w *Watcher) Acknowledge(log string, index uint64) error {
	for _, x := range w.logs {
		if x.Name() != log {
			continue
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		n := len(x.state.Alarms)
		x.state.Alarms = slices.DeleteFunc(x.state.Alarms, func(a *Alarm) bool { return a.Index == index })
		if len(x.state.Alarms) == n {
			break
		}
		if len(x.state.Alarms) == 0 {
			x.state.Dropped = 0
		}
		return x.save()
	}
	return fault.New("ct_alarm", "there is no alarm at entry %d of a log %.100q", index, log)
}

// wanted are names in the forms that are compared.
type wanted struct {
	bases, exact []string
	needles      [][]byte
}

func newWanted(n Names) *wanted {
	w := &wanted{}
	for _, name := range n.Bases {
		w.bases = append(w.bases, string(name))
	}
	for _, name := range n.Exact {
		w.exact = append(w.exact, string(name))
	}
	for _, name := range append(slices.Clone(n.Bases), n.Exact...) {
		w.needles = append(w.needles, []byte(name))
		if _, parent := name.Split(); parent != "" {
			w.needles = append(w.needles, []byte("*."+parent))
		}
	}
	return w
}

// mentioned reports whether a name of ours is in the bytes, whatever they are.
func (w *wanted) mentioned(b []byte) bool {
	low := make([]byte, len(b))
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		low[i] = c
	}
	return slices.ContainsFunc(w.needles, func(n []byte) bool { return bytes.Contains(low, n) })
}

// of returns the names of a certificate with which somebody can pose as one of ours.
func (w *wanted) of(c *x509.Certificate) []string {
	var out []string
	for _, name := range append(slices.Clone(c.DNSNames), c.Subject.CommonName) {
		low := strings.TrimSuffix(strings.ToLower(name), ".")
		parent, wild := strings.CutPrefix(low, "*.")
		covers := func(own string) bool {
			_, up, _ := strings.Cut(own, ".")
			return low == own || wild && parent == up
		}
		if slices.ContainsFunc(w.bases, func(own string) bool { return covers(own) || strings.HasSuffix(low, "."+own) }) || slices.ContainsFunc(w.exact, covers) {
			if name = clip(name); !slices.Contains(out, name) && len(out) < 16 {
				out = append(out, name)
			}
		}
	}
	return out
}

// clip bounds what of a stranger's text is kept.
func clip(s string) string {
	if len(s) > 300 {
		return strings.ToValidUTF8(s[:300], "") + "…"
	}
	return strings.ToValidUTF8(s, "")
}
