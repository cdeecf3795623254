// SPDX-License-Identifier: Apache-2.0

package floor_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/floor"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

const fmspc = "90c06f000000"

func open(t testing.TB, dir string) *floor.Store {
	t.Helper()
	s, err := floor.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// storeDir is private, which t.TempDir need not be.
func storeDir(t testing.TB) string { return filepath.Join(t.TempDir(), "floor") }

// Two real statements of Intel: number 17 of 2025, number 18 of 2026.
func TestThreat_B03_AfterNumber18WasSeenNumber17IsRefused(t *testing.T) {
	number := func(version string) uint64 {
		col, err := collateral.ParseTDX(testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_"+version+"_collateral.json"))
		if err != nil {
			t.Fatal(err)
		}
		var v struct{ TCBEvaluationDataNumber uint64 }
		if err := json.Unmarshal([]byte(col.QEIdentity), &v); err != nil {
			t.Fatal(err)
		}
		return v.TCBEvaluationDataNumber
	}
	older, newer := number("v4"), number("v5")
	if older != 17 || newer != 18 {
		t.Fatalf("vectors have numbers %d and %d", older, newer)
	}
	dir := storeDir(t)
	s := open(t, dir)
	for _, n := range []uint64{older, newer, newer} {
		if err := s.Raise(t.Context(), fmspc, n); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range []*floor.Store{s, open(t, dir)} { // also after a restart
		if err := s.Raise(t.Context(), fmspc, older); fault.Code(err) != "collateral_rollback" || fault.Fix(err) == "" {
			t.Errorf("number 17 after 18: %v", err)
		}
		if n, err := s.Floor(fmspc); n != 18 || err != nil {
			t.Errorf("the floor is %d, %v after a refusal", n, err)
		}
		if err := s.Raise(t.Context(), fmspc, newer); err != nil {
			t.Errorf("number 18 again: %v", err)
		}
	}
	// Other products have floors of their own.
	if err := s.Raise(t.Context(), "b0c06f000000", older); err != nil {
		t.Error(err)
	}
	// So have the statements about SGX, which are numbered apart.
	if err := s.Raise(t.Context(), "sgx:"+fmspc, older); err != nil {
		t.Error(err)
	}
	if err := s.Raise(t.Context(), "sgx:"+fmspc, older-1); fault.Code(err) != "collateral_rollback" {
		t.Errorf("an older statement about SGX: %v", err)
	}
	if n, err := s.Floor("sgx:" + fmspc); n != older || err != nil {
		t.Errorf("the floor of SGX is %d, %v", n, err)
	}
	if n, err := s.Floor(fmspc); n != newer || err != nil {
		t.Errorf("the floor of TDX is %d, %v after a statement about SGX", n, err)
	}
	if n, err := s.Floor("Genoa"); n != 0 || err != nil {
		t.Errorf("a product never seen: %d, %v", n, err)
	}
}

func TestThreat_B03_OlderRevocationListIsRefused(t *testing.T) {
	s := open(t, storeDir(t))
	for _, c := range []struct {
		number *big.Int
		code   string
	}{{big.NewInt(3), ""}, {big.NewInt(4), ""}, {big.NewInt(3), "collateral_rollback"}} {
		n, err := floor.CRLNumber(&x509.RevocationList{Number: c.number})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Raise(t.Context(), "Milan", n); fault.Code(err) != c.code {
			t.Errorf("number %d: %v, want %q", n, err, c.code)
		}
	}
	for _, n := range []*big.Int{nil, big.NewInt(-1), new(big.Int).Lsh(big.NewInt(1), 64)} {
		if _, err := floor.CRLNumber(&x509.RevocationList{Number: n}); fault.Code(err) != "floor_crl_number" {
			t.Errorf("number %v: %v", n, err)
		}
	}
}

// A store that says nothing readable must never count as one that says nothing.
func TestThreat_B03_AnUnreadableStoreIsNeverReset(t *testing.T) {
	good := `{"version":1,"floors":{"90c06f000000":18}}`
	many := map[string]uint64{}
	for i := range floor.MaxProducts + 1 {
		many[fmt.Sprintf("%012x", i)] = 1
	}
	crowd, err := json.Marshal(many)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		make func(path string) error
	}{
		{"an empty file", write("")},
		{"a file cut short", write(good[:20])},
		{"not JSON", write("18")},
		{"null", write("null")},
		{"another version", write(strings.Replace(good, "1", "2", 1))},
		{"no floors", write(`{"version":1}`)},
		{"a floor below zero", write(strings.Replace(good, "18", "-18", 1))},
		{"a floor that is text", write(strings.Replace(good, "18", `"18"`, 1))},
		{"a floor beyond 64 bits", write(strings.Replace(good, "18", "18446744073709551616", 1))},
		{"a product twice", write(`{"version":1,"floors":{"90c06f000000":18,"90c06f000000":0}}`)},
		{"a product of another spelling", write(strings.Replace(good, "90c06f", "90C06F", 1))},
		{"an unknown member", write(strings.Replace(good, "}", `},"reset":true`, 1))},
		{"text after it", write(good + "x")},
		{"a file beyond the limit", write(strings.Repeat(" ", 1<<20) + good)},
		{"too many products", write(`{"version":1,"floors":` + string(crowd) + `}`)},
		{"a file that others may write", func(path string) error {
			return errors.Join(os.WriteFile(path, []byte(good), 0o600), os.Chmod(path, 0o666))
		}},
		{"a directory", func(path string) error { return os.Mkdir(path, 0o700) }},
		{"a link", func(path string) error {
			return errors.Join(os.WriteFile(path+".real", []byte(good), 0o600), os.Symlink(path+".real", path))
		}},
		{"a link to nowhere", func(path string) error { return os.Symlink(path+".gone", path) }},
		{"a pipe", func(path string) error { return syscall.Mkfifo(path, 0o600) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := storeDir(t)
			s := open(t, dir)
			path := filepath.Join(dir, "floor.json")
			if err := c.make(path); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Lstat(path)
			for range 2 {
				if n, err := s.Floor(fmspc); fault.Code(err) != "floor_unreadable" || n != 0 {
					t.Errorf("Floor: %d, %v", n, err)
				}
				if err := s.Raise(t.Context(), fmspc, 1); fault.Code(err) != "floor_unreadable" || fault.Fix(err) == "" {
					t.Errorf("Raise: %v", err)
				}
			}
			if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) || after.ModTime() != before.ModTime() {
				t.Error("the file was changed")
			}
		})
	}
	dir := storeDir(t)
	s := open(t, dir)
	if err := write(good)(filepath.Join(dir, "floor.json")); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Floor(fmspc); n != 18 || err != nil {
		t.Errorf("without the change: %d, %v", n, err)
	}
}

func write(data string) func(string) error {
	return func(path string) error { return os.WriteFile(path, []byte(data), 0o600) }
}

func TestProductsAreRefusedForTheirOwnReason(t *testing.T) {
	s := open(t, storeDir(t))
	for _, p := range []string{"", "90C06F000000", "90c06f00000", "90c06f000000\n", "genoa", "../floor", "sgx:", "sgx:Milan", "sgx:sgx:90c06f000000", "tdx:90c06f000000", strings.Repeat("a", 1000)} {
		if _, err := s.Floor(p); fault.Code(err) != "floor_product" {
			t.Errorf("Floor(%.20q): %v", p, err)
		}
		if err := s.Raise(t.Context(), p, 1); fault.Code(err) != "floor_product" {
			t.Errorf("Raise(%.20q): %v", p, err)
		}
	}
}

func TestAFullStoreRefusesNewProductsOnly(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	many := map[string]uint64{}
	for i := range floor.MaxProducts {
		many[fmt.Sprintf("%012x", i)] = 1
	}
	data, err := json.Marshal(map[string]any{"version": 1, "floors": many})
	if err != nil {
		t.Fatal(err)
	}
	if err := write(string(data))(filepath.Join(dir, "floor.json")); err != nil {
		t.Fatal(err)
	}
	if err := s.Raise(t.Context(), "Milan", 1); fault.Code(err) != "floor_full" {
		t.Errorf("a new product: %v", err)
	}
	if err := s.Raise(t.Context(), "000000000001", 2); err != nil {
		t.Errorf("a known product: %v", err)
	}
}

func TestRaiseReportsWhatItCannotRemember(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if err := s.Raise(ctx, fmspc, 1); fault.Code(err) != "floor_locked" || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while another holds the lock: %v", err)
	}
	if n, err := s.Floor(fmspc); n != 0 || err != nil {
		t.Errorf("reading needs no lock: %d, %v", n, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := s.Raise(t.Context(), fmspc, 1); fault.Code(err) != "floor_unreadable" {
		t.Errorf("without a directory: %v", err)
	}
	if os.Geteuid() == 0 {
		t.Log("a directory without write permission is not tried as root, whom it does not stop")
		return
	}
	s = open(t, dir)
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	if err := s.Raise(t.Context(), fmspc, 1); fault.Code(err) != "floor_unwritable" {
		t.Errorf("a directory that cannot be written: %v", err)
	}
}

// Processes and goroutines race; no raise is lost, and no floor sinks.
func TestFloorsRiseAcrossProcesses(t *testing.T) {
	dir := os.Getenv("FLOOR_TEST_DIR")
	if dir != "" {
		first, _ := strconv.ParseUint(os.Getenv("FLOOR_TEST_FIRST"), 10, 64)
		s := open(t, dir)
		for i := range uint64(20) {
			if err := s.Raise(t.Context(), fmspc, first+3*i); err != nil && fault.Code(err) != "collateral_rollback" {
				t.Fatal(err)
			}
			if err := s.Raise(t.Context(), fmt.Sprintf("%012x", first), i+1); err != nil {
				t.Fatal(err)
			}
		}
		return
	}
	dir = storeDir(t)
	s := open(t, dir)
	var wg sync.WaitGroup
	for first := range 3 {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0], "-test.run=^TestFloorsRiseAcrossProcesses$")
			cmd.Env = append(os.Environ(), "FLOOR_TEST_DIR="+dir, fmt.Sprint("FLOOR_TEST_FIRST=", first))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("process %d: %v\n%s", first, err, out)
			}
		})
	}
	stop := make(chan struct{})
	go func() { wg.Wait(); close(stop) }()
	for last := uint64(0); ; {
		n, err := s.Floor(fmspc)
		if err != nil || n < last {
			t.Fatalf("the floor went from %d to %d (%v)", last, n, err)
		}
		last = n
		select {
		case <-stop:
			if n, err := s.Floor(fmspc); err != nil || n != 2+3*19 {
				t.Errorf("the floor is %d, %v, want %d", n, err, 2+3*19)
			}
			for first := range 3 {
				if n, err := s.Floor(fmt.Sprintf("%012x", first)); err != nil || n != 20 {
					t.Errorf("floor %d is %d, %v, want 20", first, n, err)
				}
			}
			return
		default:
		}
	}
}

func FuzzStore(f *testing.F) {
	f.Add([]byte(`{"version":1,"floors":{"90c06f000000":18}}`))
	f.Add([]byte(`{}`))
	dir := storeDir(f)
	s := open(f, dir)
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := write(string(data))(filepath.Join(dir, "floor.json")); err != nil {
			t.Fatal(err)
		}
		n, err := s.Floor(fmspc)
		if err != nil {
			if fault.Code(err) != "floor_unreadable" {
				t.Fatal(err)
			}
			return
		}
		if err := s.Raise(t.Context(), fmspc, n); err != nil {
			t.Fatal(err)
		}
	})
}
