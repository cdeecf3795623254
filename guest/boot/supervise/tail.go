// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bytes"
	"io"
	"strings"
	"sync"
	"time"
)

// Tail keeps the end of what a process writes.
type Tail struct {
	mu      sync.Mutex
	max     int
	buf     []byte
	readers int
	// Line, when set before use, is called with each complete line, without its
	// end; lines longer than max are cut.
	Line func(string)
	part []byte
}

// NewTail returns a Tail of the last max bytes.
func NewTail(max int) *Tail { return &Tail{max: max} }

// Write appends p and never fails.
func (t *Tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.max; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	t.mu.Unlock()
	if t.Line != nil {
		t.lines(p)
	}
	return len(p), nil
}

func (t *Tail) lines(p []byte) {
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			if room := t.max - len(t.part); room > 0 {
				t.part = append(t.part, p[:min(room, len(p))]...)
			}
			return
		}
		t.Line(string(t.part) + string(p[:i]))
		t.part, p = t.part[:0], p[i+1:]
	}
}

// reading counts the pipes that are still open, so that settle can wait for them.
func (t *Tail) reading(n int) {
	t.mu.Lock()
	t.readers += n
	t.mu.Unlock()
}

func (t *Tail) readFrom(r io.Reader) {
	_, _ = io.Copy(onlyWriter{t}, r)
	t.reading(-1)
}

type onlyWriter struct{ io.Writer }

// settle waits, at most d, for the pipes of processes that have exited to drain.
func (t *Tail) settle(d time.Duration) {
	for deadline := time.Now().Add(d); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		t.mu.Lock()
		busy := t.readers > 0
		t.mu.Unlock()
		if !busy {
			return
		}
	}
}

// String returns the kept bytes as text.
func (t *Tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.ToValidUTF8(string(t.buf), "\uFFFD")
}

// LastLines returns the last n non-empty lines joined by "; ", for error messages.
func (t *Tail) LastLines(n int) string {
	var keep []string
	for line := range strings.Lines(t.String()) {
		if line = strings.TrimSpace(line); line != "" {
			keep = append(keep, line)
		}
	}
	return strings.Join(keep[max(0, len(keep)-n):], "; ")
}
