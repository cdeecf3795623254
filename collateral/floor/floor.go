// SPDX-License-Identifier: Apache-2.0

// Package floor remembers, across runs, how new the newest verified statement of a
// vendor was, so that an older one is noticed although it is signed and has not
// expired (threats.md B03).
//
// A vendor's statements are numbered: Intel's TCB info and QE identity by
// tcbEvaluationDataNumber, per FMSPC, and AMD's revocation lists by CRL number, per
// product. Whoever hands out collateral can replay one for weeks until its
// nextUpdate, and so hide that a TCB was declared out of date. [Store.Raise] takes
// the number of a statement and refuses one below the highest it has seen.
//
// # Guarantees
//
// Floors only rise. When Raise returns nil, the floor outlives a power cut. Several
// processes may use one store. A store that cannot be read is an error and stays
// one: forgetting what was seen is what an attacker wants. A store that is not there
// is a first use; whoever can delete the user's files is beyond us.
//
// # Trust
//
// Numbers must come from statements that verified under production roots: another
// root could name any number and lock the vendor's out. Keep a store of its own for
// each set of development roots. The floor cannot help the first time; pin one in
// the policy for that.
package floor

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral/internal/userdir"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxProducts bounds how many products one store remembers; each takes a statement
// that verified.
const MaxProducts = 4096

// maxFile bounds the file in bytes.
const maxFile = 1 << 20

// Store is a directory with the file floor.json. Its methods may be called
// concurrently.
type Store struct{ dir string }

// document is the file.
type document struct {
	Version int               `json:"version"` // 1
	Floors  map[string]uint64 `json:"floors"`  // by product
}

// Open returns the store in a directory, which it makes with mode 0700 unless it is
// there. A directory of others has the code store_unsafe.
func Open(dir string) (*Store, error) {
	dir, err := userdir.Open(dir)
	if err != nil {
		return nil, err
	}
	return &Store{dir: dir}, nil
}

// Floor returns the highest number seen for a product: an FMSPC as 12 lowercase
// hexadecimal digits, or Milan, Genoa or Turin, as in attest.Claims.Product. An FMSPC
// alone stands for the statements about TDX; behind "sgx:" it stands for those about
// SGX, which the vendor numbers apart. It is zero when there was none. A store that
// cannot be read has the code floor_unreadable, another product floor_product.
func (s *Store) Floor(product string) (uint64, error) {
	if err := checkProduct(product); err != nil {
		return 0, err
	}
	doc, err := s.read()
	if err != nil {
		return 0, err
	}
	return doc.Floors[product], nil
}

// Raise records that a statement numbered n was verified for a product. One below
// the floor has the code collateral_rollback and changes nothing. The other codes
// are Floor's, floor_unwritable, floor_locked when ctx ends before other processes
// are done, and floor_full.
func (s *Store) Raise(ctx context.Context, product string, n uint64) error {
	if err := checkProduct(product); err != nil {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	doc, err := s.read()
	if err != nil {
		return err
	}
	switch have, known := doc.Floors[product]; {
	case n < have:
		return fault.New("collateral_rollback", "the vendor's statement for %s is number %d, and number %d was seen before: it is out of date although it has not expired", product, n, have).
			WithFix("fetch collateral from another service; after a change from early to standard updates, wait for standard to catch up")
	case known && n == have:
		return nil
	case !known && len(doc.Floors) >= MaxProducts:
		return fault.New("floor_full", "%s remembers %d products already", s.path(), MaxProducts)
	}
	doc.Floors[product] = n
	data, err := json.Marshal(doc)
	if err != nil {
		return fault.Wrap(err, "floor_unwritable", "write %s", s.path())
	}
	if err := durable.WriteFile(s.path(), append(data, '\n'), 0o600); err != nil {
		return fault.Wrap(err, "floor_unwritable", "remember the newest collateral").WithFix("make room and check the permissions of %s", s.dir)
	}
	return nil
}

// CRLNumber returns the number of a revocation list (RFC 5280 section 5.2.3). A list
// without one, or with one of more than 64 bits, has the code floor_crl_number.
func CRLNumber(crl *x509.RevocationList) (uint64, error) {
	if crl.Number == nil || !crl.Number.IsUint64() {
		return 0, fault.New("floor_crl_number", "the revocation list of %q has no number of up to 64 bits", crl.Issuer.String())
	}
	return crl.Number.Uint64(), nil
}

var products = regexp.MustCompile(`^((sgx:)?[0-9a-f]{12}|Milan|Genoa|Turin)$`)

func checkProduct(product string) error {
	if !products.MatchString(product) {
		return fault.New("floor_product", "%.40q is neither an FMSPC nor an SEV-SNP product", product)
	}
	return nil
}

func (s *Store) path() string { return filepath.Join(s.dir, "floor.json") }

// read fails closed on everything but a file that is not there.
func (s *Store) read() (*document, error) {
	data, err := readRegular(s.path())
	if errors.Is(err, fs.ErrNotExist) {
		return &document{Version: 1, Floors: map[string]uint64{}}, nil
	}
	var doc document
	if err == nil {
		err = strictjson.Decode(data, &doc, strictjson.Limits{Size: maxFile, Depth: 2})
	}
	if err == nil && (doc.Version != 1 || doc.Floors == nil || len(doc.Floors) > MaxProducts) {
		err = fault.New("floor_unreadable", "version %d with %d floors, want version 1 and at most %d", doc.Version, len(doc.Floors), MaxProducts)
	}
	for p := range doc.Floors {
		if err == nil {
			err = checkProduct(p)
		}
	}
	if err != nil {
		return nil, fault.Wrap(err, "floor_unreadable", "read the newest collateral seen, %s", s.path()).
			WithFix("restore the file; removing it makes the next collateral count as the newest, however old")
	}
	return &doc, nil
}

func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o022 != 0 {
		return nil, fault.New("floor_unreadable", "it is not a regular file that only its owner may write, but %s", fi.Mode())
	}
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

// lock waits until no other holds the directory. The lock belongs to the open
// directory, so the kernel drops it with the process.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	d, err := os.Open(s.dir)
	if err != nil {
		return nil, fault.Wrap(err, "floor_unreadable", "open %s", s.dir)
	}
	for {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { d.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			d.Close()
			return nil, fault.Wrap(err, "floor_locked", "lock %s", s.dir)
		}
		select {
		case <-ctx.Done():
			d.Close()
			return nil, fault.Wrap(ctx.Err(), "floor_locked", "wait for another process to release %s", s.dir)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
