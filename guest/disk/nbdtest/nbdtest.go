// SPDX-License-Identifier: Apache-2.0

// Package nbdtest is a hostile disk for tests: an NBD server whose disks lose power,
// change bytes between two reads and let a test alter whatever is on them. QEMU
// attaches one with driver=nbd over a Unix socket.
//
// It speaks the fixed newstyle handshake and simple replies of the NBD protocol
// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md), as far as
// QEMU needs. The client is a test's QEMU and is trusted.
package nbdtest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
)

// block is the unit in which a store keeps and loses bytes.
const block = 4096

// A Store is the content of a disk, zero where nothing was written. It has a write
// cache: until a flush, a power cut may lose any block that was written, or keep an
// earlier version of it.
type Store struct {
	mu     sync.Mutex
	blocks map[int64][]byte
	// earlier holds the versions of a block since the last flush, oldest first; nil is
	// a block of zeros.
	earlier map[int64][][]byte
	off     bool // no power: writes are lost
	left    int  // writes until the power goes; negative: it stays
	onRead  func(at int64, p []byte)
}

// NewStore returns a disk of zeros.
func NewStore() *Store {
	return &Store{blocks: map[int64][]byte{}, earlier: map[int64][][]byte{}, left: -1}
}

// Clone returns a copy of what the disk would read as now.
func (s *Store) Clone() *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := NewStore()
	for n, b := range s.blocks {
		c.blocks[n] = bytes.Clone(b)
	}
	return c
}

// OnRead sets a function that may change the bytes of each read by the client;
// nil: none.
func (s *Store) OnRead(f func(at int64, p []byte)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onRead = f
}

// Read fills p from the byte at.
func (s *Store) Read(at int64, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.each(at, p, func(n int64, from int, piece []byte) {
		if b := s.blocks[n]; b != nil {
			copy(piece, b[from:])
		} else {
			clear(piece)
		}
	})
}

// Put writes p at the byte at, behind the client's back: it is durable.
func (s *Store) Put(at int64, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.each(at, p, s.set)
}

// Flip inverts one bit.
func (s *Store) Flip(at int64, bit uint) {
	p := make([]byte, 1)
	s.Read(at, p)
	p[0] ^= 1 << bit
	s.Put(at, p)
}

// Sum returns a hash of the whole content.
func (s *Store) Sum() [32]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	var numbers []int64
	zero := make([]byte, block)
	for n, b := range s.blocks {
		if !bytes.Equal(b, zero) {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	h := sha256.New()
	for _, n := range numbers {
		binary.Write(h, binary.LittleEndian, n)
		h.Write(s.blocks[n])
	}
	return [32]byte(h.Sum(nil))
}

// Contains reports whether the bytes lie anywhere within a block.
func (s *Store) Contains(text []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.blocks {
		if bytes.Contains(b, text) {
			return true
		}
	}
	return false
}

// Cut takes the power away: of each block that was not flushed some version stays,
// chosen by rng, and later writes are lost, though acknowledged.
func (s *Store) Cut(rng *rand.Rand) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut(rng)
}

func (s *Store) cut(rng *rand.Rand) {
	if s.off {
		return
	}
	s.off = true
	var numbers []int64
	for n := range s.earlier {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	for _, n := range numbers {
		versions := s.earlier[n]
		if i := rng.IntN(len(versions) + 1); i < len(versions) {
			if versions[i] == nil {
				delete(s.blocks, n)
			} else {
				s.blocks[n] = versions[i]
			}
		}
	}
	s.earlier = map[int64][][]byte{}
}

// CutAfter takes the power away after n more writes of the client.
func (s *Store) CutAfter(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = n
}

// Restore gives the power back.
func (s *Store) Restore() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.off, s.left = false, -1
}

func (s *Store) each(at int64, p []byte, f func(n int64, from int, piece []byte)) {
	for len(p) > 0 {
		from := int(at % block)
		n := min(len(p), block-from)
		f(at/block, from, p[:n])
		at, p = at+int64(n), p[n:]
	}
}

func (s *Store) set(n int64, from int, piece []byte) {
	b := make([]byte, block)
	copy(b, s.blocks[n])
	copy(b[from:], piece)
	s.blocks[n] = b
}

// write is a write of the client.
func (s *Store) write(at int64, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left == 0 {
		s.cut(rand.New(rand.NewPCG(uint64(at), 7)))
	}
	if s.left > 0 {
		s.left--
	}
	if s.off {
		return
	}
	s.each(at, p, func(n int64, from int, piece []byte) {
		s.earlier[n] = append(s.earlier[n], s.blocks[n])
		s.set(n, from, piece)
	})
}

func (s *Store) flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.off {
		s.earlier = map[int64][][]byte{}
	}
}

func (s *Store) read(at int64, p []byte) {
	s.Read(at, p)
	s.mu.Lock()
	f := s.onRead
	s.mu.Unlock()
	if f != nil {
		f(at, p)
	}
}

// A Server offers exports: sizes by name, each with the store that is attached.
type Server struct {
	listener net.Listener
	work     sync.WaitGroup

	mu      sync.Mutex
	exports map[string]*export
	conns   map[net.Conn]bool
}

type export struct {
	size  int64
	store *Store
}

// Listen serves on the Unix socket at path until Close.
func Listen(path string, sizes map[string]int64) (*Server, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	s := &Server{listener: l, exports: map[string]*export{}, conns: map[net.Conn]bool{}}
	for name, size := range sizes {
		s.exports[name] = &export{size: size, store: NewStore()}
	}
	s.work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns[c] = true
			s.mu.Unlock()
			s.work.Go(func() {
				_ = s.serve(c)
				c.Close()
				s.mu.Lock()
				delete(s.conns, c)
				s.mu.Unlock()
			})
		}
	})
	return s, nil
}

// Attach makes the store the content of the export.
func (s *Server) Attach(name string, store *Store) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.exports[name]
	if e == nil {
		return fmt.Errorf("no export %q", name)
	}
	e.store = store
	return nil
}

// Close ends the server and waits for its goroutines.
func (s *Server) Close() {
	s.listener.Close()
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.work.Wait()
}

func (s *Server) export(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[name]
}

func (s *Server) store(e *export) *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return e.store
}

const (
	magicOption = 0x49484156454f5054 // IHAVEOPT
	magicReply  = 0x3e889045565a9
	// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES
	transmission = 1 | 4 | 8 | 32 | 64
	maxRequest   = 64 << 20
)

var errEnd = errors.New("the client is done")

func (s *Server) serve(c net.Conn) error {
	e, err := s.handshake(c)
	if err != nil {
		return err
	}
	for {
		if err := s.request(c, e); err != nil {
			return err
		}
	}
}

func (s *Server) handshake(c net.Conn) (*export, error) {
	hello := binary.BigEndian.AppendUint64([]byte("NBDMAGIC"), magicOption)
	if _, err := c.Write(binary.BigEndian.AppendUint16(hello, 1|2)); err != nil {
		return nil, err
	}
	head := make([]byte, 16)
	if _, err := io.ReadFull(c, head[:4]); err != nil {
		return nil, err
	}
	for {
		if _, err := io.ReadFull(c, head); err != nil {
			return nil, err
		}
		option, size := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
		if binary.BigEndian.Uint64(head) != magicOption || size > 64<<10 {
			return nil, fmt.Errorf("malformed option")
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(c, data); err != nil {
			return nil, err
		}
		reply := func(kind uint32, data []byte) error {
			b := binary.BigEndian.AppendUint64(nil, magicReply)
			b = binary.BigEndian.AppendUint32(b, option)
			b = binary.BigEndian.AppendUint32(b, kind)
			b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
			_, err := c.Write(append(b, data...))
			return err
		}
		if option != 7 || len(data) < 4 { // NBD_OPT_GO
			if err := reply(0x80000001, nil); err != nil { // unsupported
				return nil, err
			}
			continue
		}
		name := string(data[4 : 4+min(int(binary.BigEndian.Uint32(data)), len(data)-4)])
		e := s.export(name)
		if e == nil {
			return nil, fmt.Errorf("no export %q", name)
		}
		info := binary.BigEndian.AppendUint64([]byte{0, 0}, uint64(e.size))
		if err := errors.Join(reply(3, binary.BigEndian.AppendUint16(info, transmission)), reply(1, nil)); err != nil {
			return nil, err
		}
		return e, nil
	}
}

func (s *Server) request(c net.Conn, e *export) error {
	head := make([]byte, 28)
	if _, err := io.ReadFull(c, head); err != nil {
		return err
	}
	flags, kind := binary.BigEndian.Uint16(head[4:]), binary.BigEndian.Uint16(head[6:])
	at, size := int64(binary.BigEndian.Uint64(head[16:])), binary.BigEndian.Uint32(head[24:])
	if binary.BigEndian.Uint32(head) != 0x25609513 || size > maxRequest {
		return fmt.Errorf("malformed request")
	}
	store := s.store(e)
	reply := make([]byte, 16)
	binary.BigEndian.PutUint32(reply, 0x67446698)
	copy(reply[8:], head[8:16])
	var data []byte
	if kind == 1 {
		data = make([]byte, size)
		if _, err := io.ReadFull(c, data); err != nil {
			return err
		}
	}
	switch {
	case kind == 2:
		return errEnd
	case kind != 3 && (at < 0 || at > e.size || int64(size) > e.size-at):
		binary.BigEndian.PutUint32(reply[4:], 22)
	case kind == 0:
		b := make([]byte, size)
		store.read(at, b)
		reply = append(reply, b...)
	case kind == 1:
		store.write(at, data)
	case kind == 6: // write zeros
		store.write(at, make([]byte, size))
	case kind == 3:
		store.flush()
	case kind == 4: // trim: keeps what is there, as a disk may
	default:
		binary.BigEndian.PutUint32(reply[4:], 22)
	}
	if flags&1 != 0 { // FUA: this write is durable; flushing more is allowed
		store.flush()
	}
	_, err := c.Write(reply)
	return err
}
