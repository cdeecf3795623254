// SPDX-License-Identifier: Apache-2.0

package custody

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

// The file of roots is text, one field in a line, in this order; byte strings are in
// lowercase hexadecimal:
//
//	dstack-kms-roots-v1
//	ca <scalar of the root CA, 32 bytes>
//	k256 <scalar of the secp256k1 root, 32 bytes>
//	epoch <first native epoch, decimal> <its secret, 32 bytes>      or: epoch none
//	identity <root CA's SubjectPublicKeyInfo, DER> <secp256k1 root, compressed, 33 bytes>
//	provenance <kind> <source's SubjectPublicKeyInfo, DER, or -> <RFC 3339, UTC, seconds>
//	mac <HMAC-SHA-256 of all lines before, 32 bytes>
//
// The MAC's key is HKDF-SHA-256 of both scalars, without salt, for
// "dstack-kms-roots-v1 mac": damage is seen, and so is a change by someone who can
// write the disk but not read it. Who can read it can write another file; that is
// what comparing [Roots.Identity] with the pinned one is for. There is one encoding
// of a content: another is refused.
const (
	fileVersion = "dstack-kms-roots-v1"
	macLabel    = "dstack-kms-roots-v1 mac"
	maxFile     = 4 << 10 // bytes
	maxSource   = 256     // bytes of a provenance's source
)

var kinds = []string{Generated, Replicated, Restored, Upstream}

// encode returns the file, which the caller wipes.
func (s *state) encode(m material) ([]byte, error) {
	// Large enough not to be moved, which would leave a copy behind.
	b := make([]byte, 0, maxFile)
	field := func(name string, values ...[]byte) {
		b = append(b, name...)
		for _, v := range values {
			b = append(b, ' ')
			b = hex.AppendEncode(b, v)
		}
		b = append(b, '\n')
	}
	field(fileVersion)
	field("ca", m.CA)
	field("k256", m.K256)
	if m.first == 0 {
		field("epoch none")
	} else {
		field("epoch "+strconv.FormatUint(m.first, 10), m.epoch)
	}
	field("identity", s.identity.CA, s.identity.K256)
	source := "-"
	if len(s.provenance.Source) > 0 {
		source = hex.EncodeToString(s.provenance.Source)
	}
	field("provenance " + s.provenance.Kind + " " + source + " " + s.provenance.Time.Format(time.RFC3339))
	mac, err := macOf(m.CA, m.K256, b)
	if err != nil {
		clear(b)
		return nil, err
	}
	field("mac", mac)
	return b, nil
}

func macOf(ca, k256, text []byte) ([]byte, error) {
	both := slices.Concat(ca, k256)
	defer clear(both)
	key, err := hkdf.Key(sha256.New, both, nil, macLabel, size)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	h := hmac.New(sha256.New, key)
	h.Write(text)
	return h.Sum(nil), nil
}

// decode reads the file. Code root_malformed.
func decode(text []byte) (*Roots, error) {
	r, err := parse(text)
	if err != nil {
		return nil, fault.Wrap(err, "root_malformed", "the root keys' file").
			WithFix("restore the root keys from another replica or from the offline backup")
	}
	return r, nil
}

func parse(text []byte) (*Roots, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("more than %d bytes", maxFile)
	}
	version, rest, _ := bytes.Cut(text, []byte("\n"))
	if string(version) != fileVersion {
		return nil, errors.New("it is of no known version")
	}
	var failed error
	// line returns the n values of the next line.
	line := func(name string, n int) [][]byte {
		var l []byte
		l, rest, _ = bytes.Cut(rest, []byte("\n"))
		parts := bytes.Split(l, []byte(" "))
		if string(parts[0]) != name || len(parts) != n+1 {
			if failed == nil {
				failed = fmt.Errorf("its field %s is missing or has not %d values", name, n)
			}
			return make([][]byte, n)
		}
		return parts[1:]
	}
	secret := func(to, v []byte) []byte {
		if len(v) != 2*size {
			failed = errors.Join(failed, fmt.Errorf("a secret has %d digits, not %d", len(v), 2*size))
			return nil
		}
		if _, err := hex.Decode(to, v); err != nil {
			failed = errors.Join(failed, errors.New("a secret is not hexadecimal")) // the library's words quote it
		}
		return to
	}
	var b [3 * size]byte
	defer clear(b[:])
	ca := secret(b[:32:32], line("ca", 1)[0])
	k256 := secret(b[32:64:64], line("k256", 1)[0])
	var first uint64
	var epoch []byte
	if !bytes.HasPrefix(rest, []byte("epoch none\n")) {
		values := line("epoch", 2)
		n, err := strconv.ParseUint(string(values[0]), 10, 64)
		if err != nil || n == 0 {
			failed = errors.Join(failed, errors.New("its epoch is no number from 1"))
		}
		first, epoch = n, secret(b[64:], values[1])
	} else {
		line("epoch", 1)
	}
	line("identity", 2) // compared below
	provenance := line("provenance", 3)
	p := Provenance{Kind: string(provenance[0])}
	if s := string(provenance[1]); s != "-" {
		source, err := hex.DecodeString(s)
		if err != nil || len(source) > maxSource {
			failed = errors.Join(failed, errors.New("its provenance has no source"))
		}
		p.Source = source
	}
	var err error
	if p.Time, err = time.Parse(time.RFC3339, string(provenance[2])); err != nil {
		failed = errors.Join(failed, errors.New("its provenance has no time"))
	}
	if !slices.Contains(kinds, p.Kind) {
		failed = errors.Join(failed, errors.New("its provenance is of no known kind"))
	}
	if failed != nil {
		return nil, failed
	}
	r, err := newRoots(ca, k256, epoch, first, p)
	if err != nil {
		return nil, err
	}
	// Whatever the rest says, the identity and the MAC included, it must be what
	// these roots have written.
	want, err := r.s.encode(r.s.material())
	if err != nil {
		r.Wipe()
		return nil, err
	}
	defer clear(want)
	if subtle.ConstantTimeCompare(want, text) != 1 {
		r.Wipe()
		return nil, errors.New("its identity, its checksum or its form is not that of its keys")
	}
	return r, nil
}

// readSecret returns the content of a file that is its owner's alone; the caller
// wipes it. Codes root_missing, root_malformed, root_mode.
func readSecret(path string) ([]byte, error) {
	// A link is not followed, and opening a pipe does not wait.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fault.New("root_malformed", "the root keys' file %s is a symbolic link", path)
	}
	if err != nil {
		return nil, fault.Wrap(err, "root_missing", "open the root keys' file")
	}
	defer f.Close()
	info, err := f.Stat() // of the open file: what the name means may change
	if err != nil {
		return nil, fault.Wrap(err, "root_missing", "open the root keys' file %s", path)
	}
	if !info.Mode().IsRegular() {
		return nil, fault.New("root_malformed", "%s is no regular file", path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, fault.New("root_mode", "others than its owner may use the root keys' file %s (mode %04o)", path, perm).
			WithFix("chmod 600 %s; if others could read it, everything derived from these root keys is known to them", path)
	}
	if sys, ok := info.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Geteuid() {
		return nil, fault.New("root_mode", "the root keys' file %s belongs to another user", path)
	}
	text := make([]byte, maxFile+1)
	n, err := io.ReadFull(f, text)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		clear(text)
		return nil, fault.Wrap(err, "root_missing", "read the root keys' file %s", path)
	}
	return text[:n], nil
}

// Open reads roots from their file, which they change from then on. It also finishes
// an erasure that a crash interrupted. The caller compares [Roots.Identity] with what
// is pinned: a file that is whole says nothing about whose it is. Codes root_missing,
// root_malformed, root_mode, root_write.
func Open(path string) (*Roots, error) {
	text, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	r, err := decode(text)
	if err != nil {
		return nil, err
	}
	r.s.path = path
	if err := sweep(path); err != nil {
		r.Wipe()
		return nil, err
	}
	return r, nil
}

// Names of files in the making, which no reader takes for data (internal/durable).
func creating(path string) string {
	dir, base := filepath.Split(path)
	return filepath.Join(dir, ".tmp-"+base+"-new-*")
}

func erasing(path string) string {
	dir, base := filepath.Split(path)
	return filepath.Join(dir, ".tmp-"+base+"-old")
}

// sweep removes what crashes left beside the file: the older content of an erasure,
// or the newer if it did not come to pass, and files of Create that are older than an
// hour. Code root_write.
func sweep(path string) error {
	if err := shred(erasing(path)); err != nil {
		return err
	}
	left, err := filepath.Glob(creating(path))
	if err != nil {
		return nil // the directory's name has a pattern in it; leftovers do no harm
	}
	here, err := os.Stat(path)
	if err != nil {
		return fault.Wrap(err, "root_write", "remove leftovers beside the root keys' file")
	}
	for _, name := range left {
		info, err := os.Lstat(name)
		if err != nil || time.Since(info.ModTime()) < time.Hour {
			continue // gone, or being written
		}
		if os.SameFile(here, info) {
			os.Remove(name) // another name of the file itself
		} else if err := shred(name); err != nil {
			return err
		}
	}
	return nil
}

// shred overwrites a file and removes it; one that is not there is no error. Where the
// file system or the disk writes in other places than before (copy on write, flash),
// overwriting does nothing: the encryption of the disk is what is left then. Code
// root_write.
func shred(name string) error {
	fail := func(err error) error {
		return fault.Wrap(err, "root_write", "overwrite the erased root keys in %s", name)
	}
	f, err := os.OpenFile(name, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fail(err)
	}
	info, err := f.Stat()
	if err == nil {
		_, err = f.Write(make([]byte, min(info.Size(), maxFile)))
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fail(err)
	}
	if err := os.Remove(name); err != nil {
		return fail(err)
	}
	if err := syncDir(filepath.Dir(name)); err != nil {
		return fail(err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Create writes the roots to a new file of mode 0600, which they change from then on.
//
// It never replaces a file: of several calls one wins, and the rest have code
// root_exists, whatever the file that is there holds. A crash leaves either no file or
// the whole file. Other codes: root_write; root_stored, of roots that have a file
// already, since an erasure would not reach a second one.
func (r *Roots) Create(path string) error {
	if r.s == nil {
		return errWiped
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if r.s.page == nil {
		return errWiped
	}
	if r.s.path != "" {
		return fault.New("root_stored", "these root keys have a file already: %s", r.s.path)
	}
	text, err := r.s.encode(r.s.material())
	if err != nil {
		return err
	}
	defer clear(text)
	exists := fault.New("root_exists", "there is a file %s already", path).
		WithFix("use the root keys that are there; to replace them for good, move the file away")
	if _, err := os.Lstat(path); err == nil {
		return exists
	}
	fail := func(err error) error { return fault.Wrap(err, "root_write", "write the root keys' file %s", path) }
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(creating(path))) // 0600
	if err != nil {
		return fail(err)
	}
	r.s.step("create")
	if err := write(f, text); err != nil {
		os.Remove(f.Name())
		return fail(err)
	}
	r.s.step("write")
	// Unlike rename, link fails if there is a file.
	err = os.Link(f.Name(), path)
	r.s.step("link")
	if err != nil {
		_ = shred(f.Name()) // of keys that are nobody's
		if errors.Is(err, fs.ErrExist) {
			return exists
		}
		return fail(err)
	}
	err = os.Remove(f.Name())
	r.s.step("unlink")
	if err := errors.Join(err, syncDir(filepath.Dir(path))); err != nil {
		return fail(err) // the file may be there after a power cut, or not
	}
	r.s.path = path
	r.s.step("sync")
	return nil
}

func write(f *os.File, text []byte) error {
	_, err := f.Write(text)
	return errors.Join(err, f.Sync(), f.Close())
}

// EraseBefore makes the keys of all native epochs before the given one underivable
// from these roots, in memory and in their file, irrevocably. When it returns nil the
// file is durable without them; a crash leaves the file with them or without, and the
// next call or Open finishes. To erase what is erased is no error.
//
// Codes: epoch_unavailable (there are none, or it is more than MaxAhead away),
// root_changed (the file is not the one that these roots have written), root_write,
// after which the epochs may be erased or not.
func (r *Roots) EraseBefore(epoch uint64) error {
	if r.s == nil {
		return errWiped
	}
	s := r.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.page == nil {
		return errWiped
	}
	if s.path != "" { // what an earlier call did not overwrite
		if err := shred(erasing(s.path)); err != nil {
			return err
		}
	}
	m := s.material()
	if m.first != 0 && epoch <= m.first {
		return nil
	}
	secret, err := m.at(epoch)
	if err != nil {
		return err
	}
	defer clear(secret)
	if s.path == "" {
		copy(m.epoch, secret)
		s.first = epoch
		return nil
	}
	later := m
	later.epoch, later.first = secret, epoch
	if err := s.replace(m, later); err != nil {
		return err
	}
	copy(m.epoch, secret)
	s.first = epoch
	err = shred(erasing(s.path))
	s.step("shred")
	return err
}

// replace swaps the file for one of later, durably, and leaves the former content
// under the name that erasing gives. Codes root_changed, root_write.
func (s *state) replace(now, later material) error {
	old, err := s.encode(now)
	if err != nil {
		return err
	}
	defer clear(old)
	there, err := readSecret(s.path)
	if err != nil {
		return err
	}
	defer clear(there)
	if subtle.ConstantTimeCompare(old, there) != 1 {
		return fault.New("root_changed", "the root keys' file %s was changed by another process", s.path).
			WithFix("run one KMS over a data directory, and restart it")
	}
	text, err := s.encode(later)
	if err != nil {
		return err
	}
	defer clear(text)
	fail := func(err error) error { return fault.Wrap(err, "root_write", "replace the root keys' file %s", s.path) }
	f, err := os.OpenFile(erasing(s.path), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fail(err)
	}
	s.step("create")
	if err := errors.Join(f.Chmod(0o600), write(f, text)); err != nil {
		os.Remove(f.Name())
		return fail(err)
	}
	s.step("write")
	// To exchange, where rename would replace, keeps a name for the former content:
	// it can be overwritten, after a crash, too.
	if err := unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, s.path, unix.RENAME_EXCHANGE); err != nil {
		os.Remove(f.Name())
		return fail(err)
	}
	s.step("exchange")
	if err := syncDir(filepath.Dir(s.path)); err != nil {
		return fail(err)
	}
	s.step("sync")
	return nil
}
