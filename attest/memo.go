// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
)

// Limits of a Memo: steps, and bytes of their inputs, of which what is remembered is
// a small multiple. A set of TDX collateral takes about twenty steps and 64 KiB. Whom
// a step is remembered for may be hostile: a certificate is read before anyone knows
// who signed it.
const (
	maxMemo      = 4096
	maxMemoBytes = 8 << 20
)

// Memo remembers steps of verification that are a function of bytes alone, such as
// reading a document whose signature holds, so that collateral that serves many
// quotes is verified once. It changes no outcome: what depends on time, roots or
// options is done each time, and failures are never remembered.
//
// The zero value and nil are usable; nil remembers nothing. A Memo may be used by
// many goroutines. When it is full it starts anew.
type Memo struct {
	mu    sync.Mutex
	steps map[[sha256.Size]byte]any
	bytes int
}

// Do returns what step gave before for the same name and inputs, or runs it and
// remembers the result unless it is an error. All that step depends on must be
// among the inputs. The result is shared: nobody may change it.
func (m *Memo) Do(name string, inputs [][]byte, step func() (any, error)) (any, error) {
	if m == nil {
		return step()
	}
	h := sha256.New()
	size := 0
	for _, part := range append([][]byte{[]byte(name)}, inputs...) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
		h.Write(part)
		size += len(part)
	}
	key := [sha256.Size]byte(h.Sum(nil))
	m.mu.Lock()
	value, known := m.steps[key]
	m.mu.Unlock()
	if known {
		return value, nil
	}
	value, err := step()
	if err != nil {
		return value, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.steps[key]; known {
		return value, nil
	}
	if m.steps == nil || len(m.steps) >= maxMemo || m.bytes+size > maxMemoBytes {
		m.steps, m.bytes = map[[sha256.Size]byte]any{}, 0
	}
	m.steps[key], m.bytes = value, m.bytes+size
	return value, nil
}
