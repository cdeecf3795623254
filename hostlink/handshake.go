// SPDX-License-Identifier: Apache-2.0

package hostlink

import (
	"bufio"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"sync"
	"time"
)

type (
	magic [16]byte
	nonce [16]byte
)

// The magics begin with a byte that no yamux frame begins with (its version, 0), so
// that a hello into a running session ends that session.
var (
	magicHello = magic([]byte("\xd5dstack-hello-1\n"))
	magicReply = magic([]byte("\xd5dstack-reply-1\n"))
	magicGo    = magic([]byte("\xd5dstack-start-1\n"))
)

// maxGarbage bounds what is read before a handshake is complete: more than the
// buffers of a unix socket and a virtio queue can hold together.
const maxGarbage = 4 << 20

// helloEvery is the time between two hellos; it doubles up to the maximum. Hellos
// are repeated since one is lost when the guest's port closes while it is under way.
const (
	helloEvery    = 100 * time.Millisecond
	helloEveryMax = 2 * time.Second
)

// scanner finds handshake messages in a stream that may begin with anything.
type scanner struct {
	r      *bufio.Reader
	budget int // bytes left
}

func newScanner(r io.Reader) *scanner {
	return &scanner{bufio.NewReader(r), maxGarbage}
}

// next returns the next message with one of the magics and its nonce.
func (s *scanner) next(wanted ...magic) (magic, nonce, error) {
	var last magic // the last 16 bytes read
	for n := 1; ; n++ {
		b, err := s.byte()
		if err != nil {
			return magic{}, nonce{}, err
		}
		copy(last[:], last[1:])
		last[len(last)-1] = b
		for _, m := range wanted {
			if n >= len(last) && last == m {
				var got nonce
				for i := range got {
					if got[i], err = s.byte(); err != nil {
						return magic{}, nonce{}, err
					}
				}
				return m, got, nil
			}
		}
	}
}

func (s *scanner) byte() (byte, error) {
	if s.budget == 0 {
		return 0, fmt.Errorf("%w within %d bytes", ErrHandshake, maxGarbage)
	}
	s.budget--
	b, err := s.r.ReadByte()
	if err != nil {
		return 0, fmt.Errorf("handshake: %w", err)
	}
	return b, nil
}

func message(m magic, n nonce) []byte { return append(m[:], n[:]...) }

// shakeHost returns a reader of what follows the guest's reply.
func shakeHost(ctx context.Context, rw io.ReadWriter) (io.Reader, error) {
	var own nonce
	if _, err := rand.Read(own[:]); err != nil {
		return nil, err
	}
	// Write in the background: while nobody reads at the other end a write blocks,
	// and the reply must be read as soon as it comes.
	answered := make(chan struct{})
	var sending sync.WaitGroup
	var sendErr error
	sending.Go(func() {
		for wait := helloEvery; ; wait = min(2*wait, helloEveryMax) {
			if _, sendErr = rw.Write(message(magicHello, own)); sendErr != nil {
				return // the reader below fails as well
			}
			select {
			case <-answered:
				return
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
	})
	in := newScanner(rw)
	for {
		_, got, err := in.next(magicReply)
		if err == nil && got != own {
			continue // the answer to a former host
		}
		close(answered)
		if err != nil {
			return nil, err // the caller closes rw, which ends the sender
		}
		break
	}
	sending.Wait()
	if sendErr == nil {
		_, sendErr = rw.Write(message(magicGo, own))
	}
	if sendErr != nil {
		return nil, fmt.Errorf("handshake: %w", sendErr)
	}
	return in.r, nil
}

// shakeGuest returns a reader of what follows the host's go.
func shakeGuest(rw io.ReadWriter) (io.Reader, error) {
	in := newScanner(rw)
	var replied nonce
	var any bool
	for {
		m, got, err := in.next(magicHello, magicGo)
		if err != nil {
			return nil, err
		}
		switch {
		case m == magicGo && any && got == replied:
			return in.r, nil
		case m == magicHello && (!any || got != replied):
			if _, err := rw.Write(message(magicReply, got)); err != nil {
				return nil, fmt.Errorf("handshake: %w", err)
			}
			replied, any = got, true
		}
	}
}
