// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
)

func TestMemoRemembersWhatSucceeded(t *testing.T) {
	runs := 0
	step := func() (any, error) { runs++; return runs, nil }
	for _, m := range []*Memo{nil, {}} {
		runs = 0
		for range 3 {
			if _, err := m.Do("a", [][]byte{{1}, {2}}, step); err != nil {
				t.Fatal(err)
			}
		}
		if want := map[bool]int{true: 3, false: 1}[m == nil]; runs != want {
			t.Errorf("memo %v: %d runs, want %d", m != nil, runs, want)
		}
	}
	// Other inputs are other steps, however they are divided.
	m := new(Memo)
	runs = 0
	for _, in := range []struct {
		name  string
		parts [][]byte
	}{{"a", [][]byte{{1, 2}}}, {"a", [][]byte{{1}, {2}}}, {"a", [][]byte{{1, 2}, {}}}, {"b", [][]byte{{1, 2}}}, {"a", nil}} {
		if _, err := m.Do(in.name, in.parts, step); err != nil {
			t.Fatal(err)
		}
	}
	if runs != 5 {
		t.Errorf("%d runs of five different steps", runs)
	}
	// A failure is not remembered.
	fail := errors.New("no")
	for range 2 {
		if _, err := m.Do("f", nil, func() (any, error) { runs++; return nil, fail }); err != fail {
			t.Error(err)
		}
	}
	if runs != 7 {
		t.Errorf("a failure was remembered")
	}
}

func TestMemoIsBounded(t *testing.T) {
	m := new(Memo)
	for i := range uint32(3 * maxMemo) {
		_, _ = m.Do("n", [][]byte{binary.BigEndian.AppendUint32(nil, i)}, func() (any, error) { return nil, nil })
		if len(m.steps) > maxMemo {
			t.Fatalf("%d steps", len(m.steps))
		}
	}
	for i := range 100 {
		_, _ = m.Do("b", [][]byte{bytes.Repeat([]byte{byte(i)}, 1<<20)}, func() (any, error) { return nil, nil })
		if m.bytes > maxMemoBytes {
			t.Fatalf("%d bytes", m.bytes)
		}
	}
}

func TestMemoIsSharedByGoroutines(t *testing.T) {
	m := new(Memo)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 1000 {
				v, err := m.Do("n", [][]byte{{byte(i), byte(g % 2)}}, func() (any, error) { return i % 256, nil })
				if err != nil || v.(int) != i%256 {
					t.Errorf("%v, %v", v, err)
				}
			}
		})
	}
	wg.Wait()
}
