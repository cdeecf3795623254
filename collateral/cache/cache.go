// SPDX-License-Identifier: Apache-2.0

// Package cache keeps collateral on disk, so that a machine is verified without
// asking the vendor each time, and for as long as signed statements last also while
// the vendor cannot be reached.
//
// # Guarantees
//
// An answer is used for MaxAge, then asked for again; when that fails it is used on,
// but never past the earliest nextUpdate or end of validity that it holds (threats.md
// B02). Failures that a service has answered are remembered for a short time, so that
// hostile evidence cannot make us ask a vendor without end. Entries are whole or not
// there, also among processes and after a power cut; one that is damaged is dropped.
// Count and bytes are bounded; what was not used for longest goes first.
//
// # Trust
//
// None: entries are as unverified as what the source returned, and the verifier
// judges them each time. An entry that fails there should be dropped with
// [Cache.Forget] before the source is asked again, or one bad answer would deny
// verification until it ages. The cache never makes a statement look newer than it
// is; that one was replaced by a newer is for collateral/floor to notice (B03).
//
// Specification: attestation.md §2.1.
package cache

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/internal/userdir"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Options configures a Cache. The zero value is for production.
type Options struct {
	// Scope names what answers depend on beside the request. Empty for what the
	// source's method Scope says, if it has one.
	Scope    string
	MaxAge   time.Duration // after which the source is asked again; zero for 24 h
	Negative time.Duration // for which a failure is remembered; zero for 30 s
	Entries  int           // at most; zero for 1024
	Bytes    int64         // of all entries at most; zero for 64 MiB
	Now      func() time.Time
	// Warn is told of what went wrong without the caller's noticing: a failure that
	// an older answer stands in for, a damaged entry, a disk that is full.
	Warn func(error)
}

// Cache is a Source that asks another one when it has to. Its methods may be called
// concurrently.
type Cache struct {
	dir    string
	source collateral.Source
	Options
}

// Open returns the cache of a source in a directory, which it makes with mode 0700
// unless it is there. A directory of others has the code store_unsafe. Caches
// of several sources may share one directory.
func Open(dir string, source collateral.Source, o Options) (*Cache, error) {
	dir, err := userdir.Open(dir)
	if err != nil {
		return nil, err
	}
	if s, ok := source.(interface{ Scope() string }); ok && o.Scope == "" {
		o.Scope = s.Scope()
	}
	o.MaxAge = cmp.Or(o.MaxAge, 24*time.Hour)
	o.Negative = cmp.Or(o.Negative, 30*time.Second)
	o.Entries = cmp.Or(o.Entries, 1024)
	o.Bytes = cmp.Or(o.Bytes, 64<<20)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Warn == nil {
		o.Warn = func(error) {}
	}
	return &Cache{dir: dir, source: source, Options: o}, nil
}

// Collateral implements collateral.Source. Its errors are the source's, by code,
// message and fix.
func (c *Cache) Collateral(ctx context.Context, want collateral.Request) (*collateral.Bundle, error) {
	key := c.key(want)
	now := c.Now()
	kept := c.bundle(key)
	if kept != nil && !now.Before(kept.until) {
		kept = nil
	}
	if kept != nil && kept.age(now) < c.MaxAge {
		return kept.Bundle, nil
	}
	failed := c.failure(key, now)
	if failed == nil {
		b, err := c.source.Collateral(ctx, want)
		if err == nil {
			return c.keep(key, now, b, kept), nil
		}
		if slices.Contains(answered, fault.Code(err)) {
			c.save(key+missSuffix, record{Key: key, At: now, Miss: missOf(err)})
		}
		failed = err
	}
	if kept != nil {
		c.Warn(fault.Wrap(failed, "collateral_stale", "use collateral fetched %s, good until %s", kept.At.UTC().Format(time.RFC3339), kept.until.UTC().Format(time.RFC3339)))
		return kept.Bundle, nil
	}
	return nil, failed
}

// keep saves what the source returned, and returns what to use of it and the older
// answer that is still good. A source that lags behind its vendor can return what
// has ended: that is not kept, but the verifier may be asking about the past.
func (c *Cache) keep(key string, now time.Time, b *collateral.Bundle, kept *entry) *collateral.Bundle {
	until, err := Expires(b)
	if err == nil && now.Before(until) {
		c.save(key+bundleSuffix, record{Key: key, At: now, Bundle: b})
		c.remove(key + missSuffix)
		return b
	}
	if err == nil {
		err = fault.New("collateral_expired", "the source returned collateral that ended %s", until.UTC().Format(time.RFC3339))
	}
	c.Warn(fmt.Errorf("not kept: %w", err))
	if kept != nil {
		return kept.Bundle
	}
	return b
}

// Forget drops what is kept for a request, so that the source is asked next.
func (c *Cache) Forget(want collateral.Request) {
	key := c.key(want)
	c.remove(key + bundleSuffix)
	c.remove(key + missSuffix)
}

// Expires returns when the first of what a bundle holds ends: nextUpdate of TCB
// info, QE identity and revocation lists, and the validity of certificates. It
// verifies nothing. A part that cannot be read, or a bundle without any, has the
// code collateral_malformed.
func Expires(b *collateral.Bundle) (time.Time, error) {
	var first time.Time
	note := func(what string, t time.Time, err error) error {
		if err == nil && t.IsZero() {
			err = errors.New("it has no end")
		}
		if err != nil {
			return fault.Wrap(err, "collateral_malformed", "%s", what)
		}
		if first.IsZero() || t.Before(first) {
			first = t
		}
		return nil
	}
	for _, d := range []struct{ what, text string }{{"TCB info", b.TCBInfo}, {"QE identity", b.QEIdentity}} {
		if d.text == "" {
			continue
		}
		var v struct {
			NextUpdate time.Time `json:"nextUpdate"`
		}
		err := strictjson.Decode([]byte(d.text), &v, strictjson.Limits{Size: collateral.MaxDocument, Depth: 8, Unknown: true})
		if err := note(d.what, v.NextUpdate, err); err != nil {
			return time.Time{}, err
		}
	}
	for _, der := range slices.Concat([]collateral.Hex{b.PCKCRL, b.RootCACRL}, b.CRLs) {
		if len(der) == 0 {
			continue
		}
		_, crl, err := collateral.ParseCRL(der)
		if err != nil {
			return time.Time{}, err
		}
		if err := note("revocation list", crl.NextUpdate, nil); err != nil {
			return time.Time{}, err
		}
	}
	for _, der := range b.Certificates {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return time.Time{}, fault.Wrap(err, "collateral_malformed", "certificate")
		}
		if err := note("certificate", cert.NotAfter, nil); err != nil {
			return time.Time{}, err
		}
	}
	if first.IsZero() {
		return first, fault.New("collateral_malformed", "the bundle holds nothing that ends")
	}
	return first, nil
}

// answered are the codes of failures that a service itself gave. A network that is
// down may be up again at once.
var answered = []string{"collateral_not_found", "collateral_refused", "collateral_rate_limited", "collateral_unavailable", "collateral_response", "collateral_issuer_chain", "collateral_too_large"}

// key names a request in this scope: 64 hexadecimal digits. Fields that do not
// matter to the answer are left out, for evidence to have no say in them.
func (c *Cache) key(want collateral.Request) string {
	switch {
	case want.VLEK:
		want.ChipID, want.TCB = [64]byte{}, 0
	case want.Product == "Turin":
		clear(want.ChipID[8:])
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %t %q %t %x %d", c.Scope, want.FMSPC, want.PCKCA, want.Enclave, want.Product, want.VLEK, want.ChipID, want.TCB))
	return hex.EncodeToString(sum[:])
}

const (
	bundleSuffix = ".bundle"
	missSuffix   = ".miss"
	maxRecord    = collateral.MaxBundle + 4096
)

// record is a file's content, behind a line with its SHA-256 in hexadecimal.
type record struct {
	Key    string             `json:"key"`
	At     time.Time          `json:"at"` // when it was fetched, or failed
	Bundle *collateral.Bundle `json:"bundle,omitempty"`
	Miss   *miss              `json:"miss,omitempty"`
}

// miss is a failure that is remembered.
type miss struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Fix     string `json:"fix"`
}

func missOf(err error) *miss { return &miss{fault.Code(err), err.Error(), fault.Fix(err)} }

// entry is an answer that is kept.
type entry struct {
	record
	until time.Time
}

// age is without bound when the clock stands before the time of fetching: one of
// the two times is wrong (threats.md F03).
func (e *entry) age(now time.Time) time.Duration {
	if now.Before(e.At) {
		return 1<<63 - 1
	}
	return now.Sub(e.At)
}

func (c *Cache) bundle(key string) *entry {
	r := c.load(key, key+bundleSuffix)
	if r == nil {
		return nil
	}
	e := &entry{record: *r}
	err := errors.New("it holds no bundle")
	if r.Bundle != nil {
		err = r.Bundle.Check()
	}
	if err == nil {
		e.until, err = Expires(r.Bundle)
	}
	if err != nil {
		c.damaged(key+bundleSuffix, err)
		return nil
	}
	return e
}

func (c *Cache) failure(key string, now time.Time) error {
	r := c.load(key, key+missSuffix)
	switch {
	case r == nil:
		return nil
	case r.Miss == nil:
		c.damaged(key+missSuffix, errors.New("it holds no failure"))
		return nil
	case now.Before(r.At) || now.Sub(r.At) >= c.Negative:
		return nil
	}
	return fault.New(r.Miss.Code, "%s", r.Miss.Message).WithFix("%s", r.Miss.Fix)
}

// load reads a record and marks it as used. It returns nil when there is none.
func (c *Cache) load(key, name string) *record {
	path := filepath.Join(c.dir, name)
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var r record
	if err == nil {
		err = decode(data, &r)
	}
	if err == nil && r.Key != key {
		err = errors.New("it is of another request")
	}
	if err != nil {
		c.damaged(name, err)
		return nil
	}
	used := time.Now()
	os.Chtimes(path, used, used) // best effort: it orders entries when some must go
	return &r
}

func (c *Cache) damaged(name string, err error) {
	c.Warn(fault.Wrap(err, "cache_damaged", "drop %s", filepath.Join(c.dir, name)))
	c.remove(name)
}

func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(errors.New("it is not a regular file"), err)
	}
	return io.ReadAll(io.LimitReader(f, maxRecord+1))
}

func decode(data []byte, r *record) error {
	const digits = 2 * sha256.Size
	if len(data) <= digits || data[digits] != '\n' {
		return errors.New("it is cut short")
	}
	body := data[digits+1:]
	if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != string(data[:digits]) {
		return errors.New("its checksum is wrong")
	}
	return strictjson.Decode(body, r, strictjson.Limits{Size: maxRecord, Depth: 10})
}

func encode(r record) ([]byte, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if len(body) > maxRecord-2*sha256.Size-1 {
		return nil, fmt.Errorf("an entry of %d bytes exceeds %d", len(body), maxRecord)
	}
	sum := sha256.Sum256(body)
	return append(fmt.Appendf(nil, "%x\n", sum), body...), nil
}

// save writes a record; that it could not be kept is no reason to fail.
func (c *Cache) save(name string, r record) {
	data, err := encode(r)
	if err == nil {
		err = durable.WriteFile(filepath.Join(c.dir, name), data, 0o600)
	}
	if err == nil {
		err = c.evict(name)
	}
	if err != nil {
		c.Warn(fault.Wrap(err, "cache_unwritable", "keep collateral in %s", c.dir))
	}
}

func (c *Cache) remove(name string) {
	if err := os.RemoveAll(filepath.Join(c.dir, name)); err != nil {
		c.Warn(fault.Wrap(err, "cache_unwritable", "drop an entry of %s", c.dir))
	}
}

// evict removes entries until count and bytes are within bounds, and what crashed
// writers left behind: failures first, of which hostile evidence can make any
// number, then what was not used for longest, but never the newest.
// Another process may do the same at the same time: each may find an entry gone.
func (c *Cache) evict(newest string) error {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	type file struct {
		name string
		size int64
		used time.Time
	}
	var files []file
	var total int64
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			continue // gone
		}
		switch name := e.Name(); {
		case durable.Leftover(name) && time.Since(fi.ModTime()) > time.Hour:
			c.remove(name)
		case strings.HasSuffix(name, bundleSuffix) || strings.HasSuffix(name, missSuffix):
			files, total = append(files, file{name, fi.Size(), fi.ModTime()}), total+fi.Size()
		}
	}
	kind := func(f file) int { return strings.Compare(filepath.Ext(f.name), missSuffix) } // .bundle < .miss
	slices.SortFunc(files, func(a, b file) int { return cmp.Or(kind(b)-kind(a), a.used.Compare(b.used)) })
	count := len(files)
	for _, f := range files {
		if count <= c.Entries && total <= c.Bytes {
			break
		}
		if f.name == newest {
			continue
		}
		c.remove(f.name)
		count, total = count-1, total-f.size
	}
	return nil
}
