// SPDX-License-Identifier: Apache-2.0

package hostlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// guard stands between the pipe and yamux and ends the session when the peer does
// what yamux alone would answer with unbounded memory: yamux starts a goroutine for
// each ping, and keeps each stream that we closed, with up to 256 KiB of data, until
// the peer has closed it too or a timeout passes.
type guard struct {
	r     io.Reader // behind the handshake's buffer
	inner io.ReadWriteCloser
	once  sync.Once
	err   error // of Close

	streams    func() int // streams that yamux remembers
	maxStreams int

	header [12]byte // of the frame being read (yamux spec.md, "Framing")
	have   int      // bytes of header
	body   uint32   // bytes of data to pass before the next header

	pings float64 // tokens
	last  time.Time
}

const (
	pingBurst = 32
	pingRate  = 10 // per second; honest peers send one in seconds

	typeData = 0
	typePing = 2
	typeLast = 3
	flagSYN  = 1
)

var errProtocol = errors.New("hostlink: the peer broke the protocol")

func newGuard(r io.Reader, inner io.ReadWriteCloser) *guard {
	return &guard{r: r, inner: inner, pings: pingBurst, last: time.Now()}
}

func (g *guard) Write(p []byte) (int, error) { return g.inner.Write(p) }

func (g *guard) Close() error {
	g.once.Do(func() { g.err = g.inner.Close() })
	return g.err
}

func (g *guard) Read(p []byte) (int, error) {
	n, err := g.r.Read(p)
	if bad := g.inspect(p[:n]); bad != nil {
		return 0, bad
	}
	return n, err
}

func (g *guard) inspect(p []byte) error {
	for len(p) > 0 {
		if g.body > 0 {
			n := min(uint64(g.body), uint64(len(p)))
			g.body -= uint32(n)
			p = p[n:]
			continue
		}
		n := copy(g.header[g.have:], p)
		g.have += n
		p = p[n:]
		if g.have < len(g.header) {
			return nil
		}
		g.have = 0
		if err := g.frame(); err != nil {
			return err
		}
	}
	return nil
}

// frame checks one header: version u8, type u8, flags u16, stream u32, length u32,
// big endian.
func (g *guard) frame() error {
	version, kind := g.header[0], g.header[1]
	flags := binary.BigEndian.Uint16(g.header[2:])
	length := binary.BigEndian.Uint32(g.header[8:])
	switch {
	case version != 0 || kind > typeLast:
		return fmt.Errorf("%w: not a frame", errProtocol)
	case kind == typePing && flags&flagSYN != 0:
		now := time.Now()
		g.pings = min(pingBurst, g.pings+now.Sub(g.last).Seconds()*pingRate) - 1
		g.last = now
		if g.pings < 0 {
			return fmt.Errorf("%w: too many pings", errProtocol)
		}
	case kind < typePing && flags&flagSYN != 0 && g.streams() >= g.maxStreams:
		return fmt.Errorf("%w: more than %d streams", errProtocol, g.maxStreams)
	}
	if kind == typeData {
		g.body = length
	}
	return nil
}
