// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"sync"
	"time"
	"unicode/utf8"
)

// Event is something that happened to a VM: reported by its guest (boot.progress,
// boot.error, shutdown.progress, instance.info), which may say anything, or by the
// VMM (names that start with "vm.").
type Event struct {
	TimeMS int64  `json:"time_ms"` // Unix time
	Event  string `json:"event"`
	Body   string `json:"body"`
}

const (
	maxEventName = 64
	maxEventBody = 4096 // longer ones are cut (vmm.md §9.1: upstream loses them)
	maxJournal   = 1 << 20
	maxRecent    = 512 // events in memory
	maxFollowers = 16
)

// journal is the events of one VM: a JSON-lines file of at most 2 × maxJournal
// bytes and the newest few in memory. It is a report for people: a line that a
// power cut loses is no harm, so nothing is flushed.
type journal struct {
	path string

	mu        sync.Mutex
	recent    []Event
	followers map[chan Event]bool
}

// openJournal reads the newest events back, calling seen for each in order.
func openJournal(path string, seen func(Event)) *journal {
	j := &journal{path: path, followers: map[chan Event]bool{}}
	for _, name := range []string{path + ".1", path} {
		data, err := readFile(name, 2*maxJournal)
		if err != nil {
			continue
		}
		sc := bufio.NewScanner(bytes.NewReader(data))
		sc.Buffer(nil, 64<<10)
		for sc.Scan() {
			var e Event
			if json.Unmarshal(sc.Bytes(), &e) != nil {
				continue // a line torn by a power cut
			}
			j.remember(e)
			seen(e)
		}
	}
	return j
}

func (j *journal) remember(e Event) {
	if len(j.recent) >= maxRecent {
		copy(j.recent, j.recent[1:])
		j.recent = j.recent[:len(j.recent)-1]
	}
	j.recent = append(j.recent, e)
}

// add records an event, cut to size.
func (j *journal) add(name, body string) Event {
	e := Event{time.Now().UnixMilli(), cut(name, maxEventName), cut(body, maxEventBody)}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.remember(e)
	for ch := range j.followers {
		select {
		case ch <- e:
		default: // too slow: it sees the end of its stream
			delete(j.followers, ch)
			close(ch)
		}
	}
	j.write(e)
	return e
}

func (j *journal) write(e Event) {
	line, err := json.Marshal(e)
	if err != nil {
		return
	}
	f, err := os.OpenFile(j.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return // the directory is gone, or the disk is full: memory has it
	}
	defer f.Close()
	f.Write(append(line, '\n'))
	if fi, err := f.Stat(); err == nil && fi.Size() > maxJournal {
		os.Rename(j.path, j.path+".1")
	}
}

// list returns the newest n events, oldest first.
func (j *journal) list(n int) []Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append([]Event(nil), j.recent[max(0, len(j.recent)-n):]...)
}

// follow returns the newest events, and a channel with those to come. It is nil
// when too many follow already, and closed when the reader is too slow.
func (j *journal) follow() ([]Event, chan Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	past := append([]Event(nil), j.recent...)
	if len(j.followers) >= maxFollowers {
		return past, nil
	}
	ch := make(chan Event, 256)
	j.followers[ch] = true
	return past, ch
}

func (j *journal) unfollow(ch chan Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.followers, ch)
}

// cut shortens text to at most n bytes of valid UTF-8.
func cut(text string, n int) string {
	if !utf8.ValidString(text) {
		text = string(bytes.ToValidUTF8([]byte(text), []byte("?")))
	}
	if len(text) <= n {
		return text
	}
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}

// bucket is a token bucket: burst at once, then rate per second.
type bucket struct {
	mu     sync.Mutex
	tokens float64
	last   time.Time
}

const (
	notifyRate  = 20
	notifyBurst = 200
)

func (b *bucket) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last.IsZero() {
		b.tokens = notifyBurst
	} else {
		b.tokens = min(notifyBurst, b.tokens+now.Sub(b.last).Seconds()*notifyRate)
	}
	b.last = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
